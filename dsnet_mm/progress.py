"""Progress bars with rate and remaining time."""

import sys

from tqdm import tqdm


def progress_bar(total: int, what: str, unit: str, quiet: bool = False) -> tqdm:
    """Returns a bar with the rate and the remaining time, on the error stream.

    Args:
        total: Number of units.
        what: What is done.
        unit: Plural of what is counted.
        quiet: Whether to show nothing.

    Returns:
        The bar, a context manager. Without a terminal it writes a line every 30 s.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=f' {unit}',
        disable=quiet,
        dynamic_ncols=terminal,
        mininterval=0.1 if terminal else 30,
        maxinterval=10 if terminal else 60,
        miniters=0,
        file=sys.stderr if terminal else _Lines(),
    )


class _Lines:
    """The error stream, with each state of a bar on a line of its own."""

    def write(self, text: str) -> None:
        text = text.strip('\r\n')
        if text:
            sys.stderr.write(f'{text}\n')

    def flush(self) -> None:
        sys.stderr.flush()
