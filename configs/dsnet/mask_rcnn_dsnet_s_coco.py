# Mask R-CNN, DS-Net-S* with DS-FPN, COCO, 12 epochs (1x). Not trained by us.
# The other COCO configurations in this folder inherit from this one.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='dsnet_mm.DSNet',
        arch='small',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        # An ImageNet checkpoint (configs/dsnet/dsnet-small_8xb128_in1k.py) goes
        # here: --cfg-options model.backbone.init_cfg.checkpoint=PATH
        init_cfg=dict(type='Pretrained', checkpoint=None, prefix='backbone.'),
    ),
    neck=dict(type='dsnet_mm.DSFPN', in_channels=[64, 128, 320, 512]),
)

# Batch norms see two pictures on each GPU, so processes share their statistics.
sync_bn = 'torch'

# The usual recipe of attention backbones on COCO: AdamW, no decay on norms.
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    ),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=True, milestones=[8, 11], gamma=0.1),
]
