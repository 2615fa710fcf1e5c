# Mask R-CNN, DS-Net-T* with DS-FPN, COCO, 36 epochs (3x), multi-scale.
# Not trained by us.
_base_ = 'mask_rcnn_dsnet_s_3x_coco.py'

model = dict(backbone=dict(arch='tiny', drop_path_rate=0.1))
