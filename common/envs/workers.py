"""Worker processes that serve Gymnasium environments with tasks: the back end of Meta-World and of your own.

    from common.envs.workers import WorkerVectorEnv

    def make_envs(num_envs, split, seed, device, horizon=200, episodes_per_task=3):     # --env-id my_module:make_envs
        families = {"cart": make_cart}                                  # name -> callable that makes an environment
        tasks = [("cart", mass, {"mass": mass}) for mass in MASSES[split]]    # (family, name, what set_task receives)
        return WorkerVectorEnv(families, tasks, num_envs, split, seed, device, horizon, episodes_per_task)

An environment is a gymnasium.Env with a method `set_task(data)`, called before `reset`. `info["task"]` of its reset, a
vector, is the ground truth of the task, and `info["success"]` of its steps, of all or of none, the success, where it
gives them. Its random numbers come from `reset(seed=...)`, which gets a seed at the beginning of every meta-episode, so
that results depend neither on the number of workers nor on what an environment did before. The callables are imported
by the workers: functions (or functools.partial of them) of a module, not of the script that is being run.

Observations are vectors, a Box of one dimension; they become float32, whatever they are. Actions are such vectors, of
floats, or one of n choices. All families have the same spaces, and ground truths of the same length. Before the run
begins, the workers make an environment of each family, reset it to its last task and its first, play one step and close
it again, to see that it is as said here (check.py).

There are as many workers as cores, with several environments each. Observations and actions travel through one block
of shared memory; a socket carries a command to a worker and its answer back, and reports, by its end, that one died.
A worker is a plain Python process which imports neither the script nor torch: multiprocessing would import both, and
cost each worker seconds and hundreds of megabytes.
"""

import contextlib
import ctypes
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
from gymnasium.spaces import Discrete

from common.envs.check import as_float32, check_env, check_names, check_spaces, short
from common.envs.protocol import BadInput, WorkerError, check_tasks, cores, uniforms

# ---------- The parent's side ----------


class WorkerVectorEnv:
    """N environments in lockstep, in W worker processes; the protocol is that of protocol.py.

    families: dict name -> picklable callable that makes an environment of the family; all families of the benchmark,
        whatever the split: the ground truth begins with a one-hot code over them (left out where there is one).
    tasks: list of (family, name, data) of this split; `envs.tasks` calls them "family/name".
    spaces: (observation_space, action_space) of every environment; None tries one of each family, and asks it.
    num_workers: W; None means one per core that we may use. Never more than N.
    timeout: seconds that one step, or the reset of one environment, may take before it counts as hung.
    `single_action_space` counts discrete actions from 0, and `step` takes them so, whatever an environment's `start`.
    Raises BadInput for families, tasks or environments that are not as the docstring of this file has it. Raises
    WorkerError when an environment raises or gives a NaN, or a worker dies or hangs. No worker is left by then.
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

        tasks = list(tasks)
        setup = _pickled(families, tasks)
        self.num_envs, self.split, self.seed, self.device = num_envs, split, seed, torch.device(device)
        self.horizon, self.episodes_per_task = horizon, episodes_per_task
        self.meta_horizon = horizon * episodes_per_task
        self.families, self._make = list(families), families
        self.tasks = [f"{family}/{name}" for family, name, _ in tasks]
        check_names(self.tasks, split)
        self._task = dict(zip(self.tasks, tasks))
        self._names = {family: [n for n in self.tasks if self._task[n][0] == family] for family in families}
        self._drawn_from = [family for family in families if self._names[family]]  # the families of this split
        self.resets, self.repeat, self.phase = 0, 1, 0
        self.elapsed = self.meta_horizon  # steps since reset(): a step before the first reset is one too many

        num_workers = max(1, min(num_workers or cores(), num_envs))
        with contextlib.ExitStack() as closed:
            files = []
            for folder in ("/dev/shm", tempfile.gettempdir()):
                with contextlib.suppress(OSError):  # no such folder, or not ours to write in
                    # Unlinked from birth: whatever happens to us, no file stays behind.
                    files.append(closed.enter_context(tempfile.TemporaryFile(dir=folder)))
            fds = [file.fileno() for file in files]
            self._workers = [_Worker(fds, number, setup, timeout) for number in range(num_workers)]
            self._stop = weakref.finalize(self, _stop, self._workers)  # when collected, or at the interpreter's exit
            self._block, self._truth_shapes, self._succeeds = None, set(), True  # one shape; whether success is told
            try:
                observation_space, action_space = spaces or self._try_out()
                check_spaces(observation_space, action_space)
                shapes = num_envs, num_workers, observation_space.shape, action_space.shape, action_space.dtype.str
                self._memory = _with_room(fds, _block_size(*shapes)), *shapes
            except BadInput:
                self.close()
                raise
            self._block = _block(*self._memory)
        self._block.busy[:] = -1
        self._shared = SimpleNamespace(**{k: torch.from_numpy(v) for k, v in vars(self._block).items()})
        self.single_observation_space = observation_space
        self._first_action, self._bounds = int(getattr(action_space, "start", 0)), []
        if isinstance(action_space, Discrete):
            self.single_action_space = Discrete(action_space.n)
        else:
            self._bounds = [torch.from_numpy(x) for x in (action_space.low, action_space.high)]
            self.single_action_space = as_float32(action_space)
        self._all = {ended: torch.full((num_envs,), ended, device=self.device) for ended in (False, True)}

    def reset(self, tasks=None):
        """A new meta-episode. tasks: N names out of `envs.tasks`; None draws. Returns obs (N, S), info: task (N, G)."""
        import torch

        if tasks is None:
            tasks, seeds = self._draw()
        else:
            check_tasks(self, tasks)
            seeds = range(self.num_envs)
        seeds = [(seed + (self.phase << 30)) % 2**32 for seed in seeds]
        self._named, self._current = tasks, [self._task[name] for name in tasks]
        # A family's environments go to one worker where they can: they share caches, and no worker needs all families.
        order = sorted(range(self.num_envs), key=lambda i: self.families.index(self._current[i][0]))
        self._rows = [rows.tolist() for rows in np.array_split(order, len(self._workers))]
        for worker in self._workers:
            self._tell(worker, "begin", *self._memory)
        for worker in self._workers:
            self._answer(worker)
        truths = {}
        for first in range(0, len(self._rows[0]), 100):  # of each worker: some hundred answers would fill the socket
            share = [(worker, i) for worker, rows in zip(self._workers, self._rows) for i in rows[first : first + 100]]
            for worker, i in share:
                family, _, data = self._current[i]
                self._tell(worker, "reset", i, family, data, seeds[i])  # all workers at once: answers are read below
            truths |= {i: self._answer(worker) for worker, i in share}
        self.elapsed = 0
        self._check_truths(truths)
        self._check_finite()
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
        if self._first_action:
            self._shared.action += self._first_action
        for worker in self._workers:
            self._tell(worker, "step", restart)
        for worker in self._workers:
            self._answer(worker)
        self._check_finite()
        if not self._succeeds and self._block.success.any():
            self.close()
            raise WorkerError("info['success'] comes late, a first step had none: give it in every step, or in none")
        keys = ("final_obs", "reward", "terminated", "alive") + ("success",) * self._succeeds
        new = {k: getattr(self._shared, k).to(self.device, copy=True) for k in keys}
        obs = self._shared.obs.to(self.device, copy=True) if restart else new["final_obs"]
        return obs, new.pop("reward"), new.pop("terminated"), self._all[ended], new

    def _try_out(self):
        """Has the workers play a step in an environment of each family of this split. Returns the spaces of all."""
        tried = [(family, self._workers[k % len(self._workers)]) for k, family in enumerate(self._drawn_from)]
        for family, worker in tried:
            names = self._names[family]
            self._tell(
                worker, "try_out", family, [self._task[name][2] for name in dict.fromkeys((names[-1], names[0]))]
            )
        found = [(family, *self._answer(worker, f"family {family!r}")) for family, worker in tried]
        one, observation_space, action_space, truth, _ = found[0]
        self._succeeds = any(success for *_, success in found)
        self._truth_shapes.add(truth)
        for other, *its in found[1:]:
            for what, a, b, same in (
                ("observation_space", its[0], observation_space, its[0].shape == observation_space.shape),
                ("action_space", its[1], action_space, its[1] == action_space),
                ("info['task'] of shape", its[2], truth, its[2] == truth),
            ):
                if not same:
                    raise BadInput(f"{what} {short(a)} of family {other!r} differs from that of {one!r}, {short(b)}")
        return observation_space, action_space

    def _check_truths(self, truths):
        """BadInput where ground truths are not of one length, or not finite. truths: environment -> vector, or None."""
        for i, truth in truths.items():
            shape = None if truth is None else np.shape(truth)
            self._truth_shapes.add(shape)
            if len(self._truth_shapes) > 1 or not (truth is None or np.isfinite(truth).all()):
                self.close()
                (other,) = (self._truth_shapes - {shape}) or (shape,)
                odd = f"has shape {shape}, but {other} in other tasks" if other != shape else f"is {short(truth)}"
                raise BadInput(f"info['task'] of {self._named[i]} {odd}")

    def _check_finite(self):
        """WorkerError that names the environment whose reward or observation is not finite."""
        block = self._block
        with np.errstate(over="ignore"):
            if math.isfinite(block.numbers.dot(block.numbers)):  # in a microsecond; below, what overflows is fine
                return
        for what, array in (("reward", block.reward), ("observation", block.final_obs), ("observation", block.obs)):
            for i in np.argwhere(~np.isfinite(array))[:1, 0].tolist():
                self.close()
                if not np.isfinite(block.action[i]).all():
                    raise FloatingPointError(f"the action in environment {i} is not finite")
                when = f"at step {self.elapsed}" if self.elapsed else "of reset"
                odd = f"the {what} {when} is not finite: {short(array[i].tolist())}"
                raise WorkerError(f"environment {i} ({self.split} task {self._named[i]}): {odd}")

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

    def _answer(self, worker, about=None):
        """The worker's next answer; whatever keeps it from coming ends in a WorkerError, about this or that."""
        try:
            answer = worker.receive()
        except TimeoutError:
            self._fail(worker, about, f"gave no answer for {worker.timeout:g} s")
        except (EOFError, OSError, pickle.UnpicklingError):
            self._fail(worker, about)
        if isinstance(answer, BadInput):
            self.close()
            raise BadInput(f"{about or 'an environment'}: {answer}")
        if isinstance(answer, WorkerError):
            self._fail(worker, about, str(answer), *answer.__notes__)
        return answer

    def _fail(self, worker, about=None, what=None, *notes):
        """Ends all workers and raises what happened to which environment."""
        if not about and self._block is None:
            about = f"worker {worker.number}"
        elif not about:
            busy = int(self._block.busy[worker.number])
            rows = [busy] if busy >= 0 else sorted(self._rows[worker.number])
            families = ", ".join(dict.fromkeys(self._current[i][0] for i in rows))
            some = ", ".join(map(str, rows[:10])) + ", ..." * (len(rows) > 10)
            about = f"environment{'s' * (len(rows) > 1)} {some} ({families})"
        what = what or worker.obituary()
        self.close()
        error = WorkerError(f"{about}: {what}")
        for note in notes:
            error.add_note(note)
        raise error


class _Worker:
    """A process, and our end of the socket to it."""

    def __init__(self, files, number, setup, timeout):
        self.number, self.timeout = number, timeout
        ours, theirs = socket.socketpair()
        ours.settimeout(timeout)
        start = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; "
        in_main_thread = threading.current_thread() is threading.main_thread()
        start += f"serve({theirs.fileno()}, {number}, {os.getpid()}, {in_main_thread})"
        one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", start],
            pass_fds=(theirs.fileno(), *files),
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


def _pickled(families, tasks):
    """The families as the workers get them. BadInput for families and tasks that they cannot get."""
    rule = "a function or class of a module, not of the script that is run, or a functools.partial of one"
    if not isinstance(families, dict) or not families:
        raise BadInput(f"families are {short(families)}, and must be a dict, name -> callable")
    for family, make in families.items():
        data = _dumps(make)
        if not isinstance(family, str) or not callable(make) or data is None or b"__main__" in data:
            raise BadInput(f"family {family!r} is {short(make)}: workers can import {rule}")
    for task in tasks:
        if not isinstance(task, (tuple, list)) or len(task) != 3:
            raise BadInput(f"task {short(task)} is not (family, name, data)")
        if task[0] not in families:
            raise BadInput(f"task {task[0]}/{task[1]}: there is no family {task[0]!r}, but {', '.join(families)}")
        if _dumps(task[2]) is None:
            raise BadInput(f"task {task[0]}/{task[1]}: {short(task[2])} cannot be pickled, to send it to a worker")
    return pickle.dumps(families)


def _dumps(x):
    """Pickled, or None where it cannot be."""
    try:
        return pickle.dumps(x)
    except Exception:  # pickle raises TypeError, AttributeError, RecursionError, ...
        return None


# ---------- The block of shared memory ----------


def _fields(num_envs, num_workers, obs_shape, action_shape, action_dtype):
    return {  # name -> shape, dtype
        "action": ((num_envs, *action_shape), action_dtype),
        "obs": ((num_envs, *obs_shape), "f4"),  # the first of an episode
        "final_obs": ((num_envs, *obs_shape), "f4"),  # the successor state of the last step
        "reward": ((num_envs,), "f4"),  # these three are neighbours
        "terminated": ((num_envs,), "?"),
        "success": ((num_envs,), "?"),
        "alive": ((num_envs,), "?"),
        "busy": ((num_workers,), "i4"),  # which environment each worker is at, -1 for none: for the post-mortem
    }


def _bytes(shape, dtype):
    return -(-math.prod(shape) * np.dtype(dtype).itemsize // 64) * 64  # in cache lines of their own


def _block_size(*shapes):
    return sum(_bytes(*field) for field in _fields(*shapes).values())


def _with_room(fds, size):
    """The first of the files that gets room for so many bytes. A write to shared memory without room ends in SIGBUS."""
    for fd in fds:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, size)
            else:
                os.ftruncate(fd, size)
            return fd
        except OSError:
            pass
    folders = f"/dev/shm or {tempfile.gettempdir()}"
    raise BadInput(f"the environments need {size / 1e6:.3g} MB in {folders}: free some, or take fewer environments")


def _block(fd, *shapes):
    """The fields as arrays in the shared file `fd`, and `numbers`: obs, final_obs, reward and what lies between, 0."""
    memory, offset, arrays, ends = mmap.mmap(fd, _block_size(*shapes)), 0, {}, {}
    for name, (shape, dtype) in _fields(*shapes).items():
        arrays[name] = np.ndarray(shape, dtype, memory, offset)
        offset = ends[name] = offset + _bytes(shape, dtype)
    arrays["numbers"] = np.frombuffer(memory, "f4", (ends["reward"] - ends["action"]) // 4, ends["action"])
    return SimpleNamespace(**arrays)


# ---------- The worker's side ----------


class _Server:
    """The environments of one worker."""

    def __init__(self, setup, number):
        self.families, self.number, self.block = pickle.loads(setup), number, None
        self.running = {}  # row -> (family, environment)
        self.idle = defaultdict(list)  # family -> environments to be used again
        self.finished = set()  # rows whose episode ended before its time

    def try_out(self, family, tasks):
        """One step of an environment of its own, and what check_env returns."""
        env = self.families[family]()
        found = check_env(env, tasks)
        env.close()
        return found

    def begin(self, *memory):
        """A meta-episode begins: all environments are to be used again. memory: the block's file and shapes."""
        self.block = self.block or _block(*memory)
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
        obs, info = env.reset(seed=seed)
        self.store(self.block.obs, i, obs)
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
                self.store(block.final_obs, i, obs)
                block.reward[i] = reward
                block.terminated[i] = terminated
                block.success[i] = info.get("success", 0)
                block.alive[i] = 1
                if terminated or truncated:
                    self.finished.add(i)
            if restart:
                obs, _ = env.reset()
                self.store(block.obs, i, obs)
        if restart:
            self.finished.clear()
        busy[self.number] = -1

    def store(self, array, i, obs):
        try:
            fits = len(obs) == array.shape[1]  # one number would be repeated
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(f"the observation has shape {np.shape(obs)}, its space {array.shape[1:]}")
        array[i] = obs

    def close(self):
        for env in [env for _, env in self.running.values()] + sum(self.idle.values(), []):
            env.close()


def serve(socket_fd, number, parent, main_thread):
    """The life of a worker: one answer to each command, until the parent's end of the socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when we end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux" and main_thread:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: when the parent's thread that made us ends
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    stream = socket.socket(fileno=socket_fd).makefile("rwb")
    server = None
    try:
        setup = pickle.load(stream)
        while True:
            command, *arguments = pickle.load(stream)
            try:
                server = server or _Server(setup, number)
                answer = getattr(server, command)(*arguments)
            except BadInput as error:
                answer = error
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
