"""Which picture comes from which row, and which are drawn at once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from jaxdiff.decode import header_size
from jaxdiff.rows.read import Line
from jaxdiff.rows.row import SEEDS, Row

OWN = frozenset({"prompt", "negative_prompt", "seed", "n", "image", "mask"})
"""What pictures that are drawn at once need not share."""


class Picture(NamedTuple):
    """One picture of a row."""

    index: int
    """Its place among all of the file's, from 0."""
    line: int
    """The line of its row."""
    seed: int
    row: Row


class Batch(NamedTuple):
    """Pictures that are drawn at once: the first `new` of them; the others fill up, and are drawn elsewhere."""

    pictures: tuple[Picture, ...]
    new: int


def pictures(lines: Iterable[Line], first_seed: int = 0) -> Iterator[Picture]:
    """The pictures of a file's rows, in their order.

    Picture k of a row has its seed + k. Where a row has none, a picture's seed is `first_seed` and its place in the
    file, so that all differ. A bad row counts as one picture there: mending it changes no other.

    Raises:
        ValueError: where seeds run out.
    """
    index = skipped = 0
    for line in lines:
        if line.row is None:
            skipped += 1
            continue
        start = line.row.seed if line.row.seed is not None else first_seed + index + skipped
        if start + line.row.n > SEEDS:
            raise ValueError(
                f"The seeds end at {SEEDS - 1}, and line {line.number} needs more; begin with a lower one."
            )
        for k in range(line.row.n):
            yield Picture(index, line.number, start + k, line.row)
            index += 1


def groups(wanted: Iterable[Picture], most: int, multiple: int = 1) -> Iterator[Batch]:
    """Batches of pictures that share all but `OWN`, first come, first drawn.

    All batches of one compiled program have one size, not to compile it again: what the largest set of like pictures
    needs. Each set's last batch is filled up with its last picture.

    Args:
        wanted: the pictures.
        most: how many are drawn at once, at most; at least `multiple`.
        multiple: of this number, that of the devices, the sizes are multiples.

    Raises:
        ValueError: where `most` is below `multiple`, or that below 1.
    """
    if not 1 <= multiple <= most:
        raise ValueError(f"Batches of {most} pictures at most cannot be multiples of {multiple}.")
    sets: dict[tuple[Any, ...], list[Picture]] = {}
    for picture in wanted:
        sets.setdefault(_alike(picture.row), []).append(picture)
    sizes: dict[tuple[Any, ...], int] = {}
    for alike in sets.values():
        program = _program(alike[0].row)
        batches = -(-len(alike) // (most // multiple * multiple))
        even = -(-len(alike) // (batches * multiple)) * multiple
        sizes[program] = max(sizes.get(program, 0), even)
    for alike in sets.values():
        yield from _batches(alike, sizes[_program(alike[0].row)])


def _batches(alike: Sequence[Picture], size: int) -> Iterator[Batch]:
    for start in range(0, len(alike), size):
        new = tuple(alike[start : start + size])
        yield Batch(new + new[-1:] * (size - len(new)), len(new))


def _alike(row: Row) -> tuple[Any, ...]:
    """What pictures share that are drawn in one call."""
    return *(getattr(row, field.name) for field in fields(row) if field.name not in OWN), *_program(row)


def _program(row: Row) -> tuple[Any, ...]:
    """What a program is compiled for."""
    size = row.size or (row.image and _image_size(row.image))
    parts = row.guidance_interval is not None, row.cache_interval > 1, row.image is not None, row.mask is not None
    return size, row.sampler, *parts


@lru_cache(100_000)
def _image_size(path: str) -> tuple[int, int]:
    return header_size(Path(path))
