"""The command line: `python -m jaxdiff.tools.bench unet --model sd15 --batch 1 2 4`, or `... compare a.json b.json`."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import tyro

from jaxdiff.cli import exit_code
from jaxdiff.config import DataConfig, MeshConfig
from jaxdiff.data.loader import batches, open_source
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.sharding import make_mesh
from jaxdiff.tools import hlo
from jaxdiff.tools.bench import measure, result, versus
from jaxdiff.tools.bench.measure import Spread
from jaxdiff.tools.bench.models import Model, find_model
from jaxdiff.tools.bench.result import Result
from jaxdiff.tools.bench.targets import TARGETS, Setting, Work
from jaxdiff.training.feed import Feed, local_rows

READ_AHEAD = 8
"""Batches of a loader that are not timed: it has read some before it is asked."""


@dataclass(frozen=True)
class Shared:
    """What every target takes."""

    model: str = "emoji"
    """sd15, sd21, small (a UNet of 37 M parameters), emoji (the embedded model), or a diffusers folder or run
    directory; weights are random where none are at hand."""
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
    """Pictures (batches of them) that are timed."""
    warmup: int = 1
    """Runs before them, after the first."""
    steps: int = 30
    """Of the sampler."""
    guidance: float = 7.5
    """Scale of classifier-free guidance."""
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
    """The TFDS data directory, or the folder of pictures."""
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

    With `--data.source` it is fed by the loader and encodes pictures and captions at every step, and the share of time
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
    """Times the loader alone: records to batches of pictures and tokens in memory."""

    batch: tuple[int, ...] = (64,)
    """Pictures."""
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


# Measuring ------------------------------------------------------------------------------------------------------------


def measured(args: Program, setting: Setting) -> Result:
    """Compiles one target at one batch and times it."""
    work = TARGETS[args.name](setting)
    made = measure.make(work.f, work.args)
    peak = measure.best(setting.mesh.size)

    measure.forget_peak()
    run = _runner(made.compiled, work)
    first, first_out = measure.timed(run)
    feed = _feed(work, setting)
    with feed or nullcontext():
        times, waits = [], []
        for _ in range(args.warmup + args.runs):
            began = time.perf_counter()
            batch = next(feed) if feed else None
            waits.append(time.perf_counter() - began)
            times.append(measure.seconds(lambda batch=batch: run(batch)))
    times, waits = times[args.warmup :], waits[args.warmup :]
    memory, memory_of = measure.peak()

    if args.trace:
        with jax.profiler.trace(str(args.trace)):
            for _ in range(3):
                jax.block_until_ready(run())
    rivals = [compiled for compiled, wanted in ((False, args.vs), (True, args.vs_compile)) if wanted]
    against = tuple(versus.versus(args.name, setting, work, run, first_out, args.runs, compiled) for compiled in rivals)
    seconds = Spread.of([a + b for a, b in zip(times, waits, strict=True)] if feed else times)
    return _result(args, setting, work, made, peak, first, seconds, memory, memory_of,
                   sum(waits) / sum(times + waits) if feed else None, against)  # fmt: skip


def _runner(compiled: Any, work: Work) -> Callable[..., Any]:
    """One run of the program, on its own arguments or, in training, with another batch; the state goes on."""
    args = work.args

    def run(batch: Any = None) -> Any:
        nonlocal args
        if batch is not None:
            args = (*args[:2], batch, *args[3:])
        out = compiled(*args)
        args = work.advance(args, out)
        return work.fetch(out)

    return run


def _feed(work: Work, setting: Setting) -> Feed | None:
    """The batches of training on real pictures."""
    config = work.config
    if config is None or not setting.options.get("data"):
        return None
    tokenizer = Tokenizer.load(setting.model.tokenizer, setting.model.text_encoder.max_position_embeddings)
    rows = local_rows(setting.mesh, setting.batch)
    return Feed(batches(config.data, open_source(config.data), tokenizer, seed=0, rows=rows), setting.mesh)


def _result(
    args: Program,
    setting: Setting,
    work: Work,
    made: measure.Made,
    peak: measure.Peak | None,
    first: float,
    seconds: Spread,
    memory: int,
    memory_of: str,
    wait_share: float | None,
    against: tuple[versus.Versus, ...],
) -> Result:
    devices = setting.mesh.size
    moved = devices * float(hlo.parse(made.compiled.as_text(), work.turns).bytes_moved())
    counted = (made.compiled.cost_analysis() or {}).get("flops", 0) if work.turns == 1 else 0
    analysis = made.compiled.memory_analysis()
    rate, speed = setting.batch / seconds.median, work.flops / seconds.median
    return Result(
        target=args.name,
        model=args.model,
        batch=setting.batch,
        size=setting.size,
        dtype=setting.dtype,
        devices=devices,
        mesh=dict(setting.mesh.shape),
        options=args.options(),
        trace=made.trace,
        lower=made.lower,
        compile=made.compile,
        first=first,
        seconds=seconds,
        images_per_second=rate,
        images_per_second_per_device=rate / devices,
        flops=work.flops,
        xla_flops=devices * counted if counted > 0 else None,
        flops_per_second=speed,
        peak_share=speed / peak.flops if peak else None,
        bytes_moved=moved,
        bandwidth_share=moved / seconds.median / peak.bandwidth if peak else None,
        peak_source=peak.source if peak else None,
        temporaries=analysis.temp_size_in_bytes if analysis else None,
        peak_memory=memory,
        peak_memory_of=memory_of,
        wait_share=wait_share,
        versus=against,
    )


def loaded(args: Data, model: Model, batch: int, size: int) -> Result:
    """Times the loader alone."""
    config = args.data.config(batch, size)
    assert config is not None
    tokenizer = Tokenizer.load(model.tokenizer, model.text_encoder.max_position_embeddings)
    measure.forget_peak()
    with closing(batches(config, open_source(config), tokenizer, seed=0)) as source:
        first = measure.seconds(lambda: next(source))
        for _ in range(READ_AHEAD):
            next(source)
        began = time.perf_counter()
        times = [measure.seconds(lambda: next(source)) for _ in range(args.steps)]
        rate = batch * args.steps / (time.perf_counter() - began)
    memory, memory_of = measure.peak()
    return Result(
        target=args.name, model=args.model, batch=batch, size=size, dtype="float32", devices=1, mesh={},
        options={"source": config.source, "workers": config.workers}, trace=None, lower=None, compile=None, first=first,
        seconds=Spread.of(times), images_per_second=rate, images_per_second_per_device=rate, flops=None, xla_flops=None,
        flops_per_second=None, peak_share=None, bytes_moved=None, bandwidth_share=None, peak_source=None,
        temporaries=None, peak_memory=memory, peak_memory_of=memory_of,
    )  # fmt: skip


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
    results = []
    for batch in args.batch:
        if isinstance(args, Program):
            results.append(measured(args, _setting(args, model, batch, size)))
        elif isinstance(args, Data):
            results.append(loaded(args, model, batch, size))
        print("\n" + result.report(results[-1]), flush=True)
    if args.json:
        result.write(args.json, machine, date.today().isoformat(), results)
    if args.plot:
        result.plot(args.plot, machine, results)


def _setting(args: Program, model: Model, batch: int, size: int) -> Setting:
    mesh = make_mesh(args.mesh.data, args.mesh.fsdp, args.mesh.tensor)
    spread = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % spread:
        raise ValueError(f"--batch {batch} is not a multiple of the {spread} devices that the mesh's data and fsdp "
                         "axes spread it over.")  # fmt: skip
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    options = args.options()
    if isinstance(args, Train):
        options |= {"data": args.data.config(batch, size)}
    return Setting(model, batch, size, dtype, mesh, options)


def _check(args: Shared, model: Model, size: int) -> None:
    """Refuses before anything is compiled."""
    if not args.batch or min(args.batch) < 1:
        raise ValueError(f"--batch is {' '.join(map(str, args.batch)) or 'empty'}; give whole numbers above 0.")
    factor = model.vae.factor
    if size < factor or size % factor:
        raise ValueError(f"--size is {size}; it must be a multiple of {factor}, the VAE's factor.")
    for name, least in (("runs", 1), ("steps", 1), ("warmup", 0)):
        if (value := getattr(args, name, least)) < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}.")
    if args.plot:
        result.check_plot()
    if isinstance(args, Program) and (args.vs or args.vs_compile):
        if isinstance(args, Train) and args.data.source:
            raise ValueError("--vs compares training on the same latents: leave out --data.source.")
        if make_mesh(args.mesh.data, args.mesh.fsdp, args.mesh.tensor).size > 1:
            raise ValueError(
                "--vs compares on one device: show JAX only one (such as by CUDA_VISIBLE_DEVICES=0), without --mesh."
            )
        versus.check_torch()


def cli(argv: list[str] | None = None) -> int:
    """The command line; errors are a sentence and exit code 2."""
    args = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=argv, prog="bench", description=__doc__)
    return exit_code(lambda: main(args), "a smaller --batch or --size")


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same GPU
    sys.exit(cli())
