"""Pictures of one run, and of many: python -m common.plot RUNS... --key eval/test/success_rate

The command draws learning curves and adaptation over the episodes of a task, a line for each group of seeds, and prints
their last values as a Markdown table. Lines are interquartile means over seeds (up to three seeds: means), bands are
95 % bootstrap intervals of them. With --grid it draws a panel for each environment and a line for each algorithm.
"""

import argparse
import csv
import difflib
import functools
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Ellipse, Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image

from common.envs import BadInput

# arguments that change nothing of what a run learns
USUAL = {"belief", "conditioning", "consistency", "session_reconstruction"}  # switches that are on unless one says so
OFF = dict(actor_gain=1.0, extra_obs="none", control_cost="")  # what changes nothing, and older runs do not know
NO_SETTING = set(
    "seed run_dir resume evaluate explored cuda compile track capture_video eval_interval checkpoint_interval "
    "versions".split()
)
NAMES = {"varibad": "variBAD", "dme": "DME", "ldm": "LDM", "dynamite_rl": "DynaMITE-RL", "laser": "LaSER"}
MAX_POINTS = 200  # of a curve
# --grid: environment -> what is drawn of its test tasks, and beside it what bounds it, one number or one an episode
PANELS = {
    "GridWorld": ("return", {"Bayes-optimal": [4.0, 11.071, 11.071, 11.071]}),  # exact: tests/test_envs.py
    "SparsePointRobot": ("return", {}),
    "GridWorldLDM": ("success_rate", {"over-fitted": 3 / 27}),  # goals on the best path for the training goals
    "HalfCheetahVel": ("return", {"at rest": -350}),  # -200 v, in the mean of the test velocities of --split-rule ldm
    "GridWorldAlternating": ("return", {"Bayes-optimal": 42.25, "blind to\nchanges": 41.36}),  # tests/test_sessions.py
    "Reacher": ("return", {"at rest": -68}),  # zero action: tests/test_sessions.py
    "MEWAUniform": ("score", {"best possible": 1, "mean task's\npolicy": 0.56}),  # exact: common/envs/mewa.py
    "HopperMass": ("return", {"random": 17}),
    "ML1-reach": ("success_rate", {}),
    "ML10": ("success_rate", {}),
}
LENGTH = {"total_timesteps", "task_iterations", "elbo_terms", "decode_terms"}  # may differ between seeds of a line
ALGORITHMS = [*"variBAD DME LDM RL2 DynaMITE-RL LaSER".split(), "without belief"]  # in the order of their colours


def belief_panel(axis, path, goal, maps, horizon, scale=1):
    """Draws the goal into an axis; returns a function of an episode and a number of its steps, both from 0, that shows
    the agent's path up to there and the belief it has then."""
    size = round(maps.shape[1] ** 0.5)
    edges, blank = np.arange(size + 1) - 0.5, np.zeros((size, size))
    cells = axis.pcolormesh(edges, edges, blank, vmin=0, vmax=1, cmap="Blues", edgecolors="0.8", lw=0.4 * scale)
    (walk,) = axis.plot([], [], color="tab:orange", lw=1.5 * scale)
    (agent,) = axis.plot([], [], "o", color="tab:orange", ms=5 * scale)
    (star,) = axis.plot(*goal, "*", ms=8 * scale, mec="white", mew=0.3 * scale)
    axis.set(aspect="equal", xticks=[], yticks=[])

    def show(episode, steps):
        first = episode * horizon
        places = np.stack([path["obs"][first], *path["next_obs"][first : first + steps]])[:, :2]
        cells.set_array(maps[first + steps].reshape(size, size).T)
        walk.set_data(*places.T), agent.set_data(*places[-1:].T)
        star.set_color("tab:green" if steps and path["success"][first + steps - 1] else "tab:red")

    return show


def draw_grid_belief(file, title, path, goal, maps, horizon):
    """A meta-episode, twice: as a PNG with a row for each episode and a panel for each step, the believed goal as a
    heat map under the agent's path; and beside it as a GIF, a frame for each step.

    path: obs, next_obs (T, 2), success (T,), as arrays. goal: (2,). maps (T + 1, cells): p(reward).
    """
    episodes = len(path["obs"]) // horizon
    height = 1.08 * episodes + 0.7
    figure, axes = plt.subplots(episodes, horizon, figsize=(0.95 * horizon + 1, height), squeeze=False)
    figure.subplots_adjust(0.03, 0.1 / height, 0.94, 1 - 0.6 / height, 0.05, 0.05)
    for (episode, step), axis in np.ndenumerate(axes):
        belief_panel(axis, path, goal, maps, horizon)(episode, step + 1)
        axis.set_title(f"step {step + 1}" if episode == 0 else "", fontsize=8)
        axis.set_ylabel(f"episode {episode + 1}" if step == 0 else "", fontsize=9)
    figure.suptitle(f"{title}: believed probability of a reward (blue), path (orange), goal (star, green when reached)")
    figure.colorbar(axis.collections[0], cax=figure.add_axes((0.955, 0.1, 0.01, 0.7)))
    figure.savefig(file, dpi=110)
    plt.close(figure)

    figure, axis = plt.subplots(figsize=(4.2, 4.5), dpi=100)
    figure.subplots_adjust(0.02, 0.01, 0.98, 0.93)
    show = belief_panel(axis, path, goal, maps, horizon, scale=2.5)
    frames, times = [], []
    for episode, steps in np.ndindex(episodes, horizon + 1):
        show(episode, steps)
        axis.set_title(f"episode {episode + 1} of {episodes}, step {steps}")
        figure.canvas.draw()
        frames.append(Image.fromarray(np.array(figure.canvas.buffer_rgba())).quantize(method=Image.Quantize.FASTOCTREE))
        times.append(1250 if steps == horizon else 250)  # milliseconds
    gif = Path(file).with_suffix(".gif")
    frames[0].save(gif, save_all=True, append_images=frames[1:], duration=times, loop=0)
    plt.close(figure)


def draw_cells(axis, values, train, **colours):
    """A heat map of a grid, values (cells,), nan is white, with a frame around each goal of `train`, environments."""
    size = round(len(values) ** 0.5)
    image = axis.imshow(values.reshape(size, size).T, origin="lower", **colours)
    for x, y in train.task_table.tolist():
        axis.add_patch(Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, fill=False, lw=1.5))
    axis.set_xticks([]), axis.set_yticks([])
    return image


def draw_sessions(file, title, trajectory, lines, walks=()):
    """One PNG: over the steps of a meta-episode, what is believed and what is true, with the sessions' ends.

    trajectory: rewards (T,), session_end, predicted_end bool (T,), contexts (T, C), as arrays. lines: panel -> label ->
    (T,). walks: of grids, a row for each session: cells (L + 1, 2), the goals (G, 2) and which of them counts.
    """
    T, ends = len(trajectory["rewards"]), np.flatnonzero(trajectory["session_end"])
    shown = walks[:10]
    panels = ["walks" if shown else "context", *lines, "reward"]
    ratios = [1.6 if panel == "walks" else 1 for panel in panels]
    figure = plt.figure(figsize=(11, 1.9 * sum(ratios) + 0.8), layout="constrained")
    grid = figure.add_gridspec(len(panels), 1, height_ratios=ratios)
    if shown:
        row = grid[0].subgridspec(1, len(shown))
        for k, (cells, goals, counts) in enumerate(shown):
            axis = figure.add_subplot(row[k])
            axis.plot(*cells.T, "-o", color="black", ms=3, lw=1.5)
            axis.plot(*cells[-1], "o", color="black", ms=9)
            for g, goal in enumerate(goals):
                axis.plot(*goal, "*", color=f"C{g}", ms=16, mec="black" if g == counts else f"C{g}")
            axis.set(xlim=(-0.5, 4.5), ylim=(-0.5, 4.5), aspect="equal", title=f"session {k + 1}: goal {counts + 1}")
            axis.set_xticks([]), axis.set_yticks([])
    axis = None
    for panel, slot in zip(panels, grid):
        if panel == "walks":
            continue
        axis = figure.add_subplot(slot, sharex=axis)
        if panel in lines:
            for label, y in lines[panel].items():
                axis.plot(np.arange(T), y, label=label, lw=1.5)
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        elif panel == "context":
            axis.step(np.arange(T), trajectory["contexts"], where="mid", lw=1.5)
        else:
            axis.plot(np.arange(T), trajectory["rewards"], color="black", lw=1)
        axis.set_ylabel(panel, fontsize=9)
        for t in ends:
            axis.axvline(t + 0.5, color="tab:gray", lw=1)
        for t in np.flatnonzero(trajectory["predicted_end"][:-1]):
            axis.axvline(t + 0.5, color="tab:red", lw=2, ls=":")
    axis.set(xlabel="step (grey: sessions end; red, dotted: predicted ends)", xlim=(-0.5, T - 0.4))
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_returns(file, envs, details):
    """One PNG (Figure 6 of LDM): a grid for each episode, the return of every goal's task in the goal's cell.

    envs: split -> grid environments; details: split -> task -> {"return": [of each episode]}, of `evaluate`.
    """
    train = envs.get("train", envs["test"])
    returns = np.full((train.episodes_per_task, train.num_cells), np.nan)
    for split, tasks in details.items():
        cells = envs[split].cell(envs[split].task_table).tolist()
        for name, task in tasks.items():
            returns[:, cells[envs[split].tasks.index(name)]] = task["return"]
    figure, axes = plt.subplots(1, len(returns), figsize=(3.2 * len(returns) + 0.6, 3.6), layout="constrained")
    low, high = np.nanmin(returns), np.nanmax(returns)
    for k, (axis, values) in enumerate(zip(np.atleast_1d(axes), returns)):
        image = draw_cells(axis, values, train, vmin=low, vmax=high, cmap="YlGn")
        for cell in np.flatnonzero(np.isfinite(values)):
            x, y = divmod(cell, round(len(values) ** 0.5))
            shade = "white" if values[cell] > 0.3 * low + 0.7 * high else "black"
            axis.text(x, y, f"{values[cell]:.0f}", ha="center", va="center", color=shade, fontsize=8)
        axis.set_title(f"episode {k + 1}: mean {np.nanmean(values):.2f}", fontsize=10)
    figure.suptitle("return of the task whose goal is this cell (frames: training goals)")
    figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_mixed_tasks(file, weights, rewards, train):
    """One PNG (Figure 4 of LDM): a column for each mixture, its weights over the training goals' cells, and below them
    the rewards that it pays in each cell, a cross on the largest.

    weights: (M, cells). rewards: rows of the picture by name, each (M, cells). train: the training environments.
    """
    height, width = 2.7 * (1 + len(rewards)), 2.4 * len(weights) + 0.8
    figure, axes = plt.subplots(1 + len(rewards), len(weights), figsize=(width, height), layout="constrained")
    edge = np.nanmax(np.abs(weights))
    for axis, alpha in zip(axes[0], weights):
        above = draw_cells(axis, alpha, train, vmin=-edge, vmax=edge, cmap="RdBu_r")
    for row, paid in zip(axes[1:], rewards.values()):
        for axis, reward in zip(row, paid):
            below = draw_cells(axis, reward, train, vmin=-0.1, vmax=1, cmap="Blues")
            axis.plot(*divmod(reward.argmax(), round(len(reward) ** 0.5)), "x", color="tab:red", ms=10, mew=2)
    for axis, name in zip(axes[:, 0], ["weights of training tasks", *rewards]):
        axis.set_ylabel(name)
    figure.suptitle("imagined tasks (frames: training goals; cross: largest reward)")
    figure.colorbar(above, ax=axes[0], shrink=0.8), figure.colorbar(below, ax=axes[1:], shrink=0.8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_mixture(file, means, stds, tasks):
    """One PNG: a panel for each value of w, the components as ellipses of one deviation in the plane of the first two
    principal axes of what is drawn, coloured by cluster, and the tasks' posterior means, coloured by family.

    means, stds: (W, C, Z) arrays. tasks: "family/which" -> posterior mean (Z).
    """
    points = np.array(list(tasks.values()))
    cloud = np.concatenate([points, means.reshape(-1, means.shape[-1])])
    axes2 = np.linalg.svd(cloud - cloud.mean(0), full_matrices=False)[2][:2]  # (2, Z)
    families = np.array([name.split("/")[0] for name in tasks])
    figure, axes = plt.subplots(1, len(means), figsize=(4.2 * len(means), 4.6), sharex=True, sharey=True)
    colours = plt.get_cmap("tab20" if means.shape[1] > 10 else "tab10")
    for w, axis in enumerate(axes):
        for k in range(means.shape[1]):
            covariance = axes2 * stds[w, k] ** 2 @ axes2.T  # of the component, in the plane
            values, vectors = np.linalg.eigh(covariance)
            angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
            centre, size = axes2 @ (means[w, k] - cloud.mean(0)), 2 * np.sqrt(values[::-1])
            axis.add_patch(Ellipse(centre, *size, angle=angle, color=colours(k % 20), alpha=0.25))
            axis.plot(*centre, "+", color=colours(k % 20), ms=10, mew=2)
        for i, family in enumerate(dict.fromkeys(families)):
            xy = (points[families == family] - cloud.mean(0)) @ axes2.T
            marker = "osD^vP*X<>hp"[i % 12]
            axis.plot(*xy.T, marker, ms=4, mec="black", mew=0.4, label=family, color=plt.get_cmap("turbo")(i / 15 % 1))
        axis.set_title("components at w = 0" if w == 0 else f"at draw {w} of w ~ N(0, I)")
        axis.set_xlabel("first principal axis of z")
    axes[0].set_ylabel("second principal axis of z")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="posterior means of tasks of", loc="lower center", ncols=8, fontsize=8)
    figure.tight_layout(rect=(0, 0.06 + 0.05 * math.ceil(len(labels) / 8), 1, 1))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_contexts(file, contexts, names):
    """One PNG (Figure 9 of LaSER): the contexts of exploration meta-episodes in two dimensions, a colour for each task.

    contexts (M, N, C): M meta-episodes of each of the N tasks in `names`. On their first two principal axes and, where
    scikit-learn is installed, by t-SNE.
    """
    cloud = contexts.reshape(-1, contexts.shape[-1]).astype(np.float64)
    cloud -= cloud.mean(0)
    axes2 = np.linalg.svd(cloud, full_matrices=False)
    shares = axes2[1] ** 2 / max((axes2[1] ** 2).sum(), 1e-12)
    panels = {f"principal axes ({shares[0]:.0%} and {shares[1]:.0%} of the variance)": cloud @ axes2[2][:2].T}
    try:
        from sklearn.manifold import TSNE

        panels["t-SNE"] = TSNE(perplexity=min(30, len(cloud) // 4), random_state=0).fit_transform(cloud)
    except ImportError:
        pass
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 5.4), squeeze=False, layout="constrained")
    for axis, (title, points) in zip(axes[0], panels.items()):
        for i, name in enumerate(dict.fromkeys(names)):
            rows = np.tile(np.array(names) == name, len(contexts))
            colour = plt.get_cmap("turbo")(i / max(len(set(names)) - 1, 1))
            axis.plot(*points[rows].T, "osD^vP*X"[i % 8], ms=6, mec="black", mew=0.4, color=colour, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xticks([]), axis.set_yticks([])
    figure.suptitle("contexts of exploration meta-episodes")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[:40], labels[:40], loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(file, dpi=110, bbox_inches="tight")  # tight: the legend may be wider
    plt.close(figure)


def draw_similarity(file, cosines, names):
    """One PNG: for up to 12 tasks the cosines between the codes of a meta-episode's episodes, (N, K, K)."""
    chosen = np.linspace(0, len(names) - 1, min(12, len(names))).astype(int)
    columns = min(6, len(chosen))
    rows = -(-len(chosen) // columns)
    size = (1.9 * columns + 0.9, 2.1 * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(chosen) :]:
        axis.axis("off")
    for axis, n in zip(axes.flat, chosen):
        image = axis.imshow(cosines[n], vmin=-1, vmax=1, cmap="RdBu_r")
        for (i, j), value in np.ndenumerate(cosines[n]):
            colour = "white" if abs(value) > 0.6 else "black"  # where the map is dark
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_title(names[n], fontsize=9)
        axis.set_xticks([]), axis.set_yticks([])
    figure.suptitle("similarity of the episodes of an exploration meta-episode")
    figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def describe(key):
    """A key of metrics.csv in words: eval/test/return_episode_4 -> return in episode 4, test tasks."""
    group, *path = key.split("/")
    tasks = {"charts": "training", "losses": "loss"}.get(group, group)
    if group == "eval" and len(path) > 1:
        tasks = {"train": "training"}.get(path.pop(0), key.split("/")[1]) + " tasks"
        if path[0] == "sampled":
            tasks += f", {path.pop(0)} actions"
    if len(path) > 1:
        tasks += f" of {path.pop()}"
    words = re.sub(r"_((any_)?episode|session)(?=_\d+$|$)", r"_in_\1", "_".join(path))
    words = re.sub(r"_after_(\d+)$", r"_after_\1_episodes_of_exploration", words)
    words = re.sub(r"_rec(?=_|$)", "_reconstruction", words)
    return f"{words.replace('_', ' ')}, {tasks}"


def describe_argument(name, value):
    """A run's argument in words: no_belief, True -> without belief; kl_coef, 0.1 -> KL weight 0.1."""
    if name == "total_timesteps":
        return f"{EngFormatter(sep='')(value)} steps"
    words = name.replace("_", " ").replace(" coef", " weight").replace("kl ", "KL ")
    if value is True:
        return words.replace("no ", "without ") if words.startswith("no ") else words
    values = value if isinstance(value, list) else [value]
    return " ".join([words, *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)])


def draw_curves(file, folder, keys):
    """One PNG: the curves of a run's metrics, a panel for each of `keys` that the run has."""
    metrics = read_run(folder).metrics
    keys = [key for key in keys if key in metrics]
    columns = min(4, len(keys))
    rows = -(-len(keys) // max(columns, 1))
    if not keys:
        return
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.5 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(keys) :]:
        axis.axis("off")
    for axis, key in zip(axes.flat, keys):
        axis.plot(*metrics[key], lw=1.2)
        axis.set_title(describe(key), fontsize=9)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1M
        axis.grid(alpha=0.3)
    figure.supxlabel("environment steps", fontsize=9)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def read_run(folder):
    """A run: folder, config (its arguments) and metrics, key -> array (2, N) of steps, increasing, and values.

    A last line without its end is still being written, or never was: it is left out. Raises BadInput.
    """
    for name in ("config.json", "metrics.csv"):
        if not Path(folder, name).is_file():
            raise BadInput(f"{folder} holds no run: it has no {name}")
    try:
        config = json.loads(Path(folder, "config.json").read_text())
        good = isinstance(config["seed"], int) and all(isinstance(config[x], str) for x in ("script", "env_id"))
    except (ValueError, TypeError, KeyError, RecursionError):
        good = False
    if not good:  # what every run has
        raise BadInput(f"{folder}/config.json does not hold a run's arguments")
    for name in [name for name, value in OFF.items() if config.get(name) == value]:
        del config[name]
    for name in USUAL & config.keys():  # what a run does without tells it from others; older ones say it so
        config[f"no_{name}"] = not config.pop(name)
    lines = Path(folder, "metrics.csv").read_text(errors="replace").split("\n")[:-1]
    if lines[:1] != ["global_step,key,value"]:
        raise BadInput(f"{folder}/metrics.csv does not begin with the line global_step,key,value")
    metrics, rows = {}, csv.reader(lines[1:])
    try:
        for step, key, value in rows:
            metrics.setdefault(key, {})[float(int(step))] = float(value)
    except (ValueError, OverflowError, csv.Error):
        raise BadInput(f"{folder}/metrics.csv: line {rows.line_num + 1} is not a step, a key and a value") from None
    metrics = {key: np.array(sorted(points.items())).T for key, points in metrics.items()}
    return SimpleNamespace(folder=folder, config=config, metrics=metrics)


def read_runs(folders, smooth=1):
    """Each run of the folders, of which there is one at least; its values means of so many rows. Raises BadInput."""
    if not folders:
        raise BadInput("which runs? name at least one run's folder")
    if smooth < 1:
        raise BadInput(f"--smooth must be at least 1, not {smooth}")
    runs = [read_run(folder) for folder in folders]
    for run in runs if smooth > 1 else ():
        run.metrics = {name: np.stack([x, moving_average(y, smooth)]) for name, (x, y) in run.metrics.items()}
    return runs


def last_returns(folder):
    """A run's last evaluation: returns of the test tasks' last episodes. Raises BadInput."""
    path = Path(folder, "eval.json")
    if not path.is_file():
        raise BadInput(f"{folder} has no eval.json")
    try:
        returns = [task["return"][-1] for task in json.loads(path.read_text())["tasks"]["test"].values()]
        if not returns or not np.isfinite(returns).all():
            raise ValueError
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise BadInput(f"{path} does not hold an evaluation's returns") from None
    return returns


def method(config):
    """The name of a run's algorithm."""
    name = NAMES.get(config["script"], config["script"])
    return "RL2" if name == "LDM" and config.get("num_mixture_workers") == 0 else name


def label_runs(runs, but=()):
    """Label -> its runs: of one method and one environment, with the same arguments (NO_SETTING and `but` aside).

    A label has the method's name, the environment where there are several, and the arguments that differ among the runs
    of its method and environment; one that an older run does not know yet counts as off.
    """

    def kind(run):
        return method(run.config), run.config["env_id"]

    groups, several = {}, len({run.config["env_id"] for run in runs}) > 1
    for run in runs:
        name, env_id = kind(run)
        words = [f"{name} on {env_id}" if several else name]
        peers = [peer.config for peer in runs if kind(peer) == kind(run)]
        for name in dict.fromkeys(name for config in peers for name in config if name not in {*NO_SETTING, *but}):
            value = run.config.get(name, False)
            if value is not False and any(config.get(name, False) != value for config in peers):
                words.append(describe_argument(name, value))
        groups.setdefault(", ".join(words), []).append(run)
    return groups


def group_runs(runs):
    """The groups of `label_runs`. Raises BadInput when one has a seed twice: it would count as two."""
    groups = label_runs(runs)
    for label, members in groups.items():
        if len({run.config["seed"] for run in members}) < len(members):
            names = ", ".join(f"{run.folder} (seed {run.config['seed']})" for run in members)
            raise BadInput(f"a seed of {label} is there twice: {names}")
    return groups


def common_steps(label, runs, key):
    """The steps (S) at which any of the runs has the key, where all have begun and none has ended; at most MAX_POINTS.

    Raises BadInput when there are none.
    """
    steps = [run.metrics[key][0] for run in runs]
    low, high = max(s[0] for s in steps), min(s[-1] for s in steps)
    if low > high:
        raise BadInput(f"the runs of {label} have no steps of {key} in common")
    grid = np.unique(np.concatenate(steps))
    grid = grid[(low <= grid) & (grid <= high)]
    return grid if len(grid) <= MAX_POINTS else np.linspace(low, high, MAX_POINTS)


def values_at(runs, key, steps):
    """The key's values (runs, S) at steps (S), linear between a run's rows. Raises BadInput for a nan among them."""
    values = np.stack([np.interp(steps, *run.metrics[key]) for run in runs])
    for run, row in zip(runs, values):
        if not np.isfinite(row).all():
            raise BadInput(f"{run.folder}: {key} is not a finite number everywhere")
    return values


def interquartile_mean(values):
    """Over seeds, values (seeds, S): the mean without a quarter at each end, rounded down, and the lower and upper end
    of its 95 % percentile bootstrap interval, nan for a single seed: (3, S)."""
    from scipy.stats import bootstrap, trim_mean  # here: it takes a second, and training does not need it

    def mean(x, axis):
        return trim_mean(x, 0.25, axis=axis)

    low = high = np.full(values.shape[1], np.nan)
    if len(values) > 1:  # whole seeds are drawn; batches bound the memory
        drawn = bootstrap((values,), mean, method="percentile", batch=500, rng=np.random.default_rng(0))
        low, high = drawn.confidence_interval
    return np.stack([mean(values, 0), low, high])


def draw_lines(file, lines, xlabel, ylabel, band=""):
    """One PNG. lines: label -> (x (N), array (3, N) of heights and the ends of their bands, nan for none). band: what
    the bands are, a title for the legend."""
    figure, axis = plt.subplots(figsize=(7, 4.4 + 0.2 * len(lines)), layout="constrained")
    for i, (label, (x, (y, low, high))) in enumerate(lines.items()):
        style = dict(color=f"C{i % 10}", linestyle=("-", "--", "-.")[i % 3], marker="o" if len(x) < 30 else "")
        axis.plot(x, y, ms=4, label=label, **style)
        axis.fill_between(x, low, high, color=style["color"], alpha=0.2)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1M
    if "success" in ylabel:
        axis.set_ylim(-0.03, 1.03)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", title=band or None)
    figure.savefig(file, dpi=110, bbox_inches="tight")  # tight: a long label widens the picture
    plt.close(figure)


def show(mean, low, high):
    """A cell of the table; without an interval where there is none."""
    return f"{mean:.4g}" if np.isnan(low) else f"{mean:.4g} [{low:.4g}, {high:.4g}]"


def moving_average(values, window):
    """The mean of each value and the window - 1 before it, or as many as there are: (N,) -> (N,)."""
    return np.array([values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))])


def find_episodes(runs, name):
    """What counts the episodes of a task, in words, and episode -> its key, of those that all runs have."""
    for kind, words in (("episode", "episode of a task"), ("after", "episodes of exploration before")):
        episodes = {k: f"{name}_{kind}_{k}" for k in range(len(runs[0].metrics) + 1)}
        episodes = {k: key for k, key in episodes.items() if all(key in run.metrics for run in runs)}
        if episodes:
            return words, episodes
    return "", {}


def follow(label, runs, key):
    """The steps (S) that all runs have, and the key's interquartile mean and interval there (3, S). Says who is behind.

    Raises BadInput.
    """
    steps = common_steps(label, runs, key)
    ends = {run.metrics[key][0, -1]: run.folder for run in runs}
    if len(ends) > 1:
        print(f"plot: {label} stops at step {steps[-1]:,.0f}, the last of {ends[min(ends)]}", file=sys.stderr)
    return steps, interquartile_mean(values_at(runs, key, steps))


def at_step(runs, keys, step):
    """The interquartile means and intervals of keys at one step: (3, K). Raises BadInput."""
    return interquartile_mean(np.concatenate([values_at(runs, key, [step]) for key in keys], axis=1))


def compare(folders, key, out, smooth=1):
    """learning_curves.png and adaptation.png in the folder `out`; returns the table, lines of Markdown.

    Its values, and the adaptation's, are those at the last step that all runs of a group have reached; each is the mean
    of a run's last `smooth` rows. Raises BadInput.
    """
    runs = read_runs(folders, smooth)
    keys = sorted({name for run in runs for name in run.metrics})
    if key not in keys:
        near = ", ".join(difflib.get_close_matches(key, keys, n=5, cutoff=0)) or "none at all"
        raise BadInput(f"no run has the key {key}; the nearest they have: {near}")
    for run in runs:
        if key not in run.metrics:
            print(f"plot: {run.folder} has no {key} and is left out", file=sys.stderr)
    split = re.match(r"eval/[^/]+(/sampled)?|[^/]*", key)[0]
    name = next((name for name in ("success_rate", "score") if name in key), "return")
    groups = group_runs([run for run in runs if key in run.metrics])
    notes = ["interquartile mean and its 95 % bootstrap interval over seeds"] * any(len(g) > 1 for g in groups.values())
    notes += [f"mean of the last {smooth} rows"] * (smooth > 1)
    curves, adaptation, xlabel = {}, {}, ""
    table = [f"| group | seeds | steps | {describe(key)}: IQM [95 % interval] | by episodes |", "|---" * 5 + "|"]
    for label, members in groups.items():
        legend = f"{label} ({len(members)} seed{'s' * (len(members) > 1)})"
        steps, curve = curves[legend] = follow(label, members, key)
        words, episodes = find_episodes(members, f"{split}/{name}")
        if episodes:
            adaptation[legend], xlabel = (np.array([*episodes]), at_step(members, episodes.values(), steps[-1])), words
        cells = [show(*column) for column in adaptation[legend][1].T] if episodes else ["-"]
        table.append(f"| {label} | {len(members)} | {steps[-1]:,.0f} | {show(*curve[:, -1])} | {', '.join(cells)} |")
    Path(out).mkdir(parents=True, exist_ok=True)
    draw_lines(Path(out, "learning_curves.png"), curves, "environment steps", describe(key), "; ".join(notes))
    if adaptation:
        ylabel = describe(f"{split}/{name}")
        draw_lines(Path(out, "adaptation.png"), adaptation, xlabel, ylabel, "; ".join(notes))
    else:
        print(f"plot: no picture of the adaptation, as no run has {split}/{name}_episode_1", file=sys.stderr)
    return table


def why_not(run, members):
    """Why --grid does not draw a run with the `members` of its line, in words; "" where it does."""
    config, env_id = run.config, run.config["env_id"]
    if env_id not in PANELS:
        return f"{env_id} has no panel"
    if method(config) not in ALGORITHMS:
        return f"{method(config)} is none of {', '.join(ALGORITHMS)}"
    if env_id == "HalfCheetahVel" and config.get("split_rule") != "ldm":
        return "the panel of HalfCheetahVel is of --split-rule ldm"
    for name, value in config.items():
        if value is True and name.startswith(("no_", "oracle")) and name != "no_belief":
            return f"it is an ablation or an oracle: {describe_argument(name, value)}"
    for first in members[:1]:
        for name in dict.fromkeys([*first.config, *config]):
            values = first.config.get(name, False), config.get(name, False)
            if values[0] != values[1] and name not in NO_SETTING | LENGTH and not name.startswith("eval_"):
                return f"--{name.replace('_', '-')} is not as in {Path(first.folder).name}"
    if config["seed"] in {member.config["seed"] for member in members}:
        return f"seed {config['seed']} of {method(config)} on {env_id} is drawn already"
    return ""


def choose_runs(runs):
    """environment -> algorithm -> its runs: the first one there is, and further seeds of it, of any length. Says which
    are left out, and why."""
    chosen, left = {env_id: {} for env_id in PANELS}, {}
    for run in runs:
        lines = chosen.get(run.config["env_id"], {})
        name = "without belief" if run.config.get("no_belief") else method(run.config)
        why = why_not(run, lines.get(name, []))
        (left.setdefault(why, []) if why else lines.setdefault(name, [])).append(run)
    for why, members in left.items():
        print(f"plot: left out, as {why}: {', '.join(Path(run.folder).name for run in members)}", file=sys.stderr)
    return chosen


def last_episode(runs, names):
    """Of the first of the names that all runs have: the key of its last episode, and episode -> key; "", {} if none."""
    for name in names:
        words, episodes = find_episodes(runs, name)
        if words.startswith("episodes of exploration"):  # k of them come before episode k + 1; without any it is blind
            episodes = {k + 1: key for k, key in episodes.items() if k > 0}
        for key in [name, *[*episodes.values()][-1:]]:
            if all(key in run.metrics for run in runs):
                return key, episodes
    return "", {}


def read_panel(env_id, groups):
    """Of an environment: algorithm -> its curve, steps (S) and (3, S); algorithm -> its adaptation, episodes (K) and
    (3, K); what that is of: the panel's measure if all runs have it by episodes, else return; rows of a table.

    Raises BadInput.
    """

    def find(word):
        for prefix in ["eval/test/sampled/"] * env_id.startswith("ML") + ["eval/test/"]:  # the same one for all lines
            keys = {label: last_episode(runs, [prefix + word]) for label, runs in groups.items()}
            if all(key for key, _ in keys.values()):
                break
        return keys

    word, _ = PANELS[env_id]
    found = by_episode = find(word)
    if not all(episodes for _, episodes in found.values()):
        word, by_episode = "return", find("return")
    curves, adaptation, rows = {}, {}, []
    for label, (key, _) in found.items():
        runs, episodes = groups[label], by_episode[label][1]
        if not key:
            print(f"plot: {label} on {env_id} has no {PANELS[env_id][0]} and is left out", file=sys.stderr)
            continue
        steps, curve = curves[label] = follow(f"{label} on {env_id}", runs, key)
        if len(episodes) > 1:
            adaptation[label] = np.array([*episodes]), at_step(runs, episodes.values(), steps[-1])
        cells = [show(*column) for column in adaptation[label][1].T] if len(episodes) > 1 else ["-"]
        row = [env_id, label, str(len(runs)), f"{steps[-1]:,.0f}", show(*curve[:, -1]), ", ".join(cells)]
        rows.append(f"| {' | '.join(row)} |")
    return curves, adaptation, word, rows


def draw_panel(axes, env_id, curves, adaptation, word):
    """What `read_panel` returns: in the first of the axes the curves, in the second one, if any, the adaptation; dashed
    what bounds them, named on the right."""
    measure, bounds = PANELS[env_id]
    for axis, lines, what in zip(axes, (curves, adaptation), (measure, word)):
        for label, (x, (y, low, high)) in lines.items():
            i = ALGORITHMS.index(label)
            axis.plot(x, y, color=f"C{i}", marker="osDP^vX"[i] if len(x) < 15 else "", ms=6, lw=2, label=label)
            axis.fill_between(x, low, high, color=f"C{i}", alpha=0.2)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1M
        axis.grid(alpha=0.3)
        if what == "success_rate":
            axis.set_ylim(-0.03, 1.03)
    axes[0].set_xlim(0)
    measured = axes if word == measure else axes[:1]
    for i, (label, values) in enumerate(bounds.items()):
        values = np.atleast_1d(values)
        for axis in measured:
            if axis is axes[0] or len(values) == 1:
                axis.axhline(values[-1], color="0.4", ls="--", zorder=1)
            else:
                axis.plot(range(1, len(values) + 1), values, color="0.4", ls="--", zorder=1)
        style = dict(va=("bottom", "top")[i] if len(bounds) > 1 else "center", color="0.4", fontsize="small")
        place = dict(xycoords=("axes fraction", "data"), xytext=(5, 0), textcoords="offset points")
        measured[-1].annotate(label, (1, values[-1]), **place, **style)


def draw_grid(file, panels, note):
    """One PNG: two columns of panels, and above them the legend with its title `note`. panels: environment -> title,
    and curves, adaptation and word of `read_panel`."""
    with plt.rc_context({"font.size": 13, "axes.titlesize": 14, "axes.titlelocation": "left"}):
        figure = plt.figure(figsize=(16, 1.4 * len(panels) + 1), layout="constrained")
        grid = figure.add_gridspec(-(-len(panels) // 2), 4, width_ratios=[3, 2, 3, 2])
        for i, (env_id, (title, curves, adaptation, word)) in enumerate(panels.items()):
            row, column = i // 2, i % 2 * 2
            axes = [figure.add_subplot(grid[row, column : column + (1 if adaptation else 2)], title=title)]
            if not curves:
                axes[0].set(xticks=[], yticks=[])
                continue
            if adaptation:
                same = word == PANELS[env_id][0]
                axes.append(figure.add_subplot(grid[row, column + 1], sharey=axes[0] if same else None))
                axes[1].set_title("by episode" if same else f"{word} by episode")
                axes[1].tick_params(labelleft=not same)
            draw_panel(axes, env_id, curves, adaptation, word)
        handles = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels())}
        labels = [label for label in ALGORITHMS if label in handles]
        figure.legend(
            [handles[x] for x in labels], labels, title=note, loc="outside upper center", ncols=len(ALGORITHMS)
        )
        figure.savefig(file, dpi=100)
        plt.close(figure)


def benchmark(folders, out, smooth=1):
    """benchmark.png in the folder `out`, of the runs behind the README if there are no folders; returns its numbers,
    lines of Markdown. Raises BadInput."""
    results = Path(__file__).parents[1] / ".github/results"
    runs = read_runs(folders or sorted(path.parent for path in results.glob("*/config.json")), smooth)
    table = ["| environment | algorithm | seeds | steps | last episode: IQM [95 % interval] | by episodes |"]
    table.append("|---" * 6 + "|")
    panels = {}
    for env_id, groups in choose_runs(runs).items():
        *panel, rows = read_panel(env_id, groups)
        many = sorted({len(members) for members in groups.values()})
        seeds = f"{'-'.join(map(str, many[:: max(len(many) - 1, 1)]))} seed{'s' * (many[-1:] > [1])}"
        measure = PANELS[env_id][0].replace("success_rate", "success")
        panels[env_id] = f"{env_id}: {f'{measure} ({seeds})' if rows else 'no rows'}", *panel
        table += rows
    if len(table) == 2:
        raise BadInput(f"none of these runs has evaluations on an environment of --grid: {', '.join(PANELS)}")
    note = "left: over environment steps; right: by episode of a task (LaSER: of which all but the last explored)\n"
    note += "interquartile mean over seeds, 95 % bootstrap interval (one seed: none); dashed: bounds and floors"
    note += f"; means of {smooth} rows" * (smooth > 1)
    Path(out).mkdir(parents=True, exist_ok=True)
    draw_grid(Path(out, "benchmark.png"), panels, note)
    return table


def draw_boxes(file, folders, name):
    """One PNG (Figure 8 of DynaMITE-RL): over the argument `name` of the runs, boxes of their last evaluation's returns
    of the test tasks, a colour for each script, environment and all other arguments; runs that differ in nothing but
    seeds share a box.

    Raises BadInput for a run without an evaluation, or without that argument.
    """
    boxes = {}
    for label, runs in label_runs(read_runs(folders), but=[name]).items():
        for run in runs:
            if name not in run.config:
                raise BadInput(f"{run.folder} has no argument {name}")
            value = run.config[name]
            value = value if isinstance(value, (int, float, str)) else str(value)  # of several numbers
            boxes.setdefault(label, {}).setdefault(value, []).extend(last_returns(run.folder))
    values = {value for box in boxes.values() for value in box}
    values = sorted(values, key=lambda value: (isinstance(value, str), value))
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    width = 0.8 / len(boxes)
    for i, (label, box) in enumerate(boxes.items()):
        places = [values.index(value) + (i - (len(boxes) - 1) / 2) * width for value in box]
        style = dict(widths=0.8 * width, patch_artist=True, medianprops=dict(color="black"))
        made = axis.boxplot(list(box.values()), positions=places, **style)
        for patch in made["boxes"]:
            patch.set_facecolor(f"C{i}")
        axis.plot([], color=f"C{i}", lw=8, label=label)
    axis.set_xticks(range(len(values)), [f"{value}"[:30] for value in values])
    axis.set(xlabel=name.replace("_", " "), ylabel="return of each test task, last episode")
    axis.grid(alpha=0.3, axis="y"), axis.legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m common.plot", description=__doc__.split("\n\n")[1])
    parser.add_argument("runs", nargs="*", help="folders of runs")
    parser.add_argument("--key", default="eval/test/return", help="a key of their metrics.csv (%(default)s)")
    parser.add_argument("--out", default=".", help="folder for the pictures (%(default)s)")
    parser.add_argument("--smooth", type=int, default=1, help="moving average over so many rows (%(default)s)")
    parser.add_argument(
        "--grid", action="store_true", help="benchmark.png alone; of the runs in .github/results if none"
    )
    parser.add_argument("--boxes", metavar="ARGUMENT", help="boxes.png, too: evaluation returns over this argument")
    args = parser.parse_args(argv)
    try:
        if args.boxes:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            draw_boxes(Path(args.out, "boxes.png"), args.runs, args.boxes.replace("-", "_"))
        table = benchmark if args.grid else functools.partial(compare, key=args.key)
        print(*table(args.runs, out=args.out, smooth=args.smooth), sep="\n")
    except (BadInput, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
