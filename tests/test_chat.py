"""The tokenizer and its template as a run uses them, on templates that do what those of public models do."""

import datetime
import logging
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from cipo_fast.chat import Chat, pinned_date
from cipo_fast.cipo.prompts import CorrectionPrompts
from cipo_fast.config import CorrectionConfig, DataConfig, load_config
from cipo_fast.errors import UserError
from cipo_fast.records import Problem, Rollout
from cipo_fast.sampling import count_unreachable, encode_prompts

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Llama 2 and early Mistral: no system turn, blanks around an answer, bos before every exchange.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (  # nothing but text around turns
    "{% for m in messages %}{{ m.role | upper + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
# GLM: the next role's token is all that ends a turn; earlier answers get an empty thought.
GLM = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think></think>' }}{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
DATED = (  # Llama 3
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ 'Today Date: ' + date_string + '\n' }}" + CHATML
)


def tokenizer(
    template: str,
    eos: str = "<|im_end|>",
    special: tuple[str, ...] = (),
    added: tuple[str, ...] = (),
    bos: bool = False,
) -> PreTrainedTokenizerFast:
    """One token a byte, and those given; `bos` makes the tokenizer add <s> on its own."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<|endoftext|>", "<s>", *special, eos])
    model.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    if bos:
        model.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", model.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=eos, bos_token="<s>", chat_template=template)


def qwen(template: str = CHATML, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    return tokenizer(template, eos, ("<|im_start|>", "<|im_end|>"), ("<think>", "</think>"))


def chat(t: PreTrainedTokenizerFast, **data: object) -> Chat:
    return Chat(t, DataConfig(**data))  # type: ignore[arg-type]


def user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def attempt(c: Chat, text: str, end: str) -> Rollout:
    t = c.tokenizer
    ids = [*t(text, add_special_tokens=False)["input_ids"], t.convert_tokens_to_ids(end)]
    problem = Problem("p", user("ask"), "a", "test")
    return Rollout(problem, c.prompt(problem.messages, "p"), ids, [0.0] * len(ids), text, 0.0, False, 0)


def conversation(c: Chat, text: str, end: str, followup: str = "check") -> str:
    """The correction prompt after an attempt, as text."""
    r = attempt(c, text, end)
    prompt_ids, glue_ids = CorrectionPrompts(c, CorrectionConfig(followup=followup))(r)
    return c.tokenizer.decode([*prompt_ids, *r.token_ids, *glue_ids])


# --------------------------------------------------------------------------------------------------------- prompts


def test_a_prompt_is_what_the_template_renders() -> None:
    t = qwen()
    own = t.apply_chat_template(list(user("hi")), add_generation_prompt=True, return_dict=False)
    assert chat(t).prompt(user("hi"), "row") == own


def test_system_prompt_and_arguments_are_in_prompts_and_glue() -> None:
    c = chat(qwen(), system_prompt="be brief", chat_template_kwargs={"enable_thinking": False})
    start = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert c.tokenizer.decode(c.prompt(user("hi"), "row")) == (
        f"<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n{start}"
    )
    assert c.tokenizer.decode(c.glue("check", "x").after_end) == f"\n<|im_start|>user\ncheck<|im_end|>\n{start}"
    own = ({"role": "system", "content": "sing"}, *user("hi"))
    assert "be brief" not in c.tokenizer.decode(c.prompt(own, "row"))  # a row's own system turn stands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_thinkin": False}, "does not read it; did you mean 'enable_thinking'?"),
        ({"tokenize": True}, "chat_template_kwargs.tokenize: not an argument of the template"),
        ({"strftime_now": 1}, "chat_template_kwargs.strftime_now: not an argument of the template"),
        ({"think": False}, "does not read it"),  # it writes <think>
        ({"m": 1}, "does not read it"),  # a loop's variable
        ({"role": 1}, "does not read it"),  # an attribute
        ({"shout": 1}, "does not read it"),  # in a comment
        ({"date": 1}, "does not read it"),  # set by the template itself
        ({"raise_exception": 1}, "does not read it"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        chat(qwen("{# shout if told #}{% set date = 1 %}" + CHATML), chat_template_kwargs=arguments)


def test_arguments_are_those_of_the_template_that_is_rendered() -> None:
    marked = CHATML.replace("m.content + ", "'' }}{% generation %}{{ m.content }}{% endgeneration %}{{ ")
    loops = "{% for i in [1] %}{% if x is defined %}{{ 'X' }}{% endif %}{% break %}{% endfor %}"
    named = {"default": loops + marked, "tool_use": CHATML + "{{ tool_style }}"}
    c = chat(qwen(named), chat_template_kwargs={"x": 1, "enable_thinking": False})
    assert c.tokenizer.decode(c.prompt(user("hi"), "row")).startswith("X<|im_start|>user\nhi<|im_end|>")
    with pytest.raises(UserError, match="tool_style: the chat template does not read it"):
        chat(qwen(named), chat_template_kwargs={"tool_style": 1})
    with pytest.raises(UserError, match="multiple chat templates with no default"):
        chat(qwen({"a": CHATML, "b": CHATML}), chat_template_kwargs={"x": 1})
    day = chat(qwen(DATED), chat_template_kwargs={"date_string": "May Day"}).prompt(user("hi"), "row")
    assert c.tokenizer.decode(day).startswith("Today Date: May Day\n")


def test_a_template_may_change_letters_and_blanks_of_a_text() -> None:
    for change in ("lower", "upper", "trim | title"):
        c = chat(qwen(CHATML.replace("m.content", f"(m.content | {change})")))
        assert c.end_of_turn is not None
        assert "hi" in c.tokenizer.decode(c.prompt(user(" hi "), "row")).lower()
        assert "check" in c.tokenizer.decode(c.glue("check", "x").token_ids).lower()


@pytest.mark.parametrize("text", ["", " \n", "\u200b"])
def test_a_blank_system_prompt_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"data\.system_prompt is blank"):
        chat(qwen(), system_prompt=text)


def test_a_tokenizers_own_limit_is_not_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    t = qwen()
    t.model_max_length = 4
    c = chat(t)
    c.answer("a long one"), c.prompt(user("a long one"), "row"), c.glue("a long one", "x")
    assert caplog.text == ""
    assert t.model_max_length == 4  # and the export has it


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (GEMMA, "System role not supported"),
        (LLAMA2, "leaves out the system turn"),
        (CHATML + "{% if messages|length > 1 %}{{ messages[1].tool_calls[0].name }}{% endif %}", "has no"),  # undefined
        (CHATML + "{% if messages|length > 1 %}{{ 1 + 'a' }}{% endif %}", "unsupported operand"),  # a TypeError
    ],
)
def test_what_a_template_cannot_take_names_the_row_and_what_it_says(template: str, says: str) -> None:
    t = tokenizer(template, special=("<|im_start|>",))
    system = ({"role": "system", "content": "be brief"}, *user("hi"))
    with pytest.raises(UserError, match=says) as caught:
        chat(t).prompt(system, "my.jsonl:7")
    assert str(caught.value).startswith("my.jsonl:7: the chat template")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=says) as caught:
        chat(t, system_prompt="be brief")
    assert str(caught.value).startswith("data.system_prompt: the chat template")


@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_start|>assistant\nb", "<|endoftext|>", "x <s>struck</s>"])
def test_a_text_never_becomes_a_control_token(text: str) -> None:
    c = chat(qwen())
    with pytest.raises(UserError, match=r"row:3: the text spells the control token <"):
        c.prompt(user(text), "row:3")
    with pytest.raises(UserError, match=r"data.system_prompt: the text spells"):
        chat(qwen(), system_prompt=text)
    for layout in ("followup", "quoted"):
        with pytest.raises(UserError, match=r"correction.followup: the text spells"):
            CorrectionPrompts(c, CorrectionConfig(followup=text, layout=layout))  # type: ignore[arg-type]
    quoted = CorrectionPrompts(c, CorrectionConfig(layout="quoted"))
    assert quoted(attempt(c, "fine", "<|im_end|>")) is not None
    assert quoted(attempt(c, text, "<|im_end|>")) is None  # the attempt spells it: no anchor, counted as dropped


def test_added_tokens_that_are_not_special_are_text_unless_the_template_makes_turns_of_them() -> None:
    c = chat(qwen())
    assert c.tokenizer.decode(c.prompt(user("what is <think>?"), "row")).count("<think>") == 1
    # DeepSeek flags none of its roles as special.
    deepseek = CHATML.replace("<|im_start|>", "<|Role|>")
    c = chat(tokenizer(deepseek, added=("<|Role|>", "<think>")))
    with pytest.raises(UserError, match=r"control token <\|Role\|>"):
        c.prompt(user("hi<|Role|>assistant\n"), "row")


def test_half_a_character_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.system_prompt: .*lone surrogate"):
        chat(qwen(), system_prompt="\ud83d")


def test_bos_stands_once() -> None:
    c = chat(tokenizer(GEMMA, "<end_of_turn>", ("<start_of_turn>",), bos=True))
    ids = c.prompt(user("hi"), "row")
    assert ids.count(c.tokenizer.bos_token_id) == 1
    assert c.tokenizer.bos_token_id not in [*c.glue("check", "x").token_ids, *c.answer("4")]


# ------------------------------------------------------------------------------------------------------------- date


def test_the_date_is_the_runs() -> None:
    c = chat(qwen(DATED), date=datetime.date(2024, 2, 29))
    assert c.tokenizer.decode(c.prompt(user("hi"), "row")).startswith("Today Date: 29 Feb 2024\n")


def test_a_date_is_kept_on_resuming_and_by_the_recorded_config(tmp_path: Path) -> None:
    config = load_config([], [f"run.dir={tmp_path}"])
    assert pinned_date(config, resuming=True).data.date == datetime.date.today()  # nothing recorded yet
    recorded = config.model_copy(deep=True)
    recorded.data.date = datetime.date(2024, 2, 29)
    (tmp_path / "config.yaml").write_text(recorded.to_yaml())
    assert pinned_date(config, resuming=True).data.date == datetime.date(2024, 2, 29)
    assert pinned_date(config, resuming=False).data.date == datetime.date.today()
    again = load_config([str(tmp_path / "config.yaml")], [])
    assert pinned_date(again, resuming=False).data.date == datetime.date(2024, 2, 29)
    assert load_config([], ["data.date=2024-02-29"]).data.date == datetime.date(2024, 2, 29)
    for day, says in [
        ("tomorrow", "expected a day as YYYY-MM-DD"), ("0", "expected"), ("1767225600", "expected"),
        ("20260101", "expected"), ("2026-1-1", "expected"), ("2026-01-01T00:00", "expected"),
        ("2024-02-30", "there is no such day"), ("0000-01-01", "there is no such day"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=f"data\\.date=.?{day}.?: {says}"):
            load_config([], [f"data.date={day}"])


# ---------------------------------------------------------------------------------------------------------- endings


def test_the_templates_end_of_turn_ends_an_answer() -> None:
    base = chat(qwen(eos="<|endoftext|>"))  # Qwen2.5 base, Phi
    assert base.names(base.end_ids(None)) == "<|endoftext|> (256), <|im_end|> (259)"
    assert base.end_ids(GenerationConfig(eos_token_id=[256, 7])) == [7, 256, 259]
    assert base.answer("4")[-1] == 259
    assert chat(tokenizer(PLAIN, "</s>")).end_of_turn is None
    assert chat(tokenizer(PLAIN, "</s>")).answer("4")[-1] == chat(tokenizer(PLAIN, "</s>")).tokenizer.eos_token_id
    glm = chat(tokenizer(GLM, "<|endoftext|>", ("<|user|>", "<|assistant|>"), ("<think>", "</think>")))
    assert glm.names([glm.end_of_turn]).startswith("<|user|>")


def test_glue_follows_an_attempt_as_the_template_would() -> None:
    c = chat(qwen(eos="<|endoftext|>"))
    head = "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\nno"
    tail = "<|im_end|>\n<|im_start|>user\ncheck<|im_end|>\n<|im_start|>assistant\n"
    assert conversation(c, "no", "<|im_end|>") == head + tail
    assert conversation(c, "no", "<|endoftext|>") == head + "<|endoftext|>" + tail  # as sampled, then the turn's end
    c = chat(tokenizer(LLAMA2, "</s>", ("[INST]", "[/INST]")))
    assert conversation(c, "no", "</s>") == "<s>[INST] ask [/INST]no</s><s>[INST] check [/INST]"
    c = chat(tokenizer(PLAIN, "</s>"))
    assert conversation(c, "no", "</s>") == "USER: ask\nASSISTANT: no</s>\nUSER: check\nASSISTANT: "
    c = chat(tokenizer(GLM, "<|endoftext|>", ("<|user|>", "<|assistant|>"), ("<think>", "</think>")))
    assert conversation(c, "no", "<|user|>") == "<|user|>\nask<|assistant|>\nno<|user|>\ncheck<|assistant|>\n"


def test_glue_of_a_tokenizer_that_treats_a_texts_start_as_a_words_start() -> None:
    """SentencePiece's dummy prefix: the glue's first token is not the one that a text of its own would begin with."""
    letters = {
        c: i for i, c in enumerate("▁:\n?.-{}" + "".join(map(chr, range(48, 58))) + "abcdefghijklmnopqrstuvwxyz")
    }
    upper = {c: len(letters) + i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ")}
    model = Tokenizer(models.BPE(vocab={**letters, **upper}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    model.decoder = decoders.Metaspace(prepend_scheme="always")
    model.add_special_tokens(["</s>"])
    c = chat(PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", chat_template=PLAIN))
    assert c.tokenizer.convert_ids_to_tokens(c.glue("check", "x").token_ids)[:2] == ["\n", "U"]


def test_a_template_that_drops_answers_is_refused_for_followup_only() -> None:
    c = chat(qwen(CHATML.replace("messages", "[messages[-1]]")))
    with pytest.raises(UserError, match=r"use correction\.layout=quoted"):
        CorrectionPrompts(c, CorrectionConfig())
    CorrectionPrompts(c, CorrectionConfig(layout="quoted"))


# ---------------------------------------------------------------------------------------------------------- answers


def test_the_verifier_sees_every_space_and_no_control_token() -> None:
    t = qwen()
    t.clean_up_tokenization_spaces = True
    t.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    c = chat(t)
    text = "<think>so</think> x . y , n't 's"
    assert t.decode(t(text)["input_ids"]) != text
    assert c.text(c.answer(text)) == text
    spelled = c.answer("a<|im_start|>b")  # in an answer it is text that can be written
    assert c.text(spelled) == "a<|im_start|>b"
    assert [i for i in spelled if i in c.control] == [c.end_of_turn]
    assert c.prompt(user("hi"), "row") == chat(t).prompt(user("hi"), "row")  # and leaves prompts as they are


def test_a_tokenizer_larger_than_the_embedding_is_refused() -> None:
    t = qwen()
    c = chat(t)
    c.refuse_beyond(len(t))
    c.refuse_beyond(len(t) + 100)  # padded
    t.add_special_tokens({"pad_token": "<|pad|>"})
    with pytest.raises(UserError, match=rf"ids up to {len(t) - 1}, the model {len(t) - 1} embeddings"):
        chat(t).refuse_beyond(len(t) - 1)


def test_answers_that_cannot_be_given_are_counted() -> None:
    """Qwen's tokenizer composes characters: an answer written decomposed never comes back."""
    t = qwen()
    t.backend_tokenizer.normalizer = normalizers.NFC()
    c = chat(t)
    answers = ["4", "cafe\u0301", "1234567", "caf\u00e9"]
    problems = [Problem(a, user(a), a, "test", f"row:{i}") for i, a in enumerate(answers)]
    said: list[str] = []
    count_unreachable(encode_prompts(problems, c), c, "data.train", ("rollout.max_tokens", 7), said.append)
    assert said == [
        "data.train: 1 of 4 answers are longer than rollout.max_tokens=7, so never right (first: row:2)",
        "data.train: 1 of 4 answers are changed by the tokenizer, so never right (first: row:1)",
    ]
    with pytest.raises(UserError, match="every answer is longer than rollout"):
        count_unreachable(encode_prompts(problems, c), c, "data.train", ("rollout.max_tokens", 1), said.append)


def test_pieces_are_the_texts_of_tokens() -> None:
    """Special ones too; a character that several tokens spell is the first one's."""
    c = chat(qwen())
    for text in ("plain", "naïve 日本 🙂!"):
        ids = c.answer(text)
        pieces = c.pieces(ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == text + "<|im_end|>"
        assert c.pieces(ids) == pieces  # the second time from what is kept
    assert len(c.pieces(c.answer("🙂")[:2])) == 2  # cut in the middle of a character
