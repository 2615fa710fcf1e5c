# CIFAR-10, DS-Net*, 15 epochs.
_base_ = '_base_/cifar10.py'

max_epochs = 15
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=150),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,
        by_epoch=True,
        T_max=max_epochs,
        convert_to_iter_based=True,
    ),
]
