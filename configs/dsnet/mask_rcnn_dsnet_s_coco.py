# Mask R-CNN, DS-Net-S* with DS-FPN, COCO, 12 epochs (1x). Not trained by us.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '_base_/dsnet_s_1x_coco.py',
]

model = dict(
    backbone=dict(_delete_=True, **_base_.pop('backbone'), out_indices=(0, 1, 2, 3)),
    neck=dict(
        type='dsnet_mm.DSFPN',
        in_channels=[64, 128, 320, 512],
        max_global_tokens=128,
    ),
)
