"""Turns the ``CASES`` of every benchmark file into tests, and describes the machine they ran on."""

import functools

import ceilings
import pytest
import torch
from harness import Comparison

from fastres import timing
from fastres.environment import environment


def pytest_configure(config):
    timing.keep_freed_memory()


def pytest_generate_tests(metafunc):
    if "comparison" not in metafunc.fixturenames:
        return
    pairs = [(case, provider) for case in metafunc.module.CASES for provider in case.providers]
    ids = [f"{case.name}-{provider}" for case, provider in pairs]
    metafunc.parametrize("comparison", pairs, ids=ids, indirect=True)


@pytest.fixture
def comparison(request, benchmark):
    case, provider = request.param
    family = request.module.__name__.removeprefix("bench_")
    # A compiled function left over counts towards the limit of the next one's recompilations.
    torch._dynamo.reset()
    return Comparison(benchmark, family, case, provider)


@functools.cache
def machine() -> dict:
    return environment() | {"ceilings": ceilings.measure()}


def pytest_benchmark_generate_machine_info(config):
    return machine()


def pytest_benchmark_update_commit_info(config, commit_info):
    # The folder's and the branch's names are the developer's business.
    for key in ("project", "branch"):
        commit_info.pop(key, None)
