"""DINOv2's folders, read: `config.json` of transformers and the weights."""

import json
from pathlib import Path
from typing import NamedTuple

from jaxdiff.config import Dinov2Config, load_json, naming
from jaxdiff.io.configs import TRANSFORMERS_IGNORED, read_values, square_sides
from jaxdiff.io.convert import from_torch
from jaxdiff.io.weights import open_weights
from jaxdiff.types import Params

_TYPES = ("dinov2", "dinov2_with_registers")
_ONLY = {"num_channels": (3,), "model_type": _TYPES}
# What is for training, or for other uses of its layers.
_IGNORED = TRANSFORMERS_IGNORED | {
    "attention_probs_dropout_prob", "hidden_dropout_prob", "layerscale_value", "drop_path_rate", "apply_layernorm",
    "reshape_hidden_states", "use_mask_token", "out_features", "out_indices", "stage_names",
}  # fmt: skip


class Dinov2(NamedTuple):
    """A network that looks at images."""

    path: Path
    """The folder that it was read from."""
    config: Dinov2Config
    params: Params


def read_dinov2(path: Path | str) -> Dinov2:
    """A DINOv2 in the type that it is stored in; its shapes are not checked here.

    Raises:
        ValueError: in one sentence, where the folder is none of one, or damaged.
    """
    path = Path(path)
    if not (file := path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json; give the folder of a Dinov2Model of transformers.")
    values = load_json(file)
    if (kind := values.get("model_type")) not in _TYPES:
        raise ValueError(f"{file}: model_type is {json.dumps(kind)}; supported: {', '.join(_TYPES)}.")
    values = square_sides(values, "image_size", "patch_size")
    defaults = {"num_register_tokens": 4} if kind == "dinov2_with_registers" else {}
    config = read_values(file, values, Dinov2Config, _ONLY, _IGNORED, defaults)
    # Under a name of its own nothing passes for a text encoder's. The mask stands for patches in training alone.
    tensors = {
        f"dinov2.{name.removeprefix('dinov2.').removeprefix('dinov2_with_registers.')}": array
        for name, array in open_weights(path, "model").items()
        if not name.endswith("mask_token")
    }
    with naming(path):
        return Dinov2(path, config, from_torch(tensors.items()).get("dinov2", {}))
