"""Files of IP-Adapters, read: `.safetensors`, and `.bin` of torch.save with the same names in two dicts.

image_proj.proj.weight                 plain: an image's embedding
image_proj.latents                     plus: a resampler of its patches' features
image_proj.proj.3.weight               full: all of its patches' features
ip_adapter.1.to_k_ip.weight [c d]      of the first cross-attention; 3 of the second, and so on
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxdiff.config import IPAdapterConfig, naming
from jaxdiff.io.convert import from_torch
from jaxdiff.io.image_encoder import NAME as ENCODER
from jaxdiff.io.layouts import seems_to_be
from jaxdiff.io.weights import listed, open_file
from jaxdiff.types import Params

NAME = "ip_adapter"
_LAYER = re.compile(r"ip_adapter\.(\d+)\.to_([kv])_ip\.weight")
# Lists inside lists of the resampler, by names that say what they are.
_RESAMPLER = {"0.norm1": "norm1", "0.norm2": "norm2", "0.to_q": "to_q", "0.to_kv": "to_kv", "0.to_out": "to_out",
              "1.0": "norm3", "1.1": "fc1", "1.3": "fc2"}  # fmt: skip
_IN_RESAMPLER = re.compile(rf"(image_proj\.layers\.\d+)\.({'|'.join(map(re.escape, _RESAMPLER))})\.(weight|bias)")
_FACE = re.compile(r"image_proj\.(perceiver_resampler\.|proj\.0\.)|ip_adapter\.\d+\.to_\w+_lora\.")
_FIRST = "ip_adapter.1.to_k_ip.weight"


class IPAdapter(NamedTuple):
    """A network that makes an image a prompt."""

    path: Path
    """The file that it was read from."""
    config: Any
    params: Params


def read_ip_adapter(path: Path | str) -> IPAdapter:
    """An IP-Adapter, in the type that it is stored in; its shapes are not all checked here.

    Raises:
        ValueError: in one sentence, where the file is missing, damaged, or something else, saying what it seems to be.
    """
    path = Path(path)
    tensors = {_named(name): array for name, array in open_file(path)[0].items()}
    if not any(_LAYER.fullmatch(name) for name in tensors):
        seems = seems_to_be(tensors) or f"none, with tensors such as {listed(sorted(tensors)[:3])}"
        raise ValueError(f"{path} is no IP-Adapter; it seems to be {seems}.")
    shapes = {name: array.shape for name, array in tensors.items()}
    kind = next((kind for kind, name in _TOLD_BY.items() if name in shapes), None)
    if kind is None or (kind == "plain" and any("_lora." in name for name in shapes)):
        face = any(_FACE.match(name) for name in shapes)
        raise ValueError(
            f"{path} is an IP-Adapter of FaceID, which reads embeddings of faces by another network; supported are "
            "those that read CLIP's images: plain, plus and full." if face else
            f"{path}: the IP-Adapter is not whole: its image_proj is of no kind that is known. Download or save it "
            "again."
        )  # fmt: skip
    try:
        values = _values(kind, shapes)
    except (KeyError, IndexError) as missing:
        raise ValueError(
            f"{path}: the IP-Adapter is not whole: {missing.args[0]} is missing, or has not that many axes. Download "
            "or save it again."
        ) from missing
    with naming(path):
        return IPAdapter(path, IPAdapterConfig(**values), from_torch(tensors.items()))


def encoder_beside(path: Path) -> Path | None:
    """The folder of an image encoder where published files have it: `image_encoder` beside the adapter."""
    folder = path.parent / ENCODER
    return folder if folder.is_dir() else None


def _named(name: str) -> str:
    found = _IN_RESAMPLER.fullmatch(name)
    return f"{found[1]}.{_RESAMPLER[found[2]]}.{found[3]}" if found else name


_TOLD_BY = {"plain": "image_proj.proj.weight", "full": "image_proj.proj.3.weight", "plus": "image_proj.latents"}


def _values(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config by the shapes.

    Raises:
        KeyError: with the name of a tensor that is missing.
        IndexError: with that of one that has too few axes.
    """

    def size(name: str, axis: int) -> int:
        if len(shapes[name]) <= axis:
            raise IndexError(name)
        return shapes[name][axis]

    layers = sum(1 for name in shapes if (found := _LAYER.fullmatch(name)) and found[2] == "k")
    channels = tuple(size(f"ip_adapter.{2 * i + 1}.to_k_ip.weight", 0) for i in range(layers))
    dim = size(_FIRST, 1)
    values: dict[str, Any] = {"kind": kind, "channels": channels, "cross_attention_dim": dim}
    if kind == "plain":
        given, features = size("image_proj.proj.weight", 0), size("image_proj.proj.weight", 1)
        return values | {"image_features": features, "tokens": given // dim if dim else 0}
    if kind == "full":
        return values | {"image_features": size("image_proj.proj.0.weight", 1)}
    first = "image_proj.layers.0"
    depth = sum(1 for name in shapes if re.fullmatch(r"image_proj\.layers\.\d+\.to_q\.weight", name))
    return values | {
        "image_features": size("image_proj.proj_in.weight", 1),
        "tokens": size("image_proj.latents", 1),
        "hidden": size("image_proj.latents", 2),
        "depth": depth,
        "inner": size(f"{first}.to_q.weight", 0),
        "feedforward": size(f"{first}.fc1.weight", 0),
    }
