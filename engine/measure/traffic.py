"""What the GPUs of a finished run have sent each other: activations and tokens of a pipeline, tokens, and experts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...resources.links import Links
from ...resources.network import Carried
from ...resources.timeline import ACTIVATION, COMBINE, DISPATCH, PEER
from ..decide.pipeline import Flow, flow_of, sent_bytes
from ..scenario.inputs import Inputs
from ..timing.records import COPIES_FROM
from .recording import Recording, ratio


def carried_between(inputs: Inputs, recordings: Sequence[Recording], links: Links) -> list[Carried]:
    """Returns what the GPUs of a finished run have sent each other."""
    if inputs.expert_parallel is not None:
        return _tokens_and_experts(inputs, recordings, links)
    return _activations(recordings, flow_of(inputs.model, inputs.trace, inputs.steps), links)


def _activations(recordings: Sequence[Recording], flow: Flow, links: Links) -> list[Carried]:
    """Returns what each stage of a finished run has sent to the next, and the last one to the first."""
    carried = []
    for number, (recording, costs) in enumerate(zip(recordings, links.to_next(), strict=True)):
        copies = recording.spans[recording.spans["kind"] == ACTIVATION]
        size_bytes = np.array(sent_bytes(flow, number, len(recordings)), dtype=np.int64)
        step = copies["visit"] // len(recording.expert_bytes)
        carried.append(Carried(costs.route, size_bytes[step], copies["start_ns"], copies["end_ns"]))
    return carried


def _tokens_and_experts(inputs: Inputs, recordings: Sequence[Recording], links: Links) -> list[Carried]:
    """Returns what the GPUs of a finished run have sent each other: tokens there and back, and experts."""
    token_bytes, ways, carried = inputs.model.activation_bytes(1), links.routes(), []
    for kind in (DISPATCH, COMBINE):
        exchanges = recordings[0].spans[recordings[0].spans["kind"] == kind]  # all GPUs' are at once
        start_ns, end_ns = exchanges["start_ns"].copy(), exchanges["end_ns"].copy()
        for (source, target), route in ways.items():
            home, server = (source, target) if kind == DISPATCH else (target, source)
            tokens = recordings[home].decoded.sent[:, server].astype(np.int64)
            carried.append(Carried(route, tokens * token_bytes, start_ns, end_ns))
    for target, recording in enumerate(recordings):
        for number, lane in enumerate(recording.decoded.timeline.lanes):
            found = re.fullmatch(COPIES_FROM.format(r"gpu(\d+)"), lane.title)
            if found is not None:
                copies = recording.spans[recording.spans["lane"] == number]
                route, size_bytes = ways[int(found[1]), target], recording.bytes_of(copies["expert"])
                carried.append(Carried(route, size_bytes, copies["start_ns"], copies["end_ns"]))
    return carried


def sharing_metrics(recordings: Sequence[Recording]) -> dict[str, Any]:
    """Returns what sharing the experts took, as plain data for JSON.

    `tokens_sent`: one way, a token once to each GPU that serves it; `all_to_all_ms`: there and back, together;
    `copied_bytes`: experts from one GPU to another, those that spare memory takes included; `imbalance`: the (token,
    expert) pairs of the GPU that serves the most in a layer visit, over all visits / those of the mean GPU (None: there
    are none). All GPUs wait for the busiest of a visit, and it is another one each time.
    """
    exchanges = recordings[0].spans[np.isin(recordings[0].spans["kind"], (DISPATCH, COMBINE))]
    copied_bytes = 0
    for recording in recordings:
        copied = recording.spans["expert"][recording.spans["kind"] == PEER]
        copied_bytes += int(recording.bytes_of(copied).sum())
    busiest, total = _served(recordings)
    return {
        "tokens_sent": sum(int(recording.decoded.sent.sum(dtype=np.int64)) for recording in recordings),
        "all_to_all_ms": int((exchanges["end_ns"] - exchanges["start_ns"]).sum()) / 1e6,
        "copied_bytes": copied_bytes,
        "imbalance": ratio(busiest * len(recordings), total),
    }


def _served(recordings: Sequence[Recording]) -> tuple[int, int]:
    """Returns the (token, expert) pairs that the busiest GPU of each layer visit serves, and all GPUs' pairs."""
    busiest = np.zeros(len(recordings[0].decoded.visits), dtype=np.int64)
    total = 0
    for recording in recordings:
        accesses = recording.decoded.accesses
        pairs = np.bincount(accesses["visit"], weights=accesses["tokens"], minlength=len(busiest)).astype(np.int64)
        busiest, total = np.maximum(busiest, pairs), total + int(pairs.sum())
    return int(busiest.sum()), total
