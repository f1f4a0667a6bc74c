"""Where records come from: the emoji set, a prepared collection, a folder, any TFDS data set, or cached latents."""

import difflib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from jaxdiff.config import DataConfig, nearest
from jaxdiff.data.captions import Caption
from jaxdiff.data.latents import LatentSource
from jaxdiff.data.prepared import PreparedSource
from jaxdiff.data.record import BadRecord, Record, Source
from jaxdiff.io.images.decode import header_size

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def open_source(config: DataConfig, captions: bool = True) -> Source:
    """Opens what `config.source`, `root` and `split` name.

    Args:
        config: says what to open.
        captions: whether records need one; without, images that have none are no bad records.

    Raises:
        ValueError: where it is not there, is empty, or lacks the fields asked for.

    """
    if config.source == "folder":
        return FolderSource(config.root, captions)
    if config.source == "latents":
        return LatentSource(config.root)
    if config.source == "prepared":
        return PreparedSource(config.root)
    return TFDSSource(config, captions)


class TFDSSource:
    """A split of a prepared TFDS data set (ArrayRecord files; no TensorFlow needed)."""

    def __init__(self, config: DataConfig, captions: bool = True) -> None:
        import tensorflow_datasets as tfds  # takes half a second, which the other sources need not pay

        name = config.source
        if name == "emoji":
            name += "/64px" if config.size <= 64 else "/128px"
        prepare = f"python -m jaxdiff.tools.prepare {name.split('/')[0]} --data-dir {config.root}"
        if name == "emoji/128px":
            prepare += " --size 128"
        try:
            builder: Any = tfds.builder(name, data_dir=config.root)
        except ValueError as error:  # TFDS's own message lists every data set there is
            close = difflib.get_close_matches(
                config.source,
                ["emoji", "folder", "latents", "prepared", *tfds.list_builders(with_community_datasets=False)],
                n=1,
            )
            likelier = close and close[0] != config.source
            remedy = f"did you mean {close[0]!r}?" if likelier else f"run `{prepare}`."
            raise ValueError(f"There is no TFDS data set {name!r} in {config.root}: {remedy}") from error
        except ImportError as error:
            raise ValueError(f"The TFDS data set {name!r} cannot be opened: {error}.") from error
        if not builder.info.splits:
            raise ValueError(f"The TFDS data set {name!r} is not prepared in {config.root}: run `{prepare}`.")
        if config.split not in builder.info.splits and "[" not in config.split:
            raise ValueError(f"{name} has no split {config.split!r}{nearest(config.split, list(builder.info.splits))}")
        features: dict[str, Any] = dict(builder.info.features.items())
        self._is_emoji = name.startswith("emoji/")
        self._image, self._text = ("image", "label") if self._is_emoji else (config.image_field, config.text_field)
        self._captions = captions
        wanted: list[tuple[str, str, tuple[Any, ...]]] = [("image_field", self._image, (tfds.features.Image,))]
        if captions:
            wanted.append(("text_field", self._text, (tfds.features.Text, tfds.features.ClassLabel)))
        for option, field, kinds in wanted:
            if not isinstance(features.get(field), kinds):
                able = [key for key, feature in features.items() if isinstance(feature, kinds)]
                raise ValueError(f"{name} has no field {field!r} fit for DataConfig.{option}{nearest(field, able)}")
        feature = features.get(self._text)
        self._class_names = feature.names if isinstance(feature, tfds.features.ClassLabel) else None
        try:
            self._rows: Any = builder.as_data_source(config.split, decoders={self._image: tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise ValueError(
                f"{name} in {config.root} is not in ArrayRecord files: delete it and run `{prepare}`."
            ) from error
        self._name = f"{name} {config.split}"

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Record:
        """The record at a position."""
        try:
            row = self._rows[index]
        except Exception as error:  # a damaged file; ArrayRecord raises several kinds
            raise BadRecord(f"{type(error).__name__}: {error}") from error
        if not self._captions:
            return Record(Caption(""), row[self._image])
        text = row[self._text]
        label = self._class_names[text] if self._class_names else text.decode()
        if not self._is_emoji:
            return Record(Caption(label), row[self._image])
        keywords = tuple(word for word in row["keywords"].decode().split(", ") if word)
        return Record(Caption(label, row["style"].decode(), keywords), row[self._image])

    def name(self, index: int) -> str:
        """The record's name in messages."""
        return f"{self._name} record {index}"

    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """(width, height) of every image; reads every record."""
        if self._is_emoji:
            return np.ones((len(self), 2), np.int64)  # square

        def size(index: int) -> tuple[int, int]:
            try:
                return header_size(self.record(index).image)
            except BadRecord:
                return 0, 0

        return _sizes(size, len(self))


class FolderSource:
    """Images of a user's own.

    Either `metadata.jsonl` holds an object with `file_name` and `text` on each line (and, for drawings on transparent
    ground, a `style` and `keywords` that captions may leave out), or each image has a `.txt` of its name beside it.
    """

    def __init__(self, root: str | Path, captions: bool = True) -> None:
        self._root, self._captions = Path(root), captions
        if not self._root.is_dir():
            raise ValueError(f"{root} is not a folder: DataConfig.root must name one that holds images.")
        metadata = self._root / "metadata.jsonl"
        self._rows = self._from_metadata(metadata) if metadata.is_file() else self._from_sidecars()
        if not self._rows:
            raise ValueError(f"{root} holds no images ({', '.join(sorted(PICTURES))}).")
        if captions and not any(caption.label for _, caption in self._rows):
            raise ValueError(f"{root} holds {len(self._rows)} images and no captions: name them in metadata.jsonl "
                             '({"file_name": ..., "text": ...} on each line), or put a .txt beside each.')  # fmt: skip

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Record:
        """The record at a position."""
        path, caption = self._rows[index]
        if self._captions and not caption.label:
            raise BadRecord("it has no caption")
        try:
            return Record(caption, path.read_bytes())
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise BadRecord(f"it cannot be read: {error}") from error

    def name(self, index: int) -> str:
        """The record's name in messages."""
        return self._rows[index][0].relative_to(self._root).as_posix()

    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """(width, height) of every image; reads the heads of all files."""
        return _sizes(lambda index: header_size(self._rows[index][0]), len(self))

    def _from_metadata(self, metadata: Path) -> list[tuple[Path, Caption]]:
        rows = []
        for number, line in enumerate(metadata.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
            if not line.strip():
                continue
            where = f"{metadata}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {error}.") from error
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise ValueError(f'{where} needs a "file_name" and a "text".')
            name = Path(row["file_name"])
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{where} names {row['file_name']!r}; a name must lie within {self._root}.")
            texts = [row.get(key) or "" for key in ("text", "style")]
            keywords = row.get("keywords") or []
            if not isinstance(keywords, list) or not all(isinstance(text, str) for text in (*texts, *keywords)):
                raise ValueError(f'{where}: "text" and "style" are strings, "keywords" is a list of strings.')
            rows.append((self._root / name, Caption(texts[0].strip(), texts[1].strip(), tuple(keywords))))
        return rows

    def _from_sidecars(self) -> list[tuple[Path, Caption]]:
        rows = []
        for path in sorted(self._root.rglob("*")):
            if path.suffix.lower() in PICTURES:
                text = path.with_suffix(".txt")
                caption = text.read_text(encoding="utf-8", errors="replace") if text.is_file() else ""
                rows.append((path, Caption(" ".join(caption.split()))))
        return rows


def _sizes(size_fn: Callable[[int], tuple[int, int]], n: int) -> Int[np.ndarray, "n 2"]:
    with ThreadPoolExecutor() as pool:
        sizes = tqdm(pool.map(size_fn, range(n)), desc="Reading sizes", total=n, unit=" images", delay=2)
        return np.array(list(sizes), np.int64)
