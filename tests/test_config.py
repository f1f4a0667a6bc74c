"""Settings: nonsense is refused in a sentence, and what is written to JSON comes back."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdiff.config import (
    CLIPTextConfig,
    DataConfig,
    OptimConfig,
    SchedulerConfig,
    TrainConfig,
    UNetConfig,
    VAEConfig,
    VAETask,
    from_dict,
    to_dict,
)
from jaxdiff.training.options import claim_workdir, read_config

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
    ("overrides", "sentence"),
    [
        (["--optim.lrr", "1"], "TrainConfig has no field 'optim.lrr'; did you mean 'optim.lr'?"),
        (["--task.vae.norm_groups=2"], "did you mean 'task.vae.norm_num_groups'?"),
        (["--stepz", "3"], "did you mean 'steps'?"),
        (["3"], "'3' belongs to no field"),
    ],
)
def test_an_unknown_field_ends_with_code_2_and_the_nearest_right_name(
    main, capsys: pytest.CaptureFixture[str], overrides: list[str], sentence: str
) -> None:
    assert main([VAE, *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error


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
    ],
)
def test_a_config_file_that_is_none_is_told(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "config.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_config(str(file), [])


def test_an_unknown_field_in_a_config_file_is_told_by_train_py(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text("from jaxdiff.config import *\ndef config():\n    return OptimConfig(warmup=1)")
    done = subprocess.run([sys.executable, "train.py", file], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {file}: OptimConfig has no field 'warmup'; did you mean 'warmup_steps'?\n"


def test_a_missing_config_file_and_no_argument_end_with_code_2(main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs/none.py"]) == 2
    assert "configs/none.py does not exist" in capsys.readouterr().err
    assert main([]) == 2


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: OptimConfig(lr=0.0), "OptimConfig.lr is 0.0; it must be above 0"),
        (lambda: DataConfig(crop=0.0), "DataConfig.crop is 0.0"),
        (lambda: SchedulerConfig(beta_end=1.0), "must satisfy 0 < beta_start <= beta_end < 1"),
        (lambda: UNetConfig(block_out_channels=(32,)), "UNetConfig.down_block_types names 4 blocks"),
        (lambda: VAEConfig(norm_num_groups=7), "which norm_num_groups 7 does not divide"),
        (lambda: CLIPTextConfig(hidden_size=10), "CLIPTextConfig.hidden_size 10 is not a multiple"),
        (lambda: VAETask(train_encoder=False), "VAETask.train_encoder is False and init is empty"),
        (lambda: TrainConfig("runs/x", VAETask(), steps=0), "TrainConfig.steps is 0"),
    ],
)
def test_nonsense_is_refused_when_a_config_is_made(make, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lrr": 1}, "x.json: OptimConfig has no field 'lrr'; did you mean 'lr'?"),
        ({"lr": "fast"}, "x.json: lr is 'fast', not float"),
        ({"warmup_steps": 1.5}, "x.json: warmup_steps is 1.5, not int"),
    ],
)
def test_json_of_the_wrong_names_or_types_is_told_with_its_file(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        from_dict(OptimConfig, values, "x.json")


def test_a_run_directory_is_claimed_by_one_config(tmp_path: Path) -> None:
    config = read_config(VAE, ["--workdir", str(tmp_path / "run")])
    claim_workdir(config)
    longer = read_config(VAE, ["--workdir", str(tmp_path / "run"), "--steps", "70", "--log_every", "3"])
    claim_workdir(longer)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 70
    other = read_config(VAE, ["--workdir", str(tmp_path / "run"), "--seed", "1", "--optim.lr", "0.5"])
    with pytest.raises(ValueError, match=r"optim.lr was 0.001 and is now 0.5, seed was 0 and is now 1"):
        claim_workdir(other)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        claim_workdir(read_config(VAE, ["--workdir", str(tmp_path / "file" / "run")]))
