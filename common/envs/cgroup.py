"""The CPU time that a container may have."""

import math
import os
from pathlib import Path


def cpu_quota(proc="/proc/self"):
    """How many cores' CPU time our cgroup and those around it allow, on Linux, in version 1 or 2; often infinitely
    many."""
    try:
        ours = [line.split(":", 2)[1:] for line in Path(proc, "cgroup").read_text().splitlines()]
        mounts = Path(proc, "mountinfo").read_text().splitlines()
    except OSError:
        return math.inf
    quotas = [math.inf]
    for mount in mounts:
        root, folder = mount.split()[3:5]  # the cgroup that is to be seen at the folder
        kind, _, options = mount.partition(" - ")[2].split()[:3]
        for controllers, path in ours:
            version1 = kind == "cgroup" and "cpu" in options.split(",") and "cpu" in controllers.split(",")
            if version1 or (kind == "cgroup2" and not controllers):
                inner = Path(os.path.relpath(path, root)).parts
                inner = () if ".." in inner else inner  # a container that sees its own cgroup alone
                quotas += [_quota(Path(folder, *inner[:n])) for n in range(len(inner) + 1)]
    return min(quotas)


def _quota(cgroup):
    try:
        if (cgroup / "cpu.max").exists():
            quota, period = (cgroup / "cpu.max").read_text().split()  # "max", or a number
        else:
            quota, period = ((cgroup / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))  # -1: none
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no quota here
        return math.inf
