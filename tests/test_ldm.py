"""LDM: mixture weights, imaginary rewards, the end-to-end policy and the decoder's shortcuts against plain loops."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Dirichlet, Normal, kl_divergence

import common.processes
import common.run
import ldm
import varibad
from common.envs import make_envs
from tests.test_belief import check, gradients, signals  # noqa: F401
from tests.test_scripts import TINY, command, metrics, resume_equals_straight, run

torch.set_num_threads(1)
DECODE = pytest.mark.parametrize("decode", ["all", "cells", "shared"])


def setup(env_id="GridWorldLDM", **changes):
    """Tiny arguments, environments, latent dynamics network and agent."""
    tiny = dict(
        num_envs=5, horizon=4, episodes_per_task=2, num_minibatches=1, hidden_dim=6, latent_dim=3, policy_latent_dim=4,
        policy_layers=(8,), decoder_layers=(7,), state_embed=3, reward_embed=8, buffer_size=20, num_mixture_workers=2,
    )  # fmt: skip
    args = ldm.Args(**(ldm.PRESETS[env_id] | tiny | dict(env_id=env_id) | changes))
    check(ldm, args)
    envs = make_envs(env_id, args.num_envs, horizon=args.horizon, episodes_per_task=args.episodes_per_task)
    torch.manual_seed(0)
    model = ldm.BeliefModel(args, envs)
    obs_dim = envs.single_observation_space.shape[0]
    agent = ldm.Agent(args, obs_dim, envs.single_action_space, dict(b=2 * args.policy_latent_dim))
    return SimpleNamespace(args=args, envs=envs, model=model, agent=agent)


def imagined(s):
    """A rollout with mixture workers, with the orders of PPO's epochs, and their roles and weights."""
    mixture = ldm.draw_mixture(s.args, s.args.num_envs, "cpu")
    data = ldm.rollout(s.envs, s.agent, s.model, s.args, mixture=mixture)
    data["orders"] = [torch.randperm(s.args.num_envs * s.args.ppo_windows) for _ in range(s.args.update_epochs)]
    return data, mixture


# ---------- (1) Mixture weights ----------


@pytest.mark.parametrize("by_dimension", [False, True])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
def test_mixture_weights(beta, by_dimension):
    """Sums, range, mean, covariance of beta * Dirichlet(1, .., 1) - (beta - 1) / n; one weight, or one a dimension."""
    args = ldm.Args(num_envs=2003, num_mixture_workers=2000, beta=beta, mix_dimensions=by_dimension, latent_dim=2)
    torch.manual_seed(0)
    normal, imagining, alpha = ldm.draw_mixture(args, 2003, "cpu")
    assert imagining.sum() == 2000 and not imagining[normal].any() and len(normal.unique()) == 3
    assert alpha.shape == (2003, 2003, 2 if by_dimension else 1)
    assert not alpha[normal].any() and not alpha[:, imagining].any()
    weights = alpha[imagining][:, normal]  # (2000, 3, .)
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]), atol=1e-5, rtol=0)
    low = -(beta - 1) / 3
    assert weights.min() >= low - 1e-6 and weights.max() <= low + beta + 1e-6
    theirs = Dirichlet(torch.ones(3))
    for d in range(weights.shape[2]):
        mean, deviation = weights[..., d].mean(0), beta * theirs.variance[0].sqrt()
        torch.testing.assert_close(mean, beta * theirs.mean + low, atol=4 * deviation.item() / 2000**0.5 + 1e-6, rtol=0)
        covariance = beta**2 * (torch.eye(3) / 3 - 1 / 9) / 4  # of Dirichlet(1, 1, 1): variance 1/18
        assert covariance[0, 0] == pytest.approx(beta**2 * theirs.variance[0].item())
        torch.testing.assert_close(weights[..., d].T.cov(), covariance, atol=0.006 * beta**2 + 1e-6, rtol=0)
    if by_dimension and beta:
        assert abs(torch.corrcoef(weights[:, 0].T)[0, 1]) < 0.1


def test_roles_are_drawn_anew():
    """Every worker imagines equally often."""
    args = ldm.Args(num_envs=6, num_mixture_workers=2)
    drawn = torch.stack([ldm.draw_mixture(args, 6, "cpu")[1] for _ in range(3000)])
    assert (drawn.sum(1) == 2).all()
    assert (drawn.float().mean(0) - 1 / 3).abs().max() < 4 * (2 / 9 / 3000) ** 0.5


# ---------- Imaginary rewards ----------


@torch.no_grad()
@pytest.mark.parametrize("by_dimension", [False, True])
@pytest.mark.parametrize("case", ["bernoulli", "multihead", "mlp"])
def test_imaginary_rewards_equal_a_loop(case, by_dimension, monkeypatch):
    """Worker by worker and step by step: the weighted sum of the others' m before the transition, decoded at s'."""
    env_id = "SparsePointRobot" if case == "mlp" else "GridWorldLDM"
    s = setup(env_id, reward_decoder=case, mix_dimensions=by_dimension, beta=1.5, standardise_inputs=True)
    s.model.obs_norm.mean += 0.3
    s.model.eval()  # no dropout
    noise, randn_like = [], torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: noise.append(randn_like(x)) or noise[-1])
    data, (normal, imagining, alpha) = imagined(s)
    noise = [x for x in noise if x.shape == (5, 3)]  # the policy's have the shape of actions
    assert len(noise) == 8 and torch.equal(data["rewards"][:, normal], data["true_rewards"][:, normal])
    hidden, decoder = torch.zeros(5, 6), s.model.reward_decoder
    for t in range(8):
        mean, logvar = s.model.posterior(hidden)
        m = mean + logvar.exp().sqrt() * noise[t]
        for k in imagining.nonzero().squeeze(1).tolist():
            mixed = sum(alpha[k, i, :] * m[i] for i in normal.tolist())
            obs, action, next_obs = (data[name][t, k] for name in ("obs", "actions", "next_obs"))
            if case == "multihead":
                out = decoder(mixed)[int(7 * next_obs[0] + next_obs[1])]
            else:
                x = [decoder.embed_state(v - s.model.obs_norm.mean) for v in (obs, next_obs)][case == "bernoulli" :]
                x += [decoder.embed_action(action.clamp(-1, 1))] if case == "mlp" else []
                out = decoder.net(torch.cat([mixed, *(v.relu() for v in x)]))[0]
            expected = out if case == "mlp" else 1.1 * torch.sigmoid(out) - 0.1
            torch.testing.assert_close(data["rewards"][t, k], expected)
        hidden = s.model.step(data["actions"][t], data["next_obs"][t], data["rewards"][t], hidden)
    assert not torch.isclose(data["rewards"], data["true_rewards"])[:, imagining].any()


@pytest.mark.parametrize("env_id", ["GridWorldLDM", "SparsePointRobot"])
def test_encoder_p_reads_imaginary_rewards(env_id):
    """The rollout's beliefs, found step by step, are encoder-p's over rewards with imagination, not over the true."""
    s = setup(env_id)
    data, (normal, imagining, _) = imagined(s)
    torch.testing.assert_close(data["beliefs"], s.agent.beliefs(data), atol=1e-5, rtol=1e-5)
    misled = s.agent.beliefs(data | dict(rewards=data["true_rewards"]))
    assert torch.equal(misled[:, normal], s.agent.beliefs(data)[:, normal])
    assert not torch.isclose(data["beliefs"], misled)[1:, imagining].all(-1).any()


def read_by_hand(data, n, t, horizon, encoder_obs):
    """What encoder-p reads of a step: the state it led to and whether an episode ended, or the state acted on next."""
    last = t + 1 == len(data["rewards"])
    if encoder_obs == "next":
        return (data["next_obs"][t, n] if last else data["obs"][t + 1, n]).tolist()
    ended = bool(data["terminated"][t, n]) or (t + 1) % horizon == 0
    return [*data["next_obs"][t, n].tolist(), float(ended)]


@pytest.mark.parametrize("encoder_obs", ["final", "next"])
@pytest.mark.parametrize("env_id", ["GridWorldLDM", "HopperMass"])
def test_what_encoder_p_reads(env_id, encoder_obs, monkeypatch):
    """At an episode's end, early or not, too; encoder-v always the true successor, without a flag."""
    s = setup(env_id, encoder_obs=encoder_obs, ppo_windows=1)
    if env_id == "HopperMass":
        monkeypatch.setattr(type(s.envs), "healthy", lambda envs, q, v: np.arange(len(q)) % 2 == 0)  # some fall at once
    read = []
    for part in (s.agent.encoder, s.model):
        step = part.step
        monkeypatch.setattr(part, "step", lambda a, o, *x, p=part, f=step: read.append((p, o)) or f(a, o, *x))
    data, _ = imagined(s)
    assert (env_id == "HopperMass") == bool(data["terminated"].any())
    theirs = [obs for part, obs in read if part is s.agent.encoder]
    for t in range(8):
        by_hand = torch.tensor([read_by_hand(data, n, t, 4, encoder_obs) for n in range(5)])
        assert torch.equal(theirs[t], by_hand) and torch.equal(data["read_obs"][t], by_hand)
    assert torch.equal(torch.stack([obs for part, obs in read if part is s.model]), data["next_obs"])
    if encoder_obs == "final" and env_id == "GridWorldLDM":  # the cell of an episode's last step is seen
        assert not torch.equal(data["next_obs"][3], data["obs"][4])


def test_dropout_while_imagining():
    """In training the decoder's masks differ from call to call; in evaluation there are none. m is never hidden."""
    s = setup(decoder_dropout=0.5)
    m, obs, action = torch.randn(5, 3), torch.ones(5, 2), torch.zeros(5, dtype=torch.int64)
    draws = torch.stack([ldm.imagine(s.model, m, obs, action, obs, s.args) for _ in range(30)])
    assert (draws.std(0) > 0).all()
    s.model.eval()
    fixed = [ldm.imagine(s.model, m, obs, action, obs, s.args) for _ in range(2)]
    assert torch.equal(*fixed)
    s = setup(decoder_dropout=0.999)
    net, embed = s.model.reward_decoder.net, s.model.reward_decoder.embed_state
    torch.nn.init.zeros_(embed.weight), torch.nn.init.constant_(embed.bias, -1.0)  # nothing but m goes in
    expected = 1.1 * net(torch.cat([m, torch.zeros(5, 3)], -1)).squeeze(-1).sigmoid() - 0.1
    torch.testing.assert_close(ldm.imagine(s.model, m, obs, action, obs, s.args), expected)


@pytest.mark.parametrize("env_id", ["GridWorldLDM", "SparsePointRobot"])
def test_nothing_imagined_in_the_buffer(env_id, monkeypatch, tmp_path):
    """In a run, the buffer holds normal workers alone, the policy learns from imaginary rewards too, and the true ones
    set the scale."""
    made, rollout, scales, normalise = [], ldm.rollout, [], ldm.normalise_rewards
    monkeypatch.setattr(ldm, "rollout", lambda *a, **b: made.append(rollout(*a, **b)) or made[-1])
    monkeypatch.setattr(ldm, "normalise_rewards", lambda r, *a: scales.append(r.clone()) or normalise(r, *a))
    learnt, update = [], ldm.a2c_update if env_id == "GridWorldLDM" else ldm.ppo_update

    def spy(agent, optimizer, data, *rest):
        learnt.append(data | dict(scale=agent.return_norm.std.clone()))
        return update(agent, optimizer, data, *rest)

    monkeypatch.setattr(ldm, update.__name__, spy)
    words = ["--tbptt", "0", "--horizon", "5"]
    end = run(ldm, tmp_path, "--env-id", env_id, *words)
    assert len(made) == 4 and len(learnt) == 3
    stored = torch.cat([data["true_rewards"][:, data["normal"]] for data in made], 1).T
    buffer = end["processes"][0]["buffer"]
    assert buffer["full"] == len(stored) == 8 and torch.equal(buffer["store"]["rewards"], stored)
    roles = {tuple(sorted(data["normal"].tolist())) for data in made}
    assert len(roles) > 1 and all(len(role) == 2 for role in roles)
    for data, seen in zip(made[1:], learnt):
        rewards = data["rewards"] if env_id == "GridWorldLDM" else (data["rewards"] / seen["scale"]).clamp(-10, 10)
        args = SimpleNamespace(**end["args"])
        credit = ldm.gae(rewards, seen["values"], data["terminated"], data["alive"], args)
        assert torch.equal(seen["advantages"], credit[0]) and torch.equal(seen["returns"], credit[1])
        assert (data["rewards"] != data["true_rewards"]).any(0).sum() == 2
    for data, scale in zip(made, scales):
        assert torch.equal(scale, data["true_rewards"])
    assert len(scales) == (0 if env_id == "GridWorldLDM" else 4)


@pytest.mark.parametrize("words", [[], ["--num-mixture-workers", "0"], ["--reward-decoder", "mlp"]])
def test_what_is_logged(words, tmp_path, monkeypatch):
    """Returns of the normal workers alone; and of grids what is imagined, where something is."""
    made, rollout, probed, probe = [], ldm.rollout, [], ldm.probe_imagination
    monkeypatch.setattr(ldm, "rollout", lambda *a, **b: made.append(rollout(*a, **b)) or made[-1])
    monkeypatch.setattr(ldm, "probe_imagination", lambda model, m, envs: probed.append(m) or probe(model, m, envs))
    monkeypatch.setattr(ldm, "draw_pictures", lambda *_: None)
    run(ldm, tmp_path, *words, eval_interval=0)
    rows = {(int(step), key): float(value) for step, key, value in metrics(tmp_path)[1:]}
    played = [data for data in made if data["raw_rewards"].shape[1] == 4][:4]
    for i, data in enumerate(played):
        returns = [[data["raw_rewards"][5 * k : 5 * k + 5, n].sum() for n in data["normal"]] for k in range(2)]
        success = [[data["success"][5 * k : 5 * k + 5, n].any() for n in data["normal"]] for k in range(2)]
        for k in range(2):
            assert rows[40 * i + 40, f"charts/return_episode_{k + 1}"] == pytest.approx(np.mean(returns[k]), abs=1e-5)
        assert rows[40 * i + 40, "charts/success_rate"] == pytest.approx(np.mean(success[1]))
        assert ((40 * i + 40, "imagination/largest_reward") in rows) == (not words)
        assert len(data["normal"]) == (4 if "0" in words else 2)
    assert len(probed) == (0 if words else 4)
    for m, data in zip(probed, played):
        others = [n for n in range(4) if n not in data["normal"].tolist()]
        assert torch.equal(m, data["mixed"][others])


@torch.no_grad()
def test_probe_of_imagined_tasks(monkeypatch):
    """The last m^ of a rollout; best cells and rewards from maps that are known."""
    s = setup()
    data, (_, imagining, _) = imagined(s)
    assert data["mixed"].shape == (5, 3)
    test_envs, logits = make_envs("GridWorldLDM", 1, "test"), torch.full((1, 2, 49), -5.0)
    logits[0, 0, 3], logits[0, 1, 2], logits[0, 1, 24] = 2.0, 3.0, 0.0  # (0, 3), (0, 2), (3, 3): test, train, test
    monkeypatch.setattr(s.model, "cell_logits", lambda m: logits.repeat(1, m.shape[1] // 2, 1))
    found = ldm.probe_imagination(s.model, data["mixed"][imagining], test_envs)
    reward = 1.1 * torch.tensor([2.0, 3.0, 0.0]).sigmoid() - 0.1
    expected = dict(
        best_cell_is_a_test_goal=0.5,
        largest_reward=(reward[0] + reward[1]).item() / 2,
        largest_reward_of_a_test_goal=(reward[0] + reward[2]).item() / 2,
    )
    both = {f"imagination/{prefix}{name}": value for name, value in expected.items() for prefix in ("", "one_draw/")}
    assert found == pytest.approx(both)
    assert s.model.training


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_imagined_rewards_have_the_workers_dropout(training):
    """In the mean, and in their spread, those that `imagine` pays in training: draw by draw and cell by cell. Neither
    the mode nor training's random numbers change."""
    s = setup(decoder_dropout=0.6)
    for weights in s.model.reward_decoder.parameters():
        weights.mul_(3)
    m, cells, still = torch.randn(2, 3), torch.tensor([[0.0, 3.0], [5.0, 6.0]]), torch.zeros(2, dtype=torch.int64)
    draws = torch.stack([ldm.imagine(s.model, m, cells, still, cells, s.args) for _ in range(2000)])  # (2000, 2)
    s.model.train(training)
    before = torch.get_rng_state()
    many = ldm.imagined_rewards(s.model, m, 2000)[[0, 1], [3, 41]]
    assert torch.equal(before, torch.get_rng_state()) and s.model.training == training
    torch.testing.assert_close(many, draws.mean(0), atol=5 * 2**0.5 * draws.std(0).max().item() / 2000**0.5, rtol=0)
    singles = []
    for seed in range(300):
        torch.manual_seed(seed)
        singles.append(ldm.imagined_rewards(s.model, m, 1)[[0, 1], [3, 41]])
    torch.testing.assert_close(torch.stack(singles).std(0), draws.std(0), rtol=0.2, atol=0)
    s.model.eval()
    without = ldm.imagine(s.model, m, cells, still, cells, s.args)
    assert ((many - without).abs() > 0.01).any()  # the test can tell


# ---------- The policy, end to end ----------


def loop_beliefs(s, data, starts=()):
    """Encoder-p by its single step, from the prior, with gradients, or anew in windows from starts: (T + 1, N, .)."""
    hidden = torch.zeros(s.args.num_envs, s.args.hidden_dim)
    beliefs = [s.agent.encoder.belief(hidden)]
    for t in range(s.envs.meta_horizon):
        if len(starts) and t % (s.envs.meta_horizon // len(starts)) == 0:
            hidden = starts[t * len(starts) // s.envs.meta_horizon]
            beliefs[-1] = s.agent.encoder.belief(hidden)
        by_hand = [read_by_hand(data, n, t, s.envs.horizon, s.args.encoder_obs) for n in range(s.args.num_envs)]
        seen = torch.tensor(by_hand)
        hidden = s.agent.encoder.step(data["actions"][t], seen, data["rewards"][t], hidden)
        beliefs.append(s.agent.encoder.belief(hidden))
    return torch.stack(beliefs)


def test_presets_show_the_policy_what_the_authors_do():
    """Beside encoder-p's latent: in their configuration of AntDir the state, in the other two nothing."""
    shown = {
        env_id: ldm.PRESETS[env_id].get("policy_state", False) for env_id in ("HalfCheetahVel", "AntGoal", "AntDir")
    }
    assert shown == dict(HalfCheetahVel=False, AntGoal=False, AntDir=True)


@pytest.mark.parametrize("policy_state", [False, True])
def test_a2c_gradient_equals_a_loop(policy_state, monkeypatch):
    """Loss and gradient of every parameter, encoder-p's included, against re-encoding step by step."""
    s = setup(policy_state=policy_state)
    data, _ = imagined(s)
    data["alive"][5, 2] = False
    data["advantages"], data["returns"] = torch.randn(2, 8, 5)
    taken = []
    monkeypatch.setattr(ldm, "descend", lambda optimizer, loss, *_: taken.append(gradients(loss, s.agent)))
    ldm.a2c_update(s.agent, None, data, 0.1, s.args)
    beliefs, loss = loop_beliefs(s, data), 0
    for t in range(8):
        for n in range(5):
            if data["alive"][t, n]:
                x = beliefs[t, n]
                x = torch.cat([x, s.agent.obs_norm(data["obs"][t, n])]) if policy_state else x
                logprobs = s.agent.actor(x).log_softmax(-1)
                pg = -logprobs[data["actions"][t, n]] * data["advantages"][t, n]
                v = (s.agent.critic(x)[0] - data["returns"][t, n]) ** 2
                loss = loss + (pg + 0.5 * v - 0.1 * -(logprobs.exp() * logprobs).sum()) / 39
    torch.testing.assert_close(taken[0], gradients(loss, s.agent), atol=1e-6, rtol=1e-4)
    assert all(taken[0][name].any() for name in taken[0] if "encoder" in name)


@pytest.mark.parametrize("value_loss, windows", [("huber", 1), ("mse", 1), ("huber", 4)])
def test_ppo_gradient_equals_a_loop(value_loss, windows, monkeypatch):
    """The clipped objective of one minibatch and its gradient, from old log-probabilities and values that differ; with
    windows from the hidden states of the rollout."""
    s = setup(rl="ppo", value_loss=value_loss, update_epochs=1, clip_coef=0.2, ppo_windows=windows)
    data, _ = imagined(s)
    data["alive"][5, 2] = False
    data["advantages"], data["returns"] = torch.randn(2, 8, 5)
    data["logprobs"], data["values"] = -1.6 + 0.3 * torch.randn(8, 5), torch.randn(9, 5)
    torch.testing.assert_close(loop_beliefs(s, data, data["hiddens"]), loop_beliefs(s, data))  # the rollout's states
    data["hiddens"][1:] += 0.1  # not what the present weights would find
    taken = []
    monkeypatch.setattr(ldm, "descend", lambda optimizer, loss, *_: taken.append(gradients(loss, s.agent)))
    ldm.ppo_update(s.agent, None, data, 0.1, s.args)
    alive = data["alive"]
    advantages = (data["advantages"] - data["advantages"][alive].mean()) / data["advantages"][alive].std(correction=0)
    beliefs, loss, clipped = loop_beliefs(s, data, data["hiddens"]), 0, 0
    for t, n in alive.nonzero().tolist():
        logprobs, value = s.agent.actor(beliefs[t, n]).log_softmax(-1), s.agent.critic(beliefs[t, n])[0]
        ratio, a = (logprobs[data["actions"][t, n]] - data["logprobs"][t, n]).exp(), advantages[t, n]
        bound = 1.2 if a > 0 else 0.8  # beyond it nothing is gained
        outside = ratio > bound if a > 0 else ratio < bound
        clipped += outside.item()
        pg = -a * (bound if outside else ratio)
        old, target = data["values"][t, n], data["returns"][t, n]
        if value_loss == "mse":
            v = 0.5 * (value - target) ** 2
        else:
            near = old + min(max(value - old, torch.tensor(-0.2)), torch.tensor(0.2))
            v = 0.5 * max(F.huber_loss(value, target), F.huber_loss(near, target))
        loss = loss + (pg + 0.5 * v + 0.1 * (logprobs.exp() * logprobs).sum()) / 39
    assert 2 < clipped < 37
    torch.testing.assert_close(taken[0], gradients(loss, s.agent), atol=1e-6, rtol=1e-3)


def test_steps_of_a2c():
    """The first step of RMSprop (alpha 0.99, epsilon 1e-5) for actor and critic, of Adam for encoder-p; both resume."""
    s = setup()
    before = {name: p.detach().clone() for name, p in s.agent.named_parameters()}
    made = [ldm.A2COptimizer(s.agent, 0.01) for _ in range(2)]
    for p in s.agent.parameters():
        p.grad = torch.randn_like(p)
    made[0].step()
    for name, p in s.agent.named_parameters():
        g = p.grad
        step = g / (g.abs() + 1e-8) if "encoder" in name else g / (0.1 * g.abs() + 1e-5)
        torch.testing.assert_close(p.detach(), before[name] - 0.01 * step)
    made[1].load_state_dict(made[0].state_dict())
    for group in made[1].param_groups:
        group["lr"] = 0.0
    after = {name: p.detach().clone() for name, p in s.agent.named_parameters()}
    made[1].step()
    assert all(torch.equal(after[name], p) for name, p in s.agent.named_parameters())
    made[1].zero_grad()
    assert all(p.grad is None for p in s.agent.parameters())


def test_ppo_reads_whole_meta_episodes(monkeypatch):
    """Minibatches are all steps of some environments, each once an epoch; encoder-p learns; at first the ratio is 1."""
    s = setup("SparsePointRobot", num_envs=6, num_minibatches=3, update_epochs=2)
    data, _ = imagined(s)
    with torch.no_grad():
        data["logprobs"], _, data["values"] = s.agent(data["obs"], data["beliefs"][:-1], data["actions"])
    data["values"] = torch.cat([data["values"], torch.zeros(1, 6)])
    data["advantages"], data["returns"] = torch.randn(2, 8, 6)
    seen, beliefs = [], s.agent.beliefs
    monkeypatch.setattr(s.agent, "beliefs", lambda mb: seen.append(mb["advantages"]) or beliefs(mb))
    before = {name: p.clone() for name, p in s.agent.named_parameters()}
    ldm.ppo_update(s.agent, torch.optim.Adam(s.agent.parameters(), 1e-3), data, 0.01, s.args)
    normalised = (data["advantages"] - data["advantages"].mean()) / data["advantages"].std(correction=0)
    for epoch in (seen[:3], seen[3:]):
        columns = torch.cat(epoch, 1)
        for n in range(6):
            assert torch.isclose(columns, normalised[:, n : n + 1], atol=1e-4).all(0).sum() == 1
    assert all(not torch.equal(before[name], p) for name, p in s.agent.named_parameters())
    with torch.no_grad():
        for name, p in s.agent.named_parameters():
            p.copy_(before[name])
    once = data | dict(orders=data["orders"][:1])
    terms = ldm.ppo_update(s.agent, torch.optim.SGD(s.agent.parameters(), 0.0), once, 0.01, s.args)
    assert terms["clipfrac"] == 0 and terms["approx_kl"] < 1e-6


# ---------- The decoder's cost ----------


def stored(s, B=3):
    """A batch of meta-episodes on the grid, some steps of them idle."""
    data = ldm.rollout(s.envs, s.agent, s.model, s.args)
    data["rewards"] = torch.where(torch.rand(8, 5) < 0.3, 1.0, -0.1)
    data["alive"][6:, 1] = False
    return {name: data[name][:, :B] for name in ldm.Buffer.NAMES}


@DECODE
def test_reconstruction_equals_a_loop(decode):
    """Without dropout all three are the mean of -log p(r | m_t, s') over pairs, value and gradients."""
    s = setup(decode=decode, decoder_dropout=0.0)
    batch, m = stored(s), torch.randn(9, 3, 3)
    real = torch.cat([torch.ones(1, 3, dtype=torch.bool), batch["alive"]])
    loss, _ = ldm.reconstruction(s.model, m, real, batch, s.args)
    terms, decoder = [], s.model.reward_decoder
    for e in range(9):
        for b in range(3):
            for i in range(8):
                if batch["alive"][i, b] and (e == 0 or batch["alive"][e - 1, b]):
                    x = decoder.embed_state(batch["next_obs"][i, b]).relu()
                    logit = decoder.net(torch.cat([m[e, b], x]))[0]
                    terms.append(-Bernoulli(logits=logit).log_prob((batch["rewards"][i, b] == 1).float()))
    expected = sum(terms) / len(terms)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, s.model), gradients(expected, s.model), atol=1e-6, rtol=1e-4)


def test_decoders_shortcuts_are_right_in_expectation():
    """With dropout: the mean ELBO of each of --decode, and of --elbo-terms, within four standard errors of the full."""
    s = setup(decoder_dropout=0.6, decode="all")
    batch, means, errors = stored(s), [], []
    with torch.no_grad():
        s.model.reward_decoder.embed_state.weight *= 10  # so that dropout matters
        s.model.heads.bias[3:] = -6  # and m does little
    for decode, terms in (("all", 0), ("shared", 0), ("cells", 0), ("cells", 3), ("all", 3)):
        s.args.decode = s.model.reward_decoder.decode = decode
        s.args.elbo_terms = terms
        with torch.no_grad():
            losses = torch.stack([ldm.elbo(s.model, batch, s.args)[0] for _ in range(600)])
        means.append(losses.mean().item())
        errors.append(losses.std().item() / 600**0.5)
    for mean, error in zip(means[1:], errors[1:]):
        assert abs(mean - means[0]) < 4 * math.hypot(error, errors[0]), (means, errors)
    s.model.eval()
    with torch.no_grad():
        without = ldm.elbo(s.model, batch, s.args)[0].item()
    assert abs(without - means[0]) > 6 * errors[0]  # the test can tell


def test_dropout_masks():
    """--decode all has a mask for each pair; shared and cells one for each transition or cell of a task."""
    s = setup(decoder_dropout=0.5)
    decoder = s.model.reward_decoder
    torch.nn.init.constant_(decoder.embed_state.weight, 1.0)
    m, next_obs = torch.zeros(40, 2, 3), torch.ones(30, 2, 2)
    for decode in ("all", "shared", "cells"):
        decoder.decode = decode
        out = decoder(m, None, None, next_obs).detach().squeeze(-1)
        assert (out.std(1) > 0).any() and bool((out.std(0) > 1e-6).any()) == (decode == "all")


def test_visited_cells():
    """Each visited cell once; places lead back to it."""
    cell = torch.randint(49, (20, 7))
    cell[:, 3] = 5
    which, index = ldm.visited_cells(cell, 49)
    assert torch.equal(which.gather(1, index.T).T, cell)
    assert which.shape[1] == max(len(column.unique()) for column in cell.T)
    assert index[:, 3].eq(0).all() and all(len(row.unique()) == len(row) for row in which)


def test_elbo_is_varibads():
    """Encoder-v's KL and reconstruction, weighted as a summed ELBO is once divided by the decoded transitions."""
    s = setup(decoder_dropout=0.0, kl_coef=1 / 8)
    batch, randn = stored(s), torch.randn(9, 3, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: randn)
        loss, terms = ldm.elbo(s.model, batch | dict(alive=torch.ones(8, 3, dtype=torch.bool)), s.args)
    hidden, summed, prior = torch.zeros(3, 6), 0, (torch.zeros(3, 3), torch.zeros(3, 3))
    for t in range(9):
        mean, logvar = s.model.posterior(hidden)
        m = mean + (0.5 * logvar).exp() * randn[t]
        for i in range(8):
            x = s.model.reward_decoder.embed_state(batch["next_obs"][i]).relu()
            logit = s.model.reward_decoder.net(torch.cat([m, x], -1)).squeeze(-1)
            hit = (batch["rewards"][i] == 1).float()
            summed = summed + F.binary_cross_entropy_with_logits(logit, hit, reduction="sum")
        summed = summed + ldm.kl_gaussians(mean, logvar, *prior).sum()
        prior = mean, logvar
        if t < 8:
            hidden = s.model.step(batch["actions"][t], batch["next_obs"][t], batch["rewards"][t], hidden)
    torch.testing.assert_close(loss, summed / (3 * 9 * 8))


@pytest.mark.parametrize("env_id, T, counted", [("GridWorldLDM", 120, 121), ("HalfCheetahVel", 400, 50)])
def test_loss_is_the_authors(env_id, T, counted, monkeypatch):
    """Their loss of a batch, divided by the T + 1 posteriors: of each of them the mean error over the T decoded
    transitions, and the KL of each of those that they draw (all of the grid's, 50 on MuJoCo), whatever it is."""
    preset = ldm.PRESETS[env_id]
    sizes = dict(horizon=T // 4, episodes_per_task=4, decode="shared", decode_terms=0, elbo_terms=0, tbptt=0)
    s = setup(env_id, decoder_dropout=0.0, kl_coef=preset.get("kl_coef", ldm.Args.kl_coef), ppo_windows=1, **sizes)
    s.args.standardise_inputs = False
    torch.manual_seed(1)
    S, A = s.envs.single_observation_space.shape[0], s.envs.single_action_space
    actions = torch.randint(A.n, (T, 2)) if hasattr(A, "n") else torch.rand(T, 2, *A.shape) * 2 - 1
    obs, next_obs = torch.rand(2, T, 2, S) * 6
    rewards = torch.where(torch.rand(T, 2) < 0.2, 1.0, -0.1)
    batch = dict(obs=obs, next_obs=next_obs, actions=actions, rewards=rewards, alive=torch.ones(T, 2, dtype=torch.bool))
    noise = torch.randn(T + 1, 2, 3)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    hidden, errors, kls, before = torch.zeros(2, 6), [], [], Normal(torch.zeros(2, 3), torch.ones(2, 3))
    decoder = s.model.reward_decoder
    with torch.no_grad():
        loss = ldm.elbo(s.model, batch, s.args)[0]
        inputs = [decoder.embed_state(next_obs).relu()]
        if env_id == "HalfCheetahVel":
            inputs = [decoder.embed_state(obs).relu(), *inputs, decoder.embed_action(actions).relu()]
        for t in range(T + 1):
            mean, logvar = s.model.posterior(hidden)
            posterior = Normal(mean, (0.5 * logvar).exp())
            m = mean + posterior.stddev * noise[t]
            out = decoder.net(torch.cat([m.expand(T, 2, 3), *inputs], -1)).squeeze(-1)
            if env_id == "GridWorldLDM":
                errors.append(F.binary_cross_entropy_with_logits(out, (rewards == 1).float()))
            else:
                errors.append(F.mse_loss(out, rewards))
            kls.append(kl_divergence(posterior, before).sum(-1).mean())
            before = posterior
            if t < T:
                hidden = s.model.step(actions[t], next_obs[t], rewards[t], hidden)
    theirs = sum(errors) + sum(kls) * counted / (T + 1)
    torch.testing.assert_close(loss, theirs / (T + 1), rtol=1e-4, atol=1e-6)


# ---------- Runs ----------


def test_rl2(tmp_path, monkeypatch):
    """--num-mixture-workers 0: no decoder is called and none learns, nothing is stored, and the policy does learn."""
    monkeypatch.setattr(ldm.Decoder, "forward", lambda *_: 1 / 0)
    monkeypatch.setattr(ldm, "elbo", lambda *_: 1 / 0)
    made, rollout = [], ldm.rollout
    monkeypatch.setattr(ldm, "rollout", lambda *a, **b: made.append(rollout(*a, **b)) or made[-1])
    end = run(ldm, tmp_path, "--num-mixture-workers", "0", eval_interval=0)
    assert end["processes"][0]["buffer"]["full"] == 0 and not end["belief_optimizer"]["state"]
    assert all(part["state"] for part in end["optimizer"].values())
    assert all(torch.equal(data["rewards"], data["true_rewards"]) for data in made)


HARD = dict(
    GridWorldLDM=["--seed", "3", "--mix-dimensions", "--beta", "1.5", "--elbo-terms", "4"],
    SparsePointRobot=["--seed", "2", "--obs-shift", "1", "--tbptt", "5", "--decode", "all", "--state-coef", "1"]
    + ["--ppo-windows", "2"],
)


@pytest.mark.parametrize("env_id", HARD)
def test_resume(env_id, tmp_path):
    """Roles, mixture weights and dropout, too, go on where they were."""
    resume_equals_straight(ldm, tmp_path, "--env-id", env_id, *HARD[env_id])


@pytest.mark.parametrize(
    "words, named",
    [
        ("--num-mixture-workers 3", "--num-mixture-workers 3"),
        ("--num-mixture-workers -1", "--num-mixture-workers"),
        ("--beta -0.5", "--beta"),
        ("--beta nan", "--beta"),
        ("--rl ppo --num-minibatches 3", "--num-minibatches 3"),
        ("--rl ppo --ppo-windows 7", "--ppo-windows 7 does not divide"),
        ("--rl ppo --ppo-windows 5 --num-minibatches 7", "--ppo-windows 5"),
        ("--env-id SparsePointRobot --oracle", "--oracle"),
        ("--env-id SparsePointRobot --reward-decoder bernoulli", "bernoulli"),
        ("--no-belief --oracle-context", "--oracle-context"),
        ("--policy-latent-dim 0", "--policy-latent-dim"),
    ],
)
def test_bad_input(words, named, monkeypatch, capsys, tmp_path):
    """One line on stderr that names the culprit, status 2, and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    status, lines = command(ldm, monkeypatch, capsys, *TINY, *words.split())
    assert status == 2 and len(lines) == 1 and lines[0].startswith("ldm.py: ") and named in lines[0], lines
    assert not list(tmp_path.iterdir())


def test_every_split_is_evaluated(tmp_path):
    """All tasks of all splits, and pictures of what the decoder believes."""
    run(ldm, tmp_path, "--env-id", "GridWorldExtrapolation", eval_interval=0)
    tasks = json.loads((tmp_path / "eval.json").read_text())["tasks"]
    assert {split: len(named) for split, named in tasks.items()} == dict(train=16, test=16, test2=13)
    assert list(tmp_path.glob("belief_*.png"))


def test_pictures_of_imagined_tasks(tmp_path, monkeypatch):
    """Figure 4: each column's weights are those of (1), at the workers' goals; its rewards are those of m^, the mixture
    of the workers' last posteriors."""
    calls, made = [], {}
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(ldm, "draw_mixed_tasks", lambda *words: calls.append(words))
    for owner, name in ((ldm.BeliefModel, "cell_logits"), (ldm, "draw_mixture"), (ldm, "rollout")):
        function, log = getattr(owner, name), made.setdefault(name, [])
        monkeypatch.setattr(owner, name, lambda *a, f=function, log=log, **b: log.append((a, f(*a, **b))) or log[-1][1])
    run(ldm, tmp_path, "--beta", "1.5", "--mix-dimensions", eval_interval=0)
    (file, weights, paid, train) = calls[0]
    rewards, single = paid.values()
    assert file == tmp_path / "imagined.png" and train.split == "train"
    played, ((model, m), logits), (_, drawn) = made["rollout"][-1][1], *made["cell_logits"][-2:]
    goals, hidden = played["task"].int().tolist(), torch.zeros(len(played["task"]), model.encoder.gru.hidden_size)
    for t in range(10):
        hidden = model.step(*(played[name][t] for name in ("actions", "next_obs", "rewards")), hidden)
    latents = model.posterior(hidden)[0].detach()
    expected, mixed = np.zeros((5, 49)), []
    for column, (_, (_, imagining, alpha)) in zip(expected, made["draw_mixture"][-5:]):
        worker = imagining.nonzero()[0]
        for (x, y), weight in zip(goals, alpha[worker][0].mean(-1).tolist()):
            column[7 * x + y] += weight
        mixed.append(sum(weight * latent for weight, latent in zip(alpha[worker][0], latents)))
    torch.testing.assert_close(m, torch.stack(mixed).repeat(100, 1)[None], atol=1e-5, rtol=1e-4)  # draws of dropout
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    assert logits[0].view(100, 5, 49).std(0).max() > 1e-3
    assert drawn[0].shape == (5, 49)  # one draw of each mixture
    for found, of in ((rewards, logits[0]), (single, drawn[0])):
        p = Bernoulli(logits=of).probs.view(-1, 5, 49).mean(0).numpy()
        np.testing.assert_allclose(found, p * 1 + (1 - p) * -0.1, atol=1e-6)


@pytest.mark.parametrize("script", [ldm, varibad])
def test_oracle(script, tmp_path, monkeypatch):
    """--oracle trains on goals of every split, and on no others; the evaluation's splits stay what they are."""
    made, rollout, splits = [], script.rollout, []
    monkeypatch.setattr(script, "rollout", lambda *a, **b: made.append(rollout(*a, **b)) or made[-1])
    monkeypatch.setattr(common.run, "make_envs", lambda *a, **b: splits.append(a[2]) or make_envs(*a, **b))
    monkeypatch.setattr(script, "draw_grid_belief", lambda *_: None)
    end = run(script, tmp_path, "--env-id", "GridWorldLDM", "--oracle", eval_interval=0)
    of_a_picture = [splits.pop()] if script is ldm else []
    assert splits[0] == "all" and {*splits[1:]} == {"train", "test"} and of_a_picture in ([], ["all"])
    goals = torch.cat([data["task"] for data in made[: end["iteration"]]])  # evaluation comes after these
    assert set(goals.amax(1).int().tolist()) == {2, 3, 4, 5, 6}
    tasks = json.loads((tmp_path / "eval.json").read_text())["tasks"]
    assert {split: len(named) for split, named in tasks.items()} == dict(train=18, test=27)


@pytest.mark.parametrize("probability", [0, 0.5, 1])
def test_buffer_add(probability, tmp_path):
    """How often a normal worker's meta-episode is kept; the first iteration's are in any case."""
    sizes = ["--total-timesteps", "2400", "--buffer-size", "200", "--belief-updates", "1", "--checkpoint-interval", "0"]
    end = run(ldm, tmp_path, "--buffer-add", str(probability), *sizes)
    kept, later = end["processes"][0]["buffer"]["full"] - 2, 2 * (end["iteration"] - 1)
    assert later == 118 and abs(kept - probability * later) <= (22 if probability == 0.5 else 0)  # 4 deviations


@pytest.mark.parametrize(
    "context, rl", [("--no-belief", "ppo"), ("--oracle-context", "a2c"), ("--oracle-context", "ppo")]
)
def test_floor_and_ceiling(context, rl, tmp_path, monkeypatch):
    """The policy gets the state with zeros, or with the true task; nothing is imagined or learnt of it."""
    made, rollout = [], ldm.rollout
    monkeypatch.setattr(ldm, "rollout", lambda *a, **b: made.append(rollout(*a, **b)) or made[-1])
    end = run(ldm, tmp_path, context, "--rl", rl, "--ppo-windows", "2", eval_interval=0)
    for data in made:
        belief = data["task"] if context == "--oracle-context" else torch.zeros(len(data["task"]), 1)
        assert torch.equal(data["beliefs"], belief.expand_as(data["beliefs"]))
    assert not any("encoder" in name for name in end["agent"]) and end["processes"][0]["buffer"]["full"] == 0


@pytest.mark.parametrize("env_id, rl", [("GridWorldLDM", "a2c"), ("GridWorldLDM", "ppo"), ("SparsePointRobot", "ppo")])
def test_meta_device(env_id, rl, monkeypatch):
    """One iteration where tensors have shapes and no data: a second device, or a wait for numbers, raises."""
    s, device = setup(env_id, standardise_inputs=True, ppo_windows=2), torch.device("meta")
    envs = make_envs(env_id, 5, device=device, horizon=4, episodes_per_task=2)
    with device:
        model = ldm.BeliefModel(s.args, envs)
        agent = ldm.Agent(s.args, 2, envs.single_action_space, dict(b=8))
    monkeypatch.setattr(common.processes, "check_finite", lambda **_: None)  # it waits, once an update, on purpose
    optimizers = [torch.optim.RMSprop(m.parameters()) for m in (agent, model)]
    data = ldm.rollout(envs, agent, model, s.args, mixture=ldm.draw_mixture(s.args, 5, device))
    data["logprobs"], _, values = agent(data["obs"], data["beliefs"][:-1], data["actions"])
    data["values"] = torch.cat([values, agent.value(data["next_obs"][-1], data["beliefs"][-1])[None]])
    data["advantages"], data["returns"] = ldm.gae(
        data["rewards"], data["values"], data["terminated"], data["alive"], s.args
    )
    data = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in data.items()}
    data["orders"] = [torch.randperm(10, device=device)]
    (ldm.a2c_update if rl == "a2c" else ldm.ppo_update)(agent, optimizers[0], data, 0.01, s.args)
    agent.encoder.reward_norm.update(data["true_rewards"].view(-1, 1), data["alive"].flatten())
    buffer = ldm.Buffer(20, envs)
    buffer.add({name: data[name][:, data["normal"]] for name in buffer.NAMES})
    ldm.update_belief(model, optimizers[1], buffer, s.args)
