# The detector of the nuclei, trained on fluorescence and on all stained images of all
# draws: an upper bound of nuclei_stained.py.
_base_ = '../few_shot_detection/mask_rcnn_dsnet_fluorescence.py'

dataset = _base_.train_dataloader.dataset
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[
            dataset,
            dict(
                type='CocoDataset',
                data_root=_base_.data_root,
                metainfo=_base_.metainfo,
                ann_file='annotations/few_shot/drawn.json',
                data_prefix=dict(img=''),
                pipeline=_base_.train_pipeline,
            ),
        ],
    )
)
test_dataloader = dict(
    dataset=dict(ann_file='annotations/few_shot/rest.json', data_prefix=dict(img=''))
)
test_evaluator = dict(ann_file=_base_.data_root + 'annotations/few_shot/rest.json')
default_hooks = dict(
    checkpoint=dict(interval=50, filename_tmpl='iter_{}.pth', max_keep_ckpts=2)
)
custom_hooks = [dict(type='dsnet_mm.CpuTimeHook')]
