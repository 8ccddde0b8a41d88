"""Train the embedded tokenizer: `python -m titanmoe.data.train_tokenizer [--output DIR]`.

A byte-level BPE of 2,048 tokens, trained on the standard library of the Python that runs this. The result depends
on nothing but those files.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from titanmoe.data.sources import open_stdlib
from titanmoe.data.tokenizer import BUILTIN_TOKENIZER

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger("titanmoe.data")

VOCAB_SIZE = 2048
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")

# Words with one leading character, single digits, runs of punctuation, and line ends with their indentation.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|pad|>",
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}


def train(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE of VOCAB_SIZE tokens in all, the special ones first, then the 256 bytes.

    Raises:
        ValueError: the texts are too few for that many merges.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the texts gave {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}: give more text")
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded tokenizer from the standard library's sources.")
    parser.add_argument("--output", type=Path, default=BUILTIN_TOKENIZER, help="directory to write to")
    output: Path = parser.parse_args().output
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    source = open_stdlib("train")
    tokenizer = train(source[index] for index in range(len(source)))
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output / "tokenizer.json"))
    (output / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n", encoding="utf-8")
    logger.info("wrote %s (%d tokens, from %d files)", output / "tokenizer.json", VOCAB_SIZE, len(source.files))


if __name__ == "__main__":
    main()
