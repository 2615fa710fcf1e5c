# Nuclei, Mask R-CNN, ConvNeXt with FPN.
_base_ = 'nuclei_dsnet_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.ConvNeXt',
        arch=dict(depths=[1, 2, 2, 1], channels=[33, 66, 132, 264]),
        gap_before_final_norm=False,
        # The default scale of 1e-6 hardly grows in a training of minutes.
        layer_scale_init_value=0.0,
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(in_channels=[33, 66, 132, 264]),
)
