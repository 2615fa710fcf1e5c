# CIFAR-10, DS-Net, alpha 1. The global stream alone. The FFN is wider: the
# multiply-adds are those of DS-Net*.
_base_ = '../dsnet/_base_/cifar10.py'

model = dict(backbone=dict(isa=False, alpha=1.0, mlp_ratio=5.0))
