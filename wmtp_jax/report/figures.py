"""The page's figures as PNG for papers: curves, heads by depth, weights by kind, and a piece of the token map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wmtp_jax.evaluation.token_kinds import KINDS
from wmtp_jax.report.curves import COLOURS, GREY, MARKERS
from wmtp_jax.report.palette import LEVELS, shades
from wmtp_jax.report.runs import Group, Run
from wmtp_jax.report.tokens import Documents, by_token, read_entries, spell

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 7.0  # inches: both columns of a paper
_DPI = 300
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_CHARACTERS, _LINES = 64, 30  # of a piece of the token map
_SIDE_BY_SIDE = 2


def draw_figures(
    directory: Path, content: dict[str, Any], runs: Sequence[Run], groups: Sequence[Group], documents: Documents | None
) -> list[Path]:
    """Writes `curves.png`, `depth.png`, `kinds.png` and `token_map.png`, those that there is something to draw for.

    Args:
      directory: where they go; made if it is missing.
      content: of the page.
      documents: of the token map; None: without.
    """
    figures: dict[str, Figure | None] = {
        "curves": _charts(content["curves"], groups),
        "depth": _charts(content["depth"], groups),
        "kinds": None,
        "token_map": None,
    }
    # A group is shown by its first run that has kept tokens, at its last step.
    firsts = [next((m for m in group.members if runs[m].token_files), None) for group in groups]
    if documents is not None and (chosen := [number for number in firsts if number is not None]):
        known = {number: by_token(read_entries(list(runs[number].token_files.values())[-1]), documents) for number in chosen}
        figures["kinds"] = _kinds(groups, runs, firsts, known, documents)
        figures["token_map"] = _token_map(groups, runs, firsts, known, documents)
    written = []
    for name, figure in figures.items():
        path = directory / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f".{name}.tmp.png"
        figure.savefig(temporary, dpi=_DPI)
        temporary.replace(path)
        written.append(path)
    return written


def _new(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _charts(panels: Sequence[dict[str, Any]], groups: Sequence[Group]) -> Figure | None:
    """Panels as `series.curves` and `series.depth_charts` give them: a line a group, a band over seeds."""
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _new(_WIDTH * max(columns, 1.5) / 3, 0.35 + 1.75 * rows)
    for number, panel in enumerate(panels):
        axes = _style(figure.add_subplot(rows, columns, number + 1))
        axes.set_title(panel["title"], loc="left", fontsize=7.5)
        if not panel["unit"][0].isdigit():  # "1: all tokens weigh the same" is for the page
            axes.set_ylabel(panel["unit"].partition(";")[0].partition(",")[0], fontsize=6.5, color=GREY)
        if "label" not in panel:
            axes.set_xlabel("step", fontsize=6.5, color=GREY)
        places: list[int] = []
        for series in panel["series"]:
            group, x = series["group"], series.get("x", series.get("steps"))
            colour = COLOURS[group % len(COLOURS)]
            if series["runs"] > 1:
                axes.fill_between(x, series["low"], series["high"], color=colour, alpha=0.2, linewidth=0)
            every = None if "label" in panel or len(x) <= 14 else [len(x) - 1]
            axes.plot(
                x, series["mean"], color=colour, linewidth=1.1, linestyle=_DASHES[group % len(_DASHES)],
                marker=MARKERS[group % len(MARKERS)], markersize=3.5, markevery=every, markeredgewidth=0,
            )  # fmt: skip
            places += x
        if "label" in panel:
            ticks = sorted(set(places))
            axes.set_xticks(ticks, [panel["label"].format(tick) for tick in ticks])
    _key(figure, groups, {series["group"] for panel in panels for series in panel["series"]})
    return figure


def _key(figure: Figure, groups: Sequence[Group], shown: set[int]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for number in sorted(shown):
        group, seeds = groups[number], len(groups[number].members)
        label = group.label + (f" ({seeds} seeds: mean, lowest to highest)" if seeds > 1 else "")
        style = {"linestyle": _DASHES[number % len(_DASHES)], "marker": MARKERS[number % len(MARKERS)], "markersize": 3.5}
        handles.append(Line2D([], [], color=COLOURS[number % len(COLOURS)], linewidth=1.1, label=label, **style))
    # A figure's legend outside its axes: constrained layout leaves the room.
    columns = 2 if figure.get_figwidth() > 5 else 1
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, fontsize=7, frameon=False, handlelength=2.6)


def _kinds(
    groups: Sequence[Group], runs: Sequence[Run], firsts: Sequence[int | None],
    known: dict[int, dict[str, np.ndarray]], documents: Documents,
) -> Figure | None:  # fmt: skip
    """Mean weight of every kind of token, a panel a head."""
    present = [kind for kind in range(len(KINDS)) if (documents.kinds == kind).any()]
    if not present:
        return None
    heads = max(runs[number].heads for number in known)
    columns = min(4, heads)
    rows = -(-heads // columns)
    figure = _new(_WIDTH, 0.45 + (0.5 + 0.2 * len(present)) * rows)
    thick = 0.8 / len(known)
    for head in range(heads):
        axes = _style(figure.add_subplot(rows, columns, head + 1))
        for place, (group, number) in enumerate((g, n) for g, n in enumerate(firsts) if n is not None):
            weight = known[number]["weight"]
            if head >= weight.shape[1]:
                continue
            means = []
            for kind in present:
                values = weight[documents.kinds == kind, head]
                values = values[np.isfinite(values)]
                means.append(values.mean() if len(values) else np.nan)
            y = np.arange(len(present)) + (place - (len(known) - 1) / 2) * thick
            axes.barh(y, means, height=thick * 0.9, color=COLOURS[group % len(COLOURS)], label=groups[group].label)
        axes.axvline(1, color=GREY, linewidth=0.7)
        axes.set_title(f"head {head}", loc="left", fontsize=7.5)
        axes.set_yticks(range(len(present)), [KINDS[kind] for kind in present] if head % columns == 0 else [])
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlabel("mean weight", fontsize=6.5, color=GREY)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, fontsize=7, frameon=False)
    return figure


def _token_map(
    groups: Sequence[Group], runs: Sequence[Run], firsts: Sequence[int | None],
    known: dict[int, dict[str, np.ndarray]], documents: Documents,
) -> Figure:  # fmt: skip
    """The beginning of the longest piece under head 0, two runs side by side."""
    from matplotlib.patches import Rectangle

    texts, index = spell(documents)
    sizes = np.diff(documents.starts)
    start = int(documents.starts[int(sizes.argmax())])
    pieces = [texts[i] for i in index[start : start + int(sizes.max())]]
    shown = [(group, number) for group, number in enumerate(firsts) if number is not None][:_SIDE_BY_SIDE]
    high = max(np.nanpercentile(known[number]["weight"][:, 0], 99.5) for _, number in shown)
    laid = _lay_out(pieces)
    lines = 1 + max((line for _, line, _, _ in laid), default=0)
    figure = _new(_WIDTH if len(shown) > 1 else _WIDTH / 1.7, 0.75 + 0.105 * lines)
    colours = shades("light")
    grid = figure.add_gridspec(2, len(shown), height_ratios=(lines, 1.1))
    for column, (group, number) in enumerate(shown):
        axes = figure.add_subplot(grid[0, column])
        axes.set(xlim=(0, _CHARACTERS + 1), ylim=(lines, 0))
        axes.axis("off")
        step = list(runs[number].token_files)[-1]
        axes.set_title(f"{groups[group].label}, head 0, step {step:,}", loc="left", fontsize=7.5)
        weights = known[number]["weight"][start : start + len(pieces), 0]
        # A character takes 1 / (_CHARACTERS + 1) of the axes, as wide as a monospaced letter is high times 0.6.
        inches = (_WIDTH if len(shown) > 1 else _WIDTH / 1.7) / len(shown) - 0.12
        size = inches / (_CHARACTERS + 1) / 0.602 * 72
        for token, line, at, text in laid:
            weight = weights[token]
            ink = GREY
            if np.isfinite(weight):
                background, ink = colours[int(np.clip(round(weight / high * (LEVELS - 1)), 0, LEVELS - 1))]
                axes.add_patch(Rectangle((at, line), max(len(text), 0.5), 0.94, color=background, linewidth=0))
            axes.text(at, line + 0.76, text.replace("$", r"\$"), fontsize=size, family="DejaVu Sans Mono", color=ink)
    scale = figure.add_subplot(grid[1, 0])
    scale.imshow([np.arange(LEVELS)], aspect="auto", cmap=_colour_map(), extent=(0, high, 0, 1))
    scale.set_yticks([])
    scale.tick_params(labelsize=6.5, length=2)
    scale.set_xlabel("weight; grey: no target of this head", fontsize=6.5, color=GREY)
    return figure


def _lay_out(pieces: Sequence[str]) -> list[tuple[int, int, int, str]]:
    """Where every token stands: (token, line, column, text), broken at `_CHARACTERS` and cut after `_LINES` lines."""
    line = column = 0
    laid = []
    for token, piece in enumerate(pieces):
        for number, part in enumerate(piece.expandtabs(4).split("\n")):
            if number:
                if line < _LINES:
                    laid.append((token, line, column, "↵"))
                line, column = line + 1, 0
            while part:
                if column >= _CHARACTERS:
                    line, column = line + 1, 0
                if line >= _LINES:
                    return laid
                now, part = part[: _CHARACTERS - column], part[_CHARACTERS - column :]
                laid.append((token, line, column, "".join(c if c.isprintable() else "·" for c in now)))
                column += len(now)
    return laid


def _colour_map() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([background for background, _ in shades("light")])


def _style(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=6.5, colors=GREY, labelcolor="black", length=2)
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.5)
    axes.set_axisbelow(True)
    return axes
