"""Runs that can be trusted: saving under fire, NaNs, arguments at random, several processes, compiled, on no device."""

import csv
import dataclasses
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import get_args, get_origin

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dme
import dynamite_rl
import ldm
import varibad
from common.envs import BadInput, make_envs
from tests import test_dynamite, test_ldm
from tests.test_belief import SCRIPTS, random_batch, setup, signals  # noqa: F401
from tests.test_scripts import ALL, TINY, command, metrics, run, same, tiny

ROOT = Path(varibad.__file__).parent
STEADY = ["--ent-coef-end", "0.04"]  # nothing that depends on the run's length


# ---------- Saving ----------


def test_kill_while_saving(tmp_path):
    """SIGKILL at a random moment, forty times: the latest checkpoint is there, whole, and never an older one."""
    path, generator, seen = tmp_path / "checkpoint.pt", random.Random(1), -1
    for _ in range(40):
        child = os.fork()
        if child == 0:
            try:
                for number in range(seen + 1, 10**9):
                    varibad.save_checkpoint(path, dict(number=number, data=torch.full((20_000,), float(number))))
            finally:
                os._exit(1)
        time.sleep(generator.uniform(0.005, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        for name in ("checkpoint.pt", "checkpoint.pt.previous"):
            if (tmp_path / name).exists():
                state = torch.load(tmp_path / name, weights_only=True)
                assert state["data"].eq(state["number"]).all()
                if name == "checkpoint.pt":
                    assert state["number"] >= seen
                    seen = state["number"]
    assert seen > 40  # it did save, and was not always hit in the first one


@ALL
def test_a_save_that_fails(script, tmp_path, monkeypatch, capsys):
    """A full disk (here: a limit to the size of files) in the middle: a sentence, the last good one stays, and on."""
    save, limits = script.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def short_of_space(path, state):
        full = state["iteration"] in (2, 3)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if full else limits[0], limits[1]))
        try:
            save(path, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert torch.load(path)["iteration"] == (1 if full else state["iteration"])
            assert not path.with_name("checkpoint.pt.tmp").exists()

    monkeypatch.setattr(script, "save_checkpoint", short_of_space)
    end = run(script, tmp_path, "--checkpoint-interval", "1")
    out = "".join(capsys.readouterr())
    assert end["iteration"] == 4 and out.count("checkpoint not saved at step") == 2 and "step 80: " in out


@ALL
def test_too_little_disk(script, tmp_path, monkeypatch, capsys):
    """Found at the start: one line that says how much is missing, status 2. What a run needs is what it then writes."""
    usage = shutil.disk_usage(tmp_path)
    argv = tiny(script, "--buffer-size", "10000", "--total-timesteps", "400000", "--run-dir", tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    status, lines = command(script, monkeypatch, capsys, *argv)
    assert status == 2 and re.search("lacks 1?8 MB for its checkpoints.*--run-dir .*--buffer-size", lines[-1]), lines
    need = []
    monkeypatch.setattr(script, "missing_space", lambda folder, size: need.append(size) or 0.0)
    end = run(script, tmp_path / "other", "--buffer-size", "1000")
    assert need == [sum(x.nbytes for x in end["processes"][0]["buffer"]["store"].values())]


def test_a_full_disk(tmp_path):
    """No file may grow beyond 30 kB: metrics, checkpoints and pictures say so, and the run reaches its end."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import dme
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
dme.LOG_EVERY = 1
dme.main(dme.parse_args({[*TINY, "--total-timesteps", "1200", "--eval-interval", "10", "--checkpoint-interval", "5"]}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "1200 steps in" in done.stdout, done.stderr[-2000:]
    for what in ("checkpoint", "metrics", "evaluation", "pictures"):
        assert f"{what} not saved at step 1200: " in done.stdout + done.stderr


@ALL
def test_an_unwritable_folder(script, tmp_path, monkeypatch, capsys):
    """One line, status 2, before any training."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(script, "rollout", None)
    status, lines = command(script, monkeypatch, capsys, *tiny(script, "--run-dir", tmp_path / "file" / "run"))
    assert status == 2 and len(lines) == 1 and "cannot write" in lines[0] and "file" in lines[0]


@ALL
def test_resume_of_the_one_before(script, tmp_path):
    """checkpoint.pt.previous may be resumed where it lies."""
    end = run(script, tmp_path)
    script.main(script.parse_args(["--resume", str(tmp_path / "checkpoint.pt.previous")]))
    again = torch.load(tmp_path / "checkpoint.pt")
    assert set(same(end, again)) <= {"/args/run_dir", "/args/resume", "/metrics_bytes"}


# ---------- Finite numbers ----------


@ALL
@pytest.mark.parametrize("where", ["observation", "reward", "policy loss", "belief loss", "belief gradient norm"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(script, where, bad, tmp_path, monkeypatch):
    """One NaN or infinity in iteration 3: the run stops before the next step and names both; the disk has 2's."""
    made, rollout, elbo = [], script.rollout, script.elbo
    monkeypatch.setattr(script, "evaluate", lambda *_: 1 / 0)

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
    with pytest.raises(FloatingPointError, match=r"iteration 3: .*(" + where.split()[0] + ").* not finite"):
        run(script, tmp_path, "--checkpoint-interval", "1")
    saved = torch.load(tmp_path / "checkpoint.pt")
    assert saved["iteration"] == 2 and same(saved["agent"], made[2]) == []


@ALL
@pytest.mark.parametrize("words", ["--learning-rate 1e38", "--belief-learning-rate 3e38"])
def test_weights_on_disk_are_finite(script, words, tmp_path):
    """Where the last step of an iteration breaks the weights, nothing is saved."""
    with pytest.raises(FloatingPointError, match="iteration 2: weights of the .* not finite"):
        words += " --update-epochs 1 --num-minibatches 1 --belief-updates 1 --checkpoint-interval 1 --max-grad-norm 0"
        run(script, tmp_path, *words.split(), "--precollect", "50")
    assert torch.load(tmp_path / "checkpoint.pt")["iteration"] == 1


@ALL
def test_nothing_moves_where_the_gradient_is_not_finite(script):
    """`descend` raises before the step: parameters and the optimiser's state are as they were."""
    layer = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(layer.parameters())
    script.descend(optimizer, layer(torch.ones(3)).sum(), [layer], 0.0, "good")
    before = [p.clone() for p in layer.parameters()], str(optimizer.state_dict())
    with pytest.raises(FloatingPointError, match="bad loss is not finite"):
        script.descend(optimizer, (layer(torch.ones(3)) / 0).sum(), [layer], 1.0, "bad")
    with pytest.raises(FloatingPointError, match="bad gradient norm is not finite"):
        x = layer.weight.sum()
        script.descend(optimizer, (x - x.detach()).sqrt(), [layer], 1.0, "bad")
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), before[0]))
    assert str(optimizer.state_dict()) == before[1]


def test_the_command_says_so(tmp_path):
    """An environment that gives a NaN: one line, status 1, no traceback."""
    (tmp_path / "mine.py").write_text(
        "from common.envs.gridworld import GridWorld\n"
        "class Bad(GridWorld):\n"
        "    def move(self, action):\n"
        "        obs, reward, success = super().move(action)\n"
        "        return obs, reward / (self.resets < 2), success\n"
    )
    argv = [sys.executable, ROOT / "varibad.py", *TINY, "--env-id", "mine:Bad", "--eval-interval", "-1"]
    argv += ["--reward-decoder", "multihead", "--tbptt", "0"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "varibad.py: iteration 2: reward is not finite; the last checkpoint stands"


@pytest.mark.parametrize(
    "script, fault, says",
    [(varibad, "1 / 0", "ZeroDivisionError"), (dme, "os.kill(os.getpid(), 9)", "SIGKILL")],
    ids=["varibad-raises", "dme-dies"],
)
def test_a_worker_that_fails(script, fault, says, tmp_path):
    """In the third iteration: status 1, the environment and its family by name, no process left, checkpoint intact."""
    (tmp_path / "mine.py").write_text(
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
        "    return WorkerVectorEnv({'walker': Walk}, tasks, num_envs, split, seed, device, *sizes)\n"
    )
    words = [*TINY, "--env-id", "mine:make", "--eval-interval", "-1", "--run-dir", "run", "--checkpoint-interval", "1"]
    argv = [sys.executable, script.__file__, *words, "--tbptt", "0"]
    process = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert re.search(rf"{script.__name__}.py: environments? [0-3, ]+\(walker\): .*{says}", said.splitlines()[-1]), said
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["iteration"] == 2
    time.sleep(0.2)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(str(tmp_path).encode() in line for line in commands)


# ---------- Signals ----------


@ALL
@pytest.mark.parametrize("second, status", [(0, 0), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_two_signals(script, second, status, tmp_path):
    """SIGTERM ends a run saved; a second signal, at once."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import {script.__name__} as script
rollout, made = script.rollout, []
def hit(*a, **b):
    made.append(1)
    if len(made) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), {int(second)})
    return rollout(*a, **b)
script.rollout = hit
script.main(script.parse_args({tiny(script, "--eval-interval", "-1", "--checkpoint-interval", "1")}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert torch.load(folder / "checkpoint.pt")["iteration"] == (2 if status == 0 else 1)


# ---------- Arguments at random ----------


FIXED = {"env_id", "cuda", "track", "compile", "capture_video", "run_dir", "resume", "evaluate", "total_timesteps"}


def one_iteration_or_one_sentence(script, args, folder):
    args.run_dir, args.total_timesteps = str(folder / "run"), 1
    try:
        script.main(args)
    except BadInput as error:
        assert "\n" not in str(error) and len(str(error)) > 20
    except FloatingPointError as error:  # a number that is legal and much too large
        assert "not finite" in str(error)
    shutil.rmtree(args.run_dir, ignore_errors=True)


@ALL
def test_each_argument_at_its_edges(script, tmp_path):
    """0, 1, nothing and too much, one argument at a time."""
    edges = {bool: (True, False), int: (0, 1), float: (0.0, 1.0, 1e30, math.nan)}
    for field in dataclasses.fields(script.Args):
        if field.name not in FIXED | {"eval_interval"}:
            for value in edges.get(field.type) or get_args(field.type):
                args = script.parse_args(tiny(script, "--eval-interval", "-1"))
                setattr(args, field.name, () if value is Ellipsis else (1,) if value is int else value)
                one_iteration_or_one_sentence(script, args, tmp_path)


NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 3, 5, 7, 10, 40, 0.5, 0.999, 1.5, math.inf, -math.inf, math.nan, 1e-300, 1e30]),
    st.integers(-3, 50),
    st.floats(0, 2),
)


def draw_field(data, field, default):
    """A value for one argument, of its type."""
    if field.type is bool:
        return data.draw(st.booleans(), field.name)
    if get_origin(field.type) is tuple:
        return tuple(data.draw(st.lists(st.integers(-1, 9), max_size=3), field.name))
    if get_args(field.type):
        return data.draw(st.sampled_from(get_args(field.type)), field.name)
    return field.type(data.draw(NUMBERS.filter(lambda x: field.type is float or math.isfinite(x)), field.name))


@ALL
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_arguments_at_random(script, data, tmp_path_factory):
    """Whatever numbers a few arguments get: one iteration runs to its end, or one sentence says what is wrong."""
    env_id = data.draw(st.sampled_from(["GridWorld", "SparsePointRobot"]), "env_id")
    words = [*TINY, "--env-id", env_id, "--eval-interval", "-1", "--tbptt", "0"]
    args = script.parse_args(words)
    fields = [field for field in dataclasses.fields(args) if field.name not in FIXED]
    for field in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=4, unique_by=id), "fields"):
        value = draw_field(data, field, getattr(args, field.name))
        if field.type is int and value > 50:
            value = 50
        setattr(args, field.name, value)
    one_iteration_or_one_sentence(script, args, tmp_path_factory.mktemp("run"))


# ---------- Another place ----------


@ALL
def test_a_copy_in_an_empty_folder(script, tmp_path):
    """The script and common/ are enough."""
    shutil.copy(script.__file__, tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    argv = [sys.executable, f"{script.__name__}.py", *tiny(script, "--eval-interval", "-1", "--total-timesteps", "40")]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr


@ALL
def test_track(script, tmp_path, monkeypatch):
    """--track: Weights & Biases gets the rows of metrics.csv, with global_step as the axis."""
    rows, said = [], []
    fake = types.SimpleNamespace(log=rows.append, finish=lambda: said.append("finish"))
    fake.define_metric = lambda *a, **b: said.append((a, b))
    module = types.SimpleNamespace(init=lambda **kwargs: said.append(kwargs) or fake)
    monkeypatch.setitem(sys.modules, "wandb", module)
    run(script, tmp_path, "--track", eval_interval=2)
    assert said[0]["config"]["env_id"] == script.Args.env_id and said[0]["dir"] == tmp_path and said[-1] == "finish"
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
    data |= dict(returns=torch.randn(T, 4), beliefs=torch.randn(T + 1, 4, sum(s.agent.belief_sizes)))
    data |= dict(acted_on=data["next_obs"], hiddens=torch.randn(2, 4, s.args.hidden_dim))
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


def torchrun(script, *words):
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script.__file__, *words]
    return subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@SCRIPTS
def test_torchrun(script, tmp_path):
    """Two processes: other tasks in each, one set of files, four iterations straight equal two and two more."""
    words = [*TINY, *STEADY, "--eval-interval", "2"]
    end = torchrun(script, *words, "--run-dir", tmp_path / "a").communicate(timeout=120)[0]
    state = torch.load(tmp_path / "a" / "checkpoint.pt")
    assert state["global_step"] == 160, end
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "checkpoint.pt.previous", tmp_path / "b" / "checkpoint.pt")
    shutil.copy(tmp_path / "a" / "metrics.csv", tmp_path / "b")
    assert torch.load(tmp_path / "b" / "checkpoint.pt")["iteration"] == 2
    torchrun(script, "--resume", tmp_path / "b" / "checkpoint.pt").communicate(timeout=120)
    again = torch.load(tmp_path / "b" / "checkpoint.pt")
    assert set(same(state, again)) <= {"/args/run_dir", "/args/resume", "/metrics_bytes"}
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") and len(metrics(tmp_path / "a")) > 20
    stores = [process["buffer"]["store"] for process in state["processes"]]
    assert [len(store["rewards"]) for store in stores] == [5, 5]
    assert (stores[0]["actions"] != stores[1]["actions"]).float().mean() > 0.3
    assert (state["processes"][0]["rng"] != state["processes"][1]["rng"]).any()
    with pytest.raises(BadInput, match="saved by 2 processes, and here are 1"):
        script.main(script.parse_args(["--resume", str(tmp_path / "b" / "checkpoint.pt")]))
    words += ["--total-timesteps", "4000000", "--run-dir", tmp_path / "c", "--checkpoint-interval", "0"]
    long = torchrun(script, *words)
    while not (tmp_path / "c" / "eval.json").exists():
        assert long.poll() is None
        time.sleep(0.2)
    long.send_signal(signal.SIGTERM)
    long.communicate(timeout=25)
    state = torch.load(tmp_path / "c" / "checkpoint.pt")
    assert state["iteration"] > 1 and state["global_step"] == 40 * state["iteration"] < 4_000_000
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}


# ---------- Compiled, and on a device without data ----------


@SCRIPTS
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compile(script, tmp_path):
    """Compiled and eager policies and encoders agree, gradients too; and a run with --compile runs."""
    s = setup(script, "SparsePointRobot")
    batch = random_batch(s, B=3)
    belief = torch.randn(6, 3, sum(s.model.belief_sizes))
    hidden = torch.randn(3, 6)
    found = []
    for wrap in (lambda f: f, torch.compile):
        s.agent.zero_grad()
        logprob, entropy, value = wrap(s.agent.forward)(batch["obs"], belief, batch["actions"])
        (logprob + entropy + value).sum().backward()
        gradients = [p.grad.clone() for p in s.agent.parameters() if p.grad is not None]
        with torch.inference_mode():
            after = wrap(s.model.step)(batch["actions"][0], batch["next_obs"][0], batch["rewards"][0], hidden)
            action = wrap(s.agent.act)(batch["obs"][0], belief[0], True)
            seen = wrap(s.model.belief)(hidden, True)
        found.append([logprob.detach(), entropy.detach(), value.detach(), *gradients, after, action, seen])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    if script is varibad:
        assert run(script, tmp_path, "--compile", "--total-timesteps", "80")["iteration"] == 2


@SCRIPTS
@pytest.mark.parametrize("env_id", ["GridWorld", "SparsePointRobot"])
def test_meta_device(script, env_id, monkeypatch):
    """One iteration where tensors have shapes and no data: a second device, or a wait for numbers, raises."""
    s = setup(script, env_id, **(dict(policy_y="sample", initial_belief="prior") if script is dme else {}))
    device = torch.device("meta")
    envs = make_envs(env_id, 3, device=device, horizon=3, episodes_per_task=2)
    with device:
        model = script.BeliefModel(s.args, envs)
        agent = script.Agent(s.args, 2, envs.single_action_space, model.belief_sizes)
    monkeypatch.setattr(script, "check_finite", lambda **_: None)  # it waits, once an update, on purpose
    optimizers = [torch.optim.Adam(m.parameters()) for m in (agent, model)]
    rest = [0.0] if script is dme else []
    data = script.rollout(envs, agent, model, s.args, **(dict(virtual=True) if script is dme else {}))
    data["logprobs"], _, values = agent(data["obs"], data["beliefs"][:-1], data["actions"])
    data["values"] = torch.cat([values, agent.value(data["next_obs"][-1], data["beliefs"][-1])[None]])
    rewards = script.normalise_rewards(data["rewards"], data["alive"], agent.return_norm, s.args)
    data["advantages"], data["returns"] = script.gae(rewards, data["values"], data["terminated"], data["alive"], s.args)
    data = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in data.items()}
    losses = script.ppo_update(agent, optimizers[0], data, 0.01, s.args)
    agent.obs_norm.update(data["obs"].flatten(0, 1), data["alive"].flatten())
    buffer = script.Buffer(20)
    buffer.add(data)
    losses |= script.update_belief(model, optimizers[1], buffer, *rest, s.args)
    assert {loss.device for loss in losses.values()} == {device}
    assert all(x.device == device for x in data.values() if isinstance(x, torch.Tensor))
