"""ArrayRecord files: written whole or not at all, read by position."""

import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def new_records(path: Path) -> Iterator[Any]:
    """A writer with `write(bytes)`, each record to be read by itself; what it wrote moves to `path` at the end.

    Nothing stays where the block raises.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    for leftover in path.parent.glob(f"{path.name}.*.partial"):  # of a process that was killed
        leftover.unlink(missing_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        writer = ArrayRecordWriter(str(partial), "group_size:1")
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
