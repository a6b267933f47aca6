"""What a saved belief knows: python -m tests.probe runs/<run>/checkpoint.pt

Rolls out the saved policy on the training and the held-out tasks. Then, after so many steps of a meta-episode: how much
of the task's variance a linear probe reads from the belief (R^2 on held-out tasks, fitted on training tasks; 1 is all,
0 none), and the decoder's squared error on all rewards still to come, beside their variance.
"""

import dataclasses
import importlib
import sys

import torch

from common.envs import BadInput


def collect(module, path):
    """Rollouts by split, the model and its arguments."""
    args = module.parse_args(["--evaluate", path])
    state = module.load_checkpoint(path)
    data = {}
    for split, envs in module.make_eval_envs(args, torch.device("cpu")).items():
        model = module.BeliefModel(args, envs)
        agent = module.Agent(args, envs.single_observation_space.shape[0], envs.single_action_space, model.belief_sizes)
        module.load_modules(path, state, dict(agent=agent, model=model))
        agent.eval(), model.eval()
        names = module.eval_names(envs, args)
        rounds = []
        for first in range(0, len(names), envs.num_envs):
            chunk = names[first : first + envs.num_envs]
            chunk = chunk + [chunk[-1]] * (envs.num_envs - len(chunk))
            rounds.append(module.rollout(envs, agent, model, args, tasks=chunk))
        data[split] = {
            k: torch.cat([r[k] for r in rounds], 0 if k == "task" else 1) for k in rounds[0] if k != "env_seconds"
        }
        envs.close()
    return data, model, args


def main(path):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    script = torch.load(path, weights_only=True, mmap=True)["script"]
    module = importlib.import_module(script)
    data, model, args = collect(module, path)
    train, test = data.get("train", data["test"]), data["test"]
    T, Z = len(test["rewards"]), args.latent_dim
    print(f"{'steps':>6} {'R^2 of the task':>16} {'reward error':>13} {'variance':>9}")
    for e in sorted({0, T // 60, T // 20, T // 10, T // 5, T // 3, T // 2, 2 * T // 3, T - 1}):
        fit, held = (torch.cat([d["beliefs"][e], torch.ones(len(d["task"]), 1)], 1) for d in (train, test))
        weights = torch.linalg.solve(fit.T @ fit + 1e-2 * torch.eye(fit.shape[1]), fit.T @ train["task"])
        residual, spread = (
            x.square().sum() for x in (held @ weights - test["task"], test["task"] - test["task"].mean(0))
        )
        with torch.no_grad():
            m, t = test["beliefs"][e : e + 1, :, :Z], torch.full((1, test["task"].shape[0]), e)
            future = {k: test[k][e:] for k in ("obs", "actions", "next_obs", "rewards", "alive")}
            every = dataclasses.replace(args, decode_window="all", decode_terms=0, state_coef=0.0)
            error = module.reconstruction(model, m, t * 0, torch.ones_like(t, dtype=torch.bool), future, every)[0]
        print(f"{e:>6} {1 - residual / spread:>16.2f} {error:>13.3f} {future['rewards'].var():>9.3f}")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (BadInput, IndexError) as error:
        sys.exit(f"probe: {error}")
