"""Bounds: numbers as a grammar can be held to them, to the letter.

llguidance counts in doubles, and its own ranges miss some decimals, or take one too much. Here the
bounds of a schema become ranges that cover exactly what they should. It is a part of schemas.py, no
feature by itself. It costs microseconds.
"""

import math
from decimal import Decimal

from features.keywords import BOUNDS, TYPES, SchemaError, Unholdable

# llguidance counts in doubles. Bounds from MAX_BOUND on, int64's own, are left out.
MAX_EXACT, MAX_BOUND = 2**53, 2**63 - 1


def exact(value, at: str):
    """A value of an enum, as llguidance can write it: 1.0 is the number 1, and an integer that is
    no double is refused, because it would become another one."""
    if isinstance(value, dict):
        return {key: exact(inner, at) for key, inner in value.items()}
    if isinstance(value, list):
        return [exact(inner, at) for inner in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT:
        return int(value)
    if isinstance(value, int) and abs(value) > MAX_EXACT and int(float(value)) != value:
        raise Unholdable(f"{at}: {value} cannot be held to exactly; the limit is 2**53")
    return value


def limit_numbers(schema: dict, at: str) -> None:
    """Replace the bounds of a schema by ones that llguidance honours to the letter."""
    bounds = {key: schema.pop(key) for key in BOUNDS if key in schema}
    for key, other in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if bounds.get(key) is True and other in bounds:  # as draft 4 has it
            bounds[key] = bounds.pop(other)
        elif isinstance(bounds.get(key), bool):
            del bounds[key]
    bounds = {key: value for key, value in bounds.items() if abs(value) < MAX_BOUND}
    types = schema.get("type", [kind for kind in TYPES if kind != "integer"])
    types = types if isinstance(types, list) else [types]
    others = [kind for kind in types if kind not in ("number", "integer")]
    if "number" not in types:
        ways = [{"type": "integer", **bounds}] if "integer" in types else []
    elif "multipleOf" in schema:
        ways = [{"type": "number", **bounds}]
    else:
        ways = [{"type": "number", **way} for way in number_ranges(bounds)] if bounds else \
            [{"type": "number"}]
    ways += [{"type": others}] if others else []
    if not ways:
        raise SchemaError(f"{at}.{min(bounds)}: nothing satisfies it")
    schema.setdefault("allOf", []).append({"anyOf": ways})


N_DIGITS = 15  # of a number, that surely survive in a double
MIRRORED = {"minimum": "maximum", "maximum": "minimum", "exclusiveMaximum": "exclusiveMinimum"}


def number_ranges(bounds: dict) -> list[dict]:
    """Bounds that cover, one or another, each number within `bounds`. subtle: alone, llguidance's
    own miss some (2.5 below 2.53; -0.10 up to 0) or take one too much (0 above 0, up to 0.3)."""
    low, above = bounds.get("minimum", -math.inf), bounds.get("exclusiveMinimum", -math.inf)
    high, below = bounds.get("maximum", math.inf), bounds.get("exclusiveMaximum", math.inf)
    low = _next(above) if above >= low and above > -math.inf else low
    is_open = below <= high and below < math.inf
    high = min(high, below)
    if low > high or low == high and is_open:
        return []
    ways = _positive_ranges(max(low, 0), high, is_open) if high > 0 else \
        [{"minimum": 0, "maximum": 0}] if high == 0 and not is_open else []
    if low < 0:
        least, top = max(-high, 0), -low  # seen from the other side
        least = _next(least) if is_open or least == 0 else least
        ways += [{MIRRORED[key]: -value for key, value in way.items()}
                 for way in _positive_ranges(least, top, False)]
    return ways


def _positive_ranges(low: float, high: float, is_open: bool) -> list[dict]:
    """As number_ranges, from `low` >= 0 to `high`."""
    if high == math.inf or low >= high:
        return [{"minimum": low, **({"maximum": low} if low == high else {})}] \
            if low == high or low < high else []
    ways = [{"minimum": low, "exclusiveMaximum" if is_open else "maximum": high}]
    whole, _, decimals = f"{Decimal(repr(high)):f}".partition(".")
    for n in range(1, len(decimals)):  # 2.5 and 2.53, where 2.534 is the end
        value = float(f"{whole}.{decimals[:n]}")
        ways += [{"minimum": value, "maximum": value}] if low <= value < high else []
    return ways


def _next(value: float) -> float:
    """The next number above one, at N_DIGITS digits."""
    exact_value = Decimal(repr(value))
    n_before = exact_value.adjusted() + 1 if value else 0
    return float(exact_value + Decimal(1).scaleb(n_before - N_DIGITS))
