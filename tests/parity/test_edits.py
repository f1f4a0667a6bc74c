"""Guidance of other kinds, PyTorch's seeds, and pictures from pictures, against diffusers run live."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from pairs import SD1_UNET, TEXTS, nchw, randomise, relative_error

from jaxdiff.diffusion.guidance import projected
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.io.folder import read_network
from jaxdiff.model import Network

PROMPTS, NEGATIVES = TEXTS[:2], ["", "a cat"]
SIZE = {"height": 16, "width": 24}


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).normal(size=(2, 8, 12, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def photos():
    return np.random.default_rng(1).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def mask():
    mask = np.zeros((16, 24), np.float32)
    mask[:, 8:] = 1
    return mask


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoded(pair, photos):
    """The most likely latents, scaled, as diffusers has them."""
    with torch.no_grad():
        moments = pair.torch.vae.encode(nchw(photos / np.float32(127.5) - 1)).latent_dist
    return pair.torch.vae.config.scaling_factor * moments.mode()


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaled_guidance(pair, latents, rescale, request, figures):
    reference = quiet(StableDiffusionPipeline(**pair.torch.components, requires_safety_checker=False))
    expected = reference(PROMPTS, negative_prompt=NEGATIVES, num_inference_steps=5, guidance_scale=7.5, **SIZE,
                         guidance_rescale=rescale, latents=nchw(latents), output_type="np").images  # fmt: skip
    got = Pipeline(pair.ours)(PROMPTS, NEGATIVES, steps=5, guidance=7.5, guidance_rescale=rescale, latents=latents)
    worst = np.abs(got - 255 * expected).max()
    figures[f"rescale {rescale}, {request.node.callspec.id}: largest difference of 255"] = worst
    assert worst <= 2


def test_projected_guidance_is_diffusers(figures):
    cond, uncond = np.random.default_rng(0).normal(size=(2, 1, 4, 8, 12)).astype(np.float32)
    worst = 0.0
    for eta, limit in ((0.0, 0.0), (0.3, 5.0), (1.0, 2.0)):
        update = projected(jnp.asarray(cond - uncond), jnp.asarray(cond), eta, limit or jnp.inf)
        expected = normalized_guidance(torch.from_numpy(cond), torch.from_numpy(uncond), 6.5, eta=eta,
                                       norm_threshold=limit, use_original_formulation=True)  # fmt: skip
        worst = max(worst, relative_error(cond + 6.5 * update, expected.numpy()))
    figures["projected guidance: relative error"] = worst
    assert worst < 1e-6


def test_perturbed_attention(pair, latents, request, figures):
    parts = {name: part for name, part in pair.torch.components.items() if name != "unet"}
    unet = type(pair.torch.unet).from_config(pair.torch.unet.config)  # whose attention it replaces
    unet.load_state_dict(pair.torch.unet.state_dict())
    reference = quiet(StableDiffusionPAGPipeline(**parts, unet=unet, requires_safety_checker=False))
    expected = reference(PROMPTS, negative_prompt=NEGATIVES, num_inference_steps=5, guidance_scale=5.0, pag_scale=3.0,
                         latents=nchw(latents), output_type="np", **SIZE).images  # fmt: skip
    got = Pipeline(pair.ours)(PROMPTS, NEGATIVES, steps=5, guidance=5.0, pag_scale=3.0, latents=latents)
    worst = np.abs(got - 255 * expected).max()
    figures[f"perturbed attention, {request.node.callspec.id}: largest difference of 255"] = worst
    assert worst <= 2


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_seed_from_pytorch_gives_pytorchs_picture(pair, eta, request, figures):
    reference = quiet(StableDiffusionPipeline(**pair.torch.components, requires_safety_checker=False))
    expected = reference(PROMPTS, num_inference_steps=6, guidance_scale=4.0, eta=eta, **SIZE, output_type="np",
                         generator=generators(7, 2**40 + 3)).images  # fmt: skip
    got = Pipeline(pair.ours)(PROMPTS, seed=[7, 2**40 + 3], rng="torch", steps=6, guidance=4.0, eta=eta, size=(24, 16))
    worst = np.abs(got - 255 * expected).max()
    figures[f"PyTorch's seeds, eta {eta}, {request.node.callspec.id}: largest difference of 255"] = worst
    assert worst <= 2


@pytest.mark.parametrize("strength", [0.3, 0.65, 1.0])
def test_image_to_image(pair, photos, strength, request, figures):
    reference = quiet(StableDiffusionImg2ImgPipeline(**pair.torch.components, requires_safety_checker=False))
    expected = reference(PROMPTS, image=encoded(pair, photos), strength=strength, num_inference_steps=7,
                         guidance_scale=4.0, generator=generators(3, 4), output_type="np").images  # fmt: skip
    got = Pipeline(pair.ours)(PROMPTS, image=photos, strength=strength, steps=7, guidance=4.0, seed=3, rng="torch")
    worst = np.abs(got - 255 * expected).max()
    figures[f"image to image, {request.node.callspec.id}: largest difference of 255"] = worst
    assert worst <= 2


# At strength 1 diffusers shows the network noise alone at the first step, also where the image is kept.
@pytest.mark.parametrize("strength", [0.4, 0.9])
def test_inpainting_with_a_model_of_four_channels(pair, photos, mask, strength, request, figures):
    reference = quiet(StableDiffusionInpaintPipeline(**pair.torch.components, requires_safety_checker=False))
    expected = reference(PROMPTS, image=encoded(pair, photos), mask_image=torch.from_numpy(mask)[None, None], **SIZE,
                         strength=strength, num_inference_steps=6, guidance_scale=4.0, generator=generators(3, 4),
                         masked_image_latents=torch.zeros(2, 4, 8, 12), output_type="np").images  # fmt: skip
    got = Pipeline(pair.ours)(
        PROMPTS, image=photos, mask=mask, strength=strength, steps=6, guidance=4.0, seed=3, rng="torch"
    )
    worst = np.abs(got - 255 * expected)[:, :, 8:].max()
    figures[f"inpainting, {request.node.callspec.id}: largest difference of 255"] = worst
    assert worst <= 2


def test_inpainting_with_a_model_of_nine_channels(sd1, photos, mask, latents, tmp_path, figures):
    torch.manual_seed(5)
    unet = randomise(type(sd1.torch.unet)(**SD1_UNET, in_channels=9), 6)
    parts = {name: part for name, part in sd1.torch.components.items() if name != "unet"}
    reference = quiet(StableDiffusionInpaintPipeline(**parts, unet=unet, requires_safety_checker=False))
    unet.save_pretrained(tmp_path / "unet")
    networks = {**sd1.ours.networks, "denoiser": Network(*read_network(tmp_path, "unet"))}
    ours = Pipeline(dataclasses.replace(sd1.ours, networks=networks))
    hidden = np.where(mask[None, ..., None] > 0.5, np.uint8(127), photos)
    expected = reference(PROMPTS, image=encoded(sd1, photos), mask_image=torch.from_numpy(mask)[None, None], **SIZE,
                         num_inference_steps=6, guidance_scale=4.0, latents=nchw(latents), strength=1.0,
                         masked_image_latents=encoded(sd1, hidden), output_type="np").images  # fmt: skip
    got = ours(PROMPTS, image=photos, mask=mask, steps=6, guidance=4.0, latents=latents)
    worst = np.abs(got - 255 * expected)[:, :, 8:].max()
    figures["inpainting with nine channels: largest difference of 255"] = worst
    assert worst <= 2
