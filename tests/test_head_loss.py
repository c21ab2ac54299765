"""Head and loss computed together: the same numbers, less memory, and what a model may do with its logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
import toys
import zoo
from offload.planner import Budgets, make_plan
from offload.planner.plan import UnitProfile
from test_exactness import assert_close, assert_same, streamed
from torch import Tensor, nn

import offload
from offload.head_loss import HeadLoss, LogitsUsed
from offload.prepare import Prepared, prepare

ROWS, WIDTH, VOCABULARY = 46, 24, 80


def soft_cap(logits: Tensor) -> Tensor:
    return torch.tanh(logits / 3.0) * 3.0


def by_hand(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    logits = logits.float().view(-1, VOCABULARY)
    return F.cross_entropy(logits, labels.view(-1), **options)


def gradients(
    head: nn.Linear, hidden: Tensor, chunks: int | None, loss_of: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Loss and gradients of two micro-batches; `chunks` None: plain PyTorch, summed as the engine does."""
    slots = {id(p): torch.full(p.shape, torch.nan) for p in head.parameters()}
    seen: set[int] = set()

    def slot(p: nn.Parameter) -> tuple[Tensor, bool]:
        summed = id(p) in seen
        seen.add(id(p))
        return slots[id(p)], summed

    found: dict[str, Tensor] = {}
    for i, part in enumerate(hidden):
        x = part.detach().requires_grad_()
        logits = head(x) if chunks is None else HeadLoss(chunks, slot, strict=True).logits(head, x)
        loss = loss_of(logits) / 3
        loss.backward()
        assert x.grad is not None
        found |= {f"loss {i}": loss.detach(), f"hidden {i}": x.grad}
        for p in head.parameters():
            if chunks is None:
                assert p.grad is not None
                target, summed = slot(p)
                target.copy_(target + p.grad if summed else p.grad)
            else:
                assert p.grad is None
            p.grad = None
    return found | {name: slots[id(p)] for name, p in head.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("around", "options"),
    [
        (lambda x: x, {}),
        (soft_cap, {"reduction": "sum"}),
        (lambda x: x * 0.25, {"label_smoothing": 0.1}),
        (lambda x: (2.0 * x).contiguous(), {"ignore_index": 0}),
    ],
)
def test_one_chunk_is_the_plain_loss_to_the_bit(
    dtype: torch.dtype, bias: bool, around: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(offload.head_loss.PIECE_ELEMENTS, "cpu", 7 * VOCABULARY)
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype)
    hidden = torch.randn(2, 2, ROWS // 2, WIDTH).to(dtype)
    labels = torch.randint(0, VOCABULARY, (2, ROWS // 2))
    labels[0, :5] = options.get("ignore_index", -100)

    def loss_of(logits: Tensor) -> Tensor:
        return by_hand(around(logits), labels, **options)

    want = gradients(head, hidden, None, loss_of)
    got = gradients(head, hidden, 1, loss_of)
    if "label_smoothing" in options:  # its two means are taken one by one in the plain loss
        torch.testing.assert_close(got, want)
    else:
        assert not [name for name in want if not torch.equal(got[name], want[name])]
    for chunks in (3, ROWS):
        many = gradients(head, hidden, chunks, loss_of)
        limit = 0.02 if dtype == torch.bfloat16 else 1e-6
        assert not [n for n in want if (many[n] - want[n]).norm() > limit * want[n].norm()]


def test_what_cannot_be_done_by_rows(caplog: pytest.LogCaptureFixture) -> None:
    """Strict: refused by name. Otherwise computed whole, with a warning; in-place changes are refused always."""
    head, hidden = nn.Linear(WIDTH, VOCABULARY), torch.randn(2, 5, WIDTH)
    slot = lambda p: (torch.empty_like(p), False)  # noqa: E731
    strict, lenient = HeadLoss(2, slot, strict=True), HeadLoss(2, slot)
    uses: list[Callable[[Tensor], Any]] = [
        lambda x: x[:, -1], lambda x: x.argmax(-1), lambda x: x.softmax(-1), lambda x: x.transpose(1, 2),
        lambda x: x + torch.ones(VOCABULARY), lambda x: torch.clamp(input=x, max=1.0),
        lambda x: x.view(-1), lambda x: x * head.weight[0, 0],
        lambda x: F.cross_entropy(x.flatten(0, 1), torch.full((10, VOCABULARY), 0.1)),
        lambda x: F.cross_entropy(x.flatten(0, 1), torch.ones(10).long(), weight=torch.ones(VOCABULARY)),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(LogitsUsed, match="takes the logits"):
            use(strict.logits(head, hidden))
        assert torch.equal(use(lenient.logits(head, hidden) * 2.0), use(head(hidden) * 2.0))
    assert len(caplog.records) == len(uses)
    for change in (lambda x: x.mul_(2), lambda x: x.__setitem__(0, 1.0)):
        with pytest.raises(LogitsUsed):
            change(lenient.logits(head, hidden))


def prepared(path: Path, model: nn.Module, **changes: Any) -> Prepared:
    return prepare(offload.Config.load(reference.config(path, 2, 2, **changes)), copy.deepcopy(model))


GEMMA2 = {k: v for k, v in zoo.ARCHITECTURES["gemma3_text"].items() if k != "num_hidden_layers"}
MORE = {
    "gemma2": {**GEMMA2, "num_hidden_layers": 2, "final_logit_softcapping": 3.0},
    "cohere": {**zoo._SMALL, "num_hidden_layers": 2, "logit_scale": 0.3},
    "granite": {**zoo._SMALL, "num_hidden_layers": 2, "logits_scaling": 4.0},
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5", "gemma2", "cohere", "granite"])
def test_models_in_chunks(name: str, fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one chunk as plain PyTorch (the other tests of exactness run so too), in three to rounding; both planned."""
    monkeypatch.setitem(zoo.ARCHITECTURES, name, MORE.get(name) or zoo.ARCHITECTURES[name])
    monkeypatch.setitem(offload.head_loss.PIECE_ELEMENTS, "cpu", 5 * zoo.VOCABULARY)
    model = zoo.make(name)
    batches = zoo.batches(name, reference.STEPS, 2)
    want = reference.train(model, batches, 2, takes_total=name not in zoo.OWN_LOSS)
    for chunks in ("auto", 3):
        changes = {"train.head_chunks": chunks}
        assert prepared(fast_path / "plan", model, **changes).plan.head_chunks == (1 if chunks == "auto" else chunks)
        got = streamed(fast_path / str(chunks), model, batches, 2, **changes)
        check = assert_same if chunks == "auto" and name not in zoo.ENCODER_DECODER else assert_close
        check(got, want)


def test_evaluation_and_a_frozen_head(fast_path: Path) -> None:
    model = zoo.make("llama")
    model.lm_head.requires_grad_(False)
    batches = zoo.batches("llama", 3, 6)
    want = reference.train(model, batches, 2)
    with torch.no_grad():
        micros = reference.micro_batches(batches[0], 2)
        n = [reference.counted(model, micro) for micro in micros]
        model.eval()
        loss = sum(reference.scaled_loss(model, micro, n, i, True).item() for i, micro in enumerate(micros))
    for chunks in (1, 4):
        cfg = reference.config(fast_path / str(chunks), 2, 6, **{"train.head_chunks": chunks})
        with offload.wrap(copy.deepcopy(model), cfg) as engine:
            assert engine.evaluate(batches[0]) == pytest.approx(loss, rel=1e-6)
            losses = [engine.step(batch).loss for batch in batches]
            assert losses == pytest.approx(want.losses, rel=1e-6)


def test_falls_back_and_says_so(fast_path: Path) -> None:
    """A classifier has no such head; a model that takes more from its logits keeps its own loss, with the reason."""

    class Regularised(toys.Toy):
        def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
            logits = self.lm_head(self.embed_tokens(input_ids))
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + 1e-4 * logits.logsumexp(-1).mean()
            return toys.CausalLMOutput(loss=loss)

    bert = prepared(fast_path / "bert", zoo.make("bert"))
    assert bert.plan.head_chunks == 0 and bert.workload.logits_bytes == 0
    torch.manual_seed(0)
    plan = prepared(fast_path / "toy", Regularised(toys.Block)).plan
    assert plan.head_chunks == 0
    assert [note for note in plan.notes if "logsumexp takes the logits" in note]


def test_planned_memory(fast_path: Path) -> None:
    """A large vocabulary: the planned workspace of head and loss, whole and in chunks, and when chunks are planned."""
    model = zoo.make("llama", vocab_size=8192)
    length = 64
    logits = 2 * length * 8192 * 4

    def head(chunks: int) -> UnitProfile:
        found = prepared(fast_path / "x", model, **{"train.head_chunks": chunks})
        assert found.workload.logits_bytes == (logits if chunks else 0)
        return next(u for u in found.workload.units if u.kept)

    assert head(0).workspace_backward > 3 * logits
    assert logits < head(1).workspace_backward < 1.6 * logits
    assert head(8).workspace_backward == head(1).workspace_backward - logits * 7 // 8

    auto = prepared(fast_path / "x", model)
    w, hw = replace(auto.workload, head_chunks="auto"), auto.hardware
    fitting = make_plan(w, Budgets(1 << 40, 1 << 40, 0, (("x", 1 << 40),)), hw, "greedy")
    assert fitting.fits and fitting.head_chunks == 1
    least = make_plan(w, Budgets(0, 0, 0, (("x", 1 << 40),)), hw, "greedy")
    assert not least.fits and least.head_chunks > 2
    tight = make_plan(w, Budgets(least.peak_bytes["gpu"], 1 << 40, 0, (("x", 1 << 40),)), hw, "greedy")
    assert tight.fits and 1 < tight.head_chunks <= least.head_chunks
