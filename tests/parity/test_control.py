"""Pictures that control images steer are diffusers'."""

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
)
from pairs import TEXTS, nchw, randomise
from PIL import Image

import jaxdiff

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


def theirs(pair, nets, latents, images, cls=StableDiffusionControlNetPipeline, scheduler=None, **more):
    parts = {name: part for name, part in pair.torch.components.items() if name != "controlnet"}
    parts |= {"scheduler": scheduler} if scheduler is not None else {}
    pipe = cls(**parts, controlnet=nets if len(nets) > 1 else nets[0])
    pipe.set_progress_bar_config(disable=True)
    images = [Image.fromarray(image) for image in images]
    name = "control_image" if cls is StableDiffusionControlNetImg2ImgPipeline else "image"
    return 255 * pipe(TEXTS, num_inference_steps=4, guidance_scale=5.0, output_type="np", width=SIZE[0], height=SIZE[1],
                      **{name: images if len(nets) > 1 else images[0]}, latents=nchw(latents), **more).images  # fmt: skip


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
    if "guidance_scale" in asked:
        asked = {"guidance_scale": 1.0}
    expected = draw(pair, nets[:1], latents, images[:1], **asked)
    got = ours(pair, folders[:1], latents, images[:1], **ours_asked)
    does_nothing = kind in ("an interval without a step", "without guidance")
    compare(got, expected, None if does_nothing else plain, figures, request.node.callspec.id)
    if kind == "an interval without a step":
        np.testing.assert_array_equal(got, plain)


def draw(pair, nets, latents, images, **asked):
    guidance = asked.pop("guidance_scale", 5.0)
    return theirs(pair, nets, latents, images, **asked) if guidance == 5.0 else unguided(pair, nets, latents, images)


def unguided(pair, nets, latents, images):
    pipe = StableDiffusionControlNetPipeline(**pair.torch.components, controlnet=nets[0])
    pipe.set_progress_bar_config(disable=True)
    return 255 * pipe(TEXTS, num_inference_steps=4, guidance_scale=1.0, output_type="np", width=SIZE[0], height=SIZE[1],
                      image=Image.fromarray(images[0]), latents=nchw(latents)).images  # fmt: skip


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


def test_another_sampler(controlled, latents, images, plain, figures, request):
    pair, nets, folders = controlled
    scheduler = EulerDiscreteScheduler.from_config(pair.torch.scheduler.config)
    expected = theirs(pair, nets[:1], latents, images[:1], scheduler=scheduler, control_guidance_end=0.5)
    got = ours(pair, folders[:1], latents, images[:1], sampler="euler", control_end=0.5)
    compare(got, expected, plain, figures, request.node.callspec.id)
