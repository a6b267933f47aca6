"""laser.py: sizes, encoders, losses and rewards against loops and by hand; both phases as programs."""

import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import weakref
from types import SimpleNamespace

import pytest
import torch

import common.run
import laser
from common.arguments import flag, parse_args
from common.envs import BadInput, make_envs
from common.tokens import Slots
from tests import probe
from tests.test_belief import check, signals  # noqa: F401
from tests.test_scripts import command, metrics, same, without_success

torch.set_num_threads(1)
SIZES = dict(
    num_envs=3, horizon=12, episodes_per_task=3, meta_episodes=4, belief_batch=2, d_model=8, num_layers=2, num_heads=2,
    feed_forward=16, buffer_size=6, obs_embed=5, policy_layers=(7, 6), explore_layers=(6,), context_layers=(9, 7),
    exploit_episodes=2, eval_episodes=2, update_epochs=2, explore_epochs=2, sigma=0.5,
)  # fmt: skip
TINY = [word for name, x in SIZES.items() for word in (flag(name), *map(str, x if type(x) is tuple else [x]))]
TINY += "--belief-updates 2 --explore-iterations 3 --initial-iterations 1 --contrastive-warmup 1 --nu 2 ".split()
TINY += (
    "--task-iterations 3 --checkpoint-interval 2 --eval-interval 2 --eval-tasks 4 --norm-inputs --norm-reward".split()
)


def setup(env_id="MEWA", **changes):
    """Arguments, environments (P tasks, Q meta-episodes of each), and all networks, their small codes made larger."""
    own = dict(env_id=env_id, norm_inputs=True, norm_reward=True)
    args = laser.Args(**(laser.PRESETS.get(env_id, {}) | SIZES | own | changes))
    check(laser, args)
    envs = make_envs(
        env_id, args.num_envs * args.meta_episodes, horizon=args.horizon, episodes_per_task=args.episodes_per_task
    )
    envs.repeat = args.meta_episodes
    torch.manual_seed(0)
    S, space = envs.single_observation_space.shape[0], envs.single_action_space
    X, L = S + (space.n if hasattr(space, "n") else space.shape[0]) + 1, (args.horizon + 1) * args.episodes_per_task
    encoder, heads = laser.Encoder(args, X), laser.Heads(args, X, L)
    for head in (encoder.gamma_head, encoder.Z_head, encoder.z_head):
        head[2].weight.data *= 100
    explorer = laser.explore_agent(args, S, space)
    agent = laser.task_agent(args, S, space, 4 if args.oracle_context else L * args.d_model)
    target = copy.deepcopy(heads.task_rec)
    return SimpleNamespace(**{k: v for k, v in locals().items() if k not in ("changes", "env_id")})


@pytest.fixture(scope="module")
def mewa():
    """Networks, and a batch of two tasks' meta-episodes on MEWA, of uneven length."""
    s = setup(horizon=20)
    s.data = laser.explore(s.envs, s.encoder, s.explorer, s.args)
    s.data["valid"][1, 15:21] = s.data["valid"][5, 22 + 13 : 42] = False  # episodes over early
    for name in ("tokens", "gammas"):
        s.data[name] = s.data[name] * s.data["valid"][..., None]
    s.batch = {name: s.data[name].unflatten(0, (-1, 4))[:2] for name in ("tokens", "valid")}
    assert 0.5 < s.batch["valid"].float().mean() < 1
    return s


# ---------- Sizes ----------


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_parameters_of_table_4():
    """All numbers of the paper's table, but for an encoder's layer that the authors' code makes and never calls. The
    table has 18 numbers of observation and continuous actions; a MEWA run has 19, and discrete ones."""
    args = laser.Args(horizon=50, episodes_per_task=4)
    box = SimpleNamespace(shape=(4,))
    encoder, heads = laser.Encoder(args, 18 + 4 + 1), laser.Heads(args, 18 + 4 + 1, 204)
    assert count(encoder.f_u, encoder.gamma_head) == 1_601_600
    assert count(encoder.f_b, encoder.Z_head, encoder.z_head) == 1_635_584
    assert count(encoder) == 4_484_672 - 51 * 128 * 128
    assert count(heads) == 70_282_967
    assert count(laser.explore_agent(args, 18, box)) == 109_193
    task = laser.task_agent(args, 18, box, 204 * 128)
    assert count(task.extractor) == 3_375_488
    # The table's policy sees Gamma_t as well, in 64 units; the authors' runs of MEWA do not.
    both = laser.task_agent(dataclasses.replace(args, policy_gamma=True), 18, box, 204 * 128)
    assert count(both) - count(both.extractor) == 141_961 and not hasattr(task.gamma_embed, "weight")
    total = count(encoder, heads, both, laser.explore_agent(args, 18, box))
    assert total + 51 * 128 * 128 == 78_394_281 and total + 51 * 128 * 128 - count(heads) == 8_111_314
    four = SimpleNamespace(n=4)
    encoder, heads = laser.Encoder(args, 19 + 4 + 1), laser.Heads(args, 19 + 4 + 1, 204)
    assert (count(encoder), count(heads)) == (3_649_344, 70_283_096)
    task = laser.task_agent(args, 19, four, 204 * 128)
    assert (count(laser.explore_agent(args, 19, four)), count(task) - count(task.extractor)) == (109_253, 117_381)


def test_t_fixup():
    """Deviations of the initial weights: the scheme's, in closed form."""
    torch.manual_seed(0)
    args = laser.Args()
    net = laser.Transformer(args, 24, 204)
    scale = 0.67 * 8**-0.25
    assert net.embed.weight.std().item() == pytest.approx(128**-0.5 * 72**-0.25, rel=0.05)
    for block in net.blocks:
        for layer, factor in ((block.qkv, 2**0.5), (block.out, 1), (block.net[0], 1), (block.net[2], 1)):
            xavier = math.sqrt(2 / (layer.in_features + layer.out_features))
            assert layer.weight.std().item() == pytest.approx(scale * factor * xavier, rel=0.03)
        assert not block.qkv.bias.any() and not block.out.bias.any()


# ---------- Encoder ----------


def test_block_against_pytorch():
    """Attention and feed-forward net: torch's MultiheadAttention with the same weights."""
    torch.manual_seed(1)
    block = laser.Block(12, 3, 20)
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = block.qkv.weight, block.qkv.bias.data.normal_()
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = block.out.weight, block.out.bias
    x, memory, seen = torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.rand(2, 1, 5, 7) < 0.6
    seen[..., 0] = True
    attended = theirs(x, memory, memory, attn_mask=~seen.expand(2, 3, 5, 7).flatten(0, 1))[0]
    y = x + attended
    expected = y + torch.nn.functional.gelu(y @ block.net[0].weight.T + block.net[0].bias) @ block.net[2].weight.T
    torch.testing.assert_close(block(x, memory, seen), expected + block.net[2].bias, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask_pads, tasks", [(True, 3), (False, 3), (True, 1)])
def test_online_equals_offline(mask_pads, tasks):
    """Gamma from the caches, slot by slot in a rollout, is that of whole meta-episodes; idle slots among them, of some
    environments, and, where there is one alone, of all."""
    s = setup(horizon=50, mask_pads=mask_pads, num_envs=tasks, meta_episodes=4 if tasks > 1 else 1)
    data = laser.explore(s.envs, s.encoder, s.explorer, s.args)
    assert 0.4 < data["valid"].float().mean() < 0.9 and data["gammas"].std() > 0.1
    offline = s.encoder.gammas(data["tokens"], data["valid"])
    torch.testing.assert_close(data["gammas"], offline, atol=1e-5, rtol=0)
    codes = torch.cat([offline.transpose(0, 1)[51 * k : 51 * k + 50] for k in range(3)])  # those that actions saw
    torch.testing.assert_close(data["gamma_t"], codes, atol=1e-5, rtol=0)


def test_gamma_knows_nothing_of_later_slots(mewa):
    """A change of one slot changes its Gamma and later ones, and with f_b all that are valid."""
    tokens, valid = mewa.batch["tokens"][0], mewa.batch["valid"][0]
    changed = tokens.clone()
    changed[0, 10, 3] += 1
    different = (mewa.encoder.gammas(tokens, valid) != mewa.encoder.gammas(changed, valid)).any(-1)
    expected = valid[0] & (torch.arange(63) >= 10)
    assert torch.equal(different[0], expected) and not different[1:].any()
    different = (mewa.encoder.latents(tokens, valid)[0] != mewa.encoder.latents(changed, valid)[0]).any(-1)
    assert torch.equal(different[0], valid[0]) and not different[1:].any()


def test_idle_slots_do_not_count(mewa):
    """Whatever stands in them, codes, means and contexts are the same, and theirs are zeros."""
    s, tokens, valid = mewa, mewa.batch["tokens"][0], mewa.batch["valid"][0]
    noise = torch.where(valid[..., None], tokens, torch.randn_like(tokens))
    for x in (tokens, noise):
        gammas, (Z, pooled) = s.encoder.gammas(x, valid), s.encoder.latents(x, valid)
        c = s.encoder.context(Z, gammas, torch.ones(8), valid)
        if x is tokens:
            first = gammas, Z, pooled, c
        else:
            for a, b in zip(first, (gammas, Z, pooled, c)):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert all(not codes[~valid].any() and codes[valid].any() for codes in (gammas, Z, c))
    out = s.encoder.f_b(tokens, torch.arange(63), Slots(valid, True, every=True).seen)
    for n, k in ((1, 0), (1, 1), (3, 2)):
        own = [out[n, t].mean() for t in range(21 * k, 21 * k + 21) if valid[n, t]]
        assert pooled[n, k].item() == pytest.approx(torch.stack(own).mean().item(), abs=1e-5)


def test_slots():
    """What is computed, seen and shown, slot by slot, and what codes become; idle slots masked or not."""
    valid = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]]) > 0
    x = torch.randn(3, 6, 4)
    for mask_idle, every, computed in ((True, False, [0, 1, 3, 4]), (True, True, range(6)), (False, False, range(6))):
        slots = Slots(valid, mask_idle, every)
        shown = [[bool(valid[n, t]) or not mask_idle for t in computed] for n in range(3)]
        seen = [[shown[n][i] or t == 0 for i, t in enumerate(computed)] for n in range(3)]
        assert slots.numbers.tolist() == list(computed) and slots.shown[..., 0].tolist() == shown
        assert slots.seen[:, 0, 0].tolist() == seen
        causal = [[[seen[n][b] and t <= u for b, t in enumerate(computed)] for u in computed] for n in range(3)]
        assert slots.causal()[:, 0].tolist() == causal
        back, means = slots.spread(slots.take(x)), slots.means(slots.take(x), 2)
        for n in range(3):
            for t in range(6):
                counts = bool(valid[n, t]) or not mask_idle
                assert torch.equal(back[n, t], x[n, t] * counts)
            for k in range(2):
                own = [x[n, t].mean() for t in range(3 * k, 3 * k + 3) if valid[n, t] or not mask_idle]
                expected = torch.stack(own).mean().item() if own else 0
                assert means[n, k].item() == pytest.approx(expected, abs=1e-6)


def test_slots_that_none_has_are_left_out(mewa, monkeypatch):
    """The encoder's loss and all of its gradients are those of transformers that run over every slot."""
    s = mewa
    batch = dict(tokens=s.batch["tokens"].clone(), valid=s.batch["valid"].clone())
    for slots in (slice(17, 21), slice(21 + 9, 42), slice(62, 63)):
        batch["valid"][:, :, slots] = False
        batch["tokens"][:, :, slots] = 0
    ran, run, results = [], laser.Block.forward, []
    monkeypatch.setattr(
        laser.Block, "forward", lambda self, x, *a, **b: ran.append(x.shape[1]) or run(self, x, *a, **b)
    )
    for every, count in ((False, 63 - 4 - 12 - 1), (True, 63)):
        monkeypatch.setattr(s.encoder, "every_slot", every)
        ran.clear()
        torch.manual_seed(1)
        s.encoder.zero_grad()
        loss, _ = laser.encoder_loss(s.encoder, s.heads, s.target, batch, s.S, s.args)
        loss.backward()
        results.append([loss.detach()] + [p.grad.clone() for p in s.encoder.parameters()])
        assert set(ran) == {count}
    assert all(x.abs().max() > 0 for x in results[0])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


def test_context(mewa):
    """(9): Gamma asks Z, and then the single token of z, whose attention is a constant."""
    s, valid = mewa, mewa.batch["valid"][0]
    gammas, Z, z = torch.randn(3, 4, 63, 8)[0], torch.randn(4, 63, 8), torch.randn(8)
    c = s.encoder.context(Z, gammas, z, valid)
    x = s.encoder.h_gamma(gammas, Z, Slots(valid, True, every=True).seen)
    value = s.encoder.h_z.qkv(s.encoder.z_embed(z))[16:]
    x = x + s.encoder.h_z.out(value)
    torch.testing.assert_close(c[valid], (x + s.encoder.h_z.net(x))[valid], atol=1e-5, rtol=1e-5)
    plain = copy.deepcopy(s.encoder)
    plain.use_gamma = False  # the authors' code
    assert torch.equal(plain.context(Z, gammas, z, valid), plain.context(Z, 2 * gammas, z, valid))
    assert not torch.equal(s.encoder.context(Z, gammas, z, valid), s.encoder.context(Z, 2 * gammas, z, valid))


# ---------- Losses ----------


def test_masks():
    """Appendix B: how often what happens, that actions stay where a mask lies, and where replacements come from."""
    torch.manual_seed(0)
    N, L = 400, 60
    tokens = torch.arange(N * L).view(N, L, 1) * 10.0 + torch.arange(6.0) + 1
    valid = torch.rand(N, L) < 0.7
    kept = torch.tensor([0, 0, 0, 1, 1, 0]) > 0
    masked, selected = laser.mask_tokens(tokens, valid, kept)
    assert not (selected & ~valid).any()
    assert (selected.sum() / valid.sum()).item() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(masked[~selected], tokens[~selected])
    blank = selected & (masked[..., 0] == -1)
    assert (masked[blank][:, ~kept] == -1).all() and torch.equal(masked[blank][:, kept], tokens[blank][:, kept])
    other = selected & ~blank & (masked != tokens).any(-1)
    source = masked[other][:, 0].sub(1).div(10).long()  # the number of the slot that it came from
    assert torch.equal(source // L, other.nonzero()[:, 0]) and valid.flatten()[source].all()
    assert torch.equal(masked[other], tokens.flatten(0, 1)[source])
    assert (blank.sum() / selected.sum()).item() == pytest.approx(0.8, abs=0.02)
    assert (other.sum() / selected.sum()).item() == pytest.approx(0.1 * (1 - 1 / 42), abs=0.02)


def test_reconstruct():
    """(5) against a loop; and with Q = 1 and the identity for C, B_j itself."""
    torch.manual_seed(0)
    B, C, j = torch.randn(3, 4, 2, 7), torch.randn(3, 4, 2, 2), torch.tensor([2, 0, 3])
    out = laser.reconstruct(B, C, j)
    for b in range(3):
        for q in range(4):
            torch.testing.assert_close(out[b, q].T, B[b, j[b]].T @ C[b, q])  # columns are episodes
    one = B[:, :1]
    assert torch.equal(laser.reconstruct(one, torch.eye(2).expand(3, 1, 2, 2), torch.zeros(3, dtype=torch.long)), one)


def test_similarity():
    """Cosines of flattened codes, one pair at a time; an episode of zeros is similar to nothing."""
    gammas = torch.randn(2, 12, 4)
    gammas[1, 4:8] = 0
    S = laser.similarity(gammas, 3)
    for n in range(2):
        for i in range(3):
            for k in range(3):
                a, b = (gammas[n, 4 * x : 4 * x + 4].flatten() for x in (i, k))
                expected = torch.nn.functional.cosine_similarity(a, b, dim=0).item()
                assert S[n, i, k].item() == pytest.approx(expected, abs=1e-6)


def test_encoder_loss(mewa, monkeypatch):
    """All terms of (10), one task, meta-episode, episode and slot at a time."""
    s, args, batch = mewa, mewa.args, mewa.batch
    kept = []
    mask, drawn = laser.mask_tokens, torch.randint
    monkeypatch.setattr(laser, "mask_tokens", lambda *a: kept.append(mask(*a)) or kept[-1])
    js = []
    monkeypatch.setattr(torch, "randint", lambda *a, **b: js.append(drawn(*a, **b)) or js[-1])
    target = copy.deepcopy(s.target)
    with torch.no_grad():
        [p.normal_(0, 0.1) for p in target.parameters()]
    loss, terms = laser.encoder_loss(s.encoder, s.heads, target, batch, 19, args)
    (masked, selected), (j1, j2) = kept[0], js
    tokens, valid = batch["tokens"], batch["valid"]
    Q, K, L, e = 4, 3, 63, s.encoder

    masked, selected = masked.view(2, Q, L, -1), selected.view(2, Q, L)
    outs = {}
    for which, x in (("masked", masked), ("clean", tokens)):
        Z, pooled = zip(*[e.latents(x[b], valid[b]) for b in range(2)])
        z = e.z_head(torch.cat(pooled).flatten())
        outs[which] = z, torch.stack(Z), torch.stack([e.gammas(x[b], valid[b]) for b in range(2)])
    z, Z, gammas = outs["masked"]
    errors = []
    for b in range(2):
        c = e.context(Z[b], gammas[b], z, valid[b])
        for q in range(Q):
            for t in range(L):
                if selected[b, q, t]:
                    d = s.heads.rec(c[q, t]) - tokens[b, q, t]
                    errors.append(0.05 * d[:19].square().mean() + d[-1].square())
    assert terms["rec"].item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)
    z, Z, gammas = outs["clean"]
    recs, contrs = [], []
    for b in range(2):
        episodes = tokens[b].view(Q, K, 21, -1)
        C = s.heads.task_rec(Z[b][None], Z[b, j1[b]][None])[0]
        T = target(Z[b][None], Z[b, j2[b]][None])[0]
        all_errors = []
        for q in range(Q):
            for k in range(K):
                d = sum(episodes[j1[b], m] * C[q, m, k] for m in range(K)) - episodes[q, k]
                recs += [0.05 * d[:, :19].square().mean() + d[:, -1].square().mean()]
                all_errors.append(sum(episodes[j2[b], m] * T[q, m, k] for m in range(K)) - episodes[q, k])
        delta = 1 - math.exp(-args.xi * torch.stack(all_errors).square().mean().item())
        codes = gammas[b, j2[b]].view(K, -1)
        for i in range(K):
            for k in range(K):
                cosine = torch.nn.functional.cosine_similarity(codes[i], codes[k], dim=0)
                contrs.append((cosine - (1.0 if i == k else delta)) ** 2)
    assert terms["task_rec"].item() == pytest.approx(torch.stack(recs).mean().item(), rel=1e-4)
    assert terms["contrastive"].item() == pytest.approx(torch.stack(contrs).mean().item(), rel=1e-4)
    rows = Z[valid]
    norms = (z.norm() - 1) ** 2 + (rows.norm(dim=1) - 1).square().mean() + (rows @ z).square().mean()
    norms = norms / 3 + (gammas.view(2, Q, K, -1).norm(dim=-1) - 1).square().mean()
    assert terms["regulariser"].item() == pytest.approx(norms.item(), rel=1e-4)
    total = 0.5 * terms["rec"] + terms["task_rec"] + terms["contrastive"] + 0.125 * terms["regulariser"]
    torch.testing.assert_close(loss, total)
    assert not torch.equal(loss, laser.encoder_loss(s.encoder, s.heads, target, batch, 19, args, False)[0])


def test_a_perfect_reconstruction_has_delta_0(mewa):
    """(7): where B_j C is B, the target is 0."""
    batch = {name: x[:, :1].expand_as(x) for name, x in mewa.batch.items()}  # all meta-episodes alike

    def identity(Z, Z_j):
        return torch.eye(3).expand(2, 4, 3, 3)

    terms = laser.encoder_loss(mewa.encoder, mewa.heads, identity, batch, 19, mewa.args)[1]
    assert terms["delta"] == 0


@pytest.mark.parametrize(
    "coef, reached",
    [
        ("rec", {"f_u", "f_b", "gamma_head", "Z_head", "z_head", "h_gamma", "h_z", "z_embed", "rec"}),
        ("task_rec", {"f_b", "Z_head", "task_rec"}),
        ("contrastive", {"f_u", "gamma_head"}),
        ("regulariser", {"f_u", "f_b", "gamma_head", "Z_head", "z_head"}),
    ],
)
def test_gradient_routes(mewa, coef, reached):
    """Which parts each of the four losses teaches."""
    others = dict.fromkeys(("rec_coef", "task_rec_coef", "contrastive_coef", "regulariser_coef"), 0.0)
    args = dataclasses.replace(mewa.args, **(others | {f"{coef}_coef": 1.0}))
    for module in (mewa.encoder, mewa.heads, mewa.target):
        module.zero_grad()
    laser.encoder_loss(mewa.encoder, mewa.heads, mewa.target, mewa.batch, 19, args)[0].backward()
    parts = [*mewa.encoder.named_parameters(), *mewa.heads.named_parameters()]
    learned = {name.split(".")[0] for name, p in parts if p.grad is not None and p.grad.any()}
    assert learned == reached and all(p.grad is None for p in mewa.target.parameters())


def test_task_reconstruction_learns_from_one_meta_episode_alone(mewa):
    """(6): the loss reaches Z_j of the one that reconstructs; the Z of all are data, and for the target both are."""
    calls = []
    heads = SimpleNamespace(rec=mewa.heads.rec, task_rec=lambda *z: calls.append(z) or mewa.heads.task_rec(*z))
    laser.encoder_loss(mewa.encoder, heads, mewa.target, mewa.batch, 19, mewa.args)
    [(everything, one)] = calls
    assert one.requires_grad and not everything.requires_grad


def test_recompute_changes_nothing(mewa):
    """--recompute: the same loss and gradients, from activations that are made twice."""
    grads = []
    for recompute in (False, True):
        encoder = copy.deepcopy(mewa.encoder)
        encoder.f_u.recompute = encoder.f_b.recompute = recompute
        torch.manual_seed(3)
        laser.encoder_loss(encoder, mewa.heads, mewa.target, mewa.batch, 19, mewa.args)[0].backward()
        grads.append([p.grad.clone() for p in encoder.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


# ---------- Rewards and PPO ----------


def test_intrinsic_rewards():
    """(4) at its corners: orthogonal, equal and half-similar episodes; both readings."""
    code, paper = (laser.Args(episodes_per_task=3, sigma=0.4, reward_form=form) for form in ("code", "paper"))
    axes = torch.eye(3)
    orthogonal, equal = axes[None], axes[:1].expand(3, 3)[None]
    half = torch.stack([axes[0], (axes[0] * 0.5 + axes[1] * 0.75**0.5), axes[2]])[None]
    rewards = [laser.intrinsic_rewards(x, code)[0].tolist() for x in (orthogonal, equal, half)]
    assert rewards[0] == [0, 1, 1]
    assert rewards[1] == pytest.approx([0, math.exp(-0.5 / 0.16), math.exp(-0.5 / 0.16)])
    assert rewards[2] == pytest.approx([0, math.exp(-0.5 * 0.25 / 0.16), 1])
    d = torch.tensor([1 / 3, 1.5 / 3, 1 / 3])
    torch.testing.assert_close(laser.intrinsic_rewards(half, paper)[0], torch.exp(-d.square() / 0.4))


def test_rewards_are_paid_at_the_last_real_step():
    """(11), an episode that ends early and two that do not."""
    args = laser.Args(episodes_per_task=3, horizon=4, survival_coef=0.1, sigma=0.4)
    alive = torch.ones(12, 1, dtype=torch.bool)
    alive[6:8] = False
    data = dict(gammas=torch.eye(3)[None], alive=alive, rewards=torch.arange(12.0)[:, None] * alive)
    paid = laser.exploration_rewards(data, args)[:, 0] - 0.1 * data["rewards"][:, 0]
    torch.testing.assert_close(paid, torch.tensor([0.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]))


def test_meta_weight():
    """(3): tanh(-zeta) at equal values, 0 only when the context is worth at least -zeta more."""
    args = laser.Args(zeta=-0.13)
    v = torch.tensor([0.0, 0.13, 0.14, -5.0, 0.05])
    w = laser.meta_weight(torch.zeros(5), v, args)
    assert w[0] == pytest.approx(math.tanh(0.13)) and w[1] == w[2] == 0
    assert w[3] == pytest.approx(math.tanh(5.13)) and w[4] == pytest.approx(math.tanh(0.08))


def test_meta_bonus_is_gae_of_the_meta_reward():
    """(14): what GAE makes of r + beta w S, less what it makes of r; some episodes end early."""
    torch.manual_seed(0)
    args = laser.Args(horizon=9)
    alive = torch.arange(9)[:, None] < torch.tensor([9, 4, 1, 7])
    rewards, values, w, entropy = torch.randn(4, 9, 4) * alive
    first = laser.gae(rewards, values, alive, args)
    both = laser.gae(rewards + args.beta * w * entropy, values, alive, args)
    bonus = laser.meta_bonus(w, entropy, args)
    torch.testing.assert_close((both - first)[alive], bonus[alive], atol=1e-5, rtol=1e-5)


def true_tasks(num_envs, repeat):
    """The tasks that so many environments draw first, of which `repeat` neighbours share one."""
    return make_envs("MEWA", num_envs // repeat).reset()[1]["task"]


def exploited(s):
    """A rollout of the task policy on MEWA, with true tasks for contexts, of uneven length."""
    envs = make_envs("MEWA", 6, horizon=s.args.horizon, episodes_per_task=1)
    envs.repeat = 2
    data = laser.exploit(envs, s.agent, true_tasks(6, 2))
    assert torch.equal(data["contexts"], data["task"][::2])
    data["alive"][9:, 1] = data["alive"][4:, 4] = False
    return data


@pytest.mark.parametrize("detach, beta", [(True, 5.0), (False, 5.0), (False, 0.0)])
def test_ppo_loss(detach, beta, monkeypatch):
    """The task policy's loss in its second minibatch, by hand: advantages with the entropy of the policy of that
    moment, whose gradient counts unless detached, and without a meta-reward; PFO; idle steps left out."""
    s = setup(oracle_context=True, detach_meta_reward=detach, zeta=-1.0, beta=beta)  # so that a meta-reward counts
    [p.data.add_(0.3 * torch.randn_like(p)) for p in s.agent.parameters()]
    data = exploited(s)
    old, losses, order = copy.deepcopy(s.agent), [], []
    optimizer = torch.optim.SGD(s.agent.parameters(), lr=0.05)
    descend, permute = laser.descend, torch.randperm

    def record(optimizer, loss, *rest):
        state = copy.deepcopy(s.agent.state_dict())
        descend(optimizer, loss, *rest)
        losses.append((state, loss.item(), [p.grad.clone() for p in s.agent.parameters()]))

    monkeypatch.setattr(laser, "descend", record)
    monkeypatch.setattr(torch, "randperm", lambda *a, **b: order.append(permute(*a, **b)) or order[-1])
    args = dataclasses.replace(s.args, max_grad_norm=0.0)
    laser.ppo_update(s.agent, optimizer, data, 1, 2, 0.2, args, meta=True)

    alive, T, N = data["alive"], *data["alive"].shape
    context = data["task"][::2].repeat_interleave(2, 0).expand(T, -1, -1)
    agent = copy.deepcopy(old)
    agent.load_state_dict(losses[1][0])

    def look(agent, context=context):
        x = torch.cat([agent.obs_embed(data["obs"]).tanh(), agent.extractor(context)], -1)
        dist = torch.distributions.Categorical(logits=agent.actor(x))
        return dist.log_prob(data["actions"]), dist.entropy(), agent.critic(x)[..., 0], agent.actor[:-2](x)

    with torch.no_grad():
        logprob_old, _, v_old, hidden_old = look(old)
        w = (look(old, torch.zeros_like(context))[2] - v_old + 1.0).tanh().clamp(min=0)
        assert (w > 0.2).float().mean() > 0.5
    logprob, entropy, v, hidden = look(agent)
    advantages = [[None] * N for _ in range(T)]
    for n in range(N):
        following, next_value = 0.0, 0.0
        for t in reversed(range(int(alive[:, n].sum()))):
            bonus = args.beta * w[t, n] * (entropy[t, n].detach() if detach else entropy[t, n])
            td = data["rewards"][t, n] + bonus + 0.99 * next_value - v_old[t, n]
            following, next_value = td + 0.99 * 0.9 * following, v_old[t, n]
            advantages[t][n] = following
    rows = [(t, n) for t in range(T) for n in range(N) if alive[t, n]]
    A = torch.stack([advantages[t][n] for t, n in rows])
    normal = (A - A.mean()) / (A.std(correction=0) + 1e-5)
    mine = order[0].tensor_split(2)[1].tolist()
    total = 0
    changes = []
    for i in mine:
        t, n = rows[i]
        ratio = (logprob[t, n] - logprob_old[t, n]).exp()
        total = total - torch.min(ratio * normal[i], ratio.clamp(0.8, 1.2) * normal[i])
        goal = (A[i] + v_old[t, n]).detach()
        near = v_old[t, n] + (v[t, n] - v_old[t, n]).clamp(-0.2, 0.2)
        errors = [torch.nn.functional.smooth_l1_loss(x, goal) for x in (v[t, n], near)]
        total = total + 0.5 * 0.5 * torch.max(*errors) - 0.01 * entropy[t, n]
        changes.append(hidden[t, n] - hidden_old[t, n])
    loss = total / len(mine) + 0.1 * torch.stack(changes).norm()
    assert losses[1][1] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    loss.backward()
    for p, grad in zip(agent.parameters(), losses[1][2]):
        torch.testing.assert_close(grad, torch.zeros_like(p) if p.grad is None else p.grad, atol=1e-5, rtol=1e-3)


def test_an_update_is_the_same_twice():
    """Where threads share the work, too: they do at these sizes, those of MEWA's preset."""
    args = laser.Args(horizon=50, episodes_per_task=4, d_model=32, std_init=0.5)
    T, N, P = 50, 60, 12
    torch.manual_seed(0)
    start = laser.task_agent(args, 19, SimpleNamespace(n=4), 204 * 32)
    alive = torch.rand(T, N) < 0.9
    data = dict(obs=torch.randn(T, N, 19), actions=torch.randint(4, (T, N)), rewards=torch.randn(T, N), alive=alive)
    data["contexts"] = torch.randn(P, 204 * 32)
    after, threads = [], torch.get_num_threads()
    torch.set_num_threads(4)
    for _ in range(5):
        agent = copy.deepcopy(start)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
        torch.manual_seed(1)
        laser.ppo_update(agent, optimizer, data, 1, 2, 0.2, args, meta=True)
        after.append(agent.state_dict())
    torch.set_num_threads(threads)
    assert same(after[0], start.state_dict()) and [same(after[0], one) for one in after[1:]] == [[]] * 4


def test_idle_steps_teach_no_policy():
    """Rewards, observations and actions of idle steps do not move the exploration policy; see test_ppo_loss."""
    s = setup(horizon=20)
    data = laser.explore(s.envs, s.encoder, s.explorer, s.args)
    alive = data["alive"]
    alive[9:20, :5] = alive[45:, 3:] = False
    data["terminated"][8, :5] = data["terminated"][44, 3:] = True
    after = []
    for noise in (0.0, 100.0):
        agent = copy.deepcopy(s.explorer)
        noisy = dict(data, rewards=torch.where(alive, data["rewards"], noise))
        noisy["obs"] = torch.where(alive[..., None], data["obs"], noise)
        noisy["actions"] = torch.where(alive, data["actions"], int(noise > 0))
        torch.manual_seed(5)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
        laser.ppo_update(agent, optimizer, noisy, 2, 2, 0.1, s.args)
        after.append(agent.state_dict())
    assert same(*after) == [] and same(after[0], s.explorer.state_dict()) != []


# ---------- Buffer and rollouts ----------


@pytest.mark.parametrize("env_id", ["MEWA", "GridWorld", "SparsePointRobot"])
def test_buffer(env_id):
    """What comes out is what went in, to the last bit; a ring of tasks, their meta-episodes in another order."""
    s = setup(env_id, horizon=20)
    buffer = laser.Buffer(5, s.envs, 4)
    seen = []
    for _ in range(3):  # nine tasks into five places
        data = laser.explore(s.envs, s.encoder, s.explorer, s.args)
        seen += [*data["tokens"].unflatten(0, (3, 4))]
        buffer.add(data)
    everything = buffer.packing.unpack(buffer.store)
    for slot, number in enumerate((5, 6, 7, 8, 4)):
        assert torch.equal(everything["tokens"][slot], seen[number])
    sample, orders = buffer.sample(40), set()
    for tokens, valid in zip(sample["tokens"], sample["valid"]):
        found = [[[q for q in range(4) if torch.equal(seen[i][q], one)] for one in tokens] for i in range(4, 9)]
        (order,) = [tuple(x[0] for x in which) for which in found if all(which)]  # of one task, each meta-episode once
        assert sorted(order) == [0, 1, 2, 3] or env_id != "SparsePointRobot"  # on grids two may be alike
        orders.add(order)
        assert torch.equal(valid, (tokens != 0).any(-1) | (torch.arange(63) % 21 == 0))
    assert len(orders) > 5
    state = copy.deepcopy(buffer.state_dict())
    other = laser.Buffer(5, s.envs, 4)
    other.load_state_dict(state)
    torch.manual_seed(1)
    first = buffer.sample(3)
    torch.manual_seed(1)
    assert same(first, other.sample(3)) == []


def test_a_hundred_thousand_tasks_fit():
    """The paper's buffer, 39 GB in float32, in less than 10."""
    assert laser.Buffer(100_000, make_envs("MEWA", 1), 20).row_bytes * 100_000 < 10e9


def test_tokens_of_a_rollout():
    """(s, a before, r before), slot by slot: an episode's first has no action, and its true last state has a slot."""
    s = setup("GridWorld", num_envs=1, meta_episodes=2)
    steps, step = [], s.envs.step

    def record(action):
        out = step(action)
        steps.append((action.clone(), out[0].clone(), out[1].clone(), out[4]["final_obs"].clone()))
        return out

    s.envs.step = record
    data = laser.explore(s.envs, s.encoder, s.explorer, s.args)
    t = 0
    obs = torch.zeros(2, 2)
    for slot in range(39):
        state, action, reward = data["tokens"][:, slot].split([2, 5, 1], -1)
        if slot % 13 == 0:
            assert torch.equal(state, obs) and not action.any() and not reward.any()
        else:
            taken, obs, r, final = steps[t]
            assert torch.equal(data["obs"][t], data["tokens"][:, slot - 1, :2])
            assert torch.equal(action.argmax(-1), taken) and torch.equal(reward[:, 0], r) and torch.equal(state, final)
            t += 1
    assert t == 36 and data["valid"].all()


def test_both_phases_have_the_same_tasks(monkeypatch, tmp_path):
    """Iterations of phase 2: the contexts are of the tasks that the task policy then plays, and these are new ones."""
    tasks = []
    for name in ("explore", "exploit"):
        function = getattr(laser, name)
        monkeypatch.setattr(laser, name, lambda *a, f=function: (lambda d: tasks.append(d["task"].clone()) or d)(f(*a)))
    run(tmp_path, "--explore-iterations", 1, "--task-iterations", 2)
    many, *tasks = tasks
    assert len(many) == 12 and [len(x) for x in tasks] == [3, 6, 3, 6]
    assert torch.equal(tasks[0].repeat_interleave(2, 0), tasks[1]) and not torch.equal(tasks[0], tasks[2])
    assert torch.equal(tasks[2].repeat_interleave(2, 0), tasks[3])


def test_contexts_grow_with_exploration(mewa):
    """After k episodes the context is that of a meta-episode in which the others were not played."""
    names = mewa.envs.tasks[:12]
    torch.manual_seed(0)
    contexts = [*laser.contexts_by_episode(mewa.envs, mewa.encoder, mewa.explorer, mewa.args, names)]
    torch.manual_seed(0)
    data = laser.explore(mewa.envs, mewa.encoder, mewa.explorer, mewa.args, names)
    whole = mewa.encoder.task_context(data["tokens"], data["valid"], data["gammas"])
    assert len(contexts) == 3
    torch.testing.assert_close(contexts[-1], whole, atol=1e-5, rtol=1e-5)
    first = contexts[0].view(12, 63, 8)
    assert (
        not first[:, 21:].any()
        and first[:, :12].any()
        and not torch.equal(first[:, :21], whole.view(12, 63, 8)[:, :21])
    )
    tokens = data["tokens"][:, :21]
    alone = (
        torch.cat([tokens, torch.zeros(12, 42, 24)], 1),
        torch.cat([data["valid"][:, :21], torch.zeros(12, 42) > 0], 1),
    )
    expected = mewa.encoder.task_context(*alone, mewa.encoder.gammas(*alone))
    torch.testing.assert_close(contexts[0], expected, atol=1e-5, rtol=1e-5)


def test_gamma_of_the_task_policy():
    """--policy-gamma: what f_u makes of the running episode up to each step, in the rollout, in the log-probabilities
    that the update begins with, and beside the zeros of V(s). Idle steps among them."""
    s = setup(policy_gamma=True, horizon=30)
    [p.data.add_(0.3 * torch.randn_like(p)) for p in s.agent.parameters()]
    envs, contexts = make_envs("MEWA", 6, horizon=30, episodes_per_task=1), torch.randn(3, s.L * 8)
    envs.repeat = 2
    data = laser.exploit(envs, s.agent, contexts, s.encoder)
    alive = data["alive"]
    assert not alive.all()
    actions = torch.nn.functional.one_hot(data["actions"], 4)
    tokens = torch.cat([data["next_obs"], actions, data["rewards"][..., None]], -1) * alive[..., None]
    first = torch.cat([data["obs"][:1], torch.zeros(1, 6, 5)], -1)
    tokens, valid = torch.cat([first, tokens]), torch.cat([torch.ones_like(alive[:1]), alive])
    later = torch.zeros(62, 6, 24)  # of the other episodes of a meta-episode
    gammas = s.encoder.gammas(torch.cat([tokens, later]).transpose(0, 1), torch.cat([valid, later[..., 0] > 0]).T)
    expected = gammas.transpose(0, 1)[:30] * alive[..., None]
    torch.testing.assert_close(data["gamma_t"] * alive[..., None], expected, atol=1e-5, rtol=0)

    def look(contexts):
        features = s.agent.extractor(contexts).repeat_interleave(2, 0).expand(30, -1, -1)
        x = [s.agent.obs_embed(data["obs"]), s.agent.gamma_embed(data["gamma_t"])]
        return torch.cat([x[0].tanh(), features, x[1].tanh()], -1)

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s.agent, "forward", lambda x, action: found.append(x) or laser.Agent.forward(s.agent, x, action))
        patch.setattr(s.agent, "value", lambda x: found.append(x) or laser.Agent.value(s.agent, x))
        patch.setattr(laser, "descend", lambda *_: None)
        with torch.no_grad():
            laser.ppo_update(s.agent, None, data, 1, 1, 0.2, s.args, meta=True)
            known, blank = look(contexts)[alive], look(torch.zeros_like(contexts))[alive]
    torch.testing.assert_close(found[:3], [known, known, blank])  # of the policy, V(s, c), V(s)


@pytest.mark.parametrize("env_id", ["MEWA", "SparsePointRobot"])
@pytest.mark.parametrize("gamma", [False, True])
def test_meta_device(gamma, env_id, monkeypatch):
    """One iteration of each phase where tensors have shapes and no data: a second device, or a wait, raises."""
    device, mewa = torch.device("meta"), env_id == "MEWA"
    s = setup(env_id, policy_gamma=gamma)
    with device:
        X, L = (24 if mewa else 5), 39
        encoder, heads = laser.Encoder(s.args, X), laser.Heads(s.args, X, L)
        explorer = laser.explore_agent(s.args, s.S, s.space)
        agent = laser.task_agent(s.args, s.S, s.space, L * 8)
    envs = make_envs(env_id, 12, device=device, horizon=12, episodes_per_task=3)
    envs.repeat = 4
    # These wait, a few times an update, on purpose.
    monkeypatch.setattr("common.processes.check_finite", lambda **_: None)
    encoder.every_slot = True
    data = laser.explore(envs, encoder, explorer, s.args)
    target = copy.deepcopy(heads.task_rec)
    buffer = laser.Buffer(6, envs, 4)
    buffer.add(data)
    batch = {name: x[:2] for name, x in buffer.packing.unpack(buffer.store).items()}
    loss = laser.encoder_loss(encoder, heads, target, batch, s.S, s.args)[0]
    optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters()])
    laser.descend(optimizer, loss, [encoder, heads], 0, "encoder")
    data["rewards"] = laser.exploration_rewards(data, s.args)
    assert laser.ppo_update(explorer, torch.optim.Adam(explorer.parameters()), data, 1, 2, 0.1, s.args)[
        "policy"
    ].is_meta
    with torch.no_grad():
        contexts = encoder.task_context(data["tokens"], data["valid"], data["gammas"])
    exploit_envs = make_envs(env_id, 24, device=device, horizon=12, episodes_per_task=1)
    exploit_envs.repeat = 2
    data = laser.exploit(exploit_envs, agent, contexts, encoder)
    assert ("gamma_t" in data) == gamma
    data["rewards"] = laser.normalise_rewards(data["rewards"], data["alive"], agent.return_norm, s.args)
    laser.ppo_update(agent, torch.optim.Adam(agent.parameters()), data, 1, 2, 0.1, s.args, meta=True)


# ---------- The program ----------


def parse(*words):
    """The arguments of `python laser.py words`."""
    inherited = dict(explored=laser.ENCODER)
    return parse_args(laser.Args, laser.PRESETS, laser.SMALL, [*map(str, words)], inherited)


def main(*words):
    """`python laser.py words` in this process, every iteration logged; mistakes and failures raise.

    With one thread: at these sizes more would wait for each other.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.run, "LOG_EVERY", 1)
        patch.setattr(laser, "cores", lambda: 1)
        laser.main(parse(*words))


def run(folder, *words, eval_interval=-1):
    """A tiny run through both phases. Returns its last checkpoint."""
    main(*TINY, "--eval-interval", eval_interval, "--run-dir", folder, *words)
    return torch.load(folder / "checkpoint.pt", weights_only=True)


PHASE_1 = {"heads", "target", "belief_optimizer", "explore_optimizer"}
PHASE_2 = {"encoder", "explorer", "agent", "optimizer"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("laser") / "run"
    return folder, run(folder, eval_interval=2)


def test_what_a_run_leaves(trained):
    """Files, pictures and keys; means in eval.json agree with its tasks."""
    folder, end = trained
    names = {path.name for path in folder.iterdir()}
    pictures = {"curves.png", "contexts.png", "similarity.png"}
    assert pictures | {"config.json", "metrics.csv", "checkpoint.pt.previous", "eval.json"} <= names
    assert all((folder / name).stat().st_size > 5000 for name in pictures)
    result = json.loads((folder / "eval.json").read_text())
    tasks = result["tasks"]["test"]
    assert list(tasks) == [f"MEWA/{i}#0" for i in range(4)] and all(len(t["return"]) == 5 for t in tasks.values())
    for k, which in enumerate(("permuted", "without", "after_1", "after_2", "after_3")):
        mean = sum(task["return"][k] for task in tasks.values()) / 4
        assert result[f"eval/test/return_{which}"] == pytest.approx(mean)
    difference = result["eval/test/return_after_3"] - result["eval/test/return_permuted"]
    assert result["eval/test/return_adaptation"] == pytest.approx(difference)
    keys = {key for _, key, _ in metrics(folder)[1:]}
    losses = {f"losses/encoder_{name}" for name in ("rec", "task_rec", "contrastive", "regulariser")}
    assert losses | {"charts/exploration_return", "charts/episodic_return", "losses/explore_policy"} <= keys
    assert end["iteration"] == 6 and end["encoder"]["z_hat"].any()
    assert end.keys() >= PHASE_2 and not end.keys() & PHASE_1  # phase 2 does without
    assert end["processes"][0].keys() == {"envs", "exploit_envs", "rng"}


def test_no_success_where_none_is_defined(tmp_path, capsys):
    run(tmp_path / "run", "--env-id", "HopperMass", "--eval-tasks", 2, eval_interval=2)
    assert without_success(tmp_path / "run", capsys.readouterr().err)


def test_other_tasks():
    """Any other task, as likely as the next one, whatever its name's number; its own place where there is none."""
    torch.manual_seed(0)
    names = [f"MEWA/{i}#{n}" for n in range(2) for i in range(5)]
    drawn = torch.stack([laser.other_tasks(names) for _ in range(2000)])
    counts = torch.stack([(drawn == j).sum(0) for j in range(10)], 1)  # (of, drawn)
    same_task = torch.arange(10)[:, None] % 5 == torch.arange(10) % 5
    assert not counts[same_task].any() and (counts[~same_task] - 250).abs().max() < 5 * (250 * 7 / 8) ** 0.5
    assert laser.other_tasks(["a/0#0", "a/0#1"]).tolist() == [0, 1]


@pytest.mark.parametrize("explores, exploits", [("sampled", True), ("greedy", False)])
def test_meta_test(explores, exploits, mewa, monkeypatch):
    """What the task policy is given, and whose context: another task's, none, its own after 1, 2, 3 episodes; in all of
    them the same episodes. Either policy's actions are sampled as it was told to."""
    calls, explore, exploit = [], laser.explore, laser.exploit
    monkeypatch.setattr(laser, "explore", lambda *a: calls.append(a) or explore(*a))
    monkeypatch.setattr(laser, "exploit", lambda *a: calls.append(a) or exploit(*a))
    args = dataclasses.replace(mewa.args, eval_explore=explores)
    names, envs = [f"MEWA/{i}" for i in range(12)], make_envs("MEWA", 24, horizon=20, episodes_per_task=1)
    torch.manual_seed(0)
    data = laser.meta_test(mewa.envs, envs, mewa.encoder, mewa.explorer, mewa.agent, args, names, exploits)
    assert data["episode_return"].shape == data["episode_success"].shape == (5, 12)
    (*_, tasks, greedy), *rest = calls
    assert tasks == names and greedy == (explores == "greedy")
    for played, _, _, _, many, greedy in rest:
        assert played is envs and many == [name for name in names for _ in range(2)]
        assert greedy == exploits
    permuted, none, *own = [call[2] for call in rest]
    assert none is None and len(own) == 3 and data["contexts"] is own[-1]
    given = (permuted[:, None] == own[-1]).all(-1)  # (for, of)
    assert given.any(1).all() and not given.diagonal().any()
    returns = data["raw_rewards"].sum(0).view(12, 2).mean(1)
    torch.testing.assert_close(data["episode_return"][-1], returns)


def test_names_of_an_evaluation():
    """Means over tasks, of the two floors, and after 1, 2 episodes, in the environment's score, too."""
    tasks = {
        "a/0": dict({"return": [0.0, 1.0, 3.0, 2.0]}, success=[0.5, 0.0, 1.0, 0.5]),
        "b/0": dict({"return": [5.0, 6.0, 1.0, 8.0]}, success=[0.0, 0.25, 0.0, 1.0]),
    }
    assert {laser.what(name): value for name, value in laser.summarise(tasks).items()} == pytest.approx(
        {
            "return_permuted": 2.5, "return_without": 3.5, "return_after_1": 2, "return_after_2": 5, "return": 5,
            "return_adaptation": 2.5, "return/a": 2, "return/b": 8, "success_rate_permuted": 0.25,
            "success_rate_without": 0.125, "success_rate_after_1": 0.5, "success_rate_after_2": 0.75,
            "success_rate": 0.75, "success_rate_adaptation": 0.5, "success_rate/a": 0.5, "success_rate/b": 1,
        }
    )  # fmt: skip
    names = ["score_episode_1", "score_episode_2", "score_episode_13", "score", "score/MEWA/3", "best_fixed_score"]
    assert [laser.what(name) for name in names] == ["score_permuted", "score_without", "score_after_11", *names[3:]]


def test_probe(trained, capsys, monkeypatch):
    """python -m tests.probe: after 1, 2, 3 episodes R^2 of the context, its mean, Bayes' rule: of all, and each."""
    monkeypatch.setattr(probe, "DRAWN", 42)
    fitted, ridge = [], probe.linear_probe
    monkeypatch.setattr(probe, "linear_probe", lambda fit, *rest: fitted.append(fit) or ridge(fit, *rest))
    probe.main(str(trained[0] / "checkpoint.pt"))
    for k, (codes, mean) in enumerate(zip(fitted[::2], fitted[1::2], strict=True)):
        codes = codes.view(len(codes), -1, 8)
        used = (codes != 0).any(-1)  # the others are zeros, of later episodes: none ends early in so few steps
        assert used.float().mean() == pytest.approx((k % 3 + 1) / 3)
        torch.testing.assert_close(mean, torch.stack([c[u].mean(0) for c, u in zip(codes, used)]))
    held, _, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert int(held[3]) <= int(held[0]) < 42 / 4  # distinct tasks among the meta-episodes that are judged
    assert [row[:2] for row in rows] == [[f"{k}", name] for k in (1, 2, 3) for name in ("c", "mean", "Bayes")]
    assert all(len(row) == 7 and all(float(x) <= 1 for x in row[2:]) for row in rows)
    probe.main(str(trained[0] / "checkpoint.pt"), untrained=True)  # another encoder, the same episodes
    others = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row == other for row, other in zip(rows, others, strict=True)] == [False, False, True] * 3


def test_parts_of_the_probe():
    """Mistakes as they happened, as often as the task's probabilities say; Bayes' rule with a prior in closed form;
    ridge regression finds what is linear in more numbers than there are rows, and nothing where nothing is."""
    s = setup("MEWAUniform", num_envs=200, buffer_size=200, meta_episodes=1, horizon=50, episodes_per_task=4)
    data = laser.explore(s.envs, s.encoder, s.explorer, s.args)
    met, mistaken = probe.mistakes(*(data[name] for name in ("obs", "actions", "next_obs", "alive")))
    expected = data["task"] * met
    deviation = (expected * (1 - data["task"])).sum(0).sqrt()
    assert met.sum(0).min() > 100 and ((mistaken.sum(0) - expected.sum(0)).abs() < 4 * deviation).all()
    assert ((mistaken <= met) & (mistaken >= 0)).all()
    grid = torch.cartesian_prod(*[torch.linspace(0.05, 0.95, 10)] * 4)  # a uniform prior, in cells
    found = probe.bayes(grid, met[:20], mistaken[:20])
    torch.testing.assert_close(found, (mistaken[:20] + 1) / (met[:20] + 2), atol=0.03, rtol=0)
    y = torch.randn(200, 3)
    x = y @ torch.randn(3, 300) + 3 * torch.randn(200, 300)
    words = probe.r_squared(probe.linear_probe(x[:150], y[:150], x[150:]), y[150:]).split()
    assert len(words) == 4 and float(words[0]) > 0.8
    assert float(probe.r_squared(probe.linear_probe(x[:150], torch.randn(150, 3), x[150:]), y[150:]).split()[0]) < 0.1


def test_evaluation_again(trained, tmp_path, capsys):
    """--evaluate gives the numbers written at the end of training."""
    folder, _ = trained
    shutil.copy(folder / "checkpoint.pt", tmp_path)
    main("--evaluate", tmp_path / "checkpoint.pt")
    assert json.loads((tmp_path / "eval.json").read_text()) == json.loads((folder / "eval.json").read_text())


def test_seeds_and_evaluation(trained, tmp_path):
    """The same run without evaluations: bitwise the same weights and metrics; another seed: another run."""
    folder, end = trained
    again = run(tmp_path / "again")
    assert {p for p in same(end, again) if not p.startswith(("/args/", "/metrics_bytes"))} == set()
    other = run(tmp_path / "other", "--seed", "2")
    assert same(end["agent"], other["agent"]) and same(end["encoder"], other["encoder"])
    rows = [row for row in metrics(folder) if not row[1].startswith("eval/")]
    assert rows == metrics(tmp_path / "again") and len(rows) > 60


def test_compile(trained, tmp_path, monkeypatch):
    """Phase 1 learns the same with traced transformers, but for rounding; code made of a trace: tests/test_trust.py."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend="aot_eager"))
    run(tmp_path / "run", "--compile", "--task-iterations", 0)
    found, expected = (
        [float(value) for _, key, value in metrics(folder) if key.startswith("losses/encoder_")]
        for folder in (tmp_path / "run", trained[0])
    )
    assert len(found) == 18 and found == pytest.approx(expected, rel=1e-3, abs=1e-6)


IDLE = "--horizon 30 --num-envs 1 --meta-episodes 1 --belief-batch 1".split()  # episodes that end before their slots


@pytest.mark.parametrize("stop, words", [(1, []), (2, []), (3, []), (4, []), (2, IDLE), (4, IDLE)])
def test_resume(stop, words, tmp_path):
    """Stopped in either phase, or between them, and resumed: bit for bit what the run makes without a stop."""
    straight, folder, save = tmp_path / "straight", tmp_path / "resumed", common.run.save_checkpoint

    def save_and_keep(path, state):
        save(path, state)
        if state["iteration"] == stop:
            shutil.copytree(path.parent, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.run, "save_checkpoint", save_and_keep)
        run(straight, "--checkpoint-interval", 1, *words)
    main("--resume", folder / "checkpoint.pt")
    again = torch.load(folder / "checkpoint.pt")
    end = torch.load(straight / "checkpoint.pt")
    assert set(same(end, again)) <= {"/args/run_dir", "/args/resume", "/metrics_bytes"}
    assert metrics(straight) == metrics(folder)


def test_phase_2_of_another_run(trained, tmp_path):
    """--explored: encoder and exploration policy of that run, unchanged, and a new task policy. What the encoder was
    made for need not be said again."""
    folder, end = trained
    args = vars(parse("--explored", folder / "checkpoint.pt", "--seed", 5))
    assert all(args[name] == end["args"][name] for name in laser.ENCODER) and args["d_model"] == 8
    other = run(tmp_path, "--explored", folder / "checkpoint.pt", "--seed", "5")
    assert same(end["encoder"], other["encoder"]) == [] == same(end["explorer"], other["explorer"])
    assert other["iteration"] == 3 and same(end["agent"], other["agent"])
    assert not other.keys() & PHASE_1 and {k for _, k, _ in metrics(tmp_path)} >= {"charts/episodic_return"}


@pytest.mark.parametrize("context", ["--no-belief", "--oracle-context", "--oracle-context --oracle-split train"])
def test_floor_and_ceiling(context, tmp_path, monkeypatch):
    """Phase 2 alone: with zeros, or the true task, for a context; of which split is said, or the preset's."""
    made, exploit = [], laser.exploit
    monkeypatch.setattr(laser, "exploit", lambda *a: made.append(exploit(*a)) or made[-1])
    end = run(tmp_path, *context.split(), eval_interval=0)
    assert end["iteration"] == 3 and not end.keys() & PHASE_1
    for data in made[:3]:
        truth = data["task"][::2]
        assert torch.equal(data["contexts"], truth if "--oracle" in context else torch.zeros(3, 1))
        twelve = make_envs("MEWA", 1, "test").task_table[:12]
        known = (truth[:, None] == twelve).all(-1).any(1)
        assert known.all() if context == "--oracle-context" else not known.any()


@pytest.mark.parametrize("env_id", ["GridWorld", "SparsePointRobot", "HopperMass"])
def test_other_environments(env_id, tmp_path, monkeypatch):
    """Discrete and continuous actions, and returns that are finite; Hopper falls in some twenty steps. Continuous task
    policies are evaluated with their most likely actions and, as test/sampled, with sampled ones."""
    played, exploit = [], laser.exploit

    def spy(envs, agent, contexts, encoder=None, tasks=None, deterministic=False):
        data = exploit(envs, agent, contexts, encoder, tasks, deterministic)
        if tasks and envs.split == "test":
            played.append((deterministic, data["raw_rewards"].sum().item() / envs.num_envs))
        return data

    monkeypatch.setattr(laser, "exploit", spy)
    horizon = 80 if env_id == "HopperMass" else 12
    run(tmp_path, "--env-id", env_id, "--eval-tasks", 3, "--horizon", horizon, eval_interval=0)
    rows = {key: float(value) for _, key, value in metrics(tmp_path)[1:]}
    assert all(math.isfinite(value) for value in rows.values())
    kinds = {"test": True} if env_id == "GridWorld" else {"test": True, "test/sampled": False}
    assert {kind for kind, _ in played} == {*kinds.values()}
    for split, deterministic in kinds.items():
        theirs = [mean for kind, mean in played if kind == deterministic]
        names = "permuted", "without", "after_1", "after_2", "after_3"
        assert [rows[f"eval/{split}/return_{name}"] for name in names] == pytest.approx(theirs)


def test_a_signal_ends_the_run_saved(tmp_path, monkeypatch):
    """SIGTERM in the second iteration: it is finished and saved."""
    made, explore = [], laser.explore

    def interrupted(*a):
        made.append(explore(*a))
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return made[-1]

    monkeypatch.setattr(laser, "explore", interrupted)
    assert run(tmp_path, "--checkpoint-interval", 0)["iteration"] == 2


def test_a_nan_stops_the_run(tmp_path, monkeypatch, capsys):
    """One sentence with its name, and the last checkpoint stands."""
    explore = laser.explore

    def broken(*a):
        data = explore(*a)
        data["rewards"][3, 1] = math.nan if (tmp_path / "checkpoint.pt").exists() else 0.0
        return data

    monkeypatch.setattr(laser, "explore", broken)
    with pytest.raises(FloatingPointError, match="iteration 3: reward is not finite; the last checkpoint stands"):
        run(tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt")["iteration"] == 2


@pytest.mark.parametrize(
    "words, named",
    [
        ("--buffer-size 900000000 --explore-iterations 900000000", "GB are free"),
        ("--belief-batch 100000 --buffer-size 6", "GB are free"),
        ("--num-heads 3", "--num-heads 3"),
        ("--zeta 0.1", "--zeta"),
        ("--nu 0", "--nu"),
        ("--sigma -1", "--sigma"),
        ("--buffer-size 2", "--buffer-size 2"),
        ("--explored no/such.pt", "no/such.pt"),
        ("--no-belief --oracle-context", "--oracle-context"),
        ("--env-id GridWrld", "GridWorld"),
        ("--env-id GridWorldAlternating --horizon 60 --episodes-per-task 1", "has sessions"),
        ("--resume no/such/checkpoint.pt", "no/such/checkpoint.pt"),
        ("--capture-video --evaluate .", "."),
    ],
)
def test_bad_input(words, named, monkeypatch, capsys, tmp_path):
    """One line on stderr that names the culprit, status 2, and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    where = [] if "resume" in words or "evaluate" in words else TINY
    status, lines = command(laser, monkeypatch, capsys, *where, *words.split())
    assert status == 2 and len(lines) == 1 and lines[0].startswith("laser.py: ") and named in lines[0], lines
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flag, words, named",
    [
        ("--resume", "--meta-episodes 5", "--meta-episodes 5"),
        ("--resume", "--episodes-per-task 2", "--episodes-per-task 2"),
        ("--evaluate", "--meta-episodes 5", "--meta-episodes 5"),
        ("--explored", "--meta-episodes 5", "--meta-episodes 5: the encoder of"),
        ("--explored", "--num-heads 4", "--num-heads 4: the encoder of"),
        ("--explored", "--horizon 13", "--horizon 13: the encoder of"),
        ("--explored", "--no-mask-pads", "--mask-pads False"),
        ("--resume", "--explore-iterations 9", "--explore-iterations 9"),
        ("--resume", "--oracle-context", "--oracle-context"),
        ("--explored", "unfinished", "is in its phase 1, at iteration 2 of 3"),
        ("--explored", "oracle", "has no phase 1 of its own"),
    ],
)
def test_checkpoints_that_do_not_fit(trained, flag, words, named, monkeypatch, capsys, tmp_path):
    """Of another Q or K, of the other phase: one line, status 2, and nothing is started."""
    folder, end = trained
    state = torch.load(folder / "checkpoint.pt")
    if words == "unfinished":
        state["iteration"] = 2
    if words == "oracle":
        state["args"]["oracle_context"] = True
    torch.save(state, tmp_path / "checkpoint.pt")
    words = words.split() if words.startswith("--") else []
    where = ["--run-dir", str(tmp_path / "new")] if flag == "--explored" else []
    status, lines = command(laser, monkeypatch, capsys, flag, tmp_path / "checkpoint.pt", *where, *words)
    assert status == 2 and len(lines) == 1 and named in lines[0], lines
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_one_process(monkeypatch):
    """z couples the tasks of a batch: torchrun is refused."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="one process"):
        laser.main(laser.Args())


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("env_id", ["MEWA", "ML10", "HopperMass", "own.module:factory"])
def test_presets(env_id, cuda, monkeypatch):
    """All pass the checks; without --cuda there is a smaller one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    args = parse("--env-id", env_id, *["--cuda"] * cuda)
    check(laser, args)
    small = env_id not in laser.PRESETS or not cuda
    assert (args.d_model < 128) == small and args.buffer_size >= args.num_envs


def test_policy_learns_to_use_the_task(tmp_path):
    """The grid with the goal told, in seconds: a policy that knows no goal cannot return 2 in its only episode."""
    words = "--env-id GridWorld --oracle-context --horizon 15 --episodes-per-task 1 --num-envs 21 --buffer-size 21 "
    words += "--exploit-episodes 4 --task-iterations 60 --learning-rate 3e-3 --eval-tasks 0 --policy-layers 64 64 "
    words += "--obs-embed 32 --beta 0.05"
    run(tmp_path, *words.split(), "--pfo-coef", 0, eval_interval=0)
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["eval/test/return"] > 6 and result["eval/test/return_adaptation"] > 4


@pytest.mark.parametrize("env_id", ["MEWA", "HopperMass"])
def test_draws_are_never_shared(env_id, tmp_path, monkeypatch):
    """Mistakes, first states: those of a phase, an iteration, an episode and an environment are nobody else's. With one
    meta-episode and one exploitation episode of a task all environments play the same tasks."""
    seen = []  # (who plays, a row for each episode of each environment)

    def record(play, envs, *rest, **named):
        data = play(envs, *rest, **named)
        shape = envs.episodes_per_task, envs.horizon, envs.num_envs, -1
        if env_id == "MEWA":
            rows = envs.u.view(shape).transpose(1, 2).flatten(0, 1).flatten(1)
        else:
            rows = data["obs"].view(shape)[:, 0].flatten(0, 1)
        seen.append(((play.__name__, envs.split, envs.named is None), {tuple(row.tolist()) for row in rows}, len(rows)))
        return data

    for play in (laser.explore, laser.exploit):
        monkeypatch.setattr(laser, play.__name__, functools.partial(record, play))
    words = "--meta-episodes 1 --exploit-episodes 1 --horizon 12 --eval-tasks 3 --task-iterations 2".split()
    run(tmp_path, "--env-id", env_id, *words, eval_interval=0)
    assert {who for who, *_ in seen} >= {(play, "train", True) for play in ("explore", "exploit")}
    training, evaluation = ([one for one in seen if one[0][2] is drawn] for drawn in (True, False))
    assert [count for *_, count in training] == [9, 9, 9, 9, 3, 9, 3]
    assert len(set().union(*(rows for _, rows, _ in training))) == 51
    of = {}
    for who, rows, count in evaluation:  # the same each time, so that contexts are compared under the same mistakes
        assert len(rows) == count and of.setdefault(who, rows) == rows
    of["training"] = set().union(*(rows for _, rows, _ in training))
    assert len(of) == 5 and len(set().union(*of.values())) == sum(map(len, of.values()))


def test_partial_contexts_without_masks():
    """--no-mask-pads: after one episode the context is what the encoder makes of slots that are not played yet."""
    s = setup(mask_pads=False)
    names = s.envs.tasks[:12]
    torch.manual_seed(0)
    first, *_ = laser.contexts_by_episode(s.envs, s.encoder, s.explorer, s.args, names)
    torch.manual_seed(0)
    data = laser.explore(s.envs, s.encoder, s.explorer, s.args, names)
    tokens, valid = (torch.cat([data[k][:, :13], torch.zeros_like(data[k][:, 13:])], 1) for k in ("tokens", "valid"))
    expected = s.encoder.task_context(tokens, valid, s.encoder.gammas(tokens, valid))
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)


def test_all_steps_or_the_real_ones(monkeypatch):
    """What a GPU does, idle steps of no weight, and what a CPU does, without them: the same update."""
    s = setup(oracle_context=True)
    data = exploited(s)
    after = []
    for rows in (laser.real_rows, lambda alive: torch.arange(alive.numel())):
        monkeypatch.setattr(laser, "real_rows", rows)
        agent = copy.deepcopy(s.agent)
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
        laser.ppo_update(agent, optimizer, data, 3, 1, 0.2, s.args, meta=True)
        after.append(agent.state_dict())
    for a, b in zip(*(x.values() for x in after)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert same(after[0], s.agent.state_dict())


def test_who_learns_when(tmp_path):
    """The exploration policy not before its time, the target at every nu-th iteration, z^ after phase 1."""
    made, save = {}, common.run.save_checkpoint

    def keep(path, state):
        made[state["iteration"]] = copy.deepcopy(state)
        save(path, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.run, "save_checkpoint", keep)
        run(tmp_path, "--checkpoint-interval", 1, "--explore-iterations", 5, "--initial-iterations", 2)
    still = [same(made[i]["explorer"], made[i + 1]["explorer"]) == [] for i in range(1, 8)]
    assert still == [True, False, False, False, True, True, True]
    copied = [same(made[i]["target"], made[i + 1]["target"]) != [] for i in range(1, 4)]
    assert copied == [True, False, True]
    task_rec = {k.removeprefix("task_rec."): v for k, v in made[4]["heads"].items() if k.startswith("task_rec")}
    assert same(task_rec, made[4]["target"]) == [] and made[4].keys() >= PHASE_1 and not made[5].keys() & PHASE_1
    assert [bool(made[i]["encoder"]["z_hat"].any()) for i in (4, 5, 8)] == [False, True, True]
    assert same(made[5]["encoder"], made[8]["encoder"]) == [] and same(made[5]["agent"], made[6]["agent"])


def test_phase_1_makes_room(tmp_path, monkeypatch):
    """Nothing holds its heads, target and buffer while the task policy trains."""
    kept, alive, start, exploit = [], [], laser.start_phase_1, laser.exploit

    def begin(*a):
        parts, stores, room = start(*a)
        kept.extend(weakref.ref(x) for x in (parts["heads"], parts["target"], stores["buffer"]))
        return parts, stores, room

    monkeypatch.setattr(laser, "start_phase_1", begin)
    monkeypatch.setattr(laser, "exploit", lambda *a: alive.append([ref() for ref in kept]) or exploit(*a))
    run(tmp_path, "--task-iterations", 1)
    assert alive == [[None, None, None]]


def test_learning_rates_of_a_resumed_run(tmp_path):
    """--resume with other step sizes: they hold."""
    assert run(tmp_path, "--total-timesteps", 1)["iteration"] == 1
    main("--resume", tmp_path / "checkpoint.pt", *"--belief-learning-rate 0.5 --explore-learning-rate 0.25".split())
    end = torch.load(tmp_path / "checkpoint.pt")
    assert end["iteration"] == 2 and end["belief_optimizer"]["param_groups"][0]["lr"] == 0.5
    assert end["explore_optimizer"]["param_groups"][0]["lr"] == 0.25


def test_bfloat16(mewa):
    """The GPU's precision, here on the CPU: codes near those of float32, online near offline, and gradients."""
    s, encoder = mewa, copy.deepcopy(mewa.encoder)
    encoder.bfloat16 = True
    encoder.half = lambda: torch.autocast("cpu", torch.bfloat16)
    data = laser.explore(s.envs, encoder, s.explorer, s.args)
    with torch.no_grad():
        offline, exact = (e.gammas(data["tokens"], data["valid"]) for e in (encoder, s.encoder))
    assert offline.dtype == torch.float32 and (offline - exact).abs().max() < 0.05 * exact.std()
    assert (data["gammas"] - offline).abs().max() < 0.05 * exact.std()
    loss = laser.encoder_loss(encoder, s.heads, s.target, s.batch, 19, s.args)[0]
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())
