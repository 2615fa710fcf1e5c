# Mask R-CNN, DS-Net-T* with a plain FPN, COCO, 36 epochs (3x), multi-scale.
# Not trained by us.
_base_ = 'mask_rcnn_dsnet_t_3x_coco.py'

_base_.model.neck.pop('max_global_tokens')  # of DSFPN alone
model = dict(neck=dict(type='FPN'))
