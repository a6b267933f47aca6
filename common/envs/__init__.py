"""The environments. `make_envs` is the one door to every family:

    from common.envs import make_envs

    envs = make_envs("ML10", num_envs=20, split="train", seed=1, device="cpu")
    obs, info = envs.reset()                                          # every environment draws a new task
    for _ in range(envs.meta_horizon):                                # K episodes of H steps, all in lockstep
        obs, reward, terminated, truncated, info = envs.step(action)

protocol.py says what these return, and what else environments may have. It comes first in the order of imports: then
the back ends (protocol.TensorEnvs, on the device; mujoco_batch.py; workers.py, processes), the families, `make_envs`.
Beside them stand sessions.py, for families whose tasks change within an episode, and film.py, which draws MuJoCo's.

Your own environments: `--env-id package.module:factory` calls `factory(num_envs, split, seed, device)`, with `horizon`
and `episodes_per_task` where the user sets them and it takes them. It returns an object with `num_envs`, `device`,
`single_observation_space`, `single_action_space`, `horizon`, `episodes_per_task`, `meta_horizon`, `split`, `tasks`,
`reset`, `step`, `state_dict`, `load_state_dict`, `close`. The shortest ways to one are

    Gymnasium's environments     workers.WorkerVectorEnv; the docstring of workers.py has a factory
    tensors on the device        a subclass of protocol.TensorEnvs, like pointrobot.py
    a MuJoCo model               a subclass of mujoco_batch.MujocoEnvs, like locomotion.py

A grid has `num_cells`, `cell(obs)` and `task_table` (the observation at each task's goal) too, and for ldm.py `cells`
(num_cells, S), an observation in each. A factory with more splits than train and test names them: `splits`.
"""

import difflib
import importlib
import inspect
import os
import sys
from functools import partial

from common.envs.protocol import SPLITS, BadInput, TensorEnvs, WorkerError, generator

__all__ = ["FAMILIES", "SPLITS", "BadInput", "TensorEnvs", "WorkerError", "generator", "make_envs"]

FAMILIES = {  # env_id -> "module:factory"; Meta-World's ids (ML1-<family>, ML10, ML45) are in metaworld.py
    "GridWorld": "common.envs.gridworld:GridWorld",
    "GridWorldLDM": "common.envs.gridworld:GridWorldLDM",
    "GridWorldExtrapolation": "common.envs.gridworld:GridWorldExtrapolation",
    "GridWorldAlternating": "common.envs.gridworld:GridWorldAlternating",
    "SparsePointRobot": "common.envs.pointrobot:SparsePointRobot",
    "MEWA": "common.envs.mewa:MEWA",
    "HalfCheetahVel": "common.envs.locomotion:HalfCheetahVel",
    "HalfCheetahDir": "common.envs.locomotion:HalfCheetahDir",
    "AntDir": "common.envs.locomotion:AntDir",
    "AntGoal": "common.envs.locomotion:AntGoal",
    "HopperMass": "common.envs.hopper:HopperMass",
    "Reacher": "common.envs.locomotion_sessions:Reacher",
    "HalfCheetahDirSessions": "common.envs.locomotion_sessions:HalfCheetahDirSessions",
    "HalfCheetahVelSessions": "common.envs.locomotion_sessions:HalfCheetahVelSessions",
    "HalfCheetahWindVelSessions": "common.envs.locomotion_sessions:HalfCheetahWindVelSessions",
    "ScratchItch": "common.envs.scratchitch:ScratchItch",
}


def make_envs(
    env_id,
    num_envs,
    split="train",
    seed=1,
    device="cpu",
    reward_version="v2",
    split_rule="varibad",
    sessions=None,
    session_process=None,
    **sizes,
):
    """The vector environment `env_id`.

    env_id: a key of FAMILIES, ML1-<family>, ML10, ML45, or `package.module:factory` of the user's own.
    reward_version: of Meta-World; v2 or v1. split_rule: of the tasks in locomotion.py; varibad or ldm.
    sessions, session_process: of environments with sessions; None, 0 and "" are the family's own.
    sizes: `horizon` and `episodes_per_task`, where the family's own are not wanted (None counts as unset).
    Raises BadInput for an unknown id (with the known ones and the nearest), split, split rule or size, and for sessions
    where there are none.
    """
    options = {name: size for name, size in sizes.items() if size is not None}
    for name, size in {"num_envs": num_envs, **options}.items():
        if size < 1:
            raise BadInput(f"{name} must be at least 1, not {size}")
    if env_id in FAMILIES:
        factory = _load(FAMILIES[env_id])
    elif ":" in env_id:
        factory = _load(env_id)
        options = {name: size for name, size in options.items() if name in inspect.signature(factory).parameters}
    elif env_id.startswith("ML"):
        from common.envs.metaworld import make_metaworld  # half a second to import: only who needs it pays

        factory = partial(make_metaworld, env_id, reward_version=reward_version)
    else:
        known = [*FAMILIES, "ML1-<family>", "ML10", "ML45"]
        nearest = difflib.get_close_matches(env_id, known, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise BadInput(f"unknown env_id {env_id!r}: known are {', '.join(known)}, or package.module:factory{hint}")
    splits = list(getattr(factory, "splits", SPLITS))
    if getattr(factory, "joins", False):
        splits.append("all")
    if split not in splits:
        asked = " of --oracle" if split == "all" else ""
        raise BadInput(f"unknown split {split!r}{asked}: {env_id} has {' and '.join(splits)}")
    parameters = inspect.signature(factory).parameters
    if "split_rule" in parameters:
        options["split_rule"] = split_rule
    for name, value in dict(sessions=sessions, session_process=session_process).items():
        if value and name not in parameters:
            raise BadInput(f"{name} {value}: {env_id} has no sessions")
        if value:
            options[name] = value
    return factory(num_envs, split, seed, device, **options)


def _load(path):
    """The factory at `package.module:factory`; the user's working directory counts as a place to look."""
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (ModuleNotFoundError, ValueError, TypeError) as error:
        raise BadInput(f"env_id {path!r}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise BadInput(f"env_id {path!r}: module {module_name} has no callable {name!r}")
    return getattr(module, name)
