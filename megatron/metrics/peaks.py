"""Peak FLOP/s of devices in 16-bit matrix products: dense, accumulated in fp32, from the makers' data sheets.

Data sheets often give the figure with sparsity, twice the dense one. GeForce cards, L40 and A10G accumulate in fp32 at
half of the rate that is advertised.
"""

import re
import time

import torch

from megatron.config.plan import Precision

# Words that the driver's name must contain -> bf16 and fp16 peak in TFLOP/s; of several the one with most words is used
PEAKS: dict[str, float] = {
    # Blackwell, per GPU. HGX B200 and B300 (8 GPUs, 36 PFLOP/s sparse): https://www.nvidia.com/en-us/data-center/hgx/
    "B200": 2250,
    "B300": 2250,
    # GB200 NVL72 and GB300 NVL72 (72 GPUs, 360 PFLOP/s sparse): https://www.nvidia.com/en-us/data-center/gb200-nvl72/
    "GB200": 2500,
    "GB300": 2500,
    # Hopper: https://www.nvidia.com/en-us/data-center/h100/ (SXM 1,979 sparse, NVL 1,671), /h200/ and
    # /grace-hopper-superchip/; PCIe (1,513 sparse): its data sheet of 2022. H800 differs in NVLink and fp64
    "H100": 989.4,
    "H100 PCIe": 756,
    "H100 NVL": 835.5,
    "H800": 989.4,
    "H800 PCIe": 756,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "GH200": 989.4,
    # Ampere: https://www.nvidia.com/en-us/data-center/a100/ (all variants alike; A800 differs in NVLink), /a40/ and
    # /products/a10-gpu/; RTX 3090: white paper of GA102, appendix A
    "A100": 312,
    "A800": 312,
    "A40": 149.7,
    "A10": 125,
    "A10G": 70,  # https://www.baseten.co/blog/nvidia-a10-vs-a10g-for-ml-model-inference/
    "RTX 3090": 71.2,
    # Ada: https://www.nvidia.com/en-us/data-center/l4/ (242 sparse), /l40/ and /l40s/ (733 sparse); white paper of the
    # Ada architecture, appendices
    "L4": 121,
    "L40": 181.05,
    "L40S": 362.05,
    "RTX 4090": 165.2,
    "RTX 6000 Ada": 364.2,
    # RTX Blackwell white paper, appendix A
    "RTX 5090": 209.5,
    # AMD, per device: torch sees the two dies of a MI250X (383 together) as two devices.
    # https://www.amd.com/en/products/accelerators/instinct/mi200/mi250x.html and mi300/mi300x.html
    "MI250X": 191.5,
    "MI300X": 1307.4,
}
# Before Ampere there is no bf16: https://www.nvidia.com/en-us/data-center/v100/ and tesla-t4/
FP16_PEAKS: dict[str, float] = {"V100 SXM2": 125, "V100 PCIE": 112, "V100S PCIE": 130, "T4": 65}
# Names of other, slower or faster cards, and of a part of a card
OTHER_CARDS = {"laptop", "ti", "super", "d", "max", "mobile", "mig"}


def peak_flops(configured_tflops: float | None, device_name: str, precision: Precision) -> float | None:
    """Peak FLOP/s of the device, or None if unknown: then no utilization is reported.

    configured_tflops: `peak_theoretical_tflops`, which takes precedence. device_name: from the driver; "" for a CPU.
    precision: fp32 has no entry, because its peak depends on whether products run in TF32.
    """
    if configured_tflops is not None:
        return configured_tflops * 1e12
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    if precision == "fp32" or words & OTHER_CARDS:
        return None
    table = PEAKS if precision == "bf16" else PEAKS | FP16_PEAKS
    fitting = [name for name in table if set(name.lower().split()) <= words]
    return table[max(fitting, key=lambda name: len(name.split()))] * 1e12 if fitting else None


# The product that stands for the peak of a CPU: large enough for its best rate, and milliseconds long.
MEASURED_SIZE = 512
MEASURED_SECONDS = 0.05


def measured_flops(dtype: torch.dtype) -> float:
    """FLOP/s of this process in a square matrix product on the CPU, with its threads: the best of 50 ms.

    Stands for the peak, which no data sheet of a CPU names. Ranks of one machine share its cores: measure at once.
    """
    left, right = (torch.ones(MEASURED_SIZE, MEASURED_SIZE, dtype=dtype) for _ in range(2))
    torch.mm(left, right)  # the first call prepares the library
    best, end = float("inf"), time.perf_counter() + MEASURED_SECONDS
    while (started := time.perf_counter()) < end:
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2 * MEASURED_SIZE**3 / best
