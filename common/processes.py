"""Several processes (torchrun), each with its share of the environments, the buffer and the batches; a second thread;
finite numbers.

Losses are sums whose weights add up to 1 over all processes: so are gradients, and a run of two processes takes the
steps of one with all the data.
"""

import math
import os
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from common.envs import BadInput
from common.envs.protocol import cores

LARGE = 4000  # steps of an iteration, from which on a second thread was measured to pay


def join_processes(cuda):
    """Meets torchrun's other processes, where there are some. Raises BadInput for what is left of others."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return
    lacking = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if not size.isdigit() or size == "0" or lacking:
        what = f"{', '.join(lacking)} are not" if lacking else "that is no number of processes"
        raise BadInput(f"WORLD_SIZE is {size!r} in the environment, but {what}: start under torchrun, or unset it")
    backend = "nccl" if cuda and torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # the others wait while the first one evaluates
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"the {size} processes of torchrun do not meet: {str(error).splitlines()[0]}") from error


def ranks():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def leads():
    """Whether this process is the one that evaluates and writes."""
    return rank() == 0


def share(n):
    """This process's part of n things."""
    return (n + rank()) // ranks()


def all_sum(x):
    """The sum of x over all processes."""
    if dist.is_initialized():
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def check_finite(**tensors):
    """FloatingPointError, in all processes, that names the first of the tensors with a NaN or an infinity in any."""
    bad = all_sum(torch.stack([~torch.isfinite(tensor).all() for tensor in tensors.values()]).int()).tolist()
    for name, count in zip(tensors, bad):
        if count:
            raise FloatingPointError(f"{name.replace('_', ' ')} is not finite")


def check_steps(**tensors):
    """FloatingPointError, in all processes, that names what first was a NaN or an infinity: tensors (T, N, ...), of one
    step in the order given."""
    bad = torch.stack([~torch.isfinite(tensor).flatten(1).all(1) for tensor in tensors.values()])  # (names, T)
    bad = all_sum(bad.int()).cpu()
    if bad.any():
        step = int(bad.any(0).nonzero()[0])
        name = next(name for name, row in zip(tensors, bad) if row[step])
        raise FloatingPointError(f"{name.replace('_', ' ')} is not finite")


def descend(optimizer, loss, parts, max_norm, name):
    """A step down the gradient summed over processes, its norm clipped in each of the parts; 0 = not clipped.

    Raises FloatingPointError, before the step, where the loss or the gradient is not finite.
    """
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(grad.view_as(p))
    norms = [nn.utils.clip_grad_norm_(part.parameters(), max_norm or math.inf) for part in parts]
    check_finite(**{f"{name}_loss": loss.detach(), f"{name}_gradient_norm": torch.stack(norms)})
    optimizer.step()


class AtOnce(Executor):
    """Computes what is submitted before it goes on."""

    def submit(self, function, *inputs):
        done = Future()
        done.set_result(function(*inputs))
        return done


def second_thread(args, steps):
    """An executor, for one function beside the main thread: on a second core, where there is one for it, else at once.

    At once in several processes, too, which have to exchange gradients in one order, on a GPU, whose queue is one, with
    --compile, and where an iteration has few steps: small tensors leave both threads waiting for the GIL.
    The function may draw no random numbers: they would come in any order.
    """
    if steps < LARGE or ranks() > 1 or args.cuda or args.compile or cores() == 1:
        return AtOnce()
    return ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
