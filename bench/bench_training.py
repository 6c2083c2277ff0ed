"""SGD steps of the networks whose training is shown in bench/results/training: time and memory.

In plain PyTorch modules, converted; CIFAR's with projections for shortcuts. Fashion-MNIST's batch is
a quarter of its recipe's.
"""

from bench_networks import cifar
from cases import Case, maps
from torch import nn

from fastres.compat import import_torchvision


def cifar_resnet(depth: int):
    return cifar(depth), maps(128, 3, 32, 32)


def cifar2_resnet34():
    return import_torchvision().models.resnet34(num_classes=2), maps(64, 3, 32, 32)


def fashion_resnet18():
    model = import_torchvision().models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return model, maps(64, 1, 96, 96)


NETWORKS = {
    "cifar10-resnet20-b128-32px": lambda: cifar_resnet(20),
    "cifar10-resnet56-b128-32px": lambda: cifar_resnet(56),
    "cifar2-resnet34-b64-32px": cifar2_resnet34,
    "fashion-resnet18-b64-96px": fashion_resnet18,
}
CASES = [
    Case(f"{name}-fp32-train", build, providers=("fastres-cpu",), train=True, model=True)
    for name, build in NETWORKS.items()
]


def bench_training(comparison):
    comparison.run()
