"""The recorder against the models themselves: tiny, randomly initialized ones of every family, no download."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prestage import cli, record
from prestage.workloads.recorder import FAMILIES, GUESSES, RecordError
from prestage.workloads.run_model import RecordConfig, record_files
from prestage.workloads.trace import RoutingTrace

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="transformers (the extra `record`) is not installed")

_SIZE = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "moe_intermediate_size": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 4,
    "topk_group": 2,
}
#: A tiny configuration of each family: what it needs beside _SIZE.
TINY: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 10, "num_experts_per_tok": 4, "moe_intermediate_size": 8},
    "qwen3_moe": {"num_experts": 20, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "head_dim": 8},
    "deepseek_v2": {**_LATENT, "n_routed_experts": 16, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_LATENT, "n_routed_experts": 16},
    "olmoe": {"num_experts": 18, "num_experts_per_tok": 4},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 4, "head_dim": 8, "sliding_window": 4},
    "phimoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "switch_transformers": {
        "d_model": 16,
        "d_ff": 24,
        "d_kv": 8,
        "num_hidden_layers": 4,
        "num_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_decoder_layers": 4,
        "num_sparse_decoder_layers": 2,
        "num_heads": 2,
        "num_experts": 6,
        "expert_capacity": 64,
        "decoder_start_token_id": 0,
    },
}
DECODERS = [name for name in FAMILIES if name != "switch_transformers"]


def tiny(family: str, **changes: Any) -> Any:
    torch.manual_seed(sorted(FAMILIES).index(family))
    config = transformers.AutoConfig.for_model(family, **{**_SIZE, **TINY[family], **changes})
    kind = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    model = getattr(transformers, kind).from_config(config).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "router" in name or ".gate." in name:  # they begin near or at 0: all experts alike
            torch.nn.init.normal_(tensor)
    return model


def padded(rows: list[int], columns: int, seed: int = 0) -> tuple[Any, Any]:
    """Returns random tokens and a mask with padding on the left, `rows` real tokens in each row."""
    ids = torch.randint(3, 60, (len(rows), columns), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(columns)[None] >= columns - torch.tensor(rows)[:, None]
    return ids * mask, mask.to(torch.int64)


def routed(model: Any, **inputs: Any) -> list[tuple[Any, ...]]:
    """Returns what each router returned, in order of the model's layers, from the model's own modules."""
    outputs: list[tuple[Any, ...]] = []
    router = FAMILIES[model.config.model_type].router
    modules = [module for module in model.modules() if type(module).__name__ == router]
    handles = [module.register_forward_hook(lambda _, __, output: outputs.append(output)) for module in modules]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return outputs


def test_every_family_of_the_table_is_tested() -> None:
    assert TINY.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", DECODERS)
def test_the_recorded_choice_is_the_routers_own_token_by_token_under_padding(family: str) -> None:
    model = tiny(family)
    ids, mask = padded([5, 9, 2], 9)
    with torch.no_grad(), record(model) as trace:
        model(input_ids=ids, attention_mask=mask)
    trace.check()
    outputs = routed(model, input_ids=ids, attention_mask=mask)
    real = mask.bool().reshape(-1)
    assert trace.layers == len(outputs)
    for layer, (logits, weights, experts) in enumerate(outputs):
        assert trace.num_experts == logits.shape[-1]
        np.testing.assert_array_equal(trace.experts[:, layer], experts[real])
        assert trace.weights is not None
        np.testing.assert_allclose(trace.weights[:, layer], weights[real], rtol=1e-3, atol=1e-6)
    assert trace.sequence.tolist() == [0] * 5 + [1] * 9 + [2] * 2
    assert trace.position.tolist() == [*range(5), *range(9), *range(2)]
    assert not trace.phase.any()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_the_recorded_choice_is_the_top_k_of_the_models_router_logits(family: str) -> None:
    model = tiny(family)
    ids, mask = padded([4, 7], 7)
    with torch.no_grad(), record(model) as trace:
        output = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
    for layer, logits in enumerate(output.router_logits):
        best = logits.reshape(-1, trace.num_experts).topk(trace.k).indices[mask.bool().reshape(-1)]
        np.testing.assert_array_equal(trace.experts[:, layer], best)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_a_grouped_router_is_not_taken_for_a_plain_one(family: str) -> None:
    # Experts come from 2 of 4 groups of 4: where the plain top-3 spans three groups, the choice must differ from it.
    model = tiny(family)
    ids, mask = padded([20], 20)
    with torch.no_grad(), record(model) as trace:
        model(input_ids=ids, attention_mask=mask)
    groups = trace.experts // 4
    assert max(len(set(chosen)) for row in groups.tolist() for chosen in row) <= 2
    logits = routed(model, input_ids=ids)[0][0]
    plain = np.sort(logits.topk(3).indices.numpy(), axis=-1)
    assert (np.sort(trace.experts[:, 0], axis=-1) != plain).any()


@pytest.mark.parametrize("family", DECODERS)
def test_generation_is_one_prefill_and_decode_steps_the_same_as_one_pass_over_it_all(family: str) -> None:
    model = tiny(family)
    ids, mask = padded([5, 3], 5)
    model.generation_config.eos_token_id = None
    with record(model) as trace:
        text = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    # The fifth new token is never fed.
    assert trace.phase.tolist() == [0] * 5 + [1] * 4 + [0] * 3 + [1] * 4
    assert trace.position.tolist() == [*range(9), *range(7)]
    whole = torch.cat([mask, torch.ones((2, 4), dtype=torch.int64)], dim=1)
    positions = (whole.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad(), record(model) as again:
        model(input_ids=text[:, :-1], attention_mask=whole, position_ids=positions)
    np.testing.assert_array_equal(np.sort(again.experts, axis=-1), np.sort(trace.experts, axis=-1))


def test_a_row_that_has_ended_is_not_recorded_while_others_go_on() -> None:
    model = tiny("mixtral")
    ids, mask = padded([4, 4], 4)
    model.generation_config.eos_token_id = None
    with record(model) as free:
        text = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    # Make the first row's second new token the end, provided that the other row does not say it that early.
    end = int(text[0, 5])
    length = text[1, 4:].tolist().index(end) if end in text[1, 4:].tolist() else 5
    assert length != 1, "choose another seed: the rows end together"
    first = text[0, 4:].tolist().index(end)
    model.generation_config.eos_token_id = end
    with record(model) as trace:
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert (trace.sequence == 0).sum() == 4 + first
    assert (trace.sequence == 1).sum() == 4 + length
    np.testing.assert_array_equal(trace.slice(sequences=[0]).experts, free.slice(sequences=[0]).experts[: 4 + first])


@pytest.mark.parametrize("family", DECODERS)
def test_a_guess_is_the_next_layers_router_on_this_layers_state(family: str) -> None:
    model = tiny(family)
    ids, mask = padded([6, 4], 6)
    inputs: list[Any] = []
    routers = [module for module in model.modules() if type(module).__name__ == FAMILIES[family].router]
    handles = [router.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for router in routers]
    with torch.no_grad(), record(model) as plain:
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    with torch.no_grad(), record(model, guesses=2) as trace:
        model(input_ids=ids, attention_mask=mask)
    np.testing.assert_array_equal(trace.experts, plain.experts)
    predictions = trace.predictions
    assert predictions is not None
    n = min(GUESSES, trace.num_experts)
    assert predictions.shape == (10, trace.layers, 2, n)
    with torch.no_grad():
        _, _, experts = routers[1](inputs[0])
    expected = experts.reshape(-1, trace.k)[mask.bool().reshape(-1)].numpy()
    # The router's own choice leads; all ranks are distinct experts.
    np.testing.assert_array_equal(np.sort(predictions[:, 0, 0, : trace.k], axis=-1), np.sort(expected, axis=-1))
    assert (np.diff(np.sort(predictions[:, 0, 0], axis=-1), axis=-1) > 0).all()
    assert (predictions[:, -1] == -1).all()
    assert (predictions[:, -2, 1] == -1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_runners_up_come_next_by_gate_on_the_scale_of_the_weights(family: str) -> None:
    model = tiny(family)
    ids, mask = padded([6, 4], 6)
    asked = {"decoder_input_ids": ids} if family == "switch_transformers" else {}
    with torch.no_grad(), record(model, runners_up=2) as trace:
        model(input_ids=ids, attention_mask=mask, **asked)
    trace.check()
    behind, weights = trace.extra["runners_up"], trace.extra["runners_up_weights"]
    assert behind.shape == weights.shape == (trace.tokens, trace.layers, 2)
    assert trace.weights is not None
    assert (np.diff(weights, axis=2) <= 0).all()
    if not family.startswith(("deepseek", "phimoe")):  # which choose by groups, or weigh each choice by itself
        assert (weights[..., 0] <= trace.weights.min(axis=2) + 1e-3).all()
    if family == "mixtral":  # whose router returns the softmax: the ratio of two gates is that of what it returns
        gates = routed(model, input_ids=ids, attention_mask=mask)[0][0].reshape(-1, trace.num_experts)
        gates = gates.softmax(dim=-1) if float(gates.min()) < 0 else gates
        first = np.take_along_axis(gates[mask.bool().reshape(-1)].numpy(), trace.experts[:, 0].astype(np.int64), 1)
        next_ = np.take_along_axis(gates[mask.bool().reshape(-1)].numpy(), behind[:, 0].astype(np.int64), 1)
        np.testing.assert_allclose(weights[:, 0] / trace.weights[:, 0, :1], next_ / first[:, :1], rtol=5e-3)


def test_an_encoder_decoder_has_prefill_in_the_encoders_layers_and_decode_in_the_decoders() -> None:
    model = tiny("switch_transformers")
    ids, mask = padded([6, 3], 6)
    model.generation_config.eos_token_id = None
    with record(model, guesses=1) as trace:
        text = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    trace.check()
    assert trace.layers == 4
    assert trace.phase.tolist() == [0] * 6 + [1] * 3 + [0] * 3 + [1] * 3
    assert trace.position.tolist() == [*range(9), *range(6)]
    assert trace.present is not None
    np.testing.assert_array_equal(trace.present[:, :2].all(axis=1), trace.phase == 0)
    np.testing.assert_array_equal(trace.present[:, 2:].all(axis=1), trace.phase == 1)
    outputs = routed(model, input_ids=ids, attention_mask=mask, decoder_input_ids=text[:, :-1])
    real = mask.bool()
    for layer, (one_hot, _, logits) in enumerate(outputs):
        rows = trace.present[:, layer]
        best = (logits[real] if layer < 2 else logits.reshape(-1, 6)).argmax(dim=-1)
        np.testing.assert_array_equal(trace.experts[rows, layer, 0], best)
        assert one_hot.sum(dim=-1).min() == 1 or layer < 2


def test_a_token_beyond_its_experts_capacity_is_not_present() -> None:
    model = tiny("switch_transformers", expert_capacity=1)
    ids, mask = padded([12], 12)
    start = torch.zeros((1, 1), dtype=torch.int64)
    with torch.no_grad(), record(model) as trace:
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=start)
    one_hot = routed(model, input_ids=ids, attention_mask=mask, decoder_input_ids=start)[0][0]
    assert trace.present is not None
    np.testing.assert_array_equal(trace.present[:12, 0], one_hot[0].any(dim=-1))
    assert 0 < trace.present[:12, 0].sum() <= 6  # six experts of one token each, and twelve tokens


def test_chunked_prefill_continues_the_cache() -> None:
    model = tiny("olmoe")
    ids, _ = padded([8], 8)
    with torch.no_grad(), record(model) as trace:
        output = model(input_ids=ids[:, :5], use_cache=True)
        model(input_ids=ids[:, 5:], cache=output.cache)
    with torch.no_grad(), record(model) as whole:
        model(input_ids=ids)
    np.testing.assert_array_equal(trace.experts, whole.experts)
    assert trace.position.tolist() == list(range(8))
    assert not trace.phase.any()


def test_steps_of_two_runs_that_take_turns_are_refused() -> None:
    model = tiny("mixtral")
    ids, _ = padded([4, 4], 4)
    with torch.no_grad(), pytest.raises(RecordError, match="continues a cache of 4 tokens"), record(model):
        first = model(input_ids=ids, use_cache=True)
        model(input_ids=ids[:, :3], use_cache=True)
        model(input_ids=ids[:, :1], cache=first.cache)


def test_nothing_is_left_on_the_model() -> None:
    model = tiny("mixtral")
    with pytest.raises(RuntimeError, match="mine"), record(model):
        raise RuntimeError("mine")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RecordError, match="no token ran"), record(model):
        pass


def test_a_model_without_routers_is_refused_in_one_line() -> None:
    gpt2 = transformers.AutoConfig.for_model("gpt2", n_layer=1, n_head=1, n_embd=8, vocab_size=9)
    with pytest.raises(RecordError, match=r"^model type 'gpt2' has no routers .*: choose a model of mixtral, "):
        record(transformers.AutoModelForCausalLM.from_config(gpt2)).__enter__()
    with pytest.raises(RecordError, match=r"^model type None has no routers"):
        record(torch.nn.Linear(2, 2)).__enter__()
    dense = tiny("qwen3_moe", mlp_only_layers=[0, 1, 2])
    with pytest.raises(RecordError, match="'qwen3_moe': no layer of this model has a router"), record(dense):
        pass


def test_without_transformers_the_command_says_what_to_install(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("a", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "transformers", None)
    options = ["--model", "m", "--text", tmp_path / "text.txt", "-o", tmp_path / "t.npz"]
    assert run("trace", "record", *options) == 2
    assert capsys.readouterr().err == "prestage: recording needs transformers: pip install 'prestage[record]'\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral as `save_pretrained` leaves it, with a tokenizer of 57 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "a": 4, **{f"w{number}": number for number in range(5, 60)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("model")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(path)
    tiny("mixtral").save_pretrained(path)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def command(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["prestage", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0)

    yield command


def words(numbers: Any) -> str:
    return " ".join(f"w{number}" for number in numbers)


def test_the_command_records_text_and_prompts(folder: Path, tmp_path: Path, run: Any) -> None:
    numbers = np.random.default_rng(0).integers(5, 60, size=50).tolist()
    (tmp_path / "text.txt").write_text(words(numbers), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text(words([7, 8, 9]) + "\n\n" + words([10]) + "\n", encoding="utf-8")
    out = tmp_path / "t.safetensors"
    options = ["--sequence-tokens", 12, "--prompt-tokens", 5, "--new-tokens", 4, "--batch", 3, "--guesses", 1]
    files = ["--text", tmp_path / "text.txt", "--prompts", tmp_path / "prompts.txt"]
    assert run("trace", "record", "--model", folder, *files, *options, "-o", out) == 0
    trace = RoutingTrace.load(out)
    # 50 tokens are 4 sequences of 12: 5 to prefill, 7 to decode each.
    for number in range(4):
        one = trace.slice(sequences=[number])
        assert one.phase.tolist() == [0] * 5 + [1] * 7
    assert [each["file"] for each in trace.meta["text"]] == ["text.txt", "prompts.txt"]
    # What a single pass over the first sequence routes.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad(), record(model) as whole:
        model(input_ids=torch.tensor([numbers[:12]]))
    np.testing.assert_array_equal(trace.slice(sequences=[0]).experts, whole.experts)
    # The end token in a text is a token like others.
    (tmp_path / "text.txt").write_text(words(numbers[:8]) + " </s> " + words(numbers[9:12]), encoding="utf-8")
    config = RecordConfig(sequence_tokens=12, prompt_tokens=5)
    assert record_files(str(folder), [tmp_path / "text.txt"], config=config).tokens == 12
    # The prompts are followed by what the model says, at most 4 tokens of it.
    text = model.generate(input_ids=torch.tensor([[7, 8, 9]]), max_new_tokens=5, do_sample=False)
    with torch.no_grad(), record(model) as whole:
        model(input_ids=text[:, :-1])
    np.testing.assert_array_equal(trace.slice(sequences=[4]).experts, whole.experts)
    assert (trace.slice(sequences=[5]).phase == 0).sum() == 1


def test_an_encoder_decoder_is_fed_by_the_same_loop(tmp_path: Path, folder: Path) -> None:
    tiny("switch_transformers").save_pretrained(tmp_path / "switch")
    for file in folder.glob("token*"):
        (tmp_path / "switch" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text.txt").write_text(words(range(5, 29)), encoding="utf-8")
    config = RecordConfig(sequence_tokens=8, prompt_tokens=5, batch=2, sequences=2)
    trace = record_files(str(tmp_path / "switch"), [tmp_path / "text.txt"], config=config)
    # The decoder begins with its start token, then the other three.
    assert trace.phase.tolist() == ([0] * 5 + [1] * 4) * 2
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "switch").eval()
    with torch.no_grad(), record(model) as whole:
        model(input_ids=torch.tensor([[*range(5, 10)]]), decoder_input_ids=torch.tensor([[0, 10, 11, 12]]))
    np.testing.assert_array_equal(trace.slice(sequences=[0]).experts, whole.experts)


def test_bad_input_is_one_line_and_exit_status_2(
    folder: Path, tmp_path: Path, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, empty, plain = (tmp_path / name for name in ("good.txt", "bad.txt", "empty.txt", "gpt2"))
    good.write_text("a a a", encoding="utf-8")
    bad.write_bytes(b"abc \xff\xfe")
    empty.write_text("\n", encoding="utf-8")
    plain.mkdir()
    (plain / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    out = tmp_path / "t.npz"
    cases = [
        (folder, ["--text", bad], "byte 4: not UTF-8 text"),
        (folder, ["--text", empty], "holds no text"),
        (folder, ["--text", tmp_path / "none.txt"], "cannot be read: No such file"),
        (folder, ["--text", good], "3 tokens: fewer than sequence_tokens = 256"),
        (folder, [], "give at least one file"),
        (folder, ["--text", good, "--batch", 0], "batch = 0: must be at least 1"),
        (plain, ["--text", good], "model type 'gpt2' has no routers"),
        (tmp_path, ["--text", good], "cannot be loaded"),
    ]
    for model, options, message in cases:
        assert run("trace", "record", "--model", model, *options, "-o", out) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not out.exists()
