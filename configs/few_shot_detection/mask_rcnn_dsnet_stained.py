# The detector of mask_rcnn_dsnet_fluorescence.py, adapted to stained tissue from a few
# images. They are drawn by tools/dataset_converters/few_shot_coco.py.
_base_ = 'mask_rcnn_dsnet_fluorescence.py'

model = dict(
    _delete_=True,
    type='dsnet_mm.AdaptedDetector',
    detector={{_base_.model}},
    checkpoint='work_dirs/mask_rcnn_dsnet_fluorescence/last.pth',
    places=['lora'],
)
train_dataloader = dict(
    dataset=dict(
        ann_file='annotations/few_shot/5images_draw0.json', data_prefix=dict(img='')
    )
)
val_dataloader = dict(
    dataset=dict(ann_file='annotations/few_shot/rest.json', data_prefix=dict(img=''))
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=_base_.data_root + 'annotations/few_shot/rest.json')
test_evaluator = val_evaluator

max_iters = 150
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=1e-2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=10),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max=max_iters, eta_min=1e-5),
]
default_hooks = dict(checkpoint=dict(interval=max_iters))
custom_hooks = [
    dict(
        type='dsnet_mm.AdaptedDetectorHook',
        base=dict(
            ann_file='annotations/instances_train_fluorescence.json',
            data_prefix=dict(img='train/'),
        ),
    )
]
