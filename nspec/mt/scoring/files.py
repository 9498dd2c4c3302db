"""Scores translations that are there as files: a run's, or published ones beside them.

A folder holds a plain-text file for each direction, UTF-8, a sentence a line (also gzipped: ``.gz`` after the name):

* translations of ``en-de``: ``en-de.hyp.txt`` (as in ``RUN/scores/<system>``), ``en-de.txt`` or ``en-de.de``;
* references: ``en-de.ref.txt``, ``en-de.txt`` or ``en-de.de``; sources: ``en-de.src.txt``, ``en-de.txt`` or ``en-de.en``;
* both of the latter also in files that two directions share, with the codes in either order: the text in German,
  ``de-en.de`` or ``de-en.de.txt``, is the reference of ``en-de`` and the source of ``de-en``. So a folder of Moses files
  will do, and ``RUN/prepared/text/test``. Where there is a file with the direction's own order of codes, it is taken.

The first system's files say which directions there are; everyone must have just these. Two files that could both be
meant are an error, and other files (``scores.json``) are passed by.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nspec.mt.languages import languages_of_task, normalized_code
from nspec.mt.scoring.bleu_tokenizer import AUTO, check_tokenizer
from nspec.mt.scoring.comet import Comet
from nspec.mt.scoring.config import ScoreConfig
from nspec.mt.scoring.scores import average_groups, score_system
from nspec.mt.text.corpus.base import FILE_CODE
from nspec.mt.text.corpus.lines import read_lines
from nspec.options import check_range, options_of
from nspec.terminal import Display
from nspec.yaml_text import read_lists

_DIRECTION = rf"(?P<source>{FILE_CODE})-(?P<target>{FILE_CODE})"
_ENDINGS = {"translations": "hyp", "references": "ref", "sources": "src"}
_LONGEST = 200  # bytes of a system's name; file systems take 255, and a part that is being written has a longer one
TABLE = "scores.tsv"
"""The file with all scores, beside the folders of systems."""
_SYSTEM = re.compile(r"[^\W_][\w.+-]*")


def score_files(
    systems: Iterable[str],
    references: str,
    *,
    bootstrap: int = 1000,
    tokenize: str = AUTO,
    baseline: str = "",
    pivot: str = "",
    groups: str = "",
    comet: str = "",
    sources: str = "",
    out: str = "",
) -> dict[str, dict[str, Any]]:
    """Scores systems by the files in their folders.

    Args:
        systems: ``NAME=FOLDER`` of each.
        references: the folder with the references.
        bootstrap: how many samples.
        tokenize: a tokenizer of sacreBLEU for BLEU; ``auto``: by target language, see
            :func:`nspec.mt.scoring.bleu_tokenizer.bleu_tokenizer`.
        baseline: the system that the others are tested against; empty: no tests.
        pivot: directions from and to this language are averaged apart; empty: not.
        groups: a YAML file with more averages, see :func:`nspec.mt.scoring.scores.average_groups`; empty: none.
        comet: a local COMET model, which adds ``comet`` to each direction and average; empty: no COMET.
        sources: the folder with the sources, which COMET needs.
        out: where the caller will write results, ``scores.tsv`` and a folder for each system; a place or names where that
            cannot be, or would replace something else, are refused.

    Returns:
        For each system what a run has in its ``scores.json``.

    Raises:
        ValueError: files that are missing, ambiguous, empty or do not fit together, or a wrong option; names the file.
        OSError: a file cannot be read.
        ImportError: COMET is asked for and not installed.
    """
    folders, pivot = _systems(systems), normalized_code(pivot)
    if baseline and baseline not in folders:
        raise ValueError(f"--baseline {baseline}: there are the systems {', '.join(folders)}")
    if bool(comet) != bool(sources):
        given, other = ("--comet", "--sources FOLDER") if comet else ("--sources", "--comet PATH")
        raise ValueError(f"{given} needs {other}: COMET compares source, translation and reference")
    check_range(options_of(ScoreConfig)["bootstrap"], "--bootstrap", bootstrap)
    if out:
        _check_out(Path(out), folders)
    check_tokenizer(tokenize)

    found = {name: _translations(name, folder) for name, folder in folders.items()}
    tasks = _common(found, folders)
    if pivot and not any(pivot in languages_of_task(task) for task in tasks):
        raise ValueError(f"--pivot {pivot} is in none of the directions {', '.join(tasks)}")
    more = read_lists(groups) if groups else {}
    averages = average_groups(tasks, pivot, more)
    places = _beside(Path(references), tasks, "references")
    texts = {task: _read(path, "references") for task, path in places.items()}
    translated = {
        name: {task: _read(found[name][task], "translations", texts[task], places[task]) for task in tasks}
        for name in folders
    }
    scorer = None
    if comet:
        files = _beside(Path(sources), tasks, "sources")
        origin = {task: _read(path, "sources", texts[task], places[task]) for task, path in files.items()}
        scorer = Comet(Path(comet))

    scores = {}
    with Display().bar("score", "systems") as progress:
        for number, (name, lines) in enumerate(translated.items()):
            progress(name, number, len(translated))
            test = (baseline, translated[baseline]) if baseline and name != baseline else None
            settings = ScoreConfig(tokenize=tokenize, bootstrap=bootstrap)
            scores[name] = score_system(lines, texts, settings, pivot, test, more)
            if scorer is not None:
                scorer.add(scores[name], origin, lines, texts, averages)
    return scores


def _systems(given: Iterable[str]) -> dict[str, Path]:
    """Name and folder of each, in their order."""
    systems: dict[str, Path] = {}
    for each in given:
        name, equals, folder = each.partition("=")
        if not (equals and folder and _SYSTEM.fullmatch(name)):
            raise ValueError(
                f"--system {each}: expected NAME=FOLDER, the name of letters, digits and . + - _, such as theirs=out/nllb"
            )
        if name in systems:
            raise ValueError(
                f"--system {name} is there twice, with {systems[name]} and {folder}; give one another name"
            )
        systems[name] = _folder("--system", folder)
    return systems


def _check_out(out: Path, folders: dict[str, Path]) -> None:
    """Before hours of scoring: what would be written has places of its own, on every file system."""
    for place in (out, *out.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"--out {out}: {place} is there and is no folder; name another one")
    if (out / TABLE).is_dir():
        raise ValueError(
            f"--out {out}: {out / TABLE} is a folder, where the table of scores would go; name another one"
        )
    taken = {TABLE: f"the table {TABLE}"}
    for name in folders:
        same = unicodedata.normalize("NFC", name).casefold()
        if same in taken:
            raise ValueError(
                f"--system {name}: with --out its scores would lie where {taken[same]} is (some file systems do not tell "
                "upper from lower case); give it another name"
            )
        taken[same] = f"system {name}"
        if len(name.encode()) > _LONGEST:
            raise ValueError(
                f"--system {name[:20]}...: expected a name of {_LONGEST} bytes at most, for a folder with --out"
            )
        if (out / name).exists() and not (out / name).is_dir():
            raise ValueError(f"--out {out}: {out / name} is there and is no folder; name another one")
        for folder in folders.values():
            if (out / name).resolve() == folder.resolve():
                raise ValueError(f"--out {out}: scores of {name} would lie among the translations of {folder}")


def _common(found: dict[str, dict[str, Path]], folders: dict[str, Path]) -> list[str]:
    """The directions, which all systems must have."""
    first = next(iter(found))
    for name in found:
        for one, other in ((first, name), (name, first)):
            for task in found[one]:
                if task not in found[other]:
                    raise ValueError(
                        f"system {one} has {found[one][task]}, but system {other} no translations of {task}: "
                        f"expected {_expected(folders[other], task, 'translations')}"
                    )
    return list(found[first])


def _folder(option: str, folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise ValueError(f"{option} {folder}: there is no such folder")
    return Path(folder)


def _translations(system: str, folder: Path) -> dict[str, Path]:
    """The file of each direction, sorted by name."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    tasks = {}
    for name in names:
        match = re.fullmatch(rf"{_DIRECTION}\.(?:hyp\.txt|txt|(?P=target))(?:\.gz)?", name)
        if match:
            task = f"{match['source']}-{match['target']}"
            tasks[task] = _only(folder, task, "translations")
    if not tasks:
        has = f"it has {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "it is empty"
        raise ValueError(
            f"system {system}: {folder} has no translations: expected en-de.hyp.txt, en-de.txt or en-de.de "
            f"for direction en-de, and so on; {has}"
        )
    return tasks


def _beside(folder: Path, tasks: Sequence[str], kind: str) -> dict[str, Path]:
    """The file of each direction that the systems have; one of a direction that they have not is an error."""
    option = f"--{kind}"
    _folder(option, folder)
    files = {task: _only(folder, task, kind) for task in tasks}
    for name in sorted(path.name for path in folder.iterdir()):
        # A file of a language pair belongs to both directions, of which one may well not be scored.
        match = re.fullmatch(rf"{_DIRECTION}\.(?:{_ENDINGS[kind]}\.)?txt(?:\.gz)?", name)
        if match and name.split(".")[0] not in tasks:
            raise ValueError(
                f"{option}: {folder / name} is of a direction that the systems have not; they have {', '.join(tasks)}"
            )
    return files


def _names(task: str, kind: str) -> tuple[list[str], list[str]]:
    """What the file of a direction may be called, and what one of the opposite direction is called that fits as well."""
    source, target = languages_of_task(task)
    language = source if kind == "sources" else target
    own = [f"{task}.{_ENDINGS[kind]}.txt", f"{task}.txt", f"{task}.{language}"]
    if kind == "translations":
        return own, []
    shared = f"{target}-{source}.{language}"
    return [*own, f"{task}.{language}.txt"], [shared, f"{shared}.txt"]


def _expected(folder: Path, task: str, kind: str) -> str:
    *names, last = _names(task, kind)[0][:3]
    return f"{', '.join(names)} or {last} in {folder}"


def _only(folder: Path, task: str, kind: str) -> Path:
    found: list[Path] = []
    for names in _names(task, kind):
        # A test set of its own has a direction's name; the opposite one may be another text, the other way.
        found = found or [folder / f"{name}{end}" for name in names for end in ("", ".gz")]
        found = [path for path in found if path.is_file()]
    if not found:
        raise ValueError(f"there are no {kind} of direction {task}: expected {_expected(folder, task, kind)}")
    if len(found) > 1:
        files = " and ".join(path.name for path in found)
        raise ValueError(f"{folder} has {files}, which could all be the {kind} of {task}; leave one of them there")
    return found[0]


def _read(path: Path, kind: str, references: Sequence[str] | None = None, beside: Path | None = None) -> list[str]:
    """The lines of a file; as many as there are references, where these are given."""
    lines = [line for _, line in read_lines(path)]
    if not lines:
        raise ValueError(f"{path} is empty; expected a sentence a line")
    if kind == "references" and not any(line.strip() for line in lines):
        raise ValueError(f"{path} has blank lines only; expected a reference in each")
    if any("\0" in line for line in lines):
        raise ValueError(f"{path} has zero bytes, which text has not (UTF-16?); convert it with iconv -t UTF-8")
    if references is not None and len(lines) != len(references):
        raise ValueError(
            f"{path} has {len(lines)} lines and {beside} has {len(references)}; expected a line for each reference"
        )
    return lines
