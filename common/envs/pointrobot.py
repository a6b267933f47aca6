"""SparsePointRobot: a point looks for a goal on a half circle, on the device.

The SparsePointEnv of VariBAD's code (Zintgraf et al., JMLR 2021).
"""

import math

import numpy as np
import torch
from gymnasium.spaces import Box

from common.envs.protocol import TensorEnvs

RADIUS = 0.2  # of the disc around the goal in which there is a reward
ANGLES = [(i + 0.5) * math.pi / 24 for i in range(24)]  # the fixed evaluation goals


class SparsePointRobot(TensorEnvs):
    """obs (x, y), from the origin; a step of 0.1 * clip(action, -1, 1); goals on the unit half circle y >= 0.

    Reward 1 - distance to the goal after the step where that is at most 0.2, else 0. Training draws the angle
    uniformly from (0, pi); evaluation covers 24 fixed angles in both splits.
    """

    obs_dim = 2
    same_splits = True
    single_action_space = Box(-1, 1, (2,), np.float32)
    tasks = [f"SparsePointRobot/{math.degrees(angle):.2f}" for angle in ANGLES]
    task_table = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in ANGLES], dtype=torch.float32)

    def __init__(self, num_envs, split="train", seed=1, device="cpu", horizon=100, episodes_per_task=3):
        super().__init__(num_envs, split, seed, device, horizon, episodes_per_task)

    def goals(self, u):
        angle = u[:, 0] * math.pi
        return torch.stack([angle.cos(), angle.sin()], -1).float()

    def start(self):
        self.position = torch.zeros(self.num_envs, 2, device=self.device)
        return self.position

    def move(self, action):
        """action: float32 (N, 2)."""
        self.position = self.position + 0.1 * action.clamp(-1, 1)
        distance = (self.position - self.task).norm(dim=-1)
        success = distance <= RADIUS
        return self.position, torch.where(success, 1 - distance, 0.0), success
