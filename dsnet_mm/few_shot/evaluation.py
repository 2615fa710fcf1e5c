"""Accuracy, calibration and loss of a classifier."""

import base64
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsnet_mm.datasets.features import Features


@dataclass(frozen=True)
class Score:
    """Top-1 accuracy and expected calibration error in percent, mean cross-entropy.

    ``correct`` has a bit for each image, 1 if it is right, in base64 (:func:`unpack`).
    """

    accuracy: float
    ece: float
    loss: float
    correct: str = ''


def unpack(correct: str, count: int) -> np.ndarray:
    """Returns 1 for each of N = ``count`` images that is right, else 0 (N,), int8."""
    packed = np.frombuffer(base64.b64decode(correct), np.uint8)
    return np.unpackbits(packed, count=count).astype(np.int8)


@torch.no_grad()
def evaluate(
    classifier: Callable[[Tensor], Tensor], data: Features, chunk: int = 1024
) -> Score:
    """Scores a classifier on the first view of labelled features.

    Args:
        classifier: Features (N, D) to logits (N, K).
        data: The features.
        chunk: Number of images evaluated at once. It bounds the memory.
    """
    confidence, correct, loss = [], [], 0.0
    for f, labels in zip(
        data.features[0].split(chunk), data.labels.split(chunk), strict=True
    ):
        logits = classifier(f).float()
        loss += F.cross_entropy(logits, labels, reduction='sum').item()
        top = logits.softmax(-1).max(-1)
        confidence.append(top.values)
        correct.append(top.indices == labels)
    confidence, correct = torch.cat(confidence), torch.cat(correct).float()
    ece = calibration_error(confidence, correct)
    packed = base64.b64encode(np.packbits(correct.bool().numpy()).tobytes()).decode()
    return Score(100 * correct.mean().item(), 100 * ece, loss / len(data), packed)


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Computes the expected calibration error, 0 to 1, over bins of equal width.

    Args:
        confidence: Probability of the predicted class (N,).
        correct: 1 if the prediction is right, else 0, (N,).
        bins: Number of bins.
    """
    index = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins).index_add(0, index, confidence - correct)
    return gap.abs().sum().item() / len(confidence)
