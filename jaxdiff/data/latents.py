"""Latents that are encoded once, for several variants of each picture, and then read in place of the pictures."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxdiff.config import DataConfig
from jaxdiff.data.captions import Caption
from jaxdiff.data.images import prepare, to_float
from jaxdiff.data.record import BadRecord, Record, Source


class LatentSource:
    """Records that `cache_latents` wrote: a file, or a folder of `*.array_record` files."""

    def __init__(self, root: str | Path) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        path = Path(root)
        files = sorted(path.glob("*.array_record")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise ValueError(f"{root} holds no cached latents: DataConfig.root must name an .array_record file, or a "
                             "folder of them, that a diffusion run with latent_variants wrote.")  # fmt: skip
        try:
            self._rows = ArrayRecordDataSource([str(file) for file in files])
        except Exception as error:  # not an ArrayRecord file, or a damaged one
            raise ValueError(
                f"{root} cannot be read as cached latents ({error}): delete it, and it will be made anew."
            ) from error
        self._root = str(root)
        if not len(self._rows):
            raise ValueError(f"{root} holds no latents.")

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Record:
        """The record at a position."""
        try:
            return _unpack(self._rows[index])
        except Exception as error:  # a damaged file; ArrayRecord raises several kinds
            raise BadRecord(f"{type(error).__name__}: {error}") from error

    def name(self, index: int) -> str:
        """The record's name in messages."""
        return f"{self._root} record {index}"


def cache_latents(
    encode_fn: Callable[[np.ndarray], np.ndarray],
    config: DataConfig,
    source: Source,
    path: str | Path,
    *,
    variants: int,
    seed: int,
    dtype: str = "float16",
) -> int:
    """Encodes `variants` augmentations of every record of `source` into the ArrayRecord file `path`.

    The captions' parts are kept, so that captions are still composed anew at every reading.

    Args:
        encode_fn: float32 images [config.batch_size, size, size, 3] in [-1, 1] -> moments [b, h, w, 2c]; always called
            with a full batch (the last one is filled up with copies).
        config: Says how the pictures are cropped, flipped and batched.
        source: Records with pictures.
        path: Written beside and moved into place at the end, so that a file there is always whole.
        variants: Augmentations (background, crop, flip) of each picture.
        seed: Fixes the augmentations.
        dtype: `float16` or `float32`, of the moments in the file.

    Returns:
        The number of records that could not be read; they are not in the file.

    Raises:
        ValueError: where there are more of them than `config.max_bad_share` allows.

    """
    from array_record.python.array_record_module import ArrayRecordWriter

    from jaxdiff.data.bad import BadRecords

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    bad = BadRecords(len(source), config.max_bad_share)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    writer = ArrayRecordWriter(str(partial), "group_size:1")
    batch: list[tuple[np.ndarray, Caption]] = []

    def flush() -> None:
        images = np.stack([image for image, _ in batch] + [batch[-1][0]] * (config.batch_size - len(batch)))
        moments = np.asarray(encode_fn(to_float(images))).astype(dtype)
        for row, (_, caption) in zip(moments, batch, strict=False):
            writer.write(_pack(row, caption))
        batch.clear()

    try:
        for variant in range(variants):
            for index in tqdm(range(len(source)), desc=f"Latents, variant {variant + 1} of {variants}", unit=" images"):
                try:
                    rng = np.random.default_rng([seed, variant, index])
                    batch.append(prepare(source.record(index), rng, config))
                except BadRecord as error:
                    bad.add((source.name(index), str(error)))
                if len(batch) == config.batch_size:
                    flush()
        if batch:
            flush()
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return len(bad)


def _pack(moments: np.ndarray, caption: Caption) -> bytes:
    """A line of JSON, then the array's bytes."""
    head = {"shape": moments.shape, "dtype": str(moments.dtype)} | vars(caption)
    return json.dumps(head).encode() + b"\n" + moments.tobytes()


def _unpack(data: bytes) -> Record:
    head, _, array = data.partition(b"\n")
    values = json.loads(head)
    moments = np.frombuffer(array, values.pop("dtype")).reshape(values.pop("shape"))
    return Record(Caption(**values | {"keywords": tuple(values["keywords"])}), moments=moments)
