"""The environments' protocol: what every family, back end and environment of your own has in common.

    obs, info = envs.reset()                                          # every environment draws a new task
    obs, reward, terminated, truncated, info = envs.step(action)

Gymnasium's VectorEnv in shape, with tensors on `device` and beside it `horizon` H, `episodes_per_task` K,
`meta_horizon` K*H, `split`, `tasks`. All N environments run in lockstep: after H steps the episode ends everywhere
(`truncated`), every environment is reset into the same task, `obs` is the next episode's first observation and
`info["final_obs"]`, present at every step, the true successor state. After K episodes the caller calls `reset()`; a
step without it raises RuntimeError.

What comes back

    obs, info["final_obs"]       float32 (N, S)
    reward                       float32 (N,)
    terminated, truncated        bool (N,)
    info["success"]              bool (N,), at this step; at none where the family defines no success
    info["alive"]                bool (N,), False for the steps that an environment idles after an early termination;
                                 absent where a family never terminates early. Nothing may learn from idle steps: the
                                 encoder reads them like any others, in rollouts and updates alike; no loss counts them
    info["raw_reward"]           float32 (N,), where `reward` is a normalised one: what reported returns are sums of
    info["task"]                 float32 (N, G), at reset: the ground truth, for oracles and evaluation only
    info["session_end"]          bool (N,), where episodes have sessions (sessions.py): whether this was the last
                                 transition of one. Then `obs` may be a new first state, final_obs is the true successor
    info["context"]              float32 (N, C), there, at reset too: the latent context of the next transition, the
                                 ground truth, for oracles, evaluation and pictures only

Evaluation, splits, random draws

    envs.tasks                   names of the split's fixed evaluation tasks, "family/which"; `reset(tasks=names)`
                                 sets N of them and draws nothing
    envs.repeat                  1, to be set before a reset: so many neighbours share a task, as environment i draws it
                                 with row i // repeat. P * repeat environments then have the tasks of P with repeat 1;
                                 first states, and all else that is random within a task, differ all the same
    envs.phase                   0, to be set before a reset: with another number the tasks are the same, and all that
                                 is random within them differs; for those who play the same tasks twice (laser.py)
    state_dict, load_state_dict  all that decides later draws: the number of resets so far

What may be absent

    envs.sessions                where there are sessions, their number in an episode; and session_process, which says
                                 how their ends are drawn
    envs.splits                  names of the splits, where there are more than train and test
    envs.joins                   True where a split "all", for oracles, holds the tasks of all others
    envs.same_splits             True where the test split holds the training tasks, all of them
    envs.score(returns)          scalars by name out of the raw returns of evaluation tasks, name -> K numbers, on the
                                 scale that the family's papers have
    envs.film                    film(name, row, actions, path) replays a meta-episode into a GIF
    envs.integer_obs             True where observations are integers from 0 to 255
    envs.reward_values           all rewards that there are, 0 among them, a tensor

How to make environments of your own stands in __init__.py.
"""

import os
from collections import Counter

import numpy as np
from gymnasium.spaces import Box

from common.envs.cgroup import cpu_quota

SPLITS = ("train", "test")  # what every family has
ALL_SPLITS = (*SPLITS, "test2", "all")  # a split's place in it is part of the seed: new ones go to the end


class BadInput(ValueError):
    """A user's mistake in one sentence that names the culprit; the scripts print it and exit with status 2."""


class WorkerError(RuntimeError):
    """An environment raised, died or hung, in one sentence that names it; the worker's traceback is its note."""


def cores():
    """Our share of the cores, at least 1: those that we may run on, or fewer where a container's quota of CPU time says
    so, divided by the processes that torchrun starts on a machine."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        available = os.process_cpu_count()
    else:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, int(min(available or 1, cpu_quota())) // from_environment("LOCAL_WORLD_SIZE", 1, at_least=1))


def from_environment(name, default, at_least=0):
    """The integer in the environment variable `name`, as torchrun sets it; `default` where there is none."""
    text = os.environ.get(name, str(default))
    if not text.strip().isdecimal() or int(text) < at_least:
        raise BadInput(
            f"the environment has {name}={text!r}, no integer from {at_least} on: without torchrun, unset it"
        )
    return int(text)


def check_tasks(envs, names):
    """BadInput unless `names` are as many as there are environments, and all in `envs.tasks`."""
    if len(names) != envs.num_envs:
        raise BadInput(f"{len(names)} tasks for {envs.num_envs} environments")
    for name in names:
        if name not in envs.tasks:
            raise BadInput(f"unknown task {name!r}: {envs.split} has {envs.tasks[0]} to {envs.tasks[-1]}")


def generator(seed, split, *key):
    """A numpy generator for what `key`, integers, names. Tasks, first states and seeds are all drawn from one of these.

    NumPy pads a short seed with zeros: a key of at most two integers is the same one without zeros at its end.
    """
    return np.random.default_rng((seed, ALL_SPLITS.index(split), *key))


def uniforms(seed, split, resets, num_envs, dim):
    """Random numbers in [0, 1), float64 (num_envs, dim), for the reset number `resets` of a split.

    Row i depends on (seed, split, resets, i) alone: neither on the number of environments nor on that of workers,
    and all that a checkpoint must keep is the number of resets.
    """
    return generator(seed, split, resets).random((num_envs, dim))


class TensorEnvs:
    """Back end for families whose state is a tensor on the device: time, resets and draws of the protocol.

    A family defines `obs_dim`, `single_action_space`, `tasks`,

        task_table    what the names in `tasks` stand for, float32 (len(tasks), G)
        goals(u)      float64 (N, 2) in [0, 1) -> the tasks that it draws, float32 (N, G)
        start()       a new episode in `self.task` (N, G) -> obs (N, S)
        move(action)  one step -> final_obs (N, S), reward (N,), success (N,)
    """

    def __init__(self, num_envs, split, seed, device, horizon, episodes_per_task):
        import torch  # here, not above: worker processes import this module, and have no use for torch

        self.num_envs, self.split, self.seed, self.device = num_envs, split, seed, torch.device(device)
        self.horizon, self.episodes_per_task = horizon, episodes_per_task
        self.meta_horizon = horizon * episodes_per_task
        self.single_observation_space = Box(-np.inf, np.inf, (self.obs_dim,), np.float32)
        self.families = [type(self).__name__]
        self.resets, self.repeat, self.phase = 0, 1, 0
        self.elapsed = self.meta_horizon  # steps since reset(): a step before the first reset is one too many
        self.false = torch.zeros(num_envs, dtype=torch.bool, device=self.device)
        self.true = ~self.false

    def reset(self, tasks=None):
        """New tasks: drawn, or those named. Returns obs (N, S), info with `task` (N, G). BadInput: see check_tasks."""
        import torch

        self.named = tasks
        if tasks is None:
            u = uniforms(self.seed, self.split, self.resets, self.num_envs, 2)
            u = u[np.arange(self.num_envs) // self.repeat]  # (N, 2)
            self.task = self.goals(torch.from_numpy(u).to(self.device))
            self.resets += 1
        else:
            check_tasks(self, tasks)
            rows = [self.tasks.index(name) for name in tasks]
            self.task = self.task_table.to(self.device)[torch.tensor(rows, device=self.device)]
        self.elapsed = 0
        return self.start(), {"task": self.task}

    def step(self, action):
        if self.elapsed == self.meta_horizon:
            raise RuntimeError("the meta-episode is over (or has not begun): call reset() first")
        final_obs, reward, success = self.move(action)
        self.elapsed += 1
        ended = self.elapsed % self.horizon == 0
        obs = self.start() if ended else final_obs
        return obs, reward, self.false, self.true if ended else self.false, {"final_obs": final_obs, "success": success}

    def keyed(self, *key):
        """`key`, an episode first, and the phase: a longer one than any without, so that these are never shared."""
        return (*key, 0, self.phase) if self.phase else key

    def draws(self, purpose, dim):
        """Random numbers in [0, 1) for the episode that begins, float64 (N, dim). purpose: an integer for their use.

        Row i depends on (seed, split, resets, i, episode, phase), or on the task's name, how often it was named before
        i, and the split, the episode and the phase: an evaluation has the same draws with every seed. No two of these
        share a row; but those of another `dim` do: who plays a task in environments of another size needs a phase.
        """
        key = self.keyed(self.elapsed // self.horizon, purpose)
        if self.named is None:
            return generator(self.seed, self.split, self.resets, *key).random((self.num_envs, dim))
        rows = [self.tasks.index(name) for name in self.named]
        nth, count = [], Counter()  # how often environment i's task was named before
        for row in rows:
            nth.append(count[row])
            count[row] += 1
        keys = [key, *[(*key, n) for n in range(1, max(nth) + 1)]]
        u = [generator(0, self.split, 0, *k).random((len(self.tasks), dim)) for k in keys]  # a table for each n
        return np.stack([u[n][row] for n, row in zip(nth, rows)])

    def state_dict(self):
        return {"resets": self.resets}

    def load_state_dict(self, state):
        self.resets = state["resets"]

    def close(self):
        pass
