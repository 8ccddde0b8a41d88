from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.checkpoint.tiny_run import TinyModel, TinyRun, all_tensors, assert_equal, resume, save_steps
from tests.ranks import run_ranks
from titanmoe.checkpoint import dcp_storage, files
from titanmoe.checkpoint.checkpointer import Checkpointer
from titanmoe.config.errors import ConfigError

ALL_FILES = {"__0_0.distcp", ".metadata", "tensors.json", "state.json", "manifest.json"}


def steps_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_folder_and_manifest(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, mesh={"dp_shard": 1}, config_hash="abc")
    assert steps_in(tmp_path) == ["step-2"]
    assert set(os.listdir(tmp_path / "step-2")) == ALL_FILES
    manifest = json.loads((tmp_path / "step-2" / "manifest.json").read_text())
    assert manifest["step"] == 2
    assert manifest["world_size"] == 1
    assert manifest["mesh"] == {"dp_shard": 1}
    assert manifest["config_hash"] == "abc"
    assert manifest["model_only"] is False
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["files"].keys() == ALL_FILES - {"manifest.json"}
    for name, record in manifest["files"].items():
        assert record["size"] == (tmp_path / "step-2" / name).stat().st_size
        assert record["sha256"] == files.sha256_of_file(tmp_path / "step-2" / name)


def test_torch_reads_the_folder_too(tmp_path: Path) -> None:
    run = save_steps(tmp_path, 1)
    weight = torch.empty_like(run.model.experts)
    torch.distributed.checkpoint.load({"model.experts": weight}, checkpoint_id=tmp_path / "step-1", no_dist=True)
    assert torch.equal(weight, run.model.experts)


def test_round_trip_of_everything(tmp_path: Path) -> None:
    saved = save_steps(tmp_path, 3)
    step, loaded = resume(tmp_path)
    assert step == 3
    assert_equal(all_tensors(loaded), all_tensors(saved))
    assert loaded.counters.values == saved.counters.values
    assert loaded.schedule.values == {"last_lr": 0.1 + 0.2}
    assert loaded.data.values == {"lanes": {"0": 3}}


def test_nothing_there(tmp_path: Path) -> None:
    before = all_tensors(TinyRun(seed=99))
    for folder in (tmp_path, tmp_path / "missing"):
        step, run = resume(folder)
        assert step is None
        assert_equal(all_tensors(run), before)
    with pytest.raises(ConfigError, match="is a file"):
        (tmp_path / "file").write_text("x")
        Checkpointer(tmp_path / "file")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def shard(path: Path) -> Path:
    return path / "__0_0.distcp"


def other_step(path: Path) -> None:
    shutil.copy(path.parent / "step-2" / "manifest.json", path / "manifest.json")


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def as_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a folder")


DAMAGES = {
    "bit in a shard": (lambda path: flip_bit(shard(path)), "checksum of __0_0.distcp differs"),
    "bit in state.json": (lambda path: flip_bit(path / "state.json"), "checksum of state.json differs"),
    "bit in tensors.json": (lambda path: flip_bit(path / "tensors.json"), "checksum of tensors.json differs"),
    "truncated shard": (lambda path: os.truncate(shard(path), 100), "__0_0.distcp has 100 bytes"),
    "deleted shard": (lambda path: shard(path).unlink(), "__0_0.distcp is missing"),
    "deleted manifest": (lambda path: (path / "manifest.json").unlink(), "its save was interrupted"),
    "garbled manifest": (lambda path: (path / "manifest.json").write_text('{"step": 3'), "garbled"),
    "bit in the manifest": (lambda path: flip_bit(path / "manifest.json"), "checksum"),
    "manifest of another step": (other_step, "belongs to step 2"),
    "empty folder": (empty, "the folder is empty"),
    "a file": (as_file, "not a folder"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_step_is_skipped_with_its_reason(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    damage, reason = DAMAGES[name]
    saved = save_steps(tmp_path, 2)
    expected = all_tensors(saved)
    checkpointer = Checkpointer(tmp_path)
    saved.train(1)
    checkpointer.save(3, saved.state())
    damage(tmp_path / "step-3")
    with caplog.at_level(logging.INFO, "titanmoe"):
        step, loaded = resume(tmp_path)
    assert step == 2
    assert_equal(all_tensors(loaded), expected)
    messages = [record.getMessage() for record in caplog.records if record.name == "titanmoe"]
    skipped = [message for message in messages if message.startswith("skipped")]
    assert len(skipped) == 1
    assert "step-3" in skipped[0]
    assert reason in skipped[0]
    with pytest.raises(ConfigError, match="step 3 cannot be loaded") as error:
        resume(tmp_path, step=3)
    assert reason in str(error.value)
    assert "valid steps there: " in str(error.value)


def test_strangers_are_neither_read_nor_touched(tmp_path: Path) -> None:
    strangers = ["step-abc", "step-007", "step-5.bak", "notes", "step-", "step--1"]
    for name in strangers:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text("{}")
    save_steps(tmp_path, 1, 2, 3, keep_latest_k=2)
    assert resume(tmp_path)[0] == 3
    assert steps_in(tmp_path) == sorted([*strangers, "step-2", "step-3"])
    assert all((tmp_path / name / "manifest.json").exists() for name in strangers)


def test_step_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(tmp_path, 1, 2)
    with caplog.at_level(logging.WARNING, "titanmoe"):
        step, loaded = resume(tmp_path, step=1)
    assert step == loaded.counters.values["step"] == 1
    assert "newer ones exist (2)" in caplog.text
    with pytest.raises(ConfigError, match="no such folder"):
        resume(tmp_path, step=9)


def test_parts_left_out(tmp_path: Path) -> None:
    saved = save_steps(tmp_path, 3)
    fresh = all_tensors(TinyRun(seed=99))
    step, run = resume(tmp_path, exclude=["optimizer", "dataloader", "train_state", "lr_scheduler"])
    assert step == 3
    assert not run.optimizer.state
    assert run.counters.values["step"] == 0
    assert run.data.values == {"lanes": {}}
    assert torch.equal(run.model.experts, saved.model.experts)
    _, run = resume(tmp_path, exclude=["model"])
    assert torch.equal(run.model.experts, fresh["experts"])
    assert torch.equal(all_tensors(run)["experts.exp_avg"], all_tensors(saved)["experts.exp_avg"])
    with pytest.raises(ConfigError, match="unknown part optimiser"):
        resume(tmp_path, exclude=["optimiser"])


def test_another_model_is_refused_before_anything_changes(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)

    def wider() -> TinyModel:
        model = TinyModel(hidden=12)
        model.extra = torch.nn.Parameter(torch.zeros(2))
        del model.layers["0"]
        return model

    run = TinyRun(make_model=wider)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    with pytest.raises(ConfigError) as error:
        resume(tmp_path, run)
    message = str(error.value)
    assert "model.experts (3, 6, 10) in the checkpoint, (3, 6, 12)" in message
    assert "only in the model: model.extra (2,)" in message
    assert "only in the checkpoint: model.layers.0.bias (6,)" in message
    assert_equal(dict(run.model.state_dict()), before)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)
    run = TinyRun(lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, amsgrad=True))
    with pytest.raises(ConfigError, match=r"only in the model: optimizer\.embed\.weight\.max_exp_avg_sq"):
        resume(tmp_path, run)


def test_changed_type_is_loaded_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = save_steps(tmp_path, 2)
    run = TinyRun(make_model=lambda: TinyModel().bfloat16())
    with caplog.at_level(logging.INFO, "titanmoe"):
        resume(tmp_path, run)
    assert torch.equal(run.model.experts, saved.model.experts.bfloat16())
    assert "is torch.float32 in the checkpoint and torch.bfloat16 in the model" in caplog.text


def test_model_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = save_steps(tmp_path, 2, 4, model_only=(4,))
    with caplog.at_level(logging.INFO, "titanmoe"):
        assert resume(tmp_path)[0] == 2
    assert "skipped checkpoint step-4: it has the model only" in caplog.text
    with pytest.raises(ConfigError, match="model only"):
        resume(tmp_path, step=4)
    for path in (tmp_path, tmp_path / "step-4"):
        model = TinyModel()
        checkpointer = Checkpointer(tmp_path / "elsewhere")
        assert checkpointer.load_model(path, model) == 4
        assert_equal(dict(model.state_dict()), dict(saved.model.state_dict()))
    flip_bit(shard(tmp_path / "step-4"))
    assert checkpointer.load_model(tmp_path, model) == 2
    with pytest.raises(ConfigError, match="no valid checkpoint there"):
        checkpointer.load_model(tmp_path / "step-4", model)
    with pytest.raises(ConfigError, match="no checkpoint there"):
        checkpointer.load_model(tmp_path / "nowhere", model)


def test_a_malicious_pickle_is_not_executed(tmp_path: Path) -> None:
    saved = save_steps(tmp_path, 2)
    step = tmp_path / "step-2"

    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return os.mkdir, (str(tmp_path / "executed"),)

    (step / ".metadata").write_bytes(pickle.dumps(Evil()))
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"][".metadata"] = {
        "size": (step / ".metadata").stat().st_size,
        "sha256": files.sha256_of_file(step / ".metadata"),
    }
    del manifest["sha256"]
    checksum = files.hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (step / "manifest.json").write_text(json.dumps({**manifest, "sha256": checksum}))
    loaded_step, loaded = resume(tmp_path)
    assert loaded_step == 2
    assert_equal(all_tensors(loaded), all_tensors(saved))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4, 5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_keep_latest_k(tmp_path: Path, keep: int, left: list[int]) -> None:
    save_steps(tmp_path, 1, 2, 3, 4, 5, keep_latest_k=keep)
    assert steps_in(tmp_path) == [f"step-{step}" for step in left]


def test_purge_keeps_a_step_to_resume_from_and_what_is_not_ours(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 4, model_only=(3, 4), keep_latest_k=2)
    assert steps_in(tmp_path) == ["step-2", "step-3", "step-4"]
    (tmp_path / "step-2" / "notes.txt").write_text("mine")
    flip_bit(tmp_path / "step-3" / "manifest.json")  # not valid any more: left for its owner
    (tmp_path / "step-1.writing").mkdir()
    (tmp_path / "step-9.writing").mkdir()
    run = TinyRun()
    checkpointer = Checkpointer(tmp_path, keep_latest_k=2)
    for step in (5, 6):
        run.train(1)
        checkpointer.save(step, run.state())
    assert steps_in(tmp_path) == ["step-2.deleting", "step-3", "step-5", "step-6", "step-9.writing"]
    assert os.listdir(tmp_path / "step-2.deleting") == ["notes.txt"]


def test_a_step_is_replaced_only_by_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save_steps(tmp_path, 2)
    second = TinyRun(seed=5)
    second.train(2)
    checkpointer = Checkpointer(tmp_path)

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="earlier ones are untouched: No space"):
        patch.setattr("titanmoe.checkpoint.checkpointer.write_manifest", full_disk)
        checkpointer.save(2, second.state())
    assert steps_in(tmp_path) == ["step-2"]
    assert_equal(all_tensors(resume(tmp_path)[1]), all_tensors(first))
    checkpointer.save(2, second.state())
    assert steps_in(tmp_path) == ["step-2"]
    assert_equal(all_tensors(resume(tmp_path)[1]), all_tensors(second))
    written = (tmp_path / "step-2" / "manifest.json").stat().st_mtime_ns
    checkpointer.save(2, second.state())  # this run saved it already
    checkpointer.save(2, second.state(), model_only=True)
    resumed = Checkpointer(tmp_path)
    resumed.load(second.state())
    resumed.save(2, second.state(), model_only=True)  # nothing less than what was loaded takes its place
    assert (tmp_path / "step-2" / "manifest.json").stat().st_mtime_ns == written


def test_an_invalid_folder_of_the_same_step_makes_room(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)
    (tmp_path / "step-2" / "manifest.json").unlink()
    (tmp_path / "step-2.writing").mkdir()
    (tmp_path / "step-2.writing" / "__7_0.distcp").write_bytes(b"left by a larger run")
    saved = save_steps(tmp_path, 2)
    assert steps_in(tmp_path) == ["step-2"]
    assert set(os.listdir(tmp_path / "step-2")) == ALL_FILES
    assert_equal(all_tensors(resume(tmp_path)[1]), all_tensors(saved))


@pytest.mark.parametrize("existing", [False, True])
def test_a_crash_at_any_rename_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
    """The n-th rename fails, as if the machine had died there; a valid step 2 is there every time."""
    renames = 0
    real = Path.rename

    def crashing(path: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == deadly:
            raise RuntimeError("power cut")
        return real(path, target)

    for deadly in range(1, 5):
        folder = tmp_path / str(deadly)
        old = save_steps(folder, 2) if existing else save_steps(folder, 1)
        new = TinyRun(seed=5)
        new.train(2)
        checkpointer = Checkpointer(folder)
        monkeypatch.setattr("titanmoe.checkpoint.checkpointer._clear_failed", lambda *_: None)
        renames = 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", crashing)
            try:
                checkpointer.save(2, new.state())
                completed = True
            except RuntimeError:
                completed = False
        step, loaded = resume(folder)
        found = all_tensors(loaded)["experts"]
        assert step == 2 or (step == 1 and not existing and not completed)
        assert torch.equal(found, all_tensors(new)["experts"]) or torch.equal(found, all_tensors(old)["experts"])
        if completed:
            assert torch.equal(found, all_tensors(new)["experts"])
            assert steps_in(folder) == (["step-2"] if existing else ["step-1", "step-2"])


def test_an_error_of_the_disk_keeps_its_number(tmp_path: Path) -> None:
    """A file size limit makes the kernel refuse bytes in the middle of a shard."""
    save_steps(tmp_path, 1)
    run = TinyRun(make_model=lambda: TinyModel(hidden=4000))
    checkpointer = Checkpointer(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(OSError, match="step 2 was not saved") as error:
            checkpointer.save(2, run.state())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG
    assert steps_in(tmp_path) == ["step-1"], "the failed save gives its space back"
    checkpointer.save(2, run.state())
    assert steps_in(tmp_path) == ["step-1", "step-2"]


def test_passing_errors_do_not_stop_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    failures = [errno.EIO, errno.ESTALE]
    real = dcp_storage._RecordingFiles.create_stream

    def flaky(self: object, path: object, mode: str) -> object:
        if failures:
            raise OSError(failures.pop(0), "hiccup")
        return real(self, path, mode)  # type: ignore[arg-type]

    monkeypatch.setattr(dcp_storage._RecordingFiles, "create_stream", flaky)
    saved = save_steps(tmp_path, 2)
    assert not failures
    assert_equal(all_tensors(resume(tmp_path)[1]), all_tensors(saved))


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_async_saves_a_snapshot(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = TinyRun()
    run.train(2)
    expected = all_tensors(run)
    real = dcp_storage.save_shards

    def slow(*arguments: object) -> object:
        time.sleep(0.3)  # training goes on meanwhile
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("titanmoe.checkpoint.checkpointer.save_shards", slow)
    checkpointer = Checkpointer(tmp_path, async_mode=mode)
    started = time.monotonic()
    checkpointer.save(2, run.state())
    assert time.monotonic() - started < 0.25
    run.train(1)
    with torch.no_grad():
        for tensor in [*run.model.parameters(), *run.model.buffers()]:
            tensor.fill_(7.0)
    run.data.values["lanes"]["0"] = 1000
    assert "step-2" not in steps_in(tmp_path)
    checkpointer.close()
    step, loaded = resume(tmp_path)
    assert step == 2
    assert_equal(all_tensors(loaded), expected)
    assert loaded.data.values == {"lanes": {"0": 2}}


@pytest.mark.parametrize("end", ["save", "close"])
def test_async_errors_reach_the_main_thread(tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = TinyRun()
    checkpointer = Checkpointer(tmp_path, async_mode="async")
    checkpointer.save(1, run.state())
    checkpointer.wait()

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("titanmoe.checkpoint.checkpointer.save_shards", full_disk)
        checkpointer.save(2, run.state())
        with pytest.raises(OSError, match="step 2 was not saved") as error:
            checkpointer.save(3, run.state()) if end == "save" else checkpointer.close()
    assert error.value.errno == errno.ENOSPC
    assert steps_in(tmp_path) == ["step-1"]


def test_state_that_json_would_change_is_refused(tmp_path: Path) -> None:
    run = TinyRun()
    run.counters.values["window"] = (1, 2)
    with pytest.raises(TypeError, match=r"state\.train_state\.window is a tuple"):
        Checkpointer(tmp_path).save(1, run.state())
    run.counters.values["window"] = {1: 2}
    with pytest.raises(TypeError, match="the key 1"):
        Checkpointer(tmp_path).save(1, run.state())
    assert steps_in(tmp_path) == []


def test_missing_part_of_state(tmp_path: Path) -> None:
    run = TinyRun()
    state = run.state()
    object.__setattr__(state, "lr_scheduler", None)
    Checkpointer(tmp_path).save(1, state)
    with pytest.raises(ConfigError, match="no lr_scheduler"):
        resume(tmp_path)
    assert resume(tmp_path, exclude=["lr_scheduler"])[0] == 1


def saving_fails_on_one_rank(folder: str) -> list[str]:
    rank = torch.distributed.get_rank()
    run = TinyRun(shard=True)
    checkpointer = Checkpointer(folder)
    checkpointer.save(1, run.state())
    if rank == 1:

        def refuse(*_: object) -> None:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        dcp_storage._RecordingFiles.create_stream = refuse  # type: ignore[method-assign]
    try:
        checkpointer.save(2, run.state())
    except OSError as error:
        text = f"{error.errno}: {error}"
    run.data.state_dict = None if rank == 0 else run.data.state_dict  # type: ignore[method-assign]
    try:
        checkpointer.save(3, run.state())
    except Exception as error:
        checkpointer.close()
        return [text, f"{type(error).__name__}: {error}"]
    return []


def test_a_failure_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(saving_fails_on_one_rank, 2, str(tmp_path))
    assert first[0] == second[0]
    assert first[0].startswith(f"{errno.EDQUOT}: ")
    assert "on rank 1" in first[0]
    assert first[1].startswith("TypeError")
    assert "rank 0 failed: TypeError" in second[1]
    assert steps_in(tmp_path) == ["step-1"]


def save_forever(folder: Path, mode: str) -> None:
    torch.set_num_threads(1)
    run = TinyRun()
    checkpointer = Checkpointer(folder, keep_latest_k=2, async_mode=mode)
    checkpointer.load(run.state())
    while True:
        run.train(1)
        checkpointer.save(run.counters.values["step"], run.state())


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_kill_at_random_moments(tmp_path: Path, mode: str) -> None:
    """Killed while it saves step after step, a run finds a valid one each time, and its numbers are the right ones."""
    chance = random.Random(0)
    reached = 0
    for _ in range(8):
        process = multiprocessing.get_context("fork").Process(target=save_forever, args=(tmp_path, mode))
        process.start()
        deadline = time.monotonic() + 30
        while not (tmp_path / f"step-{reached + 1}").exists():
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.random() * 0.1)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        step, loaded = resume(tmp_path)
        assert step is not None
        assert step > reached
        uninterrupted = TinyRun()
        uninterrupted.train(step)
        assert_equal(all_tensors(loaded), all_tensors(uninterrupted))
        reached = step
    published = [name for name in steps_in(tmp_path) if name.replace("-", "").isalnum()]
    assert len(published) <= 3, "a crash before the purge leaves one step too many, which the next purge removes"
