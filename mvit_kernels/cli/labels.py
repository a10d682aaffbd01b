# SPDX-License-Identifier: Apache-2.0
"""Label files: the names of a classifier's classes, in the formats that are in use."""

from __future__ import annotations

import ast
import codecs
import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_INDEX = ("index", "id", "idx", "class_id", "class_index", "label_id")
_NAME = ("name", "label", "class", "class_name", "label_name")
# Keys under which a JSON object with other contents keeps the names: config.json of Hugging Face and timm, files of
# training scripts.
_INSIDE = (
    *("id2label", "label_names", "idx_to_class", "class_to_idx", "label2id", "class_names", "classes", "labels"),
    *("names", "categories"),
)
_NUMBERED = re.compile(r"\s*(\d+)\s*(?:[:;,\t]|\s)\s*(\S.*)")
_WANTED = "names are wanted as JSON (a list, index to name, name to index), CSV, or text with one name per line"


def read_labels(path: Path) -> dict[int, str]:
    """Read a label file; return class index -> name.

    Supported formats:

    - JSON: a list of names, index to name, name to index (torchvision's ``class_to_idx``), Keras'
      ``imagenet_class_index.json``, the ``config.json`` of Hugging Face and timm; or the same as a Python literal;
    - CSV or TSV with a column of indices and one of names, or with names only;
    - text with one name per line, with or without its index before it.

    Raises:
        ValueError: the file has none of these formats, or its indices are not 0, 1, 2, …
        OSError: the file cannot be read.
    """
    text = _decode(path)
    if text.lstrip().startswith(("{", "[")):
        labels = _from_data(path, _parse(path, text))
    elif path.suffix.lower() in (".yaml", ".yml"):
        raise ValueError(f"{path} is YAML; {_WANTED}")
    elif path.suffix.lower() in (".csv", ".tsv"):
        labels = _from_table(path, text)
    else:
        labels = _from_lines(path, text)
    if not labels:
        raise ValueError(f"{path} has no labels in it; {_WANTED}")
    if labels.keys() != set(range(len(labels))):
        raise ValueError(
            f"{path} does not name the classes 0, 1, 2, … one by one; its keys begin {sorted(labels)[:3]}; {_WANTED}"
        )
    return labels


def read_names(path: Path | None) -> list[str] | None:
    """The names in a label file by class index; None for no file. Raises as `read_labels` does."""
    if path is None:
        return None
    labels = read_labels(path)
    return [labels[index] for index in range(len(labels))]


def _decode(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 as Windows writes it, without a byte order mark."""
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; {_WANTED}") from None


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        try:
            return ast.literal_eval(text.strip())  # ImageNet's names are also distributed as {0: 'tench', …}
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"{path} is not valid JSON: {error}") from None


def _from_data(path: Path, data: Any) -> dict[int, str]:
    if isinstance(data, Mapping):
        inside = next((name for name in _INSIDE if isinstance(data.get(name), Mapping | list)), None)
        if inside is not None:
            labels = _from_data(path, data[inside])
            described = data.get("label_descriptions")  # timm's: name -> description
            if isinstance(described, Mapping):
                labels = {index: str(described.get(name, name)) for index, name in labels.items()}
            return labels
        if data and all(_is_index(value) for value in data.values()):
            return _numbered(path, [(index, name) for name, index in data.items()])
        return _numbered(path, list(data.items()))
    if isinstance(data, Sequence) and data and all(isinstance(each, Mapping) for each in data):
        columns = {str(key).lower(): key for each in data for key in each}
        index, name = (next((columns[k] for k in names if k in columns), None) for names in (_INDEX, _NAME))
        return _numbered(path, [(each.get(index, i), each.get(name)) for i, each in enumerate(data)])
    return _numbered(path, list(enumerate(data)))


def _from_table(path: Path, text: str) -> dict[int, str]:
    rows = [row for row in csv.reader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ",") if any(row)]
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    index = next((head.index(name) for name in _INDEX if name in head), None)
    name = next((head.index(each) for each in _NAME if each in head), None)
    if index is not None or name is not None:
        rows = rows[1:]
    if any(len(row) != len(head) for row in rows):
        raise ValueError(f"{path} has rows of different lengths; {_WANTED}")
    if index is None and len(head) > 1:
        index = next((i for i in range(len(head)) if all(row[i].strip().isdecimal() for row in rows)), None)
    if name is None:
        others = [i for i in range(len(head)) if i != index]
        if len(others) != 1:
            raise ValueError(f"{path} has {len(head)} columns, and none is called name or label; {_WANTED}")
        name = others[0]
    return _numbered(path, [(i if index is None else row[index], row[name].strip()) for i, row in enumerate(rows)])


def _from_lines(path: Path, text: str) -> dict[int, str]:
    lines = text.rstrip().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if lines == [""]:
        return {}
    empty = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
    if empty is not None:
        raise ValueError(f"{path}: line {empty} is empty and names no class; {_WANTED}")
    numbered = [(match[1], match[2]) for line in lines if (match := _NUMBERED.fullmatch(line.strip()))]
    if len(numbered) == len(lines) and {int(index) for index, _ in numbered} == set(range(len(lines))):
        return _numbered(path, numbered)
    return {index: line.strip() for index, line in enumerate(lines)}


def _numbered(path: Path, pairs: Sequence[tuple[Any, Any]]) -> dict[int, str]:
    """index -> name from pairs, with both types checked and repeated indices rejected."""
    labels: dict[int, str] = {}
    for index, name in pairs:
        if isinstance(name, list | tuple) and name and all(isinstance(each, str) for each in name):
            name = name[-1]  # Keras: the WordNet ID, then the name
        if not isinstance(name, str):
            raise ValueError(f"{path} has {name!r:.40} instead of a label name; {_WANTED}")
        if not (_is_index(index) or (isinstance(index, str) and index.strip().isdecimal())):
            raise ValueError(f"{path} does not name the classes 0, 1, 2, …; among its keys is {index!r:.40}; {_WANTED}")
        if int(index) in labels:
            raise ValueError(f"{path} has the index {int(index)} twice among its labels")
        labels[int(index)] = name
    return labels


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
