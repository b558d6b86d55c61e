"""The toy, all of it: a tokenizer, a tiny Qwen3, two tasks, supervised first steps [ours].

model.py    tokenizer and shape            problems.py     `sort` and `add`, made by seed
prepare.py  the model folder, cached       warm_start.py   the supervised first steps

`prepare` makes a model folder with problems beside it; from there on `embedded` is a `model.path` like any other.
`python -m cipo_fast.embedded [settings]` makes the folder alone, and prints its name.
"""

from cipo_fast.embedded.model import embedded_config, embedded_tokenizer, new_model

__all__ = ["embedded_config", "embedded_tokenizer", "new_model"]
