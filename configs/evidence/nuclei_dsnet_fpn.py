# Nuclei, Mask R-CNN, DS-Net with FPN.
_base_ = '_base_/nuclei.py'

model = dict(
    neck=dict(
        _delete_=True,
        type='FPN',
        in_channels=[32, 64, 128, 160],
        out_channels={{_base_.width}},
        num_outs=4,
        norm_cfg={{_base_.norm_cfg}},
    )
)
