"""What a stage tells a person: before it begins (`--dry_run`), and at its end, when its summary and curves are written."""

from __future__ import annotations

from wmtp_jax.checkpoint.run_directory import write_json
from wmtp_jax.data.bigram import bigram_metrics
from wmtp_jax.data.pipeline import rows_per_epoch
from wmtp_jax.report.curves import draw_curves
from wmtp_jax.run import summary
from wmtp_jax.run.stage import Stage
from wmtp_jax.tracking.metrics_file import read_metrics


def plan_rows(stage: Stage, parameters: int) -> list[tuple[str, str]]:
    """What `--dry_run` says in either backend: algorithm, what is trained first, model, batch, steps."""
    config, corpus, settings = stage.config, stage.corpus, stage.model
    weighting, c = config.weighting, config.critic
    first = []
    if stage.has_losses:
        first.append(("reference", f"losses stored beside the tokens, {stage.origins['reference_losses']}"))
    elif config.uses_reference:
        steps = f"trained first, {config.reference.steps} steps, in WORKDIR/reference"
        first.append(("reference", f"{config.reference.path}, tokenizer checked" if config.reference.path else steps))
    if weighting.needs_values:
        trunk = c.trunk or (
            f"trained first, baseline-mtp, {c.trunk_steps} steps, in WORKDIR/trunk"
            if c.trunk_steps
            else "the published weights"
        )
        head = c.head or f"trained on the frozen trunk, up to {c.steps} steps, in WORKDIR/value"
        first += [("trunk", trunk), ("rewards", config.reward.source), ("value head", head)]
    rows, length = config.train.batch_size, config.data.sequence_length
    steps, two_passes = stage.steps, config.train.accumulation > 1 and not weighting.is_local
    epochs = steps * rows / rows_per_epoch(corpus)
    score = f"score {weighting.score}, " if weighting.needs_reference else ""
    return [
        *([("start", f"{config.pretrained.path}, trained: {config.pretrained.trainable}")] if config.pretrained.path else []),
        ("algorithm", f"{weighting.algorithm}, {score}form {weighting.form}, scope {weighting.scope}"),
        *first,
        ("model", f"{settings.layers} layers, width {settings.width}, {settings.num_heads} {settings.head_kind} heads"),
        ("parameters", f"{parameters:,}"),
        ("batch", f"{rows} rows of {length} tokens, {config.train.accumulation} micro-batches"),
        ("statistics pass", "one more forward pass an update: weights rank the whole batch" if two_passes else "none"),
        ("steps", f"{steps:,} updates, {steps * rows * length:,} tokens, {epochs:.2f} epochs"),
        ("operations", f"{stage.flops_per_token / 1e6:.1f} Mflop a token, forward and backward"),
    ]


def finish_model(
    stage: Stage, *, step: int, skipped: int, best: int | None, samples: list[dict[str, str]]
) -> None:
    """Writes `summary.json` and `curves.png`, and prints what was learned and where to look next.

    Args:
      stage: what was trained.
      step: updates that were made.
      skipped: of these, left out as non-finite.
      best: the step of the best checkpoint.
      samples: `prompt` and `completion` each.
    """
    if not stage.processes.first:
        return
    config, directory = stage.config, stage.directory
    evaluations = [line for line in read_metrics(directory / "metrics.jsonl") if "eval/bits_per_byte" in line]
    before, after = evaluations[0], evaluations[-1]
    pairs = None
    if config.eval.bigram:
        seen = step * config.train.batch_size
        pairs = bigram_metrics(stage.corpus, rows=seen, seed=config.train.seed, batches=stage.whole_evaluation_batches)
    facts = {
        "algorithm": config.weighting.algorithm,
        "corpus": stage.corpus.hash,
        "steps": step,
        "best_step": best,
        "skipped": skipped,
        "before": before,
        "after": after,
        "bigram": pairs,
        "bigram_bits_per_byte": pairs and pairs["eval/bits_per_byte"],
        "completions": samples,
    }
    write_json(directory / "summary.json", facts)
    draw_curves(directory)
    print(f"\n{stage.name} ({config.weighting.algorithm}), {step} steps")
    print(summary.table(before, after, bigram=pairs))
    if samples:
        print("\n" + summary.completions(samples))
    if stage.name == "train":
        print("\n" + summary.facts("look next", summary.places(directory, config.tracking.uri, config.tracking.enabled)))


def finish_values(stage: Stage, *, step: int, skipped: int, best: int) -> None:
    """Writes `summary.json` and `curves.png` of a value stage, and prints what the head explains.

    Args:
      stage: what was trained.
      step: updates that were made.
      skipped: of these, left out as non-finite.
      best: the step whose value loss is the lowest.
    """
    if not stage.processes.first:
        return
    lines = [line for line in read_metrics(stage.directory / "metrics.jsonl") if "eval/explained_variance" in line]
    by_step = {line["step"]: line for line in lines}
    facts = {
        "steps": step,
        "best_step": best,
        "skipped": skipped,
        "value_loss": {str(number): line["eval/value_loss"] for number, line in by_step.items()},
        "explained_variance": {str(number): line["eval/explained_variance"] for number, line in by_step.items()},
        "rewards": stage.origins["rewards"],
    }
    write_json(stage.directory / "summary.json", facts)
    draw_curves(stage.directory)
    chosen = by_step[best]
    print(
        f"\nvalue head, {step} steps, best at {best}: explains {chosen['eval/explained_variance']:.1%} of the variance of "
        f"held-out rewards (value loss {chosen['eval/value_loss']:.4f}, untrained {lines[0]['eval/value_loss']:.4f})"
    )
