"""DynaMITE-RL: meta-RL for a latent context that changes within an episode (Liang et al., 2024).

An episode is a row of sessions: within one the latent context m is fixed, between two it moves by p(m' | m), and when
it does is not observed. VariBAD with three changes: the encoder also predicts where sessions end, and reads, through
the next session, the last belief of the one before (conditioning); a belief decodes the transitions of its own session
alone (session reconstruction); within a session beliefs must not drift away from its last one (consistency).

The paper does not say how the head of session ends is trained; here it learns from the simulator's true ends, which the
belief's loss divides meta-episodes by, too: privileged labels, in training alone (ours). Rollouts follow predictions.

Shapes: T steps of a meta-episode, N environments, B batch, S observation, A action, Z latent, D hidden; time-major.
In the belief's loss the columns are sessions: J of them in a batch, L steps in the longest, posteriors 0 .. L each.

    python dynamite_rl.py --env-id GridWorldAlternating     # every preset is a default: --help shows it
    python dynamite_rl.py --no-consistency                  # and --no-conditioning, --no-session-reconstruction
    python dynamite_rl.py --resume runs/.../checkpoint.pt
    python dynamite_rl.py --evaluate runs/.../checkpoint.pt
    python dynamite_rl.py --evaluate runs/.../checkpoint.pt --episodes-per-task 5 --run-dir five    # Figure 6
    python -m common.plot runs/* --boxes sessions                                       # Figure 8

Equation (of the paper)                                          function
    inference network q(m^i, d | tau_:t, m^i-1), Figure 3        Encoder, BeliefModel
    (3) ELBO of all sessions, Appendix A                         elbo
    (4) consistency                                              consistency
    (5) session reconstruction                                   split_sessions, elbo, reconstruction
    (6), (7) the whole objective (the sign of (4) corrected)     elbo
    p(m^i+1 | m^i), its KL                                       BeliefModel.session_prior, elbo
    Algorithm 3                                                  BeliefModel.next_session, rollout
    Algorithms 1 and 2, PPO                                      train, Agent, gae, ppo_update
"""

import argparse
import contextlib
import csv
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.envs import SPLITS, BadInput, make_envs
from common.envs.workers import WorkerError
from common.gru import GRU
from common.plot import draw_lines, draw_sessions

SCRIPT = Path(__file__).stem
LOG_EVERY = 10_000  # steps between two rows of metrics; evaluations are logged whenever they happen
SESSIONS_SHOWN = 10  # returns of the first ten sessions are logged
PARTS = ("agent", "model", "optimizer", "belief_optimizer")  # what a checkpoint holds beside counters and `processes`


# ---------- 3. Arguments and presets ----------


@dataclass
class Args:
    # experiment
    # GridWorldAlternating, Reacher, HalfCheetahDirSessions, HalfCheetahVelSessions, HalfCheetahWindVelSessions,
    # ScratchItch, any of varibad.py's (a meta-episode is one session then), or package.module:factory.
    env_id: str = "GridWorldAlternating"
    seed: int = 1  # of tasks, networks and actions
    cuda: bool = False  # train on the GPU, with the paper's sizes and steps where a CPU's preset has its own
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline works)
    total_timesteps: int = 20_000_000  # environment steps, summed over environments (ours)
    num_envs: int = 16  # environments stepped together (N)
    horizon: int = 60  # steps of an episode (H), with all its sessions; 0 = the environment's own
    episodes_per_task: int = 1  # episodes of a meta-episode (K), which is an iteration; 0 = the environment's own
    eval_interval: int = 500  # iterations between evaluations; 0 = only at the end; negative = never
    eval_tasks: int = 0  # evaluation tasks per family, the first ones; 0 = all
    checkpoint_interval: int = 500  # iterations between checkpoints; 0 = only at the end
    run_dir: str = ""  # folder of this very run; empty = runs/<env>__<script>__<seed>__<time>
    resume: str = ""  # checkpoint to continue from, with its arguments; those given beside it override
    evaluate: str = ""  # checkpoint to evaluate: prints the results and writes eval.json beside it, trains nothing
    eval_sample: bool = False  # evaluate with sampled actions and latents in place of the most likely ones
    capture_video: bool = False  # with --evaluate: a film of one held-out task of each family (Meta-World, ScratchItch)
    compile: bool = False  # torch.compile the networks of the rollout and of PPO; the first iteration takes a minute
    reward_version: Literal["v1", "v2"] = "v2"  # Meta-World's reward functions
    split_rule: Literal["varibad", "ldm"] = "varibad"  # MuJoCo: train = test, or LDM's disjoint sets (its Table 1)
    sessions: int = 0  # sessions of an episode, where the environment has them; 0 = the environment's own
    session_process: Literal["", "fixed", "poisson", "bernoulli"] = ""  # their lengths; empty = the environment's own

    # PPO
    learning_rate: float = 3e-4  # Adam's step size for actor and critic
    anneal_lr: bool = False  # let it fall linearly to 0
    gamma: float = 0.99  # discount per step, over the whole meta-episode
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimate
    # task: the end of a meta-episode bootstraps from its last state; terminal: its value is 0 (the paper's horizon is
    # finite); episode: no credit flows from one episode to the next (variBAD's code, elsewhere).
    time_limit: Literal["task", "terminal", "episode"] = "terminal"
    update_epochs: int = 4  # passes over an iteration's steps (ours; the paper does not say)
    num_minibatches: int = 4  # gradient steps per pass (ours)
    clip_coef: float = 0.2  # epsilon of the clipped ratio and value
    ent_coef: float = 0.01  # weight of the entropy bonus at the start
    ent_coef_end: float = 0.01  # and at the end: linear in between
    vf_coef: float = 0.5  # weight of the value loss
    value_loss: Literal["clipped", "mse"] = "mse"  # 1/2 squared error (ours), or clipped as PPO's [paper]
    max_grad_norm: float = 0.5  # clip of the norm of the policy's gradient; 0 = off
    joint_clip: bool = False  # one norm for actor and critic; else one for each, as the critic's is the larger (ours)
    norm_reward: bool = True  # divide the policy's rewards by the deviation of the discounted return, clip at 10 (ours)
    policy_layers: tuple[int, ...] = (128, 128)  # hidden layers (ReLU) of actor and critic
    # Training moves the states of a meta-episode by a random constant, this times the deviation of first states: so
    # that nothing tells the few training tasks by where things happen to stand (ours).
    obs_shift: float = 0.0
    std_init: float = 1.0  # deviation of a continuous action at the start (ours, as its bounds)
    std_min: float = 0.01  # its lower bound, reached softly
    std_max: float = 2.0  # its upper bound

    # belief model
    no_belief: bool = False  # zeros in place of the belief: the floor that any claim of adaptation has to beat
    oracle_context: bool = False  # the true context in place of the belief: the ceiling
    belief_warmup: int = 0  # steps for which the policy sees zeros while the belief model learns (ours)
    belief_learning_rate: float = 3e-4  # Adam's step size for encoder and decoders
    belief_anneal_lr: bool = False  # let it fall linearly to 0, so that the belief settles (ours)
    belief_updates: int = 3  # gradient steps per iteration (ours)
    belief_batch: int = 25  # meta-episodes per gradient step (B) (ours)
    belief_max_grad_norm: float = 2.0  # clip of the gradient's norm, for each of encoder and decoders; 0 = off (ours)
    buffer_size: int = 10_000  # meta-episodes kept for the belief model; as many as --num-envs: on-policy (ours)
    precollect: int = 10_000  # steps before the first gradient step (ours); the policy's waits for iteration 2, too
    action_embed: int = 8  # embedding of the action in encoder and decoders; 0 = not an input
    state_embed: int = 8  # embedding of the state
    reward_embed: int = 8  # embedding of the reward (encoder)
    encoder_layers: tuple[int, ...] = (64, 64)  # hidden layers (ReLU) between embeddings and GRU; none = variBAD's
    hidden_dim: int = 64  # units of the encoder's GRU (D) (ours; the paper does not say)
    latent_dim: int = 5  # dimension of the latent (Z)
    tbptt: int = 0  # steps of a window of truncated back-propagation through time; 0 = whole meta-episode
    elbo_terms: int = 0  # posteriors drawn per session, as long as the batch's longest; 0 = all
    decode_terms: int = 0  # transitions drawn per session, likewise; those behind a session's end do not count; 0 = all
    decode_window: Literal["all", "future"] = "all"  # transitions of its session that m_t decodes: all [paper], to come
    # The squared error of the reward of (m, s, a, s') or of (m, s'), or one Bernoulli per grid cell (multihead). The
    # paper's decoder has no s'; the grid's rewards depend on it (ours).
    reward_decoder: Literal["multihead", "mlp", "mlp-next"] = "mlp"
    decoder_layers: tuple[int, ...] = (32, 32)  # hidden layers (ReLU) of each decoder
    decoder_dropout: float = 0.0  # dropout on the decoders' embeddings of s, a, s'
    reward_coef: float = 1.0  # weight of the reward's reconstruction
    state_coef: float = 0.0  # weight of the state's reconstruction; 0 = no state decoder
    # Weight of the KL, the paper's lambda (ours: its (7) has lambda before the whole ELBO, where Adam would ignore it).
    # The ELBO's terms are sums, as the paper's, over the number of pairs of a belief and a transition that it decodes.
    kl_coef: float = 0.01
    standardise_inputs: bool = True  # standardise the inputs of encoder and decoders (ours); the grid's default is raw

    # DynaMITE-RL
    consistency_coef: float = 0.5  # weight of the consistency loss (4), the paper's beta
    termination_coef: float = 1.0  # weight of the loss of session ends (ours)
    no_consistency: bool = False  # ablation [paper, Figure 7]
    # Ablation: no previous belief to the encoder, and N(0, I) as every session's prior; at a session's first step the
    # policy sees the last belief of the one before, as variBAD's, unless --boundary-belief initial.
    no_conditioning: bool = False
    no_session_reconstruction: bool = False  # ablation: every belief decodes the whole meta-episode, as variBAD's
    oracle_terminations: bool = False  # the rollout's session ends are the true ones [paper's oracle]
    # KL of each belief to its session's prior (session, ours); that of each session's last belief alone (final-only,
    # the paper's appendix A, literally); of each to the one before (sequential, variBAD).
    kl: Literal["session", "final-only", "sequential"] = "session"
    # Session ends learn from the true ones by cross-entropy (bce, ours), or not at all but by a KL to Bernoulli(K / H)
    # (the paper's ELBO, literally; nothing tells it then when a session ends).
    term_loss: Literal["bce", "kl"] = "bce"
    # What divides the meta-episodes of the belief's loss into sessions: true ends (gt), predicted ones, or either with
    # the same probability, drawn for each meta-episode (ours).
    train_boundaries: Literal["gt", "pred", "mixed"] = "gt"
    # The belief at a session's first step: the prior p(m' | m) of the last belief (predict, ours), that belief itself
    # (stale), or the meta-episode's first one (initial; the paper's Algorithm 3, literally).
    boundary_belief: Literal["predict", "stale", "initial"] = "predict"
    reset_hidden_at_session: bool = False  # hidden 0 at a session's first step (appendix A), not kept (main text)
    # After a session's end the encoder sees the next one's first state, as the policy does, or the true successor, as
    # the decoders always do (ours).
    encoder_obs: Literal["post", "pre"] = "post"
    consistency_detach: bool = False  # no gradient into a session's last belief from (4) (the paper does not say)
    condition_embed: int = 8  # embedding of the previous session's last belief (encoder; ours)
    prior_layers: tuple[int, ...] = (32,)  # hidden layers (ReLU) of p(m' | m) (ours)
    logvar_min: float = -8.0  # lower bound of the beliefs' log-variance (ours)


# Table 2; what it leaves open is marked (ours) above.
SESSIONS = dict(
    total_timesteps=100_000_000, num_envs=2048, horizon=400, eval_interval=10, checkpoint_interval=10, ent_coef=0.05,
    ent_coef_end=0.05, action_embed=32, state_embed=32, reward_embed=32, condition_embed=32, hidden_dim=128,
    latent_dim=16, elbo_terms=13, decode_terms=50,
)  # fmt: skip
PRESETS = {
    # All but the inputs is ours: with the values of Table 2, the defaults above, returns stand still below 40.
    "GridWorldAlternating": dict(
        total_timesteps=10_000_000, num_envs=128, eval_interval=250, checkpoint_interval=250, learning_rate=1e-3,
        anneal_lr=True, time_limit="task", num_minibatches=8, ent_coef=0.03, belief_learning_rate=1e-3,
        belief_anneal_lr=True, belief_updates=6, buffer_size=100_000, reward_decoder="mlp-next", kl_coef=0.03,
        standardise_inputs=False,
    ),
    "GridWorld": dict(standardise_inputs=False, horizon=15, episodes_per_task=4),
    "Reacher": SESSIONS,
    "HalfCheetahDirSessions": SESSIONS,
    "HalfCheetahVelSessions": SESSIONS,
    "HalfCheetahWindVelSessions": SESSIONS | dict(state_coef=17.0),  # theirs is the sum over 17 numbers, ours the mean
    "ScratchItch": SESSIONS | dict(
        num_envs=32, horizon=200, ent_coef=0.1, ent_coef_end=0.1, eval_interval=100, checkpoint_interval=100,
    ),
    "SparsePointRobot": SESSIONS | dict(num_envs=16, horizon=100, episodes_per_task=3),
    "HopperMass": SESSIONS | dict(
        total_timesteps=10_000_000, num_envs=16, episodes_per_task=4, eval_interval=25, checkpoint_interval=25,
        eval_tasks=30, buffer_size=2000,
    ),
}  # fmt: skip
YOUR_OWN = PRESETS["SparsePointRobot"] | dict(horizon=0, episodes_per_task=0)  # for package.module:factory
SMALL_SESSIONS = dict(  # smaller iterations with more updates, or Reacher's session ends are not foreseen in time; ours
    total_timesteps=5_000_000, num_envs=32, eval_interval=40, checkpoint_interval=40, gamma=0.95, num_minibatches=16,
    ent_coef=0.01, ent_coef_end=0.0, std_init=0.5, belief_learning_rate=1e-3, belief_anneal_lr=True, belief_updates=8,
    buffer_size=2000, kl_coef=0.001,
)  # fmt: skip
SMALL = {  # what fits a machine without a GPU, laid over the preset unless --cuda; ours
    "Reacher": SMALL_SESSIONS | dict(gamma=0.9),
    "HalfCheetahDirSessions": SMALL_SESSIONS,
    "HalfCheetahVelSessions": SMALL_SESSIONS,
    "HalfCheetahWindVelSessions": SMALL_SESSIONS,
    "ScratchItch": dict(buffer_size=2000),
}


def parse_args(argv=None):
    """The command line over the arguments saved in --resume or --evaluate, else over the preset of --env-id."""
    argv = sys.argv[1:] if argv is None else argv
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--env-id", "--env_id", default=Args.env_id)
    early.add_argument("--cuda", action="store_true")
    early.add_argument("--resume", default="")
    early.add_argument("--evaluate", default="")
    known = early.parse_known_args(argv)[0]
    path = known.resume or known.evaluate
    if path:
        defaults = load_checkpoint(path)["args"] | dict(resume="", evaluate="", run_dir=str(Path(path).parent))
    else:
        name = known.env_id.removesuffix("-v2").removesuffix("-v3")
        family = name.split("-")[0]
        small = {} if known.cuda else SMALL.get(name, SMALL.get(family, {}))
        defaults = PRESETS.get(family, YOUR_OWN) | small
    return tyro.cli(Args, args=argv, default=Args(**defaults))


def flag(name):
    return "--" + name.replace("_", "-")


def check_args(args):
    """BadInput for the first argument that makes no sense, or for two that do not fit."""
    for name in (
        "total_timesteps num_envs update_epochs num_minibatches belief_batch buffer_size "
        "state_embed reward_embed hidden_dim latent_dim condition_embed learning_rate belief_learning_rate "
        "std_min std_init clip_coef"
    ).split():
        if not 0 < getattr(args, name) < math.inf:
            raise BadInput(f"{flag(name)} must be above 0, not {getattr(args, name)}")
    for name in (
        "seed eval_tasks checkpoint_interval ent_coef ent_coef_end vf_coef max_grad_norm belief_updates precollect "
        "belief_warmup obs_shift horizon episodes_per_task sessions "
        "belief_max_grad_norm action_embed tbptt elbo_terms decode_terms reward_coef state_coef kl_coef "
        "consistency_coef termination_coef"
    ).split():
        if not 0 <= getattr(args, name) < math.inf:
            raise BadInput(f"{flag(name)} must not be below 0, and finite: not {getattr(args, name)}")
    for name, below in dict(gamma=1.0, gae_lambda=1.0, decoder_dropout=0.999).items():
        if not 0 <= getattr(args, name) <= below:
            raise BadInput(f"{flag(name)} must lie in [0, {below}], not {getattr(args, name)}")
    for name in ("policy_layers", "decoder_layers", "encoder_layers", "prior_layers"):
        sizes = getattr(args, name)
        if (not sizes and not name.startswith("encoder")) or min(sizes, default=1) < 1:
            raise BadInput(f"{flag(name)} must be one or more positive sizes, not {sizes}")
    if not -math.inf < args.logvar_min <= 0:
        raise BadInput(f"--logvar-min must be finite and not above 0, not {args.logvar_min}")
    if args.num_envs % ranks() or args.belief_batch < ranks():
        raise BadInput(
            f"--num-envs {args.num_envs}, --belief-batch {args.belief_batch}: {ranks()} processes cannot share them"
        )
    steps = args.num_envs // ranks() * args.horizon * args.episodes_per_task
    if steps % args.num_minibatches:
        raise BadInput(f"--num-minibatches {args.num_minibatches} does not divide the {steps} steps of an iteration")
    steps = args.horizon * args.episodes_per_task
    if args.tbptt and steps > args.tbptt and steps % args.tbptt:
        raise BadInput(f"--tbptt {args.tbptt} does not divide the {steps} steps of a meta-episode")
    if args.buffer_size < args.num_envs:
        raise BadInput(f"--buffer-size {args.buffer_size} is below --num-envs {args.num_envs}: no iteration fits")
    if not args.std_min < args.std_init < args.std_max < math.inf:
        raise BadInput(f"--std-init {args.std_init} must lie inside --std-min {args.std_min}, --std-max {args.std_max}")
    if args.seed >= 2**32:  # PyTorch's generator reads no more of it
        raise BadInput(f"--seed must be below 2**32, not {args.seed}")
    if is_blind(args.total_timesteps - 1, args) and not args.no_belief:
        raise BadInput(f"--belief-warmup {args.belief_warmup} takes all of --total-timesteps {args.total_timesteps}")
    if args.resume and args.evaluate:
        raise BadInput("--resume and --evaluate exclude each other")
    if args.capture_video and not args.evaluate:
        raise BadInput("--capture-video goes with --evaluate")
    if args.evaluate and ranks() > 1:
        raise BadInput("--evaluate is for one process")
    if args.no_belief and args.oracle_context:
        raise BadInput("--no-belief and --oracle-context exclude each other")
    if args.cuda and not torch.cuda.is_available():
        raise BadInput("--cuda: this PyTorch sees no CUDA device")
    if args.cuda and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
        raise BadInput(f"--cuda: more processes than the {torch.cuda.device_count()} CUDA devices")


def is_blind(step, args):
    """Whether the policy sees zeros in place of the belief at this global step."""
    return args.no_belief or (step < args.belief_warmup and not args.oracle_context)


# ---------- 3b. Several processes (torchrun), and finite numbers ----------


def ranks():
    """The number of processes: torchrun's, each with its share of the environments, the buffer and the batches."""
    return dist.get_world_size() if dist.is_initialized() else 1


def leads():
    """Whether this process is the one that evaluates and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(n):
    """This process's part of n things."""
    return (n + dist.get_rank()) // ranks() if dist.is_initialized() else n


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
    """Actor and critic on the normalised observation and belief, side by side: pi(a | s, b) and V(s, b)."""

    def __init__(self, args, obs_dim, action_space, belief_sizes):
        super().__init__()
        self.belief_sizes = list(belief_sizes)
        # In training the code of a test's family is constant: a higher floor keeps the oracle from blowing it up.
        min_std = 0.02 if args.oracle_context else 1e-4
        self.obs_norm, self.belief_norm = RunningNorm(obs_dim), RunningNorm(sum(belief_sizes), min_std)
        self.return_norm, self.first_norm = RunningNorm(1), RunningNorm(obs_dim)
        self.discrete = hasattr(action_space, "n")
        n_out = int(action_space.n) if self.discrete else action_space.shape[0]
        sizes = [obs_dim + sum(belief_sizes), *args.policy_layers]
        self.actor, self.critic = mlp([*sizes, n_out], nn.ReLU), mlp([*sizes, 1], nn.ReLU)
        for net in (self.actor, self.critic):
            for layer in net[:-1:2]:
                normc_(layer, 2**0.5)
        if self.discrete:
            nn.init.orthogonal_(self.actor[-1].weight, 0.01)
            nn.init.zeros_(self.actor[-1].bias)
        else:
            normc_(self.actor[-1], 1.0)
            # The logarithm of the deviation stays softly between its bounds: low + (high - low) * sigmoid(raw_std)
            self.log_std_low, self.log_std_high = math.log(args.std_min), math.log(args.std_max)
            share = (math.log(args.std_init) - self.log_std_low) / (self.log_std_high - self.log_std_low)
            self.raw_std = nn.Parameter(torch.full((n_out,), math.log(share / (1 - share))))

    def parts(self, joint):
        """What is clipped by a norm of its own: all, or actor and critic."""
        own = nn.ParameterList([] if self.discrete else [self.raw_std])
        return [self] if joint else [nn.ModuleList([self.actor, own]), self.critic]

    def embed(self, obs, belief):
        return torch.cat([self.obs_norm(obs), self.belief_norm(belief)], -1)

    def std(self):
        return (self.log_std_low + (self.log_std_high - self.log_std_low) * self.raw_std.sigmoid()).exp()

    def act(self, obs, belief, deterministic=False):
        """obs (N, S), belief (N, .) -> actions: int64 (N,) or float32 (N, A). Samples without a wait for the device."""
        out = self.actor(self.embed(obs, belief))
        if self.discrete:
            scores = out if deterministic else out.softmax(-1) / torch.empty_like(out).exponential_()
            return scores.argmax(-1)  # the first of exponential clocks with rates p rings in proportion to p
        return out if deterministic else out + self.std() * torch.randn_like(out)

    def value(self, obs, belief):
        return self.critic(self.embed(obs, belief)).squeeze(-1)

    def forward(self, obs, belief, action):
        """Log-probability and entropy of the action's distribution, and the value: each of the batch's shape."""
        x = self.embed(obs, belief)
        out, value = self.actor(x), self.critic(x).squeeze(-1)
        if self.discrete:
            logprobs = out.log_softmax(-1)
            return logprobs.gather(-1, action[..., None])[..., 0], -(logprobs.exp() * logprobs).sum(-1), value
        dist = Normal(out, self.std(), validate_args=False)
        return dist.log_prob(action).sum(-1), dist.entropy().sum(-1), value


class Encoder(nn.Module):
    """Embeddings, MLP and GRU: the history of (a, s', r), and the belief in which the session before ended, -> hidden
    (D); the heads stand in BeliefModel (Figure 3)."""

    def __init__(self, args, obs_dim, action_dim):
        super().__init__()
        self.embeds = nn.ModuleDict(
            dict(state=nn.Linear(obs_dim, args.state_embed), reward=nn.Linear(1, args.reward_embed))
        )
        if args.action_embed:
            self.embeds["action"] = nn.Linear(action_dim, args.action_embed)
        size = args.action_embed + args.state_embed + args.reward_embed
        self.condition = None if args.no_conditioning else nn.Linear(2 * args.latent_dim, args.condition_embed)
        sizes = [size + args.condition_embed * (not args.no_conditioning), *args.encoder_layers]
        self.layers = nn.Sequential(*mlp(sizes, nn.ReLU), *[nn.ReLU()] * bool(args.encoder_layers))
        self.gru = GRU(sizes[-1], args.hidden_dim)
        for name, parameter in self.gru.named_parameters():
            nn.init.zeros_(parameter) if "bias" in name else nn.init.orthogonal_(parameter)

    def embed(self, action, next_obs, reward):
        inputs = dict(action=action, state=next_obs, reward=reward)
        return torch.cat([embed(inputs[name]) for name, embed in self.embeds.items()], -1).relu()

    def mix(self, x, condition):
        """The GRU's input: embedded transitions (..., E), the belief that ended the session before (..., 2 Z)."""
        if self.condition:
            x = torch.cat([x, self.condition(condition).relu()], -1)
        return self.layers(x)

    def step(self, x, condition, hidden):
        """One transition: x (N, E), condition (N, 2 Z), hidden (N, D) -> hidden (N, D)."""
        weights = self.gru.weight_ih_l0, self.gru.weight_hh_l0, self.gru.bias_ih_l0, self.gru.bias_hh_l0
        return torch.gru_cell(self.mix(x, condition), hidden, *weights)

    def forward(self, x, tbptt=0):
        """From hidden 0, x (T, B, .) of `mix` -> hiddens (T + 1, B, D), the first of them the zero state.

        With tbptt = w, gradients stop every w steps: a pass without gradients finds the hidden state at the start of
        each window; then all windows run side by side as one batch.
        """
        T, B, E = x.shape
        start = x.new_zeros(1, B, self.gru.hidden_size)
        if tbptt and tbptt < T:
            with torch.no_grad():
                before = torch.cat([start, self.gru(x[:-tbptt], start)[0][tbptt - 1 :: tbptt]])  # (T / w, B, D)
            windows = x.view(-1, tbptt, B, E).transpose(0, 1).reshape(tbptt, -1, E)  # (w, T / w * B, E)
            out = self.gru(windows, before.reshape(1, -1, self.gru.hidden_size))[0]
            out = out.view(tbptt, -1, B, self.gru.hidden_size).transpose(0, 1).reshape(T, B, -1)
        else:
            out = self.gru(x, start)[0]
        return torch.cat([start, out])


class Decoder(nn.Module):
    """MLP on [m, x] for every pair of posterior and transition, x the transition's embedding.

    Its first layer is W_m m + W_x x: two small products and one broadcast sum in place of a row for each pair.
    """

    def __init__(self, args, obs_dim, action_dim, out_dim, inputs):
        super().__init__()
        self.embed_state = nn.Linear(obs_dim, args.state_embed)
        with_action = args.action_embed and "action" in inputs
        self.embed_action = nn.Linear(action_dim, args.action_embed) if with_action else None
        self.inputs, self.dropout = inputs, args.decoder_dropout
        size = args.state_embed * (len(inputs) - ("action" in inputs)) + args.action_embed * ("action" in inputs)
        self.net = mlp([args.latent_dim + size, *args.decoder_layers, out_dim], nn.ReLU)

    def forward(self, m, obs, action, next_obs):
        """m (E, B, Z), obs, action, next_obs (D, B, .) -> (E, D, B, out)."""
        x = [self.embed_state(s) for s, name in ((obs, "obs"), (next_obs, "next_obs")) if name in self.inputs]
        if self.embed_action:
            x += [self.embed_action(action)]
        x = F.dropout(torch.cat(x, -1).relu(), self.dropout, self.training)
        first, Z = self.net[0], m.shape[-1]
        hidden = F.linear(m, first.weight[:, :Z])[:, None] + F.linear(x, first.weight[:, Z:], first.bias)
        return self.net[1:](hidden)


class MultiHeadDecoder(nn.Module):
    """Grid worlds: the logits, one a cell, of p(r = 1 | m, s') for every cell s'."""

    def __init__(self, args, num_cells):
        super().__init__()
        self.net = mlp([args.latent_dim, *args.decoder_layers, num_cells], nn.ReLU)

    def forward(self, m):
        """m (E, B, Z) -> (E, B, cells)."""
        return self.net(m)


# ---------- 5. Belief model: what this paper changes ----------


class BeliefModel(nn.Module):
    """Encoder, the heads of the posterior and of session ends, the prior p(m' | m) of sessions and the decoders."""

    def __init__(self, args, envs):
        super().__init__()
        self.args = args
        S, space = envs.single_observation_space.shape[0], envs.single_action_space
        self.discrete = hasattr(space, "n")
        A = int(space.n) if self.discrete else space.shape[0]
        self.cell = getattr(envs, "cell", None)
        self.encoder = Encoder(args, S, A)
        self.heads = nn.Linear(args.hidden_dim, 2 * args.latent_dim)  # mean and log-variance
        self.termination = nn.Linear(args.hidden_dim, 1)  # logit of d, whether this transition ends a session
        sizes = [2 * args.latent_dim, *args.prior_layers, 2 * args.latent_dim]
        self.prior = None if args.no_conditioning else mlp(sizes, nn.ReLU)
        self.end_rate = getattr(envs, "sessions", 1) / envs.horizon  # K / H
        if args.reward_decoder == "multihead":
            if self.cell is None:
                raise BadInput(f"--reward-decoder multihead needs a grid of one goal, not {args.env_id}: choose mlp")
            self.reward_decoder = MultiHeadDecoder(args, envs.num_cells)
        else:
            inputs = ("next_obs",) if args.reward_decoder == "mlp-next" else ("obs", "action", "next_obs")
            self.reward_decoder = Decoder(args, S, A, 1, inputs)
        self.state_decoder = Decoder(args, S, A, S, ("obs", "action")) if args.state_coef else None
        norm = RunningNorm if args.standardise_inputs else nn.Identity
        self.obs_norm, self.reward_norm = norm(S, min_std=0.02), norm(1, min_std=0.02)
        if self.discrete:
            self.register_buffer("one_hot", torch.eye(A), persistent=False)
        elif np.isfinite(space.low).all() and np.isfinite(space.high).all():
            self.register_buffer("low", torch.as_tensor(space.low))
            self.register_buffer("high", torch.as_tensor(space.high))
        self.belief_sizes = [2 * args.latent_dim]

    def parts(self):
        """The modules whose gradients are clipped one by one."""
        encoder = nn.ModuleList([self.encoder, self.heads, self.termination] + [self.prior] * bool(self.prior))
        return [encoder, self.reward_decoder] + ([self.state_decoder] if self.state_decoder else [])

    def action_input(self, action):
        """What the environment made of the policy's action: one-hot if discrete, clipped to its box else."""
        if self.discrete:
            return F.embedding(action, self.one_hot)
        return torch.maximum(torch.minimum(action, self.high), self.low) if hasattr(self, "low") else action

    def embed(self, action, seen, reward):
        """Raw transitions (..., .), rewards (...) -> the encoder's inputs (..., E)."""
        reward = self.reward_norm(reward.unsqueeze(-1))
        return self.encoder.embed(self.action_input(action), self.obs_norm(seen), reward)

    def step(self, action, seen, reward, condition, hidden):
        """The encoder's step on a raw transition: action (N, .), seen (N, S), reward (N,), hidden (N, D) -> (N, D).

        condition (N, 2 Z): the belief that ended the session before, zeros in the first.
        """
        return self.encoder.step(self.embed(action, seen, reward), condition, hidden)

    def gaussian(self, out):
        """mean, logvar (..., Z) out of a network's output (..., 2 Z)."""
        mean, logvar = out.chunk(2, -1)
        return mean, logvar.clamp(self.args.logvar_min, 4)

    def posterior(self, hidden):
        """q(m | tau_:t): hidden (..., D) -> mean, logvar (..., Z). The prior of a meta-episode is that of hidden 0."""
        return self.gaussian(self.heads(hidden))

    def session_prior(self, condition):
        """p(m' | m) of the belief in which a session ended, (..., 2 Z) -> mean, logvar (..., Z)."""
        return self.gaussian(self.prior(condition))

    def terminates(self, hidden):
        """Whether q(d = 1) > 1/2 (ours; the paper draws d): hidden (N, D) -> bool (N,)."""
        return self.termination(hidden).squeeze(-1) > 0

    def belief(self, hidden, deterministic=False):
        """What the policy sees: mean and log-variance (N, 2 Z)."""
        return torch.cat(self.posterior(hidden), -1)

    def next_session(self, ended, belief, condition, hidden):
        """Where a session ended, bool (N,), the belief, condition and hidden state of the next one's first step."""
        column = ended.unsqueeze(-1)
        condition = torch.where(column, belief, condition)
        if self.args.boundary_belief == "predict" and self.prior:
            belief = torch.where(column, torch.cat(self.session_prior(condition), -1), belief)
        if self.args.boundary_belief == "initial":
            belief = torch.where(column, self.belief(torch.zeros_like(hidden)), belief)
        if self.args.reset_hidden_at_session:
            hidden = torch.where(column, 0.0, hidden)
        return belief, condition, hidden

    @torch.no_grad()
    def find_sessions(self, x, ends):
        """Of embedded meta-episodes x (T, B, E) and their true session ends (T, B): what conditions each transition,
        (T, B, 2 Z), and the ends that --train-boundaries chooses. They are data: no gradient flows through them.

        Between steps at which a session of the batch ends nothing conditions anew, and the GRU runs in one piece.
        """
        (T, B), choice = ends.shape, self.args.train_boundaries
        hidden = x.new_zeros(B, self.encoder.gru.hidden_size)
        condition = x.new_zeros(B, 2 * self.args.latent_dim)
        conditions = x.new_zeros(T, B, 2 * self.args.latent_dim)
        if choice == "gt":
            edges = ends[:-1].any(1).tolist() if self.prior else []
        else:
            edges, ends = [True] * (T - 1), ends.clone()
            guessed = torch.rand(B, device=x.device) < (0.5 if choice == "mixed" else 1.0)
        start = 0
        for t in (t for t, edge in enumerate(edges) if edge):
            conditions[start : t + 1] = condition
            mixed = self.encoder.mix(x[start : t + 1], conditions[start : t + 1])
            hidden = self.encoder.gru(mixed, hidden[None])[1][0]
            if choice != "gt":
                ends[t] = torch.where(guessed, self.terminates(hidden), ends[t])
            _, condition, hidden = self.next_session(ends[t], self.belief(hidden), condition, hidden)
            start = t + 1
        conditions[start:] = condition
        return conditions, ends

    def moments(self, belief):
        """Mean and log-variance of m out of what the policy sees."""
        return belief.chunk(2, -1)


def kl_gaussians(mean, logvar, prior_mean, prior_logvar):
    """KL(N(mean, exp(logvar)) || N(prior_mean, exp(prior_logvar))), summed over the last dimension."""
    ratio = (logvar - prior_logvar).exp() + (mean - prior_mean).square() * (-prior_logvar).exp()
    return 0.5 * (prior_logvar - logvar + ratio - 1).sum(-1)


def window(t, i, args):
    """Whether the posterior after t transitions decodes transition i (from 0): broadcasts t with i."""
    if args.decode_window == "all":
        return (t >= 0) & (i >= 0)
    future = i >= t
    return future if args.decode_window == "future" else future & (i // args.horizon == t // args.horizon)


def reconstruction(model, m, t, real, batch, args):
    """-log p(r | m_t, s, a, s') and -log p(s' | m_t, s, a), up to constants, in the mean over the pairs of `window`.

    m (E, B, Z): samples of the posteriors number t (E, B), of which those count that are `real` (E, B).
    batch: raw transitions (T, B, .). Returns two scalars.
    """
    T, B = batch["rewards"].shape
    device = m.device
    state_loss = torch.zeros((), device=device)
    if args.reward_decoder != "multihead" or model.state_decoder:
        if 0 < args.decode_terms < T:
            i = torch.randint(T, (args.decode_terms, B), device=device)
        else:
            i = torch.arange(T, device=device)[:, None].expand(T, B)
        columns = torch.arange(B, device=device)
        obs, action, next_obs, reward, alive = (
            batch[name][i, columns] for name in ("obs", "actions", "next_obs", "rewards", "alive")
        )
        x = model.obs_norm(obs), model.action_input(action), model.obs_norm(next_obs)
        weight = (window(t[:, None], i, args) & alive & real[:, None]).float()  # (E, D, B)
        weight = weight / all_sum(weight.sum()).clamp(min=1)
    if args.reward_decoder != "multihead":
        predicted = model.reward_decoder(m, *x).squeeze(-1)
        reward_loss = ((predicted - reward).square() * weight).sum()
    else:
        reward_loss = multihead_loss(model.reward_decoder(m), t, real, batch, model.cell, args)
    if model.state_decoder:  # predicts the change of state: ahead of s' itself from the first step
        error = (model.state_decoder(m, *x) - (next_obs - obs)).square().mean(-1)
        state_loss = (error * weight).sum()
    return reward_loss, state_loss


def multihead_loss(logits, t, real, batch, cell, args):
    """Binary cross-entropy of r = 1 in the cell of s', in the mean over the pairs of `window`.

    The logit of a cell is the same for each visit, so it is enough to count the visits with and without reward:
    logits (E, B, cells), t, real (E, B).
    """
    visits = F.one_hot(cell(batch["next_obs"]), logits.shape[-1])  # (T, B, cells)
    visits = (visits * batch["alive"].unsqueeze(-1)).float()
    hits = visits * (batch["rewards"] == 1).unsqueeze(-1)
    if args.decode_window == "all":
        visits, hits = visits.sum(0), hits.sum(0)  # (B, cells): the same for all posteriors
    else:
        if args.decode_window == "episode":
            visits, hits = (x.view(-1, args.horizon, *x.shape[1:]) for x in (visits, hits))
        else:
            visits, hits = visits[None], hits[None]
        columns = torch.arange(t.shape[1], device=logits.device)
        visits, hits = (  # of transitions t, t + 1, ... : (T + 1, B, cells), then those of the drawn t
            F.pad(x.flip(1).cumsum(1).flip(1).flatten(0, 1), (0, 0, 0, 0, 0, 1))[t, columns] for x in (visits, hits)
        )
    visits, hits = visits * real.unsqueeze(-1), hits * real.unsqueeze(-1)
    loss = visits * F.softplus(logits) - hits * logits  # = hits * softplus(-x) + (visits - hits) * softplus(x)
    return loss.sum() / all_sum(visits.sum()).clamp(min=1)


def split_sessions(ends):
    """Session ends (T, B), the last row True -> first transition, length and meta-episode of each session, (J,), and
    the longest length L. Waits for the device, once an update, on purpose."""
    begins = torch.cat([torch.ones_like(ends[:1]), ends[:-1]])
    column, first = begins.T.nonzero(as_tuple=True)
    length = ends.T.nonzero(as_tuple=True)[1] - first + 1
    return first, length, column, int(length.max())


def consistency(mean, logvar, length, args):
    """(4) max(D_u+1 - D_u, 0), D_u the KL of belief u to its session's last: mean, logvar (L, J, Z), length (J,).

    Returns (L, J): zeros for the first belief, and garbage behind a session's last.
    """
    columns = torch.arange(len(length), device=mean.device)
    last = [x[length - 1, columns] for x in (mean, logvar)]
    d = kl_gaussians(mean, logvar, *([x.detach() for x in last] if args.consistency_detach else last))
    return F.pad((d[1:] - d[:-1]).clamp(min=0), (0, 0, 1, 0))


def session_beliefs(model, batch, args):
    """The beliefs of a batch (see elbo), a column for each session: its prior, then that after each of its transitions.

    Returns mean, logvar (L + 1, J, Z), those of p(m' | m), (J, Z) each, and a dict: which beliefs are real (L + 1, J),
    logits of session ends (L, J), rows (L, J), the transitions, and which are alive (L, J), first, length, column (J,).
    """
    after = torch.cat([batch["obs"][1:], batch["next_obs"][-1:]]) if args.encoder_obs == "post" else batch["next_obs"]
    x = model.embed(batch["actions"], after, batch["rewards"])
    conditions, ends = model.find_sessions(x, batch["session_end"])
    first, length, column, L = split_sessions(ends)
    steps = torch.arange(L, device=x.device).unsqueeze(-1)
    rows = (first + steps).clamp(max=len(x) - 1)  # what lies behind a session's end is not alive
    alive = batch["alive"][rows, column] & (steps < length)
    x = model.encoder.mix(x, conditions)
    if args.reset_hidden_at_session:
        hidden, index = model.encoder(x[rows, column]), ...
    else:
        hidden, index = model.encoder(x, args.tbptt), (torch.cat([first[None], rows + 1]), column)
    mean, logvar = (y[index] for y in model.posterior(hidden))
    logits = model.termination(hidden).squeeze(-1)[index][1:]
    begins = first == 0  # a meta-episode's first session: N(0, I) is its prior, and belief 0 the heads on hidden 0
    prior = torch.zeros_like(mean[0]), torch.zeros_like(mean[0])
    if model.prior:
        prior = model.session_prior(conditions[first, column])
        mean, logvar = (
            torch.cat([torch.where(begins[:, None], y[:1], p), y[1:]]) for y, p in zip((mean, logvar), prior)
        )
        prior = tuple(torch.where(begins[:, None], 0.0, p) for p in prior)
    # Without p(m' | m) belief 0 of a later session is the last one of the session before: it counts there alone.
    real = torch.cat([(begins | bool(model.prior))[None], alive])
    found = dict(real=real, logits=logits, rows=rows, alive=alive, first=first, length=length, column=column)
    return mean, logvar, prior, found


def termination_loss(logits, ended, rate, args):
    """Of the logits (L, J) of session ends: cross-entropy with the true ones, or the KL to Bernoulli(rate)."""
    if args.term_loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, ended.float(), reduction="none")
    rate = min(max(rate, 1e-3), 1 - 1e-3)
    yes, no = F.logsigmoid(logits), F.logsigmoid(-logits)
    return logits.sigmoid() * (yes - math.log(rate)) + (-logits).sigmoid() * (no - math.log(1 - rate))


def elbo(model, batch, args):
    """The negative of (6), over the number of pairs of a belief and a transition that it decodes.

    (5) is variBAD's ELBO with sessions in place of meta-episodes, and p(m' | m) in place of N(0, I). (The paper adds
    (4) to what it maximises; as a penalty it has to be subtracted.)
    batch: obs, next_obs (T, B, S), actions (T, B, .), rewards, alive, session_end (T, B). Returns the loss and a dict
    of its terms.
    """
    mean, logvar, prior, found = session_beliefs(model, batch, args)
    real, rows, alive, first, length, column = (
        found[name] for name in ("real", "rows", "alive", "first", "length", "column")
    )
    to_prior = kl_gaussians(mean, logvar, *prior)
    kl = to_prior
    if args.kl == "sequential":
        kl = kl_gaussians(mean, logvar, *(torch.cat([p[None], y[:-1]]) for p, y in zip(prior, (mean, logvar))))
    if args.kl == "final-only":
        kl = kl * (torch.arange(len(kl), device=kl.device).unsqueeze(-1) == length)
    rise = F.pad(consistency(mean[1:], logvar[1:], length, args), (0, 0, 1, 0))
    ended = batch["session_end"][rows, column]
    termination = termination_loss(found["logits"], ended, model.end_rate, args)
    # A meta-episode's last transition ends a session by definition: there is nothing to predict.
    known = alive & (rows < len(batch["rewards"]) - 1)
    decodable = batch["alive"].sum(0)[column] if args.no_session_reconstruction else alive.sum(0)
    pairs = all_sum((real.sum(0) * decodable).sum()).clamp(min=1)
    per_belief, per_transition = all_sum(real.sum()) / pairs, all_sum(known.sum()) / pairs
    kl, rise, termination = average(kl, real), average(rise, real), average(termination, known)

    t, (mean, logvar, drawn) = draw_posteriors(args, mean, logvar, real)
    m = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
    if args.no_session_reconstruction:
        t, decoded = t + first, {name: x[:, column] for name, x in batch.items()}
    else:
        decoded = {name: x[rows, column] for name, x in batch.items()} | dict(alive=alive)
    reward_loss, state_loss = reconstruction(model, m, t, drawn, decoded, args)
    loss = args.reward_coef * reward_loss + args.state_coef * state_loss + args.kl_coef * kl * per_belief
    loss = loss + args.termination_coef * termination * per_transition
    if not args.no_consistency:
        loss = loss + args.consistency_coef * rise * per_belief
    terms = dict(loss=loss, reward=reward_loss, state=state_loss, kl=kl, consistency=rise, termination=termination)
    if model.prior:
        terms["kl_to_learnt_prior"] = average(to_prior[1:].detach(), alive & (first > 0))
    return loss, terms


def real_posteriors(alive):
    """Which posteriors t = 0..T end with a real transition, not with one of an idle environment: (T + 1, B)."""
    return torch.cat([torch.ones_like(alive[:1]), alive])


def average(x, real):
    """The mean of x (E, B) where real."""
    return (x * real).sum() / all_sum(real.sum()).clamp(min=1)


def draw_posteriors(args, *tensors):
    """args.elbo_terms posteriors of each meta-episode, uniformly with replacement, or all.

    tensors: (T + 1, B, ...). Returns their numbers t (E, B) and the tensors at these.
    """
    T1, B = tensors[0].shape[:2]
    device = tensors[0].device
    if not 0 < args.elbo_terms < T1:
        return torch.arange(T1, device=device)[:, None].expand(T1, B), tensors
    t = torch.randint(T1, (args.elbo_terms, B), device=device)
    return t, [x[t, torch.arange(B, device=device)] for x in tensors]


def update_belief(model, optimizer, buffer, args):
    """One gradient step on a batch of stored meta-episodes. Returns the loss's terms, detached."""
    loss, terms = elbo(model, buffer.sample(share(args.belief_batch)), args)
    descend(optimizer, loss, model.parts(), args.belief_max_grad_norm, "belief")
    return {name: term.detach() for name, term in terms.items()}


# ---------- 6. PPO ----------


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


def ppo_update(agent, optimizer, data, ent_coef, args):
    """Epochs of minibatches of PPO's clipped objective on an iteration's steps. Returns a dict of mean terms.

    data: obs (T, N, S), beliefs (T + 1, N, .), actions (T, N, .), logprobs, values, advantages, returns, alive (T, N).
    """
    b = {name: data[name].flatten(0, 1) for name in ("obs", "actions", "logprobs", "advantages", "returns", "alive")}
    b["beliefs"], b["values"] = data["beliefs"][:-1].flatten(0, 1), data["values"][:-1].flatten()
    alive = b["alive"].float()
    count = all_sum(alive.sum())
    mean = all_sum((b["advantages"] * alive).sum()) / count
    std = all_sum(((b["advantages"] - mean).square() * alive).sum()).div(count).sqrt()
    b["advantages"] = (b["advantages"] - mean) / (std + 1e-5)
    size = len(alive) // args.num_minibatches
    log = []
    for _ in range(args.update_epochs):
        order = torch.randperm(len(alive), device=alive.device)
        shuffled = {name: x[order].split(size) for name, x in b.items()}
        for i in range(args.num_minibatches):
            mb = {name: parts[i] for name, parts in shuffled.items()}
            weight = mb["alive"].float() / all_sum(mb["alive"].float().sum()).clamp(min=1)
            logprob, entropy, value = agent(mb["obs"], mb["beliefs"], mb["actions"])
            logratio = logprob - mb["logprobs"]
            ratio = logratio.exp()
            clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            pg_loss = -(torch.minimum(ratio * mb["advantages"], clipped * mb["advantages"]) * weight).sum()
            error = (value - mb["returns"]).square()
            if args.value_loss == "clipped":
                near = mb["values"] + (value - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
                error = torch.maximum(error, (near - mb["returns"]).square())
            v_loss = 0.5 * (error * weight).sum()
            entropy = (entropy * weight).sum()
            loss = pg_loss + args.vf_coef * v_loss - ent_coef * entropy
            descend(optimizer, loss, agent.parts(args.joint_clip), args.max_grad_norm, "policy")
            with torch.no_grad():
                approx_kl = ((ratio - 1 - logratio) * weight).sum()
                clipfrac = (((ratio - 1).abs() > args.clip_coef) * weight).sum()
                log.append(torch.stack([pg_loss, v_loss, entropy, approx_kl, clipfrac]))
    return dict(zip(("policy", "value", "entropy", "approx_kl", "clipfrac"), torch.stack(log).mean(0)))


# ---------- 7. Buffer ----------


class Buffer:
    """Ring of the last meta-episodes, preallocated on the device: one tensor (size, T, ...) for each entry."""

    NAMES = ("obs", "next_obs", "actions", "rewards", "alive", "session_end")

    def __init__(self, size):
        self.size, self.next, self.full, self.store = size, 0, 0, {}

    def add(self, data):
        """data: (T, N, ...) for each of NAMES."""
        n = data["rewards"].shape[1]
        if not self.store:
            self.store = {k: data[k].new_empty(self.size, len(data[k]), *data[k].shape[2:]) for k in self.NAMES}
        slots = torch.arange(self.next, self.next + n, device=data["rewards"].device) % self.size
        for name, tensor in self.store.items():
            tensor[slots] = data[name].transpose(0, 1)
        self.next, self.full = (self.next + n) % self.size, min(self.full + n, self.size)

    def sample(self, batch):
        """`batch` meta-episodes, uniformly with replacement: a dict of (T, B, ...)."""
        rows = torch.randint(self.full, (batch,), device=self.store["rewards"].device)
        return {name: tensor[rows].transpose(0, 1) for name, tensor in self.store.items()}

    def state_dict(self):
        return dict(next=self.next, full=self.full, store={k: v[: self.full].clone() for k, v in self.store.items()})

    def load_state_dict(self, state):
        self.next, self.full = state["next"], state["full"]
        self.store = {k: v.new_empty(self.size, *v.shape[1:]) for k, v in state["store"].items()}
        for name, tensor in state["store"].items():
            self.store[name][: self.full] = tensor


# ---------- 8. Rollout ----------


def rollout(envs, agent, model, args, blind=False, tasks=None, deterministic=False):
    """One meta-episode in every environment, from a reset and the prior belief; blind: with zeros in its place.

    The beliefs are those on which the policy acts (Algorithm 3): at a session's first step, by the predicted ends, that
    of --boundary-belief.
    Returns a dict: obs, next_obs (T, N, S), actions (T, N, .), rewards, raw_rewards, terminated, alive, success (T, N),
    session_end (T, N), whose last row is True, predicted_end (T, N), beliefs (T + 1, N, .), task (N, G), contexts
    (T, N, C), and env_seconds, the time spent in `envs.step`.
    """
    T, N, S = envs.meta_horizon, envs.num_envs, envs.single_observation_space.shape[0]
    device, A = envs.device, () if agent.discrete else envs.single_action_space.shape
    data = dict(  # made outside inference mode, so that the updates may use them
        obs=torch.empty(T, N, S, device=device),
        next_obs=torch.empty(T, N, S, device=device),
        actions=torch.empty(T, N, *A, device=device, dtype=torch.int64 if agent.discrete else torch.float32),
        rewards=torch.empty(T, N, device=device),
        raw_rewards=torch.empty(T, N, device=device),  # what returns are reported in
        terminated=torch.zeros(T, N, device=device, dtype=torch.bool),
        alive=torch.ones(T, N, device=device, dtype=torch.bool),
        success=torch.zeros(T, N, device=device, dtype=torch.bool),
        session_end=torch.zeros(T, N, device=device, dtype=torch.bool),
        predicted_end=torch.zeros(T, N, device=device, dtype=torch.bool),
        beliefs=torch.zeros(T + 1, N, sum(agent.belief_sizes), device=device),
    )
    env_seconds = 0.0
    with torch.inference_mode():
        obs, info = envs.reset(tasks)
        data["first_obs"] = obs.clone()
        shift = torch.zeros_like(obs)
        if args.obs_shift and agent.training and not args.oracle_context:  # the oracle knows where the goal stands
            spread = agent.first_norm.var.sqrt() * (agent.first_norm.count > 0)
            shift = args.obs_shift * spread * torch.randn_like(obs)
        data["task"] = info["task"].clone()
        hidden = torch.zeros(N, args.hidden_dim, device=device)
        condition = torch.zeros(N, 2 * args.latent_dim, device=device)
        contexts = [true_context(info, data)]
        belief = data["beliefs"][0] if blind else model.belief(hidden, deterministic)  # zeros
        for t in range(T + 1):
            data["beliefs"][t] = contexts[t] if args.oracle_context else belief
            if t == T:
                break
            data["obs"][t] = obs = obs + shift
            action = agent.act(obs, data["beliefs"][t], deterministic)
            start = time.perf_counter()
            obs, reward, terminated, _, info = envs.step(action)
            env_seconds += time.perf_counter() - start
            data["raw_rewards"][t] = info.get("raw_reward", reward)
            next_obs = info["final_obs"] + shift
            data["next_obs"][t], data["actions"][t], data["rewards"][t] = next_obs, action, reward
            data["terminated"][t] = terminated
            for name in ("alive", "success", "session_end"):
                if name in info:
                    data[name][t] = info[name]
            contexts.append(true_context(info, data))
            if not (args.oracle_context or blind):
                seen = obs + shift if args.encoder_obs == "post" and t + 1 < T else next_obs
                hidden = model.step(action, seen, reward, condition, hidden)
                belief = model.belief(hidden, deterministic)
                data["predicted_end"][t] = ended = model.terminates(hidden)
                ended = data["session_end"][t] if args.oracle_terminations else ended
                if t + 1 < T and (device.type != "cpu" or ended.any()):  # to look would make a GPU wait
                    belief, condition, hidden = model.next_session(ended, belief, condition, hidden)
        data["session_end"][-1] = True
        data["contexts"] = torch.stack(contexts[:T])
    return data | dict(env_seconds=env_seconds)


def true_context(info, data):
    """The latent context of the next transition (N, C); without sessions, the task."""
    return info["context"].clone() if "context" in info else data["task"]


def session_sums(data, columns=slice(None)):
    """Sums over the transitions of some of a rollout's environments, of which `session_rates` makes rates: a vector."""
    ends, rewards = (data[name][:, columns] for name in ("session_end", "raw_rewards"))
    number = (ends.cumsum(0) - ends.int()).clamp(max=SESSIONS_SHOWN)  # of each transition's session, from 0
    sums = torch.zeros(2, SESSIONS_SHOWN + 1, device=rewards.device)
    for row, values in zip(sums, (rewards, ends.float())):
        row.index_add_(0, number.flatten(), values.flatten())
    known, guess = ends[:-1], data["predicted_end"][:-1, columns]
    return torch.cat([torch.stack([(known & guess).sum(), guess.sum(), known.sum()]), sums[:, :-1].flatten()])


def session_rates(sums, prefix):
    """Precision and recall of the predicted session ends (that of the meta-episode aside), and the mean return of the
    first, the second session, ...: scalars by key, where there is something to count."""
    (hits, guessed, known), returns, counts = sums[:3].tolist(), *sums[3:].view(2, -1).tolist()
    rates = {"termination_precision": (hits, guessed), "termination_recall": (hits, known)}
    rates |= {f"return_session_{k + 1}": pair for k, pair in enumerate(zip(returns, counts))}
    return {f"{prefix}/{name}": total / count for name, (total, count) in rates.items() if count}


# ---------- 9. Evaluation ----------


def evaluate(eval_envs, agent, model, args, blind=False):
    """Every evaluation task of every split once, over its K episodes, with random numbers of its own.

    eval_envs: split -> environments. Returns scalars by key, and per task what each episode returned and whether it
    succeeded (at any of its steps), and the last belief: {split: {task: {"return", "success", "belief"}}}.
    """
    scalars, details = {}, {}
    devices = [torch.cuda.current_device()] if args.cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(args.seed)
        agent.eval(), model.eval()
        for split, envs in eval_envs.items():
            names = eval_names(envs, args)
            details[split], sums = {}, 0
            for first in range(0, len(names), envs.num_envs):
                chunk = names[first : first + envs.num_envs]
                padded = chunk + [chunk[-1]] * (envs.num_envs - len(chunk))
                data = rollout(envs, agent, model, args, blind, padded, deterministic=not args.eval_sample)
                episodes = (envs.episodes_per_task, envs.horizon, envs.num_envs)
                returns = data["raw_rewards"].view(episodes).sum(1).T.tolist()
                success = data["success"].view(episodes).any(1).float().T.tolist()
                beliefs = data["beliefs"][-1].tolist()
                sums = sums + session_sums(data, slice(len(chunk)))
                for name, r, s, b in zip(chunk, returns, success, beliefs):
                    details[split][name] = {"return": r, "success": s, "belief": b}
            scalars |= session_rates(sums, f"eval/{split}")
            for key, word in (("return", "return"), ("success", "success_rate")):
                rows = np.array([detail[key] for detail in details[split].values()])  # (tasks, K)
                for k in range(rows.shape[1]):
                    scalars[f"eval/{split}/{word}_episode_{k + 1}"] = float(rows[:, k].mean())
                scalars[f"eval/{split}/{word}"] = float(rows[:, -1].mean())  # of the last episode
                if key == "success":
                    scalars[f"eval/{split}/{word}_any_episode"] = float(rows.max(1).mean())
                families = np.array([name.split("/")[0] for name in details[split]])
                if len(set(families)) > 1:
                    for family in dict.fromkeys(families):
                        scalars[f"eval/{split}/{word}/{family}"] = float(rows[families == family, -1].mean())
            if hasattr(envs, "score"):
                returns = {name: detail["return"] for name, detail in details[split].items()}
                scalars |= {f"eval/{split}/{key}": value for key, value in envs.score(returns).items()}
        agent.train(), model.train()
    return scalars, details


def eval_names(envs, args):
    """The evaluation tasks of a split: the first `--eval-tasks` of each family, 0 = all."""
    by_family = {}
    for name in envs.tasks:
        by_family.setdefault(name.split("/")[0], []).append(name)
    return [name for names in by_family.values() for name in names[: args.eval_tasks or None]]


def make_eval_envs(args, device, splits=SPLITS):
    """Evaluation environments by split, the last one first; no train split where test holds the same tasks."""
    made = {}
    for split in reversed(splits):
        if split == "train" and getattr(made["test"], "same_splits", False):
            break
        envs = make_args_envs(args, args.num_envs, split, device)
        count = len(eval_names(envs, args))
        size = math.ceil(count / math.ceil(count / args.num_envs))  # rounds of equal size
        if size != args.num_envs:
            envs.close()
            envs = make_args_envs(args, size, split, device)
        made[split] = envs
    return made


def make_args_envs(args, num_envs, split, device):
    sizes = dict(horizon=args.horizon or None, episodes_per_task=args.episodes_per_task or None)
    rules = dict(reward_version=args.reward_version, split_rule=args.split_rule)
    sessions = dict(sessions=args.sessions, session_process=args.session_process)
    return make_envs(args.env_id, num_envs, split, args.seed, device, **rules, **sessions, **sizes)


def draw_pictures(folder, eval_envs, details, agent, model, args):
    """Three tasks: the reward that the belief expects of each step, or at the alternating grid's two goals (Figure 2),
    the true context, true and predicted session ends. Returns over a task's episodes (Figure 6), if there are some."""
    if args.episodes_per_task > 1:
        returns = np.array([task["return"] for task in details["test"].values()])  # (tasks, K)
        mean, half = returns.mean(0), 1.96 * returns.std(0) / len(returns) ** 0.5
        line = np.arange(1, args.episodes_per_task + 1), np.stack([mean, mean - half, mean + half])
        band = f"mean and its 95 % interval over {len(returns)} tasks"
        draw_lines(Path(folder) / "episodes.png", {SCRIPT: line}, "episode of a task", "eval/test: return", band)
    if args.no_belief or args.oracle_context:
        return
    envs = eval_envs["test"]
    names = [envs.tasks[i * len(envs.tasks) // envs.num_envs] for i in range(envs.num_envs)]
    agent.eval(), model.eval()
    data = rollout(envs, agent, model, args, False, names, deterministic=True)
    agent.train(), model.train()
    chosen = range(0, len(names), math.ceil(len(names) / 3))
    goals = data["task"][:, :4].unflatten(1, (2, 2)) if args.env_id == "GridWorldAlternating" else None
    with torch.no_grad():
        here = [data[name] for name in ("obs", "actions", "next_obs")]
        places = {"of the step taken": here}
        if goals is not None:  # staying at a goal
            at = [
                torch.cat([(goals[:, g] / 4 - 0.5).expand(len(here[0]), -1, 2), here[0][..., 2:]], -1) for g in (0, 1)
            ]
            places = {f"at goal {g + 1}": (at[g], torch.zeros_like(here[1]), at[g]) for g in (0, 1)}
        expected = {label: predicted_reward(model, data["beliefs"][:-1], *place) for label, place in places.items()}
    for n in chosen:
        column = {name: data[name][:, n].cpu().numpy() for name in "rewards session_end predicted_end contexts".split()}
        lines = {"expected reward": {label: y[:, n].cpu().numpy() for label, y in expected.items()}}
        walks = []
        if goals is not None:
            cells = (4 * (data["obs"][:, n, :2] + 0.5)).cpu().numpy()
            after = (4 * (data["next_obs"][:, n, :2] + 0.5)).cpu().numpy()
            first = 0
            for last in np.flatnonzero(column["session_end"]):
                walk = np.concatenate([cells[first : last + 1], after[last : last + 1]])
                counts = int((column["contexts"][first] == goals[n, 1].cpu().numpy()).all())
                walks.append((walk, goals[n].cpu().numpy(), counts))
                first = last + 1
        file = Path(folder) / f"sessions_{names[n].replace('/', '_').replace(',', '_')}.png"
        draw_sessions(file, names[n], column, lines, walks)


def predicted_reward(model, belief, obs, action, next_obs):
    """The decoder's mean reward under each belief (T, N, 2 Z), of one transition (T, N, .) each: (T, N)."""
    mean, logvar = model.moments(belief)
    m = mean + (0.5 * logvar).exp() * torch.randn(100, *mean.shape, device=mean.device)  # (100, T, N, Z)
    if isinstance(model.reward_decoder, MultiHeadDecoder):
        p = model.reward_decoder(m).sigmoid().mean(0)  # (T, N, cells), of the reward 1
        return 1.1 * p.gather(-1, model.cell(next_obs).unsqueeze(-1)).squeeze(-1) - 0.1
    x = model.obs_norm(obs), model.action_input(action), model.obs_norm(next_obs)
    x = [y.flatten(0, 1)[None] for y in x]
    return model.reward_decoder(m.flatten(1, 2), *x).mean(0).view(belief.shape[:2])


def capture_video(folder, envs, agent, model, args, blind=False):
    """Films the first evaluation task of each family, most likely actions, all K episodes: video_<family>.gif.

    Raises BadInput on machines where nothing can draw.
    """
    families = dict.fromkeys(name.split("/")[0] for name in envs.tasks)
    names = [next(name for name in envs.tasks if name.split("/")[0] == family) for family in families]
    agent.eval(), model.eval()
    for first in range(0, len(names), envs.num_envs):
        chunk = names[first : first + envs.num_envs]
        padded = chunk + [chunk[-1]] * (envs.num_envs - len(chunk))
        data = rollout(envs, agent, model, args, blind, padded, deterministic=True)
        for row, name in enumerate(chunk):
            file = Path(folder) / f"video_{name.split('/')[0]}.gif"
            replayed = envs.film(name, row, data["actions"][:, row].cpu().numpy(), file)
            same = np.array_equal(replayed, data["rewards"][:, row].cpu().numpy())
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


def main(args):
    torch.set_num_threads(1)  # these networks are small: more threads wait for each other and take the workers' cores
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun --nproc-per-node
        backend = "nccl" if args.cuda and torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # the others wait while the first one evaluates
    check_args(args)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if args.cuda else torch.device("cpu")
    if args.cuda:
        torch.cuda.set_device(device)
    state = load_checkpoint(args.resume or args.evaluate, device) if args.resume or args.evaluate else None
    name = f"{args.env_id.replace(':', '.')}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.run_dir or f"runs/{name}")
    envs = make_args_envs(args, args.num_envs // ranks(), "train", device)
    eval_envs = {}
    try:
        for name in ("horizon", "episodes_per_task"):
            if getattr(args, name) not in (0, getattr(envs, name)):
                raise BadInput(
                    f"{flag(name)} {getattr(args, name)}: {args.env_id} has {getattr(envs, name)} of its own"
                )
            setattr(args, name, getattr(envs, name))
        args.sessions, args.session_process = getattr(envs, "sessions", 0), getattr(envs, "session_process", "")
        check_args(args)
        if leads() and (args.evaluate or args.eval_interval >= 0):
            eval_envs = make_eval_envs(args, device, getattr(envs, "splits", SPLITS))
        if args.capture_video and not hasattr(eval_envs["test"], "film"):
            raise BadInput(f"--capture-video: {args.env_id} has no camera (Meta-World and ScratchItch have one)")
        train(args, envs, eval_envs, device, folder, state)
    finally:
        for made in (envs, *eval_envs.values()):
            made.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def train(args, envs, eval_envs, device, folder, state):
    torch.manual_seed(args.seed)
    model = BeliefModel(args, envs).to(device)
    sizes = model.belief_sizes
    if args.oracle_context:  # naming the tasks draws none
        info = envs.reset(tasks=[envs.tasks[0]] * envs.num_envs)[1]
        sizes = [info.get("context", info["task"]).shape[1]]
    agent = Agent(args, envs.single_observation_space.shape[0], envs.single_action_space, sizes).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-8, fused=True)
    belief_optimizer = torch.optim.Adam(model.parameters(), lr=args.belief_learning_rate, fused=True)
    buffer = Buffer(share(args.buffer_size))
    parts = dict(zip(PARTS, (agent, model, optimizer, belief_optimizer)))
    own = dict(buffer=buffer, envs=envs)  # of each process; the parts are the same in all of them
    if dist.is_initialized():  # other tasks and other actions in each
        envs.load_state_dict({"resets": dist.get_rank() << 32})
        torch.manual_seed(torch.randint(2**32, (ranks(),))[dist.get_rank()].item())
    if args.compile:
        for module, names in ((agent, ("act", "forward")), (model, ("step", "belief"))):
            for name in names:
                setattr(module, name, torch.compile(getattr(module, name)))

    if args.evaluate:
        load_modules(args.evaluate, state, dict(agent=agent, model=model))
        blind = is_blind(state["global_step"], args)
        scalars, details = evaluate(eval_envs, agent, model, args, blind)
        for key, value in scalars.items():
            print(f"{key:<48} {value:.4f}")
        folder.mkdir(parents=True, exist_ok=True)
        write_evaluation(folder, state["global_step"], scalars, details)
        draw_pictures(folder, eval_envs, details, agent, model, args)
        if args.capture_video:
            capture_video(folder, eval_envs["test"], agent, model, args, blind)
        return

    iteration, global_step, offset = 0, 0, 0
    if state:
        for name in (
            "env_id num_envs horizon episodes_per_task buffer_size reward_version split_rule sessions session_process"
        ).split():
            if getattr(args, name) != state["args"][name]:
                raise BadInput(
                    f"{flag(name)} {getattr(args, name)}: {args.resume} was saved with {state['args'][name]}"
                )
        if len(state["processes"]) != ranks():
            raise BadInput(f"{args.resume} was saved by {len(state['processes'])} processes, and here are {ranks()}")
        mine = state["processes"][dist.get_rank() if dist.is_initialized() else 0]
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
        if leads():
            folder.mkdir(parents=True, exist_ok=True)
            config = json.dumps(dict(script=SCRIPT, **asdict(args), versions=versions), indent=2)
            (folder / "config.json").write_text(config)
    except OSError as error:
        raise BadInput(f"cannot write to the run's folder: {error}") from error
    steps = args.num_envs * envs.meta_horizon
    iterations = max(1, args.total_timesteps // steps)
    learns_belief = not (args.no_belief or args.oracle_context)
    metrics = Metrics(folder, args, offset, global_step) if leads() else None

    signals = []  # the first SIGINT or SIGTERM ends the run after this iteration, saved; the second one at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: os._exit(128 + n) if signals else signals.append(n))
    progress = tqdm(
        total=iterations * steps, initial=global_step, unit=" steps", unit_scale=True, mininterval=1,
        disable=not leads(),
    )  # fmt: skip
    started, first_step, results, details, stop = time.time(), global_step, {}, None, False

    try:
        while iteration < iterations and not stop:
            iteration += 1
            left = 1 - (iteration - 1) / iterations
            optimizer.param_groups[0]["lr"] = args.learning_rate * (left if args.anneal_lr else 1)
            belief_optimizer.param_groups[0]["lr"] = args.belief_learning_rate * (left if args.belief_anneal_lr else 1)
            ent_coef = args.ent_coef_end + (args.ent_coef - args.ent_coef_end) * left
            clock = [time.perf_counter()]

            blind = is_blind(global_step, args)
            data = rollout(envs, agent, model, args, blind)
            global_step += steps
            check_finite(observation=data["obs"], next_observation=data["next_obs"], reward=data["rewards"])
            if global_step == first_step + steps:
                rows = min(args.buffer_size, iterations * args.num_envs) * learns_belief
                size = rows * sum(data[name][:, 0].nbytes for name in buffer.NAMES)
                missing = all_sum(torch.tensor(float(missing_space(folder, size) if leads() else 0), device=device))
                if missing > 0:
                    raise BadInput(
                        f"{folder} lacks {missing.item() / 1e6:,.0f} MB for its checkpoints: free some, choose another "
                        "--run-dir or a smaller --buffer-size"
                    )
            clock.append(time.perf_counter())

            with torch.no_grad():
                data["logprobs"], _, values = agent(data["obs"], data["beliefs"][:-1], data["actions"])
                last = agent.value(data["next_obs"][-1], data["beliefs"][-1])
            data["values"] = torch.cat([values, last[None]])
            rewards = data["rewards"]
            if args.norm_reward:
                rewards = normalise_rewards(rewards, data["alive"], agent.return_norm, args)
            data["advantages"], data["returns"] = gae(rewards, data["values"], data["terminated"], data["alive"], args)
            losses = {}
            if global_step > max(steps, args.precollect):
                losses = ppo_update(agent, optimizer, data, ent_coef, args)
            # The normalisers move between updates and rollouts, so that a rollout and its update see the same inputs.
            alive = data["alive"].flatten()
            agent.obs_norm.update(data["obs"].flatten(0, 1), alive)
            agent.first_norm.update(data["first_obs"], torch.ones_like(data["alive"][0]))
            if not blind:
                agent.belief_norm.update(data["beliefs"][:-1].flatten(0, 1), alive)
            clock.append(time.perf_counter())

            if learns_belief:
                if args.standardise_inputs:  # the changes fall with the number of steps
                    model.obs_norm.update(data["next_obs"].flatten(0, 1), alive)
                    model.reward_norm.update(data["rewards"].view(-1, 1), alive)
                buffer.add(data)
                if global_step >= args.precollect:
                    for _ in range(args.belief_updates):
                        terms = update_belief(model, belief_optimizer, buffer, args)
                        losses |= {f"belief_{key}": value for key, value in terms.items()}
            clock.append(time.perf_counter())

            progress.update(steps)
            if global_step // LOG_EVERY > (global_step - steps) // LOG_EVERY or iteration == iterations:
                episodes = data["raw_rewards"].view(args.episodes_per_task, args.horizon, -1).sum(1).mean(1)
                success = data["success"].view(args.episodes_per_task, args.horizon, -1).any(1).float().mean(1)
                episodes, success = ((all_sum(x) / ranks()).tolist() for x in (episodes, success))
                seconds = np.diff(clock)
                scalars = {f"losses/{key}": all_sum(value).item() for key, value in losses.items()}
                scalars |= {f"charts/return_episode_{k + 1}": value for k, value in enumerate(episodes)}
                scalars |= {"charts/episodic_return": episodes[-1], "charts/success_rate": success[-1]}
                scalars |= {"charts/SPS": (global_step - first_step) / (time.time() - started)}
                scalars |= dict(zip(("time/rollout", "time/ppo", "time/belief"), seconds / seconds.sum()))
                scalars |= {"time/env": data["env_seconds"] / seconds.sum()}
                scalars |= session_rates(all_sum(session_sums(data)), "charts")
                if leads():
                    with on_disk("metrics", global_step):
                        metrics.write(scalars, global_step)
                results |= {"return": episodes[-1], "success": success[-1]}
                progress.set_postfix({key: f"{value:.2f}" for key, value in results.items()})
            due = args.eval_interval > 0 and iteration % args.eval_interval == 0
            if eval_envs and (due or iteration == iterations):
                blind = is_blind(global_step, args)
                scalars, details = evaluate(eval_envs, agent, model, args, blind)
                with on_disk("evaluation", global_step):
                    metrics.write(scalars, global_step)
                    write_evaluation(folder, global_step, scalars, details)
                results |= {"test return": scalars["eval/test/return"]}
                results |= {"test success": scalars["eval/test/success_rate"]}
            due = args.checkpoint_interval > 0 and iteration % args.checkpoint_interval == 0
            stop = bool(all_sum(torch.tensor(len(signals), device=device)))  # all processes stop together
            if due or stop or iteration == iterations:
                check_finite(weights_of_the_policy=weights(agent), weights_of_the_belief_model=weights(model))
                mine = {key: part.state_dict() for key, part in own.items()} | dict(rng=torch.get_rng_state())
                if args.cuda:
                    mine["cuda_rng"] = torch.cuda.get_rng_state()
                processes = [mine]
                if dist.is_initialized():
                    processes = [None] * ranks()
                    dist.gather_object(mine, processes if leads() else None)
                if leads():
                    state = {key: part.state_dict() for key, part in parts.items()} | dict(processes=processes)
                    state |= dict(script=SCRIPT, args=asdict(args), iteration=iteration, global_step=global_step)
                    with on_disk("checkpoint", global_step):
                        state |= dict(metrics_bytes=metrics.file.tell())
                        save_checkpoint(folder / "checkpoint.pt", state)
                state = mine = processes = None
    except FloatingPointError as error:
        raise FloatingPointError(f"iteration {iteration}: {error}; the last checkpoint stands") from None
    finally:
        progress.close()
        if metrics:
            metrics.close()
    if details and iteration == iterations:
        with on_disk("pictures", global_step):
            draw_pictures(folder, eval_envs, details, agent, model, args)
    if leads():
        print(f"{global_step} steps in {time.time() - started:.0f} s: {folder}")


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
