# A small DS-Net for the ten classes of CIFAR-10. It learns from scratch on two CPU
# cores, better without the norm of its output (docs/results.md). The data:
# tools/dataset_converters/cifar10_to_folders.py.
_base_ = '_base_/cifar10.py'

model = dict(backbone=dict(output_norm=False))

train_cfg = dict(max_epochs=8)
param_scheduler = _base_.param_scheduler
param_scheduler[1].T_max = 8
# Inference without the data takes the names from here.
classes = (
    *('airplane', 'automobile', 'bird', 'cat', 'deer'),
    *('dog', 'frog', 'horse', 'ship', 'truck'),
)
test_dataloader = dict(dataset=dict(metainfo=dict(classes=classes)))
