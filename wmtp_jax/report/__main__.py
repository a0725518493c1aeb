"""Shows what runs have learned and what their weights single out: python -m wmtp_jax.report RUN [RUN ...]

One HTML file that opens from disk and fetches nothing: the token map (validation code, each token shaded by its weight, by
head, run and training step), the most and least weighted tokens and kinds, curves with the bands of seeds, heads by depth,
acceptance of drafts. Runs that differ in their seed alone make a group. What a run lacks is shown as missing. The same
figures lie beside the page as PNG.
"""

from __future__ import annotations

import datetime
import shlex
import tempfile
from pathlib import Path

from absl import flags

from wmtp_jax import cli
from wmtp_jax.errors import UserError, disk_errors
from wmtp_jax.storage import s3

_FRAME = 60_000  # bytes of markup, style and script


def main(paths: list[str]) -> None:
    values = flags.FLAGS
    if not paths:
        raise UserError("no run is named: python -m wmtp_jax.report RUN [RUN ...]; see --help")
    for name in ("steps", "documents"):
        if values[name].value < 1:  # pyrefly: ignore[unsupported-operation]  # it has a default
            raise UserError(f"--{name}={values[name].value}: at least 1")
    if values.megabytes <= 0:
        raise UserError(f"--megabytes={values.megabytes}: more than 0")
    if values.mlflow and s3.is_remote(paths[0]):
        raise UserError(f"--mlflow: {paths[0]} is a copy in object storage; name the run's own directory first")
    # Imported after the flags have been checked, so that --help and a wrong flag answer at once.
    from wmtp_jax.report.content import page_content
    from wmtp_jax.report.figures import draw_figures
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
    remote = values.output if values.output and s3.is_remote(values.output) else None
    with tempfile.TemporaryDirectory() as scratch:
        page = _place(Path(scratch) / Path(remote).name if remote else values.output, paths[0])
        figures = page.parent / "figures"
        with disk_errors(page.parent, setting="--output"):
            page.parent.mkdir(parents=True, exist_ok=True)
            temporary = page.with_name(f".{page.name}.tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(page)
            drawn = draw_figures(figures, content, runs, groups, documents) if values.png else []
        where, beside = str(page), f"{figures}/"
        if remote:
            root = remote.rpartition("/")[0] if remote.endswith(".html") else s3.join(remote)
            where, beside = s3.join(root, page.name), s3.join(root, "figures/")
            for file in (page, *drawn):
                address, data = s3.join(root, file.relative_to(page.parent).as_posix()), file.read_bytes()
                s3.patiently(lambda address=address, data=data: s3.put(address, data))
        for run in runs:
            if run.missing:
                print(f"{s3.shown(str(run.path))}: {', '.join(run.missing)}")
        print(f"{where}: {len(text.encode()) / 1e6:.2f} MB" + (f"; of the token map: {left}" if left else ""))
        if drawn:
            print(f"{beside}: the same figures as PNG")
        if values.mlflow:
            from wmtp_jax.tracking.tracker import log_artifacts

            artifacts = {page: "report", **dict.fromkeys(drawn, "report/figures")}
            print(f"MLflow: artifacts in report/ of run {log_artifacts(runs[0].path, artifacts)}")


def _place(output: str | Path | None, run: str) -> Path:
    """The page's path: where the flag says, or else in the run, or in runs/NAME for a run in object storage."""
    # The copy in the cache is no place for results.
    own = Path("runs") / s3.join(run).rpartition("/")[2] if s3.is_remote(run) else Path(run)
    directory = Path(output) if output else own / "report"
    return directory if directory.suffix == ".html" else directory / "index.html"


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
    flags.DEFINE_boolean("png", True, "The figures as PNG, too, for papers, in figures/ beside the page.")
    flags.DEFINE_boolean("mlflow", False, "Copy page and figures to the MLflow run of the first RUN, whose training is over.")
    cli.run(main, description=__doc__, arguments="RUN")
