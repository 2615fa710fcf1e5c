# CIFAR-10, DeiT. DeiT has no pyramid: 64 patches of 8 x 8 pixels.
_base_ = '../dsnet/_base_/cifar10.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='VisionTransformer',
        arch=dict(embed_dims=60, num_layers=3, num_heads=4, feedforward_channels=240),
        img_size=64,
        patch_size=8,
    ),
    neck=None,
    head=dict(in_channels=60),
)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
