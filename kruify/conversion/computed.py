"""Weights that are computed from other parameters (pruning, weight norm, spectral norm): files and conversions hold
the weights themselves, whatever computes them stays on the layer where the weight does."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kruify.checkpoint import LazyTensor
from kruify.checkpoint.parametrised import compute_weights, sources_for
from kruify.layers import KroneckerMatrix
from kruify.layers.cells import KRUCellBase
from kruify.layers.computed import hooks
from kruify.layers.recurrent import RecurrentLayer

AnyTensor = Tensor | LazyTensor
_RECURRENT = (nn.RNNBase, nn.RNNCellBase, RecurrentLayer, KRUCellBase)
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")  # where a tensor keeps its own
_ENDS = ("orig", "mask", "g", "v", "u")  # of the names of what a weight is computed from


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; torch refuses one where a weight was computed with gradients, and leaves hooks and attributes of
    parameters out."""
    held: list[object] = [value for module in model.modules() for value in vars(module).values()]
    held += [t for module in model.modules() if isinstance(module, nn.RNNBase) for t in module._flat_weights]
    memo: dict[int, object] = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    made = copy.deepcopy(model, memo)
    for parameter in model.parameters():
        if (twin := memo.get(id(parameter))) is not None:  # else a module copies itself in a way of its own
            vars(twin).update(copy.deepcopy(vars(parameter), memo))
            for hooks in TENSOR_HOOKS:
                setattr(twin, hooks, copy.deepcopy(getattr(parameter, hooks), memo))
    return made


def state_of(model: nn.Module) -> Mapping[str, AnyTensor]:
    """The state dict with the weights of recurrent layers as they are in evaluation, whatever computes them."""
    state: dict[str, AnyTensor] = dict(model.state_dict())
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _RECURRENT):
            dot = f"{name}." if name else ""
            own = {n: LazyTensor.of(t) for n, t in state.items() if n.startswith(dot) and isinstance(t, Tensor)}
            weights, computed, _ = compute_weights(own)
            of_source = {source: weight for weight, how in computed.items() for source in how.sources}
            state = {of_source.get(n, n): weights[of_source[n]] if n in of_source else t for n, t in state.items()}
    return state


def as_sources(tensors: Mapping[str, AnyTensor], own: Mapping[str, Tensor]) -> dict[str, AnyTensor]:
    """`tensors` with parameters in place of the weights that a model with the state dict `own` computes from them.

    Parameters from which it computes the weight already stay as they are.
    """
    found = dict(tensors)
    weights, computed, _ = compute_weights({name: LazyTensor.of(tensor) for name, tensor in own.items()})
    for name, how in computed.items():
        if name not in found or all(source in found for source in how.sources):
            continue
        given = found.pop(name)
        wanted = given.load() if isinstance(given, LazyTensor) else given
        same = weights[name].shape == tuple(wanted.shape) and torch.equal(weights[name].load(), wanted)
        found |= {source: own[source] for source in how.sources} if same else sources_for(wanted, how)
    return found


def keep_computed(old: nn.Module, new: nn.Module) -> set[str]:
    """Puts on `new` what computes weights of `old`, but for those that became a `KroneckerMatrix`.

    Returns: names of `old` that `new` has no use for, those of its weights included.
    """
    done: set[str] = set()
    for _, name, hook in list(hooks(old)):
        done.add(name)
        if isinstance(getattr(new, name, None), KroneckerMatrix):
            done |= {f"{name}_{end}" for end in _ENDS}
            _remove(new, hook)
        elif name in new._parameters:
            del new._parameters[name]
            setattr(new, name, getattr(old, name))
    if parametrize.is_parametrized(old):
        done.add("parametrizations")
        for name, parametrization in old.get_submodule("parametrizations").named_children():
            if not isinstance(getattr(new, name, None), KroneckerMatrix):
                parametrize.register_parametrization(new, name, nn.Identity(), unsafe=True)
                new.get_submodule("parametrizations").add_module(name, parametrization)
    return done


def _remove(module: nn.Module, hook: object) -> None:
    """Takes a hook off, and those that serve it when a state dict is written or loaded."""
    for table in (module._forward_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for number, entry in list(table.items()):
            bare = getattr(entry, "hook", entry)
            if bare is hook or getattr(bare, "fn", None) is hook:
                del table[number]
