"""What a run leaves behind: its folder, checkpoints that survive a kill and a full disk, metrics."""

import contextlib
import csv
import errno
import fcntl
import io
import json
import os
import shutil
import socket
import stat
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn
from tqdm import tqdm

from common.envs import BadInput

CHECKPOINT = dict(  # what a checkpoint holds beside the parts that a script names
    script=str, args=dict, iteration=int, global_step=int, metrics_bytes=int, processes=list, benchmark_seed=int,
    wandb=(str, type(None)),
)  # fmt: skip
OURS = (
    "config.json config.json.tmp metrics.csv eval.json eval.json.tmp events.out.tfevents.* *.png *.gif wandb "
    "checkpoint.pt checkpoint.pt.tmp checkpoint.pt.link checkpoint.pt.previous"
).split()


# ---------- 1. The folder ----------


def claim_folder(args, script):
    """The folder of a run, made and locked: its path, and the lock, which lasts as long as the process keeps it open.

    Without --run-dir, runs/<env>__<script>__<seed>__<time>, with a number behind it where that name is taken.
    Raises BadInput where another run is at work in it (which --evaluate does not mind), or it holds what is no run's.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = Path(args.run_dir or f"runs/{args.env_id.replace(':', '.')}__{script}__{args.seed}__{stamp}")
    name, number = path.name, 1
    try:
        while True:
            try:
                path.mkdir(parents=True, exist_ok=bool(args.run_dir))
                break
            except FileExistsError:
                if args.run_dir:
                    raise
                path, number = path.with_name(f"{name}-{number + 1}"), number + 1
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        lock = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BadInput(f"cannot write to the run's folder: {error}") from error
    try:
        if not args.evaluate and not take(lock):
            raise BadInput(f"{path} is the folder of a run that is at work: choose another --run-dir, or wait")
        check_folder(path, args.resume or args.evaluate)
    except (BadInput, OSError):
        os.close(lock)
        raise
    return path, lock


def take(lock):
    """Whether no other process has this lock; on a file system without locks none has."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def check_folder(path, resumed):
    """BadInput where the folder holds files that are no run's, or a run's checkpoint. resumed: the checkpoint of
    --resume, whose own folder may hold anything."""
    if resumed and path.samefile(Path(resumed).parent):
        return
    strange = [file.name for file in path.iterdir() if not any(file.match(pattern) for pattern in OURS)]
    if (path / "config.json").exists() and not is_config(path / "config.json"):
        strange.append("config.json")
    if strange:
        raise BadInput(f"{path} holds what is not a run's ({', '.join(sorted(strange)[:3])}): choose another --run-dir")
    if (path / "checkpoint.pt").exists():
        raise BadInput(f"{path} holds a run already: --resume {path / 'checkpoint.pt'}, or choose another --run-dir")


def is_config(path):
    """Whether this is a run's config.json."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        config = json.loads(path.read_text())
        return isinstance(config, dict) and {"script", "versions"} <= config.keys()
    return False


def write_config(folder, args, script):
    """config.json: the arguments, and versions of what numbers depend on."""
    versions = {package: version(package) for package in ("torch", "mujoco", "metaworld", "gymnasium", "numpy")}
    write_whole(folder / "config.json", json.dumps(dict(script=script, **asdict(args), versions=versions), indent=2))


def write_whole(path, text):
    """The file has the old text or the new one. Raises OSError where the disk is full; then it is the old one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def missing_space(folder, size):
    """Bytes that lack for three checkpoints of `size` bytes: the last, the one before, the next one. At least 0."""
    free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in folder.glob("checkpoint.pt*"))
    return max(0, 3 * size - free)


@contextlib.contextmanager
def on_disk(what, step):
    """A disk that is full or gone says so, and training goes on: what was saved before stays as it is."""
    try:
        yield
    except OSError as error:
        tqdm.write(f"{what} not saved at step {step}: {error}")


# ---------- 2. Checkpoints ----------


def save_checkpoint(path, state):
    """Atomic: a reader finds the old file or the new one, whole; the one before it stays as <name>.previous.

    Raises OSError where the disk is full, say; then both are as they were.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of what the file says
        temporary.unlink(missing_ok=True)
        raise OSError(f"is the disk full? {str(error).splitlines()[0]}") from error
    if path.exists():
        link = path.with_name(path.name + ".link")
        with contextlib.suppress(OSError):  # a file system without links keeps the last one alone
            link.unlink(missing_ok=True)
            os.link(path, link)
            os.replace(link, path.with_name(path.name + ".previous"))
    os.replace(temporary, path)


def load_checkpoint(path, *scripts):
    """The state saved at `path`, on the CPU. Raises BadInput where there is none, or not one of these scripts."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a FIFO would wait for ever
            raise BadInput(f"{path} is not a file")
        open(path, "rb").close()
    except FileNotFoundError:
        raise BadInput(f"no checkpoint at {path}") from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever an empty, truncated or foreign file makes of the unpickler
        raise BadInput(f"{path} is not a readable checkpoint: empty, cut short, or no file of a script's") from error
    script = state.get("script") if isinstance(state, dict) else None
    if not isinstance(script, str) or script not in scripts:
        other = script if isinstance(script, str) else "another program"
        raise BadInput(f"{path} is a checkpoint of {other:.60}, not of {' or '.join(scripts)}")
    odd = [name for name, kind in CHECKPOINT.items() if not isinstance(state.get(name), kind)]
    odd += [name for name, kind in CHECKPOINT.items() if kind is int and not odd and not 0 <= state[name] < 2**63]
    if odd or not all(isinstance(process, dict) for process in state["processes"]):
        raise BadInput(f"{path} is not a whole checkpoint: see its {names(odd or ['processes'])}")
    return state


def load_modules(path, state, modules):
    """Loads each module's state. Raises BadInput for another architecture."""
    for name, module in modules.items():
        try:
            module.load_state_dict(state[name])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            detail = " ".join(str(error).split())[:200]
            raise BadInput(f"{path} does not fit these arguments: {name}: {detail}") from error
        if isinstance(module, nn.Module) and not weights(module).isfinite().all():
            raise BadInput(f"{path} is not a checkpoint of a run: weights of the {name} are not finite")


class Generator:
    """PyTorch's random numbers, for `load_modules`; put(state) sets them."""

    def __init__(self, put):
        self.put = put

    def load_state_dict(self, saved):
        self.put(saved.cpu())


def weights(module):
    """Parameters and normalisers, one vector."""
    return torch.cat([torch.zeros(0)] + [x.flatten().float() for x in module.state_dict().values()])


def names(words):
    return ", ".join(sorted(map(str, words)))


# ---------- 3. Metrics ----------


class Log:
    """A file that grows. What the disk does not take waits in memory, and comes before what is written next."""

    def __init__(self, path, size=0):
        """size: bytes to keep of what is there."""
        self.file = open(path, "r+b" if path.exists() else "w+b", buffering=0)
        self.size, self.waiting = min(size, os.fstat(self.file.fileno()).st_size), b""
        self.file.truncate(self.size)

    def write(self, data=b""):
        """Raises OSError where the disk takes less than all; the file then ends where it did."""
        self.waiting += data
        self.file.seek(self.size)
        done = 0
        try:
            while done < len(self.waiting):
                done += self.file.write(self.waiting[done:])
        except OSError:
            with contextlib.suppress(OSError):
                self.file.truncate(self.size)
            raise
        self.size, self.waiting = self.size + done, b""


class Metrics:
    """metrics.csv (step, key, value), TensorBoard and, with --track, Weights & Biases: the same keys."""

    def __init__(self, folder, args, size, step, wandb_id):
        """size: bytes of metrics.csv at the checkpoint. Rows after it come again: none is lost or doubled."""
        self.wandb = start_wandb(folder, args, wandb_id) if args.track else None
        self.wandb_id = self.wandb.id if self.wandb else wandb_id  # kept without --track, too, for the next --resume
        self.csv = Log(folder / "metrics.csv", size)
        # SummaryWriter writes in a thread that a full disk ends for good; these are the same events.
        self.events = Log(folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.0")
        with on_disk("metrics", step):
            self.events.write(record(file_version="brain.Event:2"))
            if self.csv.size:  # resumed: TensorBoard drops what it has of later steps
                self.events.write(record(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
            else:
                self.csv.write(rows([("global_step", "key", "value")]))

    def write(self, scalars, step):
        """Raises OSError, once all have been tried."""
        if self.wandb:
            try:
                self.wandb.log({**scalars, "global_step": step})
            except Exception as error:  # whatever its service or its process does: the other rows are written
                tqdm.write(f"Weights & Biases did not take the row of step {step}: {error}")
        try:
            self.csv.write(rows((step, key, repr(float(value))) for key, value in scalars.items()))
        finally:
            values = [Summary.Value(tag=key, simple_value=float(value)) for key, value in scalars.items()]
            self.events.write(record(step=step, summary=Summary(value=values)))

    def position(self):
        """What a checkpoint keeps of this."""
        return dict(metrics_bytes=self.csv.size + len(self.csv.waiting), wandb=self.wandb_id)

    def close(self):
        for log in (self.csv, self.events):
            with contextlib.suppress(OSError):  # a full disk: said before
                log.write()
                log.file.close()
        if self.wandb:
            with contextlib.suppress(Exception):
                self.wandb.finish()


def rows(lines):
    text = io.StringIO(newline="")
    csv.writer(text).writerows(lines)
    return text.getvalue().encode()


def record(**fields):
    """An event in TensorBoard's format."""
    out = io.BytesIO()
    RecordWriter(out).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return out.getvalue()


def start_wandb(folder, args, run_id):
    """A run of Weights & Biases: that of the checkpoint, where it has one. Raises BadInput where it cannot start."""
    try:
        import wandb

        how = dict(id=run_id, resume="allow") if run_id else {}
        run = wandb.init(project="meta-rl", name=folder.name, config=asdict(args), dir=folder, **how)
    except (Exception, SystemExit) as error:  # no key, no network, a WANDB_MODE that there is not
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(f"--track: {reason} (log in with `wandb login`, or set WANDB_MODE=offline)") from error
    run.define_metric("*", step_metric="global_step")
    return run
