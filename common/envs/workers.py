"""Worker processes that serve Gymnasium environments with tasks: the back end of Meta-World and of your own.

    from common.envs.workers import WorkerVectorEnv

    def make_envs(num_envs, split, seed, device, horizon=200, episodes_per_task=3):     # --env-id my_module:make_envs
        families = {"cart": make_cart}                                  # name -> callable that makes an environment
        tasks = [("cart", mass, {"mass": mass}) for mass in MASSES[split]]    # (family, name, what set_task receives)
        return WorkerVectorEnv(families, tasks, num_envs, split, seed, device, horizon, episodes_per_task)

An environment is a gymnasium.Env with a method `set_task(data)`, called before `reset`. `info["task"]` of its reset, a
vector, is the ground truth of the task, and `info["success"]` of its steps the success, where it gives them. Its random
numbers come from `reset(seed=...)`, which gets a seed at the beginning of every meta-episode, so that results depend
neither on the number of workers nor on what an environment did before. The callables are imported by the workers:
functions (or functools.partial of them) of a module, not of the script that is being run.

There are as many workers as cores, with several environments each. Observations and actions travel through one block
of shared memory; a socket carries a command to a worker and its answer back, and reports, by its end, that one died.
A worker is a plain Python process which imports neither the script nor torch: multiprocessing would import both, and
cost each worker seconds and hundreds of megabytes.
"""

import math
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
from gymnasium.spaces import Box

from common.envs.protocol import WorkerError, check_tasks, cores, uniforms

# ---------- The parent's side ----------


class WorkerVectorEnv:
    """N environments in lockstep, in W worker processes; the protocol is that of protocol.py.

    families: dict name -> picklable callable that makes an environment of the family; all families of the benchmark,
        whatever the split: the ground truth begins with a one-hot code over them (left out where there is one).
    tasks: list of (family, name, data) of this split; `envs.tasks` calls them "family/name".
    spaces: (observation_space, action_space) of every environment; None asks one, made here and closed again.
    num_workers: W; None means one per core that we may use. Never more than N.
    timeout: seconds that one step, or the reset of one environment, may take before it counts as hung.
    Raises WorkerError when an environment raises, or a worker dies or hangs: no worker is left by then.
    """

    def __init__(
        self,
        families,
        tasks,
        num_envs,
        split="train",
        seed=1,
        device="cpu",
        horizon=200,
        episodes_per_task=3,
        spaces=None,
        num_workers=None,
        timeout=25.0,
    ):
        import torch  # here, not above: the workers import this module, and have no use for torch

        self.num_envs, self.split, self.seed, self.device = num_envs, split, seed, torch.device(device)
        self.horizon, self.episodes_per_task = horizon, episodes_per_task
        self.meta_horizon = horizon * episodes_per_task
        self.single_observation_space, self.single_action_space = spaces or _spaces_of(next(iter(families.values())))
        self.families, self._make = list(families), families
        self.tasks = [f"{family}/{name}" for family, name, _ in tasks]
        self._task = dict(zip(self.tasks, tasks))
        self._names = {family: [n for n in self.tasks if self._task[n][0] == family] for family in families}
        self._drawn_from = [family for family in families if self._names[family]]  # the families of this split
        self.resets, self.repeat = 0, 1
        self.elapsed = self.meta_horizon  # steps since reset(): a step before the first reset is one too many

        num_workers = min(num_workers or cores(), num_envs)
        shapes = (num_envs, num_workers, *_shapes(self.single_observation_space, self.single_action_space))
        # Unlinked from birth: whatever happens to us, no file stays behind.
        with tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as file:
            file.truncate(_block_size(*shapes))
            self._block = _block(file.fileno(), *shapes)
            self._block.busy[:] = -1
            setup = pickle.dumps((families, shapes))
            self._workers = [_Worker(file.fileno(), number, setup, timeout) for number in range(num_workers)]
        self._stop = weakref.finalize(self, _stop, self._workers)  # also when collected, and at the interpreter's exit
        self._shared = SimpleNamespace(**{k: torch.from_numpy(v) for k, v in vars(self._block).items()})
        space = self.single_action_space
        self._bounds = [torch.from_numpy(x) for x in (space.low, space.high)] if isinstance(space, Box) else []
        self._all = {ended: torch.full((num_envs,), ended, device=self.device) for ended in (False, True)}

    def reset(self, tasks=None):
        """A new meta-episode. tasks: N names out of `envs.tasks`; None draws. Returns obs (N, S), info: task (N, G)."""
        import torch

        if tasks is None:
            tasks, seeds = self._draw()
        else:
            check_tasks(self, tasks)
            seeds = range(self.num_envs)
        self._current = [self._task[name] for name in tasks]
        # A family's environments go to one worker where they can: they share caches, and no worker needs all families.
        order = sorted(range(self.num_envs), key=lambda i: self.families.index(self._current[i][0]))
        self._rows = [rows.tolist() for rows in np.array_split(order, len(self._workers))]
        for worker in self._workers:
            self._tell(worker, "recall")
        for worker in self._workers:
            self._answer(worker)
        for worker, rows in zip(self._workers, self._rows):
            for i in rows:
                family, _, data = self._current[i]
                self._tell(worker, "reset", i, family, data, seeds[i])  # all workers at once: answers are read below
        truths = {i: self._answer(worker) for worker, rows in zip(self._workers, self._rows) for i in rows}
        self.elapsed = 0
        truth = np.eye(len(self.families))[[self.families.index(family) for family, _, _ in self._current]]  # one-hot
        if len(self.families) == 1:
            truth = truth[:, :0]
        if truths[0] is not None:
            truth = np.concatenate([truth, [truths[i] for i in range(self.num_envs)]], axis=1)
        obs = self._shared.obs.to(self.device, copy=True)
        return obs, {"task": torch.as_tensor(truth, dtype=torch.float32, device=self.device)}

    def step(self, action):
        """action (N, A), clipped to the space. Returns obs (N, S), reward, terminated, truncated (N,), info."""
        if self.elapsed == self.meta_horizon:
            raise RuntimeError("the meta-episode is over (or has not begun): call reset() first")
        self.elapsed += 1
        ended = self.elapsed % self.horizon == 0
        restart = ended and self.elapsed < self.meta_horizon  # after the last episode, reset() follows
        self._shared.action.copy_(action.detach())
        if self._bounds:
            self._shared.action.clamp_(*self._bounds)
        for worker in self._workers:
            self._tell(worker, "step", restart)
        for worker in self._workers:
            self._answer(worker)
        keys = ("final_obs", "reward", "terminated", "success", "alive")
        new = {k: getattr(self._shared, k).to(self.device, copy=True) for k in keys}
        obs = self._shared.obs.to(self.device, copy=True) if restart else new["final_obs"]
        return obs, new.pop("reward"), new.pop("terminated"), self._all[ended], new

    def _draw(self):
        """New tasks, by name, and a seed of each environment: family first, so that all have the same probability."""
        u = uniforms(self.seed, self.split, self.resets, self.num_envs, 2)
        self.resets += 1
        tasks = []
        for of_family, of_task in u[np.arange(self.num_envs) // self.repeat]:
            family = self._drawn_from[int(of_family * len(self._drawn_from))]
            names = self._names[family]
            tasks.append(names[int(of_task * len(names))])
        return tasks, [int(x * 2**32) for x in u[:, 1]]

    def state_dict(self):
        return {"resets": self.resets}

    def load_state_dict(self, state):
        self.resets = state["resets"]

    def close(self):
        self._stop()

    def _tell(self, worker, *command):
        if not self._stop.alive:
            raise RuntimeError("these environments are closed")
        try:
            worker.send(command)
        except OSError:
            self._fail(worker)

    def _answer(self, worker):
        """The worker's next answer; whatever keeps it from coming ends in a WorkerError."""
        try:
            answer = worker.receive()
        except TimeoutError:
            self._fail(worker, f"gave no answer for {worker.timeout:g} s")
        except (EOFError, OSError, pickle.UnpicklingError):
            self._fail(worker)
        if isinstance(answer, WorkerError):
            self._fail(worker, str(answer), *answer.__notes__)
        return answer

    def _fail(self, worker, what=None, *notes):
        """Ends all workers and raises what happened to which environment."""
        busy = int(self._block.busy[worker.number])
        rows = [busy] if busy >= 0 else sorted(self._rows[worker.number])
        which = f"environment{'s' * (len(rows) > 1)} {', '.join(map(str, rows))}"
        families = ", ".join(dict.fromkeys(self._current[i][0] for i in rows))
        what = what or worker.obituary()
        self.close()
        error = WorkerError(f"{which} ({families}): {what}")
        for note in notes:
            error.add_note(note)
        raise error


class _Worker:
    """A process, and our end of the socket to it."""

    def __init__(self, block, number, setup, timeout):
        self.number, self.timeout = number, timeout
        ours, theirs = socket.socketpair()
        ours.settimeout(timeout)
        start = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; "
        start += f"serve({theirs.fileno()}, {block}, {number})"
        one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", start],
            pass_fds=(theirs.fileno(), block),
            stdin=subprocess.DEVNULL,
            env={**os.environ, **one_thread},
            process_group=0,  # Ctrl-C and signals to the group reach the parent alone, which decides
        )
        theirs.close()
        self.stream = ours.makefile("rwb")
        ours.close()  # the stream keeps it open
        self.send(setup)

    def send(self, message):
        pickle.dump(message, self.stream)
        self.stream.flush()

    def receive(self):
        return pickle.load(self.stream)

    def obituary(self):
        """Why the socket ended."""
        try:
            status = self.process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            return "the worker process closed its connection"
        if status < 0:
            return f"the worker process was killed by {signal.Signals(-status).name}"
        return f"the worker process exited with status {status}"


def _stop(workers):
    """Workers leave when their socket ends; those that do not within two seconds are killed."""
    for worker in workers:
        try:
            worker.stream.close()
        except OSError:
            pass  # a message for a worker that is gone
    deadline = time.monotonic() + 2
    for worker in workers:
        try:
            worker.process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


def _spaces_of(make):
    env = make()
    env.close()
    return env.observation_space, env.action_space


# ---------- The block of shared memory ----------


def _shapes(observation_space, action_space):
    return observation_space.shape, action_space.shape, action_space.dtype.str


def _fields(num_envs, num_workers, obs_shape, action_shape, action_dtype):
    return {  # name -> shape, dtype
        "action": ((num_envs, *action_shape), action_dtype),
        "obs": ((num_envs, *obs_shape), "f4"),  # the first of an episode
        "final_obs": ((num_envs, *obs_shape), "f4"),  # the successor state of the last step
        "reward": ((num_envs,), "f4"),
        "terminated": ((num_envs,), "?"),
        "success": ((num_envs,), "?"),
        "alive": ((num_envs,), "?"),
        "busy": ((num_workers,), "i4"),  # which environment each worker is at, -1 for none: for the post-mortem
    }


def _bytes(shape, dtype):
    return -(-math.prod(shape) * np.dtype(dtype).itemsize // 64) * 64  # in cache lines of their own


def _block_size(*shapes):
    return sum(_bytes(*field) for field in _fields(*shapes).values())


def _block(fd, *shapes):
    """The fields as arrays in the shared file `fd`."""
    memory, offset, arrays = mmap.mmap(fd, _block_size(*shapes)), 0, {}
    for name, (shape, dtype) in _fields(*shapes).items():
        arrays[name] = np.ndarray(shape, dtype, memory, offset)
        offset += _bytes(shape, dtype)
    return SimpleNamespace(**arrays)


# ---------- The worker's side ----------


class _Server:
    """The environments of one worker."""

    def __init__(self, setup, block_fd, number):
        self.families, shapes = pickle.loads(setup)
        self.number, self.block = number, _block(block_fd, *shapes)
        self.running = {}  # row -> (family, environment)
        self.idle = defaultdict(list)  # family -> environments to be used again
        self.finished = set()  # rows whose episode ended before its time

    def recall(self):
        """The end of a meta-episode."""
        for family, env in self.running.values():
            self.idle[family].append(env)
        self.running.clear()
        self.finished.clear()

    def reset(self, i, family, data, seed):
        """A new task for environment i; returns its ground truth, or None."""
        self.block.busy[self.number] = i
        env = self.idle[family].pop() if self.idle[family] else self.families[family]()
        self.running[i] = family, env
        env.set_task(data)
        self.block.obs[i], info = env.reset(seed=seed)
        self.block.busy[self.number] = -1
        return info.get("task")

    def step(self, restart):
        """One step of every environment; then, with `restart`, the next episode in the same task."""
        block, busy = self.block, self.block.busy
        for i, (_, env) in self.running.items():
            busy[self.number] = i
            if i in self.finished:
                block.reward[i] = block.terminated[i] = block.success[i] = block.alive[i] = 0
            else:
                obs, reward, terminated, truncated, info = env.step(block.action[i].copy())
                block.final_obs[i] = obs
                block.reward[i] = reward
                block.terminated[i] = terminated
                block.success[i] = info.get("success", 0)
                block.alive[i] = 1
                if terminated or truncated:
                    self.finished.add(i)
            if restart:
                block.obs[i], _ = env.reset()
        if restart:
            self.finished.clear()
        busy[self.number] = -1

    def close(self):
        for env in [env for _, env in self.running.values()] + sum(self.idle.values(), []):
            env.close()


def serve(socket_fd, block_fd, number):
    """The life of a worker: one answer to each command, until the parent's end of the socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when we end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    stream = socket.socket(fileno=socket_fd).makefile("rwb")
    server = None
    try:
        setup = pickle.load(stream)
        while True:
            command, *arguments = pickle.load(stream)
            try:
                server = server or _Server(setup, block_fd, number)
                answer = getattr(server, command)(*arguments)
            except BaseException as error:  # even sys.exit: the parent tells the story
                answer = WorkerError(" ".join("".join(traceback.format_exception_only(error)).split()))
                answer.add_note(traceback.format_exc())
            pickle.dump(answer, stream)
            stream.flush()
            if isinstance(answer, WorkerError):
                stream.read()  # commands may be waiting: leave them, and `busy` as it is, until the parent hangs up
    except (EOFError, ConnectionError):  # the parent closed the socket, or is gone
        if server:
            server.close()


def _die_with(parent):
    """The end of the socket is seen between two steps only; an environment that hangs must not outlive the parent."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(1)
    os._exit(1)
