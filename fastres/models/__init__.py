"""Model families on the fused operators, by name (``create``, ``list_models``) or by function."""

from . import measure
from .cifar import cifar_resnet, cifar_resnet_wide
from .densenet import DenseNet, densenet
from .plain import PlainBlock, cifar_plain, plain18, plain34
from .preact import PreActBlock, PreActBottleneck, PreActResNet, cifar_resnetv2, resnetv2
from .registry import create, list_models
from .resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from .resnext import cifar_resnext, resnext, resnext50_32x4d, resnext101_32x8d, resnext101_64x4d
from .shortcuts import SHORTCUTS
from .stochastic_depth import set_stochastic_depth
from .teaching import TeachingBlock, TeachingResNet, teaching_resnet18
from .wide import cifar_wide_resnet, wide_resnet, wide_resnet50_2, wide_resnet101_2

__all__ = [
    "SHORTCUTS",
    "DenseNet",
    "PlainBlock",
    "PreActBlock",
    "PreActBottleneck",
    "PreActResNet",
    "ResNet",
    "TeachingBlock",
    "TeachingResNet",
    "cifar_plain",
    "cifar_resnet",
    "cifar_resnet_wide",
    "cifar_resnetv2",
    "cifar_resnext",
    "cifar_wide_resnet",
    "create",
    "densenet",
    "list_models",
    "measure",
    "plain18",
    "plain34",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnetv2",
    "resnext",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "set_stochastic_depth",
    "teaching_resnet18",
    "wide_resnet",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
