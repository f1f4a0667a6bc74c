"""A run's config: from its Python file, the command line, and the run directory it goes on in."""

import fcntl
import json
import logging
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
from jaxdiff.config import (
    DiffusionTask,
    SchedulerConfig,
    TrainConfig,
    VAETask,
    as_written,
    from_dict,
    load_json,
    nearest,
    to_dict,
)
from jaxdiff.io.folder import TOKENIZERS, find_part, has_part, model_schedule, zero_empty
from jaxdiff.io.folder import read_config as read_network_config
from jaxdiff.io.single_file import is_single
from jaxdiff.io.storage import is_remote, place_of, write_text
from jaxdiff.runtime.distributed import leads

logger = logging.getLogger(__name__)

FREE = re.compile(
    r"workdir|steps|seconds|steps_per_call|log_every|eval_\w+|checkpoint_every|keep_checkpoints|keep_every"
    r"|max_skipped|profile|tensorboard|remat|mesh\..*|distributed\..*|cache"
    r"|data\.(root|workers|resident|max_bad_share|heldout)|task\.(prompts|guidance|heldout|lpips\.folder)"
    r"|optim\.(?!(name|state_dtype|rates)$).*"
)
"""Fields that may change when a run goes on: how long, where and how it is optimised, and what it shows; not the
networks, the data and the draws."""
PLACES = re.compile(r"model|task\.(init|vae|tokenizer|tokenizer_2)")
"""Fields that name folders. Those may move: `check_contents` compares what is in them."""


def read_config(path: str, overrides: list[str]) -> TrainConfig:
    """What `config()` in the Python file `path` returns, with `--field.name value` from the command line put in.

    Raises:
        ValueError: where the file does not give a config, or a field is unknown; tyro itself tells of wrong values, and
            exits with code 2.
    """
    config = _from_file(path)
    written = _scheduler(config).written
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
    if "steps" in _names(overrides) and config.seconds:
        raise ValueError(f"--steps is given, and the run goes by the clock, for {config.seconds:g} seconds: leave one "
                         "out. --seconds 0 goes by steps.")  # fmt: skip
    prefix = "task.scheduler."
    as_written(
        _scheduler(config),
        written | {name.removeprefix(prefix) for name in _names(overrides) if name.startswith(prefix)},
    )
    return config


def _scheduler(config: TrainConfig) -> SchedulerConfig:
    """The noise schedule that the config says; an autoencoder has none."""
    return config.task.scheduler if isinstance(config.task, DiffusionTask) else SchedulerConfig()


def _names(overrides: Sequence[str]) -> list[str]:
    """The fields that a command line names."""
    return [arg.removeprefix("--").split("=")[0].replace("-", "_") for arg in overrides if arg.startswith("--")]


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

    The noise schedule goes with the UNet's weights, but for the fields that the config file or the command line gives;
    for a UNet from scratch the task's own counts, unless it gives none. Where what the config says differs from the
    model, a warning says which of them counts.

    Raises:
        ValueError: where the folder is not one, or lacks a part that is needed; where a size is overridden, too.
    """
    if not config.model:
        return config
    folder, task = Path(config.model), config.task
    if not folder.is_dir() and not is_single(folder):
        raise ValueError(
            f"{config.model} is not a folder; --model names a diffusers folder, a run that has one, or a single file."
        )
    for name in _names(overrides):
        if re.match(r"task\.(unet|text_encoder|text_encoder_2|vae)\.", name):
            raise ValueError(f"--{name} cannot be given beside --model, which says how large the networks are.")
    if isinstance(task, VAETask):
        sizes = {"vae": read_network_config(folder, "vae")}
        resolved = replace(task, **sizes, init=task.init or config.model)
    else:
        sizes = {name: read_network_config(folder, name) for name in ("unet", *_text_encoders(folder))}
        second = "text_encoder_2" in sizes
        whole = {"text_encoder_2": None, "zero_empty": None} | sizes
        if second:
            whole["zero_empty"] = zero_empty(folder) if task.zero_empty is None else task.zero_empty
            whole["tokenizer_2"] = task.tokenizer_2 or task.tokenizer or str(find_part(folder, "tokenizer_2"))
        resolved = replace(
            task,
            **whole,
            scheduler=_schedule_beside(folder, task),
            vae=task.vae or config.model,
            tokenizer=task.tokenizer or str(find_part(folder, "tokenizer")),
            init=task.init or config.model,
        )
        resolved.check_sizes()
        if task.reads_sizes and not second:
            logger.warning("Sizes are those of %s, which has no text_encoder_2 as the config has.", folder)
    for name, theirs in sizes.items():
        if (ours := getattr(task, name)) not in (None, type(theirs)(), theirs):
            logger.warning("Sizes are those of %s, not of the config: %s", folder, _differences(theirs, ours))
    return replace(config, task=resolved)


def _text_encoders(folder: Path) -> tuple[str, ...]:
    """The text encoders that a model has.

    Raises:
        ValueError: for the second one alone, as Stable Diffusion XL's refiner has it.
    """
    found = tuple(name for name in TOKENIZERS if has_part(folder, name))
    if found == ("text_encoder_2",):
        raise ValueError(f"{folder} has a text_encoder_2 and no text_encoder, as the refiner of Stable Diffusion XL: "
                         "refiners are sampled, and not trained. Name a base model.")  # fmt: skip
    return found or ("text_encoder",)


def _schedule_beside(folder: Path, task: DiffusionTask) -> SchedulerConfig:
    """The noise schedule of a task that starts from the model in `folder`."""
    own = task.scheduler
    if "unet" in task.scratch and own.written:
        return own
    model = model_schedule(folder)
    scheduler = replace(model, **{name: getattr(own, name) for name in own.written})
    if scheduler != model:
        logger.warning("The noise schedule is that of %s but for what the config says: %s",
                       folder, _differences(model, scheduler))  # fmt: skip
    return scheduler


def _differences(theirs: Any, ours: Any) -> str:
    """The fields in which two configs differ, in words."""
    names = [f.name for f in fields(ours) if getattr(theirs, f.name) != getattr(ours, f.name)]
    words = (f"{name} is {getattr(theirs, name)!r} there and {getattr(ours, name)!r} here" for name in names)
    return f"{type(ours).__name__}.{', '.join(words)}."


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
    if not has_run(workdir):
        return
    file = workdir / "config.json"
    before, now = flat(from_dict(TrainConfig, load_json(file), str(file))), flat(config)
    changed = {
        name: f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name) and name != "workdir" and not name.startswith("distributed.")
    }
    kept = {"optim.b1"} if config.optim.name == "schedule_free" else set()  # its parameters are a mean by b1
    if bool(before.get("seconds")) != bool(config.seconds):
        way = "the clock" if before.get("seconds") else "steps"
        raise ValueError(f"{workdir} goes by {way}, as a run does from its start to its end, and --seconds is "
                         f"{config.seconds:g}: take that back, or choose another --workdir.")  # fmt: skip
    may_move = (workdir / CONTENTS).exists()

    def refused(name: str) -> bool:
        return name in kept or not (FREE.fullmatch(name) or (may_move and PLACES.fullmatch(name)))

    if refusals := [text for name, text in changed.items() if refused(name)]:
        raise ValueError(
            f"{workdir} holds a run of another config: {', '.join(refusals)}. "
            "Take that back, or choose another --workdir."
        )
    if changed and leads():
        print(f"{workdir}: {', '.join(changed.values())}.")


def has_run(workdir: epath.Path) -> bool:
    """Whether a run that can go on is there."""
    checkpoints = workdir / "checkpoints"
    saved = checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())
    return saved and (workdir / "config.json").exists()


# What folders hold, by the fields that name them -> digests.
Contents = dict[str, str]
CONTENTS = "contents.json"
DATA = "data.root"


def check_contents(contents: Contents, workdir: epath.Path) -> None:
    """Compares what a run is made of with what it was made of when it was started; places do not matter.

    Data may change, which is printed; what else is other than it was would make another run of the checkpoints.

    Raises:
        ValueError: where a folder of weights or a tokenizer holds another one than before.
    """
    file = workdir / CONTENTS
    if not (has_run(workdir) and file.exists()):
        return
    before = load_json(file)
    changed = [name for name in sorted(before | contents) if before.get(name) != contents.get(name)]
    if refusals := [name for name in changed if name != DATA]:
        raise ValueError(
            f"{workdir} holds a run that began with other contents of {', '.join(refusals)}. Name the folder that it "
            "began with, wherever that is now, or choose another --workdir."
        )
    if changed and leads():
        print(f"{workdir}: the data changed since this run stopped: {before[DATA]} then, {contents[DATA]} now.")


def write_config(config: TrainConfig, workdir: epath.Path, contents: Contents | None = None) -> None:
    """Writes `config.json`, and `contents.json` where they are given, each whole or not at all; process 0 does."""
    if leads():
        write_text(workdir / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
        if contents is not None:
            write_text(workdir / CONTENTS, json.dumps(contents, indent=2) + "\n")
