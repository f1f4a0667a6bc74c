"""Weights from one layout to another: `python -m jaxdiff.tools.convert SRC DST`."""

import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from jaxdiff.config import SchedulerConfig
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.families import family_of
from jaxdiff.io.convert import leaves
from jaxdiff.io.folder import (
    UNMAPPED,
    Unmapped,
    check_target,
    find_part,
    read_network,
    read_unmapped,
    write_network,
)
from jaxdiff.io.single_file import SUFFIXES, check_file, is_single, open_single, write_single
from jaxdiff.io.weights import listed
from jaxdiff.model import FileOptions, Model, Network, check_network, exported, file_tokenizers, read_model
from jaxdiff.runtime.cli import exit_code
from jaxdiff.types import Params


@dataclass(frozen=True)
class Args:
    """Converts a model, or a VAE alone: from a diffusers folder, a run directory or a single file to another of these.

    Every tensor of the networks is the same there and back, bit for bit, unless --dtype says otherwise.
    """

    src: tyro.conf.Positional[Path]
    """A diffusers folder, a run directory of train.py, or a .safetensors or .ckpt file in the original layout."""
    dst: tyro.conf.Positional[Path]
    """A new name: with .safetensors at its end a single file in the original layout, else a diffusers folder."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """The type of the networks' weights; without it each keeps its own."""
    file: Annotated[FileOptions, tyro.conf.arg(name="")] = field(default_factory=FileOptions)
    rest: bool = True
    """Keep what a single file has beside its networks, such as averages and buffers: in a folder as
    unmapped.safetensors, from which it returns."""


@dataclass(frozen=True)
class Source:
    """What is converted."""

    kind: str
    networks: Mapping[str, tuple[Any, Params]]
    """By folder: "unet", "vae", "text_encoder" and perhaps others, or "vae" alone."""
    scheduler: SchedulerConfig | None = None
    tokenizers: tuple[Tokenizer, ...] = ()
    pads: Mapping[str, int | None] = field(default_factory=dict)
    """The token that fills up prompts, for each text encoder; None is the end token."""
    zero_empty: bool = False
    """Whether an empty negative prompt is zeros."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unmapped: Unmapped = field(default_factory=lambda: Unmapped({}, {}))
    unknown: tuple[str, ...] = ()
    """Of these tensors, those of no known use."""


def main(args: Args) -> None:
    """Reads, writes and says what went where."""
    to_file = args.dst.suffix == ".safetensors"
    if args.src.resolve() == args.dst.resolve():
        raise ValueError(f"{args.src} would be written over itself; choose another name.")
    if not to_file and args.dst.suffix in SUFFIXES:
        raise ValueError(f"{args.dst} cannot be written: a single file's name ends in .safetensors.")
    if to_file:
        check_file(args.dst)
    source = read_file(args) if is_single(args.src) else read_folder(args)
    for name, (_, params) in source.networks.items():
        arrays = [leaf for _, leaf in leaves(params)]
        kinds = ", ".join(f"{kind} ({n})" for kind, n in Counter(array.dtype.name for array in arrays).items())
        print(f"{name}: {len(arrays)} parameters of {kinds}" + (f", written as {args.dtype}" if args.dtype else ""))
    kept = source.unmapped if args.rest else Unmapped({}, {})
    said = write_file(args, source, kept) if to_file else write_in_folder(args, source, kept)
    report_rest(args, source)
    for name, values in said.items():
        told = ", ".join(f"{key} {value!r}" for key, value in values.items()) if isinstance(values, dict) else values
        print(f"{name}: said in the file's metadata, which other programs do not read: {told}")
    print(f"{args.dst}: written from {source.kind} {args.src}.")


def read_file(args: Args) -> Source:
    """What a single file holds."""
    file = open_single(args.src, args.file.prediction_type, args.file.ema)
    networks = {}
    for name in file.places:
        config, params = file.network(name)
        networks[name] = config, check_network(name, config, params, f"{args.src} ({name})")
    whole = "unet" in networks
    # Of a file that is written the tokenizer is no part.
    wanted = whole and file.pads and args.dst.suffix != ".safetensors"
    return Source(
        f"a single file in the layout of {file.layout.name},",
        networks,
        file.scheduler if whole else None,
        file_tokenizers(file, args.file.tokenizer) if wanted else (),
        file.pads,
        file.zero_empty,
        file.defaults,
        Unmapped({name: np.asarray(array) for name, array in file.spare.items()}, file.metadata),
        tuple(file.unknown),
    )


def read_folder(args: Args) -> Source:
    """What a folder or a run holds: a model, or a VAE alone."""
    if args.file != FileOptions():
        raise ValueError(f"{args.src} is no single file; --tokenizer, --prediction-type and --ema are for those alone.")
    signs = [args.src / place / name for place in ("", "export") for name in ("model_index.json", "unet")]
    if not any(sign.exists() for sign in signs):
        vae = find_part(args.src, "vae")
        config, params = read_network(vae, "vae")
        params = check_network("vae", config, params, vae)
        return Source("the folder of a VAE,", {"vae": (config, params)}, unmapped=read_unmapped(vae))
    folder, model = exported(args.src), read_model(args.src)
    if model.noising is not None or model.family.IMAGE_READERS:
        raise ValueError(f"{args.src} is a model that reads an image by CLIP, or enlarges one; such models stay the "
                         "folders that they are.")  # fmt: skip
    networks = {model.family.FOLDERS[role]: network for role, network in model.networks.items()}
    pads = {
        role: None if tokenizer.pad_id == tokenizer.eos_id else tokenizer.pad_id
        for role, tokenizer in zip(model.family.TEXT_ENCODERS, model.tokenizers, strict=True)
    }
    return Source(
        "the folder", networks, model.scheduler, model.tokenizers, pads, model.zero_empty, model.defaults,
        read_unmapped(folder),
    )  # fmt: skip


def write_file(args: Args, source: Source, kept: Unmapped) -> dict[str, Any]:
    """Writes a single file; returns what its metadata say that the layout does not."""
    return write_single(
        args.dst, source.networks, source.scheduler, source.pads, kept.tensors, kept.metadata, source.defaults,
        args.dtype, source.zero_empty if "unet" in source.networks else None,
    )  # fmt: skip


def write_in_folder(args: Args, source: Source, kept: Unmapped) -> dict[str, Any]:
    """Writes a folder, which says all."""
    if set(source.networks) == {"vae"}:
        check_target(args.dst, "vae")
        write_network(args.dst, "vae", *source.networks["vae"], args.dtype, kept)
        return {}
    if (family := family_of(set(source.networks))) is None:
        missing = {"unet", "vae", "text_encoder"} - set(source.networks)
        raise ValueError(f"{args.src} has no {' and no '.join(sorted(missing))}; a folder is made of a whole model or "
                         "a VAE.")  # fmt: skip
    check_target(args.dst)
    assert source.scheduler is not None
    networks = {role: Network(*source.networks[name]) for role, name in family.FOLDERS.items()}
    model = Model(
        networks, source.scheduler, source.tokenizers[0], family, source.defaults,
        tokenizer_2=source.tokenizers[1] if source.tokenizers[1:] else None, zero_empty=source.zero_empty,
    )  # fmt: skip
    model.write(args.dst, args.dtype, kept)
    return {}


def report_rest(args: Args, source: Source) -> None:
    """Says which tensors are of no network, by the first part of their names, and where they are now."""
    if not (names := list(source.unmapped.tensors)):
        return
    kinds = Counter(re.split(r"[.]", name)[0] for name in names)
    told = ", ".join(kind if n == 1 else f"{kind}.* ({n})" for kind, n in kinds.items())
    place = args.dst if args.dst.suffix == ".safetensors" else args.dst / UNMAPPED
    where = f"kept in {place}" if args.rest else "left out"
    print(f"of no network: {len(names)} tensors, {where}: {told}")
    if source.unknown:
        print(f"of these, of no known use: {listed(source.unknown)}")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(tyro.cli(Args))))
