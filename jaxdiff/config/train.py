"""One run."""

from dataclasses import dataclass, field
from typing import Literal

from jaxdiff.config.base import Checked, positive, require
from jaxdiff.config.data import DataConfig
from jaxdiff.config.optim import OptimConfig
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
class TrainConfig(Checked):
    """One run. `configs/*.py` make these; the resolved one is written beside the checkpoints."""

    workdir: str
    task: VAETask | DiffusionTask
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    steps: int = 10_000
    seed: int = 0
    ema_decay: float = 0.999
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in; parameters, optimiser and EMA stay float32."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, about a third more work."""
    log_every: int = 50
    eval_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    tensorboard: bool = False

    def _check(self) -> None:
        positive(self, "steps", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints")
        require(0 <= self.ema_decay < 1, f"TrainConfig.ema_decay is {self.ema_decay}; it must lie in [0, 1).")
