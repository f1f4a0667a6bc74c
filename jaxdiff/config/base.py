"""What every setting shares: frozen dataclasses that refuse nonsense when they are made, and their JSON."""

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar

T = TypeVar("T")


def require(condition: bool, message: str) -> None:
    """A ValueError with `message` where the condition does not hold."""
    if not condition:
        raise ValueError(message)


@contextmanager
def naming(where: Any) -> Iterator[None]:
    """Has each ValueError inside begin with the file or folder that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def one_of(where: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuses a value that is not among those allowed; `where` names it in the message."""
    require(value in allowed, f"{where} is {value!r}; supported: {', '.join(map(repr, allowed))}.")


def positive(config: Any, *names: str) -> None:
    """Refuses fields that are not above 0; every entry of a tuple counts, and None passes."""
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        require(all(v > 0 for v in numbers), f"{type(config).__name__}.{name} is {value}; it must be above 0.")


def at_most(config: Any, most: int, *names: str) -> None:
    """Refuses fields that are above `most`; every entry of a tuple counts."""
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else (value,)
        require(all(v <= most for v in numbers), f"{type(config).__name__}.{name} is {value}; {most} are the most.")


@dataclass(frozen=True)
class Checked:
    """Takes each value as its field's type wants it, lists as tuples, or refuses it; then asks `_check`."""

    written: ClassVar[frozenset[str]]
    """The fields that were given when it was made, if only their defaults; no part of its value."""
    later: ClassVar[tuple[str, ...]] = ()
    """Fields that are younger than names made of the others (see `to_name`)."""

    def __new__(cls, *args: Any, **values: Any):
        """Remembers which fields are given."""
        made = super().__new__(cls)
        names = [f.name for f in fields(cls)]  # pyright: ignore[reportArgumentType]: every subclass is a dataclass
        return as_written(made, frozenset(names[: len(args)]) | values.keys())

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            value = coerce(hints[f.name], getattr(self, f.name), f"{type(self).__name__}.{f.name}")
            object.__setattr__(self, f.name, value)
        self._check()

    def _check(self) -> None:
        """What no single field's type can say; raises ValueError."""


def as_written(config: T, names: AbstractSet[str]) -> T:
    """`config` itself, of which `names` count as the fields that were given."""
    object.__setattr__(config, "written", frozenset(names))
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts and lists, ready for JSON; `from_dict` reads them back. A union's member is named by `kind`."""
    out: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            kind = (
                {"kind": type(value).__name__} if len(_classes(typing.get_type_hints(type(config))[f.name])) > 1 else {}
            )
            value = kind | to_dict(value)
        out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def to_name(config: Checked) -> dict[str, Any]:
    """`to_dict` for digests: a younger field with its default value is left out, so that older names stay valid."""
    defaults = {f.name: f.default for f in fields(config)}
    values = to_dict(config)
    return {name: v for name, v in values.items() if name not in config.later or v != defaults[name]}


def from_dict(cls: type[T], values: dict[str, Any], where: str = "config") -> T:
    """Builds `cls` from JSON values, checking names and types.

    Raises:
        ValueError: naming `where`, the field and its value; an unknown field is told its nearest right name.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in names:
            raise ValueError(f"{where}: {cls.__name__} has no field {name!r}{nearest(name, names)}")
    try:
        return cls(**{name: coerce(hints[name], value, f"{where}: {name}") for name, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{where}: {cls.__name__} cannot be made: {error}.") from error


def nearest(name: str, names: list[str] | tuple[str, ...]) -> str:
    """The end of an error sentence: the likeliest right name, or all of them."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(sorted(names))}."


def load_json(path: Any) -> dict[str, Any]:
    """A JSON file that holds an object; anything else is a ValueError that names the file."""
    try:
        with path.open(encoding="utf-8") if hasattr(path, "open") else open(path, encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be read.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object.")
    return values


def _classes(hint: Any) -> list[type]:
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [m for m in members if dataclasses.is_dataclass(m)]  # pyright: ignore[reportReturnType]


def coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` wants it (lists become tuples, dicts dataclasses), or a ValueError that begins with `where`."""
    if classes := _classes(hint):
        kinds = {c.__name__: c for c in classes}
        if isinstance(value, tuple(classes)) or (value is None and type(None) in typing.get_args(hint)):
            return value
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r}; it must hold the fields of {' or '.join(kinds)}.")
        value = dict(value)
        cls = classes[0]
        if len(classes) > 1:
            kind = value.pop("kind", None)
            one_of(f"{where}.kind", kind, tuple(kinds))
            cls = kinds[kind]
        return from_dict(cls, value, where)
    taken: Any = tuple(value) if isinstance(value, list) else value
    if not _fits(hint, taken):
        if typing.get_origin(hint) is Literal:
            one_of(where, value, typing.get_args(hint))
        raise ValueError(f"{where} is {value!r}; it must be {_words(hint)}.")
    return float(taken) if hint is float else taken


def _fits(hint: Any, value: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(arg, value) for arg in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(args[0], v) for v in value)
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max  # neither infinite nor NaN
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a finite number", "finite numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
    types.NoneType: ("None", "None"),
}


def _words(hint: Any) -> str:
    """What `hint` takes, for an error sentence."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_words, args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    return f"a list of {_WORDS[args[0]][1]}" if origin is tuple else _WORDS[hint][0]
