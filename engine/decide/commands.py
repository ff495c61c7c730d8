"""Commands: what a host thread submits next, as rows of integers, without a clock and without durations.

`visit_commands` and `program` write them; the SimPy engine, the compiled engine and the CUDA executor interpret them. A
command names what it waits for by register: a number for something whose end matters later (a room in memory, the
router's choice, a predictor's guesses). Registers are read and written in the order of the program, as a processor's
are, so they can be used again, and nothing grows with the length of a run.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Op(IntEnum):
    """What a command does. One that submits work to a lane sets the register that it names to the work's end."""

    #: A layer visit begins; `extra` is 1 at the first of a forward pass: other work may have taken the stream before.
    VISIT = 0
    #: The next work waits for a register, too; the host makes `extra` calls for it.
    WAIT = 1
    #: As WAIT, for a room that is about to be overwritten: a copy into it that is still queued, unread, is given up.
    #: The register stands for nothing then, unless some of the room is left (`tokens` is 1).
    RECLAIM = 2
    #: The register stands for the last work, as well.
    TOUCH = 3
    #: The register stands for the later of what it stood for and the last work.
    JOIN = 4
    #: The register stands for the last kernel that serves the step.
    OUTPUT = 5
    #: Launch a group of kernels on the compute stream: `kind`, at `layer`, over `tokens`; of a dense part, in step
    #: `extra`.
    LAUNCH = 6
    #: One expert over `tokens` tokens is part of the grouped kernel that is launched next.
    MEMBER = 7
    #: Copy an expert to the GPU on `lane`; by priority it is for visit `extra`. `tokens` is 1 if the GPU issues it.
    COPY = 8
    #: Copy the router's choice, or guesses, to the host.
    READBACK = 9
    #: The host waits for a register (it synchronizes): the router's choice (`extra` is -1), or guesses (1), after which
    #: it takes time to go on, as at DECIDE after a choice. `tokens` is 1 if it fetches something then.
    NOTICE = 10
    #: The choice of visit `extra` is known: what follows was decided by it. `tokens` is 1 if the visit fetches any.
    DECIDE = 11
    #: The host waits for a register (a pageable copy).
    HOLD = 12
    #: Run the predictor on `lane`.
    PREDICT = 13
    #: A queued copy into this room is demanded now, by visit `extra`.
    PROMOTE = 14
    #: Send the activations of `tokens` tokens to the host.
    TO_CPU = 15
    #: Compute an expert over `tokens` tokens on the CPU.
    CPU = 16
    #: Bring the results of `tokens` tokens back to the GPU.
    FROM_CPU = 17
    #: Decompress an expert on a side stream.
    UNPACK = 18
    #: Order a request to the drive, for an expert, on whichever I/O lane has the least to do then. `extra` is 1 at the
    #: first of a read, which the host orders for all; the others wait for what that waits for, and the register stands
    #: for all of them.
    READ = 19
    #: Wait until the simulation's clock has caught up with the host's; `extra` is 1 where threads go on together.
    CATCH_UP = 20
    #: The host thread turns to this GPU; `extra` is 1 where that takes it time.
    TURN = 21
    #: The next kernel, of `kind`, waits for what comes from another GPU: a register, or, for step `extra`, what the
    #: stage before sends.
    RECEIVE = 22
    #: Send what was waited for to the next stage: step `extra`.
    SEND = 23
    #: The host calls for an exchange of tokens between all GPUs.
    CALL = 24
    #: All GPUs exchange tokens (`kind`) once what was waited for has ended.
    EXCHANGE = 25
    #: Copy an expert from GPU `peer`.
    FETCH = 26
    #: Copy an evicted expert to GPU `peer`.
    STORE = 27
    #: The last work is a copy out of a room of host memory: the register stands for its end, too, or for the instant at
    #: which it is given up.
    LEAVE = 28
    #: The next `extra` commands are a part that a thread of this GPU's own carries out, beside those of the parts that
    #: come directly before and behind. What comes behind the last of them waits for all.
    PART = 29
    #: In a part: the thread waits until that of GPU `peer` has carried out the first `extra` commands of its own.
    BEHIND = 30
    #: The host thread waits until no other one is between an ENTER and an EXIT: what threads that share host memory
    #: decide there, they have ordered before another decides.
    ENTER = 31
    EXIT = 32
    #: The host has nothing to do until instant `extra`, in ns.
    IDLE = 33
    #: The host takes `extra` ns to make the next step of what waits and runs.
    SCHEDULE = 34
    #: Copy KV blocks, or an evicted expert, to host memory or (on `lane` H2D) back; it takes `extra` ns.
    SWAP = 35


class Command(NamedTuple):
    """One row, by name; -1 where a column means nothing. `peer` is another GPU; of kernels, the phase of their step."""

    op: int
    gpu: int
    kind: int
    lane: int
    layer: int
    tokens: int
    expert: int
    copy: int
    register: int
    peer: int
    extra: int


#: The lanes of a GPU that commands may name.
H2D, PREFETCH_LANE, COMPUTE, SIDE, HOST = range(5)

#: Registers that every GPU has, numbered from its `first_register`: the router's choice, the last kernel that serves
#: the step, the predictor's guesses, the CPU's results, an expert decompressed for one use, the tokens that come from
#: other GPUs, and what the CPU computes for the next layer. After those of all GPUs comes one for the last choice of
#: all, then a register for each room.
CHOICE, OUTPUT, GUESSES, RESULTS, UNPACKED, TOKENS, LATER, FIXED_REGISTERS = range(8)
