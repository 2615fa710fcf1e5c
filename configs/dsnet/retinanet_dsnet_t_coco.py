# RetinaNet, DS-Net-T* with DS-FPN, COCO, 12 epochs (1x). Not trained by us.
_base_ = 'retinanet_dsnet_s_coco.py'

model = dict(backbone=dict(arch='tiny', drop_path_rate=0.1))
