"""The sampling loop, and what samplers share.

A sampler is a function of the denoiser and the noise that returns a `StepFn`, the body of the loop.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.sampling.sigmas import Sigmas
from jaxdiff.types import DenoiseFn, Key, Latent, Sigma

# k -> the k-th unit normal latent; or `no_noise`.
NoiseFn = Callable[[Int[Array, ""]], Latent | Float[Array, ""]]
Index = Int[Array, ""] | int
Scalar = Float[Array, ""] | float
# How many latents of earlier steps are kept. The number is that of the sampler that needs the most, and the same for
# all samplers, so that a state can be stored and resumed whatever the sampler.
HISTORY = 5
History = Float[Array, "5 *b h w c"]


class State(NamedTuple):
    """The sampling loop between two steps: a loop that goes on from it takes the same steps as one that never ended."""

    x: Latent
    """x / sqrt(1 + sigma^2): unit variance, and x_0 itself where the last step ended at sigma 0."""
    history: History
    """What the sampler keeps of earlier steps, newest first; zeros before any."""
    taken: Int[Array, ""]
    """How many steps were taken. A loop may start at a later step than 0 and has no history there."""
    guess: Latent
    """The denoiser's guess of x_0 in the last step, from its first call; zeros before any."""
    memory: tuple[Array, ...] = ()
    """What the denoiser keeps between steps, where it keeps anything: it is then called as (x, sigma, *memory), and
    returns x_0 and the new memory. That of a step's first call is kept."""


class Step(NamedTuple):
    """Where a step of the loop starts and ends."""

    index: Int[Array, ""]
    """Its place in `Sigmas`, from 0."""
    taken: Int[Array, ""]
    """How many steps were taken before."""
    sigma: Sigma
    """The level at which the step reads x."""
    sigma_next: Sigma
    """The level at which it leaves x."""
    sigma_reached: Sigma
    """The level at which the step before left x; usually `sigma`."""
    sigmas_before: Float[Array, " 5"]
    """The levels at which the steps before read x, newest first."""
    steps_left: Int[Array, ""]
    """How many steps there are from here on, this one included."""
    steps: Int[Array, ""]
    """How many steps there are in all."""


StepFn = Callable[[Latent, History, Step], tuple[Latent, History]]
"""(x at step.sigma, history, step) -> (x at step.sigma_next, history), where x = x_0 + sigma eps.

The first call of the denoiser must be outside of any `lax.cond` and `lax.scan`: the loop records its result, the guess
of x_0, while JAX traces the step.
"""
SamplerFn = Callable[[DenoiseFn, NoiseFn], StepFn]


def sampling_loop(
    sampler: SamplerFn,
    denoise_fn: DenoiseFn,
    noise_fn: NoiseFn,
    state: State,
    sigmas: Sigmas,
    start: Index,
    stop: Index,
) -> State:
    """Takes the steps from `start` to `stop - 1`.

    Args:
        sampler: makes the step function; its options, such as eta, are bound by `functools.partial`.
        denoise_fn: the model.
        noise_fn: gives the noise of random steps; step i takes noise i.
        state: where the loop stands, from `begin` or from an earlier call.
        sigmas: the noise levels.
        start: the first step; it may be traced.
        stop: the first step that is not taken any more; it may be traced.

    Returns:
        The state after the last step, at the level `sigmas.sigmas_next[stop - 1]`.
    """
    read, reached = map(jnp.asarray, sigmas)
    count = jnp.count_nonzero(read)

    def body(i: Int[Array, ""], state: State) -> State:
        calls: list[tuple[Latent, tuple[Array, ...]]] = []

        def recorded(x: Latent, sigma: Sigma) -> Latent:
            out = denoise_fn(x, sigma, *state.memory)
            x_0, *memory = out if state.memory else (out,)
            calls.append((x_0, tuple(memory)))
            return x_0

        step = Step(
            index=i,
            taken=state.taken,
            sigma=read[i],
            sigma_next=reached[i],
            sigma_reached=reached[jnp.maximum(i - 1, 0)],
            sigmas_before=read[jnp.maximum(i - 1 - jnp.arange(HISTORY), 0)],
            steps_left=count - i,
            steps=count,
        )
        step_fn = sampler(recorded, noise_fn)
        x, history = step_fn(state.x * jnp.sqrt(1 + step.sigma**2), state.history, step)
        return State(x / jnp.sqrt(1 + step.sigma_next**2), history, state.taken + 1, *calls[0])

    return jax.lax.fori_loop(start, stop, body, state)


def begin(x_T: Latent) -> State:
    """The state before the first step, from unit normal noise or from x / sqrt(1 + sigma^2) at a later step's level."""
    history = jnp.zeros((HISTORY, *x_T.shape), x_T.dtype)
    return State(x_T, history, jnp.zeros((), jnp.int32), jnp.zeros_like(x_T))


def keyed_noise(key: Key, shape: tuple[int, ...]) -> NoiseFn:
    """Noise k is drawn with `fold_in(key, k)`, and so depends on the image's key alone."""
    return lambda k: jax.random.normal(jax.random.fold_in(key, k), shape)


def no_noise(k: Int[Array, ""]) -> Float[Array, ""]:
    """Zero in place of noise, for deterministic samplers: nothing is drawn."""
    return jnp.zeros(())


def push(history: History, *new: Latent) -> History:
    """Puts `new` latents, newest first, before the history, and drops as many of the oldest."""
    return jnp.concatenate([jnp.stack(new), history[: HISTORY - len(new)]])


def weighted_sum(weights: Float[Array, " n"], *terms: Latent | History) -> Latent:
    """The sum of the first n latents by weight; a history among the terms stands for its latents in turn."""
    stack = jnp.concatenate([term if term.ndim > terms[0].ndim else term[None] for term in terms])
    return jnp.tensordot(weights, stack[: len(weights)], axes=1)


def ancestral(sigma: Sigma, sigma_next: Sigma, eta: Scalar = 1.0) -> tuple[Sigma, Sigma]:
    """(s_down, s_up): a step to s_down and noise of deviation s_up arrive at the variance of sigma_next (Song et al.
    2021, eq. 16, divided by sqrt(alpha_bar_next)).

    With alpha_bar = 1 / (1 + sigma^2), their sigma_t^2 = eta^2 (1 - a')/(1 - a) (1 - a/a') becomes
    s_up^2 = eta^2 sigma'^2 (1 - sigma'^2/sigma^2), and their 1 - a' - sigma_t^2 becomes s_down^2 = sigma'^2 - s_up^2.
    """
    ratio = sigma_next / sigma
    lost = (1 - ratio) * (1 + ratio)  # the product is exactly 0 for a step that stays
    s_up = eta * sigma_next * jnp.sqrt(lost)
    # Not sigma'^2 - s_up^2: rounding would leave little of a long step's.
    return sigma_next * jnp.sqrt((1 - eta**2) * lost + ratio**2), s_up


def clipped(denoise_fn: DenoiseFn, limit: float | None) -> DenoiseFn:
    """Keeps the guess of x_0 in [-limit, limit]; with None, the guess is left as it is."""
    if limit is None:
        return denoise_fn
    return lambda x, sigma: jnp.clip(denoise_fn(x, sigma), -limit, limit)


def to_eps(x: Latent, x_0: Latent, sigma: Sigma) -> Latent:
    """The noise in x = x_0 + sigma eps: the slope dx/dsigma of the probability flow (Karras et al. 2022, eq. 4)."""
    return (x - x_0) / sigma


def unless_last(step: Step, more: Callable[[Latent], Latent], x: Latent) -> Latent:
    """`more(x)`, or x itself where the step ends at sigma 0: there the denoiser cannot be called again."""
    at_end: Bool[Array, ""] = step.sigma_next == 0
    return jax.lax.cond(at_end, lambda x: x, more, x)
