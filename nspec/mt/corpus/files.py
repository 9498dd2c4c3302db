"""Parallel text in files. ``corpus.path`` is a folder; its file names say which of four kinds it holds.

========  =====================================================  ==================================================
kind      files, each also with ``.gz``                          a line
========  =====================================================  ==================================================
multiway  ``<lang>.tsv`` and ``splits.json``                     ``id<TAB>text``; equal ids are translations
moses     ``<name>.<a>-<b>.<a>`` and ``<name>.<a>-<b>.<b>``;     a sentence; line n of one file is the translation of
          ``<name>.<a>`` and ``<name>.<b>`` where ``<name>``     line n of the other
          is that of a split and there are just two languages
tsv       ``<name>.<a>-<b>.tsv``                                 ``sentence in a<TAB>sentence in b``
jsonl     ``<name>.<a>-<b>.jsonl``, ``<name>.jsonl``             ``{"translation": {"en": ..., "de": ...}}`` or
                                                                 ``{"en": ..., "de": ...}``; a file without languages
                                                                 in its name may mix them from line to line
========  =====================================================  ==================================================

The two codes of a name stand in either order. A ``<name>`` is one of

- ``train`` or one that begins with ``train.``: training data;
- the value of ``corpus.valid_split`` or ``corpus.test_split``: that split; for the value ``valid`` also ``dev``,
  ``val`` and ``validation``;
- one that begins with ``valid``, ``val``, ``dev``, ``test``, ``tst``, ``eval``, ``newsdev`` or ``newstest``: another
  evaluation set, which is left alone;
- anything else, such as ``Europarl`` in OPUS names (``Europarl.de-en.de``): training data.

Several files of one pair and split are read one after the other, in the order of their names. Where ``corpus.path`` is
a file, its folder is read and the file says which kind is meant; that settles it when a folder holds two kinds. Files of
languages that the options do not name are not looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from nspec.mt.config import CorpusConfig
from nspec.mt.corpus import multiway
from nspec.mt.corpus.base import FILE_CODE, Corpus, CorpusError, Pair, check_languages, names, pair_of
from nspec.mt.corpus.base import requested_languages as requested
from nspec.mt.corpus.parallel import JsonlSource, MixedJsonlSource, MosesSource, PairCorpus, Source, TsvSource

VALID_NAMES = ("valid", "dev", "val", "validation")
OTHER_EVALUATION = re.compile(r"(valid|validation|val|dev|devtest|test|tst|eval|newsdev|newstest)([^a-z].*)?")
PAIR_FILE = re.compile(rf"(?P<name>.+)\.(?P<a>{FILE_CODE})-(?P<b>{FILE_CODE})\.(?P<end>{FILE_CODE}|jsonl)(\.gz)?")
MIXED_FILE = re.compile(r"(?P<name>.+)\.jsonl(\.gz)?")
BARE_FILE = re.compile(rf"(?P<name>[^.]+)\.(?P<end>{FILE_CODE})(\.gz)?")
# Endings that look like language codes and are none in practice.
NOT_LANGUAGES = frozenset(("bpe", "bz", "csv", "gz", "log", "md", "py", "sgm", "sh", "tsv", "txt", "xml", "xz", "zip"))
Sources = dict[Pair, dict[str, list[Source]]]


def open_files(config: CorpusConfig, seed: int, *, evaluation: bool = False) -> Corpus:
    """Opens the parallel text at ``config.path`` (the rules are at the top of this module).

    Args:
        config: the options.
        seed: of samples.
        evaluation: the validation or the test split is enough; else every pair needs training data.

    Raises:
        CorpusError: the path is missing, holds none of the kinds or more than one, or lacks a language asked for.
    """
    if not config.path:
        raise CorpusError("corpus.path is empty; give the folder with parallel text")
    path = Path(config.path)
    if not path.exists():
        raise CorpusError(f"corpus.path: {path} does not exist")
    folder = path if path.is_dir() else path.parent
    kinds = _kinds(folder, config)
    if not path.is_dir():
        kinds = {kind: files for kind, files in kinds.items() if path in files}
    if not kinds:
        found = names((entry.name for entry in sorted(folder.iterdir())), 10)
        raise CorpusError(
            f"{path} has no parallel text that can be recognised; looked for <lang>.tsv with splits.json, "
            f"train.<a>-<b>.<a> with train.<a>-<b>.<b>, train.<a>-<b>.tsv, train.<a>-<b>.jsonl; found {found}"
        )
    if len(kinds) > 1:
        listed = "; ".join(f"{kind} ({names((file.name for file in files), 3)})" for kind, files in kinds.items())
        raise CorpusError(
            f"{folder} holds more than one kind of parallel text: {listed}; set corpus.path to a file of the one you mean"
        )
    ((kind, files),) = kinds.items()
    if kind == "multiway":
        return multiway.MultiwayCorpus(config, seed, folder)
    return _open_pairs(config, seed, folder, kind, files, ("valid", "test") if evaluation else ("train",))


def split_of(name: str, config: CorpusConfig) -> str:
    """The split that files called ``name`` belong to: train, valid, test, or "" for an evaluation set left alone."""
    if name == config.test_split:
        return "test"
    if name in _valid_names(config):
        return "valid"
    return "" if OTHER_EVALUATION.fullmatch(name) else "train"


def _valid_names(config: CorpusConfig) -> tuple[str, ...]:
    return VALID_NAMES if config.valid_split == "valid" else (config.valid_split,)


def _kinds(folder: Path, config: CorpusConfig) -> dict[str, list[Path]]:
    """The recognised files by kind; kinds without files are left out."""
    kinds: dict[str, list[Path]] = {"multiway": [], "moses": [], "tsv": [], "jsonl": []}
    for path in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        match = PAIR_FILE.fullmatch(path.name)
        if match and match["a"] != match["b"] and match["end"] in (match["a"], match["b"]):
            kinds["moses"].append(path)
        elif match and match["a"] != match["b"] and match["end"] in ("tsv", "jsonl"):
            kinds[match["end"]].append(path)
        elif MIXED_FILE.fullmatch(path.name):
            kinds["jsonl"].append(path)
        elif multiway.FILE.fullmatch(path.name):
            kinds["multiway"].append(path)
        elif _bare(path, config):
            kinds["moses"].append(path)
    return {kind: files for kind, files in kinds.items() if files}


def _bare(path: Path, config: CorpusConfig) -> tuple[str, str] | None:
    """Name and language of a file such as train.de, or None."""
    match = BARE_FILE.fullmatch(path.name)
    splits = ("train", config.test_split, *_valid_names(config))
    if match and match["end"] not in NOT_LANGUAGES and match["name"] in splits:
        return match["name"], match["end"]
    return None


def _open_pairs(
    config: CorpusConfig, seed: int, folder: Path, kind: str, files: list[Path], needed: tuple[str, ...]
) -> Corpus:
    wanted = requested(config)
    sources: Sources = defaultdict(lambda: defaultdict(list))
    if kind == "moses":
        _add_moses(sources, config, files, wanted)
    else:
        _add_single(sources, config, files, wanted)
    there = (pair for pair, splits in sources.items() if any(splits.get(split) for split in needed))
    present = sorted({code for pair in there for code in pair})
    what, stem = ("training data", "train") if "train" in needed else (f"{config.valid_split} text", config.valid_split)
    if not present:
        example = {"moses": f"{stem}.en-de.en and {stem}.en-de.de"}.get(kind, f"{stem}.en-de.{kind}")
        pairs = names(f"{first}-{second}" for first, second in sources) if sources else "any pair"
        raise CorpusError(f"{folder} has no {what} for {pairs}; expected names such as {example}")
    check_languages(wanted, present, f"the {what} in {folder}")

    def looked_for(pair: Pair, split: str) -> str:
        stems = {"train": ("train",), "valid": _valid_names(config), "test": (config.test_split,)}[split]
        a, b = pair
        both = {"moses": f".{{{a},{b}}}", "tsv": ".tsv", "jsonl": ".jsonl"}[kind]
        tried = [f"{stem}.{codes}{both}" for stem in stems for codes in (f"{a}-{b}", f"{b}-{a}")]
        if kind == "jsonl" or (kind == "moses" and len(present) == 2):
            tried += [f"{stem}{both}" for stem in stems]
        option = "" if split == "train" else f"; corpus.{split}_split names the split"
        return f"looked in {folder} for {names(tried)} (also with .gz){option}"

    return PairCorpus(
        config, seed, wanted or present, {pair: dict(splits) for pair, splits in sources.items()}, looked_for, needed
    )


def _add_moses(sources: Sources, config: CorpusConfig, files: list[Path], wanted: list[str]) -> None:
    groups: dict[tuple[str, Pair], dict[str, Path]] = defaultdict(dict)
    bare: dict[str, dict[str, Path]] = defaultdict(dict)
    for path in files:
        if match := PAIR_FILE.fullmatch(path.name):
            if wanted and not {match["a"], match["b"]} <= set(wanted):
                continue
            group = groups[match["name"], pair_of(match["a"], match["b"])]
            code = match["end"]
        elif found := _bare(path, config):
            if wanted and found[1] not in wanted:
                continue
            group, code = bare[found[0]], found[1]
        if code in group:
            raise CorpusError(f"{group[code]} and {path.name} are both there; keep one")
        group[code] = path
    languages = sorted({code for sides in bare.values() for code in sides})
    if languages:
        if len(languages) > 2:
            raise CorpusError(
                f"{files[0].parent} has files such as train.{languages[0]} in {names(languages)}; without a pair in "
                "their names there must be two languages: set corpus.languages, or name the files like train.en-de.en"
            )
        for name, sides in bare.items():
            code = next(iter(sides))
            pair = (languages[0], languages[-1])
            if pair[0] == pair[1] or len(sides) == 1:
                raise CorpusError(f"{sides[code]} has no counterpart {name}.<language> in another language")
            if (name, pair) in groups:
                raise CorpusError(f"{groups[name, pair][code]} and {sides[code].name} are both there; keep one")
            groups[name, pair] = sides
    for (name, pair), sides in sorted(groups.items()):
        for code, other in (pair, pair[::-1]):
            if code not in sides:
                raise CorpusError(f"{sides[other]} has no counterpart in {code} ({name}.{'-'.join(pair)}.{code})")
        if split := split_of(name, config):
            sources[pair][split].append(MosesSource(sides))


def _add_single(sources: Sources, config: CorpusConfig, files: list[Path], wanted: list[str]) -> None:
    seen: dict[tuple[str, Pair | None], Path] = {}
    for path in files:
        match, mixed = PAIR_FILE.fullmatch(path.name), MIXED_FILE.fullmatch(path.name)
        name = match["name"] if match else mixed["name"] if mixed else ""
        pair = pair_of(match["a"], match["b"]) if match else None
        if wanted and pair and not set(pair) <= set(wanted):
            continue
        if (name, pair) in seen:
            raise CorpusError(f"{seen[name, pair]} and {path.name} are both there; keep one")
        seen[name, pair] = path
        split = split_of(name, config)
        if not split:
            continue
        if match is None or pair is None:
            source = MixedJsonlSource(path, frozenset(wanted))
            for found in source.pairs:
                sources[found][split].append(source)
        elif match["end"] == "tsv":
            sources[pair][split].append(TsvSource(path, (match["a"], match["b"])))
        else:
            sources[pair][split].append(JsonlSource(path))
