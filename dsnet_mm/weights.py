"""Files of weights, read without running what is in them."""

from typing import Any

from torch import Tensor


class DamagedCheckpointError(ValueError):
    """A file is no checkpoint, only a part of one, or has weights that are no numbers."""


def check_finite(state: dict[str, Tensor], path: Any) -> None:
    """Checks that all weights are finite.

    Raises:
        DamagedCheckpointError: If one is not. The sentence names the first.
    """
    for name, value in state.items():
        if isinstance(value, Tensor) and not value.isfinite().all():
            raise DamagedCheckpointError(
                f'{path} holds values that are not finite (in {name}); it is damaged, '
                f'or its training diverged'
            )
