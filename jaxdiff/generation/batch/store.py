"""The folder of a batch's images: each is there whole or not at all, and the same command again draws the rest."""

import errno
import fcntl
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxdiff.config import load_json
from jaxdiff.generation.batch.groups import Job
from jaxdiff.generation.batch.page import page
from jaxdiff.generation.request import PICTURES, Pixels, Request
from jaxdiff.io.images import FORMATS, SHEET, contact_sheet, encode_image, read_image, slug

_RUN, _PAGE, _SHEET = "batch.json", "index.html", f"{SHEET}.png"


def fingerprint(wanted: Iterable[Job]) -> str:
    """A batch's images in a short text: it changes with any argument of any row, and with the images' contents."""
    contents: dict[str, str] = {}

    def content(image: Pixels) -> str:
        if isinstance(image, np.ndarray):
            return hashlib.sha256(image.tobytes()).hexdigest()
        if str(image) not in contents:
            with open(image, "rb") as file:
                contents[str(image)] = hashlib.file_digest(file, "sha256").hexdigest()
        return contents[str(image)]

    @lru_cache(1)  # the images of a request come one after another
    def asked(request: Request) -> dict[str, Any]:
        none = dict.fromkeys(PICTURES)
        return request.values() | none | {name: content(given) for name, given in request.pictures()}

    digest = hashlib.sha256()
    for job in wanted:
        digest.update(json.dumps([job.line, job.seed, asked(job.request)]).encode())
    return digest.hexdigest()[:16]


class Store:
    """Images and their settings in a folder, from one process or several.

    `batch.json` says which batch it is, `images.jsonl` has a line for each image that is whole: `file`, `line`,
    `seed`, `bytes` and `settings`. Of several processes, number K has `images-K.jsonl` to itself. A process that is
    killed at any moment leaves images that are whole and listed, and others that are drawn again.
    """

    def __init__(
        self,
        folder: Path | str,
        batch: Mapping[str, Any],
        wanted: Iterable[Job],
        format: str = "png",
        metadata: bool = True,
        index: int = 0,
        count: int = 1,
    ) -> None:
        """Opens or makes the folder, and finds out what is there already.

        Args:
            folder: where the images go.
            batch: what makes it this batch, as JSON values: the rows' `fingerprint`, the model, the type and so on.
            wanted: all of the batch's images, those of other processes too.
            format: one of `jaxdiff.io.images.FORMATS`.
            metadata: whether images, their names and the index say how they were made.
            index: this process, from 0.
            count: how many there are.

        Raises:
            ValueError: when the folder holds another batch, or files with the images' names; is being drawn into by
                another process; or cannot be written to.
        """
        self.folder, self.format, self.metadata = Path(folder), format, metadata
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}; choose one of {', '.join(FORMATS)}.")
        everything = list(wanted)
        self.wanted = [job for job in everything if job.index % count == index]
        self._mark = f".{index}.partial"
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check({**batch, "format": format, "metadata": metadata}, everything)
            self._index = (self.folder / ("images.jsonl" if count == 1 else f"images-{index}.jsonl")).open("a+b")
            self._own()
            self._sweep(index, count)
            self._end_last_line()
        except OSError as error:
            raise ValueError(f"{self.folder} cannot be written to: {error.strerror}.") from error
        self.done = {entry["file"] for entry in self.entries()}

    def close(self) -> None:
        """Lets other processes draw into the folder."""
        self._index.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def name(self, job: Job) -> str:
        """The image's file: line, prompt and seed."""
        words = f"{slug(job.request.prompt)}-" if self.metadata else ""
        return f"{job.line:05d}-{words}{job.seed}.{FORMATS[self.format]}"

    def has(self, job: Job) -> bool:
        """Whether the image is there already."""
        return self.name(job) in self.done

    def missing(self) -> list[Job]:
        """This process's images that are not there yet."""
        return [job for job in self.wanted if not self.has(job)]

    def add(self, job: Job, image: UInt8[np.ndarray, "h w 3"], settings: Mapping[str, Any]) -> Path:
        """Writes an image, and then the line that says so. Threads may call this at once.

        Args:
            job: which image it is.
            image: what was drawn.
            settings: how, as JSON values.

        Raises:
            ValueError: when it cannot be written.
        """
        name = self.name(job)
        data = encode_image(image, settings if self.metadata else None, self.format)
        entry = {"file": name, "line": job.line, "seed": job.seed, "bytes": len(data),
                 "settings": dict(settings) if self.metadata else {}}  # fmt: skip
        path, partial = self.folder / name, self.folder / f".{name}{self._mark}"
        try:
            partial.write_bytes(data)
            partial.replace(path)
            with self._lock:
                self._append(f"{json.dumps(entry)}\n".encode())
                self.done.add(name)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ValueError(f"{path} cannot be written: {error.strerror}.") from error
        return path

    def entries(self) -> list[dict[str, Any]]:
        """What the index files say of images that are there, of all processes: by line and seed, each once."""
        return read_entries(self.folder)

    def finish(self, title: str = "") -> list[Path]:
        """Writes what shows the images that are there, and returns the paths.

        `index.html` is a page to look through them, and `contact-sheet.png`, where there are several, has the first.
        """
        title = title or self.folder.resolve().name
        while True:
            entries, sheet = self.entries(), self.sheet()
            written = [self._write(self.folder / _PAGE, page(entries, title).encode("utf-8", "replace"))]
            if sheet is not None:
                written.append(self._write(self.folder / _SHEET, encode_image(sheet)))
            if len(entries) == len(self.entries()):  # else another process has ended meanwhile, and may have been first
                return written

    def sheet(self, most: int = 100) -> UInt8[np.ndarray, "h w 3"] | None:
        """A contact sheet of the first images that are there; None where there are fewer than two."""
        entries = self.entries()[:most]
        if len(entries) < 2:
            return None
        images = [read_image(self.folder / entry["file"]) for entry in entries]
        height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
        cells = []
        for image in images:
            cell = np.full((height, width, 3), 255, np.uint8)
            top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
            cell[top : top + image.shape[0], left : left + image.shape[1]] = image
            cells.append(cell)
        return contact_sheet(cells, [str(entry["settings"].get("prompt", "")) for entry in entries])

    def _check(self, batch: dict[str, Any], everything: list[Job]) -> None:
        """That the folder is this batch's, or becomes it."""
        path = self.folder / _RUN
        batch = json.loads(json.dumps(batch))
        if not path.exists():
            names = itertools.chain(map(self.name, everything), (_PAGE, _SHEET, "images.jsonl"))
            taken = next((name for name in names if (self.folder / name).exists()), None)
            if not path.exists():  # another process may have begun meanwhile
                if taken is not None:
                    raise ValueError(
                        f"{self.folder} has a file {taken} that is not of this batch; choose another folder."
                    )
                self._write(path, f"{json.dumps(batch, indent=2)}\n".encode())
        there = load_json(path)
        if there != batch:
            names = sorted(name for name in {*there, *batch} if there.get(name) != batch.get(name))
            told = ", ".join(f"{name} was {there.get(name)!r} and is {batch.get(name)!r}" for name in names)
            raise ValueError(f"{self.folder} holds another batch: {told}; choose another folder.")

    def _own(self) -> None:
        """Keeps other processes from the same part of the folder, until this one ends."""
        try:
            fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._index.close()
            raise ValueError(f"Another process is drawing into {self.folder}; wait for it, or stop it.") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # some network folders have no locks
                raise

    def _sweep(self, index: int, count: int) -> None:
        """Removes what killed processes left half-written: this one's, and those that are no more."""
        for path in self.folder.glob(".*.partial"):
            owner = path.name.split(".")[-2]
            if owner == str(index) or (index == 0 and owner.isdecimal() and int(owner) >= count):
                path.unlink(missing_ok=True)

    def _end_last_line(self) -> None:
        """Cuts off the line that a killed process only began, so that the next one stands alone."""
        self._index.seek(0)
        data = self._index.read()
        if not data.endswith(b"\n"):
            self._index.truncate(data.rfind(b"\n") + 1)

    def _append(self, line: bytes) -> None:
        """Adds the line whole, or not at all."""
        file = self._index.fileno()
        size = os.fstat(file).st_size
        if os.write(file, line) < len(line):
            os.ftruncate(file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _write(self, path: Path, data: bytes) -> Path:
        partial = self.folder / f".{path.name}{self._mark}"
        try:
            partial.write_bytes(data)
            return partial.replace(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}.") from error


def read_entries(folder: Path) -> list[dict[str, Any]]:
    """What a folder's index files say of images that are there whole: by line and seed, each once."""
    found: dict[str, dict[str, Any]] = {}
    for part in sorted(folder.glob("images*.jsonl")):
        for line in part.read_bytes().split(b"\n"):
            if (entry := _entry(line)) and _is_whole(folder, entry):
                found[entry["file"]] = entry
    return sorted(found.values(), key=lambda entry: (entry["line"], entry["seed"]))


def _is_whole(folder: Path, entry: dict[str, Any]) -> bool:
    try:
        return (folder / entry["file"]).stat().st_size == entry["bytes"]
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return False


def _entry(line: bytes) -> dict[str, Any] | None:
    """A whole line of an index file; None for what is none, such as one that was only begun."""
    try:
        entry = json.loads(line)
        file, numbers = entry["file"], (entry["line"], entry["seed"], entry["bytes"])
        right = (
            isinstance(file, str) and isinstance(entry["settings"], dict) and Path(file).name == file and file[0] != "."
        )
        return entry if right and all(type(number) is int for number in numbers) else None
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
