"""What is compared: tasks, methods, budgets. One `Cell` is one network trained once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kruify.factors import balanced_split


@dataclass(frozen=True)
class TaskSetup:
    """A task as it stands in the comparison.

    Attributes:
        name: of kruify's built-in task.
        hidden: units of the dense network's recurrent layers.
        teacher: options of the run that trains the dense network from scratch.
        student: options of every other run.
        smaller: name of the task whose dense network has `hidden` units, for the smaller dense control.
    """

    name: str
    hidden: int
    teacher: dict[str, Any]
    student: dict[str, Any]
    smaller: Callable[[int], str]


TASKS: dict[str, TaskSetup] = {
    "g2p": TaskSetup(
        "g2p-en",
        256,
        {"epochs": 12, "lr": 3e-3},
        {"epochs": 12, "lr": 2e-3, "factor_lr": 3.0},
        lambda h: f"g2p-en:hidden={h}",
    ),
    "jsb": TaskSetup(
        "jsb:hidden=256,cell=gru,dropout=0.4",
        256,
        {"epochs": 300, "lr": 4e-3},
        {"epochs": 100, "lr": 2e-3, "factor_lr": 3.0},
        lambda h: f"jsb:hidden={h},cell=gru,dropout=0.4",
    ),
    "fashion": TaskSetup(
        "fashion-mnist-rows:hidden=128,cell=lstm",
        128,
        {"epochs": 8, "lr": 3e-3},
        {"epochs": 8, "lr": 2e-3, "factor_lr": 3.0},
        lambda h: f"fashion-mnist-rows:hidden={h},cell=lstm",
    ),
    "kjv": TaskSetup(
        "king-james:hidden=512,cell=lstm",
        512,
        {"epochs": 4, "lr": 3e-3},
        {"epochs": 4, "lr": 2e-3, "factor_lr": 3.0},
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


def kronecker_low_rank(rows: int, cols: int, times: float) -> str:
    """Half of the budget each."""
    return f"{kronecker(rows, cols, 2 * times)}+{low_rank(rows, cols, 2 * times)}"


def sparse(block: int, share: float = 1.0) -> Spec:
    return lambda rows, cols, times: f"sparse:{100 * share / times:.6g}%:{block}"


def low_rank_sparse(block: int) -> Spec:
    return lambda rows, cols, times: f"{low_rank(rows, cols, 2 * times)}+{sparse(block, 0.5)(rows, cols, times)}"


def kronecker_sparse(block: int) -> Spec:
    return lambda rows, cols, times: f"{kronecker(rows, cols, 2 * times)}+{sparse(block, 0.5)(rows, cols, times)}"


@dataclass(frozen=True)
class Method:
    """One way to a small network.

    Attributes:
        spec: structure of the recurrent matrices; None where they stay dense, or are `tried`.
        tried: several structures are trained for a quarter of the epochs, and the one that validates best is taken
            (kruify.trial): what `kruify compress` does.
        start: "convert" from the dense network, "alternate" (learning-compression, then convert), "gradual" (more terms
            than may be kept), "random", "dense" (it stays dense), "smaller" (dense with fewer units) or "int8".
        teacher: whether the dense network teaches.
        options: of the recipe, beside those of the task.
        stacked: `spec` is of the gates of a matrix as one.
        title: in tables and pictures.
    """

    title: str
    spec: Spec | None = None
    start: str = "convert"
    teacher: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    tried: bool = False
    stacked: bool = False


CE = {"distill_logits": 0.0, "distill_hidden": 0.0}  # overlays may be annealed without anything else being taught
TAUGHT = {"distill_logits": 0.5, "distill_hidden": 0.0}
RATE = {"lr": 6e-3, "factor_lr": 1.0}  # the default recipe's
DEFAULT = {**TAUGHT, "distill_until": 1.0, **RATE}
ANNEAL = {"overlay_start": 1.0, "overlay_until": 0.6}

METHODS: dict[str, Method] = {
    # the default recipe, and controls trained as it trains
    "recipe": Method("default recipe", teacher=True, options=DEFAULT, tried=True),
    "recipe-low-rank-sparse": Method(
        "low rank + sparse gate by gate, default recipe", low_rank_sparse(1), teacher=True, options=DEFAULT
    ),
    "recipe-dense": Method("dense, trained on as long, default recipe", start="dense", options=RATE),
    "recipe-low-rank": Method("low rank, default recipe", low_rank, teacher=True, options=DEFAULT),
    "recipe-stacked": Method(
        "low rank of stacked gates, default recipe", low_rank, teacher=True, options=DEFAULT, stacked=True
    ),
    "recipe-low-rank-gradual": Method(
        "low rank, terms falling, default recipe", low_rank, "gradual", teacher=True, options=DEFAULT
    ),
    "recipe-pruned": Method("magnitude pruning, default recipe", sparse(1), teacher=True, options=DEFAULT),
    "recipe-pruned-gradual": Method(
        "magnitude pruning, gradual, default recipe", sparse(1), teacher=True, options={**DEFAULT, **ANNEAL}
    ),
    "recipe-random": Method("random start, default recipe", low_rank_sparse(1), "random", True, DEFAULT),
    "recipe-kron": Method("Kronecker, default recipe", kronecker, teacher=True, options=DEFAULT),
    # the same without it, and the default recipe before the teacher fell silent: lr 2e-3, factors at three times that
    "dense": Method("dense, from scratch", start="scratch"),
    "dense-longer": Method("dense, trained on as long", start="dense"),
    "smaller": Method("smaller dense, from scratch", start="smaller"),
    "int8": Method("int8 dynamic, as it is", start="int8"),
    "low-rank": Method("low rank", low_rank, teacher=True, options=TAUGHT),
    "pruned": Method("magnitude pruning, at once", sparse(1), teacher=True, options=TAUGHT),
    "pruned-gradual": Method("magnitude pruning, gradual", sparse(1), teacher=True, options={**TAUGHT, **ANNEAL}),
    # structures, plain fine-tuning
    "kron": Method("Kronecker", kronecker),
    "kron-low-rank": Method("Kronecker + low rank", kronecker_low_rank),
    "low-rank-sparse": Method("low rank + sparse", low_rank_sparse(1)),
    "low-rank-blocks": Method("low rank + blocks of 8", low_rank_sparse(8)),
    "kron-sparse": Method("Kronecker + sparse", kronecker_sparse(1)),
    # the same, outputs taught: to be set beside the default recipe and its controls
    "kron-logits": Method("Kronecker, outputs taught", kronecker, teacher=True, options=TAUGHT),
    "kron-sparse-logits": Method(
        "Kronecker + sparse, outputs taught", kronecker_sparse(1), teacher=True, options=TAUGHT,
    ),
    # annealed overlays
    "low-rank-sparse-anneal": Method("low rank + sparse, annealed", low_rank_sparse(1), "convert", True, {**CE,
    **ANNEAL}), "kron-sparse-anneal": Method("Kronecker + sparse, annealed", kronecker_sparse(1), "convert", True,
    {**CE, **ANNEAL}), "low-rank-blocks-anneal": Method("low rank + blocks, annealed", low_rank_sparse(8), "convert",
    True, {**CE, **ANNEAL}),
    # distillation, on the plain structure and on the annealed one
    "low-rank-sparse-hidden": Method(
        "low rank + sparse, hidden states taught", low_rank_sparse(1), "convert", True,
        {"distill_logits": 0.0, "distill_hidden": 1.0},
    ),
    "low-rank-sparse-logits": Method(
        "low rank + sparse, outputs taught", low_rank_sparse(1), "convert", True, TAUGHT,
    ),
    "low-rank-sparse-heal": Method(
        "low rank + sparse, healed first", low_rank_sparse(1), "convert", True, {**CE, "heal_epochs": 1.0},
    ),
    "low-rank-sparse-anneal-taught": Method(
        "low rank + sparse, annealed, all taught", low_rank_sparse(1), "convert", True,
        {"distill_logits": 0.5, "distill_hidden": 1.0, **ANNEAL},
    ),
    "low-rank-sparse-anneal-logits": Method(
        "low rank + sparse, annealed, outputs taught", low_rank_sparse(1), "convert", True,
        {"distill_logits": 0.5, "distill_hidden": 0.0, **ANNEAL},
    ),
    "low-rank-sparse-pooled": Method(
        "low rank + sparse, annealed, blocks shared", low_rank_sparse(1), "convert", True,
        {**CE, **ANNEAL, "overlay_pooled": True},
    ),
    "low-rank-sparse-pooled-taught": Method(
        "low rank + sparse, annealed, blocks shared, all taught", low_rank_sparse(1), "convert", True,
        {"distill_logits": 0.5, "distill_hidden": 1.0, **ANNEAL, "overlay_pooled": True},
    ),
    "low-rank-sparse-alternated": Method(
        "low rank + sparse, learning-compression", low_rank_sparse(1), "alternate"
    ),
    "random": Method("low rank + sparse, random start", low_rank_sparse(1), "random", True, TAUGHT),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One network, trained once.

    Attributes:
        times: how many times smaller the recurrent matrices are (1 for methods that stay dense).
        epochs: 0 for the task's own number.
        changes: further options of the recipe, "name=value,name=value".
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
    def options(self) -> dict[str, Any]:
        """Options of the recipe: the task's, the method's, the cell's own."""
        setup, method = TASKS[self.task], METHODS[self.method]
        base = setup.teacher if method.start in ("scratch", "smaller") else setup.student
        epochs = {"epochs": self.epochs} if self.epochs else {}
        own = dict(item.split("=") for item in self.changes.split(",")) if self.changes else {}
        return {
            "distill_until": None,
            **base,
            **method.options,
            **epochs,
            **{k: number(v) for k, v in own.items()},
            "seed": self.seed,
        }

    @staticmethod
    def parse(text: str) -> Cell:
        """task:method[:times[:seed[:epochs[:changes]]]], as in g2p:low-rank:16:0:5:lr=4e-3; times may be 4w (whole
        model)."""
        task, method, *rest = text.split(":")
        if task not in TASKS or method not in METHODS:
            raise SystemExit(f"{text}: tasks are {', '.join(TASKS)}; methods are {', '.join(METHODS)}")
        rest += ["1", "0", "0", ""][len(rest) :]
        whole = rest[0].endswith("w")
        return Cell(task, method, float(rest[0].rstrip("w")), int(rest[1]), float(rest[2]), rest[3], whole)


def number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


RECIPE, BY_GATE = "recipe", "recipe-low-rank-sparse"
CONTROLS = (
    "recipe-dense",
    BY_GATE,
    "recipe-low-rank",
    "recipe-pruned",
    "recipe-pruned-gradual",
    "recipe-random",
    "smaller",
)
# What each ingredient of the default recipe is worth on g2p, where the trial takes BY_GATE: one thing changed.
_RATE = "lr=6e-3,factor_lr=1"  # the recipe's rate, for methods whose own is another
ABLATIONS = {
    "default recipe": Cell("g2p", RECIPE, 16),
    "no teacher": Cell("g2p", "low-rank-sparse", 16, changes=_RATE),
    "a teacher that does not fall silent": Cell("g2p", "low-rank-sparse-logits", 16, changes=_RATE),
    "rate 2e-3, factors at 6e-3": Cell("g2p", BY_GATE, 16, changes="lr=2e-3,factor_lr=3"),
    "constant rate": Cell("g2p", BY_GATE, 16, changes="schedule=constant"),
    "gradients not clipped": Cell("g2p", BY_GATE, 16, changes="clip=0"),
    "no single entries": Cell("g2p", "recipe-low-rank", 16),
    "no low rank": Cell("g2p", "recipe-pruned", 16),
    "random start": Cell("g2p", "recipe-random", 16),
}


def grid() -> list[Cell]:
    """Every cell of the comparison, the most informative first."""
    cells = []
    for task in TASKS:
        seeds = 3 if task in ("g2p", "jsb") else 1
        for seed in range(seeds):
            cells += [Cell(task, "dense", 1, seed), Cell(task, RECIPE, 16, seed)]
            cells += [Cell(task, m, 1 if m == "recipe-dense" else 16, seed) for m in CONTROLS]
        cells.append(Cell(task, "int8", 1))
        few = ("recipe-low-rank", "recipe-pruned")
        cells += [Cell(task, m, times) for times in (4, 64) for m in (RECIPE, *few)]
        cells += [Cell(task, m, 4, whole=True) for m in (BY_GATE, *few)]  # trials are of recurrent matrices alone
    cells += [Cell(task, "recipe-kron", 64) for task in ("g2p", "kjv")]
    order = sorted(cells, key=lambda c: (c.seed, c.times not in (1, 16), list(TASKS).index(c.task)))
    return list(dict.fromkeys(order + list(ABLATIONS.values())))
