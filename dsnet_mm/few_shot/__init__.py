"""Few-shot classification with CLIP: methods, protocol and report."""

from dsnet_mm.datasets.features import FeatureCache

from .config import FewShotConfig
from .deployment import load_classifier, save_classifier
from .methods import METHODS, register_classifier, register_method
from .runner import run
from .transfer import transfer

__all__ = [
    'METHODS',
    'FeatureCache',
    'FewShotConfig',
    'load_classifier',
    'register_classifier',
    'register_method',
    'run',
    'save_classifier',
    'transfer',
]
