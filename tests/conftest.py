import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():  # Triton decides when kernels load whether its interpreter runs them
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

from ntk_kernels import dispatch, replay

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from dataclasses import replace

    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder

    # On GPUs, min and max of NaN and a number are the number, unless propagate_nan is asked for.
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)

    # The interpreter patches triton.language anew for every call of a helper, and looks for integer overflows that it
    # does not report: half of its time.
    prepare = interpreter._patch_lang

    def prepare_once(function):
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return prepare(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = prepare_once
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Starts every test from the same random numbers, without a default backend, with every warning still to come."""
    torch.manual_seed(0)
    monkeypatch.delenv("NTK_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_warned", set())
    replay.forget()
