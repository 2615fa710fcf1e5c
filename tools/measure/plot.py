"""Plots accuracy against time."""

from io import BytesIO
from pathlib import Path

from dsnet_mm.files import write_atomic


def draw(results: list[dict], path: Path) -> None:
    """Plots accuracy against time of the classifiers, a plot for each panel.

    Args:
        results: Rows of ``benchmark.csv``.
        path: PNG file to write. It is not written if there are no classifiers.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels: dict[str, list[dict]] = {}
    for row in results:
        height, width = row['size'].split('x')
        shown = row['ms'] is not None and 'not fused' not in row['model']
        if shown and row['mode'] == 'inference' and height == width:
            title = f'inference, {row["batch"]} x {row["size"]}, {row["dtype"]}'
            panels.setdefault(title, []).append(row)
    if not panels:
        return
    figure = Figure((6.5 * len(panels) + 1.5, 5.2), dpi=150, layout='constrained')
    facts = '{machine}, {device}, {threads} threads, torch {torch}'.format(**results[0])
    sources = 'accuracies of the papers at 224 (ResNet-50: torchvision, v1 recipe)'
    figure.suptitle(f'{facts}\n{sources}', fontsize=9)
    names = [row['model'] for rows in panels.values() for row in rows]
    names = list(dict.fromkeys(name.removesuffix(', compiled') for name in names))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, rows) in zip(axes, panels.items(), strict=True):
        for row in rows:
            eager = row['model'].removesuffix(', compiled')
            color = colormaps['tab10'](names.index(eager) % 10)
            ax.scatter(
                row['ms'],
                row['top1'],
                color=color if row['model'] == eager else 'white',
                edgecolors=color,
                marker='*' if 'DS-Net' in eager else 'o',
                s=80,
                label=row['model'],
            )
        ax.set(xscale='log', xlabel='ms a batch', ylabel='ImageNet-1k top-1, %')
        ax.set_title(title, fontsize=10)
        ax.xaxis.set_major_formatter('{x:g}')
        ax.xaxis.set_minor_formatter('{x:g}')
        ax.tick_params(axis='x', which='both', labelsize=7)
        ax.grid(alpha=0.3, which='both')
    axes[-1].legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
    image = BytesIO()
    figure.savefig(image, format='png')
    write_atomic(path, image.getvalue())
