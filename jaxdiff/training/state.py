"""The state of a run and the step that advances it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.config import EMAConfig
from jaxdiff.sharding import BATCH, gather_params, path_name, tree_shardings
from jaxdiff.training.ema import profiles
from jaxdiff.training.optim import check_rates, evaluated, rate_of
from jaxdiff.types import Key, Params

Batch: TypeAlias = dict[str, Any]
Metrics: TypeAlias = dict[str, Any]
Notes: TypeAlias = dict[str, Array]  # one row a sample

# (params, frozen, batch, key, memory) -> (the mean loss of the samples, metrics, notes)
LossFn: TypeAlias = Callable[[Params, Params, Batch, Key, Any], tuple[Float[Array, ""], Metrics, Notes]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint holds; the key is a function of the config's seed and `step`."""

    step: Any  # an int32 scalar, or what a tree map puts in its place
    params: Params
    """What is trained, in float32."""
    ema: dict[str, Params]
    """Averages of `params` by the names of their profiles, in the order of these."""
    opt: Any
    memory: Any
    """What the objective remembers from step to step, {} if nothing."""
    skipped: Any
    """int32 [2]: updates left out because loss or gradient was not finite, in a row and in all."""

    @property
    def average(self) -> Params:
        """What evaluations and exports use: the first profile."""
        return self.ema[min(self.ema)]


@dataclass(frozen=True)
class Task:
    """What is trained. `start` holds the first params as far as they are not random."""

    init: Callable[[Key], Params]
    loss: LossFn
    """Draws for a sample depend on the key and the sample's `index` alone, and what a sample adds to the loss not on
    other samples: so micro-batches, and places in a batch, change nothing."""
    start: Params | None = None
    frozen: Params = field(default_factory=dict)
    """An argument of the loss, not a constant in it, which merges it with the params: whole networks, or leaves."""
    memory: Any = field(default_factory=dict)
    """The first memory. The loss only reads it; `remember` makes the next one."""
    remember: Callable[[Any, Notes], Any] = lambda memory, notes: memory
    """(memory, the notes of all samples of a step, in the batch's order) -> the next memory."""


def apply(module: Any, params: Params, *args: Any, **kwargs: Any) -> Any:
    """The network at these parameters; linen's own `apply` has a return type that no type checker can use."""
    return module.apply({"params": params}, *args, **kwargs)


def merge(under: Params, over: Params) -> Params:
    """Both trees in one; a leaf of `over` takes the place of one of `under`."""
    both = {name: merge(under[name], over[name]) for name in under.keys() & over.keys() if isinstance(over[name], dict)}
    return under | over | both


def select(tree: Params, keep: Callable[[str], bool], prefix: str = "") -> Params:
    """The leaves whose path, as `unet/conv_in/kernel`, `keep` wants."""
    out = {}
    for name, value in tree.items():
        path = prefix + name
        if not isinstance(value, dict):
            out |= {name: value} if keep(path) else {}
        elif below := select(value, keep, f"{path}/"):
            out[name] = below
    return out


def freeze(task: Task, factors: tuple[tuple[str, float], ...]) -> Task:
    """The task with the params whose rate is 0 among the frozen ones.

    Raises:
        ValueError: where a pattern matches no parameter, or one that is to be frozen would stay as it was drawn.
    """
    paths = _paths(jax.eval_shape(task.init, jax.random.key(0)))
    check_rates(factors, paths)
    frozen = {path for path in paths if rate_of(path, factors) == 0}
    if len(frozen) == len(paths):
        raise ValueError("OptimConfig.rates freezes every parameter; nothing would be trained.")
    start = task.start or {}
    if random := sorted(frozen - set(_paths(start))):
        raise ValueError(f"OptimConfig.rates would freeze {random[0]!r} at its random start; train it, or name a "
                         "folder with its weights in the task's init.")  # fmt: skip

    def trained(tree: Params) -> Params:
        return select(tree, lambda path: path not in frozen)

    return replace(
        task,
        init=lambda key: trained(task.init(key)),
        start=trained(start),
        frozen=merge(task.frozen, select(start, frozen.__contains__)),
    )


def _paths(tree: Params) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def create_state(
    task: Task,
    tx: optax.GradientTransformation,
    key: Key,
    mesh: Mesh,
    ema: EMAConfig | None = None,
    abstract: bool = False,
) -> TrainState:
    """The first state, each leaf made where it will stay, or with `abstract` the shapes of it, with their shardings.

    `ema` None is the config's default.
    """
    names = profiles(ema or EMAConfig())

    def init(key: Key, start: Params, memory: Any) -> TrainState:
        params = merge(task.init(key), jax.tree.map(lambda p: p.astype(jnp.float32), start))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema={name: jax.tree.map(jnp.copy, params) for name in names},  # donated buffers must not be shared
            opt=tx.init(params),
            memory=memory,
            skipped=jnp.zeros(2, jnp.int32),
        )

    start = task.start or {}
    shapes = jax.eval_shape(init, key, start, task.memory)
    shardings = tree_shardings(mesh, shapes)
    if abstract:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return jax.jit(init, out_shardings=shardings)(key, start, task.memory)


def make_step(
    task: Task,
    tx: optax.GradientTransformation,
    state: TrainState,
    ema: EMAConfig | None = None,
    accumulate: int = 1,
    dtype: DTypeLike = jnp.float32,
) -> Callable[[TrainState, Params, Batch, Key], tuple[TrainState, Metrics]]:
    """The compiled step for the shardings of `state`, whose buffers each call reuses.

    The step takes (state, frozen, batch, key); `key` is the run's, the same at every step. Metrics are the task's, and
    `loss`, `grad_norm` (before the clip) and `skipped`, 1 where loss or gradient was not finite: then params, averages,
    optimiser and memory stay as they are, and `step` goes on.

    Args:
        task: what is trained.
        tx: the optimiser.
        state: the first one, or shapes with shardings in its place.
        ema: the averages; None is the config's default.
        accumulate: micro-batches, taken one after another.
        dtype: what the networks compute in, and matrices are gathered in.
    """
    decays = profiles(ema or EMAConfig())
    stored = jax.tree.map(lambda p: p.sharding, state.params)
    mesh = state.step.sharding.mesh

    def step(state: TrainState, frozen: Params, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        frozen = gather_params(frozen, tree_shardings(mesh, frozen), dtype)

        def loss_fn(params: Params, part: Batch) -> tuple[Float[Array, ""], tuple[Metrics, Notes]]:
            params = gather_params(params, stored, dtype)
            loss, metrics, notes = task.loss(params, frozen, part, step_key, state.memory)
            return loss, (metrics | {"loss": loss}, notes)

        def gradients(part: Batch) -> tuple[Params, Metrics, Notes]:
            grads, (metrics, notes) = jax.grad(loss_fn, has_aux=True)(state.params, part)
            return jax.lax.with_sharding_constraint(grads, stored), metrics, notes

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # attention's kernels are split over it
            taken = gradients(batch) if accumulate == 1 else in_parts(gradients, batch, accumulate, mesh)
        grads, metrics, notes = taken
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)

        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        mean = evaluated(params, opt)  # pyright: ignore[reportArgumentType]: optax has its own Params
        averages = {
            name: optax.incremental_update(mean, state.ema[name], 1 - decay(state.step + 1))
            for name, decay in decays.items()
        }
        memory = task.remember(state.memory, jax.lax.with_sharding_constraint(notes, NamedSharding(mesh, P())))
        new = TrainState(state.step, params, averages, opt, memory, state.skipped.at[0].set(0))  # pyright: ignore
        old = replace(state, skipped=state.skipped + 1)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        metrics |= {"grad_norm": norm, "skipped": 1 - finite.astype(jnp.int32)}
        return replace(kept, step=state.step + 1), metrics

    # XLA's CPU compiler (that of jax 0.10) drops barriers before it looks for common subexpressions, takes what remat
    # computes again for the first computation, and keeps that. Left alone, barriers reach the end.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda a: a.sharding, state), None),
        compiler_options={"xla_disable_hlo_passes": "cse_barrier_expander"} if on_cpu else None,
    )


def in_parts(
    gradients: Callable[[Batch], tuple[Params, Metrics, Notes]], batch: Batch, n: int, mesh: Mesh
) -> tuple[Params, Metrics, Notes]:
    """The means of gradients and metrics over `n` parts of the batch, and the notes in the batch's own order.

    Part i is the rows i, i + n, ...: of every device's rows as many, so that none moves.
    """

    def split(x: Array) -> Array:
        x = x.reshape(len(x) // n, n, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, *BATCH)))

    def add(sums: Any, part: Batch) -> tuple[Any, Notes]:
        grads, metrics, notes = gradients(part)
        return jax.tree.map(jnp.add, sums, (grads, metrics)), notes

    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[:2])
    sums, notes = jax.lax.scan(add, zeros, parts)
    grads, metrics = jax.tree.map(lambda x: x / n, sums)
    return grads, metrics, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), notes)
