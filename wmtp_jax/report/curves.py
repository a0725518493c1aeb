"""A run's metrics.jsonl as curves.png, legible in a README column and in print, in colour or in grey."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wmtp_jax.tracking.metrics_file import METRICS_FILE, read_metrics

if TYPE_CHECKING:  # matplotlib takes half a second to import, and a training needs it at the end only
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with the common colour-blindnesses can tell apart; grey for its yellow, which is
# too light for a line. Markers and dashes are the second channel.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#666666"

SMOOTHING = 60  # half a smoothing window is the number of points over this
POINTS = 400  # that a smoothed curve is drawn with at most
HELD_OUT_MARKERS = 20  # on one curve at most
LOG_RATIO = 30.0  # positive values that span more than this get a logarithmic axis

Series = tuple[np.ndarray, np.ndarray]


def draw_curves(run_directory: str | Path) -> list[Path]:
    """Draws the metrics of a run to `curves.png` in its directory.

    `config.json` and `summary.json`, where they exist, give the title and the bits per byte of the bigram model.

    Returns:
        The files written: none where nothing was logged.

    Raises:
        UserError: there is no metrics.jsonl, or it is damaged.
    """
    directory = Path(run_directory)
    rows = read_metrics(directory / METRICS_FILE)
    summary = _json(directory / "summary.json")
    figure = curves_figure(rows, title=_name(directory, summary), bigram=summary.get("bigram_bits_per_byte"))
    if not figure.axes:
        return []
    path = directory / "curves.png"
    temporary = path.with_name(".curves.tmp.png")
    figure.savefig(temporary)
    temporary.replace(path)
    return [path]


def curves_figure(rows: Sequence[Mapping[str, Any]], *, title: str = "", bigram: float | None = None) -> Figure:
    """The figure: a panel for each group of metrics that the rows have, heads first.

    Args:
        rows: as `read_metrics` gives them. Where a run was resumed, its newer line of a step counts.
        title: the run's name and what it is.
        bigram: bits per byte of the bigram model, drawn as a horizontal line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _without_repeats(rows)
    names = {name for row in rows for name in row}
    series = {name: _series(rows, name) for name in names if name.startswith(("train/", "eval/"))}
    heads = {int(found[1]) for name in series if (found := re.fullmatch(r"(?:train|eval)/ce_head_(\d+)", name))}
    # (columns, how to draw it, what it needs), in reading order
    panels: tuple[tuple[int, Callable[[Axes], None], bool], ...] = (
        (2, lambda axes: _cross_entropy(axes, series, sorted(heads)), bool(heads)),
        (1, lambda axes: _bits_per_byte(axes, series["eval/bits_per_byte"], bigram), "eval/bits_per_byte" in series),
        (1, lambda axes: _loss(axes, series["train/loss"]), "train/loss" in series),
        (1, lambda axes: _value_loss(axes, series), bool(series.keys() & {"train/value_loss", "eval/value_loss"})),
        (1, lambda axes: _explained(axes, series["eval/explained_variance"]), "eval/explained_variance" in series),
        (1, lambda axes: _weights(axes, series), bool(series.keys() & _WEIGHTS.keys())),
        (1, lambda axes: _gradient_norm(axes, series["train/grad_norm"]), "train/grad_norm" in series),
        (1, lambda axes: _learning_rate(axes, series["train/learning_rate"]), "train/learning_rate" in series),
        (1, lambda axes: _throughput(axes, series["train/tokens_per_second"]), "train/tokens_per_second" in series),
    )
    drawn = [(columns, draw) for columns, draw, present in panels if present]
    wide = min(4, sum(columns for columns, _ in drawn))
    figure = Figure(figsize=(2.7 * max(wide, 2), 1.0), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    places, row, column = [], 0, 0
    for columns, _ in drawn:
        if column + columns > wide:
            row, column = row + 1, 0
        places.append((row, column))
        column += columns
    figure.set_figheight(0.5 + 2.4 * (row + 1))
    grid = figure.add_gridspec(row + 1, max(wide, 1))
    for (columns, draw), (top, left) in zip(drawn, places, strict=True):
        draw(_style(figure.add_subplot(grid[top, left : left + columns]), columns))
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    if drawn:
        smooth = any(len(steps) >= 2 * SMOOTHING for name, (steps, _) in series.items() if name.startswith("train/"))
        note = "   (training: moving mean, and a band that holds the middle 80%)" if smooth else ""
        figure.supxlabel("step" + note, fontsize=8, color=GREY)
    return figure


def _cross_entropy(axes: Axes, series: Mapping[str, Series], heads: Sequence[int]) -> None:
    drawn = set()
    for head in heads:
        colour = COLOURS[head % len(COLOURS)]
        marker = MARKERS[(head + head // len(COLOURS)) % len(MARKERS)]  # a colour that comes again has another marker
        train, held_out = series.get(f"train/ce_head_{head}"), series.get(f"eval/ce_head_{head}")
        if train:
            drawn.add("lines: training")
            label = None if held_out else f"head {head}"
            _smoothed(axes, train, colour, band=len(heads) <= 4, linewidth=1.0, label=label)
        if held_out:
            drawn.add("markers: held out")
            _held_out(axes, held_out, colour, marker, linestyle="none" if train else "-", label=f"head {head}")
    _title(axes, f"Cross-entropy by head, nats a token ({', '.join(sorted(drawn))})")
    axes.legend(ncols=1 + (len(heads) > 4), loc="upper right", **_LEGEND)


def _bits_per_byte(axes: Axes, held_out: Series, bigram: float | None) -> None:
    _title(axes, "Bits per byte, held out")
    steps, values = _finite(held_out)
    settled = [*values[max(1, len(values) // 10) :], *([] if bigram is None else [bigram])]
    cut = len(values) > 2 and values[0] > 1.5 * max(settled)
    label = f"this run (starts at {values[0]:.2f})" if cut else "this run"
    _held_out(axes, held_out, COLOURS[0], MARKERS[0], linestyle="-", label=label)
    if bigram is not None:
        axes.axhline(bigram, color=COLOURS[1], linewidth=1.2, linestyle="--", label=f"bigram model {bigram:.2f}")
    if cut:  # the untrained model would take most of the height from what the panel is for
        low, high = min(settled), max(settled)
        axes.set_ylim(low - 0.1 * (high - low), high + 0.4 * (high - low))
    if len(values):
        last = (steps[-1], values[-1])
        axes.annotate(f"{values[-1]:.2f}", last, (6, 0), va="center", textcoords="offset points", fontsize=8)
    axes.legend(loc="best", **_LEGEND)


def _loss(axes: Axes, loss: Series) -> None:
    _title(axes, "Training loss, weighted")
    _smoothed(axes, loss, COLOURS[0])
    broken = loss[0][~np.isfinite(loss[1])]
    if len(broken):
        low = np.full(len(broken), 0.03)
        style = {"color": COLOURS[1], "markersize": 5, "label": f"not finite ({len(broken)})"}
        axes.plot(broken, low, "x", transform=axes.get_xaxis_transform(), **style)
        axes.legend(loc="upper right", **_LEGEND)


def _value_loss(axes: Axes, series: Mapping[str, Series]) -> None:
    _title(axes, "Value loss (training: to λ-returns)")
    if "train/value_loss" in series:
        _smoothed(axes, series["train/value_loss"], COLOURS[0], label="training")
    if "eval/value_loss" in series:
        _held_out(axes, series["eval/value_loss"], COLOURS[1], MARKERS[0], linestyle="-", label="held out")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", **_LEGEND)


def _explained(axes: Axes, share: Series) -> None:
    _title(axes, "Explained variance, held out")
    axes.axhline(0, color=GREY, linewidth=0.8)
    _held_out(axes, share, COLOURS[0], MARKERS[0], linestyle="-", label="value")
    steps, values = _finite(share)
    if len(values):
        axes.annotate(f"{values[-1]:.2f}", (steps[-1], values[-1]), (6, 0), va="center", textcoords="offset points", fontsize=8)
    axes.set_ylim(min(-0.1, values.min(initial=0.0) * 1.1), 1.0)


_WEIGHTS = {"train/effective_sample_fraction": "effective samples", "train/weight_entropy": "entropy over heads"}


def _weights(axes: Axes, series: Mapping[str, Series]) -> None:
    _title(axes, "Evenness of the weights (1: uniform)")
    for (name, label), colour, line in zip(_WEIGHTS.items(), COLOURS, ("-", "--"), strict=False):
        if name in series:
            _smoothed(axes, series[name], colour, linestyle=line, label=label)
    axes.set_ylim(0, 1.05)
    axes.legend(loc="lower right", **_LEGEND)


def _gradient_norm(axes: Axes, norm: Series) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    _title(axes, "Gradient norm")
    _smoothed(axes, norm, COLOURS[0])
    values = _finite(norm)[1]
    if len(values) and values.min() > 0 and values.max() > LOG_RATIO * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _learning_rate(axes: Axes, rate: Series) -> None:
    _title(axes, "Learning rate")
    steps, values = _finite(rate)
    index = _spread(len(steps), POINTS)
    axes.plot(steps[index], values[index], color=COLOURS[0], linewidth=1.4, marker=_dot(rate))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _throughput(axes: Axes, rate: Series) -> None:
    from matplotlib.ticker import EngFormatter

    _title(axes, "Tokens a second")
    _smoothed(axes, rate, COLOURS[0])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


_LEGEND = {"fontsize": 8, "frameon": False, "handlelength": 1.8, "borderaxespad": 0.2, "labelspacing": 0.3}


def _style(axes: Axes, columns: int) -> Axes:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=8, colors=GREY, labelcolor="black", length=3)
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5 * columns, integer=True, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return axes


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9)


def _smoothed(
    axes: Axes, series: Series, colour: str, *, band: bool = True, linewidth: float = 1.4, **style: Any
) -> None:
    """A moving mean, over a band that holds the middle 80% of the values around it."""
    steps, values = _finite(series)
    half = len(steps) // SMOOTHING
    index, windows = _windows(values, half)
    mean = np.array([window.mean() for window in windows])
    if band and half > 1:
        low, high = np.array([np.percentile(window, (10, 90)) for window in windows]).T
        axes.fill_between(steps[index], low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(steps[index], mean, color=colour, linewidth=linewidth, marker=_dot(series), markersize=4, **style)


def _held_out(axes: Axes, series: Series, colour: str, marker: str, *, linestyle: str, label: str) -> None:
    """A line through all points, and markers on some of them, the last included."""
    steps, values = _finite(series)
    marked = _spread(len(steps), HELD_OUT_MARKERS)
    axes.plot(
        steps, values, color=colour, linewidth=1.4, linestyle=linestyle, label=label,
        marker=marker, markevery=marked.tolist(), markersize=8 if marker == "*" else 5,
        markeredgecolor="white", markeredgewidth=0.5,
    )  # fmt: skip


def _windows(values: np.ndarray, half: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Indices of at most POINTS values, and the values around each.

    A window holds `half` values on both sides. At the start, where curves are steep, it is as short on the right as on the
    left, so that the start is not bent; at the end it only lacks its right side.
    """
    index = _spread(len(values), POINTS)
    left = np.maximum(index - half, 0)
    right = np.minimum(index + np.minimum(half, index), len(values) - 1)
    return index, [values[i : j + 1] for i, j in zip(left, right, strict=True)]


def _spread(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `count` things, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _dot(series: Series) -> str:
    return "o" if len(series[0]) == 1 else ""


def _finite(series: Series) -> Series:
    steps, values = series
    good = np.isfinite(values)
    return steps[good], values[good]


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> Series:
    """The metric's steps and values, the last value of each step."""
    points = {row["step"]: row[name] for row in rows if name in row}
    return np.array(list(points), dtype=np.int64), np.array(list(points.values()), dtype=np.float64)


def _without_repeats(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Leaves out the lines that a resumed run overtook: those whose step is past that of a later line."""
    kept: list[Mapping[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["step"] > row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def _name(directory: Path, summary: Mapping[str, Any]) -> str:
    parts = [directory.absolute().name]
    if "rewards" in summary:
        return "  ·  ".join([*parts, "value head on a frozen model"])
    if config := _json(directory / "config.json"):
        heads = config["model"]["heads"]
        many = f"{heads['count']} {heads['kind']} heads" if heads["count"] > 1 else "1 head"
        parts += [config["weighting"]["algorithm"], many]
    return "  ·  ".join(parts)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
