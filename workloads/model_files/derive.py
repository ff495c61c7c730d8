"""From shapes to a model: the weights of each MoE layer's dense part, and what it keeps of a sequence, as bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..model import Attending, Cached, Model, Routed
from .mixers import Attends, Kept
from .shapes import Dtypes, Shapes
from .weights import Weights, bytes_of


class _Part(NamedTuple):
    """The dense part of one MoE layer, or the end of the model: its weights, what its blocks keep and attend to."""

    weights: Weights
    kept: tuple[Kept, ...]
    attends: tuple[Attends, ...]


def derive(shapes: Shapes, layers: int) -> Model:
    """Returns the model of these shapes with its first `layers` MoE layers."""
    dtypes, moe, hidden = shapes.dtypes, [shapes.moe.of(layer) for layer in range(layers)], shapes.hidden
    *dense, tail = _parts(shapes)
    kept = [*dense[:layers], tail]
    expert = [each.expert_weights(hidden) for each in moe]
    routed = [Routed(each.experts, each.top_k, each.expert_ff) for each in moe]
    most = Routed(*map(max, zip(*routed, strict=True)))
    table = Weights(other=shapes.vocabulary * hidden)
    tables = 1 if shapes.tied_embeddings else 2
    values = sum(each.values_per_token for part in kept for each in part.kept)
    resident = sum(part.weights.total for part in kept)
    head_dtype = dtypes.of_embedding if shapes.tied_embeddings else dtypes.of_head
    return Model(
        name=shapes.name,
        layers=layers,
        experts=most.experts,
        top_k=most.top_k,
        hidden=hidden,
        expert_ff=most.expert_ff,
        expert_matrices=shapes.moe.matrices,
        expert_dtype=dtypes.expert,
        dense_dtype=dtypes.dense,
        expert_bytes=tuple(each.bytes(dtypes.expert, dtypes.of_other) for each in expert),
        dense_bytes=tuple(part.weights.bytes(dtypes.dense, dtypes.of_other) for part in dense[:layers]),
        head_bytes=tail.weights.bytes(dtypes.dense, dtypes.of_other) + bytes_of(table.total, head_dtype),
        dense_kernels=shapes.kernels.dense,
        expert_kernels=shapes.kernels.expert,
        kv_bytes_per_token=bytes_of(values, dtypes.of_kv),
        source=shapes.source,
        parameters=resident
        + sum(each.experts * one.total for each, one in zip(moe, expert, strict=True))
        + tables * table.total,
        embedding_bytes=bytes_of(table.total, dtypes.of_embedding),
        tied_embeddings=shapes.tied_embeddings,
        active_parameters=resident
        + sum(each.top_k * one.total for each, one in zip(moe, expert, strict=True))
        + table.total,
        caches=_caches(kept, dtypes) if _differs(shapes) else (),
        host_table_bytes=shapes.host_table_bytes,
        attention=_attention(kept, dtypes),
        by_layer=tuple(routed) if len(set(routed)) > 1 else (),
    )


def _parts(shapes: Shapes) -> list[_Part]:
    """Returns the dense part of every MoE layer, then what follows the last one, without the language-model head."""
    hidden = shapes.hidden
    norm = Weights(other=hidden)
    mixed = shapes.streams.weights(hidden) if shapes.streams else Weights()
    # Each of a block's two parts is mixed in, and put back by a matrix of streams x streams.
    streams = mixed.plus(Weights(shapes.streams.count**2 * hidden)) if shapes.streams else mixed
    feed_forward = {
        "dense": shapes.dense.weights(hidden).plus(norm) if shapes.dense else Weights(),
        "none": Weights(),
    }
    parts: list[_Part] = []
    weights, kept, attends = Weights(), list[Kept](), list[Attends]()
    for stack in shapes.stacks:
        for name, part in zip(stack.mixer_of_block, stack.feed_forward_of_block, strict=True):
            mixer = shapes.mixer(name)
            if mixer is not None:
                weights = weights.plus(mixer.weights(hidden).plus(norm), stack.attentions)
                times = stack.attentions if stack.caches is None else stack.caches
                kept += list(mixer.kept) * times
                attends += list(mixer.attends) * times
            if part == "moe":
                weights = weights.plus(shapes.moe.of(len(parts)).resident_weights(hidden)).plus(norm)
            else:
                weights = weights.plus(feed_forward[part])
            weights = weights.plus(streams, 2)
            if part == "moe":
                parts.append(_Part(weights, tuple(kept), tuple(attends)))
                weights, kept, attends = Weights(), [], []
        weights = weights.plus(mixed if shapes.streams else norm)
    return [*parts, _Part(weights, tuple(kept), tuple(attends))]


def _differs(shapes: Shapes) -> bool:
    """Returns whether blocks keep different things, or anything that does not grow with every token."""
    used = {name for stack in shapes.stacks for name in stack.mixer_of_block}
    mixers = [shapes.mixer(name) for name in used]
    kept = {mixer.kept if mixer is not None else () for mixer in mixers}
    return len(kept) > 1 or any(each.window or each.state_values for found in kept for each in found)


def _caches(parts: Iterable[_Part], dtypes: Dtypes) -> tuple[tuple[Cached, ...], ...]:
    """Returns what each part keeps in bytes, blocks of one window added up; states last."""
    caches = []
    for part in parts:
        values: dict[int, int] = {}
        for each in part.kept:
            values[each.window] = values.get(each.window, 0) + each.values_per_token
        state = bytes_of(sum(each.state_values for each in part.kept), dtypes.state)
        found = [Cached(bytes_of(count, dtypes.of_kv), window) for window, count in sorted(values.items()) if count]
        caches.append((*found, Cached(state_bytes=state)) if state else tuple(found))
    return tuple(caches)


def _attention(parts: Sequence[_Part], dtypes: Dtypes) -> tuple[tuple[Attending, ...], ...]:
    """Returns what each layer attends to, the end of the model with the last one."""
    *layers, tail = [tuple(_attending(each, dtypes) for each in part.attends) for part in parts]
    return (*layers[:-1], layers[-1] + tail)


def _attending(attends: Attends, dtypes: Dtypes) -> Attending:
    heads, kv_heads, head_dim, values, most, ratio, latent_dim, indexes = attends
    key_bytes = bytes_of(values, dtypes.of_kv)
    return Attending(heads, kv_heads, head_dim, key_bytes, most, ratio, latent_dim, indexes)
