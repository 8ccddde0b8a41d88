"""Conversations from files and from the standard library: what is read, what is supervised, what is refused where."""

from __future__ import annotations

import functools
import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.chat_templates import FORGETFUL, LLAMA3, SYSTEM, TALK, TOOLS
from tests.data.common import TOKENIZER
from titanmoe.config.errors import ConfigError
from titanmoe.data.chat_source import ChatSource, check_messages, open_chat
from titanmoe.data.stdlib_docs import stdlib_docs


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(file: Path, rows: list[Any], key: str = "messages") -> str:
    file.write_text("".join(json.dumps({key: row}) + "\n" for row in rows))
    return str(file)


def open_file(path: str | Path, **options: Any) -> ChatSource:
    return open_chat("chat", str(path), "train", TOKENIZER, **options)


def texts(source: ChatSource) -> list[str]:
    return [source[index].text for index in range(len(source))]


def learnt(source: ChatSource, index: int) -> list[str]:
    document = source[index]
    return [document.text[begin:end] for begin, end in document.supervised]


def chatml(talk: list[dict[str, str]]) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in talk)


def test_json_lines_with_rows_of_different_keys(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"messages": SYSTEM, "n": 1}) + "\n\n" + json.dumps({"messages": [*parts, TALK[1]]})
    )
    write(tmp_path / "a.json", [TALK])
    (tmp_path / "empty.jsonl").write_text("")
    source = open_file(tmp_path)
    joined = chatml([{"role": "user", "content": "ab"}, TALK[1]])
    assert texts(source) == [chatml(TALK), chatml(SYSTEM), joined]
    answers = [f"{message['content']}<|im_end|>" for message in TALK[1::2]]
    assert learnt(source, 1) == answers
    assert learnt(open_file(tmp_path, loss_on="all"), 1) == [chatml(SYSTEM)]


@pytest.mark.parametrize("kind", ["parquet", "list", "gzip"])
def test_other_files_give_the_same_as_json_lines(tmp_path: Path, kind: str) -> None:
    template = tmp_path / "shows_all.jinja"
    template.write_text("{% for m in messages %}{{ m | tojson(sort_keys=true) }}<|im_end|>{% endfor %}")
    talks = [TOOLS, TALK, SYSTEM]
    talks[0][1]["tool_calls"][0]["function"]["arguments"] = {"a": 1, "b": "x"}
    expected = texts(open_file(write(tmp_path / "a.jsonl", talks), template=str(template), loss_on="all"))
    rows = [{"messages": talk} for talk in talks]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        file = tmp_path / "b.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif kind == "list":
        file = tmp_path / "b.json"
        file.write_text(json.dumps(rows))
    else:
        file = tmp_path / "b.jsonl.gz"
        with gzip.open(file, "wt") as lines:
            lines.write("".join(json.dumps(row) + "\n" for row in rows))
    source = open_file(file, template=str(template), loss_on="all")
    assert texts(source) == expected and "reasoning_content" in expected[0]


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "there are no messages"),
        (None, "there are no messages"),
        ("user: x", "the messages are a string"),
        ([USER, "x"], r"messages\[1\] is a string"),
        ([USER, {"role": "bot", "content": "x"}], r"messages\[1\] has the role 'bot'"),
        ([{"from": "human", "value": "x"}], "has the role None"),
        ([USER, {"role": "assistant"}], r"content of messages\[1\] is a null"),
        ([USER, {"role": "assistant", "content": 3}], r"content of messages\[1\] is a number"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], r"content of messages\[0\] is a list"),
        ([USER], "no message is the assistant's"),
        ([USER, {"role": "assistant", "content": "\ud800"}], "surrogates not allowed"),
        ([{**USER, "more": functools.reduce(lambda inner, _: [inner], range(700), [])}], "nested too deeply"),
    ],
)
def test_broken_conversations_name_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    source = open_file(write(tmp_path / "a.jsonl", [TALK, row]))
    with pytest.raises(ConfigError, match=message) as caught:
        source[1]
    assert caught.value.where == f"{tmp_path / 'a.jsonl'}:2" and caught.value.mend


def test_broken_lines_name_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for line, message in ((b'{"messages": [', "JSON"), (b"3", "no object"), (b'{"text": "\xff"}', "JSON")):
        file.write_bytes(json.dumps({"messages": TALK}).encode() + b"\n" + line + b"\n")
        source = open_file(file)
        with pytest.raises(ConfigError, match=message) as caught:
            source[1]
        assert caught.value.where == f"{file}:2"
    with pytest.raises(ConfigError, match=r"no key 'talk'; there are 'messages'") as caught:
        open_file(file, messages_key="talk")
    assert "data.messages_key" in caught.value.mend
    path = write(tmp_path / "b.json", [TALK], key="talk")
    assert texts(open_file(path, messages_key="talk")) == [chatml(TALK)]
    (tmp_path / "c.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match="JSON and Parquet"):
        open_file(tmp_path)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="all files are empty"):
        open_file(file)


def test_blocks_that_hold_nothing_teach_nothing(tmp_path: Path) -> None:
    (tmp_path / "its.jinja").write_text("{% generation %}{% endgeneration %}{{ messages[0].content }}")
    with pytest.raises(ConfigError, match="hold nothing that the assistant wrote") as caught:
        open_file(write(tmp_path / "a.jsonl", [TALK]), template=str(tmp_path / "its.jinja"))
    assert 'data.loss_on = "all"' in caught.value.mend


def test_a_list_behind_a_mark_of_its_encoding_is_no_lines(tmp_path: Path) -> None:
    """Nor one behind white space."""
    for begin in (" " * 200, "\ufeff"):
        (tmp_path / "a.json").write_text(begin + json.dumps([{"messages": TALK}]))
        assert texts(open_file(tmp_path / "a.json")) == [chatml(TALK)]


def test_a_template_that_refuses_a_conversation(tmp_path: Path) -> None:
    template = tmp_path / "its.jinja"
    template.write_text(
        FORGETFUL.replace(
            "message.content +",
            "(message.content if loop.last or message.role == 'user' else message.content | upper) +",
        )
    )
    source = open_file(write(tmp_path / "a.jsonl", [TALK[:2], TALK]), template=str(template))
    with pytest.raises(ConfigError, match=r"its\.jinja writes messages\[:2\] otherwise") as caught:
        source[1]
    assert caught.value.where == f"{tmp_path / 'a.jsonl'}:2"
    assert open_file(tmp_path / "a.jsonl", template=str(template), loss_on="all")[1].text


def test_logged_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", [TALK])
    (tmp_path / "dated.jinja").write_text(LLAMA3)
    with caplog.at_level(logging.INFO, logger="titanmoe"):
        text = open_file(path, template=str(tmp_path / "dated.jinja"))[0].text
    assert "26 Jul 2024" in text and "it is always 2024-07-26" in caplog.text
    assert "without a special token" in caplog.text, "<|eot_id|> is none of this tokenizer"
    caplog.clear()
    open_file(path)
    assert not caplog.text


def test_keys_without_a_value_are_absent() -> None:
    given = [{"role": "assistant", "content": None, "name": None, "tool_calls": [{"id": None, "function": {"n": 1}}]}]
    (message,) = check_messages(given)
    assert message == {"role": "assistant", "content": "", "tool_calls": [{"function": {"n": 1}}]}


def test_the_fingerprint_follows_all_that_changes_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [TALK])
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    sources = [open_file(path), open_file(path, loss_on="all")]
    sources.append(open_file(path, loss_on="all", template=str(tmp_path / "t.jinja")))
    write(tmp_path / "a.jsonl", [TALK, TALK])
    sources.append(open_file(path))
    assert len({source.fingerprint for source in sources}) == 4
    assert open_file(path).fingerprint == sources[-1].fingerprint


def test_stdlib_docs() -> None:
    train, validation = stdlib_docs("train"), stdlib_docs("validation")
    assert len(train) > 2000 and 50 < len(validation) < len(train) / 4
    assert not {doc.name for doc in train} & {doc.name for doc in validation}
    docs = {doc.name: doc for doc in (*train, *validation)}
    doc = docs["textwrap.dedent"]
    assert doc.question == "What does the function `textwrap.dedent(text)` do?"
    assert doc.answer.startswith("Remove any common leading whitespace from every line")
    import textwrap

    assert doc.answer in (textwrap.dedent.__doc__ or "")
    assert docs["textwrap.TextWrapper.fill"].signature == "textwrap.TextWrapper.fill(text)"
    assert docs["textwrap.TextWrapper"].signature.startswith("textwrap.TextWrapper(width=70, ")
    assert not any(part.startswith("__") for doc in train for part in doc.name.split("."))

    source = open_chat("stdlib_docs", None, "validation", TOKENIZER)
    doc = validation[0]
    talk = [{"role": "user", "content": doc.question}, {"role": "assistant", "content": doc.answer}]
    assert source[0].text == chatml(talk) and learnt(source, 0) == [f"{doc.answer}<|im_end|>"]


def test_stdlib_docs_are_the_same_in_another_process() -> None:
    code = "import sys; from titanmoe.data.stdlib_docs import stdlib_docs as docs; a = repr(docs('validation'))\n"
    code += "import hashlib; print(hashlib.sha256(a.encode()).hexdigest(), 'zipimport' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={
        "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])})  # fmt: skip
    import hashlib

    assert found.stdout.split()[0] == hashlib.sha256(repr(stdlib_docs("validation")).encode()).hexdigest()
