"""Evaluate a checkpoint of a detector or a classifier."""

import argparse
import json
import os
from copy import deepcopy
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.registry import METRICS
from mmengine.runner import Runner

from dsnet_mm.checkpoint import load_checkpoint, restricted_loading, unwrap
from dsnet_mm.engine.config import (
    building_data,
    check_classes,
    check_data,
    load_config,
)
from dsnet_mm.engine.launch import (
    add_config_arguments,
    add_run_arguments,
    add_trust_argument,
    end_run,
    set_run,
    user_errors,
)
from dsnet_mm.engine.stopping import WorkerHook
from dsnet_mm.files import check_file, write_atomic
from dsnet_mm.models import fuse_for_inference


def set_show_dir(cfg: Config, folder: str) -> None:
    """Lets the visualisation hook of mmdet or mmpretrain write every image.

    Args:
        cfg: Configuration, changed in place.
        folder: Folder of the images.
    """
    if cfg.default_scope == 'mmdet':
        # Made absolute: the hook puts a relative one somewhere in the work dir.
        hook = dict(
            type='DetVisualizationHook', draw=True, test_out_dir=os.path.abspath(folder)
        )
    else:
        hook = dict(type='VisualizationHook', enable=True, interval=1, out_dir=folder)
    cfg.merge_from_dict(dict(default_hooks=dict(visualization=hook)))


def set_tta(cfg: Config) -> None:
    """Averages predictions over flips, or as the configuration says.

    Args:
        cfg: Configuration, changed in place. Its ``tta_model`` and
            ``tta_pipeline`` are used where it has them.
    """
    dataset = cfg.test_dataloader.dataset
    pipeline = deepcopy(dataset.pipeline)
    pack = pipeline.pop()
    if cfg.default_scope == 'mmdet':
        pack.pop('meta_keys', None)  # the default ones tell of the flip
        tta = dict(
            type='DetTTAModel',
            tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
        )
    else:
        tta = dict(type='AverageClsScoreTTA')
    flips = [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)]
    pipeline.append(dict(type='TestTimeAug', transforms=[flips, [pack]]))
    dataset.pipeline = cfg.get('tta_pipeline', pipeline)
    cfg.model = dict(**cfg.get('tta_model', tta), module=cfg.model)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    add_run_arguments(parser)
    parser.add_argument('--out', help='write all predictions to this new .pkl file')
    parser.add_argument('--show-dir', help='draw all predictions into this folder')
    parser.add_argument(
        '--tta', action='store_true', help='average over flipped images'
    )
    parser.add_argument(
        '--fuse',
        action='store_true',
        help='fold batch norms into the layers beside them (fuse_for_inference)',
    )
    add_trust_argument(parser)
    args = parser.parse_args(argv)
    with restricted_loading(trust=args.trust_checkpoint):
        test(parser, args)


def test(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Evaluates.

    Args:
        parser: Reports errors of the user.
        args: The parsed arguments.
    """
    with user_errors(parser):
        if args.out and not args.out.endswith(('.pkl', '.pickle')):
            raise ValueError(f'--out takes the name of a .pkl file, got {args.out}')
        if args.out and os.path.exists(args.out):
            raise ValueError(f'{args.out} exists and is left alone; choose another')
        cfg = load_config(args.config, args.cfg_options)
        if args.tta and args.show_dir and cfg.default_scope == 'mmpretrain':
            raise ValueError(
                '--show-dir does not draw the flipped images that --tta gives a '
                'classifier; leave one of them out'
            )
        check_file(
            args.checkpoint,
            'checkpoint',
            'training writes them as .pth files, and weights/ holds .safetensors files',
        )
        check_data(cfg, ['test'])
        check_classes(cfg, ['test'])
        set_run(cfg, args)
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.show_dir:
        set_show_dir(cfg, args.show_dir)
    if args.tta:
        set_tta(cfg)

    with user_errors(parser):
        runner = Runner.from_cfg(cfg)
        runner.register_hook(WorkerHook())
        if args.fuse:
            fuse_for_inference(deepcopy(unwrap(runner.model)))  # tells if it cannot
            runner.register_hook(dict(type='dsnet_mm.FuseHook'))
        # MMEngine loads it again, for its hooks, and would only warn of a misfit.
        load_checkpoint(runner.model, args.checkpoint)
        with building_data(cfg, ['test']):
            _ = runner.test_loop
        if args.tta and getattr(unwrap(runner.model), 'with_mask', False):
            raise ValueError(
                '--tta merges boxes only, and this model predicts masks too; leave '
                '--tta out'
            )
    if args.out:
        mmdet = cfg.default_scope == 'mmdet'
        dump = 'mmdet.DumpDetResults' if mmdet else 'mmengine.DumpResults'
        runner.test_evaluator.metrics.append(
            METRICS.build(dict(type=dump, out_file_path=args.out))
        )
    metrics = runner.test()
    if is_main_process():
        path = Path(cfg.work_dir, runner.timestamp, 'metrics.json')
        text = json.dumps(metrics, indent=2, default=lambda value: value.tolist())
        write_atomic(path, text + '\n')
        print(f'Metrics are in {path}.')
    end_run()


if __name__ == '__main__':
    main()
