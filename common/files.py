"""What a run leaves behind: checkpoints that survive a kill and a full disk, and metrics."""

import contextlib
import csv
import os
import shutil
from dataclasses import asdict

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.envs import BadInput

CHECKPOINT = {"script", "args", "iteration", "global_step", "metrics_bytes", "processes"}  # beside the parts


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


def load_checkpoint(path, script):
    """The state saved at `path`, on the CPU. Raises BadInput where there is none, or not one of this script."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise BadInput(f"no checkpoint at {path}") from None
    except Exception as error:  # whatever a truncated or foreign file makes of the unpickler
        raise BadInput(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or state.get("script") != script:
        other = state.get("script") if isinstance(state, dict) else None
        raise BadInput(f"{path} is a checkpoint of {other or 'another program'}, not of {script}")
    if not CHECKPOINT <= state.keys():
        raise BadInput(f"{path} is not a whole checkpoint: it lacks {names(CHECKPOINT - state.keys())}")
    return state


def load_modules(path, state, modules):
    """Loads each module's state. Raises BadInput for another architecture."""
    for name, module in modules.items():
        try:
            module.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            detail = " ".join(str(error).split())[:200]
            raise BadInput(f"{path} does not fit these arguments: {name}: {detail}") from error


def weights(module):
    """Parameters and normalisers, one vector."""
    return torch.cat([torch.zeros(0)] + [x.flatten().float() for x in module.state_dict().values()])


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


class Metrics:
    """metrics.csv (step, key, value), TensorBoard and, with --track, Weights & Biases: the same keys."""

    def __init__(self, folder, args, offset, step):
        """offset: bytes of metrics.csv at the checkpoint. Rows after it come again: none is lost or doubled."""
        if not (folder / "metrics.csv").exists():  # a run resumed in another folder
            offset = 0
        self.file = open(folder / "metrics.csv", "r+" if offset else "w", newline="")
        offset = min(offset, os.fstat(self.file.fileno()).st_size)
        self.file.truncate(offset)
        self.file.seek(offset)
        self.csv = csv.writer(self.file)
        if not offset:
            self.csv.writerow(("global_step", "key", "value"))
        self.board = SummaryWriter(folder, purge_step=step + 1 if offset else None)
        self.wandb = None
        if args.track:
            import wandb

            self.wandb = wandb.init(project="meta-rl", name=folder.name, config=asdict(args), dir=folder)
            self.wandb.define_metric("*", step_metric="global_step")

    def write(self, scalars, step):
        if self.wandb:
            self.wandb.log({**scalars, "global_step": step})
        for key, value in scalars.items():
            self.csv.writerow((step, key, repr(float(value))))
            self.board.add_scalar(key, value, step)
        self.file.flush()

    def close(self):
        if self.wandb:
            self.wandb.finish()
        with contextlib.suppress(OSError):  # a full disk: said before
            self.board.close()
            self.file.close()


def names(words):
    return ", ".join(sorted(words))
