"""Pictures of runs."""

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt


def draw_grid_belief(file, title, path, goal, maps, horizon):
    """One PNG: a row for each episode, a panel for each step, the believed goal as a heat map under the agent's path.

    path: obs, next_obs (T, 2), success (T,), as arrays. goal: (2,). maps: (T + 1, cells), p(goal) of every cell.
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
    figure.suptitle(f"{title}: belief after each step (blue: p(goal)), path (orange), goal (star, green when reached)")
    figure.tight_layout(rect=(0, 0, 0.95, 0.97))
    figure.colorbar(image, cax=figure.add_axes((0.96, 0.1, 0.01, 0.78)))
    figure.savefig(file, dpi=110)
    plt.close(figure)
