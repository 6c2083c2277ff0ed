"""Compiles every convolution kernel that will be measured, on all cores at once: what is compiled is
in Triton's cache then, and the sections that time need not wait for it."""

import concurrent.futures
import multiprocessing
import os

import torch
from cases import Convolution, convolutions
from fastres.kernels import configs
from fastres.kernels.conv_dgrad import Behind, dgrad
from fastres.kernels.conv_fprop import fprop
from fastres.kernels.conv_operands import Affine, Norm
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
    from .convolutions import Problem

    problem = Problem(conv, batch, torch.device(device))
    x, w, dy, window = problem.x, problem.w, problem.dy, problem.window
    norm = Norm(problem.mean, problem.var, problem.scale, problem.shift, 1e-5)
    epilogue = {"norm": norm, "residual": problem.residual, "relu": conv.relu}
    tiles = configs.TILES[configs.architecture(x.device)]
    flat = conv.cin <= 8
    launches = [
        (kind, lambda tile, keywords=keywords: fprop(x, w, *window, tile=tile, **keywords))
        for keywords, kind in ((epilogue, "plain"), ({"statistics": True}, "statistics"))
        for kind in (["flat"] if flat else [kind])
    ]
    if conv.kernel == conv.stride == 1:
        launches += [("descriptors", call) for _, call in launches[:2]]
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
