"""The protocol of the environments, the grid and the point against plain Python, and the grid's exact optima."""

import collections
import sys

import numpy as np
import pytest
import torch

from common.envs import BadInput, TensorEnvs, generator, make_envs

MOVES = [(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)]
IDS = ["GridWorld", "SparsePointRobot"]
ALL_IDS = pytest.mark.parametrize("env_id", IDS)


def random_actions(envs, seed=0):
    """Actions for a whole meta-episode, (T, N, ...), from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(envs.single_action_space, "n"):
        return torch.randint(5, (envs.meta_horizon, envs.num_envs), generator=generator)
    return 2 * torch.randn(envs.meta_horizon, envs.num_envs, 2, generator=generator)


# ---------- The families ----------


def test_grid_steps():
    """Every step of 64 random meta-episodes against a grid in Python: positions, walls, rewards, success."""
    envs = make_envs("GridWorld", 64, seed=3)
    obs, info = envs.reset()
    walls, after = 0, []
    for t, actions in enumerate(random_actions(envs)):
        before = after if t % 15 else [(0, 0)] * 64
        after = []
        for (x, y), action in zip(before, actions.tolist()):
            dx, dy = MOVES[action]
            after.append((min(max(x + dx, 0), 4), min(max(y + dy, 0), 4)))
            walls += (dx, dy) != (0, 0) and after[-1] == (x, y)
        assert [tuple(xy) for xy in obs.int().tolist()] == before
        obs, reward, _, _, step = envs.step(actions)
        hits = [cell == tuple(goal) for cell, goal in zip(after, info["task"].int().tolist())]
        assert [tuple(xy) for xy in step["final_obs"].int().tolist()] == after
        assert reward.tolist() == pytest.approx([1.0 if hit else -0.1 for hit in hits])
        assert step["success"].tolist() == hits
    assert walls > 100
    cells = torch.tensor([[0, 0], [0, 1], [3, 2]])
    assert envs.cell(cells).tolist() == [0, 1, 17]


LDM_GOALS = {  # environment -> split -> its goals: the inner ring and the outermost one, what lies between, outside
    "GridWorldLDM": dict(train=(2, 6), test=(3, 4, 5)),
    "GridWorldExtrapolation": dict(train=(2, 5), test=(3, 4), test2=(6,)),
}


@pytest.mark.parametrize(
    "env_id, split, count",
    [
        ("GridWorldLDM", "train", 18),
        ("GridWorldLDM", "test", 27),
        ("GridWorldExtrapolation", "train", 16),
        ("GridWorldExtrapolation", "test", 16),
        ("GridWorldExtrapolation", "test2", 13),
    ],
)
def test_grids_with_disjoint_splits(env_id, split, count):
    """Goals and their number, drawn and named; walls, rewards and success of random steps by a plain loop."""
    rings = LDM_GOALS[env_id][split]
    expected = {(x, y) for x in range(7) for y in range(7) if max(x, y) in rings}
    envs = make_envs(env_id, 400, split, seed=2)
    assert (envs.horizon, envs.episodes_per_task, envs.num_cells, envs.same_splits) == (30, 4, 49, False)
    obs, info = envs.reset()
    assert len(expected) == count and envs.tasks == [f"{env_id}/{x},{y}" for x, y in sorted(expected)]
    assert {tuple(goal) for goal in info["task"].int().tolist()} == expected
    assert envs.cell(envs.cells).tolist() == list(range(49))
    position, hits = [(0, 0)] * 400, 0
    for t, actions in enumerate(random_actions(envs)):
        if t % 30 == 0:
            position = [(0, 0)] * 400
        assert [tuple(xy) for xy in obs.int().tolist()] == position
        obs, reward, _, _, step = envs.step(actions)
        for n, (dx, dy) in enumerate(MOVES[a] for a in actions.tolist()):
            position[n] = min(max(position[n][0] + dx, 0), 6), min(max(position[n][1] + dy, 0), 6)
        hit = [cell == tuple(goal) for cell, goal in zip(position, info["task"].int().tolist())]
        hits += sum(hit)
        assert [tuple(xy) for xy in step["final_obs"].int().tolist()] == position
        assert reward.tolist() == pytest.approx([1.0 if h else -0.1 for h in hit]) and step["success"].tolist() == hit
    assert hits > 0


@pytest.mark.parametrize("env_id", LDM_GOALS)
def test_splits_are_disjoint(env_id):
    """No goal in two splits, and together all that are not next to the start; each split has draws of its own."""
    made = [make_envs(env_id, 3, split) for split in LDM_GOALS[env_id]]
    names = sum((envs.tasks for envs in made), [])
    assert len(names) == len(set(names)) == 45
    assert len({tuple(generator(1, envs.split, 0).random(3)) for envs in made}) == len(made)
    others = {"test2", "validation"} - set(LDM_GOALS[env_id])
    for wrong, other in [(env_id, split) for split in others] + [("ML1-reach", "test2"), ("HalfCheetahVel", "test2")]:
        with pytest.raises(BadInput, match=other):
            make_envs(wrong, 1, other)


@pytest.mark.parametrize("env_id", ["GridWorld", *LDM_GOALS])
def test_all_splits_in_one(env_id):
    """The split all, for oracles: the goals of every other split, named and drawn, each once."""
    envs = make_envs(env_id, 1000, "all")
    others = sum((make_envs(env_id, 1, split).tasks for split in LDM_GOALS.get(env_id, ["train"])), [])
    assert sorted(envs.tasks) == sorted(others)
    assert {tuple(goal) for goal in envs.reset()[1]["task"].tolist()} == {tuple(xy) for xy in envs.task_table.tolist()}
    with pytest.raises(BadInput, match="all"):
        make_envs("SparsePointRobot", 1, "all")


@pytest.mark.parametrize("split, optimum", [("train", 23.28), ("test", 24.50)])
def test_known_goal_optimum_of_ldms_grid(split, optimum):
    """Walk to the goal and stay: no episode returns more, since the goal is reached as early as can be."""
    names = make_envs("GridWorldLDM", 1, split).tasks
    envs = make_envs("GridWorldLDM", len(names), split)
    obs, info = envs.reset(tasks=names)
    returns = torch.zeros(4, len(names))
    for t in range(envs.meta_horizon):
        left = info["task"] - obs
        action = torch.where(left[:, 0] > 0, 2, torch.where(left[:, 1] > 0, 1, 0))
        obs, reward, *_ = envs.step(action)
        returns[t // 30] += reward
    distance = info["task"].sum(1)
    torch.testing.assert_close(returns, (31 - distance - 0.1 * (distance - 1)).expand(4, -1))
    assert returns.mean(1).tolist() == pytest.approx([optimum] * 4, abs=0.005)


def test_point_steps():
    """Against numpy: clipped moves, the reward inside a radius of 0.2, success."""
    envs = make_envs("SparsePointRobot", 500, seed=3, horizon=20, episodes_per_task=2)
    obs, info = envs.reset()
    goal, hits = info["task"].numpy(), 0
    np.testing.assert_allclose(np.linalg.norm(goal, axis=1), 1, rtol=1e-6)
    assert goal[:, 1].min() > 0
    for t, noise in enumerate(random_actions(envs)):
        actions = noise + 3 * info["task"] * (t // 20)  # in the second episode: towards the goal
        if t % 20 == 0:
            position = np.zeros((500, 2))
        np.testing.assert_allclose(obs, position, atol=1e-5)
        obs, reward, _, _, step = envs.step(actions)
        position = position + 0.1 * np.clip(actions.numpy(), -1, 1)
        distance = np.linalg.norm(position - goal, axis=1)
        clear = abs(distance - 0.2) > 1e-5  # of rounding
        hits += (distance <= 0.2).sum()
        np.testing.assert_allclose(step["final_obs"], position, atol=1e-5)
        np.testing.assert_allclose(reward[clear], np.where(distance <= 0.2, 1 - distance, 0)[clear], atol=1e-5)
        assert (step["success"].numpy() == (distance <= 0.2))[clear].all()
    assert hits > 100


# ---------- Exact optima of the grid ----------


@pytest.fixture(scope="module")
def grid_model():
    """The grid as its own steps tell it: next cell (25, 5), and reward (goal, cell, action); cells are 5 x + y."""
    names = make_envs("GridWorld", 1).tasks
    envs = make_envs("GridWorld", 21 * 25 * 5)
    goal, cell, action = torch.cartesian_prod(torch.arange(21), torch.arange(25), torch.arange(5)).T
    envs.reset(tasks=[names[g] for g in goal])
    for t in range(8):  # walk to the cell: x steps to the right, then y steps up, then wait
        envs.step(torch.where(t < cell // 5, 2, torch.where(t < cell // 5 + cell % 5, 1, 0)))
    obs, reward, *_ = envs.step(action)
    return envs.cell(obs).view(21, 25, 5)[0].numpy(), reward.view(21, 25, 5).double().numpy()


def test_known_goal_optimum(grid_model):
    """Value iteration over an episode's 15 steps: 11.071 in the mean over goals, and the closed form for each."""
    successor, reward = grid_model
    value = np.zeros((21, 25))
    for _ in range(15):
        value = (reward + value[:, successor]).max(-1)
    distances = [sum(map(int, name.split("/")[1].split(","))) for name in make_envs("GridWorld", 1).tasks]
    np.testing.assert_allclose(value[:, 0], [16 - d - 0.1 * (d - 1) for d in distances], rtol=1e-6)
    assert value[:, 0].mean() == pytest.approx(11.071, abs=5e-4)


def exploring_path(successor, goals):
    """Cells of 15 moves from the start that visit 14 goals once each, such that one shortest path visits the others."""

    def monotone(cell, left):  # whether moves up and to the right reach all that is left
        left = left - {cell}
        return not left or any(monotone(c, left) for c in successor[cell, 1:3] if c != cell)

    def search(path):
        if len(path) == 16:
            return path if monotone(0, goals - set(path)) else None
        for cell in successor[path[-1], 1:]:
            if cell not in path and (cell in goals or len(path) == 1):
                found = search([*path, cell])
                if found:
                    return found

    return search([0])


def test_bayes_optimum(grid_model):
    """4.000, 11.071, 11.071, 11.071 is optimal: no agent can do better in any episode, and one does as well.

    Without knowledge the goal at the n-th new goal cell visited is found at step n + 1 at the earliest, so episode 1
    returns at most the mean of 16 - t - 0.1 (t - 1) over 14 goals, t = 2..15, and -1.5 for seven; no later episode
    returns more than with the goal known. Both are reached, in the environment: by a path over 14 goals, then by one
    shortest path over the seven others, which finds each at no cost.
    """
    successor, _ = grid_model
    bound = (sum(16 - t - 0.1 * (t - 1) for t in range(2, 16)) - 7 * 1.5) / 21
    names = make_envs("GridWorld", 1).tasks
    envs = make_envs("GridWorld", 21)
    obs, info = envs.reset(tasks=names)
    goal = envs.cell(info["task"]).tolist()
    path = exploring_path(successor, set(goal))
    last = next(route for route in shortest_paths(successor, 24) if set(goal) - set(path) <= set(route))
    returns, known = np.zeros((4, 21)), [False] * 21
    for t in range(60):
        at, targets = envs.cell(obs).tolist(), []
        for n in range(21):
            route = shortest_paths(successor, goal[n])[0] if known[n] else path if t < 15 else last
            if t < 15 and known[n]:
                targets.append(goal[n])  # stay
            else:
                targets.append(route[min(t % 15 + 1, len(route) - 1)])
        actions = [successor[cell].tolist().index(target) for cell, target in zip(at, targets)]
        obs, reward, _, _, step = envs.step(torch.tensor(actions))
        known = [k or hit for k, hit in zip(known, step["success"].tolist())]
        returns[t // 15] += reward.numpy()
    assert returns.mean(1).tolist() == pytest.approx([bound, 11.0714, 11.0714, 11.0714], abs=1e-4)
    assert bound == pytest.approx(4.0)


def shortest_paths(successor, target):
    """All paths of moves up and to the right from the start to a cell."""
    paths, done = [[0]], []
    while paths:
        path = paths.pop()
        if path[-1] == target:
            done.append(path)
        paths += [[*path, c] for c in successor[path[-1], 1:3] if c != path[-1] and path[-1] != target]
    return done


# ---------- The protocol ----------


@ALL_IDS
def test_lockstep(env_id):
    """Shapes, types and times of everything in a meta-episode: same task throughout, episodes start at the start."""
    envs = make_envs(env_id, 6, horizon=4, episodes_per_task=3)
    assert (envs.num_envs, envs.horizon, envs.episodes_per_task, envs.meta_horizon, envs.split) == (
        6,
        4,
        3,
        12,
        "train",
    )
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(random_actions(envs)[0])
    for _ in range(2):
        first, info = envs.reset()
        assert first.shape == (6, *envs.single_observation_space.shape) and first.dtype == torch.float32
        task = info["task"].clone()
        assert len(task.unique(dim=0)) > 1
        for t, action in enumerate(random_actions(envs)):
            obs, reward, terminated, truncated, info = envs.step(action)
            assert obs.dtype == info["final_obs"].dtype == reward.dtype == torch.float32
            assert terminated.dtype == truncated.dtype == info["success"].dtype == torch.bool
            assert reward.shape == terminated.shape == truncated.shape == info["success"].shape == (6,)
            assert not terminated.any() and (truncated == ((t + 1) % 4 == 0)).all()
            assert torch.equal(obs, first if (t + 1) % 4 == 0 else info["final_obs"])
            if t % 4 == 3:
                assert not torch.equal(info["final_obs"], first)
            assert torch.equal(envs.task, task)
        with pytest.raises(RuntimeError, match="reset"):
            envs.step(action)


@ALL_IDS
def test_evaluation_tasks(env_id):
    """All names, set in any order, bring the same task each time; both splits know them; naming draws nothing."""
    envs, untouched = make_envs(env_id, 2, "test", seed=5), make_envs(env_id, 2, "test", seed=5)
    assert len(set(envs.tasks)) == len(envs.tasks) == {"GridWorld": 21, "SparsePointRobot": 24}[env_id]
    assert all(name.startswith(env_id + "/") for name in envs.tasks)
    tasks = {}
    for a, b in zip(envs.tasks, reversed(envs.tasks)):
        for name, task in zip((a, b), envs.reset(tasks=[a, b])[1]["task"].tolist()):
            assert tasks.setdefault(name, task) == task
    assert len(set(map(tuple, tasks.values()))) == len(tasks)
    for name, (x, y) in tasks.items():
        where = f"{x:.0f},{y:.0f}" if env_id == "GridWorld" else f"{np.degrees(np.arctan2(y, x)):.2f}"
        assert name == f"{env_id}/{where}"
    assert envs.tasks == make_envs(env_id, 2, "train").tasks
    assert torch.equal(envs.reset()[1]["task"], untouched.reset()[1]["task"])


@pytest.mark.parametrize("env_id", [*IDS, "HalfCheetahVel", "AntGoal"])
@pytest.mark.parametrize("tasks", [["no such task"] * 2, ["first"], ["first"] * 3])
def test_wrong_tasks(env_id, tasks):
    """A task that the split does not have, or not one for each environment: BadInput, as with Meta-World."""
    envs = make_envs(env_id, 2)
    with pytest.raises(BadInput):
        envs.reset(tasks=[envs.tasks[0] if name == "first" else name for name in tasks])


def draws(env_id, num_envs, seed, split="train", resets=3):
    envs = make_envs(env_id, num_envs, split, seed)
    return torch.stack([envs.reset()[1]["task"] for _ in range(resets)])


@ALL_IDS
def test_draws(env_id):
    """Same seed (0 is one), same tasks, environment by environment; others with another seed, split or reset."""
    many = draws(env_id, 12, seed=0)
    assert torch.equal(many, draws(env_id, 12, seed=0))
    assert torch.equal(many[:, :5], draws(env_id, 5, seed=0))  # whatever the number of environments
    for other in (draws(env_id, 12, seed=1), draws(env_id, 12, seed=0, split="test"), many.roll(1, 0), many.roll(1, 1)):
        assert not torch.equal(many, other)


@ALL_IDS
def test_draws_ignore_other_random_numbers(env_id):
    """Neither torch's nor numpy's global state, nor steps taken in between, move them; nor are those moved."""
    expected = draws(env_id, 4, seed=2)
    torch.manual_seed(99), np.random.seed(99)
    before = torch.get_rng_state()
    envs, got = make_envs(env_id, 4, seed=2, horizon=2, episodes_per_task=1), []
    for _ in range(3):
        got.append(envs.reset()[1]["task"])
        envs.step(random_actions(envs)[0])
    assert torch.equal(torch.stack(got), expected) and torch.equal(torch.get_rng_state(), before)


@ALL_IDS
def test_resume_of_draws(env_id):
    """An environment with the loaded state goes on as the saved one does."""
    envs, other = make_envs(env_id, 4, seed=2), make_envs(env_id, 4, seed=2)
    envs.reset(), envs.reset()
    other.load_state_dict(envs.state_dict())
    assert torch.equal(other.reset()[1]["task"], envs.reset()[1]["task"])


@pytest.mark.parametrize("env_id", [*IDS, "HalfCheetahVel", "GridWorldAlternating"])
def test_repeated_tasks(env_id):
    """repeat: so many neighbours share a task, that of one environment without; what is random in it differs."""
    few, many = make_envs(env_id, 4, seed=2), make_envs(env_id, 12, seed=2)
    many.repeat = 3
    size = 4 if env_id == "GridWorldAlternating" else None  # there, a context of the session is beside the task
    for _ in range(3):
        task = few.reset()[1]["task"][:, :size]
        assert len(task.unique(dim=0)) > 1
        obs, info = many.reset()
        assert torch.equal(info["task"][:, :size], task.repeat_interleave(3, 0))
    if env_id == "HalfCheetahVel":
        assert len(obs.unique(dim=0)) == 12
    if env_id == "GridWorldAlternating":
        assert any(len(contexts.unique(dim=0)) > 1 for contexts in info["context"].split(3))
    many.repeat = 5  # what is left over has fewer
    assert many.reset()[1]["task"][:, :size].unique_consecutive(dim=0, return_counts=True)[1].tolist() == [5, 5, 2]


def test_distribution_of_tasks():
    """Chi-square against the uniform: 21 goals, neighbours in environment and reset independent; angles in 20 bins."""
    goals = draws("GridWorld", 500, seed=1, resets=40)
    index = (goals[..., 0] * 5 + goals[..., 1]).long()
    counts = np.array(list(collections.Counter(index.flatten().tolist()).values()))
    assert len(counts) == 21 and not {0, 1, 5, 6} & set(index.flatten().tolist())
    assert ((counts - 20_000 / 21) ** 2).sum() / (20_000 / 21) < 60.6  # p = 5e-6 at 20 degrees of freedom
    for one, other in ((index[1:], index[:-1]), (index[:, 1:], index[:, :-1])):
        assert (one == other).float().mean().item() == pytest.approx(1 / 21, abs=0.008)
    goals = draws("SparsePointRobot", 500, seed=1, resets=40)
    counts = np.histogram(np.arctan2(*goals.flatten(0, 1).numpy().T[::-1]), 20, (0, np.pi))[0]
    assert counts.sum() == 20_000 and ((counts - 1000) ** 2).sum() / 1000 < 58.7  # 19 degrees of freedom


# ---------- make_envs ----------


@pytest.mark.parametrize(
    "env_id, named",
    [
        ("GridWrld", ["GridWorld", "SparsePointRobot", "ML10", "ML45", "did you mean GridWorld"]),
        ("sparse-point-robot", ["did you mean SparsePointRobot"]),
        ("ML1-reech", ["did you mean ML1-reach"]),
        ("ML11", ["ML10"]),
        ("no_such_module:factory", ["no_such_module"]),
        ("common.envs:no_such_factory", ["common.envs", "no_such_factory"]),
        (":factory", [":factory"]),
        ("common.envs:", ["common.envs:"]),
        ("", ["GridWorld"]),
    ],
)
def test_unknown_id(env_id, named):
    """BadInput in one line, with what is known and what is nearest, or with the part that does not exist."""
    with pytest.raises(BadInput) as error:
        make_envs(env_id, 1)
    assert "\n" not in str(error.value)
    for word in named:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "wrong", [dict(split="validation"), dict(num_envs=0), dict(horizon=0), dict(episodes_per_task=-1)]
)
def test_wrong_arguments(wrong):
    """BadInput that names the argument and its value."""
    with pytest.raises(BadInput) as error:
        make_envs("GridWorld", **(dict(num_envs=2) | wrong))
    name, value = next(iter(wrong.items()))
    assert name in str(error.value) and str(value) in str(error.value)


def test_sizes_that_are_not_given():
    """None counts as unset: the family's own horizon and episodes."""
    envs = make_envs("GridWorld", 1, horizon=None, episodes_per_task=2)
    assert (envs.horizon, envs.episodes_per_task) == (15, 2)


FACTORY = """
from common.envs.gridworld import GridWorld

def small(num_envs, split, seed, device, horizon=3, episodes_per_task=2):
    return GridWorld(num_envs, split, seed, device, horizon, episodes_per_task)

def any_sizes(*given, **sizes):
    return small(*given, **sizes)

def broken(num_envs, split, seed, device, **sizes):
    return undefined_name
"""


def test_own_factory(tmp_path, monkeypatch):
    """`module:factory` from the working directory gets all arguments, its own sizes unless others are given."""
    (tmp_path / "own_envs.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    envs = make_envs("own_envs:small", 4, "test", seed=9, device="cpu")
    assert isinstance(envs, TensorEnvs)
    assert (envs.num_envs, envs.split, envs.seed, envs.horizon, envs.meta_horizon) == (4, "test", 9, 3, 6)
    assert make_envs("own_envs:small", 4, horizon=5).meta_horizon == 10
    assert make_envs("own_envs:any_sizes", 4, horizon=5).meta_horizon == 10
    with pytest.raises(BadInput, match="NameError: .*undefined_name.*own_envs.py, line 11"):  # where their mistake is
        make_envs("own_envs:broken", 4)
    (tmp_path / "half.py").write_text("import sys\nsys.no_such_attribute\n")
    with pytest.raises(BadInput, match="AttributeError: .*no_such_attribute.*half.py, line 2"):
        make_envs("half:factory", 4)
