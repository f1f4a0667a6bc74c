"""Which image comes from which line, and which images are drawn together."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.generation.batch.files import Line
from jaxdiff.generation.request import PER_IMAGE, Request

# Fields that add to a program where they are given.
OPTIONAL = (
    "image",
    "to_prompt",
    "to_seed",
    "latents",
    "guidance_interval",
    *(name for name, default in Guidance._field_defaults.items() if default is None and name not in ("low", "high")),
)


class Job(NamedTuple):
    """One image to draw."""

    index: int
    """Its place among all images of the file, from 0."""
    line: int
    """The line of its request."""
    seed: int
    request: Request
    """The request of its line, which may ask for more images."""

    @property
    def single(self) -> Request:
        """The request of this image alone."""
        return replace(self.request, n=1, seed=self.seed)


class Batch(NamedTuple):
    """Images that are drawn at once. After the first `new` come others that are drawn elsewhere, to fill it up."""

    jobs: tuple[Job, ...]
    new: int


def jobs_of(lines: Iterable[Line], first_seed: int = 0) -> Iterator[Job]:
    """The images of a file's requests, in their order.

    Image k of a request has its seed + k. Where a request has none, an image's seed is `first_seed` and its place in
    the file, so that all differ. A bad line counts as one image there: to mend it changes no other.

    Raises:
        ValueError: where seeds run out.
    """
    index = skipped = 0
    for line in lines:
        if line.request is None:
            skipped += 1
            continue
        first = line.request.seed if line.request.seed is not None else first_seed + index + skipped
        last = line.request.last_seed
        if first + line.request.n - 1 > last:
            raise ValueError(f"Line {line.number} needs seeds above {last}, which is the last; start with a lower one.")
        for k in range(line.request.n):
            yield Job(index, line.number, first + k, line.request)
            index += 1


def groups(
    wanted: Iterable[Job],
    most: Callable[[Any], int],
    multiple: int = 1,
    shape: Callable[[Request], Hashable] = lambda request: request.size,
) -> Iterator[Batch]:
    """Batches of images that share all settings, in the order in which they first occur.

    All batches of one compiled program have one size, so that it compiles once: what the largest set of like images
    needs. A set's last batch is filled up with its last image. Which images exist already plays no part, so that an
    image has the same neighbours, and the same last bits, whenever it is drawn.

    Args:
        wanted: the images.
        most: how many images of a `shape` are drawn at once at most; at least `multiple` are.
        multiple: sizes of batches are multiples of this number, that of the devices.
        shape: says what of a request gives arrays other shapes: the image's size, and the layout of its prompts.
    """
    sets: dict[Hashable, list[Job]] = {}
    keys: dict[int, Hashable] = {}
    for job in wanted:
        request = job.request  # one object for all images of a line
        if id(request) not in keys:
            keys[id(request)] = program_key(request, shape(request)), *shared(request)
        sets.setdefault(keys[id(request)], []).append(job)
    sizes: dict[Any, int] = {}
    for (program, *_), alike in sets.items():  # pyright: ignore
        batches = -(-len(alike) // (max(most(program[0]), multiple) // multiple * multiple))
        even = -(-len(alike) // (batches * multiple)) * multiple
        sizes[program] = max(sizes.get(program, 0), even)
    for (program, *_), alike in sets.items():  # pyright: ignore
        yield from _batches(alike, sizes[program])


def _batches(alike: Sequence[Job], size: int) -> Iterator[Batch]:
    for start in range(0, len(alike), size):
        new = tuple(alike[start : start + size])
        yield Batch(new + new[-1:] * (size - len(new)), len(new))


def program_key(request: Request, shape: Hashable) -> Hashable:
    """What a request's program is compiled for: two requests of one key share it."""
    given = tuple(getattr(request, name) is not None for name in OPTIONAL)
    masked = request.mask is not None or request.outpaint is not None
    windows = tuple(map(bool, request.windows(len(request.control_image))))
    features = (
        windows,
        request.control_guess,
        len(request.image_prompt),
        bool(request.regions),
        request.keep_layout > 0,
        request.cache_interval > 1,
        masked,
        *given,
    )
    return shape, request.sampler, request.tile, request.rng, request.invert, *features


def shared(request: Request) -> tuple[Hashable, ...]:
    """What images that are drawn together have in common."""

    def key(value: Any) -> Hashable:
        if isinstance(value, np.ndarray):
            return value.shape, value.tobytes()
        return tuple(map(key, value)) if isinstance(value, tuple) else value

    return tuple(key(value) for name, value in vars(request).items() if name not in PER_IMAGE)
