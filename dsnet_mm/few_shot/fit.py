"""A classifier of all images, whose classes may have unequal numbers of them."""

from pathlib import Path

from dsnet_mm.files import check_new

from .config import FewShotConfig
from .methods import METHODS
from .runner import Fitter
from .sources import FeatureSource, ImageSource, Source, encode_parts


class _FitterOfOne(Fitter):
    """Writes one classifier to the file that ``work_dir`` is here."""

    def files(self, name: str) -> tuple[Path, Path]:
        return self.work_dir, self.work_dir


def fit(
    config: FewShotConfig, out: str | Path, method: str, quiet: bool = False
) -> dict[str, int]:
    """Fits a method with its defaults to all images, except those of a part test.

    Args:
        config: Data set, encoder and ``overrides``. Shots and seeds are not used.
        out: Classifier file to write.
        method: One of ``METHODS``.
        quiet: Whether to hide the progress bars.

    Returns:
        Number of images by class name.

    Raises:
        FileExistsError: If ``out`` exists.
        FileNotFoundError: If a file is missing.
        ValueError: If the data set or an image is wrong.
    """
    check_new(out)
    source: Source = FeatureSource(config) if config.features else None
    source = source or ImageSource(config, quiet, whole=True)
    source.prepare()
    if not config.features:
        parts = {k: source.task.split[k] for k in ('train', 'val')}
        encode_parts(source.task, source.cache, parts, config.views, False)
    labels, names = source.all_labelled(test=False).labels, source.class_names
    counts = labels.bincount(minlength=len(names)).tolist()
    if 0 in counts:
        raise ValueError(f'no image of {names[counts.index(0)]!r} can be read.')
    options = {**METHODS[method].defaults, **config.overrides.get(method, {})}
    chosen = dict(method=method, options=options, selection='fixed', seed=1)
    _FitterOfOne(config, Path(out), source).fit_all(chosen, Path(out).stem, test=False)
    return dict(zip(names, counts, strict=True))
