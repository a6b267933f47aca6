"""--extra-obs: against the environments without it, and what a run makes of it."""

import numpy as np
import pytest
import torch

import ldm
import varibad
from common.envs import BadInput, make_envs
from tests.test_scripts import main, resume_equals_straight, run

ENVS = pytest.mark.parametrize("env_id", ["GridWorld", "SparsePointRobot", "HopperMass", "Reacher"])
EXTRA = pytest.mark.parametrize("extra", ["done", "time"])


def actions_of(envs):
    generator = torch.Generator().manual_seed(0)
    for _ in range(envs.meta_horizon):
        if hasattr(envs.single_action_space, "n"):
            yield torch.randint(envs.single_action_space.n, (envs.num_envs,), generator=generator)
        else:
            yield torch.randn(envs.num_envs, *envs.single_action_space.shape, generator=generator)


@ENVS
@EXTRA
def test_everything_else_stays(env_id, extra, monkeypatch):
    """Step by step, over two meta-episodes: one number more, all else as it is without; ends, early ones too, and times
    counted by hand."""
    sizes = dict(horizon=5, episodes_per_task=1 if env_id == "Reacher" else 3)
    plain, envs = (make_envs(env_id, 3, seed=2, extra_obs=kind, **sizes) for kind in ("none", extra))
    if env_id == "HopperMass":  # the second falls in its third step
        monkeypatch.setattr(type(plain), "healthy", lambda e, q, v: (np.arange(len(q)) != 1) | (e.elapsed % 5 != 3))
    S = plain.single_observation_space.shape[0]
    assert envs.single_observation_space.shape == (S + 1,) and envs.tasks == plain.tasks
    assert envs.single_observation_space.low[-1] == 0 and envs.single_observation_space.high[-1] == 1
    for _ in range(2):
        theirs, ours = plain.reset()[0], envs.reset()[0]
        assert torch.equal(ours[:, :S], theirs) and not ours[:, S].any()
        for t, action in enumerate(actions_of(plain)):
            (theirs, *others, info), (ours, *same, mine) = plain.step(action), envs.step(action)
            assert all(map(torch.equal, others, same)) and info.keys() == mine.keys()
            assert torch.equal(ours[:, :S], theirs) and torch.equal(mine["final_obs"][:, :S], info["final_obs"])
            last = (t + 1) % 5 == 0
            fell = [float(env_id == "HopperMass" and t % 5 == 2 and n == 1) for n in range(3)]
            if extra == "done":
                expected = (torch.ones(3) if last else torch.tensor(fell),) * 2
            else:
                expected = torch.full((3,), (t % 5 + 1) / 5), torch.full((3,), 0.0 if last else (t % 5 + 1) / 5)
            torch.testing.assert_close((mine["final_obs"][:, S], ours[:, S]), expected)


@EXTRA
def test_what_is_set_reaches_the_environments(extra):
    """repeat and phase, which laser.py sets: neighbours share tasks, and a phase has mistakes of its own."""
    plain, envs = (make_envs("MEWA", 6, extra_obs=kind) for kind in ("none", extra))
    for one in (plain, envs):
        one.repeat, one.phase = 3, 2
    tasks = [one.reset()[1]["task"] for one in (plain, envs)]
    assert torch.equal(*tasks) and len(tasks[0].unique(dim=0)) == 2
    for action in actions_of(plain):
        theirs, ours = plain.step(action), envs.step(action)
        assert torch.equal(theirs[0], ours[0][:, :-1])
    assert plain.integer_obs and envs.integer_obs == (extra == "done")  # else laser.py would store a time as 0


def test_runs(tmp_path):
    """A whole run on a grid, whose decoder knows the cells, and its pictures."""
    end = run(varibad, tmp_path, "--extra-obs", "done", eval_interval=0)
    rows = end["processes"][0]["buffer"]["store"]["next_obs"]  # (meta-episodes, T, S)
    assert rows.shape[2] == 3 and rows[:, 4::5, 2].eq(1).all() and rows[..., 2].sum() == 2 * len(rows)
    assert list(tmp_path.glob("belief_*.png"))


def test_no_run_on_a_grid_of_ldm(tmp_path):
    """Its decoder is asked for each cell, and an extra observation would be none of a cell's."""
    with pytest.raises(BadInput, match="--extra-obs time"):
        run(ldm, tmp_path, "--extra-obs", "time")


@pytest.mark.parametrize("other", ["time", "none"])
def test_evaluate_what_was_learnt(other, tmp_path):
    """No policy is evaluated on observations that it did not learn to read."""
    run(varibad, tmp_path, "--extra-obs", "done")
    with pytest.raises(BadInput, match=f"--extra-obs {other}: .*checkpoint.pt was saved with done"):
        main(varibad, "--evaluate", tmp_path / "checkpoint.pt", "--extra-obs", other)


def test_resume(tmp_path):
    """Bit for bit; observations are shifted, the flag beside them is not."""
    resume_equals_straight(varibad, tmp_path, "--env-id", "SparsePointRobot", "--extra-obs", "done", "--obs-shift", "1")
    end = torch.load(tmp_path / "straight" / "checkpoint.pt")
    assert set(end["processes"][0]["buffer"]["store"]["next_obs"][..., 2].unique().tolist()) == {0, 1}


def test_your_own(tmp_path):
    """Environments in worker processes, of a user's factory."""
    end = run(varibad, tmp_path, "--env-id", "tests.user_envs:good", "--extra-obs", "time")
    rows = end["processes"][0]["buffer"]["store"]["next_obs"]
    assert rows[:, -1, -1].eq(1).all() and (rows[..., -1] > 0).all()


def test_unknown():
    with pytest.raises(BadInput, match="extra observation 'Done'"):
        make_envs("GridWorld", 1, extra_obs="Done")
