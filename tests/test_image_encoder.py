"""CLIP's vision tower, its folders, and images made what it reads. What transformers gives: tests/parity."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdiff import build
from jaxdiff.config import CLIPVisionConfig, ImageProcessorConfig, to_dict
from jaxdiff.evaluation.features import open_network
from jaxdiff.io.convert import torch_views
from jaxdiff.io.image_encoder import processed, read_image_encoder
from jaxdiff.io.weights import stored, write_safetensors
from jaxdiff.model import check_network
from jaxdiff.models.clip_vision import CLIPVisionEmbeddings

CONFIG = tiny.IMAGE_ENCODER
MEAN, STD = (np.float32(getattr(ImageProcessorConfig(), f"image_{name}")) for name in ("mean", "std"))


@pytest.fixture
def folder(tmp_path):
    return tiny.write_image_encoder(tmp_path / "encoder")


def test_a_folder_is_read_and_embeds_images_whatever_stands_beside_them(folder):
    encoder = read_image_encoder(folder)
    assert encoder.config == CONFIG
    folder.rename(folder.with_name("image_encoder"))
    assert read_image_encoder(folder.parent).config == CONFIG
    folder.with_name("image_encoder").rename(folder)
    check_network("image_encoder", encoder.config, encoder.params, folder)
    images = [np.random.default_rng(i).integers(0, 256, (20 + i, 9, 3)).astype(np.uint8) for i in range(3)]
    look = open_network("clip", folder).look
    together = look(images).features
    assert together.shape == (3, CONFIG.projection_dim)
    for image, embedding in zip(images, together, strict=True):
        np.testing.assert_allclose(look([image]).features[0], embedding, rtol=1e-5, atol=1e-5)


def test_a_patch_is_read_as_by_the_convolution_that_its_weights_are_named_for():
    params = tiny.random_params("image_encoder", CONFIG, np.random.default_rng(0))["vision_model"]["embeddings"]
    image = np.random.default_rng(1).normal(size=(1, 8, 8, 3)).astype(np.float32)
    got = CLIPVisionEmbeddings(CONFIG.hidden_size, CONFIG.patch_size).apply({"params": params}, jnp.asarray(image))
    kernel, positions = params["patch_embedding"]["kernel"], params["position_embedding"]["embedding"]
    expected = jax.lax.conv_general_dilated(
        image, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(1, 4, -1)
    np.testing.assert_allclose(got[:, 1:], np.asarray(expected) + positions[1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[:, 0], (params["class_embedding"] + positions[0])[None], rtol=1e-6)


def test_no_patch_waits_for_another():
    """Attention is not causal: the last patch changes the features of the first."""
    net = build.image_encoder(CONFIG)
    params = tiny.random_params("image_encoder", CONFIG, np.random.default_rng(0))
    image = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    image[1] = image[0]
    image[1, 4:, 4:] += 1
    features = net.apply({"params": params}, jnp.asarray(image)).penultimate
    assert np.abs(features[0, 1] - features[1, 1]).max() > 1e-3


# Images ---------------------------------------------------------------------------------------------------------------


def test_one_colour_stays_one_colour():
    colour = np.array([12, 130, 255], np.uint8)
    got = processed(np.tile(colour, (31, 17, 1)), ImageProcessorConfig())
    assert got.shape == (224, 224, 3)
    np.testing.assert_allclose(got, np.broadcast_to((colour / np.float32(255) - MEAN) / STD, got.shape), rtol=1e-5)


def test_the_middle_is_cut_out_of_the_shorter_side():
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 255
    config = ImageProcessorConfig(size=(4,), crop_size=(4, 4), do_normalize=False)
    np.testing.assert_array_equal(processed(wide, config), np.ones((4, 4, 3)))
    np.testing.assert_array_equal(processed(wide.swapaxes(0, 1), config), np.ones((4, 4, 3)))


def test_what_is_smaller_than_the_middle_lies_in_zeros():
    config = ImageProcessorConfig(do_resize=False, crop_size=(5, 2), do_normalize=False, do_rescale=False)
    got = processed(np.full((2, 4, 3), 7, np.uint8), config)[..., 0]
    np.testing.assert_array_equal(got, [[0, 0], [0, 0], [7, 7], [7, 7], [0, 0]])


def test_a_thread_of_pixels_is_refused():
    with pytest.raises(ValueError, match="at most 100 times"):
        processed(np.zeros((1, 101, 3), np.uint8), ImageProcessorConfig())


# Files ----------------------------------------------------------------------------------------------------------------

CONFIGS = {
    "another network": ({"model_type": "siglip_vision_model"}, "model_type"),
    "no network": ({"model_type": None}, "model_type"),
    "a width that heads do not divide": ({"num_attention_heads": 3}, "num_attention_heads"),
    "a patch that does not fit": ({"patch_size": 3}, "patch_size"),
    "grey": ({"num_channels": 1}, "num_channels"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "too many layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
    "absurd sides": ({"image_size": 2**40}, "image_size"),
    "text": ({"hidden_size": "16"}, "hidden_size"),
    "another activation": ({"hidden_act": "x"}, "hidden_act"),
    "other weights": ({"hidden_size": 32}, "misshapen"),
}


def checked(folder):
    found = read_image_encoder(folder)
    return found._replace(params=check_network("image_encoder", found.config, found.params, folder))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_is_not_supported_is_told(folder, kind):
    values, words = CONFIGS[kind]
    given = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=words) as told:
        checked(folder)
    assert str(folder) in str(told.value)


def test_the_vision_tower_of_a_whole_clip_model_is_read(folder):
    values = {name: value for name, value in to_dict(CONFIG).items() if name != "projection_dim"}
    whole = {"model_type": "clip", "vision_config": values, "text_config": {}, "projection_dim": CONFIG.projection_dim}
    (folder / "config.json").write_text(json.dumps(whole))
    params = tiny.random_params("image_encoder", CONFIG, np.random.default_rng(0))
    tensors = torch_views(params) | {"logit_scale": np.zeros((), np.float32)}
    write_safetensors(folder / "model.safetensors", stored(tensors))
    found = read_image_encoder(folder)
    assert found.config == CONFIG
    check_network("image_encoder", found.config, found.params, folder)


PROCESSORS = {
    "a number": ({"size": 8, "crop_size": 8}, None),
    "the shorter side": ({"size": {"shortest_edge": 9}, "crop_size": {"height": 8, "width": 8}}, None),
    "height and width": ({"size": {"height": 8, "width": 8}, "do_center_crop": False}, None),
    "another size": ({"size": 8, "crop_size": 16}, "reads 8x8"),
    "no size": ({"do_resize": False, "do_center_crop": False}, "reads 8x8"),
    "another class": ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type"),
    "an unknown side": ({"size": {"longest_edge": 8}}, "size is"),
    "text": ({"crop_size": "8"}, "crop_size is"),
    "a filter": ({"size": 8, "crop_size": 8, "resample": 9}, "resample"),
    "two colours": ({"size": 8, "crop_size": 8, "image_mean": [0.5, 0.5]}, "image_mean"),
    "no deviation": ({"size": 8, "crop_size": 8, "image_std": [0, 1, 1]}, "image_std"),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_preprocessors_file_is_followed_or_refused(folder, kind):
    values, words = PROCESSORS[kind]
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    if words is None:
        encoder = read_image_encoder(folder)
        assert encoder.pixels(np.zeros((10, 20, 3), np.uint8)).shape == (8, 8, 3)
        return
    with pytest.raises(ValueError, match=words) as told:
        read_image_encoder(folder)
    assert "preprocessor_config.json" in str(told.value)


def test_a_folder_of_something_else_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        read_image_encoder(tmp_path)


def test_the_defaults_are_transformers():
    """What its configs leave out."""
    assert CLIPVisionConfig().projection_dim == 512
    assert CLIPVisionConfig().tokens == 50
