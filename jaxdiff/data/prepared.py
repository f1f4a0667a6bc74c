"""Collections that were prepared (`python -m jaxdiff.tools.prepare collect`): shards of records, and one index.

A folder holds `index.json` (what there is, written last), `sizes.npy` (int32 [n, 2], width and height of every
image) and the shards. A record is a line of JSON (the caption's parts, the sizes, the name in its collection), and
the bytes of the image's file.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxdiff.config import load_json
from jaxdiff.data.captions import Caption
from jaxdiff.data.files import open_records
from jaxdiff.data.record import BadRecord, Record

INDEX, SIZES, REPORT = "index.json", "sizes.npy", "report.json"
VERSION = 1


@dataclass(frozen=True)
class Picture:
    """An image of a collection: its file's bytes, what is said of it, and what it is called there."""

    name: str
    caption: Caption
    data: bytes
    width: int = 0
    height: int = 0

    def pack(self) -> bytes:
        """The record of it."""
        head = {"name": self.name, "width": self.width, "height": self.height} | vars(self.caption)
        return json.dumps(head, ensure_ascii=False).encode() + b"\n" + self.data

    @classmethod
    def unpack(cls, record: bytes) -> "Picture":
        """What `pack` packed."""
        head, _, data = record.partition(b"\n")
        values = json.loads(head)
        name, width, height = (values.pop(key) for key in ("name", "width", "height"))
        return cls(name, Caption.unpack(values), data, width, height)


class PreparedSource:
    """A prepared collection.

    Raises:
        ValueError: where it is not there, not whole, or damaged so that it cannot be opened.

    """

    def __init__(self, root: str | Path) -> None:
        self._root = root = Path(root)
        if not (root / INDEX).is_file():
            raise ValueError(f"{root} holds no prepared collection: DataConfig.root must name a folder that `python -m "
                             "jaxdiff.tools.prepare collect` has finished.")  # fmt: skip
        index = load_json(root / INDEX)
        if index.get("version") != VERSION:
            raise ValueError(
                f"{root / INDEX} has the version {index.get('version')!r}, not {VERSION}: prepare it anew."
            )
        self._shards = [root / name for name in index["shards"]]
        self._ends = np.cumsum(list(index["shards"].values()))
        try:
            self._sizes = np.load(root / SIZES, mmap_mode="r")
            self._rows = open_records(self._shards)
        except (OSError, ValueError) as error:
            raise ValueError(f"{root} is not whole: {error} Prepare the collection anew.") from error
        if not len(self._rows) == len(self._sizes) == index["records"] == self._ends[-1]:
            raise ValueError(f"{root} has {len(self._rows)} records, {len(self._sizes)} sizes and an index of "
                             f"{index['records']}: several collections are mixed. Prepare it anew.")  # fmt: skip

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Record:
        """The record at a position."""
        try:
            picture = Picture.unpack(self._rows[index])
        except Exception as error:  # a damaged file; ArrayRecord raises several kinds
            raise BadRecord("its file is damaged", f"{type(error).__name__}: {error}") from error
        return Record(picture.caption, picture.data)

    def name(self, index: int) -> str:
        """The record's name in messages."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self._shards[shard]} record {index - (int(self._ends[shard - 1]) if shard else 0)}"

    def summary(self) -> str:
        """How many images there are; `report.json` beside them says what was left out."""
        return f"{self._root}: {len(self)} images with captions ({self._root / REPORT} says what was left out)"

    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """(width, height) of every image."""
        return np.asarray(self._sizes, np.int64)
