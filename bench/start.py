"""What a process pays for a network before its second call, for ``bench_networks.py``.

    python bench/start.py fastres resnet50 2
    python bench/start.py openvino model.xml 2

Prints the seconds of the first call, from a model in memory (or OpenVINO's file) to the first
output, and the resident bytes that the model and five calls have added to the imported libraries.
"""

import json
import os
import sys
import time

SHAPE = (1, 3, 224, 224)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def with_fastres(name: str, threads: int):
    import torch

    import fastres
    from fastres.compat import import_torchvision

    models = import_torchvision().models
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    images = torch.randn(SHAPE)
    before = resident()
    model = getattr(models, name)().eval()
    start = time.perf_counter()
    fastres.convert(model)
    model(images)
    return before, time.perf_counter() - start, lambda: model(images)


def with_openvino(file: str, threads: int):
    import numpy
    import openvino

    images = numpy.random.default_rng(0).standard_normal(SHAPE, numpy.float32)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = openvino.Core()
    before, start = resident(), time.perf_counter()
    request = core.compile_model(core.read_model(file), "CPU", settings).create_infer_request()
    request.infer([images])
    return before, time.perf_counter() - start, lambda: request.infer([images])


if __name__ == "__main__":
    provider, source, threads = sys.argv[1:]
    begin = {"fastres": with_fastres, "openvino": with_openvino}[provider]
    before, seconds, call = begin(source, int(threads))
    for _ in range(4):
        call()
    print(json.dumps({"first_call_seconds": seconds, "resident_bytes": resident() - before}))
