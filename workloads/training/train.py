"""Training and recording one of our models: seeded, resumable, and bounded in time.

    python -m prestage.workloads.training.train --model guide --corpus FILE --out DIR [--steps N] [--resume]

Each batch is drawn by (seed, step), and the learning rate depends on the step alone, so that weights, Adam's moments
and the step are all there is to a run: a resumed one ends in the same bits as one that was never interrupted (on a
CPU; on a GPU the attention kernel's backward pass may add in another order each time). Checkpoints are safetensors.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...files import write_file
from . import run_command
from .corpus import Corpus
from .moe_lm import MoeConfig, MoeLm
from .record import record
from .report import Report, write_json

#: The models by name: the guide's 12 layers of 128 experts, and the many small experts of later models.
MODELS = {
    "guide": MoeConfig(
        vocabulary=8192, layers=12, experts=128, top_k=1, balance="aux_loss", balance_rate=0.01, expert_width=512
    ),
    "topk": MoeConfig(
        vocabulary=8192, layers=24, experts=64, top_k=6, balance="bias", balance_rate=0.001, expert_width=192,
        capacity_factor=1.5,
    ),
}  # fmt: skip


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, or another run's, in one line."""


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    AdamW with betas 0.9 and 0.95, weight decay 0.1 on matrices, gradients clipped at norm 1; the learning rate rises
    over `warmup_steps` and falls along a cosine to a tenth at `steps`. `batch` sequences a step, of domains drawn
    evenly.
    """

    steps: int
    batch: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    seed: int = 0

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step, 0-based."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))


class Batches:
    """The training text on a device; the batch of a step is a function of (seed, step)."""

    def __init__(self, corpus: Corpus, length: int, device: torch.device) -> None:
        streams = [corpus.stream(domain, held_out=False) for domain in range(len(corpus.domains))]
        for name, stream in zip(corpus.domains, streams, strict=True):
            if len(stream) <= length:
                raise InputError(f"text of {name}: {len(stream)} tokens: needs more than the context, {length}")
        self._sizes = np.array([len(stream) for stream in streams])
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._tokens = torch.from_numpy(np.concatenate(streams).astype(np.int32)).to(device)
        self._window = torch.arange(length + 1, device=device)
        self._length = length

    def draw(self, seed: int, step: int, batch: int) -> Tensor:
        """Returns the tokens of a step, (batch, length + 1) int64."""
        random = np.random.default_rng([seed, step])
        domain = random.integers(len(self._sizes), size=batch)
        start = self._starts[domain] + random.integers(self._sizes[domain] - self._length)
        at = torch.from_numpy(start).to(self._window.device)
        return self._tokens[at[:, None] + self._window].long()


class Run:
    """A model in training: its weights, the optimizer's moments and the number of steps done."""

    def __init__(self, config: MoeConfig, training: Training, device: torch.device) -> None:
        self.config, self.training, self.device = config, training, device
        torch.manual_seed(training.seed)
        with device:
            self.model = MoeLm(config)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            betas=(0.9, 0.95),
            fused=device.type == "cuda",
        )
        self.step = 0
        #: What `train` told of so far: step, loss, dropped, seconds.
        self.curve: list[dict[str, float]] = []

    def advance(self, batches: Batches) -> dict[str, Tensor]:
        """Train one step; return its loss and the share of choices dropped, on the device."""
        self.model.train()
        tokens = batches.draw(self.training.seed, self.step, self.training.batch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.rate(self.step)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            logits, balance_loss = self.model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        (loss + balance_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.rebalance()
        self.step += 1
        return {"loss": loss.detach(), "dropped": self.model.dropped()}

    def state(self) -> dict[str, Tensor]:
        """Returns all that the next step depends on, by name."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                state[f"optimizer.{key}.{name}"] = value
        return state

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        meta = json.dumps({"step": self.step, "curve": self.curve, **self._identity()})
        write_file(path, safetensors.torch.save(self.state(), metadata={"meta": meta}))

    def load(self, path: Path) -> None:
        """Take up a checkpoint. Raises CheckpointError if it is not of a run with these settings."""
        try:
            with safetensors.safe_open(path, framework="pt", device=str(self.device)) as content:
                meta = json.loads((content.metadata() or {})["meta"])
                names = list(content.keys())
                state = {name: content.get_tensor(name) for name in names}
        except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: not a checkpoint that this module wrote: {error}") from error
        for key, value in self._identity().items():
            if meta.get(key) != value:
                raise CheckpointError(f"{path}: {key}: {meta.get(key)}: this run has {value}: start anew, or elsewhere")
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        for name, parameter in self.model.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                self.optimizer.state[parameter][key] = state[f"optimizer.{key}.{name}"]
        self.step, self.curve = meta["step"], meta["curve"]

    def _identity(self) -> dict[str, Any]:
        return {"model": asdict(self.config), "training": asdict(self.training)}


def train(
    run: Run,
    batches: Batches,
    *,
    log_every: int = 50,
    time_limit_s: float = math.inf,
    checkpoint: Path | None = None,
    checkpoint_every: int = 500,
) -> Iterator[dict[str, float]]:
    """Train until all steps are done or the time is up; yield what is added to the run's curve.

    With a `checkpoint`, it is written every so many steps and at the end. The seconds of a resumed run go on from
    those of the curve.
    """
    began = time.perf_counter()
    before = run.curve[-1]["seconds"] if run.curve else 0.0
    while run.step < run.training.steps and time.perf_counter() - began < time_limit_s:
        values = run.advance(batches)
        if run.step % log_every == 0 or run.step == run.training.steps:
            # Reading a value waits for the device, which also keeps the time limit honest.
            line = {"step": run.step, **{name: float(value) for name, value in values.items()}}
            line["seconds"] = before + time.perf_counter() - began
            run.curve.append(line)
            yield line
        if checkpoint and run.step % checkpoint_every == 0:
            run.save(checkpoint)
    if checkpoint:
        run.save(checkpoint)


def _describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def record_run(name: str, run: Run, corpus: Corpus, out: Path, per_domain: int, guess_sequences: int) -> Report:
    """Record a trained model; write NAME(-guesses).safetensors and NAME-training.json, which is returned.

    The first holds `per_domain` held-out sequences of each domain, without predictions, which would be most of it; the
    second the first `guess_sequences` of them with predictions.
    """
    meta = {
        "model": f"prestage-{name}",
        "source": "recorded from a model of this project's own, trained by prestage.workloads.training; held-out text",
        "licence": "Apache-2.0 for the numbers; the text is not included",
        "corpus_sha256": corpus.digest,
    }
    recording = record(run.model, corpus, per_domain, meta)
    trace = recording.trace
    replace(trace, predictions=None).save(out / f"{name}.safetensors")
    trace.slice(sequences=np.unique(trace.sequence)[:guess_sequences].tolist()).save(
        out / f"{name}-guesses.safetensors"
    )
    facts = {
        "name": name,
        "model": asdict(run.config),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "training": asdict(run.training),
        "steps_done": run.step,
        "tokens_seen": run.step * run.training.batch * run.config.context,
        "training_seconds": run.curve[-1]["seconds"] if run.curve else 0.0,
        "curve": run.curve,
        "held_out_loss_nats": dict(zip(corpus.domains, recording.loss_nats.tolist(), strict=True)),
        "held_out_bits_per_byte": dict(zip(corpus.domains, recording.bits_per_byte.tolist(), strict=True)),
        "corpus": {"sha256": corpus.digest, "vocabulary": corpus.vocabulary, **corpus.meta},
        "device": _describe_device(run.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    write_json(out / f"{name}-training.json", facts)
    return facts


def main(arguments: list[str] | None = None) -> None:
    """Train and record one model."""
    parser = argparse.ArgumentParser(description="Train one of our models, record its routing over held-out text.")
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="what training.corpus wrote")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64, help="sequences a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    parser.add_argument("--checkpoint-every", type=int, default=500, help="steps between checkpoints; 0: none at all")
    parser.add_argument("--log-every", type=int, default=50, help="steps between lines of progress")
    parser.add_argument("--time-limit-s", type=float, default=math.inf, help="stop training after so long")
    parser.add_argument("--sequences-per-domain", type=int, default=48, help="held-out sequences to record")
    parser.add_argument("--guess-sequences", type=int, default=90, help="how many of them keep the gates' guesses")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    corpus = Corpus.load(given.corpus)
    given.out.mkdir(parents=True, exist_ok=True)
    config = replace(MODELS[given.model], vocabulary=corpus.vocabulary)
    training = Training(given.steps, given.batch, given.learning_rate, min(100, given.steps // 10 + 1), given.seed)
    run = Run(config, training, torch.device(given.device))
    checkpoint = given.out / f"{given.model}-checkpoint.safetensors"
    if given.resume:
        run.load(checkpoint)
    for line in train(
        run,
        Batches(corpus, config.context, run.device),
        log_every=given.log_every,
        time_limit_s=given.time_limit_s,
        checkpoint=checkpoint if given.checkpoint_every else None,
        checkpoint_every=given.checkpoint_every,
    ):
        print(given.model, json.dumps(line), flush=True)
    facts = record_run(given.model, run, corpus, given.out, given.sequences_per_domain, given.guess_sequences)
    shown = ("parameters", "steps_done", "tokens_seen", "training_seconds", "held_out_loss_nats", "device")
    print(json.dumps({key: facts[key] for key in shown}))


if __name__ == "__main__":
    run_command(main)
