"""CLIP's vision tower in transformers' folders, read, and images made what it reads.

config.json               of a CLIPVisionModelWithProjection, or of a whole CLIPModel
preprocessor_config.json  may be missing; else here, or in `feature_extractor` beside the folder
model.safetensors         or pytorch_model.bin
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from jaxdiff.config import CLIPVisionConfig, ImageProcessorConfig, load_json, naming, to_dict
from jaxdiff.io.configs import TRANSFORMERS_IGNORED, read_values, square_sides
from jaxdiff.io.convert import from_torch
from jaxdiff.io.weights import open_weights
from jaxdiff.types import Params

NAME = "image_encoder"
_LONGEST = 100
"""How many times as long as the other a side may be: the whole is resized before its middle is cut out."""
_WEIGHTS = ("vision_model.", "visual_projection.")
_ONLY = {"model_type": ("clip_vision_model",)}
_PROCESSOR = "preprocessor_config.json"
_PROCESSOR_ONLY = {"image_processor_type": ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor"),
                   "feature_extractor_type": ("CLIPFeatureExtractor", "CLIPImageProcessor")}  # fmt: skip
# Images are RGB here anyway.
_PROCESSOR_IGNORED = frozenset({
    "do_convert_rgb", "processor_class", "data_format", "input_data_format", "default_to_square", "use_square_size",
    "return_tensors", "device",
})  # fmt: skip


class ImageEncoder(NamedTuple):
    """A network that reads images."""

    path: Path
    """The folder that it was read from."""
    config: Any
    params: Params
    processor: Any
    """How images become what it reads."""

    def pixels(self, image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "s s 3"]:
        """An image as the network reads it."""
        return processed(image, self.processor)


def read_image_encoder(path: Path | str) -> ImageEncoder:
    """CLIP's vision tower with its projection, in the type that it is stored in; its shapes are not checked here.

    Args:
        path: its folder, or a folder that has it as `image_encoder`.

    Raises:
        ValueError: in one sentence, where the folder is none of one, or damaged.
    """
    path = Path(path)
    if not (path / "config.json").is_file() and (path / NAME).is_dir():
        path = path / NAME
    if not (file := path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json; give the folder of an image encoder, such as CLIP's ViT-H.")
    config = read_vision_config(file)
    processor = read_processor(path, config)
    tensors = {name: array for name, array in open_weights(path, "model").items() if name.startswith(_WEIGHTS)}
    with naming(path):
        return ImageEncoder(path, config, from_torch(tensors.items()), processor)


def read_vision_config(file: Path) -> CLIPVisionConfig:
    """The vision tower's part of a `config.json`.

    Raises:
        ValueError: where it has none, or one that is not supported.
    """
    values = load_json(file)
    if values.get("model_type") == "clip":  # what the whole says of the projection counts
        parts = [values.get(name) or {} for name in ("vision_config", "vision_config_dict")]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"{file}: vision_config must hold the fields of a CLIPVisionConfig.")
        values = {name: value for part in parts for name, value in part.items()} | {
            "model_type": "clip_vision_model", "projection_dim": values.get("projection_dim", 512),
        }  # fmt: skip
    if (kind := values.get("model_type")) != "clip_vision_model":
        raise ValueError(
            f"{file}: the model_type is {json.dumps(kind)}; supported are CLIP's vision tower (clip_vision_model) and "
            "whole CLIP models (clip)."
        )
    values = square_sides(values, "image_size", "patch_size")
    return read_values(file, values, CLIPVisionConfig, _ONLY, TRANSFORMERS_IGNORED)


def read_processor(folder: Path, config: CLIPVisionConfig) -> ImageProcessorConfig:
    """How images become what a vision tower reads: as `preprocessor_config.json` says; without one, as CLIP's do.

    Args:
        folder: the vision tower's; the file may also lie in `feature_extractor` beside it.
        config: the vision tower's.

    Raises:
        ValueError: for a file that is not supported, or makes images of another size than the tower reads.
    """
    size, places = config.image_size, (folder, folder.parent / "feature_extractor")
    file = next((found for place in places if (found := place / _PROCESSOR).is_file()), None)
    if file is None:
        return ImageProcessorConfig(size=(size,), crop_size=(size, size))
    values = load_json(file)
    for name in ("size", "crop_size"):
        if name in values:
            values[name] = _sides(file, name, values[name])
    processor = read_values(file, values, ImageProcessorConfig, _PROCESSOR_ONLY, _PROCESSOR_IGNORED)
    given = processor.crop_size if processor.do_center_crop else processor.size if processor.do_resize else ()
    if given != (size, size):
        raise ValueError(f"{file} makes images of the size {list(given)}, and the image encoder reads {size}x{size}.")
    return processor


def processor_values(config: ImageProcessorConfig) -> dict[str, Any]:
    """The values of its `preprocessor_config.json`, which `read_processor` and transformers read."""
    short = {"shortest_edge": config.size[0]} if len(config.size) == 1 else None
    size, crop = (dict(zip(("height", "width"), sides, strict=False)) for sides in (config.size, config.crop_size))
    return {"image_processor_type": "CLIPImageProcessor"} | to_dict(config) | {"size": short or size, "crop_size": crop}


def _sides(file: Path, name: str, given: Any) -> Any:
    """A size as one number (the shorter side's) or two, of the several ways to write it."""
    if isinstance(given, Mapping) and given.keys() == {"shortest_edge"} and name == "size":
        given = [given["shortest_edge"]]
    elif isinstance(given, Mapping) and given.keys() == {"height", "width"}:
        given = [given["height"], given["width"]]
    elif isinstance(given, int):
        given = [given] if name == "size" else [given, given]
    if not isinstance(given, list):
        raise ValueError(f"{file}: {name} is {json.dumps(given)[:60]}; it must be a number, or height and width.")
    return given


def processed(image: UInt8[np.ndarray, "h w 3"], config: ImageProcessorConfig) -> Float32[np.ndarray, "h2 w2 3"]:
    """An image, resized, its middle cut out, and each colour moved to the mean and deviation that CLIP learnt with.

    Raises:
        ValueError: where one side is more than a hundred times the other.
    """
    height, width = image.shape[:2]
    if max(height, width) > _LONGEST * min(height, width):
        raise ValueError(f"The image is {width}x{height}; for an image encoder one side may be at most {_LONGEST} "
                         "times the other.")  # fmt: skip
    if config.do_resize:
        if len(config.size) == 1:
            short = config.size[0]
            # As transformers rounds: down.
            down, across = (int(short * side / min(height, width)) for side in (height, width))
        else:
            down, across = config.size
        image = np.asarray(Image.fromarray(image).resize((across, down), Image.Resampling(config.resample)))
    if config.do_center_crop:
        for axis, n in enumerate(config.crop_size):
            image = _middle(image, axis, n)
    pixels = image.astype(np.float64) * config.rescale_factor if config.do_rescale else image
    pixels = pixels.astype(np.float32)
    if config.do_normalize:
        mean, std = (np.array(colour, np.float32) for colour in (config.image_mean, config.image_std))
        pixels = (pixels - mean) / std
    return pixels


def _middle(image: np.ndarray, axis: int, n: int) -> np.ndarray:
    """The middle `n` along an axis; where there are fewer, zeros round them."""
    there = image.shape[axis]
    if there >= n:
        start = (there - n) // 2
        return image.take(np.arange(start, start + n), axis)
    before = (n - there + 1) // 2
    padding = [(0, 0)] * image.ndim
    padding[axis] = before, n - there - before
    return np.pad(image, padding)
