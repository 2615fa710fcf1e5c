# CIFAR-10, DS-Net, no ISA. The FFN is wider, so that the multiply-adds are those of
# DS-Net*.
_base_ = '../dsnet/_base_/cifar10.py'

model = dict(backbone=dict(isa=False, mlp_ratio=5.0))
