"""Memory: what a run will take, against what is free before it starts."""

import os
from pathlib import Path

import torch

from common.envs import BadInput


def free_memory(device):
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def steps_memory(args, envs, num_envs):
    """Bytes, by name, at least: of an iteration's steps, which updates copy twice, of the buffer of meta-episodes, of a
    batch of these, and of the networks, with gradients and Adam's moments.

    laser.py plays --meta-episodes in each task of phase 1, and counts its buffer, in smaller types, itself.
    """
    S, space = envs.single_observation_space.shape[0], envs.single_action_space
    step = 4 * (2 * S + (1 if hasattr(space, "n") else space.shape[0]) + 6)
    per_task = getattr(args, "meta_episodes", 0)
    rows = dict(steps=3 * num_envs * (per_task or 1))
    if not per_task:
        rows |= dict(buffer=args.buffer_size, batch=args.belief_batch)
    return {name: count * envs.meta_horizon * step for name, count in rows.items()} | dict(
        networks=16 * count_weights(args)
    )


def count_weights(args):
    """How many the networks have, at least: between two hidden layers, in the recurrent one, and one for each unit."""
    hidden = [value for name, value in vars(args).items() if name.endswith("_layers") and isinstance(value, tuple)]
    units = [value for name, value in vars(args).items() if name.endswith(("_dim", "_embed"))]
    between = sum(a * b for layers in hidden for a, b in zip(layers, layers[1:]))
    return between + 3 * getattr(args, "hidden_dim", 0) ** 2 + sum(map(sum, hidden)) + sum(units)


def phase_1_memory(args, buffer_bytes, token_dim):
    """Bytes of laser.py's phase 1, roughly: of the weights (with Adam and the target), the buffer, and the batch of an
    update of its transformers."""
    length, size = (args.horizon + 1) * args.episodes_per_task, args.d_model
    block = 4 * size**2 + 2 * size * args.feed_forward
    encoder = (2 * args.num_layers + 2) * block + 2 * token_dim * size
    heads = (args.meta_episodes + 1) * length * size * 128  # the first matrices of h_t-rec: the rest is small
    sequences = 2 * args.belief_batch * args.meta_episodes  # masked and not
    kept = 2 if args.recompute else 2 * args.num_layers  # blocks whose activations wait for the backward pass
    floats = sequences * length * ((kept + 2) * (14 * size + 2 * args.feed_forward) + 2 * args.num_layers * size)
    masks = 3 * sequences * length**2  # of f_u, as booleans and as numbers
    return dict(
        weights=4 * (4 * encoder + 5 * heads), buffer=buffer_bytes, batch=floats * (2 if args.cuda else 4) + masks
    )


def check_memory(needed, device, what, advice):
    """BadInput, with advice, where needed, bytes by name, does not fit on the device together. Returns a line on it."""
    free, total = free_memory(device), sum(needed.values())
    text = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needed.items())
    if total > free:
        raise BadInput(f"{what} needs some {total / 1e9:.1f} GB ({text}), and {free / 1e9:.1f} GB are free: {advice}")
    return f"memory of {what}: {text}; {free / 1e9:.1f} GB free"
