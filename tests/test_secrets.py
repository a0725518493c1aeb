"""What must stay secret: passwords in addresses and in the environment reach nothing that a run leaves behind; no pickle is
loaded from what others wrote."""

import ast
import json
import os
import pickle
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.object_store import BUCKET, client
from wmtp_jax.errors import UserError
from wmtp_jax.storage.redact import redact, redacted

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "text, shown",
    [
        ("http://me:secret@host:5000/path", "http://***@host:5000/path"),
        ("can't reach https://me@host, nor postgresql+psycopg://a:b@c/d", "can't reach https://***@host, nor postgresql+psycopg://***@c/d"),
        ("http://me:p@ss@host", "http://***@host"),  # an @ that should have been escaped
        ("mysql://host/db?user=me&password=secret&charset=utf8", "mysql://host/db?user=me&password=***&charset=utf8"),
        ("https://host/file?X-Amz-Credential=a%2Fb&X-Amz-Signature=cd&x=1", "https://host/file?X-Amz-Credential=***&X-Amz-Signature=***&x=1"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
        ("owner/name@revision", "owner/name@revision"),
        ("text:/data//x@y/*.py", "text:/data//x@y/*.py"),
        ("s3://bucket/me@host", "s3://bucket/me@host"),
    ],
)  # fmt: skip
def test_addresses_are_shown_without_passwords(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown
    assert redacted({"a": (text, 1), "b": [{"c": text}]}) == {"a": (shown, 1), "b": [{"c": shown}]}


PLANTED = "planted-7f3a9c"
# Runs a module as `python -m` does and writes down every call of its process, whichever thread makes it, that asks for an address
# or connects to one. The processes that it starts are not watched.
WATCHED = """
import runpy, sys
record, module = sys.argv[1], sys.argv[2]
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        with open(record, "a") as file:
            print(event, arguments[-1], file=file)
open(record, "w").close()
sys.addaudithook(watch)
sys.argv = [module, *sys.argv[3:]]
runpy.run_module(module, run_name="__main__")
"""


@pytest.fixture(scope="module", params=["wmtp_jax", "wmtp_torch"])
def planted_run(request, python_corpus, tmp_path_factory):
    """A run of each backend with secrets in its tracking address and environment; its directory and what it printed."""
    folder = tmp_path_factory.mktemp("planted")
    settings = {
        "data.sources": f"('text:{python_corpus}/*.py',)", "data.validation_fraction": 0.2, "data.sequence_length": 32,
        "data.vocabulary_size": 300, "data.cache_dir": folder / "cache", "model.width": 16, "model.layers": 1,
        "model.attention_heads": 2, "model.heads.count": 2, "reference.model.width": 16, "reference.model.layers": 1,
        "reference.model.attention_heads": 2, "reference.steps": 2, "train.batch_size": 4, "train.steps": 2,
        "train.log_every": 1, "eval.every": 0, "eval.batches": 1, "eval.bigram": False, "eval.completions": 0,
        # Nobody listens at port 9: what MLflow should know stays in the files, and the failure is told.
        "tracking.uri": f"http://someone:{PLANTED}-uri@127.0.0.1:9",
    }  # fmt: skip
    names = ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "MLFLOW_TRACKING_TOKEN", "VESSL_ACCESS_TOKEN")
    command = [sys.executable, "-c", WATCHED, str(folder / "network"), f"{request.param}.main"]
    command += ["--config=configs/quickstart.py", "--device=cpu", "--verbose"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    done = subprocess.run(
        [*command, f"--workdir={folder / 'run'}"],
        env=os.environ | {name: f"{PLANTED}-{name}" for name in names},
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300},
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def test_a_run_leaves_no_secret_behind(planted_run):
    folder, printed = planted_run
    assert "config.json" in {path.name for path in (folder / "run").iterdir()}
    assert "http://***@127.0.0.1:9" in printed, "the run never got as far as to tell of its tracking server"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files) and any(path.name == "tracking.jsonl" for path in files)
    found = [str(path) for path in files if PLANTED.encode() in path.read_bytes()]
    assert not found, found
    assert PLANTED not in printed


def test_training_makes_no_network_call(planted_run):
    """With a tracking server by address, down: all that goes there is another process's, at the start and at the end, too."""
    folder, _ = planted_run
    assert (folder / "network").read_text() == ""


def test_a_network_call_would_have_been_seen(tmp_path):
    (tmp_path / "calls.py").write_text("import socket\nsocket.socket().connect_ex(('127.0.0.1', 9))\n")
    command = [sys.executable, "-c", WATCHED, str(tmp_path / "network"), "calls"]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True)
    assert (tmp_path / "network").read_text() == "socket.connect ('127.0.0.1', 9)\n"


def test_a_replay_brings_no_secret_to_mlflow(planted_run):
    folder, _ = planted_run
    store = folder / "replayed.db"
    command = [sys.executable, "-m", "wmtp_jax.tracking", "replay", str(folder / "run"), "--uri", f"sqlite:///{store}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(store) as connection:
        logged = dict(connection.execute("select key, value from params where key = 'tracking.uri'"))
        stored = set(connection.execute("select key, step, value from metrics where not is_nan and key not like 'system/%'"))
    assert logged == {"tracking.uri": "http://***@127.0.0.1:9"}
    points = set()
    for path in (folder / "run" / "metrics.jsonl", folder / "run" / "reference" / "metrics.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            points |= {(key, line["step"], value) for key, value in line.items() if "/" in key and value is not None}
    assert points and points <= stored, "a metric is missing after the replay"
    assert PLANTED.encode() not in store.read_bytes()


def test_nothing_unpickles_what_others_wrote():
    """`torch.load` without `weights_only=True`, `numpy.load` that allows pickles, `pickle` and its kin: none in the packages."""
    wrong = []
    for path in [path for package in ("wmtp_jax", "wmtp_torch") for path in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                if any(re.match(r"(cPickle|dill|cloudpickle|joblib|shelve)\b", name) for name in names):
                    wrong.append(f"{where}: imports {names}")
                if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                    wrong.append(f"{where}: from pickle import")  # `pickle.NAME` is what the next check sees
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" and node.attr != "UnpicklingError":
                wrong.append(f"{where}: pickle.{node.attr}")
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            arguments = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if call.endswith("torch.load") and arguments.get("weights_only") != "True":
                wrong.append(f"{where}: torch.load without weights_only=True")
            if arguments.get("allow_pickle", "False") != "False":
                wrong.append(f"{where}: {call}(allow_pickle={arguments['allow_pickle']})")
            if call.endswith(("read_pickle", "yaml.load", "yaml.unsafe_load")):
                wrong.append(f"{where}: {call}")
    assert not wrong, "\n".join(wrong)


class Bomb:
    """An object whose pickle makes a directory when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def _write_bomb(kind, folder, mark):
    """A file of the kind with such a pickle in it, where the program would read one; what reads it."""
    import numpy as np
    import torch

    from wmtp_jax.checkpoint.parameters import read_parameters
    from wmtp_jax.data.packing import open_column
    from wmtp_jax.pretrained import open_pretrained
    from wmtp_jax.report.tokens import read_entries

    objects = np.array([Bomb(mark)], dtype=object)
    match kind:
        case "meta":
            (folder / "params.json").write_text('{"dim": 8, "n_layers": 1, "n_heads": 1, "n_future_tokens": 1}')
            torch.save({"output.weight": Bomb(mark)}, folder / "consolidated.pth")
            return lambda where: open_pretrained(str(where))
        case "transformers":
            config = {
                "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16,
                "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16, "rms_norm_eps": 1e-5,
            }  # fmt: skip
            (folder / "config.json").write_text(json.dumps(config))
            torch.save({"a": Bomb(mark)}, folder / "pytorch_model.bin")
            return lambda where: open_pretrained(str(where))
        case "checkpoint":
            (folder / "parameters").mkdir()
            (folder / "parameters" / "parameters.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
            return read_parameters
        case "rows":
            np.save(folder / "tokens.npy", objects, allow_pickle=True)
            return lambda where: open_column(where / "tokens.npy")
        case "tokens":
            np.savez(folder / "3.npz", tokens=objects)
            return lambda where: read_entries(where / "3.npz")


REFUSED = {
    "meta": "holds more than tensors",
    "transformers": r"pytorch_model\.bin",
    "checkpoint": "safetensors",
    "rows": "Python objects",
    "tokens": "allow_pickle=False",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_pickle_in_data_or_weights_is_refused_and_never_run(kind, tmp_path):
    (tmp_path / "given").mkdir()
    read = _write_bomb(kind, tmp_path / "given", tmp_path / "it ran")
    with pytest.raises(ValueError if kind == "rows" else UserError, match=REFUSED[kind]):
        read(tmp_path / "given")
    assert not (tmp_path / "it ran").exists()


def test_the_pickle_of_that_test_would_run(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "it ran")))
    assert (tmp_path / "it ran").exists()


@pytest.mark.parametrize("kind", ("meta", "checkpoint"))
def test_nor_is_one_in_object_storage(kind, s3, object_store, tmp_path):
    (tmp_path / "given").mkdir()
    read = _write_bomb(kind, tmp_path / "given", tmp_path / "it ran")
    for path in (path for path in (tmp_path / "given").rglob("*") if path.is_file()):
        key = f"{s3.removeprefix(f's3://{BUCKET}/')}/{path.relative_to(tmp_path / 'given')}"
        client(object_store.port).upload_file(str(path), BUCKET, key)
    with pytest.raises(UserError, match=REFUSED[kind]):
        read(s3)
    assert not (tmp_path / "it ran").exists()
