# A class added to the detector of drawn scenes, with checkpoints from which a training
# goes on.
_base_ = '../few_shot_detection/mask_rcnn_dsnet_scenes_new.py'

default_hooks = dict(
    checkpoint=dict(interval=50, filename_tmpl='iter_{}.pth', max_keep_ckpts=2)
)
custom_hooks = [*_base_.custom_hooks, dict(type='dsnet_mm.CpuTimeHook')]
