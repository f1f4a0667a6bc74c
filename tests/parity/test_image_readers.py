"""Models that read an image themselves draw what diffusers draws: variations, unCLIP, upscalers."""

import kinds
import numpy as np
import pytest
import torch
import xl
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionImageVariationPipeline,
    StableDiffusionUpscalePipeline,
    StableUnCLIPImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from pairs import TEXTS, nchw
from PIL import Image
from test_image_encoders import SIZES
from test_xl import ROUNDED, error
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import jaxdiff

ENCODER = SIZES["quick_gelu"]
WIDTH = ENCODER["projection_dim"]
SIZE = {"width": 24, "height": 16}


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).normal(size=(8, 12, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (30, 40 + i, 3)).astype(np.uint8) for i in range(2)]


def reader():
    """An image encoder, whose images are made smaller than it reads and lie in zeros."""
    torch.manual_seed(4)
    size = ENCODER["image_size"]
    return {
        "image_encoder": xl.spiced(CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER)), 5),
        "feature_extractor": CLIPImageProcessor(size=size, crop_size=size, image_mean=[0.4, 0.5, 0.6]),
    }


def test_an_image_in_the_prompts_place(tmp_path, latents, photos, figures):
    parts = kinds.parts(tmp_path, cross_attention_dim=WIDTH) | reader()
    known = {name: part for name, part in parts.items() if name not in ("text_encoder", "tokenizer")}
    reference = StableDiffusionImageVariationPipeline(**known, safety_checker=None, requires_safety_checker=False)
    xl.saved(reference, tmp_path)
    pipe = jaxdiff.load(tmp_path / "model")
    images = []
    for photo, guidance in ((photos[0], 6.0), (photos[1], 6.0), (photos[0], 1.0)):
        expected = reference(Image.fromarray(photo), latents=nchw(latents[None]), num_inference_steps=5,
                             guidance_scale=guidance, output_type="np", **SIZE).images  # fmt: skip
        got = pipe("", image_prompt=photo, steps=5, guidance=guidance, latents=latents)
        assert error(got, expected, figures, f"image variation, guidance {guidance}") <= ROUNDED
        images.append(got)
    assert np.abs(images[0].astype(int) - images[1]).max() > 5


def unclip(folder):
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    parts = kinds.parts(folder, class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH)
    normalizer = StableUnCLIPImageNormalizer(WIDTH)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        normalizer.mean += torch.randn(1, WIDTH, generator=generator)
        normalizer.std += torch.rand(1, WIDTH, generator=generator)
    parts |= reader() | {"image_normalizer": normalizer, "image_noising_scheduler": noising}
    return xl.saved(StableUnCLIPImg2ImgPipeline(**parts), folder)


def test_an_image_beside_the_prompt(tmp_path, latents, photos, figures):
    reference = unclip(tmp_path)
    pipe = jaxdiff.load(tmp_path / "model")
    images = []
    for photo, level, guidance, negative in ((photos[0], 0, 6.0, ""), (photos[1], 0, 6.0, "a cat"),
                                             (photos[0], 700, 6.0, ""), (photos[0], 300, 1.0, "")):  # fmt: skip
        expected = reference(Image.fromarray(photo), TEXTS[0], negative_prompt=negative, num_inference_steps=5,
                             guidance_scale=guidance, noise_level=level, latents=nchw(latents[None]),
                             generator=torch.Generator().manual_seed(3), output_type="np", **SIZE).images  # fmt: skip
        got = pipe(TEXTS[0], negative, image_prompt=photo, noise_level=level, steps=5, guidance=guidance,
                   latents=latents, seed=3, rng="torch")  # fmt: skip
        assert error(got, expected, figures, f"unCLIP, noise level {level}, guidance {guidance}") <= ROUNDED
        images.append(got.astype(int))
    assert min(np.abs(images[0] - other).max() for other in images[1:]) > 5


def test_seeds_are_pytorchs(tmp_path, photos, figures):
    """The image's noise is drawn first, then the latents, then the steps' noise."""
    reference = unclip(tmp_path)
    expected = reference(Image.fromarray(photos[0]), TEXTS[0], num_inference_steps=4, guidance_scale=4.0, eta=1.0,
                         noise_level=500, generator=torch.Generator().manual_seed(7), output_type="np",
                         **SIZE).images  # fmt: skip
    got = jaxdiff.load(tmp_path / "model")(TEXTS[0], image_prompt=photos[0], noise_level=500, steps=4, guidance=4.0,
                                           seed=7, rng="torch", size=(24, 16), eta=1.0)  # fmt: skip
    assert error(got, expected, figures, "unCLIP, PyTorch's seed") <= ROUNDED


@pytest.mark.parametrize("only", [(True, False), (True, True), False], ids=str)
def test_an_image_is_enlarged(tmp_path, only, figures):
    scheduler = DDIMScheduler(**xl.SCHEDULE, clip_sample=False, prediction_type="v_prediction")
    # Another width of the context than of any level, so that attention to the wrong of them would fail.
    vae = {"block_out_channels": (8, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 3,
           "up_block_types": ("UpDecoderBlock2D",) * 3, "scaling_factor": 0.08333}  # fmt: skip
    parts = kinds.parts(tmp_path, scheduler, vae, in_channels=7, num_class_embeds=1000, only_cross_attention=only,
                        down_block_types=("CrossAttnDownBlock2D",) * 2,
                        up_block_types=("CrossAttnUpBlock2D",) * 2)  # fmt: skip
    low = DDPMScheduler(**xl.SCHEDULE)
    reference = StableDiffusionUpscalePipeline(**parts, low_res_scheduler=low, max_noise_level=350)
    xl.saved(reference, tmp_path)
    pipe = jaxdiff.load(tmp_path / "model")
    small = np.random.default_rng(2).integers(0, 256, (8, 12, 3)).astype(np.uint8)
    images = []
    for level, guidance in ((None, 6.0), (300, 6.0), (20, 1.0)):
        more = {} if level is None else {"noise_level": level}
        expected = reference(TEXTS[0], Image.fromarray(small), num_inference_steps=5, guidance_scale=guidance,
                             generator=torch.Generator().manual_seed(3), output_type="np", **more).images  # fmt: skip
        got = pipe(TEXTS[0], image=small, steps=5, guidance=guidance, seed=3, rng="torch", **more)
        assert got.shape == (1, 32, 48, 3)
        assert error(got, expected, figures, f"upscaler, {only}, noise level {level}, {guidance}") <= ROUNDED
        images.append(got.astype(int))
    assert np.abs(images[0] - images[1]).max() > 5
