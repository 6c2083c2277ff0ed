"""Model families on the fused operators, by name (``create``, ``list_models``) or by function."""

from .cifar import cifar_resnet, cifar_resnet_wide
from .registry import create, list_models
from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from .shortcuts import SHORTCUTS
from .stochastic_depth import set_stochastic_depth

__all__ = [
    "SHORTCUTS",
    "ResNet",
    "cifar_resnet",
    "cifar_resnet_wide",
    "create",
    "list_models",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "set_stochastic_depth",
]
