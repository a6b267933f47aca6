"""PPO: advantages, clipped objective, normalisers, actions and buffer, against loops, numpy and torch.distributions."""

import math
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, Normal

from common.envs import make_envs
from common.networks import RunningNorm
from common.rollouts import records
from tests.test_belief import SCRIPTS, orders, setup

T, H, N = 12, 4, 40


def random_episodes(ends_early):
    """Rewards, values, terminated and alive of N meta-episodes of 3 x 4 steps; each episode may end early."""
    rewards, values = torch.randn(T, N, dtype=torch.float64), torch.randn(T + 1, N, dtype=torch.float64)
    ends = torch.randint(1, 2 * H, (T // H, 1, N)) if ends_early else torch.full((T // H, 1, N), 2 * H)
    step = torch.arange(H)[:, None]
    alive, terminated = (step < ends).view(T, N), (step == ends - 1).view(T, N)
    return torch.where(alive, rewards, 0.0), values, terminated, alive


def quadratic_gae(rewards, values, bootstrap, gamma, lam):
    """A_t = sum over l of (gamma lambda)^l delta_t+l, for one sequence; bootstrap: the value behind its end."""
    delta = [r + gamma * after - v for r, v, after in zip(rewards, values, [*values[1:], bootstrap], strict=True)]
    return [sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(delta))) for i in range(len(delta))]


# ---------- Advantages ----------


@SCRIPTS
@pytest.mark.parametrize("time_limit", ["task", "terminal"])
@pytest.mark.parametrize("ends_early", [False, True])
def test_gae(script, time_limit, ends_early):
    """The definition's double sum over each meta-episode, its idle steps taken out."""
    args = SimpleNamespace(gamma=0.9, gae_lambda=0.8, time_limit=time_limit, horizon=H)
    rewards, values, terminated, alive = random_episodes(ends_early)
    advantages, returns = script.gae(rewards, values, terminated, alive, args)
    for n in range(N):
        t = [t for t in range(T) if alive[t, n]]
        ended = time_limit == "terminal" or not alive[-1, n] or terminated[-1, n]
        bootstrap = 0.0 if ended else values[T, n].item()
        expected = quadratic_gae(rewards[t, n].tolist(), values[t, n].tolist(), bootstrap, 0.9, 0.8)
        assert advantages[t, n].tolist() == pytest.approx(expected)
        assert returns[t, n].tolist() == pytest.approx(
            (values[t, n] + torch.tensor(expected, dtype=torch.float64)).tolist()
        )


@SCRIPTS
def test_gae_cut_at_each_episode(script):
    """--time-limit episode: the definition on every episode but its last step alone, whose target is its own value."""
    args = SimpleNamespace(gamma=0.9, gae_lambda=0.8, time_limit="episode", horizon=H)
    rewards, values, terminated, alive = random_episodes(ends_early=False)
    advantages, returns = script.gae(rewards, values, terminated, alive, args)
    for n in range(N):
        for first in range(0, T, H):
            t = range(first, first + H - 1)
            bootstrap = values[first + H - 1, n].item()
            expected = quadratic_gae(rewards[t, n].tolist(), values[t, n].tolist(), bootstrap, 0.9, 0.8)
            assert advantages[first : first + H, n].tolist() == pytest.approx([*expected, 0.0])
            assert returns[first + H - 1, n].item() == pytest.approx(bootstrap)


@SCRIPTS
def test_gae_cut_after_an_early_end(script):
    """--time-limit episode: no later episode's rewards or values reach an episode that terminated early."""
    args = SimpleNamespace(gamma=0.9, gae_lambda=0.8, time_limit="episode", horizon=H)
    rewards, values, terminated, alive = random_episodes(ends_early=True)
    before = script.gae(rewards, values, terminated, alive, args)[0]
    rewards[H:], values[H:] = 5 * rewards[H:], 3 * values[H:]
    after = script.gae(rewards, values, terminated, alive, args)[0]
    torch.testing.assert_close(after[:H][alive[:H]], before[:H][alive[:H]])


# ---------- The update ----------


def rollout_for_ppo(script, env_id, idle=0.0, **changes):
    """Agent, arguments and a rollout with all that `ppo_update` reads; some steps idle."""
    s = setup(script, env_id, num_envs=8, **changes)
    s.agent.obs_norm.update(2 + 2 * torch.randn(50, 2), torch.ones(50, dtype=torch.bool))
    data = script.rollout(s.envs, s.agent, s.model, s.args)
    with torch.no_grad():
        data["logprobs"], _, values = s.agent(data["obs"], data["beliefs"][:-1], data["actions"])
    data["values"] = torch.cat([values, values[:1]])
    data["alive"] = torch.rand(data["rewards"].shape) >= idle
    data["advantages"], data["returns"] = 3 + torch.randn_like(values), values + 2 * torch.randn_like(values)
    data["orders"] = orders(data, s.args)
    return s, data


ENVS = pytest.mark.parametrize("env_id", ["GridWorld", "SparsePointRobot"])


@SCRIPTS
@ENVS
def test_first_minibatch(script, env_id):
    """Before any step the new policy is the old one: ratio 1, KL 0, nothing clipped; and not so afterwards."""
    s, data = rollout_for_ppo(script, env_id, update_epochs=1)
    optimizer = torch.optim.Adam(s.agent.parameters(), lr=0.05)
    first = script.ppo_update(s.agent, optimizer, data, 0.01, s.args)
    assert abs(first["approx_kl"]) < 1e-6 and first["clipfrac"] == 0 and abs(first["policy"]) < 1e-5
    second = script.ppo_update(s.agent, optimizer, data, 0.01, s.args)
    assert second["approx_kl"] > 1e-5


@SCRIPTS
@ENVS
@pytest.mark.parametrize("value_loss", ["huber", "mse"])
def test_loss_equals_a_loop(script, env_id, value_loss):
    """Terms and gradient of one full batch, away from the old policy, against a loop over live steps."""
    options = dict(value_loss=value_loss, update_epochs=1, clip_coef=0.1, vf_coef=0.7, max_grad_norm=0.0)
    s, data = rollout_for_ppo(script, env_id, idle=0.3, **options)
    for parameter in s.agent.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    steps = [(t, n) for t in range(6) for n in range(8) if data["alive"][t, n]]
    advantages = np.array([data["advantages"][step].item() for step in steps])
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-5)
    terms = dict(policy=[], value=[], entropy=[], approx_kl=[], clipfrac=[])
    for step, advantage in zip(steps, advantages):
        x = s.agent.embed(data["obs"][step], data["beliefs"][step])
        out, value, old = s.agent.actor(x), s.agent.critic(x)[0], data["values"][step]
        dist = Categorical(logits=out) if s.agent.discrete else Normal(out, s.agent.std())
        ratio = (dist.log_prob(data["actions"][step]).sum() - data["logprobs"][step]).exp()
        terms["policy"].append(-min(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage))
        target, near = data["returns"][step], old + (value - old).clamp(-0.1, 0.1)
        if value_loss == "huber":
            terms["value"].append(0.5 * max(F.smooth_l1_loss(value, target), F.smooth_l1_loss(near, target)))
        else:
            terms["value"].append(0.5 * (value - target) ** 2)
        terms["entropy"].append(dist.entropy().sum())
        terms["approx_kl"].append(ratio - 1 - ratio.log())
        terms["clipfrac"].append((abs(ratio - 1) > 0.1).float())
    terms = {name: sum(values) / len(steps) for name, values in terms.items()}
    loss = terms["policy"] + 0.7 * terms["value"] - 0.2 * terms["entropy"]
    loss.backward()
    expected = [p.detach() - p.grad for p in s.agent.parameters()]
    logged = script.ppo_update(s.agent, torch.optim.SGD(s.agent.parameters(), 1.0), data, 0.2, s.args)
    assert 0.1 < terms["clipfrac"] < 1
    torch.testing.assert_close(logged, {name: term.detach() for name, term in terms.items()}, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close([p.detach() for p in s.agent.parameters()], expected, atol=1e-5, rtol=1e-4)


@SCRIPTS
def test_minibatches_are_a_partition(script, monkeypatch):
    """Each epoch visits every step once, in minibatches of equal size, in another order."""
    s, data = rollout_for_ppo(script, "GridWorld", num_minibatches=4, update_epochs=2)
    data["obs"] = torch.arange(48.0).view(6, 8, 1).expand(6, 8, 2)
    seen, forward = [], s.agent.forward
    monkeypatch.setattr(s.agent, "forward", lambda obs, *rest: seen.append(obs[:, 0].tolist()) or forward(obs, *rest))
    script.ppo_update(s.agent, torch.optim.SGD(s.agent.parameters(), 0.01), data, 0.01, s.args)
    assert [len(minibatch) for minibatch in seen] == [12] * 8
    epochs = [sum(seen[:4], []), sum(seen[4:], [])]
    assert epochs[0] != epochs[1] and all(sorted(epoch) == list(range(48)) for epoch in epochs)


@SCRIPTS
def test_gradient_is_clipped(script):
    """A step of plain gradient descent has the length of --max-grad-norm."""
    s, data = rollout_for_ppo(script, "GridWorld", update_epochs=1, max_grad_norm=0.01)
    before = [p.clone() for p in s.agent.parameters()]
    script.ppo_update(s.agent, torch.optim.SGD(s.agent.parameters(), 1.0), data, 0.01, s.args)
    moved = torch.cat([(p - b).flatten() for p, b in zip(s.agent.parameters(), before)]).norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


@SCRIPTS
def test_each_update_keeps_to_its_own_model(script):
    """PPO leaves the belief model alone, without even a gradient; the belief's update leaves the agent alone."""
    s, data = rollout_for_ppo(script, "GridWorld")
    assert not data["beliefs"].requires_grad
    buffer = script.Buffer(8, s.envs)
    buffer.add(data)
    parts, rate = [s.agent, s.model], [0.0] if script.__name__ == "dme" else []
    optimizers = [torch.optim.Adam(part.parameters(), lr=0.1) for part in parts]
    for updated, update in enumerate(
        (
            lambda: script.ppo_update(s.agent, optimizers[0], data, 0.01, s.args),
            lambda: script.update_belief(s.model, optimizers[1], buffer, *rate, s.args),
        )
    ):
        before = [[p.clone() for p in part.parameters()] for part in parts]
        for optimizer in optimizers:
            optimizer.zero_grad()
        update()
        other = parts[1 - updated]
        assert all(p.grad is None for p in other.parameters())
        assert all(map(torch.equal, other.parameters(), before[1 - updated]))
        assert not any(map(torch.equal, parts[updated].parameters(), before[updated]))


# ---------- Actions ----------


@SCRIPTS
def test_discrete_actions(script):
    """Frequencies against the softmax of the logits (chi-square at p = 1e-5), the mode, and Categorical's densities."""
    s, n = setup(script), 20_000
    with torch.no_grad():
        s.agent.actor[-1].bias.copy_(torch.tensor([0.0, 1.0, -2.0, 0.5, 0.0]))
        belief = torch.zeros(n, sum(s.agent.belief_sizes.values()))
        obs = torch.ones(n, 2)
        probs = s.agent.actor(s.agent.embed(obs[:1], belief[:1]))[0].softmax(-1)
        counts = s.agent.act(obs, belief).bincount(minlength=5)
        assert ((counts - n * probs).square() / (n * probs)).sum() < 28.5  # of 4 degrees of freedom
        assert (s.agent.act(obs, belief, deterministic=True) == probs.argmax()).all()
        logprob, entropy, value = s.agent(obs[:5], belief[:5], torch.arange(5))
    torch.testing.assert_close(logprob.exp(), probs)
    torch.testing.assert_close(entropy, (-(probs * probs.log()).sum()).expand(5))
    torch.testing.assert_close(value, s.agent.value(obs[:5], belief[:5]))


@SCRIPTS
def test_continuous_actions(script):
    """Mean, deviation and independence of samples against the Normal; the mean as mode; the density written out."""
    s, n = setup(script, "SparsePointRobot", std_init=0.7), 20_000
    with torch.no_grad():
        s.agent.std.raw[1] += 0.5
        belief, obs = torch.zeros(n, sum(s.agent.belief_sizes.values())), torch.ones(n, 2)
        mean, std = s.agent.act(obs[:1], belief[:1], deterministic=True)[0], s.agent.std()
        z = (s.agent.act(obs, belief) - mean) / std
        a = torch.tensor([[0.3, -1.2]])
        logprob, entropy, _ = s.agent(obs[:1], belief[:1], a)
    assert z.mean(0).abs().max() < 4 / n**0.5 and (z.std(0) - 1).abs().max() < 4 / (2 * n) ** 0.5
    assert abs((z[:, 0] * z[:, 1]).mean()) < 4 / n**0.5
    assert (z.abs() < 1).float().mean().item() == pytest.approx(0.6827, abs=0.01)
    density = sum(-(((x - m) / d) ** 2) / 2 - math.log(d * math.sqrt(2 * math.pi)) for x, m, d in zip(a[0], mean, std))
    torch.testing.assert_close(logprob[0], density)
    torch.testing.assert_close(entropy[0], (0.5 * (2 * math.pi * math.e * std**2).log()).sum())


@SCRIPTS
def test_deviation_of_actions_keeps_its_bounds(script):
    """It starts at --std-init, and nothing moves it out of its bounds."""
    s = setup(script, "SparsePointRobot", std_init=0.7, std_min=0.2, std_max=1.5)
    assert s.agent.std().tolist() == pytest.approx([0.7, 0.7])
    with torch.no_grad():
        for raw, bound in ((-50.0, 0.2), (50.0, 1.5)):
            s.agent.std.raw.fill_(raw)
            assert s.agent.std().tolist() == pytest.approx([bound, bound])


@SCRIPTS
def test_initial_policy(script):
    """Hidden layers have rows of norm 5/3; a grid's first policy is nearly uniform."""
    s = setup(script)
    for net in (s.agent.actor, s.agent.critic):
        torch.testing.assert_close(net[0].weight.norm(dim=1), torch.full((8,), 5 / 3))
    logprob, _, _ = s.agent(torch.randn(9, 2), torch.randn(9, sum(s.agent.belief_sizes.values())), torch.arange(9) % 5)
    assert (logprob.exp() - 0.2).abs().max() < 0.01


# ---------- Normalisers ----------


def test_running_norm():
    """Mean and deviation of all live rows of all batches so far, by numpy; constants do not divide by zero."""
    norm, rows = RunningNorm(3), []
    assert norm(torch.tensor([1.0, -2.0, 0.0])).tolist() == [1, -2, 0]  # nothing, before the first row
    for size in (1, 5, 300, 2):
        batch, alive = 7 + torch.tensor([0.1, 30.0, 0.0]) * torch.randn(size, 3), torch.rand(size) < 0.7
        norm.update(batch, alive)
        rows += batch[alive].double().tolist()
        if rows:
            np.testing.assert_allclose(norm.mean, np.mean(rows, 0), rtol=1e-5)
            np.testing.assert_allclose(norm.var, np.var(rows, 0), rtol=1e-3, atol=1e-5)
    standard = norm(torch.tensor(rows).float())
    np.testing.assert_allclose(standard.std(0, correction=0), [1, 1, 0], atol=1e-2)
    assert standard.isfinite().all() and norm.std[2] == pytest.approx(1e-4)
    norm = RunningNorm(1, min_std=0.5)
    norm.update(torch.tensor([[3.0], [3.2]]), torch.ones(2, dtype=torch.bool))
    assert norm(torch.tensor([4.1])).item() == pytest.approx((4.1 - 3.1) / 0.5)


@SCRIPTS
def test_normalised_rewards(script):
    """Divided by the deviation of all discounted returns so far, by a numpy loop, and clipped at 10."""
    args, norm, seen = SimpleNamespace(gamma=0.9), RunningNorm(1), []
    for scale in (0.01, 3.0):
        rewards, alive = scale * torch.randn(6, 300), torch.ones(6, 300, dtype=torch.bool)
        rewards[5, :2] = torch.tensor([50.0, -50.0]) * scale
        alive[3:, 2:9], rewards[3:, 2:9] = False, 0.0
        got = script.normalise_rewards(rewards, alive, norm, args)
        assert got[5, :2].tolist() == [10, -10]
        for n in range(300):
            for t in range(6):
                if alive[t, n]:
                    seen.append(sum(0.9 ** (t - i) * rewards[i, n].item() for i in range(t + 1)))
        np.testing.assert_allclose(got, np.clip(rewards.numpy() / np.std(seen), -10, 10), rtol=1e-4)


# ---------- Buffer ----------


@SCRIPTS
@pytest.mark.parametrize("env_id", ["GridWorld", "SparsePointRobot"])
def test_buffer_is_a_ring(script, env_id):
    """The last meta-episodes, as in a deque; samples are its rows, all equally likely; its state survives."""
    envs = make_envs(env_id, 3, horizon=2, episodes_per_task=2)
    buffer, last, number = script.Buffer(5, envs), deque(maxlen=5), 0
    filled = buffer.row_bytes * 5
    assert sum(tensor.nbytes for tensor in buffer.store.values()) == filled
    for _ in range(3):
        data = {name: torch.empty_like(records(envs)[name]) for name in script.Buffer.NAMES}
        for n in range(3):  # every number of a meta-episode says which it is, and rewards at which step, too
            for name in ("obs", "next_obs", "actions"):
                data[name][:, n] = number
            data["alive"][:, n] = number % 2
            data["rewards"][:, n] = 100 * torch.arange(4.0) + number
            last.append(number)
            number += 1
        buffer.add(data)
        assert buffer.full == len(last) and sorted(buffer.store["rewards"][: buffer.full, 0].tolist()) == sorted(last)
        state = buffer.state_dict()
        buffer.add({name: tensor + 50 if name != "alive" else tensor for name, tensor in data.items()})
        other = script.Buffer(5, envs)
        other.load_state_dict(state)  # what was saved has not moved with the buffer
        batch = other.sample(3000)
        of = batch["rewards"][0]
        assert torch.equal(batch["rewards"], of + 100 * torch.arange(4.0)[:, None])  # whole meta-episodes
        for name in ("obs", "next_obs", "actions"):
            assert (batch[name] == of.view(1, 3000, *[1] * (batch[name].dim() - 2))).all(), name
        assert torch.equal(batch["alive"], (of % 2 == 1).expand(4, 3000))
        frequency = torch.stack([(of == n).float().mean() for n in last])
        assert frequency.sum() == 1 and (frequency - 1 / len(last)).abs().max() < 4 * (0.25 / 3000) ** 0.5
        buffer = other  # goes on from the loaded state
