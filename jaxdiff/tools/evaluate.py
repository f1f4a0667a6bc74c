"""Measures a model: `python -m jaxdiff.tools.evaluate` with `images`, `denoising`, `concepts`, `colours` or
`reconstruction`."""

import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from jaxtyping import UInt8

from jaxdiff import load
from jaxdiff.config import DataConfig, VAETask
from jaxdiff.data.captions import COLOURS, background
from jaxdiff.data.loader import batches, open_source
from jaxdiff.evaluation import check_count
from jaxdiff.evaluation.comparison import Pairs, compare
from jaxdiff.evaluation.concepts import Gallery, concept_accuracy, images_for, read_drawings, sample
from jaxdiff.evaluation.denoising import as_metrics, as_table, denoising_errors, heldout
from jaxdiff.evaluation.features import kept, open_features, open_network
from jaxdiff.evaluation.lpips import FILES, compiled_lpips, read_lpips
from jaxdiff.evaluation.resize import Rule
from jaxdiff.evaluation.sets import Drawing, open_set
from jaxdiff.evaluation.sets import through as decoded
from jaxdiff.io.storage import write_bytes
from jaxdiff.runtime.cli import check_writable, exit_code
from jaxdiff.training.tasks.vae import psnr, reconstruct

FRAME = 3  # pixels along each edge that are taken for background


def background_colour(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """The name in `COLOURS` that is nearest to the median colour of the image's frame, in RGB."""
    frame = np.ones(image.shape[:2], bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    median = np.median(image[frame], axis=0)
    return min(COLOURS, key=lambda name: float(np.square(median - COLOURS[name]).sum()))


def wanted_colour(prompt: str) -> str:
    """The background that a prompt names.

    Raises:
        ValueError: when it names none of `COLOURS`.
    """
    for colour in COLOURS:
        if background(colour) in prompt:
            return colour
    raise ValueError(f"The prompt {prompt!r} names no background; add one such as 'on a blue background'.")


def colours(
    prompts: Annotated[Path, tyro.conf.Positional],
    model: Path | None = None,
    seed: int = 0,
    steps: int = 30,
    guidance: float | None = None,
    batch: int = 16,
) -> None:
    """Draws one image a prompt and counts those whose frame has the background that the prompt names.

    Args:
        prompts: a text file, one prompt a line.
        model: a diffusers folder or run directory; the embedded model if left out.
        seed: of the first prompt; the next one has the next.
        steps: of the sampler.
        guidance: scale of classifier-free guidance; the model's own if left out.
        batch: images drawn together.
    """
    lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    wanted = [wanted_colour(line) for line in lines]
    pipe = load(model)
    obeyed = 0
    for first in range(0, len(lines), batch):
        part = lines[first : first + batch]
        images = pipe(part, seed=seed + first, steps=steps, guidance=guidance)
        for line, colour, image in zip(part, wanted[first:], images, strict=False):
            seen = background_colour(image)
            obeyed += seen == colour
            if seen != colour:
                print(f"{line}: drawn on {seen}")
    print(f"background obeyed: {obeyed} of {len(lines)} ({obeyed / len(lines):.1%})")


def reconstruction(
    data_dir: str = "data",
    model: Path | None = None,
    split: str = "heldout",
    batch: int = 32,
    features: Path | None = None,
) -> None:
    """Encodes and decodes a split of the `emoji` data and prints the mean PSNR over its images, and the mean LPIPS.

    Args:
        data_dir: where `python -m jaxdiff.tools.prepare emoji` put the data.
        model: a diffusers folder or run directory; the embedded model if left out.
        split: `heldout` has the concepts of which no drawing was trained on.
        batch: images reconstructed together.
        features: where `python -m jaxdiff.tools.prepare lpips` put the weights of LPIPS, which is left out where there
            are none; DATA_DIR/features if left out.
    """
    folder = features or Path(data_dir) / "features"
    there = [name for name, file in FILES.items() if (folder / file).exists()]
    metrics = {name: partial(compiled_lpips(name), jax.device_put(read_lpips(folder, name))) for name in there}
    pipe = load(model)
    run = reconstruct(VAETask(pipe.model.configs["vae"]))
    data = DataConfig(
        source="emoji", root=data_dir, split=split, size=pipe.size[0] if pipe.size else 64, batch_size=batch
    )
    source = open_source(data)
    images = itertools.islice(batches(data, source, seed=0), math.ceil(len(source) / batch))
    # The loader goes round: the first pass holds each image once, the last batch's rest is left out.
    figures: dict[str, list[np.ndarray]] = {name: [] for name in ("psnr", *metrics)}
    for image in (b["image"] for b in images):
        copy = np.asarray(run(pipe.params["vae"], image)[0])
        figures["psnr"].append(psnr(image, copy))
        for name, distance in metrics.items():
            figures[name].append(np.asarray(distance(image, copy.clip(-1, 1))))
    found = {name: np.concatenate(parts)[: len(source)] for name, parts in figures.items()}
    told = found.pop("psnr")
    print(f"PSNR of {len(told)} images, {split}: mean {told.mean():.2f} dB, median {np.median(told):.2f} dB")
    for name, each in found.items():
        print(f"LPIPS ({name}): mean {each.mean():.4f}, median {np.median(each):.4f}")
    if not metrics:
        print(f"LPIPS is not measured: `python -m jaxdiff.tools.prepare lpips` puts its weights into {folder}.")


def denoising(
    model: Annotated[Path | None, tyro.conf.Positional] = None,
    data_dir: str = "data",
    source: str = "emoji",
    split: str = "test",
    n: int = 221,
    batch: int = 32,
    dtype: str | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Prints the error of the model's guess of x_0 on held-out images, by noise level and by what the caption tells.

    Args:
        model: a diffusers folder or run directory; the embedded model if left out.
        data_dir: where the data are, as in training.
        source: of the data, as `--data.source` of training: emoji, folder, prepared, or a TFDS data set.
        split: of data that have any; `test` of `emoji` has concepts that were trained on in other styles.
        n: images, evenly spread.
        batch: images at a time.
        dtype: what the networks compute in, float32, bfloat16 or float16.
        as_json: prints one line of JSON, as training's metrics have them.
    """
    pipe = load(model, dtype)
    width, height = pipe.size or (64, 64)
    if width != height:
        raise ValueError(f"The model is one of {width}x{height} pixels; errors are measured on squares.")
    data = DataConfig(source=source, root=data_dir, split=split, size=width)
    errors = denoising_errors(pipe, heldout(open_source(data), data, n), batch=batch)
    print(json.dumps(as_metrics(errors)) if as_json else as_table(errors))


def concepts(
    model: Annotated[Path | None, tyro.conf.Positional] = None,
    data_dir: str = "data",
    features: Path | None = None,
    split: Literal["all", "train", "test", "heldout"] = "all",
    n: int = 256,
    seed: int = 0,
    steps: int = 30,
    guidance: float | None = None,
    batch: int = 16,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Draws concepts of the `emoji` data and counts those that are found again among all real drawings.

    Args:
        model: a diffusers folder or run directory; the embedded model if left out.
        data_dir: where `python -m jaxdiff.tools.prepare emoji` put the data.
        features: where `python -m jaxdiff.tools.prepare features` put the network that looks at the images, and where
            what it makes of the drawings is kept; DATA_DIR/features if left out.
        split: from which the drawings are taken whose captions are drawn; they are looked up among all of them.
        n: images; a smaller sample is the beginning of a larger one.
        seed: of the sample, and of the first image; the next one has the next.
        steps: of the sampler.
        guidance: scale of classifier-free guidance; the model's own if left out.
        batch: images drawn together.
        as_json: prints JSON in place of the table.
    """
    check_count("batch", batch)  # before the drawings are read
    folder = features or Path(data_dir) / "features"
    look = open_features(folder)
    pipe = load(model)
    if pipe.networks.needs_image:
        raise ValueError("The model draws nothing without an image; concepts are drawn from captions.")
    drawings = read_drawings(data_dir, pipe.size[0] if pipe.size else 64)
    chosen = sample(drawings, n, seed, split)
    gallery = Gallery.of(kept(folder, "emoji", drawings.images, look), drawings.labels)
    drawn, decoded = images_for(pipe, drawings, chosen, seed=seed, steps=steps, guidance=guidance, batch=batch)
    found = concept_accuracy(gallery, chosen, drawn, decoded, look)
    used = pipe.defaults["guidance"] if guidance is None else guidance
    settings = {"model": pipe.name, "split": split, "seed": seed, "steps": steps, "guidance": used}
    print(json.dumps(found.record() | settings, indent=2) if as_json else found.table())


def images(
    a: Annotated[Path, tyro.conf.Positional],
    b: Annotated[Path, tyro.conf.Positional],
    features: Literal["efficientnet-lite0", "inception", "dinov2", "clip"] = "efficientnet-lite0",
    weights: Path | None = None,
    resize: Rule = "clean",
    pairs: Pairs = "none",
    prompts: Path | None = None,
    model: Path | None = None,
    through: Path | None = None,
    n: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    dimensions: int | None = None,
    bootstrap: int = 20,
    pixels: bool = False,
    data_dir: Path = Path("data"),
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Compares the images of A, which are judged, with those of B, which are taken for real: docs/evaluation.md.

    Args:
        a: a folder of images; a model (diffusers folder, run directory or single file), which draws `--prompts`; or a
            file of prompts (.txt, .jsonl, .csv, .tsv), which `--model` draws.
        b: as `a`.
        features: the network that looks at the images.
        weights: its weights: of `inception` the file pt_inception-2015-12-05-6726825d.pth; of `dinov2` and `clip` a
            folder of transformers; of `efficientnet-lite0` the folder that `python -m jaxdiff.tools.prepare features`
            filled, DATA_DIR/features if left out.
        resize: how images get the network's size.
        pairs: whether image i of A and of B have one prompt, or are even copies of each other, which adds PSNR, SSIM.
        prompts: a file of prompts, for models.
        model: for files of prompts; the embedded model if left out.
        through: a model through whose autoencoder the images of B go first: its faults then count for nothing.
        n: takes the first images of each, at most so many.
        seed: of the first drawn image, and of splits and permutations.
        steps: of the sampler.
        guidance: scale of classifier-free guidance; the model's own if left out.
        dimensions: principal components of B that the Frechet distance is measured in; all if left out.
        bootstrap: replicates for the Frechet distance's intervals; 0 leaves them out.
        pixels: trains a small network to tell the images apart by their pixels, too; images must have one size.
        data_dir: where `prepare` put the features' network.
        json_file: a file that is written with everything.
    """
    if bootstrap < 0 or bootstrap == 1:
        raise ValueError(f"--bootstrap is {bootstrap}; it must be 0, or at least 2.")
    if weights is None and features != "efficientnet-lite0":
        raise ValueError(f"The weights of {features} are not part of this package; name them, --weights PATH.")
    if seed < 0:
        raise ValueError(f"--seed is {seed}; it must not be negative.")
    if dimensions is not None and dimensions < 1:
        raise ValueError(f"--dimensions is {dimensions}; it must be at least 1.")
    if json_file is not None:
        check_writable(json_file.parent)
        if json_file.is_dir():
            raise ValueError(f"--json is {str(json_file)!r}, and that is a folder; name a file.")
    look = open_network(features, weights or data_dir / "features", resize)
    drawing = Drawing(model, prompts, seed, steps, guidance)
    judged, real = open_set(a, drawing, n), open_set(b, drawing, n)
    if through is not None:
        real = decoded(load(through), real)
    found = compare(
        judged, real, look, pairs=pairs, dimensions=dimensions, bootstrap=bootstrap, pixels=pixels, seed=seed
    )
    print(found.table())
    if json_file is not None:
        write_bytes(json_file, json.dumps(found.record(), indent=2).encode())


if __name__ == "__main__":
    commands = {
        "colours": colours,
        "concepts": concepts,
        "denoising": denoising,
        "images": images,
        "reconstruction": reconstruction,
    }
    sys.exit(exit_code(lambda: tyro.extras.subcommand_cli_from_dict(commands)))
