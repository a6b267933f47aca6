"""What is checked of your own environments, once, before a run begins: BadInput says in a sentence what does not fit.

check_envs looks at what a factory returned, and plays one step of it. Of Gymnasium's environments in worker processes
(workers.py) the workers make one of each family beforehand, play one step and close it again: check_env.
"""

import inspect
import io
from collections import Counter

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

from common.envs.protocol import ALL_SPLITS, SPLITS, BadInput

SIZES = ("num_envs", "horizon", "episodes_per_task", "meta_horizon")
NEEDED = (
    *SIZES, "device", "single_observation_space", "single_action_space", "split", "tasks", "reset", "step",
    "state_dict", "load_state_dict", "close",
)  # fmt: skip


def short(x):
    """Anything in a line, and not a long one."""
    text = " ".join(repr(x).split())
    return text if len(text) < 80 else text[:77] + "..."


def check_splits(splits):
    """BadInput unless they are train, test and perhaps test2."""
    if not isinstance(splits, (list, tuple)) or not {*SPLITS} <= {*splits} <= {*ALL_SPLITS} - {"all"}:
        raise BadInput(f"splits are {short(splits)}: there must be train and test, and may be test2")


def check_spaces(observation_space, action_space):
    """BadInput unless observations are vectors of numbers; actions such vectors, of floats, or one of n choices."""
    for name, space in (("observation_space", observation_space), ("action_space", action_space)):
        actions = name == "action_space"
        if actions and isinstance(space, Discrete):
            continue
        if not isinstance(space, Box) or len(space.shape) != 1 or (actions and space.dtype.kind != "f"):
            needed = (
                "a Discrete, or a Box of floats in one dimension"
                if actions
                else "a Box of one dimension, which gymnasium.wrappers.FlattenObservation makes of others"
            )
            raise BadInput(f"{name} is {short(space)}, and must be {needed}")
        if not space.shape[0]:
            raise BadInput(f"{name} is {short(space)}, without any number in it")
        if not (space.low <= space.high).all() or (space.low == np.inf).any() or (space.high == -np.inf).any():
            raise BadInput(f"{name} is {short(space)}: no number lies between its bounds")


def as_float32(space):
    """A Box of actions as a policy has it, whose numbers are float32."""
    return Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)


def check_names(names, split):
    """BadInput unless they are the names of one task or more, each of them once."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise BadInput(f"tasks is {short(names)}, and must be a list of names")
    if not names:
        raise BadInput(f"the split {split} has no tasks")
    for name, count in Counter(names).items():
        if count > 1:
            raise BadInput(f"two tasks of the split {split} have the name {name!r}")


# ---------- One of Gymnasium's environments ----------


def check_env(env, tasks):
    """BadInput unless it is a gymnasium.Env with tasks, as the docstring of workers.py has it. Resets it to these tasks
    and plays a step. Returns observation_space, action_space, the shape of info["task"], None where there is none, and
    whether the step told its success.
    """
    for name in ("observation_space", "action_space", "set_task", "reset", "step", "close"):
        if not hasattr(env, name):
            inner = hasattr(getattr(env, "unwrapped", None), name)
            raise BadInput(f"{short(env)} has no {name}{': its wrapper hides that of the one inside' * inner}")
    space, action_space = env.observation_space, env.action_space
    check_spaces(space, action_space)
    _check_takes(env.reset, "seed")
    truths = set()
    for task in tasks:
        env.set_task(task)
        obs, info = _several("reset", env.reset(seed=0), "observation, info")
        _check_numbers("the observation of reset", obs, space.shape)
        if info.get("task") is not None:
            _check_numbers("info['task'] of reset", info["task"])
        truths.add(None if info.get("task") is None else np.shape(info["task"]))
    if len(truths) > 1:
        raise BadInput(f"info['task'] of reset has {' and '.join(map(str, truths))} as shapes, in two tasks")
    if isinstance(action_space, Discrete):
        action = action_space.dtype.type(action_space.start)
    else:
        action = np.clip(0.5, action_space.low, action_space.high)
    returned = _several("step", env.step(action), "observation, reward, terminated, truncated, info")
    obs, reward, terminated, truncated, info = returned
    _check_numbers("the observation of step", obs, space.shape)
    _check_numbers("the reward of step", reward, ())
    success = info.get("success", False)
    for name, given in (("terminated", terminated), ("truncated", truncated), ("info['success']", success)):
        flag = _array(given)
        if flag.size != 1 or flag.item() not in (0, 1):
            raise BadInput(f"{name} of step is {short(given)}, and must be a bool")
    return space, action_space, *truths, "success" in info


def _check_takes(reset, name):
    try:
        inspect.signature(reset).bind(**{name: None})
    except TypeError as error:
        raise BadInput(f"reset is called as reset({name}=...): {error}") from None


def _several(method, returned, names):
    """What a method returned, if it is as many values as there are names, the last one a dict."""
    count = len(returned) if isinstance(returned, (tuple, list)) else None
    if count != len(names.split(", ")):
        raise BadInput(f"{method} returned {f'{count} values' if count else short(returned)}, and must return {names}")
    if not isinstance(returned[-1], dict):
        raise BadInput(f"info of {method} is {short(returned[-1])}, and must be a dict")
    return returned


def _array(x):
    try:
        return np.asarray(x)
    except ValueError:  # a list of lists of differing lengths
        return np.array(x, object)


def _check_numbers(what, x, shape=None):
    """BadInput unless x is finite numbers of that shape, None for any vector, as float32."""
    array = _array(x)
    needed = "a number" if shape == () else f"numbers of shape {shape or '(G,)'}"
    if array.dtype.kind not in "biuf" or (array.ndim != 1 if shape is None else array.shape != shape):
        shaped = f" of shape {array.shape}" if array.dtype.kind in "biuf" and array.ndim else ""
        raise BadInput(f"{what} is {short(x)}{shaped}, and must be {needed}")
    with np.errstate(over="ignore"):
        if not np.isfinite(array.astype(np.float32)).all():
            raise BadInput(f"{what} is not finite as float32: {short(x)}")


# ---------- What a factory returned ----------


def check_envs(envs, num_envs, split, device, play=True):
    """BadInput unless it keeps the protocol, with what the factory was asked for. Makes actions float32.

    play: reset it to a task, by name, which draws nothing, and make one step of it.
    """
    import torch  # here, not above: worker processes import this module, and have no use for torch

    missing = [name for name in NEEDED if not hasattr(envs, name)]
    if missing:
        gym = isinstance(envs, (gymnasium.Env, gymnasium.vector.VectorEnv))
        hint = "; workers.WorkerVectorEnv makes vector environments of Gymnasium's" if gym else ""
        lacks = "" if envs is None else f", which has no {', '.join(missing)}"
        raise BadInput(f"the factory returned {short(envs)}{lacks}{hint}")
    for name in SIZES:
        size = getattr(envs, name)
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise BadInput(f"{name} is {short(size)}, and must be an integer of at least 1")
    H, K, given = envs.horizon, envs.episodes_per_task, torch.device(device)
    kept = torch.device(envs.device)
    same_device = kept.type == given.type and len({kept.index, given.index} - {None}) < 2
    for name, value, fits in (
        ("num_envs", num_envs, envs.num_envs == num_envs),
        ("split", split, envs.split == split),
        ("device", given, same_device),
        ("meta_horizon", f"{H} * {K}", envs.meta_horizon == H * K),
    ):
        if not fits:
            raise BadInput(f"{name} is {short(getattr(envs, name))}, and must be {value}")
    check_splits(getattr(envs, "splits", SPLITS))
    check_names(envs.tasks, split)
    check_spaces(envs.single_observation_space, envs.single_action_space)
    start = getattr(envs.single_action_space, "start", 0)
    if start:
        raise BadInput(f"single_action_space is {envs.single_action_space}: actions are counted from 0, not {start}")
    state, file = envs.state_dict(), io.BytesIO()
    try:
        torch.save(state, file)
        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        state.keys()
    except Exception:  # whatever the pickler makes of it
        raise BadInput(f"state_dict returns {short(state)}, and must return a dict that torch.load reads") from None
    if isinstance(envs.single_action_space, Box) and envs.single_action_space.dtype != np.float32:
        envs.single_action_space = as_float32(envs.single_action_space)
    if play:
        with torch.no_grad():
            _play(envs, kept)
        envs.load_state_dict(state)


def _play(envs, device):
    """One step of a vector environment: BadInput for what is not a tensor of the right shape, type and device."""
    import torch

    N, S, space = envs.num_envs, envs.single_observation_space.shape[0], envs.single_action_space

    def check(what, x, shape, dtype):
        shape = (N, x.shape[-1] if isinstance(x, torch.Tensor) and x.ndim == 2 else "G") if shape is None else shape
        if not isinstance(x, torch.Tensor):
            is_now = short(x)
        elif (tuple(x.shape), x.dtype, x.device.type) != (shape, dtype, device.type):
            is_now = f"{tuple(x.shape)}, {x.dtype} on {x.device}"
        elif not x.isfinite().all():
            raise BadInput(f"{what} is not finite")
        else:
            return
        raise BadInput(f"{what} is {is_now}, and must be a tensor of shape {shape}, {dtype} on {device}")

    _check_takes(envs.reset, "tasks")
    obs, info = _several("reset", envs.reset(tasks=[envs.tasks[0]] * N), "observation, info")
    check("the observation of reset", obs, (N, S), torch.float32)
    check("info['task'] of reset", info.get("task"), None, torch.float32)
    action = torch.zeros(N, dtype=torch.int64, device=device)
    if isinstance(space, Box):
        action = torch.from_numpy(np.clip(0.5, space.low, space.high)).float().to(device).repeat(N, 1)
    returned = _several("step", envs.step(action), "observation, reward, terminated, truncated, info")
    obs, reward, terminated, truncated, info = returned
    check("the observation of step", obs, (N, S), torch.float32)
    check("info['final_obs'] of step", info.get("final_obs"), (N, S), torch.float32)
    check("the reward of step", reward, (N,), torch.float32)
    check("terminated of step", terminated, (N,), torch.bool)
    check("truncated of step", truncated, (N,), torch.bool)
    for name in ("success", "alive", "session_end", "raw_reward"):
        if name in info:
            check(f"info['{name}'] of step", info[name], (N,), torch.float32 if name == "raw_reward" else torch.bool)
