"""Models that read an image themselves: variations, unCLIP, upscalers. What diffusers draws: tests/parity."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from tiny import off

import jaxdiff
from jaxdiff.config import ImageNormalizerConfig, ImageProcessorConfig, SchedulerConfig
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.families import ImageVariation, StableUnCLIP
from jaxdiff.generation.programs import denoise, read_images
from jaxdiff.io.image_encoder import ImageEncoder
from jaxdiff.model import Model, Network, read_model

PHOTO = np.random.default_rng(0).integers(0, 256, (20, 16, 3)).astype(np.uint8)
OTHER = PHOTO[::-1].copy()
ASKED = {"steps": 3, "guidance": 4.0}
WIDTH = tiny.IMAGE_ENCODER.projection_dim
NOISING = SchedulerConfig(beta_schedule="squaredcos_cap_v2")


def made(family, **configs):
    rng = np.random.default_rng(0)
    configs = {"vae": tiny.VAE, "image_encoder": tiny.IMAGE_ENCODER} | configs
    networks = {}
    for role, config in configs.items():
        params = tiny.random_params(family.FOLDERS[role], config, rng)
        networks[role] = Network(config, params)
    encoder = networks["image_encoder"]
    processor = ImageProcessorConfig(size=(8,), crop_size=(8, 8))
    reader = ImageEncoder(Path("image_encoder"), encoder.config, encoder.params, processor)
    return Model(networks, tiny.SCHEDULER, None, family, name="tiny", image_encoder=reader)


def variation():
    return made(ImageVariation, denoiser=replace(tiny.UNET, cross_attention_dim=WIDTH))


def unclip():
    unet = replace(tiny.UNET, class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH)
    rng = np.random.default_rng(0)
    whole = variation()
    normalizer = {"mean": rng.normal(size=(1, WIDTH)).astype(np.float32), "std": np.ones((1, WIDTH), np.float32)}
    networks = {
        "denoiser": Network(unet, tiny.random_params("unet", unet, rng)),
        "vae": whole.networks["vae"],
        "text_encoder": tiny.model().networks["text_encoder"],
        "image_encoder": whole.networks["image_encoder"],
        "image_normalizer": Network(ImageNormalizerConfig(WIDTH), normalizer),
    }
    return replace(whole, networks=networks, family=StableUnCLIP, tokenizer=tiny.tokenizer(), noising=NOISING)


def upscaler():
    unet = replace(tiny.UNET, in_channels=7, num_class_embeds=1000, only_cross_attention=(True, False))
    return replace(tiny.model(denoiser=unet), noising=SchedulerConfig(beta_schedule="scaled_linear"))


MODELS = {"variation": variation, "unCLIP": unclip, "upscaler": upscaler}


@pytest.fixture(scope="module")
def pipes():
    return {name: jaxdiff.Pipeline(make()) for name, make in MODELS.items()}


def asked(name, image=PHOTO):
    """A prompt where one is read, and the image."""
    prompt = "" if name == "variation" else "a dog"
    return prompt, {"image" if name == "upscaler" else "image_prompt": image, **ASKED}


@pytest.mark.parametrize("name", MODELS)
def test_the_image_is_read(pipes, name):
    prompt, fields = asked(name)
    one = pipes[name](prompt, **fields)
    np.testing.assert_array_equal(pipes[name](prompt, **fields), one)
    assert off(pipes[name](prompt, **asked(name, OTHER)[1]), one) > 2
    assert one.shape == (1, *((40, 32) if name == "upscaler" else (16, 16)), 3)


@pytest.mark.parametrize("name", ["unCLIP", "upscaler"])
def test_the_noise_level_is_a_number_that_compiles_nothing(pipes, name):
    prompt, fields = asked(name)
    plain = pipes[name](prompt, **fields)
    counts = denoise.count, read_images.count
    default = 20 if name == "upscaler" else 0
    np.testing.assert_array_equal(pipes[name](prompt, noise_level=default, **fields), plain)
    assert off(pipes[name](prompt, noise_level=300, **fields), plain) > 2
    assert (denoise.count, read_images.count) == counts
    with pytest.raises(ValueError, match=r"from 0 to (999|350)"):
        pipes[name](prompt, noise_level=1000, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_images_of_a_batch_are_those_that_are_drawn_alone(pipes, name):
    prompt, fields = asked(name, [PHOTO, OTHER])
    both = pipes[name]([prompt] * 2, **fields)
    for i, image in enumerate((PHOTO, OTHER)):
        assert off(pipes[name](prompt, seed=i, **asked(name, image)[1])[0], both[i]) <= 1


@pytest.mark.slow
def test_an_image_is_drawn_over_beside_the_one_that_is_read(pipes):
    start = np.random.default_rng(3).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    for name in ("variation", "unCLIP"):
        prompt, fields = asked(name)
        drawn = pipes[name](prompt, image=start, strength=0.4, **fields)
        assert off(drawn, pipes[name](prompt, image=start, strength=0.4, **asked(name, OTHER)[1])) > 2


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_folder_is_the_model(name, tmp_path):
    model = MODELS[name]()
    model.save(tmp_path / "model")
    again = read_model(tmp_path / "model")
    assert again.family is model.family
    heads = {"attention_head_dim": again.configs["denoiser"].attention_head_dim}  # one number is written as several
    assert again.configs == model.configs | {"denoiser": replace(model.configs["denoiser"], **heads)}
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    if model.noising is not None:
        np.testing.assert_array_equal(make_schedule(again.noising).alpha_bar, make_schedule(model.noising).alpha_bar)
    if model.image_encoder is not None:
        assert again.image_encoder.processor == model.image_encoder.processor
    model.save(tmp_path / "model")  # over itself


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_denoiser_as_a_function_reads_it(pipes, name):
    guesses = []
    for image in (PHOTO, OTHER):
        prompt, fields = asked(name, image)
        given = {name: value for name, value in fields.items() if name != "steps"}
        x = pipes[name].noise(size=(32, 40) if name == "upscaler" else None)
        guesses.append(pipes[name].denoiser(prompt, **given)(x, 1.0))
    assert np.abs(guesses[0] - guesses[1]).max() > 1e-3


REFUSED = [
    ("variation", "a dog", {"image_prompt": PHOTO}, "reads an image and no prompt"),
    ("variation", "", {}, "give one as image_prompt"),
    ("variation", "", {"image_prompt": (PHOTO, OTHER)}, "give one as image_prompt"),
    ("variation", "", {"image_prompt": PHOTO, "noise_level": 3}, "reads no image with noise"),
    ("unCLIP", "a dog", {}, "give one as image_prompt"),
    ("unCLIP", "a dog", {"image_prompt": PHOTO, "image_prompt_scale": 0.5}, "is for IP-Adapters"),
    ("upscaler", "a dog", {}, "enlarges an image; give the image"),
    ("upscaler", "a dog", {"image": PHOTO, "strength": 0.5}, "leave out strength"),
    ("upscaler", "a dog", {"image": PHOTO, "mask": np.ones((20, 16))}, "leave out mask"),
    ("upscaler", "a dog", {"image": PHOTO, "size": (16, 16)}, "size is"),
    ("upscaler", "a dog", {"image_prompt": PHOTO, "image": PHOTO}, "no IP-Adapter"),
]


@pytest.mark.parametrize(("name", "prompt", "fields", "words"), REFUSED)
def test_what_does_not_go_with_them_is_refused(pipes, name, prompt, fields, words):
    with pytest.raises(ValueError, match=words):
        pipes[name](prompt, **fields, **ASKED)


@pytest.mark.slow
def test_models_that_are_not_whole_are_refused():
    with pytest.raises(ValueError, match="no noise schedule for it"):
        jaxdiff.Pipeline(replace(upscaler(), noising=None))
    unet = replace(tiny.UNET, class_embed_type="projection", projection_class_embeddings_input_dim=24)
    with pytest.raises(ValueError, match="image_encoder or image_normalizer is missing"):
        tiny.model(denoiser=unet).modules()
    with pytest.raises(ValueError, match="cross_attention_dim is 16 and the image encoder's projection_dim 12"):
        made(ImageVariation, denoiser=tiny.UNET).modules()
    whole = unclip()
    for role, config, words in (
        ("image_normalizer", ImageNormalizerConfig(5), "embedding_dim is 5"),
        ("denoiser", replace(whole.configs["denoiser"], projection_class_embeddings_input_dim=12), "must be"),
    ):
        networks = whole.networks | {role: Network(config, whole.networks[role].params)}
        with pytest.raises(ValueError, match=words):
            replace(whole, networks=networks).modules()
