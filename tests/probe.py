"""What a saved belief knows: python -m tests.probe runs/<run>/checkpoint.pt, of varibad.py or dme.py

Rolls out the saved policy on the training and the held-out tasks. Then, after so many steps of a meta-episode: how much
of the task's variance a linear probe reads from the belief (R^2 on held-out tasks, fitted on training tasks; 1 is all,
0 none), and the decoder's squared error on the rewards of the next 15 steps and on all still to come, beside their
variances. The errors say what the belief is worth: R^2 may fall with them, where the code is not linear.
"""

import argparse
import dataclasses
import importlib
import sys

import torch

from common.arguments import parse_args, refuse
from common.envs import BadInput, WorkerError
from common.files import load_checkpoint, load_modules
from common.rollouts import first_tasks
from common.run import Run


def collect(script, path):
    """Rollouts by split, the model, and its arguments with all transitions decoded."""
    args, data = parse_args(script.Args, script.PRESETS, script.SMALL, ["--evaluate", path]), {}
    refuse((args.oracle_context or not args.belief, f"{path} has no belief"))
    with Run(args) as run:
        model = script.BeliefModel(args, run.envs)
        S, space = run.envs.single_observation_space.shape[0], run.envs.single_action_space
        agent = script.Agent(args, S, space, model.belief_sizes)
        load_modules(path, run.state, dict(agent=agent, model=model))
        agent.eval(), model.eval()
        run.make_eval_envs(args.num_envs)
        for split, envs in run.eval_envs.items():
            names, rounds = first_tasks(envs, args.eval_tasks), []
            for first in range(0, len(names), envs.num_envs):
                chunk = names[first : first + envs.num_envs]
                chunk += [chunk[-1]] * (envs.num_envs - len(chunk))
                rounds.append(script.rollout(envs, agent, model, args, tasks=chunk))
            kept = "obs actions next_obs rewards alive beliefs".split()
            data[split] = {name: torch.cat([r[name] for r in rounds], 1) for name in kept}
            data[split]["task"] = torch.cat([r["task"] for r in rounds])
    every = dict(decode_terms=0, state_coef=0.0) | (dict(decode_window="all") if hasattr(args, "decode_window") else {})
    return data, model, dataclasses.replace(args, **every)


@torch.no_grad()
def reward_error(script, model, args, data, first, last):
    """The decoder's loss, under the belief after `first` steps, of the rewards up to step `last`; their variance."""
    steps = {k: data[k][first:last] for k in ("obs", "actions", "next_obs", "rewards", "alive")}
    mean = data["beliefs"][first : first + 1, :, : args.latent_dim]  # the belief's first part, of m or z
    real = torch.ones(mean.shape[:2], dtype=torch.bool)
    numbers = [torch.zeros_like(real, dtype=torch.int64)] if hasattr(args, "decode_window") else []
    error = script.reconstruction(model, mean, *numbers, real, steps, args)[0].item()
    return error, steps["rewards"][steps["alive"]].var().item()


def main(path):
    torch.manual_seed(0)
    script = importlib.import_module(load_checkpoint(path, "varibad", "dme")["script"])
    data, model, args = collect(script, path)
    train, test = data.get("train", data["test"]), data["test"]
    T = len(test["rewards"])
    starts = {k + more for k in range(0, T, args.horizon) for more in (0, 15) if k + more < T}  # of episodes
    print(f"{'steps':>6} {'R^2 of task':>12} {'next 15: error':>15} {'variance':>9} {'all: error':>11} {'variance':>9}")
    for e in sorted({T // 60, T // 20, T // 10, T // 5, T // 3, T // 2, 2 * T // 3, T - 1} | starts):
        fit, held = (torch.cat([d["beliefs"][e], torch.ones(len(d["task"]), 1)], 1) for d in (train, test))
        weights = torch.linalg.solve(fit.T @ fit + 1e-2 * torch.eye(fit.shape[1]), fit.T @ train["task"])
        residual, spread = (
            x.square().sum() for x in (held @ weights - test["task"], test["task"] - test["task"].mean(0))
        )
        near, far = (reward_error(script, model, args, test, e, last) for last in (e + 15, T))
        print(f"{e:>6} {1 - residual / spread:>12.2f} {near[0]:>15.3f} {near[1]:>9.3f} {far[0]:>11.3f} {far[1]:>9.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.probe", description=__doc__)
    parser.add_argument("checkpoint")
    checkpoint = parser.parse_args().checkpoint
    try:
        main(checkpoint)
    except BadInput as error:
        print(f"probe: {error}", file=sys.stderr)
        sys.exit(2)
    except (WorkerError, FloatingPointError, OSError) as error:
        sys.exit(f"probe: {error}")
