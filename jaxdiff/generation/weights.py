"""From params as they are read to params on devices: cast, placed, and for CPUs put in the form that is fastest."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxdiff.io.mapped import check_unchanged, release
from jaxdiff.nn.conv import prepare
from jaxdiff.nn.linear import narrow
from jaxdiff.runtime.compile import is_large
from jaxdiff.runtime.memory import memory_bytes
from jaxdiff.types import Params

Memory = Literal["normal", "low", "lowest"]
ALIGNED = 64
"""Bytes; where memory has to begin for XLA's CPU devices to use it without a copy."""
STEPS = "denoiser"
"""The role of the network that is called at every step, for which a faster form is worth its memory."""
CONTROL = "control"
"""What roles of networks begin with that are called at the same steps: control0 and so on."""

IMAGE_ENCODER = "image_encoder"
"""The role of a network that reads images beside prompts."""
IP_ADAPTER = "ip_adapter"
"""What roles begin with of networks that make images prompts: ip_adapter0 and so on."""

PREVIEW = "preview"
"""The role of a tiny autoencoder, which stays beside the networks of the steps."""

Path = tuple[str, ...]
logger = logging.getLogger(__name__)


def check_memory(memory: Any) -> Memory:
    """How much memory to use.

    Raises:
        ValueError: where it is none of these words.
    """
    if memory not in get_args(Memory):
        raise ValueError(f"memory is {memory!r}; choose one of {', '.join(get_args(Memory))}.")
    return memory


class Weights:
    """A model's params by role, each put on the devices when it is first asked for; several threads may ask."""

    def __init__(
        self, params: Mapping[str, Params], dtype: DTypeLike, device: Any = None, memory: Memory = "normal"
    ) -> None:
        """Reads nothing yet.

        Args:
            params: on the host, or mapped from files.
            dtype: what the networks compute in.
            device: a device or a sharding; None is the default device.
            memory: "low" keeps one network at a time, and its kernels in 16 bits; they are widened where they are used.
                "lowest" has those of all networks but the autoencoder in 8.
        """
        self._params, self._dtype, self._device, self.memory = params, dtype, device, memory
        self._lock = threading.RLock()
        self._placed: dict[str, Params] = {}
        self._shapes: dict[str, Params] = {}

    def __getitem__(self, role: str) -> Params:
        """The role's params. With little memory, those of others are dropped: they go when nothing uses them any more.

        Raises:
            KeyError: for a role that the model has not.
            ValueError: where a file that they are mapped from was written to.
        """
        with self._lock:
            if role not in self._placed:
                params = self._params[role]
                self._placed = {other: placed for other, placed in self._placed.items() if self._stays(other, role)}
                self._placed[role] = place_params(params, self._type, self._device, self._finish(role))
                logger.debug("%s's weights: %.2f GB on the device", role, _bytes(self._placed[role]) / 1e9)
            return self._placed[role]

    def shapes(self, role: str) -> Params:
        """The shapes and types of the role's params, for which programs can be compiled before the params are there."""
        if role not in self._shapes:
            finish = self._finish(role) or (lambda _, module: module)

            def module(path: Path, arrays: Params) -> Params:
                types = {name: jax.ShapeDtypeStruct(a.shape, self._type(arrays, a)) for name, a in arrays.items()}
                return jax.eval_shape(partial(finish, path), types)

            self._shapes[role] = by_module(module, self._params[role])
        return self._shapes[role]

    def missing_bytes(self, role: str) -> int:
        """Bytes that putting the role's params on the devices will take."""
        return 0 if role in self._placed else _bytes(self.shapes(role))

    def passing_bytes(self) -> int:
        """Bytes that are on the devices and will be dropped when others come."""
        passing = [role for role in list(self._placed) if not _at_steps(role) and not self._stays(role, STEPS)]
        return sum(_bytes(self.shapes(role)) for role in passing)

    def __iter__(self) -> Iterator[str]:
        """The roles."""
        return iter(self._params)

    def _type(self, module: Params, leaf: Any) -> DTypeLike:
        wide = type_of(module, self._dtype)
        if self.memory == "normal" or leaf.ndim < 2 or np.dtype(wide).itemsize == 2:
            return wide
        return leaf.dtype if leaf.dtype.itemsize == 2 else np.float16

    def _stays(self, role: str, comes: str) -> bool:
        """Whether its params stay when others come. What is large, and wanted once an image, a CPU fetches again."""
        if _at_steps(role) and _at_steps(comes):
            return True
        on_cpu = jax.default_backend() == "cpu"
        return self.memory == "normal" and not (on_cpu and not _at_steps(role) and is_large(self._params[role]))

    def _finish(self, role: str) -> Callable[[Path, Params], Params] | None:
        if self.memory == "lowest":
            return None if role in ("vae", PREVIEW) else narrow
        # With kernels in Winograd's form SD1.5's denoiser takes 1.7 times its weights; other things need memory, too.
        weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(self._params[role]))
        enough = self.memory == "normal" and 2 * weights < memory_bytes()
        return prepare if _at_steps(role) and enough and jax.default_backend() == "cpu" else None


def step_roles(controls: int) -> list[str]:
    """The roles of the networks that are called at every step: the denoiser, and so many control networks."""
    return [STEPS, *(f"{CONTROL}{i}" for i in range(controls))]


def _at_steps(role: str) -> bool:
    return role in (STEPS, PREVIEW) or role.startswith(CONTROL)


def _bytes(params: Params) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def place_params(
    params: Params,
    type_of: Callable[[Params, Any], DTypeLike],
    device: Any = None,
    finish: Callable[[Path, Params], Params] | None = None,
) -> Params:
    """The params on devices, one module after the other, so that little is there twice.

    Args:
        params: of any float type; those that are mapped from a file leave no pages of it in memory.
        type_of: the type of a leaf, from its module and itself.
        device: a device or a sharding; None is the default device.
        finish: what to make of each module's path and arrays once they are there, such as `jaxdiff.nn.conv.prepare`.

    Raises:
        ValueError: where a file that they are mapped from was written to; for numbers that the type cannot hold.
    """

    def place(path: Path, module: Params) -> Params:
        placed = {name: _put((*path, name), leaf, type_of(module, leaf), device) for name, leaf in module.items()}
        return placed if finish is None else jax.block_until_ready(finish(path, placed))

    return by_module(place, params)


def cast(params: Params, dtype: DTypeLike) -> Params:
    """The params as the networks would cast them at every step: norms in float32, all else in `dtype`."""

    def module(_: Path, arrays: Params) -> Params:
        return {name: leaf.astype(type_of(arrays, dtype), copy=False) for name, leaf in arrays.items()}

    return by_module(module, params)


def type_of(module: Params, dtype: DTypeLike) -> DTypeLike:
    """The type that a module's arrays are computed with, in a network that computes in `dtype`."""
    return np.float32 if "scale" in module else dtype


def by_module(fn: Callable[[Path, Params], Params], params: Params, path: Path = ()) -> Params:
    """`fn` of each module's path and its own arrays by name, in a new tree."""
    own = {name: leaf for name, leaf in params.items() if not isinstance(leaf, dict)}
    children = {name: by_module(fn, leaf, (*path, name)) for name, leaf in params.items() if isinstance(leaf, dict)}
    return (fn(path, own) if own else {}) | children


def _put(path: Path, leaf: Any, dtype: DTypeLike, device: Any) -> jax.Array:
    half = np.dtype(dtype) == np.float16
    if isinstance(leaf, jax.Array):
        cast = leaf.astype(dtype)
        _check_range(path, half and bool(jnp.isinf(cast).any()))
        return jax.device_put(cast, device)
    check_unchanged(leaf)
    # A CPU's device takes a host's array as it is, if it begins where its instructions want it.
    size = leaf.size * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNED, np.uint8)
    start = -memory.ctypes.data % ALIGNED
    aligned = memory[start : start + size].view(dtype).reshape(leaf.shape)
    with np.errstate(over="ignore"):
        np.copyto(aligned, leaf, casting="unsafe")
    release(leaf)
    _check_range(path, half and bool(np.isinf(aligned).any()))
    return jax.device_put(aligned, device)


def _check_range(path: Path, is_beyond: bool) -> None:
    if is_beyond:
        raise ValueError(
            f"{'/'.join(path)} has a number beyond {np.finfo(np.float16).max:g}, the most that 16 bits hold; "
            "leave out memory (--memory)."
        )
