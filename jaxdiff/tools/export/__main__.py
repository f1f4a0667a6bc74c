"""The command line: `python -m jaxdiff.tools.export --model FOLDER --out DIR`."""

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from safetensors.numpy import save_file

import jaxdiff
from jaxdiff.families import StableDiffusion
from jaxdiff.generation.canvas import image_size
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.generation.request import Request
from jaxdiff.generation.weights import cast
from jaxdiff.io.convert import leaves
from jaxdiff.io.folder import MARK, replaced
from jaxdiff.model import FileOptions
from jaxdiff.runtime.cli import exit_code
from jaxdiff.sampling.samplers import starts_at_sigma
from jaxdiff.tools.export import load
from jaxdiff.tools.export.program import all_levels, custom_calls, export, inputs_of

LOADER = Path(load.__file__)
UNUSED = ("vae/encoder/", "vae/quant_conv/")
"""Params that a drawing does not need."""
TRIALS = (
    "", "a red apple, noto style, on an orange background", "  It's  NOT\tan émoji\u2019s\n— ÇA £ 1234 &amp; x",
    "🍎🍏 日本語 ﬁ İstanbul ẞ Ǆ ΣΑΣ", "<|endoftext|> hi <|startoftext|>", "<|ENDOFTEXT|>!", "!!!???...,, :-) #1",
    "\u200b\x00a\u00a0b\u2028c\x1cd", "e\u0301 é", "don't I'LL you've ''s", "word " * 60,
)  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Writes the program from prompt to pixels as StableHLO, with its weights and a loader that needs jax alone.

    `python DIR/load.py "a red apple"` then draws what `sample.py` does, without this package. For one device.
    """

    out: Path
    """A new folder, or one that this command wrote."""
    model: Path | None = None
    """A diffusers folder, a run directory or a single file; without it, the model that comes with the package."""
    file: Annotated[FileOptions, tyro.conf.arg(name="")] = field(default_factory=FileOptions)
    batch: int = 1
    """Images drawn at once; the loader takes any number of prompts."""
    size: Annotated[str | None, tyro.conf.arg(metavar="WxH")] = None
    """Width and height in pixels, as 64x64; without it, the model's own."""
    sampler: str = "ddim"
    """How the steps are taken: ddim, euler, dpmpp_2m, unipc and others; a wrong name lists them all."""
    schedule: str = "model"
    """The noise levels (sigmas) of the steps: model (the one the model's config asks for), trailing, karras,
    exponential, beta, sgm_uniform or align_your_steps."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in, on all platforms."""
    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = ("cpu", "cuda", "tpu")
    """For which the program is lowered."""
    kernels: bool = False
    """Keep attention's kernels, for one platform: faster, but cuDNN's are promised to no later version of JAX. Without
    it, attention is made of XLA's own operations."""


def main(args: Args) -> None:
    """Reads the model, exports, writes the folder."""
    check(args)
    write(args, jaxdiff.load(args.model, args.dtype, **vars(args.file)))


def check(args: Args) -> None:
    """Refuses what can be refused before the model is read.

    Raises:
        ValueError: in one sentence.
    """
    request_of(args).check()
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}; it must be at least 1.")
    if not args.platforms or len(set(args.platforms)) < len(args.platforms):
        raise ValueError(f"--platforms is {' '.join(args.platforms) or 'empty'}; name at least one, and each once.")
    if args.kernels and len(args.platforms) > 1:
        raise ValueError(f"--kernels is for one platform, not for {' '.join(args.platforms)}: kernels of one are not "
                         "known to the others' compilers.")  # fmt: skip


def request_of(args: Args) -> Request:
    """What the program draws, but for the prompt."""
    return Request(sampler=args.sampler, schedule=args.schedule, size=args.size)


def write(args: Args, pipe: Pipeline) -> None:
    """Writes the folder; all of it, or nothing.

    Raises:
        ValueError: in one sentence, for what cannot be exported, or where the folder holds anything else.
    """
    width, height = size = image_size(request_of(args), pipe.networks, pipe.size)
    factor = pipe.networks.factor
    program = pipe.program(request_of(args))
    if program.family.needs_image:
        raise ValueError("This model draws with an image; the export draws from prompts alone.")
    if not isinstance(program.family, StableDiffusion) or program.family.embeds_guidance:
        kind = "reads its guidance scale" if program.family.embeds_guidance else "is Stable Diffusion XL"
        raise ValueError(f"{pipe.name} {kind}, and only models of Stable Diffusion 1 and 2 that do not are exported; "
                         "draw with it by sample.py or the page.")  # fmt: skip
    levels = all_levels(program, args.schedule)

    (tokenizer,) = pipe.model.tokenizers
    empty = tokenizer([""])[0]
    inputs = inputs_of(program, args.batch, len(empty))
    stored, computed = weights(pipe, args.dtype)
    exported = export(
        computed, inputs, program=program, shape=(height // factor, width // factor, program.family.latent_channels),
        empty=empty, at_sigma=starts_at_sigma(args.sampler, args.schedule, program.scheduler),
        platforms=args.platforms, kernels=args.kernels,
    )  # fmt: skip
    calls = custom_calls(exported)
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    text = {"length": len(empty), "start": tokenizer.bos_id, "end": tokenizer.eos_id, "pad": tokenizer.pad_id,
            "special": tokenizer.special}  # fmt: skip
    about = {
        "format": load.FORMAT, **MARK, "about": told(args, calls), "model": pipe.name, "sampler": args.sampler,
        "schedule": args.schedule, "dtype": args.dtype, "size": list(size), "batch": args.batch,
        "platforms": list(exported.platforms), "devices": 1, "kernels": args.kernels, "custom_calls": calls,
        "calling_convention_version": exported.calling_convention_version,
        "made_by": {"jaxdiff": jaxdiff.__version__, **{name: version(name) for name in ("jax", "jaxlib", "numpy")}},
        "tokenizer": text,
        "defaults": {name: pipe.defaults[name] for name in ("steps", "guidance")},
        "inputs": {name: entry._asdict() for name, entry in inputs.items()},
        "outputs": {name: described(aval) for name, aval in outputs.items()},
        "weights": {name: described(aval) for name, aval in computed.items()},
    }  # fmt: skip
    with replaced(args.out, "program.json", {*load.FILES, "tokenizer", LOADER.name, "__pycache__"}) as new:
        tokenizer.save(new / "tokenizer")
        for name, tensors in ((load.WEIGHTS, stored), (load.LEVELS, levels)):
            save_file(tensors, new / name)
            shutil.copymode(new / load.VOCAB, new / name)  # safetensors lets nobody but the owner read
        (new / load.PROGRAM).write_bytes(exported.mlir_module_serialized)
        shutil.copyfile(LOADER, new / LOADER.name)
        about["files"] = {name: sha256(new / name) for name in load.FILES}
        check_tokenizer(new, text, pipe)
        (new / "program.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    program_size, weights_size = len(exported.mlir_module_serialized), sum(leaf.nbytes for leaf in stored.values())
    print(f"{args.out}: {program_size / 1e3:.0f} kB of StableHLO for {', '.join(exported.platforms)}; "
          f"{weights_size / 1e6:.1f} MB of weights.")  # fmt: skip
    print(f'python {args.out / LOADER.name} "a red apple"')


def weights(pipe: Pipeline, dtype: str) -> tuple[dict[str, np.ndarray], dict[str, jax.ShapeDtypeStruct]]:
    """The params as they are stored, and as the program takes them.

    Stored are the model's own where these are the smaller: the loader turns them into the others, which is exact.
    """
    own = pipe.model.params
    wanted = dict(leaves(jax.eval_shape(lambda params: cast(params, jnp.dtype(dtype)), own)))
    stored, computed = {}, {}
    for path, leaf in leaves(own):
        name, aval = "/".join(path), wanted[path]
        if not name.startswith(UNUSED):
            computed[name] = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
            narrow = leaf.dtype.itemsize < aval.dtype.itemsize
            stored[name] = np.ascontiguousarray(leaf, leaf.dtype if narrow else aval.dtype)
    return stored, computed


def described(aval: Any) -> dict[str, Any]:
    """An array's shape and type, for JSON."""
    return {"shape": list(aval.shape), "dtype": str(aval.dtype)}


def told(args: Args, calls: list[str]) -> list[str]:
    """What someone who finds the folder should know."""
    many = len(args.platforms) > 1
    return [
        f"{load.PROGRAM} is StableHLO, made by jax.export; it draws {args.batch} image(s) from tokens and seeds, on "
        "one device: it is not split over several.",
        "Its arguments are " + ("the index of the platform in `platforms` (int32), then " if many else "")
        + "`weights` and then `inputs`, each in the order of their names; its results are `outputs`, likewise.",
        f"{load.WEIGHTS} holds the weights, some narrower than the program takes them: cast them as `weights` says.",
        f"{load.LEVELS} holds the noise levels of the sampler {args.sampler} on the schedule {args.schedule}: for n "
        "steps, `sigmas` and `sigmas_next` from `ends`[n - 1] to `ends`[n]. Any other falling levels can be given.",
        *(["The levels of tcd are those of eta 0."] if args.sampler == "tcd" else []),
        "It has kernels beside StableHLO's own operations (" + ", ".join(calls) + "); JAX promises those of cuDNN and "
        "Triton to no other version than that of `made_by`." if calls else
        "It is made of StableHLO's own operations alone, which JAX promises to read for six months at least, and "
        "StableHLO for five years.",
        "Prompts are taken as they are written, without weights, schedules and AND, and cut where they are too long.",
        "A program is code: run those alone that come from someone you trust. `files` tells damage, not malice.",
    ]  # fmt: skip


def check_tokenizer(folder: Path, text: dict[str, Any], pipe: Pipeline) -> None:
    """Whether the loader's tokenizer, which is simpler, agrees.

    Raises:
        ValueError: where it does not.
    """
    theirs = load.Tokenizer(load.read_json(folder / load.VOCAB), load.read_merges(folder / load.MERGES), **text)
    for trial in (*TRIALS, *text["special"], *(f"{word}s" for word in text["special"])):
        if (theirs([trial]) != pipe.model.tokenizers[0]([trial])).any():
            raise ValueError(f"The model's tokenizer is not CLIP's: of {trial!r} it makes other tokens, so the loader "
                             "cannot do without the package tokenizers, and the model is not exported.")  # fmt: skip


def sha256(path: Path) -> str:
    """A file's, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cli(argv: list[str] | None = None) -> int:
    """The command line; errors are a sentence and exit code 2."""
    return exit_code(lambda: main(tyro.cli(Args, args=argv, prog="export")), "a smaller --batch or --size")


if __name__ == "__main__":
    sys.exit(cli())
