"""--extra-obs: what observations have beside the environment's own."""

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box

from common.envs.protocol import BadInput

EXTRAS = ("none", "done", "time")


class ExtraObs:
    """Environments whose observations have a last entry, float32; all else is that of `envs`, and is set there.

    done: 1 where the step ended an episode, in its last state and in the next one's first, else 0 (variBAD's code has
          such a flag, and SDVT's on Meta-World; without one, nothing tells encoder and policy that an episode is over).
    time: the share of the episode that is over, 0 in an episode's first state and 1 in its last. What a policy without
          a belief makes of it is the floor for tasks that change with time alone.
    Raises BadInput for another name.
    """

    own = ("envs", "extra", "elapsed", "single_observation_space", "integer_obs")

    def __init__(self, envs, extra):
        if extra not in EXTRAS[1:]:
            raise BadInput(f"unknown extra observation {extra!r}: choose {' or '.join(EXTRAS)}")
        self.envs, self.extra, self.elapsed = envs, extra, 0
        low, high = (np.append(getattr(envs.single_observation_space, end), x) for end, x in (("low", 0), ("high", 1)))
        self.single_observation_space = Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
        self.integer_obs = extra == "done" and getattr(envs, "integer_obs", False)

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def __setattr__(self, name, value):
        object.__setattr__(self if name in self.own else self.envs, name, value)

    def reset(self, tasks=None):
        obs, info = self.envs.reset(tasks=tasks)
        self.elapsed = 0
        return F.pad(obs, (0, 1)), info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.envs.step(action)
        self.elapsed += 1
        if self.extra == "done":
            last = first = (terminated | truncated).float()
        else:
            last = torch.full_like(reward, (self.elapsed - 1) % self.envs.horizon + 1) / self.envs.horizon
            first = torch.where(truncated, 0.0, last)
        final_obs = torch.cat([info["final_obs"], last[:, None]], -1)
        return torch.cat([obs, first[:, None]], -1), reward, terminated, truncated, info | {"final_obs": final_obs}
