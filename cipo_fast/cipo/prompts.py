"""How a problem and an attempt become token ids. Sampled ids are joined to glue ids taken once from the chat
template, never rendered again: templates strip parts of an answer, and re-tokenising drifts."""

from __future__ import annotations

from collections.abc import Sequence

from cipo_fast.chat import Chat, Glue
from cipo_fast.config import CorrectionConfig
from cipo_fast.errors import UserError
from cipo_fast.records import Message, Rollout

_VERDICT = {True: "The answer above is right. ", False: "The answer above is wrong. "}


class CorrectionPrompts:
    """Builds correction prompts; one object a run, because the glue is taken from the template once.

    `followup` [ours]: prompt, attempt as sampled, glue (end of turn, short user turn, start of answer). An attempt that
    ended with the template's end of turn has it once. One that ended otherwise (a base model's end of text) keeps its
    end, as sampled, and the template's end of turn follows, so that the turns are those the template knows.
    `quoted` [f2f]: one user turn with the task, the attempt's text and the instruction.
    The verdict is not shown [f2f, ours], unless `verdict=shown`: a control.
    """

    def __init__(self, chat: Chat, config: CorrectionConfig):
        self.chat = chat
        self.config = config
        self.glue: dict[bool, Glue] = {}
        for right in (True, False):
            if config.layout == "followup":
                self.glue[right] = chat.glue(self.instruction(right), "correction.followup")
            else:
                asked = Message(role="user", content="?")
                chat.prompt(self._quoting([asked], "?", right), "correction.followup")  # refuses what cannot be shown

    def instruction(self, right: bool) -> str:
        return (_VERDICT[right] if self.config.verdict == "shown" else "") + self.config.followup

    def __call__(self, rollout: Rollout) -> tuple[list[int], list[int] | None] | None:
        """(prompt_ids, glue_ids) in layout=followup, (prompt_ids, None) in layout=quoted; None where it is too long, or
        where a quoted attempt spells a control token, which would end the turn that quotes it."""
        right = rollout.reward > 0
        if self.config.layout == "quoted":
            messages = self._quoting(rollout.problem.messages, rollout.text.strip(), right)
            try:
                prompt_ids, glue_ids = self.chat.prompt(messages, rollout.problem.where), None
            except UserError:
                return None
            length = len(prompt_ids)
        else:
            glue = self.glue[right]
            ended = rollout.token_ids[-1] == self.chat.end_of_turn
            prompt_ids, glue_ids = rollout.prompt_ids, glue.after_end if ended else glue.token_ids
            length = len(prompt_ids) + len(rollout.token_ids) + len(glue_ids)
        return (prompt_ids, glue_ids) if length <= self.config.max_prompt_tokens else None

    def _quoting(self, messages: Sequence[Message], attempt: str, right: bool) -> list[Message]:
        *before, last = messages
        return [*before, {**last, "content": f"{last['content']}\n\n{attempt}\n\n{self.instruction(right)}"}]
