# Nuclei, Mask R-CNN, Swin with FPN.
_base_ = 'nuclei_dsnet_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SwinTransformer',
        arch=dict(embed_dims=24, depths=[2, 2, 2, 1], num_heads=[1, 2, 4, 8]),
        img_size=256,
        window_size=8,  # it divides the maps of the training crops
        drop_path_rate=0.0,
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(in_channels=[24, 48, 96, 192]),
)
