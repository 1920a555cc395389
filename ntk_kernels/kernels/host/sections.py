"""The sections of the feature maps' features, a launch each in the passes that sum over features (`jit/features.py` has
their code)."""

from .launch import ceil_div

# Of each map, in the order in which its features are packed; `ntk_kernels/feature_maps.py` has the same.
SECTIONS = {"elu": ("elu",), "taylor1": ("linear",), "taylor2": ("linear", "pairs", "squares")}


def num_features(section: str, head_dim: int) -> int:
    """Returns the number of features of a section."""
    return {"linear": 1 + head_dim, "pairs": head_dim * (head_dim - 1) // 2}.get(section, head_dim)


def num_blocks(section: str, head_dim: int, chunk: int) -> int:
    """Returns the number of programs that share a section's features of one centre."""
    return ceil_div(head_dim, chunk) * (max(head_dim - 1, 0) if section == "pairs" else 1)
