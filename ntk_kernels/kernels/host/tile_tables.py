"""The tiles that kernels may run with, for each class of GPU; `configs.py` has the rules that choose among them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TileConfig:
    """Rows of queries and keys a program works on at once, warps a program, tiles of keys in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # a thread, so that two programs fit on a multiprocessor
    use_descriptors: bool = False  # of K and V (TMA), where their memory allows it
    slices: int = 1  # programs that share the columns of dK and dV

    def __str__(self) -> str:
        text = f"{self.block_m}x{self.block_n} {self.num_warps}w {self.num_stages}s"
        text += f" r{self.max_registers}" if self.max_registers else ""
        return text + " tma" * self.use_descriptors + f" /{self.slices}" * (self.slices > 1)


_T = TileConfig
# Of each kernel, by class of GPU, by what is computed (half precision without a state, with one, with a taylor2 state,
# with one in float16; float32), by the padded head dimension: what may be fastest, the default first. A kernel to which
# the state makes no difference has the first and the last kind only. Defaults in half precision spill no registers, and
# on sm90 no product has a dimension below 64 (see `configs.blocks`); bench/upkeep/static.py checks both.
_FORWARD = {
    "sm90": {
        "plain": {
            64: (_T(64, 64, 4, 3), _T(128, 64, 8, 3, 128), _T(128, 128, 8, 2)),
            128: (_T(64, 64, 4, 3), _T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            256: (_T(64, 64, 8, 2), _T(128, 64, 8, 2)),
        },
        "state": {
            64: (_T(64, 64, 4, 3), _T(128, 64, 8, 3, 128), _T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            128: (_T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            256: (_T(64, 64, 8, 2),),
        },
        "taylor2": {
            64: (_T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            128: (_T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            256: (_T(64, 64, 8, 2),),
        },
        "float32": {
            64: (_T(128, 64, 8, 2), _T(64, 64, 4, 2)),
            128: (_T(128, 64, 8, 1), _T(64, 64, 8, 1)),
        },
    },
    "sm80": {
        "plain": {
            64: (_T(128, 64, 8, 3), _T(128, 64, 4, 3)),
            128: (_T(128, 64, 8, 3), _T(64, 64, 4, 3)),
            256: (_T(64, 64, 8, 2), _T(64, 32, 8, 2)),
        },
        "state": {
            64: (_T(128, 64, 8, 3), _T(64, 64, 4, 3)),
            128: (_T(64, 64, 8, 2), _T(64, 64, 4, 3), _T(128, 64, 8, 3)),
            256: (_T(64, 32, 8, 2), _T(64, 64, 8, 2)),
        },
        "taylor2": {
            64: (_T(128, 64, 8, 3), _T(64, 64, 4, 3)),
            128: (_T(64, 64, 8, 2), _T(64, 64, 4, 3)),
            256: (_T(64, 32, 8, 1), _T(64, 32, 8, 2)),
        },
        "float32": {
            64: (_T(64, 32, 4, 2), _T(64, 32, 8, 2)),
            128: (_T(64, 32, 8, 2), _T(32, 32, 4, 2)),
        },
    },
    "sm100": {
        "plain": {
            64: (_T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            128: (_T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            256: (_T(64, 32, 8, 2), _T(128, 64, 8, 2)),
        },
        "state": {
            64: (_T(128, 64, 8, 2), _T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            128: (_T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            256: (_T(64, 32, 8, 2),),
        },
        "taylor2": {
            64: (_T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            128: (_T(64, 64, 8, 3), _T(128, 64, 8, 2)),
            256: (_T(64, 32, 8, 1), _T(64, 64, 8, 1)),
        },
        "float32": {
            64: (_T(64, 32, 8, 2),),
            128: (_T(64, 32, 8, 2),),
        },
    },
    "gfx942": {
        "plain": {
            64: (_T(128, 64, 4, 1), _T(128, 32, 4, 1)),
            128: (_T(128, 32, 8, 1), _T(128, 64, 4, 1)),
            256: (_T(64, 32, 4, 1),),
        },
        "state": {
            64: (_T(128, 64, 4, 1), _T(128, 32, 4, 1)),
            128: (_T(128, 32, 8, 1), _T(128, 64, 4, 1)),
            256: (_T(64, 32, 4, 1),),
        },
        "taylor2": {
            64: (_T(64, 64, 4, 1), _T(128, 64, 4, 1)),
            128: (_T(128, 32, 8, 1), _T(128, 64, 4, 1)),
            256: (_T(64, 32, 4, 1),),
        },
        "float32": {
            64: (_T(64, 32, 4, 1),),
            128: (_T(64, 16, 4, 1),),
        },
    },
}


# Only where PyTorch's attention over the keys is faster than ours.
_ADD_RESIDENT = {
    "sm90": {
        "state": {
            64: (_T(64, 64, 4, 3), _T(64, 64, 4, 2), _T(64, 64, 8, 3), _T(128, 64, 8, 3)),
            128: (_T(64, 64, 8, 3), _T(64, 64, 4, 3), _T(64, 64, 4, 2), _T(128, 64, 8, 2)),
        }
    }
}
_ADD_RESIDENT_BWD = {"sm90": {"state": {dim: (_T(64, 64, 8, 3), _T(64, 64, 8, 2)) for dim in (64, 128)}}}
# Two programs on a multiprocessor, with at most 48 KB of shared memory between them and the L1 cache.
_ADD_SECOND_ORDER = {
    "sm90": {
        "taylor2": {dim: (_T(256, 64, 8, 3, 128), _T(256, 64, 8, 4, 128), _T(128, 64, 4, 3, 128)) for dim in (64, 128)}
    },
    "sm80": {"taylor2": {dim: (_T(128, 64, 8, 3), _T(128, 64, 4, 3)) for dim in (64, 128)}},
    "sm100": {"taylor2": {dim: (_T(128, 64, 8, 3), _T(128, 64, 4, 3)) for dim in (64, 128)}},
    "gfx942": {"taylor2": {dim: (_T(128, 64, 4, 1), _T(64, 64, 4, 1)) for dim in (64, 128)}},
}
_SECOND_ORDER_ROWS = {
    arch: {
        "taylor2": {
            64: (_T(128 if arch == "sm90" else 64, 64, 4, 1),),
            128: (_T(128 if arch == "sm90" else 64, 64, 8, 1),),
        }
    }
    for arch in ("sm80", "sm90", "sm100", "gfx942")
}
_SECOND_ORDER_PACK = {
    arch: {"taylor2": {dim: (_T(64, 64, 4, 1),) for dim in (64, 128)}} for arch in ("sm80", "sm90", "sm100", "gfx942")
}


_DKDV = {
    "sm90": {
        # The second spills, and is a third faster with triton 3.6 (see tuned/).
        "plain": {
            64: (_T(64, 128, 8, 2), _T(128, 64, 4, 2)),
            128: (_T(64, 128, 8, 2), _T(64, 64, 4, 2), _T(64, 64, 8, 2)),
        },
        "float32": {64: (_T(64, 64, 8, 1),), 128: (_T(64, 64, 8, 1),)},
    },
    "sm80": {
        "plain": {64: (_T(32, 128, 8, 2), _T(64, 128, 8, 2)), 128: (_T(32, 64, 8, 2), _T(64, 64, 8, 2))},
        "float32": {64: (_T(32, 32, 4, 1),), 128: (_T(32, 32, 8, 1),)},
    },
    "sm100": {
        "plain": {64: (_T(64, 64, 8, 2), _T(64, 128, 8, 2)), 128: (_T(64, 64, 8, 2), _T(64, 128, 8, 2))},
        # 64 keys at D=128: triton 3.6 and 3.7 compile a trap in the place of the products
        "float32": {64: (_T(32, 64, 8, 1),), 128: (_T(32, 32, 8, 1),)},
    },
    "gfx942": {
        "plain": {64: (_T(32, 128, 4, 1),), 128: (_T(32, 64, 4, 1),)},
        "float32": {64: (_T(16, 64, 4, 1),), 128: (_T(16, 32, 4, 1),)},
    },
}
# For wide heads, where the two do not fit into the registers together, a launch each.
_DK = {
    "sm90": {"plain": {256: (_T(64, 64, 8, 2, slices=4), _T(64, 64, 8, 2))}},
    "sm80": {"plain": {256: (_T(64, 64, 8, 1), _T(32, 64, 8, 1))}},
    "sm100": {"plain": {256: (_T(32, 64, 8, 1),)}},
    "gfx942": {"plain": {256: (_T(16, 64, 4, 1),)}},
}
_DV = {
    "sm90": {"plain": {256: (_T(64, 64, 8, 2),)}},
    "sm80": {"plain": {256: (_T(64, 64, 8, 1), _T(32, 64, 8, 1))}},
    "sm100": {"plain": {256: (_T(64, 64, 8, 1),)}},
    "gfx942": {"plain": {256: (_T(32, 64, 4, 1),)}},
}
_DQ = {
    "sm90": {
        "plain": {64: (_T(128, 64, 8, 3),), 128: (_T(128, 64, 8, 3),), 256: (_T(64, 64, 8, 2),)},
        "taylor2": {64: (_T(128, 64, 8, 3),), 128: (_T(128, 64, 8, 2),), 256: (_T(64, 64, 8, 2),)},
        # Z may exceed float16: more tiles in shared memory
        "taylor2 float16": {64: (_T(128, 64, 8, 3),), 128: (_T(64, 64, 8, 2),), 256: (_T(64, 64, 8, 2),)},
        "float32": {64: (_T(64, 64, 8, 1),), 128: (_T(64, 64, 8, 1),)},
    },
    "sm80": {
        "plain": {64: (_T(128, 64, 8, 2),), 128: (_T(64, 64, 8, 2),), 256: (_T(64, 32, 8, 1),)},
        "state": {64: (_T(128, 64, 8, 2),), 128: (_T(64, 64, 8, 2),), 256: (_T(32, 32, 8, 1), _T(64, 32, 8, 1))},
        "taylor2": {
            64: (_T(128, 64, 8, 2), _T(64, 32, 8, 1)),
            128: (_T(64, 64, 8, 2), _T(32, 32, 8, 1)),
            256: (_T(32, 32, 8, 1), _T(16, 16, 8, 1)),
        },
        "float32": {64: (_T(64, 32, 8, 1),), 128: (_T(32, 32, 8, 1),)},
    },
    "sm100": {
        "plain": {64: (_T(128, 32, 8, 2), _T(128, 64, 8, 2)), 128: (_T(128, 64, 8, 2),), 256: (_T(64, 32, 8, 1),)},
        "taylor2": {64: (_T(128, 64, 8, 2),), 128: (_T(64, 64, 8, 2),), 256: (_T(64, 64, 8, 1),)},
        "float32": {64: (_T(64, 32, 8, 1),), 128: (_T(64, 32, 8, 1),)},
    },
    "gfx942": {
        "plain": {64: (_T(128, 32, 4, 1),), 128: (_T(64, 32, 4, 1),), 256: (_T(64, 32, 4, 1),)},
        "state": {64: (_T(128, 32, 4, 1),), 128: (_T(64, 32, 4, 1),), 256: (_T(32, 32, 4, 1),)},
        "taylor2": {64: (_T(128, 32, 4, 1),), 128: (_T(64, 32, 4, 1),), 256: (_T(32, 16, 4, 1),)},
        "float32": {64: (_T(64, 16, 4, 1),), 128: (_T(32, 16, 4, 1),)},
    },
}
_CLASSES = ("sm80", "sm90", "sm100", "gfx942")
_DELTA = {arch: {"plain": {dim: (_T(64, 64, 8, 1),) for dim in (64, 128, 256)}} for arch in _CLASSES}
_STATE = {
    arch: {
        "plain": {
            64: (_T(64, 64, 8 if arch == "sm100" else 4, 3),),
            128: (_T(64, 64, 8, 3),),
            256: (_T(64, 64, 8, 2), _T(64, 64, 8, 1)),
        },
        "float32": {dim: (_T(64 if arch == "sm90" else 32, 64, 8, 1),) for dim in (64, 128)},
    }
    for arch in ("sm80", "sm90", "sm100")
} | {
    "gfx942": {
        "plain": {64: (_T(64, 64, 4, 1),), 128: (_T(64, 64, 8, 1),), 256: (_T(64, 64, 8, 1),)},
        "float32": {dim: (_T(32, 64, 8, 1),) for dim in (64, 128)},
    }
}
_ROWS = {
    "sm90": {
        "plain": {dim: (_T(64, 64, 8, 1),) for dim in (64, 128, 256)},
        "float32": {dim: (_T(64, 64, 8, 1),) for dim in (64, 128)},
    },
    "sm80": {
        "plain": {64: (_T(64, 64, 8, 1),), 128: (_T(64, 32, 8, 1),), 256: (_T(64, 32, 8, 1),)},
        "float32": {dim: (_T(32, 32, 8, 1),) for dim in (64, 128)},
    },
    "sm100": {
        "plain": {64: (_T(64, 64, 4, 1),), 128: (_T(64, 64, 8, 1),), 256: (_T(64, 32, 8, 1),)},
        "float32": {dim: (_T(32, 32, 8, 1),) for dim in (64, 128)},
    },
    "gfx942": {
        "plain": {64: (_T(64, 32, 4, 1),), 128: (_T(64, 32, 4, 1),), 256: (_T(32, 32, 4, 1),)},
        "float32": {dim: (_T(32, 32, 4, 1),) for dim in (64, 128)},
    },
}
# Decode waits for memory: small tiles, several in flight. Fewer rows of queries get smaller ones.
_DECODE = {
    "sm90": {
        "plain": {
            64: (_T(64, 64, 4, 4), _T(64, 128, 4, 3), _T(64, 64, 4, 3)),
            128: (_T(64, 64, 4, 3), _T(64, 64, 4, 4), _T(64, 64, 8, 3)),
            256: (_T(64, 64, 8, 2),),
        },
        "taylor2": {64: (_T(64, 64, 8, 3),), 128: (_T(64, 64, 8, 3),), 256: (_T(64, 64, 8, 2),)},
        "float32": {64: (_T(64, 64, 4, 2),), 128: (_T(64, 64, 8, 1),)},
    },
    "sm80": {
        "plain": {
            64: (_T(64, 64, 4, 3), _T(64, 128, 4, 2)),
            128: (_T(64, 64, 4, 3), _T(64, 64, 8, 3), _T(64, 32, 4, 3)),
            256: (_T(64, 32, 8, 2),),
        },
        "float32": {64: (_T(64, 32, 4, 2),), 128: (_T(64, 32, 8, 1),)},
    },
    "sm100": {
        "plain": {
            64: (_T(64, 64, 4, 3), _T(64, 64, 4, 4)),
            128: (_T(64, 64, 8, 3), _T(64, 64, 8, 2)),
            256: (_T(64, 64, 8, 2),),
        },
        "state": {
            64: (_T(64, 64, 4, 3), _T(64, 64, 4, 4)),
            128: (_T(64, 64, 8, 3, 168), _T(64, 64, 8, 2)),  # left to itself, 3.6 spills to get below 128
            256: (_T(64, 64, 8, 2),),
        },
        "taylor2": {64: (_T(64, 64, 4, 3),), 128: (_T(64, 64, 8, 3),), 256: (_T(64, 32, 8, 1),)},
        "float32": {64: (_T(64, 32, 8, 2),), 128: (_T(64, 32, 8, 1),)},
    },
    "gfx942": {
        "plain": {64: (_T(64, 64, 4, 1),), 128: (_T(64, 32, 4, 1),), 256: (_T(64, 32, 4, 1),)},
        "float32": {64: (_T(64, 32, 4, 1),), 128: (_T(64, 16, 4, 1),)},
    },
}
# One row of queries, so many splits at once.
_MERGE = {arch: {"plain": {dim: (_T(1, 16, 4, 1),) for dim in (64, 128, 256)}} for arch in _CLASSES}
# Rows of a prefix and features that a program has at once: all up to 128, so that keys and values are read once, but in
# float16, whose values need twice the registers.
_SUMS_FLOAT16 = {64: (_T(64, 64, 4, 3),), 128: (_T(64, 64, 8, 3),), 256: (_T(64, 64, 8, 2),)}
_SUMS = {
    "sm90": {
        "plain": {64: (_T(64, 64, 4, 3),), 128: (_T(64, 128, 8, 3),), 256: (_T(64, 64, 8, 2),)},
        "state float16": _SUMS_FLOAT16,
        "taylor2 float16": _SUMS_FLOAT16,
        "float32": {dim: (_T(64, 64, 8, 1),) for dim in (64, 128)},
    },
    "sm80": {
        "plain": {64: (_T(32, 64, 4, 3),), 128: (_T(32, 128, 8, 2),), 256: (_T(32, 64, 8, 2),)},
        "taylor2": {64: (_T(32, 64, 4, 3),), 128: (_T(32, 128, 8, 3),), 256: (_T(32, 64, 8, 2),)},
        "float32": {dim: (_T(32, 64, 8, 1),) for dim in (64, 128)},
    },
    "sm100": {
        "plain": {64: (_T(64, 64, 8, 3),), 128: (_T(64, 128, 8, 3),), 256: (_T(64, 64, 8, 2),)},
        "float32": {64: (_T(32, 64, 8, 1),), 128: (_T(32, 128, 8, 1),)},
    },
    "gfx942": {
        "plain": {64: (_T(64, 64, 4, 1),), 128: (_T(64, 128, 8, 1),), 256: (_T(64, 64, 8, 1),)},
        "float32": {64: (_T(32, 64, 8, 1),), 128: (_T(32, 128, 8, 1),)},
    },
}
_SUMS_BWD = {
    "sm90": {
        "plain": {64: (_T(64, 64, 8, 2),), 128: (_T(64, 64, 8, 2),), 256: (_T(64, 64, 8, 1),)},
        "taylor2": {64: (_T(64, 64, 8, 2),), 128: (_T(64, 64, 8, 1),), 256: (_T(64, 64, 8, 1),)},
        "float32": {dim: (_T(64, 64, 8, 1),) for dim in (64, 128)},
    },
    "sm80": {
        "plain": {64: (_T(64, 64, 8, 2),), 128: (_T(64, 64, 8, 2),), 256: (_T(32, 64, 16, 1),)},
        "float32": {dim: (_T(32, 64, 8, 1),) for dim in (64, 128)},
    },
    "sm100": {
        "plain": {64: (_T(64, 64, 8, 2),), 128: (_T(64, 64, 8, 2, 168),), 256: (_T(32, 64, 8, 1),)},
        "taylor2": {64: (_T(64, 64, 8, 2),), 128: (_T(32, 64, 8, 2),), 256: (_T(16, 64, 16, 1),)},
        "float32": {dim: (_T(32, 64, 8, 1),) for dim in (64, 128)},
    },
    "gfx942": {
        "plain": {64: (_T(64, 64, 4, 1),), 128: (_T(64, 64, 8, 1),), 256: (_T(32, 64, 8, 1),)},
        "taylor2": {64: (_T(64, 64, 4, 1),), 128: (_T(32, 64, 4, 1),), 256: (_T(32, 64, 8, 1),)},
        "float32": {dim: (_T(32, 64, 8, 1),) for dim in (64, 128)},
    },
}
TABLES = {
    "forward": _FORWARD, "decode": _DECODE, "merge": _MERGE,
    "add_prefix": _FORWARD, "add_resident": _ADD_RESIDENT,
    "add_prefix_dq": _DQ, "add_resident_bwd": _ADD_RESIDENT_BWD,
    "add_second_order": _ADD_SECOND_ORDER, "second_order_rows": _SECOND_ORDER_ROWS,
    "second_order_pack": _SECOND_ORDER_PACK,
    "delta": _DELTA, "dkdv": _DKDV, "dk": _DK, "dv": _DV, "dq": _DQ, "state": _STATE,
    "rows": _ROWS, "sums": _SUMS, "sums_bwd": _SUMS_BWD,
}  # fmt: skip
