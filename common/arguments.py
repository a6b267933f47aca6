"""The command line: an experiment's arguments, bounds in the types of all, presets.

Each script has dataclasses of its own for what its paper has a symbol for, and joins them:

    @dataclass
    class Args(VariBAD, PPO, Experiment):
        env_id: str = "GridWorld"           # here only defaults; the help stands where an argument is declared
"""

import argparse
import inspect
import math
import sys
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import torch
import tyro

from common.envs import BadInput
from common.files import load_checkpoint, names


@dataclass(frozen=True)
class Bounds:
    """Of an argument, or of each number in a tuple, which then has one at least: at_least <= x <= at_most, above < x.

    A number is always finite.
    """

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf


Count = Annotated[int, Bounds(at_least=1)]  # 1, 2, ...
Count0 = Annotated[int, Bounds(at_least=0)]  # 0, 1, ...
Above0 = Annotated[float, Bounds(above=0)]
AtLeast0 = Annotated[float, Bounds(at_least=0)]
Fraction = Annotated[float, Bounds(at_least=0, at_most=1)]
Dropout = Annotated[float, Bounds(at_least=0, at_most=0.999)]
Layers = Annotated[tuple[int, ...], Bounds(at_least=1)]


@dataclass
class Experiment:
    """What is run, where, and how long."""

    # GridWorld, GridWorldLDM, GridWorldExtrapolation, SparsePointRobot, MEWA, MEWAUniform, HalfCheetahVel,
    # HalfCheetahDir, AntDir, AntGoal, HopperMass, ML1-<family>, ML10, ML45, or package.module:factory; with sessions:
    # GridWorldAlternating, Reacher, HalfCheetahDirSessions, HalfCheetahVelSessions, HalfCheetahWindVelSessions,
    # ScratchItch.
    env_id: str = ""
    seed: Annotated[int, Bounds(at_least=0, at_most=2**32 - 1)] = 1  # of tasks, networks and actions
    cuda: bool = False  # train on the GPU, with the paper's sizes and steps where a CPU's preset has its own
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline works)
    # Environment steps, summed over environments (laser.py: real steps of both phases, at most; 0 = no bound).
    total_timesteps: Count = 20_000_000
    num_envs: Count = 16  # environments stepped together (N); laser.py: tasks of an iteration
    horizon: Count0 = 0  # steps of an episode (H); 0 = the environment's own
    episodes_per_task: Count0 = 0  # episodes of a meta-episode (K), which is an iteration; 0 = the environment's own
    eval_interval: int = 500  # iterations between evaluations; 0 = only at the end; negative = never
    eval_tasks: Count0 = 0  # evaluation tasks per family, the first ones; 0 = all
    checkpoint_interval: Count0 = 500  # iterations between checkpoints; 0 = only at the end
    run_dir: str = ""  # folder of this very run; empty = runs/<env>__<script>__<seed>__<time>
    resume: str = ""  # checkpoint to continue from, with its arguments; those given beside it override
    evaluate: str = ""  # checkpoint to evaluate: prints the results and writes eval.json beside it, trains nothing
    # Evaluations with sampled actions alone, as in training (dme.py: and w and z). Without it they have the most likely
    # ones, the means; those of continuous policies sampled ones, too: eval/test/sampled/...
    eval_sample: bool = False
    capture_video: bool = False  # with --evaluate: a film of one held-out task of each family (Meta-World, ScratchItch)
    compile: bool = False  # torch.compile the networks; the first iteration takes a minute
    reward_version: Literal["v1", "v2"] = "v2"  # Meta-World's reward functions
    split_rule: Literal["varibad", "ldm"] = "varibad"  # MuJoCo: train = test, or LDM's disjoint sets (its Table 1)
    oracle: bool = False  # train on the split "all", with the tasks of the evaluation: LDM's oracles
    # MuJoCo: actions in rewards are the policy's (raw: variBAD's and LDM's code) or clipped to their box; empty = the
    # environment's own, raw in variBAD's and LDM's tasks.
    control_cost: Literal["", "raw", "clipped"] = ""
    # A last entry of observations (common/envs/extra.py). done: whether an episode has just ended (SDVT's); time: the
    # share of the episode that is over, which with --no-belief is a floor for contexts that change with time (ours).
    extra_obs: Literal["none", "done", "time"] = "none"
    sessions: Count0 = 0  # sessions of an episode, where the environment has them; 0 = the environment's own
    session_process: Literal["", "fixed", "poisson", "bernoulli"] = ""  # their lengths; empty = the environment's own


def parse_args(Args, presets, small, argv=None, inherited=None):
    """The command line over the arguments saved in --resume or --evaluate, else over the preset of --env-id.

    presets: by environment or family ("ML1" for "ML1-reach"); "module:factory" is for all others, a user's own too.
    small: what is laid over them on machines without a GPU. inherited: by the name of an option that takes another
    run's checkpoint, the arguments whose defaults are that run's. Raises BadInput for an argument out of bounds.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--env-id", "--env_id", default=Args.env_id)
    early.add_argument("--cuda", action=argparse.BooleanOptionalAction)
    early.add_argument("--resume", default="")
    early.add_argument("--evaluate", default="")
    for name in inherited or ():
        early.add_argument(flag(name), default="")
    known = early.parse_known_args(argv)[0]
    defaults = {f.name: f.default for f in fields(Args)}
    path = known.resume or known.evaluate
    if path:
        defaults |= saved_args(path, Args) | dict(resume="", evaluate="", run_dir=str(Path(path).parent))
        if defaults["cuda"] and known.cuda is None and not torch.cuda.is_available():
            print(f"{path} was saved on a GPU; this machine has none: going on on the CPU", file=sys.stderr)
            defaults["cuda"] = False
    else:
        name = known.env_id.removesuffix("-v2").removesuffix("-v3")
        family = name.split("-")[0]
        defaults |= presets.get(name, presets.get(family, presets["module:factory"]))
        defaults |= {} if known.cuda else small.get(name, small.get(family, {}))
        for option, those in (inherited or {}).items():
            if other := getattr(known, option):
                saved = saved_args(other, Args)
                defaults |= {name: saved[name] for name in those}
    groups = [base for base in Args.__mro__[:0:-1] if is_dataclass(base)]  # one heading each in --help
    values = [group(**{f.name: defaults[f.name] for f in fields(group)}) for group in groups]
    grouped = make_dataclass("Args", [(group.__name__, tyro.conf.OmitArgPrefixes[group]) for group in groups])
    given = tyro.cli(grouped, args=argv, default=grouped(*values), prog=f"{script_of(Args)}.py")
    args = Args(**{name: value for part in vars(given).values() for name, value in vars(part).items()})
    check_bounds(args)
    return args


def saved_args(path, Args):
    """The arguments in a checkpoint, by name. Raises BadInput where they are not those of Args."""
    args = load_checkpoint(path, script_of(Args))["args"]
    hints = get_type_hints(Args, include_extras=True)
    odd = args.keys() ^ hints.keys()
    if odd:
        raise BadInput(f"{path} comes from another version of {script_of(Args)}: its arguments differ in {names(odd)}")
    for name, hint in hints.items():
        if not is_of(args[name], hint):
            raise BadInput(f"{path} is not a checkpoint of {script_of(Args)}: its {flag(name)} is {args[name]!r:.60}")
    return args


def is_of(value, hint):
    """Whether an argument has its type."""
    if get_origin(hint) is Annotated:
        return is_of(value, get_args(hint)[0])
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(type(x) is int for x in value)
    return type(value) in ((int, float) if hint is float else (hint,))


def check_bounds(args):
    """BadInput for the first argument outside the Bounds of its type."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        numbers = value if isinstance(value, tuple) else [value]
        if any(isinstance(x, int) and abs(x) >= 2**63 for x in numbers):
            raise BadInput(f"{flag(name)} is too large a number")
        bounds = next((x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Bounds)), None)
        if bounds is None and not isinstance(value, float):
            continue
        b = bounds or Bounds()
        if numbers and all(b.at_least <= x <= b.at_most and x > b.above and math.isfinite(x) for x in numbers):
            continue
        limits = dict(above=b.above, at_least=b.at_least, at_most=b.at_most).items()
        limits = [f"{word.replace('_', ' ')} {x:.10g}" for word, x in limits if math.isfinite(x)] or ["finite"]
        what = "one or more numbers, each " * isinstance(value, tuple)
        raise BadInput(f"{flag(name)} must be {what}{' and '.join(limits)}, not {value}")


def check_fit(args):
    """BadInput for arguments of any script that do not fit each other, once the environment's sizes are known."""
    T = args.horizon * args.episodes_per_task
    tbptt = getattr(args, "tbptt", 0)  # laser.py has none
    refuse(
        (args.oracle_context and not args.belief, "--no-belief and --oracle-context exclude each other"),
        (args.buffer_size < args.num_envs, f"--buffer-size {args.buffer_size} is below --num-envs {args.num_envs}"),
        (tbptt and T % min(tbptt, T), f"--tbptt {tbptt} does not divide the {T} steps of a meta-episode"),
        (
            not args.std_min < args.std_init < args.std_max,
            f"--std-init {args.std_init} must lie inside --std-min {args.std_min}, --std-max {args.std_max}",
        ),
    )


def refuse(*faults):
    """BadInput for the first of the pairs (whether it holds, sentence) that holds."""
    for holds, sentence in faults:
        if holds:
            raise BadInput(sentence)


def flag(name):
    return "--" + name.replace("_", "-")


def script_of(Args):
    """The name of the script that defines these arguments."""
    return Path(inspect.getfile(Args)).stem
