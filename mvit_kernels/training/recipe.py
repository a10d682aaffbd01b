# SPDX-License-Identifier: Apache-2.0
"""Recipes: everything that decides what a training computes, as a readable YAML file and as a frozen dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "Augmentation",
    "MultiScale",
    "Recipe",
    "as_dict",
    "changed",
    "from_dict",
    "read_recipe",
    "recipe_names",
    "to_yaml",
]

_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class MultiScale:
    """Resolutions of the multi-scale sampler (paper section 3.2): `count` from `smallest` to `largest`, and the base.

    The base is the recipe's `size`. Sides are made divisible by `divisor`. From epoch `grow_at` on, the smallest and
    the largest grow by the factor `grow`; 1 for never.
    """

    smallest: int = 160
    largest: int = 320
    count: int = 5
    divisor: int = 32
    grow: float = 1.0
    grow_at: int = 40

    def __post_init__(self) -> None:
        _require(self.divisor >= 1, "divisor", self.divisor, "1 or more")
        _require(self.smallest >= 32, "smallest", self.smallest, "32 pixels, the network's stride, or more")
        _require(self.largest >= self.smallest, "largest", self.largest, f"smallest, {self.smallest}, or more")
        _require(self.count >= 1, "count", self.count, "1 or more")
        _require(self.grow >= 1, "grow", self.grow, "a factor of 1 or more")
        _require(self.grow_at >= 0, "grow_at", self.grow_at, "an epoch")


@dataclass(frozen=True)
class Augmentation:
    """What is random in a training sample. A task takes what concerns it, and ignores the rest.

    Attributes:
        area, ratio: of the random resized crop, relative to the image (classification); area (1, 1) takes the whole
            image.
        ssd_crop: probability of SSD's crop by overlap with the boxes (detection).
        short_side: range that the short side is resized to before the crop to the network's input (segmentation).
        flip, vertical_flip: probabilities of mirroring left to right, and top to bottom.
        photometric: probability of SSD's distortion of brightness, contrast, saturation and hue.
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333)
    ssd_crop: float = 1.0
    short_side: tuple[int, int] = (256, 1024)
    flip: float = 0.5
    vertical_flip: float = 0.0
    photometric: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.area
        _require(0 < low <= high <= 1, "area", list(self.area), "two fractions of the image, the smaller first")
        _require(0 < self.ratio[0] <= self.ratio[1], "ratio", list(self.ratio), "two ratios, the smaller first")
        low, high = self.short_side
        _require(
            32 <= low <= high, "short_side", list(self.short_side), "two lengths from 32 pixels, the smaller first"
        )
        for name in ("ssd_crop", "flip", "vertical_flip", "photometric"):
            _require_probability(name, getattr(self, name))


@dataclass(frozen=True)
class Recipe:
    """A training, as far as its results depend on it. The machine's side is in `mvit_kernels.training.loop.Settings`.

    Example:
        >>> recipe = read_recipe("xxs", {"epochs": 100, "augmentation.flip": 0.0})
        >>> recipe.lr, recipe.size
        (0.002, (256, 256))

    Attributes:
        task: "classification", "detection" or "segmentation".
        model: a name for `mvit_kernels.zoo.load`; None for own/ and the checkpoint's variant.
        pretrained: start from the hub's published weights, for names that have some.
        epochs: passes over the training samples.
        batch: images a step on each process, at `size`; the multi-scale sampler takes more or fewer at other sizes.
        accumulate: steps whose gradients are averaged into one update.
        size: (height, width) of the network's input in evaluation, and in training without `multi_scale`.
        multi_scale: the sampler's resolutions, or None to train at `size`.
        resize: in evaluation, the short side before the centre crop; None for 256/224 of the crop.
        output_stride: of detection's and segmentation's backbone; None for the published one.
        optimizer: a name in timm.optim; `betas` go to those that have them.
        lr, final_lr, warmup_lr: peak, last and first learning rate; linear over `warmup_steps` updates, then a cosine.
        weight_decay, decay_norms: whether norms' weights and biases decay too.
        head_lr_factor: the head learns this many times faster than the backbone.
        clip_grad: largest norm of the gradient; None for no limit.
        ema: decay of the weights' moving average at each update, which is what is evaluated; None for none.
        ema_warmup: let the decay rise with the updates, for short trainings.
        label_smoothing: in classification.
        dropout, classifier_dropout: probabilities; None leaves what the model's library has.
        mean, std: of the channels R, G, B, for images in [0, 1].
        augmentation: see `Augmentation`.
        amp: "float16", "bfloat16", None, or "auto": on a GPU bfloat16 where it has it, else float16; none on a CPU.
        seed: of everything random.
    """

    task: Literal["classification", "detection", "segmentation"]
    model: str | None = None
    pretrained: bool = False
    epochs: int = 300
    batch: int = 128
    accumulate: int = 1
    size: tuple[int, int] = (256, 256)
    multi_scale: MultiScale | None = None
    resize: int | None = None
    output_stride: int | None = None
    optimizer: str = "adamw"
    lr: float = 2e-3
    final_lr: float = 2e-4
    warmup_lr: float = 2e-4
    warmup_steps: int = 0
    weight_decay: float = 0.01
    decay_norms: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    head_lr_factor: float = 1.0
    clip_grad: float | None = None
    ema: float | None = 0.9995
    ema_warmup: bool = False
    label_smoothing: float = 0.0
    dropout: float | None = None
    classifier_dropout: float | None = None
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    augmentation: Augmentation = field(default_factory=Augmentation)
    amp: Literal["auto", "float16", "bfloat16"] | None = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(min(self.size) >= 32, "size", list(self.size), "32 pixels, the network's stride, or more")
        if self.resize is not None:
            _require(self.resize >= max(self.size), "resize", self.resize, f"size, {max(self.size)}, or more")
        _require(self.output_stride in (None, 8, 16, 32), "output_stride", self.output_stride, "8, 16, 32 or null")
        _require(self.lr > 0, "lr", self.lr, "a number above 0")
        _require(self.head_lr_factor > 0, "head_lr_factor", self.head_lr_factor, "a number above 0")
        for name in ("final_lr", "warmup_lr", "warmup_steps", "weight_decay", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", list(self.betas), "two numbers from 0 to below 1")
        _require(self.clip_grad is None or self.clip_grad > 0, "clip_grad", self.clip_grad, "a number above 0, or null")
        _require(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "a decay between 0 and 1, or null for none")
        for name in ("label_smoothing", "dropout", "classifier_dropout"):
            if getattr(self, name) is not None:
                _require_probability(name, getattr(self, name))
        _require(all(value > 0 for value in self.std), "std", list(self.std), "three numbers above 0")


def recipe_names() -> tuple[str, ...]:
    """The recipes that come with the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def read_recipe(name_or_file: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name, or from a YAML file, with some values changed.

    Example:
        >>> read_recipe("finetune", {"lr": 1e-3, "multi_scale.smallest": 192}).lr
        0.001

    Args:
        name_or_file: one of `recipe_names()`, or a file: anything with a separator or a suffix.
        changes: key -> value, with a dot for keys inside `multi_scale` and `augmentation`.

    Raises:
        ValueError: an unknown name, a file that is not YAML, unknown or repeated keys, values of another type or out of
            range; the message names the file and the key.
        OSError: the file cannot be read.
        ImportError: PyYAML is not installed.
    """
    text = str(name_or_file)
    path = _FOLDER / f"{text}.yaml"
    if Path(text).suffix or len(Path(text).parts) > 1:
        path = Path(text)
    elif not path.exists():
        near = difflib.get_close_matches(text, recipe_names(), 1)
        hint = f"did you mean {near[0]}?" if near else "give one of these, or a file such as ./mine.yaml"
        raise ValueError(f"--recipe {text}: there is no recipe of this name among {', '.join(recipe_names())}; {hint}")
    values = _load(path.read_text("utf-8"), str(path))
    for key, value in (changes or {}).items():
        _change(values, key, value)
    return from_dict(values, text)


def parse_change(text: str) -> tuple[str, Any]:
    """``key=value`` of ``--set``, the value in YAML.

    Raises:
        ValueError: there is no ``=``, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {text}: give key=value, such as lr=0.001 or augmentation.flip=0")
    return key.strip(), _yaml(value, f"--set {text}")


def from_dict(values: Mapping[str, Any], what: str) -> Recipe:
    """A recipe from nested mappings, as `as_dict` makes them and YAML holds them; `what` names them in errors."""
    return _build(Recipe, values, f"recipe {what}", "")


def changed(recipe: Recipe, changes: Mapping[str, Any], what: str) -> Recipe:
    """The recipe with some values changed, as by `read_recipe`; `what` names it in errors."""
    values = as_dict(recipe)
    for key, value in changes.items():
        _change(values, key, value)
    return from_dict(values, what)


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain nested dicts, lists and scalars: for YAML and for checkpoints."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(each) for key, each in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(recipe))


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe as a YAML file that `read_recipe` reads."""
    return _pyyaml().safe_dump(as_dict(recipe), sort_keys=False, default_flow_style=None)


def _change(values: dict[str, Any], key: str, value: Any) -> None:
    outer, dot, inner = key.partition(".")
    if dot:
        inside = values.get(outer)
        values[outer] = {**(inside if isinstance(inside, Mapping) else {}), inner: value}
    else:
        values[key] = value


def _build(kind: type, values: Any, what: str, prefix: str) -> Any:
    """An instance of the dataclass `kind`, with every key and type checked."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{what}: {prefix.rstrip('.') or 'the file'} is {values!r:.60}; keys and values are wanted")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(hints)}"
            raise ValueError(f"{what}: {prefix}{key} is unknown; {hint}")
    for each in dataclasses.fields(kind):
        if each.name not in values and each.default is each.default_factory is dataclasses.MISSING:
            raise ValueError(f"{what}: {prefix}{each.name} is missing; {_wanted(hints[each.name])} is wanted")
    read = {key: _value(hints[key], value, what, prefix + key) for key, value in values.items()}
    try:
        return kind(**read)
    except ValueError as error:
        raise ValueError(f"{what}: {prefix}{error}") from None


def _value(hint: Any, value: Any, what: str, key: str) -> Any:
    """`value` as the type `hint`, or a ValueError that names the key."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        hint = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, what, f"{key}.")  # type: ignore[arg-type] # hints are classes, not instances
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if key == "size" and isinstance(value, int) and not isinstance(value, bool):
            value = [value, value]
        if isinstance(value, list | tuple) and len(value) == len(kinds):
            return tuple(_value(kind, each, what, key) for kind, each in zip(kinds, value, strict=True))
    elif typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint) and isinstance(value, str):
            return value
    elif hint is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        try:  # 2e-4 is a text to YAML 1.1, which wants 2.0e-4
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{what}: {key} is {value!r:.60}; {_wanted(hint)} is wanted")


def _wanted(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        return f"a list of {len(kinds)} {'whole numbers' if kinds[0] is int else 'numbers'}"
    if typing.get_origin(hint) is Literal:
        return " or ".join(typing.get_args(hint))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(hint, str(hint))


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}; {wanted} is wanted")


def _require_probability(name: str, value: float) -> None:
    _require(0 <= value <= 1, name, value, "a probability from 0 to 1")


def _load(text: str, what: str) -> dict[str, Any]:
    values = _yaml(text, what)
    if not isinstance(values, dict):
        raise ValueError(f"recipe {what} is {type(values).__name__}; keys and values are wanted, such as lr: 0.002")
    return values


def _yaml(text: str, what: str) -> Any:
    yaml = _pyyaml()

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined] # PyYAML is imported when a recipe is read
        """PyYAML's, which takes the last of two equal keys in silence, without that."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(None, None, f"{twice} is there twice", node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{what} is not YAML: {' '.join(str(error).split())}") from None


def _pyyaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "PyYAML, which reads recipes, is not installed: pip install 'mvit_kernels[train]'", name="yaml"
        ) from error
    return yaml
