"""Trees of plain values become dataclasses, and every mistake in them one short line that says where it is.

A tree comes from YAML (see `config_yaml`) or from a stored dictionary.
"""

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from megatron_ext.errors import UserError

INTEGER_LIMIT = 2**63
NUMBER = r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?"
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "a mapping"}

Place = tuple[str | int, ...]
"""Keys and list positions from the root to a value."""
T = TypeVar("T")


@dataclass
class Tree:
    """A tree of plain values, and which line of what each came from."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Place, str] = field(default_factory=dict)

    def origin(self, place: Place) -> str:
        """Where the value at a place, or the nearest one around it, was given: the head of a message. Empty if not known."""
        while place and place not in self.origins:
            place = place[:-1]
        return f"{self.origins[place]}: " if place in self.origins else ""

    def put(self, place: Place, value: Any, origins: dict[Place, str]) -> None:
        """Set one value; mappings are merged into what is there, anything else replaces it."""
        if isinstance(value, dict) and value and isinstance(self._get(place), dict):
            for key, inner in value.items():
                self.put((*place, key), inner, origins)
            return
        for old in [old for old in self.origins if old[: len(place)] == place]:
            del self.origins[old]
        self.origins.update({new: origin for new, origin in origins.items() if new[: len(place)] == place})
        target = self.values
        for key in place[:-1]:
            if not isinstance(target.get(key), dict):
                target[key] = {}
            target = target[key]
        target[place[-1]] = value

    def _get(self, place: Place) -> Any:
        value: Any = self.values
        for key in place:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def spell(place: Place) -> str:
    """A place as users write it: `phases[1].masking.ratio`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).removeprefix(".")


def show(value: Any) -> str:
    """A value for a message: short, and as YAML spells it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= INTEGER_LIMIT:
        return "a whole number beyond 2^63"
    if isinstance(value, (dict, list)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:70]}..."


def build(kind: type[T], tree: Tree) -> T:
    """Make a dataclass, and those inside it, of a tree.

    Raises:
        UserError: an unknown or missing key, a value of a wrong type, or what a class says about its own fields. The message
            names the line or argument (if known), the key with its place in lists, the value, and what is allowed.
    """
    if missing := list(_missing(kind, tree.values, ())):
        raise UserError(f"missing: {', '.join(missing)}")
    return _Builder(tree).value(kind, tree.values, ())


def _missing(kind: Any, values: Any, place: Place) -> typing.Iterator[str]:
    """Keys without a default that are not there, except in lists."""
    if not isinstance(values, dict):
        return
    hints = type_hints(kind)
    for f in dataclasses.fields(kind):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        section = dataclasses.is_dataclass(hints[f.name])
        if required and not section and f.name not in values:
            yield spell((*place, f.name))
        elif section and (required or f.name in values):
            yield from _missing(hints[f.name], values.get(f.name, {}), (*place, f.name))


@functools.cache
def type_hints(kind: type) -> dict[str, Any]:
    """Field name -> type of a dataclass."""
    return typing.get_type_hints(kind)


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union; any other type is the only one."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


class _Builder:
    """Checks and converts the values of one tree."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def value(self, kind: Any, value: Any, place: Place) -> Any:
        """The value as one of this type."""
        kinds = alternatives(kind)
        if value is None and types.NoneType in kinds:
            return None
        shape = dict if isinstance(value, dict) else list if isinstance(value, list) else None
        fitting = [option for option in kinds if self._shape(option) is shape and option is not types.NoneType]
        if not fitting:
            self._fail(place, value, " or ".join(self._name(option) for option in kinds))
        (option, *others) = fitting
        assert not others, f"{spell(place)}: types that only differ in scalars ({kind}) are not told apart"
        if dataclasses.is_dataclass(option):
            return self._dataclass(option, value, place)
        origin, inner = typing.get_origin(option), typing.get_args(option)
        if origin is list:
            return [self.value(inner[0], item, (*place, number)) for number, item in enumerate(value)]
        if origin is dict:
            return {key: self.value(inner[1], item, (*place, self._key(key, place))) for key, item in value.items()}
        if origin is Literal:
            return self._literal(inner, value, place)
        return self._scalar(option, value, place, optional=types.NoneType in kinds)

    @staticmethod
    def _shape(kind: Any) -> type | None:
        if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict:
            return dict
        return list if typing.get_origin(kind) is list else None

    def _name(self, kind: Any) -> str:
        if kind is types.NoneType:
            return "null"
        if typing.get_origin(kind) is Literal:
            return f"one of {', '.join(map(str, typing.get_args(kind)))}"
        return NAMES[self._shape(kind) or kind]

    def _fail(self, place: Place, value: Any, needed: str, hint: str = "") -> typing.NoReturn:
        raise UserError(f"{self._tree.origin(place)}{spell(place) or 'the whole'} is {show(value)}: it must be {needed}{hint}")

    def _key(self, key: Any, place: Place) -> str:
        if not isinstance(key, str):
            self._fail(place, key, "a mapping whose keys are text")
        return key

    def _literal(self, allowed: tuple[Any, ...], value: Any, place: Place) -> Any:
        if value not in allowed or isinstance(value, bool) != any(isinstance(item, bool) for item in allowed):
            self._fail(place, value, f"one of {', '.join(map(str, allowed))}", nearest(value, allowed))
        return value

    def _scalar(self, kind: type, value: Any, place: Place, optional: bool) -> Any:
        needed = NAMES[kind] + (" or null" if optional else "")
        if kind is float:
            return self._number(value, place, needed)
        if kind is str and not isinstance(value, str):
            self._fail(place, value, needed, " (put it in quotes if it is)")
        if type(value) is not kind:
            self._fail(place, value, needed)
        if kind is int and not -INTEGER_LIMIT <= value <= INTEGER_LIMIT:
            self._fail(place, value, "smaller")
        if kind is str:
            self._check_text(value, place)
        return value

    def _number(self, value: Any, place: Place, needed: str) -> float:
        if isinstance(value, str) and re.fullmatch(NUMBER, value):
            value = float(value.replace("_", ""))  # YAML 1.1 reads 1e-3 as text
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._fail(place, value, needed)
        try:
            number = float(value)
        except OverflowError:
            self._fail(place, value, "smaller")
        if not math.isfinite(number):
            self._fail(place, value, f"{needed}, and finite")
        return number

    def _check_text(self, value: str, place: Place) -> None:
        """Every text ends up in a path, a file or a message."""
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            self._fail(place, value, "text that UTF-8 can spell")
        if "\0" in value:
            self._fail(place, value, "text without NUL")

    def _dataclass(self, kind: type, values: dict[str, Any], place: Place) -> Any:
        names = [f.name for f in dataclasses.fields(kind) if f.init]
        for key in values:
            if key not in names:
                where, spelled = (*place, key), spell((*place, self._key(key, place)))
                allowed = nearest(key, names) or f" (allowed: {', '.join(names)})"
                raise UserError(f"{self._tree.origin(where)}{spelled} is no key that is known{allowed}")
        if missing := list(_missing(kind, values, place)):
            raise UserError(f"{self._tree.origin(place)}missing: {', '.join(missing)}")
        hints = type_hints(kind)
        built = {key: self.value(hints[key], value, (*place, key)) for key, value in values.items()}
        try:
            return kind(**built)
        except UserError as error:
            entry = place[: max((n + 1 for n, key in enumerate(place) if isinstance(key, int)), default=0)]
            if not entry:
                raise  # it names the section itself
            raise UserError(f"{self._tree.origin(entry)}{spell(entry)}: {error}") from None


def nearest(word: Any, known: Sequence[Any]) -> str:
    """A question for the known word that is most like this one; empty if none is."""
    found = difflib.get_close_matches(str(word)[:100], [str(name) for name in known], n=1)
    return f" (did you mean {found[0]}?)" if found else ""
