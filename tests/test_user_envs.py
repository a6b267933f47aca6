"""A user's own environments: what does not fit ends in one sentence at the start, and what fits is played as it is."""

import os
import subprocess
import sys
import tempfile
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

import varibad
from common.envs import BadInput, WorkerError, make_envs
from common.envs.check import check_env, check_envs, check_spaces
from tests import user_envs
from tests.test_scripts import TINY, command
from tests.test_workers import exists, pids
from tests.user_envs import Base, Tensors, with_reset, with_step

NEVER = dict(split="test", num_envs=3, device="cpu")
VECTOR, IMAGE = spaces.Box(-1, 1, (2,)), spaces.Box(0, 255, (4, 4, 3), np.uint8)
NO_VECTORS = dict(  # for observations and actions alike
    dict=spaces.Dict(a=VECTOR), tuple=spaces.Tuple([VECTOR, spaces.Discrete(2)]), text=spaces.Text(5),
    multi_discrete=spaces.MultiDiscrete([2, 3]), multi_binary=spaces.MultiBinary(3), image=IMAGE,
    sequence=spaces.Sequence(VECTOR), scalar=spaces.Box(0, 1, ()), matrix=spaces.Box(0, 1, (2, 2)),
    empty=spaces.Box(0, 1, (0,)), infinite=spaces.Box(np.inf, np.inf, (1,)), nothing=None,
)  # fmt: skip


def sentence(error, *words):
    """A BadInput is one line, not a long one, and holds these words."""
    text = str(error.value if hasattr(error, "value") else error)
    assert "\n" not in text and 20 < len(text) < 400, text
    assert all(word in text for word in words), text
    return True


def refused(words, call, *arguments, **named):
    with pytest.raises(BadInput) as error:
        call(*arguments, **named)
    sentence(error, *words)


# ---------- Spaces ----------


@pytest.mark.parametrize("name", [*NO_VECTORS, "discrete", "integers"])
def test_spaces(name):
    """What is no vector, or no choice, is refused, and named."""
    space = NO_VECTORS.get(name)
    if name != "integers":
        space = spaces.Discrete(4) if name == "discrete" else space
        words = ["observation_space", " ".join(repr(space).split())[:40]]
        refused(words, check_spaces, space, VECTOR)
        refused(words, check_env, with_step(lambda *returned: returned, observation_space=space)(), [1.0])
    if name != "discrete":
        space = spaces.Box(-3, 3, (1,), np.int64) if name == "integers" else space
        words = ["action_space", " ".join(repr(space).split())[:40]]
        refused(words, check_spaces, VECTOR, space)
        refused(words, check_env, with_step(lambda *returned: returned, action_space=space)(), [1.0])


BOXES = st.builds(
    lambda shape, kind, low, width: spaces.Box(low, low + width, tuple(shape), kind),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.uint8, np.int64]),
    st.integers(0, 10),
    st.integers(0, 100),
)
SIMPLE = BOXES | st.builds(spaces.Discrete, st.integers(1, 9), start=st.integers(-9, 9))
SIMPLE |= st.builds(spaces.MultiDiscrete, st.lists(st.integers(1, 4), min_size=1)) | st.just(spaces.Text(3)) | st.none()
SPACES = SIMPLE | st.builds(lambda *parts: spaces.Tuple(parts), SIMPLE.filter(bool)) | st.builds(
    lambda part: spaces.Dict(part=part), SIMPLE.filter(bool)
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(observation=SPACES, action=SPACES)
def test_any_spaces(observation, action):
    """Boxes of one dimension and one number or more, of any type for observations, of floats for actions; Discrete."""

    def fits(space, kinds):
        return isinstance(space, spaces.Box) and len(space.shape) == 1 <= space.shape[0] and space.dtype.kind in kinds

    fine = fits(observation, "iuf") and (isinstance(action, spaces.Discrete) or fits(action, "f"))
    try:
        check_spaces(observation, action)
        assert fine
    except BadInput as error:
        assert not fine and sentence(error, "_space is ")


# ---------- Gymnasium's environments ----------


GOOD = [Base, user_envs.Choice, user_envs.ChoiceFrom5, user_envs.ChoiceBelow0, user_envs.Float64, user_envs.Unbounded]
GOOD += [user_envs.Early, user_envs.Plain, user_envs.Other]


@pytest.mark.parametrize("env", GOOD)
def test_good_environments(env):
    observation_space, action_space, truth, success = check_env(env(), [1.0])
    assert (observation_space, action_space) == (env.observation_space, env.action_space)
    assert truth == (None if env is user_envs.Plain else (1,)) and success


class Wrapped(gymnasium.Wrapper):
    """Hides set_task."""


BAD = {
    "no environment": (lambda: None, ["None", "observation_space"]),
    "no set_task": (user_envs.NoSetTask, ["NoSetTask", "set_task"]),
    "a hidden set_task": (lambda: Wrapped(Base()), ["set_task", "wrapper"]),
    "no seed": (user_envs.NoSeed, ["reset", "seed"]),
    "the observation alone": (with_reset(lambda obs, info: obs), ["reset", "observation, info"]),
    "no info of reset": (with_reset(lambda obs, info: (obs, None)), ["info of reset", "None"]),
    "four values": (with_step(lambda *five: five[:4]), ["step returned 4 values", "terminated, truncated, info"]),
    "six values": (with_step(lambda *five: (*five, 1)), ["step returned 6 values"]),
    "no info of step": (with_step(lambda o, r, a, b, info: (o, r, a, b, None)), ["info of step"]),
}
for where, change in (("reset", lambda to: with_reset(lambda o, i: (to(o), i))),) + (
    ("step", lambda to: with_step(lambda o, *r: (to(o), *r))),
):
    for name, to, words in (
        ("shape", lambda obs: obs[:1], ["(1,)", "(2,)"]),
        ("scalar", lambda obs: 0.5, ["0.5", "(2,)"]),
        ("matrix", lambda obs: obs[None], ["(1, 2)", "(2,)"]),
        ("None", lambda obs: None, ["None"]),
        ("dict", lambda obs: {"a": obs}, ["{'a': "]),
        ("words", lambda obs: ["x", "y"], ["['x', 'y']"]),
        ("ragged", lambda obs: [[1], [1, 2]], ["[[1], [1, 2]]"]),
        ("complex", lambda obs: obs + 1j, ["1.j"]),
        ("NaN", lambda obs: obs * np.nan, ["not finite", "nan"]),
        ("infinity", lambda obs: obs + np.inf, ["not finite", "inf"]),
        ("beyond float32", lambda obs: obs.astype(float) - 1e300, ["not finite", "e+300"]),
    ):
        BAD[f"observation of {where}: {name}"] = change(to), [f"observation of {where}", *words]
for reward in (None, "1", np.ones(1), [1.0], np.ones((1, 1)), np.nan, -np.inf, 1j, {}):
    BAD[f"reward {reward!r}"] = with_step(lambda o, r, *rest, now=reward: (o, now, *rest)), ["the reward of step"]
for flag in (None, "no", np.nan, 0.3, 2, np.zeros(2), {}):
    BAD[f"terminated {flag!r}"] = with_step(lambda o, r, te, *z, now=flag: (o, r, now, *z)), ["terminated of step"]
    BAD[f"truncated {flag!r}"] = with_step(lambda o, r, te, tr, i, now=flag: (o, r, te, now, i)), ["truncated of step"]
    changed = with_step(lambda o, r, te, tr, i, now=flag: (o, r, te, tr, {"success": now}))
    BAD[f"success {flag!r}"] = changed, ["info['success'] of step"]
for truth in (1.0, "goal", [["a"]], np.zeros((1, 1)), [np.nan], [[1], [1, 2]], {"x": 1}):
    BAD[f"truth {truth!r}"] = with_reset(lambda obs, info, now=truth: (obs, {"task": now})), ["info['task'] of reset"]


@pytest.mark.parametrize("name", BAD)
def test_bad_environments(name):
    """One sentence that names the culprit."""
    env, words = BAD[name]
    refused(words, lambda: check_env(env(), [1.0]))


ANY = st.none() | st.booleans() | st.floats() | st.integers(-3, 3) | st.text(max_size=3) | st.complex_numbers()
ANY |= st.lists(st.floats(width=32) | st.booleans(), max_size=3) | st.lists(st.lists(st.integers(), max_size=2))
ANY |= st.sampled_from([np.zeros(2), np.zeros((2, 1)), np.array(["a"]), {}, {"task": 1}, (), object(), [None, 1]])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_values(data):
    """Whatever reset and step return: it passes, and then is what shared memory can hold, or ends in a sentence."""
    place = data.draw(
        st.sampled_from(["obs", "info", "task", "step", "obs2", "reward", "terminated", "info2", "success"])
    )
    value = data.draw(ANY)

    def reset(obs, info):
        return value if place == "obs" else obs, {
            "task": value
        } if place == "task" else value if place == "info" else {}

    def step(obs, reward, terminated, truncated, info):
        info = value if place == "info2" else {"success": value} if place == "success" else info
        new = dict(obs2=obs, reward=reward, terminated=terminated) | {place: value}
        return value if place == "step" else (new["obs2"], new["reward"], new["terminated"], truncated, info)

    class Env(with_reset(reset)):
        def step(self, action):
            return step(*super().step(action))

    try:
        check_env(Env(), [1.0])
    except BadInput as error:
        sentence(error)
        return
    if place == "task":
        assert value is None or np.asarray(value, float).ndim == 1
    elif place in ("terminated", "success"):
        assert bool(np.asarray(value).item()) in (True, False)
    elif place == "reward":
        assert np.isfinite(np.float32(value)) and np.ndim(value) == 0
    elif place.startswith("obs"):
        assert np.isfinite(np.asarray(value, np.float32)).all() and np.shape(value) == (2,)
    else:
        assert isinstance(value, dict)


# ---------- What a factory returns ----------


def tensors(**changes):
    """A good one in which attributes are others."""
    envs = Tensors(3, "test", 1, "cpu")
    for name, value in changes.items():
        setattr(envs, name, value)
    return envs


def returning(method, change):
    """A good one in which what a method returns is changed."""
    envs = tensors()
    original = getattr(envs, method)
    setattr(envs, method, lambda *given, **named: change(*original(*given, **named)))
    return envs


class Without(Tensors):
    state_dict = property()


class Minimal(Tensors):
    """Of no more than the protocol has, and neither success nor a ground truth."""

    def reset(self, tasks=None):
        return super().reset(tasks)[0], {"task": torch.zeros(self.num_envs, 0)}

    def step(self, action):
        *rest, info = super().step(action)
        return *rest, {"final_obs": info["final_obs"]}


def test_good_vectors():
    """They pass, no draw has changed, and the actions of policies are float32."""
    for make, kind in ((Tensors, np.float32), (Minimal, np.float32), (user_envs.Tensors64, np.float32)):
        envs, other = make(3, "test", 1, "cpu"), make(3, "test", 1, "cpu")
        check_envs(envs, **NEVER)
        assert envs.single_action_space.dtype == kind
        assert torch.equal(envs.reset()[1]["task"], other.reset()[1]["task"])


def changed(**parts):
    return lambda obs, info: (obs, info | parts)


BAD_VECTORS = {
    "None": (lambda: None, ["returned None"]),
    "a number": (lambda: 3, ["returned 3", "num_envs"]),
    "Gymnasium's": (lambda: gymnasium.make("CartPole-v1"), ["CartPole", "horizon", "WorkerVectorEnv"]),
    "Gymnasium's vector": (lambda: gymnasium.make_vec("CartPole-v1", 3), ["CartPole", "horizon", "WorkerVectorEnv"]),
    "no state_dict": (lambda: Without(3, "test", 1, "cpu"), ["no state_dict"]),
    "num_envs": (lambda: tensors(num_envs=4), ["num_envs is 4", "3"]),
    "split": (lambda: tensors(split="train"), ["split", "train", "test"]),
    "device": (lambda: tensors(device=torch.device("meta")), ["device", "meta", "cpu"]),
    "meta_horizon": (lambda: tensors(meta_horizon=10), ["meta_horizon", "10 * 2"]),
    "splits": (lambda: tensors(splits=["test"]), ["splits", "train"]),
    "start": (lambda: tensors(single_action_space=spaces.Discrete(3, start=1)), ["start=1", "from 0"]),
    "no tasks": (lambda: tensors(reset=lambda: None), ["reset(tasks=...)"]),
    "state of nothing": (lambda: tensors(state_dict=lambda: None), ["state_dict returns None"]),
    "state": (lambda: tensors(state_dict=lambda: {"draw": lambda: 1}), ["state_dict", "torch.load"]),
    "reset": (lambda: tensors(reset=lambda tasks: torch.zeros(3, 2)), ["reset returned tensor"]),
    "reset's type": (lambda: returning("reset", lambda o, i: (o.double(), i)), ["observation of reset", "float64"]),
    "reset's shape": (lambda: returning("reset", lambda o, i: (o[:, :1], i)), ["(3, 1)", "(3, 2)"]),
    "reset's device": (lambda: returning("reset", lambda o, i: (o.to("meta"), i)), ["meta", "cpu"]),
    "reset's arrays": (lambda: returning("reset", lambda o, i: (o.numpy(), i)), ["array", "tensor"]),
    "reset's NaN": (lambda: returning("reset", lambda o, i: (o * np.nan, i)), ["observation of reset is not finite"]),
    "no truth": (lambda: returning("reset", lambda o, i: (o, {})), ["info['task'] of reset is None"]),
    "truth": (lambda: returning("reset", changed(task=torch.zeros(3))), ["info['task']", "(3, 'G')"]),
    "truth's type": (lambda: returning("reset", changed(task=torch.zeros(3, 1).int())), ["info['task']", "int32"]),
}  # fmt: skip
for name in ("num_envs", "horizon", "episodes_per_task", "meta_horizon"):
    for value in (0, -1, 2.5, None, "3"):
        BAD_VECTORS[f"{name} {value!r}"] = partial(tensors, **{name: value}), [f"{name} is {value!r}"]
for value, words in (
    ([], ["no tasks"]), (["a/0", "a/0"], ["two tasks", "'a/0'"]), (None, ["list of names"]), ("a/0", ["list"]),
    ([1, 2], ["list of names"]), (iter(["a/0"]), ["list of names"]),
):  # fmt: skip
    BAD_VECTORS[f"tasks {value!r}"[:30]] = partial(tensors, tasks=value), words
for name, space in NO_VECTORS.items():
    BAD_VECTORS[f"observations {name}"] = partial(tensors, single_observation_space=space), ["observation_space"]
    BAD_VECTORS[f"actions {name}"] = partial(tensors, single_action_space=space), ["action_space"]
for place, name, value, words in (
    (0, "observation", torch.zeros(3, 2).double(), ["float64", "float32"]),
    (0, "observation", torch.zeros(2), ["(2,)", "(3, 2)"]),
    (1, "reward", torch.zeros(3, 1), ["(3, 1)", "(3,)"]),
    (1, "reward", torch.zeros(()), ["()", "(3,)"]),
    (1, "reward", torch.zeros(3).int(), ["int32", "float32"]),
    (1, "reward", None, ["None"]),
    (1, "reward", torch.tensor([0.0, np.nan, 0]), ["not finite"]),
    (2, "terminated", torch.zeros(3), ["float32", "bool"]),
    (2, "terminated", False, ["False", "bool"]),
    (3, "truncated", torch.zeros(1).bool(), ["(1,)", "(3,)"]),
    (4, "info['final_obs']", {}, ["None"]),
    (4, "info['final_obs']", {"final_obs": torch.zeros(3)}, ["(3,)"]),
    (4, "info['success']", {"final_obs": torch.zeros(3, 2), "success": torch.zeros(3)}, ["float32", "bool"]),
    (4, "info", None, ["info of step", "dict"]),
):
    change = partial(lambda place, value, *five: (*five[:place], value, *five[place + 1 :]), place, value)
    BAD_VECTORS[f"step's {name}: {value!r}"[:60]] = partial(returning, "step", change), [name, *words]
BAD_VECTORS["four values"] = partial(returning, "step", lambda *five: five[:4]), ["step returned 4 values"]


@pytest.mark.parametrize("name", BAD_VECTORS)
def test_bad_vectors(name):
    make, words = BAD_VECTORS[name]
    refused(words, check_envs, make(), **NEVER)


# ---------- Factories ----------


@pytest.mark.parametrize(
    "name, words",
    [
        ("returns_none", ["returned None"]),
        ("raises", ["ValueError: no licence for this simulator", "user_envs.py, line"]),
        ("leaves", ["SystemExit", "user_envs.py, line"]),
        ("no_arguments", ["num_envs, split, seed, device"]),
        ("gymnasium_env", ["CartPole", "WorkerVectorEnv"]),
        ("gymnasium_vector", ["CartPole", "WorkerVectorEnv"]),
        ("not_callable", ["no callable 'not_callable'"]),
        ("two_names", ["two tasks", "'line/same'"]),
        ("no_tasks", ["split train has no tasks"]),
        ("no_such_family", ["circle/0", "no family 'circle'", "line"]),
        ("no_triples", ["'line'", "(family, name, data)"]),
        ("families_as_list", ["families", "dict"]),
        ("not_a_class", ["'line'", "3"]),
        ("a_lambda", ["'line'", "<lambda>", "module"]),
        ("a_local", ["'line'", "Changed", "module"]),
        ("a_wrong_task", ["line/0", "<lambda>", "pickled"]),
        ("odd_splits", ["splits", "validation"]),
        # These start workers; all others end before.
        ("no_steps", ["horizon is 0"]),
        ("too_many", ["num_envs is 7", "3"]),
        ("no_set_task", ["family 'line'", "set_task"]),
        ("other_observation", ["observation_space", "'circle'", "'line'", "(3,)", "(2,)"]),
        ("other_action", ["action_space", "'circle'", "'line'", "-2", "-1"]),
        ("truth_of_the_last", ["info['task']", "(2,)", "(1,)", "two tasks"]),
        ("other_truth", ["info['task']", "'circle'", "(2,)", "(1,)"]),
    ],
)
def test_factories(name, words):
    """One sentence, with the id, and no worker left."""
    before = children()
    refused([f"env_id 'tests.user_envs:{name}'", *words], make_envs, f"tests.user_envs:{name}", 3)
    assert children() <= before


def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return {int(pid) for pid in file.read().split() if exists(int(pid))}


def test_other_splits():
    refused(["the split test has no tasks"], make_envs, "tests.user_envs:no_test_tasks", 3, "test")
    refused(["split is 'train'", "test"], make_envs, "tests.user_envs:always_train", 3, "test")
    refused(["--oracle", "SparsePointRobot", "train and test"], make_envs, "SparsePointRobot", 3, "all")
    refused(["--oracle", "train and test"], make_envs, "tests.user_envs:good", 3, "all")


@pytest.mark.parametrize(
    "text, words",
    [
        ("def broken(:\n", ["SyntaxError", "mine.py, line 1"]),
        ("import sys\nsys.exit('no')\n", ["SystemExit: no", "mine.py, line 2"]),
        ("raise SystemExit\n", ["SystemExit", "mine.py, line 1"]),
        ("import no_such_module\n", ["no_such_module", "mine.py, line 1"]),
        ("from common.envs import no_such_name\n", ["ImportError", "no_such_name", "mine.py, line 1"]),
        ("print('hello')\nfactory = 1 / 0\n", ["ZeroDivisionError", "mine.py, line 2"]),
        ("def other(): pass\n", ["mine", "'factory'"]),
        ("factory = print\n", ["mine:factory"]),
        ("factory = min\n", ["mine:factory"]),
        ("async def factory(*a, **b): pass\n", ["mine:factory", "coroutine"]),
        ("class factory:\n    def __init__(self, *a): self.__class__.x\n", ["AttributeError", "mine.py, line 2"]),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_modules(text, words, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    refused(["'mine:factory'", *words], make_envs, "mine:factory", 3)


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab:. /\\\n\0-_1é", max_size=8) | st.sampled_from([":", "a:", ":b", "a:b:c", "::", "os:path", "os:_exit"])
)
def test_any_id(env_id):
    """Never more than a sentence."""
    try:
        make_envs(env_id, 1)
    except BadInput as error:
        assert str(error)
    else:
        raise AssertionError(env_id)


def test_the_command(tmp_path, monkeypatch, capsys):
    """Status 2 and one line, before there is a folder; also where it is the test split that does not fit."""
    for name in ("gymnasium_env", "no_test_tasks"):
        words = [*TINY, "--env-id", f"tests.user_envs:{name}", "--run-dir", tmp_path / "run", "--tbptt", "0"]
        status, lines = command(varibad, monkeypatch, capsys, *words)
        assert status == 2 and len(lines) == 1 and sentence(lines[0], name), lines
        assert not (tmp_path / "run").exists()


# ---------- While it runs ----------


@pytest.fixture(scope="module")
def late():
    envs = []
    yield (
        lambda: (
            envs[-1] if envs and envs[-1]._stop.alive else envs.append(make_envs("tests.user_envs:late", 2)) or envs[-1]
        )
    )
    envs[-1].close()


@pytest.mark.parametrize(
    "fault, words",
    [
        ("shape", ["shape (1,)", "(2,)"]),
        ("scalar", ["shape ()", "(2,)"]),
        ("nan", ["observation", "not finite", "nan", "at step 3"]),
        ("big", ["observation", "not finite", "inf", "at step 3"]),
        ("nan_reward", ["reward", "not finite", "nan", "at step 3"]),
        ("none_reward", ["reward", "not finite", "at step 3"]),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_faults_on_the_way(fault, words, late):
    """In environment 1, at its third step: a WorkerError that names it and its task, and no worker left."""
    envs = late()
    processes = pids(envs)
    envs.reset(tasks=["line/None", f"line/{fault}"])
    with pytest.raises(WorkerError) as error:
        for _ in range(3):
            envs.step(torch.zeros(2, 1))
    sentence(error, "environment 1 (", "line", *words)
    assert envs.elapsed == 3 and not any(map(exists, processes))


def test_large_numbers(late):
    envs = late()
    envs.reset(tasks=["line/large"] * 2)
    for _ in range(3):
        obs, *_ = envs.step(torch.zeros(2, 1))
    assert obs[:, 0].tolist() == pytest.approx([1e38] * 2)


def test_a_first_observation_that_is_not_finite():
    """Of the second episode; and an action that is not finite is not blamed on an environment."""
    envs = make_envs("tests.user_envs:late_reset", 2, "test", horizon=4)
    envs.reset(tasks=["line/0", "line/3"])
    with pytest.raises(WorkerError) as error:
        for _ in range(4):
            envs.step(torch.zeros(2, 1))
    sentence(error, "environment 1 (test task line/3)", "the observation at step 4 is not finite: [nan")
    envs = make_envs("tests.user_envs:good", 2)
    envs.reset()
    with pytest.raises(FloatingPointError, match="action in environment 1 is not finite"):
        envs.step(torch.tensor([[0.0], [np.nan]]))


def test_truths_of_differing_lengths():
    """Found at the start in a family's first and last task, and at a reset in others."""
    envs = make_envs("tests.user_envs:truth_by_task", 2)
    processes = pids(envs)
    envs.reset(tasks=["line/0", "line/1"])
    with pytest.raises(BadInput) as error:
        envs.reset(tasks=["line/0", "line/2"])
    sentence(error, "info['task'] of line/2", "(2,)", "(1,)")
    assert not any(map(exists, processes))


@pytest.mark.parametrize("name, says", [("ends", "status 3"), ("sleeps", "no answer for 1 s")])
def test_a_first_step_that_fails(name, says):
    """It is the workers that try an environment: this process lives on."""
    before = children()
    with pytest.raises(WorkerError, match=rf"^family 'line': .*{says}"):
        make_envs(f"tests.user_envs:{name}", 2)
    assert children() <= before


def test_actions():
    """A policy's 0, 1, 2 are the environment's 5, 6, 7; float64 is cast, and clipped to the environment's bounds."""
    envs = make_envs("tests.user_envs:choice_from_5", 3)
    assert envs.single_action_space == spaces.Discrete(3)
    envs.reset()
    for _ in range(2):  # the step does not change the action that it was given
        action = torch.tensor([0, 1, 2])
        obs = envs.step(action)[0]
        assert action.tolist() == [0, 1, 2]
    assert obs[:, 0].tolist() == [-2, 0, 2]
    envs.close()
    envs = make_envs("tests.user_envs:float64", 3)
    assert envs.single_action_space == spaces.Box(-0.1, 0.1, (1,), np.float32)
    envs.reset()
    obs, reward, *_ = envs.step(torch.tensor([[-1.0], [0.05], [1.0]]))
    assert obs.dtype == reward.dtype == torch.float32
    assert obs[:, 0].tolist() == pytest.approx([-0.1, 0.05, 0.1])
    envs.close()


def test_trying_changes_nothing():
    """Families without a task in this split are not tried; `spaces` does without; the draws are the same."""
    unused, without = (make_envs(f"tests.user_envs:{name}", 3, seed=4) for name in ("other_unused", "good"))
    given = user_envs.make(Base, spaces=(Base.observation_space, Base.action_space))(3, "train", 4, "cpu")
    first = [envs.reset() for envs in (unused, without, given)]
    for (obs, info), families in zip(first, (2, 0, 0)):
        assert torch.equal(obs, first[0][0]) and torch.equal(info["task"][:, families:], first[2][1]["task"])
    for envs in (unused, without, given):
        envs.close()


def test_the_seed_of_a_benchmark(monkeypatch):
    """It decides on the tasks, and the seed on their draws: of a user's own, and of Meta-World."""
    envs, same, other = (
        make_envs("tests.user_envs:by_seed", 3, seed=seed, benchmark_seed=benchmark_seed)
        for seed, benchmark_seed in ((1, None), (2, 1), (2, None))
    )
    assert envs.tasks == same.tasks != other.tasks
    for each in (envs, same, other):
        each.close()
    from common.envs import metaworld  # imported where it is needed

    monkeypatch.setattr(
        metaworld, "MetaWorldEnvs", lambda families, tasks, num_envs, split, seed, *a, **b: (tasks, seed)
    )
    made = [
        make_envs("ML1-reach", 2, "test", seed=seed, benchmark_seed=benchmark_seed)
        for seed, benchmark_seed in ((1, None), (2, 1), (2, None))
    ]
    goals = [[task.data for _, _, task in tasks] for tasks, _ in made]
    assert goals[0] == goals[1] != goals[2] and [seed for _, seed in made] == [1, 2, 2]


# ---------- Shared memory ----------


FULL = """
import sys, tempfile
sys.path[:] = {path!r}
import torch
from common.envs import BadInput, make_envs
envs = make_envs("tests.user_envs:good", 700)
envs.reset()
print(envs.step(torch.ones(700, 1))[0][:, 0].sum().item())
envs.close()
tempfile.tempdir = "/dev/shm"
try:
    make_envs("tests.user_envs:good", 700)
except BadInput as error:
    print(error)
"""


def test_a_full_shared_memory():
    """/dev/shm of 16 kB (Docker's has 64 MB): the workers share a file elsewhere; without room there, a sentence."""
    mount = "mount -t tmpfs -o size=16k tmpfs /dev/shm"
    private = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*private, mount], capture_output=True).returncode:
        pytest.skip("mounts need rights that this user lacks")
    argv = [*private, f'{mount} && exec "$0" -c "$1"', sys.executable, FULL.format(path=sys.path)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps, sentence = done.stdout.splitlines()
    assert float(steps) == 700 and "0.0" in sentence and "/dev/shm" in sentence and "fewer" in sentence


def test_no_room(monkeypatch):
    """The same, where nothing may be mounted: what is reserved in /dev/shm does not fit."""
    reserve = os.posix_fallocate

    def full(fd, offset, size):
        if os.readlink(f"/proc/self/fd/{fd}").startswith(folders):
            raise OSError(28, "No space left on device")
        reserve(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    folders = ("/dev/shm/",)
    envs = make_envs("tests.user_envs:good", 3)
    envs.reset()
    assert envs.step(torch.ones(3, 1))[0][:, 0].tolist() == [1, 1, 1]
    envs.close()
    before, folders = children(), ("/dev/shm/", tempfile.gettempdir())
    refused(["MB", "/dev/shm", tempfile.gettempdir(), "fewer"], make_envs, "tests.user_envs:good", 3)
    assert children() <= before
