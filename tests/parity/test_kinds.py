"""Models that are told more than a prompt draw what diffusers draws."""

import kinds
import numpy as np
import pytest
import torch
import xl
from diffusers import (
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from pairs import TEXTS, nchw
from test_xl import ROUNDED, SIZE, error

import jaxdiff

PROMPTS = TEXTS[:2]


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).normal(size=(2, 8, 12, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(1).integers(0, 256, (16, 24, 3)).astype(np.uint8)


def test_a_denoiser_that_reads_the_guidance_scale(tmp_path, figures):
    scheduler = LCMScheduler(**xl.SCHEDULE)
    parts = kinds.parts(tmp_path, scheduler, time_cond_proj_dim=9)
    parts["unet"].time_embedding.cond_proj.weight.data *= 30  # so that the scale is seen in the image
    reference = xl.saved(LatentConsistencyModelPipeline(**parts, **kinds.SAFETY), tmp_path)
    pipe = jaxdiff.load(tmp_path / "model")
    images = []
    for guidance in (8.5, 3.0):
        got = pipe(PROMPTS[0], steps=4, guidance=guidance, rng="torch", seed=3, size=(24, 16))
        expected = reference(PROMPTS[0], num_inference_steps=4, guidance_scale=guidance, output_type="np",
                             generator=torch.Generator().manual_seed(3), **SIZE).images  # fmt: skip
        assert error(got, expected, figures, f"LCM, guidance {guidance}") <= ROUNDED
        images.append(got.astype(int))
    assert np.abs(images[0] - images[1]).max() > 10


def test_an_image_is_edited_by_instruction(tmp_path, latents, picture, figures):
    parts = kinds.parts(tmp_path, in_channels=8)
    reference = xl.saved(StableDiffusionInstructPix2PixPipeline(**parts, **kinds.SAFETY), tmp_path)
    pipe = jaxdiff.load(tmp_path / "model")
    common = {"num_inference_steps": 5, "output_type": "np", "latents": nchw(latents[:1])}
    for guidance, image_guidance, negative in ((6.0, 1.5, ""), (6.0, 1.0, "a cat"), (3.0, 4.0, ""), (1.0, 1.5, "")):
        expected = reference(PROMPTS[0], image=picture[None] / 255.0, negative_prompt=negative, guidance_scale=guidance,
                             image_guidance_scale=image_guidance, **common).images  # fmt: skip
        asked = {"guidance": guidance, "image_guidance": image_guidance, "steps": 5, "latents": latents[0]}
        got = pipe(PROMPTS[0], negative, image=picture, **asked)
        assert error(got, expected, figures, f"pix2pix, {guidance}, {image_guidance}") <= ROUNDED


def test_a_depth_map_is_followed(tmp_path, latents, picture, figures):
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    parts = kinds.parts(tmp_path, in_channels=5)
    unused = DPTForDepthEstimation(
        DPTConfig(hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8, image_size=32,
                  patch_size=16, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8],
                  fusion_hidden_size=8, is_hybrid=False)
    )  # fmt: skip
    reference = StableDiffusionDepth2ImgPipeline(**parts, depth_estimator=unused, feature_extractor=DPTImageProcessor())
    xl.saved(reference, tmp_path)
    pipe = jaxdiff.load(tmp_path / "model")
    for sides in ((8, 12), (20, 31), (5, 5)):
        depth = np.random.default_rng(3).normal(size=sides).astype(np.float32)
        generator = torch.Generator().manual_seed(3)
        expected = reference(PROMPTS[0], image=nchw(picture[None] / 127.5 - 1).float(),
                             depth_map=torch.from_numpy(depth[None]), strength=0.6, num_inference_steps=5,
                             guidance_scale=4.0, generator=generator, output_type="np").images  # fmt: skip
        _, noise = torch.randn((2, 4, 8, 12), generator=generator.manual_seed(3))  # the first is the autoencoder's
        got = pipe(PROMPTS[0], image=picture, depth=depth, strength=0.6, steps=5, guidance=4.0,
                   latents=noise.numpy().transpose(1, 2, 0))  # fmt: skip
        assert error(got, expected, figures, f"depth map {sides}") <= ROUNDED
