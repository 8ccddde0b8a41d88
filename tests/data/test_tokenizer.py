from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import tokenizers

from titanmoe.config.errors import ConfigError
from titanmoe.data.sources import open_stdlib
from titanmoe.data.tokenizer import BUILTIN_TOKENIZER, check_vocab, load_tokenizer
from titanmoe.data.train_tokenizer import SPECIAL_TOKENS, TOKENIZER_CONFIG, VOCAB_SIZE, train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded tokenizer."""
    return Path(shutil.copytree(BUILTIN_TOKENIZER, tmp_path / "tokenizer"))


def set_json(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    content.update(changes)
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "REMOVED"}))


def test_builtin_has_2048_tokens_and_its_special_ones():
    tokenizer = load_tokenizer("builtin")
    assert tokenizer.vocab_size == VOCAB_SIZE == 2048 == tokenizer.backend.get_vocab_size(with_added_tokens=True)
    assert [tokenizer.encode(token) for token in SPECIAL_TOKENS] == [[0], [1], [2], [3]]
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.adds_bos) == (0, None, 3, False)


def test_every_text_round_trips():
    tokenizer = load_tokenizer(None)
    generator = random.Random(0)
    texts = ["", " ", "\r\n\t  x\n\n\n", "def f(x):\n    return x  \n", "\x00\x7f\u00ad", "naïve 日本語 🦊 e\u0301"]
    # All code points below U+0800 use, between them, every first byte up to 0xDF; the others use the rest.
    texts += ["".join(map(chr, range(start, start + 256))) for start in range(0, 0x800, 256)]
    texts += ["".join(chr(generator.choice([0x800, 0x4E00, 0xFFFD, 0x10000, 0x10FFFF])) for _ in range(20))]
    texts += ["".join(chr(generator.randrange(0xD800)) for _ in range(200)) for _ in range(20)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.encode(text)


def test_all_256_bytes_are_tokens():
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert len(alphabet) == 256
    assert set(alphabet) <= load_tokenizer(None).backend.get_vocab().keys()


def test_it_compresses_source_code():
    tokenizer = load_tokenizer(None)
    text = open_stdlib("validation")[0]
    assert len(text) / len(tokenizer.encode(text)) > 2.5


def test_training_is_deterministic_and_the_assets_are_what_the_script_writes():
    source = open_stdlib("validation")
    texts = [source[index] for index in range(len(source))]
    first, second = train(texts), train(texts)
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == VOCAB_SIZE
    builtin = json.loads((BUILTIN_TOKENIZER / "tokenizer.json").read_text())
    trained = json.loads(first.to_str())
    # The merges depend on the standard library's version; everything else does not.
    for content in (builtin, trained):
        content["model"].pop("vocab")
        content["model"].pop("merges")
    assert builtin == trained
    assert json.loads((BUILTIN_TOKENIZER / "tokenizer_config.json").read_text()) == TOKENIZER_CONFIG


def test_too_little_text_to_train_on():
    with pytest.raises(ValueError, match="give more text"):
        train(["abc abc"])


def test_transformers_agrees():
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(BUILTIN_TOKENIZER)
    ours = load_tokenizer(None)
    text = "class A:\n    pass  # <|im_end|> 日本\n"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chat = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("eos", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_eos_as_string_or_object(folder: Path, eos: object):
    set_json(folder / "tokenizer_config.json", eos_token=eos)
    assert load_tokenizer(str(folder)).eos_id == 2


def test_eos_from_the_model_configs(folder: Path):
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="no end-of-sequence token") as caught:
        load_tokenizer(str(folder))
    assert str(folder) in str(caught.value)
    set_json(folder / "generation_config.json", eos_token_id=[2, 0])
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 2)
    set_json(folder / "config.json", eos_token_id=0, bos_token_id=1)
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.adds_bos) == (0, 1, False)


def test_bos_is_added_if_the_tokenizer_adds_it(folder: Path):
    set_json(folder / "tokenizer_config.json", bos_token="<|im_start|>")
    assert not load_tokenizer(str(folder)).adds_bos
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.adds_bos and tokenizer.bos_id == 1
    assert tokenizer.encode("a") == load_tokenizer(None).encode("a")
    set_json(folder / "tokenizer_config.json", add_bos_token=False)
    assert not load_tokenizer(str(folder)).adds_bos
    set_json(folder / "tokenizer_config.json", add_bos_token=True)
    assert load_tokenizer(str(folder)).adds_bos


def test_truncation_and_padding_in_the_file_are_not_obeyed(folder: Path):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    text = "one two three four five six seven"
    assert load_tokenizer(str(folder)).encode(text) == load_tokenizer(None).encode(text)


def test_added_tokens_count_in_the_vocabulary(folder: Path):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<|extra|>"])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.vocab_size == 2049 == tokenizer.encode("<|extra|>")[0] + 1
    assert tokenizer.fingerprint != load_tokenizer(None).fingerprint
    check_vocab(tokenizer, 2049)
    with pytest.raises(ConfigError, match="2,049 ids, the model's vocabulary only 2,048"):
        check_vocab(tokenizer, 2048)


def test_the_fingerprint_follows_eos(folder: Path):
    assert load_tokenizer(str(folder)).fingerprint == load_tokenizer(None).fingerprint
    set_json(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    assert load_tokenizer(str(folder)).fingerprint != load_tokenizer(None).fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", '{"version": "1.0", "model": ', "not a valid tokenizer.json"),
        ("tokenizer.json", "", "not a valid tokenizer.json"),
        ("tokenizer.json", "[]", "not a valid tokenizer.json"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}', "no tokens"),
        ("tokenizer_config.json", '{"eos_token": ', "not valid JSON"),
        ("tokenizer_config.json", "[1]", "a JSON list"),
        ("tokenizer_config.json", '{"eos_token": "<nope>"}', "'<nope>', which tokenizer.json does not hold"),
        ("config.json", '{"bos_token_id": 2048}', "bos_token_id is 2048"),
        ("config.json", '{"bos_token_id": "x"}', "bos_token_id is 'x'"),
    ],
)
def test_broken_files(folder: Path, name: str, content: str, message: str):
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(str(folder))
    assert name in str(caught.value) and caught.value.mend


def test_a_cut_off_file(folder: Path):
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="not a valid tokenizer"):
        load_tokenizer(str(folder))


def test_missing_files(folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="no such directory"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="is a file"):
        load_tokenizer(str(folder / "tokenizer.json"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(ConfigError, match=r"holds tokenizer\.model but no tokenizer\.json") as caught:
        load_tokenizer(str(folder))
    assert "AutoTokenizer" in caught.value.mend
