"""How many workers there may be: affinity, a cgroup's quota, torchrun's share."""

import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.envs import BadInput, make_envs
from common.envs.cgroup import cpu_quota
from common.envs.protocol import cores, from_environment


def proc(folder, cgroup, *mounts):
    """A /proc/self in which these lines of `cgroup` and mounts (type, its options, root, folder) are to be read."""
    (folder / "cgroup").write_text(cgroup)
    lines = [
        f"31 23 0:28 {root} {at} rw,relatime shared:9 - {kind} {kind} {options}" for kind, options, root, at in mounts
    ]
    (folder / "mountinfo").write_text("".join(f"{line}\n" for line in ["23 1 0:1 / / rw - ext4 /dev/vda rw", *lines]))
    return folder


def quota(folder, cores, version=2):
    """Writes a cgroup's quota, in cores; None: none."""
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / "cpu.max").write_text("max 100000\n" if cores is None else f"{cores * 50_000:.0f} 50000\n")
    else:
        (folder / "cpu.cfs_quota_us").write_text("-1\n" if cores is None else f"{cores * 100_000:.0f}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")


@settings(max_examples=60, deadline=None)
@given(
    limits=st.lists(st.none() | st.sampled_from([0.25, 1.5, 2.0, 3.0, 64.0]), min_size=1, max_size=5),
    version=st.sampled_from([1, 2]),
    seen=st.sampled_from(["all", "own", "inside"]),
)
def test_quotas(limits, version, seen, tmp_path_factory):
    """Of nested cgroups the lowest counts, as far as they can be seen: from a machine; in a container, which sees its
    own from `/`; and where the path in /proc is the machine's, but what is mounted is the container's part."""
    folder = tmp_path_factory.mktemp("machine")
    names = [f"level{k}" for k in range(len(limits) - 1)]
    for k, limit in enumerate(limits):
        quota((folder / "cpu").joinpath(*names[:k]), limit, version)
    quota(folder / "cpu" / "neighbour", 0.1, version)
    path = "/" + "/".join(names)
    root, own = "/", limits
    if seen == "own":  # a namespace of its own: the container's cgroup is the root
        path, own = "/", limits[:1]
    elif seen == "inside":  # only what is below the container's cgroup is mounted
        path, root = "/docker/id" + path, "/docker/id"
    kind, options, controllers = ("cgroup2", "rw", "") if version == 2 else ("cgroup", "rw,cpu,cpuacct", "cpu,cpuacct")
    lines = f"12:memory:/\n3:cpuset:{path}\n{4 * (version == 1)}:{controllers}:{path}\n"
    here = proc(folder, lines, ("tmpfs", "rw", "/", folder), (kind, options, root, folder / "cpu"))
    assert cpu_quota(here) == min(math.inf if limit is None else limit for limit in own)


def test_no_quotas(tmp_path):
    """Not Linux, nothing mounted, a cgroup outside of what is mounted, files of another kind: no quota."""
    assert cpu_quota(tmp_path / "nowhere") == math.inf
    assert cpu_quota(proc(tmp_path, "0::/\n")) == math.inf
    quota(tmp_path / "cpu" / "a", 2)
    assert cpu_quota(proc(tmp_path, "0::/../b\n", ("cgroup2", "rw", "/a", tmp_path / "cpu"))) == math.inf
    for text in ("", "nonsense", "max", "0 0", "-1 100000"):
        (tmp_path / "cpu" / "a" / "cpu.max").write_text(text)
        assert cpu_quota(proc(tmp_path, "0::/a\n", ("cgroup2", "rw", "/", tmp_path / "cpu"))) == math.inf


@pytest.mark.parametrize(
    "count, quota, processes, expected",
    [(16, math.inf, None, 16), (16, 4.0, None, 4), (16, 2.7, None, 2), (16, 0.5, None, 1), (2, 64.0, None, 2)]
    + [(16, 8.0, "2", 4), (16, math.inf, "3", 5), (16, 4.0, "8", 1), (None, math.inf, "1", 1)],
)
def test_cores(count, quota, processes, expected, monkeypatch):
    monkeypatch.setattr("common.envs.protocol.cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "process_cpu_count", lambda: count, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert cores() == expected


def test_a_container_starts_fewer_workers(monkeypatch):
    monkeypatch.setattr("common.envs.protocol.cpu_quota", lambda: 3.0)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 16, raising=False)
    envs = make_envs("ML1-reach", 8)
    assert len(envs._workers) == 3
    envs.close()


@pytest.mark.parametrize("text", ["", "abc", "0", "-1", "2.5", "1e3", "two", "²"])
def test_odd_environment(text, monkeypatch):
    """What a shell's profile or another job left: a sentence that names the variable."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    for call in (cores, lambda: make_envs("ML1-reach", 2), lambda: make_envs("HalfCheetahVel", 2)):
        with pytest.raises(BadInput, match="LOCAL_WORLD_SIZE=.*unset"):
            call()


def test_from_environment(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert from_environment("RANK", 0) == 0
    monkeypatch.setenv("RANK", " 3 ")
    assert from_environment("RANK", 0) == 3
