"""The options of a run as text: YAML files, ``--set section.key=value``, the commented template, and their checks.

What the options are and mean stands in :mod:`nspec.mt.config`; nothing here knows one of them by name but
:func:`validate`, in :mod:`nspec.mt.validation`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import os
import re
import reprlib
import textwrap
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from nspec.mt.config import Config
from nspec.mt.validation import validate

__all__ = ["find_config", "flatten", "load", "parse", "read_lists", "read_text", "render", "set_option", "validate"]

SECTIONS = {
    "run": "where, on what and which systems",
    "corpus": "the parallel text; a language pair is read once and serves both of its directions",
    "tokenizer": "the joint SentencePiece vocabulary; not used with model.pretrained, which brings its own",
    "model": "the Transformer (M2M100: pre-norm, ReLU); sizes are not used with model.pretrained",
    "train": "training of the dense model",
    "profile": "counting how often each feed-forward neuron fires, for each direction",
    "select": "which neurons a direction keeps",
    "specialize": "continued training of every system but dense, each from the dense weights with a fresh optimiser",
    "finetune": "fine-tuning on one direction alone: the system finetuned, and the first step of lass",
    "lass": "the system lass (Lin et al. 2021): which weights it keeps",
    "adapters": "the systems adapters and adapters_family (Bapna and Firat 2019)",
    "bilingual": "the system bilingual: a model for each direction",
    "decode": "beam search on the test set",
    "score": "BLEU and chrF++ with confidence intervals, and tests between systems",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: ``no`` is a language and not False, ``5e-4`` a number and not text, 2016-01-01 no date."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern, _first in [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN)", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
]:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    """PyYAML reads 010 as octal 8; Python reads no number of thousands of digits, and does not say where it is."""
    try:
        return int(node.value)
    except ValueError:
        problem = f"a number of {len(node.value)} digits"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


_Loader.add_constructor("tag:yaml.org,2002:int", _int)


@functools.cache
def _types() -> dict[str, dict[str, Any]]:
    """Section -> option -> type, in the order of :class:`Config`."""
    sections = typing.get_type_hints(Config)
    return {name: typing.get_type_hints(section) for name, section in sections.items()}


def _fields(section: str) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(typing.get_type_hints(Config)[section])}


_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


_BRIEF = reprlib.Repr()  # a few lines of YAML can stand for a value of gigabytes
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 200


def _show(value: Any) -> str:
    return "nothing" if value is None else _BRIEF.repr(value)


def _fits(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _convert(name: str, value: Any, where: str) -> Any:
    """``value`` as the type of option ``name``; ValueError where it does not fit.

    A wrong type in a file is a wrong *value* of a text file, so it is not a TypeError.
    """
    section, key = name.split(".")
    kind, meta = _types()[section][key], _fields(section)[key].metadata
    choices, spelled = meta["choices"], meta["spelled"]
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        kinds = "texts" if item is str else "numbers"
        if not isinstance(value, list):
            raise ValueError(f"{name}: expected a list of {kinds} such as [a, b], found {_show(value)}{where}")
        for position, each in enumerate(value, 1):
            if not _fits(each, item):
                expected, found = _KINDS[item], _show(each)
                raise ValueError(f"{name}: expected {expected} at place {position} of the list, found {found}{where}")
        result: Any = [item(each) for each in value]
    elif not _fits(value, kind):
        hint = ' (empty text is written "")' if kind is str and value is None else ""
        raise ValueError(f"{name}: expected {_KINDS[kind]}, found {_show(value)}{hint}{where}")
    else:
        result = kind(value)
    for each in result if isinstance(result, list) else [result]:
        if isinstance(each, float) and not math.isfinite(each):
            raise ValueError(f"{name}: expected a finite number, found {each}{where}")
    if spelled:
        result = [spelled(each) for each in result] if isinstance(result, list) else spelled(result)
    if choices and result not in choices:
        nearest = difflib.get_close_matches(str(result), map(str, choices), n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, found {_show(result)}{where}{hint}")
    return result


def _check_name(name: str, where: str) -> None:
    """ValueError that names the nearest option where ``name`` ("train.lr") is none."""
    types = _types()
    section, _, key = name.partition(".")
    if key in types.get(section, ()):
        return
    options = [f"{section}.{key}" for section, keys in types.items() for key in keys]
    if not key:  # a section, or an option whose section was forgotten
        nearest = difflib.get_close_matches(section, types, n=1)
        nearest = nearest or [option for option in options if option.endswith(f".{section}")]
    elif section in types:  # the same section first, then the same option of another one
        nearest = [f"{section}.{near}" for near in difflib.get_close_matches(key, types[section], n=1, cutoff=0.7)]
        nearest = nearest or [option for option in options if option.endswith(f".{key}")]
    else:
        nearest = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "`nspec config` shows every option"
    raise ValueError(f"unknown option {name}{where}; {hint}")


def _items(loader: _Loader, node: yaml.Node, name: str, file: str) -> list[tuple[str, yaml.Node, str]]:
    """Keys, value nodes and places of a mapping node, merge keys (``<<``) resolved, duplicates refused."""
    if not isinstance(node, yaml.MappingNode):
        what = f"section {name}" if name else "the file"
        found = _show(loader.construct_object(node, deep=True))
        raise ValueError(f"{what}: expected options as `key: value` lines, found {found} in {_at(file, node)}")
    first: dict[str, yaml.Node] = {}
    for key, _ in node.value:
        full = f"{name}.{key.value}" if name else str(key.value)
        if full in first:
            line = first[full].start_mark.line + 1
            raise ValueError(f"{full} is given twice in {file}, at lines {line} and {key.start_mark.line + 1}")
        first[full] = key
    loader.flatten_mapping(node)
    return [(str(key.value), value, _at(file, key)) for key, value in node.value]


def _at(file: str, node: yaml.Node) -> str:
    return f"{file} line {node.start_mark.line + 1}"


@contextlib.contextmanager
def _yaml_errors(name: str) -> Iterator[None]:
    """Text that is not YAML is a ValueError with the place."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{name}{place} is not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply: expected a few levels") from None


def parse(text: str, name: str = "the configuration", config: Config | None = None) -> Config:
    """Reads YAML text over ``config`` (the defaults where it is None); what is not given stays. Does not validate.

    Args:
        text: YAML of two levels, sections and options.
        name: what errors call the text, such as its file name.
        config: changed in place where it is given.

    Raises:
        ValueError: not YAML, an unknown or repeated option, a value of the wrong type or outside the choices.
    """
    config = config or Config()
    with _yaml_errors(name):
        loader = _Loader(text)
        root = loader.get_single_node()
        for section, node, at in [] if root is None else _items(loader, root, "", name):
            if section not in _types():
                _check_name(section, f" in {at}")
            if isinstance(node, yaml.ScalarNode) and loader.construct_object(node) is None:
                continue
            for key, value, at in _items(loader, node, section, name):
                option = f"{section}.{key}"
                _check_name(option, f" in {at}")
                found = _convert(option, loader.construct_object(value, deep=True), f" ({at})")
                setattr(getattr(config, section), key, found)
    return config


def set_option(config: Config, assignment: str) -> None:
    """Applies one ``section.key=value`` in place; the value is YAML, and plain text where the option is text.

    Raises:
        ValueError: as :func:`parse`, or no ``=`` in it.
    """
    name, equals, text = assignment.partition("=")
    name = name.strip()
    if not equals:
        raise ValueError(f"--set {assignment}: expected section.key=value, such as train.lr=3e-4")
    where = f" (--set {assignment})"
    _check_name(name, " in --set")
    section, key = name.split(".")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {assignment}: {text!r} is not valid YAML; quote it") from error
    if _types()[section][key] is str and not isinstance(value, str):
        value = text.strip()  # 2016 or nothing at all, where text is wanted, is text
    setattr(getattr(config, section), key, _convert(name, value, where))


def load(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Reads and validates a YAML file, with ``--set`` assignments applied over it, in order.

    Raises:
        OSError: the file cannot be read.
        ValueError: see :func:`parse`, :func:`set_option` and :func:`validate`; one line that says what to change.
    """
    config = parse(read_text(path), str(path))
    for assignment in overrides:
        set_option(config, assignment)
    validate(config)
    return config


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
    with _yaml_errors(str(path)):
        loader = _Loader(read_text(path))
        root = loader.get_single_node()
        if root is None:
            raise ValueError(f"{path} is empty; expected lines such as low: [is, mt]")
        for name, node, at in _items(loader, root, "", str(path)):
            value = loader.construct_object(node, deep=True)
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise ValueError(f"{name}: expected a list of texts such as [is, mt], found {_show(value)} ({at})")
            lists[name] = value
    return lists


def flatten(config: Config) -> dict[str, Any]:
    """Every option by its full name, in order: ``{"run.folder": "runs/run", ...}``; lists are copies."""
    values = dataclasses.asdict(config)
    return {f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()}


def _yaml(value: Any) -> str:
    """One line of YAML that means ``value`` to YAML 1.1 readers as well."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def _comment(lines: Iterable[str], indent: str, width: int = 120) -> list[str]:
    return [
        wrapped
        for line in lines
        for wrapped in textwrap.wrap(
            line, width, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False
        )
    ]


def render(config: Config, header: str = "") -> str:
    """The configuration as YAML in which every option stands with its meaning, choices and default.

    ``parse(render(config))`` equals ``config``.

    Args:
        config: the values.
        header: text for the top, each line a comment.
    """
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    default = flatten(Config())
    for section in _types():
        lines += ["", *_comment([SECTIONS[section]], "")] if lines else _comment([SECTIONS[section]], "")
        lines.append(f"{section}:")
        for key, field in _fields(section).items():
            facts = [f"default: {_yaml(default[f'{section}.{key}'])}"]
            if field.metadata["choices"]:
                facts.insert(0, f"one of: {', '.join(map(str, field.metadata['choices']))}")
            lines += _comment(["; ".join([field.metadata["meaning"], *facts])], "  ")
            value = getattr(getattr(config, section), key)
            line = f"  {key}: {_yaml(value)}"
            wide = isinstance(value, list) and len(line) > 120
            lines += [f"  {key}:", *(f"    - {_yaml(each)}" for each in value)] if wide else [line]
    return "\n".join(lines) + "\n"


def find_config(name: str) -> Path:
    """A configuration file: a path, or the bare name of one that comes with nspec, such as ``cldr8``.

    Raises:
        FileNotFoundError: neither; the message lists the names that there are.
    """
    if Path(name).is_file():
        return Path(name)
    package = Path(__file__).resolve().parents[1]
    folders = [package / "configs", package.parent / "configs"]  # installed; a checkout
    known = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    if name in known:
        return known[name]
    raise FileNotFoundError(f"no file {name}, and no configuration of that name comes with nspec: {', '.join(known)}")
