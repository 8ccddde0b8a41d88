"""`titanmoe export`: from a run's checkpoint, or another model folder, to what transformers loads; and its mistakes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoint.hf_models import load_reference, read_all, save_reference, some_tokens
from tests.checkpoint.memory import forget_peak, needs_proc, status_mib
from tests.ranks import run_ranks
from tests.train.jobs import TINY, run, tensors, write_job
from titanmoe import cli
from titanmoe.checkpoint import hf_save, model_source
from titanmoe.checkpoint.export import export_hf
from titanmoe.checkpoint.hf_save import save_hf
from titanmoe.checkpoint.pretrained import from_pretrained, spec_of_hf_folder
from titanmoe.data.tokenizer import load_tokenizer

_SAVES = "[checkpoint]\nenable = true\ninterval = 2\nlast_save_in_hf = true\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps that saved steps 2 and 3, and step 3 in Hugging Face layout too."""
    folder = tmp_path_factory.mktemp("job")
    job = write_job(folder, more=_SAVES)
    run(job, folder / "run", "--training.steps=3")
    return folder / "run"


def _export(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> str:
    """What the command wrote; a mistake is one message on stderr and leaves nothing on stdout."""
    found = cli.main(["export", *map(str, args)])
    captured = capsys.readouterr()
    assert found == code, captured
    if code == 0:
        return captured.out
    assert captured.err.startswith("error: ") and captured.err.count("error: ") == 1, captured
    return captured.err


def _stored(run_folder: Path, step: int) -> dict[str, Tensor]:
    found = tensors(run_folder, step)
    return {name.removeprefix("model."): tensor for name, tensor in found.items() if name.startswith("model.")}


# From a run


def test_a_trained_model_loads_in_transformers(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    out = _export(capsys, "--checkpoint", trained / "checkpoint/step-2", "--output", tmp_path / "out", "--format", "hf")
    assert "Wrote 0.00 GB of weights (bfloat16) in 1 file to" in out and "verified 69 tensors" in out
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    theirs = load_reference(tmp_path / "out", torch.bfloat16)
    ours = from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, tensor in _stored(trained, 2).items():
        assert torch.equal(ours.get_parameter(name), tensor.bfloat16().float()), name
    tokens = some_tokens()
    with torch.no_grad():
        found, expected = ours(tokens), theirs.float()(tokens).logits
    assert (found - expected).abs().max() < 1e-4
    text = "def f(x):\n    return x"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text)["input_ids"] == load_tokenizer("builtin").encode(text)
    assert theirs.generation_config.eos_token_id == load_tokenizer("builtin").eos_id


def test_it_writes_what_the_run_itself_wrote_at_its_end(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the step, the checkpoint folder and the run's folder, whose newest step is the last."""
    for number, name in enumerate(("checkpoint/step-3", "checkpoint", ".")):
        out = tmp_path / str(number)
        _export(capsys, "--checkpoint", trained / name, "--output", out, "--dtype=float32")
        assert {file.name: file.read_bytes() for file in out.iterdir()} == {
            file.name: file.read_bytes() for file in (trained / "checkpoint/step-3-hf").iterdir()
        }


def test_a_checkpoint_of_the_model_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(
        tmp_path, more="[checkpoint]\nenable = true\nlast_save_model_only = true\nexport_dtype='bfloat16'\n"
    )
    run(job, tmp_path / "run", "--training.steps=1")
    _export(capsys, "--checkpoint", tmp_path / "run", "--output", tmp_path / "out", "--dtype=float32")
    ours = from_pretrained(tmp_path / "out", dtype=torch.float32)
    stored = _stored(tmp_path / "run", 1)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(ours.get_parameter(name), tensor.float()) for name, tensor in stored.items())


def test_figures_as_json(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--checkpoint", trained, "--output", tmp_path / "out", "--dtype=float8", "--no-verify", "--json")
    figures = json.loads(_export(capsys, *arguments))
    assert figures.pop("seconds") > 0
    num_bytes = sum(tensor.nbytes for tensor in read_all(tmp_path / "out").values())
    assert figures == {
        "output": str(tmp_path / "out"),
        "dtype": "float8",
        "verified": False,
        "num_tensors": len(read_all(tmp_path / "out")),
        "num_bytes": num_bytes,
        "num_files": 1,
    }


def test_a_moved_checkpoint_needs_its_config(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved, out = tmp_path / "kept" / "step-3", tmp_path / "out"
    shutil.copytree(trained / "checkpoint/step-3", moved)
    message = _export(capsys, "--checkpoint", moved, "--output", out, code=2)
    assert "config.toml" in message and "--config FILE" in message
    # The config of another run lies above it; its own checkpoints are elsewhere.
    shutil.copy(trained / "config.toml", tmp_path)
    assert "--config FILE" in _export(capsys, "--checkpoint", moved, "--output", out, code=2)
    _export(capsys, "--checkpoint", moved, "--output", out, "--config", trained / "config.toml", "--dtype=float32")
    expected = (trained / "checkpoint/step-3-hf/model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == expected
    # A run's folder is moved as a whole.
    (tmp_path / "config.toml").unlink()
    shutil.copytree(trained, tmp_path / "kept" / "run")
    _export(capsys, "--checkpoint", tmp_path / "kept/run/checkpoint/step-2", "--output", tmp_path / "out2")


def test_the_config_that_the_step_was_saved_under(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (trained / "config.toml").read_text()
    arguments = ("--checkpoint", trained / "checkpoint/step-3", "--config", tmp_path / "other.toml", "--output")
    (tmp_path / "other.toml").write_text(config.replace("lr = 0.01", "lr = 0.02"))
    assert "differs from the config that step 3 was saved under" in _export(capsys, *arguments, tmp_path / "out")
    (tmp_path / "other.toml").write_text(config)
    assert "differs" not in _export(capsys, *arguments, tmp_path / "out2")
    # One of another model altogether.
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(TINY | {"hidden_size": 48}))
    assets = str(trained.parent / "model")
    (tmp_path / "other.toml").write_text(config.replace(assets, str(tmp_path / "model")))
    message = _export(capsys, *arguments, tmp_path / "out3", code=2)
    assert "of another model" in message and not (tmp_path / "out3").exists()
    (tmp_path / "other.toml").write_text(config.replace(assets, "gone"))
    message = _export(capsys, *arguments, tmp_path / "out3", code=2)
    assert 'model.name is "auto"' in message and "gone" in message


def test_another_tokenizer(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tokenizer.json").write_text("{}")
    arguments = ("--checkpoint", trained, "--output", tmp_path / "out", "--tokenizer")
    _export(capsys, *arguments, tmp_path / "mine")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    message = _export(capsys, *arguments, tmp_path / "gone", "--overwrite", code=2)
    assert "tokenizer" in message and str(tmp_path / "gone") in message


# From a model folder


def test_from_bfloat16_to_float8_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_reference(tmp_path / "a", dtype=torch.bfloat16, max_shard_size="50KB")
    out = _export(capsys, "--checkpoint", tmp_path / "a", "--output", tmp_path / "copy")
    assert "no tokenizer" in out
    generation = "generation_config.json"
    assert (tmp_path / "copy" / generation).read_bytes() == (tmp_path / "a" / generation).read_bytes()
    before, copy = read_all(tmp_path / "a"), read_all(tmp_path / "copy")
    assert before.keys() == copy.keys()
    assert all(torch.equal(tensor, copy[key]) for key, tensor in before.items())

    _export(capsys, "--checkpoint", tmp_path / "copy", "--output", tmp_path / "fp8", "--dtype", "float8")
    _export(capsys, "--checkpoint", tmp_path / "fp8", "--output", tmp_path / "back", "--dtype", "bfloat16")
    fp8, back = read_all(tmp_path / "fp8"), read_all(tmp_path / "back")
    assert back.keys() == before.keys()
    assert "quantization_config" not in (tmp_path / "back" / "config.json").read_text()
    num_quantized = 0
    for key, tensor in before.items():
        if fp8[key].dtype == torch.float8_e4m3fn:
            num_quantized += 1
            scale = fp8[f"{key}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            expected = fp8[key].float() * scale[: tensor.shape[0], : tensor.shape[1]]
            assert torch.equal(back[key], expected.bfloat16())
        else:
            assert torch.equal(back[key], tensor)
    assert 0 < num_quantized < len(before)


def test_float32_is_quantised_without_a_stop_at_bfloat16(tmp_path: Path) -> None:
    save_reference(tmp_path / "a")
    model = from_pretrained(tmp_path / "a", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 2**-9)  # what bfloat16 would round away
    hf_save.save_hf(model, tmp_path / "b", spec_of_hf_folder(tmp_path / "a")[0], model.spec)
    export_hf(tmp_path / "b", tmp_path / "fp8", dtype=torch.float8_e4m3fn)
    key = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    largest = model.layers["0"].attention.q_proj.weight.abs().max()
    assert read_all(tmp_path / "fp8")[key].max() == largest / 448


# Mistakes


def test_wrong_words(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = ("--checkpoint", trained, "--output", tmp_path / "out")
    for arguments, words in (
        ((), "--checkpoint, --output"),
        ((*known, "--format=peft"), "has no adapters"),
        ((*known, "--format=gguf"), "--format gguf is not available yet"),
        ((*known, "--format=onnx"), "invalid choice: 'onnx'"),
        ((*known, "--merge"), "there are no adapters to merge"),
        ((*known, "--dtype=int4"), "invalid choice: 'int4'"),
        ((*known, "--overwite"), "unrecognized arguments: --overwite"),
    ):
        assert words in _export(capsys, *arguments, code=2)
    assert not (tmp_path / "out").exists()
    assert "--no-verify" in _export(capsys, "--help")


def test_no_checkpoint_there(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, words in (
        ("gone", "no such folder"),
        ("some/model", "hf download some/model"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "empty", "no checkpoint there"),
    ):
        message = _export(capsys, "--checkpoint", name, "--output", tmp_path / "out", code=2)
        assert words in message and str(name) in message
    message = _export(capsys, "--checkpoint", trained / "checkpoint/step-7", "--output", tmp_path / "out", code=2)
    assert "step-7: no such folder" in message
    message = _export(
        capsys, "--checkpoint", trained / "checkpoint/step-3-hf", "--output", tmp_path / "out", "--config=x", code=2
    )
    assert "has its own config.json" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda step: (step / "manifest.json").unlink(), "no manifest.json"),
        (lambda step: (step / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda step: (step / "__0_0.distcp").open("ab").write(b"x"), "its manifest says"),
        (lambda step: _flip(step / "__0_0.distcp"), "checksum"),
    ],
)
def test_a_damaged_checkpoint(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, words: str
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    damage(tmp_path / "run/checkpoint/step-3")
    out = tmp_path / "out"
    message = _export(capsys, "--checkpoint", tmp_path / "run/checkpoint/step-3", "--output", out, code=2)
    assert "step-3" in message and words in message
    assert not out.exists()
    # Without a step named, the newest that is whole is taken, and the other one is named.
    told = _export(capsys, "--checkpoint", tmp_path / "run", "--output", out)
    assert "skipped checkpoint step-3" in told and "step 2" in told


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_outputs_in_use(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """It is known before the weights are read."""
    monkeypatch.setattr(model_source, "load_shards", None)
    monkeypatch.setattr(model_source, "load_hf_weights", None)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.json").write_text("{}")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    model = trained / "checkpoint/step-3-hf"
    for checkpoint, output, more, words in (
        (trained, tmp_path / "used", (), "is not empty"),
        (trained, tmp_path / "foreign", ("--overwrite",), "thesis.tex"),
        (model, model, ("--overwrite",), "is the checkpoint itself"),
        (model, tmp_path / "used", (), "is not empty"),
    ):
        assert words in _export(capsys, "--checkpoint", checkpoint, "--output", output, *more, code=2)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    message = _export(capsys, "--checkpoint", trained, "--output", tmp_path / "deep/out", code=2)
    assert f"{tmp_path}: the folder cannot be written to" in message
    assert {path.name for path in tmp_path.iterdir()} == {"used", "foreign"}


def _export_to_a_full_disk(checkpoint: Path, output: Path) -> int:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return cli.main(["export", "--checkpoint", str(checkpoint), "--output", str(output)])


def test_a_full_disk(trained: Path, tmp_path: Path) -> None:
    assert run_ranks(_export_to_a_full_disk, 1, trained, tmp_path / "deep/er/out") == [2]
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_written_right_is_not_the_users_mistake(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    compare = hf_save.find_difference

    def flip_and_compare(folder: Path, *args: object) -> str:
        _flip(folder / "model.safetensors")
        return compare(folder, *args)

    monkeypatch.setattr(hf_save, "find_difference", flip_and_compare)
    message = _export(capsys, "--checkpoint", trained, "--output", tmp_path / "out", code=1)
    assert "what was written is not the model" in message and "in the file" in message
    assert list(tmp_path.iterdir()) == []
    _export(capsys, "--checkpoint", trained, "--output", tmp_path / "out", "--no-verify")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch, number: signal.Signals
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(hf_save, "find_difference", lambda *args: signal.raise_signal(number))
    message = _export(capsys, "--checkpoint", trained, "--output", tmp_path / "out", code=1)
    assert "interrupted; nothing was left behind" in message
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_whose_last_save_is_not_right_fails_and_keeps_its_checkpoint(tmp_path: Path, ranks: int) -> None:
    compare = hf_save.find_difference

    def flip_and_compare(folder: Path | None, *args: object) -> str:
        if folder is not None:
            _flip(folder / "model.safetensors")
        return compare(folder, *args)

    def arrange(rank: int) -> None:
        hf_save.find_difference = flip_and_compare

    job = write_job(tmp_path, more=_SAVES)
    options = ("--training.steps=1", f"--training.local_batch_size={4 // ranks}")
    outcome = run(job, tmp_path / "run", *options, ranks=ranks, code=1, before=arrange)
    for text in outcome.err:
        assert text.startswith("error: ") and "what was written is not the model" in text and "Traceback" not in text
    assert {path.name for path in (tmp_path / "run/checkpoint").iterdir()} == {"step-1"}


# Memory


def _peak_while_exporting(source: Path, target: Path) -> float:
    forget_peak()
    before = status_mib("VmRSS")
    export_hf(source, target)
    return status_mib("VmHWM") - before


@needs_proc
def test_a_layer_beyond_the_model_is_in_memory(tmp_path: Path) -> None:
    from titanmoe.models.build import build_model, materialize
    from titanmoe.models.families.qwen3 import FAMILY
    from titanmoe.models.spec import DecoderSpec, GroupedQuery, LayerSpec, MoE, Rope

    layer = LayerSpec(GroupedQuery(4, 2, 64, Rope(64, 1e4), qk_norm=True), MoE(24, 2, 640))
    spec = DecoderSpec(768, 4096, (layer,) * 3, family="qwen3")
    model = materialize(build_model(spec, dtype=torch.bfloat16), "cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    model_mib = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    save_hf(model, tmp_path / "a", FAMILY, spec)
    del model
    (peak_mib,) = run_ranks(_peak_while_exporting, 1, tmp_path / "a", tmp_path / "b", fresh=True)
    assert model_mib > 200
    # A layer is 70 MiB.
    assert model_mib - 20 < peak_mib < model_mib + 70
