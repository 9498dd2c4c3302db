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

The two codes of a name stand in either order; hyphens in them (``train.en-zh-Hans.en``) are underscores in the run. The
first line of a TSV file may be a header of the two codes. A ``<name>`` is one of

- ``train`` or one that begins with ``train.``: training data;
- the value of ``corpus.valid_split`` or ``corpus.test_split``: that split; for the value ``valid`` also ``dev``,
  ``val`` and ``validation``;
- one that begins with ``valid``, ``val``, ``dev``, ``test``, ``tst``, ``eval``, ``newsdev`` or ``newstest``: another
  evaluation set, which is left alone;
- anything else, such as ``Europarl`` in OPUS names (``Europarl.de-en.de``): training data, with a warning where it looks
  like an evaluation set (``flores-test``, ``IWSLT.dev``).

Several files of one pair and split are read one after the other, in the order of the names of the files,
capital letters first. Where ``corpus.path`` is a file, its folder is read and the file says which kind is meant; that
settles it when a folder holds two kinds. Files of languages that the options do not name are not looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from nspec.mt.languages import cuts, is_known, plain_code
from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus import multiway
from nspec.mt.text.corpus.base import Corpus, CorpusError, Pair, check_languages, names, pair_of
from nspec.mt.text.corpus.base import requested_languages as requested
from nspec.mt.text.corpus.mixed import read_mixed
from nspec.mt.text.corpus.parallel import JsonlSource, MosesSource, PairCorpus, Source, TsvSource

VALID_NAMES = ("valid", "dev", "val", "validation")
OTHER_EVALUATION = re.compile(r"(valid|validation|val|dev|devtest|test|tst|eval|newsdev|newstest)([^a-z].*)?")
# In a name that is taken for training data: a part that names evaluation sets elsewhere.
LIKE_EVALUATION = re.compile(
    r"(.*[^A-Za-z])?(valid|validation|val|dev|devtest|test|tst|eval|newsdev|newstest)([^A-Za-z].*)?", re.I
)
# Of names without .gz (see _plain): in a pattern, an end that may have dots or hyphens could take it in.
PAIR_FILE = re.compile(r"(?P<name>.+)\.(?P<pair>\w+(-\w+)+)\.(?P<end>[\w-]+)", re.ASCII)
MIXED_FILE = re.compile(r"(?P<name>.+)\.jsonl")
BARE_FILE = re.compile(r"(?P<name>[^.]+)\.(?P<end>[\w-]+)", re.ASCII)
# Endings that look like language codes and are none in practice.
NOT_LANGUAGES = frozenset(("bpe", "bz", "csv", "gz", "log", "md", "py", "sgm", "sh", "tsv", "txt", "xml", "xz", "zip"))
Sources = dict[Pair, dict[str, list[Source]]]


@dataclass(frozen=True)
class PairName:
    """The parts of a name such as ``train.en-de.en``: codes as they follow one another, and a code, tsv or jsonl."""

    name: str
    codes: Pair
    end: str

    @property
    def pair(self) -> Pair:
        return pair_of(*self.codes)


def _plain(name: str) -> str:
    """The name of a file as it is when it is not compressed."""
    return name.removesuffix(".gz")


def pair_name(path: Path, config: CorpusConfig) -> PairName | None:
    """What the name of a file says of its pair, or None.

    Raises:
        CorpusError: it names a pair in a way that can be read as several, or as none.
    """
    match = PAIR_FILE.fullmatch(_plain(path.name))
    if not match:
        return None
    one_file = match["end"] in ("tsv", "jsonl")
    end = match["end"] if one_file else plain_code(match["end"])
    read = [codes for codes in cuts(match["pair"]) if all(map(plain_code, codes)) and (one_file or end in codes)]
    if end and len(read) == 1:
        return PairName(match["name"], read[0], end)
    parts, last = match["pair"].split("-"), match["end"]
    ends = one_file or match["pair"].startswith(f"{last}-") or match["pair"].endswith(f"-{last}")
    of_a_split = split_of(match["name"], config) in ("valid", "test") or match["name"] == "train"
    if len(parts) > 2 and ends and (of_a_split or sum(map(is_known, parts)) > 1):
        raise CorpusError(
            f"{path}: the two languages of {match['pair']} cannot be told; write '_' inside a code, as in "
            f"{match['name']}.en-pt_BR.{last if one_file else 'en'}"
        )
    return None


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
        found = pair_name(path, config)
        if found:
            kinds.get(found.end, kinds["moses"]).append(path)
        elif MIXED_FILE.fullmatch(_plain(path.name)):
            kinds["jsonl"].append(path)
        elif multiway.language_of_file(path):
            kinds["multiway"].append(path)
        elif _bare(path, config):
            kinds["moses"].append(path)
    return {kind: files for kind, files in kinds.items() if files}


def _bare(path: Path, config: CorpusConfig) -> tuple[str, str] | None:
    """Name and language of a file such as train.de, or None."""
    match = BARE_FILE.fullmatch(_plain(path.name))
    splits = ("train", config.test_split, *_valid_names(config))
    code = plain_code(match["end"]) if match and match["end"] not in NOT_LANGUAGES else None
    return (match["name"], code) if match and code and match["name"] in splits else None


def _open_pairs(
    config: CorpusConfig, seed: int, folder: Path, kind: str, files: list[Path], needed: tuple[str, ...]
) -> Corpus:
    wanted = requested(config)
    sources: Sources = defaultdict(lambda: defaultdict(list))
    notes = (
        _add_moses(sources, config, files, wanted) if kind == "moses" else _add_single(sources, config, files, wanted)
    )
    for splits in sources.values():
        for each in splits.values():
            each.sort(key=lambda source: min(path.name for path in source.paths))
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

    corpus = PairCorpus(
        config, seed, wanted or present, {pair: dict(splits) for pair, splits in sources.items()}, looked_for, needed
    )
    read = [path.name for splits in sources.values() for source in splits.get("train", []) for path in source.paths]
    for text in notes + _taken_for_training(read, config):
        corpus.note(text)
    return corpus


def _taken_for_training(files: list[str], config: CorpusConfig) -> list[str]:
    """A warning for each name of training data that looks like that of an evaluation set."""
    found: dict[str, list[str]] = defaultdict(list)
    for file in sorted(set(files)):
        match = PAIR_FILE.fullmatch(_plain(file)) or MIXED_FILE.fullmatch(_plain(file))
        if match and match["name"].partition(".")[0] != "train" and LIKE_EVALUATION.fullmatch(match["name"]):
            found[match["name"]].append(file)
    return [
        f"{names(listed, 4)}: read as training data, though {name!r} looks like an evaluation set; if it is one, name it "
        f"in corpus.valid_split or corpus.test_split (now {config.valid_split} and {config.test_split}), or take it away"
        for name, listed in found.items()
    ]


def _add_moses(sources: Sources, config: CorpusConfig, files: list[Path], wanted: list[str]) -> list[str]:
    moses: dict[tuple[str, Pair], dict[str, Path]] = defaultdict(dict)
    bare: dict[str, dict[str, Path]] = defaultdict(dict)
    for path in files:
        if match := pair_name(path, config):
            if wanted and not set(match.pair) <= set(wanted):
                continue
            paths, code = moses[match.name, match.pair], match.end
        elif found := _bare(path, config):
            if wanted and found[1] not in wanted:
                continue
            paths, code = bare[found[0]], found[1]
        if code in paths:
            raise CorpusError(f"{paths[code]} and {path.name} are both there; keep one")
        paths[code] = path
    languages = sorted({code for paths in bare.values() for code in paths})
    if languages:
        if len(languages) > 2:
            raise CorpusError(
                f"{files[0].parent} has files such as train.{languages[0]} in {names(languages)}; without a pair in "
                "their names there must be two languages: set corpus.languages, or name the files like train.en-de.en"
            )
        for name, paths in bare.items():
            code = next(iter(paths))
            pair = (languages[0], languages[-1])
            if pair[0] == pair[1] or len(paths) == 1:
                raise CorpusError(f"{paths[code]} has no counterpart {name}.<language> in another language")
            if (name, pair) in moses:
                raise CorpusError(f"{moses[name, pair][code]} and {paths[code].name} are both there; keep one")
            moses[name, pair] = paths
    for (name, pair), paths in sorted(moses.items()):
        for code, other in (pair, pair[::-1]):
            if code not in paths:
                raise CorpusError(f"{paths[other]} has no counterpart in {code} ({name}.{'-'.join(pair)}.{code})")
        if split := split_of(name, config):
            sources[pair][split].append(MosesSource(paths))
    return []


def _add_single(sources: Sources, config: CorpusConfig, files: list[Path], wanted: list[str]) -> list[str]:
    seen: dict[tuple[str, Pair | None], Path] = {}
    mixed: dict[Path, str] = {}
    for path in files:
        match, other = pair_name(path, config), MIXED_FILE.fullmatch(_plain(path.name))
        name = match.name if match else other["name"] if other else ""
        pair = match.pair if match else None
        if wanted and pair and not set(pair) <= set(wanted):
            continue
        if (name, pair) in seen:
            raise CorpusError(f"{seen[name, pair]} and {path.name} are both there; keep one")
        seen[name, pair] = path
        split = split_of(name, config)
        if not split:
            continue
        if match is None:
            mixed[path] = split
        elif match.end == "tsv":
            sources[match.pair][split].append(TsvSource(path, match.codes))
        else:
            sources[match.pair][split].append(JsonlSource(path))
    read, notes = read_mixed(list(mixed), wanted)
    for source in read:
        for found in source.pairs:
            sources[found][mixed[source.path]].append(source)
    return notes
