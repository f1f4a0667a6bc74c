"""Trains what a config file describes: `python train.py configs/emoji.py --optim.lr 3e-4`.

The same command again goes on where the last checkpoint stands. A run directory holds `config.json`, `checkpoints/`,
`metrics.jsonl`, `samples/` and `export/`, which is a diffusers folder with the averaged weights.
"""

import hashlib
import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import build
from jaxdiff.build import NetworkConfig
from jaxdiff.cli import exit_code
from jaxdiff.config import DataConfig, DiffusionTask, TrainConfig, VAEConfig, VAETask, to_dict
from jaxdiff.data.latents import cache_latents
from jaxdiff.data.loader import Batches, batches, open_source
from jaxdiff.data.record import Source
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.io.checkpoint import Checkpoints
from jaxdiff.io.folder import Folder, read_network, write_folder, write_network
from jaxdiff.io.images import contact_sheet, write_png
from jaxdiff.io.weights import check_params
from jaxdiff.pipeline import Pipeline, enable_compilation_cache
from jaxdiff.sharding import make_mesh, tree_shardings
from jaxdiff.training.feed import Feed
from jaxdiff.training.log import Log
from jaxdiff.training.optim import learning_rate, optimiser
from jaxdiff.training.options import FREE, claim_workdir, read_config, write_config
from jaxdiff.training.state import Task, TrainState, create_state, freeze, make_step, merge
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
    batches: Callable[[int], Batches]
    evaluate: Callable[[TrainState], dict[str, float]]


def train(config: TrainConfig, workdir: Path) -> int:
    """Runs to `config.steps`, or until a signal; returns the exit code."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    spread = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.data.batch_size % spread:
        raise ValueError(f"DataConfig.batch_size {config.data.batch_size} is not a multiple of the {spread} devices "
                         "that the mesh's data and fsdp axes spread it over.")  # fmt: skip
    run = (vae_run if isinstance(config.task, VAETask) else diffusion_run)(config, workdir)
    frozen = jax.device_put(run.task.frozen, tree_shardings(mesh, run.task.frozen))
    schedule = learning_rate(config.optim, config.steps)
    tx = optimiser(config.optim, schedule)
    init_key, key = jax.random.split(jax.random.key(config.seed))
    state = create_state(run.task, tx, init_key, mesh, config.ema)
    step_fn = make_step(run.task, tx, state, config.ema, config.optim.accumulate)
    count = sum(p.size for p in jax.tree.leaves(state.params))

    with Checkpoints(workdir / "checkpoints", config.keep_checkpoints) as checkpoints, stop_signals() as stopped:
        state = checkpoints.restore(state) or state
        start = int(state.step)
        source = run.batches(start)
        write_config(config, workdir)  # now that all it names is known to be there
        with (
            Log(workdir, start, config.steps, config.data.batch_size, config.tensorboard) as log,
            Feed(source, mesh) as feed,
        ):
            log.say(f"{workdir}: {count / 1e6:.2f} M parameters, from step {start} to {config.steps}.")
            for step in range(start + 1, config.steps + 1):
                began = time.perf_counter()
                batch = next(feed)
                waited = time.perf_counter() - began
                state, metrics = step_fn(state, frozen, batch, key)
                log.step(metrics, waited)

                last = step == config.steps or bool(stopped)
                if last or step % config.log_every == 0:
                    line = log.flush(step, lr=float(np.asarray(schedule(step - 1))), bad_records=source.n_bad)
                    check_finite(line, step, checkpoints)
                if last or step % config.checkpoint_every == 0:
                    paused = time.perf_counter()
                    check_finite(metrics, step, checkpoints)
                    checkpoints.save(step, state)
                    log.pause(time.perf_counter() - paused)
                if stopped:
                    log.say(f"Stopped by {stopped[0].name} after step {step}; the same command goes on from there.")
                    return 128 + stopped[0]
                if step % config.eval_every == 0 and step < config.steps:
                    paused = time.perf_counter()
                    if figures := run.evaluate(state):
                        log.write({"step": step} | figures)
                    log.pause(time.perf_counter() - paused)
            if figures := run.evaluate(state):
                log.write({"step": int(state.step)} | figures)
            told = "".join(f", {name} {value:.4g}" for name, value in figures.items())
            log.say(f"Done{told}. {workdir / 'export'} holds the averaged weights.")
            for name, reason in source.bad.items():
                log.say(f"Skipped: {name} ({reason})")
    return 0


def check_finite(metrics: dict[str, Any], step: int, checkpoints: Checkpoints) -> None:
    """Stops the run before a spoilt state can be saved."""
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if not (math.isfinite(loss) and math.isfinite(norm)):
        steps = checkpoints.steps()
        kept = f"the last good checkpoint, of step {steps[-1]}, stays" if steps else "no checkpoint had been written"
        raise ValueError(f"At step {step} the loss is {loss:g} and the gradient's norm {norm:g}: training stops; "
                         f"{kept}. A lower --optim.lr or --optim.clip_norm may help.")  # fmt: skip


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """A list that SIGTERM and SIGINT join, for the loop to end at a whole step; the second one ends it at once."""
    received: list[signal.Signals] = []

    def receive(number: int, _: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def process_batches(data: DataConfig, source: Source, tokenize: Any, seed: int, start: int) -> Batches:
    """The training batches of this process from step `start` on."""
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return batches(data, source, tokenize, seed=seed, start_step=start, **processes)


def check_size(data: DataConfig, vae: VAEConfig) -> None:
    """Pictures must be whole numbers of latent pixels wide."""
    if data.size % vae.factor:
        raise ValueError(f"DataConfig.size {data.size} is not a multiple of the VAE's factor {vae.factor}.")


def vae_run(config: TrainConfig, workdir: Path) -> Run:
    """Trains the autoencoder; evaluation measures the reconstruction of held-out pictures."""
    assert isinstance(config.task, VAETask)
    task, data, dtype = config.task, config.data, jnp.dtype(config.dtype)
    if data.source == "latents":
        raise ValueError("An autoencoder is trained on pictures, and DataConfig.source is 'latents'.")
    check_size(data, task.vae)
    source = open_source(data)
    heldout = replace(data, crop=1.0, flip=False, split=data.heldout or data.split, workers=0)
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

    def evaluate(state: TrainState) -> dict[str, float]:
        params = merge(trained.frozen, jax.device_get(state.average))
        images = [b["image"] for b in itertools.islice(batches(heldout, heldout_source, seed=0), n)]
        copies = [np.asarray(run(params, image)[0]) for image in images]
        figure = np.concatenate([psnr(a, b) for a, b in zip(images, copies, strict=True)])[: len(heldout_source)].mean()
        pairs = [to_uint8(picture) for pair in zip(images[0][:16], copies[0][:16], strict=True) for picture in pair]
        write_png(workdir / "samples", f"{int(state.step):07}", contact_sheet(pairs, columns=8, cell=64))
        if started and not task.train_encoder:
            scale = started.scaling_factor  # what was trained on these latents knows them by it
        else:
            training = itertools.islice(batches(data, source, seed=config.seed), SCALE_BATCHES)
            scale = latent_scale([np.asarray(run(params, b["image"])[1]) for b in training])
        write_network(workdir / "export", "vae", replace(task.vae, scaling_factor=scale), params)
        return {"heldout_psnr": float(figure), "scaling_factor": scale}

    return Run(trained, lambda step: process_batches(data, source, None, config.seed, step), evaluate)


def diffusion_run(config: TrainConfig, workdir: Path) -> Run:
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

    # Latents are encoded once, or at every step by the frozen VAE.
    data, frozen = config.data, {"empty_tokens": tokenizer([""])[0]}
    captions = source = open_source(data)
    if task.latent_variants:
        # Named after what made them, so that others are never taken for these.
        made = {name: value for name, value in to_dict(data).items() if not FREE.fullmatch(f"data.{name}")}
        made |= {"variants": task.latent_variants, "seed": config.seed}
        made_by = digest({name: vae_params[name] for name in ENCODER}, made)
        path = workdir / f"latents-{made_by}.array_record"
        if not path.exists():
            encode = encoder(vae, vae_params, dtype)
            cache_latents(encode, data, captions, path, variants=task.latent_variants, seed=config.seed)
        data = replace(data, source="latents", root=str(path))
        source = open_source(data)
    elif data.source != "latents":
        frozen["vae"] = vae_params

    start = None
    if task.init:
        networks = {"unet": task.unet, "text_encoder": task.text_encoder}
        start = {name: read_part(task.init, name, config, "DiffusionTask.init")[1] for name, config in networks.items()}
        if not task.train_text_encoder:
            frozen["text_encoder"] = start.pop("text_encoder")

    trained = freeze(diffusion_task(task, vae, frozen, start, dtype, config.remat), config.optim.factors)
    picked = np.linspace(0, len(captions) - 1, 16).astype(int)
    prompts = list(task.prompts) or [captions.record(int(i)).caption.full() for i in picked]
    size = config.data.size

    def evaluate(state: TrainState) -> dict[str, float]:
        params = {"vae": vae_params} | merge(trained.frozen, jax.device_get(state.average))
        params = {name: params[name] for name in ("unet", "vae", "text_encoder")}
        folder = Folder(task.unet, vae, task.text_encoder, task.scheduler, params, tokenizer)
        write_folder(workdir / "export", folder)
        pictures = Pipeline(folder, config.dtype)(prompts, seed=0, steps=EVAL_STEPS, size=(size, size))
        write_png(workdir / "samples", f"{int(state.step):07}", contact_sheet(list(pictures), prompts))
        return {}

    return Run(
        trained,
        lambda step: process_batches(data, source, tokenizer, config.seed, step),
        evaluate,
    )


def encoder(config: VAEConfig, params: Params, dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Images to moments, on the default device."""
    module, params = build.vae(config, dtype), jax.device_put(params)
    encode = jax.jit(lambda params, image: module.apply({"params": params}, image, method="encode"))
    return lambda image: np.asarray(encode(params, image))


def digest(params: Params, settings: dict[str, Any]) -> str:
    """Twelve letters that tell parameters and settings apart."""
    parts = [leaf.tobytes() for leaf in jax.tree.leaves(params)] + [json.dumps(settings, sort_keys=True).encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def read_part(path: str, name: str, wanted: NetworkConfig | None, field: str) -> tuple[Any, Params]:
    """The config and float32 params, shaped as `wanted`, of a network in a diffusers folder or a run directory."""
    if not path:
        raise ValueError(f"{field} is empty: name a diffusers folder or a run directory that holds a trained {name}.")
    folder = Path(path) / "export" if (Path(path) / "config.json").exists() else Path(path)
    config, params = read_network(folder, name)
    make = {"unet": build.unet, "vae": build.vae, "text_encoder": build.text_encoder}[name]
    check_params(params, build.param_shapes(make(wanted or config), wanted or config), folder / name)
    return config, jax.tree.map(lambda p: np.asarray(p, np.float32), params)


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
        with claim_workdir(config) as workdir:
            return train(config, workdir)

    return exit_code(run, "a smaller --data.batch_size, or --remat blocks")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
