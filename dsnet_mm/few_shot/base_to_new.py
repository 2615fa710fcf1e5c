"""Base-to-new: fitted to the first half of the classes, tested on the others too.

The protocol of CoCoOp (arXiv 2203.05557). With n classes in the order of their labels,
the first ceil(n / 2) are base classes. Their shots are those of CoOp's draw of all
classes. Test images are classified among the classes of their own half.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace

from torch import Tensor, nn

from dsnet_mm.clip import CLIPAdapter
from dsnet_mm.datasets.features import Features

from .evaluation import evaluate
from .methods import METHODS
from .methods.linear_adapter import LinearAdapter
from .sources import Draw, Drawn, Source

WITHOUT_CLASSES = ('visual_adapter', 'text_adapter', 'alpha', 'beta', 'matrix')
"""Beginnings of the names of tensors that have nothing to do with one class."""


def transfers(method: str) -> bool:
    """Tells whether a method can classify new classes, given their text features."""
    adapts = METHODS[method].returns in (CLIPAdapter, LinearAdapter)
    return method == 'zero_shot' or adapts


def with_classes(classifier: nn.Module, text_features: Tensor) -> nn.Module:
    """Returns a classifier of other classes, with the same adapters.

    Args:
        classifier: Classifier of a method that :func:`transfers`.
        text_features: Text features of the classes (K, D), rows of unit norm.
    """
    options = getattr(classifier, 'options', {})
    other = type(classifier)(text_features, classifier.logit_scale, **options)
    kept = classifier.state_dict()
    kept = {k: v for k, v in kept.items() if k.startswith(WITHOUT_CLASSES)}
    other.load_state_dict(kept, strict=False)
    return other.eval()


class BaseClasses(Source):
    """The base classes of a source, and the test images of the others.

    Raises:
        ValueError: If there are fewer than two classes.
    """

    def __init__(self, source: Source) -> None:
        if len(source.class_names) < 2:
            raise ValueError('base-to-new needs at least two classes, there is one.')
        self.source, self.count = source, (len(source.class_names) + 1) // 2
        for name in ('prompts', 'preprocessing', 'shots', 'has_val', 'notes'):
            setattr(self, name, getattr(source, name))
        self.title = f'{source.title}, base classes'
        self.class_names = source.class_names[: self.count]

    def prepare(self) -> None:
        self.source.prepare()
        for name in ('encoder', 'made_by', 'logit_scale', 'fingerprint'):
            setattr(self, name, getattr(self.source, name))
        self.text_features = self.source.text_features[: self.count]

    def encode(self, draws: Sequence[Draw], plain: bool) -> None:
        self.source.encode(draws, plain)

    def draw(self, shots: int, seed: int, plain: bool) -> Drawn:
        drawn = self.source.draw(shots, seed, plain)
        parts = {k: getattr(drawn, k) for k in ('train', 'plain', 'val')}
        return replace(drawn, **{k: v and self.base(v) for k, v in parts.items()})

    def test(self) -> Features:
        test = self.source.test()
        new = test.take((test.labels >= self.count).nonzero()[:, 0])
        self.new = replace(new, labels=new.labels - self.count)
        return self.base(test)

    def all_labelled(self) -> Features:
        return self.base(self.source.all_labelled())

    def base(self, part: Features) -> Features:
        """Returns the images of the base classes."""
        return part.take((part.labels < self.count).nonzero()[:, 0])

    def test_new(self, classifier: nn.Module) -> dict[str, float]:
        """Scores a classifier on the new classes, after :meth:`test`."""
        other = with_classes(classifier, self.source.text_features[self.count :])
        return {**asdict(evaluate(other, self.new)), 'pictures': len(self.new)}


def new_classes_table(cells: Sequence, shots: str) -> str:
    """Formats means over seeds on base and new classes, and their harmonic mean.

    Args:
        cells: A :class:`.report.Cell` for each method.
        shots: Number of shots in words.
    """
    count = cells[0].records[0]['new']['pictures']
    lines = [
        f'## New classes, at {shots}\n\n{count} test images of the other half of the '
        f'classes, which no method was fitted to. H is the harmonic mean.\n',
        '| method | base | new | H |',
        '|---|--:|--:|--:|',
    ]
    for cell in cells:
        base, found = cell.mean, [r['new']['accuracy'] for r in cell.records]
        new = sum(found) / len(found)
        h = 2 * base * new / max(base + new, 1e-9)
        lines.append(f'| {cell.label} | {base:.2f} | {new:.2f} | {h:.2f} |')
    return '\n'.join(lines)
