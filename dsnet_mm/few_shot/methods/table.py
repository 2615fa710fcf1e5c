"""All methods with the hyper-parameters of their papers or repositories."""

from .base import Method
from .clip_adapter import fit_clip_adapter
from .coop import fit_coop
from .linear_probe import fit_linear_probe, fit_linear_probe_zs
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
_FAST = dict(optimizer='AdamW', lr=1e-3, epochs=100, batch_size=256)
_ALPHAS = (0.2, 0.4, 0.6, 0.8)
_FAST_GRID = dict(lr=(1e-3, 1e-4), epochs=(50, 200))
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
        'Linear probe from zero-shot',
        fit_linear_probe_zs,
        dict(optimizer='SGD', lr=0.1, epochs=300, weight_decay=0.0),
        dict(lr=(0.1, 0.01, 0.001)),
        source='ZS-LP of CLAP',
    ),
    'clip_adapter': Method(
        'CLIP-Adapter',
        fit_clip_adapter,
        dict(alpha=0.2, **_FAST),
        dict(alpha=_ALPHAS, **_FAST_GRID),
        source='adapter of the paper, with our recipe for cached features',
    ),
    'clip_adapter_learnt': Method(
        'CLIP-Adapter, learnt ratio',
        fit_clip_adapter,
        dict(alpha=0.5, learn_ratio=True, **_FAST),
        _FAST_GRID,
        source='adapter of the paper, with a learnt scalar ratio',
    ),
    'clip_adapter_text': Method(
        'CLIP-Adapter, text',
        fit_clip_adapter,
        dict(alpha=0.2, visual=False, text=True, **_FAST),
        dict(alpha=_ALPHAS, **_FAST_GRID),
        source='text adapter of the paper, with our recipe',
    ),
    'clip_adapter_both': Method(
        'CLIP-Adapter, visual and text',
        fit_clip_adapter,
        dict(alpha=0.2, text=True, **_FAST),
        dict(alpha=_ALPHAS, **_FAST_GRID),
        source='both adapters of the paper, with our recipe',
    ),
    'clip_adapter_paper': Method(
        'CLIP-Adapter (paper)',
        fit_clip_adapter,
        dict(_COOP, alpha=0.2, lr=1e-5),
        dict(alpha=_ALPHAS),
        source='text of the paper: recipe of CoOp with learning rate 1e-5',
    ),
    'clip_adapter_released': Method(
        'CLIP-Adapter (released)',
        fit_clip_adapter,
        dict(_COOP, preset='released', alpha=0.2),
        source='released code, with the commands of CoOp and alpha 0.2',
    ),
    'clip_adapter_clap': Method(
        'CLIP-Adapter (CLAP)',
        fit_clip_adapter,
        dict(
            preset='released',
            alpha=0.2,
            optimizer='SGD',
            lr=0.1,
            epochs=300,
            weight_decay=0.0,
        ),
        dict(lr=(0.1, 0.01, 0.001), alpha=_ALPHAS),
        source="CLAP's code and grid; CLAP searches it on the test split",
    ),
    'clip_adapter_lp++': Method(
        'CLIP-Adapter (LP++)',
        fit_clip_adapter,
        dict(
            preset='lp++',
            alpha=0.5,
            optimizer='SGD',
            lr=0.01,
            epochs=300,
            batch_size=32,
            weight_decay=0.0,
        ),
        dict(alpha=_ALPHAS),
        source="LP++'s code, with one decay of the learning rate",
    ),
    'clip_adapter_prolip': Method(
        'CLIP-Adapter (ProLIP)',
        fit_clip_adapter,
        dict(
            preset='released',
            alpha=0.2,
            optimizer='Adam',
            lr=1e-3,
            eps=1e-4,
            epochs=300,
            batch_size=None,
            weight_decay=0.0,
        ),
        dict(alpha=_ALPHAS, lr=(1e-2, 1e-3, 1e-4, 1e-5)),
        source="ProLIP's code, whose ratio is 1 - alpha and whose lr varies",
    ),
    'clip_adapter_cross_modal': Method(
        'CLIP-Adapter (cross-modal)',
        fit_clip_adapter,
        dict(
            preset='cross_modal',
            alpha=0.2,
            optimizer='AdamW',
            lr=1e-4,
            epochs=200,
            batch_size=8,
            weight_decay=1e-3,
        ),
        dict(lr=(1e-4, 1e-5), weight_decay=(0.0, 1e-3)),
        source='code of cross-modal adaptation, on pictures only, shortened',
    ),
    'tip_adapter': Method(
        'Tip-Adapter',
        fit_tip_adapter,
        _TIP,
        late_grid=_TIP_GRID,
        source='code of the paper',
    ),
    'tip_adapter_f': Method(
        'Tip-Adapter-F',
        fit_tip_adapter_f,
        dict(_TIP, optimizer='AdamW', lr=1e-3, eps=1e-4, epochs=20),
        dict(epochs=(20, 100)),
        _TIP_GRID,
        source='code of the paper, which trains 100 epochs on EuroSAT',
    ),
    'task_res': Method(
        'TaskRes',
        fit_task_res,
        dict(alpha=0.5, optimizer='Adam', lr=2e-3, epochs=200, weight_decay=0.0),
        dict(alpha=(0.5, 1.0), lr=(2e-3, 2e-4), epochs=(100, 200)),
        source='the paper, with 100 epochs for 1 to 4 shots and alpha 1 on Flowers',
    ),
    'coop': Method(
        'CoOp',
        fit_coop,
        dict(_COOP, n_ctx=16),
        source='code of the paper, with 16 words and the class name at the end',
        needs_encoder=True,
    ),
}
"""All methods by name."""
