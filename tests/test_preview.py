"""Tiny autoencoders: previews of the result's size, by weights that are known to fit."""

import functools
import json

import numpy as np
import pytest
import tiny

from jaxdiff.config import TinyVAEConfig, to_dict
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.generation.programs import decode_preview
from jaxdiff.io.convert import torch_views
from jaxdiff.io.weights import stored, write_safetensors

CONFIG = TinyVAEConfig(
    encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
    num_decoder_blocks=(1, 1),
)  # fmt: skip
plain = functools.cache(tiny.model)


def write_folder(folder, change=lambda tensors: None, **others):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_dict(CONFIG) | {"_class_name": "AutoencoderTiny"} | others))
    tensors = torch_views(tiny.random_params("tiny_vae", CONFIG, np.random.default_rng(0)))
    change(tensors)
    arrays = {name: one._replace(checked=False) for name, one in stored(tensors).items()}
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", arrays)
    return folder


def test_previews_have_the_results_size_and_compile_once(tmp_path):
    pipe = Pipeline(plain().with_preview(write_folder(tmp_path / "tiny")))
    latents = np.random.default_rng(0).standard_normal((2, 8, 6, 4))
    image = pipe.preview(latents)
    assert (image.shape, image.dtype) == ((2, 16, 12, 3), np.uint8)
    count = decode_preview.count
    assert (pipe.preview(-latents) != image).any()
    assert decode_preview.count == count
    with pytest.raises(ValueError, match=r"it must be \[b, h, w, 4\]"):
        pipe.preview(latents[..., :3])


BAD = {
    "another class": ({"_class_name": "AutoencoderKL"}, "supported: AutoencoderTiny"),
    "channels": ({"latent_channels": 16}, "its latents have 16 channels"),
    "pixels": ({"decoder_block_out_channels": [8], "num_decoder_blocks": [1]}, "1 pixels to a side"),
    "levels": ({"num_decoder_blocks": [1, 1, 1]}, "they must be as many"),
    "no levels": ({"encoder_block_out_channels": [], "num_encoder_blocks": []}, "one at least"),
    "widths": ({"decoder_block_out_channels": [8, 16]}, "the same width"),
    "blocks": ({"num_decoder_blocks": [0, 1]}, "num_decoder_blocks"),
    "another enlargement": ({"upsample_fn": "bilinear"}, "upsample_fn"),
    "other weights": ({"num_encoder_blocks": [1, 2]}, "missing: encoder.layers"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_folder_that_does_not_fit_is_told(tmp_path, kind):
    values, words = BAD[kind]
    with pytest.raises(ValueError, match=words):
        plain().with_preview(write_folder(tmp_path / "tiny", **values))


NAME = "decoder.layers.0.weight"
DAMAGED = {
    "missing": (lambda t: t.pop(NAME), f"1 missing: {NAME}"),
    "misshapen": (lambda t: t.update({NAME: np.zeros((8, 0, 3, 3), np.float32)}), f"misshapen: {NAME}"),
    "not finite": (lambda t: t.update({NAME: t[NAME] * np.inf}), f"not finite: {NAME}"),
    "no float": (lambda t: t.update({NAME: t[NAME].astype(np.int8)}), "not float16"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_weights_are_told(tmp_path, kind):
    change, words = DAMAGED[kind]
    with pytest.raises(ValueError, match=words):
        plain().with_preview(write_folder(tmp_path / "tiny", change))


def test_what_is_no_folder_is_told(tmp_path):
    with pytest.raises(ValueError, match="AutoencoderTiny, such as TAESD"):
        plain().with_preview(tmp_path / "none")
