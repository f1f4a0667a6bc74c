"""From a `Drawing` to the arrays that the programs take: prompts, noise, and the latents of images."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, UInt8

from jaxdiff.data.tokens import Tokenizer
from jaxdiff.generation.drawing import Drawing
from jaxdiff.generation.network import AnyArray, Inputs
from jaxdiff.generation.programs import (
    Program,
    denoise,
    encode_image_prompts,
    encode_images,
    encode_prompts,
    keys_and_noise,
    noise_beside,
    read_images,
)
from jaxdiff.generation.request import SEEDS, Region, Request, floats
from jaxdiff.generation.weights import IMAGE_ENCODER, IP_ADAPTER, Weights
from jaxdiff.prompts.encode import Prompts, Words, alike, encode, fill, nothing
from jaxdiff.prompts.wildcards import Wildcards
from jaxdiff.runtime.programs import kept
from jaxdiff.sampling.inversion import backwards
from jaxdiff.sampling.loop import State, begin
from jaxdiff.sampling.samplers import first_state
from jaxdiff.sampling.torch_noise import torch_before, torch_latents
from jaxdiff.types import Conditioning, Params, Tokens


class PromptWarning(UserWarning):
    """A prompt is not drawn as it may have been meant."""


def make_inputs(
    drawing: Drawing, tokenizers: Sequence[Tokenizer], params: Weights, program: Program
) -> tuple[Inputs, State, Array]:
    """The denoiser's inputs, the state that sampling starts from, and the keys of the steps' noise.

    Raises:
        ValueError: where prompts do not go together.
    """
    settings, b = drawing.settings, len(drawing.requests)
    inputs, source = prompt_inputs(drawing, tokenizers, params, program)
    image_noise = None if drawing.image_noise is None else noise_of_images(drawing)
    if program.family.IMAGE_READERS:
        vectors = read_image_prompts(drawing, image_noise, params, program)
        inputs, source = (
            one._replace(conditioning=program.family.with_image(one.conditioning, vectors)) for one in (inputs, source)
        )
    keys, noise, step_noise = starting_noise(drawing)
    inputs = inputs._replace(step_noise=step_noise, hints=drawing.hints or None)
    if drawing.prompt_pixels and not program.family.IMAGE_READERS:
        inputs = inputs._replace(image_prompts=image_prompts(drawing, params, program))
    known = None if drawing.image is None else encode_latents(drawing.image, params["vae"], program)
    if known is not None and settings.latent_upscale > 1:
        known = _stretch(known, (b, *drawing.shape))

    if drawing.mask is not None and not drawing.mask.any(axis=(1, 2)).all():
        warn(["A mask selects nothing: all of it is black (0), so the image stays as it is; white (1) is drawn anew."])
    if drawing.depth is not None:
        inputs = inputs._replace(extra=drawing.depth[..., None])
    if drawing.small is not None:
        inputs = inputs._replace(extra=_noised(drawing, image_noise))
    if drawing.edits:
        assert known is not None, "what is edited is an image"
        inputs, known = inputs._replace(extra=known / program.family.latent_scale), None
    if drawing.mask is not None and known is not None and drawing.image is not None:
        free = _free(drawing.mask, program.family.factor)
        if program.family.beside == "mask":
            hidden = np.where(drawing.mask[..., None] > 0.5, np.uint8(127), drawing.image)
            extra = jnp.concatenate([free, encode_latents(hidden, params["vae"], program)], axis=-1)
            inputs = inputs._replace(extra=extra)
        else:
            inputs = inputs._replace(known=known, mask=free, noise=noise)
    if settings.invert is None:
        return inputs, _at_level(drawing, noise, known), keys

    assert known is not None, "what is inverted is an image"
    found = _inverted(drawing, source, known, keys, params["denoiser"], program)
    state = found
    if settings.to_seed is not None:
        mixed = on_sphere(found.x, _other_noise(drawing), _mix(drawing))
        state = begin_all(mixed)  # EDICT's second latent is the first again
    if drawing.layout_steps > drawing.start:
        # The source prompt is one more prompt, and the source one more latent.
        own, theirs = inputs.conditioning, source.conditioning
        conditioning = jax.tree.map(lambda a, b: jnp.concatenate([a, b[:, [0] * a.shape[1], 1:2]], axis=2), own, theirs)
        level = jnp.asarray(drawing.sigmas.sigmas[drawing.layout_steps - 1])
        inputs = inputs._replace(conditioning=conditioning, layout_above=level)
        state = State(
            x=jnp.stack([found.x, state.x], axis=1),
            history=jnp.stack([found.history, state.history], axis=2),
            taken=state.taken,
            guess=jnp.stack([found.guess, state.guess], axis=1),
        )
    return inputs, state._replace(taken=jnp.zeros(b, jnp.int32)), keys


def _inverted(drawing: Drawing, source: Inputs, known: Array, keys: Array, params: Params, program: Program) -> State:
    """The states that clean latents would have been drawn from, without guidance."""
    up = backwards(drawing.sigmas, drawing.steps)
    ends = np.int32(0), np.int32(drawing.steps - drawing.start)
    inverse = replace(program, invert=drawing.settings.invert, control_nets=(), control_guess=False,
                      image_reader=None)  # fmt: skip
    return denoise(params, source, begin_all(known), keys, up, *ends, None, np.float32(0), program=inverse)


# Prompts --------------------------------------------------------------------------------------------------------------


def filled(request: Request, wildcards: Wildcards, seed: int) -> Request:
    """The request with a line of the wildcards' files for each __name__ in its prompts, chosen by the seed."""
    words, told = fill(words_of(request), wildcards, seed)
    others, also_told = fill(Words(request.to_prompt or "", request.source_prompt), wildcards, seed)
    warn([*told, *also_told])
    return replace(
        request,
        prompt=words.prompt,
        negative_prompt=words.negative_prompt,
        regions=tuple(Region(text, box) for text, (_, box) in zip(words.regions, request.regions, strict=True)),
        to_prompt=None if request.to_prompt is None else others.prompt,
        source_prompt=others.negative_prompt,
    )


def words_of(request: Request) -> Words:
    """The request's prompts, as `jaxdiff.prompts` takes them."""
    return Words(request.prompt, request.negative_prompt, tuple(prompt for prompt, _ in request.regions))


def one_chunk(texts: Sequence[str], tokenizer: Tokenizer) -> Tokens:
    """Texts [b] as a text encoder reads them, without syntax; the ends of those that do not fit are cut."""
    ids = jnp.asarray(tokenizer(texts))[:, None]
    return Tokens(ids, jnp.ones(ids.shape), jnp.asarray(tokenizer([""])[0]))


def encoded(
    requests: Sequence[Request], tokenizers: Sequence[Tokenizer], steps: int
) -> tuple[list[Prompts], list[str]]:
    """The tokens of all prompts by each tokenizer: the requests', then the second prompts, then the source prompts.

    The sentences beside them are warnings.
    """
    words = [words_of(request) for request in requests]
    if requests[0].to_prompt is not None:
        words += [words_of(request)._replace(prompt=request.to_prompt or "") for request in requests]
    if requests[0].invert is not None:
        words += [Words("", request.source_prompt) for request in requests]  # nothing is composed there
    if not tokenizers:
        return [nothing(len(words))], []
    found = [encode(words, tokenizer, steps, literal=requests[0].literal) for tokenizer in tokenizers]
    return alike([prompts for prompts, _ in found]), [told for _, some in found for told in some]


def prompt_inputs(
    drawing: Drawing, tokenizers: Sequence[Tokenizer], params: Weights, program: Program
) -> tuple[Inputs, Inputs]:
    """The inputs as far as prompts give them; and those of the source prompts, where there are any."""
    b, steps, settings = len(drawing.requests), drawing.steps, drawing.settings
    by_tokenizer, warnings_ = encoded(drawing.requests, tokenizers, steps)
    warn(warnings_)
    prompts = by_tokenizer[0]
    empty = [tokenizer([""])[0] for tokenizer in tokenizers] or [prompts.ids[0, 0, 0, 0]]
    tokens = tuple(
        Tokens(jnp.asarray(one.ids), jnp.asarray(one.token_weights), jnp.asarray(own))
        for one, own in zip(by_tokenizer, empty, strict=True)
    )
    arguments = tuple(params[role] for role in program.family.TEXT_ENCODERS), tokens
    static = {"program": program, "clip_skip": settings.clip_skip}
    conditioning: Conditioning = kept(encode_prompts, *arguments, **static)(*arguments)
    if drawing.zero_empty:
        empty = [request.negative_prompt == "" for request in drawing.requests]
        conditioning = _zeros_for_negatives(conditioning, np.resize(empty, len(prompts.ids)))
    if drawing.numbers is not None:
        extra = drawing.numbers[[0, *[1] * (prompts.ids.shape[2] - 1)]]
        extra = jnp.broadcast_to(jnp.asarray(extra), (*prompts.ids.shape[:2], *extra.shape))
        conditioning = conditioning._replace(extra=extra)
    levels = np.append(np.asarray(drawing.sigmas.sigmas)[:steps], 0).astype(np.float32)

    def rows(first: int) -> Conditioning:
        return jax.tree.map(lambda leaf: leaf[first : first + b], conditioning)

    inputs = Inputs(rows(0), _part_weights(prompts, drawing), levels[prompts.starts[:b]])
    if settings.to_prompt is not None:
        if max(prompts.part_weights.shape[1:]) > 1:
            raise ValueError("to_prompt is for prompts without AND, prompt editing and regions; leave these out.")
        mix = jnp.asarray(_mix(drawing))

        def mixed(a: Array, b: Array) -> Array:
            return a + mix.reshape(-1, *[1] * (a.ndim - 1)) * (b - a)

        inputs = inputs._replace(conditioning=jax.tree.map(mixed, rows(0), rows(b)))
    if settings.invert is None:
        return inputs, inputs
    first = len(prompts.ids) - b
    if (prompts.starts[first:, 1:] < steps).any():
        raise ValueError("source_prompt may have no prompt editing; say what is in the image.")
    source = jax.tree.map(lambda leaf: leaf[:, :1, [0, 0]], rows(first))
    return inputs, Inputs(source, np.ones((b, 1, 1, 1, 1, 1), np.float32), levels[prompts.starts[first:, :1]])


def read_image_prompts(drawing: Drawing, noise: AnyArray | None, params: Weights, program: Program) -> Array:
    """What the model itself makes of the images in the prompts' places, or beside them."""
    (pixels,), level = drawing.prompt_pixels, (jnp.asarray(one, jnp.float32) for one in drawing.noise_level)
    own = tuple(params[role] for role in program.family.IMAGE_READERS)
    arguments = own, jnp.asarray(pixels[:, 0]), None if noise is None else jnp.asarray(noise), *level
    return kept(read_images, *arguments, program=program)(*arguments)


def _noised(drawing: Drawing, noise: AnyArray | None) -> Float32[np.ndarray, "b h w 3"]:
    """The images that are enlarged, from -1 to 1, with noise."""
    assert drawing.small is not None
    alpha_bar = np.float32(drawing.noise_level[1])
    image = drawing.small.astype(np.float32) / 127.5 - 1
    return np.sqrt(alpha_bar) * image + np.sqrt(1 - alpha_bar) * np.asarray(noise)


def image_prompts(drawing: Drawing, params: Weights, program: Program) -> Any:
    """The images that stand beside the prompts, as the denoiser reads them."""
    pixels = tuple(map(jnp.asarray, drawing.prompt_pixels))
    scales = tuple(jnp.asarray(scale, jnp.float32) for scale in drawing.prompt_scales)
    # The encoder first: with little memory, no more than one network is there.
    own = params[IMAGE_ENCODER], tuple(params[f"{IP_ADAPTER}{i}"] for i in range(len(pixels)))
    arguments = *own, pixels, scales
    return kept(encode_image_prompts, *arguments, program=program)(*arguments)


def _zeros_for_negatives(conditioning: Conditioning, rows: Bool[np.ndarray, " b"]) -> Conditioning:
    """The conditioning [b, phases, prompts, ...] with zeros for the negative prompts of these rows."""
    return jax.tree.map(lambda leaf: leaf.at[rows, :, 0].set(0), conditioning)


def _part_weights(prompts: Prompts, drawing: Drawing) -> Float32[np.ndarray, "b phases parts h w 1"]:
    """The weight of each part over the image: a region's own there, and the prompt's where no region is."""
    b = len(drawing.requests)
    weights, owner = prompts.part_weights[:b], prompts.part_region[:b]
    if not drawing.settings.regions:
        return weights[..., None, None, None]
    masks = np.stack([_coverage(region.box, drawing.shape[:2]) for region in drawing.settings.regions])
    covered = masks.sum(0)
    masks /= np.maximum(covered, 1)
    rest = np.maximum(1 - covered, 0)
    where = np.where((owner < 0)[..., None, None], rest, masks[np.maximum(owner, 0)])
    return (weights[..., None, None] * where[:, None])[..., None].astype(np.float32)


def _coverage(where: Any, sides: tuple[int, int]) -> Float32[np.ndarray, "h w"]:
    """How much of each latent pixel a region covers."""
    given, (h, w) = floats(where), sides
    if given.ndim == 1:
        left, top, right, bottom = given.tolist()
        down, across = (_overlap(low, high, n) for low, high, n in ((top, bottom, h), (left, right, w)))
        return down[:, None] * across
    if given.shape[0] % h or given.shape[1] % w:
        raise ValueError(
            f"A region's box has the shape {list(given.shape)}; its sides must be multiples of the latent's, {h}x{w}."
        )
    return given.reshape(h, given.shape[0] // h, w, given.shape[1] // w).mean((1, 3))


def _overlap(low: float, high: float, n: int) -> Float32[np.ndarray, " n"]:
    edges = np.arange(n + 1, dtype=np.float32)
    return np.clip(np.minimum(edges[1:], high * n) - np.maximum(edges[:-1], low * n), 0, 1)


def warn(sentences: Iterable[str]) -> None:
    """A `PromptWarning` for each sentence, once."""
    for sentence in dict.fromkeys(sentences):
        warnings.warn(sentence, PromptWarning, stacklevel=2)


# Noise and images -----------------------------------------------------------------------------------------------------

# Small programs of their own, so that given latents and seeds share the large one.
_keys_and_noise = jax.jit(keys_and_noise, static_argnums=1)
_image_noise = jax.jit(noise_beside, static_argnums=1)
begin_all = jax.jit(jax.vmap(begin))
_stretch = jax.jit(partial(jax.image.resize, method="bilinear"), static_argnums=1)


def starting_noise(
    drawing: Drawing,
) -> tuple[Array, Float32[np.ndarray, "b h w c"], Float32[np.ndarray, "b n h w c"] | None]:
    """Keys, starting noise, and the steps' noise where it is not the keys'."""
    settings, seeds = drawing.settings, [request.seed for request in drawing.requests]
    keys, noise = seeded(seeds, drawing.shape, settings.rng, drawing.image_noise)
    if settings.latents is not None:
        noise = np.stack([request.latents for request in drawing.requests])  # pyright: ignore
    if settings.to_seed is not None and settings.invert is None:
        noise = on_sphere(noise, _other_noise(drawing), _mix(drawing))
    if settings.rng == "jax":
        return keys, noise, None
    # The first step takes the second draw, whichever number it has; the rest makes the length a power of two.
    steps, start = drawing.steps, drawing.start
    step_noise = np.zeros((len(seeds), 1 << (steps - 1).bit_length(), *drawing.shape), np.float32)
    for i, seed in enumerate(seeds):
        drawn = torch_latents(int(seed or 0), drawing.shape, 1 + steps - start, drawing.image_noise)
        step_noise[i, start:steps] = drawn[1:]
    return keys, noise, step_noise


def noise_of_images(drawing: Drawing) -> Float32[np.ndarray, "b *d"]:
    """Unit normal noise for the images that the denoiser reads, each of its seed alone."""
    assert drawing.image_noise is not None
    seeds, shape = [request.seed or 0 for request in drawing.requests], drawing.image_noise
    if drawing.settings.rng == "torch":
        return np.stack([torch_before(int(seed), shape) for seed in seeds])
    return np.asarray(_image_noise(np.array([seed % SEEDS for seed in seeds], np.uint32), shape))


def seeded(
    seeds: Sequence[int | None], shape: tuple[int, int, int], rng: str, before: tuple[int, ...] | None = None
) -> tuple[Array, Float32[np.ndarray, "b h w c"]]:
    """Keys for the steps' noise, and the unit normal noise that sampling starts from, each of its seed alone; with
    PyTorch's generator, after what is drawn `before`."""
    keys, noise = _keys_and_noise(np.array([(seed or 0) % SEEDS for seed in seeds], np.uint32), shape)
    if rng == "torch":
        noise = [torch_latents(int(seed or 0), shape, 1, before)[0] for seed in seeds]
    return keys, np.asarray(noise)


def _other_noise(drawing: Drawing) -> Float32[np.ndarray, "b h w c"]:
    """The noise of the second seeds."""
    seeds = [request.to_seed for request in drawing.requests]
    return seeded(seeds, drawing.shape, drawing.settings.rng, drawing.image_noise)[1]


def _mix(drawing: Drawing) -> Float32[np.ndarray, " b"]:
    return np.array([request.mix for request in drawing.requests], np.float32)


def on_sphere(
    a: Float[AnyArray, "b h w c"], b: Float[AnyArray, "b h w c"], mix: Float32[np.ndarray, " b"]
) -> Float32[np.ndarray, "b h w c"]:
    """Between two noises along the great circle, so that the middle has the norm of the ends (Shoemake 1985)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)  # pyright: ignore
    norms = [np.sqrt(np.square(x).sum((1, 2, 3), keepdims=True)) for x in (a, b)]
    cosine = (a * b).sum((1, 2, 3), keepdims=True) / (norms[0] * norms[1])
    angle, s = np.arccos(np.clip(cosine, -1, 1)), mix.reshape(-1, 1, 1, 1).astype(np.float64)
    near = np.sin(angle) < 1e-6
    safe = np.where(near, 1.0, np.sin(angle))
    weights = [np.where(near, line, np.sin(line * angle) / safe) for line in (1 - s, s)]
    return (weights[0] * a + weights[1] * b).astype(np.float32)


def _at_level(drawing: Drawing, noise: Float[np.ndarray, "b h w c"], known: Array | None) -> State:
    """Where sampling starts: from noise; or from the image, noised to the level of its first step."""
    start = drawing.start
    if known is None or (drawing.mask is not None and start == 0):
        return begin_all(first_state(noise, drawing.sigmas, drawing.at_sigma))
    sigma = np.asarray(drawing.sigmas.sigmas)[start] if start < drawing.steps else np.float32(0)
    return begin_all((np.asarray(known) + sigma * noise) / np.sqrt(1 + sigma**2))


def encode_latents(image: UInt8[np.ndarray, "b h2 w2 3"], params: Params, program: Program) -> Array:
    """Images to their most likely latents, at unit variance."""
    arguments = params, jnp.asarray(image)
    return kept(encode_images, *arguments, program=program)(*arguments)


def _free(mask: Float32[np.ndarray, "b h2 w2"], factor: int) -> Float32[np.ndarray, "b h w 1"]:
    """1 for each latent pixel of which any part is drawn."""
    b, h, w = mask.shape
    drawn = mask.reshape(b, h // factor, factor, w // factor, factor).max((2, 4)) > 0
    return drawn[..., None].astype(np.float32)
