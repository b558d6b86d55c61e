"""Strictness, suggestions, ranges, layers of configuration."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from cipo_fast.config import Config, configs_dir, load_config, parse_args
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
        ("loss.dual_clip=1", "loss.dual_clip=1: input should be greater than 1"),
        ("data.train=/no/such.jsonl", "data.train: no file /no/such.jsonl"),
        ("correction.tier_low=0.9", "correction.tier_low=0.9 is above"),
        ("replay.rho0=0.04", "outside [replay.rho_min, replay.rho_max]"),
        ("train.pack_tokens=32", "train.pack_tokens=32 cannot hold one conversation"),
        ("train.updates_per_step=33", "an update needs a prompt"),
        ("model.embedded.heads=3", "model.embedded: hidden must be"),
        ("nonsense", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("train.steps=[", "train.steps='[': input should be a valid integer"),
        ("train.steps=true", "train.steps='true': input should be a valid integer"),
        ("seed=0x10", "seed=0x10: input should be a valid integer"),
        ("run.report=maybe", "input should be a valid boolean"),
        ("rollout.overlap=2", "rollout.overlap=2: input should be 0 or 1"),
        ("rollout.vllm.args={a: [", "not valid YAML"),
        ("rollout.vllm.args={a: 1, a: 2}", "key 'a' is given twice"),
        ("rollout.vllm.args=3", "should be a valid dictionary"),
        ("rollout=vllm", "rollout=vllm: expected a section, not a value"),
        ("run='x'", "run=x: expected a section, not a value"),
        ("loss.is_cap=none", "loss.is_cap=none: write null for none"),
        ("rollout.vllm.max_model_len=None", "rollout.vllm.max_model_len=None: write null for none"),
        ("data.date=~", "data.date=~: write null for none"),
        ("rollout.vllm.args.a=1e999", "rollout.vllm.args.a=1e999: not a finite number"),
        ("rollout.vllm.args={a: [-.inf]}", "rollout.vllm.args.a=-.inf: not a finite number"),
        ("data.chat_template_kwargs.a=.nan", "data.chat_template_kwargs.a=.nan: not a finite number"),
        ("seed=" + "1" * 5000, "1... (5,000 characters): "),
        ("train.steps=" + "x" * 5000, "x... (5,002 characters): "),
        ("rollout.vllm.args.a=" + "9" * 5000, "9... (5,022 characters): rollout.vllm.args.a: Exceeds the limit"),
        ("rollout.engine.x=3", "rollout.engine is one value"),
        ("rollout..engine=vllm", "expected key.path=value"),
        ("run.name=", "argument 'run.name=': no value after the ="),
        ("run.name=..", "run.name='..'"),
        ("run.dir=$CIPO_NOT_SET/x", "the environment variable 'CIPO_NOT_SET' is not set"),
        ("data.train=${CIPO_NOT_SET}/x", "the environment variable 'CIPO_NOT_SET' is not set"),
        ("model.path=~no_such_user/m", "no user 'no_such_user'"),
        ("data.train=" + "a" * 300, "data.train: no file"),
        ("grpo", "the recipe is grpo.yaml"),
        ("correction.followup=\udc80", "half a surrogate pair"),
        ("seed=-1", "seed=-1"),
        ("checkpoint.resume=never", "checkpoint.resume='never': input should be 'auto' or a valid boolean"),
        ("rollout.temperature=1e-40", "rollout.temperature=1e-40: input should be greater than or equal to 0.001"),
    ],
)
def test_bad_overrides_are_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config([], [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a # b", "a # b"), ("Answer: yes", "Answer: yes"), ("@x", "@x"), ("%x", "%x"), ("*x", "*x"), ("&x y", "&x y"),
        ("!x", "!x"), ("- x", "- x"), ("# x", "# x"), ("<<", "<<"), ("a, b", "a, b"), ("? x", "? x"), (" 3", " 3"),
        ("null", None), ("~", None), ("true", True), ("yes", "yes"), ("-7", -7), ("007", "007"), ("1.5", 1.5),
        ("1e3", 1000.0), ("2026-01-01", "2026-01-01"), ("'7'", "7"), ('"a\\tb"', "a\tb"), ("[1, x]", [1, "x"]),
        ("{b: {c: 2}}", {"b": {"c": 2}}), ('"\\ud83d\\ude00"', "\U0001f600"),
    ],
)  # fmt: skip
def test_a_value_inside_a_dict_setting_is_the_text_typed_or_what_it_plainly_is(text: str, value: object) -> None:
    for key in ("data.chat_template_kwargs.a", "rollout.vllm.args.a"):
        config = load_config([], [f"{key}={text}"])
        found = config.data.chat_template_kwargs or config.rollout.vllm.args
        assert found == {"a": value}
        assert type(found["a"]) is type(value)


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
    assert (r.rho0, r.rho_min, r.rho_max, r.tau, r.w1, r.w2, r.w3) == (0.3, 0.05, 0.8, 0.8, 0.8, 0.3, 0.05)
    assert (r.rule, r.tau_beyond) == ("attainable", 0.2)
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
                old, new = old.get(part), new[part]  # a dict setting's own keys have no default
            assert old != new, f"{path.name}: {'.'.join(key)} is {new} without it"


def keys_of(content: dict, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in content.items():
        found += keys_of(value, (*above, key)) if isinstance(value, dict) else [(*above, key)]
    return found


# ------------------------------------------------------------------------------------------------ a text is that text

TEXTS = ["007", "yes", "1e3", "0x10", "2026-01-01", "null", "true", "~", "1:30", "a #### b", "[x]", "{a: b}", "a: b",
         "'q'", '"q"', "  s  ", "- x", "&a", "*a", "!t", "%", "@x", "$HOME", "é 中 😀", "\u2028 \x85 \r\n\t\x1b",
         "x\n\n y\n", "\ufeff"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_setting_is_the_text_typed_and_recorded(text: str, tmp_path: Path) -> None:
    config = load_config([], [f"correction.followup={text}"])
    assert config.correction.followup == text
    (tmp_path / "c.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config([str(tmp_path / "c.yaml")], []) == config


@pytest.mark.parametrize(
    ("yaml_text", "value"),
    [("007", "007"), ("yes", "yes"), ("1e3", "1e3"), ("2026-01-01  # a day", "2026-01-01"), ("0x10", "0x10"),
     ("'a # b'", "a # b"), ("null", "null"), ("!!int 5", "5"), ("'{}'", "{}")],
)  # fmt: skip
def test_a_text_in_a_file_is_its_scalar(yaml_text: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfcorrection:\r\n  followup: " + yaml_text.encode() + b"\r\n")
    assert load_config([str(path)], []).correction.followup == value


def test_numbers_and_truth_values_are_read_by_their_field(tmp_path: Path) -> None:
    text = "optim: {lr: 1e-6}\nseed: 010\ntrain: {steps: 1_000}\nrun: {report: off, name: 1.0}\nrollout:\n"
    (tmp_path / "x.yaml").write_text(text)
    config = load_config([str(tmp_path / "x.yaml")], ["loss.is_cap=null", "rollout.overlap=0", "sync.probe_every=3.0"])
    assert (config.optim.lr, config.seed, config.train.steps, config.run.report) == (1e-6, 10, 1000, False)
    assert (config.run.name, config.loss.is_cap, config.sync.probe_every) == ("1.0", None, 3)


def test_values_without_a_type_are_yaml_1_2(tmp_path: Path) -> None:
    args = ["rollout.vllm.args={a: 1e-6, b: yes, c: 007, d: null, e: [true, x]}", "rollout.vllm.args.f.g=false"]
    config = load_config([], [*args, "rollout.vllm.args.h=0x10"])
    expected = {"a": 1e-6, "b": "yes", "c": "007", "d": None, "e": [True, "x"], "f": {"g": False}, "h": "0x10"}
    assert config.rollout.vllm.args == expected
    (tmp_path / "c.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config([str(tmp_path / "c.yaml")], []) == config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.<~1é ", max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    followup=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    args=st.dictionaries(st.text("abc~<1é", min_size=1, max_size=4), JSON, max_size=3),
    folder=NAMES,
    devices=st.none() | st.sampled_from(["null", "~", "6,7", "0", "", "yes"]),
    lr=st.floats(1e-300, 1),
    name=st.from_regex(r"\A[a-zA-Z0-9_-][a-zA-Z0-9_.-]{0,8}\Z"),
)
def test_the_record_of_a_config_is_that_config(tmp_path, followup, args, folder, devices, lr, name) -> None:
    config = load_config([], [f"optim.lr={lr}", f"run.name={name}"])
    config.correction.followup, config.rollout.vllm.args = followup, args
    config.rollout.server.devices = devices
    config.run.dir, config.model.path = tmp_path / folder, f"/models/{folder}"
    (tmp_path / "c.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config([str(tmp_path / "c.yaml")], []) == config


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\ntrain: {steps: 1}\nseed: 2\n", "x.yaml:3: key 'seed' is given twice, first in line 1"),
        ("train:\n  steps: 1\n  steps: 1\n", "x.yaml:3: key 'steps' is given twice, first in line 2"),
        ("train:\n\tsteps: 1", "x.yaml:2: not valid YAML"),
        ("train:\n  steps: -3", "x.yaml:2: train.steps=-3: input should be greater"),
        ("train:\n  stepz: 3", "x.yaml:2: unknown key 'train.stepz': did you mean 'train.steps'?"),
        ("train.steps: 3", "x.yaml:1: key 'train.steps': write one level a key, train: {steps: ...}"),
        ("run:\n  name: [a]", "x.yaml:2: run.name: expected one value, got a list"),
        ("? {a: b}\n: 1", "x.yaml:1: a key is a word"),
        ("seed: 1\n---\nseed: 2", "x.yaml:2: not valid YAML"),
        ("seed: *no", "x.yaml:1: not valid YAML"),
        ("rollout: {vllm: {args: &a {b: *a}}}", "x.yaml:1: over 10,000 values"),
        ("rollout: {vllm: {args: {a: &a [0,0,0,0,0,0,0,0,0], b: &b [*a,*a,*a,*a,*a,*a,*a], c: &c [*b,*b,*b,*b,*b,*b],"
         " d: &d [*c,*c,*c,*c,*c,*c,*c], e: [*d,*d,*d,*d,*d,*d,*d]}}}", "x.yaml:1: over 10,000 values"),
        ("[" * 5000, "x.yaml: not valid YAML"),
        ("data: {train: $CIPO_NOT_SET/a}", "x.yaml:1: data.train: the environment variable 'CIPO_NOT_SET' is not set"),
        ("rollout: {vllm: {args: {a: !!timestamp 2026-01-01}}}", "rollout.vllm.args.a: a date is no setting"),
        ('correction: {followup: "\\ud800"}', "half a surrogate pair"),
        ('data: {train: "a\\0b"}', "data.train: expected a path"),
        ("train: {<<: 3}", "x.yaml:1: train.<<: expected keys and values to merge"),
        ("<<: [1]", "x.yaml:1: <<: expected keys and values to merge"),
        ("run:\n  3", "x.yaml:2: run=3: expected a section, not a value"),
        ("loss: {is_cap: none}", "x.yaml:1: loss.is_cap=none: write null for none"),
        ("rollout: {vllm: {args: {a: .inf}}}", "x.yaml:1: rollout.vllm.args.a=.inf: not a finite number"),
        ("data: {date: 0}", "x.yaml:1: data.date=0: expected a day as YYYY-MM-DD"),
        ('rollout: {vllm: {args: {"\\ude00": 1}}}', "half a surrogate pair"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_that_says_where(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config([str(tmp_path / "x.yaml")], [])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_anchors_and_merges_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("optim: &o {lr: 0.5}\nrollout: {vllm: {args: {<<: *o, a: 1}}}\n")
    config = load_config([str(tmp_path / "x.yaml")], [])
    assert config.rollout.vllm.args == {"lr": 0.5, "a": 1}


def test_a_character_escaped_in_two_halves_is_that_character(tmp_path: Path) -> None:
    pair = r"\ud83d\ude00"
    (tmp_path / "x.yaml").write_text(
        f'correction: {{followup: "{pair}!"}}\nrollout: {{vllm: {{args: {{"{pair}": "{pair}"}}}}}}'
    )
    config = load_config([str(tmp_path / "x.yaml")], [])
    assert config.correction.followup == "\U0001f600!"
    assert config.rollout.vllm.args == {"\U0001f600": "\U0001f600"}


def test_paths_have_home_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In files and on the command line, for every path; recorded so that any folder starts the same run."""
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    (tmp_path / "a$b").mkdir()
    (home / "a.jsonl").write_text("")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("CIPO_HOME", "~/sub")
    monkeypatch.chdir(tmp_path)
    (home / "x.yaml").write_text("data: {train: ~/a.jsonl, eval: $HOME/a.jsonl}\nrun: {dir: '${CIPO_HOME}/r'}\n")
    config = load_config(["~/x.yaml"], ["model.path=a$$b"])
    assert (config.data.train, config.data.eval) == (home / "a.jsonl", home / "a.jsonl")
    assert (config.run.dir, config.model.path) == (home / "sub" / "r", str(tmp_path / "a$b"))
    again = parse_args(["data.train=home/a.jsonl", "model.path=~/sub", "run.dir=b$$c"])
    assert (again.data.train, again.model.path) == (home / "a.jsonl", str(home / "sub"))
    for name, c in (("1.yaml", config), ("2.yaml", again)):
        (home / name).write_text(c.to_yaml(), encoding="utf-8")
    monkeypatch.chdir(home)
    assert load_config(["1.yaml"], []) == config
    assert load_config(["2.yaml"], []) == again
    assert load_config([], ["model.path=Qwen/Qwen3-4B"]).model.path == "Qwen/Qwen3-4B"


def test_a_name_alone_is_a_recipe_and_a_path_is_that_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_args(["grpo.yaml"]).correction.lambda_corr == 0
    for path in ("/wrong/dir/grpo.yaml", "./grpo.yaml", "configs/grpo.yaml", "~/grpo.yaml"):
        with pytest.raises(UserError, match=r"not found; the recipe is grpo\.yaml"):
            parse_args([path])
    assert capsys.readouterr().err == ""
    (tmp_path / "grpo.yaml").write_text("seed: 5")
    assert parse_args(["grpo.yaml"]).seed == 5
    assert "grpo.yaml: the file in this folder" in capsys.readouterr().err
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "lr=1" / "c.yaml").write_text("seed: 6")
    assert parse_args(["./lr=1/c.yaml"]).seed == 6
    assert parse_args(["seed=1", "seed=2"]).seed == 2  # the last one
