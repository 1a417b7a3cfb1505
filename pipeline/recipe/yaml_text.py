"""YAML as a person means it: `1e-4` is a number, and no value that was written is lost without a word.

A key that is given twice in one map is refused, and so are merges (`<<`) that would lose a value: two merged maps that
say otherwise of a key, `<<` given twice, and a map's own value that stands before a merge of another one, where the
reader of the file would expect the last to count. A map's own value behind a merge is what merges are for.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from coldstill.pipeline.runtime.errors import RecipeError

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but with YAML 1.2's floats: `1e-4` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, *, name: str, key: str = "") -> Any:
    """Parse a text in YAML.

    Args:
        text: The text.
        name: What stands for it in errors.
        key: The dotted key that the text is the value of; none of a whole file.

    Raises:
        RecipeError: It is no YAML, with the line, or gives a key twice, with both lines.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Check(loader, name, has_lines=not key).check(node, (key,) if key else ())
        return loader.construct_document(node)
    except RecipeError:
        raise
    except yaml.MarkedYAMLError as error:
        raise RecipeError(f"{name} is not YAML: {_one_line(error, text)}") from None
    except RecursionError:
        raise RecipeError(f"{name} is not YAML that can be read: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise RecipeError(f"{name} is not YAML: {' '.join(str(error).split())}") from None


def _one_line(error: yaml.MarkedYAMLError, text: str) -> str:
    """Return what PyYAML says, with the lines of the text that it is about."""
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return " ".join(str(error).split())
    (*_, line) = text.splitlines()[: mark.line + 1] or [""]
    if "\t" in line[: mark.column + 1]:
        return f"line {mark.line + 1} has a tab; YAML indents by spaces"
    context = "" if error.context is None else f" ({error.context}"
    if error.context is not None:
        context += ")" if error.context_mark is None else f", line {error.context_mark.line + 1})"
    return " ".join(f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{context}".split())


class _Check:
    """Refuses maps that lose a value; see the module.

    Args:
        loader: Gives keys their values: `1` and `0x1` are one key.
        name: What stands for the text in errors.
        has_lines: Whether the text has lines to point at.
    """

    def __init__(self, loader: _Loader, name: str, *, has_lines: bool) -> None:
        self._loader = loader
        self._name = name
        self._has_lines = has_lines
        self._seen: set[int] = set()

    def check(self, node: yaml.Node, path: tuple[str, ...]) -> None:
        """Check a part of the text, and all parts of it; an alias leads to what was checked where it was written."""
        if id(node) in self._seen:
            return
        self._seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self.check(item, path)
        elif isinstance(node, yaml.MappingNode):
            self._check_map(node, path)
            for key_node, value_node in node.value:
                is_merge = key_node.tag == _MERGE
                self.check(value_node, path if is_merge else (*path, str(key_node.value)))

    def _check_map(self, node: yaml.MappingNode, path: tuple[str, ...]) -> None:
        own: dict[Any, _Given] = {}
        for key, given in self._own(node):
            if key in own:
                self._refuse(path, key, own[key], given, "", "keep one")
            own[key] = given
        merged: dict[Any, _Given] = {}
        for merge, source in _merges(node):
            for key, given in self._all(source).items():
                if key in own and own[key].place < merge.place and not _are_same(own[key].value, given.value):
                    said = f", which << in line {merge.line} merges behind it"
                    self._refuse(path, key, own[key], given, said, "put << first, where the map's own value is meant")
                elif key not in own and key in merged and not _are_same(merged[key].value, given.value):
                    said = f", both merged by << in line {merge.line}"
                    self._refuse(path, key, merged[key], given, said, "say behind << which one is meant")
                merged[key] = given

    def _own(self, node: yaml.MappingNode) -> "Iterator[tuple[Any, _Given]]":
        """Yield the keys that a map itself says; keys that are no scalars are the constructor's to refuse."""
        for key_node, value_node in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != _MERGE:
                yield self._loader.construct_object(key_node), _Given(key_node, value_node)

    def _all(self, node: yaml.MappingNode) -> "dict[Any, _Given]":
        """Return what a map says, with what is merged into it."""
        found: dict[Any, _Given] = {}
        for _, source in _merges(node):
            found |= self._all(source)
        return found | dict(self._own(node))

    def _refuse(
        self, path: tuple[str, ...], key: Any, first: "_Given", second: "_Given", said: str, advice: str
    ) -> NoReturn:
        dotted = ".".join((*path, str(key)))
        lines = f": line {first.line} and line {second.line}{said}" if self._has_lines else ""
        raise RecipeError(f"key {dotted!r} is given twice in {self._name}{lines}; {advice}")


@dataclass(frozen=True)
class _Given:
    """A key with its value, as nodes of the text."""

    key: yaml.Node
    value: yaml.Node

    @property
    def place(self) -> int:
        return int(self.key.start_mark.index)

    @property
    def line(self) -> int:
        return int(self.key.start_mark.line) + 1


def _merges(node: yaml.MappingNode) -> Iterator[tuple[_Given, yaml.MappingNode]]:
    """Yield each map that `<<` merges into a map, with the `<<`."""
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE:
            sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for source in sources:
                if isinstance(source, yaml.MappingNode):
                    yield _Given(key_node, value_node), source


def _are_same(one: yaml.Node, other: yaml.Node) -> bool:
    """Whether two values are written alike."""
    return one is other or yaml.serialize(one, Dumper=yaml.SafeDumper) == yaml.serialize(other, Dumper=yaml.SafeDumper)
