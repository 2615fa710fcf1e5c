"""CLIP-Adapter as a head of mmpretrain."""

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from dsnet_mm.datasets.few_shot import check_class_names, load_task
from dsnet_mm.models.backbones.open_clip_encoder import OpenCLIPEncoder

from .clip_adapter import CLIPAdapter

try:
    from mmpretrain.models.heads import ClsHead
except ImportError as error:
    raise ImportError(
        'CLIPAdapterHead extends ClsHead of mmpretrain, which is not installed (or '
        'does not fit the installed mmcv): pip install "dsnet_mm[onedl]".'
    ) from error


class CLIPAdapterHead(ClsHead):
    """CLIP-Adapter on the features of a frozen :class:`OpenCLIPEncoder`.

    The text features are made once, when the head is built, and stored with it.

    Args:
        encoder: Arguments of :class:`OpenCLIPEncoder`, whose text tower encodes the
            class names.
        class_names: Names by label, or the name, folder or file of a data set as
            :func:`dsnet_mm.datasets.few_shot.load_task` takes it.
        data_root: Folder of the public data sets.
        prompts: See :func:`dsnet_mm.datasets.few_shot.resolve_prompts`. None takes
            those of the data set, or ``'photo'``.
        text_features: Instead of ``encoder`` and ``class_names``: a safetensors file
            with ``text_features`` (K, D) and ``logit_scale``, for classifiers
            encoded before.
        adapter: Arguments of :class:`CLIPAdapter`.
        **kwargs: Arguments of ``ClsHead``.

    Raises:
        ValueError: If the class names or text features do not come from exactly one
            place, or a name is empty or there twice.
        FileNotFoundError: If a file is missing.
    """

    def __init__(
        self,
        encoder: dict | None = None,
        class_names: Sequence[str] | str | None = None,
        data_root: str = 'data',
        prompts: str | Sequence[str] | None = None,
        text_features: str | None = None,
        adapter: dict = dict(preset='paper'),
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        has_names = encoder is not None and class_names is not None
        if has_names == (text_features is not None):
            raise ValueError(
                'CLIPAdapterHead takes either encoder and class_names, or a file of '
                'text_features.'
            )
        if has_names:
            if not isinstance(class_names, str):
                check_class_names(class_names)
            else:
                task = load_task(class_names, data_root, prompts)
                class_names, prompts = task.class_names, task.prompts
            clip = OpenCLIPEncoder(**{**encoder, 'amp': None})
            features = clip.encode_classes(class_names, prompts or 'photo')
            logit_scale = clip.logit_scale
        else:
            if not Path(text_features).is_file():
                raise FileNotFoundError(f'there is no file {text_features}.')
            stored = load_file(text_features)
            features = stored['text_features']
            logit_scale = stored['logit_scale'].item()
        self.adapter = CLIPAdapter(features, logit_scale, **adapter)

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Logits (N, K) of the last feature (N, D) of the tuple."""
        return self.adapter(self.pre_logits(feats))
