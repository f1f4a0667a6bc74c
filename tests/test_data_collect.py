"""Preparing collections: every kind is read alike, nothing harmful gets through, and a killed command loses nothing."""

import dataclasses
import gzip
import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxdiff.config import DataConfig
from jaxdiff.data import readers
from jaxdiff.data.captions import Caption
from jaxdiff.data.duplicates import bands, first_alike, look, pixel_digest
from jaxdiff.data.images import decode
from jaxdiff.data.loader import batches, open_source
from jaxdiff.data.prepared import INDEX, Picture, PreparedSource
from jaxdiff.data.readers import Collection

reason = "needs the `beam` extra"
pa, pq = (pytest.importorskip(name, reason=reason) for name in ("pyarrow", "pyarrow.parquet"))
stages = pytest.importorskip("jaxdiff.data.collect", reason=reason, exc_type=ImportError)
Filters, check = stages.Filters, stages.check

DATA = Path(__file__).parent / "data"
ROWS = list[tuple[str, bytes, bytes]]


def noise(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    """A smooth random picture, as photos are."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def rows(n: int = 6) -> ROWS:
    return [(f"{i:03}", encoded(noise(i)), f"picture {i}".encode()) for i in range(n)]


def bomb(side: int = 30_000) -> bytes:
    """A PNG of few bytes that claims `side` * `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def write_folder(root: Path, records: ROWS) -> str:
    root.mkdir(exist_ok=True)
    for name, image, text in records:
        (root / f"{name}.png").write_bytes(image)
        (root / f"{name}.txt").write_bytes(text)
    return str(root)


def write_metadata(root: Path, records: ROWS) -> str:
    root.mkdir()
    lines = []
    for name, image, text in records:
        (root / f"{name}.png").write_bytes(image)
        lines.append(b'{"file_name": "%s.png", "text": "%s"}' % (name.encode(), text))
    (root / "metadata.jsonl").write_bytes(b"\n".join(lines))
    return str(root)


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(data))


def add_record(archive: tarfile.TarFile, name: str, image: bytes) -> None:
    add(archive, f"{name}.png", image)
    add(archive, f"{name}.txt", b"a dog")


def write_tar(path: Path, records: ROWS, mode: str = "w") -> str:
    with tarfile.open(path, mode) as archive:
        for name, image, text in records:
            add(archive, f"{name}.png", image)
            add(archive, f"{name}.txt", text)
    return str(path)


def write_json_tar(path: Path, records: ROWS) -> str:
    with tarfile.open(path, "w") as archive:
        for name, image, text in records:
            add(archive, f"deep/{name}.seg.png", image)
            add(archive, f"deep/{name}.json", b'{"caption": "%s"}' % text)
    return str(path)


def write_parquet(path: Path, records: ROWS, struct: bool = False) -> str:
    images = [image for _, image, _ in records]
    column = pa.array([{"bytes": image, "path": None} for image in images]) if struct else pa.array(images)
    texts = pa.array([text for _, _, text in records], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": column, "text": texts}), path, row_group_size=4)
    return str(path)


WRITERS = {
    "sidecars": lambda root, records: write_folder(root / "pictures", records),
    "metadata": lambda root, records: write_metadata(root / "pictures", records),
    "tar": lambda root, records: write_tar(root / "a.tar", records),
    "tar.gz": lambda root, records: write_tar(root / "a.tar.gz", records, "w:gz"),
    "json": lambda root, records: write_json_tar(root / "a.tar", records),
    "parquet": lambda root, records: write_parquet(root / "a.parquet", records),
    "struct": lambda root, records: write_parquet(root / "a.parquet", records, struct=True),
}


def read(source: str, **options) -> tuple[list[Picture], list[readers.Bad]]:
    collection = Collection(source, **options)
    found = [record for unit in collection.units() for record in collection.read(unit)]
    return [r for r in found if isinstance(r, Picture)], [r for r in found if isinstance(r, readers.Bad)]


def prepared(source: str, folder: Path, share: float = 0.0, unit_records: int = 4, **filters) -> Any:
    collection = Collection(source, unit_records=unit_records)
    return stages.collect(collection, Filters(**filters), folder, max_bad_share=share, options=[])


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# Reading


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_collection_gives_the_same_records(tmp_path, kind):
    records = rows()
    pictures, bad = read(WRITERS[kind](tmp_path, records), unit_records=4)
    assert not bad
    assert [(p.data, p.caption.full()) for p in pictures] == [(image, text.decode()) for _, image, text in records]


def test_a_tfds_set_is_read_with_the_parts_of_its_captions():
    pictures, bad = read("tfds:emoji", tfds_dir=str(DATA), unit_records=50)
    source = open_source(DataConfig(root=str(DATA)))
    assert not bad
    assert [(p.caption, p.data) for p in pictures] == [
        (r.caption, r.image) for r in map(source.record, range(len(source)))
    ]


def test_several_files_are_named_by_a_pattern(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", rows(2))
    assert len(Collection(str(tmp_path)).units()) == 3
    assert len(Collection(str(tmp_path / "[01].tar")).units()) == 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: root / "nothing", "does not exist, or is empty"),
        (lambda root: root, "is empty"),
        (lambda root: write_parquet(root / "a.parquet", rows()) and write_tar(root / "a.tar", rows()) and root, "both"),
        (lambda root: (root / "a.txt").write_text("x") and root, "holds no images"),
        (lambda root: (root / "a.txt").write_text("x") and root / "a.txt", "none of these kinds"),
    ],
)
def test_a_source_that_is_no_collection_is_said(tmp_path, make, said):
    with pytest.raises(ValueError, match=said):
        Collection(str(make(tmp_path))).units()


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "json"])
def test_a_caption_that_is_not_utf8_concerns_its_own_record_alone(tmp_path, kind):
    records = rows()
    records[2] = ("002", records[2][1], b"caf\xe9")
    pictures, bad = read(WRITERS[kind](tmp_path, records))
    assert len(pictures) == 5
    assert [b.reason for b in bad] == ["its caption is not UTF-8"]


HOSTILE = {
    "../../escape.png": ({}, "its name leads out"),
    "/etc/passwd.png": ({}, "its name leads out"),
    "link.png": ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}, "it is a link"),
    "hard.png": ({"type": tarfile.LNKTYPE, "linkname": "000.png", "size": 0}, "it is a link"),
    "device.png": ({"type": tarfile.CHRTYPE, "size": 0}, "it is a link"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_harmful_members_of_a_tar_are_refused_and_the_others_read(tmp_path, name):
    fields, reason = HOSTILE[name]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add_record(archive, "a", encoded(noise(0)))
        add(archive, name, b"data", **fields)
        add_record(archive, "z", encoded(noise(1)))
    pictures, bad = read(str(tmp_path / "a.tar"))
    assert [p.name for p in pictures] == ["a.tar/a", "a.tar/z"]
    assert len(bad) == 1
    assert bad[0].reason.startswith(reason)


def test_a_member_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_BYTES", 5000)
    for mode, name in (("w", "a.tar"), ("w:gz", "a.tar.gz")):
        with tarfile.open(tmp_path / name, mode) as archive:
            add_record(archive, "a", encoded(noise(0)))
            add_record(archive, "b", random.Random(0).randbytes(9000))
            add_record(archive, "c", encoded(noise(1)))
        pictures, bad = read(str(tmp_path / name))
        assert (len(pictures), [b.reason for b in bad]) == (2, ["its file is too large"])
    big = write_folder(tmp_path / "folder", [("a", bytes(9000), b"x"), *rows(1)])
    pictures, bad = read(big)
    assert (len(pictures), [b.name for b in bad]) == (1, ["a.png"])
    pictures, bad = read(write_parquet(tmp_path / "a.parquet", [("a", bytes(9000), b"x"), *rows(1)]))
    assert (len(pictures), [b.reason for b in bad]) == (1, ["its file is too large"])


def test_an_archive_that_unpacks_without_end_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_BYTES", 2**20)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        add_record(archive, "a", encoded(noise(0)))
        add(archive, "b.png", bytes(200 * 2**20))
    began = time.process_time()
    pictures, bad = read(str(tmp_path / "a.tar.gz"))
    assert len(pictures) == 1
    assert "it unpacks to more than" in bad[-1].detail
    assert time.process_time() - began < 20


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "parquet"])
@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "flipped"])
def test_a_damaged_file_costs_no_more_than_its_own_records(tmp_path, kind, damage):
    source = Path(WRITERS[kind](tmp_path, rows(20)))
    data = bytearray(source.read_bytes())
    if damage == "flipped":
        for i in range(100, len(data), 997):
            data[i] ^= 0xFF
    new = {"cut": data[: len(data) // 2], "empty": b"", "noise": random.Random(0).randbytes(5000)}.get(damage, data)
    source.write_bytes(new)
    pictures, bad = read(str(source))
    assert len(pictures) < 20 or any(isinstance(check(p, Filters()), readers.Bad) for p in pictures)
    if damage != "flipped":
        assert bad


@pytest.mark.parametrize("cut", range(20))
def test_a_tar_that_is_cut_off_is_told_wherever_the_cut_is(tmp_path, cut):
    source = Path(write_tar(tmp_path / "a.tar", rows(6)))
    data = source.read_bytes().rstrip(b"\0")
    source.write_bytes(data[: len(data) // 512 * 512 * (cut + 1) // 21 // 512 * 512])  # at the end of some block
    pictures, bad = read(str(source))
    assert len(pictures) <= 6
    assert [b.reason for b in bad if b.reason not in ("it has no image", "it has no caption")] == [
        "its archive is broken"
    ]


def test_archives_that_were_joined_are_read_to_the_end(tmp_path):
    a, b = (Path(write_tar(tmp_path / name, rows(3), mode)) for name, mode in (("a", "w"), ("b", "w")))
    (tmp_path / "c.tar").write_bytes(a.read_bytes() + b.read_bytes())
    (tmp_path / "d.tar").write_bytes(gzip.compress(a.read_bytes()) + gzip.compress(b.read_bytes() + bytes(100)))
    for name in "cd":
        pictures, bad = read(str(tmp_path / f"{name}.tar"))
        assert (len(pictures), bad) == (6, [])


@pytest.mark.parametrize(
    "line",
    [b"{oops", b"[]", b"3", b'{"text": "x"}', b'{"file_name": 3, "text": "x"}', b'{"file_name": "a", "text": ["x"]}',
     b"[" * 100_000, b'{"file_name": "../a.png", "text": "x"}', b'{"file_name": "/a.png", "text": "x"}',
     b'{"file_name": "a\\u0000.png", "text": "x"}', b'{"file_name": "gone.png", "text": "x"}',
     b'{"file_name": "out.png", "text": "x"}', b'{"file_name": "\xff.png", "text": "x"}',
     b'{"file_name": "000.png", "text": "x", "style": 5}'],
)  # fmt: skip
def test_metadata_that_makes_no_sense_costs_its_line_alone(tmp_path, line):
    source = Path(write_metadata(tmp_path / "pictures", rows(3)))
    (source / "out.png").symlink_to("/etc/passwd")
    (source / "metadata.jsonl").write_bytes((source / "metadata.jsonl").read_bytes() + b"\n" + line)
    pictures, bad = read(str(source))
    assert (len(pictures), len(bad)) == (3, 1)


def test_a_parquet_file_without_the_fields_is_told_which_it_has(tmp_path):
    pq.write_table(pa.table({"a": [b"x"], "b": ["y"]}), tmp_path / "a.parquet")
    _, (bad,) = read(str(tmp_path / "a.parquet"))
    assert "the fields are a, b" in bad.detail
    _, (bad,) = read(str(tmp_path / "a.parquet"), image_field="aa", text_field="b")
    assert "did you mean 'a'" in bad.detail


# Filters


@pytest.mark.parametrize(
    ("image", "text", "reason"),
    [
        (encoded(noise(0, 64, 31)), "a dog", "it is too small"),
        (encoded(noise(0, 90, 32)), "a dog", "it is too oblong"),
        (encoded(noise(0, 64, 64)), "", "it has no caption"),
        (encoded(noise(0, 64, 64)), "cat", "its caption is too short"),
        (encoded(noise(0, 64, 64)), "a very long caption", "its caption is too long"),
        (encoded(noise(0, 64, 64), "JPEG")[:400], "a dog", "bad: its image is broken, or too large"),
        (bomb(), "a dog", "bad: its image is broken, or too large"),
        (b"%!PS-Adobe", "a dog", "bad: its image is broken, or too large"),
        (b"", "a dog", "bad: its image is broken, or too large"),
    ],
)
def test_what_is_left_out_and_why(image, text, reason):
    filters = Filters(min_side=32, max_aspect=2.0, min_caption=4, max_caption=10)
    dropped = check(Picture("x", Caption(text), image), filters)
    assert isinstance(dropped, readers.Bad)
    assert dropped.reason == reason
    kept = check(Picture("x", Caption("a dog"), encoded(noise(0, 64, 32))), filters)
    assert not isinstance(kept, readers.Bad)


def test_large_pictures_are_made_smaller_and_others_keep_their_bytes():
    small, large, clear = (
        encoded(noise(0, 30, 20)),
        encoded(noise(0, 120, 80)),
        encoded(Image.new("RGBA", (9, 9)), "WEBP"),
    )

    def kept(data: bytes, **options) -> tuple[str | None, tuple[int, int], bool]:
        picture, _ = check(Picture("x", Caption("y"), data), Filters(**options))
        image = Image.open(io.BytesIO(picture.data))
        assert image.size == (picture.width, picture.height)
        return image.format, image.size, picture.data == data

    assert kept(small, max_side=30) == ("PNG", (30, 20), True)
    assert kept(large, max_side=30) == ("WEBP", (30, 20), False)
    assert kept(large, max_side=30, encode="jpeg") == ("JPEG", (30, 20), False)
    assert kept(small, encode="webp") == ("WEBP", (30, 20), False)
    assert kept(clear, encode="jpeg") == ("PNG", (9, 9), False)


# Duplicates


@pytest.mark.parametrize("seed", range(12))
def test_a_picture_looks_like_its_copies_and_not_like_others(seed):
    picture = noise(seed, 120, 90)
    mine = look(picture)
    copies = [
        picture.resize((60, 45), Image.Resampling.LANCZOS),
        Image.open(io.BytesIO(encoded(picture, "JPEG", quality=60))),
        Image.open(io.BytesIO(encoded(picture.resize((97, 71)), "WEBP", quality=70))),
    ]
    assert max((mine ^ look(copy)).bit_count() for copy in copies) <= 8
    assert min((mine ^ look(noise(other, 120, 90))).bit_count() for other in range(100, 200)) > 8


def test_drawings_that_differ_in_colour_alone_do_not_look_alike():
    hearts = [Image.new("RGBA", (64, 64)) for _ in range(3)]
    for heart, colour in zip(hearts, ("red", "blue", "green"), strict=True):
        heart.paste(colour, (16, 16, 48, 48))
    hashes = [look(heart) for heart in hearts]
    assert min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]) >= 4


def test_equal_pixels_have_one_digest_however_they_are_stored():
    picture = noise(0)
    assert pixel_digest(decode(encoded(picture, "BMP"))) == pixel_digest(decode(encoded(picture)))
    assert pixel_digest(picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)) != pixel_digest(picture)


@pytest.mark.parametrize("distance", [0, 1, 3, 7, 15])
def test_hashes_that_are_near_share_a_band(distance):
    rng = random.Random(0)
    for _ in range(300):
        a = rng.getrandbits(64)
        b = a
        for bit in rng.sample(range(64), distance):
            b ^= 1 << bit
        assert set(bands(a, distance)) & set(bands(b, distance))
    assert sum(64 * [1]) == sum((value ^ other).bit_count() for (_, value), (_, other)
                                in zip(bands(0, distance), bands(2**64 - 1, distance), strict=True))  # fmt: skip


def test_the_first_hash_that_is_near_is_found():
    rng = random.Random(0)
    hashes = [rng.getrandbits(6) << 58 for _ in range(80)]
    for distance in (0, 1, 2):
        expected = [next(j for j, b in enumerate(hashes) if (a ^ b).bit_count() <= distance) for a in hashes]
        assert first_alike(hashes, distance) == expected


# The pipeline


def test_a_collection_becomes_shards_without_duplicates_that_training_reads(tmp_path):
    records = [*rows(9), ("020", encoded(noise(0), "BMP"), b"the first one again"), *rows(11)[9:]]
    records += [("021", encoded(noise(5, 96, 64), "JPEG", quality=90), b"the sixth one, resized")]
    records += [
        ("022", encoded(noise(40, 16, 40)), b"high"),
        ("023", b"broken", b"x"),
        ("024", encoded(noise(41)), b""),
    ]
    source = write_folder(tmp_path / "pictures", records)
    (Path(source) / "phone.heic").touch()
    report = prepared(source, tmp_path / "out", share=0.2, near=4)
    assert report.left_out == {".heic": 1}
    assert (report.read, report.kept, report.bad) == (16, 12, 2)
    assert {reason: (entry["count"], entry["examples"][0][2]) for reason, entry in report.dropped.items()} == {
        "duplicate: equal pixels": (1, "020.png (as 000.png)"),
        "duplicate: looks alike": (1, "021.png (as 005.png)"),
        "bad: it has no caption": (1, "024.png"),
        "bad: its image is broken, or too large": (1, "023.png (it is not an image)"),
    }
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == dataclasses.asdict(report)
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".array_record"] * 4 + [".json"] * 2 + [
        ".npy"
    ]

    config = DataConfig(source="prepared", root=str(tmp_path / "out"), size=16, batch_size=4, aspects=("3:2", "1:2"),
                        side_multiple=4)  # fmt: skip
    found = open_source(config)
    expected = [(text.decode(), image) for name, image, text in records if name not in ("020", "021", "023", "024")]
    assert [(r.caption.label, r.image) for r in map(found.record, range(len(found)))] == expected
    assert found.sizes().tolist() == [[24, 16]] * 11 + [[16, 40]]
    assert found.name(0).endswith("shard-00000-of-00004.array_record record 0")
    reader = batches(config, found, seed=0)
    assert {batch["image"].shape for batch in islice(reader, 40)} == {(4, 12, 20, 3), (4, 24, 12, 3)}
    reader.close()


def test_preparing_again_changes_nothing_and_other_settings_are_refused(tmp_path):
    source = write_tar(tmp_path / "a.tar", rows(5))
    first = prepared(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert prepared(source, tmp_path / "out") == first
    assert contents(tmp_path / "out") == before
    with pytest.raises(ValueError, match="holds a collection that was prepared otherwise"):
        prepared(source, tmp_path / "out", min_side=5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds something else"):
        prepared(source, tmp_path / "mine")


def test_too_much_that_is_bad_stops_it_and_a_higher_share_goes_on_without_reading_again(tmp_path):
    records = [*rows(7), ("bad", b"broken", b"x")]
    source = write_folder(tmp_path / "pictures", records)
    with pytest.raises(ValueError, match=r"1 of 8 records cannot be used, more than --max-bad-share 0.1 .*bad\.png"):
        prepared(source, tmp_path / "out", share=0.1)
    with pytest.raises(ValueError, match="holds no prepared collection"):
        PreparedSource(tmp_path / "out")
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "work").glob("part-*.array_record")}
    assert len(parts) == 2
    with pytest.raises(ValueError, match="half-made collection of other settings, or of files that have changed"):
        prepared(source, tmp_path / "out", share=0.2, min_side=2)
    (tmp_path / "out" / "work" / "part-00001.json").unlink()  # as if it had been killed before this
    made = (tmp_path / "out" / "work" / "part-00000.array_record").stat().st_mtime_ns
    assert made == parts[tmp_path / "out" / "work" / "part-00000.array_record"]
    assert prepared(source, tmp_path / "out", share=0.2).kept == 7


def test_a_collection_of_which_nothing_passes_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"Nothing of .* passes the filters:\n.*5 read\n(.*\n)*.*too small"):
        prepared(write_tar(tmp_path / "a.tar", rows(5)), tmp_path / "out", min_side=100)


def test_a_prepared_collection_that_is_not_whole_is_refused(tmp_path):
    prepared(write_tar(tmp_path / "a.tar", rows(5)), tmp_path / "out")
    shard = tmp_path / "out" / "shard-00000-of-00001.array_record"
    data = shard.read_bytes()
    shard.write_bytes(data[:-2000])
    with pytest.raises(ValueError, match=r"shard-00000-of-00001\.array_record is damaged"):
        PreparedSource(tmp_path / "out")
    shard.write_bytes(data)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    (tmp_path / "out" / INDEX).write_text(json.dumps(index | {"version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        PreparedSource(tmp_path / "out")
    (tmp_path / "out" / INDEX).write_text(json.dumps(index | {"records": 4}))
    with pytest.raises(ValueError, match="several collections are mixed"):
        PreparedSource(tmp_path / "out")


# The command


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "jaxdiff.tools.prepare", "collect", *map(str, arguments)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere", "--name", "x"), "nowhere does not exist, or is empty"),
        (("nowhere", "--name", "../x"), "--name is '../x'"),
        (("nowhere", "--name", "x", "--near", 40), "--near is 40"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(tmp_path, arguments, said):
    done = subprocess.run(command(*arguments, "--data-dir", tmp_path), capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_is_told_and_nothing_half_written_stays(tmp_path, workers):
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", [(f"{j}", encoded(noise(j, 90, 90)), b"x") for j in range(1 + 99 * i)])

    arguments = command(tmp_path, "--name", "x", "--data-dir", tmp_path / "data", "--workers", workers)
    full = ("bash", "-c", 'ulimit -S -f 98; exec "$@"', "bash")  # no file of more than 98 KiB
    done = subprocess.run([*full, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: write() failed: File too large")
    work = tmp_path / "data" / "x" / "work"
    assert {path.name for path in work.glob("part*")} <= {"part-00000.array_record", "part-00000.json"}
    subprocess.run(arguments, check=True, capture_output=True)
    assert len(PreparedSource(tmp_path / "data" / "x")) == 100


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_command_that_is_killed_again_and_again_ends_with_the_same_files(tmp_path, workers):
    for i in range(24):
        images = [(f"{i}-{j:03}", encoded(noise(1000 * i + j, 200, 150)), f"picture {j}".encode()) for j in range(20)]
        images += [(f"{i}-copy", images[0][1], b"copy"), (f"{i}-last", encoded(noise(99_999, 200, 150)), b"of all")]
        write_tar(tmp_path / f"{i}.tar", images)
    out, whole = tmp_path / "data" / "killed", tmp_path / "data" / "whole"
    arguments = [tmp_path, "--near", 1, "--data-dir", tmp_path / "data", "--name"]
    subprocess.run(command(*arguments, "whole"), check=True, capture_output=True)

    def done(stage: str) -> int:
        return len(list((out / "work").glob(f"{stage}-*.json")))

    hits = []
    for stage, until in (("part", 1), ("part", 7), ("part", 15), ("shard", 1), ("shard", 6)):
        process = subprocess.Popen(command(*arguments, "killed", "--workers", workers), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        while process.poll() is None and done(stage) < until:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)  # its workers, if it has any, are left to themselves
        process.wait()
        if 0 < done(stage) < 24:
            hits.append(stage)
    assert {"part", "shard"} <= set(hits)  # both stages were hit in their middle
    subprocess.run(command(*arguments, "killed", "--workers", workers), check=True, capture_output=True)
    assert contents(out) == contents(whole)
    report, source = json.loads((out / "report.json").read_text()), PreparedSource(out)
    assert report["dropped"]["duplicate: equal pixels"]["count"] == 24 + 23
    pictures = {source.record(i).image for i in range(len(source))}
    assert len(pictures) == len(source) == report["kept"] == 24 * 22 - 47 - report["dropped"].get(
        "duplicate: looks alike", {"count": 0}
    )["count"]  # fmt: skip


def test_a_caption_that_no_file_can_hold_costs_its_picture_alone(tmp_path):
    source = Path(write_metadata(tmp_path / "pictures", rows(3)))
    (source / "odd.png").write_bytes(encoded(noise(99, 40, 40)))
    with (source / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "odd.png", "text": "hi \\ud800"}')
    report = stages.collect(Collection(str(source)), stages.Filters(), tmp_path / "out", max_bad_share=0.5, options=[])
    assert (report.kept, report.bad) == (3, 1)
    assert "not UTF-8" in next(iter(report.dropped))
