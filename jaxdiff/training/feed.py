"""Batches on their way to the devices, ahead of the step that needs them."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdiff.runtime.mesh import batch_sharding
from jaxdiff.training.state import Batch


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this process's devices hold, in order.

    Processes that only share the `tensor` axis hold the same rows, and on some meshes the rows of a process do not lie
    side by side.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (rows,) in filter(None, held) for row in range(*rows.indices(batch_size))})


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """This process's rows of a global batch as arrays spread over the mesh; 64-bit numbers lose their upper half."""
    sharding = batch_sharding(mesh)
    places = mesh.shape["data"] * mesh.shape["fsdp"]
    held = local_rows(mesh, places)
    narrow = {"int64": np.int32, "float64": np.float32}

    def place(rows: np.ndarray) -> jax.Array:
        rows = rows.astype(narrow.get(rows.dtype.name, rows.dtype), copy=False)
        share, rest = divmod(len(rows), len(held))
        assert not rest, f"{len(rows)} rows for {len(held)} places"

        def part(index: Any) -> np.ndarray:
            first = held.index((index[0].start or 0) // share) * share
            return rows[first : first + share]

        return jax.make_array_from_callback((share * places, *rows.shape[1:]), sharding, part)

    return {name: place(rows) for name, rows in batch.items()}


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, spread as `shardings` says; only what belongs here is copied."""
    return jax.tree.map(
        lambda a, sharding: jax.make_array_from_callback(np.shape(a), sharding, lambda index: np.asarray(a)[index]),
        tree,
        shardings,
    )


class Feed:
    """Iterates over `batches` on the devices of `mesh`, keeping `ahead` of them ready on a thread of its own.

    So the next batch travels while a step is computed, and the one after it is read. What the source raises is raised
    again by `next`. Use it as a context manager, which ends the thread.
    """

    def __init__(self, batches: Iterator[dict[str, np.ndarray]], mesh: Mesh, ahead: int = 2) -> None:
        self._ready: queue.Queue[Any] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(batches, mesh), daemon=True)
        self._thread.start()

    def _fill(self, batches: Iterator[dict[str, np.ndarray]], mesh: Mesh) -> None:
        try:
            for batch in batches:
                self._put(to_devices(batch, mesh))
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

    def __next__(self) -> Batch:
        item = self._ready.get()
        if isinstance(item, Exception):
            raise item
        return item

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(timeout=10)
