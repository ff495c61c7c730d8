"""The trained predictor: its weights as a file, and its guesses. `prestage predictor train` makes it.

This is the guide's speculation model: experts of the last tokens and layers in, ranked experts of the layers ahead
out. What a file holds is read as numbers and one JSON string; nothing is ever unpickled. Guesses are computed in
double precision and rounded before they are ranked, so that they are the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from ..errors import InputError
from ..files import made_folder, write_file
from ..kept import KEPT, file_state, frozen
from .batches import Step
from .guesses import Guesses, Int64s, Run, best_of
from .network import Shape, logits
from .torch_threads import one_thread
from .trace import RoutingTrace

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]

#: The file's name in a folder of weights, and the version of what it holds.
WEIGHTS_FILE = "predictor.safetensors"
FORMAT = "prestage-predictor-1"
#: Logits are rounded to this before they are ranked: far above what two machines may differ by.
_LOGIT_STEP = 2.0**-10
_LARGEST_STEPS = 1 << 19
#: Tokens whose guesses are computed together.
_TOKENS_AT_ONCE = 64
_LATENCY_ROUNDS = 50


class WeightsError(InputError):
    """Weights that cannot be used: one line naming the file and what would be right."""


@dataclass(frozen=True, eq=False)
class Weights:
    """A trained network: its shape, its arrays (float16) by name, and how it was made (plain JSON data).

    `latency_us` is what one guess took when it was measured, by device type (cpu, cuda).
    """

    shape: Shape
    arrays: dict[str, npt.NDArray[np.float16]]
    made: dict[str, Any]
    source: str = "weights"
    latency_us: dict[str, float] = field(default_factory=dict)

    @property
    def memory_bytes(self) -> int:
        """The bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def tensors(self, dtype: str = "float64", device: str = "cpu") -> dict[str, Tensor]:
        """Returns the arrays as torch tensors of this type."""
        import torch

        # numpy widens halves many times faster than torch does.
        return {name: torch.from_numpy(a.astype(dtype)).to(device) for name, a in self.arrays.items()}

    def check_fits(self, trace: RoutingTrace) -> None:
        """Raise WeightsError if the trace is of a model of another shape than the one that these were trained for."""
        model = (self.shape.layers, self.shape.experts, self.shape.top_k)
        given = (trace.layers, trace.num_experts, trace.k)
        if model != given:
            name = trace.meta.get("model") or "given"
            raise WeightsError(
                f"{self.source}: trained for {_in_words(model)}, but the trace {name} has {_in_words(given)}: train on "
                "a trace of this model (prestage predictor train)"
            )

    def save(self, where: str | Path) -> Path:
        """Write the weights to a .safetensors file or into a folder, made if missing; return the file.

        The same weights give the same bytes; what a guess took is in a file of its own beside them, if it was measured.
        """
        path = Path(where)
        path = path if path.suffix == ".safetensors" else path / WEIGHTS_FILE
        meta = {"format": FORMAT, "shape": asdict(self.shape), "made": self.made}
        content = safetensors.numpy.save(self.arrays, metadata={"meta": json.dumps(meta, sort_keys=True)})
        with made_folder(path.parent):
            write_file(path, content)
            latency_file(path).unlink(missing_ok=True)
            if self.latency_us:
                data = {"weights_sha256": hashlib.sha256(content).hexdigest(), "latency_us": self.latency_us}
                write_file(latency_file(path), json.dumps(data, indent=2, sort_keys=True).encode() + b"\n")
        return path


def latency_file(weights: Path) -> Path:
    """Returns where it is noted what a guess by a file of weights takes."""
    return weights.with_suffix(".latency.json")


def _in_words(shape: tuple[int, int, int]) -> str:
    layers, experts, top_k = shape
    return f"{layers} layers of {experts} experts, top-{top_k}"


def shipped_weights() -> list[str]:
    """Returns the names of the weights that come with the package."""
    return sorted(entry.name.removesuffix(".safetensors") for entry in _shipped().iterdir() if _is_weights(entry.name))


def _shipped() -> Any:
    return resources.files("prestage") / "workloads" / "data"


def _is_weights(name: str) -> bool:
    return name.endswith("-predictor.safetensors")


def load_weights(source: str | Path) -> Weights:
    """Read weights: a folder that `predictor train` wrote, a .safetensors file, or the name of shipped ones.

    Raises WeightsError for whatever is wrong with the file or its content.
    """
    if str(source) in shipped_weights():
        with resources.as_file(_shipped()) as folder:
            return _kept(folder / f"{source}.safetensors", str(source))
    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if not path.is_file():
        known = ", ".join(shipped_weights())
        raise WeightsError(f"{path}: no such file: give a folder that `prestage predictor train` wrote, or {known}")
    return _kept(path, str(path))


def _kept(path: Path, source: str) -> Weights:
    """Returns the weights of a file, the same ones while neither it nor what was measured of it has changed."""
    key = ("weights", source, file_state(path), file_state(latency_file(path)))
    return KEPT.get(key, lambda: _read(path, source), lambda weights: frozen(weights.arrays.values()))


def _read(path: Path, source: str) -> Weights:
    try:
        with safetensors.safe_open(path, framework="numpy") as content:
            text = (content.metadata() or {}).get("meta", "")
            arrays = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, TypeError, AttributeError) as error:
        raise WeightsError(f"{source}: damaged, or no weights: {error}: train them again") from error
    try:
        meta = json.loads(text)
        if meta["format"] != FORMAT:
            raise InputError(f"format {meta['format']!r}")
        shape = Shape(**meta["shape"])
        made = dict(meta["made"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise WeightsError(f"{source}: its metadata is not that of a predictor ({error}): must be {FORMAT}") from error
    for name, wanted in shape.arrays().items():
        given = arrays[name].shape if name in arrays else "missing"
        if given != wanted or arrays[name].dtype != np.float16:
            raise WeightsError(f"{source}: array {name} is {given}: must be float16 {wanted}: train them again")
        if not np.isfinite(arrays[name]).all():
            raise WeightsError(f"{source}: array {name} holds numbers that are not finite: train them again")
    latency_us = made.pop("latency_us", None)  # where the weights of older versions have it
    if latency_us is None:
        latency_us = _read_latency(path)
    return Weights(shape, {name: arrays[name] for name in shape.arrays()}, made, source, latency_us)


def _read_latency(weights: Path) -> dict[str, float]:
    """Returns what was noted of these very weights; nothing if that was of others. Raises WeightsError."""
    path = latency_file(weights)
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_bytes())
        latency_us = {str(device): float(us) for device, us in data["latency_us"].items()}
        of_these = data["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path}: is not what `prestage predictor measure` writes ({error}): remove it") from error
    if not all(math.isfinite(us) and us >= 0 for us in latency_us.values()):
        raise WeightsError(f"{path}: latency_us = {latency_us}: must be finite, and none below 0")
    return latency_us if of_these else {}


class Learned:
    """Guesses what a network, trained beforehand, thinks likeliest.

    A guess knows the choices of its own token up to its layer and those of the sequence's earlier steps, as far back
    as the weights' context. The confidence is the network's probability that the expert is used.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def guess(self, trace: RoutingTrace, steps: Sequence[Step], horizons: int, n: int) -> Guesses:
        """Returns the likeliest experts.

        Raises ValueError also if the weights are of another model or do not look as far ahead.
        """
        run = Run.of(trace, steps, horizons, n)
        self.weights.check_fits(trace)
        reach = self.weights.shape.horizons
        if reach < horizons:
            raise WeightsError(
                f"{self.weights.source}: trained to guess {reach} layers ahead, not {horizons}: train with --horizons "
                f"{horizons} or ask for at most {reach}"
            )
        experts, confidences = run.no_guesses(n), run.no_confidences(n)
        for places, scores in self._scores(run):
            experts[places], confidences[places] = _ranked(scores, n, trace.k)
        return run.guesses(experts, confidences)

    def _scores(self, run: Run) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
        """Yields places and their logits (places, layers, horizons, experts), piece by piece."""
        import torch

        weights = self.weights.tensors()
        known = run.known_tokens(self.weights.shape.context)
        with torch.inference_mode(), one_thread():
            for first in range(0, len(known), _TOKENS_AT_ONCE):
                places = slice(first, first + _TOKENS_AT_ONCE)
                asked = gather(run.chosen, known[places])
                yield places, logits(weights, self.weights.shape, *asked, horizons=run.horizons).numpy()


def gather(chosen: npt.NDArray[np.int16], known: Int64s) -> tuple[Tensor, Tensor]:
    """Returns the network's `chosen` and `context` for tokens whose known places (tokens, context + 1) these are."""
    import torch

    needed, rows = np.unique(known, return_inverse=True)
    rows = np.where(known < 0, -1, rows.reshape(known.shape))
    return torch.from_numpy(chosen[needed].astype(np.int64)), torch.from_numpy(rows)


def _ranked(
    scores: npt.NDArray[np.float64], n: int, top_k: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float32]]:
    """Returns the n experts with the highest scores (…, experts), ties to the lower index, and how likely each is."""
    rounded = np.clip(np.round(scores / _LOGIT_STEP), -_LARGEST_STEPS, _LARGEST_STEPS)
    experts, _ = best_of(rounded.astype(np.int64) + (_LARGEST_STEPS + 1), n)
    scores = rounded * _LOGIT_STEP
    if top_k == 1:
        likely = np.exp(scores - scores.max(axis=-1, keepdims=True))
        likely /= likely.sum(axis=-1, keepdims=True)
    else:
        likely = 1 / (1 + np.exp(-scores))
    return experts, np.take_along_axis(likely, experts.astype(np.int64), axis=-1).astype(np.float32)


def measured(weights: Weights) -> Weights:
    """Returns the weights with what a guess takes on this machine's devices."""
    return replace(weights, latency_us={**weights.latency_us, **measure_latency(weights)})


def measure_latency(weights: Weights) -> dict[str, float]:
    """Returns the median time in microseconds of one guess, by device type: one token at one layer, all horizons.

    Single precision, nothing kept from the guess before, transfers not included. On a GPU it is one CUDA graph, as an
    engine would run it: its launch by kernels takes ten times as long.
    """
    import torch

    shape = weights.shape
    context = torch.arange(shape.context + 1)[None]
    chosen = torch.zeros((shape.context + 1, shape.layers, shape.top_k), dtype=torch.int64)
    found = {}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        tensors = weights.tensors("float32", device)
        guess = partial(logits, tensors, shape, chosen.to(device), context.to(device), layers=slice(0, 1))
        with torch.inference_mode():
            found[device] = _median_us(guess if device == "cpu" else _as_graph(guess))
    return found


def _as_graph(guess: Callable[[], object]) -> Callable[[], object]:
    """Returns what replays a computation on the current GPU as one CUDA graph and waits for its end."""
    import torch

    cuda: Any = torch.cuda
    side = cuda.Stream()
    with cuda.stream(side):  # a graph cannot allocate what the first calls of a library do
        for _ in range(3):
            guess()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        guess()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def _median_us(guess: Callable[[], object]) -> float:
    times = []
    for _ in range(_LATENCY_ROUNDS):
        began = time.perf_counter()
        guess()
        times.append(time.perf_counter() - began)
    return round(float(np.median(times)) * 1e6, 1)
