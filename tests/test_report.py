"""The report: its page in a headless browser, what it holds against the runs' files, how small it is, and wrong input."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from mlflow.tracking import MlflowClient

from tests.browser import find_browser, open_browser
from wmtp_jax.checkpoint.run_directory import plain, save_arrays
from wmtp_jax.data import packing
from wmtp_jax.data.pipeline import make_batch
from wmtp_jax.errors import UserError
from wmtp_jax.evaluation import row_kinds
from wmtp_jax.evaluation.token_kinds import KINDS, byte_kinds, token_kinds
from wmtp_jax.report import figures
from wmtp_jax.report.content import page_content, spread
from wmtp_jax.report.page import embed, render
from wmtp_jax.report.palette import GROUPS, contrast, shades
from wmtp_jax.report.runs import group_runs, read_runs
from wmtp_jax.report.tokens import by_token, pack, read_documents, read_entries
from wmtp_jax.settings import Configuration, Heads, Model, Train, Weighting
from wmtp_jax.storage import s3 as storage
from wmtp_jax.tokenizer.tokenizer import train_bpe
from wmtp_jax.tracking.tracker import MetricsFile

HEADS = 3
EVIL = "</script><script>document.title='broken'</script><!-- <b>&amp;\u2028"
SOURCE = f'''"""Counts things. {EVIL}"""

LIMIT = 12  # not more


def count(items, start=0):
    total = start
    for item in items:
        if item > LIMIT:
            return total
        total += item * 3
    return total
'''


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([SOURCE * 4], vocabulary_size=320)


def write_run(
    directory, tokenizer, *, algorithm="rho1-tokenskip", seed=0, steps=(0, 40, 80), rows=4, length=64, texts=None, evaluated=True
):
    """A run directory as a training leaves it, with numbers drawn at random."""
    generator = np.random.default_rng(seed + len(algorithm))
    c = Configuration(
        weighting=Weighting(algorithm=algorithm), train=Train(seed=seed), model=Model(heads=Heads(count=HEADS))
    )
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(plain(c)))
    tokenizer.save(directory / "tokenizer")
    log = MetricsFile(directory / "metrics.jsonl")
    for step in range(0, 81, 4):
        line = {"train/loss": 5 - step / 40 + seed, "train/effective_sample_fraction": 0.7}
        if step in steps:
            line |= {f"eval/ce_head_{k}": 4 + k - step / 80 + seed / 10 for k in range(HEADS)}
            line["eval/bits_per_byte"] = 3 - step / 80 + seed / 10
        log.write(step, "train", line)
    log.close()
    source = "".join(texts or [SOURCE] * (1 + rows * length // 100))
    pieces = tokenizer.encode(source)
    ids = np.resize(pieces, (rows, length))
    segments = np.ones((rows, length), np.int32)
    segments[1, length // 2 :] = 2
    segments[-1, -5:] = 0
    batch = make_batch({"tokens": ids, "segment_ids": segments}, num_heads=HEADS)
    kinds = token_kinds([tokenizer.pieces[i] for i in pieces], byte_kinds(source))
    shape = batch["mask"].shape
    reference = generator.gamma(2, 1, shape).astype(np.float32)
    for step in steps:
        entries = {"loss": generator.gamma(2, 1.5, shape), "weight": generator.gamma(1, 1, shape), "reference_loss": reference}
        if algorithm == "rho1-tokenskip" and evaluated:
            entries |= {"reference_entropy": reference / 2}
        if algorithm == "critic-wmtp":
            entries |= {"value": generator.normal(size=shape[:2])}
        entries = {name: value.astype(np.float32) for name, value in entries.items()}
        save_arrays(directory / "tokens" / f"{step}.npz", {**batch, **entries, "kinds": np.resize(kinds, (rows, length))})
    if evaluated:
        place = directory / "evaluation" / "80"
        place.mkdir(parents=True)
        kinds = {kind: {"top1": 0.5, "top5": 0.8, "nats": 2.0, "targets": 9} for kind in ("keyword", "name")}
        one = [{"top1": 0.5 - k / 10, "top5": 0.8, "nats": 3.0, "targets": 9, "ece": 0.1, "kinds": kinds} for k in range(HEADS)]
        (place / "heads.json").write_text(json.dumps({"heads": one}))
        accepted = {"tokens_per_pass": 1.7, "by_depth": [0.6, 0.25], "passes": 10}
        (place / "speed.json").write_text(json.dumps({"acceptance": accepted}))
    return directory


def command(*arguments):
    """The command in a process in which importing jax fails."""
    block = (
        "import runpy, sys; sys.modules['jax'] = sys.modules['flax'] = None; "
        "runpy.run_module('wmtp_jax.report', run_name='__main__', alter_sys=True)"
    )
    result = subprocess.run([sys.executable, "-c", block, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    return result


def refused(*arguments):
    result = command(*arguments)
    assert result.returncode == 2, result.stderr
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def runs(tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs <i>")
    return [
        write_run(root / "skip-0", tokenizer),
        write_run(root / "skip-1", tokenizer, seed=1),
        write_run(root / "critic", tokenizer, algorithm="critic-wmtp", evaluated=False),
    ]


@pytest.fixture(scope="module")
def page_file(runs):
    """Made by the command, without jax, in its usual place."""
    result = command(*runs, "--nopng")
    assert result.returncode == 0, result.stderr
    assert "no evaluation of heads" in result.stdout
    return runs[0] / "report" / "index.html"


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip("no Chrome or Chromium here: apt-get install chromium, or name one in $CHROME")
    with open_browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(browser, page_file):
    with browser.page(page_file.as_uri()) as opened:
        yield opened


# ---- in the browser ----------------------------------------------------------------------------------------------------


def entry(run, step, name, token, head):
    """The number in the run's file that is about a token of its first document, float; NaN where there is none."""
    with np.load(run / "tokens" / f"{step}.npz") as arrays:
        if name not in arrays:
            return math.nan
        if name == "value":
            return float(arrays["value"][0, token])
        place = token - 1 - head
        return float(arrays[name][0, place, head]) if place >= 0 and arrays["mask"][0, place, head] else math.nan


def spans(panel=0):
    return f"[...document.querySelectorAll('.code')[{panel}].children]"


def shading(page, panel=0):
    return page.evaluate(spans(panel) + ".map(span => getComputedStyle(span).backgroundColor)")


def told(page):
    """The numbers that the page shows of the chosen token, by run and name, as text."""
    rows = "[...document.querySelectorAll('#readout tbody tr')]"
    cells = "Object.fromEntries([...row.querySelectorAll('td[data-name]')].map(td => [td.dataset.name, td.textContent]))"
    return page.evaluate(f"Object.fromEntries({rows}.map(row => [row.querySelector('th').textContent, {cells}]))")


def assert_told(page, runs, *, step, token, head):
    shown = told(page)
    assert shown.keys() == {run.name for run in runs}
    for run in runs:
        loss = entry(run, step, "loss", token, head)
        names = ("weight", "loss", "reference_loss", "reference_entropy", "value")
        expected = {name: entry(run, step, name, token, head) for name in names}
        for name, value in expected.items():
            text = shown[run.name][name]
            assert text == "–" if math.isnan(value) else float(text.replace("−", "-")) == pytest.approx(value, abs=6e-4)
        assert float(shown[run.name]["probability"].rstrip("%")) == pytest.approx(100 * math.exp(-loss), abs=0.11)


def slide(page, name, value):
    page.evaluate(f"(() => {{ const s = document.getElementById('{name}'); s.value = {value}; "
                  "s.dispatchEvent(new Event('input', {bubbles: true})); })()")  # fmt: skip
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def hover(page, token, panel=0):
    page.evaluate(f"{spans(panel)}[{token}].scrollIntoView({{block: 'center', behavior: 'instant'}})")
    box = page.evaluate(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({spans(panel)}[{token}].getClientRects()[0])")
    page.point(*box)
    page.wait(f"{spans(panel)}[{token}].classList.contains('twin')")


def test_the_page_opens_from_disk_without_an_error_or_a_request(page, page_file):
    assert page.errors == []
    assert page.requests == [page_file.as_uri()]
    assert "://" not in page_file.read_text()
    assert page.evaluate("document.title").startswith("rho1-tokenskip, critic-wmtp")  # not what the text asked for
    assert page.evaluate("document.querySelectorAll('script').length") == 2
    assert EVIL[:-1] in page.evaluate(spans() + ".map(span => span.textContent).join('')")


def test_sliders_change_the_shading(page, runs):
    shown = [runs[0], runs[2]]  # the first run of each group
    seen = []
    for head in range(HEADS):
        slide(page, "head", head)
        seen.append(shading(page))
        weights = np.array([entry(shown[0], 80, "weight", token, head) for token in range(64)])
        colours = np.array(seen[-1])
        assert (colours[np.isnan(weights)] == "rgba(0, 0, 0, 0)").all() and np.isnan(weights).sum() == head + 1
        # The heavier, the darker: blue shades differ in red first.
        red = np.array([int(re.match(r"rgb\((\d+)", colour)[1]) for colour in colours[~np.isnan(weights)]])
        order = np.argsort(weights[~np.isnan(weights)])
        assert (np.diff(red[order]) <= 0).all() and len(set(red)) > 8
    assert len(set(map(tuple, seen))) == HEADS
    slide(page, "head", 0)
    for number, step in enumerate((0, 40)):
        slide(page, "step", number)
        page.wait(f"document.querySelector('.panel header p').textContent.startsWith('step {step} ')")
        assert shading(page) not in seen
        seen.append(shading(page))
    slide(page, "step", 2)
    page.wait("document.querySelector('.panel header p').textContent.startsWith('step 80 ')")
    assert shading(page) == seen[0]
    assert page.errors == []


def test_hover_shows_the_numbers_in_the_data(page, runs):
    for token, head in ((7, 0), (20, 2)):
        slide(page, "head", head)
        hover(page, token)
        assert_told(page, [runs[0], runs[2]], step=80, token=token, head=head)
    hover(page, 9, panel=1)  # the other run's map chooses for both
    assert_told(page, [runs[0], runs[2]], step=80, token=9, head=2)
    slide(page, "head", 0)


def test_runs_are_chosen_and_documents_are_gone_through(page, runs):
    box = "document.querySelector('#chosen input[value=\"1\"]')"
    page.evaluate(f"{box}.click()")
    page.wait("document.querySelectorAll('.panel').length === 3")
    hover(page, 12)
    assert_told(page, runs, step=80, token=12, head=0)
    page.evaluate(f"{box}.click()")
    page.wait("document.querySelectorAll('.panel').length === 2")
    page.evaluate("document.getElementById('next').click()")
    page.wait(f"document.getElementById('document').value === '1' && {spans()}.length === 32")  # the first half of row 1
    page.evaluate("document.getElementById('previous').click()")
    page.wait(f"{spans()}.length === 64")


def test_the_keyboard_reaches_everything(page, runs):
    page.evaluate("document.getElementById('head').focus()")
    page.press("ArrowRight")
    page.wait("document.getElementById('head-out').textContent === 'head 1, 2 tokens ahead'")
    page.press("ArrowLeft")
    for _ in range(20):
        page.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('role') === 'option'"):
            break
    token = int(page.evaluate("document.activeElement.dataset.token"))
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.token") == str(token + 2)
    assert_told(page, [runs[0], runs[2]], step=80, token=token + 2, head=0)
    weight = entry(runs[0], 80, "weight", token + 2, 0)
    assert f"weight {weight:.3f}" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.press("ArrowDown")
    below = page.evaluate("document.activeElement.getBoundingClientRect().top")
    page.press("ArrowUp")
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") < below
    page.press("End")
    assert page.evaluate("document.activeElement.dataset.token") == "63"
    page.press("Home")
    assert page.evaluate("document.activeElement.dataset.token") == "0"
    page.evaluate("document.querySelector('svg.chart').focus()")
    page.press("Home")
    assert page.evaluate("document.querySelector('.chart-read').textContent").startswith("step 0: rho1-tokenskip 3.05 (3–3.1)")


def test_ranking_and_charts(page, runs):
    slide(page, "head", 0)
    arrays, sums = dict(np.load(runs[0] / "tokens" / "80.npz")), {}
    for row, column in np.ndindex(4, 64):
        if column and arrays["mask"][row, column - 1, 0]:
            sums.setdefault(KINDS[arrays["kinds"][row, column]], []).append(arrays["weight"][row, column - 1, 0])
    cells = "[tr.querySelector('th').textContent, ...[...tr.querySelectorAll('td')].map(td => td.textContent)]"
    rows = page.evaluate(f"[...document.querySelector('#ranking tbody').rows].map(tr => {cells})")
    by_kind = {kind: (float(mean), int(n)) for kind, _, mean, n in rows if n != "0"}
    assert by_kind == {kind: (pytest.approx(np.mean(ws), abs=6e-3), len(ws)) for kind, ws in sums.items()}
    titles = page.evaluate("[...document.querySelectorAll('figcaption h3')].map(title => title.textContent)")
    assert "Bits per byte, held out" in titles and "Acceptance by depth" in titles and "Cross-entropy by head" in titles
    assert "Top-1 accuracy by kind of token" in titles
    button = "document.querySelectorAll('#ranking table')[1].querySelector('button')"
    text = page.evaluate(f"{button}.textContent")
    page.evaluate(f"{button}.click()")
    page.wait("document.activeElement.getAttribute('role') === 'option'")
    there = page.evaluate("document.activeElement.textContent")
    assert there.replace("\n", "↵").replace(" ", "·") == text
    page.evaluate("document.getElementById('document').value = '0'")
    page.evaluate("document.getElementById('document').dispatchEvent(new Event('change'))")
    page.wait(f"{spans()}.length === 64")


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_every_shade_and_nothing_overflows(browser, page_file, width, dark):
    with browser.page(page_file.as_uri(), width=width, dark=dark) as page:
        pairs = page.evaluate(spans() + ".map(span => { const s = getComputedStyle(span); return [s.backgroundColor, s.color, "
                              "getComputedStyle(span.closest('.panel')).backgroundColor]; })")  # fmt: skip
        for background, ink, card in pairs:
            below = card if background == "rgba(0, 0, 0, 0)" else background
            one, other = ("#" + "".join(f"{int(n):02x}" for n in re.findall(r"\d+", colour)[:3]) for colour in (below, ink))
            assert contrast(one, other) >= 4.5, (background, ink)
        assert (contrast("#000000", "#" + "".join(f"{int(n):02x}" for n in re.findall(r"\d+", pairs[0][2])[:3])) < 3) == dark
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.errors == []


# ---- without one -------------------------------------------------------------------------------------------------------


def test_what_is_embedded_ends_no_script_and_stays_what_it_is():
    text = embed({"text": EVIL, "name": "\udcff"})
    assert not re.search(r"[<>&\u2028]", text)
    assert json.loads(text)["text"] == EVIL
    page = render({"text": "__JS__ __DATA__" + EVIL}, title="</title>" + EVIL)
    assert page.count("<script") == page.count("</script>") == 2


def test_packed_numbers_are_the_numbers_rounded():
    import base64
    import zlib

    generator = np.random.default_rng(0)
    for values, unit in (
        (generator.gamma(2, 2, (5, 7)), 1e-3), (generator.normal(size=50), 1e-3), (np.linspace(-100, 900, 99), 1e-1),
        (np.zeros(3), 1e-3), (np.array([np.nan, 1.5, np.inf]), 1e-3), (np.array([np.nan]), 1e-3),
    ):  # fmt: skip
        packed = pack(values)
        low, high = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), np.uint8).reshape(2, -1).astype(np.int64)
        codes = low + 256 * high
        got = (packed["low"] + codes) / 10.0 ** packed["places"]
        finite = np.isfinite(values.ravel())
        np.testing.assert_allclose(got[finite], values.ravel()[finite], atol=unit / 2 * 1.0001)
        assert (codes[np.isnan(values.ravel())] == 65535).all() and (codes[np.isinf(values.ravel())] == 65534).all()


def test_a_token_gets_the_entry_of_the_head_that_predicts_it(runs):
    documents = read_documents(read_runs(runs))
    arrays = read_entries(runs[2] / "tokens" / "80.npz")
    assert documents.starts.tolist() == [0, 64, 96, 128, 192, 251]
    found = by_token(arrays, documents)
    position = 0
    for row in range(4):
        for t in range(64):
            if arrays["segment_ids"][row, t] == 0:
                continue
            for k in range(HEADS):
                valid = t - 1 - k >= 0 and arrays["mask"][row, t - 1 - k, k]
                expected = arrays["weight"][row, t - 1 - k, k] if valid else np.nan
                np.testing.assert_equal(found["weight"][position, k], np.float64(expected))
            assert found["value"][position] == arrays["value"][row, t]
            position += 1


@pytest.mark.parametrize(("heads_steps", "whole"), [((0, 80), True), (tuple(range(0, 80, 10)), False)])
def test_fifty_documents_take_less_than_five_megabytes(tokenizer, tmp_path, heads_steps, whole):
    """Of 512 tokens each, of two algorithms; the second case has more steps than fit."""
    many = [
        write_run(tmp_path / name, tokenizer, algorithm=name, steps=heads_steps, rows=49, length=512)
        for name in ("rho1-weighted", "critic-wmtp")
    ]
    read = read_runs(many)
    content, left = page_content(
        read, group_runs(read), read_documents(read), steps=20, pieces=50, limit=5_000_000 - 60_000
    )
    page = render(content, title="size")
    assert len(page.encode()) < 5_000_000
    assert len(content["map"]["starts"]) == 51
    assert {0, heads_steps[-1]} <= set(content["map"]["steps"])
    assert (left == "") == whole


def test_shades_and_groups_can_be_told_apart():
    for scheme, paper in (("light", "#fdfdfc"), ("dark", "#14171a")):
        levels = shades(scheme)
        away = [contrast(background, paper) for background, _ in levels]
        assert (np.diff(away) > 0).all()  # by lightness alone
        assert min(contrast(*pair) for pair in levels) >= 4.5
        assert min(contrast(colour, paper) for colour in GROUPS[scheme]) >= 3  # of lines: WCAG 1.4.11


def test_seeds_make_groups_and_other_settings_are_named(tokenizer, runs, tmp_path):
    other = write_run(tmp_path / "half", tokenizer)
    config = json.loads((other / "config.json").read_text())
    config["weighting"]["fraction"] = 0.5
    # A key that was added after a run began counts as its default.
    older = json.loads((runs[1] / "config.json").read_text())
    del older["weighting"]["start_step"], older["reward"]
    shutil.copytree(runs[1], tmp_path / runs[1].name)
    (tmp_path / runs[1].name / "config.json").write_text(json.dumps(older))
    runs = [runs[0], tmp_path / runs[1].name, *runs[2:]]
    (other / "config.json").write_text(json.dumps(config))
    read = read_runs([*runs, other])
    groups = group_runs(read)
    assert [group.members for group in groups] == [(0, 1), (2,), (3,)]
    assert groups[0].label == "rho1-tokenskip (fraction 0.7)" and groups[2].label == "rho1-tokenskip (fraction 0.5)"
    content, _ = page_content(read, groups, None, steps=1, pieces=1, limit=10**7)
    [bits] = [panel for panel in content["curves"] if panel["id"] == "eval/bits_per_byte"]
    seeds = bits["series"][0]
    assert seeds["steps"] == [0, 40, 80] and seeds["runs"] == 2
    np.testing.assert_allclose([seeds["mean"], seeds["low"], seeds["high"]], [[3.05, 2.55, 2.05], [3, 2.5, 2], [3.1, 2.6, 2.1]])
    [acceptance] = [chart for chart in content["depth"] if chart["id"] == "acceptance"]
    assert acceptance["series"][0]["x"] == [1, 2] and acceptance["series"][0]["mean"] == [0.6, 0.25]


@pytest.mark.parametrize("length", [16, 50])
def test_rows_know_the_kinds_of_documents_that_they_cut(tokenizer, monkeypatch, length):
    """Against whole documents; and no document is looked at that isn't in the row."""
    tokens, kinds, documents = [], [], []
    for number in range(9):
        text = SOURCE[: 60 * number] if number % 3 else f"x{number} = 'a'  # b\n"
        ids = tokenizer.encode(text).tolist() if text else []
        found = token_kinds([tokenizer.pieces[i] for i in ids], byte_kinds(text)).tolist()
        documents += [number] * (len(ids) + 1)
        tokens, kinds = [*tokens, *ids, tokenizer.end_of_text_id], [*kinds, *found, KINDS.index("other")]
    padding = -len(tokens) % length
    shape = (-1, length)
    expected = np.array([*kinds, *[KINDS.index("other")] * padding]).reshape(shape)
    columns = {
        "tokens": np.array([*tokens, *[0] * padding]).reshape(shape),
        "segment_ids": np.array([*[1] * len(tokens), *[0] * padding]).reshape(shape),
    }
    looked_at, look = [], row_kinds._document_kinds
    monkeypatch.setattr(row_kinds, "_document_kinds", lambda *args: looked_at.append(1) or look(*args))
    for number, row in enumerate(expected):
        looked_at.clear()
        np.testing.assert_array_equal(row_kinds.row_kinds(packing.Rows(columns), number, tokenizer), row)
        assert len(looked_at) == len(set(documents[number * length : (number + 1) * length]))


def test_spread_keeps_the_ends():
    assert spread(list(range(10)), 3)[0] == 0 and spread(list(range(10)), 3)[-1] == 9
    assert spread([1, 2], 6) == [1, 2] and spread([1, 2, 3], 1) == [3]


def test_figures_hold_the_same_numbers(runs, tmp_path):
    read = read_runs(runs)
    groups, documents = group_runs(read), read_documents(read)
    content, _ = page_content(read, groups, documents, steps=1, pieces=9, limit=10**7)
    written = figures.draw_figures(tmp_path / "figures", content, read, groups, documents)
    assert [path.name for path in written] == ["curves.png", "depth.png", "kinds.png", "token_map.png"]
    assert all(image.imread(path).std() > 0.01 for path in written)
    [bits] = [axes for axes in figures._charts(content["curves"], groups).axes if axes.get_title("left").startswith("Bits")]
    skip, critic = bits.get_lines()
    np.testing.assert_allclose(skip.get_ydata(), [3.05, 2.55, 2.05])
    np.testing.assert_allclose(critic.get_ydata(), [3, 2.5, 2])
    known = {number: by_token(read_entries(runs[number] / "tokens" / "80.npz"), documents) for number in (0, 2)}
    drawn = figures._token_map(groups, read, [0, 2], known, documents)
    weights = [entry(runs[0], 80, "weight", token, 0) for token in range(64)]
    patches, laid = drawn.axes[0].patches, figures._lay_out(["".join(t) for t in _pieces(documents)[:64]])
    shaded = [token for token, *_ in laid if not math.isnan(weights[token])]
    assert len(patches) == len(shaded)
    red = {token: patch.get_facecolor()[0] for token, patch in zip(shaded, patches, strict=True)}
    order = sorted(red, key=weights.__getitem__)
    assert all(red[one] >= red[other] for one, other in zip(order, order[1:], strict=False))
    assert figures.draw_figures(tmp_path / "figures", content | {"curves": [], "depth": []}, read, groups, None) == []
    assert not list((tmp_path / "figures").iterdir())


def _pieces(documents):
    return [documents.tokenizer.pieces[token].decode(errors="backslashreplace") for token in documents.tokens]


@pytest.mark.slow
def test_page_and_figures_go_to_the_mlflow_run_of_the_training(tokenizer, tmp_path):
    run = write_run(tmp_path / "tracked", tokenizer)
    result = command(run, "--mlflow", "--steps=1")
    assert result.returncode == 0, result.stderr
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    [tracked] = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert tracked.info.run_id in result.stdout
    assert tracked.data.metrics["eval/bits_per_byte"] == 2.0
    names = {item.path for item in client.list_artifacts(tracked.info.run_id, "report")}
    assert names == {"report/index.html", "report/figures"}
    got = client.download_artifacts(tracked.info.run_id, "report/index.html", str(tmp_path))
    assert Path(got).read_text() == (run / "report" / "index.html").read_text()


# ---- wrong input -------------------------------------------------------------------------------------------------------


def test_wrong_input_is_one_line(tokenizer, runs, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        read_runs([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    assert "not a run directory: it has no config.json" in refused(tmp_path / "empty")
    assert "--steps=0" in refused(runs[0], "--steps=0")
    assert "--output" in refused(runs[0], f"--output={runs[0] / 'config.json' / 'page'}")


def test_runs_that_cannot_stand_side_by_side_are_refused(tokenizer, runs, tmp_path):
    other = write_run(tmp_path / "other", tokenizer, texts=["x = 1\n" * 200])
    with pytest.raises(UserError, match="other: kept other validation documents than .*skip-0.*--notokens"):
        read_documents(read_runs([runs[0], other]))
    foreign = write_run(tmp_path / "foreign", train_bpe(["a b c"], vocabulary_size=258))
    with pytest.raises(UserError, match="foreign: has another tokenizer than .*skip-0"):
        read_documents(read_runs([runs[0], foreign]))
    with pytest.raises(UserError, match="the same run"):
        read_runs([runs[0], runs[0]])
    result = command(runs[0], foreign, "--notokens", "--nopng", f"--output={tmp_path / 'curves.html'}")
    assert result.returncode == 0 and (tmp_path / "curves.html").exists()


def test_what_a_continued_run_kept_of_other_documents_is_left_out(tokenizer, tmp_path):
    run, before = write_run(tmp_path / "run", tokenizer), write_run(tmp_path / "before", tokenizer, rows=2, steps=(20,))
    (before / "tokens" / "20.npz").rename(run / "tokens" / "20.npz")
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    last = json.loads(metrics[-1])
    last |= {"eval/ce_head_1": None, "nonfinite": {"eval/ce_head_1": "nan"}}
    (run / "metrics.jsonl").write_text("\n".join([*metrics[:-1], json.dumps(last)]) + "\n")
    read = read_runs([run])
    content, left = page_content(read, group_runs(read), read_documents(read), steps=6, pieces=50, limit=10**7)
    assert content["map"]["steps"] == [0, 40, 80] and left == "3 of 4 steps"
    assert content["runs"][0]["last"]["eval/ce_head_1"] is None and embed(content)


def test_damaged_files_are_named(tokenizer, tmp_path):
    run = write_run(tmp_path / "torn", tokenizer)
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])  # a torn last line is what a crash leaves
    assert read_runs([run])[0].rows[-1]["step"] == 76
    tokens = run / "tokens" / "80.npz"
    tokens.write_bytes(tokens.read_bytes()[:500])
    with pytest.raises(UserError, match="80.npz: damaged"):
        read_documents(read_runs([run]))
    metrics.write_text("nonsense\n" + metrics.read_text())
    with pytest.raises(UserError, match="line 1"):
        read_runs([run])
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: can't be read"):
        read_runs([run])


def test_a_run_that_has_just_begun_is_shown_with_what_it_lacks(tokenizer, tmp_path, browser):
    run = write_run(tmp_path / "young", tokenizer, evaluated=False)
    for file in (run / "tokens").iterdir():
        file.unlink()
    result = command(run, "--nopng")
    assert result.returncode == 0 and "no tokens/STEP.npz" in result.stdout
    with browser.page((run / "report" / "index.html").as_uri()) as page:
        assert page.errors == []
        assert "No run has kept the weights of tokens yet" in page.evaluate("document.getElementById('map').textContent")
        assert "--tasks=heads,speed" in page.evaluate("document.getElementById('depth').textContent")
    (run / "metrics.jsonl").unlink()
    assert "nothing to show yet (no metrics.jsonl, no tokens/STEP.npz" in refused(run)


def test_a_run_in_object_storage_is_shown_as_the_one_on_disk(runs, s3, tmp_path, monkeypatch):
    run = runs[0]
    files = {path.relative_to(run).as_posix(): path for path in run.rglob("*") if path.is_file()}
    storage.upload(f"{s3}/mine", files | {"checkpoints/80/parameters": run / "config.json"})
    there, here = read_runs([f"{s3}/mine"])[0], read_runs([run])[0]
    assert (there.rows, there.config, there.evaluation) == (here.rows, here.config, here.evaluation)
    assert list(there.token_files) == list(here.token_files) and there.name == "mine"
    assert not list(there.path.rglob("checkpoints")), "of a large model these are most of it"
    monkeypatch.chdir(tmp_path)
    done = command(f"{s3}/mine", f"--output={s3}/pages")
    assert done.returncode == 0, done.stderr
    assert f"{s3}/pages/index.html: " in done.stdout
    assert storage.get(f"{s3}/pages/index.html").startswith(b"<!doctype html>")
    assert {"figures/curves.png", "figures/token_map.png"} <= {one.name for one in storage.listing(f"{s3}/pages")}
    assert command(f"{s3}/mine", "--nopng").returncode == 0
    assert (tmp_path / "runs" / "mine" / "report" / "index.html").is_file()
    assert "--mlflow" in refused(f"{s3}/mine", "--mlflow")
    assert f"{s3}/nothing: there is no run under this name" in refused(f"{s3}/nothing")


def test_help_explains_every_flag():
    result = command("--help")
    assert result.returncode == 0
    for flag in ("output", "tokens", "documents", "steps", "megabytes", "png", "mlflow"):
        assert re.search(rf"--{flag}: \w.*", result.stdout)
