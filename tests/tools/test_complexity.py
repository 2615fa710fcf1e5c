"""Parameters and operations: count_complexity, get_flops.py, and other counters."""

from copy import deepcopy

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dsnet_mm.models import DSNet, fuse_for_inference
from measure.complexity import count_complexity
from measure.rows import PlainDSNet
from tests.conftest import REPO, tool

WIDE = dict(embed_dims=(64,) * 4, depths=(1,) * 4, num_heads=(1,) * 4)


def test_counts_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.LayerNorm(8)
            self.linear = nn.Linear(8, 5, bias=False)

        def forward(self, x):
            x = self.norm(self.conv(x).flatten(2).transpose(1, 2))
            x = nn.functional.scaled_dot_product_attention(
                x[:, None], x[:, None], x[:, None]
            )
            return self.linear(nn.functional.gelu(x))

    tokens = 4 * 6
    counts = count_complexity(Net(), torch.zeros(1, 3, 4, 6))
    assert counts.params == 3 * 9 * 8 + 8 + 16 + 40
    assert counts.multiply_adds == tokens * (27 * 8 + 2 * tokens * 8 + 8 * 5)
    assert counts.elementwise == tokens * 8 * (1 + 5 + 1)
    assert counts.uncounted == ()


def test_operators_without_formula_are_listed():
    @torch.library.custom_op('dsnet_mm_test::twice', mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    class Net(nn.Module):
        def forward(self, x):
            return twice(x)

    counts = count_complexity(Net(), torch.zeros(2))
    assert counts.uncounted == ('dsnet_mm_test::twice',)


def test_tables_2_and_4_of_the_paper():
    """All printed digits agree, in the order of operations of the public code."""
    models = list(tool('analysis_tools/get_flops.py').published_models())
    measured = {name: counts for name, _, _, counts, _ in models}
    columns = zip(
        *(
            (f'{c.params / 1e6:.1f}', f'{c.multiply_adds / 1e9:.1f}')
            for c in measured.values()
        ),
        strict=True,
    )
    params, products = map(list, columns)
    # T, T*, S, S*, B, B*, then T with alpha 0 to 1. The paper has 19.7 for S, 48.8 for
    # B, which cannot be right, 3 G for S without a decimal, and 8.4 G for B*.
    assert params[:6] == ['9.1', '10.5', '19.6', '23.0', '41.8', '49.3']
    assert params[6:] == ['8.6', '8.7', '9.1', '9.8', '10.7']
    assert products[:4] + products[5:6] == ['1.6', '1.8', '3.1', '3.5', '8.3']
    # Table 2 has three decimals and includes element-wise operations.
    both = [(c.multiply_adds + c.elementwise) / 1e9 for c in measured.values()]
    expected = ['1.573', '1.578', '1.592', '1.615', '1.647']
    assert [f'{value:.3f}' for value in both[6:]] == expected
    # The network saves the projections that it computes at low resolution.
    computed = {name: counts for name, *_, counts in models}
    assert computed['T, alpha=0'] == measured['T, alpha=0']
    saved = {
        n: measured[n].multiply_adds - c.multiply_adds for n, c in computed.items()
    }
    assert all(c.uncounted == () for c in computed.values())
    pixels, tokens = (56, 28, 14, 7), (7, 7, 7, 3)
    assert saved['T, alpha=1'] == sum(
        # proj_in and proj_out of each block
        depth * 2 * channels**2 * (side**2 - global_side**2)
        for depth, channels, side, global_side in zip(
            (2, 2, 4, 1), (64, 128, 320, 512), pixels, tokens, strict=True
        )
    )
    assert 2 * saved['DS-Net-T*'] == 2 * saved['DS-Net-T'] == saved['T, alpha=1']


@pytest.mark.parametrize('isa', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_counts_do_not_depend_on_dtype_and_fusion(dtype, isa):
    net = DSNet(WIDE, isa=isa).eval()
    image = torch.zeros(1, 3, 64, 64)
    expected = count_complexity(net.double(), image.double())
    assert expected.uncounted == ()
    assert count_complexity(net.to(dtype), image.to(dtype)) == expected
    fused = count_complexity(fuse_for_inference(net).to(dtype), image.to(dtype))
    # A fused network has parameters in its output norm only. Its weights are buffers.
    assert fused._replace(params=expected.params) == expected


def test_counters_of_pytorch_and_mmengine():
    """float32 uses the compiled operators, float64 those of PyTorch."""

    def flops(net, dtype, training=False):
        net = net.to(dtype).train(training)
        x = torch.randn(2, 3, 64, 64, dtype=dtype, requires_grad=training)
        counter = FlopCounterMode(display=False)
        with counter, torch.set_grad_enabled(training):
            (out,) = net(x)
            if training:
                out.sum().backward()
        return counter.get_total_flops()

    net = DSNet(WIDE)
    counts = count_complexity(net, torch.zeros(1, 3, 64, 64))
    assert flops(net, torch.float64) == 2 * 2 * counts.multiply_adds
    assert flops(net, torch.float32) == 2 * 2 * counts.multiply_adds
    # In float32 the backward computes the hidden layers of the FFNs again.
    again = sum(2 * 2 * (16 // 2**i) ** 2 * 64 * 256 for i in range(4))
    assert flops(net, torch.float32, True) == flops(net, torch.float64, True) + again
    fused = fuse_for_inference(deepcopy(net.float().eval()))
    assert flops(fused, torch.float32) == 2 * 2 * counts.multiply_adds
    # The hooks of MMEngine make both compute in the published order. It also counts
    # resizing and norms, but no biases.
    image = torch.zeros(1, 3, 64, 64)
    multiply_adds = count_complexity(PlainDSNet(WIDE), image).multiply_adds
    for model in (net.eval(), fused):
        analysis = get_model_complexity_info(
            model, (3, 64, 64), show_table=False, show_arch=False
        )
        assert multiply_adds < analysis['flops'] < 1.05 * multiply_adds


@pytest.mark.parametrize(
    ('config', 'shape', 'params'),
    [
        ('dsnet-tiny_8xb128_in1k.py', '224', '10.53'),
        ('retinanet_dsnet_t_fpn_coco.py', '128', '19.68'),
    ],
)
def test_configurations(config, shape, params, capsys):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmpretrain')
    path = str(REPO / 'configs' / 'dsnet' / config)
    tool('analysis_tools/get_flops.py').main([path, '--shape', shape])
    out = capsys.readouterr().out
    assert f'{shape} x {shape}' in out
    assert params in out
