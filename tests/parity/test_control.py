"""Pictures that control images steer are diffusers'."""

import numpy as np
import pytest
import torch
import xl
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
)
from pairs import TEXTS, nchw, randomise
from PIL import Image
from xl import without_noise

import jaxdiff
from jaxdiff.model import read_model

TEXTS = TEXTS[:2]
SIZE = 24, 16


def spiced(module, seed):
    """What begins as zeros, moved away from there: it would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
    return randomise(module, seed)


def make_net(pair, seed, **config):
    net = ControlNetModel.from_unet(pair.torch.unet, conditioning_embedding_out_channels=(8, 16))
    net.register_to_config(**config)
    return spiced(net, seed)


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def controlled(request, tmp_path_factory):
    """A pair, and three networks for it with their folders; the third one takes means over the image."""
    pair = request.getfixturevalue(request.param)
    nets = [make_net(pair, 1), make_net(pair, 2, controlnet_conditioning_channel_order="bgr"),
            make_net(pair, 3, global_pool_conditions=True)]  # fmt: skip
    folders = []
    for i, net in enumerate(nets):
        net.save_pretrained(folder := tmp_path_factory.mktemp(f"{request.param}-{i}"))
        folders.append(folder)
    return pair, nets, folders


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).normal(size=(2, 8, 12, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def images():
    """Two control images, of another size than the result."""
    return [np.random.default_rng(i).integers(0, 256, (20 + 4 * i, 28, 3)).astype(np.uint8) for i in range(2)]


def theirs(pair, nets, latents, images, **more):
    pipe = StableDiffusionControlNetPipeline(**pair.torch.components, controlnet=nets if len(nets) > 1 else nets[0])
    return painted(pipe, images, latents=nchw(latents), **more)


def painted(pipe, images, name="image", guidance_scale=5.0, **more):
    pipe.set_progress_bar_config(disable=True)
    images = [Image.fromarray(image) for image in images]
    given = {name: images if len(images) > 1 else images[0], "width": SIZE[0], "height": SIZE[1]} | more
    return 255 * pipe(TEXTS, num_inference_steps=4, guidance_scale=guidance_scale, output_type="np", **given).images


def ours(pair, folders, latents, images, **more):
    pipe = jaxdiff.Pipeline(pair.ours.with_controls(folders))
    more = {"guidance": 5.0, "size": SIZE, "latents": latents} | more
    return pipe(TEXTS, steps=4, control_image=tuple(images), **more).astype(float)


# What is asked of diffusers, and of us.
ASKED = {
    "plain": ({}, {}),
    "scale": ({"controlnet_conditioning_scale": 0.4}, {"control_scale": 0.4}),
    "start and end": ({"control_guidance_start": 0.25, "control_guidance_end": 0.75},
                      {"control_start": 0.25, "control_end": 0.75}),
    "an interval without a step": ({"control_guidance_start": 0.3, "control_guidance_end": 0.4},
                                   {"control_start": 0.3, "control_end": 0.4}),
    "guess": ({"guess_mode": True}, {"control_guess": True}),
    "without guidance": ({"guidance_scale": 1.0}, {"guidance": 1.0}),
}  # fmt: skip


def compare(got, expected, plain, figures, name):
    figures[f"{name}: largest difference of 255"] = np.abs(got - expected).max()
    assert plain is None or np.abs(expected - plain).max() > 5  # it does something
    assert np.abs(got - expected).max() <= 0.51


@pytest.fixture(scope="module")
def plain(controlled, latents):
    pair, _, _ = controlled
    return jaxdiff.Pipeline(pair.ours)(TEXTS, steps=4, guidance=5.0, latents=latents).astype(float)


@pytest.mark.parametrize("kind", ASKED)
def test_pictures(controlled, latents, images, plain, kind, figures, request):
    pair, nets, folders = controlled
    asked, ours_asked = ASKED[kind]
    expected = theirs(pair, nets[:1], latents, images[:1], **asked)
    got = ours(pair, folders[:1], latents, images[:1], **ours_asked)
    does_nothing = kind in ("an interval without a step", "without guidance")
    compare(got, expected, None if does_nothing else plain, figures, request.node.callspec.id)
    if kind == "an interval without a step":
        np.testing.assert_array_equal(got, plain)


@pytest.mark.parametrize("guess", [False, True])
def test_two_at_once(controlled, latents, images, plain, guess, figures, request):
    """The second reads colours from blue to red."""
    pair, nets, folders = controlled
    expected = theirs(pair, nets[:2], latents, images, controlnet_conditioning_scale=[0.8, 0.5], guess_mode=guess,
                      control_guidance_start=[0.0, 0.25], control_guidance_end=[0.5, 1.0])  # fmt: skip
    got = ours(pair, folders[:2], latents, images, control_scale=(0.8, 0.5), control_start=(0.0, 0.25),
               control_end=(0.5, 1.0), control_guess=guess)  # fmt: skip
    compare(got, expected, plain, figures, request.node.callspec.id)


def test_means_over_the_image(controlled, latents, images, plain, figures, request):
    pair, nets, folders = controlled
    expected = theirs(pair, nets[2:], latents, images[:1])
    compare(ours(pair, folders[2:], latents, images[:1]), expected, plain, figures, request.node.callspec.id)


def test_another_sampler(controlled, latents, images, tmp_path, figures, request):
    pair, nets, folders = controlled
    scheduler = EulerDiscreteScheduler.from_config(pair.torch.scheduler.config)
    parts = pair.torch.components | {"scheduler": scheduler}
    StableDiffusionPipeline(**parts).save_pretrained(tmp_path)
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=nets[0])
    expected = painted(pipe, images[:1], latents=nchw(latents), control_guidance_end=0.5)
    own = jaxdiff.Pipeline(read_model(tmp_path).with_controls(folders[:1]))
    got = own(TEXTS, steps=4, control_image=images[0], guidance=5.0, size=SIZE, latents=latents, control_end=0.5)
    assert own.defaults["sampler"] == "euler"
    compare(got.astype(float), expected, None, figures, request.node.callspec.id)


def test_an_image_that_is_drawn_over(controlled, images, monkeypatch, figures, request):
    """The steps that count are those that are taken."""
    pair, nets, folders = controlled
    start = np.random.default_rng(5).integers(0, 256, (*SIZE[::-1], 3)).astype(np.uint8)
    noise = np.random.default_rng(6).normal(size=(2, 8, 12, 4)).astype(np.float32)
    pipe = StableDiffusionControlNetImg2ImgPipeline(**pair.torch.components, controlnet=nets[0])
    without_noise(pipe.vae)
    draws = "diffusers.pipelines.controlnet.pipeline_controlnet_img2img.randn_tensor"
    monkeypatch.setattr(draws, lambda *_, **__: nchw(noise))
    expected = painted(pipe, images[:1], "control_image", image=[Image.fromarray(start)] * 2, strength=0.75,
                       control_guidance_start=0.3, control_guidance_end=1.0)  # fmt: skip
    got = ours(pair, folders[:1], noise, images[:1], image=start, strength=0.75, size=None, control_start=0.3)
    compare(got, expected, None, figures, request.node.callspec.id)


def xl_net(unet, seed, **others):
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    return spiced(net, seed)


@pytest.mark.parametrize("guess", [False, True])
def test_stable_diffusion_xl(tmp_path, latents, images, guess, figures, request):
    whole = xl.base(tmp_path)
    nets = [xl_net(whole.unet, seed) for seed in (1, 2)]
    for i, net in enumerate(nets):
        net.save_pretrained(tmp_path / str(i))
    pipe = StableDiffusionXLControlNetPipeline(**whole.components, controlnet=nets, add_watermarker=False)
    expected = painted(pipe, images, latents=nchw(latents), controlnet_conditioning_scale=[0.7, 0.4], guess_mode=guess)
    model = read_model(tmp_path / "model")
    own = jaxdiff.Pipeline(model.with_controls([tmp_path / "0", tmp_path / "1"]))
    asked = {"steps": 4, "guidance": 5.0, "size": SIZE, "latents": latents}
    got = own(TEXTS, None, control_image=tuple(images), control_scale=(0.7, 0.4), control_guess=guess, **asked)
    plain = jaxdiff.Pipeline(model)(TEXTS, None, **asked)
    compare(got.astype(float), expected, plain.astype(float), figures, request.node.callspec.id)
