# Trains one CLIP-Adapter with MMEngine's Runner, on cached features, 16 shots. The
# configurations that inherit from this one set the encoder and the data set.
_base_ = 'mmpretrain::_base_/default_runtime.py'

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(),
    backbone=dict(type='dsnet_mm.OpenCLIPEncoder'),
    head=dict(
        type='dsnet_mm.CLIPAdapterHead',
        adapter=dict(preset='paper', alpha=0.2),
        keep=5.0,
    ),
)

# preprocessing is 'clip' or 'warp', see docs/clip_adapter.md.
features = dict(folder='work_dirs/few_shot_features', preprocessing='clip')
draw = dict(
    type='dsnet_mm.FewShotDataset',
    shots=16,
    seed=1,
    features=features,
    pipeline=[dict(type='PackInputs', input_key='features')],
)
loader = dict(batch_size=256, num_workers=0, collate_fn=dict(type='default_collate'))
train_dataloader = dict(
    **loader,
    # MMEngine sleeps for two seconds at the end of each epoch of other samplers. With
    # this one a batch goes on with the next epoch.
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(part='train', views=10, **draw),
)
val_dataloader = dict(
    **loader,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(part='val', **draw),
)
test_dataloader = dict(
    **loader,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(part='test', **draw),
)
val_evaluator = dict(type='Accuracy', topk=1)
test_evaluator = dict(type='Accuracy', topk=1)

# The recipe of the method `clip_adapter`, see docs/clip_adapter.md.
iterations = 200
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.01))
param_scheduler = dict(type='CosineAnnealingLR', by_epoch=False, end=iterations)
train_cfg = dict(by_epoch=False, max_iters=iterations, val_interval=50)
val_cfg = dict()
test_cfg = dict()
log_processor = dict(by_epoch=False)
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=iterations, max_keep_ckpts=1),
    logger=dict(interval=20),
)
randomness = dict(seed=0)

# Options of `python tools/few_shot.py run CONFIG`, which fits all these methods with 1
# to 16 shots and three seeds.
few_shot = dict(
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
