"""Prompts to pictures: `python sample.py "a red apple"`; or a file of them: `--from-file prompts.jsonl --out DIR`."""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from tqdm import tqdm

import jaxdiff
from jaxdiff import distributed
from jaxdiff.batch import Drawn, draw_all, fill_in, sha256, told
from jaxdiff.cli import check_writable, exit_code, part_of
from jaxdiff.config import DistributedConfig
from jaxdiff.io.images import FORMATS, contact_sheet, film_strip, read_settings, slug, write_gif, write_picture
from jaxdiff.pipeline import DTYPES, Pipeline
from jaxdiff.prompts.wildcards import named
from jaxdiff.rows import Line, Picture, Row, Store, fingerprint, pictures, read_rows
from jaxdiff.rows.row import HINTS, SEEDS, regions_of
from jaxdiff.scenes import PromptWarning
from jaxdiff.settings import Settings, settings

SHEET_IMAGES = 100  # on the contact sheet, the first ones
OWN = ("n", "image", "mask", "source_prompt", "outpaint", "upscale", "to_prompt", "to_seed", "share")  # of `Row`
MAX_PICTURES = 1_000_000  # of one command, which keeps the list of them


@dataclass(frozen=True)
class Args:
    """Draws pictures from prompts. Picture i has the seed SEED + i; files are never overwritten.

    Prints each file's name once it is written; several pictures get a contact sheet of the first 100.
    """

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to draw; quote each prompt."""
    from_file: Path | None = None
    """A file of prompts: text, a line each; or JSON Lines or CSV, with any of these settings in each row. The same
    command again goes on where it was stopped."""
    like: Path | None = None
    """A picture that is drawn again, as it says itself; what is given beside it changes that."""
    model: Path | None = None
    """A diffusers folder or a run directory; without it, the model that comes with the package."""
    out: Path = Path("samples")
    """The folder for the pictures."""
    n: int = 1
    """Pictures of each prompt."""
    seed: int = 0
    """The first picture's seed."""
    negative: Annotated[str, tyro.conf.arg(aliases=["--negative-prompt"])] = ""
    """What to steer away from."""
    image: str | None = None
    """A picture to begin from; it is made to fit the model, or the size."""
    mask: str | None = None
    """A picture of the image's size, whose white is drawn anew."""
    source_prompt: str = ""
    """With invert, what is in the image."""
    region: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="L,T,R,B:PROMPT")] = ()
    """A prompt for a part of the picture, left, top, right and bottom in shares of the sides."""
    outpaint: Annotated[tuple[int, int, int, int] | None, tyro.conf.arg(metavar="L T R B")] = None
    """Draws so many pixels more around the image."""
    upscale: int | None = None
    """Makes the image so many times as wide and high."""
    to_prompt: str | None = None
    """A second prompt, towards which the picture goes."""
    to_seed: int | None = None
    """A second seed, towards whose noise it goes."""
    share: float = 0.5
    """How far it goes: 0 is the first picture, 1 the second."""
    frames: int | None = None
    """So many pictures on the way from the first to the second, and a GIF of them."""
    trajectory: bool = False
    """The model's guess after each step beside the picture, as a film strip and a GIF."""
    wildcards: Path | None = None
    """A folder of texts: a line of NAME.txt, chosen by the seed, for each __NAME__ in a prompt."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    format: str = "png"
    """png, jpeg or webp."""
    metadata: bool = True
    """Whether pictures, their names and the index say how they were made."""
    part: Annotated[str, tyro.conf.arg(metavar="I/N")] = "1/1"
    """Draws every N-th picture from the I-th on: for N such commands, on machines that share the folder."""
    dtype: str | None = None
    """What the networks compute in: float32 (the default on CPUs) or bfloat16 (elsewhere)."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


def main(args: Args) -> int:
    """Reads what to draw, loads the model, draws, writes; returns the exit code."""
    lines = list(read_lines(args))
    for line in lines:
        if line.problem:
            print(f"error: {line.problem}", file=sys.stderr)
    n = sum(line.row.n for line in lines if line.row)
    if not 0 <= args.seed <= SEEDS - max(1, n):
        raise ValueError(f"--seed is {args.seed}; with {n} pictures it must lie from 0 to {SEEDS - max(1, n)}.")
    if (n := n * (args.frames or 1)) > MAX_PICTURES:
        raise ValueError(f"These are {n} pictures, more than {MAX_PICTURES}; draw them by several commands.")
    if not n:
        return 2
    part, parts = part_of(args.part)
    check_writable(args.out)
    distributed.initialize(args.distributed)
    if jax.process_count() > 1:
        part, parts = jax.process_index(), jax.process_count()

    wanted: list[Picture] = list(pictures(lines, args.seed))
    if args.wildcards is not None:
        wanted = list(fill_in(wanted, args.wildcards))
    else:
        prompts = (line.row.prompt for line in lines if line.row and not line.row.settings.literal)
        for name in dict.fromkeys(name for prompt in prompts for name in named(prompt)):
            warnings.warn(f"{name} is taken as text; say where its file is, by --wildcards.", PromptWarning, 2)
    devices = jax.local_devices()
    pipe = jaxdiff.load(args.model, args.dtype, devices if min(len(devices), n) > 1 else None)
    if args.like is not None:
        check_like(args, pipe)
    if args.from_file is not None:
        bad = draw_file(args, pipe, wanted, part, parts)
        return 2 if bad or any(line.problem for line in lines) else 0
    draw_prompts(args, pipe, [picture for picture in wanted if picture.index % parts == part])
    return 0


def read_lines(args: Args) -> Iterator[Line]:
    """A row for each prompt, or the file's."""
    if args.format not in FORMATS:
        raise ValueError(f"--format is {args.format!r}; choose one of {', '.join(FORMATS)}.")
    if args.frames is not None and args.frames < 2:
        raise ValueError(f"--frames is {args.frames}; it must be at least 2.")
    if args.frames is not None and args.to_prompt is None and args.to_seed is None:
        raise ValueError("--frames lie between two pictures; give the second, by --to-prompt or --to-seed.")
    if args.frames is not None and args.trajectory:
        raise ValueError("--frames and --trajectory both make a GIF; give one of them.")
    for name, path in {"--image": args.image, "--mask": args.mask}.items():
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{name} is {path!r}, and there is no such file.")
    defaults = Row(
        "",
        negative_prompt=args.negative,
        regions=regions_of([region(text) for text in args.region]),
        settings=settings(asdict(args.settings)),
        **{name: getattr(args, name) for name in OWN},
    )
    if args.from_file is None:
        if not args.prompts:
            raise ValueError('No prompt was given; try: python sample.py "a red apple".')
        for number, prompt in enumerate(args.prompts, 1):
            yield Line(number, Row.of({"prompt": prompt}, defaults))
    elif args.prompts or args.like is not None:
        raise ValueError("--from-file has the prompts; leave out the others, and --like.")
    elif args.frames is not None or args.trajectory:
        raise ValueError("--frames and --trajectory are for prompts on the command line; leave out --from-file.")
    else:
        yield from read_rows(args.from_file, defaults)


def draw_prompts(args: Args, pipe: Pipeline, wanted: list[Picture]) -> None:
    """Pictures in files that are new, with a contact sheet, film strips and GIFs beside them."""
    frames = args.frames or 1
    if frames > 1:
        shares = [k / (frames - 1) for k in range(frames)]
        wanted = [p._replace(row=replace(p.row, share=share)) for p in wanted for share in shares]
        wanted = [picture._replace(index=i) for i, picture in enumerate(wanted)]
    kept = {picture.index for picture in (wanted if frames > 1 else wanted[:SHEET_IMAGES])}
    shown: dict[int, Drawn] = {}

    def stem(picture: Picture) -> str:
        return f"{slug(picture.row.prompt) if args.metadata else 'image'}-{picture.seed}"

    def save(drawn: Drawn) -> list[Path]:
        name = stem(drawn.picture) + (f"-frame-{drawn.picture.index % frames:03d}" if frames > 1 else "")
        how = told(pipe, drawn.picture, drawn.image) if args.metadata else None
        paths = [write_picture(args.out, name, drawn.image, how, args.format)]
        if drawn.frames:
            steps = [f"step {i}" for i in range(1, len(drawn.frames) + 1)]
            paths += [write_picture(args.out, f"{paths[0].stem}-steps", film_strip(drawn.frames, steps))]
            paths += [write_gif(args.out, f"{paths[0].stem}-steps", drawn.frames)]
        if drawn.picture.index in kept:
            shown[drawn.picture.index] = drawn._replace(frames=())
        return paths

    with tqdm(total=len(wanted), unit="image", unit_scale=True, disable=None) as bar:
        draw_all(pipe, wanted, save, saved=report, progress=bar.update, trajectory=args.trajectory)
    drawn = [shown[index] for index in sorted(shown)]
    if frames > 1:
        for i in range(0, len(drawn), frames):
            report([write_gif(args.out, stem(drawn[i].picture), [one.image for one in drawn[i : i + frames]])])
    elif len(drawn) > 1:
        captions = [one.picture.row.prompt if args.metadata else "" for one in drawn]
        report([write_picture(args.out, "contact-sheet", contact_sheet([one.image for one in drawn], captions))])


def draw_file(args: Args, pipe: Pipeline, wanted: list[Picture], part: int, parts: int) -> int:
    """A file's pictures, those that are not there yet, with an index and a contact sheet; returns how many were bad."""
    batch = {"rows": fingerprint(wanted), "model": pipe.name, "dtype": pipe.dtype}
    bad: set[int] = set()

    def refuse(picture: Picture, error: ValueError) -> None:
        bad.add(picture.line)
        tqdm.write(f"error: {args.from_file} line {picture.line}: {error}", file=sys.stderr)

    with Store(args.out, batch, wanted, args.format, args.metadata, part, parts) as store:
        with tqdm(total=len(store.missing()), unit="image", unit_scale=True, disable=None) as bar:
            draw_all(
                pipe,
                store.wanted,
                lambda drawn: [store.add(drawn.picture, drawn.image, told(pipe, drawn.picture, drawn.image))],
                store.has,
                refuse=refuse,
                saved=report,
                progress=bar.update,
            )
        report(store.finish())
    return len(bad)


def report(paths: Sequence[Path]) -> None:
    """Names files on stdout at once, so that nothing that is written stays unnamed; over the bar, if there is one."""
    for path in paths:
        tqdm.write(str(path))
    sys.stdout.flush()


def region(text: str) -> dict[str, Any]:
    """`0,0,0.5,1:a dog` -> a region as prompt files have them."""
    box, _, prompt = text.partition(":")
    try:
        return {"prompt": prompt, "box": [float(side) for side in box.split(",")]}
    except ValueError:
        raise ValueError(f"--region is {text!r}; write it as LEFT,TOP,RIGHT,BOTTOM:PROMPT in shares of the sides, such "
                         "as 0,0,0.5,1:a dog.") from None  # fmt: skip


def like(path: Path) -> Args:
    """The arguments that draw a picture again, from what it says of itself; nobody vouches for that."""
    there = read_settings(path)
    if there is None:
        raise ValueError(f"{path} does not say how it was made; --like is for pictures of sample.py.")
    try:
        row = Row.of({name: value for name, value in there.items() if name in HINTS})
        if (dtype := there.get("dtype")) not in (None, *DTYPES):
            raise ValueError(f"dtype is {dtype!r}.")
    except ValueError as error:
        raise ValueError(f"{path} cannot be drawn again: {error}") from error
    own = {name: getattr(row, name) for name in OWN if name != "n"}
    regions = tuple(f"{','.join(map(repr, region.box))}:{region.prompt}" for region in row.regions)
    return Args(
        (row.prompt,), like=path, negative=row.negative_prompt, seed=row.seed or 0, region=regions, dtype=dtype,
        settings=row.settings, **own,
    )  # fmt: skip


def check_like(args: Args, pipe: Pipeline) -> None:
    """That the model is the picture's; and a warning where its images have changed."""
    assert args.like is not None
    there = read_settings(args.like) or {}
    if args.model is None and there.get("model") != pipe.name:
        raise ValueError(f"{args.like} was drawn by the model {there.get('model')!r}; say where it is, by --model.")
    for name, path in {"image": args.image, "mask": args.mask}.items():
        known = there.get(f"{name}_sha256")
        if path is not None and path == there.get(name) and known is not None and known != sha256(path):
            print(f"warning: {path} has changed since {args.like} was drawn from it.", file=sys.stderr)


def parse(argv: Sequence[str] | None) -> Args:
    """The arguments; where --like is among them, a picture's own are what is not given."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--like", type=Path)
    path = first.parse_known_args(argv)[0].like
    return tyro.cli(Args, args=argv, default=Args() if path is None else like(path))


def cli(argv: Sequence[str] | None = None) -> int:
    """The command line; errors are a sentence and exit code 2."""
    said: set[str] = set()

    def say(message: Warning | str, category: type[Warning], *where: Any, usual: Any = warnings.showwarning) -> None:
        if not issubclass(category, PromptWarning):
            usual(message, category, *where)
        elif str(message) not in said:
            said.add(str(message))
            tqdm.write(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", PromptWarning)
        warnings.showwarning = say
        return distributed.leave(exit_code(lambda: main(parse(argv)), "a smaller --size"))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "Error (writing|reading) persistent compilation cache", UserWarning)
    sys.exit(cli())
