"""SS-Text, a closed form for unequal classes (arXiv 2506.06076 and 2506.17500)."""

import torch
import torch.nn.functional as F

from .base import FewShotData, mean_features, register_method
from .zero_shot import CosineClassifier


@register_method(
    'ss_text',
    CosineClassifier,
    'SS-Text',
    source='its code (SS-Text+), without the last step',
)
def fit_ss_text(data: FewShotData) -> CosineClassifier:
    """Blends image and text features of each class, by its number of images.

    ::

        w_k = t_k + logit_scale / (N lambda_k) sum_{i of class k} f_i
        lambda_k = max(1 / n_k, 0.001)

    N is the number of images, and n_k that of class k. f and t have unit norm. A class
    without images keeps its text feature. Views are averaged.

    Source: ``solvers/sstext.py`` of github.com/jusiro/SS-Text. It then subtracts
    2 w_k - mean w, scaled to length 1 (``repel``). With features of length 10 this
    changes little, but with unit norm and many classes it turns w_k around.
    """
    f, labels, text = mean_features(data.train), data.train.labels, data.text_features
    counts = labels.bincount(minlength=len(text)).to(text)[:, None]
    total = torch.zeros_like(text).index_add(0, labels, f)
    w = text + data.logit_scale / len(f) * counts.clamp(max=1000) * total
    return CosineClassifier(F.normalize(w, dim=-1), data.logit_scale)
