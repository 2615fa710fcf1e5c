"""Few-shot classification: run methods, test a classifier, look over a data set.

``run`` takes a configuration file, or just a data set and a model, or a file of
features::

    python tools/few_shot.py run configs/clip_adapter/clip-adapter_rn50_eurosat.py
    python tools/few_shot.py run --dataset my_pictures --model RN50-quickgelu \
        --pretrained openai --shots 1 4 16
    torchrun --nproc-per-node 4 tools/few_shot.py encode --dataset my_pictures \
        --model RN50-quickgelu --pretrained openai --out features.safetensors
    python tools/few_shot.py run --features features.safetensors
    python tools/few_shot.py test work_dirs/RUN/classifiers/FILE.safetensors imagenet_a
    python tools/few_shot.py doctor eurosat
"""

import argparse
import sys

from dsnet_mm.few_shot import transfer
from dsnet_mm.few_shot.commands import doctor, encode, run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Few-shot classification with CLIP.')
    commands = parser.add_subparsers(dest='command', required=True)
    for command in (run, encode, doctor):
        command.add_parser(commands)
    tests = commands.add_parser('test', help='test a classifier on another data set')
    tests.add_argument('classifier', help='safetensors file that run wrote')
    tests.add_argument('dataset', help='name, folder or CSV file')
    tests.add_argument('--data-root', default='data')
    tests.set_defaults(call=test)
    return parser.parse_args()


def test(args: argparse.Namespace) -> None:
    score = transfer(args.classifier, args.dataset, args.data_root)
    print(f'accuracy {score.accuracy:.2f} %, ECE {score.ece:.2f} %')


def main() -> None:
    args = parse_args()
    try:
        args.call(args)
    except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
