"""An average of any width, after the run: `python -m jaxdiff.tools.ema RUN --width 0.075 --out DIR`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from jaxdiff.config import TrainConfig, VAETask, from_dict, load_json
from jaxdiff.io.checkpoint import read_part
from jaxdiff.io.folder import check_target, read_network, write_network
from jaxdiff.model import read_model
from jaxdiff.runtime.cli import exit_code
from jaxdiff.training.ema import Snapshot, combine, posthoc
from jaxdiff.training.state import merge
from jaxdiff.types import Params


@dataclass(frozen=True)
class Args:
    """Makes an average of another width than the run tracked, out of its checkpoints (Karras et al. 2024, EDM2).

    The run must have tracked power profiles (`--ema.profile power`); the more checkpoints it kept (`--keep_every`), the
    nearer the result is to the average that would have been tracked.
    """

    run: tyro.conf.Positional[Path]
    """The run directory."""
    width: float
    """Standard deviation of the wanted profile, as a share of the run: 0.02 is short, 0.2 long."""
    out: Path
    """A new folder for the model: all that the run exported, with these weights."""
    step: int = 0
    """Where the profile ends; 0 is the last checkpoint."""


def main(args: Args) -> None:
    """Reads, combines, writes."""
    config = from_dict(TrainConfig, load_json(args.run / "config.json"), str(args.run / "config.json"))
    if config.ema.profile != "power":
        raise ValueError(f"{args.run} tracked no power profiles; train with --ema.profile power.")
    export = args.run / "export"
    if args.out.resolve() == export.resolve() or export.resolve() in args.out.resolve().parents:
        raise ValueError(f"--out {args.out} is what the run exports, and replaces at its next evaluation: name another "
                         "folder.")  # fmt: skip
    check_target(args.out, "vae" if isinstance(config.task, VAETask) else None)
    folder = args.run / "checkpoints"
    steps = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
    if not steps:
        raise ValueError(f"{folder} holds no checkpoints.")
    if not 0 <= args.step <= steps[-1]:
        raise ValueError(f"--step {args.step}: it must be from 1 to {steps[-1]}, the last that is stored, or 0 for it.")
    widths = config.ema.widths
    snapshots = [Snapshot(step, width) for step in steps for width in widths]
    shares = posthoc(snapshots, args.width, args.step or steps[-1])

    def averages() -> Iterator[Params]:
        for step in tqdm(steps, unit=" checkpoints"):
            stored = read_part(folder, step, "ema")
            yield from (stored[f"{width:.3f}"] for width in widths)

    made = combine(averages(), shares)
    if isinstance(config.task, VAETask):
        vae, params = read_network(export, "vae")
        write_network(args.out, "vae", vae, merge(params, {name: made[name] for name in params if name in made}))
    else:
        model = read_model(export)
        folders = model.family.FOLDERS
        params = merge({folders[role]: tree for role, tree in model.params.items()}, made)
        model.with_params({role: params[name] for role, name in folders.items()}).save(args.out)
    print(f"{args.out}: width {args.width:g} at step {args.step or steps[-1]}, of {len(snapshots)} stored averages.")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(tyro.cli(Args))))
