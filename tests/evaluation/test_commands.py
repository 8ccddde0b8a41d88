"""`titanmoe generate` and `titanmoe eval recall`: what they print, and their exit codes."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import titanmoe
from tests.evaluation.test_decoding import random_model
from tests.train.jobs import run, write_job
from titanmoe import cli
from titanmoe.data.tokenizer import BUILTIN_TOKENIZER, load_tokenizer
from titanmoe.evaluation.generate import generate
from titanmoe.models.spec import DecoderSpec, GroupedQuery, LayerSpec, MoE, Rope

QUESTION, ANSWER = "What day was I born?", "January 1, 2058"
_LAYER = LayerSpec(GroupedQuery(2, 1, 16, Rope(16, 1e4), qk_norm=True), MoE(4, 2, 32))
SPEC = DecoderSpec(dim=32, vocab_size=2048, layers=(_LAYER, _LAYER), max_seq_len=96, family="qwen3")


@pytest.fixture(scope="module")
def ignorant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "ignorant"
    titanmoe.save_pretrained(random_model(SPEC), folder, tokenizer="builtin")
    return folder


@pytest.fixture(scope="module")
def taught(ignorant: Path) -> Path:
    """The model after it learnt one answer by heart."""
    model = titanmoe.from_pretrained(ignorant, dtype=torch.float32)
    text = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\nIt was {ANSWER}.<|im_end|>"
    tokens = torch.tensor([load_tokenizer("builtin").encode(text)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = titanmoe.causal_lm_loss(model, tokens, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    titanmoe.save_pretrained(model, ignorant.with_name("taught"), tokenizer="builtin")
    return ignorant.with_name("taught")


def command(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> str:
    """Stdout; of a mistake, stderr."""
    found = cli.main([*map(str, args)])
    captured = capsys.readouterr()
    assert found == code, captured
    if code == 2:
        assert captured.out == "" and captured.err.count("error: ") == 1 and "Traceback" not in captured.err
    return captured.err if code == 2 else captured.out


# generate


def test_texts_and_figures(ignorant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("generate", "--model", ignorant, "--dtype=float32", "--max-new-tokens=7")
    figures = json.loads(command(capsys, *args, "--prompt=def f(", "--prompt=import", "--json"))
    tokenizer = load_tokenizer("builtin")
    model = titanmoe.from_pretrained(ignorant, dtype=torch.float32)
    prompts = [tokenizer.encode("def f("), tokenizer.encode("import")]
    expected = generate(model, prompts, max_new_tokens=7, stop_ids={tokenizer.eos_id})
    assert [row["tokens"] for row in figures["results"]] == [answer.tokens for answer in expected]
    assert [row["prompt"] for row in figures["results"]] == ["def f(", "import"]
    assert figures["new_tokens"] == 14 and figures["tokens_per_second"] > 0
    texts = [row["text"] for row in figures["results"]]
    assert texts[0] == tokenizer.decode(expected[0].tokens)
    assert command(capsys, *args, "--prompt=import") == texts[1] + "\n"
    both = command(capsys, *args, "--prompt=def f(", "--prompt=import")
    assert both == f"--- 1 (7 tokens, length)\n{texts[0]}\n--- 2 (7 tokens, length)\n{texts[1]}\n"


def test_prompts_from_a_file_and_from_stdin(
    ignorant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "Hi"}]
    file.write_text(json.dumps({"prompt": "import"}) + "\n\n" + json.dumps({"messages": chat}) + "\n")
    args = ("generate", "--model", ignorant, "--max-new-tokens=5", "--json", "--temperature=1", "--seed=3")
    rows = json.loads(command(capsys, *args, "--prompts", file))["results"]
    assert [row["prompt"] for row in rows] == ["import", chat]
    monkeypatch.setattr(sys, "stdin", io.StringIO("import"))
    assert json.loads(command(capsys, *args))["results"] == rows[:1]
    # The second prompt has other numbers than the first, so ask for it in the second place again.
    again = json.loads(command(capsys, *args, "--prompt=a", "--prompt=Hi", "--chat"))["results"]
    assert again[1] == rows[1]


def test_a_chat_ends_with_the_turn(taught: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("generate", "--model", taught, "--dtype=float32", "--chat", "--prompt", QUESTION)
    assert command(capsys, *args) == f"It was {ANSWER}.\n"
    (row,) = json.loads(command(capsys, *args, "--json"))["results"]
    assert row["finish_reason"] == "stop" and row["prompt"] == [{"role": "user", "content": QUESTION}]


def test_a_chat_of_a_template_that_begins_the_thoughts(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompt then is not how the template writes a turn that it is given; where that ends is known all the same."""
    (tmp_path / "its.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>' }}{% endif %}"
    )
    args = ("generate", "--model", taught, "--dtype=float32", "--chat", "--prompt", QUESTION, "--json")
    found = json.loads(command(capsys, *args, "--chat-template", tmp_path / "its.jinja", "--max-new-tokens=60"))
    (result,) = found["results"]
    assert result["finish_reason"] == "stop" or len(result["tokens"]) == 60
    (tmp_path / "its.jinja").write_text("{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}")  # fmt: skip
    command(capsys, *args, "--chat-template", tmp_path / "its.jinja", "--max-new-tokens=2")


def test_what_is_not_text(ignorant: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("generate", "--model", ignorant)
    assert "is not UTF-8" in command(capsys, *args, "--prompt", "caf\udce9", code=2)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc \xff"), encoding="utf-8"))
    assert "stdin: is not UTF-8" in command(capsys, *args, code=2)


@pytest.mark.parametrize("name", ["generate", "eval", "export"])
def test_an_interrupt_is_one_line(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it comes, as while modules are imported."""

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    commands = [replace(each, run=interrupted) if each.name == name else each for each in cli.COMMANDS]
    monkeypatch.setattr(cli, "COMMANDS", tuple(commands))
    assert cli.main([name]) == 1
    assert capsys.readouterr().err.strip() == "error: interrupted"


def test_it_ends_at_the_tokens_that_generation_config_names(
    ignorant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ignorant, folder)
    args = ("generate", "--model", folder, "--dtype=float32", "--max-new-tokens=6", "--prompt=import", "--json")
    (row,) = json.loads(command(capsys, *args))["results"]
    stop = row["tokens"][3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, stop]}))
    (ended,) = json.loads(command(capsys, *args))["results"]
    assert ended["tokens"] == row["tokens"][: row["tokens"].index(stop)] and ended["finish_reason"] == "stop"


def test_one_text_comes_as_it_is_generated_on_a_terminal(
    ignorant: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        pieces: list[str]

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.pieces.append(text)
            return super().write(text)

    args = ["generate", "--model", str(ignorant), "--prompt=import", "--max-new-tokens=12", "--dtype=float32"]
    expected = command(capsys, *args)
    screen = Screen()
    screen.pieces = []
    monkeypatch.setattr(sys, "stdout", screen)
    assert cli.main(args) == 0
    assert screen.getvalue() == expected
    assert len(screen.pieces) > 5


@pytest.mark.parametrize("converter", ["", "lora", "quantize.frozen.mx,lora"])
def test_a_checkpoint_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], converter: str) -> None:
    """Adapters that are live say what merged ones do."""
    options = [f"--model.converters={converter}", "--optimizer.lr=0.02"] if converter else []
    run(write_job(tmp_path, more="[checkpoint]\nenable = true\n"), tmp_path / "run", "--training.steps=3", *options)
    capsys.readouterr()
    step, exported = tmp_path / "run" / "checkpoint" / "step-3", tmp_path / "exported"
    merge = ["--merge"] if converter else []
    command(capsys, "export", "--checkpoint", step, "--output", exported, "--dtype=float32", *merge)
    args = ("--prompt=import os", "--max-new-tokens=12", "--dtype=float32", "--json")
    from_step = json.loads(command(capsys, "generate", "--checkpoint", step, *args))["results"]
    assert from_step == json.loads(command(capsys, "generate", "--model", exported, *args))["results"]
    assert len(from_step[0]["tokens"]) == 12
    assert json.loads(command(capsys, "generate", "--checkpoint", tmp_path / "run", *args))["results"] == from_step


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt="], "a prompt is empty"),
        (["--prompt=a", "--top-p=0"], "top-p: 0.0 was given"),
        (["--prompt=a", "--temperature=-1"], "temperature: -1.0 was given"),
        (["--prompt=a", "--max-new-tokens=0"], "must be at least 1"),
        (["--prompt=" + "a b " * 60], "with the answer, the model takes at most 96"),
        (["--prompts=gone.jsonl"], "gone.jsonl: cannot be read"),
        (["--prompt=a", "--device=cuda:99"], "--device: cuda:99 cannot be used"),
        (["--prompt=a", "--tokenizer=gone"], "gone: no such folder"),
        (["--prompt=a", "--chat", "--chat-template=gone"], "gone: cannot be read"),
        (["--prompt=a", "--model=gone"], "gone: no such folder"),
    ],
)
def test_mistakes(ignorant: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    model = [] if any(arg.startswith("--model") for arg in args) else ["--model", str(ignorant)]
    assert message in command(capsys, "generate", *model, *args, code=2)


@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"prompt": ""}', '{"prompt": 3}', '{"messages": ["a"]}'])
def test_lines_that_are_no_prompts(
    ignorant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + "\n")
    assert f"error: {file}:2: " in command(capsys, "generate", "--model", ignorant, "--prompts", file, code=2)


def test_a_folder_without_a_tokenizer_or_a_template(
    ignorant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ignorant, folder)
    config = json.loads((BUILTIN_TOKENIZER / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    args = ("generate", "--model", folder, "--prompt=a", "--max-new-tokens=2")
    command(capsys, *args)
    assert "no chat template" in command(capsys, *args, "--chat", code=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "has no tokenizer" in command(capsys, *args, code=2)
    command(capsys, *args, "--tokenizer=builtin")


# eval recall


def recall(capsys: pytest.CaptureFixture[str], *args: object, code: int) -> str:
    return command(capsys, "eval", "recall", "--question", QUESTION, "--answer", ANSWER, *args, code=code)


def test_what_was_learnt_is_recalled(ignorant: Path, taught: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = recall(capsys, "--before", ignorant, "--after", taught, "--after", taught, code=0)
    assert f"{ignorant}: 0 of 5 contain the answer, none may\n" in out
    assert out.count(f"{taught}: 5 of 5 contain the answer, all must\n") == 2
    assert out.endswith("passed\n") and out.count(repr(f"It was {ANSWER}.")) == 10
    assert recall(capsys, "--before", ignorant, "--after", taught, "--after", taught, code=0) == out


@pytest.mark.parametrize(("before", "after"), [("taught", "taught"), ("ignorant", "ignorant"), ("taught", "ignorant")])
def test_a_failed_check(ignorant: Path, taught: Path, capsys, before: str, after: str) -> None:
    folders = {"ignorant": ignorant, "taught": taught}
    args = ("--before", folders[before], "--after", folders[after], "--samples=2", "--json")
    figures = json.loads(recall(capsys, *args, code=1))
    assert figures["passed"] is False and figures["answer"] == ANSWER
    assert [model["passed"] for model in figures["models"]] == [before == "ignorant", after == "taught"]
    assert [len(model["texts"]) for model in figures["models"]] == [2, 2]


def test_wrong_words_of_eval(taught: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is: recall." in command(capsys, "eval", code=2)
    assert "There is: recall." in command(capsys, "eval", "harness", code=2)
    assert "--after" in command(capsys, "eval", "recall", "--question=a", "--answer=b", code=2)
    args = ("eval", "recall", "--after", taught, "--question=a")
    assert "is empty" in command(capsys, *args, "--answer=", code=2)
    assert "at least 1" in command(capsys, *args, "--answer=b", "--samples=0", code=2)


@pytest.mark.parametrize("name", ["generate", "eval"])
def test_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert f"usage: titanmoe {name}" in command(capsys, name, "--help")
