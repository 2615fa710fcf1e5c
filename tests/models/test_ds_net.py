import math

import pytest
import torch
from torch import nn

from dsnet_mm.models import DSFPN, DSBlock, DSNet
from tests.conftest import TINY, VARIANTS


def block_by_hand(block: DSBlock, x: torch.Tensor) -> torch.Tensor:
    """Computes a block with ISA by loops over the pixels, as in Fig. 2."""
    channels, height, width = x.shape[1:]
    half = channels // 2
    heads, d = block.num_heads, half // block.num_heads

    def attend(q, k, v):
        out = torch.zeros_like(q)
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            scores = q[:, part] @ k[:, part].T / math.sqrt(d)
            out[:, part] = (
                torch.exp(scores) / torch.exp(scores).sum(1, True) @ v[:, part]
            )
        return out

    def pixels(image):  # (C, H, W) -> (H W, C)
        return torch.stack(
            [image[:, i, j] for i in range(height) for j in range(width)]
        )

    def linear(tokens, layer):
        return tokens @ layer.weight.flatten(1).T + layer.bias

    conv = block.pos_embed
    x = x + nn.functional.conv2d(x, conv.weight, conv.bias, padding=1, groups=channels)
    outs = []
    for image in x:
        f = linear(pixels(block.norm1(image[None])[0]), block.proj_in)
        f_g, f_l = f[:, :half], f[:, half:]
        # Local stream: depth-wise 3x3 convolution.
        normed = block.local_norm(f_l)
        f_local = f_l.clone()
        for i in range(height):
            for j in range(width):
                total = block.local_conv.bias.clone()
                for m in (-1, 0, 1):
                    for k in (-1, 0, 1):
                        if 0 <= i + m < height and 0 <= j + k < width:
                            weight = block.local_conv.weight[:, 0, m + 1, k + 1]
                            total = total + weight * normed[(i + m) * width + j + k]
                f_local[i * width + j] += total
        # Global stream: bilinear resizing by 1/2 is the mean of 2x2 pixels.
        grid = f_g.view(height // 2, 2, width // 2, 2, half)
        f_global = grid.mean((1, 3)).reshape(-1, half)
        q, k, v = linear(block.global_norm(f_global), block.global_qkv).chunk(3, 1)
        f_global = f_global + attend(q, k, v)
        # Inter-Scale Alignment.
        isa = block.isa
        ql, kl, vl = linear(isa.local_norm(f_local), isa.local_qkv).chunk(3, 1)
        qg, kg, vg = linear(isa.global_norm(f_global), isa.global_qkv).chunk(3, 1)
        h_local = f_local + linear(attend(ql, kg, vg), isa.local_proj)
        h_global = f_global + linear(attend(qg, kl, vl), isa.global_proj)
        # Merging.
        h_global = h_global.T.view(1, half, height // 2, width // 2)
        h_global = pixels(nn.Upsample(scale_factor=2, mode='bilinear')(h_global)[0])
        merged = linear(torch.cat([h_local, h_global], 1), block.proj_out)
        y = pixels(image) + merged
        hidden = nn.functional.gelu(linear(block.norm2(y), block.ffn.fc1))
        y = y + linear(hidden, block.ffn.fc2)
        outs.append(y.T.view(channels, height, width))
    return torch.stack(outs)


class _PointwiseNorm(nn.Module):
    """Scales the channels of feature maps or tokens, as BN does in evaluation."""

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x):
        return x * (self.scale[:, None, None] if x.ndim == 4 else self.scale)


def test_block_equals_the_equations():
    torch.manual_seed(0)
    block = DSBlock(16, num_heads=2, global_factor=2)
    for name in ('norm1', 'norm2', 'local_norm'):
        channels = getattr(block, name).num_features
        setattr(block, name, _PointwiseNorm(channels))
    block.isa.local_norm = _PointwiseNorm(8)
    block.double().eval()
    x = torch.randn(2, 16, 6, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x), block_by_hand(block, x))


@pytest.mark.parametrize('options', VARIANTS, ids=str)
def test_every_parameter_has_a_gradient(options):
    torch.manual_seed(0)
    net = DSNet(**(dict(arch=TINY, out_indices=(0, 1, 2, 3)) | options))
    net.init_weights()
    outs = net(torch.randn(2, 3, 128, 160))
    sum((out * torch.randn_like(out)).sum() for out in outs).backward()
    silent = [
        name
        for name, param in net.named_parameters()
        if param.grad is None or not param.grad.abs().sum() > 0
    ]
    # Some biases have no effect on the output: a batch norm removes the bias before
    # it, and a softmax removes a bias that all keys share.
    assert not [name for name in silent if not name.endswith('bias')]


@pytest.mark.parametrize('size', [(224, 224), (33, 33), (241, 97), (7, 20), (1, 1)])
def test_any_size(size):
    net = DSNet(TINY, out_indices=(0, 1, 2, 3)).eval()
    with torch.no_grad():
        outs = net(torch.randn(1, 3, *size))
    for out, channels, stride in zip(
        outs, TINY['embed_dims'], (4, 8, 16, 32), strict=True
    ):
        expected = tuple(math.ceil(side / stride) for side in size)
        assert out.shape == (1, channels, *expected)
        assert out.isfinite().all()


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_outputs_are_in_channels_first_memory_order(layout):
    """MMCV's RoIAlign ignores strides and reads memory in channels-first order."""
    roi_align = pytest.importorskip('mmcv.ops').roi_align
    net = DSNet(TINY, out_indices=(0, 1, 2, 3)).eval()
    maps = net(torch.randn(1, 3, 96, 64).contiguous(memory_format=layout))
    neck = DSFPN([16, 32, 48, 64], 32, num_outs=5, num_heads=2).eval()
    boxes = torch.tensor([[0, 0.2, 0.1, 1.7, 2.6]])
    for x in (*maps, *neck(maps)):
        measured = roi_align(x, boxes, (2, 2))
        expected = roi_align(x.clone(memory_format=torch.contiguous_format), boxes, 2)
        torch.testing.assert_close(measured, expected)


def test_output_shapes_at_a_detection_size():
    net = DSNet(TINY, out_indices=(0, 3)).eval()
    with torch.no_grad():
        first, last = net(torch.randn(1, 3, 800, 1333))
    assert first.shape == (1, 16, 200, 334)
    assert last.shape == (1, 64, 25, 42)


def test_sizes_of_the_global_stream():
    sizes = {}
    for factors in ((8, 4, 2, 2), (8, 4, 2, 1)):
        net = DSNet(TINY, global_factors=factors).eval()
        tokens = []
        for stage in net.stages:
            stage[-1].global_norm.register_forward_hook(
                lambda module, args, out: tokens.append(out.shape[1])  # noqa: B023
            )
        with torch.no_grad():
            net(torch.randn(1, 3, 224, 224))
        sizes[factors] = tokens
    assert sizes == {(8, 4, 2, 2): [49, 49, 49, 9], (8, 4, 2, 1): [49, 49, 49, 49]}


def test_output_norms_follow_out_indices():
    names = lambda net: sorted(n for n, _ in net.named_children() if 'norm' in n)  # noqa: E731
    assert names(DSNet(TINY)) == ['norm3']
    assert names(DSNet(TINY, out_indices=(1, -1))) == ['norm1', 'norm3']
    net = DSNet(TINY, out_indices=(0, 1, 2, 3))
    for out in net(torch.randn(4, 3, 64, 64)):
        assert out.mean((0, 2, 3)).abs().max() < 1e-5
        assert (out.std((0, 2, 3), correction=0) - 1).abs().max() < 0.01


def test_outputs_without_norms_are_those_of_the_last_blocks():
    net = DSNet(TINY, out_indices=(0, 3), output_norm=False)
    assert not any(name.startswith('norm') for name in net.state_dict())
    for i, out in zip((0, 3), net(torch.randn(2, 3, 64, 64)), strict=True):
        assert out.shape[1] == TINY['embed_dims'][i]
    blocks = []
    net.stages[3][-1].register_forward_hook(lambda *args: blocks.append(args[2]))
    torch.testing.assert_close(net(torch.randn(2, 3, 64, 64))[1], blocks[0])


def test_gradient_checkpointing_does_not_change_gradients():
    torch.manual_seed(0)
    net = DSNet(TINY, out_indices=(0, 1, 2, 3))
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for with_cp in (False, True):
        net.with_cp = with_cp
        net.zero_grad()
        outs = net(x)
        sum(out.square().sum() for out in outs).backward()
        grads.append([param.grad.clone() for param in net.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_drop_path_rate_increases_over_all_blocks():
    net = DSNet(TINY, drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for stage in net.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_attention_dropout_acts_in_training_only():
    torch.manual_seed(0)
    net = DSNet(TINY, attn_drop_rate=0.5, norm_cfg=dict(type='GN', num_groups=4))
    x = torch.randn(1, 3, 64, 64)
    assert not torch.equal(net(x)[0], net(x)[0])
    net.eval()
    assert torch.equal(net(x)[0], net(x)[0])


@pytest.mark.parametrize('frozen_stages', [-1, 0, 2])
def test_frozen_stages(frozen_stages):
    net = DSNet(TINY, out_indices=(0, 1, 2, 3), frozen_stages=frozen_stages)
    assert net.train() is net
    assert net.eval() is net
    net.train()
    frozen = {name for name, param in net.named_parameters() if not param.requires_grad}
    expected = {
        name
        for name, _ in net.named_parameters()
        if (name.startswith('patch_embeds.0') and frozen_stages >= 0)
        or (
            name.startswith(('patch_embeds.1', 'stages.0', 'stages.1'))
            and frozen_stages == 2
        )
    }
    assert frozen == expected
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(torch.randn(2, 3, 64, 64))
    for name, value in net.state_dict().items():
        if 'running_mean' in name:
            moved = not torch.equal(value, before[name])
            assert moved != name.startswith(
                tuple(f'stages.{i}' for i in range(max(frozen_stages, 0)))
                if frozen_stages > 0
                else ('-',)
            )


def test_norm_eval_excludes_the_output_norms():
    net = DSNet(TINY, out_indices=(2, 3), norm_eval=True).train()
    net(torch.randn(2, 3, 64, 64))
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool(module.running_mean.abs().sum()) == name.startswith('norm')


def test_layer_depth():
    net = DSNet(TINY)
    depths = {
        n: net.get_layer_depth(f'backbone.{n}', 'backbone.')
        for n, _ in net.named_parameters()
    }
    assert {total for _, total in depths.values()} == {7}
    assert depths['patch_embeds.0.projection.weight'][0] == 0
    assert depths['stages.0.0.norm1.weight'][0] == 1
    assert depths['patch_embeds.2.projection.bias'][0] == 3
    assert depths['stages.2.1.ffn.fc1.weight'][0] == 4
    assert depths['stages.3.0.proj_out.weight'][0] == 5
    assert depths['norm3.weight'][0] == 6
    assert net.get_layer_depth('neck.convs.0.weight', 'backbone.') == (6, 7)


def test_sync_bn_and_norm_cfg():
    net = DSNet(TINY, norm_cfg=dict(type='SyncBN'))
    norms = [m for m in net.modules() if 'BatchNorm' in type(m).__name__]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        (dict(arch='huge'), "Unknown arch 'huge'.*tiny"),
        (dict(arch=dict(depths=(1, 1, 1, 1))), 'lacks .*embed_dims.*num_heads'),
        (dict(arch=TINY | dict(depths=(1, 1))), "arch\\['depths'\\] takes 4 values"),
        (dict(alpha=1.5, isa=False), 'alpha .*\\[0, 1\\].*1.5'),
        (dict(alpha=0.3, isa=False), 'alpha=0.3 splits 64 channels'),
        (dict(alpha=0.25), 'equal width.*alpha=0.25.*isa=False'),
        (dict(isa='sideways'), "isa is .*'sideways'"),
        (dict(intra_scale='none'), "intra_scale is .*'none'"),
        (dict(num_heads=7), 'num_heads=7 does not divide the 32 channels'),
        (dict(num_heads=(1, 2)), 'num_heads takes 4 positive'),
        (dict(global_factors=(8, 4, 2, 0)), 'global_factors takes 4 positive'),
        (dict(out_indices=(0, 4)), 'out_indices takes stages from 0 to 3.*4'),
        (dict(out_indices=()), 'out_indices takes stages'),
        (dict(frozen_stages=5), 'frozen_stages .*5'),
    ],
    ids=str,
)
def test_bad_arguments(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        DSNet(**options)


def test_pretrained_checkpoint(tmp_path):
    torch.manual_seed(0)
    trained = DSNet(TINY)
    path = tmp_path / 'classifier.pth'
    state = {f'backbone.{k}': v for k, v in trained.state_dict().items()}
    torch.save(dict(state_dict=state), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')

    detector = DSNet(TINY, out_indices=(0, 1, 2, 3), init_cfg=init_cfg)
    detector.init_weights()
    loaded = detector.state_dict()
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded[name], value), name

    other = DSNet(TINY | dict(embed_dims=(16, 32, 48, 96)), init_cfg=init_cfg)
    with pytest.raises(ValueError, match=r'does not fit.*another shape.*given'):
        other.init_weights()
    without_prefix = DSNet(TINY, init_cfg=init_cfg | dict(prefix=''))
    with pytest.raises(ValueError, match=r"are not in it.*prefix is ''"):
        without_prefix.init_weights()
    shallower = DSNet(TINY | dict(depths=(1, 1, 1, 1)), init_cfg=init_cfg)
    with pytest.raises(ValueError, match=r'tensors more, for example stages\.2\.1'):
        shallower.init_weights()
    # In a list too, of which MMEngine takes the others first.
    random = dict(type='Constant', layer='Conv2d', val=0)
    with pytest.raises(ValueError, match='does not fit'):
        DSNet(TINY, init_cfg=[random, init_cfg | dict(prefix='')]).init_weights()
    listed = DSNet(TINY, init_cfg=[init_cfg, random])
    listed.init_weights()
    key = 'stages.0.0.proj_in.weight'
    assert torch.equal(listed.state_dict()[key], trained.state_dict()[key])
    nowhere = init_cfg | dict(checkpoint=None)
    DSNet(TINY, init_cfg=nowhere).init_weights()
    random_ones = DSNet(TINY, init_cfg=[nowhere, random])
    random_ones.init_weights()
    assert not random_ones.state_dict()[key].any()


def test_output_norms_get_channels_last_gradients():
    """With other gradients the backward of PyTorch's batch norm is ten times slower."""
    net = DSNet(TINY, out_indices=(0, 1, 2, 3))
    layouts = []
    for i in range(4):
        getattr(net, f'norm{i}').register_full_backward_hook(
            lambda norm, _, grads: layouts.append(
                grads[0].is_contiguous(memory_format=torch.channels_last)
            )
        )
    outs = net(torch.randn(2, 3, 128, 160))
    assert all(out.is_contiguous() for out in outs)
    sum((out * torch.randn_like(out)).sum() for out in outs).backward()
    assert layouts == [True] * 4
