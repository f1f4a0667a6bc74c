"""Folders of images: which files there are, which caption belongs to which image, and what is left out."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jaxdiff.config import nearest
from jaxdiff.data.bad import BadRecord
from jaxdiff.data.captions import Caption
from jaxdiff.io.images.decode import SUFFIXES

METADATA = ("metadata.jsonl", "metadata.csv")
SIDECARS = (".txt", ".caption")
"""What files beside an image, of its name, hold its caption; the first that is there."""
TEXT_FIELDS = ("caption", "text", "txt", "prompt", "title", "captions", "texts")
"""What the field of the captions is called where nobody says; the first that is there."""
MAX_CAPTION_BYTES = 2**20
_OTHER_IMAGES = frozenset({".heic", ".heif", ".hif", ".jxl", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".nef", ".arw"})


@dataclass(frozen=True)
class Item:
    """An image that a folder has, and its caption, the file that holds it, or why there is none."""

    name: str
    """Its file's name in the folder; of a line of metadata that makes no sense, that line's place."""
    caption: Caption | None = None
    sidecar: str = ""
    bad: tuple[str, str] | None = None
    """Reason and detail."""
    malformed: str = ""
    """What is wrong with its line of metadata."""

    def read_caption(self, root: Path) -> Caption:
        """The caption.

        Raises:
            BadRecord: where it has none that can be used.

        """
        if self.bad or not (self.caption or self.sidecar):
            raise BadRecord(*(self.bad or ("it has no caption",)))
        if self.caption:
            return self.caption
        try:
            return Caption.of(read_file(root / self.sidecar, MAX_CAPTION_BYTES))
        except (OSError, ValueError) as error:
            raise BadRecord("its caption cannot be read", str(error)) from error


@dataclass(frozen=True)
class Listing:
    """The images of a folder, and how many other files of which kind it has."""

    items: list[Item]
    left_out: Counter[str]

    def others(self) -> str:
        """What was left out: "3 .heic, 1 .mp4", and what to do about it."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.left_out.items()))
        fit = sorted(kind for kind in self.left_out if kind in _OTHER_IMAGES)
        return f"{kinds} (save {', '.join(fit)} as PNG or JPEG to use them)" if fit else kinds


def list_images(root: Path, text_field: str = "") -> Listing:
    """The images that `metadata.jsonl` or `metadata.csv` names; where there is neither, all images there are.

    Raises:
        ValueError: where there are both, or the one cannot be read as a whole.

    """
    files, left_out = list_files(root)
    metadata = [name for name in METADATA if (root / name).is_file()]
    if len(metadata) > 1:
        raise ValueError(f"{root} holds {' and '.join(metadata)}: remove one of them.")
    if metadata:
        items = list(_read_metadata(root / metadata[0], text_field))
        named = {PurePosixPath(item.name).as_posix() for item in items} | {metadata[0]}
        others = Counter(kind_of(name) for name in files if name not in named)
        for kind in SUFFIXES & others.keys():
            left_out[f"{kind} that {metadata[0]} does not name"] = others.pop(kind)
        return Listing(items, left_out + others)

    captions: dict[str, dict[str, str]] = {}
    for name in files:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in SIDECARS:
            captions.setdefault(stem, {})[suffix.lower()] = name  # of several, the last in order: in lower case
    items = []
    for name in files:
        if kind_of(name) in SUFFIXES:
            found = captions.get(os.path.splitext(name)[0], {})
            items.append(Item(name, sidecar=next((found[suffix] for suffix in SIDECARS if suffix in found), "")))
    used = {item.sidecar for item in items}
    return Listing(items, left_out + Counter(kind_of(name) for name in files
                                             if name not in used and kind_of(name) not in SUFFIXES))  # fmt: skip


def list_files(root: Path) -> tuple[list[str], Counter[str]]:
    """The names of all files in a folder, in order, those of linked folders included; and what is passed by, by kind.

    That are hidden files and folders, links that lead nowhere, and folders that were read already under another name.
    The files of a prepared collection, which may lie in the folder that it was made of, do not count at all.
    """
    names, passed, seen, folders = [], Counter[str](), set(), [""]
    while folders:
        within = folders.pop()
        if (real := os.path.realpath(root / within)) in seen:
            passed["linked twice"] += 1
            continue
        seen.add(real)
        try:
            with os.scandir(root / within) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError:
            passed["unreadable"] += 1
            continue
        if any(".array_record" in entry.name for entry in entries):
            entries = [entry for entry in entries if _type(entry) == "folder"]
        below = []
        for entry in entries:
            path, kind = f"{within}{entry.name}", "hidden" if entry.name.startswith(".") else _type(entry)
            if kind == "file":
                names.append(path)
            elif kind == "folder":
                below.append(f"{path}/")
            else:
                passed[kind] += 1
        folders += reversed(below)
    return sorted(names, key=lambda name: name.split("/")), passed


def _type(entry: "os.DirEntry[str]") -> str:
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link to itself
        pass
    return "links that lead nowhere, and special files"


def read_file(path: Path, most: int) -> bytes:
    """A file's bytes; raises ValueError where they are more than `most`, and OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"it has {size} bytes, more than {most}")
        return file.read(most)


def kind_of(name: str) -> str:
    """The suffix of a file's name, in lower case."""
    return printable(os.path.splitext(name)[1].lower()) or "without a suffix"


def printable(name: str) -> str:
    """A file's name as messages can have it: names can hold bytes that are no text."""
    return name.encode("utf-8", "backslashreplace").decode()


def caption_field(wanted: str, names: Any) -> str:
    """The field of the caption: the one that is wanted, else the first usual one that is there; "" where none is."""
    return next((name for name in ((wanted,) if wanted else TEXT_FIELDS) if name in names), "")


def drawing_parts(row: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The style and the keywords in a row of metadata; raises TypeError where they are of another kind."""
    style, keywords = row.get("style") or "", row.get("keywords") or []
    if not isinstance(style, str) or not isinstance(keywords, list) or not all(isinstance(k, str) for k in keywords):
        raise TypeError('needs a string as its "style", and a list of strings as its "keywords"')
    return style, tuple(keywords)


def _read_metadata(file: Path, text_field: str) -> Iterator[Item]:
    data = file.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        raise ValueError(f"{file} is not UTF-8, but UTF-16 perhaps: save it as UTF-8.")
    # What is no UTF-8 concerns its own line alone, where `caption_text` finds it.
    text = data.decode("utf-8-sig", "surrogateescape")
    return _read_csv(text, file, text_field) if file.suffix == ".csv" else _read_lines(text, file.name, text_field)


def _read_lines(text: str, file: str, text_field: str) -> Iterator[Item]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
            row = row if isinstance(row, dict) else {}
            style, keywords = drawing_parts(row)
        except (ValueError, RecursionError) as error:
            yield Item(where, malformed=f"is not JSON: {error}")
        except TypeError as error:
            yield Item(where, malformed=str(error))
        else:
            yield _item(row, where, text_field, style, keywords)


def _read_csv(text: str, file: Path, text_field: str) -> Iterator[Item]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [name.strip() for name in next(rows, [])]
        if len(set(columns)) < len(columns):
            raise ValueError(f"{file} has a column twice: {', '.join(columns)}.")
        if "file_name" not in columns:
            raise ValueError(f'{file} needs a column "file_name", and has {", ".join(columns)}.')
        if not caption_field(text_field, columns):
            wanted = f"a column {text_field!r}{nearest(text_field, columns)}" if text_field else "a column of captions."
            raise ValueError(f"{file} lacks {wanted}")
        for row in rows:
            where = f"{file.name}, line {rows.line_num}"
            if not row:
                continue
            if len(row) != len(columns):
                yield Item(where, malformed=f"has {len(row)} values for {len(columns)} columns: quote what has commas")
                continue
            yield _item(dict(zip(columns, row, strict=True)), where, text_field)
    except csv.Error as error:
        yield Item(f"{file.name}, line {rows.line_num}", malformed=f"is not CSV: {error}")


def _item(row: dict[str, Any], where: str, text_field: str, style: str = "", keywords: tuple[str, ...] = ()) -> Item:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        return Item(where, malformed='needs a "file_name" and a caption')
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return Item(where, malformed=f"names {name!r}; a name must lie within the folder")
    try:
        return Item(name, Caption.of(row.get(caption_field(text_field, row)), style, keywords))
    except BadRecord as error:
        return Item(name, bad=(error.reason, error.detail))
