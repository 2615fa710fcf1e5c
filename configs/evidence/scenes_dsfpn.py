# Drawn scenes, Mask R-CNN, DS-Net with DS-FPN.
_base_ = '../dsnet/mask_rcnn_dsnet_demo_scenes.py'

default_hooks = dict(
    checkpoint=dict(interval=50, filename_tmpl='iter_{}.pth', max_keep_ckpts=2)
)
custom_hooks = [dict(type='dsnet_mm.CpuTimeHook')]
