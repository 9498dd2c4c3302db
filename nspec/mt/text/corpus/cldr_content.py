"""What the sentences of the CLDR corpus say, before any language says it: places, dates, amounts and their frames.

A content is a frame (literal punctuation between slots) and one fragment for each slot. A fragment is a tuple of a
kind, which is the name of a method of :class:`nspec.mt.text.corpus.cldr_render.Renderer`, and its arguments.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Fragment = tuple[Any, ...]

# Change it when the same seed would give other text.
VERSION = 1

# Frames by concept, and each concept's weight. Every slot is drawn anew, but here, here_city, here_place, spoken, tender
# and clock are all of one place. In a sentence "," and ";" become the locale's.
FRAMES: dict[str, tuple[int, tuple[str, ...]]] = {
    "places": (3, (
        "{territories}", "{cities}", "{territories} – {distance}", "{place} – {territories}", "{area}: {territories}",
        "{city} – {city}: {distance}", "{place} – {place}: {distance} ({travel})", "{here_place}: {area}, {compact}",
        "{city} – {city}: {distance}, {travel}, {money}", "{territory}, {territory} – {rate}", "{region}: {area}",
        "{place}; {place}", "{place} – {city}", "{region}, {region}: {area}, {compact}", "{here_place}: {cities}",
    )),
    "languages": (3, (
        "{here}: {spoken}", "{here_place}: {spoken}", "{language} ({script}): {percent}",
        "{here}: {spoken} ({percent})",
        "{locale}: {percent}", "{languages}: {percent}", "{city}: {language} ({percent}), {language} ({percent})",
        "{territories}: {languages}", "{locale}, {locale}", "{language}: {compact}; {language}: {compact}",
        "{languages}; {scripts}", "{scripts} – {language}", "{relative}: {languages}", "{place}: {language}, {date}",
    )),
    "dates": (4, (
        "{weekday_date}: {cities}", "{place}: {weekday_date}, {time}", "{date}, {time}: {place}", "{interval}: {place}",
        "{interval}: {territories}", "{place}: {short_date}, {daytime}", "{era_date}: {territories}",
        "{weekday_date} – {weekday_date}", "{here_city}, {weekday_date}, {time} ({clock})", "{here_city}: {clock}",
        "{here_city}: {clock}, {time}", "{date}: {territory}, {language}", "{month_year}: {territories}",
        "{weekday_date}; {duration}; {city}", "{territory}: {short_interval}, {time}", "{date}, {time} ({zone})",
        "{here_place}: {time}, {clock}", "{zone} – {zone}",
    )),
    "calendar": (3, (
        "{relative}: {place}", "{relative} ({weekday_date})", "{relative}, {daytime}: {city}", "{place}: {relative}",
        "{weekdays}, {time}: {city}", "{weekdays}: {place}", "{place}: {months}", "{months}: {percent}, {quantity}",
        "{quarter}: {percent}; {quarter}: {percent}", "{quarter}: {money} ({percent})", "{months} ({territory})",
        "{relative}: {quantity}", "{relative}, {city}: {weekdays}", "{weekdays} – {daytime}", "{relative}; {relative}",
    )),
    "quantities": (4, (
        "{quantities}", "{place}: {quantity}", "{quantity} ({relative}): {territory}", "{quantity}: {quantities}",
        "{durations}: {quantity}", "{durations} – {city}", "{rate}: {territory}", "{rate} ({weekdays})",
        "{short_quantity}, {short_quantity}: {place}", "{date}: {quantities}", "{territory}: {quantity}, {rate}",
        "{quantity}: {percent} ({quarter})", "{temperature}: {cities}", "{weekday_date}: {temperature} ({city})",
        "{city}: {temperature}, {rate}",
    )),
    "money": (4, (
        "{here}: {tender}", "{here_place}: {tender} ({percent})", "{price}: {territories}", "{price} ({relative})",
        "{currencies}: {quarter}", "{currencies} – {percent}", "{tender}, {relative}: {here_place}",
        "{month_year}: {money} ({percent})", "{quantity}: {money}", "{quantities}: {symbol_money}", "{price}; {price}",
        "{place}: {symbol_money}, {date}", "{compact_money} – {territory}, {quarter}", "{relative}: {money}; {percent}",
        "{money} – {money}: {cities}", "{currency}: {percent}, {month_year}",
    )),
    "numbers": (2, (
        "{territory}: {compact} ({percent})", "{territories}: {number}; {percent}", "{number} – {territories}",
        "{place}: {compact}, {relative}", "{territory}, {date}: {number}", "{scientific}: {quantity} ({language})",
        "{region}: {compact}, {compact}, {percent}", "{month_year}, {territories}: {percent}",
    )),
}  # fmt: skip

RELATIVE_UNITS = {"year": 30, "month": 24, "week": 16, "day": 60, "hour": 48, "minute": 59, "second": 59}
# Quantities: the largest sensible value of each unit, so that a reader meets plausible amounts.
UNITS = {
    "angle-degree": 360, "area-hectare": 5000, "area-square-meter": 9000, "digital-gigabyte": 900,
    "digital-megabyte": 900, "digital-terabyte": 50, "digital-kilobyte": 900, "duration-century": 20,
    "duration-decade": 9, "electric-volt": 400, "electric-ampere": 60, "electric-ohm": 900, "energy-calorie": 3000,
    "energy-joule": 900, "energy-kilojoule": 9000, "energy-kilocalorie": 3000, "energy-kilowatt-hour": 9000,
    "frequency-gigahertz": 30, "frequency-hertz": 900, "frequency-kilohertz": 900, "frequency-megahertz": 900,
    "graphics-megapixel": 60, "graphics-pixel": 4000, "length-centimeter": 300, "length-foot": 900, "length-inch": 90,
    "length-kilometer": 9000, "length-light-year": 500, "length-meter": 900, "length-mile": 900,
    "length-micrometer": 900, "length-nanometer": 900, "length-nautical-mile": 900, "length-yard": 400,
    "length-millimeter": 900, "mass-carat": 40,
    "mass-gram": 900, "mass-kilogram": 900, "mass-milligram": 900, "mass-ounce": 90, "mass-pound": 300,
    "mass-tonne": 5000, "power-gigawatt": 40, "power-horsepower": 600, "power-kilowatt": 900, "power-megawatt": 900,
    "power-watt": 3000, "pressure-atmosphere": 40, "pressure-bar": 90, "pressure-hectopascal": 1050,
    "volume-barrel": 9000, "volume-centiliter": 99, "volume-cubic-centimeter": 900, "volume-cubic-kilometer": 90,
    "volume-cubic-meter": 5000, "volume-cup": 12, "volume-gallon": 200, "volume-hectoliter": 900, "volume-liter": 900,
    "volume-milliliter": 900, "volume-tablespoon": 12, "volume-teaspoon": 12, "light-lux": 9000,
    "torque-newton-meter": 900,
}  # fmt: skip
SHORT_UNITS = (
    "length-kilometer", "length-meter", "length-centimeter", "mass-kilogram", "mass-gram", "volume-liter",
    "power-kilowatt", "digital-gigabyte", "duration-hour", "duration-minute", "area-square-meter",
)  # fmt: skip
DURATIONS = {"duration-year": 40, "duration-month": 24, "duration-week": 20, "duration-day": 90, "duration-hour": 48,
             "duration-minute": 90, "duration-second": 90}  # fmt: skip
DISTANCES = {"length-kilometer": 12000, "length-mile": 8000, "length-nautical-mile": 5000}
TRAVEL = {"duration-minute": 59, "duration-hour": 40, "duration-day": 12}
AREAS = {"area-square-kilometer": 900000, "area-square-mile": 400000, "area-hectare": 90000}
TEMPERATURES = {
    "temperature-celsius": (-30, 42),
    "temperature-fahrenheit": (-20, 104),
    "temperature-kelvin": (240, 320),
}
SPEEDS = {"speed-kilometer-per-hour": 900, "speed-meter-per-second": 90, "speed-mile-per-hour": 200,
          "consumption-liter-per-100-kilometer": 20, "speed-knot": 60}  # fmt: skip
PER_TIME = ("duration-hour", "duration-minute", "duration-second", "duration-day", "duration-week", "duration-month",
            "duration-year")  # fmt: skip
PER_MEASURE = ("mass-kilogram", "mass-gram", "volume-liter", "length-kilometer", "length-meter")
PER = (*PER_MEASURE, *PER_TIME, "area-square-meter", "area-square-kilometer", "volume-cubic-meter")
# One duration or one list of durations holds each unit once, from the largest to the smallest.
DURATION_LISTS = (
    ("duration-year", "duration-month"), ("duration-week", "duration-day"), ("duration-minute", "duration-second"),
    ("duration-day", "duration-hour", "duration-minute"), ("duration-hour", "duration-minute"),
    ("duration-hour", "duration-minute", "duration-second"),
)  # fmt: skip
SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Inventory:
    """The codes that contents are made of, each list sorted: a code is the same thing in every language.

    ``cities`` are keys of time zones. ``spoken`` and ``tender`` are languages and currencies of territories;
    ``territory_of`` and ``zone_of`` belong to cities.
    """

    territories: tuple[str, ...]
    regions: tuple[str, ...]
    languages: tuple[str, ...]
    scripts: tuple[str, ...]
    currencies: tuple[str, ...]
    cities: tuple[str, ...]
    zones: tuple[str, ...]
    spoken: dict[str, tuple[str, ...]]
    tender: dict[str, tuple[str, ...]]
    territory_of: dict[str, str]
    zone_of: dict[str, str]
    locales: tuple[str, ...]


class Composer:
    """Draws contents. All draws go through ``random()``, whose sequence no Python version changes."""

    def __init__(self, inventory: Inventory, seed: str) -> None:
        self.codes = inventory
        self.random = random.Random(seed).random
        self.here = inventory.cities[0]
        self.concepts = [
            [(SLOT.split(frame)[0::2], [getattr(self, "_" + slot) for slot in SLOT.findall(frame)]) for frame in frames]
            for weight, frames in FRAMES.values()
            for _ in range(weight)
        ]

    def content(self) -> tuple[list[str], list[Fragment]]:
        """The literals of a frame (one more than it has slots) and the fragments of its slots."""
        literals, makers = self.pick(self.pick(self.concepts))
        self.here = self.pick(self.codes.cities)
        return literals, [make() for make in makers]

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.random() * len(items))]

    def some(self, items: Sequence[T], least: int, most: int) -> list[T]:
        """Between ``least`` and ``most`` different items."""
        count = self.between(least, most)
        found: list[T] = []
        while len(found) < count:
            item = self.pick(items)
            if item not in found:
                found.append(item)
        return found

    def between(self, least: int, most: int) -> int:
        return least + int(self.random() * (most + 1 - least))

    def amount(self, most: int) -> int | float:
        """Small numbers more often than large ones; one in six has a decimal."""
        draw = self.random()
        top = min(most, 12) if draw < 0.45 else min(most, 99) if draw < 0.75 else most
        value = self.between(1, top)
        return round(value + self.between(1, 9) / 10, 1) if self.random() < 1 / 6 and value < 1000 else value

    def _list(self, kind: str, codes: Sequence[Any], least: int = 2, most: int = 4) -> Fragment:
        style = "or" if self.random() < 0.3 else "standard"
        return ("listing", style, tuple((kind, code) for code in self.some(codes, least, most)))

    def _territory(self) -> Fragment:
        return ("territory", self.pick(self.codes.territories))

    def _region(self) -> Fragment:
        return ("territory", self.pick(self.codes.regions))

    def _territories(self) -> Fragment:
        return self._list("territory", self.codes.territories)

    def _city(self) -> Fragment:
        return ("city", self.pick(self.codes.cities))

    def _place(self) -> Fragment:
        return ("place", self.pick(self.codes.cities))

    def _here(self) -> Fragment:
        return ("territory", self.codes.territory_of[self.here])

    def _here_city(self) -> Fragment:
        return ("city", self.here)

    def _here_place(self) -> Fragment:
        return ("place", self.here)

    def _clock(self) -> Fragment:
        zone = self.codes.zone_of.get(self.here)
        return ("zone", zone) if zone else self._zone()

    def _spoken(self) -> Fragment:
        languages = self.codes.spoken.get(self.codes.territory_of[self.here], ())
        return self._list("language", languages, 1, min(3, len(languages))) if languages else self._languages()

    def _tender(self) -> Fragment:
        return ("money", self._sum(), self.pick(self.codes.tender.get(self.codes.territory_of[self.here], ("EUR",))))

    def _cities(self) -> Fragment:
        return self._list("city", self.codes.cities)

    def _language(self) -> Fragment:
        return ("language", self.pick(self.codes.languages))

    def _languages(self) -> Fragment:
        return self._list("language", self.codes.languages)

    def _script(self) -> Fragment:
        return ("script", self.pick(self.codes.scripts))

    def _scripts(self) -> Fragment:
        return self._list("script", self.codes.scripts, 2, 3)

    def _locale(self) -> Fragment:
        return ("locale_name", self.pick(self.codes.locales))

    def _currency(self) -> Fragment:
        return ("currency", self.pick(self.codes.currencies))

    def _currencies(self) -> Fragment:
        return self._list("currency", self.codes.currencies, 2, 3)

    def _zone(self) -> Fragment:
        return ("zone", self.pick(self.codes.zones))

    def _weekdays(self) -> Fragment:
        return self._in_order(self._list("weekday", range(7), 1, 3))

    def _months(self) -> Fragment:
        return self._in_order(self._list("month", range(1, 13), 1, 3))

    @staticmethod
    def _in_order(listing: Fragment) -> Fragment:
        return (*listing[:2], tuple(sorted(listing[2])))

    def _day(self) -> tuple[int, int, int]:
        """Year, month and day, mostly of our time."""
        year = self.between(1990, 2035) if self.random() < 0.8 else self.between(1800, 2099)
        return year, self.between(1, 12), self.between(1, 28)

    def _date(self) -> Fragment:
        return ("date", "long", *self._day())

    def _short_date(self) -> Fragment:
        year, month, day = self._day()
        # Two digits of a year that some languages write must tell the four that others write.
        style = "short" if 1990 <= year <= 2035 and self.random() < 0.3 else "medium"
        return ("date", style, year, month, day)

    def _weekday_date(self) -> Fragment:
        return ("date", "full", *self._day())

    def _era_date(self) -> Fragment:
        return ("skeleton", self.pick(("GyMMM", "GyMMMd")), *self._day(), 0, 0)

    def _month_year(self) -> Fragment:
        return ("skeleton", "yMMMM", *self._day(), 0, 0)

    def _quarter(self) -> Fragment:
        return ("skeleton", "yQQQQ", *self._day(), 0, 0)

    def _time(self) -> Fragment:
        return ("time", self.between(0, 23), self.between(0, 11) * 5)

    def _daytime(self) -> Fragment:
        return ("skeleton", "Bhm", 2020, 1, 1, self.between(0, 23), self.between(0, 11) * 5)

    def _interval(self) -> Fragment:
        return ("interval", self.pick(("yMMMd", "yMMMEd")), *self._day(), self.between(1, 100))

    def _short_interval(self) -> Fragment:
        return ("interval", "MMMd", *self._day(), self.between(1, 60))

    def _relative(self) -> Fragment:
        unit = self.pick(tuple(RELATIVE_UNITS))
        value = self.between(1, RELATIVE_UNITS[unit])
        return ("relative", unit, value if self.random() < 0.5 else -value)

    def _measure(self, units: dict[str, int], length: str = "long") -> Fragment:
        unit = self.pick(tuple(units))
        return ("unit", self.amount(units[unit]), unit, length)

    def _quantity(self) -> Fragment:
        return self._measure(UNITS)

    def _quantities(self) -> Fragment:
        units = self.some(tuple(UNITS), 2, 3)
        style = "or" if self.random() < 0.3 else "standard"
        return ("listing", style, tuple(("unit", self.amount(UNITS[unit]), unit, "long") for unit in units))

    def _short_quantity(self) -> Fragment:
        unit = self.pick(SHORT_UNITS)
        return ("unit", self.amount(999), unit, "short")

    def _duration(self) -> Fragment:
        unit = self.pick(tuple(DURATIONS))
        return ("unit", self.between(1, DURATIONS[unit]), unit, "long")

    def _durations(self) -> Fragment:
        units = self.pick(DURATION_LISTS)
        top = {
            "duration-month": 11,
            "duration-day": 6,
            "duration-hour": 23,
            "duration-minute": 59,
            "duration-second": 59,
        }
        values = [self.between(1, top.get(unit, 30)) for unit in units]
        return ("listing", "unit", tuple(("unit", value, unit, "long") for value, unit in zip(values, units)))

    def _distance(self) -> Fragment:
        unit = self.pick(tuple(DISTANCES))
        return ("unit", self.between(20, DISTANCES[unit]), unit, "long")

    def _travel(self) -> Fragment:
        unit = self.pick(("duration-minute", "duration-hour", "duration-hour", "duration-day"))
        return ("unit", self.between(2, TRAVEL[unit]), unit, "long")

    def _area(self) -> Fragment:
        unit = self.pick(tuple(AREAS))
        return ("unit", self.between(10, AREAS[unit]), unit, "long")

    def _temperature(self) -> Fragment:
        unit = self.pick(tuple(TEMPERATURES))
        value = self.between(*TEMPERATURES[unit])
        return ("unit", round(value + 0.5, 1) if self.random() < 0.3 else value, unit, "long")

    def _rate(self) -> Fragment:
        if self.random() < 0.5:
            return self._measure(SPEEDS)
        top, below = self.pick(PER_MEASURE), self.pick(PER_TIME)
        return ("per", ("unit", self.amount(UNITS[top]), top, "long"), below)

    def _price(self) -> Fragment:
        return ("per", self._money(), self.pick(PER))

    def _money(self) -> Fragment:
        return ("money", self._sum(), self.pick(self.codes.currencies))

    def _symbol_money(self) -> Fragment:
        return ("symbol_money", self._sum(), self.pick(self.codes.currencies))

    def _compact_money(self) -> Fragment:
        return ("compact_money", self._large(), self.pick(self.codes.currencies))

    def _sum(self) -> int | float:
        whole = self.between(1, self.pick((20, 200, 9000)))
        return round(whole + self.between(1, 19) / 20, 2) if self.random() < 0.3 else whole

    def _large(self) -> int:
        """Two leading digits and a power of ten."""
        return int(self.between(11, 99) * 10 ** self.between(2, 8))

    def _percent(self) -> Fragment:
        value = self.between(1, 100)
        return ("percent", value * 10 if self.random() < 0.6 else value * 10 - self.between(1, 9))

    def _number(self) -> Fragment:
        return ("number", self.between(1, 9) * 10 ** self.between(3, 6) + self.between(0, 999))

    def _compact(self) -> Fragment:
        return ("compact", self._large())

    def _scientific(self) -> Fragment:
        return ("scientific", self._large())
