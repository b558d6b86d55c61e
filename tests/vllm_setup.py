"""A small policy, its engine's config and a reference, for the vLLM tests. vLLM itself is real, on CPU."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from frequencies import FALSE_ALARMS, HOSTILE, SAMPLES, logp_error, p_values
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cipo_fast.chat import Chat
from cipo_fast.config import Config, load_config
from cipo_fast.embedded.model import embedded_tokenizer, new_model
from cipo_fast.engines import build_engine
from cipo_fast.policy import ATTENTION, Policy, build_policy
from cipo_fast.rollout import Engine, Sampling
from cipo_fast.rollout.local import LocalEngine
from cipo_fast.sync import WeightSync

TOKENIZER = embedded_tokenizer()
EOS = TOKENIZER.eos_token_id
SHAPE = ["model.embedded.hidden=64", "model.embedded.heads=2", "model.embedded.kv_heads=1", "model.embedded.mlp=96"]
# Wide enough for long answers, which a test can interrupt.
LIMITS = ["data.max_prompt_tokens=128", "rollout.max_tokens=128", "eval.max_tokens=128", "sync.probe_every=1"]
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("ab", "a longer prompt " * 5, "x", "three")]


class Setup:
    """Policy, engine, and `local`: transformers with the same weights, which the tests hold against the engine."""

    def __init__(self, folder: Path, mesh: DeviceMesh, *overrides: str):
        self.config: Config = load_config([], [*SHAPE, *LIMITS, f"run.dir={folder}", *overrides])
        self.said: list[str] = []
        model = new_model(self.config, ATTENTION)
        twin = copy.deepcopy(model)
        twin.set_attn_implementation("sdpa")
        self.local = LocalEngine(twin, [EOS], TOKENIZER.pad_token_id, 512)
        # What vLLM would find in a model's folder. Every test of an engine is one of the request's being all there is.
        (folder / "engine").mkdir(parents=True)
        shaping = {"eos_token_id": EOS} | {k: v for files in HOSTILE.values() for k, v in files.items()}
        (folder / "engine" / "generation_config.json").write_text(json.dumps(shaping))
        chat = Chat(TOKENIZER, self.config.data)
        self.supervised = build_engine(self.config, model, chat, mesh.device_type, lambda line: self.said.append(line))
        self.engine: Engine = self.supervised.engine
        self.policy: Policy = build_policy(model, self.config, mesh)
        self.sync = WeightSync(self.policy, self.supervised, self.config, PROMPTS)
        self.supervised.publish = self.sync.publish

    def change_weights(self, seed: int, names: str = "", by: float = 0.02) -> None:
        """Add noise to every parameter whose name contains `names`."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.policy.model.named_parameters():
                if names in name:
                    noise = by * torch.randn(parameter.shape, generator=generator)
                    parameter.to_local().add_(noise)  # a group of one: the shard is the whole
        self.local.sync(self.policy.full_weights(), 0)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.policy.full_weights()

    def check_distribution(self) -> None:
        """Sampled frequencies are those of the policy's own probabilities, and the recorded log-probs too."""

        def after(sequences: list[list[int]]) -> Tensor:
            with torch.no_grad():
                return self.local.model(torch.tensor(sequences)).logits[:, -1]

        for temperature, top_p in [(1.0, 1.0), (1.0, 0.9), (0.7, 1.0), (0.7, 0.9)]:
            many = self.engine.generate([PROMPTS[3]] * (SAMPLES // 250), 250, Sampling(temperature, top_p, 2), 7)
            answers = [answer for found in many for answer in found]  # a server gives no more than 256 at once
            values = p_values(after, PROMPTS[3], answers, [EOS], temperature, top_p)
            assert min(values) > FALSE_ALARMS, (temperature, top_p, values)
            assert logp_error(after, PROMPTS[3], answers, temperature, top_p) < 2e-5

    def check_told(self) -> None:
        """All answers that come to their end are told of, once, under their prompt's index, and no others."""
        told: list[tuple[int, tuple[int, ...]]] = []
        asked = (PROMPTS, 6, Sampling(1.0, 1.0, 100), 3)
        found = self.supervised.generate(*asked, lambda i, ids: told.append((i, tuple(ids))))
        ended = [(i, tuple(c.token_ids)) for i, answers in enumerate(found) for c in answers if not c.truncated]
        assert sorted(told) == sorted(ended) != []
        assert len(ended) < 24
        assert [[len(c.token_ids) for c in answers] for answers in self.supervised.generate(*asked)] == [
            [len(c.token_ids) for c in answers] for answers in found
        ]  # listening changes nothing

    def generated_gap(self, prompts: list[list[int]], completions: list[list]) -> float:
        """Largest |log-prob of the engine - transformers'| over sampled tokens, in nats."""
        gaps = [
            abs(mine - theirs)
            for prompt, found in zip(prompts, completions, strict=True)
            for c in found
            for mine, theirs in zip(
                self.local.score([prompt + c.token_ids])[0][len(prompt) - 1 :], c.logps, strict=True
            )
        ]
        return max(gaps)
