"""Checkpoints of a run: saved while the steps go on, read back newest first."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax tells of every file, and of an error many times
        self.folder = folder.absolute()
        self._saving: int | None = None
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep))
        except OSError as error:
            raise ValueError(f"{folder} cannot be made for checkpoints: {error.strerror}.") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._wait()
        except ValueError:
            if kind is None:
                raise
        finally:
            with suppress(Exception):  # it has been told
                self._manager.close()

    def steps(self) -> list[int]:
        """The steps that were saved whole, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any) -> None:
        """Starts to save, and returns once the arrays may be reused. A step that is there already is left.

        Raises:
            ValueError: where this step, or the one before it, cannot be written.
        """
        if step not in self.steps():
            self._wait()
            self._saving = step
            with self._told():
                self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def _wait(self) -> None:
        """Until the last step is whole on disk."""
        with self._told():
            self._manager.wait_until_finished()
        self._saving = None

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises many kinds, TensorStore's longer than a screen
            code = re.search(r"os_error_code='(\d+)'", str(error))
            reason = os.strerror(int(code[1])) if code else _first_line(error)
            stay = [step for step in self.steps() if step != self._saving]
            kept = f"step {stay[-1]} stays" if stay else "none had been saved"
            raise ValueError(f"Step {self._saving} could not be saved in {self.folder} ({reason}); {kept}.") from error

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
