"""What the vision tower keeps and makes again: words chunk by chunk, and nothing of what is frozen below."""

import copy
import warnings
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ovisnb.model import Ovis2_5ForConditionalGeneration, load, loss

from . import distributed_worker as worker

TOWER, TABLE = "model.vision_tower.", "model.visual_embeddings_table."
LAST = TOWER + "transformer.encoder.layers.2."


@pytest.fixture
def model(golden):
    return load(golden / "checkpoint", dtype=torch.float32)[0].train()


@pytest.fixture(scope="module")
def batch(golden_pair):
    """Two samples with three pictures."""
    return worker.collate(worker.samples(golden_pair[1])[0][0])


def train_only(model, *prefixes):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))


def checkpointing(model, reentrant=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its newer name is not in every transformers we take
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()


class Kept:
    """What autograd keeps while it is entered: `inside[name]` bytes during calls of the named module."""

    def __init__(self, **modules):
        self.inside, self.now, self.calls = Counter(), [], Counter()
        for name, module in modules.items():
            module.register_forward_pre_hook(lambda *_, name=name: self.now.append(name))
            module.register_forward_hook(lambda *_: self.now.pop() and None)
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda x: x)

    def keep(self, tensor):
        for name in [*self.now, "all"]:
            self.inside[name] += tensor.nbytes
        return tensor

    def count(self, name, modules):
        for module in modules:
            module.register_forward_pre_hook(lambda *_: self.calls.update([name]))

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *told):
        self.hooks.__exit__(*told)


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_chunks_of_words_change_neither_features_nor_gradients(monkeypatch, model, batch, rows):
    tower, table = model.model.vision_tower, model.model.visual_embeddings_table
    pixels, grids = batch["pixel_values"], batch["image_grid_thw"]
    wanted = table(tower(pixels, grids).pooler_output)
    towards = torch.randn_like(wanted)
    wanted.backward(towards)
    right = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(loss, "CHUNK_BYTES", rows * 4 * tower.head_linear.out_features)
    found = model.model.get_visual_features(pixels, grids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    found.backward(towards)
    made = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert made.keys() == right.keys()
    for name, grad in right.items():
        torch.testing.assert_close(
            made[name], grad, rtol=1e-3, atol=1e-5, msg=lambda told, name=name: f"{name}: {told}"
        )


class Widest(TorchDispatchMode):
    """The most rows of any new tensor [..., width], for some widths; parameters' gradients and views left out."""

    def __init__(self, model, *widths):
        super().__init__()
        self.rows = dict.fromkeys(widths, 0)
        self.tables = {parameter.shape for parameter in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        there = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        for tensor in tree_leaves(given):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape not in self.tables:
                width, new = tensor.shape[-1], tensor.untyped_storage().data_ptr() not in there
                if new and width in self.rows:
                    self.rows[width] = max(self.rows[width], tensor.numel() // width)
        return given


def test_training_makes_no_more_rows_of_words_than_a_chunk_holds(monkeypatch, golden_model, batch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 8 * 2**10)
    config = copy.deepcopy(golden_model.config)
    config.visual_vocab_size = config.vision_config.vocab_size = 304  # a width that nothing else has
    model = Ovis2_5ForConditionalGeneration(config).train()
    words, visual = config.vocab_size, 300
    chunk = {words: loss.rows_at_once(words), visual: loss.rows_at_once(visual)}
    with Widest(model, words, visual) as widest:
        model(**batch, use_cache=False).loss.backward()
    assert widest.rows == chunk
    with Widest(model, words, visual) as widest, torch.no_grad():
        model.eval()(**batch, skip_logits=True)
    assert widest.rows == chunk
    with Widest(model, words, visual) as widest, torch.no_grad():
        model(**batch)  # it looks in the right place
    assert widest.rows == chunk | {words: batch["input_ids"].numel()}
    assert int((batch["labels"][:, 1:] != -100).sum()) > chunk[words]
    assert int(batch["image_grid_thw"].prod(1).sum()) // 4 > chunk[visual]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(
    "trained, quiet",
    [
        ((), ("layer0", "layer2", "tower", "table")),
        ((TABLE,), ("layer0", "layer2", "embeddings")),
        ((TOWER + "head_", TABLE), ("layer0", "layer2", "embeddings")),
        ((LAST,), ("layer0", "layer1", "embeddings")),
    ],
)
def test_what_is_frozen_below_keeps_nothing(model, batch, trained, quiet, marked):
    """Also where the patches are marked as trained, as checkpointing and adapters do."""
    train_only(model, "model.language_model.", *trained)
    if marked:
        model.enable_input_require_grads()
    tower = model.model.vision_tower
    layers = {f"layer{i}": layer for i, layer in enumerate(tower.transformer.encoder.layers)}
    named = {"tower": tower, "table": model.model.visual_embeddings_table, "embeddings": tower.transformer.embeddings}
    with Kept(**layers, **named) as kept:
        out = model(**batch, use_cache=False).loss
    assert not any(kept.inside[name] for name in quiet), kept.inside
    assert kept.inside["all"] > 0
    if LAST in trained:
        assert kept.inside["layer2"] > 0
    out.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("adapter", [False, True])
def test_checkpointing_pays_with_a_frozen_tower(model, batch, adapter):
    """The language model's layers run twice and keep little; the tower's run once and keep nothing."""
    if adapter:
        config = LoraConfig(r=4, target_modules=r".*language_model.*(q|v)_proj", init_lora_weights="gaussian")
        model = get_peft_model(model, config)
        inner = model.base_model.model
    else:
        train_only(model, "model.language_model.layers.")
        inner = model
    vision, language = inner.model.vision_tower.transformer.encoder.layers, inner.model.language_model.layers
    kept = {}
    for on in (False, True):
        if on:
            checkpointing(model)
        kept[on] = Kept(tower=inner.model.vision_tower)
        kept[on].count("vision", [layer.mlp for layer in vision])
        kept[on].count("language", [layer.mlp for layer in language])
        with kept[on]:
            out = model(**batch, use_cache=False).loss
        out.backward()
        assert kept[on].inside["tower"] == 0
        assert kept[on].calls == {"vision": len(vision), "language": len(language) * (2 if on else 1)}
    assert kept[True].inside["all"] < 0.5 * kept[False].inside["all"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("trained", [(LAST,), (TOWER + "head_",), (TABLE,), (TOWER, TABLE)])
def test_checkpointing_of_a_part_of_the_tower_gives_its_gradients(model, batch, trained, reentrant):
    train_only(model, *trained)
    found = []
    for on in (False, True):
        if on:
            checkpointing(model, reentrant)
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-7)
    assert all(found[1][name].any() for name in found[1] if name.endswith("fc1.weight"))


def test_pixels_can_have_a_gradient_through_a_frozen_tower(model, batch):
    model.requires_grad_(False)
    pixels = batch["pixel_values"].clone().requires_grad_()
    model(**batch | {"pixel_values": pixels}, use_cache=False).loss.backward()
    assert pixels.grad.any()


def test_the_words_are_one_chunk_where_every_call_is_counted(monkeypatch, model, batch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1)
    calls = []
    model.model.vision_tower.head_linear.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(**batch)
        assert len(calls) == int(batch["image_grid_thw"].prod(1).sum()) // 4
        calls.clear()
        monkeypatch.setattr(loss, "is_deepspeed_zero3_enabled", lambda: True)
        model(**batch)
    assert len(calls) == 1
