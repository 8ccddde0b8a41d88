"""Chat templates against transformers' own rendering, the characters of the assistant, and the sandbox."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.data.chat_templates import ALL, CONVERSATIONS, FORGETFUL, GENERATION, HELLO, LLAMA3, MISTRAL, SYSTEM, TALK
from tests.data.common import TOKENIZER
from titanmoe.config.errors import ConfigError
from titanmoe.data.chat_template import ChatTemplate, load_chat_template
from titanmoe.data.encoding import encode_documents
from titanmoe.data.packing import IGNORED
from titanmoe.data.sources import Rendered
from titanmoe.data.tokenizer import BUILTIN_TOKENIZER, Tokenizer, load_tokenizer

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = ("<|im_end|>", "<|eot_id|>", "</s>")


def make(text: str, **changes: Any) -> ChatTemplate:
    return ChatTemplate(text, "its.jinja", VARIABLES, SPECIAL, **changes)


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' tokenizer of the built-in tokenizer's files."""
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(BUILTIN_TOKENIZER / "tokenizer.json"), **VARIABLES)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("talk", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
def test_renders_as_transformers(reference: Any, text: str, talk: list, add_generation_prompt: bool) -> None:
    options = {"chat_template": text, "tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        expected = reference.apply_chat_template(talk, **options)
    except Exception as error:  # of jinja2, whatever it is: the same must be refused here
        with pytest.raises(ConfigError, match=r"its\.jinja fails"):
            make(text).render(talk, add_generation_prompt)
        assert "alternate" in str(error) or "Undefined" in str(error) or "undefined" in str(error), error
        return
    assert make(text).render(talk, add_generation_prompt) == expected


def test_the_builtin_tokenizers_template(reference: Any) -> None:
    template = load_chat_template(TOKENIZER)
    text = json.loads((BUILTIN_TOKENIZER / "tokenizer_config.json").read_text())["chat_template"]
    assert template.render(TALK, True) == reference.apply_chat_template(
        TALK, chat_template=text, tokenize=False, add_generation_prompt=True
    )


def with_trimmed_offsets(tokenizer: Tokenizer) -> Tokenizer:
    """Ranges of characters without the spaces at a token's ends, as in the tokenizers of Llama 3 and GPT-2."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return Tokenizer(**{**tokenizer.__dict__, "backend": backend})


@pytest.mark.parametrize("tokenizer", [TOKENIZER, with_trimmed_offsets(TOKENIZER)], ids=["plain", "trimmed"])
def test_assistant_tokens_are_those_of_transformers(reference: Any, tokenizer: Tokenizer) -> None:
    for talk in (TALK, SYSTEM):
        expected = reference.apply_chat_template(
            talk, chat_template=GENERATION, return_dict=True, return_assistant_tokens_mask=True
        )
        assert 0 < sum(expected["assistant_masks"]) < len(expected["assistant_masks"])
        rendered = make(GENERATION).render_supervised(talk)
        (encoded,) = encode_documents(tokenizer, [rendered], append_eos=True)
        assert encoded.tokens.tolist() == expected["input_ids"]
        assert (encoded.labels != IGNORED).tolist() == [bool(bit) for bit in expected["assistant_masks"]]
        assert tokenizer.decode(encoded.labels[encoded.labels != IGNORED].tolist()) == "".join(spans(rendered))


def spans(rendered: Rendered) -> list[str]:
    return [rendered.text[begin:end] for begin, end in rendered.supervised]


@pytest.mark.parametrize("talk", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_turns_end_with_their_special_token(talk: list) -> None:
    turns = [message["content"] for message in talk if message["role"] == "assistant"]
    for name in ("chatml", "generation"):
        found = spans(make(ALL[name]).render_supervised(talk))
        assert len(found) == len(turns)
        for span, turn in zip(found, turns, strict=True):
            assert span.endswith("<|im_end|>") and turn in span and "<|im_start|>" not in span


def test_turns_of_other_templates() -> None:
    assert spans(make(LLAMA3).render_supervised(SYSTEM)) == [
        "A  model,\n  so to speak.<|eot_id|>",
        "日本 — nobody's<|eot_id|>",
    ]
    assert spans(make(MISTRAL).render_supervised(TALK)) == [" A  model,\n  so to speak.</s>", " 日本 — nobody's</s>"]
    plain = make("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")  # fmt: skip
    assert spans(plain.render_supervised(TALK))[-1] == "日本 — nobody's\n", "without a special token, all it adds"


def test_a_turn_whose_thoughts_are_dropped_later() -> None:
    """As the templates of Qwen3 do: what is left of an earlier turn is supervised, as with generation blocks."""
    (alone,) = spans(make(FORGETFUL).render_supervised(TALK[:2]))
    assert alone == "<think></think>A  model,\n  so to speak. <|im_end|>"
    assert spans(make(FORGETFUL).render_supervised(TALK)) == [
        "A  model,\n  so to speak. <|im_end|>",
        "<think></think>日本 — nobody's<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("change", "content"),
    [
        (
            (
                "message.content +",
                "(message.content if loop.last or message.role == 'user' else message.content | upper) +",
            ),
            "a",
        ),
        (("message.role +", "(message.role if loop.last else 'it') +"), "a"),
        (("", ""), "a<|im_end|>b"),
        (("<|im_end|>", "."), "a"),
    ],
)
def test_a_turn_that_is_written_otherwise_later_is_refused(change: tuple[str, str], content: str) -> None:
    talk = [TALK[0], {"role": "assistant", "content": content}, *TALK[2:]]
    with pytest.raises(ConfigError, match=r"its\.jinja writes messages\[:2\] otherwise") as caught:
        make(FORGETFUL.replace(*change)).render_supervised(talk)
    assert "{% generation %}" in caught.value.mend and "data.chat_template" in caught.value.mend


def test_blocks_that_are_inside_each_other_or_empty() -> None:
    with pytest.raises(ConfigError, match="inside each other"):
        make("{% generation %}{% generation %}a{% endgeneration %}{% endgeneration %}").render_supervised(HELLO)
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    talk = [{"role": "assistant", "content": content} for content in ("", "a\ufdd0b", "c")]
    with pytest.raises(ConfigError, match="U\\+FDD0"):
        make(text).render_supervised(talk)
    assert make(text).render_supervised([talk[0], talk[2]]) == Rendered("c", ((0, 1),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.__class__.__init__.__globals__ }}", "unsafe"),
        ("{{ raise_exception.__globals__[0] }}", "unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ messages[0].update(role='x') }}", "unsafe|not safely callable"),
        ("{% for i in range(100001) %}{% endfor %}", "[Rr]ange too big"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ 'a' + 1 }}", "str"),
        ("{{ messages[7].role }}", "no element 7"),
        ("{% include 'other' %}", "no loader"),
        ("{{ raise_exception('not this one') }}", "not this one"),
        ("{{ messages[0].role * 100000000000000 }}", "MemoryError"),
        ("{{ cycler() }}", "at least one item"),
        ("{{ 'aaaaaaaaaaa' | truncate(2, leeway=0) }}", "length"),
        ("{{ '\ud800' }}", "surrogates not allowed"),
    ],
)
def test_what_the_sandbox_keeps_in(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make(text).render([dict(HELLO[0])])
    assert "its.jinja" in str(caught.value) and caught.value.mend


def test_what_is_no_template() -> None:
    with pytest.raises(ConfigError, match="is no chat template") as caught:
        make("a\n{% if %}")
    assert caught.value.where == "its.jinja, line 2 of the template"
    for text in ("{% break %}", "{{ f(a=1, a=2) }}", "+".join(["{{ 1", *["1"] * 20_000, "1 }}"]), "{{ 10 ** 100000 }}"):
        with pytest.raises(ConfigError, match="is no chat template"):
            make(text)


def test_blocks_that_are_only_spoken_of_are_none() -> None:
    """In a comment, or as text."""
    for text in ("{# {% generation %} #}", "{% raw %}{% generation %}{% endraw %}"):
        template = make(text + ALL["chatml"])
        assert not template.has_blocks
        assert spans(template.render_supervised(TALK)) == spans(make(ALL["chatml"]).render_supervised(TALK))


def test_the_date_is_the_clocks() -> None:
    template = make(LLAMA3, clock=lambda: datetime(2001, 2, 3))
    assert "Today Date: 03 Feb 2001" in template.render(HELLO)


def copy_tokenizer(folder: Path, **changes: Any) -> Path:
    names = {"eos_token": "<|endoftext|>", **changes}
    (folder / "tokenizer.json").write_bytes((BUILTIN_TOKENIZER / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def test_where_templates_are_looked_up(tmp_path: Path) -> None:
    show = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|"
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": show + "named"}]
    tokenizer = load_tokenizer(str(copy_tokenizer(tmp_path, chat_template=several, unk_token={"content": "<|pad|>"})))
    assert load_chat_template(tokenizer).render(HELLO) == "|<|endoftext|>|<|pad|>|named"
    (tmp_path / "config.json").write_text('{"bos_token_id": 1}')
    tokenizer = load_tokenizer(str(tmp_path))
    (tmp_path / "chat_template.jinja").write_text(show + "file")
    assert load_chat_template(tokenizer).render(HELLO) == "<|im_start|>|<|endoftext|>|<|pad|>|file"
    (tmp_path / "other.jinja").write_text("given")
    given = load_chat_template(tokenizer, str(tmp_path / "other.jinja"))
    assert given.render(HELLO) == "given" and given.digest != load_chat_template(tokenizer).digest
    with pytest.raises(ConfigError, match="cannot be read"):
        load_chat_template(tokenizer, str(tmp_path / "absent.jinja"))


def test_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(copy_tokenizer(tmp_path)))
    with pytest.raises(ConfigError, match="no chat template") as caught:
        load_chat_template(tokenizer)
    assert caught.value.where == str(tmp_path) and "data.chat_template" in caught.value.mend
