"""ScratchItch: kinematics, first observation and motions against Assistive Gym's, rewards by hand, the protocol.

Assistive Gym's numbers are of its ScratchItch with the Jaco, run on PyBullet 3.2.7 for these tests.
"""

import math

import mujoco
import numpy as np
import pytest
import torch
from PIL import Image

from common.envs import make_envs
from common.envs.scratchitch import ScratchItch, first_pose, make_model
from tests.test_video import renderer  # noqa: F401

MODELS = {"man": make_model(), "woman": make_model(woman=True)}
Q0 = [1.83038, 1.45863, -0.59006, 2.02542, -3.43955, 1.18666, -3.86728]  # one of Assistive Gym's first poses
SIZES = {"man": (0.279, 0.257, 0.043, 0.033), "woman": (0.264, 0.234, 0.0355, 0.027)}  # lengths, radii of the limbs
JOINTS = {  # shoulder, elbow, wrist
    "man": [[-0.179, 0.03, 1.0315], [-0.3185, 0.03, 0.78988], [-0.3185, -0.26, 0.78988]],
    "woman": [[-0.159, 0.03, 0.992], [-0.291, 0.03, 0.76337], [-0.291, -0.231, 0.76337]],
}
BOTH = pytest.mark.parametrize("who", ["man", "woman"])


class Still(ScratchItch):
    """One person, and an itch that stays: at x, or at a point (3) of the world, fixed to the forearm."""

    def __init__(self, num_envs, who, x=0.5, **options):
        self.who, self.x, self.point = who, x, None
        super().__init__(num_envs, **options)

    def goals(self, u):
        return torch.full((len(u), 1), float(self.who == "woman"))

    def contexts_of(self, session, u):
        return torch.full((*session.shape, 1), self.x, dtype=torch.float64)

    def enter(self, t):
        super().enter(t)
        if self.point is not None:
            self.limb[:], self.place[:] = self.limb_bodies[1], self.point

    def at_q0(self, point):
        """To Assistive Gym's first pose, and its itch."""
        self.reset()
        forearm = self.limb_bodies[1]
        self.point = self.xmat[0, forearm].reshape(3, 3).T @ (np.array(point) - self.xpos[0, forearm])
        set_state(self, 0, Q0)
        self.enter(0)
        return self.observe()[0]


def set_state(envs, i, q, v=0):
    """The robot's joint angles and velocities of environment i."""
    data = envs.data[i]
    data.qpos[:7], data.qvel[:7], data.ctrl[:7] = q, v, q
    mujoco.mj_forward(envs.models[envs.woman[i]], data)
    envs.read()


def close(actual, expected, atol):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def random_actions(envs, seed=0, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return scale * (2 * torch.rand(envs.meta_horizon, envs.num_envs, 7, generator=generator) - 1)


# ---------- Kinematics, observation, motions: against Assistive Gym ----------


def test_forward_kinematics():
    """The hand in the frame of the base, from the robot's URDF."""
    data = mujoco.MjData(MODELS["man"])
    for q, expected in [
        ([0, math.pi, 0, math.pi, 0, math.pi, 0], [0, -0.0098, 1.2603]),
        ([0, 2.9, 0, 1.3, 4.2, 1.4, 0], [-0.164295, 0.216733, 0.538449]),
        ([1, 2, 0.5, 1.5, -1, 2, 0.7], [0.501191, -0.087735, 0.746787]),
    ]:
        data.qpos[:7] = q
        mujoco.mj_kinematics(MODELS["man"], data)
        x, y, z = data.body("hand").xpos - [-0.35, -0.30, 0.36]
        close([-y, x, z], expected, 1e-6)  # the base is turned by -90 degrees


@BOTH
def test_the_person(who):
    """Places of the joints, masses of the limbs; nothing but the right arm moves, and left and right are mirrored."""
    model = MODELS[who]
    data = mujoco.MjData(model)
    mujoco.mj_resetDataKeyframe(model, data, 0)
    mujoco.mj_forward(model, data)
    close([data.body(name).xpos for name in ("upper_arm", "forearm", "wrist")], JOINTS[who], 1e-5)
    weight = {"man": 78.4, "woman": 62.5}[who]
    masses = [model.body(name).mass[0] for name in ("upper_arm", "forearm", "wrist")]
    close(masses, weight * np.array([0.033, 0.019, 0.0065]), 1e-6)
    assert model.nq == model.nv == model.nu == 14 and data.ncon == 0
    for part in ("thigh", "shin"):
        right, left = (data.body(f"{side}_{part}").xpos for side in ("right", "left"))
        close(left, right * [-1, 1, 1], 1e-12)
    for part in ("shoulder", "thigh", "foot"):
        right, left = (data.geom(f"{side}_{part}") for side in ("right", "left"))
        close(left.xpos, right.xpos * [-1, 1, 1], 1e-12)
        assert (model.geom(f"left_{part}").size == model.geom(f"right_{part}").size).all()


def test_first_observation():
    envs = Still(1, "man")
    obs = envs.at_q0([-0.35110, -0.04128, 0.78475])
    theirs = [-0.30331, -0.14871, 0.4389, -0.00027, -0.00055, 0.70662, 0.70759]  # the tip
    theirs += [1.83038, 1.45863, -0.59006, 2.02542, 2.84364, 1.18666, 2.41591]  # joints
    theirs += [-0.33, 0.171, 0.6715, -0.33, 0.0315, 0.42988, -0.04, 0.0315, 0.42988, 0]  # the person's, force
    assert obs.dtype == torch.float32
    close(obs, theirs, 2e-5)
    for _ in range(5):  # the robot stands still
        _, reward, *_, info = envs.step(torch.zeros(1, 7))
        assert reward.item() == pytest.approx(-0.15486, abs=3e-5)
        close(info["final_obs"][0], theirs, 2e-5)


def test_quaternions_have_one_sign():
    """The same pose, joints turned by whole turns or not."""
    envs = Still(1, "man")
    obs = envs.at_q0([0, 0, 0])
    for k in (0, 2, 4, 6):
        q = np.array(Q0)
        q[k] += 2 * np.pi
        set_state(envs, 0, q)
        close(envs.observe()[0], obs, 1e-6)


STEPS = [  # of PyBullet: angle of joint k after 1 to 6 steps of a_k = 1, alone
    [0.0076, 0.0279, 0.0609, 0.1063, 0.1607, 0.2155],
    [0.0079, 0.0291, 0.0633, 0.1106, 0.1657, 0.2204],
    [0.0357, 0.0923, 0.1489, 0.2054, 0.2620, 0.3186],
    [0.0288, 0.0846, 0.1409, 0.1971, 0.2534, 0.3097],
    [0.0545, 0.1111, 0.1676, 0.2242, 0.2807, 0.3373],
    [0.0515, 0.1081, 0.1646, 0.2212, 0.2777, 0.3343],
    [0.0566, 0.1131, 0.1697, 0.2262, 0.2828, 0.3393],
]


def test_step_responses():
    """Within 5 mrad (RMS) of PyBullet's, no joint beyond 10."""
    envs = Still(7, "man")
    envs.reset()
    for k in range(7):
        set_state(envs, k, Q0)
    angles = []
    for _ in range(6):
        envs.step(torch.eye(7))
        angles.append([envs.q[k, k] - Q0[k] for k in range(7)])
    error = np.transpose(angles) - STEPS
    assert math.sqrt((error**2).mean()) < 0.005 and abs(error).max() < 0.01


def test_motion_before_the_first_contact():
    """Rewards of the first ten steps of a sinusoidal action within 0.02 of PyBullet's, the tip within 2 cm."""
    envs = Still(1, "man")
    envs.at_q0([-0.35110, -0.04128, 0.78475])
    rewards = []
    for t in range(10):
        rewards.append(envs.step(torch.tensor([[0.5 * math.sin(0.1 * t + k) for k in range(7)]]))[1].item())
        assert envs.force[0] == 0
        if t == 0:
            close(envs.q[0, :7], [1.83187, 1.46401, -0.5644, 2.02941, -3.46095, 1.17486, -3.87518], 0.016)
    theirs = [-0.17708, -0.18441, -0.18177, -0.17912, -0.17558, -0.17115, -0.16587, -0.15984, -0.15330, -0.14650]
    close(rewards, theirs, 0.02)
    assert np.linalg.norm(envs.xpos[0, envs.tip] - [-0.42904, 0.01932, 0.81487]) < 0.02


def test_steps_are_of_250_milliradians_within_the_limits():
    """Five times 0.05 a from the angles as measured; a joint that would leave its limits stays there."""
    envs = Still(6, "man")
    envs.reset()
    low, high = ([math.radians(x) for x in bounds] for bounds in ([47, 30, 65], [313, 330, 295]))
    rng, stopped = np.random.default_rng(0), 0
    for action in random_actions(envs, scale=2)[:40]:
        for i in range(6):
            q = rng.uniform(-np.pi, np.pi, 7)
            q[1::2] = rng.choice([low, high]) + rng.uniform(-0.2, 0.2, 3)
            q[0] = rng.choice([-1, 1]) * (2 * np.pi - rng.uniform(0, 0.3))
            set_state(envs, i, q)
        before = envs.q[:, :7].copy()
        envs.step(action)
        for i in range(6):
            for k in range(7):
                bounds = (low[k // 2], high[k // 2]) if k in (1, 3, 5) else (-2 * np.pi, 2 * np.pi)
                angle, change = before[i, k], 0.05 * min(max(action[i, k].item(), -1), 1)
                for _ in range(5):
                    if angle + change < bounds[0]:
                        angle, change, stopped = bounds[0], 0, stopped + 1
                    elif angle + change > bounds[1]:
                        angle, change, stopped = bounds[1], 0, stopped + 1
                    else:
                        angle += change
                assert envs.data[i].ctrl[k] == pytest.approx(angle, abs=1e-6)
        if envs.elapsed == envs.meta_horizon:
            break
    assert stopped > 100


# ---------- The itch ----------


@BOTH
@pytest.mark.parametrize("x", [0, 0.25, 0.5, 0.75, 1])
def test_where_it_itches(who, x):
    """On the outer side of the arm as it is held at first: 30 degrees outwards, the forearm forwards."""
    envs = Still(1, who, x)
    envs.reset()
    envs.step(torch.zeros(1, 7))
    (shoulder, elbow, _), (upper, fore, upper_radius, fore_radius) = np.array(JOINTS[who]), SIZES[who]
    outwards = np.array([-math.cos(math.radians(30)), 0, math.sin(math.radians(30))])
    along = x * (upper + fore)
    if along <= upper:
        expected = shoulder + (elbow - shoulder) * along / upper + upper_radius * outwards
    else:
        expected = elbow + np.array([0, upper - along, 0]) + fore_radius * outwards
    close(envs.itch[0], expected, 2e-5)


@pytest.mark.parametrize("amplitude", [1, 0.5])
def test_the_itch_moves_with_the_session(amplitude):
    """x = 0.5 + a sin(0.2 i), clipped; the state goes on; Poisson lengths, four sessions."""
    envs = ScratchItch(40, amplitude=amplitude)
    assert (envs.sessions, envs.session_process, envs.horizon) == (4, "poisson", 200)
    obs, info = envs.reset()
    lengths, session, x = [], np.zeros(40, int), info["context"]
    assert (x == 0.5).all() and torch.equal(info["task"][:, 1:], x)
    assert torch.equal(info["task"][:, 0].double(), torch.from_numpy(envs.woman).double())
    before = [0] * 40
    envs.in_threads = lambda *_: None  # nothing moves: physics is not the point here
    for t in range(200):
        _, reward, _, _, info = envs.step(torch.zeros(40, 7))
        along = [SIZES["woman" if woman else "man"] for woman in envs.woman]
        for i, (upper, fore, *_) in enumerate(along):
            limb = int(x[i].item() * (upper + fore) > upper + 1e-6)
            place = x[i].item() * (upper + fore) - limb * upper
            p = envs.xpos[i, envs.limb_bodies[limb]]
            assert np.linalg.norm(envs.itch[i] - p) == pytest.approx(math.hypot(place, along[i][2 + limb]), abs=1e-6)
        ended = info["session_end"].numpy()
        lengths += [t + 1 - before[i] for i in np.flatnonzero(ended)]
        before = [t + 1 if ended[i] else before[i] for i in range(40)]
        if t < 199:
            session += ended
            x = info["context"]
            expected = [min(max(0.5 + amplitude * math.sin(0.2 * i), 0), 1) for i in session]
            close(x[:, 0], expected, 1e-6)
    assert ended.all() and (session == 3).all() and len(lengths) == 160
    assert np.mean(lengths) == 50 and 5 < np.std(lengths) < 12


def test_many_sessions():
    """Beyond its first bend the path is clipped on both sides; no session begins with a reset."""
    envs = ScratchItch(2, sessions=40, session_process="fixed")
    envs.reset()
    xs = []
    for action in random_actions(envs, scale=0.3):
        obs, _, _, _, info = envs.step(action)
        if info["session_end"].all():
            xs.append(info["context"][0].item())
            assert torch.equal(obs, info["final_obs"])
    assert len(xs) == 40 and min(xs) == 0 and max(xs) == 1


# ---------- Rewards ----------


def scripted(envs, rng, dither=0.02, goals=()):
    """Actions that bring the tip to a point near the itch, another one in each step, or to the goal of an environment
    in `goals`, a dictionary: its Jacobian's damped inverse."""
    actions = np.zeros((envs.num_envs, 7))
    for i, data in enumerate(envs.data):
        model, limb = envs.models[envs.woman[i]], envs.limb[i]
        goal = data.xpos[limb] + data.xmat[limb].reshape(3, 3) @ (envs.place[i] + rng.normal(0, dither, 3))
        if i in goals:
            goal = np.array(goals[i])
        jacobian = np.zeros((3, model.nv))
        mujoco.mj_jacBody(model, data, jacobian, None, envs.tip)
        J, way = jacobian[:, :7], goal - data.xpos[envs.tip]
        way *= min(1, 0.03 / np.linalg.norm(way))
        a = J.T @ np.linalg.solve(J @ J.T + 1e-3 * np.eye(3), way) / 0.0566  # of 0.25 a, so much comes in a step
        actions[i] = a / max(1, abs(a).max())
    return torch.from_numpy(actions).float()


def by_hand(envs, i, action, x, last):
    """Reward of environment i from its state after the step, and what happened; changes `last`, the last scratch."""
    who = ["man", "woman"][envs.woman[i]]
    model, data = envs.models[envs.woman[i]], envs.data[i]
    upper, fore, upper_radius, fore_radius = SIZES[who]
    along = x * (upper + fore)
    limb, place = ("upper_arm", (upper_radius, along)) if along <= upper else ("forearm", (fore_radius, along - upper))
    itch = data.body(limb).xpos + data.body(limb).xmat.reshape(3, 3) @ [-place[0], 0, -place[1]]
    on_person = on_tool = near = several = 0
    point, strongest, force = None, -1, np.zeros(6)
    robot = {model.body(f"link{k}").id for k in range(1, 8)} | {model.body("base").id}
    tool = {model.body("tool").id, model.body("tip").id}
    furniture = model.body("wheelchair").id
    for k in range(data.ncon):
        mujoco.mj_contactForce(model, data, k, force)
        geoms = sorted(data.contact[k].geom, key=lambda g: model.geom_bodyid[g] not in robot | tool)
        mine, theirs = (model.geom_bodyid[g] for g in geoms)
        assert mine in robot | tool and theirs not in robot | tool
        on_tool += force[0] * (mine in tool)
        if theirs == furniture:
            continue
        on_person += force[0]
        p = data.contact[k].pos
        if model.geom(geoms[0]).name in ("rod", "tip") and np.linalg.norm(p - itch) < 0.025:
            near, several = near + force[0], several + 1
            if force[0] > strongest:
                point, strongest = p.copy(), force[0]
    velocity = np.zeros(6)
    mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_XBODY, model.body("hand").id, velocity, 0)
    reward = -np.linalg.norm(data.body("tip").xpos - itch) - 0.01 * math.sqrt(sum(a * a for a in action.tolist()))
    reward -= 0.25 * np.linalg.norm(velocity[3:]) + 0.01 * (on_person - near) + (0.05 * near if near >= 10 else 0)
    scratch = point is not None and near < 10 and np.linalg.norm(point - last[i]) > 0.01
    if scratch:
        reward, last[i] = reward + 5, point
    return (
        reward,
        dict(
            scratches=scratch,
            presses=near >= 10,
            elsewhere=on_person > near,
            again=point is not None and not scratch and near < 10,
            several=several > 1,
            furniture=on_tool > on_person,
            arm=on_person > on_tool,
        ),
        on_tool,
    )


def test_rewards_by_hand():
    """Every term, from MuJoCo's own account of contacts and velocities; forces in the observation; scratches."""
    envs = ScratchItch(8, seed=5)
    envs.reset()
    x, last, rng = [0.5] * 8, np.zeros((8, 3)), np.random.default_rng(0)
    assert set(envs.woman) == {0, 1}
    seen, scratches = {}, np.zeros(8, int)
    astray = {4: [-0.27, -0.07, 0.69], 5: [0, 0.03, 0.9]}  # into the arm rest, the chest
    astray |= {6: [0.15, -0.25, 0.95], 7: [0.1, -0.35, 0.75]}  # across the lap: links of the robot touch
    for t, noise in enumerate(random_actions(envs)[:199]):
        action = scripted(envs, rng, 0.03, astray)
        action[1:3] = (3 * action + noise / 3)[1:3]  # with force, and beyond what is clipped
        _, reward, terminated, truncated, info = envs.step(action)
        assert not terminated.any() and not truncated.any()
        for i in range(8):
            expected, what, on_tool = by_hand(envs, i, action[i], x[i], last)
            assert reward[i].item() == pytest.approx(expected, abs=1e-5), (t, i, what)
            assert info["final_obs"][i, -1].item() == pytest.approx(on_tool, rel=1e-6, abs=1e-6)
            close(envs.last[i], last[i], 1e-12)
            scratches[i] += what["scratches"]
            assert info["success"][i].item() == (scratches[i] >= 25)
            seen = {name: seen.get(name, 0) + bool(value) for name, value in what.items()}
        x = info["context"][:, 0].tolist()
    assert min(seen.values()) >= 2, seen
    assert info["success"].any() and not info["success"].all()


def test_the_handle_does_not_scratch():
    """The person is moved until the forearm lies across the handle, or across the tip, right where it itches."""
    for body, scratches in (("tool", False), ("tip", True)):
        envs = Still(1, "man")
        envs.at_q0([0, 0, 0])
        model, data = envs.models[0], envs.data[0]
        above = {"tool": 0.025, "tip": 0.01}[body] + 0.033 - 1e-4
        forearm = data.body("forearm").xpos - [0, 0.13, 0]
        model.body("person").pos += data.body(body).xpos + [0, 0, above] - forearm
        set_state(envs, 0, Q0)
        envs.itch = data.body(body).xpos + [[0, 0, above - 0.033]]
        _, near, scratched = envs.touch()
        assert 0 < envs.force[0] < 10
        assert near[0] == scratches * envs.force[0] and scratched[0] == scratches


def test_an_episode_forgets_the_last_scratch():
    """The next one's first contact counts again, at a first pose of its own."""
    envs = Still(1, "man", horizon=3, episodes_per_task=2, sessions=1)
    envs.reset()
    envs.last[:], envs.count[:] = 1, 30
    for t in range(6):
        before = envs.data[0]
        obs, *_, info = envs.step(torch.zeros(1, 7))
        assert info["success"].item() == (t < 3)
        if t == 2:
            assert (envs.last == 0).all() and envs.data[0] is not before and not torch.equal(obs, info["final_obs"])


@BOTH
def test_a_script_scratches_everywhere(who):
    """It reaches every itch, up to the tip's radius, and lives off scratches; random actions never find one."""
    for x, least in [(0, 15), (0.25, 30), (0.5, 70), (0.75, 90), (1, 60)]:
        envs = Still(3, who, x)
        envs.reset()
        rng, total, closest = np.random.default_rng(0), 0, np.ones(3)
        for _ in range(200):
            reward = envs.step(scripted(envs, rng))[1]
            total = total + reward.numpy()
            closest = np.minimum(closest, np.linalg.norm(envs.itch - envs.xpos[:, envs.tip], axis=1))
        assert closest.max() < 0.0135 and least < total.mean() < 250, (x, closest, total)
        assert (envs.count > 5).all()
    envs = Still(4, who)
    envs.reset()
    total = sum(envs.step(action)[1] for action in random_actions(envs, scale=1))
    assert -130 < total.mean() < -35


# ---------- The protocol ----------


def test_lockstep():
    """Shapes, types and times of everything in a meta-episode; the same person throughout."""
    envs = make_envs("ScratchItch", 3, horizon=4, episodes_per_task=3)
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(random_actions(envs)[0])
    for _ in range(2):
        first, info = envs.reset()
        assert first.shape == (3, 24) and first.dtype == info["task"].dtype == torch.float32
        assert info["task"].shape == (3, 2) and info["context"].shape == (3, 1)
        woman = envs.woman.copy()
        for t, action in enumerate(random_actions(envs, scale=0.1)):
            obs, reward, terminated, truncated, info = envs.step(action)
            assert obs.dtype == info["final_obs"].dtype == reward.dtype == info["context"].dtype == torch.float32
            assert terminated.dtype == truncated.dtype == info["success"].dtype == info["session_end"].dtype
            assert terminated.dtype == torch.bool and not terminated.any()
            assert (truncated == ((t + 1) % 4 == 0)).all()
            # The last episode has no successor: `reset` follows.
            assert torch.equal(obs, info["final_obs"]) == (t not in (3, 7))
            assert (envs.woman == woman).all()
        with pytest.raises(RuntimeError, match="reset"):
            envs.step(action)
    envs.close()
    envs.close()


def trajectory(envs, actions):
    obs, info = envs.reset()
    out = [obs, info["task"]]
    for action in actions:
        obs, reward, _, _, info = envs.step(action[: envs.num_envs])
        out += [obs, info["final_obs"], reward, info["session_end"], info["context"]]
    return out


def test_same_seed_same_everything():
    """Whatever the number of threads and, environment by environment, of environments; and after a resume."""
    sizes = dict(horizon=6, episodes_per_task=2, sessions=2)
    make = {n: ScratchItch(n, seed=0, num_threads=threads, **sizes) for n, threads in ((5, 1), (6, 3))}
    actions = random_actions(make[6])
    first, second = (trajectory(make[6], actions) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(99), np.random.seed(99)
    make[5].reset(tasks=make[5].tasks[3:8])  # draws nothing
    assert all(torch.equal(a, b[:5]) for a, b in zip(trajectory(make[5], actions), first))
    resumed = ScratchItch(6, seed=0, **sizes)
    resumed.load_state_dict({"resets": 1})
    assert all(torch.equal(a, b) for a, b in zip(trajectory(resumed, actions), second))
    assert resumed.state_dict() == make[6].state_dict() == {"resets": 2}
    for other in (dict(seed=1), dict(seed=0, split="test")):
        assert not torch.equal(ScratchItch(6, **other, **sizes).reset()[0], first[0])


def test_first_poses():
    """Hands in the cube and pointing at the person, angles within limits, nothing touched, all different."""
    envs = ScratchItch(60)
    obs, info = envs.reset()
    assert 15 < info["task"][:, 0].sum() < 45
    low, high = ([math.radians(x) for x in bounds] for bounds in ([47, 30, 65], [313, 330, 295]))
    hands = np.array([data.body("hand").xpos for data in envs.data])
    for data in envs.data:
        assert data.ncon == 0 and (data.qvel == 0).all()
        assert (low <= data.qpos[1:7:2]).all() and (data.qpos[1:7:2] <= high).all()
        assert (abs(data.qpos[:7:2]) <= np.pi).all() and (data.ctrl == data.qpos).all()
        matrix = data.body("hand").xmat.reshape(3, 3)
        close(matrix, [[0, 0, 1], [0, 1, 0], [-1, 0, 0]], 3e-3)
    offset = hands - [-0.6, 0, 0.8]
    assert abs(offset).max() < 0.051 and (offset.std(0) > 0.015).all()
    assert len(obs.unique(dim=0)) == 60


def test_a_first_pose_touches_nothing():
    model = make_model()
    model.body("person").pos[:] = [-0.35, 0, 0.8]  # the chest is where the tool should be
    u = np.random.default_rng(0).random((20, 3 + 7 * 16))
    with pytest.raises(RuntimeError, match="no first pose of the robot in 320 tries"):
        first_pose(model, mujoco.MjData(model), u)


def test_evaluation_tasks():
    """32 of each split, the same with every seed: person, first pose, sessions."""
    envs, other = ScratchItch(4, "test", seed=1), ScratchItch(4, "test", seed=2)
    assert envs.tasks == [f"ScratchItch/{i}" for i in range(32)] and envs.task_table.shape == (32, 1)
    assert 8 < envs.task_table.sum() < 24
    names = [envs.tasks[i] for i in (7, 0, 31, 9)]
    obs, info = envs.reset(tasks=names)
    ends = envs.ends.clone()
    their_obs, their_info = other.reset(tasks=names)
    assert torch.equal(obs, their_obs) and torch.equal(info["task"], their_info["task"])
    assert torch.equal(ends, other.ends) and not torch.equal(obs[0], obs[1])
    assert not torch.equal(ScratchItch(4, "train").reset(tasks=names)[0], obs)
    again, _ = envs.reset(tasks=names[::-1])
    assert torch.equal(again, obs.flip(0))
    twice, _ = envs.reset(tasks=names[:1] * 2 + names[1:3])  # a name's second time has draws of its own
    assert torch.equal(twice[0], obs[0]) and not torch.equal(twice[1], obs[0]) and torch.equal(twice[2:], obs[1:3])


# ---------- Pictures ----------


def test_a_film_is_what_happened(renderer, tmp_path):  # noqa: F811
    envs = ScratchItch(3, "test", horizon=7, episodes_per_task=2, sessions=3, amplitude=0.5)
    envs.reset(tasks=envs.tasks[:3])
    actions = random_actions(envs, scale=1)
    rewards = torch.stack([envs.step(action)[1] for action in actions]).numpy()
    path = tmp_path / "film.gif"
    assert np.array_equal(envs.film(envs.tasks[2], 2, actions[:, 2].numpy(), path), rewards[:, 2])
    film = Image.open(path)
    assert film.n_frames == 2 * len([1, 6, 7])
    first = np.array(film.convert("RGB")).astype(int)
    green = (first[..., 1] > 1.5 * first[..., 0]) & (first[..., 1] > 1.5 * first[..., 2])
    assert 10 < green.sum() < 1000, "the ball where it itches"
    film.seek(1)
    assert (abs(np.array(film.convert("RGB")).astype(int) - first)[30:].max(2) > 50).sum() > 20
