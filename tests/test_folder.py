"""Model folders: what is written is read back exactly; settings that are not supported are named."""

import dataclasses
import json
import logging
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdiff import build
from jaxdiff.config import CLIPTextConfig, SchedulerConfig, UNetConfig, VAEConfig
from jaxdiff.io.folder import Folder, read_folder, read_network, read_scheduler, write_folder, write_network
from jaxdiff.io.weights import check_params

CONFIGS = {
    "unet": UNetConfig(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=12,
        norm_num_groups=4,
    ),
    "vae": VAEConfig(
        sample_size=16,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
    ),
    "text_encoder": CLIPTextConfig(
        vocab_size=20, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=18, eos_token_id=19, pad_token_id=19,
    ),
}  # fmt: skip
SCHEDULER = SchedulerConfig(
    beta_schedule="scaled_linear", prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1,
    clip_sample=False, rescale_betas_zero_snr=True,
)  # fmt: skip
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
def bundle(tmp_path_factory):
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    (tokenizer / "vocab.json").write_text("{}")
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    (tokenizer / "unrelated.txt").write_text("stays where it is")
    params = {}
    for i, (name, config) in enumerate(CONFIGS.items()):
        shapes = build.param_shapes(getattr(build, name)(config), config)
        rng = np.random.default_rng(i)
        params[name] = jax.tree.map(lambda leaf, rng=rng: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    return Folder(**CONFIGS, scheduler=SCHEDULER, params=params, tokenizer=tokenizer)


def edit(path: Path, **values):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | values))


def test_a_folder_comes_back_as_it_was_written(bundle, tmp_path):
    write_folder(tmp_path / "model", bundle)
    back = read_folder(tmp_path / "model")
    for name, config in CONFIGS.items():
        assert getattr(back, name) == config
        check_params(back.params[name], build.param_shapes(getattr(build, name)(config), config), name)
    assert back.scheduler == SCHEDULER
    jax.tree.map(np.testing.assert_array_equal, back.params, bundle.params)
    assert sorted(p.name for p in back.tokenizer.iterdir()) == ["merges.txt", "vocab.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_stored_and_read_in_the_type_asked_for(bundle, tmp_path, dtype):
    write_folder(tmp_path / "model", bundle, np.dtype(dtype))
    back = read_folder(tmp_path / "model")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(back.params)} == {dtype}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(dtype)), back.params, bundle.params)


def test_weights_that_a_type_cannot_hold_are_not_written(bundle, tmp_path):
    vae = jax.tree.map(lambda x: x * 1e6, bundle.params["vae"])
    with pytest.raises(ValueError, match="not finite as float16"):
        write_folder(tmp_path / "model", dataclasses.replace(bundle, params=bundle.params | {"vae": vae}), np.float16)
    with pytest.raises(ValueError, match="cannot be written as int8"):
        write_folder(tmp_path / "model", bundle, np.int8)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_gives_way_only_to_its_own_writer(bundle, tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    write_folder(path, bundle)
    write_folder(path, dataclasses.replace(bundle, scheduler=SchedulerConfig(steps_offset=1, clip_sample=False)))
    assert read_scheduler(path).prediction_type == "epsilon"

    (path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"model holds files that are not ours to replace"):
        write_folder(path, bundle)
    assert (path / "notes.txt").read_text() == "mine"
    (path / "notes.txt").unlink()
    edit(path / "model_index.json", _written_by="someone else")
    with pytest.raises(ValueError, match="not ours to replace"):
        write_folder(path, bundle)
    with pytest.raises(ValueError, match="is a file"):
        write_folder(path / "model_index.json", bundle)


def test_a_failed_write_leaves_the_old_folder_whole(bundle, tmp_path):
    path = tmp_path / "model"
    write_folder(path, bundle)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(KeyError):
        write_folder(path, dataclasses.replace(bundle, params={"unet": bundle.params["unet"]}))
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_interrupt_between_the_two_renames_brings_the_old_folder_back(bundle, tmp_path, monkeypatch):
    path = tmp_path / "model"
    write_folder(path, bundle)
    rename = Path.rename

    def stopped(self, target):
        if ".new-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_folder(path, bundle)
    assert read_folder(path).unet == bundle.unet
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_writer_left_goes_after_a_day(bundle, tmp_path):
    write_folder(tmp_path / "model", bundle)
    for name, age in ((".model.old-1", 90_000), (".model.new-2", 0), (".models.old-3", 90_000)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    write_folder(tmp_path / "model", bundle)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".model.new-2", ".models.old-3", "model"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(bundle, tmp_path):
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(ValueError, match=r"model cannot be written: .*File too large"):
            write_folder(tmp_path / "model", bundle)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_is_gone_is_not_left_out(bundle, tmp_path):
    write_folder(tmp_path / "model", bundle)
    back = read_folder(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model/tokenizer has neither tokenizer\.json nor vocab\.json"):
        write_folder(tmp_path / "copy", back)
    assert list(tmp_path.iterdir()) == []


def test_a_flow_comes_back_and_is_called_what_diffusers_calls_it(bundle, tmp_path):
    flow = SchedulerConfig(
        prediction_type="flow_prediction", shift=3.0, num_train_timesteps=500, clip_sample=False, steps_offset=1
    )
    write_folder(tmp_path / "flow", dataclasses.replace(bundle, scheduler=flow))
    values = json.loads((tmp_path / "flow/scheduler/scheduler_config.json").read_text())
    values.pop("_diffusers_version")
    assert values == {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500, "shift": 3.0}
    assert read_scheduler(tmp_path / "flow") == flow
    assert json.loads((tmp_path / "flow/model_index.json").read_text())["scheduler"][1] == values["_class_name"]


def test_a_silent_scheduler_is_read_as_diffusers_pipeline_reads_it(bundle, tmp_path):
    write_folder(tmp_path, bundle)
    file = tmp_path / "scheduler/scheduler_config.json"
    for cls in ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"):
        file.write_text(json.dumps({"_class_name": cls}))
        scheduler = read_scheduler(tmp_path)
        assert (scheduler.steps_offset, scheduler.clip_sample) == (1, False)
    edit(file, steps_offset=0, clip_sample=True)
    scheduler = read_scheduler(tmp_path)
    assert (scheduler.steps_offset, scheduler.clip_sample) == (0, True)


def test_one_network_alone_is_written_and_read(bundle, tmp_path):
    for _ in range(2):
        write_network(tmp_path, "vae", bundle.vae, bundle.params["vae"])
    config, params = read_network(tmp_path, "vae")
    assert config == bundle.vae
    jax.tree.map(np.testing.assert_array_equal, params, bundle.params["vae"])


def test_settings_that_diffusers_pipeline_overrides_are_told(bundle, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        write_folder(tmp_path / "a", bundle)
        assert not caplog.records
        write_folder(tmp_path / "b", dataclasses.replace(bundle, scheduler=SchedulerConfig()))
    assert "steps_offset as 1" in caplog.text


@pytest.mark.parametrize(
    ("file", "field", "value", "sentence"),
    [
        ("unet/config.json", "class_embed_type", "timestep", 'class_embed_type is "timestep"; supported: null'),
        ("unet/config.json", "dual_cross_attention", True, "dual_cross_attention is true; supported: false"),
        ("unet/config.json", "mid_block_type", None, "mid_block_type is None"),
        ("unet/config.json", "act_fn", "gelu", "act_fn is 'gelu'"),
        ("unet/config.json", "down_block_types", ["AttnDownBlock2D", "DownBlock2D"], "'AttnDownBlock2D'; supported"),
        (
            "unet/config.json",
            "layers_per_blok",
            2,
            "layers_per_blok = 2; did you mean 'layers_per_block'",
        ),
        ("unet/config.json", "sample_size", "large", "sample_size is 'large'"),
        ("vae/config.json", "shift_factor", 0.1, "shift_factor is 0.1; supported: null, 0"),
        ("vae/config.json", "use_quant_conv", False, "use_quant_conv is false; supported: true"),
        ("text_encoder/config.json", "hidden_act", "relu", "hidden_act is 'relu'"),
        ("text_encoder/config.json", "model_type", "t5", 'model_type is "t5"'),
        ("scheduler/scheduler_config.json", "prediction_type", "flow", "prediction_type is 'flow'"),
        ("scheduler/scheduler_config.json", "trained_betas", [0.1], r"trained_betas is \[0.1\]; supported: null"),
        (
            "scheduler/scheduler_config.json",
            "_class_name",
            "FlowMatchHeunDiscreteScheduler",
            "_class_name is 'FlowMatch",
        ),
        ("scheduler/scheduler_config.json", "_class_name", ["x"], r"_class_name is \['x'\]"),
        ("model_index.json", "text_encoder_2", ["transformers", "CLIPTextModel"], "text_encoder_2 is .*not supported"),
        ("model_index.json", "unet", ["diffusers", "FluxTransformer2DModel"], "unet is .*supported: .*UNet2DCond"),
    ],
)
def test_a_setting_that_is_not_supported_is_named(bundle, tmp_path, file, field, value, sentence):
    write_folder(tmp_path / "model", bundle)
    edit(tmp_path / "model" / file, **{field: value})
    with pytest.raises(ValueError, match=sentence) as caught:
        read_folder(tmp_path / "model")
    assert str(tmp_path / "model" / file) in str(caught.value)


def test_fields_that_are_off_or_say_nothing_are_passed_over(bundle, tmp_path):
    write_folder(tmp_path / "model", bundle)
    edit(tmp_path / "model/unet/config.json", some_new_option=None, another=False, third=0, upcast_attention=True,
         only_cross_attention=[False, False], _name_or_path="x", time_embedding_type="positional")  # fmt: skip
    edit(tmp_path / "model/text_encoder/config.json", torch_dtype="float16", transformers_version="4.0")
    edit(tmp_path / "model/model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    assert read_folder(tmp_path / "model").unet == CONFIGS["unet"]


def test_the_published_sd15_files_are_read(bundle, tmp_path):
    path = tmp_path / "model"
    write_folder(path, bundle)
    (path / "unet/config.json").write_text(json.dumps(SD15_UNET))
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(SD15_SCHEDULER))
    folder = read_folder(path)
    assert folder.unet == UNetConfig(cross_attention_dim=768)
    assert folder.scheduler == SchedulerConfig(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False,
        clip_sample=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_half_a_folder_is_told_from_a_whole_one(bundle, tmp_path, name):
    write_folder(tmp_path / "model", bundle)
    (tmp_path / "model" / name).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"no folder '{name}'"):
        read_folder(tmp_path / "model")


def test_what_is_no_folder_is_refused(bundle, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        read_folder(tmp_path)
    write_folder(tmp_path / "model", bundle)
    (tmp_path / "model/tokenizer/merges.txt").unlink()
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor merges\.txt"):
        read_folder(tmp_path / "model")
    (tmp_path / "model/unet/config.json").write_text("<html>")
    with pytest.raises(ValueError, match=r"unet/config\.json is not JSON"):
        read_folder(tmp_path / "model")
