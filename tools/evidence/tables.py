"""The tables and their rows. Each row is a configuration in configs/evidence."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Options = Mapping[str, Any]
"""Values of a configuration, by dotted name."""
LR = 'optim_wrapper.optimizer.lr'


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        name: Name of the row, and of its results.
        label: How the page calls it.
        config: File in ``configs/evidence``, without suffix.
        seeds: Number of trainings, with the seeds 0, 1 and so on.
        options: Values of the configuration that the row sets, by dotted name.
            ``{seed}`` in a text is the seed.
    """

    name: str
    label: str
    config: str
    seeds: int = 3
    options: Options = {}


class Table(NamedTuple):
    """A table.

    Attributes:
        title: Title on the page.
        rows: Its rows. Differences are those from the first one.
        metrics: Metrics of the page and their column titles. The first one is
            compared and plotted.
        tolerance: Largest difference from the recorded first metric that passes as
            reproduced. Other libraries and processors change the metric.
        data: Where the data comes from.
        licence: Licence of the data.
        limits: What weights of this table are not good for.
        size: Side of the square image for which multiply-adds are counted.
        comparable: Rows whose backbones need the same multiply-adds within 5 %.
        by: What the number at the end of a label is, if it makes a column.
        others: Other test sets: values of the configuration, by the name before their
            metrics. ``{data_root}`` in a text is the folder of the data.
    """

    title: str
    rows: tuple[Row, ...]
    metrics: Mapping[str, str]
    tolerance: float
    data: str
    licence: str
    limits: str
    size: int
    comparable: bool = True
    by: str = ''
    others: Mapping[str, Options] = {}

    def row(self, name: str) -> Row:
        """Returns a row by its name."""
        return next(row for row in self.rows if row.name == name)


def is_sweep(table: str) -> bool:
    """Tells whether a table is a learning-rate sweep."""
    return TABLES[table].by == 'learning rate'


def percent(metric: str, value: float) -> float:
    """Returns a metric in percent. Those of COCO are fractions."""
    return value * (1 if metric == 'accuracy/top1' else 100)


COCO = {
    'coco/segm_mAP': 'mask AP',
    'coco/segm_mAP_50': 'AP50',
    'coco/segm_mAP_75': 'AP75',
    'coco/segm_mAP_s': 'small',
    'coco/segm_mAP_m': 'medium',
    'coco/bbox_mAP': 'box AP',
    'coco/bbox_mAP_50': 'AP50',
    'coco/bbox_mAP_75': 'AP75',
    'coco/bbox_mAP_s': 'small',
    'coco/bbox_mAP_m': 'medium',
}
DETECTORS = {
    'dsnet_dsfpn': 'DS-Net + DS-FPN',
    'dsnet_fpn': 'DS-Net + FPN',
    'resnet_fpn': 'ResNet + FPN',
    'swin_fpn': 'Swin + FPN',
    'convnext_fpn': 'ConvNeXt + FPN',
}
CLASSIFIERS = {
    'dsnet': 'DS-Net*',
    'dsnet_alpha0': 'DS-Net, alpha 0 (local stream alone)',
    'dsnet_alpha1': 'DS-Net, alpha 1 (global stream alone)',
    'resnet': 'ResNet',
    'deit': 'DeiT',
    'swin': 'Swin',
    'convnext': 'ConvNeXt',
    'dsnet_no_isa': 'DS-Net, no ISA (alpha 0.5)',
    'dsnet_alpha25': 'DS-Net, alpha 0.25',
    'dsnet_alpha75': 'DS-Net, alpha 0.75',
    'dsnet_global_to_local': 'DS-Net*, global to local only',
    'dsnet_local_to_global': 'DS-Net*, local to global only',
    'dsnet_no_output_norm': 'DS-Net* without the norm of its output',
}
THREE_SEEDS = (
    *('dsnet', 'dsnet_alpha0', 'dsnet_alpha1', 'resnet', 'deit'),
    *('dsnet_no_output_norm', 'dsfpn_coarse'),
)


def normal(part: str, *layers: str) -> Options:
    """Returns the options of initial weights from a normal distribution of 0.02."""
    values = dict(type='TruncNormal', layer=list(layers), std=0.02)
    return {f'model.{part}.init_cfg.{key}': value for key, value in values.items()}


# Choices of DS-Net and DS-FPN.
DETECTOR_CHOICES = {
    'dsfpn_init': (
        "DS-FPN, PyTorch's initial convolutions",
        {**normal('neck'), 'model.neck.init_cfg.layer': 'Linear'},
    ),
    'dsfpn_small_init': (
        'DS-FPN, initial weights of 0.02',
        normal('neck', 'Linear', 'Conv2d'),
    ),
    'dsfpn_no_isa': ('DS-FPN without ISA', {'model.neck.isa': False}),
    'dsfpn_coarse': (
        'DS-FPN, blocks at strides 16 and 32 only',
        {'model.neck.num_plain_levels': 2},
    ),
    'no_output_norm': (
        'DS-FPN, no norms of the outputs of DS-Net',
        {'model.backbone.output_norm': False},
    ),
}
NUCLEI = Table(
    'Nuclei, Mask R-CNN from random weights',
    (
        *(Row(name, label, f'nuclei_{name}') for name, label in DETECTORS.items()),
        *(
            Row(
                name, label, 'nuclei_dsnet_dsfpn', 3 if name in THREE_SEEDS else 1, opts
            )
            for name, (label, opts) in DETECTOR_CHOICES.items()
        ),
    ),
    COCO,
    tolerance=1.5,
    data='the nuclei of the 2018 Data Science Bowl (BBBC038 stage 1, CC0), converted '
    'by tools/dataset_converters/nuclei_to_coco.py into data/nuclei',
    licence='the images are CC0',
    limits='one class, images like those of the set (nuclei stained for light or '
    'fluorescence microscopy, 256 to 696 pixels, enlarged twice); small training set, '
    'no use in diagnosis',
    size=256,
)
# As in configs/dsnet/mask_rcnn_dsnet_nuclei.py.
LONG_DETECTOR = {
    'train_cfg.max_iters': 1400,
    'train_cfg.val_interval': 1400,
    'param_scheduler.1.T_max': 1400,
    'model.backbone.norm_cfg.type': 'GN',
    'model.backbone.norm_cfg.num_groups': 8,
    'model.roi_head.bbox_roi_extractor.roi_layer.sampling_ratio': 1,
    'model.roi_head.mask_roi_extractor.roi_layer.sampling_ratio': 1,
    'model.train_cfg.rpn_proposal.nms_pre': 300,
    'model.train_cfg.rpn_proposal.max_per_img': 200,
}
# Crops of 256, enlarged to 512: 16 x 16 global tokens without a maximum.
LARGE_CROPS = {
    **LONG_DETECTOR,
    'train_cfg.max_iters': 1000,
    'train_cfg.val_interval': 1000,
    'param_scheduler.1.T_max': 1000,
    'train_dataloader.batch_size': 2,
    'train_dataloader.dataset.pipeline.2.crop_size': (256, 256),
}
# Images of 256: 8 x 8 global tokens without a maximum.
LARGE_SCENES = {
    'data_root': 'data/scenes_256/',
    'val_dataloader.dataset.pipeline.1.scale': (256, 256),
    'test_dataloader.dataset.pipeline.1.scale': (256, 256),
}
DRAWN_SCENES = Table(
    'Drawn scenes, Mask R-CNN',
    (
        Row('dsfpn', 'DS-Net + DS-FPN', 'scenes_dsfpn'),
        Row('fpn', 'DS-Net + FPN', 'scenes_fpn'),
    ),
    COCO,
    tolerance=3.0,
    data='the first two commands of `make demo`: the images and the warm-up of the '
    'backbone',
    licence='the images are drawn by this repository',
    limits='drawn images only',
    size=128,
)
CIFAR10 = Table(
    'CIFAR-10 at 64 pixels',
    tuple(
        Row(name, label, f'cifar10_{name}', 3 if name in THREE_SEEDS else 1)
        for name, label in CLASSIFIERS.items()
    ),
    {'accuracy/top1': 'accuracy'},
    tolerance=1.0,
    data='CIFAR-10 as a folder of images, written by '
    'tools/dataset_converters/cifar10_to_folders.py into data/cifar10',
    licence='CIFAR-10 is published without a licence, for research',
    limits='ten classes, images of 32 pixels enlarged to 64; trained for minutes, far '
    'from what long training reaches',
    size=64,
)
LONG = {'train_cfg.max_epochs': 8, 'param_scheduler.1.T_max': 8}
# Two epochs, judged by a tenth of the training images.
SHORT = {
    'train_cfg.max_epochs': 2,
    'param_scheduler.1.T_max': 2,
    'test_dataloader.dataset.ann_file': 'val.txt',
    'test_dataloader.dataset.data_prefix': 'train',
}
RATES = {
    'dsnet': (1e-3, 2e-3, 4e-3, 8e-3),
    'resnet': (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    'deit': (1e-3, 2e-3, 4e-3, 8e-3),
    'swin': (1e-3, 2e-3, 4e-3, 8e-3),
    'convnext': (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    # That of 0.004 is in the table of choices.
    'dsnet_no_output_norm': (2e-3, 8e-3),
}
CHOICES = {
    'default': ('DS-Net*', {}),
    'global_small': (
        'global stream of 4, 2, 2, 2 rows',
        {'model.backbone.global_factors': (4, 4, 2, 1)},
    ),
    'global_full': (
        'global stream at full resolution',
        {'model.backbone.global_factors': (1, 1, 1, 1)},
    ),
    'drop_path': ('drop path 0.1', {'model.backbone.drop_path_rate': 0.1}),
    'decay_all': (
        'weight decay of norms and biases too',
        {
            'optim_wrapper.paramwise_cfg.norm_decay_mult': 1.0,
            'optim_wrapper.paramwise_cfg.bias_decay_mult': 1.0,
        },
    ),
    'small_init': (
        'all weights from a normal of 0.02',
        normal('backbone', 'Linear', 'Conv2d'),
    ),
    'no_output_norm': (
        'no norm of the output',
        {'model.backbone.output_norm': False},
    ),
}
STEMS = {
    'dsnet_resnet_stem': 'DS-Net* behind the stem of ResNet',
    'dsnet_resnet_stem_no_output_norm': 'both: this stem, no norm of the output',
    'resnet': 'ResNet',
    'resnet_patches': 'ResNet behind patches of 4x4 pixels',
}


def cap_rows(config: str, cap: int, options: Options) -> tuple[Row, ...]:
    """Returns the rows without and with a maximum number of global tokens."""
    parts = ('backbone', 'neck')
    capped = {f'model.{part}.max_global_tokens': cap for part in parts}
    labels = ('DS-Net + DS-FPN, no maximum', f'at most {cap} global tokens')
    return (
        Row('uncapped', labels[0], config, 3, options),
        Row(f'cap{cap}', labels[1], config, 3, {**options, **capped}),
    )


def sweep_rows(
    data: str, rates: Mapping[str, tuple], labels: Mapping[str, str], options: Options
) -> tuple[Row, ...]:
    """Returns a row for each network and learning rate."""
    return tuple(
        Row(
            f'{name}_{rate:g}',
            f'{labels[name]}, {rate:g}',
            f'{data}_{name}',
            1,
            {**options, LR: rate},
        )
        for name in rates
        for rate in rates[name]
    )


FLUORESCENCE = 'annotations/instances_val_fluorescence.json'
LAST = [f'.*[.]{name}[.].*' for name in ('fc_cls', 'fc_reg', 'conv_logits')]
Ways = Mapping[str, tuple[str, tuple[int, ...], Options]]
"""What is trained of an AdaptedDetector: label, numbers of images or boxes, options."""
# Baselines have no alpha. Rates were chosen with draw 0, on 29 images of other draws.
STAINED: Ways = {
    'lora': ('LoRA', (1, 2, 5, 10), {}),
    'full': (
        'all weights',
        (1, 2, 5, 10),
        {'model.places': ['.*[.]weight', '.*[.]bias'], 'model.alpha': 1, LR: 1e-3},
    ),
    'last': ('last layers', (10,), {'model.places': LAST, 'model.alpha': 1}),
    'norms': ('norms', (10,), {'model.places': ['norms'], 'model.alpha': 1}),
}
SCENES: Ways = {
    'adapter': ('CLIP-Adapter and class matrix', (1, 5, 10), {}),
    'tfa': (
        'class matrix and boxes, as TFA',
        (1, 5, 10),
        {
            'model.places': ['.*fc_cls[.]text_features', '.*fc_reg[.].*'],
            'model.alpha': 1,
        },
    ),
    'prototypes': ('prototypes', (1, 5, 10), {'train_cfg.max_iters': 1, LR: 0}),
}


FEW_IMAGES = (
    f'{NUCLEI.data}, nuclei_by_stain.py and few_shot_coco.py beside it, and the '
    'training of mask_rcnn_dsnet_fluorescence: see docs/few_shot_detection.md'
)
KNOWN = 'weights/mask_rcnn_dsnet_nuclei.safetensors'
"""A detector that knows both stains."""
FLUORESCENCE_AGAIN: Ways = {'fluorescence': ('fluorescence', (1, 5), {})}
STAINED_AGAIN: Ways = {'both': ('both stains', (1, 5), {'model.checkpoint': KNOWN})}


def few_shot_rows(
    config: str, ways: Ways, what: str, folder: str = 'few_shot'
) -> Iterator[Row]:
    """Yields a row for each way and number of images or boxes. A seed is a draw."""
    for name, (label, shots, options) in ways.items():
        for k in shots:
            draw = f'annotations/{folder}/{k}{what}_draw{{seed}}.json'
            drawn = {'train_dataloader.dataset.ann_file': draw}
            yield Row(f'{name}_{k}', f'{label}, {k}', config, 5, {**options, **drawn})


# In the order of `reproduce.py all`: learning rates are chosen before they are used.
TABLES = {
    'nuclei': NUCLEI,
    'nuclei_long': NUCLEI._replace(
        title='Nuclei, a longer training',
        rows=tuple(
            Row(name, DETECTORS[name], f'nuclei_{name}', 3, LONG_DETECTOR)
            for name in ('dsnet_dsfpn', 'dsnet_fpn')
        ),
    ),
    'nuclei_weights': NUCLEI._replace(
        title='Nuclei, the weights',
        rows=(Row('dsnet_dsfpn', 'DS-Net + DS-FPN', 'nuclei_dsnet_dsfpn_long', 1),),
        metrics=COCO
        | {
            'instances/accuracy': 'TP / (TP + FP + FN)',
            'instances/precision': 'precision',
            'instances/recall': 'recall',
            'instances/duplicates': 'duplicates',
        },
        data=f'{NUCLEI.data}, and tools/dataset_converters/nuclei_by_stain.py',
        limits=f'{NUCLEI.limits}. Fluorescence and stained images apart: '
        'docs/results.md. Beside it, not run by us: the demo model of StarDist '
        'has a TP / (TP + FP + FN) of 83.9 on 67 fluorescence images of this set, with '
        'thresholds chosen on them (its examples/2D/2_training.ipynb at 05fbaf3)',
        size=320,
    ),
    'nuclei_cap': NUCLEI._replace(
        title='Nuclei, maximum number of global tokens',
        rows=cap_rows('nuclei_dsnet_dsfpn', 64, LARGE_CROPS),
        size=512,
    ),
    'scenes': DRAWN_SCENES,
    'scenes_cap': DRAWN_SCENES._replace(
        title='Drawn scenes of 256 pixels, maximum number of global tokens',
        rows=cap_rows('scenes_dsfpn', 16, LARGE_SCENES),
        data='make_scenes.py data/scenes_256 --size 256, and the warm-up of the '
        'backbone of `make demo`',
        size=256,
    ),
    'cifar10_rates': CIFAR10._replace(
        title='CIFAR-10, learning-rate sweep',
        rows=sweep_rows('cifar10', RATES, CLASSIFIERS, SHORT),
        by='learning rate',
        tolerance=1.5,
    ),
    'cifar10': CIFAR10,
    'cifar10_choices': CIFAR10._replace(
        title='CIFAR-10, choices of DS-Net*, and stems',
        rows=(
            *(
                Row(name, label, 'cifar10_dsnet', 1, {**SHORT, **options})
                for name, (label, options) in CHOICES.items()
            ),
            *(
                Row(name, label, f'cifar10_{name}', 1, SHORT)
                for name, label in STEMS.items()
            ),
        ),
        tolerance=1.5,
        comparable=False,
    ),
    # Judged by the validation images: there are few of them. The rate of 0.002 is in
    # the table itself.
    'nuclei_rates': NUCLEI._replace(
        title='Nuclei, learning-rate sweep',
        rows=sweep_rows(
            'nuclei', dict.fromkeys(DETECTORS, (1e-3, 4e-3)), DETECTORS, {}
        ),
        by='learning rate',
    ),
    'nuclei_stained': NUCLEI._replace(
        title='Nuclei, a detector for fluorescence adapted to stained tissue',
        rows=(
            Row(
                'frozen',
                'frozen, 0',
                'nuclei_stained',
                1,
                {'model.alpha': 0, 'train_cfg.max_iters': 1},
            ),
            *few_shot_rows('nuclei_stained', STAINED, 'images'),
            Row('both', 'trained on both, 39', 'nuclei_both_stains', 1),
        ),
        metrics={
            'coco/segm_mAP': 'mask AP',
            'coco/segm_mAP_50': 'AP50',
            'fluorescence/coco/segm_mAP': 'mask AP on fluorescence',
        },
        data=FEW_IMAGES,
        comparable=False,
        by='stained images',
        others={
            'fluorescence': {
                'test_dataloader.dataset.ann_file': FLUORESCENCE,
                'test_dataloader.dataset.data_prefix.img': 'val/',
                'test_evaluator.ann_file': f'{{data_root}}{FLUORESCENCE}',
            }
        },
    ),
    'nuclei_known': NUCLEI._replace(
        title='Nuclei, a detector adapted to images as it knows',
        rows=(
            *few_shot_rows(
                'nuclei_known', FLUORESCENCE_AGAIN, 'images', 'few_fluorescence'
            ),
            *few_shot_rows('nuclei_stained', STAINED_AGAIN, 'images'),
        ),
        metrics={
            'coco/segm_mAP': 'mask AP',
            'frozen/coco/segm_mAP': 'mask AP of the frozen detector',
            'whole/coco/segm_mAP': 'mask AP with alpha 1',
        },
        data=FEW_IMAGES,
        comparable=False,
        by='images',
        others={
            'frozen': {'model.alpha': 0},
            'whole': {'model.alpha': 1},
        },
    ),
    'scenes_new': Table(
        'Drawn scenes, a class added from boxes',
        tuple(few_shot_rows('scenes_new', SCENES, 'boxes')),
        {'novel/bbox_mAP_50': 'novel AP50', 'base/bbox_mAP': 'base AP'},
        tolerance=3.0,
        data='the drawn scenes, few_shot_coco.py beside them, and the training of '
        'mask_rcnn_dsnet_scenes_base: see docs/few_shot_detection.md',
        licence='the images are drawn by this repository',
        limits='drawn images only',
        size=128,
        comparable=False,
        by='boxes of each class',
    ),
    'cifar10_long': CIFAR10._replace(
        title='CIFAR-10, a longer training',
        rows=tuple(
            Row(name, CLASSIFIERS[name], f'cifar10_{name}', 3, LONG)
            for name in ('dsnet', 'dsnet_no_output_norm', 'resnet')
        ),
    ),
}
