# mypy: disable-error-code="no-untyped-call,untyped-decorator,misc,override,import-untyped,attr-defined,no-any-return"
"""Words of memory for compiled code: an array that is nothing but its address.

Numba takes an array apart into seven words at every call, and asks of every index whether it counts from the end; half
of the time of functions that are called often goes there. `Words` and `Reals` are addresses, and `Table` is one with
rows and columns. Indices are not checked. Python hands in arrays, int64 or float64, C-contiguous, and keeps them.
"""

from __future__ import annotations

import mmap
import operator
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.core.boxing import unbox_array
from numba.core.typeconv import Conversion
from numba.core.typing.templates import AttributeTemplate
from numba.extending import (
    NativeValue,
    infer_getattr,
    intrinsic,
    lower_builtin,
    lower_getattr_generic,
    models,
    register_model,
    type_callable,
    unbox,
)

#: Whether `NUMBA_DISABLE_JIT` says that nothing is compiled: what would be is Python, and arrays stay arrays.
UNCOMPILED = bool(config.DISABLE_JIT)

_BYTE, _WORD, _REAL = ir.IntType(8), ir.IntType(64), ir.DoubleType()
_SHIFT = 3  # of an index, to bytes
#: Bytes of a large page.
_LARGE_PAGE = 2 << 20


def zeros(words: int) -> npt.NDArray[np.int64]:
    """Returns so many words, all 0, of pages that nobody has used: those that are not written to cost nothing.

    What an allocator takes back from a run before, it has to clear; pages that processes may share cost twice as much.
    Where there are many, large pages are asked for: what is looked up here and there is found sooner.
    """
    pages = mmap.mmap(-1, 8 * words, access=mmap.ACCESS_COPY)
    if 8 * words >= _LARGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype=np.int64)


class WordMemory:
    """Words that are laid out before a run, and grow at their end during it."""

    def __init__(self, words: int) -> None:
        self.words: npt.NDArray[np.int64] = zeros(words)
        self._used = 0

    @property
    def floats(self) -> npt.NDArray[np.float64]:
        """The same words as floats."""
        return self.words.view(np.float64)

    def allocate(self, words: int) -> int:
        """Returns the address of so many words more, all 0."""
        at, self._used = self._used, self._used + words
        if self._used > len(self.words):
            before, self.words = self.words, zeros(max(2 * len(self.words), self._used))
            self.words[:at] = before[:at]
        return at

    def put(self, values: Iterable[int]) -> int:
        """Returns the address of some values, one after the other."""
        array = np.array(values if isinstance(values, list | np.ndarray) else list(values), dtype=np.int64)
        at = self.allocate(len(array))
        self.words[at : at + len(array)] = array
        return at

    def put_list(self, values: Iterable[int]) -> int:
        """Returns the address of a list: how many values there are, then the values."""
        values = list(values)
        return self.put([len(values), *values])

    def set(self, at: int, values: Mapping[int, int]) -> None:
        """Set words by their distance from an address."""
        for word, value in values.items():
            self.words[at + word] = value


class Address(types.Type):
    """The type of numbers that lie one after the other in memory, of `dtype`."""

    def __init__(self, name: str, dtype: Any) -> None:
        super().__init__(name=name)
        self.dtype = dtype

    def can_convert_from(self, typingctx: Any, other: Any) -> Any:
        """Whether Python may hand such an array in."""
        fits = isinstance(other, types.Array) and other.dtype == self.dtype and other.layout == "C" and other.ndim == 1
        return Conversion.safe if fits else None


class Rows(types.Type):
    """The type of a table of words: its address, its rows and its columns."""

    def __init__(self) -> None:
        super().__init__(name="Table")

    def can_convert_from(self, typingctx: Any, other: Any) -> Any:
        """Whether Python may hand such an array in."""
        fits = isinstance(other, types.Array) and other.dtype == types.int64 and other.layout == "C" and other.ndim == 2
        return Conversion.safe if fits else None


WORDS, REALS, TABLE = Address("Words", types.int64), Address("Reals", types.float64), Rows()


class Fields(types.Type):
    """The type of named words and tables, by the address of an array of their addresses, rows and columns."""

    def __init__(self, name: str, fields: Sequence[tuple[str, types.Type]]) -> None:
        super().__init__(name=name)
        self.fields = tuple(fields)

    def can_convert_from(self, typingctx: Any, other: Any) -> Any:
        """Whether Python may hand such an array in."""
        return WORDS.can_convert_from(typingctx, other)


#: Words that each field takes.
FIELD_WORDS = 3


@register_model(Address)
class _AddressModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Address) -> None:
        super().__init__(manager, kind, (_WORD if kind.dtype == types.int64 else _REAL).as_pointer())


@register_model(Fields)
class _FieldsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Fields) -> None:
        super().__init__(manager, kind, _WORD.as_pointer())


@register_model(Rows)
class _RowsModel(models.StructModel):
    def __init__(self, manager: Any, kind: Rows) -> None:
        members = [("at", WORDS), ("rows", types.int64), ("columns", types.int64)]
        super().__init__(manager, kind, members)


# From Python.


def _adapted(kind: Any, obj: Any, c: Any) -> tuple[Any, Any]:
    """Returns an array taken apart, and whether that failed; Python holds it."""
    native = unbox_array(kind, obj, c)
    if c.context.enable_nrt:
        c.context.nrt.decref(c.builder, kind, native.value)
    return c.context.make_array(kind)(c.context, c.builder, native.value), native.is_error


@unbox(Address)
def _unbox_address(kind: Address, obj: Any, c: Any) -> NativeValue:
    array, failed = _adapted(types.Array(kind.dtype, 1, "C"), obj, c)
    return NativeValue(array.data, is_error=failed)


@unbox(Fields)
def _unbox_fields(kind: Fields, obj: Any, c: Any) -> NativeValue:
    return _unbox_address(WORDS, obj, c)


@unbox(Rows)
def _unbox_rows(kind: Rows, obj: Any, c: Any) -> NativeValue:
    array, failed = _adapted(types.Array(types.int64, 2, "C"), obj, c)
    rows, columns = cgutils.unpack_tuple(c.builder, array.shape, 2)
    return NativeValue(_table(c.context, c.builder, array.data, rows, columns), is_error=failed)


# What compiled code does with them.


def _table(context: Any, builder: Any, at: Any, rows: Any, columns: Any) -> Any:
    table = cgutils.create_struct_proxy(TABLE)(context, builder)
    table.at, table.rows, table.columns = at, rows, columns
    return table._getvalue()


@type_callable(operator.getitem)
def _type_getitem(context: Any) -> Any:
    def typer(what: Any, index: Any) -> Any:
        if isinstance(what, Address):
            if isinstance(index, types.Integer):
                return what.dtype
            return what if isinstance(index, types.SliceType) else None
        if isinstance(what, Rows):
            if isinstance(index, types.Integer):
                return WORDS
            if isinstance(index, types.SliceType):
                return TABLE
            return types.int64 if isinstance(index, types.BaseTuple) and len(index) == 2 else None
        return None

    return typer


@type_callable(operator.setitem)
def _type_setitem(context: Any) -> Any:
    def typer(what: Any, index: Any, value: Any) -> Any:
        single = isinstance(what, Address) and isinstance(index, types.Integer)
        in_table = isinstance(what, Rows) and isinstance(index, types.BaseTuple) and len(index) == 2
        return types.none if single or in_table else None

    return typer


@type_callable(len)
def _type_len(context: Any) -> Any:
    def typer(what: Any) -> Any:
        return types.int64 if isinstance(what, Rows) else None

    return typer


def _place(context: Any, builder: Any, what: Any, index: Any, kind: Any, index_kind: Any) -> Any:
    """Returns the address of an element."""
    if isinstance(kind, Address):
        return builder.gep(what, [context.cast(builder, index, index_kind, types.int64)])
    table = cgutils.create_struct_proxy(TABLE)(context, builder, what)
    row, column = (
        context.cast(builder, value, own, types.int64)
        for value, own in zip(cgutils.unpack_tuple(builder, index, 2), index_kind, strict=True)
    )
    return builder.gep(table.at, [builder.add(builder.mul(row, table.columns), column)])


@lower_builtin(operator.getitem, Address, types.Integer)
@lower_builtin(operator.getitem, Rows, types.BaseTuple)
def _getitem(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.load(_place(context, builder, args[0], args[1], *sig.args))


@lower_builtin(operator.setitem, Address, types.Integer, types.Any)
@lower_builtin(operator.setitem, Rows, types.BaseTuple, types.Any)
def _setitem(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    what, index, value = args
    dtype = sig.args[0].dtype if isinstance(sig.args[0], Address) else types.int64
    at = _place(context, builder, what, index, *sig.args[:2])
    builder.store(context.cast(builder, value, sig.args[2], dtype), at)
    return context.get_dummy_value()


@lower_builtin(operator.getitem, Rows, types.Integer)
def _row(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    table = cgutils.create_struct_proxy(TABLE)(context, builder, args[0])
    index = context.cast(builder, args[1], sig.args[1], types.int64)
    return builder.gep(table.at, [builder.mul(index, table.columns)])


@lower_builtin(operator.getitem, Address, types.SliceType)
def _from(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    part = context.make_helper(builder, sig.args[1], args[1])
    return builder.gep(args[0], [part.start])


@lower_builtin(operator.getitem, Rows, types.SliceType)
def _some_rows(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    table = cgutils.create_struct_proxy(TABLE)(context, builder, args[0])
    part = context.make_helper(builder, sig.args[1], args[1])
    at = builder.gep(table.at, [builder.mul(part.start, table.columns)])
    return _table(context, builder, at, builder.sub(part.stop, part.start), table.columns)


@intrinsic
def _fetch_soon(typing_context: Any, what: Any, index: Any) -> Any:
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = builder.bitcast(_place(context, builder, *args, *sig.args), _BYTE.as_pointer())
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, flag, flag, flag])
        for_writing, to_stay, data = flag(1), flag(3), flag(1)
        builder.call(
            builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind), [place, for_writing, to_stay, data]
        )
        return context.get_dummy_value()

    return types.none(what, index), lower


def _fetch_nothing(words: Any, index: Any) -> None:
    """Do nothing: Python fetches what it reads when it reads it."""


#: Let the processor fetch a word of memory into its cache: it is not waited for, and what is done meanwhile is free.
fetch_soon: Any = _fetch_nothing if UNCOMPILED else _fetch_soon


@lower_builtin(len, Rows)
def _len(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return cgutils.create_struct_proxy(TABLE)(context, builder, args[0]).rows


@infer_getattr
class _FieldsTemplate(AttributeTemplate):
    key = Fields

    def generic_resolve(self, kind: Fields, name: str) -> Any:
        return dict(kind.fields).get(name)


@lower_getattr_generic(Fields)
def _field(context: Any, builder: Any, kind: Fields, value: Any, name: str) -> Any:
    number = [known for known, _ in kind.fields].index(name)
    own = kind.fields[number][1]

    def word(place: int) -> Any:
        loaded = builder.load(builder.gep(value, [_WORD(FIELD_WORDS * number + place)]))
        # Nothing that is written, wherever that lies, changes it: it need not be looked up again.
        loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
        return loaded

    at = builder.inttoptr(word(0), context.get_value_type(own if isinstance(own, Address) else WORDS))
    return at if isinstance(own, Address) else _table(context, builder, at, word(1), word(2))
