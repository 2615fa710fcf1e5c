"""Few-shot classification: run methods, then use, test or export a classifier.

``run`` takes a configuration file, or just a data set and a model, or a file of
features::

    python tools/few_shot.py run configs/clip_adapter/clip-adapter_rn50_eurosat.py
    python tools/few_shot.py run --dataset my_images --model RN50-quickgelu \
        --pretrained openai --download --shots 1 4 16
    torchrun --nproc-per-node 4 tools/few_shot.py encode --dataset my_images \
        --model RN50-quickgelu --pretrained openai --out features.safetensors
    python tools/few_shot.py run --features features.safetensors
    python tools/few_shot.py predict work_dirs/RUN/classifiers/FILE.safetensors holiday/
    python tools/few_shot.py test work_dirs/RUN/classifiers/FILE.safetensors imagenet_a
    python tools/few_shot.py export work_dirs/RUN/classifiers/FILE.safetensors it.onnx
    python tools/few_shot.py doctor eurosat
"""

import argparse
import logging
import sys

from dsnet_mm.few_shot.commands import doctor, encode, export, predict, run, test


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Few-shot classification with CLIP.')
    commands = parser.add_subparsers(dest='command', required=True)
    for command in (run, encode, predict, test, export, doctor):
        command.add_parser(commands)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    logging.basicConfig(format='%(message)s')
    try:
        args.call(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
