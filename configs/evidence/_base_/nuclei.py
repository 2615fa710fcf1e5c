# What all rows of the nuclei table share: heads, data, augmentation and schedule. Rows
# differ in backbone and neck, and all weights start at random.
_base_ = '../../dsnet/mask_rcnn_dsnet_nuclei.py'

# Adaptive sampling in RoIAlign and more proposals: slower than the longer training. The
# backbone has the batch norm of the paper, its default.
model = dict(
    backbone=dict(
        _delete_=True,
        type='dsnet_mm.DSNet',
        arch={{_base_.model.backbone.arch}},
        global_factors={{_base_.model.backbone.global_factors}},
        out_indices={{_base_.model.backbone.out_indices}},
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=0)),
        mask_roi_extractor=dict(roi_layer=dict(sampling_ratio=0)),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=300)),
)

max_iters = 800
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max=max_iters, eta_min=1e-5),
]
default_hooks = dict(
    checkpoint=dict(interval=50, filename_tmpl='iter_{}.pth', max_keep_ckpts=2)
)
custom_hooks = [dict(type='dsnet_mm.CpuTimeHook')]
