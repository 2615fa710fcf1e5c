# CIFAR-10, DS-Net*, global to local only. The FFN is wider, so that the multiply-adds
# are those of DS-Net*.
_base_ = '../dsnet/_base_/cifar10.py'

model = dict(backbone=dict(isa='global_to_local', mlp_ratio=4.5))
