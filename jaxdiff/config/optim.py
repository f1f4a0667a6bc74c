"""How parameters move, and how they are averaged."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from jaxdiff.config.base import Checked, positive, require

Optimiser = Literal["adamw", "adafactor", "lion", "adagrad", "muon", "schedule_free", "sgd"]
MOMENTUM = ("adamw", "lion", "muon", "sgd")
"""Those that keep a first moment."""


@dataclass(frozen=True)
class OptimConfig(Checked):
    """Gradients are clipped by their global norm. Weight decay is decoupled; it spares biases, norms and embeddings."""

    name: Optimiser = "adamw"
    """`jaxdiff.training.optim` says what each is, and cites it."""
    lr: float = 1e-4
    schedule: Literal["cosine", "constant", "linear", "rsqrt", "wsd"] = "cosine"
    """What follows the linear warm-up: to `final_lr_share` along half a cosine, a line or, for wsd, at `lr` until the
    last `decay_share` of the run; rsqrt falls with the square root of the step, and no deeper than that share."""
    warmup_steps: int = 500
    final_lr_share: float = 0.0
    decay_share: float = 0.1
    """Share of the run in which wsd decays."""
    b1: float = 0.9
    """Momentum; adafactor and adagrad have none. schedule_free: how near gradients are taken to the average."""
    b2: float = 0.99
    """Memory of the squared gradients, for adamw, schedule_free and muon's vectors; lion's memory of its momentum."""
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the first moment is kept in; squared gradients, parameters and averages stay float32."""
    accumulate: int = 1
    """Micro-batches that a step takes one after another; they change the memory it needs, not what it computes."""
    rates: tuple[str, ...] = ()
    """`pattern=factor`: a regular expression for whole paths (`unet/conv_in/.*=0.1`) and what multiplies their rate;
    the first that matches counts, and 0 freezes: such parameters have no moments and no average."""

    def _check(self) -> None:
        positive(self, "lr", "eps", "clip_norm", "accumulate")
        for name in ("warmup_steps", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"OptimConfig.{name} is {value}; it must not be negative.")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"OptimConfig.{name} is {value}; it must lie in [0, 1).")
        for name in ("final_lr_share", "decay_share"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"OptimConfig.{name} is {value}; it must lie in [0, 1].")
        require(
            self.state_dtype == "float32" or self.name in MOMENTUM,
            f"OptimConfig.state_dtype is {self.state_dtype}, and {self.name} has no first moment to keep in it; "
            f"{', '.join(MOMENTUM)} have.",
        )
        if self.name == "schedule_free":
            require(self.b1 > 0, "OptimConfig.b1 is 0.0; schedule_free needs it above 0.")
            require(
                self.schedule == "constant",
                f"OptimConfig.schedule is {self.schedule!r}; schedule_free takes 'constant', since its average stands "
                "in for a decay.",
            )
        _ = self.factors

    @property
    def factors(self) -> tuple[tuple[str, float], ...]:
        """`rates` as (pattern, factor)."""
        found = []
        for text in self.rates:
            pattern, _, number = text.rpartition("=")
            try:
                factor = float(number)
                re.compile(pattern)
            except (ValueError, re.error):
                factor = math.nan
            if not (pattern and math.isfinite(factor) and factor >= 0):
                raise ValueError(
                    f"OptimConfig.rates has {text!r}; it must be PATTERN=FACTOR, a regular expression and a number "
                    "that is not negative, such as 'unet/conv_in/.*=0.1'."
                )
            found.append((pattern, factor))
        return tuple(found)


@dataclass(frozen=True)
class EMAConfig(Checked):
    """Averages of the parameters over the run; evaluations and exports use the first."""

    profile: Literal["constant", "power"] = "constant"
    """constant: one average that forgets by `decay`. power: one for each of `widths` (Karras et al. 2024, EDM2), from
    which `jaxdiff.training.ema` makes one of any width after the run."""
    decay: float = 0.999
    widths: tuple[float, ...] = (0.05, 0.10)
    """Standard deviations of the power profiles, as shares of the run so far."""

    def _check(self) -> None:
        require(0 <= self.decay < 1, f"EMAConfig.decay is {self.decay}; it must lie in [0, 1).")
        require(bool(self.widths), "EMAConfig.widths is empty; give at least one.")
        require(
            all(0 < width < 0.28 for width in self.widths),
            f"EMAConfig.widths is {self.widths}; each must lie between 0 and 0.28, which is nearly a plain mean.",
        )
        names = [f"{width:.3f}" for width in self.widths]
        require(
            sorted(set(names)) == names,
            f"EMAConfig.widths is {self.widths}; they must rise, and differ in their first three digits.",
        )
