"""ScratchItch: a robot scratches a person's arm where it itches, and the itch moves; on MuJoCo, in threads.

The environment of DynaMITE-RL (2024, appendix D.3), which adds sessions to a task of Assistive Gym (Erickson et al.,
2020). That one runs on PyBullet; this is our own model of it, in scratchitch.xml, out of primitive shapes: kinematics,
observations and rewards agree, motions nearly (tests/test_scratchitch.py has the numbers), contacts only in kind. A
Jaco arm with seven joints stands beside a wheelchair with a tool in its hand; a man or a woman (drawn with each task)
sits in it, with the right arm held out, which gives way when pushed. Nothing has weight. A step takes 0.1 s. The
person has none of the impairments that Assistive Gym draws for each episode: a tremor, weak muscles, joints that move
less.

    context    x in [0, 1], the place of the itch along the right arm, from the shoulder to the wrist:
               x = 0.5 + sin(0.2 i), clipped (ours: the formula leaves the arm), i the number of the session. Four
               sessions of Poisson lengths (ours); nothing is moved when one begins
    action     (7), changes of the joint angles: 0.25 rad each at 1, of which the motors make 0.057 in a step
    obs (24)   in the frame of the robot's base: position and quaternion (x, y, z, w; w >= 0) of the tool's tip, joint
               angles in [-pi, pi), positions of shoulder, elbow and wrist; the sum of normal forces on the tool in N
    reward     - |itch - tip| - 0.01 |action|, + 5 for a scratch, and Assistive Gym's preferences of the person:
               - 0.25 |velocity of the hand| - 0.01 (force on the person - force near the itch)
               - 0.05 (force near the itch, where that is 10 N or more)
    success    25 scratches or more so far (Assistive Gym's; the paper does not use it)

A scratch is a contact of the tool's rod or tip with the person, within 2.5 cm of the itch, more than 1 cm away from the
last scratch of the episode (the first one always counts), while the force near the itch is below 10 N. Forces are
those at the end of a step. |action| is of the action as given, before it is clipped to [-1, 1].
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from gymnasium.spaces import Box

from common.envs.film import Film, mujoco
from common.envs.protocol import TensorEnvs, cores
from common.envs.sessions import Sessions, named_draws

JOINTS = slice(7)  # of the robot, which come first in the model
SUBSTEPS = 10
HAND = np.array([-0.6, 0, 0.8])  # where the robot's hand is at first, up to HAND_NOISE in each direction
HAND_NOISE = 0.05
HAND_QUAT = np.array([0.5**0.5, 0, 0.5**0.5, 0])  # the tool points at the person, along x
FOR_POSES = 4  # the last part of a key of `generator`, as in common/envs/sessions.py
GOALS, STARTS = 20, 16  # of the search for a first pose: places for the hand, and tries for each; one in five succeeds

# The woman's sizes, where scratchitch.xml has the man's. Positions are those of the right side.
WOMAN_BODIES = {
    "person": (0, 0.03, 0.86),
    "upper_arm": (-0.159, 0, 0.132),
    "forearm": (0, 0, -0.264),
    "wrist": (0, 0, -0.261),
    "thigh": (-0.09, 0, -0.231),
    "shin": (0, 0, -0.391),
}
WOMAN_SHAPES = {  # radius, half length, position
    "chest": (0.127, 0.005, (0, 0, 0)),
    "shoulder": (0.092, 0.01405, (-0.0759, 0, 0.132)),
    "waist": (0.11, 0.0045, (0, 0, -0.15)),
    "hips": (0.127, 0.0585, (0, 0, -0.231)),
    "neck": (0.05, 0.0605, (0, 0, 0.222)),
    "upper_arm": (0.0355, 0.132, (0, 0, -0.132)),
    "forearm": (0.027, 0.117, (0, 0, -0.117)),
    "fist": (0.0355, 0, (0, 0, -0.0355)),
    "thigh": (0.0775, 0.1955, (0, 0, -0.1955)),
    "shin": (0.045, 0.1835, (0, 0, -0.1835)),
    "foot": (0.045, 0.0975, (0, -0.1, -0.392)),
}
WOMAN_WEIGHT = 62.5 / 78.4  # of the man's


def make_model(woman=False):
    """The compiled model, of the man or the woman."""
    spec = mujoco.MjSpec.from_file(str(Path(__file__).with_name("scratchitch.xml")))
    for part in [*spec.bodies, *spec.geoms] if woman else []:
        mirror = (-1, 1, 1) if part.name.startswith("left_") else (1, 1, 1)
        name = part.name.removeprefix("left_").removeprefix("right_")
        if isinstance(part, mujoco.MjsBody) and name in WOMAN_BODIES:
            part.pos = np.multiply(WOMAN_BODIES[name], mirror)
        if isinstance(part, mujoco.MjsGeom) and name in WOMAN_SHAPES:
            radius, half_length, pos = WOMAN_SHAPES[name]
            part.size, part.pos = (radius, half_length, 0), np.multiply(pos, mirror)
            part.mass *= WOMAN_WEIGHT
    return spec.compile()


def first_pose(model, data, u):
    """Sets the robot to a pose whose hand is near HAND, and that touches nothing. u: uniform numbers, GOALS rows.

    From random angles the hand is moved to a random place, until a try ends within all limits and touches nothing.
    A third of the cube is out of reach, beyond x = -0.63: after STARTS tries the hand gets another place (ours).
    Raises RuntimeError if no try succeeds.
    """
    limited = model.jnt_limited[JOINTS] == 1
    low, high = np.where(limited, model.jnt_range[JOINTS].T, [[-np.pi], [np.pi]])
    for row in u:
        goal = HAND + HAND_NOISE * (2 * row[:3] - 1)
        for start in row[3:].reshape(STARTS, 7):
            q = reach(model, data, goal, low + (high - low) * start)
            if q is None:
                continue
            q = np.where(limited, q % (2 * np.pi), wrapped(q))
            if (q < low).any() or (q > high).any():
                continue
            data.qpos[JOINTS] = data.ctrl[JOINTS] = q
            mujoco.mj_forward(model, data)
            if data.ncon == 0:
                return
    raise RuntimeError(f"no first pose of the robot in {len(u) * STARTS} tries")


def reach(model, data, goal, q):
    """Joint angles (7) that bring the hand to `goal` (3), in m, turned as HAND_QUAT; None where 30 steps do not.

    Damped least squares (Wampler, 1986), from the angles q.
    """
    hand, jacobian, error = model.body("hand").id, np.zeros((6, model.nv)), np.zeros(6)  # position, rotation
    for _ in range(30):
        data.qpos[JOINTS] = q
        mujoco.mj_kinematics(model, data)
        error[:3] = goal - data.xpos[hand]
        mujoco.mju_subQuat(error[3:], HAND_QUAT, data.xquat[hand])  # in the hand's frame
        mujoco.mju_rotVecQuat(error[3:], error[3:].copy(), data.xquat[hand])
        if error @ error < 1e-6:
            return q
        mujoco.mj_comPos(model, data)
        mujoco.mj_jacBody(model, data, jacobian[:3], jacobian[3:], hand)
        J = jacobian[:, JOINTS]
        q = q + J.T @ np.linalg.solve(J @ J.T + 0.01 * np.eye(6), error)
    return None


def wrapped(angle):
    return (angle + np.pi) % (2 * np.pi) - np.pi


class ScratchItch(Sessions, TensorEnvs):
    """See above. task: 1 for a woman, 0 for a man; context: x. 32 evaluation tasks, fixed draws.

    amplitude: a of x = 0.5 + a sin(0.2 i), clipped to [0, 1]; with 0.5 nothing is clipped.
    num_threads: None means one a core; results do not depend on it.
    """

    obs_dim = 24
    same_splits = joins = True
    own_process = "poisson"
    reset_state = False
    single_action_space = Box(-1, 1, (7,), np.float32)

    def __init__(
        self,
        num_envs,
        split="train",
        seed=1,
        device="cpu",
        horizon=200,
        episodes_per_task=1,
        sessions=0,
        session_process="",
        amplitude=1.0,
        num_threads=None,
    ):
        super().__init__(num_envs, split, seed, device, horizon, episodes_per_task)
        self.set_sessions(sessions, session_process)
        self.amplitude = amplitude
        self.tasks = [f"ScratchItch/{i}" for i in range(32)]
        self.task_table = self.goals(named_draws(split, len(self.tasks)))
        self.models = [make_model(), make_model(woman=True)]
        model = self.models[0]  # both have the same parts, in the same order
        continuous = model.jnt_limited[JOINTS] == 0
        self.low, self.high = np.where(continuous, [[-2 * np.pi], [2 * np.pi]], model.jnt_range[JOINTS].T)
        limbs = ("upper_arm", "forearm")
        sizes = np.array([[m.geom(name).size for name in limbs] for m in self.models])
        self.radius, self.length = sizes[..., 0], 2 * sizes[..., 1]  # (man or woman, limb)
        self.limb_bodies, self.tip = np.array([model.body(name).id for name in limbs]), model.body("tip").id
        self.of_person = model.body_rootid[model.geom_bodyid] == model.body("person").id  # (geoms)
        tool = [model.geom(name).id for name in ("handle", "rod", "tip")]
        self.of_tool = np.isin(np.arange(model.ngeom), tool)
        self.scratches = np.isin(np.arange(model.ngeom), tool[1:])  # not with the handle
        self.rows = np.arange(num_envs)
        self.blocks = np.array_split(self.rows, min(num_threads or cores(), num_envs))
        self.pool = ThreadPoolExecutor(len(self.blocks))  # MuJoCo lets go of Python while it computes

    def goals(self, u):
        return (u[:, :1] < 0.5).float()

    def contexts_of(self, session, u):
        return (0.5 + self.amplitude * (0.2 * session.double()).sin()).clamp(0, 1).unsqueeze(-1)

    def enter(self, t):
        """The place of the itch in transition t: a limb, and a position in its frame, on the side of the robot."""
        super().enter(t)
        length, radius = self.length[self.woman], self.radius[self.woman]  # (N, limb)
        along = self.contexts[t, :, 0].cpu().numpy() * length.sum(1)
        limb = (along > length[:, 0]).astype(int)
        along = along - limb * length[:, 0]
        self.limb = self.limb_bodies[limb]
        self.place = np.stack([-radius[self.rows, limb], 0 * along, -along], 1)

    def start(self):
        if self.elapsed == self.meta_horizon:  # `reset` follows: no first pose, which costs as much as 10 steps
            return self.observe()
        self.woman = self.task[:, 0].long().cpu().numpy()
        self.begin()
        self.data = [mujoco.MjData(self.models[woman]) for woman in self.woman]
        self.views = [[getattr(d, name) for d in self.data] for name in ("qpos", "xpos", "xmat", "sensordata")]
        size = 3 + 7 * STARTS  # numbers for a place of the hand, and for its tries
        self.in_threads(self.first_pose, self.draws(FOR_POSES, GOALS * size).reshape(-1, GOALS, size))
        self.read()
        self.force = np.zeros(self.num_envs)  # on the tool
        self.last = np.zeros((self.num_envs, 3))  # the last scratch
        self.count = np.zeros(self.num_envs, int)  # of scratches
        return self.observe()

    def first_pose(self, i, u):
        mujoco.mj_resetDataKeyframe(self.models[self.woman[i]], self.data[i], 0)
        first_pose(self.models[self.woman[i]], self.data[i], u)

    def advance(self, i, ctrl):
        self.data[i].ctrl[JOINTS] = ctrl
        mujoco.mj_step(self.models[self.woman[i]], self.data[i], nstep=SUBSTEPS)
        mujoco.mj_forward(self.models[self.woman[i]], self.data[i])  # positions, velocities, contacts after the step

    def in_threads(self, function, values):
        """function(i, values[i]) for every environment."""

        def block(rows):
            for i in rows:
                function(i, values[i])

        deque(self.pool.map(block, self.blocks), 0)  # waits, and raises what a thread raised

    def read(self):
        """The state after a step: joint angles (N, nq), positions (N, bodies, 3), rotations, sensors."""
        self.q, self.xpos, self.xmat, self.sensors = (np.array(view) for view in self.views)

    def observe(self):
        tip, quat, arm = np.split(self.sensors[:, :16], [3, 7], 1)
        quat = np.roll(quat, -1, 1)  # MuJoCo's (w, x, y, z) to (x, y, z, w)
        quat = np.where(quat[:, 3:] < 0, -quat, quat)
        obs = np.concatenate([tip, quat, wrapped(self.q[:, JOINTS]), arm, self.force[:, None]], 1)
        return torch.as_tensor(obs, dtype=torch.float32, device=self.device)

    def move(self, action):
        """action (N, 7)."""
        action = action.detach().double().cpu().numpy()
        target, increment = self.q[:, JOINTS], 0.05 * action.clip(-1, 1)
        for _ in range(5):  # what would leave a joint's limits stops there
            wanted = target + increment
            target = wanted.clip(self.low, self.high)
            increment[wanted != target] = 0
        self.in_threads(self.advance, target)
        self.read()
        rotation = self.xmat[self.rows, self.limb].reshape(-1, 3, 3)
        self.itch = self.xpos[self.rows, self.limb] + (rotation @ self.place[..., None])[..., 0]
        on_person, near, scratched = self.touch()
        preferences = 0.25 * norm(self.sensors[:, 16:]) + 0.01 * (on_person - near) + 0.05 * near * (near >= 10)
        reward = 5 * scratched - norm(self.itch - self.xpos[:, self.tip]) - 0.01 * norm(action) - preferences
        reward = torch.as_tensor(reward, dtype=torch.float32, device=self.device)
        self.count += scratched
        return self.observe(), reward, torch.as_tensor(self.count >= 25, device=self.device)

    def touch(self):
        """Of all contacts: normal forces on the person and near the itch, float64 (N,); scratches, bool (N,)."""
        on_person, near, self.force = np.zeros((3, self.num_envs))
        scratched = np.zeros(self.num_envs, bool)
        for i, data in enumerate(self.data):
            if not data.ncon:
                continue
            geoms, points = data.contact.geom, data.contact.pos  # (contacts, 2), (contacts, 3)
            forces = data.efc_force[data.contact.efc_address]  # the normal one, with elliptic cones
            person = self.of_person[geoms].any(1)
            close = person & self.scratches[geoms].any(1) & (norm(points - self.itch[i]) < 0.025)
            self.force[i] = forces[self.of_tool[geoms].any(1)].sum()
            on_person[i], near[i] = forces[person].sum(), forces[close].sum()
            if close.any() and near[i] < 10:
                point = points[close][forces[close].argmax()]  # of several the strongest (ours)
                scratched[i] = norm(point - self.last[i]) > 0.01
                self.last[i] = np.where(scratched[i], point, self.last[i])
        return on_person, near, scratched

    def film(self, name, row, actions, path, every=5):
        """Plays a meta-episode again, and draws it, with a green ball where it itches: an animated GIF at `path`.

        name: the task. row: no matter. actions: float32 (T, 7), as `step` received them. every: steps from one picture
        to the next. Returns the rewards, float32 (T,), to the last bit. Raises BadInput where MuJoCo cannot draw.
        """
        sizes = self.horizon, self.episodes_per_task, self.sessions, self.session_process, self.amplitude
        env = ScratchItch(1, self.split, self.seed, "cpu", *sizes, num_threads=1)
        env.reset(tasks=[name])
        film = Film(env.models[env.woman[0]], "close", self.horizon, 0.1, every)
        rewards = np.zeros(len(actions), np.float32)
        for t, action in enumerate(torch.as_tensor(actions).unsqueeze(1)):
            data = env.data[0]  # at the end of an episode the next one has its own
            _, reward, _, _, info = env.step(action)
            rewards[t] = reward
            film.step(t, data, info["success"], env.itch[0])
        film.save(path)
        env.close()
        return rewards

    def close(self):
        self.pool.shutdown()


def norm(x):
    return np.sqrt((x * x).sum(-1))
