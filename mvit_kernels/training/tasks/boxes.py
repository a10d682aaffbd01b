# SPDX-License-Identifier: Apache-2.0
"""Photos with boxes: VOC's XML files and COCO's JSON, read into one form and checked whole before training."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

from ..._utils.text import some
from . import photos
from .photos import refuse

logger = logging.getLogger("mvit_kernels")

# A box may lie outside its photo by this much and is cut there: tools round, and count from 0 or from 1. Beyond it the
# boxes are those of another photo, or of the photo before it was resized.
_SLACK_PIXELS, _SLACK_SHARE = 2.0, 0.01

_XML_FOLDERS = ("", "annotations", "Annotations")
_IMAGE_FOLDERS = ("", "images", "JPEGImages")
_JSON_NAMES = ("annotations.json", "_annotations.coco.json", "instances*.json", "annotations/instances*.json")


class Box(NamedTuple):
    """One object: its edges in pixels of the upright photo, from 0 at the left and top, and its class from 0."""

    edges: tuple[float, float, float, float]  # left, top, right, bottom
    label: int
    crowd: bool = False  # COCO's iscrowd: a group; neither trained on nor counted
    difficult: bool = False  # VOC's difficult: trained on, and not counted in evaluation, neither found nor missed


class Photo(NamedTuple):
    """A photo, its size and the objects on it."""

    path: Path
    size: tuple[int, int]  # width, height
    boxes: tuple[Box, ...]


class BoxSet(NamedTuple):
    """Photos with boxes, and the names of their classes, without a background."""

    classes: tuple[str, ...]
    samples: tuple[Photo, ...]


def read_boxes(
    folder: Path,
    *,
    annotations: Path | None = None,
    classes: Sequence[str] | None = None,
    stems: Iterable[str] | None = None,
) -> BoxSet:
    """Read the photos in `folder` and their boxes.

    Example:
        >>> found = read_boxes(Path("raccoon"))
        >>> found.classes, len(found.samples)
        (('raccoon',), 48)

    Args:
        folder: has the photos, or `images` or `JPEGImages` with them; and VOC XML files beside the photos or in
            `annotations` or `Annotations`, or one COCO file called annotations.json, _annotations.coco.json or
            instances….json, or such a one in `annotations`.
        annotations: the COCO file, where it is elsewhere.
        classes: the names of the classes, in the order of their numbers; None for the lines of `folder`/classes.txt, or
            else the names that occur: in VOC by alphabet, in COCO by the numbers of the categories.
        stems: names, without ending, of the VOC files to read; None for all.

    A photo without an XML file is left aside; one whose file lists no object has no boxes. Numbers of VOC count from 1
    and include the last pixel, so that 1 is taken off left and top.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder or file.
        ValueError: no photo or no box at all; photos that are missing or cannot be read, a photo of another size than
            its annotation says, boxes without area or outside their photo, categories that are not in `classes`,
            malformed XML or JSON. All of these are named.
    """
    if not folder.is_dir():
        raise (NotADirectoryError if folder.exists() else FileNotFoundError)(f"{folder} is no folder with photos")
    if classes is None and (folder / "classes.txt").is_file():
        classes = read_class_list(folder / "classes.txt")
    file = annotations or _coco_file(folder)
    if file is not None:
        return _read_coco(folder, file, classes)
    where = [folder / name for name in _XML_FOLDERS if any((folder / name).glob("*.xml"))]
    if not where:
        raise ValueError(
            f"{folder} has neither VOC XML files (beside the photos or in annotations) nor a COCO file "
            "(annotations.json or instances….json); name a COCO file that is elsewhere with --annotations"
        )
    return _read_voc(folder, where[0], classes, stems)


def read_class_list(path: Path) -> tuple[str, ...]:
    """The names in a file with one class name a line.

    Raises:
        ValueError: it names no class, or one twice.
    """
    names = tuple(line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip())
    if not names:
        raise ValueError(f"{path} names no class; one name a line is wanted")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} names {', '.join(twice)} more than once")
    return names


# -- VOC


class _Raw(NamedTuple):
    """What a file says of a photo, not checked yet."""

    source: str  # for messages
    path: Path | None
    size: tuple[int, int] | None
    boxes: list[tuple[str, tuple[float, ...], bool, bool]]  # class, edges, crowd, difficult


def _read_voc(folder: Path, where: Path, classes: Sequence[str] | None, stems: Iterable[str] | None) -> BoxSet:
    files = photos.by_stem(where, (".xml",))
    if stems is not None:
        stems = list(stems)
        lacking = [f"{where / stem}.xml is missing" for stem in stems if stem not in files]
        refuse(folder, lacking)
        files = {stem: files[stem] for stem in stems}
    images: dict[str, Path] = {}
    for name in _IMAGE_FOLDERS:
        if (folder / name).is_dir():
            images = {**photos.by_stem(folder / name), **images}
    offenders: list[str] = []
    raw = []
    for stem, file in files.items():
        try:
            root = read_xml(file)
            path = images.get(stem) or _named_in(root, folder)
            raw.append(_Raw(file.name, path, _voc_size(root), [_voc_box(each) for each in root.findall("object")]))
            if path is None:
                offenders.append(f"{file.name} has no photo {stem}.jpg or the like")
        except ValueError as error:
            offenders.append(f"{file.name}: {error}")
    if classes is None:
        classes = sorted({box[0] for each in raw for box in each.boxes})
    return _checked(folder, raw, classes, offenders)


def read_xml(path: Path) -> ElementTree.Element:
    """The root element of an XML file. A document type is refused, so that no entity can ever be defined or fetched.

    Raises:
        ValueError: it is not XML, or has a document type.
    """
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()

    def refuse_document_type(*_: object) -> None:
        raise ValueError("it declares a document type, which could define entities; remove its <!DOCTYPE …>")

    parser.StartDoctypeDeclHandler = refuse_document_type
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise ValueError(f"it is not whole XML ({error})") from None
    return builder.close()


def _named_in(root: ElementTree.Element, folder: Path) -> Path | None:
    """The photo that the file names itself, where none has its stem."""
    name = (root.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2]
    paths = (folder / each / name for each in _IMAGE_FOLDERS) if name else ()
    return next((path for path in paths if path.is_file()), None)


def _voc_size(root: ElementTree.Element) -> tuple[int, int] | None:
    try:
        size = int(root.findtext("size/width", "0")), int(root.findtext("size/height", "0"))
    except ValueError:
        return None
    return size if min(size) > 0 else None  # some tools write 0


def _voc_box(each: ElementTree.Element) -> tuple[str, tuple[float, ...], bool, bool]:
    name = (each.findtext("name") or "").strip()
    if not name:
        raise ValueError("it has an object without a name")
    try:
        left, top, right, bottom = (float(each.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        raise ValueError(f"an object, {name}, has no bndbox of four numbers") from None
    return name, (left - 1, top - 1, right, bottom), False, (each.findtext("difficult") or "0").strip() == "1"


# -- COCO


def _coco_file(folder: Path) -> Path | None:
    found = [path for name in _JSON_NAMES for path in sorted(folder.glob(name))]
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise ValueError(f"{folder} has several files of boxes: {names}; name one with --annotations")
    return found[0] if found else None


def _read_coco(folder: Path, file: Path, classes: Sequence[str] | None) -> BoxSet:
    images, annotations, categories = _coco_parts(file)
    offenders: list[str] = []
    names: dict[Any, str] = {each["id"]: str(each["name"]).strip() for each in categories}
    where = [folder / name for name in _IMAGE_FOLDERS] + [file.parent, file.parent.parent / "images"]
    raw: dict[Any, _Raw] = {}
    for each in images:
        name = str(each["file_name"])
        if each["id"] in raw:
            offenders.append(f"the images {raw[each['id']].source} and {name} have the same id, {each['id']}")
        path = next((place / name for place in where if (place / name).is_file()), None)
        if path is None:
            offenders.append(f"there is no photo {name}")
        width, height = each.get("width"), each.get("height")
        raw[each["id"]] = _Raw(name, path, (int(width), int(height)) if width and height else None, [])
    empty = []
    for each in annotations:
        which = f"annotation {each.get('id', '(without id)')}"
        if each["image_id"] not in raw:
            offenders.append(f"{which} is of image {each['image_id']}, which is not listed")
        elif each["category_id"] not in names:
            offenders.append(f"{which} is of category {each['category_id']}, which is not listed")
        else:
            try:
                left, top, width, height = map(float, each.get("bbox") or ())
            except (TypeError, ValueError):
                offenders.append(f"{which} has no bbox of four numbers")
                continue
            if 0 in (width, height):
                empty.append(which)
                continue
            edges = (left, top, left + width, top + height)
            raw[each["image_id"]].boxes.append((names[each["category_id"]], edges, bool(each.get("iscrowd")), False))
    if empty:  # COCO's own train2017 has such: not refused, or nobody could train on it
        logger.warning("%s: left aside, with a width or height of 0: %s", file, some(empty))
    if classes is None:
        classes = [name for _, name in sorted(names.items())]
    return _checked(folder, list(raw.values()), classes, offenders)


def _coco_parts(file: Path) -> list[list[dict[str, Any]]]:
    """images, annotations, categories: lists of dicts with the keys that are read."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file of boxes {file}")
    try:
        data = json.loads(file.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    parts = []
    wanted = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id"), "categories": ("id", "name")}
    for name, keys in wanted.items():
        part = data.get(name) if isinstance(data, dict) else None
        if not isinstance(part, list):
            raise ValueError(f"{file} has no list {name!r}; a COCO file has images, annotations and categories")
        for each in part:
            lacking = [key for key in keys if not isinstance(each, dict) or key not in each]
            if lacking:
                raise ValueError(f"{file}: an entry of {name} has no {lacking[0]}: {json.dumps(each)[:80]}")
        parts.append(part)
    return parts


# -- both


def _checked(folder: Path, raw: Sequence[_Raw], classes: Sequence[str], offenders: list[str]) -> BoxSet:
    """The set that `raw` says, or one error with all that is wrong: `offenders`, and what the photos tell."""
    numbers = {name: number for number, name in enumerate(classes)}
    sizes = photos.each(lambda each: None if each.path is None else photos.photo_size(each.path), raw)
    found = []
    for each, size in zip(raw, sizes, strict=True):
        if isinstance(size, str):
            offenders.append(size)
        elif each.path is not None and size is not None:
            if each.size not in (None, size):
                said, seen = (f"{width} × {height}" for width, height in (each.size, size))
                offenders.append(f"{each.source} says {said} pixels, and the upright photo has {seen}")
                continue
            boxes = [_box(each.source, box, size, numbers, offenders.append) for box in each.boxes]
            found.append(Photo(each.path, size, tuple(box for box in boxes if box is not None)))
    refuse(folder, offenders)
    if not found:
        raise ValueError(f"{folder} has no photo with annotations")
    if not any(photo.boxes for photo in found):
        raise ValueError(f"{folder} has {len(found)} photos and no box on any of them")
    return BoxSet(tuple(classes), tuple(found))


def _box(
    source: str,
    box: tuple[str, tuple[float, ...], bool, bool],
    size: tuple[int, int],
    numbers: dict[str, int],
    offend: Callable[[str], None],
) -> Box | None:
    name, edges, crowd, difficult = box
    text = f"{source}: the box of {name!r} at " + ", ".join(f"{edge:g}" for edge in edges)
    if name not in numbers:
        offend(f"{source} has {name!r}, which is not among the classes {', '.join(numbers)}")
        return None
    left, top, right, bottom = edges
    if not all(map(math.isfinite, edges)) or right <= left or bottom <= top:
        offend(f"{text} has no area")
        return None
    width, height = size
    slack = [max(_SLACK_PIXELS, _SLACK_SHARE * side) for side in size]
    if left < -slack[0] or top < -slack[1] or right > width + slack[0] or bottom > height + slack[1]:
        offend(f"{text} is outside the photo's {width} × {height} pixels")
        return None
    left, top, right, bottom = max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)
    if right <= left or bottom <= top:  # all of it was in the slack
        offend(f"{text} has no area within the photo's {width} × {height} pixels")
        return None
    return Box((left, top, float(right), float(bottom)), numbers[name], crowd, difficult)
