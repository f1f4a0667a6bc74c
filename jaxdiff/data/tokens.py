"""The CLIP tokenizer: byte-level BPE over lower-cased text, in the files that transformers reads and writes."""

import gzip
import itertools
import json
import logging
import re
import unicodedata
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from jaxdiff.config import load_json, naming

logger = logging.getLogger(__name__)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
_CLIP_MERGES = 48_894  # of the 262,144 in OpenAI's file, CLIP takes the first
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Text -> int32 [b, max_length]: start, tokens, end, padding.

    As transformers' CLIPTokenizer, and unlike the reference CLIP, it neither runs `ftfy.fix_text` nor unescapes HTML
    first: curly quotes and `&amp;` stay as they are written.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        max_length: int = 77,
        pad_token: str = EOS,
        bos_token: str = BOS,
        eos_token: str = EOS,
    ) -> None:
        if max_length < 3:
            raise ValueError(f"max_length is {max_length}; it must be at least 3, for start, end and one token.")
        self._backend, self.max_length = backend, max_length
        self.pad_token, self.bos_token, self.eos_token = pad_token, bos_token, eos_token
        backend.no_padding()
        backend.no_truncation()
        self.bos_id, self.eos_id, self.pad_id = (_id(backend, token) for token in (bos_token, eos_token, pad_token))
        # Typed in a prompt they are themselves; so is the padding token, as in transformers.
        backend.add_special_tokens([bos_token, eos_token, pad_token])

    @classmethod
    def load(cls, folder: str | Path, max_length: int = 77) -> "Tokenizer":
        """Reads a tokenizer in any layout of transformers' CLIPTokenizer, and makes the tokens that it makes.

        The vocabulary and the merges come from `tokenizer.json`, or OpenAI's own file of CLIP's merges, or `vocab.json`
        and `merges.txt`; tokens that were added to them from the `added_tokens_decoder` of `tokenizer_config.json`, or
        else from `added_tokens.json` and `tokenizer.json`; special tokens from `tokenizer_config.json` and
        `special_tokens_map.json`.

        Raises:
            ValueError: where the files are missing or no tokenizer of this kind.
        """
        folder = Path(folder)
        vocab, merges, in_file = _read_bpe(folder)
        config, named_in_map, added_in_map = (
            load_json(folder / name) if (folder / name).is_file() else {}
            for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        )
        for name, only in (("padding_side", "right"), ("split_special_tokens", False)):
            if config.get(name, only) != only:
                raise ValueError(f"{folder}: {name} is {config[name]!r} in tokenizer_config.json; supported: {only!r}.")
        named: dict[str, Any] = dict.fromkeys(NAMED, EOS) | {"bos_token": BOS} | _given(config)
        added: dict[int, AddedToken] = {}
        if "added_tokens_decoder" in config:  # it is complete: transformers reads nothing else beside it
            listed = config["added_tokens_decoder"]
            if not isinstance(listed, dict) or not all(i.isdecimal() and i.isascii() for i in listed):
                raise ValueError(f"{folder}: added_tokens_decoder in tokenizer_config.json must be tokens by number.")
            added = {int(i): _added(folder, token) for i, token in listed.items()}
        else:
            named |= _given(named_in_map)
        extra = [_added(folder, token) for token in _tokens(folder, named.pop("extra", []))]
        tokens = {name: _added(folder, token) for name, token in named.items()}
        if "added_tokens_decoder" not in config:
            # transformers does not count the map's additional_special_tokens here.
            known = _given(config).get("extra", []) if "extra_special_tokens" not in named_in_map else extra
            known = [_added(folder, token) for token in _tokens(folder, known)]
            special = {token.content for token in (*tokens.values(), *known)}
            for content, i in added_in_map.items():
                added[i] = AddedToken(content, normalized=content not in special, special=content in special)
            added |= {token["id"]: _added(folder, token) for token in in_file}
        by_content = {token.content: token for token in added.values()}
        tokens = {name: by_content.get(token.content, token) for name, token in tokens.items()}

        with naming(folder):
            backend = _backend(vocab, merges, tokens["unk_token"].content)
        for mark in (tokens["bos_token"].content, tokens["eos_token"].content):
            if mark not in vocab and mark not in by_content:
                raise ValueError(f"{folder}: the tokenizer's vocabulary lacks {mark!r}.")
        if tokens["unk_token"].content not in vocab and (missing := _missing_bytes(vocab)):
            raise ValueError(
                f"{folder}: the tokenizer's vocabulary lacks {missing[0]!r} and {len(missing) - 1} other bytes, and "
                f"{tokens['unk_token'].content!r} for what it lacks."
            )
        backend.add_tokens([added[i] for i in sorted(added)])
        backend.add_special_tokens([*tokens.values(), *(token for token in extra if token.content not in by_content)])
        moved = {token.content: (i, backend.token_to_id(token.content)) for i, token in added.items()}
        if moved := {content: ids for content, ids in moved.items() if ids[0] != ids[1]}:
            logger.warning(
                "%s: added tokens take the first ids that are free after the vocabulary, as in transformers, and not "
                "those of the files: %s. A model that was trained with the files' ids reads other words.",
                folder,
                ", ".join(f"{content!r} is {found}, not {i}" for content, (i, found) in moved.items()),
            )
        pad, bos, eos = (tokens[f"{name}_token"].content for name in ("pad", "bos", "eos"))
        with naming(folder):
            return cls(backend, max_length, pad, bos, eos)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, max_length: int = 77) -> "Tokenizer":
        """Learns the merges from `texts`; the vocabulary has CLIP's layout: bytes, bytes that end a word, merges."""
        alphabet = _alphabet()
        n_merges = vocab_size - 2 * len(alphabet) - 2
        if n_merges < 1:
            raise ValueError(
                f"vocab_size is {vocab_size}; it must be above {2 * len(alphabet) + 2}, the bytes and marks."
            )
        backend = _backend({BOS: 0, EOS: 1}, [])
        trainer: Any = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
        )
        backend.train_from_iterator(texts, trainer)
        merges = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]][:n_merges]
        return cls(_backend(_vocabulary(merges), merges), max_length)

    def padded_with(self, index: int | None) -> "Tokenizer":
        """This tokenizer, which fills up with the token of this number; None is the end token.

        Raises:
            ValueError: where there is no such token.
        """
        index = self.eos_id if index is None else index
        if index == self.pad_id:
            return self
        if (token := self._backend.id_to_token(index)) is None:
            raise ValueError(f"The tokenizer has no token {index}, with which prompts are to be filled up.")
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        return Tokenizer(backend, self.max_length, token, self.bos_token, self.eos_token)

    def with_words(self, words: Mapping[str, int]) -> "Tokenizer":
        """This tokenizer with further words, each of so many tokens of its own: the first that are free, in order.

        A word is found in any case, and whole: zebra is not in zebras. The tokens of a word of three are named as
        diffusers names them, zebra, zebra_1 and zebra_2.

        Raises:
            ValueError: where a name is a token already, or two words have one name.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        taken = {_folded(token.content) for token in self._backend.get_added_tokens_decoder().values()}
        taken |= self._backend.get_vocab(False).keys()  # dog may be the beginning of others
        for word, n in words.items():
            for name in (_nth(word, i) for i in range(n)):
                if {name, _folded(name)} & taken:
                    raise ValueError(f"The tokenizer has a token {name!r} already; give {word!r} another name.")
                taken.add(_folded(name))
                # What ends in no letters itself, such as <cat>, is whole wherever it stands.
                whole = re.fullmatch(r"\W.*\W|\W", name) is None
                backend.add_tokens([AddedToken(name, single_word=whole, normalized=True)])
        return Tokenizer(backend, self.max_length, self.pad_token, self.bos_token, self.eos_token)

    @cached_property
    def words(self) -> dict[str, tuple[int, ...]]:
        """The further words, and the tokens of each."""
        added = {token.content: i for i, token in self._backend.get_added_tokens_decoder().items() if not token.special}
        found: dict[str, tuple[int, ...]] = {}
        for word in added:
            names = itertools.takewhile(added.__contains__, map(partial(_nth, word), itertools.count()))
            found[word] = tuple(added[name] for name in names)
        later = {i for ids in found.values() for i in ids[1:]}
        return {word: ids for word, ids in found.items() if ids[0] not in later}

    def save(self, folder: str | Path) -> None:
        """Writes the four files that transformers' CLIPTokenizer loads.

        Raises:
            OSError: where they cannot be written.

        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._backend.model.save(str(folder))
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise OSError(f"{folder} cannot be written: {error}.") from error
        unknown = self._backend.model.unk_token  # pyright: ignore[reportAttributeAccessIssue]
        special = {"bos_token": self.bos_token, "eos_token": self.eos_token, "unk_token": unknown}
        special |= {"pad_token": self.pad_token}
        added = self._backend.get_added_tokens_decoder().items()
        flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        config = special | {
            "added_tokens_decoder": {str(i): {flag: getattr(token, flag) for flag in flags} for i, token in added},
            "model_max_length": self.max_length,
            "tokenizer_class": "CLIPTokenizer",
            "do_lower_case": True,
        }
        for name, values in (("special_tokens_map.json", special), ("tokenizer_config.json", config)):
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        """The rows that an embedding of the tokens needs: the largest id, and one."""
        return max(self._backend.get_vocab().values()) + 1

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "b t"]:
        """The texts' tokens; what does not fit is cut (see `cut`)."""
        out = np.full((len(texts), self.max_length), self.pad_id, np.int32)
        for row, tokens in zip(out, self.encode(texts), strict=True):
            ids = [self.bos_id, *tokens[: self.max_length - 2], self.eos_id]
            row[: len(ids)] = ids
        return out

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's tokens alone: no start, no end, no padding, nothing cut."""
        encodings = self._backend.encode_batch([_clean(text) for text in texts], add_special_tokens=False)
        if not self._runs:
            return [encoding.ids for encoding in encodings]
        return [[i for token in encoding.ids for i in self._runs.get(token, (token,))] for encoding in encodings]

    @cached_property
    def _runs(self) -> dict[int, tuple[int, ...]]:
        """The tokens of further words of several, by the first, which stands for all where a text is split."""
        return {ids[0]: ids for ids in self.words.values() if len(ids) > 1}

    @cached_property
    def ends_word(self) -> Bool[np.ndarray, " vocab"]:
        """For each token, whether a word ends with it."""
        out = np.zeros(len(self), bool)
        out[[index for token, index in self._backend.get_vocab().items() if token.endswith("</w>")]] = True
        out[list(self._backend.get_added_tokens_decoder())] = True
        out[[i for ids in self._runs.values() for i in ids[:-1]]] = False
        return out

    @property
    def special(self) -> dict[str, int]:
        """The tokens that stand for themselves where they are typed in a text."""
        return {token.content: index for index, token in self._backend.get_added_tokens_decoder().items()}

    @property
    def identity(self) -> str:
        """A text that differs where the tokens of any text would."""
        return json.dumps([self._backend.to_str(), self.max_length, self.pad_id])

    @property
    def comma_id(self) -> int | None:
        """The token of a comma that stands alone, if there is one."""
        return self._backend.token_to_id(",</w>")

    def cut(self, text: str) -> str | None:
        """The end of the text that does not fit, or None where all of it does."""
        text = _clean(text)
        encoding = self._backend.encode(text, add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        starts = [start for token, (start, _) in pairs for _ in self._runs.get(token, (token,))][self.max_length - 2 :]
        return text[starts[0] :] if starts else None


NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def _read_bpe(folder: Path) -> tuple[dict[str, Any], list[tuple[str, str]], list[dict[str, Any]]]:
    """The vocabulary, the merges, and the added tokens that stand beside them in `tokenizer.json`."""
    if (single := folder / "tokenizer.json").is_file():
        whole = load_json(single)
        model = whole.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or "merges" not in model:
            kind = model.get("type") if isinstance(model, dict) else None
            raise ValueError(f"{single} holds a tokenizer of the kind {kind!r}; CLIP's is BPE.")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise ValueError(f"{single}: a merge must be two tokens.")
        added = whole.get("added_tokens") or []
        if not isinstance(added, list) or not all(
            isinstance(one, dict) and type(one.get("id")) is int for one in added
        ):
            raise ValueError(f"{single}: added_tokens must be a list of objects, each with an id.")
        tokens, merges, source = model["vocab"], [(left, right) for left, right in pairs], single
    elif (source := folder / _CLIP_FILE).is_file():
        merges, added = _read_clip_merges(source), []
        tokens = _vocabulary(merges)
    else:
        vocab, source = folder / "vocab.json", folder / "merges.txt"
        for path in (vocab, source):
            if not path.is_file():
                raise ValueError(f"{folder} holds no tokenizer: {path.name} is missing, and so is tokenizer.json.")
        tokens, merges, added = load_json(vocab), _read_merges(source), []
    if 2 * len(merges) < len(tokens) - 514:  # all but the bytes and marks come from merges
        raise ValueError(f"{source} has {len(merges)} merges for {len(tokens)} tokens; it is incomplete.")
    return tokens, merges, added


def declared_length(folder: Path, most: int) -> int:
    """The length that the tokenizer's own files say, at most `most`, which stands where they say none."""
    file = folder / "tokenizer_config.json"
    own = load_json(file).get("model_max_length") if file.is_file() else None
    return min(own, most) if isinstance(own, int) and not isinstance(own, bool) else most


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """The special tokens of a file, by name; `extra` has those without one."""
    found = {name: values[name] for name in (*NAMED, "sep_token", "cls_token", "mask_token") if values.get(name)}
    extra = values.get("extra_special_tokens") or values.get("additional_special_tokens")
    return found | ({"extra": list(extra.values()) if isinstance(extra, dict) else extra} if extra else {})


def _tokens(folder: Path, found: Any) -> list[Any]:
    if not isinstance(found, list):
        raise ValueError(f"{folder}: extra_special_tokens is {str(found)[:40]!r}; it must be a list of tokens.")
    return found


def _added(folder: Path, token: Any) -> AddedToken:
    """A token from its text or its JSON object."""
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    content = token.get("content") if isinstance(token, dict) else token
    if isinstance(content, str) and content and content == _clean(content):
        if not isinstance(token, dict):
            return AddedToken(content, special=True, normalized=False)
        return AddedToken(content, **{flag: bool(token[flag]) for flag in flags if flag in token})
    raise ValueError(f"{folder}: {json.dumps(token)} is not a token.")


def _backend(vocab: dict[str, Any], merges: list[tuple[str, str]], unk_token: str = EOS) -> tokenizers.Tokenizer:
    try:
        bpe = models.BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=unk_token,
        )
    except TypeError as error:
        raise ValueError("The vocabulary must give each token a whole number from 0 on.") from error
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"The vocabulary and the merges do not go together: {error}.") from error
    if max(vocab.values(), default=0) >= 2**31:
        raise ValueError(f"The vocabulary has a token number {max(vocab.values())}; they must be below 2^31.")
    backend = tokenizers.Tokenizer(bpe)
    steps: list[Any] = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    backend.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _id(backend: tokenizers.Tokenizer, token: str) -> int:
    if (index := backend.token_to_id(token)) is None:
        raise ValueError(f"The tokenizer's vocabulary lacks {token!r}.")
    return index


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    merges: list[tuple[str, str]] = []
    for line in lines:
        if line.strip() and not line.startswith("#version"):
            left, space, right = line.partition(" ")
            if not space or " " in right:
                raise ValueError(f"{path}: {line!r} is not a merge of two tokens.")
            merges.append((left, right))
    return merges


def _read_clip_merges(path: Path) -> list[tuple[str, str]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            # The first line says which version it is.
            return [(left, right) for left, right in map(str.split, itertools.islice(file, 1, 1 + _CLIP_MERGES))]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is damaged; download it again.") from error


def _alphabet() -> list[str]:
    """A character for each byte, by which byte-level BPE writes texts, in CLIP's order."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _missing_bytes(vocab: Mapping[str, Any]) -> list[str]:
    """Those of the bytes, and of the bytes that end a word, that a vocabulary lacks."""
    return [token for byte in _alphabet() for token in (byte, f"{byte}</w>") if token not in vocab]


def _vocabulary(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Tokens in CLIP's order: bytes, bytes that end a word, what merges make, start and end."""
    alphabet = _alphabet()
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *map("".join, merges), BOS, EOS]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def _nth(word: str, i: int) -> str:
    """The name of a further word's token number `i`."""
    return f"{word}_{i}" if i else word


def _folded(word: str) -> str:
    """A word as it is looked for in texts: by letters, in any case."""
    return unicodedata.normalize("NFC", word).lower()


def _clean(text: str) -> str:
    """The text without lone surrogates, which a shell can pass and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()
