"""The documents are true: every command in them is run, and every link and anchor leads somewhere.

A fenced block tagged `bash` is commands, one a line (a backslash goes on), or a script where it begins with `#!`;
`text` is output; a `python`, `yaml` or `json` block is a file where the paragraph before it begins with its name, and
other Python is run as it stands. A document's blocks are used in order in one folder, which links to the repository as
a checkout has it. Commands run in this process, by their modules' `main`: what a shell would add is tested where
processes are. A training command is a short one of a small model; one that needs GPUs, nodes, vLLM or a model from the
hub is planned by `--dry-run`, which checks all it names; the few others stand in ELSEWHERE, beside the test that runs
them.
"""

import ast
import importlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from test_recipes import QWEN3_4B, SHAPES, SMOLLM2
from test_train import environment, wait_for_lines
from transformers import Qwen3Config

from cipo_fast.config import load_config
from cipo_fast.errors import UserError

ROOT = Path(__file__).parents[1]
WITH_COMMANDS = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").glob("*.md")),
]  # fmt: skip
LINKED = [*WITH_COMMANDS, *sorted((ROOT / "docs" / "results").rglob("*.md"))]
TAGS = {"bash", "text", "python", "yaml", "json"}

# What no test of this file runs. Command (a regular expression of all of it) -> the test that runs it, and why there.
ELSEWHERE = {
    r"git clone .*": ("test_install.py::test_the_wheel_runs_from_another_directory", "needs a network"),
    r"\. \.venv/bin/activate": ("test_install.py::test_the_wheel_runs_from_another_directory", "it is active here"),
    r"python -m cipo_fast\.fetch_smollm": ("test_smollm.py::test_the_folder_is_an_unquantised_model_with_a_template",
                                           "540 MB from an index"),
    r"python -m cipo_fast\.audit": ("test_audit.py::test_no_canary_is_rewarded_and_one_that_is_ends_with_its_name",
                                    "300 programs in a sandbox"),
    r"python -m cipo_fast\.experiment headline\.yaml( --report --publish \S+)?": (
        "test_experiment.py::test_a_grid_is_stopped_killed_and_finished", "an hour; there with a grid of its own"),
    r"python -m cipo_fast\.serve .*": ("test_vllm_training.py::test_a_server_found_by_its_url_trains", "vLLM"),
    r"bench/gpu/run_all\.sh( --sweep)?": ("test_bench_gpu_all.py::test_the_order_and_the_minutes", "a GPU's minutes"),
    r"python bench/gpu/table\.py --write": ("test_bench_gpu_table.py::test_the_page_is_not_stale", "it writes here"),
    r"python bench/gpu/vllm_sync\.py": ("test_bench_gpu_vllm.py::test_smoke_runs_every_case", "a GPU, vLLM"),
    r"sbatch slurm\.sh .*": ("test_docs.py::test_the_slurm_script_trains_ends_and_is_queued_again", "a cluster"),
}  # fmt: skip

# Appended to a training command, less the keys that it gives itself: a small model that starts within a second.
SMALL = [
    "model.embedded.hidden=64", "model.embedded.mlp=96", "model.embedded.warm_steps=10", "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=4", "eval.problems=8", "eval.samples=2",
    "train.steps=1", "run.view=plain", "sync.probe_every=1",
]  # fmt: skip
MOST_STEPS = 8
QWEN3_0_6B = Qwen3Config(
    vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
)  # fmt: skip
LAST_STEP = {"160": "1", "100": "1", "step-00160": "step-00001"}  # of the runs that the documents go on from
FILES = {  # a reader's own
    "my.jsonl": "".join(json.dumps({"prompt": f"copy {i}", "answer": str(i)}) + "\n" for i in range(40)),
    "my.py": "def right(response, row):\n    return response.strip() == row['answer']\n",
    "math.jsonl": "".join(json.dumps({"prompt": f"{i} + 4?", "answer": str(i + 4)}) + "\n" for i in range(40)),
    "math-test.jsonl": json.dumps({"prompt": "100 + 4?", "answer": "104"}) + "\n",
    "code.jsonl": '{"prompt": "Add.", "tests": [{"args": [1, 2], "expected": 3}]}\n' * 4,
    "answers.jsonl": '{"response": "7", "answer": "7", "verifier": "exact"}\n',
    "programs.jsonl": json.dumps({
        "response": "```python\ndef add(a, b):\n    return a + b\n```", "verifier": "code", "prompt": "Add.",
        "tests": [{"args": [1, 2], "expected": 3}], "solution": "def add(a, b):\n    return b + a\n",
    }) + "\n",
    "aime24.jsonl": '{"prompt": "1 + 1?", "answer": "2"}\n',
    "math500.jsonl": '{"prompt": "1 + 2?", "answer": "3"}\n',
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ what they hold


class Block(NamedTuple):
    tag: str
    text: str
    before: str  # the paragraph before it
    line: int

    @property
    def file(self) -> str | None:
        """What the paragraph before it names it."""
        found = re.match(r"`([\w-]+\.\w+)`", self.before)
        return found[1] if found and (self.tag != "bash" or self.text.startswith("#!")) else None

    def commands(self) -> list[str]:
        joined = re.sub(r"\\\n\s*", " ", self.text)
        return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a document, in order."""
    lines = text.splitlines()
    start: int | None = None
    for i, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = i
        else:
            paragraph = "\n".join(lines[:start]).rstrip().rpartition("\n\n")[2]
            yield Block(lines[start][3:].strip(), "\n".join(lines[start + 1 : i]) + "\n", paragraph, start + 1)
            start = None
    assert start is None, "a fence that does not end"


def outside(text: str) -> str:
    """The document without its fenced blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def commands(document: Path) -> list[str]:
    found = (block for block in blocks(document.read_text(encoding="utf-8")) if block.tag == "bash")
    return [command for block in found if not block.text.startswith("#!") for command in block.commands()]


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


# --------------------------------------------------------------------------------------------------- how one is run


class Reader:
    """Somebody who follows a document in a folder of his own."""

    def __init__(self, folder: Path, run: Path, warm: Path, shapes: Path):
        self.folder, self.here, self.run, self.warm, self.shapes = folder, folder, run, warm, shapes
        for path in ROOT.iterdir():
            if not path.name.startswith(".") and path.name not in ("runs", "models", "build", "trained"):
                (folder / path.name).symlink_to(path)
        for name, text in FILES.items():
            (folder / name).write_text(text, encoding="utf-8")

    def words(self, command: str) -> list[str]:
        """What a shell makes of it: comments, quotes, wildcards, what it substitutes."""
        script = f"shopt -s failglob; printf '%s\\0' {command}"
        done = subprocess.run(["bash", "-c", script], cwd=self.here, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.split("\0")[:-1]

    def follow(self, command: str, verbatim: bool = False) -> None:
        words = self.words(command)
        act = how(words)
        assert act is not None, f"no test knows how to run: {command}"
        act(self, words, verbatim)

    # each kind of command ------------------------------------------------------------------------------------------

    def elsewhere(self, words: list[str], verbatim: bool) -> None:
        """ELSEWHERE has it."""

    def shell(self, words: list[str], verbatim: bool) -> None:
        words = [sys.executable if word == "python" else word for word in words]
        done = subprocess.run(words, cwd=self.here, capture_output=True, text=True, timeout=60, env=environment())
        assert done.returncode == 0, (words, done.stderr)

    def change_folder(self, words: list[str], verbatim: bool) -> None:
        self.here = self.here / words[1]
        os.chdir(self.here)

    def make(self, words: list[str], verbatim: bool) -> None:
        """The target's own commands are those of other documents and of .ci/run."""
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr

    def install(self, words: list[str], verbatim: bool) -> None:
        """The extra is one that there is."""
        extra = re.search(r"\[(\w[\w-]*)\]$", words[-1])
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert extra is not None, words
        assert extra[1] in project["optional-dependencies"], words

    def benchmark(self, words: list[str], verbatim: bool) -> None:
        """`-k` chooses some; they are no tests, so nothing of them is run."""
        assert "--benchmark-only" in words
        asked = words[words.index("-k") + 1].split(" or ") if "-k" in words else [""]
        names = [f"{p.stem}::{n.name}" for p in (ROOT / "bench").glob("test_*.py") for n in functions(p)]
        assert [one for one in asked if not any(one in name for name in names)] == []

    def train(self, words: list[str], verbatim: bool) -> None:
        launched = next(i for i, word in enumerate(words) if "cipo_fast" in word)  # torchrun's own options before it
        ranks = 1
        for option in words[:launched]:
            if option.startswith(("--nproc-per-node=", "--nnodes=")):
                ranks *= int(option.partition("=")[2])
        args = words[launched + 1 :]
        settings = self.model_in_files(args)
        settings |= dict(arg.split("=", 1) for arg in args if "=" in arg and not arg.startswith("-"))
        if {"--help", "--dry-run"} & set(args) or ranks > 1 or needs_more(args, settings):
            args += self.model_of(args, settings)
            if "--help" not in args and "--dry-run" not in args:
                args += ["--dry-run", "--world", str(ranks), "--device-memory", "80"]
            with redirect_stdout(StringIO()) as printed:
                run_module("cipo_fast.train", args)
            assert "DOES NOT FIT" not in printed.getvalue(), words
            return
        if not verbatim:
            steps = int(settings.get("train.steps", MOST_STEPS + 1))
            given = settings if steps <= MOST_STEPS else {k: v for k, v in settings.items() if k != "train.steps"}
            args += [more for more in SMALL if more.partition("=")[0] not in given]
        config = load_config([arg for arg in args if "=" not in arg], [arg for arg in args if "=" in arg])
        config.run_dir.mkdir(parents=True, exist_ok=True)
        if not (config.run_dir / "warm_start").exists() and settings.get("train.steps") != "0":  # made to be looked at
            (config.run_dir / "warm_start").symlink_to(self.warm / "warm_start")
        run_module("cipo_fast.train", args)

    def model_in_files(self, args: list[str]) -> dict[str, str]:
        """model.path and the engine of the reader's own files."""
        found = {}
        for arg in args:
            if arg.endswith(".yaml") and (self.here / arg).is_file():
                own = yaml.safe_load((self.here / arg).read_text(encoding="utf-8"))
                found |= {"model.path": own["model"]["path"], "rollout.engine": own["rollout"]["engine"]}
        return found

    def model_of(self, args: list[str], settings: dict[str, str]) -> list[str]:
        """The shape of a model that is not here, as an override."""
        recipe = next((SHAPES[arg] for arg in args if arg in SHAPES), QWEN3_4B)
        path = settings.get("model.path", "")
        if not path and not any(arg in SHAPES for arg in args):
            return []
        shape = SMOLLM2 if "smollm" in path else QWEN3_0_6B if "0.6B" in path else recipe
        where = self.shapes / str(shape.hidden_size)
        if not where.exists():
            shape.save_pretrained(where)
        return [f"model.path={where}"]

    def evaluate(self, words: list[str], verbatim: bool) -> None:
        args = [LAST_STEP.get(word, word) for word in words[3:]]
        self.finished(args)
        if any(re.fullmatch(r"[A-Z]\w+/\w[\w.-]+", arg) for arg in args):  # of a hub
            module = importlib.import_module("cipo_fast.evaluate")
            config, weights, _ = module.prepared(module.parse(args))
            assert config.data.eval
            assert weights.path in args
            return
        run_module("cipo_fast.evaluate", args if verbatim or args[0] == "--compare" else [*args, "--n", "2"])

    def module(self, words: list[str], verbatim: bool) -> None:
        args = [LAST_STEP.get(word, word) for word in words[3:]]
        self.finished(args)
        run_module(words[2], args)

    def finished(self, args: list[str]) -> None:
        """Runs that the reader has made before he came to this document."""
        for name in re.findall(r"runs/[\w-]+", " ".join(args)):
            if not (self.here / name).exists():
                (self.here / "runs").mkdir(exist_ok=True)
                subprocess.run(["cp", "-r", str(self.run), str(self.here / name)], check=True)

    def figure(self, words: list[str], verbatim: bool) -> None:
        assert (ROOT / words[1]).is_file()  # test_the_figure_of_a_tree, test_the_figure_of_the_rules


Act = Callable[[Reader, list[str], bool], None]
PYTHON_MODULES = {
    "audit", "embedded.hints", "experiment", "export", "judge", "plan", "report", "tasks", "word_problems",
}  # fmt: skip


def how(words: list[str]) -> Act | None:
    """How a command is run; None where nobody knows."""
    if in_elsewhere(words) is not None:
        return Reader.elsewhere
    match words:
        case ["torchrun", *_] | ["python", "cipo_fast/train.py", *_] | ["python", "-m", "cipo_fast.train", *_]:
            return Reader.train
        case ["python", "-m", "cipo_fast.evaluate", *_]:
            return Reader.evaluate
        case ["python", "-m", name, *_] if name.removeprefix("cipo_fast.") in PYTHON_MODULES:
            return Reader.module
        case ["python", name] if name.startswith("docs/figures/"):
            return Reader.figure
        case ["python", name] if re.fullmatch(r"[\w-]+\.py", name):
            return Reader.shell
        case ["mkdir" | "ls" | "head" | "cat", *_]:
            return Reader.shell
        case ["cd", _]:
            return Reader.change_folder
        case ["make", *_]:
            return Reader.make
        case ["pip", "install", *_]:
            return Reader.install
        case ["pytest", "bench/", *_]:
            return Reader.benchmark
    return None


def in_elsewhere(words: list[str]) -> str | None:
    return next((pattern for pattern in ELSEWHERE if re.fullmatch(pattern, " ".join(words))), None)


def needs_more(args: list[str], settings: dict[str, str]) -> bool:
    """A model from the hub or another process's engine."""
    engine, model = settings.get("rollout.engine", "local"), settings.get("model.path", "")
    return engine != "local" or bool(set(args) & set(SHAPES)) or bool(model and not Path(model).exists())


def run_module(name: str, args: list[str]) -> None:
    module = importlib.import_module(name)
    module = module if hasattr(module, "main") else importlib.import_module(f"{name}.__main__")
    before, sys.argv = sys.argv, [name, *args]
    try:
        assert module.main() == 0, (name, args)
    finally:
        sys.argv = before


def functions(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, warm: Path) -> Path:
    """A run of one step, as the default command leaves it."""
    folder = tmp_path_factory.mktemp("embedded") / "runs" / "embedded"
    folder.mkdir(parents=True)
    (folder / "warm_start").symlink_to(warm / "warm_start")
    run_module("cipo_fast.train", [*SMALL, f"run.dir={folder}"])
    return folder


@pytest.fixture
def reader(
    finished: Path,
    warm: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Reader:
    folder = tmp_path / "cipo_fast"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Reader(folder, finished, warm, tmp_path_factory.getbasetemp() / "shapes")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "document", [d for d in WITH_COMMANDS if commands(d) and d.name != "quickstart.md"], ids=name_of
)
def test_every_command_works(document: Path, reader: Reader) -> None:
    follow(document, reader)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quick_start_word_for_word(reader: Reader) -> None:
    """From the clone to the export, in one folder. What is of the own verifier's run is not shortened in anything."""
    reader.here = reader.folder.parent
    follow(ROOT / "docs" / "quickstart.md", reader, verbatim="own_verifier")
    runs = reader.here / "runs"
    summary = json.loads((runs / "own_verifier" / "summary.json").read_text())
    assert summary["steps"] == 20
    assert summary["before"]["t1"] > 0.05  # the verifier marks some of them right
    files = (runs / "own_verifier" / "rollouts").glob("step-*.jsonl")
    rollouts = [json.loads(line) for file in files for line in file.open()]
    right = [r for r in rollouts if r["verdict"] == "right"]
    assert {r["verdict"] for r in rollouts} >= {"right", "wrong"}
    assert any(r["text"].strip() != r["answer"] for r in right)  # it is not the answer that is compared with
    judged = [json.loads(line) for line in (reader.here / "judged.jsonl").open()]
    assert {line["verdict"] for line in judged} >= {"right", "wrong"}


def follow(document: Path, reader: Reader, verbatim: str = "nothing") -> None:
    """All of a document; commands that hold `verbatim` as they stand."""
    for block in blocks(document.read_text(encoding="utf-8")):
        if block.file is not None:
            (reader.here / block.file).write_text(block.text, encoding="utf-8")
        elif block.tag == "python":
            exec(compile(block.text, f"{document}:{block.line}", "exec"), {})
        elif block.tag == "yaml":
            yaml.safe_load(block.text)
        elif block.tag == "json":
            json.loads(block.text)
        if block.tag == "bash" and block.file is None:
            for command in block.commands():
                reader.follow(command, verbatim in command)


def test_a_command_of_no_class_fails(reader: Reader) -> None:
    for command in ("python -m cipo_fast.nobody_knows", "rm -rf runs", "python cipo_fast/learner.py", "pytest tests/"):
        with pytest.raises(AssertionError, match="no test knows how to run"):
            reader.follow(command)
    for command in (
        "python cipo_fast/train.py no_such_recipe.yaml",
        "torchrun --nproc-per-node=8 cipo_fast/train.py qwen3_4b_math.yaml rollout.engin=vllm",
        "torchrun cipo_fast/train.py qwen3_4b_math.yaml",  # does not fit
        "pytest bench/ --benchmark-only -k no_such_benchmark",
        "make no-such-target",
        "pip install 'cipo-fast[no-such-extra]'",
        "python -m cipo_fast.judge no_such_file.jsonl",
    ):
        with pytest.raises((AssertionError, UserError)):
            reader.follow(command)


def test_what_is_run_elsewhere_is_run_there() -> None:
    """Each line of ELSEWHERE is of a command that a document has, and its test exists."""
    found = [command for document in WITH_COMMANDS for command in commands(document)]
    plain = [" ".join(command.partition(" #")[0].split()) for command in found]
    for pattern, (test, why) in ELSEWHERE.items():
        assert any(re.fullmatch(pattern, command) for command in plain), f"no document has {pattern} any more"
        file, _, name = test.partition("::")
        assert name in [function.name for function in functions(ROOT / "tests" / file)], test
        assert why


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=name_of)
def test_blocks_say_what_they_are(document: Path) -> None:
    """... and no command hides in an indented block or in a line of text, unless what it names is there."""
    text = document.read_text(encoding="utf-8")
    assert [(block.line, block.tag) for block in blocks(text) if block.tag not in TAGS] == []
    starts = r"(?:torchrun|python|pytest|make|pip|bench/)"
    assert re.findall(rf"(?m)^    (?:\$ )?{starts} .*$", outside(text)) == []
    for inline in re.findall(rf"`((?:\w+=\w+ )?{starts}\b[^`]*)`", outside(text)):
        for file in re.findall(r"[\w./-]+/[\w.-]+\.(?:py|sh)\b", inline):
            assert (ROOT / file).is_file(), inline
        for module in re.findall(r"python -m (cipo_fast\.[\w.]+)", inline):
            assert importlib.util.find_spec(module) is not None, inline
        if inline.startswith("make "):
            assert re.search(rf"(?m)^{inline.split()[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8")), inline


def anchors(document: Path) -> set[str]:
    """Of its headings, as code hosts make them."""
    headings = re.findall(r"(?m)^#+ (.*)$", outside(document.read_text(encoding="utf-8")))
    found: set[str] = set()
    for heading in headings:
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        found.add(name if name not in found else f"{name}-1")
    return found


@pytest.mark.parametrize("document", LINKED, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", outside(document.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_readme_is_short_and_names_every_document() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    for document in LINKED:
        if document.parent == ROOT / "docs":
            assert f"](docs/{document.name})" in text


def test_the_figure_of_a_tree() -> None:
    """docs/figures/tree.svg is what its script draws now."""
    drawn = script("tree").figure()
    assert drawn == (ROOT / "docs/figures/tree.svg").read_text(encoding="utf-8"), "python docs/figures/tree.py"


def test_the_figure_of_the_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    rules = script("replay_rules")
    monkeypatch.setattr(rules, "STEPS", 4)
    monkeypatch.setattr(rules, "SEEDS", 2)
    monkeypatch.setattr(rules, "__file__", str(tmp_path / "rules.py"))
    rules.figure()
    assert (tmp_path / "rules.png").stat().st_size > 1000
    assert rules.drift(rules.RULES["attainable"], 0.8, 0.3) == pytest.approx(0, abs=0.1)


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "figures" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------------- Slurm

SRUN = """#!/bin/bash
# Slurm's part: two tasks with their places; signals go to the tasks. The exit code is the largest of theirs.
while [[ "$1" == --* ]]; do shift; done
export SLURM_NTASKS=2
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks[$task]=$!
done
echo "${tasks[@]}" > tasks
code=0
for task in 0 1; do
    wait "${tasks[$task]}"
    found=$?
    if (( found > code )); then code=$found; fi
done
exit $code
"""
SCONTROL = """#!/bin/bash
if [[ "$1 $2" == "show hostnames" ]]; then echo 127.0.0.1; else echo "$@" >> requeued; fi
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_slurm_script_trains_ends_and_is_queued_again(tmp_path: Path, warm: Path) -> None:
    """With stand-ins for srun and scontrol: two ranks of one run; USR1 ends it with 75 and puts it into the queue; the
    same command goes on."""
    [block] = [b for b in blocks((ROOT / "docs/running.md").read_text(encoding="utf-8")) if b.file == "slurm.sh"]
    (tmp_path / "cipo_fast").symlink_to(ROOT / "cipo_fast")
    (tmp_path / "slurm.sh").write_text(block.text.replace("29500", str(free_port())), encoding="utf-8")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    folder = tmp_path / "runs" / "job"
    folder.mkdir(parents=True)
    (folder / "warm_start").symlink_to(warm / "warm_start")
    job = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "7"}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**environment(), **job, "PATH": path, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = ["bash", "slurm.sh", *SMALL, f"run.dir={folder}"]
    metrics = folder / "metrics.jsonl"
    with subprocess.Popen([*command, "train.steps=100000"], cwd=tmp_path, env=env, stderr=-1, text=True) as process:
        try:
            wait_for_lines(metrics, 2, process)  # type: ignore[arg-type]
            subprocess.run(["kill", "-USR1", *(tmp_path / "tasks").read_text().split()], check=True)
            said = process.communicate(timeout=100)[1]
        finally:
            process.kill()
    assert process.returncode == 75, said
    assert "the same command goes on" in said
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    steps = metrics.read_bytes().count(b"\n")
    more = [f"train.steps={steps + 1}"]
    done = subprocess.run([*command, *more], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"resumed after step {steps}" in done.stdout
    assert metrics.read_bytes().count(b"\n") == steps + 1
