"""Pickles of numbers, texts and numpy arrays, read without the unpickler.

An unpickler calls what a file names with arguments that the file chooses, and numpy alone has
enough that reaches into memory. Here nothing is looked up and nothing is called: the few operations
that such pickles consist of are done by hand, and any other is an error.
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
KINDS = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")


@dataclass(frozen=True)
class _Name:
    """What a pickle refers to; only its name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


NDARRAY, DTYPE = _Name("numpy", "ndarray"), _Name("numpy", "dtype")
# How Python 3 writes bytes in the protocols that Python 2 can read: what they are, and none.
ENCODE, BYTES = _Name("_codecs", "encode"), _Name("__builtin__", "bytes")
RECONSTRUCT = [_Name(module, "_reconstruct") for module in MODULES]


@dataclass(frozen=True)
class _NoArrayYet:
    """What ``_reconstruct`` returns."""


@dataclass(frozen=True)
class _Kind:
    """A dtype: one of ``KINDS``."""

    text: str


def load_plain_pickle(data: bytes) -> Any:
    """Read a pickle of plain types and of numpy arrays of integers; Python 2's strings are bytes.

    Raises:
        pickle.UnpicklingError: it holds anything else. Others: it is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []  # how long the stack was
    memo: dict[int, Any] = {}

    def marked() -> list[Any]:
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
            stack.append(tuple(marked()))
        elif code in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif code == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code in ("APPEND", "APPENDS"):
            items = marked() if code == "APPENDS" else [stack.pop()]
            _only(stack[-1], list).extend(items)
        elif code in ("SETITEM", "SETITEMS"):
            items = marked() if code == "SETITEMS" else [stack.pop(-2), stack.pop()]
            for key, value in zip(items[::2], items[1::2], strict=True):
                _only(stack[-1], dict)[_only(key, bytes, str)] = value
        elif code in ("GLOBAL", "STACK_GLOBAL"):
            parts = argument.split(" ") if code == "GLOBAL" else [stack.pop(-2), stack.pop()]
            stack.append(_known(_Name(*parts)))
        elif code == "REDUCE":
            arguments = stack.pop()
            stack[-1] = _reduced(stack[-1], _only(arguments, tuple))
        elif code == "BUILD":
            state = stack.pop()
            stack[-1] = _built(stack[-1], _only(state, tuple))
        elif code not in IGNORED:
            raise pickle.UnpicklingError(f"it holds the operation {code}")
    (value,) = stack
    return value


def _only(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__} where it must not")
    return value


def _known(name: _Name) -> _Name:
    if name not in (NDARRAY, DTYPE, ENCODE, BYTES, *RECONSTRUCT):
        raise pickle.UnpicklingError(f"it refers to {name}, which is not allowed")
    return name


def _reduced(name: Any, arguments: tuple[Any, ...]) -> Any:
    """What calling ``name`` would give, in the one way that files do."""
    if name in RECONSTRUCT and arguments in ((NDARRAY, (0,), b"b"), (NDARRAY, (0,), "b")):
        return _NoArrayYet()
    if name == DTYPE and arguments:
        text = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
        if text in KINDS:
            return _Kind(text)
    if name == ENCODE and arguments[1:] == ("latin1",):
        return _only(arguments[0], str).encode("latin1")
    if name == BYTES and not arguments:
        return b""
    raise pickle.UnpicklingError(f"it calls {name} with other arguments than arrays need")


def _built(target: Any, state: tuple[Any, ...]) -> Any:
    """``target`` with its state."""
    if isinstance(target, _Kind) and state[1] in (b"<", b"|", "<", "|"):
        return target
    if isinstance(target, _NoArrayYet):
        _, shape, kind, by_columns, raw = state
        array = np.frombuffer(_only(raw, bytes), _only(kind, _Kind).text)
        return array.reshape(shape, order="F" if by_columns else "C")
    raise pickle.UnpicklingError(f"it builds a {type(target).__name__}")
