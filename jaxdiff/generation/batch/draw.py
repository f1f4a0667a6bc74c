"""Draws many images: in batches, and each saved by a thread while the next ones are drawn."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

import jaxdiff
from jaxdiff.generation.batch.groups import Batch, Job, groups
from jaxdiff.generation.canvas import image_size
from jaxdiff.generation.conditioning import encoded
from jaxdiff.generation.drawing import settled
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.generation.request import Request
from jaxdiff.io.images import read_bytes

# Pixels drawn at once on a device, and images at most: larger batches gain little and may not fit into memory.
BATCH_PIXELS, BATCH_IMAGES = 2**20, 16
WRITERS = 4
"""Threads that encode and write images."""

Image = UInt8[np.ndarray, "h w 3"]


class Drawn(NamedTuple):
    """An image that has been drawn."""

    job: Job
    image: Image
    frames: tuple[Image, ...]
    """The guesses of it after each step, where they were asked for."""


def batches(pipe: Pipeline, wanted: Iterable[Job]) -> Iterator[Batch]:
    """The images in batches that the pipeline's devices draw at once, each shape with one program."""
    wanted = list(wanted)
    if len(wanted) == 1 and pipe.num_devices == 1:
        return iter([Batch((wanted[0],), 1)])

    def shape(request: Request) -> Any:
        """The size, and the phases, parts and chunks of the prompts."""
        try:
            request = settled(request, pipe.info)
            size = image_size(request, pipe.networks, pipe.size)
        except ValueError:  # which the drawing tells
            return None
        prompts, _ = encoded([request], pipe.model.tokenizers, request.steps or 1)
        return size, request.tile, prompts[0].ids.shape[1:4]

    def most(shape: Any) -> int:
        pixels = BATCH_PIXELS if shape is None else shape[0][0] * shape[0][1]
        return max(1, min(BATCH_IMAGES, BATCH_PIXELS // pixels)) * pipe.num_devices

    return groups(wanted, most, pipe.num_devices, shape)


def draw_all(
    pipe: Pipeline,
    wanted: Iterable[Job],
    save: Callable[[Drawn], Any],
    exists: Callable[[Job], bool] = lambda job: False,
    *,
    refuse: Callable[[Job, ValueError], object] | None = None,
    saved: Callable[[Any], object] = lambda result: None,
    progress: Callable[[float], object] = lambda images: None,
    trajectory: bool = False,
) -> None:
    """Draws all images, and saves each in a thread while the next ones are drawn.

    Args:
        pipe: the model.
        wanted: the images, with those that exist already: a batch in which some exist is drawn again as it was, since
            an image's last bits depend on its neighbours, and the missing ones are saved.
        save: is called with each image, in any of `WRITERS` threads.
        exists: whether an image need not be drawn.
        refuse: is called with an image that cannot be drawn, and the reason; the others of its line are then left out,
            those of other lines are drawn. Without it, the first such error ends the run.
        saved: is called with what `save` returned, in the order of drawing.
        progress: is called, again and again, with how many more images are drawn.
        trajectory: decodes the guess after each step, too.

    Raises:
        ValueError: as `Pipeline.draw` without `refuse`, and what `save` raises; what was being saved is still saved.
    """
    refused: set[int] = set()

    def refuse_line(job: Job, error: ValueError) -> None:
        if refuse is not None and job.line not in refused:
            refused.add(job.line)
            refuse(job, error)

    with _Writer(save, saved) as writer:
        for batch in batches(pipe, wanted):
            missing = {job.index for job in batch.jobs[: batch.new] if job.line not in refused and not exists(job)}
            if not missing:
                continue
            reported = 0.0

            def more(done: float, n: int = len(missing)) -> None:
                nonlocal reported
                progress(done * n - reported)
                reported = done * n

            for drawn in _drawn(pipe, batch.jobs, refuse and refuse_line, more, trajectory):
                if drawn.job.index in missing:
                    missing.remove(drawn.job.index)  # the batch may be filled up with it
                    writer.put(drawn)
            writer.report()
            more(1.0)


def _drawn(
    pipe: Pipeline,
    jobs: Sequence[Job],
    refuse: Callable[[Job, ValueError], object] | None,
    progress: Callable[[float], object],
    trajectory: bool,
) -> Iterator[Drawn]:
    frames: list[UInt8[np.ndarray, "b h w 3"]] = []
    steps = jobs[0].request.steps or pipe.defaults["steps"]
    try:
        images = pipe.draw(
            [job.single for job in jobs],
            progress=lambda done: progress(min(1.0, done / steps)),
            on_step=(lambda step, guess: frames.append(pipe.decode(guess))) if trajectory else None,
        )
    except ValueError as error:
        lines = list(dict.fromkeys(job.line for job in jobs))
        if refuse is None:
            raise
        if len(lines) == 1:
            refuse(jobs[0], error)
            return
        for line in lines:  # in batches of the same size, which compile nothing
            own = [job for job in jobs if job.line == line]
            own += own[-1:] * (len(jobs) - len(own))
            yield from _drawn(pipe, own, refuse, lambda done: None, trajectory)
    else:
        frames[-1:] = [images] if frames else []  # the last guess is the image, with what a mask keeps
        for i, (job, image) in enumerate(zip(jobs, images, strict=True)):
            yield Drawn(job, image, tuple(guesses[i] for guesses in frames))


class _Writer:
    """Saves in threads, and reports what was saved in the order it was put; waits where too much is waiting."""

    def __init__(self, save: Callable[[Drawn], Any], saved: Callable[[Any], object]) -> None:
        self._save, self._saved = save, saved
        self._pool = ThreadPoolExecutor(WRITERS)
        self._waiting: deque[Future[Any]] = deque()

    def __enter__(self) -> "_Writer":
        return self

    def put(self, drawn: Drawn) -> None:
        self._waiting.append(self._pool.submit(self._save, drawn))

    def report(self) -> None:
        """Reports what is saved by now; raises what went wrong there."""
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


def metadata(pipe: Pipeline, request: Request, image: Image) -> dict[str, Any]:
    """How an image was made, as JSON values: all that is needed to make it again, but the model, images, and the files
    of LoRAs, textual inversions, control networks and IP-Adapters.

    The images that it was made from are there by their path, and with their SHA-256, which tells whether they changed.

    Args:
        pipe: the model.
        request: of this one image.
        image: the result.
    """
    values = settled(request, pipe.info).values()
    del values["n"]
    for name, given in request.pictures():
        digest = hashlib.sha256(given.tobytes()).hexdigest() if isinstance(given, np.ndarray) else sha256(str(given))
        values[f"{name}_sha256"] = digest
    if pipe.params.memory != "normal":
        values["memory"] = pipe.params.memory
    if pipe.refiner is not None:
        values["refiner"] = pipe.refiner.name
    values |= pipe.model.exchanged
    if pipe.model.loras:
        values["loras"] = [lora.values for lora in pipe.model.loras]
    if pipe.model.embeddings:
        values["embeddings"] = [{"file": one.path.as_posix(), "word": one.word} for one in pipe.model.embeddings]
    if request.control_image:
        values["controls"] = [control.path.as_posix() for control in pipe.model.controls]
    if request.image_prompt and pipe.model.ip_adapters:
        values["ip_adapters"] = [adapter.path.as_posix() for adapter in pipe.model.ip_adapters]
        assert pipe.model.image_encoder is not None, "what IP-Adapters read"
        values["image_encoder"] = pipe.model.image_encoder.path.as_posix()
    return values | {
        "width": image.shape[1],
        "height": image.shape[0],
        "model": pipe.name,
        "dtype": pipe.dtype,
        "version": f"jaxdiff {jaxdiff.__version__}",
    }


@lru_cache(10_000)
def sha256(path: str) -> str:
    """An image file's SHA-256, in hexadecimal digits.

    Raises:
        ValueError: as `read_bytes`.
    """
    return hashlib.sha256(read_bytes(path)).hexdigest()
