"""The network of DS-Net, and the call that is timed.

``benchmark.py --against`` also runs this module as a program: a worker that imports
``dsnet_mm`` from another checkout. So it uses only public names of ``dsnet_mm``.
"""

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsnet_mm.models import DSNet, fuse_for_inference

from .turns import time_call

MAX_GLOBAL_TOKENS = 128
"""Of DS-Net and DS-FPN in the tables. Rows "uncapped" are without it."""


def build_ds_net(cap: int | None, backbone_class: type[DSNet] = DSNet) -> DSNet:
    """Builds a DS-Net-S* with random weights from seed 0, which returns four maps.

    Args:
        cap: Its ``max_global_tokens``. Checkouts that do not have it take None.
        backbone_class: Class of the backbone.
    """
    torch.manual_seed(0)
    options = {} if cap is None else dict(max_global_tokens=cap)
    return backbone_class('small', out_indices=(0, 1, 2, 3), **options)


def make_call(
    net: nn.Module, inputs: Tensor | list[Tensor], training: bool, autocast: bool
) -> Callable[[], None]:
    """Returns the call that is timed. It leaves no gradients behind.

    Args:
        net: The network. It returns several maps.
        inputs: Image of shape (N, 3, H, W), or the maps that a neck takes.
        training: Whether the call is a training step: forward, and backward of the
            mean of the outputs. Otherwise it is a forward in inference mode.
        autocast: Whether the training step runs under autocast to bfloat16.
    """
    leaves = [inputs] if isinstance(inputs, Tensor) else inputs

    @torch.inference_mode()
    def infer() -> None:
        net(inputs)

    def train() -> None:
        with torch.autocast(leaves[0].device.type, torch.bfloat16, enabled=autocast):
            outs = net(inputs)
        sum(out.float().mean() for out in outs).backward()
        net.zero_grad(set_to_none=True)
        for leaf in leaves:
            leaf.grad = None

    return train if training else infer


def main() -> None:
    """Builds the network of ``sys.argv[1]``, warms up, and times a call per line.

    It prints the path of its dsnet_mm when it is ready. Then it prints the seconds
    of a call for each line on its standard input.
    """
    import dsnet_mm

    case = json.loads(sys.argv[1])
    device, training = case['device'], case['mode'] == 'training'
    torch.set_num_threads(case['threads'])
    height, width = case['size']
    net = build_ds_net(case['cap']).train(training)
    if case['fused']:
        net = fuse_for_inference(net)
    bfloat16 = case['dtype'] == 'bfloat16'
    dtype = torch.bfloat16 if bfloat16 and not training else torch.float32
    images = torch.randn(case['batch'], 3, height, width).to(device, dtype)
    call = make_call(net.to(device, dtype), images, training, bfloat16)
    call()
    print(dsnet_mm.__file__, flush=True)
    for _ in sys.stdin:
        print(time_call(call, device), flush=True)


if __name__ == '__main__':
    main()
