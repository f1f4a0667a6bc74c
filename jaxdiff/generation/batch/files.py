"""Prompt files: text, JSON Lines or CSV, read line by line. A bad line stops no other."""

import csv
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jaxdiff.config import nearest
from jaxdiff.generation.request import PICTURES, SEVERAL, Request, current_name

MAX_LINE = 1_000_000
"""A line of more bytes than this is refused."""
FIELDS = tuple(field.name for field in fields(Request))


class Line(NamedTuple):
    """A line of a file: its request, or why there is none."""

    number: int
    """The line that it begins on, from 1."""
    request: Request | None
    problem: str = ""
    """A sentence that begins with the file and the line."""


def read_requests(path: Path | str, defaults: Mapping[str, Any] | None = None) -> Iterator[Line]:
    """A prompt file's requests, one at a time, in its order.

    Args:
        path: `.jsonl` (an object a line) and `.csv` or `.tsv` (with a header) may give any field of `Request`; in all
            other files each line is a prompt. Blank lines are skipped. Paths of images are relative to the file.
        defaults: fields for lines that do not give them.

    Raises:
        ValueError: when the file cannot be read, is not UTF-8, is empty, or its header is wrong.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file of prompts.")
    kind = {".jsonl": _json, ".ndjson": _json, ".csv": _csv, ".tsv": _csv}.get(path.suffix.lower(), _text)
    try:
        with path.open("rb") as file:
            _check_encoding(path, file)
            empty = True
            for number, values in kind(path, file):
                empty = False
                try:
                    if isinstance(values, ValueError):
                        raise values
                    request = Request.of(_resolved(values, path.parent), defaults)
                    request.check_portable()
                except ValueError as error:
                    yield Line(number, None, f"{path} line {number}: {_short(str(error))}")
                else:
                    yield Line(number, request)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if empty:
        raise ValueError(f"{path} has no prompt.")


_Lines = Iterator[tuple[int, dict[str, Any] | ValueError]]


def _text(path: Path, file: BinaryIO) -> _Lines:
    for number, line in _lines(file):
        if isinstance(line, ValueError):
            yield number, line
        elif line.strip():
            yield number, {"prompt": line.strip()}


def _json(path: Path, file: BinaryIO) -> _Lines:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            name = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise ValueError(f"It has {name!r} twice.")
        return values

    def finite(word: str) -> Any:
        raise ValueError(f"{word} is not a number in JSON.")

    for number, line in _lines(file):
        if isinstance(line, ValueError):
            yield number, line
        elif line.strip():
            try:
                values = json.loads(line, object_pairs_hook=once, parse_constant=finite)
                if not isinstance(values, dict):
                    raise ValueError('It is not a JSON object, such as {"prompt": "a red apple"}.')
                yield number, values
            except json.JSONDecodeError as error:
                yield number, ValueError(f"It is not JSON: {error.msg} at character {error.pos + 1}.")
            except RecursionError:
                yield number, ValueError("It is nested too deeply.")
            except ValueError as error:
                yield number, error


def _csv(path: Path, file: BinaryIO) -> _Lines:
    broken: dict[int, ValueError] = {}

    def lines() -> Iterator[str]:
        for number, line in _lines(file):
            if isinstance(line, ValueError):
                broken[number] = line
            yield "\n" if isinstance(line, ValueError) else f"{line}\n"

    reader = csv.reader(lines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise ValueError(f"{path}: the header is damaged ({error}).") from error
            yield number, ValueError(f"Its quotes or cells are damaged ({error}).")
            continue
        if lost := [n for n in broken if number <= n]:
            if header is None:
                raise ValueError(f"{path}: the header is damaged ({broken[lost[0]]}).")
            yield lost[0], broken.pop(lost[0])
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            _check_header(path, header)
        elif len(cells) > len(header):
            yield number, ValueError(f"It has {len(cells)} cells, the header {len(header)}.")
        else:
            yield number, dict(zip(header, cells, strict=False))


def _check_header(path: Path, header: list[str]) -> None:
    for name in header:
        if current_name(name) not in FIELDS:
            raise ValueError(f"{path}: the header has an unknown column {name!r}{nearest(name, FIELDS)}")
        if [current_name(other) for other in header].count(current_name(name)) > 1:
            raise ValueError(f"{path}: the header has {name!r} twice, or once by its old name.")
    if "prompt" not in header:
        raise ValueError(f"{path}: the header has no prompt.")


def _lines(file: BinaryIO) -> Iterator[tuple[int, str | ValueError]]:
    """Each line's number, from 1, and its text without its end, or what is wrong with it."""
    number = 0
    while data := file.readline(MAX_LINE):
        number += 1
        long = len(data) == MAX_LINE and not data.endswith(b"\n")
        while long and (more := file.readline(MAX_LINE)) and not more.endswith(b"\n"):
            pass
        if long:
            yield number, ValueError(f"It has more than {MAX_LINE} bytes.")
            continue
        try:
            yield number, data.rstrip(b"\r\n").decode()
        except UnicodeDecodeError:
            yield number, ValueError("It is not UTF-8.")


def _check_encoding(path: Path, file: BinaryIO) -> None:
    """Skips a byte order mark; refuses UTF-16."""
    start = file.read(3)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is UTF-16; save it as UTF-8.")
    if start != b"\xef\xbb\xbf":
        file.seek(0)


def _resolved(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values, with paths relative to the working directory.

    Raises:
        ValueError: where there is no such file.
    """

    def resolved(name: str, given: Any) -> Any:
        if isinstance(given, list):
            return [resolved(name, one) for one in given]
        if not isinstance(given, str) or not given:
            return given
        if "\0" in given or not (folder / given).is_file():
            raise ValueError(f"{name} is {given!r}, and there is no such file.")
        return str(folder / given)

    found = {name: values[name] for name in PICTURES if name in values}
    for name in SEVERAL:
        if isinstance(several := found.get(name), str) and several.startswith("["):  # as CSV has a list
            with suppress(ValueError, RecursionError):
                found[name] = json.loads(several)
    return values | {name: resolved(name, given) for name, given in found.items()}


def _short(sentence: str) -> str:
    return sentence if len(sentence) <= 500 else f"{sentence[:497]}..."
