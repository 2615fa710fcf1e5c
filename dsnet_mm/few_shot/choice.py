"""The classifier of a run that is to be used."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

REFERENCE = 'clip_adapter'
"""Method that is named if there are no validation images to choose by."""


@dataclass(frozen=True)
class Choice:
    """A classifier of a run: its content of ``runs/*.json``, and a sentence why."""

    record: dict
    why: str

    @property
    def file(self) -> str:
        """Its file, below the folder of the run."""
        return f'classifiers/{self.record["name"]}.safetensors'


def choose(records: Sequence[dict]) -> Choice:
    """Chooses a classifier by validation accuracy. Test results are not used.

    Candidates are zero-shot CLIP and the classifiers with the largest number of shots.
    The method with the highest mean over seeds is chosen, and of its classifiers that
    with the highest accuracy. Of equal ones it is that with the lowest loss.

    Args:
        records: Content of ``runs/*.json``, zero-shot CLIP first.
    """
    fitted = [r for r in records if r['shots'] and r['selection'] != 'oracle']
    if not fitted:
        return Choice(records[0], 'No other method was fitted without the test split.')
    most = max(r['shots'] for r in fitted)
    fitted = [r for r in fitted if r['shots'] == most]
    scored: dict[str, list[dict]] = {}
    for r in fitted:
        if r['val_accuracy'] is not None:
            scored.setdefault(r['method'], []).append(r)
    if not scored:
        record = next((r for r in fitted if r['method'] == REFERENCE), fitted[0])
        which = 'default' if record['method'] == REFERENCE else 'first'
        return Choice(
            record,
            f'There are no validation images to choose by. It is the {which} method '
            f'at {shots_text(most)}.',
        )
    best = max(scored.values(), key=_score)
    accuracy, zero = _score(best)[0], [r['val_zero_shot'] for r in best]
    if None not in zero and mean(zero) >= accuracy:
        return Choice(
            next(r for r in records if r['method'] == 'zero_shot'),
            f'No method is above its validation accuracy, {mean(zero):.2f} % on the '
            f'images of {shots_text(most)}.',
        )
    return Choice(
        max(best, key=lambda r: _score([r])),
        f'Its method has the highest mean validation accuracy at {shots_text(most)}, '
        f'{accuracy:.2f} %, and this is the best of its seeds.',
    )


def shots_text(shots: int) -> str:
    """Returns ``'1 shot'``, ``'2 shots'`` and so on."""
    return f'{shots} shot{"s" * (shots > 1)}'


def _score(records: Sequence[dict]) -> tuple[float, float]:
    """Returns mean validation accuracy, and minus the mean loss if it is known."""
    losses = [r['val_loss'] for r in records]
    loss = 0.0 if None in losses else mean(losses)
    return mean(r['val_accuracy'] for r in records), -loss
