"""``tools/few_shot.py export``: a classifier for other programs."""

import argparse

from dsnet_mm.few_shot.deployment import load_classifier, read_classifier
from dsnet_mm.few_shot.export import (
    check_new,
    convert_checkpoint,
    export_matrix,
    export_onnx,
    export_open_clip,
)

from .classifier import add_encoder_arguments

FORMATS = {
    'onnx': 'image tower and classifier as one network, compared in onnxruntime',
    'matrix': 'weight and bias of a linear classifier',
    'open_clip': "open_clip's weights with a linear adapter in the image projection",
    'classifier': 'classifier file from a checkpoint of MMEngine, needs --config',
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        'export',
        help='write a classifier for other programs',
        description=' '.join(f'{name}: {what}.' for name, what in FORMATS.items()),
    )
    parser.add_argument('source', help='classifier file, or checkpoint of MMEngine')
    parser.add_argument('out', help='file to write')
    parser.add_argument('--format', choices=FORMATS, default='onnx')
    parser.add_argument('--config', help='configuration of the checkpoint')
    parser.add_argument('--model', help='model of open_clip, if the file names none')
    add_encoder_arguments(parser)
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Runs the command."""
    check_new(args.out)
    if args.format == 'classifier':
        if args.config is None:
            raise ValueError(
                'a checkpoint needs the configuration that it was trained with; name '
                'it with --config.'
            )
        convert_checkpoint(
            *(args.source, args.config, args.out), args.pretrained, args.download
        )
    elif args.format == 'matrix':
        classifier, about = read_classifier(args.source)
        export_matrix(classifier, tuple(about['class_names']), args.out)
    else:
        deployed = load_classifier(
            args.source,
            model=args.model,
            pretrained=args.pretrained,
            download=args.download,
        )
        if args.format == 'onnx':
            gap = export_onnx(deployed, args.out)
            print(
                f'in onnxruntime probabilities differ from PyTorch by {gap:.1e} at most'
            )
        else:
            export_open_clip(deployed, args.out)
    print(f'{args.out} is written.')
