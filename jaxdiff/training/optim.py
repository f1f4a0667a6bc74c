"""Optimisers by name, learning-rate schedules, and rates by path."""

import difflib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from optax.contrib import ScheduleFreeState, schedule_free, schedule_free_eval_params

from jaxdiff.config import OptimConfig
from jaxdiff.runtime.mesh import path_name
from jaxdiff.types import Params

# Learning rates -------------------------------------------------------------------------------------------------------


# (updates made, share of the time that is over or None in a run by steps) -> the rate
Rate = Callable[..., Any]


def learning_rate(config: OptimConfig, steps: int) -> Rate:
    """Linear warm-up to `lr`, then what `config.schedule` names, until `steps`, or in a run by the clock until its end.

    By the clock, the warm-up takes its steps still, and the course after it is that of the time.
    """
    warmup = min(config.warmup_steps, steps - 1)
    first = config.lr / (warmup + 1)  # not 0, which would waste the first batch
    after = DECAYS[config.schedule](config, warmup, steps - warmup)
    by_steps = optax.join_schedules([optax.linear_schedule(first, config.lr, warmup), after], [warmup])
    by_time = DECAYS[config.schedule](config, 0, COURSE)

    def rate(count: Any, progress: Any = None) -> Any:
        if progress is None or config.schedule in ("constant", "rsqrt"):  # which know no end
            return by_steps(count)
        return jnp.minimum(1.0, (count + 1) / (config.warmup_steps + 1)) * by_time(COURSE * progress)

    return rate


COURSE = 1000
"""Parts of a run by the clock, in place of steps."""


def _rsqrt(config: OptimConfig, warmup: int, steps: int) -> optax.Schedule:
    """lr sqrt(warm-up / step) (Vaswani et al. 2017, eq. 3), no lower than the final share."""
    start = max(warmup, 1)

    def rate(step: Any) -> Any:
        share = jnp.sqrt(start / (start + jnp.maximum(step, 0)))  # optax asks for steps of the warm-up, too
        return config.lr * jnp.maximum(config.final_lr_share, share)

    return rate


def _wsd(config: OptimConfig, warmup: int, steps: int) -> optax.Schedule:
    """Warm-up, stable, decay along a line (Hu et al. 2024, section 4)."""
    decay = max(1, min(steps, round(config.decay_share * (warmup + steps))))
    return optax.linear_schedule(config.lr, config.lr * config.final_lr_share, decay, steps - decay)


# (config, steps of the warm-up, steps after it) -> the rate, counted from the end of the warm-up.
DECAYS: dict[str, Callable[[OptimConfig, int, int], optax.Schedule]] = {
    "cosine": lambda config, _, steps: optax.cosine_decay_schedule(config.lr, steps, config.final_lr_share),
    "constant": lambda config, _, steps: optax.constant_schedule(config.lr),
    "linear": lambda config, _, steps: optax.linear_schedule(config.lr, config.lr * config.final_lr_share, steps),
    "rsqrt": _rsqrt,
    "wsd": _wsd,
}


# Optimisers -----------------------------------------------------------------------------------------------------------


def optimiser(
    config: OptimConfig, schedule: Rate, apart: tuple[str, ...] = ()
) -> optax.GradientTransformationExtraArgs:
    """Clips, finds the direction that `config.name` gives, adds weight decay, and scales by the rates.

    In a run by the clock, `update` takes the share of its time that is over as `progress`. It may be told the updates'
    global norm as `norm`, which then is not computed again.

    Gradients are clipped by their norm over all params, but for those of networks that `apart` names, by their own.

    Unlike optax's own `adafactor` and `lion`, all decay alike: by `lr * weight_decay`, but for biases, norms and
    embeddings, whose rows would decay at every step and learn at those that have their token.
    """
    step = optax.chain(
        DIRECTIONS[config.name](config),
        optax.add_decayed_weights(config.weight_decay, _decays),
        _scale_by_path(config.factors),
        _scale_by_rate(schedule),
    )
    if config.name == "schedule_free":
        step = schedule_free(step, schedule, config.b1)
    return _promoting(optax.chain(_clip(config.clip_norm, apart), step))


def _clip(most: float, apart: tuple[str, ...] = ()) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` with a norm that may be known, and by one factor, so that no clipped copy is kept."""

    def clipped(updates: Any, norm: Any = None) -> Any:
        factor = jnp.minimum(1.0, most / (optax.tree.norm(updates) if norm is None else norm))
        return jax.tree.map(lambda u: factor * u, updates)

    def update(updates: Any, state: Any, params: Any = None, *, norm: Any = None, **extra: Any) -> tuple[Any, Any]:
        if not apart:
            return clipped(updates, norm), state
        rest = clipped({name: tree for name, tree in updates.items() if name not in apart})
        return rest | {name: clipped(updates[name]) for name in apart if name in updates}, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _scale_by_rate(rate: Rate) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate` of a schedule that may go by the clock."""

    def update(
        updates: Any, state: Any, params: Any = None, *, progress: Any = None, **extra: Any
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        factor = -rate(state.count, progress)
        return jax.tree.map(lambda u: factor * u, updates), optax.ScaleByScheduleState(state.count + 1)

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    return optax.GradientTransformationExtraArgs(init, update)


def _decays(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p.ndim > 1 and not path_name(path).endswith("embedding"), params
    )


def _promoting(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` whatever `jax_numpy_dtype_promotion` says: optax mixes floats with its counts and with bfloat16 moments."""
    tx = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _adafactor(config: OptimConfig) -> optax.GradientTransformation:
    """Second moments by rows and columns, no first ones, steps relative to weights (Shazeer & Stern 2018, alg. 4)."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Momentum made orthogonal (Jordan et al. 2024), scaled so that AdamW's rates fit (Liu et al. 2025, section 2.2).

    A convolution's kernel [h, w, in, out] counts as the matrix [h w in, out]. What is no matrix between hidden
    features (embeddings, the first and last convolution, biases and norms) takes Adam's steps.
    """

    def kinds(params: Params) -> Any:
        def kind(path: Any, p: Any) -> str:
            hidden = re.fullmatch(r"(?!.*\bconv_(in|out)/).*\bkernel", path_name(path)) and p.ndim > 1
            return "matrix" if hidden else "other"

        return jax.tree_util.tree_map_with_path(kind, params)

    momentum = optax.trace(config.b1, nesterov=True, accumulator_dtype=config.state_dtype)
    return optax.partition(
        {
            "matrix": optax.chain(momentum, optax.stateless(lambda updates, _: orthogonal(updates, config.eps))),
            "other": optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.state_dtype),
        },
        kinds,
    )


def orthogonal(updates: Any, eps: float) -> Any:
    """Every kernel of a tree made about orthogonal, times 0.2 sqrt(its longer side).

    Matrices of one shape are worked on together: 147 of a small UNet are 23 batches, which keep a GPU busier, and
    compile sooner.
    """
    leaves, structure = jax.tree.flatten(updates)
    flat = [leaf.astype(jnp.float32).reshape(-1, leaf.shape[-1]) for leaf in leaves]
    wide = [matrix.T if matrix.shape[0] > matrix.shape[1] else matrix for matrix in flat]
    done = list(wide)
    for shape in sorted({matrix.shape for matrix in wide}):
        places = [i for i, matrix in enumerate(wide) if matrix.shape == shape]
        found = 0.2 * shape[1] ** 0.5 * newton_schulz(jnp.stack([wide[i] for i in places]), eps)
        for i, matrix in zip(places, found, strict=True):
            done[i] = matrix if flat[i].shape == shape else matrix.T
    return structure.unflatten([matrix.reshape(leaf.shape) for matrix, leaf in zip(done, leaves, strict=True)])


def newton_schulz(x: Float[Array, "n r c"], eps: float) -> Float[Array, "n r c"]:
    """Matrices with r <= c whose singular values are brought to between 0.7 and 1.2 (Jordan et al. 2024).

    Five steps of a quintic that is steep at 0. It only multiplies and so is exact enough on any device.
    """
    x /= jnp.sqrt(jnp.square(x).sum((1, 2), keepdims=True)) + eps
    for _ in range(5):
        gram = x @ x.swapaxes(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


DIRECTIONS: dict[str, Callable[[OptimConfig], optax.GradientTransformation]] = {
    # Loshchilov & Hutter 2019.
    "adamw": lambda c: optax.scale_by_adam(c.b1, c.b2, c.eps, mu_dtype=c.state_dtype),
    "adafactor": _adafactor,
    # Chen et al. 2023, algorithm 2.
    "lion": lambda c: optax.scale_by_lion(c.b1, c.b2, mu_dtype=c.state_dtype),
    # Duchi et al. 2011.
    "adagrad": lambda c: optax.scale_by_rss(eps=c.eps),
    "muon": _muon,
    # Defazio et al. 2024, AdamW: `optimiser` wraps the whole step.
    "schedule_free": lambda c: optax.scale_by_rms(c.b2, c.eps, eps_in_sqrt=False, bias_correction=True),
    # Heavy-ball momentum (Polyak 1964).
    "sgd": lambda c: optax.trace(c.b1, accumulator_dtype=c.state_dtype),
}


def evaluated(params: Params, opt: Any) -> Params:
    """The parameters that the optimiser means to be evaluated and averaged: schedule_free's own mean, else `params`."""
    states = jax.tree.leaves(opt, is_leaf=lambda node: isinstance(node, ScheduleFreeState))
    for state in states:
        if isinstance(state, ScheduleFreeState):
            return schedule_free_eval_params(state, params)  # pyright: ignore[reportReturnType, reportArgumentType]
    return params


# Rates by path --------------------------------------------------------------------------------------------------------


def rate_of(path: str, factors: tuple[tuple[str, float], ...]) -> float:
    """What multiplies the learning rate of a parameter: the first pattern that matches its whole path counts."""
    return next((factor for pattern, factor in factors if re.fullmatch(pattern, path)), 1.0)


def check_rates(factors: tuple[tuple[str, float], ...], paths: list[str]) -> None:
    """Refuses a pattern that matches no parameter, with the likeliest path in its place."""
    for pattern, _ in factors:
        if not any(re.fullmatch(pattern, path) for path in paths):
            near = difflib.get_close_matches(pattern, paths, n=1, cutoff=0)
            raise ValueError(f"OptimConfig.rates: {pattern!r} matches no parameter; the nearest is {near[0]!r}.")


def _scale_by_path(factors: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    def scale(updates: Any, _: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, u: rate_of(path_name(path), factors) * u, updates)

    return optax.stateless(scale) if factors else optax.identity()
