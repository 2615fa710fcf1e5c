# Nuclei, Mask R-CNN, DS-Net with DS-FPN: the detector of weights/. It has 200
# iterations more than that of configs/dsnet.
_base_ = '_base_/nuclei.py'

max_iters = 2400
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max=max_iters, eta_min=1e-5),
]
