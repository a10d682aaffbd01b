# SPDX-License-Identifier: Apache-2.0
"""Pictures of what was found on a photo: boxes with names and scores, and masks with a legend."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

# Told apart by most eyes, on light and on dark photos; after them hues by the golden angle.
_COLOURS = (
    *((230, 60, 60), (60, 160, 255), (255, 200, 40), (60, 190, 90), (200, 90, 230), (255, 130, 40), (70, 220, 220)),
    *((240, 110, 170), (150, 110, 60), (170, 210, 60), (90, 90, 220), (0, 130, 120), (180, 180, 190), (150, 30, 80)),
)
_GOLDEN_ANGLE = 0.381966
_LEGEND_LINES = 24


def colour(index: int) -> tuple[int, int, int]:
    """The colour of class `index`, the same in every picture."""
    if index < len(_COLOURS):
        return _COLOURS[index]
    step = index - len(_COLOURS)
    red, green, blue = colorsys.hsv_to_rgb(
        step * _GOLDEN_ANGLE % 1, 0.45 + 0.4 * (step % 2), 0.95 - 0.3 * (step % 3 == 2)
    )
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    texts: Sequence[str],
) -> Image.Image:
    """A copy of `image` with boxes, each with its text on a tag of its class's colour, if there is room for it.

    Args:
        image: RGB.
        boxes: left, top, right, bottom in pixels, the best first: it is drawn last, on top of the others.
        labels: class of each box, from 0, which decides the colour.
        texts: of each tag.
    """
    from PIL import ImageDraw

    image = image.copy()
    draw = ImageDraw.Draw(image)
    line = max(2, round(min(image.size) / 160))
    font = _font(image.size)
    taken: list[tuple[float, float, float, float]] = []
    places = []
    for box, text in zip(boxes, texts, strict=True):  # the best first: its tag gets the best place
        place = _tag_place(draw, image.size, box, text, font, taken)
        taken += [place] if place else []
        places.append(place)
    for i in reversed(range(len(boxes))):
        draw.rectangle([round(edge) for edge in _inside(boxes[i], image.size)], outline=colour(labels[i]), width=line)
    for i in reversed(range(len(boxes))):
        place = places[i]
        if place is None:
            continue
        fill = colour(labels[i])
        left, top, right, bottom = place
        draw.rectangle((left, top, right, bottom), fill=fill)
        draw.text(((left + right) / 2, (top + bottom) / 2), texts[i], fill=_ink(fill), font=font, anchor="mm")
    return image


def draw_mask(image: Image.Image, mask: np.ndarray, names: Sequence[str], *, opacity: float = 0.55) -> Image.Image:
    """`image` under the colours of its classes, with their borders, and beside it a legend with shares of the pixels.

    Args:
        image: RGB.
        mask: class indices, (height, width), of the image's size.
        names: of the classes, by index.
        opacity: of the colours, 0 to 1.
    """
    from PIL import Image, ImageDraw

    pixels = np.asarray(image, dtype=np.float32)
    table = np.array([colour(index) for index in range(len(names))], dtype=np.float32)
    blended = pixels * (1 - opacity) + table[mask] * opacity
    blended[_borders(mask)] = 255
    overlay = Image.fromarray(blended.round().astype(np.uint8))

    shares = class_shares(mask, len(names))
    present = sorted((index for index in range(len(names)) if shares[index] > 0), key=lambda index: -shares[index])
    font = _font(image.size)
    height_of_line = round(font.size * 1.7)
    room = max(1, min(_LEGEND_LINES, int((image.height - font.size) // height_of_line)))
    lines: list[tuple[tuple[int, int, int] | None, str]]
    lines = [(colour(index), f"{names[index]}  {_percent(shares[index])}") for index in present[:room]]
    if len(present) > room:
        lines[-1] = (None, f"and {len(present) - room + 1} more")
    width = max(math.ceil(font.getlength(text)) for _, text in lines) + 3 * font.size + font.size // 2
    whole = (image.width + round(width), max(image.height, height_of_line + round(font.size)))
    picture = Image.new("RGB", whole, (250, 250, 250))
    picture.paste(overlay, (0, 0))
    draw = ImageDraw.Draw(picture)
    for place, (fill, text) in enumerate(lines):
        middle = font.size // 2 + round((place + 0.5) * height_of_line)
        left, side = image.width + font.size // 2, font.size
        if fill is not None:
            box = (left, middle - side // 2, left + round(1.4 * side), middle + side // 2)
            draw.rectangle(box, fill=fill, outline=(90, 90, 90))
        draw.text((left + round(1.4 * side) + side // 2, middle), text, fill=(20, 20, 20), font=font, anchor="lm")
    return picture


def index_image(mask: np.ndarray, classes: int) -> Image.Image:
    """The mask as an image whose pixels are class indices, with the pictures' colours as its palette."""
    from PIL import Image

    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette([channel for index in range(min(classes, 256)) for channel in colour(index)])
    return image


def class_shares(mask: np.ndarray, classes: int) -> list[float]:
    """The share of the pixels that each class has."""
    return (np.bincount(mask.reshape(-1), minlength=classes) / max(mask.size, 1)).tolist()


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "< 0.1%"


def _font(size: tuple[int, int]) -> ImageFont.FreeTypeFont:
    """Pillow's own font, in a size that can be read on the whole picture."""
    from PIL import ImageFont

    font = ImageFont.load_default(size=max(12, round(min(size) / 28)))
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow without FreeType has letters of one size
        raise ImportError(
            "Pillow was built without FreeType, which draws letters: pip install --force-reinstall pillow"
        )
    return font


def _ink(fill: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is easier to read on `fill` (ITU-R BT.601 luma)."""
    luma = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2]
    return (0, 0, 0) if luma > 140 else (255, 255, 255)


def _inside(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box with its lines in the picture: a line along the right border would be one pixel out."""
    width, height = size
    left, top = min(max(box[0], 0), width - 1), min(max(box[1], 0), height - 1)
    return left, top, max(left, min(box[2] - 1, width - 1)), max(top, min(box[3] - 1, height - 1))


def _tag_place(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: Sequence[float],
    text: str,
    font: ImageFont.FreeTypeFont,
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float] | None:
    """A place for a tag: above the box, in a corner, or below it, where no other tag is; None if there is none."""
    pad = max(2, font.size // 5)
    width, height = math.ceil(draw.textlength(text, font=font)) + 2 * pad, round(font.size * 1.25) + pad
    left, top, right, bottom = _inside(box, size)
    x = min(max(0.0, left), max(0, size[0] - width))
    below_right = max(0.0, min(right - width + 1, size[0] - width))
    spots = [(x, top - height), (x, top), (below_right, top - height), (below_right, top), (x, bottom + 1)]
    spots += [(x, bottom - height + 1), (below_right, bottom + 1), (below_right, bottom - height + 1)]
    spots = [spot for spot in spots if 0 <= spot[1] <= size[1] - height] or [(x, min(max(0.0, top), size[1] - height))]

    def covered(spot: tuple[float, float]) -> float:
        return sum(
            max(0.0, min(spot[0] + width, other[2]) - max(spot[0], other[0]))
            * max(0.0, min(spot[1] + height, other[3]) - max(spot[1], other[1]))
            for other in taken
        )

    best = min(spots, key=covered)  # of equal ones the first
    if covered(best) > width * height / 2:
        return None  # the boxes are so many that tags would hide the photo
    return best[0], best[1], best[0] + width, best[1] + height


def _borders(mask: np.ndarray) -> np.ndarray:
    """Where a pixel's right or lower neighbour is of another class."""
    borders = np.zeros(mask.shape, dtype=bool)
    borders[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    borders[:-1] |= mask[:-1] != mask[1:]
    return borders
