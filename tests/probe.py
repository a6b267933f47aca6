"""What a saved belief knows: python -m tests.probe runs/<run>/checkpoint.pt, of varibad.py, dme.py or laser.py

Rolls out the saved policy on the training and the held-out tasks; it is blind, if it last played so, in the belief's
warm-up. Then, at each step of a meta-episode (but where nobody plays in the next 15): how much of the task's variance a
linear probe reads from the belief (R^2 on held-out tasks, fitted on training tasks; 1 is all, 0 none), and the
decoder's squared error on the rewards of the next 15 steps and on all still to come, beside their variances. The errors
say what the belief is worth: R^2 may fall with them, where the code is not linear.

Of laser.py: after so many episodes of exploration, R^2 from the context c and from its mean over slots, and on MEWA
that of Bayes' rule from the mistakes that these episodes saw, which no probe can beat; for all numbers of a task and,
where these are at most four, for each. Fitted on tasks that the training split draws, and judged on others of it.
--untrained: from the contexts that an encoder with its first weights makes of the same episodes, the floor.
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


@torch.no_grad()
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
        last = run.state["global_step"] - args.num_envs * run.envs.meta_horizon  # the last training rollout's start
        blind = script.is_blind(last, args)
        for split, envs in run.eval_envs.items():
            names, rounds = first_tasks(envs, args.eval_tasks), []
            for first in range(0, len(names), envs.num_envs):
                chunk = names[first : first + envs.num_envs]
                chunk += [chunk[-1]] * (envs.num_envs - len(chunk))
                rounds.append(script.rollout(envs, agent, model, args, blind, chunk))
                if blind:
                    rounds[-1]["beliefs"] = model.belief(model.hiddens(rounds[-1]))
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


DRAWN = 2400  # meta-episodes of laser.py's probe


def linear_probe(fit, task, held):
    """What ridge regression from fit (N, C) to task (N, G) says of held (M, C): (M, G). C may be far above N."""
    mean, std, offset = fit.mean(0), fit.std(0) + 1e-4, task.mean(0)
    fit, held = ((x - mean) / std / fit.shape[1] ** 0.5 for x in (fit, held))  # rows of norm 1, roughly
    kernel = fit @ fit.T
    return held @ fit.T @ torch.linalg.solve(kernel + 0.01 * torch.eye(len(fit)), task - offset) + offset


def r_squared(found, task):
    """Of all numbers together and, where they are at most four, of each: a line."""
    error, spread = (x.square().sum(0) for x in (found - task, task - task.mean(0)))
    each = (1 - error / spread).tolist() if task.shape[1] <= 4 else []
    return " ".join(f"{x:5.2f}" for x in [(1 - error.sum() / spread.sum()).item(), *each])


def mistakes(obs, actions, next_obs, alive):
    """MEWA: how often each of the four chances of a mistake was met, and how often there was one: (N, 4) each.

    obs, next_obs (T, N, 19), actions, alive (T, N).
    """
    (left, size), choice = (obs[..., :4], obs[..., 4:12:2]), actions[..., None]
    critical = (size.gather(-1, choice) == 1) & (left.gather(-1, choice) > 0) & alive[..., None]
    met = critical & ((size > 0).sum(-1, keepdim=True) - 1 == torch.arange(4))
    mistaken = next_obs[..., 5:12:2].gather(-1, choice) == 1
    return met.sum(0), (met & mistaken).sum(0)


def bayes(prior, met, mistaken):
    """The posterior mean (N, 4) of tasks that `prior` (M, 4) lists, all as likely."""
    log = (prior.clamp(1e-6, 1).log(), (1 - prior).clamp(1e-6, 1).log())
    likelihood = mistaken.double() @ log[0].T.double() + (met - mistaken).double() @ log[1].T.double()  # (N, M)
    return (likelihood.softmax(1) @ prior.double()).float()


@torch.no_grad()
def probe_contexts(path, untrained):
    """laser.py's table. untrained: another encoder, with its first weights, reads what the trained networks explore."""
    script = importlib.import_module("laser")
    inherited = dict(explored=script.ENCODER)
    args = parse_args(script.Args, script.PRESETS, script.SMALL, ["--evaluate", path], inherited)
    refuse((not script.has_encoder(args), f"{path} has no context to probe"))
    with Run(args) as run:
        encoder, explorer, _ = script.make_networks(args, run.envs)
        load_modules(path, run.state, dict(encoder=encoder, explorer=explorer))
        with torch.random.fork_rng():  # either reads the same episodes
            reader = script.make_networks(args, run.envs)[0] if untrained else encoder
        envs = run.make_envs(run.envs.split, args.num_envs * args.meta_episodes)  # as many as phase 1 has
        rounds, K = [], args.episodes_per_task
        while sum(len(one["task"]) for one in rounds) < DRAWN:
            data = script.explore(envs, encoder, explorer, args)
            one = dict(task=data["task"])
            for k in range(1, K + 1):
                valid = data["valid"].clone()
                valid[:, k * (args.horizon + 1) :] = False
                tokens = data["tokens"] * valid.unsqueeze(-1)
                c = reader.context(
                    *reader.latents(tokens, valid)[:1], reader.gammas(tokens, valid), reader.z_hat, valid
                )
                one[f"c{k}"], one[f"mean{k}"] = c.flatten(1), c.sum(1) / valid.sum(1, keepdim=True)
                if hasattr(envs, "chance"):
                    steps = [data[name][: k * args.horizon] for name in ("obs", "actions", "next_obs", "alive")]
                    one[f"bayes{k}"] = bayes(envs.drawn_from.clamp(0, 1), *mistakes(*steps))
            rounds.append(one)
        found = {name: torch.cat([one[name] for one in rounds]) for name in rounds[0]}
        task = found["task"].clamp(0, 1) if hasattr(envs, "chance") else found["task"]
    distinct, which = task.unique(dim=0, return_inverse=True)  # no task is both fitted on and judged on
    held = (torch.randperm(len(distinct)) < len(distinct) / 5)[which]
    print(f"{held.sum()} meta-episodes of {which[held].unique().numel()} tasks that were not among the fitted ones")
    print(f"{'episodes':>8}  {'from':<10} R^2")
    for k in range(1, K + 1):
        for name in ("c", "mean"):
            x = found[f"{name}{k}"]
            print(f"{k:>8}  {name:<10} {r_squared(linear_probe(x[~held], task[~held], x[held]), task[held])}")
        if f"bayes{k}" in found:
            print(f"{k:>8}  {'Bayes':<10} {r_squared(found[f'bayes{k}'][held], task[held])}")


def main(path, untrained=False):
    torch.manual_seed(0)
    name = load_checkpoint(path, "varibad", "dme", "laser")["script"]
    refuse((untrained and name != "laser", f"--untrained reads contexts of laser.py, and {path} is of {name}.py"))
    if name == "laser":
        return probe_contexts(path, untrained)
    script = importlib.import_module(name)
    data, model, args = collect(script, path)
    train, test = data.get("train", data["test"]), data["test"]
    T = len(test["rewards"])
    print(f"{'steps':>6} {'R^2 of task':>12} {'next 15: error':>15} {'variance':>9} {'all: error':>11} {'variance':>9}")
    for e in range(T):  # steps that the belief has seen
        if not test["alive"][e : e + 15].any():
            continue  # nobody plays there
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
    parser.add_argument("--untrained", action="store_true", help="laser.py: an encoder with its first weights reads")
    arguments = parser.parse_args()
    try:
        main(arguments.checkpoint, arguments.untrained)
    except BadInput as error:
        print(f"probe: {error}", file=sys.stderr)
        sys.exit(2)
    except (WorkerError, FloatingPointError, OSError) as error:
        sys.exit(f"probe: {error}")
