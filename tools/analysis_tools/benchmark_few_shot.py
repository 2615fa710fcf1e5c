"""Time few-shot training and evaluation on a problem of ImageNet's size.

The features are random: 16,000 of width 1,024 in 1,000 classes, and 50,000 to test.
The released code of CLIP-Adapter runs both towers at every step. A part of such a step
is timed and scaled.
"""

import argparse
import resource
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from dsnet_mm.datasets.features import Features
from dsnet_mm.few_shot.evaluation import evaluate
from dsnet_mm.few_shot.methods import METHODS, FewShotData
from dsnet_mm.models import OpenCLIPEncoder

CLASSES, SHOTS, WIDTH, TESTS, BATCH = 1000, 16, 1024, 50_000, 256


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Measure a call.

    Returns:
        Wall-clock seconds, and CPU seconds of all threads. CPU seconds divided by the
        number of threads estimate the wall-clock seconds of an idle machine.
    """
    started, worked = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - started, time.process_time() - worked


def columns(seconds: tuple[float, float]) -> tuple[str, str]:
    return f'{seconds[0]:.1f}', f'{seconds[1]:.1f}'


def peak() -> int:
    """Return the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def released_step(images: int, texts: int) -> tuple[float, float]:
    """Estimate the time of a step of the released code with RN50.

    Args:
        images: Number of images that are timed. Scaled to a batch.
        texts: Number of prompts that are timed. Scaled to the number of classes.

    Returns:
        Wall-clock seconds and CPU seconds.
    """
    encoder = OpenCLIPEncoder('RN50-quickgelu')
    batch = torch.randn(images, 3, 224, 224)
    tokens = encoder.tokenizer(['a photo of a thing.'] * texts)
    with torch.no_grad():
        encoder(batch[:2]), encoder.encode_text(tokens[:2])
        for_images = timed(lambda: encoder(batch))
        for_texts = timed(lambda: encoder.encode_text(tokens))
    return tuple(
        a * BATCH / images + b * CLASSES / texts
        for a, b in zip(for_images, for_texts, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=32, help='of the released step')
    parser.add_argument('--texts', type=int, default=50, help='of the released step')
    args = parser.parse_args()

    torch.manual_seed(0)
    text = F.normalize(torch.randn(CLASSES, WIDTH), dim=-1)
    labels = torch.arange(CLASSES).repeat_interleave(SHOTS)
    features = text[labels] + 0.05 * torch.randn(len(labels), WIDTH)
    data = FewShotData(
        Features(features[None], labels),
        SHOTS,
        text,
        100.0,
        tuple(map(str, range(CLASSES))),
    )
    labels = torch.randint(CLASSES, (TESTS,))
    test = Features((text[labels] + 0.05 * torch.randn(TESTS, WIDTH))[None], labels)

    threads = torch.get_num_threads()
    table = Table('what', 'seconds', 'CPU seconds', title=f'{threads} threads')
    seconds = timed(lambda: evaluate(METHODS['zero_shot'].fit(data), test))
    table.add_row(f'zero-shot on {TESTS:,} features', *columns(seconds))
    classifier = METHODS['tip_adapter'].fit(data)
    seconds = timed(lambda: evaluate(classifier, test))
    table.add_row(f'Tip-Adapter on {TESTS:,} features', *columns(seconds))
    table.add_row('most memory of the process so far, MiB', str(peak()))

    method = METHODS['clip_adapter']
    steps = method.defaults['iterations']
    training = timed(lambda: method.fit(data, batch_size=BATCH))
    table.add_row(f'clip_adapter, {steps} steps of batch {BATCH}', *columns(training))
    released = [steps * seconds for seconds in released_step(args.images, args.texts)]
    table.add_row('the same by the released procedure, scaled', *columns(released))
    ratios = [f'{a / b:,.0f}' for a, b in zip(released, training, strict=True)]
    table.add_row('ratio', *ratios)
    Console().print(table)


if __name__ == '__main__':
    main()
