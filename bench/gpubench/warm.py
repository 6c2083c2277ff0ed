"""Compiles every convolution kernel that will be measured, on all cores at once: what is compiled is
in Triton's cache then, and the sections that time need not wait for it."""

import concurrent.futures
import functools
import multiprocessing
import os

import torch
from cases import Convolution, convolutions
from fastres.kernels import configs, conv_descriptors
from fastres.kernels.conv_dgrad import Behind, dgrad
from fastres.kernels.conv_fprop import fprop
from fastres.kernels.conv_operands import Affine, Norm
from fastres.kernels.conv_shape import Shape
from fastres.kernels.conv_wgrad import wgrad

BATCH = 16  # sizes divisible by 16 are compiled alike


def run(emit, budget, device) -> None:
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
    futures = {pool.submit(compile_all, conv): conv for conv in convolutions()}
    try:
        for future in concurrent.futures.as_completed(futures, timeout=max(budget.left, 1)):
            emit(case=futures[future].name, kernels=future.result())
    except TimeoutError:
        emit(case="the rest", note="compiled where it is measured")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(pool._processes.values()):
            process.terminate()


def compile_all(conv: Convolution, batch: int = BATCH, device: str = "cuda") -> int:
    """Launches every kernel in every tile that may be tried for ``conv``; gives their number."""
    from .convolutions import BATCH as MEASURED
    from .convolutions import Problem

    problem = Problem(conv, batch, torch.device(device))
    x, w, dy, window = problem.x, problem.w, problem.dy, problem.window
    tiles = configs.TILES[configs.architecture(x.device)]
    flat = conv.cin <= 8
    launches = [("flat" if flat else kind, call) for kind, call in _outputs(problem)]
    shape = Shape.of(x.shape, w.shape, *window)
    if tiles["descriptors"] and not conv_descriptors.obstacle(shape, window[3], None, x, w):
        # boxes are chosen by the batch
        measured = Problem(conv, MEASURED, torch.device(device))
        launches += [("descriptors", call) for _, call in _outputs(measured)]
    launches.append(("plain", lambda tile: dgrad(dy, w, x.shape, *window, tile=tile)))
    launches.append(("wgrad", lambda tile: wgrad(dy, x, w.shape, *window, tile=tile)))
    if not flat:
        launches += _of_a_chain(problem)
    done = 0
    for kind, call in launches:
        for tile in tiles[kind]:
            if tile.BLOCK_N <= max(32, conv.cout) or kind == "wgrad":
                call(tile)
                done += 1
    return done


def _outputs(problem) -> list:
    """In eval, and with the batch's statistics."""
    norm = Norm(problem.mean, problem.var, problem.scale, problem.shift, 1e-5)
    epilogue = {"norm": norm, "residual": problem.residual, "relu": problem.conv.relu}
    return [
        (kind, functools.partial(_output, problem, keywords))
        for kind, keywords in (("plain", epilogue), ("statistics", {"statistics": True}))
    ]


def _output(problem, keywords: dict, tile) -> None:
    fprop(problem.x, problem.w, *problem.window, tile=tile, **keywords)


def _of_a_chain(problem) -> list:
    """Those with batch norm and ReLU before the convolution."""
    x, w, dy, window = problem.x, problem.w, problem.dy, problem.window
    bn = Affine(*torch.rand(3, x.shape[1], device=x.device))
    behind = Behind(x, bn)
    return [
        ("prologue", lambda tile: fprop(x, w, *window, prologue=bn, statistics=True, tile=tile)),
        ("masked", lambda tile: dgrad(dy, w, x.shape, *window, behind=behind, tile=tile)),
        ("wgrad", lambda tile: wgrad(dy, x, w.shape, *window, prologue=bn, tile=tile)),
    ]
