"""The commands in .github/results/README.md: each starts the run whose rows stand beside it.

A command is parsed as its script would, and the arguments that come out are held against the run's config.json: what
shows is a preset that has changed since, and a slip in a table.
"""

import importlib
import json
import math
import re
import shlex
from pathlib import Path

import pytest

from common.arguments import parse_args

RESULTS = Path(__file__).parent.parent / ".github" / "results"
SILENT = set(  # change nothing of what a run learns
    "run_dir resume evaluate explored cuda compile track capture_video eval_interval checkpoint_interval".split()
)
FROM_ENVIRONMENT = {"horizon": 0, "episodes_per_task": 0, "sessions": 0, "session_process": ""}  # then: its own
# DynaMITE-RL's losses were sums over sessions before they were means: the same weights in other units.
SUMS = {"kl_coef", "consistency_coef", "termination_coef"}
BEFORE = {  # what may differ, by the run's name
    **dict.fromkeys("dynamite_rl_kept dynamite_rl_kl_0.1 no_session_reconstruction no_consistency".split(), SUMS),
    **dict.fromkeys("no_conditioning_kept oracle_terminations dynamite_rl_old".split(), SUMS),
    "rl2_next": {"kl_coef"},  # of a belief that RL2 does not read
    "laser_oracle_beta_0_norms": {"zeta"},  # of a meta-reward with weight 0
    "laser_oracle_5_episodes": {"total_timesteps"},  # a bound that was not reached
}
SCRIPT = re.compile(r"`((?:varibad|dme|ldm|dynamite_rl|laser)\.py[^`]*)`")


def tables():
    """(command, name of a run) for all rows with links to runs; "the same" is the row before, "the first" the first."""
    rows = None
    for line in (RESULTS / "README.md").read_text().splitlines():
        if line.startswith("| command |"):
            rows = []
        elif not line.startswith("|"):
            rows = None
        if rows is None:
            continue
        cell = line.strip("|").split("|")[0]
        own = SCRIPT.findall(cell)
        number = next((n for n, word in enumerate(("the first", "the second", "the third")) if word in cell), None)
        if not own and number is None and "the same" not in cell:
            continue
        before = own[0] if own else rows[-1 if number is None else number]
        rows.append(" ".join([before, *re.findall(r"`(--[^`]*)`", cell)]))
        names = [name for name in re.findall(r"\]\(([\w.-]+)\)", line) if (RESULTS / name).is_dir()]
        if "--explored" not in rows[-1] and "preset of then" not in cell:  # arguments of another run, or of long ago
            yield from (pytest.param(rows[-1], name, id=name) for name in names)


def parsed(command):
    """The arguments that a command line stands for, as config.json has them."""
    script, *argv = shlex.split(command, comments=True)
    module = importlib.import_module(script.removesuffix(".py"))
    args = vars(parse_args(module.Args, module.PRESETS, getattr(module, "SMALL", {}), argv))
    return json.loads(json.dumps(args | dict(script=module.__name__)))


@pytest.mark.parametrize("command, name", [*tables()])
def test_command_starts_the_run_that_is_reported(command, name):
    args, config = parsed(command), json.loads((RESULTS / name / "config.json").read_text())
    known = SILENT | BEFORE.get(name.split("__")[1], set()) | ({"seed"} if "--seed" not in command else set())
    for key in args.keys() & config.keys() - known:
        ours, theirs = args[key], config[key]
        same = math.isclose(ours, theirs, rel_tol=2e-3) if isinstance(ours, float) else ours == theirs
        assert same or ours == FROM_ENVIRONMENT.get(key), f"{key}: {ours} by the command, {theirs} in the run"


def test_commands_of_the_readme_are_understood():
    text = (RESULTS.parent.parent / "README.md").read_text()
    commands = SCRIPT.findall(text) + re.findall(r"^(?:python|.* -- ) ?(\w+\.py .*)", text, re.M)
    commands = [command for command in commands if "<" not in command]  # they need a run
    assert len(commands) > 40
    for command in commands:
        parsed(command)


def test_every_run_stands_in_a_table():
    linked = set(re.findall(r"\]\(([\w.-]+)\)", (RESULTS / "README.md").read_text()))
    assert sorted(path.parent.name for path in RESULTS.glob("*/config.json") if path.parent.name not in linked) == []
