"""docs/configuration.md is what the settings are: every one, with its default, its range and its words."""

from pathlib import Path

from cipo_fast.config import Config
from cipo_fast.config.config import flat
from cipo_fast.config.reference import reference

FILE = Path(__file__).parents[1] / "docs" / "configuration.md"


def test_it_is_not_stale() -> None:
    assert FILE.read_text(encoding="utf-8") == reference(), f"python -m cipo_fast.config.reference > {FILE}"


def test_every_setting_is_there_once_and_explained() -> None:
    rows = [line.split(" | ") for line in reference().splitlines() if line.startswith("| `")]
    names = [row[0].removeprefix("| ").strip("`") for row in rows]
    assert len(set(names)) == len(names)
    assert {name for name in flat(Config()) if not name.startswith("data.math.")} <= {*names, "data.math"}
    assert [row for row in rows if len(row) != 4 or len(row[3]) < 12] == []


def test_ranges_are_in_words() -> None:
    text = reference()
    assert "| `seed` | `0` | integer, >= 0 | " in text
    assert '| `model.dtype` | `"float32"` | `float32`, `bfloat16` | ' in text
    assert '| `model.liger` | `"auto"` | `auto` or `true`, `false` | ' in text
    assert "| `optim.long_act` | `null` | number, > 0, < 1 or `null` | " in text
    assert "typing" not in text
