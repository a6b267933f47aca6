"""VariBAD: Bayes-adaptive deep RL with a variational belief (Zintgraf et al., ICLR 2020; JMLR 22, 2021).

A recurrent encoder reads the history tau_:t of a meta-episode and keeps a Gaussian belief q(m | tau_:t) over a latent m
that stands for the unknown task. Decoders, trained with it, predict every reward (and, with --state-coef, state) of
the meta-episode, past and future, from each m_t: so the belief holds what there is to know about the task. The policy
sees the state and the belief, and PPO maximises the return of the whole meta-episode: exploration pays early.

Shapes: T steps of a meta-episode, N environments, B batch, S observation, A action, Z latent, D hidden; time-major.

    python varibad.py --env-id GridWorld            # every preset is a default: --help shows it
    python varibad.py --env-id ML10 --cuda

Equation (of the JMLR paper)                                     function
    belief q(m | tau_:t) = N(mu, sigma^2), its prior at t = 0    Encoder, BeliefModel.posterior
    reward and transition likelihoods p(r | m), p(s' | m)        Decoder, reconstruction
    ELBO_t: every m_t decodes the whole trajectory               elbo
    KL(q(m | tau_:t) || q(m | tau_:t-1)), KL(q(m) || N(0, I))    kl_gaussians, elbo
    policy pi(a | s, mu, sigma), PPO                             Agent, gae, ppo_update
    Algorithm: rollout, policy update, belief update             main, rollout, ppo_update, update_belief

Where this leaves the paper, and the authors' code
    An iteration is one meta-episode of every environment; a belief starts from the prior exactly there.
    After an episode's end the policy sees the next one's first state (theirs: the last one), encoder and decoders the
    true successor; they see a flag (theirs) with --extra-obs done, Meta-World's default.
    Terms of the ELBO are means (theirs: sums over posteriors and transitions, and of the KL over the batch, too).
    Credit flows between the episodes of a task; --time-limit episode cuts it, as they do off the grid.
    Off the grid the belief model's inputs are standardised, and its state decoder predicts s' - s, standardised.
    Ours, for small machines: --belief-warmup, --belief-anneal-lr, --obs-shift, and the sizes without --cuda.
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
from common.plot import draw_grid_belief, draw_returns
from common.processes import all_sum, check_steps, descend, ranks, share
from common.rollouts import obs_shift, outcomes, record_step, records
from common.run import Run, start

# ---------- 1. Arguments ----------


@dataclass
class PPO:
    """The policy and its update."""

    learning_rate: Above0 = 7e-4  # Adam's step size for actor and critic
    anneal_lr: bool = False  # let it fall linearly to 0
    gamma: Fraction = 0.95  # discount per step, over the whole meta-episode
    gae_lambda: Fraction = 0.95  # lambda of the generalised advantage estimate
    # task: the end of a meta-episode bootstraps from its last state; terminal: its value is 0 (variBAD's code, grid);
    # episode: no credit flows from one episode to the next (variBAD's code, elsewhere).
    time_limit: Literal["task", "terminal", "episode"] = "task"
    update_epochs: Count = 2  # passes over an iteration's steps
    num_minibatches: Count = 4  # gradient steps per pass
    clip_coef: Above0 = 0.05  # epsilon of the clipped ratio and value
    ent_coef: AtLeast0 = 0.01  # weight of the entropy bonus at the start
    ent_coef_end: AtLeast0 = 0.01  # and at the end: linear in between
    vf_coef: AtLeast0 = 0.5  # weight of the value loss
    value_loss: Literal["huber", "mse"] = "huber"  # huber: variBAD's code, clipped values; mse: 1/2 squared error
    max_grad_norm: AtLeast0 = 0.5  # clip of the norm of the policy's gradient; 0 = off
    norm_reward: bool = True  # divide the policy's rewards by the deviation of the discounted return, clip at 10
    policy_layers: Layers = (32,)  # hidden layers (tanh) of actor and critic
    obs_embed: Count = 16  # policy's embedding of the observation
    belief_embed: Count = 16  # policy's embedding of each part of the belief
    # Training moves the states of a meta-episode by a random constant, this times the deviation of first states: so
    # that the policy cannot tell the few training tasks apart by where things happen to stand (ours).
    obs_shift: AtLeast0 = 0.0
    actor_gain: Above0 = 1.0  # norm of the rows of a continuous policy's last layer at the start; small: small actions
    std_init: Above0 = 1.0  # deviation of a continuous action at the start
    std_min: Above0 = 0.01  # its lower bound, reached softly
    std_max: Above0 = 2.0  # its upper bound


@dataclass
class Belief:
    """The belief model and its update."""

    belief: bool = True  # off: zeros in its place, the floor that any claim of adaptation has to beat
    oracle_context: bool = False  # the true task in place of the belief: the ceiling
    belief_warmup: Count0 = 0  # steps for which the policy sees zeros while the belief model learns (ours)
    belief_learning_rate: Above0 = 1e-3  # Adam's step size for encoder and decoders
    belief_anneal_lr: bool = False  # let it fall linearly to 0, so that the belief settles (ours)
    belief_updates: Count0 = 3  # gradient steps per iteration
    belief_batch: Count = 25  # meta-episodes per gradient step (B)
    belief_max_grad_norm: AtLeast0 = 0.0  # clip of the gradient's norm, for each of encoder and decoders; 0 = off
    buffer_size: Count = 100_000  # meta-episodes kept for the belief model; as many as --num-envs: on-policy
    precollect: Count0 = 5_000  # steps before the first gradient step; the policy waits for the second iteration too
    action_embed: Count0 = 0  # embedding of the action in encoder and decoders; 0 = not an input
    state_embed: Count = 8  # embedding of the state
    reward_embed: Count = 8  # embedding of the reward (encoder)
    hidden_dim: Count = 64  # units of the encoder's GRU (D)
    latent_dim: Count = 5  # dimension of the latent (Z)
    tbptt: Count0 = 0  # steps of a window of truncated back-propagation through time; 0 = whole meta-episode
    elbo_terms: Count0 = 0  # posteriors drawn per meta-episode; 0 = all
    decode_terms: Count0 = 0  # transitions drawn per meta-episode; 0 = all
    # One Bernoulli per grid cell (multihead), or the squared error of the reward of (m, s, a, s') or of (m, s').
    reward_decoder: Literal["multihead", "mlp", "mlp-next"] = "multihead"
    decoder_layers: Layers = (32, 32)  # hidden layers (ReLU) of each decoder
    decoder_dropout: Dropout = 0.0  # dropout on the decoders' embeddings of s, a, s'
    reward_coef: AtLeast0 = 1.0  # weight of the reward's reconstruction
    state_coef: AtLeast0 = 0.0  # weight of the state's reconstruction; 0 = no state decoder
    standardise_inputs: bool = True  # standardise what encoder and decoders read and, of states, predict (ours)


@dataclass
class VariBAD:
    """The paper's KL."""

    # Weight of the KL. Every term of the ELBO is a mean here (over B, posteriors, transitions), so this is the authors'
    # effective weight (theirs times their batch, over which they sum) over the number of decoded transitions.
    kl_coef: AtLeast0 = 0.25 / 60
    kl_to_prior: bool = False  # KL of each posterior to N(0, I) (authors' option), not to the posterior before (paper)


@dataclass
class Args(VariBAD, Belief, PPO, Experiment):
    env_id: str = "GridWorld"


def check_args(args):
    """BadInput for arguments that do not fit each other."""
    steps = args.num_envs // ranks() * args.horizon * args.episodes_per_task
    refuse(
        (steps % args.num_minibatches, f"--num-minibatches {args.num_minibatches} does not divide {steps} steps"),
        (
            args.belief and is_blind(args.total_timesteps - 1, args),
            f"--belief-warmup {args.belief_warmup} takes all of --total-timesteps {args.total_timesteps}: choose 0",
        ),
    )


def is_blind(step, args):
    """Whether the policy sees zeros in place of the belief at this global step."""
    return not args.belief or (step < args.belief_warmup and not args.oracle_context)


# ---------- 2. Networks ----------


class Agent(nn.Module):
    """Actor and critic on the normalised, embedded observation and belief: pi(a | s, b) and V(s, b).

    The belief has named parts, `belief_sizes`: name -> size, each with an embedding of its own.
    """

    def __init__(self, args, obs_dim, action_space, belief_sizes):
        super().__init__()
        self.belief_sizes, self.discrete = belief_sizes, hasattr(action_space, "n")
        n_out = int(action_space.n) if self.discrete else action_space.shape[0]
        self.std = None if self.discrete else BoundedStd(n_out, args.std_init, args.std_min, args.std_max)
        # Not less than a belief's least deviation: entries that say nothing, of a latent or a task, stay small.
        self.obs_norm, self.belief_norm = RunningNorm(obs_dim), RunningNorm(sum(belief_sizes.values()), min_std=0.02)
        self.return_norm, self.first_norm = RunningNorm(1), RunningNorm(obs_dim)
        self.obs_embed = nn.Linear(obs_dim, args.obs_embed)
        self.belief_embeds = nn.ModuleDict({k: nn.Linear(size, args.belief_embed) for k, size in belief_sizes.items()})
        sizes = [args.obs_embed + args.belief_embed * len(belief_sizes), *args.policy_layers]
        self.actor, self.critic = mlp([*sizes, n_out], nn.Tanh), mlp([*sizes, 1], nn.Tanh)
        for net in (self.actor, self.critic):
            for layer in net[:-1:2]:
                normc_(layer, 5 / 3)
        if self.discrete:
            nn.init.orthogonal_(self.actor[-1].weight, 0.01)
            nn.init.zeros_(self.actor[-1].bias)
        else:
            normc_(self.actor[-1], args.actor_gain)

    def named(self, belief):
        """A belief (..., sum of the sizes) -> its parts by name."""
        return dict(zip(self.belief_sizes, belief.split([*self.belief_sizes.values()], -1)))

    def embed(self, obs, belief):
        parts = self.named(self.belief_norm(belief))
        embedded = [self.obs_embed(self.obs_norm(obs))] + [self.belief_embeds[name](x) for name, x in parts.items()]
        return torch.cat(embedded, -1).tanh()

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
        (first, *others), Z = self.net, m.shape[-1]
        hidden = F.linear(m, first.weight[:, :Z])[:, None] + F.linear(x, first.weight[:, Z:], first.bias)
        for layer in others:
            hidden = layer(hidden)
        return hidden


# ---------- 3. Belief model: what this paper changes ----------


class BeliefModel(nn.Module):
    """Encoder, the posterior's heads and the decoders."""

    def __init__(self, args, envs):
        super().__init__()
        S, space = envs.single_observation_space.shape[0], envs.single_action_space
        self.discrete = hasattr(space, "n")
        A = int(space.n) if self.discrete else space.shape[0]
        self.cell = getattr(envs, "cell", None)
        self.encoder = Encoder(args, S, A)
        self.heads = nn.Linear(args.hidden_dim, 2 * args.latent_dim)  # mean and log-variance
        if args.reward_decoder == "multihead":
            needs = f"--reward-decoder multihead needs a grid of one goal, not {args.env_id}: choose mlp"
            refuse((self.cell is None, needs))
            # m (..., Z) -> the logits of p(r = 1 | m, s') for every cell s' (..., cells)
            self.reward_decoder = mlp([args.latent_dim, *args.decoder_layers, envs.num_cells], nn.ReLU)
        else:
            inputs = ("next_obs",) if args.reward_decoder == "mlp-next" else ("obs", "action", "next_obs")
            self.reward_decoder = Decoder(args, S, A, 1, inputs)
        self.state_decoder = Decoder(args, S, A, S, ("obs", "action")) if args.state_coef else None
        norm = RunningNorm if args.standardise_inputs else nn.Identity
        self.obs_norm, self.reward_norm = norm(S, min_std=0.02), norm(1, min_std=0.02)
        self.change_norm = norm(S, min_std=0.001)
        if self.discrete:
            self.register_buffer("one_hot", torch.eye(A), persistent=False)
        elif np.isfinite(space.low).all() and np.isfinite(space.high).all():
            self.register_buffer("low", torch.as_tensor(space.low))
            self.register_buffer("high", torch.as_tensor(space.high))
        self.belief_sizes = dict(m=2 * args.latent_dim)  # what the policy sees: mean and log-variance

    def parts(self):
        """The modules whose gradients are clipped one by one."""
        encoder = nn.ModuleList([self.encoder, self.heads])
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
        """q(m | tau_:t): hidden (..., D) -> mean, logvar (..., Z). The prior of a meta-episode is that of hidden 0."""
        return self.heads(hidden).chunk(2, -1)

    def belief(self, hidden):
        """What the policy sees, the parts of `belief_sizes` side by side: hidden (N, D) -> (N, 2 Z)."""
        return self.heads(hidden)


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
        weight = (alive & real[:, None]).float()  # (E, D, B)
        weight = weight / all_sum(weight.sum()).clamp(min=1)
    if args.reward_decoder == "multihead":
        reward_loss = multihead_loss(model.reward_decoder(m), real, batch, model.cell)
    else:
        error = (model.reward_decoder(m, *x).squeeze(-1) - reward).square()
        reward_loss = (error * weight).sum()
    if model.state_decoder:  # predicts the change of state, standardised, so that its weight means the same everywhere
        error = (model.state_decoder(m, *x) - model.change_norm(next_obs - obs)).square().mean(-1)
        state_loss = (error * weight).sum()
    return reward_loss, state_loss


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


# ---------- 4. PPO ----------


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

    data: obs (T, N, S), beliefs (T + 1, N, .), actions (T, N, .), logprobs, values, advantages, returns, alive (T, N),
    orders: permutations of all steps, one for each epoch.
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
    for order in data["orders"]:
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


# ---------- 5. Buffer and rollout ----------


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


def rollout(envs, agent, model, args, blind=False, tasks=None, deterministic=False):
    """One meta-episode in every environment, from a reset and the belief before any step; blind: zeros in its place.

    Returns what `records` and `outcomes` name, beliefs (T + 1, N, .), first_obs (N, S), task (N, G), and details: what
    an evaluation keeps of each environment, its last belief by parts.
    """
    T, N, device = envs.meta_horizon, envs.num_envs, envs.device
    beliefs = torch.zeros(T + 1, N, sum(agent.belief_sizes.values()), device=device)
    data = records(envs) | dict(beliefs=beliefs)
    with torch.inference_mode():  # beliefs are data for PPO: no gradient of its flows into encoder and heads
        obs, info = envs.reset(tasks)
        data["first_obs"], data["task"] = obs.clone(), info["task"].clone()
        shift = obs_shift(args, agent, obs)
        obs = obs + shift
        hidden = torch.zeros(N, args.hidden_dim, device=device)
        for t in range(T + 1):
            if args.oracle_context:
                belief = data["task"]
            elif blind:
                belief = data["beliefs"][0]  # zeros
            else:
                belief = model.belief(hidden)
            data["beliefs"][t] = belief
            if t == T:
                break
            action = agent.act(obs, belief, deterministic)
            obs, _ = record_step(envs, data, t, obs, action, shift)
            if not (args.oracle_context or blind):  # the belief goes on over the episodes of the task
                hidden = model.step(action, data["next_obs"][t], data["rewards"][t], hidden)
    details = {f"belief_{name}": part for name, part in agent.named(data["beliefs"][-1]).items()}
    return data | outcomes(data, envs) | dict(details=details)


# ---------- 6. The algorithm ----------


def main(args):
    with Run(args) as run:
        check_args(args)
        envs, learns_belief = run.envs, args.belief and not args.oracle_context
        steps = args.num_envs * envs.meta_horizon  # of an iteration: a meta-episode in every environment
        model = BeliefModel(args, envs).to(run.device)
        sizes = dict(task=run.truth()["task"].shape[1]) if args.oracle_context else model.belief_sizes
        agent = Agent(args, envs.single_observation_space.shape[0], envs.single_action_space, sizes).to(run.device)
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-8, fused=True)
        belief_optimizer = torch.optim.Adam(model.parameters(), lr=args.belief_learning_rate, fused=True)
        buffer = Buffer(share(args.buffer_size), envs)
        parts = dict(agent=agent, model=model, optimizer=optimizer, belief_optimizer=belief_optimizer)
        run.keep(**parts, own=dict(buffer=buffer), room=run.rows() * buffer.row_bytes * learns_belief)
        run.compile(agent, "act", "forward")
        run.compile(model, "step", "belief")

        def play(envs, tasks, deterministic):
            return rollout(envs, agent, model, args, is_blind(run.global_step, args), tasks, deterministic)

        for _ in run.iterations(args.total_timesteps // steps, steps):
            left = run.left()  # share of the training that is to come: from 1 down
            optimizer.param_groups[0]["lr"] = args.learning_rate * (left if args.anneal_lr else 1)
            belief_optimizer.param_groups[0]["lr"] = args.belief_learning_rate * (left if args.belief_anneal_lr else 1)
            ent_coef = args.ent_coef_end + (args.ent_coef - args.ent_coef_end) * left

            blind = is_blind(run.global_step, args)
            data = rollout(envs, agent, model, args, blind)
            run.global_step += steps
            check_steps(observation=data["obs"], next_observation=data["next_obs"], reward=data["rewards"])
            run.lap("rollout")

            with torch.no_grad():  # log-probabilities and values of the policy that played
                data["logprobs"], _, values = agent(data["obs"], data["beliefs"][:-1], data["actions"])
                last = agent.value(data["next_obs"][-1], data["beliefs"][-1])
            data["values"] = torch.cat([values, last[None]])
            rewards, alive = data["rewards"], data["alive"]
            if args.norm_reward:
                rewards = normalise_rewards(rewards, alive, agent.return_norm, args)
            data["advantages"], data["returns"] = gae(rewards, data["values"], data["terminated"], alive, args)
            losses, policy = {}, None
            if run.global_step > max(steps, args.precollect):  # may run beside the belief's updates: draws nothing
                data["orders"] = [torch.randperm(alive.numel(), device=run.device) for _ in range(args.update_epochs)]
                policy = run.beside(ppo_update, agent, optimizer, data, ent_coef, args)
            run.lap("ppo")

            if learns_belief:
                if args.standardise_inputs:  # each update moves them less
                    model.obs_norm.update(data["next_obs"].flatten(0, 1), alive.flatten())
                    model.change_norm.update((data["next_obs"] - data["obs"]).flatten(0, 1), alive.flatten())
                    model.reward_norm.update(data["rewards"].view(-1, 1), alive.flatten())
                buffer.add(data)
                for _ in range(args.belief_updates if run.global_step >= args.precollect else 0):
                    terms = update_belief(model, belief_optimizer, buffer, args)
                    losses |= {f"belief_{name}": term for name, term in terms.items()}
            run.lap("belief")
            losses = (policy.result() if policy else {}) | losses
            # The policy's normalisers move here, so that a rollout and its update see the same inputs.
            agent.obs_norm.update(data["obs"].flatten(0, 1), alive.flatten())
            agent.first_norm.update(data["first_obs"], torch.ones_like(alive[0]))
            if not blind:
                agent.belief_norm.update(data["beliefs"][:-1].flatten(0, 1), alive.flatten())
            run.lap("ppo")

            run.log(losses, data)
            if run.due(args.eval_interval):
                run.evaluate(play)
            if run.stopped() or run.due(args.checkpoint_interval):
                run.save()
        run.finish(play, partial(draw_pictures, agent, model, args))


# ---------- 7. Pictures ----------


def draw_pictures(agent, model, args, run, details):
    """Grid worlds: the return of every goal and, for three goals, where the decoder thinks the goal is, step by step,
    with the agent's path."""
    envs = run.eval_envs["test"]
    if hasattr(envs, "cell"):
        draw_returns(run.folder / "returns.png", run.eval_envs, details)
    if args.reward_decoder != "multihead" or args.oracle_context or not args.belief:
        return
    names = [envs.tasks[i * len(envs.tasks) // envs.num_envs] for i in range(envs.num_envs)]
    with run.evaluating():
        data = rollout(envs, agent, model, args, False, names, deterministic=True)
    with torch.no_grad():
        mean, logvar = agent.named(data["beliefs"])["m"].chunk(2, -1)  # (T + 1, N, Z)
        samples = mean + (0.5 * logvar).exp() * torch.randn(100, *mean.shape, device=mean.device)
        maps = model.reward_decoder(samples).sigmoid().mean(0)  # p(r = 1) under the belief (T + 1, N, cells)
    for n in range(0, len(names), math.ceil(len(names) / 3)):
        column = {name: data[name][:, n].cpu().numpy() for name in ("obs", "next_obs", "success")}
        file = run.folder / f"belief_{names[n].replace('/', '_').replace(',', '_')}.png"
        draw_grid_belief(file, names[n], column, data["task"][n].cpu().numpy(), maps[:, n].cpu().numpy(), args.horizon)


# ---------- 8. Presets ----------

# The authors' hyper-parameters for the grid and the point; for Meta-World, which they did not run, those of SDVT's
# variBAD (Lee et al., 2023), with three episodes per task as in DME, and one meta-episode per iteration.
META_WORLD = dict(
    extra_obs="done", num_envs=10, total_timesteps=250_000_000, eval_interval=650, checkpoint_interval=10, gamma=0.99,
    gae_lambda=0.9, update_epochs=5, num_minibatches=3, clip_coef=0.1, ent_coef=0.001, ent_coef_end=0.001,
    policy_layers=(256, 256), obs_embed=64, belief_embed=64, std_min=0.5, std_max=1.5, belief_batch=10,
    belief_max_grad_norm=1.0, buffer_size=1000, action_embed=16, state_embed=32, reward_embed=16, hidden_dim=256,
    tbptt=50, elbo_terms=100, decode_terms=100, reward_decoder="mlp", decoder_layers=(64, 64, 32), reward_coef=10.0,
    state_coef=10.0, kl_coef=1.0,
)  # fmt: skip
# Its policy waits for a belief that has settled, which takes many updates (ours).
ML1 = META_WORLD | dict(
    total_timesteps=50_000_000, eval_interval=100, belief_warmup=1_500_000, belief_anneal_lr=True, belief_updates=30
)
LOCOMOTION = dict(  # theirs, too; per meta-episode of 400 steps, where they count by 200, 400 or 800
    total_timesteps=100_000_000, eval_interval=25, checkpoint_interval=25, gamma=0.97, gae_lambda=0.9,
    num_minibatches=8, clip_coef=0.1, policy_layers=(128, 128), obs_embed=64, belief_embed=64, belief_updates=1,
    belief_batch=10, belief_max_grad_norm=1.0, buffer_size=10_000, action_embed=16, state_embed=32, reward_embed=16,
    hidden_dim=128, tbptt=50, elbo_terms=50, decode_terms=50, reward_decoder="mlp", decoder_layers=(64, 32),
    kl_coef=1 / 50,
)  # fmt: skip
SESSIONS = dict(  # PPO's values and Z from Table 2 of DynaMITE-RL, for its variBAD too; what it does not print is ours
    total_timesteps=100_000_000, num_envs=2048, eval_interval=10, checkpoint_interval=10, learning_rate=3e-4,
    gamma=0.99, time_limit="terminal", update_epochs=4, clip_coef=0.2, ent_coef=0.05, ent_coef_end=0.05,
    policy_layers=(128, 128), obs_embed=64, belief_embed=64, belief_learning_rate=3e-4, belief_max_grad_norm=2.0,
    buffer_size=10_000, precollect=10_000, action_embed=32, state_embed=32, reward_embed=32, hidden_dim=128,
    latent_dim=16, tbptt=50, elbo_terms=50, decode_terms=50, reward_decoder="mlp", kl_coef=0.01 / 400,
    belief_updates=512,
)  # fmt: skip
# The authors keep the entropy's weight at 0.01; falling from 0.04, no seed stops searching too early.
GRID = dict(time_limit="terminal", standardise_inputs=False, ent_coef=0.04)
LARGE_GRID = GRID | dict(total_timesteps=100_000_000, state_embed=32, hidden_dim=128, latent_dim=32, kl_coef=1 / 120)
POINT = dict(
    total_timesteps=50_000_000, eval_interval=25, checkpoint_interval=25, gamma=0.99, gae_lambda=0.9,
    num_minibatches=8, clip_coef=0.1, ent_coef=0.001, ent_coef_end=0.001, policy_layers=(128, 128, 128), obs_embed=64,
    belief_embed=64, belief_batch=15, buffer_size=10_000, action_embed=16, state_embed=32, reward_embed=16,
    hidden_dim=128, reward_decoder="mlp-next", decoder_layers=(64, 32), kl_coef=15 / 300,
)  # fmt: skip
PRESETS = {
    "GridWorld": GRID,
    **dict.fromkeys(("GridWorldLDM", "GridWorldExtrapolation"), LARGE_GRID),  # 7x7; networks as large as LDM's
    "SparsePointRobot": POINT,
    # LaSER's variBAD (its F.3 and Table 8); weight of the KL and end of a task are ours. The reward follows from
    # s, a, s' in all tasks: a reward decoder alone, as there, teaches the belief nothing; --state-coef 1 (ours) does.
    **dict.fromkeys(("MEWA", "MEWAUniform"), POINT | dict(
        total_timesteps=7_520_000, eval_interval=100, checkpoint_interval=100, learning_rate=1e-4,
        time_limit="terminal", update_epochs=4, num_minibatches=2, clip_coef=0.2, ent_coef=0.01, ent_coef_end=0.01,
        reward_decoder="mlp", kl_coef=15 / 200,
    )),
    "HalfCheetahVel": LOCOMOTION,
    "HalfCheetahDir": LOCOMOTION | dict(update_epochs=16, num_minibatches=2),
    "AntDir": LOCOMOTION | dict(num_minibatches=2, belief_updates=2),
    "AntGoal": LOCOMOTION | dict(
        num_minibatches=2, clip_coef=0.05, learning_rate=1e-3, anneal_lr=True, belief_updates=10, latent_dim=10,
        tbptt=0, elbo_terms=0, decode_terms=0, kl_coef=1 / 400,
    ),
    # Sizes and step sizes of the LaSER paper's variBAD (its appendix F), PPO of its Table 8; the KL's weight is ours.
    # An iteration there is 200 steps of each environment, here all 1600, of which those after a fall count for nothing.
    "HopperMass": LOCOMOTION | dict(
        total_timesteps=10_000_000, eval_tasks=30, learning_rate=6e-5, gamma=0.99, update_epochs=4, clip_coef=0.2,
        policy_layers=(256, 256, 128), belief_batch=15, belief_updates=3, latent_dim=10, elbo_terms=100,
        decode_terms=100, kl_coef=1.5 / 100,
    ),
    "GridWorldAlternating": SESSIONS | dict(  # as dynamite_rl.py's
        total_timesteps=10_000_000, num_envs=128, eval_interval=250, checkpoint_interval=250, learning_rate=1e-3,
        anneal_lr=True, time_limit="task", num_minibatches=8, ent_coef=0.03, ent_coef_end=0.01,
        belief_learning_rate=1e-3, belief_anneal_lr=True, belief_updates=6, buffer_size=100_000, action_embed=8,
        state_embed=8, reward_embed=8, hidden_dim=64, latent_dim=5, tbptt=0, elbo_terms=0, decode_terms=0,
        reward_decoder="mlp-next", kl_coef=0.03 / 60, standardise_inputs=False,
    ),
    "Reacher": SESSIONS | dict(actor_gain=0.01),
    **dict.fromkeys(("HalfCheetahDirSessions", "HalfCheetahVelSessions"), SESSIONS),
    "HalfCheetahWindVelSessions": SESSIONS | dict(state_coef=1.0),
    "ScratchItch": SESSIONS | dict(
        num_envs=32, eval_interval=100, checkpoint_interval=100, gamma=0.95, num_minibatches=16, ent_coef=0.0,
        ent_coef_end=0.0, actor_gain=0.01, std_init=0.5, belief_updates=4, kl_coef=0.01 / 200,
    ),
    "ML1": ML1,
    **dict.fromkeys(("ML1-reach", "ML1-reach-wall"), ML1 | dict(obs_shift=2.0)),  # an object stands about, not the goal
    "ML10": META_WORLD,
    "ML45": META_WORLD | dict(total_timesteps=400_000_000, eval_interval=3300, latent_dim=10, belief_updates=6),
    "module:factory": POINT,  # your own
}  # fmt: skip

# What fits a machine without a GPU, laid over the preset unless --cuda; ours.
SMALL_ML = dict(
    num_envs=20, horizon=200, num_minibatches=12, learning_rate=2.5e-4, clip_coef=0.2, std_init=0.7, std_min=0.2,
    eval_interval=50, eval_tasks=10, belief_warmup=900_000, belief_updates=15, hidden_dim=128, elbo_terms=25,
    decode_terms=50,
)  # fmt: skip
SMALL_ML1 = SMALL_ML | dict(  # its tasks differ in goals: no state decoder
    num_envs=40, horizon=150, episodes_per_task=2, num_minibatches=8, eval_tasks=0, eval_interval=20, state_coef=0.0,
    belief_updates=30, belief_batch=20, belief_learning_rate=2e-3, hidden_dim=64, elbo_terms=8, decode_terms=150,
)  # fmt: skip
SMALL_SESSIONS = dict(  # as dynamite_rl.py's
    total_timesteps=5_000_000, num_envs=32, eval_interval=40, checkpoint_interval=40, gamma=0.95, num_minibatches=16,
    ent_coef=0.01, ent_coef_end=0.0, std_init=0.5, belief_learning_rate=1e-3, belief_anneal_lr=True, belief_updates=8,
    buffer_size=2000, kl_coef=0.001 / 400,
)  # fmt: skip
SMALL = {
    **dict.fromkeys(
        ("SparsePointRobot", "MEWA", "MEWAUniform", "AntGoal"), dict(tbptt=50, elbo_terms=25, decode_terms=100)
    ),
    **dict.fromkeys(("HalfCheetahDirSessions", "HalfCheetahVelSessions", "HalfCheetahWindVelSessions"), SMALL_SESSIONS),
    "HopperMass": dict(buffer_size=2000),  # 0.36 GB
    "Reacher": SMALL_SESSIONS | dict(gamma=0.9),
    "ScratchItch": dict(total_timesteps=5_000_000, buffer_size=2000),  # as dynamite_rl.py's
    "GridWorldAlternating": dict(elbo_terms=20),
    "ML1": SMALL_ML1,
    "ML10": SMALL_ML,
    "ML45": SMALL_ML | dict(eval_interval=250),
}


if __name__ == "__main__":
    start(main, Args, PRESETS, SMALL)
