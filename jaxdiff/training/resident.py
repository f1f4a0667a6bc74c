"""Data that lie on the devices: put there once, and looked up by the step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdiff.data.images import to_float
from jaxdiff.runtime.mesh import batch_sharding, place

RESIDENT = "resident"
"""Where a batch has the arrays of a `jaxdiff.data.resident.Resident` source, all of them at every step."""


def place_resident(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays that every process has whole, their rows spread over all devices that batches are spread over."""
    spread = mesh.shape["data"] * mesh.shape["fsdp"]
    held = sum(array.nbytes for array in arrays.values()) / spread
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit and held > 0.7 * limit:
        raise ValueError(
            f"The data take {held / 1e9:.1f} GB on each device, which has {limit / 1e9:.1f}: leave out "
            "--data.resident, or spread them over more devices."
        )
    padded = {name: np.pad(a, [(0, -len(a) % spread), *[(0, 0)] * (a.ndim - 1)]) for name, a in arrays.items()}
    return place(padded, dict.fromkeys(padded, batch_sharding(mesh)))


def looked_up(batch: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The batch that reading every record would give, of one that has rows of `RESIDENT` arrays; others as they are."""
    if RESIDENT not in batch:
        return batch
    batch = dict(batch)
    data, row = batch.pop(RESIDENT), batch.pop("row")

    def rows(name: str, numbers: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(jnp.take(data[name], numbers, axis=0), batch_sharding(mesh))

    if "moments" in data:
        batch["moments"] = rows("moments", row).astype(jnp.float32)
    else:
        images = rows("image", row)
        mirrored = batch.pop("mirrored")[:, None, None, None]
        # As a table of 256 numbers: another division than NumPy's could round otherwise.
        batch["image"] = jnp.asarray(BRIGHTNESS)[jnp.where(mirrored, images[:, :, ::-1], images)]
    if "numbers" in data:
        batch["numbers"] = rows("numbers", row)
    if "context" in data:
        row = batch.pop("context_row")
        batch |= {name: rows(name, row) for name in ("context", "pooled") if name in data}
    return jax.lax.optimization_barrier(batch)  # so that what follows is compiled, and rounds, as without it


BRIGHTNESS = to_float(np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1).repeat(3, -1))[0, 0, :, 0]
