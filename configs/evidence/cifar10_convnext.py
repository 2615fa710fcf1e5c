# CIFAR-10, ConvNeXt.
_base_ = '../dsnet/_base_/cifar10.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ConvNeXt',
        arch=dict(depths=[1, 1, 2, 1], channels=[28, 56, 112, 224]),
        # The default scale of 1e-6 hardly grows in a training of minutes.
        layer_scale_init_value=0.0,
    ),
    neck=None,
    head=dict(in_channels=224),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
