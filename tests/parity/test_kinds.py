"""Models that are told more than a prompt draw what diffusers draws."""

import kinds
import numpy as np
import pytest
import torch
import xl
from diffusers import LatentConsistencyModelPipeline, LCMScheduler
from pairs import TEXTS
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
