"""TFDS data sets of coding problems, stored as array_record: built without tensorflow, read without jax."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from wmtp_jax.data.problems import Problem
from wmtp_jax.errors import UserError

_VERSION = "1.0.0"
_FILE = re.compile(r"(?P<name>\w+)-(?P<split>\w+)\.array_record-\d+-of-\d+")
_TEXT = tfds.features.Text
_FEATURES = {
    "name": _TEXT(),
    "prompt": _TEXT(),
    "solutions": tfds.features.Sequence(_TEXT()),
    "incorrect_solutions": tfds.features.Sequence(_TEXT()),
    "before": _TEXT(),
    "after": _TEXT(),
    "tests": _TEXT(),
    "names": tfds.features.Sequence(_TEXT()),
    "inputs": tfds.features.Sequence(_TEXT()),
    "outputs": tfds.features.Sequence(_TEXT()),
    "public": tfds.features.Scalar(np.int32),
}

Splits = Mapping[str, Callable[[], Iterator[Problem]]]


class _Stored:
    """What the three builders share; a problem's fields are the features."""

    VERSION = tfds.core.Version(_VERSION)

    def __init__(self, *, splits: Splits, data_dir: str | os.PathLike):
        self._splits = splits
        super().__init__(data_dir=data_dir, file_format="array_record")  # pyrefly: ignore[unexpected-keyword]  # its base is made as it is loaded

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, description=type(self).__doc__, features=tfds.features.FeaturesDict(_FEATURES)
        )

    def _split_generators(self, _: tfds.download.DownloadManager) -> dict:
        return {split: self._generate_examples(problems) for split, problems in self._splits.items()}

    def _generate_examples(self, problems: Callable[[], Iterator[Problem]]) -> Iterator[tuple[str, dict]]:
        for problem in problems():
            yield problem.name, {name: _plain(getattr(problem, name)) for name in _FEATURES}

    def _log_download_bytes(self) -> None:
        """TFDS would speak of a download; there is none."""

    def _log_download_done(self) -> None:
        """As above."""


class Mbpp(_Stored, tfds.core.GeneratorBasedBuilder):
    """Mostly Basic Python Problems (Austin et al., 2021, arXiv 2108.07732)."""


class Humaneval(_Stored, tfds.core.GeneratorBasedBuilder):
    """HumanEval (Chen et al., 2021, arXiv 2107.03374)."""


class CodeContests(_Stored, tfds.core.GeneratorBasedBuilder):
    """CodeContests (Li et al., 2022, arXiv 2203.07814), solutions in Python 3."""


BUILDERS = {"mbpp": Mbpp, "humaneval": Humaneval, "code_contests": CodeContests}


def data_directory(configured: str = "") -> Path:
    """`configured`, or where it is empty `$TFDS_DATA_DIR` or `~/tensorflow_datasets`, as TFDS has it."""
    return Path(configured or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser().absolute()


def built_directory(name: str, data_dir: Path) -> Path:
    """Where a built set lies."""
    return data_dir / name / _VERSION


def build(name: str, splits: Splits, data_dir: Path, scratch: Path) -> None:
    """Builds a set, whole or not at all.

    Args:
      name: one of `BUILDERS`.
      splits: the problems of each split.
      data_dir: as `data_directory` has it.
      scratch: a directory for what TFDS wants to put elsewhere.

    Raises:
      OSError: `data_dir` can't be written to.
    """
    tfds.disable_progress_bar()
    try:
        BUILDERS[name](splits=splits, data_dir=data_dir).download_and_prepare(download_dir=scratch)
    except RuntimeError as error:
        # array_record reports the operating system's errors in its own words around these.
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number)) from error
        raise


def built_files(spec: str) -> dict[Path, str]:
    """The files of a built set, each with the side that its documents are on ("" leaves that to their problems).

    Of a whole set, the split `train` is for training and `validation` held out; where one of them is missing, the other, or
    else `test`, is divided by a hash of the problems' names. A split that is named is divided likewise.

    Args:
      spec: NAME or NAME/SPLIT.

    Raises:
      UserError: no such set or split, or not built.
    """
    name, _, split = spec.partition("/")
    if name not in BUILDERS:
        raise UserError(f"config.data.sources: tfds:{spec}: unknown set {name!r}; known are {', '.join(BUILDERS)}")
    directory = built_directory(name, data_directory())
    if not (directory / "dataset_info.json").is_file():
        command = f"python -m wmtp_jax.data.build {name}" + ("" if name == "humaneval" else " --input=PATH")
        raise UserError(f"config.data.sources: tfds:{spec} is not built (nothing in {directory}); {command}")
    found: dict[str, list[Path]] = {}
    for path in sorted(directory.iterdir()):
        if match := _FILE.fullmatch(path.name):
            found.setdefault(match["split"], []).append(path)
    if split:
        if split not in found:
            raise UserError(
                f"config.data.sources: tfds:{spec}: it has no split {split!r}, but {', '.join(sorted(found))}"
            )
        return dict.fromkeys(found[split], "")
    if "train" in found and "validation" in found:
        return dict.fromkeys(found["train"], "train") | dict.fromkeys(found["validation"], "validation")
    for only in ("train", "validation", "test"):
        if only in found:
            return dict.fromkeys(found[only], "")
    raise UserError(f"config.data.sources: tfds:{spec}: name the split, as in tfds:{name}/{min(found)}")


def read_problems(path: Path) -> Iterator[Problem]:
    """The problems in one file of a built set.

    Raises:
      UserError: a damaged file.
    """
    try:
        features = tfds.builder_from_directory(path.parent).info.features
        records = ArrayRecordDataSource([str(path)])
        for number in range(len(records)):
            entry = features.deserialize_example_np(records[number])
            yield Problem(**{name: _python(entry[name]) for name in _FEATURES})
    except (ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: damaged ({reason}); remove its directory and build it again") from error


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _python(value: Any) -> str | int | tuple[str, ...]:
    """What numpy makes of a feature, as a problem has it."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (int, np.integer)):
        return int(value)
    return tuple(item.decode() for item in value)
