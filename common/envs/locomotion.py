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

A step is five of MuJoCo's (mujoco_batch.py), 0.05 s. Velocities in rewards are (x' - x) / 0.05 s of the torso's
position. The action a in a reward is the policy's, not clipped to [-1, 1] as what MuJoCo gets is: so it is in VariBAD's
and in LDM's code. `control_cost` clipped has the other.

The contact forces of the Ant (84 of AntGoal's 113 observations in VariBAD's code, and a cost of at most 0.042 a step)
are left out: they are no part of the state, and since MuJoCo 2.0 zeros stand there unless one asks (VariBAD's Ant ran
on 1.5, or 2.0 with the zeros).
"""

import math

import numpy as np
import torch

from common.envs.mujoco_batch import MujocoEnvs


def between(u, intervals):
    """u in [0, 1) -> uniform over the union of intervals [low, high), given in order."""
    u = u * sum(high - low for low, high in intervals)
    x = u + intervals[0][0]
    for (_, end), (begin, _) in zip(intervals, intervals[1:]):
        x = torch.where(x < end, x, x + (begin - end))
    return x


def inside(x, intervals):
    """Whether x lies in the union of intervals [low, high)."""
    return any(low <= x < high for low, high in intervals)


def direction(degrees):
    """The unit vector [cosine, sine]."""
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def square(a):
    """|a|^2: (n, A) -> (n,)."""
    return (a * a).sum(-1)


# ---------- HalfCheetah ----------


class HalfCheetah(MujocoEnvs):
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

    control_cost = "raw"
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

    control_cost = "raw"
    sets = {"varibad": {"train": [-1, 1], "test": [-1, 1]}}

    def named(self, signs):
        return {"forward" if sign > 0 else "backward": [sign] for sign in signs}

    def reward(self, q, new_q, a, task):
        return task[:, 0] * self.velocity(q, new_q) - 0.05 * square(a)


# ---------- Ant ----------


class AntDir(MujocoEnvs):
    """obs (27): positions but x and y (13), velocities (14). task: cosine and sine of the direction (2).

    reward: the velocity in that direction - 0.5 |a|^2 + 1. Ends early when the torso leaves 0.2 to 1 m; that step
    still has its + 1, as in VariBAD's code (Ant-v5 withholds it).
    """

    xml = "ant.xml"
    obs_dim = 27
    control_cost = "raw"
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


class AntGoal(MujocoEnvs):
    """obs (29): positions (15), velocities (14). task: x and y of a goal in m (2).

    reward: -(|x - x*| + |y - y*|) - 0.1 |a|^2, after the step. Never ends early.
    """

    xml = "ant.xml"
    obs_dim = 29
    control_cost = "raw"
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
