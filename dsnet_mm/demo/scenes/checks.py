"""Checks of arguments."""

from collections.abc import Iterable


def check_choice(what: str, value: object, choices: Iterable[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f'{what} must be one of {", ".join(choices)}, got {value!r}')


def check_int(what: str, value: object, least: int) -> None:
    """Raises TypeError or ValueError unless ``value`` is an integer >= ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{what} must be an integer, got {value!r}')
    if value < least:
        raise ValueError(f'{what} must be at least {least}, got {value!r}')
