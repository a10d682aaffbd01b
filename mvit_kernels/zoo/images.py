# SPDX-License-Identifier: Apache-2.0
"""Photographs as tensors, for ``classify``, ``verify --image`` and the demo."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """The image in the file in RGB, turned upright by its EXIF orientation; the first frame of an animation.

    Example:
        >>> preprocess(load_image("cat.jpg"), 256).shape
        torch.Size([3, 256, 256])

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the path cannot be read.
        ValueError: the file is not an image, is empty or damaged, or has more than 8 bits a channel or more pixels than
            Pillow reads.
        ImportError: Pillow is not installed.
    """
    pil = _pillow()
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the images in it")
    if not path.exists():
        raise FileNotFoundError(f"there is no image {path}")
    if path.stat().st_size == 0 and path.is_file():
        raise ValueError(f"{path} is empty (0 bytes), not an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pil.DecompressionBombWarning)  # it comes at half the size of the error
            with pil.open(path) as image:
                image.load()
    except pil.UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that Pillow {pil.__version__} can read") from None
    except pil.DecompressionBombError:
        most = f"{2 * pil.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels"
        raise ValueError(f"{path} has more than {most}, the most that Pillow reads; make it smaller first") from None
    except Exception as error:  # Pillow's decoders raise many kinds
        if isinstance(error, OSError) and error.errno is not None:  # of the file, not of the image
            raise
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if image.mode.startswith(("I", "F")):  # convert() would clip these at 255
        raise ValueError(f"{path} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits first")
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if "transparency" in image.info:  # in a palette, for example: Pillow warns on a direct conversion to RGB
        image = image.convert("RGBA")
    return image.convert("RGB")


def preprocess(
    image: Image.Image,
    size: int | tuple[int, int],
    resize: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    bgr: bool = False,
) -> Tensor:
    """An RGB image as a classifier's input: resized, cropped at the center, scaled to [0, 1], normalized.

    Example:
        >>> x = preprocess(image, 224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))[None]

    Args:
        image: an RGB image, as `load_image` returns it.
        size: size of the crop in pixels: its side, or (height, width).
        resize: length in pixels that the short side is resized to (bilinear) before the crop; by default 256/224 of the
            crop's longer side.
        mean, std: of the channels, in the order R, G, B; 0 and 1 by default, as published MobileViTs expect.
        bgr: return the channels in the order B, G, R, as Hugging Face's published MobileViTs expect.

    Returns:
        (3, height, width), float32.

    Raises:
        ValueError: `resize` is smaller than the crop; `mean` or `std` is not three numbers; an std is 0.
    """
    height, width = (size, size) if isinstance(size, int) else size
    resize = round(max(height, width) * 256 / 224) if resize is None else resize
    if resize < max(height, width):
        raise ValueError(f"a crop of {height} × {width} does not fit into an image resized to {resize}")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and (len(values) != 3 or not np.isfinite(values).all()):
            raise ValueError(f"{name} is {values}; three numbers are wanted, for red, green and blue")
    if std is not None and 0 in std:
        raise ValueError(f"std is {std}; numbers above 0 are wanted")

    # Resize and crop in one step: the whole resized image, which would be huge for a long strip, is never made.
    short = min(image.size)
    crop_box = []
    for side, crop in zip(image.size, (width, height), strict=True):
        resized = round(side * resize / short)
        start = (resized - crop) // 2
        crop_box.append((start * side / resized, (start + crop) * side / resized))
    (left, right), (top, bottom) = crop_box
    resampling = _pillow().Resampling.BILINEAR
    pixels = np.asarray(image.resize((width, height), resampling, box=(left, top, right, bottom)))
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().contiguous() / 255
    if mean is not None:
        x -= torch.tensor(mean, device="cpu")[:, None, None]
    if std is not None:
        x /= torch.tensor(std, device="cpu")[:, None, None]
    return x.flip(0) if bgr else x


def sample_photos() -> list[tuple[str, Image.Image]]:
    """(name, RGB image) of the photographs that matplotlib and scikit-learn ship; of those that are installed.

    Example:
        >>> [name for name, image in sample_photos()]
        ['grace_hopper', 'china', 'flower']
    """
    photos = []
    try:
        import matplotlib

        path = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
        if path.exists():
            photos.append((path.stem, load_image(path)))
    except ImportError:
        pass
    try:
        from sklearn.datasets import load_sample_images

        samples = load_sample_images()
        for name, pixels in zip(samples.filenames, samples.images, strict=True):
            photos.append((Path(name).stem, _pillow().fromarray(pixels)))
    except ImportError:
        pass
    return photos


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Pillow, which reads images, is not installed: pip install pillow") from error
    return Image
