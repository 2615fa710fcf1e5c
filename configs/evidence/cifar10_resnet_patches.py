# CIFAR-10, ResNet behind patches of 4x4 pixels, as DS-Net has them. It needs 16 % fewer
# multiply-adds.
_base_ = 'cifar10_resnet.py'

custom_imports = dict(imports=['evidence.stems'])
model = dict(backbone=dict(type='ResNetWithPatchStem'))
