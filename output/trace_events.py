"""A file of trace events, read as far as it can be: what took time, and how much was repaired or left out, and why.

Profilers and converters write many dialects of the "Trace Event Format" (the Chromium project's document of it):
complete events (X), beginnings and ends (B and E, b and e, S and F), numbers that JSON has not, times as text, files
that break off. All is read in one pass over the text, event by event, and only what is needed of each is kept.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

from ..bounded import read
from ..errors import InputError
from ..units import bytes_words
from .request_tracks import REQUEST

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
HOST_WORK = ("cpu_op", *CALLS)
#: What earlier versions of PyTorch's profiler call them, in lower case.
_OLD_NAMES = {
    "memcpy": "gpu_memcpy",
    "memset": "gpu_memset",
    "runtime": "cuda_runtime",
    "driver": "cuda_driver",
    "operator": "cpu_op",
}
#: Calls of other accelerators, such as xpu_runtime and privateuse1_driver.
_OTHER_CALLS = re.compile(r"\w+_(runtime|driver)")
#: What profilers write beside work, to mark it.
_MARKS = ("user_annotation", "gpu_user_annotation", "python_function", "overhead", "trace", "cpu_instant_event")
#: What of an event's args is kept; the first is text or a number, all others are whole numbers.
_ARGS = ("kind", "device", "stream", "correlation", "bytes", "expert_id", "visit", "copy")
_NUMBERS = frozenset(_ARGS[3:])
#: The phases of events that begin and end: the end of each beginning.
_ENDS = {"B": "E", "b": "e", "S": "F"}
#: Times in microseconds that may be: up to the year 2112; and how long an event may take, 11 days.
_EARLIEST_US, _LATEST_US, _LONGEST_US = -(2**49), 2**52, 10**12
#: An event at 0 that is so far from all others, in ns, and farther than they last, has no time.
_FAR_NS = 3600 * 10**9
#: A .gz file that unpacks to more than this, or to so many times its size, is no trace.
_MOST_BYTES, _MOST_TIMES = 64 * 2**20, 64
_PACKED_CHUNK = 4096
#: So many events, and so many lists and objects, may a file hold, or as many as it has bytes if that is more.
_MOST_PARTS = 2_000_000
#: Text, which is left alone, or a number that is none of JSON's, as C and C++ programs print them.
_ODD_NUMBER = re.compile(r'"(?:[^"\\]|\\.)*"|[-+]?(?:\binf(?:inity)?\b|\bnan\b(?:\(\w*\))?|\b1\.#\w+)', re.I | re.S)
_BETWEEN = re.compile(r"[\s,]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class TraceFileError(InputError):
    """A file that is no profiler's trace; the message names the file and what would be right."""


class Slice(NamedTuple):
    """One event that took time; `number` is its place in the file."""

    start_ns: int
    end_ns: int
    number: int
    name: str
    category: str
    pid: int | str
    tid: int | str
    args: dict[str, Any]


class Tally:
    """How many events there was a reason for, by reason, and the first of each."""

    def __init__(self) -> None:
        self.events: dict[str, int] = {}
        self.first: dict[str, str] = {}

    def add(self, reason: str, first: str, events: int = 1) -> None:
        """Count events; `first` names one of them."""
        self.events[reason] = self.events.get(reason, 0) + events
        self.first.setdefault(reason, first)

    def plain(self) -> dict[str, dict[str, Any]]:
        """Returns {reason: {"events", "first"}}, most events first."""
        order = sorted(self.events, key=lambda reason: -self.events[reason])
        return {reason: {"events": self.events[reason], "first": self.first[reason]} for reason in order}


class Reading:
    """How a file was read: how many events it holds, what was repaired and what left out, and where it breaks off."""

    def __init__(self) -> None:
        self.events = 0
        self.repaired, self.left_out = Tally(), Tally()
        self.breaks_off: str | None = None

    @property
    def whole(self) -> bool:
        """Whether all was read as it stands."""
        return not (self.repaired.events or self.left_out.events or self.breaks_off)

    def plain(self) -> dict[str, Any]:
        """Returns it as plain data."""
        repaired, left_out = self.repaired.plain(), self.left_out.plain()
        return {
            "events": self.events,
            "repaired": repaired,
            "left_out": left_out,
            "breaks_off": self.breaks_off,
        }


class TraceEvents:
    """What a file holds: the slices of known categories, in file order, names of threads, and what is beside them."""

    def __init__(self, path: Path) -> None:
        """Read a file. Raises TraceFileError if it is no trace, and OSError if it cannot be read."""
        self.reading = Reading()
        self.slices: list[Slice] = []
        self.thread_names: dict[tuple[Any, Any], str] = {}
        text = _Text(path, self.reading)
        make = _Maker(self.reading)
        for number, event in enumerate(text.events()):
            if not isinstance(event, dict):
                self.reading.left_out.add("that are no objects", f"traceEvents[{number}]")
                continue
            phase = event.get("ph")
            if phase == "M" and event.get("name") == "thread_name" and isinstance(event.get("args"), dict):
                pid, tid = (make.track(event.get(key), number) for key in ("pid", "tid"))
                self.thread_names[pid, tid] = make.name(event["args"].get("name", "")).strip()
            if phase != "X":
                make.half(event, number, phase)
            elif (slice_ := make.slice(event, number)) is not None:
                self.slices.append(slice_)
        self.slices += make.pairs()
        self.beside = text.beside
        if not text.found:
            raise TraceFileError(f'{path}: no list of events: a profiler\'s trace holds one as "traceEvents"')

    def timed(self) -> list[Slice]:
        """Returns the slices without those whose time was not set: at 0, and far before all others."""
        rest = [event for event in self.slices if event.start_ns]
        if not rest or len(rest) == len(self.slices):
            return self.slices
        first_ns, last_ns = min(event.start_ns for event in rest), max(event.end_ns for event in rest)
        if first_ns < max(_FAR_NS, last_ns - first_ns):
            return self.slices
        for event in self.slices:
            if not event.start_ns:
                self.reading.left_out.add("at time 0, far before all others", _place(event.number, event.name))
        return rest


class _Broken(Exception):
    """A place from which on the text is no JSON."""


class _Text:
    """The text of a file of trace events, and a reader that goes through it once."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self._path, self._reading = path, reading
        content = read(path, TraceFileError)
        self._most_parts = max(_MOST_PARTS, len(content))
        self._text = _decoded(path, content, reading)
        if self._text.count("[") + self._text.count("{") > self._most_parts:
            raise self._too_many("lists and objects")
        self._decoder = json.JSONDecoder(strict=False)
        self._mended = False
        #: What the file holds beside the events, and whether it has a list of them.
        self.beside: dict[str, Any] = {}
        self.found = False

    def events(self) -> Iterator[Any]:
        """Yields every event, as far as the text can be read."""
        at = self._past(0)
        try:
            if self._text[at : at + 1] == "[":
                yield from self._listed(at + 1)
            elif self._text[at : at + 1] == "{":
                yield from self._within(at + 1)
            else:
                self._value(at)
        except _Broken as error:
            if not self.found:
                raise TraceFileError(f"{self._path}: not JSON: {error}") from None
            self._ends(f"not readable further: {error}")

    def _within(self, at: int) -> Iterator[Any]:
        """Yields the events of the object whose keys begin at `at`."""
        while True:
            at = self._past(at)
            if self._text[at : at + 1] in ("}", ""):
                if at >= len(self._text):
                    self._ends("the text ends before its last bracket")
                return
            key, at = self._value(at)
            at = self._past(at)
            if self._text[at : at + 1] != ":" or not isinstance(key, str):
                raise _Broken(f"Expecting a key and ':' at character {at:,} of {len(self._text):,}")
            at = self._past(at + 1)
            if key == "traceEvents" and self._text[at : at + 1] == "[":
                at = yield from self._listed(at + 1)
            else:
                self.beside[key], at = self._value(at)

    def _listed(self, at: int) -> Generator[Any, None, int]:
        """Yields the events of the list whose first is at `at`; return the place behind it."""
        self.found = True
        while True:
            at = self._past(at)
            if at >= len(self._text):
                self._ends("the text ends within the list of events")
                return at
            if self._text[at] == "]":
                return at + 1
            event, at = self._value(at)
            self._reading.events += 1
            if self._reading.events > self._most_parts:
                raise self._too_many("events")
            yield event

    def _too_many(self, what: str) -> TraceFileError:
        return TraceFileError(f"{self._path}: packs more than {self._most_parts:,} {what}: no trace does")

    def _past(self, at: int) -> int:
        match = _BETWEEN.match(self._text, at)
        assert match is not None  # it matches nothing too
        return match.end()

    def _value(self, at: int) -> tuple[Any, int]:
        """Returns the value at a place, and the place behind it; numbers that JSON has not are mended, all at once."""
        try:
            return self._decoder.raw_decode(self._text, at)
        except json.JSONDecodeError as error:
            if self._mended:
                raise _Broken(f"{error.msg} at character {error.pos:,} of {len(self._text):,}") from None
        except (ValueError, RecursionError) as error:  # too many digits, or brackets in brackets
            raise _Broken(f"{error} at character {at:,} of {len(self._text):,}") from None
        self._mended = True
        self._text = self._text[:at] + _ODD_NUMBER.sub(self._mend, self._text[at:])
        return self._value(at)

    def _mend(self, found: re.Match[str]) -> str:
        text = found[0]
        if text[0] == '"':
            return text
        self._reading.repaired.add("numbers that JSON has not, read as none", text)
        return "null"

    def _ends(self, how: str) -> None:
        self._reading.breaks_off = "; ".join(filter(None, (self._reading.breaks_off, how)))


class _Maker:
    """Slices from events; what is odd in them is counted."""

    def __init__(self, reading: Reading) -> None:
        self._repaired, self._left_out = reading.repaired, reading.left_out
        self._names: dict[str, str] = {}
        self._categories: dict[str, str | None] = {}
        self._halves: list[tuple[Any, int, int, str, dict[str, Any]]] = []

    def slice(self, event: dict[str, Any], number: int) -> Slice | None:
        """Returns a complete event as a slice; None if it is left out."""
        category = self._category(event, number)
        if category is None:
            return None
        start_ns = self._time(event, "ts", number)
        took_ns = self._time(event, "dur", number)
        if start_ns is None or took_ns is None:
            return None
        return self._made(event, number, category, start_ns, took_ns)

    def half(self, event: dict[str, Any], number: int, phase: Any) -> None:
        """Keep a beginning or an end until all are known; other phases take no time."""
        if event.get("cat") == REQUEST:  # no lane's work: what a request waited for, as its steps say it
            return
        if not isinstance(phase, str) or phase not in "BEbeSF":
            if phase is None:
                self._left_out.add("without a phase", _place(number, event.get("name")))
            return
        at_ns = self._time(event, "ts", number)
        if at_ns is None:
            return
        key: tuple[Any, ...] = tuple(self.track(event.get(name), number) for name in ("pid", "tid"))
        if phase not in "BE":
            known = (event.get(name) for name in ("cat", "id", "id2", "scope", *(("name",) if phase in "SF" else ())))
            key = (*map(repr, known), key[0] if "id2" in event else None)
        self._halves.append(((phase.upper() in "BE", key), at_ns, number, phase, event))

    def pairs(self) -> Iterator[Slice]:
        """Yields what the beginnings and ends make, each end with the latest beginning of its thread, or of its id."""
        begun: dict[Any, list[tuple[int, int, dict[str, Any]]]] = {}
        for key, at_ns, number, phase, event in sorted(self._halves, key=lambda half: half[1:3]):
            if phase in _ENDS:
                begun.setdefault(key, []).append((at_ns, number, event))
            elif not begun.get(key):
                self._left_out.add("that end and never began", _place(number, event.get("name")))
            else:
                start_ns, first, beginning = begun[key].pop()
                category = self._category(beginning if "cat" in beginning else event, first)
                if category is not None:
                    args = [part.get("args") for part in (beginning, event)]
                    both = {name: value for part in args if isinstance(part, dict) for name, value in part.items()}
                    slice_ = self._made({**beginning, "args": both}, first, category, start_ns, at_ns - start_ns)
                    if slice_ is not None:
                        yield slice_
        for _, number, event in (left for lefts in begun.values() for left in lefts):
            self._left_out.add("that begin and never end", _place(number, event.get("name")))

    def _made(self, event: dict[str, Any], number: int, category: str, start_ns: int, took_ns: int) -> Slice | None:
        name = self.name(event.get("name", ""))
        if took_ns < 0:
            self._repaired.add("negative durations, read as 0", _place(number, name))
            took_ns = 0
        if took_ns > _LONGEST_US * 1000:
            self._left_out.add("longer than 11 days", _place(number, name))
            return None
        args = event.get("args")
        if args is not None and not isinstance(args, dict):
            self._repaired.add("args that are no object, read as none", _place(number, name))
            args = None
        kept = {key: self._arg(key, args[key], number) for key in _ARGS if key in args} if args else {}
        pid, tid = self.track(event.get("pid"), number), self.track(event.get("tid"), number)
        return Slice(start_ns, start_ns + took_ns, number, name, category, pid, tid, kept)

    def name(self, given: Any) -> str:
        """Returns a name without what a terminal must not see."""
        given = given if isinstance(given, str) else str(given)
        known = self._names.get(given)
        if known is None:
            known = _CONTROL.sub(" ", given)
            if not known.isascii():
                known = known.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written
            if known != given:
                self._repaired.add("names with characters that cannot be shown", repr(known))
            self._names[given] = known
        return known

    def track(self, given: Any, number: int) -> int | str:
        """Returns a process or thread: a number or a name; 0 if there is none."""
        if isinstance(given, int | str):
            return self.name(given) if isinstance(given, str) else given
        if given is None:
            return 0
        if isinstance(given, float) and given.is_integer():
            return int(given)
        self._repaired.add("processes and threads that are neither numbers nor names", _place(number, None))
        return self.name(given)[:40]

    def _arg(self, key: str, value: Any, number: int) -> Any:
        if key not in _NUMBERS:
            return value if isinstance(value, int) else self.name(value)[:40]
        if isinstance(value, int) and abs(value) < 2**63:
            return value
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
            return int(value)
        if value is not None:
            self._repaired.add(f"args {key!r} that are no whole numbers, read as none", _place(number, None))
        return None

    def _category(self, event: dict[str, Any], number: int) -> str | None:
        """Returns what an event is, by one of the names that are known; None, counted by its name, if none is."""
        given = str(event.get("cat", ""))
        if given not in self._categories:
            self._categories[given] = _known_category(given)
        category = self._categories[given]
        if category is None:
            what = f"of category {self.name(given)[:40]}" if given else "without a category"
            what += ", which marks work and is none" if given.lower() in _MARKS else ""
            self._left_out.add(what, _place(number, event.get("name")))
        elif given.lower() in _OLD_NAMES or (given != category and given.lower() == category):
            self._repaired.add("categories by the names of earlier versions", given)
        return category

    def _time(self, event: dict[str, Any], key: str, number: int) -> int | None:
        """Returns a time in ns; None, counted, if it is none."""
        value = event.get(key)
        if isinstance(value, str):
            value = _number(value)
            if value is not None:
                self._repaired.add("times given as text", _place(number, event.get("name")))
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or value != value:
            how = "without"
        elif _EARLIEST_US < value < _LATEST_US:
            whole = int(value)  # by itself, so that nothing is lost of what a float holds
            return whole * 1000 + round((value - whole) * 1000)
        elif key == "dur" and value < 0:
            return -1
        else:
            how = "with an impossible"
        what = "time" if key == "ts" else "duration"
        self._left_out.add(f"{how} {what}", _place(number, event.get("name")))
        return None


def _number(text: str) -> Decimal | None:
    """Returns the number that a text is; None if it is none."""
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _known_category(given: str) -> str | None:
    for name in given.split(","):  # an event may be of several
        plain = name.strip().lower()
        plain = _OLD_NAMES.get(plain, plain)
        if plain in GPU_WORK or plain in HOST_WORK:
            return plain
        if _OTHER_CALLS.fullmatch(plain):
            return CALLS[0]
    return None


def _place(number: int, name: Any) -> str:
    """Returns where an event stands, and what it is called."""
    called = "" if name is None else f" {_CONTROL.sub(' ', str(name))[:60]!r}"
    return f"traceEvents[{number}]{called}"


def _decoded(path: Path, packed: bytes, reading: Reading) -> str:
    content: bytes | bytearray = packed
    if packed[:2] == b"\x1f\x8b":
        content = _unpacked(path, packed, reading)
    encoding = json.detect_encoding(bytes(content[:4]))
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        reading.repaired.add(f"bytes that are not {encoding}", f"byte {error.start:,}")
        return content.decode(encoding, "replace")


def _unpacked(path: Path, packed: bytes, reading: Reading) -> bytearray:
    """Returns what a .gz file holds, as far as it can be unpacked. Raises TraceFileError if nothing can or too much."""
    most = max(_MOST_BYTES, _MOST_TIMES * len(packed))
    out = bytearray()
    wrong = None
    at = 0
    while packed[at : at + 2] == b"\x1f\x8b" and wrong is None:  # it may have several members
        member = zlib.decompressobj(31)
        while not member.eof and at < len(packed):
            chunk, before = packed[at : at + _PACKED_CHUNK], member.copy()
            try:
                out += member.decompress(chunk)
            except zlib.error as error:
                out += _bytewise(before, chunk)
                wrong = str(error)
                break
            at += len(chunk)
            if len(out) > most:
                raise TraceFileError(
                    f"{path}: unpacks to more than {bytes_words(most)}, {len(out) // len(packed):,} times its "
                    "size: no trace does; unpack it first if it is one"
                )
        at -= len(member.unused_data)
        if not member.eof and wrong is None:
            wrong = "it is cut"
    if wrong is not None:
        if not out:
            raise TraceFileError(f"{path}: a broken .gz file: {wrong}")
        reading.breaks_off = f"a broken .gz file: {wrong}"
    return out


def _bytewise(member: Any, chunk: bytes) -> bytes:
    """Returns what can be unpacked of a chunk that has an error in it."""
    out = bytearray()
    unpack: Callable[[bytes], bytes] = member.decompress
    for at in range(len(chunk)):
        try:
            out += unpack(chunk[at : at + 1])
        except zlib.error:
            break
    return bytes(out)
