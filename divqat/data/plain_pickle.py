"""Read pickles of numbers, texts and numpy arrays without the unpickler.

An unpickler calls functions that a file names with arguments that the file chooses, and numpy alone
has enough functions that access memory. Here nothing is looked up and nothing is called: the few
operations of such pickles are implemented by hand, and any other operation is an error.
"""

from __future__ import annotations

import pickle
import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np

VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
STRINGS = {"BINSTRING", "SHORT_BINSTRING"}  # of Python 2: bytes
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
IGNORED = {"PROTO", "FRAME", "STOP"}
MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # of numpy 1 and 2
DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")


@dataclass(frozen=True)
class _Name:
    """The name of an object that a pickle refers to."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


NDARRAY, DTYPE = _Name("numpy", "ndarray"), _Name("numpy", "dtype")
# Python 3 writes bytes like this in the protocols of Python 2: non-empty and empty ones.
ENCODE, BYTES = _Name("_codecs", "encode"), _Name("__builtin__", "bytes")
RECONSTRUCT = [_Name(module, "_reconstruct") for module in MODULES]


@dataclass(frozen=True)
class _EmptyArray:
    """The result of ``_reconstruct``, before its state is set."""


@dataclass(frozen=True)
class _DType:
    """A dtype, one of ``DTYPES``."""

    text: str


def load_plain_pickle(data: bytes) -> Any:
    """Read a pickle of plain types and numpy arrays of integers; strings of Python 2 become bytes.

    Raises:
        pickle.UnpicklingError: it contains anything else.
        Others: it is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []  # lengths of the stack at the marks
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    argument: Any
    for operation, argument, _ in pickletools.genops(data):
        code = operation.name
        if code in VALUES:
            stack.append(argument)
        elif code in STRINGS:
            stack.append(argument.encode("latin1"))
        elif code in CONSTANTS:
            stack.append(CONSTANTS[code])
        elif code in EMPTY:
            stack.append(EMPTY[code]())
        elif code in TUPLES:
            stack[-TUPLES[code] :] = [tuple(stack[-TUPLES[code] :])]
        elif code == "MARK":
            marks.append(len(stack))
        elif code == "TUPLE":
            stack.append(tuple(pop_to_mark()))
        elif code in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif code == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code in ("APPEND", "APPENDS"):
            items = pop_to_mark() if code == "APPENDS" else [stack.pop()]
            _require(stack[-1], list).extend(items)
        elif code in ("SETITEM", "SETITEMS"):
            items = pop_to_mark() if code == "SETITEMS" else [stack.pop(-2), stack.pop()]
            for key, value in zip(items[::2], items[1::2], strict=True):
                _require(stack[-1], dict)[_require(key, bytes, str)] = value
        elif code in ("GLOBAL", "STACK_GLOBAL"):
            parts = argument.split(" ") if code == "GLOBAL" else [stack.pop(-2), stack.pop()]
            stack.append(_check_name(_Name(*parts)))
        elif code == "REDUCE":
            arguments = stack.pop()
            stack[-1] = _reduce(stack[-1], _require(arguments, tuple))
        elif code == "BUILD":
            state = stack.pop()
            stack[-1] = _build(stack[-1], _require(state, tuple))
        elif code not in IGNORED:
            raise pickle.UnpicklingError(f"it contains the operation {code}")
    (value,) = stack
    return value


def _require(value: Any, *types: type) -> Any:
    if type(value) not in types:
        raise pickle.UnpicklingError(f"it contains a {type(value).__name__} where it must not")
    return value


def _check_name(name: _Name) -> _Name:
    if name not in (NDARRAY, DTYPE, ENCODE, BYTES, *RECONSTRUCT):
        raise pickle.UnpicklingError(f"it refers to {name}, which is not allowed")
    return name


def _reduce(name: Any, arguments: tuple[Any, ...]) -> Any:
    """The result of calling ``name`` with the arguments that pickles of arrays use."""
    if name in RECONSTRUCT and arguments in ((NDARRAY, (0,), b"b"), (NDARRAY, (0,), "b")):
        return _EmptyArray()
    if name == DTYPE and arguments:
        text = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
        if text in DTYPES:
            return _DType(text)
    if name == ENCODE and arguments[1:] == ("latin1",):
        return _require(arguments[0], str).encode("latin1")
    if name == BYTES and not arguments:
        return b""
    raise pickle.UnpicklingError(f"it calls {name} with other arguments than arrays need")


def _build(target: Any, state: tuple[Any, ...]) -> Any:
    """``target`` with its state set."""
    if isinstance(target, _DType) and state[1] in (b"<", b"|", "<", "|"):
        return target
    if isinstance(target, _EmptyArray):
        _, shape, kind, by_columns, raw = state
        array = np.frombuffer(_require(raw, bytes), _require(kind, _DType).text)
        return array.reshape(shape, order="F" if by_columns else "C")
    raise pickle.UnpicklingError(f"it builds a {type(target).__name__}")
