"""envs/metaworld.py against metaworld itself: the same tasks, observations, rewards, successes, to the last bit."""

import pickle

import metaworld
import numpy as np
import pytest
import torch
from metaworld import policies
from metaworld.env_dict import ALL_V3_ENVIRONMENTS, ML10_V3, ML45_V3
from scipy.spatial.transform import Rotation

from common.envs import BadInput, make_envs
from common.envs.metaworld import _Rotation, benchmark_tasks, fast_class, known_ids, make_metaworld, make_sawyer

ML10_FAMILIES = [*ML10_V3["train"], *ML10_V3["test"]]
# Others whose code differs: hands that families reset themselves, physics inside resets, two objects, own rewards.
OTHERS = ["assembly", "box-close", "coffee-pull", "door-lock", "faucet-open", "hammer", "soccer", "stick-push"]
OTHERS = [f"{name}-v3" for name in [*OTHERS, "window-close", "reach-wall"]]
GRASPED = ["push-v3", "pick-place-v3", "shelf-place-v3"]  # whose rewards ask whether the fingers touch the object


def scripted(family):
    words = "".join(word.title() for word in family.removesuffix("-v3").split("-"))
    words = words.replace("PegInsertSide", "PegInsertionSide")
    return getattr(policies, f"Sawyer{words}V3Policy")()


def same(a, b):
    """Bitwise, through tuples and dictionaries."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return np.array_equal(a, b, equal_nan=True)


def compare(family, steps, reward_version="v2"):
    """Metaworld's class and ours side by side; goals 0, 1, 1, 0; the scripted policy, then random actions.

    A third environment, ours too, shares the compiled model with the second and is in another task at the same time.
    Returns the highest reward, and whether both fingers touched the object.
    """
    _, tasks = benchmark_tasks("ML1", family, seed=3)
    goals = [task for _, _, task in tasks["train"][:2]]
    cls = ALL_V3_ENVIRONMENTS[family]
    theirs, ours = (c(reward_function_version=reward_version) for c in (cls, fast_class(cls)))
    other = fast_class(cls)(reward_function_version=reward_version)
    assert ours.model is other.model
    rng, policy, best, touched = np.random.default_rng(0), scripted(family), 0, False
    for episode, goal in enumerate([0, 1, 1, 0]):
        theirs.set_task(goals[goal])
        ours.set_task(goals[goal])
        (obs, info), started = theirs.reset(), ours.reset()
        assert obs.dtype == started[0].dtype == np.float64
        assert same((obs, info), started), f"{family}: reset {episode}"
        other.set_task(goals[1 - goal])
        other.reset()
        for k in range(steps if episode < 2 else 30):
            action = rng.uniform(-1.5, 1.5, 4)
            if episode < 2 and k % 8 < 7:
                action = policy.get_action(obs)
            action = np.asarray(action, np.float32)
            expected, got = theirs.step(action), ours.step(action)
            assert same(expected, got), f"{family}: episode {episode}, step {k}"
            obs, best = expected[0], max(best, expected[1])
            if family in GRASPED:
                touched |= theirs.touching_main_object
                assert theirs.touching_main_object == ours.touching_main_object
            if k % 3 == 0:
                other.step(action)
    return best, touched


@pytest.mark.filterwarnings("ignore:Constant")
@pytest.mark.parametrize("family", ML10_FAMILIES + OTHERS)
def test_bitwise_equal(family):
    best, touched = compare(family, steps=80)
    if family in GRASPED:
        assert touched, "the comparison never reached a contact of both fingers"
    if family in ("faucet-open-v3", "hammer-v3"):
        assert best == 10


@pytest.mark.filterwarnings("ignore:Constant")
@pytest.mark.parametrize("family", ["push-v3", "faucet-open-v3"])
def test_bitwise_equal_with_v1_rewards(family):
    compare(family, steps=50, reward_version="v1")


def test_quaternions_are_scipys():
    """Random rotations, the 24 of the cube (ties in the choice of the largest component), with rounding on top."""
    rng = np.random.default_rng(0)
    matrices = [*Rotation.random(500, rng=rng).as_matrix(), *Rotation.create_group("O").as_matrix().round()]
    matrices += [m + rng.normal(size=(3, 3)) * 1e-16 for m in matrices]
    for m in matrices:
        assert same(Rotation.from_matrix(m).as_quat(), _Rotation.from_matrix(m).as_quat())


def drawn(tasks, num_envs, seed, split, resets):
    """The draws of the protocol, written down once more."""
    families = list(dict.fromkeys(name.split("/")[0] for name in tasks))
    u = np.random.default_rng((seed, ["train", "test"].index(split), resets)).random((num_envs, 2))
    return [f"{families[int(a * len(families))]}/{int(b * 50)}" for a, b in u]


@pytest.mark.parametrize("split", ["train", "test"])
def test_vector_environment_against_a_plain_loop(split):
    """ML10, every number that comes out, from metaworld's own environments stepped one by one."""
    n, horizon, episodes = 7, 25, 2
    envs = make_metaworld("ML10", n, split, seed=4, horizon=horizon, episodes_per_task=episodes, num_workers=2)
    obs, info = envs.reset()
    _, tasks = benchmark_tasks("ML10", "", 4)
    by_name = {f"{family}/{number}": task for family, number, task in tasks[split]}
    assert list(by_name) == envs.tasks and len(envs.tasks) == 50 * (10 if split == "train" else 5)
    names = drawn(envs.tasks, n, 4, split, 0)
    plain = [ALL_V3_ENVIRONMENTS[name.split("/")[0]]() for name in names]
    for env, name in zip(plain, names):
        env.set_task(by_name[name])
    expected = torch.tensor(np.array([env.reset()[0] for env in plain], np.float32))
    assert torch.equal(obs, expected)
    one_hot = torch.eye(15)[[ML10_FAMILIES.index(name.split("/")[0]) for name in names]]
    goals = torch.tensor(np.array([env._target_pos for env in plain], np.float32))
    assert torch.equal(info["task"], torch.cat([one_hot, goals], 1)) and envs.families == ML10_FAMILIES
    actions = torch.rand(horizon * episodes, n, 4, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    for t, action in enumerate(actions):
        obs, reward, terminated, truncated, info = envs.step(action)
        steps = [env.step(a) for env, a in zip(plain, action.clamp(-1, 1).numpy())]
        final = torch.tensor(np.array([step[0] for step in steps], np.float32))
        assert torch.equal(info["final_obs"], final)
        assert torch.equal(reward, torch.tensor(np.array([step[1] for step in steps], np.float32)))
        assert info["success"].tolist() == [bool(step[4]["success"]) for step in steps]
        assert info["alive"].all() and not terminated.any()
        assert truncated.tolist() == [t in (horizon - 1, 2 * horizon - 1)] * n
        if t == horizon - 1:
            final = torch.tensor(np.array([env.reset()[0] for env in plain], np.float32))
        assert torch.equal(obs, final)
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(action)
    envs.close()


def play(envs):
    """A meta-episode: everything that comes out, in one row."""
    obs, info = envs.reset()
    out = [obs, info["task"]]
    for action in torch.rand(10, 5, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1:
        obs, reward, *_ = envs.step(action)
        out += [obs, reward[:, None]]
    return torch.cat([x.flatten() for x in out])


def test_workers_evaluations_and_the_slow_path_change_nothing():
    sizes = {"seed": 0, "horizon": 10, "episodes_per_task": 1}
    envs = make_metaworld("ML1-push", 5, **sizes, num_workers=1)
    first, second = play(envs), play(envs)
    envs.close()
    assert not torch.equal(first, second)
    envs = make_metaworld("ML1-push", 5, **sizes, num_workers=3, fast=False)
    envs.reset(tasks=envs.tasks[:5])
    assert torch.equal(play(envs), first) and torch.equal(play(envs), second)
    envs.load_state_dict({"resets": 1})
    assert torch.equal(play(envs), second), "a resumed run goes on with other tasks"
    envs.close()


def vectors(tasks):
    return {(family, pickle.loads(task.data)["rand_vec"].tobytes()) for family, _, task in tasks}


def test_ml1_tasks_are_metaworlds(family="sweep-into-v3"):
    """And the train split has those of training; gym.make_vec("Meta-World/ML1-train") has the test's instead."""
    made = metaworld.ML1(family, seed=7)
    _, tasks = benchmark_tasks("ML1", family, 7)
    assert [task for _, _, task in tasks["train"]] == made.train_tasks
    assert [task for _, _, task in tasks["test"]] == made.test_tasks
    env = ALL_V3_ENVIRONMENTS[family]()
    for split, theirs in (("train", made.train_tasks), ("test", made.test_tasks)):
        envs = make_envs(f"ML1-{family}", 3, split, seed=7, horizon=1, episodes_per_task=1)
        for names in (envs.tasks[:3], envs.tasks[47:]):
            goals = []
            for name in names:
                env.set_task(theirs[int(name.split("/")[1])])
                env.reset()
                goals.append(env._target_pos.copy())
            assert torch.equal(envs.reset(tasks=names)[1]["task"], torch.tensor(np.array(goals, np.float32)))
        envs.close()


def test_ml10_test_tasks_are_metaworlds():
    """Only the test half, as ML10's constructor makes it: metaworld takes its time."""
    arguments = metaworld._env_dict.ML10_ARGS_KWARGS["test"]
    made = metaworld._make_tasks(ML10_V3["test"], arguments, metaworld._ML_OVERRIDE, seed=4)
    assert [task for _, _, task in benchmark_tasks("ML10", "", 4)[1]["test"]] == made


@pytest.mark.parametrize("benchmark, sizes", [("ML1", (50, 50)), ("ML10", (500, 250)), ("ML45", (2250, 250))])
def test_train_and_test_are_disjoint(benchmark, sizes):
    families, tasks = benchmark_tasks(benchmark, "push-v3" if benchmark == "ML1" else "", 4)
    train, test = vectors(tasks["train"]), vectors(tasks["test"])
    assert (len(train), len(test)) == sizes and not train & test
    if benchmark != "ML1":
        of = {split: {family for family, _, _ in tasks[split]} for split in tasks}
        assert not of["train"] & of["test"] and families == list(
            dict.fromkeys(f for s in tasks.values() for f, _, _ in s)
        )
        theirs = {"ML10": ML10_V3, "ML45": ML45_V3}[benchmark]
        assert of == {split: set(theirs[split]) for split in tasks}
    others = benchmark_tasks(benchmark, "push-v3", 5)[1]["train"] if benchmark == "ML1" else []
    assert not train & vectors(others), "another seed, other goals"


def test_names():
    assert len(known_ids()) == 52 and {"ML10", "ML45", "ML1-reach", "ML1-reach-wall", "ML1-push"} < set(known_ids())
    goals = []
    for name in ("ML1-reach-v2", "ML1-reach-v3"):
        envs = make_envs(name, 2, seed=5, reward_version="v1")
        assert envs.families == ["reach-v3"] and (envs.horizon, envs.episodes_per_task) == (500, 3)
        assert envs.single_observation_space.shape == (39,) and envs.single_action_space.shape == (4,)
        assert envs.single_observation_space.dtype == envs.single_action_space.dtype == np.float32
        assert envs.tasks[0] == "reach-v3/0" and envs.tasks[-1] == "reach-v3/49"
        goals.append(envs.reset()[1]["task"])
        envs.close()
    assert torch.equal(*goals)
    assert make_sawyer("reach-v3", "v1").reward_function_version == "v1"


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"env_id": "ML1-raech"}, "ML1-reach"),
        ({"env_id": "ML11"}, "ML10"),
        ({"env_id": "ML1"}, "unknown env_id 'ML1'"),
        ({"env_id": "ML10-v3"}, "did you mean ML10"),
        ({"split": "validation"}, "validation"),
        ({"horizon": 501}, "500"),
        ({"horizon": 0}, "horizon"),
        ({"reward_version": "v3"}, "v3"),
    ],
)
def test_bad_input(arguments, says):
    with pytest.raises(BadInput, match=says) as caught:
        make_metaworld(**{"env_id": "ML1-reach", "num_envs": 2, **arguments})
    assert "\n" not in str(caught.value)


def test_metaworld_itself_is_left_alone():
    """Making tasks and fast classes changes nothing for those who use metaworld in the same process."""
    benchmark_tasks("ML1", "push-v3", 4)
    fast_class(ALL_V3_ENVIRONMENTS["push-v3"])
    from metaworld.envs import sawyer_push_v3

    assert sawyer_push_v3.np is np and sawyer_push_v3.Rotation is Rotation
    assert metaworld.SawyerXYZEnv._reset_hand.__module__ == "metaworld.sawyer_xyz_env"
    state = np.random.get_state()[1].copy()
    benchmark_tasks("ML1", "door-open-v3", 4)
    assert np.array_equal(state, np.random.get_state()[1])
