"""Every benchmark that leaves figures, by what it is for. The modules are described in `lib/run.py`."""

from .quality import accounting, approximation, demo, finetune, fit, prompt, scaling
from .speed import attention, ceilings, convert, decode, sweep

ROOMS = {
    "What is fast": {
        "attention": attention, "sweep": sweep, "decode": decode, "convert": convert, "ceilings": ceilings,
    },
    "What is accurate, and what it takes": {
        "fit": fit, "approximation": approximation, "scaling": scaling, "accounting": accounting,
    },
    "Real models": {"demo": demo, "prompt": prompt, "finetune": finetune},
}  # fmt: skip
BENCHMARKS = {name: module for room in ROOMS.values() for name, module in room.items()}
