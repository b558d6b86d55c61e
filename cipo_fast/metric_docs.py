"""What the columns of metrics.jsonl mean, as docs/metrics.md: `python -m cipo_fast.metric_docs > docs/metrics.md`.

A test holds them to what a run writes, both ways. The figures of eval.jsonl stand in docs/evaluation.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

HEAD = """\
# Metrics

`metrics.jsonl` has a row a step; the trackers of `run.trackers` get the same. `null` is "nothing to count", never 0.
Written by `python -m cipo_fast.metric_docs`; a test holds it to what a run writes. `eval.jsonl` has a row an
evaluation: the step, `tokens/sampled`, `flops/total` and `seconds` so far, and the figures of
[evaluation.md](evaluation.md) as `eval/...`.

STREAM is `rollout` or `correction`. Log-probs and entropies are in nats, at the sampling temperature, a token's mean
unless said otherwise. Healthy: what a run that learns shows; it is a hint, not a bound."""

# heading -> {column: (what it is, what is healthy)}
MEANINGS: dict[str, dict[str, tuple[str, str]]] = {
    "The step": {
        "step": ("The step, from 1.", ""),
        "seed": ("The run's seed.", ""),
    },
    "Answers": {
        "rollout/accuracy": ("Share of right rollouts: T=1 on training problems.", "rises"),
        "STREAM/length": ("Tokens an answer, its end token among them.", "away from rollout.max_tokens"),
        "STREAM/truncated": ("Share that rollout.max_tokens cut off.", "near 0"),
        "STREAM/no_variance": (
            "Share of groups (of an anchor's corrections) whose rewards are all alike: they teach nothing.",
            "not near 1",
        ),
        "rollout/prefix_hit_rate": ("Share of prompt tokens found in vLLM's prefix cache; null for `local`.", ""),
        "source/NAME/accuracy": ("rollout/accuracy of one source, where there are several.", ""),
        "nudge/hinted": ("Share of rollouts that saw a hint; the three only with nudge.hints.", ""),
        "nudge/hinted_accuracy": ("Accuracy of those.", "above nudge/bare_accuracy, or hints do not help"),
        "nudge/bare_accuracy": ("Accuracy of the other rollouts.", "rises"),
    },
    "Verdicts, of rollouts and corrections together": {
        "verify/right": ("Share judged right.", ""),
        "verify/wrong": ("Share judged wrong.", ""),
        "verify/unparsable": ("Share with no answer to judge; wrong.", "falls early"),
        "verify/timeout": ("Share whose judging ran out of time; wrong.", "near 0"),
        "verify/failed": ("Answers that nobody could judge, a number; left out.", "0"),
    },
    "Corrections": {
        "correction/wrong_to_right": ("Share of corrections of wrong attempts that are right.", "rises"),
        "correction/right_to_wrong": ("Share of corrections of right attempts that are wrong.", "falls"),
        "correction/retention": ("1 - right_to_wrong.", "rises"),
        "correction/gap": (
            "Correction of a wrong attempt less the pass rate of its problem's other rollouts: is seeing the attempt "
            "worth more than trying again? Biased upward; an evaluation's is not.",
            "above 0",
        ),
        "correction/verbatim_copy": ("Share that repeat the attempt.", "low"),
        "correction/lambda_corr": ("The stream's weight at this step (correction.warmup_steps).", ""),
        "correction/right_weight": ("Right anchors' share of the corrections' loss weight, before its bound.", ""),
        "anchors/right_wanted": ("Right anchors asked for, rho of the step's.", ""),
        "anchors/right": ("... and found.", "as wanted"),
        "anchors/wrong_wanted": ("Wrong anchors asked for.", ""),
        "anchors/wrong": ("... and found.", "as wanted"),
        "anchors/dropped": ("Anchors whose correction prompt was too long.", "0"),
    },
    "The replay controller": {
        "replay/rho": ("Share of right anchors in this step.", "settles"),
        "replay/retention": ("Smoothed correction/retention, what the controller goes by.", "at the target"),
        "replay/attainable": ("Smoothed agreement of retries of right problems: what retention can reach.", ""),
        "replay/target": ("Retention below it raises rho.", ""),
    },
    "The update": {
        "loss/total": ("The loss, a mean over updates. Advantages have mean 0: its size says little.", ""),
        "grad/norm": ("Largest gradient norm of the step's updates, before clipping.", "no jumps"),
        "optim/lr": ("Learning rate.", ""),
        "train/skipped": ("Updates that were not finite and are in no weight.", "0"),
        "STREAM/entropy": ("Entropy over what is learned from.", "falls slowly, stays above 0"),
        "STREAM/clip_fraction": (
            "Share of targets whose policy gradient is clipped; 0 with one update a step.",
            "low",
        ),
        "STREAM/approx_kl": ("k3 estimate of KL(old || policy).", "low"),
        "STREAM/ratio_max": ("Largest ratio of policy to old policy.", "near 1"),
        "STREAM/all_entropy": ("Entropy over every sampled token, every train.measure_every steps, as all_*.", ""),
        "STREAM/all_approx_kl": ("approx_kl over every sampled token.", ""),
    },
    "Trainer against engine": {
        "STREAM/sampler_gap": ("Mean |trainer's log-prob - the sampler's|, over what is learned from.", "near 0"),
        "STREAM/sampler_gap_max": ("The largest.", ""),
        "STREAM/mismatch_kl": ("k3 estimate of KL(sampler || trainer).", "near 0"),
        "STREAM/mismatch_outside": ("Share of ratios trainer / sampler outside [0.9, 1.1].", "< sync.alarm_outside"),
        "STREAM/all_mismatch_kl": ("mismatch_kl over every sampled token.", ""),
        "STREAM/all_mismatch_outside": ("mismatch_outside over every sampled token.", ""),
        "sync/parity_max_abs": ("Largest |trainer - engine| log-prob of the probe after a sync.", "< sync.tolerance"),
        "sync/parity_mean_abs": ("Its mean.", ""),
        "sync/changed": ("Share of tensors that the sync changed; null at the first.", "1"),
        "sync/gb": ("GB that the sync moved.", ""),
    },
    "What CIPO itself may teach": {
        "audit/reward_length_corr": ("Correlation of reward and length within groups of rollouts.", "|.| < 0.5"),
        "audit/correction_length_corr": ("The same within an anchor's corrections.", "|.| < 0.5"),
    },
    "Alarms: 1 while on": {
        "alarm/no_variance": ("Hardly a group has an advantage.", "0"),
        "alarm/truncated": ("Every rollout is cut off.", "0"),
        "alarm/no_anchors": ("Anchors were wanted and none was found.", "0"),
        "alarm/no_change": ("Syncs bring the same weights.", "0"),
        "alarm/mismatch": ("Trainer and engine are further apart than sync.alarm_outside.", "0"),
        "alarm/length_reward": ("Reward and length go together, |correlation| above 0.5.", "0"),
        "alarm/copies": ("More than half of the corrections repeat their attempt.", "0"),
        "alarm/breaks_right": ("Checks break more right attempts than chance would.", "0"),
    },
    "Work and time": {
        "tokens/sampled": ("Tokens sampled, rollouts and corrections.", ""),
        "tokens/forwarded": ("Tokens through the model in training, shared ones once.", ""),
        "tokens/rows": ("... had every conversation been a row.", ""),
        "tokens/saved": ("1 - forwarded / rows.", ""),
        "flops/sample": ("FLOPs of sampling, with a perfect prefix cache.", ""),
        "flops/train": ("FLOPs of training, forward and backward.", ""),
        "time/generate_s": ("Seconds of sampling; with rollout.overlap what the loop waited for.", ""),
        "time/verify_s": ("Seconds of judging that sampling did not hide.", ""),
        "time/old_logp_s": ("Seconds of log-probs before the first of several updates.", ""),
        "time/train_s": ("Seconds of updates.", ""),
        "time/sync_s": ("Seconds of weights on their way.", ""),
        "time/probe_s": ("Seconds of the comparison after it.", ""),
        "time/idle_s": ("The rest of the step.", "small"),
        "time/step_s": ("Seconds of the step.", ""),
        "memory/peak_gb": (
            "GB of its GPU's memory that the first rank's tensors took so far; without a GPU, of RAM.",
            "",
        ),
    },
}


def columns() -> Iterator[str]:
    """Every column, STREAM written out; NAME stands for whatever a source is called."""
    for column in (name for group in MEANINGS.values() for name in group):
        if column.startswith("STREAM/"):
            yield from (column.replace("STREAM", stream) for stream in ("rollout", "correction"))
        else:
            yield column


def unexplained(found: Iterable[str]) -> set[str]:
    """Those of a run's columns that are not here."""
    known = set(columns())
    return {name for name in found if re.sub(r"^source/.*/accuracy$", "source/NAME/accuracy", name) not in known}


def reference() -> str:
    parts = [HEAD]
    for heading, group in MEANINGS.items():
        cells = ((f"`{name}`", *words) for name, words in group.items())
        rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
        parts.append("\n".join((f"## {heading}\n", "| column | what it is | healthy |", "|---|---|---|", *rows)))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
