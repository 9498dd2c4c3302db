"""Messages of programs and their translations, from the gettext catalogues (``*.mo``) that are on the computer."""

from __future__ import annotations

import gettext
import locale
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nspec.files import sha256
from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus.base import AlignedCorpus, CorpusError, Pair, check_languages, clean, names
from nspec.mt.text.corpus.base import requested_languages as requested

SYSTEM_FOLDER = Path("/usr/share/locale")
EVALUATION_DEFAULT = 200
MIN_SEGMENTS = {"train": 500, "valid": 20, "test": 20}
MAX_WORDS = 60
MAX_CHARACTERS = 400
# The share of a language that one catalogue may take out of training; the second is for small collections.
DOMAIN_SHARES = (0.1, 0.4)

PLACEHOLDER = re.compile(
    r"%(?:\d+\$)?(?:\(\w+\))?[-+#0']*(?:\*|\d+)?(?:\.(?:\*|\d+))?(?:hh|h|ll|l|j|z|t|L|q)?[diouxXeEfFgGcsaApnm]"
    r"|%(?:\d+|%|<?P[A-Za-z]+>?)|\$\{\w+\}|\$\w+|\{\w*(?:[:!][^{}]*)?\}|@\w+@|</?[A-Za-z][^<>]*>"
)
WORD = re.compile(r"[^\W\d_]{2,}")
POSITION = re.compile(r"^%\d+\$")
MODIFIERS = {"latin": "Latn", "cyrillic": "Cyrl", "devanagari": "Deva", "arabic": "Arab"}


class CatalogueCorpus(AlignedCorpus):
    """Text of ``<folder>/<locale>/LC_MESSAGES/<domain>.mo``; English is the message id.

    A message is kept where it has at least two words beside markup, placeholders agree on both sides, it is not longer
    than 60 words or 400 characters, and the translation differs. Each English text is kept once. Whole domains are
    validation or test data, and no English text of theirs is in training.

    A locale is a language (``de``, ``de_DE``: ``de``), or a variety of its own (``pt_BR``; ``sr@latin``: ``sr_Latn``).
    Without ``config.languages`` the corpus has those with at least 500 training and 20 validation and test messages.
    """

    def __init__(self, config: CorpusConfig, seed: int) -> None:
        self.folder = Path(config.path) if config.path else SYSTEM_FOLDER
        catalogues = find_catalogues(self.folder)
        asked = requested(config)
        check_languages(asked, ["en", *catalogues], f"{self.folder}")
        codes = [code for code in (asked or sorted(catalogues)) if code != "en"]
        problems: Counter[str] = Counter()
        # by domain, message id and language
        messages: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
        self.files: list[Path] = []
        for code in codes:
            for path in catalogues[code]:
                self.files.append(path)
                domain = messages[path.stem]
                for english, translation in _messages(path, problems):
                    domain[english].setdefault(code, translation)
        sizes = {
            name: Counter(code for found in domain.values() for code in found) for name, domain in messages.items()
        }
        if not asked:
            total: Counter[str] = sum(sizes.values(), Counter())
            codes = [code for code in codes if total[code] >= MIN_SEGMENTS["train"]]
            # A language that is too small to be kept has no say in which domains may be held out.
            sizes = {name: Counter({code: size[code] for code in codes}) for name, size in sizes.items()}
        needs = {split: self._limits(config)[split] for split in ("test", "valid")}
        self.domains = split_domains(sizes, needs)
        texts, parts = _assemble(messages, self.domains)
        if not asked:
            codes = [
                code
                for code in codes
                if all(
                    sum(name in texts.get(code, {}) for name in parts[split]) >= n for split, n in MIN_SEGMENTS.items()
                )
            ]
            if not codes:
                raise CorpusError(
                    f"no language has enough messages in the catalogues of {self.folder} (needed: {MIN_SEGMENTS}); set "
                    "corpus.languages to take smaller ones, or corpus.path to another folder"
                )
        kept = asked or ["en", *codes]
        super().__init__(config, seed, {code: texts.get(code, {}) for code in kept}, parts)
        for reason, number in problems.items():
            self.skip(self.folder, reason, number)

    @staticmethod
    def _limits(config: CorpusConfig) -> dict[str, int]:
        return {
            "train": config.train_sentences,
            "valid": config.valid_sentences or EVALUATION_DEFAULT,
            "test": config.test_sentences or EVALUATION_DEFAULT,
        }

    def limit(self, split: str) -> int:
        return self._limits(self.config)[split]

    def identity(self) -> Any:
        return sorted([path.parent.parent.name, path.name, sha256(path)] for path in self.files)

    def explain_missing(self, pair: Pair, split: str) -> str:
        domains = sorted(name for name, part in self.domains.items() if part == split)
        return (
            f"the {split} catalogues are {names(domains, 10)}, and no message of theirs is translated for both; "
            f"{self.folder} has too few catalogues of these languages"
        )


def find_catalogues(folder: Path) -> dict[str, list[Path]]:
    """The ``.mo`` files by language code, those of the plain locale (``de`` before ``de_DE``) first.

    Raises:
        CorpusError: there are none.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("*/LC_MESSAGES/*.mo"), key=lambda path: (path.parent.parent.name, path.name)):
        code = language_of(path.parent.parent.name)
        # Links are second names of a catalogue (iso_3166.mo -> iso_3166-1.mo): two domains with one text.
        if code and not path.is_symlink():
            found[code].append(path)
    if not found:
        raise CorpusError(
            f"there are no catalogues <locale>/LC_MESSAGES/*.mo in {folder}; set corpus.path to a folder that has some "
            "(slim container images leave them out)"
        )
    return dict(found)


def language_of(name: str) -> str:
    """The language code of a locale: ``de_DE.UTF-8`` is ``de``, ``pt_BR`` itself, ``sr@latin`` ``sr_Latn``.

    English locales give "": they hold spelling variants of the message ids.
    """
    base, _, modifier = name.partition("@")
    base = base.partition(".")[0]
    language, _, territory = base.partition("_")
    if language in ("en", "C", "POSIX") or not re.fullmatch(r"[a-z]{2,3}(_[A-Za-z0-9]+)*", base):
        return ""
    home = locale.normalize(language).partition(".")[0].partition("@")[0]
    code = language if territory and base in (home, f"{language}_{language.upper()}") else base
    suffix = MODIFIERS.get(modifier, modifier)
    return f"{code}_{suffix}" if suffix else code


def _messages(path: Path, problems: Counter[str]) -> Iterator[tuple[str, str]]:
    try:
        with open(path, "rb") as file:
            translations = gettext.GNUTranslations(file)
    # A system has catalogues of hundreds of programs; one with a wrong header or a cut end does not spoil the others.
    except (OSError, UnicodeError, LookupError, struct.error, ValueError):
        problems["unreadable catalogue"] += 1
        return
    catalogue: dict[Any, str] = translations._catalog  # type: ignore[attr-defined]
    singular: int = translations.plural(1)  # type: ignore[attr-defined]
    for key, translation in catalogue.items():
        message, form = key if isinstance(key, tuple) else (key, singular)
        if not message or form != singular:
            continue
        english, translation = clean(message.rpartition("\x04")[2]), clean(translation)
        reason = problem(english, translation)
        if reason:
            problems[reason] += 1
        else:
            yield english, translation


def problem(english: str, translation: str) -> str:
    """Why a message is of no use for translation, or ""."""
    if not english or not translation:
        return "empty side"
    if english == translation:
        return "not translated"
    if " " not in english or len(WORD.findall(PLACEHOLDER.sub(" ", english))) < 2:
        return "fewer than two words"
    if not WORD.search(PLACEHOLDER.sub(" ", translation)):
        return "translation without words"
    for text in (english, translation):
        if len(text) > MAX_CHARACTERS or len(text.split()) > MAX_WORDS:
            return "too long"
    if placeholders(english) != placeholders(translation):
        return "placeholders differ"
    return ""


def placeholders(text: str) -> list[str]:
    """What must be the same on both sides: printf and brace fields, variables and tags, without order or position."""
    found = (POSITION.sub("%", item) for item in PLACEHOLDER.findall(text))
    return sorted(item.split()[0].rstrip(">") if item.startswith("<") else item for item in found)


def split_domains(sizes: dict[str, Counter[str]], needs: dict[str, int]) -> dict[str, str]:
    """Gives each domain to train, valid or test.

    Evaluation domains are taken one by one, always the one that gives most languages what they need for the fewest
    messages lost to training, and none that holds too large a share of a language. The split is the same for every seed.

    Args:
        sizes: messages by domain and language.
        needs: messages that a language needs, by split; a twentieth of a language's messages is enough, too.
    """
    total: Counter[str] = sum(sizes.values(), Counter())
    given: dict[str, str] = {}
    for split, most in needs.items():
        needed = Counter({code: min(most, max(1, total[code] // 20)) for code in total})
        for share in DOMAIN_SHARES:
            free = [name for name in sorted(sizes) if name not in given]
            free = [name for name in free if all(sizes[name][code] <= share * total[code] for code in sizes[name])]
            while free:
                gains = {name: sum((sizes[name] & needed).values()) for name in free}
                best = max(free, key=lambda name: gains[name] / max(1, sum(sizes[name].values())))
                if not gains[best]:
                    break
                given[best] = split
                needed -= sizes[best]
                free.remove(best)
    return {name: given.get(name, "train") for name in sizes}


def _assemble(
    messages: dict[str, dict[str, dict[str, str]]], domains: dict[str, str]
) -> tuple[dict[str, dict[str, str]], dict[str, Iterable[str]]]:
    """Texts by language and id, and ids by split; each English text once, evaluation data before training data."""
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    seen: set[str] = set()
    for split in ("test", "valid", "train"):
        best: dict[str, str] = {}
        for domain in sorted(name for name, part in domains.items() if part == split):
            for english, found in messages[domain].items():
                if english not in seen and len(found) > len(messages.get(best.get(english, ""), {}).get(english, {})):
                    best[english] = domain
        seen.update(best)
        for english, domain in best.items():
            name = f"{domain}\x04{english}"
            parts[split].append(name)
            texts["en"][name] = english
            for code, translation in messages[domain][english].items():
                texts[code][name] = translation
    return dict(texts), dict(parts)
