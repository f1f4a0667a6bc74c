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
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxdiff import distributed
from jaxdiff.cli import exit_code
from jaxdiff.config import DataConfig, DiffusionTask, TrainConfig, VAEConfig, VAETask, to_dict
from jaxdiff.data.latents import cache_latents, identity
from jaxdiff.data.loader import Batches, batches, open_source
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.distributed import leads, wait_for_all, whole
from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.io.folder import Folder, write_folder, write_network
from jaxdiff.io.images import contact_sheet, write_png
from jaxdiff.io.programs import give_back_memory
from jaxdiff.io.storage import is_remote, place_of, staged
from jaxdiff.pipeline import Pipeline, enable_compilation_cache
from jaxdiff.sharding import make_mesh, tree_shardings
from jaxdiff.training.feed import Feed, local_rows, place
from jaxdiff.training.log import Log, Profile
from jaxdiff.training.optim import learning_rate, optimiser
from jaxdiff.training.options import FREE, claim_workdir, flat, read_config, resolve, write_config
from jaxdiff.training.parts import digest, encoder, read_part, text_encoder
from jaxdiff.training.state import Task, create_state, freeze, make_step, merge
from jaxdiff.training.stop import Stop
from jaxdiff.training.tasks.diffusion import diffusion_task
from jaxdiff.training.tasks.vae import ENCODER, latent_scale, psnr, reconstruct, vae_task
from jaxdiff.types import Params

EVAL_IMAGES = 512  # at most, for the held-out figures
EVAL_STEPS = 25  # of the sampler, for the sample grid
SCALE_BATCHES = 8  # over which the latents' standard deviation is measured
USAGE = "usage: python train.py configs/NAME.py [--field value ...]   (--help after the file lists the fields)"


@dataclass(frozen=True)
class Run:
    """What differs between tasks: the batches from a step on, and what an evaluation writes and measures."""

    task: Task
    batches: Callable[[int, Sequence[int]], Batches]
    """(step, rows of the global batch)"""
    evaluate: Callable[[int, Params], dict[str, float]]
    """(step, the averaged params and the frozen ones, whole and on the host), called in process 0 alone."""


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
    schedule = learning_rate(config.optim, config.steps)
    tx = optimiser(config.optim, schedule)
    init_key, key = jax.random.split(jax.random.key(config.seed))
    state = create_state(run.task, tx, init_key, mesh, config.ema)
    step_fn = make_step(run.task, tx, state, config.ema, config.optim.accumulate, jnp.dtype(config.dtype))
    count = sum(p.size for p in jax.tree.leaves(state.params))

    def evaluate(log: Log) -> dict[str, float]:
        began = time.perf_counter()
        step, average = int(state.step), whole(state.average)
        figures = run.evaluate(step, merge(run.task.frozen, average)) if leads() else {}
        if figures:
            log.write({"step": step} | figures)
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
        if start > config.steps:
            raise ValueError(f"{workdir} is at step {start} already, past --steps {config.steps}: give more steps, or "
                             "choose another --workdir.")  # fmt: skip
        with (
            closing(run.batches(start, local_rows(mesh, config.data.batch_size))) as source,
            Log(workdir, start, config.steps, config.data.batch_size, config.tensorboard, state.skipped) as log,
            Profile(workdir / "profile", start, config.profile) as profile,
            Feed(source, mesh) as feed,
        ):
            write_config(config, workdir)  # now that all it names is known to be there
            log.say(f"{workdir}: {count / 1e6:.2f} M parameters, from step {start} to {config.steps}.")
            for step in range(start + 1, config.steps + 1):
                profile.before(step)
                began = time.perf_counter()
                batch = next(feed)
                waited = time.perf_counter() - began
                state, metrics = step_fn(state, frozen, batch, key)
                if step == start + 1:
                    give_back_memory()
                log.step(metrics, waited)
                profile.after(step, metrics, log.say)

                stopped = stop.at(step)
                last = step == config.steps or stopped is not None
                if last or step % config.log_every == 0:
                    log.flush(step, lr=float(np.asarray(schedule(step - 1))), bad_records=source.n_bad)
                if log.in_a_row >= config.max_skipped:
                    raise ValueError(in_vain(step, log.in_a_row, checkpoints.steps()))
                if last or step % config.checkpoint_every == 0:
                    paused = time.perf_counter()
                    checkpoints.save(step, state)
                    log.pause(time.perf_counter() - paused)
                if stopped:
                    log.say(f"Stopped by {stopped.name} after step {step}; the same command goes on from there.")
                    return 128 + stopped
                if step % config.eval_every == 0 and step < config.steps:
                    evaluate(log)
            told = "".join(f", {name} {value:.4g}" for name, value in evaluate(log).items())
            skipped = f"; {log.skipped} updates were skipped" if log.skipped else ""
            log.say(f"Done{told}{skipped}. {workdir / 'export'} holds the averaged weights.")
            for name, reason in source.bad.items():
                log.say(f"Skipped: {name} ({reason})")
    return 0


def in_vain(step: int, in_a_row: int, saved: list[int]) -> str:
    """Why a run stops whose updates are all skipped."""
    kept = f"the last good checkpoint, of step {saved[-1]}, stays" if saved else "no checkpoint had been written"
    return (f"The last {in_a_row} updates, up to step {step}, were skipped, as their loss or gradient was not finite: "
            f"training stops; {kept}. A lower --optim.lr or --optim.clip_norm may help.")  # fmt: skip


def check_size(data: DataConfig, vae: VAEConfig) -> None:
    """Pictures must be whole numbers of latent pixels wide and high."""
    for side in (side for shape in data.shapes for side in shape):
        if side % vae.factor:
            name = "side_multiple" if data.aspects else "size"
            raise ValueError(f"DataConfig.{name} {getattr(data, name)} is not a multiple of the VAE's factor "
                             f"{vae.factor}: pictures have {side} pixels along a side.")  # fmt: skip


def vae_run(config: TrainConfig, workdir: epath.Path) -> Run:
    """Trains the autoencoder; evaluation measures the reconstruction of held-out pictures."""
    assert isinstance(config.task, VAETask)
    task, data, dtype = config.task, config.data, jnp.dtype(config.dtype)
    if data.source == "latents":
        raise ValueError("An autoencoder is trained on pictures, and DataConfig.source is 'latents'.")
    check_size(data, task.vae)
    source = open_source(data)
    heldout = replace(data, aspects=(), crop=1.0, flip=False, split=data.heldout or data.split, workers=0)
    try:
        heldout_source = open_source(heldout)
    except ValueError as error:
        raise ValueError(
            f"{error} Name a split to measure on by --data.heldout; '' takes that of --data.split."
        ) from error
    n = math.ceil(min(len(heldout_source), EVAL_IMAGES) / heldout.batch_size)
    run = reconstruct(task, dtype)
    started, start = read_part(task.init, "vae", task.vae, "VAETask.init") if task.init else (None, None)
    trained = freeze(vae_task(task, start, dtype, config.remat), config.optim.factors)

    def evaluate(step: int, params: Params) -> dict[str, float]:
        images = [b["image"] for b in itertools.islice(batches(heldout, heldout_source, seed=0), n)]
        copies = [np.asarray(run(params, image)[0]) for image in images]
        figure = np.concatenate([psnr(a, b) for a, b in zip(images, copies, strict=True)])[: len(heldout_source)].mean()
        pairs = [to_uint8(picture) for pair in zip(images[0][:16], copies[0][:16], strict=True) for picture in pair]
        with staged(workdir / "samples") as folder:
            write_png(folder, f"{step:07}", contact_sheet(pairs, columns=8, cell=64))
        if started and not task.train_encoder:
            scale = started.scaling_factor  # what was trained on these latents knows them by it
        else:
            training = itertools.islice(batches(data, source, seed=config.seed), SCALE_BATCHES)
            scale = latent_scale([np.asarray(run(params, b["image"])[1]) for b in training])
        with staged(workdir / "export") as folder:
            write_network(folder, "vae", replace(task.vae, scaling_factor=scale), params)
        return {"heldout_psnr": float(figure), "scaling_factor": scale}

    return Run(
        trained,
        lambda step, rows: batches(data, source, seed=config.seed, start_step=step, rows=rows),
        evaluate,
    )


def diffusion_run(config: TrainConfig, workdir: epath.Path) -> Run:
    """Trains the UNet and the text encoder on a frozen VAE's latents; evaluation draws pictures with fixed seeds."""
    assert isinstance(config.task, DiffusionTask)
    task, dtype = config.task, jnp.dtype(config.dtype)
    vae, vae_params = read_part(task.vae, "vae", None, "DiffusionTask.vae")
    if vae.latent_channels != task.unet.in_channels:
        raise ValueError(f"The VAE in {task.vae} has {vae.latent_channels} latent channels and UNetConfig.in_channels "
                         f"is {task.unet.in_channels}; they must be equal.")  # fmt: skip
    check_size(config.data, vae)
    tokenizer = Tokenizer.load(task.tokenizer, task.text_encoder.max_position_embeddings)
    if len(tokenizer) > task.text_encoder.vocab_size:
        raise ValueError(f"The tokenizer in {task.tokenizer} has {len(tokenizer)} tokens, more than "
                         f"CLIPTextConfig.vocab_size {task.text_encoder.vocab_size}.")  # fmt: skip

    start, frozen = {}, {"empty_tokens": tokenizer([""])[0]}
    for name in ("unet", "text_encoder"):
        if task.init and name not in task.scratch:
            start[name] = read_part(task.init, name, getattr(task, name), "DiffusionTask.init")[1]
    if not task.train_text_encoder:
        frozen["text_encoder"] = start.pop("text_encoder")

    # Latents are encoded once, or at every step by the frozen VAE; so are captions.
    kept: Params = {"vae": vae_params}  # what evaluations need, and training may not
    data, text_fn = config.data, None
    captions = source = open_source(data)
    if task.latent_variants:
        # Named after what made them, so that others are never taken for these.
        made = {name: value for name, value in to_dict(data).items() if not FREE.fullmatch(f"data.{name}")}
        made |= {"variants": task.latent_variants, "seed": config.seed, "records": identity(captions)}
        makers = {name: vae_params[name] for name in ENCODER}
        if task.text_variants:
            kept["text_encoder"] = makers["text_encoder"] = frozen.pop("text_encoder")
            made |= {"text_variants": task.text_variants, "text_encoder": to_dict(task.text_encoder)}
            text_fn = text_encoder(task.text_encoder, kept["text_encoder"], tokenizer, dtype)
            frozen["empty_context"] = text_fn([""])[0]
        made_by = digest(makers, made)
        path = (place_of(config.cache) if config.cache else workdir) / f"latents-{made_by}"
        if is_remote(path):
            raise ValueError(f"Latents cannot be read from a bucket ({path}): name a folder by --cache.")
        cache_latents(
            encoder(vae, vae_params, dtype),
            data,
            captions,
            Path(path),
            variants=task.latent_variants,
            seed=config.seed,
            text_fn=text_fn,
            text_variants=task.text_variants,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        wait_for_all("latents")
        data = replace(data, source="latents", root=str(path))
        source = open_source(data)
    elif data.source != "latents":
        frozen["vae"] = vae_params

    trained = freeze(diffusion_task(task, vae, frozen, start, dtype, config.remat), config.optim.factors)
    picked = np.linspace(0, len(captions) - 1, 16).astype(int)
    prompts = list(task.prompts) or [captions.record(int(i)).caption.full() for i in picked]
    size = config.data.size

    def evaluate(step: int, params: Params) -> dict[str, float]:
        networks = {name: (kept | params)[name] for name in ("unet", "vae", "text_encoder")}
        model = Folder(task.unet, vae, task.text_encoder, task.scheduler, networks, tokenizer)
        with staged(workdir / "export") as folder:
            write_folder(folder, model)
        pictures = Pipeline(model, config.dtype)(prompts, seed=0, steps=EVAL_STEPS, size=(size, size))
        with staged(workdir / "samples") as folder:
            write_png(folder, f"{step:07}", contact_sheet(list(pictures), prompts))
        return {}

    return Run(
        trained,
        lambda step, rows: batches(data, source, tokenizer, seed=config.seed, start_step=step, rows=rows),
        evaluate,
    )


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
    return distributed.leave(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
