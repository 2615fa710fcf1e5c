"""Times of calls that run in turns."""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

import torch

Name = TypeVar('Name', bound=Hashable)


def time_call(call: Callable[[], object], device: str = 'cpu') -> float:
    """Returns the seconds of a call."""
    synchronize = torch.cuda.synchronize if device == 'cuda' else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def turns_in(seconds: float, least: int = 4) -> Iterator[None]:
    """Yields once for each turn until the time is over, ``least`` times at least."""
    end, turns = time.perf_counter() + seconds, 0
    while turns < least or time.perf_counter() < end:
        yield
        turns += 1


def time_in_turns(
    calls: dict[Name, Callable[[], object]], turns: Iterable, device: str = 'cpu'
) -> dict[Name, list[float]]:
    """Times calls in turns, so that a disturbance of the machine meets all of them.

    Args:
        calls: The calls by name. Each turn runs every call once, in this order.
        turns: One item for each turn. The first turn is dropped.
        device: ``'cpu'`` or ``'cuda'``.

    Returns:
        The seconds of each call by turn.
    """
    times = {name: [] for name in calls}
    for _ in turns:
        for name, call in calls.items():
            times[name].append(time_call(call, device))
    return {name: seconds[1:] for name, seconds in times.items()}
