"""The compiled programs: encode_prompts, encode_images, denoise, decode. Each is written for one image and mapped."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8, UInt32

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.families import Family
from jaxdiff.generation.network import (
    AnyArray,
    Control,
    Inputs,
    Prepared,
    Rows,
    Steering,
    cached_features,
    image_denoiser,
)
from jaxdiff.nn.slices import in_slices
from jaxdiff.runtime.compile import Compiled
from jaxdiff.sampling.inversion import ddim_inversion, edict_inversion
from jaxdiff.sampling.loop import State, keyed_noise, sampling_loop
from jaxdiff.sampling.samplers import SAMPLERS, Sampler
from jaxdiff.sampling.sigmas import Sigmas
from jaxdiff.types import Conditioning, Latent, Params, Sigma, Tokens

# So that programs can be kept between processes.
for container in (Conditioning, Control, Guidance, Inputs, Prepared, Sigmas, State, Tokens):
    jax.export.register_namedtuple_serialization(container, serialized_name=f"jaxdiff.{container.__name__}")

INVERSIONS = {"ddim": ("ddim", ddim_inversion), "exact": ("edict", edict_inversion)}
"""How an image's noise is found: the sampler that draws from it, and the sampler that finds it."""


class ImageReader(NamedTuple):
    """The modules that make images prompts."""

    encoder: Any
    ip_adapters: tuple[Any, ...]


@dataclass(frozen=True)
class Program:
    """What programs are compiled for; everything else is an argument of theirs."""

    family: Family
    """The networks."""
    scheduler: SchedulerConfig
    sampler: str = "ddim"
    """One of `SAMPLERS`."""
    tile: tuple[int, int] | None = None
    """Height and width of the denoiser's tiles, in latent pixels; None is the whole image."""
    registered: Sampler | None = None
    """A sampler of a user's own, which is told apart from another of its name that was registered before."""
    invert: str | None = None
    """One of `INVERSIONS`, for the steps from an image to its noise; None draws."""
    control_nets: tuple[Any, ...] = ()
    """The modules of the control networks in use."""
    control_guess: bool = False
    """Whether they see the prompt alone, and say what it does not."""
    image_reader: ImageReader | None = None
    """What reads images beside the prompts, where there are any."""

    def sampler_fn(self, eta: Float[Array, ""] | float) -> Any:
        """The sampler with its options."""
        if self.invert is not None:
            return INVERSIONS[self.invert][1]
        sampler = self.registered or SAMPLERS[self.sampler]
        options = {"eta": eta, "clip": self.scheduler.clip_sample_range if self.scheduler.clip_sample else None}
        return partial(sampler.fn, **{name: options[name] for name in sampler.options})


def keys_and_noise(
    seeds: UInt32[Array, " b"], shape: tuple[int, int, int]
) -> tuple[Key[Array, " b"], Float[Array, "b h w c"]]:
    """Each image's key for its steps and its starting noise, from its own seed alone."""

    def draw(seed: UInt32[Array, ""]) -> tuple[Key[Array, ""], Float[Array, "h w c"]]:
        step_key, noise_key = jax.random.split(jax.random.key(seed))
        return step_key, jax.random.normal(noise_key, shape)

    return jax.vmap(draw)(seeds)


def noise_beside(seeds: UInt32[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b *d"]:
    """Noise for each image that the denoiser reads, from its own seed alone, and unlike that of `keys_and_noise`."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.fold_in(jax.random.key(seed), 0), shape))(seeds)


@partial(Compiled, static_argnames=("program", "clip_skip"))
def encode_prompts(
    params: tuple[Params, ...], tokens: tuple[Tokens, ...], *, program: Program, clip_skip: int = 0
) -> Conditioning:
    """Texts [*n], as each of the text encoders reads them, to the denoiser's conditioning [*n, ...]."""
    return program.family.encode_prompts(params, tokens, clip_skip)


@partial(Compiled, static_argnames="program")
def read_images(
    params: tuple[Params, ...],
    pixels: Float[Array, "b s s 3"],
    noise: Float[Array, "b d"] | None,
    level: Float[Array, ""],
    alpha_bar: Float[Array, ""],
    *,
    program: Program,
) -> Float[Array, "b d2"]:
    """Images that the model itself reads; see `Family.read_image`."""
    return program.family.read_image(params, pixels, noise, level, alpha_bar)


@partial(Compiled, static_argnames="program")
def encode_image_prompts(
    encoder_params: Params,
    params: tuple[Params, ...],
    pixels: tuple[Float[Array, "b n s s 3"], ...],
    scales: tuple[Float[Array, ""], ...],
    *,
    program: Program,
) -> Any:
    """Images as prompts: what `Inputs.image_prompts` holds; see `Family.image_prompts`."""
    reader = program.image_reader
    assert reader is not None, "what reads images"
    nets = tuple(zip(reader.ip_adapters, params, strict=True))
    return program.family.image_prompts(reader.encoder, encoder_params, nets, pixels, scales)


@partial(Compiled, least_memory=True, static_argnames="program")
def encode_images(params: Params, images: UInt8[Array, "b h2 w2 3"], *, program: Program) -> Float[Array, "b h w c"]:
    """The most likely latents of images, at unit variance."""

    def encode(image: UInt8[Array, "h2 w2 3"]) -> Float[Array, "h w c"]:
        return program.family.encode(params, image[None].astype(jnp.float32) / 127.5 - 1)[0]

    return jax.lax.map(encode, images)


@partial(Compiled, static_argnames="program")
def denoise(
    params: Params,
    inputs: Inputs,
    state: State,
    keys: Key[Array, " b"],
    sigmas: Sigmas,
    start: Int[Array, ""],
    stop: Int[Array, ""],
    guidance: Guidance | None,
    eta: Float[Array, ""],
    cache_interval: Int[Array, ""] | None = None,
    controls: tuple[Control, ...] = (),
    *,
    program: Program,
) -> State:
    """Steps `start` to `stop - 1` of each image. Only shapes, `program`, the params' types and which arguments are None
    make it compile again.

    Args:
        params: the denoiser's.
        inputs: the prompts, and what else the denoiser takes.
        state: `vmap(begin)` of unit normal noise, or what an earlier call returned, to go on at step `start`.
        keys: for the noise of the steps.
        sigmas: the noise levels.
        start: the first step.
        stop: one after the last step.
        guidance: classifier-free guidance and its variants; None asks for the prompt alone.
        eta: the share of fresh noise in DDIM's steps, 0 to 1.
        cache_interval: deep features are computed at steps `start`, `start + cache_interval`, ...; None is all steps.
        controls: one for each of the program's control networks.
        program: networks, sampler and tile.

    Returns:
        The state at `sigmas.sigmas_next[stop - 1]`.
    """
    prepared, steering = prepare(program, params, inputs, controls)
    sampler = program.sampler_fn(eta)

    def sample(inputs: Inputs, prepared: Prepared, state: State, key: Key[Array, ""]) -> State:
        bind = partial(
            Rows, program.family, program.scheduler, program.tile, params, inputs, prepared, guidance, steering=steering
        )  # fmt: skip
        noise_fn = keyed_noise(key, state.x.shape) if inputs.step_noise is None else inputs.step_noise.__getitem__

        def steps(deep: Array | None, state: State, start: Array, stop: Array) -> State:
            return sampling_loop(sampler, image_denoiser(bind(deep)), noise_fn, state, sigmas, start, stop)

        if cache_interval is None:
            return steps(None, state, start, stop)
        features = cached_features(bind, *map(jnp.asarray, sigmas))

        def block(now: tuple[Array, State]) -> tuple[Array, State]:
            i, state = now
            end = jnp.minimum(i + cache_interval, stop)  # pyright: ignore[reportOperatorIssue]
            return end, steps(features(state.x, i, end), state, i, end)

        return jax.lax.while_loop(lambda now: now[0] < stop, block, (start, state))[1]

    return jax.vmap(sample, in_axes=(mapped_axes(inputs), 0, 0, 0))(inputs, prepared, state, keys)


def prepare(
    program: Program, params: Params, inputs: Inputs, controls: tuple[Control, ...]
) -> tuple[Prepared, Steering]:
    """What is computed once for all steps, and the control networks with their params."""
    family, conditioning = program.family, jax.tree.map(jnp.asarray, inputs.conditioning)

    def own(net: Any, control: Control, images: UInt8[AnyArray, "b h2 w2 3"]) -> tuple[Any, Params]:
        features = family.embed_control(net, control.params, jnp.asarray(images).astype(jnp.float32) / 255)
        return features, family.prepare(control.params, conditioning)

    nets = program.control_nets
    prepared = tuple(own(*one) for one in zip(nets, controls, inputs.hints or (), strict=True))
    prompts = family.prepare(params, conditioning)
    if inputs.image_prompts is not None:
        prompts = family.beside_prompts(prompts, beside_each_prompt(inputs))
    return Prepared(prompts, prepared), Steering(nets, controls, program.control_guess)


def beside_each_prompt(inputs: Inputs) -> Any:
    """Keys and values of images for every prompt of every phase; a source prompt has none."""
    b, phases, prompts = jnp.shape(inputs.conditioning.context)[:3]
    parts = inputs.weights.shape[-4]
    which = np.minimum(np.arange(prompts), 1)  # the negative prompt's, then the others'
    counts = jnp.asarray(np.arange(prompts) <= parts)[None, None, :, None, None]

    def spread(x: Array) -> Array:
        return jnp.broadcast_to(x[:, None, which], (b, phases, prompts, *x.shape[2:]))

    def pair(keys: Array, values: Array) -> tuple[Array, Array]:
        return spread(keys), spread(values) * counts.astype(values.dtype)

    return tuple(tuple(pair(*one) for one in layer) for layer in inputs.image_prompts)


@partial(Compiled, static_argnames="program")
def prepare_once(params: Params, inputs: Inputs, controls: tuple[Control, ...], *, program: Program) -> Prepared:
    """What is computed once for all steps, for `guess`."""
    return prepare(program, params, inputs, controls)[0]


@partial(Compiled, static_argnames="program")
def guess(
    params: Params,
    inputs: Inputs,
    prepared: Prepared,
    x: Float[Array, "b h w c"],
    sigma: Float[Array, ""],
    guidance: Guidance,
    controls: tuple[Control, ...] = (),
    *,
    program: Program,
) -> Float[Array, "b h w c"]:
    """One call of each image's `DenoiseFn`: the guess of x_0 from x = x_0 + sigma eps."""
    steering = Steering(program.control_nets, controls, program.control_guess)

    def one(inputs: Inputs, prepared: Prepared, x: Latent, sigma: Sigma) -> Latent:
        rows = Rows(
            program.family, program.scheduler, program.tile, params, inputs, prepared, guidance, steering=steering
        )  # fmt: skip
        memory = guidance.memory(x)
        out: Any = image_denoiser(rows)(x, sigma, *memory)  # pyright: ignore[reportCallIssue]
        return out[0] if memory else out

    return jax.vmap(one, in_axes=(mapped_axes(inputs), 0, 0, None))(inputs, prepared, x, sigma)


@partial(Compiled, least_memory=True, static_argnames="program")
def decode(params: Params, latents: Float[Array, "b h w c"], *, program: Program) -> UInt8[Array, "b h2 w2 3"]:
    """Images of latents at unit variance."""

    def one(latent: Float[Array, "h w c"]) -> UInt8[Array, "h2 w2 3"]:
        return _to_uint8(program.family.decode(params, latent[None])[0])

    return in_slices(one, latents)


@partial(Compiled, static_argnames="net")
def decode_preview(params: Params, latents: Float[Array, "b h w c"], *, net: Any) -> UInt8[Array, "b h2 w2 3"]:
    """Images of latents at unit variance by a tiny autoencoder."""
    return _to_uint8(net.apply({"params": params}, latents, method="decode"))


def _to_uint8(image: Float[Array, "*b h w 3"]) -> UInt8[Array, "*b h w 3"]:
    """[-1, 1] to 0..255; what overshoots is cut off."""
    return jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def mapped_axes(inputs: Inputs) -> Inputs:
    """The axes for `vmap`: all but `layout_above`, which is the same for all images."""
    axes = jax.tree.map(lambda _: 0, inputs._replace(layout_above=None))
    return axes._replace(layout_above=None)
