"""Checkpoints that count only when they are whole, here and in object storage: manifests, falling back, copies, faults."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tests.object_store import READER
from wmtp_jax.checkpoint import mirror
from wmtp_jax.checkpoint.manifest import MANIFEST, problem, seal, settle
from wmtp_jax.checkpoint.mirror import Mirror, claim, mirrored, pull, push, reconcile
from wmtp_jax.errors import UserError
from wmtp_jax.mirror import main as mirror_command
from wmtp_jax.run.compatible import explained_variance
from wmtp_jax.storage import s3 as storage
from wmtp_torch.step_directories import StepDirectories

PARAMETERS, MOMENTS = Path("parameters", "parameters.safetensors"), Path("training", "training.safetensors")
METRIC = "eval/ce_mean"


def write(checkpoints: Path, scores: dict[int, float], *, keep_last: int = 2, copy: Mirror | None = None) -> None:
    """Checkpoints of these steps with these values of the metric, as a run writes them."""
    directories = StepDirectories(checkpoints, keep_last=keep_last, best_metric=METRIC, mirror=copy)
    for step, score in scores.items():
        named = {"a": np.full((40, 30), step, np.float32), "b": np.arange(500, dtype=np.float32)}
        directories.write(step, {PARAMETERS: (named, {"step": step}), MOMENTS: (named, {})}, {METRIC: score})
        directories.wait()
    directories.close()


def content(checkpoint: Path) -> dict[str, bytes]:
    return {p.relative_to(checkpoint).as_posix(): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}


def there(address: str) -> list[int]:
    """Steps that count in object storage."""
    names = [stored.name for stored in storage.listing(address)]
    return sorted(int(name.split("/")[-2]) for name in names if name.endswith(MANIFEST))


def damage(checkpoint: Path, kind: int, generator: random.Random) -> None:
    """One of ten kinds of damage."""
    file = checkpoint / generator.choice([str(PARAMETERS), str(MOMENTS), "metrics.json"])
    marker, data = checkpoint / MANIFEST, file.read_bytes()
    match kind % 10:
        case 0:
            file.write_bytes(data[: generator.randrange(len(data))])
        case 1 | 2:
            at = generator.randrange(len(data))
            file.write_bytes(data[:at] + bytes([data[at] ^ 1 << generator.randrange(8)]) + data[at + 1 :])
        case 3:
            file.unlink()
        case 4:
            shutil.rmtree(file.parent if file.parent != checkpoint else checkpoint / "training")
        case 5:
            marker.unlink()
        case 6:
            marker.write_bytes(marker.read_bytes()[: generator.randrange(len(marker.read_bytes()))])
        case 7:  # of another step
            seal(checkpoint, 7)
        case 8:
            raw = marker.read_bytes()
            at = raw.index(b"crc32", raw.index(b"files")) + 14
            marker.write_bytes(raw[:at] + (b"0" if raw[at : at + 1] != b"0" else b"1") + raw[at + 1 :])
        case 9:
            file.write_bytes(data[1:] + data[:1])


@pytest.mark.parametrize("place", ("local", "remote"))
def test_of_25_damaged_ones_none_is_accepted(place, request, tmp_path, capfd):
    """The one before is gone on with, and what is wrong is said."""
    generator, accepted = random.Random(0), []
    write(tmp_path / "whole" / "checkpoints", {10: 2.0, 20: 1.0})
    for number in range(25):
        run = tmp_path / f"run_{number}"
        shutil.copytree(tmp_path / "whole", run)
        damage(run / "checkpoints" / "20", number, generator)
        if place == "local":
            newest = settle(run / "checkpoints")
        else:
            address = f"{request.getfixturevalue('s3')}/{number}"
            files = {p.relative_to(run).as_posix(): p for p in run.rglob("*") if p.is_file()}
            storage.upload(address, files)
            fresh = tmp_path / f"fresh_{number}"
            pull(address, fresh)
            newest, run = settle(fresh / "checkpoints"), fresh
        if newest != 10:
            accepted.append(number)
        assert content(run / "checkpoints" / "10") == content(tmp_path / "whole" / "checkpoints" / "10")
        said = capfd.readouterr().err
        assert "20 is left out: " in said or (place == "remote" and number % 10 == 5)  # without a marker it is none there
    assert accepted == []


def test_where_all_are_damaged_nothing_starts_anew_in_silence(tmp_path):
    write(tmp_path / "checkpoints", {10: 2.0, 20: 1.0})
    for step in (10, 20):
        (tmp_path / "checkpoints" / str(step) / PARAMETERS).write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint is whole .*--resume=never"):
        settle(tmp_path / "checkpoints")
    assert (tmp_path / "checkpoints" / "20").is_dir()


def test_a_first_save_that_was_cut_off_is_none(tmp_path):
    (tmp_path / "checkpoints" / "10" / "parameters").mkdir(parents=True)
    assert settle(tmp_path / "checkpoints") is None


def test_a_run_is_copied_and_comes_back(s3, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "report").mkdir()
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    with mirrored(run, s3, is_stop=lambda _: False) as copy:
        write(run / "reference" / "checkpoints", {5: 1.0}, copy=copy)
        write(run / "checkpoints", {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5}, copy=copy)
        (run / "report" / "index.html").write_text("done")
    assert there(f"{s3}/checkpoints") == [20, 30, 40]  # the last two and the best
    assert there(f"{s3}/reference/checkpoints") == [5]
    assert not any(path.name.count("@") for path in (run / mirror.QUEUE).iterdir())
    fresh = tmp_path / "elsewhere"
    pull(s3, fresh)
    for step in ("checkpoints/40", "checkpoints/20", "reference/checkpoints/5"):
        assert content(fresh / step) == content(run / step)
    assert (fresh / "report" / "index.html").read_text() == "done" and (fresh / "metrics.jsonl").exists()
    assert not (fresh / "checkpoints" / "30").exists()
    # A single checkpoint comes with what belongs to its run, and without the others.
    single = storage.local(f"{s3}/checkpoints/30")
    assert content(single) and (single.parent.parent / "tokenizer" / "tokenizer.json").exists()
    assert [path.name for path in single.parent.iterdir()] == ["30"]
    # What is here and newer is left alone.
    write(fresh / "checkpoints", {50: 2.0}, keep_last=3)
    (fresh / "metrics.jsonl").write_text("newer\n")
    pull(s3, fresh)
    assert settle(fresh / "checkpoints") == 50 and (fresh / "metrics.jsonl").read_text() == "newer\n"
    push(fresh, s3)
    assert 50 in there(f"{s3}/checkpoints")
    assert storage.local(f"{s3}").joinpath("checkpoints/50").is_dir()


def test_who_may_not_remove_uploads_all_the_same(s3, tmp_path, monkeypatch, capfd):
    """A role without the right to delete, or to list parts: every checkpoint arrives once, and what stays there is said once."""

    def refuse(*_):
        raise UserError("access denied")

    uploaded, upload = [], storage.upload
    monkeypatch.setattr(storage, "remove", refuse)
    monkeypatch.setattr(storage, "abort_uploads", refuse)
    monkeypatch.setattr(storage, "upload", lambda path, *rest, **options: (uploaded.append(path), upload(path, *rest, **options)))
    write(tmp_path / "checkpoints", {10: 1.0, 20: 2.0, 30: 3.0, 40: 4.0}, keep_last=9)
    copier = mirror._Copier(tmp_path, s3, stopped=lambda: False)
    copier.abort_uploads()
    for step in (10, 20, 30, 40):
        seal(tmp_path / "checkpoints" / str(step), step, metrics={METRIC: step}, keep_last=1, best_metric=METRIC)
        copier.checkpoint(tmp_path / "checkpoints" / str(step), "", step)
    assert there(f"{s3}/checkpoints") == [10, 20, 30, 40] and len(set(uploaded)) == len(uploaded) == 4
    said = capfd.readouterr().err
    assert said.count("old checkpoints are not removed there: access denied") == 1 == said.count("cut off are not removed")


def test_an_upload_without_its_marker_does_not_count(s3, tmp_path):
    write(tmp_path / "run" / "checkpoints", {10: 1.0, 20: 2.0})
    push(tmp_path / "run", s3)
    storage.remove(f"{s3}/checkpoints/20", [MANIFEST])
    pull(s3, tmp_path / "fresh")
    assert settle(tmp_path / "fresh" / "checkpoints") == 10


def test_a_directory_is_the_copy_of_one_run(tmp_path):
    claim(tmp_path, "s3://b/one")
    claim(tmp_path, "s3://b/one")
    with pytest.raises(UserError, match="local directory of s3://b/one"):
        claim(tmp_path, "s3://b/two")


def test_a_value_head_there_is_the_best_one_of_its_run(s3, tmp_path):
    """Of a run the newest checkpoint alone is fetched; the best one is fetched for itself."""
    write(tmp_path / "value" / "checkpoints", {10: 1.0, 20: 2.0})
    facts = {"best_step": 10, "explained_variance": {"10": 0.5, "20": 0.25}}
    (tmp_path / "value" / "summary.json").write_text(json.dumps(facts))
    push(tmp_path / "value", f"{s3}/value")
    where, share = explained_variance(f"{s3}/value")
    assert (where.name, share) == ("10", 0.5) and content(where) == content(tmp_path / "value" / "checkpoints" / "10")
    where, share = explained_variance(f"{s3}/value/checkpoints/20")
    assert (where.name, share) == ("20", 0.25) and problem(where) == ""


def test_who_may_not_write_there_is_told_before_training(s3, tmp_path, monkeypatch):
    reconcile(tmp_path, s3, anew=False)
    claim(tmp_path, s3)
    assert storage.get(f"{s3}/mirror.json") == (tmp_path / "mirror.json").read_bytes()
    for name, value in READER.items():
        monkeypatch.setenv(name, value)
    storage.client.cache_clear()
    assert storage.listing(s3)
    with pytest.raises(UserError, match="mirror.json: access denied"):
        reconcile(tmp_path, s3, anew=False)


def test_a_queue_of_two_is_waited_for(s3, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    copy = Mirror(run, s3)
    write(run / "checkpoints", {10: 1.0}, copy=copy)
    assert copy.finish(60) == ""
    # A child that takes nothing, in the place of a slow server.
    for step in (20, 30):
        write(run / "checkpoints", {step: 1.0}, copy=None)
        copy.hand_over(run / "checkpoints" / str(step))
    monkeypatch.setattr(copy._process, "returncode", None)
    monkeypatch.setattr(type(copy._process), "poll", lambda self: None)
    waited = []

    def slept(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            shutil.rmtree(mirror._queued(run / mirror.QUEUE)[0])

    monkeypatch.setattr(time, "sleep", slept)
    copy.wait_for_room()
    assert len(waited) == 3


def test_the_command_checks_a_run(tmp_path, capsys):
    write(tmp_path / "checkpoints", {10: 1.0, 20: 1.0})
    assert mirror_command(["check", str(tmp_path)]) == 0
    (tmp_path / "checkpoints" / "20" / MOMENTS).write_bytes(b"x")
    assert mirror_command(["check", str(tmp_path)]) == 2
    assert f"{MOMENTS} has 1 bytes" in capsys.readouterr().out
    assert problem(tmp_path / "checkpoints" / "10") == ""
