"""Plots accuracy against time."""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from dsnet_mm.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(results: list[dict], path: Path) -> None:
    """Plots accuracy against time of the classifiers, a plot for each panel.

    Args:
        results: Rows of ``benchmark.csv``.
        path: PNG file to write. It is not written if there are no classifiers.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    panels: dict[str, list[dict]] = {}
    for row in results:
        height, width = row['size'].split('x')
        shown = row['ms'] is not None and 'not fused' not in row['model']
        if shown and row['mode'] == 'inference' and height == width:
            title = f'inference, {row["batch"]} x {row["size"]}, {row["dtype"]}'
            panels.setdefault(title, []).append(row)
    if not panels:
        return
    figsize = max(6.5 * len(panels), 8), 5.2
    figure, axes = plt.subplots(
        1, len(panels), figsize=figsize, squeeze=False, layout='constrained'
    )
    machine = '{machine}, {device}, {threads} threads, torch {torch}'.format(
        **results[0]
    )
    sources = 'accuracies of the papers at 224 (ResNet-50: torchvision, v1 recipe)'
    figure.suptitle(f'{machine}\n{sources}', fontsize=9)
    for ax, (title, rows) in zip(axes[0], panels.items(), strict=True):
        ax.set(xscale='log', xlabel='ms a batch', ylabel='ImageNet-1k top-1, %')
        ax.set_title(title, fontsize=10)
        for row in rows:
            face = 'white' if 'compiled' in row['model'] else color_of(row)
            point = row['ms'], row['top1']
            ax.scatter(*point, 36, face, edgecolors=color_of(row), zorder=3)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        ax.xaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.margins(0.1)
        ax.grid(alpha=0.3)
    figure.draw_without_rendering()  # lays the axes out
    for ax, rows in zip(axes[0], panels.values(), strict=True):
        name_points(ax, rows)
    image = BytesIO()
    figure.savefig(image, dpi=150)
    write_atomic(path, image.getvalue())
    plt.close(figure)


def color_of(row: dict) -> str:
    """Returns the colour of DS-Net, or that of its peers."""
    return 'tab:red' if 'DS-Net' in row['model'] else 'tab:blue'


def name_points(ax: 'Axes', rows: list[dict]) -> None:
    """Writes the models' names where they cover neither points nor each other."""
    from matplotlib.transforms import Affine2D, Bbox

    to_points = ax.figure.dpi_scale_trans.inverted() + Affine2D().scale(72)
    frame = ax.get_window_extent().transformed(to_points)
    to_points = ax.transData + to_points
    xys = to_points.transform([(row['ms'], row['top1']) for row in rows])
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in xys]
    for row, (x, y) in zip(rows, xys, strict=True):
        width = 5 * len(row['model'])  # enough for letters of 8 points
        for step in range(60):  # to the right and to the left, farther and farther
            dx = (9 if step % 4 < 2 else -9 - width) + step // 15
            dy = 6 * (step // 4) * (1 if step % 2 else -1)
            box = Bbox.from_bounds(x + dx, y + dy - 6, width, 12)
            inside = all(frame.contains(*corner) for corner in box.get_points())
            if inside and not box.count_overlaps(taken):
                break
        taken.append(box)
        ax.annotate(
            row['model'],
            (row['ms'], row['top1']),
            (dx, dy),
            textcoords='offset points',
            va='center',
            color=color_of(row),
            fontsize=8,
            arrowprops=dict(arrowstyle='-', lw=0.4, relpos=(float(dx < 0), 0.5)),
        )
