# Mask R-CNN, a backbone of timm (here the ConvNeXt-T of DINOv3) with DS-FPN, COCO, 12
# epochs (1x). Not trained by us. docs/ds_fpn.md: what to change for another one.
_base_ = 'mask_rcnn_r50_dsfpn_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.TIMMBackbone',
        model_name='convnext_tiny.dinov3_lvd1689m',
        pretrained=True,
        features_only=True,
        feature_cls='getter',  # always (N, C, H, W); other classes: not for Swin
        out_indices=(0, 1, 2, 3),  # strides 4 to 32
    ),
    # Group norm does not need the sync_bn that is off below.
    neck=dict(in_channels=[96, 192, 384, 768], norm_cfg=dict(type='GN', num_groups=32)),
)

# MMEngine's conversion of norms drops the activations in timm's BatchNormAct2d.
sync_bn = None
