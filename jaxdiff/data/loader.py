"""Batches whose every part is a function of the seed and the global sample index: any step can be read directly.

Sample `index` of a run (= step * batch_size + row) is the same image, drawn the same way, with the same caption,
after a resume and on any number of processes. With `DataConfig.aspects`, each step's global batch has one of their
shapes (see `buckets`). grain reads ahead, in threads or in worker processes.
"""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import grain
import numpy as np

from jaxdiff.config import DataConfig
from jaxdiff.data.bad import BadRecords
from jaxdiff.data.buckets import Schedule, nearest_shapes
from jaxdiff.data.images import prepare, to_float
from jaxdiff.data.record import BadRecord, Source
from jaxdiff.data.sources import open_source
from jaxdiff.data.tokens import Tokenizer

__all__ = ["Batches", "batches", "open_source"]

Batch = dict[str, np.ndarray]
TokenizeFn = Callable[[list[str]], np.ndarray]

_MAX_TRIES = 100  # of other records in place of a bad one; the share of bad ones ends a run long before


def batches(
    config: DataConfig,
    source: Source,
    tokenize: TokenizeFn | None = None,
    *,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
) -> "Batches":
    """Batches of this process from `start_step` on, for ever.

    Each is a dict of `image` float32 [b, h, w, 3] in [-1, 1], of one of `config.shapes`, or `moments` float32
    [b, h, w, 2c] where the source holds latents; `context` float16 [b, t, d] where it holds encoded captions, or
    `tokens` int32 [b, t] if `tokenize` is given; and `index` int64 [b], the samples' global indices. b is this
    process's share of `config.batch_size`: `rows` of the global batch, or where these are not given
    [b * process_index, b * (process_index + 1)).

    Raises:
        ValueError: where `process_count` does not divide the batch, or latents were made for other shapes; while
            iterating, where too many records are bad.

    """
    if config.batch_size % process_count:
        raise ValueError(
            f"DataConfig.batch_size {config.batch_size} is not a multiple of the {process_count} processes."
        )
    share = config.batch_size // process_count
    mine = range(share * process_index, share * (process_index + 1)) if rows is None else rows
    return Batches(config, source, tokenize, seed, start_step, mine)


class Batches(Iterator[Batch]):
    """The iterator that `batches` makes."""

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        tokenize: TokenizeFn | None,
        seed: int,
        start_step: int,
        rows: Sequence[int],
    ) -> None:
        self._bad = BadRecords(len(source), config.max_bad_share)
        self.n_cut = 0
        """How many samples' captions so far were longer than the tokenizer's tokens; their ends were cut."""
        self.first_cut = ""
        """The first of these captions."""
        steps = grain.MapDataset.range(start_step, sys.maxsize).map(_MakeBatch(config, source, tokenize, seed, rows))
        if config.workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # grain's workers hand absl's flags on
                flags.FLAGS(sys.argv[:1])
            options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=2)
            read = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)).mp_prefetch(options)
        else:
            read = steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
        self._batches = iter(read)

    @property
    def bad(self) -> dict[str, str]:
        """The reason for each record skipped so far, by name."""
        return self._bad.reasons

    @property
    def n_bad(self) -> int:
        """How many records were skipped so far."""
        return len(self._bad)

    def close(self) -> None:
        """Ends the threads and processes that read ahead."""
        self._batches.close()

    def __next__(self) -> Batch:
        batch, bad, cut = next(self._batches)
        self._bad.add(*bad)
        self.n_cut += len(cut)
        self.first_cut = self.first_cut or next(iter(cut), "")
        if not batch:
            raise ValueError(
                f"{_MAX_TRIES} records in a row cannot be used: {self._bad.listed()}; mend or remove them."
            )
        return batch


class _MakeBatch:
    """A step's number -> its batch, {} where none can be made; what was skipped; and the captions that were cut.

    Pickled into the workers.
    """

    def __init__(
        self, config: DataConfig, source: Source, tokenize: TokenizeFn | None, seed: int, rows: Sequence[int]
    ) -> None:
        self._config, self._source, self._tokenize, self._seed, self._rows = config, source, tokenize, seed, rows
        self._members = _members(config, source)
        counts = [len(members) for members in self._members]
        self._schedule = Schedule(counts, config.batch_size, seed)
        # Each epoch is a permutation of its own; grain computes any place of it directly.
        self._orders = [grain.MapDataset.range(max(n, 1)).seed(seed).shuffle().repeat() for n in counts]

    def __call__(self, step: int) -> tuple[Batch, list[tuple[str, str]], list[str]]:
        if self._config.workers and multiprocessing.parent_process():
            _die_with_parent()
        bad: list[tuple[str, str]] = []
        bucket, number = self._schedule(step)
        size = self._config.batch_size
        try:
            samples = [self._sample(step * size + row, bucket, number * size + row, bad) for row in self._rows]
        except BadRecord:  # the reader tells; grain adds words of its own to what is raised here
            return {}, bad, []
        arrays, texts = zip(*samples, strict=True)
        batch: Batch = {"index": np.asarray([step * size + row for row in self._rows], np.int64)}
        stacked = np.stack(arrays)
        if stacked.dtype == np.uint8:
            batch["image"] = to_float(stacked)
        else:
            batch["moments"] = stacked.astype(np.float32)
        cut: list[str] = []
        if isinstance(texts[0], np.ndarray):
            batch["context"] = np.stack(texts)
        elif self._tokenize is not None:
            batch["tokens"] = self._tokenize(list(texts))
            if isinstance(self._tokenize, Tokenizer):
                cut = [text for text in texts if self._tokenize.cut(text)]
        return batch, bad, cut

    def _sample(
        self, index: int, bucket: int, place: int, bad: list[tuple[str, str]]
    ) -> tuple[np.ndarray, str | np.ndarray]:
        """Sample `index`, at `place` of its bucket's stream: a uint8 image or moments, and a caption or its context.

        Another record of the bucket takes the place of a bad one.
        """
        rng = np.random.default_rng([self._seed, index])
        members, number = self._members[bucket], self._orders[bucket][place]
        assert number is not None  # nothing was filtered out
        position: Any = members[number]
        for _ in range(_MAX_TRIES):
            position = int(position)
            try:
                record = self._source.record(position)
                if record.contexts:
                    assert record.moments is not None
                    return record.moments, record.contexts[rng.integers(len(record.contexts))]
                if record.moments is not None:
                    return record.moments, record.caption.draw(rng)
                image, caption = prepare(record, rng, self._config, self._config.shapes[bucket])
                return image, caption.draw(rng)
            except BadRecord as error:
                bad.append((self._source.name(position), str(error)))
                position = members[rng.integers(len(members))]
        raise BadRecord("no record can be used")


def _members(config: DataConfig, source: Source) -> list[np.ndarray] | list[range]:
    """The positions of the records in each of the buckets of `config.shapes`."""
    if len(config.shapes) == 1 and config.source != "latents":
        return [range(len(source))]
    sizes = source.sizes()
    bucket = nearest_shapes(sizes, config.shapes)
    if config.source == "latents":
        for i, (height, width) in enumerate(config.shapes):
            if len(np.unique(sizes[bucket == i], axis=0)) > 1:
                raise ValueError(
                    f"The latents in {config.root} that are nearest to {width}x{height} have several shapes: set "
                    "DataConfig.aspects, size and side_multiple as they were when the latents were made."
                )
    return [np.flatnonzero(bucket == i) for i in range(len(config.shapes))] if config.aspects else [range(len(source))]


@cache
def _die_with_parent() -> None:
    """Ends this worker when the trainer is gone, killed perhaps, so that it holds no memory and no output open."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
