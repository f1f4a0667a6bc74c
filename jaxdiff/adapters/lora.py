"""Low-rank adapters and their kin: from the few tensors that stand for a module's change to the change itself.

Tensors have the names of LyCORIS here, whatever their file calls them, and PyTorch's order: a weight w is [o i] or
[o i h w]. A formula is a function of a module's tensors by name and of w. Its numbers are NumPy's, or only shapes that
JAX traces, so that what does not fit is found without computing it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

_MAX_RANK = 1024
"""Of a Tucker decomposition, where a weight has fewer outputs."""
Tensors = Mapping[str, Any]
"""Of one module: its float32 arrays by name."""


def lora(t: Tensors, w: Any) -> Any:
    """up down (Hu et al. 2021), [o i] or [o i h w]; with `mid` between them, a Tucker decomposition of a kernel."""
    up, down = t["lora_up"], t["lora_down"]
    rank = down.shape[0]
    up = _scale(t, rank) * up.reshape(up.shape[0], -1)
    if "lora_mid" in t:
        return _tucker(t["lora_mid"], up.T, down.reshape(rank, -1))
    return (up @ down.reshape(rank, -1)).reshape(up.shape[0], *down.shape[1:])


def loha(t: Tensors, w: Any) -> Any:
    """The elementwise product of two low-rank matrices, or of two Tucker decompositions (Hyeon-Woo et al. 2021)."""

    def factor(k: int) -> Any:
        a, b = t[f"hada_w{k}_a"], t[f"hada_w{k}_b"]
        return _tucker(t[f"hada_t{k}"], a, b) if f"hada_t{k}" in t else a @ b

    return _scale(t, t["hada_w1_b"].shape[0]) * (factor(1) * factor(2))


def lokr(t: Tensors, w: Any) -> Any:
    """Kronecker's product of two matrices, each whole or a product of two; alpha counts where one is a product."""
    rank = None
    if "lokr_w1" in t:
        w1 = t["lokr_w1"]
    else:
        w1, rank = t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w1_b"].shape[0]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    else:
        a, b = t["lokr_w2_a"], t["lokr_w2_b"]
        rank = b.shape[0]
        w2 = _tucker(t["lokr_t2"], a, b) if "lokr_t2" in t else (a @ b.reshape(rank, -1)).reshape(-1, *b.shape[1:])
    product = _library(w1).kron(w1.reshape(*w1.shape, *(1,) * (len(w2.shape) - 2)), w2)
    return product if rank is None else _scale(t, rank) * product


def difference(name: str) -> Callable[[Tensors, Any], Any]:
    """The change itself, which the file has whole."""
    return lambda t, w: t[name]


def ia3(t: Tensors, w: Any) -> Any:
    """w times a number for each of its inputs or outputs (Liu et al. 2022), which is 0 where nothing was learned."""
    axis = 1 if "ia3_in" in t else 0
    return w * t["ia3_in" if axis else "ia3_out"].reshape([-1 if i == axis else 1 for i in range(len(w.shape))])


def dora(t: Tensors, w: Any, change: Any) -> Any:
    """The change of w where w + `change` gets lengths of its own (Liu et al. 2024), one for each output or input."""
    lengths, new = t["dora_scale"], w + change
    axis = 1 if lengths.shape[0] == 1 and len(lengths.shape) > 1 and lengths.shape[1] > 1 else 0
    others = tuple(i for i in range(len(w.shape)) if i != axis)
    norm = _library(w).sqrt((new**2).sum(others, keepdims=True)) + np.finfo(np.float32).eps
    return new * (lengths.reshape([-1 if i == axis else 1 for i in range(len(w.shape))]) / norm) - w


class Kind(NamedTuple):
    """One way to write a change."""

    formula: Callable[[Tensors, Any], Any]
    names: frozenset[str]
    """The tensors that belong to it; the formula asks for those that it needs."""
    of: str = "weight"
    """What it changes: a module's "weight" or its "bias"."""


def _kind(formula: Callable[[Tensors, Any], Any], names: str, of: str = "weight") -> Kind:
    return Kind(formula, frozenset(names.split()), of)


KINDS = {
    "LoRA": _kind(lora, "lora_up lora_down lora_mid"),
    "LoHa": _kind(loha, "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2"),
    "LoKr": _kind(lokr, "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2"),
    "full weight": _kind(difference("diff"), "diff"),
    "full bias": _kind(difference("diff_b"), "diff_b", "bias"),
    "norm weight": _kind(difference("w_norm"), "w_norm"),
    "norm bias": _kind(difference("b_norm"), "b_norm", "bias"),
    "IA3": _kind(ia3, "ia3_in ia3_out"),
}
"""Every way to write a change; a module may have several, which are added."""
SHARED = frozenset({"alpha", "dora_scale"})
"""Tensors that belong to no kind alone."""


@dataclass(frozen=True)
class Change:
    """The change of one weight or bias."""

    kinds: tuple[str, ...]
    """Names of `KINDS`, one at least."""
    tensors: Tensors
    """Of its module, of any float type."""

    def __call__(self, w: np.ndarray) -> np.ndarray:
        """What is to be added to a float32 array in PyTorch's order, of its shape."""
        return self._of({name: np.asarray(array, np.float32) for name, array in self.tensors.items()}, w)

    def check(self, shape: tuple[int, ...]) -> None:
        """Finds out whether it changes arrays of this shape, without computing the change.

        Raises:
            ValueError: saying what is missing, or both shapes.
        """
        given = {name: jax.ShapeDtypeStruct(array.shape, np.float32) for name, array in self.tensors.items()}
        try:
            jax.eval_shape(self._of, given, jax.ShapeDtypeStruct(shape, np.float32))
        except KeyError as error:
            raise ValueError(f"there is no {error.args[0]}") from None
        except (TypeError, ValueError, IndexError, ZeroDivisionError):
            told = ", ".join(f"{name} {list(array.shape)}" for name, array in sorted(given.items()) if array.shape)
            raise ValueError(f"{told} do not fit the model's {list(shape)}") from None

    def _of(self, t: Tensors, w: Any) -> Any:
        changes = [KINDS[kind].formula(t, w) for kind in self.kinds]
        flat = w.shape[0], math.prod(w.shape[1:])
        for change in changes:
            if _without_ones(change.shape) not in (_without_ones(w.shape), _without_ones(flat)):
                raise ValueError(f"A change of {change.shape} is none of {w.shape}.")
        total = reduce(add, (change.reshape(w.shape) for change in changes))
        return dora(t, w, total) if "dora_scale" in t and len(w.shape) > 1 else total


@dataclass(frozen=True, eq=False)
class Merged:
    """A weight and its changes: an array that is made whenever it is asked for, so that it takes no memory till then.

    NumPy takes it for an array. All changes are those of the weight as it was, so that their order is of no matter.
    """

    weight: Any
    """The array as it was read."""
    axes: tuple[int, ...]
    """The permutation that takes it to PyTorch's order."""
    changes: tuple[tuple[float, Change], ...]
    """Strengths and changes."""

    dtype = np.dtype(np.float32)

    @property
    def parts(self) -> Iterator[Any]:
        """The arrays that it is made of, which may be mapped from files."""
        yield self.weight
        for _, change in self.changes:
            yield from change.tensors.values()

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        """As of an array."""
        return len(self.weight.shape)

    @property
    def size(self) -> int:
        """As of an array."""
        return self.weight.size

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """The weight with its changes: float32, or cast from there.

        Raises:
            ValueError: where it is not wanted as a copy.
        """
        if copy is False:
            raise ValueError("A weight with its changes is made anew for everyone who asks.")
        w = np.array(np.asarray(self.weight).transpose(self.axes), np.float32)
        total = reduce(add, (np.float32(strength) * change(w) for strength, change in self.changes))
        return (w + total).transpose(np.argsort(self.axes)).astype(dtype or np.float32, copy=False)


def _scale(t: Tensors, rank: int) -> Any:
    return t["alpha"] / rank if "alpha" in t else 1.0


def _tucker(core: Any, a: Any, b: Any) -> Any:
    """[o i h w] from the core [r s h w], a [r o] and b [s i].

    Raises:
        ValueError: where `r` is so large that the product of core and b would be larger than any weight.
    """
    if core.shape[0] > max(a.shape[1], _MAX_RANK):
        raise ValueError(f"A rank of {core.shape[0]} is beyond {a.shape[1]} outputs.")
    half = _library(core).einsum("rshw,si->rihw", core, b)
    return (a.T @ half.reshape(half.shape[0], -1)).reshape(a.shape[1], *half.shape[1:])


def _library(array: Any) -> Any:
    return np if isinstance(array, np.ndarray) else jnp


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the sides of 1 at its end."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
