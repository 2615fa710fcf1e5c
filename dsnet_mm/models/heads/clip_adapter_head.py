"""CLIP-Adapter as a head of mmpretrain's ``ImageClassifier``."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dsnet_mm.clip import CLIPAdapter, OpenCLIPEncoder
from dsnet_mm.clip.encoder import feature_width
from dsnet_mm.clip.prompts import check_class_names, resolve_prompts
from dsnet_mm.datasets import PUBLIC_DATASETS, load_task

try:
    from mmpretrain.models.heads import ClsHead
    from mmpretrain.structures import DataSample
except ImportError as error:
    raise ImportError(
        'CLIPAdapterHead extends ClsHead of mmpretrain, which is not installed (or '
        'does not fit the installed mmcv): pip install "dsnet_mm[onedl]".'
    ) from error


class CLIPAdapterHead(ClsHead):
    """CLIP-Adapter on the features of a frozen :class:`OpenCLIPEncoder`.

    The text features are part of the state dict. If no checkpoint is loaded, they are
    computed from the class names at the first forward. Before that they are NaN, and
    CLIP is not loaded.

    The residual of the class weights starts at 0, or with
    :class:`dsnet_mm.AdapterStartHook` as in the method ``clip_adapter``.

    If the adapter learns the text features, the constructor computes them, because the
    optimizer needs them as parameters.

    Args:
        encoder: Arguments of :class:`OpenCLIPEncoder`, whose text tower encodes the
            class names.
        class_names: Names by label, or a data set by name, folder or file, see
            :func:`dsnet_mm.datasets.load_task`.
        data_root: Folder of the public data sets.
        prompts: See :func:`dsnet_mm.clip.prompts.resolve_prompts`. None takes those of
            the data set, or ``'photo'``.
        text_features: Instead of ``encoder`` and ``class_names``: a safetensors file
            with ``text_features`` (K, D) and ``logit_scale``.
        adapter: Arguments of :class:`CLIPAdapter`, such as ``preset='released'``. Its
            ``keep`` is the weight of ``loss_keep``.
        keep: The same, instead of the preset's.
        **kwargs: Arguments of ``ClsHead``.

    Raises:
        ValueError: If not exactly one source of text features is given, or a class
            name or prompt is wrong.
        FileNotFoundError: If a file is missing.
    """

    def __init__(
        self,
        encoder: dict | None = None,
        class_names: Sequence[str] | str | None = None,
        data_root: str = 'data',
        prompts: str | Sequence[str] | None = None,
        text_features: str | None = None,
        adapter: dict = dict(preset='default'),
        keep: float | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        has_names = encoder is not None and class_names is not None
        if has_names == (text_features is not None):
            raise ValueError(
                'CLIPAdapterHead takes either encoder and class_names, or a file of '
                'text_features.'
            )
        self.encoder, self.class_names = encoder, class_names
        self.data_root, self.prompts = data_root, prompts
        self._has_text_features = not has_names
        if has_names:
            if prompts is not None:
                resolve_prompts(prompts)
            features = torch.full(
                (self._num_classes(), feature_width(encoder['model'])), torch.nan
            )
            logit_scale = torch.nan
        else:
            if not Path(text_features).is_file():
                raise FileNotFoundError(f'there is no file {text_features}.')
            stored = load_file(text_features)
            features = stored['text_features']
            logit_scale = stored['logit_scale'].item()
        if keep is not None:
            adapter = {**adapter, 'keep': keep}
        self.adapter = CLIPAdapter(features, logit_scale, **adapter)
        if has_names and self.adapter.options['learn_classifier']:
            self.encode_class_names()

    def _num_classes(self) -> int:
        """Returns the number of classes, or 0 if the data set is not here."""
        names = self.class_names
        if not isinstance(names, str):
            check_class_names(names)
            return len(names)
        if names in PUBLIC_DATASETS:
            return PUBLIC_DATASETS[names].classes
        here = Path(names).exists()
        return len(load_task(names, self.data_root).class_names) if here else 0

    @torch.no_grad()
    def encode_class_names(self) -> None:
        """Computes the text features from the class names.

        The first forward calls it unless a checkpoint was loaded. If an encoder with
        the same weights exists, such as the backbone, its towers are used.
        """
        names, prompts = self.class_names, self.prompts
        if isinstance(names, str):
            task = load_task(names, self.data_root, prompts)
            names, prompts = task.class_names, task.prompts
        buffer = self.adapter.text_features
        clip = OpenCLIPEncoder.shared(
            **{**self.encoder, 'amp': None}, device=buffer.device
        )
        features = clip.encode_classes(names, 'photo' if prompts is None else prompts)
        buffer.data = features.to(buffer)
        self.adapter.logit_scale.fill_(clip.logit_scale)
        self._has_text_features = True

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Logits (N, K) of the last feature (N, D) of the tuple."""
        if not self._has_text_features:
            self.encode_class_names()
        return self.adapter(self.pre_logits(feats))

    def start(self, feats: Tensor, labels: Tensor) -> float:
        """Starts the residual of the class weights, see :meth:`CLIPAdapter.start`.

        Args:
            feats: Features of all training images (N, D).
            labels: Their labels (N,).
        """
        if not self._has_text_features:
            self.encode_class_names()
        return self.adapter.start(feats, labels)

    def loss(
        self, feats: tuple[Tensor, ...], data_samples: list[DataSample], **kwargs
    ) -> dict[str, Tensor]:
        """Losses of the last feature (N, D) of the tuple: ``loss``, ``loss_keep``."""
        if not self._has_text_features:
            self.encode_class_names()
        if 'gt_score' in data_samples[0]:  # of mixed images
            labels = torch.stack([s.gt_score for s in data_samples]).argmax(1)
        else:
            labels = torch.cat([s.gt_label for s in data_samples])
        features = self.pre_logits(feats)
        logits, distance = self.adapter.logits_and_distance(features, labels)
        losses = self._get_loss(logits, data_samples, **kwargs)
        return {**losses, 'loss_keep': self.adapter.options['keep'] * distance}

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, *args, **kwargs
    ) -> None:
        stored = state_dict.get(f'{prefix}adapter.text_features')
        if stored is not None:
            buffer = self.adapter.text_features
            if not self._has_text_features and isinstance(self.class_names, str):
                # The number of classes is that of the checkpoint.
                size = len(stored), buffer.shape[1]
                buffer.data = buffer.new_full(size, torch.nan)
                if self.adapter.options['residual']:
                    self.adapter.residual.data = buffer.new_zeros(size)
            if stored.shape == buffer.shape:
                is_nan = bool(stored.isnan().any())  # saved before the first forward
                self._has_text_features = self.encoder is None or not is_nan
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
