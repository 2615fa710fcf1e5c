"""What the two streams of a block hold, and where each attends to the other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from dsnet_mm.inference import Predictor
from dsnet_mm.models.layers import DSBlock
from dsnet_mm.models.layers.ds_block import global_size
from dsnet_mm.ops import split_heads
from dsnet_mm.ops.plain import attention_weights

from .predictor import make_view
from .tiling import Tile


class Streams(NamedTuple):
    """The streams of one image around Inter-Scale Alignment (Fig. 2).

    Attributes:
        local: Local stream f_L, (C, H, W).
        global_: Global stream f_G, (C, h, w).
        aligned_local: Local stream after the alignment, (C, H, W).
        aligned_global: Global stream after the alignment, (C, h, w).
        local_weights: What each place reads of the global stream,
            (heads, H, W, h, w). The weights of a place sum to 1.
        global_weights: Where each global token looks, (heads, h, w, H, W).
        output: Output of the block, (1, C_out, H, W), with its graph.
    """

    local: Tensor
    global_: Tensor
    aligned_local: Tensor
    aligned_global: Tensor
    local_weights: Tensor
    global_weights: Tensor
    output: Tensor


def find_blocks(model: nn.Module) -> dict[str, DSBlock]:
    """Returns the blocks of a model that align both streams, by name."""
    return {
        key: block
        for key, block in model.named_modules()
        if isinstance(block, DSBlock)
        and block.isa is not None
        and block.isa.direction == 'both'
    }


def find_block(model: nn.Module, name: str) -> DSBlock:
    """Finds a block that aligns both streams.

    Args:
        model: A model with DS-blocks.
        name: Its name in the model, such as ``'backbone.stages.2.1'``.

    Raises:
        ValueError: If there is no such block. The message names those there are.
    """
    blocks = find_blocks(model)
    if name not in blocks:
        raise ValueError(
            f'there is no block {name!r} with Inter-Scale Alignment both ways; this '
            f'model has {", ".join(blocks) or "none"}'
        )
    return blocks[name]


@contextmanager
def captured(block: DSBlock) -> Iterator[Callable[[], Streams]]:
    """Captures the streams of a block while the model runs.

    The compiled operator does not hold the attention weights. They are computed again
    from its inputs.

    Args:
        block: A block that aligns both streams, not fused.

    Yields:
        A function that returns the streams of the first image of the last batch.
    """
    kept: dict[str, Any] = {}
    isa = block.isa

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            kept[name] = args, output

        return hook

    modules = dict(
        block=block, isa=isa, local_qkv=isa.local_qkv, global_qkv=isa.global_qkv
    )
    handles = [x.register_forward_hook(keep(name)) for name, x in modules.items()]

    def streams() -> Streams:
        (local, global_), (aligned_local, aligned_global) = kept['isa']
        output = kept['block'][1]
        size = local.shape[-2:]
        low = global_size(size, block.global_factor, block.max_global_tokens)
        local_qkv = kept['local_qkv'][1].flatten(2).transpose(1, 2)
        q_l, k_l, _ = split_heads(local_qkv, block.num_heads, 3)
        q_g, k_g, _ = split_heads(kept['global_qkv'][1], block.num_heads, 3)
        with torch.no_grad():
            local_weights = attention_weights(q_l, k_g)[0]
            global_weights = attention_weights(q_g, k_l)[0]

        def to_map(tokens: Tensor) -> Tensor:
            return tokens[0].t().unflatten(1, low).detach()

        return Streams(
            local[0].detach(),
            to_map(global_),
            aligned_local[0].detach(),
            to_map(aligned_global),
            local_weights.unflatten(1, size).unflatten(-1, low),
            global_weights.unflatten(1, low).unflatten(-1, size),
            output,
        )

    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


def grad_cam(score: Tensor, activation: Tensor, pooled: bool) -> Tensor:
    """Tells which places of a feature map raise a score.

    Args:
        score: The score of a class or of a detection, a number.
        activation: Feature map of shape (1, C, H, W) that the score depends on.
        pooled: Whether the weights of the channels are means over all places, as in
            Grad-CAM (arXiv 1610.02391, Eq. 1 and 2). Otherwise each place has its own,
            as for detections in ODAM (arXiv 2304.06354): a score of one object depends
            on few places, and means over all places say little about it.

    Returns:
        Map of shape (H, W), not negative.
    """
    (weights,) = torch.autograd.grad(score, activation, retain_graph=True)
    if pooled:
        weights = weights.mean((2, 3), keepdim=True)
    return (weights * activation).sum(1).relu()[0].detach()


def draw_streams(
    predictor: Predictor,
    image: np.ndarray,
    block: str,
    point: tuple[float, float] | None = None,
    target: int | None = None,
) -> Figure:
    """Draws the streams of a block for an image, and what raises a score.

    Args:
        predictor: A detector or a classifier with its weights, not fused.
        image: BGR image of shape (H, W, 3).
        block: Name of the block, see :func:`find_block`.
        point: The position whose attention is drawn, as fractions of width and height.
            None is the middle of the detection, or of the image.
        target: What Grad-CAM explains: the number of a class, or the rank of a
            detection, from 0. None is the best.

    Returns:
        The figure of :func:`plot_streams`.

    Raises:
        ValueError: If there is no such block, class or detection.
    """
    model = predictor.model
    height, width = image.shape[:2]
    view = make_view(image, Tile(0, 0, width, height))
    data = predictor.prepare([view.image])
    data = model.data_preprocessor(data, False)
    with captured(find_block(model, block)) as streams_of:
        (sample,) = model(**data, mode='predict')
        streams = streams_of()
    inputs = data['inputs'][0]
    height, width = inputs.shape[1:]
    cam, title, box = None, '', None
    if predictor.detects:
        found = sample.pred_instances
        rank = target or 0
        if 0 <= rank < len(found):
            order = found.scores.argsort(descending=True)[rank]
            score, label = found.scores[order], found.labels[order].item()
            scale = sample.scale_factor
            x = found.bboxes[order].detach().cpu() * torch.tensor([*scale, *scale])
            box = tuple(x.tolist())
            middle = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
            point = point or middle
        elif target is not None:
            raise ValueError(
                f'the target is {target}, and {len(found)} objects are detected; take '
                f'their ranks, from 0'
            )
    else:
        label = sample.pred_score.argmax().item() if target is None else target
        if not 0 <= label < len(sample.pred_score):
            raise ValueError(
                f'the target is a class from 0 to {len(sample.pred_score) - 1}, '
                f'got {label}'
            )
        score = sample.pred_score[label]
    if not predictor.detects or box is not None:
        cam = grad_cam(score, streams.output, pooled=not predictor.detects)
        names = predictor.class_names
        name = names[label] if names else f'class {label}'
        title = f'Grad-CAM: {name} ({score.item():.2f})'
    shown = to_image(inputs, model.data_preprocessor)
    return plot_streams(shown, streams, point or (0.5, 0.5), cam, title, box)


def to_image(inputs: Tensor, preprocessor: nn.Module) -> np.ndarray:
    """Undoes the normalisation of an input (3, H, W).

    Args:
        inputs: The input of the network.
        preprocessor: The data preprocessor that made it.

    Returns:
        The image of shape (H, W, 3) in [0, 1].
    """
    if preprocessor._enable_normalize:
        inputs = inputs * preprocessor.std + preprocessor.mean
    # Images are loaded as BGR; mmdet and mmpretrain name the conversion differently.
    converted = getattr(preprocessor, '_channel_conversion', False)
    if not (converted or getattr(preprocessor, 'to_rgb', False)):
        inputs = inputs.flip(0)
    return (inputs / 255).clamp(0, 1).permute(1, 2, 0).cpu().numpy()


def plot_streams(
    pixels: np.ndarray,
    streams: Streams,
    point: tuple[float, float],
    cam: Tensor | None = None,
    cam_title: str = '',
    box: tuple[float, float, float, float] | None = None,
) -> Figure:
    """Draws the streams of an image, before and after alignment, and their attention.

    Args:
        pixels: The image as the network sees it, (height, width, 3), in [0, 1].
        streams: The streams.
        point: The position whose attention is drawn, as fractions of width and height.
        cam: Map of :func:`grad_cam`.
        cam_title: Title of that map.
        box: Box to draw beside it: left, top, right, bottom, in pixels.

    Returns:
        The figure.
    """
    height, width = pixels.shape[:2]
    extent = (0, width, height, 0)
    # Without pyplot, which keeps figures and is not for threads.
    size = (10, 4.6 * height / width + 0.6)
    figure = Figure(figsize=size, layout='constrained')
    axes = figure.subplots(2, 4)
    for ax in axes.flat:
        ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])

    def cell(values: Tensor) -> tuple[int, int]:
        """The row and the column of the point in a map (C, H, W)."""
        sides = values.shape[1:]
        return tuple(
            min(int(x * n), n - 1) for x, n in zip(point[::-1], sides, strict=True)
        )

    def show(ax: Axes, image: np.ndarray, title: str, **options: Any) -> AxesImage:
        ax.set_title(title, fontsize=8.5)
        return ax.imshow(image, extent=extent, **options)

    def heat(ax: Axes, values: Tensor, title: str) -> None:
        """Draws weights over the grey image, each relative to the largest."""
        show(ax, pixels.mean(2) * 0.6 + 0.4, title, cmap='gray', vmin=0, vmax=1)
        values = (values / values.max().clamp(min=1e-12)).cpu().numpy()
        show(ax, values, title, cmap='inferno', alpha=0.2 + 0.7 * values**0.5)

    def mark(ax: Axes) -> None:
        at = point[0] * width, point[1] * height
        ax.plot(*at, marker='+', markersize=11, markeredgewidth=2.2, color='cyan')

    def frame(ax: Axes, left: float, top: float, right: float, bottom: float) -> None:
        sides = right - left, bottom - top
        ax.add_patch(Rectangle((left, top), *sides, fill=False, color='cyan', lw=1.5))

    show(axes[0, 0], pixels, 'image')
    mark(axes[0, 0])
    axes[1, 0].set_visible(cam is not None)
    if cam is not None:
        heat(axes[1, 0], cam, cam_title)
        if box is not None:
            frame(axes[1, 0], *box)

    local, global_ = streams.local, streams.global_
    rows = (
        ('local', local, streams.aligned_local),
        ('global', global_, streams.aligned_global),
    )
    for row, (name, before, after) in zip(axes, rows, strict=True):
        norms = [x.norm(dim=0).cpu().numpy() for x in (before, after)]
        limits = dict(vmin=min(map(np.min, norms)), vmax=max(map(np.max, norms)))
        shape = ' x '.join(map(str, before.shape[1:]))
        show(row[1], norms[0], f'{name} stream, {shape}', **limits)
        image = show(row[2], norms[1], f'{name} stream, aligned', **limits)
        bar = figure.colorbar(image, cax=row[2].inset_axes([1.03, 0, 0.05, 1]))
        bar.ax.tick_params(labelsize=7)

    weights = streams.local_weights.mean(0)[cell(local)]
    heat(axes[0, 3], weights, 'attention of the marked position')
    mark(axes[0, 3])
    row, column = cell(global_)
    weights = streams.global_weights.mean(0)[row, column]
    heat(axes[1, 3], weights, 'attention of the global token')
    high, wide = height / global_.shape[1], width / global_.shape[2]
    frame(axes[1, 3], column * wide, row * high, (column + 1) * wide, (row + 1) * high)
    return figure
