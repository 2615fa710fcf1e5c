"""Export to torch.export and ONNX, and torch.compile of training steps."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import MODELS as DETECTORS
from mmengine.config import Config
from mmpretrain.registry import MODELS as CLASSIFIERS
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from dsnet_mm import infer
from dsnet_mm.models import DSFPN, DSNet
from dsnet_mm.models.layers import DSBlock
from dsnet_mm.ops import resize
from export import SIZES, ExportedPart, decode, differences
from tests.conftest import error, tool, trained
from tests.inference.conftest import random_checkpoint

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ('onnx', 'onnxscript', 'onnxruntime')),
    reason='onnx, onnxscript or onnxruntime is not installed',
)


# ------------------------------------------------------------------------ export


@needs_onnx
def test_onnx_of_a_classifier(folder: Path, tmp_path: Path, capsys) -> None:
    config, checkpoint = folder / 'classifier.py', tmp_path / 'weights.pth'
    net = ExportedPart(random_checkpoint(config, CLASSIFIERS, checkpoint))
    out = tmp_path / 'classifier.onnx'
    import infer_onnx  # imports onnxruntime

    module = tool('export.py')
    module.SIZES = SIZES[:2]
    args = [str(config), str(checkpoint), str(out), '--turns', '1']

    program = []
    export = module.export
    module.export = lambda net, batch: program.append(export(net)) or program[0]
    module.main(args)
    assert '97 x 97' in capsys.readouterr().out
    run = decode(out.read_bytes(), '.onnx')
    assert max(differences(net, run, [(1, 97, 300), (4, 301, 99)])) < 1e-4
    images = torch.randn(1, 3, 111, 222)
    assert run(images)[0].std() > 1e-3 * run(images)[0].abs().max()
    images, results = folder / 'sets/folders/val', tmp_path / 'results'
    infer_onnx.main([str(out), str(images), '--out', str(results)])
    found = json.loads((results / 'predictions.json').read_text())
    predictions = infer(config, checkpoint, images)
    expected = [x for i, one in enumerate(predictions, 1) for x in one.to_coco(i)]
    for entry, other in zip(found, expected, strict=True):
        assert abs(entry.pop('score') - other.pop('score')) < 2e-5
        assert entry == other
    assert len(list(results.glob('images/*/*.png'))) == len(predictions) == 4

    with pytest.raises(SystemExit, match='2'):
        module.main(args)
    assert '--overwrite' in capsys.readouterr().err

    # With other weights than those of the program, the comparison fails.
    module.export = lambda net, batch: program[0]
    weights = torch.load(checkpoint)
    weights['state_dict']['head.fc.weight'] *= 1.01
    torch.save(weights, checkpoint)
    args[2] = str(tmp_path / 'refused.pt2')
    with pytest.raises(SystemExit, match='--tolerance'):
        module.main(args)
    assert not Path(args[2]).exists()


def test_program_of_a_detector_runs_with_its_heads(
    folder: Path, tmp_path: Path, capsys
) -> None:
    config, checkpoint = folder / 'mask_rcnn.py', tmp_path / 'weights.pth'
    random_checkpoint(config, DETECTORS, checkpoint)
    out, module = tmp_path / 'maps.pt2', tool('export.py')
    module.SIZES = SIZES[:1]
    module.main([str(config), str(checkpoint), str(out), '--turns', '1'])
    printed = ' '.join(capsys.readouterr().out.split())
    assert 'map0, map1, map2, map3, map4' in printed

    # As docs/export.md says.
    cfg = Config.fromfile(config)
    cfg.test_dataloader = dict(dataset=dict(pipeline=cfg.load))
    cfg.load[1].scale = (200, 200)
    del cfg.load[2]
    detector = init_detector(cfg, str(checkpoint), palette='random', device='cpu')
    image = str(next((folder / 'sets/coco/val2017').iterdir()))
    expected = inference_detector(detector, image).pred_instances
    run = torch.export.load(out).module()
    calls = []
    detector.extract_feat = lambda x: calls.append(x.shape) or run(x)
    found = inference_detector(detector, image).pred_instances
    assert calls == [(1, 3, 224, 224)]  # padded to a multiple of 32
    assert len(expected) > 0
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.bboxes, expected.bboxes, rtol=1e-3, atol=1e-2)


def test_latencies_of_a_network_that_cannot_be_fused() -> None:
    net = nn.Conv2d(3, 2, 1)
    times = tool('export.py').latencies(net, net, (8, 8), 1)
    assert times.keys() == {'PyTorch, as built', 'exported'}


def test_differences_see_what_is_wrong() -> None:
    net = nn.Conv2d(3, 2, 1)
    module = nn.Sequential(net)
    module.forward = lambda x: (net(x),)
    sizes = [(1, 5, 7), (2, 3, 4)]
    assert differences(module, module, sizes) == [0, 0]
    for run in (
        lambda x: [net(x)[..., :-1]],
        lambda x: [net(x) * float('nan')],
        lambda x: [net(x) + 1],
    ):
        assert min(differences(module, run, sizes)) > 0.1


def test_too_few_global_tokens_for_one_program() -> None:
    with pytest.raises(ValueError, match=r'max_global_tokens=9.*16'):
        tool('export.py').export(DSBlock(8, 1, max_global_tokens=9))


@pytest.mark.parametrize(
    ('args', 'fact'),
    [
        (['maps.txt'], 'maps.txt'),
        (['maps.pt2', '--turns', '0'], '--turns'),
        (['maps.pt2'], 'none.pth'),
    ],
)
def test_wrong_arguments(folder: Path, capsys, args: list[str], fact: str) -> None:
    with pytest.raises(SystemExit, match='2'):
        tool('export.py').main([str(folder / 'retinanet.py'), 'none.pth', *args])
    assert fact in capsys.readouterr().err.splitlines()[-1]


# ----------------------------------------------------------------------- compile


class Pyramid(nn.Module):
    """Backbone and neck, as in a detector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = DSNet(
            dict(embed_dims=(8, 8, 16, 16), depths=(1,) * 4, num_heads=(1,) * 4),
        )
        self.neck = DSFPN([16], out_channels=16, num_outs=2, num_heads=1)
        trained(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.neck(self.backbone(x))


def outputs_and_gradients(forward, net: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the outputs, and gradients of a weighted sum of them."""
    x = x.clone().requires_grad_()
    outs = forward(x)
    outs = [outs] if isinstance(outs, Tensor) else outs
    loss = sum((out * out.detach().cos()).sum() for out in outs)
    return [*outs, *torch.autograd.grad(loss, [x, *net.parameters()])]


def compiled_steps_differ(net: nn.Module, backend: str, *sizes: tuple) -> float:
    """Compiles training steps once. Returns their largest difference."""
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=backend)
    worst = 0.0
    for i, size in enumerate(sizes):
        x = torch.randn(*size)
        with torch.compiler.set_stance('fail_on_recompile' if i else 'default'):
            measured = outputs_and_gradients(compiled, net, x)
        expected = outputs_and_gradients(net, net, x)
        worst = max(worst, error(measured, [e.double() for e in expected]))
    return worst


def test_one_compiled_training_step_for_images_of_any_size() -> None:
    """Without a graph break. Code is not generated."""
    net = Pyramid().train()
    sizes = (2, 3, 140, 133), (2, 3, 99, 301)
    assert compiled_steps_differ(net, 'eager', *sizes) < 1e-4
    sizes = (2, 8, 12, 18), (2, 8, 9, 7)
    for cap in (None, 30):  # in effect for the first size
        block = DSBlock(8, 1, global_factor=2, max_global_tokens=cap)
        block = trained(block).train()
        assert compiled_steps_differ(block, 'aot_eager', *sizes) < 1e-4


def test_a_training_step_of_a_block_in_generated_code() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = trained(DSBlock(8, 1, global_factor=2)).train()
    x = torch.randn(2, 8, 12, 18)
    # Code without vector instructions compiles in a fraction of the time.
    with torch._inductor.config.patch({'cpp.simdlen': 1}):
        compiled = torch.compile(block, fullgraph=True)
        measured = outputs_and_gradients(compiled, block, x)
    expected = outputs_and_gradients(block, block, x)
    assert error(measured, [e.double() for e in expected]) < 1e-4


def test_resizing_is_one_operator_of_a_compiled_training_step() -> None:
    """PyTorch's parts of it are what does not compile."""
    torch._dynamo.reset()
    graphs = []

    def keep(module, inputs):
        graphs.append(str(module.graph))
        return module.forward

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    x = torch.randn(1, 2, 4, 6, requires_grad=True)
    compiled = torch.compile(resize, fullgraph=True, backend=backend)
    (grad,) = torch.autograd.grad(compiled(x, (3, 9)).cos().sum(), x)
    (expected,) = torch.autograd.grad(resize(x, (3, 9)).cos().sum(), x)
    torch.testing.assert_close(grad, expected)
    forward, backward = graphs
    assert 'dsnet_mm.resize.default' in forward
    assert 'dsnet_mm.resize_backward.default' in backward
    assert 'index_put' not in backward

    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 5, 4).contiguous(memory_format=layout).requires_grad_()
        for size in ((7, 9), (2, 3), (1, 1)):
            torch.library.opcheck(torch.ops.dsnet_mm.resize.default, (x, *size))
