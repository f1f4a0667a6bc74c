"""Collections of captioned images as others publish them: folders, WebDataset tars, parquet files, TFDS sets.

A collection is read in units, each by one worker from its beginning to its end. What a unit holds depends on the
collection alone. Nothing in a collection is trusted: a record that is broken, or made to do harm, is told with its
reason, and reading goes on after it.
"""

import gzip
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from tarfile import EmptyHeaderError, EOFHeaderError, HeaderError, ReadError, TruncatedHeaderError  # pyright: ignore
from typing import Any, Literal

from jaxdiff.config import DataConfig, nearest
from jaxdiff.data.captions import Caption
from jaxdiff.data.folders import (
    METADATA,
    TEXT_FIELDS,
    Listing,
    caption_field,
    drawing_parts,
    kind_of,
    list_files,
    list_images,
    read_file,
)
from jaxdiff.data.prepared import Picture
from jaxdiff.data.record import BadRecord
from jaxdiff.data.sources import TFDSSource
from jaxdiff.io.images.decode import SUFFIXES

MAX_BYTES = 64 * 2**20
"""Larger files in a collection are no images or captions to train on."""
MAX_RATIO = 100
"""A compressed archive that unpacks to more than so many times its size, and to `MAX_BYTES`, is a trap."""
TARS, PARQUETS = (".tar", ".tar.gz", ".tgz"), (".parquet",)
IMAGE_FIELDS = ("image", "jpg", "png", "webp", "img", "bytes", "image_bytes", "data")


@dataclass(frozen=True)
class Bad:
    """A record that cannot be used, why in general, and what exactly."""

    name: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class LeftOut:
    """Files that no record has a use for: how many of each kind."""

    kinds: Counter[str]


@dataclass(frozen=True)
class Unit:
    """A part of a collection: a tar, or items [first, last) of a folder, a parquet file (row groups) or a TFDS set."""

    kind: Literal["folder", "tar", "parquet", "tfds"]
    path: str
    first: int = 0
    last: int = 0
    check: str = ""
    """Tells whether the collection is still what it was when it was listed."""


@dataclass(frozen=True)
class Collection:
    """Where a collection is, and where in its records the images and captions are; see `jaxdiff.tools.prepare`."""

    source: str
    split: str = "train"
    image_field: str = ""
    text_field: str = ""
    tfds_dir: str = "data"
    unit_records: int = 5000

    def units(self) -> list[Unit]:
        """All of the collection, in an order that is always the same.

        Raises:
            ValueError: where there is nothing of a kind that can be read.

        """
        if self.source.startswith("tfds:"):
            return self._ranges("tfds", self.source, len(self._tfds()), "")
        path = Path(self.source)
        files = _files(path)
        if not files:
            raise ValueError(f"{self.source} does not exist, or is empty: name a folder, a .tar or .parquet file, "
                             "a pattern such as 'shards/*.tar', or tfds:NAME.")  # fmt: skip
        tars = [file for file in files if file.name.lower().endswith(TARS)]
        parquets = [file for file in files if file.suffix.lower() in PARQUETS]
        if any((path / name).is_file() for name in METADATA) or (path.is_dir() and not tars and not parquets):
            listing = _folder(path, self.text_field)
            if not listing.items:
                others = f", but {listing.others()}" if listing.left_out else ""
                raise ValueError(
                    f"{path} holds no images ({', '.join(sorted(SUFFIXES))}), tars or parquet files{others}."
                )
            check = hashlib.sha256(repr(listing.items).encode("utf-8", "backslashreplace")).hexdigest()[:16]
            return self._ranges("folder", str(path), len(listing.items), check)
        if bool(tars) == bool(parquets):
            what = "both tars and parquet files; name those of one kind by a pattern" if tars else "none of these kinds"
            raise ValueError(f"{self.source} is {what}, such as 'shards/*.tar'.")
        if tars:
            return [Unit("tar", str(file), check=str(file.stat().st_size)) for file in tars]
        return [unit for file in parquets for unit in self._row_groups(file)]

    def left_out(self) -> Counter[str]:
        """The files of a folder that are neither images, captions nor archives to be read, by kind."""
        path = Path(self.source)
        if not path.is_dir():
            return Counter()
        if self.units()[0].kind == "folder":
            return _folder(path, self.text_field).left_out
        files, passed = list_files(path)
        return passed + Counter(kind_of(file) for file in files if not file.lower().endswith((*TARS, *PARQUETS)))

    def read(self, unit: Unit) -> Iterator[Picture | Bad | LeftOut]:
        """The records of a unit; at a tar's end, what it has beside them."""
        if unit.kind == "tar":
            return _read_tar(Path(unit.path), (self.image_field, self.text_field))
        return {"folder": self._read_folder, "parquet": self._read_parquet, "tfds": self._read_tfds}[unit.kind](unit)

    def _ranges(self, kind: Any, path: str, n: int, check: str) -> list[Unit]:
        starts = range(0, n, self.unit_records)
        return [Unit(kind, path, start, min(start + self.unit_records, n), check) for start in starts]

    def _read_folder(self, unit: Unit) -> Iterator[Picture | Bad]:
        root = Path(unit.path)
        within = root.resolve()
        for item in _folder(root, self.text_field).items[unit.first : unit.last]:
            if item.malformed:
                yield Bad(item.name, "its line of metadata makes no sense", item.malformed)
                continue
            try:
                if not all((root / name).resolve().is_relative_to(within) for name in (item.name, item.sidecar)):
                    yield Bad(item.name, "its name leads out of the collection")
                    continue
                yield Picture(item.name, item.read_caption(root), read_file(root / item.name, MAX_BYTES))
            except BadRecord as error:
                yield Bad(item.name, error.reason, error.detail)
            except (OSError, ValueError) as error:  # ValueError: a NUL in the name, or a file that is too large
                yield Bad(item.name, "its file cannot be read", str(error))

    # Parquet

    def _row_groups(self, file: Path) -> Iterator[Unit]:
        """Units of whole row groups, of at least `unit_records` rows but for the last of each file."""
        check = str(file.stat().st_size)
        try:
            metadata = _parquet(file).metadata
        except Exception:  # pyarrow raises several kinds; reading the unit tells
            yield Unit("parquet", str(file), check=check)
            return
        first, rows = 0, 0
        for group in range(metadata.num_row_groups):
            rows += metadata.row_group(group).num_rows
            if rows >= self.unit_records or group == metadata.num_row_groups - 1:
                yield Unit("parquet", str(file), first, group + 1, check)
                first, rows = group + 1, 0

    def _read_parquet(self, unit: Unit) -> Iterator[Picture | Bad]:
        import pyarrow as pa

        path = Path(unit.path)
        try:
            file = _parquet(path)
            names = file.schema_arrow.names
            image = _field(self.image_field, names, IMAGE_FIELDS, f"{path}: --image-field")
            text = _field(self.text_field, names, TEXT_FIELDS, f"{path}: --text-field")
        except Exception as error:  # pyarrow raises several kinds
            yield Bad(path.name, "its parquet file is broken", str(error))
            return
        for group in range(unit.first, unit.last):
            row, name = 0, f"{path.name}/{group}"
            try:
                for batch in file.iter_batches(64, row_groups=[group], columns=[image, text], use_threads=False):
                    pictures, captions = batch.column(image), batch.column(text)
                    if pa.types.is_struct(pictures.type):  # Hugging Face's Image: bytes and path
                        pictures = pictures.field("bytes")
                    for data, words in zip(pictures, _as_bytes(captions), strict=True):
                        yield _picture(f"{name}/{row}", data.as_py(), words.as_py())
                        row += 1
            except Exception as error:  # pyarrow raises several kinds
                yield Bad(f"{name}/{row}", "its parquet file is broken", f"this row group from here on: {error}")

    # TFDS

    def _tfds(self) -> TFDSSource:
        config = DataConfig(source=self.source.removeprefix("tfds:"), root=self.tfds_dir, split=self.split)
        fields = {"image_field": self.image_field, "text_field": self.text_field}
        return TFDSSource(replace(config, **{name: value for name, value in fields.items() if value}))

    def _read_tfds(self, unit: Unit) -> Iterator[Picture | Bad]:
        source = self._tfds()
        for i in range(unit.first, unit.last):
            try:
                record = source.record(i)
                yield Picture(source.name(i), record.caption, record.image)
            except BadRecord as error:
                yield Bad(source.name(i), error.reason, error.detail)


def _files(pattern: Path) -> list[Path]:
    """The files in a folder, the file itself, or those that the pattern fits."""
    if pattern.is_dir():
        return [pattern / name for name in list_files(pattern)[0]]
    if pattern.exists():
        return [pattern]
    anchor = Path(pattern.anchor)
    return sorted(anchor.glob(str(pattern.relative_to(anchor))))


def _field(wanted: str, names: list[str], usual: tuple[str, ...], option: str) -> str:
    """The field that was asked for, or the first usual one that is there."""
    if found := [name for name in ((wanted,) if wanted else usual) if name in names]:
        return found[0]
    raise ValueError(f"{option} is {wanted!r}, and there is no such field{nearest(wanted, names)}" if wanted
                     else f"{option} is not given, and the fields are {', '.join(names)}.")  # fmt: skip


def _picture(name: str, data: Any, text: Any, style: str = "", keywords: tuple[str, ...] = ()) -> Picture | Bad:
    """An image, if its parts are what they should be."""
    if not isinstance(data, bytes):
        return Bad(name, "it has no image")
    if len(data) > MAX_BYTES:
        return Bad(name, "its file is too large", f"{len(data)} bytes")
    try:
        return Picture(name, Caption.of(text, style, keywords), data)
    except BadRecord as error:
        return Bad(name, error.reason, error.detail)


@cache  # a worker reads several units of a folder
def _folder(root: Path, text_field: str) -> Listing:
    return list_images(root, text_field)


# WebDataset


class _Unpacked(io.RawIOBase):
    """What is read of an archive, up to a limit."""

    def __init__(self, stream: Any, limit: int) -> None:
        self._stream, self._left, self._limit = stream, limit, limit

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(min(size, 2**20) if size >= 0 else 2**20)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"it unpacks to more than {self._limit} bytes, {MAX_RATIO} times its size")
        return data


class _Member(tarfile.TarInfo):
    """A member's head; unlike with a plain TarInfo, a damaged one, or none, does not pass for the archive's end."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        whole, tarfile.whole = getattr(tarfile, "whole", False), False
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:  # a block of zeros; another archive may follow
            tarfile.whole = True
            raise
        except HeaderError as error:
            if whole and isinstance(error, EmptyHeaderError | TruncatedHeaderError):  # no block more
                raise EmptyHeaderError(str(error)) from error
            raise ReadError("it is cut off, or damaged") from error


def _read_tar(path: Path, fields: tuple[str, str]) -> Iterator[Picture | Bad | LeftOut]:
    """Members that share their name up to its first dot are one record: an image, and .txt, .caption or .json.

    `fields` name the suffixes of the image and of the caption, or the caption's field in .json; empty, what is usual.
    """
    key, files, n, broken, unused = "", {}, 0, None, Counter[str]()
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            limit = max(MAX_BYTES, MAX_RATIO * os.fstat(file.fileno()).st_size)
            stream: Any = _Unpacked(gzip.GzipFile(fileobj=file), limit) if packed else file
            # As a stream: members come in their order, and nothing of them is written anywhere.
            with tarfile.open(
                fileobj=stream, mode="r|", errors="backslashreplace", tarinfo=_Member, ignore_zeros=True
            ) as archive:
                for member in archive:
                    archive.members = []  # pyright: ignore[reportAttributeAccessIssue]: it would keep them all
                    name = PurePosixPath(member.name)
                    if member.isdir() or name.name.startswith("."):
                        continue
                    stem, _, kind = name.name.partition(".")
                    if (this := str(name.parent / stem)) != key and files:
                        yield _sample(f"{path.name}/{key}", files, fields, unused)
                        n, files = n + 1, {}
                    key, kind = this, kind.lower()
                    files[kind] = "it is there twice" if kind in files else _member(archive, member, name)
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError, MemoryError) as error:
        broken = error
    if files:
        yield _sample(f"{path.name}/{key}", files, fields, unused)
        n += 1
    if broken:
        yield Bad(path.name, "its archive is broken", f"after {n} records: {broken}")
    if unused:
        yield LeftOut(unused)


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, name: PurePosixPath) -> bytes | str:
    """The member's bytes, or why they are not read."""
    if name.is_absolute() or ".." in name.parts:
        return "its name leads out of the collection"
    if not member.isreg() or member.issparse():
        return "it is a link or another special file"
    if member.size > MAX_BYTES:
        return "its file is too large"
    file = archive.extractfile(member)
    assert file is not None  # it is a regular file
    return file.read()


def _sample(name: str, files: dict[str, bytes | str], fields: tuple[str, str], unused: Counter[str]) -> Picture | Bad:
    """The record of the members of one name: their suffixes, and their bytes or why they are not read.

    Adds the members that it has no use for to `unused`.
    """
    data = {kind: value for kind, value in files.items() if isinstance(value, bytes)}
    if wrong := [(value, f".{kind}") for kind, value in files.items() if isinstance(value, str)]:
        return Bad(name, *wrong[0])
    image_field, text_field = fields
    try:
        image = image_field.lower() or _image(data)
        if image not in data:
            return Bad(name, "it has no image", ", ".join(f".{kind}" for kind in data))
        usual = (text_field.lower(), "json") if text_field else ("txt", "caption", "json")
        text = next((kind for kind in usual if kind in data), "")
        unused.update(f".{kind}" for kind in data if kind not in (image, text))
        if text != "json":
            return _picture(name, data[image], data.get(text))
        row = json.loads(data[text].decode("utf-8-sig", "surrogateescape"))  # these, `caption_text` refuses
        return _picture(name, data[image], row.get(caption_field(text_field, row)), *drawing_parts(row))
    except BadRecord as error:
        return Bad(name, error.reason, error.detail)
    except (ValueError, RecursionError, TypeError, AttributeError) as error:
        return Bad(name, "its line of metadata makes no sense", f"{type(error).__name__}: {error}")


def _image(data: dict[str, bytes]) -> str:
    """The suffix of the only plain image, or where none is plain, of the only one; "" where there is none.

    "1.jpg" is plain, "1.depth.png" is not.
    """
    kinds = [kind for kind in data if f".{kind.rpartition('.')[2]}" in SUFFIXES]
    kinds = [kind for kind in kinds if "." not in kind] or kinds
    if len(kinds) > 1:
        raise BadRecord("it has several images: name one by --image-field", ", ".join(kinds))
    return kinds[0] if kinds else ""


def _as_bytes(texts: Any) -> Any:
    """An Arrow array whose strings, or lists of strings, are bytes: one that is not UTF-8 concerns its row alone."""
    import pyarrow as pa

    kind = texts.type
    if pa.types.is_dictionary(kind):
        texts, kind = texts.dictionary_decode(), kind.value_type
    data = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    for is_list, make in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_list(kind):
            return texts.cast(make(data.get(kind.value_type, kind.value_type)))
    return texts.cast(data.get(kind, kind))


def _parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path)
