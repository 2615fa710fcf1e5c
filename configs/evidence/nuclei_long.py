# The detector of weights/. It has 200 iterations more than that of configs/dsnet.
_base_ = '../dsnet/mask_rcnn_dsnet_nuclei.py'

max_iters = 2400
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max=max_iters, eta_min=1e-5),
]

default_hooks = dict(
    checkpoint=dict(interval=50, filename_tmpl='iter_{}.pth', max_keep_ckpts=2)
)
custom_hooks = [dict(type='dsnet_mm.CpuTimeHook')]
