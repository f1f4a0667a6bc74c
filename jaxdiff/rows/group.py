"""Which picture comes from which row, and which are drawn at once."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxdiff.rows.read import Line
from jaxdiff.rows.row import SEEDS, Row


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


def groups(
    wanted: Iterable[Picture],
    most: int | Callable[[Row], int],
    multiple: int = 1,
    shape: Callable[[Row], Hashable] = lambda row: row.settings.size,
) -> Iterator[Batch]:
    """Batches of pictures that share what one call of a pipeline has for all, first come, first drawn.

    All batches of one compiled program have one size, not to compile it again: what the largest set of like pictures
    needs. Each set's last batch is filled up with its last picture. What pictures are there already plays no part, so
    that a picture has the same neighbours, and is the same to the last bit, whenever it is drawn.

    Args:
        wanted: the pictures.
        most: how many are drawn at once, at most; or says it for a row. At least `multiple` are.
        multiple: of this number, that of the devices, the sizes are multiples.
        shape: says what of a row makes other arrays: the picture's size, and how its prompts are laid out.

    Raises:
        ValueError: where `most` is a number below `multiple`, or that below 1.
    """
    if not 1 <= multiple <= (multiple if callable(most) else most):
        raise ValueError(f"Batches of {most} pictures at most cannot be multiples of {multiple}.")
    sets: dict[tuple[Any, ...], list[Picture]] = {}
    for picture in wanted:
        program = _program(picture.row, shape(picture.row))
        sets.setdefault((program, picture.row.settings, picture.row.regions), []).append(picture)
    sizes: dict[Any, int] = {}
    for (program, *_), alike in sets.items():
        limit = most(alike[0].row) if callable(most) else most
        batches = -(-len(alike) // (max(limit, multiple) // multiple * multiple))
        even = -(-len(alike) // (batches * multiple)) * multiple
        sizes[program] = max(sizes.get(program, 0), even)
    for (program, *_), alike in sets.items():
        yield from _batches(alike, sizes[program])


def _batches(alike: Sequence[Picture], size: int) -> Iterator[Batch]:
    for start in range(0, len(alike), size):
        new = tuple(alike[start : start + size])
        yield Batch(new + new[-1:] * (size - len(new)), len(new))


def _program(row: Row, shape: Hashable) -> tuple[Any, ...]:
    """What a program is compiled for."""
    ask = row.settings
    given = row.image, row.mask or row.outpaint, ask.guidance_interval, ask.perturbed, row.to_prompt, row.to_seed
    return (
        shape, ask.sampler, ask.window, ask.noise, ask.invert, ask.keep > 0, ask.cache_interval > 1, bool(row.regions),
        *(value is not None for value in given),
    )  # fmt: skip
