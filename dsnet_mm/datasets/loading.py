"""Loads images for a training, and says which one cannot be read."""

import os
from pathlib import Path

import cv2
from mmcv.transforms import LoadImageFromFile as MMCVLoadImageFromFile

from dsnet_mm.registry import TRANSFORMS


class UnreadableImageError(ValueError):
    """An image is missing or damaged."""


@TRANSFORMS.register_module()
class LoadImageFromFile(MMCVLoadImageFromFile):
    """MMCV's loading, with a choice for images that cannot be read.

    Args:
        skipped: File to which the path of such an image is appended. The data set then
            takes another sample at random. None raises an error.
        **kwargs: Those of MMCV.

    Raises:
        UnreadableImageError: By ``transform``, if ``skipped`` is None.
    """

    def __init__(self, skipped: str | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.skipped = skipped

    def transform(self, results: dict) -> dict | None:
        """Adds ``img``, ``img_shape`` and ``ori_shape``."""
        path = results['img_path']
        try:
            return super().transform(results)
        # MMCV asserts that OpenCV could decode it.
        except (OSError, AssertionError, ValueError, cv2.error) as error:
            if self.skipped is None:
                raise UnreadableImageError(
                    f'{path} cannot be read as an image; replace it or leave it out, '
                    f'or add --skip-unreadable; tools/check_data.py finds all of them'
                ) from error
        # One write of a short line: workers and processes do not mix theirs.
        with Path(self.skipped).open('a') as file:
            os.write(file.fileno(), f'{path}\n'.encode())
        return None
