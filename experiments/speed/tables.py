"""What `measure.py` found, as Markdown tables and as a plot in SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wmtp_jax.errors import UserError

Found = dict[str, dict[str, Any]]  # part -> facts of the machine and `rows`
# Columns of each part: heading, key, how a number is written.
COLUMNS = {
    "flops": [("shape", "shape", ""), ("heads", "heads", ""), ("formula, Gflop", "formula", "G"), ("XLA, Gflop", "xla", "G"),
              ("ratio", "ratio", ".3f")],
    "peers": [("shape", "shape", ""), ("update", "name", ""), ("ms", "seconds", "ms"), ("tokens/s", "tokens_per_second", ",.0f"),
              ("MFU", "mfu", ".2f"), ("time beside torch eager", "ratio", "range")],
    "memory": [("shape", "shape", ""), ("update", "name", ""), ("temporary MB", "temporary_bytes", "MB"),
               ("compile s", "compile_seconds", ".1f")],
    "heads": [("shape", "shape", ""), ("kind", "kind", ""), ("heads", "heads", ""), ("ms", "seconds", "ms"),
              ("tokens/s", "tokens_per_second", ",.0f"), ("MFU", "mfu", ".2f"), ("time beside 1 head", "beside_one_head", ".2f"),
              ("operations beside 1 head", "predicted", ".2f"), ("time beside operations", "ratio", "range"),
              ("gradients and temporary MB", "temporary_bytes", "MB"), ("compile s", "compile_seconds", ".1f")],
    "algorithms": [("algorithm", "name", ""), ("ms", "seconds", "ms"), ("tokens/s", "tokens_per_second", ",.0f"),
                   ("MFU", "mfu", ".2f"), ("time beside the baseline", "ratio", "range"),
                   ("shortest beside shortest", "shortest", ".3f"), ("processor's time", "cpu_ratio", ".3f"),
                   ("gradients and temporary MB", "temporary_bytes", "MB"), ("compile s", "compile_seconds", ".1f")],
    "loss": [("loss and gradients", "name", ""), ("ms", "seconds", "ms"), ("time beside torch's full logits", "ratio", "range"),
             ("temporary MB", "temporary_bytes", "MB")],
}  # fmt: skip
TITLES = {
    "flops": "The formula of operations, and XLA's cost analysis of one layer with full logits",
    "peers": "An update beside plain ones",
    "memory": "Their memory beyond parameters, gradients and optimizer state, and their compile time",
    "heads": "Heads",
    "algorithms": "Algorithms",
    "loss": "The loss alone",
}


def render(found: Found) -> str:
    """A heading, the facts and a table for every part."""
    return "\n\n".join(
        f"### {TITLES[part]}\n\n{_facts(found[part])}\n\n{_table(COLUMNS[part], found[part]['rows'])}"
        for part in TITLES
        if part in found and found[part]["rows"]
    )


def _facts(part: dict[str, Any]) -> str:
    peak = f"{part['peak_flops'] / 1e9:,.0f} Gflop/s taken as the peak" if part["peak_flops"] else "peak unknown"
    return (
        f"{part['hardware']}, {part['threads']} threads; jax {part['jax']}, torch {part['torch']}; {part['pairs']} rounds; "
        f"{peak}; load of the machine at the end {part['load']}; {part['date']}."
    )


def _table(columns: list[tuple[str, str, str]], rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(heading for heading, _, _ in columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row, key, form) for _, key, form in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    value = row.get(key)
    if value is None:
        return "–" if "seconds" in row else "out of memory"
    match form:
        case "ms":
            return f"{1e3 * value:,.0f}"
        case "MB":
            return f"{value / 1e6:,.0f}"
        case "G":
            return f"{value / 1e9:,.2f}"
        case "range":
            return f"{value:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
    return format(value, form)


def insert(path: Path, suite: str, text: str) -> None:
    """Puts `text` between the two comments of the suite in a document."""
    first, last = f"<!-- measured: {suite} -->", f"<!-- end: {suite} -->"
    document = path.read_text(encoding="utf-8")
    if first not in document or last not in document:
        raise UserError(f"{path}: the lines {first} and {last} are not there; add them where the tables belong")
    before, _, rest = document.partition(first)
    path.write_text(f"{before}{first}\n{text}\n{last}{rest.partition(last)[2]}", encoding="utf-8")


def plot(found: Found) -> str:
    """Tokens a second of the peers and of every count of heads, as bars."""
    groups = []
    for shape in dict.fromkeys(row["shape"] for part in ("peers", "heads") for row in found.get(part, {}).get("rows", [])):
        for part, label in (("peers", "{name}"), ("heads", "{heads} {kind}")):
            rows = [row for row in found.get(part, {}).get("rows", []) if row["shape"] == shape and "seconds" in row]
            bars = [(label.format(**row), row["tokens_per_second"]) for row in rows]
            if bars:
                groups.append((f"{shape}: {'4 linear heads' if part == 'peers' else 'ours, by heads'}", bars))
    lines, y, left, width = [], 24, 150, 400
    for title, bars in groups:
        lines.append(f'<text x="8" y="{y}" font-weight="bold">{title}, tokens/s</text>')
        y += 10
        most = max(rate for _, rate in bars)
        for name, rate in bars:
            fill = "#2b6cb0" if name.startswith("ours") or name[0].isdigit() else "#a0aec0"
            lines.append(f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{name}</text>')
            lines.append(f'<rect x="{left}" y="{y}" width="{width * rate / most:.1f}" height="16" fill="{fill}"/>')
            lines.append(f'<text x="{left + width * rate / most + 6:.1f}" y="{y + 13}">{rate:,.0f}</text>')
            y += 20
        y += 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{y}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="640" height="{y}" fill="white"/>\n' + "\n".join(lines) + "\n</svg>\n"
    )
