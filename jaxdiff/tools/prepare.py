"""Makes a data set ready for training: `python -m jaxdiff.tools.prepare emoji`, or `... collect SOURCE --name NAME`."""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tensorflow_datasets as tfds
import tyro

from jaxdiff.runtime.cli import exit_code


@dataclass(frozen=True)
class Args:
    """Downloads a data set and writes it as ArrayRecord files, which training reads.

    `prepare collect --help` tells how collections of captioned images are prepared.
    """

    name: Annotated[str, tyro.conf.Positional] = "emoji"
    """`emoji`, or any TFDS data set's name; or `features`, the network that `evaluate concepts` and `images` look
    through; or `lpips`, the networks of the perceptual distance."""
    data_dir: Path = Path("data")
    """Where to write it; the `DataConfig.root` of a run."""
    downloads: Path | None = None
    """Where to keep what is downloaded, and to look for it first; DATA_DIR/downloads where not given."""
    size: Literal[64, 128] = 64
    """emoji only: pixels along each side."""


@dataclass(frozen=True)
class CollectArgs:
    """Turns a collection of captioned images into shards that training reads, without what is not fit for it.

    A killed command goes on where it was, by the same command. Options after `--` are Apache Beam's, which runs it
    here or, with `-- --runner=...`, on a cluster whose workers have jaxdiff and see the same files.
    """

    source: Annotated[str, tyro.conf.Positional]
    """A folder (metadata.jsonl or metadata.csv with file_name and a caption, or a .txt or .caption beside each image),
    WebDataset tars (.tar, .tar.gz) or parquet files: a file, a folder of them, or a pattern in quotes; or tfds:NAME."""
    name: str
    """DATA_DIR/NAME is written; train with --data.source prepared --data.root DATA_DIR/NAME."""
    data_dir: Path = Path("data")
    """Where to write it, and where TFDS sets are."""
    split: str = "train"
    """TFDS only."""
    image_field: str = ""
    """Parquet and TFDS: the field of the images' bytes; empty takes `image`, or what else is usual. Tars: what follows
    the first dot in the images' names, such as depth.png; empty takes the only one without another dot."""
    text_field: str = ""
    """The field of the captions (in tars also what follows the first dot in their names); empty takes `caption`,
    `text`, or what else is usual."""
    min_side: int = 1
    """Smaller images are left out: pixels along the shorter side."""
    max_aspect: float = 16.0
    """Images whose longer side is more times the shorter one are left out."""
    min_caption: int = 1
    """Characters; images with shorter captions are left out."""
    max_caption: int = 2000
    """Characters; images with longer captions are left out."""
    near: int = -1
    """Images are left out whose perceptual hash differs in at most this many of 64 bits from an earlier one's, from
    0 to 15; -1 leaves out only those of equal pixels. Above 3 it is slow where there are millions; small and plain
    drawings are alike without being the same, so look at the report."""
    max_side: int = 0
    """Larger images are made smaller, to this many pixels along the longer side; 0 does not."""
    encode: Literal["keep", "webp", "jpeg", "png"] = "keep"
    """How images are stored; `keep` leaves the files as they are, and those made smaller become WebP."""
    quality: int = 90
    """Of WebP and JPEG, 1 to 100."""
    max_bad_share: float = 0.01
    """More broken or harmful records than this share stop the command."""
    unit_records: int = 5000
    """Records of a folder, parquet file or TFDS set in a shard; tars become a shard each."""
    workers: int = 1
    """Processes on this machine; a cluster has options of its own."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("min_side", 1, None),
            ("max_aspect", 1, None),
            ("min_caption", 1, None),
            ("max_caption", self.min_caption, None),
            ("near", -1, 15),
            ("max_side", 0, None),
            ("quality", 1, 100),
            ("max_bad_share", 0, 1),
            ("unit_records", 1, None),
            ("workers", 1, None),
        ):
            value = getattr(self, name)
            if not low <= value <= (value if high is None else high):
                upper = "" if high is None else f" and at most {high}"
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {low}{upper}.")
        if self.name != Path(self.name).name or self.name in ("", ".", ".."):
            raise ValueError(f"--name is {self.name!r}; it names a folder in DATA_DIR, and is no path.")


def main(args: Args) -> None:
    """Prepares the data set and says what came out."""
    downloads = args.downloads or args.data_dir / "downloads"
    if args.name == "features":
        from jaxdiff.evaluation.features import fetch

        print(f"{fetch(downloads, args.data_dir / 'features')}: EfficientNet-Lite0.")
        return
    if args.name == "lpips":
        from jaxdiff.evaluation import lpips

        for backbone, path in lpips.fetch(downloads, args.data_dir / "features").items():
            print(f"{path}: LPIPS ({backbone}).")
        return
    builder = _builder(args)
    tfds.disable_progress_bar()  # the builders show their own
    builder.download_and_prepare(download_dir=downloads, file_format="array_record")
    splits = ", ".join(f"{name} {split.num_examples}" for name, split in builder.info.splits.items())
    print(f"{builder.data_dir}: {splits}.")


def collect(args: CollectArgs, options: list[str]) -> None:
    """Prepares a collection and says what was left out and why; `options` are Apache Beam's."""
    logging.disable(logging.ERROR)  # Beam's, about the clouds that it does not find, and what is raised anyway
    try:
        from jaxdiff.data.collect import Filters, collect
    except ImportError as error:
        raise ValueError(f"Preparing collections needs {error.name}: `pip install -e '.[beam]'`.") from error
    from jaxdiff.data.readers import Collection

    began = time.perf_counter()
    collection = Collection(
        args.source, args.split, args.image_field, args.text_field, str(args.data_dir), args.unit_records
    )
    filters = Filters(
        args.min_side,
        args.max_aspect,
        args.min_caption,
        args.max_caption,
        args.near,
        args.max_side,
        args.encode,
        args.quality,
    )
    if args.workers > 1:
        options = [f"--direct_num_workers={args.workers}", "--direct_running_mode=multi_processing", *options]
    folder = args.data_dir / args.name
    report = collect(collection, filters, folder, max_bad_share=args.max_bad_share, options=options)
    seconds = time.perf_counter() - began
    print(report.table())
    print(f"{folder}: {report.kept} images; {seconds:.0f} s, {report.read / seconds:.0f} images/s. See report.json.")


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


def command(argv: list[str]) -> None:
    """The command line."""
    if argv[:1] != ["collect"]:
        return main(tyro.cli(Args, args=argv))
    end = argv.index("--") if "--" in argv else len(argv)
    args = tyro.cli(CollectArgs, args=argv[1:end], prog="prepare collect")
    return collect(args, argv[end + 1 :])


if __name__ == "__main__":
    sys.exit(exit_code(lambda: command(sys.argv[1:])))
