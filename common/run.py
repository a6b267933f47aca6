"""What happens around an algorithm: arguments, the run's folder, signals, metrics, evaluation, checkpoints.

def main(args):
    with Run(args) as run:                          # processes, device, environments, seeds
        model, agent, optimizer, buffer = ...
        run.keep(agent=agent, ..., own=dict(buffer=buffer))     # what a checkpoint holds; restored here
        for iteration in run.iterations(...):       # ends after a signal; none with --evaluate
            ...
            run.log(losses, data)
            if run.due(args.eval_interval):
                run.evaluate(play)
            if run.stopped() or run.due(args.checkpoint_interval):
                run.save()
        run.finish(play, draw)

if __name__ == "__main__":
    start(main, Args, PRESETS, SMALL)
"""

import contextlib
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from common.arguments import check_fit, flag, parse_args, refuse, script_of
from common.envs import SPLITS, BadInput, WorkerError, make_envs
from common.files import (
    CHECKPOINT,
    Generator,
    Metrics,
    claim_folder,
    load_checkpoint,
    load_modules,
    missing_space,
    names,
    on_disk,
    save_checkpoint,
    weights,
    write_config,
    write_whole,
)
from common.memory import check_memory, steps_memory
from common.processes import all_sum, check_finite, join_processes, leads, rank, ranks, second_thread
from common.rollouts import by_episode, film_tasks, first_tasks, play_tasks
from common.terminal import catch_signals, guard_terminal

LOG_EVERY = 10_000  # steps between two rows of metrics; evaluations are logged whenever they happen
# Arguments that a checkpoint's environments and buffers were made with: --resume cannot change them.
FIXED = "env_id num_envs horizon episodes_per_task buffer_size reward_version split_rule oracle control_cost "
FIXED += "extra_obs sessions session_process"
SEEN = "control_cost extra_obs"  # nor can --evaluate change what networks learnt to read


class Run:
    """One command: its processes, device, environments and counters, and all that it writes.

    envs: those of training, this process's share. eval_envs: by split, of the leading process, once `keep` was called.
    iteration, global_step: what is done; steps are transitions, summed over environments and processes.
    beside(function, *inputs): a Future, computed beside what follows, where there is a second core.
    Raises BadInput for what does not fit, before anything is written.
    """

    def __init__(self, args, split="", threads=1):
        """split: "" is train, or all with --oracle. threads: of the networks, which are small: more would
        wait for each other and take the workers' cores."""
        self.args, self.script, self.made = args, script_of(type(args)), []
        self.eval_envs, self.details, self.metrics, self.progress = {}, None, None, None
        self.signals, self.stop, self.shown, self.saved_step, self.lock = [], False, {}, None, None
        torch.set_num_threads(threads)
        join_processes(args.cuda)
        self.second = None
        with self.closed_on_error():
            self.check_args()
            local = int(os.environ.get("LOCAL_RANK", 0))
            self.device = torch.device("cuda", local) if args.cuda else torch.device("cpu")
            if args.cuda:
                torch.cuda.set_device(self.device)
            path = args.resume or args.evaluate
            self.state = load_checkpoint(path, self.script) if path else {}
            self.iteration, self.global_step = self.state.get("iteration", 0), self.state.get("global_step", 0)
            self.metrics_bytes, self.wandb_id = self.state.get("metrics_bytes", 0), self.state.get("wandb")
            self.benchmark_seed = self.state.get("benchmark_seed", args.seed)  # the run's own, whatever --seed says now
            self.envs = self.make_train_envs(split or ("all" if args.oracle else "train"), args.num_envs // ranks())
            for name in ("horizon", "episodes_per_task"):
                own = getattr(self.envs, name)
                if getattr(args, name) not in (0, own):
                    raise BadInput(f"{flag(name)} {getattr(args, name)}: {args.env_id} has {own} of its own")
                setattr(args, name, own)
            args.sessions = getattr(self.envs, "sessions", 0)
            args.session_process = getattr(self.envs, "session_process", "")
            check_fit(args)
            self.second = second_thread(args, args.num_envs * self.envs.meta_horizon)
        self.beside = self.second.submit
        torch.manual_seed(args.seed)

    def check_args(self):
        """BadInput for arguments of the experiment that do not fit each other, or this machine."""
        args = self.args
        refuse(
            (args.num_envs % ranks(), f"--num-envs {args.num_envs}: {ranks()} processes cannot share them"),
            (args.belief_batch < ranks(), f"--belief-batch {args.belief_batch}: {ranks()} processes cannot share it"),
            (args.resume and args.evaluate, "--resume and --evaluate exclude each other"),
            (args.capture_video and not args.evaluate, "--capture-video goes with --evaluate"),
            (args.evaluate and ranks() > 1, "--evaluate is for one process"),
            (args.cuda and not torch.cuda.is_available(), "--cuda: this PyTorch sees no CUDA device"),
            (
                args.cuda and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count(),
                f"--cuda: more processes than the {torch.cuda.device_count()} CUDA devices",
            ),
        )

    def make_envs(self, split, num_envs, **sizes):
        """Environments of this experiment, closed with the run."""
        a = self.args
        sizes = dict(horizon=a.horizon or None, episodes_per_task=a.episodes_per_task or None) | sizes
        rules = dict(reward_version=a.reward_version, split_rule=a.split_rule, control_cost=a.control_cost)
        rules |= dict(sessions=a.sessions, session_process=a.session_process, extra_obs=a.extra_obs)
        rules |= dict(benchmark_seed=self.benchmark_seed)
        envs = make_envs(a.env_id, num_envs, split, a.seed, self.device, **rules, **sizes)
        self.made.append(envs)
        return envs

    def make_train_envs(self, split, num_envs):
        """BadInput where what they play does not fit in memory: of very many, a thousand are asked first."""
        envs = self.make_envs(split, min(num_envs, 1000))
        advice = "choose fewer --num-envs, a shorter --horizon, or smaller buffers, batches or networks"
        check_memory(steps_memory(self.args, envs, num_envs), self.device, "this run", advice)
        if num_envs > envs.num_envs:
            envs.close()
            envs = self.make_envs(split, num_envs)
        return envs

    def make_eval_envs(self, most):
        """Evaluation environments by split, the last split first, at most `most` of them: rounds of equal size.

        There is no train split where the test split holds the same tasks, or is trained on.
        """
        for split in reversed(getattr(self.envs, "splits", SPLITS)):
            test = self.eval_envs.get("test")
            if split == "train" and (self.envs.split == "test" or getattr(test, "same_splits", False)):
                break
            envs = self.make_envs(split, most)
            count = len(first_tasks(envs, self.args.eval_tasks))
            size = math.ceil(count / math.ceil(count / most))
            if size != most:
                envs.close()
                envs = self.make_envs(split, size)
            self.eval_envs[split] = envs
        if self.args.capture_video and not hasattr(self.eval_envs["test"], "film"):
            raise BadInput(f"--capture-video: {self.args.env_id} has no camera (Meta-World and ScratchItch have one)")

    def rows(self):
        """How many meta-episodes this run will put into its buffer, or the buffer holds."""
        played = self.args.total_timesteps // self.envs.meta_horizon
        return min(self.args.buffer_size, max(self.args.num_envs, played))

    def truth(self):
        """info of a reset to named tasks, which draws none: the sizes of what an oracle is told."""
        info = self.envs.reset(tasks=[self.envs.tasks[0]] * self.envs.num_envs)[1]
        refuse((not info["task"].shape[1], f"--oracle-context: {self.args.env_id} tells no info['task'] at reset"))
        return info

    def compile(self, module, *methods):
        """With --compile."""
        for name in methods if self.args.compile and module else ():
            setattr(module, name, torch.compile(getattr(module, name)))

    # ----- what a checkpoint holds

    def keep(self, own=None, room=0, fixed="", most_eval_envs=None, **parts):
        """Names what a checkpoint holds, restores it with --resume and --evaluate, and opens the run's folder.

        parts: modules and optimisers, the same in all processes. own: by name, what each process has of its own, beside
        the environments: buffers, and the room that these will take in a checkpoint, in bytes.
        fixed: names of more arguments that --resume cannot change.
        """
        args, self.parts, self.own = self.args, parts, dict(own or {}, envs=self.envs)
        if leads() and (args.evaluate or args.eval_interval >= 0):
            self.make_eval_envs(most_eval_envs or args.num_envs)
        if dist.is_initialized():  # other tasks and other actions in each
            self.envs.load_state_dict({"resets": rank() << 32})
            torch.manual_seed(torch.randint(2**32, (ranks(),))[rank()].item())
        if self.state:
            self.restore(fixed)
        self.state = None
        if leads():
            self.folder, self.lock = claim_folder(args, self.script)
        if not args.evaluate:
            self.open(room)

    def restore(self, fixed):
        """Loads the checkpoint: of --evaluate the modules alone. Raises BadInput where it does not fit."""
        args, state, path = self.args, self.state, self.args.resume or self.args.evaluate
        for name in f"{FIXED if args.resume else SEEN} {fixed}".split():
            if getattr(args, name) != state["args"][name]:
                raise BadInput(f"{flag(name)} {getattr(args, name)}: {path} was saved with {state['args'][name]}")
        odd = state.keys() ^ {*CHECKPOINT, *self.parts}
        if odd:
            raise BadInput(f"{path} is not a whole checkpoint, or more than one: {names(odd)}")
        if args.evaluate:
            modules = {name: part for name, part in self.parts.items() if isinstance(part, nn.Module)}
            return load_modules(path, state, modules)
        if len(state["processes"]) != ranks():
            raise BadInput(f"{path} was saved by {len(state['processes'])} processes, and here are {ranks()}")
        mine = state["processes"][rank()]
        if not {"rng", *self.own} <= mine.keys():
            lacking = names({"rng", *self.own} - mine.keys())
            raise BadInput(f"{path} is not a whole checkpoint: a process lacks {lacking}")
        load_modules(path, state | mine, self.parts | self.own | dict(rng=Generator(torch.set_rng_state)))
        if args.cuda and "cuda_rng" in mine:
            load_modules(path, mine, dict(cuda_rng=Generator(torch.cuda.set_rng_state)))

    def open(self, room):
        """config.json and metrics, in the run's folder. Raises BadInput where it lacks room."""
        args, missing = self.args, float(missing_space(self.folder, room)) if leads() else 0.0
        missing = all_sum(torch.tensor(missing, device=self.device)).item() / 1e6
        advice = "free some, choose another --run-dir or a smaller --buffer-size"
        if missing > 0:
            raise BadInput(f"the run's folder lacks {missing:,.0f} MB for its checkpoints: {advice}")
        if leads():
            try:
                write_config(self.folder, args, self.script)
                self.metrics = Metrics(self.folder, args, self.metrics_bytes, self.global_step, self.wandb_id)
            except OSError as error:
                raise BadInput(f"cannot write to the run's folder: {error}") from error
            self.saved_step = self.global_step if args.resume else None

    # ----- the loop

    def iterations(self, last, steps=1, unit=" steps", about=None):
        """Numbers of the iterations to come, up to the `last` one (at least 1), of so many `steps` of the progress bar.

        It may be lowered on the way: `run.last`. A first SIGINT, SIGTERM or SIGHUP ends the loop after an iteration, a
        second one the process. With --evaluate there is nothing to do.
        """
        self.last = max(1, last)
        if self.args.evaluate or self.stop:
            return
        catch_signals(self.signals)
        if self.progress:  # of a loop before this one
            self.progress.close()
        else:
            self.started, self.first_step = time.time(), self.global_step
        self.progress = tqdm(
            total=self.last * steps, initial=self.iteration * steps, unit=unit, unit_scale=steps > 1, mininterval=1,
            desc=about, disable=not leads(),
        )  # fmt: skip
        while self.iteration < self.last and not self.stop:
            self.iteration, self.before = self.iteration + 1, self.global_step
            self.laps, self.lap_started = {}, time.perf_counter()
            yield self.iteration
            self.progress.update(steps)

    def left(self):
        """What is left of the run before this iteration: from 1 down to 1 / iterations."""
        return 1 - (self.iteration - 1) / self.last

    def lap(self, name):
        """Adds the time since the last lap, or the iteration's start, to this part of an iteration; of what runs beside
        another part, it is the time that it was waited for."""
        now = time.perf_counter()
        self.laps[name], self.lap_started = self.laps.get(name, 0) + now - self.lap_started, now

    def due(self, interval, since=0):
        """Whether this is every `interval`-th iteration (0 = none) or the last one (unless negative)."""
        regular = interval > 0 and (self.iteration - since) % interval == 0
        return regular or (interval >= 0 and self.iteration == self.last)

    def stopped(self):
        """Whether a signal came, to any process: then this iteration is the last one for now."""
        self.stop = bool(all_sum(torch.tensor(len(self.signals), device=self.device)))
        return self.stop

    def logs(self):
        """Whether a row of metrics is due: every LOG_EVERY steps, and at the end."""
        return self.global_step // LOG_EVERY > self.before // LOG_EVERY or self.iteration == self.last

    def log(self, losses, data, more=None):
        """Writes a row of metrics, where one is due, and shows its returns in the progress bar.

        losses: tensors by name, parts of a sum over processes. data: a rollout's, with `env_seconds`, and
        `episode_return` and `episode_success` (K, N) where there are some. more: scalars by key.
        """
        if not self.logs():
            return
        scalars = {f"losses/{key}": all_sum(value).item() for key, value in losses.items()}
        for name, key in (("return", "episodic_return"), ("success", "success_rate")):
            here = torch.tensor(int(f"episode_{name}" in data), device=self.device)
            if all_sum(here) == ranks():  # else one would wait for the others
                episodes = (all_sum(data[f"episode_{name}"].float().mean(1)) / ranks()).tolist()
                if name == "return":
                    scalars |= {f"charts/return_episode_{k + 1}": value for k, value in enumerate(episodes)}
                scalars[f"charts/{key}"] = self.shown[name] = episodes[-1]
        scalars["charts/SPS"] = (self.global_step - self.first_step) / (time.time() - self.started)
        seconds = sum(self.laps.values())
        scalars |= {f"time/{name}": lap / seconds for name, lap in self.laps.items()}
        scalars |= {"time/env": data["env_seconds"] / seconds} | (more or {})
        self.write(scalars, "metrics")

    def write(self, scalars, what):
        if leads():
            with on_disk(what, self.global_step):
                self.metrics.write(scalars, self.global_step)
            self.progress.set_postfix({key: f"{value:.2f}" for key, value in self.shown.items()})

    # ----- evaluation

    def evaluate(self, play, summarise=None, rename=str):
        """Every evaluation task of every split once, over its K episodes, with random numbers of its own; written.

        Of continuous policies twice: with the most likely actions and, as split/sampled, with sampled ones.
        play(envs, tasks, deterministic): a rollout in named tasks; of what it returns, `episode_return` and
        `episode_success` (K, N) and the tensors (N, .) in `details`, if any, are kept for each task, in eval.json.
        summarise(tasks): a split's scalars by name; `by_episode` if None. rename(name): what they, and those of the
        environment's `score`, are called. Returns scalars by key.
        """
        if not self.eval_envs:
            return {}
        scalars, played, kinds = {}, {}, {"": not self.args.eval_sample}
        if not (self.args.eval_sample or hasattr(self.envs.single_action_space, "n")):
            kinds["/sampled"] = False
        with torch.random.fork_rng(devices=[self.device] if self.args.cuda else []), self.evaluating():
            torch.manual_seed(self.args.seed)
            for (kind, deterministic), (split, envs) in itertools.product(kinds.items(), self.eval_envs.items()):
                todo = first_tasks(envs, self.args.eval_tasks)
                tasks = played[split + kind] = play_tasks(play, envs, todo, deterministic)
                found = (summarise or by_episode)(tasks)
                if hasattr(envs, "score"):
                    found |= envs.score({name: task["return"] for name, task in tasks.items()})
                scalars |= {f"eval/{split}{kind}/{rename(key)}": value for key, value in found.items()}
        self.details = {split: played[split] for split in self.eval_envs}
        for name, key in (("test return", "eval/test/return"), ("test success", "eval/test/success_rate")):
            if key in scalars:
                self.shown[name] = scalars[key]
        text = json.dumps(dict(global_step=self.global_step, **scalars, tasks=played), indent=1)
        with contextlib.nullcontext() if self.args.evaluate else on_disk("evaluation", self.global_step):
            write_whole(self.folder / "eval.json", text)
        if self.metrics:
            self.write(scalars, "evaluation")
        return scalars

    @contextlib.contextmanager
    def evaluating(self):
        """Modules without dropout."""
        modules = [part for part in self.parts.values() if isinstance(part, nn.Module)]
        for module in modules:
            module.eval()
        yield
        for module in modules:
            module.train()

    # ----- the end

    def save(self):
        """Writes checkpoint.pt. FloatingPointError where a weight is not finite: the last checkpoint stands."""
        modules = {name: part for name, part in self.parts.items() if isinstance(part, nn.Module)}
        check_finite(**{f"weights_of_the_{name}": weights(module) for name, module in modules.items()})
        mine = {name: part.state_dict() for name, part in self.own.items()} | dict(rng=torch.get_rng_state())
        if self.args.cuda:
            mine["cuda_rng"] = torch.cuda.get_rng_state()
        processes = [mine]
        if dist.is_initialized():
            processes = [None] * ranks()
            dist.gather_object(mine, processes if leads() else None)
        if leads():
            state = {name: part.state_dict() for name, part in self.parts.items()} | self.metrics.position()
            state |= dict(script=self.script, args=asdict(self.args), benchmark_seed=self.benchmark_seed)
            state |= dict(iteration=self.iteration, global_step=self.global_step, processes=processes)
            with on_disk("checkpoint", self.global_step):
                save_checkpoint(self.folder / "checkpoint.pt", state)
                self.saved_step = self.global_step

    def finish(self, play, draw, *how):
        """With --evaluate, evaluates (how: see there) and films. Then, after the last iteration, draw(run, details)."""
        if self.args.evaluate:
            for key, value in self.evaluate(play, *how).items():
                print(f"{key:<48} {value:.4f}")
        elif leads():
            self.progress.close()
        if self.details and (self.args.evaluate or self.iteration == self.last):
            with on_disk("pictures", self.global_step):
                draw(self, self.details)
        if self.args.capture_video:
            with self.evaluating():
                film_tasks(self.eval_envs["test"], play, self.folder)
        if leads() and not self.args.evaluate:
            self.report()

    def report(self):
        """The last line. Raises OSError where the last checkpoint is not on the disk."""
        checkpoint = self.folder / "checkpoint.pt"
        if self.saved_step != self.global_step:
            saved = "there is none" if self.saved_step is None else f"{checkpoint} is that of step {self.saved_step}"
            raise OSError(f"the checkpoint of step {self.global_step} was not saved: {saved}")
        print(f"{self.global_step} steps in {time.time() - self.started:.0f} s: {self.folder}")
        if self.stop and self.iteration < self.last:
            print(f"stopped by a signal at iteration {self.iteration} of {self.last}; --resume {checkpoint} goes on")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.second:
            self.second.shutdown()
        if self.progress:
            self.progress.close()
        if self.metrics:
            self.metrics.close()
        for envs in self.made:
            envs.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.lock is not None:
            os.close(self.lock)
        if kind is FloatingPointError and not self.args.evaluate:
            raise FloatingPointError(f"iteration {self.iteration}: {error}; the last checkpoint stands") from None

    @contextlib.contextmanager
    def closed_on_error(self):
        try:
            yield
        except BaseException as error:
            self.__exit__(None, error, None)
            raise


def start(main, Args, presets, small=None, inherited=None):
    """`python script.py`: exit status 2 after a user's mistake, 1 after a failure; the last checkpoint stands."""
    guard_terminal()
    script = script_of(Args)
    try:
        main(parse_args(Args, presets, small or {}, inherited=inherited))
    except BadInput as error:
        print(f"{script}.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before training, or with --evaluate
        print(f"{script}.py: interrupted", file=sys.stderr)
        sys.exit(130)
    except (WorkerError, FloatingPointError, OSError) as error:
        print(*getattr(error, "__notes__", ()), f"{script}.py: {error}", sep="\n", file=sys.stderr)
        sys.exit(1)
