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
from jaxdiff.runtime.mesh import BATCH, gather_params, path_name, tree_shardings
from jaxdiff.training.ema import profiles
from jaxdiff.training.optim import check_rates, evaluated, rate_of
from jaxdiff.training.resident import RESIDENT, looked_up
from jaxdiff.types import Key, Params

Batch: TypeAlias = dict[str, Any]
Metrics: TypeAlias = dict[str, Any]
Notes: TypeAlias = dict[str, Array]  # one row a sample

# (params, frozen, batch, key, memory) -> (the mean loss of the samples, metrics, notes)
LossFn: TypeAlias = Callable[[Params, Params, Batch, Key, Any], tuple[Float[Array, ""], Metrics, Notes]]

# (loss, and its arguments) -> (gradients shaped as the params, metrics with "loss", notes)
GradientsFn: TypeAlias = Callable[[LossFn, Params, Params, Batch, Key, Any], tuple[Params, Metrics, Notes]]


def gradients_of_mean(
    loss: LossFn, params: Params, frozen: Params, batch: Batch, key: Key, memory: Any
) -> tuple[Params, Metrics, Notes]:
    """The gradients of the loss at `params`, with its metrics and notes."""

    def with_aux(params: Params) -> tuple[Float[Array, ""], tuple[Metrics, Notes]]:
        value, metrics, notes = loss(params, frozen, batch, key, memory)
        return value, (metrics | {"loss": value}, notes)

    grads, (metrics, notes) = jax.grad(with_aux, has_aux=True)(params)
    return grads, metrics, notes


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
    seconds: Any = None
    """float32: how long the run has trained, where it goes by the clock; else None, which is no leaf."""

    @property
    def average(self) -> Params:
        """What evaluations and exports use: the first profile."""
        return self.ema[min(self.ema)]


@dataclass(frozen=True)
class Task:
    """What is trained. `start` holds the first params as far as they are not random."""

    init: Callable[[Key], Params]
    loss: LossFn
    """Draws for a sample depend on the key and the sample's `index` alone, so that its place in a batch changes
    nothing. What a sample adds to the loss does not depend on other samples either, unless `independent` is False."""
    start: Params | None = None
    frozen: Params = field(default_factory=dict)
    """An argument of the loss, not a constant in it, which merges it with the params: whole networks, or leaves."""
    memory: Any = field(default_factory=dict)
    """The first memory. The loss only reads it; `remember` makes the next one."""
    remember: Callable[[Any, Notes], Any] = lambda memory, notes: memory
    """(memory, the notes of all samples of a step, in the batch's order) -> the next memory."""
    gradients: GradientsFn = gradients_of_mean
    """What the optimiser is given. Another function may clip each sample's gradient and add noise (Abadi et al. 2016),
    set two losses against each other (Goodfellow et al. 2014), or weigh several by the size of their gradients.

    It calls the `loss` that it is given, which spreads parameters over the mesh, and not the task's. The metrics that
    it returns include "loss", and a step is skipped where that is not finite. Of micro-batches, each is handed to it
    with the same key, and the gradients are averaged."""
    independent: bool = True
    """Whether the loss is a mean over samples that do not know of each other. False, as for a contrastive loss, or one
    with weights that depend on the batch, forbids micro-batches, which would change it."""
    apart: tuple[str, ...] = ()
    """Networks among the params that are trained on losses of their own: their gradients are clipped by themselves."""


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
    clocked: bool = False,
) -> TrainState:
    """The first state, each leaf made where it will stay, or with `abstract` the shapes of it, with their shardings.

    `ema` None is the config's default; `clocked` that the run goes by the clock.
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
            seconds=jnp.zeros(()) if clocked else None,
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
    seconds: float = 0,
    several: bool = False,
) -> Callable[[TrainState, Params, Batch, Key], tuple[TrainState, Metrics]]:
    """The compiled step for the shardings of `state`, whose buffers each call reuses.

    The step takes (state, frozen, batch, key); `key` is the run's, the same at every step. Metrics are the task's, and
    `loss`, `grad_norm` (before the clip) and `skipped`, 1 where loss or gradient was not finite: then params, averages,
    optimiser and memory stay as they are, and `step` goes on. `seconds` stays as it is: the caller has the clock.

    Args:
        task: what is trained.
        tx: the optimiser.
        state: the first one, or shapes with shardings in its place.
        ema: the averages; None is the config's default.
        accumulate: micro-batches, taken one after another.
        dtype: what the networks compute in, and matrices are gathered in.
        seconds: how long a run by the clock takes; 0 is one by steps.
        several: the function takes the first `steps` of as many steps as there are batches along a first axis, and
            metrics have that axis: one call in place of many, which are the same steps.

    Raises:
        ValueError: where micro-batches would change the loss, as the task says.
    """
    if accumulate > 1 and not task.independent:
        raise ValueError(
            f"OptimConfig.accumulate is {accumulate}, and the task's loss compares the samples of a batch with each "
            "other, or weighs them by all, so that micro-batches would change it: set accumulate to 1."
        )
    decays = profiles(ema or EMAConfig())
    stored = jax.tree.map(lambda p: p.sharding, state.params)
    mesh = state.step.sharding.mesh

    def step(state: TrainState, frozen: Params, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        batch = looked_up(batch, mesh)
        grads, metrics, notes = gradients(state, frozen, batch, jax.random.fold_in(key, state.step))
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        new = either(finite, updated, skipped, state, grads, norm, notes)
        metrics |= {"grad_norm": norm, "skipped": 1 - finite.astype(jnp.int32)}
        return replace(new, step=state.step + 1), metrics

    def steps(state: TrainState, frozen: Params, batches: Batch, key: Key) -> tuple[TrainState, Metrics]:
        rows = dict(batches)
        count = rows.pop("steps")
        everywhere = {RESIDENT: rows.pop(RESIDENT)} if RESIDENT in rows else {}

        def nth(i: Array) -> Batch:
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), rows) | everywhere

        def take(i: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, metrics = carry
            # With barriers round it the step is compiled as it is alone, and rounds as it does.
            batch, state = jax.lax.optimization_barrier((nth(i), state))
            state, found = jax.lax.optimization_barrier(step(state, frozen, batch, key))
            return state, jax.tree.map(lambda all_, one: all_.at[i].set(one), metrics, found)

        n = len(jax.tree.leaves(rows)[0])
        _, shapes = jax.eval_shape(step, state, frozen, nth(jnp.int32(0)), key)
        metrics = jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), shapes)
        return jax.lax.fori_loop(0, count, take, (state, metrics))

    def gradients(state: TrainState, frozen: Params, batch: Batch, key: Key) -> tuple[Params, Metrics, Notes]:
        frozen = gather_params(frozen, tree_shardings(mesh, frozen), dtype)

        def loss(params: Params, *rest: Any) -> tuple[Float[Array, ""], Metrics, Notes]:
            return task.loss(gather_params(params, stored, dtype), *rest)

        def of_part(part: Batch) -> tuple[Params, Metrics, Notes]:
            grads, metrics, notes = task.gradients(loss, state.params, frozen, part, key, state.memory)
            return jax.lax.with_sharding_constraint(grads, stored), metrics, notes

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # attention's kernels are split over it
            return of_part(batch) if accumulate == 1 else in_parts(of_part, batch, accumulate, mesh)

    def updated(state: TrainState, grads: Params, norm: Array, notes: Notes) -> TrainState:
        clock = {} if state.seconds is None else {"progress": state.seconds / seconds}
        updates, opt = optax.with_extra_args_support(tx).update(grads, state.opt, state.params, norm=norm, **clock)
        params = optax.apply_updates(state.params, updates)
        mean = evaluated(params, opt)  # pyright: ignore[reportArgumentType]: optax has its own Params
        averages = {
            name: optax.incremental_update(mean, state.ema[name], 1 - decay(state.step + 1))
            for name, decay in decays.items()
        }
        memory = task.remember(state.memory, jax.lax.with_sharding_constraint(notes, NamedSharding(mesh, P())))
        none = state.skipped.at[0].set(0)
        return TrainState(state.step, params, averages, opt, memory, none, state.seconds)  # pyright: ignore

    def skipped(state: TrainState, *rest: Any) -> TrainState:
        return replace(state, skipped=state.skipped + 1)

    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def either(
        first: Array, one: Callable[..., TrainState], other: Callable[..., TrainState], *args: Any
    ) -> TrainState:
        # On a CPU, a choice between two values of every leaf has the old ones copied first: of 37 M parameters, 600 MB
        # and a tenth of the step's time. A branch works in place; but a GPU's host would wait for what it depends on.
        if on_cpu:
            return jax.lax.cond(first, one, other, *args)
        return jax.tree.map(lambda a, b: jnp.where(first, a, b), one(*args), other(*args))

    # XLA's CPU compiler (that of jax 0.10) drops barriers before it looks for common subexpressions, takes what remat
    # computes again for the first computation, and keeps that. Left alone, barriers reach the end.
    return jax.jit(
        steps if several else step,
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
