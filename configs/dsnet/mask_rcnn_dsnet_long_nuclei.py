# A wider network, more augmentation and a longer training than those of
# mask_rcnn_dsnet_nuclei.py. The annotation files of the two stains are written by
# tools/dataset_converters/nuclei_by_stain.py.
_base_ = 'mask_rcnn_dsnet_nuclei.py'

dims = (48, 96, 192, 256)
width = 96
model = dict(
    backbone=dict(
        arch=dict(embed_dims=dims, depths=(1, 2, 4, 1), num_heads=(1, 2, 4, 4)),
        max_global_tokens=256,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=list(dims), out_channels=width, max_global_tokens=256),
    rpn_head=dict(in_channels=width, feat_channels=width),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width),
        bbox_head=dict(in_channels=width, conv_out_channels=width, fc_out_channels=192),
        mask_roi_extractor=dict(out_channels=width),
        mask_head=dict(num_convs=3, in_channels=width, conv_out_channels=width),
    ),
)

# Crops of the original images, each enlarged to 320 x 320.
size = 320
crops = [(side, side) for side in (107, 128, 160, 200, 246)]
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='RandomChoice',
        transforms=[
            [
                dict(type='RandomCrop', crop_size=crop, allow_negative_crop=True),
                dict(type='Resize', scale=(size, size), keep_ratio=False),
            ]
            for crop in crops
        ],
    ),
    dict(
        type='RandomFlip',
        prob=[0.25, 0.25, 0.25],
        direction=['horizontal', 'vertical', 'diagonal'],
    ),
    dict(type='Rotate', prob=0.5, min_mag=90.0, max_mag=90.0),
    dict(type='Color', prob=0.2, min_mag=0.0, max_mag=0.5),
    dict(type='AutoContrast', prob=0.2),
    dict(type='Invert', prob=0.1),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[
            dict(
                type='CocoDataset',
                data_root=_base_.data_root,
                metainfo=_base_.metainfo,
                ann_file=f'annotations/instances_train_{stain}.json',
                data_prefix=dict(img='train/'),
                pipeline=train_pipeline,
            )
            # Stained images are few, and more different from each other.
            for stain in ('fluorescence', 'stained', 'stained')
        ],
    ),
)
val_evaluator = [
    _base_.val_evaluator,
    dict(type='dsnet_mm.InstanceAccuracy', ann_file=_base_.val_evaluator.ann_file),
]
test_evaluator = val_evaluator

max_iters = 5000
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=200),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max=max_iters, eta_min=1e-5),
]
default_hooks = dict(checkpoint=dict(interval=max_iters))
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=5e-4, priority=49)
]
