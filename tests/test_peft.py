"""LoRA through peft: the frozen base is streamed, adapters are trained, and save_pretrained writes the adapter."""

from __future__ import annotations

import copy
from pathlib import Path

import reference
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from test_exactness import assert_same, least_memory, streamed

import offload

ROWS, TOTAL = 2, 6


def adapted() -> PeftModel:
    model = zoo.make("llama")
    torch.manual_seed(1)
    wrapped = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return wrapped


def test_adapters_equal_plain_pytorch(fast_path: Path) -> None:
    model = adapted()
    batches = zoo.batches("llama", reference.STEPS, TOTAL)
    want = reference.train(model, batches, ROWS)
    least = least_memory(fast_path / "plan", model, TOTAL)
    for where, changes in {"cpu": {}, "nvme": least}.items():
        assert_same(streamed(fast_path / where, model, batches, TOTAL, **changes), want)


def test_only_adapters_have_state_and_are_saved(fast_path: Path) -> None:
    model = adapted()
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    cfg = reference.config(fast_path / "run", ROWS, TOTAL)
    with offload.wrap(copy.deepcopy(model), cfg) as engine:
        block = next(u for u in engine._held.states.units if u.unit.kind == "block")
        assert block.sizes["exp_avg"] < block.sizes["frozen"] / 4
        for batch in zoo.batches("llama", 2, TOTAL):
            engine.step(batch)
        engine.save_pretrained(fast_path / "adapter")
        trained = reference.weights(engine)
    assert (fast_path / "adapter" / "adapter_model.safetensors").is_file()
    loaded = PeftModel.from_pretrained(zoo.make("llama"), fast_path / "adapter")
    for name, p in loaded.named_parameters():
        assert torch.equal(p, base[name] if name in base else trained[name])
    again = offload.resume(fast_path / "run", model=adapted())
    assert again.completed_steps == 2
    resumed = reference.weights(again)
    again.close()
    assert all(torch.equal(resumed[name], trained[name]) for name in trained)
