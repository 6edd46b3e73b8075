"""The precision that the user allows for matrix products in float32."""

from __future__ import annotations

import torch


def matmul_precision() -> str:
    """Return `"highest"` if float32 products use full precision, `"high"` or `"medium"` if they may be rounded."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the user set torch's newer options per backend, and then this getter raises
        return "high"
