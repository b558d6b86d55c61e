"""Wrong answers by random edits, where a task has none of its own."""

from __future__ import annotations

import string

import numpy as np


def edited(question: str, answer: str, rng: np.random.Generator) -> str:
    """One to six edits, such as a half-trained model makes: two characters swapped, one replaced by one of its kind,
    or one lost and another doubled. Few edits alone would teach to copy the attempt."""
    characters = list(answer)
    for _ in range(rng.integers(1, 7)):
        i, j = rng.integers(len(characters), size=2)
        edit = rng.integers(3)
        if edit == 0:
            characters[i], characters[j] = characters[j], characters[i]
        elif edit == 1:
            kind = string.digits if characters[i].isdigit() else string.ascii_lowercase
            characters[i] = kind[rng.integers(len(kind))]
        else:
            doubled = characters[j]
            del characters[i]
            characters.insert(min(j, len(characters)), doubled)
    return "".join(characters)
