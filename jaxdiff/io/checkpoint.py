"""Checkpoints of a run: saved while the steps go on, read back newest first."""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

logger = logging.getLogger(__name__)


class Checkpoints:
    """The steps under one folder, of which the newest `keep` stay.

    Use it as a context manager: leaving it waits until the last save is whole on disk.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax tells of every file
        self.folder = folder.absolute()
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep))
        except OSError as error:
            raise ValueError(f"{folder} cannot be made for checkpoints: {error.strerror}.") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps that were saved whole, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any) -> None:
        """Starts to save, and returns once the arrays may be reused. A step that is there already is left."""
        if step not in self.steps():
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def restore(self, like: Any) -> Any:
        """The newest state that can be read, with the shapes and shardings of `like`; None where none was saved.

        Where a step cannot be read, the one before it is tried; if that can, the other is renamed `damaged-STEP`.

        Raises:
            ValueError: where there are steps, and none can be read.
        """
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
        steps, damaged = self.steps(), []
        for step in reversed(steps):
            try:
                state = self._manager.restore(step, args=ocp.args.StandardRestore(like))
            except Exception as error:  # Orbax raises many kinds, for damage and for other shapes alike
                damaged.append((step, error))
                continue
            for bad, error in damaged:
                kept = self.folder / f"damaged-{bad}"
                (self.folder / str(bad)).rename(kept)
                logger.warning("The checkpoint of step %d cannot be read (%s) and is now %s; going on from step %d.",
                               bad, _first_line(error), kept, step)  # fmt: skip
            if damaged:
                self._manager.reload()
            return state
        if damaged:
            error = damaged[0][1]
            told = f"steps {', '.join(map(str, steps))}; {_first_line(error)}"
            raise ValueError(
                f"No checkpoint in {self.folder} can be read ({told}): "
                "they are damaged or belong to another model. Move the folder away to start anew."
            ) from error
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
