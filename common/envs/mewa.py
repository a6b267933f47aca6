"""MEWA's castle task, of LaSER ("Task-Specific Exploration in Meta-Reinforcement Learning via Task Reconstruction",
sections 5.1.1 and E.1), on the device: states are numbered, and a step looks up what follows.

A castle has a structure of three blocks of each colour: red, blue, green, orange is the order in which they pay. An
action puts one of the five blocks of a colour on its structure. The second block of a structure may be a mistake, with
a probability that depends on how many structures are begun: then the third one takes all three down again. To begin
another structure first costs a step and changes the probability. What is hidden, and differs between tasks, are the
four probabilities; which action is best in a critical state depends on them.

The rules are written from a description of the environment of Stoican et al. (2023), and agree with recorded episodes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Discrete

from common.envs.protocol import BadInput, TensorEnvs, generator
from common.envs.sessions import FOR_TASKS

COLOURS = ("orange", "blue", "green", "red")
GOALS = (3, 1, 2)  # red, blue, green; then orange, with which the castle is complete
# By progress: the number of GOALS completed, in order, after the step; 0 for the step that completes the castle.
REWARDS = (-0.22448296658694744, -0.18796557560563087, -0.10312814265489578, -0.09230244904756546, 0.0)
USED = (0, 2, 4, 8, 8)  # of the supervisor's eight blocks
SHORTEST = 12  # steps of an episode without a mistake
# The training tasks are 3,000 draws from independent normal distributions, clipped to [0, 1] where they are used.
MEAN = (0.3821256458759308, 0.27761128544807434, 0.18698181211948395, 0.09432228654623032)
DEVIATION = 0.12
TRAIN_TASKS = 3000
FOR_MISTAKES = 4  # the last part of a key of `generator`, as in common/envs/sessions.py
REPEATS = 9  # of each test task in an evaluation, as in the paper: a single episode says little
TEST_TASKS = (  # Table 3, to all digits; the last six are out of the training distribution
    (0.0, 0.0, 0.0, 0.0),
    (0.05, 0.0, 0.0, 0.0),
    (0.1, 0.0, 0.0, 0.0),
    (0.7721256458759309, 0.0, 0.0, 0.0),
    (0.6721256458759308, 0.6176112854480744, 0.0, 0.0),
    (0.6221256458759308, 0.6176112854480744, 0.5769818121194839, 0.4343222865462303),
    (0.6221256458759308, 0.6176112854480744, 0.5769818121194839, 0.5343222865462303),
    (0.872125645875931, 0.8176112854480746, 0.7769818121194838, 0.0),
    (0.6721256458759308, 0.6676112854480745, 0.6269818121194839, 0.5843222865462303),
    (0.9721256458759311, 0.9676112854480747, 0.9269818121194838, 0.3843222865462303),
    (0.9721256458759311, 0.9676112854480747, 0.9269818121194838, 0.7843222865462303),
    (0.9721256458759311, 0.9676112854480747, 0.9269818121194838, 0.8843222865462301),
)
# Exact returns of the test tasks (raw, undiscounted, 50 steps), by dynamic programming over all states: of random
# actions, of the best policy for each task, and of one policy for all twelve, the best for the mean of their
# probabilities.
# fmt: off
REFERENCES = {
    "random": (-3.55038, -3.56378, -3.57722, -3.76160, -4.39160, -7.45891,
               -7.85304, -7.11244, -8.36073, -9.53743, -10.70902, -10.89939),
    "optimal": (-1.59915, -1.68593, -1.69384, -1.69384, -1.91832, -3.60342,
                -4.29401, -2.14281, -4.74734, -3.33376, -7.43099, -9.22139),
    "best_fixed": (-2.14281, -2.14281, -2.14281, -2.14281, -2.14281, -3.60342,
                   -4.30138, -2.14281, -4.75414, -3.33378, -7.46516, -9.25468),
}
# fmt: on

# What a colour has: PARTS[code % 4], blocks in its structure and whether there was a mistake; and whether a structure
# of it has been completed: code // 4. A block more, without and with a mistake: completed after the third one, taken
# down where there was a mistake; two blocks are left after completion, so that then a third one changes nothing.
PARTS = ((0, 0), (1, 0), (2, 0), (2, 1))
NEXT = ((1, 2, 4, 0, 5, 6, 6, 7), (1, 3, 4, 0, 5, 7, 6, 7))
NO_CHANCE = 4  # of a mistake: the index of a probability beside the task's four
COMPLETE = 4  # the level of a state in which the castle is


def rules():
    """All that can happen. A state is the four colours' codes as digits of base 8, 4,096 of them; state 0 is the start.

    Returns
        obs       float32 (states, 19): blocks left (4), blocks in the structure and mistake of each colour (8),
                  completed (4), the supervisor's blocks left and used, and whether the castle is complete
        level     int64 (states,): progress, 4 where the castle is complete
        chance    int64 (states, 4): which of a task's probabilities an action meets, or NO_CHANCE
        after     int64 (states, 4, 2): the next state, without and with a mistake
    """
    codes = torch.cartesian_prod(*[torch.arange(8)] * len(COLOURS))  # (states, colours)
    structure, mistake = torch.tensor(PARTS)[codes % 4].unbind(-1)
    completed = codes // 4
    complete = completed.prod(-1)
    level = completed[:, GOALS].cumprod(-1).sum(-1) + complete  # (states,)
    used = torch.tensor(USED)[level]
    obs = torch.cat(
        [
            5 - 3 * completed - structure,
            torch.stack([structure, mistake], -1).flatten(1),
            completed,
            torch.stack([USED[-1] - used, used, complete], -1),
        ],
        -1,
    ).float()
    begun = (structure > 0).sum(-1, keepdim=True)
    going = ~complete.bool().unsqueeze(-1)  # at the end of an episode a state stays as it is
    chance = torch.where((structure == 1) & going, begun - 1, NO_CHANCE)
    digits = (torch.tensor(NEXT).T[codes] - codes.unsqueeze(-1)) * going.unsqueeze(-1)  # (states, colours, 2)
    after = torch.arange(len(codes)).view(-1, 1, 1) + digits * torch.tensor([512, 64, 8, 1]).view(-1, 1)
    return obs, level, chance, after


class MEWA(TensorEnvs):
    """obs (19): see `rules`; its last number is 1 in an episode's last state, complete or not. Four actions: colours.

    An episode ends early when the castle is complete. The reward is normalised: divided by a scale, and with a constant
    at an episode's last step, such that one without a mistake and a detour returns 1, and one that never gets beyond
    progress 0 returns 0. info["raw_reward"] is not: its sum is what papers report.

    task (4): the probabilities of a mistake with one structure begun, two, three, four. Train: 3,000 fixed draws; an
    evaluation takes 108 of them, "MEWA/<i>". Test: 12 fixed tasks, each under nine names, "MEWA/<i>#<n>", whose
    mistakes are other draws. The first 12 names are those of all 12 tasks.
    """

    obs_dim = 19
    integer_obs = True
    single_action_space = Discrete(len(COLOURS))

    def __init__(self, num_envs, split="train", seed=1, device="cpu", horizon=50, episodes_per_task=4):
        if horizon < SHORTEST:
            raise BadInput(f"horizon must be at least {SHORTEST} steps, which a castle takes, not {horizon}")
        super().__init__(num_envs, split, seed, device, horizon, episodes_per_task)
        count = REPEATS * len(TEST_TASKS)
        if split == "test":
            self.tasks = [f"MEWA/{i}#{n}" for n in range(REPEATS) for i in range(len(TEST_TASKS))]
            drawn_from = torch.tensor(TEST_TASKS)
            self.task_table = drawn_from.repeat(REPEATS, 1)
        else:
            self.tasks = [f"MEWA/{i}" for i in range(count)]
            p = generator(0, split, 0, 0, FOR_TASKS).normal(MEAN, DEVIATION, (TRAIN_TASKS, len(MEAN)))
            drawn_from = torch.from_numpy(p).float()
            self.task_table = drawn_from[:count]
        self.drawn_from = drawn_from.to(self.device)
        self.obs, self.level, self.chance, self.after = (x.to(self.device).contiguous() for x in rules())
        raw = torch.tensor(REWARDS, dtype=torch.float64)
        worst, best = horizon * raw[0], 2 * raw[0] + 3 * raw[1:4].sum()
        normalised = raw / (best - worst)
        last = normalised - worst / (best - worst)
        self.raw_rewards, self.rewards, self.last_rewards = (x.float().to(self.device) for x in (raw, normalised, last))
        self.reward_values = torch.cat([self.rewards, self.last_rewards, torch.zeros(1, device=self.device)])

    def goals(self, u):
        return self.drawn_from[(u[:, 0] * len(self.drawn_from)).long()]

    def reset(self, tasks=None):
        obs, info = super().reset(tasks)
        u = torch.from_numpy(self.draws(FOR_MISTAKES, self.meta_horizon))  # at once: no later step waits for the CPU
        self.u = u.to(self.device).T.contiguous()  # float64 (K * H, N)
        self.p = F.pad(self.task.double().clamp(0, 1), (0, 1))  # (N, 5): NO_CHANCE is a probability of 0
        return obs, info

    def start(self):
        self.state = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        return self.obs[self.state]

    def move(self, action):
        """action: int64 (N,)."""
        self.alive = self.level[self.state] < COMPLETE
        choice = len(COLOURS) * self.state + action
        p = self.p.gather(1, self.chance.view(-1)[choice].unsqueeze(-1)).squeeze(-1)
        self.state = self.after.view(-1)[2 * choice + (self.u[self.elapsed] < p)]
        level = self.level[self.state]
        success = self.alive & (level == COMPLETE)
        self.raw_reward = self.raw_rewards[level]  # 0 where idle, as all is complete there
        obs = self.obs[self.state]
        if (self.elapsed + 1) % self.horizon:
            reward = torch.where(success, self.last_rewards[COMPLETE], self.rewards[level])
        else:
            reward = torch.where(self.alive, self.last_rewards[level], 0.0)
            obs[:, -1] = 1
        return obs, reward, success

    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, info["success"], truncated, info | {"alive": self.alive, "raw_reward": self.raw_reward}

    def score(self, returns):
        """Where raw returns lie between random actions, 0, and the best possible, 1. Scalars by name.

        returns: name of a test task -> what its K episodes returned.
        score_episode_<k>   of the mean over tasks; `score` is the last episode's
        score/<task>        of a task's last episode
        best_fixed_score    of a policy that does not adapt, `best_fixed`: 0.941 for all twelve tasks. A score below it
                            is no evidence of adaptation; a difference between episodes is
        Nothing, where there are no exact references: for other splits and horizons.
        """
        if self.split != "test" or self.horizon != 50:
            return {}
        rows = {}
        for name, episodes in returns.items():
            rows.setdefault(name.split("#")[0], []).append(episodes)
        means = np.stack([np.mean(episodes, 0) for episodes in rows.values()])  # (tasks, K)
        numbers = [int(task.split("/")[1]) for task in rows]
        random, optimal, best_fixed = (np.array(REFERENCES[key])[numbers] for key in REFERENCES)
        episodes = (means.mean(0) - random.mean()) / (optimal.mean() - random.mean())
        scalars = {f"score_episode_{k + 1}": float(score) for k, score in enumerate(episodes)}
        scalars["score"] = float(episodes[-1])
        scalars["best_fixed_score"] = float((best_fixed - random).mean() / (optimal - random).mean())
        each = (means[:, -1] - random) / (optimal - random)
        return scalars | {f"score/{task}": float(score) for task, score in zip(rows, each)}
