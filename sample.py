"""Prompts to PNG files: `python sample.py "a red apple"`."""

import math
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

import jaxdiff
from jaxdiff.cli import exit_code
from jaxdiff.io.images import contact_sheet, slug, write_png

# Pixels drawn at once, and pictures at most: larger batches gain little and may not fit into memory.
BATCH_PIXELS, BATCH_IMAGES = 2**20, 16
SHEET_IMAGES = 100  # on the contact sheet, the first ones


@dataclass(frozen=True)
class Args:
    """Draws pictures from prompts. Picture i has the seed SEED + i; files are never overwritten.

    Prints each file's name once it is written; several pictures get a contact sheet of the first 100.
    """

    prompts: tyro.conf.Positional[tuple[str, ...]]
    """What to draw; quote each prompt."""
    model: Path | None = None
    """A diffusers folder or a run directory; without it, the model that comes with the package."""
    n: int = 1
    """Pictures of each prompt."""
    seed: int = 0
    """The first picture's seed."""
    steps: int = 30
    """How many times the model is asked for each picture."""
    guidance: float = 7.5
    """How hard to follow the prompt; 1 is the model's own answer to it."""
    guidance_interval: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="LO HI")] = None
    """Noise levels (sigma) to guide at; faster, since at the others the prompt alone is asked for. Without it, all."""
    negative: str = ""
    """What to steer away from."""
    sampler: str = "ddim"
    """How the steps are taken: ddim, euler, dpmpp_2m, unipc and others; a wrong name lists them all."""
    grid: str = "model"
    """Which noise levels they visit: the model's own, trailing, karras, exponential, beta, sgm_uniform or
    align_your_steps."""
    eta: float = 0.0
    """For ddim and tcd: the share of fresh noise at each step, 0 to 1."""
    cache_interval: int = 1
    """3 computes most of the network at every third step only: faster, and another picture; 1 is exact."""
    size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """Width and height in pixels, as 64x64; without it, the model's own."""
    out: Path = Path("samples")
    """The folder for the pictures."""
    dtype: str | None = None
    """What the networks compute in: float32 (the default on CPUs) or bfloat16 (elsewhere)."""


def main(args: Args) -> None:
    """Loads, draws in batches, writes each batch when it is there."""
    if not args.prompts:
        raise ValueError('No prompt was given; try: python sample.py "a red apple".')
    if args.n < 1:
        raise ValueError(f"--n is {args.n}; it must be at least 1.")
    total = args.n * len(args.prompts)
    if not 0 <= args.seed <= 2**32 - total:
        raise ValueError(f"--seed is {args.seed}; with {total} pictures it must lie from 0 to {2**32 - total}.")
    size = None if args.size is None else parse_size(args.size)
    check_writable(args.out)
    pipe = jaxdiff.load(args.model, args.dtype)

    # A shell can pass bytes that are no text; they would not fit into the PNG.
    *prompts, negative = (text.encode("utf-8", "replace").decode() for text in (*args.prompts, args.negative))
    for text in (*prompts, negative):
        if cut := pipe.tokenizer.cut(text):
            told = f"a prompt is longer than the model's {pipe.tokenizer.max_length} tokens; left out: {cut!r}"
            print(f"warning: {told}", file=sys.stderr)

    width, height = size or pipe.size or (BATCH_PIXELS, 1)
    most = max(1, min(BATCH_IMAGES, BATCH_PIXELS // max(1, width * height)))
    batch = math.ceil(total / math.ceil(total / most))
    pictures, captions = [], []
    with tqdm(total=math.ceil(total / batch) * args.steps, unit="step", disable=None) as bar:
        for done in range(0, total, batch):
            # The last batch has the others' size, not to compile again: it draws pictures that are there once more.
            first = min(done, total - batch)
            rows = [prompts[i // args.n] for i in range(first, first + batch)]
            images = pipe(
                rows,
                negative_prompt=negative,
                seed=args.seed + first,
                steps=args.steps,
                guidance=args.guidance,
                guidance_interval=args.guidance_interval,
                sampler=args.sampler,
                grid=args.grid,
                eta=args.eta,
                cache_interval=args.cache_interval,
                size=size,
                progress=lambda done, before=bar.n: bar.update(before + done - bar.n),
            )
            for i in range(done - first, batch):
                seed = args.seed + first + i
                settings = {
                    "prompt": rows[i], "negative_prompt": negative, "seed": seed, "steps": args.steps,
                    "sampler": args.sampler, "grid": args.grid, "eta": args.eta, "guidance": args.guidance,
                    "guidance_interval": args.guidance_interval, "cache_interval": args.cache_interval,
                    "width": images.shape[2], "height": images.shape[1], "model": pipe.name, "dtype": pipe.dtype,
                    "version": f"jaxdiff {jaxdiff.__version__}",
                }  # fmt: skip
                report(write_png(args.out, f"{slug(rows[i])}-{seed}", images[i], settings))
                if len(pictures) < SHEET_IMAGES:
                    pictures.append(images[i])
                    captions.append(rows[i])
    if len(pictures) > 1:
        report(write_png(args.out, "contact-sheet", contact_sheet(pictures, captions)))


def report(path: Path) -> None:
    """Names a file on stdout at once, so that nothing that is written stays unnamed; over the bar, if there is one."""
    tqdm.write(str(path))
    sys.stdout.flush()


def parse_size(text: str) -> tuple[int, int]:
    """`64x48` -> (64, 48), width first."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"--size is {text!r}; write it as WIDTHxHEIGHT, such as 64x64.")
    return int(sides[0]), int(sides[1])


def check_writable(folder: Path) -> None:
    """Finds out before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError as error:
        raise ValueError(f"{folder} cannot be written to: it is a file, not a folder.") from error
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to: {error.strerror}.") from error


def cli(argv: Sequence[str] | None = None) -> int:
    """The command line; errors are a sentence and exit code 2."""
    args = tyro.cli(Args, args=argv)
    return exit_code(lambda: main(args), "a smaller --size")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "Error (writing|reading) persistent compilation cache", UserWarning)
    sys.exit(cli())
