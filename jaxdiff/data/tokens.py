"""The CLIP tokenizer: byte-level BPE over lower-cased text, in the files that transformers reads and writes."""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from jaxdiff.config import load_json

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Text -> int32 [b, max_length]: start, tokens, end, padding.

    As transformers' CLIPTokenizer, and unlike the reference CLIP, it neither runs `ftfy.fix_text` nor unescapes HTML
    first: curly quotes and `&amp;` stay as they are written.
    """

    def __init__(self, backend: tokenizers.Tokenizer, max_length: int = 77, pad_token: str = EOS) -> None:
        if max_length < 3:
            raise ValueError(f"max_length is {max_length}; it must be at least 3, for start, end and one token.")
        self._backend, self.max_length, self.pad_token = backend, max_length, pad_token
        backend.no_padding()
        backend.no_truncation()
        self.bos_id, self.eos_id, self.pad_id = (_id(backend, token) for token in (BOS, EOS, pad_token))
        backend.add_special_tokens([BOS, EOS])  # typed in a prompt, they are themselves

    @classmethod
    def load(cls, folder: str | Path, max_length: int = 77) -> "Tokenizer":
        """Reads `tokenizer.json`, or `vocab.json` and `merges.txt`; the padding token from `tokenizer_config.json`.

        Raises:
            ValueError: where the files are missing or no tokenizer of this kind.

        """
        folder = Path(folder)
        if (single := folder / "tokenizer.json").is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(single))
            except Exception as error:  # the tokenizers library raises bare Exceptions
                raise ValueError(f"{single} is not a tokenizer: {error}.") from error
            if not isinstance(backend.model, models.BPE):
                raise ValueError(f"{single} holds a {type(backend.model).__name__} tokenizer; CLIP's is BPE.")
        else:
            vocab, merges = folder / "vocab.json", folder / "merges.txt"
            for path in (vocab, merges):
                if not path.is_file():
                    raise ValueError(f"{folder} holds no tokenizer: {path.name} is missing, and so is tokenizer.json.")
            tokens, pairs = load_json(vocab), _read_merges(merges)
            if 2 * len(pairs) < len(tokens) - 514:  # all but the bytes and marks come from merges
                raise ValueError(f"{merges} has {len(pairs)} merges for the {len(tokens)} tokens of vocab.json; "
                                 "it is incomplete.")  # fmt: skip
            backend = _backend(tokens, pairs)
        pad_token: Any = EOS
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (path := folder / name).is_file():
                pad_token = load_json(path).get("pad_token") or pad_token
        pad = pad_token.get("content") if isinstance(pad_token, dict) else pad_token
        if not isinstance(pad, str):
            raise ValueError(f"{folder}: pad_token is {json.dumps(pad_token)}, not a token.")
        return cls(backend, max_length, pad)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, max_length: int = 77) -> "Tokenizer":
        """Learns the merges from `texts`; the vocabulary has CLIP's layout: bytes, bytes that end a word, merges."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
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
        tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *map("".join, merges), BOS, EOS]
        return cls(_backend({token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges), max_length)

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
        special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": self.pad_token}
        config = special | {
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
        return [encoding.ids for encoding in encodings]

    @cached_property
    def ends_word(self) -> Bool[np.ndarray, " vocab"]:
        """For each token, whether a word ends with it."""
        out = np.zeros(len(self), bool)
        out[[index for token, index in self._backend.get_vocab().items() if token.endswith("</w>")]] = True
        return out

    @property
    def special(self) -> dict[str, int]:
        """The tokens that stand for themselves where they are typed in a text."""
        return {token.content: index for index, token in self._backend.get_added_tokens_decoder().items()}

    @property
    def comma_id(self) -> int | None:
        """The token of a comma that stands alone, if there is one."""
        return self._backend.token_to_id(",</w>")

    def cut(self, text: str) -> str | None:
        """The end of the text that does not fit, or None where all of it does."""
        text = _clean(text)
        offsets = self._backend.encode(text, add_special_tokens=False).offsets[self.max_length - 2 :]
        return text[offsets[0][0] :] if offsets else None


def _backend(vocab: dict[str, Any], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    try:
        bpe = models.BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=EOS,
        )
    except TypeError as error:
        raise ValueError("vocab.json must give each token a whole number from 0 on.") from error
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"vocab.json and merges.txt do not go together: {error}.") from error
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


def _clean(text: str) -> str:
    """The text without lone surrogates, which a shell can pass and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()
