"""Where arrays live: one mesh, one table from parameter paths to axes. Modules do not know."""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
"""The leading axis of every batch is spread over both."""

# The first pattern that matches the whole path counts. The optimiser's moments and the EMA end in the parameter's path.
RULES: tuple[tuple[str, P], ...] = (
    (r".*/v_(row|col)/.*", P()),  # adafactor's sums over rows and columns: small, and of other axes than the parameter
    (r".*/(to_[qkv]|[qkv]_proj|fc1|net_0/proj)/kernel", P("fsdp", "tensor")),
    (r".*/(to_out_0|out_proj|fc2|net_2)/kernel", P("tensor", "fsdp")),
    (r".*/(conv\w*|proj_in|proj_out|quant_conv|post_quant_conv)/kernel", P(None, None, "fsdp", "tensor")),
    (r".*/kernel", P("fsdp", None)),
    (r".*/embedding", P(None, "fsdp")),
    (r".*", P()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """The devices (all of them by default) as a `data` x `fsdp` x `tensor` mesh; `data` -1 takes what the others leave.

    Raises:
        ValueError: where the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1:
        if len(devices) % (fsdp * tensor):
            raise ValueError(f"A mesh of fsdp {fsdp} x tensor {tensor} takes a multiple of {fsdp * tensor} devices, "
                             f"and there are {len(devices)}: make it one that divides {len(devices)}.")  # fmt: skip
        data = len(devices) // (fsdp * tensor)
    needed = data * fsdp * tensor
    if needed != len(devices):
        raise ValueError(f"A mesh of data {data} x fsdp {fsdp} x tensor {tensor} is for {needed} devices, but there "
                         f"are {len(devices)}: change the mesh so that its product is {len(devices)}.")  # fmt: skip
    # JAX's own default, explicit axes, is refused by linen's convolution.
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as `params/unet/conv_in/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The table's entry for one array; an axis that does not divide its dimension is left out there."""
    spec = tuple(next(spec for pattern, spec in RULES if re.fullmatch(pattern, path)))
    # A dense `proj_in` has the last two of the four entries that a convolution has.
    spec = (*spec, *[None] * (len(shape) - len(spec)))[-len(shape) :] if shape else ()
    return P(*(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, shape, strict=True)))


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """The `NamedSharding` of every leaf of `tree` (arrays or `jax.ShapeDtypeStruct`s), by its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh)), tree
    )


def gathered(sharding: NamedSharding) -> NamedSharding:
    """Where a parameter lies while it is computed with: stored in parts over `fsdp`, used whole (ZeRO-3).

    To be said outright: left alone, XLA splits convolutions over the axis that splits the batch, too, and the gradients
    of kernels that are split over `tensor` besides come out wrong (jax 0.10.2 on CPU). The paper is Rajbhandari et al.
    2020, section 5.3.
    """
    return NamedSharding(sharding.mesh, P(*(None if axis == "fsdp" else axis for axis in sharding.spec)))


def gather_params(params: Any, shardings: Any, dtype: DTypeLike) -> Any:
    """`params` as they are computed with: matrices in `dtype`, nothing split over `fsdp`.

    The cast comes first, so that bfloat16 is what travels, each matrix by itself; of the gradients, too. Vectors
    (norms, biases) and numbers that are no floats keep their type.

    Args:
        params: arrays stored as `shardings` say, inside jit.
        shardings: a `NamedSharding` for each leaf.
        dtype: what the networks compute in.
    """

    def gather(p: Array, stored: NamedSharding) -> Array:
        if p.ndim > 1 and jnp.issubdtype(p.dtype, jnp.floating):
            p = jax.lax.with_sharding_constraint(p.astype(dtype), stored)
        return jax.lax.with_sharding_constraint(p, gathered(stored))

    return jax.tree.map(gather, params, shardings)


def batch_sharding(mesh: Mesh, after: int = 0) -> NamedSharding:
    """The sharding of every array in a batch, of which the batch's own axis comes `after` so many others."""
    return NamedSharding(mesh, P(*[None] * after, *BATCH))


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, spread as `shardings` says; only what belongs here is copied."""
    return jax.tree.map(
        lambda a, sharding: jax.make_array_from_callback(np.shape(a), sharding, lambda index: np.asarray(a)[index]),
        tree,
        shardings,
    )


def spread(batch: Any, mesh: Mesh | None) -> Any:
    """The batch's arrays over the mesh, numbers on all of its devices; without a mesh, as they are."""
    if mesh is None:
        return batch
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, BATCH if np.ndim(x) else P())), batch)


def on(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """A context in which programs run on the mesh, which attention's kernels are split over."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)
