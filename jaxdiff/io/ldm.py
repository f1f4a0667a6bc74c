"""Names of the original latent diffusion code (LDM) and of OpenCLIP beside diffusers' and transformers': one table.

A table maps the start of a diffusers name, a whole number of its dotted parts, to the start of the original one; what
follows is the same in both:

    down_blocks.1.resnets.0.conv1       <->  input_blocks.4.0.in_layers.2
    down_blocks.1.attentions.0          <->  input_blocks.4.1
    decoder.up_blocks.0.resnets.2       <->  decoder.up.3.block.2
    text_model.encoder.layers.7.mlp.fc1 <->  transformer.resblocks.7.mlp.c_fc

The longest start that a table has counts. Numbers run on through LDM's lists, so a table is made for a network's sizes;
`unet_sizes` and its like find those in the original names. Names are without the file's prefixes. Three things are
stored otherwise: the autoencoder's attention as convolutions [o i 1 1], OpenCLIP's queries, keys and values as one, and
its projection as [i o].
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxdiff.io.gguf import HostArray

Table = dict[str, str]
Tensors = dict[str, np.ndarray]

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_HALF = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
_OPENCLIP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_PROJECTION = "text_projection.weight"
_STACKED = ("q_proj", "k_proj", "v_proj")  # PyTorch's order in `in_proj_weight` and `in_proj_bias`


def unet_table(layers: Sequence[int], up_attention: Sequence[bool]) -> Table:
    """The UNet's.

    Args:
        layers: residual blocks on the way down, for each level from the finest.
        up_attention: whether there is attention, for each `up_blocks.i`, from the coarsest level.
    """
    table = _down_table(layers)
    i = 0
    for block, (count, attention) in enumerate(zip(reversed(layers), up_attention, strict=True)):
        for j in range(count + 1):
            table |= _inside(f"up_blocks.{block}.resnets.{j}", f"output_blocks.{i}.0", _UNET_RESNET)
            if attention:
                table[f"up_blocks.{block}.attentions.{j}"] = f"output_blocks.{i}.1"
            i += 1
        if block < len(layers) - 1:
            table[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{i - 1}.{2 if attention else 1}.conv"
    return table


def control_table(layers: Sequence[int], embedding: int) -> Table:
    """A ControlNet's: the UNet's way down, and the outputs and the image's embedding beside it.

    Args:
        layers: as of `unet_table`.
        embedding: convolutions of the embedding, with its first and last.
    """
    table = _down_table(layers)
    outputs = 1 + sum(layers) + len(layers) - 1
    table |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(outputs)}
    inner = [f"blocks.{i}" for i in range(embedding - 2)]
    names = {name: f"input_hint_block.{2 * i}" for i, name in enumerate(["conv_in", *inner, "conv_out"])}
    return table | {"controlnet_mid_block": "middle_block_out.0"} | _inside("controlnet_cond_embedding", "", names)


def control_sizes(names: Iterable[str]) -> tuple[tuple[int, ...], int]:
    """The arguments of `control_table`, from original names."""
    names = list(names)
    modules, i = _modules(names), 0
    while f"input_hint_block.{2 * i}" in modules:
        i += 1
    return unet_sizes(names)[0], i


def _down_table(layers: Sequence[int]) -> Table:
    """The UNet's but for its way up."""
    table = _UNET | _inside("mid_block.resnets.0", "middle_block.0", _UNET_RESNET)
    table |= {"mid_block.attentions.0": "middle_block.1"}
    table |= _inside("mid_block.resnets.1", "middle_block.2", _UNET_RESNET)
    i = 1
    for level, count in enumerate(layers):
        for j in range(count):
            table |= _inside(f"down_blocks.{level}.resnets.{j}", f"input_blocks.{i}.0", _UNET_RESNET)
            table[f"down_blocks.{level}.attentions.{j}"] = f"input_blocks.{i}.1"
            i += 1
        if level < len(layers) - 1:
            table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{i}.0.op"
            i += 1
    return table


def unet_sizes(names: Iterable[str]) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """The arguments of `unet_table`, from original names."""
    blocks, names = _modules(names), set(names)
    layers, i = [0], 1
    while f"input_blocks.{i}" in blocks:
        if f"input_blocks.{i}.0.op" in blocks:
            layers.append(0)
        else:
            layers[-1] += 1
        i += 1
    firsts = [sum(count + 1 for count in layers[level + 1 :]) for level in reversed(range(len(layers)))]
    return tuple(layers), tuple(f"output_blocks.{i}.1.norm" in blocks for i in firsts)


def vae_table(levels: int, layers: int) -> Table:
    """The autoencoder's; `layers` are the encoder's residual blocks of a level, the decoder has one more."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        table |= _inside(half, half, _VAE_HALF)
        table |= _inside(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _VAE_ATTENTION)
        for j in range(2):
            table |= _inside(f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}", _VAE_RESNET)
    for i in range(levels):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{i}"
        ldm_down, ldm_up = f"encoder.down.{i}", f"decoder.up.{levels - 1 - i}"  # LDM counts up from the finest
        for j in range(layers):
            table |= _inside(f"{down}.resnets.{j}", f"{ldm_down}.block.{j}", _VAE_RESNET)
        for j in range(layers + 1):
            table |= _inside(f"{up}.resnets.{j}", f"{ldm_up}.block.{j}", _VAE_RESNET)
        if i < levels - 1:
            table[f"{down}.downsamplers.0"] = f"{ldm_down}.downsample"
            table[f"{up}.upsamplers.0"] = f"{ldm_up}.upsample"
    return table


def vae_sizes(names: Iterable[str]) -> tuple[int, int]:
    """The arguments of `vae_table`, from original names."""
    modules = _modules(names)
    return count_items(modules, "encoder.down"), count_items(modules, "encoder.down.0.block")


def openclip_table(layers: int, projection: bool = False) -> Table:
    """The first so many layers of OpenCLIP's text tower, its embeddings, its last norm and perhaps its projection."""
    table = dict(_OPENCLIP) | ({_PROJECTION: "text_projection"} if projection else {})
    for i in range(layers):
        table |= _inside(f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}", _OPENCLIP_LAYER)
    return table


def openclip_layers(names: Iterable[str]) -> int:
    """Layers that a file of OpenCLIP's text tower has."""
    return count_items(_modules(names), "transformer.resblocks")


def translate(name: str, table: Mapping[str, str]) -> str | None:
    """A tensor's or a module's name by a table, or its inverse; None where it has no such name."""
    head, tail = name, ""
    while head:
        if head in table:
            return table[head] + tail
        head, dot, last = head.rpartition(".")
        tail = f"{dot}{last}{tail}"
    return None


def from_ldm(tensors: Mapping[str, HostArray], table: Table) -> dict[str, tuple[str, HostArray]]:
    """The tensors by diffusers' names, as views, each with the original name it came from; without what has no name."""
    inverse = {theirs: ours for ours, theirs in table.items()}
    found = {}
    for original, array in tensors.items():
        for name, part in _apart(original, array):
            if (ours := translate(name, inverse)) is not None:
                found[ours] = original, _as_linear(ours, part)
    return found


def to_ldm(tensors: Mapping[str, np.ndarray], table: Table) -> Tensors:
    """The tensors by their original names, as views but for what is stacked.

    Raises:
        ValueError: for a name that the table lacks.
    """
    found: Tensors = {}
    for name, array in tensors.items():
        if (original := translate(name, table)) is None:
            raise ValueError(f"{name} has no name in the original layout.")
        found[original] = _as_original(name, array)
    for first in [name for name in found if ".attn.q_proj." in name]:
        module, leaf = first.split(".q_proj.")
        parts = [found.pop(f"{module}.{part}.{leaf}") for part in _STACKED]
        found[f"{module}.in_proj_{leaf}"] = np.concatenate(parts)
    return found


def count_items(names: Iterable[str], start: str) -> int:
    """How many of `start.0`, `start.1`, ... begin names, without a gap."""
    modules, i = _modules(names), 0
    while f"{start}.{i}" in modules:
        i += 1
    return i


def _inside(ours: str, theirs: str, children: Mapping[str, str]) -> Table:
    return {f"{ours}.{name}": f"{theirs}.{other}".lstrip(".") for name, other in children.items()}


def _modules(names: Iterable[str]) -> set[str]:
    """Every start of the names, of one dotted part or more."""
    found: set[str] = set()
    for name in names:
        while name and name not in found:
            found.add(name)
            name = name.rpartition(".")[0]
    return found


def _apart(name: str, array: HostArray) -> list[tuple[str, HostArray]]:
    """OpenCLIP's stacked projections, each by the name that it would have alone."""
    module, found, leaf = name.rpartition(".attn.in_proj_")
    if not found or not array.ndim or array.shape[0] % len(_STACKED):
        return [(name, array)]
    parts = np.split(array, len(_STACKED))
    return [(f"{module}.attn.{part}.{leaf}", third) for part, third in zip(_STACKED, parts, strict=True)]


def _of_vae_attention(name: str) -> bool:
    return ".mid_block.attentions.0.to_" in name and name.startswith(("encoder.", "decoder.")) and name.endswith(
        ".weight"
    )  # fmt: skip


def _as_linear(name: str, array: HostArray) -> HostArray:
    if name == _PROJECTION:
        return array.T
    return array[:, :, 0, 0] if _of_vae_attention(name) and array.shape[2:] == (1, 1) else array


def _as_original(name: str, array: np.ndarray) -> np.ndarray:
    if name == _PROJECTION:
        return array.T
    return array[:, :, None, None] if _of_vae_attention(name) else array
