"""What is learnt, in seconds: adaptation beyond any policy that ignores rewards, and the belief against Bayes' rule."""

import json

import numpy as np
import pytest
import torch

import dme
import varibad
from common.envs.gridworld import GridWorld
from tests.test_belief import SCRIPTS, signals  # noqa: F401

KLS = {varibad: dict(kl_coef=0.01), dme: dict(beta_w=0.01, beta_y=0.005, beta_z=0.01)}


class ThreeGoals(GridWorld):
    """A grid with a goal at one of three cells, two steps away each."""

    tasks = ["ThreeGoals/2,0", "ThreeGoals/0,2", "ThreeGoals/1,1"]
    task_table = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])

    def goals(self, u):
        return self.goal_table[(u[:, 0] * 3).long()]


def blind_optimum(horizon):
    """The best mean return over the three goals of an episode without a look at rewards: exact, by value iteration."""
    value = np.zeros((7, 7))  # a border of walls around the 5 x 5 cells
    value[[0, -1]] = value[:, [0, -1]] = -np.inf
    reward = np.full((7, 7), -0.1)
    for x, y in ThreeGoals.task_table.int().tolist():
        reward[x + 1, y + 1] += 1.1 / 3
    for _ in range(horizon):
        gain = reward + value
        best = np.max([gain, *(np.roll(gain, shift, axis) for shift in (1, -1) for axis in (0, 1))], 0)
        value = np.where(np.isinf(value), -np.inf, best)
    return value[1, 1]


def train_on_three_goals(script, folder, **changes):
    """Returns of the episodes in the last evaluation."""
    args = dict(
        env_id="tests.test_learning:ThreeGoals", run_dir=str(folder), horizon=4, episodes_per_task=3, num_envs=32,
        total_timesteps=80_000, precollect=1, eval_interval=0, standardise_inputs=False, time_limit="terminal",
        gamma=0.98, gae_lambda=0.98, learning_rate=3e-3, clip_coef=0.2, ent_coef=0.1, ent_coef_end=0.01,
        belief_learning_rate=3e-3, belief_batch=32, buffer_size=3000, hidden_dim=32,
    )  # fmt: skip
    grid = {k: v for k, v in script.PRESETS["GridWorld"].items() if k.startswith("virtual")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "draw_pictures", lambda *_: None)
        script.main(script.Args(**(args | grid | KLS[script] | changes)))
    result = json.loads((folder / "eval.json").read_text())
    return [result[f"eval/test/return_episode_{k}"] for k in (1, 2, 3)]


@SCRIPTS
def test_agent_adapts(script, tmp_path):
    """The last episode beats the optimum without adaptation by half of what there is to gain; 2.9 is all of it."""
    bar = blind_optimum(4)
    assert bar == pytest.approx(0.7)
    first, _, last = train_on_three_goals(script, tmp_path)
    assert last > bar + 0.5 * (2.9 - bar) - 0.1 and last > first + 0.5


@SCRIPTS
def test_floor_keeps_below_the_blind_optimum(script, tmp_path):
    """Without a belief nothing tells the agent about the goal: no episode beats the exact bound."""
    returns = train_on_three_goals(script, tmp_path, belief=False, total_timesteps=25_000)
    assert -0.4 < max(returns) <= blind_optimum(4) + 1e-5


def wander(envs, generator):
    """A meta-episode of each environment under a blind policy that often keeps its direction: a batch of the ELBO."""
    steps, (obs, _) = [], envs.reset()
    for _ in range(envs.meta_horizon):
        fresh = torch.rand(envs.num_envs, generator=generator) < 0.5
        drawn = torch.multinomial(torch.tensor([0.05, 0.3, 0.3, 0.175, 0.175]), len(fresh), True, generator=generator)
        action = torch.where(fresh, drawn, steps[-1]["actions"]) if steps else drawn
        before = obs
        obs, reward, _, _, info = envs.step(action)
        alive = torch.ones_like(fresh)
        steps.append(dict(obs=before, next_obs=info["final_obs"], actions=action, rewards=reward, alive=alive))
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}


def bayes(batch, envs):
    """p(goal) of every cell after 0..T transitions, (T + 1, N, 25): uniform over goals not yet visited, or found."""
    cells, T = envs.cell(batch["next_obs"]).tolist(), envs.meta_horizon
    posterior = np.zeros((T + 1, envs.num_envs, 25))
    for n in range(envs.num_envs):
        support = set(envs.cell(envs.task_table).tolist())
        for t in range(T + 1):
            if t:
                support = {cells[t - 1][n]} if batch["rewards"][t - 1, n] == 1 else support - {cells[t - 1][n]}
            posterior[t, n, list(support)] = 1 / len(support)
    return posterior


@SCRIPTS
def test_belief_approaches_bayes(script):
    """800 updates: on new tasks the decoder at the belief's mean is near the exact posterior."""
    options = dict(
        horizon=6, episodes_per_task=2, belief_batch=32, belief_max_grad_norm=0.3, latent_dim=8, reward_embed=32,
        state_embed=32,
    )  # fmt: skip
    kls = {varibad: dict(kl_coef=0.003), dme: dict(beta_w=0.003, beta_y=0.0, beta_z=0.003, decode_window="all")}
    args = script.Args(**(script.PRESETS["GridWorld"] | options | kls[script]))
    torch.manual_seed(4)
    generator = torch.Generator().manual_seed(4)
    known, new = (ThreeGoals(n, split, 4, "cpu", 6, 2) for n, split in ((20_000, "train"), (200, "test")))
    model, buffer = script.BeliefModel(args, known), script.Buffer(20_000, known)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    buffer.add(wander(known, generator))
    for update in range(800):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - update / 800) + 1e-4
        script.update_belief(model, optimizer, buffer, *[0.0] * (script is dme), args)
    batch = wander(new, generator)
    with torch.no_grad():
        believed = model.reward_decoder(model.posterior(model.hiddens(batch))[-2]).sigmoid().numpy()
    goals, exact = new.cell(new.task_table), bayes(batch, new)
    believed, exact = believed[..., goals], exact[..., goals]
    found = exact.max(-1) == 1
    assert 0.2 < found.mean() < 0.8
    assert abs(believed - exact)[found].mean() < 0.25 * abs(exact[0] - exact)[found].mean()  # sure of the goal
    excluded, open_ = believed[~found][exact[~found] == 0], believed[~found][exact[~found] > 0]
    assert excluded.mean() < 0.1  # visited in vain
    assert open_.mean() == pytest.approx(exact[~found][exact[~found] > 0].mean(), abs=0.12)
