"""A study's tables, as Markdown, CSV and LaTeX, and its verdicts in words; all from `study.json`."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Mapping
from typing import Any

from wmtp_jax.errors import UserError
from wmtp_jax.study.results import AGAINST, differences

NONE = "–"
_COMPARED = {"baseline": "the baseline", "permuted": "its weights permuted", "compute": "the baseline at its compute"}


@dataclasses.dataclass(frozen=True)
class Table:
    """Texts in rows and columns.

    Attributes:
      name: verdicts, controls, costs or beside.
      caption: what it shows.
      header: of every column; the first is a name, the others are numbers.
      rows: as many cells each.
    """

    name: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(study: Mapping[str, Any]) -> list[Table]:
    """Those that there is something to show in."""
    found = [_verdicts(study), _controls(study), _costs(study), _beside(study)]
    return [table for table in found if table.rows]


def verdicts(study: Mapping[str, Any]) -> list[str]:
    """A sentence for every arm that was compared."""
    sentences = []
    for name, arm in study["arms"].items():
        if arm["verdict"] is None:
            continue
        told = [f"{name}: {_verdict(study, arm)}"]
        for kind in AGAINST:
            if found := arm["against"].get(kind):
                text = f"{_COMPARED[kind] if kind != 'baseline' else arm['baseline']} {_difference(study, found)}"
                told.append(f"against {text}, n = {found['n']}, corrected p {_p(found['p_corrected'])}")
        if arm["failed"]:
            told.append(f"{len(arm['failed'])} of {len(arm['seeds'])} seeds failed")
        sentences.append("; ".join(told) + ".")
    return sentences


def markdown(table: Table) -> str:
    """The table with its caption below."""
    lines = [
        "| " + " | ".join(table.header) + " |",
        "|" + "|".join("---" if not number else "---:" for number in range(len(table.header))) + "|",
    ]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
    return "\n".join(lines) + f"\n\n{table.caption}\n"


def latex(table: Table) -> str:
    """The table for LaTeX with the package booktabs."""
    columns = "l" + "r" * (len(table.header) - 1)
    rows = [" & ".join(_escaped(cell) for cell in row) + r" \\" for row in table.rows]
    head = " & ".join(_escaped(cell) for cell in table.header) + r" \\"
    return "\n".join(
        [
            r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows,
            r"\bottomrule", r"\end{tabular}", rf"\caption{{{_escaped(table.caption)}}}", rf"\label{{tab:{table.name}}}",
            r"\end{table}", "",
        ]
    )  # fmt: skip


def comma_separated(study: Mapping[str, Any]) -> str:
    """Every comparison, one a line, in full precision."""
    fields = [
        "arm", "control_of", "against", "other", "n", "mean", "low", "high", "t_p", "p_corrected", "wilcoxon_p",
        "equivalence_low", "equivalence_high", "bootstrap_low", "bootstrap_high", "smallest_effect", "verdict", "tries",
        "cost_ratio", "full_cost_ratio",
    ]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for name, arm in study["arms"].items():
        common = {
            "arm": name,
            "control_of": arm["control_of"],
            "tries": arm["tries"],
            "cost_ratio": arm["cost"]["ratio"],
            "full_cost_ratio": arm["cost"]["full_ratio"],
        }
        for kind, found in arm["against"].items():
            verdict = arm["verdict"] if kind == "baseline" else None
            writer.writerow({**common, "against": kind, "other": arm["controls"][kind], **found, "verdict": verdict})
        if not arm["against"]:
            writer.writerow(common)
    return text.getvalue()


def replace_marked(text: str, study: Mapping[str, Any], where: str) -> str:
    """A page with the tables of a study between its marks: `<!-- study NAME: TABLE -->` and `<!-- end -->`.

    Args:
      where: the page, for messages.

    Raises:
      UserError: a mark that names no table, or has no end.
    """
    made = {table.name: markdown(table) for table in tables(study)}
    made["verdict"] = "\n".join(f"- {sentence}" for sentence in verdicts(study)) + "\n"
    begin = re.compile(rf"<!-- study {re.escape(study['name'])}: (\w+) -->\n")
    parts, at = [], 0
    for match in begin.finditer(text):
        end = text.find("<!-- end -->", match.end())
        if end < 0:
            raise UserError(f"{where}: {match[0].strip()} has no <!-- end --> after it")
        if match[1] not in made:
            raise UserError(f"{where}: {match[0].strip()}: no such table; one of " + ", ".join(made))
        parts += [text[at : match.end()], made[match[1]]]
        at = end
    return "".join([*parts, text[at:]])


# ---- single tables -----------------------------------------------------------------------------------------------------


def _verdicts(study: Mapping[str, Any]) -> Table:
    metric = study["metric"]
    rows = []
    for name, arm in study["arms"].items():
        found = arm["against"].get("baseline")
        values = [value for value in arm["values"] if value is not None]
        mean = _number(study, sum(values) / len(values)) if values else NONE
        row = [name, str(len(values)), mean]
        if found is None:
            row += [NONE] * 6
        else:
            row += [
                _difference(study, found),
                _p(found["t_p"]),
                _p(found["p_corrected"]),
                _p(found["wilcoxon_p"]),
                _number(study, found["smallest_effect"]),
                _verdict(study, arm),
            ]
        if arm["verdict"] is not None and found is None:
            row[-1] = arm["verdict"]
        rows.append(tuple(row))
    better = "lower" if metric["lower_is_better"] else "higher"
    split = {"evaluations": "mean over the evaluations while training", None: "no run yet"}.get(
        metric["split"], f"{metric['split']} split, after the last update"
    )
    counted = len([1 for arm in study["arms"].values() if arm["against"].get("baseline")])
    caption = (
        f"{metric['name']} ({better} is better; {split}). Difference: mean of the paired differences by seed, the arm minus its "
        f"baseline, with the 95% t interval. p: paired t test, then under Holm's correction over {counted} arms, then the exact "
        f"signed-rank test. Smallest effect: what this n shows with 80% power at Holm's first level. "
        f"d = {study['difference_that_matters']:g}."
    )
    header = (
        "arm", "seeds", metric["name"], "difference", "p", "p (Holm)", "p (Wilcoxon)", "smallest effect", "verdict",
    )  # fmt: skip
    return Table("verdicts", caption, header, tuple(rows))


def _controls(study: Mapping[str, Any]) -> Table:
    rows = []
    for name, arm in study["arms"].items():
        for kind, found in arm["against"].items():
            bootstrap = NONE
            if found["bootstrap_low"] is not None:
                bootstrap = _interval(study, found["bootstrap_low"], found["bootstrap_high"])
            other = arm["controls"][kind]
            rows.append(
                (name, other, str(found["n"]), _difference(study, found), _p(found["t_p"]), _p(found["p_corrected"]),
                 _p(found["wilcoxon_p"]), bootstrap)
            )  # fmt: skip
    caption = (
        "Every arm against its baseline, against its own weights dealt out at random, and against the baseline at equal "
        "compute where it costs more. p is corrected over the arms that have the same kind of control. The bootstrap interval "
        "(95%, percentile) is given from 8 seeds on, without a claim of coverage."
    )
    header = ("arm", "against", "n", "difference", "p", "p (Holm)", "p (Wilcoxon)", "bootstrap")
    return Table("controls", caption, header, tuple(rows))


def _costs(study: Mapping[str, Any]) -> Table:
    rows = []
    for name, arm in study["arms"].items():
        cost, seconds = arm["cost"], sorted(value for value in arm["seconds"] if value is not None)
        chosen = NONE
        if "choice" in arm:
            chosen = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in arm["choice"]["overrides"].items())
        rows.append(
            (name, f"{cost['total'] / 1e12:.3g}", f"{cost['ratio']:.3f}", f"{cost['full_ratio']:.3f}",
             f"{seconds[len(seconds) // 2]:,.0f}" if seconds else NONE, str(arm["tries"]), chosen)
        )  # fmt: skip
    caption = (
        "Operations by formula of one run, in units of 10^12, with its share of what several runs use; the same as a multiple of "
        "its baseline; the multiple if it had paid for all of that alone. Seconds: of the updates, median over seeds. K: "
        "settings tried on validation."
    )
    header = ("arm", "operations", "times baseline", "in full", "seconds", "K", "chosen")
    return Table("costs", caption, header, tuple(rows))


def _beside(study: Mapping[str, Any]) -> Table:
    rows, arms = [], study["arms"]
    for name, arm in arms.items():
        cells = []
        for metric in study["beside"]:
            values = [value for value in arm["beside"][metric] if value is not None]
            if not values:
                cells.append(NONE)
                continue
            cell = f"{sum(values) / len(values):.4g}"
            against = differences(arm, arms[arm["baseline"]], beside=metric) if arm["baseline"] != name else []
            if len(against) >= 2:
                from wmtp_jax.study.statistics import t_interval

                low, high = t_interval(against)
                cell += f" ({sum(against) / len(against):+.3g} [{low:+.3g}, {high:+.3g}])"
            cells.append(cell)
        rows.append((name, *cells))
    caption = (
        "Beside the verdict's metric: means over seeds, with the mean paired difference to the baseline and its 95% t interval, "
        "not corrected for their number."
    )
    return Table("beside", caption, ("arm", *study["beside"]), tuple(rows) if study["beside"] else ())


def _verdict(study: Mapping[str, Any], arm: Mapping[str, Any]) -> str:
    if arm["verdict"] == "no difference larger than d":
        return f"no difference larger than {study['difference_that_matters']:g}"
    return arm["verdict"]


def _difference(study: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    return f"{_number(study, found['mean'], sign='+')} {_interval(study, found['low'], found['high'])}"


def _interval(study: Mapping[str, Any], low: float, high: float) -> str:
    return f"[{_number(study, low, sign='+')}, {_number(study, high, sign='+')}]"


def _number(study: Mapping[str, Any], value: float, *, sign: str = "") -> str:
    """With two digits more than d has."""
    digits = max(0, 2 - math.floor(math.log10(study["difference_that_matters"])))
    return f"{value:{sign}.{digits}f}"


def _p(value: float | None) -> str:
    if value is None:
        return NONE
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _escaped(text: str) -> str:
    for sign, written in (("\\", r"\textbackslash{}"), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#"), ("$", r"\$"),
                          ("<", r"\textless{}"), (">", r"\textgreater{}"), ("^", r"\^{}"), ("–", "--")):  # fmt: skip
        text = text.replace(sign, written)
    return text


def plan_text(study: Mapping[str, Any]) -> str:
    """What `--dry_run` says, from `study.json` as it is before the runs."""
    arms = study["arms"]
    width = max(len(name) for name in arms)
    metric, d = study["metric"]["name"], study["difference_that_matters"]
    lines = [
        f"plan of {study['name']} (--dry_run: nothing is trained)",
        f"  {study['question']}",
        f"  {study['recipe']}, wmtp_{study['backend']}, verdict on {metric}, d = {d:g}",
        "  all: " + " ".join(f"{key}={value}" for key, value in study["common"].items()),
        f"  {'arm':<{width}}  {'operations':>10}  {'x baseline':>10}  {'in full':>8}  overrides",
    ]
    for name, arm in arms.items():
        cost = arm["cost"]
        told = " ".join(f"{key}={value}" for key, value in arm["overrides"].items())
        lines.append(
            f"  {name:<{width}}  {cost['total']:>10.3g}  {cost['ratio']:>10.3f}  {cost['full_ratio']:>8.3f}  {told}"
        )
    for name, overrides in study["shared"].items():
        lines.append(f"  made once: {name}  " + " ".join(f"{key}={value}" for key, value in overrides.items()))
    runs = len(arms) * len(study["seeds"])
    declared = sum(arm["control_of"] is None for arm in arms.values())
    tries = declared * len(study["tries"]) * len(study["try_seeds"])
    total = sum(sum(arm["cost"]["own"].values()) for arm in arms.values()) * len(study["seeds"])
    more = f", after {tries} tries of settings on seeds of their own" if tries else ""
    lines.append(f"  {runs} runs: {len(arms)} arms x {len(study['seeds'])} seeds, {total:.3g} operations{more}")
    return "\n".join(lines)
