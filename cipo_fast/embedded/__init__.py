"""The toy, all of it: a tokenizer, a tiny Qwen3, seven tasks, supervised first steps [ours].

model.py    tokenizer and shape            problems.py      the problems of a task, made by seed
prepare.py  the model folder, cached       warm_start.py    the supervised first steps
tasks/      the tasks, a file each         verifiers.py     who judges those with many right answers

`prepare` makes a model folder with problems beside it; from there on `embedded` is a `model.path` like any other.
`python -m cipo_fast.embedded [settings]` makes the folder alone, and prints its name.
"""

from cipo_fast.embedded.model import embedded_config, embedded_tokenizer, new_model

__all__ = ["embedded_config", "embedded_tokenizer", "new_model"]
