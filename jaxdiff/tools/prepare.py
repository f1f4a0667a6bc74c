"""Makes a data set ready for training: `python -m jaxdiff.tools.prepare emoji`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tensorflow_datasets as tfds
import tyro

from jaxdiff.cli import exit_code


@dataclass(frozen=True)
class Args:
    """Downloads a data set and writes it as ArrayRecord files, which training reads."""

    name: Annotated[str, tyro.conf.Positional] = "emoji"
    """`emoji`, or any TFDS data set's name."""
    data_dir: Path = Path("data")
    """Where to write it; the `DataConfig.root` of a run."""
    downloads: Path | None = None
    """Where to keep what is downloaded, and to look for it first; DATA_DIR/downloads where not given."""
    size: Literal[64, 128] = 64
    """emoji only: pixels along each side."""


def main(args: Args) -> None:
    """Prepares the data set and says what came out."""
    builder = _builder(args)
    tfds.disable_progress_bar()  # the builders show their own
    builder.download_and_prepare(download_dir=args.downloads or args.data_dir / "downloads", file_format="array_record")
    splits = ", ".join(f"{name} {split.num_examples}" for name, split in builder.info.splits.items())
    print(f"{builder.data_dir}: {splits}.")


def _builder(args: Args) -> tfds.core.DatasetBuilder:
    if args.name != "emoji":
        try:
            return tfds.builder(args.name, data_dir=args.data_dir)
        except (ValueError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{args.name!r} is neither emoji nor a data set that TFDS can make here: {reason}"
            ) from error
    try:
        from jaxdiff.data.emoji import Emoji
    except ImportError as error:
        raise ValueError(f"Drawing the emoji needs {error.name}: `pip install -e '.[data]'`.") from error
    return Emoji(config=f"{args.size}px", data_dir=args.data_dir)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(tyro.cli(Args))))
