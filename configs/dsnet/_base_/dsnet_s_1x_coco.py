# Backbone and schedule of the COCO detectors with DS-Net-S*.
_base_ = 'adamw_1x_coco.py'

# A detector moves it into its model by `_base_.pop('backbone')` and adds out_indices.
backbone = dict(
    type='dsnet_mm.DSNet',
    arch='small',
    drop_path_rate=0.2,
    max_global_tokens=128,  # None is the paper: attention grows with the image
    # To start from a checkpoint of configs/dsnet/dsnet-small_8xb128_in1k.py, add
    # --cfg-options model.backbone.init_cfg.checkpoint=PATH
    init_cfg=dict(type='Pretrained', checkpoint=None, prefix='backbone.'),
)
