"""What makes it CIPO: corrections, the replay controller, the loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cipo_fast.config.section import NonNegative, Positive, Section, Share, Weight


class CorrectionConfig(Section):
    lambda_corr: Weight = 1.0
    """Weight of the correction stream [f2f]. 0 is GRPO: no correction is sampled."""
    anchors_per_prompt: Annotated[float, Field(gt=0)] = 1.0
    """phi: a step has round(phi * B) anchors [f2f]."""
    max_anchors_per_prompt: Positive = 2
    """Most anchors from one prompt [ours; f2f has no bound]."""
    samples_per_anchor: Annotated[int, Field(ge=2)] | None = None
    """Gc; None means G [f2f]."""
    preference: Literal["tier", "soft", "uniform"] = "tier"
    """Which prompts give anchors first: medium pass rate [f2f], weight (p(1-p)+0.01)^kappa [ours], or any (control)."""
    tier_low: Share = 3 / 8
    """Lower pass rate of the preferred tier [f2f]."""
    tier_high: Share = 6 / 8
    """Upper pass rate of the preferred tier [f2f]."""
    kappa: Weight = 1.0
    """Exponent of preference=soft [ours]."""
    lambda_risk: Weight = 1.0
    """Penalty for turning a right attempt into a wrong answer [paper; value f2f]."""
    risk_norm: Literal["literal", "raw_std", "pooled"] = "raw_std"
    """How shaped rewards become advantages: [f2f] (the penalty cancels out: a control), [ours], [ours]."""
    loss: Literal["rl", "ce", "both"] = "rl"
    """Correction objective: the RLVR loss [paper], cross-entropy on verified corrections, or rl + mu * ce [ours]."""
    mu: Weight = 0.1
    """Weight of the cross-entropy in loss=both [ours]."""
    max_ce_per_anchor: Positive = 2
    """Verified corrections an anchor that the cross-entropy uses [ours]."""
    context: Literal["anchor", "bare"] = "anchor"
    """What a cross-entropy target is conditioned on: the correction prompt, or the bare prompt [ours]."""
    layout: Literal["followup", "quoted"] = "followup"
    """The conversation goes on after the attempt, token for token [ours], or one turn quotes it [f2f]."""
    verdict: Literal["hidden", "shown"] = "hidden"
    """`shown` tells the policy whether its attempt was right: a control, keeping it is then trivial [f2f, ours]."""
    followup: Annotated[str, Field(min_length=1)] = (
        "Check the answer above. It may or may not be right. Think again, then give your final answer."
    )
    """The user turn after the attempt; in layout=quoted it follows the quotation [ours]."""
    warmup_steps: NonNegative = 0
    """lambda_corr rises linearly over so many steps, those after start_steps, to its full value in the last [ours]."""
    start_steps: NonNegative = 0
    """So many first steps learn by cross-entropy on the policy's own verified corrections alone, before any RL: a
    supervised correction start by rejection sampling [ours]. Of right attempts those that stayed right are learned too,
    with as much weight as all of the others."""
    max_prompt_tokens: Positive = 8192
    """An anchor whose correction prompt is longer is dropped and counted, never cut [ours]."""


class ReplayConfig(Section):
    """The controller of rho, the share of right anchors [paper; formulas and values f2f, smoothing ours]."""

    adaptive: bool = True
    """False keeps rho at rho0 (a control) [paper]."""
    rho0: Share = 0.3
    """rho at the start [f2f]."""
    rho_min: Share = 0.05
    """Smallest rho [ours; f2f: 0.2]. Where so few anchors give less than n_min corrections, a rho that came down to it
    stays."""
    rho_max: Share = 0.8
    """Largest rho [f2f]."""
    rule: Literal["literal", "attainable"] = "attainable"
    """How rho follows retention: one-sided and against tau [f2f], or two-sided and against what a fresh retry attains
    [ours]; docs/algorithm.md says why that is the default."""
    tau: Share = 0.8
    """rule=literal: retention aimed at [f2f]."""
    tau_beyond: Share = 0.2
    """rule=attainable: retention aimed at, as the share of the way from what a fresh retry attains to 1 [ours]."""
    w1: Weight = 0.8
    """Weight of the retention aimed at less retention [f2f]."""
    w2: Weight = 0.3
    """rule=literal: weight of the drop in retention since the last step [f2f]."""
    w3: Weight = 0.05
    """rule=literal: weight of the steps in a row below tau, counted to 3 [f2f]."""
    n_min: Positive = 16
    """Fewest corrections of right anchors that move rho [ours]; 1 is the f2f form."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.7
    """Smoothing of retention and of what is attainable [ours]; 0 is the f2f form."""
    right_weight_max: Share = 1.0
    """Largest share of right anchors in the loss weight of an update's corrections, the sum of |advantage| times weight
    over their tokens; above it their advantages are scaled down. 1 is no bound [ours]."""


class LossConfig(Section):
    eps_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Lower clip of the ratio [DAPO]; 1 is none."""
    eps_high: Annotated[float, Field(gt=0)] = 0.28
    """Upper clip of the ratio [DAPO]."""
    beta: Weight = 0.0
    """Weight of KL_k3(pi || pi_ref) [DAPO: 0; f2f: 1e-4]. Above 0 a frozen copy of the first policy is held."""
    entropy_coef: Weight = 0.0
    """Weight of the entropy bonus [ours]."""
    is_cap: Annotated[float, Field(gt=0)] | None = 2.0
    """Cap of the importance weight exp(old_logp - sampler_logp) between trainer and engine [ours]; null for none."""
    is_level: Literal["token", "sequence"] = "token"
    """That weight a token, or one a sequence, the product of its tokens': unbiased, an old_logp pass dearer [ours]."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio a token, or one a sequence [GSPO], whose clip range is some 700 times narrower: gspo.yaml."""
    clip: Literal["ppo", "cispo"] = "ppo"
    """Beyond the clip range a token teaches nothing, or its ratio is held there [CISPO, MiniMax-M1]; token ratios."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Of a negative advantage the loss is at most this many times it (3 is usual) [arXiv 1912.09729]; null for none."""
    n_step: Positive = 1
    """Ratios a token's weight multiplies: its own and the following n_step - 1 of its answer's [NFPO]. 1 is PPO's; a
    forward pass dearer above, and of use where a batch has several updates, or overlaps sampling; n_step.py."""
    n_step_cap: Annotated[float, Field(gt=0)] = 1.0
    """Largest |log| of the following ratios' product [ours]."""
    normalize: Literal["tokens", "sequences"] = "tokens"
    """A stream's Z: all its tokens [DAPO], or its sequences, then each one's tokens [GRPO]."""
    scale_advantages: bool = True
    """Divide advantages by the group's standard deviation [GRPO]; False is [Dr.GRPO]."""
    advantage_eps: Annotated[float, Field(gt=0)] = 1e-6
    """eps of the standard deviation [ours]."""


class NudgeConfig(Section):
    """Rollouts with strategy hints, alone or beside corrections [NudgeRL, arXiv 2605.15726]."""

    hints: NonNegative = 0
    """M: texts of a row's `hints` that a problem's G rollouts are shared among, each shown after the problem; 0 is off.
    G is a multiple of it; a problem with fewer is sampled without."""
    choose: Literal["first", "random"] = "first"
    """Which M of a problem's hints: the first, or any, by the seed and the step."""
    dropout: Share = 0.5
    """Chance of each hinted rollout to be sampled from the bare prompt instead."""
    between: Weight = 1.1
    """Weight of a hint's mean reward over the problem's, in the advantage of its rollouts."""
    distill: Weight = 0.1
    """Weight of the advantage-weighted cross-entropy of all rollouts on the bare prompt."""
