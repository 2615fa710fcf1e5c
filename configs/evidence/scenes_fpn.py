# Drawn scenes, Mask R-CNN, DS-Net with FPN.
_base_ = 'scenes_dsfpn.py'

model = dict(
    neck=dict(
        _delete_=True,
        type='FPN',
        in_channels=[32, 64, 128, 160],
        out_channels={{_base_.width}},
        num_outs=4,
    )
)
