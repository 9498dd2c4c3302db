"""Any translation data set that the ``datasets`` library can load: hub names and local folders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from nspec.mt.languages import normalized_code
from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus.base import EMPTY_SIDE, Corpus, CorpusError, Pair, Segment, clean, names, pair_of, pivot_of
from nspec.mt.text.corpus.base import requested_languages as requested
from nspec.mt.text.corpus.base import split_direction as split_codes
from nspec.mt.text.corpus.files import VALID_NAMES
from nspec.mt.text.corpus.parallel import text_of

INSTALL = 'the "hub" corpus needs the datasets library; install it with: pip install ".[mt]" in nspec\'s checkout'


class HubCorpus(Corpus):
    """Text of ``datasets.load_dataset(config.name, subset)``.

    A row is ``{"translation": {code: text}}``, or has one column for each language. A subset is tried with the two
    codes of a pair in either order; an empty subset loads the data set without one, and every pair is read from it. Where
    ``config.valid_split`` is ``valid``, the splits dev, val and validation are taken for it too.
    """

    def __init__(self, config: CorpusConfig, seed: int) -> None:
        if not config.name:
            raise CorpusError("corpus.name is empty; give the name of a data set or a folder that datasets can load")
        languages = requested(config)
        if config.directions:
            pairs = [pair_of(*split_codes(direction)) for direction in config.directions]
        elif pivot := pivot_of(config):
            pairs = [pair_of(code, pivot) for code in languages if code != pivot]
        else:
            pairs = list(combinations(sorted(languages), 2))
        if not pairs:
            raise CorpusError("a hub corpus does not tell its languages: set corpus.languages or corpus.directions")
        self.loaded: dict[str, Any] = {}
        self.subsets = {pair: self._load(config, pair) for pair in dict.fromkeys(pairs)}
        super().__init__(config, seed, languages, pairs)
        for pair in self.pairs:
            self._check_columns(pair)

    def _load(self, config: CorpusConfig, pair: Pair) -> str:
        """Loads what holds ``pair``, once; returns its subset."""
        tried = []
        hyphened = tuple(code.replace("_", "-") for code in pair)
        for source, target in (pair, pair[::-1], hyphened, hyphened[::-1]):
            subset = config.subset.replace("{pair}", f"{source}-{target}")
            subset = subset.replace("{source}", source).replace("{target}", target)
            if subset in self.loaded:
                return subset
            if subset not in tried:
                tried.append(subset)
        failures = []
        for subset in tried:
            try:
                self.loaded[subset] = load_data(config.name, subset)
                return subset
            except CorpusError:
                raise
            except ValueError as error:  # what datasets raises for an unknown subset
                failures.append(str(error).splitlines()[0])
        raise CorpusError(
            f"data set {config.name} has no subset for {'-'.join(pair)}: tried {names(tried)} (corpus.subset is "
            f"{config.subset!r}); datasets says: {failures[-1]}"
        )

    def _part(self, pair: Pair, split: str) -> Any:
        """The rows of a split, or None."""
        data = self.loaded[self.subsets[pair]]
        wanted = {"train": "train", "valid": self.config.valid_split, "test": self.config.test_split}[split]
        for name in VALID_NAMES if wanted == "valid" else (wanted,):
            if name in data and (split == "test" or name != self.config.test_split):  # never one part for both
                return data[name]
        return None

    def _check_columns(self, pair: Pair) -> None:
        for part in self.loaded[self.subsets[pair]].values():
            present = _keys(part)
            missing = [code for code in pair if code not in map(normalized_code, present)]
            if missing:
                raise CorpusError(
                    f"data set {self.config.name}, subset {self.subsets[pair]!r}, split {part.split}: no text for "
                    f"{names(missing)}; expected translation.{pair[0]} and translation.{pair[1]}, or columns of these "
                    f"names; found {names(present)}"
                )

    def segments(self, pair: Pair, split: str) -> Iterator[Segment]:
        part = self._part(pair, split)
        nested = part is not None and "translation" in part.features
        present = _keys(part) if part is not None else []
        keys: dict[str, str] = {}
        for key in present:
            code = normalized_code(key)
            if code in keys and code in pair:
                raise CorpusError(
                    f"data set {self.config.name}, subset {self.subsets[pair]!r}: {keys[code]} and {key} are the same "
                    "language; keep one"
                )
            keys[code] = key
        # Only what is needed is decoded: a wide multiway table has dozens of columns.
        needed = ["translation"] if nested else [keys[code] for code in pair if code in keys]
        rows = part.select_columns(needed) if part is not None else []
        for number, row in enumerate(rows, 1):
            row = (row["translation"] or {}) if nested else row
            where = f"data set {self.config.name}, subset {self.subsets[pair]!r}, row {number} of {split}"
            first, second = (clean(text_of(row.get(keys[code]), code, where)) for code in pair)
            if first and second:
                yield str(number), first, second
            else:
                self.skip((pair, split), EMPTY_SIDE)

    def identity(self) -> Any:
        found: dict[str, dict[str, list[Any]]] = defaultdict(dict)
        for subset, data in self.loaded.items():
            for name, part in data.items():
                found[subset][name] = [len(part), part._fingerprint]
        return found

    def explain_missing(self, pair: Pair, split: str) -> str:
        if pair not in self.subsets:
            return "corpus.languages and corpus.directions do not ask for it"
        if self._part(pair, split) is not None:
            return f"no row of data set {self.config.name} has text in both languages"
        has = names(self.loaded[self.subsets[pair]])
        option = "" if split == "train" else f"; corpus.{split}_split names the split"
        return f"subset {self.subsets[pair]!r} of data set {self.config.name} has the splits {has}{option}"


def _keys(part: Any) -> list[str]:
    """What the languages of a split are called: the keys under "translation", or its columns."""
    feature = part.features.get("translation")
    if feature is None:
        return list(part.features)
    return list(feature.languages if hasattr(feature, "languages") else feature)


def load_data(name: str, subset: str) -> Any:
    """``datasets.load_dataset`` with errors of this package."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(INSTALL) from error
    local = Path(name).exists()
    try:
        data = datasets.load_dataset(name, subset or None)
    except FileNotFoundError as error:  # DatasetNotFoundError and empty folders
        raise CorpusError(
            f"data set {name} was not found{'' if local else ' on the hub or as a folder'}: {_first(error)}"
        ) from error
    except OSError as error:  # ConnectionError and the errors of HTTP clients
        raise CorpusError(f"data set {name} could not be loaded, is there a network? {_first(error)}") from error
    except RuntimeError as error:  # a folder with a loading script, which datasets no longer runs
        if "script" not in str(error).lower():
            raise
        raise CorpusError(
            f"data set {name} is a program ({_first(error)}), which is not run; write its rows to Parquet or JSON lines, "
            "and give the folder of those as corpus.name"
        ) from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise CorpusError(f"data set {name} is malformed: {_first(error.__cause__ or error)}") from error
    return data


def _first(error: BaseException) -> str:
    """The first line of an error's text."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no details'}"
