"""Draws images with the program in this folder; needs jax and numpy, and nothing else.

    python load.py "a red apple" --out apple.png

    import load
    model = load.Model("FOLDER")
    images = model(["a red apple"], seed=0, steps=30, guidance=7.5)  # uint8 [1, height, width, 3]

A program is code: draw with those alone that come from someone you trust. The checksums tell damage, not malice.
"""

import argparse
import hashlib
import json
import math
import re
import struct
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

FORMAT = 1
"""Of the folder: another number is another layout."""
PROGRAM, WEIGHTS, LEVELS = "program.stablehlo", "weights.safetensors", "levels.safetensors"
VOCAB, MERGES = "tokenizer/vocab.json", "tokenizer/merges.txt"
FILES = (PROGRAM, WEIGHTS, LEVELS, VOCAB, MERGES)
"""What `program.json` has checksums of."""
DTYPES = {"F16": jnp.float16, "BF16": jnp.bfloat16, "F32": jnp.float32, "I32": jnp.int32}
NUMBERS = {
    "guidance": 7.5, "eta": 0.0, "guidance_rescale": 0.0, "apg_eta": 1.0, "apg_norm_threshold": math.inf,
}  # fmt: skip
"""Numbers that a program may take, and what they are if nothing is said; `program.json` says what they mean."""


class Model:
    """A folder that `python -m jaxdiff.tools.export` wrote."""

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        """Reads the folder; the program is compiled at the first image.

        Args:
            folder: where `program.json` lies.
            verify: compares all files with their checksums, which reads them whole.

        Raises:
            ValueError: in one sentence, where anything is missing, damaged or does not fit together.
        """
        folder = Path(folder)
        self.about = about = read_about(folder / "program.json")
        if verify:
            check_files(folder, about["files"])
        platform = {"gpu": ("cuda", "rocm")}.get(jax.default_backend(), (jax.default_backend(),))
        if not set(platform) & set(about["platforms"]):
            raise ValueError(f"The program is for {', '.join(about['platforms'])}, but jax runs on "
                             f"{jax.default_backend()}; export it for that, or set JAX_PLATFORMS.")  # fmt: skip
        tensors = read_safetensors(folder / WEIGHTS)
        wanted = {name: tuple(entry["shape"]) for name, entry in about["weights"].items()}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if wanted != found:
            wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            raise ValueError(f"{folder / WEIGHTS} does not fit program.json: {len(wrong)} tensors are missing, unknown "
                             f"or of another shape, {', '.join(wrong[:5])} among them.")  # fmt: skip
        self._levels = read_levels(folder / LEVELS)
        text = about["tokenizer"]
        self.tokenizer = Tokenizer(read_json(folder / VOCAB), read_merges(folder / MERGES), **text)
        self._lowered = lowered((folder / PROGRAM).read_bytes(), about)
        self._weights = {name: jnp.asarray(tensors[name], entry["dtype"]) for name, entry in about["weights"].items()}

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of its images."""
        height, width, _ = self.about["outputs"]["images"]["shape"][1:]
        return width, height

    def __call__(
        self,
        prompts: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        seed: int = 0,
        steps: int | None = None,
        levels: tuple[Any, Any] | None = None,
        **numbers: float,
    ) -> np.ndarray:
        """Draws one image for each prompt.

        Args:
            prompts: taken as they are written, brackets and all; what is longer than the model reads is left out.
            negative_prompt: what to steer away from; one for all, or one each.
            seed: from 0 to 2^32 - 1; image i has `seed + i`.
            steps: denoising steps; None is the model's own.
            levels: noise levels (each step's first and last) in place of those for so many steps.
            numbers: numbers by their names in `NUMBERS`, as far as the program takes them.

        Returns:
            uint8 [images, height, width, 3].

        Raises:
            ValueError: in one sentence, for values that are none, and where an image comes to nothing.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        n, b = len(prompts), self.about["inputs"]["ids"]["shape"][0]
        negatives = [negative_prompt] * n if isinstance(negative_prompt, str) else list(negative_prompt)
        if not n or len(negatives) != n:
            raise ValueError(f"There are {n} prompts and {len(negatives)} negative prompts; give at least one prompt, "
                             "and one negative prompt for all or one each.")  # fmt: skip
        if not 0 <= seed <= 2**32 - n:
            raise ValueError(f"seed is {seed}; for {n} images it must lie from 0 to {2**32 - n}.")
        for name, value in numbers.items():
            if name not in NUMBERS or name not in self.about["inputs"]:
                known = [name for name in NUMBERS if name in self.about["inputs"]]
                raise ValueError(f"This program takes no {name}; it takes {', '.join(known)}.")
            if math.isnan(value):
                raise ValueError(f"{name} is {value}; it must be a number.")
        steps = int(self.about["defaults"]["steps"] if steps is None else steps)
        sigmas, sigmas_next = self.levels(steps) if levels is None else (np.asarray(part) for part in levels)
        if sigmas.ndim != 1 or sigmas.shape != sigmas_next.shape or not 0 < len(sigmas) <= self._most:
            raise ValueError(f"levels must be two rows of 1 to {self._most} noise levels, as many in each.")
        shared = {
            "sigmas": np.pad(sigmas, (0, self._most - len(sigmas))),
            "sigmas_next": np.pad(sigmas_next, (0, self._most - len(sigmas))),
            "steps": len(sigmas),
            **{name: numbers.get(name, value) for name, value in self.numbers.items()},
        }
        shared["guidance"] = max(1.0, shared["guidance"])  # less than none is none
        images = []
        for first in range(0, n, b):
            rows = [min(first + i, n - 1) for i in range(b)]  # the last batch is filled with its last image
            own = {
                "ids": np.stack([self.tokenizer([negatives[i], prompts[i]]) for i in rows]),
                "token_weights": np.ones(self.about["inputs"]["ids"]["shape"]),
                "seeds": [seed + i for i in rows],
            }
            images.append(self.draw(**{k: v for k, v in (shared | own).items() if k in self.about["inputs"]}))
        return np.concatenate(images)[:n]

    @property
    def numbers(self) -> dict[str, float]:
        """What stands in for each number that is not given."""
        return {**NUMBERS, "guidance": float(self.about["defaults"]["guidance"])}

    def draw(self, **inputs: Any) -> np.ndarray:
        """The program itself, once: `inputs` as `program.json` lists them, all of them."""
        known = self.about["inputs"]
        if inputs.keys() != known.keys():
            raise ValueError(f"The program takes {', '.join(sorted(known))}; given were {', '.join(sorted(inputs))}.")
        arrays = {name: np.asarray(value).astype(known[name]["dtype"]) for name, value in inputs.items()}
        for name, array in arrays.items():
            if array.shape != tuple(known[name]["shape"]):
                raise ValueError(f"{name} has the shape {array.shape}; the program takes {known[name]['shape']}.")
        out = self._compiled(self._weights, arrays)
        if not np.asarray(out["finite"]).all():
            raise ValueError("The image came to nothing: numbers overflowed. Use less guidance, or other levels.")
        return np.asarray(out["images"])

    def levels(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """The noise levels of so many steps: where each step begins, and where it ends."""
        sigmas, sigmas_next, ends = self._levels
        counts = np.diff(ends)
        if not 1 <= steps <= len(counts) or not counts[steps - 1]:
            able = np.flatnonzero(counts) + 1
            most = able.max(initial=0)
            some = "" if len(able) == most else ", but not all of them"
            raise ValueError(f"steps is {steps}; this program takes 1 to {most}{some}.")
        part = slice(ends[steps - 1], ends[steps])
        return sigmas[part], sigmas_next[part]

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return self._lowered.compile()

    @property
    def _most(self) -> int:
        return self.about["inputs"]["sigmas"]["shape"][0]


def lowered(program: bytes, about: dict[str, Any], device: Any = None) -> Any:
    """The module as a function of (weights, inputs), ready to be compiled for the device, or else the one at hand.

    JAX's own form of an exported function needs the package flatbuffers; here is the module alone. All that there is
    beside it is said by arguments and results, so those of a stand-in will do.

    Raises:
        ValueError: where this version of jax cannot read it, or it is for other arguments.
    """

    found = about["calling_convention_version"]
    low, high = (getattr(jax.export, f"{end}_supported_calling_convention_version") for end in ("minimum", "maximum"))
    if not low <= found <= high:
        raise ValueError(f"{PROGRAM} has the calling convention {found}; jax {jax.__version__} knows {low} to {high}.")
    place = None if device is None else jax.sharding.SingleDeviceSharding(device)

    def arrays(entries: dict[str, Any], sharding: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct(entry["shape"], jnp.dtype(entry["dtype"]), sharding=sharding)
            for name, entry in entries.items()
        }

    def stand_in(weights: Any, inputs: Any) -> Any:
        return {name: jnp.zeros(out.shape, out.dtype) for name, out in arrays(about["outputs"]).items()}

    try:
        outline = jax.export.export(jax.jit(stand_in, keep_unused=True), platforms=about["platforms"])
        exported = replace(
            outline(arrays(about["weights"]), arrays(about["inputs"])),
            mlir_module_serialized=program,
            calling_convention_version=about["calling_convention_version"],
        )
        return jax.jit(exported.call).lower(arrays(about["weights"], place), arrays(about["inputs"], place))
    except Exception as error:  # whatever reading a module raises
        reason = str(error).strip().partition("\n")[0].rstrip(":.") or type(error).__name__
        raise ValueError(f"{PROGRAM} is no program that jax {jax.__version__} can run with this program.json: "
                         f"{reason}. It was made by jax {about['made_by'].get('jax')}.") from error  # fmt: skip


# Files ----------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: for a file that is missing or holds anything else.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it is no JSON object.")
    return found


def read_about(path: Path) -> dict[str, Any]:
    """`program.json`, once all that is read of it is there and of its kind.

    Raises:
        ValueError: where not.
    """
    about = read_json(path)
    if about.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {about.get('format')!r}; this load.py reads {FORMAT}.")

    def is_array(entry: Any) -> bool:
        return (
            isinstance(entry, dict)
            and isinstance(entry.get("shape"), list)
            and all(type(side) is int and 0 <= side < 2**31 for side in entry["shape"])
            and entry.get("dtype") in ("float32", "float16", "bfloat16", "int32", "uint32", "uint8", "bool")
        )

    def has(name: str, *needed: tuple[str, int]) -> bool:
        entries = about.get(name)
        if not isinstance(entries, dict) or not all(map(is_array, entries.values())):
            return False
        return all(key in entries and len(entries[key]["shape"]) == rank for key, rank in needed)

    text = about.get("tokenizer")
    checks = {
        "platforms": lambda names: isinstance(names, list) and names and all(isinstance(name, str) for name in names),
        "calling_convention_version": lambda version: type(version) is int,
        "made_by": lambda made: isinstance(made, dict),
        "defaults": lambda own: (
            isinstance(own, dict)
            and all(type(own.get(name)) in (int, float) for name in ("steps", "guidance"))
            and all(math.isfinite(value) for value in own.values())
        ),
        "files": lambda files: isinstance(files, dict) and all(isinstance(files.get(name), str) for name in FILES),
        "weights": lambda _: has("weights"),
        "inputs": lambda _: (
            has("inputs", ("ids", 3), ("sigmas", 1), ("sigmas_next", 1), ("seeds", 1), ("steps", 0))
            and about["inputs"]["sigmas"]["shape"] == about["inputs"]["sigmas_next"]["shape"]
            and about["inputs"]["ids"]["shape"][:2] == [*about["inputs"]["seeds"]["shape"], 2]
            and 0 not in about["inputs"]["ids"]["shape"]
        ),
        "outputs": lambda _: (
            has("outputs", ("images", 4), ("finite", 1))
            and len(about["outputs"]) == 2
            and about["outputs"]["images"]["dtype"] == "uint8"
            and about["outputs"]["images"]["shape"][::3] == [about["inputs"]["ids"]["shape"][0], 3]
            and about["outputs"]["finite"] == {"shape": about["inputs"]["ids"]["shape"][:1], "dtype": "bool"}
        ),
        "tokenizer": lambda _: (
            isinstance(text, dict)
            and text.keys() == {"length", "start", "end", "pad", "special"}
            and all(type(text[name]) is int for name in ("length", "start", "end", "pad"))
            and text["length"] == about["inputs"]["ids"]["shape"][2]
            and isinstance(text["special"], dict)
            and all(token and type(i) is int for token, i in text["special"].items())
        ),
    }
    for name, check in checks.items():
        if not check(about.get(name)):
            raise ValueError(f"{path} is damaged: what it says of {name} is missing or makes no sense.")
    return about


def check_files(folder: Path, sums: dict[str, str]) -> None:
    """Compares the files with their SHA-256.

    Raises:
        ValueError: for one that is missing or another.
    """
    for name in FILES:
        try:
            with (folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"{folder / name} cannot be read: {error.strerror}.") from error
        if found != sums[name]:
            raise ValueError(f"{folder / name} is not the file that program.json was written with, or is damaged; "
                             "copy or export it again.")  # fmt: skip


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors, as views of the mapped file: a header's length, the header in JSON, and then raw numbers.

    Raises:
        ValueError: for a file that is cut short, damaged or of another kind.
    """
    damaged = f"{path} is damaged or cut short; copy or export it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, 10**8):
                raise ValueError(f"{damaged}.")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{damaged}.") from error
    if not isinstance(header, dict):
        raise ValueError(f"{damaged}.")
    data = np.memmap(path, np.uint8, "r")[8 + length :] if size > 8 + length else np.zeros(0, np.uint8)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if kind in DTYPES:
                dtype = np.dtype(DTYPES[kind])
                sensible = all(type(side) is int and side >= 0 for side in shape) and 0 <= begin <= end <= len(data)
                if sensible and end - begin == math.prod(shape) * dtype.itemsize:
                    tensors[name] = np.asarray(data[begin:end]).view(dtype).reshape(shape)
                    continue
        raise ValueError(f"{damaged}: its entry for {name} makes no sense.")
    return tensors


def read_levels(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The levels of all numbers of steps, those that each step ends at, and where the levels of each number end.

    Raises:
        ValueError: where there are none, or they do not go together.
    """
    tensors = read_safetensors(path)
    kinds = {name: (tensor.dtype, tensor.ndim) for name, tensor in tensors.items()}
    if kinds != {"sigmas": (np.float32, 1), "sigmas_next": (np.float32, 1), "ends": (np.int32, 1)}:
        raise ValueError(f"{path} holds no noise levels; export the model again.")
    sigmas, sigmas_next, ends = (tensors[name] for name in ("sigmas", "sigmas_next", "ends"))
    if not len(ends) or ends[0] != 0 or (np.diff(ends) < 0).any() or {len(sigmas), len(sigmas_next)} != {int(ends[-1])}:
        raise ValueError(f"{path} holds noise levels that do not go together; export the model again.")
    return sigmas, sigmas_next, ends


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of a `merges.txt`, the first to be merged first.

    Raises:
        ValueError: for a line that is no pair.
    """
    merges = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    for line in lines:
        if line.strip() and not line.startswith("#version"):
            left, space, right = line.rstrip("\r").partition(" ")
            if not space or not right or " " in right:
                raise ValueError(f"{path} is damaged: {line!r} is no pair of tokens.")
            merges.append((left, right))
    return merges


# Text -----------------------------------------------------------------------------------------------------------------

SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
"""White space as Unicode has it; Python's own takes four control characters for it, too."""
CLITICS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d")


class Tokenizer:
    """CLIP's: byte-level byte-pair encoding of lower-cased text.

    Letters that are newer than Python's own table of Unicode count as signs.
    """

    def __init__(
        self,
        vocab: dict[str, Any],
        merges: Sequence[tuple[str, str]],
        length: int,
        start: int,
        end: int,
        pad: int,
        special: dict[str, int],
    ) -> None:
        """Takes what `tokenizer/` and `program.json` hold; `special` are tokens that stand for themselves in a text.

        Raises:
            ValueError: for a vocabulary that is none.
        """
        if not vocab or not all(type(index) is int and 0 <= index < 2**31 for index in vocab.values()):
            raise ValueError(f"{VOCAB} is damaged: it must give each token a whole number from 0 on.")
        self.length, self.start, self.end, self.pad, self.special = length, start, end, pad, special
        self._vocab = vocab
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._pieces = lru_cache(10_000)(self._merged)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """The texts' tokens, int32 [texts, length]: start, tokens, end, padding; what does not fit is cut."""
        out = np.full((len(texts), self.length), self.pad, np.int32)
        for row, text in zip(out, texts, strict=True):
            ids = [self.start, *self.encode(text)[: self.length - 2], self.end]
            row[: len(ids)] = ids
        return out

    def encode(self, text: str) -> list[int]:
        """A text's tokens, without start and end, nothing cut."""
        text = text.encode("utf-8", "replace").decode()  # lone surrogates, which a shell can pass
        parts = self._special.split(text) if self.special else [text]
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.special[part])
                continue
            part = SPACES.sub(" ", unicodedata.normalize("NFC", part))
            for word in words("".join(c.lower() for c in part)):  # by itself, no sigma is the last of a word
                ids += self._pieces(word)
        return ids

    @cached_property
    def _special(self) -> re.Pattern[str]:
        longest = sorted(self.special, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest)) + ")")

    def _merged(self, word: str) -> list[int]:
        """A word's tokens: its bytes, the last marked, and neighbours merged, in the order of the file."""
        tokens = [BYTES[byte] for byte in word.encode()]
        tokens[-1] += "</w>"
        tokens = [token if token in self._vocab else "" for token in tokens]
        while len(tokens) > 1:
            pair = min(pairwise(tokens), key=lambda pair: self._ranks.get(pair, math.inf))
            if pair not in self._ranks:
                break
            merged, i = [], 0
            while i < len(tokens):
                both = tuple(tokens[i : i + 2]) == pair
                merged.append("".join(pair) if both else tokens[i])
                i += 1 + both
            tokens = merged
        return [self._vocab.get(token, self.end) for token in tokens]


def words(text: str) -> Iterator[str]:
    """CLIP's words: marks, endings after an apostrophe, letters, single numerals, and whatever else stands together."""
    i = 0
    while i < len(text):
        if found := CLITICS.match(text, i):
            # The marks' own signs part again, since bytes are split once more, by the rule of GPT-2.
            whole = found.group()
            yield from (whole[:2], whole[2:-2], whole[-2:]) if whole.startswith("<") else (whole,)
            i = found.end()
            continue
        kind, start = _kind(text[i]), i
        i += 1
        while kind in "LO" and i < len(text) and _kind(text[i]) == kind:
            i += 1
        if kind != " ":
            yield text[start:i]


@lru_cache(10_000)
def _kind(c: str) -> str:
    """L, N, O or a space: letter, numeral, other."""
    if SPACES.match(c):
        return " "
    kind = unicodedata.category(c)[0]
    return kind if kind in "LN" else "O"


def _bytes() -> list[str]:
    """A printable character for each byte: its own where it has one, else one from 256 on (GPT-2)."""
    out, more = [], 256
    for byte in range(256):
        own = 33 <= byte <= 126 or (161 <= byte <= 255 and byte != 173)
        out.append(chr(byte if own else more))
        more += not own
    return out


BYTES = _bytes()


# Images -------------------------------------------------------------------------------------------------------------


def png(image: np.ndarray, settings: dict[str, Any]) -> bytes:
    """uint8 [height, width, 3] as a PNG, with the settings as JSON in its text chunk `jaxdiff`."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image)  # each is stored as it is, which 0 says
    return b"".join((
        b"\x89PNG\r\n\x1a\n",
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        chunk(b"tEXt", b"jaxdiff\0" + json.dumps(settings).encode()),
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ))  # fmt: skip


def write_new(path: Path, data: bytes) -> Path:
    """Writes `path`, or `stem-2.png` and so on beside it: a file that is there is never touched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    n = 1
    while True:
        place = path if n == 1 else path.with_stem(f"{path.stem}-{n}")
        try:
            with place.open("xb") as file:
                file.write(data)
            return place
        except FileExistsError:
            n += 1


# The command ----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; errors are a sentence and exit code 2."""
    parser = argparse.ArgumentParser(description="Draws images with the program in this folder.")
    parser.add_argument("prompts", nargs="+", help="what to draw; taken as written")
    parser.add_argument("--out", type=Path, default=Path("image.png"), help="a PNG; several are numbered")
    parser.add_argument("--negative", default="", help="what to steer away from")
    parser.add_argument("--n", type=int, default=1, help="images of each prompt")
    parser.add_argument("--seed", type=int, default=0, help="the first image's; image i has SEED + i")
    parser.add_argument("--steps", type=int, help="denoising steps; the model's own if not given")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where program.json lies")
    for name, value in NUMBERS.items():
        usual = "the model's own" if name == "guidance" else f"{value:g}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help=f"{usual} if not given; see program.json")
    args = parser.parse_args(argv)
    numbers = {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    try:
        if args.n < 1:
            raise ValueError(f"--n is {args.n}; it must be at least 1.")
        if args.out.suffix.lower() != ".png":
            raise ValueError(f"--out is {args.out}; its name must end in .png.")
        model = Model(args.folder)
        prompts = [prompt for prompt in args.prompts for _ in range(args.n)]
        for prompt in dict.fromkeys((*prompts, args.negative)):
            if (n := len(model.tokenizer.encode(prompt))) > model.tokenizer.length - 2:
                print(f"warning: {prompt[:40]!r}... has {n} tokens; those after the first "
                      f"{model.tokenizer.length - 2} are left out", file=sys.stderr)  # fmt: skip
        steps = int(model.about["defaults"]["steps"] if args.steps is None else args.steps)
        images = model(prompts, args.negative, args.seed, steps, **numbers)
        taken = {
            name: numbers.get(name, value) for name, value in model.numbers.items() if name in model.about["inputs"]
        }
        for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            settings = {
                "prompt": prompt, "negative_prompt": args.negative, "seed": args.seed + i, "steps": steps,
                **{name: value for name, value in taken.items() if math.isfinite(value)},
                **{name: model.about.get(name) for name in ("sampler", "schedule", "model", "dtype")},
                "width": image.shape[1], "height": image.shape[0], "literal": True,
            }  # fmt: skip
            named = args.out if len(images) == 1 else args.out.with_stem(f"{args.out.stem}-{args.seed + i}")
            print(write_new(named, png(image, settings)), flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
