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
HELD_OUT, HELD_OUT_REPEATS = 24, 4  # tasks of MEWAUniform's test split beside those, and the repeats of each
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
# actions, of the best policy for each task, and of one policy for all of a family, the best for the mean of their
# probabilities.
# fmt: off
REFERENCES = {"MEWA": {
    "random": (-3.55038, -3.56378, -3.57722, -3.76160, -4.39160, -7.45891,
               -7.85304, -7.11244, -8.36073, -9.53743, -10.70902, -10.89939),
    "optimal": (-1.59915, -1.68593, -1.69384, -1.69384, -1.91832, -3.60342,
                -4.29401, -2.14281, -4.74734, -3.33376, -7.43099, -9.22139),
    "best_fixed": (-2.14281, -2.14281, -2.14281, -2.14281, -2.14281, -3.60342,
                   -4.30138, -2.14281, -4.75414, -3.33378, -7.46516, -9.25468),
}, "MEWAUniform": {
    "random": (-5.72850, -8.40043, -6.93459, -5.31088, -6.13088, -6.18033, -9.07578, -8.44730,
               -8.70871, -7.07400, -8.70044, -6.19227, -8.83058, -7.19772, -8.13518, -5.30836,
               -8.64452, -7.11858, -7.17354, -4.86361, -9.92266, -7.93810, -7.53111, -4.92406),
    "optimal": (-2.23538, -3.40189, -2.17028, -2.03625, -2.30597, -2.14557, -2.91906, -1.99671,
                -1.90035, -2.46782, -2.87334, -2.25891, -2.06696, -1.81688, -1.86587, -2.01711,
                -3.34787, -3.04141, -2.28597, -2.02402, -2.75289, -1.98498, -1.77720, -1.97165),
    "best_fixed": (-11.00108, -6.01797, -2.82701, -3.56910, -2.30597, -7.09386, -2.91906, -1.99671,
                   -1.90035, -3.06101, -2.87334, -8.11503, -2.06696, -2.00383, -5.60545, -2.16466,
                   -3.34787, -7.79435, -9.77093, -4.27129, -2.75289, -1.98498, -1.77720, -10.76962),
}}
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
        if split == "test":
            sets = self.test_sets()
            self.tasks = [f"{name}/{i}#{n}" for name, p, repeats in sets for n in range(repeats) for i in range(len(p))]
            self.task_table = torch.cat([p.repeat(repeats, 1) for _, p, repeats in sets])
            drawn_from = torch.cat([p for _, p, _ in sets])
        else:
            drawn_from = self.draw_tasks(split, TRAIN_TASKS)
            self.task_table = drawn_from[: REPEATS * len(TEST_TASKS)]
            self.tasks = [f"{type(self).__name__}/{i}" for i in range(len(self.task_table))]
        self.drawn_from = drawn_from.to(self.device)
        self.obs, self.level, self.chance, self.after = (x.to(self.device).contiguous() for x in rules())
        raw = torch.tensor(REWARDS, dtype=torch.float64)
        worst, best = horizon * raw[0], 2 * raw[0] + 3 * raw[1:4].sum()
        normalised = raw / (best - worst)
        last = normalised - worst / (best - worst)
        self.raw_rewards, self.rewards, self.last_rewards = (x.float().to(self.device) for x in (raw, normalised, last))
        self.reward_values = torch.cat([self.rewards, self.last_rewards, torch.zeros(1, device=self.device)])

    def test_sets(self):
        """Of the test split: the family's name, its tasks (., 4), and under how many names each comes."""
        return [("MEWA", torch.tensor(TEST_TASKS), REPEATS)]

    def draw_tasks(self, split, count):
        """The fixed draws of a split, the same ones with every seed: float32 (count, 4)."""
        p = generator(0, split, 0, 0, FOR_TASKS).normal(MEAN, DEVIATION, (count, len(MEAN)))
        return torch.from_numpy(p).float()

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
        The first and the last are those of the family that is named as the environment; of another one that it
        evaluates in there are score/<family> and best_fixed_score/<family>.
        Nothing, where there are no exact references: for other splits and horizons.
        """
        if self.split != "test" or self.horizon != 50:
            return {}
        rows, scalars = {}, {}
        for name, episodes in returns.items():
            rows.setdefault(name.split("#")[0], []).append(episodes)
        for family in dict.fromkeys(task.split("/")[0] for task in rows):
            tasks = [task for task in rows if task.split("/")[0] == family]
            means = np.stack([np.mean(rows[task], 0) for task in tasks])  # (tasks, K)
            numbers = [int(task.split("/")[1]) for task in tasks]
            random, optimal, best_fixed = (np.array(values)[numbers] for values in REFERENCES[family].values())
            episodes = (means.mean(0) - random.mean()) / (optimal.mean() - random.mean())
            own = family == type(self).__name__
            if own:
                scalars |= {f"score_episode_{k + 1}": float(score) for k, score in enumerate(episodes)}
            fixed = float((best_fixed - random).mean() / (optimal - random).mean())
            end = "" if own else f"/{family}"
            scalars |= {f"score{end}": float(episodes[-1]), f"best_fixed_score{end}": fixed}
            each = (means[:, -1] - random) / (optimal - random)
            scalars |= {f"score/{task}": float(score) for task, score in zip(tasks, each)}
        return scalars


class MEWAUniform(MEWA):
    """MEWA with other tasks (ours): independent probabilities, uniform between 0 and 1.

    MEWA's training tasks are so alike that to know which one it is pays little: in raw return -2.386 for the best
    policy of the mean task, -2.246 for the posterior after four random episodes, -2.156 for the best of each task. Here
    it is -4.51, -2.73, -2.41: the place to see whether something is learned of a task.

    Train: 3,000 fixed draws. Test: the 12 tasks of MEWA under their names, and 24 draws, each under four names,
    "MEWAUniform/<i>#<n>". The scores of the two are reported apart.
    """

    def test_sets(self):
        return [("MEWAUniform", self.draw_tasks("test", HELD_OUT), HELD_OUT_REPEATS), *super().test_sets()]

    def draw_tasks(self, split, count):
        return torch.from_numpy(generator(0, split, 0, 0, FOR_TASKS).random((count, len(MEAN)))).float()
