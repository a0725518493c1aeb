"""A study's figures as SVG and PNG: effects with intervals, curves with bands, cost against effect."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from wmtp_jax.report.curves import COLOURS, GREY, MARKERS
from wmtp_jax.study.statistics import t_interval

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 7.0  # inches
_DPI = 200
_BAND = "#E8EEF4"
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

# The lines of an arm's kept runs, by seed.
Lines = Mapping[str, list[list[dict[str, Any]]]]


def draw(study: Mapping[str, Any], lines: Lines) -> dict[str, bytes]:
    """The figures that there is something to draw for: file name -> content, the same bytes for the same study."""
    figures: dict[str, Callable[[], Figure | None]] = {
        "effects": lambda: _effects(study),
        "curves": lambda: _curves(study, lines),
        "costs": lambda: _costs(study),
    }
    import matplotlib

    files = {}
    # Names inside an SVG are drawn by chance unless they are salted.
    with matplotlib.rc_context({"svg.hashsalt": study["name"], "svg.fonttype": "none"}):
        for name, make in figures.items():
            figure = make()
            if figure is None:
                continue
            for kind, options in (("svg", {"metadata": _NO_METADATA}), ("png", {"dpi": _DPI})):
                content = io.BytesIO()
                figure.savefig(content, format=kind, **options)
                files[f"{name}.{kind}"] = content.getvalue()
    return files


def _effects(study: Mapping[str, Any]) -> Figure | None:
    """Every arm's mean difference to its baseline with the 95% interval, and to its controls, over ±d."""
    arms = {name: arm for name, arm in study["arms"].items() if arm["against"]}
    if not arms:
        return None
    figure = _new(_WIDTH, 0.9 + 0.45 * len(arms))
    axes = _style(figure.add_subplot())
    d = study["difference_that_matters"]
    axes.axvspan(-d, d, color=_BAND, linewidth=0, label=f"±d = {d:g}")
    axes.axvline(0, color=GREY, linewidth=0.8)
    kinds = {
        "baseline": "against the baseline",
        "permuted": "against its weights permuted",
        "compute": "at equal compute",
    }
    for number, (kind, label) in enumerate(kinds.items()):
        shown = [(place, arm["against"][kind]) for place, arm in enumerate(arms.values()) if kind in arm["against"]]
        if not shown:
            continue
        y = [place + 0.22 * (number - 1) for place, _ in shown]
        mean = np.array([found["mean"] for _, found in shown])
        reach = np.array([(found["mean"] - found["low"], found["high"] - found["mean"]) for _, found in shown]).T
        axes.errorbar(
            mean,
            y,
            xerr=reach,
            fmt=MARKERS[number],
            color=COLOURS[number],
            markersize=5,
            linewidth=1.3,
            capsize=2.5,
            label=label,
        )
    axes.set_yticks(range(len(arms)), [f"{name}\n{arm['verdict']}" for name, arm in arms.items()])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    better = "left" if study["metric"]["lower_is_better"] else "right"
    axes.set_xlabel(f"difference in {study['metric']['name']}, 95% interval ({better} of 0 is better)", fontsize=8)
    axes.grid(axis="x", color="#E3E3E3", linewidth=0.5)
    figure.legend(loc="outside upper left", ncols=4, fontsize=7, frameon=False)
    return figure


def _curves(study: Mapping[str, Any], lines: Lines) -> Figure | None:
    """The metric on validation while training: the mean over seeds, and a band from the lowest to the highest."""
    name = f"eval/{study['metric']['name']}"
    figure = _new(_WIDTH, 3.2)
    axes = _style(figure.add_subplot())
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.5)
    shown = 0
    for number, arm in enumerate(study["arms"]):
        runs = [{row["step"]: row[name] for row in rows if name in row} for rows in lines.get(arm, [])]
        steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
        if not steps:
            continue
        shown += 1
        table = np.array([[run[step] for step in steps] for run in runs])
        colour = COLOURS[number % len(COLOURS)]
        if len(runs) > 1:
            axes.fill_between(steps, table.min(axis=0), table.max(axis=0), color=colour, alpha=0.18, linewidth=0)
        style = {"linestyle": _DASHES[number // len(COLOURS) % len(_DASHES)], "linewidth": 1.2, "markersize": 3.5}
        axes.plot(steps, table.mean(axis=0), color=colour, marker=MARKERS[number % len(MARKERS)], label=arm, **style)
        # An untrained model would take most of the height.
        axes.set_xlabel("update", fontsize=8)
    if not shown:
        return None
    settled = [value for line in axes.get_lines() for value in np.asarray(line.get_ydata())[1:]]
    if settled:
        low, high = min(settled), max(settled)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
    axes.set_title(f"{study['metric']['name']} on validation, mean and range over seeds", loc="left", fontsize=8)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure


def _costs(study: Mapping[str, Any]) -> Figure | None:
    """Every arm's difference to its baseline over what it costs; the compute baselines show what operations alone would buy."""
    arms, shown = study["arms"], []
    for name, arm in arms.items():
        against = arms[arm["baseline"]]
        pairs = zip(arm["values"], against["values"], strict=True)
        differences = [one - other for one, other in pairs if one is not None and other is not None]
        if arm["baseline"] != name and len(differences) >= 2:
            low, high = t_interval(differences)
            shown.append((name, arm, float(np.mean(differences)), float(low), float(high)))
    if not shown:
        return None
    figure = _new(_WIDTH, 3.4)
    axes = _style(figure.add_subplot())
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.5)
    axes.axhline(0, color=GREY, linewidth=0.8)
    for number, (name, arm, mean, low, high) in enumerate(shown):
        colour = COLOURS[number % len(COLOURS)]
        filled = "white" if arm["control_of"] else colour
        axes.errorbar(
            [arm["cost"]["ratio"]], [mean], yerr=[[mean - low], [high - mean]], fmt=MARKERS[number % len(MARKERS)],
            color=colour, markerfacecolor=filled, markersize=5.5, linewidth=1.2, capsize=2.5, label=name,
        )  # fmt: skip
    axes.set_xlabel("operations of a run, as a multiple of its baseline (hollow: controls)", fontsize=8)
    axes.set_ylabel(f"difference in {study['metric']['name']}", fontsize=8)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure


def _new(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=7.5, colors=GREY, labelcolor="black", length=2)
    axes.set_axisbelow(True)
    return axes
