"""Train a detector or a classifier from its configuration."""

import argparse
import errno
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner

from dsnet_mm.checkpoint import check_match, load_checkpoint, restricted_loading
from dsnet_mm.datasets.loading import UnreadableImageError
from dsnet_mm.engine.config import (
    building_data,
    check_classes,
    check_data,
    check_pretrained,
    dicts_in,
    load_config,
)
from dsnet_mm.engine.hooks import NonFiniteLossError
from dsnet_mm.engine.launch import (
    add_config_arguments,
    add_run_arguments,
    add_trust_argument,
    end_run,
    is_first_process,
    set_run,
    unknown_type,
    user_errors,
)
from dsnet_mm.engine.resume import (
    PointerError,
    examine,
    find_checkpoint_to_resume,
    only_training,
    read_training_state,
)
from dsnet_mm.engine.stopping import (
    StopHook,
    TrainingStopped,
    WorkerHook,
    end_workers,
    stop_signals,
)
from dsnet_mm.files import remove_parts
from dsnet_mm.models import DSNet
from dsnet_mm.weights import DamagedCheckpointError

STOPPED_BY_SIGNAL = 143
"""Exit code of a training that a signal stopped, and that goes on by ``--resume``."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

FLAGS = {
    '--amp': 'train in mixed precision (GPU only)',
    '--ema': 'keep and evaluate an average of the weights',
    '--fsdp': 'split weights, gradients and optimizer state over the processes',
    '--no-validate': 'do not evaluate while training',
    '--tensorboard': 'log for TensorBoard too',
    '--auto-scale-lr': 'scale the learning rate with the batch size of all GPUs '
    'together',
    '--skip-unreadable': 'leave out images that cannot be read, and count them '
    '(default: stop)',
}


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    add_run_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from a checkpoint, without a name from the latest in --work-dir',
    )
    for flag, text in FLAGS.items():
        parser.add_argument(flag, action='store_true', help=text)
    parser.add_argument(
        '--wandb', metavar='PROJECT', help='log to this project of Weights & Biases too'
    )
    add_trust_argument(parser)
    args = parser.parse_args(argv)
    with restricted_loading(trust=args.trust_checkpoint), ExitStack() as stack:
        with user_errors(parser):
            cfg = load_config(args.config, args.cfg_options)
            set_config(cfg, args)
            if is_first_process(cfg.launcher):
                stack.enter_context(only_training(cfg.work_dir))
                remove_parts(checkpoint_folder(cfg))
            set_start(cfg, args.resume)
            runner = build_runner(cfg)
            with building_data(cfg, ('train', 'val')):
                _ = runner.train_loop, runner.val_loop
        if args.resume and not cfg.resume:
            runner.logger.info(
                f'{cfg.work_dir} holds nothing to resume from; training starts anew.'
            )
        train(parser, runner)
        if is_main_process():
            skipped = skipped_file(cfg)
            if args.skip_unreadable and skipped.is_file():
                names = skipped.read_text().splitlines()
                print(
                    f'{len(set(names))} images could not be read and were skipped '
                    f'{len(names)} times; {skipped} names them.'
                )
            logs = Path(cfg.work_dir, runner.timestamp)
            print(f'Checkpoints are in {cfg.work_dir}, logs in {logs}.')
        end_run()


def train(parser: argparse.ArgumentParser, runner: Runner | FlexibleRunner) -> None:
    """Trains. What ends it early is told in a sentence, if it is known.

    Args:
        parser: Tells it and exits: with 1, or with 143 after SIGTERM or SIGUSR1.
        runner: The runner.
    """
    runner.register_hook(WorkerHook())
    try:
        with stop_signals() as signals:
            runner.register_hook(StopHook(signals))
            runner.train()
    except TrainingStopped as error:
        if is_main_process():
            print(f'{parser.prog}: training stopped by {error}')
        end_run(STOPPED_BY_SIGNAL)
    except Exception as error:
        if not (sentence := describe(error)):
            raise
        parser.exit(1, f'{parser.prog}: training stopped: {sentence}\n')
    finally:
        end_workers()


def describe(error: Exception) -> str | None:
    """Returns a sentence about what ended a training, None for what is not known."""
    text = str(error).strip()
    if isinstance(error, NonFiniteLossError | UnreadableImageError):
        # A worker of the data loader adds its traceback above the sentence.
        return text.splitlines()[-1].rpartition(f'{type(error).__name__}: ')[2]
    if isinstance(error, RuntimeError) and text.startswith('DataLoader'):
        return (
            f'{text.rstrip(".")}; a worker ends when memory is short, for which fewer '
            f'of them help (train_dataloader.num_workers), and it is given up after '
            f'train_dataloader.timeout seconds; go on by --resume'
        )
    if isinstance(error, torch.distributed.DistError) or '/gloo/' in text:
        return (
            f'another process ended, or hangs for env_cfg.dist_cfg.timeout seconds '
            f'({text.splitlines()[-1]}); go on by --resume'
        )
    if isinstance(error, OSError) and error.errno in FULL:
        file = error.filename or 'a file of the working directory'
        return f'{error.strerror}: {file} cannot be written; make room, then --resume'
    return unknown_type(error) if isinstance(error, KeyError) else None


def set_config(cfg: Config, args: argparse.Namespace) -> None:
    """Changes a configuration as the arguments say, and checks its files.

    Args:
        cfg: Configuration, changed in place.
        args: The parsed arguments.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If something that is asked for is not possible.
    """
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        set_amp(cfg)
    if args.ema:
        set_ema(cfg)
    if args.fsdp:
        set_fsdp(cfg, args.launcher)
    if args.auto_scale_lr:
        set_auto_scale_lr(cfg)
    check_data(cfg, ('train', 'val'))
    check_classes(cfg, ('train', 'val'))
    check_pretrained(cfg)
    set_run(cfg, args)
    set_loggers(cfg, args.tensorboard, args.wandb)
    set_hooks(cfg, args.skip_unreadable)


def build_runner(cfg: Config) -> Runner | FlexibleRunner:
    """Builds the runner, and checks that the checkpoints it starts from fit."""
    runner = RUNNERS.build(cfg)  # of the type runner_type
    if isinstance(runner, FlexibleRunner):  # builds the model when it trains
        runner.model = runner.strategy.build_model(runner.model)
    for module in runner.model.modules():
        if isinstance(module, DSNet):
            module.check_checkpoint()
    if cfg.resume:
        load_checkpoint(runner.model, cfg.load_from)
    elif cfg.get('load_from'):
        check_match(runner.model, cfg.load_from)
    return runner


# Each of the following changes a configuration in place, and raises ValueError or
# FileNotFoundError if what is asked for is not possible.


def set_amp(cfg: Config) -> None:
    """Switches to mixed precision."""
    device = get_device()
    if device in ('cpu', 'mps'):
        raise ValueError(
            f'--amp needs a GPU, and this machine trains on {device}, where MMEngine '
            f'has no mixed precision; leave --amp out'
        )
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def set_ema(cfg: Config) -> None:
    """Keeps an exponential average of the weights, and evaluates that."""
    if has_hook(cfg, 'EMAHook'):
        raise ValueError(
            '--ema adds an EMAHook and the configuration has one; leave --ema out'
        )
    add_hook(cfg, type='EMAHook', momentum=2e-4, update_buffers=True)


def set_fsdp(cfg: Config, launcher: str) -> None:
    """Splits weights, gradients and optimizer state over the processes."""
    if launcher == 'none':
        raise ValueError(
            '--fsdp splits the model over the processes of a distributed run; start '
            'them by tools/dist_train.sh or torchrun, with --launcher pytorch'
        )
    if has_hook(cfg, 'EMAHook'):
        raise ValueError(
            '--fsdp leaves each process a part of the weights, and an EMAHook averages '
            'whole ones; leave the hook out, as by --cfg-options custom_hooks=[]'
        )
    cfg.runner_type = 'FlexibleRunner'
    cfg.strategy = dict(type='dsnet_mm.FSDPStrategy')


def set_auto_scale_lr(cfg: Config) -> None:
    """Scales the learning rate with the total batch size."""
    if not cfg.get('auto_scale_lr', {}).get('base_batch_size'):
        raise ValueError(
            '--auto-scale-lr needs the batch size for which the learning rate was '
            'chosen, and the configuration has none; add --cfg-options '
            'auto_scale_lr.base_batch_size=N'
        )
    cfg.auto_scale_lr.enable = True


def set_start(cfg: Config, resume: str | None) -> None:
    """Sets where training starts: anew, from weights, or from a checkpoint.

    A resumed training takes the seed of its checkpoint.

    Args:
        cfg: Configuration.
        resume: Checkpoint to resume from, ``'auto'`` for the latest of the
            working directory (if there is none, training starts anew), or None
            for what the configuration says.

    Raises:
        ValueError: If the working directory has checkpoints and nothing is resumed, or
            if the checkpoint does not fit.
    """
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    folder = checkpoint_folder(cfg)
    if resume is None:
        found, wrong = examine(cfg.work_dir, folder)
        lost = DamagedCheckpointError, PointerError
        if found or not all(isinstance(error, lost) for error in wrong.values()):
            raise ValueError(
                f'{folder} holds checkpoints of an earlier training; go on with it by '
                f'--resume, or choose another --work-dir'
            )
    if resume in (None, 'auto'):
        first = is_first_process(cfg.launcher)
        resume = find_checkpoint_to_resume(cfg.work_dir, folder, set_aside=first)
    cfg.resume = resume is not None
    if not cfg.resume:
        return
    cfg.load_from = resume
    checkpoint = read_training_state(resume)
    # With FSDP the optimizer has parameters by name.
    groups = checkpoint['optimizer'].get('param_groups', [])
    by_name = any(isinstance(p, str) for group in groups for p in group['params'])
    if by_name != ('FSDP' in str(cfg.get('strategy'))):
        raise ValueError(
            f'{resume} comes from a training {"with" if by_name else "without"} '
            f'--fsdp, and goes on only so; start from its weights in another '
            f'--work-dir by --cfg-options load_from={resume}'
        )
    cfg.merge_from_dict({'randomness.seed': checkpoint['meta'].get('seed')})


def set_loggers(cfg: Config, tensorboard: bool, wandb: str | None) -> None:
    """Writes losses, learning rates and metrics for TensorBoard and W&B too.

    Args:
        cfg: Configuration with its working directory.
        tensorboard: Whether to write files of TensorBoard, beside the log.
        wandb: Project of Weights & Biases, None for no run there.
    """
    backends = {}
    if tensorboard:
        backends['tensorboard'] = dict(type='TensorboardVisBackend')
    if wandb is not None:
        init = dict(project=wandb, name=Path(cfg.work_dir).name)
        backends['wandb'] = dict(type='WandbVisBackend', init_kwargs=init)
    for package, backend in backends.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:  # a folder of that name has no origin
            raise ValueError(
                f'--{package} takes the package {package}, which is not installed; '
                f'install it by pip install {package}'
            )
        local = dict(type='LocalVisBackend')  # as in a Runner without a visualizer
        cfg.setdefault('visualizer', dict(type='Visualizer', vis_backends=[local]))
        cfg.visualizer.vis_backends = [*cfg.visualizer.vis_backends, backend]


def set_hooks(cfg: Config, skip_unreadable: bool) -> None:
    """Adds what every training of this tool has.

    Random numbers do not depend on where it was interrupted. It stops at a loss that is
    no number and at an image that cannot be read. Its checkpoints are written whole or
    not at all.

    Args:
        cfg: Configuration with its working directory.
        skip_unreadable: Whether to leave out such images instead.
    """
    if not has_hook(cfg, 'IterationSeedHook'):
        add_hook(cfg, type='dsnet_mm.IterationSeedHook')
    own = dict(
        finite_loss=dict(type='dsnet_mm.FiniteLossHook'),
        checkpoint=dict(type='CheckpointHook', interval=1),
    )
    cfg.default_hooks = own | (cfg.get('default_hooks') or {})
    for node in dicts_in([cfg.default_hooks, cfg.get('custom_hooks')]):
        if is_type(node, 'CheckpointHook'):
            node['type'] = 'dsnet_mm.CheckpointHook'
    for node in dicts_in(cfg.train_dataloader):
        if is_type(node, 'LoadImageFromFile'):
            node['type'] = 'dsnet_mm.LoadImageFromFile'
            if skip_unreadable:
                node['skipped'] = str(skipped_file(cfg))


def is_type(node: dict, name: str) -> bool:
    """Tells whether a part of a configuration builds a type of that name."""
    return str(node.get('type')).rpartition('.')[2].rstrip("'>") == name


def checkpoint_folder(cfg: Config) -> Path:
    """Returns the folder of the checkpoints, which the hook may have elsewhere."""
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if not hook.get('out_dir'):
        return Path(cfg.work_dir)
    return Path(hook['out_dir'], Path(cfg.work_dir).resolve().name)


def skipped_file(cfg: Config) -> Path:
    """Returns the file that names the images that were skipped."""
    return Path(cfg.work_dir, 'unreadable.txt')


def has_hook(cfg: Config, name: str) -> bool:
    """Tells whether a configuration has a hook among its ``custom_hooks``."""
    return any(name in str(hook['type']) for hook in cfg.get('custom_hooks') or [])


def add_hook(cfg: Config, **hook) -> None:
    """Adds a hook to ``custom_hooks``."""
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]


if __name__ == '__main__':
    main()
