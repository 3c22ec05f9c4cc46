"""Which parameters train, and the rate each of them has in the optimizer."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import Trainer, TrainerCallback

from ovisnb.model import load
from ovisnb.train import Settings, SettingsError, run_sft
from ovisnb.train.checks import MODULES, trained_parts
from ovisnb.train.modules import freeze, module_of, own_name, parameter_groups

HEAD, TABLE = "model.vision_tower.head_linear.weight", "model.visual_embeddings_table.weight"
BLOCK = "model.vision_tower.transformer.encoder.layers.2."
QUERY = "model.language_model.layers.0.self_attn.q_proj.weight"


def settings(**values):
    return Settings.from_dict({"weight_decay": 0.1, **values})


@pytest.fixture
def model(golden):
    return load(golden / "checkpoint", dtype=torch.float32)[0].train()


def decaying(model):
    return Trainer.get_decay_parameter_names(None, model)


def groups_of(model, **values):
    """{parameter name: (rate, weight decay, group)} of what trains."""
    settings_ = settings(**values)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"], group["name"])
        for group in parameter_groups(model, settings_, decaying(model))
        for parameter in group["params"]
    }


def trained(model, **values):
    freeze(model, settings(**values))
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_each_module_alone(model):
    names = {name for name, _ in model.named_parameters()}
    vit = {name for name in names if name.startswith("model.vision_tower.transformer.")}
    head = {name for name in names if name.startswith("model.vision_tower.head_")}
    llm = {name for name in names if "language_model" in name or name.startswith("lm_head")}
    assert trained(model, train_modules="all") == names
    assert trained(model, train_modules="llm") == llm
    assert trained(model, train_modules="visual_tokenizer") == vit | head
    assert trained(model, train_modules="visual_tokenizer.vit") == vit
    assert trained(model, train_modules="visual_tokenizer.head") == head
    assert trained(model, train_modules="vte") == {TABLE}
    assert names == llm | vit | head | {TABLE}
    last = trained(model, train_modules="visual_tokenizer.vit.last_block")
    assert last == {name for name in names if name.startswith(BLOCK)} and len(last) == 16
    assert not any("layers.3." in name for name in vit)
    assert trained(model, stage=1) == last | head | {TABLE}
    assert trained(model, stage=2) == names
    assert trained(model, freeze_llm=True) == names - llm
    assert trained(model, train_modules="visual_tokenizer", freeze_vision_tower=True) == head
    assert trained(model, train_modules="vte", freeze_vision_tower=True, freeze_llm=True) == {TABLE}


def test_a_module_of_rate_0_is_frozen(model):
    vit = "model.vision_tower.transformer."
    left = trained(model, train_modules="all|visual_tokenizer.vit:0|visual_tokenizer.vit.last_block:1e-4")
    assert {name for name in left if name.startswith(vit)} == {name for name in left if name.startswith(BLOCK)} != set()
    assert HEAD in left and QUERY in left
    with pytest.raises(SettingsError, match='Nothing is left to train: train_modules is "llm:0"'):
        settings(train_modules="llm:0")


@pytest.mark.parametrize(
    "values",
    [
        {"train_modules": "all|llm:0"},
        {"train_modules": "visual_tokenizer:0|visual_tokenizer.vit.last_block"},
        {"train_modules": "visual_tokenizer|vte:1e-3", "freeze_vision_tower": True},
        {"train_modules": "all", "freeze_llm": True},
        {"stage": 1},
    ],
)
def test_what_is_said_to_train_is_what_trains(model, values):
    counts = freeze(model, settings(**values))
    assert [part for part, count in counts.items() if count] == trained_parts(settings(**values))


def test_the_most_specific_module_gives_the_rate(model):
    found = groups_of(
        model,
        learning_rate=1e-6,
        train_modules="visual_tokenizer.vit.last_block:4|all:1|visual_tokenizer:2|visual_tokenizer.vit:3|vte",
    )
    rates = {name: rate for name, (rate, _, _) in found.items()}
    assert rates[QUERY] == 1 and rates[HEAD] == 2 and rates[TABLE] == 1e-6
    assert rates[f"{BLOCK}mlp.fc1.weight"] == 4 and rates[f"{BLOCK.replace('layers.2', 'layers.1')}mlp.fc1.weight"] == 3
    assert set(found) == {name for name, _ in model.named_parameters()}


def test_weight_decay_spares_norms_biases_and_embeddings(model):
    found = groups_of(model, train_modules="all")
    spared = {name for name, (_, decay, _) in found.items() if not decay}
    modules = dict(model.named_modules())
    for name in found:
        owner, _, kind = name.rpartition(".")
        plain = isinstance(modules[owner], (nn.Linear, nn.Conv2d)) and kind == "weight"
        assert (name in spared) != plain, name
    assert {TABLE, "model.language_model.embed_tokens.weight"} <= spared
    assert "model.vision_tower.transformer.embeddings.position_embedding.weight" in spared
    assert {group for _, _, group in found.values()} == {"all", "all (no decay)"}


def test_a_tied_output_layer_is_an_embedding(model):
    groups = parameter_groups(model, settings(), {*decaying(model), "model.language_model.embed_tokens.weight"})
    tied = [group["weight_decay"] for group in groups for each in group["params"] if each is model.lm_head.weight]
    assert tied == [0]
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert groups_of(model)["lm_head.weight"][1] == 0.1
    assert groups_of(model)["model.language_model.embed_tokens.weight"][1] == 0


def test_groups_hold_everything_once_and_none_is_empty(model):
    for modules in (*MODULES, "visual_tokenizer.head:1e-4|llm:2e-5"):
        freeze(model, settings(train_modules=modules))
        groups = parameter_groups(model, settings(train_modules=modules), decaying(model))
        ids = [id(each) for group in groups for each in group["params"]]
        assert len(ids) == len(set(ids))
        assert set(ids) == {id(each) for each in model.parameters() if each.requires_grad}
        assert all(group["params"] for group in groups)
        assert len({group["name"] for group in groups}) == len(groups)


def test_names_under_wrappers(model):
    assert own_name("base_model.model.model.language_model.norm.weight") == "model.language_model.norm.weight"
    assert own_name("module._orig_mod.lm_head.weight") == "lm_head.weight"
    assert own_name(HEAD) == HEAD
    wrapped = [f"module.{name}" for name, _ in model.named_parameters()]
    assert module_of(wrapped, ["llm", "vte"])[f"module.{TABLE}"] == "vte"


def test_adapters_have_their_modules_rate(model):
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "embed_tokens", "fc1"],
        modules_to_save=["head_linear", "visual_embeddings_table"],
        use_dora=False,
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    found = groups_of(
        adapted, use_lora=True, learning_rate=5e-5, train_modules="llm:1|visual_tokenizer.head:2|visual_tokenizer:3"
    )
    rates = {own_name(name): (rate, decay) for name, (rate, decay, _) in found.items()}
    assert rates[QUERY.replace("weight", "lora_A.default.weight")] == (1, 0.1)
    assert rates["model.language_model.embed_tokens.lora_embedding_A.default"] == (1, 0)
    assert rates["model.vision_tower.head_linear.modules_to_save.default.weight"] == (2, 0.1)
    assert rates[f"{BLOCK}mlp.fc1.lora_B.default.weight"] == (3, 0.1)
    assert rates["model.visual_embeddings_table.modules_to_save.default.weight"] == (5e-5, 0)
    assert {name for name, _ in adapted.named_parameters() if name in found} == {
        name for name, each in adapted.named_parameters() if each.requires_grad
    }
    dora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    found = groups_of(dora, use_dora=True)
    magnitudes = {name: decay for name, (_, decay, _) in found.items() if "magnitude" in name}
    assert magnitudes and not any(magnitudes.values())


class Rates(TrainerCallback):
    """{group: rate} after every step, as the optimizer has them."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.kind = type(optimizer).__name__
        self.groups = optimizer.param_groups
        self.seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})


def test_rates_reach_the_optimizer(model, golden, tmp_path):
    """Read off the optimizer that accelerate wrapped, after real steps, with a scheduler that has moved on."""
    record = {
        "image": Image.new("RGB", (64, 64), "red"),
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}],
    }
    values = settings(
        model_path=str(golden / "checkpoint"),
        output_dir=str(tmp_path / "run"),
        train_modules="visual_tokenizer.head:1e-2|llm:2e-3|visual_tokenizer.vit:0",
        learning_rate=0.5,
        lr_scheduler_type="linear",
        max_steps=4,
        save_steps=0,
        min_pixels=32 * 32,
        max_pixels=64 * 64,
        report_to="none",
    )
    rates = Rates()
    folder = run_sft(values, train_dataset=[record], callbacks=[rates])
    assert rates.kind == "AcceleratedOptimizer"
    whole = {
        "llm": 2e-3,
        "llm (no decay)": 2e-3,
        "visual_tokenizer.head": 1e-2,
        "visual_tokenizer.head (no decay)": 1e-2,
    }
    assert {group["name"]: group["initial_lr"] for group in rates.groups} == whole
    assert {group["name"]: group["weight_decay"] for group in rates.groups} == {
        name: 0.0 if "no decay" in name else 0.1 for name in whole
    }
    for step, seen in enumerate(rates.seen, 1):
        assert seen == pytest.approx({name: rate * (1 - step / 4) for name, rate in whole.items()})
    before, after = model.state_dict(), load(folder / "final")[0].state_dict()
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert {name for name in before if name.startswith(("model.vision_tower.transformer.", TABLE))} == same


@pytest.mark.parametrize("optim", ["adafactor", "sgd", "adamw_torch_fused", "adamw_bnb_8bit"])
def test_rates_reach_any_optimizer(toy, optim):
    rates = Rates()
    run_sft(toy(optim=optim, train_modules="vte:1e-3|llm:2e-4", max_steps=1, save_steps=0), callbacks=[rates])
    assert {group["name"]: group["initial_lr"] for group in rates.groups} == {
        "llm": 2e-4,
        "llm (no decay)": 2e-4,
        "vte (no decay)": 1e-3,
    }


def test_an_optimizer_with_groups_of_its_own_takes_no_rates(toy, monkeypatch):
    options = {"params": [], "lr": 1e-3}
    monkeypatch.setattr(
        Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args, model=None: (torch.optim.SGD, dict(options)))
    )
    with pytest.raises(SettingsError, match='optim "adamw_torch" has one learning rate for all it trains'):
        run_sft(toy(train_modules="vte:1e-4|llm:2e-4", max_steps=1))
