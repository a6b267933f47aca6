"""What a rollout records, and what is reported of it."""

import time

import numpy as np
import torch


def records(envs):
    """Tensors, time-major, for what every rollout of T = K * H steps in N environments records, by name:

    obs, next_obs (T, N, S), the state before and after a step; actions, int64 (T, N) or float32 (T, N, A); rewards and
    raw_rewards, in which returns are reported, terminated, and alive (T, N), False while an environment idles after an
    early end of its episode: nothing counts such steps. Made outside of inference mode, so that updates may use them.
    And env_seconds, the time spent in `envs.step`. `record_step` adds success (T, N), where the environment tells it.
    """
    T, N, S = envs.meta_horizon, envs.num_envs, envs.single_observation_space.shape[0]
    space, device = envs.single_action_space, envs.device
    A, kind = ((), torch.int64) if hasattr(space, "n") else (space.shape, torch.float32)
    return dict(
        obs=torch.empty(T, N, S, device=device),
        next_obs=torch.empty(T, N, S, device=device),
        actions=torch.empty(T, N, *A, device=device, dtype=kind),
        rewards=torch.empty(T, N, device=device),
        raw_rewards=torch.empty(T, N, device=device),
        terminated=torch.zeros(T, N, device=device, dtype=torch.bool),
        alive=torch.ones(T, N, device=device, dtype=torch.bool),
        env_seconds=0.0,
    )


def obs_shift(args, agent, obs):
    """--obs-shift, of each environment's meta-episode in training: what is added to all of its observations (N, S)."""
    if not args.obs_shift or not agent.training or args.oracle_context:  # the oracle knows where the goal stands
        return torch.zeros_like(obs)
    spread = agent.first_norm.var.sqrt() * (agent.first_norm.count > 0)
    return args.obs_shift * spread * torch.randn_like(obs)


def record_step(envs, data, t, obs, action, shift=0.0):
    """Step t of a rollout: an action in every environment, recorded in `data`. Returns the obs to act on next, which
    after an episode's end is the next one's first, and the environments' info."""
    begin = time.perf_counter()
    following, reward, terminated, _, info = envs.step(action)
    data["env_seconds"] += time.perf_counter() - begin
    data["obs"][t], data["next_obs"][t], data["actions"][t] = obs, info["final_obs"] + shift, action
    data["rewards"][t], data["raw_rewards"][t] = reward, info.get("raw_reward", reward)
    data["terminated"][t] = terminated
    if "alive" in info:
        data["alive"][t] = info["alive"]
    if "success" in info:
        if "success" not in data:
            data["success"] = torch.zeros_like(data["terminated"])
        data["success"][t] = info["success"]
    return following + shift, info


def outcomes(data, envs):
    """What each episode of a rollout returned, in raw rewards, and whether it succeeded, at any step, where the
    environment says so: (K, N) each."""
    shape = envs.episodes_per_task, envs.horizon, -1
    found = dict(episode_return=data["raw_rewards"].view(shape).sum(1))
    if "success" in data:
        found["episode_success"] = data["success"].view(shape).any(1)
    return found


def measured(tasks):
    """What each of an evaluation's tasks has, and what the scalars of it are called: pairs of names."""
    names = ("return", "return"), ("success", "success_rate")
    return [(key, word) for key, word in names if all(key in task for task in tasks.values())]


def by_episode(tasks):
    """Scalars by name out of {task: {"return", "success"}}, K numbers each: means over tasks, of each episode, of the
    last one, and of that by family where there are several. Without "success" there are those of returns alone."""
    scalars = {}
    for key, word in measured(tasks):
        rows = np.array([task[key] for task in tasks.values()])  # (tasks, K)
        for k in range(rows.shape[1]):
            scalars[f"{word}_episode_{k + 1}"] = float(rows[:, k].mean())
        scalars[word] = float(rows[:, -1].mean())  # of the last episode
        if key == "success":
            scalars[f"{word}_any_episode"] = float(rows.max(1).mean())
        families = np.array([name.split("/")[0] for name in tasks])
        if len(set(families)) > 1:
            for family in dict.fromkeys(families):
                scalars[f"{word}/{family}"] = float(rows[families == family, -1].mean())
    return scalars


def first_tasks(envs, count):
    """Evaluation tasks: the first `count` of each family, 0 = all."""
    by_family = {}
    for name in envs.tasks:
        by_family.setdefault(name.split("/")[0], []).append(name)
    return [name for named in by_family.values() for name in named[: count or None]]


def play_tasks(play, envs, names, deterministic):
    """Evaluation tasks, round by round: {name: {"return", "success", and the details}}. play: as for Run.evaluate.

    Raises FloatingPointError where one of these is not finite.
    """
    tasks = {}
    for first in range(0, len(names), envs.num_envs):
        chunk = names[first : first + envs.num_envs]
        padded = chunk + [chunk[-1]] * (envs.num_envs - len(chunk))
        data = play(envs, padded, deterministic)
        rows = {key: data[f"episode_{key}"].float().T for key in ("return", "success") if f"episode_{key}" in data}
        rows |= data.get("details", {})
        for name, x in rows.items():
            if not x.isfinite().all():
                task = padded[int((~x.flatten(1).isfinite()).any(1).nonzero()[0])]
                what = f"evaluation of task {task}, {envs.split} split: its {name.replace('_', ' ')}"
                raise FloatingPointError(f"{what} is not finite")
        rows = {name: x.tolist() for name, x in rows.items()}
        tasks |= {name: {key: x[i] for key, x in rows.items()} for i, name in enumerate(chunk)}
    return tasks


def film_tasks(envs, play, folder):
    """Films the first task of each family, most likely actions, into folder: video_<family>.gif.

    play: as for Run.evaluate; where its rollout has `envs` of its own, several a task, those are filmed (laser.py).
    Raises BadInput on machines where nothing can draw.
    """
    first = {name.split("/")[0]: name for name in reversed(envs.tasks)}
    chosen = [first[family] for family in dict.fromkeys(name.split("/")[0] for name in envs.tasks)]
    for start in range(0, len(chosen), envs.num_envs):
        chunk = chosen[start : start + envs.num_envs]
        data = play(envs, chunk + [chunk[-1]] * (envs.num_envs - len(chunk)), True)
        played = data.get("envs", envs)
        for i, name in enumerate(chunk):
            row = i * played.num_envs // envs.num_envs
            file = folder / f"video_{name.split('/')[0]}.gif"
            replayed = played.film(name, row, data["actions"][:, row].cpu().numpy(), file)
            same = np.array_equal(replayed, data["rewards"][:, row].cpu().numpy())
            print(file, "" if same else "(its rewards are not those of the evaluation)")
