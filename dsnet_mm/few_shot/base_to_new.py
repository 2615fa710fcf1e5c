"""Base-to-new: fitted to the first half of the classes, tested on the others too.

The protocol of CoCoOp (arXiv 2203.05557). Of n classes in the order of their labels,
the first ceil(n / 2) are base classes. Their shots are those of CoOp's draw of all
classes. A test image is classified among the classes of its own half.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import mean

from torch import Tensor, nn

from dsnet_mm.clip import CLIPAdapter
from dsnet_mm.datasets.features import Features

from .choice import shots_text
from .evaluation import evaluate
from .methods import METHODS
from .methods.linear_adapter import LinearAdapter
from .sources import Drawn, Source


def transfers(method: str) -> bool:
    """Tells whether a method can classify new classes, given their text features."""
    adapts = METHODS[method].returns in (CLIPAdapter, LinearAdapter)
    return method == 'zero_shot' or adapts


def with_classes(classifier: nn.Module, text_features: Tensor) -> nn.Module:
    """Returns a classifier of other classes (K, D) with the same adapters."""
    options = getattr(classifier, 'options', {})
    other = type(classifier)(text_features, classifier.logit_scale, **options)
    adapters = ('visual_adapter', 'text_adapter', 'alpha', 'beta', 'matrix')
    kept = classifier.state_dict().items()
    kept = {name: x for name, x in kept if name.startswith(adapters)}
    other.load_state_dict(kept, strict=False)
    return other.eval()


class BaseClasses:
    """A source with its base classes only. The rest is that of :class:`Source`.

    Raises:
        ValueError: If there is only one class.
    """

    def __init__(self, source: Source) -> None:
        self.source, count = source, len(source.class_names)
        if count < 2:
            raise ValueError('base-to-new needs two classes or more, and there is one.')
        self.count = (count + 1) // 2
        self.class_names = source.class_names[: self.count]
        source.notes.append(
            f'Fitted to and tested on the first {self.count} of {count} classes.'
        )

    def __getattr__(self, name: str) -> object:
        if name == 'source':  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.source, name)

    @property
    def text_features(self) -> Tensor:
        return self.source.text_features[: self.count]

    def cropped(self, crop_scale: tuple[float, float]) -> 'BaseClasses':
        """Returns the base classes of the source with such crops."""
        other = copy.copy(self)
        other.source = self.source.cropped(crop_scale)
        return other

    def draw(self, shots: int, seed: int, plain: bool) -> Drawn:
        drawn = self.source.draw(shots, seed, plain)
        parts = dict(train=drawn.train, plain=drawn.plain, val=drawn.val)
        return replace(drawn, **{k: v and self.base(v) for k, v in parts.items()})

    def test(self) -> Features:
        self.whole_test = self.source.test()
        return self.base(self.whole_test)

    def all_labelled(self) -> Features:
        return self.base(self.source.all_labelled())

    def base(self, part: Features) -> Features:
        """Returns the images of the base classes."""
        return part.take((part.labels < self.count).nonzero()[:, 0])

    def test_new(self, classifier: nn.Module) -> dict[str, float]:
        """Scores a classifier on the new classes, after :meth:`test`."""
        new = self.whole_test
        new = new.take((new.labels >= self.count).nonzero()[:, 0])
        new = replace(new, labels=new.labels - self.count)
        other = with_classes(classifier, self.source.text_features[self.count :])
        return {**asdict(evaluate(other, new)), 'pictures': len(new)}


def new_classes_table(cells: Sequence) -> str:
    """Formats accuracies on base and new classes of the cells of a report."""
    lines = [
        f'## New classes, at {shots_text(cells[-1].shots)}\n\n'
        f'{cells[0].records[0]["new"]["pictures"]} test images of the other classes. H '
        f'is the harmonic mean.\n',
        '| method | base | new | H |',
        '|---|--:|--:|--:|',
    ]
    for cell in cells:
        base, new = cell.mean, mean(r['new']['accuracy'] for r in cell.records)
        h = 2 * base * new / max(base + new, 1e-9)
        lines.append(f'| {cell.label} | {base:.2f} | {new:.2f} | {h:.2f} |')
    return '\n'.join(lines)
