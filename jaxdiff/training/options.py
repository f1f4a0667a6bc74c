"""A run's config: from its Python file, the command line, and the run directory it goes on in."""

import fcntl
import json
import re
import runpy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from etils import epath

import jaxdiff.config
from jaxdiff.config import SchedulerConfig, TrainConfig, VAETask, from_dict, load_json, nearest, to_dict
from jaxdiff.io.folder import read_config as read_network_config
from jaxdiff.io.scheduler import read_scheduler
from jaxdiff.io.storage import is_remote, place_of, write_text
from jaxdiff.runtime.distributed import leads
from jaxdiff.training.parts import model_folder

FREE = re.compile(
    r"workdir|steps|log_every|eval_every|checkpoint_every|keep_checkpoints|keep_every|max_skipped|profile|tensorboard"
    r"|remat|mesh\..*|distributed\..*|cache"
    r"|data\.(root|workers|max_bad_share|heldout)|task\.(prompts|guidance)|optim\.(?!(name|state_dtype|rates)$).*"
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


def resolve(config: TrainConfig, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config with what `model` gives: all sizes, and folders where the task names none of its own.

    The noise schedule goes with the UNet's weights, but for fields that are among the `overrides` of the command line;
    for a UNet from scratch the task's own counts, unless that is the default.

    Raises:
        ValueError: where the folder is not one, or lacks a part that is needed; where a size is overridden, too.
    """
    if not config.model:
        return config
    folder, task = model_folder(config.model), config.task
    if not folder.is_dir():
        raise ValueError(f"{config.model} is not a folder; --model names a diffusers folder, or a run that has one.")
    given = [arg.removeprefix("--").split("=")[0].replace("-", "_") for arg in overrides if arg.startswith("--")]
    for name in given:
        if re.match(r"task\.(unet|text_encoder|vae)\.", name):
            raise ValueError(f"--{name} cannot be given beside --model, which says how large the networks are.")
    if isinstance(task, VAETask):
        vae = read_network_config(folder, "vae")
        return replace(config, task=replace(task, vae=vae, init=task.init or str(folder)))
    scheduler = task.scheduler
    if "unet" not in task.scratch or scheduler == SchedulerConfig():
        named = [name.removeprefix("task.scheduler.") for name in given if name.startswith("task.scheduler.")]
        scheduler = replace(read_scheduler(folder), **{name: getattr(scheduler, name) for name in named})
    task = replace(
        task,
        unet=read_network_config(folder, "unet"),
        text_encoder=read_network_config(folder, "text_encoder"),
        scheduler=scheduler,
        vae=task.vae or str(folder),
        tokenizer=task.tokenizer or str(folder / "tokenizer"),
        init=task.init or str(folder),
    )
    task.check_sizes()
    return replace(config, task=task)


@contextmanager
def claim_workdir(config: TrainConfig) -> Iterator[epath.Path]:
    """Makes the run directory and holds it: no other run claims it meanwhile. In a bucket nothing can be held.

    Raises:
        ValueError: where it cannot be made, another process holds it, or it has checkpoints of another config.
    """
    workdir = place_of(config.workdir)
    with ExitStack() as held:
        if is_remote(workdir):
            pass  # folders are but names there
        else:
            try:
                (workdir / "samples").mkdir(parents=True, exist_ok=True)
                lock = held.enter_context((workdir / ".lock").open("w"))
            except OSError as error:
                raise ValueError(f"{workdir} cannot be written: {error.strerror}.") from error
            try:
                if leads():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"Another process trains in {workdir}; wait for it, or choose another --workdir."
                ) from error
            except OSError:  # a file system without locks
                pass
        _check_same_run(config, workdir)
        yield workdir


def _check_same_run(config: TrainConfig, workdir: epath.Path) -> None:
    """Refuses what would make another run of the checkpoints that are there; prints what may change and does."""
    file, checkpoints = workdir / "config.json", workdir / "checkpoints"
    if not (file.exists() and checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())):
        return
    before, now = flat(from_dict(TrainConfig, load_json(file), str(file))), flat(config)
    changed = {
        name: f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name) and name != "workdir" and not name.startswith("distributed.")
    }
    refused = [text for name, text in changed.items() if not FREE.fullmatch(name)]
    if refused:
        raise ValueError(
            f"{workdir} holds a run of another config: {', '.join(refused)}. "
            "Take that back, or choose another --workdir."
        )
    if changed and leads():
        print(f"{workdir}: {', '.join(changed.values())}.")


def write_config(config: TrainConfig, workdir: epath.Path) -> None:
    """Writes `config.json`, whole or not at all; process 0 does."""
    if leads():
        write_text(workdir / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
