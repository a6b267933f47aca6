"""Dynamic Mixture Embeddings for contextual meta-RL (DME, anonymous authors, under review; no code was published).

VariBAD with another belief model, a hierarchical Gaussian-mixture VAE: a macro latent w ~ N(0, I), a cluster
y ~ Cat(1/C), a task embedding z ~ N(m(w, y), v(w, y)): the components move with w, so the prior adapts to the context.
One recurrent encoder gives Gaussian posteriors of w and z; that of y follows by Bayes' rule. The decoders see z alone,
the policy the posterior of z with w and y. Virtual tasks, drawn from the mixture, train it too.

Shapes: T steps of a meta-episode, N environments, B batch, S observation, A action, Z latent (z, and w), C components
(the paper's K), D hidden; time-major.

    python dme.py --env-id ML10                     # every preset is a default: --help shows it
    python dme.py --env-id ML10 --cuda              # with the sizes of the paper's nearest peer, SDVT

Equation (of the paper)                                          function
    (1), (2) q(w | c), q(z | c)                                  Encoder, BeliefModel.posterior
    p(z | w, y) = N(m(w, y), v(w, y))                            BeliefModel.components
    (3) q(y | w, z)                                              cluster_posterior
    (4), (5), (6) future states and rewards from z               Decoder, window, reconstruction
    (7), (8), (9), (10) the KL terms and the ELBO                kl_gaussians, elbo
    (11) virtual tasks                                           BeliefModel.virtual_tasks, decoded_reward
    b_t = (mu_z, sigma_z^2, w, y), what the policy sees          BeliefModel.belief, Agent
    (12) to (16) PPO                                             gae, ppo_update
    Algorithm 1                                                  main, rollout, update_belief

Where this leaves the paper
    It prints no hyper-parameters: with --cuda Meta-World has SDVT's (Lee et al., 2023), for three episodes in place of
    ten; the rest has variBAD's, with a weight of the reward and smaller sizes of ours.
    An iteration is one meta-episode of every environment. At an episode's end within it the policy sees the next one's
    first state, encoder and decoders the true successor; credit and belief go on. PPO comes before the belief's update.
    (4) decodes what is still to come after t transitions, as Algorithm 1 counts; all of the meta-episode's, not T's.
    Virtual tasks: --virtual policy (default, SDVT's): new meta-episodes are played under decoded rewards, and not
    stored; elbo (Algorithm 1): decoded rewards in L_reward alone; relabel (ours): for a batch's posterior, too.
    (9) is an expectation under q(y | w, z) (--hard-y); the policy sees log sigma_z^2 (--policy-z var) and probabilities
    of y (--policy-y argmax), and where it takes the most likely action means. (14) is --value-loss mse, not variBAD's.
    beta_w and beta_y are ours: at beta_w 1, KL_w goes to 0. The first belief is the heads' (--initial-belief prior).
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
import tyro
from torch import nn
from torch.distributions import Normal

from common.arguments import Above0, AtLeast0, Count, Count0, Dropout, Experiment, Fraction, Layers, refuse
from common.networks import GRU, BoundedStd, RunningNorm, mlp, normc_
from common.plot import draw_grid_belief, draw_mixture, draw_returns
from common.processes import all_sum, check_steps, descend, leads, ranks, share
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
    value_loss: Literal["huber", "mse"] = "huber"  # huber: variBAD's code, clipped values; mse: (14)
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
    latent_dim: Count = 5  # dimension of each of z and w (Z)
    tbptt: Count0 = 0  # steps of a window of truncated back-propagation through time; 0 = whole meta-episode
    elbo_terms: Count0 = 0  # posteriors drawn per meta-episode; 0 = all
    decode_terms: Count0 = 0  # transitions drawn per meta-episode; 0 = all
    # One Bernoulli per grid cell (multihead), or the squared error of the reward of (z, s, a, s') or of (z, s').
    reward_decoder: Literal["multihead", "mlp", "mlp-next"] = "multihead"
    decoder_layers: Layers = (32, 32)  # hidden layers (ReLU) of each decoder
    decoder_dropout: Dropout = 0.0  # dropout on the decoders' embeddings of s, a, s'
    reward_coef: AtLeast0 = 1.0  # weight of the reward's reconstruction
    state_coef: AtLeast0 = 0.0  # weight of the state's reconstruction; 0 = no state decoder
    standardise_inputs: bool = True  # standardise what encoder and decoders read and, of states, predict (ours)


@dataclass
class DME:
    """The paper prints no hyper-parameters: [paper] marks what its text says, the rest is ours or SDVT's."""

    # Transitions that z_t decodes: those to come (4), those to come in this episode (its T, read so), all (variBAD).
    decode_window: Literal["all", "future", "episode"] = "future"
    num_components: Count = 5  # components of the mixture (C)
    component_layers: Layers = (256,)  # hidden layers (ReLU) of the network from w to means and variances
    static_prior: bool = False  # ablation: components do not depend on w, as SDVT's; implies --no-policy-w: w is noise
    no_policy_w: tyro.conf.FlagCreatePairsOff[bool] = False  # ablation [paper, Figure 4]: the policy does not see w
    beta_w: AtLeast0 = 0.1  # weight of the KL of w (7); at 1 that KL goes to 0: w is dead
    chain_w: bool = False  # KL of w to the posterior before, as variBAD's, not to N(0, I) (7): old news is free (ours)
    beta_y: AtLeast0 = 0.05  # weight of the KL of y (8)
    beta_z: AtLeast0 = 1.0  # weight of the KL of z (9); each term of the ELBO is a mean over B, posteriors, transitions
    hard_y: bool = False  # (9) under the most probable y; default is its expectation under q(y | w, z)
    policy_y: Literal["argmax", "sample", "probs"] = "probs"  # y to the policy; argmax [paper: "hard partitions"]
    policy_w: Literal["sample", "mean"] = "sample"  # w to the policy in training, sample [paper, Algorithm 1]
    policy_z: Literal["logvar", "var"] = "logvar"  # scale of z to the policy; var [paper]
    # The belief at step 0: the heads on the encoder's zero state, or a draw from the prior [paper, Algorithm 1].
    initial_belief: Literal["heads", "prior"] = "heads"
    # Virtual tasks: whole meta-episodes with decoded rewards for the policy (SDVT; the paper's section 4.2), decoded
    # rewards in the ELBO's (6) alone [paper, Algorithm 1], both, or for a batch's encoder, too (relabel, ours).
    virtual: Literal["off", "policy", "elbo", "both", "relabel"] = "policy"
    virtual_y: Literal["uniform", "usage"] = "uniform"  # y: uniform [paper], or as often as in the run so far (SDVT)
    virtual_rate: Fraction = 0.125  # gamma, of iterations or batches: rises [paper], linearly, from 0, to this
    virtual_low: float = 0.0  # lower bound of virtual rewards: Meta-World's lie in [0, 10]
    virtual_high: float = 10.0  # their upper bound


@dataclass
class Args(DME, Belief, PPO, Experiment):
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
        (
            args.virtual_low >= args.virtual_high,
            f"--virtual-low {args.virtual_low} must lie below --virtual-high {args.virtual_high}",
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
    """Encoder, the posteriors' heads, the mixture and the decoders."""

    def __init__(self, args, envs):
        super().__init__()
        S, space = envs.single_observation_space.shape[0], envs.single_action_space
        self.discrete = hasattr(space, "n")
        A = int(space.n) if self.discrete else space.shape[0]
        self.cell = getattr(envs, "cell", None)
        self.encoder = Encoder(args, S, A)
        self.args = args
        self.heads = nn.Linear(args.hidden_dim, 4 * args.latent_dim)  # mean and log-variance of w, then of z
        out = 2 * args.num_components * args.latent_dim
        self.mixture = mlp([args.latent_dim, *args.component_layers, out], nn.ReLU)
        if args.reward_decoder == "multihead":
            needs = f"--reward-decoder multihead needs a grid of one goal, not {args.env_id}: choose mlp"
            refuse((self.cell is None, needs))
            # z (..., Z) -> the logits of p(r = 1 | z, s') for every cell s' (..., cells)
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
        self.usage = RunningNorm(args.num_components)  # its mean: of q(y) in training
        # What the policy sees: mean and scale of z, w (a sample, or its mean), and y.
        self.belief_sizes = dict(z=2 * args.latent_dim, w=args.latent_dim, y=args.num_components)
        if args.no_policy_w or args.static_prior:
            del self.belief_sizes["w"]

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
        """p(z | w, y) for each y: w (..., Z) -> mean and log-variance (..., C, Z)."""
        out = self.mixture(torch.zeros_like(w) if self.args.static_prior else w)
        mean, raw = out.unflatten(-1, (self.args.num_components, -1)).chunk(2, -1)
        return mean, (F.softplus(raw) + 1e-4).log()  # the floor keeps (3) from saturating

    def prior(self, n, usage=None):
        """n draws: w ~ N(0, I) (n, Z), one-hot y ~ Cat(usage, or 1 / C) (n, C), mean, logvar of p(z | w, y) (n, Z)."""
        w = torch.randn(n, self.args.latent_dim, device=self.heads.weight.device)
        mean, logvar = self.components(w)  # (n, C, Z)
        usage = mean.new_ones(mean.shape[1]) if usage is None else usage
        component = usage.multinomial(n, replacement=True)
        rows = torch.arange(n, device=w.device)
        return w, F.one_hot(component, mean.shape[1]).float(), mean[rows, component], logvar[rows, component]

    def virtual_tasks(self, n):
        """z of n tasks drawn from the prior, y by its usage, if so chosen: (n, Z)."""
        usage = self.usage.mean + 1e-6 if self.args.virtual_y == "usage" else None  # uniform before the first
        return gaussian(*self.prior(n, usage)[2:])

    def belief(self, hidden, deterministic=False):
        """What the policy sees, the parts of `belief_sizes` side by side: hidden (N, D) -> (N, .)."""
        w_mean, w_logvar, z_mean, z_logvar = self.posterior(hidden)
        w, z = (w_mean, z_mean) if deterministic else (gaussian(w_mean, w_logvar), gaussian(z_mean, z_logvar))
        y = cluster_posterior(z, *self.components(w)).exp()  # (N, C)
        if self.args.policy_y == "argmax" or (self.args.policy_y == "sample" and deterministic):
            y = F.one_hot(y.argmax(-1), y.shape[-1]).float()
        elif self.args.policy_y == "sample":  # as `Agent.act` draws actions
            y = F.one_hot((y / torch.empty_like(y).exponential_()).argmax(-1), y.shape[-1]).float()
        return self.join(w_mean if self.args.policy_w == "mean" else w, y, z_mean, z_logvar)

    def join(self, w, y, z_mean, z_logvar):
        z_scale = z_logvar if self.args.policy_z == "logvar" else z_logvar.exp()
        parts = dict(z=torch.cat([z_mean, z_scale], -1), w=w, y=y)
        return torch.cat([parts[name] for name in self.belief_sizes], -1)


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
    """(4): whether the posterior after t transitions decodes transition i (from 0); broadcasts t with i."""
    future = i >= t
    if args.decode_window == "all":
        return torch.ones_like(future)
    return future if args.decode_window == "future" else future & (i // args.horizon == t // args.horizon)


def reconstruction(model, z, t, real, batch, args):
    """(6), (5): -log p(r | s, a, s', z_t), -log p(s' | s, a, z_t), up to constants: means over the pairs of `window`.

    z (E, B, Z): samples of posteriors number t (E, B), which count where `real` (E, B). batch: transitions (T, B, .).
    """
    T, B = batch["rewards"].shape
    device = z.device
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
    if args.reward_decoder == "multihead":
        reward_loss = multihead_loss(model.reward_decoder(z), t, real, batch, model.cell, args)
    else:
        error = (model.reward_decoder(z, *x).squeeze(-1) - reward).square()
        reward_loss = (error * weight).sum()
    if model.state_decoder:  # predicts the change of state, standardised, so that its weight means the same everywhere
        error = (model.state_decoder(z, *x) - model.change_norm(next_obs - obs)).square().mean(-1)
        state_loss = (error * weight).sum()
    return reward_loss, state_loss


def multihead_loss(logits, t, real, batch, cell, args):
    """Binary cross-entropy of r = 1 in the cell of s', in the mean over the pairs of `window`.

    The logit of a cell is the same for each visit, so it is enough to count the visits with and without reward:
    logits (E, B, cells), t, real (E, B).
    """
    i = torch.arange(len(batch["rewards"]), device=t.device)[:, None]  # (T, 1)
    pairs = (window(t[:, None], i, args) & batch["alive"] & real[:, None]).float()  # (E, T, B)
    visits = F.one_hot(cell(batch["next_obs"]), logits.shape[-1]).float()  # (T, B, cells)
    hits = visits * (batch["rewards"] == 1).unsqueeze(-1)
    # Contiguous (E, B, cells), for the order in which the loss is added up.
    visits, hits = (torch.einsum("etb,tbc->ebc", pairs, x).contiguous() for x in (visits, hits))
    loss = visits * F.softplus(logits) - hits * logits  # = hits * softplus(-x) + (visits - hits) * softplus(x)
    return loss.sum() / all_sum(visits.sum()).clamp(min=1)


def elbo(model, batch, args, virtual=None):
    """The negative ELBO (10), its terms means over the batch, the posteriors t = 0..T and the transitions each decodes.

    batch: obs, next_obs (T, B, S), actions (T, B, .), rewards, alive (T, B). virtual (T, B): rewards for z to decode in
    place of the batch's (Algorithm 1). Returns the loss and a dict of its terms.
    """
    posterior = model.posterior(model.hiddens(batch, args.tbptt))  # (T + 1, B, Z) each
    real = torch.cat([torch.ones_like(batch["alive"][:1]), batch["alive"]])  # not after a step of an idle environment
    t = torch.arange(len(real), device=real.device)[:, None].expand_as(real)
    # (7) to N(0, I); chained, each posterior is the next one's prior, the first one's is N(0, I)
    before = [torch.cat([torch.zeros_like(x[:1]), x[:-1] * args.chain_w]) for x in posterior[:2]]
    kl_w = kl_gaussians(*posterior[:2], *before)
    w_mean, w_logvar, z_mean, z_logvar, kl_w, t, real = draw_posteriors(args, *posterior, kl_w, t, real)
    w, z = gaussian(w_mean, w_logvar), gaussian(z_mean, z_logvar)  # (E, B, Z)
    mean, logvar = model.components(w)  # (E, B, C, Z)
    log_y = cluster_posterior(z, mean, logvar)  # (E, B, C)
    y = log_y.exp()
    decoded = batch if virtual is None else batch | dict(rewards=virtual)
    reward_loss, state_loss = reconstruction(model, z, t, real, decoded, args)  # (6), (5)
    kl_w = average(kl_w, real)
    kl_y = average(math.log(args.num_components) + (y * log_y).sum(-1), real)  # (8)
    kl_z = kl_gaussians(z_mean.unsqueeze(-2), z_logvar.unsqueeze(-2), mean, logvar)  # to each component: (E, B, C)
    weight = F.one_hot(y.argmax(-1), args.num_components) if args.hard_y else y
    kl_z = average((weight * kl_z).sum(-1), real)  # (9)
    loss = args.state_coef * state_loss + args.reward_coef * reward_loss
    loss = loss + args.beta_w * kl_w + args.beta_y * kl_y + args.beta_z * kl_z  # (10)
    return loss, dict(loss=loss, reward=reward_loss, state=state_loss, kl_w=kl_w, kl_y=kl_y, kl_z=kl_z)


@torch.no_grad()
def signs_of_life(model, batch, draws=64):
    """Whether the mixture lives: scalars by name, over contexts, a batch's histories up to every (T / 8)-th step.

    y_information: I(y; context) in nats, 0 .. log C: entropy of y's usage less y_entropy, mean of q(y | context)'s, the
    mean of (3) over w and z, whose noise tells nothing. w_signal: deviation of w's mean over contexts / that of its
    posterior. movement: deviation of the components' means over contexts, w at its mean; spread: from each other.
    """
    every = max(1, len(batch["alive"]) // 8)
    real = torch.cat([torch.ones_like(batch["alive"][:1]), batch["alive"]])[::every]
    w_mean, w_logvar, z_mean, z_logvar = (x[real] for x in model.posterior(model.hiddens(batch)[::every]))  # (n, Z)
    noise = torch.randn(2, draws, 1, w_mean.shape[-1], device=w_mean.device)  # the same in all contexts: they may agree
    w, z = w_mean + (0.5 * w_logvar).exp() * noise[0], z_mean + (0.5 * z_logvar).exp() * noise[1]
    y = cluster_posterior(z, *model.components(w)).exp().mean(0)  # (n, C)
    means = model.components(w_mean)[0]  # (n, C, Z)
    y_entropy = torch.special.entr(y).sum(-1).mean()
    signs = dict(
        y_information=torch.special.entr(y.mean(0)).sum() - y_entropy,
        y_entropy=y_entropy,
        w_signal=(w_mean.std(0, correction=0) / (0.5 * w_logvar).exp().mean(0)).mean(),
        movement=means.std(0, correction=0).mean(),
        spread=means.std(1, correction=0).mean(),
    )
    return {f"mixture_{name}": sign / ranks() for name, sign in signs.items()}  # the mean over processes, once summed


def decoded_reward(model, z, obs, action, next_obs, args):
    """(11) The most likely reward under z: z (B, Z), obs, action, next_obs (T, B, .) -> (T, B). Dropout stays on."""
    if args.reward_decoder == "multihead":
        logits = model.reward_decoder(z[None]).expand(len(obs), -1, -1)  # (T, B, cells)
        hit = logits.gather(-1, model.cell(next_obs).unsqueeze(-1)).squeeze(-1) > 0
        return torch.where(hit, 1.0, args.virtual_low)
    x = model.obs_norm(obs), model.action_input(action), model.obs_norm(next_obs)
    return model.reward_decoder(z[None], *x)[0, ..., 0].clamp(args.virtual_low, args.virtual_high)


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


def update_belief(model, optimizer, buffer, virtual_rate, args):
    """One gradient step on a batch of stored meta-episodes. Returns the loss's terms, detached.

    With probability `virtual_rate` (gamma of Algorithm 1) rewards are decoded ones, of tasks drawn from the prior.
    """
    batch, virtual = buffer.sample(share(args.belief_batch)), None
    if args.virtual in ("elbo", "both", "relabel") and torch.rand(()) < virtual_rate:
        with torch.no_grad():
            z = model.virtual_tasks(share(args.belief_batch))
            virtual = decoded_reward(model, z, batch["obs"], batch["actions"], batch["next_obs"], args)
        if args.virtual == "relabel":  # the encoder sees them, too
            batch["rewards"] = virtual
    loss, terms = elbo(model, batch, args, virtual)
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


def rollout(envs, agent, model, args, blind=False, tasks=None, deterministic=False, virtual=False):
    """One meta-episode in every environment, from a reset and the belief before any step; blind: zeros in its place.

    virtual: with the rewards that the decoder gives under a task drawn from the prior for each environment (11).
    Returns what `records` and `outcomes` name, true_rewards (T, N), the environments' own, beliefs (T + 1, N, .),
    first_obs (N, S), task (N, G), and details: what an evaluation keeps of each environment, its last belief by parts.
    """
    T, N, device = envs.meta_horizon, envs.num_envs, envs.device
    beliefs = torch.zeros(T + 1, N, sum(agent.belief_sizes.values()), device=device)
    data = records(envs) | dict(beliefs=beliefs, true_rewards=torch.empty(T, N, device=device))
    with torch.inference_mode():  # beliefs are data for PPO: no gradient of its flows into encoder and heads
        obs, info = envs.reset(tasks)
        data["first_obs"], data["task"] = obs.clone(), info["task"].clone()
        shift = obs_shift(args, agent, obs)
        obs = obs + shift
        hidden = torch.zeros(N, args.hidden_dim, device=device)
        z_virtual = model.virtual_tasks(N) if virtual else None
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
            action = agent.act(obs, belief, deterministic)
            obs, _ = record_step(envs, data, t, obs, action, shift)
            data["true_rewards"][t] = data["rewards"][t]
            if virtual:
                x = data["obs"][t : t + 1], action[None], data["next_obs"][t : t + 1]
                data["rewards"][t] = decoded_reward(model, z_virtual, *x, args)[0]
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
            virtual_rate = args.virtual_rate * (1 - left)
            virtual = args.virtual in ("policy", "both") and learns_belief and not blind
            if virtual:  # the first process tosses the coin for all
                virtual = bool(all_sum(torch.rand((), device=run.device) * leads()) < virtual_rate)
            data = rollout(envs, agent, model, args, blind, virtual=virtual)
            run.global_step += steps
            played = dict(observation=data["obs"], next_observation=data["next_obs"], reward=data["true_rewards"])
            check_steps(**played, decoded_reward=data["rewards"])
            run.lap("rollout")

            with torch.no_grad():  # log-probabilities and values of the policy that played
                data["logprobs"], _, values = agent(data["obs"], data["beliefs"][:-1], data["actions"])
                last = agent.value(data["next_obs"][-1], data["beliefs"][-1])
            data["values"] = torch.cat([values, last[None]])
            rewards, alive = data["rewards"], data["alive"]
            if args.norm_reward:
                counted = alive & (not virtual)  # virtual rewards do not move the scale
                rewards = normalise_rewards(rewards, counted, agent.return_norm, args)
            data["advantages"], data["returns"] = gae(rewards, data["values"], data["terminated"], alive, args)
            losses, policy = {}, None
            if run.global_step > max(steps, args.precollect):  # may run beside the belief's updates: draws nothing
                data["orders"] = [torch.randperm(alive.numel(), device=run.device) for _ in range(args.update_epochs)]
                policy = run.beside(ppo_update, agent, optimizer, data, ent_coef, args)
            run.lap("ppo")

            if learns_belief:
                if args.standardise_inputs and not virtual:  # each update moves them less
                    model.obs_norm.update(data["next_obs"].flatten(0, 1), alive.flatten())
                    model.change_norm.update((data["next_obs"] - data["obs"]).flatten(0, 1), alive.flatten())
                    model.reward_norm.update(data["rewards"].view(-1, 1), alive.flatten())
                if not (virtual or blind):
                    model.usage.update(agent.named(data["beliefs"][:-1])["y"].flatten(0, 1), alive.flatten())
                if not virtual:  # the belief model learns from what the environments gave alone
                    buffer.add(data)
                for _ in range(args.belief_updates if run.global_step >= args.precollect else 0):
                    terms = update_belief(model, belief_optimizer, buffer, virtual_rate, args)
                    losses |= {f"belief_{name}": term for name, term in terms.items()}
                if run.logs():
                    with torch.random.fork_rng([run.device] if args.cuda else []):  # a look changes no draw
                        losses |= signs_of_life(model, buffer.sample(share(args.belief_batch)))
            run.lap("belief")
            losses = (policy.result() if policy else {}) | losses
            # The policy's normalisers move here, so that a rollout and its update see the same inputs.
            agent.obs_norm.update(data["obs"].flatten(0, 1), alive.flatten())
            agent.first_norm.update(data["first_obs"], torch.ones_like(alive[0]))
            if not blind:
                agent.belief_norm.update(data["beliefs"][:-1].flatten(0, 1), alive.flatten())
            run.lap("ppo")

            run.log(losses, data, {"charts/virtual": float(virtual)})
            if run.due(args.eval_interval):
                run.evaluate(play)
            if run.stopped() or run.due(args.checkpoint_interval):
                run.save()
        run.finish(play, partial(draw_pictures, agent, model, args))


# ---------- 7. Pictures ----------


def draw_components(model, args, run, details):
    """The mixture's components in z-space for w = 0 and three draws of w, the tasks' last posterior means on top."""
    if not args.belief or args.oracle_context or args.latent_dim < 2:
        return
    w = torch.randn(4, args.latent_dim, generator=torch.Generator().manual_seed(0)).to(run.device)
    w[0] = 0
    with torch.no_grad():
        mean, logvar = (x.cpu().numpy() for x in model.components(w))  # (4, C, Z)
    tasks = {
        name.replace("/", f" ({split})/"): task["belief_z"][: args.latent_dim]
        for split, named in details.items()
        for name, task in named.items()
    }
    draw_mixture(run.folder / "components.png", mean, np.exp(0.5 * logvar), tasks)


def draw_pictures(agent, model, args, run, details):
    """The mixture. Grid worlds: the return of every goal and, for three goals, where the decoder thinks the goal is,
    step by step, with the agent's path."""
    draw_components(model, args, run, details)
    envs = run.eval_envs["test"]
    if hasattr(envs, "cell"):
        draw_returns(run.folder / "returns.png", run.eval_envs, details)
    if args.reward_decoder != "multihead" or args.oracle_context or not args.belief:
        return
    names = [envs.tasks[i * len(envs.tasks) // envs.num_envs] for i in range(envs.num_envs)]
    with run.evaluating():
        data = rollout(envs, agent, model, args, False, names, deterministic=True)
    with torch.no_grad():
        mean, scale = agent.named(data["beliefs"])["z"].chunk(2, -1)  # (T + 1, N, Z)
        logvar = scale if args.policy_z == "logvar" else scale.log()
        samples = mean + (0.5 * logvar).exp() * torch.randn(100, *mean.shape, device=mean.device)
        maps = model.reward_decoder(samples).sigmoid().mean(0)  # p(r = 1) under the belief (T + 1, N, cells)
    for n in range(0, len(names), math.ceil(len(names) / 3)):
        column = {name: data[name][:, n].cpu().numpy() for name in ("obs", "next_obs", "success")}
        file = run.folder / f"belief_{names[n].replace('/', '_').replace(',', '_')}.png"
        draw_grid_belief(file, names[n], column, data["task"][n].cpu().numpy(), maps[:, n].cpu().numpy(), args.horizon)


# ---------- 8. Presets ----------

# Meta-World: the hyper-parameters of SDVT (Lee et al., 2023), the paper's peer, with the paper's three episodes per
# task and one meta-episode per iteration. What DME did not run has variBAD's, and a weight of the reward of ours.
META_WORLD = dict(
    extra_obs="done", num_envs=10, total_timesteps=250_000_000, eval_interval=650, checkpoint_interval=10, gamma=0.99,
    gae_lambda=0.9, update_epochs=5, num_minibatches=3, clip_coef=0.1, ent_coef=0.001, ent_coef_end=0.001,
    policy_layers=(256, 256), obs_embed=64, belief_embed=64, std_min=0.5, std_max=1.5, belief_batch=10,
    belief_max_grad_norm=1.0, buffer_size=1000, action_embed=16, state_embed=32, reward_embed=16, hidden_dim=256,
    tbptt=50, elbo_terms=100, decode_terms=100, reward_decoder="mlp", decoder_layers=(64, 64, 32), reward_coef=10.0,
    state_coef=10.0, decoder_dropout=0.7,
)  # fmt: skip
# Its policy waits for a belief that has settled, which takes many updates (ours).
ML1 = META_WORLD | dict(
    total_timesteps=50_000_000, eval_interval=100, belief_warmup=1_500_000, belief_anneal_lr=True, belief_updates=30
)
LOCOMOTION = dict(  # per meta-episode of 400 steps, where variBAD's authors count by 200, 400 or 800
    total_timesteps=100_000_000, eval_interval=25, checkpoint_interval=25, gamma=0.97, gae_lambda=0.9,
    num_minibatches=8, clip_coef=0.1, policy_layers=(128, 128), obs_embed=64, belief_embed=64, belief_updates=1,
    belief_batch=10, belief_max_grad_norm=1.0, buffer_size=10_000, action_embed=16, state_embed=32, reward_embed=16,
    hidden_dim=128, tbptt=50, elbo_terms=50, decode_terms=50, reward_decoder="mlp", decoder_layers=(64, 32),
    reward_coef=50.0, virtual_low=-10.0,
)  # fmt: skip
# The authors of variBAD keep the entropy's weight at 0.01; falling from 0.04, no seed stops searching too early.
# Each posterior pays its whole KL; in variBAD's chain, which pays for news alone, a meta-episode's 61 pay it once. Its
# weight of the mean error, 1 / kl_coef = 240, is one of up to 240 x 61 = 14,640 here; 5000 is in between (ours).
GRID = dict(
    time_limit="terminal", standardise_inputs=False, ent_coef=0.04, reward_coef=5000.0, virtual_low=-0.1,
    virtual_high=1.0,
)  # fmt: skip
LARGE_GRID = GRID | dict(total_timesteps=100_000_000, state_embed=32, hidden_dim=128, latent_dim=32)
POINT = dict(
    total_timesteps=50_000_000, eval_interval=25, checkpoint_interval=25, gamma=0.99, gae_lambda=0.9,
    num_minibatches=8, clip_coef=0.1, ent_coef=0.001, ent_coef_end=0.001, policy_layers=(128, 128, 128), obs_embed=64,
    belief_embed=64, belief_batch=15, buffer_size=10_000, action_embed=16, state_embed=32, reward_embed=16,
    hidden_dim=128, reward_decoder="mlp-next", decoder_layers=(64, 32), reward_coef=400.0, virtual_high=1.0,
)  # fmt: skip
PRESETS = {
    "GridWorld": GRID,
    **dict.fromkeys(("GridWorldLDM", "GridWorldExtrapolation"), LARGE_GRID),  # 7x7; networks as large as LDM's
    "SparsePointRobot": POINT,
    "HalfCheetahVel": LOCOMOTION,
    "HalfCheetahDir": LOCOMOTION | dict(update_epochs=16, num_minibatches=2),
    "AntDir": LOCOMOTION | dict(num_minibatches=2, belief_updates=2),
    "AntGoal": LOCOMOTION | dict(
        num_minibatches=2, clip_coef=0.05, learning_rate=1e-3, anneal_lr=True, belief_updates=10, latent_dim=10,
        tbptt=0, elbo_terms=0, decode_terms=0, reward_coef=400.0,
    ),
    "HopperMass": LOCOMOTION | dict(  # as varibad.py's
        total_timesteps=10_000_000, eval_tasks=30, learning_rate=6e-5, gamma=0.99, update_epochs=4, clip_coef=0.2,
        policy_layers=(256, 256, 128), belief_batch=15, belief_updates=3, latent_dim=10, elbo_terms=100,
        decode_terms=100,
    ),
    "ML1": ML1,
    **dict.fromkeys(("ML1-reach", "ML1-reach-wall"), ML1 | dict(obs_shift=2.0)),  # an object stands about, not the goal
    "ML10": META_WORLD | dict(num_components=10),
    "ML45": META_WORLD | dict(
        total_timesteps=400_000_000, eval_interval=3300, latent_dim=10, belief_updates=6, num_components=45,
        virtual_rate=0.1,
    ),
    "module:factory": POINT,  # your own, and all others
}  # fmt: skip

# What fits a machine without a GPU, laid over the preset unless --cuda; ours.
SMALL_ML = dict(
    num_envs=20, horizon=200, num_minibatches=12, learning_rate=2.5e-4, clip_coef=0.2, std_init=0.7, std_min=0.2,
    eval_interval=50, eval_tasks=10, belief_warmup=900_000, belief_updates=15, hidden_dim=128, elbo_terms=25,
    decode_terms=50, decoder_dropout=0.0,
)  # fmt: skip
SMALL_ML1 = SMALL_ML | dict(  # its tasks differ in goals: no state decoder
    num_envs=40, horizon=150, episodes_per_task=2, num_minibatches=8, eval_tasks=0, eval_interval=20, state_coef=0.0,
    belief_updates=30, belief_batch=20, belief_learning_rate=2e-3, hidden_dim=64, elbo_terms=8, decode_terms=150,
)  # fmt: skip
SMALL = {
    **dict.fromkeys(
        ("SparsePointRobot", "MEWA", "MEWAUniform", "AntGoal"), dict(tbptt=50, elbo_terms=25, decode_terms=100)
    ),
    "HopperMass": dict(buffer_size=2000),  # 0.36 GB
    "ML1": SMALL_ML1,
    "ML10": SMALL_ML,
    "ML45": SMALL_ML | dict(eval_interval=250),
}


if __name__ == "__main__":
    start(main, Args, PRESETS, SMALL)
