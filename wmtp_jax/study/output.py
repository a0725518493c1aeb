"""What a study leaves to look at: tables, figures, and one page that opens from disk and fetches nothing."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmtp_jax.study import results
from wmtp_jax.study.directory import Directory
from wmtp_jax.study.figures import draw
from wmtp_jax.study.jobs import RESULTS
from wmtp_jax.study.tables import Table, comma_separated, latex, markdown, replace_marked, tables, verdicts

PAGE = "index.html"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
body { color: #1c2024; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #d8dce0; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
figcaption, .caption { font-size: 13px; color: #555c63; max-width: 48rem }
svg { max-width: 100%; height: auto }
@media (prefers-color-scheme: dark) {
  body { color: #e9eaec; background: #16191c } svg { background: #fff }
  th, td { border-color: #3a4046 } .caption { color: #9aa3ab }
}
""".strip()


def write_output(study: Mapping[str, Any], directory: Directory) -> list[str]:
    """Writes `table.md`, `table.csv`, `table.tex`, the figures and the page beside `study.json`, and the tables between the marks
    of a README.md there or one folder above.

    Returns:
      the names of the files.
    """
    lines = {}
    for arm, content in study["arms"].items():
        kept = [results.read_run(directory, f"{RESULTS}/{arm}-{seed}") for seed in content["seeds"]]
        lines[arm] = [one[1] for one in kept if one is not None]
    found, figures = tables(study), draw(study, lines)
    told = "".join(f"- {sentence}\n" for sentence in verdicts(study))
    texts = {
        "table.md": "\n".join([told, *(markdown(table) for table in found)]),
        "table.csv": comma_separated(study),
        "table.tex": "\n".join(latex(table) for table in found),
        PAGE: page(
            study, found, {name: content.decode() for name, content in figures.items() if name.endswith(".svg")}
        ),
    }
    files = {**{name: text.encode() for name, text in texts.items()}, **figures}
    for name, content in files.items():
        directory.write(name, content)
    written = list(files)
    content = directory.read("README.md")
    if content is not None:
        directory.write("README.md", replace_marked(content.decode(), study, f"{directory.address}/README.md").encode())
        written.append("README.md")
    return written


def update_page_above(study: Mapping[str, Any], workdir: Path) -> None:
    """Puts the tables between the marks of the README.md one folder above a study that lies in a folder of its question."""
    page_above = workdir.parent / "README.md"
    if page_above.is_file():
        before = page_above.read_text(encoding="utf-8")
        after = replace_marked(before, study, str(page_above))
        if after != before:
            page_above.write_text(after, encoding="utf-8")


def page(study: Mapping[str, Any], found: list[Table], figures: Mapping[str, str]) -> str:
    """The page; every text of the study is escaped."""
    finished, failed, wanted = results.progress(study)
    parts = [
        f"<h1>{_text(study['question'])}</h1>",
        f"<p>{finished} of {wanted} runs finished{f', {failed} failed' if failed else ''}. "
        f"Expected before the runs: {_text(study['prediction'] or 'nothing was written down')}</p>",
        "<ul>" + "".join(f"<li>{_text(sentence)}</li>" for sentence in verdicts(study)) + "</ul>",
    ]
    for name, svg in figures.items():
        # What comes before the root element is for a file of its own.
        parts.append(
            f"<h2>{_text(name.removesuffix('.svg').capitalize())}</h2>\n<figure>{svg[svg.index('<svg') :]}</figure>"
        )
    for table in found:
        head = "".join(f"<th>{_text(cell)}</th>" for cell in table.header)
        rows = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
        parts.append(f"<h2>{_text(table.name.capitalize())}</h2>\n<table><tr>{head}</tr>{rows}</table>")
        parts.append(f'<p class="caption">{_text(table.caption)}</p>')
    parts.append(
        "<h2>Made with</h2>\n<table>" + "".join(_row(name, value) for name, value in facts(study)) + "</table>"
    )
    title = _text(f"{study['name']}: a study")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n<style>{_STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def facts(study: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the figures depend on."""
    corpora = list(dict.fromkeys(arm["corpus"][:16] for arm in study["arms"].values()))
    machines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}: {len(machine['runs'])} runs"
        for machine in study["machines"]
    ]
    return [
        ("recipe", study["recipe"]),
        ("backend", study["backend"]),
        ("commit", ", ".join(study["commits"]) or "none yet"),
        ("program", study["program"]),
        ("corpus", ", ".join(corpora)),
        ("machines", "; ".join(machines) or "none yet"),
        ("dates", " to ".join(study["dates"]) or "none yet"),
        *(
            (f"arms.{name}", ", ".join(f"{k}={v}" for k, v in arm["overrides"].items()))
            for name, arm in study["arms"].items()
        ),
    ]


def _row(name: str, value: str) -> str:
    return f'<tr><td>{_text(name)}</td><td style="text-align:left;white-space:normal">{_text(value)}</td></tr>'


def _text(value: str) -> str:
    return html.escape(value)
