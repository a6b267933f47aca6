"""Pictures of runs."""

import math

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Ellipse


def draw_grid_belief(file, title, path, goal, maps, horizon):
    """One PNG: a row for each episode, a panel for each step, the believed goal as a heat map under the agent's path.

    path: obs, next_obs (T, 2), success (T,), as arrays. goal: (2,). maps (T + 1, cells): p(reward).
    """
    T, size = len(path["obs"]), round(maps.shape[1] ** 0.5)
    rows = T // horizon
    figure, axes = plt.subplots(rows, horizon, figsize=(horizon * 0.95, rows * 1.15 + 0.6), squeeze=False)
    for t in range(T):
        axis, first = axes[t // horizon, t % horizon], t - t % horizon
        image = axis.imshow(maps[t + 1].reshape(size, size).T, origin="lower", vmin=0, vmax=1, cmap="Blues")
        walk = [path["obs"][first], *path["next_obs"][first : t + 1]]
        axis.plot([p[0] for p in walk], [p[1] for p in walk], color="tab:orange", lw=1.5)
        axis.plot(*walk[-1], "o", color="tab:orange", ms=5)
        axis.plot(*goal, "*", color="tab:green" if path["success"][t] else "tab:red", ms=7)
        axis.set_xticks([]), axis.set_yticks([])
        if t < horizon:
            axis.set_title(f"step {t + 1}", fontsize=8)
        if t == first:
            axis.set_ylabel(f"episode {t // horizon + 1}", fontsize=9)
    figure.suptitle(f"{title}: believed probability of a reward (blue), path (orange), goal (star, green when reached)")
    figure.tight_layout(rect=(0, 0, 0.95, 0.97))
    figure.colorbar(image, cax=figure.add_axes((0.96, 0.1, 0.01, 0.78)))
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
