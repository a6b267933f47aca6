"""Grid worlds with a hidden goal, on the device: variBAD's (Zintgraf et al., JMLR 2021, section 5.1), LDM's, whose
training and test goals are disjoint (Lee and Chung, NeurIPS 2021, sections 5.1.1 and 5.1.2), and DynaMITE-RL's, with
two goals that take turns (Liang et al., 2024, appendix D.1)."""

import torch
from gymnasium.spaces import Discrete

from common.envs.protocol import SPLITS, TensorEnvs
from common.envs.sessions import Sessions, named_draws, two_contexts

MOVES = [[0, 0], [0, 1], [1, 0], [0, -1], [-1, 0]]  # stay, y + 1, x + 1, y - 1, x - 1


class GridWorld(TensorEnvs):
    """obs (x, y), from (0, 0); +1 where the move ends on the goal, else -0.1; both splits hold all 21 goals.

    rings: split -> the values of max(x, y) of its goals. 5x5, and no goal next to the start. Split all: any of them.
    """

    obs_dim = 2
    size = 5
    rings = dict.fromkeys(SPLITS, (2, 3, 4))
    joins = True
    single_action_space = Discrete(len(MOVES))

    def __init__(self, num_envs, split="train", seed=1, device="cpu", horizon=15, episodes_per_task=4):
        super().__init__(num_envs, split, seed, device, horizon, episodes_per_task)
        cells = [[x, y] for x in range(self.size) for y in range(self.size)]
        self.num_cells = len(cells)
        self.same_splits = self.rings["train"] == self.rings["test"]
        if not hasattr(self, "tasks"):  # a subclass may have its own
            rings = [ring for name, part in self.rings.items() for ring in part if split in (name, "all")]
            goals = [xy for xy in cells if max(xy) in rings]
            self.tasks = [f"{type(self).__name__}/{x},{y}" for x, y in goals]
            self.task_table = torch.tensor(goals, dtype=torch.float32)
        self.cells = torch.tensor(cells, dtype=torch.float32, device=self.device)  # (cells, 2): obs of each
        self.moves = torch.tensor(MOVES, dtype=torch.float32, device=self.device)
        self.goal_table = self.task_table.to(self.device)

    def goals(self, u):
        return self.goal_table[(u[:, 0] * len(self.tasks)).long()]

    def start(self):
        self.cell_xy = torch.zeros(self.num_envs, 2, device=self.device)
        return self.cell_xy

    def move(self, action):
        """action: int64 (N,)."""
        self.cell_xy = (self.cell_xy + self.moves[action]).clamp(0, self.size - 1)
        success = (self.cell_xy == self.task).all(-1)
        return self.cell_xy, torch.where(success, 1.0, -0.1), success

    @classmethod
    def cell(cls, obs):
        """Index size * x + y of the cell of an observation: (..., 2) -> int64 (...)."""
        return (obs[..., 0] * cls.size + obs[..., 1]).long()


class GridWorldLDM(GridWorld):
    """7x7, episodes of 30 steps: 18 training goals in an inner and the outermost ring, 27 test goals between them."""

    size = 7
    rings = dict(train=(2, 6), test=(3, 4, 5))

    def __init__(self, num_envs, split="train", seed=1, device="cpu", horizon=30, episodes_per_task=4):
        super().__init__(num_envs, split, seed, device, horizon, episodes_per_task)


class GridWorldExtrapolation(GridWorldLDM):
    """The outer training goals moved inwards: 16 for training, 16 between them (the paper's test1), 13 outside (test2).

    The paper has the rings in a picture alone; these are read from its text.
    """

    rings = dict(train=(2, 5), test=(3, 4), test2=(6,))
    splits = tuple(rings)


class GridWorldAlternating(Sessions, TensorEnvs):
    """5x5, episodes of 60 steps: two goals that the agent sees, one of which gives + 1 in a session, all else - 0.1.

    obs (6): x, y of the agent, then of the two goals in random order, each / 4 - 0.5 (the scale is ours). The goals are
    two of GridWorld's 21, the same for a whole task; which of them counts is fair at first, and from a session to the
    next changes with probability 0.8. A session begins at (0, 0) (ours: the best possible return is then 42.47, and the
    paper reaches 42.9 +- 0.5). context (2): the cell of the goal that counts; task: the cells of both (4), then the
    context. 512 evaluation tasks, fixed draws.

    other_goal_reward: of the goal that does not count: - 0.1 in the appendix, 0 in section 5.
    """

    obs_dim = 6
    single_action_space = Discrete(len(MOVES))
    same_splits = joins = True

    def __init__(
        self,
        num_envs,
        split="train",
        seed=1,
        device="cpu",
        horizon=60,
        episodes_per_task=1,
        sessions=0,
        session_process="",
        other_goal_reward=-0.1,
    ):
        super().__init__(num_envs, split, seed, device, horizon, episodes_per_task)
        self.set_sessions(sessions, session_process)
        self.other_goal_reward = other_goal_reward
        grid = GridWorld(1, device=device)
        self.goal_table, self.moves = grid.goal_table, grid.moves
        self.tasks = [f"GridWorldAlternating/{i}" for i in range(512)]
        self.task_table = self.goals(named_draws(split, len(self.tasks)).to(self.device))

    def goals(self, u):
        """The cells of two different goals: (N, 4)."""
        count = len(self.goal_table)
        one, steps = (u[:, 0] * count).long(), (u[:, 1] * (count - 1)).long() + 1
        return torch.cat([self.goal_table[one], self.goal_table[(one + steps) % count]], -1)

    def contexts_of(self, session, u):
        return torch.where(two_contexts(session, u).bool().unsqueeze(-1), self.task[:, 2:], self.task[:, :2])

    def start(self):
        self.begin()
        self.cell_xy = torch.zeros(self.num_envs, 2, device=self.device)
        return self.observe()

    def restart(self, ended):
        self.cell_xy = torch.where(ended.unsqueeze(-1), 0.0, self.cell_xy)
        return self.observe()

    def observe(self):
        return torch.cat([self.cell_xy, self.task], -1) / 4 - 0.5

    def move(self, action):
        """action: int64 (N,)."""
        self.cell_xy = (self.cell_xy + self.moves[action]).clamp(0, 4)
        success = (self.cell_xy == self.context).all(-1)
        reward = torch.where(success, 1.0, -0.1)
        if self.other_goal_reward != -0.1:
            other = (self.cell_xy == self.task[:, :2] + self.task[:, 2:] - self.context).all(-1)
            reward = torch.where(other, self.other_goal_reward, reward)
        return self.observe(), reward, success
