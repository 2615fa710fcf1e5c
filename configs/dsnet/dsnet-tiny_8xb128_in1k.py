# DS-Net-T*, ImageNet-1k, 8 GPUs x 128, 300 epochs. Not trained by us.
# The recipe is that of the public code.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='dsnet_mm.DSNet', arch='tiny', attn_drop_rate=0.1, drop_path_rate=0.1
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=512,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        cal_acc=False,
    ),
    train_cfg=dict(
        augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]
    ),
)

train_dataloader = dict(
    batch_size=128, sampler=dict(type='RepeatAugSampler', shuffle=True)
)
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5),
]

# As in the public code, the weights are averaged. Checkpoints hold the average, so that
# is what every tool takes, and what validation and tools/test.py evaluate. The public
# code evaluates the raw weights; evaluate_on_origin=True does so in addition.
custom_hooks = [dict(type='EMAHook', momentum=4e-5, update_buffers=True)]
