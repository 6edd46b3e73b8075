"""How exactly the user lets products of float32 be computed."""

from __future__ import annotations

import torch


def matmul_precision() -> str:
    """Return `"highest"` where products of float32 are exact, `"high"` or `"medium"` where they may be rounded."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's newer settings, by backend, which the older getter refuses to read
        return "high"
