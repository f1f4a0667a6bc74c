"""Plans a run before it is paid for: compiles its training step, without weights or data, and says what it costs.

`python -m jaxdiff.tools.plan configs/sd15_scratch.py --topology v5e:16x16 [--field value ...]` asks the TPU compiler,
on a machine without a TPU; `--devices 8` asks the CPU's. Fields are overridden as `train.py` does it. `--forward` plans
one call of the UNet in place of a step, as sampling makes it: parameters whole on every chip, in the config's dtype.
`--sample 20` plans the whole of it: prompts to images, in so many steps with guidance.
"""

import argparse
import fcntl
import json
import math
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from inspect import unwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff import build
from jaxdiff.config import DataConfig, DiffusionTask, TrainConfig, VAEConfig, VAETask
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.families import family_of
from jaxdiff.generation import programs
from jaxdiff.generation.network import Inputs
from jaxdiff.io.folder import read_config as read_network_config
from jaxdiff.runtime.cli import exit_code
from jaxdiff.runtime.mesh import batch_sharding, make_mesh, tree_shardings
from jaxdiff.runtime.programs import give_back_memory
from jaxdiff.sampling.loop import begin
from jaxdiff.sampling.sigmas import MODEL
from jaxdiff.tools import hlo
from jaxdiff.tools.chips import TPUS, Chip
from jaxdiff.training.optim import learning_rate, optimiser
from jaxdiff.training.options import read_config, resolve
from jaxdiff.training.state import Task, create_state, freeze, make_step
from jaxdiff.training.tasks.diffusion import diffusion_inputs, diffusion_task
from jaxdiff.training.tasks.vae import vae_inputs, vae_task
from jaxdiff.types import Params, Tokens

USAGE = (
    "python -m jaxdiff.tools.plan CONFIG (--topology v5e:4x4 | --devices 8) "
    "[--forward | --sample STEPS] [--fit] [--json] [--field value ...]"
)


PARTS = ("parameters", "optimiser", "ema", "frozen", "inputs")


@dataclass(frozen=True)
class Plan:
    """What a step (or a call of the UNet) costs each chip: bytes, operations, and seconds that it takes at least."""

    devices: int
    mesh: dict[str, int]
    batch: int
    """Images a chip."""
    parameters: int
    optimiser: int
    ema: int
    frozen: int
    inputs: int
    """The batch."""
    temporaries: int
    total: int
    """All of these, as the compiler counts them; tiles are padded."""
    memory: int | None
    """What the chip has; None where it is not known."""
    fits: bool
    flops: float
    """Of matrix products and convolutions, what is computed again included."""
    bytes_moved: float
    """To and from the chip's memory, by our own count: loops in every turn, what stays on the chip not at all."""
    bytes_accessed: float
    """XLA's own figure, which others publish: what its operations read and write, wherever it lies, and each loop once.

    Kernels count as they say: operands as often as they are read, and results.
    """
    collectives: dict[str, int]
    """Bytes sent to other chips by each kind of collective."""
    bounds: dict[str, float]
    """Seconds that compute, memory and network need at their peak rates: a step takes the largest, or more."""
    seconds: float | None
    images_per_second: float | None
    """Of all chips, if the step took no longer than that bound."""
    compile_seconds: float
    run_seconds: float | None = None
    """Median time of the steps that were run."""
    peak: int | None = None
    """Bytes of this process at most, until then."""


# The step, from shapes alone ------------------------------------------------------------------------------------------


def abstract_task(config: TrainConfig) -> tuple[Task, dict[str, jax.ShapeDtypeStruct]]:
    """The task that `train.py` would train, with shapes in place of weights, and the shapes of a batch."""
    task, dtype = config.task, jnp.dtype(config.dtype)
    if isinstance(task, VAETask):
        inputs = vae_inputs(task, config.data)
        trained = vae_task(task, inputs.frozen, None, dtype, config.remat)
    else:
        vae = _vae_config(task)
        inputs = diffusion_inputs(task, config.data, vae)
        trained = diffusion_task(task, vae, inputs.frozen, None, dtype, config.remat)
    start = jax.eval_shape(trained.init, jax.random.key(0))  # what rates of 0 freeze must have a start
    return freeze(replace(trained, start=start), config.optim.factors), inputs.batch


def _vae_config(task: DiffusionTask) -> VAEConfig:
    return read_network_config(task.vae, "vae") if task.vae and Path(task.vae).exists() else VAEConfig()


def placed(tree: Any, shardings: Any) -> Any:
    """Shapes with the shardings that they have."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def bytes_a_chip(tree: Any) -> int:
    """What the leaves of a tree of shapes with shardings take on one chip, without padding."""
    return sum(
        int(jnp.prod(jnp.array(x.sharding.shard_shape(x.shape), jnp.float32))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.size
    )


Program = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A jitted function, the shapes of its arguments (with shardings), and those that are parts of a plan."""


def step_program(config: TrainConfig, mesh: Mesh) -> Program:
    """The step that `train.py` takes."""
    task, batch = abstract_task(config)
    tx = optimiser(config.optim, learning_rate(config.optim, config.steps))
    key = jax.random.key(0)
    state = create_state(task, tx, key, mesh, config.ema, abstract=True)
    frozen = placed(task.frozen, tree_shardings(mesh, task.frozen))
    batch = placed(batch, jax.tree.map(lambda _: batch_sharding(mesh), batch))
    step = make_step(task, tx, state, config.ema, config.optim.accumulate, jnp.dtype(config.dtype))
    parts = {"parameters": state.params, "optimiser": state.opt, "ema": state.ema, "frozen": frozen, "inputs": batch}
    return step, (state, frozen, batch, jax.eval_shape(lambda: key)), parts


def forward_program(config: TrainConfig, mesh: Mesh) -> Program:
    """One call of the UNet, as sampling makes it: the batch in parts, the parameters whole.

    Raises:
        ValueError: where the config trains no UNet.
    """
    if not isinstance(task := config.task, DiffusionTask):
        raise ValueError("--forward plans a UNet, and this config trains an autoencoder.")
    dtype, shape = jnp.dtype(config.dtype), jax.ShapeDtypeStruct
    b, (height, width), factor = config.data.batch_size, config.data.shapes[0], _vae_config(task).factor
    module, whole = build.unet(task.unet, dtype), NamedSharding(mesh, P())
    params = jax.tree.map(lambda p: shape(p.shape, dtype, sharding=whole), build.param_shapes(module, task.unet))
    inputs = (
        shape((b, height // factor, width // factor, task.unet.in_channels), jnp.float32),
        shape((b,), jnp.float32),
        shape((b, task.text_encoder.max_position_embeddings, task.unet.cross_attention_dim), dtype),
    )
    told = {}
    if task.text_encoder_2 is not None:
        told = {"pooled": shape((b, task.text_encoder_2.projection_dim), dtype), "numbers": shape((b, 6), jnp.float32)}
    inputs, told = placed((inputs, told), jax.tree.map(lambda _: batch_sharding(mesh), (inputs, told)))

    @jax.jit
    def forward(params: Params, inputs: tuple[Any, ...], told: dict[str, Any]) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return module.apply({"params": params}, *inputs, **told)

    return forward, (params, inputs, told), {"parameters": params, "inputs": (inputs, told)}


def sample_program(config: TrainConfig, mesh: Mesh, steps: int) -> Program:
    """Prompts to images, with guidance, as a pipeline on these devices draws them: images in parts, parameters whole.

    Raises:
        ValueError: where the config trains no UNet, or one that draws nothing from a prompt alone.
    """
    if not isinstance(task := config.task, DiffusionTask):
        raise ValueError("--sample plans a text-to-image model, and this config trains an autoencoder.")
    dtype, shape, vae = jnp.dtype(config.dtype), jax.ShapeDtypeStruct, _vae_config(task)
    folders: dict[str, Any] = {"unet": task.unet, "vae": vae, **task.text_encoders}
    family = family_of(set(folders))
    assert family is not None, "a task has a family's networks"
    configs = {role: folders[name] for role, name in family.FOLDERS.items()}
    program = programs.Program(family.of(configs, dtype), task.scheduler)
    if program.family.needs_image:
        raise ValueError("--sample draws from a prompt alone, and this UNet is for inpainting; --forward plans it.")
    whole = NamedSharding(mesh, P())
    params = {
        role: jax.tree.map(
            lambda p: shape(p.shape, dtype, sharding=whole),
            build.param_shapes(getattr(build, name)(folders[name]), folders[name]),
        )
        for role, name in family.FOLDERS.items()
    }
    b, (height, width) = config.data.batch_size, config.data.shapes[0]
    length, latent = task.text_encoder.max_position_embeddings, (height // vae.factor, width // vae.factor)
    inputs = {"ids": shape((b, 1, 2, 1, length), jnp.int32), "seeds": shape((b,), jnp.uint32)}
    inputs = placed(inputs, jax.tree.map(lambda _: batch_sharding(mesh), inputs))
    numbers = program.family.numbers((width, height), (width, height), (0, 0), 0.0, 1.0)
    sigmas = MODEL(task.scheduler, make_schedule(task.scheduler), steps)

    @jax.jit
    def draw(params: Params, inputs: dict[str, Any], stop: Any) -> Any:
        ids = inputs["ids"]
        tokens = Tokens(ids, jnp.ones(ids.shape), jnp.zeros(length, jnp.int32))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            texts = tuple(params[role] for role in family.TEXT_ENCODERS)
            conditioning = unwrap(programs.encode_prompts)(texts, (tokens,) * len(texts), program=program)
            if numbers is not None:
                extra = jnp.broadcast_to(jnp.asarray(numbers), (b, 1, *numbers.shape))
                conditioning = conditioning._replace(extra=extra)
            keys, noise = programs.keys_and_noise(inputs["seeds"], (*latent, vae.latent_channels))
            state = unwrap(programs.denoise)(
                params["denoiser"],
                Inputs(conditioning, jnp.ones((b, 1, 1, 1, 1, 1)), jnp.zeros((b, 1))),
                jax.vmap(begin)(noise),
                keys,
                sigmas,
                jnp.int32(0),
                stop,
                Guidance(jnp.float32(7.5)),
                jnp.float32(0),
                program=program,
            )
            return unwrap(programs.decode)(params["vae"], state.x, program=program)

    stop = shape((), jnp.int32, sharding=whole)
    return draw, (params, inputs, stop), {"parameters": params, "inputs": inputs}


def plan(
    config: TrainConfig,
    mesh: Mesh,
    chip: Chip | None = None,
    dump: Path | None = None,
    runs: int = 0,
    forward: bool = False,
    sample: int = 0,
) -> Plan:
    """Compiles the step of `config` for `mesh`; its global batch is `config.data.batch_size`.

    Of several shapes of images the largest is planned, which needs the most memory.

    Args:
        config: the run.
        mesh: of devices that may be described only.
        chip: what each can do, where that is known.
        dump: a file for the compiled program's text.
        runs: steps to take, on weights and data that are 0; the devices must be there.
        forward: one call of the UNet, in place of the step.
        sample: prompts to images in so many steps, in place of the step.

    Raises:
        ValueError: where the batch does not divide among the devices.
    """
    spread = parts_of_batch(config, mesh, forward or sample > 0)
    if config.data.batch_size % spread:
        raise ValueError(f"DataConfig.batch_size {config.data.batch_size} is not a multiple of the {spread} parts that "
                         "the mesh's data and fsdp axes and OptimConfig.accumulate split it into.")  # fmt: skip
    config = replace(config, data=of_largest_shape(config.data))
    if sample:
        program, arguments, parts = sample_program(config, mesh, sample)
    else:
        program, arguments, parts = (forward_program if forward else step_program)(config, mesh)

    began = time.perf_counter()
    traced = program.trace(*arguments)
    work = hlo.flops(traced.jaxpr, max(1, sample)) / mesh.size
    held = {name: bytes_a_chip(parts.get(name, ())) for name in PARTS}
    sizes = {
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch": config.data.batch_size // mesh.size,
        "flops": work,
        "memory": int(chip.hbm) if chip else None,
        **held,
    }
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        total = wanted(str(error), sum(held.values()))
        return Plan(**sizes, temporaries=max(0, total - sum(held.values())), total=total, fits=False, bytes_moved=0,
                    bytes_accessed=0, collectives={}, bounds={}, seconds=None, images_per_second=None,
                    compile_seconds=time.perf_counter() - began)  # fmt: skip

    text = compiled.as_text()
    if dump:
        dump.write_text(text)
    parsed, memory = hlo.parse(text, max(1, sample)), compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    collectives = parsed.collectives()
    moved = float(parsed.bytes_moved())
    bounds = {}
    if chip:
        bounds = {
            "compute": work / chip.flops,
            "memory": moved / chip.hbm_bandwidth,
            "network": sum(collectives.values()) / chip.ici_bandwidth,
        }
    seconds = max(bounds.values(), default=None)
    compile_seconds = time.perf_counter() - began
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed", 0.0)
    del text, parsed, traced
    times = run(compiled, arguments, runs, forward or sample > 0) if runs else []
    return Plan(
        **sizes,
        temporaries=memory.temp_size_in_bytes,
        total=total,
        fits=not chip or total <= chip.hbm,
        bytes_moved=moved,
        bytes_accessed=accessed,
        collectives=collectives,
        bounds=bounds,
        seconds=seconds,
        images_per_second=config.data.batch_size / seconds if seconds else None,
        compile_seconds=compile_seconds,
        run_seconds=sorted(times)[len(times) // 2] if times else None,
        peak=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if times else None,
    )


def wanted(error: str, held: int) -> int:
    """Bytes that a chip would need at least for a program that does not fit it, from the compiler's own words.

    Args:
        error: these. Where arguments alone are too much, compilers say so without a number.
        held: bytes of the arguments.
    """
    used = re.search(r"Used ([\d.]+)([KMGT]) of", error)
    return max(held, int(float(used[1]) * 1024 ** ("KMGT".index(used[2]) + 1)) if used else 0)


def parts_of_batch(config: TrainConfig, mesh: Mesh, forward: bool = False) -> int:
    """How many equal parts a global batch is split into, over devices and, but for sampling, micro-batches."""
    return mesh.shape["data"] * mesh.shape["fsdp"] * (1 if forward else config.optim.accumulate)


def of_largest_shape(data: DataConfig) -> DataConfig:
    """The same with that one of its shapes which has the most pixels."""
    if not data.aspects:
        return data
    areas = [height * width for height, width in data.shapes]
    return replace(data, aspects=(data.aspects[areas.index(max(areas))],))


def run(compiled: Any, shapes: tuple[Any, ...], times: int, forward: bool = False) -> list[float]:
    """The seconds of so many calls; one that is not counted goes before. A step takes the state that the last made."""
    jax.clear_caches()
    give_back_memory()

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.zeros(x.shape, x.dtype, device=x.sharding)

    arguments = jax.tree.map(fill, shapes)
    seconds = []
    for _ in range(times + 1):
        began = time.perf_counter()
        result = jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - began)
        if not forward:
            arguments = (result[0], *arguments[1:])
    return seconds[1:]


def largest(fits: Callable[[int], bool], first: int) -> int:
    """The largest number that fits, to within a quarter of it; 0 if 1 does not. Few trials: each is a compilation."""
    low, high = 0, None
    n = first
    while high is None or high - low > max(1, low // 4):
        if fits(n):
            low = n
        else:
            high = n
        n = 2 * n if high is None else (low + high) // 2 if low else n // 2
        if n == 0:
            break
    return low


# The machine ----------------------------------------------------------------------------------------------------------


def tpu_devices(topology: str) -> Sequence[Any]:
    """The chips of a slice, such as v5e:4x4, that is not there.

    Raises:
        ValueError: where libtpu is missing or knows no such slice.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # whatever libtpu says
        reason = str(error).splitlines()[0]
        raise ValueError(f"--topology {topology} is no slice that libtpu knows ({reason}); names are such as v5e:4x4, "
                         "v5p:2x2x4, v4:2x2x4 and v6e:8x8.") from error  # fmt: skip


def chip_of(topology: str) -> Chip:
    """The chip that a topology's name begins with."""
    kind = topology.partition(":")[0]
    if kind not in TPUS:
        raise ValueError(f"--topology {topology!r}: it begins with one of {', '.join(TPUS)}, such as v5e:4x4.")
    return TPUS[kind]


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Waits until no other plan is being made on this machine: each takes all of its processors and gigabytes."""
    with (Path(tempfile.gettempdir()) / f"jaxdiff-plan-{os.getuid()}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another process plans with libtpu, which one does at a time: waiting for it.", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# What is shown --------------------------------------------------------------------------------------------------------


def report(plan: Plan, name: str) -> str:
    """The plan in words."""

    def gib(size: float | int) -> str:
        unit, scale = ("GiB", 30) if size >= 2**26 or not size else ("MiB", 20) if size >= 2**16 else ("KiB", 10)
        return f"{size / 2**scale:8.2f} {unit}"

    mesh = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items())
    lines = [f"{name}: {plan.devices} devices ({mesh}), {plan.batch} images a chip", "", "Memory of each chip"]
    for part in (*PARTS, "temporaries"):
        lines.append(f"  {part:<22}{gib(getattr(plan, part))}")
    limit = f" of {plan.memory / 2**30:.2f} GiB" if plan.memory else ""
    if plan.memory and plan.fits:
        limit += ": it fits"
    lines.append(f"  {'together':<22}{gib(plan.total)}{limit}")
    if plan.memory and not plan.fits:
        over = f"by at least {gib(plan.total - plan.memory).strip()}" if plan.total > plan.memory else "by temporaries"
        lines.append(f"  TOO MUCH, {over}: --fit finds the largest batch that fits; --remat blocks needs less.")
    lines += ["", "Work of each chip, a call"]
    lines.append(f"  {'operations':<22}{plan.flops / 1e12:8.3g} TFLOP")
    if plan.bytes_moved:
        accessed = gib(plan.bytes_accessed).strip()
        lines.append(f"  {'memory traffic':<22}{gib(plan.bytes_moved)} (by XLA's own count {accessed})")
        for kind, size in sorted(plan.collectives.items()):
            lines.append(f"  {kind:<22}{gib(size)}")
    if plan.seconds:
        lines += ["", "At the least"]
        lines += [f"  {bound:<22}{1e3 * seconds:8.1f} ms" for bound, seconds in plan.bounds.items()]
        assert plan.images_per_second
        lines.append(f"  {'a call':<22}{1e3 * plan.seconds:8.1f} ms: at most {plan.images_per_second:,.0f} images/s")
    if plan.run_seconds and plan.peak:
        lines += ["", f"Run: {plan.run_seconds:.2f} s a call; this process took {plan.peak / 1e9:.2f} GB at most."]
    return "\n".join([*lines, "", f"Compiled in {plan.compile_seconds:.0f} s."])


def main(argv: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="plan", usage=USAGE, description=__doc__, allow_abbrev=False)
    parser.add_argument("config", help="a config file of train.py")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", help="a TPU slice, such as v5e:16x16 (needs the tpu extra)")
    where.add_argument("--devices", type=int, help="so many devices of the CPU")
    parser.add_argument("--batch", type=int, help="images a chip, in place of the config's batch")
    parser.add_argument("--forward", action="store_true", help="plan one call of the UNet in place of a step")
    parser.add_argument(
        "--sample", type=int, default=0, metavar="STEPS", help="plan prompts to images in so many steps"
    )
    parser.add_argument("--fit", action="store_true", help="find the largest batch that fits")
    parser.add_argument("--run", type=int, default=0, help="steps to take on the CPU's devices, to be timed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--dump", type=Path, help="write the compiled program's text to this file")
    options, overrides = parser.parse_known_args(argv)
    return exit_code(lambda: _run(options, overrides))


def _run(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.batch is not None and options.batch < 1:
        raise ValueError(f"--batch {options.batch}: it must be above 0.")
    if options.sample < 0 or (options.sample and options.forward):
        raise ValueError(f"--sample {options.sample}: it must be above 0, and without --forward.")
    config = read_config(options.config, overrides)
    if not config.model or Path(config.model).exists():
        config = resolve(config)
    else:
        print(f"{config.model} is not here: sizes are those of {options.config}.", file=sys.stderr)
    if options.topology:
        if options.run:
            raise ValueError("--run needs --devices: a slice that is only planned takes no steps.")
        chip = chip_of(options.topology)
        if find_spec("libtpu") is None:
            raise ValueError("--topology needs the TPU compiler: pip install 'jaxdiff[tpu]'.")
        # Nothing here is a TPU: libtpu must not look for one, nor mind who else has loaded it (any JAX process has).
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
        jax.config.update("jax_platforms", "cpu")
        with one_at_a_time():
            _plan_on(options, config, tpu_devices(options.topology), chip)
    else:
        if options.fit:
            raise ValueError("--fit needs --topology: the CPU's memory is no limit to plan with.")
        if options.run < 0:
            raise ValueError(f"--run {options.run}: it must not be negative.")
        if options.devices < 1:
            raise ValueError(f"--devices {options.devices}: it must be above 0.")
        if not jax._src.xla_bridge.backends_are_initialized():  # pyright: ignore
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", options.devices)
        if len(jax.devices()) < options.devices:
            raise ValueError(f"--devices {options.devices}: JAX has started with {len(jax.devices())}.")
        _plan_on(options, config, jax.devices()[: options.devices], None)


def _plan_on(options: argparse.Namespace, config: TrainConfig, devices: Sequence[Any], chip: Chip | None) -> None:
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=devices)
    found: dict[int, Plan] = {}

    def planned(batch: int) -> Plan:
        sized = replace(config, data=replace(config.data, batch_size=batch * mesh.size))
        if batch not in found:
            found[batch] = plan(sized, mesh, chip, options.dump, options.run, options.forward, options.sample)
            if options.fit:
                fits = "fits" if found[batch].fits else "does not fit"
                print(f"{batch} images a chip: {found[batch].total / 2**30:.2f} GiB, {fits}", file=sys.stderr)
        return found[batch]

    parts = parts_of_batch(config, mesh, options.forward or options.sample > 0)
    unit = parts // math.gcd(parts, mesh.size)  # images a chip that a batch can be a multiple of
    batch = config.data.batch_size // mesh.size if options.batch is None else options.batch
    if options.fit:
        batch = unit * (largest(lambda n: planned(n * unit).fits, max(1, batch // unit)) or 1)
    if options.batch is not None or options.fit:
        result = planned(batch)
    else:
        result = plan(config, mesh, chip, options.dump, options.run, options.forward, options.sample)
    name = options.topology or "CPU"
    print(json.dumps({"device": name} | asdict(result), indent=2) if options.json else report(result, name))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
