"""The program of a response: which block, which name, a completion of the prompt, and what is none."""

import ast
from typing import Any

import pytest

from cipo_fast.verify.code.program import Program, Unparsable, fenced, function_program, stdin_program

PROMPT = (
    "import math\nfrom typing import List\n\n\n"
    "def poly(xs: list, x: float):\n    return sum(xs) * x\n\n\n"
    'def f(a):\n    """Double.\n    >>> f(1)\n    2\n    """\n'
)


def value(program: Program, *args: object) -> object:
    """What the program's entry point gives: these are programs of this file alone."""
    names: dict[str, Any] = {"__name__": "__main__", "List": list}
    exec(program.text, names)
    assert program.entry_point is not None
    if program.entry_point in names:
        return names[program.entry_point](*args)
    return getattr(names["Solution"](), program.entry_point)(*args)


RESPONSES = {
    "plain": "```python\ndef f(a):\n    return 2 * a\n```",
    "untagged": "Here:\n```\ndef f(a):\n    return 2 * a\n```\nIt doubles.",
    "tag py": "```py\ndef f(a): return 2 * a\n```",
    "tag Python3": "```Python3\ndef f(a): return 2 * a\n```",
    "tag braces": "```{python}\ndef f(a): return 2 * a\n```",
    "tag with title": "```python title=a.py\ndef f(a): return 2 * a\n```",
    "tildes": "~~~python\ndef f(a): return 2 * a\n~~~",
    "long fence": "````python\ndef f(a):\n    '''\n```\n'''\n    return 2 * a\n````",
    "no fence": "def f(a):\n    return 2 * a\n",
    "draft, then final": "```python\ndef f(a): return 3 * a\n```\nNo:\n```python\ndef f(a): return 2 * a\n```",
    "then usage": "```python\ndef f(a): return 2 * a\n```\nUse it:\n```python\nprint(f(2))\n```",
    "then output": "```python\ndef f(a): return 2 * a\n```\nOutput:\n```\n4\n```",
    "then shell": "```python\ndef f(a): return 2 * a\n```\n```bash\npython a.py\n```",
    "then broken": "```python\ndef f(a): return 2 * a\n```\n```python\ndef f(a) return\n```",
    "then unclosed": "```python\ndef f(a): return 2 * a\n```\n```python\ndef f(a): return 3",
    "other language": "```cpp\nint f(int a);\n```\n```python\ndef f(a): return 2 * a\n```",
    "in a list": "1. So\n   ```python\n   def f(a):\n       return 2 * a\n   ```\n",
    "all indented": "```python\n    def f(a):\n        return 2 * a\n```",
    "after thinking": "<think>```python\ndef f(a): return 0\n```</think>\n```python\ndef f(a): return 2 * a\n```",
    "thinking from the prompt": "hm```python\ndef f(a): return 0\n```</think>```python\ndef f(a): return 2 * a\n```\n",
    "two thoughts": "<think>a</think>b<think>c</think>\n```python\ndef f(a): return 2 * a\n```",
    "windows": "```python\r\ndef f(a):\r\n    return 2 * a\r\n```\r\n",
    "lambda": "```python\nf = lambda a: 2 * a\n```",
    "conditional": "```python\nif True:\n    def f(a):\n        return 2 * a\n```",
    "solution": "```python\nclass Solution:\n    def f(self, a: int) -> List[int]:\n        return 2 * a\n```",
    "future": "```python\nfrom __future__ import annotations\nclass Solution:\n    def f(self, a): return 2 * a\n```",
    "docstring future": '```python\n"""Doc."""\nfrom __future__ import annotations\ndef f(a):\n    return 2 * a\n```',
    "main guard": "```python\ndef f(a):\n    return 2 * a\nif __name__ == '__main__':\n    print(f(2))\n```",
    "inherited": "```python\nclass A:\n    def f(self, a): return 2 * a\nclass Solution(A): pass\n```",
    "inherited twice": "```python\nclass B:\n    def f(self, a): return 2 * a\nclass A(B): pass\nclass Solution(A):\n"
    "    x = 1\n```",
    "method lambda": "```python\nclass Solution:\n    f = lambda self, a: 2 * a\n```",
    "docstring with a fence": '```python\ndef f(a):\n    """Double.\n\n```\nf(1)\n```\n    """\n    return 2 * a\n```',
    "docstring with a tagged fence": "```python\ndef f(a):\n    '''Double.\n    ```python\n    f(1)\n    ```\n    '''\n"
    "    return 2 * a\n```\nDone.",
    "broken docstring, then final": '```python\ndef f(a):\n    """Cut\n```\nNo:\n```python\ndef f(a):\n    """OK"""\n'
    "    return 2 * a\n```",
    "byte order mark": "\ufeff```python\ndef f(a): return 2 * a\n```",
    "byte order mark inside": "```python\n\ufeffdef f(a): return 2 * a\n```",
    "byte order mark, no fence": "\ufeffdef f(a):\n    return 2 * a\n",
    "nested fence of other kind": "~~~python\ndef f(a):\n    '''\n```\nx\n```\n'''\n    return 2 * a\n~~~",
}


@pytest.mark.parametrize("name", RESPONSES)
def test_the_program_of_a_response(name: str) -> None:
    assert value(function_program(RESPONSES[name], "f"), 4) == 8
    assert value(function_program(RESPONSES[name], "f", PROMPT), 4) == 8


@pytest.mark.parametrize(
    "name", [name for name in RESPONSES if name not in ("then usage", "main guard", "lambda", "future", "conditional")]
)
def test_the_one_function_of_a_program_needs_no_name(name: str) -> None:
    if name == "conditional":
        return
    assert value(function_program(RESPONSES[name], None), 4) == 8


def test_the_function_that_no_other_uses_is_meant() -> None:
    text = "```python\ndef helper(a):\n    return a\ndef g(a):\n    return helper(a) if a else g(1)\n```"
    assert function_program(text, None).entry_point == "g"
    with pytest.raises(Unparsable, match="2 functions"):
        function_program("```python\ndef g(a): pass\ndef h(a): pass\n```", None)
    methods = (
        "class Solution:\n    def help(self, a):\n        return a\n    def g(self, a):\n        return self.help(a)\n"
    )
    program = function_program(methods, None)
    assert program.entry_point == "g"
    assert value(program, 3) == 3


COMPLETIONS = {
    "body": "    return 2 * a\n",
    "body after a newline": "\n    return 2 * a\n",
    "first line stripped": "b = 2\n    return b * a\n",
    "one line stripped": "return 2 * a",
    "no indentation": "b = 2\nif a:\n    b = 2\nreturn b * a",
    "fenced body": "```python\n    return 2 * a\n```",
    "fenced body, stripped": "Sure:\n```python\nreturn 2 * a\n```",
    "goes on": "    return 2 * a\n\n\ndef g(b):\n    return b\n",
    "goes on and breaks off": "    return 2 * a\n\n\ndef g(b):\n    return (b\n",
    "goes on with prose": "    return 2 * a\n\nThis doubles its argument.",
    "repeats the prompt": PROMPT + "    return 2 * a\n",
    "repeats it in a fence": f"```python\n{PROMPT}    return 2 * a\n```",
    "helper of the prompt": "```python\ndef f(a):\n    return poly([2], a)\n```",
    "imports of the prompt": "```python\ndef f(a: List[int]):\n    return math.prod([2, a])\n```",
    "body with a fence inside a text": "    '''x'''\n    return 2 * a\n",
    "body after thinking": "<think>easy</think>    return 2 * a\n",
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions_of_a_prompt_that_is_code(name: str) -> None:
    assert value(function_program(COMPLETIONS[name], "f", PROMPT), 4) == 8


def test_a_redefined_helper_is_the_programs_own() -> None:
    text = "```python\ndef poly(xs, x):\n    return 2 * x\ndef f(a):\n    return poly([], a)\n```"
    assert value(function_program(text, "f", PROMPT), 4) == 8


def test_a_prompt_in_prose_is_no_code() -> None:
    with pytest.raises(Unparsable):
        function_program("    return 2 * a\n", "f", "Write def f(a) that doubles.")
    assert value(function_program("def f(a): return 2 * a", "f", "Write def f(a) that doubles."), 4) == 8


NOTHING = {
    "": "empty",
    " \n\t": "empty",
    "<think>```python\ndef f(a): return 2\n```": "think",
    "<think>x</think><think>```python\ndef f(a): return 2\n```": "think",
    "I do not know.": "invalid syntax",
    "yes": "no program",
    "```python\n# nothing\n```": "only comments",
    "# nothing": "only comments",
    "```python\ndef f(a)\n```": "line 1",
    "```python\ndef f(a):\n    return '\0'\n```": "NUL",
    "```python\ndef f(a): return 2": "no closed block",
    "```cpp\nint f;\n```": "no closed block",
    "def f(a): return '\ud800'": "Unicode",
    "x" * 10_000_000: "characters",
    "```python\n" + "x = 1\n" * 50_000 + "```": "characters",
    "```python\n" + "(" * 90_000 + ")" * 90_000 + "\n```": "nested",
    "```python\n" + "-" * 150_000 + "1\n```": "nested",
    "```python\nx = 1" + "+1" * 90_000 + "\n```": "nested",
    "```python\nx" + ".x" * 90_000 + "\n```": "nested",
    "```python\nx = " + "[" * 5000 + "\n```": "nested",
    "```python\n" + "".join(" " * n + "if 1:\n" for n in range(150)) + "```": "indentation",
    "\x00\x01\x02\xff" * 1000: "NUL",
    "```python\n5\n```": "no program",
    "```python\npass\n```": "no program",
    "```python\nprint(3)\n```": "defines f",
}


@pytest.mark.parametrize("response", NOTHING, ids=range(len(NOTHING)))
def test_no_program(response: str) -> None:
    with pytest.raises(Unparsable) as caught:
        function_program(response, "f")
    assert NOTHING[response] in str(caught.value)
    if NOTHING[response] != "defines f":
        with pytest.raises(Unparsable):
            stdin_program(response)
        with pytest.raises(Unparsable):
            function_program(response, None)


STDIN = {
    "plain": ("```python\nprint(input())\n```", "print(input())\n"),
    "no fence": ("print(input())\n", "print(input())\n"),
    "then an output": ("```python\nprint(input())\n```\nExample:\n```\n5\n```", "print(input())\n"),
    "then a list": ("```python\nprint(input())\n```\n```\n[1, 2]\n```", "print(input())\n"),
    "draft, then final": ("```python\nprint(1)\n```\n```python\nprint(2)\n```", "print(2)\n"),
    "then usage": (
        "```python\ndef g():\n    print(1)\ng()\n```\n```python\nprint(g())\n```",
        "def g():\n    print(1)\ng()\n",
    ),
    "same names": (
        "```python\ndef g(): print(1)\n```\n```python\ndef g(): print(2)\ng()\n```",
        "def g(): print(2)\ng()\n",
    ),
    "own variable": (
        "```python\ndef g(): print(1)\n```\n```python\ng = input()\nprint(g)\n```",
        "g = input()\nprint(g)\n",
    ),
    "then input": ("```python\nprint(input())\n```\n```text\n1 2\n```", "print(input())\n"),
}


@pytest.mark.parametrize("name", STDIN)
def test_programs_that_read_stdin(name: str) -> None:
    response, text = STDIN[name]
    assert stdin_program(response).text == text


@pytest.mark.parametrize("text", ["x = 1", "x = '''\n```\n'''", "x = '````'\n"])
def test_a_gold_in_a_fence_comes_out_as_it_was(text: str) -> None:
    assert ast.dump(ast.parse(stdin_program(fenced(text)).text)) == ast.dump(ast.parse(text))
