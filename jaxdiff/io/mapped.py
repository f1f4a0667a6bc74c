"""Arrays that are views of mapped files: read from disk when they are used, and kept by the file alone."""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np


class _File(np.memmap):
    """The bytes of a file, and what told it from others when it was mapped."""

    state: tuple[int, int, int]


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file that is not empty, read-only. A file that replaces it later is another one.

    Raises:
        OSError: when the file cannot be read.
    """
    mapped = np.memmap(path, np.uint8, "r").view(_File)
    mapped.state = _state(path)
    return mapped


def release(array: Any) -> None:
    """Lets the system take the pages of the array's file out of this process; what is used again is read again.

    Of an array that is made of others, its `parts`, this goes for all of them.
    """
    for part in getattr(array, "parts", ()):
        release(part)
    found = _file(array)
    if found is not None and hasattr(mmap, "MADV_DONTNEED"):
        found[0].madvise(mmap.MADV_DONTNEED)


def check_unchanged(array: Any) -> None:
    """Refuses an array whose file was written to since it was mapped, so that it would be read half old, half new.

    Of an array that is made of others, its `parts`, this goes for all of them.

    Raises:
        ValueError: naming the file.
    """
    for part in getattr(array, "parts", ()):
        check_unchanged(part)
    found = _file(array)
    if found is None:
        return
    _, file = found
    try:
        now = _state(Path(str(file.filename)))
    except OSError:
        return  # deleted: what is mapped stays
    if now != file.state and now[0] == file.state[0]:
        raise ValueError(f"{file.filename} was written to after it had been read; load the model again.")


def _file(array: Any) -> tuple[mmap.mmap, _File] | None:
    """The map and the whole file that an array is a view of, if it is one."""
    file = None
    while array is not None and not isinstance(array, mmap.mmap):
        if isinstance(array, _File) and hasattr(array, "state"):
            file = array
        array = getattr(array, "base", None)
    return None if array is None or file is None else (array, file)


def _state(path: Path) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns
