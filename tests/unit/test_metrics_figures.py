"""The log line, the units in it, and the arithmetic behind it."""

import math
import time

import pytest
import torch

from megatron.config.flops import TokenFlops
from megatron.metrics.interval import Interval, Workload, interval_metrics, log_line
from megatron.metrics.peaks import FP16_PEAKS, OTHER_CARDS, PEAKS, measured_flops, peak_flops
from megatron.units import duration, perplexity, short_number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (0.0, "0.00"),
        (0.123, "0.123"),
        (9.996, "10.0"),
        (950, "950"),
        (999.6, "1.00k"),
        (39832, "39.8k"),
        (162_000_000, "162M"),
        (20_500_000_000, "20.5B"),
        (3e12, "3.00T"),
        (4e15, "4000T"),
    ],
)
def test_a_number_is_shortened_to_three_digits_and_a_prefix(value, text):
    assert short_number(value) == text


def test_the_prefix_belongs_to_the_unit():
    assert short_number(1.714e14, "FLOP/s/gpu") == "171 TFLOP/s/gpu"
    assert short_number(12.0, "FLOP/s/rank") == "12.0 FLOP/s/rank"
    assert short_number(1.7e18, "FLOP") == "1700 PFLOP"
    assert short_number(2.5e9, "FLOP") == "2.50 GFLOP"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m"), (75, "1m 15s"), (3601, "1h"), (3660, "1h 1m"), (100800, "1d 4h")],
)
def test_a_time_is_told_in_its_two_largest_units(seconds, text):
    assert duration(seconds) == text


def test_perplexity_of_a_hopeless_loss_is_infinite_and_of_nan_is_nan():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("AMD Instinct MI250X", 191.5),
    ],
)
def test_the_peak_of_a_known_card_is_found_by_its_name(card, tflops):
    assert peak_flops(None, card, "bf16") == peak_flops(None, card, "fp16") == tflops * 1e12


@pytest.mark.parametrize(
    ("card", "tflops"), [("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-32GB", 112), ("Tesla T4", 65)]
)
def test_cards_before_ampere_have_a_peak_in_fp16_only(card, tflops):
    assert peak_flops(None, card, "fp16") == tflops * 1e12
    assert peak_flops(None, card, "bf16") is None


@pytest.mark.parametrize(
    "card",
    [
        "",
        "NVIDIA GeForce GTX 1080",
        "Quadro RTX 6000",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    ],
)
def test_a_peak_that_is_not_known_is_not_made_up(card):
    assert peak_flops(None, card, "fp16") is None


def test_no_card_has_a_known_peak_in_fp32():
    assert all(peak_flops(None, card, "fp32") is None for card in PEAKS | FP16_PEAKS)


def test_no_word_of_a_known_card_excludes_it():
    assert not OTHER_CARDS & {word for card in PEAKS | FP16_PEAKS for word in card.lower().split()}


def test_a_configured_peak_wins():
    assert peak_flops(100.0, "NVIDIA H200", "fp32") == 100e12


def test_a_matrix_product_is_measured_where_no_data_sheet_names_a_peak():
    size, seconds = 1024, []
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(torch.ones(size, size), torch.ones(size, size))
        seconds.append(time.perf_counter() - started)
    slower = 2 * size**3 / max(seconds)
    assert 0.3 * slower < measured_flops(torch.float32) < 1e15


def test_the_log_line_has_units_in_its_names_and_leaves_out_what_is_not_known():
    work = Workload(16384, 4, TokenFlops(4.3e9, 3.1e9), ranks=1, peak_flops=989e12)
    interval = Interval(100, 41.2, 3.2142, 5.9e-4, grad_norm=0.831, loss_scale=None, skipped_steps=0)
    line = log_line(1200, 320000, interval_metrics(interval, work), on_gpu=True)
    assert line == (
        "step 1200/320000 | loss 3.214 | lr 5.9e-04 | grad norm 0.83 | 412 ms/step | 39.8k tokens/s "
        "| 171 TFLOP/s/gpu (executed 123 TFLOP/s/gpu) | MFU 17% (executed 12%) | ETA 1d 12h"
    )


def test_on_a_cpu_the_line_counts_ranks_and_names_no_utilization():
    work = Workload(1000, 4, TokenFlops(1e6, 8e5), ranks=2, peak_flops=None)
    metrics = interval_metrics(Interval(1, 1.0, 2.0, 1e-3, None, 1024.0, 1), work)
    assert log_line(5, 5, metrics, on_gpu=False) == (
        "step 5/5 | loss 2.000 | lr 1.0e-03 | loss scale 1024 | skipped 1 | 1000 ms/step | 1.00k tokens/s "
        "| 500 MFLOP/s/rank (executed 400 MFLOP/s/rank) | ETA 0s"
    )
    assert not [name for name in metrics if "utilization" in name]


def test_metrics_have_the_documented_names_and_units():
    work = Workload(1000, 4, TokenFlops(6e6, 5e6), ranks=2, peak_flops=1e10)
    metrics = interval_metrics(Interval(10, 5.0, 2.0, 1e-3, 0.5, 256.0, 0), work)
    assert metrics == {
        "train/lm_loss": 2.0,
        "train/learning_rate": 1e-3,
        "train/grad_norm": 0.5,
        "train/loss_scale": 256.0,
        "train/skipped_steps": 0,
        "runtime/iteration_time": 0.5,
        "runtime/tokens_per_sec": 2000.0,
        "runtime/samples_per_sec": 8.0,
        "runtime/flops_per_sec_per_gpu": 6e9,
        "runtime/executed_flops_per_sec_per_gpu": 5e9,
        "runtime/model_flops_utilization": 0.6,
        "runtime/executed_flops_utilization": 0.5,
    }


def test_with_recomputation_the_line_and_the_metrics_also_say_what_the_hardware_computes():
    work = Workload(1000, 4, TokenFlops(6e6, 5e6, recomputed=1.5e6), ranks=1, peak_flops=1e10)
    metrics = interval_metrics(Interval(1, 1.0, 2.0, 1e-3, None, None, 0), work)
    assert metrics["runtime/executed_flops_utilization"] == 0.5
    assert metrics["runtime/hardware_flops_per_sec_per_gpu"] == 6.5e9
    assert metrics["runtime/hardware_flops_utilization"] == 0.65
    assert "| MFU 60% (executed 50%, with recomputation 65%) |" in log_line(1, 1, metrics, on_gpu=True)


def test_with_float8_the_line_says_that_the_peak_is_that_of_bf16():
    metrics = interval_metrics(Interval(1, 1.0, 2.0, 1e-3, None, None, 0), Workload(1, 4, TokenFlops(6, 5), 1, 10.0))
    assert "| MFU 60% (executed 50%) of the bf16 peak |" in log_line(
        1, 1, metrics, on_gpu=True, peak_name="the bf16 peak"
    )
