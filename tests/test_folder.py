"""Model folders: what is written is read back exactly; settings that are not supported are named."""

import json
import logging
import os
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from jaxdiff.config import SchedulerConfig, UNetConfig
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.generation.drawing import settled
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.generation.request import Request
from jaxdiff.io.folder import (
    check_target,
    find_part,
    read_config,
    read_index,
    read_network,
    tokenizer_folder,
    write_folder,
    write_network,
)
from jaxdiff.io.scheduler import read_sampler, read_scheduler
from jaxdiff.model import Model, read_model
from jaxdiff.sampling.samplers import make_sigmas

NETWORKS = ("unet", "vae", "text_encoder")
UNET, VAE, TEXT = (f"{name}/config.json" for name in NETWORKS)
SCHEDULE = "scheduler/scheduler_config.json"
SCHEDULER = replace(tiny.SCHEDULER, timestep_spacing="trailing", rescale_betas_zero_snr=True)
# The published stable-diffusion-v1-5 files, word for word but for the sizes.
SD15_UNET = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle() -> Model:
    """With what a folder can hold: another number of heads at each level, a schedule that is not the default one."""
    return tiny.model(SCHEDULER, denoiser=replace(tiny.UNET, attention_head_dim=(2, 4)))


@pytest.fixture(scope="module")
def written(bundle, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("written") / "model"
    bundle.save(path)
    return path


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A written folder, to be changed; nothing else is in `tmp_path`."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def test_what_will_not_be_replaced_is_refused_before_the_work(folder, tmp_path):
    for name in (None, *NETWORKS):
        check_target(folder, name)
        check_target(tmp_path / "new", name)
    (folder / "notes.txt").write_text("")
    (folder / "vae" / "notes.txt").write_text("")
    for name in (None, "vae"):
        with pytest.raises(ValueError, match="not ours to replace"):
            check_target(folder, name)
    with pytest.raises(ValueError, match="is a file"):
        check_target(folder / "notes.txt")


def read(path: Path) -> None:
    """All that is in a folder, without a look at the networks' shapes."""
    read_index(path)
    for name in NETWORKS:
        read_network(path, name)
    read_scheduler(path)
    tokenizer_folder(path)


def edit(path: Path, **values):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | values))


def files(path: Path) -> dict[Path, bytes]:
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_model_comes_back_as_it_was_saved(bundle, tmp_path):
    replace(bundle, defaults={"steps": 4, "sampler": "lcm"}).save(tmp_path / "model")
    back = read_model(tmp_path / "model")
    assert (back.configs, back.scheduler, back.name) == (bundle.configs, SCHEDULER, "model")
    assert back.defaults == {"steps": 4, "sampler": "lcm"}
    jax.tree.map(np.testing.assert_array_equal, back.params, bundle.params)
    np.testing.assert_array_equal(back.tokenizer(["a red apple"]), bundle.tokenizer(["a red apple"]))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_read_and_saved_again_is_the_same_bytes(folder, tmp_path):
    read_model(folder).save(tmp_path / "again")
    assert files(tmp_path / "again") == files(folder)


@pytest.mark.parametrize("layout", ["model", "its own folder", "a bare folder", "a run", "fp16", "another variant"])
@pytest.mark.parametrize("name", [*NETWORKS, "tokenizer"])
def test_a_part_is_found_wherever_it_lies(folder, tmp_path, name, layout):
    path = folder
    if layout == "its own folder":
        path = folder / name
    elif layout == "a bare folder":
        path = folder.rename(tmp_path / "whole") / name
        path = path.rename(tmp_path / "sd-part")
    elif layout == "a run":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text('{"task": {}}')
        folder.rename(tmp_path / "run" / "export")
        path = tmp_path / "run"
    elif layout != "model":
        for file in folder.rglob("*.safetensors"):
            file.rename(file.with_name(f"{file.stem}.{'fp16' if layout == 'fp16' else 'ema'}.safetensors"))
    if name == "tokenizer":
        assert (tokenizer_folder(path) / "vocab.json").is_file()
    else:
        config, params = read_network(path, name)
        assert (config, set(params)) == (read_config(path, name), set(params))
        assert params


def test_a_part_that_is_not_there_is_told(folder, tmp_path):
    with pytest.raises(ValueError, match=r"UNet2DConditionModel.*the class of a vae is AutoencoderKL"):
        find_part(folder / "unet", "vae")
    (tmp_path / "config.json").write_text('{"task": {}}')
    with pytest.raises(ValueError, match="is a run that has exported no vae"):
        find_part(tmp_path, "vae")
    with pytest.raises(ValueError, match="has no folder 'tokenizer'"):
        find_part(tmp_path, "tokenizer")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_stored_and_read_in_the_type_asked_for(bundle, tmp_path, dtype):
    bundle.save(tmp_path / "model", dtype)
    for role, name in zip(("denoiser", "vae", "text_encoder"), NETWORKS, strict=True):
        _, back = read_network(tmp_path / "model", name)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(back)} == {dtype}
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), back, bundle.params[role])


def test_weights_that_a_type_cannot_hold_are_not_written(bundle, tmp_path):
    large = bundle.with_params(bundle.params | {"vae": jax.tree.map(lambda x: x * 1e6, bundle.params["vae"])})
    with pytest.raises(ValueError, match="not finite as float16"):
        large.save(tmp_path / "model", np.float16)
    for dtype in (np.int8, "floaty"):
        with pytest.raises(ValueError, match=r"(int8|floaty).*float32, float16 or bfloat16"):
            bundle.save(tmp_path / "model", dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_gives_way_only_to_its_own_writer(bundle, tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    bundle.save(path)
    replace(bundle, scheduler=replace(SCHEDULER, prediction_type="epsilon")).save(path)
    assert read_scheduler(path).prediction_type == "epsilon"

    (path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not ours to replace"):
        bundle.save(path)
    assert (path / "notes.txt").read_text() == "mine"
    (path / "notes.txt").unlink()
    edit(path / "model_index.json", _written_by="someone else")
    with pytest.raises(ValueError, match="not ours to replace"):
        bundle.save(path)
    with pytest.raises(ValueError, match="is a file"):
        bundle.save(path / "model_index.json")


def test_a_failed_write_leaves_the_old_folder_whole(bundle, folder, tmp_path):
    before = files(folder)
    broken = bundle.with_params(bundle.params | {"text_encoder": {"a": {"kernel": np.float32(np.nan)[None, None]}}})
    with pytest.raises(ValueError, match="not finite"):
        broken.save(folder)
    assert files(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_interrupt_between_the_two_renames_brings_the_old_folder_back(bundle, folder, tmp_path, monkeypatch):
    before, rename = files(folder), Path.rename

    def stopped(self, target):
        if ".new-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        replace(bundle, defaults={"steps": 1}).save(folder)
    assert files(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_writer_left_goes_after_a_day(bundle, folder, tmp_path):
    for name, age in ((".model.old-1", 90_000), (".model.new-2", 0), (".models.old-3", 90_000)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    bundle.save(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".model.new-2", ".models.old-3", "model"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(bundle, tmp_path):
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(ValueError, match=r"cannot be written: .*File too large"):
            bundle.save(tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizers_own_files_are_copied_and_no_others_and_not_left_out_when_they_are_gone(folder, tmp_path):
    networks = {"vae": read_network(folder, "vae")}
    tokenizer = Path(shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer"))
    (tokenizer / "unrelated.txt").write_text("stays where it is")
    write_folder(tmp_path / "copy", networks, SCHEDULER, tokenizer)
    assert files(tmp_path / "copy" / "tokenizer") == files(folder / "tokenizer")
    shutil.rmtree(tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer\.json nor vocab\.json"):
        write_folder(tmp_path / "another", networks, SCHEDULER, tokenizer)
    assert not (tmp_path / "another").exists()


def test_a_flow_comes_back_and_is_called_what_diffusers_calls_it(bundle, tmp_path):
    flow = SchedulerConfig(
        prediction_type="flow_prediction", shift=3.0, num_train_timesteps=500, clip_sample=False, steps_offset=1
    )
    replace(bundle, scheduler=flow).save(tmp_path / "flow")
    values = json.loads((tmp_path / "flow/scheduler/scheduler_config.json").read_text())
    values.pop("_diffusers_version")
    assert values == {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500, "shift": 3.0}
    assert read_scheduler(tmp_path / "flow") == flow
    assert json.loads((tmp_path / "flow/model_index.json").read_text())["scheduler"][1] == values["_class_name"]


def test_a_silent_scheduler_is_read_as_diffusers_pipeline_reads_it(folder, caplog):
    file = folder / "scheduler/scheduler_config.json"
    for cls in ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"):
        file.write_text(json.dumps({"_class_name": cls}))
        edit(folder / "model_index.json", scheduler=["diffusers", cls])
        scheduler = read_scheduler(folder)
        assert (scheduler.steps_offset, scheduler.clip_sample) == (1, False)
    edit(file, steps_offset=0, clip_sample=True)
    scheduler = read_scheduler(folder)
    assert (scheduler.steps_offset, scheduler.clip_sample) == (0, True), "we wrote the folder"
    edit(folder / "model_index.json", _written_by="someone")
    with caplog.at_level(logging.WARNING):
        scheduler = read_scheduler(folder)
    assert (scheduler.steps_offset, scheduler.clip_sample) == (1, False), "diffusers' pipeline sets both"
    assert len(caplog.records) == 1
    assert "steps_offset is 0" in caplog.text


FOREIGN = {"_written_by": None}


@pytest.mark.parametrize(
    ("values", "sampler", "schedule", "warned"),
    [
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "pndm", None, ""),
        ({"_class_name": "PNDMScheduler"}, "pndm", None, "skip_prk_steps False"),
        ({"_class_name": "LCMScheduler"}, "lcm", None, ""),
        ({"_class_name": "TCDScheduler", "original_inference_steps": 25}, "tcd", None, "original_inference_steps 25"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "euler", "karras", ""),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "euler_ancestral", None, ""),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m", None, ""),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_beta_sigmas": True}, "dpmpp_2m", "beta", ""),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "dpmpp_2m", None, "solver_order 3"),
        ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -1.0}, "dpmpp_2m", None, "lambda_min"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
            "dpmpp_3m_sde",
            None,
            "",
        ),
        ({"_class_name": "DPMSolverSinglestepScheduler"}, "dpmpp_2m", None, "DPMSolverSinglestepScheduler"),
        ({"_class_name": "SASolverScheduler", "predictor_order": 3}, "dpmpp_2m_sde", None, "SASolverScheduler"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "ddpm", None, ""),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}, "unipc", None, "bh1"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0}, "flow_heun", None, ""),
        ({}, "ddim", None, ""),
    ],
)
def test_a_folders_scheduler_names_the_sampler_that_is_its_default(folder, caplog, values, sampler, schedule, warned):
    (folder / SCHEDULE).write_text(json.dumps(values))
    assert read_sampler(folder) == {}, "what we write is for any sampler"
    cls = values.get("_class_name", "DDIMScheduler")
    edit(folder / "model_index.json", **FOREIGN, scheduler=["diffusers", cls])
    with caplog.at_level(logging.WARNING):
        found = read_model(folder).defaults
    assert found == {"sampler": sampler} | ({"schedule": schedule} if schedule else {})
    assert warned in caplog.text
    assert bool(caplog.records) == bool(warned)
    pipe = Pipeline(read_model(folder))
    assert pipe.requests("a")[0].sampler is None
    assert settled(Request(), pipe.info).sampler == sampler


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        ("PNDMScheduler", {"rescale_betas_zero_snr": True, "thresholding": True, "skip_prk_steps": True}),
        ("HeunDiscreteScheduler", {"final_sigmas_type": "sigma_min", "use_flow_sigmas": True}),
        ("TCDScheduler", {"thresholding": True}),
        ("DDIMScheduler", {"timestep_type": "continuous"}),
    ],
)
def test_settings_that_a_scheduler_has_not_are_left_out_with_a_warning(folder, caplog, cls, values):
    edit(folder / "model_index.json", **FOREIGN, scheduler=["diffusers", cls])
    own = {"_class_name": cls} | {name: value for name, value in values.items() if name == "skip_prk_steps"}
    (folder / SCHEDULE).write_text(json.dumps(own))
    plain = read_scheduler(folder)
    assert not caplog.records
    (folder / SCHEDULE).write_text(json.dumps(own | {"final_sigmas_type": "zero"} | values))
    assert read_scheduler(folder) == plain
    (record,) = caplog.records
    assert all(name in record.getMessage() for name in values if name not in own)


@pytest.mark.parametrize("cls", ["DDIMScheduler", "UniPCMultistepScheduler", "SASolverScheduler"])
def test_thresholding_is_refused_where_it_would_be_obeyed(folder, cls):
    edit(folder / "model_index.json", **FOREIGN, scheduler=["diffusers", cls])
    (folder / SCHEDULE).write_text(json.dumps({"_class_name": cls, "thresholding": True}))
    with pytest.raises(ValueError, match="thresholding is true; supported: false"):
        read_scheduler(folder)


@pytest.mark.parametrize(
    ("betas", "cls"),
    [("squaredcos_cap_v2", "DDIM"), ("sigmoid", "DDPM"), ("laplace", "DDPM"), ("exp", "HeunDiscrete")],
)
def test_betas_come_back_and_are_written_for_a_class_that_has_them(bundle, tmp_path, betas, cls):
    scheduler = replace(tiny.SCHEDULER, beta_schedule=betas)
    replace(bundle, scheduler=scheduler).save(tmp_path / "model")
    assert read_scheduler(tmp_path / "model") == scheduler
    written = json.loads((tmp_path / "model" / SCHEDULE).read_text())["_class_name"]
    assert written == json.loads((tmp_path / "model/model_index.json").read_text())["scheduler"][1] == f"{cls}Scheduler"


def test_the_scheduler_is_of_the_class_that_the_index_names(folder):
    edit(folder / "model_index.json", **FOREIGN, scheduler=["diffusers", "EulerDiscreteScheduler"])
    assert read_sampler(folder) == {"sampler": "euler"}
    (folder / SCHEDULE).write_text("{}")
    assert read_scheduler(folder).timestep_spacing == "linspace", "which is Euler's where the file is silent"


def test_a_text_config_that_is_silent_has_transformers_defaults(folder):
    config = json.loads((folder / TEXT).read_text())
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "projection_dim"):
        config.pop(name)
    (folder / TEXT).write_text(json.dumps(config))
    found = read_config(folder, "text_encoder")
    assert (found.hidden_size, found.intermediate_size, found.num_attention_heads) == (512, 2048, 8)


def test_a_last_step_that_ends_at_the_lowest_level_is_kept(folder):
    (folder / SCHEDULE).write_text(
        json.dumps({"_class_name": "DPMSolverMultistepScheduler", "final_sigmas_type": "sigma_min"})
    )
    config = read_scheduler(folder)
    lowest = make_schedule(config).sigmas[0]
    for schedule in ("model", "karras"):
        sigmas = make_sigmas("dpmpp_2m", schedule, config, make_schedule(config), 5)
        assert sigmas.sigmas_next[4] == pytest.approx(lowest, rel=1e-6)


def test_one_network_alone_is_written_and_read(bundle, tmp_path):
    vae = bundle.networks["vae"]
    for _ in range(2):
        write_network(tmp_path, "vae", vae.config, vae.params)
    config, params = read_network(tmp_path, "vae")
    assert config == read_config(tmp_path, "vae") == vae.config
    jax.tree.map(np.testing.assert_array_equal, params, vae.params)


def test_settings_that_diffusers_pipeline_overrides_are_told(bundle, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        bundle.save(tmp_path / "a")
        assert not caplog.records
        replace(bundle, scheduler=SchedulerConfig()).save(tmp_path / "b")
    assert "steps_offset" in caplog.text


@pytest.mark.parametrize(
    ("file", "field", "value", "rule"),
    [
        (UNET, "class_embed_type", "timestep", "projection"),
        (UNET, "dual_cross_attention", True, "false"),
        (UNET, "mid_block_type", None, "text"),
        (UNET, "act_fn", "elu", "mish"),
        (UNET, "mid_block_scale_factor", 0, "divided"),
        (UNET, "resnet_time_scale_shift", "spatial", "scale_shift"),
        (UNET, "down_block_types", ["AttnDownBlock2D", "DownBlock2D"], "CrossAttnDownBlock2D"),
        (UNET, "sample_size", "large", "whole number"),
        (VAE, "use_quant_conv", "no", "true or false"),
        (TEXT, "hidden_act", "tanh", "quick_gelu"),
        (TEXT, "use_attention_mask", True, "false"),
        (TEXT, "model_type", "t5", "clip_text_model"),
        (SCHEDULE, "prediction_type", "flow", "flow_prediction"),
        (SCHEDULE, "trained_betas", [1], "1000"),
        (SCHEDULE, "timestep_type", "continuous", "discrete"),
        ("model_index.json", "prior", ["diffusers", "PriorTransformer"], "not supported"),
        ("model_index.json", "unet", ["diffusers", "FluxTransformer2DModel"], "UNet2DConditionModel"),
    ],
)
def test_a_setting_that_is_not_supported_is_named(folder, file, field, value, rule):
    edit(folder / file, **{field: value})
    with pytest.raises(ValueError, match=field) as caught:
        read(folder)
    said = str(caught.value)
    assert said.startswith(str(folder / file))
    shown = value[0] if isinstance(value, list) else value
    assert str(shown) in said or json.dumps(shown) in said
    assert rule in said


def test_a_scheduler_of_another_kind_is_refused_with_those_that_are_known(folder):
    edit(folder / "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
    with pytest.raises(ValueError, match=r"EDMEulerScheduler.*EulerDiscreteScheduler"):
        read(folder)


def test_fields_that_are_off_or_say_nothing_are_passed_over(folder, bundle):
    edit(folder / UNET, some_new_option=None, another=False, third=0, upcast_attention=True,
         only_cross_attention=[False, False], _name_or_path="x", time_embedding_type="positional")  # fmt: skip
    edit(folder / TEXT, torch_dtype="float16", transformers_version="4.0")
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    read(folder)
    assert read_config(folder, "unet") == bundle.configs["denoiser"]


@pytest.mark.parametrize(
    ("file", "values"),
    [
        (UNET, {"sample_size": [8, 8]}),
        (UNET, {"act_fn": "swish"}),
        (UNET, {"dropout": 0.1}),
        (UNET, {"cross_attention_dim": [tiny.UNET.cross_attention_dim] * 2}),
        (VAE, {"sample_size": [16, 16]}),
        (TEXT, {"attention_dropout": 0.1, "dropout": 0.1, "architectures": ["CLIPTextModel"]}),
        ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]}),
    ],
)
def test_other_spellings_and_settings_of_training_change_nothing(folder, bundle, caplog, file, values):
    edit(folder / file, **values)
    with caplog.at_level(logging.WARNING):
        read(folder)
    assert not caplog.records
    assert [read_config(folder, name) for name in NETWORKS] == list(bundle.configs.values())


@pytest.mark.parametrize(
    ("file", "values"),
    [
        (UNET, {"act_fn": "mish", "center_input_sample": True, "mid_block_scale_factor": 1.5}),
        (VAE, {"act_fn": "relu", "use_quant_conv": False, "use_post_quant_conv": False}),
        (VAE, {"mid_block_add_attention": False}),
    ],
)
def test_networks_of_another_make_are_read_saved_and_draw_other_images(folder, tmp_path, bundle, file, values):
    edit(folder / file, **values)
    model = read_model(folder)
    model.save(tmp_path / "again")
    again = read_model(tmp_path / "again")
    assert again.configs == model.configs != bundle.configs
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    images = [Pipeline(m)("a dog", steps=2, seed=3) for m in (bundle, model, again)]
    assert (images[0] != images[1]).any()
    np.testing.assert_array_equal(images[1], images[2])


def test_a_config_nested_in_that_of_a_whole_clip_model_is_read(folder, bundle):
    inner = json.loads((folder / TEXT).read_text())
    outer = {
        "text_config": inner,
        "vision_config": {"hidden_size": 99},
        "logit_scale_init_value": 2,
    }
    (folder / TEXT).write_text(json.dumps(outer))
    assert read_config(folder, "text_encoder") == bundle.configs["text_encoder"]


def test_fields_and_tensors_that_nobody_knows_are_left_out_with_a_warning(folder, bundle, caplog):
    edit(folder / UNET, layers_per_blok=2, tensor_format="pt")
    extra = {"text_projection.weight": np.ones((4, 4), np.float32), "vision_model.x.weight": np.ones(3, np.float32)}
    file = folder / "text_encoder/model.safetensors"
    save_file({**load_file(file), **extra}, file)
    with caplog.at_level(logging.WARNING):
        back = read_model(folder)
    jax.tree.map(np.testing.assert_array_equal, back.params, bundle.params)
    assert "layers_per_blok" in caplog.text
    assert "2 tensors" in caplog.text
    assert "text_projection.weight" in caplog.text


def test_the_published_sd15_files_are_read(folder):
    (folder / UNET).write_text(json.dumps(SD15_UNET))
    (folder / SCHEDULE).write_text(json.dumps(SD15_SCHEDULER))
    assert read_config(folder, "unet") == UNetConfig(cross_attention_dim=768)
    assert read_scheduler(folder) == SchedulerConfig(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False,
        clip_sample=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", [*NETWORKS, "scheduler", "tokenizer"])
def test_half_a_folder_is_told_from_a_whole_one(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"no folder '{name}'"):
        read(folder)


def test_what_is_no_folder_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        read_index(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"model_index\.json"):
        read_index(tmp_path)
    (folder / "tokenizer/merges.txt").unlink()
    with pytest.raises(ValueError, match=r"merges\.txt"):
        tokenizer_folder(folder)
    (folder / UNET).write_text("<html>")
    with pytest.raises(ValueError, match=r"unet/config\.json is not JSON"):
        read_network(folder, "unet")


def test_weights_of_another_network_are_told_with_their_folder(folder):
    edit(folder / VAE, layers_per_block=2)
    with pytest.raises(ValueError, match=rf"^{folder / 'vae'}: .*missing"):
        read_model(folder)
