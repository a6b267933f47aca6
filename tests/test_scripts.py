"""The scripts as programs: command line, what a run leaves, resume, evaluation, and the house's style."""

import ast
import csv
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
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

import dme
import dynamite_rl
import laser
import ldm
import varibad
from common.envs import BadInput, make_envs
from common.envs.gridworld import GridWorld
from tests.test_belief import SCRIPTS, signals  # noqa: F401

ALL = pytest.mark.parametrize("script", [varibad, dme, ldm, dynamite_rl], ids=lambda module: module.__name__)
EVERY = pytest.mark.parametrize(  # laser.py has no belief model and two phases: tests/test_laser.py runs it
    "script", [varibad, dme, ldm, dynamite_rl, laser], ids=lambda module: module.__name__
)
ROOT = Path(varibad.__file__).parent
IDS = ["GridWorld", "SparsePointRobot", "ML1-reach", "ML10", "ML45", "GridWorldAlternating", "Reacher", "HopperMass"]
TINY = (
    "--num-envs 4 --horizon 5 --episodes-per-task 2 --total-timesteps 160 --precollect 1 --num-minibatches 2 "
    "--hidden-dim 8 --policy-layers 8 --decoder-layers 8 --belief-batch 3 --buffer-size 10 --checkpoint-interval 2"
).split()  # four iterations of 40 steps; two checkpoints
HARD = dict(  # between them all that draws random numbers or keeps a state
    GridWorld=["--seed", "0", "--anneal-lr", "--ent-coef-end", "0.001"],
    SparsePointRobot="--seed 3 --elbo-terms 4 --decode-terms 3 --tbptt 5 --state-coef 1 --decoder-dropout 0.2".split(),
)
HARD["ML1-reach"] = "--seed 2 --belief-warmup 40 --obs-shift 1 --belief-updates 2 --elbo-terms 3 --tbptt 0".split()
HARD_DME = "--virtual both --virtual-rate 1 --policy-y sample --initial-belief prior".split()


def tiny(script, *words):
    """TINY and more; the alternating grid's four sessions of one length do not fit in there."""
    uneven = script.Args.env_id == "GridWorldAlternating" and "--env-id" not in words
    return [*TINY, *["--session-process", "poisson"] * uneven, *map(str, words)]


def run(script, folder, *words, eval_interval=-1):
    """A tiny run in this process; every iteration is logged. Returns its last checkpoint."""
    argv = tiny(script, "--eval-interval", eval_interval, "--run-dir", folder, *words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "LOG_EVERY", 1)
        script.main(script.parse_args(argv))
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


@pytest.fixture(scope="module", params=[varibad, dme], ids=["varibad", "dme"])
def trained(request, tmp_path_factory):
    """A finished run on the grid, evaluated every second iteration: the script and its folder."""
    folder = tmp_path_factory.mktemp(request.param.__name__) / "run"
    run(request.param, folder, eval_interval=2)
    return request.param, folder


# ---------- The command line ----------


@ALL
@pytest.mark.parametrize(
    "words, named",
    [
        ("--env-id GridWrld", "GridWorld"),
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
        ("--env-id SparsePointRobot --tbptt 0 --reward-decoder multihead", "multihead"),
        ("--resume no/such/checkpoint.pt", "no/such/checkpoint.pt"),
        ("--evaluate .", "."),
        ("--seed 99999999999999999999", "--seed"),
        ("--env-id SparsePointRobot --tbptt 0 --sessions 3", "has no sessions"),
        ("--env-id GridWorldAlternating --sessions 3", "sessions 3"),
    ],
)
def test_bad_input(script, words, named, monkeypatch, capsys, tmp_path):
    """One line on stderr that names the culprit, status 2, and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    where = [] if "resume" in words or "evaluate" in words else TINY
    status, lines = command(script, monkeypatch, capsys, *where, *words.split())
    assert status == 2 and len(lines) == 1, lines
    assert lines[0].startswith(f"{script.__name__}.py: ") and named in lines[0]
    assert not list(tmp_path.iterdir())


@EVERY
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(script, monkeypatch, capsys):
    """--cuda without one is bad input."""
    status, lines = command(script, monkeypatch, capsys, "--cuda")
    assert status == 2 and len(lines) == 1 and "--cuda" in lines[0]


ANY = {  # what may be 0, negative or infinite, and why
    "eval_interval": "negative = never",
    "virtual_low": "a bound of rewards",
    "virtual_high": "a bound of rewards",
    "logvar_min": "a bound of logarithms",
    "zeta": "a threshold, never above 0",
}
ZERO = "seed eval_interval eval_tasks checkpoint_interval ent_coef ent_coef_end vf_coef max_grad_norm belief_updates "
ZERO += "precollect belief_max_grad_norm action_embed tbptt elbo_terms decode_terms reward_coef state_coef kl_coef "
ZERO += (
    "belief_warmup obs_shift horizon episodes_per_task sessions gamma gae_lambda decoder_dropout beta_w beta_y beta_z "
)
ZERO += "virtual_rate virtual_low num_mixture_workers beta buffer_add consistency_coef termination_coef "
ZERO += "total_timesteps explore_iterations initial_iterations task_iterations contrastive_warmup survival_coef "
ZERO += "rec_coef task_rec_coef contrastive_coef regulariser_coef xi pfo_coef"


@EVERY
def test_every_number_is_checked(script):
    """NaN in any float, infinities and negative numbers but where listed, 0 where it has no meaning: BadInput."""
    for field in dataclasses.fields(script.Args):
        values = {"float": [math.nan], "int": []}.get(getattr(field.type, "__name__", ""))
        if values is None:
            continue
        values += [] if field.name in ANY else [-1, -math.inf, math.inf]
        values += [] if field.name in ZERO.split() or field.name in ANY else [0]
        for value in values:
            with pytest.raises(BadInput) as error:
                script.check_args(dataclasses.replace(script.Args(), **{field.name: value}))
                pytest.fail(f"{field.name} = {value} passes")
            assert script.flag(field.name) in str(error.value)


def test_virtual_rewards_need_an_interval():
    """A lower bound above the upper one makes every virtual reward the same."""
    with pytest.raises(BadInput, match="--virtual-low"):
        dme.check_args(dme.Args(virtual_low=2.0, virtual_high=1.0))


@ALL
@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("env_id", [*IDS, "ML1-push-wall-v2", "own.module:factory"])
def test_presets(script, env_id, cuda, monkeypatch):
    """The command line over the environment's preset, over which lies a smaller one without --cuda; it passes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    name = re.sub("-v[23]$", "", env_id)
    family = name.split("-")[0]
    preset = script.PRESETS[family] if family in script.PRESETS else script.YOUR_OWN
    preset = preset | ({} if cuda else script.SMALL.get(name) or script.SMALL.get(family, {}))
    args = script.parse_args(["--env-id", env_id, "--seed", "7", "--gamma", "0.5"] + ["--cuda"] * cuda)
    script.check_args(args)
    expected = dataclasses.asdict(script.Args()) | preset | dict(env_id=env_id, seed=7, gamma=0.5, cuda=cuda)
    assert dataclasses.asdict(args) == expected


@ALL
def test_other_spellings(script):
    """`--env-id=X` and `--env_id X` choose the preset, too."""
    expected = script.parse_args(["--env-id", "SparsePointRobot"])
    assert script.parse_args(["--env-id=SparsePointRobot"]) == script.parse_args(["--env_id", "SparsePointRobot"])
    assert script.parse_args(["--env-id=SparsePointRobot"]) == expected and expected.horizon == 100


# ---------- What a run leaves, evaluation ----------


def test_what_a_run_leaves(trained):
    """Every promised file, with the promised keys; returns in them agree with each other."""
    script, folder = trained
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.csv", "checkpoint.pt", "checkpoint.pt.previous", "eval.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert 2 <= sum(name.startswith("belief_") and name.endswith(".png") for name in names) <= 3
    assert ("components.png" in names) == (script is dme)
    assert all((folder / name).stat().st_size > 5000 for name in names if name.endswith(".png"))
    config = json.loads((folder / "config.json").read_text())
    assert config["script"] == script.__name__ and config["hidden_dim"] == 8
    assert config["versions"]["torch"] == version("torch")
    result = json.loads((folder / "eval.json").read_text())
    tasks = result["tasks"]["test"]
    assert len(tasks) == 21 and list(result["tasks"]) == ["test"] and result["global_step"] == 160
    for k in range(2):
        mean = np.mean([task["return"][k] for task in tasks.values()])
        assert result[f"eval/test/return_episode_{k + 1}"] == pytest.approx(mean)
    assert result["eval/test/success_rate"] == np.mean([task["success"][-1] for task in tasks.values()])
    rows = {(int(step), key): float(value) for step, key, value in metrics(folder)[1:]}
    assert len(rows) == len(metrics(folder)) - 1  # no row is doubled
    assert {step for step, _ in rows} == {40, 80, 120, 160}
    assert {step for step, key in rows if key == "eval/test/return_episode_2"} == {80, 160}
    assert rows[160, "eval/test/return"] == result["eval/test/return"]
    for key in ("charts/episodic_return", "charts/return_episode_1", "losses/policy", "losses/belief_reward"):
        assert (160, key) in rows
    assert all(math.isfinite(value) for value in rows.values())


def test_evaluation_in_a_new_process(trained):
    """--evaluate, from another working directory, gives exactly the numbers written at the end of training."""
    script, folder = trained
    copy = folder.with_name("evaluated")
    copy.mkdir()
    shutil.copy(folder / "checkpoint.pt", copy)
    argv = [sys.executable, script.__file__, "--evaluate", copy.name + "/checkpoint.pt"]
    done = subprocess.run(argv, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((copy / "eval.json").read_text()) == json.loads((folder / "eval.json").read_text())
    printed = dict(line.split() for line in done.stdout.splitlines())
    assert printed["eval/test/return"] == f"{json.loads((copy / 'eval.json').read_text())['eval/test/return']:.4f}"
    assert same(*(torch.load(d / "checkpoint.pt") for d in (folder, copy))) == []


@SCRIPTS
@pytest.mark.parametrize("sizes", [["--num-envs", "5"], ["--num-envs", "25"], ["--eval-tasks", "6"]])
def test_evaluation_covers_each_task_once(script, sizes, tmp_path, monkeypatch):
    """However many environments there are, and whatever is left over: each name once, or the first few."""
    named, reset = [], GridWorld.reset
    monkeypatch.setattr(GridWorld, "reset", lambda self, tasks=None: named.append(tasks) or reset(self, tasks))
    monkeypatch.setattr(script, "draw_pictures", lambda *_: None)
    words = ["--total-timesteps", "1", "--buffer-size", "25", *sizes]
    run(script, tmp_path, *words, eval_interval=0)
    tasks = json.loads((tmp_path / "eval.json").read_text())["tasks"]["test"]
    assert list(tasks) == make_envs("GridWorld", 1).tasks[: 6 if "--eval-tasks" in sizes else 21]
    rounds = [names for names in named if names]
    assert set(sum(rounds, [])) == set(tasks) and sum(map(len, rounds)) < len(tasks) + len(rounds)


@ALL
def test_evaluation_does_not_touch_training(script, tmp_path):
    """With and without evaluations: the same weights, bit for bit; and dropout is on again after one."""
    extra = ["--reward-decoder", "mlp", "--decoder-dropout", "0.3", "--eval-tasks", "4"]
    states = [run(script, tmp_path / str(k), *extra, eval_interval=k) for k in (-1, 1)]
    different = [p for p in same(*states) if not p.startswith(("/args/", "/metrics_bytes"))]
    assert different == []


@ALL
@pytest.mark.parametrize("context", ["--no-belief", "--oracle-context"])
def test_floor_and_ceiling(script, context, tmp_path, monkeypatch):
    """The policy gets zeros, or the true task, at every step; no belief is trained."""
    made, rollout = [], script.rollout
    monkeypatch.setattr(script, "rollout", lambda *a, **b: made.append(rollout(*a, **b)) or made[-1])
    end = run(script, tmp_path, context, eval_interval=0)
    for data in made:
        truth = data["contexts"] if script is dynamite_rl else data["task"]  # the last belief is nobody's
        belief = truth if context == "--oracle-context" else torch.zeros(len(data["task"]), 1)
        assert torch.equal(data["beliefs"][:-1], belief.expand_as(data["beliefs"][:-1]))
    assert len(made) > 4 and not end["processes"][0]["buffer"]["store"] and not end["belief_optimizer"]["state"]


@SCRIPTS
def test_warmup_of_the_belief(script, tmp_path, monkeypatch):
    """--belief-warmup: zeros for the policy for that many steps, while the belief model learns."""
    made, rollout = [], script.rollout
    monkeypatch.setattr(script, "rollout", lambda *a, **b: made.append(rollout(*a, **b)) or made[-1])
    end = run(script, tmp_path, "--belief-warmup", "80")
    assert [bool(data["beliefs"].any()) for data in made] == [False, False, True, True]
    assert end["processes"][0]["buffer"]["full"] == 10 and {key for _, key, _ in metrics(tmp_path)} > {
        "losses/belief_reward"
    }


# ---------- The same again: seeds, resume, signals ----------


@ALL
def test_seeds(script, tmp_path):
    """The same command twice: weights, buffer and metrics bitwise equal. Another seed: another run."""
    states = [run(script, tmp_path / str(k), "--seed", str(seed)) for k, seed in enumerate((0, 0, 1))]
    assert set(same(*states[:2])) <= {"/args/run_dir", "/metrics_bytes"}  # the clock's numbers have a length
    assert metrics(tmp_path / "0") == metrics(tmp_path / "1")
    different = same(states[0], states[2])
    assert metrics(tmp_path / "0") != metrics(tmp_path / "2")
    for name, tensor in states[0]["agent"].items():
        if (
            tensor.is_floating_point()
            and tensor.numel() > 1
            and not name.startswith(("first_norm", "encoder.obs_norm"))
        ):
            assert f"/agent/{name}" in different


def resume_equals_straight(script, folder, *words):
    """Four iterations straight equal two, saved, and two more: bit for bit, and no row of metrics lost or doubled."""
    straight, resumed = folder / "straight", folder / "resumed"
    end = run(script, straight, *words)
    resumed.mkdir()
    shutil.copy(straight / "checkpoint.pt.previous", resumed / "checkpoint.pt")
    shutil.copy(straight / "metrics.csv", resumed)  # with rows of the two iterations to come
    assert torch.load(resumed / "checkpoint.pt")["iteration"] == 2
    torch.manual_seed(123)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "LOG_EVERY", 1)
        script.main(script.parse_args(["--resume", str(resumed / "checkpoint.pt")]))
    again = torch.load(resumed / "checkpoint.pt")
    assert set(same(end, again)) <= {"/args/run_dir", "/args/resume", "/metrics_bytes"}
    assert metrics(straight) == metrics(resumed) and len(metrics(straight)) > 30
    assert end["iteration"] == again["iteration"] == 4 and end["processes"][0]["buffer"]["full"] > 4


@SCRIPTS
@pytest.mark.parametrize("env_id", HARD)
def test_resume(script, env_id, tmp_path):
    """Of both back ends, with all that draws random numbers or keeps a state."""
    words = ["--env-id", env_id, *HARD[env_id], *(HARD_DME if script is dme else [])]
    resume_equals_straight(script, tmp_path, *words)


@ALL
def test_resume_of_a_finished_run(script, tmp_path, monkeypatch, capsys):
    """There is nothing left to do: status 0 and no traceback, weights and metrics as they were."""
    end, rows = run(script, tmp_path, eval_interval=0), metrics(tmp_path)
    status, _ = command(script, monkeypatch, capsys, "--resume", tmp_path / "checkpoint.pt")
    assert status == 0
    assert same(end, torch.load(tmp_path / "checkpoint.pt")) == [] and metrics(tmp_path) == rows


@ALL
def test_resume_into_another_folder(script, tmp_path):
    """--run-dir beside --resume: the run goes on there, and the old folder stays as it is."""
    run(script, tmp_path / "old")
    before = (tmp_path / "old" / "checkpoint.pt").read_bytes()
    words = ["--resume", str(tmp_path / "old" / "checkpoint.pt"), "--run-dir", str(tmp_path / "new")]
    script.main(script.parse_args([*words, "--total-timesteps", "200"]))
    assert torch.load(tmp_path / "new" / "checkpoint.pt")["global_step"] == 200
    assert (tmp_path / "old" / "checkpoint.pt").read_bytes() == before


def test_resume_says_cuda_again(trained, monkeypatch, tmp_path):
    """The flag of the first command may stand beside --resume or --evaluate of what it made."""
    script, folder = trained
    state = torch.load(folder / "checkpoint.pt")
    state["args"]["cuda"] = True
    torch.save(state, tmp_path / "cuda.pt")
    assert script.parse_args(["--evaluate", str(tmp_path / "cuda.pt"), "--cuda"]).cuda


FROM = pytest.mark.parametrize("flag", ["--resume", "--evaluate"])


@FROM
@pytest.mark.parametrize("damage", [lambda good: good[:3000], lambda good: good[:-100], lambda _: b"", lambda _: b"no"])
def test_unreadable_checkpoints(trained, flag, damage, monkeypatch, capsys, tmp_path):
    """Truncated, empty or foreign: one line, status 2."""
    script, folder = trained
    (tmp_path / "bad.pt").write_bytes(damage((folder / "checkpoint.pt").read_bytes()))
    status, lines = command(script, monkeypatch, capsys, flag, tmp_path / "bad.pt")
    assert status == 2 and len(lines) == 1 and "not a readable checkpoint" in lines[0]


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
        (lambda state: state | dict(model=state["model"] | dict(surplus=torch.zeros(1))), "surplus"),
    ],
)
def test_foreign_checkpoints(trained, flag, change, named, monkeypatch, capsys, tmp_path):
    """Of another program, with code, with entries missing or to spare: one line that names them, status 2."""
    script, folder = trained
    torch.save(change(torch.load(folder / "checkpoint.pt")), tmp_path / "bad.pt")
    status, lines = command(script, monkeypatch, capsys, flag, tmp_path / "bad.pt")
    assert status == 2 and len(lines) == 1 and named in lines[0], lines


@pytest.mark.parametrize(
    "words, named",
    [
        ("--hidden-dim 9", "model"),
        ("--latent-dim 4", "agent"),
        ("--buffer-size 5", "--buffer-size"),
        ("--horizon 6", "--horizon"),
        ("--env-id SparsePointRobot --reward-decoder mlp", "--env-id"),
        ("--evaluate other.pt", "--evaluate"),
    ],
)
def test_resume_with_other_sizes(trained, words, named, monkeypatch, capsys, tmp_path):
    """Arguments that the saved state does not fit: one line that names what, status 2, and nothing is started."""
    script, folder = trained
    (tmp_path / "run").mkdir()
    path = shutil.copy(folder / "checkpoint.pt", tmp_path / "run")
    argv = ["--resume", path, "--total-timesteps", "800", *words.split()]
    status, lines = command(script, monkeypatch, capsys, *argv)
    assert status == 2 and len(lines) == 1 and named in lines[0], lines
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]


@ALL
def test_a_signal_ends_the_run_saved(script, tmp_path, monkeypatch):
    """SIGTERM in the second rollout: that iteration is finished and saved, and the run returns."""
    made, rollout = [], script.rollout

    def interrupted(*a, **b):
        made.append(rollout(*a, **b))
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return made[-1]

    monkeypatch.setattr(script, "rollout", interrupted)
    assert run(script, tmp_path, "--checkpoint-interval", "0")["iteration"] == 2


@SCRIPTS
def test_smallest_sizes(script, tmp_path):
    """Everything that may be 1 is 1, in a run with pictures."""
    ones = "--num-envs 1 --horizon 1 --episodes-per-task 1 --num-minibatches 1 --total-timesteps 3 --latent-dim 1 "
    ones += "--hidden-dim 1 --obs-embed 1 --belief-embed 1 --state-embed 1 --reward-embed 1 --policy-layers 1 "
    ones += "--decoder-layers 1 --belief-batch 1 --buffer-size 1 --elbo-terms 1 --eval-tasks 1"
    ones += " --num-components 1 --component-layers 1" if script is dme else ""
    assert run(script, tmp_path, *ones.split(), eval_interval=0)["iteration"] == 3
    assert all(math.isfinite(float(value)) for _, _, value in metrics(tmp_path)[1:])


# ---------- House style ----------


@EVERY
def test_import_starts_nothing(script, tmp_path, monkeypatch, capfd):
    """No output, no file, no thread, no random number."""
    monkeypatch.chdir(tmp_path)
    before, threads = torch.get_rng_state(), threading.active_count()
    runpy.run_path(script.__file__, run_name=script.__name__)
    assert torch.equal(before, torch.get_rng_state()) and threading.active_count() == threads
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


@ALL
def test_from_another_directory(script, tmp_path):
    """The script runs from where it does not live, and leaves runs/ there."""
    argv = [sys.executable, script.__file__, *tiny(script, "--eval-interval", "-1", "--total-timesteps", "40")]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"{script.Args.env_id}__{script.__name__}__1__")
    assert (folder / "checkpoint.pt").exists() and f"runs/{folder.name}" in done.stdout


@EVERY
def test_every_argument_is_documented_and_used(script):
    """A comment beside or above each field of Args, and `args.<field>` somewhere in the code."""
    source = Path(script.__file__).read_text()
    lines = source.splitlines()
    tree = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "Args")
    for field in tree.body:
        name = field.target.id
        above = lines[field.lineno - 2].strip()
        assert re.search(r"  # \S", lines[field.lineno - 1]) or re.match(r"# .{20}", above), name
        assert re.search(rf"\bargs\.{name}\b", source), name


EXCEPTIONS = {}  # script -> definitions that differ from those of one name in varibad.py, and why
EXCEPTIONS[dme] = {
    "Args": "DME's own arguments; it decodes the future (4) and has three KL terms in place of one",
    "PRESETS": "its hyper-parameters",
    "META_WORLD": "no weight of variBAD's KL",
    "LOCOMOTION": "no weight of variBAD's KL; a range of virtual rewards",
    "SMALL_ML": "no decoder dropout, which the preset of its peer has for virtual tasks",
    "check_args": "DME's own arguments",
    "BeliefModel": "the hierarchical mixture (1), (2)",
    "elbo": "(7) to (10)",
    "update_belief": "virtual batches (11)",
    "normalise_rewards": "virtual rewards do not move the scale (11)",
    "rollout": "virtual rewards (11) and Algorithm 1's initial belief",
    "draw_pictures": "the mixture's picture, too",
    "train": "virtual iterations and their rising rate",
}
EXCEPTIONS[ldm] = {
    "Args": "LDM's own arguments; A2C; the defaults are its grid's",
    "PRESETS": "its hyper-parameters",
    "LOCOMOTION": "its hyper-parameters",
    "SMALL": "no presets for small machines",
    "check_args": "its own arguments; minibatches are whole windows; the policy needs no warm-up",
    "Agent": "the policy's own recurrent encoder; no embeddings (3.1)",
    "BeliefModel": "encoder-v, of one kind with the policy's (3.2)",
    "Decoder": "dropout's masks may differ from pair to pair",
    "reconstruction": "the Bernoulli decoder of (m, s')",
    "ppo_update": "through time (3.1)",
    "rollout": "the policy's encoder, imaginary rewards (3.3)",
    "draw_pictures": "the policy's belief is not the decoder's",
    "train": "roles, A2C, what the buffer takes",
    "main": "its oracles train on all tasks",
}
EXCEPTIONS[dynamite_rl] = {
    "Args": "its own arguments; the defaults are its grid's",
    "PRESETS": "its hyper-parameters",
    "SESSIONS": "its hyper-parameters",
    "SMALL": "its environments alone",
    "SMALL_SESSIONS": "its weight of the KL",
    "check_args": "its own arguments",
    "Agent": "no embeddings, ReLU (appendix E); actor and critic may be clipped apart",
    "Encoder": "an MLP before the GRU (appendix E), conditioning",
    "BeliefModel": "heads of session ends, p(m' | m), Algorithm 3's next session",
    "elbo": "(4) to (6)",
    "ppo_update": "actor and critic clipped apart; the clipped value loss without Huber's",
    "Buffer": "session ends, too",
    "rollout": "Algorithm 3",
    "evaluate": "session ends and returns of sessions",
    "draw_pictures": "session ends",
    "train": "the oracle's context, returns of sessions",
}
EXCEPTIONS[laser] = {
    "Args": "its own arguments; the defaults are MEWA's",
    "PARTS": "two policies, encoder, heads and target",
    "PRESETS": "its hyper-parameters",
    "YOUR_OWN": "its hyper-parameters",
    "SMALL": "its environments alone",
    "check_args": "its own arguments; one process",
    "parse_args": "sizes of an explored run's encoder",
    "Agent": "features of Gamma_t or of the context (D.2); the layer that PFO holds",
    "Encoder": "transformers (3.4)",
    "ppo_update": "the meta-reward (14), PFO, idle steps left out",
    "Buffer": "all meta-episodes of a task side by side, in bytes",
    "evaluate": "Algorithm 2",
    "make_eval_envs": "environments of exploration and of exploitation",
    "make_args_envs": "another number of episodes",
    "draw_pictures": "Figure 9, and the curves",
    "capture_video": "the task policy after exploration",
    "main": "environments of both phases",
    "train": "Algorithm 1",
}
LEFT_OUT = {  # what a script does without
    dme: {"SESSIONS", "SMALL_SESSIONS"},  # no presets of environments with sessions
    ldm: {  # nor of Meta-World; nothing waits for the belief
        *("META_WORLD", "SMALL_ML", "is_blind", "SESSIONS", "SMALL_SESSIONS"),
    },
    dynamite_rl: {"META_WORLD", "SMALL_ML", "LOCOMOTION"},  # no presets of environments without sessions
    laser: {  # no belief model of variBAD's kind, and no presets but its own
        *("META_WORLD", "SMALL_ML", "LOCOMOTION", "SESSIONS", "SMALL_SESSIONS", "is_blind", "Decoder"),
        *("MultiHeadDecoder", "BeliefModel"),
        *("kl_gaussians", "window", "reconstruction", "multihead_loss", "elbo", "real_posteriors", "average"),
        *("draw_posteriors", "update_belief", "rollout", "ranks", "leads", "share"),  # one process
    },
}


def definitions(script):
    found = {}
    for node in ast.parse(Path(script.__file__).read_text()).body:
        for name in [node.name] if hasattr(node, "name") else [t.id for t in getattr(node, "targets", [])]:
            found[name] = ast.unparse(node)
    return found


@pytest.mark.parametrize("script", EXCEPTIONS, ids=lambda module: module.__name__)
def test_shared_definitions_are_identical(script):
    """What has one name in both scripts has one body, unless it is the paper's; and the exceptions do differ."""
    ours, theirs = definitions(varibad), definitions(script)
    different = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert different == EXCEPTIONS[script].keys()
    assert ours.keys() - theirs.keys() == LEFT_OUT[script]
