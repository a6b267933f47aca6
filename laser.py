"""LaSER: meta-RL that learns to explore by reconstructing tasks (under review; "Task-Specific Exploration in Meta-RL").

Two policies and an encoder g. In phase 1 an exploration policy plays meta-episodes of K episodes, and g learns from
them, self-supervised: to fill in masked steps, and to reconstruct all Q meta-episodes of a task as linear combinations
of the episodes of one. The better that one reconstructs the others, the more orthogonal are the codes Gamma_k of its
episodes made; orthogonal codes are what the exploration policy is paid for. In phase 2 both are frozen: one exploration
meta-episode becomes the context c, on which a task policy trains, with a meta-reward for entropy where c does not help.

Shapes: P tasks of an iteration (--num-envs), T steps of a rollout, N environments, S observation, A action, D units of
the transformers, K episodes of H steps in a meta-episode, Q meta-episodes of a task, B tasks of a batch. Encoders read
L = K (H + 1) tokens x = (s, previous a, previous r), of X numbers: slot k (H + 1) has the first state of episode k, the
slots of idle steps are zeros, and not `valid`. Rollouts are time-major (T, N, .), tokens are (N, L, X). Steps that are
counted are the real ones, of both phases.

    python laser.py --env-id MEWA --cuda               # every preset is a default: --help shows it
    python laser.py --env-id MEWA --oracle-context     # phase 2 alone, the true task for a context (section 5.3)
    python laser.py --env-id MEWA --explored runs/.../checkpoint.pt     # phase 2 alone, on another run's phase 1

Equation, algorithm                                              function
    (2), (3) meta-reward r+ and its weight w                     meta_weight, meta_bonus
    (4), (11) intrinsic reward of the exploration policy         intrinsic_rewards, exploration_rewards
    (5), (6) task reconstruction B_j C = B, L_t-rec              TaskReconstruction, reconstruct, encoder_loss
    (7), (8) target delta_j and contrastive loss                 encoder_loss, similarity
    (9) c = h(z, Z_j, Gamma)                                     Encoder.context
    (10) L_LaSER                                                 encoder_loss, regulariser
    (12) - (14) PPO with advantages that depend on the policy    gae, ppo_update, ppo_loss
    Appendix B masked self-supervision                           mask_tokens
    Algorithm 1: meta-training, two phases                       main
    Algorithm 2: meta-testing                                    meta_test, contexts_by_episode
    Algorithm 3: the encoder learns                              train_encoder
    Algorithm 4: the exploration policy explores and learns      explore, train_exploration_policy
    Algorithm 5: the task policy                                 find_contexts, exploit, train_task_policy

Where this leaves the paper
    As the authors' code: the form of (4), five exploitation episodes of a task (Algorithm 5: one), no contrastive loss
    at first, w and V fixed during an update; on MEWA beta, zeta, and no normalised inputs and rewards. Not as theirs:
    c is made of Gamma, too, and the encoder's step size. Ours: idle slots are masked in attention, L_rec and R, and
    count as zeros in L_t-rec and delta; a masked token keeps its action (<MASK> carries nothing in the paper).
    Algorithms 3 and 4 share their data. Each step of 3 draws its batch from the buffer, and z^ is the mean of five z.
    delta is made of a mean of squares ((7) as printed: of the mean's square). L_t-rec reaches f_b through Z_j alone;
    the contrastive loss draws a j of its own (Algorithm 3: one).
    V(s), which the text leaves open, is the critic with zeros for a context: nothing trains it on these.
    Gamma_t of the task policy (--policy-gamma) is f_u's of the running episode alone, which the paper leaves open.
    Without --cuda, and where the paper has no values, sizes and step sizes are ours.
"""

import common  # noqa: F401  # before PyTorch: a Ctrl-C during its import leaves no traceback

# isort: split
import contextlib
import math
import os
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal
from torch.utils.checkpoint import checkpoint

from common.arguments import Above0, AtLeast0, Bounds, Count, Count0, Experiment, Fraction, Layers, flag, refuse
from common.envs.protocol import cores
from common.files import load_checkpoint, load_modules
from common.memory import check_memory, phase_1_memory
from common.networks import Block, BoundedStd, RunningNorm, mlp, normc_, xavier_
from common.plot import draw_contexts, draw_curves, draw_similarity
from common.processes import check_finite, check_steps, descend
from common.rollouts import by_episode, first_tasks, measured, outcomes, record_step, records
from common.run import Run, start
from common.tokens import Packing, Slots, action_input, tokens_shape

# ---------- 1. Arguments ----------


@dataclass
class PPO:
    """The policies and their updates: of the task policy (Table 8), and what is the exploration policy's (Table 7)."""

    learning_rate: Above0 = 1e-4  # Adam's step size for actor and critic
    anneal_lr: bool = False  # let it fall linearly to 0 over phase 2 (the authors' code, not the paper)
    gamma: Fraction = 0.99  # discount per step; in phase 1 over the whole meta-episode
    gae_lambda: Fraction = 0.9  # lambda of the generalised advantage estimate
    update_epochs: Count = 4  # passes over an iteration's steps
    num_minibatches: Count = 2  # gradient steps per pass
    clip_coef: Above0 = 0.2  # epsilon of the clipped ratio and value
    ent_coef: AtLeast0 = 0.01  # weight of the entropy bonus, of both policies
    vf_coef: AtLeast0 = 0.5  # weight of the value loss
    value_loss: Literal["huber", "mse"] = "huber"  # huber: the authors' code, clipped values; mse: 1/2 squared error
    max_grad_norm: AtLeast0 = 0.5  # clip of the norm of a policy's gradient; 0 = off
    # On MEWA beta, zeta and these two are those of the authors' code: with the paper's values (1.5, -0.13, both on) the
    # meta-reward of a step is three times the cost of one, and a policy learns to make episodes long.
    norm_inputs: bool = False  # standardise the task policy's state and context (paper; off in the authors' code)
    norm_reward: bool = False  # divide its rewards by the deviation of the discounted return, clip at 10 (likewise)
    policy_layers: Layers = (128, 128, 128)  # hidden layers (tanh) of actor and critic
    obs_embed: Count = 64  # policies' embedding of the observation; of Gamma_t, too
    context_layers: Layers = (128, 128, 128)  # context extractor: layers (tanh) from c to the policy's input
    actor_gain: Above0 = 1.0  # norm of the rows of a continuous policy's last layer at the start; small: small actions
    std_init: Above0 = 1.0  # deviation of a continuous action at the start
    std_min: Above0 = 0.01  # its lower bound, reached softly (ours)
    std_max: Above0 = 2.0  # its upper bound
    explore_learning_rate: Above0 = 1e-5  # Adam's step size for the exploration policy
    explore_clip_coef: Above0 = 0.1  # its epsilon
    explore_epochs: Count = 4  # its passes
    explore_minibatches: Count = 2  # its gradient steps per pass
    explore_layers: Layers = (128, 128, 128)  # its hidden layers


@dataclass
class Belief:
    """The encoder g and its update (Table 6)."""

    belief: bool = True  # off: phase 2 alone, zeros for a context, the floor that any claim of adaptation has to beat
    oracle_context: bool = False  # phase 2 alone, with the true task for a context
    # What it trains on. test: as section 5.3 on MEWA, which asks whether a policy adapts that is told everything; but
    # zeros are the true context of MEWA's first task there, and it may learn its twelve tasks by heart.
    oracle_split: Literal["train", "test"] = "test"
    belief_learning_rate: Above0 = 1e-4  # Adam's step size for encoder and heads
    belief_updates: Count = 50  # its gradient steps per iteration, each on a new batch (N_encoder)
    belief_batch: Count = 5  # tasks per gradient step (B), each with all Q meta-episodes
    buffer_size: Count = 100_000  # tasks kept for them
    d_model: Count = 128  # units of the transformers (D)
    num_layers: Count = 8  # blocks of f_u and of f_b; h has two
    num_heads: Count = 16  # attention heads of a block
    feed_forward: Count = 512  # its hidden units
    mask_pads: bool = True  # no attention to idle slots, whose codes are zeros (the authors' code attends to them)
    recompute: bool = False  # transformers' activations are computed again in the backward pass: slower, less memory


@dataclass
class LaSER:
    """The two phases, the encoder's loss, and what the policies are paid."""

    explore_iterations: Count0 = 10_000  # of phase 1 (N_explore)
    initial_iterations: Count0 = 2_000  # of them before the exploration policy learns: until then it is as at the start
    task_iterations: Count0 = 10_000  # of phase 2 (N_task)
    explored: str = ""  # checkpoint of a run whose phase 1 is over: encoder and exploration policy come from there
    meta_episodes: Count = 20  # of a task (Q)
    # Of the task policy in each of an iteration's tasks: 5 in the authors' code; 2 in MEWA's small preset (ours).
    exploit_episodes: Count = 5
    eval_episodes: Count = 20  # of it in each evaluation task, with the same context; their mean counts
    # Actions of the exploration policy in evaluations; the authors sample them. --eval-sample is about the task
    # policy's: the most likely in their tester of MEWA, sampled in their evaluation during training, all that their
    # ML10 and Hopper have.
    eval_explore: Literal["sampled", "greedy"] = "sampled"
    sigma: Above0 = 0.025  # (4)
    # (4) code: exp(-w^2 / (2 sigma^2)), w the mean similarity to the episodes before, and nothing for the first; paper:
    # exp(-d^2 / sigma), where d counts the episode itself, so that it never reaches 1.
    reward_form: Literal["code", "paper"] = "code"
    survival_coef: AtLeast0 = 0.0  # (11) alpha_R, weight of the environment's reward in the exploration policy's
    rec_coef: AtLeast0 = 0.5  # (10) weight of the masked steps' reconstruction
    task_rec_coef: AtLeast0 = 1.0  # (10) weight of the task's reconstruction
    contrastive_coef: AtLeast0 = 1.0  # (10) weight of the contrastive loss
    regulariser_coef: AtLeast0 = 0.125  # (10) weight of norms and orthogonality
    state_coef: AtLeast0 = 0.05  # weight of states in reconstructions; rewards have 1, actions 0
    xi: AtLeast0 = 0.05  # (7)
    nu: Count = 250  # iterations between two copies of the task-reconstruction head to its target
    contrastive_warmup: Count0 = 1_000  # iterations without the contrastive loss (the authors' code, not the paper)
    use_gamma_in_context: bool = True  # c from Gamma and Z (9), or from Z alone, as in the authors' code
    # The task policy sees Gamma_t, too: as Table 4 counts it, and in the authors' ML10 and Hopper; not in their MEWA.
    policy_gamma: bool = False
    beta: AtLeast0 = 0.05  # (2) weight of the meta-reward (the authors' code; paper: 1.5)
    zeta: Annotated[float, Bounds(at_most=0)] = -0.15  # (3) threshold (the authors' code; paper: -0.13)
    # The advantages depend on the policy's entropy (14); detached, no gradient flows that way. The authors' are not.
    detach_meta_reward: bool = False
    pfo_coef: AtLeast0 = 0.1  # weight of proximal feature optimisation
    pfo_form: Literal["norm", "mse"] = "norm"  # norm of the features' change (the authors' code), or its mean square


@dataclass
class Args(LaSER, Belief, PPO, Experiment):
    env_id: str = "MEWA"
    total_timesteps: Count0 = 0  # real steps of both phases, at most; 0 = what their iterations take
    num_envs: Count = 12  # tasks of an iteration (P); ours, it fits the steps that the paper counts on MEWA
    eval_interval: int = 100  # iterations of phase 2
    checkpoint_interval: Count0 = 100


# Arguments that an encoder is made for: with --explored, those of the other run. z's head reads B, Q and K alone.
ENCODER = (
    "env_id horizon episodes_per_task extra_obs control_cost reward_version split_rule meta_episodes belief_batch "
    "d_model num_layers num_heads feed_forward obs_embed explore_layers use_gamma_in_context mask_pads"
).split()
# Arguments that neither --resume nor --evaluate can change, beside those that are common to all scripts.
UNCHANGED = "explore_iterations oracle_context oracle_split belief explored exploit_episodes policy_gamma "
UNCHANGED += " ".join(ENCODER)


def check_args(args):
    """BadInput for arguments that do not fit each other."""
    size, heads = args.d_model, args.num_heads
    refuse(
        (size % (2 * heads), f"--num-heads {heads}: twice as many do not divide --d-model {size}"),
        (
            args.explored and not has_encoder(args),
            "--explored needs an encoder: --no-belief, --oracle-context have none",
        ),
        (args.oracle and args.oracle_context, "--oracle-context: choose its tasks with --oracle-split, not --oracle"),
    )


def check_envs(args, envs):
    """BadInput for environments that do not fit the paper."""
    refuse(
        (not hasattr(envs, "phase"), f"laser.py needs environments with `repeat` and `phase`: {args.env_id} has none"),
        (hasattr(envs, "sessions"), f"laser.py: a context is of one task, and {args.env_id} has sessions"),
    )


def has_encoder(args):
    """Whether contexts are made of what was explored."""
    return args.belief and not args.oracle_context


def has_phase_1(args):
    """Whether there is a phase 1 in this run."""
    return has_encoder(args) and not args.explored


# ---------- 2. Networks ----------


class Agent(nn.Module):
    """Actor and critic on the embedded observation and on features: of Gamma_t for exploration, of c for the task.

    extractor: what makes features of a context (.., C). The networks see [tanh(W s), features]. gamma: Gamma_t, too.
    """

    def __init__(self, args, obs_dim, action_space, extractor, context_dim, feature_dim, layers, gamma=False):
        super().__init__()
        self.discrete = hasattr(action_space, "n")
        n_out = int(action_space.n) if self.discrete else action_space.shape[0]
        self.std = None if self.discrete else BoundedStd(n_out, args.std_init, args.std_min, args.std_max)
        # A context has numbers that are constant in training: a higher floor keeps them from blowing up.
        self.obs_norm, self.context_norm = RunningNorm(obs_dim), RunningNorm(context_dim, min_std=0.02)
        self.return_norm = RunningNorm(1)
        self.obs_embed = nn.Linear(obs_dim, args.obs_embed)
        self.extractor, self.context_dim = extractor, context_dim
        self.gamma_embed = nn.Linear(args.d_model, args.obs_embed) if gamma else None
        sizes = [args.obs_embed * (1 + gamma) + feature_dim, *layers]
        self.actor, self.critic = mlp([*sizes, n_out], nn.Tanh), mlp([*sizes, 1], nn.Tanh)
        for net in (self.actor, self.critic):
            for layer in net[:-1:2]:
                normc_(layer, 5 / 3)
        if self.discrete:
            nn.init.orthogonal_(self.actor[-1].weight, 0.01)
            nn.init.zeros_(self.actor[-1].bias)
        else:
            normc_(self.actor[-1], args.actor_gain)

    def extract(self, context):
        """context (.., C) -> features (.., F)."""
        return self.extractor(self.context_norm(context))

    def blank(self):
        """The features of no context: zeros after the normalisation (ours; the paper leaves V(s) open): (F,)."""
        return self.extractor(torch.zeros(self.context_dim, device=self.return_norm.mean.device))

    def beside(self, features, gammas):
        """features (.., F), gammas (.., D), None where this policy does not see them -> features with Gamma_t."""
        return features if gammas is None else torch.cat([features, self.gamma_embed(gammas).tanh()], -1)

    def embed(self, obs, features):
        return torch.cat([self.obs_embed(self.obs_norm(obs)).tanh(), features], -1)

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
        """Log-probability and entropy of the action's distribution (..), and the actor's last hidden layer before its
        tanh (.., last of the layers), which PFO holds fast. x: what `embed` returns."""
        hidden = self.actor[:-2](x)
        out = self.actor[-2:](hidden)
        if self.discrete:
            logprobs = out.log_softmax(-1)
            return logprobs.gather(-1, action[..., None])[..., 0], -(logprobs.exp() * logprobs).sum(-1), hidden
        dist = Normal(out, self.std(), validate_args=False)
        return dist.log_prob(action).sum(-1), dist.entropy().sum(-1), hidden


def explore_agent(args, obs_dim, action_space):
    """The exploration policy pi(a | s, Gamma_t)."""
    extractor = nn.Sequential(nn.Linear(args.d_model, args.obs_embed), nn.Tanh())
    return Agent(args, obs_dim, action_space, extractor, args.d_model, args.obs_embed, args.explore_layers)


def task_agent(args, obs_dim, action_space, context_dim):
    """The task policy pi(a | s, c); of the true task (G numbers), a single layer of as many units is the extractor."""
    layers = args.context_layers if has_encoder(args) else (context_dim,)
    extractor = xavier_(nn.Sequential(*mlp([context_dim, *layers], nn.Tanh), nn.Tanh()))
    gamma = args.policy_gamma and has_encoder(args)
    return Agent(args, obs_dim, action_space, extractor, context_dim, layers[-1], args.policy_layers, gamma)


class Transformer(nn.Module):
    """Tokens (N, M, X) of some slots, with their positions -> (N, M, D), by blocks of T-Fixup's initialisation."""

    def __init__(self, args, token_dim, length):
        super().__init__()
        size, self.recompute = args.d_model, args.recompute
        self.embed = nn.Linear(token_dim, size, bias=False)
        sizes = size, args.num_heads, args.feed_forward
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(args.num_layers))
        angles = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, size, 2) / size)
        self.register_buffer("positions", torch.stack([angles.sin(), angles.cos()], -1).flatten(1), persistent=False)
        nn.init.normal_(self.embed.weight, std=size**-0.5 * (9 * args.num_layers) ** -0.25)
        scale = 0.67 * args.num_layers**-0.25
        for block in self.blocks:
            for layer in (block.qkv, block.out, block.net[0], block.net[2]):
                nn.init.xavier_uniform_(layer.weight)
                layer.weight.data *= scale * (2**0.5 if layer is block.qkv else 1)

    def forward(self, tokens, numbers, mask):
        """numbers (M,): of the tokens' slots; mask (N, 1, M or 1, M): True is seen."""
        x = self.embed(tokens) + self.positions[numbers]
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, None, mask, use_reentrant=False)
            else:
                x = block(x, mask=mask)
        return x

    def step(self, token, slot, caches, seen):
        """One slot's output (N, D), as forward's with a causal mask: token (N, X), seen (N, slot + 1), caches (blocks,
        2, N, heads, L, .), which get the slot's keys and values."""
        x = (self.embed(token) + self.positions[slot])[:, None]
        for block, cache in zip(self.blocks, caches):
            cache[:, :, :, slot : slot + 1] = torch.stack(block.memory(x))
            x = block.attend(x, *cache[:, :, :, : slot + 1], seen[:, None, None])
        return x[:, 0]


# ---------- 3. Encoder: what this paper changes ----------


class Encoder(nn.Module):
    """g of the paper (Figure 3b): f_u, which reads online, f_b, which sees whole meta-episodes, and h, which joins.

    tokens (N, L, X), valid (N, L). Codes of slots that are not valid are zeros: see common/tokens.py.
    """

    def __init__(self, args, token_dim):
        super().__init__()
        size, self.episodes = args.d_model, args.episodes_per_task
        self.mask_pads, self.use_gamma, self.bfloat16 = args.mask_pads, args.use_gamma_in_context, args.cuda
        self.length, self.every_slot = self.episodes * (args.horizon + 1), args.compile  # compiled: one shape for all
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
        self.register_buffer("z_hat", torch.zeros(size))  # z of phase 2: see shared_component

    def slots(self, valid):
        return Slots(valid, self.mask_pads, self.every_slot)

    def half(self):
        """Blocks run in bfloat16 on a GPU; all that is compared or summed is float32."""
        return torch.autocast("cuda", torch.bfloat16) if self.bfloat16 else contextlib.nullcontext()

    def gammas(self, tokens, valid):
        """f_u -> Gamma (N, L, D), each slot's from what came before it."""
        slots = self.slots(valid)
        with self.half():
            codes = self.gamma_head(self.f_u(slots.take(tokens), slots.numbers, slots.causal()))
        return slots.spread(codes)

    def start(self, num_envs, length=None):
        """Empty caches for `step`: (blocks, 2, N, heads, length, D / heads), of all L slots or of the first ones."""
        block, device, length = self.f_u.blocks[0], self.z_hat.device, length or self.length
        shape = len(self.f_u.blocks), 2, num_envs, block.num_heads, length, len(self.z_hat) // block.num_heads
        return torch.zeros(shape, device=device, dtype=torch.bfloat16 if self.bfloat16 else torch.float32)

    def step(self, token, slot, caches, valid):
        """Gamma of one slot, as `gammas` has it: token (N, X), valid (N, L) up to the slot -> (N, D)."""
        seen = valid[:, : slot + 1] if self.mask_pads else torch.ones_like(valid[:, : slot + 1])
        with self.half():
            code = self.gamma_head(self.f_u.step(token, slot, caches, seen))
        return code.float() * seen[:, -1:]

    def latents(self, tokens, valid):
        """f_b -> Z (N, L, D), and the mean of each episode's output over its slots and units (N, K)."""
        slots = self.slots(valid)
        with self.half():
            out = self.f_b(slots.take(tokens), slots.numbers, slots.seen)
            Z = self.Z_head(out)
        return slots.spread(Z), slots.means(out, self.episodes)

    def shared(self, pooled):
        """z, what the tasks of a batch have in common: pooled (B Q, K) -> (D,)."""
        return self.z_head(pooled.flatten())

    def context(self, Z, gammas, z, valid):
        """(9) c = h(z, Z_j, Gamma): Gamma queries Z_j, and what comes of it the single token W z.

        Z, gammas (N, L, D), z (D,) -> (N, L, D).
        """
        slots = self.slots(valid)
        with self.half():
            c = slots.take(Z)
            if self.use_gamma:
                c = self.h_gamma(slots.take(gammas), c, slots.seen)
            c = self.h_z(c, self.z_embed(z).expand(len(c), 1, -1))
        return slots.spread(c)

    def task_context(self, tokens, valid, gammas):
        """c of phase 2, with z^: gammas (N, L, D) -> (N, L D)."""
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

    # L_rec (appendix B): each selected step, in its own place, from the code of its slot
    c = encoder.context(masked_Z, masked_gammas, masked_z, valid)
    error = squared_errors(heads.rec(c) - tokens, obs_dim, args)
    rec = (error * selected).sum() / selected.sum().clamp(min=1)

    # L_t-rec (6). As in the authors' code it reaches f_b through Z_j alone: the Z of all that are reconstructed, Z_j's
    # own among them, are data. Else f_b could put into each what C needs of it, where one has to know about the others.
    tasks = torch.arange(B, device=tokens.device)
    episodes = batch["tokens"].view(B, Q, args.episodes_per_task, -1)
    Z = Z.view(B, Q, L, -1)
    j = torch.randint(Q, (B,), device=tokens.device)
    error = reconstruct(episodes, heads.task_rec(Z.detach(), Z[tasks, j]), j) - episodes
    task_rec = squared_errors(error.unflatten(-1, (-1, X)), obs_dim, args).mean()

    # delta (7), with the mean of squares (B,), and the contrastive loss (8), whose diagonal agrees. Its j is a draw of
    # its own, as in the authors' code (Algorithm 3 has one for both): a second meta-episode of the task is judged.
    j = torch.randint(Q, (B,), device=tokens.device)
    with torch.no_grad():
        error = reconstruct(episodes, target(Z, Z[tasks, j]), j) - episodes
        delta = 1 - torch.exp(-args.xi * error.square().flatten(1).mean(1))
    cosines = similarity(gammas.view(B, Q, L, -1)[tasks, j], args.episodes_per_task)
    off_diagonal = 1 - torch.eye(args.episodes_per_task, device=tokens.device)
    contrastive = ((cosines - delta[:, None, None]) * off_diagonal).square().mean()

    codes = gammas.unflatten(1, (args.episodes_per_task, -1)).flatten(2)  # an episode's Gamma, a vector
    norms = regulariser(z, Z.flatten(0, 1), codes, valid)
    loss = args.rec_coef * rec + args.task_rec_coef * task_rec + args.regulariser_coef * norms
    loss = loss + args.contrastive_coef * contrast * contrastive
    terms = dict(loss=loss, rec=rec, task_rec=task_rec, contrastive=contrastive, regulariser=norms, delta=delta.mean())
    return loss, {name: term.detach() for name, term in terms.items()}


# ---------- 4. Rewards and PPO ----------


def intrinsic_rewards(gammas, args):
    """(4), of each of a meta-episode's episodes: gammas (N, L, D) -> (N, K)."""
    before = similarity(gammas, args.episodes_per_task).tril(-1).sum(-1)  # with the episodes before (N, K)
    if args.reward_form == "paper":
        return torch.exp(-((before + 1) / args.episodes_per_task).square() / args.sigma)
    k = torch.arange(args.episodes_per_task, device=gammas.device)
    return torch.exp(-0.5 * (before / k.clamp(min=1) / args.sigma).square()) * (k > 0)


def exploration_rewards(data, args):
    """(11) (T, N): the intrinsic reward of an episode, paid at its last real step, and alpha_R times the reward.

    Gamma is that of the encoder that the policy explored with, before its latest update.
    """
    alive = data["alive"].view(args.episodes_per_task, args.horizon, -1)
    last = alive & ~torch.cat([alive[:, 1:], torch.zeros_like(alive[:, :1])], 1)
    paid = last * intrinsic_rewards(data["gammas"], args).T[:, None]
    return paid.flatten(0, 1) + args.survival_coef * data["rewards"]


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


def gae(rewards, values, alive, args):
    """Advantages of meta-episodes, (T, N) as all else.

    An episode's last step bootstraps from the next one's first, past the idle steps; after the last the value is 0.
    """
    advantages = torch.zeros_like(rewards)
    advantage, next_value = torch.zeros(2, *rewards[0].shape, device=rewards.device)
    for t in reversed(range(len(rewards))):
        step = rewards[t] + args.gamma * next_value - values[t] + args.gamma * args.gae_lambda * advantage
        advantage = torch.where(alive[t], step, advantage)
        next_value = torch.where(alive[t], values[t], next_value)
        advantages[t] = advantage
    return advantages


def normalise_rewards(rewards, alive, return_norm, args):
    """rewards (T, N) / deviation of the discounted return (updated first), clipped at 10: the authors' VecNormalize."""
    total, returns = torch.zeros_like(rewards[0]), torch.empty_like(rewards)
    for t in range(len(rewards)):
        returns[t] = total = args.gamma * total + rewards[t]
    return_norm.update(returns.view(-1, 1), alive.flatten())
    return (rewards / return_norm.std).clamp(-10, 10)


def real_rows(alive):
    """Numbers of the steps that are real. On a GPU, where counting them would wait for the device, of all steps."""
    if alive.device.type == "cpu":
        return alive.flatten().nonzero()[:, 0]
    return torch.arange(alive.numel(), device=alive.device)


def ppo_update(agent, optimizer, data, epochs, minibatches, clip_coef, args, meta=False):
    """Epochs of minibatches of PPO's clipped objective on an iteration's real steps. Returns a dict of mean terms.

    data: obs (T, N, S), actions (T, N, .), rewards, alive (T, N), gamma_t (T, N, D), if the policy sees it, and for the
    task policy contexts (P, C) of groups of neighbouring environments. meta: for that one, with meta-reward (2) and
    PFO. Its advantages depend on the policy, so that they are found anew for each minibatch (14), unless beta is 0.
    """
    T, N = data["alive"].shape
    rows = real_rows(data["alive"])
    b = {name: data[name].flatten(0, 1)[rows] for name in ("obs", "actions", "alive", "gamma_t") if name in data}
    group = rows % N // (N // len(data["contexts"])) if meta else None  # which context a step has (rows,)
    alive, count = b["alive"].float(), b["alive"].sum()

    def inputs(index=slice(None)):
        """Of the networks, for these of the rows. A context has many: `embedding` adds up their gradients in one
        order, where indexing would in any, as threads share the work, and a run could not be repeated bit for bit."""
        gammas = b["gamma_t"][index] if "gamma_t" in b else None
        if not meta:
            return agent.embed(b["obs"][index], agent.extract(gammas))
        features = F.embedding(group[index], agent.extract(data["contexts"]))
        return agent.embed(b["obs"][index], agent.beside(features, gammas))

    def by_time(x):
        """x (rows,), back to (T, N): zeros where there is no real step."""
        return torch.zeros(T * N, device=x.device).index_copy(0, rows, x * alive).view(T, N)

    with torch.no_grad():
        x = inputs()
        b["logprobs"], _, b["hidden"] = agent(x, b["actions"])
        b["values"] = agent.value(x)
        base = gae(data["rewards"], by_time(b["values"]), data["alive"], args)
        if meta:
            blank = agent.beside(agent.blank().expand(len(rows), -1), b.get("gamma_t"))
            blank = agent.value(agent.embed(b["obs"], blank))
            weight = by_time(meta_weight(blank, b["values"], args))  # of idle steps 0
    log = []
    for _ in range(epochs):
        for index in torch.randperm(len(rows), device=rows.device).tensor_split(minibatches):
            if meta and args.beta:  # the entropy of all steps decides about each one's advantage
                x = inputs()
                policy = agent(x, b["actions"])
                bonus = meta_bonus(weight, by_time(policy[1]), args)
                advantages = base + (bonus.detach() if args.detach_meta_reward else bonus)
                x, policy = x[index], [part[index] for part in policy]
            else:
                x, advantages = inputs(index), base
                policy = agent(x, b["actions"][index])
            advantages = advantages.flatten()[rows]
            returns = (advantages + b["values"]).detach()[index]
            mean = (advantages * alive).sum() / count
            std = ((advantages - mean).square() * alive).sum().div(count).sqrt()
            advantages = ((advantages - mean) / (std + 1e-5))[index]
            old = {name: b[name][index] for name in ("logprobs", "values", "hidden", "alive")}
            loss, terms = ppo_loss(policy, agent.value(x), old, advantages, returns, clip_coef, args)
            if meta:
                loss = loss + args.pfo_coef * terms["pfo"]
            descend(optimizer, loss, [agent], args.max_grad_norm, "policy")
            log.append(torch.stack([term.detach() for term in terms.values()]))
    terms = dict(zip(terms, torch.stack(log).mean(0)))
    return terms | dict(meta_weight=weight.sum() / count) if meta else terms


def ppo_loss(policy, value, old, advantages, returns, clip_coef, args):
    """(12), (13) on the rows of a minibatch. Returns the loss, and a dict of its terms and of PFO's, not yet in it.

    policy: log-probabilities, entropies and hidden layers now. old: what these and the values were at the start.
    """
    (logprob, entropy, hidden), alive = policy, old["alive"].float()
    weight = alive / alive.sum().clamp(min=1)
    logratio = logprob - old["logprobs"]
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    pg_loss = -(torch.minimum(ratio * advantages, clipped * advantages) * weight).sum()
    if args.value_loss == "huber":
        near = old["values"] + (value - old["values"]).clamp(-clip_coef, clip_coef)
        errors = [F.smooth_l1_loss(v, returns, reduction="none") for v in (value, near)]
        v_loss = 0.5 * (torch.maximum(*errors) * weight).sum()
    else:
        v_loss = 0.5 * ((value - returns).square() * weight).sum()
    entropy = (entropy * weight).sum()
    loss = pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy
    pfo = (hidden - old["hidden"]) * alive[:, None]
    pfo = pfo.norm() if args.pfo_form == "norm" else pfo.square().mean(1) @ weight
    approx_kl = ((ratio - 1 - logratio) * weight).sum()
    clipfrac = (((ratio - 1).abs() > clip_coef) * weight).sum()
    return loss, dict(policy=pg_loss, value=v_loss, entropy=entropy, approx_kl=approx_kl, clipfrac=clipfrac, pfo=pfo)


# ---------- 5. Buffer and rollouts ----------


class Buffer:
    """Ring of the last tasks, each with all of its Q meta-episodes, on the device; packed, as the paper's has 39 GB."""

    def __init__(self, size, envs, meta_episodes):
        self.size, self.next, self.full, self.store = size, 0, 0, {}
        self.packing, none = Packing(envs), torch.zeros(meta_episodes, *tokens_shape(envs), device=envs.device)
        self.row = self.packing.pack(none, none[..., 0] > 0)  # of one task
        self.row_bytes = sum(tensor.nbytes for tensor in self.row.values())

    def allocate(self):
        self.store = {name: tensor.new_empty(self.size, *tensor.shape) for name, tensor in self.row.items()}

    def add(self, data):
        """data: tokens (P Q, L, X), valid (P Q, L), the Q meta-episodes of a task side by side."""
        if not self.store:
            self.allocate()
        rows = self.packing.pack(data["tokens"], data["valid"])
        rows = {name: tensor.view(-1, *self.row[name].shape) for name, tensor in rows.items()}
        n = len(rows["valid"])
        places = torch.arange(self.next, self.next + n, device=data["tokens"].device) % self.size
        for name, tensor in self.store.items():
            tensor[places] = rows[name]
        self.next, self.full = (self.next + n) % self.size, min(self.full + n, self.size)

    def sample(self, batch):
        """`batch` tasks, uniformly with replacement, their meta-episodes in random order: (B, Q, L, .) each."""
        device, Q = self.store["valid"].device, self.store["valid"].shape[1]
        rows = torch.randint(self.full, (batch, 1), device=device)
        order = torch.rand(batch, Q, device=device).argsort(1)
        return self.packing.unpack({name: tensor[rows, order] for name, tensor in self.store.items()})

    def state_dict(self):  # on the CPU: a copy may not fit beside the buffer
        store = {name: tensor[: self.full].to("cpu", copy=True) for name, tensor in self.store.items()}
        return dict(next=self.next, full=self.full, store=store)

    def load_state_dict(self, state):
        self.next, self.full = state["next"], state["full"]
        self.allocate()
        for name, tensor in state["store"].items():
            self.store[name][: self.full] = tensor


def explore(envs, encoder, explorer, args, tasks=None, deterministic=False):
    """One meta-episode of the exploration policy in every environment, from a reset; f_u reads along (Algorithm 4).

    Returns a dict: what common.rollouts.records has, tokens (N, L, X), valid (N, L), gammas (N, L, D), gamma_t, what
    each action saw of them (T, N, D), task (N, G), and env_seconds, the time spent in `envs.step`.
    """
    N, device, (L, X), per_episode = envs.num_envs, envs.device, tokens_shape(envs), envs.horizon + 1
    tokens, valid = torch.zeros(N, L, X, device=device), torch.zeros(N, L, device=device, dtype=torch.bool)
    gammas = torch.empty(N, L, args.d_model, device=device)
    data = records(envs) | dict(tokens=tokens, valid=valid, gammas=gammas)
    read, S = action_input(envs.single_action_space, device), data["obs"].shape[-1]
    with torch.inference_mode():
        obs, info = envs.reset(tasks)
        data["task"] = info["task"].clone()
        caches = encoder.start(N)
        for slot in range(L):
            if slot % per_episode == 0:
                tokens[:, slot, :S], valid[:, slot], idle = obs, True, False
            else:
                t = slot - slot // per_episode - 1
                # All are idle: these slots' codes are masked, and environments ignore the action, here the last one.
                # (A GPU would be waited for.)
                idle = device.type == "cpu" and args.mask_pads and not valid[:, slot - 1].any()
                if not idle:
                    action = explorer.act(obs, explorer.extract(gammas[:, slot - 1]), deterministic)
                obs, _ = record_step(envs, data, t, obs, action)
                valid[:, slot] = data["alive"][t]
                tokens[:, slot] = token_of(data, t, read)
            gammas[:, slot] = 0 if idle else encoder.step(tokens[:, slot], slot, caches, valid)
    data["gamma_t"] = gammas.view(N, -1, per_episode, args.d_model)[:, :, :-1].flatten(1, 2).transpose(0, 1)
    return data


def token_of(data, t, read):
    """The token of step t of a rollout, zeros where it is idle: (N, X). read: common.tokens.action_input."""
    token = torch.cat([data["next_obs"][t], read(data["actions"][t]), data["rewards"][t, :, None]], -1)
    return token * data["alive"][t, :, None]


def exploit(envs, agent, contexts, encoder=None, tasks=None, deterministic=False):
    """One episode of the task policy in every environment, from a reset (Algorithm 5).

    contexts (P, C), of groups of N / P neighbouring environments; None: no context. encoder: needed if the policy sees
    Gamma_t, of f_u, which then reads this episode as the first of a meta-episode. Returns a dict: what
    common.rollouts.records has, contexts, gamma_t (T, N, D), if seen, task (N, G), and env_seconds.
    """
    data, seen, N = records(envs) | dict(contexts=contexts), agent.gamma_embed is not None, envs.num_envs
    if seen:
        D, read = agent.gamma_embed.in_features, action_input(envs.single_action_space, envs.device)
        data["gamma_t"] = torch.zeros(envs.horizon, N, D, device=envs.device)
    with torch.inference_mode():
        obs, info = envs.reset(tasks)
        if seen:
            caches, token = encoder.start(N, envs.horizon + 1), F.pad(obs, (0, tokens_shape(envs)[1] - obs.shape[1]))
            valid = torch.ones(N, envs.horizon, dtype=torch.bool, device=envs.device)  # idle are at most the last ones
        data["task"] = info["task"].clone()
        if contexts is None:
            features = agent.blank().expand(envs.num_envs, -1)
        else:
            features = agent.extract(contexts).repeat_interleave(envs.num_envs // len(contexts), 0)
        for t in range(envs.horizon):
            if seen:
                data["gamma_t"][t] = encoder.step(token, t, caches, valid)
            both = agent.beside(features, data["gamma_t"][t] if seen else None)
            obs, _ = record_step(envs, data, t, obs, agent.act(obs, both, deterministic))
            if seen:
                token = token_of(data, t, read)
            if envs.device.type == "cpu" and not (data["alive"][t] & ~data["terminated"][t]).any():
                data["obs"][t + 1 :] = data["next_obs"][t + 1 :] = obs  # all are done: the rest would be idle
                for name in ("actions", "rewards", "raw_rewards", "alive"):
                    data[name][t + 1 :] = 0
                break
    return data


# ---------- 6. The algorithms ----------


def train_encoder(encoder, learners, buffer, iteration, args):
    """Algorithm 3, on stored tasks: gradient steps, each on a new batch. Returns the loss's mean terms.

    learners: heads, target and belief_optimizer by name.
    """
    heads, target, optimizer = (learners[name] for name in ("heads", "target", "belief_optimizer"))
    optimizer.param_groups[0]["lr"] = args.belief_learning_rate  # that of a resumed run may be another
    log = []
    for _ in range(args.belief_updates):
        batch, contrast = buffer.sample(args.belief_batch), iteration > args.contrastive_warmup
        loss, terms = encoder_loss(encoder, heads, target, batch, buffer.packing.obs_dim, args, contrast)
        descend(optimizer, loss, [encoder, heads], 0, "encoder")
        log.append(torch.stack([*terms.values()]))
    if iteration % args.nu == 0:
        target.load_state_dict(heads.task_rec.state_dict())
    return {f"encoder_{name}": value for name, value in zip(terms, torch.stack(log).mean(0))}


def train_exploration_policy(explorer, optimizer, data, args):
    """Algorithm 4, lines 12 to 19, on what `explore` returned."""
    optimizer.param_groups[0]["lr"] = args.explore_learning_rate
    data = data | dict(rewards=exploration_rewards(data, args))
    sizes = args.explore_epochs, args.explore_minibatches, args.explore_clip_coef
    terms = ppo_update(explorer, optimizer, data, *sizes, args)
    return {f"explore_{name}": value for name, value in terms.items()}


def shared_component(encoder, buffer, args):
    """z^ (D,), what tasks have in common, for phase 2: the mean of z over five batches."""
    with torch.no_grad():
        batches = ([x.flatten(0, 1) for x in buffer.sample(args.belief_batch).values()] for _ in range(5))
        return torch.stack([encoder.shared(encoder.latents(*batch)[1]) for batch in batches]).mean(0)


def told_contexts(envs, args, tasks=None):
    """What stands in the place of contexts without an encoder: the true tasks (N, G), or zeros (N, 1)."""
    task = envs.reset(tasks)[1]["task"]
    return task.clone() if args.oracle_context else torch.zeros_like(task[:, :1])


def find_contexts(envs, encoder, explorer, args):
    """Algorithm 5, lines 2 to 4: contexts (P, C) of new tasks. Returns the number of real steps, too, and the seconds
    in environments."""
    if not has_encoder(args):
        return told_contexts(envs, args), 0, 0.0
    data = explore(envs, encoder, explorer, args)
    check_steps(observation=data["obs"], next_observation=data["next_obs"], reward=data["rewards"])
    with torch.no_grad():
        contexts = encoder.task_context(data["tokens"], data["valid"], data["gammas"])
    return contexts, data["alive"].sum(), data["env_seconds"]


def train_task_policy(agent, optimizer, data, args):
    """Algorithm 5, lines 7 to 19, on what `exploit` returned."""
    if args.norm_reward:
        data = data | dict(rewards=normalise_rewards(data["rewards"], data["alive"], agent.return_norm, args))
    sizes = args.update_epochs, args.num_minibatches, args.clip_coef
    losses = ppo_update(agent, optimizer, data, *sizes, args, meta=True)
    # The normalisers move between updates and rollouts, so that a rollout and its update see the same inputs.
    if args.norm_inputs:
        agent.obs_norm.update(data["obs"].flatten(0, 1), data["alive"].flatten())
        agent.context_norm.update(data["contexts"], torch.ones_like(data["contexts"][:, 0], dtype=torch.bool))
    return losses


def contexts_by_episode(envs, encoder, explorer, args, tasks):
    """Contexts of the named tasks after 1, .., K episodes of exploration, each (N, C)."""
    if not has_encoder(args):
        yield told_contexts(envs, args, tasks)
        return
    data = explore(envs, encoder, explorer, args, tasks, args.eval_explore == "greedy")
    for k in range(1, args.episodes_per_task + 1):
        valid = data["valid"].clone()
        valid[:, k * (args.horizon + 1) :] = False  # as if the other episodes had not been played
        tokens = data["tokens"] * valid.unsqueeze(-1)
        yield encoder.task_context(tokens, valid, encoder.gammas(tokens, valid))


def other_tasks(tasks):
    """For each of the named tasks the number of one that is drawn from those that are another task (its own number, if
    there is none): (N,)."""
    names = [name.split("#")[0] for name in tasks]
    differ = torch.tensor([[mine != its for its in names] for mine in names])
    return torch.where(differ.any(1), (torch.rand(differ.shape) * differ).argmax(1), torch.arange(len(names)))


def meta_test(envs, exploit_envs, encoder, explorer, agent, args, tasks, deterministic):
    """Algorithm 2 in the named tasks, one for each of N `envs`, with --eval-episodes of `exploit_envs` for each.

    deterministic: the task policy takes its most likely actions; the exploration policy goes by --eval-explore.
    Returns the rollout with the whole context, these environments, and episode_return, episode_success (K + 2, N; the
    latter where success is defined), means over a task's episodes: with the whole context of another task; without
    context, zeros; and after 1, .., K episodes of exploration. --oracle-context and --no-belief have three rows. What
    is learned of a task is how far the last lies above the first, and above a run with --no-belief; zeros are an input
    that no policy trained on.
    """
    many, means = [name for name in tasks for _ in range(args.eval_episodes)], []
    with torch.no_grad():
        contexts = [*contexts_by_episode(envs, encoder, explorer, args, tasks)]
        for context in [contexts[-1][other_tasks(tasks).to(envs.device)], None, *contexts]:
            data = exploit(exploit_envs, agent, context, encoder, many, deterministic)
            found = outcomes(data, exploit_envs)
            means.append({key: x.float().view(len(tasks), -1).mean(1) for key, x in found.items()})
    return data | dict(envs=exploit_envs) | {key: torch.stack([row[key] for row in means]) for key in means[0]}


def summarise(tasks):
    """An evaluation's scalars by name: `by_episode`, and how much more a task's own context brings than another's."""
    scalars = by_episode(tasks)
    scalars.pop("success_rate_any_episode", None)  # of means over episodes there is none
    for key, word in measured(tasks):
        rows = np.array([task[key] for task in tasks.values()])  # (tasks, K + 2)
        scalars[f"{word}_adaptation"] = float((rows[:, -1] - rows[:, 0]).mean())
    return scalars


def what(name):
    """What the rows of `meta_test` are called: return_episode_1, _2, _3 -> return_permuted, _without, _after_1."""
    word, _, number = name.rpartition("_episode_")
    return word + {"1": "_permuted", "2": "_without"}.get(number, f"_after_{int(number) - 2}") if word else name


def start_phase_1(args, run, encoder, explorer):
    """What phase 1 alone needs: modules and optimisers by name, buffer and environments by name, and their bytes in a
    checkpoint. Raises BadInput where memory is short."""
    envs = run.make_envs(run.envs.split, args.num_envs * args.meta_episodes)
    envs.repeat, envs.phase = args.meta_episodes, 1
    length, token_dim = tokens_shape(envs)
    buffer = Buffer(min(args.buffer_size, args.explore_iterations * args.num_envs), envs, args.meta_episodes)
    needed = phase_1_memory(args, buffer.size * buffer.row_bytes, token_dim)
    advice = "choose a smaller --buffer-size, --belief-batch or --meta-episodes, or --recompute"
    print(check_memory(needed, run.device, "phase 1", advice))
    heads = Heads(args, token_dim, length).to(run.device)
    target = deepcopy(heads.task_rec).requires_grad_(False)
    learned = [*encoder.parameters(), *heads.parameters()]
    belief_optimizer = torch.optim.Adam(learned, lr=args.belief_learning_rate, fused=True)
    explore_optimizer = torch.optim.Adam(explorer.parameters(), lr=args.explore_learning_rate, eps=1e-8, fused=True)
    parts = dict(heads=heads, target=target, belief_optimizer=belief_optimizer, explore_optimizer=explore_optimizer)
    return parts, dict(buffer=buffer, many_envs=envs), needed["buffer"] + needed["weights"]


def load_explored(args, script, encoder, explorer):
    """--explored: encoder and exploration policy of another run. Raises BadInput where they do not fit."""
    path, state = args.explored, load_checkpoint(args.explored, script)
    saved, done = Args(**state["args"]), state["iteration"]
    last = saved.explore_iterations
    refuse(
        (not has_phase_1(saved), f"--explored {path}: that run has no phase 1 of its own"),
        (done < last, f"--explored {path} is in its phase 1, at iteration {done} of {last}: --resume it first"),
    )
    for name in ENCODER:
        mine, its = getattr(args, name), getattr(saved, name)
        refuse((mine != its, f"{flag(name)} {mine}: the encoder of {path} is for {its}"))
    load_modules(path, state, dict(encoder=encoder, explorer=explorer))


def make_networks(args, envs):
    """Encoder, exploration policy and task policy."""
    obs_dim, space = envs.single_observation_space.shape[0], envs.single_action_space
    length, token_dim = tokens_shape(envs)
    context_dim = args.d_model * length
    if not has_encoder(args):
        context_dim = told_contexts(envs, args, [envs.tasks[0]] * envs.num_envs).shape[1]  # naming tasks draws none
    encoder, explorer = Encoder(args, token_dim), explore_agent(args, obs_dim, space)
    return [net.to(envs.device) for net in (encoder, explorer, task_agent(args, obs_dim, space, context_dim))]


def main(args):
    """Algorithm 1."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    refuse((not alone, "laser.py runs in one process, not under torchrun: z is a code of all tasks of a batch"))
    split = args.oracle_split if args.oracle_context else ""
    with Run(args, split, threads=cores()) as run:  # the transformers are large
        check_args(args)
        check_envs(args, run.envs)
        envs, phase_1 = run.envs, args.explore_iterations * has_phase_1(args)  # iterations
        last = phase_1 + args.task_iterations
        exploit_envs = run.make_envs(envs.split, args.num_envs * args.exploit_episodes, episodes_per_task=1)
        exploit_envs.repeat, exploit_envs.phase = args.exploit_episodes, 2
        encoder, explorer, agent = make_networks(args, envs)
        if args.explored and not (args.resume or args.evaluate):
            load_explored(args, run.script, encoder, explorer)
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-8, fused=True)
        parts = dict(encoder=encoder, explorer=explorer, agent=agent, optimizer=optimizer)
        own = dict(envs=envs, exploit_envs=exploit_envs)
        # Only these two dicts hold what phase 1 alone needs, so that clearing them frees it.
        learners, stores, room = start_phase_1(args, run, encoder, explorer) if run.iteration < phase_1 else ({}, {}, 0)
        run.keep(**parts, **learners, own=own | stores, room=room, fixed=UNCHANGED, most_eval_envs=36)
        eval_exploit_envs = {
            split: run.make_envs(split, one.num_envs * args.eval_episodes, episodes_per_task=1)
            for split, one in run.eval_envs.items()
        }
        for one in eval_exploit_envs.values():
            one.phase = 2
        run.compile(encoder.f_u, "forward")
        run.compile(encoder.f_b, "forward")

        def play(envs, tasks, deterministic):
            return meta_test(envs, eval_exploit_envs[envs.split], encoder, explorer, agent, args, tasks, deterministic)

        # Lines 2 to 7: the encoder and the exploration policy
        for iteration in run.iterations(phase_1, unit=" iterations", about="phase 1") if learners else ():
            data = explore(stores["many_envs"], encoder, explorer, args)
            run.global_step += int(data["alive"].sum())
            check_steps(observation=data["obs"], next_observation=data["next_obs"], reward=data["rewards"])
            run.lap("rollout")
            stores["buffer"].add(data)
            losses = train_encoder(encoder, learners, stores["buffer"], iteration, args)
            run.lap("belief")
            if iteration > args.initial_iterations:
                losses |= train_exploration_policy(explorer, learners["explore_optimizer"], data, args)
            run.lap("ppo")
            if iteration == phase_1:  # lines 6 and 7, here, so that they are in this iteration's checkpoint
                encoder.z_hat.copy_(shared_component(encoder, stores["buffer"], args))
                run.parts, run.own = parts, own
                learners.clear(), stores.clear()  # phase 2 does without: room
            if args.total_timesteps and run.global_step >= args.total_timesteps:
                run.last = last = iteration
            run.shown["explored"] = intrinsic_rewards(data["gammas"], args).sum(1).mean().item()
            more = {"charts/exploration_return": run.shown["explored"]}
            run.log(losses, data, more | {"charts/phase": 1, "charts/iteration": iteration})
            if run.stopped() or run.due(args.checkpoint_interval):
                run.save()

        # Lines 8 to 10: the task policy
        for iteration in run.iterations(last, unit=" iterations", about="phase 2"):
            left = 1 - (iteration - 1 - phase_1) / max(1, args.task_iterations)
            optimizer.param_groups[0]["lr"] = args.learning_rate * (left if args.anneal_lr else 1)
            # The next reset repeats each task that the next one of envs draws.
            exploit_envs.load_state_dict(envs.state_dict())
            contexts, steps, env_seconds = find_contexts(envs, encoder, explorer, args)
            data = exploit(exploit_envs, agent, contexts, encoder)
            data["env_seconds"] += env_seconds
            run.global_step += int(steps + data["alive"].sum())
            check_finite(context=contexts)
            check_steps(observation=data["obs"], next_observation=data["next_obs"], reward=data["rewards"])
            run.lap("rollout")
            losses = train_task_policy(agent, optimizer, data, args)
            run.lap("ppo")
            if args.total_timesteps and run.global_step >= args.total_timesteps:
                run.last = iteration
            run.log(losses, data | outcomes(data, exploit_envs), {"charts/phase": 2, "charts/iteration": iteration})
            if run.due(args.eval_interval, since=phase_1):
                run.evaluate(play, summarise, what)
            if run.stopped() or run.due(args.checkpoint_interval):
                run.save()
        run.finish(play, partial(draw_pictures, encoder, explorer, args), summarise, what)


# ---------- 7. Pictures ----------


@torch.no_grad()
def draw_pictures(encoder, explorer, args, run, details):
    """Contexts of the test tasks in two dimensions (Figure 9), similarities of exploration episodes, and the curves."""
    losses = ("rec", "task_rec", "contrastive", "regulariser")
    keys = [f"losses/encoder_{name}" for name in losses] + ["charts/exploration_return", "charts/episodic_return"]
    if (run.folder / "metrics.csv").exists():
        draw_curves(run.folder / "curves.png", run.folder, keys + ["eval/test/return", "eval/test/return_adaptation"])
    if not has_encoder(args):
        return
    envs = run.eval_envs["test"]
    names = reversed(first_tasks(envs, args.eval_tasks))
    names = [*{name.split("#")[0]: name for name in names}.values()][::-1]  # a task once
    names = [names[i * len(names) // envs.num_envs] for i in range(envs.num_envs)]
    contexts, cosines = [], 0
    for _ in range(8):  # meta-episodes of each task
        data = explore(envs, encoder, explorer, args, names)
        contexts.append(encoder.task_context(data["tokens"], data["valid"], data["gammas"]))
        cosines = cosines + similarity(data["gammas"], args.episodes_per_task) / 8
    names = [name.split("#")[0] for name in names]
    first = [names.index(name) for name in dict.fromkeys(names)]
    draw_contexts(run.folder / "contexts.png", torch.stack(contexts).cpu().numpy(), names)
    draw_similarity(run.folder / "similarity.png", cosines[first].cpu().numpy(), [names[i] for i in first])


# ---------- 8. Presets ----------

# The paper's Tables 5 to 8; Args' defaults are those of MEWA. Ours: the tasks of an iteration, the warm-up of the
# contrastive loss (half of the initial iterations, as in MEWA), bounds of deviations, and all that evaluates.
META_WORLD = dict(
    num_envs=10, horizon=200, episodes_per_task=2, explore_iterations=700, initial_iterations=20,
    task_iterations=9_000, belief_updates=2, belief_batch=10, buffer_size=1_000, nu=25, contrastive_warmup=10,
    sigma=0.01, beta=0.0, zeta=0.0, pfo_coef=0.0, update_epochs=2, num_minibatches=8, policy_layers=(256, 256, 128),
    context_layers=(256, 256, 128, 10), std_min=0.5, std_max=1.5, eval_episodes=1, eval_interval=500,
    norm_inputs=True, norm_reward=True, oracle_split="train", policy_gamma=True,
)  # fmt: skip
SMALL_SIZES = dict(  # what fits a machine without a GPU and learns there in minutes, unless --cuda; ours
    meta_episodes=4, d_model=32, num_layers=2, num_heads=4, feed_forward=128, belief_batch=4, belief_updates=8,
    explore_iterations=300, initial_iterations=60, task_iterations=4_000, contrastive_warmup=30, nu=10,
    belief_learning_rate=1e-3, explore_learning_rate=3e-4, buffer_size=1_000, recompute=False, learning_rate=3e-4,
    exploit_episodes=2, eval_interval=200,
)  # fmt: skip
PRESETS = {
    "MEWA": {},
    "MEWAUniform": dict(oracle_split="train"),
    **dict.fromkeys(("ML1", "ML10", "ML45"), META_WORLD),
    "HopperMass": dict(
        explore_iterations=600, initial_iterations=30, task_iterations=2_500, belief_learning_rate=5e-4,
        belief_updates=2, belief_batch=10, buffer_size=2_000, nu=25, contrastive_warmup=15, sigma=0.003,
        explore_learning_rate=8e-5, survival_coef=0.01, learning_rate=6e-5, beta=0.0, zeta=0.0, pfo_coef=0.0,
        num_minibatches=8, policy_layers=(256, 256, 128), context_layers=(256, 256, 128, 10), eval_tasks=30,
        eval_episodes=2, recompute=True, norm_inputs=True, norm_reward=True, oracle_split="train",
        policy_gamma=True,
    ),
    # Whatever else, and your own: sizes for a small machine, with --cuda, too (ours).
    "module:factory": SMALL_SIZES | dict(norm_inputs=True, norm_reward=True, oracle_split="train"),
}  # fmt: skip
SMALL_ML = SMALL_SIZES | dict(
    explore_iterations=30, initial_iterations=5, contrastive_warmup=3, eval_tasks=10, belief_updates=4,
    exploit_episodes=5, task_iterations=300, eval_interval=50,
)  # fmt: skip
SMALL = {
    **dict.fromkeys(("MEWA", "MEWAUniform"), SMALL_SIZES),
    **dict.fromkeys(("ML1", "ML10", "ML45"), SMALL_ML),
    "HopperMass": SMALL_SIZES | dict(
        explore_iterations=60, initial_iterations=10, contrastive_warmup=5, belief_updates=4, belief_batch=2,
        exploit_episodes=5, task_iterations=300, eval_interval=50,
    ),
}  # fmt: skip


if __name__ == "__main__":
    start(main, Args, PRESETS, SMALL, inherited=dict(explored=ENCODER))
