"""Pipeline parallelism: several GPUs, each with a stage of the layers, that steps pass one after the other.

Every stage serves all steps in the same order. Its first kernel of a step waits, in stream order, for the activations
that the stage before sends; on the first stage, a decode step waits for the tokens that the last one sampled for the
same sequences. What is decided at a stage depends on that stage's order alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ...workloads.batches import Step, continued_steps, worked_out_of
from ...workloads.model import Model
from ...workloads.trace import RoutingTrace


@dataclass(frozen=True)
class Flow:
    """The steps that pass the stages, and what passes between them.

    `continued` (steps,) are the steps whose sampled tokens each one goes on from (see `batches.continued_steps`);
    `activation_bytes` (steps,) go from a stage to the next, `token_bytes` (steps,) from the last to the first, 0 where
    no later step needs them.
    """

    steps: Sequence[Step]
    continued: Sequence[tuple[int, ...]]
    activation_bytes: Sequence[int]
    token_bytes: Sequence[int]


#: A sampled token's id, an int64 as torch makes it.
_TOKEN_BYTES = 8


def flow_of(model: Model, trace: RoutingTrace, steps: Sequence[Step]) -> Flow:
    """Returns what passes between the stages of a model: a hidden state for each token, an id for each sequence."""
    continued, token_bytes = worked_out_of(steps, trace.sequence, "flow", partial(_tokens_back, trace, steps))
    return Flow(steps, continued, [model.activation_bytes(len(step.rows)) for step in steps], token_bytes)


def _tokens_back(trace: RoutingTrace, steps: Sequence[Step]) -> tuple[Sequence[tuple[int, ...]], Sequence[int]]:
    """Returns `continued` and `token_bytes` of `Flow`."""
    continued = continued_steps(steps, trace.sequence)
    needed = {step for before in continued for step in before}
    token_bytes = [
        _TOKEN_BYTES * len(set(trace.sequence[step.rows].tolist())) if number in needed else 0
        for number, step in enumerate(steps)
    ]
    return continued, token_bytes


def received_steps(flow: Flow, stage: int) -> list[int]:
    """Returns the step whose data from the stage before each step waits for at a stage (steps,); -1 for none."""
    if stage:
        return list(range(len(flow.steps)))
    return [before[-1] if before else -1 for before in flow.continued]


def sent_bytes(flow: Flow, stage: int, stages: int) -> Sequence[int]:
    """Returns what a stage sends to the next one at each step, or the last one to the first (steps,)."""
    return flow.activation_bytes if stage < stages - 1 else flow.token_bytes
