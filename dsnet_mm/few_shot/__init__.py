"""Few-shot classification with CLIP: methods, protocol and report."""

from .classifiers import load_classifier, save_classifier
from .features import FeatureCache
from .methods import METHODS
from .runner import FewShotConfig, run, transfer

__all__ = [
    'METHODS',
    'FeatureCache',
    'FewShotConfig',
    'load_classifier',
    'run',
    'save_classifier',
    'transfer',
]
