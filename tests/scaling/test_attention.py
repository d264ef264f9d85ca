"""Choice of the attention kernel: measured once, then fixed for the run."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch.nn.attention import SDPBackend

from scaling.spec import MLAConfig, ModelConfig, MoEConfig
from scaling.training import attention_backend

SHAPE = ModelConfig(layers=1, width=32, heads=2, vocabulary=8, context=16)
LATENT = ModelConfig(
    layers=2, width=32, heads=2, vocabulary=8, context=16, ffn=16, family="moonlight-moe",
    moe=MoEConfig(experts=2, top_k=1, dense_layers=1), mla=MLAConfig(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
)  # fmt: skip


@pytest.mark.parametrize("shape", [SHAPE, LATENT], ids=["plain", "latent"])
def test_supported_kernels_are_measured(shape: ModelConfig) -> None:
    seconds = attention_backend.measure(
        shape, sequences=2, device=torch.device("cpu"), precision="fp32", candidates=(SDPBackend.MATH,)
    )
    assert seconds["MATH"] > 0


def test_a_resumed_run_keeps_its_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([{"MATH": 2.0, "FLASH_ATTENTION": 1.0}, {"MATH": 1.0, "FLASH_ATTENTION": 2.0}])
    monkeypatch.setattr(attention_backend, "measure", lambda *_, **__: next(answers))
    gpu = torch.device("cuda")
    first, second = (
        attention_backend.chosen_kernel(tmp_path, SHAPE, sequences=2, device=gpu, precision="bf16") for _ in range(2)
    )
    assert first is second is SDPBackend.FLASH_ATTENTION


@pytest.mark.parametrize(
    ("precision", "context", "kernel"), [("fp32", 16, None), ("bf16", 16, SDPBackend.MATH), ("bf16", 512, None)]
)
def test_the_cpu_choice_depends_only_on_the_run(
    tmp_path: Path, precision: str, context: int, kernel: SDPBackend | None
) -> None:
    shape, cpu = msgspec.structs.replace(SHAPE, context=context), torch.device("cpu")
    assert attention_backend.chosen_kernel(tmp_path, shape, sequences=2, device=cpu, precision=precision) is kernel
    assert not list(tmp_path.iterdir())
