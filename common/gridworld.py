"""GridWorld: variBAD's 5x5 grid with a hidden goal (Zintgraf et al., JMLR 2021, section 5.1), on the device."""

import torch
from gymnasium.spaces import Discrete

from common.envs import TensorEnvs

SIZE = 5
MOVES = [[0, 0], [0, 1], [1, 0], [0, -1], [-1, 0]]  # stay, y + 1, x + 1, y - 1, x - 1
GOALS = [[x, y] for x in range(SIZE) for y in range(SIZE) if x > 1 or y > 1]  # 21: none next to the start


class GridWorld(TensorEnvs):
    """obs (x, y), from (0, 0); +1 where the move ends on the goal, else -0.1; both splits hold all 21 goals."""

    obs_dim = 2
    num_cells = SIZE * SIZE
    same_splits = True
    single_action_space = Discrete(len(MOVES))
    tasks = [f"GridWorld/{x},{y}" for x, y in GOALS]
    task_table = torch.tensor(GOALS, dtype=torch.float32)

    def __init__(self, num_envs, split="train", seed=1, device="cpu", horizon=15, episodes_per_task=4):
        super().__init__(num_envs, split, seed, device, horizon, episodes_per_task)
        self.moves = torch.tensor(MOVES, dtype=torch.float32, device=self.device)
        self.goal_table = self.task_table.to(self.device)

    def goals(self, u):
        return self.goal_table[(u[:, 0] * len(GOALS)).long()]

    def start(self):
        self.cell_xy = torch.zeros(self.num_envs, 2, device=self.device)
        return self.cell_xy

    def move(self, action):
        """action: int64 (N,)."""
        self.cell_xy = (self.cell_xy + self.moves[action]).clamp(0, SIZE - 1)
        success = (self.cell_xy == self.task).all(-1)
        return self.cell_xy, torch.where(success, 1.0, -0.1), success

    @staticmethod
    def cell(obs):
        """Index 5 x + y of the cell of an observation: (..., 2) -> int64 (...)."""
        return (obs[..., 0] * SIZE + obs[..., 1]).long()
