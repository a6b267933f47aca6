"""LDM: Latent Dynamics Mixture, meta-RL for tasks outside the training set (Lee and Chung, NeurIPS 2021).

An RL2 policy, whose own recurrent encoder-p learns end to end from the return, does not act well on tasks unlike those
of its training. So some of the workers train it on imaginary ones: beside the policy, variBAD's latent dynamics network
(encoder-v and a reward decoder) learns a latent m of every task, and a mixture worker's rewards are those that the
decoder predicts under a random mixture of the others' m. Dropout of all its inputs but m keeps the decoder from
knowing by heart where rewards are.

Shapes: T steps of a meta-episode, N environments (workers), n of them normal, B batch, S observation, A action,
Z latent, D hidden; time-major.

    python ldm.py                                   # the paper's grid, GridWorldLDM; --help shows every preset
    python ldm.py --num-mixture-workers 0           # RL2: the same policy, nothing imagined
    python ldm.py --env-id HalfCheetahVel

Section of the paper                                             function
    3.1 policy: encoder-p, its belief b_t, actor and critic      BeliefEncoder, Agent
        trained end to end by A2C or PPO                         gae, a2c_update, ppo_update
    3.2 latent dynamics network: encoder-v, reward decoder       BeliefModel, Decoder, reconstruction, elbo
    3.3 (1) mixture weights alpha, mixed latent m^               draw_mixture, mix
        imaginary reward r^ = decoder(m^, s')                    imagine, rollout
        dropout of the decoder's inputs                          Decoder
    3.4 an iteration: new tasks, roles and weights               main

Where this leaves the paper, and the authors' code
    KL weight: their code's, which has a mean over decoded transitions and not the text's sum; see --kl-coef.
    Roles and weights are drawn anew for every meta-episode. Where the policy sees b_t alone, b_0 has not read s_0.
    At an episode's end encoder-p reads its last state with a flag (their code), and the policy acts on the next one's
    first. With two PPO windows of two episodes no gradient reaches the flag's weights: each window ends there.
    The buffer holds the last meta-episodes (theirs takes no more once it has seen as many as it holds).
    MuJoCo: an iteration has 400 steps (theirs 200), so twice the minibatches and belief updates; credit flows between
    episodes; inputs of the belief model are standardised; the policy's observations are normalised once an iteration,
    not clipped. Their RL2's memory is emptied after 200 of 400 training steps, ours is not.
    --decode cells or shared and --elbo-terms save decoding: the same loss in expectation, with dropout shared.
    --mix-dimensions: weights for each dimension of m, as in their code; the default is (1).
"""

import common  # noqa: F401  # before PyTorch: a Ctrl-C during its import leaves no traceback

# isort: split
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal

from common.arguments import Above0, AtLeast0, Count, Count0, Dropout, Experiment, Fraction, Layers, refuse
from common.networks import GRU, BoundedStd, RunningNorm, mlp, normc_
from common.plot import draw_grid_belief, draw_mixed_tasks, draw_returns
from common.processes import all_sum, check_steps, descend, ranks, share
from common.rollouts import obs_shift, outcomes, record_step, records
from common.run import Run, start

# ---------- 1. Arguments ----------


@dataclass
class PPO:
    """The policy and its update, A2C's or PPO's."""

    # a2c: one step on the whole rollout, of RMSprop for actor and critic and of Adam for encoder-p (the authors' grid);
    # ppo: minibatches of whole windows, Adam for all (their MuJoCo). Both go through encoder-p, from the end of a
    # meta-episode, or of a window, to its start.
    rl: Literal["a2c", "ppo"] = "a2c"
    learning_rate: Above0 = 7e-4  # step size for actor, critic and encoder-p
    anneal_lr: bool = False  # let it fall linearly to 0
    gamma: Fraction = 0.95  # discount per step, over the whole meta-episode
    gae_lambda: Fraction = 0.95  # lambda of the generalised advantage estimate
    # task: the end of a meta-episode bootstraps from its last state; terminal: its value is 0 (variBAD's code, grid);
    # episode: no credit flows from one episode to the next (variBAD's code, elsewhere).
    time_limit: Literal["task", "terminal", "episode"] = "task"
    update_epochs: Count = 2  # PPO: passes over an iteration's steps
    num_minibatches: Count = 4  # PPO: gradient steps per pass, each on some meta-episodes or windows
    clip_coef: Above0 = 0.05  # PPO: epsilon of the clipped ratio and value
    ent_coef: AtLeast0 = 0.1  # weight of the entropy bonus at the start
    ent_coef_end: AtLeast0 = 0.1  # and at the end: linear in between
    vf_coef: AtLeast0 = 0.5  # weight of the value loss
    # huber: variBAD's code, clipped values; mse: 1/2 squared error. A2C's is the squared error (the authors' code).
    value_loss: Literal["huber", "mse"] = "huber"
    max_grad_norm: AtLeast0 = 0.5  # clip of the gradient's norm, of actor and critic and of encoder-p; 0 = off
    norm_reward: bool = False  # divide the policy's rewards by the deviation of the discounted return, clip at 10
    policy_layers: Layers = (32,)  # hidden layers (tanh) of actor and critic
    policy_latent_dim: Count = 32  # encoder-p's latent: the policy sees a mean and a log-variance of this dimension
    policy_state: bool = False  # the policy sees the state beside them
    # What encoder-p reads of a step that ends an episode. final: the state it led to, and a flag that is 1 there (the
    # authors' code); next: the next episode's first state, on which the policy acts, and no flag (ours).
    encoder_obs: Literal["final", "next"] = "final"
    # PPO: windows that a meta-episode is divided into. Encoder-p enters each with the hidden state that the rollout had
    # there, and no gradient goes beyond it. In the authors' code a window is one of their iterations.
    ppo_windows: Count = 1
    # Training moves the states of a meta-episode by a random constant, this times the deviation of first states: so
    # that the policy cannot tell the few training tasks apart by where things happen to stand (ours).
    obs_shift: AtLeast0 = 0.0
    actor_gain: Above0 = 1.0  # norm of the rows of a continuous policy's last layer at the start; small: small actions
    std_init: Above0 = 1.0  # deviation of a continuous action at the start
    std_min: Above0 = 0.01  # its lower bound, reached softly
    std_max: Above0 = 2.0  # its upper bound


@dataclass
class Belief:
    """The latent dynamics network and its update; the sizes of encoder-p, too."""

    belief: bool = True  # off: the state alone, without encoder-p: the floor; nothing is imagined
    oracle_context: bool = False  # the state and the true task, without encoder-p: the ceiling; nothing is imagined
    belief_learning_rate: Above0 = 1e-3  # Adam's step size for encoder-v and decoders
    belief_anneal_lr: bool = False  # let it fall linearly to 0, so that the belief settles (ours)
    belief_updates: Count0 = 2  # gradient steps per iteration
    belief_batch: Count = 25  # meta-episodes per gradient step (B)
    belief_max_grad_norm: AtLeast0 = 0.0  # clip of the gradient's norm, for each of encoder and decoders; 0 = off
    buffer_size: Count = 100_000  # meta-episodes kept for the belief model; as many as --num-envs: on-policy
    buffer_add: Fraction = 1.0  # probability that a normal worker's meta-episode is kept
    precollect: Count0 = 0  # steps before the first gradient step; the policy waits for the second iteration too
    action_embed: Count0 = 0  # embedding of the action in both encoders and the decoders; 0 = not an input
    state_embed: Count = 32  # embedding of the state
    reward_embed: Count = 8  # embedding of the reward (encoders)
    hidden_dim: Count = 128  # units of each encoder's GRU (D)
    latent_dim: Count = 32  # dimension of the latent m (Z)
    tbptt: Count0 = 0  # encoder-v: steps of a window of truncated back-propagation through time; 0 = whole meta-episode
    elbo_terms: Count0 = 0  # posteriors drawn per meta-episode; 0 = all
    decode_terms: Count0 = 0  # transitions drawn per meta-episode; 0 = all
    # One Bernoulli of (m, s') (grids; the paper's single head), the squared error of the reward of (m, s, a, s') or of
    # (m, s'), or a Bernoulli per grid cell, of m alone (multihead, as variBAD's: then dropout has nothing to drop).
    reward_decoder: Literal["bernoulli", "mlp", "mlp-next", "multihead"] = "bernoulli"
    # How often the decoder runs; the same loss and gradient in expectation. all: for every posterior and transition,
    # each with dropout of its own (the authors' code); shared: the same, a transition's dropout the same for all
    # posteriors; cells: once for each posterior and visited cell, a cell's dropout the same for all posteriors
    # (bernoulli alone, else as shared).
    decode: Literal["all", "cells", "shared"] = "cells"
    decoder_layers: Layers = (32, 32)  # hidden layers (ReLU) of each decoder
    decoder_dropout: Dropout = 0.7  # dropout on the decoders' embeddings of s, a, s' (not on m), imagining too
    reward_coef: AtLeast0 = 1.0  # weight of the reward's reconstruction
    state_coef: AtLeast0 = 0.0  # weight of the state's reconstruction; 0 = no state decoder
    standardise_inputs: bool = False  # standardise what encoders and decoders read and, of states, predict (ours)
    # Weight of the KL. Every term of the ELBO is a mean here (over B, posteriors, transitions), so this is the weight
    # in a summed ELBO over the number of decoded transitions. The authors' code has a mean over these: 1 on grids, and
    # on MuJoCo, where it counts 50 of 401 posteriors in the KL alone, 50 / 401. The paper's text, a summed ELBO, is
    # --kl-coef 0.00833 (1 / 120) on its grid, 0.000312 (50 / 401 / 400) on MuJoCo.
    kl_coef: AtLeast0 = 1.0
    kl_to_prior: bool = False  # KL of each posterior to N(0, I) (authors' option), not to the posterior before (paper)


@dataclass
class LDM:
    """Imaginary tasks."""

    num_mixture_workers: Count0 = 2  # environments whose rewards are imagined; 0 = RL2, no latent dynamics network
    beta: AtLeast0 = 1.0  # (1): the weights are beta * Dirichlet(1, .., 1) - (beta - 1) / n; above 1 they extrapolate
    mix_dimensions: bool = False  # other weights in each dimension of m (the authors' code), not the same (paper)


@dataclass
class Args(LDM, Belief, PPO, Experiment):
    env_id: str = "GridWorldLDM"
    total_timesteps: Count = 100_000_000
    split_rule: Literal["varibad", "ldm"] = "ldm"


def check_args(args):
    """BadInput for arguments that do not fit each other."""
    T, N, count = args.horizon * args.episodes_per_task, args.num_envs // ranks(), args.num_mixture_workers
    refuse(
        (0 < count < ranks(), f"--num-mixture-workers {count}: {ranks()} processes cannot share them"),
        (
            count and N - math.ceil(count / ranks()) < 2,
            f"--num-mixture-workers {count} leaves fewer than 2 of --num-envs {args.num_envs} to mix",
        ),
        (T % args.ppo_windows, f"--ppo-windows {args.ppo_windows} does not divide the {T} steps of a meta-episode"),
        (
            args.rl == "ppo" and N * args.ppo_windows % args.num_minibatches,
            f"--num-minibatches {args.num_minibatches} does not divide --num-envs {N} (of each process) times "
            f"--ppo-windows {args.ppo_windows}",
        ),
    )


def imagines(args):
    """Whether there are mixture workers, and so a latent dynamics network to learn; there are none in RL2."""
    return args.num_mixture_workers > 0 and args.belief and not args.oracle_context


# ---------- 2. Networks ----------


class Agent(nn.Module):
    """The policy (3.1): encoder-p, and actor and critic on its belief b_t: pi(a | b) and V(b).

    With --policy-state they see the normalised observation too, and without encoder-p (--no-belief, --oracle-context)
    in any case. The belief has named parts, `belief_sizes`: name -> size.
    """

    def __init__(self, args, obs_dim, action_space, belief_sizes):
        super().__init__()
        self.belief_sizes, self.discrete = belief_sizes, hasattr(action_space, "n")
        n_out = int(action_space.n) if self.discrete else action_space.shape[0]
        self.std = None if self.discrete else BoundedStd(n_out, args.std_init, args.std_min, args.std_max)
        self.obs_norm, self.return_norm, self.first_norm = RunningNorm(obs_dim), RunningNorm(1), RunningNorm(obs_dim)
        recurrent = args.belief and not args.oracle_context
        flags = args.encoder_obs == "final"
        self.encoder = BeliefEncoder(args, obs_dim, action_space, args.policy_latent_dim, flags) if recurrent else None
        self.sees_state = args.policy_state or not recurrent
        sizes = [sum(belief_sizes.values()) + obs_dim * self.sees_state, *args.policy_layers]
        self.actor, self.critic = mlp([*sizes, n_out], nn.Tanh), mlp([*sizes, 1], nn.Tanh)
        for net in (self.actor, self.critic):
            for layer in net[:-1:2]:
                normc_(layer, 1.0)
        if self.discrete:
            nn.init.orthogonal_(self.actor[-1].weight, 0.01)
            nn.init.zeros_(self.actor[-1].bias)
        else:
            normc_(self.actor[-1], args.actor_gain)

    def parts(self):
        """The modules whose gradients are clipped one by one: actor and critic, and encoder-p."""
        std = [] if self.discrete else [self.std]
        return [nn.ModuleList([self.actor, self.critic, *std])] + ([self.encoder] if self.encoder else [])

    def beliefs(self, data):
        """Encoder-p on meta-episodes or windows, with gradients: read_obs (T, B, .), actions, rewards -> (T + 1, B, .).

        It starts from the first of hiddens (., B, D). Without encoder-p, the beliefs that the rollout had.
        """
        if not self.encoder:
            return data["beliefs"]
        data = data | dict(next_obs=data["read_obs"])
        return self.encoder.belief(self.encoder.hiddens(data, start=data["hiddens"][:1]))

    def named(self, belief):
        """A belief (..., sum of the sizes) -> its parts by name."""
        return dict(zip(self.belief_sizes, belief.split([*self.belief_sizes.values()], -1)))

    def embed(self, obs, belief):
        return torch.cat([belief, self.obs_norm(obs)], -1) if self.sees_state else belief

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
    """Embeddings and GRU: the history of (a, s', r) -> hidden (D), of which heads make the posterior."""

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

    Its first layer is W_m m + W_x x: two small products and one broadcast sum in place of a row for each pair. Dropout
    hides x, never m: the decoder has to read the task from m. The mask of an x is the same for all m unless decode=all.
    """

    def __init__(self, args, obs_dim, action_dim, out_dim, inputs):
        super().__init__()
        self.embed_state = nn.Linear(obs_dim, args.state_embed)
        with_action = args.action_embed and "action" in inputs
        self.embed_action = nn.Linear(action_dim, args.action_embed) if with_action else None
        self.inputs, self.dropout, self.decode = inputs, args.decoder_dropout, args.decode
        size = args.state_embed * (len(inputs) - ("action" in inputs)) + args.action_embed * ("action" in inputs)
        self.net = mlp([args.latent_dim + size, *args.decoder_layers, out_dim], nn.ReLU)

    def forward(self, m, obs, action, next_obs):
        """m (E, B, Z), obs, action, next_obs (D, B, .) -> (E, D, B, out)."""
        x = [self.embed_state(s) for s, name in ((obs, "obs"), (next_obs, "next_obs")) if name in self.inputs]
        if self.embed_action:
            x += [self.embed_action(action)]
        x = torch.cat(x, -1).relu()
        if self.decode == "all" and self.training:
            x = x.expand(len(m), *x.shape)  # a mask of its own for each pair
        x = F.dropout(x, self.dropout, self.training)
        (first, *others), Z = self.net, m.shape[-1]
        hidden = F.linear(m, first.weight[:, :Z])[:, None] + F.linear(x, first.weight[:, Z:], first.bias)
        for layer in others:
            hidden = layer(hidden)
        return hidden


# ---------- 3. Latent dynamics network ----------


class BeliefEncoder(nn.Module):
    """Encoder and the posterior's heads: encoder-p of the policy, encoder-v of the latent dynamics network.

    With flags, a state has a last entry, 1 at an episode's end: S is one more.
    """

    def __init__(self, args, obs_dim, action_space, latent_dim, flags=False):
        super().__init__()
        self.discrete = hasattr(action_space, "n")
        self.num_actions = int(action_space.n) if self.discrete else action_space.shape[0]
        self.encoder = Encoder(args, obs_dim + flags, self.num_actions)
        self.heads = nn.Linear(args.hidden_dim, 2 * latent_dim)  # mean and log-variance
        norm = RunningNorm if args.standardise_inputs else nn.Identity
        self.obs_norm, self.reward_norm, self.obs_dim = norm(obs_dim, min_std=0.02), norm(1, min_std=0.02), obs_dim
        if self.discrete:
            self.register_buffer("one_hot", torch.eye(self.num_actions), persistent=False)
        elif np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all():
            self.register_buffer("low", torch.as_tensor(action_space.low))
            self.register_buffer("high", torch.as_tensor(action_space.high))

    def action_input(self, action):
        """What the environment made of the policy's action: one-hot if discrete, clipped to its box else."""
        if self.discrete:
            return F.embedding(action, self.one_hot)
        return torch.maximum(torch.minimum(action, self.high), self.low) if hasattr(self, "low") else action

    def obs_input(self, obs):
        """States (..., S), standardised; a flag stays 0 or 1."""
        return torch.cat([self.obs_norm(obs[..., : self.obs_dim]), obs[..., self.obs_dim :]], -1)

    def step(self, action, next_obs, reward, hidden):
        """The encoder's step on a raw transition: action (N, .), next_obs (N, S), reward (N,) -> hidden (N, D)."""
        reward = self.reward_norm(reward.unsqueeze(-1))
        return self.encoder.step(self.action_input(action), self.obs_input(next_obs), reward, hidden)

    def hiddens(self, batch, tbptt=0, start=None):
        """The encoder's hidden states on whole meta-episodes: actions, next_obs, rewards (T, B, .) -> (T + 1, B, D).

        On windows of them it goes on from start (1, B, D), the first of its results.
        """
        rewards = self.reward_norm(batch["rewards"].unsqueeze(-1))
        inputs = self.action_input(batch["actions"]), self.obs_input(batch["next_obs"]), rewards
        if start is None:
            return self.encoder(*inputs, tbptt)
        return torch.cat([start, self.encoder.gru(self.encoder.embed(*inputs), start)[0]])

    def posterior(self, hidden):
        """q(m | tau_:t): hidden (..., D) -> mean, logvar (..., Z). The prior of a meta-episode is that of hidden 0."""
        return self.heads(hidden).chunk(2, -1)

    def sample(self, hidden):
        """m of q(m | tau_:t): hidden (..., D) -> (..., Z)."""
        mean, logvar = self.posterior(hidden)
        return gaussian(mean, logvar)

    def belief(self, hidden):
        """b_t, what the policy sees of encoder-p: hidden (..., D) -> mean and log-variance (..., 2 Z)."""
        return self.heads(hidden)


class BeliefModel(BeliefEncoder):
    """The latent dynamics network: encoder-v, the posterior's heads and the decoders. It takes no part in acting."""

    def __init__(self, args, envs):
        S, space = envs.single_observation_space.shape[0], envs.single_action_space
        super().__init__(args, S, space, args.latent_dim)
        A = self.num_actions
        self.cell = getattr(envs, "cell", None)
        self.grid = args.reward_decoder in ("bernoulli", "multihead")  # p(r = 1) in a cell, not the reward itself
        needs = f"--reward-decoder {args.reward_decoder} needs a grid of one goal, not {args.env_id}: choose mlp"
        refuse(
            (self.grid and self.cell is None, needs),
            (
                self.grid and args.extra_obs != "none",
                f"--extra-obs {args.extra_obs}: a grid's decoder knows cells alone, choose mlp",
            ),
        )
        if args.reward_decoder == "multihead":
            # m (..., Z) -> the logits of p(r = 1 | m, s') for every cell s' (..., cells)
            self.reward_decoder = mlp([args.latent_dim, *args.decoder_layers, envs.num_cells], nn.ReLU)
        else:
            inputs = ("obs", "action", "next_obs") if args.reward_decoder == "mlp" else ("next_obs",)
            self.reward_decoder = Decoder(args, S, A, 1, inputs)
        if args.reward_decoder == "bernoulli":
            self.register_buffer("cells", envs.cells, persistent=False)
        self.state_decoder = Decoder(args, S, A, S, ("obs", "action")) if args.state_coef else None
        self.change_norm = RunningNorm(S, min_std=0.001) if args.standardise_inputs else nn.Identity()

    def parts(self):
        """The modules whose gradients are clipped one by one."""
        encoder = nn.ModuleList([self.encoder, self.heads])
        return [encoder, self.reward_decoder] + ([self.state_decoder] if self.state_decoder else [])

    def cell_logits(self, m, which=None):
        """Grids: the logit of p(r = 1 | m, s') for all cells s', or `which` (B, C): m (E, B, Z) -> (E, B, C)."""
        if not isinstance(self.reward_decoder, Decoder):
            return self.reward_decoder(m)
        cells = self.cells.expand(m.shape[1], -1, -1) if which is None else self.cells[which]  # (B, C, S)
        cells = self.obs_norm(cells).transpose(0, 1)  # dropout's masks differ between tasks
        return self.reward_decoder(m, None, None, cells).squeeze(-1).transpose(1, 2)


def gaussian(mean, logvar):
    """A reparameterised sample of N(mean, exp(logvar))."""
    return mean + (0.5 * logvar).exp() * torch.randn_like(mean)


def kl_gaussians(mean, logvar, prior_mean, prior_logvar):
    """KL(N(mean, exp(logvar)) || N(prior_mean, exp(prior_logvar))), summed over the last dimension."""
    ratio = (logvar - prior_logvar).exp() + (mean - prior_mean).square() * (-prior_logvar).exp()
    return 0.5 * (prior_logvar - logvar + ratio - 1).sum(-1)


def reconstruction(model, m, real, batch, args):
    """-log p(r | m_t, s, a, s') and -log p(s' | m_t, s, a), up to constants: means over pairs of m_t and transition.

    m (E, B, Z): samples of posteriors, of which those count that are `real` (E, B). batch: raw transitions (T, B, .).
    """
    T, B = batch["rewards"].shape
    device = m.device
    state_loss = torch.zeros((), device=device)
    by_cell = args.reward_decoder == "multihead" or (args.reward_decoder == "bernoulli" and args.decode == "cells")
    if not by_cell or model.state_decoder:
        if 0 < args.decode_terms < T:
            i = torch.randint(T, (args.decode_terms, B), device=device)
        else:
            i = torch.arange(T, device=device)[:, None].expand(T, B)
        columns = torch.arange(B, device=device)
        obs, action, next_obs, reward, alive = (
            batch[name][i, columns] for name in ("obs", "actions", "next_obs", "rewards", "alive")
        )
        x = model.obs_norm(obs), model.action_input(action), model.obs_norm(next_obs)
        weight = (alive & real[:, None]).float()  # (E, D, B)
        weight = weight / all_sum(weight.sum()).clamp(min=1)
    if args.reward_decoder == "multihead":
        reward_loss = multihead_loss(model.cell_logits(m), real, batch, model.cell)
    elif by_cell:
        which, index = visited_cells(model.cell(batch["next_obs"]), len(model.cells))
        reward_loss = multihead_loss(model.cell_logits(m, which), real, batch, lambda _: index)
    else:
        predicted = model.reward_decoder(m, *x).squeeze(-1)
        if args.reward_decoder == "bernoulli":
            error = F.softplus(predicted) - (reward == 1) * predicted
        else:
            error = (predicted - reward).square()
        reward_loss = (error * weight).sum()
    if model.state_decoder:  # predicts the change of state, standardised, so that its weight means the same everywhere
        error = (model.state_decoder(m, *x) - model.change_norm(next_obs - obs)).square().mean(-1)
        state_loss = (error * weight).sum()
    return reward_loss, state_loss


def visited_cells(cell, num_cells):
    """The cells that each meta-episode visits, cell (T, B): which (B, C), filled up with others, and the places of the
    visited ones in it, (T, B). On a GPU, where counting them would wait for the device, C = num_cells.
    """
    visited = torch.zeros(cell.shape[1], num_cells, device=cell.device, dtype=torch.int64).scatter_(1, cell.T, 1)
    count = visited.sum(1).max() if cell.device.type == "cpu" else num_cells
    which = visited.argsort(dim=1, descending=True, stable=True)[:, :count]
    return which, (visited.cumsum(1) - 1).gather(1, cell.T).T


def multihead_loss(logits, real, batch, cell):
    """Binary cross-entropy of r = 1 in the cell of s', in the mean over pairs: logits (E, B, cells), real (E, B).

    The logit of a cell is the same for each visit, so it is enough to count the visits with and without reward.
    """
    visits = F.one_hot(cell(batch["next_obs"]), logits.shape[-1])  # (T, B, cells)
    visits = (visits * batch["alive"].unsqueeze(-1)).float()
    hits = visits * (batch["rewards"] == 1).unsqueeze(-1)
    visits, hits = (x.sum(0) * real.unsqueeze(-1) for x in (visits, hits))  # (E, B, cells)
    loss = visits * F.softplus(logits) - hits * logits  # = hits * softplus(-x) + (visits - hits) * softplus(x)
    return loss.sum() / all_sum(visits.sum()).clamp(min=1)


def elbo(model, batch, args):
    """The negative ELBO, its terms means over the batch, the posteriors t = 0..T and the transitions each decodes.

    batch: obs, next_obs (T, B, S), actions (T, B, .), rewards, alive (T, B). Returns the loss and a dict of its terms.
    """
    mean, logvar = model.posterior(model.hiddens(batch, args.tbptt))  # (T + 1, B, Z)
    if args.kl_to_prior:
        kl = kl_gaussians(mean, logvar, torch.zeros_like(mean), torch.zeros_like(logvar))
    else:  # each posterior is the next one's prior; the first one's is N(0, I)
        before = [torch.cat([torch.zeros_like(x[:1]), x[:-1]]) for x in (mean, logvar)]
        kl = kl_gaussians(mean, logvar, *before)
    real = torch.cat([torch.ones_like(batch["alive"][:1]), batch["alive"]])  # not after a step of an idle environment
    mean, logvar, kl, real = draw_posteriors(args, mean, logvar, kl, real)
    m = gaussian(mean, logvar)
    reward_loss, state_loss = reconstruction(model, m, real, batch, args)
    kl = average(kl, real)
    loss = args.state_coef * state_loss + args.reward_coef * reward_loss + args.kl_coef * kl
    return loss, dict(loss=loss, reward=reward_loss, state=state_loss, kl=kl)


def average(x, real):
    """The mean of x (E, B) where real."""
    return (x * real).sum() / all_sum(real.sum()).clamp(min=1)


def draw_posteriors(args, *tensors):
    """tensors (T + 1, B, ...) at args.elbo_terms posteriors of each meta-episode, drawn with replacement, or at all."""
    T1, B = tensors[0].shape[:2]
    if not 0 < args.elbo_terms < T1:
        return tensors
    t = torch.randint(T1, (args.elbo_terms, B), device=tensors[0].device)
    return [x[t, torch.arange(B, device=t.device)] for x in tensors]


def update_belief(model, optimizer, buffer, args):
    """One gradient step on a batch of stored meta-episodes. Returns the loss's terms, detached."""
    loss, terms = elbo(model, buffer.sample(share(args.belief_batch)), args)
    descend(optimizer, loss, model.parts(), args.belief_max_grad_norm, "belief")
    return {name: term.detach() for name, term in terms.items()}


# ---------- 4. Imaginary tasks: what this paper adds ----------


def draw_mixture(args, num_envs, device):
    """Roles and weights (1) of a meta-episode: the normal workers (n,), who imagines (N,), alpha (N, N, 1 or Z).

    A mixture worker's row of alpha adds up to 1 over the normal workers, the rest is 0. With beta = 1 it is uniform
    over all convex combinations. Each process mixes its own workers.
    """
    count = share(args.num_mixture_workers)
    chosen, normal = torch.randperm(num_envs, device=device).split([count, num_envs - count])
    draws = torch.empty(count, len(normal), args.latent_dim if args.mix_dimensions else 1, device=device).exponential_()
    dirichlet = draws / draws.sum(1, keepdim=True)
    alpha = torch.zeros(num_envs, num_envs, draws.shape[2], device=device)
    alpha[chosen[:, None], normal] = args.beta * dirichlet - (args.beta - 1) / len(normal)
    imagining = torch.zeros(num_envs, device=device, dtype=torch.bool).index_fill_(0, chosen, True)
    return normal, imagining, alpha


def mix(alpha, m):
    """(1) m^ of every worker: alpha (N, N, 1 or Z), m (N, Z) -> (N, Z)."""
    return (alpha * m).sum(1) if alpha.shape[2] > 1 else alpha[..., 0] @ m


def imagine(model, m, obs, action, next_obs, args):
    """r^, the reward that the decoder expects under m^ (N, Z): obs, next_obs (N, S), action (N, .) -> (N,).

    In training, dropout is on here as well: the imaginary rewards are noisy, as the authors' are.
    """
    if args.reward_decoder == "multihead":
        out = model.cell_logits(m[None])[0].gather(-1, model.cell(next_obs)[:, None]).squeeze(-1)
    else:
        x = model.obs_norm(obs), model.action_input(action), model.obs_norm(next_obs)
        out = model.reward_decoder(m[None], *(part[None] for part in x))[0, 0, :, 0]
    return expected_reward(out) if model.grid else out


def expected_reward(logits):
    """Grids: of 1 with the probability sigmoid(logits), else -0.1."""
    return 1.1 * logits.sigmoid() - 0.1


# ---------- 5. A2C, PPO ----------


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


class A2COptimizer:
    """RMSprop for actor and critic, Adam for encoder-p, as in the authors' code; seen from outside, one optimizer."""

    def __init__(self, agent, learning_rate):
        policy, *encoder = agent.parts()
        self.both = [torch.optim.RMSprop(policy.parameters(), learning_rate, 0.99, 1e-5)]
        self.both += [torch.optim.Adam(part.parameters(), learning_rate, fused=True) for part in encoder]
        self.param_groups = [group for optimizer in self.both for group in optimizer.param_groups]

    def zero_grad(self):
        for optimizer in self.both:
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.both:
            optimizer.step()

    def state_dict(self):
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.both)}

    def load_state_dict(self, state):
        for i, optimizer in enumerate(self.both):
            optimizer.load_state_dict(state[str(i)])
        self.param_groups = [group for optimizer in self.both for group in optimizer.param_groups]


def a2c_update(agent, optimizer, data, ent_coef, args):
    """One gradient step of the actor-critic on an iteration's steps, end to end through encoder-p. Returns its terms.

    data: obs (T, N, S), read_obs, actions (T, N, .), rewards, advantages, returns, alive (T, N), hiddens (., N, D).
    """
    alive = data["alive"].float()
    weight = alive / all_sum(alive.sum()).clamp(min=1)
    logprob, entropy, value = agent(data["obs"], agent.beliefs(data)[:-1], data["actions"])
    pg_loss = -(logprob * data["advantages"] * weight).sum()
    v_loss = ((value - data["returns"]).square() * weight).sum()
    entropy = (entropy * weight).sum()
    loss = pg_loss + args.vf_coef * v_loss - ent_coef * entropy
    descend(optimizer, loss, agent.parts(), args.max_grad_norm, "policy")
    return dict(policy=pg_loss.detach(), value=v_loss.detach(), entropy=entropy.detach())


def ppo_update(agent, optimizer, data, ent_coef, args):
    """Epochs of minibatches of PPO's clipped objective on an iteration's meta-episodes. Returns a dict of mean terms.

    data: obs (T, N, S), read_obs, actions (T, N, .), beliefs (T + 1, N, .), rewards, logprobs, values, advantages,
    returns, alive (T, N), hiddens (windows, N, D); orders: permutations of the windows, one for each epoch. A
    minibatch holds all w steps of some windows: encoder-p reads them anew each time.
    """
    T = len(data["obs"])
    w = T // args.ppo_windows
    names = "obs read_obs actions rewards beliefs logprobs advantages returns alive values".split()
    b = {name: data[name][:T].unflatten(0, (-1, w)).transpose(0, 1).flatten(1, 2) for name in names}  # (w, windows, .)
    b["hiddens"] = data["hiddens"].flatten(0, 1)[None]
    alive = b["alive"].float()
    count = all_sum(alive.sum())
    mean = all_sum((b["advantages"] * alive).sum()) / count
    std = all_sum(((b["advantages"] - mean).square() * alive).sum()).div(count).sqrt()
    b["advantages"] = (b["advantages"] - mean) / (std + 1e-5)
    size = alive.shape[1] // args.num_minibatches
    log = []
    for order in data["orders"]:
        shuffled = {name: x[:, order].split(size, 1) for name, x in b.items()}
        for i in range(args.num_minibatches):
            mb = {name: parts[i] for name, parts in shuffled.items()}
            weight = mb["alive"].float() / all_sum(mb["alive"].float().sum()).clamp(min=1)
            logprob, entropy, value = agent(mb["obs"], agent.beliefs(mb)[:w], mb["actions"])
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
            descend(optimizer, loss, agent.parts(), args.max_grad_norm, "policy")
            with torch.no_grad():
                approx_kl = ((ratio - 1 - logratio) * weight).sum()
                clipfrac = (((ratio - 1).abs() > args.clip_coef) * weight).sum()
                log.append(torch.stack([pg_loss, v_loss, entropy, approx_kl, clipfrac]))
    return dict(zip(("policy", "value", "entropy", "approx_kl", "clipfrac"), torch.stack(log).mean(0)))


# ---------- 6. Buffer and rollout ----------


class Buffer:
    """Ring of the last meta-episodes, preallocated on the device: one tensor (size, T, ...) for each entry."""

    NAMES = ("obs", "next_obs", "actions", "rewards", "alive")

    def __init__(self, size, envs):
        one = {name: tensor[:, 0] for name, tensor in records(envs).items() if name in self.NAMES}
        self.size, self.next, self.full = size, 0, 0
        self.store = {name: tensor.new_empty(size, *tensor.shape) for name, tensor in one.items()}
        self.row_bytes = sum(tensor.nbytes for tensor in one.values())

    def add(self, data):
        """data: (T, N, ...) for each of NAMES."""
        n = data["rewards"].shape[1]
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
        for name, tensor in self.store.items():
            tensor[: self.full] = state["store"][name]


def rollout(envs, agent, model, args, tasks=None, deterministic=False, mixture=None):
    """One meta-episode in every environment, from a reset and the prior belief.

    mixture: of `draw_mixture`. Rewards of mixture workers are imaginary then, in what encoders read and the policy
    learns from; the latent dynamics network learns from the normal workers alone.
    Returns what `records` and, of the normal workers, `outcomes` name, the tensors below, first_obs (N, S), task
    (N, G), normal (n,), imagining (N,), mixed (N, Z), the last m^, and details: what an evaluation keeps of each
    environment, its last belief by parts.
    """
    T, N, S, device = envs.meta_horizon, envs.num_envs, envs.single_observation_space.shape[0], envs.device
    final = args.encoder_obs == "final"
    normal, imagining, alpha = mixture or (torch.arange(N, device=device), None, None)
    data = records(envs) | dict(
        read_obs=torch.empty(T, N, S + final, device=device),  # what encoder-p reads of each step
        true_rewards=torch.empty(T, N, device=device),  # the environments' own
        beliefs=torch.zeros(T + 1, N, sum(agent.belief_sizes.values()), device=device),
        hiddens=torch.zeros(args.ppo_windows, N, args.hidden_dim, device=device),  # of encoder-p where windows start
    )
    with torch.inference_mode():
        obs, info = envs.reset(tasks)
        data["first_obs"], data["task"] = obs.clone(), info["task"].clone()
        shift = obs_shift(args, agent, obs)
        obs = obs + shift
        hidden = hidden_v = torch.zeros(N, args.hidden_dim, device=device)  # of encoder-p and of encoder-v
        belief = data["task"] if args.oracle_context else data["beliefs"][0]  # zeros: without encoder-p
        for t in range(T + 1):
            if agent.encoder:
                belief = agent.encoder.belief(hidden)
            data["beliefs"][t] = belief
            if t == T:
                break
            if t % (T // args.ppo_windows) == 0:
                data["hiddens"][t * args.ppo_windows // T] = hidden
            action = agent.act(obs, belief, deterministic)
            obs, _ = record_step(envs, data, t, obs, action, shift)
            reward, next_obs = data["rewards"][t], data["next_obs"][t]
            data["true_rewards"][t] = reward
            if mixture:  # m is that of the posterior before this transition
                data["mixed"] = m = mix(alpha, model.sample(hidden_v))
                imaginary = imagine(model, m, data["obs"][t], action, next_obs, args)
                reward = torch.where(imagining & data["alive"][t], imaginary, reward)
                hidden_v = model.step(action, next_obs, reward, hidden_v)
            data["rewards"][t] = reward
            read_obs = obs if t + 1 < T else next_obs
            if final:
                ends = data["terminated"][t] | ((t + 1) % envs.horizon == 0)
                read_obs = torch.cat([next_obs, ends[:, None]], -1)
            data["read_obs"][t] = read_obs
            if agent.encoder:
                hidden = agent.encoder.step(action, read_obs, reward, hidden)
    details = {f"belief_{name}": part for name, part in agent.named(data["beliefs"][-1]).items()}
    real = outcomes({name: data[name][:, normal] for name in ("raw_rewards", "success") if name in data}, envs)
    return data | real | dict(normal=normal, imagining=imagining, details=details)


# ---------- 7. The algorithm ----------


def main(args):
    with Run(args) as run:
        check_args(args)
        envs, learns_belief = run.envs, imagines(args)
        steps = args.num_envs * envs.meta_horizon  # of an iteration: a meta-episode in every environment
        model = BeliefModel(args, envs).to(run.device)
        sizes = dict(task=run.truth()["task"].shape[1]) if args.oracle_context else dict(b=2 * args.policy_latent_dim)
        agent = Agent(args, envs.single_observation_space.shape[0], envs.single_action_space, sizes).to(run.device)
        if args.rl == "a2c":
            optimizer, update = A2COptimizer(agent, args.learning_rate), a2c_update
        else:
            optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-8, fused=True)
            update = ppo_update
        belief_optimizer = torch.optim.Adam(model.parameters(), lr=args.belief_learning_rate, fused=True)
        buffer = Buffer(share(args.buffer_size), envs)
        parts = dict(agent=agent, model=model, optimizer=optimizer, belief_optimizer=belief_optimizer)
        rows = max(1, args.total_timesteps // steps) * (args.num_envs - args.num_mixture_workers) * learns_belief
        rows = min(args.buffer_size, rows)
        run.keep(**parts, own=dict(buffer=buffer), room=rows * buffer.row_bytes)
        run.compile(agent, "act", "forward")
        run.compile(agent.encoder, "step", "belief")
        run.compile(model, "step")

        def play(envs, tasks, deterministic):
            return rollout(envs, agent, model, args, tasks, deterministic)

        for _ in run.iterations(args.total_timesteps // steps, steps):
            left = run.left()  # share of the training that is to come: from 1 down
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * (left if args.anneal_lr else 1)
            belief_optimizer.param_groups[0]["lr"] = args.belief_learning_rate * (left if args.belief_anneal_lr else 1)
            ent_coef = args.ent_coef_end + (args.ent_coef - args.ent_coef_end) * left

            # 3.4: a meta-episode in new tasks, with new roles and mixture weights
            mixture = draw_mixture(args, envs.num_envs, run.device) if learns_belief else None
            data = rollout(envs, agent, model, args, mixture=mixture)
            run.global_step += steps
            played = dict(observation=data["obs"], next_observation=data["next_obs"], reward=data["true_rewards"])
            check_steps(**played, imaginary_reward=data["rewards"])
            run.lap("rollout")

            with torch.no_grad():  # log-probabilities and values of the policy that played
                data["logprobs"], _, values = agent(data["obs"], data["beliefs"][:-1], data["actions"])
                last = agent.value(data["next_obs"][-1], data["beliefs"][-1])
            data["values"] = torch.cat([values, last[None]])
            rewards, alive = data["rewards"], data["alive"]
            if args.norm_reward:
                normalise_rewards(data["true_rewards"], alive, agent.return_norm, args)  # true ones alone
                rewards = (rewards / agent.return_norm.std).clamp(-10, 10)
            data["advantages"], data["returns"] = gae(rewards, data["values"], data["terminated"], alive, args)
            losses, policy = {}, None
            if run.global_step > max(steps, args.precollect):  # may run beside the belief's updates: draws nothing
                windows, epochs = alive.shape[1] * args.ppo_windows, args.update_epochs * (update is ppo_update)
                data["orders"] = [torch.randperm(windows, device=run.device) for _ in range(epochs)]
                policy = run.beside(update, agent, optimizer, data, ent_coef, args)
            run.lap("ppo")

            if learns_belief:
                if args.standardise_inputs:
                    model.obs_norm.update(data["next_obs"].flatten(0, 1), alive.flatten())
                    model.change_norm.update((data["next_obs"] - data["obs"]).flatten(0, 1), alive.flatten())
                    model.reward_norm.update(data["true_rewards"].view(-1, 1), alive.flatten())
                kept = data["normal"]  # nothing imagined
                if args.buffer_add < 1 and buffer.full:
                    kept = kept[torch.rand(len(kept), device=run.device) < args.buffer_add]
                buffer.add({name: data[name][:, kept] for name in buffer.NAMES})
                for _ in range(args.belief_updates if run.global_step >= args.precollect else 0):
                    terms = update_belief(model, belief_optimizer, buffer, args)
                    losses |= {f"belief_{name}": term for name, term in terms.items()}
            run.lap("belief")
            losses = (policy.result() if policy else {}) | losses
            # The policy's normalisers move here, so that a rollout and its update see the same inputs.
            agent.obs_norm.update(data["obs"].flatten(0, 1), alive.flatten())
            agent.first_norm.update(data["first_obs"], torch.ones_like(alive[0]))
            if args.standardise_inputs and agent.encoder:
                agent.encoder.obs_norm.update(data["next_obs"].flatten(0, 1), alive.flatten())
                agent.encoder.reward_norm.update(data["true_rewards"].view(-1, 1), alive.flatten())
            run.lap("ppo")

            more = {}
            if run.logs() and learns_belief and model.grid and run.eval_envs:
                more = probe_imagination(model, data["mixed"][data["imagining"]], run.eval_envs["test"])
            run.log(losses, data, more)
            if run.due(args.eval_interval):
                run.evaluate(play)
            if run.stopped() or run.due(args.checkpoint_interval):
                run.save()
        run.finish(play, partial(draw_pictures, agent, model, args))


# ---------- 8. What is imagined, and pictures ----------


def imagined_rewards(model, m, draws):
    """Grids: what a mixture worker with m (M, Z) is paid in each cell, dropout on as for it, in the mean over `draws`
    of dropout: (M, cells)."""
    mode = model.training
    model.train()
    with torch.no_grad(), torch.random.fork_rng([m.device] if m.is_cuda else []):  # training's draws stay what they are
        rewards = expected_reward(model.cell_logits(m.repeat(draws, 1)[None])[0]).unflatten(0, (draws, -1)).mean(0)
    model.train(mode)
    return rewards


def probe_imagination(model, m, test_envs):
    """Grids: the tasks that mixtures m (M, Z) stand for, as workers are paid. Training does not see the test goals.

    Returns a dict: the share whose best cell is a test goal, and the largest rewards, of all cells and of test goals,
    of one draw of dropout and of the mean over 100.
    """
    goals = test_envs.cell(test_envs.task_table.to(m.device))
    found = {}
    for draws, prefix in ((1, "one_draw/"), (100, "")):
        rewards = imagined_rewards(model, m, draws)
        values = dict(
            best_cell_is_a_test_goal=torch.isin(rewards.argmax(1), goals).float(),
            largest_reward=rewards.amax(1),
            largest_reward_of_a_test_goal=rewards[:, goals].amax(1),
        )
        found |= {f"imagination/{prefix}{name}": value.mean().item() for name, value in values.items()}
    return found


def draw_pictures(agent, model, args, run, details):
    """Grid worlds: the return of every goal (Figure 6), imagined tasks (Figure 4) and, for three goals, where the
    decoder thinks the goal is, step by step, with the agent's path (Figure 8a)."""
    envs = run.eval_envs["test"]
    if hasattr(envs, "cell"):
        draw_returns(run.folder / "returns.png", run.eval_envs, details)
    if not model.grid or not imagines(args):
        return
    names = [envs.tasks[i * len(envs.tasks) // envs.num_envs] for i in range(envs.num_envs)]
    train_envs = run.make_envs(run.envs.split, args.num_envs)
    with run.evaluating(), torch.no_grad():
        data = rollout(envs, agent, model, args, names, deterministic=True)
        played = rollout(train_envs, agent, model, args)
        hiddens = model.hiddens(data)  # (T + 1, N, D)
        # p(r = 1) in each cell under the belief (T + 1, N, cells)
        maps = sum(model.cell_logits(model.sample(hiddens)).sigmoid() for _ in range(30)) / 30
        last = model.hiddens(played)[-1]  # (N, D)
        mixtures = [draw_mixture(args, args.num_envs, envs.device) for _ in range(5)]
        alpha = torch.stack([alpha[imagining][0] for _, imagining, alpha in mixtures])  # of one worker each: (5, N, .)
        m = (alpha * model.sample(last)).sum(1)  # (1): (5, Z)
        rows = {"mean reward over 100 draws": 100, "reward, one draw": 1}
        paid = {name: imagined_rewards(model, m, draws).cpu().numpy() for name, draws in rows.items()}  # (5, cells)
        weights = torch.zeros(5, maps.shape[-1], device=m.device).index_add(
            1, envs.cell(played["task"]), alpha.mean(-1)
        )
    draw_mixed_tasks(run.folder / "imagined.png", weights.cpu().numpy(), paid, train_envs)
    for n in range(0, len(names), math.ceil(len(names) / 3)):
        column = {name: data[name][:, n].cpu().numpy() for name in ("obs", "next_obs", "success")}
        file = run.folder / f"belief_{names[n].replace('/', '_').replace(',', '_')}.png"
        draw_grid_belief(file, names[n], column, data["task"][n].cpu().numpy(), maps[:, n].cpu().numpy(), args.horizon)


# ---------- 9. Presets ----------

# The authors' hyper-parameters, from the configurations of their code; Args' defaults are those of GridWorldLDM.
LOCOMOTION = dict(  # an iteration is a meta-episode of 400 steps, theirs 200: here twice the minibatches and updates
    total_timesteps=200_000_000, eval_interval=250, checkpoint_interval=250, rl="ppo", num_minibatches=8,
    belief_updates=4, ppo_windows=2, gamma=0.97, gae_lambda=0.9, ent_coef=0.01, ent_coef_end=0.01, norm_reward=True,
    policy_layers=(128,), policy_latent_dim=128, policy_state=True, belief_batch=10, buffer_size=10_000,
    action_embed=16, reward_embed=16, latent_dim=5, elbo_terms=50, decode_terms=50, reward_decoder="mlp",
    decode="shared", decoder_layers=(64, 32), decoder_dropout=0.5,
    kl_coef=50 / 401, standardise_inputs=True,
)  # fmt: skip
POINT = LOCOMOTION | dict(  # not one of the paper's
    total_timesteps=50_000_000, gamma=0.99, reward_decoder="mlp-next", ppo_windows=1, kl_coef=1.0
)
PRESETS = {
    "GridWorld": dict(total_timesteps=20_000_000, time_limit="terminal"),
    "GridWorldLDM": dict(time_limit="terminal"),
    "GridWorldExtrapolation": dict(time_limit="terminal", decoder_dropout=0.5),
    "SparsePointRobot": POINT,
    "HalfCheetahVel": LOCOMOTION | dict(
        total_timesteps=50_000_000, clip_coef=0.1, policy_state=False, belief_updates=2, num_mixture_workers=4
    ),
    "HalfCheetahDir": LOCOMOTION | dict(split_rule="varibad"),  # not one of the paper's: two tasks, to train and test
    "AntDir": LOCOMOTION | dict(buffer_add=0.8),
    "AntGoal": LOCOMOTION | dict(num_minibatches=2, policy_state=False, latent_dim=10, beta=2.0),
    "HopperMass": LOCOMOTION | dict(  # not one of the paper's
        total_timesteps=10_000_000, eval_interval=25, checkpoint_interval=25, eval_tasks=30, gamma=0.99, ppo_windows=4,
        latent_dim=10, kl_coef=50 / 1601,
    ),
    "module:factory": POINT,  # your own, and all others
}  # fmt: skip


if __name__ == "__main__":
    start(main, Args, PRESETS)
