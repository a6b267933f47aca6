"""HalfCheetah and Ant with a hidden velocity, direction or goal, a whole batch in one call of mujoco.rollout.

The models are those of Gymnasium's HalfCheetah-v5 and Ant-v5; observations and rewards those of VariBAD (Zintgraf et
al., JMLR 2021), which has them from older versions of the two; tasks those of VariBAD or of LDM (Lee and Chung, NeurIPS
2021), whose training tasks surround its test tasks. `split_rule` says which:

                    varibad: train and test alike       ldm: train                       ldm: test (Table 1)
    HalfCheetahVel  velocity in [0, 3)                  [0, 0.5) and [3, 3.5)            [0.5, 3)
    HalfCheetahDir  forward, backward                   (none)
    AntDir          0 and 180 degrees                   0, 90, 180, 270 degrees          45, 135, 225, 315 degrees
    AntGoal         a disc of radius 3                  radii [0, 1) and [2.5, 3)        radii [1, 2.5)

The split "all" joins train and test. Velocities and discs are drawn uniformly, the parts of LDM's sets in proportion to
length and area, and directions each with the same probability. (VariBAD's code takes its two directions of the Ant, +1
and -1, for angles in radian; here they are forward and backward, as its text has them.)

A step is five of MuJoCo's, 0.05 s. The state is float64 and lives on the CPU; tensors out are float32 on the device.
It agrees with one step of Gymnasium's from the same state to rounding; over tens of steps contacts magnify the rounding
(mujoco.rollout starts each step's constraint solver anew). Velocities are (x' - x) / 0.05 s of the torso's position.

The contact forces of the Ant (84 of AntGoal's 113 observations in VariBAD's code, and a cost of at most 0.042 a step)
are left out: they are no part of the state, and since MuJoCo 2.0 zeros stand there unless one asks (VariBAD's Ant ran
on 1.5, or 2.0 with the zeros).
"""

import math
import os

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box

from common.envs.protocol import BadInput, TensorEnvs, cores, generator

try:
    import mujoco
    from mujoco.rollout import Rollout
except RuntimeError as error:  # importing mujoco loads the renderer that MUJOCO_GL names
    raise BadInput(f"MuJoCo does not start with MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {error}") from error

NOISE = 0.1  # of an episode's first state


class Locomotion(TensorEnvs):
    """Back end: N environments, stepped in as many threads as cores. Of a batch of n, a family defines

        xml, obs_dim     file of Gymnasium's model; S
        sets             split rule -> split -> the set of its task parameters
        named(set)       a set's evaluation tasks, name -> vector (G,)
        goals(u)         float64 (N, 2) in [0, 1) -> drawn tasks (N, G); here: one of the evaluation tasks
        observe(q, v)    positions (n, nq), velocities (n, nv) -> obs (n, S)
        reward(q, new_q, a, task)    positions before and after, clipped actions, tasks (n, G) -> (n,)
        healthy(q, v)    bool (n,), whether the episode goes on; None: always to its end
        healthy_reward   of each step after which it does
        models(rows)     a list, the model of each of `rows`, bool (N,); here the one that all share
        frame_skip       MuJoCo's steps in one of ours

    split_rule: varibad or ldm. num_threads: None means one a core; results do not depend on it.
    Raises BadInput for a rule that the family does not have.
    """

    joins = True
    healthy = None
    healthy_reward = 0
    frame_skip = 5
    control_spec = mujoco.mjtState.mjSTATE_CTRL  # what `control` returns

    def __init__(
        self,
        num_envs,
        split="train",
        seed=1,
        device="cpu",
        horizon=200,
        episodes_per_task=2,
        split_rule="varibad",
        num_threads=None,
    ):
        super().__init__(num_envs, split, seed, device, horizon, episodes_per_task)
        name = type(self).__name__
        if split_rule not in self.sets:
            raise BadInput(f"unknown split rule {split_rule!r}: {name} has {' and '.join(self.sets)}")
        self.set = sorted({x for name, part in self.sets[split_rule].items() for x in part if split in (name, "all")})
        self.same_splits = split_rule == "varibad"
        named = self.named(self.set)
        self.tasks = [f"{name}/{which}" for which in named]
        self.task_table = torch.tensor([*named.values()], dtype=torch.float32)
        self.model = mujoco.MjModel.from_xml_path(f"{gymnasium.__path__[0]}/envs/mujoco/assets/{self.xml}")
        self.dt = self.frame_skip * self.model.opt.timestep
        self.single_action_space = Box(-1, 1, (self.model.nu,), np.float32)
        num_threads = min(num_threads or cores(), num_envs)
        self.pool = Rollout(nthread=num_threads)  # kept: it owns the threads
        self.scratch = [mujoco.MjData(self.model) for _ in range(num_threads)]
        self.state = np.zeros((num_envs, 1 + self.model.nq + self.model.nv))  # time, positions, velocities
        self.time, self.q, self.v = np.split(self.state, [1, 1 + self.model.nq], axis=1)  # views

    def models(self, rows):
        return [self.model] * np.count_nonzero(rows)

    def goals(self, u):
        table = self.task_table.to(u.device)
        return table[(u[:, 0] * len(table)).long()]

    def reset(self, tasks=None):
        self.draw = 0 if tasks is not None else self.resets + 1  # named tasks: the same noise every time
        return super().reset(tasks)

    def start(self):
        self.goal = self.task.double().cpu().numpy()
        self.alive = np.ones(self.num_envs, bool)
        return self.place(self.alive, self.elapsed // self.horizon)

    def place(self, rows, *key):
        """First states, of random numbers that `key` names, where `rows`, bool (N,). Returns obs (N, S)."""
        for_q, for_v = generator(self.seed, self.split, self.draw, *key).spawn(2)
        q, v = self.first_states(for_q, for_v)  # a row for each environment: N does not matter
        self.time[rows], self.q[rows], self.v[rows] = 0, q[rows], v[rows]
        return self.tensor(self.observe(self.q, self.v))

    def first_states(self, for_q, for_v):
        """Gymnasium's: positions (N, nq) with noise from U(-0.1, 0.1), velocities (N, nv) from N(0, 0.1^2)."""
        noise = for_q.uniform(-NOISE, NOISE, self.q.shape)
        return self.model.qpos0 + noise, for_v.normal(0, NOISE, self.v.shape)

    def control(self, a, goal):
        """What MuJoCo reads in every substep (n, .), out of clipped actions (n, A) and tasks (n, G)."""
        return a

    def step(self, action):
        """action (N, A), clipped to [-1, 1]. An environment whose episode ended early keeps its state, for reward 0."""
        if self.elapsed == self.meta_horizon:
            raise RuntimeError("the meta-episode is over (or has not begun): call reset() first")
        self.elapsed += 1
        alive, reward = self.alive, np.zeros(self.num_envs)
        if alive.any():
            a = action.detach().clamp(-1, 1).double().cpu().numpy()[alive]
            q, goal = self.q[alive], self.goal[alive]
            controls = np.repeat(self.control(a, goal)[:, None], self.frame_skip, 1)
            states = np.empty((len(a), self.frame_skip, self.state.shape[1]))
            inputs = self.models(alive), self.scratch, self.state[alive], controls
            how = dict(control_spec=self.control_spec, nstep=self.frame_skip, skip_checks=True)  # they cost a tenth
            self.pool.rollout(*inputs, state=states, chunk_size=math.ceil(len(a) / len(self.scratch)), **how)
            self.state[alive] = states[:, -1]
            reward[alive] = self.reward(q, self.q[alive], a, goal)
        info = {"final_obs": self.tensor(self.observe(self.q, self.v))}
        terminated = self.false
        if self.healthy:
            self.alive = np.isfinite(self.state).all(1) & self.healthy(self.q, self.v)
            reward += self.healthy_reward * self.alive
            terminated = torch.from_numpy(alive & ~self.alive).to(self.device)
            info["alive"] = torch.from_numpy(alive).to(self.device)
        ended = self.elapsed % self.horizon == 0
        obs = self.start() if ended else info["final_obs"]
        return obs, self.tensor(reward), terminated, self.true if ended else self.false, info

    def tensor(self, array):
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)

    def close(self):
        self.pool.close()


def between(u, intervals):
    """u in [0, 1) -> uniform over the union of intervals [low, high), given in order."""
    u = u * sum(high - low for low, high in intervals)
    x = u + intervals[0][0]
    for (_, end), (begin, _) in zip(intervals, intervals[1:]):
        x = torch.where(x < end, x, x + (begin - end))
    return x


def inside(x, intervals):
    return any(low <= x < high for low, high in intervals)


def direction(degrees):
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def square(a):
    return (a * a).sum(-1)


# ---------- HalfCheetah ----------


class HalfCheetah(Locomotion):
    """obs (20): positions but x (8), velocities (9), position of the torso (3)."""

    xml = "half_cheetah.xml"
    obs_dim = 20

    def observe(self, q, v):
        torso = np.stack([q[:, 0], 0 * q[:, 0], q[:, 1] + 0.7], 1)  # it stands at 0.7 m where z is 0
        return np.concatenate([q[:, 1:], v, torso], 1)

    def velocity(self, q, new_q):
        return (new_q[:, 0] - q[:, 0]) / self.dt


class HalfCheetahVel(HalfCheetah):
    """task: a velocity v* in m/s (1). reward: -|v - v*| - 0.05 |a|^2."""

    sets = {
        "varibad": {"train": [(0, 3)], "test": [(0, 3)]},
        "ldm": {"train": [(0, 0.5), (3, 3.5)], "test": [(0.5, 3)]},
    }

    def named(self, intervals):
        return {f"{v}": [v] for v in (0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25) if inside(v, intervals)}

    def goals(self, u):
        return between(u[:, :1], self.set).float()

    def reward(self, q, new_q, a, task):
        return -abs(self.velocity(q, new_q) - task[:, 0]) - 0.05 * square(a)


class HalfCheetahDir(HalfCheetah):
    """task: +1 forward, -1 backward (1). reward: the velocity in that direction - 0.05 |a|^2."""

    sets = {"varibad": {"train": [-1, 1], "test": [-1, 1]}}

    def named(self, signs):
        return {"forward" if sign > 0 else "backward": [sign] for sign in signs}

    def reward(self, q, new_q, a, task):
        return task[:, 0] * self.velocity(q, new_q) - 0.05 * square(a)


# ---------- Ant ----------


class AntDir(Locomotion):
    """obs (27): positions but x and y (13), velocities (14). task: cosine and sine of the direction (2).

    reward: the velocity in that direction - 0.5 |a|^2 + 1. Ends early when the torso leaves 0.2 to 1 m; that step
    still has its + 1, as in VariBAD's code (Ant-v5 withholds it).
    """

    xml = "ant.xml"
    obs_dim = 27
    sets = {
        "varibad": {"train": [0, 180], "test": [0, 180]},
        "ldm": {"train": [0, 90, 180, 270], "test": [45, 135, 225, 315]},
    }

    def named(self, degrees):
        return {f"{d}": direction(d) for d in degrees}

    def healthy(self, q, v):
        return (0.2 <= q[:, 2]) & (q[:, 2] <= 1)

    def observe(self, q, v):
        return np.concatenate([q[:, 2:], v], 1)

    def reward(self, q, new_q, a, task):
        return ((new_q - q)[:, :2] / self.dt * task).sum(1) - 0.5 * square(a) + 1


class AntGoal(Locomotion):
    """obs (29): positions (15), velocities (14). task: x and y of a goal in m (2).

    reward: -(|x - x*| + |y - y*|) - 0.1 |a|^2, after the step. Never ends early.
    """

    xml = "ant.xml"
    obs_dim = 29
    sets = {  # radii
        "varibad": {"train": [(0, 3)], "test": [(0, 3)]},
        "ldm": {"train": [(0, 1), (2.5, 3)], "test": [(1, 2.5)]},
    }

    def named(self, radii):
        names = [(r, d) for r in (0.5, 1.75, 2.75) if inside(r, radii) for d in (0, 90, 180, 270)]
        return {f"{r},{d}": [r * x for x in direction(d)] for r, d in names}

    def goals(self, u):
        radius = between(u[:, 0], [(low**2, high**2) for low, high in self.set]).sqrt()  # uniform over the area
        angle = 2 * math.pi * u[:, 1]
        return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).float()

    def observe(self, q, v):
        return np.concatenate([q, v], 1)

    def reward(self, q, new_q, a, task):
        return -abs(new_q[:, :2] - task).sum(1) - 0.1 * square(a)
