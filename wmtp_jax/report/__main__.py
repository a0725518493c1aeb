"""Shows what runs have learned and what their weights single out: python -m wmtp_jax.report RUN [RUN ...]

One HTML file that opens from disk and fetches nothing: the token map (validation code, each token shaded by its weight, by
head, run and training step), the most and least weighted tokens and kinds, curves with the bands of seeds, heads by depth,
acceptance of drafts. Runs that differ in their seed alone make a group. What a run lacks is shown as missing.
"""

from __future__ import annotations

import datetime
import shlex
from pathlib import Path

from absl import flags

from wmtp_jax import cli, storage
from wmtp_jax.errors import UserError, disk_errors

_FRAME = 60_000  # bytes of markup, style and script


def main(paths: list[str]) -> None:
    values = flags.FLAGS
    if not paths:
        raise UserError("no run is named: python -m wmtp_jax.report RUN [RUN ...]; see --help")
    for name in ("steps", "documents"):
        if values[name].value < 1:
            raise UserError(f"--{name}={values[name].value}: at least 1")
    if values.megabytes <= 0:
        raise UserError(f"--megabytes={values.megabytes}: more than 0")
    # Imported after the flags have been checked, so that --help and a wrong flag answer at once.
    from wmtp_jax.report.content import page_content
    from wmtp_jax.report.page import render
    from wmtp_jax.report.runs import group_runs, read_runs
    from wmtp_jax.report.tokens import read_documents

    runs = read_runs(paths)
    groups = group_runs(runs)
    documents = read_documents(runs) if values.tokens else None
    limit = int(values.megabytes * 1e6) - _FRAME
    content, left = page_content(runs, groups, documents, steps=values.steps, pieces=values.documents, limit=limit)
    content |= {
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", "wmtp_jax.report", *paths]),
        "left": left,
        "mapLeftOut": not values.tokens,
    }
    text = render(content, title=f"{', '.join(group.label for group in groups)} – WMTP")
    page = _write(text, values.output, paths[0])
    for run in runs:
        if run.missing:
            print(f"{storage.shown(str(run.path))}: {', '.join(run.missing)}")
    print(f"{page}: {len(text.encode()) / 1e6:.2f} MB" + (f"; of the token map: {left}" if left else ""))


def _write(text: str, output: str | None, run: str) -> Path | str:
    """Writes the page where the flag says, or else into the run, or into runs/NAME for a run in object storage; says where."""
    if output is not None and storage.is_remote(output):
        address = storage.join(output) if output.endswith(".html") else storage.join(output, "index.html")
        storage.patiently(lambda: storage.put(address, text.encode()))
        return address
    # The copy in the cache is no place for results.
    own = Path("runs") / storage.join(run).rpartition("/")[2] if storage.is_remote(run) else Path(run)
    directory = Path(output) if output else own / "report"
    page = directory if directory.suffix == ".html" else directory / "index.html"
    with disk_errors(page.parent, setting="--output"):
        page.parent.mkdir(parents=True, exist_ok=True)
        temporary = page.with_name(f".{page.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(page)
    return page


if __name__ == "__main__":
    flags.DEFINE_string(
        "output",
        None,
        "Where the page goes: a directory, or a file ending in .html, here or at s3://BUCKET/PATH. By default report/ of "
        "the first RUN, or runs/NAME/report where that is in object storage.",
    )
    flags.DEFINE_boolean(
        "tokens", True, "With the token map; --notokens compares runs of different tokenizers or documents."
    )
    flags.DEFINE_integer("documents", 50, "Pieces of validation documents in the token map, at most.")
    flags.DEFINE_integer("steps", 6, "Training steps in the token map, at most: evenly spread, with the first and the last.")
    flags.DEFINE_float(
        "megabytes", 5.0, "Size of the page, at most: steps, then documents are left out to stay below, and said so."
    )
    cli.run(main, description=__doc__, arguments="RUN")
