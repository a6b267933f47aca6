"""Reacher and HalfCheetah whose goal, direction, velocity or wind changes from session to session, on batched MuJoCo.

The environments of DynaMITE-RL (Liang et al., 2024, appendix D.2), which ran them on Brax: the models here are
Gymnasium's Reacher-v5 and HalfCheetah-v5, so that returns differ in size. i = 0, 1, .. is the number of a
session in its episode:

                                context                                             reward of a step
    Reacher                     goal r (cos(alpha i), sin(alpha i)) in m            -|fingertip - goal| - 0.05 |a|
    HalfCheetahDirSessions      +1 or -1                                            context v - 0.5 |a|
    HalfCheetahVelSessions      v* = 1.5 + 1.5 sin(0.2 i) in m/s                    -|v - v*| - 0.05 |a|
    HalfCheetahWindVelSessions  v* and a wind of 10 + 10 sin(0.3 i) N               the same

|a| is the Euclidean norm of the action, not its square, and v the velocity of the torso over the step. Episodes have
400 steps. Four sessions of Poisson lengths (the paper has these for one experiment on HalfCheetahVelSessions alone) and
a first state at the start of each (`reset_state`) are ours. The 25 evaluation tasks are fixed draws; of Reacher's r and
alpha, of the direction, and of the sessions' lengths, which are all that two tasks of the other two differ in.
"""

import math

import numpy as np
import torch

from common.envs.film import mujoco
from common.envs.locomotion import HalfCheetah
from common.envs.mujoco_batch import MujocoEnvs
from common.envs.protocol import SPLITS, BadInput
from common.envs.sessions import Sessions, named_draws, two_contexts


class LocomotionSessions(Sessions, MujocoEnvs):
    """Back end: `goal`, which rewards and forces read, is the context (n, C), float64. No task beside it: G = 0.

    reset_state: whether a session begins with a first state; else where the last one ended.
    """

    own_process = "poisson"
    sets = {"varibad": dict.fromkeys(SPLITS, ())}

    def __init__(
        self,
        num_envs,
        split="train",
        seed=1,
        device="cpu",
        horizon=400,
        episodes_per_task=1,
        sessions=0,
        session_process="",
        reset_state=True,
        num_threads=None,
    ):
        super().__init__(num_envs, split, seed, device, horizon, episodes_per_task, num_threads=num_threads)
        self.set_sessions(sessions, session_process)
        self.reset_state = reset_state

    def named(self, _):
        return {f"{i}": task for i, task in enumerate(self.goals(named_draws(self.split, 25)).tolist())}

    def goals(self, u):
        return u[:, :0].float()

    def start(self):
        obs = super().start()
        self.begin()
        return obs

    def enter(self, t):
        super().enter(t)
        self.goal = self.contexts[t].cpu().numpy()

    def restart(self, ended):
        return self.place(ended.cpu().numpy(), self.elapsed // self.horizon, self.elapsed % self.horizon)


def norm(a):
    return np.sqrt((a * a).sum(-1))


class Reacher(LocomotionSessions):
    """obs (8): cosines, sines of the two joints, their velocities, position of the fingertip: the target is hidden.

    task: r in [0.1, 0.2) m and alpha in [0, 2 pi), then the context. A step is two of MuJoCo's, 0.02 s.

    angle_step: None for angles alpha i (the formula); else alpha + angle_step i (its "initial angle" alpha).
    """

    xml = "reacher.xml"
    obs_dim = 8
    frame_skip = 2

    def __init__(
        self, num_envs, split="train", seed=1, device="cpu", angle_step=None, sessions=0, session_process="", **options
    ):
        self.angle_step = angle_step
        super().__init__(num_envs, split, seed, device, sessions=sessions, session_process=session_process, **options)

    def goals(self, u):
        return torch.stack([0.1 + 0.1 * u[:, 0], 2 * math.pi * u[:, 1]], -1).float()

    def contexts_of(self, session, u):
        r, alpha = self.task.double().T
        angle = alpha * session if self.angle_step is None else alpha + self.angle_step * session
        return torch.stack([r * angle.cos(), r * angle.sin()], -1)

    def first_states(self, for_q, for_v):
        """Gymnasium's: positions with noise from U(-0.1, 0.1), velocities from U(-0.005, 0.005)."""
        q = self.model.qpos0 + for_q.uniform(-0.1, 0.1, self.q.shape)
        v = for_v.uniform(-0.005, 0.005, self.v.shape)
        q[:, 2:], v[:, 2:] = self.model.qpos0[2:], 0  # the model's own target: nothing feels or sees it
        return q, v

    def fingertip(self, q):
        inner, outer = q[:, :1], q[:, :1] + q[:, 1:2]  # angles of the two links, of 0.1 and 0.11 m
        return 0.1 * np.hstack([np.cos(inner), np.sin(inner)]) + 0.11 * np.hstack([np.cos(outer), np.sin(outer)])

    def observe(self, q, v):
        return np.hstack([np.cos(q[:, :2]), np.sin(q[:, :2]), v[:, :2], self.fingertip(q)])

    def reward(self, q, new_q, a, goal):
        return -norm(self.fingertip(new_q) - goal) - 0.05 * norm(a)


class HalfCheetahSessions(LocomotionSessions, HalfCheetah):
    """obs (17): positions but x (8), velocities (9)."""

    obs_dim = 17

    def observe(self, q, v):
        return np.hstack([q[:, 1:], v])


class HalfCheetahDirSessions(HalfCheetahSessions):
    """context: +1 forward, -1 backward, fair at first; the next session's is the other with probability 0.8 (ours: the
    grid's; the paper names none).

    action_cost: what a step pays for its action: norm, 0.5 |a|; printed, -0.5 |a|, as in the paper, where flailing pays
    more than running; or squared, 0.05 |a|^2, as in variBAD's code.
    """

    action_costs = dict(
        norm=lambda a: 0.5 * norm(a), printed=lambda a: -0.5 * norm(a), squared=lambda a: 0.05 * (a * a).sum(-1)
    )

    def __init__(
        self,
        num_envs,
        split="train",
        seed=1,
        device="cpu",
        action_cost="norm",
        sessions=0,
        session_process="",
        **options,
    ):
        if action_cost not in self.action_costs:
            raise BadInput(f"unknown action_cost {action_cost!r}: known are {', '.join(self.action_costs)}")
        self.action_cost = self.action_costs[action_cost]
        super().__init__(num_envs, split, seed, device, sessions=sessions, session_process=session_process, **options)

    def contexts_of(self, session, u):
        return 1 - 2.0 * two_contexts(session, u).unsqueeze(-1)

    def reward(self, q, new_q, a, goal):
        return goal[:, 0] * self.velocity(q, new_q) - self.action_cost(a)


class HalfCheetahVelSessions(HalfCheetahSessions):
    """context: a velocity v* in m/s."""

    def contexts_of(self, session, u):
        return 1.5 + 1.5 * (0.2 * session.double()).sin().unsqueeze(-1)

    def reward(self, q, new_q, a, goal):
        return -abs(self.velocity(q, new_q) - goal[:, 0]) - 0.05 * norm(a)


class HalfCheetahWindVelSessions(HalfCheetahVelSessions):
    """context: v* and a force in N that pushes the torso backwards (the paper's "opposing"; ours: along -x)."""

    control_spec = mujoco.mjtState.mjSTATE_CTRL | mujoco.mjtState.mjSTATE_XFRC_APPLIED

    def contexts_of(self, session, u):
        wind = 10 + 10 * (0.3 * session.double()).sin().unsqueeze(-1)
        return torch.cat([super().contexts_of(session, u), wind], -1)

    def control(self, a, goal):
        forces = np.zeros((len(a), self.model.nbody, 6))  # force and torque on each body
        forces[:, self.model.body("torso").id, 0] = -goal[:, 1]
        return np.hstack([a, forces.reshape(len(a), -1)])
