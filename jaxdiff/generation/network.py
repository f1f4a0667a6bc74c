"""From a model's denoiser to the `DenoiseFn` of one image. Each feature is a function wrapped round the one below it.

    rows          the denoiser on one row for each guess that guidance reads
    controlled    what control networks add to its features
    beside        maps beside the latent: a mask, an image or a depth map that the model reads, features of control
                  images
    tiled         overlapping tiles of a large image
    make_denoiser from the network's output to a guess of x_0
    guided        one guess from several: classifier-free guidance, prompt parts, PAG, APG, rescaling, edited images
    within        guidance in an interval of noise levels
    beside_source the source image drawn along, for its layout
    inpainted     the known part of the image

All of it is written for one image and mapped over a batch.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.denoiser import NetworkFn, make_denoiser, sigma_to_t
from jaxdiff.diffusion.guidance import Guidance, guided, guided_by_image, within
from jaxdiff.diffusion.inpaint import inpainted
from jaxdiff.diffusion.prediction import PREDICTIONS
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.diffusion.tile import tiled
from jaxdiff.families import Family
from jaxdiff.types import Conditioning, DenoiseFn, Latent, Params, Sigma

AnyArray = Array | np.ndarray


class Inputs(NamedTuple):
    """The arrays that the denoiser of an image takes beside its noisy latent. A field that is None costs nothing."""

    conditioning: Conditioning
    """Features [*b, phases, prompts, ...]: the negative prompt's, then those of each part of the prompt; with
    `layout_above`, the source prompt's last. A phase is a run of steps over which no prompt changes."""
    weights: Float[AnyArray, "*b phases parts #h #w 1"]
    """How much each part counts, and where."""
    starts: Float[AnyArray, "*b phases"]
    """The noise level at which each phase starts, falling. The first is not read."""
    known: Float[AnyArray, "*b h w c"] | None = None
    """The clean latent of the part that is kept."""
    mask: Float[AnyArray, "*b h w 1"] | None = None
    """1 where the image is drawn, 0 where it is kept."""
    noise: Float[AnyArray, "*b h w c"] | None = None
    """The noise of the part that is kept."""
    extra: Float[AnyArray, "*b h w d"] | None = None
    """Further channels of models that read more: a mask and the masked image's latent, an image's latent, a depth
    map."""
    step_noise: Float[AnyArray, "*b n h w c"] | None = None
    """The noise of each step, in place of the key's."""
    layout_above: Float[AnyArray, ""] | None = None
    """The noise level down to which the layout is that of a source, drawn along as the first of x [2, h, w, c]."""

    hints: tuple[UInt8[AnyArray, "*b h2 w2 3"], ...] | None = None
    """Control images, one for each control network."""
    image_prompts: Any = None
    """Keys and values [*b, 2, tokens, c] of images as prompts, by `Family.image_prompts`."""


class Control(NamedTuple):
    """A network that an image steers the denoiser by, and how much and when; the same for all images."""

    params: Params
    scale: Float[AnyArray, ""]
    low: Float[AnyArray, ""] | None = None
    """The noise level above which it counts; None is at all levels."""
    high: Float[AnyArray, ""] | None = None
    """The one up to which it counts."""


class Prepared(NamedTuple):
    """What is computed for an image once for all steps."""

    prompts: Params
    """Of its prompts, by the denoiser."""
    controls: tuple[tuple[Any, Params], ...] = ()
    """By each control network, features of the control image, and of the prompts."""


class Steering(NamedTuple):
    """The control networks in use."""

    nets: tuple[Any, ...] = ()
    """Their modules."""
    controls: tuple[Control, ...] = ()
    """As many."""
    guess: bool = False
    """Whether they see the prompt's rows alone, and say what it does not."""


# Rows -----------------------------------------------------------------------------------------------------------------

# The denoiser is called once for all guesses that guidance reads, a row for each: the negative prompt's, those of the
# prompt's parts, where attention is perturbed those of the parts once more, the source's, and where an image is edited
# the negative prompt's without it.
ALL = slice(None)
PROMPT = slice(1, 2)
"""The row of a prompt of one part."""


def prompt_of_row(inputs: Inputs, guidance: Guidance | None) -> list[int]:
    """Which of the prompts each row reads."""
    parts = range(1, 1 + inputs.weights.shape[-4])
    source = [] if inputs.layout_above is None else [1 + len(parts)]
    perturbed = parts if guidance is not None and guidance.pag_scale is not None else []
    return [0, *parts, *perturbed, *source, *([0] if reads_no_image(guidance) else [])]


def reads_no_image(guidance: Guidance | None) -> bool:
    """Whether there is a last row, of the negative prompt without the image that is edited."""
    return guidance is not None and guidance.image_guidance is not None


def is_one_row(inputs: Inputs, guidance: Guidance) -> bool:
    """Whether the row `PROMPT` holds all that the prompt says, so that it alone serves where nothing is guided."""
    return inputs.layout_above is None and len(prompt_of_row(inputs, guidance)) == 2


class Rows:
    """The denoiser of one image on chosen rows, with everything that its input and attention are changed by."""

    def __init__(
        self,
        family: Family,
        scheduler: SchedulerConfig,
        tile: tuple[int, int] | None,
        params: Params,
        inputs: Inputs,
        prepared: Prepared,
        guidance: Guidance | None,
        deep: Float[Array, "rows h w d"] | None = None,
        steering: Steering | None = None,
    ) -> None:
        """Binds one image's arrays.

        Args:
            family: the networks.
            scheduler: the model's noise schedule and prediction type.
            tile: height and width in latent pixels of the tiles; None is the whole image.
            params: the denoiser's.
            inputs: the image's.
            prepared: what is computed once for the image.
            guidance: says which rows there are.
            deep: features of an earlier step for each row, in place of most of the network.
            steering: control networks.
        """
        self.family, self.params, self.inputs, self.prepared = family, params, inputs, prepared
        self.schedule, self.prediction = make_schedule(scheduler), PREDICTIONS[scheduler.prediction_type]
        self.tile, self.guidance, self.deep = tile, guidance, deep
        self.steering = steering or Steering()
        self.prompts = prompt_of_row(inputs, guidance)

    def guesses(self, x: Latent, sigma: Sigma, rows: slice = ALL) -> Float[Array, "n h w c"]:
        """The rows' guesses of x_0."""
        network = self._network(sigma, rows)
        return make_denoiser(network, self.schedule, self.prediction)(self._spread(x, rows), sigma)

    def deep_features(self, x: Latent, sigma: Sigma, rows: slice = ALL) -> Float[Array, "n h w d"]:
        """The rows' features, for `deep`."""
        x_in = self.prediction.network_input(self._spread(x, rows), sigma)
        return self._network(sigma, rows, only_deep=True)(x_in, sigma_to_t(sigma, self.schedule))

    def _spread(self, x: Latent, rows: slice) -> Float[Array, "n h w c"]:
        n = len(self.prompts[rows])
        return jnp.stack([x] * n if self.inputs.layout_above is None else [x[1]] * (n - 1) + [x[0]])

    def _network(self, sigma: Sigma, rows: slice, only_deep: bool = False) -> NetworkFn:
        chosen, phase = jnp.array(self.prompts[rows]), phase_at(self.inputs, sigma)

        def of_rows(tree: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[phase][chosen], tree)

        conditioning, prepared = of_rows(self.inputs.conditioning), of_rows(self.prepared.prompts)
        n, edits = len(chosen), self._edits(sigma, len(chosen))
        control = partial(self._control, sigma=sigma, rows=rows, conditioning=conditioning, of_rows=of_rows)
        # Features of the latent's size travel beside it, through tiles; others are as large as they are.
        hints = [features for features, _ in self.prepared.controls]
        beside_x = [hint.astype(jnp.float32) for hint in hints if isinstance(hint, jax.Array)]
        channels = self.family.in_channels

        def network(x_in: Float[Array, "n h w c"], t: Float[Array, ""]) -> Array:
            deep, times, added = None if self.deep is None else self.deep[rows], jnp.full(n, t), None
            if hints:
                x_in, *maps = jnp.split(x_in, np.cumsum([channels, *(a.shape[-1] for a in beside_x)])[:-1], axis=-1)
                added = control(x_in, times, iter(maps))
            return self.family.predict(self.params, x_in, times, conditioning, prepared, edits, deep, only_deep, added)

        tiles = network if self.tile is None else tiled(network, self.tile)
        maps = [jnp.broadcast_to(hint, (n, *hint.shape)) for hint in beside_x]
        if self.inputs.extra is not None:
            numbers = np.arange(len(self.prompts))[rows]
            shown = (numbers < len(self.prompts) - reads_no_image(self.guidance)).astype(np.float32)
            maps = [jnp.asarray(shown)[:, None, None, None] * jnp.asarray(self.inputs.extra)[None], *maps]
        return beside(tiles, jnp.concatenate(maps, axis=-1)) if maps else tiles

    def _control(
        self,
        x: Float[Array, "n h w c"],
        t: Float[Array, " n"],
        maps: Iterator[Float[Array, "n h w d"]],
        *,
        sigma: Sigma,
        rows: slice,
        conditioning: Conditioning,
        of_rows: Callable[[Any], Any],
    ) -> Any:
        """What all control networks add to the rows' features together; None where they add to none of them."""
        nets, controls, guess = self.steering
        parts, total = self.inputs.weights.shape[-4], None
        for net, control, (own, keys) in zip(nets, controls, self.prepared.controls, strict=True):
            hint = next(maps) if isinstance(own, jax.Array) else of_all(own, len(x))
            lowest = int(guess or self.family.steers_prompt_alone(net))  # the negative prompt is number 0
            which = np.array([i for i, p in enumerate(self.prompts[rows]) if lowest <= p <= parts], int)
            if not len(which):
                continue
            given = x[..., : self.family.latent_channels], t, conditioning, of_rows(keys), hint
            some = jax.tree.map(lambda leaf, which=which: leaf[which], given)
            add = partial(self.family.control, net, control.params, *some, jnp.asarray(control.scale), guess)
            added = add() if control.low is None or control.high is None else at_levels(add, sigma, control)
            whole = jax.tree.map(lambda a, w=which: jnp.zeros((len(x), *a.shape[1:]), a.dtype).at[w].set(a), added)
            total = whole if total is None else total.plus(whole)
        return total

    def _edits(self, sigma: Sigma, n: int) -> Params | None:
        edits = {}
        if self.guidance is not None and self.guidance.pag_scale is not None:
            parts, row = self.inputs.weights.shape[-4], jnp.arange(n)
            edits |= self.family.perturbed_attention(self.params, (parts < row) & (row <= 2 * parts))
        if self.inputs.layout_above is not None:
            source = jnp.where(sigma >= self.inputs.layout_above, n - 1, jnp.arange(n))
            edits |= self.family.shared_layout(self.params, source)
        return edits or None


def of_all(tree: Any, n: int) -> Any:
    """Arrays of one image for n rows."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n, *leaf.shape)), tree)


def at_levels(fn: Callable[[], Any], sigma: Sigma, control: Control) -> Any:
    """`fn()` at the noise levels at which a control network counts; else zeros, which cost nothing."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(fn))
    return jax.lax.cond((control.low < sigma) & (sigma <= control.high), fn, lambda: zeros)  # pyright: ignore


def beside(network_fn: NetworkFn, maps: Float[AnyArray, "n h w d"]) -> NetworkFn:
    """The network that reads further channels beside the latent's."""

    def network(x_in: Float[Array, "n h w c"], t: Float[Array, ""]) -> Array:
        return network_fn(jnp.concatenate([x_in, maps], axis=-1), t)

    return network


def phase_at(inputs: Inputs, sigma: Sigma) -> Int[Array, ""] | int:
    """The phase that a noise level lies in."""
    phases = inputs.weights.shape[0]
    return 0 if phases == 1 else (sigma <= inputs.starts[1:]).sum()


# One guess ------------------------------------------------------------------------------------------------------------


def image_denoiser(rows: Rows) -> DenoiseFn:
    """The `DenoiseFn` of one image: all rows, guidance, and the parts of the image that are known."""
    inputs, guidance = rows.inputs, rows.guidance
    if guidance is None:  # the prompt alone
        return lambda x, sigma: rows.guesses(x, sigma, PROMPT)[0]

    def combine(guess_fn: Callable[[Latent, Sigma], Array]) -> DenoiseFn:
        return guided(guess_fn, lambda sigma: inputs.weights[phase_at(inputs, sigma)], guidance, rows.prediction)

    def prompt_alone(x: Latent, sigma: Sigma, *memory: Latent) -> Any:
        x_0 = rows.guesses(x, sigma, PROMPT)[0]
        return (x_0, *memory) if memory else x_0

    if reads_no_image(guidance):
        denoise_fn = guided_by_image(rows.guesses, combine, guidance)
    else:
        denoise_fn = combine(rows.guesses) if inputs.layout_above is None else beside_source(rows.guesses, combine)
    if guidance.low is not None and is_one_row(inputs, guidance):  # further rows are needed at every level
        denoise_fn = within(denoise_fn, prompt_alone, guidance)
    if inputs.mask is not None:
        known = partial(inpainted, known=inputs.known, mask=inputs.mask, noise=inputs.noise)  # pyright: ignore
        denoise_fn = passing_memory(known, denoise_fn)
    return denoise_fn


def passing_memory(wrapper: Callable[[DenoiseFn], DenoiseFn], denoise_fn: DenoiseFn) -> DenoiseFn:
    """`wrapper(denoise_fn)`, which hands on what guidance keeps between steps; it may call the function once."""

    def denoise(x: Latent, sigma: Sigma, *memory: Latent) -> Any:
        kept: list[Latent] = []

        def inner(x: Latent, sigma: Sigma) -> Latent:
            nonlocal kept
            out: Any = denoise_fn(x, sigma, *memory)  # pyright: ignore[reportCallIssue]
            x_0, *kept = out if memory else (out,)
            return x_0

        x_0 = wrapper(inner)(x, sigma)
        return (x_0, *kept) if memory else x_0

    return denoise


def beside_source(
    guess_fn: Callable[[Latent, Sigma], Array], combine: Callable[[Callable[[Latent, Sigma], Array]], DenoiseFn]
) -> DenoiseFn:
    """The guesses of a source, whose row is the last, and of the image beside it."""

    def denoise(x: Float[Array, "2 h w c"], sigma: Sigma, *memory: Latent) -> Any:
        guesses = guess_fn(x, sigma)
        out: Any = combine(lambda *_: guesses[:-1])(x[1], sigma, *memory)  # pyright: ignore[reportCallIssue]
        x_0, *kept = out if memory else (out,)
        both = jnp.stack([guesses[-1], x_0])
        return (both, *kept) if memory else both

    return denoise


def cached_features(
    rows: Callable[[Array | None], Rows], sigmas: Float[Array, " n"], sigmas_next: Float[Array, " n"]
) -> Callable[[Latent, Int[Array, ""], Int[Array, ""]], Float[Array, "n h w d"]]:
    """The features that steps `start` to `stop` share: those of step `start` (Ma et al. 2023, DeepCache).

    Where none of these steps is guided, those of the prompt alone, for all rows.
    """
    plain = rows(None)
    inputs, guidance = plain.inputs, plain.guidance
    assert guidance is not None

    def features(x: Latent, start: Int[Array, ""], stop: Int[Array, ""]) -> Float[Array, "n h w d"]:
        sigma = sigmas[start]

        def of(chosen: slice) -> Array:
            deep = plain.deep_features(x * jnp.sqrt(1 + sigma**2), sigma, chosen)
            return jnp.broadcast_to(deep, (len(plain.prompts), *deep.shape[1:]))

        if guidance.low is None or guidance.high is None or not is_one_row(inputs, guidance):
            return of(ALL)
        some = (sigmas_next[stop - 1] <= guidance.high) & (guidance.low <= sigma)
        return jax.lax.cond(some, partial(of, ALL), partial(of, PROMPT))

    return features
