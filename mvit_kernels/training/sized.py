# SPDX-License-Identifier: Apache-2.0
"""Data sets that resize each image to the size that the sampler drew for its batch.

Example:
    >>> from torchvision.datasets import ImageFolder
    >>> photos = SizedDataset(ImageFolder("train"), timm_transforms(is_training=True, color_jitter=None))
    >>> loader = DataLoader(photos, batch_sampler=MultiScaleSampler(photos, 128), num_workers=8)
    >>> images, targets = next(iter(loader))                # (227, 3, 192, 192), say

A data set of this package gives an image and a target for ``(index, (height, width))``. `SizedDataset` makes one of any
other that gives a PIL image for an index, and of a factory of transforms: a function of ``(height, width)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch.utils.data import Dataset, IterableDataset

from .._utils.third_party import import_timm

__all__ = ["DraftLoader", "SizedDataset", "TimmTransforms", "split_pair", "timm_transforms"]

if TYPE_CHECKING:
    from PIL import Image

Pair = tuple[int, int]


class Transforms(Protocol):
    """A factory of transforms for `SizedDataset`: (height, width) to the transform for that size."""

    def __call__(self, size: Pair, /) -> Callable[..., Any]: ...


class SizedDataset(Dataset[tuple[Any, ...]]):
    """`data` with images at the size that each index comes with.

    Example:
        >>> from torchvision.transforms import v2
        >>> def augment(size):                              # (height, width): v2's own order
        ...     flipped_crop = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        ...     return v2.Compose([*flipped_crop, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
        >>> photos = SizedDataset(ImageFolder("train"), augment)
        >>> photos[3, (192, 256)][0].shape
        torch.Size([3, 192, 256])
        >>> held_back = SizedDataset(Subset(ImageFolder("train"), indices), augment)      # a part: wrap the Subset

        With timm's data sets and transforms, and with what timm's loader does on a GPU:

        >>> data = timm.data.create_dataset("", root="train", split="train")
        >>> photos = SizedDataset(data, timm_transforms(is_training=True, auto_augment="rand-m9-mstd0.5"))
        >>> fast = timm_transforms(is_training=True, use_prefetcher=True)                 # uint8, normalised on the GPU
        >>> loader = DataLoader(SizedDataset(data, fast), batch_sampler=sampler, collate_fn=fast_collate)
        >>> loader = PrefetchLoader(loader, device=torch.device("cuda"))                  # both from timm.data.loader

        Boxes and masks (`torchvision.tv_tensors`) are transformed with their image:

        >>> boxes = SizedDataset(detections, lambda size: v2.Compose([v2.RandomIoUCrop(), v2.Resize(size)]), joint=True)

    Args:
        data: a map-style data set of ``(image, target, …)`` without transforms of its own: torchvision's `ImageFolder`,
            timm's `ImageDataset`, a `Subset` of them, your own.
        transforms: called with ``(height, width)``, returns the transform for that size. Called once a size and
            worker; the transform is kept. Where workers are spawned instead of forked, it has to be picklable: a
            function of a module, `functools.partial`, `timm_transforms`.
        joint: call the transform with image and target (and what else the sample has), as torchvision's v2 transforms
            take them, and return what it returns; otherwise with the image alone.

    Attributes of `data`, as ``classes`` and ``targets``, are attributes here.

    Raises:
        TypeError: `data` is an iterable or has no length; `transforms` cannot be called. When indexed: an index without
            a size, a sample that is not a tuple, a factory that returns no transform.
        ValueError: `data` has transforms of its own. When indexed: a transform that returns another size.
    """

    def __init__(self, data: Dataset[Any], transforms: Transforms, *, joint: bool = False) -> None:
        if isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise TypeError(
                f"SizedDataset: data is {type(data).__name__}, which cannot be indexed; give a map-style data set, "
                "with __getitem__ and __len__"
            )
        if isinstance(data, SizedDataset):
            raise TypeError("SizedDataset: data is a SizedDataset already; give the data set inside it")
        if not callable(transforms):
            raise TypeError(
                f"SizedDataset: transforms is {type(transforms).__name__}; give a function that takes (height, width) "
                "and returns the transform for it"
            )
        own = [name for name in ("transform", "transforms") if getattr(data, name, None) is not None]
        if own:
            raise ValueError(
                f"SizedDataset: data has a {own[0]} of its own ({_short(getattr(data, own[0]))}), which would run "
                "before the size is known; make it without, and let `transforms` return all of them"
            )
        self.data, self.transforms, self.joint = data, transforms, joint
        self._by_size: dict[Pair, Callable[..., Any]] = {}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, pair: tuple[int, Pair]) -> tuple[Any, ...]:
        index, size = split_pair(pair, "SizedDataset")
        sample = self.data[index]
        if not isinstance(sample, tuple | list) or len(sample) < 2:
            raise TypeError(
                f"SizedDataset: data[{index}] is {_short(sample)}; (image, target) is wanted. Where the samples are "
                "dicts, map them to tuples first"
            )
        transform = self._by_size.get(size) or self._transform(size)
        result = transform(*sample) if self.joint else (transform(sample[0]), *sample[1:])
        shape = getattr(result[0], "shape", None) if isinstance(result, tuple | list) else None
        if shape is not None and tuple(shape[-2:]) != size:
            raise ValueError(
                f"SizedDataset: the transform for {size[0]} × {size[1]} (height × width) returned an image of shape "
                f"{tuple(shape)}; let it resize or crop to the size that the factory is called with"
            )
        return result

    def _transform(self, size: Pair) -> Callable[..., Any]:
        transform = self.transforms(size)
        if not callable(transform):
            raise TypeError(
                f"SizedDataset: transforms({size}) returned {_short(transform)}, which is no transform; `transforms` "
                "is to be a function of (height, width) that returns one, not a transform itself"
            )
        self._by_size[size] = transform
        return transform

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "data" not in self.__dict__:  # not yet, while it is unpickled
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.data, name)


class TimmTransforms(NamedTuple):
    """A picklable factory for `SizedDataset`; see `timm_transforms`."""

    options: tuple[tuple[str, Any], ...]

    def __call__(self, size: Pair) -> Callable[..., Any]:
        import_timm()
        from timm.data import create_transform

        return create_transform(input_size=(3, *size), **dict(self.options))


def timm_transforms(**options: Any) -> TimmTransforms:
    """`timm.data.create_transform` as a factory for `SizedDataset`.

    Example:
        >>> as_published = timm_transforms(is_training=True, color_jitter=None, mean=(0, 0, 0), std=(1, 1, 1))
        >>> photos = SizedDataset(data, as_published)

    The paper augments by random resized crops and horizontal flips alone: ``color_jitter=None``. Published MobileViTs
    take images in [0, 1]: mean 0 and deviation 1, as timm's configurations of them say; create_transform's own defaults
    are ImageNet's.

    Args:
        options: of `create_transform`, except for ``input_size``.

    Raises:
        TypeError: ``input_size`` among the options; when called, an option that timm does not know.
        ImportError: timm is not installed.
    """
    if "input_size" in options:
        raise TypeError("timm_transforms: input_size comes with each batch, from the sampler; leave it out")
    import_timm()
    return TimmTransforms(tuple(options.items()))


class DraftLoader(NamedTuple):
    """Opens photos for `ImageFolder` at no more resolution than their crops need, which JPEG's decoder gives cheaply.

    Example:
        >>> data = ImageFolder("train", loader=DraftLoader(320))              # for crops of at most 320 px
        >>> data = ImageFolder("val", loader=DraftLoader(320, area=1.0))      # for the whole photo at 320 px

    A camera's JPEG of 12 megapixels takes 108 ms of a core to decode (AMD EPYC, Zen 5), several times a training step's
    share of an image of XXS; through this 63 ms, and 46 ms with area 1. The decoder halves, quarters or eighths a photo
    while both sides stay large enough that no crop has to be enlarged. Smaller photos, and other formats, are opened in
    full, as torchvision does. Crops are relative to the photo, and so drawn as before; their pixels differ by the
    filter that reduced them (JPEG's own before Pillow's).

    Args:
        largest: the longest side of the crops in pixels, after resizing: the sampler's largest resolution.
        area: the smallest share of the photo's area that a crop takes; RandomResizedCrop's default is 0.08.
    """

    largest: int
    area: float = 0.08

    def __call__(self, path: str) -> Image.Image:
        from PIL import Image

        # The shorter side of the smallest crop, at the ratio 3 : 4, is sqrt(3 / 4 * area) of the photo's shorter one.
        side = math.ceil(self.largest / math.sqrt(0.75 * self.area))
        with open(path, "rb") as file:
            image = Image.open(file)
            image.draft("RGB", (side, side))
            return image.convert("RGB")


def split_pair(pair: object, name: str) -> tuple[int, Pair]:
    """The index and the (height, width) of what `MultiScaleSampler` yields; for data sets that take such pairs.

    Args:
        pair: ``(index, (height, width))``.
        name: of the data set, for the error.

    Raises:
        TypeError: it is something else, which mostly means that the loader has another sampler.
    """
    match pair:
        case (index, (int() as height, int() as width)) if not isinstance(index, Iterable):
            return index, (height, width)  # type: ignore[return-value] # an index of whatever `data` takes
    raise TypeError(
        f"{name}: the index is {_short(pair)}; it takes (index, (height, width)). Load it by DataLoader(data, "
        "batch_sampler=MultiScaleSampler(data, batch_size)), with multi_scale=False or training=False for one size"
    )


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
