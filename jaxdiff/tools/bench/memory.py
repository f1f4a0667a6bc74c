"""Where the memory of a drawing process goes, phase after phase: `python -m jaxdiff.tools.bench sample --memory`.

The package logs the end of each phase (reading, compiling, putting weights on devices, drawing) to `jaxdiff`'s logger;
here the process is measured at each of them.
"""

import logging
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import jaxdiff
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.generation.weights import Memory
from jaxdiff.model import Model, Network
from jaxdiff.runtime.memory import forget_peak, resident_bytes
from jaxdiff.runtime.programs import give_back_memory
from jaxdiff.tools.bench.models import ModelSizes, weights

PROMPT = "a red apple"


class Phase(NamedTuple):
    """What the process held after a phase, and at most during it, in bytes."""

    name: str
    after: int
    most: int


class Phases(logging.Handler):
    """Measures the process at each line that is logged."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: list[Phase] = []
        give_back_memory()
        forget_peak()

    def emit(self, record: logging.LogRecord) -> None:
        """Ends a phase."""
        self.add(record.getMessage())

    def add(self, name: str) -> None:
        """Ends a phase of this name.

        Raises:
            ValueError: where the system does not count a process's memory.
        """
        now, most = resident_bytes(), resident_bytes("VmHWM")
        if now is None or most is None:
            raise ValueError("--memory needs Linux, which counts what a process holds; leave it out.")
        self.found.append(Phase(name, now, most))
        forget_peak()


def measure(
    model: ModelSizes, size: int, batch: int, steps: int, guidance: float, dtype: str | None, memory: Memory
) -> list[Phase]:
    """The phases of drawing a batch for the first time.

    Args:
        model: its folder is read; random weights are written to one first.
        size: pixels along each side.
        batch: images.
        steps: of the sampler.
        guidance: scale of classifier-free guidance.
        dtype: as `jaxdiff.load` has it.
        memory: as `jaxdiff.load` has it.
    """
    with nullcontext(model.folder) if model.folder else tempfile.TemporaryDirectory() as folder:
        if model.folder is None:
            _write_random(model, Path(folder))
        phases, logger = Phases(), logging.getLogger("jaxdiff")
        phases.add("started")
        before = logger.level
        logger.setLevel(logging.DEBUG)
        logger.addHandler(phases)
        try:
            pipe = jaxdiff.load(folder, dtype, memory=memory)
            phases.add("read and checked")
            pipe([PROMPT] * batch, steps=steps, guidance=guidance, size=(size, size))
            phases.add("drawn")
        finally:
            logger.removeHandler(phases)
            logger.setLevel(before)
    return phases.found


def report(phases: list[Phase]) -> str:
    """A table of phases, and the most of all."""
    rows = [f"{'':52}  {'holds':>9}  {'at most':>9}"]
    rows += [f"{name:52}  {after / 1e9:6.2f} GB  {most / 1e9:6.2f} GB" for name, after, most in phases]
    return "\n".join([*rows, f"at most {max(phase.most for phase in phases) / 1e9:.2f} GB"])


def _write_random(model: ModelSizes, folder: Path) -> None:
    parts = {"denoiser": "unet", "vae": "vae", "text_encoder": "text_encoder"}
    params = weights(model, *parts.values())
    networks = {role: Network(getattr(model, part), params[part]) for role, part in parts.items()}
    length = model.text_encoder.max_position_embeddings
    Model(networks, model.scheduler, Tokenizer.load(model.tokenizer, length)).save(folder)
