"""A finished model in MLflow's registry: a version with the parameters, the configuration, the tokenizer, what it was made of.

The artifact `model/` of the run is a checkpoint that both backends read (`parameters/`), with `config.json`, `tokenizer/` and
`summary.json` beside it: downloaded, it is a reference, a trunk or a start (`--config.reference.path=DIRECTORY`). Tags of the
version hold the algorithm, the hash of the data, the tokenizer's fingerprint, the step and the last evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "model"
STEP_TAG = "wmtp.step"


def model_files(run: Path, checkpoint: Path, parameters: Path) -> list[tuple[str, str]]:
    """(path, folder of the artifacts) of every file of a finished model.

    Args:
        run: the run directory.
        checkpoint: the one to register.
        parameters: where in a checkpoint its parameters are.
    """
    files = [(checkpoint / parameters, f"{FOLDER}/{parameters.parent}")]
    files += [(run / name, FOLDER) for name in ("config.json", "summary.json")]
    files += [(run / "tokenizer", f"{FOLDER}/tokenizer")]
    return [(str(path), folder) for path, folder in files if path.exists()]


def model_tags(*, algorithm: str, data: str, tokenizer: str, step: int, metrics: Mapping[str, Any]) -> dict[str, str]:
    """The tags of a version: `wmtp.algorithm`, `wmtp.data`, `wmtp.tokenizer`, `wmtp.step`, and the evaluation's metrics."""
    tags = {"algorithm": algorithm, "data": data, "tokenizer": tokenizer, "step": str(step)}
    evaluated = {name: repr(value) for name, value in metrics.items() if name.startswith("eval/")}
    return {f"wmtp.{name}": value for name, value in tags.items()} | evaluated


def register(client: Any, run_id: str, name: str, tags: Mapping[str, str]) -> None:
    """Makes a version of the registered model `name`, which is made if it is missing. One of this run and step is left alone.

    Args:
        client: an `MlflowClient`.
        run_id: the MLflow run, whose artifacts hold the model.
        name: of the registered model.
        tags: see `model_tags`.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    if any(version.name == name and version.tags.get(STEP_TAG) == tags[STEP_TAG] for version in versions):
        return
    source = f"{client.get_run(run_id).info.artifact_uri}/{FOLDER}"
    client.create_model_version(name, source, run_id=run_id, tags=dict(tags), await_creation_for=0)
