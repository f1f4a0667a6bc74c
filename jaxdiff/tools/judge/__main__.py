"""People judge models: `python -m jaxdiff.tools.judge make` writes a page of pairs, `count` reads what they said."""

import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from jaxdiff.runtime.cli import exit_code
from jaxdiff.tools.judge.answers import one_each, read_answers, read_key
from jaxdiff.tools.judge.report import as_text, study_record
from jaxdiff.tools.judge.study import FOLDER, KEY, make_study


def make(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    prompts: Path,
    out: Path,
    pairs: int | None = None,
    check_every: int = 10,
    repeat_every: int = 10,
    seed: int = 0,
    format: str = "png",
) -> int:
    """Writes OUT/page, one static page for raters, and OUT/key.json, which says what they must not know.

    Args:
        folders: of two models or more, what `sample.py --from-file PROMPTS --out FOLDER` wrote.
        prompts: that file.
        out: a new folder.
        pairs: at most so many, evenly of all two models; without it, every two images of a prompt are compared.
        check_every: to so many pairs comes an attention check, an image against noise; 0 for none.
        repeat_every: of so many pairs shown, one is shown again with its sides swapped; 0 for none.
        seed: of what is left to chance.
        format: of the page's images: png, jpeg or webp.
    """
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError("A folder is given twice; a study compares different ones.")
    short = [path.name for path in paths]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    made = make_study(dict(zip(names, folders, strict=True)), prompts, out, pairs=pairs, check_every=check_every,
                      repeat_every=repeat_every, seed=seed, format=format)  # fmt: skip
    if made.no_image:
        print(f"warning: No model drew lines {', '.join(map(str, made.no_image))}; they are left out.", file=sys.stderr)
    if len(made.sizes) > 1:
        told = ", ".join(f"{width}x{height}" for width, height in made.sizes)
        print(f"warning: Images are {told}; raters may know models by their size.", file=sys.stderr)
    if len(made.formats) > 1:
        print(f"warning: Images came from {', '.join(made.formats)}; raters may know models by what a format loses.",
              file=sys.stderr)  # fmt: skip
    print(f"{made.pairs} pairs of {len(names)} models and {made.checks} attention checks.")
    print(f"Raters get {out / FOLDER}; keep {out / KEY} from them.")
    return 0


def count(
    key: Annotated[Path, tyro.conf.Positional],
    answers: Annotated[tuple[Path, ...], tyro.conf.Positional],
    least: float = 0.75,
    resamples: int = 1000,
    seed: int = 0,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Counts answers: sign tests, strengths with intervals, agreement, and how many answers are still needed.

    A file that is damaged, or of another study, is named and left out; the exit code is then 2.

    Args:
        key: the key.json of the study.
        answers: the files that raters handed in.
        least: the share of attention checks that a rater must have right, or all of the rater's answers are left out.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        as_json: prints JSON in place of tables.
    """
    study = read_key(key)
    raters, bad = [], 0
    for path in answers:
        try:
            raters.append((path, read_answers(path, study)))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            bad += 1
    if not raters and bad:
        return 2
    if not raters:
        raise ValueError("There are no answers to count; give the files that raters handed in.")
    each, left_out = one_each(raters)
    for sentence in left_out:
        print(f"warning: {sentence}", file=sys.stderr)
    record = study_record(each, study, least, resamples, seed)
    print(json.dumps(record, indent=2) if as_json else as_text(record))
    return 2 if bad else 0


def cli(argv: list[str] | None = None) -> int:
    """The command line; errors are a sentence and exit code 2."""
    commands = {"make": make, "count": count}
    return exit_code(
        lambda: tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog="judge", description=__doc__),
        "fewer --resamples",
    )


if __name__ == "__main__":
    sys.exit(cli())
