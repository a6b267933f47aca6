"""A user's environments, good and bad, for tests: `--env-id tests.user_envs:<name>`. A goal on a line, in worker
processes, or an object that ought to keep the protocol."""

import os
import time

import gymnasium
import numpy as np
from gymnasium import spaces

from common.envs.protocol import TensorEnvs
from common.envs.workers import WorkerVectorEnv


class Base(gymnasium.Env):
    """obs (position, 0); the task is where the goal is."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def set_task(self, data):
        self.goal = data

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = np.zeros(2, np.float32), 0
        return self.x.copy(), {"task": np.array([self.goal])}

    def step(self, action):
        self.x[0] += action[0]
        self.t += 1
        distance = abs(float(self.x[0]) - self.goal)
        return self.x.copy(), -distance, False, False, {"success": distance < 0.5}


def with_step(change, when=1, **attributes):
    """Base, whose step's (observation, reward, terminated, truncated, info) is changed from step `when` on."""

    class Changed(Base):
        def step(self, action):
            returned = super().step(action)
            return change(*returned) if self.t >= when else returned

    return type("Changed", (Changed,), attributes)


def with_reset(change, **attributes):
    """Base, whose reset's (observation, info) is changed."""

    class Changed(Base):
        def reset(self, **given):
            return change(*super().reset(**given))

    return type("Changed", (Changed,), attributes)


class Choice(Base):
    """Three actions, one of them to stay."""

    action_space = spaces.Discrete(3)

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        return super().step([float(action - self.action_space.start) - 1])


class ChoiceFrom5(Choice):
    action_space = spaces.Discrete(3, start=5)


class ChoiceBelow0(Choice):
    action_space = spaces.Discrete(3, start=-7, dtype=np.int8)


class Float64(Base):
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-0.1, 0.1, (1,), np.float64)

    def reset(self, **given):
        obs, info = super().reset(**given)
        return obs.astype(np.float64), info

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        obs, *rest = super().step(action)
        return obs.astype(np.float64), *rest


class Unbounded(Base):
    action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)


class Early(Base):
    def step(self, action):
        obs, reward, _, truncated, info = super().step(action)
        return obs, reward, self.t >= 3, truncated, info


class Plain(Base):
    """Lists, numbers and no more than there must be."""

    def reset(self, seed=None):
        return list(super().reset(seed=seed)[0]), {}

    def step(self, action):
        obs, reward, *_ = super().step(action)
        return list(obs), int(reward), 0, np.False_, {"alive": "no", "success": np.array([True])}


class Other(Base):
    """Another observation than Base has."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)

    def reset(self, **given):
        return np.zeros(3, np.float32), super().reset(**given)[1]

    def step(self, action):
        return np.zeros(3, np.float32), *super().step(action)[1:]


class OtherAction(Base):
    action_space = spaces.Box(-2, 2, (1,), np.float32)


class OtherTruth(Base):
    def reset(self, **given):
        return super().reset(**given)[0], {"task": np.zeros(2)}


class TruthByTask(Base):
    """A ground truth whose length depends on the task."""

    def reset(self, **given):
        return super().reset(**given)[0], {"task": np.zeros(1 + (self.goal == 0))}


class NoSetTask(gymnasium.Env):
    observation_space, action_space = Base.observation_space, Base.action_space
    reset, step = Base.reset, Base.step


class NoSeed(Base):
    def reset(self):
        return super().reset()


class Late(Base):
    """At step 3 of the task that its goal names, something else."""

    faults = dict(
        shape=lambda obs, *rest: (obs[:1], *rest),
        scalar=lambda obs, *rest: (0.5, *rest),
        nan=lambda obs, *rest: (obs * np.nan, *rest),
        big=lambda obs, *rest: (obs.astype(float) + 1e300, *rest),
        nan_reward=lambda obs, reward, *rest: (obs, np.nan, *rest),
        none_reward=lambda obs, reward, *rest: (obs, None, *rest),
        large=lambda obs, *rest: (obs + np.float32(1e38), *rest),  # no fault: it is finite
    )

    def set_task(self, data):
        self.goal, self.fault = 1.0, data

    def step(self, action):
        returned = super().step(action)
        return self.faults[self.fault](*returned) if self.fault and self.t == 3 else returned


class LateReset(Base):
    """In the task 1, the second episode begins with a NaN."""

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return obs * (np.nan if self.goal == 1 and seed is None else 1), info


class Spins(Base):
    """A step that never ends, and does not let another thread of its process run."""

    def step(self, action):
        sum(range(10**15))


class Ends(Base):
    def step(self, action):
        os._exit(3)


class Sleeps(Base):
    def step(self, action):
        time.sleep(1000)


# ---------- Factories ----------

GOALS = [("line", str(i), float(i - 2)) for i in range(5)]


def make(families, tasks=GOALS, **changes):
    def factory(num_envs, split, seed, device, horizon=10, episodes_per_task=2, **more):
        given = dict(num_envs=num_envs, split=split, seed=seed, device=device, num_workers=1)
        return WorkerVectorEnv(
            families if isinstance(families, (dict, list)) else {"line": families},
            tasks,
            **given | dict(horizon=horizon, episodes_per_task=episodes_per_task) | more | changes,
        )

    return factory


good = make(Base)
choice_from_5 = make(ChoiceFrom5)
float64 = make(Float64)
two_names = make(Base, [("line", "same", 1.0), ("line", "same", -1.0)])
no_tasks = make(Base, [])
no_such_family = make(Base, [("line", "0", 1.0), ("circle", "0", 1.0)])
no_triples = make(Base, ["line"])
families_as_list = make([Base])
a_lambda = make({"line": lambda: Base()})
a_local = make(with_step(lambda *returned: returned))
a_wrong_task = make(Base, [("line", "0", lambda: 1)])
not_a_class = make({"line": 3})
other_observation = make({"line": Base, "circle": Other}, [*GOALS, ("circle", "0", 1.0)])
other_action = make({"line": Base, "circle": OtherAction}, [*GOALS, ("circle", "0", 1.0)])
other_truth = make({"line": Base, "circle": OtherTruth}, [*GOALS, ("circle", "0", 1.0)])
other_unused = make({"line": Base, "circle": Other})  # without a task in this split
truth_by_task = make(TruthByTask)  # in the middle one of five
truth_of_the_last = make(TruthByTask, [("line", "1", 1.0), ("line", "0", 0.0)])
no_set_task = make(NoSetTask)
ends = make(Ends)
sleeps = make(Sleeps, timeout=1.0)
late = make(Late, [("line", str(fault), fault) for fault in (None, *Late.faults)])
late_reset = make(LateReset)
no_steps = make(Base, horizon=0)
too_many = make(Base, num_envs=7)
always_train = make(Base, split="train")


def no_test_tasks(num_envs, split, seed, device):
    return make(Base, GOALS if split == "train" else [])(num_envs, split, seed, device)


def by_seed(num_envs, split, seed, device):
    """Tasks that depend on the seed."""
    goals = np.random.default_rng(seed).random(5)
    return make(Base, [("line", f"{goal:.6f}", goal) for goal in goals])(num_envs, split, seed, device)


def returns_none(num_envs, split, seed, device):
    pass


def raises(num_envs, split, seed, device):
    raise ValueError("no licence\nfor this simulator")


def leaves(num_envs, split, seed, device):
    raise SystemExit(0)


def no_arguments():
    pass


def gymnasium_env(num_envs, split, seed, device):
    return gymnasium.make("CartPole-v1")


def gymnasium_vector(num_envs, split, seed, device):
    return gymnasium.make_vec("CartPole-v1", num_envs)


def odd_splits(num_envs, split, seed, device):
    return make(Base)(num_envs, split, seed, device)


odd_splits.splits = ("train", "validation")
not_callable = 3


class Tensors(TensorEnvs):
    """The line on the device."""

    obs_dim = 2
    single_action_space = spaces.Box(-1, 1, (1,), np.float32)
    tasks = ["line/0", "line/1"]

    def __init__(self, num_envs, split, seed, device, horizon=10, episodes_per_task=2):
        import torch  # the workers import this module, too

        super().__init__(num_envs, split, seed, device, horizon, episodes_per_task)
        self.task_table = torch.tensor([[-1.0], [1.0]])

    def goals(self, u):
        return 2 * u[:, :1].float() - 1

    def start(self):
        self.x = self.task.new_zeros(self.num_envs, 2)
        return self.x

    def move(self, action):
        self.x = self.x + action.clamp(-1, 1)
        distance = (self.x[:, :1] - self.task).abs().squeeze(-1)
        return self.x, -distance, distance < 0.5


class Tensors64(Tensors):
    single_action_space = spaces.Box(-1, 1, (1,), np.float64)


class TensorsNaN(Tensors):
    """A reward in the test split that is no number, from the second step on."""

    def move(self, action):
        obs, reward, success = super().move(action)
        return obs, reward / (self.split == "train" or self.elapsed == 0), success
