"""Requests: what each field takes, what goes together, and that JSON, forms and old names give the same request."""

import json
import random
import re
from dataclasses import fields, replace

import numpy as np
import pytest

from jaxdiff.generation.request import MAX_N, RENAMED, Region, Request

PHOTO = np.zeros((4, 6, 3), np.uint8)


def test_a_request_is_json_and_back():
    chance = random.Random(0)
    texts = ("", "a dog", 'a "red" apple, (big:1.2)\n', "日本", " __x__ ")
    kinds = {
        **dict.fromkeys(("prompt", "negative_prompt", "source_prompt"), lambda: chance.choice(texts)),
        "to_prompt": lambda: chance.choice(texts),
        "image_guidance": lambda: chance.uniform(1, 3),
        **dict.fromkeys(("image", "mask", "depth"), lambda: chance.choice(["a.png", "sub folder/b.jpg"])),
        **dict.fromkeys(("seed", "to_seed"), lambda: chance.randrange(2**31)),
        **dict.fromkeys(("n", "steps", "tile", "cache_interval"), lambda: chance.randint(1, 99)),
        "guidance": lambda: chance.uniform(-9, 30),
        "pag_scale": lambda: chance.uniform(0, 30),
        "apg_momentum": lambda: chance.uniform(-0.9, 0.9),
        "clip_skip": lambda: chance.randint(0, 2),
        **dict.fromkeys(("eta", "strength", "mix", "keep_layout", "guidance_rescale", "apg_eta"), chance.random),
        **dict.fromkeys(("feather", "apg_norm_threshold"), lambda: chance.expovariate(1)),
        **dict.fromkeys(("upscale", "latent_upscale"), lambda: chance.randint(1, 3)),
        "guidance_interval": lambda: tuple(sorted((chance.uniform(0, 15), chance.uniform(0, 15)))),
        "size": lambda: (chance.randrange(999), chance.randrange(999)),
        "original_size": lambda: (chance.randint(1, 999), chance.randint(1, 999)),
        "crop": lambda: (chance.randrange(99), chance.randrange(99)),
        "aesthetic_score": lambda: chance.uniform(0, 10),
        "refiner_start": chance.random,
        "outpaint": lambda: tuple(chance.randrange(99) for _ in range(4)),
        "regions": lambda: tuple(Region(prompt, (0.1, 0.0, 0.1 + chance.random() / 2, 1.0)) for prompt in texts[:2]),
        "sampler": lambda: chance.choice(["ddim", "euler", "unipc", "lcm", "tcd"]),
        "schedule": lambda: chance.choice(["model", "karras", "align_your_steps"]),
        "invert": lambda: chance.choice(["ddim", "exact"]),
        "rng": lambda: chance.choice(["jax", "torch"]),
        **dict.fromkeys(("literal", "control_guess"), lambda: chance.random() < 0.5),
        "control_image": lambda: chance.choice(["a.png", ("a.png",), ("a.png", "b.jpg")]),
        "control_scale": lambda: chance.choice([0.5, (1.5,), (-0.5, 2.0)]),
        "control_start": lambda: chance.choice([0.25, (0.0, 0.5)]),
        "control_end": lambda: chance.choice([0.75, (1.0, 0.625)]),
        "image_prompt": lambda: chance.choice(["a.png", ("a.png",), ("a.png", "b.jpg")]),
        "image_prompt_scale": lambda: chance.choice([0.5, (1.5,), (-0.5, 2.0)]),
        "noise_level": lambda: chance.randrange(999),
    }
    assert {*kinds, "latents"} == {one.name for one in fields(Request)}
    checked = set()
    for _ in range(2000):
        names = chance.choice([(), ("image",), ("image", "invert"), ("control_image",), ("image_prompt",)])
        wanted = {*names, *chance.sample(sorted(kinds), chance.randint(1, 5))}
        values = {name: kinds[name]() for name in sorted(wanted)}
        request = Request(**values)
        try:
            request.check()
        except ValueError:
            continue
        assert Request.of(request.values()) == request
        assert Request.of(json.loads(json.dumps(request.values()))) == request
        checked |= set(values)
    assert checked == set(kinds)


def test_text_stands_for_any_value():
    """As forms and CSV files have it."""
    box = '[{"prompt": "b", "box": [0, 0, 0.5, 1]}]'
    given = {"prompt": "a", "steps": " 20 ", "guidance": "4", "size": "64 x 48", "seed": "", "literal": "True",
             "regions": box, "guidance_interval": "0.5 2", "to_seed": "3", "cache_interval": "1"}  # fmt: skip
    assert Request.of(given) == Request(
        "a", steps=20, guidance=4.0, size=(64, 48), literal=True, regions=(Region("b", (0.0, 0.0, 0.5, 1.0)),),
        guidance_interval=(0.5, 2.0), to_seed=3,
    )  # fmt: skip
    around = {"prompt": "a", "image": "a.png", "outpaint": "8 0,0;4"}
    assert Request.of(around).outpaint == (8, 0, 0, 4)


def test_what_is_not_given_comes_from_the_defaults_and_an_empty_prompt_is_given():
    defaults = {"negative_prompt": "ugly", "steps": 7, "seed": 9}
    request = Request.of({"prompt": "a\ud800", "negative_prompt": "", "steps": None, "seed": ""}, defaults)
    assert request == Request("a?", "", 9, steps=7), "UTF-8 holds no half of a pair"


def test_numbers_of_any_library_are_the_numbers_of_python():
    request = Request(
        steps=np.int8(5), guidance=np.float32(0.5), seed=np.uint32(3), size=np.array([8, 6]), eta=True + 0
    )
    assert request == Request(steps=5, guidance=0.5, seed=3, size=(8, 6), eta=1.0)
    assert {type(getattr(request, name)) for name in ("steps", "seed")} == {int}
    assert {type(getattr(request, name)) for name in ("guidance", "eta")} == {float}
    json.dumps(request.values())


def test_a_mask_is_the_same_in_bits_bytes_and_numbers():
    bits = np.arange(24).reshape(4, 6) % 3 == 0
    for mask in (bits, bits * np.uint8(255), bits.astype(np.uint8), bits.astype(np.float64), bits.astype(int)):
        np.testing.assert_array_equal(Request(image=PHOTO, mask=mask).mask, bits.astype(np.float32))


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"prompt": None}, ("prompt is None",)),
        ({"prompt": b"x"}, ("prompt is b'x'",)),
        ({"negative_prompt": 5}, ("negative_prompt is 5",)),
        ({"seed": -1}, ("seed is -1", "0 or more")),
        ({"seed": 2**32}, ("seed is 4294967296", "rng 'jax'", "4294967295")),
        ({"seed": 2**64, "rng": "torch"}, (f"seed is {2**64}", f"{2**64 - 1}")),
        ({"to_seed": 2**32}, ("to_seed is 4294967296", "4294967295")),
        ({"seed": 2**32 - 1, "n": 2}, ("seed is 4294967295", "4294967294")),
        ({"to_seed": 1.0}, ("to_seed is 1.0",)),
        ({"n": 0}, ("n is 0", "1")),
        ({"n": MAX_N + 1}, (f"n is {MAX_N + 1}", f"{MAX_N}")),
        ({"steps": 0}, ("steps is 0", "1")),
        ({"steps": 2.0}, ("steps is 2.0",)),
        ({"steps": True}, ("steps is True",)),
        ({"steps": "many"}, ("steps is 'many'",)),
        ({"guidance": np.nan}, ("guidance is nan",)),
        ({"guidance": 1j}, ("guidance is 1j",)),
        ({"guidance": "7"}, ("guidance is '7'",)),
        ({"guidance": 10**400}, ("guidance is 1000",)),
        ({"guidance": 1e39}, ("guidance is 1e+39",)),
        ({"guidance": [1.0, 2.0]}, ("guidance is [1.0, 2.0]",)),
        ({"guidance": 10**5000}, ("guidance is a number of thousands of digits",)),
        ({"size": [[1], [1, 2]]}, ("size is [1]",)),
        ({"pag_scale": -np.inf}, ("pag_scale is -inf",)),
        ({"eta": 1.5}, ("eta is 1.5", "0 to 1")),
        ({"eta": None}, ("eta is None", "0 to 1")),
        ({"mix": -0.1}, ("mix is -0.1", "0 to 1")),
        ({"strength": 1.01}, ("strength is 1.01", "0 to 1")),
        ({"guidance_rescale": 2}, ("guidance_rescale is 2", "0 to 1")),
        ({"feather": -1}, ("feather is -1", "0")),
        ({"apg_norm_threshold": -1}, ("apg_norm_threshold is -1", "0")),
        ({"cache_interval": 0}, ("cache_interval is 0", "1")),
        ({"upscale": 0}, ("upscale is 0", "1")),
        ({"upscale": 100}, ("upscale is 100", "16")),
        ({"pag_scale": -1.0}, ("pag_scale is -1.0", "0")),
        ({"latent_upscale": 1.5}, ("latent_upscale is 1.5",)),
        ({"tile": -8}, ("tile is -8", "1")),
        ({"guidance_interval": (3, 1)}, ("guidance_interval is (3, 1)",)),
        ({"guidance_interval": (-1, 1)}, ("guidance_interval is (-1, 1)", "0")),
        ({"guidance_interval": (0, np.nan)}, ("guidance_interval is (0, nan)",)),
        ({"guidance_interval": 3}, ("guidance_interval is 3",)),
        ({"sampler": "dddim"}, ("sampler is 'dddim'", "'ddim'")),
        ({"sampler": ["ddim"]}, ("sampler is ['ddim']",)),
        ({"schedule": "karas"}, ("schedule is 'karas'", "'karras'")),
        ({"invert": "magic"}, ("invert is 'magic'", "exact")),
        ({"rng": "numpy"}, ("rng is 'numpy'", "torch")),
        ({"literal": 1}, ("literal is 1",)),
        ({"size": 64}, ("size is 64",)),
        ({"size": (64,)}, ("size is (64,)",)),
        ({"size": "64by64"}, ("size is '64by64'", "64x64")),
        ({"size": (16.0, 16)}, ("size is 16.0",)),
        ({"outpaint": (1, 2)}, ("outpaint is (1, 2)",)),
        ({"outpaint": (-2, 0, 0, 0)}, ("outpaint is (-2, 0, 0, 0)", "0")),
        ({"image": np.zeros((4, 4, 3))}, ("image", "uint8", "float64 [4, 4, 3]")),
        ({"image": np.zeros((4, 4), np.uint8)}, ("image", "[4, 4]")),
        ({"image": ""}, ("image is ''", "file")),
        ({"image": "caf\udce9.png"}, ("image is 'caf", "UTF-8")),
        ({"image": [[1], [1, 2]]}, ("image",)),
        ({"mask": np.full((4, 4), 2.0)}, ("mask", "0", "1")),
        ({"mask": np.full((4, 4), np.nan)}, ("mask", "0", "1")),
        ({"mask": 5}, ("mask", "0", "1")),
        ({"latents": np.full((8, 8, 4), np.nan)}, ("latents", "[8, 8, 4]")),
        ({"latents": np.zeros((1, 8, 8, 4))}, ("latents", "[1, 8, 8, 4]")),
        ({"latents": np.zeros((8, 8, 4), complex)}, ("latents",)),
        ({"latents": [[1], [1, 2]]}, ("latents",)),
        ({"regions": "left"}, ("regions is 'left'",)),
        ({"regions": [{"prompt": "b"}]}, ("regions[0] is {'prompt': 'b'}",)),
        ({"regions": [("a", (0, 0, 1, 1)), (5, (0, 0, 1, 1))]}, ("regions[1] is (5,",)),
        ({"regions": [("a", (0, 0, 2, 1))]}, ("regions[0].box is (0, 0, 2, 1)", "1")),
        ({"regions": [("a", {"l": [0]})]}, ("regions[0].box", "[]")),
        ({"regions": [("a", np.full((4, 4), -1))]}, ("regions[0].box", "0", "1")),
        ({"regions": [("a", np.zeros((4, 4)))]}, ("regions[0].box selects nothing",)),
        ({"size": np.array(1)}, ("size is",)),
    ],
)
def test_a_field_out_of_range_or_of_another_kind_is_named_with_its_value_and_its_rule(values, parts):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, parts))):
        Request(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"strength": 0.5}, "strength is 0.5.*image"),
        ({"mask": np.ones((4, 6))}, "mask.*image"),
        ({"upscale": 1}, "upscale is 1.*image"),
        ({"latent_upscale": 2}, "latent_upscale is 2.*image"),
        ({"outpaint": (1, 0, 0, 0)}, r"outpaint is \(1, 0, 0, 0\).*image"),
        ({"invert": "ddim"}, "invert is 'ddim'.*image"),
        ({"keep_layout": 0.5}, "keep_layout.*invert"),
        ({"mix": 0.25}, r"mix is 0\.25.*to_prompt.*to_seed"),
        ({"image": PHOTO, "feather": 2}, "feather is 2.*mask.*outpaint"),
        ({"source_prompt": "a"}, "source_prompt.*invert"),
        ({"image": PHOTO, "invert": "ddim", "mask": np.ones((4, 6))}, "invert.*mask"),
        ({"image": PHOTO, "invert": "ddim", "latents": np.zeros((2, 3, 4))}, "invert.*latents"),
        ({"image": PHOTO, "outpaint": (0, 0, 0, 0)}, "outpaint"),
        ({"image": PHOTO, "outpaint": (2, 0, 0, 0), "mask": np.ones((4, 6))}, "outpaint.*mask"),
        ({"image": PHOTO, "outpaint": (2, 0, 0, 0), "upscale": 2}, "outpaint.*upscale"),
        ({"image": PHOTO, "latent_upscale": 2, "upscale": 2}, "upscale.*latent_upscale"),
        ({"image": PHOTO, "latent_upscale": 2, "mask": np.ones((4, 6))}, "latent_upscale.*mask"),
        ({"image": PHOTO, "latent_upscale": 2, "invert": "ddim"}, "latent_upscale.*invert"),
        ({"image": PHOTO, "upscale": 2, "size": (12, 8)}, "upscale.*size"),
        ({"to_prompt": "b", "regions": [("c", (0, 0, 1, 1))]}, "to_prompt.*regions"),
        ({"tile": 8, "cache_interval": 2}, "cache_interval.*tile"),
        ({"sampler": "pndm", "schedule": "karras"}, "pndm.*karras.*model"),
        ({"sampler": "euler", "eta": 1.0}, "eta is 1.*euler.*ddim"),
        ({"sampler": "lcm", "cache_interval": 2}, "cache_interval is 2.*lcm"),
        ({"sampler": "dpmpp_sde", "rng": "torch"}, "rng.*torch.*dpmpp_sde"),
        ({"control_scale": 0.5}, r"control_scale is \(0.5,\).*control_image"),
        ({"control_image": "a.png", "control_scale": (0.5, 1.0)}, "2 of control_scale for 1 control images"),
        ({"control_image": "a.png", "control_start": 0.5, "control_end": 0.5}, "control_start is 0.5.*before it ends"),
        ({"control_image": ("a.png",) * 2, "control_end": 0.5, "control_start": (0.0, 0.75)}, "control_start is 0.75"),
        ({"control_image": "a.png", "cache_interval": 2}, "cache_interval.*control_image"),
    ],
)
def test_fields_that_do_not_go_together_are_named(values, words):
    with pytest.raises(ValueError, match=words):
        Request(**values).check()


def test_a_message_stays_short_whatever_was_given():
    with pytest.raises(ValueError, match="sampler") as refused:
        Request(sampler="x" * 100_000)
    assert len(str(refused.value)) < 1000


def test_an_unknown_name_is_answered_with_the_nearest_and_no_prompt_is_told():
    for values, words in (
        ({"prompt": "a", "stepz": 3}, "'stepz'.*'steps'"),
        ({"prompt": "a", "guidance_scale": 3}, "here it is guidance"),
        ({"seed": 3}, "prompt"),
    ):
        with pytest.raises(ValueError, match=words):
            Request.of(values)


def test_names_until_version_0_1_are_taken_with_a_warning():
    values = {"grid": "karras", "share": 0.2, "enlarge": 2, "keep": 0.1, "window": 8, "noise": "torch", "rescale": 0.5,
              "parallel": 0.0, "limit": 3.0, "perturbed": 2.0, "to_prompts": "b", "negative": "c"}  # fmt: skip
    assert set(values) == set(RENAMED)
    for old, value in values.items():
        new = RENAMED[old]
        needed = {"image": "a.png"} if old in ("enlarge", "keep") else {}
        needed |= {"invert": "ddim"} if old == "keep" else {"to_seed": 1} if old == "share" else {}
        with pytest.warns(FutureWarning, match=f"{old} .*{new}"):
            request = Request.of({"prompt": "a", old: value} | needed)
        assert request == replace(Request("a", **needed), **{new: value})


def test_the_images_of_a_request_have_seeds_one_after_another():
    assert Request("a", seed=5, n=3).images(9) == [Request("a", seed=seed) for seed in (5, 6, 7)]
    assert Request("a", n=2).images(9) == [Request("a", seed=seed) for seed in (9, 10)]
    assert Request("a", seed=2**32 - 2, n=2).images(0)[-1].seed == 2**32 - 1
