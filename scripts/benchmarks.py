"""Measures jaxdiff against diffusers and writes the table of docs/benchmarks.md; needs the parity extra.

`--short` takes minutes in place of an hour and writes no table; it is for CI. Both fail where the two give different
results, and never for a time.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxdiff.runtime.cli import exit_code
from jaxdiff.tools.bench.result import duration, read, scaled

BEGIN, END = "<!-- benchmarks: made by scripts/benchmarks.py -->", "<!-- end of benchmarks -->"

# What the table calls it, and the words after `python -m jaxdiff.tools.bench`.
FULL = {
    "unet": ("SD1.5 UNet, 64x64 latents", "unet --model sd15 --runs 5"),
    "vae": ("SD1.5 VAE, decoding to 512x512", "vae --model sd15 --runs 3"),
    "small": ("UNet of 37 M parameters, 32x32 latents, batch 8", "unet --model small --batch 8 --runs 9"),
    "train": ("its training step, AdamW", "train --model small --batch 8 --runs 5"),
    "sample": ("SD1.5, prompt to 512x512, 20 steps", "sample --model sd15 --steps 20 --runs 3 --warmup 0"),
    "embedded": ("embedded model, prompt to 64x64, 30 steps", "sample --model emoji --steps 30 --runs 9"),
}
SHORT = {
    "unet": ("UNet", "unet --model emoji --size 32 --batch 2 --runs 2"),
    "vae": ("VAE, decoder", "vae --model emoji --size 32 --batch 2 --runs 2"),
    "encode": ("VAE, encoder", "vae --model emoji --encode --size 32 --batch 2 --runs 2"),
    "text": ("text encoder", "text --model emoji --batch 2 --runs 2"),
    "train": ("training step", "train --model emoji --size 32 --batch 2 --runs 2"),
    "sample": ("sampling", "sample --model emoji --size 32 --batch 2 --steps 3 --runs 2"),
}
# How far the results may be apart: what of them is compared, `jaxdiff.tools.bench.versus` says.
TOLERANCES = {"float32": {"sample": 0.5, "train": 1e-3, "": 1e-4}, "bfloat16": {"sample": 8.0, "": 5e-2}}


@dataclass(frozen=True)
class Args:
    """Measures each row in a process of its own, keeps the figures as JSON, checks them, and rewrites the table."""

    rows: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Which to measure; the others' figures are those of OUT. Without any, all."""
    short: bool = False
    """Tiny sizes, no table."""
    out: Path = Path("build/benchmarks")
    """The folder for the figures."""
    readme: Path = Path("docs/benchmarks.md")
    """The file whose table is rewritten, between its two marks."""


def main(args: Args) -> int:
    """Returns 1 where a result is wrong."""
    rows = SHORT if args.short else FULL
    if unknown := set(args.rows) - set(rows):
        raise ValueError(f"There is no row {', '.join(sorted(unknown))}; there are {', '.join(rows)}.")
    if not args.short:
        marked(args.readme)  # finds out before the work, not after it
    wrong = []
    for name in args.rows or rows:
        measure(rows[name][1], args.out / f"{name}.json")
        wrong += differing(name, read(args.out / f"{name}.json"))
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    if not args.short and not wrong:
        figures = {name: read(file) for name in rows if (file := args.out / f"{name}.json").exists()}
        before, after = marked(args.readme)
        args.readme.write_text(f"{before}{BEGIN}\n{table(figures)}\n{END}{after}", encoding="utf-8")
        print(f"{args.readme}: the table has {len(figures)} rows.")
    return 1 if wrong else 0


def measure(words: str, out: Path) -> None:
    """Runs one benchmark."""
    command = [sys.executable, "-m", "jaxdiff.tools.bench", *words.split(), "--vs", "diffusers", "--json", str(out)]
    print(f"\n$ python {' '.join(command[1:])}", flush=True)
    if code := subprocess.run(command, check=False).returncode:
        raise ValueError(f"The command above ended with {code}.")


def differing(name: str, figures: dict[str, Any]) -> list[str]:
    """A line for each result that is not diffusers'."""
    lines = []
    for result in figures["results"]:
        tolerances = TOLERANCES[result["dtype"]]
        most = tolerances.get(result["target"], tolerances[""])
        for rival in result["versus"]:
            if not rival["error"] <= most:  # NaN is wrong, too
                lines.append(f"{name}: {rival['error_of']} {rival['error']:.3g}, more than {most}")
    return lines


def marked(readme: Path) -> tuple[str, str]:
    """What comes before the table, and after it."""
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{readme} cannot be read: {error.strerror}.") from error
    if not (found := re.search(f"{re.escape(BEGIN)}.*{re.escape(END)}", text, re.DOTALL)):
        raise ValueError(f"{readme} has no place for the table: two lines, {BEGIN!r} and {END!r}.")
    return text[: found.start()], text[found.end() :]


def table(figures: dict[str, dict[str, Any]]) -> str:
    """Markdown: what ran where, and a row a benchmark."""
    machines = dict.fromkeys(caption(values) for values in figures.values())
    columns = ("what", "jaxdiff", "diffusers", "ours / theirs", "to make", "memory at most", "diffusers'", "to repeat")
    lines = [*machines, "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for name, values in figures.items():
        what, words = FULL[name]
        result = values["results"][0]
        (rival,) = result["versus"]
        ratio = rival["ratio"]
        spread = f" ({ratio['q1']:.2f} to {ratio['q3']:.2f})" if len(ratio["runs"]) > 1 else ""
        cells = [
            what,
            duration(result["seconds"]["median"]),
            duration(rival["seconds"]["median"]),
            f"**{ratio['median']:.2f}**{spread}",
            duration(sum(result[part] for part in ("trace", "lower", "compile"))),
            scaled(result["peak_memory"], "B"),
            scaled(peak, "B") if (peak := rival.get("peak_memory")) else "",
            f"`{words}`",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def caption(figures: dict[str, Any]) -> str:
    """Machine, versions and day."""
    machine, (result, *_) = figures["machine"], figures["results"]
    cores = f", {machine['cores']} cores" if machine.get("cores") else ""
    against = result["versus"][0]["against"]
    return (f"{figures['date']}, {machine['device']}{cores}, {result['dtype']}: jaxdiff {machine['jaxdiff']} on jax "
            f"{machine['jax']} against {against}. Times are medians; ratios are of pairs of runs one after the other, "
            "with quartiles; `python -m jaxdiff.tools.bench` comes before each command, `--vs diffusers` "
            "after it.")  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(tyro.cli(Args))))
