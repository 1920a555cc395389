import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from backends import FUSED, all_backends, triton_only

from ntk_kernels import PrefixState, dispatch, ntk_attention, reference
from ntk_kernels.backends import triton
from ntk_kernels.backends.torch import implementation as torch_backend

query, key, value = (torch.randn(1, 2, 7, 8) for _ in range(3))
state = PrefixState(torch.rand(2, 8, 8), torch.rand(2, 8), "elu")


@pytest.fixture
def served_by(monkeypatch):
    """Returns the names of the backends that served, in order."""
    names = []
    modules = {"reference": (reference, "ntk_attention"), "torch": (torch_backend, "forward")}
    if "triton" in FUSED:
        from ntk_kernels.backends.triton import implementation as triton_backend

        modules["triton"] = (triton_backend, "forward")
    for name, (module, function) in modules.items():
        original = getattr(module, function)

        def record(*args, _name=name, _original=original, **kwargs):
            names.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, function, record)
    return names


def test_default_on_the_cpu_is_torch(served_by):
    ntk_attention(query, key, value, state)
    assert served_by == ["torch"]


@all_backends
def test_by_name(served_by, backend):
    ntk_attention(query, key, value, state, backend=backend)
    assert served_by == [backend]


def test_environment_sets_the_default_and_no_more(served_by, monkeypatch):
    monkeypatch.setenv("NTK_KERNELS_BACKEND", "reference")
    ntk_attention(query, key, value, state)
    ntk_attention(query, key, value, state, backend="torch")
    monkeypatch.setenv("NTK_KERNELS_BACKEND", "")
    ntk_attention(query, key, value, state)
    assert served_by == ["reference", "torch", "torch"]


def test_environment_is_checked(monkeypatch):
    monkeypatch.setenv("NTK_KERNELS_BACKEND", "cudnn")
    with pytest.raises(
        ValueError, match="`NTK_KERNELS_BACKEND` must be one of 'triton', 'torch', 'reference', got 'cudnn'"
    ):
        ntk_attention(query, key, value, state)


def test_routing_warns_once_for_each_reason(served_by, monkeypatch):
    for setting in (None, "torch"):
        monkeypatch.setattr(dispatch, "_warned", set())
        if setting:
            monkeypatch.setenv("NTK_KERNELS_BACKEND", setting)
        with pytest.warns(
            UserWarning, match="'torch' backend does not support softcap; .* go to 'reference'"
        ) as record:
            for _ in range(3):
                ntk_attention(query, key, value, state, softcap=5.0)
        assert len(record) == 1
        assert record[0].filename == __file__  # points at the caller
    mask = torch.zeros(7, 7, requires_grad=True)
    with pytest.warns(UserWarning, match="gradient for `attn_mask`"):
        out = ntk_attention(query, key, value, state, attn_mask=mask)
    assert torch.autograd.grad(out.sum(), mask)[0].abs().sum() > 0
    assert set(served_by) == {"reference"}


def test_a_mask_that_needs_no_gradient_now_is_served(served_by):
    mask = torch.zeros(7, 7, requires_grad=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        ntk_attention(query, key, value, state, attn_mask=mask)
    assert served_by == ["torch"]


@triton_only
def test_what_triton_lacks(served_by, monkeypatch):
    monkeypatch.setenv("NTK_KERNELS_BACKEND", "triton")
    ntk_attention(query.clone().requires_grad_(), key, value, state, softcap=5.0).sum().backward()
    with pytest.warns(UserWarning, match="'triton' backend does not support float64; .* go to 'torch'$"):
        ntk_attention(query.double(), key.double(), value.double(), state)
    wide = torch.randn(1, 2, 7, 257)
    with pytest.warns(UserWarning, match="'triton' backend does not support head dimensions above 256; .* 'torch'$"):
        ntk_attention(wide, wide, wide)
    assert served_by == ["triton", "torch", "torch"]


@pytest.mark.parametrize(
    "head_dim, value_dim, dtype, expected",
    [
        (256, 136, torch.bfloat16, None),
        (130, 64, torch.bfloat16, "head dimensions above 128 that are not multiples of 8"),
        (64, 130, torch.float16, "head dimensions above 128 that are not multiples of 8"),
        (136, 64, torch.float32, "float32 with head dimensions above 128"),
        (37, 65, torch.bfloat16, None),
    ],
)
def test_wide_heads_on_a_gpu(head_dim, value_dim, dtype, expected, monkeypatch):
    monkeypatch.setattr(triton, "_device_lacks", lambda *device: None)
    query, value = (
        SimpleNamespace(device=torch.device("cuda", 0), shape=(1, 1, 1, dim), dtype=dtype)
        for dim in (head_dim, value_dim)
    )
    assert triton.kernels_lack(query, value) == expected


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    """A process of its own is needed: the interpreter is chosen when Triton's kernels load."""
    code = (
        "import torch; from ntk_kernels import ntk_attention; q = torch.randn(1, 1, 4, 8)\n"
        "try: ntk_attention(q, q, q, backend='triton')\n"
        "except NotImplementedError as error: print(error)"
    )
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "backend='triton' does not support the device 'cpu'" in output


@pytest.mark.parametrize(
    "arguments, what",
    [({"softcap": 5.0}, "softcap"), ({"attn_mask": torch.zeros(7, 7, requires_grad=True)}, "gradient for `attn_mask`")],
    ids=["softcap", "mask_gradient"],
)
def test_a_named_backend_serves_or_raises(arguments, what):
    with pytest.raises(NotImplementedError, match=f"backend='torch' does not support .*{what}"):
        ntk_attention(query, key, value, state, **arguments, backend="torch")


def test_other_devices_go_to_the_reference():
    tensor = SimpleNamespace(device=torch.device("mps"), shape=query.shape, dtype=query.dtype)
    with pytest.warns(UserWarning, match="does not support the device 'mps'"):
        assert dispatch.choose_backend(None, tensor, tensor, tensor) == "reference"


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "torch"),
        ({"length": 512}, "triton"),  # shorter than where it pays
        ({"key_length": 512}, "triton"),
        ({"head_dim": 96}, "triton"),  # not measured
        ({"dtype": torch.float32}, "triton"),
        ({"is_square": False}, "triton"),
        ({"deterministic": True}, "triton"),
        ({"hopper": False}, "triton"),
    ],
    ids=str,
)
def test_default_on_a_hopper_gpu(changes, expected, monkeypatch):
    """PyTorch's attention serves long inputs, the kernels all else."""
    call = {"length": 4096, "head_dim": 128, "dtype": torch.bfloat16, "is_square": True, "deterministic": False,
            "hopper": True} | changes  # fmt: skip
    tensor = SimpleNamespace(
        device=torch.device("cuda", 0), shape=(1, 8, call["length"], call["head_dim"]), dtype=call["dtype"]
    )
    monkeypatch.setattr(triton, "_has_fast_cudnn", lambda index: call["hopper"])
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: call["deterministic"])
    monkeypatch.setattr(triton, "_device_lacks", lambda *device: None)
    key = SimpleNamespace(**vars(tensor) | {"shape": (1, 8, call.get("key_length", call["length"]), call["head_dim"])})
    assert dispatch.choose_backend(None, tensor, key, key, is_square=call["is_square"]) == expected


@pytest.mark.parametrize("capability, lacks", [((8, 0), None), ((7, 5), "GPUs older than compute capability 8.0 (T4)")])
def test_gpus_that_triton_takes(capability, lacks, monkeypatch):
    tiles = pytest.importorskip("ntk_kernels.kernels.jit.tiles")
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    for name, value_ in {"is_available": True, "get_device_capability": capability, "get_device_name": "T4"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *index, value_=value_: value_)
    assert triton._probe_device("cuda", 0) == lacks
