"""Sessions (Liang et al., "DynaMITE-RL", 2024, section 3): spans of an episode, each with one latent context.

    class Mine(Sessions, TensorEnvs):       # or another back end with its `reset` and `step`
        def __init__(self, num_envs, ..., sessions=0, session_process=""):
            super().__init__(num_envs, ...)
            self.set_sessions(sessions, session_process)

        def start(self):
            self.begin()                    # draws the episode's sessions and contexts
            ...

        def contexts_of(self, session, u):  # the context of every transition, out of its session's number
            return 1.5 + 1.5 * (0.2 * session).sin().unsqueeze(-1)

        def restart(self, ended):           # a session's first state, where `ended`; with `reset_state` alone
            ...
            return obs

The paper has Poisson lengths for one experiment, and neither the number of sessions nor their lengths for others.
"""

from math import lgamma

import numpy as np
import torch

from common.envs.protocol import BadInput, generator

PROCESSES = ("fixed", "poisson", "bernoulli")
FOR_SESSIONS, FOR_TASKS = 2, 3  # the last part of a key of `generator`; 0 and 1 are those of first states


def session_ends(process, sessions, horizon, u):
    """Which transitions of an episode of H steps are the last of a session: bool (H, N). The very last one always is.

    u: float64 (N, H) in [0, 1); environment i depends on row i alone. K sessions:
        fixed      H / K steps each
        poisson    the first K - 1 lengths Poisson(H / K), given that all are positive and leave one step for the last
                   (section 5): exactly so for any K, also where it is hopeless to draw until it happens
        bernoulli  every transition ends one with probability (K - 1) / (H - 1): K sessions in the mean (ours)
    Raises BadInput for an unknown process, K below 1 or above H, for fixed where K does not divide H, and for poisson
    where the probability of the condition is below what a float64 holds (1940 sessions in 2000 steps, say).
    """
    if process not in PROCESSES:
        raise BadInput(f"unknown session_process {process!r}: known are {', '.join(PROCESSES)}")
    if not 1 <= sessions <= horizon:
        raise BadInput(f"sessions must lie between 1 and the {horizon} steps of an episode, not {sessions}")
    ends = np.zeros((len(u), horizon), bool)
    if process == "fixed":
        if horizon % sessions:
            raise BadInput(f"sessions {sessions} do not divide the {horizon} steps of an episode: fixed needs that")
        length = horizon // sessions
        ends[:, length - 1 :: length] = True
    elif process == "bernoulli":
        ends = u < (sessions - 1) / max(horizon - 1, 1)
    else:
        lengths = poisson_lengths(sessions, horizon, u)
        np.put_along_axis(ends, lengths.cumsum(1) - 1, True, 1)
    ends[:, -1] = True
    return ends.T


def poisson_lengths(sessions, horizon, u):
    """Lengths of all sessions but the last, (N, K - 1), one after the other from their exact conditional law."""
    length = np.arange(1, horizon - sessions + 2)
    p = np.exp(length * np.log(horizon / sessions) - [lgamma(n + 1) for n in length])
    p /= p.sum()
    fits = [np.ones(horizon)]  # fits[j][b]: the probability that j lengths take at most b steps
    for _ in range(sessions - 1):
        fits.append(np.convolve([0, *p], fits[-1])[:horizon])
    if fits[-1][-1] < 1e-290:
        raise BadInput(f"sessions {sessions} in {horizon} steps: a Poisson process all but never has so many")
    lengths = np.zeros((len(u), sessions - 1), int)
    for j in range(sessions - 1):
        left = horizon - 1 - lengths.sum(1)[:, None] - length  # after this one, for all but the last
        weight = p * np.where(left >= 0, fits[sessions - 2 - j][left], 0)
        total = weight.cumsum(1)
        lengths[:, j] = 1 + (total > u[:, j, None] * total[:, -1:]).argmax(1)
    return lengths


def two_contexts(session, u, stay=0.2):
    """Which of two contexts each transition has, int64 (H, N): fair at first; the next session's is the same with
    probability `stay` (appendix D.1). session, u (H, N) as in Sessions."""
    begins = session[1:] > session[:-1]
    return torch.cat([u[:1] < 0.5, begins & (u[1:] >= stay)]).cumsum(0) % 2


class Sessions:
    """A mixin for the back ends; see above. A family defines

        contexts_of(session, u)    the number, from 0, of each transition's session, int64 (H, N), and u, float64
                                   (H, N) in [0, 1): u[t] is for what a session that begins at t draws -> (H, N, C)
        restart(ended)             the state of a session's start where ended, bool (N,) -> obs (N, S)
    and may define
        own_sessions, own_process  K and the process, where the user names none
        reset_state                whether a session begins with a first state; else with the last one's last

    Of several episodes in a task, each draws its sessions and contexts anew. A named task has draws of its own: the
    same ones with every seed. `info["task"]` is what the family calls the task, then the context at reset.
    """

    own_sessions, own_process = 4, "fixed"  # four: the paper's number on the grid, its only one
    reset_state = True

    def set_sessions(self, sessions, session_process):
        """Once, when made. Raises BadInput as `session_ends` does."""
        self.sessions, self.session_process = sessions or self.own_sessions, session_process or self.own_process
        session_ends(self.session_process, self.sessions, self.horizon, np.zeros((1, self.horizon)))

    def reset(self, tasks=None):
        obs, info = super().reset(tasks)
        return obs, info | {"task": torch.cat([self.task, self.context], -1), "context": self.context}

    def begin(self):
        """Draws the sessions of an episode."""
        u = self.draws(FOR_SESSIONS, 2 * self.horizon).reshape(-1, 2, self.horizon)
        ends = session_ends(self.session_process, self.sessions, self.horizon, u[:, 0])
        self.some_end = ends.any(1).tolist()
        session, u = (torch.from_numpy(x).to(self.device) for x in (ends.cumsum(0) - ends, u[:, 1].T))
        self.ends = torch.from_numpy(ends).to(self.device)
        self.contexts = self.contexts_of(session, u)
        self.enter(0)

    def enter(self, t):
        """The context of transition t."""
        self.context = self.contexts[t].float()

    def step(self, action):
        t = self.elapsed % self.horizon
        obs, reward, terminated, truncated, info = super().step(action)
        if t + 1 == self.horizon:  # the next episode has begun
            ended = self.true
        else:
            ended = self.ends[t]
            self.enter(t + 1)
            if self.reset_state and self.some_end[t]:
                obs = self.restart(ended)
        return obs, reward, terminated, truncated, info | {"session_end": ended, "context": self.context}


def named_draws(split, size, dim=2):
    """Random numbers of the fixed evaluation tasks of a split, float64 (size, dim), for `goals` of a back end."""
    return torch.from_numpy(generator(0, split, 0, 0, FOR_TASKS).random((size, dim)))
