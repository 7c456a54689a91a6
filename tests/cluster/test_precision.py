"""`policy.dtype: auto`: which type a machine gets, and that a run has one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.cluster import precision
from rlhf.cluster.precision import Bf16, Choice, choose, cpu_bf16, gpu_bf16, settle
from rlhf.config import Settings, load
from rlhf.config.sft_checks import load_sft

CONFIGS = Path(__file__).parents[2] / "configs"
ZEN3, ZEN5, SAPPHIRE = {"avx2", "fma"}, {"avx2", "avx512f", "avx512_bf16"}, {"avx512f", "avx512_bf16", "amx_bf16"}


@pytest.mark.parametrize(
    ("flags", "environ", "native", "why"),
    [
        (ZEN5, {}, True, "AVX-512 BF16"),
        (SAPPHIRE, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True, "AVX-512 BF16"),
        ({"asimd", "bf16"}, {}, True, "Arm's BF16"),
        (ZEN3, {}, False, "without AVX-512 BF16 or AMX"),
        ({"avx2", "avx512f"}, {}, False, "without AVX-512 BF16 or AMX"),
        (set(), {}, False, "without"),
        (ZEN5, {"ATEN_CPU_CAPABILITY": "avx2"}, False, "ATEN_CPU_CAPABILITY=avx2"),
        (SAPPHIRE, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False, "ONEDNN_MAX_CPU_ISA=AVX2"),
    ],
)
def test_what_a_processor_computes_in(flags: set[str], environ: dict[str, str], native: bool, why: str) -> None:
    found = cpu_bf16(flags, environ)
    assert found.native == native
    assert why in found.why


def test_what_gpus_compute_in() -> None:
    assert gpu_bf16("NVIDIA A100-SXM4-80GB, 8.0\nNVIDIA H100, 9.0") == Bf16(True, "NVIDIA A100-SXM4-80GB")
    assert gpu_bf16("NVIDIA B200, 10.0").native
    assert gpu_bf16("NVIDIA H100, 9.0\nTesla T4, 7.5") == Bf16(False, "Tesla T4, a GPU without bf16")
    assert gpu_bf16("Orin (nvgpu), [N/A]") == Bf16(True, "Orin (nvgpu)"), "what the driver does not know stops no run"
    assert gpu_bf16(None).native


def test_one_machine_that_emulates_decides_for_all() -> None:
    fast, slow = Bf16(True, "AVX-512 BF16"), Bf16(False, "an old processor")
    assert choose({"a": fast, "b": fast}) == Choice("bf16", "AVX-512 BF16")
    assert choose({"a": fast, "b": slow}) == Choice("fp32", "b: an old processor")


class Nodes:
    """A runtime of which only the question to its nodes is asked."""

    local = False

    def __init__(self, answers: dict[str, Bf16]):
        self._answers, self.asked = answers, 0

    def ask_nodes(self, roles: Collection[str], question: Callable[..., Any], *args: Any) -> dict[str, Bf16]:
        assert set(roles) == {"policy", "rollout"} and question is precision.look and args == (False,)
        self.asked += 1
        return self._answers


def demo(*overrides: str) -> Settings:
    return load(CONFIGS / "movie_reviews.yaml", ["cluster.device=cpu", *overrides])


@pytest.mark.parametrize(("native", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_the_demo_has_a_learning_rate_for_each_type(native: bool, dtype: str) -> None:
    settings, choice = settle(demo(), Nodes({"a": Bf16(True, "x"), "b": Bf16(native, "y")}))
    assert settings.policy.dtype == choice.dtype == dtype
    assert settings.policy.learning_rate == demo().policy.learning_rate[dtype]
    assert demo().policy.learning_rate["fp32"] < demo().policy.learning_rate["bf16"]


def test_what_is_given_is_not_asked_about() -> None:
    nodes = Nodes({"a": Bf16(True, "x")})
    assert settle(demo("policy.dtype=fp32"), nodes)[0].policy.learning_rate == demo().policy.learning_rate["fp32"]
    assert settle(demo("policy.dtype=fp32", "policy.learning_rate=1.0"), nodes)[0].policy.learning_rate == 1.0
    resumed, choice = settle(demo(), nodes, before="fp32")
    assert (resumed.policy.dtype, nodes.asked) == ("fp32", 0)
    assert "resumed" in choice.why
    sft = load_sft(CONFIGS / "movie_reviews" / "sft.yaml", ["policy.dtype=auto", "cluster.device=cpu"])
    assert settle(sft, nodes)[0].policy.dtype == "bf16"


def test_the_type_is_shown_with_its_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = [
        str(CONFIGS / "tiny.yaml"),
        "policy.dtype=auto",
        "policy.learning_rate={bf16: 2e-4, fp32: 1e-4}",
        "run.dir=runs/no",
    ]
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    words = "(this machine: ATEN_CPU_CAPABILITY=avx2)"
    assert main(["config", "show", *tiny]) == 0
    assert f"# policy.dtype: auto is fp32 here {words}" in capsys.readouterr().out
    assert main(["train", "--dry-run", *tiny]) == 0
    shown = capsys.readouterr().out
    assert f"computes in fp32 {words}, learning rate 0.0001" in shown
    assert "(fp32, ZeRO" in shown
    assert main(["train", "--dry-run", *tiny, "policy.dtype=bf16"]) == 0
    assert "computes in bf16 (as `policy.dtype` says, though this machine only emulates it" in capsys.readouterr().out
    assert main(["plan", *tiny]) == 0
    assert f"in fp32 {words}" in capsys.readouterr().out
