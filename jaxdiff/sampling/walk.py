"""What all samplers share: where a walk stands, its noise, and the loop over a grid."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.sampling.grids import Grid
from jaxdiff.types import DenoiseFn, Key, Latent, Sigma

# k -> the k-th unit normal latent of a walk; or `silence`.
NoiseFn = Callable[[Int[Array, ""]], Latent | Float[Array, ""]]
Index = Int[Array, ""] | int
Scalar = Float[Array, ""] | float
# What a sampler remembers, newest first. Five is the most that any needs, and the same for all, so that whoever runs a
# walk in pieces need not know the sampler.
MEMORY = 5
Past = Float[Array, "5 *b h w c"]


class State(NamedTuple):
    """All that the next step needs, so that a walk taken in pieces is the same walk."""

    x: Latent
    """x / sqrt(1 + sigma^2): unit variance, and x_0 itself where the walk has come to sigma 0."""
    past: Past
    """What the sampler keeps of its last steps."""
    taken: Int[Array, ""]
    """How many steps were taken. A walk may begin in the middle of a grid, and has no past there."""


class Step(NamedTuple):
    """Where step i of a grid goes."""

    i: Int[Array, ""]
    taken: Int[Array, ""]
    sigma: Sigma
    sigma_next: Sigma
    before: Float[Array, " 5"]
    """The levels that steps i - 1, i - 2, ... read."""
    left: Int[Array, ""]
    """How many steps the grid has from here, this one counted."""
    of: Int[Array, ""]
    """How many it has in all."""


# (x at step.sigma, past, step) -> x at step.sigma_next, past.
StepFn = Callable[[Latent, Past, Step], tuple[Latent, Past]]


def begin(x_T: Latent) -> State:
    """A walk that has not taken a step yet, from unit normal noise or from x / sqrt(1 + sigma^2) at a grid's level."""
    return State(x_T, jnp.zeros((MEMORY, *x_T.shape), x_T.dtype), jnp.zeros((), jnp.int32))


def keyed_noise(key: Key, shape: tuple[int, ...]) -> NoiseFn:
    """Noise k from `fold_in(key, k)`: an image's own, whatever is drawn beside it."""
    return lambda k: jax.random.normal(jax.random.fold_in(key, k), shape)


def silence(k: Int[Array, ""]) -> Float[Array, ""]:
    """The noise of a walk that has none, so that none is drawn."""
    return jnp.zeros(())


def walk(step_fn: StepFn, state: State, grid: Grid, start: Index, stop: Index) -> State:
    """Steps `start` ... `stop - 1` of the grid. Both ends may be traced."""
    sigmas, sigmas_next = map(jnp.asarray, grid)
    count = jnp.count_nonzero(sigmas)

    def body(i: Int[Array, ""], state: State) -> State:
        before = sigmas[jnp.maximum(i - 1 - jnp.arange(MEMORY), 0)]
        step = Step(i, state.taken, sigmas[i], sigmas_next[i], before, count - i, count)
        x, past = step_fn(state.x * jnp.sqrt(1 + step.sigma**2), state.past, step)
        return State(x / jnp.sqrt(1 + step.sigma_next**2), past, state.taken + 1)

    return jax.lax.fori_loop(start, stop, body, state)


def remember(past: Past, *new: Latent) -> Past:
    """The past with `new` before it, and as much of its end forgotten."""
    return jnp.concatenate([jnp.stack(new), past[: MEMORY - len(new)]])


def combine(weights: Float[Array, " n"], *terms: Latent | Past) -> Latent:
    """The weighted sum of latents, or of a stack of them."""
    stack = jnp.concatenate([term if term.ndim > terms[0].ndim else term[None] for term in terms])
    return jnp.tensordot(weights, stack[: len(weights)], axes=1)


def ancestral(sigma: Sigma, sigma_next: Sigma, eta: Scalar = 1.0) -> tuple[Sigma, Sigma]:
    """(s_down, s_up): go to s_down, add s_up of noise, and arrive at the variance of sigma_next (Song et al. 2021,
    eq. 16, divided by sqrt(alpha_bar_next)).

    With alpha_bar = 1 / (1 + sigma^2), their sigma_t^2 = eta^2 (1 - a')/(1 - a) (1 - a/a') becomes
    s_up^2 = eta^2 sigma'^2 (1 - sigma'^2/sigma^2), and their 1 - a' - sigma_t^2 becomes s_down^2 = sigma'^2 - s_up^2.
    """
    ratio = sigma_next / sigma
    lost = (1 - ratio) * (1 + ratio)  # as a product, exactly 0 for a step that stays
    s_up = eta * sigma_next * jnp.sqrt(lost)
    # Not sigma'^2 - s_up^2: rounding would leave little of a long step's.
    return sigma_next * jnp.sqrt((1 - eta**2) * lost + ratio**2), s_up


def clipped(denoise_fn: DenoiseFn, limit: float | None) -> DenoiseFn:
    """Keeps the guess of x_0 in [-limit, limit]; None is the model as it is."""
    if limit is None:
        return denoise_fn
    return lambda x, sigma: jnp.clip(denoise_fn(x, sigma), -limit, limit)


def unless_last(step: Step, more: Callable[[Latent], Latent], x: Latent) -> Latent:
    """`more(x)`, but x itself where the step ends at sigma 0: there the model cannot be asked again."""
    at_end: Bool[Array, ""] = step.sigma_next == 0
    return jax.lax.cond(at_end, lambda x: x, more, x)
