"""envs/workers.py with toy environments: the protocol, reproducibility, and every way in which a worker can fail."""

import contextlib
import gc
import glob
import math
import os
import signal
import socket
import subprocess
import sys
import time
import types

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from common.envs.workers import WorkerError, WorkerVectorEnv


class Walk(gymnasium.Env):
    """obs (what the task says, steps since reset, the last action's first number, a random number of this episode).

    `fault` of its task, and the step at which it strikes, say how it misbehaves.
    """

    observation_space = Box(-np.inf, np.inf, (4,), np.float64)
    action_space = Box(np.array([-1, -2], np.float32), np.array([1, 2], np.float32))

    def set_task(self, data):
        self.value, self.fault, self.when, self.length = (
            data["value"],
            data.get("fault"),
            data.get("when"),
            data.get("length"),
        )

    def observe(self, number):
        return np.array([self.value, self.steps, number, self.noise])

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.noise = 0, self.np_random.random()
        return self.observe(0), {"task": np.array([self.value, "torch" in sys.modules])}

    def step(self, action):
        self.steps += 1
        if self.steps == self.when:
            faults = {"raise": self.fail, "exit": lambda: os._exit(3)}
            faults["hang"] = lambda: (print("it hangs", flush=True), time.sleep(1000))
            faults["kill"] = lambda: os.kill(os.getpid(), signal.SIGKILL)
            faults["quit"] = lambda: sys.exit("had enough")
            faults["spin"] = lambda: (print("it spins", flush=True), sum(range(10**15)))  # and lets no thread run
            faults[self.fault]()
        done = self.steps == self.length
        return self.observe(action[0]), float(action.sum()) + self.noise, done, False, {"success": self.steps % 2 == 0}

    def fail(self):
        raise ArithmeticError("the axle\nbroke")


class Switch(Walk):
    """Discrete actions, and neither a ground truth nor a success."""

    action_space = Discrete(5)

    def reset(self, seed=None, options=None):
        return super().reset(seed=seed)[0], {}

    def step(self, action):
        self.steps += 1
        return self.observe(action), float(action), False, False, {}


def cannot_be_made():
    raise ValueError("no wheels")


TWO = {"walk": Walk, "run": Walk}
TASKS = [("walk", k, {"value": k}) for k in range(3)] + [("run", k, {"value": 10 + k}) for k in range(4)]


def make(tasks=TASKS, num_envs=5, families=TWO, horizon=4, episodes_per_task=2, num_workers=2, **more):
    sizes = {"horizon": horizon, "episodes_per_task": episodes_per_task, "num_workers": num_workers}
    return WorkerVectorEnv(families, tasks, num_envs, **sizes, **more)


@pytest.fixture
def envs():
    envs = make()
    yield envs
    envs.close()


def actions(num_envs, steps, dim=2):
    import torch

    return torch.rand(steps, num_envs, dim, generator=torch.Generator().manual_seed(0)) * 6 - 3


def pids(envs):
    return [worker.process.pid for worker in envs._workers]


def exists(pid):
    """Whether the process lives; a zombie, which waits for its parent to look, does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(processes):
    deadline = time.monotonic() + 120
    while any(map(exists, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(exists, processes))


def test_shapes_and_attributes(envs):
    import torch

    obs, info = envs.reset()
    obs2, reward, terminated, truncated, step_info = envs.step(torch.zeros(5, 2))
    for x in (obs, obs2, step_info["final_obs"]):
        assert x.shape == (5, 4) and x.dtype == torch.float32
    assert reward.shape == (5,) and reward.dtype == torch.float32
    for flag in (terminated, truncated, step_info["success"], step_info["alive"]):
        assert flag.shape == (5,) and flag.dtype == torch.bool
    assert info["task"].shape == (5, 2 + 2) and info["task"].dtype == torch.float32
    assert (envs.num_envs, envs.horizon, envs.episodes_per_task, envs.meta_horizon) == (5, 4, 2, 8)
    assert envs.single_observation_space == Walk.observation_space and envs.single_action_space == Walk.action_space
    assert envs.tasks == ["walk/0", "walk/1", "walk/2", "run/0", "run/1", "run/2", "run/3"]
    assert envs.families == ["walk", "run"] and envs.split == "train"


def test_many_environments():
    """As many answers as a socket does not hold, of one worker; and of all that may be at fault, some are named."""
    many = make(num_envs=700, num_workers=1)
    obs, info = many.reset()
    assert obs.shape == (700, 4) and len(info["task"].unique(dim=0)) == 7
    os.kill(pids(many)[0], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"^environments [\d, ]+, \.\.\. \(run, walk\): .*SIGKILL$") as error:
        many.step(actions(700, 1)[0])
    assert len(str(error.value)) < 150


def test_repeated_tasks(envs):
    """repeat: so many neighbours share a task, that of one environment without; their random numbers differ."""
    import torch

    many = make(num_envs=15)
    many.repeat = 3
    for _ in range(3):
        task = envs.reset()[1]["task"]
        obs, info = many.reset()
        assert torch.equal(info["task"], task.repeat_interleave(3, 0)) and len(task.unique(dim=0)) > 1
        assert len(obs[:, 3].unique()) == 15
    many.close()


def test_a_meta_episode_step_by_step(envs):
    import torch

    names = ["run/3", "walk/0", "walk/0", "run/1", "walk/2"]
    value = torch.tensor([13.0, 0, 0, 11, 2])
    obs, info = envs.reset(tasks=names)
    assert torch.equal(info["task"][:, :2], torch.tensor([[0.0, 1], [1, 0], [1, 0], [0, 1], [1, 0]]))
    assert torch.equal(info["task"][:, 2], value)
    assert not info["task"][:, 3].any(), "a worker imported torch"
    for t, action in enumerate(actions(5, 8)):
        noise = obs[:, 3]
        before = obs.clone()
        obs_t, reward, terminated, truncated, info = envs.step(action)
        clipped = torch.stack([action[:, 0].clamp(-1, 1), action[:, 1].clamp(-2, 2)], 1)
        final = torch.stack([value, torch.full((5,), t % 4 + 1.0), clipped[:, 0], noise], 1)
        assert torch.equal(info["final_obs"], final)
        torch.testing.assert_close(reward, clipped.sum(1) + noise, rtol=0, atol=1e-6)
        assert not terminated.any() and info["alive"].all()
        assert truncated.tolist() == [t in (3, 7)] * 5
        assert info["success"].tolist() == [t % 2 == 1] * 5
        if t == 3:  # the next episode has begun, in the same task
            assert obs_t[:, 1].tolist() == [0] * 5 and torch.equal(obs_t[:, 0], value)
            assert not torch.equal(obs_t[:, 3], noise)
        else:
            assert torch.equal(obs_t, final)
        assert torch.equal(obs, before), "an observation changed after it was handed out"
        obs = obs_t
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(action)


def test_a_step_before_the_first_reset(envs):
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(actions(5, 1)[0])


def test_early_termination_idles():
    """Environment 1 ends at step 2 of 4, in both episodes; the others go on."""
    tasks = [("walk", "long", {"value": 0}), ("walk", "short", {"value": 1, "length": 2})]
    envs = make(tasks, num_envs=2, families={"walk": Walk}, num_workers=1)
    obs, info = envs.reset(tasks=["walk/long", "walk/short"])
    assert info["task"].shape == (2, 2), "one family needs no one-hot code"
    for t, action in enumerate(actions(2, 8)):
        obs, reward, terminated, truncated, info = envs.step(action)
        k = t % 4
        assert terminated.tolist() == [False, k == 1]
        assert info["alive"].tolist() == [True, k <= 1]
        assert truncated.tolist() == [k == 3] * 2
        assert info["final_obs"][:, 1].tolist() == [k + 1, min(k + 1, 2)]
        assert obs[:, 1].tolist() == ([0, 0] if t == 3 else [k + 1, min(k + 1, 2)])
        if k > 1:
            assert reward[1] == 0 and not info["success"][1]
    envs.close()


def test_discrete_actions_and_bare_environments():
    import torch

    envs = make([("switch", 0, {"value": 7})], 3, {"switch": Switch})
    _, info = envs.reset()
    assert info["task"].shape == (3, 0)
    obs, reward, _, _, info = envs.step(torch.tensor([4, 0, 2]))
    assert reward.tolist() == [4, 0, 2] and obs[:, 2].tolist() == [4, 0, 2] and "success" not in info
    envs.close()


class Late(Switch):
    """Tells a success of its third step alone."""

    def step(self, action):
        *rest, info = super().step(action)
        return *rest, info | ({"success": True} if self.steps == 3 else {})


def test_success_of_some_steps():
    """Refused by the first one, in a sentence: what it would be counted as in the other steps is anybody's guess."""
    import torch

    envs = make([("late", 0, {"value": 7})], 3, {"late": Late})
    envs.reset()
    for _ in range(2):
        assert "success" not in envs.step(torch.tensor([4, 0, 2]))[4]
    with pytest.raises(WorkerError, match=r"info\['success'\] comes late, .*: give it in every step, or in none"):
        envs.step(torch.tensor([4, 0, 2]))


def play(envs, meta_episodes):
    import torch

    out = []
    for _ in range(meta_episodes):
        obs, info = envs.reset()
        out += [obs, info["task"]]
        for action in actions(envs.num_envs, envs.meta_horizon):
            obs, reward, _, _, info = envs.step(action)
            out += [obs, info["final_obs"], reward[:, None]]
    return torch.cat([x.flatten() for x in out])


def test_results_do_not_depend_on_the_number_of_workers():
    """5 environments in 1 and in 3 workers: neither tasks nor an environment's own random numbers change."""
    import torch

    runs = []
    for workers in (1, 3):
        envs = make(num_workers=workers, seed=0)
        assert len(pids(envs)) == workers
        runs.append(play(envs, 3))
        envs.close()
    assert torch.equal(*runs)
    envs = make(seed=1)
    assert not torch.equal(runs[0], play(envs, 3))
    envs.close()


def test_draws_are_those_of_the_protocol_and_resume(envs):
    """Environment i draws from (seed, split, number of the reset, i); named tasks draw nothing."""
    import torch

    drawn = []
    for n in range(3):
        u = np.random.default_rng((1, 0, n)).random((5, 2))
        family = [["walk", "run"][math.floor(x)] for x in u[:, 0] * 2]
        value = [math.floor(x * 3) if f == "walk" else 10 + math.floor(x * 4) for f, x in zip(family, u[:, 1])]
        obs, info = envs.reset()
        assert obs[:, 0].tolist() == value and info["task"][:, 2].tolist() == value
        assert envs.state_dict() == {"resets": n + 1}
        drawn.append(obs)
        first = envs.reset(tasks=envs.tasks[:5])[0]
        assert torch.equal(first, envs.reset(tasks=envs.tasks[:5])[0]), "an evaluation is the same every time"
    envs.load_state_dict({"resets": 1})
    assert torch.equal(envs.reset()[0], drawn[1])
    test = make(split="test")
    assert not torch.equal(test.reset()[0], drawn[0])
    test.close()


def test_phases_share_no_draws(envs):
    """`phase`, set before a reset: the same tasks, drawn and named, and in each of their episodes other numbers."""
    tasks, noise = [], []
    for envs.phase in range(3):
        envs.load_state_dict({"resets": 0})
        obs = [envs.reset()[0], envs.reset(tasks=envs.tasks[:5])[0]]
        tasks.append([x[:, 0].tolist() for x in obs])
        noise += [number for x in obs for number in x[:, 3].tolist()]
    assert tasks[0] == tasks[1] == tasks[2] and len(set(noise)) == 3 * 10


def test_named_tasks_are_checked(envs):
    with pytest.raises(ValueError, match="'walk/7'"):
        envs.reset(tasks=["walk/7"] * 5)
    with pytest.raises(ValueError, match="2 tasks for 5 environments"):
        envs.reset(tasks=["walk/0"] * 2)
    envs.reset()


@pytest.mark.parametrize(
    "fault, says",
    [
        ("raise", r"ArithmeticError: the axle broke"),
        ("exit", r"exited with status 3"),
        ("kill", r"killed by SIGKILL"),
        ("hang", r"no answer for 3 s"),
        ("quit", r"SystemExit: had enough"),
    ],
)
def test_faults(fault, says, monkeypatch):
    """At step 3, environment 3 alone; in one sentence that names it, and with nothing left behind. What does not hang
    is told by the end of the socket, not by the time that it takes."""
    tasks = [("walk", 0, {"value": 0}), ("run", 0, {"value": 1, "fault": fault, "when": 3})]
    ends, socketpair = [], socket.socketpair
    monkeypatch.setattr(socket, "socketpair", lambda: ends.append(socketpair()) or ends[-1])
    envs = make(tasks, timeout=600)
    processes = pids(envs)
    envs.reset(tasks=["walk/0"] * 3 + ["run/0", "walk/0"])  # starting a process may take long, a step does not
    if fault == "hang":
        for worker, (ours, _) in zip(envs._workers, ends, strict=True):
            assert ours.gettimeout() == worker.timeout == 600
            worker.timeout = 3
            ours.settimeout(worker.timeout)
    with pytest.raises(WorkerError) as caught:
        for action in actions(5, 4):
            envs.step(action)
    message = str(caught.value)
    assert message.startswith("environment 3 (run): ") and "\n" not in message
    assert caught.match(says)
    if fault == "raise":
        assert "in fail" in caught.value.__notes__[0], "the worker's traceback is there for those who look"
    assert not any(map(exists, processes))
    with pytest.raises(RuntimeError, match="closed"):
        envs.reset()


def test_a_worker_that_dies_between_two_steps():
    envs = make()
    envs.reset(tasks=["walk/0"] * 3 + ["run/0", "walk/0"])
    processes = pids(envs)
    os.kill(processes[1], signal.SIGKILL)
    assert wait_until_gone(processes[1:])
    with pytest.raises(WorkerError, match=r"^environments 3, 4 \(run, walk\): .* killed by SIGKILL"):
        for action in actions(5, 4):
            envs.step(action)
    assert not any(map(exists, processes))


def test_an_environment_that_cannot_be_made():
    """Found at the start; and where the spaces were given, with nothing tried, in the first reset."""
    families, tasks = {"walk": Walk, "cart": cannot_be_made}, [("walk", 0, {"value": 0}), ("cart", 0, {})]
    with pytest.raises(WorkerError, match=r"^family 'cart': ValueError: no wheels"):
        make(tasks, 3, families, num_workers=1)
    envs = make(tasks, 3, families, num_workers=1, spaces=(Walk.observation_space, Walk.action_space))
    with pytest.raises(WorkerError, match=r"^environment 1 \(cart\): ValueError: no wheels"):
        envs.reset(tasks=["walk/0", "cart/0", "walk/0"])


def test_a_family_that_workers_cannot_import(monkeypatch):
    ghost = types.ModuleType("ghost")
    exec("def make_ghost(): pass", vars(ghost))
    monkeypatch.setitem(sys.modules, "ghost", ghost)
    envs = make(
        [("ghost", 0, {})], 2, {"ghost": ghost.make_ghost}, num_workers=1, spaces=(Box(0, 1, (1,)), Discrete(2))
    )
    with pytest.raises(
        WorkerError, match=r"^environments 0, 1 \(ghost\): ModuleNotFoundError: No module named 'ghost'"
    ):
        envs.reset()


def test_signals_to_workers_are_ignored(envs):
    """Ctrl-C and a scheduler's SIGTERM may reach the workers too; what follows is the parent's decision."""
    envs.reset()
    for pid in pids(envs):
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    for action in actions(5, 8):
        envs.step(action)


def test_close_and_garbage_collection_leave_nothing():
    before = set(glob.glob("/dev/shm/*"))
    for let_go in (lambda envs: envs.close(), lambda envs: None):
        envs = make()
        envs.reset()
        processes = pids(envs)
        assert set(glob.glob("/dev/shm/*")) == before
        let_go(envs)
        let_go(envs)  # twice is not an error
        del envs
        gc.collect()
        assert not any(map(exists, processes))


ORPHANS = """
import sys, threading, time
sys.path[:] = {path!r}
import torch
from {module} import make
if __name__ == "__main__":
    spaces = {module}.Walk.observation_space, {module}.Walk.action_space  # given, so that nothing is tried
    tasks = [("walk", 0, {{"value": 0, "fault": {fault!r}, "when": {when}}})]
    envs = make(tasks, 3, {{"walk": {module}.Walk}}, spaces=spaces)
    envs.reset()
    print(*[worker.process.pid for worker in envs._workers], flush=True)
    envs.step(torch.zeros(3, 2))
    print("it waits", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("fault, when, says", [("hang", 1, "it hangs"), ("spin", 1, "it spins"), ("", 9, "it waits")])
def test_a_killed_parent_leaves_no_orphans(fault, when, says):
    """As after a second Ctrl-C: in a step that does not end, in one that no thread interrupts, between two steps."""
    script = ORPHANS.format(path=sys.path, module=__name__, fault=fault, when=when).replace(
        "import torch\n", f"import torch, {__name__}\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    processes = [int(pid) for pid in parent.stdout.readline().split()]
    assert parent.stdout.readline().startswith(says)  # two workers may say it in one line
    assert len(processes) == 2 and all(map(exists, processes))
    parent.kill()
    parent.wait()
    gone = wait_until_gone(processes)
    for pid in processes:  # where this fails, nothing else ends them
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert gone
