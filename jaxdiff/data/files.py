"""ArrayRecord files: written whole or not at all, read by position."""

import os
import resource
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Writer:
    """Writes an ArrayRecord file of which each record can be read by itself."""

    def __init__(self, path: Path) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._writer = ArrayRecordWriter(str(path), "group_size:1")

    def write(self, record: bytes) -> None:
        """Adds a record.

        Raises:
            OSError: where the disk is full, for one.

        """
        with _disk_errors():
            self._writer.write(record)

    def close(self) -> None:
        """Ends the file; raises as `write` does."""
        with _disk_errors():
            self._writer.close()


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).split("; at byte")[0]) from error


@contextmanager
def new_records(path: Path) -> Iterator[Writer]:
    """A writer whose file moves to `path` at the end; nothing stays where the block raises."""
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        writer = Writer(partial)
        yield writer
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def open_records(files: Sequence[Path]) -> Any:
    """The records of `files`, one after the other: `len(...)`, `[position]`, `__getitems__(positions)`.

    Raises:
        ValueError: naming the first file that is not one of ArrayRecord, or only a part of one.

    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    # Each file that was read stays open.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * len(files) + 256:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        return ArrayRecordDataSource([str(file) for file in files])
    except Exception as error:  # it raises several kinds, and does not say which file it is
        for file in files:
            try:
                ArrayRecordDataSource(str(file))
            except Exception as reason:
                raise ValueError(f"{file} is damaged, or no ArrayRecord file ({reason}).") from error
        raise
