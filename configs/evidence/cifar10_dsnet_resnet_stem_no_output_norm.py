# CIFAR-10, DS-Net* behind the stem of ResNet and without the norm of its output.
_base_ = 'cifar10_dsnet_resnet_stem.py'

model = dict(backbone=dict(output_norm=False))
