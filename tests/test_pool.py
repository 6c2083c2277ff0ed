"""Memory of the CPU operators' outputs and packed filters: kept, bounded, and like any other."""

import copy
import io
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import fastres
from fastres import functional, ops

pytestmark = pytest.mark.skipif(
    ops.extension is None, reason="the compiled extension is not installed"
)
HUGE_PAGE = 2 << 20


@pytest.fixture(autouse=True)
def empty_pools():
    ops.extension.clear_cache()
    yield
    ops.extension.clear_cache()


def outputs() -> dict[str, int]:
    return ops.extension.pool_info()["outputs"]


def add_relu(value: float, *shape: int) -> torch.Tensor:
    """An output full of ``value``."""
    return functional.add_relu(torch.full(shape, float(value)), torch.zeros(shape))


def expect_bound(usage: dict[str, int]) -> None:
    assert usage["in_use"] <= usage["held"] <= max(2 * usage["peak"], HUGE_PAGE)


def test_freed_memory_serves_the_next_call():
    first = add_relu(1, 1, 64, 112, 112)
    address = first.data_ptr()
    del first
    assert add_relu(2, 1, 64, 112, 112).data_ptr() == address


def test_a_view_keeps_its_memory():
    before = outputs()["in_use"]
    view = add_relu(3, 2, 64, 56, 56)[1:, ::2]
    others = [add_relu(4, 1, 64, 56, 56) for _ in range(6)]
    assert (view == 3).all() and all((other == 4).all() for other in others)
    del view, others
    assert outputs()["in_use"] == before


def test_bound_over_models_and_sizes(torchvision):
    """Whatever has been asked for, at most twice what was in use at once is held."""
    model = fastres.convert(torchvision.models.resnet18().eval())
    kept = []
    with torch.inference_mode():
        for batch, size in ((1, 64), (4, 160), (2, 96), (1, 224), (3, 32)):
            model(torch.randn(batch, 3, size, size))
            kept.append(add_relu(batch, 1, batch, 160, 160))
            expect_bound(outputs())
            expect_bound(ops.extension.pool_info()["filters"])
    assert all((tensor == batch).all() for tensor, batch in zip(kept, (1, 4, 2, 1, 3), strict=True))


def test_calls_that_recur_map_no_memory():
    """Small outputs of many sizes, and one that is most of what is ever in use at once."""
    resource = pytest.importorskip("resource")
    kilobytes = (*range(300, 2000, 300), 4800)
    inputs = [torch.zeros(1, 1, each, 256) for each in kilobytes]

    def page_faults_of_a_call() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for x in inputs:
            functional.add_relu(x, x)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(page_faults_of_a_call() for _ in range(8)) == 0


def test_memory_is_given_back():
    """In a process of its own: resident memory after a large call and many small ones."""
    script = f"""
import torch
from fastres import functional, ops

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

small = torch.randn(1, 64, 32, 32)
functional.add_relu(small, small)
large = torch.randn(16, 64, 224, 224)
before = resident()
output = functional.add_relu(large, large)
assert resident() - before > 150 << 20, "it is not where this test looks for it"
del output
held = ops.extension.pool_info()["outputs"]["held"]
assert held > 150 << 20, held
for _ in range(9000):
    functional.add_relu(small, small)
held = ops.extension.pool_info()["outputs"]["held"]
assert held <= {HUGE_PAGE}, held
assert resident() - before < 16 << 20
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    subprocess.run([sys.executable, "-c", script], check=True)


def test_storages_are_like_any_other():
    before = outputs()["in_use"]  # by tests that have run
    value = add_relu(5, 1, 64, 56, 56)
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    assert torch.equal(torch.load(file), value)
    assert torch.equal(copy.deepcopy(value), value)
    assert value.untyped_storage().resizable()
    grown = value.clone().set_(value.untyped_storage(), 0, (64 * 56 * 56,))
    grown.resize_(2 * 64 * 56 * 56)
    assert (grown[: 64 * 56 * 56] == 5).all()
    grown.untyped_storage().resize_(0)
    assert outputs()["in_use"] == before
    shared = add_relu(6, 1, 64, 56, 56).share_memory_()
    assert shared.is_shared() and (shared == 6).all()
    array = add_relu(7, 1, 64, 56, 56).numpy()
    add_relu(8, 1, 64, 56, 56)
    assert (array == 7).all()


def test_small_and_refused_requests_are_torch_s_own():
    before = outputs()
    kept = add_relu(1, 1, 4, 8, 8)
    assert outputs() == before and (kept == 1).all()


def test_profiler_sees_the_memory():
    with torch.profiler.profile(profile_memory=True) as profile:
        value = add_relu(1, 1, 64, 56, 56)
        del value
    events = {event.key: event for event in profile.key_averages()}
    assert events["fastres::add_relu"].cpu_memory_usage == 4 * 64 * 56 * 56


def test_threads():
    """Eight callers at once, each with its own values."""
    before, right = outputs()["in_use"], []

    def call(value: int) -> None:
        held = []
        for step in range(40):
            held.append((add_relu(100 * value + step, 1, 32, 16 * (1 + step % 5), 40), step))
            if len(held) > 3:
                held.pop(step % 3)
            if not all((output == 100 * value + step).all() for output, step in held):
                return
        right.append(value)

    threads = [threading.Thread(target=call, args=(value,)) for value in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(right) == list(range(1, 9))
    assert outputs()["in_use"] == before
    expect_bound(outputs())


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_a_forked_child_finds_the_pool_in_order():
    script = """
import os, threading, torch
from fastres import functional

torch.set_num_threads(1)
small = torch.ones(1, 64, 32, 32)
done = threading.Event()

def churn():
    while not done.is_set():
        functional.add_relu(small, small)

threads = [threading.Thread(target=churn) for _ in range(2)]
for thread in threads: thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if (functional.add_relu(small, small) == 2).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
done.set()
for thread in threads: thread.join()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


def test_packed_filters_leave_with_their_weights():
    held = ops.extension.pool_info()["filters"]["in_use"]
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)).eval()
    fastres.convert(model)
    with torch.inference_mode():
        model(torch.randn(1, 64, 16, 16))
    assert ops.extension.pool_info()["filters"]["in_use"] > held
    del model
    ops.extension.clear_cache()
    assert ops.extension.pool_info()["filters"]["in_use"] == held
