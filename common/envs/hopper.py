"""HopperMass: Gymnasium's Hopper-v5 with other masses, inertias, frictions and dampings (LaSER's environment).

A task is 41 exponents e, one for each number that MuJoCo's model has of

    body_mass (5,), body_inertia (5, 3), geom_friction (5, 3), dof_damping (6,)

in this order, which becomes 1.5^e times what Hopper-v5 has there, elementwise. What counts is four masses, an inertia
of each (the motion is in a plane), three dampings (those of the root's joints are 0) and, of the floor's and the foot's
sliding friction, the larger one.

                   number   e, independent
    train          3000     U(-1, 1)
    test           30       |e| of U(1, 1.5), either sign with the same probability: outside the training tasks

Both are fixed draws; a reset draws one of them. The model is not compiled again: what MuJoCo derives from the four at
that time (mj_setConst) stays that of Hopper-v5, as in LaSER's code.

Rewards, ends and observations are Gymnasium's: dx/dt - 0.001 |a|^2, and 1 where the new state is healthy, else the
episode ends. A step is four of MuJoCo's, 0.008 s. Actions are clipped, in the reward too.
"""

import copy

import numpy as np

from common.envs.mujoco_batch import MujocoEnvs
from common.envs.sessions import named_draws

BASE = 1.5
VARIED = ("body_mass", "body_inertia", "geom_friction", "dof_damping")


class HopperMass(MujocoEnvs):
    """obs (12): positions but x (5), velocities clipped at 10 (6), 1 after an early end, else 0. task: e (41).

    Each environment has a model of its own, of 0.5 MB.
    """

    xml = "hopper.xml"
    obs_dim = 12
    frame_skip = 4
    healthy_reward = 1
    joins = False
    sets = {"laser": {"train": [(0, 1)], "test": [(1, 1.5)]}}  # |e|
    sizes = {"train": 3000, "test": 30}

    def __init__(
        self, num_envs, split="train", seed=1, device="cpu", horizon=400, episodes_per_task=4, num_threads=None
    ):
        super().__init__(num_envs, split, seed, device, horizon, episodes_per_task, "laser", num_threads=num_threads)
        self.copies = [copy.copy(self.model) for _ in range(num_envs)]  # self.model keeps the originals

    def named(self, intervals):
        [(low, high)] = intervals
        u = 2 * named_draws(self.split, self.sizes[self.split], 41) - 1
        exponents = u.sign() * (low + (high - low) * u.abs())
        return {f"{i}": row for i, row in enumerate(exponents.tolist())}

    def reset(self, tasks=None):
        obs, info = super().reset(tasks)
        originals = [getattr(self.model, name) for name in VARIED]
        ends = np.cumsum([original.size for original in originals])
        for model, weights in zip(self.copies, BASE**self.goal):
            for name, original, part in zip(VARIED, originals, np.split(weights, ends[:-1])):
                getattr(model, name)[:] = original * part.reshape(original.shape)
        return obs, info

    def models(self, rows):
        return [self.copies[i] for i in np.flatnonzero(rows)]

    def first_states(self, for_q, for_v):
        """Gymnasium's: positions and velocities with noise from U(-0.005, 0.005)."""
        q, v = (generator.uniform(-0.005, 0.005, self.q.shape) for generator in (for_q, for_v))
        return self.model.qpos0 + q, v

    def healthy(self, q, v):
        bounded = (abs(np.hstack([q[:, 2:], v])) < 100).all(1)
        return bounded & (q[:, 1] > 0.7) & (abs(q[:, 2]) < 0.2)

    def observe(self, q, v):
        return np.hstack([q[:, 1:], v.clip(-10, 10), ~self.healthy(q, v)[:, None]])

    def reward(self, q, new_q, a, task):
        return (new_q - q)[:, 0] / self.dt - 1e-3 * (a * a).sum(-1)
