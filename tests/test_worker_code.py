"""Machine code of the threads beside the host's: experts in every format, as torch computes them; flags and reads."""

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from prestage.calibration.device import worker_code as code

HIDDEN, FF = 256, 128


def packed(matrices: list[torch.Tensor], form: str) -> tuple[Any, list[torch.Tensor]]:
    """The bytes of an expert in a format, and the matrices that they stand for."""
    if form in ("float32", "bfloat16"):
        typed = [matrix.to(getattr(torch, form)) for matrix in matrices]
        raw = torch.cat([matrix.reshape(-1) for matrix in typed]).view(torch.uint8)
        return raw.numpy(), [matrix.float() for matrix in typed]
    most = 127 if form == "int8" else 7
    values, scales, meant = [], [], []
    for matrix in matrices:
        groups = matrix.reshape(-1, code.GROUP)
        scale = (groups.abs().amax(1) / most).bfloat16()
        value = torch.round(groups / scale.float()[:, None]).clamp(-most, most)
        meant.append((value * scale.float()[:, None]).reshape(matrix.shape))
        values.append(value.reshape(-1))
        scales.append(scale)
    flat = torch.cat(values)
    if form == "int8":
        raw = flat.to(torch.int8).view(torch.uint8)
    else:
        pairs = (flat + 8).to(torch.uint8).reshape(-1, 2)
        raw = pairs[:, 0] | (pairs[:, 1] << 4)
    return torch.cat([raw, torch.cat(scales).view(torch.uint8)]).numpy(), meant


@pytest.mark.parametrize("form", code.FORMATS)
@pytest.mark.parametrize("matrices", [2, 3])
def test_experts_are_computed_as_torch_does_and_added_up_over_a_visit(form: str, matrices: int) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(FF, HIDDEN) * 0.1 for _ in range(matrices - 1)] + [torch.randn(HIDDEN, FF) * 0.1]
    raw, meant = packed(weights, form)
    raw = np.ascontiguousarray(raw)
    x = torch.randn(3, HIDDEN).bfloat16()
    tokens, results = x.view(torch.int16).numpy().view(np.uint16), np.zeros((3, HIDDEN), np.uint16)
    sums, between = np.full((3, HIDDEN), 7, np.float32), np.zeros((3, FF), np.float32)
    flags, shared = np.array([1, 0, 0], np.int32), np.zeros(4, np.int32)
    # The first of a visit over one token, the second over three.
    experts = np.array([[raw.ctypes.data, 1, 1, 0, 1, 1], [raw.ctypes.data, 3, 0, 1, 2, 2]], np.int64)
    needs, times = np.array([0, 1], np.int64), np.zeros((2, 2), np.int64)
    pointers = np.array([flags.ctypes.data, shared.ctypes.data], np.int64)
    shape = np.array([HIDDEN, FF, matrices, raw.nbytes], np.int64)
    args = (code.FORMATS.index(form), shape, experts, needs, pointers, tokens, between, sums, results, times)
    threads = [threading.Thread(target=code.compute_all, args=(number, 2, *args)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, *others, last = meant
    inner = (x.float() @ first.t()).relu()
    wanted = (inner * (x.float() @ others[0].t()) if others else inner) @ last.t()
    wanted[0] *= 2
    torch.testing.assert_close(torch.from_numpy(sums), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.from_numpy(results.view(np.int16)).view(torch.bfloat16).float(), wanted, rtol=1e-2, atol=1e-2
    )
    assert flags.tolist() == [1, 1, 1]
    assert 0 < times[0, 0] <= times[0, 1] <= times[1, 0] <= times[1, 1]


def test_a_thread_waits_for_its_flag_and_its_clock_is_the_hosts() -> None:
    words, own = np.zeros(2, np.int32), np.zeros(2, np.int64)
    took: list[int] = []

    def wait() -> None:
        assert code.wait_until(words.ctypes.data, 1, words.ctypes.data + 4)
        took.append(code.now_ns(own))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.01)
    assert not took
    set_ns = time.perf_counter_ns()
    words[0] = 1
    thread.join()
    assert set_ns <= took[0] <= time.perf_counter_ns()


def test_nobody_waits_any_more_once_something_failed() -> None:
    words = np.array([0, 1], np.int32)
    assert not code.wait_until(words.ctypes.data, 1, words.ctypes.data + 4)
