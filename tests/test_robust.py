"""Nothing silent, nothing lost: a run's folder, disks that fill up, terminals that close, signals, hostile files.

Where a process of its own is needed it is mostly a copy of this one, which has PyTorch already.
"""

import argparse
import contextlib
import io
import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import common.arguments
import common.memory
import common.run
import laser
import varibad
from common import files, plot
from common.envs import BadInput
from common.processes import check_steps, join_processes
from common.terminal import Terminal
from tests import probe, user_envs
from tests.test_belief import signals  # noqa: F401
from tests.test_scripts import (
    EVERY,
    OF_THE_CALL,
    ROOT,
    TINY,
    finished,  # noqa: F401
    main,
    metrics,
    one_sentence,
    parse,
    run,
    same,
    tiny,
)

QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
FLAG = pytest.mark.parametrize("flag", ["--resume", "--evaluate"])


class Copy:
    """`python script.py words` in a copy of this process, which has done `prepare` before: its status and output."""

    def __init__(self, script, folder, *words, prepare=lambda: None):
        self.out = folder / f"said-{len(list(folder.glob('said-*')))}"
        self.out.touch()
        self.pid = os.fork()
        if self.pid == 0:
            self.work(script, words, prepare)

    def work(self, script, words, prepare):
        status = 70
        try:
            file = os.open(self.out, os.O_WRONLY)
            os.dup2(file, 1), os.dup2(file, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            sys.argv = [script.__file__, *map(str, words)]
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            tqdm.set_lock(threading.RLock())  # the old one may have been held
            torch.set_num_threads(1)
            prepare()
            common.run.start(script.main, script.Args, script.PRESETS, getattr(script, "SMALL", {}))
            status = 0
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)

    def end(self):
        """Exit status, minus the signal's number after a signal, and all that it said."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self.out.read_text()


def in_rollout(number, do, script=varibad):
    """From now on `do()` is called at the end of the script's rollout of that number."""
    rollout, count = script.rollout, []

    def watched(*a, **b):
        data = rollout(*a, **b)
        count.append(1)
        if len(count) == number:
            do()
        return data

    script.rollout = watched


def limited(size):
    """No file may grow beyond so many bytes: what a full disk is to a file that grows. None: no limit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1] if size is None else size, limits[1]))


def quick():
    """No pictures of beliefs, which take seconds."""
    varibad.draw_grid_belief = lambda *a: None


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------- 1. Folders ----------


def test_two_runs_of_one_second(tmp_path, monkeypatch):
    """Without --run-dir, the same seed in the same second: a folder each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files.time, "strftime", lambda form: "now")
    made = [files.claim_folder(varibad.Args(), "varibad") for _ in range(3)]
    assert [path.name for path, _ in made] == [f"GridWorld__varibad__1__now{end}" for end in ("", "-2", "-3")]
    for _, lock in made:
        os.close(lock)


def test_a_run_at_work(finished, tmp_path, monkeypatch):  # noqa: F811
    """Nobody else gets its folder, by whatever name; --evaluate may read what is there. After its end it may go on."""
    folder, link = shutil.copytree(finished, tmp_path / "run"), tmp_path / "link"
    link.symlink_to(folder)
    path, said = folder / "checkpoint.pt", []

    def others():
        before = contents(folder)
        for words in (
            ["--resume", path],
            ["--resume", f"{folder}.pt", "--run-dir", folder],
            *(tiny(varibad, "--run-dir", name) for name in (folder, f"{folder}/", link, f"{folder}/../run")),
        ):
            with pytest.raises(BadInput) as error:
                main(varibad, *words)
            said.append(str(error.value))
        assert contents(folder) == before
        main(varibad, "--evaluate", path)

    shutil.copy(path, f"{folder}.pt")
    with monkeypatch.context() as patch:
        patch.setattr(varibad, "rollout", varibad.rollout)
        in_rollout(1, others)
        main(varibad, "--resume", path, "--total-timesteps", 200)
    assert len(said) == 6 and all("is the folder of a run that is at work" in line for line in said)
    main(varibad, "--resume", path, "--total-timesteps", 240)
    assert torch.load(path)["iteration"] == 6


def test_a_race_for_a_folder(tmp_path):
    """Two at the same moment: one runs to its end, the other has status 2 and left nothing."""
    for k in range(3):
        folder = tmp_path / f"run{k}"
        words = tiny(varibad, "--eval-interval", -1, "--total-timesteps", 40, "--run-dir", folder)
        copies = [Copy(varibad, tmp_path, *words, "--seed", seed) for seed in (1, 2)]
        ends = [copy.end() for copy in copies]
        assert sorted(status for status, _ in ends) == [0, 2], ends
        seed = 1 + [status for status, _ in ends].index(0)
        assert json.loads((folder / "config.json").read_text())["seed"] == seed
        assert torch.load(folder / "checkpoint.pt")["args"]["seed"] == seed


OURS = "metrics.csv eval.json checkpoint.pt.tmp config.json.tmp returns.png x.gif wandb".split()
STRANGE = "varibad.py .git setup.cfg metrics.csv.bak my_eval.json notes.txt checkpoint.pth config.json5".split()
CONFIGS = ["", "{}", "[]", "null", '{"script": 1}', "{", '{"name": "my-project", "versions": 1}', "\udcff", "[" * 9999]


@QUICK
@given(
    st.lists(st.sampled_from(OURS + STRANGE), max_size=3, unique=True), st.one_of(st.none(), st.sampled_from(CONFIGS))
)
@example([], json.dumps(dict(script="varibad", versions={})))
def test_what_a_folder_may_hold(names, config):
    """A run's files, without a checkpoint; else a sentence that names a file that is none, and all stays."""
    strange = set(names) & set(STRANGE)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            Path(folder, name).write_text("mine")
        if config is not None:
            Path(folder, "config.json").write_bytes(config.encode(errors="surrogateescape"))
            strange |= set() if '"varibad"' in config else {"config.json"}
        before = contents(Path(folder))
        args = varibad.Args(run_dir=folder)
        with pytest.raises(BadInput, match="holds what is not a run's") if strange else contextlib.nullcontext():
            os.close(files.claim_folder(args, "varibad")[1])
        assert contents(Path(folder)) == before


@pytest.mark.parametrize("kind", ["file", "fifo", "broken link", "below a file"])
def test_no_folder(kind, finished, tmp_path, monkeypatch, capsys):  # noqa: F811
    """--run-dir, of a run and of an evaluation: one line, status 2."""
    path = tmp_path / "x"
    path.symlink_to("nowhere") if kind == "broken link" else os.mkfifo(path) if kind == "fifo" else path.touch()
    path = path / "run" if kind == "below a file" else path
    for words in (tiny(varibad), ["--evaluate", finished / "checkpoint.pt"]):
        assert "cannot write" in one_sentence(varibad, monkeypatch, capsys, *words, "--run-dir", path)


@pytest.mark.skipif(os.getuid() != 0, reason="another user is made, which only root can")
def test_a_folder_of_somebody_else(finished, tmp_path):  # noqa: F811
    """It may be read, not written: one line, status 2, before anything is played."""
    with tempfile.TemporaryDirectory() as other:  # tmp_path may not be read by others
        folder = shutil.copytree(finished, Path(other, "run"))
        os.chmod(other, 0o755), os.chmod(folder, 0o755)
        path = folder / "checkpoint.pt"
        for words in (tiny(varibad, "--run-dir", folder), ["--resume", path], ["--evaluate", path]):
            status, said = Copy(varibad, tmp_path, *words, prepare=lambda: os.setuid(65534)).end()
            assert status == 2 and said.startswith("varibad.py: cannot write to the run's folder") and len(said) < 200


# ---------- 2, 3, 4. Disks and terminals ----------


def test_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch, capsys):
    """No row of metrics is lost, in metrics.csv or TensorBoard's events; the last evaluation is there."""
    monkeypatch.setattr(varibad, "draw_grid_belief", lambda *a: None)
    run(varibad, tmp_path / "good", eval_interval=1)
    monkeypatch.setattr(varibad, "rollout", varibad.rollout)
    played = varibad.rollout

    def filled(envs, agent, *a, **b):
        if agent.training:
            count.append(1)
            limited(100 if len(count) in (2, 3) else None)
        return played(envs, agent, *a, **b)

    for begun in (0, 1):  # the second time it is full before the first row
        folder, count = tmp_path / f"filled{begun}", [1] * begun
        monkeypatch.setattr(varibad, "rollout", filled)
        try:
            run(varibad, folder, eval_interval=1)
        finally:
            limited(None)
        assert metrics(folder) == metrics(tmp_path / "good") and len(metrics(folder)) > 60
        assert (folder / "eval.json").read_text() == (tmp_path / "good" / "eval.json").read_text()
        events = EventAccumulator(str(folder)).Reload()
        assert [event.step for event in events.Scalars("eval/test/return")] == [40, 80, 120, 160]


def test_rows_that_wait_belong_to_the_checkpoint(tmp_path):
    """A checkpoint that the disk took where it did not take the rows: once these are there, --resume keeps them."""
    written = files.Metrics(tmp_path, varibad.Args(), 0, 0, None)
    written.write({"a": 1.0}, 40)
    try:
        limited(10)
        with pytest.raises(OSError):
            written.write({"a": 2.0}, 80)
        size = written.position()["metrics_bytes"]
    finally:
        limited(None)
    written.write({"a": 3.0}, 120)
    written.close()
    again = files.Metrics(tmp_path, varibad.Args(), size, 80, None)
    again.write({"a": 4.0}, 120)
    again.close()
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1:] == ["40,a,1.0", "80,a,2.0", "120,a,4.0"]


def closed(*numbers):
    for number in numbers:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)


def onto(file):
    descriptor = os.open(file, os.O_WRONLY)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)


def onto_a_pipe():
    reader, writer = os.pipe()
    os.dup2(writer, 1), os.dup2(writer, 2)
    os.close(reader)


TERMINALS = {
    "2>&-": lambda: closed(2),
    "1>&- 2>&-": lambda: closed(1, 2),
    "&> /dev/full": lambda: onto("/dev/full"),
    "|& head -c 0": onto_a_pipe,
}


@pytest.mark.parametrize("name", TERMINALS)
def test_a_terminal_that_cannot_be_written(name, tmp_path):
    """The run reaches its end, its files are whole, and none has what was said in it."""
    words = tiny(varibad, "--eval-interval", 1, "--run-dir", tmp_path / "run")
    status, said = Copy(varibad, tmp_path, *words, prepare=lambda: (quick(), TERMINALS[name]())).end()
    assert status == 0 and len(said.splitlines()) == (name == "2>&-")  # stdout is there
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["iteration"] == 4
    assert len(metrics(tmp_path / "run")) > 10 and plot.read_run(tmp_path / "run")


def test_head(tmp_path):
    """`python varibad.py | true`, from beginning to end: status 0."""
    words = [sys.executable, ROOT / "varibad.py", *tiny(varibad, "--eval-interval", -1, "--run-dir", tmp_path / "run")]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait() == 0 and "Error" not in said and "Exception" not in said, said
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["iteration"] == 4


@pytest.mark.parametrize("error", [OSError(28, "full"), ValueError("closed"), BrokenPipeError(), PermissionError()])
def test_terminal(error):
    class Stream(io.StringIO):
        def write(self, text=""):
            raise error

        flush = write

    terminal = Terminal(Stream())
    print("a", file=terminal, flush=True)
    assert not terminal.isatty()


def test_the_last_checkpoint_is_not_saved(tmp_path):
    """Status 1, and the last line says which there is."""
    folder = tmp_path / "run"
    words = tiny(varibad, "--eval-interval", -1, "--run-dir", folder)
    copy = Copy(varibad, tmp_path, *words, prepare=lambda: in_rollout(3, lambda: limited(9_000)))
    status, said = copy.end()
    assert status == 1 and "Traceback" not in said
    last = f"varibad.py: the checkpoint of step 160 was not saved: {folder}/checkpoint.pt is that of step 80"
    assert said.splitlines()[-1] == last and torch.load(folder / "checkpoint.pt")["iteration"] == 2


# ---------- 7, 8. Another seed, and no numbers ----------


@FLAG
def test_the_benchmark_is_the_runs(flag, finished, tmp_path, monkeypatch):  # noqa: F811
    """With --seed beside it, tasks are drawn anew from the sets that the run has: of training and of evaluation."""
    seeds, make = [], common.run.make_envs
    monkeypatch.setattr(
        common.run, "make_envs", lambda *a, **b: seeds.append((a[3], b["benchmark_seed"])) or make(*a, **b)
    )
    monkeypatch.setattr(varibad, "draw_grid_belief", lambda *a: None)
    words = ["--run-dir", tmp_path / "run", "--seed", 7, "--total-timesteps", 200]
    main(varibad, flag, finished / "checkpoint.pt", *words, "--eval-interval", 0)
    assert set(seeds) == {(7, 1)} and len(seeds) > 1
    if flag == "--resume":
        assert torch.load(tmp_path / "run" / "checkpoint.pt")["benchmark_seed"] == 1


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_no_numbers_in_evaluation(bad, finished, tmp_path, monkeypatch, capsys):  # noqa: F811
    """In training's evaluation and in --evaluate: status 1, a sentence with task and split, no eval.json, no row."""
    played = varibad.rollout

    def spoilt(envs, agent, *a, **b):
        data = played(envs, agent, *a, **b)
        if not agent.training:
            data["episode_return"][1, 2] = bad
        return data

    monkeypatch.setattr(varibad, "rollout", spoilt)
    folder = shutil.copytree(finished, tmp_path / "finished")
    for words in (["--evaluate", folder / "checkpoint.pt"], tiny(varibad, "--run-dir", tmp_path / "run")):
        with pytest.raises(
            FloatingPointError, match=r"evaluation of task GridWorld/\S+, test split: its return is not"
        ):
            main(varibad, *words)
    assert not list(tmp_path.glob("*/eval.json"))
    assert not any(key.startswith("eval/") for _, key, _ in metrics(tmp_path / "run"))


@QUICK
@given(st.dictionaries(st.sampled_from(["observation", "next_observation", "reward"]), st.integers(0, 5), min_size=1))
def test_what_was_no_number_first(places):
    """By name, whatever follows from it: what stands before in the order of a step, of the first step."""
    order = ["observation", "next_observation", "reward"]
    tensors = {name: torch.zeros(6, 2, *[3] * (name != "reward")) for name in order}
    for name, step in places.items():
        tensors[name][step:, 1] = math.nan
    first = min(order, key=lambda name: (places.get(name, 9), order.index(name))).replace("_", " ")
    with pytest.raises(FloatingPointError, match=f"^{first} is not finite"):
        check_steps(**tensors)


@EVERY
def test_a_reward_is_called_a_reward(script, tmp_path, monkeypatch):
    """An environment whose second reward is a NaN: beliefs, actions and observations after it are NaNs as well."""
    move = user_envs.Tensors.move

    def spoilt(self, action):
        obs, reward, success = move(self, action)
        return obs, reward / (self.elapsed == 0), success

    monkeypatch.setattr(user_envs.Tensors, "move", spoilt)
    words = "--env-id tests.user_envs:Tensors --eval-interval -1 --total-timesteps 160".split()
    if script is not laser:
        words = [*TINY, *words, "--tbptt", "0"]
    else:
        words += "--num-envs 2 --meta-episodes 2 --horizon 5 --episodes-per-task 2 --explore-iterations 2".split()
        words += "--buffer-size 4 --d-model 8 --num-layers 1 --num-heads 1 --feed-forward 8 --belief-batch 2".split()
    with pytest.raises(FloatingPointError, match="iteration 1: (reward|true reward) is not finite"):
        main(script, *words, "--run-dir", tmp_path / "run")


# ---------- 11. Weights & Biases ----------


def fake_wandb(monkeypatch, init):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))


@pytest.mark.parametrize("error", [RuntimeError("api_key not\nconfigured"), SystemExit(1), ValueError("mode")])
def test_track_that_cannot_start(error, tmp_path, monkeypatch, capsys):
    """Without a key, with a bad WANDB_MODE: one line that says what helps, status 2."""

    def init(**how):
        raise error

    fake_wandb(monkeypatch, init)
    said = one_sentence(varibad, monkeypatch, capsys, *tiny(varibad, "--track", "--run-dir", tmp_path / "run"))
    assert said.startswith("--track: ") and "WANDB_MODE=offline" in said


def test_track_goes_on(tmp_path, monkeypatch, capsys):
    """--resume continues the W&B run of the checkpoint. What W&B does not take is in metrics.csv, and said."""
    how = []

    def log(row):
        raise ConnectionError("no network")

    def finish():
        raise RuntimeError("its process is gone")

    def init(**given):
        how.append(given)
        return types.SimpleNamespace(id="abc123", log=log, finish=finish, define_metric=lambda *a, **b: None)

    fake_wandb(monkeypatch, init)
    plain, tracked = run(varibad, tmp_path / "plain"), run(varibad, tmp_path / "run", "--track")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "plain") and tracked["wandb"] == "abc123"
    assert set(same(plain, tracked)) <= OF_THE_CALL | {"/args/track", "/wandb"}
    assert "did not take the row of step 160: no network" in "".join(capsys.readouterr())
    main(varibad, "--resume", tmp_path / "run" / "checkpoint.pt", "--total-timesteps", 200)
    main(varibad, "--resume", tmp_path / "run" / "checkpoint.pt", "--total-timesteps", 240, "--no-track")
    main(varibad, "--resume", tmp_path / "run" / "checkpoint.pt", "--total-timesteps", 280, "--track")
    assert [given.get("id") for given in how] == [None, "abc123", "abc123"] and how[1]["resume"] == "allow"


# ---------- 12. CUDA ----------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_checkpoint_of_a_gpu(finished, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Goes on, on the CPU, and says so; an explicit --cuda is refused."""
    state = torch.load(finished / "checkpoint.pt")
    state["args"]["cuda"] = True
    state["processes"][0]["cuda_rng"] = torch.get_rng_state()
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "checkpoint.pt"
    torch.save(state, path)
    monkeypatch.setattr(varibad, "draw_grid_belief", lambda *a: None)
    main(varibad, "--evaluate", path)
    assert "going on on the CPU" in capsys.readouterr().err
    assert "--cuda: this PyTorch" in one_sentence(varibad, monkeypatch, capsys, "--resume", path, "--cuda")
    main(varibad, "--resume", path, "--total-timesteps", 200)
    assert "going on on the CPU" in capsys.readouterr().err and torch.load(path)["iteration"] == 5
    assert not torch.load(path)["args"]["cuda"]
    parse(varibad, "--resume", path, "--no-cuda")
    assert capsys.readouterr().err == ""


def test_numbers_without_an_end():
    """On the command line: BadInput, whatever sums they go into."""
    for name in ("--num-envs", "--total-timesteps", "--eval-interval", "--eval-tasks", "--hidden-dim"):
        with pytest.raises(BadInput, match=f"{name} is too large"):
            parse(varibad, name, 10**400)


def test_the_last_of_two_flags():
    """--cuda --no-cuda is --no-cuda, sizes included, and the other way round."""
    for script, env_id in ((laser, "MEWA"), (varibad, "ML1-reach")):
        ids = ["--env-id", env_id]
        assert parse(script, *ids, "--cuda", "--no-cuda") == parse(script, *ids)
        assert parse(script, *ids, "--no-cuda", "--cuda") == parse(script, *ids, "--cuda")


# ---------- 13. Sentences ----------


def test_world_size_that_was_left(monkeypatch):
    """Of any other program's: one line that says what to do, no wait."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for size in ("2", "0", "-1", "", "two", "1e3", "٣", " 1"):
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(BadInput, match="WORLD_SIZE .* start under torchrun, or unset it"):
            join_processes(False)
    for name, value in dict(RANK="5", LOCAL_RANK="x", MASTER_ADDR="127.0.0.1", MASTER_PORT="no").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="torchrun"):
        join_processes(False)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2),
    st.tuples(st.integers(), st.floats()), st.just({}), st.just(10**400), st.just(torch.ones(2)), st.binary(max_size=2),
)  # fmt: skip


@QUICK
@given(data=st.data())
def test_odd_arguments_in_a_checkpoint(data, finished, tmp_path):  # noqa: F811
    """Of another type, or out of bounds: a BadInput of ours, or they fit."""
    state = torch.load(finished / "checkpoint.pt")
    name = data.draw(st.sampled_from([field.name for field in fields(varibad.Args)]))
    state["args"][name] = data.draw(VALUES)
    if data.draw(st.integers(0, 9)) == 0:
        state["args"] = {**state["args"], data.draw(st.one_of(st.integers(), st.text(max_size=2))): 1}
    torch.save(state, tmp_path / "odd.pt")
    with contextlib.suppress(BadInput):
        args = parse(varibad, "--evaluate", tmp_path / "odd.pt")
        assert {k: type(v) for k, v in asdict(args).items()} == {
            k: type(v) for k, v in asdict(varibad.Args()).items()
        } or (isinstance(getattr(args, name), (int, float)))


ODD = {
    "nothing": b"",
    "text": b"a text, of some length\n" * 40,
    "pickle": pickle.dumps(dict(script="varibad")),
    "pickle of code": pickle.dumps(argparse.ArgumentParser),
    "zeros": bytes(5000),
    "zip": b"PK\x03\x04" + bytes(50),
}


@FLAG
@pytest.mark.parametrize("kind", [*ODD, "folder", "fifo", "device"])
def test_no_checkpoint(kind, flag, tmp_path, monkeypatch, capsys):
    """One line of ours, at once, without PyTorch's advice to run what is in the file."""
    path = Path("/dev/zero") if kind == "device" else tmp_path / "x.pt"
    if kind in ODD:
        path.write_bytes(ODD[kind])
    if kind in ("folder", "fifo"):
        (path.mkdir if kind == "folder" else lambda: os.mkfifo(path))()
    said = one_sentence(varibad, monkeypatch, capsys, flag, path)
    assert ("is not a readable checkpoint" if kind in ODD else "is not a file") in said and "weights_only" not in said
    with pytest.raises(BadInput):
        probe.main(str(path))


@QUICK
@given(st.data())
def test_damaged_checkpoints(finished, tmp_path, data):  # noqa: F811
    """Cut short anywhere, or with bytes that are others: our sentence, or what the sizes and names allow."""
    good = bytearray((finished / "checkpoint.pt").read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.one_of(st.integers(0, 3000), st.integers(-3000, -1)))
        good[place] = data.draw(st.integers(0, 255))
    (tmp_path / "bad.pt").write_bytes(good[: data.draw(st.one_of(st.none(), st.integers(0, len(good))))])
    with contextlib.suppress(BadInput):
        files.load_checkpoint(tmp_path / "bad.pt", "varibad")


CHANGES = {
    "a negative number": lambda s: s.update(iteration=-1),
    "a number that is too large": lambda s: s.update(global_step=2**63),
    "no number": lambda s: s.update(global_step="9"),
    "no processes": lambda s: s.update(processes=[]),
    "a process that is none": lambda s: s.update(processes=[7]),
    "no random state": lambda s: s["processes"][0].update(rng=5),
    "a random state cut short": lambda s: s["processes"][0].update(rng=s["processes"][0]["rng"][:7]),
    "a random state of another type": lambda s: s["processes"][0].update(rng=torch.ones(5056)),
    "no buffer": lambda s: s["processes"][0].update(buffer=[]),
    "no weights": lambda s: s.update(agent=3),
    "weights that are no numbers": lambda s: next(iter(s["agent"].values())).fill_(math.nan),
    "an optimiser that is none": lambda s: s.update(optimizer=dict(state={}, param_groups=[])),
    "names that are none": lambda s: s.update({5: 5}),
    "bytes that are none": lambda s: s.update(metrics_bytes=-5),
    "a script that is none": lambda s: s.update(script=torch.ones(2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_odd_parts_of_a_checkpoint(change, finished, tmp_path):  # noqa: F811
    """BadInput, and the folder has what it had."""
    state = torch.load(finished / "checkpoint.pt")
    CHANGES[change](state)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(BadInput, match="odd.pt"):
        main(varibad, "--resume", tmp_path / "odd.pt", "--total-timesteps", 200)
    assert [path.name for path in tmp_path.iterdir()] == ["odd.pt"]


def said_by_plot(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        plot.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("plot: "), err
    return err


EVALS = ["", "{", "[]", "{}", '{"tasks": {"test": {}}}', '{"tasks": {"test": {"a": {"return": []}}}}', "[" * 9999]
EVALS += ['{"tasks": {"test": {"a": {"return": [NaN]}}}}', '{"tasks": {"test": [1]}}', '{"tasks": {"test": {"a": 1}}}']
EVALS += ['{"tasks": {"test": {"a": {"return": ["x"]}}}}', "\x00\udcff"]
ROWS = [
    "x,a,1",
    "1,a",
    "1,a,one",
    "1e400,a,1",
    "9" * 5000 + ",a,1",
    "9" * 400 + ",eval/test/return,1",
    "1,eval/test/return,nan",
]
ROWS += ["1,a," + "9" * 200_000, "\x00", '1,"a', "1,,,", "inf,a,1"]


def test_plot_of_broken_files(finished, tmp_path, capsys):  # noqa: F811
    """One line, status 2: no runs, broken or huge evaluations, metrics and arguments. --boxes over an argument of
    several numbers are drawn."""
    folder = shutil.copytree(finished, tmp_path / "run")
    boxes = [folder, "--out", tmp_path, "--boxes"]
    assert "which runs?" in said_by_plot(capsys)
    assert "which runs?" in said_by_plot(capsys, "--boxes", "seed", "--out", tmp_path)
    assert "no eval.json" in said_by_plot(capsys, *boxes, "seed")
    for text in EVALS:
        (folder / "eval.json").write_bytes(text.encode(errors="surrogateescape"))
        assert "eval.json does not hold" in said_by_plot(capsys, *boxes, "seed"), text
    good = (folder / "metrics.csv").read_bytes()
    for row in ROWS:
        with open(folder / "metrics.csv", "w", newline="") as file:
            file.write("global_step,key,value\r\n" + row + "\r\n")
        said_by_plot(capsys, folder, "--out", tmp_path)
    (folder / "metrics.csv").write_bytes(good + b"160,eval/test/return,1.0\r\n")
    config = json.loads((folder / "config.json").read_text())
    for odd in (dict(seed=[1]), dict(script=None), dict(env_id={})):
        (folder / "config.json").write_text(json.dumps(config | odd))
        assert "config.json does not hold" in said_by_plot(capsys, folder)
    (folder / "config.json").write_text("[" * 9999)
    assert "config.json does not hold" in said_by_plot(capsys, folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "eval.json").write_text('{"tasks": {"test": {"a": {"return": [1.0, 2.0]}}}}')
    plot.main([str(word) for word in (*boxes, "policy-layers")])
    assert (tmp_path / "boxes.png").stat().st_size > 5000


def test_probe_says_so():
    """python -m tests.probe: one line, status 2, for what is missing."""
    done = subprocess.run([sys.executable, "-m", "tests.probe", "no/such.pt"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "probe: no checkpoint at no/such.pt\n")


def kill(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def test_hangup(tmp_path):
    """SIGHUP: the iteration is finished and saved; the last line says where it stopped and how to go on. Under nohup,
    which ignores it, the run does not stop."""
    words = tiny(varibad, "--eval-interval", -1, "--run-dir")
    hangs_up = lambda: in_rollout(2, lambda: kill(signal.SIGHUP))  # noqa: E731
    ignores = lambda: (signal.signal(signal.SIGHUP, signal.SIG_IGN), hangs_up())  # noqa: E731
    stopped = Copy(varibad, tmp_path, *words, tmp_path / "stopped", prepare=hangs_up)
    ignored = Copy(varibad, tmp_path, *words, tmp_path / "ignored", prepare=ignores)
    status, said = stopped.end()
    path = tmp_path / "stopped" / "checkpoint.pt"
    assert status == 0 and f"stopped by a signal at iteration 2 of 4; --resume {path} goes on" in said.splitlines()
    assert torch.load(path)["iteration"] == 2
    status, said = ignored.end()
    assert status == 0 and "signal" not in said
    assert torch.load(tmp_path / "ignored" / "checkpoint.pt")["iteration"] == 4


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal(second, tmp_path):
    """Whatever kind: the end, at once, of workers too; the folder may be gone on with."""

    def end():
        me, found = os.getpid(), []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(path.read_text().rpartition(")")[2].split()[1]) == me:
                    found.append(path.parent.name)
        (tmp_path / "workers").write_text(" ".join(found))
        kill(signal.SIGINT, second)

    words = tiny(varibad, "--env-id", "tests.user_envs:float64", "--tbptt", 0, "--eval-interval", -1)
    words += ["--run-dir", tmp_path / "run", "--checkpoint-interval", 1]
    status, said = Copy(varibad, tmp_path, *words, prepare=lambda: in_rollout(2, end)).end()
    assert status == 128 + second and "Traceback" not in said, said
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["iteration"] == 1
    workers = (tmp_path / "workers").read_text().split()
    assert workers
    until = time.monotonic() + 60
    while any(map(alive, workers)):
        assert time.monotonic() < until, "a worker lives on"
        time.sleep(0.01)


def test_interrupted_evaluation(finished, tmp_path):  # noqa: F811
    """Ctrl-C during --evaluate: status 130, one line, no eval.json."""
    folder = shutil.copytree(finished, tmp_path / "run")
    interrupts = lambda: in_rollout(2, lambda: kill(signal.SIGINT))  # noqa: E731
    copy = Copy(varibad, tmp_path, "--evaluate", folder / "checkpoint.pt", prepare=interrupts)
    assert copy.end() == (130, "varibad.py: interrupted\n") and not (folder / "eval.json").exists()


INTERRUPTED = """
import os, runpy, signal, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # in a job in the background it is ignored
sys.meta_path.insert(0, Watch())
sys.path.insert(0, sys.argv[2])
runpy.run_path(sys.argv[2] + "/varibad.py", run_name="__main__")
"""


@pytest.mark.parametrize("library", ["torch._C", "matplotlib.ft2font"])
def test_interrupted_imports(library, tmp_path):
    """Ctrl-C while PyTorch is imported, or matplotlib's library, in which an exception is a crash: no word."""
    argv = [sys.executable, "-c", INTERRUPTED, library, ROOT]
    done = subprocess.run(argv, cwd=tmp_path, stderr=subprocess.PIPE)
    assert done.stderr == b"" and done.returncode == -signal.SIGINT
    assert not list(tmp_path.iterdir())


# ---------- 14. Memory ----------


SIZES = ["--belief-batch 1000000000", "--hidden-dim 9999999", "--decoder-layers 1000000000000"]


@pytest.mark.parametrize("words", SIZES)
def test_networks_and_batches(words):
    """The same of what learns, as far as it is known before it is made."""
    envs = types.SimpleNamespace(
        **dict.fromkeys(("single_observation_space", "single_action_space"), user_envs.Base.observation_space)
    )
    envs.meta_horizon = 60
    args = parse(varibad, *words.split())
    with pytest.raises(BadInput, match="GB are free"):
        needed = common.memory.steps_memory(args, envs, 16)
        common.memory.check_memory(needed, torch.device("cpu"), "this run", "")


@EVERY
@pytest.mark.parametrize("words", ["--num-envs 10000000", "--horizon 1000000000", "--policy-layers 9999999 9999999"])
def test_more_than_the_memory(script, words, tmp_path, monkeypatch, capsys):
    """One line that says what takes it, status 2, before anything of that size is made."""
    monkeypatch.chdir(tmp_path)
    sizes, make = [], common.run.make_envs
    monkeypatch.setattr(common.run, "make_envs", lambda *a, **b: sizes.append(a[1]) or make(*a, **b))
    more = [] if script is laser else ["--num-minibatches", 1, "--tbptt", 0]
    words = [*words.split(), "--buffer-size", 10_000_000, *more]
    said = one_sentence(script, monkeypatch, capsys, *words)
    assert "GB are free: choose fewer --num-envs" in said, said
    assert max(sizes) <= 1000
    assert not list(tmp_path.iterdir())
