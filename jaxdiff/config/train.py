"""One run."""

import re
from dataclasses import dataclass, field
from typing import Literal

from jaxdiff.config.base import Checked, positive, require
from jaxdiff.config.data import DataConfig
from jaxdiff.config.optim import EMAConfig, OptimConfig
from jaxdiff.config.tasks import DiffusionTask, VAETask


@dataclass(frozen=True)
class MeshConfig(Checked):
    """Devices along each mesh axis; `data` -1 takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def _check(self) -> None:
        for name in ("data", "fsdp", "tensor"):
            value = getattr(self, name)
            require(
                value > 0 or (value == -1 and name == "data"),
                f"MeshConfig.{name} is {value}; it must be above 0{' or -1' if name == 'data' else ''}.",
            )


@dataclass(frozen=True)
class DistributedConfig(Checked):
    """Which process of a run this is. TPU pods, GKE, Slurm and Open MPI say it themselves; elsewhere give all three."""

    coordinator: str = ""
    """HOST:PORT of process 0, where all of them meet."""
    count: int | None = None
    """How many processes the run has."""
    index: int | None = None
    """This process's number, from 0."""
    wait: int = 300
    """Seconds that processes which are there wait for those that are not."""

    def _check(self) -> None:
        positive(self, "wait")
        given = {"coordinator": self.coordinator or None, "count": self.count, "index": self.index}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return
        require(
            not missing,
            f"DistributedConfig.{missing[0] if missing else ''} is missing: a run of several processes that are "
            "started by hand needs coordinator, count and index, or none of them where the cluster tells.",
        )
        assert self.count is not None
        assert self.index is not None
        require(
            re.fullmatch(r".+:[0-9]+", self.coordinator) is not None,
            f"DistributedConfig.coordinator is {self.coordinator!r}; it must be HOST:PORT of process 0.",
        )
        port = int(self.coordinator.rpartition(":")[2])
        require(0 < port < 2**16, f"DistributedConfig.coordinator has the port {port}; it must be from 1 to 65535.")
        positive(self, "count")
        require(
            0 <= self.index < self.count,
            f"DistributedConfig.index is {self.index}; with a count of {self.count} it must lie from 0 to "
            f"{self.count - 1}.",
        )


@dataclass(frozen=True)
class TrainConfig(Checked):
    """One run. `configs/*.py` make these; the resolved one is written beside the checkpoints."""

    workdir: str
    """A folder, or a place in a bucket (`gs://bucket/run`); all processes must see it."""
    task: VAETask | DiffusionTask
    cache: str = ""
    """A folder on disks that all processes see, for latents that are encoded once; empty: the run directory."""
    model: str = ""
    """A diffusers folder, a run directory or a single file that gives the networks' sizes, the noise schedule that its
    UNet was made with, and all that the task does not name itself: starting weights (`init`), VAE and tokenizer."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    steps: int = 10_000
    """Updates in all, in a run that goes by steps: where `seconds` is 0."""
    seconds: float = 0
    """How long to train, in place of `steps`; 0 goes by steps. Rates that fall to the run's end (cosine, linear, wsd)
    do so over this time, however fast the machine is. Compiling, evaluations and saving do not count; a run that is
    resumed has what is left; and the last call of `steps_per_call` is taken to its end."""
    steps_per_call: int = 1
    """Steps that the devices take in one call, without a word from the host between them: more where steps are short.
    They are the same steps. Calls are shorter where something is to be logged, evaluated or saved (so that `log_every`
    bounds them), and a signal ends the run after the call. The batches of a call are in memory together."""
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in; parameters, optimiser and EMA stay float32."""
    remat: Literal["none", "norms", "blocks"] = "none"
    """What the backward pass computes again to save memory. norms: all but the outputs of convolutions, matrix products
    and attention, which costs hardly any work. blocks: all inside each block, about a third more work."""
    log_every: int = 50
    eval_every: int = 1000
    eval_measures: tuple[Literal["fd", "kid", "support", "told_apart"], ...] = ()
    """What evaluations measure of images drawn for the captions of `DiffusionTask.heldout` images, against these: the
    Frechet distance; KID with its p-value; precision, recall, density and coverage; whether each image's nearest
    neighbour tells drawn from real. By features of EfficientNet-Lite0 (`python -m jaxdiff.tools.prepare features`)."""
    eval_features: str = ""
    """The folder of that network's weights; empty: `features` in `DataConfig.root`."""
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this stay for good; 0 keeps only the newest."""
    max_skipped: int = 20
    """Updates whose loss or gradient is not finite are skipped; so many of them in a row stop the run."""
    profile: int = 0
    """Steps to trace for XProf into `profile/`, after the first few; 0 traces none."""
    tensorboard: bool = False

    def _check(self) -> None:
        positive(self, "steps", "steps_per_call", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints")
        positive(self, "max_skipped")
        require(
            self.steps_per_call == 1 or not self.data.aspects,
            "TrainConfig.steps_per_call is above 1, and DataConfig.aspects make batches of several shapes, which need "
            "programs of their own: leave one of them out.",
        )
        for name in ("keep_every", "profile", "seconds"):
            require(getattr(self, name) >= 0, f"TrainConfig.{name} is {getattr(self, name)}; it must not be negative.")
        require(bool(self.workdir), "TrainConfig.workdir is empty; name a folder for the run.")
        require(0 <= self.seed < 2**32, f"TrainConfig.seed is {self.seed}; it must lie from 0 to {2**32 - 1}.")
        require(
            not self.eval_measures or (isinstance(self.task, DiffusionTask) and self.task.heldout >= 20),
            "TrainConfig.eval_measures are of what is drawn for the captions of held-out images: they need a "
            "DiffusionTask with a heldout of 20 images or more, such as --task.heldout 256.",
        )
        if isinstance(self.task, DiffusionTask):
            require(
                self.task.sized or bool(self.model),
                "DiffusionTask names no network's size: give --model FOLDER, or sizes in unet and text_encoder.",
            )
            start = self.task.init or self.model
            require(
                self.task.train_text_encoder or bool(start and not set(self.task.text_encoders) & {*self.task.scratch}),
                "DiffusionTask.train_text_encoder is False, and no weights are named for it: a text encoder of random "
                "weights would stay so. Name a folder in --model or DiffusionTask.init, or train it.",
            )
