"""The house's style: what a reader may count on in every script, and in common/.

python -m tests.test_house prints the names whose bodies differ between scripts, in the form of EXCEPTIONS.
"""

import ast
import dataclasses
import functools
import inspect
import re
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import dme
import dynamite_rl
import laser
import ldm
import varibad
from common.envs import FAMILIES
from tests.test_scripts import EVERY, ROOT, preset_of

SCRIPTS = [varibad, dme, ldm, dynamite_rl, laser]
COMMON = sorted(ROOT.glob("common/**/*.py"))


@functools.cache
def tree(path):
    return ast.parse(Path(path).read_text())


@EVERY
def test_import_starts_nothing(script, tmp_path, monkeypatch, capfd):
    """No output, no file, no thread, no random number."""
    monkeypatch.chdir(tmp_path)
    before, threads = torch.get_rng_state(), set(threading.enumerate())
    runpy.run_path(script.__file__, run_name=script.__name__)
    # a thread that an earlier test left may end meanwhile: only new ones count
    assert torch.equal(before, torch.get_rng_state()) and set(threading.enumerate()) <= threads
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_ruff():
    """Formatted and linted as .ruff.toml has it."""
    for words in (["check", "-q"], ["format", "-q", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *words, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# ---------- Arguments and presets ----------


def uses(source_tree):
    """Names of attributes that are read from `args`, or from `a`, its short name."""
    nodes = (node for node in ast.walk(source_tree) if isinstance(node, ast.Attribute))
    return {
        node.attr
        for node in nodes
        if isinstance(node.ctx, ast.Load)
        and (getattr(node.value, "id", "") in ("args", "a") or getattr(node.value, "attr", "") == "args")
    }


@EVERY
def test_every_argument_is_documented_and_used(script):
    """A comment beside or above each field, and `args.<field>` somewhere in the code."""
    used = set().union(*(uses(tree(path)) for path in [script.__file__, *COMMON]))
    found = set()
    for group in script.Args.__mro__[:-1]:
        lines, _ = inspect.getsourcelines(group)
        (body,) = ast.parse("".join(lines)).body
        for field in (node for node in body.body if isinstance(node, ast.AnnAssign)):
            name = field.target.id
            if group is script.Args and any(name in base.__annotations__ for base in script.Args.__mro__[1:-1]):
                continue  # a default; the help stands where it is declared
            found.add(name)
            beside = any(re.search(r"  # \S", line) for line in lines[field.lineno - 1 : field.end_lineno])
            assert beside or lines[field.lineno - 2].strip().startswith("# "), name
            assert name in used, name
    assert found == {field.name for field in dataclasses.fields(script.Args)}


def needless(script):
    """Entries of the script's presets that change nothing, as `name: key=value`."""
    defaults = {field.name: field.default for field in dataclasses.fields(script.Args)}
    found, laid_over = [], {}  # (key, value) in SMALL -> whether it changes any environment's preset

    def value_of(node):
        return eval(compile(ast.Expression(node), script.__file__, "eval"), vars(script))

    def look(node, name, extended):
        """extended: the entries that those of `node` lie over."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            look(node.left, name, extended)
            look(node.right, name, extended | value_of(node.left))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict":
            for key, value in ((entry.arg, value_of(entry.value)) for entry in node.keywords):
                if name.startswith("SMALL") and key not in extended:
                    laid_over[key, value] = False
                elif (defaults | extended)[key] == value:
                    found.append(f"{name}: {key}={value}")
        else:
            for child in ast.iter_child_nodes(node):
                look(child, name, extended)

    for statement in tree(script.__file__).body:
        if isinstance(statement, ast.Assign) and isinstance(vars(script)[statement.targets[0].id], dict):
            look(statement.value, statement.targets[0].id, {})
    for env_id, entries in getattr(script, "SMALL", {}).items():
        preset = defaults | preset_of(script, env_id, cuda=True)
        for entry in laid_over.keys() & entries.items():
            laid_over[entry] |= preset[entry[0]] != entry[1]
    return found + [f"SMALL: {key}={value}" for (key, value), changes in laid_over.items() if not changes]


@EVERY
def test_presets_name_only_what_differs(script):
    """No entry equals the default of Args, or the entry of the preset that it extends."""
    assert needless(script) == []
    assert all(preset.keys() <= vars(script.Args()).keys() for preset in script.PRESETS.values())


# ---------- Definitions ----------

OWN = {"Args", "check_args", "main", "PRESETS", "SMALL"}  # what every script has of its own
# Script -> definitions whose body is not that of the first script that has one of this name, and why.
EXCEPTIONS = {
    dme: {
        **dict.fromkeys(
            ("GRID", "LARGE_GRID", "POINT", "LOCOMOTION", "META_WORLD", "SMALL_ML"), "its hyper-parameters"
        ),
        "BeliefModel": "the hierarchical mixture (1), (2)",
        "reconstruction": "decodes the future (5), (6)",
        "multihead_loss": "decodes the future (6)",
        "elbo": "(7) to (10)",
        "update_belief": "virtual batches (11)",
        "rollout": "virtual rewards (11) and Algorithm 1's initial belief",
        "draw_pictures": "the mixture's picture, too",
    },
    ldm: {
        **dict.fromkeys(("PPO", "Belief", "POINT", "LOCOMOTION"), "its arguments and hyper-parameters"),
        "Agent": "the policy's own recurrent encoder; no embeddings (3.1)",
        "BeliefModel": "encoder-v, of one kind with the policy's (3.2)",
        "Decoder": "dropout's masks may differ from pair to pair",
        "reconstruction": "the Bernoulli decoder of (m, s')",
        "ppo_update": "through time (3.1)",
        "rollout": "the policy's encoder, imaginary rewards (3.3)",
        "draw_pictures": "imagined tasks; the policy's belief is not the decoder's",
    },
    dynamite_rl: {
        **dict.fromkeys(("PPO", "Belief", "POINT", "SESSIONS", "SMALL_SESSIONS"), "its arguments and hyper-parameters"),
        "Agent": "no embeddings, ReLU (appendix E); actor and critic may be clipped apart",
        "Encoder": "an MLP before the GRU (appendix E), conditioning",
        "BeliefModel": "heads of session ends, p(m' | m), Algorithm 3's next session",
        "reconstruction": "of sessions (5)",
        "multihead_loss": "of sessions (5)",
        "elbo": "(4) to (6)",
        "ppo_update": "actor and critic clipped apart; the clipped value loss without Huber's",
        "Buffer": "session ends, too",
        "rollout": "Algorithm 3",
        "draw_pictures": "session ends",
    },
    laser: {
        **dict.fromkeys(("PPO", "Belief", "META_WORLD", "SMALL_ML"), "its arguments and hyper-parameters"),
        "Agent": "features of Gamma_t or of the context (D.2); the layer that PFO holds",
        "Encoder": "transformers (3.4)",
        "gae": "every task ends with its last step; value targets are found anew (14)",
        "ppo_update": "the meta-reward (14), PFO, idle steps left out",
        "Buffer": "all meta-episodes of a task side by side, packed",
        "draw_pictures": "Figure 9, and the curves",
    },
}
LEFT_OUT = {  # what of varibad.py's a script does without
    dme: {"VariBAD", "SESSIONS", "SMALL_SESSIONS"},  # no presets of environments with sessions
    ldm: {  # nor of Meta-World; nothing waits for the belief
        *("VariBAD", "GRID", "LARGE_GRID", "META_WORLD", "SESSIONS"),
        *("SMALL", "ML1", "SMALL_ML", "SMALL_ML1", "SMALL_SESSIONS", "is_blind"),
    },
    dynamite_rl: {  # few presets of environments without sessions
        *("VariBAD", "GRID", "LARGE_GRID", "LOCOMOTION", "META_WORLD", "ML1", "SMALL_ML", "SMALL_ML1"),
    },
    laser: {  # no belief model of variBAD's kind, and no presets but its own
        *("VariBAD", "GRID", "LARGE_GRID", "POINT", "LOCOMOTION", "SESSIONS", "ML1", "SMALL_ML1", "SMALL_SESSIONS"),
        *("BeliefModel", "Decoder", "is_blind", "rollout", "update_belief", "elbo", "reconstruction"),
        *("multihead_loss", "gaussian", "kl_gaussians", "average", "draw_posteriors"),
    },
}


def definitions(path):
    found = {}
    for node in tree(path).body:
        targets = [target for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        for name in [node.name] if hasattr(node, "name") else [target.id for target in targets]:
            found[name] = ast.unparse(node)
    return found


def differences(script):
    """Names, beside OWN, whose body is not that of the first script that has one of this name."""
    before = SCRIPTS[: SCRIPTS.index(script)]
    first = {name: body for other in reversed(before) for name, body in definitions(other.__file__).items()}
    ours = definitions(script.__file__)
    return {name for name in ours.keys() & first.keys() - OWN if ours[name] != first[name]}


@pytest.mark.parametrize("script", SCRIPTS[1:], ids=lambda module: module.__name__)
def test_shared_definitions_are_identical(script):
    """What has one name in two scripts has one body, unless it is the paper's; and the exceptions do differ."""
    assert differences(script) == EXCEPTIONS[script].keys()
    assert definitions(varibad.__file__).keys() - definitions(script.__file__).keys() == LEFT_OUT[script]


NAMESAKES = {
    "main": "of plot.py, its command line",
    "draw_mixture": "of plot.py, a picture of DME's components; of ldm.py, roles and weights of workers",
}


def test_what_is_common_stands_once():
    """No script defines what common/ defines."""
    shared = set().union(*(definitions(path) for path in ROOT.glob("common/*.py"))) - NAMESAKES.keys()
    assert len(shared) > 50
    for script in SCRIPTS:
        twice = definitions(script.__file__).keys() & shared
        assert not twice, f"{script.__name__}: {twice}"


def test_functions_fit_on_a_screen():
    """At most 60 lines, `main` of a script 90."""
    for path in [*(Path(script.__file__) for script in SCRIPTS), *COMMON]:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                most = 90 if node.name == "main" and path.parent == ROOT else 60
                assert node.end_lineno - node.lineno < most, f"{path.name}: {node.name}"


# ---------- Imports ----------

BACK_ENDS = {f"common.envs.{name}" for name in ("check", "extra", "film", "mujoco_batch", "sessions", "workers")}
FAMILY_FILES = {factory.split(":")[0] for factory in FAMILIES.values()} | {"common.envs.metaworld"}


def layer(module):
    """The place in the order protocol <- back ends <- families <- make_envs <- run <- scripts."""
    if module in ("common.envs.cgroup", "common.envs.protocol"):
        return 0
    if module in BACK_ENDS:
        return 1
    if module in FAMILY_FILES:
        return 2
    if module == "common.envs":
        return 3
    if module == "common.run":
        return 5
    return 4 if re.fullmatch(r"common\.[a-z]+", module) else 6


@functools.cache
def imports():
    """Module -> the modules of common/, and the scripts, that it imports, anywhere."""
    files = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in COMMON}
    files = {path: name.removesuffix(".__init__") for path, name in files.items() if name != "common.__init__"}
    files |= {Path(script.__file__): script.__name__ for script in SCRIPTS}
    found = {name: set() for name in files.values()}
    for path, name in files.items():
        for node in ast.walk(tree(path)):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            found[name] |= set(names) & found.keys()
    return found


def test_order_of_imports():
    """Nobody imports from above, and nobody in a circle; every file of environments has a place."""
    found = imports()
    assert {layer(name) for name in found if name.startswith("common.envs")} == {0, 1, 2, 3}
    for name, others in found.items():
        for other in others:
            assert layer(other) <= layer(name), f"{name} imports {other}"
            assert layer(other) < 6, f"{name} imports {other}, a script"
    done = set()
    while len(done) < len(found):
        free = {name for name, others in found.items() if name not in done and others <= done}
        assert free, f"a circle among {found.keys() - done}"
        done |= free


def test_importing_environments_is_light():
    """Neither MuJoCo nor Meta-World, nor torch, which a worker has no use for."""
    code = "import sys, common.envs, common.envs.protocol, common.envs.workers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"mujoco", "metaworld", "torch"} & set(done.stdout.split())
    assert "common.envs.workers" in done.stdout.split()


# ---------- README ----------


def test_readme():
    """Short enough to scan: at most 260 lines, no cell of a table above 160 characters."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 260
    cells = [cell.strip() for line in lines if line.startswith("|") for cell in line.strip("|").split("|")]
    assert len(cells) > 50 and not [cell for cell in cells if len(cell) > 160]


if __name__ == "__main__":
    for script in SCRIPTS[1:]:
        print(f"EXCEPTIONS[{script.__name__}]: {', '.join(sorted(differences(script)))}")
        left_out = definitions(varibad.__file__).keys() - definitions(script.__file__).keys()
        print(f"LEFT_OUT[{script.__name__}]: {', '.join(sorted(left_out))}")
