"""Prompts: the grammar against the web UI's published examples, wildcards, and the arrays of a batch."""

import gc
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest

from jaxdiff.data.tokens import Tokenizer
from jaxdiff.prompts import Wildcards, Words, encode, fill, parse

EMBEDDED = Path(__file__).parents[1] / "jaxdiff" / "assets" / "emoji" / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(EMBEDDED, 32)


@pytest.fixture(scope="module")
def long_tokenizer() -> Tokenizer:
    return Tokenizer.load(EMBEDDED, 77)


def weights(text: str) -> list[tuple[str, float]]:
    parts, _ = parse(text, 10, compose=False)
    return list(parts[0].at(0))


def phases(text: str, steps: int) -> list[tuple[int, str]]:
    """As the web UI tells a schedule: the text up to each step."""
    (part,), _ = parse(text, steps)
    starts = sorted({0} | {s for piece in part.pieces for s in (piece.start, piece.stop)} - {steps})
    ends = [*starts[1:], steps]
    return [(end, "".join(t for t, _ in part.at(start))) for start, end in zip(starts, ends, strict=True)]


def warned(text: str, steps: int = 10) -> str:
    return " ".join(parse(text, steps)[1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        # Its fourth example has a bracket that is never closed, which it closes at the end; here it is closed.
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).)",
            [("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
             ("sky", 1.4641), (".", 1.1)],
        ),
        ("[x]", [("x", 1 / 1.1)]),
        ("(x: .5 )", [("x", 0.5)]),
        ("(x:-1.)", [("x", -1.0)]),
        ("(12:30:1.2)", [("12:30", 1.2)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("16:9", [("16:9", 1.0)]),
        (r"a\\(b)", [("a\\", 1.0), ("b", 1.1)]),
        (r"¯\_(ツ)_/¯", [("¯\\_", 1.0), ("ツ", 1.1), ("_/¯", 1.0)]),
        (r"\__name__", [("__name__", 1.0)]),
        ("()", []),
        ("", []),
    ],
)  # fmt: skip
def test_weights_are_those_of_the_web_ui(text, expected):
    found = weights(text)
    assert [t for t, _ in found] == [t for t, _ in expected]
    np.testing.assert_allclose([w for _, w in found], [w for _, w in expected], rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a b")]),
        ("[(a:2):3]", [(3, ""), (10, "a")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [{b|d{:.5] c", [(5, "a  c"), (10, "a {b|d{ c")]),
        ("a [b::3] c", [(3, "a b c"), (10, "a  c")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:99]", [(10, "a")]),
        ("[a:b:-1]", [(10, "[a:b:-1]")]),
        ("[a:b:nan]", [(10, "[a:b:nan]")]),
    ],
)
def test_schedules_are_those_of_the_web_ui(text, expected):
    assert phases(text, 10) == expected


def test_schedules_side_by_side_are_those_of_the_web_ui():
    text = ("fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
            "[ in background:0.25] [shoddy:masterful:0.5]")  # fmt: skip
    assert phases(text, 100) == [
        (25, "fantasy landscape with a mountain and an oak in foreground shoddy"),
        (50, "fantasy landscape with a lake and an oak in foreground in background shoddy"),
        (60, "fantasy landscape with a lake and an oak in foreground in background masterful"),
        (75, "fantasy landscape with a lake and an oak in background masterful"),
        (100, "fantasy landscape with a lake and a christmas tree in background masterful"),
    ]
    assert phases("[a:b:0.29]", 100)[0] == (29, "a")  # 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat AND a dog:0.7", [(1.0, "a cat "), (0.7, " a dog")]),
        ("a cat :1.2 AND a dog AND night: -.5 ", [(1.2, " a cat "), (1.0, " a dog "), (-0.5, " night")]),
        ("a cat:0.7", [(1.0, "a cat:0.7")]),
        ("SAND ANDES and", [(1.0, "SAND ANDES and")]),
        (r"rock \AND roll", [(1.0, "rock AND roll")]),
        ("(a AND b)", [(1.0, "a AND b")]),
        ("a AND ", [(1.0, "a ")]),
        ("AND", [(1.0, "")]),
        ("a:9:0.5 AND b", [(0.5, "a:9"), (1.0, " b")]),
        ("a:1e9 AND b", [(1.0, "a:1e9 "), (1.0, " b")]),
    ],
)
def test_and_joins_prompts_with_weights(text, expected):
    parts, _ = parse(text, 10)
    assert [(p.weight, "".join(t for t, _ in p.at(0)).strip()) for p in parts] == [(w, t.strip()) for w, t in expected]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("(unbalanced", "The bracket '(' is never closed; it is taken as text."),
        ("a ) b ] c ]", "The bracket ']' is never opened (2 of them); it is taken as text."),
        ("(x:1e9)", "The weight 1e9 of (...) does not lie from -100 to 100; it is taken as text."),
        ("(x:nan)", "The weight nan of (...) does not lie from -100 to 100; it is taken as text."),
        ("(x:-inf)", "The weight -inf of (...) does not lie from -100 to 100; it is taken as text."),
        ("a AND b:nan", "The weight nan of AND does not lie from -100 to 100; it is taken as text."),
        ("((x:90):90)", "Weights multiply to more than 100, which is used."),
        ("[a:b:inf]", "The schedule's inf is no share or number of steps; it is taken as text."),
        ("[a:b:40]", "A schedule changes at step 40, and there are 10; write a share, such as 0.5."),
        ("[cow|horse]", "[a|b] does not alternate here, it weighs less; write a schedule, such as [a:b:0.5]."),
        ("a AND", "AND joins an empty prompt, which is left out."),
        ("(a AND b)", "AND joins whole prompts alone; inside brackets or a negative prompt it is text."),
        (" AND ".join("a" * 20), "AND joins 20 prompts; the first 16 are taken."),
    ],
)
def test_what_is_no_sentence_of_the_grammar_is_told(text, sentence):
    assert sentence in warned(text)


@pytest.mark.parametrize("text", ["a red apple, 16:9", "(word:1.3), [word] [a:b:0.5] a AND b:0.7", r"\( \] \: \\ \AND"])
def test_what_is_right_warns_of_nothing(text):
    assert not warned(text)


def test_what_is_wrong_stays_as_it_is_written():
    for text in ("(a", "a)", "[a", "a]", ")(", "][", "(x:1e9)", "(x:nan)", "[a:b:inf]"):
        assert weights(text) == [(text, 1.0)]
    # A bracket that is closed across another leaves that one as text.
    assert weights("([x)]") == [("[x", 1.1), ("]", 1.0)]


def test_escaped_text_comes_back_whole():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices([*"()[]:\\a 1", "AND", " AND ", "__"], k=rng.randrange(20)))
        escaped = re.sub(r"[()\[\]:\\]|\bAND(?=\b|__)|__", r"\\\g<0>", text)
        parts, warnings = parse(escaped, 10)
        assert len(parts) == 1
        assert parts[0].at(0) == (((text, 1.0),) if text else ())
        assert not warnings


def test_no_text_is_an_error_and_none_is_lost():
    rng = random.Random(1)
    words = [*"()[]:\\ab1.|_- \n\0\ud800é日", "AND", " AND ", "__", ":1.3)", ":0.5]", ":nan)", ":1e999]", ":7]"]
    for _ in range(600):
        text = "".join(rng.choices(words, k=rng.randrange(30)))
        for steps in (1, 10):
            parts, _ = parse(text, steps)
            assert parts
            for part in parts:
                assert abs(part.weight) <= 100
                for piece in part.pieces:
                    assert abs(piece.weight) <= 100
                    assert 0 <= piece.start < piece.stop <= steps
        # What is kept are the text's own characters, in their order.
        kept = iter(text)
        pieces = parse(text, 1, compose=False)[0][0].pieces
        assert all(character in kept for piece in pieces for character in piece.text)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["(", ")", "[", "(a]", "([", "[a:", "(a:1.1)", "AND", "\\", ":", "[(]", "a:1 AND "])
def test_any_depth_of_brackets_takes_linear_time(unit):
    def seconds(n: int) -> float:
        start = time.process_time()
        parse(unit * n, 10)
        return time.process_time() - start

    gc.collect()
    gc.disable()  # its passes over all that lives take ever longer
    try:
        assert seconds(20_000) < 30 * max(min(seconds(2000), seconds(2000)), 0.005)
    finally:
        gc.enable()


@pytest.mark.slow
def test_thirty_thousand_pairs_of_brackets_are_no_trouble():
    n = 30_000  # without recursion, whose limit is a thousand
    ((text, weight),) = weights("[" * n + "x" + "]" * n)
    assert (text, np.float32(weight)) == ("x", 0)
    assert weights("(" * n + "x" + ")" * n) == [("x", 100.0)]
    assert phases("[" * n + "x" + ":0.5]" * n, 10) == [(5, ""), (10, "x")]


# Wildcards


@pytest.fixture
def wildcards(tmp_path):
    folder = tmp_path / "wild"
    (folder / "more").mkdir(parents=True)
    (folder / "animals.txt").write_bytes("\ufeff# beasts\n\ncat\r\ndog\n  (owl:1.2)  \n".encode())
    (folder / "more" / "two words.txt").write_text("a __animals__ and a __animals__")
    (folder / "loop.txt").write_text("__loop__ __loop__ __loop__")
    (folder / "empty.txt").write_text("# nothing\n\n")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    return Wildcards(folder)


def test_a_wildcard_is_a_line_of_its_file_chosen_by_seed_and_place_alone(wildcards):
    text = "a __animals__ by a __animals__"
    filled = [wildcards.fill(text, seed)[0] for seed in range(200)]
    assert set(filled) == {f"a {a} by a {b}" for a in ("cat", "dog", "(owl:1.2)") for b in ("cat", "dog", "(owl:1.2)")}
    assert (
        filled[7]
        == Wildcards(wildcards.folder).fill(text, 7)[0]
        == wildcards.fill(text.replace("by", "or"), 7)[0].replace("or", "by")
    )
    shares = [sum(text.startswith(f"a {animal}") for text in filled) for animal in ("cat", "dog", "(owl")]
    assert min(shares) > 40


def test_wildcards_nest_and_lie_in_folders(wildcards):
    text, warnings = wildcards.fill("__more/two words__!", 3)
    assert re.fullmatch(r"a (cat|dog|\(owl:1.2\)) and a (cat|dog|\(owl:1.2\))!", text)
    assert not warnings


def test_wildcards_that_name_themselves_end(wildcards):
    start = time.process_time()
    text, warnings = wildcards.fill("__loop__", 0)
    assert time.process_time() - start < 1
    assert len(text) < 40_000
    assert "__loop__ is taken as text: wildcards fill in 1000 others at most, 8 levels deep." in warnings


@pytest.mark.parametrize(
    ("name", "said"),
    [("nothing", "has no nothing.txt"), ("a/../../secret", "has no a/../../secret.txt"), ("link", "has no link.txt"),
     ("empty", "empty.txt has no line of text"), ("bytes", "bytes.txt is not UTF-8"), ("more", "has no more.txt"),
     ("x" * 100 + "/..", None), ("a" * 300, None)],
)  # fmt: skip
def test_a_name_without_a_file_in_the_folder_stays_as_it_is_written(wildcards, name, said):
    text, warnings = wildcards.fill(f"a __{name}__", 0)
    assert text == f"a __{name}__"
    if said:
        assert said in warnings[0]


def test_what_is_escaped_is_no_wildcard(wildcards):
    filled, warnings = wildcards.fill(r"\__animals__", 0)
    assert weights(filled) == [("__animals__", 1.0)]
    assert not warnings


def test_wildcards_need_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no folder of wildcards\.$"):
        Wildcards(tmp_path / "nowhere")


def test_prompt_negative_and_regions_draw_by_themselves(wildcards):
    words = Words("__animals__", "__animals__", ("__animals__", "__animals__"))
    filled = [fill(words, wildcards, seed)[0] for seed in range(60)]
    for i in range(3):
        columns = [(w.prompt, w.negative_prompt, *w.regions) for w in filled]
        assert any(row[i] != row[i + 1] for row in columns)
    assert fill(words, wildcards, 5)[0] == filled[5]


# Arrays


def test_a_prompt_without_syntax_gives_exactly_the_tokenizers_ids(tokenizer):
    prompt, negative = "a red apple, noto style, on a blue background", "blurry"
    out, warnings = encode([Words(prompt, negative)], tokenizer, 20)
    assert out.ids.shape == (1, 1, 2, 1, 32)
    np.testing.assert_array_equal(out.ids[0, 0, :, 0], tokenizer([negative, prompt]))
    assert (out.token_weights == 1).all()
    assert out.part_weights.tolist() == [[[1.0]]]
    assert out.part_region.tolist() == [[-1]]
    assert out.starts.tolist() == [[0]]
    assert not warnings
    assert [a.dtype for a in out] == [np.int32, np.float32, np.float32, np.int32, np.int32]


def test_every_token_has_its_weight_and_marks_have_1(tokenizer):
    out, _ = encode([Words("a (red:1.5) apple", "[blue]")], tokenizer, 20)
    np.testing.assert_array_equal(out.ids[0, 0, :, 0], tokenizer(["blue", "a red apple"]))
    n = [int((row != tokenizer.eos_id).sum()) - 1 for row in out.ids[0, 0, :, 0]]
    assert n == [1, 3]
    np.testing.assert_allclose(out.token_weights[0, 0, 0, 0], [1, 1 / 1.1] + [1] * 30, rtol=1e-6)
    np.testing.assert_array_equal(out.token_weights[0, 0, 1, 0], [1, 1, 1.5] + [1] * 29)


def test_schedules_and_parts_are_padded_so_that_they_never_count(tokenizer):
    batch = [
        Words("a dog"),
        Words("[a red:a blue:0.25] apple AND a [cat:15]:0.5", "[x::10] y"),
        Words("a sky", regions=("a sun AND a moon:0.5", "a tree")),
    ]
    out, warnings = encode(batch, tokenizer, 20)
    assert not warnings
    assert out.starts.tolist() == [[0, 20, 20, 20], [0, 5, 10, 15], [0, 20, 20, 20]]
    assert out.part_weights[:, 0].tolist() == [[1, 0, 0, 0], [1, 0.5, 0, 0], [1, 1, 0.5, 1]]
    assert (out.part_weights == out.part_weights[:, :1]).all()
    assert out.part_region.tolist() == [[-1] * 4, [-1] * 4, [-1, 0, 0, 1]]
    texts = [["x y", "a red apple", "a"], ["x y", "a blue apple", "a"], ["y", "a blue apple", "a"],
             ["y", "a blue apple", "a cat"]]  # fmt: skip
    for phase, row in enumerate(texts):
        np.testing.assert_array_equal(out.ids[1, phase, :3, 0], tokenizer(row))
    np.testing.assert_array_equal(out.ids[2, 0, :, 0], tokenizer(["", "a sky", "a sun", "a moon", "a tree"]))
    np.testing.assert_array_equal(out.ids[0, 0, 2:, 0], tokenizer([""] * 3))


def test_literal_text_has_no_syntax(tokenizer):
    text = "(a:1.3) [b] AND c __d__ ("
    out, warnings = encode([Words(text, text)], tokenizer, 20, literal=True)
    np.testing.assert_array_equal(out.ids[0, 0, :, 0], tokenizer([text, text]))
    assert out.part_weights.shape == (1, 1, 1)
    assert not warnings


def test_and_in_a_negative_prompt_is_text_with_a_warning(tokenizer):
    out, warnings = encode([Words("a", "b AND c:0.5")], tokenizer, 20)
    np.testing.assert_array_equal(out.ids[0, 0, 0], tokenizer(["b AND c:0.5"]))
    assert warnings == ["AND joins whole prompts alone; inside brackets or a negative prompt it is text."]


def marked(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return tokenizer([text])[0]


def test_long_prompts_go_on_in_chunks_with_their_own_start_and_end(long_tokenizer):
    words = "cat " * 75
    for text, expected in [
        (words, [words]),
        (words + "dog", [words, "dog"]),
        # After the last comma, if it is one of the last 20 tokens; web UI: comma_padding_backtrack.
        ("cat " * 60 + ", " + "cat " * 14 + "dog", ["cat " * 60 + ",", "cat " * 14 + "dog"]),
        ("cat " * 55 + ", " + "cat " * 19 + "dog", ["cat " * 55 + ",", "cat " * 19 + "dog"]),
        ("cat " * 54 + ", " + "cat " * 20 + "dog", ["cat " * 54 + ", " + "cat " * 20, "dog"]),
        ("cat " * 60 + ", " + "cat " * 14 + ", dog", ["cat " * 60 + ", " + "cat " * 14, ", dog"]),
        ("cat " * 74 + ", dog", ["cat " * 74 + ",", "dog"]),
    ]:
        out, _ = encode([Words(text)], long_tokenizer, 20)
        chunks = out.ids[0, 0, 1]
        np.testing.assert_array_equal(chunks, long_tokenizer(expected))
        # The negative prompt has one chunk of its own, and the same again.
        np.testing.assert_array_equal(out.ids[0, 0, 0], long_tokenizer([""] * len(chunks)))


def test_chunks_do_not_cut_words_in_two(long_tokenizer):
    (long,) = long_tokenizer.encode(["xqzjk"])
    assert 2 <= len(long) <= 5
    text = "cat " * 74 + "xqzjk dog"
    out, _ = encode([Words(text)], long_tokenizer, 20)
    np.testing.assert_array_equal(out.ids[0, 0, 1], long_tokenizer(["cat " * 74, "xqzjk dog"]))
    endless = "xqzjk" * 200
    out, _ = encode([Words(endless)], long_tokenizer, 20)
    (tokens,) = long_tokenizer.encode([endless])
    chunks = out.ids[0, 0, 1]
    np.testing.assert_array_equal(chunks[:2, 1:-1].ravel(), tokens[:150])


def test_tokens_and_weights_stay_together_over_chunks(long_tokenizer):
    out, _ = encode([Words("cat " * 70 + ", (" + "dog " * 30 + ":1.5) owl")], long_tokenizer, 20)
    ids, weights = out.ids[0, 0, 1], out.token_weights[0, 0, 1]
    (dog,), (cat,) = long_tokenizer.encode(["dog", "cat"])
    assert (ids == dog).sum() == 30
    np.testing.assert_array_equal(weights, np.where(ids == dog, np.float32(1.5), np.float32(1)))
    assert (ids == cat).sum() == 70


def test_texts_of_fewer_chunks_repeat_theirs_whole(tokenizer):
    texts = ["a cat", "cat " * 40, "dog " * 100]
    out, _ = encode([Words(text) for text in texts], tokenizer, 20)
    assert out.ids.shape[3] == 4
    for i, text in enumerate(texts):
        alone, _ = encode([Words(text)], tokenizer, 20)
        own = alone.ids[0, 0, 1]
        assert len(own) in (1, 2, 4)
        np.testing.assert_array_equal(out.ids[i, 0, 1], np.tile(own, (4 // len(own), 1)))


@pytest.mark.parametrize("counts", [*((n,) for n in range(1, 9)), (3, 1), (3, 2), (3, 4), (5, 2), (7, 1), (6, 4, 3)])
def test_every_text_is_there_whole_and_as_often_as_it_fits(tokenizer, counts):
    texts = [" ".join(["cat"] * (30 * (n - 1) + 5)) for n in counts]
    out, warnings = encode([Words(text) for text in texts], tokenizer, 20)
    assert not warnings
    assert out.ids.shape[3] == math.lcm(*counts)
    for i, (text, n) in enumerate(zip(texts, counts, strict=True)):
        own = encode([Words(text)], tokenizer, 20)[0].ids[0, 0, 1]
        assert len(own) == n
        np.testing.assert_array_equal(out.ids[i, 0, 1], np.tile(own, (out.ids.shape[3] // n, 1)))


def test_numbers_of_chunks_without_a_small_common_multiple_are_told(tokenizer):
    texts = [" ".join(["cat"] * (30 * (n - 1) + 5)) for n in (5, 7)]
    out, warnings = encode([Words(text) for text in texts], tokenizer, 20)
    assert out.ids.shape[3] == 8
    assert len(warnings) == 2
    assert "5 chunks" in warnings[0]


def test_break_begins_a_new_chunk(tokenizer):
    out, warnings = encode([Words("a cat BREAK (a dog:1.5)")], tokenizer, 20)
    assert not warnings
    np.testing.assert_array_equal(out.ids[0, 0, 1], tokenizer(["a cat", "a dog"]))
    assert out.token_weights[0, 0, 1, 0].max() == 1
    assert out.token_weights[0, 0, 1, 1].max() == 1.5
    for text, same in (
        (r"a \BREAK b", "a break b"), ("BREAK a cat BREAK", "a cat"), ("BREAK", ""), ("a BREAKs b", "a breaks b"),
    ):  # fmt: skip
        np.testing.assert_array_equal(encode([Words(text)], tokenizer, 20)[0].ids[0, 0, 1], tokenizer([same]))
    literal = encode([Words("a BREAK b")], tokenizer, 20, literal=True)[0]
    np.testing.assert_array_equal(literal.ids[0, 0, 1], tokenizer(["a break b"]))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a cat <lora:x:0.8>", "LoRA"),
        ("embedding:bad-hands, a cat", "textual inversion"),
        ("a {red|blue} cat", "{red|blue}"),
        ("a (cat:1,3)", "point"),
    ],
)
def test_what_other_tools_write_is_told_and_stays_text(tokenizer, text, part):
    out, warnings = encode([Words(text)], tokenizer, 20)
    assert any(part in warning for warning in warnings)
    assert (out.ids[0, 0, 1] != tokenizer.eos_id).sum() > 4


def test_a_prompt_without_end_is_cut_with_a_warning(tokenizer):
    start = time.process_time()
    out, warnings = encode([Words("cat " * 100_000)], tokenizer, 20)
    assert out.ids.shape[3] == 32
    assert warnings == ["A prompt has 100000 tokens, more than 32 chunks of 30; what comes after the first 960 is left "
                        "out."]  # fmt: skip
    assert time.process_time() - start < 5


def test_no_text_is_an_error_in_a_batch(tokenizer):
    rng = random.Random(2)
    words = [
        *"()[]:\\ab1.| \ud800日",
        "AND",
        " AND ",
        " BREAK ",
        ":1.3)",
        ":0.5]",
        ":7]",
        "<|endoftext|>",
        ", ",
        "cat ",
    ]
    for _ in range(40):
        texts = ["".join(rng.choices(words, k=rng.randrange(80))) for _ in range(6)]
        out, _ = encode([Words(*texts[:2], tuple(texts[2:4])), Words(*texts[4:])], tokenizer, 9)
        b, phases, parts, chunks, length = out.ids.shape
        assert out.token_weights.shape == out.ids.shape
        assert out.part_weights.shape == (b, phases, parts - 1)
        assert (b, length) == (2, 32)
        assert 1 <= chunks <= 32
        assert (out.ids[..., 0] == tokenizer.bos_id).all()
        assert (np.diff(out.starts) >= 0).all()
        assert (out.starts[:, 0] == 0).all()


def test_what_makes_no_batch_is_refused(tokenizer):
    with pytest.raises(ValueError, match="No prompt was given"):
        encode([], tokenizer, 20)
    with pytest.raises(ValueError, match="steps is 0"):
        encode([Words("a")], tokenizer, 0)
