"""Studies with people: the page tells raters nothing, the count finds who was better, and answers are not trusted."""

import json
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxdiff.generation.batch.files import read_requests
from jaxdiff.generation.batch.groups import jobs_of
from jaxdiff.generation.batch.store import Store, fingerprint
from jaxdiff.io.images import read_image
from jaxdiff.tools.judge.__main__ import cli
from jaxdiff.tools.judge.answers import Key, read_answers, read_key
from jaxdiff.tools.judge.report import study_record
from jaxdiff.tools.judge.study import choose_pairs

PROMPTS = ["a red apple", "</script><script>alert(1)</script> & \"'", "a dog", "ein Bär 日本", "a star"]


def draw(folder: Path, prompts: Path, model: int, n: int = 2, metadata: bool = True, size: int = 6) -> None:
    """What `sample.py --from-file` writes: images that tell the test, and nobody else, what they are."""
    lines = list(read_requests(prompts, {"n": n}))
    jobs = list(jobs_of(lines, 100 * model))
    with Store(folder, {"requests": fingerprint(jobs), "model": f"m{model}"}, jobs, metadata=metadata) as store:
        for job in store.missing():
            image = np.full((size, 8, 3), (model, job.line, job.seed % 256), np.uint8)
            store.add(job, image, {"prompt": job.request.prompt, "seed": job.seed, "model": f"secret-{model}"})
        store.finish()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Three models' folders, and the prompts."""
    root = tmp_path_factory.mktemp("drawn")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    for model, name in enumerate(("plain", "tuned", "third")):
        draw(root / name, root / "prompts.txt", model)
    return root


def make(drawn: Path, out: Path, *more: object) -> int:
    folders = [str(drawn / name) for name in ("plain", "tuned", "third")]
    return cli(["make", *folders, "--prompts", str(drawn / "prompts.txt"), "--out", str(out), *map(str, more)])


@pytest.fixture(scope="module")
def study(drawn, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "study"
    assert make(drawn, out) == 0
    return out


def manifest_of(study: Path) -> dict:
    page = (study / "page" / "index.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# The study ------------------------------------------------------------------------------------------------------------


def test_the_page_compares_every_two_images_of_a_prompt_once_and_has_checks(study):
    key, manifest = json.loads((study / "key.json").read_text()), manifest_of(study)
    assert [two["images"] for two in key["pairs"]] == [two["images"] for two in manifest["pairs"]]
    seen, checks = [], 0
    for pair, shown in zip(key["pairs"], manifest["pairs"], strict=True):
        assert shown["prompt"] == PROMPTS[pair["line"] - 1]
        images = [read_image(study / "page" / "images" / name) for name in pair["images"]]
        models = [key["images"][name]["model"] for name in pair["images"]]
        assert images[0].shape == images[1].shape
        for image, model in zip(images, models, strict=True):
            if model is None:
                assert image.std() > 50
            else:
                assert image[0, 0, :2].tolist() == [model, pair["line"]]
        if None in models:
            checks += 1
        else:
            seen.append((frozenset(models), pair["line"], frozenset(int(i[0, 0, 2]) % 100 for i in images)))
    assert len(seen) == len(set(seen)) == 3 * 2 * len(PROMPTS)
    assert all(len(seeds) == 1 for _, _, seeds in seen), "the k-th image of a line stands beside the k-th"
    assert checks == 3


def test_what_raters_get_tells_nothing_of_the_models(study, drawn):
    told = files_under(study / "page")
    assert set(files_under(study)) == {"key.json", *(f"page/{name}" for name in told)}
    names = [name for name in told if name != "index.html"]
    assert all(re.fullmatch(r"images/\d\d\.png", name) for name in names)
    for data in told.values():
        assert not re.search(rb"plain|tuned|best|secret|seed|m[012]\b(?=\")", data.split(b"<style>")[0].lower())
    for name in names:
        with Image.open(study / "page" / name) as image:
            assert image.info == {}
            assert dict(image.getexif()) == {}
    key = json.loads((study / "key.json").read_text())
    order = [key["images"][name]["model"] for name in sorted(key["images"])]
    assert len(set(order[: len(order) // 3])) > 2, "numbers go by chance"


def test_a_prompt_stays_text(study):
    page = (study / "page" / "index.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 2
    assert manifest_of(study)["pairs"][0]["prompt"] in PROMPTS


def test_the_same_seed_makes_the_same_study_and_another_another(study, drawn, tmp_path):
    assert make(drawn, tmp_path / "again") == make(drawn, tmp_path / "other", "--seed", 1) == 0
    assert files_under(tmp_path / "again") == files_under(study)
    assert files_under(tmp_path / "other")["key.json"] != files_under(study)["key.json"]


def test_fewer_pairs_are_as_many_of_all_two_models():
    slots = [(line, k) for line in range(1, 8) for k in range(2)]
    rng = np.random.default_rng(0)
    chosen = choose_pairs(slots, 4, 18, rng)
    assert len(set(chosen)) == 18
    assert np.unique([(pair.first, pair.second) for pair in chosen], axis=0, return_counts=True)[1].tolist() == [3] * 6
    assert len(choose_pairs(slots, 4, None, rng)) == 6 * 14


def test_there_may_be_no_checks_and_images_may_be_jpegs(drawn, tmp_path, capsys):
    assert make(drawn, tmp_path / "s", "--check-every", 0, "--pairs", 4, "--format", "jpeg") == 0
    assert "4 pairs of 3 models and 0 attention checks" in capsys.readouterr().out
    names = set(files_under(tmp_path / "s" / "page")) - {"index.html"}
    assert {Path(name).suffix for name in names} == {".jpg"}
    assert len(names) <= 8


def test_folders_without_metadata_are_matched_by_line(drawn, tmp_path):
    draw(tmp_path / "bare", drawn / "prompts.txt", 1, metadata=False)
    words = [str(drawn / "plain"), str(tmp_path / "bare"), "--prompts", str(drawn / "prompts.txt")]
    assert cli(["make", *words, "--out", str(tmp_path / "s")]) == 0
    assert len(read_key(tmp_path / "s" / "key.json").pairs) == 11


def test_what_could_tell_models_apart_is_said(drawn, tmp_path, capsys):
    draw(tmp_path / "tall", drawn / "prompts.txt", 1, size=9)
    words = [str(drawn / "plain"), str(tmp_path / "tall"), "--prompts", str(drawn / "prompts.txt")]
    assert cli(["make", *words, "--out", str(tmp_path / "s")]) == 0
    assert "Images are 8x6, 8x9" in capsys.readouterr().err


def refused(capsys, words: list) -> str:
    """The one sentence that a command ends with."""
    assert cli([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_folders_that_do_not_match_are_refused_in_a_sentence(drawn, tmp_path, capsys):
    prompts, plain, tuned = drawn / "prompts.txt", drawn / "plain", drawn / "tuned"
    tail = ["--prompts", prompts, "--out", tmp_path / "s"]
    assert "at least two models" in refused(capsys, ["make", plain, *tail])
    assert "given twice" in refused(capsys, ["make", plain, plain, *tail])
    assert "has no images that an index lists" in refused(capsys, ["make", plain, tmp_path, *tail])

    shutil.copytree(tuned, tmp_path / "lost")
    next((tmp_path / "lost").glob("00003-*.png")).unlink()
    assert "has 2 images of line 3, lost has 1" in refused(capsys, ["make", plain, tmp_path / "lost", *tail])

    (tmp_path / "other.txt").write_text("\n".join(["a blue apple", *PROMPTS[1:]]))
    other = ["--prompts", tmp_path / "other.txt", "--out", tmp_path / "s"]
    assert "'a red apple' for line 1, where" in refused(capsys, ["make", plain, tuned, *other])
    (tmp_path / "short.txt").write_text("\n".join(PROMPTS[:2]))
    short = ["--prompts", tmp_path / "short.txt", "--out", tmp_path / "s"]
    assert "line 3, where" in refused(capsys, ["make", plain, tuned, *short])

    shutil.copytree(tuned, tmp_path / "torn")
    file = next((tmp_path / "torn").glob("00003-*.png"))
    file.write_bytes(b"x" * file.stat().st_size)
    assert "is not an image" in refused(capsys, ["make", plain, tmp_path / "torn", *tail[:-1], tmp_path / "t"])

    for flag, value in (("pairs", 0), ("seed", -1), ("check-every", -1), ("repeat-every", 2), ("format", "gif")):
        assert f"{flag.replace('-', '_')} is {value!r}" in refused(
            capsys, ["make", plain, tuned, *tail, f"--{flag}={value}"]
        )
    assert not (tmp_path / "s").exists()
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "x").touch()
    assert "is there already" in refused(capsys, ["make", plain, tuned, *tail])


# The answers ----------------------------------------------------------------------------------------------------------


def answers_of(
    key: Key,
    name: str,
    rng: random.Random,
    strengths: tuple[float, ...] = (-1.0, 0.0, 1.0),
    careful: bool = True,
    most: int | None = None,
) -> dict:
    """What the page writes for a rater who chooses as Bradley, Terry and Davidson say.

    Args:
        key: of the study.
        name: of the rater.
        rng: the rater's.
        strengths: of the models.
        careful: else the rater presses keys at random.
        most: answers.
    """
    made: list[dict] = []
    for number, pair in enumerate(rng.sample(range(len(key.pairs)), len(key.pairs)), 1):
        left, right = rng.sample(sorted(key.pairs[pair]), 2)
        made.append(judged(key, pair, left, right, rng, strengths, careful))
        if number % 9 == 0:
            old = made[-5]
            made.append(judged(key, old["pair"], old["right"], old["left"], rng, strengths, careful))
    return {"study": key.study, "rater": name, "answers": made[:most]}


def judged(key: Key, pair: int, left: str, right: str, rng: random.Random, strengths, careful: bool) -> dict:
    b = [-30.0 if (model := key.model_of[side]) is None else strengths[model] for side in (left, right)]
    if not careful:
        b = [0.0, 0.0]
    weights = [math.exp(b[0]), math.exp(b[1]), 0.5 * math.exp((b[0] + b[1]) / 2)]
    fits, drawn = rng.choices(["left", "right", "tie"], weights, k=2)
    return {"pair": pair, "left": left, "right": right, "fits": fits, "drawn": drawn, "seconds": 2.5}


@pytest.fixture(scope="module")
def handed_in(study, tmp_path_factory):
    """Twelve careful raters and one who is not."""
    folder, key = tmp_path_factory.mktemp("answers"), read_key(study / "key.json")
    for k in range(13):
        given = answers_of(key, f"Rater {k}", random.Random(k), careful=k < 12)
        (folder / f"{k}.json").write_text(json.dumps(given))
    return folder


def count(capsys, study: Path, files: list, *more: object, code: int = 0) -> dict:
    words = ["count", study / "key.json", *files, "--resamples", 200, "--json", *more]
    assert cli([str(word) for word in words]) == code
    return json.loads(capsys.readouterr().out)


def test_who_was_better_is_found_and_who_pressed_at_random_is_left_out(study, handed_in, capsys):
    files = sorted(handed_in.iterdir())
    record = count(capsys, study, files)
    assert [name for name, one in record["raters"].items() if one["left_out"]] == ["Rater 12"]
    assert record["raters"]["Rater 3"]["checks_right"] == record["raters"]["Rater 3"]["checks"] >= 3
    for one in record["questions"].values():
        assert list(one["strengths"]) == ["third", "tuned", "plain"]
        assert one["answers"] == 12 * 30
        for (name, of), truth in zip(one["strengths"].items(), (1, 0, -1), strict=True):
            assert of["interval"][0] < truth < of["interval"][1], name
        row = one["pairs"][1]
        assert row["models"] == ["plain", "third"]
        assert row["wins"] + row["losses"] + row["ties"] == 120
        assert row["p"] < 1e-6
        assert row["still_needed"] == 0
    assert 0 < record["questions"]["fits"]["alpha"] < 1
    assert 0.3 < record["left"] < 0.7

    assert cli(["count", str(study / "key.json"), *map(str, files), "--resamples", "200"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"left out: Rater 12, \d of \d attention checks right", told)
    assert re.search(r"Which fits the text better\?\nmodel .*\nthird ", told)


def test_the_order_of_files_and_the_sides_of_images_change_nothing(study, handed_in, tmp_path, capsys):
    files = sorted(handed_in.iterdir())
    record = count(capsys, study, files)
    assert count(capsys, study, files[::-1]) == record
    mirror = {"left": "right", "right": "left", "tie": "tie"}
    turned = []
    for file in files:
        given = json.loads(file.read_text())
        for one in given["answers"]:
            one["left"], one["right"] = one["right"], one["left"]
            one |= {question: mirror[one[question]] for question in ("fits", "drawn")}
        turned.append(tmp_path / file.name)
        turned[-1].write_text(json.dumps(given))
    again = count(capsys, study, turned)
    assert again["questions"] == record["questions"]
    assert again["raters"] == record["raters"]
    assert again["left"] == pytest.approx(1 - record["left"])


def test_a_rater_who_says_the_same_again_is_consistent(study):
    key = read_key(study / "key.json")
    model = {name: -1 if m is None else m for name, m in key.model_of.items()}
    made = []
    for pair, images in enumerate(key.pairs):
        left, right = sorted(images)
        for sides in ((left, right), (right, left)):
            side = "left" if model[sides[0]] > model[sides[1]] else "right"
            made.append(
                {"pair": pair, "left": sides[0], "right": sides[1], "fits": side, "drawn": "left", "seconds": 1}
            )
    path = study.parent / "steady.json"
    path.write_text(json.dumps({"study": key.study, "rater": "steady", "answers": made}))
    record = study_record([read_answers(path, key)], key, least=0.0, resamples=100)
    steady = record["raters"]["steady"]
    assert steady["repeats"] == 30
    assert steady["same_again"] == {"fits": 30, "drawn": 0}
    assert (steady["checks"], steady["checks_right"]) == (6, 3), "noise on the left was found better drawn"
    fits = record["questions"]["fits"]
    assert fits["strengths"] == {}
    assert "no bound" in fits["notes"][0]
    assert [row["wins"] for row in fits["pairs"]] == [0, 0, 0]
    assert record["left"] > 0.5


def test_models_that_nobody_compared_are_said(study, handed_in, tmp_path, capsys):
    key, given = read_key(study / "key.json"), json.loads((handed_in / "1.json").read_text())
    given["answers"] = [
        one for one in given["answers"] if {key.model_of[one["left"]], key.model_of[one["right"]]} == {0, 2}
    ]
    (tmp_path / "a.json").write_text(json.dumps(given))
    record = count(capsys, study, [tmp_path / "a.json"])
    assert "never compared, plain, third | tuned" in record["questions"]["fits"]["notes"][0]


def test_who_hands_in_twice_counts_once(study, handed_in, tmp_path, capsys):
    given = json.loads((handed_in / "0.json").read_text())
    early = tmp_path / "early.json"
    early.write_text(json.dumps(given | {"answers": given["answers"][:9]}))
    alone = count(capsys, study, [handed_in / "0.json"])
    words = ["count", study / "key.json", early, handed_in / "0.json", "--resamples", 200, "--json"]
    assert cli([str(word) for word in words]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == alone
    assert err == f"warning: {early} is left out: {handed_in / '0.json'} has all its answers.\n"

    other = json.loads((handed_in / "1.json").read_text()) | {"rater": "Rater 0"}
    early.write_text(json.dumps(other))
    assert "both by 'Rater 0'" in refused(capsys, words)


WRONG = {
    "no JSON": lambda given: "{",
    "a list": lambda given: "[]",
    "deep": lambda given: "[" * 100_000,
    "nested": lambda given: given | {"answers": [nested(900)]},
    "another field": lambda given: given | {"x": 1},
    "no rater": lambda given: {name: given[name] for name in ("study", "answers")},
    "another study": lambda given: given | {"study": "0" * 64},
    "study of another type": lambda given: given | {"study": ["\x1b[31m"] * 1000},
    "blank name": lambda given: given | {"rater": "  "},
    "long name": lambda given: given | {"rater": "x" * 101},
    "answers are no list": lambda given: given | {"answers": {"0": 1}},
    "nothing answered": lambda given: given | {"answers": []},
    "pair": lambda given: first(given, pair=10**9),
    "negative pair": lambda given: first(given, pair=-1),
    "pair is true": lambda given: first(given, pair=True),
    "pair is not whole": lambda given: first(given, pair=1.0),
    "foreign image": lambda given: first(given, left="../../key.json"),
    "image twice": lambda given: first(given, left=given["answers"][0]["right"]),
    "image is a list": lambda given: first(given, left=[]),
    "choice": lambda given: first(given, fits="both"),
    "choice is a list": lambda given: first(given, drawn=["left"]),
    "seconds": lambda given: first(given, seconds=math.nan),
    "negative seconds": lambda given: first(given, seconds=-1),
    "huge seconds": lambda given: first(given, seconds=math.inf),
    "no seconds": lambda given: first(given, seconds=None),
    "another column": lambda given: first(given, note="x"),
    "again on the same side": lambda given: given | {"answers": [given["answers"][0]] * 2},
    "a third time": lambda given: given | {"answers": thrice(given["answers"][0])},
    "one answer is a string": lambda given: given | {"answers": ["\x1b]0;owned\x07"]},
}


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


def first(given: dict, **fields) -> dict:
    return given | {"answers": [given["answers"][0] | fields, *given["answers"][1:]]}


def thrice(answer: dict) -> list[dict]:
    return [answer, answer | {"left": answer["right"], "right": answer["left"]}, answer]


@pytest.mark.parametrize("how", WRONG)
def test_answers_that_the_page_would_not_write_are_refused_in_a_sentence(study, handed_in, tmp_path, capsys, how):
    given = WRONG[how](json.loads((handed_in / "2.json").read_text()))
    bad = tmp_path / "bad.json"
    bad.write_text(given if isinstance(given, str) else json.dumps(given))
    words = ["count", study / "key.json", bad, handed_in / "0.json", "--resamples", 100, "--json"]
    assert cli([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert list(json.loads(out)["raters"]) == ["Rater 0"], "the others count"
    assert err.startswith(f"error: {bad}")
    assert err.count("\n") == 1
    assert len(err) < 400
    assert err[:-1].isprintable()


def test_a_rater_may_take_any_time_and_have_any_name(study, handed_in, tmp_path):
    given = json.loads((handed_in / "2.json").read_text()) | {"rater": " \u00c5sa \U0001f469\u200d\U0001f52c\x1b[2J "}
    (tmp_path / "a.json").write_text(json.dumps(first(given, seconds=10**400)))
    rater = read_answers(tmp_path / "a.json", read_key(study / "key.json"))
    assert rater.answers[0].seconds == 1e6
    assert rater.name == "\u00c5sa \U0001f469?\U0001f52c?[2J"


def test_files_of_answers_changed_by_chance_are_read_or_refused(study, handed_in, tmp_path):
    key, data = read_key(study / "key.json"), (handed_in / "0.json").read_bytes()
    rng = random.Random(0)
    path, said = tmp_path / "a.json", []
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 3])):
            changed[rng.randrange(len(changed))] = rng.choice(b'0123456789"{}[],:\\x\xff-etn')
        path.write_bytes(changed)
        try:
            read_answers(path, key)
        except ValueError as error:
            said.append(str(error))
    assert 0 < len(said) < 300
    assert all(sentence.startswith(str(path)) for sentence in said)


def test_other_files_are_refused(study, handed_in, tmp_path, capsys):
    one = handed_in / "0.json"
    assert "no key" in refused(capsys, ["count", one, one])
    assert "cannot be read" in refused(capsys, ["count", tmp_path / "nothing.json", one])
    key = json.loads((study / "key.json").read_text())
    for change in ({"models": ["x", "x", "y"]}, {"models": 3}, {"pairs": [{"images": ["x", "y"], "line": 1}]},
                   {"images": {}}, {"study": 5}):  # fmt: skip
        (tmp_path / "key.json").write_text(json.dumps(key | change))
        assert "no key" in refused(capsys, ["count", tmp_path / "key.json", one])
    huge = tmp_path / "huge.json"
    huge.write_bytes(b" " * 10_000_001)
    for path, why in ((tmp_path, "is no file"), (huge, "more than 10000000")):
        assert cli(["count", str(study / "key.json"), str(path)]) == 2
        assert why in capsys.readouterr().err
    assert "all failed" in refused(capsys, ["count", study / "key.json", handed_in / "12.json"])
    for flag, value in (("least", 2), ("resamples", 3), ("seed", -1)):
        assert f"{flag} is {value}" in refused(capsys, ["count", study / "key.json", one, f"--{flag}={value}"])
