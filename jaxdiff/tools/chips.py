"""What accelerators can do at most: the figures that plans and benchmarks are measured against."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What one chip can do, a second where it is a rate."""

    flops: float
    """bfloat16, without sparsity."""
    hbm: float
    """Bytes that a program can have: a little less than the chip has."""
    hbm_bandwidth: float
    ici_bandwidth: float
    """Bytes over all links to other chips."""


# cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, "System architecture", peak figures per chip (November 2026).
TPUS = {
    "v4": Chip(275e12, 30.75 * 2**30, 1228e9, 300e9),
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 200e9),
    "v5p": Chip(459e12, 94.75 * 2**30, 2765e9, 600e9),
    "v6e": Chip(918e12, 31.25 * 2**30, 1640e9, 448e9),
}
# NVIDIA's data sheets of the three; SXM unless said otherwise, and links are NVLink.
GPUS = {
    "A100 40GB": Chip(312e12, 39e9, 1555e9, 600e9),
    "A100": Chip(312e12, 79e9, 2039e9, 600e9),
    "H100 PCIe": Chip(756e12, 79e9, 2000e9, 600e9),
    "H100": Chip(989.4e12, 79e9, 3350e9, 900e9),
    "H200": Chip(989.4e12, 140e9, 4800e9, 900e9),
}
CHIPS = TPUS | GPUS

# What `device.device_kind` says, whole or in part; the first that is found counts.
_KINDS = (
    (r"TPU v4\b", "v4"),
    (r"TPU v5 ?(lite|e)\b", "v5e"),
    (r"TPU v5p?\b", "v5p"),
    (r"TPU v6 ?(lite|e)\b", "v6e"),
    (r"A100.*40GB", "A100 40GB"),
    (r"A100", "A100"),
    (r"H100 PCIe", "H100 PCIe"),
    (r"H100.*HBM3|H100 SXM", "H100"),
    (r"H200", "H200"),
)


def chip_name(device_kind: str) -> str | None:
    """The row of `CHIPS` that a JAX device belongs to, by its `device_kind`; None where there is none."""
    return next((name for pattern, name in _KINDS if re.search(pattern, device_kind)), None)
