"""Strictness, suggestions, ranges, layers of configuration."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from cipo_fast.config import Config, configs_dir, load_config
from cipo_fast.errors import UserError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "rollout.promts_per_step=4",
            "unknown key 'rollout.promts_per_step': did you mean 'rollout.prompts_per_step'?",
        ),
        ("rolout.engine=local", "did you mean 'rollout'?"),
        ("optimizer.lr=1", "did you mean 'optim'?"),
        ("replay.tau=1.5", "replay.tau=1.5: input should be less than or equal to 1"),
        ("train.steps=many", "train.steps='many': input should be a valid integer"),
        ("correction.loss=x", "correction.loss='x': input should be 'rl', 'ce' or 'both'"),
        ("optim.lr=nan", "optim.lr"),
        ("loss.eps_low=0", "loss.eps_low=0"),
        ("data.train=/no/such.jsonl", "data.train: no file /no/such.jsonl"),
        ("correction.tier_low=0.9", "correction.tier_low=0.9 is above"),
        ("replay.rho0=0.1", "outside [replay.rho_min, replay.rho_max]"),
        ("train.pack_tokens=32", "train.pack_tokens=32 cannot hold one conversation"),
        ("train.updates_per_step=33", "an update needs a prompt"),
        ("model.embedded.heads=3", "model.embedded: hidden must be"),
        ("nonsense", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("train.steps=[", "not valid YAML"),
        ("seed=-1", "seed=-1"),
    ],
)
def test_bad_overrides_are_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config([], [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_key_in_a_file_and_bad_files(tmp_path: Path) -> None:
    for text, message in [
        ("trian: {steps: 3}", "did you mean 'train'?"),
        ("a: [", "not valid YAML"),
        ("- 1", "expected keys and values"),
    ]:
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            load_config([str(tmp_path / "x.yaml")], [])
    with pytest.raises(UserError, match=r"nowhere\.yaml: not found"):
        load_config(["nowhere.yaml"], [])


def test_later_layers_win(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("train: {steps: 7}\noptim: {lr: 1e-5}\n")
    config = load_config([str(tmp_path / "x.yaml")], ["train.steps=9"])
    assert (config.train.steps, config.optim.lr) == (9, 1e-5)
    assert config.rollout.max_tokens == 12  # from embedded.yaml, below both


def test_the_embedded_recipe_is_the_base_only_for_the_embedded_model() -> None:
    embedded, own = load_config([], []), load_config([], ["model.path=/models/x"])
    assert embedded.run.name == "embedded"
    assert own.optim.lr == Config().optim.lr == 1e-6
    assert own.rollout.max_tokens == 4096


def test_defaults_of_the_algorithm() -> None:
    """The published values, and our own where there are none."""
    c = Config()
    assert (c.train.steps, c.rollout.prompts_per_step, c.rollout.samples_per_prompt) == (500, 32, 8)
    assert (c.correction.anchors_per_prompt, c.correction.lambda_corr, c.correction.lambda_risk) == (1.0, 1.0, 1.0)
    r = c.replay
    assert (r.rho0, r.rho_min, r.rho_max, r.tau, r.w1, r.w2, r.w3) == (0.3, 0.2, 0.8, 0.8, 0.8, 0.3, 0.05)
    assert (r.n_min, r.ema_decay) == (16, 0.7)
    assert (c.optim.lr, c.rollout.temperature, c.rollout.top_p) == (1e-6, 1.0, 1.0)
    assert (c.loss.eps_low, c.loss.eps_high, c.loss.beta, c.correction.mu) == (0.2, 0.28, 0.0, 0.1)
    assert (c.rollout.max_tokens, c.eval.max_tokens, c.samples_per_anchor) == (4096, 8192, 8)


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from leaves(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info.description


def test_every_setting_says_what_it_is_and_the_algorithms_where_it_comes_from() -> None:
    described = dict(leaves(Config))
    assert [key for key, text in described.items() if not text] == []
    algorithm = [k for k in described if k.split(".")[0] in ("rollout", "correction", "replay", "loss")]
    assert [key for key in algorithm if not re.search(r"\[[^\]]+\]", described[key] or "")] == []


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load_config([], ["correction.loss=both", "run.dir=/tmp/x"])
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert load_config([str(tmp_path / "c.yaml")], []) == config


def test_recipes_hold_only_what_they_change() -> None:
    recipes = sorted(configs_dir().glob("*.yaml"))
    assert len(recipes) > 10
    for path in recipes:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = load_config([str(path)], []).model_dump(mode="json")
        own = "path" in content.get("model", {}) or path.name == "embedded.yaml"  # else embedded.yaml lies under it
        before = (Config() if own else load_config([], [])).model_dump(mode="json")
        assert keys_of(content), path.name
        for key in keys_of(content):
            old, new = before, changed
            for part in key:
                old, new = old[part], new[part]
            assert old != new, f"{path.name}: {'.'.join(key)} is {new} without it"


def keys_of(content: dict, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in content.items():
        found += keys_of(value, (*above, key)) if isinstance(value, dict) else [(*above, key)]
    return found
