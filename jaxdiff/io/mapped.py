"""Arrays that are views of mapped files: read from disk when they are used, and kept by the file alone."""

import mmap
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


class _File(np.memmap):
    """The bytes of a whole file. It stays open, so that it can be asked for its state wherever it has gone."""

    path: Path
    descriptor: int
    state: tuple[int, int]


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file that is not empty, read-only. A file that replaces it later is another one.

    Raises:
        OSError: when the file cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with os.fdopen(os.dup(descriptor), "rb") as file:
            mapped = np.memmap(file, np.uint8, "r").view(_File)
    except BaseException:
        os.close(descriptor)
        raise
    weakref.finalize(mapped, os.close, descriptor)
    mapped.path, mapped.descriptor, mapped.state = path, descriptor, _state(descriptor)
    return mapped


def release(array: Any) -> None:
    """Lets the system take the pages of the array's file out of this process; what is used again is read again.

    Of an array that is made of others, its `parts`, this goes for all of them.
    """
    for mapped, _ in _files(array):
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def check_unchanged(array: Any) -> None:
    """Refuses an array whose file was written to since it was mapped, so that it would be read half old, half new.

    Of an array that is made of others, its `parts`, this goes for all of them.

    Raises:
        ValueError: naming the file.
    """
    for _, file in _files(array):
        if _state(file.descriptor) != file.state:
            raise ValueError(f"{file.path} was written to since it was opened; load the model again.")


def _files(array: Any) -> Iterator[tuple[mmap.mmap, _File]]:
    """The map and the whole file that an array is a view of, if it is one, and those of its parts."""
    for part in getattr(array, "parts", ()):
        yield from _files(part)
    file = None
    while array is not None and not isinstance(array, mmap.mmap):
        if isinstance(array, _File) and hasattr(array, "state"):
            file = array
        array = getattr(array, "base", None)
    if array is not None and file is not None:
        yield array, file


def _state(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns
