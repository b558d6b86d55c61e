"""From a model's name or a run's folder to a sampler with its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from cipo_fast.chat import Chat
from cipo_fast.checkpoint import SHAPE, load_weights, saved
from cipo_fast.config import Config
from cipo_fast.distributed import is_main
from cipo_fast.engines import build_engine, fit_to_engine, fit_to_model
from cipo_fast.errors import UserError, put
from cipo_fast.marking import build_judges
from cipo_fast.model import cast_weights, load_model, load_shape, load_tokenizer
from cipo_fast.sampling import Prompt, Sampler, encode_dataset, fitting
from cipo_fast.tasks import Dataset, load_held_out, quiet
from cipo_fast.try_out import prepare_judges


@dataclass(frozen=True)
class Weights:
    """Where weights are. `path`: what `model.path` is to be; with `checkpoint` it has shape and tokenizer alone.
    `name`: short, for a folder."""

    path: str
    name: str
    checkpoint: Path | None = None


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def weights_of_run(run: Path, step: int | None) -> Weights:
    """Of checkpoint `step`; None: the run's `model/`, or its newest checkpoint where there is none. Raises
    UserError."""
    if step is None and (run / "model" / "config.json").is_file():
        return Weights(str(run / "model"), "model")
    found = {int(path.name[5:]): path for path in saved(run / "checkpoints")}
    if not found:
        raise UserError(f"{run}: no checkpoint in {run / 'checkpoints'}" + ("" if step is not None else ", no model/"))
    step = max(found) if step is None else step
    if step not in found:
        raise UserError(f"{run}: no checkpoint of step {step}; there are those of {', '.join(map(str, sorted(found)))}")
    if not (run / SHAPE / "config.json").is_file():
        raise UserError(f"{run / SHAPE}: holds no config.json, which says what model the checkpoints are of")
    return Weights(str(run / SHAPE), f"step-{step:05d}", found[step])


def load_policy(config: Config, checkpoint: Path | None) -> PreTrainedModel:
    """The model in fp32 with stock attention; raises UserError. A collective."""
    if checkpoint is None:
        return load_model(config, "sdpa")
    shape = load_shape(config)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32, attn_implementation="sdpa")
    if (Path(config.model.path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(config.model.path)
    load_weights(checkpoint, model)
    return model


@contextmanager
def sampler_of(
    config: Config, device: str, checkpoint: Path | None = None
) -> Iterator[tuple[Sampler, list[Prompt], Config]]:
    """A sampler with the weights of `model.path` (or of `checkpoint`, a model of that shape), the prompts of the
    config's held-out problems, and the config as it fits model and engine; ended with the context. A collective."""
    say = put if is_main() else quiet
    problems = load_held_out(config, say)
    with ExitStack() as opened:
        judges = opened.enter_context(build_judges(config, say))
        prepare_judges(judges, problems)
        chat = Chat(load_tokenizer(config), config.data)
        _, prompts = encode_dataset(Dataset([], problems), chat, config, say)
        chat.refuse_beyond(load_shape(config).get_text_config().vocab_size)
        model = load_policy(config, checkpoint)
        config = config.model_copy(deep=True)
        config.rollout.max_tokens = min(
            config.rollout.max_tokens, config.eval.max_tokens
        )  # nothing longer is asked for
        config = fit_to_model(config, model.config, say)
        say(f"an answer ends with {chat.names(chat.end_ids(model.generation_config))}")
        engine = opened.enter_context(closing(build_engine(config, model, chat, device, say)))
        config = fit_to_engine(config, engine, say)
        prompts = fitting(prompts, config.data.max_prompt_tokens, "held-out problems", say)

        def publish(version: int) -> None:
            engine.sync(cast_weights(model, getattr(torch, config.model.dtype)), version)

        engine.publish = publish
        publish(0)
        yield Sampler(engine, chat, config.seed, judges), prompts, config
