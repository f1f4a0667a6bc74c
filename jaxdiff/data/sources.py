"""Where records come from: the emoji set, a prepared collection, a folder, any TFDS data set, or cached latents."""

import difflib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from jaxdiff.config import DataConfig, nearest
from jaxdiff.data.captions import Caption
from jaxdiff.data.folders import Item, list_images, printable
from jaxdiff.data.latents import LatentSource
from jaxdiff.data.prepared import PreparedSource
from jaxdiff.data.record import BadRecord, Record, Source
from jaxdiff.io.images.decode import SUFFIXES, header_size


def open_source(config: DataConfig, captions: bool = True) -> Source:
    """Opens what `config.source`, `root` and `split` name.

    Args:
        config: says what to open.
        captions: whether records need one; without, images that have none are no bad records.

    Raises:
        ValueError: where it is not there, is empty, or lacks the fields asked for.

    """
    if config.source == "folder":
        # The field that is asked for by default is that of TFDS sets.
        field = "" if config.text_field == DataConfig.text_field else config.text_field
        return FolderSource(config.root, field, captions)
    if config.source == "latents":
        return LatentSource(config.root)
    if config.source == "prepared":
        return PreparedSource(config.root)
    return TFDSSource(config, captions)


def summary(source: Source) -> str:
    """How many images and captions a source holds, and what was left out, by kind; reads nothing."""
    own: Any = getattr(source, "summary", None)  # which sources of one's own need not have
    return own() if own else f"{len(source)} records"


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
            kinds = tfds.features.Text, tfds.features.ClassLabel, tfds.features.Sequence
            wanted.append(("text_field", self._text, kinds))
        for option, field, kinds in wanted:
            if not _is(features.get(field), kinds):
                able = [key for key, feature in features.items() if _is(feature, kinds)]
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
            raise BadRecord("its file is damaged", f"{type(error).__name__}: {error}") from error
        if not self._captions:
            return Record(Caption(""), row[self._image])
        text = row[self._text]
        if self._class_names:
            if not 0 <= text < len(self._class_names):  # -1 stands for "not known" in splits without labels
                raise BadRecord("its label is none of the classes", f"{text} of {len(self._class_names)}")
            text = self._class_names[text]
        if not self._is_emoji:
            return Record(Caption.of(text), row[self._image])
        keywords = [word for word in row["keywords"].split(b", ") if word]
        return Record(replace(Caption.of(text, row["style"], keywords), drawing=True), row[self._image])

    def name(self, index: int) -> str:
        """The record's name in messages."""
        return f"{self._name} record {index}"

    def summary(self) -> str:
        """How many images there are, and what their captions are."""
        kind = f"the names of {len(self._class_names)} classes" if self._class_names else f"{self._text!r}"
        return f"{self._name}: {len(self)} images, captioned by {kind}"

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

    Either `metadata.jsonl` or `metadata.csv` names them in `file_name`, and their captions in `text_field` (where that
    is empty, in the first of `TEXT_FIELDS`), or each image has a `.txt` or `.caption` of its name beside it. On a line
    of JSON the caption may be a list, and a `style` and `keywords` may complete it, which drawn captions leave out at
    times. Without metadata, all images are found, those in linked folders, too.
    """

    def __init__(self, root: str | Path, text_field: str = "", captions: bool = True) -> None:
        self._root = Path(root)
        if not self._root.is_dir():
            raise ValueError(f"{root} is not a folder: DataConfig.root must name one that holds images.")
        listing = list_images(self._root, text_field)
        if not listing.items:
            others = f", but {listing.others()}" if listing.left_out else ""
            raise ValueError(f"{root} holds no images ({', '.join(sorted(SUFFIXES))}){others}.")
        if malformed := next((item for item in listing.items if item.malformed), None):
            raise ValueError(f"{self._root / malformed.name} {malformed.malformed}.")
        self._listing = listing
        self._captions = [self._caption(item) if captions else Caption("") for item in listing.items]
        if not any(isinstance(caption, Caption) for caption in self._captions):
            raise ValueError(f"{root} holds {len(self)} images and no captions that can be used ({self._wrong()}): "
                             'name them in metadata.jsonl, as {"file_name": ..., "text": ...} on each line, or put '
                             "a .txt beside each.")  # fmt: skip

    def __len__(self) -> int:
        return len(self._captions)

    def record(self, index: int) -> Record:
        """The record at a position."""
        caption = self._captions[index]
        if isinstance(caption, BadRecord):
            raise BadRecord(caption.reason, caption.detail)
        try:
            return Record(caption, self._path(index).read_bytes())
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise BadRecord("it cannot be read", str(error)) from error

    def name(self, index: int) -> str:
        """The record's name in messages."""
        return printable(self._listing.items[index].name)

    def summary(self) -> str:
        """How many images and captions there are, what is wrong with others, and what was left out, by kind."""
        n = sum(isinstance(caption, Caption) for caption in self._captions)
        text = f"{self._root}: {len(self)} images, {n} with captions"
        if n < len(self):
            text += f" ({self._wrong()})"
        return text + (f"; left out: {self._listing.others()}" if self._listing.left_out else "")

    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """(width, height) of every image; reads the heads of all files."""
        return _sizes(lambda index: header_size(self._path(index)), len(self))

    def _path(self, index: int) -> Path:
        return self._root / self._listing.items[index].name

    def _caption(self, item: Item) -> Caption | BadRecord:
        try:
            return item.read_caption(self._root)
        except BadRecord as error:
            return BadRecord(error.reason, error.detail)  # without a traceback, which would hold memory

    def _wrong(self) -> str:
        """How many captions cannot be used for which reason, and the first of each."""
        bad = [(caption.reason, i) for i, caption in enumerate(self._captions) if isinstance(caption, BadRecord)]
        first = {reason: self.name(i) for reason, i in reversed(bad)}
        return "; ".join(
            f"{count} times {reason}, as of {first[reason]}" for reason, count in Counter(r for r, _ in bad).items()
        )


def _is(feature: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a TFDS feature is of one of the kinds; of sequences, those of texts alone are."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Sequence) and not isinstance(feature.feature, tfds.features.Text):
        return False
    return isinstance(feature, kinds)


def _sizes(size_fn: Callable[[int], tuple[int, int]], n: int) -> Int[np.ndarray, "n 2"]:
    with ThreadPoolExecutor() as pool:
        sizes = tqdm(pool.map(size_fn, range(n)), desc="Reading sizes", total=n, unit=" images", delay=2)
        return np.array(list(sizes), np.int64)
