"""Rewards: one number for every segment of a corpus, from one of three sources, standardised and kept beside the rows.

A source is a function from rows to one number a segment. What it gave for a corpus is kept in the corpus's directory under
the source's key, so that it is asked once; see `with_rewards`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from wmtp_jax.data.corpus import Corpus, PackedSource
from wmtp_jax.data.scan import SPLITS
from wmtp_jax.errors import UserError, disk_errors
from wmtp_jax.storage import cache
from wmtp_jax.storage.long_work import LongWork
from wmtp_jax.stored.reference_losses import in_parts, kept_parts, row_batches
from wmtp_jax.tokenizer.tokenizer import Tokenizer

_FORMAT = 1
COLUMNS = ("rewards", "rewarded")

# tokens, segment_ids [B, S], and labels [B, S] or None -> float [segments], in reading order; NaN where a segment has none.
Score = Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]


@dataclasses.dataclass(frozen=True)
class RewardSource:
    """Where rewards come from.

    Attributes:
      name: the configuration's word for it.
      key: of what made the numbers; equal keys give equal numbers on the same corpus.
      score: the function from rows to one number a segment.
      batch_rows: how many rows it takes at a time, all but the last time.
    """

    name: str
    key: str
    score: Score
    batch_rows: int = 64


def segments(segment_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the segments of rows lie, in reading order: row, first and last position, int64 `[segments]` each.

    `segment_ids [B, S]`; padding (0) is no segment.
    """
    before = np.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    after = np.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    rows, first = np.nonzero((segment_ids != before) & (segment_ids > 0))
    _, last = np.nonzero((segment_ids != after) & (segment_ids > 0))
    return rows, first, last


# ---- the sources -----------------------------------------------------------------------------------------------------


def likelihood(next_token_loss: Callable[[np.ndarray, np.ndarray], np.ndarray], *, key: str, batch_rows: int) -> RewardSource:
    """The mean log-likelihood of a segment's tokens after its first, in nats, under a reference model.

    Args:
      next_token_loss: tokens, segment_ids `[B, S]` -> `[B, S]`, entry t is -log P(x[t] | x[<t] in its segment), 0 at a
        segment's first token.
      key: of the reference's parameters.
      batch_rows: B.
    """

    def score(tokens: np.ndarray, segment_ids: np.ndarray, _: np.ndarray | None) -> np.ndarray:
        rows, first, last = segments(segment_ids)
        # In float64: differences of running sums would lose digits otherwise.
        total = np.cumsum(next_token_loss(tokens, segment_ids).astype(np.float64), axis=1)
        predicted = last - first
        return np.where(predicted > 0, -(total[rows, last] - total[rows, first]) / np.maximum(predicted, 1), np.nan)

    return RewardSource("likelihood", f"likelihood:{key}", score, batch_rows)


def unit_tests() -> RewardSource:
    """The labels that are stored with the data: 1 passed, 0 failed, or any number."""

    def score(tokens: np.ndarray, segment_ids: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        rows, _, last = segments(segment_ids)
        if labels is None:
            return np.full(len(rows), np.nan)
        return labels[rows, last].astype(np.float64)

    return RewardSource("unit_tests", "unit_tests", score)


def reward_model(spec: str, tokenizer: Tokenizer) -> RewardSource:
    """A function of the user's own: `MODULE:FUNCTION`, called as `function(segments, tokenizer)`.

    It gets int arrays `[n]`, one a segment, and the tokenizer (`decode` gives the text), and returns one number for each.
    The key holds the file that the function stands in, so that an edit asks again.

    Raises:
      UserError: no such module or function.
    """
    module_name, colon, name = spec.partition(":")
    if not colon or not module_name or not name:
        raise UserError(f"config.reward.model = {spec!r}: must be MODULE:FUNCTION")
    try:
        function = getattr(importlib.import_module(module_name), name)
        source = Path(inspect.getsourcefile(function)).read_bytes()
    except ImportError as error:
        raise UserError(f"config.reward.model = {spec!r}: can't be imported: {error}") from error
    except AttributeError as error:
        raise UserError(f"config.reward.model = {spec!r}: {error}") from error
    except TypeError as error:
        raise UserError(f"config.reward.model = {spec!r}: is no function with a source file") from error

    def score(tokens: np.ndarray, segment_ids: np.ndarray, _: np.ndarray | None) -> np.ndarray:
        rows, first, last = segments(segment_ids)
        pieces = [tokens[row, start : end + 1] for row, start, end in zip(rows, first, last, strict=True)]
        numbers = np.asarray(function(pieces, tokenizer), np.float64)
        if numbers.shape != (len(pieces),):
            raise UserError(
                f"config.reward.model = {spec!r}: gave shape {numbers.shape} for {len(pieces)} segments, not one number each"
            )
        if np.isnan(numbers).any():
            number = int(np.argmax(np.isnan(numbers)))
            raise UserError(f"config.reward.model = {spec!r}: gave NaN for the text {tokenizer.decode(pieces[number])[:60]!r}")
        return numbers

    return RewardSource("reward_model", f"reward_model:{spec}:{hashlib.sha256(source).hexdigest()}", score)


def classifier(
    states_score: Callable[[np.ndarray, np.ndarray], np.ndarray], *, key: str, pad_token_id: int | None, batch_rows: int
) -> RewardSource:
    """A published sequence classifier with one label: its number at a segment's last token that is not padding to it.

    Args:
      states_score: tokens, segment_ids `[B, S]` -> `[B, S]`, the number after every token, from the tokens of its segment.
      key: of the classifier's files.
      pad_token_id: of its configuration; often the end of text, which then counts no more than padding does.
      batch_rows: B.
    """

    def score(tokens: np.ndarray, segment_ids: np.ndarray, _: np.ndarray | None) -> np.ndarray:
        numbers, (rows, first, last) = states_score(tokens, segment_ids), segments(segment_ids)
        place = np.where(tokens == pad_token_id, -1, np.arange(tokens.shape[1])) if pad_token_id is not None else None
        if place is not None:
            last = np.maximum(np.maximum.accumulate(place, axis=1)[rows, last], first)
        return numbers[rows, last].astype(np.float64)

    return RewardSource("reward_model", f"reward_model:{key}", score, batch_rows)


# ---- over a corpus ---------------------------------------------------------------------------------------------------


def with_rewards(corpus: Corpus, source: RewardSource) -> Corpus:
    """The corpus with two more columns: `rewards [N, S]` float32, a segment's standardised reward at its last token and 0
    elsewhere, and `rewarded [N, S]` bool, the tokens of segments that have one.

    Rewards have mean 0 and standard deviation 1 over the segments of the training rows; held-out rows are scaled alike.

    Raises:
      UserError: a text without a label, an infinite reward, or rewards that are all alike.
    """
    directory = make_rewards(corpus, source)
    return corpus.with_columns(
        [
            {side: {name: np.load(_path(directory, number, side, name), mmap_mode="r") for name in COLUMNS} for side in SPLITS}
            for number in range(len(corpus.sources))
        ]
    )


def kept_of_others(corpus: Corpus, source: RewardSource) -> list[Path]:
    """Where rewards of this corpus lie that came of another source, model or version, if there are none of `source`."""
    kept = sorted(path.parent for path in (corpus.directory / "rewards").glob("[!.]*/manifest.json"))
    return [] if _directory(corpus, source) in kept else kept


def make_rewards(corpus: Corpus, source: RewardSource) -> Path:
    """Computes the rewards of a corpus, or finds them computed, and says where they lie; see `with_rewards`."""
    directory = _directory(corpus, source)
    parts = directory.with_name(f".{directory.name}.parts")
    with disk_errors(corpus.directory, setting="config.data.cache_dir"):
        with kept_parts(parts):
            cache.make_once(directory, lambda partial: _build(corpus, source, partial, parts))
    return directory


def _directory(corpus: Corpus, source: RewardSource) -> Path:
    return corpus.directory / "rewards" / hashlib.sha256(json.dumps([_FORMAT, source.key]).encode()).hexdigest()[:32]


def rewards_key(corpus: Corpus, source: RewardSource) -> str:
    """What a run's rewards were made from, for its checkpoints."""
    return hashlib.sha256(f"{corpus.hash} {source.key}".encode()).hexdigest()


def _build(corpus: Corpus, source: RewardSource, directory: Path, parts: Path) -> None:
    raw = {
        (number, side): _numbers(packed, side, source, parts, f"{source.batch_rows}-{number}-{side}")
        for number, packed in enumerate(corpus.sources)
        for side in SPLITS
    }
    training = np.concatenate([numbers for (_, side), numbers in raw.items() if side == "train"])
    training = training[~np.isnan(training)]
    mean, deviation = float(training.mean()), float(training.std())
    if not len(training) or deviation <= 1e-9 * max(1.0, abs(mean)):
        raise UserError(
            f"config.reward.source = {source.name!r}: all {len(training)} training texts have the reward {mean:.6g}, so that "
            "there is nothing to learn; give it texts that differ"
        )
    for (number, side), numbers in raw.items():
        _write(corpus.sources[number], number, side, (numbers - mean) / deviation, directory)
    facts = {"source": source.name, "key": source.key, "segments": len(training), "mean": mean, "deviation": deviation}
    (directory / "manifest.json").write_text(json.dumps(facts, indent=2) + "\n")


def _numbers(packed: PackedSource, side: str, source: RewardSource, parts: Path, name: str) -> np.ndarray:
    """The rewards of one side's segments as the source gives them, float64 `[segments]`."""
    rows = len(packed.train if side == "train" else packed.validation)
    with LongWork(f"rewards of {packed.name} ({side})", total=rows, unit="rows") as work:

        def results() -> Iterator[Callable[[], np.ndarray]]:
            for count, tokens, segment_ids, labels in row_batches(packed, side, source.batch_rows):
                yield functools.partial(source.score, tokens, segment_ids, labels)
                work.done += count

        numbers = np.concatenate([np.zeros(0), *in_parts(parts, name, results())])
    if source.name == "unit_tests" and np.isnan(numbers).any():
        missing = int(np.isnan(numbers).sum())
        raise UserError(
            f"config.reward.source = 'unit_tests': {missing} of {len(numbers)} texts of {packed.name} ({side}) have no label; "
            "every object needs the field that config.data.label_field names"
        )
    if np.isinf(numbers).any():
        raise UserError(f"config.reward.source = {source.name!r}: an infinite reward for a text of {packed.name} ({side})")
    return numbers


def _write(packed: PackedSource, number: int, side: str, numbers: np.ndarray, directory: Path) -> None:
    rows = packed.train if side == "train" else packed.validation
    shape = (len(rows), rows.columns["tokens"].shape[1])
    dtypes = {"rewards": np.dtype(np.float32), "rewarded": np.dtype(bool)}
    files = {name: _path(directory, number, side, name).open("wb") for name in COLUMNS}
    try:
        for name, file in files.items():
            header = {"descr": np.lib.format.dtype_to_descr(dtypes[name]), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        done = 0
        for count, _, segment_ids, _ in row_batches(packed, side, 1024):
            segment_ids = segment_ids[:count]
            row, first, last = segments(segment_ids)
            here = numbers[done : done + len(row)]
            done += len(row)
            rewards = np.zeros(segment_ids.shape, np.float32)
            rewards[row, last] = np.nan_to_num(here)
            # +1 where a rewarded segment begins and -1 after its end, summed: 1 inside.
            edges = np.zeros((len(segment_ids), segment_ids.shape[1] + 1), np.int8)
            known = ~np.isnan(here)
            np.add.at(edges, (row[known], first[known]), 1)
            np.add.at(edges, (row[known], last[known] + 1), -1)
            files["rewards"].write(rewards.tobytes())
            files["rewarded"].write(np.cumsum(edges, axis=1, dtype=np.int8)[:, :-1].astype(bool).tobytes())
    finally:
        for file in files.values():
            file.close()


def _path(directory: Path, number: int, side: str, name: str) -> Path:
    return directory / f"{number}-{side}-{name}.npy"


def parameters_key(named: Mapping[str, np.ndarray]) -> str:
    """A hash of named arrays, whatever their order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(named.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def check_explained(share: float, *, allowed: bool, where: str) -> None:
    """Refuses a value head that explains nothing: weights from its values would be noise.

    Args:
      share: of the held-out rewards' variance.
      allowed: go on regardless.
      where: the head's checkpoint.

    Raises:
      UserError: a share of 0 or less, unless `allowed`.
    """
    if share > 0 or allowed:
        return
    raise UserError(
        f"{where}: the value head explains nothing of the held-out rewards (explained variance {share:.4f}); train it longer "
        "(config.critic.steps), on more texts, or go on regardless with --config.critic.allow_unexplained=True"
    )
