"""envs/mewa.py against recorded episodes and its rules in plain Python, and the exact values of what scores mean.

mewa_reference.json, out of the environment of Stoican et al. (2023): `trajectories`, an episode of random actions for
each of the tasks in which a mistake is certain or impossible; `values` are the rewards that its digits stand for; and
`means`, returns and lengths of many random episodes of each test task, for two policies.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import kstest, qmc

import ldm
import varibad
from common.envs import BadInput, make_envs
from common.envs.mewa import DEVIATION, MEAN, TEST_TASKS
from common.envs.mewa import REFERENCES as ALL_REFERENCES
from tests import mewa_plain as plain
from tests.test_scripts import ALL, metrics, parse, resume_equals_straight, run

RECORDED = json.loads((Path(__file__).parent / "mewa_reference.json").read_text())
TASKS, REFERENCES = np.array(TEST_TASKS), ALL_REFERENCES["MEWA"]
START = plain.START


# ---------- The rules as a model, and its exact values ----------


@pytest.fixture(scope="module")
def model():
    """All states that can be reached and, per state and action, what the plain rules say: `states`, `after` (S, 4, 2),
    `chance` (S, 4), 4 where there is none; per state `reward`, of arriving there, and `going`, False at the end."""
    index, todo = {START: 0}, [START]
    while todo:
        state = todo.pop()
        for action in range(4) if not plain.all_completed(state) else ():
            for mistake in (False, True):
                new = plain.place(state, action, mistake)
                if new not in index:
                    index[new] = len(index)
                    todo.append(new)
    states = list(index)
    after, chance = np.zeros((len(states), 4, 2), int), np.full((len(states), 4), 4)
    for s, state in enumerate(states):
        for action in range(4) if not plain.all_completed(state) else ():
            kind = plain.chance(state, action)
            chance[s, action] = 4 if kind is None else kind
            after[s, action] = [index[plain.place(state, action, kind is not None and m)] for m in (False, True)]
    reward = np.array([plain.reward(state) for state in states])
    going = np.array([not plain.all_completed(state) for state in states])
    return SimpleNamespace(states=states, index=index, after=after, chance=chance, reward=reward, going=going)


def q_values(model, p, value):
    """p (4,), value (S,) of the steps that follow -> (S, 4)."""
    risk = np.append(p, 0)[model.chance]
    total = (model.reward + value)[model.after]
    return ((1 - risk) * total[..., 0] + risk * total[..., 1]) * model.going[:, None]


def solve(model, p):
    """The best return of an episode in a task, and a policy that has it: (S, 4) for each of the 50 steps."""
    value, policy = np.zeros(len(model.states)), []
    for _ in range(plain.HORIZON):
        q = q_values(model, p, value)
        policy.append(np.eye(4)[q.argmax(1)])
        value = q.max(1)
    return value[0], policy[::-1]


def worth(model, p, policy):
    """The expected return of a policy, (S, 4) for each of the 50 steps."""
    value = np.zeros(len(model.states))
    for probabilities in reversed(policy):
        value = (probabilities * q_values(model, p, value)).sum(1)
    return value[0]


def test_exact_values_of_uniform_tasks(model):
    """Those in the code, of the 24 held-out tasks; and what is worth what under the uniform law: one policy for all,
    the posterior mean of four random episodes, the best for each task."""
    held_out = make_envs("MEWAUniform", 24, "test").task_table[:24].double().numpy()
    uniform, one = [np.full((len(model.states), 4), 0.25)] * plain.HORIZON, solve(model, held_out.mean(0))[1]
    for p, *known in zip(held_out, *ALL_REFERENCES["MEWAUniform"].values()):
        found = worth(model, p, uniform), solve(model, p)[0], worth(model, p, one)
        np.testing.assert_allclose(found, known, atol=1e-5, rtol=0)

    law = qmc.Sobol(4, rng=0).random(64)  # they fill the cube evenly: a mean over a few is near that over all
    rng, one = np.random.default_rng(0), solve(model, np.full(4, 0.5))[1]
    risk, rows = np.concatenate([law, np.zeros((64, 1))], 1), np.arange(64)
    met, mistaken = np.zeros((2, 64, 5))
    for _ in range(4):
        state = np.zeros(64, int)
        for _ in range(plain.HORIZON):
            action = rng.integers(4, size=64)
            kind = model.chance[state, action]
            miss = rng.random(64) < risk[rows, kind]
            met[rows, kind] += model.going[state]
            mistaken[rows, kind] += miss * model.going[state]
            state = np.where(model.going[state], model.after[state, action, miss.astype(int)], state)
    posterior = ((mistaken + 1) / (met + 2))[:, :4]  # of a uniform prior
    mean = np.mean([worth(model, p, one) for p in law])
    informed = np.mean([worth(model, p, solve(model, guess)[1]) for p, guess in zip(law, posterior)])
    best = np.mean([solve(model, p)[0] for p in law])
    assert [mean, informed, best] == pytest.approx([-4.51, -2.73, -2.41], abs=0.02)


def task_agnostic(state):
    """Probabilities (4,) of a policy that knows the rules and nothing of a task: coins, where both answers make sense.

    With one block on the goal's structure: go on, or begin another structure first. With two: finish it, or go on with
    one of those that were begun.
    """
    order = [3, 1, 2, 0]
    at = next((i for i, colour in enumerate(order) if not state[colour][3]), 3)
    goal, past, future = order[at], order[:at], order[at + 1 :]
    size = [size for _, size, *_ in state]
    probabilities = np.zeros(4)

    def empty(colours):
        return [colour for colour in colours if size[colour] == 0]

    probabilities[goal] = 1
    if size[goal] == 1 and empty(future):
        probabilities[goal] -= 0.5
        probabilities[empty(future)[0]] += 0.5
    elif size[goal] == 1 and empty(past):  # another coin: whether that counts
        probabilities[goal] -= 0.25
        probabilities[empty(past)[0]] += 0.25
    elif size[goal] == 2 and any(size[colour] == 1 for colour in future):
        probabilities[goal] -= 0.5
        probabilities[next(colour for colour in future if size[colour] == 1)] += 0.5
    return probabilities


def test_exact_values(model):
    """What scores mean: the best return, that of random actions and that of one policy for all, in the code's numbers
    and in those found elsewhere; the policy of coins, which is the paper's task-agnostic one as far as we can tell."""
    coins = [np.array([task_agnostic(state) for state in model.states])] * plain.HORIZON
    uniform = [np.full((len(model.states), 4), 0.25)] * plain.HORIZON
    mean_policy = solve(model, TASKS.mean(0))[1]
    found = dict(
        random=[worth(model, p, uniform) for p in TASKS],
        optimal=[solve(model, p)[0] for p in TASKS],
        best_fixed=[worth(model, p, mean_policy) for p in TASKS],
    )
    assert found.keys() == REFERENCES.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, REFERENCES[name], atol=1e-5, rtol=0, err_msg=name)
    known = dict(random=-6.7313, optimal=-3.6137, best_fixed=-3.7975)
    assert {name: round(np.mean(values), 4) for name, values in found.items()} == known
    agnostic = [worth(model, p, coins) for p in TASKS]
    known = [-1.8065, -1.8473, -1.8898, -2.7145, -3.2817, -4.3725, -4.5897, -5.4179, -5.1354, -7.3251, -9.1337, -9.9013]
    np.testing.assert_allclose(agnostic, known, atol=1e-4, rtol=0)
    np.testing.assert_allclose(worth(model, TASKS[5], solve(model, TASKS[5])[1]), found["optimal"][5])
    # The scores that the README sets beside laser.py's: of coins, and of the best policy for the mean training task.
    low, high = (np.mean(found[name]) for name in ("random", "optimal"))
    trained = [worth(model, p, solve(model, np.array(MEAN))[1]) for p in TASKS]
    assert (np.mean(agnostic) - low) / (high - low) == pytest.approx(0.624, abs=5e-4)
    assert (np.mean(trained) - low) / (high - low) == pytest.approx(0.731, abs=5e-4)


# ---------- The environment ----------


def make(num_envs, p, **options):
    """Environments of the test split with tasks of one's own: p (N, 4) or (4,)."""
    envs = make_envs("MEWA", num_envs, "test", **options)
    envs.goals = lambda u: torch.as_tensor(p, dtype=torch.float32).expand(num_envs, 4).clone()
    return envs


def codes_of(model):
    """The environment's number of each of the model's states, found by observations; its inverse, -1 elsewhere."""
    envs = make_envs("MEWA", 1)
    seen = {tuple(row[:18]): code for code, row in enumerate(envs.obs.int().tolist())}
    codes = np.array([seen[tuple(plain.observation(state))] for state in model.states])
    inverse = np.full(len(envs.obs), -1)
    inverse[codes] = np.arange(len(codes))
    return codes, inverse


@pytest.mark.parametrize("recorded", RECORDED["trajectories"], ids=lambda r: "".join(map(str, r["p"])))
def test_recorded_episodes(recorded):
    """Observations, both rewards and ends, of every step, to the last bit of a float32."""
    digits = {name: np.array(values, np.float32) for name, values in RECORDED["values"].items()}
    rows = [[float(x) for x in row] for row in recorded["obs"].split()]
    length = len(recorded["actions"])
    envs = make(1, recorded["p"])
    obs, _ = envs.reset()
    assert obs[0].tolist() == [*rows[0], 0]
    for t, action in enumerate(recorded["actions"]):
        obs, reward, terminated, truncated, info = envs.step(torch.tensor([int(action)]))
        done = t + 1 == length
        assert info["final_obs"][0].tolist() == [*rows[t + 1], done]
        assert reward.item() == digits["normalised"][int(recorded["normalised"][t])]
        assert info["raw_reward"].item() == digits["raw"][int(recorded["raw"][t])]
        assert bool(terminated | truncated) == done and info["success"] == terminated
        assert obs[0].tolist() == ([*rows[0], 0] if truncated else [*rows[t + 1], done])


def test_transitions(model):
    """In every state that can be reached, of every action: chances and outcomes are those of the plain rules."""
    codes, inverse = codes_of(model)
    envs = make_envs("MEWA", 1)
    np.testing.assert_array_equal(inverse[envs.after.numpy()[codes][model.going]], model.after[model.going])
    assert (envs.after.numpy()[codes][~model.going] == codes[~model.going, None, None]).all()
    np.testing.assert_array_equal(envs.chance.numpy()[codes], model.chance)
    np.testing.assert_array_equal(envs.raw_rewards[envs.level].numpy()[codes], model.reward.astype(np.float32))


def test_frequencies(model, n=2000):
    """Steps from critical states, many of each, of all four kinds: mistakes happen as often as the task says."""
    codes, inverse = codes_of(model)
    critical = np.argwhere((model.chance < 4) & model.going[:, None])
    critical = np.random.default_rng(0).permutation(critical)
    kinds = model.chance[tuple(critical.T)]
    some = np.concatenate([np.flatnonzero(kinds == kind)[:15] for kind in range(4)])
    critical, kinds = critical[some], kinds[some]
    p = np.array([0.1, 0.35, 0.6, 0.95])
    envs = make(60 * n, p, horizon=20)
    envs.reset()
    envs.state = torch.from_numpy(codes[critical[:, 0]]).repeat_interleave(n)
    envs.step(torch.from_numpy(critical[:, 1]).repeat_interleave(n))
    reached = inverse[envs.state.numpy()].reshape(60, n)
    without, mistaken = model.after[tuple(critical.T)].T
    assert ((reached == without[:, None]) | (reached == mistaken[:, None])).all()
    error = (reached == mistaken[:, None]).mean(1) - p[kinds]
    assert (abs(error) / np.sqrt(p[kinds] * (1 - p[kinds]) / n)).max() < 4


@pytest.mark.parametrize("policy", ["random", "task_agnostic"])
def test_statistics(model, policy, n=2500):
    """Returns and lengths of many episodes of each test task: the exact mean, and what was recorded."""
    codes, _ = codes_of(model)
    table = torch.full((4096, 4), 0.25)
    if policy == "task_agnostic":
        table[codes] = torch.tensor(np.array([task_agnostic(state) for state in model.states]), dtype=torch.float32)
    exact = [worth(model, p, [table[codes].numpy()] * plain.HORIZON) for p in TASKS]
    envs = make(12 * n, TASKS.repeat(n, 0), seed=1, episodes_per_task=1)
    generator = torch.Generator().manual_seed(1)
    envs.reset()
    total, length = torch.zeros(2, 12 * n, dtype=torch.float64)
    for _ in range(plain.HORIZON):
        choice = torch.multinomial(table[envs.state], 1, generator=generator).squeeze(1)
        _, _, _, _, info = envs.step(choice)
        total += info["raw_reward"]
        length += info["alive"]
    for task, (mean, recorded) in enumerate(zip(exact, RECORDED["means"][policy])):
        returns = total[task * n : (task + 1) * n]
        error = returns.std().item() / n**0.5
        assert abs(returns.mean().item() - mean) < 3.5 * error + 1e-5, task
        z = (returns.mean().item() - recorded["mean"]) / np.hypot(error, recorded["sem"])
        lengths = length[task * n : (task + 1) * n]
        assert abs(z) < 3.5 and lengths.mean().item() == pytest.approx(recorded["len_mean"], abs=1.5), task


def greedy(p, model):
    """Actions (50, 4096) of the best policy of a task, by the environment's own numbers of states."""
    codes, _ = codes_of(model)
    actions = torch.zeros(plain.HORIZON, 4096, dtype=torch.int64)
    actions[:, codes] = torch.from_numpy(np.array(solve(model, p)[1]).argmax(-1))
    return actions


# ---------- The protocol ----------


def test_perfect_episodes_and_idle_steps(model):
    """Three episodes of a task without mistakes: 12 steps that return 1, then 38 that are idle; then the next one."""
    best = greedy(TASKS[0], model)
    envs = make_envs("MEWA", 2, "test", episodes_per_task=3)
    assert (envs.horizon, envs.meta_horizon, envs.single_action_space.n) == (50, 150, 4)
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(torch.zeros(2, dtype=torch.int64))
    first, info = envs.reset(tasks=["MEWA/0#0", "MEWA/5#0"])
    assert first.shape == (2, 19) and first.dtype == torch.float32
    assert info["task"].tolist() == TASKS[[0, 5]].astype(np.float32).tolist()
    for _ in range(3):
        total, raw, end = 0, 0, None
        for t in range(50):
            actions = torch.stack([best[t, envs.state[0]], torch.tensor(0)])
            obs, reward, terminated, truncated, info = envs.step(actions)
            assert info["alive"].tolist() == [t < 12, True] and terminated.tolist() == [t == 11, False]
            assert torch.equal(terminated, info["success"]) and truncated.tolist() == [t == 49] * 2
            assert info["final_obs"][:, 18].tolist() == [float(t >= 11), float(t == 49)]
            if t >= 12:
                assert reward[0] == info["raw_reward"][0] == 0
                assert torch.equal(info["final_obs"][0], end)
            end = info["final_obs"][0]
            assert torch.equal(obs, first if t == 49 else info["final_obs"])
            total, raw = total + reward, raw + info["raw_reward"]
        # The second one adds to one colour only, which never pays: the worst return there is, 0.
        assert total.tolist() == pytest.approx([1, 0], abs=1e-5)
        assert raw.tolist() == pytest.approx([REFERENCES["optimal"][0], 50 * plain.REWARDS[0]], abs=1e-5)
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("horizon", [12, 20, 100])
def test_other_horizons(model, horizon):
    """The normalised return of an episode without a mistake is 1, of one without progress 0, whatever the horizon."""
    best = greedy(TASKS[0], model)
    envs = make(2, TASKS[0], horizon=horizon, episodes_per_task=1)
    envs.reset()
    total = 0
    for t in range(horizon):
        actions = torch.stack([best[min(t, 49), envs.state[0]], torch.tensor(0)])
        total = total + envs.step(actions)[1]
    assert total.tolist() == pytest.approx([1, 0], abs=1e-5)
    assert envs.score({"MEWA/0#0": [0.0]}) == {}


def test_short_horizon():
    """Fewer steps than a castle takes: BadInput that says how many those are."""
    with pytest.raises(BadInput, match="12"):
        make_envs("MEWA", 1, horizon=11)


def play(num_envs, seed=1, split="train", tasks=None, resets=2):
    """Everything that `resets` meta-episodes of fixed actions bring: tasks (resets, N, 4), observations (., N, 19)."""
    envs = make_envs("MEWA", num_envs, split, seed)
    actions = torch.randint(4, (50, 1), generator=torch.Generator().manual_seed(7)).repeat(4, 1)  # in every episode
    found, drawn = [], []
    for _ in range(resets):
        drawn.append(envs.reset(tasks)[1]["task"])
        found += [envs.step(action.expand(num_envs))[4]["final_obs"] for action in actions]
    return torch.stack(drawn), torch.stack(found)


def test_draws():
    """Tasks and mistakes: the same with the same seed, for each environment alone; others elsewhere."""
    before = torch.get_rng_state()
    tasks, obs = play(8, seed=3)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(play(8, seed=3), (tasks, obs)))
    for one, few in zip((tasks, obs), play(5, seed=3)):
        assert torch.equal(one[:, :5], few)  # whatever the number of environments
    for other in (play(8, seed=4), play(8, seed=3, split="test")):
        assert not torch.equal(other[0], tasks) and not torch.equal(other[1], obs)
    assert not torch.equal(tasks[0], tasks[1]) and len(tasks.unique(dim=1)) > 1
    envs, other = make_envs("MEWA", 4), make_envs("MEWA", 4)
    envs.reset(), envs.reset()
    other.load_state_dict(envs.state_dict())
    assert torch.equal(envs.reset()[1]["task"], other.reset()[1]["task"]) and torch.equal(envs.u, other.u)
    torch.set_rng_state(before)
    envs.step(torch.zeros(4, dtype=torch.int64))
    assert torch.equal(torch.get_rng_state(), before)


def test_episodes_differ():
    """Mistakes are drawn anew in each episode of a task, and for each environment and each name of a task."""
    names = ["MEWA/5#0", "MEWA/5#1", "MEWA/5#0"]
    tasks, obs = play(3, split="test", tasks=names, resets=1)
    assert len(tasks[0].unique(dim=0)) == 1
    episodes = obs.view(4, 50, 3, 19)
    assert all(not torch.equal(episodes[i], episodes[j]) for i in range(4) for j in range(i))
    assert all(not torch.equal(obs[:, i], obs[:, j]) for i in range(3) for j in range(i))  # named twice: other draws
    assert torch.equal(obs[:, 1], play(3, split="test", tasks=names[1:] + names[1:2], resets=1)[1][:, 0])
    assert torch.equal(obs, play(3, seed=9, split="test", tasks=names, resets=1)[1])  # with every seed


def test_tasks():
    """Twelve test tasks under nine names each; 3,000 training tasks, drawn as described, the same with every seed."""
    test, train = make_envs("MEWA", 12, "test"), make_envs("MEWA", 4000, seed=2)
    assert len(test.tasks) == len(set(test.tasks)) == 108
    assert test.tasks[:13] == [f"MEWA/{i}#0" for i in range(12)] + ["MEWA/0#1"]
    for first in range(0, 108, 12):
        assert torch.equal(test.reset(test.tasks[first : first + 12])[1]["task"], torch.tensor(TEST_TASKS))
    assert {tuple(p) for p in test.reset()[1]["task"].tolist()} <= {tuple(p) for p in test.task_table.tolist()}
    pool = train.drawn_from
    assert pool.shape == (3000, 4) and train.tasks == [f"MEWA/{i}" for i in range(108)]
    assert torch.equal(pool, make_envs("MEWA", 1, seed=8).drawn_from)
    drawn = torch.cat([train.reset()[1]["task"] for _ in range(8)])
    assert len(drawn.unique(dim=0)) > 2990 and torch.isin(drawn, pool).all()
    np.testing.assert_allclose(pool.mean(0), MEAN, atol=4 * DEVIATION / 3000**0.5)
    np.testing.assert_allclose(pool.std(0), [DEVIATION] * 4, rtol=0.06)
    assert abs(np.corrcoef(pool.T) - np.eye(4)).max() < 0.08
    assert (pool < 0).any() and train.p.min() == 0 and train.p.max() <= 1  # clipped where used, not where drawn
    assert not {tuple(p) for p in pool.tolist()} & {tuple(p) for p in test.task_table.tolist()}
    names = ["MEWA/3"] * 2000 + ["MEWA/7"] * 2000
    assert torch.equal(train.reset(names)[1]["task"], pool[[3] * 2000 + [7] * 2000])


def test_uniform_tasks():
    """Other tasks, all else alike: uniform in training; in the test split 24 of them, four times, and MEWA's names."""
    test, train = make_envs("MEWAUniform", 24, "test"), make_envs("MEWAUniform", 2000, seed=2)
    own, names = [f"MEWAUniform/{i}#{n}" for n in range(4) for i in range(24)], make_envs("MEWA", 1, "test").tasks
    assert test.tasks == own + names and train.tasks == [f"MEWAUniform/{i}" for i in range(108)]
    first = test.reset(own[:24])[1]["task"]
    assert torch.equal(first, test.reset(own[72:])[1]["task"]) and len(first.unique(dim=0)) == 24
    assert torch.equal(test.reset(names[12:36])[1]["task"], torch.tensor(TEST_TASKS * 2))
    pool = train.drawn_from
    assert torch.equal(pool, make_envs("MEWAUniform", 1, seed=8).drawn_from)
    assert torch.isin(train.reset()[1]["task"], pool).all()
    assert not {tuple(p) for p in pool.tolist()} & {tuple(p) for p in test.task_table.tolist()}
    for x in pool.T.numpy():
        assert kstest(x, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(pool.T) - np.eye(4)).max() < 0.08
    exact = ALL_REFERENCES["MEWAUniform"]
    returns = {f"MEWAUniform/{i}#{n}": [exact["random"][i], exact["optimal"][i]] for i in range(24) for n in range(2)}
    returns |= {f"MEWA/{i}#0": [REFERENCES["random"][i], REFERENCES["best_fixed"][i]] for i in range(12)}
    scalars = test.score(returns)
    assert scalars["score_episode_1"] == pytest.approx(0) and scalars["score_episode_2"] == pytest.approx(1)
    assert [scalars[f"{name}/MEWA"] for name in ("score", "best_fixed_score")] == pytest.approx([0.941] * 2, abs=5e-4)
    assert scalars["best_fixed_score"] == pytest.approx((7.2697 - 4.4996) / (7.2697 - 2.3193), abs=1e-3)
    assert scalars["score/MEWA/9"] == pytest.approx(1, abs=1e-4) and len(scalars) == 4 + 2 + 36


def test_score():
    """0 for random actions, 1 for the best, the bar of one policy for all; repetitions of a task are averaged first."""
    envs = make_envs("MEWA", 2, "test")
    names, reference = [f"MEWA/{i}#{n}" for i in range(12) for n in range(2)], REFERENCES
    noise = {0: 0.3, 1: -0.3}
    returns = {
        name: [reference[which][int(name.split("/")[1][:-2])] + noise[int(name[-1])] for which in ("random", "optimal")]
        for name in names
    }
    scalars = envs.score(returns)
    assert scalars["score_episode_1"] == pytest.approx(0) and scalars["score_episode_2"] == pytest.approx(1)
    assert scalars["score"] == scalars["score_episode_2"]
    assert scalars["best_fixed_score"] == pytest.approx(0.941, abs=5e-4)
    assert [scalars[f"score/MEWA/{i}"] for i in range(12)] == pytest.approx([1] * 12) and len(scalars) == 16
    fixed = {f"MEWA/{i}#0": [reference["best_fixed"][i]] for i in range(12)}
    assert envs.score(fixed)["score"] == pytest.approx(envs.score(fixed)["best_fixed_score"])
    assert np.mean([envs.score(fixed)[f"score/MEWA/{i}"] for i in range(12)]) == pytest.approx(0.908, abs=5e-4)
    some = envs.score({"MEWA/5#0": [-4.0], "MEWA/2#0": [-2.0]})  # with --eval-tasks
    expected = (-6.0 + 3.57722 + 7.45891) / (-1.69384 - 3.60342 + 3.57722 + 7.45891)
    assert some["score"] == pytest.approx(expected) and len(some) == 5
    assert make_envs("MEWA", 1).score({"MEWA/0": [0.0]}) == {}


# ---------- In the scripts ----------


@ALL
def test_evaluation(script, tmp_path):
    """Reported are raw returns, in training too, and what they score; the rewards that are learned from are not raw."""
    words = ["--env-id", "MEWA", "--horizon", 50, "--total-timesteps", 800, "--eval-tasks", 24]
    buffer = run(script, tmp_path, *words, eval_interval=0)["processes"][0]["buffer"]["store"]
    assert buffer["rewards"].view(-1, 2, 50).sum(-1).min() >= -1e-5  # of normalised ones, episodes return 0 to 1
    found = json.loads((tmp_path / "eval.json").read_text())
    for split in ("train", "test"):
        returns = np.array([task["return"] for task in found["tasks"][split].values()])
        assert returns.shape == (24, 2) and (-11.3 < returns).all() and (returns < -1.59).all()
        assert found[f"eval/{split}/return"] == pytest.approx(returns[:, 1].mean())
    random, optimal = (np.mean(REFERENCES[name]) for name in ("random", "optimal"))
    for name, value in (("score_episode_1", returns[:, 0].mean()), ("score", returns[:, 1].mean())):
        assert found[f"eval/test/{name}"] == pytest.approx((value - random) / (optimal - random))
    assert sum("/score/MEWA/" in key for key in found) == 12 and not any("train/score" in key for key in found)
    logged = {key: float(value) for _, key, value in metrics(tmp_path)[1:]}
    assert logged["eval/test/score"] == found["eval/test/score"] and -11.3 < logged["charts/episodic_return"] < -1.59


def test_resume(tmp_path):
    """Mistakes, too, come again: a run that was interrupted equals one that was not, to the last bit."""
    resume_equals_straight(varibad, tmp_path, "--env-id", "MEWA", "--horizon", 12, "--total-timesteps", 384)


def test_sizes_of_the_preset():
    """Parameters of variBAD's parts are those of LaSER's Table 4, whose policy has four more: a Gaussian's spread."""
    args, envs = parse(varibad, "--env-id", "MEWA"), make_envs("MEWA", 1)
    model = varibad.BeliefModel(args, envs)
    agent = varibad.Agent(args, 19, envs.single_action_space, model.belief_sizes)
    parts = dict(policy=agent, **dict(model.named_children()))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert count["encoder"] + count["heads"] == 76_538 and count["reward_decoder"] == 8_337
    assert count["policy"] + 4 == 101_001 + 704


@ALL
def test_meta_device(script):
    """Rollouts where tensors have shapes and no data: nothing waits for a number, nothing is elsewhere."""
    args, device = parse(script, "--env-id", "MEWA"), torch.device("meta")
    args.horizon, args.episodes_per_task = 12, 2
    envs = make_envs("MEWA", 3, "test", device=device, horizon=12, episodes_per_task=2)
    with device:
        model = script.BeliefModel(args, envs)
        sizes = dict(b=2 * args.policy_latent_dim) if script is ldm else model.belief_sizes
        agent = script.Agent(args, 19, envs.single_action_space, sizes)
    for tasks in (None, ["MEWA/1#0"] * 3):
        data = script.rollout(envs, agent, model, args, tasks=tasks)
        assert {x.device for x in data.values() if isinstance(x, torch.Tensor)} == {device}
