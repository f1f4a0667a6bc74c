"""Prompt files, and what is drawn together."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxdiff.rows import Line, Region, Row, groups, pictures, read_rows
from jaxdiff.rows.read import MAX_LINE
from jaxdiff.settings import Settings


@pytest.fixture
def file(tmp_path):
    """Writes a prompt file and gives its path."""

    def write(name: str, text: str | bytes) -> Path:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path / name

    return write


def asked(prompt: str, **values) -> Row:
    """A row with any of a row's and of its settings' values."""
    return Row.of({"prompt": prompt} | values)


def rows(path: Path, **options) -> list[Row | None]:
    return [line.row for line in read_rows(path, **options)]


def problems(path: Path, **options) -> dict[int, str]:
    return {line.number: line.problem for line in read_rows(path, **options) if line.row is None}


def test_a_text_files_lines_are_prompts(file):
    path = file("p.txt", "\ufeffa red apple\r\n\n  a dog, (big:1.2)  \n# not a comment\nlast")
    lines = list(read_rows(path, asked("", steps=7)))
    assert [(line.number, line.row.prompt, line.row.settings.steps) for line in lines if line.row] == [
        (1, "a red apple", 7), (3, "a dog, (big:1.2)", 7), (4, "# not a comment", 7), (5, "last", 7),
    ]  # fmt: skip


def test_json_lines_give_any_argument(file):
    path = file(
        "p.jsonl",
        '{"prompt": "a", "seed": 3, "n": 2, "guidance": 4, "size": [512, 256]}\n\n'
        '{"prompt": "b", "negative_prompt": "", "seed": null, "size": "64X48", "guidance_interval": [0.5, 2]}\n',
    )
    assert rows(path, defaults=Row("", negative_prompt="ugly", seed=9)) == [
        asked("a", negative_prompt="ugly", seed=3, n=2, guidance=4.0, size=(512, 256)),
        asked("b", negative_prompt="", seed=9, size=(64, 48), guidance_interval=(0.5, 2.0)),
    ]


@pytest.mark.parametrize(("name", "comma"), [("p.csv", ","), ("p.tsv", "\t")])
def test_csv_has_a_header_and_quotes(file, name, comma):
    table = ['prompt,seed,size,guidance_interval,eta', '"a ""red"" apple',
             'on two lines",7,64x48,0.5 2,0.5', ",,,,", "dog,,,,"]  # fmt: skip
    path = file(name, "\ufeff" + "\r\n".join(table).replace(",", comma))
    lines = list(read_rows(path))
    assert [line.number for line in lines] == [2, 5]
    assert [line.row for line in lines] == [
        asked('a "red" apple\non two lines', seed=7, size=(64, 48), guidance_interval=(0.5, 2.0), eta=0.5),
        Row("dog"),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"', "It is not JSON: Expecting ',' delimiter at character 15."),
        ('{"prompt": "a", "steps": NaN}', "NaN is no number in JSON."),
        ('{"prompt": "a", "eta": Infinity}', "Infinity is no number in JSON."),
        ('{"prompt": "a", "prompt": "b"}', "It has 'prompt' twice."),
        ('["a"]', "It is no JSON object"),
        ("[" * 100_000, "It is nested too deeply."),
        ('{"promt": "a"}', "There is no argument 'promt'; did you mean 'prompt'?"),
        ('{"seed": 3}', "There is no prompt."),
        ('{"prompt": 3}', "prompt is 3; it must be text."),
        ('{"prompt": "a", "steps": "many"}', "steps is 'many'; it must be a whole number."),
        ('{"prompt": "a", "steps": 2.5}', "steps is 2.5; it must be a whole number."),
        ('{"prompt": "a", "steps": true}', "steps is True; it must be a whole number."),
        ('{"prompt": "a", "steps": 0}', "steps is 0; it must be at least 1."),
        ('{"prompt": "a", "n": -1}', "n is -1; it must be at least 1."),
        ('{"prompt": "a", "guidance": 1e999}', "guidance is inf; it must be a finite number."),
        ('{"prompt": "a", "eta": "1.5"}', "eta is 1.5; it must lie from 0 to 1."),
        ('{"prompt": "a", "strength": -0.1}', "strength is -0.1; it must lie from 0 to 1."),
        ('{"prompt": "a", "strength": 0.5}', "strength is 0.5, and there is no image that it is for."),
        (
            '{"prompt": "a", "sampler": "pndm", "grid": "karras"}',
            "pndm cannot use the schedule 'karras'; it can use: model.",
        ),
        ('{"prompt": "a", "sampler": "euler", "eta": 1}', "eta is 1, which the sampler euler does not take"),
        ('{"prompt": "a", "literal": 1}', "literal is 1; it must be true or false."),
        ('{"prompt": "a", "source_prompt": "b"}', "say how, by invert."),
        ('{"prompt": "a", "to_seed": -1}', "to_seed is -1; it must be from 0 to 4294967295."),
        ('{"prompt": "a", "share": 2}', "share is 2.0; it must be from 0 to 1."),
        ('{"prompt": "a", "outpaint": [1, 2]}', "outpaint is (1, 2); it must be four numbers of pixels"),
        ('{"prompt": "a", "outpaint": [1, 2, 3, 4]}', "outpaint is (1, 2, 3, 4), and there is no image"),
        ('{"prompt": "a", "upscale": 0}', "upscale is 0; it must be at least 1."),
        ('{"prompt": "a", "regions": "left"}', "regions is 'left'; it must be a list of {\"prompt\""),
        ('{"prompt": "a", "regions": [{"prompt": "b"}]}', "regions[0] is {'prompt': 'b'}; it must be"),
        ('{"prompt": "a", "regions": [{"prompt": "b", "box": [0, 0, 2, 1]}]}', "regions[0].box is [0, 0, 2, 1]"),
        ('{"prompt": "a", "regions": [{"prompt": "b", "box": {"l": [0]}}]}', "regions[0].box is {'l': [0]}"),
        ('{"prompt": "a", "settings": {"steps": 3}}', "There is no argument 'settings'"),
        ('{"prompt": "a", "seed": -1}', "seed is -1; it must be from 0 to 4294967295, for 1 pictures."),
        ('{"prompt": "a", "seed": 4294967295, "n": 2}', "it must be from 0 to 4294967294, for 2 pictures."),
        ('{"prompt": "a", "size": "64"}', "size is '64'; write it as WIDTHxHEIGHT, such as 64x64."),
        ('{"prompt": "a", "size": "wide"}', "size is 'wide'; write it as WIDTHxHEIGHT, such as 64x64."),
        ('{"prompt": "a", "size": [64]}', "size is [64]; it must be (width, height), in pixels."),
        ('{"prompt": "a", "guidance_interval": [2, 1]}', "it must be two noise levels (sigma)"),
        ('{"prompt": "a", "image": "gone.png"}', "image is 'gone.png', and there is no such file."),
        ('{"prompt": "a", "mask": "p.jsonl"}', "p.jsonl', and there is no image that it is for."),
        ('{"prompt": "a", "steps": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"prompt": "a", "' + "x" * 5000 + '": 1}', "There is no argument 'xxxx"),
    ],
)
def test_a_bad_row_is_told_with_its_line_and_the_others_stay(file, line, said):
    path = file("p.jsonl", f'{{"prompt": "first"}}\n{line}\n{{"prompt": "last"}}\n')
    found = list(read_rows(path))
    assert [line.row and line.row.prompt for line in found] == ["first", None, "last"]
    assert found[1].number == 2
    assert found[1].problem.startswith(f"{path} line 2: ")
    assert said in found[1].problem
    assert len(found[1].problem) < 700


def test_bytes_that_are_no_text_concern_their_own_row(file):
    for name, start in (("p.txt", b""), ("p.csv", b"prompt\n"), ("p.jsonl", b"")):
        good = b'{"prompt": "a"}' if name == "p.jsonl" else b"a"
        path = file(name, start + good + b"\nb\xff\n" + b"x" * (3 * MAX_LINE) + b"\n" + good)
        n = start.count(b"\n")
        told = {2 + n: f"{path} line {2 + n}: It is not UTF-8.",
                3 + n: f"{path} line {3 + n}: It has more than {MAX_LINE} bytes."}  # fmt: skip
        assert problems(path) == told
        assert [row.prompt for row in rows(path) if row] == ["a", "a"]


def test_damaged_csv_rows_concern_themselves(file):
    path = file("p.csv", 'prompt,seed\na,1\nb,2,3\n"c" d,4\ne,x\nf,5\n')
    found = problems(path)
    assert list(found) == [3, 4, 5]
    assert "It has 3 cells, the header 2." in found[3]
    assert "Its quotes or cells are damaged (',' expected after '\"')." in found[4]
    assert "seed is 'x'; it must be a whole number or None." in found[5]
    assert [row.prompt for row in rows(path) if row] == ["a", "f"]
    path = file("q.csv", 'prompt\na\n"b\nc\n')
    assert "unexpected end of data" in problems(path)[3]
    assert [row.prompt for row in rows(path) if row] == ["a"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "", r"p\.txt holds no prompt\."),
        ("p.jsonl", "\n \n", r"p\.jsonl holds no prompt\."),
        ("p.csv", "prompt,seed\n", r"p\.csv holds no prompt\."),
        (
            "p.csv",
            "promt,seed\na,1\n",
            r"p\.csv: the header has 'promt', which is no argument; did you mean 'prompt'\?",
        ),
        ("p.csv", "prompt,seed,seed\na,1,1\n", r"the header has 'seed' twice"),
        ("p.csv", "seed\n1\n", r"the header has no prompt"),
        ("p.csv", b"pro\xffmpt\n1\n", r"the header is damaged \(It is not UTF-8\.\)"),
        ("p.csv", '"prompt\n1\n', r"the header is damaged"),
        ("p.txt", "a".encode("utf-16"), r"p\.txt is UTF-16; save it as UTF-8\."),
    ],
)
def test_a_file_that_is_none_is_told(file, name, text, said):
    with pytest.raises(ValueError, match=said):
        rows(file(name, text))


def test_places_that_are_no_files_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder; give a file of prompts\."):
        rows(tmp_path)
    with pytest.raises(ValueError, match=r"gone\.txt cannot be read: No such file or directory\."):
        rows(tmp_path / "gone.txt")


def test_images_are_sought_beside_the_file(file, tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png")
    path = file("p.jsonl", '{"prompt": "x", "image": "a.png", "mask": "a.png"}')
    (row,) = rows(path)
    assert row.image == row.mask == str(tmp_path / "a.png")


def test_a_caller_can_refuse_rows(file):
    def check(row: Row) -> None:
        if row.settings.sampler == "euler":
            raise ValueError("There is no magic.")

    path = file("p.jsonl", '{"prompt": "a", "sampler": "euler"}\n{"prompt": "b"}')
    assert problems(path, check=check) == {1: f"{path} line 1: There is no magic."}


def test_a_huge_file_is_read_as_it_is_needed(file):
    path = file("p.txt", "a red apple\n" * 1_000_000)
    start = time.process_time()
    lines = read_rows(path)
    assert [next(lines).number for _ in range(3)] == [1, 2, 3]
    assert time.process_time() - start < 0.5
    lines.close()


def test_no_file_raises_anything_but_a_sentence(file):
    rng = random.Random(0)
    units = [b'{"prompt": "a"}', b'"', b",", b"\n", b"\r", b"prompt", b"seed", b"1", b"{", b"}", b"[", b":", b"\\",
             b"\xff", b"\0", b"\t", b"\xef\xbb\xbf", b"nan", b'"\\ud800"', b"prompt,seed\n"]  # fmt: skip
    for i in range(600):
        data = b"".join(rng.choices(units, k=rng.randrange(25)))
        path = file(("p.txt", "p.csv", "p.jsonl", "p.tsv")[i % 4], data)
        told = ""
        try:
            for line in read_rows(path):
                assert (line.row is None) == bool(line.problem)
                if line.row:
                    line.row.prompt.encode()
        except ValueError as error:
            told = str(error)
        assert told == "" or told.startswith(str(path))


def test_text_stands_for_values():
    row = Row.of({"prompt": "a", "steps": " 20 ", "guidance": "4", "size": "64 x 48", "seed": "", "image": None})
    assert row == Row("a", settings=Settings(steps=20, guidance=4.0, size=(64, 48)))
    box = '[{"prompt": "b", "box": [0, 0, 0.5, 1]}]'
    row = Row.of({"prompt": "a", "regions": box, "literal": "True", "guidance_interval": "0.5 2", "to_seed": "3"})
    how = Settings(literal=True, guidance_interval=(0.5, 2.0))
    assert row == Row("a", regions=(Region("b", (0, 0, 0.5, 1)),), to_seed=3, settings=how)
    assert Row.of({"prompt": "a\ud800", "negative_prompt": ""}, Row("", negative_prompt="b")) == Row("a?")


def lines_of(*found: Row | None) -> list[Line]:
    return [Line(i, row, "" if row else "bad") for i, row in enumerate(found, 1)]


def test_seeds_run_on_where_a_row_has_none():
    found = list(pictures(lines_of(Row("a", n=3), Row("b", seed=50, n=2), None, Row("c"), Row("d")), first_seed=10))
    assert [(p.index, p.line, p.seed) for p in found] == [
        (0, 1, 10), (1, 1, 11), (2, 1, 12), (3, 2, 50), (4, 2, 51), (5, 4, 16), (6, 5, 17),
    ]  # fmt: skip
    mended = list(pictures(lines_of(Row("a", n=3), Row("b", seed=50, n=2), Row("x"), Row("c"), Row("d")), 10))
    assert [p.seed for p in mended if p.row.prompt in "cd"] == [16, 17]


def test_seeds_do_not_run_over():
    with pytest.raises(ValueError, match=r"The seeds end at 4294967295, and line 2 needs more"):
        list(pictures(lines_of(Row("a"), Row("b")), first_seed=2**32 - 1))


def test_like_pictures_are_drawn_together_each_once():
    rng = np.random.default_rng(0)
    found = []
    for i in range(60):
        found.append(
            asked(f"p{i}", n=int(rng.integers(1, 4)), size=[None, (64, 64), (64, 32)][rng.integers(3)],
                steps=int(rng.choice([20, 30])), sampler=["ddim", "euler"][rng.integers(2)])
        )  # fmt: skip
    wanted = list(pictures(lines_of(*found)))
    for most, multiple in ((1, 1), (7, 1), (16, 4), (9, 4), (1000, 8)):
        batches = list(groups(wanted, most, multiple))
        new = [p for batch in batches for p in batch.pictures[: batch.new]]
        assert sorted(p.index for p in new) == [p.index for p in wanted]
        sizes = {}
        for batch in batches:
            rows_of = [p.row.settings for p in batch.pictures]
            assert len({(r.size, r.steps, r.sampler) for r in rows_of}) == 1
            assert [p.index for p in batch.pictures[: batch.new]] == sorted(
                p.index for p in batch.pictures[: batch.new]
            )
            assert 1 <= batch.new <= len(batch.pictures) <= most
            assert len(batch.pictures) % multiple == 0
            assert all(p == batch.pictures[batch.new - 1] for p in batch.pictures[batch.new :])
            sizes.setdefault((rows_of[0].size, rows_of[0].sampler), set()).add(len(batch.pictures))
        assert all(len(found) == 1 for found in sizes.values())  # compiled once each
        assert list(groups(wanted, most, multiple)) == batches


def test_batches_are_even_where_all_are_alike():
    wanted = list(pictures(lines_of(Row("a", n=17))))
    assert [(len(b.pictures), b.new) for b in groups(wanted, 16)] == [(9, 9), (9, 8)]
    assert list(groups([], 16)) == []
    with pytest.raises(ValueError, match="Batches of 3 pictures at most cannot be multiples of 4"):
        list(groups(wanted, 3, 4))


def test_how_many_are_drawn_at_once_and_which_are_alike_may_depend_on_the_row():
    found = [asked("a", n=6), asked("long", n=3), asked("b", n=2)]
    batches = groups(
        pictures(lines_of(*found)), lambda row: 3 if row.prompt == "long" else 4, shape=lambda row: len(row.prompt)
    )
    assert [("".join(p.row.prompt for p in b.pictures[: b.new]), len(b.pictures)) for b in batches] == [
        ("aaaa", 4), ("aabb", 4), ("longlonglong", 3),
    ]  # fmt: skip


def test_pictures_that_one_call_cannot_take_together_are_drawn_apart(tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png")
    image = {"image": str(tmp_path / "a.png")}
    box = [{"prompt": "b", "box": (0, 0, 1, 0.5)}]
    kinds = [{}, image, image | {"mask": image["image"]}, image | {"invert": "ddim"}, {"regions": box}, {"to_seed": 1},
             {"to_prompt": "b"}, {"cache_interval": 2}, {"guidance": 1.0}, {"literal": True}]  # fmt: skip
    found = [asked(f"p{i}", **kind) for i in range(2) for kind in kinds]
    batches = list(groups(pictures(lines_of(*found)), 4))
    assert [[p.index for p in batch.pictures] for batch in batches] == [[i, i + len(kinds)] for i in range(len(kinds))]


def test_a_row_is_json_and_back(tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png")
    box = [{"prompt": "b", "box": (0, 0, 1, 0.5)}]
    row = asked("a", size=(64, 48), guidance_interval=(0.5, 2.0), seed=3, regions=box, image=str(tmp_path / "a.png"))
    assert Row.of(json.loads(json.dumps(row.values()))) == row
