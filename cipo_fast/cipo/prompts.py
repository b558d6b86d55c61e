"""How a problem and an attempt become token ids. Sampled ids are joined to glue ids taken once from the chat
template, never rendered again: templates strip parts of an answer, and re-tokenising drifts."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from cipo_fast.config import CorrectionConfig
from cipo_fast.errors import UserError
from cipo_fast.records import Message, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for the attempt while the template's text around it is cut out.
_SENTINEL = "ATTEMPT-7f3a9c"
_VERDICT = {True: "The answer above is right. ", False: "The answer above is wrong. "}


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: tuple[Message, ...]) -> list[int]:
    """The prompt as the policy sees it: the template's rendering, up to where its answer begins."""
    ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)
    return cast(list[int], ids)


class CorrectionPrompts:
    """Builds correction prompts; one object a run, because the glue is taken from the template once.

    `followup` [ours]: prompt, attempt as sampled, glue (end of turn, short user turn, start of answer).
    `quoted` [f2f]: one user turn with the task, the attempt's text and the instruction.
    The verdict is not shown [f2f, ours], unless `verdict=shown`: a control.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: CorrectionConfig):
        self.tokenizer = tokenizer
        self.config = config
        self.glue = {right: self._glue(right) for right in (True, False)} if config.layout == "followup" else {}

    def instruction(self, right: bool) -> str:
        return (_VERDICT[right] if self.config.verdict == "shown" else "") + self.config.followup

    def __call__(self, rollout: Rollout) -> tuple[list[int], list[int] | None] | None:
        """(prompt_ids, glue_ids) in layout=followup, (prompt_ids, None) in layout=quoted; None where too long."""
        right = rollout.reward > 0
        if self.config.layout == "quoted":
            prompt_ids, glue_ids = self._quoted(rollout, right), None
            length = len(prompt_ids)
        else:
            prompt_ids, glue_ids = rollout.prompt_ids, self.glue[right]
            if rollout.token_ids[-1] == glue_ids[0]:  # the sampled end of turn is the template's own
                glue_ids = glue_ids[1:]
            length = len(prompt_ids) + len(rollout.token_ids) + len(glue_ids)
        return (prompt_ids, glue_ids) if length <= self.config.max_prompt_tokens else None

    def _quoted(self, rollout: Rollout, right: bool) -> list[int]:
        *before, last = rollout.problem.messages
        text = f"{last['content']}\n\n{rollout.text.strip()}\n\n{self.instruction(right)}"
        return chat_ids(self.tokenizer, (*before, {**last, "content": text}))

    def _glue(self, right: bool) -> list[int]:
        conversation = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _SENTINEL},
            {"role": "user", "content": self.instruction(right)},
        ]
        text = self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        _, found, tail = cast(str, text).partition(_SENTINEL)
        if not found:
            raise UserError("model.path: its chat template drops earlier answers; use correction.layout=quoted")
        return self.tokenizer(tail, add_special_tokens=False)["input_ids"]
