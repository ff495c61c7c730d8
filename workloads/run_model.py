"""Load a transformers model, feed it text, and record how it routes: what `prestage trace record` does.

Text is cut into sequences whose first tokens are the prompt and whose others are decoded as they stand, one at a time
through the cache; a prompt is continued with what the model itself finds likeliest. Either way each sequence
is a prefill followed by decode steps, as a serving engine runs them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bounded import read
from .recorder import RecordError, cache_name, family_of, record
from .trace import RoutingTrace

if TYPE_CHECKING:
    from torch import Tensor

#: For how long the hub is waited for, once.
_HUB_S = 5
#: Called with what is being done, how much is done, and how much there is.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RecordConfig:
    """How text is fed.

    - `sequence_tokens`: length of a sequence cut from text; what is left over at a file's end is not used.
    - `prompt_tokens`: how many of them are prefilled.
    - `new_tokens`: how many tokens follow a prompt, unless the model ends it before.
    - `batch`: sequences that run together. `sequences`: how many to run at most; None: all.
    - `guesses`, `runners_up`: as `record` takes them. `device`: as torch names it, or auto: a GPU if there is one.
    """

    sequence_tokens: int = 256
    prompt_tokens: int = 64
    new_tokens: int = 64
    batch: int = 8
    sequences: int | None = None
    guesses: int = 0
    device: str = "auto"
    runners_up: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "batch", "sequences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecordError(f"{name} = {value}: must be at least 1")
        if self.sequence_tokens < self.prompt_tokens:
            raise RecordError(f"sequence_tokens = {self.sequence_tokens}: must be at least prompt_tokens")


@dataclass(frozen=True)
class _Sequence:
    """A prompt, and the tokens that follow it; None: the model says."""

    prompt: list[int]
    rest: list[int] | None


def record_files(
    name: str,
    texts: Sequence[Path] = (),
    prompts: Sequence[Path] = (),
    config: RecordConfig | None = None,
    progress: Progress | None = None,
) -> RoutingTrace:
    """Returns the trace of the model `name`, a folder or a name on the hub, over text files and files of prompts.

    A file of prompts holds one a line. `meta.text` names the files and their SHA-256. Raises RecordError for what
    cannot be read, loaded or recorded.
    """
    config = config or RecordConfig()
    if not texts and not prompts:
        raise RecordError("nothing to run: give at least one file of text or of prompts")
    contents = {path: _read_text(path) for path in [*texts, *prompts]}
    loader = _Loader(name)
    tokenizer = loader.tokenizer()
    sequences = [each for path in texts for each in _cut(path, contents[path], tokenizer, config)]
    for path in prompts:
        lines = [line for line in contents[path].splitlines() if line.strip()]
        sequences += [_Sequence(tokenizer(line).input_ids, None) for line in lines]
    sequences = sequences[: config.sequences]
    model = loader.model(config.device)
    # Whether a row has ended is for _run to say: text may hold the end token anywhere.
    with record(model, guesses=config.guesses, until_end=False, runners_up=config.runners_up) as trace:
        _run_all(model, sequences, config, progress)
    trace.meta["text"] = [
        {"file": path.name, "sha256": hashlib.sha256(content.encode()).hexdigest()}
        for path, content in contents.items()
    ]
    return trace


def _read_text(path: Path) -> str:
    try:
        text = read(path, RecordError).decode("utf-8")
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: byte {error.start}: not UTF-8 text: convert it") from error
    if not text.strip():
        raise RecordError(f"{path}: holds no text")
    return text


class _Loader:
    """What transformers loads by a model's name, the cheap things first; RecordError for whatever goes wrong."""

    def __init__(self, name: str) -> None:
        try:
            import huggingface_hub
            import transformers
        except ImportError as error:
            raise RecordError("recording needs transformers: pip install 'prestage[record]'") from error
        # The hub's client logs each try of a name that it cannot reach; what is refused is one line.
        huggingface_hub.logging.set_verbosity(logging.ERROR)
        self._name, self._transformers = name, transformers
        if not Path(name).is_dir():
            self._check_on_hub(huggingface_hub.HfApi())
        self._config = self._load(transformers.AutoConfig)
        try:
            family_of(self._config)
        except RecordError as error:
            raise RecordError(f"model {name!r}: {error}") from error

    def _check_on_hub(self, hub: Any) -> None:
        """Raise RecordError for a name that is neither kept here nor on the hub: loading would ask again and again."""
        try:
            self._transformers.AutoConfig.from_pretrained(self._name, local_files_only=True)
        except (OSError, ValueError):
            try:
                hub.model_info(self._name, timeout=_HUB_S)
            except Exception as error:  # of whatever client the hub's library has
                why = " ".join(str(error).split()) or type(error).__name__
                raise RecordError(
                    f"model {self._name!r}: no such folder, and not to be had from the hub: {why}"
                ) from error

    def _load(self, kind: Any, **options: Any) -> Any:
        try:
            return kind.from_pretrained(self._name, **options)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise RecordError(f"model {self._name!r}: cannot be loaded: {' '.join(str(error).split())}") from error

    def tokenizer(self) -> Any:
        return self._load(self._transformers.AutoTokenizer)

    def model(self, device: str) -> Any:
        """Returns the model with its weights on the device, ready to run."""
        import torch

        has_encoder = self._config.is_encoder_decoder
        model = self._load(
            self._transformers.AutoModelForSeq2SeqLM if has_encoder else self._transformers.AutoModelForCausalLM,
            dtype="auto",
        )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            return model.to(device).eval()
        except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
            raise RecordError(f"device = {device!r}: {' '.join(str(error).split())}") from error


def _cut(path: Path, text: str, tokenizer: Any, config: RecordConfig) -> list[_Sequence]:
    """Cut a file's tokens into sequences; each begins as the tokenizer begins every text."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    first = tokenizer("a").input_ids[:1]
    start = first if first == [tokenizer.bos_token_id] else []
    size = config.sequence_tokens - len(start)
    if len(tokens) < size:
        raise RecordError(f"{path}: {len(tokens)} tokens: fewer than sequence_tokens = {config.sequence_tokens}")
    whole = [start + tokens[at : at + size] for at in range(0, len(tokens) - size + 1, size)]
    return [_Sequence(each[: config.prompt_tokens], each[config.prompt_tokens :]) for each in whole]


def _run_all(model: Any, sequences: list[_Sequence], config: RecordConfig, progress: Progress | None) -> None:
    """Run the sequences, those of text and those of prompts apart, `batch` at a time."""
    done = 0
    for is_text in (True, False):
        group = [each for each in sequences if (each.rest is not None) == is_text]
        for at in range(0, len(group), config.batch):
            together = group[at : at + config.batch]
            _run(model, together, config)
            done += len(together)
            if progress is not None:
                progress("sequences", done, len(sequences))


def _run(model: Any, together: list[_Sequence], config: RecordConfig) -> None:
    """Prefill a batch, padded on the left, and decode it to its end."""
    import torch

    longest = max(len(each.prompt) for each in together)
    padded = [[0] * (longest - len(each.prompt)) + each.prompt for each in together]
    mask = [[0] * (longest - len(each.prompt)) + [1] * len(each.prompt) for each in together]
    rests = [each.rest for each in together if each.rest is not None]
    steps = len(rests[0]) if rests else config.new_tokens
    with torch.inference_mode():
        runner = _Runner(model, torch.tensor(padded, device=model.device), torch.tensor(mask, device=model.device))
        logits = runner.prefill()
        alive = torch.ones((len(together), 1), dtype=torch.bool, device=model.device)
        for step in range(steps):
            if rests:
                token = torch.tensor([[rest[step]] for rest in rests], device=model.device)
            else:
                token = logits[:, -1:].argmax(dim=-1)
                alive = alive & ~torch.isin(token, _ends(model))
            if not alive.any():
                return
            logits = runner.decode(token, alive)


def _ends(model: Any) -> Tensor:
    import torch

    end = model.generation_config.eos_token_id
    return torch.tensor([] if end is None else end, dtype=torch.int64, device=model.device).reshape(-1)


class _Runner:
    """Runs a batch step by step through the cache.

    Of a model with an encoder, that reads the prompt, and its decoder then begins with the model's start token.
    """

    def __init__(self, model: Any, prompt: Tensor, mask: Tensor) -> None:
        self._model, self._prompt, self._prompt_mask = model, prompt, mask
        self._encoded: Any = None
        self._mask = mask
        self._cache: Any = None
        self._cache_name = cache_name(model)

    def prefill(self) -> Tensor:
        """Run the prompt; return the logits (batch, columns, vocabulary)."""
        if not self._model.config.is_encoder_decoder:
            return self._step(self._prompt)
        self._encoded = self._model.get_encoder()(input_ids=self._prompt, attention_mask=self._prompt_mask)
        self._mask = self._prompt_mask.new_ones((len(self._prompt), 1))
        start = self._model.config.decoder_start_token_id or 0
        return self._step(self._prompt.new_full((len(self._prompt), 1), start))

    def decode(self, token: Tensor, alive: Tensor) -> Tensor:
        """Run one token (batch, 1) of the rows that are alive (batch, 1); the others are padding from here on."""
        import torch

        self._mask = torch.cat([self._mask, alive.to(self._mask.dtype)], dim=1)
        return self._step(token)

    def _step(self, tokens: Tensor) -> Tensor:
        if self._encoded is None:
            inputs = {
                "input_ids": tokens,
                "attention_mask": self._mask,
                "position_ids": (self._mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -tokens.shape[1] :],
            }
        else:
            inputs = {
                "encoder_outputs": self._encoded,
                "attention_mask": self._prompt_mask,
                "decoder_input_ids": tokens,
                "decoder_attention_mask": self._mask,
            }
        output = self._model(**inputs, **{self._cache_name: self._cache}, use_cache=True)
        self._cache = getattr(output, self._cache_name)
        logits: Tensor = output.logits
        return logits
