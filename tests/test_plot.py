"""Curves and tables over seeds, against sums, sorts and loops written out here."""

import csv
import json
import random

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from common import plot
from common.envs import BadInput

KEY = "eval/test/return"


def write_run(folder, rows, script="varibad", env_id="GridWorld", seed=1, **arguments):
    """A run's folder as a run leaves it. rows: (step, key, value)."""
    folder.mkdir()
    config = dict(script=script, env_id=env_id, seed=seed, run_dir=str(folder), **arguments)
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([("global_step", "key", "value"), *rows])
    return str(folder)


def curve(values, steps=(0, 1000), key=KEY):
    return [(step, key, value) for step, value in zip(steps, values)]


def command(capsys, *words):
    """Exit status, lines of stdout, lines of stderr of python -m common.plot words."""
    status = 0
    try:
        plot.main([str(word) for word in words])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def sort_and_drop(numbers):
    """The mean of a list without its lowest and its highest quarter."""
    kept = sorted(numbers)
    for _ in range(len(numbers) // 4):
        kept.remove(min(kept))
        kept.remove(max(kept))
    return sum(kept) / len(kept)


@pytest.fixture
def drawn(monkeypatch):
    """What reaches the pictures: file name -> (lines, x label, y label); nothing is drawn."""
    calls = {}
    monkeypatch.setattr(plot, "draw_lines", lambda file, *words: calls.update({file.name: words}))
    return calls


# ---------- Numbers ----------


@pytest.mark.parametrize("seeds", range(1, 13))
def test_interquartile_mean(seeds):
    values = np.random.default_rng(seeds).normal(size=(seeds, 3))
    values[0] = 1e6  # an outlier: gone as soon as there is a quarter to drop
    mean = plot.interquartile_mean(values)[0]
    np.testing.assert_allclose(mean, [sort_and_drop(list(column)) for column in values.T])
    assert (mean < 100).all() == (seeds >= 4)


@pytest.mark.parametrize("seeds", [5, 10])
def test_interval_is_the_percentile_bootstrap(seeds):
    values = np.random.default_rng(seeds).normal(size=(seeds, 2))
    dice = random.Random(1)
    mean, low, high = plot.interquartile_mean(values)
    for column, *interval in zip(values.T.tolist(), low, high):
        draws = sorted(sort_and_drop([dice.choice(column) for _ in column]) for _ in range(8000))
        spread = draws[7800] - draws[200]
        np.testing.assert_allclose(interval, [draws[200], draws[7800]], atol=0.05 * spread)
    assert (values.min(0) <= low).all() and (low < mean).all() and (mean < high).all() and (high <= values.max(0)).all()


def test_interval_is_equivariant_and_repeatable():
    values = np.random.default_rng(3).normal(size=(6, 4))
    mean, low, high = plot.interquartile_mean(values)
    np.testing.assert_array_equal(plot.interquartile_mean(values), [mean, low, high])
    np.testing.assert_allclose(plot.interquartile_mean(5 - 2 * values), [5 - 2 * mean, 5 - 2 * high, 5 - 2 * low])
    assert np.isnan(plot.interquartile_mean(values[:1])[1:]).all()  # one seed tells no spread
    np.testing.assert_allclose(plot.interquartile_mean(values[[0, 0, 0]]), [values[0]] * 3)  # nor do equal ones


def test_interval_covers_the_mean():
    values = np.random.default_rng(4).normal(size=(20, 100))  # 100 experiments of 20 seeds, all of mean 0
    _, low, high = plot.interquartile_mean(values)
    assert 0.86 < ((low < 0) & (0 < high)).mean() < 0.98  # a percentile interval of few seeds is a little narrow


def test_runs_with_other_steps_are_interpolated_where_all_have_values(tmp_path):
    rows = [[(0, 5.0), (100, 1.0), (400, 7.0)], [(50, 2.0), (250, 6.0), (900, -3.0)], [(30, 0.0), (500, 47.0)]]
    folders = [
        write_run(tmp_path / str(seed), [(step, KEY, value) for step, value in run], seed=seed)
        for seed, run in enumerate(rows)
    ]
    runs = [plot.read_run(folder) for folder in folders]
    steps = plot.common_steps("group", runs, KEY)
    assert steps.tolist() == [50, 100, 250, 400]  # from the last to begin to the first to end
    found = plot.values_at(runs, KEY, steps)
    for i, run in enumerate(rows):
        for j, step in enumerate(steps):
            for (s, a), (t, b) in zip(run, run[1:]):
                if s <= step <= t:
                    assert found[i, j] == pytest.approx(a + (b - a) * (step - s) / (t - s))
    np.testing.assert_allclose(found[:, 1], [1, 3, 7])  # by hand


def test_smooth(tmp_path, capsys, drawn):
    """--smooth 3: each value is the mean of the last three rows, of the first ones as many as there are."""
    folder = write_run(tmp_path / "run", curve([1.0, 5.0, 3.0, 4.0, -7.0], range(0, 50, 10)))
    command(capsys, folder, "--smooth", 3, "--key", KEY, "--out", tmp_path)
    (x, (y, *_)), *_ = drawn["learning_curves.png"][0].values()
    assert x.tolist() == [0, 10, 20, 30, 40] and y.tolist() == pytest.approx([1, 3, 3, 4, 0])
    assert command(capsys, folder, "--smooth", 0)[0] == 2


def test_long_runs_have_so_many_points(tmp_path):
    folder = write_run(tmp_path / "run", curve(range(1000), range(10, 5010, 5)))
    run = plot.read_run(folder)
    steps = plot.common_steps("group", [run], KEY)
    assert len(steps) == plot.MAX_POINTS and steps[0] == 10 and steps[-1] == 5005
    np.testing.assert_allclose(plot.values_at([run], KEY, steps)[0], (steps - 10) / 5)


# ---------- Files ----------


def test_a_line_without_its_end_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", curve([1.5, 2.5]))
    with open(tmp_path / "run/metrics.csv", "a") as file:
        file.write(f"2000,{KEY},9")  # of 9.75
    np.testing.assert_array_equal(plot.read_run(folder).metrics[KEY], [[0, 1000], [1.5, 2.5]])


def test_the_later_of_two_rows_and_any_order(tmp_path):
    run = plot.read_run(write_run(tmp_path / "run", curve([3, 1, 2], [20, 10, 10])))
    np.testing.assert_array_equal(run.metrics[KEY], [[10, 20], [2, 3]])


# ---------- Groups ----------


def test_seeds_are_one_group_and_flags_are_others(tmp_path):
    base = dict(no_belief=False, kl_coef=0.1, policy_layers=[32], cuda=False, versions=dict(torch="1"))
    settings = [
        dict(seed=1),
        dict(seed=2, cuda=True, versions=dict(torch="2"), eval_interval=7),
        dict(seed=1, no_belief=True),
        dict(seed=1, kl_coef=0.25, policy_layers=[64, 64]),
        dict(seed=1, env_id="ML1-reach", no_belief=True),  # nothing to tell it from, there
        dict(seed=1, script="dme", reward_coef=5.0),
        dict(seed=2, no_belief=True),
    ]
    runs = [plot.read_run(write_run(tmp_path / str(i), [], **base | s)) for i, s in enumerate(settings)]
    groups = plot.group_runs(runs)
    assert {label: [runs.index(run) for run in members] for label, members in groups.items()} == {
        "variBAD on GridWorld, KL weight 0.1, policy layers 32": [0, 1],
        "variBAD on GridWorld, without belief, KL weight 0.1, policy layers 32": [2, 6],
        "variBAD on GridWorld, KL weight 0.25, policy layers 64 64": [3],
        "variBAD on ML1-reach": [4],
        "DME on GridWorld": [5],
    }


def test_an_argument_that_an_older_run_does_not_know_is_off(tmp_path):
    settings = [dict(), dict(obs_shift=0.0, hard_y=False), dict(obs_shift=0.5), dict(hard_y=True)]
    runs = [plot.read_run(write_run(tmp_path / str(i), [], seed=i, **s)) for i, s in enumerate(settings)]
    assert list(plot.group_runs(runs[:2])) == ["variBAD"]
    assert list(plot.group_runs(runs[::2])) == ["variBAD", "variBAD, obs shift 0.5"]
    assert list(plot.group_runs(runs[::3])) == ["variBAD", "variBAD, hard y"]


def test_names_are_words(tmp_path):
    """RL2 is a method of its own; what the other methods lack tells nothing about it; keys are words, too."""
    settings = [
        dict(script="ldm", num_mixture_workers=2, total_timesteps=100_000_000),
        dict(script="ldm", num_mixture_workers=2, total_timesteps=30_000_000),
        dict(script="ldm", num_mixture_workers=0, total_timesteps=30_000_000, elbo_terms=0),
        dict(script="dynamite_rl", no_session_reconstruction=False),
        dict(script="dynamite_rl", session_reconstruction=False),
        dict(script="dynamite_rl", session_reconstruction=True),
        dict(script="laser"),
    ]
    runs = [plot.read_run(write_run(tmp_path / str(i), [], **s)) for i, s in enumerate(settings)]
    runs[4].config["seed"], runs[5].config["seed"] = 2, 3  # the plain run of an older version, and of this one
    assert list(plot.group_runs(runs)) == [
        "LDM, 100M steps", "LDM, 30M steps", "RL2", "DynaMITE-RL", "DynaMITE-RL, without session reconstruction",
        "LaSER",
    ]  # fmt: skip
    words = {
        "eval/test/return": "return, test tasks",
        "eval/test/return_episode_4": "return in episode 4, test tasks",
        "eval/test2/success_rate_any_episode": "success rate in any episode, test2 tasks",
        "eval/train/success_rate_episode_2/reach-v3": "success rate in episode 2, training tasks of reach-v3",
        "eval/test/return_session_10": "return in session 10, test tasks",
        "eval/test/score_after_0": "score after 0 episodes of exploration, test tasks",
        "charts/episodic_return": "episodic return, training",
        "losses/encoder_task_rec": "encoder task reconstruction, loss",
    }
    assert {key: plot.describe(key) for key in words} == words


# ---------- The command ----------


def test_table_and_pictures(tmp_path, capsys, drawn):
    last = {1: [4.0, 10.0], 2: [3.0, 11.0], 3: [5.0, 12.0], 4: [400.0, 1300.0]}  # by seed: return of the two episodes
    folders = []
    for seed, (one, two) in last.items():
        rows = curve([0, one], key=f"{KEY}_episode_1") + curve([0, two], key=f"{KEY}_episode_2") + curve([seed, two])
        folders.append(write_run(tmp_path / f"v{seed}", rows, seed=seed))
    rows = curve([0.25, 0.5], [0, 2000], f"{KEY}_episode_1") + curve([-1, 0.125], [0, 2000])
    folders.append(write_run(tmp_path / "d", rows, script="dme"))
    status, out, err = command(capsys, *folders, "--key", KEY, "--out", tmp_path / "new/folder")
    assert (status, err) == (0, [])
    assert cells(out[0])[:3] == ["group", "seeds", "steps"] and "return, test tasks" in cells(out[0])[3]
    assert set(out[1]) == set("|-") and len({line.count("|") for line in out}) == 1 and len(out) == 4
    group, seeds, steps, result, episodes = cells(out[2])
    assert (group, seeds, steps) == ("variBAD", "4", "1,000")
    # of 4 seeds the middle two count: 4, 5 and 11, 12. Three draws or four of 4 are the lowest seed with probability
    # 13 / 256, more than the 2.5 % below the interval: its ends are the lowest and the highest seed
    assert result == "11.5 [10, 1300]" and episodes == "4.5 [3, 400], 11.5 [10, 1300]"
    assert cells(out[3]) == ["DME", "1", "2,000", "0.125", "0.5"]
    (curves, *labels), (adaptation, *_) = drawn["learning_curves.png"], drawn["adaptation.png"]
    assert list(curves) == list(adaptation) == ["variBAD (4 seeds)", "DME (1 seed)"]
    assert labels[:2] == ["environment steps", "return, test tasks"] and "bootstrap" in labels[2]
    x, y = curves["variBAD (4 seeds)"]
    assert x.tolist() == [0, 1000] and y[0].tolist() == [2.5, 11.5]
    x, y = adaptation["variBAD (4 seeds)"]
    assert x.tolist() == [1, 2] and y[0].tolist() == [4.5, 11.5]


def test_adaptation_is_of_the_keys_split_and_kind(tmp_path, capsys, drawn):
    rows, wanted, dice = [], {}, random.Random(0)
    for split in ("eval/train", "eval/test", "charts"):
        for name in ("return", "success_rate"):
            wanted[split, name] = [round(dice.random(), 3) for _ in range(3)]
            for k, value in enumerate(wanted[split, name], 1):
                rows += curve([0, value], key=f"{split}/{name}_episode_{k}")
            rows += curve([0, value], key=f"{split}/{name}") + curve([0, 0.7], key=f"{split}/{name}/family")
    folder = write_run(tmp_path / "run", rows)
    for (split, name), values in wanted.items():
        for key in (f"{split}/{name}", f"{split}/{name}/family"):
            _, out, _ = command(capsys, folder, "--key", key, "--out", tmp_path)
            assert [float(x) for x in cells(out[2])[4].split(",")] == values
            assert drawn["adaptation.png"][0]["variBAD (1 seed)"][1][0].tolist() == values
            assert drawn["adaptation.png"][2] == plot.describe(f"{split}/{name}")


def test_adaptation_over_episodes_of_exploration(tmp_path, capsys, drawn):
    rows = [row for k in range(5) for row in curve([0, k / 10], key=f"eval/test/score_after_{k}")]
    folder = write_run(tmp_path / "run", rows, script="laser")
    _, out, _ = command(capsys, folder, "--key", "eval/test/score_after_4", "--out", tmp_path)
    lines, xlabel, ylabel, note = drawn["adaptation.png"]
    x, (y, *_) = lines["LaSER (1 seed)"]
    assert x.tolist() == [0, 1, 2, 3, 4] and y.tolist() == [0, 0.1, 0.2, 0.3, 0.4]
    assert xlabel.startswith("episodes of exploration") and ylabel == "score, test tasks" and note == ""


def test_last_values_are_those_at_the_last_step_that_all_have_reached(tmp_path, capsys, drawn):
    rows = [(step, key, step / 10) for step in (100, 200, 300) for key in (KEY, KEY + "_episode_1")]
    folders = [write_run(tmp_path / "a", rows, seed=1), write_run(tmp_path / "b", rows[:4], seed=2)]
    status, out, err = command(capsys, *folders, "--out", tmp_path)
    assert cells(out[2])[2:] == ["200", "20 [20, 20]", "20 [20, 20]"]
    assert status == 0 and len(err) == 1 and "step 200" in err[0] and folders[1] in err[0]  # and said who is behind


def test_a_run_without_the_key_is_named_and_left_out(tmp_path, capsys, drawn):
    folders = [write_run(tmp_path / "a", curve([1, 2])), write_run(tmp_path / "b", [], seed=2)]
    status, out, err = command(capsys, *folders, "--out", tmp_path)
    assert status == 0 and cells(out[2])[1] == "1"
    assert folders[1] in err[0] and "left out" in err[0] and "episode_1" in err[1]
    assert list(drawn) == ["learning_curves.png"]  # nobody has episodes


def test_pictures_hold_what_they_should(tmp_path, capsys, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    folders = []
    for i, (script, seed) in enumerate([("varibad", 1), ("varibad", 2), ("dme", 1)]):
        rows = curve([0, i / 4], [0, 4e6], "eval/test/success_rate")
        rows += curve([0, i / 4], [0, 4e6], "eval/test/success_rate_episode_1")
        rows = [(int(step), key, value) for step, key, value in rows]
        folders.append(write_run(tmp_path / str(i), rows, script=script, seed=seed))
    command(capsys, *folders, "--key", "eval/test/success_rate", "--out", tmp_path)
    monkeypatch.undo()
    for name, figure in zip(("learning_curves.png", "adaptation.png"), figures):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        (axis,), (legend,) = figure.axes, figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [
            "variBAD (2 seeds)",
            "DME (1 seed)",
        ]
        varibad, dme = axis.lines
        assert varibad.get_color() != dme.get_color() and varibad.get_linestyle() != dme.get_linestyle()
        assert varibad.get_ydata()[-1] == 0.125 and dme.get_ydata()[-1] == 0.5
        bands = [[path.vertices[:, 1] for path in band.get_paths()] for band in axis.collections]
        assert bands[0][0].max() == 0.25 and not any(np.isfinite(y).any() for y in bands[1])  # one seed: no band
        ticks = [text.get_text() for text in axis.get_xticklabels()]
        assert ("1M" in ticks) == (name == "learning_curves.png")
        plt.close(figure)


def test_belief_in_a_grid(tmp_path, monkeypatch):
    """A panel for each step, and a film of a frame for each moment, both of the belief after the steps shown."""
    episodes, horizon = 2, 3
    T = episodes * horizon
    x = np.array([[1, 2, 2], [1, 1, 2]]).reshape(T)  # where each step leads; the goal is at (2, 0)
    after = np.stack([x, 0 * x, 0 * x], axis=1)  # the third number is no place
    before = np.concatenate([[[0, 0, 0]], after[:-1]])
    before[::horizon] = 0
    path = dict(obs=before, next_obs=after, success=x == 2)
    maps = np.random.default_rng(0).random((T + 1, 9))
    figures, frames = [], []
    monkeypatch.setattr(plt, "close", figures.append)
    draw = plt.Figure.draw

    def record(figure, *rest):
        (axis,) = figure.axes if len(figure.axes) == 1 else [None]
        if axis:
            frames.append((axis.collections[0].get_array().copy(), axis.lines[0].get_xydata().copy()))
        draw(figure, *rest)

    monkeypatch.setattr(plt.Figure, "draw", record)
    plot.draw_grid_belief(tmp_path / "belief.png", "task", path, np.array([2, 0]), maps, horizon)
    monkeypatch.undo()
    panels = [axis for axis in figures[0].axes if axis.lines]
    for t, axis in enumerate(panels):
        np.testing.assert_array_equal(np.ravel(axis.collections[0].get_array()), np.ravel(maps[t + 1].reshape(3, 3).T))
        first = t - t % horizon
        np.testing.assert_array_equal(axis.lines[0].get_xydata()[:, 0], [0, *x[first : t + 1]])
        assert axis.lines[2].get_color() == ("tab:green" if x[t] == 2 else "tab:red")
    assert len(panels) == T and len(frames) == episodes * (horizon + 1)
    for i, (cells, walk) in enumerate(frames):
        episode, steps = divmod(i, horizon + 1)
        np.testing.assert_array_equal(np.ravel(cells), np.ravel(maps[episode * horizon + steps].reshape(3, 3).T))
        np.testing.assert_array_equal(walk[:, 0], [0, *x[episode * horizon :][:steps]])
    with Image.open(tmp_path / "belief.gif") as film:
        assert film.n_frames == len(frames) and 400 <= max(film.size) <= 500
        film.seek(1)
        assert film.info["duration"] == 250
    for figure in figures:
        plt.close(figure)


# ---------- The benchmark ----------


@pytest.fixture
def benchmark(tmp_path, capsys, monkeypatch):
    """Draws --grid of some folders: title -> axes of its panel, the second one for the adaptation; table; errors."""
    figures = []

    def draw(*folders):
        monkeypatch.setattr(plt, "close", figures.append)
        status, out, err = command(capsys, "--grid", *folders, "--out", tmp_path / "out")
        monkeypatch.undo()
        assert status == 0 and (tmp_path / "out/benchmark.png").read_bytes()[:4] == b"\x89PNG"
        panels = {}
        for axis in figures[-1].axes:
            title = axis.get_title(loc="left")
            if ":" in title:
                panels[title] = []
            panels[[*panels][-1]].append(axis)
        return panels, out, err

    yield draw
    for figure in figures:
        plt.close(figure)


def heights(axis, label):
    """A line's x and y, and the lower and upper end of its band at its last x (nan: none); its colour."""
    lines = [line for line in axis.lines if not line.get_label().startswith("_")]
    (i,) = (i for i, line in enumerate(lines) if line.get_label() == label)
    band = np.concatenate([path.vertices for path in axis.collections[i].get_paths()] or [np.full((1, 2), np.nan)])
    y = band[band[:, 0] == lines[i].get_xdata()[-1], 1]
    ends = [y.min(), y.max()] if len(y) else [np.nan, np.nan]
    return lines[i].get_xdata().tolist(), lines[i].get_ydata(), ends, lines[i].get_color()


def dashed(axis):
    return [np.asarray(line.get_ydata()).tolist() for line in axis.lines if line.get_linestyle() == "--"]


def test_grid(tmp_path, benchmark):
    """Lines, intervals and bounds, against sorts and sums; a panel for every environment, a colour for an algorithm."""
    dice, folders, last = random.Random(0), [], {}
    for label, script, env_id, seeds, arguments in (
        ("variBAD", "varibad", "GridWorld", 5, {}), ("RL2", "ldm", "GridWorld", 2, dict(num_mixture_workers=0)),
        ("without belief", "dme", "GridWorld", 1, dict(no_belief=True)),
        ("RL2", "ldm", "Reacher", 2, dict(num_mixture_workers=0)),
    ):  # fmt: skip
        for seed in range(seeds):
            values = {k: [dice.random() for _ in range(3)] for k in range(1, 5 if env_id == "GridWorld" else 2)}
            rows = [row for k, y in values.items() for row in curve(y, (0, 1000, 2000), f"{KEY}_episode_{k}")]
            rows += curve(values[max(values)], (0, 1000, 2000))
            if seed == 1:  # it has ended earlier
                rows = [row for row in rows if row[0] < 2000]
            last.setdefault((env_id, label), []).append(values)
            folder = tmp_path / f"{env_id}{label}{seed}"
            folders.append(write_run(folder, rows, script, env_id, seed, total_timesteps=seed, **arguments))
    panels, table, _ = benchmark(*folders)
    names = "GridWorld SparsePointRobot GridWorldLDM HalfCheetahVel GridWorldAlternating Reacher MEWAUniform".split()
    assert [title.split(":")[0] for title in panels] == [*names, "HopperMass", "ML1-reach", "ML10"]
    shown = ["GridWorld: return (1-5 seeds)", "Reacher: return (2 seeds)"]
    assert [title for title in panels if "no rows" not in title] == shown
    left, right = panels["GridWorld: return (1-5 seeds)"]
    (alone,) = panels["Reacher: return (2 seeds)"]  # it has one episode
    colours = {}
    for (env_id, label), runs in last.items():
        n = 3 if len(runs) == 1 else 2
        x, y, (low, high), colour = heights(left if env_id == "GridWorld" else alone, label)
        final = [[run[max(run)][i] for run in runs] for i in range(n)]
        assert x == [0, 1000, 2000][:n] and y == pytest.approx([sort_and_drop(numbers) for numbers in final])
        assert colours.setdefault(label, colour) == colour
        if len(runs) == 2:  # one draw in four has the same seed twice
            assert [low, high] == pytest.approx([min(final[-1]), max(final[-1])])
        elif len(runs) == 5:
            assert min(final[-1]) <= low < y[-1] < high <= max(final[-1])
        else:
            assert np.isnan([low, high]).all()
        if env_id == "GridWorld":
            x, y, _, other = heights(right, label)
            assert x == [1, 2, 3, 4] and other == colour
            assert y == pytest.approx([sort_and_drop([run[k][n - 1] for run in runs]) for k in x])
        shown = f"{sort_and_drop(final[-1]):.4g}"
        assert any(cells(row)[:3] == [env_id, label, str(len(runs))] and shown in cells(row)[4] for row in table)
    assert len(set(colours.values())) == 3
    assert dashed(left) == [[11.071, 11.071]] and dashed(right) == [[4.0, 11.071, 11.071, 11.071]]
    assert dashed(alone) == [[-68, -68]] and "at rest" in [text.get_text() for text in alone.texts]
    (legend,) = left.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["variBAD", "RL2", "without belief"]


def test_sampled_actions(tmp_path):
    """Curves, adaptation and names of --key eval/test/sampled/...: none of the most likely actions'."""
    rows = [row for k in (1, 2) for row in curve([0.5, k], key=f"eval/test/sampled/return_episode_{k}")]
    rows += [row for k in (1, 2) for row in curve([0.5, 10 * k], key=f"{KEY}_episode_{k}")]
    folder = write_run(tmp_path / "run", curve([1, 2], key="eval/test/sampled/return") + rows, "varibad", "ML10")
    *_, row = plot.compare([folder], "eval/test/sampled/return", tmp_path)
    assert [cell.strip() for cell in row.split("|")[4:6]] == ["2", "1, 2"]
    assert plot.describe("eval/test/sampled/return_episode_2") == "return in episode 2, test tasks, sampled actions"


def test_older_runs_are_of_the_same_group(tmp_path):
    """Arguments that they do not know, at values that change nothing; others tell them apart."""
    new = dict(actor_gain=1.0, extra_obs="none", control_cost="")
    configs = [dict(seed=1), dict(seed=2) | new, dict(seed=3) | new | dict(extra_obs="done")]
    folders = [write_run(tmp_path / str(n), curve([1, 2]), **config) for n, config in enumerate(configs)]
    groups = plot.label_runs([plot.read_run(folder) for folder in folders])
    assert {label: len(runs) for label, runs in groups.items()} == {"variBAD": 2, "variBAD, extra obs done": 1}


def test_grid_measures(tmp_path, benchmark):
    """Success in Meta-World, of sampled actions where all lines have it; scores; LaSER after exploration; returns
    by episode where older runs have nothing else."""
    success, score = "eval/test/success_rate", "eval/test/score"
    both = curve([0.1, 0.2], key=success) + curve([0.3, 0.4], key=f"eval/test/sampled/{success[10:]}")
    old = curve([0.5, 0.25], key=success) + [row for k in (1, 2) for row in curve([0, k], key=f"{KEY}_episode_{k}")]
    explored = [row for k in range(4) for row in curve([0, k / 10], key=f"{score}_after_{k}")]
    runs = dict(dme=("ML10", both), varibad=("ML10", curve([0.5, 0.6], key=success)), ldm=("GridWorldLDM", old))
    folders = [write_run(tmp_path / script, rows, script, env_id) for script, (env_id, rows) in runs.items()]
    folders.append(write_run(tmp_path / "reach", both, "dme", "ML1-reach"))
    folders.append(write_run(tmp_path / "laser", explored, "laser", "MEWAUniform"))
    panels, *_ = benchmark(*folders)
    (left,) = panels["ML10: success (1 seed)"]
    assert heights(left, "DME")[1].tolist() == [0.1, 0.2] and heights(left, "variBAD")[1].tolist() == [0.5, 0.6]
    assert heights(panels["ML1-reach: success (1 seed)"][0], "DME")[1].tolist() == [0.3, 0.4]
    left, right = panels["GridWorldLDM: success (1 seed)"]
    assert heights(left, "LDM")[1].tolist() == [0.5, 0.25] and heights(right, "LDM")[1].tolist() == [1, 2]
    assert dashed(left) == [[3 / 27, 3 / 27]] and dashed(right) == [] and "return" in right.get_title(loc="left")
    left, right = panels["MEWAUniform: score (1 seed)"]
    assert heights(left, "LaSER")[1].tolist() == [0, 0.3]
    assert heights(right, "LaSER")[0] == [2, 3, 4] and heights(right, "LaSER")[1].tolist() == [0.1, 0.2, 0.3]


def test_grid_leaves_out_what_is_no_seed_of_a_line(tmp_path, benchmark):
    """And says so, in a line for each reason."""
    kept = dict(
        a=dict(kl_coef=0.1),
        b=dict(kl_coef=0.1, seed=2, total_timesteps=9, elbo_terms=5, eval_tasks=3, cuda=True, obs_shift=0.0),
        c=dict(kl_coef=0.3, script="dme"),
    )
    out = dict(
        d=(dict(kl_coef=0.2, seed=3), "--kl-coef is not as in a"), e=(dict(kl_coef=0.1), "seed 1 of variBAD"),
        f=(dict(script="dynamite_rl", oracle_context=True), "an oracle: oracle context"),
        g=(dict(script="dynamite_rl", no_conditioning=True), "without conditioning"),
        h=(dict(env_id="MEWA"), "MEWA has no panel"), i=(dict(script="mine"), "mine is none of"),
        j=(dict(env_id="HalfCheetahVel", split_rule="varibad"), "--split-rule ldm"),
        k=(dict(script="laser"), "has no return"),
    )  # fmt: skip
    settings = kept | {name: arguments for name, (arguments, _) in out.items()}
    rows = {name: curve([0, 1]) if name != "k" else [] for name in settings}
    panels, table, err = benchmark(*[write_run(tmp_path / x, rows[x], **s) for x, s in settings.items()])
    assert [cells(row)[:3] for row in table[2:]] == [["GridWorld", "variBAD", "2"], ["GridWorld", "DME", "1"]]
    assert len(err) == len(out)
    for name, (_, why) in out.items():
        (line,) = (line for line in err if why in line)
        assert "left out" in line and (line.endswith(f": {name}") or name == "k")


def test_grid_of_the_runs_behind_the_readme(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plot, "draw_grid", lambda *words: None)
    status, out, _ = command(capsys, "--grid", "--out", tmp_path)
    rows = [cells(row) for row in out]
    assert status == 0 and ["GridWorld", "variBAD"] in [row[:2] for row in rows]
    assert {row[0] for row in rows[2:]} <= set(plot.PANELS)


def test_grid_of_nothing(tmp_path, capsys):
    """Runs without an evaluation, or on other environments, leave no picture of empty panels."""
    early = write_run(tmp_path / "early", [(0, "charts/SPS", 1)])
    elsewhere = write_run(tmp_path / "elsewhere", curve([0, 1]), env_id="AntDir")
    status, out, err = command(capsys, "--grid", early, elsewhere, "--out", tmp_path)
    assert status == 2 and out == [] and "none of these runs has evaluations" in err[-1]
    assert not (tmp_path / "benchmark.png").exists()


# ---------- Boxes ----------


def test_boxes(tmp_path, capsys, monkeypatch):
    """Over an argument: the last episode's returns of the test tasks, seeds pooled, scripts, settings side by side."""
    drawn = []
    boxplot = plt.Axes.boxplot
    monkeypatch.setattr(plt.Axes, "boxplot", lambda *a, **b: drawn.append((a[1], b["positions"])) or boxplot(*a, **b))
    folders = []
    for script, sessions, seed, returns, off in (
        ("a", 1, 1, [1, 2], False), ("a", 4, 1, [3], False), ("a", 4, 2, [5], False), ("a", 4, 1, [6], True),
        ("b", 4, 1, [7], False),
    ):  # fmt: skip
        folder = tmp_path / f"{script}{sessions}{seed}{'_off' * off}"
        folders.append(write_run(folder, curve([0, 1]), script=script, seed=seed, sessions=sessions, off=off))
        tasks = {str(k): {"return": [99, r]} for k, r in enumerate(returns)}
        (folder / "eval.json").write_text(json.dumps({"tasks": {"test": tasks, "train": {"x": {"return": [50]}}}}))
    status, *_ = command(capsys, *folders, "--boxes", "sessions", "--out", tmp_path)
    assert status == 0 and (tmp_path / "boxes.png").stat().st_size > 5000
    assert [values for values, _ in drawn] == [[[1, 2], [3, 5]], [[6]], [[7]]]
    places = [x for _, positions in drawn for x in positions]
    assert places == pytest.approx([-0.8 / 3, 1 - 0.8 / 3, 1, 1 + 0.8 / 3])
    (tmp_path / "a11" / "eval.json").unlink()
    for argument, lack in (("sessions", "no eval.json"), ("hidden-dim", "no argument hidden_dim")):
        status, _, (line,) = command(capsys, *folders, "--boxes", argument, "--out", tmp_path)
        assert status == 2 and "a11" in line and lack in line


# ---------- Bad input ----------


def damaged(name, text):
    def make(folder):
        write_run(folder, curve([1, 2]))
        (folder / name).write_text(text) if text is not None else (folder / name).unlink()

    return make


HEADER = "global_step,key,value\n"


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda folder: None, "no config.json"),
        (damaged("metrics.csv", None), "no metrics.csv"),
        (damaged("config.json", None), "no config.json"),
        (damaged("config.json", '{"script": "dm'), "config.json"),
        (damaged("config.json", "[1, 2]"), "config.json"),
        (damaged("config.json", '{"seed": 1, "script": "dme"}'), "config.json"),
        (damaged("metrics.csv", ""), "metrics.csv"),
        (damaged("metrics.csv", "step,value\n1,2\n"), "global_step,key,value"),
        (damaged("metrics.csv", HEADER + "0,a,1\n0,a\n1,a,2\n"), "line 3"),
        (damaged("metrics.csv", HEADER + "0,a,one\n1,a,2\n"), "line 2"),
        (damaged("metrics.csv", HEADER), "none at all"),
        (damaged("metrics.csv", HEADER + f"0,{KEY},1\n10,{KEY},nan\n"), "not a finite number"),
        (lambda folder: write_run(folder, curve([1, 2], key="eval/test/retrun")), "eval/test/retrun"),
        (lambda folder: write_run(folder, curve([1], key="losses/value")), "losses/value"),
    ],
)
def test_bad_runs(make, named, tmp_path, capsys):
    make(tmp_path / "run")
    status, out, err = command(capsys, tmp_path / "run", "--out", tmp_path / "out")
    assert (status, out, len(err)) == (2, [], 1) and named in err[0]
    assert not (tmp_path / "out").exists()


def test_bad_combinations(tmp_path, capsys):
    folders = [
        write_run(tmp_path / "a", curve([1, 2])),
        write_run(tmp_path / "b", curve([1, 2])),
        write_run(tmp_path / "c", curve([1, 2], [2000, 3000]), seed=2),
    ]
    (tmp_path / "file").write_text("")
    for words, named in [
        ([], "at least one run"),
        (folders[:2], "twice"),
        ([folders[0], folders[0]], "twice"),
        (folders[1:], "no steps of eval/test/return in common"),
        ([folders[0], "--out", tmp_path / "file"], "file"),
    ]:
        status, out, err = command(capsys, *words)
        assert (status, out, len(err)) == (2, [], 1) and named in err[0], named


def test_errors_are_the_projects_own(tmp_path):
    with pytest.raises(BadInput, match="no config.json"):
        plot.read_run(tmp_path)
