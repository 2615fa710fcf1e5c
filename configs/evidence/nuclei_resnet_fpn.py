# Nuclei, Mask R-CNN, ResNet with FPN.
_base_ = 'nuclei_dsnet_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.ResNet',
        depth=18,
        stem_channels=20,
        base_channels=20,
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(in_channels=[20, 40, 80, 160]),
)
