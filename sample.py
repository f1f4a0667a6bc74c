"""Prompts to images: `python sample.py "a red apple"`; or a file of them: `--from-file prompts.jsonl --out DIR`."""

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from tqdm import tqdm

import jaxdiff
from jaxdiff.config import DistributedConfig
from jaxdiff.generation.batch.draw import Drawn, draw_all, metadata, sha256
from jaxdiff.generation.batch.files import Line, read_requests
from jaxdiff.generation.batch.groups import Job, jobs_of
from jaxdiff.generation.batch.store import Store, fingerprint
from jaxdiff.generation.conditioning import PromptWarning, filled
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.generation.request import PICTURES, RENAMED, Region, Request, current_name
from jaxdiff.generation.weights import Memory, check_memory
from jaxdiff.io.embeddings import Embedding
from jaxdiff.io.images import (
    FORMATS,
    SHEET,
    STEPS,
    contact_sheet,
    film_strip,
    read_settings,
    slug,
    write_gif,
    write_image,
)
from jaxdiff.io.lora import LoRA
from jaxdiff.model import DTYPES, EMBEDDED, FileOptions
from jaxdiff.prompts.wildcards import Wildcards, named
from jaxdiff.runtime import distributed
from jaxdiff.runtime.cli import check_writable, exit_code, part_of

SHEET_IMAGES = 100
"""Images on the contact sheet, the first ones."""
MAX_FRAMES = 1000
"""Images from one prompt to another."""
MAX_IMAGES = 1_000_000
"""Images of one command, which keeps the list of them."""


def region(text: str) -> Region:
    """`0,0,0.5,1:a dog` -> a region.

    Raises:
        ValueError: where it is written otherwise.
    """
    box, colon, prompt = text.partition(":")
    try:
        if not colon:
            raise ValueError(text)
        left, top, right, bottom = map(float, box.split(","))
        return Region(prompt, (left, top, right, bottom))
    except ValueError:
        raise ValueError(
            f"--region is {text!r}; write it as LEFT,TOP,RIGHT,BOTTOM:PROMPT in shares of the sides, such as "
            "0,0,0.5,1:a dog."
        ) from None


def lora(text: str) -> LoRA:
    """`flat.safetensors:0.8` -> a LoRA; without a number at its end, its strength is 1; a second is the text encoders'.

    Raises:
        ValueError: where a strength is not finite.
    """
    numbers: list[float] = []
    while len(numbers) < 2:
        path, colon, last = text.rpartition(":")
        try:
            numbers.insert(0, float(last if colon else ""))
        except ValueError:
            break
        text = path
    return LoRA.of((text, *numbers) if numbers else text)


def spelled_lora(one: LoRA) -> str:
    """A LoRA as `lora` reads it."""
    return ":".join(map(str, [one.path, one.strength, *([] if one.text_strength is None else [one.text_strength])]))


def embedding(text: str) -> Embedding:
    """`learned_embeds.bin:<my-cat>` -> an embedding; without a word, it is the file's own.

    Raises:
        ValueError: where the word cannot be written in a prompt.
    """
    path, colon, word = text.rpartition(":")
    return Embedding.of(text if not colon or Path(text).exists() else (path, word))


def _spelled(kind: type, metavar: str, read: Callable[[str], Any], write: Callable[[Any], str]) -> Any:
    """How tyro reads a value of this type from one word, and shows it."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [write(value)],
    )


LoRAFlag = Annotated[LoRA, _spelled(LoRA, "FILE[:STRENGTH[:TEXT]]", lora, spelled_lora)]
EmbeddingFlag = Annotated[
    Embedding,
    _spelled(Embedding, "FILE[:TOKEN]", embedding, lambda one: f"{one.path}:{one.word}" if one.word else str(one.path)),
]
RegionFlag = Annotated[
    Region,
    _spelled(Region, "L,T,R,B:PROMPT", region, lambda one: f"{','.join(map(repr, one.box))}:{one.prompt}"),
]


@dataclass(frozen=True)
class Flags(Request):
    """A `Request` as flags: what the shell writes otherwise."""

    prompt: tyro.conf.Suppress[str] = ""
    latents: tyro.conf.Suppress[Any] = None
    negative_prompt: Annotated[str, tyro.conf.arg(aliases=["--negative"])] = ""
    """What to steer away from."""
    image: str | None = None
    """An image to start from; it is made to fit the model, or the size."""
    mask: str | None = None
    """An image of the image's size, whose white is drawn anew; what is black is kept exactly."""
    depth: str | None = None
    """For models that draw by a depth map, its file: bright where it is near."""
    control_image: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """An image that the result follows, by the network of --control; give it again for each further network."""
    control_scale: Annotated[tuple[float, ...], tyro.conf.UseAppendAction] = ()
    """How strongly it is followed: 0 is not at all, 1 (the default) as it was trained; once for all, or once for each
    network."""
    control_start: Annotated[tuple[float, ...], tyro.conf.UseAppendAction] = ()
    """The share of the steps before which it is not followed; by default 0."""
    control_end: Annotated[tuple[float, ...], tyro.conf.UseAppendAction] = ()
    """The share of the steps after which it is not followed any more; by default 1."""
    image_prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """An image that stands beside the prompt, by the adapter of --ip-adapter; give it again for each further adapter,
    or for more images of a single one. For models that read an image themselves (variations, unCLIP), that image."""
    image_prompt_scale: Annotated[tuple[float, ...], tyro.conf.UseAppendAction] = ()
    """How much it counts beside the prompt, by default 1; 0 is not at all. Once for all adapters, or once for each."""
    regions: Annotated[tuple[RegionFlag, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="region")] = ()
    """A prompt for a part of the image: left, top, right and bottom in shares of the sides."""

    def given(self) -> dict[str, Any]:
        """The fields that differ from their defaults, but for the seed, which is that of the first image of all."""
        given = super().given()
        return {name: value for name, value in given.items() if name != "seed" and value != ()}


@dataclass(frozen=True)
class Args:
    """Draws images from prompts. Image i has the seed SEED + i; files are never overwritten.

    Prints each file's name once it is written; several images get a contact sheet of the first 100.
    """

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to draw; quote each prompt."""
    from_file: Path | None = None
    """A file of prompts: text, one a line; or JSON Lines or CSV, where each line may give any of these settings. After
    a stop, the same command draws what is missing."""
    like: Path | None = None
    """An image to draw again, by the settings that it carries; flags change them."""
    model: Path | None = None
    """A diffusers folder, a run directory or a single file; without it, the model that comes with the package."""
    file: Annotated[FileOptions, tyro.conf.arg(name="")] = field(default_factory=FileOptions)
    refiner: Path | None = None
    """A model of the same latents that takes the last steps, such as Stable Diffusion XL's refiner."""
    denoiser: Path | None = None
    """A folder or a single file, such as a GGUF file, whose denoiser takes the place of the model's own."""
    vae: Path | None = None
    """A folder or a single file whose autoencoder takes the place of the model's own."""
    loras: Annotated[tuple[LoRAFlag, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="lora")] = ()
    """A LoRA or one of its kin (LoCon, LoHa, LoKr, DoRA, IA3), and how strongly: 0 is not at all, 1 as trained; a
    second number is for the text encoders. Give it again for more of them."""
    lora_dir: Path | None = None
    """A folder of LoRAs: <lora:NAME:0.8> in a prompt is NAME.safetensors in it. All prompts must name the same."""
    embeddings: Annotated[tuple[EmbeddingFlag, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="embedding")] = ()
    """A textual inversion, and what its word is called in prompts; without TOKEN, it is the file's own. Give it again
    for more of them."""
    controls: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="control")] = ()
    """A ControlNet or T2I-Adapter, a folder or a file, for --control-image. Give it again for more of them."""
    ip_adapters: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="ip-adapter")] = ()
    """An IP-Adapter's file, for --image-prompt. Give it again for more of them."""
    image_encoder: Path | None = None
    """The folder of CLIP's vision tower that they read images by; without it, image_encoder beside the first one."""
    out: Path = Path("samples")
    """The folder for the images."""
    request: Annotated[Flags, tyro.conf.arg(name="")] = field(default_factory=Flags)
    frames: int | None = None
    """Images on the way from the first to that of --to-prompt and --to-seed, and a GIF of them."""
    trajectory: bool = False
    """Also write the model's guess after each step, as a film strip and a GIF."""
    wildcards: Path | None = None
    """A folder of texts: for each __NAME__ in a prompt, a line of NAME.txt, chosen by the seed."""
    format: str = "png"
    """png, jpeg or webp."""
    metadata: bool = True
    """Write into images, their names and the index how they were made."""
    part: Annotated[str, tyro.conf.arg(metavar="I/N")] = "1/1"
    """Draw every N-th image from the I-th on, for N commands on machines that share the folder."""
    dtype: str | None = None
    """What the networks compute in: float32 (the default on CPUs) or bfloat16 (elsewhere)."""
    memory: Memory = "normal"
    """low keeps one network at a time, its kernels in 16 bits: less than half the memory, about 1.4 times the time;
    lowest keeps most of them in 8 bits."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


def main(args: Args) -> int:
    """Reads what to draw, loads the model, draws, writes; returns the exit code."""
    lines = list(read_lines(args))
    if args.lora_dir is not None:
        if not args.lora_dir.is_dir():
            raise ValueError(f"--lora-dir is {str(args.lora_dir)!r}, and that is no folder; give one that holds LoRAs.")
        lines, named_loras = take_loras(lines, args.lora_dir)
        args = replace(args, loras=(*args.loras, *named_loras))
    for line in lines:
        if line.problem:
            print(f"error: {line.problem}", file=sys.stderr)
    seed, n = args.request.seed or 0, sum(line.request.n for line in lines if line.request)
    most = args.request.last_seed - max(1, n) + 1
    if not 0 <= seed <= most:
        raise ValueError(f"--seed is {seed}; with {n} images it must be from 0 to {most}.")
    if (n := n * (args.frames or 1)) > MAX_IMAGES:
        raise ValueError(f"These are {n} images, more than {MAX_IMAGES}; draw them by several commands.")
    if not n:
        return 2
    part, parts = part_of(args.part)
    check_writable(args.out)
    distributed.initialize(args.distributed)
    if jax.process_count() > 1:
        part, parts = jax.process_index(), jax.process_count()

    wanted = list(jobs_of(lines, seed))
    if args.wildcards is not None:
        files = Wildcards(args.wildcards)
        wanted = [job._replace(request=filled(job.request, files, job.seed)) for job in wanted]
    else:
        prompts = (line.request.prompt for line in lines if line.request and not line.request.literal)
        for name in dict.fromkeys(name for prompt in prompts for name in named(prompt)):
            warnings.warn(f"{name} is taken as text; give the folder of its file by --wildcards.", PromptWarning, 2)
    if args.like is not None:
        check_like(args)
    if args.controls and not any(job.request.control_image for job in wanted):
        raise ValueError("--control has nothing to go by; give an image by --control-image, or leave it out.")
    if args.ip_adapters and not any(job.request.image_prompt for job in wanted):
        raise ValueError("--ip-adapter has nothing to go by; give an image by --image-prompt, or leave it out.")
    devices = jax.local_devices()
    several = devices if min(len(devices), n) > 1 else None
    more: dict[str, Any] = {"loras": args.loras, "embeddings": args.embeddings, "refiner": args.refiner}
    more |= {"controls": args.controls, "denoiser": args.denoiser, "vae": args.vae}
    more |= {"ip_adapters": args.ip_adapters, "image_encoder": args.image_encoder}
    pipe = jaxdiff.load(args.model, args.dtype, several, memory=args.memory, **more, **vars(args.file))
    if args.from_file is not None:
        bad = draw_file(args, pipe, wanted, part, parts)
        return 2 if bad or any(line.problem for line in lines) else 0
    draw_prompts(args, pipe, [job for job in wanted if job.index % parts == part])
    return 0


def read_lines(args: Args) -> Iterator[Line]:
    """A request for each prompt, or the file's."""
    flags = args.request
    if args.format not in FORMATS:
        raise ValueError(f"--format is {args.format!r}; choose one of {', '.join(FORMATS)}.")
    if args.frames is not None and not 2 <= args.frames <= MAX_FRAMES:
        raise ValueError(f"--frames is {args.frames}; it must be from 2 to {MAX_FRAMES}.")
    if args.frames is not None and flags.to_prompt is None and flags.to_seed is None:
        raise ValueError("--frames needs a second image to go to; give --to-prompt or --to-seed.")
    if args.frames is not None and args.trajectory:
        raise ValueError("--frames and --trajectory both make a GIF; give only one of them.")
    for name, path in flags.pictures():
        if not Path(str(path)).is_file():
            found = "that is a folder" if Path(str(path)).is_dir() else "there is no such file"
            raise ValueError(f"--{name.replace('_', '-')} is {path!r}, and {found}.")
    if args.from_file is None:
        if not args.prompts:
            raise ValueError('No prompt was given; try: python sample.py "a red apple".')
        for number, prompt in enumerate(args.prompts, 1):
            yield Line(number, Request.of({"prompt": prompt}, flags.given()))
    elif args.prompts or args.like is not None:
        raise ValueError("--from-file has the prompts; leave out prompts and --like.")
    elif args.frames is not None or args.trajectory:
        raise ValueError("--frames and --trajectory are for prompts on the command line; leave out --from-file.")
    else:
        yield from read_requests(args.from_file, flags.given())


LORA_TAG = re.compile(r"\s*<lora:([^<>:]+)(?::([^<>]*))?>")


def take_loras(lines: Sequence[Line], folder: Path) -> tuple[list[Line], tuple[LoRA, ...]]:
    """The lines without <lora:NAME:STRENGTH> in their prompts, and the LoRAs that these name.

    Raises:
        ValueError: where a file is not there, a strength is no number, or prompts name different LoRAs.
    """
    found: dict[int, tuple[LoRA, ...]] = {}
    out = []
    for line in lines:
        if line.request is not None and not line.request.literal:
            tags = LORA_TAG.findall(line.request.prompt)
            found[line.number] = tuple(LoRA.of((named_file(folder, name), _number(name, text))) for name, text in tags)
            line = line._replace(request=replace(line.request, prompt=LORA_TAG.sub("", line.request.prompt)))
        out.append(line)
    if len({frozenset(loras) for loras in found.values()}) > 1:
        raise ValueError("The prompts name different LoRAs, and a model has the same in all images; draw them by "
                         "commands of their own.")  # fmt: skip
    return out, next(iter(found.values()), ())


def named_file(folder: Path, name: str) -> Path:
    """The file of a LoRA in a folder, which may be named without its ending.

    Raises:
        ValueError: where there is none, or the name leads out of the folder.
    """
    for file in (folder / name, *(folder / f"{name}{end}" for end in (".safetensors", ".pt", ".ckpt"))):
        if file.is_file() and file.resolve().is_relative_to(folder.resolve()):
            return file
    raise ValueError(f"<lora:{name}> names no file in {folder}: there is no {name}.safetensors.")


def _number(name: str, text: str) -> float:
    try:
        return float(text or 1)
    except ValueError:
        raise ValueError(f"The strength of <lora:{name}:{text}> is no number; write it as <lora:{name}:0.8>.") from None


def draw_prompts(args: Args, pipe: Pipeline, wanted: list[Job]) -> None:
    """Images in files that are new, with a contact sheet, film strips and GIFs beside them."""
    frames = args.frames or 1
    if frames > 1:
        mixes = [k / (frames - 1) for k in range(frames)]
        wanted = [job._replace(request=replace(job.request, mix=mix)) for job in wanted for mix in mixes]
        wanted = [job._replace(index=i) for i, job in enumerate(wanted)]
    shown: dict[int, Drawn] = {}

    def stem(job: Job) -> str:
        return f"{slug(job.request.prompt) if args.metadata else 'image'}-{job.seed}"

    def save(drawn: Drawn) -> list[Path]:
        job = drawn.job
        name = stem(job) + (f"-frame-{job.index % frames:03d}" if frames > 1 else "")
        how = metadata(pipe, job.single, drawn.image) if args.metadata else None
        paths = [write_image(args.out, name, drawn.image, how, args.format)]
        if drawn.frames:
            steps = [f"step {i}" for i in range(1, len(drawn.frames) + 1)]
            paths += [write_image(args.out, f"{paths[0].stem}{STEPS}", film_strip(drawn.frames, steps))]
            paths += [write_gif(args.out, f"{paths[0].stem}{STEPS}", drawn.frames)]
        if frames > 1 or len(shown) < SHEET_IMAGES:
            shown[job.index] = drawn._replace(frames=())
        return paths

    with tqdm(total=len(wanted), unit="image", unit_scale=True, disable=None) as bar:
        draw_all(pipe, wanted, save, saved=report, progress=bar.update, trajectory=args.trajectory)
    drawn = [shown[index] for index in sorted(shown)]
    if frames > 1:
        for i in range(0, len(drawn), frames):
            report([write_gif(args.out, stem(drawn[i].job), [one.image for one in drawn[i : i + frames]])])
    elif len(drawn) > 1:
        captions = [one.job.request.prompt if args.metadata else "" for one in drawn]
        report([write_image(args.out, SHEET, contact_sheet([one.image for one in drawn], captions))])


def draw_file(args: Args, pipe: Pipeline, wanted: list[Job], part: int, parts: int) -> int:
    """A file's images that do not exist yet, with an index and a contact sheet; returns how many lines were bad."""
    batch: dict[str, Any] = {"requests": fingerprint(wanted), "model": pipe.name, "dtype": pipe.dtype}
    if args.memory != "normal":
        batch["memory"] = args.memory
    if pipe.refiner is not None:
        batch["refiner"] = pipe.refiner.name
    batch |= pipe.model.exchanged
    if args.loras:
        batch["loras"] = [list(one.values.values()) for one in args.loras]
    if args.controls:
        batch["controls"] = list(map(str, args.controls))
    if pipe.model.ip_adapters and pipe.model.image_encoder is not None:
        batch["ip_adapters"] = list(map(str, args.ip_adapters))
        batch["image_encoder"] = str(pipe.model.image_encoder.path)
    if args.embeddings:
        batch["embeddings"] = [[str(one.path), one.word] for one in args.embeddings]
    bad: set[int] = set()

    def refuse(job: Job, error: ValueError) -> None:
        bad.add(job.line)
        tqdm.write(f"error: {args.from_file} line {job.line}: {error}", file=sys.stderr)

    with Store(args.out, batch, wanted, args.format, args.metadata, part, parts) as store:
        with tqdm(total=len(store.missing()), unit="image", unit_scale=True, disable=None) as bar:
            draw_all(
                pipe,
                store.wanted,
                lambda drawn: [store.add(drawn.job, drawn.image, metadata(pipe, drawn.job.single, drawn.image))],
                store.has,
                refuse=refuse,
                saved=report,
                progress=bar.update,
            )
        report(store.finish())
    return len(bad)


def report(paths: Sequence[Path]) -> None:
    """Prints the names of files that were written, over the progress bar if there is one."""
    for path in paths:
        tqdm.write(str(path))
    sys.stdout.flush()


def like(path: Path) -> Args:
    """The arguments that draw an image again, from the settings that it carries, which are checked as any others.

    Raises:
        ValueError: where it carries none, or they are not what `Request` takes.
    """
    carried = read_settings(path)
    if carried is None:
        raise ValueError(f"{path} does not say how it was made; --like is for images of sample.py.")
    try:
        known = {one.name for one in fields(Request)} | set(RENAMED)
        request = Request.of({name: value for name, value in carried.items() if name in known - {"n"}})
        request.check_portable()
        memory = check_memory(carried.get("memory", "normal"))
        if (dtype := carried.get("dtype")) not in (None, *DTYPES):
            raise ValueError(f"dtype is {dtype!r}.")
        loras = carried_list(carried, "loras", "files and strengths", dict, carried_lora)
        embeddings = carried_list(carried, "embeddings", "files and words", dict, carried_embedding)
        controls = carried_list(carried, "controls", "files", str, Path)
        ip_adapters = carried_list(carried, "ip_adapters", "files", str, Path)
        if not isinstance(image_encoder := carried.get("image_encoder"), str | None):
            raise ValueError("its image_encoder is no folder.")
    except ValueError as error:
        raise ValueError(f"{path} cannot be drawn again: {error}") from error
    return Args(
        (request.prompt,),
        like=path,
        dtype=dtype,
        memory=memory,
        loras=loras,
        embeddings=embeddings,
        controls=controls,
        ip_adapters=ip_adapters,
        image_encoder=None if image_encoder is None else Path(image_encoder),
        request=Flags(**{**vars(request), "prompt": ""}),
    )


def carried_list(carried: Mapping[str, Any], name: str, what: str, kind: type, make: Callable[[Any], Any]) -> tuple:
    """What an image's settings say that it was drawn with, such as LoRAs.

    Args:
        carried: the settings.
        name: under which they have it.
        what: what it is a list of, in words.
        kind: the type of each entry.
        make: from an entry to what it stands for.

    Raises:
        ValueError: where it makes no sense.
    """
    found = carried.get(name, [])
    if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
        raise ValueError(f"its {name} are no list of {what}.")
    return tuple(map(make, found))


def carried_lora(one: Mapping[str, Any]) -> LoRA:
    """A LoRA from its values in an image's settings, as `LoRA.values` has them."""
    return LoRA.of(tuple(one[name] for name in ("file", "strength", "text_strength") if name in one))


def carried_embedding(one: Mapping[str, Any]) -> Embedding:
    """A textual inversion from its values in an image's settings."""
    return Embedding.of((one.get("file"), one.get("word")))


def check_like(args: Args) -> None:
    """Checks that the model is the image's; warns where an image that it was made from has changed."""
    assert args.like is not None
    carried = read_settings(args.like) or {}
    if args.model is None and (model := carried.get("model")) != EMBEDDED.name:
        raise ValueError(f"{args.like} was drawn by the model {model!r}; give its folder by --model.")
    for part, given in {"refiner": args.refiner, "denoiser": args.denoiser, "vae": args.vae}.items():
        if given is None and (known := carried.get(part)) is not None:
            raise ValueError(f"{args.like} was drawn with the {part} {known!r}; give it by --{part}.")
    was = dict(Request.of({name: carried[name] for name in (*PICTURES, "prompt") if name in carried}).pictures())
    for name, path in args.request.pictures():
        known = carried.get(f"{name}_sha256")
        if path == was.get(name) and known is not None and known != sha256(str(path)):
            print(f"warning: {path} has changed since {args.like} was drawn from it.", file=sys.stderr)


def parse(argv: Sequence[str] | None) -> Args:
    """The arguments; with --like, an image's own for those that are not given."""
    words = [current_flag(word) for word in (sys.argv[1:] if argv is None else argv)]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--like", type=Path)
    path = first.parse_known_args(words)[0].like
    return tyro.cli(Args, args=words, default=Args() if path is None else without_given(like(path), words))


def without_given(args: Any, words: Sequence[str]) -> Any:
    """The arguments without the lists of which a flag is among the words, which would be added to them."""
    given = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    emptied = {}
    for one in fields(args):
        marks = getattr(one.type, "__metadata__", ())
        names = [one.name, *(mark.name.replace("-", "_") for mark in marks if getattr(mark, "name", None))]
        if tyro.conf.UseAppendAction in marks and given & set(names):
            emptied[one.name] = ()
    if isinstance(getattr(args, "request", None), Flags):
        emptied["request"] = without_given(args.request, words)
    return replace(args, **emptied)


def current_flag(word: str) -> str:
    """A flag by its present name, where it has been renamed."""
    name = word.split("=")[0].removeprefix("--").replace("-", "_")
    if not word.startswith("--") or name not in RENAMED or name == "negative":
        return word
    new = current_name(name).replace("_", "-")
    return word.replace(word.split("=")[0], f"--{new}", 1)


def cli(argv: Sequence[str] | None = None) -> int:
    """The command line; errors are a sentence and exit code 2."""
    said: set[str] = set()

    def say(message: Warning | str, category: type[Warning], *where: Any, usual: Any = warnings.showwarning) -> None:
        if not issubclass(category, PromptWarning | FutureWarning):
            usual(message, category, *where)
        elif str(message) not in said:
            said.add(str(message))
            tqdm.write(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", PromptWarning)
        warnings.simplefilter("always", FutureWarning)
        warnings.showwarning = say
        return distributed.leave(exit_code(lambda: main(parse(argv)), "a smaller --size"))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "Error (writing|reading) persistent compilation cache", UserWarning)
    sys.exit(cli())
