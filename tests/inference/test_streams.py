"""Images of the two streams."""

from pathlib import Path

import cv2
import pytest
import torch
from mmdet.registry import MODELS as DETECTORS
from mmpretrain.registry import MODELS as CLASSIFIERS

from dsnet_mm.inference.streams import captured, find_block, grad_cam
from dsnet_mm.ops import split_heads
from tests.conftest import TINY, build, equal, images, tool
from tests.inference.conftest import random_checkpoint


def test_weights_give_the_output_of_the_operator() -> None:
    net = build({}, TINY)
    block = find_block(net, 'stages.1.0')
    kept = {}
    for name in ('local_qkv', 'global_qkv'):
        getattr(block.isa, name).register_forward_hook(
            lambda module, args, output, name=name: kept.update({name: output})
        )
    # What the operator returns is what is projected.
    for name in ('local_proj', 'global_proj'):
        getattr(block.isa, name).register_forward_hook(
            lambda module, args, output, name=name: kept.update({name: args[0]})
        )
    net.eval()
    x = images()
    with torch.no_grad():
        expected = net(x)
        hooks = sum(len(module._forward_hooks) for module in net.modules())
        with captured(block) as streams_of:
            assert equal(net(x), expected)
            streams = streams_of()
    assert sum(len(module._forward_hooks) for module in net.modules()) == hooks

    local_qkv = kept['local_qkv'].flatten(2).transpose(1, 2)
    _, _, v_l = split_heads(local_qkv, block.num_heads, 3)
    _, _, v_g = split_heads(kept['global_qkv'], block.num_heads, 3)
    for weights, values, output in (
        (streams.local_weights, v_g, kept['local_proj']),
        (streams.global_weights, v_l, kept['global_proj']),
    ):
        weights = weights.flatten(1, 2).flatten(2)
        measured = (weights @ values[0]).transpose(0, 1).flatten(1)
        torch.testing.assert_close(measured, output[0])

    # The streams are those that the projections were added to.
    added = block.isa.local_proj(kept['local_proj'])[0].t().unflatten(1, (9, 13))
    torch.testing.assert_close(streams.aligned_local - streams.local, added)
    added = block.isa.global_proj(kept['global_proj'])[0].t().unflatten(1, (2, 3))
    torch.testing.assert_close(streams.aligned_global - streams.global_, added)


def test_unknown_blocks_are_named() -> None:
    with pytest.raises(ValueError, match=r'this model has stages.0.0, stages.1.0'):
        find_block(build({}, TINY), 'stages.7')
    with pytest.raises(ValueError, match='this model has none'):
        find_block(build(dict(isa='global_to_local'), TINY), 'stages.0.0')


def test_what_raises_a_score() -> None:
    x = torch.zeros(1, 2, 2, 2)
    x[0, :, 0, 0], x[0, 0, 1, 1] = torch.tensor([1.0, 2.0]), 4
    x.requires_grad_()
    score = 3 * x[0, 0, 0, 0] - x[0, 1, 0, 0]
    # Its own gradient is zero in the other place, and the mean gradient is not.
    local = grad_cam(score, x, pooled=False)
    assert local.tolist() == [[1, 0], [0, 0]]
    assert grad_cam(score, x, pooled=True).tolist() == [[0.25, 0], [0, 3]]
    assert grad_cam(-score, x, pooled=False).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    'config, registry', [('classifier', CLASSIFIERS), ('mask_rcnn', DETECTORS)]
)
def test_figure(folder: Path, tmp_path: Path, capsys, config: str, registry) -> None:
    checkpoint, out = tmp_path / 'weights.pth', tmp_path / 'streams.png'
    random_checkpoint(folder / f'{config}.py', registry, checkpoint)
    kind = 'folders/val/disc/0.png' if config == 'classifier' else 'coco/val2017/1.png'
    args = [
        str(folder / f'{config}.py'),
        str(checkpoint),
        str(folder / 'sets' / kind),
        str(out),
    ]
    main = tool('visualization/show_streams.py').main
    main([*args, '--block', 'backbone.stages.1.0'])
    assert cv2.imread(str(out)).std() > 20
    for more, fact in (
        ([], str(out)),
        (['--overwrite', '--point', '2', '0'], '--point'),
        (['--overwrite', '--block', 'neck'], 'backbone.stages.1.0'),
        (['--overwrite', '--target', '1000'], '1000'),
    ):
        with pytest.raises(SystemExit, match='2'):
            main([*args, *more])
        assert fact in capsys.readouterr().err.splitlines()[-1]
