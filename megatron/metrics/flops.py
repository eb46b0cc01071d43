"""FLOPs per token, and peak FLOP/s of devices.

L layers, d width of all heads (usually the hidden size), T tokens per sequence, N parameters. One multiply-add is two
FLOPs.
"""

# Dense bf16 matrix peaks in TFLOP/s from data sheets; the first entry that the device's name contains is used.
PEAKS = (
    ("B200", 2250.0),
    ("H200 NVL", 836.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("A10", 125.0),
    ("V100", 125.0),
)


def training_flops_per_token(parameters: int, layers: int, attention_width: int, sequence_length: int) -> float:
    """FLOPs of one token's forward and backward pass: 6 N + 12 L d T.

    6 N: a multiply-add per weight forward and two backward, embeddings counted with the rest.
    12 L d T: attention scores and their product with the values, over the full, non-causal square, as PaLM
    (https://arxiv.org/abs/2204.02311, appendix B) counts them. Recomputed activations are not counted: this is the
    numerator of model FLOPs utilization, not of hardware utilization.
    """
    return 6.0 * parameters + 12.0 * layers * attention_width * sequence_length


def peak_flops(configured_tflops: float | None, device_name: str, half_precision: bool) -> float | None:
    """Peak FLOP/s of the device, or None if unknown: then no utilization is reported.

    configured_tflops: `peak_theoretical_tflops`, which takes precedence. device_name: from the driver; "" for a CPU.
    half_precision: the table has bf16 and fp16 peaks only, so fp32 training needs the configured value.
    """
    if configured_tflops is not None:
        return configured_tflops * 1e12
    if not half_precision:
        return None
    for name, tflops in PEAKS:
        if name.lower() in device_name.lower():
            return tflops * 1e12
    return None
