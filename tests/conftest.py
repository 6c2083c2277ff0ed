"""Fixtures shared by every test file.

The tests run on whatever is installed. Where the compiled extension is there, its kernels serve;
where it is not, the operators' eager fallbacks are put behind the very same operators, so that
everything above them (checks, autograd functions, sites) is still exercised. With
``FASTRES_REQUIRE_COMPILED=1`` a missing extension fails every test instead.
"""

import os
import sys
import warnings

import pytest
import torch
from interpreting import interpreted

import fastres
from fastres import fallbacks, ops

# fastres.backend the module: the attribute of that name is the context manager
backend_module = sys.modules["fastres.backend"]
OPERATORS = ("add_relu", "bn_relu", "conv_bn_relu", "conv_bn_relu_pool", "mean_linear")


@pytest.fixture(scope="session", autouse=True)
def operators_serve():
    """The fused operators serve CPU tensors, by compiled kernels or by their fallbacks."""
    missing = [name for name in OPERATORS if not ops.has_kernel(name, "cpu")]
    if missing and os.environ.get("FASTRES_REQUIRE_COMPILED") == "1":
        pytest.fail(
            f"FASTRES_REQUIRE_COMPILED=1, but no compiled CPU kernel serves {', '.join(missing)}: "
            f"{fastres.backends()['cpu'].reason}"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            backend_module,
            "_COMPILED",
            backend_module._COMPILED | {("cpu", name) for name in missing},
        )
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["compiled", "fallback"])
def implementation(request, monkeypatch):
    """Runs the test on the compiled kernels, then on the eager fallbacks of the same operators, as
    they are without the extension."""
    if request.param == "compiled":
        if not ops.has_kernel("bn_relu", "cpu"):
            pytest.skip("the compiled extension is not installed")
        yield request.param
        return
    if not ops.has_kernel("bn_relu", "cpu"):
        yield request.param  # they serve already
        return
    monkeypatch.setattr(ops, "extension", None)
    override = torch.library.Library("fastres", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name in ops._SCHEMAS:
                override.impl(name, getattr(fallbacks, name), "CPU", allow_override=True)
        yield request.param
    finally:
        override._destroy()


@pytest.fixture(params=["extension", "python"])
def recorder(request, monkeypatch):
    """Runs the test on the nodes of ``csrc/autograd.cpp``, then on ``fastres/autograd.py``."""
    if request.param == "python":
        monkeypatch.setattr(ops, "extension", None)
    elif ops.extension is None:
        pytest.skip("the compiled extension is not installed")
    return request.param


@pytest.fixture(scope="module")
def served_by_interpreted_triton():
    """The backend "triton" on CPU tensors, its kernels run by Triton's interpreter."""
    with interpreted(), fastres.backend("triton"):
        yield


@pytest.fixture
def threads():
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """For many tiny calls, where waking a second thread costs more than the work itself."""
    threads(1)


@pytest.fixture
def torchvision():
    return pytest.importorskip("fastres.compat").import_torchvision()


@pytest.fixture
def extension():
    """The compiled one."""
    if ops.extension is None:
        pytest.skip("the compiled extension is not installed")
    return ops.extension
