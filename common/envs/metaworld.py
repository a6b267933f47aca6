"""Meta-World (Yu et al., CoRL 2019; metaworld 3.1.1): ML1-<family>, ML10 and ML45, served by worker processes.

`make_metaworld` serves metaworld's own environments: observations, rewards and successes are theirs to the last bit.
Four fifths of their step is Python, though, so the workers use `FastSawyer`, the same computation without the detours
(`fast=False` does without it; tests/test_metaworld.py holds the two against each other).

The workers draw no pictures. `film`, a method of these vector environments, plays a recorded meta-episode again in an
environment of its own, to the same last bit, and draws that.
"""

import difflib
import math
import types
from functools import cache, lru_cache, partial
from unittest import mock

from common.envs.film import Film, mujoco  # first: it explains why importing mujoco, as metaworld does, may fail

# isort: split
import numpy as np
from gymnasium.spaces import Box
from metaworld import ML1, ML10, ML45
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.utils import reward_utils

from common.envs.protocol import SPLITS, BadInput
from common.envs.workers import WorkerVectorEnv

MAX_HORIZON = 500  # metaworld's environments refuse a longer episode


def known_ids():
    return ["ML10", "ML45", *(f"ML1-{name.removesuffix('-v3')}" for name in ALL_V3_ENVIRONMENTS)]


def make_metaworld(
    env_id,
    num_envs,
    split="train",
    seed=1,
    device="cpu",
    horizon=None,
    episodes_per_task=None,
    reward_version="v2",
    num_workers=None,
    fast=True,
    benchmark_seed=None,
):
    """The vector environment ML10, ML45 or ML1-<family>, goals hidden: obs float32 (N, 39), action float32 (N, 4).

    env_id: of a family, the endings -v2, -v3 and none all mean metaworld's -v3 class, the only one that it has.
    horizon: steps of an episode, 1 to 500 (default 500). episodes_per_task: default 3.
    reward_version: v2 (in [0, 10]), or the older v1.
    seed: of what is drawn. benchmark_seed: of the benchmark's tasks, 50 of each family; None: the seed.
    info["task"], (N, G): one-hot code of the family (over train and test; none for ML1), then the goal's coordinates.
    Raises BadInput for anything unknown.
    """
    horizon = MAX_HORIZON if horizon is None else horizon
    episodes_per_task = 3 if episodes_per_task is None else episodes_per_task
    benchmark, _, family = env_id.partition("-")
    if family:
        family = family.removesuffix("-v2").removesuffix("-v3") + "-v3"
    if env_id not in ("ML10", "ML45") and not (benchmark == "ML1" and family in ALL_V3_ENVIRONMENTS):
        known = known_ids()
        nearest = difflib.get_close_matches(env_id.removesuffix("-v2").removesuffix("-v3"), known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
        raise BadInput(f"unknown env_id {env_id!r}: {hint}Meta-World has {', '.join(known)}")
    if split not in SPLITS:
        raise BadInput(f"unknown split {split!r}: {env_id} has {' and '.join(SPLITS)}")
    if reward_version not in ("v1", "v2"):
        raise BadInput(f"unknown reward version {reward_version!r}: Meta-World has v1 and v2")
    if not 1 <= horizon <= MAX_HORIZON:
        raise BadInput(f"horizon must be between 1 and {MAX_HORIZON} for {env_id}, not {horizon}")
    families, tasks = benchmark_tasks(benchmark, family, seed if benchmark_seed is None else benchmark_seed)
    return MetaWorldEnvs(
        {name: partial(make_sawyer, name, reward_version, fast) for name in families},
        tasks[split],
        num_envs,
        split,
        seed,
        device,
        horizon,
        episodes_per_task,
        spaces=(Box(-np.inf, np.inf, (39,), np.float32), Box(-1, 1, (4,), np.float32)),
        num_workers=num_workers,
    )


@lru_cache(maxsize=4)  # the environments of the other split need the same
def benchmark_tasks(benchmark, family, seed):
    """Names of the train and test families, and split -> list of (family, number, metaworld's task), 50 a family.

    Metaworld draws goals in 100 full resets per family, each of which moves the hand for 250 steps of physics. No draw
    depends on where the hand is, so here it stays: the same tasks in a quarter of the time.
    """
    with mock.patch.object(SawyerXYZEnv, "_reset_hand", _leave_hand):
        made = ML1(family, seed=seed) if family else {"ML10": ML10, "ML45": ML45}[benchmark](seed=seed)
    tasks = {"train": made.train_tasks, "test": made.test_tasks}
    tasks = {split: [(task.env_name, n % 50, task) for n, task in enumerate(some)] for split, some in tasks.items()}
    return list(dict.fromkeys([*made.train_classes, *made.test_classes])), tasks


def _leave_hand(env, steps=50):
    mujoco.mj_forward(env.model, env.data)
    env.init_tcp = env.tcp_center


def make_sawyer(family, reward_version="v2", fast=True):
    """One environment of a family; `info["task"]` of its reset is the goal."""
    cls = ALL_V3_ENVIRONMENTS[family]
    return _with_goal(fast_class(cls) if fast else cls)(reward_function_version=reward_version)


@cache
def _with_goal(cls):
    def reset(self, seed=None, options=None):
        obs, info = cls.reset(self, seed, options)
        return obs, {**info, "task": self._target_pos.copy()}

    return type(cls.__name__, (cls,), {"reset": reset})


# ---------- Pictures ----------


class MetaWorldEnvs(WorkerVectorEnv):
    """The environments in their worker processes, and a camera in this one."""

    def film(self, name, row, actions, path, every=5):
        """Plays a meta-episode again, here, and draws it: an animated GIF at `path`, its speed the robot's.

        name, row: the task, and the environment that was reset into it by name. actions: float32 (T, A), as `step`
        received them. every: steps from one picture to the next; the last step of an episode has one too.
        Returns the rewards of the replay, float32 (T,), which are those of the worker to the last bit.
        Raises BadInput where MuJoCo cannot draw.
        """
        family, _, data = self._task[name]
        env = self._make[family]()
        env.set_task(data)
        film = Film(env.model, "corner4", self.horizon, env.dt, every, upside_down=True)
        rewards = np.zeros(len(actions), np.float32)
        for t, action in enumerate(np.clip(actions, self.single_action_space.low, self.single_action_space.high)):
            if t % self.horizon == 0:  # as a worker does it: a seed for the meta-episode, none for the episodes after
                env.reset(seed=None if t else row)
            _, rewards[t], _, _, info = env.step(action)
            film.step(t, env.data, info["success"])
        film.save(path)
        return rewards


# ---------- The fast path ----------


@cache
def fast_class(cls):
    """The environment class `cls` on the fast path: same name, same numbers.

    Metaworld's reward functions call `np.linalg.norm`, `reward_utils.tolerance` and scipy's `Rotation`, which are slow
    on single numbers. Rather than replace them for everyone, we give the class copies of its functions in which these
    names mean our own.
    """
    copies = {"_gripper_caging_reward": _gripper_caging_reward}
    for name, function in vars(cls).items():
        if isinstance(function, types.FunctionType):
            names = {**function.__globals__, **_FAST_NAMES}
            copies[name] = types.FunctionType(
                function.__code__, names, name, function.__defaults__, function.__closure__
            )
            copies[name].__kwdefaults__ = function.__kwdefaults__
    return type(cls.__name__, (FastSawyer, type(cls.__name__, (cls,), copies)), {})


class FastSawyer:
    """Put before an environment class of metaworld: the same numbers in a third of the time, in less memory.

    - Positions are read through views of MuJoCo's arrays, not looked up by name; contacts as arrays, not one by one.
    - What nobody reads is not computed (contact forces on bodies, sites that the next line overwrites).
    - `reset` runs `reset_model` twice, for what the first pass writes into the model. Both move the hand through 250
      steps of physics; only the second counts.
    - Environments of one family share one compiled model (20 MB, 0.15 s), in which tasks differ by two small arrays.
    """

    _models = {}  # path of the XML file -> SimpleNamespace(model, pristine fields, owner)
    _at_rest = False  # in the first pass of a reset

    def _initialize_simulation(self):
        if self.fullpath not in FastSawyer._models:
            model, _ = super()._initialize_simulation()
            pristine = model.body_pos.copy(), model.site_pos.copy()
            FastSawyer._models[self.fullpath] = types.SimpleNamespace(model=model, pristine=pristine, owner=None)
        self._shared = FastSawyer._models[self.fullpath]
        self.model, self._fields = self._shared.model, self._shared.pristine
        self._own_model()
        data = mujoco.MjData(self.model)
        self._bodies = {self.model.body(i).name: data.xpos[i] for i in range(self.model.nbody)}
        self._sites = {self.model.site(i).name: data.site_xpos[i] for i in range(self.model.nsite)}
        self._pads = data.geom("leftpad_geom").id, data.geom("rightpad_geom").id
        self._mocap_pos, self._mocap_quat, self._ctrl = data.mocap_pos[0], data.mocap_quat[0], data.ctrl
        return self.model, data

    def _own_model(self):
        """The shared model as this environment left it: reset_model writes body_pos and site_pos, and nothing else."""
        if self._shared.owner is not self:
            self._shared.owner = self
            self.model.body_pos[:], self.model.site_pos[:] = self._fields

    def reset(self, seed=None, options=None):
        self._own_model()
        self.curr_path_length = 0
        self._at_rest = True
        self.reset_model()
        self._at_rest = False
        obs, info = super(SawyerXYZEnv, self).reset()
        self._prev_obs = obs[:18].copy()
        obs[18:36] = self._prev_obs
        self._fields = self.model.body_pos.copy(), self.model.site_pos.copy()
        self._low, self._high = self.sawyer_observation_space.low, self.sawyer_observation_space.high
        return obs, info

    def _reset_hand(self, steps=50):
        if not self._at_rest:
            self._mocap_pos[:] = self.hand_init_pos
            self._mocap_quat[:] = 1, 0, 1, 0
            self._ctrl[:] = -1, 1
            mujoco.mj_step(self.model, self.data, nstep=steps * self.frame_skip)
        super()._reset_hand(steps=0)  # what else a family does here

    def step(self, action):
        if self.curr_path_length >= self.max_path_length:
            raise ValueError("You must reset the env manually once truncate==True")
        self._own_model()
        target = self._mocap_pos + np.minimum(np.maximum(action[:3], -1), 1) * self.action_scale
        self._mocap_pos[:] = np.minimum(np.maximum(target, self.mocap_low), self.mocap_high)
        self._mocap_quat[:] = 1, 0, 1, 0
        self._ctrl[:] = action[-1], -action[-1]
        mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)
        mujoco.mj_forward(self.model, self.data)
        self.curr_path_length += 1
        obs = self._last_stable_obs = np.minimum(np.maximum(self._get_obs(), self._low), self._high)
        reward, info = self.evaluate_state(obs, action)
        return obs, reward, False, self.curr_path_length == self.max_path_length, info

    def _get_obs(self):
        obs = np.zeros(39)
        obs[18:36] = self._prev_obs
        obs[:18] = self._prev_obs = self._get_curr_obs_combined_no_goal()
        if not self._partially_observable:
            obs[36:] = self._get_pos_goal()
        return obs

    def _get_curr_obs_combined_no_goal(self):
        obs = np.zeros(18)
        obs[:3] = self._bodies["hand"]
        fingers = self._bodies["rightclaw"] - self._bodies["leftclaw"]
        obs[3] = min(max(math.sqrt(fingers.dot(fingers)) / 0.1, 0.0), 1.0)
        position, quaternion = self._get_pos_objects(), self._get_quat_objects()
        for k in range(len(position) // 3):
            obs[4 + 7 * k : 7 + 7 * k] = position[3 * k : 3 * k + 3]
            obs[7 + 7 * k : 11 + 7 * k] = quaternion[4 * k : 4 * k + 4]
        return obs

    def touching_object(self, object_geom_id):
        contact, force = self.data.contact, self.data.efc_force
        touch = dict.fromkeys(self._pads, 0)
        for a, b, address in zip(contact.geom1.tolist(), contact.geom2.tolist(), contact.efc_address.tolist()):
            pad = b if a == object_geom_id else a if b == object_geom_id else None
            if pad in touch:
                touch[pad] += force[address]
        return all(0 < strength for strength in touch.values())

    def get_body_com(self, body_name):
        return self._bodies[body_name]

    def get_endeff_pos(self):
        return self._bodies["hand"]

    def _get_site_pos(self, site_name):
        return self._sites[site_name].copy()

    @property
    def tcp_center(self):
        return (self._sites["rightEndEffector"] + self._sites["leftEndEffector"]) / 2.0


def _gripper_caging_reward(
    self,
    action,
    obj_pos,
    obj_radius,
    pad_success_thresh,
    object_reach_radius,
    xz_thresh,
    desired_gripper_effort=1.0,
    high_density=False,
    medium_density=False,
):
    """SawyerXYZEnv's, which half of the families use, without arrays of two numbers."""
    y, y_init = obj_pos.item(1), self.obj_init_pos.item(1)
    caging_lr = []
    for pad in ("leftpad", "rightpad"):
        y_pad = self._bodies[pad].item(1)
        margin = abs(abs(y_pad - y_init) - pad_success_thresh)
        caging_lr.append(_tolerance(abs(y_pad - y), (obj_radius, pad_success_thresh), margin, "long_tail"))
    tcp = self.tcp_center
    margin = _norm(self.obj_init_pos[::2] - self.init_tcp[::2]) - xz_thresh
    caging_xz = _tolerance(_norm(tcp[::2] - obj_pos[::2]), (0, xz_thresh), margin, "long_tail")
    caging = reward_utils.hamacher_product(reward_utils.hamacher_product(*caging_lr), caging_xz)
    closed = min(max(0, action[-1]), desired_gripper_effort) / desired_gripper_effort
    reward = reward_utils.hamacher_product(caging, closed if caging > 0.97 else 0.0)
    if high_density:
        return (reward + caging) / 2
    if medium_density:
        margin = abs(_norm(self.obj_init_pos - self.init_tcp) - object_reach_radius)
        reach = _tolerance(_norm(obj_pos - tcp), (0, object_reach_radius), margin, "long_tail")
        return (reward + reach) / 2
    return reward


def _tolerance(x, bounds=(0.0, 0.0), margin=0.0, sigmoid="gaussian", value_at_margin=0.1):
    """`reward_utils.tolerance`; in scalar arithmetic where everyone calls it, the same to the last bit."""
    lower, upper = bounds
    if sigmoid != "long_tail" or value_at_margin != 0.1 or not isinstance(x, float) or lower > upper or margin <= 0:
        return reward_utils.tolerance(x, bounds, margin, sigmoid, value_at_margin)
    if lower <= x <= upper:
        return 1.0
    d = float(lower - x if x < lower else x - upper) / float(margin)
    return 1 / ((d * 3.0) ** 2 + 1)  # ** 2 and not d * d: they differ in the last bit


def _norm(x, ord=None):
    """`np.linalg.norm`; for a vector, what numpy does after a microsecond of looking for something else."""
    return np.sqrt(x.dot(x)) if x.ndim == 1 and ord in (None, 2) else np.linalg.norm(x, ord)


class _Rotation:
    """`scipy.spatial.transform.Rotation`, from a rotation matrix to its quaternion (x, y, z, w) and nothing else.

    The same arithmetic in the same order (Markley, Journal of Guidance, Control, and Dynamics 31(2), 2008): the largest
    of the diagonal and the trace decides which component is computed first.
    """

    @staticmethod
    def from_matrix(matrix):
        (a, b, c), (d, e, f), (g, h, i) = matrix.tolist()
        trace = a + e + i
        if a >= e and a >= i and a >= trace:
            x, y, z, w = 1 - trace + 2 * a, d + b, g + c, h - f
        elif e >= i and e >= trace:
            x, y, z, w = d + b, 1 - trace + 2 * e, h + f, c - g
        elif i >= trace:
            x, y, z, w = g + c, h + f, 1 - trace + 2 * i, d - b
        else:
            x, y, z, w = h - f, c - g, d - b, 1 + trace
        norm = math.sqrt(x * x + y * y + z * z + w * w)
        self = _Rotation()
        self.quaternion = np.array((x / norm, y / norm, z / norm, w / norm))
        return self

    def as_quat(self):
        return self.quaternion


_FAST_NAMES = {
    "np": types.SimpleNamespace(**{**vars(np), "linalg": types.SimpleNamespace(norm=_norm)}),
    "reward_utils": types.SimpleNamespace(**{**vars(reward_utils), "tolerance": _tolerance}),
    "Rotation": _Rotation,
}
