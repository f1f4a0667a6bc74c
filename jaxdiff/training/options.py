"""A run's config: from its Python file, the command line, and the run directory it goes on in."""

import fcntl
import json
import os
import re
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

import jaxdiff.config
from jaxdiff.config import TrainConfig, from_dict, load_json, nearest, to_dict

FREE = re.compile(
    r"workdir|steps|log_every|eval_every|checkpoint_every|keep_checkpoints|tensorboard|remat|mesh\..*"
    r"|data\.(root|workers|max_bad_share|heldout)|task\.prompts|optim\..*"
)
"""Fields that may change when a run goes on: how long, where and how it is optimised, and what it shows; not the
networks, the data and the draws."""


def read_config(path: str, overrides: list[str]) -> TrainConfig:
    """What `config()` in the Python file `path` returns, with `--field.name value` from the command line put in.

    Raises:
        ValueError: where the file does not give a config, or a field is unknown; tyro itself tells of wrong values, and
            exits with code 2.
    """
    config = _from_file(path)
    # Without subcommands: the file has chosen the task. Without flags: every field takes a value, booleans too.
    config, unknown = tyro.cli(
        tyro.conf.AvoidSubcommands[tyro.conf.FlagConversionOff[TrainConfig]],
        default=config,
        args=overrides,
        prog=f"train.py {path}",
        use_underscores=True,
        return_unknown_args=True,
    )
    if unknown:
        name = unknown[0].removeprefix("--").split("=")[0].replace("-", "_")
        if not unknown[0].startswith("--"):
            raise ValueError(f"{unknown[0]!r} belongs to no field: overrides look like --optim.lr 3e-4.")
        raise ValueError(f"TrainConfig has no field {name!r}{nearest(name, list(flat(config)))}")
    return config


def _from_file(path: str) -> TrainConfig:
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; the first argument is a config file such as configs/emoji.py.")
    try:
        make = runpy.run_path(path).get("config")
        if not callable(make):
            raise ValueError("it has no function config() that returns a TrainConfig.")
        config = make()
    except TypeError as error:
        unknown = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        cls = getattr(jaxdiff.config, unknown[1], None) if unknown else None
        if unknown and is_dataclass(cls):
            names = [f.name for f in fields(cls)]
            raise ValueError(f"{path}: {unknown[1]} has no field {unknown[2]!r}{nearest(unknown[2], names)}") from error
        raise ValueError(f"{path} cannot be read as a config: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # whatever the user's own code raises
        raise ValueError(f"{path} cannot be read as a config: {type(error).__name__}: {error}.") from error
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{path}: config() returned a {type(config).__name__}, not a TrainConfig.")
    return config


def flat(config: Any) -> dict[str, Any]:
    """Every leaf of a config by its dotted name, as `--name` on the command line."""

    def walk(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        out = {}
        for name, value in values.items():
            out |= walk(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return out

    return walk(to_dict(config), "")


@contextmanager
def claim_workdir(config: TrainConfig) -> Iterator[Path]:
    """Makes the run directory and holds it: no other process claims it meanwhile.

    Raises:
        ValueError: where it cannot be made, another process holds it, or it has checkpoints of another config.
    """
    workdir = Path(config.workdir)
    try:
        (workdir / "samples").mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise ValueError(f"{workdir} cannot be written: {error.strerror}.") from error
    with lock:
        try:
            if jax.process_index() == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another process trains in {workdir}; wait for it, or choose another --workdir."
            ) from error
        except OSError:  # a file system without locks
            pass
        _check_same_run(config, workdir)
        yield workdir


def _check_same_run(config: TrainConfig, workdir: Path) -> None:
    """Refuses what would make another run of the checkpoints that are there; prints what may change and does."""
    file, checkpoints = workdir / "config.json", workdir / "checkpoints"
    if not (file.exists() and checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())):
        return
    before, now = flat(from_dict(TrainConfig, load_json(file), str(file))), flat(config)
    changed = {
        name: f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name) and name != "workdir"
    }
    refused = [text for name, text in changed.items() if not FREE.fullmatch(name)]
    if refused:
        raise ValueError(
            f"{workdir} holds a run of another config: {', '.join(refused)}. "
            "Take that back, or choose another --workdir."
        )
    if changed:
        print(f"{workdir}: {', '.join(changed.values())}.")


def write_config(config: TrainConfig, workdir: Path) -> None:
    """Writes `config.json`, whole or not at all."""
    partial = workdir / "config.json.partial"
    partial.write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, workdir / "config.json")
