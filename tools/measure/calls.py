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


class Classifier(nn.Module):
    """A backbone, average pooling of its last map and a linear layer."""

    def __init__(self, backbone: DSNet) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dims[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[-1].mean((2, 3)))


def build_ds_net(
    classifies: bool, attn_drop_rate: float, backbone_class: type[DSNet] = DSNet
) -> nn.Module:
    """Builds a DS-Net-S* with random weights from seed 0.

    Args:
        classifies: Whether to build a classifier, otherwise a backbone that returns
            the maps of all stages.
        attn_drop_rate: Dropout of the attention weights.
        backbone_class: Class of the backbone.
    """
    torch.manual_seed(0)
    stages = (3,) if classifies else (0, 1, 2, 3)
    net = backbone_class('small', attn_drop_rate=attn_drop_rate, out_indices=stages)
    return Classifier(net) if classifies else net


def make_call(
    net: nn.Module, images: Tensor, training: bool, autocast: bool = False
) -> Callable[[], None]:
    """Returns the call that is timed. It leaves no gradients behind.

    Args:
        net: The network.
        images: Input of shape (N, 3, H, W).
        training: Whether the call is a training step: forward, and backward of the
            mean of the outputs. Otherwise it is a forward in inference mode.
        autocast: Whether the training step runs under autocast to bfloat16.
    """

    @torch.inference_mode()
    def infer() -> None:
        net(images)

    def train() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            outs = net(images)
        outs = [outs] if isinstance(outs, Tensor) else outs
        sum(out.float().mean() for out in outs).backward()
        net.zero_grad(set_to_none=True)

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
    net = build_ds_net(height == width, case['attn_drop_rate']).train(training)
    if case['fused']:
        net = fuse_for_inference(net)
    bfloat16 = case['dtype'] == 'bfloat16'
    dtype = torch.bfloat16 if bfloat16 and not training else torch.float32
    images = torch.randn(case['batch'], 3, height, width).to(device, dtype)
    call = make_call(net.to(device, dtype), images, training, autocast=bfloat16)
    call()
    print(dsnet_mm.__file__, flush=True)
    for _ in sys.stdin:
        print(time_call(call, device), flush=True)


if __name__ == '__main__':
    main()
