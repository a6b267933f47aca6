"""Dynamic Mixture Embeddings for contextual meta-RL (DME, anonymous authors, under review; no code was published).

VariBAD with another belief model, a hierarchical Gaussian-mixture VAE: a macro latent w ~ N(0, I), a cluster
y ~ Cat(1/C), a task embedding z ~ N(m(w, y), v(w, y)): the components move with w, so the prior adapts to the context.
One recurrent encoder gives Gaussian posteriors of w and z; that of y follows by Bayes' rule. The decoders see z alone,
the policy the posterior of z with w and y. Virtual tasks, drawn from the mixture, train it too.

Shapes: T steps of a meta-episode, N environments, B batch, S observation, A action, Z latent (z, and w), C components,
D hidden; time-major.

    python dme.py --env-id ML10                     # every preset is a default: --help shows it
    python dme.py --env-id ML10 --cuda              # with the sizes of the paper's nearest peer, SDVT
    python dme.py --resume runs/.../checkpoint.pt
    python dme.py --evaluate runs/.../checkpoint.pt

Equation (of the paper)                                          function
    (1), (2) q(w | c), q(z | c)                                  BeliefModel.posterior
    p(z | w, y) = N(m(w, y), v(w, y))                            BeliefModel.components
    (3) q(y | w, z)                                              cluster_posterior
    (4), (5), (6) future states and rewards from z               Decoder, MultiHeadDecoder, window, reconstruction
    (7), (8), (9), (10) the KL terms and the ELBO                elbo
    (11) virtual tasks                                           BeliefModel.prior, decoded_reward
    (12) to (16) PPO on (mu_z, sigma_z^2, w, y)                  BeliefModel.belief, Agent, gae, ppo_update
    Algorithm 1                                                  train
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
from common.plot import draw_grid_belief, draw_mixture, draw_returns

SCRIPT = Path(__file__).stem
LOG_EVERY = 10_000  # steps between two rows of metrics; evaluations are logged whenever they happen
PARTS = ("agent", "model", "optimizer", "belief_optimizer")  # what a checkpoint holds beside counters and `processes`


# ---------- 3. Arguments and presets ----------


@dataclass
class Args:
    # experiment
    # GridWorld, GridWorldLDM, GridWorldExtrapolation, SparsePointRobot, MEWA, HalfCheetahVel, HalfCheetahDir, AntDir,
    # AntGoal, HopperMass, ML1-<family>, ML10, ML45, or package.module:factory; with sessions: GridWorldAlternating,
    # Reacher, HalfCheetahDirSessions, HalfCheetahVelSessions, HalfCheetahWindVelSessions, ScratchItch.
    env_id: str = "GridWorld"
    seed: int = 1  # of tasks, networks and actions
    cuda: bool = False  # train on the GPU, with the paper's sizes and steps where a CPU's preset has its own
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline works)
    total_timesteps: int = 20_000_000  # environment steps, summed over environments
    num_envs: int = 16  # environments stepped together (N)
    horizon: int = 15  # steps of an episode (H); 0 = the environment's own
    episodes_per_task: int = 4  # episodes of a meta-episode (K), which is an iteration; 0 = the environment's own
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
    learning_rate: float = 7e-4  # Adam's step size for actor and critic
    anneal_lr: bool = False  # let it fall linearly to 0
    gamma: float = 0.95  # discount per step, over the whole meta-episode
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimate
    # task: the end of a meta-episode bootstraps from its last state; terminal: its value is 0 (variBAD's code, grid);
    # episode: no credit flows from one episode to the next (variBAD's code, elsewhere).
    time_limit: Literal["task", "terminal", "episode"] = "task"
    update_epochs: int = 2  # passes over an iteration's steps
    num_minibatches: int = 4  # gradient steps per pass
    clip_coef: float = 0.05  # epsilon of the clipped ratio and value
    ent_coef: float = 0.01  # weight of the entropy bonus at the start
    ent_coef_end: float = 0.01  # and at the end: linear in between
    vf_coef: float = 0.5  # weight of the value loss
    value_loss: Literal["huber", "mse"] = "huber"  # huber: variBAD's code, clipped values; mse: (14) [paper]
    max_grad_norm: float = 0.5  # clip of the norm of the policy's gradient; 0 = off
    norm_reward: bool = True  # divide the policy's rewards by the deviation of the discounted return, clip at 10
    policy_layers: tuple[int, ...] = (32,)  # hidden layers (tanh) of actor and critic
    obs_embed: int = 16  # policy's embedding of the observation
    belief_embed: int = 16  # policy's embedding of each part of the belief
    # Training moves the states of a meta-episode by a random constant, this times the deviation of first states: so
    # that nothing tells the few training tasks by where things happen to stand (ours).
    obs_shift: float = 0.0
    std_init: float = 1.0  # deviation of a continuous action at the start
    std_min: float = 0.01  # its lower bound, reached softly
    std_max: float = 2.0  # its upper bound

    # belief model
    no_belief: bool = False  # zeros in place of the belief: the floor that any claim of adaptation has to beat
    oracle_context: bool = False  # the true task in place of the belief: the ceiling
    belief_warmup: int = 0  # steps for which the policy sees zeros while the belief model learns (ours)
    belief_learning_rate: float = 1e-3  # Adam's step size for encoder and decoders
    belief_anneal_lr: bool = False  # let it fall linearly to 0, so that the belief settles (ours)
    belief_updates: int = 3  # gradient steps per iteration
    belief_batch: int = 25  # meta-episodes per gradient step (B)
    belief_max_grad_norm: float = 0.0  # clip of the gradient's norm, for each of encoder and decoders; 0 = off
    buffer_size: int = 100_000  # meta-episodes kept for the belief model; as many as --num-envs: on-policy
    precollect: int = 5_000  # steps before the first gradient step; the policy waits for the second iteration too
    action_embed: int = 0  # embedding of the action in encoder and decoders; 0 = not an input
    state_embed: int = 8  # embedding of the state
    reward_embed: int = 8  # embedding of the reward (encoder)
    hidden_dim: int = 64  # units of the encoder's GRU (D)
    latent_dim: int = 5  # dimension of the latent (Z)
    tbptt: int = 0  # steps of a window of truncated back-propagation through time; 0 = whole meta-episode
    elbo_terms: int = 0  # posteriors drawn per meta-episode; 0 = all
    decode_terms: int = 0  # transitions drawn per meta-episode; 0 = all
    # Transitions that z_t decodes: those to come (4), those to come in this episode (its T, read so), all (variBAD).
    decode_window: Literal["all", "future", "episode"] = "future"
    # One Bernoulli per grid cell (multihead), or the squared error of the reward of (m, s, a, s') or of (m, s').
    reward_decoder: Literal["multihead", "mlp", "mlp-next"] = "multihead"
    decoder_layers: tuple[int, ...] = (32, 32)  # hidden layers (ReLU) of each decoder
    decoder_dropout: float = 0.0  # dropout on the decoders' embeddings of s, a, s'
    reward_coef: float = 1.0  # weight of the reward's reconstruction
    state_coef: float = 0.0  # weight of the state's reconstruction; 0 = no state decoder
    standardise_inputs: bool = True  # standardise the inputs of encoder and decoders (ours); the grid's default is raw

    # DME; the paper prints no hyper-parameters: [paper] marks what its text says, the rest is ours or SDVT's
    num_components: int = 5  # components of the mixture (C)
    component_layers: tuple[int, ...] = (256,)  # hidden layers (ReLU) of the network from w to means and variances
    static_prior: bool = False  # ablation: components that do not depend on w, as SDVT's
    no_policy_w: bool = False  # ablation [paper, Figure 4]: the policy does not see w
    beta_w: float = 0.1  # weight of the KL of w (7); at 1 that KL goes to 0: w is dead
    beta_y: float = 0.05  # weight of the KL of y (8)
    beta_z: float = 1.0  # weight of the KL of z (9); every term of the ELBO is a mean over B, posteriors, transitions
    hard_y: bool = False  # (9) under the most probable y; default is its expectation under q(y | w, z)
    policy_y: Literal["argmax", "sample", "probs"] = "probs"  # y to the policy; argmax [paper: "hard partitions"]
    policy_w: Literal["sample", "mean"] = "sample"  # w to the policy in training, sample [paper, Algorithm 1]
    policy_z: Literal["logvar", "var"] = "logvar"  # scale of z to the policy; var [paper]
    # The belief at step 0: the heads on the encoder's zero state, or a draw from the prior [paper, Algorithm 1].
    initial_belief: Literal["heads", "prior"] = "heads"
    # Virtual tasks: whole meta-episodes with decoded rewards for the policy (SDVT; the paper's section 4.2), decoded
    # rewards in the ELBO's batches (the paper's Algorithm 1), or both.
    virtual: Literal["off", "policy", "elbo", "both"] = "policy"
    virtual_rate: float = 0.125  # gamma: probability of a virtual iteration or batch at the end, rising from 0 [paper]
    virtual_low: float = 0.0  # lower bound of virtual rewards: Meta-World's lie in [0, 10]
    virtual_high: float = 10.0  # their upper bound


# Meta-World: the hyper-parameters of SDVT (Lee et al., 2023), the paper's peer, with the paper's three episodes per
# task and one meta-episode per iteration. The grid and the point, which DME did not run: variBAD's.
META_WORLD = dict(
    num_envs=10, horizon=500, episodes_per_task=3, total_timesteps=250_000_000, eval_interval=650,
    checkpoint_interval=10, gamma=0.99, gae_lambda=0.9, update_epochs=5, num_minibatches=3, clip_coef=0.1,
    ent_coef=0.001, ent_coef_end=0.001, policy_layers=(256, 256), obs_embed=64, belief_embed=64,
    std_min=0.5, std_max=1.5, belief_updates=3, belief_batch=10, belief_max_grad_norm=1.0, buffer_size=1000,
    action_embed=16, state_embed=32, reward_embed=16, hidden_dim=256, tbptt=50, elbo_terms=100, decode_terms=100,
    reward_decoder="mlp", decoder_layers=(64, 64, 32), reward_coef=10.0, state_coef=1000.0,
    decoder_dropout=0.7,
)  # fmt: skip
LOCOMOTION = dict(  # theirs, too; per meta-episode of 400 steps, where they count by 200, 400 or 800
    total_timesteps=100_000_000, horizon=200, episodes_per_task=2, eval_interval=25, checkpoint_interval=25,
    gamma=0.97, gae_lambda=0.9, num_minibatches=8, clip_coef=0.1, policy_layers=(128, 128), obs_embed=64,
    belief_embed=64, belief_updates=1, belief_batch=10, belief_max_grad_norm=1.0, buffer_size=10_000, action_embed=16,
    state_embed=32, reward_embed=16, hidden_dim=128, tbptt=50, elbo_terms=50, decode_terms=50, reward_decoder="mlp",
    decoder_layers=(64, 32), reward_coef=50.0, virtual_low=-10.0,
)  # fmt: skip
PRESETS = {
    # The authors of variBAD keep the entropy's weight at 0.01; falling from 0.04, no seed stops searching early.
    # Each posterior pays its whole KL at every step, variBAD's chain for the news alone: a large weight of the reward
    # keeps the posterior from collapsing to the prior, as it does at 120, variBAD's balance.
    "GridWorld": dict(
        time_limit="terminal", standardise_inputs=False, ent_coef=0.04, reward_coef=5000.0,
        virtual_low=-0.1, virtual_high=1.0,
    ),
    "SparsePointRobot": dict(
        total_timesteps=50_000_000, horizon=100, episodes_per_task=3, eval_interval=25, checkpoint_interval=25,
        gamma=0.99, gae_lambda=0.9, num_minibatches=8, clip_coef=0.1, ent_coef=0.001, ent_coef_end=0.001,
        policy_layers=(128, 128, 128), obs_embed=64, belief_embed=64, belief_batch=15, buffer_size=10_000,
        action_embed=16, state_embed=32, reward_embed=16, hidden_dim=128, reward_decoder="mlp-next",
        decoder_layers=(64, 32),
        reward_coef=400.0, virtual_high=1.0,
    ),
    "HalfCheetahVel": LOCOMOTION,
    "HalfCheetahDir": LOCOMOTION | dict(update_epochs=16, num_minibatches=2),
    "AntDir": LOCOMOTION | dict(num_minibatches=2, belief_updates=2),
    "AntGoal": LOCOMOTION | dict(
        num_minibatches=2, clip_coef=0.05, learning_rate=1e-3, anneal_lr=True, belief_updates=10, latent_dim=10,
        tbptt=0, elbo_terms=0, decode_terms=0, reward_coef=400.0,
    ),
    "HopperMass": LOCOMOTION | dict(  # not one of the paper's: what varibad.py has for it
        total_timesteps=10_000_000, horizon=400, episodes_per_task=4, eval_tasks=30, learning_rate=6e-5, gamma=0.99,
        update_epochs=4, clip_coef=0.2, policy_layers=(256, 256, 128), belief_batch=15, belief_updates=3,
        latent_dim=10, elbo_terms=100, decode_terms=100,
    ),
    "ML1": META_WORLD | dict(total_timesteps=50_000_000, eval_interval=100),
    "ML10": META_WORLD | dict(num_components=10),
    "ML45": META_WORLD | dict(
        total_timesteps=400_000_000, eval_interval=3300, latent_dim=10, belief_updates=6, num_components=45,
        virtual_rate=0.1,
    ),
}  # fmt: skip
for name in ("GridWorldLDM", "GridWorldExtrapolation"):  # 7x7; networks as large as LDM's
    PRESETS[name] = PRESETS["GridWorld"] | dict(
        total_timesteps=100_000_000, horizon=30, state_embed=32, hidden_dim=128, latent_dim=32
    )
YOUR_OWN = PRESETS["SparsePointRobot"] | dict(horizon=0, episodes_per_task=0)  # for package.module:factory
SMALL_ML = dict(
    num_envs=20, horizon=200, num_minibatches=12, learning_rate=2.5e-4, clip_coef=0.2, std_init=0.7, std_min=0.2,
    eval_interval=50, eval_tasks=10, hidden_dim=128, elbo_terms=25, decode_terms=50, decoder_dropout=0.0,
)  # fmt: skip
SMALL = {  # what fits a machine without a GPU, laid over the preset unless --cuda; ours
    "SparsePointRobot": dict(tbptt=50, elbo_terms=25, decode_terms=100),
    "MEWA": dict(tbptt=50, elbo_terms=25, decode_terms=100),
    "AntGoal": dict(tbptt=50, elbo_terms=25, decode_terms=100),
    "HopperMass": dict(buffer_size=2000),  # 0.36 GB
    # The tasks of ML1 differ in goals: no state decoder. The policy waits for a belief that has settled.
    "ML1": SMALL_ML | dict(
        num_envs=40, horizon=150, episodes_per_task=2, num_minibatches=8, eval_tasks=0, eval_interval=20,
        belief_warmup=900_000, belief_anneal_lr=True, belief_updates=30, belief_batch=20, belief_learning_rate=2e-3,
        hidden_dim=64, elbo_terms=8, decode_terms=150, state_coef=0.0,
    ),
    "ML10": SMALL_ML,
    "ML45": SMALL_ML | dict(eval_interval=250),
}  # fmt: skip
for name in ("ML1-reach", "ML1-reach-wall"):  # an object stands about that has nothing to do with the goal
    SMALL[name] = SMALL["ML1"] | dict(obs_shift=2.0)


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
        "state_embed reward_embed hidden_dim latent_dim obs_embed belief_embed learning_rate belief_learning_rate "
        "std_min std_init clip_coef num_components"
    ).split():
        if not 0 < getattr(args, name) < math.inf:
            raise BadInput(f"{flag(name)} must be above 0, not {getattr(args, name)}")
    for name in (
        "seed eval_tasks checkpoint_interval ent_coef ent_coef_end vf_coef max_grad_norm belief_updates precollect "
        "belief_warmup obs_shift horizon episodes_per_task sessions "
        "belief_max_grad_norm action_embed tbptt elbo_terms decode_terms reward_coef state_coef beta_w beta_y "
        "beta_z"
    ).split():
        if not 0 <= getattr(args, name) < math.inf:
            raise BadInput(f"{flag(name)} must not be below 0, and finite: not {getattr(args, name)}")
    for name, below in dict(gamma=1.0, gae_lambda=1.0, decoder_dropout=0.999, virtual_rate=1.0).items():
        if not 0 <= getattr(args, name) <= below:
            raise BadInput(f"{flag(name)} must lie in [0, {below}], not {getattr(args, name)}")
    for name in ("policy_layers", "decoder_layers", "component_layers"):
        if not getattr(args, name) or min(getattr(args, name)) < 1:
            raise BadInput(f"{flag(name)} must be one or more positive sizes, not {getattr(args, name)}")
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
    if not -math.inf < args.virtual_low < args.virtual_high < math.inf:
        raise BadInput(
            f"--virtual-low {args.virtual_low} must lie below --virtual-high {args.virtual_high}, both finite"
        )
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
    """Actor and critic on the normalised, embedded observation and belief: pi(a | s, b) and V(s, b).

    The belief comes in parts (`belief_sizes`), each with its own embedding.
    """

    def __init__(self, args, obs_dim, action_space, belief_sizes):
        super().__init__()
        self.belief_sizes = list(belief_sizes)
        # In training the code of a test's family is constant: a higher floor keeps the oracle from blowing it up.
        min_std = 0.02 if args.oracle_context else 1e-4
        self.obs_norm, self.belief_norm = RunningNorm(obs_dim), RunningNorm(sum(belief_sizes), min_std)
        self.return_norm, self.first_norm = RunningNorm(1), RunningNorm(obs_dim)
        self.obs_embed = nn.Linear(obs_dim, args.obs_embed)
        self.belief_embeds = nn.ModuleList(nn.Linear(size, args.belief_embed) for size in belief_sizes)
        self.discrete = hasattr(action_space, "n")
        n_out = int(action_space.n) if self.discrete else action_space.shape[0]
        sizes = [args.obs_embed + args.belief_embed * len(belief_sizes), *args.policy_layers]
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

    def embed(self, obs, belief):
        parts = self.belief_norm(belief).split(self.belief_sizes, -1)
        embedded = [self.obs_embed(self.obs_norm(obs))] + [e(part) for e, part in zip(self.belief_embeds, parts)]
        return torch.cat(embedded, -1).tanh()

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
    """Embeddings and GRU: the history of (a, s', r) -> hidden (D); the posterior's heads stand in BeliefModel."""

    def __init__(self, args, obs_dim, action_dim):
        super().__init__()
        self.embeds = nn.ModuleDict(
            dict(state=nn.Linear(obs_dim, args.state_embed), reward=nn.Linear(1, args.reward_embed))
        )
        if args.action_embed:
            self.embeds["action"] = nn.Linear(action_dim, args.action_embed)
        self.gru = GRU(args.action_embed + args.state_embed + args.reward_embed, args.hidden_dim)
        for name, parameter in self.gru.named_parameters():
            nn.init.zeros_(parameter) if "bias" in name else nn.init.orthogonal_(parameter)

    def embed(self, action, next_obs, reward):
        inputs = dict(action=action, state=next_obs, reward=reward)
        return torch.cat([embed(inputs[name]) for name, embed in self.embeds.items()], -1).relu()

    def step(self, action, next_obs, reward, hidden):
        """One transition: action (N, A), next_obs (N, S), reward (N, 1), hidden (N, D) -> hidden (N, D)."""
        weights = self.gru.weight_ih_l0, self.gru.weight_hh_l0, self.gru.bias_ih_l0, self.gru.bias_hh_l0
        return torch.gru_cell(self.embed(action, next_obs, reward), hidden, *weights)

    def forward(self, action, next_obs, reward, tbptt=0):
        """Whole meta-episodes from hidden 0: (T, B, .) each -> hiddens (T + 1, B, D), the first of them the zero state.

        With tbptt = w, gradients stop every w steps: a pass without gradients finds the hidden state at the start of
        each window; then all windows run side by side as one batch.
        """
        x = self.embed(action, next_obs, reward)
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
    """Encoder, the posterior's heads and the decoders."""

    def __init__(self, args, envs):
        super().__init__()
        S, space = envs.single_observation_space.shape[0], envs.single_action_space
        self.discrete = hasattr(space, "n")
        A = int(space.n) if self.discrete else space.shape[0]
        self.cell = getattr(envs, "cell", None)
        self.encoder = Encoder(args, S, A)
        self.args = args
        self.heads = nn.Linear(args.hidden_dim, 4 * args.latent_dim)  # mean and log-variance of w, then of z
        self.mixture = mlp(
            [args.latent_dim, *args.component_layers, 2 * args.num_components * args.latent_dim], nn.ReLU
        )
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
        self.belief_sizes = [2 * args.latent_dim] + [args.latent_dim] * (not args.no_policy_w) + [args.num_components]

    def parts(self):
        """The modules whose gradients are clipped one by one."""
        encoder = nn.ModuleList([self.encoder, self.heads, self.mixture])
        return [encoder, self.reward_decoder] + ([self.state_decoder] if self.state_decoder else [])

    def action_input(self, action):
        """What the environment made of the policy's action: one-hot if discrete, clipped to its box else."""
        if self.discrete:
            return F.embedding(action, self.one_hot)
        return torch.maximum(torch.minimum(action, self.high), self.low) if hasattr(self, "low") else action

    def step(self, action, next_obs, reward, hidden):
        """The encoder's step on a raw transition: action (N, .), next_obs (N, S), reward (N,) -> hidden (N, D)."""
        reward = self.reward_norm(reward.unsqueeze(-1))
        return self.encoder.step(self.action_input(action), self.obs_norm(next_obs), reward, hidden)

    def hiddens(self, batch, tbptt=0):
        """The encoder's hidden states on whole meta-episodes: actions, next_obs, rewards (T, B, .) -> (T + 1, B, D)."""
        rewards = self.reward_norm(batch["rewards"].unsqueeze(-1))
        return self.encoder(self.action_input(batch["actions"]), self.obs_norm(batch["next_obs"]), rewards, tbptt)

    def posterior(self, hidden):
        """(1), (2): hidden (..., D) -> mean and log-variance of w, then of z, (..., Z) each."""
        w_mean, w_logvar, z_mean, z_logvar = self.heads(hidden).chunk(4, -1)
        return w_mean, w_logvar.clamp(-10, 4), z_mean, z_logvar.clamp(-10, 4)

    def components(self, w):
        """p(z | w, y=k) for each k: w (..., Z) -> mean and log-variance (..., C, Z)."""
        out = self.mixture(torch.zeros_like(w) if self.args.static_prior else w)
        mean, raw = out.unflatten(-1, (self.args.num_components, -1)).chunk(2, -1)
        return mean, (F.softplus(raw) + 1e-4).log()  # the floor keeps (3) from saturating

    def prior(self, n):
        """n draws of the generative model: w ~ N(0, I), y ~ Cat(1 / C), one-hot, and mean and logvar of p(z | w, y)."""
        w = torch.randn(n, self.args.latent_dim, device=self.heads.weight.device)
        mean, logvar = self.components(w)  # (n, C, Z)
        k = torch.randint(mean.shape[1], (n,), device=w.device)
        rows = torch.arange(n, device=w.device)
        return w, F.one_hot(k, mean.shape[1]).float(), mean[rows, k], logvar[rows, k]

    def belief(self, hidden, deterministic=False):
        """What the policy sees: mean and log-variance of z, w, y (N, .), side by side."""
        w_mean, w_logvar, z_mean, z_logvar = self.posterior(hidden)
        w, z = (w_mean, z_mean) if deterministic else (gaussian(w_mean, w_logvar), gaussian(z_mean, z_logvar))
        y = cluster_posterior(z, *self.components(w)).exp()
        if self.args.policy_y == "argmax" or (self.args.policy_y == "sample" and deterministic):
            y = F.one_hot(y.argmax(-1), y.shape[-1]).float()
        elif self.args.policy_y == "sample":
            y = F.one_hot((y / torch.empty_like(y).exponential_()).argmax(-1), y.shape[-1]).float()
        return self.join(w_mean if self.args.policy_w == "mean" else w, y, z_mean, z_logvar)

    def join(self, w, y, z_mean, z_logvar):
        z_scale = z_logvar if self.args.policy_z == "logvar" else z_logvar.exp()
        return torch.cat([z_mean, z_scale] + [w] * (not self.args.no_policy_w) + [y], -1)

    def moments(self, belief):
        """Mean and log-variance of z out of what the policy sees."""
        mean, scale = belief[..., : 2 * self.args.latent_dim].chunk(2, -1)
        return mean, scale if self.args.policy_z == "logvar" else scale.log()


def gaussian(mean, logvar):
    """A reparameterised sample of N(mean, exp(logvar))."""
    return mean + (0.5 * logvar).exp() * torch.randn_like(mean)


def cluster_posterior(z, mean, logvar):
    """(3) in log space: z (..., Z), components (..., C, Z) -> log q(y | w, z) (..., C)."""
    log_density = -0.5 * ((z.unsqueeze(-2) - mean).square() * (-logvar).exp() + logvar).sum(-1)
    return log_density.log_softmax(-1)


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


def elbo(model, batch, args):
    """The negative ELBO (10), its terms means over the batch, the posteriors t = 0..T and the transitions each decodes.

    batch: obs, next_obs (T, B, S), actions (T, B, .), rewards, alive (T, B). Returns the loss and a dict of its terms.
    """
    t, (*posteriors, real) = draw_posteriors(
        args, *model.posterior(model.hiddens(batch, args.tbptt)), real_posteriors(batch["alive"])
    )
    w_mean, w_logvar, z_mean, z_logvar = posteriors  # (E, B, Z) each
    w, z = gaussian(w_mean, w_logvar), gaussian(z_mean, z_logvar)
    mean, logvar = model.components(w)  # (E, B, C, Z)
    log_y = cluster_posterior(z, mean, logvar)  # (E, B, C)
    y = log_y.exp()
    reward_loss, state_loss = reconstruction(model, z, t, real, batch, args)  # (5), (6)
    kl_w = kl_gaussians(w_mean, w_logvar, torch.zeros_like(w), torch.zeros_like(w))  # (7)
    kl_y = math.log(args.num_components) + (y * log_y).sum(-1)  # (8)
    kl_z = kl_gaussians(z_mean.unsqueeze(-2), z_logvar.unsqueeze(-2), mean, logvar)  # to each component: (E, B, C)
    weight = F.one_hot(y.argmax(-1), args.num_components) if args.hard_y else y
    kl_z = (weight * kl_z).sum(-1)  # (9)
    kl_w, kl_y, kl_z = average(kl_w, real), average(kl_y, real), average(kl_z, real)
    loss = args.state_coef * state_loss + args.reward_coef * reward_loss
    loss = loss + args.beta_w * kl_w + args.beta_y * kl_y + args.beta_z * kl_z  # (10)
    terms = dict(loss=loss, reward=reward_loss, state=state_loss, kl_w=kl_w, kl_y=kl_y, kl_z=kl_z)
    with torch.no_grad():  # whether the mixture lives
        usage = y.mean((0, 1))
        signs = dict(
            clusters_used=(-(usage * usage.clamp(min=1e-12).log()).sum()).exp(),  # 1 .. C
            y_entropy=-(y * log_y).sum(-1).mean(),
            y_max=y.max(-1).values.mean(),
            w_mean_std=w_mean.flatten(0, 1).std(0, correction=0).mean(),
            component_movement=mean.flatten(0, 1).std(0, correction=0).mean(),  # of each component, with w
            component_spread=mean.std(-2, correction=0).mean(),  # of the components, at one w
        )
        terms |= {name: sign / ranks() for name, sign in signs.items()}  # the mean over processes, once summed
    return loss, terms


def decoded_reward(model, z, obs, action, next_obs, args):
    """(11) The most likely reward under z: z (B, Z), obs, action, next_obs (T, B, .) -> (T, B). Dropout stays on."""
    if args.reward_decoder == "multihead":
        logits = model.reward_decoder(z[None]).expand(len(obs), -1, -1)
        hit = logits.gather(-1, model.cell(next_obs).unsqueeze(-1)).squeeze(-1) > 0
        return torch.where(hit, 1.0, args.virtual_low)
    x = model.obs_norm(obs), model.action_input(action), model.obs_norm(next_obs)
    return model.reward_decoder(z[None], *x)[0, ..., 0].clamp(args.virtual_low, args.virtual_high)


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


def update_belief(model, optimizer, buffer, virtual_rate, args):
    """One gradient step on a batch of stored meta-episodes. Returns the loss's terms, detached.

    With probability `virtual_rate` (gamma of Algorithm 1) the batch's rewards are those of tasks drawn from the prior.
    """
    batch = buffer.sample(share(args.belief_batch))
    if args.virtual in ("elbo", "both") and torch.rand(()) < virtual_rate:
        with torch.no_grad():
            z = gaussian(*model.prior(share(args.belief_batch))[2:])
            batch["rewards"] = decoded_reward(model, z, batch["obs"], batch["actions"], batch["next_obs"], args)
    loss, terms = elbo(model, batch, args)
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


def normalise_rewards(rewards, alive, return_norm, args, update=True):
    """rewards (T, N) / deviation of the discounted return (updated first), clipped at 10: the authors' VecNormalize."""
    total, returns = torch.zeros_like(rewards[0]), torch.empty_like(rewards)
    for t in range(len(rewards)):
        returns[t] = total = args.gamma * total + rewards[t]
    if update:
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
            if args.value_loss == "huber":
                near = mb["values"] + (value - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
                errors = [F.smooth_l1_loss(v, mb["returns"], reduction="none") for v in (value, near)]
                v_loss = 0.5 * (torch.maximum(*errors) * weight).sum()
            else:
                v_loss = 0.5 * ((value - mb["returns"]).square() * weight).sum()
            entropy = (entropy * weight).sum()
            loss = pg_loss + args.vf_coef * v_loss - ent_coef * entropy
            descend(optimizer, loss, [agent], args.max_grad_norm, "policy")
            with torch.no_grad():
                approx_kl = ((ratio - 1 - logratio) * weight).sum()
                clipfrac = (((ratio - 1).abs() > args.clip_coef) * weight).sum()
                log.append(torch.stack([pg_loss, v_loss, entropy, approx_kl, clipfrac]))
    return dict(zip(("policy", "value", "entropy", "approx_kl", "clipfrac"), torch.stack(log).mean(0)))


# ---------- 7. Buffer ----------


class Buffer:
    """Ring of the last meta-episodes, preallocated on the device: one tensor (size, T, ...) for each entry."""

    NAMES = ("obs", "next_obs", "actions", "rewards", "alive")

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


def rollout(envs, agent, model, args, blind=False, tasks=None, deterministic=False, virtual=False):
    """One meta-episode in every environment, from a reset and the prior belief; blind: with zeros in its place.

    virtual: the rewards are those that the decoder gives under a task drawn from the prior for each environment (11);
    the environments' own stay in data["true_rewards"], which else is data["rewards"] itself.

    Returns a dict: obs, next_obs (T, N, S), actions (T, N, .), rewards, raw_rewards, terminated, alive, success (T, N),
    beliefs (T + 1, N, .), task (N, G), and env_seconds, the time spent in `envs.step`.
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
        z_virtual = gaussian(*model.prior(N)[2:]) if virtual else None
        data["true_rewards"] = torch.empty(T, N, device=device) if virtual else data["rewards"]
        for t in range(T + 1):
            if args.oracle_context:
                belief = data["task"]
            elif blind:
                belief = data["beliefs"][0]  # zeros
            elif t == 0 and args.initial_belief == "prior":
                belief = model.join(*model.prior(N))
            else:
                belief = model.belief(hidden, deterministic)
            data["beliefs"][t] = belief
            if t == T:
                break
            data["obs"][t] = obs = obs + shift
            action = agent.act(obs, belief, deterministic)
            start = time.perf_counter()
            obs, reward, terminated, _, info = envs.step(action)
            env_seconds += time.perf_counter() - start
            data["raw_rewards"][t] = info.get("raw_reward", reward)
            next_obs = info["final_obs"] + shift
            data["true_rewards"][t] = reward
            if virtual:
                x = data["obs"][t : t + 1], action[None], next_obs[None]
                reward = decoded_reward(model, z_virtual, *x, args)[0]
            data["next_obs"][t], data["actions"][t], data["rewards"][t] = next_obs, action, reward
            data["terminated"][t] = terminated
            for name in ("alive", "success"):
                if name in info:
                    data[name][t] = info[name]
            if not (args.oracle_context or blind):
                hidden = model.step(action, next_obs, reward, hidden)
    return data | dict(env_seconds=env_seconds)


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
            details[split] = {}
            for first in range(0, len(names), envs.num_envs):
                chunk = names[first : first + envs.num_envs]
                padded = chunk + [chunk[-1]] * (envs.num_envs - len(chunk))
                data = rollout(envs, agent, model, args, blind, padded, deterministic=not args.eval_sample)
                episodes = (envs.episodes_per_task, envs.horizon, envs.num_envs)
                returns = data["raw_rewards"].view(episodes).sum(1).T.tolist()
                success = data["success"].view(episodes).any(1).float().T.tolist()
                beliefs = data["beliefs"][-1].tolist()
                for name, r, s, b in zip(chunk, returns, success, beliefs):
                    details[split][name] = {"return": r, "success": s, "belief": b}
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


def draw_components(folder, eval_envs, details, agent, model, args):
    """The mixture's components in z-space for w = 0 and three draws of w, the tasks' last posterior means on top."""
    if args.no_belief or args.oracle_context or args.latent_dim < 2:
        return
    w = torch.randn(4, args.latent_dim, generator=torch.Generator().manual_seed(0)).to(model.heads.weight.device)
    w[0] = 0
    with torch.no_grad():
        mean, logvar = (x.cpu().numpy() for x in model.components(w))  # (4, C, Z)
    tasks = {
        name.replace("/", f" ({split})/"): task["belief"][: args.latent_dim]
        for split, named in details.items()
        for name, task in named.items()
    }
    draw_mixture(Path(folder) / "components.png", mean, np.exp(0.5 * logvar), tasks)


def draw_pictures(folder, eval_envs, details, agent, model, args):
    """Grid worlds: the return of every goal and, for three goals, where the decoder thinks the goal is, step by step,
    with the agent's path."""
    draw_components(folder, eval_envs, details, agent, model, args)
    envs, folder = eval_envs["test"], Path(folder)
    if hasattr(envs, "cell"):
        draw_returns(folder / "returns.png", eval_envs, details)
    if args.reward_decoder != "multihead" or args.no_belief or args.oracle_context:
        return
    names = [envs.tasks[i * len(envs.tasks) // envs.num_envs] for i in range(envs.num_envs)]
    agent.eval(), model.eval()
    data = rollout(envs, agent, model, args, False, names, deterministic=True)
    agent.train(), model.train()
    with torch.no_grad():
        mean, logvar = model.moments(data["beliefs"])  # (T + 1, N, Z)
        samples = mean + (0.5 * logvar).exp() * torch.randn(100, *mean.shape, device=mean.device)
        maps = model.reward_decoder(samples).sigmoid().mean(0)  # p(r = 1) under the belief (T + 1, N, cells)
    for n in range(0, len(names), math.ceil(len(names) / 3)):
        column = {name: data[name][:, n].cpu().numpy() for name in ("obs", "next_obs", "success")}
        file = folder / f"belief_{names[n].replace('/', '_').replace(',', '_')}.png"
        draw_grid_belief(file, names[n], column, data["task"][n].cpu().numpy(), maps[:, n].cpu().numpy(), args.horizon)


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
        sizes = [envs.reset(tasks=[envs.tasks[0]] * envs.num_envs)[1]["task"].shape[1]]
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
            virtual_rate = args.virtual_rate * (1 - left)
            virtual = args.virtual in ("policy", "both") and learns_belief and not blind
            if virtual:  # the first process tosses the coin for all
                virtual = bool(all_sum(torch.rand((), device=device) * leads()) < virtual_rate)
            data = rollout(envs, agent, model, args, blind, virtual=virtual)
            global_step += steps
            check_finite(
                observation=data["obs"],
                next_observation=data["next_obs"],
                reward=data["true_rewards"],
                decoded_reward=data["rewards"],
            )
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
                rewards = normalise_rewards(rewards, data["alive"], agent.return_norm, args, update=not virtual)
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
                if args.standardise_inputs and not virtual:  # the changes fall with the number of steps
                    model.obs_norm.update(data["next_obs"].flatten(0, 1), alive)
                    model.reward_norm.update(data["rewards"].view(-1, 1), alive)
                if not virtual:  # the belief model learns from what the environments gave alone
                    buffer.add(data)
                if global_step >= args.precollect:
                    for _ in range(args.belief_updates):
                        terms = update_belief(model, belief_optimizer, buffer, virtual_rate, args)
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
                scalars |= {"time/env": data["env_seconds"] / seconds.sum(), "charts/virtual": float(virtual)}
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
