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
from jaxdiff.data.captions import Caption
from jaxdiff.data.images import prepare, to_float
from jaxdiff.data.record import BadRecord, Record, Source, check_numbers
from jaxdiff.data.resident import Resident
from jaxdiff.data.sources import open_source
from jaxdiff.data.tokens import Tokenizer

__all__ = ["Batches", "batches", "open_source", "sample_captions"]

Batch = dict[str, np.ndarray]
TokenizeFn = Callable[[list[str]], np.ndarray]

Sample = tuple[dict[str, Any], str | None]
"""What a sample adds to the arrays of its batch, and its caption; None where an array is what became of that."""
AS_READ: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "image": to_float,
    "moments": lambda moments: moments.astype(np.float32),
    "numbers": lambda numbers: numbers.astype(np.float32),
}
"""What becomes of the arrays of a batch."""

TOKENS = ("tokens", "tokens_2")
"""What a batch calls the tokens of each of its tokenizers, in order."""

_MAX_TRIES = 100  # of other records in place of a bad one; the share of bad ones ends a run long before


def batches(
    config: DataConfig,
    source: Source,
    *tokenize: TokenizeFn,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
    numbers: bool = False,
) -> "Batches":
    """Batches of this process from `start_step` on, for ever.

    Each is a dict of `image` float32 [b, h, w, 3] in [-1, 1], of one of `config.shapes`, or `moments` float32
    [b, h, w, 2c] where the source holds latents; `context` float16 [b, t, d], and perhaps `pooled` float16 [b, p],
    where it holds encoded captions, or what each of `tokenize` makes of them, `tokens` and `tokens_2` int32 [b, t];
    with `numbers` an array of that name, float32 [b, 6], which has the `Cut` of each image; and `index` int64 [b], the
    samples' global indices. Of a `Resident` source, the rows that `Resident.draw` gives stand for image, moments,
    numbers, context and pooled. b is this process's share of `config.batch_size`: `rows` of the global batch, or where
    these are not given [b * process_index, b * (process_index + 1)).

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
    return Batches(config, source, tokenize, seed, start_step, mine, numbers)


def sample_captions(source: Source, n: int) -> list[str]:
    """The captions of `n` records, evenly spread; the next record that can be used takes the place of a bad one.

    Raises:
        ValueError: where many records in a row cannot be used.

    """

    def caption(first: int) -> str:
        for index in range(first, first + _MAX_TRIES):
            try:
                return source.record(index % len(source)).caption.full()
            except BadRecord as error:
                reason = f"{source.name(index % len(source))} ({error})"
        raise ValueError(f"{_MAX_TRIES} records in a row cannot be used, the last of them {reason}; mend or remove "
                         "them, or name prompts in DiffusionTask.prompts.")  # fmt: skip

    return [caption(int(first)) for first in np.linspace(0, len(source) - 1, n)]


class Batches(Iterator[Batch]):
    """The iterator that `batches` makes."""

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        tokenize: tuple[TokenizeFn, ...],
        seed: int,
        start_step: int,
        rows: Sequence[int],
        numbers: bool,
    ) -> None:
        self._bad = BadRecords(len(source), config.max_bad_share)
        self.n_cut = 0
        """How many samples' captions so far were longer than the tokenizer's tokens; their ends were cut."""
        self.first_cut = ""
        """The first of these captions."""
        make = _MakeBatch(config, source, tokenize, seed, rows, numbers)
        steps = grain.MapDataset.range(start_step, sys.maxsize).map(make)
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
                f"{min(_MAX_TRIES, len(self._bad))} records in a row cannot be used: {self._bad.listed()}; mend or "
                "remove them."
            )
        return batch


class _MakeBatch:
    """A step's number -> its batch, {} where none can be made; what was skipped; and the captions that were cut.

    Pickled into the workers.
    """

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        tokenize: tuple[TokenizeFn, ...],
        seed: int,
        rows: Sequence[int],
        numbers: bool,
    ) -> None:
        self._config, self._source, self._tokenize, self._seed, self._rows = config, source, tokenize, seed, rows
        self._numbers = numbers
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
        samples = None
        # A bucket of bad records alone gives its steps to the next one. All processes see the same: to find out that a
        # bucket has no good record each of them tries all that there are.
        for other in range(len(self._members)):
            use = (bucket + other) % len(self._members)
            try:
                samples = [self._sample(step * size + row, use, number * size + row, bad) for row in self._rows]
                break
            except _AllBadError:
                continue
            except BadRecord:  # the reader tells; grain adds words of its own to what is raised here
                break
        if samples is None:
            return {}, bad, []
        arrays, texts = zip(*samples, strict=True)
        batch: Batch = {"index": np.asarray([step * size + row for row in self._rows], np.int64)}
        for name in arrays[0]:
            batch[name] = AS_READ.get(name, np.asarray)(np.stack([array[name] for array in arrays]))
        cut: list[str] = []
        if texts[0] is not None:
            for tokenize, name in zip(self._tokenize, TOKENS, strict=False):
                batch[name] = tokenize(list(texts))
            tokenizers = [tokenize for tokenize in self._tokenize if isinstance(tokenize, Tokenizer)]
            cut = [text for text in texts if any(tokenizer.cut(text) for tokenizer in tokenizers)]
        return batch, bad, cut

    def _sample(self, index: int, bucket: int, place: int, bad: list[tuple[str, str]]) -> Sample:
        """Sample `index`, at `place` of its bucket's stream.

        Another record of the bucket takes the place of a bad one.

        Raises:
            _AllBadError: where the bucket has no other.
            BadRecord: where many others are bad, too.

        """
        rng = np.random.default_rng([self._seed, index])
        members = self._members[bucket]
        if not len(members):
            raise _AllBadError("the bucket is empty")
        number = self._orders[bucket][place]
        assert number is not None  # nothing was filtered out
        if (found := self._drawn(int(members[number]), bucket, rng, bad)) is not None:
            return found
        for other in rng.choice(len(members), min(len(members), _MAX_TRIES), replace=False):
            if (found := self._drawn(int(members[other]), bucket, rng, bad)) is not None:
                return found
        raise (_AllBadError if len(members) <= _MAX_TRIES else BadRecord)("no record can be used")

    def _drawn(self, position: int, bucket: int, rng: np.random.Generator, bad: list[tuple[str, str]]) -> Sample | None:
        """A record as a sample; None for a bad one, which is added to `bad`."""
        try:
            if isinstance(self._source, Resident):
                arrays, caption = self._source.draw(position, rng)
            else:
                arrays, caption = self._read(self._source.record(position), bucket, rng)
            if not self._numbers:
                arrays.pop("numbers", None)
            return arrays, None if not self._tokenize or caption is None else caption.draw(rng)
        except BadRecord as error:
            bad.append((self._source.name(position), str(error)))
            return None

    def _read(self, record: Record, bucket: int, rng: np.random.Generator) -> tuple[dict[str, Any], Caption | None]:
        if record.moments is None:
            image, caption, cut = prepare(record, rng, self._config, self._config.shapes[bucket])
            return {"image": image, "numbers": np.array(cut)}, caption
        check_numbers(record, self._numbers)
        arrays: dict[str, Any] = {"moments": record.moments, "numbers": np.array(record.numbers)}
        if not record.contexts:
            return arrays, record.caption
        which = rng.integers(len(record.contexts))
        pooled = {"pooled": record.pooled[which]} if record.pooled else {}
        return arrays | {"context": record.contexts[which]} | pooled, None


class _AllBadError(BadRecord):
    """No record of a bucket can be used."""


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
