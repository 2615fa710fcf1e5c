# CIFAR-10, DS-Net*, local to global only. The FFN is wider, so that the multiply-adds
# are those of DS-Net*.
_base_ = '../dsnet/_base_/cifar10.py'

model = dict(backbone=dict(isa='local_to_global', mlp_ratio=4.5))
