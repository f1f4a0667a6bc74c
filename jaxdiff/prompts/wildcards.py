"""`__animals__` in a prompt: a line of `animals.txt`, chosen by the image's seed."""

import hashlib
import re
from pathlib import Path

MAX_DEPTH = 8
"""A line's own wildcards are filled in so many levels deep."""
MAX_FILLED = 1000
"""So many wildcards of one prompt are filled in: lines that name each other twice would grow without end."""
MAX_BYTES = 16_000_000
"""Files of more bytes than this are not read."""

_NAME = re.compile(r"(?<!\\)__(\w[\w ./-]{0,99}?)__")


def named(text: str) -> list[str]:
    """The wildcards of a text, as they are written."""
    return [match[0] for match in _NAME.finditer(text)]


class Wildcards:
    """The files of a folder, and of the folders in it: one text a line, but for blank ones and those that begin with #.

    Raises:
        ValueError: where there is no such folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is no folder of wildcards.")
        self._lines: dict[str, list[str]] = {}

    def fill(self, text: str, seed: int, place: str = "") -> tuple[str, list[str]]:
        """The text with lines in place of `__names__`, and sentences of warning.

        A line depends on the seed, on `place` and on which wildcard of the text it is, in the order they are written,
        and on nothing else. A name that has no file stays as it is written.
        """
        warnings: dict[str, None] = {}
        filled = 0

        def line(match: re.Match[str], trail: str, depth: int) -> str:
            nonlocal filled
            try:
                lines = self.lines(match[1])
            except ValueError as error:
                warnings[f"{match[0]} is taken as text: {error}"] = None
                return match[0]
            if depth == MAX_DEPTH or filled == MAX_FILLED:
                warnings[f"{match[0]} is taken as text: wildcards fill in {MAX_FILLED} others at most, {MAX_DEPTH} "
                         "levels deep."] = None  # fmt: skip
                return match[0]
            filled += 1
            chosen = hashlib.blake2b(f"{seed}{trail}".encode(), digest_size=8).digest()
            return walk(lines[int.from_bytes(chosen) % len(lines)], trail, depth + 1)

        def walk(text: str, trail: str, depth: int) -> str:
            parts, end = [], 0
            for i, match in enumerate(_NAME.finditer(text)):
                parts += text[end : match.start()], line(match, f"{trail}/{i}", depth)
                end = match.end()
            return "".join((*parts, text[end:]))

        return walk(text, place, 0), list(warnings)

    def lines(self, name: str) -> list[str]:
        """The texts of a file, at least one.

        Raises:
            ValueError: where there is no such file in the folder, it cannot be read, or it has no text.
        """
        if name not in self._lines:
            self._lines[name] = self._read(name)
        return self._lines[name]

    def _read(self, name: str) -> list[str]:
        path = self.folder / f"{name}.txt"
        try:
            # Links are followed, and may not lead out of the folder either.
            if not path.resolve().is_relative_to(self.folder.resolve()) or not path.is_file():
                raise ValueError(f"{self.folder} has no {name}.txt.")
            if (size := path.stat().st_size) > MAX_BYTES:
                raise ValueError(f"{path} has {size} bytes, more than {MAX_BYTES}.")
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8.") from error
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
        lines = [line.strip() for line in text.splitlines()]
        if not (lines := [line for line in lines if line and not line.startswith("#")]):
            raise ValueError(f"{path} has no line of text.")
        return lines
