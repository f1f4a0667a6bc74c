"""What a loss is given beside its params: each task describes it once, for training, planning and tests alike."""

from dataclasses import dataclass

import jax

from jaxdiff.types import Params


@dataclass(frozen=True)
class LossInputs:
    """The arrays of a batch, and the part that each network plays. Weights and shapes are named alike."""

    batch: dict[str, jax.ShapeDtypeStruct]
    """The arrays of the global batch, the first of `DataConfig.shapes` where there are several."""
    trained: tuple[str, ...]
    """The networks, or their parts, that are the params."""
    frozen: Params
    """Shapes of what the loss reads at every step and nothing changes: networks, their parts, and arrays."""
    kept: tuple[str, ...] = ()
    """The networks that only evaluations need, since what they make is cached."""

    def split(self, weights: Params) -> tuple[Params, Params, Params]:
        """The weights that params start from, the frozen ones, and the kept ones. Params may start without weights."""
        return (
            {name: weights[name] for name in self.trained if name in weights},
            {name: weights[name] for name in self.frozen},
            {name: weights[name] for name in self.kept},
        )
