"""The layers of a checkpoint, dense or converted, as modules that can be measured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kruify.checkpoint import Checkpoint
from kruify.conversion import build_dense, build_layer, load_tensors
from kruify.conversion.check import bounded_plan, dense_layers
from kruify.conversion.locate import RecurrentLayer
from kruify.conversion.plan import LayerPlan, Plan, Structures
from kruify.errors import UsageError
from kruify.layers.storage import mark, within


@dataclass(frozen=True)
class Layers:
    """The recurrent layers of a checkpoint, factored or not, and beside them, where `layers_of` is asked for these,
    the factored linear layers and embeddings.

    Attributes:
        items: layer -> structures of its factored matrices by weight name, empty for a dense layer.
        planned: names of the layers that are kruify's, factored or not; the others are torch.nn's.
    """

    checkpoint: Checkpoint
    items: list[tuple[RecurrentLayer, dict[str, Structures]]]
    planned: frozenset[str] = frozenset()

    def modules(self) -> list[nn.Module]:
        """The layers as modules with the numbers of the checkpoint in them, in evaluation mode."""
        return [self._module(layer, matrices).eval() for layer, matrices in self.items]

    def _module(self, layer: RecurrentLayer, matrices: dict[str, Structures]) -> nn.Module:
        if layer.name in self.planned:
            module: nn.Module = build_layer(LayerPlan(layer, matrices))
        else:
            module = build_dense(layer)
        prefix = f"{layer.name}." if layer.name else ""
        wanted = module.state_dict()
        tensors = self.checkpoint.tensors
        load_tensors(module, {n: tensors[prefix + n] for n in wanted if prefix + n in tensors}, self.checkpoint.path)
        mark(module, within(self.checkpoint.storage, layer.name, module))
        return module


def layers_of(checkpoint: Checkpoint, *, beside: bool = False) -> Layers:
    """The recurrent layers of a dense or a converted checkpoint.

    Args:
        beside: whether to take the factored linear layers and embeddings, too.

    Raises:
        UsageError: it has none.
    """
    plan = bounded_plan(checkpoint) if checkpoint.is_kruify else Plan()
    made = [(item.layer, item.matrices) for item in (plan.items if beside else plan.layers)]
    items = [*made, *((layer, {}) for layer in dense_layers(checkpoint, plan).layers)]
    if not items:
        raise UsageError("there is no RNN, LSTM or GRU layer in it", checkpoint.path, "See 'kruify inspect'")
    order = {name: i for i, name in enumerate(checkpoint.tensors)}
    items.sort(key=lambda item: _first(item[0], order))
    return Layers(checkpoint, items, frozenset(layer.name for layer, _ in made))


def _first(layer: RecurrentLayer, order: dict[str, int]) -> int:
    prefix = f"{layer.name}." if layer.name else ""
    return min((i for name, i in order.items() if name.startswith(prefix)), default=0)
