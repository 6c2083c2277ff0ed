"""Other runtimes for inference on a CPU: OpenVINO and ONNX Runtime (development dependencies)."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn


def openvino_file(module: nn.Module, path: Path) -> Path:
    """The module as OpenVINO's file, for float32 images of 224x224, batch 1."""
    runtime = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    images = torch.zeros(1, 3, 224, 224)
    model = runtime.convert_model(module, example_input=images)
    model.reshape(list(images.shape))
    runtime.save_model(model, path, compress_to_fp16=False)
    return path


def openvino(module: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Callable:
    """OpenVINO on as many threads as PyTorch, computing in ``dtype`` from float32 inputs."""
    runtime = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    module = copy.deepcopy(module).float()
    (images,) = (tensor.float() for tensor in inputs)
    model = runtime.convert_model(module, example_input=images)
    model.reshape(list(images.shape))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
    }
    request = runtime.Core().compile_model(model, "CPU", settings).create_infer_request()
    array = images.numpy()
    request.set_input_tensor(runtime.Tensor(array, shared_memory=True))

    def run() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    run.input = array  # OpenVINO reads it where it lies, without a reference to it
    return run


def onnxruntime(module: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Callable:
    """ONNX Runtime on as many threads as PyTorch, float32."""
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    if dtype != torch.float32:
        pytest.skip("ONNX Runtime's CPU provider computes these models in float32 only")
    program = torch.onnx.export(
        copy.deepcopy(module), inputs, dynamo=True, verbose=False, input_names=["images"]
    )
    stream = io.BytesIO()
    program.save(stream)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(
        stream.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    (images,) = (tensor.numpy() for tensor in inputs)
    return lambda: torch.from_numpy(session.run(None, {"images": images})[0])


PROVIDERS = {"openvino": openvino, "onnxruntime": onnxruntime}
