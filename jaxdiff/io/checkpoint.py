"""Checkpoints of a run: saved while the steps go on, verified when they are read back, newest first.

A step is a folder that Orbax writes as a whole: `state`, and `manifest` with dtype, shape and checksum of each leaf.
Orbax itself casts another dtype silently and does not notice a flipped bit; the manifest is there to notice both.
"""

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from jax.experimental import multihost_utils

from jaxdiff.io.fingerprint import fingerprints
from jaxdiff.io.storage import is_remote
from jaxdiff.runtime.mesh import path_name

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of the manifest."""


class Checkpoints:
    """The steps under one folder, of which the newest `keep` stay, and every `keep_every`-th for ever (0: none).

    The folder may be a bucket's, as `gs://bucket/run`. Several processes must see the same one and make the same calls.
    Use it as a context manager: leaving it waits until the last save is whole on disk.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3, keep_every: int = 0) -> None:
        absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax tells of every file, and of an error many times
        _hush_orbax()
        path = epath.Path(folder)
        self.folder = path if is_remote(path) else path.absolute()
        self._saving: int | None = None
        self._make_folder()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            lightweight_initialize=True,  # or a damaged time stamp would be an error
            single_host_load_and_broadcast=True,  # so that all processes see the same steps
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def _make_folder(self) -> None:
        """Makes the folder, and removes half-written steps from it.

        Raises:
            ValueError: in all processes, where process 0 cannot make it, or another does not see it.
        """
        several, first = jax.process_count() > 1, jax.process_index() == 0
        mark = self.folder / "shared-by-all-processes"
        problem = ""
        try:
            if first:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_half_written()
                if several:
                    mark.touch()
        except OSError as error:
            problem = f"{self.folder} cannot be made for checkpoints: {error.strerror}."
        problem = _first_of_all(problem)
        if several and not problem:
            missing = "" if mark.exists() else f"process {jax.process_index()} does not see what process 0 writes there"
            missing = _first_of_all(missing)
            if first:
                mark.unlink()
            if missing:
                problem = f"{self.folder} is not shared: {missing}. Choose a folder on a shared disk, or a bucket."
        if problem:
            raise ValueError(problem)

    def _remove_half_written(self) -> None:
        for name in sorted(ocp.path.step.tmp_checkpoints(self.folder)):
            if name[0].isdigit():  # where no folder can be renamed Orbax takes all for half written that it did not end
                logger.warning("The save of step %s in %s was cut off; what there is of it is removed.",
                               name.split(".")[0], self.folder)  # fmt: skip
                (self.folder / name).rmtree()

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
        return sorted(int(step) for step in self._manager.all_steps())  # NumPy's, where they come from process 0

    def save(self, step: int, state: Any) -> None:
        """Starts to save, and returns once the arrays may be reused. A step that is there already is left.

        Raises:
            ValueError: where `state` is not finite everywhere, of which nothing is written; where this step, or the one
                before it, cannot be written.
        """
        if step in self.steps():
            return
        sums, bad = fingerprints(state)
        if bad:
            kept = f"step {self.steps()[-1]} stays" if self.steps() else "none had been saved"
            raise ValueError(f"Step {step} is not saved in {self.folder}, since not all of {_listed(bad)} is finite; "
                             f"{kept}.")  # fmt: skip
        self._wait()
        self._saving = step
        manifest = _manifest(state, sums)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), manifest=ocp.args.JsonSave(manifest))
        with self._told():
            self._manager.save(step, args=args, force=True)

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
            number = int(code[1]) if code else getattr(error, "errno", None)
            reason = os.strerror(number) if number else _first_line(error)
            stay = [step for step in self.steps() if step != self._saving]
            kept = f"step {stay[-1]} stays" if stay else "none had been saved"
            raise ValueError(f"Step {self._saving} could not be saved in {self.folder} ({reason}); {kept}.") from error

    def restore(self, like: Any) -> Any:
        """The newest state that is as it was saved, with the shardings of `like`; None where none was saved.

        A step that cannot be read, or has other checksums than when it was saved, is left for the one before it; where
        that is good, the other is renamed `damaged-STEP`. `like` has arrays, or `jax.ShapeDtypeStruct`s with shardings.

        Raises:
            ValueError: where there are steps, and none is good; where one is good, but its leaves have other names,
                shapes or dtypes than those of `like`.
        """
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_sharding(a)), like)
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            state, damage = self._read(step, like)
            if not damage:
                if damaged:
                    self._put_aside(damaged, step)
                return state
            damaged[step] = damage
        if damaged:
            told = "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())
            raise ValueError(
                f"No checkpoint in {self.folder} can be read ({told}). Move the folder away to start anew."
            )
        return None

    def _read(self, step: int, like: Any) -> tuple[Any, str]:
        """The state of a step, or what is damaged in it, on which all processes agree."""
        folder = self.folder / str(step)
        state, leaves, damage, difference = None, {}, "", ""
        try:
            leaves = _read_manifest(folder)
            difference = _difference(leaves, like)
            if not difference:
                # Not by way of the manager, where those that can read would wait for one that cannot.
                handler = ocp.StandardCheckpointHandler()
                state = handler.restore(folder / "state", args=ocp.args.StandardRestore(like))
        except Exception as error:  # Orbax raises many kinds
            damage = _first_line(error)
        damage = _first_of_all(damage)
        if damage:
            return None, damage
        if difference:
            raise ValueError(f"Step {step} in {self.folder} is of another model or optimiser: {difference}. "
                             "Take the change back, or choose another folder.")  # fmt: skip
        sums, _ = fingerprints(state)
        wrong = [name for name in sums if sums[name] != leaves[name]["sum"]]
        return (None, f"other bits than were saved in {_listed(wrong)}") if wrong else (state, "")

    def _put_aside(self, damaged: dict[int, str], good: int) -> None:
        problem = ""
        if jax.process_index() == 0:
            try:
                for step, damage in damaged.items():
                    kept = self.folder / f"damaged-{step}"
                    while kept.exists():  # another time, the same step
                        kept = kept.with_name(f"{kept.name}-again")
                    (self.folder / str(step)).rename(kept)
                    told = "The checkpoint of step %d cannot be read (%s) and is now %s; going on from step %d."
                    logger.warning(told, step, damage, kept, good)
            except OSError as error:
                problem = f"A damaged checkpoint in {self.folder} cannot be renamed: {_first_line(error)}."
        if problem := _first_of_all(problem):
            raise ValueError(problem)
        self._manager.reload()

    def save_frozen(self, tree: Any) -> None:
        """Stores, once for all steps, what is not trained; returns when it is whole on disk.

        Raises:
            ValueError: where something else is stored already, or as `save` does.
        """
        if not jax.tree.leaves(tree):
            return
        with Checkpoints(self.folder / "frozen") as frozen:
            if not frozen.steps():
                frozen.save(0, tree)
            elif problem := _first_of_all(_change(frozen.folder / "0", tree)):
                raise ValueError(f"{frozen.folder} holds what is not trained in this run, but {problem}.")

    def restore_frozen(self, like: Any) -> Any:
        """What `save_frozen` stored, verified, with the shardings of `like`; None where nothing was.

        Raises:
            ValueError: as `restore` does.
        """
        if not jax.tree.leaves(like):
            return like
        with Checkpoints(self.folder / "frozen") as frozen:
            return frozen.restore(like)


def read_part(folder: str | os.PathLike[str], step: int, name: str) -> Any:
    """One field of a stored state, such as "ema", as NumPy arrays, without the rest being read; verified.

    Raises:
        ValueError: where it is damaged or not there.
    """
    path = epath.Path(folder) / str(step)
    handler = ocp.PyTreeCheckpointHandler()
    try:
        leaves = _read_manifest(path)
        part = {name: handler.metadata(path / "state").tree[name]}
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part)
        args = ocp.args.PyTreeRestore(item=part, restore_args=numpy, partial_restore=True)
        part = handler.restore(path / "state", args=args)
    except Exception as error:  # Orbax raises many kinds
        raise ValueError(f"{path} cannot be read ({_first_line(error)}).") from error
    sums, _ = fingerprints(part)
    if wrong := [name for name in sums if sums[name] != leaves[name]["sum"]]:
        raise ValueError(f"{path} has other bits than were saved in {_listed(wrong)}.")
    return part[name]


def _manifest(tree: Any, sums: dict[str, str]) -> dict[str, Any]:
    leaves = {
        path_name(path): {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    leaves = {name: leaf | {"sum": sums[name]} for name, leaf in leaves.items()}
    return {"format": FORMAT, "leaves": leaves, "sha256": _sha256(leaves)}


def _sha256(leaves: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: epath.Path) -> dict[str, Any]:
    """dtype, shape and sum of every leaf of a step, by path.

    Raises:
        ValueError: where there is none, or it is damaged itself.
    """
    if not (folder / "manifest").exists():
        raise ValueError("it has no manifest; either it lost it, or it was saved by a version that wrote none")
    manifest = ocp.JsonCheckpointHandler().restore(folder / "manifest", args=ocp.args.JsonRestore())
    if manifest["sha256"] != _sha256(manifest["leaves"]):
        raise ValueError("other bits than were saved in its manifest")
    if manifest["format"] != FORMAT:
        raise ValueError(f"its manifest has format {manifest['format']}, and this version reads {FORMAT}")
    return manifest["leaves"]


def _difference(leaves: dict[str, Any], like: Any) -> str:
    """The first difference in name, dtype or shape between the leaves of a manifest and those of a tree; "" if none."""
    there = {name: f"{leaf['dtype']} {leaf['shape']}" for name, leaf in leaves.items()}
    here = {path_name(p): f"{a.dtype} {list(a.shape)}" for p, a in jax.tree_util.tree_leaves_with_path(like)}
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            return f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
    return ""


def _change(folder: epath.Path, tree: Any) -> str:
    """What is different in `tree` from what was saved in `folder`, and what to do; "" if nothing is."""
    sums, _ = fingerprints(tree)
    try:
        leaves = _read_manifest(folder)
    except Exception as error:
        return f"{_first_line(error)}: move it away, and it will be stored anew"
    changed = [name for name in sums if name not in leaves or sums[name] != leaves[name]["sum"]]
    difference = _difference(leaves, tree) or (f"{_listed(changed)} had other values there" if changed else "")
    return f"{difference}: take the change back, or choose another folder" if difference else ""


def _sharding(leaf: Any) -> Any:
    return getattr(leaf, "sharding", None)


@cache
def _hush_orbax() -> None:
    """Keeps Python from telling of reads and writes that Orbax leaves behind after an error, which it raises itself."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    tell = sys.unraisablehook

    def hook(left: Any) -> None:
        code = getattr(left.object, "cr_code", None)
        if str(left.exc_value) != "Event loop is closed" and not (code and "orbax" in code.co_filename):
            tell(left)

    sys.unraisablehook = hook


def _first_of_all(problem: str) -> str:
    """The first process's problem that has one, in all processes, so that they go on together; "" if none has.

    All come here, even one that failed: it must not leave the others waiting.
    """
    if jax.process_count() == 1:
        return problem
    told = np.frombuffer(problem.encode()[:256].ljust(256, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(told))
    return next(filter(None, (row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows)), "")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
