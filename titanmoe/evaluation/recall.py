"""Whether a model says now what it did not say before: the check of training on a fact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from titanmoe.evaluation.sampling import Sampling
from titanmoe.evaluation.text_model import Prompt, TextModel


@dataclass(frozen=True)
class Answers:
    """What one model answered.

    Attributes:
        wanted: whether the texts must contain the answer, or must lack it.
        recalled: how many of them contain it.
    """

    source: str
    wanted: bool
    texts: list[str]
    recalled: int

    @property
    def passed(self) -> bool:
        return self.recalled == (len(self.texts) if self.wanted else 0)


def recall(
    before: Sequence[str],
    after: Sequence[str],
    question: Prompt,
    answer: str,
    load: Callable[[str], TextModel],
    *,
    num_samples: int,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[Answers]:
    """Ask every model the same question several times; only one of them is in memory at a time.

    Args:
        before: checkpoints none of whose samples may contain the answer.
        after: checkpoints all of whose samples must.
        answer: a part of the text, in these letters.
        load: makes the model of a checkpoint.
    """
    found = []
    for source, wanted in [*((name, False) for name in before), *((name, True) for name in after)]:
        speaker = load(source)
        samples = speaker.generate([question] * num_samples, max_new_tokens=max_new_tokens, sampling=sampling)
        texts = [speaker.decode(sample.tokens) for sample in samples]
        found.append(Answers(source, wanted, texts, sum(answer in text for text in texts)))
        del speaker
    return found
