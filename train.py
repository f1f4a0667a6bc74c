"""Trains what a config file describes: `python train.py configs/emoji.py --optim.lr 3e-4`.

The same command again goes on where the last checkpoint stands. A run directory holds `config.json`, `checkpoints/`,
`metrics.jsonl`, `samples/` and `export/`, which is a diffusers folder with the averaged weights.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff.config import DataConfig, DiffusionTask, TrainConfig, VAEConfig, VAETask, to_name
from jaxdiff.data.loader import Batches, batches, open_source, sample_captions
from jaxdiff.data.record import Source
from jaxdiff.data.resident import Resident
from jaxdiff.data.sources import summary
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.evaluation.denoising import Heldout, as_metrics, denoising_errors, heldout
from jaxdiff.evaluation.drawn import DrawnMeasures
from jaxdiff.evaluation.features import open_features
from jaxdiff.evaluation.lpips import compiled_lpips, read_lpips
from jaxdiff.evaluation.plots import can_plot, plot_metrics
from jaxdiff.families import family_of
from jaxdiff.generation.conditioning import encoded
from jaxdiff.generation.drawing import make_drawing
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.generation.request import Request
from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.io.folder import TOKENIZERS, check_target, write_network
from jaxdiff.io.images import contact_sheet, write_png
from jaxdiff.io.storage import is_remote, staged, write_bytes
from jaxdiff.model import Model, Network
from jaxdiff.runtime import distributed
from jaxdiff.runtime.cli import exit_code
from jaxdiff.runtime.distributed import leads, wait_for_all, whole
from jaxdiff.runtime.mesh import make_mesh, place, tree_shardings
from jaxdiff.runtime.programs import enable_compilation_cache, give_back_memory
from jaxdiff.training.captions import TOKENS
from jaxdiff.training.course import Clock, lengths, longest
from jaxdiff.training.encode import encode_once, records_of
from jaxdiff.training.feed import Feed, calls, local_rows
from jaxdiff.training.log import Log, Profile
from jaxdiff.training.optim import learning_rate, optimiser
from jaxdiff.training.options import (
    DATA,
    Contents,
    check_contents,
    claim_workdir,
    flat,
    read_config,
    resolve,
    write_config,
)
from jaxdiff.training.parts import check_size, digest, read_part, read_tokenizers, read_vae
from jaxdiff.training.resident import RESIDENT, place_resident
from jaxdiff.training.state import Task, create_state, freeze, make_step, merge
from jaxdiff.training.stop import Stop, leave_threads
from jaxdiff.training.tasks.diffusion import diffusion_inputs, diffusion_task
from jaxdiff.training.tasks.vae import DISCRIMINATOR, LPIPS, latent_scale, psnr, reconstruct, vae_inputs, vae_task
from jaxdiff.types import Params

EVAL_IMAGES = 512  # at most, for the held-out figures
EVAL_STEPS = 25  # of the sampler, for the sample grid
SCALE_BATCHES = 8  # over which the latents' standard deviation is measured
UNBOUNDED = 2**31 - 1  # steps of a run that goes by the clock
SHOWN = ("error_full_0.6", "error_full_30")  # of the errors of the guess, when a run is done
USAGE = "usage: python train.py configs/NAME.py [--field value ...]   (--help after the file lists the fields)"


@dataclass(frozen=True)
class Run:
    """What differs between tasks: the batches from a step on, and what an evaluation writes and measures."""

    task: Task
    batches: Callable[[int, Sequence[int]], Batches]
    """(step, rows of the global batch)"""
    evaluate: Callable[[int, Params], dict[str, float]]
    """(step, the averaged params and the frozen ones, whole and on the host), called in process 0 alone."""
    data: str
    """What is read, and what of it is left out."""
    contents: Contents
    """What the run is made of, wherever that lies."""
    resident: dict[str, np.ndarray] = field(default_factory=dict)
    """What batches are rows of, where they are."""


def train(config: TrainConfig, workdir: epath.Path) -> int:
    """Runs to `config.steps`, or until a signal; returns the exit code."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    spread = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.data.batch_size % spread:
        raise ValueError(f"DataConfig.batch_size {config.data.batch_size} is not a multiple of the {spread} devices "
                         "that the mesh's data and fsdp axes spread it over.")  # fmt: skip
    if config.data.batch_size % (spread * config.optim.accumulate):
        raise ValueError(f"DataConfig.batch_size {config.data.batch_size} is not a multiple of OptimConfig.accumulate "
                         f"{config.optim.accumulate} times the {spread} devices that it is spread over.")  # fmt: skip
    run = (vae_run if isinstance(config.task, VAETask) else diffusion_run)(config, workdir)
    frozen = place(run.task.frozen, tree_shardings(mesh, run.task.frozen))
    schedule = learning_rate(config.optim, config.steps if not config.seconds else UNBOUNDED)
    tx = optimiser(config.optim, schedule, run.task.apart)
    everywhere = NamedSharding(mesh, PartitionSpec())  # else every step would copy its key to all devices
    init_key, key = jax.jit(lambda key: tuple(jax.random.split(key)), out_shardings=everywhere)(
        jax.random.key(config.seed)
    )
    state = create_state(run.task, tx, init_key, mesh, config.ema, clocked=config.seconds > 0)
    step_fn = make_step(
        run.task,
        tx,
        state,
        config.ema,
        config.optim.accumulate,
        jnp.dtype(config.dtype),
        config.seconds,
        several=longest(config) > 1,
    )
    resident = {RESIDENT: place_resident(run.resident, mesh)} if run.resident else {}
    count = sum(p.size for p in jax.tree.leaves(state.params))

    def evaluate(log: Log, stop: Stop) -> dict[str, float] | None:
        """None where a signal came first."""
        began = time.perf_counter()
        step, average = int(state.step), whole(state.average)
        figures: dict[str, float] | None = {}
        try:
            if leads():
                figures = stop.unless_stopped(lambda: run.evaluate(step, merge(run.task.frozen, average)))
        except Exception:
            if jax.process_count() == 1:  # else the others, which did not fail, would not save with it
                checkpoints.save(step, state)
            raise
        if figures:
            log.write({"step": step} | figures)
        if leads() and (problem := draw_metrics(workdir, log)):
            log.say(problem)
        wait_for_all(f"evaluation at step {step}")
        log.pause(time.perf_counter() - began)
        return figures

    with (
        Checkpoints(workdir / "checkpoints", config.keep_checkpoints, config.keep_every) as checkpoints,
        Stop() as stop,
    ):
        checkpoints.save_frozen(frozen)
        state = checkpoints.restore(state) or state
        start = int(state.step)
        if start > config.steps and not config.seconds:
            raise ValueError(f"{workdir} is at step {start} already, past --steps {config.steps}: give more steps, or "
                             "choose another --workdir.")  # fmt: skip

        def flush(log: Log, step: int, source: Batches, clock: Clock | None, progress: float | None) -> None:
            log.settle()  # an update that is skipped does not count for the rate
            rate = float(np.asarray(schedule(max(0, step - 1 - log.skipped), progress)))
            told = {} if clock is None else {"seconds": clock.seconds}
            log.flush(step, lr=rate, bad_records=source.n_bad, **told)

        def save(log: Log, step: int) -> None:
            paused = time.perf_counter()
            checkpoints.save(step, state)
            log.pause(time.perf_counter() - paused)

        end = None if config.seconds else config.steps
        with (
            closing(run.batches(start, local_rows(mesh, config.data.batch_size))) as source,
            Log(workdir, start, end, config.data.batch_size, config.tensorboard, state.skipped) as log,
            Profile(workdir / "profile", start, config.profile) as profile,
            Feed(calls(source, lengths(config, start), longest(config)), mesh) as feed,
        ):
            write_config(config, workdir, run.contents)  # now that all it names is known to be there
            log.say(f"{run.data}.")
            goal = f"to {config.steps}" if end else f"for {config.seconds:g} seconds in all"
            log.say(f"{workdir}: {count / 1e6:.2f} M parameters, from step {start} {goal}.")
            cut, step, n_calls = 0, start, 0
            clock = Clock(config.seconds, state.seconds, everywhere, log) if config.seconds else None
            last = step == end or (clock is not None and clock.is_over)
            take = step_fn
            while not last:
                profile.before(step + 1)
                progress = None if clock is None else clock.progress
                # What every step does must copy nothing unasked between host and devices, or between devices: it would
                # wait. (Reading a CPU's array is no copy, so that only GPUs and TPUs tell of such a read.)
                with jax.transfer_guard("disallow"):
                    began = time.perf_counter()
                    n, batch = next(feed)
                    waited = time.perf_counter() - began
                    if not n_calls and not config.data.aspects:  # of which each has a program of its own
                        began = time.perf_counter()
                        take = step_fn.lower(state, frozen, batch | resident, key).compile()
                        log.pause(time.perf_counter() - began)  # which is no training
                    state, metrics = take(state, frozen, batch | resident, key)
                    log.step(metrics, waited, n)
                step, n_calls = step + n, n_calls + 1
                if n_calls == 1:
                    give_back_memory()
                profile.after(step, metrics, log.say)

                stopped = stop.at(n_calls)
                if clock is not None:
                    log.settle()  # the call is over
                    clock.read()
                    state = replace(state, seconds=clock.array())
                last = step == end or stopped is not None or (clock is not None and clock.is_over)
                if last or step % config.log_every == 0:
                    flush(log, step, source, clock, progress)
                    if source.n_cut and not cut:
                        log.say(f"Captions longer than the text encoder's are cut at their ends: {source.n_cut} so "
                                f"far, the first {source.first_cut!r}.")  # fmt: skip
                    cut = source.n_cut
                if log.in_a_row >= config.max_skipped:
                    raise ValueError(in_vain(step, log.in_a_row, checkpoints.steps()))
                evaluates = not last and step % config.eval_every == 0
                # One process can leave an evaluation; several cannot, so that what they have is saved before it.
                if last or step % config.checkpoint_every == 0 or (evaluates and jax.process_count() > 1):
                    save(log, step)
                if evaluates and evaluate(log, stop) is None:
                    stopped = stop.received
                    if step % config.log_every:
                        flush(log, step, source, clock, progress)
                    save(log, step)
                if stopped:
                    log.say(f"Stopped by {stopped.name} after step {step}; the same command goes on from there.")
                    return 128 + stopped
            figures = evaluate(log, stop)
            if figures is None and (stopped := stop.received):
                log.say(f"Stopped by {stopped.name} after the last step; the same command evaluates it.")
                return 128 + stopped
            shown = (item for item in (figures or {}).items() if item[0] in SHOWN or not item[0].startswith("error_"))
            told = "".join(f", {name} {value:.4g}" for name, value in shown)
            skipped = f"; {log.skipped} updates were skipped" if log.skipped else ""
            log.say(f"Done{told}{skipped}. {workdir / 'export'} holds the averaged weights.")
            if cut:
                log.say(f"Captions that were cut, counted each time: {cut}")
            for name, reason in source.bad.items():
                log.say(f"Skipped: {name} ({reason})")
    return 0


def draw_metrics(workdir: epath.Path, log: Log) -> str:
    """Draws `metrics.png`, where matplotlib is there. A picture ends no run: what it failed by is returned."""
    if not can_plot():
        return ""
    try:
        write_bytes(workdir / "metrics.png", plot_metrics(log.lines()))
    except Exception as error:  # matplotlib raises many kinds
        return f"metrics.png is not drawn: {error}"
    return ""


def in_vain(step: int, in_a_row: int, saved: list[int]) -> str:
    """Why a run stops whose updates are all skipped."""
    kept = f"the last good checkpoint, of step {saved[-1]}, stays" if saved else "no checkpoint had been written"
    return (f"The last {in_a_row} updates, up to step {step}, were skipped, as their loss or gradient was not finite: "
            f"training stops; {kept}. A lower --optim.lr or --optim.clip_norm may help.")  # fmt: skip


def vae_run(config: TrainConfig, workdir: epath.Path) -> Run:
    """Trains the autoencoder; evaluation measures the reconstruction of held-out images."""
    assert isinstance(config.task, VAETask)
    task, data, dtype = config.task, config.data, jnp.dtype(config.dtype)
    if data.source == "latents":
        raise ValueError("An autoencoder is trained on images, and DataConfig.source is 'latents'.")
    check_size(data, task.vae)
    source = open_source(data, captions=False)
    # A few bad images among the held-out ones, which may be few, are no reason to stop: others take their places.
    measured = {"crop": 1.0, "flip": False, "workers": 0, "max_bad_share": 0.99}
    heldout = replace(data.of_one_shape(), split=data.heldout or data.split, **measured)
    heldout_source = open_heldout(heldout, captions=False)
    n = math.ceil(min(len(heldout_source), EVAL_IMAGES) / heldout.batch_size)
    run, distance = reconstruct(task, dtype), compiled_lpips(task.lpips.backbone)
    started, weights = read_part(task.init, "vae", task.vae, "VAETask.init") if task.init else (None, {})
    inputs = vae_inputs(task, data)
    known = weights | ({LPIPS: read_lpips(Path(task.lpips.folder), task.lpips.backbone)} if task.lpips.weight else {})
    start, frozen, _ = inputs.split(known)
    trained = freeze(vae_task(task, frozen, start, dtype, config.remat), config.optim.factors)
    if not is_remote(workdir):
        check_target(str(workdir / "export"), "vae")
    contents = {DATA: records_of(source, every=False)}
    if task.init:
        contents["task.init"] = digest(weights)
    check_contents(contents, workdir)
    read, rows = resident_rows(source, data)

    def evaluate(step: int, params: Params) -> dict[str, float]:
        images = [b["image"] for b in itertools.islice(batches(heldout, heldout_source, seed=0), n)]
        copies = [np.asarray(run(params, image)[0]) for image in images]
        figure = np.concatenate([psnr(a, b) for a, b in zip(images, copies, strict=True)])[: len(heldout_source)].mean()
        told = {"heldout_psnr": float(figure)}
        if task.lpips.weight:
            far = [np.asarray(distance(params[LPIPS], a, b.clip(-1, 1))) for a, b in zip(images, copies, strict=True)]
            told["heldout_lpips"] = float(np.concatenate(far)[: len(heldout_source)].mean())
        pairs = [to_uint8(image) for pair in zip(images[0][:16], copies[0][:16], strict=True) for image in pair]
        with staged(workdir / "samples") as folder:
            write_png(folder, f"{step:07}", contact_sheet(pairs, columns=8, cell=64))
        if started and not task.train_encoder:
            scale = started.scaling_factor  # what was trained on these latents knows them by it
        else:
            training = itertools.islice(batches(data, source, seed=config.seed), SCALE_BATCHES)
            scale = latent_scale([np.asarray(run(params, b["image"])[1]) for b in training])
        with staged(workdir / "export") as folder:
            network = {name: tree for name, tree in params.items() if name not in (LPIPS, DISCRIMINATOR)}
            write_network(folder, "vae", replace(task.vae, scaling_factor=scale), network)
        return told | {"scaling_factor": scale}

    return Run(
        trained,
        lambda step, rows: batches(data, read, seed=config.seed, start_step=step, rows=rows),
        evaluate,
        summary(source),
        contents,
        rows,
    )


def diffusion_run(config: TrainConfig, workdir: epath.Path) -> Run:
    """Trains the UNet and text encoders on a frozen VAE's latents; evaluation draws images with fixed seeds."""
    assert isinstance(config.task, DiffusionTask)
    task, dtype = config.task, jnp.dtype(config.dtype)
    vae, vae_params = read_vae(task, config.data)
    tokenizers, networks = read_tokenizers(task), ("unet", *task.text_encoders)
    weights: Params = {"vae": vae_params}
    for name, tokenizer in zip(task.text_encoders, tokenizers, strict=True):
        weights[f"empty_{TOKENS[name]}"] = tokenizer([""])[0]
    for name in networks:
        if task.init and name not in task.scratch:
            weights[name] = read_part(task.init, name, getattr(task, name), "DiffusionTask.init")[1]
    data = config.data
    captions = source = open_source(data)
    contents = {"task.vae": digest(vae_params, to_name(vae))}
    for name, tokenizer in zip(task.text_encoders, tokenizers, strict=True):
        contents[f"task.{TOKENIZERS[name]}"] = digest({}, tokenizer.identity)
    if task.init:
        contents["task.init"] = digest({name: weights[name] for name in networks if name in weights})
    contents[DATA] = records_of(captions, every=task.latent_variants > 0)
    check_contents(contents, workdir)  # before anything is encoded
    requests = sample_requests(config, vae, tokenizers, captions)
    measured = measured_on(config, captions)
    measures = drawn_measures(config, measured)
    if not is_remote(workdir):
        check_target(str(workdir / "export"))
    if task.latent_variants:
        data, empty = encode_once(config, vae, weights, tokenizers, captions, contents[DATA], workdir)
        weights, source = weights | empty, open_source(data)
    source, rows = resident_rows(source, data, numbers=task.reads_sizes)
    start, frozen, kept = diffusion_inputs(task, config.data, vae).split(weights)
    trained = freeze(diffusion_task(task, vae, frozen, start, dtype, config.remat), config.optim.factors)

    def evaluate(step: int, params: Params) -> dict[str, float]:
        model = model_of(task, vae, tokenizers, kept | params)
        with staged(workdir / "export") as folder:
            model.save(folder)
        pipe = Pipeline(model, config.dtype)
        images = pipe.draw(requests)
        with staged(workdir / "samples") as folder:
            write_png(folder, f"{step:07}", contact_sheet(list(images), [request.prompt for request in requests]))
        figures = as_metrics(denoising_errors(pipe, measured, batch=min(32, data.batch_size))) if measured else {}
        return figures | measures(pipe, requests[0].steps or EVAL_STEPS) if measures else figures

    def read(step: int, rows: Sequence[int]) -> Batches:
        told = {"seed": config.seed, "start_step": step, "rows": rows, "numbers": task.reads_sizes}
        return batches(data, source, *tokenizers, **told)

    return Run(
        trained,
        read,
        evaluate,
        summary(captions),
        contents,
        rows,
    )


def measured_on(config: TrainConfig, source: Source) -> Heldout | None:
    """The images on which evaluations measure a diffusion run: held-out ones, or where there are none the data's."""
    task, data = config.task, config.data
    assert isinstance(task, DiffusionTask)
    inpaints = task.unet.in_channels != task.unet.out_channels
    if not task.heldout or inpaints or data.source == "latents":  # where there are no images
        return None
    split = data.split
    if data.heldout:
        try:
            source, split = open_heldout(data.of_one_shape()), data.heldout
        except ValueError:
            if data.heldout != DataConfig.heldout:  # which few data have
                raise
    found = heldout(source, data, task.heldout)
    if leads():
        print(f"Evaluations measure the error of the guess on {len(found.images)} images ({data.source}, {split}).")
    return found


def drawn_measures(config: TrainConfig, measured: Heldout | None) -> DrawnMeasures | None:
    """What evaluations measure of images that are drawn for held-out captions; None where nothing.

    Raises:
        ValueError: where there are no such images, or the network that looks at them is missing.
    """
    if not config.eval_measures or not leads():
        return None
    if measured is None:
        raise ValueError("TrainConfig.eval_measures need held-out images with captions, and these data or this model "
                         "have none: leave them out.")  # fmt: skip
    folder = Path(config.eval_features) if config.eval_features else Path(config.data.root) / "features"
    return DrawnMeasures(config.eval_measures, measured, open_features(folder))


def open_heldout(data: DataConfig, captions: bool = True) -> Source:
    """The split that evaluations measure on.

    Raises:
        ValueError: where there is none.
    """
    try:
        return open_source(replace(data, split=data.heldout or data.split), captions=captions)
    except ValueError as error:
        raise ValueError(
            f"{error} Name a split to measure on by --data.heldout; '' takes that of --data.split."
        ) from error


def resident_rows(source: Source, data: DataConfig, numbers: bool = False) -> tuple[Source, dict[str, np.ndarray]]:
    """What batches are drawn from, and the arrays that they are rows of where `data.resident`; else none.

    With `numbers` there are those that tell images' sizes, too.
    """
    if not data.resident:
        return source, {}
    resident = Resident(source, data, numbers)
    return resident, resident.take_arrays()


def model_of(task: DiffusionTask, vae: VAEConfig, tokenizers: Sequence[Tokenizer], params: Params) -> Model:
    """The model that a run exports, with params by the names of the networks' folders."""
    configs = {"unet": task.unet, "vae": vae, **task.text_encoders}
    family = family_of(set(configs))
    assert family is not None
    return Model(
        networks={role: Network(configs[name], params[name]) for role, name in family.FOLDERS.items()},
        scheduler=task.scheduler,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1] if tokenizers[1:] else None,
        family=family,
        defaults={} if task.guidance is None else {"guidance": task.guidance},
        zero_empty=task.zeroes_empty,
    )


def sample_requests(
    config: TrainConfig, vae: VAEConfig, tokenizers: Sequence[Tokenizer], captions: Source
) -> list[Request]:
    """What every evaluation draws: the task's prompts, or captions, which are taken as they are written.

    Raises:
        ValueError: where the model could not draw one of them.
    """
    task = config.task
    assert isinstance(task, DiffusionTask)
    height, width = config.data.of_one_shape().shapes[0]
    # So far apart, even the first step with its offset is one of the schedule's.
    steps = min(EVAL_STEPS, max(1, task.scheduler.num_train_timesteps // (task.scheduler.steps_offset + 1)))
    fields = {"steps": steps, "size": (width, height), "literal": not task.prompts}
    prompts = list(task.prompts) or sample_captions(captions, 16)
    nothing: Params = {name: {} for name in ("unet", "vae", *task.text_encoders)}
    pipe = Pipeline(model_of(task, vae, tokenizers, nothing), config.dtype)
    requests = pipe.requests(prompts, seed=0, **fields)
    try:
        drawing = make_drawing(requests, pipe.info)
        encoded(requests, tokenizers, drawing.steps)
    except ValueError as error:
        raise ValueError(f"The samples of an evaluation could not be drawn: {error}") from error
    return requests


def to_uint8(image: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0..255."""
    return np.round((image + 1) * 127.5).clip(0, 255).astype(np.uint8)


def main(argv: list[str]) -> int:
    """The command line; errors are a sentence and exit code 2."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    enable_compilation_cache()  # so that going on with a run starts fast

    def run() -> int:
        config = read_config(argv[0], argv[1:])
        distributed.initialize(config.distributed)
        config = resolve(config, argv[1:])
        distributed.check_equal(
            {name: value for name, value in flat(config).items() if not name.startswith("distributed.")}, "config"
        )
        with claim_workdir(config) as workdir:
            return train(config, workdir)

    code = exit_code(run, "a smaller --data.batch_size, or --remat blocks")
    return distributed.leave(leave_threads(code))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
