# CLIP-Adapter, CLIP's RN50, 16 shots, on images instead of cached features. The encoder
# runs at every step, and each epoch has new random crops.
_base_ = 'clip-adapter_rn50.py'

task = '{{$DSNET_MM_TASK:imagenet}}'
work_dir = 'work_dirs/clip-adapter_rn50_images_' + task.strip('/').split('/')[-1]

model = dict(
    data_preprocessor=dict(
        mean=[122.771, 116.746, 104.094], std=[68.501, 66.632, 70.323], to_rgb=True
    )
)
load = dict(type='LoadImageFromFile')
train_dataloader = dict(
    dataset=dict(
        features=None,
        pipeline=[
            load,
            dict(
                type='RandomResizedCrop',
                scale=224,
                crop_ratio_range=(0.5, 1.0),
                backend='pillow',
                interpolation='bicubic',
            ),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ],
    )
)
test_pipeline = [
    load,
    dict(
        type='ResizeEdge',
        scale=224,
        edge='short',
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
test_dataloader = dict(dataset=dict(features=None, pipeline=test_pipeline))
if task != 'imagenet':
    val_dataloader = test_dataloader
