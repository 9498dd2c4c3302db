"""How one language says the contents of :mod:`nspec.mt.text.corpus.cldr_content`, with CLDR as Babel ships it."""

from __future__ import annotations

import datetime
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any
from unittest import mock

from nspec.mt.text.corpus.base import CorpusError
from nspec.mt.text.corpus.cldr_content import SLOT, Fragment, Inventory

try:
    import babel
    from babel import Locale, dates, localedata, numbers
    from babel.core import UnknownLocaleError, get_global
except ImportError as error:
    raise ImportError(
        'the "cldr" corpus needs Babel; install it with: pip install ".[mt]" in nspec\'s checkout'
    ) from error

BABEL_VERSION = babel.__version__
# Soft hyphens, marks and embeddings of direction, zero-width spaces and joiners of words: layout, not text. ZWNJ and ZWJ
# are spelling and stay.
INVISIBLE = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u2060\u2066-\u2069\u202a-\u202e\ufeff]")
ARABIC_PUNCTUATION = {",": "،", ";": "؛"}


class PrivateLocale(Locale):
    """A locale with data of its own.

    Babel writes what an alias resolves to into tables that locales share with the root, so that a locale that was used
    first changes what others say (python-babel issue 1234). Text must not depend on the order of languages.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        with mock.patch.dict(localedata._cache, clear=True):
            data: dict[Any, Any] = localedata.load(str(self))
        self._private = localedata.LocaleDataDict(data)

    @property
    def _data(self) -> localedata.LocaleDataDict:
        return self._private


def open_locale(code: str) -> PrivateLocale:
    """The locale of a language code.

    Raises:
        CorpusError: CLDR has no such locale.
    """
    try:
        found = PrivateLocale.parse(code)
    except (UnknownLocaleError, ValueError, TypeError) as error:
        raise CorpusError(
            f"corpus.languages: CLDR has no locale {code!r}; expected a code such as de, pt_BR or zh_Hans"
        ) from error
    assert isinstance(found, PrivateLocale)
    return found


def tidy(text: str) -> str:
    """NFC, plain single spaces, no invisible layout characters."""
    return " ".join(INVISIBLE.sub("", unicodedata.normalize("NFC", text)).split())


class Renderer:
    """Says contents in one language.

    Fragment kinds are methods; each returns a text, or raises LookupError where CLDR has nothing for the language.
    """

    def __init__(self, code: str) -> None:
        self.locale = open_locale(code)
        data = self.locale._data
        self.names = {
            "territory": _plain(self.locale.territories),
            "language": _plain(self.locale.languages),
            "script": _plain(self.locale.scripts),
            "currency": _plain(self.locale.currencies),
            "weekday": _plain(self.locale.days["stand-alone"]["wide"]),
            "month": _plain(self.locale.months["stand-alone"]["wide"]),
        }
        self.zones = self.locale.time_zones
        self.metazones = self.locale.meta_zones
        self.fields: Mapping[str, Any] = data["date_fields"]
        self.units: Mapping[str, Any] = data["unit_patterns"]
        self.compound = data["compound_unit_patterns"]["per"]
        self.standard_list = _plain(self.locale.list_patterns["standard"])
        self.lists = {"standard": self.standard_list}
        for style in ("or", "unit"):
            self.lists[style] = {**self.standard_list, **_plain(self.locale.list_patterns.get(style, {}))}
        self.punctuation = self._punctuation()
        self._cache: dict[Fragment, str] = {}
        self._patterns: dict[tuple[str, str], dict[str, str]] = {}

    def say(self, literals: Sequence[str], fragments: Sequence[Fragment]) -> str | None:
        """The sentence of a content, or None where CLDR lacks a part of it in this language."""
        try:
            parts = [self.punctuation(literals[0])]
            for literal, fragment in zip(literals[1:], fragments):
                parts += [self.fragment(fragment), self.punctuation(literal)]
        except LookupError:
            return None
        return tidy("".join(parts))

    def fragment(self, fragment: Fragment) -> str:
        text: str = getattr(self, fragment[0])(*fragment[1:])
        return text

    def _punctuation(self) -> Callable[[str], str]:
        """Puts the locale's comma and semicolon in the place of "," and ";"."""
        start = INVISIBLE.sub("", SLOT.sub("", re.sub(r"\{[01]\}", "", self.standard_list["start"])))
        likely = get_global("likely_subtags").get(str(self.locale), str(self.locale))
        arabic = "_Arab" in likely
        comma = start if start.strip() and not any(map(str.isalnum, start)) else "، " if arabic else ", "
        marks = {", ": comma, **{f"{mark} ": f"{other} " for mark, other in ARABIC_PUNCTUATION.items() if arabic}}
        if arabic:
            marks[", "] = comma
        table: dict[str, str] = {}

        def replace(literal: str) -> str:
            if literal not in table:
                text = literal
                for mark, other in marks.items():
                    text = text.replace(mark, other)
                table[literal] = text
            return table[literal]

        return replace

    # Names

    def _name(self, table: str, code: str | int) -> str:
        return self.names[table][code]

    def territory(self, code: str) -> str:
        return self._name("territory", code)

    def language(self, code: str) -> str:
        return self._name("language", code)

    def script(self, code: str) -> str:
        return self._name("script", code)

    def currency(self, code: str) -> str:
        return self._name("currency", code)

    def weekday(self, number: int) -> str:
        """Monday is 0."""
        return self._name("weekday", number)

    def month(self, number: int) -> str:
        """January is 1."""
        return self._name("month", number)

    def city(self, zone: str) -> str:
        """The exemplar city of a time zone; where a language has no name for it, the one in the zone's key."""
        found: str | None = self.zones[zone].get("city") if zone in self.zones else None
        return found or zone.rpartition("/")[2].replace("_", " ")

    def place(self, zone: str) -> str:
        return f"{self.city(zone)}{self.punctuation(', ')}{self.territory(get_global('zone_territories')[zone])}"

    def zone(self, name: str) -> str:
        found: str = self.metazones[name]["long"]["standard"]
        return found

    def locale_name(self, identifier: str) -> str:
        key = ("locale_name", identifier)
        if key not in self._cache:
            self._cache[key] = _required(Locale.parse(identifier).get_display_name(self.locale))
        return self._cache[key]

    def listing(self, style: str, fragments: Sequence[Fragment]) -> str:
        texts = [self.fragment(fragment) for fragment in fragments]
        patterns = self.lists[style]
        if len(texts) < 3:
            return patterns["2"].format(*texts) if len(texts) == 2 else texts[0]
        text = patterns["start"].format(texts[0], texts[1])
        for middle in texts[2:-1]:
            text = patterns["middle"].format(text, middle)
        return patterns["end"].format(text, texts[-1])

    # Dates and times

    def date(self, style: str, year: int, month: int, day: int) -> str:
        return dates.format_date(datetime.date(year, month, day), style, self.locale)

    def time(self, hour: int, minute: int) -> str:
        return dates.format_time(datetime.time(hour, minute), "short", locale=self.locale)

    def skeleton(self, skeleton: str, year: int, month: int, day: int, hour: int, minute: int) -> str:
        moment = datetime.datetime(year, month, day, hour, minute)
        return dates.format_skeleton(skeleton, moment, fuzzy=False, locale=self.locale)

    def interval(self, skeleton: str, year: int, month: int, day: int, days: int) -> str:
        first = datetime.date(year, month, day)
        last = first + datetime.timedelta(days=days)
        if skeleton not in self.locale.interval_formats:
            raise LookupError(skeleton)
        return dates.format_interval(first, last, skeleton, fuzzy=False, locale=self.locale)

    def relative(self, unit: str, value: int) -> str:
        """From now; negative values lie in the past."""
        patterns = self.fields[unit]["future" if value > 0 else "past"]
        return _plural(patterns, self.locale.plural_form(abs(value))).format(self.number(abs(value)))

    # Numbers

    def number(self, value: int | float) -> str:
        return numbers.format_decimal(value, locale=self.locale)

    def percent(self, permille: int) -> str:
        return numbers.format_percent(permille / 1000, locale=self.locale, decimal_quantization=False)

    def compact(self, value: int) -> str:
        length = "long" if "long" in self.locale.compact_decimal_formats else "short"
        return numbers.format_compact_decimal(value, format_type=length, locale=self.locale, fraction_digits=1)  # type: ignore[arg-type]

    def scientific(self, value: int) -> str:
        return numbers.format_scientific(value, locale=self.locale)

    def money(self, value: int | float, currency: str) -> str:
        # Rounded first: the plural form is that of the number that is written.
        if not numbers.get_currency_precision(currency):
            value = round(value)
        digits = isinstance(value, float)
        self._name("currency", currency)  # Babel writes the code where there is no name
        return numbers.format_currency(
            value, currency, locale=self.locale, format_type="name", currency_digits=digits
        )  # fmt: skip

    def symbol_money(self, value: int | float, currency: str) -> str:
        return numbers.format_currency(value, currency, locale=self.locale)

    def compact_money(self, value: int, currency: str) -> str:
        return numbers.format_compact_currency(value, currency, locale=self.locale, fraction_digits=1)

    # Units

    def _unit_patterns(self, unit: str, length: str) -> dict[str, str]:
        """Patterns by plural form; where a language has no long ones, the short ones, as CLDR's root says."""
        key = (unit, length)
        if key not in self._patterns:
            found = self.units[unit]
            short = _plain(found.get("short", {}))
            own = _plain(found.get(length, {}))
            self._patterns[key] = own if "other" in own else {**short, **own}
        return self._patterns[key]

    def unit(self, value: int | float, unit: str, length: str) -> str:
        return _plural(self._unit_patterns(unit, length), self.locale.plural_form(value)).format(self.number(value))

    def per(self, amount: Fragment, unit: str) -> str:
        """An amount for each unit: 5 euros per kilogram."""
        patterns = self._unit_patterns(unit, "long")
        if "per" in patterns:
            return patterns["per"].format(self.fragment(amount))
        one = _plural(patterns, self.locale.plural_form(1)).replace("{0}", "").strip()
        compound = self.compound.get("long") or self.compound["short"]
        return str(compound["compound"].format(self.fragment(amount), one))


def _plain(table: Mapping[Any, Any]) -> dict[Any, Any]:
    """A Babel table as a dictionary, which is faster to look things up in."""
    return {key: table[key] for key in table}


def _plural(patterns: Mapping[str, str], form: str) -> str:
    return patterns[form] if form in patterns else patterns["other"]


def _required(text: str | None) -> str:
    if not text:
        raise LookupError
    return text


def inventory(references: Sequence[str]) -> Inventory:
    """The codes that all ``references`` have names for, so that contents do not depend on the languages of a run."""
    sayers = [Renderer(code) for code in references]

    def common(table: str, codes: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(code for code in set(codes) if all(code in sayer.names[table] for sayer in sayers)))

    def by_territory(codes: Mapping[str, Iterable[str]], known: Collection[str]) -> dict[str, tuple[str, ...]]:
        found = {
            name: tuple(sorted(code for code in set(codes.get(name, ())) if code in known)) for name in territories
        }
        return {name: names for name, names in found.items() if names}

    identifiers = localedata.locale_identifiers()
    money, where = get_global("territory_currencies"), get_global("zone_territories")
    legal = {name: [entry[0] for entry in entries if entry[2] is None and entry[3]] for name, entries in money.items()}
    # Without the codes that stand for unions, for pseudo-locales and for nothing.
    territories = common(
        "territory", (code for code in money if re.fullmatch("[A-Z]{2}", code) and code in where.values())
    )
    languages = common("language", (name.partition("_")[0] for name in identifiers))
    scripts = common("script", (code for code in sayers[0].names["script"] if not code.startswith("Z")))
    currencies = common("currency", (code for codes in legal.values() for code in codes))
    zones = [
        name
        for name in sorted(sayers[0].metazones)
        if all("standard" in sayer.metazones.get(name, {}).get("long", {}) for sayer in sayers)
    ]
    # Languages in Latin script leave out the cities that they spell as the zone does; the others name all that matter.
    naming = [sayer for sayer, code in zip(sayers, references) if code in ("ar", "fa", "he")]
    cities = [
        zone
        for zone in sorted(where)
        if where[zone] in territories and all("city" in sayer.zones.get(zone, {}) for sayer in naming)
    ]
    metazones = get_global("meta_zones")
    return Inventory(
        territories=territories,
        regions=common("territory", (code for code in sayers[0].names["territory"] if code.isdigit())),
        languages=languages,
        scripts=scripts,
        currencies=currencies,
        cities=tuple(cities),
        zones=tuple(zones),
        spoken=by_territory(get_global("territory_languages"), languages),
        tender=by_territory(legal, currencies),
        territory_of={zone: where[zone] for zone in cities},
        zone_of={zone: metazones[zone] for zone in cities if metazones.get(zone) in zones},
        locales=tuple(sorted(name for name in identifiers if _sayable(name, languages, scripts))),
    )


def _sayable(identifier: str, languages: Sequence[str], scripts: Sequence[str]) -> bool:
    language, _, rest = identifier.partition("_")
    return (
        language in languages
        and "_" not in rest
        and (rest in scripts or re.fullmatch("[A-Z]{2}|419|150", rest) is not None)
    )
