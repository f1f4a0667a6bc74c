"""Prompt files, the seeds of their images, and which images are drawn together."""

import random
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxdiff.generation.batch.files import MAX_LINE, Line, read_requests
from jaxdiff.generation.batch.groups import groups, jobs_of
from jaxdiff.generation.request import Request


@pytest.fixture
def file(tmp_path):
    """Writes a prompt file and gives its path."""

    def write(name: str, text: str | bytes) -> Path:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path / name

    return write


def requests(path: Path, *defaults: dict) -> list[Request | None]:
    return [line.request for line in read_requests(path, *defaults)]


def problems(path: Path) -> dict[int, str]:
    return {line.number: line.problem for line in read_requests(path) if line.request is None}


def test_a_text_files_lines_are_prompts(file):
    path = file("p.txt", "\ufeffa red apple\r\n\n  a dog, (big:1.2)  \n# not a comment\nlast")
    lines = list(read_requests(path, {"steps": 7}))
    assert [(line.number, line.request) for line in lines] == [
        (1, Request("a red apple", steps=7)), (3, Request("a dog, (big:1.2)", steps=7)),
        (4, Request("# not a comment", steps=7)), (5, Request("last", steps=7)),
    ]  # fmt: skip


def test_json_lines_give_any_field(file):
    path = file(
        "p.jsonl",
        '{"prompt": "a", "seed": 3, "n": 2, "guidance": 4, "size": [512, 256]}\n\n'
        '{"prompt": "b", "negative_prompt": "", "seed": null, "size": "64X48", "guidance_interval": [0.5, 2]}\n',
    )
    assert requests(path, {"negative_prompt": "ugly", "seed": 9}) == [
        Request("a", "ugly", 3, 2, guidance=4.0, size=(512, 256)),
        Request("b", "", 9, size=(64, 48), guidance_interval=(0.5, 2.0)),
    ]


@pytest.mark.parametrize(("name", "comma"), [("p.csv", ","), ("p.tsv", "\t")])
def test_csv_has_a_header_and_quotes(file, name, comma):
    table = ['prompt,seed,size,guidance_interval,eta', '"a ""red"" apple',
             'on two lines",7,64x48,0.5 2,0.5', ",,,,", "dog,,,,"]  # fmt: skip
    lines = list(read_requests(file(name, "\ufeff" + "\r\n".join(table).replace(",", comma))))
    two = Request('a "red" apple\non two lines', seed=7, size=(64, 48), guidance_interval=(0.5, 2.0), eta=0.5)
    assert [(line.number, line.request) for line in lines] == [(2, two), (5, Request("dog"))]


def test_names_until_version_0_1_are_taken_with_a_warning(file):
    for name, text in (("p.csv", "prompt,grid\na,karras\n"), ("p.jsonl", '{"prompt": "a", "grid": "karras"}')):
        with pytest.warns(FutureWarning, match="grid .*schedule"):
            assert requests(file(name, text)) == [Request("a", schedule="karras")]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"prompt": "a"', "JSON"),
        ('{"prompt": "a", "steps": NaN}', "NaN"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' twice"),
        ('["a"]', "JSON object"),
        ("[" * 100_000, "nested"),
        ('{"promt": "a"}', "'prompt'"),
        ('{"prompt": "a", "steps": 0}', "steps is 0"),
        ('{"prompt": "a", "guidance": 1e999}', "guidance is inf"),
        ('{"prompt": "a", "strength": 0.5}', "strength is 0.5"),
        ('{"prompt": "a", "image": "gone.png"}', "image is 'gone.png'"),
        ('{"prompt": "a", "steps": ' + "9" * 5000 + "}", ""),
        ('{"prompt": "a", "' + "x" * 5000 + '": 1}', "xxxx"),
    ],
    ids=range(12),
)
def test_a_bad_line_is_told_with_its_number_and_the_others_stay(file, line, part):
    path = file("p.jsonl", f'{{"prompt": "first"}}\n{line}\n{{"prompt": "last"}}\n')
    first, bad, last = read_requests(path)
    assert (first.request, bad.request, last.request) == (Request("first"), None, Request("last"))
    assert bad.problem.startswith(f"{path} line 2: ")
    assert part in bad.problem
    assert len(bad.problem) < 700


def test_bytes_that_are_no_text_concern_their_own_line(file):
    for name, start in (("p.txt", b""), ("p.csv", b"prompt\n"), ("p.jsonl", b"")):
        good = b'{"prompt": "a"}' if name == "p.jsonl" else b"a"
        path = file(name, start + good + b"\nb\xff\n" + b"x" * (3 * MAX_LINE) + b"\n" + good)
        first, n = requests(path), start.count(b"\n")
        assert first == [Request("a"), None, None, Request("a")]
        found = problems(path)
        assert "UTF-8" in found.pop(2 + n)
        assert str(MAX_LINE) in found.pop(3 + n)
        assert not found


def test_damaged_csv_lines_concern_themselves(file):
    path = file("p.csv", 'prompt,seed\na,1\nb,2,3\n"c" d,4\ne,x\nf,5\n')
    assert list(problems(path)) == [3, 4, 5]
    assert [one.prompt for one in requests(path) if one] == ["a", "f"]
    path = file("q.csv", 'prompt\na\n"b\nc\n')
    assert list(problems(path)) == [3]
    assert [one.prompt for one in requests(path) if one] == ["a"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "", "p.txt.*prompt"),
        ("p.jsonl", "\n \n", "p.jsonl.*prompt"),
        ("p.csv", "prompt,seed\n", "p.csv.*prompt"),
        ("p.csv", "promt,seed\na,1\n", "p.csv.*'promt'.*'prompt'"),
        ("p.csv", "prompt,seed,seed\na,1,1\n", "p.csv.*'seed' twice"),
        ("p.csv", "seed\n1\n", "p.csv.*prompt"),
        ("p.csv", b"pro\xffmpt\n1\n", "p.csv.*header.*UTF-8"),
        ("p.csv", '"prompt\n1\n', "p.csv.*header"),
        ("p.txt", "a".encode("utf-16"), "p.txt.*UTF-16"),
    ],
)
def test_a_file_that_has_no_prompts_is_named(file, name, text, words):
    with pytest.raises(ValueError, match=words):
        requests(file(name, text))


def test_places_that_are_no_files_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "gone.txt"):
        with pytest.raises(ValueError, match=path.name):
            requests(path)


def test_images_are_sought_beside_the_file(file, tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png")
    (request,) = requests(file("p.jsonl", '{"prompt": "x", "image": "a.png", "mask": "a.png"}'))
    assert request.image == request.mask == str(tmp_path / "a.png")


def test_a_huge_file_is_read_as_it_is_needed(file):
    lines = read_requests(file("p.txt", "a red apple\n" * 1_000_000))
    start = time.process_time()
    assert [next(lines).number for _ in range(3)] == [1, 2, 3]
    assert time.process_time() - start < 0.5
    lines.close()


def test_no_file_raises_anything_but_a_sentence_with_its_name(file):
    rng = random.Random(0)
    units = [b'{"prompt": "a"}', b'"', b",", b"\n", b"\r", b"prompt", b"seed", b"1", b"{", b"}", b"[", b":", b"\\",
             b"\xff", b"\0", b"\t", b"\xef\xbb\xbf", b"nan", b'"\\ud800"', b"prompt,seed\n"]  # fmt: skip
    told = []
    for i in range(600):
        data = b"".join(rng.choices(units, k=rng.randrange(25)))
        path = file(("p.txt", "p.csv", "p.jsonl", "p.tsv")[i % 4], data)
        try:
            for line in read_requests(path):
                assert (line.request is None) == bool(line.problem)
                if line.request:
                    line.request.prompt.encode()
        except ValueError as error:
            told.append((path, error))
    assert told
    assert all(str(error).startswith(str(path)) for path, error in told)


# Seeds ----------------------------------------------------------------------------------------------------------------


def lines_of(*found: Request | None) -> list[Line]:
    return [Line(i, request, "" if request else "bad") for i, request in enumerate(found, 1)]


def test_seeds_run_on_where_a_line_has_none():
    found = [Request("a", n=3), Request("b", seed=50, n=2), None, Request("c"), Request("d")]
    assert [(job.index, job.line, job.seed) for job in jobs_of(lines_of(*found), first_seed=10)] == [
        (0, 1, 10), (1, 1, 11), (2, 1, 12), (3, 2, 50), (4, 2, 51), (5, 4, 16), (6, 5, 17),
    ]  # fmt: skip
    found[2] = Request("mended")
    assert [job.seed for job in jobs_of(lines_of(*found), 10) if job.request.prompt in "cd"] == [16, 17]


def test_seeds_do_not_run_over():
    with pytest.raises(ValueError, match=r"[Ll]ine 2.*4294967295"):
        list(jobs_of(lines_of(Request("a"), Request("b")), first_seed=2**32 - 1))


# Batches --------------------------------------------------------------------------------------------------------------


def test_like_images_are_drawn_together_each_once_and_each_program_has_one_batch_size():
    rng = np.random.default_rng(0)
    found = [
        Request(f"p{i}", n=int(rng.integers(1, 4)), size=[None, (64, 64), (64, 32)][rng.integers(3)],
                steps=int(rng.choice([20, 30])), sampler=["ddim", "euler"][rng.integers(2)])
        for i in range(60)
    ]  # fmt: skip
    wanted = list(jobs_of(lines_of(*found)))
    for most, multiple in ((1, 1), (7, 1), (16, 4), (9, 4), (1000, 8)):
        batches = list(groups(wanted, lambda shape, most=most: most, multiple))
        new = [job for batch in batches for job in batch.jobs[: batch.new]]
        assert sorted(job.index for job in new) == [job.index for job in wanted]
        sizes = {}
        for batch in batches:
            settings = {(r.size, r.steps, r.sampler) for r in (job.request for job in batch.jobs)}
            assert len(settings) == 1
            own = [job.index for job in batch.jobs[: batch.new]]
            assert own == sorted(own)
            assert 1 <= batch.new <= len(batch.jobs) <= most
            assert len(batch.jobs) % multiple == 0
            assert all(job == batch.jobs[batch.new - 1] for job in batch.jobs[batch.new :])
            ((size, _, sampler),) = settings
            sizes.setdefault((size, sampler), set()).add(len(batch.jobs))
        assert all(len(found) == 1 for found in sizes.values())


def test_batches_are_even_where_all_are_alike():
    wanted = list(jobs_of(lines_of(Request("a", n=17))))
    assert [(len(batch.jobs), batch.new) for batch in groups(wanted, lambda shape: 16)] == [(9, 9), (9, 8)]
    assert list(groups([], lambda shape: 16)) == []
    assert [len(batch.jobs) for batch in groups(wanted, lambda shape: 3, 4)] == [4] * 5, "a multiple at least"


def test_what_a_line_can_ask_for_and_one_call_cannot_take_together_is_drawn_apart():
    image = {"image": "a.png"}
    kinds = [{}, image, image | {"mask": "a.png"}, image | {"invert": "ddim"}, {"to_seed": 1}, {"to_prompt": "b"},
             {"regions": [{"prompt": "b", "box": (0, 0, 1, 0.5)}]}, {"cache_interval": 2}, {"guidance": 1.0},
             {"literal": True}, {"guidance_interval": (0, 1)}]  # fmt: skip
    found = [Request(f"p{i}", **kind) for i in range(2) for kind in kinds]
    batches = list(groups(jobs_of(lines_of(*found)), lambda shape: 4))
    own = [sorted({job.index for job in batch.jobs[: batch.new]}) for batch in batches]
    assert sorted(own) == [[i, i + len(kinds)] for i in range(len(kinds))]
