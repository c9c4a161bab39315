"""Numbers that people read."""

PREFIXES = {"M": 1_000_000, "k": 1_000}
UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}


def count(number: float) -> str:
    """Such as `25 M`."""
    prefix = next((prefix for prefix, factor in PREFIXES.items() if number >= factor), "")
    return f"{number / PREFIXES.get(prefix, 1):g} {prefix}".strip()


def duration(seconds: float) -> str:
    """Three digits, such as `1.25 ms`."""
    unit = next((unit for unit, factor in UNITS.items() if seconds >= factor), "µs")
    value = seconds / UNITS[unit]
    decimals = max(0, 3 - len(str(int(value))))
    return f"{value:.{decimals}f} {unit}"
