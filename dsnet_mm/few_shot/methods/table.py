"""All methods with the hyper-parameters of their papers or repositories."""

from .base import Method
from .clap import fit_clap, fit_linear_probe_zs
from .clip_adapter import fit_clip_adapter, fit_hoso
from .coop import fit_coop
from .cross_modal import fit_cross_modal
from .gda import fit_gda
from .linear_adapter import fit_linear_adapter
from .linear_probe import fit_linear_probe
from .lp_plus_plus import fit_lp_plus_plus
from .proker import fit_proker
from .task_res import fit_task_res
from .tip_adapter import fit_tip_adapter, fit_tip_adapter_f
from .zero_shot import fit_zero_shot

_COOP = dict(
    optimizer='SGD',
    lr=0.002,
    epochs='coop',
    batch_size=32,
    weight_decay=5e-4,
    warmup_epochs=1,
    decay_by='epoch',
)
_CLAP = dict(
    optimizer='SGD',
    lr=0.1,
    epochs=300,
    weight_decay=0.0,
    warmup_epochs=1,
    decay_by='epoch',
)
_OURS = dict(alpha=0.2, keep=5.0, optimizer='AdamW', lr=1e-3, iterations=200)
_OURS_GRID = dict(keep=(1.0, 5.0, 20.0))
_PROLIP = dict(
    optimizer='Adam', eps=1e-4, epochs=300, batch_size=None, weight_decay=0.0
)
_TIP = dict(alpha=1.0, beta=1.0)
_TIP_GRID = dict(
    alpha=(0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0),
    beta=(0.1, 0.5, 1.0, 2.0, 3.5, 5.5, 8.0, 12.0),
)

METHODS: dict[str, Method] = {
    'zero_shot': Method('Zero-shot CLIP', fit_zero_shot),
    'linear_probe': Method(
        'Linear probe',
        fit_linear_probe,
        dict(weight_decay=1e-3),
        dict(weight_decay=(1e-5, 1e-4, 1e-3, 1e-2)),
        source='L-BFGS as in CLIP and CoOp, with a shorter search',
    ),
    'linear_probe_zs': Method(
        'ZS-LP',
        fit_linear_probe_zs,
        dict(_CLAP, length=1.0),
        dict(length=(1.0, 10.0)),
        source='code of CLAP, but from text features of unit norm, and with 10 views '
        'instead of 20',
    ),
    'clap': Method(
        'CLAP',
        fit_clap,
        dict(_CLAP, length=1.0),
        dict(length=(1.0, 10.0)),
        source='as ZS-LP',
    ),
    'lp++': Method(
        'LP++',
        fit_lp_plus_plus,
        dict(iterations=300, momentum=0.9, alpha_every=10),
        source='its code, but with the last step, not the best, and averaged views',
    ),
    'gda': Method(
        'GDA',
        fit_gda,
        dict(alpha=0.01),
        dict(alpha=(1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)),
        source='its code; it has no fixed alpha, 0.01 is ours',
    ),
    'proker': Method(
        'ProKeR',
        fit_proker,
        dict(beta=1.0, lmbda=0.1),
        dict(beta=(0.5, 1.0, 2.0, 4.0), lmbda=(0.01, 0.03, 0.1, 0.3, 1.0)),
        source='its code, with averaged views and a shorter search',
    ),
    'cross_modal': Method(
        'Cross-modal linear probe',
        fit_cross_modal,
        dict(
            optimizer='AdamW',
            lr=1e-3,
            iterations=12800,
            batch_size=8,
            weight_decay=0.01,
        ),
        dict(lr=(1e-3, 1e-4)),
        source='its code: 12,800 batches, half of each is text; without early stopping '
        'and warm-up, with 2 instead of 12 settings searched',
    ),
    'linear_adapter': Method(
        'Regularised linear adapter',
        fit_linear_adapter,
        dict(_PROLIP, lr=1e-4, penalty=None),
        dict(lr=(1e-3, 1e-4)),
        source='code of ProLIP: penalty 1 / shots; there more learning rates and the '
        'penalty are searched',
    ),
    'clip_adapter': Method(
        'CLIP-Adapter',
        fit_clip_adapter,
        _OURS,
        dict(alpha=(0.2, 0.5), **_OURS_GRID),
        source='adapter of the paper, with our recipe for cached features',
    ),
    'clip_adapter_hoso': Method(
        'CLIP-Adapter (HOSO)',
        fit_hoso,
        dict(alpha=0.2, optimizer='AdamW', lr=1e-3, iterations=200),
        source='abstract of its paper; the details and the recipe are ours',
    ),
    'clip_adapter_learnt': Method(
        'CLIP-Adapter, learnt ratio',
        fit_clip_adapter,
        dict(_OURS, learn_ratio=True),
        _OURS_GRID,
        source='adapter of the paper, with a learnt scalar ratio and our recipe',
    ),
    'clip_adapter_text': Method(
        'CLIP-Adapter, text',
        fit_clip_adapter,
        dict(_OURS, visual=False, text=True),
        _OURS_GRID,
        source='text adapter of the paper, with our recipe',
    ),
    'clip_adapter_both': Method(
        'CLIP-Adapter, visual and text',
        fit_clip_adapter,
        dict(_OURS, beta=0.2, text=True),
        dict(beta=(0.2, 0.6), **_OURS_GRID),
        source='both adapters of the paper, with our recipe',
    ),
    'clip_adapter_paper': Method(
        'CLIP-Adapter (paper)',
        fit_clip_adapter,
        dict(_COOP, alpha=0.2, lr=1e-5),
        dict(alpha=(0.2, 0.6)),
        source='text of the paper: recipe of CoOp with learning rate 1e-5; on ImageNet '
        'CoOp has 50 epochs',
    ),
    'clip_adapter_released': Method(
        'CLIP-Adapter (released)',
        fit_clip_adapter,
        dict(_COOP, preset='released', alpha=0.2),
        source='released code, with the commands of CoOp and alpha 0.2; on ImageNet '
        'CoOp has 50 epochs',
    ),
    'clip_adapter_clap': Method(
        'CLIP-Adapter (copy in CLAP)',
        fit_clip_adapter,
        dict(_CLAP, preset='released', alpha=0.2),
        dict(lr=(0.1, 0.01)),
        source="not CLAP, but CLAP's copy of CLIP-Adapter and its grid, which CLAP "
        'searches on the test split',
    ),
    'clip_adapter_lp++': Method(
        'CLIP-Adapter (copy in LP++)',
        fit_clip_adapter,
        dict(
            preset='lp++',
            alpha=0.5,
            optimizer='SGD',
            lr=0.01,
            momentum=0.0,
            epochs=300,
            batch_size=32,
            weight_decay=0.0,
        ),
        source='not LP++, but its copy of CLIP-Adapter; there the learning rate '
        'goes up and down, here it decays once, without one step of warm-up',
    ),
    'clip_adapter_prolip': Method(
        'CLIP-Adapter (copy in ProLIP)',
        fit_clip_adapter,
        dict(_PROLIP, preset='released', alpha=0.2, lr=1e-3),
        dict(alpha=(0.2, 0.6)),
        source='not ProLIP, but its copy of CLIP-Adapter, whose ratio is 1 - alpha',
    ),
    'clip_adapter_cross_modal': Method(
        'CLIP-Adapter (copy in cross-modal adaptation)',
        fit_clip_adapter,
        dict(
            preset='cross_modal',
            alpha=0.2,
            optimizer='AdamW',
            lr=1e-4,
            iterations=12800,
            batch_size=8,
            text_batches=True,
            weight_decay=1e-3,
        ),
        source='not the cross-modal probe, but its second head; without early '
        'stopping, warm-up and search',
    ),
    'tip_adapter': Method(
        'Tip-Adapter',
        fit_tip_adapter,
        _TIP,
        late_grid=_TIP_GRID,
        source='its code, where alpha and beta start at 1 to 5 by data set, the search '
        'has 4,000 values up to 30, and crops keep half of an image or more '
        '(crop_scale=0.5,1.0)',
    ),
    'tip_adapter_f': Method(
        'Tip-Adapter-F',
        fit_tip_adapter_f,
        dict(_TIP, optimizer='AdamW', lr=1e-3, eps=1e-4, epochs=20),
        dict(epochs=(20, 100)),
        _TIP_GRID,
        source='as Tip-Adapter, with cached views instead of fresh crops; it trains '
        '100 epochs on EuroSAT',
    ),
    'task_res': Method(
        'TaskRes',
        fit_task_res,
        dict(
            alpha=0.5,
            optimizer='Adam',
            lr=2e-3,
            epochs='task_res',
            weight_decay=5e-4,
            beta2=0.99,
            warmup_epochs=1,
            decay_by='epoch',
        ),
        dict(lr=(2e-3, 2e-4)),
        source='its code, but from text features of unit norm; there the learning rate '
        'is 2e-4 on ImageNet, and alpha is 1 on Flowers102',
    ),
    'coop': Method(
        'CoOp',
        fit_coop,
        dict(_COOP, n_ctx=16),
        source='its code, with 16 words and the class name at the end; on ImageNet it '
        'always has 50 epochs',
        needs_encoder=True,
    ),
}
"""All methods by name."""


def method_table() -> str:
    """Formats ``METHODS`` as the Markdown table of docs/clip_adapter.md."""
    lines = ['| name | method | searched | settings from |', '|---|---|---|---|']
    for name, method in METHODS.items():
        searched = ', '.join((*method.grid, *method.late_grid)) or '-'
        source = method.source or '-'
        lines.append(f'| `{name}` | {method.title} | {searched} | {source} |')
    return '\n'.join(lines)
