"""The local engine: transformers' own `generate`, on the trainer's device."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from cipo_fast.errors import PolicyBroken, UserError
from cipo_fast.model import named_tensors, tied_names
from cipo_fast.records import Completion
from cipo_fast.rollout import Finished, Sampling, SyncReport
from cipo_fast.rollout.checksums import checksum, to_ints

# What `generate` passes through on its way from logits to tokens: a model's own version could shape anything.
GENERATION = ("generate", "_prepare_generation_config", "_get_logits_processor", "_get_stopping_criteria", "_sample")
SCORED_TOGETHER = 512  # tokens whose [V] log-probs are in memory in fp32 at once


class LocalEngine:
    """Holds a copy of the model with stock attention and a KV cache. `eos_ids` end an answer; padding is found by
    position, never by token, so a tokenizer whose pad is its eos loses nothing. The model's own generation config is
    dropped: transformers would fill in from it whatever a request leaves open, a temperature or a penalty."""

    def __init__(
        self,
        model: PreTrainedModel,
        eos_ids: list[int],
        pad_id: int,
        batch_sequences: int,
        max_model_len: int | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.model.generation_config = GenerationConfig()
        self.eos_ids = eos_ids
        self.pad_id = pad_id
        self.batch_sequences = batch_sequences
        self.policy_version = -1
        self.max_model_len = max_model_len
        self._whole = True  # False from the first byte of a sync to its end
        self._refuse_shaping()

    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        finished: Finished | None = None,
    ) -> list[list[Completion]]:
        self._check_whole()
        for prompt in prompts:
            if self.max_model_len is not None and len(prompt) >= self.max_model_len:
                raise RuntimeError(f"a prompt of {len(prompt)} tokens leaves no room in {self.max_model_len}")
        found: list[list[Completion]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding in a batch
        batch = max(1, self.batch_sequences // n)
        with torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch):
                members = by_length[start : start + batch]
                completions = self._generate(prompts, members, n, sampling, finished)
                for i, mine in zip(members, completions, strict=True):
                    found[i] = mine
        return found

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        started = time.perf_counter()
        self._whole = False
        own = dict(named_tensors(self.model))
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
        self._whole = True
        self.policy_version = version
        return SyncReport(version, count, size, time.perf_counter() - started)

    @torch.no_grad()
    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        self._check_whole()
        found = []
        for ids in sequences:
            input_ids = torch.tensor([ids], device=self.model.device)
            logits = self.model(input_ids, use_cache=False).logits[0, :-1]  # [L - 1, V]
            taken = [
                part.float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
                for part, targets in zip(
                    logits.split(SCORED_TOGETHER), input_ids[0, 1:].split(SCORED_TOGETHER), strict=True
                )
            ]
            found.append(torch.cat(taken).tolist())
        return found

    def checksums(self) -> dict[str, int]:
        found = to_ints({name: checksum(tensor) for name, tensor in named_tensors(self.model)})
        return found | {name: found[first] for name, first in tied_names(self.model).items()}

    def release(self) -> None:
        pass

    def restart(self) -> None:
        raise NotImplementedError("the local engine lives and dies with the trainer")

    def prefix_cache(self) -> tuple[int, int]:
        return 0, 0

    def close(self) -> None:
        pass

    def _check_whole(self) -> None:
        if not self._whole:
            raise RuntimeError("the engine has no whole set of weights: a sync comes first")

    def _refuse_shaping(self) -> None:
        """UserError if anything but a request would shape what is sampled."""
        own = [
            name
            for name in GENERATION
            if name in vars(self.model) or getattr(type(self.model), name) is not getattr(GenerationMixin, name)
        ]
        if own:
            raise UserError(
                f"model.path: {type(self.model).__name__} brings code of its own for {own[0]}; rollout.engine=local "
                "samples with transformers' alone, rollout.engine=vllm with vLLM's"
            )
        asked = self._request(Sampling(1.0, 1.0, 1))
        wanted = {**GenerationConfig._get_default_generation_params(), **_set(asked)}
        prepared = _set(self.model._prepare_generation_config(asked)[0])
        if left := sorted(key for key in prepared if prepared[key] != wanted.get(key)):
            raise UserError(
                f"model.path: {type(self.model).__name__} sets {', '.join(left)} for every answer, which is not what a "
                "run asks for; use rollout.engine=vllm"
            )

    def _room(self, prompt: list[int], sampling: Sampling) -> int:
        """Most tokens of an answer to `prompt`."""
        if self.max_model_len is None:
            return sampling.max_tokens
        return min(sampling.max_tokens, self.max_model_len - len(prompt))

    def _request(self, sampling: Sampling) -> GenerationConfig:
        """Without temperature and top_p, which come before the log-probs are taken, not after as transformers has it.
        Its default top_k is 50."""
        return GenerationConfig(
            do_sample=sampling.temperature > 0,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
            use_cache=True,
            **({"top_k": 0} if sampling.temperature > 0 else {}),
        )

    @torch.no_grad()
    def _generate(
        self,
        all_prompts: Sequence[list[int]],
        members: list[int],
        n: int,
        sampling: Sampling,
        finished: Finished | None,
    ) -> list[list[Completion]]:
        """Of the prompts that `members` are the indices of."""
        prompts = [all_prompts[i] for i in members]
        width = max(len(p) for p in prompts)
        device = self.model.device
        input_ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        recorder = _LogProbs()
        rooms = [self._room(prompt, sampling) for prompt in prompts for _ in range(n)]
        warpers: list[LogitsProcessor] = []
        ends = None
        if finished is not None:
            owners = [i for i in members for _ in range(n)]
            ends = _Ends(finished, owners, rooms, width, torch.tensor(self.eos_ids, device=device))
            warpers.append(ends)
        if sampling.temperature not in (0, 1):
            warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        try:
            output = self.model.generate(
                input_ids.repeat_interleave(n, 0),
                attention_mask=mask.repeat_interleave(n, 0),
                logits_processor=LogitsProcessorList([*warpers, recorder]),
                generation_config=self._request(replace(sampling, max_tokens=max(rooms))),
            )
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            version = self.policy_version
            raise PolicyBroken(
                f"policy version {version} gives probabilities that are not finite; the newest checkpoint is the state "
                "to go on from"
            ) from None
        if not isinstance(output, Tensor) or len(output) != len(rooms):
            raise RuntimeError(f"transformers' generate returned {type(output).__name__}, not {len(rooms)} answers")
        tokens = output[:, width:]  # [len(prompts) * n, L]
        logps = recorder.finish(output)
        if ends is not None:
            ends.look(output)
        ended = torch.isin(tokens, torch.tensor(self.eos_ids, device=device))
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, torch.iinfo(torch.int64).max).tolist()
        completions = []
        for token, logp, length, room in zip(tokens.tolist(), logps.tolist(), lengths, rooms, strict=True):
            kept = min(length, room)
            completions.append(Completion(token[:kept], logp[:kept], length > room, self.policy_version))
        return [completions[i : i + n] for i in range(0, len(completions), n)]


class _Ends(LogitsProcessor):
    """Tells of each row as it ends: `generate` shows all that is sampled so far before each next token.

    Row r is an answer to prompt owners[r], of at most rooms[r] tokens after the first `width`."""

    def __init__(self, finished: Finished, owners: list[int], rooms: list[int], width: int, eos_ids: Tensor):
        self.finished = finished
        self.owners = owners
        self.rooms = rooms
        self.width = width
        self.eos_ids = eos_ids
        self.ended = torch.zeros(len(owners), dtype=torch.bool, device=eos_ids.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.look(input_ids)
        return scores

    def look(self, sequences: Tensor) -> None:
        """sequences [rows, width + tokens so far]; a row that has ended is padded."""
        length = sequences.shape[1] - self.width
        if length == 0:
            return
        now = torch.isin(sequences[:, -1], self.eos_ids) & ~self.ended
        self.ended |= now
        for row in now.nonzero().flatten().tolist():
            if length <= self.rooms[row]:
                self.finished(self.owners[row], sequences[row, self.width :].tolist())


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


def _set(config: GenerationConfig) -> dict[str, Any]:
    """What a generation config sets; None is what it leaves open."""
    return {k: v for k, v in config.to_dict().items() if v is not None and k != "transformers_version"}
