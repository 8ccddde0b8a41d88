"""What a user gets wrong: exit code 2, one message, no traceback, and nothing half written."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.train.jobs import (
    CHECKOUT,
    TINY,
    Outcome,
    assert_one_line,
    assert_same_tensors,
    curve,
    launch,
    run,
    saved_steps,
    steps,
    train,
    wait_until,
    write_job,
)

Prepare = Callable[[Path], tuple[object, ...]]


def plain(*args: str) -> Prepare:
    return lambda folder: tuple(arg.format(folder=folder) for arg in args)


def toml(text: str) -> Prepare:
    def prepare(folder: Path) -> tuple[object, ...]:
        (folder / "job.toml").write_text(text)
        return ()

    return prepare


def data(name: str, content: bytes, *args: str) -> Prepare:
    def prepare(folder: Path) -> tuple[object, ...]:
        (folder / "broken").mkdir()
        (folder / "broken" / name).write_bytes(content)
        return (*args, f"--training.dataset_path={folder}/broken")

    return prepare


def hf_weights(damage: Callable[[Path], None]) -> Prepare:
    """A folder with config.json and one safetensors file, then damaged."""

    def prepare(folder: Path) -> tuple[object, ...]:
        from titanmoe.checkpoint.pretrained import save_pretrained, spec_of_hf_folder
        from titanmoe.models.build import build_model, init_weights

        model = build_model(spec_of_hf_folder(folder / "model")[1], device="cpu")
        init_weights(model, seed=1)
        save_pretrained(model, folder / "hf")
        damage(folder / "hf")
        return (
            "--checkpoint.enable",
            "--checkpoint.initial_load_in_hf",
            f"--checkpoint.initial_load_path={folder}/hf",
        )

    return prepare


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file

    found = load_file(folder / "model.safetensors")
    del found["model.norm.weight"]
    found["model.surplus.weight"] = torch.zeros(3)
    save_file(found, folder / "model.safetensors")


def dump_folder_is_a_file(folder: Path) -> tuple[object, ...]:
    (folder / "dump").write_text("mine")
    return ()


def without_config_json(folder: Path) -> tuple[object, ...]:
    (folder / "model" / "config.json").unlink()
    return ()


def small_vocabulary(folder: Path) -> tuple[object, ...]:
    (folder / "model" / "config.json").write_text(json.dumps({**TINY, "vocab_size": 1000}))
    return ()


MISTAKES: dict[str, tuple[Prepare, str]] = {
    "bad TOML": (toml("[training\nsteps = 3"), "job.toml"),
    "unknown key": (plain("--training.stepz=3"), "training.steps"),
    "unknown family": (plain("--model.name=qwen9"), "qwen9"),
    "unknown flavor": (plain("--model.name=qwen3", "--model.flavor=31B"), "debug_moe"),
    "missing data": (plain("--training.dataset_path={folder}/none"), "{folder}/none"),
    "missing validation data": (
        plain("--validation.enable", "--validation.dataset=text", "--validation.dataset_path={folder}/none"),
        "{folder}/none",
    ),
    "corrupt JSONL": (data("a.jsonl", b'{"text": "one"}\n{"text": "tw\n', "--training.dataset=json"), "a.jsonl"),
    "too little data": (data("a.txt", b"x", "--training.epochs=1", "--data.no_append_eos"), "training.epochs"),
    "truncated safetensors": (hf_weights(truncate), "model.safetensors"),
    "corrupt safetensors": (hf_weights(garble), "model.safetensors"),
    "other tensors": (hf_weights(drop_a_tensor), "model.surplus.weight"),
    "missing config.json": (without_config_json, "config.json"),
    "vocabulary too small": (small_vocabulary, "2,048"),
    "dump folder is a file": (dump_folder_is_a_file, "job.dump_folder"),
    "dump folder cannot be made": (plain("--job.dump_folder=/proc/none/dump"), "job.dump_folder"),
    "missing step": (plain("--checkpoint.enable", "--checkpoint.load_step=7"), "step 7"),
    "missing initial checkpoint": (
        plain("--checkpoint.enable", "--checkpoint.initial_load_path={folder}/none"),
        "checkpoint.initial_load_path",
    ),
    "initial checkpoint without one": (
        plain("--checkpoint.enable", "--checkpoint.initial_load_path={folder}/data"),
        "no checkpoint there",
    ),
    "export without a place for the bias": (
        plain("--checkpoint.enable", "--checkpoint.last_save_in_hf", "--moe.bias_update_rate=0.01"),
        "expert_bias",
    ),
    "export without checkpoints": (plain("--checkpoint.last_save_in_hf"), "checkpoint.enable is off"),
    "step without checkpoints": (plain("--checkpoint.load_step=3"), "checkpoint.enable is off"),
    "degrees that do not fit": (plain("--parallelism.data_parallel_shard_degree=3"), "data_parallel_shard_degree"),
    "later feature": (plain("--profiling.enable_memory_snapshot"), "not supported yet"),
}


def assert_one_message(outcome: Outcome, names: str) -> None:
    for err in outcome.err:
        assert err.startswith("error: ") and err.count("error: ") == 1, err
        assert names in err
        assert "Traceback" not in err
    assert "Traceback" not in "".join(outcome.out)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_once_and_leaves_nothing(mistake: str, ranks: int, tmp_path: Path) -> None:
    prepare, names = MISTAKES[mistake]
    job, dump = write_job(tmp_path), tmp_path / "dump"
    args = prepare(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    local = f"--training.local_batch_size={4 // ranks}"
    outcome = train(f"--job.config_file={job}", f"--job.dump_folder={dump}", local, *args, ranks=ranks)
    assert outcome.codes == [2] * ranks, outcome.told
    assert_one_message(outcome, names.format(folder=tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not dump.exists() or dump.is_file()


def test_a_broken_document_is_named_when_it_is_read(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    args = data("a.txt", b"\xff\xfe\x00\x01" * 100)(tmp_path)
    assert_one_message(run(job, tmp_path / "dump", "--training.local_batch_size=2", *args, ranks=2, code=2), "a.txt")


# At resume


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A job and a folder that holds its step 2."""
    folder = tmp_path_factory.mktemp("two")
    job = write_job(folder)
    run(job, folder / "dump", "--checkpoint.enable", "--training.steps=2")
    return job, folder / "dump"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("args", "names"),
    [
        pytest.param(("--model.name=qwen3",), "of another model", id="another model"),
        pytest.param(("--training.global_batch_size=8",), "global batch size changed", id="another batch size"),
        pytest.param(("--training.seq_len=16",), "training.seq_len changed", id="another sequence length"),
        pytest.param(
            ("--training.dataset=stdlib", "--training.dataset_path=none"), "data set changed", id="other data"
        ),
        pytest.param(("--checkpoint.load_step=1",), "step 1 cannot be loaded", id="missing step"),
    ],
)
def test_what_cannot_be_resumed_stays_as_it_is(
    two_steps: tuple[Path, Path], args: tuple[str, ...], names: str, ranks: int
) -> None:
    job, dump = two_steps
    before = {path: path.read_bytes() for path in dump.rglob("*") if path.is_file()}
    local = f"--training.local_batch_size={4 // ranks}"
    outcome = run(job, dump, "--checkpoint.enable", "--training.steps=4", local, *args, ranks=ranks, code=2)
    assert_one_message(outcome, names)
    assert {path: path.read_bytes() for path in dump.rglob("*") if path.is_file()} == before


# On one rank only


def test_broken_data_on_one_rank_ends_all_with_its_message(tmp_path: Path) -> None:
    """Found in a step, when the other ranks are about to wait for this one."""
    job = write_job(tmp_path)

    def arrange(rank: int) -> None:
        from titanmoe.config import ConfigError
        from titanmoe.data.loader import DataLoader

        read, calls = DataLoader.__next__, []

        def broken(self: DataLoader) -> object:
            calls.append(1)
            if rank == 1 and len(calls) == 4:
                raise ConfigError("line 7 is broken", where="data.jsonl")
            return read(self)

        DataLoader.__next__ = broken  # type: ignore[method-assign, assignment]

    outcome = run(job, tmp_path / "dump", "--training.local_batch_size=2", ranks=2, before=arrange, code=2)
    assert_one_message(outcome, "data.jsonl: line 7 is broken")
    assert list(steps(tmp_path / "dump")) == [1, 2, 3]


def test_data_that_only_one_rank_lacks_ends_all(tmp_path: Path) -> None:
    job = write_job(tmp_path)

    def arrange(rank: int) -> None:
        import titanmoe.trainer.build as place

        open_source = place.open_source
        if rank == 1:
            place.open_source = lambda dataset, path, *rest: open_source(dataset, "/none", *rest)

    outcome = run(job, tmp_path / "dump", "--training.local_batch_size=2", ranks=2, before=arrange, code=2)
    assert_one_message(outcome, "/none")


# Through the launcher


def finish(*args: object, **options: object) -> tuple[int, str, str]:
    process = launch(*args, **options)  # type: ignore[arg-type]
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_two_ranks_tell_a_mistake_once(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    args = (f"--job.config_file={job}", f"--job.dump_folder={tmp_path}/dump", f"--training.dataset_path={tmp_path}/no")
    code, _, err = finish(*args, "--training.local_batch_size=2", ranks=2)
    assert code == 2
    assert err.count("error: ") == 1 and f"{tmp_path}/no" in err and "Traceback" not in err
    assert not (tmp_path / "dump").exists()


def test_what_would_abort_at_the_end_does_not_hide_a_mistake(tmp_path: Path) -> None:
    """As threads of process groups may, while Python ends."""
    (tmp_path / "aborts_at_exit.py").write_text("import atexit, os\natexit.register(os.abort)\n")
    job = write_job(tmp_path)
    args = (f"--job.config_file={job}", f"--job.dump_folder={tmp_path}/dump", f"--training.dataset_path={tmp_path}/no")
    path = f"{tmp_path}{os.pathsep}{CHECKOUT}"
    code, _, err = finish(*args, "--experimental.custom_import=aborts_at_exit", PYTHONPATH=path)
    assert code == 2
    assert_one_line(err, f"{tmp_path}/no")


def test_a_port_in_use(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    args = (f"--job.config_file={job}", f"--job.dump_folder={tmp_path}/dump", "--training.local_batch_size=2")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, out, err = finish(*args, ranks=2, RDZV_ENDPOINT=f"127.0.0.1:{port}")
        assert (code, out) == (2, "")
        assert err.startswith(f"error: RDZV_ENDPOINT: port {port} cannot be used") and err.count("error: ") == 1
    assert not (tmp_path / "dump").exists()


def test_a_port_in_use_without_the_launcher(tmp_path: Path) -> None:
    """As when torchrun is given one."""
    job = write_job(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def arrange(rank: int) -> None:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK="0")

        outcome = run(job, tmp_path / "dump", "--training.local_batch_size=2", before=arrange, code=2)
    assert_one_message(outcome, f"127.0.0.1:{port}")


# Failures that are nobody's mistake


def test_a_full_disk_while_saving(two_steps: tuple[Path, Path], tmp_path: Path) -> None:
    job, _ = two_steps
    dump = tmp_path / "dump"
    options = ("--checkpoint.enable", "--checkpoint.interval=2", "--training.local_batch_size=2")

    def arrange(rank: int) -> None:
        import errno

        from titanmoe.checkpoint.files import HashingWriter

        open_file, calls = HashingWriter.__init__, []

        def full(self: HashingWriter, path: str) -> None:
            calls.append(1)
            if len(calls) == 2 and rank == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            open_file(self, path)

        HashingWriter.__init__ = full  # type: ignore[method-assign]

    for mode in ("disabled", "async"):
        options = (*options[:3], f"--checkpoint.async_mode={mode}", f"--job.dump_folder={dump}-{mode}")
        outcome = run(job, dump, *options, ranks=2, before=arrange, code=1)
        for err in outcome.err:
            assert err.startswith("error: checkpoint step 4 was not saved, earlier ones are untouched: No space left")
            assert err.count("\n") == 1
        folder = Path(f"{dump}-{mode}")
        assert [path.name for path in (folder / "checkpoint").iterdir()] == ["step-2"]
        run(job, dump, *options, ranks=2)
        assert max(steps(folder)) == 10


def test_a_full_disk_while_logging(tmp_path: Path) -> None:
    job = write_job(tmp_path)

    def arrange(rank: int) -> None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))  # bytes: room for config.toml and a few records

    outcome = run(job, tmp_path / "short", before=arrange)
    assert "report.html was not written" in outcome.out[0] and "File too large" in outcome.out[0]
    assert {path.name for path in (tmp_path / "short").iterdir()} == {"config.toml", "metrics.jsonl"}
    outcome = run(job, tmp_path / "dump", "--training.steps=40", before=arrange, code=1)
    assert_one_line(outcome.err[0], "were not written: File too large (" + str(tmp_path / "dump" / "metrics.jsonl"))
    assert len((tmp_path / "dump" / "metrics.jsonl").read_text().splitlines()) > 2


def test_no_room_for_the_config(tmp_path: Path) -> None:
    job = write_job(tmp_path)

    def arrange(rank: int) -> None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    outcome = run(job, tmp_path / "dump", before=arrange, code=2)
    assert_one_line(outcome.err[0], "job.dump_folder: cannot write into")
    assert not (tmp_path / "dump").exists()


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    """The bad step is not taken and not saved; the message says which parameters; the report is there."""
    job = write_job(tmp_path)
    dump = tmp_path / "dump"
    options = ("--checkpoint.enable", "--checkpoint.interval=1", "--training.local_batch_size=2")

    def poison(rank: int) -> None:
        from titanmoe.trainer import Trainer

        take_step = Trainer._train_step

        def poisoned(self: Trainer) -> bool:
            if self.step == 3:
                with torch.no_grad():
                    self.model.norm.weight.fill_(float("nan"))
            return take_step(self)

        Trainer._train_step = poisoned  # type: ignore[method-assign]

    outcome = run(job, dump, *options, ranks=2, before=poison, code=1)
    for err in outcome.err:
        assert err.startswith("error: step 4 was not taken: its loss is nan")
        assert err.count("\n") == 1
    assert "failed at step 3" in outcome.out[0]
    assert (dump / "report.html").exists()
    assert saved_steps(dump) == [1, 2, 3]
    run(job, dump, *options, ranks=2)
    run(job, tmp_path / "whole", *options, ranks=2)
    assert curve(dump) == curve(tmp_path / "whole")
    assert_same_tensors(dump, tmp_path / "whole", 10)


def test_a_poisoned_initial_checkpoint_is_noticed_in_the_first_step(tmp_path: Path) -> None:
    job = write_job(tmp_path)

    def poison(folder: Path) -> None:
        from safetensors.torch import load_file

        found = load_file(folder / "model.safetensors")
        found["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
        save_file(found, folder / "model.safetensors")

    args = hf_weights(poison)(tmp_path)
    outcome = run(job, tmp_path / "dump", *args, code=1)
    assert outcome.err[0].startswith("error: step 1 was not taken: its loss is nan")
    assert saved_steps(tmp_path / "dump") == []


def test_help_and_printed_config(tmp_path: Path) -> None:
    outcome = train("--help")
    assert outcome.codes == [0] and "--training.steps" in outcome.out[0]
    job = write_job(tmp_path)
    outcome = run(job, tmp_path / "dump", "--training.steps=1", "--job.print_config", "--job.description=a first try")
    assert "[training]" in outcome.out[0] and "a first try" in outcome.out[0]


def test_the_first_signal_is_not_lost_while_torch_is_imported(tmp_path: Path) -> None:
    import signal

    job = write_job(tmp_path)
    process = launch(f"--job.config_file={job}", f"--job.dump_folder={tmp_path}/dump", "--checkpoint.enable")
    maps = Path(f"/proc/{process.pid}/maps")
    wait_until(lambda: "libtorch" in maps.read_text())
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, ""), out + err
    assert saved_steps(tmp_path / "dump") == []
