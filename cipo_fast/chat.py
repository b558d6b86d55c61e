"""A tokenizer and its chat template as one run uses them: the one way from messages to token ids and back.

Training, corrections, evaluation and warm start all take their prompts here, so that system prompt, template arguments
and date are the same everywhere. A template is foreign code and a row is foreign text: what either does that a run
cannot stand is a UserError that names the row.
"""

from __future__ import annotations

import datetime
import difflib
import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cipo_fast.config import Config, DataConfig, read_config
from cipo_fast.errors import UserError
from cipo_fast.records import Message, blank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for a message's text where the template's own part is wanted.
# Neither letters nor blanks, which a template may change.
_PLACE = "7039.2816.{}."
_MOST_BYTES = 4  # of a character in UTF-8, each of which may be a token


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, transformers' mark around answers: what is inside."""

    tags: set[str] = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class Glue:
    """What stands between an attempt and its correction: end of turn, a user turn, the start of an answer."""

    token_ids: list[int]
    after_end: list[int]  # the same behind the template's end of turn, for an attempt that has sampled it


def pinned_date(config: Config, resuming: bool) -> Config:
    """`config` with data.date set: as given, else that of the run which is resumed, else today."""
    if config.data.date is not None:
        return config
    pinned = config.model_copy(deep=True)
    pinned.data.date = datetime.date.today()
    recorded = config.run_dir / "config.yaml"
    if resuming and recorded.is_file():
        try:
            pinned.data.date = read_config(recorded).data.date or pinned.data.date
        except UserError as error:
            raise UserError(f"{error}; data.date says the day that run started") from None
    return pinned


class Chat:
    """Raises UserError where the template cannot be used with `config` (data.*) at all."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig):
        self.tokenizer = tokenizer
        self.system_prompt = config.system_prompt
        if self.system_prompt is not None and blank(self.system_prompt):
            raise UserError("data.system_prompt is blank: leave it out, or null for none")
        day = config.date or datetime.date.today()
        self.arguments = dict(config.chat_template_kwargs)
        self._check_arguments()
        # A render argument hides the global of that name, transformers' clock.
        self.arguments["strftime_now"] = day.strftime
        self._texts: dict[int, str] = {}  # of tokens that are whole characters, for `pieces`
        self._own: dict[tuple[str, ...], Counter[int]] = {}  # roles -> control tokens that the template writes
        self.control = self._control_tokens()
        user = Message(role="user", content="?")
        self.prompt([user], "model.path" if self.system_prompt is None else "data.system_prompt")
        self.end_of_turn = self._end_of_turn()

    # ------------------------------------------------------------------------------------------------------- prompts

    def prompt(self, messages: Sequence[Message], where: str) -> list[int]:
        """The conversation as the policy sees it, up to where its answer begins. `where` names it in an error.

        A control token is one that the template writes, never one that a text spells.
        """
        messages = self._with_system(messages)
        ids = self._encode(self._render(messages, where), where)
        roles = tuple(message["role"] for message in messages)
        if roles not in self._own:
            self._own[roles] = self._template_alone(roles, where)
        self._refuse_spelled(ids, self._own[roles], where)
        return ids

    def glue(self, instruction: str, where: str) -> Glue:
        """The turn `instruction` after an answer, as ids to be joined to the answer's own."""
        attempt = _PLACE.format(1)
        found = [self._glue_ids(attempt, text, where) for text in (instruction, _PLACE.format(2))]
        ids, own = found
        self._refuse_spelled(ids, self._count(own), where)
        at = ids.index(self.end_of_turn) + 1 if self.end_of_turn in ids else 0
        return Glue(ids, ids[at:])

    def _glue_ids(self, attempt: str, instruction: str, where: str) -> list[int]:
        turns = [("user", "?"), ("assistant", attempt), ("user", instruction)]
        text = self._render(self._with_system([Message(role=r, content=c) for r, c in turns]), where)
        head, found, tail = text.rpartition(attempt)
        if not found:
            raise UserError("model.path: its chat template drops earlier answers; use correction.layout=quoted")
        before, whole = self._encode(head + found, where), self._encode(text, where)
        # Cut from the whole where no token lies across the cut: some tokenizers treat a text's start as a word's start.
        return whole[len(before) :] if whole[: len(before)] == before else self._encode(tail, where)

    # ------------------------------------------------------------------------------------------------------- answers

    def answer(self, text: str) -> list[int]:
        """An answer as the policy would sample it: its tokens, none of them a special one, and the end of turn."""
        end = self.tokenizer.eos_token_id if self.end_of_turn is None else self.end_of_turn
        return [*self._ids(text, split_special_tokens=True), end]

    def text(self, token_ids: Sequence[int]) -> str:
        """An answer for the verifier: without special tokens, and with the spaces that it has. Added tokens that are
        not special, such as <think>, are text."""
        found = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, found)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token, special ones too. A character that several tokens spell is the first one's, and the
        others are empty."""
        whole = [self._texts.get(token) for token in token_ids]
        return self._pieces(token_ids) if None in whole else cast(list[str], whole)

    def _pieces(self, token_ids: Sequence[int]) -> list[str]:
        found: list[str] = []
        waiting: list[int] = []  # tokens of a character that is not whole yet
        for i, token in enumerate(token_ids, 1):
            waiting.append(token)
            text = cast(str, self.tokenizer.decode(waiting, clean_up_tokenization_spaces=False))
            if "\ufffd" not in text or len(waiting) == _MOST_BYTES or i == len(token_ids):
                if len(waiting) == 1 and "\ufffd" not in text:
                    self._texts[token] = text
                found += [text, *[""] * (len(waiting) - 1)]
                waiting = []
        return found

    def end_ids(self, generation_config: Any) -> list[int]:
        """Every token that ends an answer: the tokenizer's, the template's, and those of a `GenerationConfig`."""
        more = getattr(generation_config, "eos_token_id", None)
        more = more if isinstance(more, list) else [more]
        return sorted({i for i in (self.tokenizer.eos_token_id, self.end_of_turn, *more) if i is not None})

    def names(self, token_ids: Sequence[int]) -> str:
        return ", ".join(f"{self.tokenizer.convert_ids_to_tokens(i)} ({i})" for i in token_ids)

    def refuse_beyond(self, embeddings: int) -> None:
        """Raise UserError where the tokenizer has ids that a model of that many embeddings has not."""
        highest = max(self.tokenizer.get_vocab().values())
        if highest >= embeddings:
            raise UserError(
                f"model.path: its tokenizer has ids up to {highest}, the model {embeddings} embeddings: take tokenizer "
                "and model of one release, or resize the model's embeddings"
            )

    # ------------------------------------------------------------------------------------------------------- template

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.system_prompt is None or any(message["role"] == "system" for message in messages):
            return list(messages)
        return [Message(role="system", content=self.system_prompt), *messages]

    def _render(self, messages: Sequence[Message], where: str, answer_next: bool = True) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=answer_next, tokenize=False, **self.arguments
            )
        except Exception as error:
            raise _says(where, error) from None
        return cast(str, text)

    def _encode(self, text: str, where: str) -> list[int]:
        try:
            return self._ids(text)
        except (TypeError, UnicodeEncodeError):
            raise UserError(f"{where}: not text that can be encoded (half a character, a lone surrogate?)") from None

    def _ids(self, text: str, **how: bool) -> list[int]:
        """Tokens of `text`. A tokenizer's own limit is no news: this run's limits are settings."""
        return cast(list[int], self.tokenizer(text, add_special_tokens=False, verbose=False, **how)["input_ids"])

    def _template_alone(self, roles: tuple[str, ...], where: str) -> Counter[int]:
        """The control tokens of a conversation whose texts have none; raises UserError where a text is left out."""
        messages = [Message(role=role, content=_PLACE.format(i)) for i, role in enumerate(roles)]
        text = self._render(messages, where)
        for i, role in enumerate(roles):
            if _PLACE.format(i) not in text:
                raise UserError(f"{where}: the chat template leaves out the {role} turn (message {i + 1}): remove it")
        return self._count(self._encode(text, where))

    def _count(self, ids: Sequence[int]) -> Counter[int]:
        return Counter(i for i in ids if i in self.control)

    def _refuse_spelled(self, ids: Sequence[int], own: Counter[int], where: str) -> None:
        spelled = self._count(ids) - own
        if spelled:
            token = self.tokenizer.convert_ids_to_tokens(next(iter(spelled)))
            raise UserError(
                f"{where}: the text spells the control token {token}, which would end or forge a turn: take it out"
            )

    def _control_tokens(self) -> set[int]:
        """Those flagged as special, and the added ones that the template sets around turns (DeepSeek's roles are not
        flagged). Not the unknown token, which any text may hold."""
        tokenizer = self.tokenizer
        added = tokenizer.added_tokens_decoder
        found = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        turn = self._render([Message(role="user", content="?")], "model.path", answer_next=False)
        found |= {i for i in self._encode(turn, "model.path") if i in added}
        if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            found.discard(tokenizer.unk_token_id)
        return found

    def _end_of_turn(self) -> int | None:
        """The control token that the template sets behind an answer; None where it sets text or nothing."""
        try:
            ids = self._glue_ids(_PLACE.format(1), _PLACE.format(2), "model.path")
        except UserError:  # a template of single turns: followup will say so
            return None
        for i, token in enumerate(ids):
            if token in self.control:
                return None if self.text(ids[:i]).strip() else token
        return None

    def _check_arguments(self) -> None:
        """Arguments are the template's, and it reads them: a misspelled one would do nothing. A word of its text, a
        loop's variable and what it sets itself are not read."""
        if not self.arguments:
            return
        taken = set(inspect.signature(self.tokenizer.apply_chat_template).parameters) - {"tools", "documents"}
        taken |= {"messages", "strftime_now"}
        read = self._variables() - taken
        for name in self.arguments:
            if name in taken:
                raise UserError(
                    f"data.chat_template_kwargs.{name}: not an argument of the template, this program's own; leave it "
                    "out"
                )
            if name not in read:
                near = difflib.get_close_matches(name, sorted(read), n=1)
                raise UserError(
                    f"data.chat_template_kwargs.{name}: the chat template does not read it"
                    + (f"; did you mean {near[0]!r}?" if near else "")
                )

    def _variables(self) -> set[str]:
        """What the template that is rendered reads and does not set."""
        # As transformers' own environment parses it.
        environment = ImmutableSandboxedEnvironment(extensions=[_Generation, loopcontrols])
        environment.globals |= {"raise_exception": None, "strftime_now": None}
        try:
            return find_undeclared_variables(environment.parse(self.tokenizer.get_chat_template()))
        except Exception as error:
            raise _says("model.path", error) from None


def _says(where: str, error: Exception) -> UserError:
    """Whatever foreign code raises, in one line."""
    return UserError(f"{where}: the chat template says: {' '.join(str(error).split()) or type(error).__name__}")
