from pathlib import Path

import pytest
import torch
from torch import nn

from dsnet_mm.cli.complexity import count_complexity
from dsnet_mm.models import DSNet, fuse_for_inference
from dsnet_mm.models.layers import pointwise

from .conftest import tool

CONFIGS = Path(__file__).resolve().parents[1] / 'configs' / 'dsnet'


@pytest.fixture(scope='module')
def get_flops():
    return tool('analysis_tools/get_flops.py')


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


def test_an_operator_without_formula_is_named():
    @torch.library.custom_op('dsnet_mm_test::twice', mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    class Net(nn.Module):
        def forward(self, x):
            return twice(x)

    assert count_complexity(Net(), torch.zeros(2)).uncounted == (
        'dsnet_mm_test::twice',
    )


def test_the_papers_tables(get_flops):
    """Tables 2 and 4, to their printed digits, by the published order."""
    models = list(get_flops.published_models())
    measured = {name: counts for name, _, _, counts, _ in models}
    params = {name: f'{c.params / 1e6:.1f}' for name, c in measured.items()}
    assert params == {
        'DS-Net-T': '9.1',
        'DS-Net-T*': '10.5',
        'DS-Net-S': '19.6',  # 19.7 in the paper
        'DS-Net-S*': '23.0',
        'DS-Net-B': '41.8',  # 48.8 in the paper, which cannot be
        'DS-Net-B*': '49.3',
        'T, alpha=0': '8.6',
        'T, alpha=0.25': '8.7',
        'T, alpha=0.5': '9.1',
        'T, alpha=0.75': '9.8',
        'T, alpha=1': '10.7',
    }
    products = {n: f'{c.multiply_adds / 1e9:.1f}' for n, c in measured.items()}
    assert products['DS-Net-T'] == '1.6'
    assert products['DS-Net-T*'] == '1.8'
    assert products['DS-Net-S'] == '3.1'  # 3 in the paper, without a decimal
    assert products['DS-Net-S*'] == '3.5'
    assert products['DS-Net-B*'] == '8.3'  # 8.4 in the paper
    # Table 2 has three decimals, and element-wise operations in them.
    all_operations = {
        name.removeprefix('T, alpha='): f'{(c.multiply_adds + c.elementwise) / 1e9:.3f}'
        for name, c in measured.items()
        if 'alpha' in name
    }
    assert all_operations == {
        '0': '1.573',
        '0.25': '1.578',
        '0.5': '1.592',
        '0.75': '1.615',
        '1': '1.647',
    }
    # What is computed at low resolution is saved, and nothing else.
    computed = {name: counts for name, *_, counts in models}
    assert computed['T, alpha=0'] == measured['T, alpha=0']
    saved = {
        n: measured[n].multiply_adds - c.multiply_adds for n, c in computed.items()
    }
    assert all(c.uncounted == () for c in computed.values())
    pixels, tokens = (56, 28, 14, 7), (7, 7, 7, 3)
    assert saved['T, alpha=1'] == sum(
        # proj_in and proj_out of every block
        depth * 2 * channels**2 * (side**2 - global_side**2)
        for depth, channels, side, global_side in zip(
            (2, 2, 4, 1), (64, 128, 320, 512), pixels, tokens, strict=True
        )
    )
    assert 2 * saved['DS-Net-T*'] == 2 * saved['DS-Net-T'] == saved['T, alpha=1']


@pytest.mark.skipif(not pointwise._HAS_ONEDNN, reason='PyTorch without oneDNN')
def test_fused_projections_count_as_plain_ones():
    """Bias and GELU are counted, an addition is not, in either form."""
    torch.manual_seed(0)
    net = DSNet(dict(embed_dims=(8,) * 4, depths=(1,) * 4, num_heads=(1,) * 4))
    picture = torch.zeros(1, 3, 64, 64)
    fused = count_complexity(net, picture)
    # In float64 there are none, and 1x1 convolutions run as such.
    plain = count_complexity(net.double(), picture.double())
    assert fused == plain
    assert fused.uncounted == ()


@pytest.mark.parametrize('isa', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_packed_projections_count_as_plain_ones(dtype, isa):
    arch = dict(embed_dims=(64,) * 4, depths=(1,) * 4, num_heads=(1,) * 4)
    net = DSNet(arch, isa=isa)
    picture = torch.zeros(1, 3, 64, 64)
    plain = count_complexity(net.double(), picture.double())
    packed = fuse_for_inference(net).to(dtype)
    counts = [count_complexity(packed, picture.to(dtype)) for _ in range(2)]
    for count in counts:
        assert count._replace(params=plain.params) == plain


@pytest.mark.parametrize(
    ('config', 'shape', 'params'),
    [
        ('dsnet-tiny_8xb128_in1k.py', '224', '10.53'),
        ('retinanet_dsnet_t_fpn_coco.py', '128', '19.68'),
    ],
)
def test_configurations(get_flops, config, shape, params, monkeypatch, capsys):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmpretrain')
    path = CONFIGS / config
    monkeypatch.setattr('sys.argv', ['get_flops.py', str(path), '--shape', shape])
    get_flops.main()
    out = capsys.readouterr().out
    assert f'{shape} x {shape}' in out
    assert params in out


def test_unknown_target(get_flops, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['get_flops.py', 'nothing.py'])
    with pytest.raises(SystemExit):
        get_flops.main()
    assert 'nothing.py is neither' in capsys.readouterr().err
