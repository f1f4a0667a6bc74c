"""Many pictures from one pipeline: which are drawn at once, and how they are saved while the next ones are drawn."""

import hashlib
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

import jaxdiff
from jaxdiff.arguments import fits
from jaxdiff.decode import header_size
from jaxdiff.io.images import outpaint_canvas, read_bytes, read_mask, read_picture
from jaxdiff.pipeline import Pipeline
from jaxdiff.prompts import Wildcards, Words, encode, fill
from jaxdiff.rows import Batch, Picture, Row, groups
from jaxdiff.scenes import PromptWarning
from jaxdiff.settings import Settings
from jaxdiff.tasks import UPSCALE_STRENGTH, fitted, fitted_size

# Pixels drawn at once on a device, and pictures at most: larger batches gain little and may not fit into memory.
BATCH_PIXELS, BATCH_IMAGES = 2**20, 16
WRITERS = 4
"""So many threads encode and write pictures."""

Image = UInt8[np.ndarray, "h w 3"]


class Drawn(NamedTuple):
    """A picture that is there."""

    picture: Picture
    image: Image
    frames: tuple[Image, ...]
    """The model's guesses of it after each step, where these were asked for."""


class Shape(NamedTuple):
    """What of a row makes arrays of other shapes, and so another program."""

    size: tuple[int, int]
    """Width and height of the picture."""
    window: int | None
    prompt: tuple[int, ...]
    """Phases, parts and chunks of its prompts."""


def fill_in(pictures: Iterable[Picture], folder: Path | str) -> Iterator[Picture]:
    """The pictures with a line of the folder's files for each wildcard in their prompts, chosen by their seeds.

    Raises:
        ValueError: where there is no such folder.
    """
    wildcards = Wildcards(folder)
    for picture in pictures:
        row, seed = picture.row, picture.seed
        regions = tuple(region.prompt for region in row.regions)
        words, told = fill(Words(row.prompt, row.negative_prompt, regions), wildcards, seed)
        others, also_told = fill(Words(row.to_prompt or "", row.source_prompt), wildcards, seed)
        for sentence in dict.fromkeys((*told, *also_told)):
            warnings.warn(sentence, PromptWarning, stacklevel=2)
        filled = replace(
            row,
            prompt=words.prompt,
            negative_prompt=words.negative_prompt,
            regions=tuple(r._replace(prompt=text) for r, text in zip(row.regions, words.regions, strict=True)),
            to_prompt=None if row.to_prompt is None else others.prompt,
            source_prompt=others.negative_prompt,
        )
        yield picture._replace(row=filled)


def batches(pipe: Pipeline, wanted: Iterable[Picture]) -> Iterator[Batch]:
    """The pictures in batches that the pipeline's devices draw at once, each shape with one program."""

    @cache
    def shape(row: Row) -> Shape:
        regions = tuple(region.prompt for region in row.regions)
        words = [Words(row.prompt, row.negative_prompt, regions), Words("", row.source_prompt)]
        words += [] if row.to_prompt is None else [Words(row.to_prompt, row.negative_prompt)]
        how = _how(pipe, row)
        prompts, _ = encode(words, pipe.tokenizer, how.steps, literal=how.literal)
        return Shape(_size(pipe, row), how.window, prompts.ids.shape[1:4])

    def most(row: Row) -> int:
        width, height = shape(row).size
        return max(1, min(BATCH_IMAGES, BATCH_PIXELS // max(1, width * height))) * pipe.spread

    return groups(wanted, most, pipe.spread, shape)


def draw(
    pipe: Pipeline,
    pictures: Sequence[Picture],
    progress: Callable[[int], object] | None = None,
    watch: Callable[[int, UInt8[np.ndarray, "b h w 3"]], object] | None = None,
) -> UInt8[np.ndarray, "b h w 3"]:
    """The pictures of one of `batches`, in one call of the pipeline.

    Raises:
        ValueError: as `Pipeline.__call__`, and where an image or a mask cannot be read, or has no size that fits.
    """
    rows = [picture.row for picture in pictures]
    first = rows[0]
    given: dict[str, Any] = dict(vars(_how(pipe, first)))
    if first.image is not None:
        made = {row: canvas(pipe, row) for row in dict.fromkeys(rows)}
        given |= {"image": np.stack([made[row][0] for row in rows]), "size": None}
        masks = [mask for row in rows if (mask := made[row][1]) is not None]
        given |= {"mask": np.stack(masks)} if masks else {}
    if first.regions:
        given["regions"] = [(region.prompt, region.box) for region in first.regions]
    if first.settings.invert is not None:
        given["source_prompt"] = [row.source_prompt for row in rows]
    if first.to_prompt is not None:
        given["to_prompts"] = [row.to_prompt for row in rows]
    if first.to_seed is not None:
        given["to_seed"] = [row.to_seed for row in rows]
    if first.to_prompt is not None or first.to_seed is not None:
        given["share"] = [row.share for row in rows]
    return pipe(
        [row.prompt for row in rows],
        [row.negative_prompt for row in rows],
        [picture.seed for picture in pictures],
        progress=progress,
        watch=watch,
        **given,
    )


def draw_all(
    pipe: Pipeline,
    wanted: Iterable[Picture],
    save: Callable[[Drawn], Any],
    there: Callable[[Picture], bool] = lambda picture: False,
    *,
    refuse: Callable[[Picture, ValueError], object] | None = None,
    saved: Callable[[Any], object] = lambda result: None,
    progress: Callable[[float], object] = lambda images: None,
    trajectory: bool = False,
) -> None:
    """Draws all pictures, and saves each in a thread while the next ones are drawn.

    Args:
        pipe: the model.
        wanted: the pictures, those too that are there already: a batch of which some are there is drawn again as it
            was, since a picture's last bits depend on its neighbours, and the missing ones are saved.
        save: what is done with each, in any of `WRITERS` threads.
        there: whether a picture need not be drawn.
        refuse: is told which picture cannot be drawn, and why; the others of its row are then left out, those of other
            rows drawn. Without it, the first such error ends it all.
        saved: is told what `save` returned, in the order of drawing.
        progress: is told, again and again, how many more images are drawn.
        trajectory: asks for the guesses after each step, too, each of which takes as long as a step.

    Raises:
        ValueError: as `draw` without `refuse`, and what `save` raises; what was being saved is still saved and told.
    """
    with _Writer(save, saved) as writer:
        for batch in batches(pipe, wanted):
            missing = {picture for picture in batch.pictures[: batch.new] if not there(picture)}
            if not missing:
                continue
            told = 0.0

            def more(done: float, n: int = len(missing)) -> None:
                nonlocal told
                progress(done * n - told)
                told = done * n

            for drawn in _drawn(pipe, batch.pictures, refuse, more, trajectory):
                if drawn.picture in missing:
                    missing.remove(drawn.picture)  # the batch may be filled up with it
                    writer.put(drawn)
            writer.tell()
            more(1.0)


def _drawn(
    pipe: Pipeline,
    pictures: Sequence[Picture],
    refuse: Callable[[Picture, ValueError], object] | None,
    progress: Callable[[float], object],
    trajectory: bool,
) -> Iterator[Drawn]:
    frames: list[UInt8[np.ndarray, "b h w 3"]] = []
    steps = pictures[0].row.settings.steps
    try:
        images = draw(
            pipe,
            pictures,
            lambda done: progress(min(1.0, done / steps)),
            (lambda step, guesses: frames.append(guesses)) if trajectory else None,
        )
    except ValueError as error:
        lines = list(dict.fromkeys(picture.line for picture in pictures))
        if refuse is None:
            raise
        if len(lines) == 1:
            refuse(pictures[0], error)
            return
        for line in lines:  # in batches of the same size, which compile nothing anew
            own = [picture for picture in pictures if picture.line == line]
            own += own[-1:] * (len(pictures) - len(own))
            yield from _drawn(pipe, own, refuse, lambda done: None, trajectory)
    else:
        for i, (picture, image) in enumerate(zip(pictures, images, strict=True)):
            yield Drawn(picture, image, tuple(guesses[i] for guesses in frames))


class _Writer:
    """Saves in threads, and tells what was saved in the order it was put; waits where too much is waiting."""

    def __init__(self, save: Callable[[Drawn], Any], saved: Callable[[Any], object]) -> None:
        self._save, self._saved = save, saved
        self._pool = ThreadPoolExecutor(WRITERS)
        self._waiting: deque[Future[Any]] = deque()

    def __enter__(self) -> "_Writer":
        return self

    def put(self, drawn: Drawn) -> None:
        self._waiting.append(self._pool.submit(self._save, drawn))

    def tell(self) -> None:
        """What is saved by now; raises what went wrong there."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > 8 * WRITERS):
            self._saved(self._waiting.popleft().result())

    def __exit__(self, kind: Any, *_: object) -> None:
        self._pool.shutdown()
        failed = [future for future in self._waiting if future.exception() is not None]
        for future in self._waiting:
            if future not in failed:
                self._saved(future.result())
        if failed and kind is None:
            failed[0].result()


def told(pipe: Pipeline, picture: Picture, image: Image) -> dict[str, Any]:
    """How a picture was made, as JSON values: all that is needed to make it again, but for the model and the images.

    The images that it was made from are there with their SHA-256, so that it shows where they have changed.
    """
    row = picture.row.values() | {"seed": picture.seed}
    del row["n"]
    for name in ("image", "mask"):
        if row[name] is not None:
            row[f"{name}_sha256"] = sha256(row[name])
    return row | {
        "width": image.shape[1], "height": image.shape[0], "model": pipe.name, "dtype": pipe.dtype,
        "version": f"jaxdiff {jaxdiff.__version__}",
    }  # fmt: skip


@lru_cache(10_000)
def sha256(path: str) -> str:
    """Of a picture's file.

    Raises:
        ValueError: as `read_bytes`.
    """
    return hashlib.sha256(read_bytes(path)).hexdigest()


def canvas(pipe: Pipeline, row: Row) -> tuple[Image, UInt8[np.ndarray, "h w"] | None]:
    """The image that a row begins from, at the size that is drawn, and its mask where it has one.

    Raises:
        ValueError: where they cannot be read, differ in size, or have no size that fits.
    """
    assert row.image is not None, "only such rows are asked for theirs"
    image = read_picture(row.image)
    height, width = image.shape[:2]
    fits("The picture", _size(pipe, row), pipe.model.vae.factor)
    size = _image_size(pipe, row, (width, height))
    mask = None
    if row.mask is not None:
        grey = np.round(255 * read_mask(row.mask, (width, height))).astype(np.uint8)
        mask = fitted(pipe, np.repeat(grey[..., None], 3, axis=2), size)[..., 0]
    image = fitted(pipe, image, size)
    if row.outpaint is not None:
        left, top, right, bottom = row.outpaint
        image, new = outpaint_canvas(image, left, right, top, bottom)
        mask = (255 * new).astype(np.uint8)
    return image, mask


def _size(pipe: Pipeline, row: Row) -> tuple[int, int]:
    """Width and height that a row's picture will have; (0, 0) where that cannot be said."""
    if row.image is None:
        return row.settings.size or pipe.size or (0, 0)  # pyright: ignore[reportReturnType]
    own = _header(row.image)
    if not all(own):
        return 0, 0
    width, height = _image_size(pipe, row, own)
    left, top, right, bottom = row.outpaint or (0, 0, 0, 0)
    times = row.settings.enlarge
    return left + width * times + right, top + height * times + bottom


def _image_size(pipe: Pipeline, row: Row, own: tuple[int, int]) -> tuple[int, int]:
    """At which size an image is taken."""
    if row.grows:
        times = row.upscale or 1
        return own[0] * times, own[1] * times
    return row.settings.size or fitted_size(pipe, own)  # pyright: ignore[reportReturnType]


@lru_cache(10_000)
def _header(path: str) -> tuple[int, int]:
    return header_size(Path(path))


def _how(pipe: Pipeline, row: Row) -> Settings:
    """The settings, with what a row's task says where nothing else was said."""
    ask = row.settings
    if not row.grows:
        return ask
    wide = pipe.size is not None and max(_size(pipe, row)) > max(pipe.size)
    window = max(pipe.size or (0,)) if wide and ask.window is None and ask.cache_interval == 1 else ask.window
    return replace(ask, window=window, strength=UPSCALE_STRENGTH if ask.strength is None else ask.strength)
