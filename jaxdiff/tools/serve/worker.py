"""The one thread that draws, and the queue before it."""

import base64
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.generation.batch.draw import metadata
from jaxdiff.generation.conditioning import PromptWarning
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.generation.request import Request
from jaxdiff.io.images import encode_image, slug, write_image
from jaxdiff.tools.serve.requests import DrawRequest, Limits, Refused

TellFn = Callable[[str, dict[str, Any]], object]
"""Takes an event's name and what it says, from any thread."""


class Job:
    """A request on its way. `tell` hears of it:

    queued: how many images are `ahead` of its first; at once, and whenever that changes
    started: the `images` (their numbers) that are drawn now, `together` with others' so many
    progress: `done` of `steps` for these `images`, and where wanted `guesses`, a JPEG in base64 for each
    image: one is there, its number `index`, `seed`, `settings` and its file `png` in base64
    done: all are
    error: there will be no more, and why, in the sentence `error`
    """

    def __init__(self, asked: DrawRequest, tell: TellFn) -> None:
        self.asked, self.tell = asked, tell
        self.ended = False
        """Whether nobody waits for it any more."""
        self._ahead: int | None = None
        self.images = asked.request.images(0)
        """A request for each image."""
        self._left = len(self.images)

    def wait(self, ahead: int) -> None:
        """Says how many images are ahead, if that is news."""
        if ahead != self._ahead:
            self._ahead = ahead
            self.tell("queued", {"ahead": ahead})

    def deliver(self, index: int, png: bytes, told: dict[str, Any]) -> None:
        """One image is there."""
        data = base64.b64encode(png).decode()
        self.tell("image", {"index": index, "seed": self.images[index].seed, "settings": told, "png": data})
        self._left -= 1
        if not self._left:
            self.ended = True
            self.tell("done", {})

    def fail(self, sentence: str) -> None:
        """There will be no more images."""
        if not self.ended:
            self.ended = True
            self.tell("error", {"error": sentence})


class Row(NamedTuple):
    """One image to be drawn."""

    job: Job
    index: int
    """Its number among the job's images."""

    @property
    def request(self) -> Request:
        """The request of this image."""
        return self.job.images[self.index]


class _NobodyWaits(Exception):
    """Those who asked for the images that are being drawn have gone."""


class Worker(threading.Thread):
    """Draws what is asked for, first come first served. The pipeline is this thread's alone.

    An image depends on its own seed, not on what is drawn beside it: waiting images whose settings are equal are
    drawn in one call, up to `limits.batch`, in batches filled up to a power of two so that few programs are compiled.
    """

    def __init__(self, pipe: Pipeline, limits: Limits, out: Path | None = None) -> None:
        super().__init__(name="worker", daemon=True)
        self.pipe, self.limits, self.out = pipe, limits, out
        self._rows: list[Row] = []
        self._changed = threading.Condition()

    def submit(self, job: Job) -> None:
        """Lets the job wait for its turn.

        Raises:
            Refused: when too many wait.
        """
        n = len(job.images)
        with self._changed:
            ahead = len(self._awaited())
            if ahead + n > self.limits.waiting:
                raise Refused(503, f"{ahead} images are waiting to be drawn, and there is room for "
                                   f"{self.limits.waiting}; try again later.")  # fmt: skip
            job.wait(ahead)
            self._rows = [*self._awaited(), *(Row(job, index) for index in range(n))]
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """How many images wait."""
        with self._changed:
            return len(self._awaited())

    def run(self) -> None:
        """Draws for ever."""
        while True:
            self._draw(self._next())

    def _awaited(self) -> list[Row]:
        return [row for row in self._rows if not row.job.ended]

    def _next(self) -> list[Row]:
        """The first that waits, with those that can be drawn beside it."""
        with self._changed:
            while not (awaited := self._awaited()):
                self._rows = []
                self._changed.wait()
            key = awaited[0].job.asked.key
            rows = [row for row in awaited if row.job.asked.key == key][: self.limits.batch]
            self._rows = [row for row in awaited if row not in rows]
            for ahead, row in reversed([*enumerate(self._rows)]):
                if row.index == 0:
                    row.job.wait(ahead)
        return rows

    def _draw(self, rows: Sequence[Row]) -> None:
        jobs = list(dict.fromkeys(row.job for row in rows))
        for job, indices in _of_each(rows):
            job.tell("started", {"images": indices, "together": len(rows)})
        try:
            images = self._call(rows)
            for row, image in zip(rows, images, strict=True):
                if not row.job.ended:
                    self._deliver(row, image)
        except _NobodyWaits:
            return
        except Exception as error:  # whatever it is, the next request shall be drawn
            if len(jobs) > 1:  # one of them is to blame, and the others shall not suffer
                for job in jobs:
                    self._draw([row for row in rows if row.job is job])
            else:
                jobs[0].fail(_sentence(error))

    def _call(self, rows: Sequence[Row]) -> np.ndarray:
        n = len(rows)
        padded = [*rows, *[rows[-1]] * (min(self.limits.batch, 1 << (n - 1).bit_length()) - n)]
        asked, waiting = rows[0].job.asked, _of_each(rows)
        steps = asked.request.steps or self.pipe.defaults["steps"]

        def tell(done: int, guesses: np.ndarray | None = None) -> None:
            if all(job.ended for job, _ in waiting):
                raise _NobodyWaits
            for job, indices in waiting:
                event: dict[str, Any] = {"images": indices, "done": min(done, steps), "steps": steps}
                if guesses is not None and done < steps:
                    mine = [guesses[i] for i, row in enumerate(rows) if row.job is job]
                    files = (encode_image(guess, None, "jpeg") for guess in mine)
                    event["guesses"] = [base64.b64encode(file).decode() for file in files]
                job.tell("progress", event)

        # Previews after each step would compute kept features at each step, and draw another image.
        previews = asked.preview and asked.request.cache_interval == 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptWarning)  # each request has heard of its own
            return self.pipe.draw(
                [row.request for row in padded],
                progress=None if previews else tell,
                on_step=(lambda done, guess: tell(done, self.pipe.preview(guess))) if previews else None,
            )[:n]

    def _deliver(self, row: Row, image: np.ndarray) -> None:
        request, how = row.request, metadata(self.pipe, row.request, image)
        if self.out is not None:
            write_image(self.out, f"{slug(request.prompt)}-{request.seed}", image, how)
        row.job.deliver(row.index, encode_image(image, how), how)


def _of_each(rows: Sequence[Row]) -> list[tuple[Job, list[int]]]:
    """Each job among the rows, with the numbers of its images."""
    jobs: dict[Job, list[int]] = {}
    for row in rows:
        jobs.setdefault(row.job, []).append(row.index)
    return list(jobs.items())


def _sentence(error: Exception) -> str:
    """What a user is told of an error; one that is no user's is printed as well."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "There is not enough memory; try a smaller size, or fewer images."
    traceback.print_exception(error)
    return f"The image could not be drawn ({type(error).__name__}); the server's terminal says more."
