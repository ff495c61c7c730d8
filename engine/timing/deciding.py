"""Runs that decide in compiled code: the compiled engine and compiled decisions, and what both ask Python for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from ..decide.compiled_decisions import Decisions
from .compiled_engine import CompiledEngine
from .compiled_loop import carry_on
from .compiled_prices import ROW_WORDS
from .memory import DONE, G_PART, ROOM, SPACE, STEPS, T_CAPACITY, T_PROGRAM, T_ROWS


class DecidingEngine:
    """One simulation whose GPUs decide in compiled code.

    `ended` are called whenever what was recorded has been written out; `ticks` is drawn from once for every visit.
    """

    def __init__(
        self, engine: CompiledEngine, decisions: Decisions, ended: Sequence[Callable[[], None]], ticks: Iterator[Any]
    ) -> None:
        self._engine, self._decisions, self._ended, self._ticks = engine, decisions, ended, ticks
        self._ticked = 0
        layout = engine.layout
        words = layout.memory.words
        for at, part in zip(layout.gpus, decisions.gpus, strict=True):
            words[at + G_PART] = part
        for at, thread in zip(layout.threads, decisions.threads, strict=True):
            words[at + T_PROGRAM] = thread
        self._make_room()

    def run(self) -> None:
        """Run until nothing is left to do."""
        engine, decisions, memory, thread, due = self._engine, self._decisions, self._engine.layout.memory, -1, 0
        while True:
            why, thread = carry_on(decisions.at, memory.words, memory.floats, thread, due)
            due = int(why in (STEPS, ROOM))
            if why == DONE:
                break
            if why == STEPS:
                decisions.lay_out_steps()
                self._tick()
            elif why == ROOM:
                decisions.make_room()
                self._make_room()
            else:
                engine.answer(why)
                if why == SPACE:
                    self._write_out()
        engine.flush()
        decisions.finish()
        self._tick()
        self._write_out()

    def _write_out(self) -> None:
        """Let what was recorded move to files, if there are any."""
        for ended in self._ended:
            ended()

    def _tick(self) -> None:
        done = self._decisions.done()
        deque(islice(self._ticks, done - self._ticked), maxlen=0)
        self._ticked = done

    def _make_room(self) -> None:
        """Let every thread hold any portion, and the machine all registers."""
        layout, most = self._engine.layout, len(self._decisions.tables.rows)
        for at in layout.threads:
            if layout.memory.words[at + T_CAPACITY] < most:
                rows = layout.memory.allocate(most * ROW_WORDS)
                layout.memory.words[at + T_ROWS], layout.memory.words[at + T_CAPACITY] = rows, most
        if self._decisions.registers > layout.registers:
            layout.add_registers(self._decisions.registers)
