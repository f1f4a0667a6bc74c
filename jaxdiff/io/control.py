"""ControlNets and T2I-Adapters, read: folders of diffusers, and files by diffusers' names or the original ones.

down_blocks.0.resnets.0.conv1.weight                    diffusers
control_model.input_blocks.1.0.in_layers.2.weight       the authors', with or without `control_model.`
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.config import T2IAdapterConfig, from_dict, load_json, naming
from jaxdiff.io import ldm
from jaxdiff.io.configs import one_spelling, read_values
from jaxdiff.io.convert import from_torch
from jaxdiff.io.folder import UNET_IGNORED, UNET_ONLY
from jaxdiff.io.layouts import CLASSES, SD1, SD2, SDXL, VALUES, NotThere, mirrored, seems_to_be
from jaxdiff.io.weights import listed, open_file, open_weights
from jaxdiff.types import Params

NAME = "controlnet"
_NAMES = {"ControlNetModel": NAME, "T2IAdapter": "t2i_adapter"}
_PREFIX = "control_model."
_EMBEDDING = "controlnet_cond_embedding."
_ORIGINAL = "input_hint_block."
_ONLY = {**UNET_ONLY, "encoder_hid_dim": (None,)}
_STEM = "diffusion_pytorch_model"


class ControlNet(NamedTuple):
    """A network that an image steers a denoiser by."""

    path: Path
    """The folder or file that it was read from."""
    config: Any
    params: Params

    @property
    def name(self) -> str:
        """What `jaxdiff.build` makes of the config."""
        return _NAMES["T2IAdapter" if isinstance(self.config, T2IAdapterConfig) else "ControlNetModel"]


def read_control(path: Path | str) -> ControlNet:
    """A ControlNet or T2I-Adapter, in the type that it is stored in; its shapes are not checked here.

    A file by diffusers' names that has its `config.json` beside it is read by that; else sizes are found from the
    shapes, which those of T2I-Adapters do not say.

    Args:
        path: a folder, or a file.

    Raises:
        ValueError: in one sentence, where it is missing, damaged, or something else, saying what it seems to be.
    """
    path = Path(path)
    if path.is_dir():
        return ControlNet(path, _config(path / "config.json"), _params(path, open_weights(path, _STEM)))
    tensors = open_file(path)[0]
    tensors = {name.removeprefix(_PREFIX): array for name, array in tensors.items()}
    beside = path.parent / "config.json"
    if any(name.startswith(_ORIGINAL) for name in tensors):
        return ControlNet(path, *_original(path, tensors))
    ours = any(name.startswith((_EMBEDDING, "adapter.")) for name in tensors)
    if ours and beside.is_file() and load_json(beside).get("_class_name") in _NAMES:
        return ControlNet(path, _config(beside), _params(path, tensors))
    if not any(name.startswith(_EMBEDDING) for name in tensors):
        seems = seems_to_be(tensors) or f"none, with tensors such as {listed(sorted(tensors)[:3])}"
        raise ValueError(f"{path} is no ControlNet; it seems to be {seems}.")
    return ControlNet(path, _config_of(path, tensors), _params(path, tensors))


def _config(file: Path) -> Any:
    """The config of a diffusers folder."""
    if not file.is_file():
        raise ValueError(f"{file.parent} has no config.json; give the folder of a ControlNet or a T2I-Adapter.")
    values = one_spelling(load_json(file))
    if (cls := values.get("_class_name")) not in _NAMES:
        raise ValueError(f"{file}: the class is {json.dumps(cls)}; supported: {', '.join(_NAMES)}.")
    if cls == "T2IAdapter":
        return read_values(file, values, T2IAdapterConfig, {}, frozenset())
    config = CLASSES[NAME]
    down = values.get("down_block_types", list(config.down_block_types))
    if not isinstance(down, list) or not all(isinstance(kind, str) for kind in down):
        raise ValueError(f"{file}: down_block_types must be a list of names.")
    own = {"up_block_types": mirrored(down)}
    return read_values(file, values, config, _ONLY, UNET_IGNORED, own)


def _params(path: Path, tensors: Mapping[str, np.ndarray]) -> Params:
    with naming(path):
        return from_torch(tensors.items())


def _original(path: Path, tensors: Mapping[str, np.ndarray]) -> tuple[Any, Params]:
    """The config and the params of a file with original names; what it has beside is left out, as `lora_` or `ema`."""
    found = ldm.from_ldm(tensors, ldm.control_table(*ldm.control_sizes(tensors)))
    ours = {name: np.asarray(array) for name, (_, array) in found.items()}
    return _config_of(path, ours), _params(path, ours)


def _config_of(path: Path, tensors: Mapping[str, np.ndarray]) -> Any:
    """The config by the shapes of diffusers' names."""
    projections = [array.ndim for name, array in tensors.items() if name.endswith("proj_in.weight")]
    layout = SD2 if projections and projections[0] == 2 else SD1
    layout = SDXL if "add_embedding.linear_1.weight" in tensors else layout
    try:
        values = VALUES[NAME]({name: array.shape for name, array in tensors.items()}, layout)
    except NotThere as missing:
        raise ValueError(
            f"{path}: the ControlNet is not whole: {missing} is missing, or of no shape that a ControlNet has. "
            "Download or save it again."
        ) from missing
    if 0 in values["attention_head_dim"]:
        raise ValueError(f"{path} does not say how many heads it has; give its folder with a config.json.")
    with naming(path):
        return from_dict(CLASSES[NAME], values, CLASSES[NAME].__name__)
