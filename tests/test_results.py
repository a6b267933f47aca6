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
SCRIPT = re.compile(r"`((?:varibad|dme|ldm|dynamite_rl|laser)\.py[^`]*)`")
RUNS = {path.parent.name for path in RESULTS.glob("*/config.json")}
# Change nothing of what a run learns; a seed is looked for in the command and in the run's name.
SILENT = {"seed", "run_dir", "resume", "evaluate", "compile", "track", "capture_video", "eval_interval"}
SILENT |= {"checkpoint_interval", "horizon", "episodes_per_task"}  # the last two are the environments' own
# What was the case before there was an argument for it.
THEN = dict(
    oracle=[False], extra_obs=["none"], actor_gain=[1.0], encoder_obs=["next"], ppo_windows=[1], draw_ends=[False]
)
THEN |= dict(
    control_cost=["", "clipped"], oracle_split=["train", "test"], eval_explore=["sampled"], policy_gamma=[False]
)
# DynaMITE-RL's losses were sums over sessions before they were means: the same weights in other units.
SUMS = dict(kl_coef=0.03, consistency_coef=0.5, termination_coef=1.0)
RECORDED = {  # what stands in a run's config.json in place of what its command stands for, by the run's name
    **{f"GridWorldAlternating__{name}": SUMS for name in ("dynamite_rl_kept", "no_session_reconstruction")},
    **{f"GridWorldAlternating__{name}": SUMS for name in ("no_conditioning_kept", "no_consistency")},
    "GridWorldAlternating__oracle_terminations": SUMS,
    "GridWorldAlternating__dynamite_rl_kl_0.1": SUMS | dict(kl_coef=0.1),
    "Reacher__dynamite_rl_old": SUMS | dict(kl_coef=0.001),
    "HalfCheetahVelSessions__dynamite_rl_old": SUMS | dict(kl_coef=0.001),
    "GridWorldLDM__rl2_next": dict(kl_coef=1 / 120),  # of a belief that RL2 does not read
    "MEWA__laser_oracle_beta_0_norms": dict(zeta=-0.13),  # of a meta-reward with weight 0
    "MEWA__laser_oracle_5_episodes": dict(total_timesteps=7_500_000),  # a bound that was not reached
}
UNCHECKED = {  # commands in words, or with another run's checkpoint, or of a preset of long ago
    "HalfCheetahVelSessions__dynamite_rl_ends_1", "HalfCheetahVelSessions__dynamite_rl_ends_10",
    *(name for name in RUNS if "_sessions_" in name), "MEWAUniform__laser_context_mean__1",
    "MEWAUniform__laser_explored_3000__1", "MEWA__laser_context_mean__1", "MEWA__laser__1",
    "ScratchItch__dynamite_rl_old__1", "SparsePointRobot__laser_explored__1",
}  # fmt: skip


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
        yield from ((rows[-1], name) for name in re.findall(r"\]\(([\w.-]+)\)", line) if name in RUNS - UNCHECKED)


def parsed(command):
    """The arguments that a command line stands for, as config.json has them."""
    script, *argv = shlex.split(command, comments=True)
    module = importlib.import_module(script.removesuffix(".py"))
    args = vars(parse_args(module.Args, module.PRESETS, getattr(module, "SMALL", {}), argv))
    if "Sessions" in args["env_id"] or args["env_id"] in ("Reacher", "ScratchItch", "GridWorldAlternating"):
        process = "fixed" if args["env_id"] == "GridWorldAlternating" else "poisson"
        args |= dict(sessions=args["sessions"] or 4, session_process=args["session_process"] or process)
    return json.loads(json.dumps(args | dict(script=module.__name__)))


@pytest.mark.parametrize("command, name", [pytest.param(*row, id=row[1]) for row in tables()])
def test_command_starts_the_run_that_is_reported(command, name):
    args, config = parsed(command), json.loads((RESULTS / name / "config.json").read_text())
    for key in [key for key in config if key.startswith("no_") and key not in args]:
        config[key.removeprefix("no_")] = not config[key]  # --no-belief was an argument of its own
    expected = args | RECORDED.get(name.rpartition("__")[0], {})
    for key in expected.keys() - SILENT:
        those = [config[key]] if key in config else THEN.get(key, [])
        ours = expected[key]  # weights are printed with three digits
        same = [ours == x or (isinstance(x, float) and math.isclose(ours, x, rel_tol=2e-3)) for x in those]
        assert any(same), f"{key}: {ours} by the command, {those} in the run"
    seed = name.rpartition("__")[2]
    assert not seed.isdigit() or config["seed"] == int(seed)
    assert "--seed" not in command or config["seed"] == args["seed"]


def test_every_run_stands_in_a_table():
    assert {name for _, name in tables()} == RUNS - UNCHECKED
    assert RUNS <= set(re.findall(r"\]\(([\w.-]+)\)", (RESULTS / "README.md").read_text()))


def test_commands_of_the_readme_are_understood():
    text = (RESULTS.parent.parent / "README.md").read_text()
    commands = SCRIPT.findall(text) + re.findall(r"^[^|\n]*(?:python|--) (\w+\.py[^`\n]*)", text, re.M)
    commands = [command for command in commands if "<" not in command and "--help" not in command]  # <run>: none here
    assert len(commands) > 40
    for command in commands:
        parsed(command)
