"""The loss without whole logits: the plain path's numbers and gradients, in any chunks, whatever wraps the head."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from transformers.trainer_pt_utils import LabelSmoother

from ovisnb.model import load, loss
from ovisnb.model.loss import LanguageHead, mean_loss, summed_loss, supervised

WORDS, SIZE = 37, 8


@pytest.fixture
def small_chunks(monkeypatch):
    """Seven rows of the small head, or three of the golden checkpoint's, at one time."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 7 * WORDS * 4)


def small_head(bias=False, dtype=torch.float32) -> LanguageHead:
    torch.manual_seed(0)
    return LanguageHead(SIZE, WORDS, bias=bias, dtype=dtype)


def plain(head, hidden, targets, smoothing):
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum", label_smoothing=smoothing)


def gradients(total, *of):
    return torch.autograd.grad(total, of)


@given(
    tokens=st.integers(0, 30), rows=st.integers(1, 31), smoothing=st.sampled_from([0.0, 0.1, 1.0]), bias=st.booleans()
)
def test_any_chunks_give_the_plain_loss_and_gradients(tokens, rows, smoothing, bias):
    head = small_head(bias)
    hidden = torch.randn(tokens, SIZE, requires_grad=True)
    targets = torch.randint(WORDS, (tokens,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_BYTES", rows * WORDS * 4)
        found = head(hidden, targets, smoothing)
    wanted = plain(head, hidden, targets, smoothing)
    of = [hidden, *head.parameters()]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients(3 * found, *of), gradients(3 * wanted, *of), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bfloat16_makes_the_logits_that_the_plain_path_makes(small_chunks, weights, smoothing):
    """Under autocast over float32 weights, and with bfloat16 weights."""
    head = small_head(dtype=weights)
    hidden, targets = torch.randn(25, SIZE, dtype=weights, requires_grad=True), torch.randint(WORDS, (25,))
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        found, wanted = head(hidden, targets, smoothing), plain(head, hidden, targets, smoothing)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    made, right = gradients(found, hidden, head.weight), gradients(wanted, hidden, head.weight)
    for one, other in zip(made, right, strict=True):
        assert one.dtype == other.dtype == weights
        assert (one - other).norm() < 0.01 * other.norm()


def test_the_weight_is_not_rounded_for_later_layers(small_chunks):
    """Autocast keeps a rounded copy of a weight, which must not be one without a gradient."""
    head = small_head()
    hidden, targets = torch.randn(5, SIZE), torch.randint(WORDS, (5,))
    with torch.autocast("cpu", torch.bfloat16):
        head(hidden, targets)
        assert head(hidden).requires_grad


def test_a_frozen_head_gets_no_gradient_and_keeps_no_table(small_chunks):
    head = small_head().requires_grad_(False)
    hidden, targets = torch.randn(25, SIZE, requires_grad=True), torch.randint(WORDS, (25,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        total = head(hidden, targets)
    assert kept == [hidden.shape]
    wanted = gradients(plain(head, hidden, targets, 0.0), hidden)
    torch.testing.assert_close(gradients(total, hidden), wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not head(hidden, targets).requires_grad


def test_a_second_backward_is_refused(small_chunks):
    head = small_head()
    total = head(torch.randn(5, SIZE), torch.randint(WORDS, (5,)))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_compiling_compiles_no_number_of_tokens(small_chunks):
    head, counter = small_head(), CompileCounter()
    compiled = torch.compile(head, backend=counter)
    for tokens in (3, 9, 16, 40, 41):
        hidden, targets = torch.randn(tokens, SIZE, requires_grad=True), torch.randint(WORDS, (tokens,))
        found, wanted = compiled(hidden, targets), plain(head, hidden, targets, 0.0)
        torch.testing.assert_close(gradients(found, hidden), gradients(wanted, hidden), rtol=1e-5, atol=1e-6)
    assert counter.op_count <= 1


def test_only_supervised_positions_are_taken():
    hidden = torch.arange(10.0).view(2, 5, 1)
    labels = torch.tensor([[7, -100, 3, -100, 4], [-100, -100, -100, -100, 9]])
    states, targets = supervised(hidden, labels)
    assert states.flatten().tolist() == [1, 3, 8] and targets.tolist() == [3, 4, 9]


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0), torch.tensor(0.0)])
def test_no_supervised_token_gives_no_loss(count):
    assert mean_loss(torch.tensor(0.0), 0, count).item() == 0


def test_the_mean_is_over_the_steps_tokens_where_they_are_given():
    assert mean_loss(torch.tensor(6.0), 3, None).item() == 2
    assert mean_loss(torch.tensor(6.0), 3, 12).item() == mean_loss(torch.tensor(6.0), 3, torch.tensor(12)).item() == 0.5


@pytest.fixture
def batch():
    torch.manual_seed(0)
    ids = torch.randint(10, 500, (2, 12))
    labels = ids.clone()
    labels[:, :4] = labels[1, 9:] = -100
    return {"input_ids": ids, "labels": labels, "use_cache": False}


def with_adapter(model, kind):
    torch.manual_seed(1)
    where = {
        "lora": {"target_modules": ["lm_head"]},
        "saved": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    }
    model = get_peft_model(model, LoraConfig(r=2, init_lora_weights="gaussian", **where[kind]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("wrapped", [None, "lora", "saved"])
def test_skipping_the_logits_changes_neither_loss_nor_gradients(golden, batch, small_chunks, wrapped, smoothing):
    model, _ = load(golden / "checkpoint", dtype=torch.float32)
    if wrapped:
        model = with_adapter(model, wrapped)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {}
    for skip in (True, False, None):
        model.zero_grad()
        out = model(**batch, skip_logits=skip, label_smoothing=smoothing)
        out.loss.backward()
        assert (out.logits is None) == (skip is not False)
        found[skip] = (out, {name: p.grad for name, p in trained.items()})
    (whole, wanted), (skipped, made), _ = found[False], found[True], found[None]
    torch.testing.assert_close(skipped.loss, whole.loss, rtol=1e-6, atol=1e-6)
    assert [name for name, grad in made.items() if grad is None] == []
    for name, grad in wanted.items():
        torch.testing.assert_close(
            made[name], grad, rtol=1e-4, atol=1e-6, msg=lambda told, name=name: f"{name}: {told}"
        )
    smoother = LabelSmoother(smoothing)
    torch.testing.assert_close(smoother(whole, batch["labels"], shift_labels=True), whole.loss, rtol=1e-5, atol=1e-6)
    count = torch.tensor(50)
    total = model(**batch, label_smoothing=smoothing, num_items_in_batch=count).loss
    wanted = smoother(whole, batch["labels"], shift_labels=True, num_items_in_batch=count)
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skip", [True, False])
def test_a_batch_without_supervised_tokens_reaches_every_parameter(golden, batch, skip):
    model, _ = load(golden / "checkpoint", dtype=torch.float32)
    model.train()
    for count in (None, torch.tensor(0), torch.tensor(7)):
        model.zero_grad()
        labels = torch.full_like(batch["labels"], -100)
        out = model(**batch | {"labels": labels}, skip_logits=skip, label_smoothing=0.1, num_items_in_batch=count)
        assert out.loss.item() == 0
        out.loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_evaluation_gives_logits_unless_told_and_a_loss_beside_the_last_ones(golden_model, batch, small_chunks):
    with torch.no_grad():
        whole = golden_model(**batch)
        assert whole.logits is not None
        last = golden_model(**batch, logits_to_keep=2)
        skipped = golden_model(**batch, skip_logits=True)
    torch.testing.assert_close(last.logits, whole.logits[:, -2:])
    torch.testing.assert_close(last.loss, whole.loss)
    torch.testing.assert_close(skipped.loss, whole.loss)
    assert skipped.logits is None


@pytest.mark.parametrize("tokens", [0, 5, 100])
def test_the_head_is_called_once_whatever_the_tokens(small_chunks, tokens):
    head, calls = small_head(), []
    head.register_forward_hook(lambda *_: calls.append(1))
    summed_loss(head, torch.randn(tokens, SIZE), torch.randint(WORDS, (tokens,)), 0.0, WORDS)
    assert calls == [1]


@pytest.mark.parametrize("tokens", [0, 5, 100])
def test_another_head_is_called_once_where_calls_are_counted(monkeypatch, small_chunks, tokens):
    head, calls = torch.nn.Linear(SIZE, WORDS, bias=False), []
    head.register_forward_hook(lambda *_: calls.append(1))
    hidden, targets = torch.randn(tokens, SIZE), torch.randint(WORDS, (tokens,))
    chunked = summed_loss(head, hidden, targets, 0.0, WORDS)
    assert len(calls) == max(1, -(-tokens // 7))
    monkeypatch.setattr(loss, "is_deepspeed_zero3_enabled", lambda: True)
    calls.clear()
    torch.testing.assert_close(summed_loss(head, hidden, targets, 0.0, WORDS), chunked)
    assert calls == [1]


def test_the_head_is_a_linear_layer_to_everyone_else():
    head = small_head()
    hidden = torch.randn(3, SIZE)
    assert isinstance(head, torch.nn.Linear) and list(head.state_dict()) == ["weight"]
    torch.testing.assert_close(copy.deepcopy(head)(hidden), F.linear(hidden, head.weight), rtol=0, atol=0)
