"""The state of a run and the step that advances it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxdiff.sharding import gathered, tree_shardings
from jaxdiff.types import Key, Params

Batch: TypeAlias = dict[str, Any]
Metrics: TypeAlias = dict[str, Any]

# (params, frozen, batch, key) -> (loss, metrics)
LossFn: TypeAlias = Callable[[Params, Params, Batch, Key], tuple[Float[Array, ""], Metrics]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint holds; the key is a function of the config's seed and `step`."""

    step: Any  # an int32 scalar, or what a tree map puts in its place
    params: Params
    ema: Params
    opt: Any


@dataclass(frozen=True)
class Task:
    """What is trained. `start` None means random weights; `frozen` is an argument of the loss, not a constant in it."""

    init: Callable[[Key], Params]
    loss: LossFn
    start: Params | None = None
    frozen: Params | None = None


def apply(module: Any, params: Params, *args: Any, **kwargs: Any) -> Any:
    """The network at these parameters; linen's own `apply` has a return type that no type checker can use."""
    return module.apply({"params": params}, *args, **kwargs)


def create_state(task: Task, tx: optax.GradientTransformation, key: Key, mesh: Mesh) -> TrainState:
    """The first state, each leaf made where it will stay."""

    def init(key: Key, start: Params | None) -> TrainState:
        params = task.init(key) if start is None else jax.tree.map(lambda p: p.astype(jnp.float32), start)
        # The EMA is a copy: donated buffers must not be shared.
        return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), tx.init(params))

    shardings = tree_shardings(mesh, jax.eval_shape(init, key, task.start))
    return jax.jit(init, out_shardings=shardings)(key, task.start)


def train_step(
    state: TrainState,
    frozen: Params | None,
    batch: Batch,
    key: Key,
    *,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    ema_decay: float,
) -> tuple[TrainState, Metrics]:
    """One optimiser step; `key` is the run's, the same at every step. Metrics gain `loss` and `grad_norm`."""
    step_key = jax.random.fold_in(key, state.step)
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, frozen, batch, step_key)
    updates, opt = tx.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    # A young average forgets faster, so that early evaluations do not show the random start.
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema = optax.incremental_update(params, state.ema, 1 - decay)
    new = TrainState(state.step + 1, params, ema, opt)  # pyright: ignore[reportArgumentType]: optax has its own Params
    return new, metrics | {"loss": loss, "grad_norm": optax.tree.norm(grads)}


def make_step(
    task: Task, tx: optax.GradientTransformation, ema_decay: float, state: TrainState
) -> Callable[[TrainState, Params | None, Batch, Key], tuple[TrainState, Metrics]]:
    """`train_step` compiled for the shardings of `state`, whose buffers each call reuses."""

    whole = jax.tree.map(lambda p: gathered(p.sharding), state.params)

    def loss(params: Params, frozen: Any, batch: Batch, key: Key) -> tuple[Float[Array, ""], Metrics]:
        return task.loss(jax.lax.with_sharding_constraint(params, whole), frozen, batch, key)

    def step(state: TrainState, frozen: Params | None, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        return train_step(state, frozen, batch, key, loss_fn=loss, tx=tx, ema_decay=ema_decay)

    return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda a: a.sharding, state), None))
