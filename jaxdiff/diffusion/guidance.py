"""Guidance: from the model's guesses for several prompts to one guess, as functions round a `DenoiseFn`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxdiff.diffusion.prediction import Prediction
from jaxdiff.types import DenoiseFn, Latent, Sigma

Scale = Float[Array, ""] | float | np.floating
Guesses = Float[Array, "n h w c"]
# sigma -> how much each prompt counts, everywhere or pixel by pixel.
WeightsFn = Callable[[Sigma], Float[Array, "parts #h #w 1"]]


class Guidance(NamedTuple):
    """How hard to follow the prompt, how, and at which noise levels."""

    scale: Scale
    """The scale of classifier-free guidance: 1 is the prompt's guess, 0 the negative prompt's (Ho & Salimans 2022)."""
    rescale: Scale = np.float32(0)
    """How much of the contrast that guidance adds is taken back, 0 to 1; see `rescaled`."""
    apg_eta: Scale = np.float32(1)
    """The share of guidance along the guess itself that is left, 1 is all; see `projected`."""
    apg_norm_threshold: Scale = np.float32(np.inf)
    """The largest norm of guidance's direction; see `projected`."""
    apg_momentum: Scale | None = None
    """The share of the direction of earlier steps that is added to the direction (Sadat et al. 2024, eq. 10)."""
    low: Scale | None = None
    """The lowest and the highest sigma that are guided; None guides all."""
    high: Scale | None = None
    pag_scale: Scale | None = None
    """The scale of perturbed-attention guidance (Ahn et al. 2024, eq. 13); None asks for no such guess."""
    image_guidance: Scale | None = None
    """The scale of guidance by the image that is edited (Brooks et al. 2023, eq. 3); None asks for no such guess."""

    def memory(self, x_0: Latent) -> tuple[Latent, ...]:
        """What guidance keeps between steps (see `jaxdiff.sampling.loop.State`), before the first step; `x_0` gives the
        shape."""
        return () if self.apg_momentum is None else (jnp.zeros_like(x_0),)

    def at(self, sigma: Sigma) -> Bool[Array, ""]:
        """Whether this level is guided (Kynkäänniemi et al. 2024, eq. 5)."""
        if self.low is None or self.high is None:
            return jnp.array(True)
        return jnp.logical_and(self.low <= sigma, sigma <= self.high)


def guided(
    guess_fn: Callable[[Latent, Sigma], Guesses], weights_fn: WeightsFn, guidance: Guidance, prediction: Prediction
) -> DenoiseFn:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): extrapolates from the negative prompt's guess x_u through
    the prompt's guess x_c, both of one call of the network.

    Args:
        guess_fn: gives the guess for the negative prompt, then one for each part of the prompt, then (where
            `guidance.pag_scale` is a number) one for each part with perturbed attention.
        weights_fn: gives the parts' weights. What their sum lacks of 1 is the negative prompt's weight: weights that
            add up to 1 blend, and others compose (Liu et al. 2022, eq. 11); pixel by pixel, they lay prompts out over
            the image (Bar-Tal et al. 2023).
        guidance: scale 1 and no more is the weighted guess itself, bit for bit; at levels that are not guided, the
            scale is 1.
        prediction: what the network predicts, for `rescaled`.
    """

    def denoise(x: Latent, sigma: Sigma, *memory: Latent) -> Any:
        guesses, weights = guess_fn(x, sigma), weights_fn(sigma)
        x_u, x_parts = guesses[0], guesses[1 : 1 + len(weights)]
        x_c = (weights * x_parts).sum(0) + (1 - weights.sum(0)) * x_u
        here = guidance.at(sigma)
        scale = jnp.where(here, guidance.scale, 1.0)
        # Not x_u + scale * (x_c - x_u): so, scale 1 is exact.
        direction = x_c - x_u
        if guidance.apg_momentum is not None:
            direction += guidance.apg_momentum * memory[0]
            memory = (direction,)
        x_0 = x_c + (scale - 1) * projected(direction, x_c, guidance.apg_eta, guidance.apg_norm_threshold)
        if guidance.pag_scale is not None:
            away = (weights * (x_parts - guesses[1 + len(weights) :])).sum(0)
            x_0 += jnp.where(here, guidance.pag_scale, 0.0) * away
        x_0 = rescaled(x_0, x_c, x, sigma, jnp.where(here, guidance.rescale, 0.0), prediction)
        return (x_0, *memory) if memory else x_0

    return denoise


def guided_by_image(
    guess_fn: Callable[[Latent, Sigma], Guesses],
    combine: Callable[[Callable[[Latent, Sigma], Guesses]], DenoiseFn],
    guidance: Guidance,
) -> DenoiseFn:
    """Guidance by prompts and by the image that is edited (Brooks et al. 2023, InstructPix2Pix, eq. 3).

    Args:
        guess_fn: gives what `guided` reads, all with the image, and last the negative prompt's guess without it.
        combine: `guided` of such a function.
        guidance: with `image_guidance`; 1 adds nothing.
    """

    def denoise(x: Latent, sigma: Sigma, *memory: Latent) -> Any:
        guesses = guess_fn(x, sigma)
        out: Any = combine(lambda *_: guesses[:-1])(x, sigma, *memory)  # pyright: ignore[reportCallIssue]
        x_0, *kept = out if memory else (out,)
        scale = jnp.where(guidance.at(sigma), guidance.image_guidance, 1.0)  # pyright: ignore[reportArgumentType]
        x_0 += (scale - 1) * (guesses[0] - guesses[-1])
        return (x_0, *kept) if memory else x_0

    return denoise


def projected(direction: Latent, x_c: Latent, parallel: Scale, limit: Scale) -> Latent:
    """Adaptive projected guidance (Sadat et al. 2024, eq. 7 to 9): at most `limit` long, and only
    the share `parallel` of what lies along the guess, which makes colours glare. 1 and infinity change nothing."""
    squared = jnp.square(direction).sum()
    over = jnp.sqrt(squared) > limit
    # Where nothing is limited, neither number plays a part, so that the slope there is 1, and not infinity times 0.
    direction *= jnp.where(over, limit, 1.0) / jnp.sqrt(jnp.where(over, squared, 1.0))
    along = (direction * x_c).sum() / jnp.maximum(jnp.square(x_c).sum(), 1e-30) * x_c
    return direction - (1 - parallel) * along


def rescaled(x_0: Latent, x_c: Latent, x: Latent, sigma: Sigma, share: Scale, prediction: Prediction) -> Latent:
    """Brings the network's output, as guidance has it, `share` of the way to the deviation that it has without
    (Lin et al. 2024, eq. 15 and 16): less glare. 0 changes nothing, bit for bit."""

    def output(guess: Latent) -> Latent:
        return prediction.target(guess, (x - guess) / sigma, sigma)

    out = output(x_0)
    ratio = jnp.std(output(x_c)) / jnp.maximum(jnp.std(out), 1e-30)
    # x_0 is affine in the output, so that a change of the output is a change of x_0 at x = 0.
    return x_0 + prediction.x_0(share * (ratio - 1) * out, jnp.zeros_like(x), sigma)


def within(inside: DenoiseFn, outside: DenoiseFn, guidance: Guidance) -> DenoiseFn:
    """`inside` at the levels that are guided, `outside` elsewhere.

    Only one of them is computed, also under `vmap` over images that share their level.
    """

    def denoise(x: Latent, sigma: Sigma, *memory: Array) -> Any:
        return jax.lax.cond(guidance.at(sigma), inside, outside, x, sigma, *memory)

    return denoise
