# CIFAR-10, DS-Net* without the norm of its output.
_base_ = '../dsnet/_base_/cifar10.py'

model = dict(backbone=dict(output_norm=False))
