"""Random conversations for tests: trees of sampled and context segments, of any depth."""

import numpy as np

from cipo_fast.records import Conversation, Segment


def random_conversations(
    seed: int, n_trees: int = 3, depth: int = 4, vocab: int = 50, max_len: int = 6, max_children: int = 3
) -> list[Conversation]:
    """Conversations whose shared segments form `n_trees` random trees at most `depth` segments deep below the prompt.

    Segments are 1 to `max_len` tokens; some siblings are equal token for token, with other advantages.
    """
    rng = np.random.default_rng(seed)
    found: list[Conversation] = []

    def tokens() -> list[int]:
        return rng.integers(vocab, size=rng.integers(1, max_len + 1)).tolist()

    def grow(path: tuple[Segment, ...], below: int) -> None:
        previous: list[int] | None = None
        for _ in range(rng.integers(1, max_children + 1)):
            ids = previous if previous is not None and rng.random() < 0.2 else tokens()
            previous = ids
            segment = Segment(ids)
            if below == 1 or rng.random() < 0.7:
                logps = (-rng.random(len(ids)) * 4).tolist()
                weights = rng.random(2) * (rng.random(2) < 0.8)
                found.append(
                    Conversation(
                        (*path, segment),
                        logps,
                        str(rng.choice(["rollout", "correction"])),
                        rng.normal(),
                        *weights.tolist(),
                    )
                )
                if below > 1 and rng.random() < 0.6:
                    grow((*path, segment), below - 1)
            else:  # context alone (glue): something must follow
                grow((*path, segment), below - 1)

    for _ in range(n_trees):
        grow((Segment(tokens()),), int(rng.integers(1, depth + 1)))
    return found
