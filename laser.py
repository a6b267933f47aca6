"""LaSER: meta-RL that learns to explore by reconstructing tasks (under review; "Task-Specific Exploration in Meta-RL").

Two policies and an encoder g. In phase 1 an exploration policy plays meta-episodes of K episodes, and g learns from
them, self-supervised: to fill in masked steps, and to reconstruct all Q meta-episodes of a task as linear combinations
of the episodes of one. The better that one reconstructs the others, the more orthogonal are the codes Gamma_k of its
episodes made; orthogonal codes are what the exploration policy is paid for. In phase 2 both are frozen: one exploration
meta-episode becomes the context c, on which a task policy trains, with a meta-reward for entropy where c does not help.

Shapes: T steps of a rollout, N environments, S observation, A action, D units of the transformers, K episodes of H
steps in a meta-episode, Q meta-episodes of a task, B tasks of a batch. Encoders read L = K (H + 1) tokens x = (s,
previous a, previous r), of X numbers: slot k (H + 1) has the first state of episode k, the slots of idle steps are
zeros, and not `valid`; M slots are valid in some sequence of a batch. Rollouts are time-major (T, N, .), tokens are
(N, L, X).

    python laser.py --env-id MEWA --cuda               # every preset is a default: --help shows it
    python laser.py --env-id MEWA --oracle-context     # phase 2 alone, the true task for a context (section 5.3)
    python laser.py --env-id MEWA --explored runs/.../checkpoint.pt     # phase 2 alone, on another run's phase 1
    python laser.py --resume runs/.../checkpoint.pt
    python laser.py --evaluate runs/.../checkpoint.pt

Equation, algorithm                                              function
    (2), (3) meta-reward r+ and its weight w                     meta_weight, meta_bonus, ppo_update
    (4), (11) intrinsic reward of the exploration policy         intrinsic_rewards, exploration_rewards
    (5), (6) task reconstruction B_j C = B, L_t-rec              reconstruct, encoder_loss
    (7), (8) target delta_j and contrastive loss                 encoder_loss, similarity
    (9) c = h(z, Z_j, Gamma)                                     Encoder.context
    (10) L_LaSER                                                 encoder_loss, regulariser
    (12) - (14) PPO with advantages that depend on the policy    gae, ppo_update
    Appendix B masked self-supervision                           mask_tokens
    Algorithms 1 to 5                                            train, evaluate, explore_iteration, task_iteration
"""

import argparse
import contextlib
import csv
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
from torch.distributions import Normal
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.envs import SPLITS, BadInput, make_envs
from common.envs.workers import WorkerError, cores
from common.plot import draw_contexts, draw_curves, draw_similarity

SCRIPT = Path(__file__).stem
LOG_EVERY = 10_000  # steps between two rows of metrics; evaluations are logged whenever they happen
PARTS = (  # what a checkpoint holds beside counters and `processes`
    "encoder", "heads", "target", "explorer", "agent", "belief_optimizer", "explore_optimizer", "optimizer"
)  # fmt: skip


# ---------- 3. Arguments and presets ----------


@dataclass
class Args:
    # experiment
    # GridWorld, GridWorldLDM, GridWorldExtrapolation, SparsePointRobot, MEWA, HalfCheetahVel, HalfCheetahDir, AntDir,
    # AntGoal, HopperMass, ML1-<family>, ML10, ML45, or package.module:factory without sessions.
    env_id: str = "MEWA"
    seed: int = 1  # of tasks, networks and actions
    cuda: bool = False  # train on the GPU, with the paper's sizes and steps where a CPU's preset has its own
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline works)
    total_timesteps: int = 0  # environment steps of both phases, at most; 0 = what their iterations take
    num_envs: int = 12  # tasks of an iteration (P), of both phases (ours; it fits the paper's numbers of MEWA's steps)
    horizon: int = 50  # steps of an episode (H); 0 = the environment's own
    episodes_per_task: int = 4  # episodes of an exploration meta-episode (K); 0 = the environment's own
    eval_interval: int = 100  # iterations of phase 2 between evaluations; 0 = only at the end; negative = never
    eval_tasks: int = 0  # evaluation tasks per family, the first ones; 0 = all
    checkpoint_interval: int = 100  # iterations between checkpoints; 0 = only at the end
    run_dir: str = ""  # folder of this very run; empty = runs/<env>__<script>__<seed>__<time>
    resume: str = ""  # checkpoint to continue from, with its arguments; those given beside it override
    evaluate: str = ""  # checkpoint to evaluate: prints the results and writes eval.json beside it, trains nothing
    eval_sample: bool = True  # evaluate with sampled actions (the authors' code), not with the most likely ones
    capture_video: bool = False  # with --evaluate: a film of one held-out task of each family (Meta-World, ScratchItch)
    compile: bool = False  # torch.compile the transformers of the encoder's update; the first one takes a minute
    reward_version: Literal["v1", "v2"] = "v2"  # Meta-World's reward functions
    split_rule: Literal["varibad", "ldm"] = "varibad"  # MuJoCo: train = test, or LDM's disjoint sets (its Table 1)
    sessions: int = 0  # sessions of an episode, where the environment has them; 0 = the environment's own
    session_process: Literal["", "fixed", "poisson", "bernoulli"] = ""  # their lengths; empty = the environment's own

    # PPO, of the task policy (Table 8), and what is the exploration policy's alone (Table 7)
    learning_rate: float = 1e-4  # Adam's step size for actor and critic
    anneal_lr: bool = False  # let it fall linearly to 0 over phase 2 (the authors' code, not the paper)
    gamma: float = 0.99  # discount per step; in phase 1 over the whole meta-episode
    gae_lambda: float = 0.9  # lambda of the generalised advantage estimate
    # The value is 0 after the last episode; an exploration episode's last step bootstraps from the next one's first.
    time_limit: Literal["terminal"] = "terminal"
    update_epochs: int = 4  # passes over an iteration's steps
    num_minibatches: int = 2  # gradient steps per pass
    clip_coef: float = 0.2  # epsilon of the clipped ratio and value
    ent_coef: float = 0.01  # weight of the entropy bonus, of both policies
    vf_coef: float = 0.5  # weight of the value loss
    value_loss: Literal["huber", "mse"] = "huber"  # huber: the authors' code, clipped values; mse: 1/2 squared error
    max_grad_norm: float = 0.5  # clip of the norm of a policy's gradient; 0 = off
    # On MEWA beta, zeta and these two are those of the authors' code: with the paper's values (1.5, -0.13, both on) the
    # meta-reward of a step is three times the cost of one, and a policy learns to make episodes long.
    norm_inputs: bool = False  # standardise the task policy's state and context (paper; off in the authors' code)
    norm_reward: bool = False  # divide its rewards by the deviation of the discounted return, clip at 10 (likewise)
    policy_layers: tuple[int, ...] = (128, 128, 128)  # hidden layers (tanh) of actor and critic
    obs_embed: int = 64  # policies' embedding of the observation; of Gamma_t, too
    context_layers: tuple[int, ...] = (128, 128, 128)  # context extractor: layers (tanh) from c to the policy's input
    std_init: float = 1.0  # deviation of a continuous action at the start
    std_min: float = 0.01  # its lower bound, reached softly (ours)
    std_max: float = 2.0  # its upper bound
    explore_learning_rate: float = 1e-5  # Adam's step size for the exploration policy
    explore_clip_coef: float = 0.1  # its epsilon
    explore_epochs: int = 4  # its passes
    explore_minibatches: int = 2  # its gradient steps per pass
    explore_layers: tuple[int, ...] = (128, 128, 128)  # its hidden layers

    # belief model: the encoder g (Table 6)
    no_belief: bool = False  # phase 2 alone, with zeros for a context: the floor that any claim of adaptation must beat
    # Phase 2 alone, with the true task for a context; trains on the test split, as section 5.3 does: it asks whether a
    # policy adapts that is told everything.
    oracle_context: bool = False
    belief_learning_rate: float = 1e-4  # Adam's step size for encoder and heads
    belief_updates: int = 50  # its gradient steps per iteration, each on a new batch (N_encoder)
    belief_batch: int = 5  # tasks per gradient step (B), each with all Q meta-episodes
    buffer_size: int = 100_000  # tasks kept for them
    d_model: int = 128  # units of the transformers (D)
    num_layers: int = 8  # blocks of f_u and of f_b; h has two
    num_heads: int = 16  # attention heads of a block
    feed_forward: int = 512  # its hidden units

    # LaSER
    explore_iterations: int = 10_000  # of phase 1 (N_explore)
    initial_iterations: int = 2_000  # of them before the exploration policy learns: until then it is as at the start
    task_iterations: int = 10_000  # of phase 2 (N_task)
    explored: str = ""  # checkpoint of a run whose phase 1 is over: encoder and exploration policy come from there
    meta_episodes: int = 20  # of a task (Q)
    # Of the task policy in each of an iteration's tasks: 5 in the authors' code; 2 in MEWA's small preset (ours).
    exploit_episodes: int = 5
    eval_episodes: int = 20  # of it in each evaluation task, with the same context; their mean counts
    sigma: float = 0.025  # (4)
    # (4) code: exp(-w^2 / (2 sigma^2)), w the mean similarity to the episodes before, and nothing for the first; paper:
    # exp(-d^2 / sigma), where d counts the episode itself, so that it never reaches 1.
    reward_form: Literal["code", "paper"] = "code"
    survival_coef: float = 0.0  # (11) alpha_R, weight of the environment's reward in the exploration policy's
    rec_coef: float = 0.5  # (10) weight of the masked steps' reconstruction
    task_rec_coef: float = 1.0  # (10) weight of the task's reconstruction
    contrastive_coef: float = 1.0  # (10) weight of the contrastive loss
    regulariser_coef: float = 0.125  # (10) weight of norms and orthogonality
    state_coef: float = 0.05  # weight of states in reconstructions; rewards have 1, actions 0
    xi: float = 0.05  # (7)
    nu: int = 250  # iterations between two copies of the task-reconstruction head to its target
    contrastive_warmup: int = 1_000  # iterations without the contrastive loss (the authors' code, not the paper)
    beta: float = 0.05  # (2) weight of the meta-reward (the authors' code; paper: 1.5)
    zeta: float = -0.15  # (3) threshold (the authors' code; paper: -0.13)
    # The advantages depend on the policy's entropy (14); detached, no gradient flows that way. The authors' are not.
    detach_meta_reward: bool = False
    pfo_coef: float = 0.1  # weight of proximal feature optimisation
    pfo_form: Literal["norm", "mse"] = "norm"  # norm of the features' change (the authors' code), or its mean square
    # c from Gamma and Z (9), or from Z alone, as in the authors' code.
    use_gamma_in_context: bool = True
    mask_pads: bool = True  # no attention to idle slots, whose codes are zeros (the authors' code attends to them)
    recompute: bool = False  # transformers' activations are computed again in the backward pass: slower, less memory


# The paper's Tables 5 to 8; Args' defaults are those of MEWA. Ours: the tasks of an iteration, the warm-up of the
# contrastive loss (half of the initial iterations, as in MEWA), bounds of deviations, and all that evaluates.
PRESETS = {
    "MEWA": dict(),
    "ML10": dict(
        num_envs=10, horizon=200, episodes_per_task=2, explore_iterations=700, initial_iterations=20,
        task_iterations=9_000, belief_updates=2, belief_batch=10, buffer_size=1_000, nu=25, contrastive_warmup=10,
        sigma=0.01, beta=0.0, zeta=0.0, pfo_coef=0.0, update_epochs=2, num_minibatches=8, policy_layers=(256, 256, 128),
        context_layers=(256, 256, 128, 10), std_min=0.5, std_max=1.5, eval_episodes=1, eval_interval=500,
        norm_inputs=True, norm_reward=True,
    ),
    "HopperMass": dict(
        horizon=400, explore_iterations=600, initial_iterations=30, task_iterations=2_500, belief_learning_rate=5e-4,
        belief_updates=2, belief_batch=10, buffer_size=2_000, nu=25, contrastive_warmup=15, sigma=0.003,
        explore_learning_rate=8e-5, survival_coef=0.01, learning_rate=6e-5, beta=0.0, zeta=0.0, pfo_coef=0.0,
        num_minibatches=8, policy_layers=(256, 256, 128), context_layers=(256, 256, 128, 10), eval_tasks=30,
        eval_episodes=2, recompute=True, norm_inputs=True, norm_reward=True,
    ),
}  # fmt: skip
PRESETS |= dict.fromkeys(("ML1", "ML45"), PRESETS["ML10"])
SMALL_SIZES = dict(  # what fits a machine without a GPU and learns there in minutes, unless --cuda; ours
    meta_episodes=4, d_model=32, num_layers=2, num_heads=4, feed_forward=128, belief_batch=4, belief_updates=8,
    explore_iterations=300, initial_iterations=60, task_iterations=4_000, contrastive_warmup=30, nu=10,
    belief_learning_rate=1e-3, explore_learning_rate=3e-4, buffer_size=1_000, recompute=False, learning_rate=3e-4,
    exploit_episodes=2, eval_interval=200,
)  # fmt: skip
SMALL = {
    "MEWA": SMALL_SIZES,
    "ML10": SMALL_SIZES | dict(explore_iterations=30, initial_iterations=5, contrastive_warmup=3, eval_tasks=10,
        belief_updates=4, exploit_episodes=5, task_iterations=300, eval_interval=50),
    "HopperMass": SMALL_SIZES | dict(explore_iterations=60, initial_iterations=10, contrastive_warmup=5,
        belief_updates=4, belief_batch=2, exploit_episodes=5, task_iterations=300, eval_interval=50),
}  # fmt: skip
SMALL |= dict.fromkeys(("ML1", "ML45"), SMALL["ML10"])
# Whatever else, and package.module:factory: sizes for a small machine, with --cuda, too (ours).
YOUR_OWN = SMALL_SIZES | dict(horizon=0, episodes_per_task=0, norm_inputs=True, norm_reward=True)
ENCODERS = (  # arguments that an encoder is made for
    "env_id horizon episodes_per_task meta_episodes belief_batch d_model num_layers num_heads feed_forward obs_embed "
    "explore_layers use_gamma_in_context mask_pads"
).split()


def parse_args(argv=None):
    """The command line over the arguments saved in --resume or --evaluate, else over the preset of --env-id."""
    argv = sys.argv[1:] if argv is None else argv
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--env-id", "--env_id", default=Args.env_id)
    early.add_argument("--cuda", action="store_true")
    early.add_argument("--resume", default="")
    early.add_argument("--evaluate", default="")
    early.add_argument("--explored", default="")
    known = early.parse_known_args(argv)[0]
    path = known.resume or known.evaluate
    if path:
        defaults = load_checkpoint(path)["args"] | dict(resume="", evaluate="", run_dir=str(Path(path).parent))
    else:
        name = known.env_id.removesuffix("-v2").removesuffix("-v3")
        family = name.split("-")[0]
        small = {} if known.cuda else SMALL.get(name, SMALL.get(family, {}))
        defaults = PRESETS.get(family, YOUR_OWN) | small
        if known.explored:
            defaults |= {name: load_checkpoint(known.explored)["args"][name] for name in ENCODERS}
    return tyro.cli(Args, args=argv, default=Args(**defaults))


def flag(name):
    return "--" + name.replace("_", "-")


def check_args(args):
    """BadInput for the first argument that makes no sense, or for two that do not fit."""
    for name in (
        "num_envs update_epochs num_minibatches explore_epochs explore_minibatches belief_batch belief_updates "
        "buffer_size d_model num_layers num_heads feed_forward obs_embed meta_episodes exploit_episodes eval_episodes "
        "learning_rate belief_learning_rate explore_learning_rate std_min std_init clip_coef explore_clip_coef sigma nu"
    ).split():
        if not 0 < getattr(args, name) < math.inf:
            raise BadInput(f"{flag(name)} must be above 0, not {getattr(args, name)}")
    for name in (
        "seed total_timesteps eval_tasks checkpoint_interval ent_coef vf_coef max_grad_norm horizon episodes_per_task "
        "sessions explore_iterations initial_iterations task_iterations contrastive_warmup survival_coef rec_coef "
        "task_rec_coef contrastive_coef regulariser_coef state_coef xi beta pfo_coef"
    ).split():
        if not 0 <= getattr(args, name) < math.inf:
            raise BadInput(f"{flag(name)} must not be below 0, and finite: not {getattr(args, name)}")
    for name, below in dict(gamma=1.0, gae_lambda=1.0).items():
        if not 0 <= getattr(args, name) <= below:
            raise BadInput(f"{flag(name)} must lie in [0, {below}], not {getattr(args, name)}")
    for name in ("policy_layers", "context_layers", "explore_layers"):
        if not getattr(args, name) or min(getattr(args, name)) < 1:
            raise BadInput(f"{flag(name)} must be one or more positive sizes, not {getattr(args, name)}")
    if not -math.inf < args.zeta <= 0:
        raise BadInput(f"--zeta must not be above 0, not {args.zeta}")
    if args.d_model % (2 * args.num_heads):
        raise BadInput(f"--num-heads {args.num_heads}: twice as many do not divide --d-model {args.d_model}")
    if args.buffer_size < args.num_envs:
        raise BadInput(f"--buffer-size {args.buffer_size} is below --num-envs {args.num_envs}: no iteration fits")
    if not args.std_min < args.std_init < args.std_max < math.inf:
        raise BadInput(f"--std-init {args.std_init} must lie inside --std-min {args.std_min}, --std-max {args.std_max}")
    if args.seed >= 2**32:  # PyTorch's generator reads no more of it
        raise BadInput(f"--seed must be below 2**32, not {args.seed}")
    if args.resume and args.evaluate:
        raise BadInput("--resume and --evaluate exclude each other")
    if args.capture_video and not args.evaluate:
        raise BadInput("--capture-video goes with --evaluate")
    if args.no_belief and args.oracle_context:
        raise BadInput("--no-belief and --oracle-context exclude each other")
    if args.cuda and not torch.cuda.is_available():
        raise BadInput("--cuda: this PyTorch sees no CUDA device")
    if args.explored and (args.no_belief or args.oracle_context):
        raise BadInput("--explored makes no sense without an encoder: --no-belief and --oracle-context have none")


# ---------- 3b. Finite numbers (and sums over processes, of which there is one here) ----------


def all_sum(x):
    """The sum of x over all processes. Losses are sums whose weights add up to 1 over all of them: so are gradients."""
    if dist.is_initialized():
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def check_finite(**tensors):
    """FloatingPointError, in all processes, that names the first of the tensors with a NaN or an infinity in any."""
    bad = all_sum(torch.stack([~torch.isfinite(tensor).all() for tensor in tensors.values()]).int()).tolist()
    for name, count in zip(tensors, bad):
        if count:
            raise FloatingPointError(f"{name.replace('_', ' ')} is not finite")


def descend(optimizer, loss, parts, max_norm, name):
    """A step down the gradient summed over processes, its norm clipped in each of the parts; 0 = not clipped.

    Raises FloatingPointError, before the step, where the loss or the gradient is not finite.
    """
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(grad.view_as(p))
    norms = [nn.utils.clip_grad_norm_(part.parameters(), max_norm or math.inf) for part in parts]
    check_finite(**{f"{name}_loss": loss.detach(), f"{name}_gradient_norm": torch.stack(norms)})
    optimizer.step()


# ---------- 4. Networks ----------


class RunningNorm(nn.Module):
    """Standardises by the mean and deviation of all rows so far (Welford's merge); before the first, does nothing."""

    def __init__(self, size, min_std=1e-4):
        super().__init__()
        self.min_std = min_std
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("std", torch.ones(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, rows, alive):
        """rows (B, size), of which those count where alive (B,)."""
        count = all_sum(alive.sum())
        share = (alive / count.clamp(min=1)).unsqueeze(-1)
        mean = all_sum((rows * share).sum(0))
        var = all_sum(((rows - mean).square() * share).sum(0))
        self.count += count
        weight = (count / self.count.clamp(min=1)).float()  # of the new rows
        delta = mean - self.mean
        self.var += weight * (var - self.var + delta.square() * (1 - weight))
        self.mean += weight * delta
        self.std.copy_(self.var.sqrt().clamp(min=self.min_std))

    def forward(self, x):
        return (x - self.mean) / self.std


def mlp(sizes, activation):
    """Linear layers of the given sizes, each but the last followed by the activation."""
    layers = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1])


def normc_(layer, gain):
    """The authors' initialisation: rows of norm `gain` in random directions, no bias."""
    with torch.no_grad():
        layer.weight.normal_()
        layer.weight *= gain / layer.weight.norm(dim=1, keepdim=True)
        layer.bias.zero_()


class Agent(nn.Module):
    """Actor and critic on the embedded observation and on features: of Gamma_t for exploration, of c for the task.

    extractor: what makes features of a context (.., C). The networks see [tanh(W s), features].
    """

    def __init__(self, args, obs_dim, action_space, extractor, context_dim, feature_dim, layers):
        super().__init__()
        # A context has numbers that are constant in training: a higher floor keeps them from blowing up.
        self.obs_norm, self.context_norm = RunningNorm(obs_dim), RunningNorm(context_dim, min_std=0.02)
        self.return_norm = RunningNorm(1)
        self.obs_embed = nn.Linear(obs_dim, args.obs_embed)
        self.extractor, self.context_dim = extractor, context_dim
        self.discrete = hasattr(action_space, "n")
        n_out = int(action_space.n) if self.discrete else action_space.shape[0]
        sizes = [args.obs_embed + feature_dim, *layers]
        self.actor, self.critic = mlp([*sizes, n_out], nn.Tanh), mlp([*sizes, 1], nn.Tanh)
        for net in (self.actor, self.critic):
            for layer in net[:-1:2]:
                normc_(layer, 5 / 3)
        if self.discrete:
            nn.init.orthogonal_(self.actor[-1].weight, 0.01)
            nn.init.zeros_(self.actor[-1].bias)
        else:
            normc_(self.actor[-1], 1.0)
            # The logarithm of the deviation stays softly between its bounds: low + (high - low) * sigmoid(raw_std)
            self.log_std_low, self.log_std_high = math.log(args.std_min), math.log(args.std_max)
            share = (math.log(args.std_init) - self.log_std_low) / (self.log_std_high - self.log_std_low)
            self.raw_std = nn.Parameter(torch.full((n_out,), math.log(share / (1 - share))))

    def extract(self, context):
        """context (.., C) -> features (.., F)."""
        return self.extractor(self.context_norm(context))

    def blank(self, device):
        """The features of no context: zeros after the normalisation (ours; the paper leaves V(s) open): (F,)."""
        return self.extractor(torch.zeros(self.context_dim, device=device))

    def embed(self, obs, features):
        return torch.cat([self.obs_embed(self.obs_norm(obs)).tanh(), features], -1)

    def std(self):
        return (self.log_std_low + (self.log_std_high - self.log_std_low) * self.raw_std.sigmoid()).exp()

    def act(self, obs, features, deterministic=False):
        """obs (N, S), features (N, F) -> actions: int64 (N,) or float32 (N, A). Samples without a wait for devices."""
        out = self.actor(self.embed(obs, features))
        if self.discrete:
            scores = out if deterministic else out.softmax(-1) / torch.empty_like(out).exponential_()
            return scores.argmax(-1)  # the first of exponential clocks with rates p rings in proportion to p
        return out if deterministic else out + self.std() * torch.randn_like(out)

    def value(self, x):
        return self.critic(x).squeeze(-1)

    def forward(self, x, action):
        """Log-probability and entropy of the action's distribution (.., ), and the actor's last hidden layer before its
        tanh (.., last of the layers), which PFO holds fast. x: what `embed` returns."""
        hidden = self.actor[:-2](x)
        out = self.actor[-2:](hidden)
        if self.discrete:
            logprobs = out.log_softmax(-1)
            return logprobs.gather(-1, action[..., None])[..., 0], -(logprobs.exp() * logprobs).sum(-1), hidden
        dist = Normal(out, self.std(), validate_args=False)
        return dist.log_prob(action).sum(-1), dist.entropy().sum(-1), hidden


def xavier_(net):
    """The authors' initialisation of context extractor and heads: Xavier's normal one, no bias."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


def explore_agent(args, obs_dim, action_space):
    """The exploration policy pi(a | s, Gamma_t)."""
    extractor = nn.Sequential(nn.Linear(args.d_model, args.obs_embed), nn.Tanh())
    return Agent(args, obs_dim, action_space, extractor, args.d_model, args.obs_embed, args.explore_layers)


def task_agent(args, obs_dim, action_space, context_dim):
    """The task policy pi(a | s, c); of the true task (G numbers), a single layer of as many units is the extractor."""
    layers = (context_dim,) if args.oracle_context or args.no_belief else args.context_layers
    extractor = xavier_(nn.Sequential(*mlp([context_dim, *layers], nn.Tanh), nn.Tanh()))
    return Agent(args, obs_dim, action_space, extractor, context_dim, layers[-1], args.policy_layers)


class Block(nn.Module):
    """x + attention from x to a memory, then x + W_2 GELU(W_1 x), without normalisation (T-Fixup needs none)."""

    def __init__(self, size, num_heads, feed_forward):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.net = mlp([size, feed_forward, size], nn.GELU)
        nn.init.xavier_uniform_(self.qkv.weight)  # as PyTorch's own attention
        nn.init.zeros_(self.qkv.bias), nn.init.zeros_(self.out.bias)

    def split(self, x):
        """(N, L, D) -> (N, heads, L, D / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, x, keys, values, mask):
        """Queries of x (N, L, D), keys and values (N, heads, L', .), mask bool (N, 1, L or 1, L'): True is seen."""
        size = x.shape[-1]
        queries = self.split(F.linear(x, self.qkv.weight[:size], self.qkv.bias[:size]))
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.net(x)

    def memory(self, x):
        """Keys and values of x (N, L', D), each (N, heads, L', .)."""
        size = x.shape[-1]
        return [self.split(y) for y in F.linear(x, self.qkv.weight[size:], self.qkv.bias[size:]).chunk(2, -1)]

    def forward(self, x, memory=None, mask=None):
        """x (N, L, D), memory (N, L', D), x itself if None -> (N, L, D)."""
        return self.attend(x, *self.memory(x if memory is None else memory), mask)


class Transformer(nn.Module):
    """Tokens (N, M, X), with the positions of their slots -> (N, M, D), by blocks of T-Fixup's initialisation."""

    def __init__(self, args, token_dim, slots):
        super().__init__()
        size, self.recompute = args.d_model, args.recompute
        self.embed = nn.Linear(token_dim, size, bias=False)
        sizes = size, args.num_heads, args.feed_forward
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(args.num_layers))
        angles = torch.arange(slots)[:, None] / 10_000 ** (torch.arange(0, size, 2) / size)
        self.register_buffer("positions", torch.stack([angles.sin(), angles.cos()], -1).flatten(1), persistent=False)
        nn.init.normal_(self.embed.weight, std=size**-0.5 * (9 * args.num_layers) ** -0.25)
        scale = 0.67 * args.num_layers**-0.25
        for block in self.blocks:
            for layer in (block.qkv, block.out, block.net[0], block.net[2]):
                nn.init.xavier_uniform_(layer.weight)
                layer.weight.data *= scale * (2**0.5 if layer is block.qkv else 1)

    def forward(self, tokens, slots, mask):
        """slots (M,): the tokens' numbers in a meta-episode; mask (N, 1, M or 1, M): True is seen."""
        x = self.embed(tokens) + self.positions[slots]
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, None, mask, use_reentrant=False)
            else:
                x = block(x, mask=mask)
        return x

    def step(self, token, slot, caches, mask):
        """The slot's output (N, D), as forward's with a causal mask: token (N, X), mask (N, L), caches (blocks, 2, N,
        heads, L, .), which get the slot's keys and values."""
        x = (self.embed(token) + self.positions[slot])[:, None]
        for block, cache in zip(self.blocks, caches):
            cache[:, :, :, slot : slot + 1] = torch.stack(block.memory(x))
            x = block.attend(x, *cache[:, :, :, : slot + 1], mask[:, None, None, : slot + 1])
        return x[:, 0]


# ---------- 5. Encoder: what this paper changes ----------


class Encoder(nn.Module):
    """g of the paper (Figure 3b): f_u, which reads online, f_b, which sees whole meta-episodes, and h, which joins.

    Codes of slots that are not valid are zeros.
    """

    def __init__(self, args, token_dim):
        super().__init__()
        size, self.episodes, self.slots = args.d_model, args.episodes_per_task, args.horizon + 1
        self.mask_pads, self.use_gamma, self.bfloat16 = args.mask_pads, args.use_gamma_in_context, args.cuda
        self.length, self.fixed_shapes = self.episodes * self.slots, args.compile
        self.f_u, self.f_b = (Transformer(args, token_dim, self.length) for _ in range(2))
        pooled = args.belief_batch * args.meta_episodes * self.episodes
        self.gamma_head, self.Z_head = (mlp([size, 64, size], nn.Tanh) for _ in range(2))
        self.z_head = mlp([pooled, 64, size], nn.Tanh)  # of all episodes of a batch: B, Q and K are fixed
        for head in (self.gamma_head, self.Z_head, self.z_head):
            nn.init.xavier_uniform_(head[0].weight)
            nn.init.xavier_uniform_(head[2].weight, 0.01)
            nn.init.zeros_(head[0].bias), nn.init.zeros_(head[2].bias)
        sizes = size, args.num_heads, args.feed_forward
        self.h_gamma, self.h_z, self.z_embed = Block(*sizes), Block(*sizes), nn.Linear(size, size, bias=False)
        self.register_buffer("z_hat", torch.zeros(size))  # z of phase 2: a mean over batches, after phase 1

    def half(self):
        """Blocks run in bfloat16 on a GPU; all that is compared or summed is float32."""
        return torch.autocast("cuda", torch.bfloat16) if self.bfloat16 else contextlib.nullcontext()

    def seen(self, valid):
        """Which slots may be attended to, (N, L): the valid ones, and the first, so that nothing attends to nothing."""
        seen = valid.clone() if self.mask_pads else torch.ones_like(valid)
        seen[:, 0] = True
        return seen

    def used(self, valid):
        """The slots (M,) to compute: the first, and those that are valid in any of the sequences, for what is idle in
        all has no codes; all of them without mask_pads, or compiled. With their masks of attention (N, 1, 1, M) and of
        codes (N, M, 1). Waits for the device."""
        seen, shown = self.seen(valid), self.shown(valid)
        slots = (seen.any(0) | self.fixed_shapes).nonzero()[:, 0]
        return slots, seen[:, None, None, slots], shown[:, slots]

    def spread(self, codes, slots):
        """codes (N, M, ..) of some slots, as float32 -> (N, L, ..), zeros at the others."""
        whole = torch.zeros(len(codes), self.length, *codes.shape[2:], device=codes.device)
        return whole.index_copy_(1, slots, codes.float())

    def gammas(self, tokens, valid):
        """f_u: tokens (N, L, X), valid (N, L) -> Gamma (N, L, D), each slot's from what came before it."""
        slots, seen, shown = self.used(valid)
        with self.half():
            codes = self.gamma_head(self.f_u(tokens[:, slots], slots, (slots <= slots[:, None]) & seen))
        return self.spread(codes * shown, slots)

    def start(self, num_envs):
        """Empty caches for `step`: (blocks, 2, N, heads, L, D / heads)."""
        block, device = self.f_u.blocks[0], self.z_hat.device
        shape = len(self.f_u.blocks), 2, num_envs, block.num_heads, self.length, len(self.z_hat) // block.num_heads
        return torch.zeros(shape, device=device, dtype=torch.bfloat16 if self.bfloat16 else torch.float32)

    def step(self, token, slot, caches, valid):
        """Gamma of one slot, as `gammas` has it: token (N, X), valid (N, L) up to the slot -> (N, D)."""
        with self.half():
            code = self.gamma_head(self.f_u.step(token, slot, caches, self.seen(valid)))
        return code.float() * self.shown(valid[:, slot])

    def shown(self, valid):
        return valid.unsqueeze(-1) if self.mask_pads else torch.ones_like(valid).unsqueeze(-1)

    def latents(self, tokens, valid):
        """f_b -> Z (N, L, D), and the mean of each episode's output over its slots and units (N, K)."""
        slots, seen, shown = self.used(valid)
        with self.half():
            out = self.f_b(tokens[:, slots], slots, seen)
            Z = self.Z_head(out)
        means = self.spread((out.float() * shown).mean(-1), slots).unflatten(1, (self.episodes, -1))  # (N, K, H + 1)
        count = self.shown(valid).squeeze(-1).unflatten(1, (self.episodes, -1)).sum(-1)  # (N, K)
        return self.spread(Z * shown, slots), means.sum(-1) / count.clamp(min=1)

    def shared(self, pooled):
        """z, what the tasks of a batch have in common: pooled (B Q, K) -> (D,)."""
        return self.z_head(pooled.flatten())

    def context(self, Z, gammas, z, valid):
        """(9) c = h(z, Z_j, Gamma): Z, gammas (N, L, D), z (D,) -> (N, L, D)."""
        slots, seen, shown = self.used(valid)
        with self.half():
            c = self.h_gamma(gammas[:, slots], Z[:, slots], seen) if self.use_gamma else Z[:, slots]
            c = self.h_z(c, self.z_embed(z).expand(len(c), 1, -1))
        return self.spread(c * shown, slots)

    def task_context(self, tokens, valid, gammas):
        """c of phase 2, with z^: (N, L, X), (N, L), (N, L, D) -> (N, L D)."""
        return self.context(self.latents(tokens, valid)[0], gammas, self.z_hat, valid).flatten(1)


class TaskReconstruction(nn.Module):
    """h_t-rec: Z of all of a task's meta-episodes and of one of them -> C (5)."""

    def __init__(self, args, length):
        super().__init__()
        Q, self.shape = args.meta_episodes, (args.meta_episodes, args.episodes_per_task, args.episodes_per_task)
        self.all, self.one = nn.Linear(Q * length * args.d_model, 128), nn.Linear(length * args.d_model, 128)
        self.net = mlp([256, 128, 128, math.prod(self.shape)], nn.GELU)
        xavier_(self)

    def forward(self, Z, Z_j):
        """Z (B, Q, L, D), Z_j (B, L, D) -> C (B, Q, K, K)."""
        x = torch.cat([self.all(Z.flatten(1)), self.one(Z_j.flatten(1))], -1)
        return self.net(F.gelu(x)).view(-1, *self.shape)


class Heads(nn.Module):
    """The two heads of pre-training: h_rec, from c to the tokens, and h_t-rec."""

    def __init__(self, args, token_dim, length):
        super().__init__()
        self.rec, self.task_rec = xavier_(nn.Linear(args.d_model, token_dim)), TaskReconstruction(args, length)


def reconstruct(tokens, C, j):
    """(5) B_j C: tokens (B, Q, K, .), an episode a vector, C (B, Q, K, K), j (B,) -> (B, Q, K, .)."""
    one = tokens[torch.arange(len(j), device=j.device), j]  # (B, K, .)
    return torch.einsum("bmx,bqmk->bqkx", one, C)


def similarity(gammas, episodes):
    """Cosines between the codes of a meta-episode's episodes: gammas (N, L, D) -> (N, K, K). 0 with an empty one."""
    codes = gammas.unflatten(1, (episodes, -1)).flatten(2)
    codes = codes / codes.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return codes @ codes.transpose(1, 2)


def mask_tokens(tokens, valid, kept):
    """Appendix B: 15 % of the valid slots are selected; of these 80 % lose observation and reward, which become -1, and
    10 % are replaced by another valid slot of the same meta-episode.

    tokens (N, L, X), kept (X,): the entries that a mask leaves, those of actions. Returns tokens, selected (N, L).
    """
    chance, kind, where = torch.rand(3, *valid.shape, device=tokens.device)
    selected = (chance < 0.15) & valid
    first = valid.to(torch.int8).argsort(dim=1, descending=True, stable=True)  # the valid slots' numbers come first
    other = first.gather(1, (where * valid.sum(1, keepdim=True)).long())
    other = tokens.gather(1, other[..., None].expand_as(tokens))
    masked = torch.where((selected & (kind < 0.8))[..., None] & ~kept, -1.0, tokens)
    return torch.where((selected & (kind >= 0.8) & (kind < 0.9))[..., None], other, masked), selected


def squared_errors(error, obs_dim, args):
    """Mean squares over observations and of rewards, error (.., X), weighted as in all reconstructions: (..)."""
    return args.state_coef * error[..., :obs_dim].square().mean(-1) + error[..., -1].square()


def regulariser(z, Z, gammas, valid):
    """R of (10): norms of z, of each Z_jt and of each episode's Gamma towards 1, z and Z_jt orthogonal."""
    weight = valid / valid.sum().clamp(min=1)
    terms = (z.norm() - 1).square() + ((Z.norm(dim=-1) - 1).square() * weight).sum() + ((Z @ z).square() * weight).sum()
    return terms / 3 + (gammas.norm(dim=-1) - 1).square().mean()


def encoder_loss(encoder, heads, target, batch, obs_dim, args, contrast=True):
    """(10) L_LaSER on a batch of tasks. Returns the loss and a dict of its terms.

    batch: tokens (B, Q, L, X), valid (B, Q, L). target: h_t-rec of some iterations ago.
    """
    B, Q, L, X = batch["tokens"].shape
    tokens, valid = batch["tokens"].flatten(0, 1), batch["valid"].flatten(0, 1)  # (B Q, L, .)
    columns = torch.arange(X, device=tokens.device)
    masked, selected = mask_tokens(tokens, valid, (columns >= obs_dim) & (columns < X - 1))
    both, twice = torch.cat([masked, tokens]), valid.repeat(2, 1)
    gammas, (Z, pooled) = encoder.gammas(both, twice), encoder.latents(both, twice)
    (masked_gammas, gammas), (masked_Z, Z) = gammas.chunk(2), Z.chunk(2)
    masked_z, z = (encoder.shared(part) for part in pooled.chunk(2))

    c = encoder.context(masked_Z, masked_gammas, masked_z, valid)
    error = squared_errors(heads.rec(c) - tokens, obs_dim, args)
    rec = (error * selected).sum() / selected.sum().clamp(min=1)

    tasks = torch.arange(B, device=tokens.device)
    episodes = batch["tokens"].view(B, Q, args.episodes_per_task, -1)
    Z = Z.view(B, Q, L, -1)
    j = torch.randint(Q, (B,), device=tokens.device)
    error = reconstruct(episodes, heads.task_rec(Z.detach(), Z[tasks, j]), j) - episodes
    task_rec = squared_errors(error.unflatten(-1, (-1, X)), obs_dim, args).mean()  # (6)

    j = torch.randint(Q, (B,), device=tokens.device)
    with torch.no_grad():
        error = reconstruct(episodes, target(Z, Z[tasks, j]), j) - episodes
        delta = 1 - torch.exp(-args.xi * error.square().flatten(1).mean(1))  # (7): the mean of squares (B,)
    cosines = similarity(gammas.view(B, Q, L, -1)[tasks, j], args.episodes_per_task)
    off_diagonal = 1 - torch.eye(args.episodes_per_task, device=tokens.device)
    contrastive = ((cosines - delta[:, None, None]) * off_diagonal).square().mean()  # (8): the diagonal agrees

    codes = gammas.unflatten(1, (args.episodes_per_task, -1)).flatten(2)  # an episode's Gamma, a vector
    norms = regulariser(z, Z.flatten(0, 1), codes, valid)
    loss = args.rec_coef * rec + args.task_rec_coef * task_rec + args.regulariser_coef * norms
    loss = loss + args.contrastive_coef * contrast * contrastive
    terms = dict(loss=loss, rec=rec, task_rec=task_rec, contrastive=contrastive, regulariser=norms, delta=delta.mean())
    return loss, {name: term.detach() for name, term in terms.items()}


# ---------- 6. PPO ----------


def intrinsic_rewards(gammas, args):
    """(4), of each of a meta-episode's episodes: gammas (N, L, D) -> (N, K)."""
    before = similarity(gammas, args.episodes_per_task).tril(-1).sum(-1)  # with the episodes before (N, K)
    if args.reward_form == "paper":
        return torch.exp(-((before + 1) / args.episodes_per_task).square() / args.sigma)
    k = torch.arange(args.episodes_per_task, device=gammas.device)
    return torch.exp(-0.5 * (before / k.clamp(min=1) / args.sigma).square()) * (k > 0)


def exploration_rewards(data, args):
    """(11) (T, N): the intrinsic reward of an episode, paid at its last real step, and alpha_R times the reward."""
    alive = data["alive"].view(args.episodes_per_task, args.horizon, -1)
    last = alive & ~torch.cat([alive[:, 1:], torch.zeros_like(alive[:, :1])], 1)
    paid = last * intrinsic_rewards(data["gammas"], args).T[:, None]
    return paid.flatten(0, 1) + args.survival_coef * data["rewards"]


def gae(rewards, values, terminated, alive, args):
    """Advantages and value targets of meta-episodes, 2 x (T, N); rewards, terminated, alive (T, N), values (T + 1, N).

    The end of an episode, early or not, is not the end of the task: credit flows on to the next episode, past the idle
    steps. `--time-limit` says how the end of the task counts; an early end of its last episode is always terminal.
    """
    T = len(rewards)
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[0])
    goes_on = alive[-1] & ~terminated[-1] & (args.time_limit != "terminal")
    next_value = torch.where(goes_on, values[T], 0.0)
    for t in reversed(range(T)):
        step = rewards[t] + args.gamma * next_value - values[t] + args.gamma * args.gae_lambda * advantage
        if args.time_limit == "episode" and (t + 1) % args.horizon == 0:
            # The authors' "proper time limits": target = value; after an early end, terminal; no credit from beyond.
            step, advantage, next_value = torch.zeros(3, *step.shape, device=step.device)
        advantage = torch.where(alive[t], step, advantage)
        next_value = torch.where(alive[t], values[t], next_value)
        advantages[t] = advantage
    return advantages, advantages + values[:-1]


def normalise_rewards(rewards, alive, return_norm, args):
    """rewards (T, N) / deviation of the discounted return (updated first), clipped at 10: the authors' VecNormalize."""
    total, returns = torch.zeros_like(rewards[0]), torch.empty_like(rewards)
    for t in range(len(rewards)):
        returns[t] = total = args.gamma * total + rewards[t]
    return_norm.update(returns.view(-1, 1), alive.flatten())
    return (rewards / return_norm.std).clamp(-10, 10)


def meta_weight(blank_values, values, args):
    """(3) w(s, c) = max(0, tanh(V(s) - V(s, c) - zeta))."""
    return torch.relu(torch.tanh(blank_values - values - args.zeta))


def meta_bonus(weight, entropy, args):
    """What beta w S adds to the advantages of an episode's steps (14), weight and entropy (T, N).

    GAE is linear in the rewards: a sum over later steps, discounted by gamma lambda, and so a product with a matrix.
    """
    t = torch.arange(len(weight), device=weight.device)
    discounts = (args.gamma * args.gae_lambda) ** (t - t[:, None]).clamp(min=0)
    return args.beta * (discounts.triu() @ (weight * entropy))


def real_rows(alive):
    """Numbers of the steps that are real. On a GPU, where counting them would wait for the device, of all steps."""
    if alive.device.type == "cpu":
        return alive.flatten().nonzero()[:, 0]
    return torch.arange(alive.numel(), device=alive.device)


def ppo_update(agent, optimizer, data, epochs, minibatches, clip_coef, args, meta=False):
    """Epochs of minibatches of PPO's clipped objective (12), (13) on an iteration's steps. Returns its mean terms.

    data: obs (T, N, S), actions (T, N, .), rewards, terminated, alive (T, N), and Gamma_t (T, N, D) or the contexts
    (P, C) of groups of neighbouring environments. meta: for the task policy, with meta-reward (2) and PFO. Its
    advantages depend on the policy, so that they are found anew for each minibatch (14), unless beta is 0.
    """
    T, N = data["alive"].shape
    rows = real_rows(data["alive"])
    b = {name: data[name].flatten(0, 1)[rows] for name in ("obs", "actions", "alive")}
    alive = b["alive"].float()
    count = alive.sum()
    if meta:
        group = rows % N // (N // len(data["contexts"]))
    else:
        codes = data["codes"].flatten(0, 1)[rows]

    def inputs(index):
        """Of the networks, for these of the rows."""
        if meta:
            return agent.embed(b["obs"][index], agent.extract(data["contexts"])[group[index]])
        return agent.embed(b["obs"][index], agent.extract(codes[index]))

    def by_time(x):  # of the rows, back to (T, N): zeros where there is no real step
        return torch.zeros(T * N, device=x.device).index_copy(0, rows, x * alive).view(T, N)

    everything = slice(None)
    with torch.no_grad():
        x = inputs(everything)
        old_logprobs, _, old_hidden = agent(x, b["actions"])
        old_values = agent.value(x)
        values = by_time(old_values)
        end = torch.zeros_like(values[:1])  # of the task: its value is 0
        base = gae(data["rewards"], torch.cat([values, end]), data["terminated"], data["alive"], args)[0]
        if meta:
            blank = agent.blank(rows.device).expand(len(rows), -1)
            blank_values = agent.value(agent.embed(b["obs"], blank))  # V(s)
            weight = by_time(meta_weight(blank_values, old_values, args))  # of idle steps 0
    log = []
    for _ in range(epochs):
        for index in torch.randperm(len(rows), device=rows.device).tensor_split(minibatches):
            if meta and args.beta:  # the entropy of all steps decides about each one's advantage
                x = inputs(everything)
                logprob, entropy, hidden = agent(x, b["actions"])
                bonus = meta_bonus(weight, by_time(entropy), args)
                advantages = base + (bonus.detach() if args.detach_meta_reward else bonus)
                x, logprob, entropy, hidden = x[index], logprob[index], entropy[index], hidden[index]
            else:
                x, advantages = inputs(index), base
                logprob, entropy, hidden = agent(x, b["actions"][index])
            advantages = advantages.flatten()[rows]
            returns = (advantages + old_values).detach()[index]
            mean = (advantages * alive).sum() / count
            std = ((advantages - mean).square() * alive).sum().div(count).sqrt()
            advantages = ((advantages - mean) / (std + 1e-5))[index]
            w = alive[index] / alive[index].sum().clamp(min=1)
            logratio = logprob - old_logprobs[index]
            ratio = logratio.exp()
            clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
            pg_loss = -(torch.minimum(ratio * advantages, clipped * advantages) * w).sum()
            value = agent.value(x)
            if args.value_loss == "huber":
                near = old_values[index] + (value - old_values[index]).clamp(-clip_coef, clip_coef)
                errors = [F.smooth_l1_loss(v, returns, reduction="none") for v in (value, near)]
                v_loss = 0.5 * (torch.maximum(*errors) * w).sum()
            else:
                v_loss = 0.5 * ((value - returns).square() * w).sum()
            entropy = (entropy * w).sum()
            loss = pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy
            pfo = (hidden - old_hidden[index]) * alive[index, None]
            pfo = pfo.norm() if args.pfo_form == "norm" else pfo.square().mean(1) @ w
            if meta:
                loss = loss + args.pfo_coef * pfo
            descend(optimizer, loss, [agent], args.max_grad_norm, "policy")
            with torch.no_grad():
                approx_kl = ((ratio - 1 - logratio) * w).sum()
                clipfrac = (((ratio - 1).abs() > clip_coef) * w).sum()
                log.append(torch.stack([pg_loss, v_loss, entropy, approx_kl, clipfrac, pfo]))
    terms = dict(zip(("policy", "value", "entropy", "approx_kl", "clipfrac", "pfo"), torch.stack(log).detach().mean(0)))
    if meta:
        terms["meta_weight"] = (weight * data["alive"]).sum() / count
    return terms


# ---------- 7. Buffer ----------


class Buffer:
    """Ring of the last tasks, each with all of its meta-episodes, preallocated on the device, in small exact types.

    Where the environment says so (`integer_obs`, `reward_values`), observations are bytes and rewards are numbers of
    values; a discrete action is one, too.
    """

    def __init__(self, size, envs):
        self.size, self.device = size, envs.device
        self.obs_dim, space = envs.single_observation_space.shape[0], envs.single_action_space
        self.discrete = hasattr(space, "n")
        if self.discrete:  # the number of actions stands for none
            self.one_hot = torch.eye(int(space.n) + 1, int(space.n), device=envs.device)
        self.obs_type = torch.uint8 if getattr(envs, "integer_obs", False) else torch.float32
        values = getattr(envs, "reward_values", None)
        self.values = None if values is None else torch.as_tensor(values, device=envs.device).sort().values
        self.clear()

    def clear(self):
        self.next, self.full, self.store = 0, 0, {}

    def pack(self, tokens, valid):
        """tokens (.., L, X), valid (.., L) -> what is stored of them."""
        obs, action, reward = tokens.split([self.obs_dim, tokens.shape[-1] - self.obs_dim - 1, 1], -1)
        packed = dict(obs=obs.to(self.obs_type), actions=action, rewards=reward[..., 0], valid=valid)
        if self.discrete:
            packed["actions"] = torch.where(action.any(-1), action.argmax(-1), action.shape[-1]).to(torch.uint8)
        if self.values is not None:
            packed["rewards"] = torch.searchsorted(self.values, packed["rewards"].contiguous()).to(torch.uint8)
        return packed

    def unpack(self, packed):
        actions, rewards = packed["actions"], packed["rewards"]
        if self.discrete:
            actions = F.embedding(actions.int(), self.one_hot)
        if self.values is not None:
            rewards = self.values[rewards.int()]
        return dict(tokens=torch.cat([packed["obs"].float(), actions, rewards[..., None]], -1), valid=packed["valid"])

    def add(self, data):
        """data: tokens (P Q, L, X), valid (P Q, L), the Q meta-episodes of a task side by side."""
        rows = self.pack(data["tokens"], data["valid"])
        rows = {name: tensor.view(-1, data["meta_episodes"], *tensor.shape[1:]) for name, tensor in rows.items()}
        n = len(rows["valid"])
        if not self.store:
            self.store = {name: tensor.new_empty(self.size, *tensor.shape[1:]) for name, tensor in rows.items()}
        slots = torch.arange(self.next, self.next + n, device=data["tokens"].device) % self.size
        for name, tensor in self.store.items():
            tensor[slots] = rows[name]
        self.next, self.full = (self.next + n) % self.size, min(self.full + n, self.size)

    def sample(self, batch):
        """`batch` tasks, uniformly with replacement, their meta-episodes in random order: (B, Q, L, .) each."""
        device, Q = self.store["valid"].device, self.store["valid"].shape[1]
        rows = torch.randint(self.full, (batch, 1), device=device)
        order = torch.rand(batch, Q, device=device).argsort(1)
        return self.unpack({name: tensor[rows, order] for name, tensor in self.store.items()})

    def state_dict(self):
        store = {name: tensor[: self.full].to("cpu", copy=True) for name, tensor in self.store.items()}
        return dict(next=self.next, full=self.full, store=store)

    def load_state_dict(self, state):
        self.next, self.full = state["next"], state["full"]
        self.store = {k: v.new_empty(self.size, *v.shape[1:], device=self.device) for k, v in state["store"].items()}
        for name, tensor in state["store"].items():
            self.store[name][: self.full] = tensor


# ---------- 8. Rollouts ----------


def action_input(space, device):
    """What the encoder reads of a policy's actions, a function: one-hot if discrete, clipped to its box else."""
    if hasattr(space, "n"):
        return lambda action: F.one_hot(action, int(space.n)).float()
    low, high = (torch.as_tensor(bound, device=device) for bound in (space.low, space.high))
    return lambda action: torch.maximum(torch.minimum(action, high), low)


def explore(envs, encoder, explorer, args, tasks=None, deterministic=False):
    """One meta-episode of the exploration policy in every environment, from a reset; f_u reads along (Algorithm 4).

    Returns a dict: tokens (N, L, X), valid (N, L), gammas (N, L, D); obs (T, N, S), codes, the Gamma_t that each action
    saw (T, N, D), actions (T, N, .), rewards, terminated, alive (T, N), task (N, G), and env_seconds.
    """
    T, N, S = envs.meta_horizon, envs.num_envs, envs.single_observation_space.shape[0]
    space, device, slots = envs.single_action_space, envs.device, envs.horizon + 1
    A, L = int(space.n) if explorer.discrete else space.shape[0], slots * envs.episodes_per_task
    data = dict(  # made outside inference mode, so that the updates may use them
        tokens=torch.zeros(N, L, S + A + 1, device=device),
        valid=torch.zeros(N, L, device=device, dtype=torch.bool),
        gammas=torch.empty(N, L, args.d_model, device=device),
        obs=torch.empty(T, N, S, device=device),
        actions=torch.zeros(T, N, device=device, dtype=torch.int64)
        if explorer.discrete
        else torch.zeros(T, N, A, device=device),
        rewards=torch.empty(T, N, device=device),
        terminated=torch.zeros(T, N, device=device, dtype=torch.bool),
        alive=torch.ones(T, N, device=device, dtype=torch.bool),
    )
    tokens, valid, gammas, env_seconds = data["tokens"], data["valid"], data["gammas"], 0.0
    read = action_input(space, device)
    with torch.inference_mode():
        obs, info = envs.reset(tasks)
        data["task"] = info["task"].clone()
        caches = encoder.start(N)
        for slot in range(L):
            if slot % slots == 0:
                tokens[:, slot, :S], valid[:, slot], idle = obs, True, False
            else:
                t = slot - slot // slots - 1
                data["obs"][t] = obs
                # All are idle: these slots' codes are masked, and environments ignore the action, here the last one.
                # (A GPU would be waited for.)
                idle = device.type == "cpu" and args.mask_pads and not valid[:, slot - 1].any()
                if not idle:
                    action = explorer.act(obs, explorer.extract(gammas[:, slot - 1]), deterministic)
                start = time.perf_counter()
                obs, reward, terminated, _, info = envs.step(action)
                env_seconds += time.perf_counter() - start
                data["actions"][t], data["rewards"][t], data["terminated"][t] = action, reward, terminated
                if "alive" in info:
                    data["alive"][t] = info["alive"]
                valid[:, slot] = data["alive"][t]
                token = torch.cat([info["final_obs"], read(action), reward[:, None]], -1)
                tokens[:, slot] = token * valid[:, slot, None]
            gammas[:, slot] = 0 if idle else encoder.step(tokens[:, slot], slot, caches, valid)
    codes = gammas.view(N, -1, slots, args.d_model)[:, :, :-1].flatten(1, 2).transpose(0, 1)
    return data | dict(codes=codes, meta_episodes=args.meta_episodes, env_seconds=env_seconds)


def exploit(envs, agent, contexts, args, tasks=None, deterministic=False):
    """One episode of the task policy in every environment, from a reset (Algorithm 5).

    contexts (P, C), of groups of N / P neighbouring environments; None: the true tasks; "blank": no context.
    Returns a dict: obs (T, N, S), actions (T, N, .), rewards, raw_rewards, terminated, alive, success (T, N), contexts
    (P, C), task (N, G), and env_seconds.
    """
    T, N, S = envs.horizon, envs.num_envs, envs.single_observation_space.shape[0]
    device, A = envs.device, () if agent.discrete else envs.single_action_space.shape
    data = dict(
        obs=torch.empty(T, N, S, device=device),
        actions=torch.zeros(T, N, *A, device=device, dtype=torch.int64 if agent.discrete else torch.float32),
        rewards=torch.zeros(T, N, device=device),
        raw_rewards=torch.zeros(T, N, device=device),  # what returns are reported in
        terminated=torch.zeros(T, N, device=device, dtype=torch.bool),
        alive=torch.ones(T, N, device=device, dtype=torch.bool),
        success=torch.zeros(T, N, device=device, dtype=torch.bool),
    )
    env_seconds = 0.0
    with torch.inference_mode():
        obs, info = envs.reset(tasks)
        data["task"] = info["task"].clone()
        if isinstance(contexts, str):
            features = agent.blank(device).expand(N, -1)
        else:
            contexts = data["task"][:: envs.repeat] if contexts is None else contexts
            features = agent.extract(contexts).repeat_interleave(N // len(contexts), 0)
            data["contexts"] = contexts
        for t in range(T):
            data["obs"][t] = obs
            action = agent.act(obs, features, deterministic)
            start = time.perf_counter()
            obs, reward, terminated, _, info = envs.step(action)
            env_seconds += time.perf_counter() - start
            data["actions"][t], data["rewards"][t], data["terminated"][t] = action, reward, terminated
            data["raw_rewards"][t] = info.get("raw_reward", reward)
            for name in ("alive", "success"):
                if name in info:
                    data[name][t] = info[name]
            if device.type == "cpu" and "alive" in info and not (info["alive"] & ~terminated).any():
                data["alive"][t + 1 :] = False  # all are done: the rest of the slot would be idle
                data["obs"][t + 1 :] = obs
                break
    if "contexts" in data:
        data["contexts"] = data["contexts"].clone()  # outside inference mode, so that the updates may use them
    return data | dict(env_seconds=env_seconds)


# ---------- 9. Evaluation ----------


def evaluate(eval_envs, encoder, explorer, agent, args):
    """Every evaluation task of every split, with random numbers of its own (Algorithm 2).

    eval_envs: split -> environments of exploration and of exploitation. Returns scalars by key, and per task the mean
    return, and success, after 0 (no context), 1, .., K episodes of exploration: {split: {task: {"return", "success"}}}.
    With --oracle-context and --no-belief: without context, with it.
    """
    scalars, details = {}, {}
    devices = [torch.cuda.current_device()] if args.cuda else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(args.seed)
        for split, (envs, exploit_envs) in eval_envs.items():
            names = eval_names(envs, args)
            details[split] = {}
            for first in range(0, len(names), envs.num_envs):
                chunk = names[first : first + envs.num_envs]
                padded = chunk + [chunk[-1]] * (envs.num_envs - len(chunk))
                many = [name for name in padded for _ in range(args.eval_episodes)]
                rows = []
                for contexts in contexts_by_episode(envs, encoder, explorer, padded, args):
                    data = exploit(exploit_envs, agent, contexts, args, many, not args.eval_sample)
                    returns = data["raw_rewards"].sum(0).view(-1, args.eval_episodes).mean(1)
                    success = data["success"].any(0).float().view(-1, args.eval_episodes).mean(1)
                    rows.append((returns.tolist(), success.tolist()))
                for i, name in enumerate(chunk):
                    details[split][name] = {"return": [r[i] for r, _ in rows], "success": [s[i] for _, s in rows]}
            for key, word in (("return", "return"), ("success", "success_rate")):
                rows = np.array([detail[key] for detail in details[split].values()])  # (tasks, K + 1)
                for k in range(rows.shape[1]):
                    scalars[f"eval/{split}/{word}_after_{k}"] = float(rows[:, k].mean())
                scalars[f"eval/{split}/{word}"] = float(rows[:, -1].mean())  # with the whole context
                scalars[f"eval/{split}/{word}_adaptation"] = float((rows[:, -1] - rows[:, 0]).mean())
                families = np.array([name.split("/")[0] for name in details[split]])
                if len(set(families)) > 1:
                    for family in dict.fromkeys(families):
                        scalars[f"eval/{split}/{word}/{family}"] = float(rows[families == family, -1].mean())
            if hasattr(envs, "score"):
                returns = {name: detail["return"] for name, detail in details[split].items()}
                for key, value in envs.score(returns).items():  # which counts from 1
                    after = re.sub(r"episode_(\d+)", lambda k: f"after_{int(k[1]) - 1}", key)
                    scalars[f"eval/{split}/{after}"] = value
    return scalars, details


def contexts_by_episode(envs, encoder, explorer, tasks, args):
    """Contexts of the named tasks after 0, 1, .., K episodes of exploration, each (N, C)."""
    yield "blank"
    if args.no_belief:
        yield torch.zeros(len(tasks), 1, device=envs.device)
    elif args.oracle_context:
        yield envs.reset(tasks)[1]["task"]
    else:
        data = explore(envs, encoder, explorer, args, tasks, not args.eval_sample)
        for k in range(1, args.episodes_per_task + 1):
            valid = data["valid"].clone()
            valid[:, k * (args.horizon + 1) :] = False  # as if the other episodes had not been played
            tokens = data["tokens"] * valid.unsqueeze(-1)
            yield encoder.task_context(tokens, valid, encoder.gammas(tokens, valid))


def eval_names(envs, args):
    """The evaluation tasks of a split: the first `--eval-tasks` of each family, 0 = all."""
    by_family = {}
    for name in envs.tasks:
        by_family.setdefault(name.split("/")[0], []).append(name)
    return [name for names in by_family.values() for name in names[: args.eval_tasks or None]]


def make_eval_envs(args, device, splits=SPLITS):
    """Evaluation environments by split, the last one first: of exploration and, --eval-episodes for each, exploitation.

    No train split where test holds the same tasks, nor for the oracle, which trains on test.
    """
    made = {}
    for split in reversed(splits):
        if split == "train" and (args.oracle_context or getattr(made["test"][0], "same_splits", False)):
            break
        envs = make_args_envs(args, 1, split, device)
        count = len(eval_names(envs, args))
        envs.close()
        size = math.ceil(count / math.ceil(count / 36))  # rounds of equal size
        one = dict(episodes_per_task=1)
        made[split] = [
            make_args_envs(args, size, split, device),
            make_args_envs(args, size * args.eval_episodes, split, device, **one),
        ]
    return made


def make_args_envs(args, num_envs, split, device, **sizes):
    sizes = dict(horizon=args.horizon or None, episodes_per_task=args.episodes_per_task or None) | sizes
    rules = dict(reward_version=args.reward_version, split_rule=args.split_rule)
    sessions = dict(sessions=args.sessions, session_process=args.session_process)
    return make_envs(args.env_id, num_envs, split, args.seed, device, **rules, **sessions, **sizes)


def draw_pictures(folder, eval_envs, encoder, explorer, args):
    """Contexts of the test tasks in two dimensions (Figure 9), similarities of exploration episodes, and the curves."""
    folder = Path(folder)
    losses = ("rec", "task_rec", "contrastive", "regulariser")
    keys = [f"losses/encoder_{name}" for name in losses] + ["charts/exploration_return", "charts/episodic_return"]
    if (folder / "metrics.csv").exists():
        draw_curves(folder / "curves.png", folder, keys + ["eval/test/return", "eval/test/return_adaptation"])
    if args.oracle_context or args.no_belief:
        return
    envs = eval_envs["test"][0]
    names = [*{name.split("#")[0]: name for name in reversed(eval_names(envs, args))}.values()][::-1]  # a task once
    names = [names[i * len(names) // envs.num_envs] for i in range(envs.num_envs)]
    contexts, cosines = [], 0
    with torch.no_grad():
        for _ in range(8):  # meta-episodes of each task
            data = explore(envs, encoder, explorer, args, names)
            contexts.append(encoder.task_context(data["tokens"], data["valid"], data["gammas"]))
            cosines = cosines + similarity(data["gammas"], args.episodes_per_task) / 8
    names = [name.split("#")[0] for name in names]
    first = [names.index(name) for name in dict.fromkeys(names)]
    draw_contexts(folder / "contexts.png", torch.stack(contexts).cpu().numpy(), names)
    draw_similarity(folder / "similarity.png", cosines[first].cpu().numpy(), [names[i] for i in first])


def capture_video(folder, eval_envs, encoder, explorer, agent, args):
    """Films the first evaluation task of each family, after exploration: video_<family>.gif.

    Raises BadInput on machines where nothing can draw.
    """
    envs, exploit_envs = eval_envs["test"]
    families = dict.fromkeys(name.split("/")[0] for name in envs.tasks)
    for family in families:
        name = next(name for name in envs.tasks if name.split("/")[0] == family)
        *_, contexts = contexts_by_episode(envs, encoder, explorer, [name] * envs.num_envs, args)
        many = [name] * exploit_envs.num_envs
        data = exploit(exploit_envs, agent, contexts, args, many, not args.eval_sample)
        file = Path(folder) / f"video_{family}.gif"
        replayed = exploit_envs.film(name, 0, data["actions"][:, 0].cpu().numpy(), file)
        same = np.array_equal(replayed, data["rewards"][:, 0].cpu().numpy())
        print(file, "" if same else "(its rewards are not those of the evaluation)")


# ---------- 10. Checkpoint and metrics ----------


def save_checkpoint(path, state):
    """Atomic: a reader finds the old file or the new one, whole; the one before it stays as <name>.previous.

    Raises OSError where the disk is full, say; then both are as they were.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of what the file says
        temporary.unlink(missing_ok=True)
        raise OSError(f"is the disk full? {str(error).splitlines()[0]}") from error
    if path.exists():
        link = path.with_name(path.name + ".link")
        try:
            link.unlink(missing_ok=True)
            os.link(path, link)
            os.replace(link, path.with_name(path.name + ".previous"))
        except OSError:
            pass  # a file system without links keeps the last one alone
    os.replace(temporary, path)


@contextlib.contextmanager
def on_disk(what, step):
    """A disk that is full or gone says so, and training goes on: what was saved before stays as it is."""
    try:
        yield
    except OSError as error:
        tqdm.write(f"{what} not saved at step {step}: {error}")


def missing_space(folder, size):
    """Bytes that lack for three checkpoints of `size` bytes: the last, the one before, the next one. At least 0."""
    free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in folder.glob("checkpoint.pt*"))
    return max(0, 3 * size - free)


def load_checkpoint(path, device="cpu"):
    """The state saved at `path`. Raises BadInput where there is none, or not one of this script."""
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except FileNotFoundError:
        raise BadInput(f"no checkpoint at {path}") from None
    except Exception as error:  # whatever a truncated or foreign file makes of the unpickler
        raise BadInput(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or state.get("script") != SCRIPT:
        script = state.get("script") if isinstance(state, dict) else None
        raise BadInput(f"{path} is a checkpoint of {script or 'another program'}, not of {SCRIPT}")
    odd = set(state) ^ {"script", "args", "iteration", "global_step", "metrics_bytes", "processes", *PARTS}
    if odd:
        raise BadInput(f"{path} is not a whole checkpoint, or more than one: {', '.join(sorted(odd))}")
    odd = set(state["args"]) ^ {field.name for field in fields(Args)}
    if odd:
        raise BadInput(f"{path} comes from another version of {SCRIPT}: arguments differ in {', '.join(sorted(odd))}")
    return state


def weights(module):
    """Parameters and normalisers, one vector."""
    return torch.cat([x.flatten().float() for x in module.state_dict().values()])


def load_modules(path, state, modules):
    """Loads each module's state. Raises BadInput for another architecture."""
    for name, module in modules.items():
        try:
            module.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            detail = " ".join(str(error).split())[:200]
            raise BadInput(f"{path} does not fit these arguments: {name}: {detail}") from error


class Metrics:
    """metrics.csv (step, key, value), TensorBoard and, with --track, Weights & Biases: the same keys."""

    def __init__(self, folder, args, offset, step):
        if not (folder / "metrics.csv").exists():  # a run resumed in another folder
            offset = 0
        self.file = open(folder / "metrics.csv", "r+" if offset else "w", newline="")
        offset = min(offset, os.fstat(self.file.fileno()).st_size)
        self.file.truncate(offset)  # rows after the checkpoint come again: none is lost or doubled
        self.file.seek(offset)
        self.csv = csv.writer(self.file)
        if not offset:
            self.csv.writerow(("global_step", "key", "value"))
        self.board = SummaryWriter(folder, purge_step=step + 1 if offset else None)
        self.wandb = None
        if args.track:
            import wandb

            self.wandb = wandb.init(project="meta-rl", name=folder.name, config=asdict(args), dir=folder)
            self.wandb.define_metric("*", step_metric="global_step")

    def write(self, scalars, step):
        if self.wandb:
            self.wandb.log({**scalars, "global_step": step})
        for key, value in scalars.items():
            self.csv.writerow((step, key, repr(float(value))))
            self.board.add_scalar(key, value, step)
        self.file.flush()

    def close(self):
        if self.wandb:
            self.wandb.finish()
        with contextlib.suppress(OSError):  # a full disk: said before
            self.board.close()
            self.file.close()


# ---------- 11. Main ----------


def explores(args):
    """Whether there is a phase 1 in this run."""
    return not (args.oracle_context or args.no_belief or args.explored)


def memory_needed(args, buffer_bytes, token_dim):
    """Bytes of phase 1, roughly: of the weights (with Adam and the target), the buffer, and one update's batch."""
    length, size = (args.horizon + 1) * args.episodes_per_task, args.d_model
    block = 4 * size**2 + 2 * size * args.feed_forward
    encoder = (2 * args.num_layers + 2) * block + 2 * token_dim * size
    heads = (args.meta_episodes + 1) * length * size * 128  # the first matrices of h_t-rec: the rest is small
    sequences = 2 * args.belief_batch * args.meta_episodes  # masked and not
    kept = 2 if args.recompute else 2 * args.num_layers  # blocks whose activations wait for the backward pass
    floats = sequences * length * ((kept + 2) * (14 * size + 2 * args.feed_forward) + 2 * args.num_layers * size)
    masks = 3 * sequences * length**2  # of f_u, as booleans and as numbers
    return dict(
        weights=4 * (4 * encoder + 5 * heads), buffer=buffer_bytes, batch=floats * (2 if args.cuda else 4) + masks
    )


def free_memory(device):
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(needed, free):
    """Prints the sizes; BadInput where they do not fit."""
    text = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needed.items())
    if sum(needed.values()) > free:
        raise BadInput(
            f"phase 1 needs some {sum(needed.values()) / 1e9:.1f} GB ({text}), and {free / 1e9:.1f} GB are free: "
            "choose a smaller --buffer-size, --belief-batch or --meta-episodes, or --recompute"
        )
    print(f"memory of phase 1: {text}; {free / 1e9:.1f} GB free")


def explore_iteration(parts, envs, buffer, iteration, args):
    """One of phase 1 (Algorithms 3 and 4): data of P tasks, updates of the encoder, one of the exploration policy.

    Returns scalars and losses by key, and the number of real steps.
    """
    encoder, heads, target, explorer = (parts[name] for name in ("encoder", "heads", "target", "explorer"))
    clock = [time.perf_counter()]
    data = explore(envs, encoder, explorer, args)
    check_finite(observation=data["obs"], token=data["tokens"], reward=data["rewards"])
    clock.append(time.perf_counter())
    buffer.add(data)
    losses = []
    for _ in range(args.belief_updates):
        batch = buffer.sample(args.belief_batch)
        contrast = iteration > args.contrastive_warmup
        loss, terms = encoder_loss(encoder, heads, target, batch, buffer.obs_dim, args, contrast)
        descend(parts["belief_optimizer"], loss, [encoder, heads], 0, "encoder")
        losses.append(torch.stack([*terms.values()]))
    losses = {f"encoder_{name}": value for name, value in zip(terms, torch.stack(losses).mean(0))}
    if iteration % args.nu == 0:
        target.load_state_dict(heads.task_rec.state_dict())
    clock.append(time.perf_counter())
    paid = intrinsic_rewards(data["gammas"], args)
    if iteration > args.initial_iterations:
        data["rewards"] = exploration_rewards(data, args)
        sizes = args.explore_epochs, args.explore_minibatches, args.explore_clip_coef
        terms = ppo_update(explorer, parts["explore_optimizer"], data, *sizes, args)
        losses |= {f"explore_{name}": value for name, value in terms.items()}
    clock.append(time.perf_counter())
    seconds = np.diff(clock)
    scalars = {"charts/exploration_return": paid.sum(1).mean(), "time/env": data["env_seconds"] / seconds.sum()}
    scalars |= dict(zip(("time/rollout", "time/belief", "time/ppo"), seconds / seconds.sum()))
    return scalars, losses, data["alive"].sum()


def task_iteration(parts, envs, exploit_envs, iteration, args):
    """One of phase 2 (Algorithm 5): P tasks, an exploration meta-episode and some episodes of the task policy in each.

    Returns scalars and losses by key, and the number of real steps.
    """
    agent = parts["agent"]
    clock, contexts, steps = [time.perf_counter()], None, 0
    if args.no_belief:
        contexts = torch.zeros(args.num_envs, 1, device=exploit_envs.device)
    elif not args.oracle_context:  # both kinds of environments draw the same tasks: their resets have the same number
        exploit_envs.load_state_dict(envs.state_dict())
        explored = explore(envs, parts["encoder"], parts["explorer"], args)
        with torch.no_grad():
            contexts = parts["encoder"].task_context(explored["tokens"], explored["valid"], explored["gammas"])
        steps = explored["alive"].sum()
    data = exploit(exploit_envs, agent, contexts, args)
    check_finite(observation=data["obs"], context=data["contexts"], reward=data["rewards"])
    returns, success = data["raw_rewards"].sum(0).mean(), data["success"].any(0).float().mean()
    clock.append(time.perf_counter())
    if args.norm_reward:
        data["rewards"] = normalise_rewards(data["rewards"], data["alive"], agent.return_norm, args)
    sizes = args.update_epochs, args.num_minibatches, args.clip_coef
    losses = ppo_update(agent, parts["optimizer"], data, *sizes, args, meta=True)
    # The normalisers move between updates and rollouts, so that a rollout and its update see the same inputs.
    if args.norm_inputs:
        agent.obs_norm.update(data["obs"].flatten(0, 1), data["alive"].flatten())
        agent.context_norm.update(data["contexts"], torch.ones_like(data["contexts"][:, 0], dtype=torch.bool))
    clock.append(time.perf_counter())
    seconds = np.diff(clock)
    scalars = {"charts/episodic_return": returns, "charts/success_rate": success}
    scalars |= dict(zip(("time/rollout", "time/ppo"), seconds / seconds.sum()))
    scalars |= {"time/env": data["env_seconds"] / seconds.sum()}
    return scalars, losses, steps + data["alive"].sum()


def main(args):
    torch.set_num_threads(cores())  # the transformers are large
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun --nproc-per-node
        raise BadInput("laser.py runs in one process: z is a code of all tasks of a batch")
    check_args(args)
    device = torch.device("cuda") if args.cuda else torch.device("cpu")
    state = load_checkpoint(args.resume or args.evaluate) if args.resume or args.evaluate else None  # on the CPU
    name = f"{args.env_id.replace(':', '.')}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.run_dir or f"runs/{name}")
    split = "test" if args.oracle_context else "train"
    envs = make_args_envs(args, args.num_envs, split, device)  # those of phase 2's exploration
    made, eval_envs = [envs], {}
    try:
        for name in ("horizon", "episodes_per_task"):
            if getattr(args, name) not in (0, getattr(envs, name)):
                raise BadInput(
                    f"{flag(name)} {getattr(args, name)}: {args.env_id} has {getattr(envs, name)} of its own"
                )
            setattr(args, name, getattr(envs, name))
        args.sessions, args.session_process = getattr(envs, "sessions", 0), getattr(envs, "session_process", "")
        check_args(args)
        if not hasattr(envs, "repeat"):
            raise BadInput(f"laser.py needs environments with `repeat`, and those of {args.env_id} have none")
        if hasattr(envs, "sessions"):
            raise BadInput(f"laser.py: a context is of one task, and {args.env_id} has sessions")
        exploit_envs = make_args_envs(args, args.num_envs * args.exploit_episodes, split, device, episodes_per_task=1)
        exploit_envs.repeat = args.exploit_episodes
        made.append(exploit_envs)
        many_envs = None
        if explores(args):
            many_envs = make_args_envs(args, args.num_envs * args.meta_episodes, split, device)
            many_envs.repeat = args.meta_episodes
            made.append(many_envs)
        if args.evaluate or args.eval_interval >= 0:
            eval_envs = make_eval_envs(args, device, getattr(envs, "splits", SPLITS))
            made += [one for both in eval_envs.values() for one in both]
        if args.capture_video and not hasattr(eval_envs["test"][1], "film"):
            raise BadInput(f"--capture-video: {args.env_id} has no camera (Meta-World and ScratchItch have one)")
        train(args, envs, exploit_envs, many_envs, eval_envs, device, folder, state)
    finally:
        for one in made:
            one.close()


def train(args, envs, exploit_envs, many_envs, eval_envs, device, folder, state):
    torch.manual_seed(args.seed)
    S, space = envs.single_observation_space.shape[0], envs.single_action_space
    A, length = int(space.n) if hasattr(space, "n") else space.shape[0], (args.horizon + 1) * args.episodes_per_task
    context_dim = length * args.d_model
    if args.oracle_context or args.no_belief:  # naming the tasks draws none
        named = envs.reset(tasks=[envs.tasks[0]] * envs.num_envs)[1]["task"]
        context_dim = named.shape[1] if args.oracle_context else 1
    encoder, explorer = Encoder(args, S + A + 1).to(device), explore_agent(args, S, space).to(device)
    agent = task_agent(args, S, space, context_dim).to(device)
    phase_1 = args.explore_iterations * explores(args)  # iterations
    exploring = (state["iteration"] if state else 0) < phase_1 and not args.evaluate
    buffer = Buffer(min(args.buffer_size, phase_1 * args.num_envs), envs)
    heads, target = nn.Identity(), nn.Identity()  # those of phase 1 are not needed any more
    disk = 0  # bytes
    if exploring:
        row = buffer.pack(torch.zeros(1, length, S + A + 1, device=device), torch.ones(1, length, device=device) > 0)
        needed = memory_needed(args, buffer.size * args.meta_episodes * sum(x.nbytes for x in row.values()), S + A + 1)
        check_memory(needed, free_memory(device))
        disk = needed["buffer"] + needed["weights"]
        heads = Heads(args, S + A + 1, length).to(device)
        target = deepcopy(heads.task_rec).requires_grad_(False)
    learned = [*encoder.parameters(), *heads.parameters()]
    belief_optimizer = torch.optim.Adam(learned, lr=args.belief_learning_rate, fused=True)
    explore_optimizer = torch.optim.Adam(explorer.parameters(), lr=args.explore_learning_rate, eps=1e-8, fused=True)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-8, fused=True)
    modules = encoder, heads, target, explorer, agent, belief_optimizer, explore_optimizer, optimizer
    parts = dict(zip(PARTS, modules))
    del heads, target, belief_optimizer, modules, learned
    own = dict(buffer=buffer, envs=envs, exploit_envs=exploit_envs) | (dict(many_envs=many_envs) if many_envs else {})
    if args.compile:
        for transformer in (encoder.f_u, encoder.f_b):
            transformer.forward = torch.compile(transformer.forward)

    if args.evaluate:
        load_modules(args.evaluate, state, {name: parts[name] for name in ("encoder", "explorer", "agent")})
        scalars, details = evaluate(eval_envs, encoder, explorer, agent, args)
        for key, value in scalars.items():
            print(f"{key:<48} {value:.4f}")
        folder.mkdir(parents=True, exist_ok=True)
        write_evaluation(folder, state["global_step"], scalars, details)
        draw_pictures(folder, eval_envs, encoder, explorer, args)
        if args.capture_video:
            capture_video(folder, eval_envs, encoder, explorer, agent, args)
        return

    iteration, global_step, offset = 0, 0, 0
    if args.explored and not state:
        explored = load_checkpoint(args.explored)
        if not explores(argparse.Namespace(**explored["args"])):
            raise BadInput(f"--explored {args.explored}: that run has no phase 1 of its own")
        if explored["iteration"] < explored["args"]["explore_iterations"]:
            raise BadInput(
                f"--explored {args.explored} is in its phase 1, at iteration {explored['iteration']} of "
                f"{explored['args']['explore_iterations']}: --resume it first"
            )
        check_sizes(args.explored, explored, args)
        load_modules(args.explored, explored, dict(encoder=encoder, explorer=explorer))
        explored = None
    if state:
        check_sizes(args.resume, state, args)
        for name in (
            "env_id num_envs horizon episodes_per_task buffer_size reward_version split_rule sessions session_process "
            "explore_iterations oracle_context no_belief explored exploit_episodes"
        ).split():
            if getattr(args, name) != state["args"][name]:
                raise BadInput(
                    f"{flag(name)} {getattr(args, name)}: {args.resume} was saved with {state['args'][name]}"
                )
        mine = state["processes"][0]
        if not {"rng", *own} <= mine.keys():
            raise BadInput(
                f"{args.resume} is not a whole checkpoint: a process lacks {', '.join({'rng', *own} - mine.keys())}"
            )
        load_modules(args.resume, state | mine, parts | own)
        iteration, global_step, offset = state["iteration"], state["global_step"], state["metrics_bytes"]
        torch.set_rng_state(mine["rng"].cpu())
        if args.cuda and "cuda_rng" in mine:
            torch.cuda.set_rng_state(mine["cuda_rng"].cpu())
    state = mine = None
    saved = folder / "checkpoint.pt"
    if saved.exists() and not (args.resume and folder.samefile(Path(args.resume).parent)):
        raise BadInput(f"{folder} holds a run already: --resume {saved}, or choose another --run-dir")
    versions = {package: version(package) for package in ("torch", "mujoco", "metaworld", "gymnasium", "numpy")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(dict(script=SCRIPT, **asdict(args), versions=versions), indent=2)
        (folder / "config.json").write_text(config)
    except OSError as error:
        raise BadInput(f"cannot write to the run's folder: {error}") from error
    missing = missing_space(folder, disk)
    if missing > 0:
        raise BadInput(
            f"{folder} lacks {missing / 1e6:,.0f} MB for its checkpoints: free some, choose another "
            "--run-dir or a smaller --buffer-size"
        )
    iterations = max(1, phase_1 + args.task_iterations)
    metrics = Metrics(folder, args, offset, global_step)

    signals = []  # the first SIGINT or SIGTERM ends the run after this iteration, saved; the second one at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: os._exit(128 + n) if signals else signals.append(n))
    done, total = (iteration, phase_1) if iteration < phase_1 else (iteration - phase_1, iterations - phase_1)
    progress = tqdm(total=total, initial=done, unit=" iterations", mininterval=1)  # of one phase, then of the other
    started, first_step, results, details, stop = time.time(), global_step, {}, None, False
    first_iteration = iteration

    try:
        while iteration < iterations and not stop:
            iteration += 1
            exploring = iteration <= phase_1
            left = 1 - (iteration - 1 - phase_1) / max(1, args.task_iterations)
            optimizer.param_groups[0]["lr"] = args.learning_rate * (left if args.anneal_lr else 1)
            explore_optimizer.param_groups[0]["lr"] = args.explore_learning_rate
            parts["belief_optimizer"].param_groups[0]["lr"] = args.belief_learning_rate
            if exploring:
                scalars, losses, steps = explore_iteration(parts, many_envs, buffer, iteration, args)
                if iteration == phase_1:  # (Algorithm 1, line 7): z^, of five batches; from now on it is fixed
                    with torch.no_grad():
                        batches = (buffer.sample(args.belief_batch) for _ in range(5))
                        batches = ([x.flatten(0, 1) for x in batch.values()] for batch in batches)
                        z = [encoder.shared(encoder.latents(*batch)[1]) for batch in batches]
                    encoder.z_hat.copy_(torch.stack(z).mean(0))
                    # Nothing of phase 1 takes memory, or a checkpoint's place, in phase 2.
                    buffer.clear()
                    adam = torch.optim.Adam(encoder.parameters(), lr=args.belief_learning_rate, fused=True)
                    parts |= dict(heads=nn.Identity(), target=nn.Identity(), belief_optimizer=adam)
            else:
                scalars, losses, steps = task_iteration(parts, envs, exploit_envs, iteration, args)
            before, global_step = global_step, global_step + int(steps)
            if args.total_timesteps and global_step >= args.total_timesteps:
                iterations = iteration

            progress.update()
            progress.set_description("phase 1" if iteration < phase_1 else "phase 2", refresh=False)
            if iteration == phase_1 < iterations:
                progress.reset(iterations - phase_1)
            if exploring and iteration == first_iteration + 5:
                seconds = (time.time() - started) / 5 * (phase_1 - iteration)
                tqdm.write(f"phase 1 will take another {tqdm.format_interval(seconds)}, as its first iterations go")
            if global_step // LOG_EVERY > before // LOG_EVERY or iteration in (phase_1, iterations):
                scalars |= {f"losses/{key}": value for key, value in losses.items()}
                scalars = {key: float(value) for key, value in scalars.items()}
                scalars |= {"charts/SPS": (global_step - first_step) / (time.time() - started)}
                scalars |= {"charts/iteration": iteration, "charts/phase": 1 if exploring else 2}
                with on_disk("metrics", global_step):
                    metrics.write(scalars, global_step)
                shown = dict(exploration_return="explored", episodic_return="return", success_rate="success")
                results |= {word: scalars[f"charts/{k}"] for k, word in shown.items() if f"charts/{k}" in scalars}
                progress.set_postfix({key: f"{value:.2f}" for key, value in results.items()})
            due = not exploring and args.eval_interval > 0 and (iteration - phase_1) % args.eval_interval == 0
            if eval_envs and not exploring and (due or iteration == iterations):
                scalars, details = evaluate(eval_envs, encoder, explorer, agent, args)
                with on_disk("evaluation", global_step):
                    metrics.write(scalars, global_step)
                    write_evaluation(folder, global_step, scalars, details)
                results |= {"test return": scalars["eval/test/return"]}
                results |= {"adaptation": scalars["eval/test/return_adaptation"]}
            due = args.checkpoint_interval > 0 and iteration % args.checkpoint_interval == 0
            stop = len(signals) > 0
            if due or stop or iteration == iterations:
                check_finite(
                    weights_of_the_policy=weights(agent),
                    weights_of_the_exploration_policy=weights(explorer),
                    weights_of_the_encoder=weights(encoder),
                )
                mine = {key: part.state_dict() for key, part in own.items()} | dict(rng=torch.get_rng_state())
                if args.cuda:
                    mine["cuda_rng"] = torch.cuda.get_rng_state()
                state = {key: part.state_dict() for key, part in parts.items()} | dict(processes=[mine])
                state |= dict(script=SCRIPT, args=asdict(args), iteration=iteration, global_step=global_step)
                with on_disk("checkpoint", global_step):
                    state |= dict(metrics_bytes=metrics.file.tell())
                    save_checkpoint(folder / "checkpoint.pt", state)
                state = mine = None
    except FloatingPointError as error:
        raise FloatingPointError(f"iteration {iteration}: {error}; the last checkpoint stands") from None
    finally:
        progress.close()
        metrics.close()
    if details and iteration == iterations:
        with on_disk("pictures", global_step):
            draw_pictures(folder, eval_envs, encoder, explorer, args)
    print(f"{global_step} steps in {time.time() - started:.0f} s: {folder}")


def check_sizes(path, state, args):
    """BadInput where the encoder of a checkpoint was made for other sizes; z's head reads B, Q and K alone."""
    for name in ENCODERS:
        if getattr(args, name) != state["args"][name]:
            what = "z head" if name in ("meta_episodes", "episodes_per_task", "belief_batch") else "encoder"
            raise BadInput(f"{flag(name)} {getattr(args, name)}: the {what} of {path} is for {state['args'][name]}")


def write_evaluation(folder, step, scalars, details):
    text = json.dumps(dict(global_step=step, **scalars, tasks=details), indent=1)
    (Path(folder) / "eval.json").write_text(text)


if __name__ == "__main__":
    try:
        main(parse_args())
    except BadInput as error:
        print(f"{SCRIPT}.py: {error}", file=sys.stderr)
        sys.exit(2)
    except (WorkerError, FloatingPointError, OSError) as error:  # the last checkpoint stands
        print(*getattr(error, "__notes__", ()), f"{SCRIPT}.py: {error}", sep="\n", file=sys.stderr)
        sys.exit(1)
