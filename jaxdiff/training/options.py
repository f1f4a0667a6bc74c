"""A run's config: from its Python file, the command line, and the run directory it goes on in."""

import json
import os
import re
import runpy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import tyro

import jaxdiff.config
from jaxdiff.config import TrainConfig, from_dict, load_json, nearest, to_dict

FREE = re.compile(
    r"workdir|steps|log_every|eval_every|checkpoint_every|keep_checkpoints|tensorboard|remat|mesh\..*"
    r"|data\.(root|workers|max_bad_share|heldout)|task\.prompts"
)
"""Fields that may change when a run goes on: they say how long and where, not what is computed."""


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
            raise ValueError(f"{path} has no function config() that returns a TrainConfig.")
        config = make()
    except TypeError as error:
        unknown = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        cls = getattr(jaxdiff.config, unknown[1], None) if unknown else None
        if unknown and is_dataclass(cls):
            names = [f.name for f in fields(cls)]
            raise ValueError(f"{path}: {unknown[1]} has no field {unknown[2]!r}{nearest(unknown[2], names)}") from error
        raise ValueError(f"{path} cannot be read as a config: {error}.") from error
    except (SyntaxError, NameError, ImportError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as a config: {error}.") from error
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


def claim_workdir(config: TrainConfig) -> Path:
    """Makes the run directory and writes `config.json` into it, or checks that the run there is this one.

    Raises:
        ValueError: where the directory cannot be made, or holds a run of another config.
    """
    workdir = Path(config.workdir)
    file = workdir / "config.json"
    if file.exists():
        before, now = flat(from_dict(TrainConfig, load_json(file), str(file))), flat(config)
        names = [name for name in sorted(before | now) if not FREE.fullmatch(name)]
        changed = [
            f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
            for name in names
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"{workdir} holds a run of another config: {', '.join(changed)}. "
                "Take that back, or choose another --workdir."
            )
    try:
        for folder in (workdir, workdir / "samples"):
            folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_name("config.json.partial")
        partial.write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        raise ValueError(f"{workdir} cannot be written: {error.strerror}.") from error
    return workdir
