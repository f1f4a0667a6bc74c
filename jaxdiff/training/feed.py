"""Batches on their way to the devices, ahead of the step that needs them."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdiff.sharding import batch_sharding
from jaxdiff.training.state import Batch


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """This process's rows of a global batch as arrays spread over the mesh; 64-bit numbers lose their upper half."""
    sharding = batch_sharding(mesh)
    narrow = {"int64": np.int32, "float64": np.float32}
    return {
        name: jax.make_array_from_process_local_data(sharding, rows.astype(narrow.get(rows.dtype.name, rows.dtype)))
        for name, rows in batch.items()
    }


class Feed:
    """Iterates over `batches` on the devices of `mesh`, keeping `ahead` of them ready on a thread of its own.

    What the source raises is raised again by `next`. Use it as a context manager, which ends the thread.
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
