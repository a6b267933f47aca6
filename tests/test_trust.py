"""Runs that can be trusted: saving under fire, NaNs, arguments at random, several processes, compiled, on no device."""

import contextlib
import csv
import dataclasses
import functools
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

import common.processes
import common.run
import dme
import dynamite_rl
import ldm
import varibad
from common import files
from common.arguments import check_bounds
from common.envs import BadInput, make_envs
from common.processes import descend
from tests import test_dynamite, test_ldm
from tests.test_belief import SCRIPTS, orders, random_batch, setup, signals  # noqa: F401
from tests.test_scripts import (
    ALL,
    HARD,
    OF_THE_CALL,
    ROOT,
    TINY,
    command,
    main,
    metrics,
    parse,
    python,
    run,
    same,
    tiny,
)

STEADY = ["--ent-coef-end", "0.04"]  # nothing that depends on the run's length


# ---------- Saving ----------


def save_twice(path, number, last_line=0):
    """In a child: saves `number`, then the next one, in which it is killed before the line of Python that is to come as
    the `last_line`-th. Returns how many lines there were, 0 where it was killed."""
    end, other = os.pipe()
    child = os.fork()
    if child == 0:
        lines = 0

        def count(frame, event, value):
            nonlocal lines
            lines += event == "line"
            if lines == last_line and event == "line":
                os.kill(os.getpid(), signal.SIGKILL)
            return count

        try:
            for k in (number, number + 1):
                sys.settrace(count if k > number else None)
                files.save_checkpoint(path, dict(number=k, data=torch.full((20_000,), float(k))))
            sys.settrace(None)
            os.write(other, str(lines).encode())
        finally:
            os._exit(0)
    os.close(other)
    with open(end, "rb") as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == (0 if said else signal.SIGKILL)
    return int(said or 0)


def test_kill_while_saving(tmp_path):
    """SIGKILL at random moments of a save, and at its last ones: the checkpoint before it is there, whole, and so is
    the one before that."""
    path, killed = tmp_path / "checkpoint.pt", 0
    lines = save_twice(path, 0)
    assert lines > 50
    for k, last_line in enumerate([*random.sample(range(1, lines - 9), 30), *range(lines - 9, lines + 1)]):
        number = 2 * k + 2
        ended = save_twice(path, number, last_line)  # where a kill left something behind, there may be fewer lines
        assert not 0 < last_line <= ended
        killed += not ended
        latest = {number + 1} if ended else {number}
        for file, allowed in (("checkpoint.pt", latest), ("checkpoint.pt.previous", {number - 2, number - 1, number})):
            state = torch.load(tmp_path / file, weights_only=True)
            assert state["number"] in allowed and state["data"].eq(state["number"]).all(), (file, last_line)
    assert killed > 30


def test_a_save_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    """So that after a power failure, too, there is a whole one under the name; and the one before it under its own."""
    path, done = tmp_path / "checkpoint.pt", []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        file = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append(("fsync", Path(file).name, torch.load(file)["number"]))
        fsync(descriptor)

    def replaced(old, new):
        done.append(("replace", Path(new).name, torch.load(old)["number"]))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    for number in (1, 2):
        files.save_checkpoint(path, dict(number=number))
    assert done[:2] == [("fsync", "checkpoint.pt.tmp", 1), ("replace", "checkpoint.pt", 1)]
    assert done[2:4] == [("fsync", "checkpoint.pt.tmp", 2), ("replace", "checkpoint.pt.previous", 1)]
    assert done[4:] == [("replace", "checkpoint.pt", 2)]
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.pt", "checkpoint.pt.previous"}


def test_a_save_that_fails(tmp_path, monkeypatch, capsys):
    """A full disk (here: a limit to the size of files) in the middle: a sentence, the last good one stays, and on."""
    save, limits = common.run.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def short_of_space(path, state):
        full = state["iteration"] in (2, 3)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if full else limits[0], limits[1]))
        try:
            save(path, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert torch.load(path)["iteration"] == (1 if full else state["iteration"])
            assert not path.with_name("checkpoint.pt.tmp").exists()

    monkeypatch.setattr(common.run, "save_checkpoint", short_of_space)
    end = run(varibad, tmp_path, "--checkpoint-interval", "1")
    out = "".join(capsys.readouterr())
    assert end["iteration"] == 4 and out.count("checkpoint not saved at step") == 2 and "step 80: " in out


def test_too_little_disk(tmp_path, monkeypatch, capsys):
    """Found at the start: one line that says how much is missing, status 2. There is to be room for three checkpoints,
    of which those that are there take none."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    assert files.missing_space(tmp_path, 300_000) == 0 and files.missing_space(tmp_path, 400_000) == 200_000
    (tmp_path / "checkpoint.pt.previous").write_bytes(bytes(150_000))
    assert files.missing_space(tmp_path, 400_000) == 50_000
    argv = tiny(varibad, "--buffer-size", "10000", "--total-timesteps", "400000", "--run-dir", tmp_path / "run")
    status, lines = command(varibad, monkeypatch, capsys, *argv)
    assert status == 2 and len(lines) == 1 and "--run-dir or a smaller --buffer-size" in lines[0]
    row = 10 * (2 * 2 * 4 + 8 + 4 + 1)  # a step: two states of two numbers, an action, a reward, alive
    assert f"lacks {(3 * 10_000 * row - 1_000_000) / 1e6:.0f} MB for its checkpoints" in lines[0]


def test_a_full_disk(tmp_path):
    """No file may grow beyond 5 kB: metrics, checkpoints and pictures say so, and the run reaches its end: which is not
    that of a good one, as there is no checkpoint."""
    words = [*TINY, "--total-timesteps", "400", "--eval-interval", "5", "--checkpoint-interval", "5"]
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import common.run, varibad
from common.arguments import parse_args
common.run.LOG_EVERY = 1
args = parse_args(varibad.Args, varibad.PRESETS, varibad.SMALL, {words})
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
varibad.main(args)
"""
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "the checkpoint of step 400 was not saved: there is none" in done.stderr.splitlines()[-1]
    for what in ("checkpoint", "metrics", "evaluation", "pictures"):
        assert f"{what} not saved at step 400: " in done.stdout + done.stderr, what


def test_metrics_that_were_lost(tmp_path):
    """A file that is shorter than it was at the checkpoint is gone on with where it ends, without a gap."""
    (tmp_path / "metrics.csv").write_bytes(b"global_step,key,value\r\n40,a,1.0\r\n")
    written = files.Metrics(tmp_path, varibad.Args(), size=1000, step=80, wandb_id=None)
    written.write({"a": 2.0}, 120)
    written.close()
    assert (tmp_path / "metrics.csv").read_bytes() == b"global_step,key,value\r\n40,a,1.0\r\n120,a,2.0\r\n"


def test_an_unwritable_folder(tmp_path, monkeypatch, capsys):
    """One line, status 2, before any training."""
    (tmp_path / "file").write_text("in the way")
    status, lines = command(varibad, monkeypatch, capsys, *tiny(varibad, "--run-dir", tmp_path / "file" / "run"))
    assert status == 2 and len(lines) == 1 and "cannot write" in lines[0] and "file" in lines[0]


# ---------- Finite numbers ----------


EVERYWHERE = ["observation", "reward", "policy loss", "belief loss", "belief gradient norm"]
SPOILT = [(varibad, where, bad) for where in EVERYWHERE for bad in (math.nan, math.inf)]
SPOILT += [(script, EVERYWHERE[k], bad) for script in (dme, ldm, dynamite_rl) for k, bad in enumerate([math.nan] * 4)]


@pytest.mark.parametrize("script, where, bad", SPOILT, ids=lambda x: getattr(x, "__name__", str(x)))
def test_not_finite(script, where, bad, tmp_path, monkeypatch):
    """One NaN or infinity in iteration 3: the run stops before the next step and names both; the disk has 2's."""
    made, rollout, elbo = [], script.rollout, script.elbo

    def spoilt(envs, agent, model, *a, **b):
        data = rollout(envs, agent, model, *a, **b)
        made.append({k: v.clone() for k, v in agent.state_dict().items()})
        if len(made) == 3 and where == "observation":
            data["next_obs"][2, 1] = bad
        if len(made) == 3 and where == "reward":
            data["rewards"][4, 0] = bad
        if len(made) == 3 and where == "policy loss":
            with torch.no_grad():
                agent.critic[-1].bias += bad
        return data

    def spoilt_elbo(*a):
        loss, terms = elbo(*a)
        if len(made) == 3 and where == "belief loss":
            loss = loss * bad
        if len(made) == 3 and where == "belief gradient norm":  # d/dx sqrt(x) at 0
            weight = a[0].heads.weight
            loss = loss + ((weight - weight.detach()).sum() ** 2).sqrt() * bad
        return loss, terms

    monkeypatch.setattr(script, "rollout", spoilt)
    monkeypatch.setattr(script, "elbo", spoilt_elbo)
    said = r"iteration 3: .*(" + where.split()[0] + ").* not finite; the last checkpoint stands"
    with pytest.raises(FloatingPointError, match=said):
        run(script, tmp_path, "--checkpoint-interval", "1")
    saved = torch.load(tmp_path / "checkpoint.pt")
    assert saved["iteration"] == 2 and same(saved["agent"], made[2]) == []


@pytest.mark.parametrize("words", ["--learning-rate 1e38", "--belief-learning-rate 3e38"])
def test_weights_on_disk_are_finite(words, tmp_path):
    """Where the last step of an iteration breaks the weights, nothing is saved."""
    with pytest.raises(FloatingPointError, match="iteration 2: weights of the .* not finite"):
        words += " --update-epochs 1 --num-minibatches 1 --belief-updates 1 --checkpoint-interval 1 --max-grad-norm 0"
        run(varibad, tmp_path, *words.split(), "--precollect", "50")
    assert torch.load(tmp_path / "checkpoint.pt")["iteration"] == 1


def test_nothing_moves_where_the_gradient_is_not_finite():
    """`descend` raises before the step: parameters and the optimiser's state are as they were."""
    layer = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(layer.parameters())
    descend(optimizer, layer(torch.ones(3)).sum(), [layer], 0.0, "good")
    before = [p.clone() for p in layer.parameters()], str(optimizer.state_dict())
    with pytest.raises(FloatingPointError, match="bad loss is not finite"):
        descend(optimizer, (layer(torch.ones(3)) / 0).sum(), [layer], 1.0, "bad")
    with pytest.raises(FloatingPointError, match="bad gradient norm is not finite"):
        x = layer.weight.sum()
        descend(optimizer, (x - x.detach()).sqrt(), [layer], 1.0, "bad")
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), before[0]))
    assert str(optimizer.state_dict()) == before[1]


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A function that writes a module of the user's own, where the command is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield lambda name, code: (tmp_path / f"{name}.py").write_text(code)
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_the_command_says_so(own_module, monkeypatch, capsys):
    """An environment that gives a NaN: one line, status 1, no traceback."""
    own_module(
        "spoilt",
        "from common.envs.gridworld import GridWorld\n"
        "class Bad(GridWorld):\n"
        "    def move(self, action):\n"
        "        obs, reward, success = super().move(action)\n"
        "        return obs, reward / (self.resets < 2), success\n",
    )
    words = "--env-id spoilt:Bad --eval-interval -1 --reward-decoder multihead --tbptt 0".split()
    status, lines = command(varibad, monkeypatch, capsys, *TINY, *words)
    assert status == 1 and not any("Traceback" in line for line in lines)
    assert lines[-1] == "varibad.py: iteration 2: reward is not finite; the last checkpoint stands"


def children():
    """Processes that this one has started and that have not ended."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found.add(int(path.parent.name))
    return found


@pytest.mark.parametrize("fault, says", [("1 / 0", "ZeroDivisionError"), ("os.kill(os.getpid(), 9)", "SIGKILL")])
def test_a_worker_that_fails(fault, says, own_module, monkeypatch, capsys, tmp_path):
    """In the third iteration: status 1, the environment and its family by name, no process left, checkpoint intact."""
    own_module(
        "walking",
        "import os\nimport gymnasium, numpy as np\nfrom common.envs.workers import WorkerVectorEnv\n"
        "class Walk(gymnasium.Env):\n"
        "    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float64)\n"
        "    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)\n"
        "    meta_episodes = 0\n"
        "    def set_task(self, data):\n"
        "        self.meta_episodes += 1\n"
        "    def reset(self, seed=None, options=None):\n"
        "        return np.zeros(2), {}\n"
        "    def step(self, action):\n"
        "        if self.meta_episodes == 3:\n"
        f"            {fault}\n"
        "        return np.ones(2), 1.0, False, False, {}\n"
        "def make(num_envs, split, seed, device, horizon=5, episodes_per_task=2):\n"
        "    tasks = [('walker', k, None) for k in range(3)]\n"
        "    sizes = horizon, episodes_per_task\n"
        "    return WorkerVectorEnv({'walker': Walk}, tasks, num_envs, split, seed, device, *sizes)\n",
    )
    before = children()
    words = "--env-id walking:make --eval-interval -1 --run-dir run --checkpoint-interval 1 --tbptt 0".split()
    status, lines = command(varibad, monkeypatch, capsys, *TINY, *words)
    assert status == 1 and re.search(rf"varibad.py: environments? [0-3, ]+\(walker\): .*{says}", lines[-1]), lines
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["iteration"] == 2
    assert children() <= before


# ---------- Arguments at random ----------


FIXED = {"env_id", "cuda", "track", "compile", "capture_video", "run_dir", "resume", "evaluate", "total_timesteps"}
FIXED |= {"eval_interval"}
SMALL_INTS = {"horizon", "episodes_per_task", "update_epochs", "belief_updates"}  # what costs time in proportion


def kinds(script, other=None):
    """Type of each argument, without bounds, of those that `other` has not."""
    names = {field.name for field in dataclasses.fields(script.Args)} - FIXED
    names -= {field.name for field in dataclasses.fields(other.Args)} if other else set()
    return {name: hint for name, hint in get_type_hints(script.Args).items() if name in names}


@functools.cache
def usual(script, *words):
    """The arguments of a tiny run; to parse them takes longer than to run it."""
    return parse(script, *words, "--eval-interval", "-1")


def one_iteration_or_one_sentence(script, args, folder, **changes):
    """With these changes, one iteration runs to its end, or one sentence says what is wrong."""
    args = dataclasses.replace(args, run_dir=str(folder / "run"), total_timesteps=1, **changes)
    try:
        check_bounds(args)
        script.main(args)
    except BadInput as error:
        assert "\n" not in str(error) and len(str(error)) > 20
    except FloatingPointError as error:  # a number that is legal and much too large
        assert "not finite" in str(error)
    shutil.rmtree(args.run_dir, ignore_errors=True)


@ALL
def test_each_argument_at_its_edges(script, tmp_path):
    """0, 1, nothing and too much, one argument at a time: all of varibad.py's, and those that others have beside."""
    edges = {bool: (True, False), int: (0, 1), float: (0.0, 1.0, 1e30, math.nan), tuple[int, ...]: ((), (1,))}
    tried = kinds(script, None if script is varibad else varibad)
    assert len(tried) > 5
    for name, kind in tried.items():
        for value in edges.get(kind) or get_args(kind):
            one_iteration_or_one_sentence(script, usual(script, *tiny(script)), tmp_path, **{name: value})


NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 3, 5, 7, 10, 40, 0.5, 0.999, 1.5, math.inf, -math.inf, math.nan, 1e-300, 1e30]),
    st.integers(-3, 50),
    st.floats(0, 2),
)


def draw_value(data, name, kind):
    """A value for one argument, of its type."""
    if kind is bool:
        return data.draw(st.booleans(), name)
    if kind is int:
        most = 8 if name in SMALL_INTS else 50
        return int(data.draw(NUMBERS.filter(lambda x: math.isfinite(x) and x <= most), name))
    if kind is float:
        return float(data.draw(NUMBERS, name))
    if get_origin(kind) is tuple:
        return tuple(data.draw(st.lists(st.integers(-1, 9), max_size=3), name))
    return data.draw(st.sampled_from(get_args(kind)), name)


@ALL
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_arguments_at_random(script, data, tmp_path_factory):
    """Whatever values a few arguments get: one iteration runs to its end, or one sentence says what is wrong."""
    env_id = data.draw(st.sampled_from(["GridWorld", "SparsePointRobot"]), "env_id")
    known = kinds(script)
    names = data.draw(st.lists(st.sampled_from([*known]), min_size=1, max_size=4, unique=True), "names")
    changes = {name: draw_value(data, name, known[name]) for name in names}
    args = usual(script, *TINY, "--env-id", env_id, "--tbptt", "0")
    one_iteration_or_one_sentence(script, args, tmp_path_factory.mktemp("run"), **changes)


def test_track(tmp_path, monkeypatch):
    """--track: Weights & Biases gets the rows of metrics.csv, with global_step as the axis."""
    rows, said = [], []
    fake = types.SimpleNamespace(id="a1", log=rows.append, finish=lambda: said.append("finish"))
    fake.define_metric = lambda *a, **b: said.append((a, b))
    module = types.SimpleNamespace(init=lambda **kwargs: said.append(kwargs) or fake)
    monkeypatch.setitem(sys.modules, "wandb", module)
    run(varibad, tmp_path, "--track", eval_interval=2)
    assert said[0]["config"]["env_id"] == "GridWorld" and said[0]["dir"] == tmp_path and said[-1] == "finish"
    assert said[1] == (("*",), dict(step_metric="global_step"))
    logged = [
        (str(row["global_step"]), key, repr(float(row[key]))) for row in rows for key in row if key != "global_step"
    ]
    assert logged == [tuple(row) for row in csv.reader(open(tmp_path / "metrics.csv"))][1:]


# ---------- Several processes ----------


def gradients_of(script, s, data, batch):
    """Gradients of one step of PPO or A2C and of one ELBO, for this process's data; they come out of `descend`."""
    found = []

    class Recorder:
        def __init__(self, module):
            self.param_groups = [dict(params=list(module.parameters()))]
            self.zero_grad = module.zero_grad
            self.module = module

        def step(self):
            found.append({n: p.grad.clone() for n, p in self.module.named_parameters() if p.grad is not None})

    s.agent.obs_norm.update(data["obs"].flatten(0, 1), data["alive"].flatten())
    update = script.a2c_update if getattr(s.args, "rl", "ppo") == "a2c" else script.ppo_update
    T, N = data["alive"].shape
    data["orders"] = [torch.arange(2 * N if script is ldm else T * N)]
    update(s.agent, Recorder(s.agent), data, 0.01, s.args)
    buffer = types.SimpleNamespace(sample=lambda n: dict(batch))
    script.update_belief(s.model, Recorder(s.model), buffer, *[0.0] * (script is dme), s.args)
    return found


def joined(script, env_id):
    """Arguments and networks, an iteration's data of four environments and a batch, with early ends."""
    sizes = dict(num_envs=4, update_epochs=1, belief_batch=4, state_coef=1.0, elbo_terms=0, decoder_dropout=0.0)
    if script is dynamite_rl:
        s = test_dynamite.setup(env_id, **sizes, horizon=4, episodes_per_task=3, session_process="")
    else:
        s = test_ldm.setup(env_id, **sizes, ppo_windows=2) if script is ldm else setup(script, env_id, **sizes)
    torch.manual_seed(5)
    batch, data = random_batch(s, B=4), random_batch(s, B=4)
    T = s.envs.meta_horizon
    data |= dict(logprobs=torch.randn(T, 4) - 1.5, values=torch.randn(T + 1, 4), advantages=torch.randn(T, 4))
    data |= dict(returns=torch.randn(T, 4), beliefs=torch.randn(T + 1, 4, sum(s.agent.belief_sizes.values())))
    data |= dict(read_obs=F.pad(data["next_obs"], (0, 1)), hiddens=torch.randn(2, 4, s.args.hidden_dim))
    batch |= dict(session_end=torch.rand(T, 4) < 0.3)
    batch["session_end"][-1] = True
    return s, data, batch


def one_rank(rank, path, name, env_id):
    """A process of two: one environment, and the other three."""
    torch.set_num_threads(1)
    script = sys.modules[name]
    s, data, batch = joined(script, env_id)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    torch.randn_like = torch.zeros_like  # samples at their mean: the same whoever draws
    part = slice(1) if rank == 0 else slice(1, 4)
    own = [{k: v[:, part] for k, v in x.items()} for x in (data, batch)]
    torch.save([gradients_of(script, s, *own), s.agent.state_dict()], f"{path}/{rank}.pt")
    dist.destroy_process_group()


@ALL
@pytest.mark.parametrize("env_id", ["GridWorld", "SparsePointRobot"])
def test_gradient_of_two_processes(script, env_id, tmp_path, monkeypatch):
    """Gradients, normalisers: two processes with a quarter and the rest of the data, and one with all of it."""
    torch.multiprocessing.start_processes(one_rank, (tmp_path, script.__name__, env_id), 2, start_method="fork")
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    s, data, batch = joined(script, env_id)
    alone = gradients_of(script, s, data, batch)
    assert len(alone) == 2 and all(any(g.abs().max() > 1e-4 for g in grads.values()) for grads in alone)
    for rank in (0, 1):
        together, norms = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(norms, s.agent.state_dict())


def main_of_rank(rank, path, name, words, signalled):
    """A process of two that runs a script from beginning to end, as torchrun would; it keeps what it came to.

    signalled: whether the second one gets a SIGTERM in its second rollout.
    """
    script = sys.modules[name]
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # this process is a fork, and the old lock may have been held
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # not where they meet
    meet = dict(init_method=f"file://{path}/meet", rank=rank, world_size=2)
    dist.init_process_group = functools.partial(dist.init_process_group, **meet)
    seen, rollout = [], script.rollout

    def watched(envs, agent, *a, **b):
        data = rollout(envs, agent, *a, **b)
        if agent.training:
            seen.append({name: data[name].clone() for name in ("task", "actions")})
            if signalled and rank == 1 and len(seen) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return data

    class Watched(common.run.Run):
        def finish(self, *a):
            modules = {part: x.state_dict() for part, x in self.parts.items()}
            torch.save([modules, seen, self.own["buffer"].state_dict()], f"{path}/{rank}.pt")
            super().finish(*a)

    script.rollout, script.Run = watched, Watched
    script.main(parse(script, *words))


def two_processes(script, path, *words, signalled=False):
    """What both processes came to: models and optimisers, tasks and actions of their rollouts, their buffers."""
    arguments = path, script.__name__, [str(word) for word in words], signalled
    torch.multiprocessing.start_processes(main_of_rank, arguments, 2, start_method="fork")
    (path / "meet").unlink(missing_ok=True)
    return [torch.load(path / f"{rank}.pt") for rank in (0, 1)]


@ALL
def test_two_processes(script, tmp_path):
    """They share environments and the buffer, meet other tasks, and come to the same networks, bit for bit."""
    words = tiny(script, "--num-envs", 8, "--total-timesteps", 320, *HARD[script], "--eval-interval", 2)
    words += ["--run-dir", tmp_path / "run"]
    found = two_processes(script, tmp_path, *words)
    assert same(found[0][0], found[1][0]) == []
    assert len(found[0][1]) == len(found[1][1]) == 4
    for one, other in zip(found[0][1], found[1][1]):
        assert len(one["task"]) == len(other["task"]) == 4 and not torch.equal(one["task"], other["task"])
        assert (one["actions"] != other["actions"]).float().mean() > 0.3  # from the same states, at first
    assert [len(buffer["store"]["rewards"]) for *_, buffer in found] == [5, 5]
    state = torch.load(tmp_path / "run" / "checkpoint.pt")
    assert state["global_step"] == 320 and same(state["agent"], found[0][0]["agent"]) == []
    assert (tmp_path / "run" / "eval.json").exists()


def test_a_signal_to_one_of_two(tmp_path):
    """Both processes end after the same iteration, saved."""
    found = two_processes(
        varibad, tmp_path, *TINY, "--eval-interval", -1, "--run-dir", tmp_path / "run", signalled=True
    )
    assert [len(seen) for _, seen, _ in found] == [2, 2]
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["iteration"] == 2


def torchrun(*words):
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", varibad.__file__, *words]
    return subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_torchrun(tmp_path):
    """A signal to torchrun: both processes finish the iteration, one saves and leaves the one set of files. Two more
    iterations from there are the same whenever they are run, and nobody else may go on with it."""
    words = [*TINY, *STEADY, "--eval-interval", "2", "--total-timesteps", "40000000", "--run-dir", tmp_path / "a"]
    long = torchrun(*words)
    while not (tmp_path / "a" / "eval.json").exists():
        assert long.poll() is None, long.communicate()[0]
        time.sleep(0.05)
    long.send_signal(signal.SIGTERM)
    said = long.communicate(timeout=600)[0]
    state = torch.load(tmp_path / "a" / "checkpoint.pt")
    assert state["iteration"] > 1 and state["global_step"] == 40 * state["iteration"] < 40_000_000, said
    assert {path.name for path in tmp_path.iterdir()} == {"a"} and len(state["processes"]) == 2
    with pytest.raises(BadInput, match="saved by 2 processes, and here are 1"):
        main(varibad, "--resume", tmp_path / "a" / "checkpoint.pt")


def test_resume_of_two_processes(tmp_path):
    """Two iterations, saved, and two more: bit for bit as four."""
    two_processes(varibad, tmp_path, *TINY, *STEADY, "--eval-interval", 2, "--run-dir", tmp_path / "a")
    end = torch.load(tmp_path / "a" / "checkpoint.pt")
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "checkpoint.pt.previous", tmp_path / "b" / "checkpoint.pt")
    shutil.copy(tmp_path / "a" / "metrics.csv", tmp_path / "b")
    assert torch.load(tmp_path / "b" / "checkpoint.pt")["iteration"] == 2
    two_processes(varibad, tmp_path, "--resume", tmp_path / "b" / "checkpoint.pt")
    again = torch.load(tmp_path / "b" / "checkpoint.pt")
    assert set(same(end, again)) <= OF_THE_CALL
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") and len(metrics(tmp_path / "a")) > 20
    assert (end["processes"][0]["rng"] != end["processes"][1]["rng"]).any()


# ---------- Compiled, and on a device without data ----------


def compiled_run(script, folder, monkeypatch, *words, backend):
    """A run with --compile, on a backend of torch's that is quick; how many functions were compiled."""
    compile_, functions = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f: functions.append(f) or compile_(f, backend=backend))
    end = run(script, folder, *words, "--compile")
    monkeypatch.setattr(torch, "compile", compile_)
    return end, len(functions)


def test_compile(tmp_path, monkeypatch):
    """With --compile: the run that it is without, to rounding. Here all is traced, gradients too; the code that is made
    of it is in the next test."""
    words = ["--env-id", "SparsePointRobot", "--total-timesteps", "80", "--tbptt", "0"]
    plain = run(varibad, tmp_path / "plain", *words)
    compiled, count = compiled_run(varibad, tmp_path / "compiled", monkeypatch, *words, backend="aot_eager")
    for part in ("agent", "model"):
        torch.testing.assert_close(compiled[part], plain[part], rtol=1e-4, atol=1e-5)
    assert compiled["iteration"] == 2 and count == 4


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_code():
    """What g++ makes of the encoder's step agrees with what it is made of."""
    s = setup(varibad, "SparsePointRobot")
    batch, hidden = random_batch(s, B=3), torch.randn(3, 6)
    inputs = batch["actions"][0], batch["next_obs"][0], batch["rewards"][0], hidden
    with torch.inference_mode():
        expected = s.model.step(*inputs)
        varibad.Run.compile(types.SimpleNamespace(args=types.SimpleNamespace(compile=True)), s.model, "step")
        torch.testing.assert_close(s.model.step(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("script", [dme, ldm, dynamite_rl], ids=lambda module: module.__name__)
def test_compile_of_each_script(script, tmp_path, monkeypatch):
    """What --compile names is there, and can be traced."""
    end, count = compiled_run(script, tmp_path, monkeypatch, "--total-timesteps", "40", backend="eager")
    assert end["iteration"] == 1 and count >= 4


@SCRIPTS
@pytest.mark.parametrize("env_id", ["GridWorld", "SparsePointRobot"])
def test_meta_device(script, env_id, monkeypatch):
    """One iteration where tensors have shapes and no data: a second device, or a wait for numbers, raises."""
    own = dict(policy_y="sample", initial_belief="prior", virtual="both", virtual_y="usage", chain_w=True)
    s = setup(script, env_id, **(own if script is dme else {}))
    device = torch.device("meta")
    envs = make_envs(env_id, 3, device=device, horizon=3, episodes_per_task=2)
    with device:
        model = script.BeliefModel(s.args, envs)
        agent = script.Agent(s.args, 2, envs.single_action_space, model.belief_sizes)
    monkeypatch.setattr(common.processes, "check_finite", lambda **_: None)  # it waits, once an update, on purpose
    optimizers = [torch.optim.Adam(m.parameters()) for m in (agent, model)]
    rest = [1.0] if script is dme else []
    data = script.rollout(envs, agent, model, s.args, **(dict(virtual=True) if script is dme else {}))
    data["logprobs"], _, values = agent(data["obs"], data["beliefs"][:-1], data["actions"])
    data["values"] = torch.cat([values, agent.value(data["next_obs"][-1], data["beliefs"][-1])[None]])
    rewards = script.normalise_rewards(data["rewards"], data["alive"], agent.return_norm, s.args)
    data["advantages"], data["returns"] = script.gae(rewards, data["values"], data["terminated"], data["alive"], s.args)
    data = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in data.items()}
    data["orders"] = orders(data, s.args)
    losses = script.ppo_update(agent, optimizers[0], data, 0.01, s.args)
    agent.obs_norm.update(data["obs"].flatten(0, 1), data["alive"].flatten())
    buffer = script.Buffer(20, envs)
    buffer.add(data)
    losses |= script.update_belief(model, optimizers[1], buffer, *rest, s.args)
    assert {loss.device for loss in losses.values()} == {device}
    assert all(x.device == device for x in data.values() if isinstance(x, torch.Tensor))
