# CIFAR-10, Swin.
_base_ = '../dsnet/_base_/cifar10.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        arch=dict(embed_dims=22, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8]),
        img_size=64,
        window_size=4,
        pad_small_map=True,  # that of 2 x 2 pixels in the last stage
        drop_path_rate=0.0,
    ),
    head=dict(in_channels=176),
)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
