"""TransCLIP (arXiv 2406.01837), which sees the unlabelled test images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FewShotData, mean_features, register_classifier, register_method


@register_classifier('features', 'log_probabilities')
class SeenImages(nn.Module):
    """Images that a transductive method has seen, and their probabilities.

    An image gets the probabilities of the most similar seen one, as the code of
    TransCLIP classifies validation images. A seen image gets its own.

    Args:
        features: Features of the seen images (N, D), rows of unit norm.
        log_probabilities: Logarithms of their probabilities (N, K).
    """

    def __init__(self, features: Tensor, log_probabilities: Tensor) -> None:
        super().__init__()
        self.register_buffer('features', features)
        self.register_buffer('log_probabilities', log_probabilities)

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        similar = F.normalize(image_features, dim=-1) @ self.features.t()
        return self.log_probabilities[similar.argmax(-1)]


@register_method(
    'transclip_zs',
    SeenImages,
    'TransCLIP, zero-shot (sees unlabelled test images)',
    transductive=True,
    source='its code; it uses no label, and is the same for all shots',
)
def fit_transclip_zs(data: FewShotData) -> SeenImages:
    """Fits TransCLIP without shots, see :func:`_solve`."""
    nothing = data.text_features[:0]
    return _solve(data, nothing, nothing.new_zeros(0).long(), 0.0, text_weight=1.0)


@register_method(
    'transclip',
    SeenImages,
    'TransCLIP (sees unlabelled test images)',
    transductive=True,
    defaults=dict(shot_weight=0.002),
    grid=dict(shot_weight=(0.002, 0.01, 0.02, 0.2)),
    source='its code, with the order of its affinity matrix corrected; it has no '
    'fixed shot_weight, 0.002 is ours',
)
def fit_transclip(data: FewShotData, *, shot_weight: float) -> SeenImages:
    """Fits TransCLIP with shots, see :func:`_solve`. ``shot_weight`` is gamma."""
    shots, labels = mean_features(data.train), data.train.labels
    return _solve(data, shots, labels, shot_weight, text_weight=0.5)


@torch.no_grad()
def _solve(
    data: FewShotData, shots: Tensor, labels: Tensor, gamma: float, text_weight: float
) -> SeenImages:
    """Finds the probabilities z (N, K) of all N unlabelled images together.

    Each class is a Gaussian, and all have the same diagonal covariance v::

        z_i  = softmax(text_weight log p_i + g_i / 50 + sum_j (W_ij + W_ji) z_j / 6)
        g_ik = -1/2 sum_d (f_id - mu_kd)^2 / v_d
        mu_k = normalise(sum_i z_ik f_i / N + 50 gamma sum_{s of class k} f_s / S)

    v is the mean of (f_id - mu_kd)^2 with the weights of mu. p is zero-shot CLIP. W has
    the cosines of an image and its three nearest unlabelled images. The z of the S
    shots are their labels. mu starts as the means of the shots, or without shots as
    those of the eight images of each class with the highest p.

    Source: ``TransCLIP_solver`` of github.com/MaxZanella/transduction-for-vlms. There
    the shots are first in W and last in z, so each image is pulled to the neighbours of
    another one, and the nearest image of a shot is left out.
    """
    if data.unlabelled is None:
        raise ValueError(
            'TransCLIP needs the unlabelled images that it classifies, in '
            'FewShotData.unlabelled.'
        )
    text, f = data.text_features, F.normalize(data.unlabelled, dim=-1)
    count, width = f.shape
    log_p = (data.logit_scale * f @ text.t()).log_softmax(-1)
    z, fixed = log_p.exp(), F.one_hot(labels, len(text)).to(f)
    everything, mu = torch.cat([f, shots]), fixed.t() @ shots
    if not len(shots):
        top = z.topk(min(8, count), dim=0)
        mu = torch.zeros_like(z).scatter(0, top.indices, top.values).t() @ f
    mu, v = F.normalize(mu, dim=-1), torch.full((width,), 1 / width).to(f)
    pull, share = _affinity(everything, f), 50 * gamma / max(len(shots), 1)
    for step in range(11):
        if step:
            weight = torch.cat([z / count, share * fixed])
            total = weight.t() @ everything
            mu = F.normalize(total, dim=-1)
            v = weight.sum(1) @ everything.square() - 2 * (mu * total).sum(0)
            v = (v + weight.sum(0) @ mu.square()) / weight.sum()
        # Without the terms that are the same for all classes.
        g = (f / v) @ mu.t() - 0.5 * (mu.square() / v).sum(-1)
        for _ in range(5):
            near = pull.t() @ torch.cat([z, fixed]) + (pull @ z)[:count]
            log_z = (text_weight * log_p + g / 50 + near / 6).log_softmax(-1)
            z = log_z.exp()
    return SeenImages(f, log_z)


def _affinity(rows: Tensor, f: Tensor, neighbours: int = 3) -> Tensor:
    """Returns W, sparse. The first rows are f (N, D), whose nearest are not itself."""
    neighbours = min(neighbours, len(f) - 1)
    values, columns = [], []
    for start in range(0, len(rows), 1024):
        similar = rows[start : start + 1024] @ f.t()
        similar.diagonal(start).fill_(-torch.inf)
        nearest = similar.topk(neighbours)
        values.append(nearest.values.flatten())
        columns.append(nearest.indices.flatten())
    index = torch.arange(len(rows)).repeat_interleave(neighbours)
    index, shape = torch.stack([index, torch.cat(columns)]), (len(rows), len(f))
    return torch.sparse_coo_tensor(
        index, torch.cat(values), shape, check_invariants=True
    )
