"""Compiles every convolution kernel that will be measured, on all cores at once: what is compiled is
in Triton's cache then, and the sections that time need not wait for it."""

import concurrent.futures
import multiprocessing
import os

import torch
from cases import Convolution, convolutions
from fastres.kernels import configs, conv_descriptors
from fastres.kernels.conv_dgrad import Behind, dgrad
from fastres.kernels.conv_fprop import fprop
from fastres.kernels.conv_operands import Affine, Norm
from fastres.kernels.conv_shape import Shape, flat_channels, taps_by_class
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
    from .models import BATCHES

    problem = Problem(conv, batch, torch.device(device))
    tiles = configs.TILES[configs.architecture(problem.x.device)]
    launches = _alone(problem)
    if not flat_channels(1, conv.cin):
        launches += _of_a_chain(problem)
    if tiles["descriptors"]:  # whose boxes are chosen by the batch
        launches += _on_descriptors(Problem(conv, MEASURED, torch.device(device)))
    done = 0
    for kind, call in launches:
        for tile in tiles[kind]:
            if tile in configs.SMALL:  # which lose on maps of so many pixels
                continue
            if tile.BLOCK_N <= max(32, conv.cout) or kind == "wgrad":
                call(tile)
                done += 1
    for images in BATCHES[1:]:  # in the shipped tile
        (_, evaluated), *_ = _alone(Problem(conv, images, torch.device(device)))
        evaluated(None)
        done += 1
    return done


def _alone(problem) -> list:
    """The output in eval and with the batch's statistics, and the gradients."""
    norm = Norm(problem.mean, problem.var, problem.scale, problem.shift, 1e-5)
    epilogue = {"norm": norm, "residual": problem.residual, "relu": problem.conv.relu}
    flat = flat_channels(1, problem.conv.cin)
    return [
        ("flat" if flat else "plain", _fprop(problem, **epilogue)),
        ("flat" if flat else "statistics", _fprop(problem, statistics=True)),
        ("plain", _dgrad(problem)),
        ("wgrad", _wgrad(problem)),
    ]


def _of_a_chain(problem) -> list:
    """Those with batch norm and ReLU before the convolution."""
    bn = Affine(*torch.rand(3, problem.x.shape[1], device=problem.x.device))
    return [
        ("prologue", _fprop(problem, prologue=bn, statistics=True)),
        ("masked", _dgrad(problem, behind=Behind(problem.x, bn))),
        ("wgrad", _wgrad(problem, prologue=bn)),
    ]


def _on_descriptors(problem) -> list:
    """What tensor descriptors compute of these."""
    x, w, dy, window = problem.x, problem.w, problem.dy, problem.window
    shape, groups = Shape.of(x.shape, w.shape, *window), window[3]
    (_, evaluated), (_, trained), (_, gradient), _ = _alone(problem)
    calls = []
    if not conv_descriptors.fprop_obstacle(shape, groups, None, x, w):
        calls += [evaluated, trained]
    if not conv_descriptors.dgrad_obstacle(groups, taps_by_class(shape, x.shape[1]), dy, w):
        calls += [gradient, dict(_of_a_chain(problem))["masked"]]
    return [("descriptors", call) for call in calls]


def _fprop(problem, **how):
    return lambda tile: fprop(problem.x, problem.w, *problem.window, tile=tile, **how)


def _dgrad(problem, **how):
    x, w, dy = problem.x, problem.w, problem.dy
    return lambda tile: dgrad(dy, w, x.shape, *problem.window, tile=tile, **how)


def _wgrad(problem, **how):
    x, w, dy = problem.x, problem.w, problem.dy
    return lambda tile: wgrad(dy, x, w.shape, *problem.window, tile=tile, **how)
