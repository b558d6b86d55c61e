"""Every setting, with its default, range and source; nothing else defines a default.

Sources: [paper] arXiv 2605.14539 as published in summary, [f2f] the form Fail2Fix-RL uses, [ours] our decision,
or the work named. Three layers are merged, later ones win: YAML files in the order given, then `key.path=value`.
When `model.path` is `embedded` (the default), `configs/embedded.yaml` lies under all of them.

algorithm.py  corrections, replay, loss           rollout.py   engines and sync
data.py       what is asked                       verify.py    how it is judged, the sandbox
job.py        model, optimiser, loop, files       config.py    all of it
loading.py    files and arguments to a Config     settings.py  how a text becomes a value
"""

from cipo_fast.config.algorithm import CorrectionConfig, LossConfig, NudgeConfig, ReplayConfig
from cipo_fast.config.config import Config
from cipo_fast.config.data import DataConfig
from cipo_fast.config.job import EmbeddedModel, ModelConfig, OptimConfig
from cipo_fast.config.loading import (
    HUB_NAME,
    OVERRIDE,
    cautions,
    comparison,
    configs_dir,
    known_keys,
    load_config,
    parse_args,
    read_as,
    read_config,
)
from cipo_fast.config.rollout import RolloutConfig
from cipo_fast.config.verify import SandboxConfig, VerifyConfig

__all__ = [
    "HUB_NAME", "OVERRIDE", "Config", "CorrectionConfig", "DataConfig", "EmbeddedModel", "LossConfig", "ModelConfig",
    "NudgeConfig", "OptimConfig", "ReplayConfig", "RolloutConfig", "SandboxConfig", "VerifyConfig", "cautions",
    "comparison", "configs_dir", "known_keys", "load_config", "parse_args", "read_as", "read_config",
]  # fmt: skip
