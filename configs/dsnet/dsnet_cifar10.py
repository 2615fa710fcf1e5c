# A small DS-Net for the ten classes of CIFAR-10. It learns from scratch on two CPU
# cores. The data: tools/dataset_converters/cifar10_to_folders.py.
_base_ = '../evidence/cifar10_dsnet.py'

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
# Inference without the data takes the names from here.
classes = (
    *('airplane', 'automobile', 'bird', 'cat', 'deer'),
    *('dog', 'frog', 'horse', 'ship', 'truck'),
)
test_dataloader = dict(dataset=dict(metainfo=dict(classes=classes)))
