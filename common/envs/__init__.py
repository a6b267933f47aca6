"""The environments. `make_envs` is the one door to every family:

    from common.envs import make_envs

    envs = make_envs("ML10", num_envs=20, split="train", seed=1, device="cpu")
    obs, info = envs.reset()                                          # every environment draws a new task
    for _ in range(envs.meta_horizon):                                # K episodes of H steps, all in lockstep
        obs, reward, terminated, truncated, info = envs.step(action)

protocol.py says what these return, and what else environments may have. It comes first in the order of imports: then
check.py, the back ends (protocol.TensorEnvs, on the device; mujoco_batch.py; workers.py, processes), the families,
`make_envs`. Beside them stand sessions.py, for families whose tasks change within an episode, extra.py, for more to
observe, and film.py, which draws MuJoCo's.

Your own environments: `--env-id package.module:factory` calls `factory(num_envs, split, seed, device)`, with `horizon`
and `episodes_per_task` where the user sets them and it takes them. `seed` is the one that the run began with, whatever
--seed is given beside --resume or --evaluate: tasks may depend on it. The factory returns an object with `num_envs`,
`device`, `single_observation_space`, `single_action_space`, `horizon`, `episodes_per_task`, `meta_horizon`, `split`,
`tasks`, `reset`, `step`, `state_dict`, `load_state_dict`, `close`. The shortest ways to one are

    Gymnasium's environments     workers.WorkerVectorEnv; the docstring of workers.py has a factory
    tensors on the device        a subclass of protocol.TensorEnvs, like pointrobot.py
    a MuJoCo model               a subclass of mujoco_batch.MujocoEnvs, like locomotion.py

A grid has `num_cells`, `cell(obs)` and `task_table` (the observation at each task's goal) too, and for ldm.py `cells`
(num_cells, S), an observation in each. A factory with the split test2 beside train and test names all: `splits`.

Observations are a Box of one dimension; actions such a Box, of floats, bounded or not, or Discrete and counted from 0.
What a factory returns is looked at before a run begins, and plays one step in a task set by name, which draws nothing
(check.py): what does not fit ends in a sentence, and so does whatever the factory raises.
"""

import contextlib
import difflib
import importlib
import inspect
import os
import sys
import traceback
from functools import partial

from common.envs.check import check_envs, check_splits
from common.envs.protocol import SPLITS, BadInput, TensorEnvs, WorkerError, generator

__all__ = ["FAMILIES", "SPLITS", "BadInput", "TensorEnvs", "WorkerError", "generator", "make_envs"]

FAMILIES = {  # env_id -> "module:factory"; Meta-World's ids (ML1-<family>, ML10, ML45) are in metaworld.py
    "GridWorld": "common.envs.gridworld:GridWorld",
    "GridWorldLDM": "common.envs.gridworld:GridWorldLDM",
    "GridWorldExtrapolation": "common.envs.gridworld:GridWorldExtrapolation",
    "GridWorldAlternating": "common.envs.gridworld:GridWorldAlternating",
    "SparsePointRobot": "common.envs.pointrobot:SparsePointRobot",
    "MEWA": "common.envs.mewa:MEWA",
    "MEWAUniform": "common.envs.mewa:MEWAUniform",
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
    control_cost="",
    extra_obs="none",
    sessions=None,
    session_process=None,
    benchmark_seed=None,
    **sizes,
):
    """The vector environment `env_id`.

    env_id: a key of FAMILIES, ML1-<family>, ML10, ML45, or `package.module:factory` of the user's own.
    reward_version: of Meta-World; v2 or v1. split_rule: of the tasks in locomotion.py; varibad or ldm.
    control_cost: of mujoco_batch.py; raw, clipped, or "" for the family's own. extra_obs: see extra.py.
    sessions, session_process: of environments with sessions; None, 0 and "" are the family's own.
    benchmark_seed: what the sets of tasks depend on in Meta-World and, maybe, in a user's own; None: the seed. All that
        are compared, and the splits of a run, need the same one.
    sizes: `horizon` and `episodes_per_task`, where the family's own are not wanted (None counts as unset).
    Raises BadInput for an unknown id (with the known ones and the nearest), split, split rule or size, for sessions
    where there are none, and for a user's own that does not keep the protocol (check.py).
    """
    benchmark_seed = seed if benchmark_seed is None else benchmark_seed
    options = {name: size for name, size in sizes.items() if size is not None}
    for name, size in {"num_envs": num_envs, **options}.items():
        if size < 1:
            raise BadInput(f"{name} must be at least 1, not {size}")
    own = ":" in env_id
    factory = _factory(env_id, reward_version=reward_version, benchmark_seed=benchmark_seed)
    with _blaming(env_id):
        splits, parameters = getattr(factory, "splits", SPLITS), inspect.signature(factory).parameters
        check_splits(splits)
    splits = [*splits, "all"] if getattr(factory, "joins", False) else [*splits]
    if split not in splits:
        asked = "--oracle, the split of all tasks" if split == "all" else f"unknown split {split!r}"
        raise BadInput(f"{asked}: {env_id} has {' and '.join(splits)}")
    if own and not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        options = {name: size for name, size in options.items() if name in parameters}
    if "split_rule" in parameters:
        options["split_rule"] = split_rule
    its = dict(sessions=(sessions, "sessions"), session_process=(session_process, "sessions"))
    for name, (value, what) in (its | dict(control_cost=(control_cost, "choice of it"))).items():
        if value and name not in parameters:
            raise BadInput(f"{name} {value}: {env_id} has no {what}")
        if value:
            options[name] = value
    if own:
        envs = _own(env_id, factory, num_envs, split, benchmark_seed, device, options)
    else:
        envs = factory(num_envs, split, seed, device, **options)
    if extra_obs == "none":
        return envs
    from common.envs.extra import ExtraObs  # it needs torch, and worker processes do not

    return ExtraObs(envs, extra_obs)


def _factory(env_id, **rules):
    """What makes env_id's environments; rules: of Meta-World."""
    if env_id in FAMILIES or ":" in env_id:
        return _load(FAMILIES.get(env_id, env_id))
    if env_id.startswith("ML"):
        from common.envs.metaworld import make_metaworld  # half a second to import: only who needs it pays

        return partial(make_metaworld, env_id, **rules)
    known = [*FAMILIES, "ML1-<family>", "ML10", "ML45"]
    nearest = difflib.get_close_matches(env_id, known, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise BadInput(f"unknown env_id {env_id!r}: known are {', '.join(known)}, or package.module:factory{hint}")


def _load(path):
    """The factory at `package.module:factory`; the user's working directory counts as a place to look."""
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with _blaming(path):
        module = importlib.import_module(module_name)
    if not callable(getattr(module, name, None)):
        raise BadInput(f"env_id {path!r}: module {module_name} has no callable {name!r}")
    return getattr(module, name)


def _own(env_id, factory, num_envs, split, seed, device, options):
    """A user's own environments, checked."""
    from common.envs.workers import WorkerVectorEnv

    try:
        inspect.signature(factory).bind(num_envs, split, seed, device, **options)
    except TypeError as error:
        raise BadInput(f"env_id {env_id!r} is called with (num_envs, split, seed, device): {error}") from None
    with _blaming(env_id):
        envs = factory(num_envs, split, seed, device, **options)
        try:
            check_envs(envs, num_envs, split, device, play=not isinstance(envs, WorkerVectorEnv))
        except BaseException:
            with contextlib.suppress(Exception):
                envs.close()
            raise
    return envs


@contextlib.contextmanager
def _blaming(env_id):
    """Whatever a user's module or factory raises ends in a sentence."""
    try:
        yield
    except WorkerError:
        raise
    except BadInput as error:
        raise BadInput(f"env_id {env_id!r}: {error}") from error
    except (Exception, SystemExit) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        places = [place for place in traceback.extract_tb(error.__traceback__) if "importlib" not in place.filename]
        if places[-1].filename != __file__ and not isinstance(error, SyntaxError):  # which says itself where it is
            text += f" ({places[-1].filename}, line {places[-1].lineno})"
        raise BadInput(f"env_id {env_id!r}: {text}") from error
