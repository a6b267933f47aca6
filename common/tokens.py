"""Meta-episodes as sequences of tokens, for transformers: their shape, which slots are idle, and a packed form.

A meta-episode of K episodes has L = K (H + 1) slots. Slot k (H + 1) holds the first state of episode k, and each slot
after it a step: a token x = (state after it, action, reward) of X numbers; a first state has zeros for the last two.
Where an episode ends early, the steps that are left of it are idle: their tokens are zeros, and not `valid`.
"""

import torch
import torch.nn.functional as F


def tokens_shape(envs):
    """L, X."""
    space = envs.single_action_space
    A = int(space.n) if hasattr(space, "n") else space.shape[0]
    return envs.episodes_per_task * (envs.horizon + 1), envs.single_observation_space.shape[0] + A + 1


def action_input(space, device):
    """What a token has of a policy's action, a function: one-hot if discrete, clipped to its box else."""
    if hasattr(space, "n"):
        return lambda action: F.one_hot(action, int(space.n)).float()
    low, high = (torch.as_tensor(bound, device=device) for bound in (space.low, space.high))
    return lambda action: torch.maximum(torch.minimum(action, high), low)


class Slots:
    """Which slots of N meta-episodes are computed, seen and shown: valid (N, L).

    Computed are M slots, `numbers` (M,): those that are seen in any of the sequences, for what is idle in all changes
    nothing; all of them if `every`. Seen, which is attended to, `seen` (N, 1, 1, M), are the valid ones and the first,
    so that nothing attends to nothing. Shown, `shown` (N, M, 1), are the valid ones: codes of the others are zeros.
    Without mask_idle all are seen and shown.
    """

    def __init__(self, valid, mask_idle, every=False):
        self.valid = valid if mask_idle else torch.ones_like(valid)
        seen = self.valid.clone()
        seen[:, 0] = True
        if every:
            self.numbers = torch.arange(valid.shape[1], device=valid.device)
        else:
            self.numbers = seen.any(0).nonzero()[:, 0]  # waits for the device
        self.seen, self.shown = seen[:, None, None, self.numbers], self.valid[:, self.numbers, None]

    def causal(self):
        """What each slot sees of itself and those before (N, 1, M, M)."""
        return (self.numbers <= self.numbers[:, None]) & self.seen

    def take(self, x):
        """x (N, L, .) -> (N, M, .)."""
        return x[:, self.numbers]

    def spread(self, codes):
        """codes (N, M, .) -> float32 (N, L, .), with zeros where nothing is shown."""
        whole = torch.zeros(*self.valid.shape, codes.shape[-1], device=codes.device)
        return whole.index_copy_(1, self.numbers, (codes * self.shown).float())

    def means(self, codes, episodes):
        """codes (N, M, .) -> the mean over each episode's shown slots and all units (N, K)."""
        sums = self.spread(codes.float().mean(-1, keepdim=True)).squeeze(-1).unflatten(1, (episodes, -1)).sum(-1)
        return sums / self.valid.unflatten(1, (episodes, -1)).sum(-1).clamp(min=1)


class Packing:
    """Tokens in small exact types. Where the environment says so (`integer_obs`, `reward_values`), observations are
    bytes and rewards are numbers of values; a discrete action is one, too."""

    def __init__(self, envs):
        self.obs_dim, space = envs.single_observation_space.shape[0], envs.single_action_space
        self.discrete = hasattr(space, "n")
        if self.discrete:  # the number of actions stands for none
            self.one_hot = torch.eye(int(space.n) + 1, int(space.n), device=envs.device)
        self.obs_type = torch.uint8 if getattr(envs, "integer_obs", False) else torch.float32
        values = getattr(envs, "reward_values", None)
        self.values = None if values is None else torch.as_tensor(values, device=envs.device).sort().values

    def pack(self, tokens, valid):
        """tokens (.., L, X), valid (.., L) -> a dict of tensors (.., L, ...)."""
        obs, action, reward = tokens.split([self.obs_dim, tokens.shape[-1] - self.obs_dim - 1, 1], -1)
        packed = dict(obs=obs.to(self.obs_type), actions=action, rewards=reward[..., 0], valid=valid)
        if self.discrete:
            packed["actions"] = torch.where(action.any(-1), action.argmax(-1), action.shape[-1]).to(torch.uint8)
        if self.values is not None:
            packed["rewards"] = torch.searchsorted(self.values, packed["rewards"].contiguous()).to(torch.uint8)
        return packed

    def unpack(self, packed):
        """The reverse: a dict of tokens, valid."""
        actions, rewards = packed["actions"], packed["rewards"]
        if self.discrete:
            actions = F.embedding(actions.int(), self.one_hot)
        if self.values is not None:
            rewards = self.values[rewards.int()]
        return dict(tokens=torch.cat([packed["obs"].float(), actions, rewards[..., None]], -1), valid=packed["valid"])
