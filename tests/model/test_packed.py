"""A packed row is its samples, each alone: loss, gradients, what a token can see, on text models of several kinds."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn import functional as F
from transformers import GPT2Config, LlamaConfig, MistralConfig

from ovisnb.chat import EncodeError, collate, encode
from ovisnb.model import Ovis2_5ForConditionalGeneration, load, packed
from tests.chat.conversations import LIMITS, records

KINDS = ["qwen3", "tiny", "llama", "gpt2"]


def picture(width, height, seed=0):
    noise = torch.randint(0, 255, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def with_text_model(model, text_config):
    """A new model of random weights: the golden vision tower's shape and another text model."""
    config = copy.deepcopy(model.config)
    config.text_config = text_config
    config.tie_word_embeddings = text_config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = Ovis2_5ForConditionalGeneration._from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()


@pytest.fixture(scope="module")
def models(golden_pair):
    """kind -> (model, processor), float32"""
    golden = golden_pair[0]
    small = {"vocab_size": golden.config.vocab_size, "hidden_size": 32, "num_hidden_layers": 2}
    llama = LlamaConfig(**small, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    gpt2 = GPT2Config(
        vocab_size=small["vocab_size"], n_positions=4096, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return {
        "qwen3": load("tests/golden/ovis2_5/checkpoint", dtype=torch.float32, attn_implementation="sdpa"),
        "tiny": load("data/tiny-ovis", dtype=torch.float32, attn_implementation="sdpa"),
        "llama": (with_text_model(golden, llama), golden_pair[1]),
        "gpt2": (with_text_model(golden, gpt2), golden_pair[1]),
    }


@pytest.fixture(autouse=True)
def as_before(models):
    yield
    for model, _ in models.values():
        model.model.language_model.set_attn_implementation("sdpa")
        model.zero_grad()


def talk(question, answer, **media):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **media}


def mixed(processor):
    """Samples of text, of pictures of several sizes, of a video, of one token."""
    made = [
        talk("<image>\nWhat?", "A ring.", image=[picture(40, 64)]),
        talk("Where is it?", "<think>\nhm\n</think>\n\nThere is no image."),
        talk("<video> and?", "Yes.", video=[picture(48, 32, 1), picture(48, 32, 2), picture(48, 32, 3)]),
        talk("<image> or <image>", "The left one.", image=[picture(64, 33, 4), picture(32, 32, 5)]),
        talk("Hi", "Ho"),
    ]
    samples = [encode(record, processor, **LIMITS) for record in made]
    return [*samples[:2], one_token(samples[1]), *samples[2:]]


def one_token(sample):
    nothing = dict.fromkeys(("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"))
    return replace(sample, input_ids=sample.input_ids[:1], labels=sample.labels[:1], spans=sample.spans[:1], **nothing)


def supervised(samples):
    return sum(int((sample.labels[1:] != -100).sum()) for sample in samples)


def gradients(model, batches, count):
    """Sum of the losses over `count` tokens, and the gradient of every parameter, by name."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, samples):
    count = max(supervised(samples), 1)
    loss, found = gradients(model, [collate(samples, packed=True)], count)
    wanted_loss, wanted = gradients(model, [collate([sample]) for sample in samples], count)
    assert loss == pytest.approx(wanted_loss, abs=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert found.keys() == wanted.keys()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_every_gradient_are_those_of_the_samples_alone(models, kind, attention):
    model, processor = models[kind]
    model.model.language_model.set_attn_implementation(attention)
    assert_same(model, mixed(processor))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(chosen=st.lists(records(), min_size=1, max_size=4), short=st.booleans())
def test_so_are_they_for_any_mix(models, chosen, short):
    model, processor = models["qwen3"]
    samples = []
    for record in chosen:
        try:
            samples.append(encode(record, processor, **LIMITS))
        except EncodeError:  # a generated record may hold nothing to learn
            continue
    if samples:
        assert_same(model, [one_token(samples[0])] * short + samples)


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_another_sample(models, kind):
    model, processor = models[kind]
    samples = mixed(processor)
    batch = collate(samples, packed=True)
    ends = batch["cu_seq_lens_q"].tolist()
    changed = batch["input_ids"].clone()
    place = ends[1] + 1  # in the second sample, a text
    changed[0, place] = (changed[0, place] + 1) % 97
    with torch.no_grad():
        before = model(**batch).logits[0]
        after = model(**batch | {"input_ids": changed}).logits[0]
        same = (before == after).all(1)
        assert same[: ends[1] + 1].all() and same[ends[2] :].all() and not same[place : ends[2]].any()
        for sample, start, end in zip(samples, ends, ends[1:], strict=False):
            alone = model(**collate([sample])).logits[0]
            torch.testing.assert_close(before[start:end], alone, atol=1e-4, rtol=1e-4)


def test_no_mask_over_the_row_is_made(models, monkeypatch):
    model, processor = models["qwen3"]
    masks = []
    forward = packed.sdpa_attention_forward

    def noting(module, query, key, value, attention_mask, *args, **kwargs):
        masks.append((query.shape[2], attention_mask))
        return forward(module, query, key, value, attention_mask, *args, **kwargs)

    monkeypatch.setattr(packed, "sdpa_attention_forward", noting)
    samples = mixed(processor)
    model(**collate(samples, packed=True))
    assert [length for length, _ in masks] == [len(sample) for sample in samples] * 3  # layers
    assert all(mask is None for _, mask in masks)


def test_gradient_checkpointing_lora_and_autocast(models):
    model, processor = copy.deepcopy(models["qwen3"][0]), models["qwen3"][1]
    batch = collate(mixed(processor), packed=True)
    wanted, gradient = gradients(model, [batch], 10)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    loss, again = gradients(model, [batch], 10)
    assert loss == pytest.approx(wanted, rel=1e-6)
    for name, value in gradient.items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**batch, num_items_in_batch=10).loss.item() == pytest.approx(wanted, rel=0.05)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    loss = adapted(**batch, num_items_in_batch=10).loss
    assert loss.item() == pytest.approx(wanted, abs=1e-5)
    loss.backward()


def test_generation_padding_and_a_saved_config_stay_as_they_were(models, tmp_path):
    model, processor = models["tiny"]
    samples = mixed(processor)
    prompts = {key: value for key, value in collate(samples, "left").items() if key != "labels"}
    ordinary = collate(samples)

    def all_of_it():
        with torch.no_grad():
            answers = model.generate(**prompts, max_new_tokens=5, do_sample=False)
            return answers, model(**ordinary).logits

    answers, logits = all_of_it()
    model.config.save_pretrained(tmp_path / "before")
    model(**collate(samples, packed=True))
    again, logits_again = all_of_it()
    assert torch.equal(answers, again) and torch.equal(logits, logits_again)
    model.config.save_pretrained(tmp_path / "after")
    assert (tmp_path / "before/config.json").read_text() == (tmp_path / "after/config.json").read_text()


def test_the_kernel_for_samples_of_any_length_gets_the_same_numbers(models, monkeypatch):
    """The CUDA path with the kernel replaced by its definition."""

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert q.dim() == 3 and window_size == (-1, 0) and enable_gqa == (q.shape[1] != k.shape[1])
        assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q[-1] == len(q) and max_q == max_k == cu_q.diff().max()
        rows = torch.arange(len(q))
        owner = torch.searchsorted(cu_q[1:].long(), rows, right=True)
        mask = (owner[:, None] == owner) & (rows[:, None] >= rows)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        return out.transpose(0, 1)

    import torch.nn.attention.varlen as library

    monkeypatch.setattr(library, "varlen_attn", kernel)
    monkeypatch.setattr(packed, "takes_varlen", lambda query, value: True)
    for kind in ("qwen3", "gpt2"):
        model, processor = models[kind]
        assert_same(model, mixed(processor))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_in_bfloat16(models):
    model, processor = copy.deepcopy(models["qwen3"][0]).to("cuda", torch.bfloat16), models["qwen3"][1]
    samples = mixed(processor)

    def on(batch):
        return {key: value.cuda() if torch.is_tensor(value) else value for key, value in batch.items()}

    with torch.no_grad():
        row = model(**on(collate(samples, packed=True))).logits[0]
        alone = torch.cat([model(**on(collate([sample]))).logits[0] for sample in samples])
    torch.testing.assert_close(row, alone, atol=0.05, rtol=0.05)


def test_a_broken_row_names_the_sample(models):
    model, processor = models["qwen3"]
    samples = mixed(processor)
    cut = replace(samples[3], input_ids=samples[3].input_ids[:-8], labels=samples[3].labels[:-8])
    place = int((cut.input_ids == processor.visual_ids.atom).nonzero()[0])
    missing = torch.cat([cut.input_ids[:place], cut.input_ids[place + 1 :]])
    cut = replace(cut, input_ids=missing, labels=cut.labels[1:])
    with pytest.raises(ValueError, match=r"Sample 3: video 0 of the batch has \d+ placeholder tokens"):
        model(**collate([*samples[:3], cut, *samples[4:]], packed=True))
    batch = collate(samples, packed=True)
    with pytest.raises(ValueError, match="lengths add up"):
        model(**batch | {"cu_seq_lens_q": batch["cu_seq_lens_q"][:-1]})
    with pytest.raises(ValueError, match="without attention_mask"):
        model(**batch, attention_mask=torch.ones_like(batch["input_ids"]))


def test_text_models_whose_attention_is_not_causal_over_everything_are_refused(models):
    golden = models["qwen3"][0]
    small = {"vocab_size": golden.config.vocab_size, "hidden_size": 32, "intermediate_size": 48}
    config = MistralConfig(**small, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, sliding_window=8)
    model, samples = with_text_model(golden, config), mixed(models["qwen3"][1])
    with pytest.raises(ValueError, match=r"\(mistral\) has layers of another attention .* set packing to false"):
        model(**collate(samples, packed=True))
    model.config.text_config.sliding_window = None
    model.model.language_model._supports_attention_backend = False
    with pytest.raises(ValueError, match="is its own"):
        model(**collate(samples, packed=True))


def test_attention_that_is_not_told_of_the_samples_is_refused():
    query = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match="passes no sample_lengths on"):
        packed.packed_sdpa(torch.nn.Module(), query, query, query, torch.ones(1, 1, 1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="adds a bias"):
        packed.packed_sdpa(
            torch.nn.Module(), query, query, query, None, sample_lengths=(5,), position_bias=torch.zeros(1, 1, 5, 5)
        )
