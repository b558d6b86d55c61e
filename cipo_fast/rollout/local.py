"""The local engine: transformers' own `generate`, on the trainer's device."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from cipo_fast.errors import PolicyBroken
from cipo_fast.records import Completion
from cipo_fast.rollout import Sampling, SyncReport
from cipo_fast.rollout.fingerprints import Fingerprint, of_parameter


class LocalEngine:
    """Holds a copy of the model with stock attention and a KV cache. `eos_ids` end an answer; padding is found by
    position, never by token, so a tokenizer whose pad is its eos loses nothing."""

    def __init__(
        self,
        model: PreTrainedModel,
        eos_ids: list[int],
        pad_id: int,
        batch_sequences: int,
        max_model_len: int | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.eos_ids = eos_ids
        self.pad_id = pad_id
        self.batch_sequences = batch_sequences
        self.policy_version = -1
        self.max_model_len = max_model_len

    def generate(self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seed: int) -> list[list[Completion]]:
        found: list[list[Completion]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding in a batch
        batch = max(1, self.batch_sequences // n)
        with torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch):
                members = by_length[start : start + batch]
                for i, completions in zip(
                    members, self._generate([prompts[i] for i in members], n, sampling), strict=True
                ):
                    found[i] = completions
        return found

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        started = time.perf_counter()
        own = dict(self.model.named_parameters())
        count = size = 0
        for name, tensor in weights:
            target = own.pop(name, None)
            if target is None or target.shape != tensor.shape:
                raise RuntimeError(f"sync: the engine has no parameter {name} of shape {tuple(tensor.shape)}")
            target.data.copy_(tensor)
            count += 1
            size += tensor.numel() * tensor.element_size()
        if own:
            raise RuntimeError(f"sync: the trainer sent no {', '.join(sorted(own)[:3])}")
        self.policy_version = version
        return SyncReport(version, count, size, time.perf_counter() - started)

    @torch.no_grad()
    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        found = []
        for ids in sequences:
            input_ids = torch.tensor([ids], device=self.model.device)
            logp = self.model(input_ids).logits[0, :-1].float().log_softmax(-1)  # [L - 1, V]
            found.append(logp.gather(1, input_ids[0, 1:, None]).squeeze(1).tolist())
        return found

    def fingerprints(self) -> dict[str, Fingerprint]:
        head = self.model.get_output_embeddings().weight
        return {"lm_head.weight": of_parameter(head)} | {
            name: of_parameter(parameter) for name, parameter in self.model.named_parameters()
        }

    def release(self) -> None:
        pass

    def restart(self) -> None:
        raise NotImplementedError("the local engine lives and dies with the trainer")

    def prefix_cache(self) -> tuple[int, int]:
        return 0, 0

    def close(self) -> None:
        pass

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], n: int, sampling: Sampling) -> list[list[Completion]]:
        width = max(len(p) for p in prompts)
        device = self.model.device
        input_ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        recorder = _LogProbs()
        warpers: list[LogitsProcessor] = []
        if sampling.temperature not in (0, 1):
            warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        shaping = {"top_k": 0} if sampling.temperature > 0 else {}  # the processors above are all the shaping there is
        try:
            output = self.model.generate(
                input_ids.repeat_interleave(n, 0),
                attention_mask=mask.repeat_interleave(n, 0),
                logits_processor=LogitsProcessorList([*warpers, recorder]),
                generation_config=GenerationConfig(
                    do_sample=sampling.temperature > 0,
                    max_new_tokens=sampling.max_tokens,
                    eos_token_id=self.eos_ids,
                    pad_token_id=self.pad_id,
                    **shaping,
                ),
            )
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            version = self.policy_version
            raise PolicyBroken(f"policy version {version} gives probabilities that are not finite") from None
        tokens = output[:, width:]  # [len(prompts) * n, L]
        logps = recorder.finish(output)
        ended = torch.isin(tokens, torch.tensor(self.eos_ids, device=device))
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1]).tolist()
        completions = [
            Completion(token[:length], logp[:length], not end, self.policy_version)
            for token, logp, length, end in zip(
                tokens.tolist(), logps.tolist(), lengths, ended.any(1).tolist(), strict=True
            )
        ]
        return [completions[i : i + n] for i in range(0, len(completions), n)]


class _LogProbs(LogitsProcessor):
    """Last in the chain: the log-probs of the tokens that get sampled, keeping one step's [n, V] and no more."""

    def __init__(self) -> None:
        self.step: Tensor | None = None  # [n, V] log-probs of the step being sampled
        self.taken: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        self.step = scores.float().log_softmax(-1)
        return scores

    def finish(self, sequences: Tensor) -> Tensor:
        """[n, L] fp32, once `generate` has returned."""
        self._take(sequences)
        return torch.stack(self.taken, dim=1)

    def _take(self, input_ids: Tensor) -> None:
        if self.step is not None:
            self.taken.append(self.step.gather(1, input_ids[:, -1:]).squeeze(1))
