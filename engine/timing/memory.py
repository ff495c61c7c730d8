"""The memory of the compiled engine: one array of 64-bit words, and the names of the words in it.

A lane, a piece of work, a GPU or a thread is the address of its first word, and a field is a distance from there:
`m[lane + L_FREE]`. Times are integers; the few fields that are not are read through a view of the same words as floats,
`f[lane + L_LEFT]`. One array is passed around instead of forty, since compiled code takes each of them apart at every
call; and it grows at its end, so that addresses stay as they are. -1 stands for nothing, NEVER for an instant that does
not come.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...machine_words import WordMemory

Ints = npt.NDArray[np.int64]

#: After any instant.
NEVER = 1 << 59

#: How a lane takes work: as it was submitted; as it became ready; by rank.
IN_ORDER, AS_READY, BY_RANK = range(3)

#: The run as a whole: the instant; the lists of lanes, threads and GPUs; free work and nodes: those that were in use,
#: the first of those that were not, and how many there are in all; what comes next, a word for each lane and thread,
#: and behind these words whose each is, and the first of each block of them (0: there are no blocks); where the rates
#: are that somebody has asked for last; how many nodes any one command may take, and the thread that ran short of
#: them, which goes on first; the longest time that any lane lets pass between a cause and what waits for it.
(
    NOW, LANES, THREADS, GPUS, FREE_WORK, NEW_WORK, WORK_LEFT, FREE_NODE, NEW_NODE, NODES_LEFT, NUMBER, REGISTERS,
    KERNELS, KERNEL_TOKENS, RATES, RATE_ROWS, RATE_WORDS, RATES_KNOWN, ASKED, ASKED_FOR, RECORDS, RECORD_ROOM, ARRIVALS,
    DROPPED, KEYS, KEY_COUNT, FIRSTS, RATE_FOUND, NODES_COMMAND, RESUMES, MOST_LAG, HEADER,
) = range(32)  # fmt: skip

#: A lane: what it was made with; the lists of lanes that have to do with it; its queue, and what enters one by rank
#: later; what is running; when that ends, when a start is tried, and when it says whether it keeps an engine; when
#: work enters by rank; and where its word is of what comes next.
#: If GPUs share it, it is nobody's, and knows what it has been ordered to do and has not begun; and how long work that
#: has ended kept it busy; and whether what it starts next is open until it does: it goes by rank, or takes turns.
(
    L_KIND, L_GAP, L_GAP_DISTURBED, L_AFTER_OTHER, L_AFTER_OTHER_DISTURBED, L_AFTER_ISSUE_DISTURBED, L_SLOT, L_NUMBER,
    L_GPU, L_SHARING, L_TURNS, L_DISTURBERS, L_SLOWED_BY, L_NEIGHBORS, L_FIRST, L_LAST, L_ENTERING, L_LAST_ENTERING,
    L_NEXT, L_ACTIVE, L_FREE, L_START, L_SINCE, L_END, L_WAKE, L_KEEPS, L_WAITS_FOR_ENGINE, L_GOES_ON, L_LEFT,
    L_STRETCH, L_LONGER, L_SHARING_FACTOR, L_CROWD, L_ENTERS, L_KEY, L_ORDERED, L_BUSY, L_OPEN, LANE_WORDS,
) = range(39)  # fmt: skip

#: A piece of work; `after` and `waiting` are lists of nodes: of work that must have ended, and of who waits for it;
#: up to two registers that may stand for it (-1: none).
(
    W_NS, W_ALONE, W_ISSUED, W_KIND, W_VISIT, W_EXPERT, W_COPY, W_LANE, W_TRANSFER, W_RANK, W_TARGET, W_NUMBER,
    W_PIECES, W_STARTED, W_CANCELLED, W_END, W_NEXT, W_AFTER, W_WAITING, W_REFERENCES, W_SLOWDOWN, W_HELD_BACK, W_GPU,
    W_REGISTER, W_LEFT, WORK_WORDS,
) = range(26)  # fmt: skip

#: A register: a list of nodes; -1 for nothing; or, where all has ended, how far below this the last end is.
SETTLED = -2

#: A node of a list: what stands there, the next node, and, of who waits, what it is.
N_WHAT, N_NEXT, N_WHO, NODE_WORDS = range(4)
#: Who waits for the end of work: a lane to start, a thread to go on, work to join its queue, what arrives elsewhere,
#: what stands for a copy's leaving a room of host memory, which it does when it is given up, too.
A_LANE, A_THREAD, A_WORK, AN_ARRIVAL, A_DEPARTURE = range(5)

#: A slot: a lane that shares links with others, what it moves now, how many times as long that takes, and the list of
#: the slots of all lanes that may share a link with it, or with one of these.
S_LANE, S_MOVING, S_STRETCH, S_GROUP, SLOT_WORDS = range(5)
#: A set of transfers whose stretches are known: the group (0: none yet), what each of its slots moves, the stretches.
V_GROUP, V_MOVING = range(2)

#: What lanes share alike: how many are busy, and a list of them; then how many times as long work takes beside so many,
#: from none on.
CROWD_BUSY, CROWD_LANES, CROWD_TIMES = range(3)

#: A GPU: what the host's calls take there; its lanes; its place in the program; its launch queue; the kernel that is
#: being grouped; tables of shapes, of copies, and of what goes to other GPUs; the GPU among compiled decisions;
#: records; what attention adds (-1: nothing); whether copies of experts take each their own.
(
    G_NUMBER, G_WAIT, G_READBACK_ENQUEUE, G_READBACK_LATENCY, G_READBACK, G_SYNCHRONIZE, G_SYNCHRONIZE_BESIDE, G_RESUME,
    G_COPY_RESUME, G_LAUNCH, G_COPY_LATENCY, G_TURN, G_TO_CPU, G_FROM_CPU,
    G_OWN_LAYER, G_OWN_STEP, G_PREDICT, G_OTHERS_EVERY, G_OTHERS_NS, G_READS_BACK,
    G_WATCHES, G_DEPTH, G_GROUPED_SAVED, G_BY_PRIORITY, G_DROPS_STALE, G_EXPERTS, G_SIZED, G_COMPUTE, G_H2D,
    G_PREFETCH, G_D2H, G_SIDE, G_UNPACKING, G_CPU, G_BACK, G_EXCHANGE, G_HOST, G_NOW, G_BUSY_SINCE, G_VISIT, G_LAST,
    G_LAST_KERNEL, G_AFTER, G_CALLS, G_KERNEL_AFTER, G_INTERRUPTED, G_HELD, G_QUEUED, G_FIRST_LAUNCHED, G_LAUNCHED,
    G_RING, G_MEMBERS, G_MEMBER_NS, G_MOST_NS, G_MEMBER_LAUNCHES, G_MEMBER_HOST, G_EXCHANGE_NS, G_ASSIGNED, G_BUDGET,
    G_SHAPES, G_LAYERS, G_COPY_OF, G_SENDS, G_PEERS, G_ARRIVALS, G_MEMBER_SLOWDOWN, G_COPY_SLOWDOWN,
    G_READBACK_SLOWDOWN, G_KINDS, G_PREDICT_LAUNCHES, G_PREDICT_HOST, G_PREDICT_ISSUE, G_IO_LANES, G_READS, G_PART,
    G_SPANS, G_ACCESSES, G_DECISIONS, G_THREAD, G_SCATTER, G_ATTENTION,
    G_COPY_EACH, GPU_WORDS,
) = range(83)  # fmt: skip

#: A host thread: its number, its portion and place in it, where it says when it goes on, at which GPU it is, and the
#: thread among compiled decisions, if they are; how many parts it waits for. One that carries out a part (see
#: `commands`) belongs to a GPU, and to the thread that waits for it; and whether it waits for another part's.
#: Whether it is where only one may be at a time, or waits to come there.
(
    T_NUMBER, T_ROWS, T_CAPACITY, T_COUNT, T_AT, T_KEY, T_GPU, T_GPUS, T_PROGRAM, T_PARTS, T_PART_OF, T_BEHIND,
    T_INSIDE, T_OUTSIDE, THREAD_WORDS,
) = range(15)  # fmt: skip

#: What scatters (see `costs.scatter.SCATTERED`), and of each the next factor's address, and the end of those drawn.
F_DENSE, F_EXPERT, F_HEAD, F_HOST, F_COPY, SCATTERS = range(6)
F_NEXT, F_END, FACTOR_WORDS = range(3)

#: What a kernel takes, if it has been asked for.
K_KNOWN, K_NS, K_LAUNCHES, K_HOST, K_ISSUE, K_SLOWDOWN, KERNEL_WORDS = range(7)
#: Kinds of shapes; those of experts whose sizes differ within a layer follow, by class of size.
DENSE_SHAPE, HEAD_SHAPE, EXPERT_SHAPE, LOW_SHAPE, UNPACK_SHAPE, CPU_SHAPE, TO_CPU_SHAPE, FROM_CPU_SHAPE, SIZED_SHAPE = (
    range(9)
)
#: What attention adds to dense parts: the step that it is known for (-1: none), then the kind of each layer, then for
#: each kind how many ns, and how many beside a copy.
AT_STEP, AT_KINDS = range(2)
AN_NS, AN_BESIDE, ADDED_WORDS = range(3)
#: What a copy takes, or a piece of it where a queue by rank has them; the transfer is what it moves over shared links.
P_QUEUED, P_ALONE, P_PIECES, P_HOST, P_TRANSFER, P_CLASS, COPY_WORDS = range(7)
#: What a read takes, by layer: a request, and the host's call.
D_REQUEST, D_HOST, READ_WORDS = range(3)
#: What goes to another GPU: its lane, what it takes, how much later it arrives, and at which GPU.
M_LANE, M_QUEUED, M_ALONE, M_HOST, M_LATENCY, M_TRANSFER, M_LAG, M_TARGET, M_SLOWDOWN, MOVE_WORDS = range(10)

#: A region of records: where it begins, how many there are, and how many have room.
R_AT, R_COUNT, R_CAPACITY, REGION_WORDS = range(4)
#: Words of a span (as of `resources.timeline.SPAN`); of an access or a decision; of an arrival, of which the end is not
#: known yet: its GPU, what waited for it, and the work; of a dropped prefetch. How many spans, accesses and decisions
#: there are since they were written out is counted by the fullest of all regions.
SPAN_WORDS, NOTE_WORDS, ARRIVAL_WORDS, DROPPED_WORDS = 5, 3, 4, 3

#: What the engine comes back with: all is done; a thread wants its next portion, a price, the rates of a set of
#: transfers, or a lane's place in a timeline; or memory runs out. Compiled decisions: the next steps, or more room.
DONE, PORTION, PRICE, RATE, SPACE, STEPS, ROOM, LANE = range(8)
#: The most work that a command takes, and the nodes that most of them take. Where a drive is read, one that writes a
#: room anew copies the lists of all that it waits for: as many nodes as an expert is read in requests, and a few (no
#: more in 380 random compositions, counted with `NUMBA_DISABLE_JIT=1`). A thread goes on while there are some times
#: that many, and so many besides. Memory that is not written to costs nothing.
WORK_EACH, NODES_EACH, NODES_OF_LISTS, NODES_A_REQUEST = 2, 24, 1 << 16, 16


class Memory(WordMemory):
    """The words of a simulation, with regions of records that grow and records that are used again."""

    def __init__(self, gpus: int) -> None:
        super().__init__((1 + gpus) << 20)
        self._new_ends: dict[int, int] = {}

    def put_region(self, capacity: int, words: int) -> int:
        """Returns the address of a region with room for so many records of so many words."""
        return self.put([self.allocate(capacity * words), 0, capacity])

    def grow_region(self, region: int, words: int) -> None:
        """Give a region twice the room."""
        at, count, capacity = (int(self.words[region + field]) for field in (R_AT, R_COUNT, R_CAPACITY))
        to = self.allocate(2 * capacity * words)
        self.words[to : to + count * words] = self.words[at : at + count * words]
        self.words[region + R_AT], self.words[region + R_CAPACITY] = to, 2 * capacity

    def add_free(self, free: int, fields: int, link: int, count: int) -> None:
        """Add so many free records of so many words, linked by one of these.

        `free` is the address of the first of those that have been used, behind which stand those of the first that has
        not and of how many are free. What has not been used is not written to: the rest of what there was is linked.
        """
        new, left = free + 1, free + 2
        at, words = self.allocate(count * fields), self.words
        rest = np.arange(words[new], self._new_ends.get(new, 0), fields, dtype=np.int64)
        if len(rest):
            words[rest + link] = np.append(rest[1:], words[free])
            words[free] = rest[0]
        words[new], self._new_ends[new] = at, at + count * fields
        words[left] += count
