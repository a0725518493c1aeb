"""Prints how close both backends came to the float64 reference, and to each other."""

from __future__ import annotations

from backends import DEVIATIONS, DIFFERENCES


def pytest_terminal_summary(terminalreporter):
    if DEVIATIONS:
        _write_deviations(terminalreporter)
    if DIFFERENCES:
        terminalreporter.section("largest difference between torch and JAX (tolerance)")
        for label, (difference, tolerance) in DIFFERENCES.items():
            terminalreporter.write_line(f"{label:<40}{f'{difference:.1e} ({tolerance:.0e})':>22}")


def _write_deviations(terminalreporter):
    columns = sorted({key[1:] for key in DEVIATIONS})
    functions = list(dict.fromkeys(key[0] for key in DEVIATIONS))
    terminalreporter.section("largest deviation from the float64 reference (tolerance)")
    header = "".join(f"{backend + ' ' + dtype:>22}" for backend, dtype in columns)
    terminalreporter.write_line(f"{'function':<28}{header}")
    for function in functions:
        cells = [DEVIATIONS.get((function, *column)) for column in columns]
        row = "".join(f"{'-':>22}" if cell is None else f"{f'{cell[0]:.1e} ({cell[1]:.0e})':>22}" for cell in cells)
        terminalreporter.write_line(f"{function:<28}{row}")
