# CIFAR-10, DS-Net, alpha 0. The local stream alone. The FFN is wider: the multiply-adds
# are those of DS-Net*.
_base_ = '../dsnet/_base_/cifar10.py'

model = dict(backbone=dict(isa=False, alpha=0.0, mlp_ratio=5.0))
