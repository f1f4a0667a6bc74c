"""How parameters move."""

from dataclasses import dataclass

from jaxdiff.config.base import Checked, positive, require


@dataclass(frozen=True)
class OptimConfig(Checked):
    """AdamW with linear warm-up, cosine decay to `lr * final_lr_share`, and clipping by global norm."""

    lr: float = 1e-4
    warmup_steps: int = 500
    final_lr_share: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def _check(self) -> None:
        positive(self, "lr", "eps", "clip_norm")
        require(self.warmup_steps >= 0, f"OptimConfig.warmup_steps is {self.warmup_steps}; it must not be negative.")
        for name in ("b1", "b2", "final_lr_share"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"OptimConfig.{name} is {value}; it must lie in [0, 1].")
