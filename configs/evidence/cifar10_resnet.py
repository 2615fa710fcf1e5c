# CIFAR-10, ResNet.
_base_ = '../dsnet/_base_/cifar10.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=18,
        stem_channels=12,
        base_channels=16,
    ),
    head=dict(in_channels=128),
)
optim_wrapper = dict(optimizer=dict(lr=1.6e-2))
