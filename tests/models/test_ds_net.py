import math

import pytest
import torch
from torch import nn

from dsnet_mm.models import DSFPN, DSNet
from tests.conftest import TINY

ALL = dict(out_indices=(0, 1, 2, 3))


@pytest.mark.parametrize('size', [(224, 200), (33, 33), (241, 97), (7, 20), (1, 1)])
def test_any_size(size):
    net = DSNet(TINY, **ALL).eval()
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
    net = DSNet(TINY, **ALL).eval()
    maps = net(torch.randn(1, 3, 96, 64).contiguous(memory_format=layout))
    neck = DSFPN([16, 32, 48, 64], 32, num_outs=5, num_heads=2).eval()
    boxes = torch.tensor([[0, 0.2, 0.1, 1.7, 2.6]])
    for x in (*maps, *neck(maps)):
        measured = roi_align(x, boxes, (2, 2))
        expected = roi_align(x.clone(memory_format=torch.contiguous_format), boxes, 2)
        torch.testing.assert_close(measured, expected)


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


def test_a_maximum_of_49_global_tokens_leaves_images_of_224_alone():
    torch.manual_seed(0)
    x, net = torch.randn(1, 3, 224, 224), DSNet(TINY, **ALL).eval()
    for cap, same in ((48, False), (49, True), (196, True)):
        capped = DSNet(TINY, max_global_tokens=cap, **ALL).eval()
        capped.load_state_dict(net.state_dict())
        with torch.no_grad():
            pairs = zip(net(x), capped(x), strict=True)
        assert all(torch.equal(*pair) for pair in pairs) == same


def test_output_norms():
    def norms(net):
        return [name for name, _ in net.named_children() if 'norm' in name]

    assert norms(DSNet(TINY)) == ['norm3']
    assert norms(DSNet(TINY, out_indices=(1, -1))) == ['norm1', 'norm3']
    x = torch.randn(4, 3, 64, 64)
    for out in DSNet(TINY, **ALL)(x):
        assert out.mean((0, 2, 3)).abs().max() < 1e-5
        assert (out.std((0, 2, 3), correction=0) - 1).abs().max() < 0.01
    net = DSNet(TINY, out_indices=(0, 3), output_norm=False)
    assert not any(name.startswith('norm') for name in net.state_dict())
    blocks = []
    net.stages[3][-1].register_forward_hook(lambda *args: blocks.append(args[2]))
    torch.testing.assert_close(net(x)[1], blocks[0])


def test_output_norms_get_channels_last_gradients():
    """With other gradients the backward of PyTorch's batch norm is ten times slower."""
    net = DSNet(TINY, **ALL)
    layouts = []
    for i in range(4):
        getattr(net, f'norm{i}').register_full_backward_hook(
            lambda norm, _, grads: layouts.append(
                grads[0].is_contiguous(memory_format=torch.channels_last)
            )
        )
    outs = net(torch.randn(2, 3, 64, 96))
    sum((out * torch.randn_like(out)).sum() for out in outs).backward()
    assert layouts == [True] * 4


def test_gradient_checkpointing_does_not_change_gradients():
    torch.manual_seed(0)
    net = DSNet(TINY, **ALL)
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for with_cp in (False, True):
        net.with_cp = with_cp
        net.zero_grad()
        sum(out.square().sum() for out in net(x)).backward()
        grads.append([param.grad.clone() for param in net.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_stochastic_depth_and_dropout():
    torch.manual_seed(0)
    gn = dict(type='GN', num_groups=4)
    net = DSNet(TINY, drop_path_rate=0.4, attn_drop_rate=0.5, norm_cfg=gn)
    rates = [block.drop_path.drop_prob for stage in net.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    net = DSNet(TINY, attn_drop_rate=0.5, norm_cfg=gn)
    x = torch.randn(1, 3, 64, 64)
    assert not torch.equal(net(x)[0], net(x)[0])
    net.eval()
    assert torch.equal(net(x)[0], net(x)[0])


@pytest.mark.parametrize(
    ('stages', 'frozen'),
    [
        (-1, ()),
        (0, ('patch_embeds.0.',)),
        (2, ('patch_embeds.0.', 'patch_embeds.1.', 'stages.0.', 'stages.1.')),
    ],
)
def test_frozen_stages(stages, frozen):
    net = DSNet(TINY, **ALL, frozen_stages=stages)
    assert net.train() is net
    for name, param in net.named_parameters():
        assert param.requires_grad != name.startswith(frozen or '-')
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(torch.randn(2, 3, 64, 64))
    for name, value in net.state_dict().items():
        if 'running_mean' in name:
            assert torch.equal(value, before[name]) == name.startswith(frozen or '-')


def test_norm_eval_excludes_the_output_norms():
    net = DSNet(TINY, out_indices=(2, 3), norm_eval=True).train()
    net(torch.randn(2, 3, 64, 64))
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool(module.running_mean.abs().sum()) == name.startswith('norm')


def test_layer_depth():
    net = DSNet(TINY)
    for name, depth in {
        'patch_embeds.0.projection.weight': 0,
        'stages.0.0.norm1.weight': 1,
        'patch_embeds.2.projection.bias': 3,
        'stages.2.1.ffn.fc1.weight': 4,
        'stages.3.0.proj_out.weight': 5,
        'norm3.weight': 6,
    }.items():
        assert name in net.state_dict()
        assert net.get_layer_depth(f'backbone.{name}', 'backbone.') == (depth, 7)
    assert net.get_layer_depth('neck.convs.0.weight', 'backbone.') == (6, 7)


@pytest.mark.parametrize(
    ('options', 'facts'),
    [
        (dict(arch='huge'), "'huge'.*tiny"),
        (dict(arch=dict(depths=(1, 1, 1, 1))), 'embed_dims.*num_heads'),
        (dict(arch=TINY | dict(depths=(1, 1))), 'depths.*4'),
        (dict(alpha=1.5, isa=False), '1.5'),
        (dict(alpha=0.3, isa=False), '0.3.*64'),
        (dict(alpha=0.25), '0.25.*isa=False'),
        (dict(isa='sideways'), "isa.*'sideways'"),
        (dict(intra_scale='none'), "intra_scale.*'none'"),
        (dict(num_heads=7), 'num_heads=7.*32'),
        (dict(num_heads=(1, 2)), 'num_heads.*4'),
        (dict(global_factors=(8, 4, 2, 0)), 'global_factors.*0'),
        (dict(max_global_tokens=0), 'max_global_tokens.*0'),
        (dict(max_global_tokens=49.0), r'max_global_tokens.*49\.0'),
        (dict(out_indices=(0, 4)), 'out_indices.*4'),
        (dict(out_indices=()), 'out_indices'),
        (dict(frozen_stages=5), 'frozen_stages.*5'),
    ],
    ids=str,
)
def test_bad_arguments(options, facts):
    with pytest.raises(ValueError, match=facts):
        DSNet(**options)


def test_pretrained_checkpoint(tmp_path):
    torch.manual_seed(0)
    trained = DSNet(TINY).state_dict()
    path = tmp_path / 'classifier.pth'
    torch.save(dict(state_dict={f'backbone.{k}': v for k, v in trained.items()}), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')

    def load(arch=TINY, **options):
        net = DSNet(arch, **options)
        net.init_weights()
        return net.state_dict()

    loaded = load(init_cfg=init_cfg, **ALL)
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())
    for arch, cfg, facts in (
        (
            TINY | dict(embed_dims=(16, 32, 48, 96)),
            {},
            r'classifier\.pth.*patch_embeds\.3.*96',
        ),
        (TINY, dict(prefix=''), r"classifier\.pth.*''"),
        (TINY | dict(depths=(1, 1, 1, 1)), {}, r'classifier\.pth.*stages\.2\.1'),
    ):
        for given in (init_cfg | cfg, [init_cfg | cfg]):
            with pytest.raises(ValueError, match=facts):
                load(arch, init_cfg=given)
    # Of a list MMEngine takes the others first.
    key, zero = (
        'stages.0.0.proj_in.weight',
        dict(type='Constant', layer='Conv2d', val=0),
    )
    assert torch.equal(load(init_cfg=[init_cfg, zero])[key], trained[key])
    nowhere = init_cfg | dict(checkpoint=None)
    assert load(init_cfg=nowhere)[key].any()
    assert not load(init_cfg=[nowhere, zero])[key].any()
