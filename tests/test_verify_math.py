"""The math verifier: pairs of golds and answers (data/math_pairs.jsonl: the definition of "equal"), whole responses,
garbage, golds against themselves, and speed that does not depend on what an answer asks to compute."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cipo_fast.verify.math import at_once, check_gold, check_row, gold_response, judge
from cipo_fast.verify.math.extract import final_answer
from cipo_fast.verify.math.policy import MathPolicy, policy_of

DATA = Path(__file__).parent / "data"
PAIRS = [
    json.loads(line)
    for name in ("math_pairs.jsonl", "math_pairs_more.jsonl")
    for line in (DATA / name).read_text().splitlines()
]


def row_of(pair):
    return {"verifier": "math", "answer": pair["gold"], "policy": pair.get("policy", {})}


def boxed(answer):
    return f"Thus the answer is $\\boxed{{{answer}}}$."


def test_there_are_pairs_of_every_kind():
    assert len(PAIRS) >= 500
    assert len({(pair["gold"], pair["answer"], json.dumps(pair.get("policy"))) for pair in PAIRS}) == len(PAIRS)
    groups = {pair["group"] for pair in PAIRS}
    assert groups >= {"integer", "rational", "decimal", "percent", "unit", "choice", "text", "interval", "matrix"}
    for group in groups:
        assert {pair["verdict"] for pair in PAIRS if pair["group"] == group} == {"right", "wrong"}, group


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair['group']}: {pair['gold']} | {pair['answer']}"[:60])
def test_pairs(pair):
    judged = judge(row_of(pair), boxed(pair["answer"]))
    assert judged.verdict == pair["verdict"], judged.why


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair['gold']} | {pair['answer']}"[:60])
def test_what_is_settled_at_once_is_what_a_worker_says(pair):
    settled = at_once(row_of(pair), boxed(pair["answer"]))
    assert settled is None or settled.verdict == pair["verdict"]


def test_every_gold_is_equal_to_itself_without_comparing_strings():
    for gold in {pair["gold"] for pair in PAIRS}:
        row = {"answer": gold}
        assert check_gold(row) is None, gold
        assert judge(row, gold_response(row)).verdict == "right", gold


@pytest.mark.parametrize(
    "gold",
    [
        "",
        "  ",
        "see the solution at the end of the chapter which has all of the details of it",
        "t(0,4]",
        "\\frac{1}{",
        "7 8",
        "\\frac{1}{0}",
        "6=7",
        "x" * 5000,
        "9^{9^{9^{9^9}}}",
    ],
)
def test_a_gold_that_cannot_be_judged_is_named(gold):
    said = check_gold({"answer": gold})
    assert said is not None
    assert "\n" not in said


RESPONSES = [
    (r"First \boxed{10}. Wait: \boxed{12}.", "right"),
    (r"\boxed{10}, \boxed{11}, \boxed{12}", "wrong"),
    (r"\boxed{10} or \boxed{12}", "wrong"),
    (r"\boxed{10} $\text{or}$ maybe \boxed{12}", "wrong"),
    (r"It is \boxed{10}? \boxed{11}? \boxed{12}", "wrong"),
    ("\\boxed{11}\n\\boxed{12}", "wrong"),
    (r"\boxed{12}, that is, \boxed{12}", "right"),
    (r"<think>\boxed{12}</think> I do not know.", "unparsable"),
    (r"<think>\boxed{12}", "unparsable"),
    (r"<think>so 10? \boxed{10}</think> The answer is \boxed{12}.", "right"),
    (r"no tag opened \boxed{10}</think> The answer is \boxed{12}.", "right"),
    (r"<think>a</think> b </think> \boxed{12}", "right"),
    (r"<think>a</think> \boxed{12} <think> hm", "unparsable"),
    (r"The answer is \boxed{12", "unparsable"),
    (r"The answer is 12.", "unparsable"),
    ("", "unparsable"),
    (r"\boxed{}", "wrong"),
    (r"\boxed{12} dozen? no: the answer is 13.", "right"),  # policy: what follows the box is not read
    (r"$$\boxed{12}$$", "right"),
    (r"\[ x = \boxed{12} \]", "right"),
    (r"\fbox{12}", "right"),
    (r"\boxed {12}", "right"),
    (r"\boxed{\boxed{12}}", "right"),
    (r"\boxed{10, \boxed{12}}", "wrong"),
    (r"\boxed{\text{The set } \{12\} }", "wrong"),
    (r"} { \boxed{12} } {", "right"),
    (r"\{ \boxed{12} \}", "right"),
    (r"\boxed{\frac{24}{2}}", "right"),
    (r"\boxed{12\}}", "wrong"),
    (r"\boxed{12\}", "unparsable"),
    ("\\boxed{12}\x00", "right"),
    ("\\boxed{12\x00}", "wrong"),
    (r"\boxed{12} \boxed{", "right"),  # an unclosed box is no answer: the last closed one is
    (r"Answer: 12", "unparsable"),
    ("Either \\boxed{13}\nor \\boxed{12}", "wrong"),
    ("\\boxed{13} or\n\\boxed{12}", "wrong"),
    ("\\boxed{13}\n\nor\n\n\\boxed{12}", "wrong"),
    ("- \\boxed{10}\n- \\boxed{12}", "wrong"),
    (r"1) \boxed{10} 2) \boxed{11} 3) \boxed{12}", "wrong"),
    ("(a) $\\boxed{10}$\n(b) $\\boxed{12}$", "wrong"),
    (r"First guess: \boxed{3}. Second guess: \boxed{12}.", "wrong"),
    ("Case 1: $x = \\boxed{3}$.\nCase 2: $x = \\boxed{12}$.", "wrong"),
    ("\n".join(f"Guess {i}: \\boxed{{{i}}}" for i in range(13)), "wrong"),
    (" hm ".join(f"\\boxed{{{i}}}" for i in (1, 2, 3, 4, 5, 12)), "wrong"),
    ("The answer is \\boxed{10}.\n\nWait, maybe both.\n\nThe answer is \\boxed{12}.", "right"),
    ("Step 1: 3 apples: \\boxed{3}.\nStep 2: 9 more make \\boxed{12}.", "right"),
    ("2+3=\\boxed{5}\n5+7=\\boxed{12}", "right"),
]


@pytest.mark.parametrize(("response", "verdict"), RESPONSES)
def test_whole_responses(response, verdict):
    assert judge({"answer": "12"}, response).verdict == verdict


def test_several_boxes_may_be_a_list():
    row = {"answer": "1,3"}
    assert judge(row, r"The roots are $x=\boxed{1}$ and $x=\boxed{3}$.").verdict == "right"
    assert judge(row, r"The root is $x=\boxed{1}$. No: $x=\boxed{3}$.").verdict == "wrong"


def test_an_answer_line_counts_by_policy_and_only_without_a_box():
    row = {"answer": "12", "policy": {"answer_line": True}}
    assert judge(row, "So.\n**Answer:** $12$").verdict == "right"
    assert judge(row, "Answer: 12\nAnswer: 13").verdict == "wrong"
    assert judge(row, "Answer: 12\n\\boxed{13}").verdict == "wrong"


def test_rows_with_several_answers_a_unit_or_a_tolerance():
    several = {"answer": "$f(x)=x$, $f(x)=2-x$", "answers": ["$f(x)=x$", "$f(x)=2-x$"]}
    assert judge(several, boxed("f(x)=2-x, f(x)=x")).verdict == "right"
    assert judge(several, boxed("f(x)=x")).verdict == "wrong"
    thousands = {"answer": "11,133", "answers": ["11", "133"]}
    assert judge(thousands, boxed("133, 11")).verdict == "right"
    assert judge(thousands, boxed("133")).verdict == "wrong"
    minutes = {"answer": "45", "unit": "minute"}
    assert judge(minutes, boxed(r"45\text{ minutes}")).verdict == "right"
    assert judge(minutes, boxed("45")).verdict == "right"
    assert judge(minutes, boxed(r"45\text{ hours}")).verdict == "wrong"
    near = {"answer": r"\frac{1}{3}", "error": "1e-2"}
    assert judge(near, boxed("0.33")).verdict == "right"
    assert judge(near, boxed("0.31")).verdict == "wrong"
    assert judge({"answer": "(0,1)", "answer_type": "Tuple"}, boxed("0<x<1")).verdict == "wrong"
    assert judge({"answer": "(0,1)", "answer_type": "Interval"}, boxed("0<x<1")).verdict == "right"


def test_policies_have_defaults_and_unknown_ones_are_errors():
    assert policy_of({}) == MathPolicy()
    assert policy_of({"policy": {"percent": "either"}}).percent == "either"
    for policy, word in [
        ({"percents": "either"}, "percents"),
        ({"percent": "maybe"}, "maybe"),
        ({"tolerance": -1}, "tolerance"),
        ({"tolerance": True}, "tolerance"),
        ({"answer_line": 1}, "answer_line"),
        ([1], "object"),
    ]:
        with pytest.raises(ValueError, match=word):
            policy_of({"policy": policy})
    assert "percents" in str(check_gold({"answer": "7", "policy": {"percents": "either"}}))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": ["7"]}, "answer is list"),
        ({"answer": {"a": 7}}, "answer is dict"),
        ({"answer": True}, "answer is bool"),
        ({"answer": float("nan")}, "not a finite number"),
        ({"answer": float("-inf")}, "not a finite number"),
        ({"answer": 10**5000}, "too large"),
        ({"answer": "\\frac{{{{"}, "braces"),
        ({"answer": "}{"}, "braces"),
        ({"answer": "x" * 5000}, "longer than"),
        ({"answer": "(x+" * 99 + ")" * 99}, "nest deeper"),
        ({"answers": "7"}, "not a list"),
        ({"answers": ["7", ["8"]]}, "list, not text"),
        ({"answer": None}, "missing"),
        ({"answer": "7", "error": "abc"}, "error is 'abc'"),
        ({"answer": "7", "error": "nan"}, "error is"),
        ({"answer": "7", "error": "1e999999999"}, "error is"),
        ({"answer": "7", "error": [1]}, "error is"),
        ({"answer": "7", "error": True}, "error is"),
    ],
)
def test_a_row_that_cannot_be_judged_is_one_line_without_algebra(row, said):
    found = check_row(row)
    assert found is not None
    assert said in found
    assert "\n" not in found
    assert len(found) < 200


def test_numbers_are_golds_as_they_are_written():
    for gold in (7, 7.0, "7", 7e0):
        assert check_row({"answer": gold}) is None
        assert judge({"answer": gold}, boxed("7")).verdict == "right"
        assert judge({"answer": gold}, boxed("7.1")).verdict == "wrong"
    for row in ({"answer": "7", "error": 0.1}, {"answer": "7", "error": "1e-1"}, {"answer": "\\{1,2\\}", "error": ""}):
        assert check_row(row) is None
    assert judge({"answer": 1e23}, boxed("10^{23}")).verdict == "right"


# Golds of no class: equal only where they are the same text but for spelling.
UNKNOWN = [
    ("x\\equiv3\\pmod 7", "x\\equiv3\\pmod{7}", "right"),
    ("x\\equiv3\\pmod{7}", "x\\equiv 3 \\pmod 7", "right"),
    ("x\\equiv3\\pmod{7}", "x\\equiv 3 \\ (\\text{mod } 7)", "right"),
    ("x\\equiv3\\pmod{12}", "x\\equiv 3 (\\mathrm{mod}\\ 12)", "right"),
    ("x\\equiv3\\pmod{12}", "x\\equiv 3 \\bmod 12", "right"),
    (
        "\\begin{cases} 1 & x>0\\\\ 0 & x\\le 0\\end{cases}",
        "\\begin{cases} 1, & x>0\\\\ 0, & x\\le 0\\end{cases}",
        "right",
    ),
    (
        "\\begin{cases} 1 & x>0\\\\ 0 & x\\le 0\\end{cases}",
        "\\begin{cases} 1, & \\text{if } x>0,\\\\ 0, & \\text{if } x\\le 0.\\end{cases}",
        "right",
    ),
    ("p\\land q", "p\\land q", "right"),
    ("x\\equiv3\\pmod 7", "x\\equiv3\\pmod{8}", "wrong"),
    ("x\\equiv3\\pmod 7", "x\\equiv4\\pmod{7}", "wrong"),
    ("p\\land q", "p\\lor q", "wrong"),
]


@pytest.mark.parametrize(("gold", "answer", "verdict"), UNKNOWN)
def test_golds_of_no_class_are_met_by_their_own_text_alone(gold, answer, verdict):
    assert judge({"answer": gold}, boxed(answer)).verdict == verdict


def test_redundant_parentheses_are_cheap():
    started = time.perf_counter()
    for wrap in ("(" * 400 + "7" + ")" * 400, "{" * 400 + "7" + "}" * 400, r"\left(" * 400 + "7" + r"\right)" * 400):
        assert at_once({"answer": "7"}, boxed(wrap)).verdict == "right"
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    "answer",
    [
        "1+" * 1900 + "1",
        "((" * 900 + "7",
        "2^" * 1500 + "2",
        "{" * 1000 + "}" * 1000,
        "\\frac" * 700,
        "7" * 3900,
        "-" * 3900 + "7",
        "x" * 3900,
        "\\sqrt{" * 60 + "7" + "}" * 60,
        "9^{9^{9^9}}",
        "((((10^9)!)!)!)!",
        "2^{2^{2^{2^{2^2}}}}",
        r"\sum_{i=1}^{1000}\sum_{j=1}^{1000} ij",
        r"\binom{10^6}{10^5}",
        "10^{10^{10}}",
        r"e^{e^{e^{e^{e}}}}",
        "a,b;" * 900,
        r"\tan(10^{10^{10}})",
        r"\lfloor 10^{100}\pi\rfloor",
        "7" + "!" * 50,
        r"\left" * 500,
        "\\" * 3999,
        "|" * 999,
        "_" * 99,
        r"\text{" * 300,
        "1e999999",
        "1e-999999",
        "0." + "0" * 3000 + "1",
        r"\log_{1} 7",
        "0^{-1}",
        "0^0",
        r"\infty-\infty",
        "\ud800",
    ],
)
def test_monsters_are_wrong_and_quick(answer):
    for gold in ("7", r"\sqrt{2}", "2n", "(2,5)", r"\{1,2\}", "x>3"):
        started = time.perf_counter()
        assert judge({"answer": gold}, boxed(answer)).verdict in ("wrong", "unparsable")
        assert time.perf_counter() - started < 3


HEAVY = [
    r"\binom{20000}{10000}", r"\binom{5000}{2500}", "10000!", "3000!", "n!", r"\binom{n}{k}", "10^{-99999}",
    r"(1+10^{-4999})^{99999}", r"(1+10^{-100000})^{100000}", "(x+1)^{99999}", "x^{x^{x}}", r"\sqrt[63]{2}", r"\sqrt{k}",
    r"\lfloor x\rfloor", r"\arcsin(\sin x)", r"\log_{x} y", r"\tan(10^{14})", r"e^{10^{14}}", r"2^{-9999999999}",
    r"\sum_{k=1}^{2000} \binom{5000}{k}", r"\sum_{k=1}^{2000} \sin(k)", r"\prod_{k=1}^{2000} k^{k}", "f(x)",
    r"\gcd(10^{4999},7^{5000})", r"\frac{1}{10^{4999}+1}", r"\pm x", "2^{0.5}", "|x|", "9" * 300, "10^{4999}",
]  # fmt: skip
JOINS = ["+", r"\cdot ", "/", ",", " or ", "=", "<", r"\cup ", ")^{(", "^"]
WRAPS = [
    "%s",
    r"\{%s\}",
    "(%s)",
    r"\sum_{j=1}^{2000} %s",
    r"\begin{pmatrix}%s\end{pmatrix}",
    "x=%s",
    r"\lfloor %s\rfloor",
]


@given(
    st.lists(st.sampled_from(HEAVY), min_size=1, max_size=3), st.sampled_from(JOINS), st.sampled_from(WRAPS),
    st.sampled_from(["7", r"\sqrt{2}", "2n", r"\{1,2\}", "x>3", r"\lfloor x\rfloor", "7.00", "y=x^2"]),
)  # fmt: skip
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_work_is_bounded_whatever_fills_an_answer(pieces, join, wrap, gold):
    answer = wrap % join.join((pieces * (3800 // len(join.join(pieces)) + 1))[: 3800 // max(map(len, pieces))])
    started = time.process_time()
    assert judge({"answer": gold}, boxed(answer)).verdict in ("wrong", "unparsable")
    assert time.process_time() - started < 1.5  # a third of a second on a quiet core


MB = 10**6


@pytest.mark.parametrize(
    "response",
    [
        "{" * 10 * MB,
        "}" * 10 * MB,
        "\\boxed{" * MB,
        "\\" * 10 * MB,
        "\0" * 10 * MB,
        "\\boxed{7}" * MB,
        "</think>" * MB,
        "\\boxed{" + "7" * 10 * MB + "}",
        "\\boxed{" + "{" * MB + "}" * MB + "}",
        "Answer:" * MB,
        "\\boxed{7} or " * MB,
    ],
    ids=lambda text: text[:9],
)
def test_ten_megabytes_take_no_time(response):
    started = time.perf_counter()
    assert judge({"answer": "12", "policy": {"answer_line": True}}, response).verdict in ("wrong", "unparsable")
    assert time.perf_counter() - started < 5


def test_the_answer_at_either_end_of_ten_megabytes_is_found():
    assert judge({"answer": "7"}, "x" * 10 * MB + r"\boxed{7}").verdict == "right"
    assert judge({"answer": "7"}, r"\boxed{7}" + "x" * 10 * MB).verdict == "right"


PIECES = [
    "\\boxed{",
    "\\fbox {",
    "{",
    "}",
    "\\{",
    "\\}",
    "\\",
    "7",
    "12",
    ", ",
    " or ",
    "<think>",
    "</think>",
    "\n",
    "\0",
    "$",
    "é",
]


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_extraction_never_raises_and_finds_only_closed_boxes(text):
    final = final_answer(text)
    said = text.rsplit("</think>", 1)[-1]
    if final.text is None:
        assert final.why
    else:
        assert "<think>" not in said
        assert said.count("}") > 0
    assert final_answer(text + r"</think> \boxed{41}").text == "41"


SCRAPS = [
    "7",
    "x",
    "n",
    "\\frac",
    "\\sqrt",
    "{",
    "}",
    "(",
    ")",
    "[",
    "]",
    "^",
    "_",
    "+",
    "-",
    "=",
    "<",
    ",",
    "!",
    "|",
    "\\pm ",
    "\\text{cm}",
    "\\text{ or }",
    "\\cup ",
    "\\in ",
    "\\%",
    "^\\circ ",
    "\\infty ",
    "\\{",
    "\\}",
    "\\sin ",
    "e",
    "i",
    ".",
    ":",
    "\\begin{pmatrix}",
    "\\end{pmatrix}",
    "&",
    "\\\\",
    " ",
    "\\$",
    "\\sum_{k=1}^{n}",
    "0",
    "%",
    "\\le ",
    "\\mid ",
]


@given(
    st.lists(st.sampled_from(SCRAPS), max_size=14).map("".join),
    st.sampled_from(["7", "x+1", "(0,1)", "1,2", "x>7", "x=7"]),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_judging_never_raises(answer, gold):
    judged = judge({"answer": gold}, boxed(answer))
    assert judged.verdict in ("right", "wrong", "unparsable")
    judge({"answer": answer}, boxed(gold))
    check_gold({"answer": answer})


def test_what_needs_no_algebra_takes_microseconds():
    rows = [
        ({"answer": "073"}, boxed("73")),
        ({"answer": "2,125"}, boxed("2125")),
        ({"answer": "C"}, boxed(r"\text{(B)}")),
    ]
    started = time.perf_counter()
    for _ in range(300):
        assert all(at_once(row, response) is not None for row, response in rows)
    assert (time.perf_counter() - started) / 900 < 1e-3  # 0.03 ms on a quiet core
