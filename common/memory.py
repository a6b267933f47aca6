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


def check_memory(needed, device, what, advice):
    """Prints the sizes. needed: bytes by name. BadInput, with advice, where they do not fit on the device together."""
    free, total = free_memory(device), sum(needed.values())
    text = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needed.items())
    if total > free:
        raise BadInput(f"{what} needs some {total / 1e9:.1f} GB ({text}), and {free / 1e9:.1f} GB are free: {advice}")
    print(f"memory of {what}: {text}; {free / 1e9:.1f} GB free")
