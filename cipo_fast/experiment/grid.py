"""An experiment's file, and the grid of runs that it asks for: every arm with every seed."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cipo_fast.config import Config, configs_dir, parse_args, read_as
from cipo_fast.config.config import flat
from cipo_fast.config.loading import is_file
from cipo_fast.config.section import NonNegative, Section
from cipo_fast.config.settings import as_setting
from cipo_fast.errors import UserError

Name = Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]  # a folder's, too
OWN = ("seed", "run.dir", "run.name")  # what tells the runs of a grid apart


class Arm(Section):
    configs: list[str] = Field(default=[])
    """Config files, after the experiment's `base`."""
    settings: dict[str, str] = Field(default={})
    """`key.path: value`, after the experiment's `settings`."""


class Experiment(Section):
    name: Name
    """Its folder under runs/experiments/."""
    about: str
    """A sentence for the report: what is compared, and what for."""
    base: list[str] = Field(default=[])
    """Config files of every arm: names of recipes, or paths from the folder that the command is run in."""
    settings: dict[str, str] = Field(default={})
    """`key.path: value` of every arm."""
    seeds: Annotated[list[NonNegative], Field(min_length=1)]
    """The seeds that every arm is run with."""
    arms: Annotated[dict[Name, Arm], Field(min_length=1)]
    """What is compared, in the order of the report."""
    control: str
    """The arm that the others are compared to."""


@dataclass(frozen=True)
class GridRun:
    """One arm with one seed."""

    arm: str
    seed: int
    args: tuple[str, ...]  # of cipo_fast.train
    config: Config

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"

    @property
    def dir(self) -> Path:
        return self.config.run_dir

    @property
    def finished(self) -> bool:
        return (self.dir / "summary.json").exists()

    @property
    def command(self) -> str:
        return shlex.join(["python", "-m", "cipo_fast.train", *self.args])


@dataclass(frozen=True)
class Grid:
    """An experiment and its runs, seed by seed: a grid that is stopped has compared something."""

    experiment: Experiment
    name: str  # of its file, as it was given
    out: Path
    runs: tuple[GridRun, ...]

    def of(self, arm: str) -> list[GridRun]:
        return [run for run in self.runs if run.arm == arm]


def read_grid(name: str, out: Path | None = None) -> Grid:
    """The grid of an experiment's file, or of a name in configs/experiments; every run's settings are checked. Raises
    UserError."""
    file = _find(name)
    experiment = read_as(Experiment, file)
    _check(experiment, file)
    out = out or Path("runs/experiments") / experiment.name
    runs = [_run(experiment, arm, seed, out, file) for seed in experiment.seeds for arm in experiment.arms]
    return Grid(experiment, name, out, tuple(runs))


def changed_settings(run: GridRun) -> dict[str, Any]:
    """{key: value} of the settings that are not the defaults of cipo_fast/config/, without those that tell runs
    apart."""
    defaults = flat(Config())
    given = flat(run.config)
    return {key: given[key] for key in given if given[key] != defaults.get(key) and key not in OWN}


def common_settings(given: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Those that all arms have alike; `given`: of each arm."""
    first, *others = given.values()
    return {key: value for key, value in first.items() if all(key in o and o[key] == value for o in others)}


def said(settings: dict[str, Any]) -> str:
    """As a command line has them."""
    return " ".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()
    )


def _find(name: str) -> Path:
    recipe = configs_dir() / "experiments" / name
    if is_file(Path(name)):
        return Path(name)
    if "/" not in name and is_file(recipe):
        return recipe
    raise UserError(f"{name}: no such file (nor in {recipe.parent})")


def _check(experiment: Experiment, file: Path) -> None:
    if experiment.control not in experiment.arms:
        raise UserError(f"{file}: control={experiment.control}: no such arm; there are {', '.join(experiment.arms)}")
    if len(set(experiment.seeds)) < len(experiment.seeds):
        raise UserError(f"{file}: seeds: one is given twice")
    places = {"settings": experiment.settings}
    places |= {f"arms.{name}.settings": arm.settings for name, arm in experiment.arms.items()}
    for place, settings in places.items():
        for key in settings:
            if key in OWN:
                raise UserError(f"{file}: {place}: {key} is the grid's to set; leave it out")


def _run(experiment: Experiment, name: str, seed: int, out: Path, file: Path) -> GridRun:
    arm = experiment.arms[name]
    settings = [f"{key}={value}" for key, value in {**experiment.settings, **arm.settings}.items()]
    own = [f"seed={seed}", f"run.name={name}-seed{seed}", f"run.dir={as_setting(out / f'{name}-seed{seed}')}"]
    args = (*experiment.base, *arm.configs, *settings, *own)
    try:
        return GridRun(name, seed, args, parse_args(args))
    except UserError as error:
        raise UserError(f"{file}: arm {name}: {error}") from None
