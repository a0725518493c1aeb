"""Where the time of one update goes: XLA's own operations, traced by jax.profiler, by the part of the program they come from.

python experiments/speed/shares.py [--remat=layer]

The shape and the update are those of `measure.py` (6 layers of 256, 4 linear heads). An operation belongs to the place in the
program that its metadata names; one inside another counts once, with the inner one. Shares of the traced time of a CPU.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import tempfile
from pathlib import Path

import jax
from jax.profiler import ProfileData
from measure import SUITES
from updates import jax_update

# What stands in an operation's name or type -> its part; the first that fits counts.
PARTS = (
    ("zeros that scans write first", r"^wrapped_broadcast|^broadcast"),
    ("loss, backward", r"_gradients"),
    ("loss, forward", r"_softmax"),
    ("attention, backward", r"transpose\(.*\[8,4,"),
    ("attention, forward", r"jvp\(.*\[8,4,"),
    ("layers, backward: copies", r"^copy.*transpose\("),
    ("layers, backward", r"transpose\("),
    ("layers, forward", r"jvp\("),
    ("optimizer and all else", r""),
)


def own_time(path: Path, known: dict[str, str]) -> collections.Counter[str]:
    """Milliseconds by operation of the program, without what runs inside of it."""
    found: collections.Counter[str] = collections.Counter()
    for plane in ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            open_events: list[tuple[float, str]] = []
            for start, duration, name in sorted((e.start_ns, e.duration_ns, e.name) for e in line.events if e.name in known):
                while open_events and open_events[-1][0] <= start:
                    open_events.pop()
                if open_events:
                    found[open_events[-1][1]] -= duration / 1e6
                found[name] += duration / 1e6
                open_events.append((start + duration, name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--remat", default="none", help="model.remat")
    shape = dataclasses.replace(SUITES["cpu"][0], remat=parser.parse_args().remat)
    update = jax_update(shape, 4)
    text = update.compiled.as_text()  # pyrefly: ignore[missing-attribute]  # of jax
    known = {}  # operation -> its name, its type and the place that it comes from
    for name, kind, rest in re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\S+) (.*)$", text, re.M):
        place = re.search(r'op_name="([^"]*)"', rest)
        known[name] = f"{name} {place[1] if place else ''} {kind}"
    for _ in range(2):
        update.step()
    with tempfile.TemporaryDirectory() as scratch:
        with jax.profiler.trace(scratch):
            update.step()
        [path] = Path(scratch).rglob("*.xplane.pb")
        times = own_time(path, known)
    parts: collections.Counter[str] = collections.Counter()
    for name, milliseconds in times.items():
        parts[next(part for part, pattern in PARTS if re.search(pattern, known[name]))] += milliseconds
    total = sum(parts.values())
    print(f"{shape.name}, remat={shape.remat}: {total:,.0f} ms of operations, of all threads")
    for part, _ in PARTS:
        print(f"| {part} | {parts[part] / total:.2f} |")
    for name, milliseconds in times.most_common(12):
        print(f"{milliseconds:9.1f} ms  {known[name][:150]}")


if __name__ == "__main__":
    main()
