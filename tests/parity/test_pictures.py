"""From the same latents, with the same settings, diffusers draws the same pictures."""

import dataclasses

import numpy as np
import pytest
from diffusers import DDIMScheduler, StableDiffusionPipeline
from pairs import TEXTS, nchw

import jaxdiff
from jaxdiff.io.scheduler import scheduler_values

PROMPTS, NEGATIVES = TEXTS[:2], ["", "a cat"]
# steps, guidance, negative prompts
ASKED = [(4, 7.5, ["", ""]), (11, 3.0, NEGATIVES), (5, 1.0, ["", ""])]
SCHEDULERS = {
    "leading": {"timestep_spacing": "leading", "set_alpha_to_one": False},
    "leading, offset 0, to one": {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing, zero SNR": {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    "clipped": {"clip_sample": True, "clip_sample_range": 0.5},
}
CASES = [
    ("sd1", "leading"), ("sd1", "trailing"), ("sd1", "linspace"), ("sd1", "clipped"),
    ("sd2", "leading, offset 0, to one"), ("sd2", "trailing"), ("sd2", "linspace"), ("sd2", "trailing, zero SNR"),
]  # fmt: skip


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).normal(size=(2, 8, 12, 4)).astype(np.float32)


def theirs(pipe, latents, steps, guidance, negatives):
    """[b, h, w, 3] in [0, 1]."""
    return pipe(PROMPTS, negative_prompt=negatives, num_inference_steps=steps, guidance_scale=guidance,
                latents=nchw(latents), height=16, width=24, output_type="np").images  # fmt: skip


@pytest.mark.parametrize(("model", "scheduler"), CASES)
def test_pictures(model, scheduler, latents, request, figures):
    pair = request.getfixturevalue(model)
    config = dataclasses.replace(pair.ours.scheduler, **SCHEDULERS[scheduler])
    ours = jaxdiff.Pipeline(dataclasses.replace(pair.ours, scheduler=config))
    reference = StableDiffusionPipeline(**pair.torch.components, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    # Set afterwards: the constructor would overrule `steps_offset` and `clip_sample`.
    reference.scheduler = DDIMScheduler(**scheduler_values(config))
    worst = 0.0
    for steps, guidance, negatives in ASKED:
        got = ours(PROMPTS, negatives, steps=steps, guidance=guidance, latents=latents)
        expected = theirs(reference, latents, steps, guidance, negatives)
        assert expected.std() > 0.05  # a picture with something in it
        worst = max(worst, np.abs(got - 255 * expected).max())
    figures[f"pictures, {model}, {scheduler}: largest difference of 255"] = worst
    assert worst <= 2


def test_our_saved_model_draws_our_picture_in_diffusers(pair, latents, tmp_path, request, figures):
    pipe = jaxdiff.load(pair.path)
    pipe.save(tmp_path / "model")
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    for reference in (saved, pair.torch):
        reference.set_progress_bar_config(disable=True)
    got = pipe(PROMPTS, NEGATIVES, steps=4, guidance=7.5, latents=latents) / 255
    picture, original = (theirs(reference, latents, 4, 7.5, NEGATIVES) for reference in (saved, pair.torch))
    name = f"saved, {request.node.callspec.id}: diffusers' picture and"
    figures[f"{name} ours, in eight bits"] = np.abs(picture - got).max()
    figures[f"{name} the original's"] = np.abs(picture - original).max()
    assert np.abs(picture - got).max() < 2e-3
    assert np.abs(picture - original).max() < 2e-3
