# Nuclei, the training of the weights.
_base_ = '../dsnet/mask_rcnn_dsnet_long_nuclei.py'

default_hooks = dict(
    checkpoint=dict(interval=100, filename_tmpl='iter_{}.pth', max_keep_ckpts=2)
)
custom_hooks = [*_base_.custom_hooks, dict(type='dsnet_mm.CpuTimeHook')]
