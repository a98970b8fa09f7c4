"""English text that every Python ships with, as byte tokens, and which sample is which.

The text is the language reference behind `help()` (`pydoc_data.topics`, about 700 kB). A sample is
a pure function of its number, so a run that resumes after n samples goes on with sample n.
"""

from __future__ import annotations

import functools
import random

import torch

_HELD_OUT = 0.1


@functools.lru_cache(maxsize=4)
def tokens(*, held_out: bool, vocab_size: int = 256) -> torch.Tensor:
    """Byte tokens of one split of the text: `[length]` int64, folded into `vocab_size`.

    The last tenth of the text is held out of training.
    """
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    cut = int(len(text) * (1 - _HELD_OUT))
    part = text[cut:] if held_out else text[:cut]
    return torch.frombuffer(bytearray(part), dtype=torch.uint8).long() % vocab_size


def sample(
    number: int, *, seq_length: int, seed: int, vocab_size: int = 256, held_out: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next-token labels of sample `number`, each `[seq_length]` int64.

    Training samples start at a place drawn from (seed, number); held-out samples follow each other
    through the text, from the start again when it ends.
    """
    text = tokens(held_out=held_out, vocab_size=vocab_size)
    places = len(text) - seq_length - 1
    if held_out:
        start = number * seq_length % places
    else:
        start = random.Random(f"{seed}/{number}").randrange(places)
    window = text[start : start + seq_length + 1]
    return window[:-1], window[1:]


def batch(
    numbers: list[int], *, seq_length: int, seed: int, vocab_size: int = 256, held_out: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of several samples, each `[len(numbers), seq_length]`; see `sample`."""
    pairs = [
        sample(number, seq_length=seq_length, seed=seed, vocab_size=vocab_size, held_out=held_out)
        for number in numbers
    ]
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])
