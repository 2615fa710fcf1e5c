# Mask R-CNN, DS-Net-B* with DS-FPN, COCO, 12 epochs (1x). Not trained by us.
_base_ = 'mask_rcnn_dsnet_s_coco.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.3))
