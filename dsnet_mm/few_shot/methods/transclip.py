"""TransCLIP (arXiv 2406.01837), which sees the unlabelled test images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FewShotData, mean_features, register_classifier, register_method

STEPS, ASSIGNMENTS, NEIGHBOURS, CONFIDENT = 10, 5, 3, 8
"""Updates of the Gaussians, of the probabilities for each of them, nearest images of an
image, and images of a first mean. All are those of the code."""


@register_classifier('features', 'log_probabilities')
class SeenImages(nn.Module):
    """The images that a transductive method has seen, and their probabilities.

    An image gets the probabilities of the most similar one that was seen. The code of
    TransCLIP classifies validation images so. A seen image gets its own.

    Args:
        features: Features of the seen images (N, D), rows of unit norm.
        log_probabilities: Logarithms of their probabilities (N, K).
    """

    def __init__(self, features: Tensor, log_probabilities: Tensor) -> None:
        super().__init__()
        self.register_buffer('features', features.detach().clone())
        self.register_buffer('log_probabilities', log_probabilities.detach().clone())

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
    """Fits TransCLIP-ZS, see :func:`solve`."""
    nothing = data.text_features[:0]
    return solve(data, nothing, nothing.new_zeros(0).long(), gamma=0.0, text_weight=1.0)


@register_method(
    'transclip',
    SeenImages,
    'TransCLIP (sees unlabelled test images)',
    transductive=True,
    defaults=dict(gamma=0.002),
    grid=dict(gamma=(0.002, 0.01, 0.02, 0.2)),
    source='its code, with the order of its affinity matrix corrected; it has no '
    'fixed gamma, 0.002 is ours',
)
def fit_transclip(data: FewShotData, *, gamma: float) -> SeenImages:
    """Fits TransCLIP-FS, see :func:`solve`. ``gamma`` is the weight of the shots."""
    shots, labels = mean_features(data.train), data.train.labels
    return solve(data, shots, labels, gamma, text_weight=0.5)


@torch.no_grad()
def solve(
    data: FewShotData, shots: Tensor, labels: Tensor, gamma: float, text_weight: float
) -> SeenImages:
    """Finds the probabilities z (N, K) of all unlabelled images together.

    Each class is a Gaussian, and all share a diagonal covariance v. In turn, z and the
    Gaussians are updated::

        z_i  = softmax(text_weight log p_i + (g_i + 50 / 6 sum_j (W_ij + W_ji) z_j) / 50)
        g_ik = -1/2 sum_d (f_id - mu_kd)^2 / v_d
        mu_k = normalise(sum_i z_ik f_i / N + 50 gamma sum_{s of class k} f_s / S)

    and v is the mean of (f_id - mu_kd)^2 with the same weights. p is zero-shot CLIP. W
    has the cosine of an image to its three nearest unlabelled images. The shots have
    their labels as z. The first mu are the means of the shots, or else of the eight
    images of each class with the highest p.

    Source: ``TransCLIP_solver`` of github.com/MaxZanella/transduction-for-vlms. There
    W has the shots first and z has them last, so with shots each image is pulled to
    the neighbours of another one, and the nearest image of a shot is left out.

    Args:
        data: Text features, and the unlabelled images.
        shots: Features of the labelled images (S, D), rows of unit norm.
        labels: Their labels (S,).
        gamma: Weight of the shots.
        text_weight: Weight of zero-shot CLIP.

    Raises:
        ValueError: If there are no unlabelled images.
    """
    if data.unlabelled is None:
        raise ValueError(
            'TransCLIP needs FewShotData.unlabelled, the features of the images that '
            'it is to classify.'
        )
    text = data.text_features
    f = F.normalize(data.unlabelled, dim=-1)
    count, width = f.shape
    log_p = (data.logit_scale * f @ text.t()).log_softmax(-1)
    z, fixed = log_p.exp(), F.one_hot(labels, len(text)).to(f)
    everything = torch.cat([f, shots])
    if len(shots):
        mu = fixed.t() @ shots
    else:
        top = z.topk(min(CONFIDENT, count), dim=0).indices
        mu = torch.zeros_like(z).scatter(0, top, z.gather(0, top)).t() @ f
    mu, v = F.normalize(mu, dim=-1), torch.full((width,), 1 / width).to(f)
    pull = affinity(f, everything)
    share = 50 * gamma / max(len(shots), 1)
    for step in range(STEPS + 1):
        # Without the terms that are the same for all classes.
        gauss = (f / v) @ mu.t() - 0.5 * (mu.square() / v).sum(-1)
        for _ in range(ASSIGNMENTS):
            near = pull.t() @ torch.cat([z, fixed]) + (pull @ z)[:count]
            near = gauss + 50 / (2 * NEIGHBOURS) * near
            log_z = (text_weight * log_p + near / 50).log_softmax(-1)
            z = log_z.exp()
        if step == STEPS:
            return SeenImages(f, log_z)
        weight = torch.cat([z / count, share * fixed])
        total = weight.t() @ everything
        mu = F.normalize(total, dim=-1)
        v = weight.sum(1) @ everything.square() - 2 * (mu * total).sum(0)
        v = (v + weight.sum(0) @ mu.square()) / weight.sum()


def affinity(f: Tensor, rows: Tensor) -> Tensor:
    """Returns W, sparse: each row and the ``NEIGHBOURS`` of f (N, D) nearest to it.

    The first N rows are f itself, and no image is its own neighbour.
    """
    count = min(NEIGHBOURS, len(f) - 1)
    values, columns = [], []
    for start in range(0, len(rows), 1024):
        similar = rows[start : start + 1024] @ f.t()
        similar.diagonal(start).fill_(-torch.inf)
        nearest = similar.topk(count)
        values.append(nearest.values.flatten())
        columns.append(nearest.indices.flatten())
    index = torch.arange(len(rows)).repeat_interleave(count)
    index = torch.stack([index, torch.cat(columns)])
    shape = len(rows), len(f)
    return torch.sparse_coo_tensor(
        index, torch.cat(values), shape, check_invariants=True
    ).coalesce()
