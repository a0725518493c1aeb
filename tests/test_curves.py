"""curves.png: what the lines hold is what was logged, on complete, partial, resumed and broken runs."""

import json
import math

import numpy as np
import pytest
from matplotlib import image

from wmtp_jax.errors import UserError
from wmtp_jax.report.curves import COLOURS, MARKERS, POINTS, SMOOTHING, curves_figure, draw_curves


def rows_of(steps, *, heads=2, evaluate_every=0):
    """A line a step, with values that name themselves: head k at step s loses 10 (k + 1) + s / 1000."""
    rows = []
    for step in steps:
        row = {"step": step, "stage": "train", "time": float(step)}
        row |= {f"train/ce_head_{k}": 10 * (k + 1) + step / 1000 for k in range(heads)}
        row |= {"train/loss": 5 + step / 1000, "train/grad_norm": 1.0, "train/learning_rate": step * 1e-5}
        row |= {"train/weight_entropy": 0.9, "train/effective_sample_fraction": 0.7, "train/tokens_per_second": 1e4}
        if evaluate_every and step % evaluate_every == 0:
            row |= {f"eval/ce_head_{k}": 20 * (k + 1) + step / 1000 for k in range(heads)}
            row["eval/bits_per_byte"] = 3 - step / 1000
        rows.append(row)
    return rows


def panel(figure, title):
    [axes] = [axes for axes in figure.axes if title in axes.get_title("left")]
    return axes


def data(line):
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def test_lines_hold_what_was_logged():
    figure = curves_figure(rows_of(range(0, 100, 10), evaluate_every=50), title="a run", bigram=2.19)
    axes = panel(figure, "Cross-entropy by head")
    lines = [data(line) for line in axes.get_lines()]
    steps = np.arange(0, 100, 10)
    for head in range(2):
        train, held_out = lines[2 * head : 2 * head + 2]
        np.testing.assert_array_equal(train, (steps, 10 * (head + 1) + steps / 1000))
        np.testing.assert_array_equal(held_out, ([0, 50], [20 * (head + 1), 20 * (head + 1) + 0.05]))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["head 0", "head 1"]
    bits, bigram = panel(figure, "Bits per byte").get_lines()
    np.testing.assert_array_equal(data(bits), ([0, 50], [3, 2.95]))
    assert set(data(bigram)[1]) == {2.19}
    for title, value in (("Gradient norm", 1.0), ("Tokens a second", 1e4)):
        [line] = panel(figure, title).get_lines()
        np.testing.assert_array_equal(data(line), (steps, np.full(10, value)))
    [rate] = panel(figure, "Learning rate").get_lines()
    np.testing.assert_allclose(data(rate)[1], steps * 1e-5)
    fraction, entropy = panel(figure, "Evenness").get_lines()
    assert (set(data(fraction)[1]), set(data(entropy)[1])) == ({0.7}, {0.9})
    assert figure.get_suptitle() == "a run"


def test_heads_differ_in_two_channels():
    figure = curves_figure(rows_of([0, 10], heads=12, evaluate_every=10))
    held_out = [line for line in panel(figure, "Cross-entropy").get_lines() if line.get_linestyle() == "None"]
    looks = [(line.get_color(), line.get_marker()) for line in held_out]
    assert len(set(looks)) == 12
    assert len({colour for colour, _ in looks[:8]}) == len({marker for _, marker in looks[:8]}) == 8
    assert len(COLOURS) == len(MARKERS) == 8


def test_many_steps_are_averaged_and_thinned():
    count = 20_000
    rng = np.random.default_rng(0)
    values = 1 + rng.random(count)
    figure = curves_figure([{"step": s, "train/loss": v} for s, v in enumerate(values)])
    axes = panel(figure, "loss")
    steps, mean = data(axes.get_lines()[0])
    assert len(steps) == POINTS and steps[0] == 0 and steps[-1] == count - 1
    half = count // SMOOTHING
    for step, drawn in list(zip(steps.astype(int), mean, strict=True))[::37]:
        window = values[max(0, step - half) : step + min(half, step) + 1]
        assert drawn == pytest.approx(sum(window) / len(window), rel=1e-12)
    [band] = axes.collections
    low, high = band.get_datalim(axes.transData).intervaly
    assert 1 < low < 1.12 and 1.88 < high < 2  # 10th and 90th percentile of a uniform distribution on [1, 2], and noise


def test_resumed_run_shows_its_newer_lines():
    rows = rows_of(range(0, 60, 10)) + [row | {"train/loss": 99.0} for row in rows_of(range(30, 50, 10))]
    [line] = panel(curves_figure(rows), "loss").get_lines()
    np.testing.assert_array_equal(data(line), ([0, 10, 20, 30, 40], [5, 5.01, 5.02, 99, 99]))
    # An evaluation may have a line of its own at the same step, and so may a resume from just before.
    twice = [{"step": 1, "train/loss": 1.0}, {"step": 1, "eval/bits_per_byte": 2.0}, {"step": 1, "train/loss": 3.0}]
    figure = curves_figure(twice)
    assert data(panel(figure, "loss").get_lines()[0])[1] == [3.0]
    assert data(panel(figure, "Bits").get_lines()[0])[1] == [2.0]


def test_only_what_was_logged_gets_a_panel():
    figure = curves_figure([{"step": 0, "train/loss": 1.0, "other": "text"}])
    assert [axes.get_title("left") for axes in figure.axes] == ["Training loss, weighted"]
    assert figure.axes[0].get_lines()[0].get_marker() == "o"  # one point has no line
    only_held_out = curves_figure([{"step": s, "eval/ce_head_0": 1.0} for s in (0, 1)])
    assert only_held_out.axes[0].get_lines()[0].get_linestyle() == "-"
    assert not curves_figure([]).axes


def test_values_that_are_not_finite_are_marked():
    rows = rows_of(range(0, 50, 10))
    rows[2]["train/loss"], rows[3]["train/loss"] = math.nan, math.inf
    line, marks = panel(curves_figure(rows), "loss").get_lines()
    np.testing.assert_array_equal(data(line)[0], [0, 10, 40])
    np.testing.assert_array_equal(data(marks)[0], [20, 30])
    assert marks.get_label() == "not finite (2)"


def test_untrained_model_does_not_squash_the_rest():
    rows = [{"step": s, "eval/bits_per_byte": v} for s, v in enumerate((8.0, 2.5, 2.3, 2.2))]
    axes = panel(curves_figure(rows, bigram=2.4), "Bits")
    assert axes.get_ylim()[0] < 2.2 and 2.5 < axes.get_ylim()[1] < 3
    assert axes.get_lines()[0].get_label() == "this run (starts at 8.00)"
    assert data(axes.get_lines()[0])[1][0] == 8.0


def test_picture_of_a_run_directory(tmp_path):
    run = tmp_path / "first-try"
    run.mkdir()
    lines = [json.dumps(row) for row in rows_of(range(0, 1000, 10), evaluate_every=100)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 1000, "st')  # a crash tore the last line
    config = {"weighting": {"algorithm": "rho1-tokenskip"}, "model": {"heads": {"count": 2, "kind": "linear"}}}
    (run / "config.json").write_text(json.dumps(config))
    (run / "summary.json").write_text(json.dumps({"bigram_bits_per_byte": 2.19}))
    assert draw_curves(run) == [run / "curves.png"]
    pixels = image.imread(run / "curves.png")[..., :3]
    assert pixels.shape[1] == 1728 and pixels.shape[0] > 700
    for colour in COLOURS[:2]:  # both heads are there, in their colours
        wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(pixels - wanted).max(axis=-1) < 0.02).sum() > 500
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "curves.png", "metrics.jsonl", "summary.json"]


def test_title_says_what_the_run_is(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("wmtp_jax.report.curves.curves_figure", lambda rows, **named: titles.append(named) or Empty())
    (tmp_path / "metrics.jsonl").write_text("")
    draw_curves(tmp_path)
    config = {"weighting": {"algorithm": "focal"}, "model": {"heads": {"count": 1, "kind": "linear"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "summary.json").write_text('{"bigram_bits_per_byte": null}')
    draw_curves(tmp_path)
    assert [named["title"] for named in titles] == [tmp_path.name, f"{tmp_path.name}  ·  focal  ·  1 head"]
    assert [named["bigram"] for named in titles] == [None, None]


class Empty:
    axes = ()


def test_nothing_logged(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl"):
        draw_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert draw_curves(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
