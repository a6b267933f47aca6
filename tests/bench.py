"""What things cost here, as ratios measured in one run: python -m tests.bench [NAME ...] [--seconds 60]

`scripts --against FOLDER` compares the scripts with those of another checkout.

The contestants take turns, round by round, and a ratio is the median of the rounds' ratios: what else the machine does
meets all of them. For numbers to quote, let it do nothing else.
"""

import argparse
import csv
import itertools
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial

import gymnasium
import numpy as np


def memory(pids):
    """Proportional set size of processes in MB: pages that several share count once."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return total / 1024


def physics(pipe, families):
    """In a process of its own: at each message, bare MuJoCo for half a second; answers with environment steps/s.

    A step is 5 mj_step and the mj_forward that the observation needs, with random controls; no Python beyond that.
    """
    import mujoco

    from common.envs.metaworld import benchmark_tasks, make_sawyer

    _, tasks = benchmark_tasks("ML10", "", 1)
    task = {family: task for family, _, task in tasks["train"]}
    envs = [make_sawyer(family) for family in families]
    for env, family in zip(envs, families):
        env.set_task(task[family])
        env.reset()
    rng = np.random.default_rng(0)
    while pipe.recv():
        steps, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < 0.5:
            for env in envs:
                env.data.ctrl[:] = rng.uniform(-1, 1)
                mujoco.mj_step(env.model, env.data, nstep=5)
                mujoco.mj_forward(env.model, env.data)
            steps += len(envs)
        pipe.send(steps / (time.perf_counter() - begin))


def bench_metaworld(seconds, num_envs=20, horizon=500):
    """Steps/s on ML10's train tasks with random actions, an episode and its reset a round, and memory of the processes.

    Contestants: metaworld's own asynchronous vectorisation, one process an environment; ours, one a core; and bare
    physics on every core, for the environments that a worker of ours has.
    """
    import metaworld  # noqa: F401, registers its environments

    actions = np.random.default_rng(0).uniform(-1, 1, (horizon, num_envs, 4)).astype(np.float32)
    # First, so that its processes, which are forks of this one, do not inherit torch.
    theirs = gymnasium.make_vec("Meta-World/ML10-train", vector_strategy="async", seed=1, meta_batch_size=num_envs)
    theirs.call("toggle_sample_tasks_on_reset", True)  # a new task at each reset, as metaworld's own training has it
    theirs.reset()

    import torch

    from common.envs.metaworld import benchmark_tasks, make_metaworld

    torch.set_num_threads(1)
    begin = time.perf_counter()
    families, _ = benchmark_tasks("ML10", "", 1)
    print(f"metaworld: tasks of ML10 made in {time.perf_counter() - begin:.1f} s", end="", flush=True)
    begin = time.perf_counter()
    benchmark_tasks("ML45", "", 1)
    print(f", of ML45 in {time.perf_counter() - begin:.1f} s", flush=True)
    ours = make_metaworld("ML10", num_envs, horizon=horizon, episodes_per_task=3)
    tensors = torch.from_numpy(actions)
    context, cores, pipes = multiprocessing.get_context("spawn"), len(os.sched_getaffinity(0)), []
    for k in range(cores):
        pipe, other = context.Pipe()
        its = [families[i % 10] for i in np.array_split(np.arange(num_envs), cores)[k]]
        context.Process(target=physics, args=(other, its), daemon=True).start()
        pipes.append(pipe)

    def run_theirs():
        for action in actions:
            theirs.step(action)
        return actions.shape[0] * num_envs

    def run_ours():
        if ours.elapsed == ours.meta_horizon:
            ours.reset()
        for action in tensors:
            ours.step(action)
        return actions.shape[0] * num_envs

    def timed(run):
        begin = time.perf_counter()
        return run() / (time.perf_counter() - begin)

    def run_physics():
        for pipe in pipes:
            pipe.send(True)
        return sum(pipe.recv() for pipe in pipes)

    for _ in range(4):  # until most families have been compiled
        ours.reset()
    run_physics()
    rounds, begin = [], time.perf_counter()
    while len(rounds) < 3 or time.perf_counter() - begin < seconds:
        rounds.append((timed(run_theirs), timed(run_ours), run_physics()))
        print("  steps/s: {:7,.0f} async {:7,.0f} ours {:7,.0f} physics".format(*rounds[-1]), flush=True)
    a, o, p = (statistics.median(x) for x in zip(*rounds))
    sizes = memory(process.pid for process in theirs.processes), memory(worker.process.pid for worker in ours._workers)
    print(
        f"metaworld: ML10, {num_envs} environments, {cores} cores, medians of {len(rounds)} rounds\n"
        f"  steps/s          {a:,.0f} async, {o:,.0f} ours, {p:,.0f} bare physics\n"
        f"  ours / async     {statistics.median(o / a for a, o, _ in rounds):.2f}  (wanted: 3.5)\n"
        f"  ours / physics   {statistics.median(o / p for _, o, p in rounds):.2f}  (wanted: 0.35)\n"
        f"  memory           {sizes[0]:,.0f} MB async, {sizes[1]:,.0f} MB ours"
    )
    for pipe in pipes:
        pipe.send(False)
    ours.close()
    theirs.close()


def bare(pipe, xmls, frame_skips, num_envs):
    """In a process of its own: at each message, which model, MuJoCo alone for half a second; answers with steps/s.

    A step is `frame_skips` mj_step of one of `num_envs` states with random controls, new states every 200 steps.
    """
    import mujoco

    models = [mujoco.MjModel.from_xml_path(xml) for xml in xmls]
    datas = [[mujoco.MjData(model) for _ in range(num_envs)] for model in models]
    rng, since = np.random.default_rng(0), [200] * len(xmls)
    while (k := pipe.recv()) is not None:
        steps, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < 0.5:
            if since[k] == 200:
                since[k] = 0
                for data in datas[k]:
                    mujoco.mj_resetData(models[k], data)
            controls = rng.uniform(-1, 1, (num_envs, models[k].nu))
            for data, control in zip(datas[k], controls):
                data.ctrl[:] = control
                mujoco.mj_step(models[k], data, nstep=frame_skips[k])
            since[k] += 1
            steps += num_envs
        pipe.send(steps / (time.perf_counter() - begin))


def bench_mujoco(seconds, num_envs=16, horizon=200):
    """Steps/s of HalfCheetah, Ant and Hopper with random actions, an episode a round that nothing ends early.

    Contestants: Gymnasium's AsyncVectorEnv, one process an environment; ours; and bare mj_step on every core.
    """
    from gymnasium.vector import AsyncVectorEnv

    wanted = {
        "HalfCheetahVel": ("HalfCheetah-v5", 5.0, None),
        "AntGoal": ("Ant-v5", 2.3, 0.8),
        "HopperMass": ("Hopper-v5", None, None),
    }
    unending = {"HalfCheetah-v5": {}} | dict.fromkeys(("Ant-v5", "Hopper-v5"), {"terminate_when_unhealthy": False})
    # First, so that their processes, which are forks of this one, do not inherit torch.
    theirs = {
        name: AsyncVectorEnv([partial(gymnasium.make, name, horizon, **more)] * num_envs)
        for name, more in unending.items()
    }
    for envs in theirs.values():
        envs.reset(seed=1)

    import torch

    from common.envs import make_envs

    torch.set_num_threads(1)
    xmls = [f"{gymnasium.__path__[0]}/envs/mujoco/assets/{name}.xml" for name in ("half_cheetah", "ant", "hopper")]
    context, cores, pipes = multiprocessing.get_context("spawn"), len(os.sched_getaffinity(0)), []
    for _ in range(cores):
        pipe, other = context.Pipe()
        context.Process(target=bare, args=(other, xmls, (5, 5, 4), math.ceil(num_envs / cores)), daemon=True).start()
        pipes.append(pipe)
    for k, (env_id, (name, wanted_async, wanted_bare)) in enumerate(wanted.items()):
        ours = make_envs(env_id, num_envs, horizon=horizon, episodes_per_task=1)
        if ours.healthy:
            ours.healthy = lambda q, v: np.ones(len(q), bool)  # as theirs: a fallen Hopper goes on
        shape = horizon, num_envs, *ours.single_action_space.shape
        actions = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)

        def timed(step, actions):
            begin = time.perf_counter()
            for action in actions:
                step(action)
            return horizon * num_envs / (time.perf_counter() - begin)

        rounds, begin = [], time.perf_counter()
        while len(rounds) < 3 or time.perf_counter() - begin < seconds / len(wanted):
            ours.reset()
            a = timed(theirs[name].step, actions)
            o = timed(ours.step, torch.from_numpy(actions))
            for pipe in pipes:
                pipe.send(k)
            rounds.append((a, o, sum(pipe.recv() for pipe in pipes)))
        a, o, p = (statistics.median(x) for x in zip(*rounds))
        print(
            f"mujoco: {env_id}, {num_envs} environments, {cores} cores, medians of {len(rounds)} rounds\n"
            f"  steps/s          {a:,.0f} async, {o:,.0f} ours, {p:,.0f} bare mj_step\n"
            f"  ours / async     {statistics.median(o / a for a, o, _ in rounds):.2f}"
            + (f"  (wanted: {wanted_async})" if wanted_async else "")
            + f"\n  ours / bare      {statistics.median(o / p for _, o, p in rounds):.2f}"
            + (f"  (wanted: {wanted_bare})" if wanted_bare else ""),
            flush=True,
        )
        ours.close()
        theirs[name].close()
    for pipe in pipes:
        pipe.send(None)


def train(root, script, env_id, words, steps, processes=1):
    """A training run of a checkout's script, evaluation aside: key of metrics.csv -> its values."""
    rows = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        shared = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--"] * (processes > 1)
        command = [sys.executable, *shared, script, "--env-id", env_id, *words, "--total-timesteps", str(steps)]
        command += ["--eval-interval", "-1", "--run-dir", folder]
        subprocess.run(command, check=True, capture_output=True, cwd=root)
        with open(f"{folder}/metrics.csv") as file:
            for _, key, value in list(csv.reader(file))[1:]:
                rows[key].append(float(value))
    return rows


def bench_scripts(seconds, against=None):
    """Training steps/s of each script with its preset, evaluation aside, and where an iteration's time goes; against
    another checkout: of both, in turn, three times."""
    jobs = [*itertools.product(("varibad.py", "dme.py"), ("GridWorld", "SparsePointRobot", "ML10"))]
    jobs += [("varibad.py", "HalfCheetahVel"), ("ldm.py", "GridWorldLDM"), ("ldm.py", "HalfCheetahVel")]
    table_2 = (  # of DynaMITE-RL, in place of the preset's
        "--num-minibatches 4 --learning-rate 3e-4 --no-anneal-lr --ent-coef 0.01 --time-limit terminal "
        "--belief-learning-rate 3e-4 --no-belief-anneal-lr --belief-updates 3 --buffer-size 10000 "
        "--reward-decoder mlp --kl-coef 0.01 --num-envs"
    ).split()
    grid = "dynamite_rl.py", "GridWorldAlternating"
    jobs += [grid, (*grid, *table_2, "16"), (*grid, *table_2, "32"), ("dynamite_rl.py", "HalfCheetahVelSessions")]
    jobs += [("laser.py", "MEWA", "--oracle-context")]
    for script, env_id, *words in jobs:
        steps = 60_000 if env_id == "ML10" else round(seconds / 6 * 10_000)  # of ML10, five iterations
        words += ["--belief-warmup", "0"] * (env_id == "ML10")  # which is longer
        rounds = [[train(root, script, env_id, words, steps) for root in (".", against) if root]]
        while against and len(rounds) < 3:
            rounds.append([train(root, script, env_id, words, steps) for root in (".", against)])
        rates = [[rows["charts/SPS"][-1] for rows in each] for each in rounds]
        ours, *theirs = (statistics.median(column) for column in zip(*rates))
        rows = rounds[0][0]
        parts = [(k, rows[f"time/{k}"]) for k in ("env", "rollout", "belief", "ppo") if f"time/{k}" in rows]
        text = ", ".join(f"{name} {statistics.median(values):.0%}" for name, values in parts)
        if against:
            ratio = statistics.median(a / b for a, b in rates)
            text = f"there {theirs[0]:,.0f}, here / there {ratio:.2f}; {text}"
        print(
            f"{' '.join((script, '--env-id', env_id, *words))}: {ours:,.0f} steps/s; {text} "
            "(environments are part of the rollout)",
            flush=True,
        )


def bench_processes(seconds):
    """Training steps/s of dme.py on ML10, evaluation aside: one process, and two that share its environments and
    batches, in turn: five iterations each, whatever `seconds` says."""
    words = ["--precollect", "0", "--belief-warmup", "0"]
    runs = [[train(".", "dme.py", "ML10", words, 60_000, n) for n in (1, 2)] for _ in range(3)]
    rates = [[rows["charts/SPS"][-1] for rows in each] for each in runs]
    one, two = (statistics.median(column) for column in zip(*rates))
    ratio = statistics.median(b / a for a, b in rates)
    print(
        f"processes: dme.py --env-id ML10: {one:,.0f} steps/s in one, {two:,.0f} in two, two / one {ratio:.2f}",
        flush=True,
    )


def bench_gru(seconds):
    """Forwards and backwards through nn.GRU and through ours, in turn, one thread: a ratio for each size."""
    import torch

    from common.networks import GRU

    torch.set_num_threads(1)

    def timed(gru, x):
        begin = time.process_time()
        gru(x, torch.zeros(1, x.shape[1], gru.hidden_size))[0].sum().backward()
        return time.process_time() - begin

    for T, B, D in ((60, 25, 64), (120, 25, 128), (50, 120, 64)):  # VariBAD's grid, LDM's grid, ML1's windows
        x, pair = torch.randn(T, B, 32), (torch.nn.GRU(32, D), GRU(32, D))
        times, begin = [], time.perf_counter()
        while time.perf_counter() - begin < seconds / 3:
            times.append([timed(gru, x) for gru in pair])
        theirs, ours = (1e3 * statistics.median(column) for column in zip(*times))
        print(
            f"gru: T {T}, B {B}, D {D}: nn.GRU {theirs:.1f} ms, ours {ours:.1f} ms, ratio {theirs / ours:.2f}",
            flush=True,
        )


def bench_mewa(seconds):
    """Steps/s of MEWA with random actions, one thread, idle ones among them: 16 and 4,096 environments, and one in a
    plain Python loop."""
    import torch

    from common.envs import make_envs
    from tests import mewa_plain

    torch.set_num_threads(1)
    tasks = make_envs("MEWA", 1, "test").task_table[:12].tolist()
    made = {num_envs: make_envs("MEWA", num_envs) for num_envs in (16, 4096)}
    actions = {num_envs: torch.randint(4, (envs.meta_horizon, num_envs)) for num_envs, envs in made.items()}

    def run_plain():
        return sum(mewa_plain.episode(p, lambda _: random.randrange(4))[0] for p in tasks)

    def run_ours(num_envs):
        made[num_envs].reset()
        for action in actions[num_envs]:
            made[num_envs].step(action)
        return actions[num_envs].numel()

    def timed(run, *words):
        begin = time.process_time()
        return run(*words) / (time.process_time() - begin)

    rounds, begin = [], time.perf_counter()
    while len(rounds) < 3 or time.perf_counter() - begin < seconds / 4:
        rounds.append((timed(run_plain), timed(run_ours, 16), timed(run_ours, 4096)))
    p, few, many = (statistics.median(x) for x in zip(*rounds))
    print(
        f"mewa: one core, medians of {len(rounds)} rounds\n"
        f"  steps/s          {p:,.0f} plain Python, {few:,.0f} with 16 environments, {many:,.0f} with 4096  "
        "(wanted: 1,500,000)\n"
        f"  ours / plain     {statistics.median(x / p for p, x, _ in rounds):.1f} with 16, "
        f"{statistics.median(x / p for p, _, x in rounds):.0f} with 4096",
        flush=True,
    )


def bench_cuda(seconds):
    """GridWorld on a GPU: steps/s with 16, 256 and 4096 environments, and what a rollout's time goes into."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    import varibad
    from common.arguments import parse_args
    from common.envs import make_envs

    if not torch.cuda.is_available():
        print("cuda: this PyTorch sees no CUDA device")
        return
    for num_envs, flags in itertools.product((16, 256, 4096), ([], ["--compile"])):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "varibad.py", "--env-id", "GridWorld", "--cuda", "--num-envs", str(num_envs)]
            command += ["--total-timesteps", str(num_envs * 60 * 60), "--eval-interval", "-1", "--run-dir", folder]
            subprocess.run([*command, *flags, "--precollect", "1"], check=True, capture_output=True)
            rows = defaultdict(list)
            for step, key, value in list(csv.reader(open(f"{folder}/metrics.csv")))[1:]:
                rows[key].append((int(step), float(value)))
        (s1, r1), (s2, r2) = rows["charts/SPS"][len(rows["charts/SPS"]) // 2], rows["charts/SPS"][-1]
        shares = [f"{k} {statistics.median(v for _, v in rows[f'time/{k}']):.0%}" for k in ("rollout", "belief", "ppo")]
        rate = (s2 - s1) / (s2 / r2 - s1 / r1)  # SPS counts from the start: this is of the second half
        print(f"cuda: {num_envs} environments {' '.join(flags)}: {rate:,.0f} steps/s; {', '.join(shares)}", flush=True)
    words = ["--env-id", "GridWorld", "--cuda", "--num-envs", "4096"]
    args = parse_args(varibad.Args, varibad.PRESETS, varibad.SMALL, words)
    envs = make_envs("GridWorld", 4096, device="cuda")
    args.horizon, args.episodes_per_task = envs.horizon, envs.episodes_per_task
    model = varibad.BeliefModel(args, envs).cuda()
    agent = varibad.Agent(args, 2, envs.single_action_space, model.belief_sizes).cuda()
    for _ in range(2):
        varibad.rollout(envs, agent, model, args)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        varibad.rollout(envs, agent, model, args)
        torch.cuda.synchronize()
    events = watched.key_averages()
    host = sum(e.self_cpu_time_total for e in events) / 1e3
    device = sum(e.self_device_time_total for e in events) / 1e3
    waits = sum(e.count for e in events if e.key in ("cudaStreamSynchronize", "aten::item"))
    kernels = sum(e.count for e in events if e.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")))
    print(f"cuda: a rollout of 4096 x 60: host {host:.0f} ms, device {device:.0f} ms; {kernels} kernels, {waits} waits")
    print(events.table(sort_by="self_device_time_total", row_limit=8, max_name_column_width=40))


BENCHMARKS = {
    "gru": bench_gru,
    "metaworld": bench_metaworld,
    "mujoco": bench_mujoco,
    "mewa": bench_mewa,
    "scripts": bench_scripts,
    "processes": bench_processes,
    "cuda": bench_cuda,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", choices=[*BENCHMARKS, []], help="all, if none is named")
    parser.add_argument("--seconds", type=float, default=40, help="of measuring, for each; making things comes on top")
    parser.add_argument("--against", metavar="FOLDER", help="another checkout, to compare the scripts with")
    args = parser.parse_args()
    for name in args.which or BENCHMARKS:
        BENCHMARKS[name](args.seconds, **(dict(against=args.against) if args.against and name == "scripts" else {}))


if __name__ == "__main__":
    main()
