"""Names and layouts, torch's and ours: one mechanical rule, exact both ways.

A torch name is cut at its dots; a list item's number joins the name before it, and the leaf is named for its kind:

    down_blocks.0.resnets.1.conv1.weight  [o i h w]   <->  down_blocks_0/resnets_1/conv1/kernel  [h w i o]
    mid_block.attentions.0.proj_in.weight [o i]       <->  mid_block/attentions_0/proj_in/kernel [i o]
    conv_norm_out.weight                  [c]         <->  conv_norm_out/scale
    embeddings.token_embedding.weight     [n d]       <->  embeddings/token_embedding/embedding

This file is the only place that knows of NCHW.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxdiff.io.gguf import HostArray
from jaxdiff.types import Params

Path = tuple[str, ...]

# `linear_1` is a name of its own (time_embedding.linear_1), `resnets_1` an item of a list.
_LIST_ITEM = re.compile(r"(?!linear_)(.+)_(\d+)")

# What older files call things. transformers 5 writes text encoders without the prefix that transformers 4 wants; it
# reads both. The autoencoder's attention was renamed in diffusers 0.17.
_TEXT_WITHOUT_PREFIX = re.compile(
    r"(embeddings|encoder\.layers\.\d+\.(self_attn|layer_norm[12]|mlp)|final_layer_norm)\."
)
_OLD_ATTENTION = re.compile(r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern_name(name: str) -> str | None:
    """The name that a tensor of an old file has today; None for the `position_ids` buffers, which are no parameters."""
    if name.rpartition(".")[2] == "position_ids":
        return None
    if old := _OLD_ATTENTION.fullmatch(name):
        return f"{old[1]}.{_NEW_ATTENTION[old[2]]}.{old[3]}"
    return f"text_model.{name}" if _TEXT_WITHOUT_PREFIX.match(name) else name


def path_of(name: str, ndim: int) -> Path:
    """Our path for a torch name; `ndim` tells a norm's weight from a kernel.

    Raises:
        ValueError: when the rule could not give the name back.
    """
    path: list[str] = []
    for part in name.split("."):
        if part.isdecimal() and path:
            path[-1] += f"_{part}"
        else:
            path.append(part)
    if path[-1] == "weight":
        module = path[-2] if len(path) > 1 else ""
        path[-1] = "scale" if ndim == 1 else "embedding" if ndim == 2 and module.endswith("embedding") else "kernel"
    if torch_name(tuple(path)) != name:
        raise ValueError(f"The tensor name {name!r} is not one that diffusers or transformers would give.")
    return tuple(path)


def torch_name(path: Path) -> str:
    """The torch name of a path."""
    *modules, leaf = path
    parts = [f"{item[1]}.{item[2]}" if (item := _LIST_ITEM.fullmatch(module)) else module for module in modules]
    return ".".join([*parts, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])


def torch_axes(path: Path, ndim: int) -> tuple[int, ...]:
    """The permutation that takes an array of ours to torch's order: a kernel's [*hw i o] to [o i *hw]."""
    if path[-1] != "kernel" or ndim < 2:
        return tuple(range(ndim))
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def torch_views(params: Params) -> dict[str, np.ndarray]:
    """The tree as torch names and arrays in torch's order, sorted by name; views, where the leaves are NumPy's."""
    flat = (
        (torch_name(path), np.asarray(leaf).transpose(torch_axes(path, np.ndim(leaf)))) for path, leaf in leaves(params)
    )
    return dict(sorted(flat, key=lambda pair: pair[0]))


def to_torch(params: Params) -> dict[str, np.ndarray]:
    """As `torch_views`, with contiguous arrays."""
    return {name: np.ascontiguousarray(array) for name, array in torch_views(params).items()}


def from_torch(tensors: Iterable[tuple[str, HostArray]]) -> Params:
    """The tree of torch's (name, array) pairs, old names included. Leaves are views of the arrays: nothing is read.

    Raises:
        ValueError: naming tensors whose name no rule covers, or that appear twice.
    """
    params: Params = {}
    for old_name, array in tensors:
        name = modern_name(old_name)
        if name is None:
            continue
        path = path_of(name, array.ndim)
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"The tensor {old_name!r} lies inside another tensor.")
        if path[-1] in node:
            raise ValueError(f"The tensor {name!r} is there twice, the second time as {old_name!r}.")
        node[path[-1]] = array.transpose(np.argsort(torch_axes(path, array.ndim)))
    return params


def leaves(params: Params, prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) of every leaf of a nested dict."""
    for key, value in params.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value
