"""Films of Meta-World: what is drawn is what happened in the workers."""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import varibad
from common.envs import BadInput
from common.envs.film import drawing_context
from common.envs.metaworld import MetaWorldEnvs, benchmark_tasks, make_sawyer
from tests.test_belief import signals  # noqa: F401
from tests.test_scripts import main, run

HORIZON, EPISODES = 12, 3
FAMILIES = ["lever-pull-v3", "door-close-v3"]


@pytest.fixture
def renderer():
    try:
        drawing_context()
    except BadInput as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("fast", [True, False])
def test_a_film_is_the_workers_meta_episode(renderer, tmp_path, fast):
    """Bitwise the rewards of two families, in environments that had other tasks before; then, what the file holds."""
    tasks = [task for family in FAMILIES for task in benchmark_tasks("ML1", family, 4)[1]["test"][:2]]
    families = {family: partial(make_sawyer, family, "v2", fast) for family in FAMILIES}
    envs = MetaWorldEnvs(families, tasks, 2, horizon=HORIZON, episodes_per_task=EPISODES, num_workers=1)
    names = [envs.tasks[3], envs.tasks[0]]  # of both families
    envs.reset(tasks=[envs.tasks[1], envs.tasks[2]])
    envs.step(torch.ones(2, 4))
    envs.reset(tasks=names)
    # Mostly in one direction, which differs between episodes; now and then out of bounds.
    actions = torch.rand(EPISODES, HORIZON, 2, 4, generator=torch.Generator().manual_seed(0))
    actions = (2 * actions + torch.tensor([-1.7, 0.0, -0.3]).view(3, 1, 1, 1)).flatten(0, 1)
    rewards = torch.stack([envs.step(action)[1] for action in actions]).numpy()
    for row, name in enumerate(names):
        path = tmp_path / f"{row}.gif"
        replayed = envs.film(name, row, actions[:, row].numpy(), path)
        assert replayed.dtype == np.float32
        assert np.array_equal(replayed, rewards[:, row])
        pictures = [np.array(picture.convert("RGB")) for picture in ImageSequence.Iterator(Image.open(path))]
        assert len(pictures) == EPISODES * len([1, 6, 11, 12])  # the steps of an episode that are drawn
        assert all(picture.shape == (240, 320, 3) and picture.std() > 20 for picture in pictures)
        scenes = [picture[30:].astype(int) for picture in pictures]  # without the captions
        assert all((abs(a - b).max(2) > 50).sum() > 20 for a, b in zip(scenes, scenes[1:])), "the robot stands still"
    envs.close()


def test_capture_video(renderer, tmp_path, capsys):
    """--evaluate --capture-video of a script: a film of the held-out family, of the episodes that were evaluated."""
    words = "--env-id ML1-reach --belief-warmup 0 --belief-updates 1 --tbptt 0 --eval-tasks 2"
    run(varibad, tmp_path, *words.split())
    main(varibad, "--evaluate", tmp_path / "checkpoint.pt", "--capture-video")
    film = Image.open(tmp_path / "video_reach-v3.gif")
    assert film.n_frames == 2 * len([1, 5]) and "not those" not in capsys.readouterr().out
    with pytest.raises(BadInput, match="GridWorld has no camera"):
        run(varibad, tmp_path / "grid", "--total-timesteps", 1)
        main(varibad, "--evaluate", tmp_path / "grid" / "checkpoint.pt", "--capture-video")


FILM = """
from common.envs import BadInput, make_envs
try:
    envs = make_envs("ML1-reach", 1, "test", horizon=2, episodes_per_task=1)
    assert envs.reset(tasks=envs.tasks[:1])[0].shape == (1, 39)  # without a renderer, everything else works
    envs.film(envs.tasks[0], 0, [[0, 0, 0, 0]] * 2, "never.gif")
except BadInput as error:
    print(error)
"""


@pytest.mark.parametrize(
    "mujoco_gl, says",
    [
        ("disable", "MuJoCo cannot draw here with MUJOCO_GL=disable: install libegl1 or libosmesa6"),
        ("bogus", "MuJoCo does not start with MUJOCO_GL=bogus: invalid value"),
    ],
)
def test_one_sentence_where_nothing_draws(mujoco_gl, says, tmp_path):
    environment = {**os.environ, "MUJOCO_GL": mujoco_gl, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", FILM], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith(says) and done.stdout.count("\n") == 1, done.stdout + done.stderr
    assert done.returncode == 0 and not list(tmp_path.iterdir())
