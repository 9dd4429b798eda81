"""Configurations out of YAML, read strictly: UTF-8, one document, no key twice, no tags.

Bounded in size, in depth and, since aliases can stand for much, in the number of values.
"""

import stat
import types
from pathlib import Path
from typing import Any

from megatron_ext.config_tree import Place, Tree, alternatives, show, spell
from megatron_ext.errors import UserError

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_VALUES = 100_000


def read_file(path: str, name: str) -> Tree:
    """Read a YAML file that holds a mapping.

    Args:
        path: the file.
        name: what to call it in messages.

    Raises:
        UserError: it is missing, no regular file, too large, not UTF-8, no such YAML, or no mapping.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{name}: it is a folder, pipe or device, not a file")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{name}: it is larger than {MAX_BYTES:,} bytes, which no configuration is")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{name} line {line}: byte 0x{content[error.start]:02x} is not UTF-8") from None
    value, origins = read_yaml(text, name, ())
    if not isinstance(value, dict):
        found = "it is empty" if value is None else f"it holds {show(value)}"
        raise UserError(f"{name}: {found}, where a mapping of sections is needed")
    return Tree(value, origins)


def read_yaml(text: str, name: str, place: Place) -> tuple[Any, dict[Place, str]]:
    """The value of a YAML text, and the line of each value in it.

    Args:
        text: YAML.
        name: what to call its source in messages.
        place: where the value belongs in the whole tree.

    Raises:
        UserError: it is no YAML, or goes beyond what the module's text allows.
    """
    import yaml

    if len(text) > MAX_BYTES:
        raise UserError(f"{name}: longer than {MAX_BYTES:,} characters")
    try:
        _check_events(text, name)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        number = mark.line if mark else text[: getattr(error, "position", 0)].count("\n")
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UserError(f"{name} line {number + 1}: not valid YAML ({problem})") from None
    reader = _NodeReader(name)
    return (None if node is None else reader.read(node, place, 0)), reader.origins


def _check_events(text: str, name: str) -> None:
    """Refuse tags and a second document, and stop at depths and numbers that a tree of nodes should not be built from."""
    import yaml

    depth = documents = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        where = f"{name} line {event.start_mark.line + 1}"
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if documents > 1:
            raise UserError(f"{where}: a second document begins (allowed: one)")
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: nested more than {MAX_DEPTH} deep")
        if count > MAX_VALUES:
            raise UserError(f"{where}: more than {MAX_VALUES:,} values")
        if getattr(event, "tag", None) is not None:
            raise UserError(f"{where}: the tag {show(event.tag)} (allowed: none)")


class _NodeReader:
    """Plain values of YAML nodes."""

    def __init__(self, name: str) -> None:
        import yaml

        self.origins: dict[Place, str] = {}
        self._name = name
        self._values = 0
        self._nodes = yaml.nodes
        self._constructor = yaml.constructor.SafeConstructor()

    def read(self, node: Any, place: Place, depth: int) -> Any:
        """The value of a node. Aliases are read again wherever they stand, and counted."""
        self._values += 1
        where = f"{self._name} line {node.start_mark.line + 1}"
        if self._values > MAX_VALUES or depth > MAX_DEPTH:
            raise UserError(f"{where}: its aliases stand for more than {MAX_VALUES:,} values, or nest more than {MAX_DEPTH} deep")
        self.origins[place] = where
        if isinstance(node, self._nodes.SequenceNode):
            return [self.read(item, (*place, number), depth + 1) for number, item in enumerate(node.value)]
        if isinstance(node, self._nodes.MappingNode):
            return self._mapping(node, place, depth)
        try:
            value = self._constructor.construct_object(node)
        except Exception:  # what looks like a date or a number need not be one: PyYAML's errors for that are of many types
            raise UserError(f"{where}: {show(node.value)} is no value that YAML knows (put text in quotes)") from None
        # A date is text for the checks below, which say what is wrong with it.
        return value if isinstance(value, (str, int, float)) or value is None else node.value

    def _mapping(self, node: Any, place: Place, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, self._nodes.ScalarNode):
                raise UserError(f"{self._name} line {line}: a key is no plain word")
            key = key_node.value
            if key in lines:
                where = f"{self._name} line {line}"
                raise UserError(f"{where}: the key {spell((*place, key))} is there twice (first in line {lines[key]})")
            lines[key] = line
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged = self._merged(value_node, place, depth, line)
            else:
                own[key] = self.read(value_node, (*place, key), depth + 1)
                self.origins[(*place, key)] = f"{self._name} line {line}"
        return {**merged, **own}

    def _merged(self, node: Any, place: Place, depth: int, line: int) -> dict[str, Any]:
        """What `<<` brings in; of several mappings the first one that has a key decides."""
        parts = node.value if isinstance(node, self._nodes.SequenceNode) else [node]
        values = [self.read(part, place, depth + 1) for part in parts]
        if not all(isinstance(value, dict) for value in values):
            raise UserError(f"{self._name} line {line}: << needs a mapping, or a list of mappings")
        return {key: inner for value in reversed(values) for key, inner in value.items()}


def read_word(text: str, kind: Any, name: str, place: Place) -> tuple[Any, dict[Place, str]]:
    """The value that a word of the command line stands for: text as it is where text is wanted, else YAML."""
    kinds = set(alternatives(kind)) - {types.NoneType}
    if kinds == {str} and not (text == "null" and types.NoneType in alternatives(kind)):
        return text, {place: name}
    value, origins = read_yaml(text, name, place)
    return value, dict.fromkeys(origins, name) or {place: name}
