"""Latents that are encoded once, for several variants of each image, and then read in place of the images.

The cache is a folder of parts, `part-00000-of-00012.array_record`. Which records a part holds depends on the data
alone, so any number of processes can make them side by side, and a part that is there is never made again. The last
record of a part is its index.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from jaxdiff.config import DataConfig
from jaxdiff.data.bad import BadRecords
from jaxdiff.data.buckets import nearest_shapes
from jaxdiff.data.captions import Caption
from jaxdiff.data.files import new_records, open_records
from jaxdiff.data.images import Cut, prepare, to_float
from jaxdiff.data.record import BadRecord, Record, Source

PART_RECORDS = 1024
"""Latents in a part, as long as this makes no more than `MAX_PARTS`."""
MAX_PARTS = 512
MAX_ENCODED = 64
"""Images, or captions, that are encoded at once; no more than a batch has."""

TextFn = Callable[[list[str]], tuple[np.ndarray, ...]]
"""Captions -> their features [b, t, d] and, of models that read such, vectors [b, p] for each as a whole."""

_PART = re.compile(r"part-(\d{5})-of-(\d{5})\.array_record")


class LatentSource:
    """Records that `cache_latents` wrote into a folder.

    Raises:
        ValueError: where parts are missing or damaged; it names them.

    """

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)
        found = {int(m[1]): int(m[2]) for path in self._root.glob("part-*") if (m := _PART.fullmatch(path.name))}
        if not found:
            raise ValueError(f"{root} holds no cached latents: DataConfig.root must name a folder of latents that a "
                             "diffusion run with latent_variants wrote.")  # fmt: skip
        n_parts = max(found.values())
        self._parts = [_part(self._root, i, n_parts) for i in range(n_parts)]
        missing = [path.name for path in self._parts if not path.is_file()]
        if missing:
            raise ValueError(f"{root} lacks {', '.join(missing[:3])} and in all {len(missing)} of its {n_parts} parts: "
                             "the run that makes it was broken off; the same command goes on with it.")  # fmt: skip
        self._rows, indices = _open(self._parts)
        self._ends = np.cumsum([len(index["shapes"]) for index in indices])
        self._sizes = np.array([shape[1::-1] for index in indices for shape in index["shapes"]], np.int64)
        if not len(self):
            raise ValueError(f"{root} holds no latents.")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def record(self, index: int) -> Record:
        """The record at a position."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        try:
            return _unpack(self._rows[index + part])  # before it lie the indices of so many parts
        except Exception as error:  # a damaged file; ArrayRecord raises several kinds
            reason = f"{type(error).__name__}: {error}; delete this part, and the run's start makes it anew"
            raise BadRecord(reason) from error

    def name(self, index: int) -> str:
        """The record's name in messages."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self._parts[part]} record {index - (int(self._ends[part - 1]) if part else 0)}"

    def summary(self) -> str:
        """How many latents there are."""
        return f"{self._root}: {len(self)} latents with captions"

    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """(width, height) of every record's latents."""
        return self._sizes


class _Prepared(NamedTuple):
    """What waits to be encoded."""

    image: np.ndarray
    caption: Caption
    cut: Cut
    texts: list[str]
    """Captions that were drawn."""


def cache_latents(
    encode_fn: Callable[[np.ndarray], np.ndarray],
    config: DataConfig,
    source: Source,
    folder: str | Path,
    *,
    variants: int,
    seed: int,
    dtype: str = "float16",
    text_fn: TextFn | None = None,
    text_variants: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> int:
    """Encodes `variants` augmentations of every record of `source` into parts in `folder`, this process every n-th.

    The captions' parts are kept, so that captions are still composed anew at every reading, unless `text_variants`
    drawn captions of each latent are encoded, too. So is each image's `Cut`.

    Args:
        encode_fn: float32 images [b, h, w, 3] in [-1, 1], of one of `config.shapes`, -> moments [b, h/f, w/f, 2c];
            always called with the same b (the last images are filled up with copies).
        config: Says how the images are cropped, flipped and batched.
        source: Records with images.
        folder: Each part is written beside its place there and moved into it when it is whole.
        variants: Augmentations (background, crop, flip) of each image.
        seed: Fixes the augmentations.
        dtype: `float16` or `float32`, of the moments and the contexts in the files.
        text_fn: Captions -> what the text encoders make of them; b is that of `encode_fn`.
        text_variants: Captions that are drawn for each latent and encoded.
        process_index: Makes parts i, i + n, i + 2 n, ...
        process_count: n. All processes must be done before a `LatentSource` is opened.

    Returns:
        The number of records that could not be read; they are not in this process's parts.

    Raises:
        ValueError: where there are more of them than `config.max_bad_share` allows, or a part is damaged.

    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    total = variants * len(source)
    length = max(PART_RECORDS, math.ceil(total / MAX_PARTS))
    n_parts = math.ceil(total / length)
    bad = BadRecords(len(source), config.max_bad_share)
    bucket = nearest_shapes(source.sizes(), config.shapes) if config.aspects else np.zeros(len(source), int)
    size = min(config.batch_size, MAX_ENCODED)

    def make(path: Path, items: range) -> None:
        skipped: dict[str, str] = {}
        shapes: list[tuple[int, ...]] = []
        waiting: list[list[_Prepared]] = [[] for _ in config.shapes]
        with new_records(path) as writer:

            def flush(batch: list[_Prepared]) -> None:
                images = np.stack([one.image for one in batch] + [batch[-1].image] * (size - len(batch)))
                moments = np.asarray(encode_fn(to_float(images))).astype(dtype)
                texts = list(dict.fromkeys(text for one in batch for text in one.texts))
                encoded = dict(zip(texts, _encode_texts(text_fn, texts, size, dtype), strict=True))
                for row, one in zip(moments, batch, strict=False):
                    writer.write(_pack(row, one, encoded))
                    shapes.append(row.shape)
                batch.clear()

            for item in items:
                variant, index = divmod(item, len(source))
                batch = waiting[bucket[index]]
                try:
                    rng = np.random.default_rng([seed, variant, index])
                    image, caption, cut = prepare(source.record(index), rng, config, config.shapes[bucket[index]])
                    draws = [np.random.default_rng([seed, variant, index, k]) for k in range(text_variants)]
                    batch.append(_Prepared(image, caption, cut, [caption.draw(rng) for rng in draws]))
                except BadRecord as error:
                    skipped[source.name(index)] = str(error)
                    bad.add((source.name(index), str(error)))
                if len(batch) == size:
                    flush(batch)
                progress.update()
            for batch in filter(None, waiting):
                flush(batch)
            writer.write(json.dumps({"shapes": shapes, "bad": skipped}).encode())

    with tqdm(total=total, desc="Latents", unit=" images", disable=process_index > 0) as progress:
        for part in range(n_parts):
            path, items = _part(folder, part, n_parts), range(total)[part * length : (part + 1) * length]
            if path.exists():
                bad.add(*_open([path])[1][0]["bad"].items())
                progress.update(len(items))
            elif part % process_count == process_index:
                for leftover in folder.glob(f"{path.name}.*"):  # of a process that was killed
                    leftover.unlink()
                make(path, items)
    return len(bad)


def identity(source: Source, at_most: int | None = None, process_index: int = 0, process_count: int = 1) -> int:
    """A number of 256 bits that differs where a caption or an image does, wherever the data lie.

    It is a sum over the records, so that processes share the reading: the sum over all of them, modulo 2^256, is the
    identity, and the same for any number of them.

    Args:
        source: any records, cached latents included.
        at_most: so many records are read, evenly spread; None reads all of them.
        process_index: reads records i, i + n, i + 2 n, ... of these.
        process_count: n.
    """
    n = len(source)
    chosen = range(n) if at_most is None or n <= at_most else np.linspace(0, n - 1, at_most).astype(int).tolist()
    mine = chosen[process_index::process_count]

    def digest(index: int) -> int:
        found = hashlib.sha256(f"{index} of {n}".encode())
        try:
            record = source.record(index)
            arrays = [array for array in (record.moments, *record.contexts, *record.pooled) if array is not None]
            caption = repr(record.caption).encode("utf-8", "backslashreplace")
            parts = [caption, record.image, *(array.tobytes() for array in arrays)]
        except BadRecord:
            parts = [b"bad"]
        for part in parts:
            found.update(len(part).to_bytes(8))
            found.update(part)
        return int.from_bytes(found.digest())

    def digests(some: Sequence[int]) -> int:
        total = sum(map(digest, some))
        progress.update(len(some))
        return total

    chunks = [mine[start : start + 64] for start in range(0, len(mine), 64)]
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(mine), desc="Comparing data", unit=" records", delay=2, disable=process_index > 0) as progress,
    ):
        return sum(pool.map(digests, chunks)) % 2**256


def _part(folder: Path, part: int, n_parts: int) -> Path:
    return folder / f"part-{part:05}-of-{n_parts:05}.array_record"


def _open(parts: list[Path]) -> tuple[Any, list[dict[str, Any]]]:
    """The records of whole parts, and the parts' indices."""
    remedy = "Delete it, and the run's start makes it anew."
    try:
        rows, indices = open_records(parts), []
    except ValueError as error:
        raise ValueError(f"{error} {remedy}") from error
    lengths = [len(open_records([path])) for path in parts] if len(parts) > 1 else [len(rows)]
    for path, end in zip(parts, np.cumsum(lengths), strict=True):
        try:
            index = json.loads(rows[int(end) - 1])
            indices.append({"shapes": index["shapes"], "bad": index["bad"]})
        except Exception as error:  # ArrayRecord raises several kinds
            raise ValueError(f"{path} is damaged, or no part of cached latents ({error}). {remedy}") from error
    return rows, indices


def _encode_texts(text_fn: TextFn | None, texts: list[str], size: int, dtype: str) -> list[tuple[np.ndarray, ...]]:
    """What the text encoders make of each text, `size` at a time."""
    out: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(texts), size):
        batch = texts[start : start + size]
        assert text_fn is not None
        found = text_fn(batch + [""] * (size - len(batch)))
        out += zip(*(np.asarray(rows).astype(dtype)[: len(batch)] for rows in found), strict=True)
    return out


def _pack(moments: np.ndarray, one: _Prepared, encoded: dict[str, tuple[np.ndarray, ...]]) -> bytes:
    """A line of JSON, the moments' bytes, and those of what the texts that differ were encoded to."""
    head = {"shape": moments.shape, "dtype": str(moments.dtype), "cut": one.cut} | vars(one.caption)
    different = list(dict.fromkeys(one.texts))
    if different:
        shapes = [array.shape for array in encoded[different[0]]]
        head["texts"] = {"shapes": shapes, "which": [different.index(text) for text in one.texts]}
    arrays = [moments, *(array for text in different for array in encoded[text])]
    return json.dumps(head).encode() + b"\n" + b"".join(array.tobytes() for array in arrays)


def _unpack(data: bytes) -> Record:
    head, _, arrays = data.partition(b"\n")
    values = json.loads(head)
    shape, dtype, cut, texts = (values.pop(name, ()) for name in ("shape", "dtype", "cut", "texts"))
    flat = np.frombuffer(arrays, dtype)
    moments, rest = flat[: math.prod(shape)].reshape(shape), flat[math.prod(shape) :]
    record = Record(Caption.unpack(values), moments=moments, numbers=tuple(cut))
    if not texts:
        return record
    lengths = [math.prod(shape) for shape in texts["shapes"]]
    parts = np.split(rest.reshape(-1, sum(lengths)), np.cumsum(lengths)[:-1], axis=1)
    contexts, *pooled = (part.reshape(-1, *shape) for part, shape in zip(parts, texts["shapes"], strict=True))
    drawn = [tuple(rows[i] for i in texts["which"]) for rows in (contexts, *pooled)]
    return replace(record, contexts=drawn[0], pooled=drawn[1] if pooled else ())
