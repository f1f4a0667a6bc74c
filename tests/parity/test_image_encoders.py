"""CLIP's vision tower is transformers', and so are the images that it reads."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from pairs import randomise, relative_error
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from jaxdiff import build
from jaxdiff.evaluation.features import open_network
from jaxdiff.io.image_encoder import read_image_encoder
from jaxdiff.model import check_network

SIZES = {
    "quick_gelu": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
                   "image_size": 24, "patch_size": 6, "projection_dim": 20},
    "gelu, many patches": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                           "image_size": 48, "patch_size": 4, "projection_dim": 12, "hidden_act": "gelu",
                           "layer_norm_eps": 1e-4},
}  # fmt: skip
SHAPES = [(24, 24), (31, 50), (200, 97), (7, 5), (64, 65)]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3)).astype(np.uint8) for shape in SHAPES]


def make(kind, whole):
    """A vision tower alone, or inside a whole CLIP model, whose name for its projection's size counts."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not whole:
        return randomise(CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES[kind])), 1)
    text = CLIPTextConfig(vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=7)  # fmt: skip
    config = CLIPConfig(text_config=text.to_dict(), vision_config=SIZES[kind], projection_dim=18)
    return randomise(CLIPModel(config), 1)


@pytest.mark.parametrize("whole", [False, True], ids=["tower", "CLIP"])
@pytest.mark.parametrize("kind", SIZES)
def test_towers(kind, whole, images, tmp_path, figures):
    theirs = make(kind, whole)
    theirs.save_pretrained(tmp_path)
    size = SIZES[kind]["image_size"]
    processor = CLIPImageProcessor(size=size, crop_size=size)
    encoder = read_image_encoder(tmp_path)
    net = build.image_encoder(encoder.config)
    pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    own = np.stack([encoder.pixels(image) for image in images])
    np.testing.assert_array_equal(own.transpose(0, 3, 1, 2), pixels)
    with torch.no_grad():
        out = theirs.vision_model(pixels, output_hidden_states=True)
        embedding = theirs.visual_projection(out.pooler_output)
    params = check_network("image_encoder", encoder.config, encoder.params, tmp_path)
    found = net.apply({"params": params}, jnp.asarray(own))
    expected = {"embedding": embedding, "pooled": out.pooler_output, "penultimate": out.hidden_states[-2]}
    for name, tensor in expected.items():
        error = relative_error(getattr(found, name), tensor.numpy())
        figures[f"CLIP's vision tower, {kind}, {'CLIP' if whole else 'tower'}: {name}"] = error
        assert error < 1e-5
    assert relative_error(open_network("clip", tmp_path).look(images).features, embedding.numpy()) < 1e-5


@pytest.mark.parametrize(
    "asked",
    [
        {"size": {"shortest_edge": 30}, "crop_size": 24, "resample": 2},
        {"size": {"height": 24, "width": 24}, "do_center_crop": False},
        {"size": 20, "crop_size": 24, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.2]},
        {"size": 24, "crop_size": {"height": 24, "width": 24}, "do_normalize": False},
        {"size": 24, "crop_size": 24, "do_rescale": False},
        {"do_resize": False, "crop_size": 24},
    ],
    ids=str,
)
def test_preprocessing(asked, images, tmp_path):
    """Its file is followed, number by number."""
    make("quick_gelu", False).save_pretrained(tmp_path)
    processor = CLIPImageProcessor(**asked)
    processor.save_pretrained(tmp_path)
    encoder = read_image_encoder(tmp_path)
    for image in images:
        expected = processor(Image.fromarray(image), return_tensors="np").pixel_values[0]
        np.testing.assert_array_equal(encoder.pixels(image).transpose(2, 0, 1), expected)
