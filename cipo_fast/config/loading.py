"""YAML files and `key.path=value` become one checked Config."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from cipo_fast.config.algorithm import LossConfig
from cipo_fast.config.config import Config
from cipo_fast.config.data import DataConfig
from cipo_fast.config.settings import (
    FUNCTION,
    Place,
    cut,
    expand,
    for_system,
    from_argument,
    from_file,
    from_system,
)
from cipo_fast.errors import UserError, note

HUB_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?::([^:/]*))?(?::([^:/]+))?")
Schema = TypeVar("Schema", bound=BaseModel)
OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=")


def configs_dir() -> Path:
    """The recipes: beside the package in a checkout, inside it in an installed wheel."""
    here = Path(__file__).parents[1]
    inside = here / "configs"
    return inside if inside.is_dir() else here.parent / "configs"


def parse_args(args: Sequence[str]) -> Config:
    """The Config of a command line: YAML files and `key.path=value`, in any order, the last one wins; raises UserError.

    What begins with a dotted key and `=` is a setting, so `./lr=1/config.yaml` is a file."""
    typed = [from_system(arg, f"argument {arg!r}") for arg in args]
    files: list[str] = []
    overrides: list[str] = []
    for arg in typed:
        if arg.startswith("-"):
            raise UserError(f"unknown option {arg}: expected .yaml files, key.path=value, --dry-run")
        (files if arg.endswith((".yaml", ".yml")) and not OVERRIDE.match(arg) else overrides).append(arg)
    return load_config(files, overrides)


def load_config(files: list[str], overrides: list[str]) -> Config:
    """Merge YAML `files` and `key.path=value` `overrides` into a checked Config; raises UserError."""
    given: dict[str, Any] = {}
    places: Place = {}  # where a key was given: only a file's have one, an override names itself
    for name in files:
        values, found = from_file(_find_file(name), Config)
        _merge(given, values)
        places |= found
    for text in overrides:
        if not OVERRIDE.match(text):
            raise UserError(
                f"argument {text!r}: expected key.path=value, a .yaml file or --dry-run{_recipe_hint(text)}"
            )
        _merge(given, from_argument(text, Config))
        places.pop(text.partition("=")[0], None)
    merged: dict[str, Any] = {}
    model = given.get("model")
    if not isinstance(model, dict) or model.get("path", "embedded") == "embedded":
        merged, _ = from_file(configs_dir() / "embedded.yaml", Config)
    _merge(merged, given)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise UserError(_explain(error, places)) from None
    _check(config)
    return config


def read_config(path: Path) -> Config:
    """The Config that a run has recorded in `path`; raises UserError. What it names need not be there any more."""
    return read_as(Config, path)


def read_as(schema: type[Schema], path: Path) -> Schema:
    """The YAML file `path` as a `schema`; raises UserError with file, line and key."""
    values, places = from_file(path, schema)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, places, schema, f"{path}: ")) from None


def _check(config: Config) -> None:
    """What one field's range cannot say."""
    c, r = config.correction, config.replay
    if c.tier_low > c.tier_high:
        raise UserError(f"correction.tier_low={c.tier_low:g} is above correction.tier_high={c.tier_high:g}")
    if not r.rho_min <= r.rho0 <= r.rho_max and r.adaptive:
        raise UserError(
            f"replay.rho0={r.rho0:g} is outside [replay.rho_min, replay.rho_max]=[{r.rho_min:g}, {r.rho_max:g}]"
        )
    if config.train.updates_per_step > config.rollout.prompts_per_step:
        raise UserError("train.updates_per_step is above rollout.prompts_per_step: an update needs a prompt at least")
    if config.nudge.hints and config.rollout.samples_per_prompt % config.nudge.hints:
        raise UserError(
            f"rollout.samples_per_prompt={config.rollout.samples_per_prompt} is no multiple of nudge.hints="
            f"{config.nudge.hints}: every hint gets as many rollouts"
        )
    if config.correction.lambda_corr > 0 and config.anchors_per_step == 0:
        raise UserError(
            "correction.anchors_per_prompt gives no anchor a step: raise it, or set correction.lambda_corr=0"
        )
    if c.start_steps and c.lambda_corr == 0:
        raise UserError(
            f"correction.start_steps={c.start_steps} learns from corrections, and correction.lambda_corr=0 samples "
            "none: raise lambda_corr, or set start_steps=0"
        )
    longest = (
        max(config.data.max_prompt_tokens, c.max_prompt_tokens if c.lambda_corr > 0 else 0) + config.rollout.max_tokens
    )
    if longest > config.train.pack_tokens:
        raise UserError(
            f"train.pack_tokens={config.train.pack_tokens} cannot hold one conversation: the longest prompt plus "
            f"rollout.max_tokens is {longest} tokens; raise it, or lower their limits"
        )
    _check_engine(config)
    _check_loss(config.loss)
    e = config.model.embedded
    if e.hidden % (2 * e.heads) or e.heads % e.kv_heads:
        raise UserError("model.embedded: hidden must be a multiple of 2*heads, and heads of kv_heads")
    _check_data(config.data)
    if is_file(config.run_dir):
        raise UserError(f"run.dir={config.run_dir} is a file; name a folder")


def _check_loss(loss: LossConfig) -> None:
    """Combinations that nobody has defined."""
    if loss.clip == "cispo" and loss.ratio == "sequence":
        raise UserError("loss.clip=cispo holds the ratios of tokens, loss.ratio=sequence has none: choose one of them")
    if loss.clip == "cispo" and loss.dual_clip is not None:
        raise UserError(
            "loss.dual_clip bounds the loss of loss.clip=ppo; cispo bounds every token's itself: set it to null"
        )
    if loss.n_step > 1 and (loss.clip == "cispo" or loss.ratio == "sequence"):
        raise UserError("loss.n_step multiplies the ratios of tokens under PPO's clip: it needs clip=ppo, ratio=token")


HEADLINE = "python -m cipo_fast.experiment headline.yaml"


def comparison(config: Config) -> list[str]:
    """What a run's figures compare, and where its control is: a line each, to be said at the start."""
    corrects = config.correction.lambda_corr > 0
    answers = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    corrections = config.anchors_per_step * config.samples_per_anchor
    said = "CIPO" if corrects else "GRPO"
    checks = ", and what each answer becomes when it is shown back to be checked" if config.eval.checks else ""
    what = f"{config.train.steps} steps of {said}, {answers + corrections} answers each"
    lines = [f"compared: held-out problems before and after {what}: accuracy{checks}"]
    if corrects:
        control = "its control: the same command with grpo.yaml, or grpo_2g.yaml (rollouts instead of corrections)"
        default = config.model.path == "embedded" and not config.data.train and config.data.task == "trace"
        lines.append(f"{control}{'; all at once, with seeds and intervals: ' + HEADLINE if default else ''}")
    return lines


def cautions(config: Config) -> list[str]:
    """What may be meant and hardly is: a line each, to be said at the start."""
    loss, usual, lines = config.loss, LossConfig(), []
    if loss.ratio == "sequence" and (loss.eps_low == usual.eps_low or loss.eps_high == usual.eps_high):
        lines.append(
            f"loss.ratio=sequence with loss.eps_low={loss.eps_low:g}, loss.eps_high={loss.eps_high:g}: that is a range "
            "for the ratios of tokens, a sequence's hardly ever leaves it; GSPO's is 3e-4 and 4e-4 (gspo.yaml)"
        )
    on_ratios = {
        f"loss.ratio={loss.ratio}": loss.ratio != "token",
        f"loss.clip={loss.clip}": loss.clip != "ppo",
        f"loss.dual_clip={loss.dual_clip}": loss.dual_clip is not None,
        # With overlap they are to the engine; is_level=sequence takes old log-probs instead, and weighs by all of them.
        f"loss.n_step={loss.n_step}": loss.n_step > 1 and (loss.is_level == "sequence" or not config.rollout.overlap),
    }
    idle = [setting for setting, given in on_ratios.items() if given]
    if idle and config.train.updates_per_step == 1:
        lines.append(
            f"{', '.join(idle)}: with one update a batch all ratios are 1, and the loss is GRPO's; "
            "raise train.updates_per_step"
        )
    start, steps = config.correction.start_steps, config.train.steps
    if 0 < steps <= start:
        lines.append(f"correction.start_steps={start}: all of train.steps={steps} are supervised, none is RL")
    if config.correction.loss == "ce" and config.replay.right_weight_max < 1:
        lines.append("replay.right_weight_max bounds the RL loss of corrections; with correction.loss=ce there is none")
    return lines + _rho_that_stays(config)


def _rho_that_stays(config: Config) -> list[str]:
    """A line where the share of right anchors has too few corrections a step to be moved again."""
    replay, anchors = config.replay, config.anchors_per_step
    for rho, stays in (
        (replay.rho0, "stays at replay.rho0"),
        (replay.rho_min, "stays at replay.rho_min once it is there"),
    ):
        measured = round(rho * anchors) * config.samples_per_anchor
        if anchors and replay.adaptive and measured < replay.n_min:
            return [
                f"rho {stays}: {measured} corrections of right anchors a step are below replay.n_min={replay.n_min}"
            ]
    return []


def _check_data(data: DataConfig) -> None:
    for key in ("train", "eval"):
        for source in data.sources(key):
            if isinstance(source, Path) and not is_file(source):
                raise UserError(f"data.{key}: no file {source}")
            if isinstance(source, str) and not HUB_NAME.fullmatch(source):
                raise UserError(
                    f"data.{key}={source}: expected hub:OWNER/NAME, hub:OWNER/NAME:CONFIG or ...:CONFIG:SPLIT"
                )
    if data.weights is not None and len(data.weights) != len(data.sources("train")):
        sources = len(data.sources("train"))
        raise UserError(f"data.weights has {len(data.weights)} weights for {sources} of data.train: give one for each")
    function = FUNCTION.fullmatch(data.verifier or "exact")
    if function is None and data.verifier not in (None, "exact", "math", "code"):
        raise UserError(f"data.verifier={data.verifier}: expected exact, math, code or path/to/file.py:function")
    if function is not None and not is_file(Path(function["file"])):
        raise UserError(f"data.verifier={data.verifier}: no file {function['file']}")


def _check_engine(config: Config) -> None:
    r = config.rollout
    if r.engine == "vllm_server" and r.server.start == (r.server.url is not None):
        raise UserError("rollout.engine=vllm_server: give rollout.server.start=true or rollout.server.url, one of them")
    if r.server.url is not None and not _is_address(r.server.url):
        raise UserError(f"rollout.server.url={r.server.url}: expected http://host:port")
    parallel = [k for k in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size") if k in r.vllm.args]
    if r.engine == "vllm" and parallel:
        raise UserError(f"rollout.vllm.args.{parallel[0]}: an engine in this process has one device; use a server")
    if r.overlap and r.engine != "vllm_server":
        raise UserError("rollout.overlap=1 needs rollout.engine=vllm_server: only a server samples while this trains")
    if r.overlap and config.loss.is_cap is None:
        raise UserError("rollout.overlap=1 needs loss.is_cap: its rollouts are one policy version old")
    most = max(r.samples_per_prompt, config.samples_per_anchor, config.eval.samples)
    if r.engine == "vllm_server" and most > r.vllm.max_sequences:  # vLLM's server refuses such a request
        raise UserError(
            f"rollout.vllm.max_sequences={r.vllm.max_sequences} is below the {most} answers asked of one prompt: raise "
            "it"
        )
    if r.vllm.max_model_len is not None and r.vllm.max_model_len <= r.max_tokens:
        raise UserError(
            f"rollout.vllm.max_model_len={r.vllm.max_model_len} leaves no token for a prompt: rollout.max_tokens is "
            f"{r.max_tokens}; raise the one or lower the other"
        )


def _is_address(url: str) -> bool:
    """Whether a server can be there at all: a host, and a port that is one."""
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", url)
        return named and parts.scheme in ("http", "https")
    except ValueError:
        return False


def _find_file(name: str) -> Path:
    """A path is that path. A name alone is a file of this folder, or else a recipe."""
    expanded = expand(name, f"config file {name}")
    path = Path(for_system(expanded, f"config file {name}"))
    recipe = configs_dir() / path.name
    if is_file(path):
        if "/" not in expanded and is_file(recipe):
            note(f"{name}: the file in this folder, not the recipe of that name")
        return path
    if "/" not in expanded and is_file(recipe):
        return recipe
    hint = f"; the recipe is {path.name}, without a folder" if is_file(recipe) else f" (nor in {configs_dir()})"
    raise UserError(f"config file {name}: not found{hint}")


def _recipe_hint(text: str) -> str:
    return f"; the recipe is {text}.yaml" if text and is_file(configs_dir() / f"{text}.yaml") else ""


def is_file(path: Path) -> bool:
    """False also where the system will not say: a name too long, a folder that may not be entered."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every key as a dotted path, sections included."""
    keys = []
    for name, info in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += known_keys(info.annotation, f"{prefix}{name}.")
    return keys


def _explain(error: ValidationError, places: Place, schema: type[BaseModel] = Config, source: str = "") -> str:
    """The first problem, in one line; `source` is named where the key stands nowhere."""
    first = min(error.errors(), key=lambda e: e["type"] == "missing")  # a key that is misspelt is missing, too
    key = _field_of(first["loc"], schema)
    known = next((k for k in (key, key.rpartition(".")[0]) if k in places), None)
    where = f"{places[known]}: " if known else source
    if first["type"] == "extra_forbidden":
        near = _nearest(key, schema)
        return f"{where}unknown key {key!r}" + (f": did you mean {near!r}?" if near else "")
    # One for each type that the field may have.
    same = [e for e in error.errors() if _field_of(e["loc"], schema) == key]
    said = " or ".join(f"{e['msg'][0].lower()}{e['msg'][1:]}".removeprefix("input should be ") for e in same)
    said = f"input should be {said}" if len(same) > 1 else f"{first['msg'][0].lower()}{first['msg'][1:]}"
    if first["type"] == "missing":
        return f"{where}no {key!r}, which has no default"
    more = f" (and {error.error_count() - len(same)} more)" if error.error_count() > len(same) else ""
    return f"{where}{key}={_typed(first['input'])}: {said}{more}"


def _field_of(location: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    """The dotted key of an error's location, which goes on with the types that a field may have."""
    keys, parts = known_keys(schema), [str(part) for part in location]
    for n in range(1, len(parts)):
        key = ".".join(parts[:n])
        if key in keys and not any(other.startswith(f"{key}.") for other in keys):
            return key
    return ".".join(parts)


def _typed(value: Any) -> str:
    """A number as it was typed, anything else quoted; the beginning of what is long."""
    if isinstance(value, str) and re.fullmatch(r"[-+.\w]*\d[-+.\w]*", value):
        return cut(value)
    return cut(repr(value))


def _nearest(key: str, schema: type[BaseModel]) -> str | None:
    """The known key most like `key`: by its whole path, else by its last part in any section."""
    keys = known_keys(schema)
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if close:
        return close[0]
    last = {k.rsplit(".", 1)[-1]: k for k in keys}
    close = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(last), n=1, cutoff=0.6)
    return last[close[0]] if close else None
