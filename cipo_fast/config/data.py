"""What is asked."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from cipo_fast.config.section import Positive, Section
from cipo_fast.config.settings import NameOrFunction, Sources


def _day(value: Any) -> Any:
    """A text as the day that it is, YYYY-MM-DD alone: pydantic takes seconds since 1970 and more."""
    if value is None or type(value) is datetime.date:
        return value
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", str(value)):
        raise PydanticCustomError("day", "expected a day as YYYY-MM-DD")
    try:
        return datetime.date.fromisoformat(str(value))
    except ValueError:
        raise PydanticCustomError("day", "there is no such day") from None


Format = Literal[
    "own", "qa", "aime", "amc23", "math500", "math", "minerva", "olympiadbench", "gsm8k", "dapo", "humaneval", "mbpp",
    "livecodebench", "criticbench", "debugbench",
]  # fmt: skip


class DataConfig(Section):
    task: Literal["trace", "sort", "add", "carry", "chain", "shoot", "subset", "latin"] = "trace"
    """Embedded task, used when `data.train` is not given; cipo_fast/embedded/tasks says what they are [ours]."""
    task_size: Positive | None = None
    """Its steps, letters, digits, hops or blanks; None: the task's own number [ours]."""
    train: Sources = None
    """JSON Lines or Parquet files, `hub:OWNER/NAME[:CONFIG[:SPLIT]]`, one or a list: `prompt` or `messages`, and
    `answer` or tests; TRL's or verl's form; or a public data set's own."""
    eval: Sources = None
    """Held-out problems, the same. Without it `eval.problems` (a tenth at most) are held out of `data.train`."""
    weights: list[Annotated[float, Field(gt=0, le=1000)]] | None = None
    """How often an epoch has each row of each source of `data.train`: 2 is twice, 0.5 another half each time; None: 1
    each [ours]."""
    format: Format | None = None
    """Whose form the rows have; None: told from their fields, row by row."""
    verifier: NameOrFunction | None = None
    """exact, math, code, or `path/to/file.py:function` (a function of response and row); None: what a row names, else
    what its form implies, else exact [ours]."""
    math: dict[str, Any] = Field(default={})
    """What math answers may look like, over the form's own defaults and under a row's `policy`: docs/verifiers.md."""
    instruction: Annotated[str, Field(min_length=1)] = "auto"
    """Ends the last turn of a prompt; auto: asks for a box (math) or one program (code) where the prompt does not yet;
    none: nothing [ours]."""
    max_prompt_tokens: Positive = 2048
    """Longer prompts are dropped and counted."""
    system_prompt: str | None = None
    """System turn before every problem that has none of its own, in training and evaluation [ours]."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Arguments of the chat template, such as {enable_thinking: false}, in every prompt [transformers, vLLM]."""
    date: Annotated[datetime.date | None, BeforeValidator(_day)] = None
    """Today to a chat template that prints it, YYYY-MM-DD; None: the day the run starts, kept on resuming [ours]."""

    def sources(self, of: Literal["train", "eval"]) -> list[Path | str]:
        """The files and hub data sets of `data.train` or `data.eval`, [] where it is not given."""
        given = self.train if of == "train" else self.eval
        return given if isinstance(given, list) else [] if given is None else [given]
