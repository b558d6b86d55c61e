"""`rollout.vllm.args`: which of vLLM's engine arguments a user may give, by vLLM's own names and types."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from cipo_fast.config import Config
from cipo_fast.errors import UserError

# What a request says is all that shapes sampling, and the weights are the trainer's, bit for bit.
OURS = {
    "generation_config",
    "load_format",
    "logits_processors",
    "logprobs_mode",
    "override_generation_config",
    "quantization",
    "quantization_config",
    "watermark_config",
    "worker_extension_cls",
}
# What the trainer passes itself, and what sets it.
DECIDED = {
    "model": "model.path",
    "tokenizer": "model.path",
    "dtype": "model.dtype",
    "seed": "the setting `seed`",
    "max_model_len": "rollout.vllm.max_model_len",
    "max_num_seqs": "rollout.vllm.max_sequences",
    "gpu_memory_utilization": "rollout.vllm.gpu_memory",
    "kv_cache_memory_bytes": "rollout.vllm.gpu_memory or, on a CPU, rollout.vllm.cpu_kv_gib",
    "weight_transfer_config": "rollout.server.transfer",
    "port": "rollout.server.port",
    "distributed_executor_backend": "the trainer",
    "enable_sleep_mode": "the trainer",
    "disable_log_stats": "the trainer",
    "served_model_name": "the trainer",
    "disable_uvicorn_access_log": "the trainer",
    "enable_scale_out": "the trainer",
    "host": "the trainer",
    "uds": "the trainer",
    "middleware": "the trainer",
    "api_key": "the trainer",
}


def user_arguments(config: Config) -> dict[str, Any]:
    """`rollout.vllm.args` as vLLM takes them. Raises UserError for what the trainer alone decides, for a name that vLLM
    does not have, and for a value that is not of its type."""
    args = dict(config.rollout.vllm.args)
    if config.rollout.engine == "vllm_server" and not config.rollout.server.start:
        args.pop("host", None)  # of cipo_fast.serve, which is given the same settings
    names = {name.replace("-", "_") for name in args}
    if taken := sorted(OURS & names):
        raise UserError(
            f"rollout.vllm.args: {', '.join(taken)} would change what is sampled or what is compared with it; leave it"
        )
    for name in sorted(DECIDED.keys() & names):
        raise UserError(f"rollout.vllm.args.{name}: {DECIDED[name]} sets it; leave it")
    overrides = args.get("hf_overrides")
    if isinstance(overrides, dict) and "head_dtype" in overrides:
        raise UserError("rollout.vllm.args.hf_overrides.head_dtype: rollout.vllm.fp32_head sets it; leave it")
    return _typed(args, config.rollout.engine) if args else {}


def _typed(args: Mapping[str, Any], engine: str) -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    kind = EngineArgs if engine == "vllm" else AsyncEngineArgs
    types: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(kind) if not f.name.startswith("_")}
    typed = {}
    for name, value in args.items():
        if name not in types:
            near = difflib.get_close_matches(name.replace("-", "_"), types, n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise UserError(f"rollout.vllm.args: vLLM has no engine argument {name!r}{hint}")
        typed[name] = _of_type(name, value, types[name])
    return typed


def _of_type(name: str, value: Any, kind: Any) -> Any:
    """The value, a number or a switch as one of that type: "3" and 1 would be an error of vLLM's at its start."""
    try:
        found = TypeAdapter(kind).validate_python(value)
    except PydanticSchemaGenerationError:  # of torch's types: vLLM says what it thinks of it
        return value
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "enum" and isinstance(value, str):  # vLLM takes its names, pydantic its values
            return value
        where = ".".join(str(part) for part in (name, *first["loc"]) if str(part) == name or part in _keys(value))
        raise UserError(
            f"rollout.vllm.args.{where}={value!r}: {first['msg'][0].lower()}{first['msg'][1:300]}"
        ) from None
    return found if type(found) in (bool, int, float, str) else value


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else []
