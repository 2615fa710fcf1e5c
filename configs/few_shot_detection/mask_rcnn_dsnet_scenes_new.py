# The detector of mask_rcnn_dsnet_scenes_base.py with the last class added, from 5 boxes
# of each class. AP of the classes before, and of the new one: base and novel.
_base_ = 'mask_rcnn_dsnet_scenes_base.py'

detector = _base_.model
detector.roi_head.bbox_head.num_classes = 4
detector.roi_head.mask_head.num_classes = 4
model = dict(
    _delete_=True,
    type='dsnet_mm.AdaptedDetector',
    detector=detector,
    checkpoint='work_dirs/mask_rcnn_dsnet_scenes_base/last.pth',
    places=['.*fc_cls[.](text_features|.*weight)'],
)
metainfo = dict(
    _delete_=True,
    classes=('striped disc', 'dotted disc', 'striped star', 'dotted star'),
    palette=[(230, 160, 0), (30, 130, 220), (200, 40, 120), (20, 150, 90)],
)
folder = 'annotations/few_shot/'
train_dataloader = dict(
    dataset=dict(metainfo=metainfo, ann_file=folder + '5boxes_draw0.json')
)
val_dataloader = dict(
    dataset=dict(
        metainfo=metainfo, ann_file=folder + 'rest.json', data_prefix=dict(img='')
    )
)
test_dataloader = val_dataloader
val_evaluator = [
    dict(
        type='CocoMetric',
        ann_file=f'{_base_.data_root}{folder}rest_{part}.json',
        metric='bbox',
        prefix=part,
    )
    for part in ('base', 'novel')
]
test_evaluator = val_evaluator

max_iters = 150
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=1e-2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=10),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max=max_iters, eta_min=1e-5),
]
default_hooks = dict(checkpoint=dict(interval=max_iters))
custom_hooks = [dict(type='dsnet_mm.AdaptedDetectorHook')]
