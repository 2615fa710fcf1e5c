# The demo's network over-fits eight photographs of COCO: a check that real boxes and
# polygons are learnt. It is evaluated on the very pictures it is trained on.
_base_ = 'mask_rcnn_dsnet_demo_scenes.py'

model = dict(
    backbone=dict(init_cfg=dict(checkpoint=None)),
    neck=dict(num_outs=5),
    rpn_head=dict(anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32, 64])),
    roi_head=dict(
        bbox_head=dict(num_classes=80),
        mask_head=dict(num_classes=80),
    ),
    train_cfg=dict(rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rcnn=dict(max_per_img=100)),
)

data_root = 'data/coco/'
scale = (320, 320)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
eight = dict(
    _delete_=True,
    type='CocoDataset',
    data_root=data_root,
    ann_file='annotations/instances_train2017.json',
    data_prefix=dict(img='train2017/'),
    indices=8,
)
train_dataloader = dict(batch_size=4, dataset=dict(**eight, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**eight, test_mode=True, pipeline=test_pipeline))
test_dataloader = val_dataloader
# Without a file of annotations the truth is that of the pictures evaluated.
val_evaluator = dict(ann_file=None)
test_evaluator = val_evaluator

max_iters = 800
train_cfg = dict(max_iters=max_iters, val_interval=200)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max=max_iters, eta_min=1e-5),
]
default_hooks = dict(checkpoint=dict(interval=max_iters))
