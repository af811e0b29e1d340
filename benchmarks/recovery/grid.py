"""What is compared: tasks, methods, budgets. One `Run` is one network trained once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from files import FilePlan, largest_entries, low_rank_and_blocks, low_rank_of_stack

from kruify.factors import balanced_split


@dataclass(frozen=True)
class TaskSetup:
    """A task as it stands in the comparison.

    Attributes:
        name: of kruify's built-in task.
        hidden: units of the dense network's recurrent layers.
        teacher: options of the run that trains the dense network from scratch.
        student: options of every other run.
        converged: options of the run that trains the dense network of the grid by bytes, to where more passes gain
            nothing.
        smaller: name of the task whose dense network has `hidden` units, for the smaller dense control.
        published: the dense network is the task's published one, not trained here.
    """

    name: str
    hidden: int
    teacher: dict[str, Any]
    student: dict[str, Any]
    converged: dict[str, Any]
    smaller: Callable[[int], str]
    published: bool = False


TASKS: dict[str, TaskSetup] = {
    "g2p": TaskSetup(
        "g2p-en",
        256,
        {"epochs": 12, "lr": 3e-3},
        {"epochs": 12, "lr": 2e-3, "factor_lr": 3.0},
        {"epochs": 16, "lr": 3e-3},
        lambda h: f"g2p-en:hidden={h}",
    ),
    "g2p-published": TaskSetup(
        "g2p-en",
        256,
        {"epochs": 0},
        {"epochs": 3, "lr": 2e-3, "factor_lr": 3.0},
        {"epochs": 0},
        lambda h: f"g2p-en:hidden={h}",
        published=True,
    ),
    "jsb": TaskSetup(
        "jsb:hidden=256,cell=gru,dropout=0.4",
        256,
        {"epochs": 300, "lr": 4e-3},
        {"epochs": 30, "lr": 2e-3, "factor_lr": 3.0},
        {"epochs": 300, "lr": 4e-3},
        lambda h: f"jsb:hidden={h},cell=gru,dropout=0.4",
    ),
    "fashion": TaskSetup(
        "fashion-mnist-rows:hidden=128,cell=lstm",
        128,
        {"epochs": 8, "lr": 3e-3},
        {"epochs": 8, "lr": 2e-3, "factor_lr": 3.0},
        {"epochs": 16, "lr": 6e-3},
        lambda h: f"fashion-mnist-rows:hidden={h},cell=lstm",
    ),
    "fashion-rnn": TaskSetup(
        "fashion-mnist-rows:hidden=128,cell=rnn",
        128,
        {"epochs": 8, "lr": 1e-3},
        {"epochs": 8, "lr": 1e-3},
        {"epochs": 16, "lr": 1e-3},
        lambda h: f"fashion-mnist-rows:hidden={h},cell=rnn",
    ),
    "kjv": TaskSetup(
        "king-james:hidden=512,cell=lstm",
        512,
        {"epochs": 4, "lr": 3e-3},
        {"epochs": 4, "lr": 2e-3, "factor_lr": 3.0},
        {"epochs": 12, "lr": 6e-3},
        lambda h: f"king-james:hidden={h},cell=lstm",
    ),
}

Spec = Callable[[int, int, float], str]  # rows and columns of a gate, how many times smaller -> factor spec


def low_rank(rows: int, cols: int, times: float) -> str:
    return f"{max(1, int(rows * cols / times / (rows + cols)))}*({rows}x1,1x{cols})"


def kronecker(rows: int, cols: int, times: float) -> str:
    """Balanced factors, as many products as the budget holds, never more."""
    (a, b), (c, d) = balanced_split(rows, 2), balanced_split(cols, 2)
    return f"{max(1, int(rows * cols / times / (a * c + b * d)))}*({a}x{c},{b}x{d})"


def sparse(rows: int, cols: int, times: float) -> str:
    """The largest single entries."""
    return f"sparse:{100 / times:.6g}%:1"


def low_rank_sparse(rows: int, cols: int, times: float) -> str:
    """Half of the budget each."""
    return f"{low_rank(rows, cols, 2 * times)}+{sparse(rows, cols, 2 * times)}"


@dataclass(frozen=True)
class Method:
    """One way to a small network.

    Attributes:
        title: in tables.
        spec: structure of the recurrent matrices; None where they stay dense, or where candidates are trained.
        start: "convert" (the trained dense network), "random", "scratch" (the dense network itself), "dense" (trained
            on, not converted), "smaller" (dense with fewer units), "int8" (torch's dynamic quantisation), "int8-own"
            (kruify's, or its int4), or "candidates": several conversions are trained for a short while, and the one
            that validates best is taken, as in `kruify compress`.
        teacher: whether the dense network teaches.
        options: of the recipe, beside those of the task.
        stacked: `spec` is of the gates of a matrix as one.
        of_file: `times` is of the bytes of the whole file in int8.
        file_plan: structure of all matrices under that budget; None where they stay dense, or candidates are trained.
        dense: the method that trains the dense network.
        dtype: what the weights are stored in, which training is aware of.
        deleted: the code that trains it lost its comparison and is gone; commit b91d677 has it. Its runs are kept.
    """

    title: str
    spec: Spec | None = None
    start: str = "convert"
    teacher: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    stacked: bool = False
    of_file: bool = False
    file_plan: FilePlan | None = None
    dense: str = "dense"
    dtype: str | None = None
    deleted: bool = False

    def options_on(self, task: TaskSetup) -> dict[str, Any]:
        if self.start not in ("scratch", "smaller"):
            return {**task.student, **self.options}
        usual = task.converged if self.dense == CONVERGED else task.teacher
        if self.start == "smaller" and self.of_file:  # as many passes as a dense network and what is made of it
            usual = {**usual, "epochs": usual["epochs"] + task.student["epochs"]}
        return {**usual, **self.options}


CONVERGED = "converged"
BYTES: dict[str, Any] = {"of_file": True, "dense": CONVERGED}
TAUGHT = {"distill_logits": 0.5}
RATE = {"lr": 6e-3, "factor_lr": 1.0}  # the default recipe's
SLOW = {"lr": 2e-3, "factor_lr": 1.0}
DEFAULT = {**TAUGHT, "distill_until": 1.0, **RATE}
UNTAUGHT = {"distill_logits": 0.0}
ANNEAL = {"sparse_start": 1.0}
UNTAUGHT_ANNEAL = {**UNTAUGHT, **ANNEAL}  # the teacher's weights are what is annealed, its outputs not used

METHODS: dict[str, Method] = {
    # the default recipe, and controls trained as it trains
    "recipe": Method("default recipe", None, "candidates", True, DEFAULT),
    "recipe-low-rank-sparse": Method(
        "low rank + sparse per gate, default recipe", low_rank_sparse, "convert", True, DEFAULT
    ),
    "recipe-dense": Method("dense, trained on as long, default recipe", None, "dense", False, RATE),
    "recipe-low-rank": Method("low rank, default recipe", low_rank, "convert", True, DEFAULT),
    "recipe-stacked": Method(
        "low rank of stacked gates, default recipe", low_rank, "convert", True, DEFAULT, stacked=True
    ),
    "recipe-low-rank-gradual": Method(
        "low rank, terms falling, default recipe", low_rank, "convert", True, DEFAULT, deleted=True
    ),
    "recipe-pruned": Method("magnitude pruning, default recipe", sparse, "convert", True, DEFAULT),
    "recipe-pruned-gradual": Method(
        "magnitude pruning, gradual, default recipe", sparse, "convert", True, {**DEFAULT, **ANNEAL}
    ),
    "recipe-random": Method("random start, default recipe", low_rank_sparse, "random", True, DEFAULT),
    "recipe-kron": Method("Kronecker, default recipe", kronecker, "convert", True, DEFAULT),
    # the default recipe as it was before: lr 2e-3, factors at three times that, a teacher to the end or none
    "dense": Method("dense, from scratch", None, "scratch"),
    "dense-longer": Method("dense, trained on as long", None, "dense"),
    "smaller": Method("smaller dense, from scratch", None, "smaller"),
    "int8": Method("int8 dynamic, as it is", None, "int8"),
    "int8-own": Method("int8, kruify, as it is", None, "int8-own"),
    # files in int8, untaught: the teacher doubles the time of a run
    "file-int8": Method(
        "file in int8, training aware of it", None, "convert", False, UNTAUGHT,
        of_file=True, file_plan=low_rank_and_blocks, dtype="int8",
    ),
    "file-float": Method(
        "the same structure in float32", None, "convert", False, UNTAUGHT, of_file=True, file_plan=low_rank_and_blocks
    ),
    # the grid by bytes of the whole file
    CONVERGED: Method("dense, converged", None, "scratch", dense=CONVERGED),
    "converged-longer": Method("dense, trained on as long", None, "dense", False, SLOW, dense=CONVERGED),
    "bytes-int4": Method("dense, kruify's int4, as it is", None, "int8-own", dtype="int4", dense=CONVERGED),
    "bytes": Method("kruify compress, int8", None, "candidates", True, DEFAULT, dtype="int8", **BYTES),
    "bytes-low-rank": Method(
        "low rank, int8", None, "convert", True, DEFAULT, file_plan=low_rank_of_stack, dtype="int8", **BYTES
    ),
    "bytes-low-rank-slow": Method(
        "low rank, int8, at 2e-3", None, "convert", True, {**DEFAULT, **SLOW},
        file_plan=low_rank_of_stack, dtype="int8", **BYTES,
    ),
    "bytes-low-rank-float": Method(
        "low rank, rounded afterwards", None, "convert", True, DEFAULT, file_plan=low_rank_of_stack, **BYTES
    ),
    "bytes-pruned": Method(
        "pruned at once, int8", None, "convert", True, DEFAULT, file_plan=largest_entries, dtype="int8", **BYTES
    ),
    "bytes-pruned-gradual": Method(
        "pruned gradually, int8", None, "convert", True, {**DEFAULT, **ANNEAL},
        file_plan=largest_entries, dtype="int8", **BYTES,
    ),
    "bytes-smaller": Method("smaller dense, int8", None, "smaller", dtype="int8", **BYTES),
    # factors that people try first, recurrent matrices alone: converted, and from a random start
    **{
        f"spec-{spec.replace(':', '')}{end}": Method(
            f"`{spec}`{words}", (lambda rows, cols, times, spec=spec: spec), start, taught, options, dense=CONVERGED
        )
        for spec in ("2x2", "auto", "auto:3")
        for end, words, start, taught, options in (
            ("", ", default recipe", "convert", True, DEFAULT),
            ("-random", ", random start", "random", False, RATE),
        )
    },
    "low-rank": Method("low rank", low_rank, "convert", True, TAUGHT),
    "pruned": Method("magnitude pruning, at once", sparse, "convert", True, TAUGHT),
    "kron-logits": Method("Kronecker, outputs taught", kronecker, "convert", True, TAUGHT),
    "random": Method("low rank + sparse, random start", low_rank_sparse, "random", True, TAUGHT),
    "low-rank-sparse": Method("low rank + sparse", low_rank_sparse),
    "low-rank-sparse-logits": Method("low rank + sparse, outputs taught", low_rank_sparse, "convert", True, TAUGHT),
    "low-rank-sparse-anneal": Method(
        "low rank + sparse, annealed", low_rank_sparse, "convert", True, UNTAUGHT_ANNEAL
    ),
    "low-rank-sparse-anneal-taught": Method(
        "low rank + sparse, annealed, all taught", low_rank_sparse, "convert", True,
        {**TAUGHT, "distill_hidden": 1.0, **ANNEAL}, deleted=True,
    ),
    "low-rank-sparse-pooled": Method(
        "low rank + sparse, annealed, blocks shared", low_rank_sparse, "convert", True,
        {**UNTAUGHT_ANNEAL, "overlay_pooled": True}, deleted=True,
    ),
    "low-rank-sparse-alternated": Method("low rank + sparse, learning-compression", low_rank_sparse, deleted=True),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One network, trained once.

    Attributes:
        times: how many times smaller the recurrent matrices are (1 for methods that stay dense).
        epochs: 0 for the task's own number.
        changes: further options of the recipe, and the `share` of a candidate's trial: "name=value,name=value".
        whole: `times` is of the whole model, W_ih factored as W_hh.
    """

    task: str
    method: str
    times: float = 1
    seed: int = 0
    epochs: float = 0
    changes: str = ""
    whole: bool = False

    @property
    def key(self) -> str:
        whole = "-whole" if self.whole else ""
        epochs = f"-{self.epochs:g}ep" if self.epochs else ""
        changes = f"-{self.changes.replace('=', '').replace(',', '-')}" if self.changes else ""
        return f"{self.task}/{self.times:g}x{whole}/{self.method}{epochs}{changes}-s{self.seed}"

    @property
    def teacher(self) -> Run:
        """The run that trains its dense network."""
        return Run(self.task, METHODS[self.method].dense, 1, self.seed)

    @property
    def options(self) -> dict[str, Any]:
        """Options of the recipe: the task's, the method's, the run's own; no rate where trials choose it."""
        usual = METHODS[self.method].options_on(TASKS[self.task])
        if METHODS[self.method].start == "candidates":
            del usual["lr"]
        epochs = {"epochs": self.epochs} if self.epochs else {}
        own = dict(item.split("=") for item in self.changes.split(",")) if self.changes else {}
        own = {name: number(value) for name, value in own.items()}
        return {"distill_until": None, **usual, **epochs, **own, "seed": self.seed}

    @staticmethod
    def parse(text: str) -> Run:
        """task:method[:times[:seed[:epochs[:changes]]]], as in g2p:low-rank:16:0:5:lr=4e-3; times may be 4w (whole
        model)."""
        task, method, *rest = text.split(":")
        if task not in TASKS or method not in METHODS:
            raise SystemExit(f"{text}: tasks are {', '.join(TASKS)}; methods are {', '.join(METHODS)}")
        if METHODS[method].deleted:
            raise SystemExit(f"{text}: the code that trains {method} was deleted after commit b91d677; check that out")
        rest += ["1", "0", "0", ""][len(rest) :]
        whole = rest[0].endswith("w")
        return Run(task, method, float(rest[0].rstrip("w")), int(rest[1]), float(rest[2]), rest[3], whole)


def number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


RECIPE, PER_GATE = "recipe", "recipe-low-rank-sparse"
CONTROLS = (
    "recipe-dense",
    PER_GATE,
    "recipe-low-rank",
    "recipe-pruned",
    "recipe-pruned-gradual",
    "recipe-random",
    "smaller",
)
# What each ingredient of the default recipe is worth on g2p, where PER_GATE is the candidate chosen: one thing changed.
_RATE = "lr=6e-3,factor_lr=1"  # the recipe's rate, for methods whose own is another
ABLATIONS = {
    "default recipe": Run("g2p", RECIPE, 16),
    "no teacher": Run("g2p", "low-rank-sparse", 16, changes=_RATE),
    "a teacher to the end, not annealed": Run("g2p", "low-rank-sparse-logits", 16, changes=_RATE),
    "rate 2e-3, factors at 6e-3": Run("g2p", PER_GATE, 16, changes="lr=2e-3,factor_lr=3"),
    "constant rate": Run("g2p", PER_GATE, 16, changes="schedule=constant"),
    "gradients not clipped": Run("g2p", PER_GATE, 16, changes="clip=0"),
    "no single entries": Run("g2p", "recipe-low-rank", 16),
    "no low rank": Run("g2p", "recipe-pruned", 16),
    "random start": Run("g2p", "recipe-random", 16),
}

# What eight bits cost a published network, after the fact and with training that is aware of them.
INT8 = [Run("g2p-published", method) for method in ("dense", "int8", "int8-own")]
INT8 += [Run("g2p-published", method, 16, seed) for seed in range(3) for method in ("file-int8", "file-float")]

RIVALS = ("bytes-low-rank", "bytes-pruned-gradual", "bytes-smaller")
PRUNED_AT_ONCE = "bytes-pruned"  # better than gradually on JSB alone


def by_bytes() -> list[Run]:
    """The grid by bytes of the whole file, cells that are cheap and decide most first."""
    tasks = ("fashion", "jsb", "g2p", "kjv")
    runs = []
    for seed in range(3):
        for times in (16, 8, 32, 4):
            for task in tasks:
                rivals = (RIVALS[0], PRUNED_AT_ONCE, RIVALS[2]) if task == "jsb" else RIVALS
                if task == "kjv" and seed:  # a run takes half an hour
                    rivals = ()
                if task == "kjv" and seed > 1:
                    continue
                runs += [
                    Run(task, CONVERGED, 1, seed),
                    Run(task, "bytes-int4", 1, seed),
                    Run(task, "bytes", times, seed),
                ]
                runs += [Run(task, method, times, seed) for method in rivals]
                runs += [Run(task, "converged-longer", 1, seed)] if rivals else []
                if times == 16 and (seed == 0 or task == "g2p"):
                    runs.append(Run(task, "bytes-low-rank-float", times, seed))
        if not seed:
            specs = [name for name in METHODS if name.startswith("spec-")]
            runs += [Run(task, name) for task in ("fashion", "fashion-rnn", "jsb", "g2p", "kjv") for name in specs]
    return list(dict.fromkeys(runs))


def grid() -> list[Run]:
    """Every run of the comparison, the most informative first."""
    runs = []
    for task in ("g2p", "jsb", "fashion", "kjv"):
        seeds = 3 if task in ("g2p", "jsb") else 1
        for seed in range(seeds):
            runs += [Run(task, "dense", 1, seed), Run(task, RECIPE, 16, seed)]
            runs += [Run(task, m, 1 if m == "recipe-dense" else 16, seed) for m in CONTROLS]
        runs.append(Run(task, "int8", 1))
        few = ("recipe-low-rank", "recipe-pruned")
        runs += [Run(task, m, times) for times in (4, 64) for m in (RECIPE, *few)]
        runs += [Run(task, m, 4, whole=True) for m in (PER_GATE, *few)]  # candidates are of recurrent matrices alone
    runs += [Run(task, "recipe-kron", 64) for task in ("g2p", "kjv")]
    order = sorted(runs, key=lambda c: (c.seed, c.times not in (1, 16), list(TASKS).index(c.task)))
    return list(dict.fromkeys(by_bytes() + order + list(ABLATIONS.values()) + INT8))
