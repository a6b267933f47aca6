"""Floors where contexts follow from a session's number: python -m tests.floors [env] [--sessions K]

On DynaMITE-RL's Reacher, HalfCheetahVelSessions and HalfCheetahWindVelSessions nobody has to adapt for a good return.
Best returns on the evaluation tasks, of who is always at once where it wants to be and pays nothing for actions:

    one place      the same velocity, or place of the fingertip, at all steps
    by the time    that of the step, as who reads the time alone; trained: --no-belief --extra-obs time

Both are chosen on tasks of the training. To compare with a policy, add what it pays for its actions.
"""

import argparse

import torch

from common.envs import make_envs


def best_place(points):
    """points (P, ..., C): the place (..., C) of the least sum of distances to them, by Weiszfeld's iteration."""
    place = points.mean(0)
    for _ in range(300):
        weight = 1 / (points - place).norm(dim=-1, keepdim=True).clamp(min=1e-4)
        place = (points * weight).sum(0) / weight.sum(0)
    return place


def contexts(env_id, split, sizes, num_envs, tasks):
    """Goals (T, N, C), without the wind, of the named tasks or of drawn ones."""
    envs = make_envs(env_id, num_envs, split, **sizes)
    envs.reset(envs.tasks if tasks else None)
    goals = envs.contexts[..., : 2 if env_id == "Reacher" else 1].clone()
    envs.close()
    return goals


def floors(env_id, sessions=0):
    """The two returns by name, in the mean over the evaluation tasks."""
    sizes = dict(sessions=sessions)
    drawn, held_out = contexts(env_id, "train", sizes, 300, False), contexts(env_id, "test", sizes, 25, True)
    places = {"one place": best_place(drawn.flatten(0, 1)), "by the time": best_place(drawn.transpose(0, 1))[:, None]}
    return {name: -(held_out - place).norm(dim=-1).sum(0).mean().item() for name, place in places.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = ["Reacher", "HalfCheetahVelSessions", "HalfCheetahWindVelSessions"]
    parser.add_argument("env", nargs="?", default=known[1], choices=known)
    parser.add_argument("--sessions", type=int, default=0)
    words = parser.parse_args()
    torch.set_num_threads(1)
    for name, value in floors(words.env, words.sessions).items():
        print(f"{name:<12} {value:8.1f}")
