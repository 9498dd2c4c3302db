"""The options of a run as text: YAML files, ``--set section.key=value``, the commented template.

What the options are and mean stands in :mod:`nspec.run.config`; nothing here knows one of them by name. What is wrong
with their values together says :mod:`nspec.run.checks`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from nspec.files import expand_path
from nspec.options import bare, convert, cut, range_of, show
from nspec.run.config import Config, Sections, each_option, fields, types
from nspec.yaml_text import Loader, items, one_line, problem, read, value_of, yaml_errors

# The first line of the configuration of a run: cut off later, it would give the defaults instead of what is lost.
_COMPLETE_LINE = "The configuration of a run, whole. Options:"
_COMPLETE = re.compile(rf"# {re.escape(_COMPLETE_LINE)} ([0-9]{{1,9}})\n")
WRITE_ANEW = "put it back, or write it anew with `nspec report` and the configuration that the run was started with"

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
    "heads": "the systems heads and random_heads: which attention heads a direction keeps, by their importance to its loss",
    "lass": "the system lass (Lin et al. 2021): which weights it keeps",
    "adapters": "the systems adapters, adapters+shared and adapters_family (Bapna and Firat 2019)",
    "bilingual": "the system bilingual: a model for each direction",
    "surgery": "the systems pcgrad (Yu et al. 2020) and gradvac (Wang et al. 2021), trained as specialize says",
    "curriculum": "the systems temperature and curriculum (Platanios et al. 2019), trained as specialize says",
    "reptile": "the system reptile (Nichol et al. 2018): meta-updates first, then trained as specialize says",
    "decode": "beam search on the test set",
    "score": "BLEU and chrF++ with confidence intervals, and tests between systems",
}


RETIRED = {"tokenizer.model_type": "bpe"}
"""Options of older versions with the one value that they could have: a configuration that gives them is read."""


def _check_name(name: str, where: str, root: type[Sections]) -> None:
    """ValueError that names the nearest option where ``name`` ("train.lr") is none."""
    known = types(root)
    section, _, key = name.partition(".")
    if key in known.get(section, ()):
        return
    options = [f"{section}.{key}" for section, keys in known.items() for key in keys]
    section, key, name, shown = cut(section), cut(key), cut(name), bare(name)
    if not key:  # a section, or an option whose section was forgotten
        nearest = difflib.get_close_matches(section, known, n=1)
        nearest = nearest or [option for option in options if option.endswith(f".{section}")][:1]
    elif section in known:  # the same section first, also what goes on from there, then the same option of another one
        nearest = [f"{section}.{near}" for near in difflib.get_close_matches(key, known[section], n=1, cutoff=0.7)]
        nearest = nearest or [f"{section}.{longer}" for longer in known[section] if longer.startswith(f"{key}_")]
        nearest = nearest or [option for option in options if option.endswith(f".{key}")][:1]
    else:
        nearest = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else "`nspec config` shows every option"
    raise ValueError(f"unknown option {shown}{where}; {hint}")


def parse(text: str, name: str = "the configuration", config: Config | None = None) -> Config:
    """Reads YAML text over ``config`` (the defaults where it is None); what is not given stays. Does not validate.

    Args:
        text: YAML of two levels, sections and options.
        name: what errors call the text, such as its file name.
        config: changed in place where it is given.

    Raises:
        ValueError: not YAML, an unknown or repeated option, a value of the wrong type or outside the choices.
    """
    return parse_given(text, name, config)[0]


def parse_given(
    text: str, name: str = "the configuration", config: Config | None = None
) -> tuple[Config, frozenset[str]]:
    """:func:`parse`, and the full names of the options that the text gives."""
    config = config or Config()
    return config, parse_into(config, text, name)


def parse_into(config: Sections, text: str, name: str) -> frozenset[str]:
    """:func:`parse` for sections of any kind, in place.

    Returns:
        The full names of the options that the text gives.
    """
    root, given = type(config), set()
    with yaml_errors(name, text):
        loader = Loader(text)
        node_of_all = loader.get_single_node()
        for section, node, at in [] if node_of_all is None else items(loader, node_of_all, "", name):
            if section not in types(root):
                _check_name(section, f" in {at}", root)
            if isinstance(node, yaml.ScalarNode) and loader.construct_object(node) is None:
                continue
            for key, value, at in items(loader, node, section, name):
                option = f"{section}.{key}"
                if option in RETIRED and value_of(loader, value, option, at) == RETIRED[option]:
                    given.add(option)
                    continue
                _check_name(option, f" in {at}", root)
                given_value = value_of(loader, value, option, at)
                found = convert(fields(section, root)[key], types(root)[section][key], option, given_value, f" ({at})")
                setattr(getattr(config, section), key, found)
                given.add(option)
    _check_complete(text, name, len(given))
    return frozenset(given)


def _check_complete(text: str, name: str, given: int) -> None:
    """ValueError where a text says that it holds more options than it does: it has been cut off."""
    said = _COMPLETE.match(text)
    if said and (given < int(said[1]) or not text.endswith("\n")):
        found = f"has {given}" if given < int(said[1]) else "ends within a line"
        raise ValueError(
            f"{name} is damaged: it says that it holds {said[1]} options and {found}; {WRITE_ANEW} (in a copy that is "
            "to leave options to their defaults, remove the first line)"
        )


def set_option(config: Sections, assignment: str) -> None:
    """Applies one ``section.key=value`` in place.

    Where the option is text, the value is what stands behind the ``=``, letter for letter; else it is YAML.

    Raises:
        ValueError: as :func:`parse`, or no ``=`` in it.
    """
    name, equals, text = assignment.partition("=")
    if name != name.rstrip():  # key = value, as one writes it elsewhere
        text = text.strip()
    name, shown = name.strip(), bare(assignment)
    if not equals:
        raise ValueError(f"--set {shown}: expected section.key=value, such as train.lr=3e-4")
    where = f" (--set {shown})"
    root = type(config)
    _check_name(name, " in --set", root)
    section, key = name.split(".")
    kind = types(root)[section][key]
    if kind is str:
        value: Any = text
    else:
        try:
            value = read(text)
        except yaml.constructor.ConstructorError as error:
            raise ValueError(f"{name}: {problem(error)}{where}") from error
        except yaml.YAMLError as error:
            raise ValueError(f"--set {shown}: {show(text)} is not valid YAML; quote it") from error
    setattr(getattr(config, section), key, convert(fields(section, root)[key], kind, name, value, where))


def expand_paths(config: Sections) -> None:
    """Writes out the home folder in every option that is a path, in place, so that all parts of a run see the same one.

    Raises:
        ValueError: a user that there is not; the message names the option.
    """
    for section, key, field in each_option(root=type(config)):
        if field.metadata["path"]:
            options = getattr(config, section)
            try:
                setattr(options, key, expand_path(getattr(options, key)))
            except ValueError as error:
                raise ValueError(f"{section}.{key}: {error}") from None


def flatten(config: Sections) -> dict[str, Any]:
    """Every option by its full name, in order: ``{"run.folder": "runs/run", ...}``; lists are copies."""
    values = dataclasses.asdict(config)  # type: ignore[call-overload]
    return {f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()}


def _comment(lines: Iterable[str], indent: str, width: int = 120) -> list[str]:
    return [
        wrapped
        for line in lines
        for wrapped in textwrap.wrap(
            line, width, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False
        )
    ]


def render(config: Sections, header: str = "") -> str:
    """The configuration as YAML in which every option stands with its meaning, range or choices, and default.

    ``parse(render(config))`` equals ``config``.

    Args:
        config: the values.
        header: text for the top, each line a comment.
    """
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    root = type(config)
    default, meanings = flatten(root()), getattr(root, "SECTIONS", SECTIONS)
    for section in types(root):
        lines += ["", *_comment([meanings[section]], "")] if lines else _comment([meanings[section]], "")
        lines.append(f"{section}:")
        for key, field in fields(section, root).items():
            facts = [f"default: {one_line(default[f'{section}.{key}'])}"]
            if field.metadata["choices"]:
                facts.insert(0, f"one of: {', '.join(map(str, field.metadata['choices']))}")
            if limits := range_of(field):
                facts.insert(0, limits)
            lines += _comment(["; ".join([field.metadata["meaning"], *facts])], "  ")
            value = getattr(getattr(config, section), key)
            line = f"  {key}: {one_line(value)}"
            wide = isinstance(value, list) and len(line) > 120
            lines += [f"  {key}:", *(f"    - {one_line(each)}" for each in value)] if wide else [line]
    return "\n".join(lines) + "\n"


def render_complete(config: Sections) -> str:
    """:func:`render` with a first line that says how many options there are: :func:`parse` then takes no part of it."""
    return render(config, f"{_COMPLETE_LINE} {len(flatten(config))}")


def find_config(name: str) -> Path:
    """A configuration file: a path, or the bare name of one that comes with nspec, such as ``cldr8``.

    Raises:
        FileNotFoundError: neither; the message lists the names that there are.
    """
    if os.path.isfile(name):
        return Path(name)
    package = Path(__file__).resolve().parents[1]
    folders = [package / "configs", package.parent / "configs"]  # installed; a checkout
    known = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    if name in known:
        return known[name]
    raise FileNotFoundError(f"no file {name}, and no configuration of that name comes with nspec: {', '.join(known)}")
