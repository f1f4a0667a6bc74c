"""A zoo of model folders, as published ones vary: what diffusers draws is drawn, and is diffusers' image."""

import copy
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from pairs import nchw, nhwc, randomise
from safetensors.torch import load_file, save_file

from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.generation.drawing import settled
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.generation.request import Request
from jaxdiff.io.scheduler import SCHEDULERS, read_sampler, read_scheduler
from jaxdiff.model import read_model
from jaxdiff.sampling.samplers import count_steps, first_state, make_sigmas, starts_at_sigma

UNET, VAE, TEXT, INDEX = "unet/config.json", "vae/config.json", "text_encoder/config.json", "model_index.json"
SCHEDULE = "scheduler/scheduler_config.json"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# Files that say the same in another way: (file, values); None takes a field out.
SPELLINGS = [
    (UNET, {"sample_size": [16, 16]}),
    (UNET, {"act_fn": "swish"}),
    (UNET, {"dropout": 0.0}),
    (UNET, {"dropout": 0.3}),
    (UNET, {"cross_attention_dim": [24, 24]}),
    (UNET, {"only_cross_attention": [False, False]}),
    (UNET, {"transformer_layers_per_block": [1, 1]}),
    (UNET, {"layers_per_block": [2, 2]}),
    (UNET, {"attention_head_dim": [4, 4]}),
    (UNET, {"tensor_format": "pt"}),
    (UNET, {"some_fork_has": {"this": 1}}),
    (UNET, {"upcast_attention": True}),
    (UNET, {"use_linear_projection": None}),
    (UNET, {"center_input_sample": None}),
    (UNET, {"mid_block_scale_factor": 1.0}),
    (UNET, {"norm_eps": 0.00001}),
    (UNET, {"resnet_time_scale_shift": "default"}),
    (UNET, {"addition_embed_type_num_heads": 64}),
    (UNET, {"_name_or_path": "runwayml"}),
    (UNET, {"num_class_embeds": None}),
    (UNET, {"conv_in_kernel": 3}),
    (UNET, {"time_embedding_type": "positional"}),
    (UNET, {"dual_cross_attention": None}),
    (UNET, {"act_fn": "SiLU"}),
    (UNET, {"resnet_skip_time_act": True}),
    (UNET, {"resnet_out_scale_factor": 2.0}),
    (UNET, {"cross_attention_norm": "layer_norm"}),
    (UNET, {"mid_block_only_cross_attention": True}),
    (UNET, {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}),
    (VAE, {"sample_size": [32, 32]}),
    (VAE, {"act_fn": "swish"}),
    (VAE, {"force_upcast": True}),
    (VAE, {"force_upcast": False}),
    (VAE, {"mid_block_add_attention": True}),
    (VAE, {"shift_factor": None}),
    (VAE, {"shift_factor": 0.1}),
    (VAE, {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}),
    (VAE, {"latents_mean": None}),
    (VAE, {"use_quant_conv": True}),
    (VAE, {"scaling_factor": None}),
    (VAE, {"unknown_to_all": "x"}),
    (VAE, {"use_tiling": False}),
    (TEXT, {"attention_dropout": 0.1}),
    (TEXT, {"dropout": 0.1}),
    (TEXT, {"torch_dtype": "float16"}),
    (TEXT, {"architectures": ["CLIPTextModelWithProjection"]}),
    (TEXT, {"architectures": None}),
    (TEXT, {"initializer_range": 0.5}),
    (TEXT, {"initializer_factor": 0.1}),
    (TEXT, {"projection_dim": 16}),
    (TEXT, {"max_length": 20}),
    (TEXT, {"num_beams": 4}),
    (TEXT, {"temperature": 0.7}),
    (TEXT, {"top_k": 9}),
    (TEXT, {"id2label": {"0": "a"}}),
    (TEXT, {"output_attentions": False}),
    (TEXT, {"_commit_hash": "abc"}),
    (TEXT, {"transformers_version": "4.21.0.dev0"}),
    (TEXT, {"gradient_checkpointing": False}),
    (INDEX, {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}),
    (INDEX, {"feature_extractor": ["transformers", "CLIPImageProcessor"]}),
    (INDEX, {"image_encoder": [None, None]}),
    (INDEX, {"requires_safety_checker": None}),
    (INDEX, {"_diffusers_version": "0.31.0"}),
    (SCHEDULE, {"tensor_format": "pt"}),
    (SCHEDULE, {"predict_epsilon": True}),
    (SCHEDULE, {"a_forks_own": 3}),
    (SCHEDULE, {"steps_offset": 0}),
    (SCHEDULE, {"clip_sample": True}),
    (SCHEDULE, {"steps_offset": None}),
    (SCHEDULE, {"clip_sample": None}),
    (SCHEDULE, {"clip_sample_range": 0.5}),
    (SCHEDULE, {"dynamic_thresholding_ratio": 0.9}),
    (SCHEDULE, {"thresholding": False}),
    (SCHEDULE, {"trained_betas": None}),
    (SCHEDULE, {"sample_max_value": 2.0}),
    (SCHEDULE, {"rescale_betas_zero_snr": False}),
    (SCHEDULE, {"timestep_spacing": "leading"}),
]
# Networks of another make, with the weights of the first: (file, values).
MAKES = [
    (UNET, {"act_fn": "mish"}),
    (UNET, {"act_fn": "gelu"}),
    (UNET, {"act_fn": "ReLU"}),
    (UNET, {"mid_block_scale_factor": 1.4142135}),
    (UNET, {"mid_block_scale_factor": -0.5}),
    (UNET, {"center_input_sample": True}),
    (UNET, {"resnet_time_scale_shift": "scale_shift"}),
    (VAE, {"act_fn": "mish"}),
    (VAE, {"act_fn": "gelu"}),
    (VAE, {"act_fn": "relu"}),
    (VAE, {"use_quant_conv": False}),
    (VAE, {"use_post_quant_conv": False}),
    (VAE, {"use_quant_conv": False, "use_post_quant_conv": False}),
    (VAE, {"mid_block_add_attention": False}),
]
CLASSES = [name for name in SCHEDULERS if not name.startswith("FlowMatch")]
OPTIONS = [
    {}, {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}, {"timestep_spacing": "leading"},
    {"steps_offset": 0, "timestep_spacing": "leading"}, {"clip_sample": True}, {"prediction_type": "v_prediction"},
    {"use_karras_sigmas": True}, {"use_beta_sigmas": True},
    {"final_sigmas_type": "sigma_min"},
    {"trained_betas": np.linspace(1e-4, 0.015, 1000).tolist()},
]  # fmt: skip
# Classes whose steps no sampler here takes, which a warning says.
OTHERS = ("DPMSolverSinglestepScheduler", "SASolverScheduler")
FOREIGN = {"_written_by": None}


@pytest.fixture(scope="module")
def folder(sd1, tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo") / "model"
    shutil.copytree(sd1.path, path)
    return path


@pytest.fixture
def fresh(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def edit(file, values):
    merged = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in merged.items() if value is not None}))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(path):
    return quiet(StableDiffusionPipeline.from_pretrained(path, safety_checker=None, feature_extractor=None))


@pytest.fixture(scope="module")
def base_image(folder):
    return image_of(theirs(folder))


def image_of(pipe, steps=3, **options):
    generators = [torch.Generator().manual_seed(5)]
    return 255 * pipe(["a dog"], num_inference_steps=steps, guidance_scale=4.0, output_type="np", generator=generators,
                      height=32, width=32, **options).images  # fmt: skip


@pytest.mark.parametrize(("file", "values"), SPELLINGS, ids=lambda value: str(value)[:60])
def test_a_folder_that_says_the_same_in_other_words_is_the_same_model(sd1, fresh, base_image, file, values):
    edit(fresh / file, values)
    expected = image_of(theirs(fresh))
    np.testing.assert_allclose(
        expected, base_image, atol=1e-3, err_msg="the variation is one that diffusers draws alike"
    )
    model = read_model(fresh)
    assert model.configs == sd1.ours.configs | {
        role: config
        for role, config in model.configs.items()
        if (file, role) == (UNET, "denoiser") and "[" in str(values)
    }
    assert replace(model.scheduler, clip_sample_range=1.0) == sd1.ours.scheduler
    jax.tree.map(np.testing.assert_array_equal, model.params, sd1.ours.params)
    got = Pipeline(model)("a dog", seed=5, rng="torch", steps=3, guidance=4.0, size=(32, 32))
    assert np.abs(got - base_image).max() <= 0.51


@pytest.mark.parametrize(("file", "values"), MAKES, ids=lambda value: str(value)[:60])
def test_a_network_of_another_make_draws_diffusers_image(sd1, fresh, base_image, file, values):
    name = Path(file).parent.name
    first = getattr(sd1.torch, name)
    torch.manual_seed(0)
    options = {n: value for n, value in first.config.items() if n[0] != "_"} | values
    network = randomise(type(first)(**options), 1)
    own = network.state_dict()
    network.load_state_dict({n: w for n, w in first.state_dict().items() if n in own and w.shape == own[n].shape},
                            strict=False)  # fmt: skip
    shutil.rmtree(fresh / name)
    network.save_pretrained(fresh / name)
    reference, pipe = theirs(fresh), Pipeline(read_model(fresh))
    expected = image_of(reference)
    got = pipe("a dog", seed=5, rng="torch", steps=3, guidance=4.0, size=(32, 32))
    assert np.abs(got - expected).max() <= 0.51
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    latent, before = (
        nhwc(vae.encode(nchw(image / 127.5 - 1).float()).latent_dist.mode()) * vae.config.scaling_factor
        for vae in (reference.vae, sd1.torch.vae)
    )
    np.testing.assert_allclose(pipe.encode(image), latent, atol=1e-5)
    changed = max(np.abs(expected - base_image).max(), 255 * np.abs(latent - before).max())
    assert changed > 0.1, "the variation changes nothing"
    pipe.save(fresh.parent / "saved")
    np.testing.assert_allclose(image_of(theirs(fresh.parent / "saved")), expected, atol=1e-2)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu"])
def test_a_text_encoder_of_another_activation_gives_transformers_features(fresh, act):
    edit(fresh / TEXT, {"hidden_act": act})
    assert np.abs(Pipeline(read_model(fresh))("a dog", seed=5, rng="torch", steps=3, guidance=4.0, size=(32, 32))
                  - image_of(theirs(fresh))).max() <= 0.51  # fmt: skip


def test_extra_tensors_change_nothing(sd1, fresh, base_image):
    for file in ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        extra = {"text_projection.weight": torch.ones(4, 4), "vision_model.encoder.x.weight": torch.ones(3)}
        save_file({**load_file(fresh / file), **extra}, fresh / file, metadata={"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, read_model(fresh).params, sd1.ours.params)


@pytest.mark.parametrize(
    ("cls", "options"), list(itertools.product(CLASSES, OPTIONS)), ids=lambda value: str(value)[:40]
)
def test_a_scheduler_of_any_class_visits_its_own_levels(sd1, fresh, cls, options):
    values = BETAS | options
    (fresh / SCHEDULE).write_text(json.dumps({"_class_name": cls} | values))
    edit(fresh / INDEX, {"scheduler": ["diffusers", cls]})
    scheduler = getattr(diffusers, cls).from_config(json.loads((fresh / SCHEDULE).read_text()))
    reference = StableDiffusionPipeline(**{**sd1.torch.components, "scheduler": copy.deepcopy(scheduler)},
                                        requires_safety_checker=False)  # fmt: skip
    config, chosen = read_scheduler(fresh), read_sampler(fresh)
    schedule = chosen.get("schedule", "model")
    if cls in OTHERS:
        return  # read, and drawn by another sampler
    assert config.prediction_type == reference.scheduler.config.prediction_type
    assert config.clip_sample == reference.scheduler.config.get("clip_sample", False)
    if cls == "PNDMScheduler" and config.timestep_spacing != "leading":
        return  # diffusers begins its second step at a level where it has not been
    for steps in (2, 7):
        if cls == "PNDMScheduler":
            reference.scheduler.register_to_config(skip_prk_steps=True)
        reference.scheduler.set_timesteps(steps)
        sigmas = make_sigmas(chosen["sampler"], schedule, config, make_schedule(config), steps)
        n = count_steps(sigmas)
        if hasattr(reference.scheduler, "sigmas"):
            expected = list(dict.fromkeys(float(s) for s in reference.scheduler.sigmas if s > 0))
            assert sigmas.sigmas_next[n - 1] == pytest.approx(float(reference.scheduler.sigmas[-1]), rel=2e-4)
        else:
            alpha_bar = reference.scheduler.alphas_cumprod[reference.scheduler.timesteps.long()].double()
            expected = ((1 - alpha_bar) / alpha_bar).sqrt().tolist()
        first = float(getattr(reference.scheduler, "init_noise_sigma", 1.0))
        ours = list(sigmas.sigmas[:n])
        np.testing.assert_allclose(ours[: len(expected)], expected[: len(ours)], rtol=2e-4)
        start = float(first_state(np.ones(1), sigmas, starts_at_sigma(chosen["sampler"], schedule, config))[0])
        assert start * (np.sqrt(1 + ours[0] ** 2) if first != 1 else 1) == pytest.approx(first, rel=1e-4)


# Samplers whose noise a generator draws in an order of its own; parity of their steps is in test_sampling.py.
OWN_NOISE = ("DPMSolverSDEScheduler", "KDPM2AncestralDiscreteScheduler", "TCDScheduler")


# Betas that one class alone has, and settings that a class has not.
SCHEDULES_OF_ONE = [("DDPMScheduler", {"beta_schedule": "sigmoid"}), ("DDPMScheduler", {"beta_schedule": "laplace"}),
                ("HeunDiscreteScheduler", {"beta_schedule": "exp"}),
                ("EulerDiscreteScheduler", {"thresholding": True, "use_flow_sigmas": True}),
                ("PNDMScheduler", {"rescale_betas_zero_snr": True, "thresholding": True})]  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "values"),
    [*((name, {}) for name in CLASSES if name not in (*OTHERS, *OWN_NOISE)), *SCHEDULES_OF_ONE],
    ids=lambda value: str(value)[:60],
)
def test_a_folders_own_sampler_draws_diffusers_image(sd1, fresh, cls, values):
    skip = {"skip_prk_steps": True} if cls == "PNDMScheduler" else {}
    (fresh / SCHEDULE).write_text(json.dumps({"_class_name": cls} | BETAS | skip | values))
    edit(fresh / INDEX, {"scheduler": ["diffusers", cls]})
    expected = image_of(theirs(fresh), steps=6)
    pipe = Pipeline(read_model(fresh))
    assert settled(Request(), pipe.info).sampler == SCHEDULERS[cls].sampler
    got = pipe("a dog", seed=5, rng="torch", steps=6, guidance=4.0, size=(32, 32))
    assert np.abs(got - expected).max() <= 0.51


def test_the_zoo_is_large():
    assert len(SPELLINGS) + len(MAKES) + len(SCHEDULES_OF_ONE) + len(CLASSES) * len(OPTIONS) >= 150
