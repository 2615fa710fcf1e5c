"""An image in, a result out, for detectors and classifiers."""

from .prediction import DetectedObject, Mask, Prediction
from .predictor import Predictor, infer

__all__ = ['DetectedObject', 'Mask', 'Prediction', 'Predictor', 'infer']
