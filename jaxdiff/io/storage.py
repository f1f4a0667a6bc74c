"""Run directories: a folder on a disk, or a place in a bucket that is written to in whole files."""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etils import epath


def place_of(path: str) -> epath.Path:
    """`path` as a path, which may be `gs://bucket/name` or another bucket's that `etils.epath` knows.

    Raises:
        ValueError: where a bucket's scheme is unknown, its client is not installed, or it cannot be reached.
    """
    scheme = re.match(r"(\w+)://", path)
    try:
        found = epath.Path(path)
        if scheme:
            found.exists()
    except KeyError as error:
        raise ValueError(
            f"{path}: {scheme[0] if scheme else ''} is not known; use gs://, s3:// or a folder."
        ) from error
    except ImportError as error:
        client = {"gs": "gcsfs", "s3": "s3fs"}.get(scheme[1] if scheme else "", "its client")
        raise ValueError(f"{path} is in a bucket, which needs {client}: pip install {client}.") from error
    except Exception as error:  # each client has its own kinds, for no network, no permission and no bucket
        raise ValueError(
            f"{path} cannot be reached ({(str(error) or type(error).__name__).splitlines()[0]})."
        ) from error
    return found


def is_remote(path: Any) -> bool:
    """Whether `path` lies in a bucket, where a file is written whole or not at all, and cannot be appended to."""
    return "://" in str(path)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path | Path, data: bytes) -> None:
    """Writes a file, whole or not at all."""
    if is_remote(path):
        path.write_bytes(data)
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_verified(path: Path, sha256: str) -> bytes:
    """What a file holds that was fetched.

    Raises:
        ValueError: where its SHA-256 is another one.
    """
    data = path.read_bytes()
    if (digest := hashlib.sha256(data).hexdigest()) != sha256:
        raise ValueError(f"{path} has the SHA-256 {digest}, not {sha256}: delete it and run again.")
    return data


@contextmanager
def staged(path: epath.Path) -> Iterator[Path]:
    """A folder of this machine to write into: `path` itself, or one whose files are then copied to the bucket."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / path.name
        yield local
        copy_into(local, path)


def copy_into(local: Path, path: epath.Path) -> None:
    """Copies every file under `local` to its place under `path`."""
    for file in sorted(file for file in local.rglob("*") if file.is_file()):
        target = path / file.relative_to(local).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
