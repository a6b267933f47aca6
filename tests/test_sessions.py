"""Sessions: the laws of their ends, the protocol, the alternating grid against plain Python and its exact values, and
the MuJoCo environments against Gymnasium's."""

import collections
import functools
import itertools
import math

import gymnasium
import mujoco
import numpy as np
import pytest
import torch

import varibad
from common.envs import BadInput, make_envs
from common.envs.gridworld import GridWorldAlternating
from common.envs.locomotion_sessions import HalfCheetahDirSessions, Reacher
from common.envs.sessions import session_ends, two_contexts
from tests.floors import floors
from tests.test_scripts import main, resume_equals_straight

MUJOCO = ["Reacher", "HalfCheetahDirSessions", "HalfCheetahVelSessions", "HalfCheetahWindVelSessions"]
IDS = ["GridWorldAlternating", *MUJOCO]
ALL_IDS = pytest.mark.parametrize("env_id", IDS)
MOVES = [(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)]


def random_actions(envs, seed=0):
    """For a whole meta-episode; half of the continuous ones beyond the bounds: (T, N, ...)."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(envs.single_action_space, "n"):
        return torch.randint(5, (envs.meta_horizon, envs.num_envs), generator=generator)
    shape = envs.meta_horizon, envs.num_envs, *envs.single_action_space.shape
    return 1.5 * (2 * torch.rand(shape, generator=generator) - 1)


def lengths_of(ends):
    """(H, N) -> the session lengths of each environment."""
    return [tuple(np.diff(np.flatnonzero(column), prepend=-1)) for column in ends.T]


def chi_square(counts, expected):
    """Of counts against expected ones, in deviations from its mean: normal where there are many cells."""
    counts, expected = np.array(counts, float), np.array(expected, float)
    assert counts.sum() == pytest.approx(expected.sum())
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


# ---------- When sessions end ----------


def test_fixed_lengths():
    ends = session_ends("fixed", 4, 60, np.zeros((2, 60)))
    assert ends.dtype == bool and ends.shape == (60, 2) and lengths_of(ends) == [(15,) * 4] * 2


@pytest.mark.parametrize("sessions, horizon", [(2, 6), (3, 8), (4, 9), (7, 9)])
def test_poisson_law(sessions, horizon):
    """Of all admissible lengths: the product of Poisson probabilities, up to a constant; by enumeration."""
    rate, law = horizon / sessions, {}
    for lengths in itertools.product(range(1, horizon), repeat=sessions - 1):
        if sum(lengths) < horizon:
            weight = math.prod(rate**n * math.exp(-rate) / math.factorial(n) for n in lengths)
            law[(*lengths, horizon - sum(lengths))] = weight
    ends = session_ends("poisson", sessions, horizon, np.random.default_rng(1).random((20_000, horizon)))
    found = collections.Counter(lengths_of(ends))
    assert found.keys() <= law.keys()
    total = sum(law.values())
    often = [lengths for lengths in law if law[lengths] > 1e-3 * total]
    counts = [found[lengths] for lengths in often] + [20_000 - sum(found[x] for x in often)]
    expected = [20_000 * law[x] / total for x in often]
    assert chi_square(counts, [*expected, max(20_000 - sum(expected), 1e-9)]) < 5 and len(often) > 4


@pytest.mark.parametrize("sessions", [1, 4, 40, 160, 200, 399, 400])
def test_poisson_any_number(sessions):
    """Exactly K sessions of 400 steps, also where drawing until it happens would take for ever; 400: of one step."""
    u = np.random.default_rng(1).random((30, 400))
    ends = session_ends("poisson", sessions, 400, u)
    assert (ends.sum(0) == sessions).all() and ends[-1].all()
    lengths = np.array(lengths_of(ends))
    if sessions < 40:  # the condition is hardly one
        assert lengths.mean(0) == pytest.approx(np.full(sessions, 400 / sessions), abs=0.2 * 400 / sessions)
    if 1 < sessions < 400:
        assert len(set(map(tuple, lengths))) > 25
    few = session_ends("poisson", sessions, 400, u[3:5])  # a row is its own
    np.testing.assert_array_equal(few, ends[:, 3:5])


def test_bernoulli():
    """K sessions in the mean, a random number of them, ends independent of each other; the last step is always one."""
    ends = session_ends("bernoulli", 4, 60, np.random.default_rng(1).random((20_000, 60)))
    count = ends.sum(0)
    assert ends[-1].all() and count.mean() == pytest.approx(4, abs=0.06) and count.min() == 1
    assert ends[:-1].mean(1) == pytest.approx(np.full(59, 3 / 59), abs=0.008)
    assert count.var() == pytest.approx(59 * (3 / 59) * (56 / 59), rel=0.05)
    assert session_ends("bernoulli", 60, 60, np.full((1, 60), 0.999)).all()
    assert session_ends("bernoulli", 1, 60, np.zeros((1, 60))).sum() == 1
    assert session_ends("bernoulli", 1, 1, np.zeros((1, 1))).all()


def test_two_contexts():
    """Fair at first, then the other one with probability 0.8, whatever came before; constant within a session."""
    rng = np.random.default_rng(1)
    ends = session_ends("poisson", 4, 20, rng.random((20_000, 20)))
    session = torch.from_numpy(ends.cumsum(0) - ends)
    which = two_contexts(session, torch.from_numpy(rng.random((20, 20_000)))).numpy()
    assert set(which.flat) == {0, 1}
    assert (which[1:] == which[:-1])[~ends[:-1]].all()
    b = which.T[(np.diff(session.numpy().T, prepend=-1) == 1)].reshape(-1, 4)  # at the start of each session
    assert b.shape == (20_000, 4) and b[:, 0].mean() == pytest.approx(0.5, abs=0.015)
    switch = b[:, 1:] != b[:, :-1]
    for first in (0, 1):
        assert switch[b[:, 0] == first].mean(0) == pytest.approx([0.8] * 3, abs=0.015)
    assert (switch[:, 0] & switch[:, 1]).mean() == pytest.approx(0.64, abs=0.015)


@pytest.mark.parametrize(
    "env_id, wrong, named",
    [
        ("GridWorldAlternating", dict(sessions=7), ["sessions 7", "60"]),
        ("GridWorldAlternating", dict(sessions=61, session_process="poisson"), ["sessions", "60", "61"]),
        ("HalfCheetahVelSessions", dict(sessions=-1), ["sessions", "-1"]),
        ("HalfCheetahVelSessions", dict(sessions=4, horizon=3), ["sessions", "3 steps"]),
        ("HalfCheetahVelSessions", dict(sessions=1940, horizon=2000), ["sessions 1940", "Poisson"]),
        ("Reacher", dict(session_process="geometric"), ["'geometric'", "fixed, poisson, bernoulli"]),
        ("GridWorld", dict(sessions=4), ["sessions 4", "GridWorld"]),
        ("AntGoal", dict(session_process="fixed"), ["session_process fixed", "AntGoal"]),
        ("ML1-reach", dict(sessions=2), ["sessions 2", "ML1-reach"]),
        ("common.envs.gridworld:GridWorld", dict(sessions=4), ["sessions 4", "common.envs.gridworld:GridWorld"]),
    ],
)
def test_bad_input(env_id, wrong, named):
    """One line that names the culprit; when made, not at the first reset."""
    with pytest.raises(BadInput) as error:
        make_envs(env_id, 2, **wrong)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in named), error.value


# ---------- The protocol ----------


@ALL_IDS
@pytest.mark.parametrize("process", ["", "fixed", "poisson", "bernoulli"])
def test_lockstep(env_id, process):
    """Shapes, types and times; contexts change where a session ended; true successors, and what the agent sees."""
    envs = make_envs(env_id, 9, horizon=12, episodes_per_task=2, sessions=0, session_process=process)
    own = "fixed" if env_id == "GridWorldAlternating" else "poisson"
    assert (envs.sessions, envs.session_process, envs.same_splits) == (4, process or own, True)
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(random_actions(envs)[0])
    sizes = dict(GridWorldAlternating=(6, 2, 6), Reacher=(8, 2, 4), HalfCheetahWindVelSessions=(17, 2, 2))
    S, C, G = sizes.get(env_id, (17, 1, 1))
    for _ in range(2):
        obs, info = envs.reset()
        assert set(info) == {"task", "context"} and obs.shape == (9, S) and envs.single_observation_space.shape == (S,)
        assert info["task"].shape == (9, G) and torch.equal(info["task"][:, G - C :], info["context"])
        task, context, all_ends = info["task"].clone(), info["context"].clone(), []
        for t, action in enumerate(random_actions(envs)):
            obs, reward, terminated, truncated, info = envs.step(action)
            ended, new = info["session_end"], info["context"]
            assert ended.dtype == terminated.dtype == truncated.dtype == torch.bool and ended.shape == reward.shape == (
                9,
            )
            assert obs.dtype == info["final_obs"].dtype == reward.dtype == new.dtype == torch.float32
            assert new.shape == (9, C) and not terminated.any()
            assert (truncated == ((t + 1) % 12 == 0)).all() and (ended | ~truncated).all()
            assert torch.equal(new[~ended], context[~ended])
            assert torch.equal(obs[~ended], info["final_obs"][~ended])
            if env_id != "GridWorldAlternating":  # the grid's agent may stand at the start
                assert (obs != info["final_obs"])[ended].any(1).all()
            context = new.clone()
            all_ends.append(ended.numpy())
        ends = np.array(all_ends).reshape(2, 12, 9)
        if process != "bernoulli":
            assert (ends.sum(1) == 4).all()
        assert (process == "fixed" or own == "fixed" and not process) == (len(set(lengths_of(ends[0]))) == 1)
        assert process in ("", "fixed") and own == "fixed" or process == "fixed" or (ends[0] != ends[1]).any()
        assert torch.equal(torch.cat([envs.task, task[:, G - C :]], -1), task)
        with pytest.raises(RuntimeError, match="reset"):
            envs.step(action)


def trajectory(envs, tasks=None, resets=2):
    """Everything that comes out of some meta-episodes: a list of (N, ...) tensors."""
    out = []
    for _ in range(resets):
        obs, info = envs.reset(tasks)
        out += [obs, info["task"], info["context"]]
        for action in random_actions(envs):
            obs, reward, _, _, info = envs.step(action)
            out += [obs, reward, *(info[name] for name in ("final_obs", "session_end", "context"))]
    return out


@ALL_IDS
def test_draws(env_id):
    """Row i depends on seed, split, resets, episode and i alone; a resumed run goes on; a name is the same for all."""
    sizes = dict(horizon=12, episodes_per_task=2, session_process="poisson")
    envs = make_envs(env_id, 6, seed=0, **sizes)
    expected = trajectory(envs)
    torch.manual_seed(99), np.random.seed(99)
    again = make_envs(env_id, 6, seed=0, **sizes)
    assert all(torch.equal(a, b) for a, b in zip(trajectory(again, resets=1), expected))
    resumed = make_envs(env_id, 6, seed=0, **sizes)
    resumed.load_state_dict(again.state_dict())
    half = len(expected) // 2
    assert all(torch.equal(a, b) for a, b in zip(trajectory(resumed, resets=1), expected[half:]))
    few, many = (make_envs(env_id, n, seed=0, **sizes) for n in (4, 6))
    few.reset(), many.reset()
    for action in random_actions(many):  # more environments change nothing for the first ones
        ours, theirs = few.step(action[:4]), many.step(action)
        for a, b in [(ours[0], theirs[0]), (ours[1], theirs[1])] + [(ours[4][k], theirs[4][k]) for k in ours[4]]:
            assert torch.equal(a, b[:4])
    ends = [torch.stack(expected[k + 6 : k + half : 5]) for k in (0, half)]  # session_end, by reset
    ends = [*ends[0].split(12), *ends[1].split(12)]  # and by episode
    for other in (dict(seed=1), dict(seed=0, split="test")):
        ends += torch.stack(trajectory(make_envs(env_id, 6, **other, **sizes), resets=1)[6::5]).split(12)
    for a, b in itertools.combinations(ends, 2):
        assert a.dtype == torch.bool and not torch.equal(a, b)
    names = envs.tasks[:3] + envs.tasks[-3:]
    named = trajectory(envs, names, resets=1)
    assert all(torch.equal(a, b) for a, b in zip(trajectory(envs, names, resets=1), named))
    other = trajectory(make_envs(env_id, 6, seed=7, **sizes), names[::-1], resets=1)
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(named[1:3], other[1:3]))  # task, context
    for k in (6, 7):  # session_end, context
        assert all(torch.equal(a, b.flip(0)) for a, b in zip(named[k::5], other[k::5]))
    assert len(set(envs.tasks)) == len(envs.tasks) == (512 if env_id == "GridWorldAlternating" else 25)
    drawn, later = expected[:half], trajectory(many, resets=1)  # naming draws nothing; nor do steps
    assert not torch.equal(drawn[6], later[6]) and torch.equal(later[6], expected[half + 6])
    with pytest.raises(BadInput):
        envs.reset(tasks=["no such task"] * 6)


@pytest.mark.parametrize("env_id", ["GridWorldAlternating", "HalfCheetahWindVelSessions"])
def test_resume_of_a_run(env_id, tmp_path):
    """varibad.py's arguments reach the environments, and are kept by a checkpoint."""
    words = f"--env-id {env_id} --sessions 2 --session-process bernoulli --tbptt 0 --reward-decoder mlp"
    resume_equals_straight(varibad, tmp_path, *words.split())
    args = torch.load(tmp_path / "resumed/checkpoint.pt")["args"]
    assert (args["sessions"], args["session_process"]) == (2, "bernoulli")
    with pytest.raises(BadInput, match="--sessions 1"):
        main(varibad, "--resume", tmp_path / "resumed/checkpoint.pt", "--sessions", "1")


def test_no_waits_for_the_device():
    """On the meta device, where what would wait for a GPU raises, the grid resets and steps."""
    envs = make_envs("GridWorldAlternating", 3, device="meta", horizon=12, session_process="poisson")
    for tasks in (None, envs.tasks[:3]):
        obs, _ = envs.reset(tasks)
        for _ in range(12):
            obs, reward, _, _, info = envs.step(torch.zeros(3, dtype=torch.int64, device="meta"))
        assert {x.device.type for x in (obs, reward, *info.values())} == {"meta"} and obs.shape == (3, 6)


# ---------- The alternating grid ----------

CELLS = [(x, y) for x in range(5) for y in range(5)]
GOALS = [cell for cell in CELLS if max(cell) > 1]


@pytest.mark.parametrize("other_goal_reward", [-0.1, 0.0])
@pytest.mark.parametrize("process", ["fixed", "bernoulli"])
def test_grid_steps(other_goal_reward, process):
    """Two episodes in 64 environments against a grid in Python: moves, walls, rewards, teleports, observations."""
    envs = GridWorldAlternating(
        64, seed=3, episodes_per_task=2, session_process=process, other_goal_reward=other_goal_reward
    )
    obs, info = envs.reset()
    goals = [[tuple(task[:2]), tuple(task[2:4])] for task in info["task"].int().tolist()]
    assert all(set(pair) <= set(GOALS) and len(set(pair)) == 2 for pair in goals)
    at, seen, teleports = [(0, 0)] * 64, collections.Counter(), 0
    for t, actions in enumerate(random_actions(envs)):
        which = [tuple(c) for c in info["context"].int().tolist()]
        for n in range(64):
            expected = [x / 4 - 0.5 for x in (*at[n], *goals[n][0], *goals[n][1])]
            assert obs[n].tolist() == pytest.approx(expected) and which[n] in goals[n]
        obs, reward, _, _, info = envs.step(actions)
        for n, (dx, dy) in enumerate(MOVES[a] for a in actions.tolist()):
            at[n] = min(max(at[n][0] + dx, 0), 4), min(max(at[n][1] + dy, 0), 4)
            kind = "goal" if at[n] == which[n] else "other" if at[n] in goals[n] else "cell"
            seen[kind] += 1
            assert reward[n].item() == pytest.approx({"goal": 1, "other": other_goal_reward, "cell": -0.1}[kind])
            assert info["success"][n].item() == (kind == "goal")
            assert ((info["final_obs"][n, :2] + 0.5) * 4).tolist() == pytest.approx(at[n])
            if info["session_end"][n]:
                teleports += at[n] != (0, 0)
                at[n] = (0, 0)
        if process == "fixed":
            assert (info["session_end"] == ((t + 1) % 15 == 0)).all()
    assert min(seen.values()) > 50 and teleports > 200


def test_grid_tasks():
    """All ordered pairs of different goals alike; the first session's is fair, the next one's another in 0.8; names."""
    envs = make_envs("GridWorldAlternating", 1000)
    pairs, firsts, switches = [], [], []
    for _ in range(21):
        _, info = envs.reset()
        pairs += [tuple(row) for row in info["task"][:, :4].int().tolist()]
        by_session = envs.contexts[7::15]  # (4, N, 2)
        assert torch.equal(by_session[0], info["context"])
        firsts.append((info["context"] == info["task"][:, :2]).all(1))
        switches.append((by_session[1:] != by_session[:-1]).any(-1))
    counts = collections.Counter(pairs)
    assert len(counts) == 21 * 20 and chi_square(list(counts.values()), [50] * 420) < 5
    assert torch.cat(firsts).float().mean().item() == pytest.approx(0.5, abs=0.015)
    assert torch.cat(switches, 1).float().mean(1).tolist() == pytest.approx([0.8] * 3, abs=0.015)
    envs = make_envs("GridWorldAlternating", 2000, session_process="poisson")
    _, info = envs.reset()
    first = (info["context"] == info["task"][:, :2]).all(1)
    length = envs.ends.float().argmax(0)  # no news of the context
    assert abs(np.corrcoef(first, length)[0, 1]) < 0.1
    tables = {split: make_envs("GridWorldAlternating", 1, split).task_table for split in ("train", "test")}
    for table in tables.values():
        assert table.shape == (512, 4) and len(table.unique(dim=0)) > 250
    assert not torch.equal(*tables.values())


@functools.cache
def session_values():
    """The grid by dynamic programming over a session's 15 steps, for all 420 ordered pairs (A, B) at once.

    Returns known, (15 + 1, 420, 2, 25): what the steps from t on return from a cell with the goal, A or B, known; and
    search(p, when_a, when_b, never): the best that a session returns that begins at the start where A counts with
    probability p (420,), and what follows is worth when_a, when_b where that was found out, and never where it was not.
    """
    step = np.array([[CELLS.index((min(max(x + a, 0), 4), min(max(y + b, 0), 4))) for a, b in MOVES] for x, y in CELLS])
    pairs = np.array([[CELLS.index(a), CELLS.index(b)] for a in GOALS for b in GOALS if a != b])
    at_goal = pairs[:, :, None] == np.arange(25)  # (420, 2, 25)
    known = np.zeros((16, 420, 2, 25))
    for t in reversed(range(15)):
        known[t] = (np.where(at_goal, 1, -0.1) + known[t + 1])[..., step].max(-1)

    def search(p, when_a, when_b, never):
        value = np.tile(never[:, None], 25)
        for t in reversed(range(15)):
            a, b = known[t + 1, :, 0] + when_a[:, None], known[t + 1, :, 1] + when_b[:, None]
            on_a = p * (1 + a) + (1 - p) * (-0.1 + b)  # the first look at A tells all
            on_b = p * (-0.1 + a) + (1 - p) * (1 + b)
            there = np.where(at_goal[:, 0], on_a, np.where(at_goal[:, 1], on_b, -0.1 + value))
            value = there[:, step].max(-1)
        return value[:, 0]

    return known, search


def test_exact_values():
    """With the goal known, Bayes-optimal, blind to the goals' dynamics, and faithful to the first goal found."""
    known, search = session_values()
    zero = np.zeros(420)
    assert 4 * known[0, :, :, 0].mean() == pytest.approx(44.29, abs=0.005)
    alone = search(0.5, zero, zero, zero).mean()
    assert 4 * alone == pytest.approx(41.50, abs=0.005)
    same = [0.2, 0.2**2 + 0.8**2]
    same.append(0.2 * same[1] + 0.8 * (1 - same[1]))  # whether the first session's goal counts in the others
    faithful = sum(s * known[0, :, :, 0].mean() - (1 - s) * 1.5 for s in same)
    assert alone + faithful == pytest.approx(21.87, abs=0.01)

    @functools.cache
    def best(session, p):
        if session == 4:
            return zero
        after = (best(session + 1, round(q, 6)) for q in (0.2, 0.8, 0.2 * p + 0.8 * (1 - p)))
        return search(p, *after)

    assert best(0, 0.5).mean() == pytest.approx(42.47, abs=0.005)


def walk(envs, goal_of):
    """Returns of the evaluation tasks, (N,), when each step goes to goal_of(t, context) or stays there."""
    obs, info = envs.reset(tasks=envs.tasks)
    total = 0
    for t in range(60):
        left = goal_of(t, info["context"]) - (obs[:, :2] + 0.5) * 4
        way = torch.where(left[:, :1] != 0, left * torch.tensor([1, 0]), left * torch.tensor([0, 1])).sign()
        obs, reward, _, _, info = envs.step((way[:, None] == envs.moves).all(-1).int().argmax(1))
        total = total + reward
    return total


def test_known_goal_in_the_environment():
    """The oracle's walk in all 512 evaluation tasks: what the distances say for each, 44.29 but for the draws."""
    envs = make_envs("GridWorldAlternating", 512, "test")
    contexts = []
    returns = walk(envs, lambda t, context: contexts.append(context) or context)
    distance = torch.stack(contexts[::15]).sum(-1)
    torch.testing.assert_close(returns, (16 - distance - 0.1 * (distance - 1)).sum(0))
    assert returns.mean().item() == pytest.approx(44.29, abs=4 * 5.2 / 512**0.5)
    assert returns.mean().item() == pytest.approx(44.07, abs=0.005)
    stubborn = walk(envs, lambda t, context: contexts[0])  # known at first, then as in 0.2, 0.68 and 0.392 of the tasks
    assert stubborn.mean().item() == pytest.approx(22.57, abs=4 * 14 / 512**0.5)


@pytest.mark.parametrize("switch, expected, drawn", [(0.8, 42.47, 42.25), (0.5, 41.50, 41.36)])
def test_search_in_the_environment(switch, expected, drawn):
    """The Bayes-optimal walk, and the one that is blind to the goals' dynamics, in the 512 evaluation tasks: first to
    the goal that promises more, on to the other one where there is no reward."""
    envs = make_envs("GridWorldAlternating", 512, "test")
    rows, state = torch.arange(512), {}

    def aim(t, context):
        goals = envs.task[:, :4].view(512, 2, 2)
        right = (context == goals[:, 1]).all(-1).long()
        if t % 15 == 0:
            p = torch.where(state["right"] == 1, 1 - switch, switch) if t else torch.full((512,), 0.5)  # of goal 1
            far, apart = goals.sum(-1), (goals[:, 0] - goals[:, 1]).abs().sum(-1)
            steps = [p * y + (1 - p) * x for x, y in ((far[:, 0], far[:, 0] + apart), (far[:, 1] + apart, far[:, 1]))]
            state["aim"] = (steps[1] < steps[0] - 1e-6).long()
        state["right"] = right
        there = (envs.cell_xy == goals[rows, state["aim"]]).all(-1)
        state["aim"] = torch.where(there, right, state["aim"])
        return goals[rows, state["aim"]]

    returns = walk(envs, aim)
    assert returns.mean().item() == pytest.approx(expected, abs=4 * 4.9 / 512**0.5)
    assert returns.mean().item() == pytest.approx(drawn, abs=0.005)


# ---------- MuJoCo ----------


def reward_by_hand(env_id, context, before, after, action, tip):
    """Of one environment, from positions before and after, the clipped action and the fingertip's true position."""
    effort, speed = math.hypot(*action), (after[0] - before[0]) / 0.05
    if env_id == "Reacher":
        return -math.dist(tip, context) - 0.05 * effort
    if env_id == "HalfCheetahDirSessions":
        return context[0] * speed - 0.5 * effort
    return -abs(speed - context[0]) - 0.05 * effort


@pytest.mark.parametrize("env_id", MUJOCO)
def test_steps_of_gymnasium(env_id):
    """From every state of random episodes: positions and velocities to 1e-12, observations and rewards by hand."""
    envs = make_envs(env_id, 4, seed=3, horizon=60, session_process="poisson")
    env = gymnasium.make("Reacher-v5" if env_id == "Reacher" else "HalfCheetah-v5").unwrapped
    assert env.dt == pytest.approx(envs.dt) and env.action_space == envs.single_action_space
    _, info = envs.reset()
    moved, session = 0, np.zeros(4)
    for actions in random_actions(envs):
        q, v, context = envs.q.copy(), envs.v.copy(), info["context"].double().numpy()
        _, rewards, _, _, info = envs.step(actions)
        for i in range(4):
            mujoco.mj_resetData(env.model, env.data)  # the solver begins anew, as in ours
            env.set_state(q[i], v[i])
            if "Wind" in env_id:
                env.data.xfrc_applied[env.model.body("torso").id] = [
                    -(10 + 10 * math.sin(0.3 * session[i])), 0, 0, 0, 0, 0
                ]  # fmt: skip
            action = actions[i].clamp(-1, 1).numpy()
            obs, *_ = env.step(action)
            new_q, new_v = env.data.qpos, env.data.qvel
            if not info["session_end"][i]:  # else the state is the next session's
                np.testing.assert_allclose(envs.q[i], new_q, rtol=0, atol=1e-12)
                np.testing.assert_allclose(envs.v[i], new_v, rtol=0, atol=1e-12 * max(1, abs(new_v).max()))
            moved += abs(new_q - q[i]).max() > 1e-3
            mujoco.mj_kinematics(env.model, env.data)  # Gymnasium's body positions are those of the last substep
            tip = env.data.body("fingertip").xpos[:2] if env_id == "Reacher" else ()
            if env_id == "Reacher":
                obs = [*obs[:4], *new_v[:2], *tip]
            np.testing.assert_allclose(info["final_obs"][i], obs, rtol=1e-6, atol=1e-6)
            by_hand = reward_by_hand(env_id, context[i], q[i], new_q, action.astype(float), tip)
            assert rewards[i].item() == pytest.approx(by_hand, rel=1e-5, abs=1e-6)
        session += info["session_end"].numpy()
    assert moved > 200


@pytest.mark.parametrize("env_id", MUJOCO)
def test_contexts(env_id):
    """The paper's formulas of the session's number, which begins at 0 in every episode."""
    envs = make_envs(env_id, 50, horizon=20, episodes_per_task=2, sessions=5)
    _, info = envs.reset()
    r, alpha = info["task"][:, :2].T.double().numpy() if env_id == "Reacher" else (0, 0)
    i, seen = np.zeros(50, int), []
    for action in random_actions(envs):
        x = info["context"].numpy()
        if env_id == "Reacher":
            assert (r >= 0.1).all() and (r < 0.2).all() and (alpha >= 0).all() and alpha.max() > 5
            np.testing.assert_allclose(x.T, [r * np.cos(alpha * i), r * np.sin(alpha * i)], atol=1e-6)
        elif env_id == "HalfCheetahDirSessions":
            assert set(x.flat) == {-1.0, 1.0}
        else:
            np.testing.assert_allclose(x[:, 0], 1.5 + 1.5 * np.sin(0.2 * i), rtol=1e-6)
        if "Wind" in env_id:
            np.testing.assert_allclose(x[:, 1], 10 + 10 * np.sin(0.3 * i), rtol=1e-6)
        info = envs.step(action)[4]
        seen.append(i.max())
        i = np.where(info["session_end"], i + 1, i)
        if len(seen) == 20:
            i[:] = 0
    assert max(seen) == 4


def test_options():
    """Reacher's other reading of alpha; three costs of an action; unknown ones."""
    envs = Reacher(6, horizon=20, angle_step=0.7, session_process="fixed")
    task = envs.reset()[1]["task"].double().numpy()
    angle = np.arctan2(*envs.contexts[5::5].numpy().T[::-1]).T  # sessions 1 to 3, the 0th is in the task
    np.testing.assert_allclose(
        np.exp(1j * angle), np.exp(1j * (task[:, 1] + 0.7 * np.arange(1, 4)[:, None])), atol=1e-6
    )
    np.testing.assert_allclose(np.arctan2(task[:, 3], task[:, 2]) % (2 * np.pi), task[:, 1], rtol=1e-5)
    made = {name: HalfCheetahDirSessions(2, action_cost=name) for name in ("norm", "printed", "squared")}
    action, rewards = torch.tensor([[1, -1, 2, 0, 0, 0], [0, 0.5, 0, 0, 0, 0]]), {}
    for name, envs in made.items():
        envs.reset()
        rewards[name] = envs.step(action)[1]
    torch.testing.assert_close(rewards["printed"] - rewards["norm"], torch.tensor([3**0.5, 0.5]))
    cost = 0.5 * torch.tensor([3**0.5, 0.5]) - 0.05 * torch.tensor([3, 0.25])
    torch.testing.assert_close(rewards["squared"] - rewards["norm"], cost)
    with pytest.raises(BadInput, match="'none'.*norm, printed, squared"):
        HalfCheetahDirSessions(2, action_cost="none")


@pytest.mark.parametrize("env_id", ["Reacher", "HalfCheetahVelSessions"])
def test_session_starts(env_id):
    """A session begins with Gymnasium's first states, new ones each time, or where the last one ended."""
    factory = getattr(__import__("common.envs.locomotion_sessions", fromlist=[env_id]), env_id)
    noise_v = {"Reacher": 0.005 / 3**0.5, "HalfCheetahVelSessions": 0.1}[env_id]
    joints = {"Reacher": 2, "HalfCheetahVelSessions": 9}[env_id]  # after them: the model's own target
    for reset_state in (True, False):
        envs = factory(60, horizon=40, sessions=8, reset_state=reset_state)
        env = gymnasium.make("Reacher-v5" if env_id == "Reacher" else "HalfCheetah-v5").unwrapped
        first, _ = envs.reset()
        qs, vs, differ = [envs.q.copy() - env.init_qpos], [envs.v.copy()], 0
        for action in random_actions(envs)[:-1]:
            obs, *_, info = envs.step(action)
            ended = info["session_end"].numpy()
            differ += (obs != info["final_obs"]).any(1).sum().item()
            qs.append((envs.q - env.init_qpos)[ended])
            vs.append(envs.v[ended])
        q, v = np.concatenate(qs)[:, :joints], np.concatenate(vs)[:, :joints]
        assert len(q) == 60 * 8 and differ == 60 * 7 * reset_state
        if reset_state:
            assert abs(q).max() < 0.1 and q.std() == pytest.approx(0.1 / 3**0.5, rel=0.05)
            assert v.std() == pytest.approx(noise_v, rel=0.05) and len(np.unique(q)) == q.size
            assert env_id != "Reacher" or abs(v).max() < 0.005
        else:
            assert abs(q).max() > 0.3


@pytest.mark.parametrize(
    "make, zero, uniform",
    [
        (functools.partial(Reacher, reset_state=False), (-68, 15), (-86, 9)),
        (HalfCheetahDirSessions, (1, 2), (-297, 40)),
        (functools.partial(HalfCheetahDirSessions, action_cost="printed"), (1, 2), (263, 40)),
        (functools.partial(HalfCheetahDirSessions, action_cost="squared"), (1, 2), (-42, 40)),
        (functools.partial(make_envs, "HalfCheetahVelSessions"), (-773, 4), None),
    ],
)
def test_trivial_policies(make, zero, uniform):
    """Returns of doing nothing, and of uniform actions: those of an independent measurement, within its deviations."""
    envs = make(12, session_process="fixed")
    for scale, expected in ((0, zero), (1, uniform)):
        if expected:
            envs.reset()
            returns = sum(envs.step(scale / 1.5 * action)[1] for action in random_actions(envs))
            assert returns.mean().item() == pytest.approx(expected[0], abs=expected[1])


@pytest.mark.parametrize("sessions", [4, 20])
def test_floors_of_the_cheetah(sessions):
    """The best velocity of all, against a search by the environment's own rewards, and the best of each step, against
    medians: what it would pay to be there at once, whatever is believed."""
    found = floors("HalfCheetahVelSessions", sessions)
    envs = make_envs("HalfCheetahVelSessions", 25, "test", sessions=sessions)
    envs.reset(envs.tasks)
    goals, returns = envs.contexts.flatten(0, 1).numpy(), []
    for velocity in np.arange(0, 3, 0.05):
        q, a = np.zeros((len(goals), envs.model.nq)), np.zeros((len(goals), 6))
        new_q = q.copy()
        new_q[:, 0] = velocity * envs.dt
        returns.append(envs.reward(q, new_q, a, goals).sum() / 25)
    assert max(returns) - 2 < found["one place"] < max(returns) + 0.5
    draws = make_envs("HalfCheetahVelSessions", 300, sessions=sessions)
    draws.reset()
    medians = draws.contexts.median(1).values
    assert -(envs.contexts - medians[:, None]).abs().sum((0, 2)).mean() == pytest.approx(found["by the time"], abs=0.5)


def test_floors_of_reacher():
    """A fingertip at the best place of all, and at the best of each step's goals, both by search."""
    found, envs = floors("Reacher"), make_envs("Reacher", 25, "test")
    envs.reset(envs.tasks)
    places = torch.cartesian_prod(*[torch.arange(-0.2, 0.2, 0.01).double()] * 2)
    distances = (envs.contexts[:, None] - places[:, None]).norm(dim=-1).mean(-1)  # (T, places)
    assert -distances.sum(0).min() - 1 < found["one place"] < -distances.sum(0).min() + 0.1
    # Who knows the evaluation's goals is ahead of who knows those of the training.
    assert -distances.min(1).values.sum() - 4 < found["by the time"] < -distances.min(1).values.sum() + 0.1
