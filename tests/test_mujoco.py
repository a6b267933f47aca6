"""HalfCheetah, Ant, Hopper: one step against Gymnasium's, rewards by hand, the protocol, sets of tasks, the draws."""

import math

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from common.envs import BadInput, make_envs

IDS = ["HalfCheetahVel", "HalfCheetahDir", "AntDir", "AntGoal", "HopperMass"]
MORTAL = ["AntDir", "HopperMass"]
ALL_IDS = pytest.mark.parametrize("env_id", IDS)
VARIED = dict(body_mass=(5,), body_inertia=(5, 3), geom_friction=(5, 3), dof_damping=(6,))  # what HopperMass varies


def random_actions(envs, steps=None, scale=1.5, seed=0):
    """Half of them beyond the bounds, from a generator of their own: (T, N, A)."""
    generator = torch.Generator().manual_seed(seed)
    shape = steps or envs.meta_horizon, envs.num_envs, *envs.single_action_space.shape
    return scale * (2 * torch.rand(shape, generator=generator) - 1)


# ---------- Against Gymnasium ----------


def theirs(env_id, task=()):
    """Gymnasium's own environment; a Hopper with its arrays multiplied by 1.5^e, for the exponents e of a task."""
    name = next(name for name in ("HalfCheetah", "Ant", "Hopper") if name in env_id)
    env = gymnasium.make(f"{name}-v5").unwrapped
    if name == "Hopper":
        rest = list(task)
        for part, shape in VARIED.items():
            for index in np.ndindex(shape):
                getattr(env.model, part)[index] *= 1.5 ** rest.pop(0)
        assert not rest
    return env


def reward_by_hand(env_id, task, before, after, action, info):
    """VariBAD's rewards from Gymnasium's positions, for one environment."""
    vx, vy = (after[:2] - before[:2]) / 0.05
    effort = sum(float(a) ** 2 for a in action)
    if env_id == "HalfCheetahVel":
        assert info["reward_forward"] == pytest.approx(vx, abs=1e-9)
        return -abs(vx - task[0]) + info["reward_ctrl"] / 2  # Gymnasium's cost is 0.1 |a|^2
    if env_id == "HalfCheetahDir":
        return vx * task[0] + info["reward_ctrl"] / 2
    if env_id == "HopperMass":
        return info["reward_forward"] + info["reward_survive"] + info["reward_ctrl"]
    if env_id == "AntDir":
        return vx * task[0] + vy * task[1] + 1 + info["reward_ctrl"]  # Gymnasium's cost is 0.5 |a|^2
    return -abs(after[0] - task[0]) - abs(after[1] - task[1]) - 0.1 * effort


@pytest.mark.parametrize(
    "env_id, split, control_cost",
    [(env_id, "train", cost) for env_id in IDS[:-1] for cost in ("", "clipped")]
    + [("HalfCheetahVel", "test", "raw"), ("HopperMass", "train", ""), ("HopperMass", "test", "")],
)
def test_steps_of_gymnasium(env_id, split, control_cost):
    """From every state of random episodes: positions and velocities to 1e-12, observations, rewards, deaths."""
    envs = make_envs(env_id, 4, split, seed=3, horizon=40, episodes_per_task=2, control_cost=control_cost)
    raw = control_cost == "raw" or (not control_cost and env_id != "HopperMass")  # in the reward: variBAD's and LDM's
    _, info = envs.reset()
    tasks, deaths, moved = info["task"].double().numpy(), 0, 0
    copies = [theirs(env_id, task) for task in tasks]
    assert len(np.unique(tasks, axis=0)) > 1
    assert all(env.dt == pytest.approx(envs.dt) for env in copies)
    assert envs.single_action_space == (
        Box(-np.inf, np.inf, copies[0].action_space.shape) if raw else copies[0].action_space
    )
    for t, actions in enumerate(random_actions(envs)):
        if t % 40 == 20:
            envs.q[0, 2 if "Ant" in env_id else 1] += 0.5  # lifts the first: an Ant above its healthy height
        if t == 10 and env_id == "HopperMass":
            envs.v[1, 3:5], envs.v[2, 0] = (12, -15), 150  # beyond the observed range, and beyond the healthy one
        q, v, alive = envs.q.copy(), envs.v.copy(), envs.alive.copy()
        if t % 40 == 39:  # the state is the next episode's after this step
            envs.step(actions)
            continue
        _, rewards, terminated, _, info = envs.step(actions)
        for i in np.flatnonzero(alive):
            env = copies[i]
            mujoco.mj_resetData(env.model, env.data)  # the solver begins anew, as in ours
            env.set_state(q[i], v[i])
            action = actions[i].clamp(-1, 1).numpy()
            obs, _, died, _, parts = env.step(action)
            new_q, new_v = env.data.qpos, env.data.qvel
            np.testing.assert_allclose(envs.q[i], new_q, rtol=0, atol=1e-12)
            np.testing.assert_allclose(envs.v[i], new_v, rtol=0, atol=1e-12 * max(1, abs(new_v).max()))
            moved += abs(new_q - q[i]).max() > 1e-3
            mujoco.mj_kinematics(env.model, env.data)  # Gymnasium's body positions are those of the last substep
            expected = {
                "HalfCheetah": [*obs, *env.data.body(1).xpos],
                "HopperMass": [*obs, died],
                "AntDir": obs[:27],  # contact forces follow
                "AntGoal": [*new_q[:2], *obs[:27]],
            }["HalfCheetah" if "Cheetah" in env_id else env_id]
            np.testing.assert_allclose(info["final_obs"][i], expected, rtol=1e-6, atol=1e-6)
            parts["reward_ctrl"] = (
                env.control_cost(actions[i].numpy() if raw else action) * -1
            )  # the step's was clipped
            by_hand = reward_by_hand(env_id, tasks[i], q[i], new_q, actions[i] if raw else action, parts)
            assert rewards[i].item() == pytest.approx(by_hand, rel=1e-6, abs=1e-6)
            assert terminated[i].item() == (died and env_id in MORTAL)
            deaths += died and env_id in MORTAL
    assert moved > (100 if env_id == "HopperMass" else 150) and (deaths > 0) == (env_id in MORTAL)


@ALL_IDS
def test_first_states(env_id):
    """Noise about Gymnasium's own, new in every episode: U(-0.1, 0.1) on positions, N(0, 0.1^2) on velocities; of the
    Hopper U(-0.005, 0.005) on both."""
    envs = make_envs(env_id, 500, horizon=1, episodes_per_task=2)
    hopper = env_id == "HopperMass"
    high, deviation, fourth = (0.005, 0.005 / 3**0.5, 0.005**4 / 5) if hopper else (0.1, 0.1, 3e-4)
    first, _ = envs.reset()
    for _ in range(2):
        noise = envs.q - theirs(env_id, np.zeros(41)).init_qpos
        assert abs(noise).max() < high and noise.mean() == pytest.approx(0, abs=0.03 * high)
        assert noise.std() == pytest.approx(high / 3**0.5, rel=0.03)
        assert envs.v.mean() == pytest.approx(0, abs=0.05 * high)
        assert envs.v.std() == pytest.approx(deviation, rel=0.03)
        assert (envs.v**4).mean() == pytest.approx(fourth, rel=0.2)  # normal, or uniform
        assert abs(np.corrcoef(envs.q[:, :6].ravel(), envs.v[:, :6].ravel())[0, 1]) < 0.05
        again, *_ = envs.step(random_actions(envs)[0])
        assert (again != first).any(1).all()


# ---------- The protocol ----------


@ALL_IDS
def test_lockstep(env_id):
    """Shapes, types and times of everything in a meta-episode; the same task throughout."""
    envs = make_envs(env_id, 3, horizon=4, episodes_per_task=3)
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(random_actions(envs)[0])
    for _ in range(2):
        first, info = envs.reset()
        size = envs.single_observation_space.shape
        assert first.shape == (3, *size) and first.dtype == info["task"].dtype == torch.float32
        task = info["task"].clone()
        for t, action in enumerate(random_actions(envs, scale=0.1)):
            obs, reward, terminated, truncated, info = envs.step(action)
            assert obs.dtype == info["final_obs"].dtype == reward.dtype == torch.float32
            assert terminated.dtype == truncated.dtype == torch.bool and not terminated.any()
            assert reward.shape == terminated.shape == truncated.shape == (3,)
            assert (truncated == ((t + 1) % 4 == 0)).all()
            assert torch.equal(obs, info["final_obs"]) == ((t + 1) % 4 != 0)
            assert set(info) == {"final_obs"} | ({"alive"} if env_id in MORTAL else set())
            assert torch.equal(envs.task, task)
            if t % 4 == 3:  # the next episode begins near its start
                torch.testing.assert_close(obs, first, rtol=0, atol=0.8)
        with pytest.raises(RuntimeError, match="reset"):
            envs.step(action)
    envs.close()
    envs.close()


@pytest.mark.parametrize("env_id", MORTAL)
def test_early_death(env_id):
    """One terminated step that counts, then idle steps of reward 0 to the episode's end; others go on."""
    envs, other = (make_envs(env_id, 3, horizon=6, episodes_per_task=2) for _ in range(2))
    envs.reset(), other.reset()
    for t, action in enumerate(random_actions(envs, scale=0.1)):
        if t == 2:
            envs.q[1, 2] = 1.5  # an Ant's height, a Hopper's angle
        if t == 8:
            envs.q[:, 2] = torch.tensor([-3, 1.5, 1.5])  # all at once, too low or too high
        obs, reward, terminated, truncated, info = envs.step(action)
        other_obs, other_reward, *_ = other.step(action)
        assert terminated.tolist() == {2: [False, True, False], 8: [True] * 3}.get(t, [False] * 3)
        assert info["alive"].tolist() == [t < 9, t < 3 or 6 <= t < 9, t < 9]
        assert (reward[~info["alive"]] == 0).all() and (reward[info["alive"]] != 0).all()
        if t in (2, 8):
            dead = info["final_obs"]
        if env_id == "HopperMass":  # its last observation says so
            flags = info["final_obs"][:, -1].tolist()
            assert flags == [t >= 8, 2 <= t < 6 or t >= 8, t >= 8]
        if 3 <= t < 5:
            assert torch.equal(info["final_obs"][1], dead[1])
        if 9 <= t < 11:
            assert torch.equal(info["final_obs"], dead)
        if t < 8:  # what one environment does is no concern of the others'
            assert torch.equal(obs[[0, 2]], other_obs[[0, 2]]) and torch.equal(reward[[0, 2]], other_reward[[0, 2]])
    assert torch.equal(obs, other_obs) and truncated.all()  # a first observation again


@pytest.mark.parametrize("env_id", MORTAL)
def test_death_at_the_end(env_id):
    """In an episode's last step it is both terminated and truncated, and the next one lives."""
    envs = make_envs(env_id, 2, horizon=2, episodes_per_task=2)
    envs.reset()
    actions = random_actions(envs, scale=0.1)
    envs.step(actions[0])
    envs.q[0, 2] = 1.5
    obs, _, terminated, truncated, info = envs.step(actions[1])
    assert terminated.tolist() == [True, False] and truncated.all() and info["alive"].all()
    height_or_angle = 0 if env_id == "AntDir" else 1
    assert info["final_obs"][0, height_or_angle] > 1 and obs[0, height_or_angle] < 1
    assert envs.step(actions[2])[4]["alive"].all()


# ---------- Tasks ----------


TABLE = {  # (id, rule, split) -> the evaluation tasks, by name
    ("HalfCheetahVel", "varibad", "train"): {f"{v}": [v] for v in (0.25, 0.75, 1.25, 1.75, 2.25, 2.75)},
    ("HalfCheetahVel", "ldm", "train"): {"0.25": [0.25], "3.25": [3.25]},
    ("HalfCheetahVel", "ldm", "test"): {f"{v}": [v] for v in (0.75, 1.25, 1.75, 2.25, 2.75)},
    ("HalfCheetahDir", "varibad", "train"): {"forward": [1], "backward": [-1]},
    ("AntDir", "varibad", "train"): {"0": [1, 0], "180": [-1, 0]},
    ("AntDir", "ldm", "train"): {"0": [1, 0], "90": [0, 1], "180": [-1, 0], "270": [0, -1]},
    ("AntDir", "ldm", "test"): {
        "45": [0.5**0.5, 0.5**0.5],
        "135": [-(0.5**0.5), 0.5**0.5],
        "225": [-(0.5**0.5), -(0.5**0.5)],
        "315": [0.5**0.5, -(0.5**0.5)],
    },
    ("AntGoal", "ldm", "test"): {"1.75,0": [1.75, 0], "1.75,90": [0, 1.75], "1.75,180": [-1.75, 0]}
    | {"1.75,270": [0, -1.75]},
    ("AntGoal", "ldm", "train"): {
        f"{r},{d}": [r * x, r * y]
        for r in (0.5, 2.75)
        for d, (x, y) in {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}.items()
    },
}
TABLE["AntGoal", "varibad", "train"] = TABLE["AntGoal", "ldm", "train"] | TABLE["AntGoal", "ldm", "test"]
for i in ("AntDir", "AntGoal"):
    TABLE[i, "ldm", "all"] = TABLE[i, "ldm", "train"] | TABLE[i, "ldm", "test"]
TABLE |= {(i, "varibad", "test"): tasks for (i, rule, _), tasks in TABLE.items() if rule == "varibad"}


@pytest.mark.parametrize("env_id, rule, split", TABLE)
def test_evaluation_tasks(env_id, rule, split):
    """Names and ground truths, set in any order; naming draws nothing, and first states are the same each time."""
    expected = TABLE[env_id, rule, split]
    size = len(expected)
    envs, untouched = (make_envs(env_id, size, split, seed=5, split_rule=rule) for _ in range(2))
    assert sorted(envs.tasks) == sorted(f"{env_id}/{name}" for name in expected)
    assert envs.same_splits == (rule == "varibad")
    for names in (envs.tasks, envs.tasks[::-1]):
        task = envs.reset(tasks=names)[1]["task"]
        truths = [expected[name.split("/")[1]] for name in names]
        torch.testing.assert_close(task, torch.tensor(truths).float())
    first = envs.reset(tasks=envs.tasks)[0]
    obs, info = envs.reset()
    their_obs, their_info = untouched.reset()
    assert torch.equal(obs, their_obs) and torch.equal(info["task"], their_info["task"])
    assert torch.equal(envs.reset(tasks=envs.tasks)[0], first)
    assert (obs != first).any(1).all()


def parameters(env_id, split, rule):
    """20,000 drawn tasks: velocity, sign, degrees, or radius (and the angles)."""
    envs = make_envs(env_id, 2000, split, seed=1, split_rule=rule)
    task = torch.cat([envs.reset()[1]["task"] for _ in range(10)]).double().numpy()
    if task.shape[1] == 1:
        return task[:, 0], None
    angle = np.degrees(np.arctan2(task[:, 1], task[:, 0])) % 360
    radius = np.linalg.norm(task, axis=1)
    return (radius, angle) if env_id == "AntGoal" else (angle.round(3) % 360, radius)


@pytest.mark.parametrize(
    "rule, split", [("varibad", "train"), ("varibad", "test"), ("ldm", "train"), ("ldm", "test"), ("ldm", "all")]
)
def test_drawn_tasks(rule, split):
    """Drawn from all of the set and nothing beyond it, uniformly: in velocity, direction and area."""
    train, test = rule == "ldm" and split == "train", rule == "ldm" and split == "test"
    v, _ = parameters("HalfCheetahVel", split, rule)
    edges = (
        [0, 0.25, 0.5, 3, 3.25, 3.5]
        if train
        else np.linspace(*((0.5, 3) if test else (0, 3.5) if split == "all" else (0, 3)), 6)
    )
    check_uniform(np.histogram(v, edges)[0], empty=[2] if train else [])
    degrees, ones = parameters("AntDir", split, rule)
    found, counts = np.unique(degrees, return_counts=True)
    directions = {"train": [0, 90, 180, 270], "test": [45, 135, 225, 315], "all": [*range(0, 360, 45)]}
    assert found.tolist() == (directions[split] if rule == "ldm" else [0, 180])
    check_uniform(counts)
    np.testing.assert_allclose(ones, 1, rtol=1e-6)
    radius, angle = parameters("AntGoal", split, rule)
    check_uniform(np.histogram(angle, 12, (0, 360))[0])
    if train:
        assert ((radius < 1) | (radius >= 2.5)).all() and radius.max() < 3
        assert (radius < 1).mean() == pytest.approx(4 / 15, abs=0.012)
        assert (radius < 0.5).mean() == pytest.approx(1 / 15, abs=0.007)
    else:
        check_uniform(np.histogram(radius**2, 10, (1, 6.25) if test else (0, 9))[0])
    if rule == "varibad":
        check_uniform(np.unique(parameters("HalfCheetahDir", split, rule)[0], return_counts=True)[1])


def check_uniform(counts, empty=()):
    """Chi-square of 20,000 draws, all counted, against the uniform over bins of equal probability."""
    assert sum(counts) == 20_000 and all(counts[i] == 0 for i in empty)
    counts = np.delete(counts, empty)
    mean = 20_000 / len(counts)
    assert ((counts - mean) ** 2).sum() / mean < 45  # p < 1e-5 at up to 11 degrees of freedom


# ---------- HopperMass ----------


@pytest.mark.parametrize("split, size, low, high", [("train", 3000, 0, 1), ("test", 30, 1, 1.5)])
def test_weights(split, size, low, high):
    """Fixed tasks, all different, whose exponents fill their range evenly and are independent; a reset draws one."""
    envs, other = (make_envs("HopperMass", 30, split, seed=seed, horizon=1) for seed in (1, 2))
    assert envs.tasks == other.tasks == [f"HopperMass/{i}" for i in range(size)] and not envs.same_splits
    table = envs.task_table
    assert torch.equal(table, other.task_table) and table.shape == (size, 41)
    assert torch.equal(envs.reset(tasks=envs.tasks[-30:])[1]["task"], table[-30:])
    e = table.double().numpy()
    assert len(np.unique(e)) > 0.98 * e.size  # rounded to float32
    margin = 0.02 * (high - low)
    assert low <= abs(e).min() < low + margin and high - margin < abs(e).max() <= high
    counts = np.histogram(abs(e), 10, (low, high))[0]
    assert counts == pytest.approx(e.size / 10, rel=0.25 if size == 30 else 0.03)
    assert (e > 0).mean() == pytest.approx(0.5, abs=2 / e.size**0.5)
    correlations = np.corrcoef(e.T) - np.eye(41)
    assert abs(correlations).max() < 4.5 / size**0.5
    for model, task in zip(envs.copies, e[-30:]):  # which exponent is whose
        ours, originals = (np.concatenate([getattr(m, name).ravel() for name in VARIED]) for m in (model, envs.model))
        np.testing.assert_allclose(ours, originals * 1.5**task, rtol=1e-14)
        assert (originals != 0).sum() == 4 + 12 + 15 + 3
    drawn = torch.cat([envs.reset()[1]["task"] for _ in range(40)])
    distinct = {tuple(row) for row in drawn.tolist()}
    assert distinct <= {tuple(row) for row in table.tolist()}
    assert len(distinct) == pytest.approx(size * (1 - math.exp(-1200 / size)), rel=0.05)
    assert not torch.equal(drawn[:30], other.reset()[1]["task"])


def test_originals_are_restored():
    """A task after others is what it is at first, bit for bit; and the originals are Gymnasium's."""
    envs = make_envs("HopperMass", 2)
    a, b = envs.tasks[:2], envs.tasks[2:4]
    actions = random_actions(envs, 20)

    def run(names):
        out = [envs.reset(tasks=names)[0]]
        out += [getattr(model, name).copy() for model in envs.copies for name in VARIED]
        return out + [x for action in actions for x in envs.step(action)[:3]]

    first, other, again = run(a), run(b), run(a)
    assert all(np.array_equal(x, y) for x, y in zip(first, again))
    assert not any(np.array_equal(x, y) for x, y in zip(first[1:9], other[1:9]))
    original = gymnasium.make("Hopper-v5").unwrapped.model
    assert all(np.array_equal(getattr(envs.model, name), getattr(original, name)) for name in VARIED)


def test_what_has_an_effect():
    """Of the 41 numbers, from one state: masses, inertias about y, sliding friction, dampings of the joints. Not what
    belongs to the world's body or the root's joints; nor inertias about other axes: all motion is in a plane."""
    envs = make_envs("HopperMass", 43)
    envs.tasks = [f"{i}" for i in range(43)]  # nothing changed; each alone; the floor's friction above the foot's
    envs.task_table = torch.cat([torch.zeros(1, 41), torch.eye(41), 2 * torch.eye(41)[20:21]])
    envs.reset(tasks=envs.tasks)
    envs.q[:], envs.v[:] = envs.q[0].copy(), envs.v[0].copy()
    for action in random_actions(envs, 15)[:, :1]:
        envs.step(action.repeat(43, 1))
        assert envs.alive.all()
    assert abs(envs.q[0, 1] - 1.25) > 0.01  # it has moved
    effective = np.flatnonzero((envs.q != envs.q[0]).any(1)) - 1
    assert effective.tolist() == [1, 2, 3, 4, 9, 12, 15, 18, 32, 38, 39, 40, 41]


# ---------- Draws ----------


def trajectory(envs, resets=2):
    """Everything that comes out of some meta-episodes, as one tensor (_, N, ...) for each of its kinds."""
    out = []
    for _ in range(resets):
        obs, info = envs.reset()
        out.append([obs, info["task"]])
        for action in random_actions(envs):
            obs, reward, terminated, _, info = envs.step(action[: envs.num_envs])
            out.append([obs, info["final_obs"], reward, terminated])
    return [x for row in out for x in row]


@ALL_IDS
def test_same_seed_same_everything(env_id):
    """Whatever the number of threads, the global random states and, environment by environment, the number of them."""
    sizes = dict(horizon=12, episodes_per_task=2)
    expected = trajectory(make_envs(env_id, 6, seed=0, **sizes))
    torch.manual_seed(99), np.random.seed(99)
    again = trajectory(make_envs(env_id, 6, seed=0, **sizes))
    assert all(torch.equal(a, b) for a, b in zip(again, expected))
    for threads in (1, 3):
        envs = make_envs(env_id, 6, seed=0, num_threads=threads, **sizes)
        assert envs.pool.nthread == threads
        assert all(torch.equal(a, b) for a, b in zip(trajectory(envs), expected))
    few = make_envs(env_id, 4, seed=0, **sizes)
    many = make_envs(env_id, 6, seed=0, **sizes)
    (obs, info), (more_obs, more_info) = few.reset(), many.reset()
    assert torch.equal(obs, more_obs[:4]) and torch.equal(info["task"], more_info["task"][:4])
    for action in random_actions(many):
        assert torch.equal(few.step(action[:4])[0], many.step(action)[0][:4])
    for other in (dict(seed=1), dict(seed=0, split="test")):
        assert not torch.equal(make_envs(env_id, 6, **other, **sizes).reset()[0], expected[0])


@ALL_IDS
def test_first_states_differ(env_id):
    """No environment's noise is another's, in any episode, reset or split."""
    seen = []
    for split in ("train", "test"):
        envs = make_envs(env_id, 5, split, horizon=1, episodes_per_task=3)
        for tasks in (None, None, [envs.tasks[0]] * 5):
            seen.append(envs.reset(tasks)[0])
            seen += [envs.step(action)[0] for action in random_actions(envs)[:2]]
    seen = torch.stack(seen)[..., 1].flatten()  # a position
    assert len(seen.unique()) == len(seen) == 90


@ALL_IDS
def test_resume(env_id):
    """Other environments with the loaded state go on as the saved ones do, noise and all."""
    sizes = dict(horizon=5, episodes_per_task=2)
    envs, other = (make_envs(env_id, 3, seed=2, **sizes) for _ in range(2))
    trajectory(envs)
    other.load_state_dict(envs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(trajectory(other), trajectory(envs)))


# ---------- Bad input ----------


@pytest.mark.parametrize(
    "env_id, wrong, named",
    [
        ("AntDirr", {}, ["AntDirr", "did you mean AntDir"]),
        ("HalfCheetahDir", dict(split_rule="ldm"), ["HalfCheetahDir", "'ldm'", "varibad"]),
        ("AntGoal", dict(split_rule="LDM"), ["AntGoal", "'LDM'", "varibad and ldm"]),
        ("AntGoal", dict(control_cost="Raw"), ["AntGoal", "'Raw'", "raw and clipped"]),
        ("HopperMass", dict(control_cost="raw"), ["HopperMass", "control_cost raw"]),
        ("GridWorld", dict(control_cost="raw"), ["GridWorld", "control_cost raw"]),
        ("AntGoal", dict(split="eval"), ["'eval'", "train and test"]),
        ("AntGoal", dict(horizon=0), ["horizon", "0"]),
    ],
)
def test_wrong_arguments(env_id, wrong, named):
    """BadInput in one line that names the culprit and what there is."""
    with pytest.raises(BadInput) as error:
        make_envs(env_id, 2, **wrong)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in named)
