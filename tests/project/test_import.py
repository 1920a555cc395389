"""The package in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_needs_neither_triton_nor_a_device():
    """The test blocks triton and the optional packages, and lets any touch of CUDA fail."""
    result = run(
        """
import sys
for name in ("triton", "safetensors", "sklearn", "matplotlib", "rich", "transformers", "peft"):
    sys.modules[name] = None
import torch
def touched(*args, **kwargs):
    raise AssertionError("a device was touched")
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = touched
import ntk_kernels, ntk_kernels.reference
state = ntk_kernels.PrefixState(torch.rand(2, 8, 8), torch.rand(2, 8), "elu")
print(ntk_kernels.ntk_attention(*torch.randn(3, 1, 2, 5, 8), state).shape)
for use, package in ((lambda: state.save("x"), "io"), (lambda: ntk_kernels.PrefixState.load("x"), "io"),
                     (lambda: ntk_kernels.prefix_to_state(*torch.rand(2, 1, 9, 8), centers=3), "convert")):
    try:
        use()
    except ImportError as error:
        print(error)
"""
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "torch.Size([1, 2, 5, 8])",
        *["files of states and prefixes need safetensors: pip install 'ntk-kernels[io]'"] * 2,
        "an int for `centers` needs scikit-learn: pip install 'ntk-kernels[convert]'",
    ]


def test_a_checkout_works_without_being_installed():
    result = run(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import ntk_kernels.reference
print(ntk_kernels.reference.__file__, ntk_kernels.__version__)
""")
    assert result.stdout.split()[:1] == [f"{ROOT}/ntk_kernels/reference/__init__.py"], result.stderr


@pytest.mark.parametrize("package, version", [("transformers", "4.57"), ("peft", "0.18")])
def test_integrations_name_the_package_that_they_need(package, version):
    result = run(f"""
import sys
sys.modules[{package!r}] = None
try:
    import ntk_kernels.integrations.{package}
except ImportError as error:
    print(error)
""")
    assert f"needs {package} ({version} or later): pip install 'ntk-kernels[{package}]'" in result.stdout, result.stderr


def test_public_names():
    import ntk_kernels

    assert set(ntk_kernels.__all__) <= set(dir(ntk_kernels))
    for name in ntk_kernels.__all__:
        assert getattr(ntk_kernels, name).__doc__, name
    assert ntk_kernels.__version__
