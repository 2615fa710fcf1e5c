"""The public data sets: names, folders, counts and sources.

Names and folders follow the layout of CoOp (arXiv 2109.01134), which later papers
share.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetInfo:
    """A public data set in CoOp's layout.

    Attributes:
        title: Name in the papers.
        folder: Folder below the data root.
        images: Folder of the images, below ``folder``.
        split_file: Split file, below ``folder``. Empty if the data set comes with its
            own lists or folders for train, val and test.
        classes: Number of classes.
        counts: Number of train, val and test images.
        source: Where the images can be downloaded.
    """

    title: str
    folder: str
    images: str
    split_file: str
    classes: int
    counts: tuple[int, int, int]
    source: str


_VGG = 'https://www.robots.ox.ac.uk/~vgg/data'

# fmt: off
PUBLIC_DATASETS: dict[str, DatasetInfo] = {
    'imagenet': DatasetInfo(
        'ImageNet', 'imagenet', 'images', '',
        1000, (1_281_167, 0, 50_000), 'https://image-net.org'),
    'caltech101': DatasetInfo(
        'Caltech101', 'caltech-101', '101_ObjectCategories',
        'split_zhou_Caltech101.json',
        100, (4128, 1649, 2465), 'https://data.caltech.edu/records/mzrjq-6wc02'),
    'oxford_pets': DatasetInfo(
        'OxfordPets', 'oxford_pets', 'images', 'split_zhou_OxfordPets.json',
        37, (2944, 736, 3669), f'{_VGG}/pets/'),
    'stanford_cars': DatasetInfo(
        'StanfordCars', 'stanford_cars', '.', 'split_zhou_StanfordCars.json',
        196, (6509, 1635, 8041),
        'https://ai.stanford.edu/~jkrause/cars/car_dataset.html'),
    'oxford_flowers': DatasetInfo(
        'Flowers102', 'oxford_flowers', 'jpg', 'split_zhou_OxfordFlowers.json',
        102, (4093, 1633, 2463), f'{_VGG}/flowers/102/'),
    'food101': DatasetInfo(
        'Food101', 'food-101', 'images', 'split_zhou_Food101.json',
        101, (50_500, 20_200, 30_300),
        'https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/'),
    'fgvc_aircraft': DatasetInfo(
        'FGVCAircraft', 'fgvc_aircraft', 'images', '',
        100, (3334, 3333, 3333), f'{_VGG}/fgvc-aircraft/'),
    'sun397': DatasetInfo(
        'SUN397', 'sun397', 'SUN397', 'split_zhou_SUN397.json',
        397, (15_880, 3970, 19_850),
        'https://vision.princeton.edu/projects/2010/SUN/'),
    'dtd': DatasetInfo(
        'DTD', 'dtd', 'images', 'split_zhou_DescribableTextures.json',
        47, (2820, 1128, 1692), f'{_VGG}/dtd/'),
    'eurosat': DatasetInfo(
        'EuroSAT', 'eurosat', '2750', 'split_zhou_EuroSAT.json',
        10, (13_500, 5400, 8100), 'https://github.com/phelber/EuroSAT'),
    'ucf101': DatasetInfo(
        'UCF101', 'ucf101', 'UCF-101-midframes', 'split_zhou_UCF101.json',
        101, (7639, 1898, 3783),
        "CoOp's archive of middle frames, UCF-101-midframes.zip"),
    'imagenetv2': DatasetInfo(
        'ImageNetV2', 'imagenetv2', 'imagenetv2-matched-frequency-format-val', '',
        1000, (0, 0, 10_000), 'https://github.com/modestyachts/ImageNetV2'),
    'imagenet_sketch': DatasetInfo(
        'ImageNet-Sketch', 'imagenet-sketch', 'images', '',
        1000, (0, 0, 50_889), 'https://github.com/HaohanWang/ImageNet-Sketch'),
    'imagenet_a': DatasetInfo(
        'ImageNet-A', 'imagenet-adversarial', 'imagenet-a', '',
        200, (0, 0, 7500), 'https://github.com/hendrycks/natural-adv-examples'),
    'imagenet_r': DatasetInfo(
        'ImageNet-R', 'imagenet-rendition', 'imagenet-r', '',
        200, (0, 0, 30_000), 'https://github.com/hendrycks/imagenet-r'),
}
# fmt: on
"""The 11 data sets of CoOp and the four shifted test sets of ImageNet, by name."""

SPLITS_SOURCE = (
    'https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md, or the copies that '
    'https://github.com/linzhiqiu/cross_modal_adaptation keeps in its repository'
)
"""Where the ``split_zhou_*.json`` files can be downloaded."""
