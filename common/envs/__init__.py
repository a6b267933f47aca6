"""The environments. `make_envs` is the one door to every family.

envs = make_envs("ML10", num_envs=20, split="train", seed=1, device="cpu")
obs, info = envs.reset()                                          # every environment draws a new task
obs, reward, terminated, truncated, info = envs.step(action)
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
    reward_version: of Meta-World; v2 or v1. split_rule: of locomotion.py's tasks; varibad or ldm.
    sessions, session_process: of environments with sessions; None, 0 and "" are the family's own.
    sizes: `horizon` and `episodes_per_task`, where the family's own are not wanted (None counts as unset).
    Raises BadInput for an unknown id (with the known ones and the nearest), split, split rule or size, and for sessions
    where there are none.
    """
    sizes = {name: size for name, size in sizes.items() if size is not None}
    for name, size in {"num_envs": num_envs, **sizes}.items():
        if size < 1:
            raise BadInput(f"{name} must be at least 1, not {size}")
    if env_id in FAMILIES:
        factory = _load(FAMILIES[env_id])
    elif ":" in env_id:
        factory = _load(env_id)
        sizes = {name: size for name, size in sizes.items() if name in inspect.signature(factory).parameters}
    elif env_id.startswith("ML"):
        from common.envs.metaworld import (
            make_metaworld,  # metaworld takes half a second to import: only who needs it pays
        )

        factory = partial(make_metaworld, env_id, reward_version=reward_version)
    else:
        known = [*FAMILIES, "ML1-<family>", "ML10", "ML45"]
        nearest = difflib.get_close_matches(env_id, known, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise BadInput(f"unknown env_id {env_id!r}: known are {', '.join(known)}, or package.module:factory{hint}")
    splits = (*getattr(factory, "splits", SPLITS), *["all"] * getattr(factory, "joins", False))
    if split not in splits:
        raise BadInput(f"unknown split {split!r}: {env_id} has {' and '.join(splits)}")
    parameters = inspect.signature(factory).parameters
    if "split_rule" in parameters:
        sizes["split_rule"] = split_rule
    for name, value in dict(sessions=sessions, session_process=session_process).items():
        if value and name not in parameters:
            raise BadInput(f"{name} {value}: {env_id} has no sessions")
        if value:
            sizes[name] = value
    return factory(num_envs, split, seed, device, **sizes)


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
