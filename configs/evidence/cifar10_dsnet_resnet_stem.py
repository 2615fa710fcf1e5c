# CIFAR-10, DS-Net* behind the stem of ResNet. It needs 15 % more multiply-adds.
_base_ = '../dsnet/_base_/cifar10.py'

custom_imports = dict(imports=['evidence.stems'])
model = dict(backbone=dict(type='DSNetWithResNetStem', stem_channels=12))
