# RetinaNet, DS-Net-S* with DS-FPN, COCO, 12 epochs (1x). Not trained by us.
# The levels are those of Fig. 3: C2 to C4, and F5 from C4, strides 8 to 64.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    'mmdet::retinanet/retinanet_tta.py',
    '_base_/dsnet_s_1x_coco.py',
]

model = dict(
    # C1 is left out: the neck does not use it, so its norm would have no gradient.
    backbone=dict(_delete_=True, **_base_.pop('backbone'), out_indices=(1, 2, 3)),
    neck=dict(
        type='dsnet_mm.DSFPN',
        in_channels=[128, 320, 512],
        start_level=0,
        num_outs=4,
        max_global_tokens=128,
    ),
    bbox_head=dict(anchor_generator=dict(strides=[8, 16, 32, 64])),
)
