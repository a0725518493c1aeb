"""How close both backends came to the float64 reference, and to each other: printed at the end of a session, whichever of its
processes ran the tests."""

from __future__ import annotations

# (function, backend, dtype) -> the largest deviation from the float64 reference, and its tolerance.
DEVIATIONS: dict[tuple[str, str, str], tuple[float, float]] = {}
# What was compared -> the largest difference between the two backends, and its tolerance.
DIFFERENCES: dict[str, tuple[float, float]] = {}


def take_in(deviations: dict, differences: dict) -> None:
    """Joins what another process of the session found."""
    for mine, theirs in ((DEVIATIONS, deviations), (DIFFERENCES, differences)):
        for key, (value, tolerance) in theirs.items():
            mine[key] = (max(value, mine.get(key, (0.0, 0.0))[0]), tolerance)


def found() -> tuple[dict, dict]:
    """Both tables in plain numbers, as they can go from one process to another."""
    return tuple({key: (float(value), float(bound)) for key, (value, bound) in of.items()} for of in (DEVIATIONS, DIFFERENCES))


def write(reporter) -> None:
    if DEVIATIONS:
        _write_deviations(reporter)
    if DIFFERENCES:
        reporter.section("largest difference between torch and JAX (tolerance)")
        for label, (difference, tolerance) in sorted(DIFFERENCES.items()):
            reporter.write_line(f"{label:<40}{f'{difference:.1e} ({tolerance:.0e})':>22}")


def _write_deviations(reporter) -> None:
    columns = sorted({key[1:] for key in DEVIATIONS})
    functions = list(dict.fromkeys(key[0] for key in DEVIATIONS))
    reporter.section("largest deviation from the float64 reference (tolerance)")
    header = "".join(f"{backend + ' ' + dtype:>22}" for backend, dtype in columns)
    reporter.write_line(f"{'function':<28}{header}")
    for function in functions:
        cells = [DEVIATIONS.get((function, *column)) for column in columns]
        row = "".join(f"{'-':>22}" if cell is None else f"{f'{cell[0]:.1e} ({cell[1]:.0e})':>22}" for cell in cells)
        reporter.write_line(f"{function:<28}{row}")
