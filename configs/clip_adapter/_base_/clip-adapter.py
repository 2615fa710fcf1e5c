# Trains one CLIP-Adapter with MMEngine's Runner, on cached features, 16 shots. The
# configurations that inherit from this one set the encoder.
_base_ = 'mmpretrain::_base_/default_runtime.py'

# The data set, see docs/clip_adapter.md: --cfg-options task=NAME of the tools here, or
# this environment variable.
task = '{{$DSNET_MM_TASK:imagenet}}'

# ImageNet has no validation split of its own, and the seven prompts of Tip-Adapter.
is_imagenet = task == 'imagenet'
prompts = 'imagenet_7' if is_imagenet else None

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(),
    backbone=dict(type='dsnet_mm.OpenCLIPEncoder'),
    head=dict(
        type='dsnet_mm.CLIPAdapterHead',
        class_names=task,
        prompts=prompts,
        adapter=dict(preset='default', alpha=0.2),
    ),
)

# preprocessing is 'clip' or 'warp', see docs/clip_adapter.md.
features = dict(
    folder='work_dirs/few_shot_features',
    preprocessing='clip',
    crop_scale=(0.5, 1.0),
)
draw = dict(
    type='dsnet_mm.FewShotDataset',
    dataset=task,
    shots=16,
    seed=1,
    features=features,
    pipeline=[dict(type='PackInputs', input_key='features')],
)
loader = dict(batch_size=256, num_workers=0, collate_fn=dict(type='default_collate'))
in_order = dict(type='DefaultSampler', shuffle=False)
accuracy = dict(type='Accuracy', topk=1)
train_dataloader = dict(
    **loader,
    # MMEngine sleeps for two seconds at the end of each epoch of other samplers. With
    # this one a batch goes on with the next epoch.
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(part='train', views=10, **draw),
)
test_dataloader = dict(**loader, sampler=in_order, dataset=dict(part='test', **draw))
test_evaluator = accuracy
test_cfg = dict()
val_dataloader, val_evaluator, val_cfg = None, None, None
if not is_imagenet:
    val_dataloader = dict(**loader, sampler=in_order, dataset=dict(part='val', **draw))
    val_evaluator, val_cfg = accuracy, dict()

# The recipe of the method `clip_adapter`, see docs/clip_adapter.md.
iterations = 200
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.01))
custom_hooks = [dict(type='dsnet_mm.AdapterStartHook')]
param_scheduler = dict(type='CosineAnnealingLR', by_epoch=False, end=iterations)
train_cfg = dict(by_epoch=False, max_iters=iterations, val_interval=50)
log_processor = dict(by_epoch=False)
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=iterations, max_keep_ckpts=1),
    logger=dict(interval=20),
)
randomness = dict(seed=0)

# Options of `python tools/few_shot.py run CONFIG`, which fits all these methods with 1
# to 16 shots and three seeds.
few_shot = dict(
    dataset=task,
    prompts=prompts,
    methods=[
        'linear_probe',
        'tip_adapter',
        'tip_adapter_f',
        'task_res',
        'clip_adapter',
        'clip_adapter_paper',
        'clip_adapter_released',
    ],
    preprocessing='clip',
)
if is_imagenet:
    few_shot.update(
        selection='cv',
        # CoOp trains for 50 epochs on ImageNet, for any number of shots.
        overrides=dict(clip_adapter_released=dict(epochs=50)),
    )
