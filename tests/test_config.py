"""Settings: nonsense is refused in a sentence, and what is written to JSON comes back."""

import dataclasses
import json
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from etils import epath

from jaxdiff.config import (
    CLIPTextConfig,
    DataConfig,
    DiffusionTask,
    DistributedConfig,
    OptimConfig,
    SchedulerConfig,
    TrainConfig,
    UNetConfig,
    VAEConfig,
    VAETask,
    from_dict,
    load_json,
    to_dict,
)
from jaxdiff.io.folder import read_config as read_network_config
from jaxdiff.io.scheduler import read_scheduler
from jaxdiff.training.log import Log
from jaxdiff.training.options import check_contents, claim_workdir, read_config, resolve, write_config
from jaxdiff.training.parts import read_vae

ROOT = Path(__file__).parents[1]
CONFIGS = sorted([*(ROOT / "configs").glob("*.py"), *(ROOT / "tests/configs").glob("*.py")])
VAE = str(ROOT / "tests/configs/tiny_vae.py")


@pytest.fixture(scope="session")
def main():
    return runpy.run_path(str(ROOT / "train.py"))["main"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_file_comes_back_from_json(path: Path) -> None:
    config = read_config(str(path), [])
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_the_command_line_overrides_any_field() -> None:
    config = read_config(VAE, ["--optim.lr", "3e-4", "--task.vae.block_out_channels", "8", "--data.flip", "False"])
    assert config.optim.lr == 3e-4
    assert isinstance(config.task, VAETask)
    assert config.task.vae.block_out_channels == (8,)
    assert not config.data.flip


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--optim.lrr", "1"], "'optim.lrr'.*'optim.lr'"),
        (["--task.vae.norm_groups=2"], "'task.vae.norm_num_groups'"),
        (["--stepz", "3"], "'steps'"),
        (["3"], "'3'"),
    ],
)
def test_an_unknown_field_ends_with_code_2_and_the_nearest_right_name(
    main, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    assert main([VAE, *overrides]) == 2
    assert re.match(f"error: .*{said}", capsys.readouterr().err)


@pytest.mark.parametrize("overrides", [["--optim.lr", "fast"], ["--optim.lr", "-1"], ["--steps", "0"]])
def test_a_wrong_value_ends_with_code_2(main, overrides: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([VAE, *overrides])
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def config():\n    return 3", "config() returned a int, not a TrainConfig"),
        ("x = 1", "has no function config()"),
        ("def config(:", "cannot be read as a config"),
        ("import no_such_module", "cannot be read as a config"),
        ("def config():\n    return {}['x']", "config.py cannot be read as a config: KeyError: 'x'"),
        (
            "from jaxdiff.config import *\ndef config():\n    return OptimConfig(lr=0.0)",
            "config.py: OptimConfig.lr is 0",
        ),
    ],
)
def test_a_config_file_that_is_none_is_told(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "config.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_config(str(file), [])


@pytest.mark.slow
def test_an_unknown_field_in_a_config_file_is_told_by_train_py(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text("from jaxdiff.config import *\ndef config():\n    return OptimConfig(warmup=1)")
    done = subprocess.run([sys.executable, "train.py", file], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(f"error: {file}: .*'warmup'.*'warmup_steps'.*\n", done.stderr)


def test_a_missing_config_file_and_no_argument_end_with_code_2(main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs/none.py"]) == 2
    assert "configs/none.py does not exist" in capsys.readouterr().err
    assert main([]) == 2


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: OptimConfig(lr=0.0), "OptimConfig.lr is 0.0"),
        (lambda: DataConfig(crop=0.0), "DataConfig.crop is 0.0"),
        (lambda: SchedulerConfig(beta_end=1.0), "must satisfy 0 < beta_start <= beta_end < 1"),
        (lambda: UNetConfig(block_out_channels=(32,)), "UNetConfig.down_block_types names 4 blocks"),
        (lambda: VAEConfig(norm_num_groups=7), "which norm_num_groups 7 does not divide"),
        (lambda: CLIPTextConfig(hidden_size=10), "CLIPTextConfig.hidden_size 10 is not a multiple"),
        (lambda: VAETask(train_encoder=False), "VAETask.train_encoder is False and init is empty"),
        (lambda: TrainConfig("runs/x", VAETask(), steps=0), "TrainConfig.steps is 0"),
        (lambda: TrainConfig("", VAETask()), "TrainConfig.workdir is empty"),
        (lambda: TrainConfig("runs/x", VAETask(), seed=-1), "TrainConfig.seed is -1"),
        (lambda: TrainConfig("runs/x", VAETask(), seed=2**63), f"TrainConfig.seed is {2**63}"),
        (lambda: OptimConfig(b2=1.0), "OptimConfig.b2 is 1.0"),
        (lambda: DataConfig(batch_size=10**11), "DataConfig.batch_size is 100000000000"),
        (lambda: DistributedConfig("localhost:99999", 1, 0), "has the port 99999; it must be from 1 to 65535"),
        (lambda: UNetConfig(attention_head_dim=(5, 0, 20, 20)), "UNetConfig.attention_head_dim is (5, 0, 20, 20)"),
        (lambda: UNetConfig(layers_per_block=-1), "UNetConfig.layers_per_block is -1"),
        (lambda: UNetConfig(sample_size=0), "UNetConfig.sample_size is 0"),
        (lambda: UNetConfig(freq_shift=160), "UNetConfig.freq_shift is 160; it must be below 160"),
        (lambda: UNetConfig(norm_eps=float("inf")), "UNetConfig.norm_eps is inf"),
        (lambda: VAEConfig(block_out_channels=()), "VAEConfig.block_out_channels is empty"),
        (lambda: SchedulerConfig(num_train_timesteps=1, rescale_betas_zero_snr=True), "num_train_timesteps above 1"),
    ],
)
def test_nonsense_is_refused_when_a_config_is_made(make, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lrr": 1}, "'lrr'.*'lr'"),
        ({"lr": "fast"}, "lr is 'fast'.*number"),
        ({"warmup_steps": 1.5}, r"warmup_steps is 1\.5.*whole number"),
    ],
)
def test_json_of_the_wrong_names_or_types_is_told_with_its_file(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=rf"x\.json.*{said}"):
        from_dict(OptimConfig, values, "x.json")


def test_wrong_types_in_a_config_file_are_told_and_lists_stand_for_tuples() -> None:
    told = {
        "DataConfig(size='64')": "DataConfig.size is '64'",
        "DataConfig(flip=1)": "DataConfig.flip is 1",
        "UNetConfig(norm_eps=[8, 8])": "UNetConfig.norm_eps is [8, 8]",
        "VAEConfig(block_out_channels=['a', 1])": "is ['a', 1]",
        "CLIPTextConfig(hidden_act='tanh')": "hidden_act is 'tanh'",
        "TrainConfig('x', None)": "TrainConfig.task is None",
        "VAEConfig(block_out_channels=[128, 256, 512, 512], scaling_factor=1) == VAEConfig(scaling_factor=1.0)": "True",
    }
    # A process of its own: this one checks types before the package does.
    script = (
        "import sys\n"
        "from jaxdiff.config import *\n"
        "for text in sys.argv[1:]:\n"
        "    try:\n"
        "        print(eval(text))\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *told], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    for line, said in zip(done.stdout.splitlines(), told.values(), strict=True):
        assert said in line


def test_json_that_is_nested_too_deeply_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"x.json is nested too deeply"):
        load_json(file)


def vae_config(workdir: Path, *overrides: str) -> TrainConfig:
    return read_config(VAE, ["--workdir", str(workdir), *overrides])


def test_a_run_with_checkpoints_goes_on_with_its_own_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    config = vae_config(workdir)
    with claim_workdir(config) as claimed:
        write_config(config, claimed)
    (workdir / "checkpoints" / "2").mkdir(parents=True)
    with claim_workdir(vae_config(workdir, "--steps", "70", "--optim.lr", "0.5")):
        assert "optim.lr was 0.001 and is now 0.5, steps was 60 and is now 70." in capsys.readouterr().out
    other = vae_config(workdir, "--seed", "1", "--optim.lr", "0.5")
    with pytest.raises(ValueError, match="seed was 0 and is now 1"), claim_workdir(other):
        pass


def stopped_run(workdir: Path, contents: dict[str, str] | None, *overrides: str) -> None:
    with claim_workdir(vae_config(workdir, *overrides)) as claimed:
        write_config(vae_config(workdir, *overrides), claimed, contents)
    (workdir / "checkpoints" / "2").mkdir(parents=True)


def test_a_start_folder_may_move_and_what_it_holds_may_not_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, moved = tmp_path / "run", vae_config(tmp_path / "run", "--task.init", "models/../models/sd15")
    stopped_run(workdir, {"task.init": "a", "data.root": "5 records (b)"}, "--task.init", "models/sd15")
    with claim_workdir(moved) as claimed:
        check_contents({"task.init": "a", "data.root": "5 records (b)"}, claimed)
        assert "data" not in capsys.readouterr().out
        check_contents({"task.init": "a", "data.root": "4 records (c)"}, claimed)
        assert "5 records (b) then, 4 records (c) now" in capsys.readouterr().out
        for other in ({"data.root": "5 records (b)"}, {"task.init": "c", "data.root": "5 records (b)"}):
            with pytest.raises(ValueError, match=r"other contents of task\.init"):
                check_contents(other, claimed)


def test_a_run_that_has_no_contents_to_compare_keeps_its_folders(tmp_path: Path) -> None:
    stopped_run(tmp_path / "run", None, "--task.init", "models/sd15")
    with pytest.raises(ValueError, match=r"task\.init was"), claim_workdir(vae_config(tmp_path / "run")):
        pass


def test_the_mean_of_schedule_free_keeps_its_b1(tmp_path: Path) -> None:
    free = ["--optim.name", "schedule_free", "--optim.schedule", "constant"]
    stopped_run(tmp_path / "run", {}, *free)
    other = vae_config(tmp_path / "run", *free, "--optim.b1", "0.8")
    with pytest.raises(ValueError, match=r"optim\.b1 was 0\.9"), claim_workdir(other):
        pass
    stopped_run(tmp_path / "other", {})
    with claim_workdir(vae_config(tmp_path / "other", "--optim.b1", "0.8")):
        pass


def test_a_run_without_checkpoints_takes_any_config(tmp_path: Path) -> None:
    config = vae_config(tmp_path / "run")
    with claim_workdir(config) as workdir:
        assert not (workdir / "config.json").exists()
        write_config(config, workdir)
    with claim_workdir(vae_config(tmp_path / "run", "--seed", "1")):
        pass


def test_a_run_directory_is_held_by_one_process(tmp_path: Path) -> None:
    config = vae_config(tmp_path / "run")
    with (
        claim_workdir(config),
        pytest.raises(ValueError, match="Another process trains in"),
        claim_workdir(config),
    ):
        pass
    with claim_workdir(config):
        pass


def test_a_run_directory_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"), claim_workdir(vae_config(tmp_path / "file" / "run")):
        pass


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["--data.source", "latents"], "An autoencoder is trained on images"),
        (
            ["--data.heldout", "none"],
            "'none'; it has heldout, test, train",
        ),
    ],
)
def test_data_that_an_autoencoder_cannot_use_is_told(
    main, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], sentence: str
) -> None:
    assert main([VAE, "--workdir", str(tmp_path), "--data.root", str(ROOT / "tests/data"), *overrides]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "config.json").exists()


def test_an_export_that_could_not_be_written_is_told_before_the_run(
    main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "export" / "vae").mkdir(parents=True)
    (tmp_path / "export" / "vae" / "notes.txt").write_text("mine")
    assert main([VAE, "--workdir", str(tmp_path), "--data.root", str(ROOT / "tests/data")]) == 2
    assert "not ours to replace" in capsys.readouterr().err
    assert not (tmp_path / "config.json").exists()


def test_a_size_that_the_autoencoder_does_not_divide_is_told(
    main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    levels = [f"--task.vae.{name}" for name in ("down_block_types", "up_block_types", "block_out_channels")]
    values = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2, ["8", "8"]
    overrides = [text for name, value in zip(levels, values, strict=True) for text in (name, *value)]
    assert main([VAE, "--workdir", str(tmp_path), "--data.size", "15", *overrides]) == 2
    assert "DataConfig.size 15 is not a multiple of the VAE's factor 2" in capsys.readouterr().err


def test_metrics_of_a_run_that_goes_on_are_kept_and_all_of_them_json(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n5\n\xff\n{"step": "x"}\n{"step": 3}\n{"step"')
    with Log(epath.Path(tmp_path), 2, 9, 1) as log:
        log.write({"step": 3, "loss": float("nan"), "kl": 0.5})
    assert file.read_text() == '{"step": 1}\n{"step": 3, "loss": null, "kl": 0.5}\n'


EMBEDDED = ROOT / "jaxdiff" / "assets" / "emoji"


def diffusion_config(*overrides: str) -> TrainConfig:
    config = read_config(str(ROOT / "tests/configs/topology.py"), ["--workdir", "runs/x", *overrides])
    return resolve(config, overrides)


def test_a_model_gives_sizes_schedule_and_what_the_task_does_not_name() -> None:
    model = str(EMBEDDED)
    config = diffusion_config("--model", model, "--task.tokenizer", "")
    assert config.task.unet.block_out_channels == (64, 128, 160)
    assert config.task.text_encoder.hidden_size == 160
    assert config.task.scheduler.rescale_betas_zero_snr
    assert (config.task.init, config.task.tokenizer) == (model, f"{model}/tokenizer")
    assert config.task.vae == "jaxdiff/assets/emoji"  # the task's own
    assert from_dict(TrainConfig, to_dict(config)) == config
    bare = resolve(replace(config, task=DiffusionTask(train_text_encoder=False)))
    assert (bare.task.vae, bare.task.scheduler) == (model, config.task.scheduler)


def test_a_run_gives_what_it_has_exported(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED, tmp_path / "run" / "export")
    (tmp_path / "run" / "config.json").write_text('{"task": {}}')
    config = diffusion_config("--model", str(tmp_path / "run"), "--task.tokenizer", "", "--task.vae", "")
    assert config.task.scheduler == read_scheduler(EMBEDDED)
    assert config.task.tokenizer == str(tmp_path / "run" / "export" / "tokenizer")
    assert config.task.vae == config.task.init == str(tmp_path / "run")
    assert read_vae(config.task, config.data)[0].scaling_factor == read_network_config(EMBEDDED, "vae").scaling_factor


def test_a_schedule_is_the_models_but_for_what_is_said_and_the_tasks_for_a_unet_from_scratch() -> None:
    said = diffusion_config("--model", str(EMBEDDED), "--task.scheduler.prediction-type=sample").task.scheduler
    assert (said.prediction_type, said.rescale_betas_zero_snr) == ("sample", True)
    own = diffusion_config("--model", str(EMBEDDED), "--task.scratch", "unet").task.scheduler
    assert not own.rescale_betas_zero_snr


def written(folder: Path, scheduler: str) -> str:
    """A config file with this noise schedule beside a model."""
    file = folder / "config.py"
    file.write_text(
        "from jaxdiff.config import *\n"
        "def config():\n"
        f"    return TrainConfig('runs/x', DiffusionTask({scheduler}), model={str(EMBEDDED)!r})\n"
    )
    return str(file)


@pytest.mark.parametrize(
    ("scheduler", "overrides", "expected"),
    [
        ("", [], {}),
        ("scheduler=SchedulerConfig(prediction_type='epsilon')", [], {"prediction_type": "epsilon"}),  # a default
        ("scheduler=SchedulerConfig(2000)", [], {"num_train_timesteps": 2000}),
        (
            "scheduler=SchedulerConfig(beta_end=0.013)",
            ["--task.scheduler.prediction_type", "sample", "--steps", "3"],
            {"beta_end": 0.013, "prediction_type": "sample"},
        ),
        (
            "scheduler=SchedulerConfig(beta_end=0.013), scratch=('unet',)",
            [],
            dataclasses.asdict(SchedulerConfig(beta_end=0.013)),
        ),
        ("scratch=('unet',)", [], {}),
    ],
)
def test_fields_of_a_schedule_in_the_file_count_and_the_model_gives_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scheduler: str, overrides: list[str], expected: dict
) -> None:
    config = resolve(read_config(written(tmp_path, scheduler), overrides), overrides)
    assert config.task.scheduler == replace(read_scheduler(EMBEDDED), **expected)
    assert all(name in caplog.text for name in expected) or "scratch" in scheduler


def test_sizes_of_the_file_that_are_not_the_models_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    resolve(read_config(written(tmp_path, "unet=UNetConfig(layers_per_block=7, cross_attention_dim=768)"), []))
    assert "layers_per_block is 1 there and 7 here" in caplog.text


def test_a_size_beside_a_model_is_told() -> None:
    with pytest.raises(ValueError, match=r"--task\.unet\.layers_per_block cannot be given beside --model"):
        diffusion_config("--model", str(EMBEDDED), "--task.unet.layers_per_block", "1")


@pytest.mark.parametrize("model", [EMBEDDED, EMBEDDED / "vae"])
def test_a_model_gives_the_autoencoder_that_is_trained_on(model: Path) -> None:
    config = resolve(read_config(VAE, ["--model", str(model)]))
    assert config.task.vae.block_out_channels == (32, 48, 96)
    assert config.task.init == str(model)


def test_a_model_that_is_no_folder_is_told() -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder; --model names a diffusers folder"):
        diffusion_config("--model", "nowhere")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_encoder_2": None}, "there is no text_encoder_2, whose vector such a UNet reads"),
        ({"unet": {"addition_embed_type": None}}, "there is a text_encoder_2: Stable Diffusion XL's UNets have"),
        ({"unet": {"cross_attention_dim": 8}}, r"hidden_sizes are \[8, 12\]; it must be their sum"),
        ({"unet": {"projection_class_embeddings_input_dim": 30}}, "it must be 34"),
        ({"unet": {"time_cond_proj_dim": 4}}, r"\(LCM\); such networks are sampled, and not trained"),
        ({"text_encoder": {"max_position_embeddings": 7}}, "are 7 and 6; they must be equal"),
    ],
)
def test_what_stable_diffusion_xl_is_not_trained_with_is_told(change: dict, said: str) -> None:
    fields = {name: value if value is None else replace(getattr(tiny.XL_TASK, name), **value)
              for name, value in change.items()}  # fmt: skip
    with pytest.raises(ValueError, match=said):
        replace(tiny.XL_TASK, **fields)
    assert from_dict(DiffusionTask, to_dict(tiny.XL_TASK)) == tiny.XL_TASK


def test_zeros_for_empty_prompts_are_for_stable_diffusion_xl() -> None:
    with pytest.raises(ValueError, match="zero_empty is True; it is for Stable Diffusion XL, here None"):
        replace(tiny.TASK, zero_empty=True)
    assert tiny.XL_TASK.zeroes_empty
    assert not tiny.TASK.zeroes_empty
    assert not replace(tiny.XL_TASK, zero_empty=False).zeroes_empty


def test_a_refiner_is_not_trained(tmp_path: Path) -> None:
    (tmp_path / "text_encoder_2").mkdir()
    with pytest.raises(ValueError, match="refiners are sampled, and not trained"):
        resolve(TrainConfig("runs/x", DiffusionTask(), model=str(tmp_path)))


def test_a_frozen_text_encoder_needs_weights_and_networks_need_sizes() -> None:
    frozen = DiffusionTask(train_text_encoder=False, scratch=("text_encoder",))
    with pytest.raises(ValueError, match="a text encoder of random weights would stay so"):
        TrainConfig("runs/x", frozen, model="models/sd15")
    with pytest.raises(ValueError, match="DiffusionTask names no network's size: give --model FOLDER"):
        TrainConfig("runs/x", DiffusionTask())


def test_measures_of_what_is_drawn_need_held_out_images():
    with pytest.raises(ValueError, match="heldout of 20 images or more"):
        TrainConfig(workdir="runs/x", task=VAETask(), eval_measures=("kid",))
