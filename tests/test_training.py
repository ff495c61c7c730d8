"""Our own models: their text, their experts against a naive loop, seeded and resumable training, what is recorded."""

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prestage.workloads.trace import RoutingTrace
from prestage.workloads.training import corpus as corpus_module
from prestage.workloads.training import run_command
from prestage.workloads.training import train as train_module
from prestage.workloads.training.bpe import END_OF_DOCUMENT, FIRST_MERGE, Encoder, learn
from prestage.workloads.training.corpus import SOURCES, Corpus, CorpusError, build, repeated_share
from prestage.workloads.training.moe_lm import Block, Experts, MoeConfig, MoeLm, Routing
from prestage.workloads.training.record import GUESSES, HORIZONS, held_out_windows, record
from prestage.workloads.training.report import (
    BEGIN,
    END,
    LISTED,
    SHIPPED,
    guess_recall,
    shipped_reports,
    specialization,
    tables,
)
from prestage.workloads.training.train import Batches, CheckpointError, Run, Training, train

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = MoeConfig(
    vocabulary=300, layers=3, experts=8, top_k=1, balance="aux_loss", balance_rate=0.01,
    width=32, heads=2, expert_width=16, context=32,
)  # fmt: skip
MANY = replace(SMALL, top_k=3, balance="bias", balance_rate=0.001)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # Matrices of this size gain nothing from threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- Byte pairs


def test_the_most_frequent_pair_is_merged_first_and_ties_go_to_the_smaller_tokens() -> None:
    # "abab" twice holds ab 4 times, ba twice; then (ab)(ab) twice, and after that nothing occurs twice.
    ab = FIRST_MERGE
    assert learn(["abab\nabab\n"], 300) == [(ord("a"), ord("b")), (ab, ab)]


def test_merges_never_cross_a_word() -> None:
    merges = learn(["the cat the dog " * 10], 400)
    words = [Encoder(merges).decode([FIRST_MERGE + number]) for number in range(len(merges))]
    assert {"the", " the", " cat", " dog"} - set(words) <= {"the"}  # "the" without a blank is seen but once
    assert not [word for word in words if " " in word[1:]]


@pytest.mark.slow
@given(st.text())
def test_decoding_gives_back_any_text(text: str) -> None:
    encoder = Encoder(learn(["some text, then some more text\n" * 3], 280))
    tokens = encoder.encode(text)
    assert encoder.decode(tokens) == text
    assert encoder.token_bytes[tokens].sum() == len(text.encode())


@pytest.mark.parametrize("vocabulary", [256, (1 << 16) + 1])
def test_a_vocabulary_that_cannot_be_is_refused(vocabulary: int) -> None:
    with pytest.raises(ValueError, match=rf"vocabulary = {vocabulary}: must be 257..65536"):
        learn(["text"], vocabulary)


# --- The corpus


def fake_packages(folder: Path) -> Path:
    """A few files of each source, in its own places, each of its own words."""
    for number, source in enumerate(SOURCES):
        for copy in range(4):
            pattern = source.files[0].replace("**/", "").replace("-*", "-XX").replace("set.mm", f"{copy}/set.mm")
            path = folder / source.package / pattern.replace("*", str(copy))
            path.parent.mkdir(parents=True, exist_ok=True)
            words = " ".join(f"w{number}x{copy}x{each}" for each in range(150))
            text = f"<p>{words}</p>" if path.suffix == ".html" else words
            raw = text.encode()
            path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return folder


def test_held_out_documents_are_whole_and_of_every_domain(tmp_path: Path) -> None:
    corpus = build(fake_packages(tmp_path), vocabulary=400, tokens_per_domain=1500, held_out_tokens=100, seed=0)
    encoder = Encoder([(left, right) for left, right in corpus.merges.tolist()])
    for domain, name in enumerate(corpus.domains):
        kept, trained = (encoder.decode(corpus.stream(domain, held_out)) for held_out in (True, False))
        # A word names its domain and its file: none of a held-out file is among those trained on.
        assert set(re.findall(r"w(\d+)x\d+x", kept + trained)) == {str(domain)}, name
        files = [set(re.findall(r"w\d+x(\d+)x", text)) for text in (kept, trained)]
        assert files[0] and files[1] and not files[0] & files[1]
    assert (corpus.tokens[corpus.starts[:-1]] == END_OF_DOCUMENT).all()
    assert (np.diff(corpus.starts) > 1).all()


def test_the_same_packages_and_seed_give_the_same_corpus_and_it_survives_its_file(tmp_path: Path) -> None:
    packages = fake_packages(tmp_path / "packages")
    made = [build(packages, vocabulary=300, tokens_per_domain=900, held_out_tokens=9, seed=seed) for seed in (1, 1, 2)]
    assert made[0].digest == made[1].digest != made[2].digest
    made[0].save(tmp_path / "corpus.safetensors")
    loaded = Corpus.load(tmp_path / "corpus.safetensors")
    assert loaded.digest == made[0].digest
    assert loaded.meta == made[0].meta


def test_a_page_is_read_as_its_text_and_a_long_line_counts_once(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<head><title>no</title></head><p>Fish &amp; chips</p><script>no()</script><p>done</p>")
    assert corpus_module._read(page).split() == ["Fish", "&", "chips", "done"]
    long = "x" * corpus_module.REPEATED_CHARACTERS
    seen: set[str] = set()
    assert corpus_module._unseen(f"{long}\nshort\n{long}\nshort\n", seen) == f"{long}\nshort\nshort\n"
    assert corpus_module._unseen(f"{long}\nother\n", seen) == "other\n"


def test_held_out_runs_that_training_has_too_are_counted() -> None:
    # Runs of 3: domain a holds out 012 and 123, of which 012 is trained on; domain b 124 and 245, of which none is.
    documents = [[0, 1, 2, 8], [0, 1, 2, 3], [9, 8, 7, 6], [1, 2, 4, 5]]
    corpus = Corpus(
        tokens=np.array(documents, dtype=np.uint16).ravel(),
        starts=np.arange(0, 17, 4),
        domain=np.array([0, 0, 1, 1], dtype=np.uint8),
        held_out=np.array([False, True, False, True]),
        merges=np.zeros((0, 2), dtype=np.uint16),
        meta={"domains": ["a", "b"]},
    )
    assert repeated_share(corpus, 3) == [0.5, 0.0]


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"metamath-databases: no text in .*set\.mm: unpack the package metamath-data"
    ):
        build(tmp_path, vocabulary=300, tokens_per_domain=1, held_out_tokens=1, seed=0)
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(CorpusError, match=r"no\.safetensors: not a corpus"):
        Corpus.load(tmp_path / "no.safetensors")


# --- The experts


def naive_experts(experts: Experts, state: Tensor, routing: Routing, capacity: int) -> Tensor:
    """One pair of token and expert after the other, in order; an expert that is full drops what follows."""
    normed = experts.norm(state)
    taken = [0] * experts.config.experts
    rows = []
    for token in range(len(state)):
        total = torch.zeros_like(state[token])
        for rank in range(experts.config.top_k):
            expert = int(routing.experts[token, rank])
            if taken[expert] < capacity:
                gate, up = (normed[token] @ experts.inner[expert]).chunk(2)
                total = total + routing.weights[token, rank] * ((F.silu(gate) * up) @ experts.outer[expert])
            taken[expert] += 1
        rows.append(total)
    return torch.stack(rows)


def some_experts(config: MoeConfig) -> Experts:
    torch.manual_seed(1)
    experts = Experts(config).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


@pytest.mark.parametrize("config", [SMALL, MANY], ids=["top-1", "top-3"])
@pytest.mark.parametrize("training", [True, False])
def test_batched_experts_equal_one_token_after_the_other_forward_and_backward(
    config: MoeConfig, training: bool
) -> None:
    experts = some_experts(replace(config, capacity_factor=0.25)).train(training)
    state = torch.randn(200, config.width, dtype=torch.float64)
    routing = experts.route(state)
    # A quarter of the even share, up to the next 16: 200 / 8 / 4 -> 16, 3 x 200 / 8 / 4 -> 32.
    room = {1: 16, 3: 32}[config.top_k] if training else len(state)
    goal = torch.randn_like(state)
    results = []
    for compute in (experts.forward, lambda s, r: naive_experts(experts, s, r, room)):
        leaf = state.clone().requires_grad_()
        weights = routing.weights.detach().double().requires_grad_()
        out = compute(leaf, routing._replace(weights=weights))
        grads = torch.autograd.grad((out * goal).sum(), [leaf, weights, experts.inner, experts.outer])
        results.append([out.detach(), *grads])
    for batched, naive in zip(*results, strict=True):
        torch.testing.assert_close(batched, naive, rtol=1e-5, atol=1e-5)
    if training:
        left_out = np.maximum(np.bincount(routing.experts.ravel().numpy(), minlength=8) - room, 0).sum()
        assert left_out > 0
        assert float(experts.dropped) == pytest.approx(left_out / routing.experts.numel())


@torch.no_grad()
def test_the_switch_loss_of_an_even_load_is_its_rate_and_of_a_lopsided_one_more() -> None:
    # experts x sum(1/experts x 1/experts) = 1, whatever the scores, if each expert takes the same number of tokens.
    experts = some_experts(SMALL)
    even = torch.eye(SMALL.experts, SMALL.width, dtype=torch.float64)
    experts.gate.weight.copy_(even)
    experts.norm.weight.fill_(1.0)
    assert float(experts.route(even).balance_loss) == pytest.approx(SMALL.balance_rate)
    assert float(experts.route(even[:1]).balance_loss) > 2 * SMALL.balance_rate


@torch.no_grad()
def test_the_bias_evens_the_load_and_moves_no_weight() -> None:
    experts = some_experts(replace(MANY, balance_rate=0.005)).train()
    state = torch.randn(512, MANY.width, dtype=torch.float64) + 1.0
    before = experts.route(state)
    for _ in range(300):
        experts.load.copy_(experts.route(state).load)
        experts.rebalance()
    after = experts.route(state)
    assert after.load.max() < 1.1 * after.load.float().mean() < 0.8 * before.load.max()
    affinity = after.scores - experts.bias
    chosen = affinity.gather(1, after.experts)
    torch.testing.assert_close(after.weights, chosen / chosen.sum(1, keepdim=True))


def test_no_token_sees_what_comes_after_it() -> None:
    torch.manual_seed(0)
    model = MoeLm(MANY).eval()
    tokens = torch.randint(300, (1, 32))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 300
    one, other = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(one[:, :20], other[:, :20])
    assert not torch.allclose(one[:, 20:], other[:, 20:])


# --- Training


@pytest.fixture(scope="module")
def text() -> Corpus:
    """Two domains of a few words each, in an order that can be learned."""
    encoder = Encoder([])
    documents, held_out = [], []
    for domain, words in enumerate((["one", "two", "three", "four"], ["un", "deux", "trois", "quatre"])):
        for number in range(6):
            begin = np.random.default_rng([domain, number]).integers(4, size=60)
            sentence = " ".join(words[(b + step) % 4] for b in begin for step in range(3))
            documents.append(np.concatenate([[END_OF_DOCUMENT], encoder.encode(sentence)]).astype(np.uint16))
            held_out.append(number < 2)
    return Corpus(
        tokens=np.concatenate(documents),
        starts=np.cumsum([0, *map(len, documents)]),
        domain=np.repeat(np.arange(2), 6).astype(np.uint8),
        held_out=np.array(held_out),
        merges=np.zeros((43, 2), dtype=np.uint16),
        meta={"domains": ["english", "french"], "sources": []},
    )


def trained(config: MoeConfig, text: Corpus, steps: int, seed: int = 0) -> tuple[Run, list[dict[str, float]]]:
    run = Run(config, Training(steps=steps, batch=8, learning_rate=3e-3, warmup_steps=5, seed=seed), CPU)
    return run, list(train(run, Batches(text, config.context, CPU), log_every=1))


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, MANY], ids=["top-1", "top-3"])
def test_the_loss_falls_from_that_of_a_uniform_guess(config: MoeConfig, text: Corpus) -> None:
    _, curve = trained(config, text, 40)
    assert curve[0]["loss"] == pytest.approx(np.log(300), abs=0.3)
    assert curve[-1]["loss"] < curve[0]["loss"] / 2


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, MANY], ids=["top-1", "top-3"])
def test_a_resumed_run_ends_in_the_same_bits_as_one_never_interrupted(
    config: MoeConfig, text: Corpus, tmp_path: Path
) -> None:
    whole, _ = trained(config, text, 8)
    batches = Batches(text, config.context, CPU)
    first = Run(config, whole.training, CPU)
    for _ in range(5):
        first.advance(batches)
    first.save(tmp_path / "c.safetensors")
    second = Run(config, whole.training, CPU)
    second.load(tmp_path / "c.safetensors")
    assert second.step == 5
    assert [line["step"] for line in train(second, batches, log_every=1)] == [6, 7, 8]
    one, other = whole.state(), second.state()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    elsewhere, _ = trained(config, text, 8, seed=1)
    assert not torch.equal(one["model.embedding.weight"], elsewhere.state()["model.embedding.weight"])


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused(text: Corpus, tmp_path: Path) -> None:
    run, _ = trained(SMALL, text, 1)
    run.save(tmp_path / "c.safetensors")
    other = Run(SMALL, replace(run.training, steps=2), CPU)
    with pytest.raises(CheckpointError, match=r"c\.safetensors: training: .*'steps': 1"):
        other.load(tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match=r"none\.safetensors: not a checkpoint"):
        other.load(tmp_path / "none.safetensors")


def test_bad_input_is_one_line_and_exit_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "guide", "--corpus", str(tmp_path / "no.safetensors"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: train_module.main(options))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_training_stops_when_its_time_is_up(text: Corpus) -> None:
    run = Run(SMALL, Training(steps=10), CPU)
    assert list(train(run, Batches(text, SMALL.context, CPU), time_limit_s=0.0)) == []
    assert run.step == 0


# --- Recording


def states_at_routers(model: MoeLm, tokens: Tensor) -> list[Tensor]:
    """The hidden state that each router sees, its layer's experts taken one token after the other."""
    x = model.embedding(tokens)
    states = []
    for block in model.blocks:
        assert isinstance(block, Block)
        x = x + block.attention(block.norm(x))
        states.append(x.flatten(0, 1))
        routing = block.experts.route(states[-1])
        x = x + naive_experts(block.experts, states[-1], routing, len(states[-1])).view_as(x)
    return states


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, MANY], ids=["top-1", "top-3"])
def test_what_is_recorded_is_the_routers_top_k_and_the_next_routers_ranking(config: MoeConfig, text: Corpus) -> None:
    run, _ = trained(config, text, 10)
    trace = record(run.model, text, 2, {"model": "small"}).trace
    assert trace.experts.shape == (2 * 2 * config.context, config.layers, config.top_k)
    assert trace.predictions is not None and trace.weights is not None
    assert trace.predictions.shape[2:] == (HORIZONS, min(GUESSES, config.experts))
    windows = held_out_windows(text, config.context, 2)
    with torch.no_grad():
        for layer, state in enumerate(states_at_routers(run.model, torch.from_numpy(windows[:, :-1]))):
            logits = [F.linear(each.norm(state), each.gate.weight) for each in run.model.experts]
            ranked = [
                (score.sigmoid() + each.bias if config.balance == "bias" else score).argsort(dim=1, descending=True)
                for score, each in zip(logits, run.model.experts, strict=True)
            ]
            assert (trace.experts[:, layer] == ranked[layer][:, : config.top_k].numpy()).mean() > 0.999
            for ahead in range(HORIZONS):
                wanted = ranked[(layer + ahead + 1) % config.layers].numpy()
                # Near ties may fall either way: the batched and the naive sum differ in the last bit.
                assert (trace.predictions[:, layer, ahead] == wanted[:, :GUESSES]).mean() > 0.99
            affinity = logits[layer].sigmoid() if config.balance == "bias" else logits[layer].softmax(dim=1)
            weights = affinity.gather(1, ranked[layer][:, : config.top_k])
            weights = weights / weights.sum(1, keepdim=True) if config.balance == "bias" else weights
            np.testing.assert_allclose(trace.weights[:, layer], weights.numpy(), atol=2e-3)


def test_sequences_take_turns_through_the_domains_and_follow_the_held_out_text(text: Corpus) -> None:
    windows = held_out_windows(text, 16, 3)
    assert windows.shape == (6, 17)
    for domain in range(2):
        own = windows[domain::2]
        assert own[:, :-1].ravel().tolist() == text.stream(domain, held_out=True)[:48].tolist()
        assert (own[:-1, -1] == own[1:, 0]).all()
    with pytest.raises(ValueError, match=r"held-out text of english: .* tokens: 1000 sequences of 16 need"):
        held_out_windows(text, 16, 1000)


@pytest.mark.slow
def test_one_command_trains_records_and_resumes(text: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_module.MODELS, "guide", SMALL)
    text.save(tmp_path / "corpus.safetensors")
    options = ["--model", "guide", "--corpus", str(tmp_path / "corpus.safetensors"), "--out", str(tmp_path),
               "--steps", "4", "--batch", "4", "--sequences-per-domain", "2", "--guess-sequences", "3",
               "--checkpoint-every", "2", "--device", "cpu"]  # fmt: skip
    train_module.main(options)
    names = ["guide.safetensors", "guide-guesses.safetensors"]
    once = [(tmp_path / name).read_bytes() for name in names]
    train_module.main([*options, "--resume"])
    assert [(tmp_path / name).read_bytes() for name in names] == once
    whole, guesses = (RoutingTrace.load(tmp_path / name) for name in names)
    assert whole.predictions is None and whole.tokens == 4 * SMALL.context
    assert guesses.predictions is not None and guesses.tokens == 3 * SMALL.context
    # The resumed run had nothing left to do and tells what the first one told.
    facts = json.loads((tmp_path / "guide-training.json").read_text())
    assert [line["step"] for line in facts["curve"]] == [4]
    assert facts["model"] == asdict(replace(SMALL, vocabulary=text.vocabulary))
    assert facts["steps_done"] == 4


# --- The report and what is shipped


def test_an_expert_for_each_domain_tells_the_domain_and_a_shared_one_tells_nothing() -> None:
    # Layer 0 has an expert for each of two domains, layer 1 one for all: log 2 / log 2 and 0.
    sequence = np.repeat([0, 1, 2, 3], 5)
    experts = np.stack([sequence % 2, np.zeros_like(sequence)], axis=1)[..., None]
    trace = RoutingTrace(
        experts=experts, num_experts=2, sequence=sequence, extra={"domain": np.array([0, 1, 0, 1])},
        meta={"domains": ["a", "b"]},
    )  # fmt: skip
    # Half of what layer 0 does in a domain is unlike the average, and nothing of layer 1.
    assert specialization(trace) == {"information": [1.0, 0.0], "distance": {"a": 0.25, "b": 0.25}}


def test_recall_of_guesses_counts_each_target_once_where_it_lies() -> None:
    # Two layers, two tokens of one sequence: visits 3, 1 | 2, 0. Horizon 1 has 3 targets: 1 and 0 in the same token,
    # 2 in the next. The guess for 1 is right at once, that for 0 second, that for 2 never.
    predictions = np.array([[[[1, 5]], [[7, 6]]], [[[4, 0]], [[0, 1]]]])
    trace = RoutingTrace(experts=np.array([[[3], [1]], [[2], [0]]]), num_experts=8, predictions=predictions)
    first, both = 0.5, 1.0
    assert LISTED[:2] == (1, 2)
    assert guess_recall(trace) == {
        "same_token": {"1": [first, *[both] * (len(LISTED) - 1)]},
        "next_token": {"1": [0.0] * len(LISTED)},
    }


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_trace_is_whole_and_of_the_model_that_its_report_tells_of(name: str) -> None:
    report = shipped_reports()[name]
    path = ROOT / "workloads" / "data" / f"{name}.safetensors"
    trace = RoutingTrace.load(path)
    part, model = SHIPPED[name], train_module.MODELS[name]
    assert report["model"] == asdict(model)
    assert (trace.layers, trace.num_experts, trace.k) == (model.layers, model.experts, model.top_k)
    assert trace.tokens == part.sequences * part.tokens_each
    assert trace.predictions is not None and trace.predictions.shape[2:] == (HORIZONS, part.guesses)
    assert trace.extra["domain"].tolist() == [each % 9 for each in range(part.sequences)]
    assert trace.meta["corpus_sha256"] == report["corpus"]["sha256"]
    assert path.stat().st_size < 2_300_000
    # The shipped part is like the whole: the first guess for the next layer is as good, within a few percent.
    whole, own = report["routing"]["guess_recall"]["same_token"]["1"], guess_recall(trace)["same_token"]["1"]
    assert own[0] == pytest.approx(whole[0], abs=0.03)


def test_the_docs_hold_the_tables_of_the_shipped_reports() -> None:
    page = (ROOT / "docs" / "our-models.md").read_text(encoding="utf-8")
    assert f"{BEGIN}\n{tables(shipped_reports())}\n{END}" in page
