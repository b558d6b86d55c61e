"""Units: taken off the end (or the beginning) of an answer, and brought into one spelling. Nothing is converted."""

from __future__ import annotations

import re
from functools import lru_cache

from cipo_fast.verify.math.nouns import noun

_SPELLINGS = {
    "m": "meter meters metre metres", "cm": "centimeter centimeters centimetre centimetres",
    "mm": "millimeter millimeters millimetre millimetres", "km": "kilometer kilometers kilometre kilometres kms",
    "in": "inch inches", "ft": "foot feet", "yd": "yard yards", "mi": "mile miles",
    "g": "gram grams gm", "kg": "kilogram kilograms kgs", "mg": "milligram milligrams",
    "lb": "pound pounds lbs", "oz": "ounce ounces",
    "s": "second seconds sec secs", "min": "minute minutes mins", "h": "hour hours hr hrs", "day": "days",
    "week": "weeks", "month": "months", "year": "years yr yrs",
    "L": "liter liters litre litres l", "mL": "milliliter milliliters millilitre millilitres ml",
    "gal": "gallon gallons",
    "deg": "degree degrees", "rad": "radian radians",
    "degC": "celsius centigrade", "degF": "fahrenheit", "K": "kelvin kelvins",
    "$": "dollar dollars usd bucks", "¢": "cent cents", "€": "euro euros eur", "£": "gbp",
    "N": "newton newtons", "J": "joule joules", "W": "watt watts", "V": "volt volts", "Hz": "hertz hz", "Pa": "pascal "
    "pascals", "mol": "mole moles mols", "C": "coulomb coulombs", "A": "ampere amperes amp amps", "T": "tesla",
    "eV": "ev", "erg": "ergs", "unit": "units", "acre": "acres", "bit": "bits", "byte": "bytes",
    "lm": "lumen lumens", "lx": "lux", "F": "farad farads", "H": "henry henries", "ohm": "ohms", "Wb": "weber webers",
    "cal": "calorie calories", "kcal": "kilocalorie kilocalories", "bar": "bars", "atm": "atmosphere atmospheres",
    "angstrom": "angstroms", "ly": "light-year light-years lightyear lightyears", "pc": "parsec parsecs",
    "knot": "knots", "hp": "horsepower", "pt": "pint pints", "qt": "quart quarts", "tbsp": "tablespoon tablespoons",
    "tsp": "teaspoon teaspoons", "ton": "tons tonne tonnes", "hectare": "hectares", "decade": "decades",
    "century": "centuries", "mA": "milliampere milliamperes", "kW": "kilowatt kilowatts", "kJ": "kilojoule kilojoules",
    "kPa": "kilopascal kilopascals", "nm": "nanometer nanometers nanometre nanometres", "ns": "nanosecond nanoseconds",
    "ms": "millisecond milliseconds", "μm": "micrometer micrometers micrometre micrometres micron microns",
    "μs": "microsecond microseconds", "peso": "pesos", "yen": "yens", "rupee": "rupees", "yuan": "yuans",
}  # fmt: skip
_UNIT = {word: unit for unit, spelt in _SPELLINGS.items() for word in spelt.split()}
_SHORT = set(_SPELLINGS) | {*"dm kWh MJ kN MPa kHz MHz cc ml rpm".split()}
_COMPOUND = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h", "fps": "ft/s"}
# Words that change what is said are no units.
_NOT_UNITS = set(
    "or and not no nor if mod plus minus times by over hundred thousand million billion trillion dozen half quarter "
    "percent percentage more less than least most about approximately roughly around is are was be only where for all "
    "any none maybe perhaps possibly either both except but otherwise undefined infinity infinite pi to from with "
    "remainder base which that wrong right correct answer equals equal also between up mixed even odd neither so "
    "when then as it modulo negative".split()
)
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MAGNITUDE = re.compile(rf"(.*[\d}})])\s*(?:\\text\{{\s*)?(?P<word>{'|'.join(_MAGNITUDES)})(?![A-Za-z])\s*\}}?(.*)")
_PIECE = r"(?:\\text\{[^{}]*\}|\^\s*\\circ(?:\s*(?:\\text\{\s*)?[CFK](?![A-Za-z])(?:\s*\})?)?)"
_POWER = r"(?:\^\s*(?:\{\s*-?\d\s*\}|\d))"
_UNITS_AT_END = re.compile(
    rf"(?P<core>.*?[\d}})!|%A-Za-z.])\s*(?P<unit>(?:\\text\{{[^{{}}]*\}}|\^\s*\\circ)"
    rf"(?:\s*(?:{_PIECE}|{_POWER}|/|\\cdot|\\times|[A-Za-z]+|\(|\)))*"
    r"|\\frac\s*\{\s*\\text\{[^{}]*\}\s*\}\s*\{\s*\\text\{[^{}]*\}\s*(?:\^\s*\{?\d\}?)?\s*\})"
)
_BARE_AT_END = re.compile(
    rf"(?P<core>.*[\d}})%])\s*(?P<unit>/?\s*[A-Za-z]{{2,}}(?:\s*[./]?\s*[A-Za-z]+)*\s*{_POWER}?(?:\s*/\s*[A-Za-z]+{_POWER}?)?)"
)
_SINGLE_AT_END = re.compile(rf"(?P<core>.*[\d}})])\s*(?P<unit>[A-Za-z]+\s*{_POWER}?(?:\s*/\s*[A-Za-z]+\s*{_POWER}?)?)")
_COUNTED = re.compile(r"[\d.,]+ [A-Za-z]{3,}(?: [A-Za-z]{3,})*")  # 7 apples
_ANGLED = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)")  # the degrees are the function's
_MONEY = re.compile(r"(?P<sign>[+-]?)\s*(?:\\\$|\\text\{\s*(?P<money>[€£])\s*\})\s*(?P<core>[+-]?.*)")


@lru_cache(maxsize=4096)
def peel(text: str, wanted: str | None = None) -> tuple[str, str | None]:
    """A prepared text without its unit, and the unit in one spelling. None: there is none. `wanted`: the gold's unit,
    which a bare letter may then be: 5 m is five metres only where metres are asked for."""
    money = _MONEY.fullmatch(text)
    if money:
        core = money["sign"] + _multiplied(money["core"])
        sign = money["money"] or "$"
        bare, behind = peel(core)
        if behind is None:
            return core, f"{sign}^1"
        if behind == "$^1":  # $5 dollars
            return bare, behind
        return bare, unit_of(f"{sign} {core[len(bare) :]}") or f"{sign}^1"  # $5 per hour
    text = _multiplied(text)
    match = _UNITS_AT_END.fullmatch(text)
    if match and _balanced(match["core"]):
        unit = unit_of(match["unit"])
        if unit and not (unit == "deg^1" and _ANGLED.search(match["core"])):
            return match["core"].strip(), unit
    match = _BARE_AT_END.fullmatch(text)
    if match and _balanced(match["core"]):
        unit = unit_of(match["unit"], known=_COUNTED.fullmatch(text) is None)
        if unit:
            return match["core"].strip(), unit
    if wanted:
        match = _SINGLE_AT_END.fullmatch(text)
        if match and _balanced(match["core"]) and unit_of(match["unit"]) == wanted:
            return match["core"].strip(), wanted
    return text, None


def _balanced(text: str) -> bool:
    return text.count("{") == text.count("}") and text.count("(") == text.count(")")


def _multiplied(text: str) -> str:
    """5 million is 5 times 10^6."""
    match = _MAGNITUDE.fullmatch(text)
    if match is None:
        return text
    rest = match[3].strip()
    if "\\text" in match[0] and rest.endswith("}") and not rest.startswith("\\text"):
        rest = "\\text{" + rest
    return f"{match[1]}\\times10^{{{_MAGNITUDES[match['word']]}}} {rest}".strip()


@lru_cache(maxsize=1024)
def unit_of(text: str, known: bool = False) -> str | None:
    """A unit in one spelling: its factors with their powers, sorted. None for words that are none. `known`: refuse
    what is in no table (bare letters may be variables)."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text.replace("€", " € ").replace("£", " £ ").replace(r"\$", " $ "))
    plain = re.sub(r"\\frac\s*\{(.*)\}\s*\{(.*)\}", r"\1 / \2", plain)
    plain = re.sub(r"\^\s*\\circ\s*([CFK])(?![A-Za-z])", r" deg\1 ", plain)
    plain = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", " deg ", plain).replace("\\cdot", " ").replace("\\times", " ")
    plain = re.sub(r"\^\s*\{?\s*(-?\d)\s*\}?", r" ^\1 ", plain).replace("/", " / ").replace("-", " -")
    plain = re.sub(r"\^ -", "^-", plain)
    words = plain.replace("(", " ").replace(")", " ").replace(".", "").replace(",", " ").split()
    words = [part for word in words for part in _COMPOUND.get(word, word).replace("/", " / ").split()]
    if not words or len(words) > 8:
        return None
    powers: dict[str, int] = {}
    sign, pending, last = 1, 1, ""
    for word in words:
        lower = word.lower()
        if lower in _NOT_UNITS:
            return None
        if word == "/" or lower == "per":
            sign = -1
        elif lower in ("square", "sq"):
            pending = 2
        elif lower in ("cubic", "cu"):
            pending = 3
        elif lower in ("squared", "cubed") or re.fullmatch(r"\^-?\d", word):
            if not last:
                return None
            power = {"squared": 2, "cubed": 3}.get(lower) or int(word[1:])
            powers[last] += sign * (power - 1)
        else:
            name = _named(word, known)
            if name is None:
                return None
            if not name:
                continue
            if last == "deg" and name in ("degC", "degF", "C", "F"):
                powers.pop(last)
                name = "deg" + name[-1]
            last = name
            powers[last] = powers.get(last, 0) + sign * pending
            pending = 1
    return " ".join(f"{name}^{power}" for name, power in sorted(powers.items()) if power) or None


def _named(word: str, known: bool) -> str | None:
    if word in _SHORT or word in ("degC", "degF", "degK", "F"):
        return {"degK": "K"}.get(word, word)
    lower = word.lower()
    if lower in _UNIT:
        return _UNIT[lower]
    return None if known else noun(word)
