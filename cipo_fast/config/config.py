"""All sections together, and what follows from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cipo_fast.config.algorithm import CorrectionConfig, LossConfig, NudgeConfig, ReplayConfig
from cipo_fast.config.data import DataConfig
from cipo_fast.config.job import CheckpointConfig, EvalConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from cipo_fast.config.rollout import RolloutConfig, SyncConfig
from cipo_fast.config.section import NonNegative, Section
from cipo_fast.config.settings import to_yaml
from cipo_fast.config.verify import SandboxConfig, VerifyConfig


class Config(Section):
    seed: NonNegative = 0
    """Every random choice is a function of this seed, the step and its purpose."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    sync: SyncConfig = SyncConfig()
    verify: VerifyConfig = VerifyConfig()
    sandbox: SandboxConfig = SandboxConfig()
    correction: CorrectionConfig = CorrectionConfig()
    replay: ReplayConfig = ReplayConfig()
    loss: LossConfig = LossConfig()
    nudge: NudgeConfig = NudgeConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()

    @property
    def run_dir(self) -> Path:
        return self.run.dir or Path("runs") / self.run.name

    @property
    def anchors_per_step(self) -> int:
        """N = round(phi * B); 0 when the correction stream is off."""
        if self.correction.lambda_corr == 0:
            return 0
        return round(self.correction.anchors_per_prompt * self.rollout.prompts_per_step)

    @property
    def max_model_len(self) -> int:
        """Longest prompt and answer together that the engine must hold, in tokens."""
        if self.rollout.vllm.max_model_len is not None:
            return self.rollout.vllm.max_model_len
        corrects = self.anchors_per_step or self.eval.checks
        correction = self.correction.max_prompt_tokens if corrects else 0
        prompt = max(self.data.max_prompt_tokens, correction)
        return prompt + max(self.rollout.max_tokens, self.eval.max_tokens)

    @property
    def held_out(self) -> int:
        """Most problems held out where no `data.eval` holds them."""
        return self.eval.problems or 400

    @property
    def samples_per_anchor(self) -> int:
        return self.correction.samples_per_anchor or self.rollout.samples_per_prompt

    def to_yaml(self) -> str:
        """What starts the same run again, from any folder."""
        return to_yaml(self.model_dump(mode="json"))


def flat(config: Config) -> dict[str, Any]:
    """{dotted key: value}, as JSON has it."""
    return flat_settings(config.model_dump(mode="json"))


def flat_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found.update(flat_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return found
