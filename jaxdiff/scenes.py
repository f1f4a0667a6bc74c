"""From a checked request to the arrays that the programs of `jaxdiff.generate` take: a scene, and where it starts."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8, UInt32

from jaxdiff.arguments import floats
from jaxdiff.generate import AnyArray, Program, Scene, encode_images, invert, keys_and_noise, read_prompts
from jaxdiff.io.programs import kept
from jaxdiff.prompts.encode import Prompts, Words, encode, fill
from jaxdiff.prompts.wildcards import Wildcards
from jaxdiff.sampling.inversion import backwards
from jaxdiff.sampling.loop import State, begin
from jaxdiff.sampling.sigmas import Sigmas
from jaxdiff.sampling.torch_noise import torch_latents
from jaxdiff.settings import Settings
from jaxdiff.types import Params

Shape = tuple[int, int, int]


class PromptWarning(UserWarning):
    """A prompt is not drawn as it may have been meant."""


@dataclass(frozen=True)
class Request:
    """One call of a pipeline, checked; a row for each of b pictures."""

    settings: Settings
    words: Sequence[Words]
    seeds: UInt32[np.ndarray, " b"]
    shape: Shape
    """Height, width and channels of a latent."""
    levels: Sigmas
    steps: int
    """How many the levels have."""
    latents: Float32[np.ndarray, "b h w c"] | None = None
    image: UInt8[np.ndarray, "b h2 w2 3"] | None = None
    mask: Float32[np.ndarray, "b h2 w2"] | None = None
    sources: Sequence[str] = ()
    regions: Sequence[Any] = ()
    """Where the words' regions lie: boxes, or masks."""
    targets: Sequence[str] | None = None
    """The second prompts."""
    other_seeds: UInt32[np.ndarray, " b"] | None = None
    shares: Float32[np.ndarray, " b"] | None = None
    wildcards: Wildcards | None = None

    @property
    def begun(self) -> int:
        """The first step: all before is taken as done by the image."""
        if self.image is None:
            return 0
        strength, whole = self.settings.strength, self.mask is not None or self.settings.invert is not None
        strength = (1.0 if whole else 0.8) if strength is None else strength
        return self.steps - int(self.steps * strength + 1e-4)

    @property
    def held(self) -> int:
        """For so many steps, the layout is the image's."""
        return 0 if self.settings.invert is None else math.floor(self.settings.keep * self.steps + 0.5)


def prepare_scene(
    request: Request, tokenizer: Any, params: dict[str, Params], program: Program
) -> tuple[Scene, State, Array]:
    """What to draw, where to start, and the keys of the steps' noise.

    Raises:
        ValueError: where prompts do not go together.
    """
    b = len(request.words)
    scene, source = _read(request, tokenizer, params, program)
    keys, noise, noises = _noise(request)
    scene = scene._replace(noises=noises)
    known = None if request.image is None else _encode(request.image, params, program)
    if known is not None and request.settings.enlarge > 1:
        known = _stretch(known, (b, *request.shape))

    if request.mask is not None and known is not None and request.image is not None:
        free = _free(request.mask, request.image.shape[1] // request.shape[0])
        if program.inpaints:
            hidden = np.where(request.mask[..., None] > 0.5, np.uint8(127), request.image)
            scene = scene._replace(extra=jnp.concatenate([free, _encode(hidden, params, program)], axis=-1))
        else:
            scene = scene._replace(known=known, mask=free, noise=noise)
    if request.settings.invert is None:
        return scene, _at_level(request, noise, known), keys

    assert known is not None, "what is inverted is an image"
    up, steps = backwards(request.levels, request.steps), np.int32(request.steps - request.begun)
    found = invert(params, source, _begin(known), up, steps, method=request.settings.invert, program=program)
    state = found
    if request.other_seeds is not None and request.shares is not None:
        other = _drawn(request.other_seeds, request.shape, request)[1]
        state = found._replace(x=on_sphere(found.x, other, request.shares))
        state = state._replace(history=jnp.zeros_like(found.history))  # EDICT's second latent is the first again
    if request.held > request.begun:
        context = jnp.concatenate([scene.context, source.context[:, [0] * scene.context.shape[1], 1:2]], axis=2)
        scene = scene._replace(context=context, keep=jnp.asarray(request.levels.sigmas[request.held - 1]))
        x, guess = (jnp.stack(pair, axis=1) for pair in ((found.x, state.x), (found.guess, state.guess)))
        state = State(x, jnp.stack([found.history, state.history], axis=2), state.taken, guess)
    return scene, state._replace(taken=jnp.zeros(b, jnp.int32)), keys


def on_sphere(
    a: Float[AnyArray, "b h w c"], b: Float[AnyArray, "b h w c"], shares: Float32[np.ndarray, " b"]
) -> Float32[np.ndarray, "b h w c"]:
    """Between two noises along the great circle, so that the way's middle is as loud as its ends (Shoemake 1985)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)  # pyright: ignore
    norms = [np.sqrt(np.square(x).sum((1, 2, 3), keepdims=True)) for x in (a, b)]
    cosine = (a * b).sum((1, 2, 3), keepdims=True) / (norms[0] * norms[1])
    angle, s = np.arccos(np.clip(cosine, -1, 1)), shares.reshape(-1, 1, 1, 1).astype(np.float64)
    near = np.sin(angle) < 1e-6
    safe = np.where(near, 1.0, np.sin(angle))
    weights = [np.where(near, line, np.sin(line * angle) / safe) for line in (1 - s, s)]
    return (weights[0] * a + weights[1] * b).astype(np.float32)


# Prompts --------------------------------------------------------------------------------------------------------------


def _read(request: Request, tokenizer: Any, params: dict[str, Params], program: Program) -> tuple[Scene, Scene]:
    """The scene, as far as prompts go; and that of the sources."""
    b, words = len(request.words), [*request.words]
    if request.targets is not None:
        words += [w._replace(prompt=target) for w, target in zip(request.words, request.targets, strict=True)]
    words += [Words("", source) for source in request.sources]  # composition is not for them, nor for negative prompts
    if request.wildcards is not None:
        filled = [fill(w, request.wildcards, int(request.seeds[i % b])) for i, w in enumerate(words)]
        words = [w for w, _ in filled]
        _warn(told for _, tellings in filled for told in tellings)
    prompts, told = encode(words, tokenizer, request.steps, literal=request.settings.literal)
    _warn(told)

    empty = tokenizer([""])[0]
    arguments = params["text_encoder"], jnp.asarray(prompts.ids), jnp.asarray(prompts.token_weights), jnp.asarray(empty)
    context = kept(read_prompts, _features, *arguments, program=program)(*arguments)
    levels = np.append(np.asarray(request.levels.sigmas)[: request.steps], 0).astype(np.float32)
    weights = _laid_out(prompts, request, b)
    scene = Scene(context[:b], weights, levels[prompts.starts[:b]])
    if request.targets is not None and request.shares is not None:
        if max(prompts.part_weights.shape[1:]) > 1:
            raise ValueError("A second prompt is for prompts without AND, schedules and regions; leave these out.")
        mixed = request.shares[:, None, None, None, None]
        scene = scene._replace(context=scene.context + mixed * (context[b : 2 * b] - scene.context))
    source = scene
    if request.sources:
        own = prompts.starts[-b:, 1:]
        if (own < request.steps).any():
            raise ValueError("A source prompt may have no schedule; say what is in the image.")
        source = Scene(
            context[-b:, :1, [0, 0]], np.ones((b, 1, 1, 1, 1, 1), np.float32), levels[prompts.starts[-b:, :1]]
        )
    return scene, source


def _features(params: Params, ids: Array, *_: Array, program: Program) -> Array:
    """What `read_prompts` returns, as far as shapes go."""
    *n, chunks, length = ids.shape
    return jnp.zeros((*n, chunks * length, program.text_encoder.hidden_size), jnp.float32)


def _laid_out(prompts: Prompts, request: Request, b: int) -> Float32[np.ndarray, "b phases parts h w 1"]:
    """The parts' weights over the picture: a region's own, and what no region covers for the prompt's."""
    weights, owner = prompts.part_weights[:b], prompts.part_region[:b]
    if not request.regions:
        return weights[..., None, None, None]
    masks = np.stack([_region(where, request.shape[:2]) for where in request.regions])
    covered = masks.sum(0)
    masks /= np.maximum(covered, 1)
    rest = np.maximum(1 - covered, 0)
    where = np.where((owner < 0)[..., None, None], rest, masks[np.maximum(owner, 0)])
    return (weights[..., None, None] * where[:, None])[..., None].astype(np.float32)


def _region(where: Any, sides: tuple[int, int]) -> Float32[np.ndarray, "h w"]:
    """How much of each latent pixel a region covers."""
    given, (h, w) = floats(where), sides
    if given.shape == (4,):
        left, top, right, bottom = given.tolist()
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"A region's box is {where!r}; it must be left, top, right and bottom in shares of the "
                             "sides, from 0 to 1.")  # fmt: skip
        down, across = (_covered(low, high, n) for low, high, n in ((top, bottom, h), (left, right, w)))
        return down[:, None] * across
    fits = given.ndim == 2 and given.shape[0] % h == 0 and given.shape[1] % w == 0
    if not fits or not given.size or not ((given >= 0) & (given <= 1)).all():
        raise ValueError("A region is a box of four shares, or numbers from 0 to 1 [height, width] of the picture's "
                         f"size; it is {list(given.shape)}.")  # fmt: skip
    return given.reshape(h, given.shape[0] // h, w, given.shape[1] // w).mean((1, 3))


def _covered(low: float, high: float, n: int) -> Float32[np.ndarray, " n"]:
    edges = np.arange(n + 1, dtype=np.float32)
    return np.clip(np.minimum(edges[1:], high * n) - np.maximum(edges[:-1], low * n), 0, 1)


def _warn(told: Any) -> None:
    for sentence in dict.fromkeys(told):
        warnings.warn(sentence, PromptWarning, stacklevel=5)


# Noise and images -----------------------------------------------------------------------------------------------------

# Drawn by its own small program, so that given latents and seeds share the large one.
_keys_and_noise = jax.jit(keys_and_noise, static_argnums=1)
_begin = jax.jit(jax.vmap(begin))
_stretch = jax.jit(partial(jax.image.resize, method="bilinear"), static_argnums=1)


def _noise(request: Request) -> tuple[Array, Float32[np.ndarray, "b h w c"], Float32[np.ndarray, "b n h w c"] | None]:
    """Keys, starting noise, and the steps' noise where it is not the keys'."""
    keys, noise, noises = _drawn(request.seeds, request.shape, request)
    if request.latents is not None:
        noise = request.latents
    if request.other_seeds is not None and request.shares is not None and request.settings.invert is None:
        noise = on_sphere(noise, _drawn(request.other_seeds, request.shape, request)[1], request.shares)
    return keys, noise, noises


def _drawn(
    seeds: UInt32[np.ndarray, " b"], shape: Shape, request: Request
) -> tuple[Array, Float32[np.ndarray, "b h w c"], Float32[np.ndarray, "b n h w c"] | None]:
    keys, noise = _keys_and_noise(seeds, shape)
    if request.settings.noise == "jax":
        return keys, np.asarray(noise), None
    # The first step takes the second draw, whichever number it has; the rest makes the length a power of two.
    n, begun = 1 << (request.steps - 1).bit_length(), request.begun
    draws = np.stack([torch_latents(int(seed), shape, 1 + request.steps - begun) for seed in seeds])
    noises = np.zeros((len(seeds), n, *shape), np.float32)
    noises[:, begun : request.steps] = draws[:, 1:]
    return keys, draws[:, 0], noises


def _at_level(request: Request, noise: Float[np.ndarray, "b h w c"], known: Array | None) -> State:
    """The walk's start: noise; or the image, noised to the level of its first step."""
    begun = request.begun
    if known is None or (request.mask is not None and begun == 0):
        return _begin(noise)
    sigma = np.asarray(request.levels.sigmas)[begun] if begun < request.steps else np.float32(0)
    return _begin((np.asarray(known) + sigma * noise) / np.sqrt(1 + sigma**2))


def _encode(image: UInt8[np.ndarray, "b h2 w2 3"], params: dict[str, Params], program: Program) -> Array:
    arguments = params["vae"], jnp.asarray(image)
    return kept(encode_images, _latents, *arguments, program=program)(*arguments)


def _latents(params: Params, images: Array, *, program: Program) -> Array:
    """What `encode_images` returns, as far as shapes go."""
    b, h, w, _ = images.shape
    factor = 2 ** (len(program.vae.channels) - 1)
    return jnp.zeros((b, h // factor, w // factor, program.vae.latent_channels), jnp.float32)


def _free(mask: Float32[np.ndarray, "b h2 w2"], factor: int) -> Float32[np.ndarray, "b h w 1"]:
    """1 for each latent pixel of which any part is drawn."""
    b, h, w = mask.shape
    drawn = mask.reshape(b, h // factor, factor, w // factor, factor).max((2, 4)) > 0
    return drawn[..., None].astype(np.float32)
