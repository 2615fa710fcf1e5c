# RetinaNet, DS-Net-S* with a plain FPN, COCO, 12 epochs (1x). Not trained by us.
_base_ = 'retinanet_dsnet_s_coco.py'

model = dict(neck=dict(type='FPN'))
