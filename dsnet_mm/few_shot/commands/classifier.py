"""Arguments of the commands that read a classifier file."""

import argparse

from dsnet_mm.few_shot.config import existing_device
from dsnet_mm.few_shot.deployment import DeployedClassifier, load_classifier


def add_classifier_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the file and the encoder."""
    parser.add_argument('classifier', help='classifier file that run or export wrote')
    add_encoder_arguments(parser)
    parser.add_argument('--model', help='model of open_clip, if the file names none')
    parser.add_argument('--device', default='auto', help='device of the encoder')


def add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where the weights of the encoder are."""
    parser.add_argument('--pretrained', help='file of its weights on this machine')
    parser.add_argument(
        '--download', action='store_true', help='fetch weights that are not here'
    )


def read_classifier_arguments(args: argparse.Namespace) -> DeployedClassifier:
    """Loads the classifier."""
    return load_classifier(
        args.classifier,
        model=args.model,
        pretrained=args.pretrained,
        download=args.download,
        device=existing_device(args.device),
    )
