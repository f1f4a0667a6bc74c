"""What can be timed: each target makes a `Work` of a model, a batch and a mesh, from the library's own parts."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from inspect import unwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdiff import build
from jaxdiff.config import DataConfig, DiffusionTask, MeshConfig, TrainConfig
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.families import StableDiffusion
from jaxdiff.generation.network import Inputs
from jaxdiff.generation.programs import Program, decode, denoise, encode_prompts, keys_and_noise
from jaxdiff.nn.layers import Remat
from jaxdiff.runtime.compile import Compiled
from jaxdiff.runtime.mesh import batch_sharding, gather_params, place, tree_shardings
from jaxdiff.sampling.loop import begin
from jaxdiff.sampling.sigmas import MODEL
from jaxdiff.tools.bench import flops
from jaxdiff.tools.bench.models import ModelSizes, random_inputs, ready, weights
from jaxdiff.tools.plan import abstract_task
from jaxdiff.training.optim import learning_rate, optimiser
from jaxdiff.training.state import TrainState, create_state, make_step
from jaxdiff.types import Params, Tokens

PROMPT = "a red apple"


@dataclass
class Work:
    """A program and its arguments, and what one call of it is."""

    f: Any
    """Jitted."""
    args: tuple[Any, ...]
    flops: int
    """Of the networks' mathematics, on all devices together; see `flops`."""
    raw: dict[str, Params]
    """The params before they were made ready: what another library is given."""
    inputs: dict[str, Any]
    """What it is given besides, in our layout."""
    turns: int = 1
    """Of a loop whose number of turns the compiler does not know."""
    advance: Callable[[tuple[Any, ...], Any], tuple[Any, ...]] = lambda args, out: args
    """(arguments, what they gave) -> the next arguments."""
    fed: Callable[[tuple[Any, ...], Any], tuple[Any, ...]] = lambda args, batch: args
    """(arguments, another batch) -> the arguments with it."""
    fetch: Callable[[Any], Any] = lambda out: out
    """What a user waits for, of what the program gives."""
    config: TrainConfig | None = None
    """What is trained."""


@dataclass(frozen=True)
class Setting:
    """What targets share."""

    model: ModelSizes
    batch: int
    size: int
    """Pixels along each side."""
    dtype: str
    mesh: Mesh
    options: dict[str, Any] = field(default_factory=dict)
    """Of one target."""
    fed: DataConfig | None = None
    """What training reads, if anything."""

    @property
    def side(self) -> int:
        """Latent pixels along each side."""
        return self.size // self.model.vae.factor

    @property
    def latent(self) -> tuple[int, ...]:
        """The latents' shape."""
        return self.batch, self.side, self.side, self.model.vae.latent_channels


def unet(setting: Setting) -> Work:
    """One evaluation of the denoising network."""
    config, text = setting.model.unet, setting.model.text_encoder
    tokens = text.max_position_embeddings
    inputs = {
        "x": random_inputs((*setting.latent[:3], config.in_channels)),
        "t": jnp.linspace(900, 100, setting.batch),
        "context": random_inputs((setting.batch, tokens, config.cross_attention_dim), seed=1),
    }
    module = build.unet(config, jnp.dtype(setting.dtype))
    work = flops.unet(config, setting.batch, setting.side, setting.side, tokens)
    return _network(setting, "unet", module, inputs, work)


def vae(setting: Setting) -> Work:
    """The autoencoder's decoder or, with the option `encode`, its encoder."""
    config, encode = setting.model.vae, setting.options["encode"]
    if encode:
        inputs = {"image": random_inputs((setting.batch, setting.size, setting.size, config.in_channels))}
    else:
        inputs = {"z": random_inputs(setting.latent)}
    module = build.vae(config, jnp.dtype(setting.dtype))
    work = (flops.vae_encode if encode else flops.vae_decode)(config, setting.batch, setting.size, setting.size)
    return _network(setting, "vae", module, inputs, work, method="encode" if encode else "decode")


def text(setting: Setting) -> Work:
    """The text encoder; a prompt counts as an image."""
    config = setting.model.text_encoder
    shape = (setting.batch, config.max_position_embeddings)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=shape, dtype=np.int32)
    module = build.text_encoder(config, jnp.dtype(setting.dtype))
    return _network(setting, "text_encoder", module, {"tokens": jnp.asarray(tokens)},
                    flops.text_encoder(config, setting.batch))  # fmt: skip


def _network(
    setting: Setting, name: str, module: Any, inputs: dict[str, Any], work: int, method: str | None = None
) -> Work:
    raw = weights(setting.model, name)
    params = ready(raw, setting.mesh, jnp.dtype(setting.dtype))
    f = _gathered(lambda params, *x: module.apply({"params": params[name]}, *x, method=method), params, setting)
    return Work(Compiled(f), (params, *_spread(tuple(inputs.values()), setting)), work, raw, inputs)


def _gathered(f: Callable[..., Any], params: dict[str, Params], setting: Setting) -> Callable[..., Any]:
    """`f` for params that are stored in parts, if the mesh is more than one device; the training step does the same."""
    if setting.mesh.size == 1:
        return f
    stored = jax.tree.map(lambda p: p.sharding, params)

    def gathered(params: dict[str, Params], *args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(setting.mesh.abstract_mesh):  # attention's kernels are split over it
            return f(gather_params(params, stored, jnp.dtype(setting.dtype)), *args)

    return gathered


def _spread(rows: Any, setting: Setting) -> Any:
    """Arrays whose first axis is the batch, spread over the mesh."""
    return rows if setting.mesh.size == 1 else jax.device_put(rows, batch_sharding(setting.mesh))


def sample(setting: Setting) -> Work:
    """Prompts to pixels: tokens, text encoder, every step with guidance, decoder."""
    model, batch, steps = setting.model, setting.batch, setting.options["steps"]
    dtype = jnp.dtype(setting.dtype)
    tokenizer = Tokenizer.load(model.tokenizer, model.text_encoder.max_position_embeddings)
    prompts, negatives = [PROMPT] * batch, [""] * batch
    raw = weights(model, "text_encoder", "unet", "vae")
    params = ready(raw, setting.mesh, dtype)
    keys, x = keys_and_noise(jnp.arange(batch, dtype=jnp.uint32), setting.latent[1:])  # pyright: ignore
    configs = {"denoiser": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
    program = Program(StableDiffusion.of(configs, dtype), model.scheduler)
    ids = np.stack([tokenizer(negatives), tokenizer(prompts)], axis=1)[:, None, :, None]
    rows = _spread((jnp.asarray(ids), jax.vmap(begin)(x), keys), setting)
    everywhere, always = np.ones((batch, 1, 1, 1, 1, 1), np.float32), np.zeros((batch, 1), np.float32)

    def draw(params: dict[str, Params], ids: Any, state: Any, keys: Any, *numbers: Any) -> Any:
        tokens = Tokens(ids, jnp.ones(ids.shape), ids[0, 0, 0, 0])
        conditioning = unwrap(encode_prompts)((params["text_encoder"],), (tokens,), program=program)
        inputs = Inputs(conditioning, everywhere, always)
        state = unwrap(denoise)(params["unet"], inputs, state, keys, *numbers, program=program)
        return unwrap(decode)(params["vae"], state.x, program=program)

    sigmas = MODEL(model.scheduler, make_schedule(model.scheduler), steps)
    ends = np.int32(0), np.int32(steps)
    guidance = np.float32(setting.options["guidance"])
    length = model.text_encoder.max_position_embeddings
    return Work(
        Compiled(_gathered(draw, params, setting)),
        (
            params,
            *rows,
            sigmas,
            *ends,
            Guidance(guidance, np.float32(0), np.float32(1), np.float32(np.inf)),
            np.float32(0),
        ),
        flops.text_encoder(model.text_encoder, 2 * batch)
        + steps * flops.unet(model.unet, 2 * batch, setting.side, setting.side, length)
        + flops.vae_decode(model.vae, batch, setting.size, setting.size),
        raw,
        {"prompts": prompts, "negatives": negatives, "latents": x, "steps": steps, "guidance": float(guidance)},
        turns=steps,
        fetch=np.asarray,
    )


def train(setting: Setting) -> Work:
    """A training step of the UNet by AdamW, with its average: on cached latents and captions, or on what is fed."""
    model, fed, mesh = setting.model, setting.fed, setting.mesh
    remat: Remat = setting.options["remat"]
    data = fed or DataConfig(size=setting.size)
    config = TrainConfig(
        workdir="bench",
        model=model.name,
        task=DiffusionTask(
            unet=model.unet,
            text_encoder=model.text_encoder,
            scheduler=model.scheduler,
            vae=str(model.folder or ""),
            train_text_encoder=False,
            latent_variants=0 if fed else 1,
            text_variants=0 if fed else 1,
        ),
        data=replace(data, batch_size=setting.batch, size=setting.size),
        mesh=MeshConfig(*mesh.devices.shape),
        dtype=setting.dtype,  # pyright: ignore[reportArgumentType]
        remat=remat,
    )
    task, shapes = abstract_task(config)
    tx = optimiser(config.optim, learning_rate(config.optim, config.steps))
    raw = weights(model, "unet")
    state = filled(create_state(task, tx, jax.random.key(0), mesh, abstract=True), raw)
    step = make_step(task, tx, state, accumulate=1, dtype=jnp.dtype(setting.dtype))
    networks = [name for name, tree in task.frozen.items() if isinstance(tree, dict)]
    empty = {name: np.zeros(x.shape, x.dtype) for name, x in task.frozen.items() if name not in networks}
    frozen: Params = empty | weights(model, *networks)
    placed = place(frozen, tree_shardings(mesh, frozen))
    batch = {name: _draw(x, mesh) for name, x in shapes.items()}
    batch["index"] = jax.device_put(jnp.arange(setting.batch, dtype=jnp.int32), batch_sharding(mesh))
    tokens = model.text_encoder.max_position_embeddings
    work = 3 * flops.unet(model.unet, setting.batch, setting.side, setting.side, tokens)  # backward is twice forward
    if fed:
        work += flops.vae_encode(model.vae, setting.batch, setting.size, setting.size)
        work += flops.text_encoder(model.text_encoder, setting.batch)
    return Work(
        step,
        (state, placed, batch, jax.random.key(0)),
        work,
        raw,
        {"task": task, "frozen": frozen, "batch": batch},
        advance=lambda args, out: (out[0], *args[1:]),
        fed=lambda args, batch: (*args[:2], batch, *args[3:]),
        fetch=lambda out: out[1],  # the state is the next step's to use up
        config=config,
    )


def _draw(shape: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.Array:
    if jnp.issubdtype(shape.dtype, jnp.integer):
        return jax.device_put(jnp.zeros(shape.shape, shape.dtype), batch_sharding(mesh))
    return jax.device_put(random_inputs(shape.shape).astype(shape.dtype), batch_sharding(mesh))


def filled(state: TrainState, params: Params) -> TrainState:
    """The first state with these params, from its shapes and shardings: each leaf is put where it stays."""
    put = place(params, jax.tree.map(lambda x: x.sharding, state.params))
    put = jax.tree.map(lambda p: p.astype(jnp.float32), put)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), replace(state, params={}, ema={}))
    return replace(zeros, params=put, ema={name: jax.tree.map(jnp.copy, put) for name in state.ema})


TARGETS: dict[str, Callable[[Setting], Work]] = {
    "unet": unet,
    "vae": vae,
    "text": text,
    "sample": sample,
    "train": train,
}
