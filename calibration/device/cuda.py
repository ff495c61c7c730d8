"""What runs on the GPU: torch's CUDA calls in one place, and the kernel groups that stand for a model's parts.

A call is `(function, args)`, and a kernel group a tuple of calls that allocate nothing: weights, inputs and outputs
exist beforehand, so that launching is all that is left to do, and to time. With CUDA graphs a group is one call.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from ...dtypes import bits_of
from ...engine.costs.surface_costs import DENSE_PRODUCTS, product_width
from ...errors import InputError
from ...workloads.model import Model
from .attention import Attended, Caches

#: Something to call, and with what.
Call = tuple[Callable[..., Any], tuple[Any, ...]]
Calls = tuple[Call, ...]

#: The element types that products can be made in.
EXECUTABLE_DTYPES = ("float32", "bfloat16", "float16")

NO_CUDA = "no CUDA GPU: run it where torch finds one, or simulate with a shipped profile ({profiles})"


class CudaError(InputError):
    """There is no GPU to run on, or the model has parts that cannot be run there."""


class Gpu:
    """One CUDA GPU through torch: memory, streams, events and graphs. Raises CudaError if there is none."""

    def __init__(self, index: int = 0) -> None:
        import torch

        from ...resources.profile import profile_names

        if not torch.cuda.is_available():
            raise CudaError(NO_CUDA.format(profiles=", ".join(profile_names())))
        if not 0 <= index < torch.cuda.device_count():
            raise CudaError(f"--device {index}: torch finds {torch.cuda.device_count()} CUDA GPUs, numbered from 0")
        self.index = index
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(index)
        # Graphs are captured on one stream, whose workspaces exist once something has run there.
        self._capture_stream = self.stream()

    def count(self) -> int:
        """Returns how many GPUs torch finds."""
        import torch

        return torch.cuda.device_count()

    def sibling(self, index: int) -> Gpu:
        """Returns another GPU; the current one stays the current one."""
        import torch

        other = Gpu(index)
        torch.cuda.set_device(self.index)
        return other

    def empty(self, *shape: int, dtype: str = "uint8") -> Any:
        """Returns uninitialized GPU memory."""
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)

    def random(self, *shape: int, dtype: str, scale: float, seed: int) -> Any:
        """Returns normal random numbers with this standard deviation on the GPU."""
        import torch

        generator = torch.Generator(self.device).manual_seed(seed)
        numbers = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
        return numbers.normal_(0.0, scale, generator=generator)

    def host_empty(self, *shape: int, dtype: str = "uint8", pinned: bool = True) -> Any:
        """Returns uninitialized host memory."""
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=pinned)

    def stream(self) -> Any:
        """Returns a new stream."""
        import torch

        return torch.cuda.Stream(self.index)  # type: ignore[no-untyped-call]

    def use(self, stream: Any) -> Call:
        """Returns the call that makes a stream the current one."""
        import torch

        return torch.cuda.set_stream, (stream,)

    def event(self) -> Any:
        """Returns a new event that takes the time."""
        import torch

        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def write_flag(self, flags: Any, number: int, stream: Any) -> Call:
        """Returns the call that lets a stream write 1 to a word of pinned memory (words,) int32, behind its work."""
        return _driver().cuStreamWriteValue32_v2, (stream.cuda_stream, flags.data_ptr() + 4 * number, 1, 0)

    def wait_flag(self, flags: Any, number: int, stream: Any) -> Call:
        """Returns the call that makes a stream wait until a word of pinned memory is 1 or more."""
        return _driver().cuStreamWaitValue32_v2, (stream.cuda_stream, flags.data_ptr() + 4 * number, 1, 0)

    def between(self, target: Any, source: Any, stream: Any) -> Call:
        """Returns the call that copies bytes to or from another GPU, on a stream of either."""
        size_bytes = min(target.numel() * target.element_size(), source.numel() * source.element_size())
        return _driver().cuMemcpyAsync, (target.data_ptr(), source.data_ptr(), size_bytes, stream.cuda_stream)

    def meet(self, other: Gpu) -> None:
        """Let this GPU and another one reach each other's memory: torch opens the way at the first copy."""
        there = other.empty(1)
        here = self.empty(1)
        here.copy_(there)
        there.copy_(here)

    def graph_pool(self) -> Any:
        """Returns a new memory pool for graphs that are kept and dropped together."""
        import torch

        return torch.cuda.graph_pool_handle()

    def capture(self, calls: Calls, pool: Any) -> Any:
        """Returns a CUDA graph of what the calls launch; `replay` launches it on the current stream."""
        import torch

        with torch.cuda.stream(self._capture_stream):
            run(calls)  # makes what a first call makes: handles, workspaces, loaded kernels
            self._capture_stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool)
            run(calls)
            graph.capture_end()
        return graph

    def launches(self, calls: Calls) -> int:
        """Returns how many kernels, copies and fills the calls launch: the nodes of a CUDA graph of them."""
        import torch

        with torch.cuda.stream(self._capture_stream):
            run(calls)
            self._capture_stream.synchronize()
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            graph.capture_begin()
            run(calls)
            graph.capture_end()
        count = ctypes.c_size_t()
        _driver().cuGraphGetNodes(graph.raw_cuda_graph(), None, ctypes.byref(count))
        return count.value

    def spin(self, ns: int) -> None:
        """Keep the current stream busy for `ns` or longer, if the GPU runs at less than 2 GHz."""
        import torch

        torch.cuda._sleep(2 * ns)  # type: ignore[no-untyped-call]  # in cycles

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        import torch

        torch.cuda.synchronize(self.index)

    def free_bytes(self) -> int:
        """Returns how much GPU memory is free."""
        import torch

        return int(torch.cuda.mem_get_info(self.index)[0])

    def release(self) -> None:
        """Give memory that nothing uses any more back to the GPU."""
        import torch

        torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """Returns the device's name, its driver and the versions that matter."""
        import torch

        return {
            "device": torch.cuda.get_device_name(self.index),
            "gpu_memory_bytes": torch.cuda.get_device_properties(self.index).total_memory,
            "driver": _driver_version(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        }


@cache
def _driver() -> Any:
    """Returns the CUDA driver's library with the calls that torch has not; each raises CudaError if it fails."""
    word, size, address = ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p
    library = ctypes.CDLL("libcuda.so.1")
    for name, types in (
        ("cuStreamWriteValue32_v2", (address, size, word, word)),
        ("cuStreamWaitValue32_v2", (address, size, word, word)),
        ("cuMemcpyAsync", (size, size, size, address)),
        ("cuGraphGetNodes", (address, address, ctypes.POINTER(size))),
    ):
        function = getattr(library, name)
        function.argtypes, function.errcheck = types, _check_driver
    return library


def _check_driver(status: int, function: Any, args: Any) -> int:
    if status:
        raise CudaError(f"{function.__name__}: CUDA driver error {status}")
    return status


def _driver_version() -> str:
    """Returns the version of the NVIDIA driver, as the kernel module says it."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0].split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def run(calls: Calls) -> None:
    """Make the calls."""
    for function, args in calls:
        function(*args)


class Workload:
    """The kernel groups of a model: dense parts, experts in slots, the head; each eager or as one CUDA graph.

    Experts lie in `slots` (slots, expert_bytes) uint8, the first matrices of each slot being its weights. Inputs are
    constant, so that nothing grows or fades over a run. `most_tokens` bounds the tokens of any group.

    Where memory lies makes the same kernels faster or slower, up to a fifth for a dense part of many short ones. So
    workloads that are to be compared take all but the slots from one `shared` dictionary, which the first ones fill.

    Raises CudaError if the model's weights are of a type or size that cannot be run.
    """

    def __init__(
        self,
        gpu: Any,
        model: Model,
        slots: Any,
        *,
        most_tokens: int,
        graphs: bool,
        shared: dict[Any, Any] | None = None,
    ) -> None:
        self._gpu, self._model, self._slots, self._graphs = gpu, model, slots, graphs
        experts = model.expert_dtype in EXECUTABLE_DTYPES  # others are computed on the CPU alone
        if wrongs := without_kernels(model, experts=experts):
            raise CudaError("; ".join(wrongs))
        self._pool = gpu.graph_pool() if graphs else None
        hidden, dtype = model.hidden, model.dense_dtype
        self._width = dense_width(model)
        self._shared = {} if shared is None else shared
        self._x = self._random("x", most_tokens, hidden, dtype=dtype, scale=1.0, seed=1)
        self._y = self._empty("y", most_tokens, hidden, dtype=dtype)
        self._inner = self._empty("inner", most_tokens * max(self._width), dtype=dtype)
        self._dense_weights = [self._weights(layer) for layer in range(model.layers)]
        vocabulary = product_width(hidden, dtype, 1, model.head_bytes)
        self._head_weights = self._random("head", vocabulary, hidden, dtype=dtype, scale=hidden**-0.5, seed=2)
        self._logits = self._empty("logits", most_tokens, vocabulary, dtype=dtype)
        dtype, inner = model.expert_dtype if experts else dtype, model.expert_ff
        self._expert_x = self._random("expert x", most_tokens, hidden, dtype=dtype, scale=1.0, seed=3)
        self._expert_y = self._empty("expert y", most_tokens, hidden, dtype=dtype)
        self._gate, self._up = (self._empty(name, most_tokens, inner, dtype=dtype) for name in ("gate", "up"))
        self._most_tokens = most_tokens
        self._caches = Caches(gpu, model.dense_dtype)
        self.dense = cache(self._dense)
        self.expert = cache(self._expert)
        self.head = cache(self._head)
        self.predict = cache(self._predict)

    @property
    def tokens(self) -> Any:
        """The hidden states that dense parts begin with (most_tokens, hidden)."""
        return self._x

    @property
    def inputs(self) -> Any:
        """The hidden states that experts begin with (most_tokens, hidden)."""
        return self._expert_x

    @property
    def output(self) -> Any:
        """What the last expert's group wrote (most_tokens, hidden)."""
        return self._expert_y

    def _weights(self, layer: int) -> list[tuple[Any, Any]]:
        """Returns the dense part's pairs of matrices, (width, hidden) and (hidden, width)."""
        hidden, width, dtype = self._model.hidden, self._width[layer], self._model.dense_dtype
        pairs = []
        for pair in range(DENSE_PRODUCTS // 2):
            seed = 10 + layer * DENSE_PRODUCTS + pair
            into = self._random(("into", layer, pair), width, hidden, dtype=dtype, scale=hidden**-0.5, seed=seed)
            out = self._random(("out", layer, pair), hidden, width, dtype=dtype, scale=width**-0.5, seed=seed)
            pairs.append((into, out))
        return pairs

    def _random(self, name: Any, *shape: int, dtype: str, scale: float, seed: int) -> Any:
        return self._kept(name, shape, lambda: self._gpu.random(*shape, dtype=dtype, scale=scale, seed=seed))

    def _empty(self, name: str, *shape: int, dtype: str) -> Any:
        return self._kept(name, shape, lambda: self._gpu.empty(*shape, dtype=dtype))

    def _kept(self, name: Any, shape: tuple[int, ...], make: Callable[[], Any]) -> Any:
        """Returns the shared memory of a name, which this model's workloads of this shape made or make now."""
        key = (self._model.name, name, shape)
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _group(self, products: Sequence[Call], kernels: int, filler: Call, attention: Sequence[Call] = ()) -> Calls:
        """Spread elementwise kernels evenly behind the products, up to `kernels`; a graph makes one call of all.

        Attention is among the kernels, behind the first pair of products.
        """
        calls: list[Call] = []
        missing = max(0, kernels - len(products) - len(attention))
        for number, product in enumerate(products):
            calls.append(product)
            behind = missing * (number + 1) // len(products) - missing * number // len(products)
            calls += [filler] * behind
            if number == 1:
                calls += attention
        return self._launched(tuple(calls))

    def _launched(self, calls: Calls) -> Calls:
        if self._graphs:
            return ((self._gpu.capture(calls, self._pool).replay, ()),)
        run(calls)  # so that no first launch is timed
        return calls

    def _dense(self, layer: int, tokens: int, attended: tuple[Attended, ...] = ()) -> Calls:
        """Returns the group of a layer's dense part over `tokens` tokens: products of its weight bytes and the rest."""
        x, y = self._x[:tokens], self._y[:tokens]
        width = self._width[layer]
        inner = self._inner[: tokens * width].view(tokens, width)
        products: list[Call] = []
        for into, out in self._dense_weights[layer]:
            products += [_product(x, into, inner), _product(inner, out, y)]
        attention = [self._caches.attention(layer, asked) for asked in attended]
        return self._group(products, self._model.dense_kernels, _negate(y), attention)

    def _expert(self, slot: int, tokens: int) -> Calls:
        """Returns the group of the expert in a slot over `tokens` tokens."""
        import torch

        model = self._model
        x, y, gate, up = self._expert_x[:tokens], self._expert_y[:tokens], self._gate[:tokens], self._up[:tokens]
        matrices = expert_matrices(model, self._slots[slot])
        calls = [_product(x, matrices[0], gate), (torch.relu_, (gate,))]
        if model.expert_matrices == 3:
            calls = [calls[0], _product(x, matrices[1], up), calls[1], _with_out("mul", gate, up, gate)]
        calls.append(_product(gate, matrices[-1], y))
        calls += [_negate(y)] * (model.expert_kernels - len(calls))
        return self._launched(tuple(calls))

    def _predict(self, tokens: int) -> Calls:
        """Returns a linear predictor over `tokens` tokens: a score for each expert, and the best of them."""
        import torch

        model = self._model
        dtype, shape = model.dense_dtype, (self._most_tokens, model.experts)
        weights = self._random("predictor", model.hidden, model.experts, dtype=dtype, scale=model.hidden**-0.5, seed=4)
        scores = self._empty("scores", *shape, dtype=dtype)[:tokens]
        best = self._empty("best", self._most_tokens, model.top_k, dtype=dtype)[:tokens]
        self.guesses = self._empty("guesses", self._most_tokens, model.top_k, dtype="int64")
        product = _with_out("mm", self._x[:tokens], weights, scores)
        top = partial(torch.topk, out=(best, self.guesses[:tokens])), (scores, model.top_k)
        return self._launched((product, top))

    def _head(self, tokens: int) -> Calls:
        """Returns the head's product over `tokens` tokens."""
        return self._launched((_product(self._x[:tokens], self._head_weights, self._logits[:tokens]),))


def expert_matrices(model: Model, slot: Any) -> list[Any]:
    """Returns the matrices of the expert that lies in a slot (bytes,): (ff, hidden) each, the last (hidden, ff)."""
    import torch

    count = model.hidden * model.expert_ff
    weights = slot[: expert_weights_bytes(model)].view(getattr(torch, model.expert_dtype))
    parts = [weights[at * count : (at + 1) * count] for at in range(model.expert_matrices)]
    last = parts.pop().view(model.hidden, model.expert_ff)
    return [part.view(model.expert_ff, model.hidden) for part in parts] + [last]


def expert_weights_bytes(model: Model) -> int:
    """Returns the bytes of an expert's matrices alone."""
    return model.expert_matrices * model.hidden * model.expert_ff * itemsize(model.expert_dtype)


def without_kernels(model: Model, *, experts: bool = True) -> list[str]:
    """Returns what is wrong with a model whose products cannot be made; nothing if they can."""
    wrongs = [
        f"model {model.name}: {key} = {dtype!r}: only {', '.join(EXECUTABLE_DTYPES)} can be executed"
        for key, dtype in (("expert_dtype", model.expert_dtype), ("dense_dtype", model.dense_dtype))
        if dtype not in EXECUTABLE_DTYPES and (experts or key == "dense_dtype")
    ]
    if experts and model.expert_dtype in EXECUTABLE_DTYPES and expert_weights_bytes(model) > min(model.expert_bytes):
        wrongs.append(f"model {model.name}: {min(model.expert_bytes)} bytes an expert do not hold its matrices")
    return wrongs


def dense_width(model: Model) -> list[int]:
    """Returns the inner width of each layer's dense products, so that they read about `model.dense_bytes`."""
    return [product_width(model.hidden, model.dense_dtype, DENSE_PRODUCTS, size) for size in model.dense_bytes]


def itemsize(dtype: str) -> int:
    """Returns the bytes of one element."""
    return int(bits_of(dtype)) // 8


def _product(x: Any, weights: Any, out: Any) -> Call:
    """Returns the call for x (tokens, in) times weights (out, in), transposed as a linear layer's."""
    return _with_out("mm", x, weights.t(), out)


def _negate(y: Any) -> Call:
    return _with_out("neg", y, y)


def _with_out(name: str, *operands: Any) -> Call:
    """Returns the call of a torch function that writes into its last operand."""
    import torch

    return partial(getattr(torch, name), out=operands[-1]), operands[:-1]
