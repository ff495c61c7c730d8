"""Whole runs of FreeToken on random weights of a preset's shapes: how long a token takes, by slots and by who computes.

    python -m prestage.calibration.freetoken.runs qwen3-30b-a3b OUT.jsonl --layers 12 --threads 14 --seconds 240

FreeToken 0.1.2 must be installed. Its own offline engine decodes one sequence, in a process for each way: all misses
fetched ("offload"), shared with the processor ("hybrid", split as its own measurement of bandwidths says), all on the
processor ("cpu"). Slots are changed between runs, in rounds of shuffled order. Tokens are drawn from all alike, and a
layer's attention adds next to nothing to what its router sees, so that each token's experts are drawn anew: a global
LRU finds about the share of experts that it holds. Each line of OUT is what a process or a run came to, as it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from ...errors import InputError
from ...files import write_file
from ...workloads.model_files.mixers import GroupedQuery
from ...workloads.model_files.sources import read_shapes

#: Each way to run, and whether what is missed is counted, which costs a sharing engine kernels of its own.
WAYS = (("offload", True), ("hybrid", False), ("hybrid", True), ("cpu", False))
#: Slots as shares of all experts.
SHARES = (0.25, 0.5, 0.75, 1.0)
#: Decode tokens of a run: first those that warm the cache up, then those that count. Tokens of its prompt.
WARMUP, TOKENS, _PROMPT = 64, 128, 16
#: So hot that every token is as likely as any.
_TEMPERATURE = 1e4
#: What is left of attention's last product, beside the experts'.
_ATTENTION = 1e-3


def write_checkpoint(model: str, layers: int, folder: Path) -> None:
    """Write the files of a model that FreeToken reads before it draws weights.

    Raises InputError for a model that is not of Qwen3-MoE's kind.
    """
    import tokenizers
    import transformers

    shapes = read_shapes(model)
    mixer, moe = shapes.attention, shapes.moe
    if not isinstance(mixer, GroupedQuery) or mixer.qk_norm != "head" or shapes.mixers or shapes.dense or moe.shared_ff:
        raise InputError(f"model {model!r}: give one of Qwen3-MoE's kind, such as qwen3-30b-a3b")
    config = transformers.AutoConfig.for_model(
        "qwen3_moe",
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=shapes.vocabulary, hidden_size=shapes.hidden, num_hidden_layers=layers,
        num_attention_heads=mixer.heads, num_key_value_heads=mixer.kv_heads, head_dim=mixer.head_dim,
        num_experts=moe.experts, num_experts_per_tok=moe.top_k, moe_intermediate_size=moe.expert_ff,
        max_position_embeddings=4096, dtype="bfloat16", norm_topk_prob=True,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(each): each for each in range(16)}, unk_token="0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)


def drawn_experts(config: Any, *, dtype: Any) -> tuple[list[Any], list[Any]]:
    """Returns pinned random experts of each layer, gate and up above one another, then down, in place of its own.

    Its own draws them on the processor, on one thread, which takes minutes.
    """
    import torch
    from freetoken.kernel.pinned import alloc_pinned_tensor

    inner, hidden = config.moe_intermediate_size, config.hidden_size
    found: tuple[list[Any], list[Any]] = ([], [])
    for _ in range(config.num_layers):
        for side, shape in zip(found, ((2 * inner, hidden), (hidden, inner)), strict=True):
            room = alloc_pinned_tensor(config.num_experts, *shape, dtype=dtype)
            room.copy_(torch.randn(room.shape, dtype=dtype, device="cuda") * shape[-1] ** -0.5)
            side.append(room)
    return found


def scale_dense(model: Any) -> None:
    """Give drawn dense weights the size that keeps a layer's output of the order of its input."""
    for name, weight in model.state_dict().items():
        if weight.dim() == 1:
            weight.fill_(1.0)
        elif "o_proj" in name:
            weight.mul_(_ATTENTION * weight.shape[-1] ** -0.5)
        else:
            weight.mul_(weight.shape[-1] ** -0.5)


def run_way(folder: Path, experts: int, way: str, counted: bool, options: argparse.Namespace) -> None:
    """Run one engine over all slots until the time is over; a line of JSON for each run."""
    import torch
    from freetoken.core import SamplingParams
    from freetoken.llm import LLM
    from freetoken.models import weight

    weight.dummy_moe_expert_sources = drawn_experts

    class Timed(LLM):  # type: ignore[misc]
        """The engine, which also keeps when it got each token."""

        stamps: list[float] = []

        def offline_send_result(self, reply: Any) -> None:
            """Keep the instant, then do what it does."""
            self.stamps.append(perf_counter())
            super().offline_send_result(reply)

    began = monotonic()
    first = experts if way != "cpu" else 0
    engine = Timed(
        str(folder), use_dummy_weight=True, moe_backend=way, moe_cache_size=first, moe_cpu_threads=options.threads,
        moe_collect_stats=counted, max_running_req=1, num_token_override=4096, memory_ratio=0.8,
        cache_type="naive",
    )  # fmt: skip
    scale_dense(engine.engine.model)
    cache = engine.engine.moe_offload_cache
    _write(options.out, {"way": way, "counted": counted, "started_s": monotonic() - began})
    sampling = SamplingParams(temperature=_TEMPERATURE, ignore_eos=True, max_tokens=WARMUP + TOKENS)
    for number in range(1 if counted and way == "hybrid" else options.rounds):
        shares = [0.0] if way == "cpu" else random.Random(number).sample(SHARES, len(SHARES))
        for place, share in enumerate(shares):
            slots = round(share * experts)
            if slots and slots != cache.cache_size:
                engine.rebuild_cache(moe_cache_size=slots)
            if counted:
                cache.reset_stats()
            engine.stamps = []
            prompt = torch.randint(16, 1000, (_PROMPT,), generator=torch.Generator().manual_seed(number)).tolist()
            engine.generate([prompt], sampling)
            steps = [after - before for before, after in zip(engine.stamps, engine.stamps[1:], strict=False)][WARMUP:]
            row = {"way": way, "slots": slots, "experts": experts, "round": number, "place": place, "steps_s": steps,
                   "fetched_share": getattr(cache, "hybrid_fetch_fraction", None)}  # fmt: skip
            _write(options.out, row | ({"missed": cache.decode_miss_stats()} if counted else {}))
            if monotonic() - began > options.longest:
                return


def _write(out: Path, row: dict[str, Any]) -> None:
    write_file(out, (out.read_bytes() if out.exists() else b"") + json.dumps(row).encode() + b"\n")


def _children(options: argparse.Namespace) -> int:
    """Run its own measurement of bandwidths, then each way, in processes of their own; return how many ended well."""
    began, well = monotonic(), 0
    folder = options.out.with_suffix(".model")
    write_checkpoint(options.model, options.layers, folder)
    profile = options.out.with_suffix(".bandwidths.json")
    environment = {**os.environ, "FREETOKEN_BENCHBW_PATH": str(profile), "HF_HUB_OFFLINE": "1"}
    bench = ["bench", "bw", "--dtype", "bf16", "--cpu-threads", str(options.threads), "-o", str(profile)]
    commands = [[sys.executable, "-c", f"from freetoken.cli import main; main({bench!r})"]]
    for way, counted in WAYS:
        more = ["--layers", str(options.layers), "--threads", str(options.threads), "--rounds", str(options.rounds)]
        commands.append([sys.executable, "-m", __spec__.name, options.model, str(options.out), *more, "--way", way])
        commands[-1] += ["--counted"] if counted else []
    for number, command in enumerate(commands):
        left_s = options.seconds - (monotonic() - began)
        share = {0: 3.0, 1: 2.0}.get(number, 1.3)  # the first ones compile kernels
        longest = min(max(5.0, left_s), left_s / (len(commands) - number) * share)
        command += ["--longest", str(0.7 * longest)] if number else []
        _write(options.out, {"command": command[2:]})
        try:
            ended = subprocess.run(command, env=environment, timeout=longest, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, check=False)  # fmt: skip
            said, status = ended.stdout, ended.returncode
        except subprocess.TimeoutExpired as error:
            said, status = (error.stdout or b"").decode(errors="replace"), -1
        _write(options.out, {"status": status, "messages": said[-3000:]})
        well += status == 0
    return well


def main(arguments: list[str] | None = None) -> int:
    """Run it; return the status for the shell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--longest", type=float, default=60.0, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=sorted({way for way, _ in WAYS}), help=argparse.SUPPRESS)
    parser.add_argument("--counted", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.way is None:
        try:
            return 0 if _children(options) else 1
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    experts = options.layers * read_shapes(options.model).moe.experts
    run_way(options.out.with_suffix(".model"), experts, options.way, options.counted, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
