"""Batches on their way to the devices, ahead of the step that needs them."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff.runtime.mesh import batch_sharding, place
from jaxdiff.training.state import Batch


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this process's devices hold, in order.

    Processes that only share the `tensor` axis hold the same rows, and on some meshes the rows of a process do not lie
    side by side.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (rows,) in filter(None, held) for row in range(*rows.indices(batch_size))})


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh, several: bool = False) -> Batch:
    """This process's rows of a global batch as arrays spread over the mesh; 64-bit numbers lose their upper half.

    Of `several` batches, which lie along a first axis, the second one is spread. Numbers alone are everywhere.
    """
    axis, sharding = int(several), batch_sharding(mesh, after=int(several))
    places = mesh.shape["data"] * mesh.shape["fsdp"]
    held = local_rows(mesh, places)
    narrow = {"int64": np.int32, "float64": np.float32}

    def spread(rows: np.ndarray) -> jax.Array:
        rows = rows.astype(narrow.get(rows.dtype.name, rows.dtype), copy=False)
        if not rows.ndim:
            return place(rows, NamedSharding(mesh, P()))
        share, rest = divmod(rows.shape[axis], len(held))
        assert not rest, f"{rows.shape[axis]} rows for {len(held)} places"

        def part(index: Any) -> np.ndarray:
            first = held.index((index[axis].start or 0) // share) * share
            return rows[:, first : first + share] if several else rows[first : first + share]

        shape = (*rows.shape[:axis], share * places, *rows.shape[axis + 1 :])
        return jax.make_array_from_callback(shape, sharding, part)

    return {name: spread(rows) for name, rows in batch.items()}


Call = tuple[int, dict[str, np.ndarray]]
"""How many steps the devices take in one call, and the batch of the step, or the batches of all of them."""


def calls(batches: Iterator[dict[str, np.ndarray]], lengths: Iterable[int], most: int = 1) -> Iterator[Call]:
    """Batches put together for calls of so many steps, `most` at most; shorter ones are filled up with copies.

    With `most` 1 each is a batch as it is; else arrays have a first axis for the steps, of which `steps` count.
    """
    for n in lengths:
        parts = [next(batches) for _ in range(n)]
        if most == 1:
            yield 1, parts[0]
        else:
            parts += parts[-1:] * (most - n)
            stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
            yield n, stacked | {"steps": np.array(n, np.int32)}


class Feed:
    """Iterates over `calls` on the devices of `mesh`, keeping `ahead` of them ready on a thread of its own.

    So the next batch travels while a step is computed, and the one after it is read. What the source raises is raised
    again by `next`. Use it as a context manager, which ends the thread.
    """

    def __init__(self, calls: Iterator[Call], mesh: Mesh, ahead: int = 2) -> None:
        self._ready: queue.Queue[Any] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(calls, mesh), daemon=True)
        self._thread.start()

    def _fill(self, calls: Iterator[Call], mesh: Mesh) -> None:
        try:
            for n, batch in calls:
                self._put((n, to_devices(batch, mesh, several="steps" in batch)))
                if self._closed.is_set():
                    return
            self._put(StopIteration())
        except Exception as error:  # it belongs to the thread that reads
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                pass

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> tuple[int, Batch]:
        item = self._ready.get()
        if isinstance(item, Exception):
            raise item
        return item

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(timeout=10)
