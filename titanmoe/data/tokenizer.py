"""Tokenizers: the embedded one, or a Hugging Face directory with a tokenizer.json.

Text is encoded as Hugging Face does it, special tokens written in the text included (a document that holds the
characters `<|im_end|>` gets that token), but nothing is added: the loader places bos and eos itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titanmoe.config.errors import ConfigError

if TYPE_CHECKING:
    import tokenizers

BUILTIN_TOKENIZER = Path(__file__).parent / "assets" / "tokenizer"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with the ids the loader needs.

    Attributes:
        vocab_size: largest id + 1, added tokens included; what the model's embedding must cover.
        eos_id: ends a document.
        bos_id: begins a document, or None if the tokenizer names none.
        pad_id: fills unused positions; eos_id if the tokenizer names none.
        adds_bos: whether every document begins with bos_id, from the tokenizer's own rules.
        fingerprint: changes when the encoding of a document may change.
        folder: where its files are.
    """

    backend: tokenizers.Tokenizer
    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int
    adds_bos: bool
    fingerprint: str
    folder: Path

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; bos and eos are not added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, encoded without holding Python's global lock."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_batch_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Token ids of each text, and the range of characters that each token covers."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)


def load_tokenizer(path: str | None) -> Tokenizer:
    """Load the tokenizer of a directory in Hugging Face format.

    Args:
        path: a directory with tokenizer.json, whose eos, bos and pad tokens are read from tokenizer_config.json, else
            from config.json, else from generation_config.json; None or "builtin" is the embedded tokenizer.

    Raises:
        ConfigError: a file is missing or broken, or no file names an end-of-sequence token.
    """
    import tokenizers

    # The Rust thread pool does not survive a fork and would fight with the training threads: one thread
    # encodes about a million tokens a second, far more than a rank consumes.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    folder = BUILTIN_TOKENIZER if path in (None, "builtin") else Path(str(path))
    file = _tokenizer_file(folder)
    try:
        content = file.read_bytes()
        backend = tokenizers.Tokenizer.from_buffer(content)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(file), mend="Make it readable.") from error
    except Exception as error:  # the Rust side raises plain Exception, or ValueError, for whatever it cannot parse
        raise ConfigError(
            f"is not a valid tokenizer.json: {error}",
            where=str(file),
            mend="The file may be cut off or of another format: copy it again from the model's repository.",
        ) from error
    # Some published files limit every text to 512 tokens or pad it; documents need all of theirs and nothing else.
    backend.no_truncation()
    backend.no_padding()
    vocab = backend.get_vocab(with_added_tokens=True)
    if not vocab:
        raise ConfigError("holds no tokens", where=str(file), mend="Copy it again from the model's repository.")
    vocab_size = max(vocab.values()) + 1

    names = read_json(folder / "tokenizer_config.json")
    numbers = {**read_json(folder / "generation_config.json"), **read_json(folder / "config.json")}

    def special_id(kind: str) -> int | None:
        entry = names.get(f"{kind}_token")
        token = entry.get("content") if isinstance(entry, dict) else entry
        if token is not None:
            if token not in vocab:
                raise ConfigError(
                    f"{kind}_token is {token!r}, which tokenizer.json does not hold",
                    where=str(folder / "tokenizer_config.json"),
                    mend="Both files must come from the same model.",
                )
            return vocab[token]
        number = numbers.get(f"{kind}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if number is None:
            return None
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < vocab_size:
            raise ConfigError(
                f"{kind}_token_id is {number!r}, but tokenizer.json has the ids 0 to {vocab_size - 1}",
                where=str(folder / "config.json"),
                mend=f"Name the {kind}_token in tokenizer_config.json.",
            )
        return number

    eos_id, bos_id, pad_id = special_id("eos"), special_id("bos"), special_id("pad")
    if eos_id is None:
        raise ConfigError(
            "no end-of-sequence token is named",
            where=str(folder),
            mend='Add tokenizer_config.json with "eos_token" (the token that ends a document), '
            'or config.json with "eos_token_id".',
        )
    adds_bos = names.get("add_bos_token")
    if adds_bos is None:
        adds_bos = backend.encode("", add_special_tokens=True).ids[:1] == [bos_id]
    adds_bos = bool(adds_bos) and bos_id is not None
    digest = hashlib.sha256(content + repr((eos_id, bos_id if adds_bos else None)).encode())
    return Tokenizer(
        backend=backend,
        vocab_size=vocab_size,
        eos_id=eos_id,
        bos_id=bos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        adds_bos=adds_bos,
        fingerprint=digest.hexdigest()[:16],
        folder=folder,
    )


def check_vocab(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raise ConfigError if the tokenizer has ids that a model with `model_vocab_size` embeddings does not."""
    if tokenizer.vocab_size > model_vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, the model's vocabulary only {model_vocab_size:,}",
            where="model.tokenizer_path",
            mend="Use the model's own tokenizer (model.hf_assets_path), or a flavor with a larger vocabulary; "
            "model.tokenizer_path=builtin is the embedded tokenizer with 2,048 ids.",
        )


def _tokenizer_file(folder: Path) -> Path:
    if not folder.is_dir():
        what = "is a file, where a directory is expected" if folder.exists() else "no such directory"
        raise ConfigError(
            what,
            where=str(folder),
            mend="Give the directory that holds tokenizer.json as model.hf_assets_path or model.tokenizer_path, "
            "or model.tokenizer_path=builtin for the embedded tokenizer.",
        )
    file = folder / "tokenizer.json"
    if not file.exists():
        others = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).exists()]
        found = f"holds {', '.join(others)} but no tokenizer.json" if others else "holds no tokenizer.json"
        raise ConfigError(
            found,
            where=str(folder),
            mend=f"Convert it with transformers: AutoTokenizer.from_pretrained({str(folder)!r})"
            f".save_pretrained({str(folder)!r}), or give model.tokenizer_path=builtin.",
        )
    return file


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if the file does not exist."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(file), mend="Make it readable.") from error
    except ValueError as error:
        raise ConfigError(
            f"is not valid JSON: {error}", where=str(file), mend="Copy it again from the model's repository."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"holds a JSON {type(content).__name__}, where an object is expected",
            where=str(file),
            mend="Copy it again from the model's repository.",
        )
    return content
