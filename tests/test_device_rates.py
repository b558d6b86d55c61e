"""The rates of a device: measured ones by its name, assumed ones for all others; and which back-end they choose."""

import json
from types import SimpleNamespace

import pytest
import torch
from cipo_kernels import rates as rates_file
from cipo_kernels.dispatch import attention_implementation
from cipo_kernels.rates import DeviceRates, both_directions, device_rates, fastest_attention
from transformers import Qwen3Config

from cipo_fast.policy import cost_model

GPU = torch.device("cuda", 0)
MEASURED = {
    "linear": 500.0,
    "attention": {
        "triton": {"forward": 300.0, "backward": 200.0},
        "flash": {"forward": 330.0, "backward": 280.0},
    },
    "fastest": "flash",
    "rows": {"forward": 400.0, "backward": 350.0},
    "source": "a test",
}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A table with one GPU, which this machine is said to have."""
    table = json.loads(rates_file.RATES_FILE.read_text(encoding="utf-8")) | {"Some GPU": MEASURED}
    (tmp_path / "rates.json").write_text(json.dumps(table))
    monkeypatch.setattr(rates_file, "RATES_FILE", tmp_path / "rates.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    device_rates.cache_clear()
    yield
    device_rates.cache_clear()


def test_every_entry_names_a_backend_it_has_rates_of():
    table = json.loads(rates_file.RATES_FILE.read_text(encoding="utf-8"))
    assert "assumed" in table["default"]["source"]
    for entry in table.values():
        rates = DeviceRates(**entry)
        by_rate = {name: both_directions(**directions) for name, directions in rates.attention.items()}
        assert rates.attention_rate == max(by_rate.values())
        assert rates.linear > 0


def test_a_measured_gpu_and_any_other_device(measured, monkeypatch):
    assert device_rates(GPU) == DeviceRates(**MEASURED)
    assert device_rates(torch.device("cpu")).fastest == "triton"
    device_rates.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Another GPU")
    assert device_rates(GPU) == device_rates(torch.device("cpu"))


def test_both_directions_adds_up_times():
    forward_s, backward_s = 4 / 330, 10 / 280
    assert DeviceRates(**MEASURED).attention_rate == pytest.approx(14 / (forward_s + backward_s))
    assert DeviceRates(**MEASURED).rows_rate == pytest.approx(14 / (4 / 400 + 10 / 350))
    assert both_directions(forward=100.0, backward=100.0) == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("dtype", "variable", "expected"),
    [
        (torch.bfloat16, "", "flash"),
        (torch.float16, "", "flash"),
        (torch.float32, "", "triton"),  # not what was measured, and flash attention has none
        (torch.bfloat16, "reference", "reference"),
    ],
)
def test_auto_on_a_gpu_is_what_was_fastest(measured, monkeypatch, dtype, variable, expected):
    monkeypatch.setenv("CIPO_KERNELS", variable)
    q = SimpleNamespace(is_cuda=True, device=GPU, dtype=dtype)
    assert attention_implementation(q) == expected


def test_auto_elsewhere_is_torch(measured, monkeypatch):
    monkeypatch.delenv("CIPO_KERNELS", raising=False)
    assert attention_implementation(torch.zeros(1, dtype=torch.bfloat16)) == "torch"


def test_the_choice_is_a_constant_to_the_compiler(measured):
    def which(x):
        return x + (1 if fastest_attention(GPU) == "flash" else 2)

    assert torch.compile(which, fullgraph=True, backend="eager")(torch.zeros(())) == 1


def test_packs_are_costed_by_time(monkeypatch):
    """In FLOPs of the linear layers: a pair's, at the rate of the attention."""
    rates = DeviceRates(**MEASURED)
    monkeypatch.setattr("cipo_fast.policy.device_rates", lambda: rates)
    config = Qwen3Config(num_hidden_layers=3, num_attention_heads=4, head_dim=8, hidden_size=16, vocab_size=10)
    cost = cost_model(config, num_parameters=1000)
    flops = (4 + 10) * 3 * 4 * 8
    assert cost.per_pair / (rates.linear * 1e12) == pytest.approx(flops / (rates.attention_rate * 1e12))
    assert cost.per_token == 6 * (1000 - 2 * 10 * 16)  # the head is no layer: its targets are counted
    assert cost.per_target == 6 * 10 * 16
