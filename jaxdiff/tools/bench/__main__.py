"""The command line: `python -m jaxdiff.tools.bench unet --model sd15 --batch 1 2 4`, or `... compare a.json b.json`."""

import math
import os
import sys
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import tyro

from jaxdiff.config import DataConfig, MeshConfig
from jaxdiff.generation.weights import Memory
from jaxdiff.runtime.cli import exit_code
from jaxdiff.runtime.mesh import make_mesh
from jaxdiff.tools.bench import measure, memory, result, run
from jaxdiff.tools.bench.models import ModelSizes, find_model
from jaxdiff.tools.bench.targets import Setting
from jaxdiff.tools.bench.versus import check_torch


@dataclass(frozen=True)
class Shared:
    """What every target takes."""

    model: str = "emoji"
    """sd15, sd21, small (a UNet of 37 M parameters), emoji (the embedded model), or a diffusers folder, single file or
    run directory; weights are random where none are at hand."""
    batch: tuple[int, ...] = (1,)
    """Images of all devices together; several are measured one after the other."""
    size: int | None = None
    """Pixels along each side; without it, the model's own."""
    json: Path | None = None
    """Write all figures here."""
    plot: Path | None = None
    """Draw throughput against batch here (a .png, .svg or .pdf; needs the plot extra)."""

    name: ClassVar[str] = ""


@dataclass(frozen=True)
class Program(Shared):
    """What every target takes that is a compiled program."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """What the networks compute in; without it, float32 on CPUs and bfloat16 elsewhere."""
    runs: Annotated[int, tyro.conf.arg(aliases=["--steps"])] = 10
    """Timed runs, each waited for."""
    warmup: int = 2
    """Runs before them, after the first."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    trace: Path | None = None
    """Write a profile of some more runs into this folder, for XProf."""
    vs: Literal["diffusers"] | None = None
    """Alternate with torch's diffusers on the same weights and shapes (needs the parity extra)."""
    vs_compile: bool = False
    """Alternate with diffusers made by torch.compile."""

    def options(self) -> dict[str, Any]:
        """What this target alone takes."""
        return {}


@dataclass(frozen=True)
class UNet(Program):
    """Times one evaluation of the denoising network."""

    name: ClassVar[str] = "unet"


@dataclass(frozen=True)
class VAE(Program):
    """Times the autoencoder's decoder."""

    encode: bool = False
    """The encoder in its place."""
    name: ClassVar[str] = "vae"

    def options(self) -> dict[str, Any]:
        """What this target alone takes."""
        return {"encode": self.encode}


@dataclass(frozen=True)
class Text(Program):
    """Times the text encoder; each prompt counts as an image."""

    name: ClassVar[str] = "text"


@dataclass(frozen=True)
class Sample(Program):
    """Times prompt to pixels: text encoder, all steps of DDIM with guidance, decoder."""

    runs: int = 5
    """Images (batches of them) that are timed."""
    warmup: int = 1
    """Runs before them, after the first."""
    steps: int = 30
    """Of the sampler."""
    guidance: float = 7.5
    """Scale of classifier-free guidance."""
    memory: Memory | None = None
    """Tell where a process's memory goes that draws one batch, for the first time, with this `--memory` of sample.py:
    normal or low. Nothing is timed."""
    name: ClassVar[str] = "sample"

    def options(self) -> dict[str, Any]:
        """What this target alone takes."""
        return {"steps": self.steps, "guidance": self.guidance}


@dataclass(frozen=True)
class Loader:
    """What is read; see `jaxdiff.config.DataConfig`."""

    source: str | None = None
    """emoji, prepared, folder, or any TFDS data set's name."""
    root: str = "data"
    """The TFDS data directory, or the folder of images."""
    split: str = "train"
    text_field: str = "caption"
    """TFDS only: the field that holds the caption, or a class label."""
    workers: int = 0
    """Processes that read; 0 reads in threads."""

    def config(self, batch: int, size: int) -> DataConfig | None:
        """None where nothing is to be read."""
        if self.source is None:
            return None
        return DataConfig(source=self.source, root=self.root, split=self.split, text_field=self.text_field,
                          workers=self.workers, batch_size=batch, size=size)  # fmt: skip


@dataclass(frozen=True)
class Train(Program):
    """Times a training step of the UNet (AdamW, average), on cached latents and captions that are random.

    With `--data.source` it is fed by the loader and encodes images and captions at every step, and the share of time
    that it waits for input is told.
    """

    batch: tuple[int, ...] = (8,)
    """Images of all devices together; several are measured one after the other."""
    remat: Literal["none", "norms", "blocks"] = "none"
    """What the backward pass computes again; see `TrainConfig.remat`."""
    data: Loader = field(default_factory=Loader)
    name: ClassVar[str] = "train"

    def options(self) -> dict[str, Any]:
        """What this target alone takes."""
        return {"remat": self.remat, "source": self.data.source}


@dataclass(frozen=True)
class Data(Shared):
    """Times the loader alone: records to batches of images and tokens in memory."""

    batch: tuple[int, ...] = (64,)
    """Images."""
    steps: Annotated[int, tyro.conf.arg(aliases=["--runs"])] = 50
    """Timed batches."""
    data: Loader = field(default_factory=lambda: Loader("emoji"))
    name: ClassVar[str] = "data"


@dataclass(frozen=True)
class Compare:
    """Prints the ratios of times of two files that --json wrote."""

    a: Annotated[Path, tyro.conf.Positional]
    b: Annotated[Path, tyro.conf.Positional]


COMMANDS = {"unet": UNet, "vae": VAE, "text": Text, "sample": Sample, "train": Train, "data": Data, "compare": Compare}


# The command ----------------------------------------------------------------------------------------------------------


def main(args: Shared | Compare) -> None:
    """Measures what is asked for, prints it, and writes what else was wanted."""
    if isinstance(args, Compare):
        print(result.compare(args.a, args.b))
        return
    model = find_model(args.model)
    size = model.size if args.size is None else args.size
    _check(args, model, size)
    machine = measure.machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None))
    if isinstance(args, Sample) and args.memory is not None:
        if args.json or args.plot or args.trace or args.vs or args.vs_compile:
            raise ValueError("--memory times nothing and writes no file: leave out --json, --plot, --trace and --vs.")
        for batch in args.batch:
            phases = memory.measure(model, size, batch, args.steps, args.guidance, args.dtype, args.memory)
            print(f"\n{batch} x {size}x{size}\n{memory.report(phases)}", flush=True)
        return
    results = []
    for batch in args.batch:
        if isinstance(args, Program):
            rivals = [compiled for compiled, wanted in ((False, args.vs), (True, args.vs_compile)) if wanted]
            setting = _setting(args, model, batch, size)
            results.append(run.program(args.name, setting, args.runs, args.warmup, args.trace, rivals))
        elif isinstance(args, Data):
            config = args.data.config(batch, size)
            assert config is not None  # Data names a source
            results.append(run.loader(config, model, args.steps))
        print("\n" + result.report(results[-1]), flush=True)
    if args.json:
        result.write(args.json, machine, date.today().isoformat(), results)
    if args.plot:
        result.plot(args.plot, machine, results)


def _setting(args: Program, model: ModelSizes, batch: int, size: int) -> Setting:
    mesh = make_mesh(args.mesh.data, args.mesh.fsdp, args.mesh.tensor)
    spread = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % spread:
        raise ValueError(f"--batch {batch} is not a multiple of the {spread} devices that the mesh's data and fsdp "
                         "axes spread it over.")  # fmt: skip
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    fed = args.data.config(batch, size) if isinstance(args, Train) else None
    return Setting(model, batch, size, dtype, mesh, args.options(), fed)


def _check(args: Shared, model: ModelSizes, size: int) -> None:
    """Refuses before anything is compiled."""
    if not args.batch or min(args.batch) < 1:
        raise ValueError(f"--batch is {' '.join(map(str, args.batch)) or 'empty'}; give whole numbers above 0.")
    factor = model.vae.factor
    if size < factor or size % factor:
        raise ValueError(f"--size is {size}; it must be a multiple of {factor}, the VAE's factor.")
    for name, least in (("runs", 1), ("steps", 1), ("warmup", 0)):
        if (value := getattr(args, name, least)) < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}.")
    if isinstance(args, Sample) and not math.isfinite(args.guidance):
        raise ValueError(f"--guidance is {args.guidance}; it must be a finite number.")
    if args.plot:
        result.check_plot(args.plot)
    for option in ("json", "plot", "trace"):
        if place := getattr(args, option, None):
            result.check_writable(option, place, is_folder=option == "trace")
    if isinstance(args, Program) and (args.vs or args.vs_compile):
        if isinstance(args, Train) and args.data.source:
            raise ValueError("--vs compares training on the same latents: leave out --data.source.")
        if make_mesh(args.mesh.data, args.mesh.fsdp, args.mesh.tensor).size > 1:
            raise ValueError(
                "--vs compares on one device: show JAX only one (such as by CUDA_VISIBLE_DEVICES=0), without --mesh."
            )
        check_torch()


def cli(argv: list[str] | None = None) -> int:
    """The command line; errors are a sentence and exit code 2."""
    args = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=argv, prog="bench", description=__doc__)
    return exit_code(lambda: main(args), "a smaller --batch or --size")


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same GPU
    sys.exit(cli())
