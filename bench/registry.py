"""The benchmarks by subject. `lib/run.py` describes their modules."""

from .quality import accounting, approximation, demo, finetune, fit, prompt, scaling
from .speed import attention, ceilings, convert, decode, host, sweep

ROOMS = {
    "What is fast": {
        "attention": attention, "sweep": sweep, "decode": decode, "convert": convert, "host": host,
        "ceilings": ceilings,
    },
    "What is accurate, and what it takes": {
        "fit": fit, "approximation": approximation, "scaling": scaling, "accounting": accounting,
    },
    "Real models": {"demo": demo, "prompt": prompt, "finetune": finetune},
}  # fmt: skip
BENCHMARKS = {name: module for room in ROOMS.values() for name, module in room.items()}
