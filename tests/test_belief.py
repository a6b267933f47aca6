"""The belief models: encoder, decoders, ELBO and mixture against loops, torch.distributions and Monte Carlo."""

import math
import signal
import statistics
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Categorical, MultivariateNormal, Normal, kl_divergence

import dme
import varibad
from common.arguments import check_bounds, check_fit
from common.envs import BadInput, make_envs
from common.networks import GRU
from tests import probe

torch.set_num_threads(1)
SCRIPTS = pytest.mark.parametrize("script", [varibad, dme], ids=lambda module: module.__name__)
TINY = dict(
    num_envs=3, horizon=3, episodes_per_task=2, num_minibatches=1, hidden_dim=6, latent_dim=2, policy_layers=(8,),
    decoder_layers=(7,), obs_embed=4, belief_embed=4, state_embed=3, reward_embed=8, buffer_size=20,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def signals():
    """A run takes over the signals: hand them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def check(script, args):
    """BadInput where a run would raise it; the sizes of args are set."""
    for check_one in (check_bounds, check_fit, script.check_args):
        check_one(args)


def orders(data, args):
    """In which PPO visits an iteration's steps, a permutation for each epoch, as `main` of the scripts draws them."""
    alive = data["alive"]
    return [torch.randperm(alive.numel(), device=alive.device) for _ in range(args.update_epochs)]


def setup(script, env_id="GridWorld", **changes):
    """A script's arguments (its preset, made tiny), environments, belief model and agent."""
    args = script.Args(**(script.PRESETS.get(env_id, {}) | TINY | dict(env_id=env_id) | changes))
    check(script, args)
    envs = make_envs(env_id, args.num_envs, horizon=args.horizon, episodes_per_task=args.episodes_per_task)
    torch.manual_seed(0)
    model = script.BeliefModel(args, envs)
    sizes = dict(task=envs.task_table.shape[1]) if args.oracle_context else model.belief_sizes
    agent = script.Agent(args, envs.single_observation_space.shape[0], envs.single_action_space, sizes)
    return SimpleNamespace(args=args, envs=envs, model=model, agent=agent)


def random_batch(s, B=2):
    """Meta-episodes of noise; every episode but the first of column 0 ends early at a random step."""
    T, S = s.envs.meta_horizon, s.envs.single_observation_space.shape[0]
    obs, next_obs = torch.randint(5, (2, T, B, S)).float() if s.agent.discrete else torch.randn(2, T, B, S)
    actions = torch.randint(5, (T, B)) if s.agent.discrete else 2 * torch.randn(T, B, 2)
    ends = torch.randint(1, s.args.horizon + 1, (s.args.episodes_per_task, 1, B))
    ends[0, 0, 0] = s.args.horizon
    alive = (torch.arange(s.args.horizon)[:, None] < ends).view(T, B)
    return dict(
        obs=obs, next_obs=next_obs, actions=actions, rewards=torch.where(torch.rand(T, B) < 0.4, 1.0, -0.1), alive=alive
    )


def unroll(model, batch):
    """Hidden states of a step-by-step pass: a list of T + 1, (B, D) each."""
    hiddens = [torch.zeros(batch["rewards"].shape[1], model.encoder.gru.hidden_size)]
    for action, next_obs, reward in zip(batch["actions"], batch["next_obs"], batch["rewards"]):
        hiddens.append(model.step(action, next_obs, reward, hiddens[-1]))
    return hiddens


def likeliest(model, hidden):
    """The belief that evaluations see: variBAD's is never drawn."""
    return model.belief(hidden, deterministic=True) if model.__class__.__module__ == "dme" else model.belief(hidden)


def gradients(loss, model):
    """The gradient of every parameter, by name; zeros where the loss does not depend on it."""
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found)}


# ---------- The encoder ----------


def test_gru_is_torchs():
    """Its parameters, names and initial values, its outputs and every gradient are nn.GRU's."""
    sizes = 5, 4
    torch.manual_seed(0)
    theirs = torch.nn.GRU(*sizes, dtype=torch.float64)
    torch.manual_seed(0)
    ours = GRU(*sizes, dtype=torch.float64)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())
    x = torch.randn(7, 3, 5, dtype=torch.float64, requires_grad=True)
    start = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    weight, found = torch.randn(8, 3, 4, dtype=torch.float64), []
    for gru in (theirs, ours):
        hidden, last = gru(x, start)
        out = torch.cat([hidden, last])
        found.append((out, *torch.autograd.grad((out * weight).sum(), (x, start, *gru.parameters()))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    with torch.no_grad():  # and without a graph
        torch.testing.assert_close(ours(x, start)[0], theirs(x, start)[0], rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *inputs: ours(*inputs)[0], (x, start))  # finite differences


@SCRIPTS
@pytest.mark.parametrize("env_id", ["GridWorld", "SparsePointRobot"])
def test_rollout_beliefs_are_those_of_whole_meta_episodes(script, env_id):
    """The beliefs that a rollout found step by step are the posteriors of a GRU over its stored transitions."""
    s = setup(script, env_id, action_embed=3, standardise_inputs=True)
    s.model.obs_norm.update(5 + 3 * torch.randn(50, 2), torch.ones(50, dtype=torch.bool))  # not the identity
    s.model.reward_norm.update(2 + torch.randn(50, 1), torch.ones(50, dtype=torch.bool))
    data = script.rollout(s.envs, s.agent, s.model, s.args, deterministic=True)
    hidden = s.model.hiddens(data)
    torch.testing.assert_close(data["beliefs"], likeliest(s.model, hidden), atol=1e-5, rtol=1e-5)
    assert torch.equal(data["beliefs"][0], likeliest(s.model, torch.zeros(3, 6)))
    assert data["beliefs"].std(0).min() > 0  # it does depend on the history


@SCRIPTS
def test_belief_starts_anew_with_each_meta_episode(script):
    """The first belief of every rollout is that of the zero state, whatever was before; it lives over the episodes."""
    s = setup(script)
    first, second = (script.rollout(s.envs, s.agent, s.model, s.args, deterministic=True) for _ in range(2))
    prior = likeliest(s.model, torch.zeros(3, 6))
    assert torch.equal(first["beliefs"][0], prior) and torch.equal(second["beliefs"][0], prior)
    assert not torch.isclose(second["beliefs"][1:], prior).all(-1).any()  # nor is it reset at an episode's end


@SCRIPTS
def test_shifted_states(script):
    """--obs-shift: in training one constant is added to all states of a meta-episode, of the stated deviation."""
    s = setup(script, "SparsePointRobot", num_envs=500, buffer_size=500, obs_shift=1.5)
    s.agent.first_norm.update(
        torch.tensor([[0.0, 1.0], [2.0, 5.0]]), torch.ones(2, dtype=torch.bool)
    )  # deviations 1, 2
    data = script.rollout(s.envs, s.agent, s.model, s.args)
    shift = data["obs"][0]
    moved = torch.cat([0.1 * data["actions"].clamp(-1, 1)[k : k + 3].cumsum(0) for k in (0, 3)])
    torch.testing.assert_close(data["next_obs"], shift + moved)
    torch.testing.assert_close(data["obs"][[1, 2, 4, 5]], data["next_obs"][[0, 1, 3, 4]])
    assert torch.equal(data["obs"][3], shift)
    assert (shift.std(0) / torch.tensor([1.5, 3.0]) - 1).abs().max() < 4 / 1000**0.5
    s.agent.eval()
    assert not script.rollout(s.envs, s.agent, s.model, s.args)["obs"][0].any()


@SCRIPTS
@pytest.mark.parametrize("env_id, size", [("HopperMass", 12), ("MEWA", 20)])
def test_what_a_rollout_records(script, env_id, size):
    """Step by step what the environments gave, of Hoppers that fall and castles that are finished, idle steps too."""
    s = setup(script, env_id, num_envs=8, horizon=size, action_embed=3, reward_decoder="mlp", tbptt=0)
    given, step = [], s.envs.step
    s.envs.step = lambda action: given.append(step(action)) or given[-1]
    data = script.rollout(s.envs, s.agent, s.model, s.args)
    obs, rewards, terminated, _, infos = zip(*given)
    expected = dict(next_obs="final_obs", alive="alive") | (dict(raw_rewards="raw_reward") if env_id == "MEWA" else {})
    for name, key in expected.items():
        assert torch.equal(data[name], torch.stack([info[key] for info in infos])), name
    assert torch.equal(data["rewards"], torch.stack(rewards))
    assert torch.equal(data["terminated"], torch.stack(terminated))
    assert torch.equal(data["obs"], torch.stack([data["first_obs"], *obs[:-1]]))
    if env_id == "HopperMass":
        assert 0 < (~data["alive"]).sum() and torch.equal(data["raw_rewards"], data["rewards"])
        assert 0 < data["terminated"].sum() <= 8 * 2
    torch.testing.assert_close(data["episode_return"], data["raw_rewards"].view(2, size, 8).sum(1))


@SCRIPTS
@pytest.mark.parametrize("tbptt", [1, 2, 3, 6])
def test_truncated_windows(script, tbptt):
    """Side-by-side windows: the plain pass's outputs, and the gradients of a loop that detaches every `tbptt` steps."""
    s = setup(script)
    batch, target = random_batch(s), torch.randn(7, 2, 6)
    hidden = torch.zeros(2, 6)
    hiddens = [hidden]
    for i in range(6):
        hidden = hidden.detach() if i % tbptt == 0 else hidden
        hidden = s.model.step(batch["actions"][i], batch["next_obs"][i], batch["rewards"][i], hidden)
        hiddens.append(hidden)
    windows = s.model.hiddens(batch, tbptt)
    torch.testing.assert_close(windows, s.model.hiddens(batch))
    expected = gradients((torch.stack(hiddens) * target).sum(), s.model.encoder)
    torch.testing.assert_close(gradients((windows * target).sum(), s.model.encoder), expected)


@SCRIPTS
def test_action_input(script):
    """Discrete actions go in as one-hot codes, continuous ones as the environment clips them."""
    assert torch.equal(setup(script).model.action_input(torch.tensor([3, 0])), torch.eye(5)[[3, 0]])
    clipped = setup(script, "SparsePointRobot").model.action_input(torch.tensor([[-3.0, 0.5]]))
    assert clipped.tolist() == [[-1.0, 0.5]]


# ---------- Decoders and the ELBO ----------


@SCRIPTS
@pytest.mark.parametrize("inputs", [("obs", "action", "next_obs"), ("obs", "action"), ("next_obs",)])
def test_decoder_is_an_mlp_on_every_pair(script, inputs):
    """The split first layer against the same weights on the concatenation [m, s, s', a] of every pair."""
    s = setup(script, "SparsePointRobot")
    decoder = script.Decoder(s.args, 2, 2, 4, inputs)
    m, obs, action, next_obs = torch.randn(5, 3, 2), *torch.randn(3, 6, 3, 2)
    given = dict(obs=(decoder.embed_state, obs), next_obs=(decoder.embed_state, next_obs))
    given |= dict(action=(decoder.embed_action, action))
    x = torch.cat([embed(value) for name, (embed, value) in given.items() if name in inputs], -1).relu()
    pairs = torch.cat([m[:, None].expand(5, 6, 3, 2), x[None].expand(5, *x.shape)], -1)
    torch.testing.assert_close(decoder(m, obs, action, next_obs), decoder.net(pairs))


def decodes(t, i, args):
    """Whether the posterior after t transitions decodes transition i."""
    end = (t // args.horizon + 1) * args.horizon  # of the episode that comes next or goes on
    return {"all": True, "future": i >= t, "episode": t <= i < end}[
        getattr(args, "decode_window", "all")
    ]  # variBAD: always all


def loop_reconstruction(s, m, t, batch):
    """The two losses, pair by pair: -log p up to its constant, in the mean over the pairs."""
    rewards, states = [], [torch.zeros(())]
    for e, b in torch.cartesian_prod(*map(torch.arange, t.shape)).tolist():
        for i in range(s.envs.meta_horizon):
            idle = t[e, b] > 0 and not batch["alive"][t[e, b] - 1, b]
            if idle or not batch["alive"][i, b] or not decodes(int(t[e, b]), i, s.args):
                continue
            obs, action, next_obs, r = (batch[k][i, b] for k in ("obs", "actions", "next_obs", "rewards"))
            x = [
                v[None, None] for v in (s.model.obs_norm(obs), s.model.action_input(action), s.model.obs_norm(next_obs))
            ]
            if s.args.reward_decoder == "multihead":
                logit = s.model.reward_decoder(m[e, b])[int(5 * next_obs[0] + next_obs[1])]
                rewards.append(-Bernoulli(logits=logit).log_prob((r == 1).float()))
            else:  # variance 1/2: the squared error and a constant
                density = Normal(s.model.reward_decoder(m[e, b][None, None], *x)[0, 0, 0, 0], 0.5**0.5)
                rewards.append(density.log_prob(density.mean).detach() - density.log_prob(r))
            if s.args.state_coef:
                change = s.model.state_decoder(m[e, b][None, None], *x)[0, 0, 0]
                norm = s.model.change_norm
                mean, std = (norm.mean, norm.var.sqrt()) if s.args.standardise_inputs else (0, 1)
                states.append(((next_obs - obs - mean) / std - change).square().mean())
    return sum(rewards) / len(rewards), sum(states) / max(1, len(states) - 1)


def loop_terms(script, s, batch, noise):
    """The ELBO's terms with torch.distributions on step-by-step posteriors; noise: the standard normal draws."""
    hidden = torch.stack(unroll(s.model, batch))
    real = [(t, b) for t in range(len(hidden)) for b in range(2) if t == 0 or batch["alive"][t - 1, b]]
    mean_of = lambda x: torch.stack([x[t, b] for t, b in real]).mean()  # noqa: E731, over all but idle steps
    parts = s.model.posterior(hidden)
    gaussians = [Normal(mean, (0.5 * logvar).exp()) for mean, logvar in zip(parts[::2], parts[1::2])]
    samples = [q.mean + q.stddev * n for q, n in zip(gaussians, noise)]
    t = torch.arange(len(hidden))[:, None].expand(hidden.shape[:2])
    reward, state = loop_reconstruction(s, samples[-1], t, batch)
    terms = dict(reward=reward, state=state)
    if script is varibad:
        q = gaussians[0]
        before = Normal(torch.cat([torch.zeros(1, 2, 2), q.mean[:-1]]), torch.cat([torch.ones(1, 2, 2), q.stddev[:-1]]))
        prior = Normal(torch.zeros(2), torch.ones(2)) if s.args.kl_to_prior else before
        return terms | dict(kl=mean_of(kl_divergence(q, prior).sum(-1)))
    q_w, q_z = gaussians
    mean, logvar = s.model.components(samples[0])
    log_density = MultivariateNormal(mean, torch.diag_embed(logvar.exp())).log_prob(samples[1].unsqueeze(-2))
    q_y = Categorical(probs=log_density.exp() / log_density.exp().sum(-1, keepdim=True))  # (3)
    to_each = kl_divergence(
        Normal(q_z.mean.unsqueeze(-2), q_z.stddev.unsqueeze(-2)), Normal(mean, (0.5 * logvar).exp())
    )
    weight = F.one_hot(q_y.probs.argmax(-1), mean.shape[-2]) if s.args.hard_y else q_y.probs
    kl_w = kl_divergence(q_w, Normal(torch.zeros(2), torch.ones(2)))
    if s.args.chain_w:  # step by step, but for the first, to the posterior before
        steps = [Normal(q_w.mean[t], q_w.stddev[t]) for t in range(len(hidden))]
        kl_w = torch.stack([kl_w[0], *map(kl_divergence, steps[1:], steps[:-1])])
    return terms | dict(
        kl_w=mean_of(kl_w.sum(-1)),
        kl_y=mean_of(kl_divergence(q_y, Categorical(torch.full_like(q_y.probs, 1 / mean.shape[-2])))),
        kl_z=mean_of((weight * to_each.sum(-1)).sum(-1)),
    )


@pytest.mark.parametrize(
    "script, window",
    [(varibad, "all"), (dme, "all"), (dme, "future"), (dme, "episode")],
    ids=lambda x: getattr(x, "__name__", x),
)
@pytest.mark.parametrize("case", ["multihead", "mlp", "state", "tbptt"])
def test_elbo_equals_a_loop(script, case, window, monkeypatch):
    """Loss, terms and all gradients (so the KL's into q_t-1) against loops over batch, posterior and transition."""
    changes = dict(
        multihead=dict(env_id="GridWorld"),
        mlp=dict(env_id="GridWorld", reward_decoder="mlp", action_embed=2),
        state=dict(env_id="SparsePointRobot", state_coef=3.0, reward_coef=2.0),
        tbptt=dict(env_id="SparsePointRobot", tbptt=6),
    )[case]
    option = dict(kl_to_prior=case == "state")
    if script is dme:
        option = dict(hard_y=case == "state", decode_window=window, chain_w=case in ("state", "tbptt"))
    weights = {varibad: dict(kl_coef=0.3), dme: dict(beta_w=0.3, beta_y=0.7, beta_z=1.3)}[script]
    s = setup(script, standardise_inputs=True, **changes, **option, **weights)
    s.model.obs_norm.mean += 0.3
    s.model.change_norm.update(1 + 3 * torch.randn(50, 2), torch.ones(50, dtype=torch.bool))
    batch, noise, randn_like = random_batch(s), [], torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: noise.append(randn_like(x)) or noise[-1])
    loss, terms = script.elbo(s.model, batch, s.args)
    expected = loop_terms(script, s, batch, noise)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    coefs = dict(reward=s.args.reward_coef, state=s.args.state_coef)
    coefs |= {name.replace("kl_coef", "kl").replace("beta", "kl"): value for name, value in weights.items()}
    total = sum(coefs[name] * value for name, value in expected.items())
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients(loss, s.model), gradients(total, s.model), atol=1e-5, rtol=1e-3)


@SCRIPTS
def test_drawn_terms_are_right_in_expectation(script, monkeypatch):
    """The mean of many sub-sampled ELBOs against the full one, within four standard errors."""
    changes = dict(env_id="SparsePointRobot", state_coef=1.0)
    if script is dme:
        changes["decode_window"] = "all"
    s = setup(script, elbo_terms=2, decode_terms=3, **changes)
    full = setup(script, **changes).args
    batch = random_batch(s) | dict(alive=torch.ones(6, 2, dtype=torch.bool))
    batch = {k: v.repeat(1, 200, *[1] * (v.dim() - 2)) for k, v in batch.items()}  # many draws in one call
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    with torch.no_grad():
        draws = [script.elbo(s.model, batch, s.args)[1] for _ in range(40)]
        exact = script.elbo(s.model, batch, full)[1]
    for name in [n for n in exact if n == "loss" or n in ("reward", "state") or n.startswith("kl")]:
        sample = torch.stack([draw[name] for draw in draws])
        error = sample.std() / len(draws) ** 0.5
        assert error > 0 and abs(sample.mean() - exact[name]) < 4 * error, name


@SCRIPTS
def test_idle_steps_do_not_count(script):
    """What idle transitions hold changes neither loss of reconstruction."""
    s = setup(script, "SparsePointRobot", state_coef=1.0)
    batch, t = random_batch(s), torch.arange(7)[:, None].expand(7, 2)
    other = {k: torch.where(batch["alive"].view(6, 2, *[1] * (v.dim() - 2)), v, 99) for k, v in batch.items()}
    other["alive"] = batch["alive"]
    assert not torch.equal(other["rewards"], batch["rewards"])
    m, real = torch.randn(7, 2, 2), torch.cat([torch.ones(1, 2, dtype=torch.bool), batch["alive"]])
    steps = [t] if script is dme else []
    losses = [script.reconstruction(s.model, m, *steps, real, b, s.args) for b in (batch, other)]
    torch.testing.assert_close(*losses)


@SCRIPTS
def test_probe_of_the_next_rewards(script):
    """tests/probe.py: the decoder's error on rewards 3 to 6 under the beliefs after 3 steps, pair by pair."""
    s = setup(script, "SparsePointRobot", horizon=5)
    data = script.rollout(s.envs, s.agent, s.model, s.args)
    data["rewards"] = torch.randn(10, 3)
    data["alive"][5, 1] = False
    errors, counted = [], [(i, n) for i in range(3, 7) for n in range(3) if (i, n) != (5, 1)]
    for i, n in counted:
        m = data["beliefs"][3, n, :2]
        x = s.model.obs_norm(data["obs"]), data["actions"].clamp(-1, 1), s.model.obs_norm(data["next_obs"])
        predicted = s.model.reward_decoder(m[None, None], *(v[i, n][None, None] for v in x))
        errors.append((predicted.item() - data["rewards"][i, n].item()) ** 2)
    found = probe.reward_error(script, s.model, s.args, data, 3, 7)
    rewards = [data["rewards"][i, n].item() for i, n in counted]
    assert found == pytest.approx((statistics.mean(errors), statistics.variance(rewards)), rel=1e-4)


@SCRIPTS
def test_kl_gaussians(script):
    """Against torch.distributions, extreme variances included."""
    mean, prior_mean = torch.randn(2, 50, 3, dtype=torch.float64)
    logvar, prior_logvar = 8 * torch.rand(2, 50, 3, dtype=torch.float64) - 5
    q, p = Normal(mean, (0.5 * logvar).exp()), Normal(prior_mean, (0.5 * prior_logvar).exp())
    torch.testing.assert_close(script.kl_gaussians(mean, logvar, prior_mean, prior_logvar), kl_divergence(q, p).sum(-1))


@SCRIPTS
def test_update_clips_each_part(script):
    """One step of plain gradient descent moves every part by exactly its clipped norm."""
    s = setup(script, "SparsePointRobot", state_coef=50.0, reward_coef=50.0, belief_max_grad_norm=0.01)
    buffer = script.Buffer(7, s.envs)
    buffer.add(script.rollout(s.envs, s.agent, s.model, s.args) | dict(rewards=torch.randn(6, 3)))
    before = [[p.clone() for p in part.parameters()] for part in s.model.parts()]
    rate = [0.0] if script is dme else []
    script.update_belief(s.model, torch.optim.SGD(s.model.parameters(), 1.0), buffer, *rate, s.args)
    for part, old in zip(s.model.parts(), before):
        moved = torch.cat([(p - o).flatten() for p, o in zip(part.parameters(), old)]).norm().item()
        assert moved == pytest.approx(0.01, rel=1e-3)
    known = {id(p) for part in s.model.parts() for p in part.parameters()}
    assert known == {id(p) for p in s.model.parameters()}


# ---------- DME: the mixture ----------


def test_cluster_posterior_is_bayes_rule():
    """(3) against densities of torch.distributions, and against draws of the mixture that fell near z."""
    z, mean, logvar = torch.randn(40, 3), torch.randn(40, 4, 3), torch.randn(40, 4, 3)
    density = MultivariateNormal(mean, torch.diag_embed(logvar.exp())).log_prob(z[:, None]).exp()
    posterior = dme.cluster_posterior(z, mean, logvar).exp()
    torch.testing.assert_close(posterior, density / density.sum(-1, keepdim=True))

    n, mean, logvar = 400_000, torch.tensor([[-1.0], [0.5], [2.0]]), torch.tensor([[0.0], [-1.0], [0.5]])
    y = torch.randint(3, (n,), generator=torch.Generator().manual_seed(1))
    noise = torch.randn(n, 1, generator=torch.Generator().manual_seed(2))
    draws = (mean[y] + (0.5 * logvar[y]).exp() * noise)[:, 0]
    for z in (-1.0, 0.0, 1.0):
        near = y[(draws - z).abs() < 0.02]
        share = F.one_hot(near, 3).float().mean(0)
        posterior = dme.cluster_posterior(torch.tensor([z]), mean, logvar).exp()
        assert (share - posterior).abs().max() < 4 * (0.25 / len(near)) ** 0.5 + 1e-3


def test_cluster_posterior_stays_finite():
    """Far away, and at the smallest variance, the nearest component takes all; nothing is lost to rounding."""
    mean = torch.tensor([[0.0], [1.0], [300.0]])
    z = torch.tensor([[1e4], [-1e4], [1.001]], requires_grad=True)
    log_y = dme.cluster_posterior(z, mean, torch.full((3, 1), 1e-4).log())
    assert log_y.isfinite().all() and log_y.argmax(-1).tolist() == [2, 0, 1]
    log_y.exp().mul(log_y).sum().backward()
    assert z.grad.isfinite().all()


def test_components_move_with_w():
    """They depend on w, each of its coordinates and smoothly; with --static-prior they do not."""
    w = torch.randn(6, 2)
    for static in (False, True):
        model = setup(dme, static_prior=static).model
        mean, logvar = model.components(w)
        assert mean.shape == logvar.shape == (6, 5, 2) and logvar.exp().min() > 1e-4
        assert bool((mean.std(0) < 1e-6).all() and (logvar.std(0) < 1e-6).all()) == static
        assert mean.std(1).min() > 0  # but the components differ from each other


def test_prior_statistics():
    """Draws of the generative model: w standard normal, y uniform and independent of it, z's component theirs."""
    model = setup(dme).model
    torch.manual_seed(3)
    n = 20_000
    w, y, mean, logvar = model.prior(n)
    assert w.mean(0).abs().max() < 4 / n**0.5 and (w.std(0) - 1).abs().max() < 4 / (2 * n) ** 0.5
    assert (y.sum(1) == 1).all() and (y.mean(0) - 0.2).abs().max() < 4 * (0.2 * 0.8 / n) ** 0.5
    assert torch.corrcoef(torch.cat([w, y], 1).T)[:2, 2:].abs().max() < 4 / n**0.5
    means, logvars = model.components(w)
    assert torch.equal(mean, (means * y[..., None]).sum(1)) and torch.equal(logvar, (logvars * y[..., None]).sum(1))


@pytest.mark.parametrize("policy_y", ["argmax", "sample", "probs"])
@pytest.mark.parametrize(
    "other", [{}, dict(no_policy_w=True), dict(static_prior=True), dict(policy_z="var"), dict(policy_w="mean")]
)
def test_what_the_policy_sees(policy_y, other):
    """Mean and scale of z, w, y, in this order; w and y have the statistics of their posteriors."""
    s = setup(dme, policy_y=policy_y, num_components=3, **other)
    with torch.no_grad():
        s.model.heads.bias[2:4] = -1.0  # w's log-variance
        s.model.mixture[-1].bias += torch.randn(12)  # components that lie apart
        w_mean, w_logvar, z_mean, z_logvar = s.model.posterior(torch.zeros(1, 6))
        belief = s.model.belief(torch.zeros(20_000, 6))
        fixed = s.model.belief(torch.zeros(2, 6), deterministic=True)
    scale = z_logvar.exp() if s.args.policy_z == "var" else z_logvar
    for b in (belief, fixed):
        torch.testing.assert_close(b[:, :4], torch.cat([z_mean, scale], -1).expand(len(b), 4))
    w, y = belief[:, 4:-3], belief[:, -3:]
    torch.testing.assert_close(y.sum(-1), torch.ones(20_000))
    assert (policy_y == "probs") != bool(((y == 0) | (y == 1)).all())
    if s.args.no_policy_w or s.args.static_prior:  # whose w is noise
        assert w.shape[1] == 0 and sum(s.model.belief_sizes.values()) == 7
    else:
        deviation = torch.zeros(2) if s.args.policy_w == "mean" else (0.5 * w_logvar).exp()[0]
        assert (w.mean(0) - w_mean[0]).abs().max() < 0.02 and (w.std(0) - deviation).abs().max() < 0.02
        torch.testing.assert_close(fixed[:, 4:-3], w_mean.expand(2, 2))
    with torch.no_grad():  # y is that of sampled w and z (Monte Carlo), or of their means
        q_w, q_z = (Normal(m, (0.5 * v).exp()) for m, v in ((w_mean, w_logvar), (z_mean, z_logvar)))
        drawn, at_mean = (
            dme.cluster_posterior(z, *s.model.components(w)).exp()
            for w, z in ((q_w.sample((20_000,))[:, 0], q_z.sample((20_000,))[:, 0]), (w_mean, z_mean))
        )
        one_hot = F.one_hot(drawn.argmax(-1), 3).float() if policy_y == "argmax" else drawn
        assert (y.mean(0) - one_hot.mean(0)).abs().max() < 0.02
        expected = at_mean if policy_y == "probs" else F.one_hot(at_mean.argmax(-1), 3).float()
        torch.testing.assert_close(fixed[:, -3:], expected.expand(2, 3))


def test_initial_belief_from_the_prior():
    """--initial-belief prior: at step 0 a one-hot y and a component at the w beside it; the heads from step 1 on."""
    s = setup(dme, initial_belief="prior", num_envs=16)
    data = dme.rollout(s.envs, s.agent, s.model, s.args, deterministic=True)
    z_mean, z_logvar, w, y = data["beliefs"][0].split([2, 2, 2, 5], -1)
    mean, logvar = s.model.components(w)
    assert len(y.unique(dim=0)) > 1 and (y.sum(1) == 1).all()
    torch.testing.assert_close((z_mean, z_logvar), tuple((x * y[..., None]).sum(1) for x in (mean, logvar)))
    hidden = s.model.hiddens(data)
    torch.testing.assert_close(data["beliefs"][1:], s.model.belief(hidden[1:], deterministic=True))


def mixture_of(case):
    """A model and a batch of which the first of two meta-episodes has hidden state -1, the other 1, throughout.

    Two components of deviation .8, 6 apart in the first of two coordinates. Dead: `noise`, a wide posterior that knows
    nothing; `copies`, one that knows all, of components that are one. Alive: `alive`, where w and z follow the hidden
    state, `half`, where z does so with a deviation as large as its mean.
    """
    s = setup(dme, num_components=2, static_prior=case == "copies")
    model, wide = s.model, math.log(9.0)
    mean, logvar = {"noise": (0, wide), "copies": (3, -6), "alive": (3, -6), "half": (3, wide)}[case]
    with torch.no_grad():
        model.heads.weight.zero_()
        model.heads.weight[0, 0], model.heads.weight[4, 0] = float(case == "alive"), mean  # of w, of z
        model.heads.bias.copy_(torch.tensor([0, 0, -4 if case == "alive" else 0, 0, 0, 0, logvar, -6]))
        model.mixture = torch.nn.Linear(2, 8)  # w -> means, raw deviations of two components, in two coordinates
        model.mixture.weight.zero_()
        model.mixture.bias.copy_(torch.tensor([-3.0, 0, 0, 0, 3, 0, 0, 0]))
        if case == "copies":
            model.mixture.bias.zero_()
        model.mixture.weight[:, 0] = torch.tensor([0, 1, 0, 0, 0, 1, 0, 0])  # the second coordinate follows w
    model.hiddens = lambda batch, tbptt=0: torch.tensor([-1.0, 1.0])[:, None].expand(7, 2, 6)
    return model, random_batch(s)


@pytest.mark.parametrize("case", ["noise", "copies", "alive", "half"])
def test_signs_of_life(case):
    """Mixtures dead and alive by construction, with what their numbers are on paper."""
    model, batch = mixture_of(case)
    torch.manual_seed(5)
    signs = {name.removeprefix("mixture_"): x.item() for name, x in dme.signs_of_life(model, batch, 4000).items()}
    share = Normal(0.0, 1.0).cdf(torch.tensor(1.0))  # of `half`, on the right side
    left = dict(noise=math.log(2), copies=math.log(2), alive=0.0, half=Bernoulli(share).entropy().item())[case]
    assert signs["y_entropy"] == pytest.approx(left, abs=0.02)
    assert signs["y_information"] == pytest.approx(math.log(2) - left, abs=0.04)
    if case in ("noise", "copies"):  # the dead ones, with as few draws as a run has: nothing of them is information
        assert dme.signs_of_life(model, batch)["mixture_y_information"].item() == pytest.approx(0, abs=1e-5)
    # the share of contexts with hidden state 1: about one half, as idle ones do not count
    real = torch.cat([torch.ones(1, 2, dtype=torch.bool), batch["alive"]])
    p = (real[:, 1].sum() / real.sum()).item()
    moved = 2 * (p * (1 - p)) ** 0.5 if case == "alive" else 0.0  # deviation of -1, 1
    assert signs["w_signal"] == pytest.approx(moved / math.exp(-2) / 2, rel=1e-4)  # mean over two coordinates
    assert signs["movement"] == pytest.approx(moved / 2, rel=1e-4, abs=1e-6)
    assert signs["spread"] == pytest.approx(0.0 if case == "copies" else 1.5)


# ---------- DME: virtual tasks ----------


def test_decoded_reward():
    """(11) is the decoder's prediction pair by pair, clipped; on a grid, the more likely of the two rewards."""
    s = setup(dme, "SparsePointRobot", virtual_low=-0.05, virtual_high=0.1)
    batch, z = random_batch(s), torch.randn(2, 2)
    x = [batch[k] for k in ("obs", "actions", "next_obs")]
    got = dme.decoded_reward(s.model, z, *x, s.args)
    raw = torch.empty(6, 2)
    for i in range(6):
        for b in range(2):
            inputs = s.model.obs_norm(x[0][i, b]), x[1][i, b].clamp(-1, 1), s.model.obs_norm(x[2][i, b])
            raw[i, b] = s.model.reward_decoder(z[b][None, None], *(v[None, None] for v in inputs))
    torch.testing.assert_close(got, raw.clamp(-0.05, 0.1))
    assert (raw < -0.05).any() or (raw > 0.1).any()

    s = setup(dme)
    batch = random_batch(s)
    got = dme.decoded_reward(s.model, z, *(batch[k] for k in ("obs", "actions", "next_obs")), s.args)
    for i in range(6):
        for b in range(2):
            column, row = batch["next_obs"][i, b].int().tolist()
            likely = s.model.reward_decoder(z[b])[5 * column + row].sigmoid() > 0.5
            assert got[i, b].item() == pytest.approx(1.0 if likely else -0.1)
    assert len(got.unique()) == 2


def test_virtual_rewards_need_an_interval():
    """A lower bound above the upper one would make every virtual reward the same."""
    with pytest.raises(BadInput, match="--virtual-low"):
        setup(dme, virtual_low=2.0, virtual_high=1.0)


@pytest.mark.parametrize(
    "virtual, rate", [("elbo", 1.0), ("both", 1.0), ("relabel", 1.0), ("elbo", 0.0), ("policy", 1.0), ("off", 1.0)]
)
def test_virtual_batches(virtual, rate, monkeypatch):
    """Rewards of tasks from the prior in place of the buffer's: for the decoder, with relabel for the encoder, too."""
    s = setup(dme, virtual=virtual)
    buffer = dme.Buffer(7, s.envs)
    buffer.add(dme.rollout(s.envs, s.agent, s.model, s.args))
    stored, sampled, read, decoded = {k: v.clone() for k, v in buffer.store.items()}, [], [], []
    sample, hiddens, reconstruction = buffer.sample, s.model.hiddens, dme.reconstruction
    monkeypatch.setattr(buffer, "sample", lambda n: sampled.append(sample(n)) or dict(sampled[-1]))
    monkeypatch.setattr(s.model, "hiddens", lambda batch, tbptt: read.append(batch) or hiddens(batch, tbptt))
    monkeypatch.setattr(dme, "reconstruction", lambda *given: decoded.append(given[4]) or reconstruction(*given))
    monkeypatch.setattr(dme, "decoded_reward", lambda *given: torch.full_like(sampled[0]["rewards"], 0.5))
    dme.update_belief(s.model, torch.optim.Adam(s.model.parameters()), buffer, rate, s.args)
    for batches, virtual_too in ((read, ("relabel",)), (decoded, ("elbo", "both", "relabel"))):
        for name, value in sampled[0].items():
            swapped = name == "rewards" and rate and virtual in virtual_too
            assert torch.equal(batches[0][name], torch.full_like(value, 0.5) if swapped else value), name
    for name, value in stored.items():  # the 3 meta-episodes in use
        assert torch.equal(buffer.store[name][:3], value[:3]), name


def test_virtual_rewards_teach_the_reward_decoder_alone():
    """Algorithm 1: the state's loss and all KLs are those of the real batch, the reward's that of the virtual tasks."""
    s = setup(dme, "SparsePointRobot", state_coef=1.0, decode_window="all")
    batch, virtual = random_batch(s), torch.randn(6, 2)
    found = []
    for given in ((batch, s.args), (batch, s.args, virtual), (batch | dict(rewards=virtual), s.args)):
        torch.manual_seed(1)
        found.append(dme.elbo(s.model, *given)[1])
    real, mixed, relabelled = found
    for name in ("state", "kl_w", "kl_y", "kl_z"):
        assert torch.equal(mixed[name], real[name]) and not torch.equal(relabelled[name], real[name]), name
    torch.manual_seed(1)
    w_mean, w_logvar, mean, logvar = s.model.posterior(torch.stack(unroll(s.model, batch)))
    dme.gaussian(w_mean, w_logvar)
    t = torch.arange(7)[:, None].expand(7, 2)
    expected = loop_reconstruction(s, dme.gaussian(mean, logvar), t, batch | dict(rewards=virtual))[0]
    torch.testing.assert_close(mixed["reward"], expected)


@pytest.mark.parametrize("virtual_y", ["uniform", "usage"])
def test_components_of_virtual_tasks(virtual_y):
    """--virtual-y usage: drawn as often as q(y) had them, on average; before that, and by default, uniformly."""
    s = setup(dme, virtual_y=virtual_y, num_components=3)
    with torch.no_grad():
        s.model.mixture[-1].weight.zero_()  # components at 0, 100, 200, whatever w
        s.model.mixture[-1].bias.zero_()
        s.model.mixture[-1].bias.view(3, 4)[:, 0] = torch.tensor([0.0, 100.0, 200.0])
        share = lambda: F.one_hot((s.model.virtual_tasks(8000)[:, 0] / 100).round().long(), 3).float().mean(0)  # noqa: E731
        assert (share() - 1 / 3).abs().max() < 4 * (0.25 / 8000) ** 0.5
        for y, rows in (([0.9, 0.1, 0.0], 30), ([0.1, 0.0, 0.9], 10)):
            s.model.usage.update(torch.tensor([y]).expand(rows, 3), torch.ones(rows, dtype=torch.bool))
        expected = torch.tensor([0.7, 0.075, 0.225]) if virtual_y == "usage" else torch.full((3,), 1 / 3)
        assert (share() - expected).abs().max() < 4 * (0.25 / 8000) ** 0.5
    y = s.model.prior(8000)[1]  # Algorithm 1's first belief stays what it was
    assert (y.mean(0) - 1 / 3).abs().max() < 4 * (0.25 / 8000) ** 0.5


@torch.no_grad()
def test_virtual_rollout(monkeypatch):
    """One task per environment for the whole meta-episode; its rewards go to the encoder, the true ones stay beside."""
    s = setup(dme, num_envs=16)
    tasks, prior = [], s.model.prior
    monkeypatch.setattr(s.model, "prior", lambda *given: tasks.append(prior(*given)) or tasks[-1])
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # z is the component's mean; w of the belief its mean
    data = dme.rollout(s.envs, s.agent, s.model, s.args, virtual=True)
    assert len(tasks) == 1
    x = [data[k] for k in ("obs", "actions", "next_obs")]
    assert torch.equal(data["rewards"], dme.decoded_reward(s.model, tasks[0][2], *x, s.args))
    true = torch.where((data["next_obs"] == data["task"]).all(-1), 1.0, -0.1)
    assert torch.equal(data["true_rewards"], true) and not torch.equal(data["rewards"], true)
    torch.testing.assert_close(data["beliefs"], s.model.belief(s.model.hiddens(data)))
    misled = s.model.belief(s.model.hiddens(data | dict(rewards=true)))
    assert not torch.isclose(data["beliefs"], misled).all()


def test_virtual_data_teaches_the_policy_alone(monkeypatch, tmp_path):
    """Where chance makes iterations virtual, neither buffer nor normalisers nor the usage of y get to see those."""
    options = dict(virtual_rate=1.0, precollect=1, total_timesteps=180, eval_interval=-1, standardise_inputs=True)
    s = setup(dme, run_dir=str(tmp_path), **options)
    made, kept, scales, models, rollout, add = [], [], [], [], dme.rollout, dme.Buffer.add

    def recorded(*inputs, virtual):
        made.append(rollout(*inputs, virtual=virtual) | dict(virtual=virtual))
        seen = inputs[2].obs_norm, inputs[1].return_norm, inputs[2].usage
        scales.append([norm.count.item() for norm in seen])
        models.append(inputs[2])
        return made[-1]

    monkeypatch.setattr(dme, "rollout", recorded)
    monkeypatch.setattr(dme.Buffer, "add", lambda self, data: kept.append(data["rewards"]) or add(self, data))
    dme.main(s.args)
    real = [data["rewards"] for data in made if not data["virtual"]]
    assert 0 < len(real) < len(made) == 10 and not made[0]["virtual"]
    assert len(kept) == len(real) and all(a is b for a, b in zip(kept, real))
    assert scales == [[sum(18 * (not data["virtual"]) for data in made[:i])] * 3 for i in range(10)]
    y = torch.cat([data["beliefs"][:-1, :, -5:] for data in made if not data["virtual"]])
    torch.testing.assert_close(models[-1].usage.mean, y.mean((0, 1)))
