"""Stable Diffusion XL and its kin draw what diffusers draws, from the same latents."""

import numpy as np
import pytest
import torch
import xl
from diffusers import StableDiffusionXLPipeline
from pairs import TEXTS, nchw

import jaxdiff

PROMPTS = [TEXTS[0], "a dog! two green apples"]
ROUNDED = 0.51
"""Of 255, what rounding to whole numbers costs, and a hundredth."""


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).normal(size=(2, 8, 12, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    return xl.base(folder), jaxdiff.load(folder / "model")


CALLS = [
    ({}, {}),
    ({"negative_prompt": ["a cat", " "]}, {"negative_prompt": ["a cat", " "]}),
    ({"original_size": (40, 31), "crop": (3, 5)}, {"original_size": (31, 40), "crops_coords_top_left": (5, 3)}),
    ({"guidance": 1.0}, {"guidance_scale": 1.0}),
]


@pytest.fixture(scope="module")
def refiner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refiner")
    return xl.refiner(folder), folder / "model"


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(1).integers(0, 256, (16, 24, 3)).astype(np.uint8)


SIZE = {"height": 16, "width": 24}


def error(ours, theirs, figures, what):
    """The largest difference of 255, told; theirs in [0, 1]."""
    largest = xl.largest(ours, theirs)
    figures[f"{what}: largest difference of 255"] = largest
    return largest


def test_the_refiner_takes_over(base, refiner, latents, figures):
    reference, own = base
    second, path = refiner
    pipe = jaxdiff.Pipeline(own.model, refiner=jaxdiff.load(path))
    common = {"num_inference_steps": 7, "guidance_scale": 5.0, "output_type": "latent"}
    for start in (0.4, 0.8, 1.0):
        got = pipe(PROMPTS, steps=7, guidance=5.0, latents=latents, refiner_start=start)
        drawn = reference(PROMPTS, latents=nchw(latents), denoising_end=start, **common, **SIZE).images
        if start < 1:
            sizes = dict.fromkeys(("original_size", "target_size", "negative_original_size"), (16, 24))
            drawn = second(PROMPTS, image=drawn, denoising_start=start, **sizes, **common).images
        expected = reference.vae.decode(drawn / reference.vae.config.scaling_factor).sample.detach()
        expected = reference.image_processor.postprocess(expected, "np")
        assert error(got, expected, figures, f"SDXL and refiner from {start}") <= ROUNDED


def test_the_refiner_alone_changes_an_image(refiner, picture, figures):
    second, path = refiner
    common = {"num_inference_steps": 9, "guidance_scale": 5.0, "original_size": (16, 24), "target_size": (16, 24)}
    generator = torch.Generator().manual_seed(3)
    expected = second(PROMPTS[0], negative_prompt="a cat", image=picture[None] / 255.0, strength=0.4,
                      generator=generator, output_type="np", **common).images  # fmt: skip
    _, noise = torch.randn((2, 4, 8, 12), generator=generator.manual_seed(3))  # the first is the autoencoder's
    asked = {"image": picture, "strength": 0.4, "steps": 9, "guidance": 5.0}
    got = jaxdiff.load(path)(PROMPTS[0], "a cat", latents=noise.numpy().transpose(1, 2, 0), **asked)
    assert error(got, expected, figures, "SDXL's refiner, an image") <= ROUNDED


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_turbo(tmp_path, steps, figures):
    reference = xl.turbo(tmp_path)
    got = jaxdiff.load(tmp_path / "model")(PROMPTS[0], steps=steps, guidance=0.0, rng="torch", seed=5, size=(24, 16))
    expected = reference(PROMPTS[0], num_inference_steps=steps, guidance_scale=0.0, output_type="np",
                         generator=torch.Generator().manual_seed(5), **SIZE).images  # fmt: skip
    assert error(got, expected, figures, f"SDXL-Turbo, {steps} steps") <= ROUNDED


def test_inpainting(tmp_path, picture, latents, figures):
    reference = xl.inpainting(tmp_path)
    mask = np.zeros((16, 24), np.float32)
    mask[4:12, 8:20] = 1
    got = jaxdiff.load(tmp_path / "model")(PROMPTS[0], image=picture, mask=mask, steps=5, guidance=5.0,
                                           latents=latents[0])  # fmt: skip
    expected = reference(PROMPTS[0], image=picture[None] / 255.0, mask_image=mask[None], strength=1.0,
                         num_inference_steps=5, guidance_scale=5.0, latents=nchw(latents[:1]), output_type="np",
                         **SIZE).images  # fmt: skip
    inside = (slice(None), slice(4, 12), slice(8, 20))
    assert error(got[inside], expected[inside], figures, "SDXL inpainting") <= ROUNDED


def test_a_saved_model_draws_the_same_in_diffusers_and_here(base, latents, tmp_path):
    reference, pipe = base
    pipe.save(tmp_path / "again")
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path / "again", add_watermarker=False)
    again.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 3, "latents": nchw(latents), "output_type": "np"} | SIZE
    np.testing.assert_array_equal(again(PROMPTS, **asked).images, reference(PROMPTS, **asked).images)
    ours = {"steps": 3, "latents": latents}
    np.testing.assert_array_equal(jaxdiff.load(tmp_path / "again")(PROMPTS, **ours), pipe(PROMPTS, **ours))


@pytest.mark.parametrize(("ours", "theirs"), CALLS)
def test_base(base, latents, ours, theirs, figures):
    reference, pipe = base
    got = pipe(PROMPTS, **{"steps": 4, "guidance": 5.0, "latents": latents} | ours)
    asked = {"num_inference_steps": 4, "guidance_scale": 5.0, "latents": nchw(latents), "output_type": "np"}
    expected = reference(PROMPTS, **asked | SIZE | theirs).images
    assert error(got, expected, figures, f"SDXL, {ours}") <= ROUNDED
