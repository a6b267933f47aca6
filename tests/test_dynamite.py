"""DynaMITE-RL: the loss of sessions of uneven length, rollouts and their metrics against plain loops and variBAD."""

import contextlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Normal, kl_divergence

import dynamite_rl
import varibad
from common.envs import make_envs
from common.rollouts import outcomes
from tests.test_belief import check, gradients, orders, signals  # noqa: F401
from tests.test_scripts import command, main, resume_equals_straight, run, tiny

torch.set_num_threads(1)
VARIBAD = dict(  # what switches all off
    consistency=False, conditioning=False, session_reconstruction=False, kl="sequential", encoder_obs="pre",
    termination_coef=0.0, encoder_layers=(), reset_hidden_at_session=False,
)  # fmt: skip


def setup(env_id="GridWorldAlternating", script=dynamite_rl, **changes):
    """Tiny arguments, environments, belief model and agent."""
    tiny = dict(
        num_envs=5, horizon=12, episodes_per_task=1, num_minibatches=1, hidden_dim=6, latent_dim=3, policy_layers=(8,),
        decoder_layers=(7,), state_embed=3, reward_embed=4, action_embed=2, buffer_size=20, session_process="poisson",
        elbo_terms=0, decode_terms=0, reward_decoder="mlp",
    )  # fmt: skip
    tiny |= dict(encoder_layers=(6,), condition_embed=4, prior_layers=(5,)) if script is dynamite_rl else {}
    preset = script.PRESETS.get(env_id, script.PRESETS["module:factory"])
    args = script.Args(**(preset | tiny | dict(env_id=env_id) | changes))
    check(script, args)
    sizes = {name: getattr(args, name) for name in ("horizon", "episodes_per_task", "sessions", "session_process")}
    envs = make_envs(env_id, args.num_envs, **sizes)
    torch.manual_seed(0)
    model = script.BeliefModel(args, envs)
    agent = script.Agent(args, envs.single_observation_space.shape[0], envs.single_action_space, model.belief_sizes)
    return SimpleNamespace(args=args, envs=envs, model=model, agent=agent)


def stored(s, B=4):
    """A batch of meta-episodes with sessions of uneven length, one with a single session, one with some of one step."""
    data = dynamite_rl.rollout(s.envs, s.agent, s.model, s.args)
    T = s.envs.meta_horizon
    data["rewards"] = torch.where(torch.rand(T, 5) < 0.3, 1.0, -0.1)
    ends = torch.rand(T, 5) < 0.3
    ends[:, 0], ends[2:5, 1], ends[-1] = False, True, True
    data["alive"][T - 2 :, 2] = False
    data["session_end"] = ends
    return {name: data[name][:, :B] for name in dynamite_rl.Buffer.NAMES}


def shake(s):
    """Weights large enough that beliefs differ from step to step, and that some three in ten end a session."""
    generator, logits = torch.Generator().manual_seed(3), []
    with torch.no_grad():
        for p in s.model.parameters():
            p.normal_(0, 0.4, generator=generator)
        s.model.encoder.gru.weight_ih_l0 *= 4
        s.model.heads.weight *= 2
        s.model.termination.weight *= -1  # few ends at the beginning
    handle = s.model.termination.register_forward_hook(lambda _, __, out: logits.append(out.flatten()))
    dynamite_rl.rollout(s.envs, s.agent, s.model, s.args)
    handle.remove()
    s.model.termination.bias.data -= torch.cat(logits).quantile(0.7)


def normal(mean, logvar):
    return Normal(mean, logvar.exp().sqrt())


def kl(p, q):
    return kl_divergence(p, q).sum()


def loop(s, batch, ends):
    """Each term of the loss, one transition, belief and meta-episode at a time: sums, and what they are divided by."""
    model, args, encoder = s.model, s.args, s.model.encoder
    T, B = batch["rewards"].shape
    zero, unit = torch.zeros(args.hidden_dim), Normal(torch.zeros(3), torch.ones(3))
    sums = dict(reward=0, kl=0, consistency=0, termination=0, pairs=0, kls=0, steps=0, known=0)

    def heads(hidden):
        mean, logvar = model.heads(hidden).split(3, -1)
        return normal(mean, logvar.clamp(-8, 4))

    for b in range(B):
        obs, action, next_obs, reward, alive, true_end = (
            batch[name][:, b] for name in ("obs", "actions", "next_obs", "rewards", "alive", "session_end")
        )
        hidden, condition, session = zero, torch.zeros(6), 0
        beliefs = [(0, heads(hidden), True, 0)]  # session, belief, whether it counts, transitions it has seen
        chain = [(heads(hidden), unit)]  # beside the belief before
        of_session, priors = [[]], [unit]
        for t in range(T):
            seen = obs[t + 1] if args.encoder_obs == "post" and t + 1 < T else next_obs[t]
            parts = [encoder.embeds["state"](seen), encoder.embeds["reward"](reward[t : t + 1])]
            x = torch.cat([*parts, encoder.embeds["action"](F.one_hot(action[t], 5).float())]).relu()
            if args.conditioning:
                x = torch.cat([x, encoder.condition(condition).relu()])
            for layer in encoder.layers:
                x = layer(x)
            weights = encoder.gru.weight_ih_l0, encoder.gru.weight_hh_l0, encoder.gru.bias_ih_l0, encoder.gru.bias_hh_l0
            hidden = torch.gru_cell(x[None], hidden[None], *weights)[0]
            belief, logit = heads(hidden), model.termination(hidden)[0]
            chain.append((belief, beliefs[-1][1] if len(beliefs) else unit))
            beliefs.append((session, belief, bool(alive[t]), t + 1))
            of_session[-1].append((belief, bool(alive[t])))
            if alive[t] and t + 1 < T:
                sums["known"] += 1
                if args.term_loss == "bce":
                    sums["termination"] += -Bernoulli(logits=logit).log_prob(true_end[t].float())
                else:
                    rate = torch.tensor(s.envs.sessions / s.envs.horizon)
                    sums["termination"] += kl_divergence(Bernoulli(logits=logit), Bernoulli(rate))
            if ends[t, b] and t + 1 < T:
                session += 1
                condition = torch.cat([belief.mean, belief.variance.log()]).detach()
                if args.reset_hidden_at_session:
                    hidden = zero
                of_session.append([])
                if not args.conditioning:
                    priors.append(unit)
                    if args.reset_hidden_at_session:
                        beliefs.append((session, heads(zero), True, t + 1))
                        chain.append((heads(zero), unit))
                else:
                    mean, logvar = model.prior(condition).split(3)
                    priors.append(normal(mean, logvar.clamp(-8, 4)))
                    beliefs.append((session, priors[-1], True, t + 1))
                    chain.append((priors[-1], priors[-1]))
        number = (ends[:, b].cumsum(0) - ends[:, b].int()).tolist()
        last = {k: [q for j, q, *_ in beliefs if j == k][-1] for k in range(session + 1)}
        for (k, q, counts, start), (_, before) in zip(beliefs, chain):
            if not counts:
                continue
            if args.kl != "final-only" or (q is last[k] and q is not beliefs[0][1]):
                sums["kls"] += 1
                sums["kl"] += kl(q, before if args.kl == "sequential" else priors[k])
            m = q.mean + q.stddev  # the noise is 1
            for i in range(T):
                if not alive[i] or (number[i] != k and args.session_reconstruction):
                    continue
                if args.decode_window == "all" or i >= start:
                    y = [model.reward_decoder.embed_state(next_obs[i])]
                    if args.reward_decoder == "mlp":
                        y = [model.reward_decoder.embed_state(obs[i]), *y]
                        y += [model.reward_decoder.embed_action(F.one_hot(action[i], 5).float())]
                    y = torch.cat(y).relu()
                    sums["reward"] += (model.reward_decoder.net(torch.cat([m, y]))[0] - reward[i]) ** 2
                    sums["pairs"] += 1
        for posteriors in of_session:
            final = posteriors[-1][0]
            if args.consistency_detach:
                final = Normal(final.mean.detach(), final.stddev.detach())
            for (q, _), (after, counts) in zip(posteriors, posteriors[1:]):
                sums["steps"] += counts
                sums["consistency"] += counts * (kl(after, final) - kl(q, final)).clamp(min=0)
    return sums


CASES = [
    {},
    dict(kl="final-only", consistency_detach=True),
    dict(kl="sequential", encoder_obs="pre", decode_window="future"),
    dict(reset_hidden_at_session=False, term_loss="kl"),
    dict(session_reconstruction=False),
    dict(reward_decoder="mlp-next"),
    dict(session_reconstruction=False, decode_window="future"),
    dict(conditioning=False, reset_hidden_at_session=False),
    dict(conditioning=False, kl="sequential"),
    dict(consistency=False, train_boundaries="pred"),
    dict(train_boundaries="pred", conditioning=False, encoder_layers=()),
]


@pytest.mark.parametrize("changes", CASES, ids=lambda changes: " ".join(changes) or "default")
def test_elbo_equals_a_loop(changes, monkeypatch):
    """Value, terms and gradients, over sessions of uneven length, some steps of them idle."""
    s = setup(**changes, kl_coef=0.5, consistency_coef=1.5, termination_coef=0.7)
    shake(s)
    batch = stored(s)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    found, split = [], dynamite_rl.split_sessions
    monkeypatch.setattr(dynamite_rl, "split_sessions", lambda ends: found.append(ends) or split(ends))
    loss, terms = dynamite_rl.elbo(s.model, batch, s.args)
    predicted = s.args.train_boundaries == "pred"
    assert torch.equal(found[0], batch["session_end"]) != predicted
    assert not predicted or 1 < found[0][:-1].sum() < 41
    sums = loop(s, batch, found[0])
    counts = dict(reward="pairs", kl="kls", consistency="steps", termination="known")
    expected = {name: sums[name] / sums[count] for name, count in counts.items()}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, atol=1e-5, rtol=1e-4)
        assert value > 1e-4, name
    total = expected["reward"] + 0.5 * expected["kl"] + 0.7 * expected["termination"]
    total = total + 1.5 * expected["consistency"] * s.args.consistency
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-4)
    ours, theirs = gradients(loss, s.model), gradients(total, s.model)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    assert all(g.any() for g in ours.values())


def test_all_off_is_varibad(monkeypatch):
    """Without the three changes, the sequential KL and variBAD's inputs: its loss, its terms and its gradients."""
    s, theirs = setup(**VARIBAD, kl_coef=1.2), setup(script=varibad, kl_coef=1.2)
    batch = stored(s)
    missing, unexpected = s.model.load_state_dict(theirs.model.state_dict(), strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"termination"}
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    loss, terms = dynamite_rl.elbo(s.model, batch, s.args)
    expected, its = varibad.elbo(theirs.model, batch, theirs.args)
    torch.testing.assert_close(loss, expected)
    for name in ("reward", "kl"):
        torch.testing.assert_close(terms[name], its[name])
    ours = gradients(loss, s.model)
    assert not ours.pop("termination.weight").any() and not ours.pop("termination.bias").any()
    torch.testing.assert_close(ours, gradients(expected, theirs.model), atol=1e-6, rtol=1e-4)
    for name in VARIBAD:  # each of the switches matters
        if name not in ("encoder_layers", "consistency"):
            args = dynamite_rl.Args(**(vars(s.args) | {name: getattr(dynamite_rl.Args, name)}))
            if name != "conditioning":
                other = dynamite_rl.elbo(s.model, batch, args)[0]
                assert not torch.isclose(other, loss, rtol=1e-4), name


def test_all_off_acts_as_varibad():
    """The beliefs of a rollout, too, whatever ends are predicted."""
    s, theirs = setup(**VARIBAD), setup(script=varibad)
    s.model.load_state_dict(theirs.model.state_dict(), strict=False)
    torch.nn.init.constant_(s.model.termination.bias, 5.0)
    data = dynamite_rl.rollout(s.envs, s.agent, s.model, s.args)
    batch = {name: data[name] for name in varibad.Buffer.NAMES}
    expected = theirs.model.belief(theirs.model.hiddens(batch))
    torch.testing.assert_close(data["beliefs"], expected, atol=1e-6, rtol=1e-5)
    assert data["predicted_end"].all()


def test_worked_vector():
    """Two sessions of three transitions, the beliefs after them with deviation 1: D = 2, 4.5, 0 and 1.125, 0.5, 0, so
    the sum of (4) is 2.5, whatever the first beliefs are."""
    mean = torch.tensor([[100.0, 0.0, -1.0, 2.0], [-50.0, 0.5, 0.0, -1.0]]).T.unsqueeze(-1)  # (L + 1, J, Z)
    rise = dynamite_rl.consistency(mean, torch.zeros_like(mean), torch.tensor([3, 3]), dynamite_rl.Args())
    torch.testing.assert_close(rise, torch.tensor([[2.5, 0.0], [0.0, 0.0]]))
    ends = torch.tensor([[False, False, True, False, False, True]]).T
    first, length, column, longest = dynamite_rl.split_sessions(ends)
    assert (first.tolist(), length.tolist(), column.tolist(), longest) == ([0, 3], [3, 3], [0, 0], 3)


@pytest.mark.parametrize("no", ["", "conditioning", "consistency"])
def test_preset_weighs_sums(no):
    """On the grid's sessions of 15 steps: sums weighed as Table 2 has it, R + .03 KL + .5 C + T, over all pairs."""
    preset = {name: value for name, value in dynamite_rl.PRESETS["GridWorldAlternating"].items() if "_coef" in name}
    s = setup(horizon=60, session_process="fixed", **preset, **{no: False} if no else {})
    data = dynamite_rl.rollout(s.envs, s.agent, s.model, s.args)
    batch = {name: data[name][:, :2] for name in dynamite_rl.Buffer.NAMES}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "randn_like", torch.ones_like)
        loss, _ = dynamite_rl.elbo(s.model, batch, s.args)
        sums = loop(s, batch, batch["session_end"])
    assert sums["pairs"] == 2 * 15 * 64 and sums["known"] == 2 * 59
    total = sums["termination"] + 0.5 * sums["consistency"] * s.args.consistency + sums["reward"] + 0.03 * sums["kl"]
    torch.testing.assert_close(loss, total / sums["pairs"], rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("changes", [dict(decode_window="future"), dict(kl="final-only"), {}], ids=str)
def test_weights_do_not_depend_on_lengths(changes, monkeypatch):
    """Where each step of a session is as the last, a term of the loss is the same on 4 steps and on 12."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    found = []
    for steps in (4, 12):
        s = setup(horizon=steps, sessions=1, conditioning=False, **changes)
        s.model.encoder.gru.weight_hh_l0.zero_(), s.model.heads.bias.normal_(generator=torch.Generator().manual_seed(1))
        s.model.heads.weight.zero_(), s.model.termination.weight.zero_()
        zeros = {name: torch.zeros_like(x) for name, x in stored(s).items()}
        zeros["alive"], zeros["session_end"][-1] = torch.ones_like(zeros["alive"]), True
        found.append(dynamite_rl.elbo(s.model, zeros, s.args)[1])
    for name in ("reward", "kl", "termination"):
        torch.testing.assert_close(found[0][name], found[1][name])
        assert found[0][name] > 0.01
    torch.testing.assert_close(found[0]["loss"], found[1]["loss"])


def test_conditions_carry_no_gradient():
    """c and the ends are data: nothing but p(m' | m)'s own weights and the encoder's embedding learns from them."""
    s = setup()
    batch = stored(s)
    x = s.model.embed(batch["actions"], batch["next_obs"], batch["rewards"])
    conditions, ends = s.model.find_sessions(x, batch["session_end"])
    assert not conditions.requires_grad and torch.equal(ends, batch["session_end"])
    assert not conditions[0].any() and conditions[-1, 1].any() and not conditions[:, 0].any()


def test_mixed_boundaries():
    """--train-boundaries mixed: some meta-episodes with true ends, some with predicted ones."""
    s = setup(train_boundaries="mixed")
    torch.nn.init.constant_(s.model.termination.bias, 9.0)  # always
    ends = torch.zeros(12, 400, dtype=torch.bool)
    ends[-1] = True
    found = s.model.find_sessions(torch.randn(12, 400, 9).relu(), ends)[1]
    assert found[-1].all() and (found.sum(0) == 12).logical_or(found.sum(0) == 1).all()
    assert abs((found.sum(0) == 12).float().mean() - 0.5) < 0.1 and ends[:-1].sum() == 0


class Flips:
    """4 sessions of 5 steps; the reward is +1 or -1 for a whole session, in the next the other with .8."""

    def sample(self, B):
        sign = [torch.where(torch.rand(B) < 0.5, 1.0, -1.0)]
        for _ in range(3):
            sign.append(torch.where(torch.rand(B) < 0.8, -sign[-1], sign[-1]))
        obs, ends = torch.zeros(20, B, 6), torch.zeros(20, B, dtype=torch.bool)
        ends[4::5] = True
        batch = dict(obs=obs, next_obs=obs, actions=torch.zeros(20, B, dtype=torch.int64), session_end=ends)
        return batch | dict(rewards=torch.stack(sign).repeat_interleave(5, 0), alive=torch.ones_like(ends))


def test_belief_learns_sessions():
    """What the reward will be, one step ahead, with the session ends that it predicts itself.

    The squared error of who does not adapt is 1, as it is at a session's first step for who takes it for a new task;
    who carries the last session's belief on has 3.2 there, who knows the dynamics .64.
    """
    sizes = dict(hidden_dim=16, latent_dim=2, encoder_layers=(16,), prior_layers=(16,), belief_batch=25)
    s = setup(horizon=20, session_process="fixed", **sizes)
    optimizer = torch.optim.Adam(s.model.parameters(), 1e-2)
    for _ in range(600):
        dynamite_rl.update_belief(s.model, optimizer, Flips(), s.args)
    batch, hidden, condition, errors = Flips().sample(500), torch.zeros(500, 16), torch.zeros(500, 4), []
    with torch.no_grad():
        belief = s.model.belief(hidden)
        for obs, action, reward in zip(batch["obs"], batch["actions"], batch["rewards"]):
            m = belief.chunk(2, -1)[0]
            expected = s.model.reward_decoder(m[None], obs[None], s.model.action_input(action)[None], obs[None])
            errors.append((expected.flatten() - reward).square().mean().item())
            hidden = s.model.step(action, obs, reward, condition, hidden)
            ended = s.model.terminates(hidden)
            belief, condition, hidden = s.model.next_session(ended, s.model.belief(hidden), condition, hidden)
    first, later = [errors[t] for t in (5, 10, 15)], [errors[t] for t in range(20) if t % 5]
    assert 0.95 < errors[0] < 1.1 and sum(first) / 3 < 0.85 and max(later) < 0.1, errors


# ---------- Rollouts ----------


@torch.no_grad()
def test_session_ends_are_drawn():
    """With --draw-ends as often as q(d = 1) says; without it where that is above a half."""
    for draw, chance, often in ((True, 0.3, 0.3), (True, 0.8, 0.8), (False, 0.3, 0.0), (False, 0.8, 1.0)):
        s = setup(draw_ends=draw, num_envs=50, horizon=80, buffer_size=50)
        torch.nn.init.zeros_(s.model.termination.weight)
        torch.nn.init.constant_(s.model.termination.bias, math.log(chance / (1 - chance)))
        ends = dynamite_rl.rollout(s.envs, s.agent, s.model, s.args)["predicted_end"].float()
        assert abs(ends.mean() - often) < 0.03 and (not draw or ends.std(0).min() > 0), (draw, chance)


@pytest.mark.parametrize("boundary_belief", ["predict", "stale", "initial"])
@pytest.mark.parametrize("changes", [
    {}, dict(oracle_terminations=True, encoder_obs="pre"), dict(reset_hidden_at_session=False), dict(
    conditioning=False), dict(reset_hidden_at_session=False, conditioning=False),
], ids=["predicted", "oracle", "kept", "reset, alone", "kept, alone"])  # fmt: skip
@torch.no_grad()
def test_rollout_is_algorithm_3(boundary_belief, changes):
    """Environment by environment and step by step: what the policy saw, out of what was stored."""
    s = setup(boundary_belief=boundary_belief, **changes)
    shake(s)
    data = dynamite_rl.rollout(s.envs, s.agent, s.model, s.args)
    used = data["session_end"] if s.args.oracle_terminations else data["predicted_end"]
    assert 3 < used[:-1].sum() < 50 and not torch.equal(data["session_end"], data["predicted_end"])
    for n in range(5):
        hidden, condition = torch.zeros(1, 6), torch.zeros(1, 6)
        start = belief = torch.cat(s.model.posterior(hidden), -1)
        for t in range(12):
            torch.testing.assert_close(data["beliefs"][t, n], belief[0], atol=1e-5, rtol=1e-4)
            follows = s.args.encoder_obs == "post" and t < 11
            seen = data["obs"][t + 1, n] if follows else data["next_obs"][t, n]
            inputs = data["actions"][t, n : n + 1], seen[None], data["rewards"][t, n : n + 1]
            hidden = s.model.step(*inputs, condition, hidden)
            belief = torch.cat(s.model.posterior(hidden), -1)
            assert bool(torch.sigmoid(s.model.termination(hidden)) > 0.5) == data["predicted_end"][t, n]
            if used[t, n] and t < 11:
                condition = belief
                alone = start if s.args.reset_hidden_at_session else belief  # one that has forgotten knows nothing
                prior = s.model.prior(condition) if s.args.conditioning else alone
                belief = dict(predict=prior, stale=belief, initial=start)[boundary_belief]
                hidden = torch.zeros(1, 6) if s.args.reset_hidden_at_session else hidden
        torch.testing.assert_close(data["beliefs"][12, n], belief[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("reset, conditioning", [(False, True), (True, True), (True, False)])
@torch.no_grad()
def test_loss_and_rollout_agree(reset, conditioning, predicted):
    """With true ends in both, or those predicted, the loss's beliefs are those on which the policy acted."""
    ends = dict(train_boundaries="pred") if predicted else dict(oracle_terminations=True)
    s, seen = setup(reset_hidden_at_session=reset, conditioning=conditioning, **ends), []
    shake(s)
    data = dynamite_rl.rollout(s.envs, s.agent, s.model, s.args)
    if predicted:
        data["predicted_end"][-1] = True
    with pytest.MonkeyPatch.context() as patch:
        draw = dynamite_rl.draw_posteriors
        patch.setattr(dynamite_rl, "draw_posteriors", lambda *a: seen.append(a[1:4]) or draw(*a))
        dynamite_rl.elbo(s.model, {name: data[name] for name in dynamite_rl.Buffer.NAMES}, s.args)
    (mean, logvar, real), j, used = seen[0], 0, data["predicted_end" if predicted else "session_end"]
    for n in range(5):
        starts = [0, *(used[:, n].nonzero()[:, 0] + 1).tolist()]
        for first, after in zip(starts, starts[1:]):
            length = after - first
            belief = torch.cat([mean, logvar], -1)[:length, j]  # the last one is not acted upon
            torch.testing.assert_close(belief, data["beliefs"][first:after, n], atol=1e-5, rtol=1e-4)
            assert real[: length + 1, j].all() and not real[length + 1 :, j].any()
            j += 1
    assert j == mean.shape[1] == used.sum()


def test_terminations_and_returns_of_sessions():
    """Precision, recall and each session's return, against a count by hand; the last step of all is no prediction."""
    ends = torch.tensor([[0, 1, 0, 0, 1, 1], [0, 0, 0, 1, 0, 1]]).bool().T
    guess = torch.tensor([[1, 1, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0]]).bool().T
    rewards = torch.tensor([[1, 2, 4, 8, 16, 32], [1, 1, 1, 1, 3, 3]]).float().T
    data = dict(session_end=ends, predicted_end=guess, raw_rewards=rewards)
    found = dynamite_rl.session_rates(dynamite_rl.session_sums(data))
    # sessions: 3, 28, 32 and 4, 6; three known ends, of which two were found by three guesses
    assert found == pytest.approx({
        "termination_precision": 2 / 3, "termination_recall": 2 / 3, "return_session_1": 3.5, "return_session_2": 17,
        "return_session_3": 32,
    })  # fmt: skip
    alone = dynamite_rl.session_rates(dynamite_rl.session_sums(data, slice(1, 2)))
    assert alone["termination_recall"] == 1 and alone["return_session_1"] == 4 and "return_session_3" not in alone
    many = dict(
        session_end=torch.ones(30, 1).bool(), predicted_end=torch.zeros(30, 1).bool(), raw_rewards=torch.ones(30, 1)
    )
    found = dynamite_rl.session_rates(dynamite_rl.session_sums(many))
    assert [k for k in found if "return" in k] == [f"return_session_{k}" for k in range(1, 11)]
    assert found["return_session_10"] == 1 and found["termination_recall"] == 0
    assert "termination_precision" not in found


def test_oracle_sees_the_context(tmp_path, monkeypatch):
    """--oracle-context: the cell of the goal that counts at each step, not the meta-episode's task."""
    made, rollout = [], dynamite_rl.rollout
    monkeypatch.setattr(dynamite_rl, "rollout", lambda *a, **b: made.append(rollout(*a, **b)) or made[-1])
    run(dynamite_rl, tmp_path, "--oracle-context")
    for data in made:
        assert data["beliefs"].shape[2] == 2 and torch.equal(data["beliefs"][:-1], data["contexts"])
        hit = (data["next_obs"][..., :2] == data["contexts"] / 4 - 0.5).all(-1)
        assert torch.equal(hit, data["rewards"] == 1)
    assert any((data["contexts"][0] != data["contexts"][4]).any() for data in made)


def test_ppo_losses():
    """The clipped value loss against a loop, and the norms of actor and critic, clipped apart or together."""
    s = setup(value_loss="clipped", update_epochs=1, max_grad_norm=1e-3)
    data = dynamite_rl.rollout(s.envs, s.agent, s.model, s.args)
    with torch.no_grad():
        data["logprobs"], _, value = s.agent(data["obs"], data["beliefs"][:-1], data["actions"])
    data["values"] = torch.cat([value + torch.randn_like(value), value[:1]])
    data["advantages"], data["returns"] = torch.randn(2, 12, 5)
    data["orders"] = orders(data, s.args)
    norms = []
    for joint in (False, True):
        s.args.joint_clip = joint
        terms = dynamite_rl.ppo_update(s.agent, torch.optim.SGD(s.agent.parameters(), 0.0), data, 0.01, s.args)
        norms.append([sum(p.grad.square().sum() for p in net.parameters()) for net in (s.agent.actor, s.agent.critic)])
    expected = 0
    for v, old, target in zip(value.flatten(), data["values"][:-1].flatten(), data["returns"].flatten()):
        near = min(max(v, old - 0.2), old + 0.2)
        expected += max((v - target) ** 2, (near - target) ** 2) / 2 / 60
    torch.testing.assert_close(terms["value"], expected)
    assert norms[0] == pytest.approx([1e-6, 1e-6], rel=1e-2) and sum(norms[1]) == pytest.approx(1e-6, rel=1e-2)


def test_dead_entries_of_a_belief_stay_small():
    """What the policy reads of a latent that moves by a thousandth, and of one that moves by one."""
    s, beliefs = setup(), torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    beliefs[:, 2:4] *= 1e-3
    s.agent.belief_norm.update(beliefs, torch.ones(1000, dtype=torch.bool))
    std = s.agent.embed(torch.zeros(1000, 6), beliefs)[:, 6:].std(0)
    assert (std[2:4] < 0.1).all() and (std[[0, 1, 4, 5]] > 0.9).all()


def test_presets_learn_beliefs_alike():
    """Steps of the environments for each update of the belief model: with a GPU as many as without."""
    steps = dict.fromkeys(dynamite_rl.SMALL, 400) | dict(ScratchItch=200)
    for env_id, small in dynamite_rl.SMALL.items():
        preset = dynamite_rl.PRESETS[env_id]
        rates = [p["num_envs"] * steps[env_id] / p["belief_updates"] for p in (preset, preset | small)]
        assert rates == [1600, 1600], env_id


# ---------- Runs ----------


HARD = [
    "--train-boundaries mixed --elbo-terms 3 --decode-terms 2 --seed 3",
    "--session-process bernoulli --no-session-reconstruction --decoder-dropout 0.2",
    "--env-id SparsePointRobot --tbptt 5 --no-reset-hidden-at-session --encoder-obs pre --oracle-terminations "
    "--state-coef 1",
]


@pytest.mark.parametrize("words", HARD)
def test_resume(words, tmp_path):
    resume_equals_straight(dynamite_rl, tmp_path, *words.split())


@pytest.mark.parametrize(
    "words, named",
    [
        ("--encoder-layers 8 0", "--encoder-layers"),
        ("--tbptt 5", "--tbptt"),
        ("--prior-layers 0", "--prior-layers"),
        ("--logvar-min 1", "--logvar-min"),
        ("--consistency-coef -1", "--consistency-coef"),
        ("--condition-embed 0", "--condition-embed"),
    ],
)
def test_bad_input(words, named, monkeypatch, capsys, tmp_path):
    """One line on stderr that names the culprit, status 2, and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    status, lines = command(dynamite_rl, monkeypatch, capsys, *tiny(dynamite_rl, *words.split()))
    assert status == 2 and len(lines) == 1 and lines[0].startswith("dynamite_rl.py: ") and named in lines[0], lines
    assert not list(tmp_path.iterdir())


def test_what_is_logged(tmp_path, monkeypatch):
    """Precision and recall of the ends, the KL to the learnt prior, returns of sessions: in training and evaluation,
    where each of seven tasks counts once, though two rounds of four play eight. The returns are random numbers."""
    rollout = dynamite_rl.rollout

    def noise(envs, *words):
        data = rollout(envs, *words)
        data["raw_rewards"] = torch.randn_like(data["raw_rewards"])
        return data | outcomes(data, envs)

    monkeypatch.setattr(dynamite_rl, "rollout", noise)
    monkeypatch.setattr(dynamite_rl, "draw_pictures", lambda *_: None)
    run(dynamite_rl, tmp_path, "--eval-tasks", "7", eval_interval=2)
    keys = {line.split(",")[1] for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]}
    words = ["termination_recall", "return_session_1", "return_session_4"]
    assert {f"charts/{word}" for word in words} | {f"eval/test/{word}" for word in words} <= keys
    assert {"losses/belief_kl_to_learnt_prior", "losses/belief_consistency", "losses/belief_termination"} <= keys
    result = json.loads((tmp_path / "eval.json").read_text())
    sessions = sum(result[f"eval/test/return_session_{k}"] for k in range(1, 9))  # each episode has four
    episodes = sum(result[f"eval/test/return_episode_{k}"] for k in (1, 2))
    assert sessions == pytest.approx(episodes, abs=1e-4) and len(result["tasks"]["test"]) == 7
    assert math.isfinite(sessions)


@pytest.mark.parametrize("env_id", ["GridWorldAlternating", "SparsePointRobot"])
def test_meta_device(env_id, monkeypatch):
    """One iteration where tensors have shapes and no data: a second device, or a wait for numbers, raises."""
    grid = env_id == "GridWorldAlternating"
    process, device = "poisson" if grid else "", torch.device("meta")
    s = setup(
        env_id, session_process=process, horizon=12, train_boundaries="pred", state_coef=1.0, standardise_inputs=True
    )
    s.envs.close()
    envs = make_envs(env_id, 5, device=device, horizon=12, episodes_per_task=1, session_process=process)
    with device:
        model = dynamite_rl.BeliefModel(s.args, envs)
        agent = dynamite_rl.Agent(s.args, 6 if grid else 2, envs.single_action_space, model.belief_sizes)
    # These wait, once an update, on purpose.
    monkeypatch.setattr("common.processes.check_finite", lambda **_: None)
    some = torch.zeros(7, dtype=torch.int64, device=device)
    monkeypatch.setattr(dynamite_rl, "split_sessions", lambda ends: (some, some, some, 4))
    optimizers = [torch.optim.Adam(m.parameters()) for m in (agent, model)]
    data = dynamite_rl.rollout(envs, agent, model, s.args)
    data["logprobs"], _, values = agent(data["obs"], data["beliefs"][:-1], data["actions"])
    data["values"] = torch.cat([values, agent.value(data["next_obs"][-1], data["beliefs"][-1])[None]])
    rewards = dynamite_rl.normalise_rewards(data["rewards"], data["alive"], agent.return_norm, s.args)
    targets = dynamite_rl.gae(rewards, data["values"], data["terminated"], data["alive"], s.args)
    data["advantages"], data["returns"] = targets
    data = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in data.items()}
    data["orders"] = orders(data, s.args)
    losses = dynamite_rl.ppo_update(agent, optimizers[0], data, 0.01, s.args)
    losses["sums"] = dynamite_rl.session_sums(data)
    buffer = dynamite_rl.Buffer(20, envs)
    buffer.add(data)
    losses |= dynamite_rl.update_belief(model, optimizers[1], buffer, s.args)
    assert {loss.device for loss in losses.values()} == {device}


@torch.no_grad()
def test_pictures(tmp_path, monkeypatch):
    """What is drawn: each session's walk to its end, the goal that counts, and the expected reward at each goal."""
    calls = []
    monkeypatch.setattr(dynamite_rl, "draw_sessions", lambda *words: calls.append(words))
    s = setup(num_envs=3)
    shake(s)
    for head in (s.model.heads, s.model.prior[-1]):  # no spread
        head.weight[3:], head.bias[3:] = 0, -30
    s.args.logvar_min = -30.0
    run = SimpleNamespace(folder=tmp_path, eval_envs={"test": s.envs}, evaluating=contextlib.nullcontext)
    dynamite_rl.draw_pictures(s.agent, s.model, s.args, run, {})
    assert len(calls) == 3 and len({call[0] for call in calls}) == 3
    for _, _, column, lines, walks in calls:
        ends = column["session_end"].nonzero()[0]
        assert len(walks) == len(ends) == 4 and [len(walk) - 1 for walk, _, _ in walks] == [
            b - a for a, b in zip([-1, *ends], ends)
        ]
        for end, (walk, goals, counts) in zip(ends, walks):
            assert not walk[0].any() and (abs(walk[1:] - walk[:-1]).sum(1) <= 1).all()
            assert (column["contexts"][end] == goals[counts]).all()
            assert (walk[-1] == goals[counts]).all() == (column["rewards"][end] == 1)
        assert set(lines["expected reward"]) == {"at goal 1", "at goal 2"}
    data = dynamite_rl.rollout(s.envs, s.agent, s.model, s.args, tasks=s.envs.tasks[:3], deterministic=True)
    m, goals = data["beliefs"][:-1, :, :3], data["task"][:, :4] / 4 - 0.5
    for g in (0, 1):
        place = torch.cat([goals[:, 2 * g : 2 * g + 2], goals], -1)  # there, with both goals in sight
        stay = F.one_hot(torch.zeros(3, dtype=torch.int64), 5).float()
        decoder = s.model.reward_decoder
        parts = [decoder.embed_state(place), decoder.embed_state(place), decoder.embed_action(stay)]
        x = torch.cat(parts, -1).relu().expand(12, -1, -1)
        expected = decoder.net(torch.cat([m, x], -1)).squeeze(-1)
        found = dynamite_rl.predicted_reward(
            s.model, data["beliefs"][:-1], *(v.expand(12, *v.shape) for v in (place, torch.zeros(3).long(), place))
        )
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_picture_of_sessions(tmp_path):
    """A run on the grid and one on an environment without sessions leave pictures."""
    run(dynamite_rl, tmp_path / "a", "--eval-tasks", "4", eval_interval=0)
    run(dynamite_rl, tmp_path / "b", "--env-id", "SparsePointRobot", eval_interval=0)
    for name in "ab":
        files = list((tmp_path / name).glob("sessions_*.png"))
        assert 2 <= len(files) <= 3 and all(file.stat().st_size > 20_000 for file in files)


def test_five_episodes(tmp_path):
    """Figure 6: one task for five episodes on end, evaluated from a checkpoint of one that had two."""
    run(dynamite_rl, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["sessions"], config["session_process"]) == (4, "poisson")  # the environment's own, for --boxes
    words = ["--evaluate", str(tmp_path / "checkpoint.pt"), "--episodes-per-task", "5", "--eval-tasks", "6"]
    main(dynamite_rl, *words)
    result = json.loads((tmp_path / "eval.json").read_text())
    assert {f"eval/test/return_episode_{k}" for k in range(1, 6)} <= result.keys()
    assert {len(task["return"]) for task in result["tasks"]["test"].values()} == {5}
    assert (tmp_path / "episodes.png").stat().st_size > 10_000
