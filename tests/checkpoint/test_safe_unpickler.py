"""The safe unpickler against pickle itself on plain data, and what it makes of the rest."""

from __future__ import annotations

import collections
import datetime
import enum
import pickle
import re
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kruify.checkpoint.safe_unpickler import Array, Global, Record, check_tree, refuse_forbidden, unpickle
from kruify.errors import CorruptError, UnsafeError

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 80), 1 << 80)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.integers(-(1 << 40), 1 << 40)
DATA = st.recursive(
    SCALARS | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.tuples(inner)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.sets(KEYS, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(DATA, st.integers(0, 5))
def test_plain_data_is_read_as_pickle_reads_it(data: object, protocol: int) -> None:
    content = pickle.dumps(data, protocol)
    found, used = unpickle(content + b"more", where="a")
    assert found == pickle.loads(content)
    assert used == len(content)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        unpickle(content, where="a", persistent=lambda _: None)
    except (CorruptError, UnsafeError) as error:
        assert "\n" not in str(error)


class Colour(enum.Enum):
    RED = 1


class Thing:
    def __init__(self) -> None:
        self.colour, self.numbers = Colour.RED, [1, 2]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_become_records(protocol: int) -> None:
    named: set[str] = set()
    found, _ = unpickle(pickle.dumps(Thing(), protocol), where="a", globals_found=named)
    assert isinstance(found, Record) and found.cls.name == "Thing"
    assert found.state["numbers"] == [1, 2]
    assert isinstance(found.state["colour"], Record) and found.state["colour"].args == (1,)
    assert {name.rpartition(".")[2] for name in named} >= {"Thing", "Colour"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.defaultdict(list, a=[1]), {"a": [1]}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        ({3}, {3}),
        (frozenset([3]), frozenset([3])),
        (bytearray(b"abc"), bytearray(b"abc")),
        (range(3), range(3)),
        (1 + 2j, 1 + 2j),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_containers_are_rebuilt(value: object, expected: object, protocol: int) -> None:
    found = unpickle(pickle.dumps(value, protocol), where="a")[0]
    assert found == expected and isinstance(found, type(expected))


@pytest.mark.parametrize("key", [(1 << 61) - 1, 1 << 100, (1, 2), 1j, frozenset([1])])
def test_keys_whose_hash_can_be_chosen_are_compared_by_identity(key: object) -> None:
    found, _ = unpickle(pickle.dumps({key: 1}, 4), where="a")
    assert [(type(k), k.args, v) for k, v in found.items()] == [(Record, (key,), 1)]


def test_a_deep_key_is_not_hashed() -> None:
    found, _ = unpickle(b"}N" + b"\x85" * 300_000 + b"Ns.", where="a")
    assert [type(key) for key in found] == [Record]


@pytest.mark.parametrize(
    "value", [re.compile("a+"), types.SimpleNamespace(a=1), np.random.default_rng(0), np.random.RandomState(0)]
)
def test_harmless_objects_are_records(value: object) -> None:
    assert isinstance(unpickle(pickle.dumps({"a": value}, 2), where="a")[0]["a"], Record)


class Outer:
    class Inner:
        pass


def test_a_class_in_a_class_is_named() -> None:
    found = unpickle(pickle.dumps(Outer.Inner(), 2), where="a")[0]
    assert isinstance(found, Record) and found.cls.name == "Outer.Inner"
    for attribute in ("__globals__", "inner", "os"):
        data = b"c__builtin__\ngetattr\nc" + f"{__name__}\nOuter\nV{attribute}\n".encode() + b"\x86R."
        with pytest.raises(UnsafeError):
            unpickle(data, where="a")


def test_modules_of_torch_1_1_name_their_backend() -> None:
    found, _ = unpickle(b"ctorch.nn.backends.thnn\n_get_thnn_function_backend\n)R.", where="a")
    assert isinstance(found, Record)


def test_functions_of_torch_are_names() -> None:
    found, _ = unpickle(pickle.dumps([torch.tanh, torch.nn.functional.relu], 2), where="a")
    assert [function.name for function in found] == ["tanh", "relu"]


def test_names_are_utf8() -> None:
    assert unpickle("cnetz\nGröße\n.".encode(), where="a")[0] == Global("netz", "Größe")


def test_arrays_and_dates_are_data() -> None:
    found, _ = unpickle(
        pickle.dumps([np.arange(3, dtype="f4"), np.float64(2), datetime.date(2020, 1, 2)], 2), where="a"
    )
    assert isinstance(found[0], Array) and (found[0].dtype, found[0].shape) == ("<f4", (3,))
    assert isinstance(found[1], Array) and isinstance(found[2], Record)


@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.eval", "torch.serialization.os.system", "numpy.sys.exit", "torch.hub.load", "io.open"],
)
def test_forbidden_names(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    with pytest.raises(UnsafeError):
        refuse_forbidden(Global(module, attribute), "a")
    head, _, rest = name.partition(".")
    with pytest.raises(UnsafeError):
        refuse_forbidden(Global(head, rest), "a")


@pytest.mark.parametrize(
    "name", ["torch.nn.modules.rnn.LSTM", "project.signal.Net", "my.code.profile.Trace", "builtins.set"]
)
def test_names_of_ordinary_classes_pass(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    refuse_forbidden(Global(module, attribute), "a")


def test_shared_objects_are_fine_and_cycles_are_not() -> None:
    shared = [1, 2]
    check_tree({"a": shared, "b": [shared, shared]}, "a")
    cycle: list = []
    cycle.append(cycle)
    with pytest.raises(UnsafeError, match="itself"):
        check_tree(cycle, "a")
