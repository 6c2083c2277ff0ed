"""Models by name: what is listed can be made, what is wrong is said."""

import re
from pathlib import Path

import pytest
import torch

import fastres
from fastres import models
from fastres.models import create, list_models

DEEPEST = {"cifar_resnet1202", "cifar_resnetv2_1001"}  # their parameters are counted elsewhere


@pytest.mark.parametrize("name", [name for name in list_models() if name not in DEEPEST])
def test_every_listed_model_can_be_made_and_called(name):
    with torch.device("meta"):
        model = create(name, num_classes=7)
        channels = 1 if name.startswith("teaching") else 3
        assert model(torch.empty(2, channels, 64, 64)).shape == (2, 7)


def test_lists_are_sorted_and_filtered():
    names = list_models()
    assert len(names) == len(set(names)) > 35
    assert names.index("cifar_resnet20") < names.index("cifar_resnet110")
    assert list_models("resnet??") == ["resnet18", "resnet34", "resnet50"]
    assert list_models("nothing") == []


@pytest.mark.parametrize("options", [
    {"in_channels": 1}, {"stem": "cifar"}, {"num_classes": 3}
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50", "densenet121", "cifar_resnet20"])
def test_common_options(name, options):
    with torch.device("meta"):
        model = create(name, **options)
        images = torch.empty(2, options.get("in_channels", 3), 32, 32)
        classes = options.get("num_classes", 10 if name.startswith("cifar") else 1000)
        assert model(images).shape == (2, classes)
        first = next(model.parameters())
        cifar = name.startswith("cifar") or options.get("stem") == "cifar"
        kernel = (3, 3) if cifar else (7, 7)
        assert first.shape[1:] == (images.shape[1], *kernel)


def test_depth_is_a_part_of_the_name():
    with torch.device("meta"):
        assert len(create("cifar_resnet26").layer3) == 4
        assert len(create("cifar_resnetv2_29").layer1) == 3, "bottlenecks"
        assert len(create("cifar_resnetv2_38").layer1) == 4, "9n+2 comes before 6n+2"
    for name, message in [
        ("cifar_resnet21", r"depth: expected 6n\+2 \(such as 20, 26\), got 21"),
        ("cifar_plain3", r"depth: expected 6n\+2 \(such as 8\), got 3"),
        ("cifar_resnetv2_165", r"depth: expected 6n\+2 \(such as 164, 170\), got 165"),
        ("resnetv2_18", "depth: expected one of 50, 101, 152, got 18"),
        ("densenet122", "depth: expected one of 121, .*got 122"),
    ]:
        with pytest.raises(ValueError, match=message):
            create(name)
    for depth in (22, -4, 2, 20.0, "20"):
        with pytest.raises(ValueError, match=r"depth: expected 6n\+2"):
            models.cifar_resnet(depth)
    with pytest.raises(ValueError, match=r"depth: expected 6n\+4"):
        models.cifar_wide_resnet(30)
    with pytest.raises(ValueError, match=r"depth: expected 9n\+2"):
        models.cifar_resnext(30)


@pytest.mark.parametrize("name, near", [
    ("resnet5", "resnet50"), ("reznet18", "resnet18"), ("cifar_resnet", "cifar_resnet20"),
    ("densnet121", "densenet121"), ("resnext50", "resnext50_32x4d"), ("ResNet50", "resnet50"),
])  # fmt: skip
def test_unknown_names_suggest_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"no model is called '{name}'; did you mean.* {near}"):
        create(name)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="no model is called 'qqqq'$"):
        create("qqqq")
    with pytest.raises(TypeError, match="name: expected a string, got int"):
        create(50)
    with pytest.raises(TypeError, match="resnet18 takes no option 'num_class'.*did you mean num_c"):
        create("resnet18", num_class=10)
    for name, option in [
        ("resnet18", "block"), ("cifar_resnet20", "depth"), ("cifar_plain20", "shortcut"),
        ("densenet121", "zero_init_residual"), ("resnetv2_50", "stride_on"),
    ]:  # fmt: skip
        with pytest.raises(TypeError, match=f"{name} takes no option '{option}'"):
            create(name, **{option: 1})
    for name, options, message in [
        ("resnet18", {"stem": "mnist"}, "stem: expected one of imagenet, cifar, got 'mnist'"),
        ("resnet18", {"shortcut": "D"}, "shortcut: expected one of A, B, C.* got 'D'"),
        ("resnetv2_50", {"shortcut": "scaling"}, "shortcut: expected one of A, B, C, got"),
        ("resnet50", {"stride_on": "5x5"}, "stride_on: expected '1x1' or '3x3', got '5x5'"),
        ("resnet18", {"stride_on": "1x1"}, "stride_on: BasicBlock has no 1x1 convolution"),
        ("resnet18", {"widths": (8, 8)}, "widths: expected 4, one a stage, got 2"),
        ("resnetv2_50", {"dropout": 0.5}, "dropout: PreActBottleneck has none"),
        ("cifar_resnet_wide", {"n": 0}, "n: expected a positive integer, got 0"),
        ("resnet18", {"stochastic_depth": 1.5}, r"stochastic_depth: expected a probability"),
        ("cifar_plain20", {"stochastic_depth": 0.5}, "stochastic_depth: ResNet has no residual"),
        ("densenet121", {"stochastic_depth": 0.5}, "stochastic_depth: DenseNet has no residual"),
    ]:
        with torch.device("meta"), pytest.raises(ValueError, match=message):
            create(name, **options)


@pytest.mark.parametrize("name", [
    "cifar_resnet8", "cifar_resnetv2_11", "resnet18", "densenet121", "teaching_resnet18",
])  # fmt: skip
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_inside_it_is_channels_last(one_thread, name, training):
    """Contiguous images took 1.7 times as long as channels_last ones before models went there."""
    channels = 1 if name.startswith("teaching") else 3
    model = create(name, num_classes=3).train(training)
    seen = []
    for stage in model.stages[1:-1]:
        model.get_submodule(stage).register_forward_hook(
            lambda _module, inputs, output: seen.extend((inputs[0], output))
        )
    images = torch.randn(2, channels, 32, 32)
    for layout in (torch.contiguous_format, torch.channels_last):
        seen.clear()
        with torch.set_grad_enabled(training):
            model(images.to(memory_format=layout))
        assert len(seen) >= 6
        for tensor in seen:
            assert tensor.stride(1) == 1, f"{tuple(tensor.shape)} has strides {tensor.stride()}"
    seen.clear()
    with torch.set_grad_enabled(training), fastres.backend("eager"):
        model(images)
    assert seen[0].is_contiguous(), "eager PyTorch is given what the caller gave"


def examples():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    section = text.partition("\n## Models\n")[2].partition("\n## ")[0]
    return re.findall(r"`(create\(.+?\))`", section)


def test_readme_has_an_example_of_every_family():
    assert len(examples()) >= 13


@pytest.mark.parametrize("example", examples())
def test_readme_examples(example):
    with torch.device("meta"):
        model = eval(example, {"create": create})
        first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
        assert model(torch.empty(2, first.in_channels, 32, 32)).shape[0] == 2
