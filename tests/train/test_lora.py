"""Adapters: where they go, what trains, how large the update became; and that plain PEFT opens what was saved."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file

import ovisnb
from ovisnb.chat import collate, encode
from ovisnb.generate import Ovis25Inference
from ovisnb.model import CheckpointError
from ovisnb.train import Settings, SettingsError
from ovisnb.train.lora import adapted, linear_layers, open_base, trained_shares, update_norms

TINY = Path(__file__).parents[2] / "data" / "tiny-ovis"
LLM = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
VIT = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}

# Every way of choosing what trains; also those that are merged in test_merge.
WAYS = {
    "llm": {},
    "llm+vision, rsLoRA": {"lora_preset": "llm+vision", "use_rslora": True},
    "all-linear, DoRA": {"lora_preset": "all-linear", "use_dora": True},
    "parts whole": {"lora_modules_to_save": ["vte", "visual_tokenizer.head"]},
    "tied table whole": {"lora_modules_to_save": ["embed_tokens"], "use_dora": True},
    "tied head whole": {"lora_modules_to_save": ["lm_head"], "use_rslora": True},
    "own": {"lora_target_modules": "q_proj,fc1,self_attn.v_proj"},
    "4 bit": {"load_in_4bit": True, "lora_preset": "llm+vision"},
}


def settings(**changes) -> Settings:
    return Settings.from_dict({"model_path": str(TINY), "use_lora": True, "lora_r": 4, "seed": 1} | changes)


def opened(**changes):
    """(adapted model, processor, batch) of the tiny checkpoint."""
    chosen = settings(**changes)
    base, processor = open_base(chosen)
    record = {
        "image": Image.new("RGB", (64, 64), "red"),
        "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "red circle"}],
    }
    return adapted(base, chosen), processor, collate([encode(record, processor)])


def steps(model, batch, count: int = 2, rate: float = 1e-3) -> None:
    """Train on one batch."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(count):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    return model.eval()(**batch).logits


def targeted(model) -> set[str]:
    """Names of the base's layers that have an adapter."""
    found = {name.partition(".lora_A.")[0] for name, _ in model.named_modules() if ".lora_A.default" in name}
    return {name.removeprefix("base_model.model.") for name in found}


@pytest.mark.parametrize("way", WAYS)
def test_a_new_adapter_changes_nothing_trains_and_opens_in_plain_peft(way, tmp_path):
    model, processor, batch = opened(**WAYS[way])
    with model.disable_adapter():
        before = logits(model, batch)
    assert torch.equal(logits(model, batch), before)
    steps(model, batch)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    after = logits(model, batch)
    assert (after - before).abs().max() > 1e-3

    folder = ovisnb.save(model, processor, tmp_path / "adapter")
    bits = {"quantization": "4bit"} if "4" in way else {}
    base, _ = ovisnb.load(TINY, dtype="float32", **bits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        plain = PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(plain, batch), after)
    ours, again = ovisnb.load(folder, dtype="float32", **bits)
    assert isinstance(ours, PeftModel) and torch.equal(logits(ours, batch), after)
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.chat_template == processor.chat_template
    assert model.peft_config["default"].base_model_name_or_path == str(TINY)
    assert not list(folder.glob("model*")) and not (folder / "config.json").exists()


def test_presets_name_the_layers_that_they_say():
    llm, vit = "model.language_model.", "model.vision_tower.transformer."
    model, _, _ = opened()
    linear = set(linear_layers(model.get_base_model().__class__(model.config)))  # of a model without adapters
    found = targeted(model)
    assert found == {name for name in linear if name.startswith(llm)}
    assert {name.rpartition(".")[2] for name in found} == LLM
    found = targeted(opened(lora_preset="llm+vision")[0])
    assert found == {name for name in linear if name.startswith((llm, vit))}
    assert {name.rpartition(".")[2] for name in found if name.startswith(vit)} == VIT
    found = targeted(opened(lora_preset="all-linear")[0])
    assert found == linear and "model.vision_tower.head_linear" in found and "lm_head" not in found


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("q_proj, v_proj", r"model\.language_model\..*\.(q_proj|v_proj)"),
        ("fc2", r"model\.vision_tower\..*\.fc2"),
        ("head_linear", r"model\.vision_tower\.head_linear"),
        ("layers.0.self_attn.q_proj", r".*\.layers\.0\.self_attn\.q_proj"),
        (r"model\.vision_tower\..*\.(q|v)_proj", r"model\.vision_tower\..*\.(q|v)_proj"),
        ("k_proj,model.vision_tower.head_linear", r"model\.language_model\..*\.k_proj|.*head_linear"),
    ],
)
def test_own_targets_mean_what_their_user_means(own, expected):
    model, _, _ = opened(lora_target_modules=own)
    assert targeted(model) == {name for name in linear_layers_of_the_base() if re.fullmatch(expected, name)}
    if own == "layers.0.self_attn.q_proj":
        assert len(targeted(model)) == 2  # with dots, PEFT's own meaning: of both towers


def linear_layers_of_the_base() -> list[str]:
    return linear_layers(ovisnb.load(TINY)[0])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora_target_modules": "qproj"}, "the model has no module qproj: did you mean q_proj"),
        (
            {"lora_target_modules": "lm_head"},
            r"lm_head \(LanguageHead\) is no linear layer below the output: give it as",
        ),
        (
            {"lora_target_modules": "embed_tokens"},
            "is no linear layer below the output: give it as lora_modules_to_save",
        ),
        ({"lora_target_modules": "mlp"}, "is no linear layer below the output: name the linear layers in it"),
        ({"lora_target_modules": "(q_proj"}, "is no regular expression"),
        ({"lora_target_modules": "q_.*"}, "matches no module: it is matched with the whole name"),
        ({"lora_target_modules": "all-linear,q_proj"}, "takes every linear layer"),
        ({"lora_modules_to_save": ["vtee"]}, "the model has no module vtee: did you mean vte"),
        ({"lora_modules_to_save": ["llm"]}, "llm whole is no LoRA any more"),
        ({"lora_modules_to_save": ["layers"]}, "has no weights of its own: name what is in it"),
        ({"lora_modules_to_save": ["mlp", "self_attn"]}, "trains every target whole"),
        ({"lora_modules_to_save": ["visual_tokenizer.vit"], "load_in_4bit": True}, "is in 4 bit, which cannot train"),
        (
            {"lora_target_modules": "fc1", "freeze_vision_tower": True},
            "freeze_vision_tower contradicts LoRA's settings",
        ),
    ],
)
def test_what_cannot_be_adapted_is_one_sentence(changes, sentence):
    chosen = settings(**changes)
    model, _ = open_base(chosen)
    with pytest.raises(SettingsError, match=sentence) as caught:
        adapted(model, chosen)
    assert ". " not in str(caught.value) and str(caught.value)[-1] in ".?"


def test_a_model_of_no_folder_can_have_no_adapter():
    model, _ = ovisnb.load(TINY)
    model.config.name_or_path = ""
    with pytest.raises(SettingsError, match="needs a base model in a folder"):
        adapted(model, settings())


def test_the_shares_count_adapters_and_whole_modules_against_the_base():
    base, _ = ovisnb.load(TINY)
    whole = {part: count for part, (_, count) in trained_shares(base).items()}
    assert sum(whole.values()) == sum(parameter.numel() for parameter in base.parameters())
    model, _, _ = opened(lora_modules_to_save=["vte"])
    shares = trained_shares(model)
    assert {part: count for part, (_, count) in shares.items()} == whole
    layers = [module for name, module in base.named_modules() if name in set(targeted(model))]
    assert shares["llm"][0] == sum(4 * (layer.in_features + layer.out_features) for layer in layers)
    assert shares["vte"] == (whole["vte"], whole["vte"])
    assert shares["visual_tokenizer.vit"][0] == shares["visual_tokenizer.head"][0] == 0
    four = trained_shares(opened(load_in_4bit=True, lora_modules_to_save=["vte"])[0])
    assert four == shares


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_modules_to_save": ["vte"]}])
def test_the_norms_are_those_of_what_merging_adds(changes):
    model, _, batch = opened(**changes)
    assert all(update.ratio < 1e-6 for update in update_norms(model))  # DoRA divides by norms
    steps(model, batch, rate=1e-2)
    updates = {update.module: update for update in update_norms(model)}
    whole = {"model.visual_embeddings_table"} if "lora_modules_to_save" in changes else set()
    assert set(updates) == targeted(model) | whole
    before = ovisnb.load(TINY, dtype="float32")[0].state_dict()
    after = model.merge_and_unload().state_dict()
    for name, update in updates.items():
        old, new = before[f"{name}.weight"], after[f"{name}.weight"]
        assert update.update == pytest.approx((new - old).norm().item(), rel=1e-4)
        assert update.weight == pytest.approx(old.norm().item(), rel=1e-5)
    update = updates["model.language_model.layers.2.mlp.up_proj"]
    assert (update.part, update.layer, update.projection) == ("llm", 2, "up_proj")


def test_the_same_seed_gives_the_same_adapter_and_leaves_the_random_numbers_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    models = [opened(seed=seed)[0] for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    first, same, other = ({n: p for n, p in model.named_parameters() if "lora_A" in n} for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_adapters_of_a_bfloat16_base_are_float32():
    model, _, _ = opened(bf16=True, lora_modules_to_save=["vte"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(reentrant):
    gradients = []
    for recompute in (False, True):
        model, _, batch = opened(lora_preset="llm+vision")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)
        model.train()
        if recompute:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        model(**batch, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_4_bit_keeps_the_head_and_the_tables_whole_and_passes_gradients_after_an_evaluation():
    from bitsandbytes.nn import Linear4bit

    model, _, batch = opened(load_in_4bit=True)
    base = model.get_base_model()
    four = {name.replace(".base_layer", "") for name, module in base.named_modules() if isinstance(module, Linear4bit)}
    assert four == set(linear_layers_of_the_base()) - {"model.vision_tower.head_linear"}
    assert base.lm_head.weight.dtype == base.model.vision_tower.head_norm.weight.dtype == torch.float32
    gradients = []
    for evaluates in (False, True):
        if evaluates:
            logits(model, batch)
        model.train().zero_grad()
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if "lora_B" in name})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient.any() for gradient in gradients[0].values())


def test_an_adapter_answers_without_merging(tmp_path):
    model, processor, _ = opened()
    ovisnb.save(model, processor, tmp_path / "adapter")
    answer = Ovis25Inference(tmp_path / "adapter").single_image_inference(
        Image.new("RGB", (64, 64), "red"), "What is it?", max_new_tokens=3, do_sample=False
    )
    assert answer.usage["new_tokens"] >= 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, processor, _ = opened()
    return ovisnb.save(model, processor, tmp_path_factory.mktemp("opening") / "adapter")


@pytest.fixture
def copy(folder, tmp_path):
    """The adapter folder, free to be spoilt."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


class TestOpening:
    def test_a_base_that_is_not_there(self, copy, tmp_path):
        file = copy / "adapter_config.json"
        file.write_text(file.read_text().replace(str(TINY), str(tmp_path / "gone")))
        with pytest.raises(
            CheckpointError, match="gone, the base model of .*copy, is no checkpoint here: give base_model"
        ):
            ovisnb.load(copy)
        model, processor = ovisnb.load(copy, base_model=TINY)
        assert isinstance(model, PeftModel) and processor.visual_ids

    def test_a_base_of_other_sizes(self, copy, golden):
        with pytest.raises(CheckpointError, match="copy does not fit its base model") as caught:
            ovisnb.load(copy, base_model=golden / "checkpoint")
        assert "\n" not in str(caught.value)

    def test_a_base_that_is_an_adapter(self, folder, copy):
        with pytest.raises(CheckpointError, match="is an adapter itself: merge that one first"):
            ovisnb.load(copy, base_model=folder)

    def test_a_missing_tensor(self, copy):
        tensors = load_file(copy / "adapter_model.safetensors")
        name = min(tensors)
        del tensors[name]
        save_file(tensors, copy / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"missing: {re.escape(name)}, 1 in all"):
            ovisnb.load(copy)

    def test_pickled_weights(self, copy):
        (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
        with pytest.raises(CheckpointError, match="has no adapter_model.safetensors: save the adapter anew"):
            ovisnb.load(copy)

    def test_another_kind_of_adapter(self, copy):
        file = copy / "adapter_config.json"
        file.write_text(file.read_text().replace('"LORA"', '"VERA"'))
        with pytest.raises(CheckpointError, match="peft_type 'VERA': give a LoRA"):
            ovisnb.load(copy)

    def test_a_base_for_what_is_no_adapter(self):
        with pytest.raises(CheckpointError, match="is no adapter folder, so there is no use for base_model"):
            ovisnb.load(TINY, base_model=TINY)

    def test_a_quantization_that_is_none(self):
        with pytest.raises(CheckpointError, match="quantization '3bit' is not known"):
            ovisnb.load(TINY, quantization="3bit")

    def test_the_released_layout_holds_no_adapter(self, folder, tmp_path):
        model, processor = ovisnb.load(folder)
        with pytest.raises(ValueError, match="holds no adapter; merge it"):
            ovisnb.save(model, processor, tmp_path / "released", layout="released")
