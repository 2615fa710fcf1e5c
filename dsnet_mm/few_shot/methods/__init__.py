"""The few-shot methods, one file each, and the table of their hyper-parameters."""

from .base import FewShotData, Method, num_learnt
from .table import METHODS

__all__ = ['METHODS', 'FewShotData', 'Method', 'num_learnt']
