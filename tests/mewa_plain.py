"""MEWA in plain Python, one step at a time, as the rules read: what common/envs/mewa.py is tested and timed against.

A state is a tuple: for each of the colours orange, blue, green, red the blocks left, the blocks in its structure,
whether there was a mistake, whether one has been completed.
"""

import random

START = ((5, 0, False, False),) * 4
REWARDS = [-0.22448296658694744, -0.18796557560563087, -0.10312814265489578, -0.09230244904756546]
ORDER = [3, 1, 2]
HORIZON = 50


def all_completed(state):
    return all(completed for *_, completed in state)


def progress(state):
    """The number of red, blue, green that are completed, in this order."""
    count = 0
    while count < 3 and state[ORDER[count]][3]:
        count += 1
    return count


def observation(state):
    numbers = [left for left, *_ in state]
    for _, size, mistake, _ in state:
        numbers += [size, int(mistake)]
    numbers += [int(completed) for *_, completed in state]
    used = [0, 2, 4, 8][progress(state)]
    return [*numbers, 8 - used, used]


def chance(state, action):
    """Which of the four probabilities of a mistake an action meets, or None."""
    left, size, _, _ = state[action]
    if not left or size != 1:
        return None
    return sum(size > 0 for _, size, _, _ in state) - 1


def place(state, action, mistake):
    """The state after a block of colour `action`; mistake: whether one happens, where `chance` is not None."""
    left, size, flag, completed = state[action]
    if left == 0:
        return state
    left, size = left - 1, size + 1
    if size == 2:
        flag = mistake
    if size == 3:
        left, completed = (left + 3, completed) if flag else (left, True)
        size, flag = 0, False
    return state[:action] + ((left, size, flag, completed),) + state[action + 1 :]


def reward(state):
    """Raw, of a step that led to this state."""
    return 0.0 if all_completed(state) else REWARDS[progress(state)]


def episode(p, act):
    """Steps and return of an episode; act: state -> action."""
    state, steps, total = START, 0, 0.0
    while steps < HORIZON and not all_completed(state):
        action = act(state)
        kind = chance(state, action)
        state = place(state, action, kind is not None and random.random() < p[kind])
        observation(state)
        steps, total = steps + 1, total + reward(state)
    return steps, total
