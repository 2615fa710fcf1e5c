# CIFAR-10, DS-Net* without the norm of its output.
_base_ = '_base_/cifar10.py'

custom_imports = dict(imports=['dsnet_mm.cli.evidence.norms'])
model = dict(backbone=dict(type='DSNetWithoutOutputNorm'))
