"""Checkpoints of a run: saved beside the running steps, read back newest first."""

import logging
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

T = TypeVar("T")
log = logging.getLogger(__name__)


class Checkpoints:
    """The steps under one folder, of which the newest `keep` stay. Use it as a context manager: leaving it waits for
    the last save to be whole on disk."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax tells every file
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self.folder = folder.absolute()
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
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
        """Starts to save; returns once the arrays may be reused. A step that is there already is left."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def restore(self, like: T) -> T | None:
        """The newest state that can be read, in the shapes, types and shardings of `like`; None where nothing was saved.

        A step that cannot be read is renamed to `STEP.damaged`, told, and the one before it tried.

        Raises:
            ValueError: where there are steps and none can be read.
        """
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._manager.restore(step, args=ocp.args.StandardRestore(like))
            except Exception as error:  # noqa: BLE001: Orbax raises many kinds, for damage and for other shapes alike
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                log.warning("Checkpoint %s cannot be read (%s): the one before it is tried.", self.folder / str(step), reason)
                failure = error
        if steps:
            raise ValueError(
                f"None of the checkpoints {', '.join(map(str, steps))} in {self.folder} can be read: they are damaged, or "
                "belong to another model; delete the folder to start anew."
            ) from failure  # pyright: ignore[reportPossiblyUnboundVariable]
        return None
