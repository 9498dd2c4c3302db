"""YAML as nspec reads and writes it: the scalars of version 1.2, plain data only, and one line for what cannot be read."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.reader import ReaderError

from nspec.options import bare, cut, is_utf8, show

_MOST_DEPTH = 20  # brackets in brackets: a configuration has three levels
_MOST_ALIASED = 10_000  # values that aliases stand for: lists of lists of aliases grow without bound
_MOST_DIGITS = 1000  # of a whole number; Python itself takes 4300
_LONGEST = 300  # characters of what the YAML library says

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
_PATTERNS = {kind: re.compile(f"(?:{pattern})\\Z") for kind, (pattern, _) in _SCALARS.items()}
_READ: dict[str, Callable[[str], Any]] = {
    "bool": lambda text: text.lower() == "true",
    "int": int,  # in PyYAML 010 is octal 8
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    "null": lambda text: None,
}


class Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: ``no`` is a language and not False, ``5e-4`` a number and not text, 2016-01-01 no date.

    Tags of other things than numbers, texts, lists and mappings are refused, and so are aliases that grow without bound.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        f"{_TAG}str": yaml.SafeLoader.construct_yaml_str,
        f"{_TAG}seq": yaml.SafeLoader.construct_yaml_seq,
        f"{_TAG}map": yaml.SafeLoader.construct_yaml_map,
        None: yaml.SafeLoader.construct_undefined,
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = self._aliased = 0
        self._sizes: dict[int, int] = {}  # values that a node holds, those behind aliases too

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        place = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            size = self._sizes.get(id(node))
            if size is None:
                raise yaml.composer.ComposerError(None, None, "an alias stands within what it names", place)
            self._aliased += size
            if self._aliased > _MOST_ALIASED:
                raise yaml.composer.ComposerError(
                    None, None, f"aliases stand for more than {_MOST_ALIASED} values; write them out", place
                )
            self._count += size
            return node
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {_MOST_DEPTH} deep", place)
        before = self._count
        self._count += 1
        node = super().compose_node(parent, index)
        self._sizes[id(node)] = self._count - before
        self._depth -= 1
        return node

    def scalar(self, node: yaml.Node) -> Any:
        """A number, truth value or nothing, which a tag (``!!int x``) may promise and the text not be."""
        kind, text = node.tag.removeprefix(_TAG), node.value
        if not isinstance(text, str) or not _PATTERNS[kind].match(text):
            found = f"found {show(text) if isinstance(text, str) else 'a list or mapping'} for {kind}"
            raise yaml.constructor.ConstructorError(None, None, found, node.start_mark)
        if kind == "int" and len(text) > _MOST_DIGITS:
            found = f"found a whole number of {len(text)} digits, expected at most {_MOST_DIGITS}"
            raise yaml.constructor.ConstructorError(None, None, found, node.start_mark)
        return _READ[kind](text)


class _Dumper(yaml.SafeDumper):
    """Quotes text that our loader, or a reader of YAML 1.1, would take for something else, and all that is no print."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {
        first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def text(self, text: str) -> yaml.Node:
        return self.represent_scalar(f"{_TAG}str", text, style=None if text.isprintable() else '"')


for _kind, (_, _first) in _SCALARS.items():
    for _class in (Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _kind, _PATTERNS[_kind], list(_first))
    if _kind in _READ:
        Loader.yaml_constructors[_TAG + _kind] = Loader.scalar
_Dumper.add_representer(str, _Dumper.text)


def one_line(value: Any) -> str:
    """One line of YAML that means ``value`` to YAML 1.1 readers as well."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def read(text: str) -> Any:
    """The value of a text.

    Raises:
        yaml.YAMLError: it is none.
    """
    return yaml.load(text, Loader=Loader)


@contextlib.contextmanager
def yaml_errors(name: str, text: str) -> Iterator[None]:
    """Text that is not YAML is a ValueError with the place.

    Args:
        name: of the file.
        text: what stands in it.
    """
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{name}{place} is not valid YAML: {problem(error)}") from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{name} line {line} is not valid YAML: {problem(error)}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {problem(error)}") from error


def problem(error: yaml.YAMLError) -> str:
    """What is wrong, in a line without the place."""
    if isinstance(error, yaml.MarkedYAMLError):
        return cut(" ".join(str(error.problem or error.context).split()), _LONGEST)
    if isinstance(error, ReaderError):
        return f"the character U+{error.character:04X} can only be written as an escape in double quotes"
    return cut(" ".join(str(error).split()), _LONGEST)


def at(file: str, node: yaml.Node) -> str:
    """The place of a node, for messages."""
    return f"{file} line {node.start_mark.line + 1}"


def items(loader: Loader, node: yaml.Node, name: str, file: str) -> list[tuple[str, yaml.Node, str]]:
    """Keys, value nodes and places of a mapping node, merge keys (``<<``) resolved, duplicates refused."""
    if not isinstance(node, yaml.MappingNode):
        what = f"section {name}" if name else "the file"
        found = show(loader.construct_object(node, deep=True))
        raise ValueError(f"{what}: expected options as `key: value` lines, found {found} in {at(file, node)}")
    first: dict[str, yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(
                f"expected the name of an option before the colon in {at(file, key)}, found a list or mapping"
            )
        full = f"{name}.{key.value}" if name else str(key.value)
        if full in first:
            line = first[full].start_mark.line + 1
            raise ValueError(f"{bare(full)} is given twice in {file}, at lines {line} and {key.start_mark.line + 1}")
        first[full] = key
    loader.flatten_mapping(node)
    return [(str(key.value), value, at(file, key)) for key, value in node.value]


def value_of(loader: Loader, node: yaml.Node, name: str, at: str) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except yaml.YAMLError as error:
        raise ValueError(f"{bare(name)}: {problem(error)} ({at})") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads a file of UTF-8 text; what is not is a ValueError that names the file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from error


def read_lists(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Reads a YAML file of named lists of texts, such as ``low: [is, mt]``, by the rules of a configuration.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is something else; one line with the place.
    """
    lists: dict[str, list[str]] = {}
    text = read_text(path)
    with yaml_errors(str(path), text):
        loader = Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise ValueError(f"{path} is empty; expected lines such as low: [is, mt]")
        for name, node, at in items(loader, root, "", str(path)):
            value = value_of(loader, node, name, at)
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise ValueError(f"{bare(name)}: expected a list of texts such as [is, mt], found {show(value)} ({at})")
            if not all(map(is_utf8, [name, *value])):
                raise ValueError(
                    f"{bare(name)}: expected text in UTF-8, found half a character in {show(value)} ({at})"
                )
            lists[name] = value
    return lists
