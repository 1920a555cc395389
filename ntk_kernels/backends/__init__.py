"""The backends by name, in the order in which a call that one cannot serve moves on to the next.

A backend is a module (or package) that says itself

    lacks(query, value, attn_mask=None, softcap=None) -> str | None     what keeps it from serving such a call
    prefers(query, key, value, is_square) -> bool                       whether the call should start with it
    load() -> module                                                    its implementation of the ops

An implementation has `forward`, `backward`, `decode`, `sum_features` and `sum_features_backward`, which take the
records of `inputs.py`. It is imported when a call needs it; importing a backend touches no device.
"""

from . import reference, torch, triton

BACKENDS = {"triton": triton, "torch": torch, "reference": reference}
