"""Back end: MuJoCo environments, a whole batch in one call of mujoco.rollout.

A step is `frame_skip` of MuJoCo's. The state is float64 and lives on the CPU; tensors out are float32 on the device. A
step agrees with one of Gymnasium's from the same state to rounding; over tens of steps contacts magnify the rounding
(mujoco.rollout starts each step's constraint solver anew).
"""

import math

from common.envs.film import mujoco  # first: it explains why importing mujoco may fail

# isort: split
import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from mujoco.rollout import Rollout

from common.envs.protocol import BadInput, TensorEnvs, cores, generator

NOISE = 0.1  # of an episode's first state


class MujocoEnvs(TensorEnvs):
    """N environments, stepped in as many threads as cores. Of a batch of n of them, a family defines

        xml, obs_dim     file of Gymnasium's model; S
        sets             split rule -> split -> the set of its task parameters
        named(set)       a set's evaluation tasks, name -> vector (G,)
        goals(u)         float64 (N, 2) in [0, 1) -> drawn tasks (N, G); here: one of the evaluation tasks
        observe(q, v)    positions (n, nq), velocities (n, nv) -> obs (n, S)
        reward(q, new_q, a, task)    positions before and after, actions (n, A), tasks (n, G) -> (n,)
        control_cost     whose actions these are: raw, the policy's, in a space without bounds; or clipped, those that
                         MuJoCo gets
        healthy(q, v)    bool (n,), whether the episode goes on; None: always to its end
        healthy_reward   of each step after which it does
        models(rows)     a list, the model of each of `rows`, bool (N,); here the one that all share
        first_states     see there, and `control`
        frame_skip       MuJoCo's steps in one of ours, `dt` seconds

    and finds here, float64, time (N, 1), q (N, nq), v (N, nv), which are views of `state`, and the tasks, goal (N, G);
    and whose episode goes on: alive, bool (N,).

    split_rule: varibad or ldm. control_cost: "" is the family's own. num_threads: None means one a core; results do not
    depend on it. Raises BadInput for a rule that the family does not have.
    """

    joins = True
    healthy = None
    healthy_reward = 0
    frame_skip = 5
    control_cost = "clipped"
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
        control_cost="",
        num_threads=None,
    ):
        super().__init__(num_envs, split, seed, device, horizon, episodes_per_task)
        name = type(self).__name__
        if split_rule not in self.sets:
            raise BadInput(f"unknown split rule {split_rule!r}: {name} has {' and '.join(self.sets)}")
        parts = self.sets[split_rule]
        chosen = parts.values() if split == "all" else [parts[split]]
        self.control_cost = control_cost or self.control_cost
        if self.control_cost not in ("raw", "clipped"):
            raise BadInput(f"unknown control cost {control_cost!r}: {name} has raw and clipped")
        self.set = sorted({x for part in chosen for x in part})
        self.same_splits = split_rule == "varibad"
        named = self.named(self.set)
        self.tasks = [f"{name}/{which}" for which in named]
        self.task_table = torch.tensor([*named.values()], dtype=torch.float32)
        self.model = mujoco.MjModel.from_xml_path(f"{gymnasium.__path__[0]}/envs/mujoco/assets/{self.xml}")
        self.dt = self.frame_skip * self.model.opt.timestep
        bound = np.inf if self.control_cost == "raw" else 1  # what is paid for is what others may have to see
        self.single_action_space = Box(-bound, bound, (self.model.nu,), np.float32)
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
        for_q, for_v = generator(self.seed, self.split, self.draw, *self.keyed(*key)).spawn(2)
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
            reward[alive] = self.advance(alive, action.detach().double().cpu().numpy()[alive])
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

    def advance(self, rows, a):
        """MuJoCo's steps where `rows`, bool (N,); a (n, A), the policy's actions there. Returns their rewards (n,)."""
        q, goal, clipped = self.q[rows], self.goal[rows], a.clip(-1, 1)
        states = np.empty((len(a), self.frame_skip, self.state.shape[1]))
        self.pool.rollout(
            self.models(rows),
            self.scratch,
            self.state[rows],
            np.repeat(self.control(clipped, goal)[:, None], self.frame_skip, 1),  # (n, frame_skip, .)
            control_spec=self.control_spec,
            skip_checks=True,  # they cost a tenth of the time
            nstep=self.frame_skip,
            state=states,
            chunk_size=math.ceil(len(a) / len(self.scratch)),
        )
        self.state[rows] = states[:, -1]
        return self.reward(q, self.q[rows], a if self.control_cost == "raw" else clipped, goal)

    def tensor(self, array):
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)

    def close(self):
        self.pool.close()
