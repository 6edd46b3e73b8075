"""The one place that knows architectures: it finds things by shape and order of execution, never by name."""

from goldenedit.architecture.layers import (
    Architecture,
    UnsupportedArchitectureError,
    find_down_projections,
    read_architecture,
)

__all__ = ["Architecture", "UnsupportedArchitectureError", "find_down_projections", "read_architecture"]
