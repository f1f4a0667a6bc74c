"""A collection to shards that training reads: read, filtered, without duplicates, as two Apache Beam pipelines.

The first reads each unit of the collection (see `readers`), checks every image, and writes what passes as a part. The
second finds duplicates over all parts, and writes each part without them as a shard. Parts and shards are whole files
that depend on the collection and the settings alone, and one that is there is not made again: however often a run is
killed, the next one goes on, and the end is the same. All workers must see the same file system.
"""

import io
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from PIL import Image
from tqdm import tqdm

from jaxdiff.config import load_json
from jaxdiff.data.duplicates import bands, first_alike, look, pixel_digest
from jaxdiff.data.files import new_records, open_records
from jaxdiff.data.images import decode
from jaxdiff.data.prepared import INDEX, REPORT, SIZES, VERSION, Picture
from jaxdiff.data.readers import Bad, Collection, LeftOut, Unit
from jaxdiff.data.record import BadRecord

WORK = "work"
EXAMPLES = 5  # of each reason, in the report


@dataclass(frozen=True)
class Filters:
    """What is kept of a collection, and how; see `jaxdiff.tools.prepare`."""

    min_side: int = 1
    max_aspect: float = 16.0
    min_caption: int = 1
    max_caption: int = 2000
    near: int = -1
    max_side: int = 0
    encode: Literal["keep", "webp", "jpeg", "png"] = "keep"
    quality: int = 90


@dataclass
class Report:
    """What was read, what was kept, and what was dropped for which reason."""

    read: int = 0
    kept: int = 0
    bad: int = 0
    """Of those dropped, what could not be used at all: broken files, and such as are made to do harm."""
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Reason -> how many (`count`), and the first of them (`examples`: unit, place in it, name)."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Kind -> how many files of it there are, such as are neither images nor captions."""

    def drop(self, reason: str, unit: int, place: int, name: str, bad: bool = False) -> None:
        """Counts a record that is left out."""
        self.bad += bad
        entry = self.dropped.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append([unit, place, name])

    @classmethod
    def sum(cls, reports: Iterable["Report"]) -> "Report":
        """All of them together, the same in any order and grouping."""
        out = cls()
        for report in reports:
            out.read, out.kept, out.bad = out.read + report.read, out.kept + report.kept, out.bad + report.bad
            for kind, count in report.left_out.items():
                out.left_out[kind] = out.left_out.get(kind, 0) + count
            for reason, entry in report.dropped.items():
                mine = out.dropped.setdefault(reason, {"count": 0, "examples": []})
                mine["count"] += entry["count"]
                mine["examples"] = sorted(mine["examples"] + entry["examples"])[:EXAMPLES]
        return out

    def table(self) -> str:
        """For a reader: a line a reason, with the names of the first."""
        lines = [f"{self.read:>9} read", f"{self.kept:>9} kept"]
        for reason, entry in sorted(self.dropped.items(), key=lambda item: -item[1]["count"]):
            names = "; ".join(name for _, _, name in entry["examples"][:2])
            lines.append(
                f"{entry['count']:>9} dropped: {reason} ({names if len(names) < 120 else names[:120] + '...'})"
            )
        lines += [f"{count:>9} left out: {kind}" for kind, count in sorted(self.left_out.items())]
        return "\n".join(lines)


@dataclass(frozen=True)
class Plan:
    """What every worker knows."""

    collection: Collection
    filters: Filters
    units: tuple[Unit, ...]
    folder: str

    def part(self, unit: int) -> Path:
        """The images of a unit that pass the filters."""
        return Path(self.folder) / WORK / f"part-{unit:05}.array_record"

    def shard(self, unit: int) -> Path:
        """The part without duplicates."""
        return Path(self.folder) / f"shard-{unit:05}-of-{len(self.units):05}.array_record"

    def account(self, unit: int, stage: str) -> Path:
        """The report of a stage of a unit, written when it is done."""
        return Path(self.folder) / WORK / f"{stage}-{unit:05}.json"

    def rows(self, unit: int) -> Path:
        """What is known of each image in a part: name, width, height, digest, look."""
        return Path(self.folder) / WORK / f"rows-{unit:05}.json"

    def sizes(self, unit: int) -> Path:
        """Width and height of each image in a shard."""
        return Path(self.folder) / WORK / f"sizes-{unit:05}.npy"


def collect(
    collection: Collection, filters: Filters, folder: Path, *, max_bad_share: float, options: list[str]
) -> Report:
    """Makes the prepared collection `folder`, or goes on making it.

    Args:
        collection: what is read.
        filters: what is kept.
        folder: becomes what `PreparedSource` reads.
        max_bad_share: a larger share of records that cannot be used stops it after reading.
        options: Apache Beam's, such as `--runner=...`.

    Raises:
        ValueError: where the collection cannot be read, too much of it is bad, or the folder holds something else.

    """
    settings = {"collection": asdict(collection), "filters": asdict(filters)}
    if (folder / INDEX).exists():
        if load_json(folder / INDEX).get("settings") != settings:
            raise ValueError(f"{folder} holds a collection that was prepared otherwise; choose another --name, or "
                             "delete it.")  # fmt: skip
        return Report(**load_json(folder / REPORT))
    plan = Plan(collection, filters, tuple(collection.units()), str(folder))
    _begin(plan, settings | {"units": [asdict(unit) for unit in plan.units]})

    with _pipeline(options, plan, "part") as pipeline:
        _ = (
            pipeline
            | "Units" >> beam.Create(range(len(plan.units)))
            | "Spread" >> beam.Reshuffle()
            | "Read" >> beam.Map(_write_part, plan)
        )
    read = Report.sum(_report(plan.account(unit, "part")) for unit in range(len(plan.units)))
    if read.bad > max_bad_share * read.read:
        bad = {reason: entry for reason, entry in read.dropped.items() if reason.startswith("bad: ")}
        named = "; ".join(f"{e['count']} times {reason.removeprefix('bad: ')} ({e['examples'][0][2]})"
                          for reason, e in bad.items())  # fmt: skip
        raise ValueError(
            f"{read.bad} of {read.read} records cannot be used, more than --max-bad-share {max_bad_share:g} allows: "
            f"{named}. Mend or remove them and delete {folder}, or raise the share: what was read is not read again."
        )
    if not read.kept:
        raise ValueError(f"Nothing of {collection.source} passes the filters:\n{read.table()}")

    with _pipeline(options, plan, "shard") as pipeline:
        units = pipeline | "Parts" >> beam.Create(range(len(plan.units))) | "Spread" >> beam.Reshuffle()
        looks = units | "Looks" >> beam.FlatMap(_looks, plan)
        exact = (
            looks
            | "By pixels" >> beam.Map(lambda one: (one.digest, one))
            | "Same pixels" >> beam.GroupByKey()
            | "Copies" >> beam.FlatMapTuple(lambda _, group: _copies(group))
        )
        marked = [exact]
        if filters.near >= 0:
            alike = (
                looks
                | "By bands" >> beam.FlatMap(lambda one: [(band, one) for band in bands(one.hash, filters.near)])
                | "Same band" >> beam.GroupByKey()
                | "Alike" >> beam.FlatMapTuple(lambda _, group: _alike(group, filters.near))
            )
            marked.append(alike)
        dropped = marked | "Marked" >> beam.Flatten()
        every = pipeline | "Shards" >> beam.Create([(unit, None) for unit in range(len(plan.units))])
        _ = (
            {"every": every, "dropped": dropped}
            | "By unit" >> beam.CoGroupByKey()
            | "Write" >> beam.MapTuple(lambda unit, groups: _write_shard(unit, groups["dropped"], plan))
        )
    return _finish(plan, settings, read)


@contextmanager
def _pipeline(options: list[str], plan: Plan, stage: str) -> Iterator[beam.Pipeline]:
    """Runs what the block adds to it, and shows how many units have passed the stage.

    Raises:
        ValueError, OSError: that a worker raised.

    """
    try:
        with (
            _quiet("--direct_running_mode=multi_processing" in options) as screen,
            _progress(plan, stage, screen),
            beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner", *options])) as pipeline,
        ):
            yield pipeline
    except (ValueError, OSError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError  # some kinds cannot be made of a text alone
        raise kind(str(error).split(" [while running")[0]) from error
    except RuntimeError as error:  # the traceback of another process, as a text
        told = re.findall(r"^(ValueError|OSError): (.*?)(?: \[while running .*)?$", str(error), re.MULTILINE)
        if not told:
            raise
        raise {"ValueError": ValueError, "OSError": OSError}[told[-1][0]](told[-1][1]) from error
    finally:
        _sweep(plan)  # workers that are stopped with the run leave what they were writing


def _sweep(plan: Plan) -> None:
    """Removes half-written files; nobody writes any more."""
    folder = Path(plan.folder)
    for leftover in (*folder.glob("*.partial"), *(folder / WORK).glob("*.partial")):
        leftover.unlink(missing_ok=True)


@contextmanager
def _quiet(worker_processes: bool) -> Iterator[TextIO]:
    """Beam's own worker processes write a dozen lines each to stderr; the way there stays open to what this gives."""
    with os.fdopen(os.dup(2), "w") as screen, open(os.devnull, "w") as nowhere:
        if worker_processes:
            os.dup2(nowhere.fileno(), 2)
        try:
            yield screen
        finally:
            os.dup2(screen.fileno(), 2)


@contextmanager
def _progress(plan: Plan, stage: str, screen: TextIO) -> Iterator[None]:
    """Counts what is there, since the workers may be on other machines."""
    ended = threading.Event()
    texts = {"part": "Reading", "shard": "Writing"}

    def watch() -> None:
        with tqdm(total=len(plan.units), desc=texts[stage], unit=" shards", file=screen) as bar:
            over = False
            while not over:
                over = ended.wait(0.5)
                bar.update(len(list(Path(plan.folder).glob(f"{WORK}/{stage}-*.json"))) - bar.n)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _begin(plan: Plan, settings: dict[str, Any]) -> None:
    """Makes the work folder, or checks that it is this collection's."""
    folder, file = Path(plan.folder), Path(plan.folder) / WORK / "plan.json"
    if file.exists():
        if load_json(file) != json.loads(json.dumps(settings)):
            raise ValueError(f"{folder} holds a half-made collection of other settings, or of files that have changed: "
                             "delete it, or choose another --name.")  # fmt: skip
    elif folder.exists() and any(path.name != WORK for path in folder.iterdir()):
        raise ValueError(f"{folder} holds something else; choose another --name.")
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_json(file, settings)


def _write_json(path: Path, values: Any, indent: int | None = None) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    partial.write_text(json.dumps(values, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _report(account: Path) -> Report:
    return Report(**load_json(account)["report"])


# The first pipeline


def _write_part(unit: int, plan: Plan) -> None:
    account = plan.account(unit, "part")
    if account.exists():
        return
    report, rows = Report(), []
    with new_records(plan.part(unit)) as writer:
        for place, picture in enumerate(plan.collection.read(plan.units[unit])):
            if isinstance(picture, LeftOut):
                report.left_out = dict(picture.kinds)
                continue
            report.read += 1
            checked = check(picture, plan.filters)
            if isinstance(checked, Bad):
                detail = f" ({checked.detail})" if checked.detail else ""
                bad = checked.reason.startswith("bad: ")
                report.drop(checked.reason, unit, place, _printable(checked.name + detail), bad)
                continue
            picture, image = checked
            writer.write(picture.pack())
            seen = look(image) if plan.filters.near >= 0 else 0
            rows.append([picture.name, picture.width, picture.height, pixel_digest(image), seen])
            report.kept += 1
    _write_json(plan.rows(unit), {"rows": rows})
    _write_json(account, {"report": asdict(report)})


def check(picture: Picture | Bad, filters: Filters) -> tuple[Picture, Image.Image] | Bad:
    """The image as it will be kept, and its pixels; or why it is left out."""
    if isinstance(picture, Bad):
        return replace(picture, reason=f"bad: {picture.reason}")
    picture = replace(picture, name=_printable(picture.name))
    try:
        image = decode(picture.data)
    except BadRecord as error:
        return Bad(picture.name, "bad: its image is broken, or too large", str(error))
    width, height = image.size
    lengths = [len(text) for text in picture.caption.texts]
    for wrong, reason, detail in (
        (min(width, height) < filters.min_side, "it is too small", f"{width}x{height}"),
        (max(width, height) > filters.max_aspect * min(width, height), "it is too oblong", f"{width}x{height}"),
        (not all(lengths), "it has no caption", ""),
        (min(lengths) < filters.min_caption, "its caption is too short", f"{min(lengths)} characters"),
        (max(lengths) > filters.max_caption, "its caption is too long", f"{max(lengths)} characters"),
    ):
        if wrong:
            return Bad(picture.name, reason, detail)
    data = picture.data
    if resized := 0 < filters.max_side < max(width, height):
        image.thumbnail((filters.max_side, filters.max_side), Image.Resampling.LANCZOS, reducing_gap=None)
    if resized or filters.encode != "keep":
        data = _encoded(image, "webp" if filters.encode == "keep" else filters.encode, filters.quality)
    return replace(picture, data=data, width=image.width, height=image.height), image


def _encoded(image: Image.Image, kind: str, quality: int) -> bytes:
    """The image's new file; a transparent one is never a JPEG, which knows no transparency."""
    out = io.BytesIO()
    if kind == "png" or (kind == "jpeg" and image.mode == "RGBA"):
        image.save(out, "PNG")
    else:
        image.save(out, kind, quality=quality)
    return out.getvalue()


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()[:300]


# The second pipeline


@dataclass(frozen=True, order=True)
class Look:
    """A kept image's place in the collection, its name, and what it is compared by."""

    unit: int
    place: int
    name: str
    digest: str
    hash: int


Mark = tuple[int, tuple[int, str, str]]  # the unit of a duplicate, and its place there, the reason, and what it is like


def _looks(unit: int, plan: Plan) -> Iterator[Look]:
    for place, (name, _, _, digest, value) in enumerate(load_json(plan.rows(unit))["rows"]):
        yield Look(unit, place, name, digest, value)


def _copies(group: Iterable[Look]) -> Iterator[Mark]:
    """All but the first of images of the same pixels."""
    first, *others = sorted(group)
    for other in others:
        yield other.unit, (other.place, "duplicate: equal pixels", first.name)


def _alike(group: Iterable[Look], distance: int) -> Iterator[Mark]:
    """Each image that looks like an earlier one, be that kept or not."""
    looks = sorted(group)
    for i, first in enumerate(first_alike([one.hash for one in looks], distance)):
        if first != i and looks[first].digest != looks[i].digest:
            yield looks[i].unit, (looks[i].place, "duplicate: looks alike", looks[first].name)


def _write_shard(unit: int, dropped: Iterable[tuple[int, str, str]], plan: Plan) -> None:
    account = plan.account(unit, "shard")
    if account.exists():
        return
    rows = load_json(plan.rows(unit))["rows"]
    reasons = {place: (reason, like) for place, reason, like in sorted(dropped, reverse=True)}
    report, kept = Report(), [place for place in range(len(rows)) if place not in reasons]
    for place, (reason, like) in sorted(reasons.items()):
        report.drop(reason, unit, place, _printable(f"{rows[place][0]} (as {like})"))
    if kept:
        records = open_records([plan.part(unit)])
        with new_records(plan.shard(unit)) as writer:
            for place in kept:
                writer.write(records[place])
    report.kept = len(kept)
    np.save(plan.sizes(unit), np.array([rows[place][1:3] for place in kept], np.int32).reshape(-1, 2))
    _write_json(account, {"report": asdict(report)})


def _finish(plan: Plan, settings: dict[str, Any], read: Report) -> Report:
    """Writes what belongs to all shards, the index last, and removes what was needed on the way."""
    folder, units = Path(plan.folder), range(len(plan.units))
    reports = [_report(plan.account(unit, "shard")) for unit in units]
    report = Report.sum([read, *reports, Report(left_out=dict(plan.collection.left_out()))])
    report.kept = sum(one.kept for one in reports)
    np.save(folder / WORK / SIZES, np.concatenate([np.load(plan.sizes(unit)) for unit in units]))
    os.replace(folder / WORK / SIZES, folder / SIZES)
    _write_json(folder / REPORT, asdict(report), 1)
    shards = {plan.shard(unit).name: reports[unit].kept for unit in units if reports[unit].kept}
    _write_json(folder / INDEX, {"version": VERSION, "records": report.kept, "shards": shards, "settings": settings}, 1)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return report
