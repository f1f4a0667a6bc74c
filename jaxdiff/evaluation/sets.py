"""Sets of images that are compared: a folder's, or what a model draws for a file of prompts."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxdiff.data.bad import BadRecord
from jaxdiff.data.folders import list_images
from jaxdiff.evaluation import check_count
from jaxdiff.generation.batch.draw import draw_all
from jaxdiff.generation.batch.files import read_requests
from jaxdiff.generation.batch.groups import jobs_of
from jaxdiff.generation.pipeline import Pipeline, load
from jaxdiff.io.images import is_sheet
from jaxdiff.io.images.read import read_image
from jaxdiff.io.single_file import is_single
from jaxdiff.io.weights import listed
from jaxdiff.model import exported

Pixels = UInt8[np.ndarray, "h w 3"]
logger = logging.getLogger(__name__)
PROMPTS = (".txt", ".jsonl", ".ndjson", ".csv", ".tsv")


@dataclass(frozen=True)
class ImageSet:
    """Images one at a time, as often as they are asked for."""

    name: str
    count: int
    image: Callable[[int], Pixels]
    """The one of this number, from 0."""
    prompts: tuple[str, ...] | None = None
    """Of each image what it shows, where that is known of all."""

    def __iter__(self) -> Iterator[Pixels]:
        return (self.image(i) for i in range(self.count))


@dataclass(frozen=True)
class Drawing:
    """How images are drawn where a set is a model's, or a file of prompts."""

    model: Path | None = None
    """For a file of prompts; None is the model that comes with the package."""
    prompts: Path | None = None
    """For a model."""
    seed: int = 0
    """Of the first image; the next one has the next."""
    steps: int | None = None
    guidance: float | None = None


def open_set(path: Path, drawing: Drawing = Drawing(), n: int | None = None) -> ImageSet:
    """The images of a folder in the order of their names, or those drawn by a model or for a file of prompts.

    Args:
        path: a folder of images; a model (diffusers folder, run directory, single file), which draws
            `drawing.prompts`; or a file of prompts, which `drawing.model` draws.
        drawing: how.
        n: takes the first ones, at most so many.

    Raises:
        ValueError: where it is nothing of that, there are no images, or an image cannot be read or drawn.
    """
    if n is not None:
        check_count("n", n)
    if path.is_file() and path.suffix.lower() in PROMPTS:
        return _drawn(path, drawing.model, path, drawing, n)
    if is_single(path) or (path.is_dir() and (exported(path) / "model_index.json").exists()):
        if drawing.prompts is None:
            raise ValueError(f"{path} is a model: name a file of prompts for it to draw, --prompts FILE.")
        return _drawn(path, path, drawing.prompts, drawing, n)
    if not path.is_dir():
        raise ValueError(f"{path} is not there; give a folder of images, a model, or a file of prompts.")
    return folder_set(path, n)


def folder_set(path: Path, n: int | None = None) -> ImageSet:
    """The images of a folder and the folders in it, and their captions where all have one.

    Raises:
        ValueError: where there are none; when one cannot be read.
    """
    listing = list_images(path)
    items = [item for item in listing.items if not item.malformed]
    if sheets := [item for item in items if is_sheet(item.name)]:
        logger.warning("%s: contact sheets and film strips are left out: %s.", path, listed(i.name for i in sheets))
    items = [item for item in items if item not in sheets][:n]
    if not items:
        others = f", only {listing.others()}" if listing.left_out else ""
        raise ValueError(f"{path} has no images{others}.")
    try:
        prompts = tuple(item.read_caption(path).full() for item in items)
    except BadRecord:
        prompts = None
    return ImageSet(str(path), len(items), lambda i: read_image(path / items[i].name), prompts)


def _drawn(path: Path, model: Path | None, prompts: Path, drawing: Drawing, n: int | None) -> ImageSet:
    defaults = {"steps": drawing.steps, "guidance": drawing.guidance}
    lines = list(read_requests(prompts, {name: value for name, value in defaults.items() if value is not None}))
    if problem := next((line.problem for line in lines if line.request is None), ""):
        raise ValueError(problem)
    jobs = list(jobs_of(lines, drawing.seed))[:n]
    pipe = load(model)
    found: dict[int, Pixels] = {}

    def keep(drawn: Any) -> None:
        found[drawn.job.index] = drawn.image

    draw_all(pipe, jobs, keep)
    images = [found[job.index] for job in jobs]
    return ImageSet(str(path), len(images), images.__getitem__, tuple(job.request.prompt for job in jobs))


def through(pipe: Pipeline, images: ImageSet, batch: int = 16) -> ImageSet:
    """Images as a model's autoencoder gives them back, at the size that it was trained at.

    A model's images compared with these are judged without the autoencoder's faults, which both have.
    """
    if pipe.size is None:
        raise ValueError(f"{pipe.name}: its config does not say for which size it was trained.")
    found: list[Pixels] = []
    for first in range(0, images.count, batch):
        part = [images.image(i) for i in range(first, min(first + batch, images.count))]
        sized = [np.asarray(Image.fromarray(x).resize(pipe.size, Image.Resampling.BICUBIC)) for x in part]
        found += list(pipe.decode(pipe.encode(np.stack(sized))))
    return ImageSet(f"{images.name} through {pipe.name}", len(found), found.__getitem__, images.prompts)
