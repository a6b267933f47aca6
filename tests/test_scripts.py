"""The scripts as programs: command line, what a run leaves, resume, evaluation. What stands in common/ is tested once,
on varibad.py; each script once for using it."""

import contextlib
import csv
import ctypes
import dataclasses
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import types
from importlib.metadata import version
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

import common.run
import dme
import dynamite_rl
import laser
import ldm
import varibad
from common.arguments import check_bounds, flag, parse_args
from common.envs import BadInput, TensorEnvs, make_envs
from common.rollouts import by_episode, outcomes
from tests import probe
from tests.test_belief import SCRIPTS, check, signals  # noqa: F401

ALL = pytest.mark.parametrize("script", [varibad, dme, ldm, dynamite_rl], ids=lambda module: module.__name__)
EVERY = pytest.mark.parametrize(  # laser.py has no belief model and two phases: tests/test_laser.py runs it
    "script", [varibad, dme, ldm, dynamite_rl, laser], ids=lambda module: module.__name__
)
ROOT = Path(varibad.__file__).parent
TINY = (
    "--num-envs 4 --horizon 5 --episodes-per-task 2 --total-timesteps 160 --precollect 1 --num-minibatches 2 "
    "--hidden-dim 8 --policy-layers 8 --decoder-layers 8 --belief-batch 3 --buffer-size 10 --checkpoint-interval 2"
).split()  # four iterations of 40 steps; two checkpoints
# Between them all that draws random numbers or keeps a state, beside the environments.
HARD = {varibad: "--anneal-lr --ent-coef-end 0.001 --state-coef 1 --decoder-dropout 0.2 --elbo-terms 4".split()}
HARD[varibad] += "--decode-terms 3 --tbptt 5 --belief-updates 2 --belief-warmup 40 --eval-sample".split()
HARD[dme] = HARD[varibad] + "--virtual both --virtual-rate 1 --policy-y sample --initial-belief prior".split()
HARD[dme] += "--virtual-y usage --chain-w".split()
HARD[ldm] = "--mix-dimensions --beta 1.5 --elbo-terms 4".split()
HARD[dynamite_rl] = "--anneal-lr --state-coef 1 --elbo-terms 4 --decode-terms 3".split()


def tiny(script, *words):
    """TINY and more; the alternating grid's four sessions of one length do not fit in there."""
    uneven = script.Args.env_id == "GridWorldAlternating" and "--env-id" not in words
    return [*TINY, *["--session-process", "poisson"] * uneven, *map(str, words)]


def parse(script, *words):
    """The arguments of `python script.py words`."""
    return parse_args(script.Args, script.PRESETS, getattr(script, "SMALL", {}), [str(word) for word in words])


def main(script, *words, log_every=1):
    """`python script.py words` in this process, every iteration logged; mistakes and failures raise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.run, "LOG_EVERY", log_every)
        script.main(parse(script, *words))


def run(script, folder, *words, eval_interval=-1, log_every=1):
    """A tiny run in this process. Returns its last checkpoint."""
    main(script, *tiny(script, "--eval-interval", eval_interval, "--run-dir", folder, *words), log_every=log_every)
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def command(script, monkeypatch, capsys, *words):
    """What `python script.py words` does: exit status and lines on stderr."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, words)])
    status = 0
    try:
        runpy.run_path(script.__file__, run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err.splitlines()


def python(*words, cwd):
    """The same in a process of its own, which finds nothing by way of PYTHONPATH."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, env=clean)


def same(a, b, path=""):
    """Paths in two checkpoints at which they are not bitwise equal."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [p for k in a for p in same(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, (list, tuple)):
        return [p for k, (x, y) in enumerate(zip(a, b, strict=True)) for p in same(x, y, f"{path}/{k}")]
    if isinstance(a, torch.Tensor):
        return [] if a.shape == b.shape and a.dtype == b.dtype and a.equal(b) else [path]
    return [] if a == b else [path]


def metrics(folder):
    """Rows of metrics.csv but for those of the clock."""
    rows = list(csv.reader(open(folder / "metrics.csv")))
    return [row for row in rows if not re.match("time/|charts/SPS", row[1])]


@pytest.fixture(scope="module", params=[varibad, dme, ldm, dynamite_rl], ids=lambda module: module.__name__)
def trained(request, tmp_path_factory):
    """A finished run of each script with all that draws random numbers, evaluated every second iteration: the script,
    its folder, and the room that it wanted on the disk."""
    script, need = request.param, []
    folder = tmp_path_factory.mktemp(script.__name__) / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.run, "missing_space", lambda _, size: need.append(size) or 0)
        run(script, folder, "--seed", 0, *HARD[script], eval_interval=2)
    return script, folder, need[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of varibad.py, not evaluated."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(varibad, folder)
    return folder


# ---------- The command line ----------


def one_sentence(script, monkeypatch, capsys, *words):
    """The line on stderr of a command that is refused with status 2, without the script's name."""
    status, lines = command(script, monkeypatch, capsys, *words)
    assert status == 2 and len(lines) == 1 and lines[0].startswith(f"{script.__name__}.py: "), lines
    return lines[0].split(": ", 1)[1]


@pytest.mark.parametrize(
    "words, named",
    [
        ("--env-id no_such_module:factory", "no_such_module"),
        ("--env-id SparsePointRobot --tbptt 0 --num-minibatches 7", "--num-minibatches 7"),
        ("--tbptt 7", "--tbptt 7"),
        ("--buffer-size 3", "--buffer-size 3"),
        ("--num-envs 0", "--num-envs"),
        ("--horizon -5", "--horizon"),
        ("--learning-rate nan", "--learning-rate"),
        ("--policy-layers 8 0", "--policy-layers"),
        ("--std-init 3", "--std-init"),
        ("--no-belief --oracle-context", "--oracle-context"),
        ("--belief-warmup 160", "--belief-warmup 160"),
        ("--env-id SparsePointRobot --tbptt 0 --reward-decoder multihead", "multihead"),
        ("--resume no/such/checkpoint.pt", "no/such/checkpoint.pt"),
        ("--evaluate .", "."),
        ("--capture-video", "--evaluate"),
        ("--seed 99999999999999999999", "--seed"),
        ("--env-id SparsePointRobot --tbptt 0 --sessions 3", "has no sessions"),
        ("--env-id GridWorldAlternating --sessions 3", "sessions 3"),
    ],
)
def test_bad_input(words, named, monkeypatch, capsys, tmp_path):
    """One line on stderr that names the culprit, status 2, and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    where = [] if "resume" in words or "evaluate" in words else TINY
    assert named in one_sentence(varibad, monkeypatch, capsys, *where, *words.split())
    assert not list(tmp_path.iterdir())


@EVERY
def test_bad_input_of_each_script(script, monkeypatch, capsys, tmp_path):
    """The same where the command line is wrong, and where the environments are."""
    monkeypatch.chdir(tmp_path)
    assert "--learning-rate must be above 0" in one_sentence(script, monkeypatch, capsys, "--learning-rate", 0)
    assert "did you mean GridWorld?" in one_sentence(script, monkeypatch, capsys, "--env-id", "GridWrld")
    assert not list(tmp_path.iterdir())


def test_environments_with_sizes_of_their_own(monkeypatch, capsys, tmp_path):
    """A factory that takes no sizes: its own are those of the run, and others are refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sized.py").write_text(
        "from common.envs.gridworld import GridWorld\n"
        "def make(num_envs, split, seed, device):\n"
        "    return GridWorld(num_envs, split, seed, device, 3, 2)\n"
    )
    words = [*TINY, "--env-id", "sized:make", "--eval-interval", -1, "--run-dir", "run"]
    said = one_sentence(varibad, monkeypatch, capsys, *words)
    assert said == "--horizon 5: sized:make has 3 of its own" and not (tmp_path / "run").exists()
    main(varibad, *words, "--horizon", 0, "--total-timesteps", 1)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["horizon"], config["episodes_per_task"]) == (3, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(monkeypatch, capsys):
    """--cuda without one is bad input."""
    assert "--cuda" in one_sentence(varibad, monkeypatch, capsys, "--cuda")


ANY = {  # what may be 0, negative or infinite, and why
    "eval_interval": "negative = never",
    "virtual_low": "a bound of rewards",
    "virtual_high": "a bound of rewards",
    "logvar_min": "a bound of logarithms",
    "zeta": "a threshold, never above 0",
}
ZERO = set(
    "seed eval_tasks checkpoint_interval ent_coef ent_coef_end vf_coef max_grad_norm belief_updates precollect "
    "belief_max_grad_norm action_embed tbptt elbo_terms decode_terms reward_coef state_coef kl_coef belief_warmup "
    "obs_shift horizon episodes_per_task sessions gamma gae_lambda decoder_dropout beta_w beta_y beta_z virtual_rate "
    "num_mixture_workers beta buffer_add consistency_coef termination_coef explore_iterations initial_iterations "
    "task_iterations contrastive_warmup survival_coef rec_coef task_rec_coef contrastive_coef regulariser_coef xi "
    "pfo_coef".split()
)
NOTHING = {(laser, "total_timesteps"): "no bound", (dynamite_rl, "encoder_layers"): "none; its check_args knows"}
SOMETHING = {(laser, "belief_updates"): "phase 1 is for learning the encoder"}
MOST = dict(gamma=1, gae_lambda=1, decoder_dropout=0.999, virtual_rate=1, buffer_add=1, seed=2**32 - 1)


@EVERY
def test_every_number_is_checked(script):
    """NaN in any float, infinities and negative numbers but where listed, 0 where it has no meaning, and what is above
    a fraction's bounds: BadInput that names the argument."""
    hints, args = get_type_hints(script.Args), script.Args()
    assert not {name for name, hint in hints.items() if hint in (int, float)} & ANY.keys() & ZERO
    for name, hint in hints.items():
        values = {float: [math.nan], int: [], tuple[int, ...]: [(), (0,), (8, -1)]}.get(hint)
        if values is None:
            continue
        if hint in (int, float) and name not in ANY:
            values += [-1, -math.inf, math.inf] + [0] * (name not in ZERO)
        if (script, name) in NOTHING:
            values = [value for value in values if value not in (0, (), (0,), (8, -1))]
        values += [MOST[name] + {int: 1, float: 1e-3}[hint]] if name in MOST else []
        for value in values:
            with pytest.raises(BadInput) as error:
                check_bounds(dataclasses.replace(args, **{name: value}))
                pytest.fail(f"{name} = {value} passes")
            assert f"{flag(name)} must be " in str(error.value)
        for value in [0] * (name in ZERO and (script, name) not in SOMETHING) + [
            most for key, most in MOST.items() if key == name
        ]:
            check_bounds(dataclasses.replace(args, **{name: value}))


def preset_of(script, env_id, cuda):
    """What the script says of this environment, or of its family, or of all others; and over it what is for CPUs."""
    name = re.sub("-v[23]$", "", env_id)
    family, small = name.split("-")[0], getattr(script, "SMALL", {})
    preset = next(script.PRESETS[key] for key in (name, family, "module:factory") if key in script.PRESETS)
    return preset | ({} if cuda else small.get(name) or small.get(family, {}))


IDS = ["GridWorld", "SparsePointRobot", "ML1-reach", "ML10", "HopperMass", "ML1-push-wall-v2", "own.module:factory"]


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("env_id", IDS)
def test_presets(env_id, cuda):
    """The command line over the environment's preset, over which lies a smaller one without --cuda."""
    preset = preset_of(varibad, env_id, cuda)
    expected = dataclasses.asdict(varibad.Args()) | preset | dict(env_id=env_id, seed=7, gamma=0.5, cuda=cuda)
    words = ["--env-id", env_id, "--seed", "7", "--gamma", "0.5"] + ["--cuda"] * cuda
    assert dataclasses.asdict(parse(varibad, *words)) == expected
    for spelling in ([f"--env-id={env_id}"], ["--env_id", env_id]):
        assert parse(varibad, *spelling, *words[2:]) == parse(varibad, *words)


DONE = dict.fromkeys(("ML1", "ML1-reach", "ML1-reach-wall", "ML1-push", "ML10", "ML45"), "done")  # SDVT's flag
SMALL_ACTIONS = dict(Reacher=0.01, ScratchItch=0.01)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize(
    "script, argument, usual, but",
    [
        (varibad, "extra_obs", "none", DONE),
        (dme, "extra_obs", "none", DONE),
        (varibad, "actor_gain", 1, SMALL_ACTIONS),
        (dynamite_rl, "actor_gain", 1, SMALL_ACTIONS | dict.fromkeys([*DONE, "HopperMass"], 0.01)),
        (dynamite_rl, "reset_hidden_at_session", True, dict(Reacher=False)),
        (dynamite_rl, "termination_coef", 10, dict(GridWorld=1, GridWorldAlternating=59 / 4 / 240)),
        (dynamite_rl, "encoder_layers", (64, 64), dict.fromkeys([*DONE, "GridWorld", "HopperMass"], ())),  # goals late
        (dynamite_rl, "state_coef", 0, dict(HalfCheetahWindVelSessions=1)),  # where states tell of the wind
        (laser, "oracle_split", "train", dict(MEWA="test")),  # as section 5.3 has it, on MEWA
        (laser, "eval_explore", "sampled", {}),
        (laser, "eval_sample", False, {}),
        (laser, "policy_gamma", False, dict.fromkeys([*DONE, "HopperMass"], True)),
    ],
)
def test_what_was_decided(script, argument, usual, but, cuda):
    """What authors' code or an experiment gave, by environment: `usual`, but for some."""
    names = {*script.PRESETS, *DONE} - {"module:factory"}
    for name in names:
        value = (dataclasses.asdict(script.Args()) | preset_of(script, name, cuda))[argument]
        assert value == pytest.approx(but.get(name, usual)), name
    assert but.keys() - DONE.keys() <= names


@EVERY
def test_presets_fit(script):
    """With and without --cuda: no preset is refused."""
    one_of = {"ML1": "ML1-reach", "ML10": "ML1-reach", "ML45": "ML1-reach", "module:factory": "SparsePointRobot"}
    for name in dict.fromkeys([*script.PRESETS, *getattr(script, "SMALL", {})]):
        for cuda in (False, True):
            args = script.Args(**(preset_of(script, name, cuda) | dict(env_id=name)))
            sizes = dict(horizon=args.horizon or None, episodes_per_task=args.episodes_per_task or None)
            envs = make_envs(one_of.get(name, name), 1, **sizes)
            args.horizon, args.episodes_per_task = envs.horizon, envs.episodes_per_task
            check(script, args)
            envs.close()


@SCRIPTS
@pytest.mark.parametrize(
    "env_id, cuda", [("ML1-reach", False), ("ML1-reach", True), ("ML1-push", True), ("ML10", False)]
)
def test_presets_give_the_belief_time(script, env_id, cuda):
    """On Meta-World: below a thousand updates a probe reads nothing, and the policy waits for a belief to settle."""
    args = parse(script, "--env-id", env_id, *["--cuda"] * cuda)
    steps = args.num_envs * (args.horizon or 500) * (args.episodes_per_task or 3)  # of an iteration
    updates = args.belief_updates / steps
    assert 1e6 * updates >= 1000 and args.belief_warmup * updates > 1000
    assert (args.obs_shift > 0) == (env_id == "ML1-reach")


@EVERY
def test_help(script, monkeypatch, capsys):
    """A heading for each group of arguments, and every argument under one, with its sentence."""
    monkeypatch.setattr(sys, "argv", [script.__file__, "--help"])
    with pytest.raises(SystemExit) as stop:
        parse_args(script.Args, script.PRESETS, getattr(script, "SMALL", {}))
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--no-no-" not in text
    for group in script.Args.__mro__[1:-1]:
        assert f"{group.__name__} options" in text and group.__doc__.split()[0] in text
    for field in dataclasses.fields(script.Args):
        assert flag(field.name) in text


# ---------- What a run leaves, evaluation ----------

PICTURES = {  # beginnings of their names
    varibad: ["returns", "belief_"],
    dme: ["returns", "belief_", "components"],
    ldm: ["returns", "belief_", "imagined"],
    dynamite_rl: ["sessions_"],
}


def test_what_a_run_leaves(trained):
    """Every promised file, with the promised keys; returns in them agree with each other."""
    script, folder, _ = trained
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.csv", "checkpoint.pt", "checkpoint.pt.previous", "eval.json"} <= names
    assert sum(name.startswith("events.out.tfevents") for name in names) == 1
    pictures = [name for name in names if name.endswith(".png")]
    assert all((folder / name).stat().st_size > 5000 for name in pictures)
    for begin in PICTURES[script]:
        assert 1 <= sum(name.startswith(begin) for name in pictures) <= 3, begin
    config = json.loads((folder / "config.json").read_text())
    assert config["script"] == script.__name__ and config["hidden_dim"] == 8
    assert config["versions"]["torch"] == version("torch")
    result = json.loads((folder / "eval.json").read_text())
    assert result["global_step"] == 160
    for split, tasks in result["tasks"].items():
        assert list(tasks) == make_envs(config["env_id"], 1, split, horizon=20).tasks
        for k in range(2):
            mean = np.mean([task["return"][k] for task in tasks.values()])
            assert result[f"eval/{split}/return_episode_{k + 1}"] == pytest.approx(mean)
        assert result[f"eval/{split}/success_rate"] == np.mean([task["success"][-1] for task in tasks.values()])
    rows = {(int(step), key): float(value) for step, key, value in metrics(folder)[1:]}
    assert len(rows) == len(metrics(folder)) - 1  # no row is doubled
    assert {step for step, _ in rows} == {40, 80, 120, 160}
    assert {step for step, key in rows if key == "eval/test/return_episode_2"} == {80, 160}
    assert rows[160, "eval/test/return"] == result["eval/test/return"]
    for key in ("charts/episodic_return", "charts/return_episode_1", "losses/policy", "losses/belief_reward"):
        assert (160, key) in rows
    assert all(math.isfinite(value) for value in rows.values())


def test_splits_of_an_evaluation(trained):
    """There is no train split where the test split holds the same tasks; where it does not, both are evaluated."""
    script, folder, _ = trained
    splits = {varibad: {"test"}, dme: {"test"}, ldm: {"train", "test"}, dynamite_rl: {"test"}}[script]
    assert json.loads((folder / "eval.json").read_text())["tasks"].keys() == splits


def test_room_on_the_disk(trained):
    """What a run asks for at its start is what the buffer then takes in a checkpoint."""
    _, folder, need = trained
    store = torch.load(folder / "checkpoint.pt")["processes"][0]["buffer"]["store"]
    assert need == sum(x.nbytes for x in store.values()) > 0


def test_a_copy_elsewhere(trained):
    """The script and common/ are enough. There, from another working directory and in a process of its own, --evaluate
    gives exactly the numbers written at the end of training, and leaves the checkpoint alone."""
    script, folder, _ = trained
    place, copy = folder.with_name("place"), folder.with_name("evaluated")
    place.mkdir(), copy.mkdir()
    shutil.copy(script.__file__, place)
    shutil.copytree(ROOT / "common", place / "common", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(folder / "checkpoint.pt", copy)
    done = python(f"place/{script.__name__}.py", "--evaluate", "evaluated/checkpoint.pt", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    result = json.loads((copy / "eval.json").read_text())
    assert result == json.loads((folder / "eval.json").read_text())
    printed = dict(line.split() for line in done.stdout.splitlines())
    assert printed["eval/test/return"] == f"{result['eval/test/return']:.4f}"
    assert same(*(torch.load(d / "checkpoint.pt") for d in (folder, copy))) == []


def test_probe(trained, capsys):
    """python -m tests.probe, on what it is for: a row for each step, of which one number is known, the rewards'
    variance."""
    script, folder, _ = trained
    if script in (ldm, dynamite_rl):
        with pytest.raises(BadInput, match=f"is a checkpoint of {script.__name__}, not of varibad or dme or laser"):
            probe.main(str(folder / "checkpoint.pt"))
        return
    with pytest.raises(BadInput, match=f"--untrained reads contexts of laser.py, and .* is of {script.__name__}.py"):
        probe.main(str(folder / "checkpoint.pt"), untrained=True)
    probe.main(str(folder / "checkpoint.pt"))
    rows = [[float(word) for word in line.split()] for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == [*range(10)]
    assert all(row[1] <= 1 and row[2:4] == row[4:] for row in rows)  # fewer than 15 steps are left
    assert all(error >= 0 and 0 <= variance < 1.1**2 / 4 for error, variance in (row[2:4] for row in rows[:-1]))


def test_windows_of_the_probe(tmp_path, monkeypatch, capsys):
    """Variances are those of the rewards of the next 15 steps, and of all that follow, on the test tasks."""
    run(varibad, tmp_path, "--horizon", 12, "--buffer-size", 5, "--total-timesteps", 96)
    made, rollout, _ = [], varibad.rollout, capsys.readouterr()
    monkeypatch.setattr(varibad, "rollout", lambda *a, **b: made.append(rollout(*a, **b)) or made[-1])
    probe.main(str(tmp_path / "checkpoint.pt"))
    rewards = torch.cat([data["rewards"] for data in made], 1)  # GridWorld: no other tasks than those of the test
    rows = [[float(word) for word in line.split()] for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(rows) == 24
    for e, _, _, near, _, far in rows:
        expected = rewards[int(e) : int(e) + 15].var().item(), rewards[int(e) :].var().item()
        assert (near, far) == pytest.approx(expected, abs=6e-4)


def test_idle_steps_of_the_probe(tmp_path, monkeypatch, capsys):
    """No row where nobody plays in the next 15 steps; they are not the last ones, where episodes end early."""
    run(varibad, tmp_path, "--horizon", 12, "--buffer-size", 5, "--total-timesteps", 96)
    rollout, _ = varibad.rollout, capsys.readouterr()

    def idle(*a, **b):
        data = rollout(*a, **b)
        data["alive"][2:22] = False
        return data

    monkeypatch.setattr(varibad, "rollout", idle)
    probe.main(str(tmp_path / "checkpoint.pt"))
    rows = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [0, 1, *range(8, 24)]


@pytest.mark.parametrize("script", [varibad, dme])
def test_probe_of_a_warm_up(script, tmp_path, monkeypatch, capsys):
    """The policy acts blind there, as it was trained; the belief that it does not see is probed all the same."""
    run(script, tmp_path, "--belief-warmup", "159", eval_interval=-1)  # of 160 steps
    blind, rollout = [], script.rollout
    monkeypatch.setattr(script, "rollout", lambda *a, **k: blind.append(a[4]) or rollout(*a, **k))
    probe.main(str(tmp_path / "checkpoint.pt"))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert blind and all(blind) and len({row[1] for row in rows}) > 1


def test_runs_folder(tmp_path, monkeypatch):
    """Without --run-dir: runs/<env>__<script>__<seed>__<time> where the command was given."""
    monkeypatch.chdir(tmp_path)
    main(varibad, *tiny(varibad, "--eval-interval", "-1", "--total-timesteps", "40", "--seed", "5"))
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"GridWorld__varibad__5__\d{8}-\d{6}", folder.name) and (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize("words", [[], ["--eval-sample"]])
def test_continuous_policies_are_evaluated_both_ways(words, tmp_path, monkeypatch):
    """Most likely actions, and as split/sampled sampled ones: each task in each, under its own name; pictures and the
    bar get the first. With --eval-sample sampled ones alone."""
    played, rollout, drawn = [], varibad.rollout, []

    def spy(envs, agent, model, args, blind, tasks=None, deterministic=False):
        data = rollout(envs, agent, model, args, blind, tasks, deterministic)
        if tasks:
            data["episode_return"] = torch.rand(data["episode_return"].shape)
            played.extend((deterministic, name, data["episode_return"][:, i].tolist()) for i, name in enumerate(tasks))
        return data

    monkeypatch.setattr(varibad, "rollout", spy)
    monkeypatch.setattr(varibad, "draw_pictures", lambda *words: drawn.append(words[-1]))
    run(varibad, tmp_path, "--env-id", "HalfCheetahVel", "--tbptt", "0", *words, eval_interval=0)
    result = json.loads((tmp_path / "eval.json").read_text())
    kinds = {"test": False} if words else {"test": True, "test/sampled": False}
    assert result["tasks"].keys() == kinds.keys() and {kind for kind, *_ in played} == {*kinds.values()}
    for split, kind in kinds.items():
        theirs = {name: returned for deterministic, name, returned in reversed(played) if deterministic == kind}
        assert {name: task["return"] for name, task in result["tasks"][split].items()} == theirs
        assert result[f"eval/{split}/return_episode_1"] == pytest.approx(np.mean([r[0] for r in theirs.values()]))
    assert drawn == [{"test": result["tasks"]["test"]}]


@pytest.mark.parametrize("words", [["--num-envs", "5"], ["--num-envs", "25"], ["--eval-tasks", "6"], ["--eval-sample"]])
def test_evaluation_covers_each_task_once(words, tmp_path, monkeypatch):
    """However many environments there are, and whatever is left over: each name once, or the first few; with the most
    likely actions or sampled ones, and never in training mode. What is written of a task is what it returned."""
    trained_on, rounds, returned, rollout = [], [], {}, varibad.rollout

    def spy(envs, agent, model, args, blind, tasks=None, deterministic=False):
        (rounds if tasks else trained_on).append(tasks)
        assert agent.training == model.training == (tasks is None)
        assert deterministic == (tasks is not None and words != ["--eval-sample"])
        data = rollout(envs, agent, model, args, blind, tasks, deterministic)
        if tasks:
            data["episode_return"] = torch.rand(data["episode_return"].shape)
            returned.update((name, data["episode_return"][:, i].tolist()) for i, name in list(enumerate(tasks))[::-1])
        return data

    monkeypatch.setattr(varibad, "rollout", spy)
    monkeypatch.setattr(varibad, "draw_pictures", lambda *_: None)
    run(varibad, tmp_path, "--total-timesteps", "100", "--buffer-size", "25", *words, eval_interval=1)
    tasks = json.loads((tmp_path / "eval.json").read_text())["tasks"]["test"]
    assert list(tasks) == make_envs("GridWorld", 1).tasks[: 6 if "--eval-tasks" in words else 21]
    assert {name: task["return"] for name, task in tasks.items()} == returned
    once, rest = divmod(len(rounds), len(trained_on))  # an evaluation after each iteration
    assert once and not rest and rounds[:once] * len(trained_on) == rounds
    assert list(dict.fromkeys(sum(rounds[:once], []))) == list(tasks)
    assert len(sum(rounds[:once], [])) < len(tasks) + once  # a task or so more than once, where a round is not full


def test_by_episode():
    """What is reported of tasks of two families, by hand."""
    tasks = {
        "a/0": {"return": [1.0, 3.0], "success": [0.0, 1.0]},
        "a/1": {"return": [2.0, 5.0], "success": [1.0, 1.0]},
        "b/0": {"return": [6.0, 4.0], "success": [0.0, 0.0]},
    }
    assert by_episode(tasks) == pytest.approx(
        {
            "return_episode_1": 3, "return_episode_2": 4, "return": 4, "return/a": 4, "return/b": 4,
            "success_rate_episode_1": 1 / 3, "success_rate_episode_2": 2 / 3, "success_rate": 2 / 3,
            "success_rate_any_episode": 2 / 3, "success_rate/a": 1, "success_rate/b": 0,
        }
    )  # fmt: skip
    assert not any("/" in key for key in by_episode({name: tasks[name] for name in ("a/0", "a/1")}))
    returns = {name: {"return": task["return"]} for name, task in tasks.items()}
    assert by_episode(returns).keys() == {key for key in by_episode(tasks) if key.startswith("return")}


def without_success(folder, shown):
    """Whether a run's rows, its evaluation and its progress line have returns, and no success rate of 0."""
    keys = {key for _, key, _ in metrics(folder)}
    assert {"charts/episodic_return", "eval/test/return"} <= keys and "return=" in shown and "test return=" in shown
    return not any("success" in text for text in (*keys, (folder / "eval.json").read_text(), shown))


@pytest.mark.parametrize("script, env_id", [(varibad, "HalfCheetahVel"), (ldm, "AntGoal"), (dme, "GridWorld")])
def test_success_where_it_is_defined(script, env_id, tmp_path, capsys):
    run(script, tmp_path / "run", "--env-id", env_id, "--eval-tasks", 2, eval_interval=2)
    shown = capsys.readouterr().err
    assert without_success(tmp_path / "run", shown) == (env_id != "GridWorld")
    *_, last = (float(value) for _, key, value in metrics(tmp_path / "run") if key == "charts/return_episode_2")
    assert re.findall(r"(?<!test )return=([-\d.]+)", shown)[-1] == f"{last:.2f}"  # of the last episode, as the row


def test_outcomes():
    """Returns, and success at any step, of each episode of a rollout, by loops; no success where none was told."""
    envs, (rewards, success) = types.SimpleNamespace(episodes_per_task=3, horizon=4), torch.rand(2, 12, 5)
    data = dict(raw_rewards=rewards, success=success < 0.2)
    found = outcomes(data, envs)
    for k, n in np.ndindex(3, 5):
        steps = range(4 * k, 4 * k + 4)
        assert found["episode_return"][k, n].item() == pytest.approx(sum(rewards[t, n].item() for t in steps))
        assert found["episode_success"][k, n].item() == any(success[t, n].item() < 0.2 for t in steps)
    assert outcomes(dict(raw_rewards=rewards), envs).keys() == {"episode_return"}


def recorded(script, monkeypatch):
    """A list that will hold what every rollout returns."""
    made, rollout = [], script.rollout
    monkeypatch.setattr(script, "rollout", lambda *a, **b: made.append(rollout(*a, **b)) or made[-1])
    return made


@ALL
def test_what_the_state_decoder_predicts(script, tmp_path, monkeypatch):
    """Its target has the mean and deviation of all changes of state that were played, which a checkpoint keeps."""
    made, env_id = recorded(script, monkeypatch), "Reacher" if script is dynamite_rl else "SparsePointRobot"
    words = ["--standardise-inputs", "--tbptt", "0", "--ppo-windows", "1"][: 5 if script is ldm else 3]
    end = run(script, tmp_path, "--env-id", env_id, "--state-coef", "1", *words)
    changes = torch.cat([(data["next_obs"] - data["obs"]).flatten(0, 1) for data in made]).double()
    norm = {name.split(".")[1]: x.double() for name, x in end["model"].items() if name.startswith("change_norm")}
    torch.testing.assert_close(norm["mean"], changes.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm["std"], changes.std(0, correction=0).clamp(min=1e-3), atol=1e-5, rtol=1e-3)


@ALL
@pytest.mark.parametrize("gain", [1.0, 0.01])
def test_first_actions(script, gain):
    """--actor-gain scales a continuous policy's first mean action, whatever it sees."""
    means = []
    for actor_gain in (1.0, gain):
        args = script.Args(**preset_of(script, "SparsePointRobot", cuda=True) | dict(actor_gain=actor_gain))
        torch.manual_seed(0)
        agent = script.Agent(args, 2, Box(-1, 1, (2,)), dict(m=4))
        means.append(agent.act(torch.randn(9, 2), torch.randn(9, 4), deterministic=True))
    torch.testing.assert_close(means[1], gain * means[0])
    assert (means[0].abs() > 0.1).any()


@ALL
@pytest.mark.parametrize("context", ["--no-belief", "--oracle-context"])
def test_floor_and_ceiling(script, context, tmp_path, monkeypatch):
    """The policy gets zeros, or the true task, at every step; no belief is trained."""
    made = recorded(script, monkeypatch)
    end = run(script, tmp_path, context, eval_interval=0)
    for data in made:
        truth = data["contexts"] if script is dynamite_rl else data["task"]  # the last belief is nobody's
        belief = truth if context == "--oracle-context" else torch.zeros(len(data["task"]), 1)
        assert torch.equal(data["beliefs"][:-1], belief.expand_as(data["beliefs"][:-1]))
    assert len(made) > 4 and end["processes"][0]["buffer"]["full"] == 0 and not end["belief_optimizer"]["state"]


@SCRIPTS
def test_warmup_of_the_belief(script, tmp_path, monkeypatch):
    """--belief-warmup: zeros for the policy for that many steps, while the belief model learns."""
    made = recorded(script, monkeypatch)
    end = run(script, tmp_path, "--belief-warmup", "80")
    assert [bool(data["beliefs"].any()) for data in made] == [False, False, True, True]
    learnt = {int(step) for step, key, _ in metrics(tmp_path)[1:] if key == "losses/belief_reward"}
    assert end["processes"][0]["buffer"]["full"] == 10 and learnt == {40, 80, 120, 160}


# ---------- The same again: seeds, resume, signals ----------

OF_THE_CALL = {"/args/run_dir", "/args/resume", "/args/eval_interval", "/metrics_bytes"}  # the clock has a length


def test_seeds_and_evaluation(trained, tmp_path):
    """The same command again, without evaluations: weights, buffer, metrics are bitwise equal. Another seed: another
    run."""
    script, folder, _ = trained
    end = torch.load(folder / "checkpoint.pt")
    again, other = (run(script, tmp_path / str(seed), *HARD[script], "--seed", seed) for seed in (0, 1))
    assert set(same(end, again)) <= OF_THE_CALL
    evaluated = ("eval/", "imagination/")
    assert metrics(tmp_path / "0") == [row for row in metrics(folder) if not row[1].startswith(evaluated)]
    different = same(end, other)
    assert metrics(tmp_path / "0") != metrics(tmp_path / "1")
    for name, tensor in end["agent"].items():
        constant = name.startswith(("first_norm", "encoder.obs_norm")) or tensor.numel() < 2
        assert constant or not tensor.is_floating_point() or f"/agent/{name}" in different, name


def test_to_look_changes_nothing(trained, tmp_path):
    """Rows of metrics, with all that is measured for them alone, or none but the last: the same weights."""
    script, folder, _ = trained
    often, seldom = (run(script, tmp_path / str(n), *HARD[script], eval_interval=0, log_every=n) for n in (1, 10**9))
    assert len(metrics(tmp_path / "1")) > len(metrics(tmp_path / str(10**9)))
    assert set(same(often, seldom)) <= OF_THE_CALL


def continued(script, straight, resumed, *words):
    """Copies the checkpoint before the last one of a run to a new folder, with all rows of metrics, those of the
    iterations to come too, and goes on from there. Returns the last checkpoint."""
    resumed.mkdir()
    shutil.copy(straight / "checkpoint.pt.previous", resumed / "checkpoint.pt")
    shutil.copy(straight / "metrics.csv", resumed)
    with open(resumed / "metrics.csv", "a") as file:
        file.write("200,charts/episodic_return,0.25\r\n" * 9)  # of a run that was longer
    assert torch.load(resumed / "checkpoint.pt")["iteration"] == 2
    torch.manual_seed(123)
    main(script, "--resume", resumed / "checkpoint.pt", *words)
    return torch.load(resumed / "checkpoint.pt")


def resume_equals_straight(script, folder, *words):
    """Four iterations straight equal two, saved, and two more: bit for bit, and no row of metrics lost or doubled."""
    end = run(script, folder / "straight", *words)
    again = continued(script, folder / "straight", folder / "resumed")
    assert set(same(end, again)) <= OF_THE_CALL
    assert metrics(folder / "straight") == metrics(folder / "resumed") and len(metrics(folder / "straight")) > 30
    assert end["iteration"] == again["iteration"] == 4 and end["processes"][0]["buffer"]["full"] > 4


def test_resume(trained, tmp_path):
    """Two iterations, saved, and two more with their evaluation: all as in four, to the last bit."""
    script, folder, _ = trained
    again = continued(script, folder, tmp_path / "run")
    assert set(same(torch.load(folder / "checkpoint.pt"), again)) <= OF_THE_CALL
    assert metrics(folder) == metrics(tmp_path / "run") and len(metrics(folder)) > 30
    assert (tmp_path / "run" / "eval.json").read_text() == (folder / "eval.json").read_text()


@pytest.mark.parametrize(
    "words",
    [
        "--env-id SparsePointRobot --seed 3 --elbo-terms 4 --decode-terms 3 --tbptt 5 --state-coef 1 --obs-shift 1",
        "--env-id ML1-reach --seed 2 --belief-warmup 40 --obs-shift 1 --belief-updates 2 --elbo-terms 3 --tbptt 0",
    ],
)
def test_resume_elsewhere(words, tmp_path):
    """Of continuous actions and of worker processes; MuJoCo's back end: tests/test_sessions.py."""
    resume_equals_straight(varibad, tmp_path, *words.split())


def test_resume_of_a_finished_run(finished, monkeypatch, capsys):
    """There is nothing left to do: status 0 and no traceback, weights and metrics as they were."""
    end, rows = torch.load(finished / "checkpoint.pt"), metrics(finished)
    status, _ = command(varibad, monkeypatch, capsys, "--resume", finished / "checkpoint.pt")
    assert status == 0 and len(rows) > 30
    assert same(end, torch.load(finished / "checkpoint.pt")) == [] and metrics(finished) == rows


def test_resume_into_another_folder(finished, tmp_path):
    """--run-dir beside --resume: the run goes on there, with what is given beside, and the old folder stays."""
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    words = ["--resume", finished / "checkpoint.pt", "--run-dir", tmp_path / "new"]
    main(varibad, *words, "--total-timesteps", "200", "--learning-rate", "0.125")
    end = torch.load(tmp_path / "new" / "checkpoint.pt")
    assert end["global_step"] == 200 and end["optimizer"]["param_groups"][0]["lr"] == 0.125
    assert {step for step, *_ in metrics(tmp_path / "new")} == {"global_step", "200"}
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


def test_resume_of_the_one_before(finished, tmp_path):
    """checkpoint.pt.previous may be resumed where it lies."""
    folder = shutil.copytree(finished, tmp_path / "run")
    main(varibad, "--resume", folder / "checkpoint.pt.previous")
    again = torch.load(folder / "checkpoint.pt")
    assert set(same(torch.load(finished / "checkpoint.pt"), again)) <= OF_THE_CALL and metrics(folder) == metrics(
        finished
    )


def test_a_folder_that_holds_a_run(finished, monkeypatch, capsys):
    """Another run into it: one line that says how to go on, status 2, and the run is as it was."""
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    said = one_sentence(varibad, monkeypatch, capsys, *tiny(varibad, "--run-dir", finished))
    assert "holds a run already" in said and f"--resume {finished}" in said
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


def test_resume_says_cuda_again(finished, tmp_path):
    """The flag of the first command may stand beside --resume or --evaluate of what it made."""
    state = torch.load(finished / "checkpoint.pt")
    state["args"]["cuda"] = True
    torch.save(state, tmp_path / "cuda.pt")
    assert parse(varibad, "--evaluate", tmp_path / "cuda.pt", "--cuda").cuda


FROM = pytest.mark.parametrize("flag", ["--resume", "--evaluate"])


@FROM
@pytest.mark.parametrize("damage", [lambda good: good[:3000], lambda good: good[:-100], lambda _: b"", lambda _: b"no"])
def test_unreadable_checkpoints(finished, flag, damage, monkeypatch, capsys, tmp_path):
    """Truncated, empty or foreign: one line, status 2."""
    (tmp_path / "bad.pt").write_bytes(damage((finished / "checkpoint.pt").read_bytes()))
    assert "not a readable checkpoint" in one_sentence(varibad, monkeypatch, capsys, flag, tmp_path / "bad.pt")


@FROM
@pytest.mark.parametrize(
    "change, named",
    [
        (lambda state: [1, 2], "another program"),
        (lambda state: state | dict(script="ldm"), "checkpoint of ldm"),
        (lambda state: state | dict(agent=Path("x")), "not a readable checkpoint"),  # that takes code to make
        (lambda state: {k: v for k, v in state.items() if k != "agent"}, "agent"),
        (lambda state: {k: v for k, v in state.items() if k != "args"}, "args"),
        (lambda state: state | dict(args=state["args"] | dict(surplus=1)), "surplus"),
        (lambda state: state | dict(surplus=1), "surplus"),
        (lambda state: state | dict(model=state["model"] | dict(surplus=torch.zeros(1))), "surplus"),
    ],
)
def test_foreign_checkpoints(finished, flag, change, named, monkeypatch, capsys, tmp_path):
    """Of another program, with code, with entries missing or to spare: one line that names them, status 2."""
    torch.save(change(torch.load(finished / "checkpoint.pt")), tmp_path / "bad.pt")
    assert named in one_sentence(varibad, monkeypatch, capsys, flag, tmp_path / "bad.pt")


@pytest.mark.parametrize("part", ["rng", "buffer", "envs"])
def test_a_process_that_lacks_something(finished, part, monkeypatch, capsys, tmp_path):
    """A checkpoint without the random state, the buffer or the environments: one line that names it, status 2."""
    state = torch.load(finished / "checkpoint.pt")
    del state["processes"][0][part]
    torch.save(state, tmp_path / "bad.pt")
    assert part in one_sentence(varibad, monkeypatch, capsys, "--resume", tmp_path / "bad.pt")


@pytest.mark.parametrize(
    "words, named",
    [
        ("--hidden-dim 9", "model"),
        ("--latent-dim 4", "agent"),
        ("--buffer-size 5", "--buffer-size"),
        ("--num-envs 2", "--num-envs"),
        ("--horizon 6", "--horizon"),
        ("--episodes-per-task 3", "--episodes-per-task"),
        ("--reward-version v1", "--reward-version"),
        ("--split-rule ldm", "--split-rule"),
        ("--extra-obs time", "--extra-obs"),
        ("--oracle", "--oracle"),
        ("--env-id SparsePointRobot --reward-decoder mlp", "--env-id"),
        ("--evaluate other.pt", "--evaluate"),
    ],
)
def test_resume_with_other_sizes(finished, words, named, monkeypatch, capsys, tmp_path):
    """Arguments that the saved state does not fit: one line that names what, status 2, and nothing is started."""
    (tmp_path / "run").mkdir()
    path = shutil.copy(finished / "checkpoint.pt", tmp_path / "run")
    argv = ["--resume", path, "--total-timesteps", "800", *words.split()]
    assert named in one_sentence(varibad, monkeypatch, capsys, *argv)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]


@ALL
@pytest.mark.parametrize("interval", [0, 1])
def test_a_signal_ends_the_run_saved(script, interval, tmp_path, monkeypatch):
    """SIGTERM in the second rollout: that iteration is finished and saved, and the run returns; whether or not a
    checkpoint is due."""
    made, rollout = [], script.rollout

    def interrupted(*a, **b):
        made.append(rollout(*a, **b))
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return made[-1]

    monkeypatch.setattr(script, "rollout", interrupted)
    assert run(script, tmp_path, "--checkpoint-interval", interval)["iteration"] == 2
    assert not (tmp_path / "eval.json").exists() and len(made) == 2


@SCRIPTS
def test_schedules(script, tmp_path, monkeypatch):
    """Step sizes fall to a quarter in the last of four iterations, the entropy's weight from its start to its end."""
    seen, ppo_update, update_belief = [], script.ppo_update, script.update_belief
    rate = lambda optimizer: optimizer.param_groups[0]["lr"]  # noqa: E731

    def policy(agent, optimizer, data, ent_coef, args):
        seen.append(("policy", rate(optimizer), ent_coef))
        return ppo_update(agent, optimizer, data, ent_coef, args)

    def belief(model, optimizer, *rest):
        seen.append(("belief", rate(optimizer)))
        return update_belief(model, optimizer, *rest)

    monkeypatch.setattr(script, "ppo_update", policy)
    monkeypatch.setattr(script, "update_belief", belief)
    words = "--anneal-lr --learning-rate 4 --ent-coef 0.5 --ent-coef-end 0.1 --belief-learning-rate 0.1 --clip-coef 9"
    run(script, tmp_path, *words.split(), "--belief-updates", "1", "--belief-anneal-lr")
    assert [x for x in seen if x[0] == "policy"] == [
        ("policy", 3.0, pytest.approx(0.4)), ("policy", 2.0, pytest.approx(0.3)), ("policy", 1.0, pytest.approx(0.2))
    ]  # fmt: skip
    rates = [pytest.approx(rate) for rate in (0.1, 0.075, 0.05, 0.025)]
    assert [x[1] for x in seen if x[0] == "belief"] == rates


@pytest.mark.parametrize("script", HARD, ids=lambda module: module.__name__)
def test_second_core(script, tmp_path, monkeypatch):
    """The policy's update beside the belief's: on one core and on two the same bits, as the policy's draws nothing."""
    threads, ends = [], []
    name = "a2c_update" if script is ldm else "ppo_update"
    update = getattr(script, name)

    def spy(*inputs):
        threads.append(threading.get_ident())
        return update(*inputs)

    monkeypatch.setattr(script, name, spy)
    monkeypatch.setattr(common.processes, "LARGE", 40)
    for cores in (1, 2):
        monkeypatch.setattr(common.processes, "cores", lambda cores=cores: cores)
        ends.append(run(script, tmp_path / str(cores), *HARD[script]))
    here = threading.get_ident()
    assert [thread == here for thread in threads] == [True] * 3 + [False] * 3
    assert metrics(tmp_path / "1") == metrics(tmp_path / "2")
    assert {*same(*ends)} <= {"/metrics_bytes", "/args/run_dir"}  # the clock has more or fewer digits


def test_second_thread_has_the_threads_of_the_first(monkeypatch):
    """OpenMP's number of threads, which PyTorch sets in each thread by itself, and not at once."""
    library = next(iter(Path(torch.__file__).parent.glob("lib/libgomp*")), None)
    if library is None:
        pytest.skip("this PyTorch has another OpenMP")
    monkeypatch.setattr(common.processes, "cores", lambda: 2)
    threads, found = torch.get_num_threads(), []
    for n in (1, 2):
        torch.set_num_threads(n)
        with common.processes.second_thread(varibad.Args(), common.processes.LARGE) as second:
            found.append(second.submit(ctypes.CDLL(str(library)).omp_get_max_threads).result())
    torch.set_num_threads(threads)
    assert found == [1, 2]


def test_laps_add_up(monkeypatch):
    """Of three laps, two have one name."""
    run, clock = types.SimpleNamespace(laps={}, lap_started=1), iter((3, 6, 10))
    monkeypatch.setattr(common.run.time, "perf_counter", lambda: next(clock))
    for name in ("ppo", "belief", "ppo"):
        common.run.Run.lap(run, name)
    assert run.laps == dict(ppo=2 + 4, belief=3)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("name", ["ppo_update", "update_belief"])
def test_a_failure_beside_another_update(name, cores, tmp_path, monkeypatch):
    """A failure of either update ends the run with its own error, and leaves no thread at work."""

    def fails(*inputs):
        raise FloatingPointError(name)

    monkeypatch.setattr(varibad, name, fails)
    monkeypatch.setattr(common.processes, "cores", lambda: cores)
    monkeypatch.setattr(common.processes, "LARGE", 40)
    with pytest.raises(FloatingPointError, match=f"iteration 2: {name}" if name == "ppo_update" else name):
        run(varibad, tmp_path, "--belief-updates", "1")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize("words, made", [(["--eval-tasks", "6"], 3), (["--tbptt", "7"], 1)])
def test_environments_are_closed(words, made, tmp_path, monkeypatch):
    """At the end of a run, where it does not begin, and before the first step where others took their place."""
    opened, closed, in_use, make, close = [], [], [], common.run.make_envs, TensorEnvs.close
    rollout = varibad.rollout
    monkeypatch.setattr(common.run, "make_envs", lambda *a, **b: opened.append(make(*a, **b)) or opened[-1])
    monkeypatch.setattr(TensorEnvs, "close", lambda self: closed.append(self) or close(self))
    monkeypatch.setattr(
        varibad, "rollout", lambda *a, **b: in_use.append(len(opened) - len(closed)) or rollout(*a, **b)
    )
    with pytest.raises(BadInput) if made == 1 else contextlib.nullcontext():
        run(varibad, tmp_path, "--total-timesteps", 1, *words, eval_interval=0)
    assert len(opened) == made and all(any(envs is other for other in closed) for envs in opened)
    assert {*in_use} == (set() if made == 1 else {2})  # for training, for evaluations


def test_many_environments_take_a_few_ones_place(tmp_path, monkeypatch):
    """Of more than a thousand, whose memory is asked of a thousand first; these are closed then."""
    made, make, closed, close = [], common.run.make_envs, [], TensorEnvs.close
    monkeypatch.setattr(common.run, "make_envs", lambda *a, **b: made.append(make(*a, **b)) or made[-1])
    monkeypatch.setattr(TensorEnvs, "close", lambda self: closed.append(self) or close(self))
    args = varibad.Args(num_envs=1001, horizon=1, episodes_per_task=1, run_dir=str(tmp_path))
    with common.run.Run(args) as run_:
        assert [envs.num_envs for envs in made[:2]] == [1000, 1001] and closed[0] is made[0]
        assert run_.envs is made[1] and not any(envs is made[1] for envs in closed)


@SCRIPTS
def test_smallest_sizes(script, tmp_path):
    """Everything that may be 1 is 1, in a run with pictures."""
    ones = "--num-envs 1 --horizon 1 --episodes-per-task 1 --num-minibatches 1 --total-timesteps 3 --latent-dim 1 "
    ones += "--hidden-dim 1 --obs-embed 1 --belief-embed 1 --state-embed 1 --reward-embed 1 --policy-layers 1 "
    ones += "--decoder-layers 1 --belief-batch 1 --buffer-size 1 --elbo-terms 1 --eval-tasks 1"
    ones += " --num-components 1 --component-layers 1" if script is dme else ""
    assert run(script, tmp_path, *ones.split(), eval_interval=0)["iteration"] == 3
    assert all(math.isfinite(float(value)) for _, _, value in metrics(tmp_path)[1:])
