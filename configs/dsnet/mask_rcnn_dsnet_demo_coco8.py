# Trains and evaluates the detector of the demo on the same eight images of COCO. This
# overfitting shows that the network can learn real boxes and polygons.
_base_ = 'mask_rcnn_dsnet_demo_scenes.py'

model = dict(
    backbone=dict(init_cfg=dict(checkpoint=None)),
    neck=dict(num_outs=5),
    rpn_head=dict(anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32, 64])),
    roi_head=dict(
        bbox_head=dict(num_classes=80),
        mask_head=dict(num_classes=80),
    ),
    train_cfg=dict(rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rcnn=dict(max_per_img=100)),
)

data_root = 'data/coco/'
scale = (256, 256)
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
        meta_keys=(
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
            'instances',
        ),
    ),
]
eight = dict(
    _delete_=True,
    type='CocoDataset',
    data_root=data_root,
    ann_file='annotations/instances_train2017.json',
    data_prefix=dict(img='train2017/'),
    # Images in which all objects are larger than 50 x 50 pixels. The indices are
    # those of a subset of COCO with 72 images.
    indices=[1, 2, 3, 4, 5, 10, 11, 16],
)
train_dataloader = dict(batch_size=4, dataset=dict(**eight, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**eight, test_mode=True, pipeline=test_pipeline))
test_dataloader = val_dataloader
# Without ann_file the metric takes the ground truth from `instances` of the samples.
val_evaluator = dict(ann_file=None)
test_evaluator = val_evaluator

max_iters = 600
train_cfg = dict(max_iters=max_iters, val_interval=300)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max=max_iters, eta_min=1e-5),
]
default_hooks = dict(checkpoint=dict(interval=max_iters))
