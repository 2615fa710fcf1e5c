# Mask R-CNN, ResNet-50 with DS-FPN, COCO, 12 epochs (1x). Not trained by us.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '_base_/adamw_1x_coco.py',
]

model = dict(neck=dict(type='dsnet_mm.DSFPN', max_global_tokens=128))
