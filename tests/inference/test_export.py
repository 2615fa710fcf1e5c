"""Export to torch.export and ONNX, and torch.compile of training steps."""

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

from dsnet_mm.inference.export import ExportedPart, decode, differences
from dsnet_mm.models import DSFPN, DSNet
from dsnet_mm.models.layers import DSBlock
from dsnet_mm.ops import resize
from tests.conftest import error, random_checkpoint, tool, trained

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
    module = tool('export.py')
    args = [str(config), str(checkpoint), str(out), '--turns', '1']

    program = []
    export = module.export
    module.export = lambda net: program.append(export(net)) or program[0]
    module.main(args)
    assert 'any size from 97 x 97' in capsys.readouterr().out
    run = decode(out.read_bytes(), '.onnx')
    assert max(differences(net, run, [(1, 97, 300), (4, 301, 99)])) < 1e-4
    images = torch.randn(1, 3, 111, 222)
    assert run(images)[0].std() > 1e-3 * run(images)[0].abs().max()

    with pytest.raises(SystemExit, match='2'):
        module.main(args)
    assert 'exists; replace it by --overwrite' in capsys.readouterr().err

    # With other weights than those of the program, the comparison fails.
    module.export = lambda net: program[0]
    weights = torch.load(checkpoint)
    weights['state_dict']['head.fc.weight'] *= 1.01
    torch.save(weights, checkpoint)
    args[2] = str(tmp_path / 'refused.onnx')
    with pytest.raises(SystemExit, match='Nothing is written'):
        module.main(args)
    assert not Path(args[2]).exists()


def test_program_of_a_detector_runs_with_its_heads(
    folder: Path, tmp_path: Path, capsys
) -> None:
    config, checkpoint = folder / 'mask_rcnn.py', tmp_path / 'weights.pth'
    random_checkpoint(config, DETECTORS, checkpoint)
    out = tmp_path / 'maps.pt2'
    tool('export.py').main([str(config), str(checkpoint), str(out), '--turns', '1'])
    printed = capsys.readouterr().out
    assert 'map0, map1, map2, map3, map4' in ' '.join(printed.split())
    assert 'The heads of the detector are not in it' in printed

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


@pytest.mark.parametrize(
    'args, message',
    [
        (['maps.txt'], 'OUT ends with .onnx or .pt2, got maps.txt'),
        (['maps.pt2', '--turns', '0'], '--turns is at least 1, got 0'),
        (['maps.pt2'], 'there is no checkpoint none.pth'),
    ],
)
def test_wrong_arguments(folder: Path, capsys, args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match='2'):
        tool('export.py').main([str(folder / 'retinanet.py'), 'none.pth', *args])
    assert message in ' '.join(capsys.readouterr().err.split())


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


def test_one_compiled_training_step_for_images_of_any_size() -> None:
    """Backbone and neck, without a graph break. Code is not generated."""
    torch._dynamo.reset()
    net = Pyramid().train()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend='aot_eager')
    for size, stance in ((140, 133), 'default'), ((99, 301), 'fail_on_recompile'):
        x = torch.randn(2, 3, *size)
        with torch.compiler.set_stance(stance):
            measured = outputs_and_gradients(compiled, net, x)
        expected = outputs_and_gradients(net, net, x)
        assert error(measured, [e.double() for e in expected]) < 1e-4


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
