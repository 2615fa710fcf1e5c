# The detector that is adapted: nuclei in fluorescence images alone. The files of the
# two stains: tools/dataset_converters/nuclei_by_stain.py.
_base_ = '../dsnet/mask_rcnn_dsnet_nuclei.py'

train_dataloader = dict(
    dataset=dict(ann_file='annotations/instances_train_fluorescence.json')
)
val_dataloader = dict(
    dataset=dict(ann_file='annotations/instances_val_fluorescence.json')
)
test_dataloader = val_dataloader
val_evaluator = dict(
    ann_file=_base_.data_root + 'annotations/instances_val_fluorescence.json'
)
test_evaluator = val_evaluator

max_iters = 1000
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max=max_iters, eta_min=1e-5),
]
default_hooks = dict(checkpoint=dict(interval=max_iters))
