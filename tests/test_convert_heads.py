"""The head of a classifier as authors write it: fused in eval, or left alone and still right."""

import copy

import pytest
import torch
import torch.nn.functional as F
from agreement import Calls, assert_close
from converting import (
    assert_agrees,
    assert_exports_and_compiles,
    kinds,
    reasons,
)
from torch import nn

import fastres
from fastres.compat import import_timm, import_torchvision

pytestmark = pytest.mark.usefixtures("one_thread")

timm, torchvision = import_timm(), import_torchvision()


class Net(nn.Module):
    """A classifier whose head the tests vary."""

    def __init__(self, head=None, **modules):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8, 5)
        self.head = head
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.head(self, F.relu(self.bn(self.conv(x))))


def by_size(net, x):
    x = net.avgpool(x)
    return net.fc(x.view(x.size(0), -1))


def by_shape(net, x):
    x = F.adaptive_avg_pool2d(x, 1)
    return net.fc(x.reshape(x.shape[0], -1))


def by_whole_size(net, x):
    x = torch.mean(x, [2, 3], keepdim=True)
    return net.fc(x.view(x.size()[0], -1))


def functional_dropout(net, x):
    return net.fc(F.dropout(torch.flatten(net.avgpool(x), 1), 0.5, net.training))


HEADS = {
    "torchvision": lambda net, x: net.fc(torch.flatten(net.avgpool(x), 1)),
    "method": lambda net, x: net.fc(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1)),
    "mean": lambda net, x: net.fc(x.mean((2, 3))),
    "mean from the end": lambda net, x: net.fc(x.mean(dim=[-1, -2], keepdim=False)),
    "mean that keeps": lambda net, x: net.fc(torch.flatten(x.mean((-1, -2), keepdim=True), 1)),
    "view": by_size,
    "reshape": by_shape,
    "whole size": by_whole_size,
    "module": lambda net, x: net.fc(net.flatten(net.avgpool(x))),
    "dropout": lambda net, x: net.fc(net.drop(torch.flatten(net.avgpool(x), 1))),
    "functional dropout": functional_dropout,
    "dropout of nothing": lambda net, x: net.fc(F.dropout(x.mean((2, 3)), p=0.0)),
    "timm": lambda net, x: net.fc(net.pool(x)),
    "timm with dropout": lambda net, x: net.fc(net.drop(net.pool(x))),
    "timm, not fast": lambda net, x: net.fc(net.average(x)),
}


def made(head) -> nn.Module:
    pool = timm.layers.SelectAdaptivePool2d
    return Net(
        head, flatten=nn.Flatten(), drop=nn.Dropout(0.5), pool=pool(pool_type="fast", flatten=True),
        average=pool(pool_type="avg", flatten=True), most=pool(pool_type="max", flatten=True),
        four=nn.AdaptiveAvgPool2d((1, 4)), wide=nn.Linear(32, 5), rows=nn.Linear(1, 5),
    )  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_fused(head):
    converted = assert_agrees(made(HEADS[head]), torch.randn(3, 3, 7, 9))
    assert "mean_linear" not in kinds(converted.train())
    assert kinds(converted.eval())["mean_linear"] == 1
    with torch.no_grad(), Calls() as calls:
        converted(torch.randn(3, 3, 7, 9))
    assert calls.names == ["conv_bn_relu", "mean_linear"]
    assert reasons(converted) == {}


def pooled_twice(net, x):
    pooled = net.avgpool(x)
    return net.fc(torch.flatten(pooled, 1)) + pooled.sum()


def flattened_twice(net, x):
    flat = torch.flatten(net.avgpool(x), 1)
    return net.fc(flat), flat


def of_another(net, x):
    pooled = net.avgpool(x)
    return net.fc(pooled.view(x.size(0), -1))


def in_place(net, x):
    pooled = net.avgpool(x)
    flat = torch.flatten(pooled, 1)
    pooled.mul_(2)
    return net.fc(flat)


OTHERS = {
    "dropout in eval": lambda net, x: net.fc(F.dropout(x.mean((2, 3)), 0.5)),
    "pooled twice": pooled_twice,
    "flattened twice": flattened_twice,
    "size of another": of_another,
    "in place": in_place,
    "four columns": lambda net, x: net.wide(torch.flatten(net.four(x), 1)),
    "maximum": lambda net, x: net.fc(net.most(x)),
    "rows only": lambda net, x: net.fc(x.mean((2,)).mean(2)),
    "not flattened": lambda net, x: net.rows(net.avgpool(x)),
    "in another dtype": lambda net, x: net.fc(x.mean((2, 3), dtype=x.dtype)),
    "activation": lambda net, x: net.fc(F.relu(x.mean((2, 3)))),
}


@pytest.mark.parametrize("head", OTHERS)
def test_left_alone(head):
    converted = assert_agrees(made(OTHERS[head]), torch.randn(3, 3, 7, 9))
    assert "mean_linear" not in kinds(converted.eval())


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_is_no_linear_layer():
    model = made(HEADS["torchvision"])
    model.fc = Doubling(8, 5)
    assert "mean_linear" not in kinds(assert_agrees(model, torch.randn(2, 3, 7, 9)).eval())


@pytest.mark.parametrize("watched", ["avgpool", "flatten", "fc", "pool", "pool.pool", "drop"])
def test_hooks_see_their_values(watched):
    module_head = watched in ("avgpool", "flatten", "fc")
    model = made(HEADS["module" if module_head else "timm with dropout"]).eval()
    converted = fastres.convert(model, inplace=False)
    seen = {}
    for name, net in {"eager": model, "ours": converted}.items():
        net.get_submodule(watched).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output})
        )
    x = torch.randn(2, 3, 7, 9)
    with torch.no_grad():
        expected, output = model(x), converted(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(seen["ours"], seen["eager"])
    assert "mean_linear" not in kinds(converted)
    assert all(reason.startswith("hook on a ") for reason in reasons(converted).values())
    assert converted.fc in {converted.get_submodule(path) for path in reasons(converted)}


def test_a_patched_forward_runs():
    converted = fastres.convert(made(HEADS["torchvision"]).eval())
    converted.fc.forward = lambda x: x + 1
    with torch.no_grad():
        assert converted(torch.zeros(2, 3, 7, 9)).shape == (2, 8)
    assert reasons(converted)["fc"] == "patched forward of a Linear"


def test_a_dropout_in_training_inside_a_model_in_eval_drops():
    model = made(HEADS["dropout"]).eval()
    converted = fastres.convert(model, inplace=False)
    x = torch.randn(2, 3, 7, 9)
    found = []
    for net in (model, converted):
        net.drop.train()
        torch.manual_seed(1)
        with torch.no_grad():
            found.append(net(x))
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[0], converted.eval()(x))
    converted.drop.train()
    assert "dropout in training mode" in reasons(converted).values()


def test_weights_are_never_stale():
    model = made(HEADS["torchvision"]).eval()
    converted = fastres.convert(model, inplace=False)
    x = torch.randn(2, 3, 7, 9)
    with torch.no_grad():
        for change in (
            lambda fc: fc.weight.mul_(2),
            lambda fc: fc.weight.data.neg_(),
            lambda fc: setattr(fc, "bias", None),
            lambda fc: setattr(fc, "weight", nn.Parameter(fc.weight[:3].t().contiguous().t())),
        ):
            for net in (model, converted):
                change(net.fc)
            torch.testing.assert_close(converted(x), model(x))
        with Calls() as calls:
            converted(x)
    assert "mean_linear" in calls.names


def test_mistakes_are_raised_as_eager_raises_them():
    converted = fastres.convert(made(HEADS["torchvision"]).eval())
    converted.fc = nn.Linear(7, 5)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), torch.no_grad():
        converted(torch.randn(2, 3, 7, 9))
    converted.fc = nn.Linear(8, 5).double()
    with pytest.raises(RuntimeError, match="dtype"), torch.no_grad():
        converted(torch.randn(2, 3, 7, 9))


@pytest.mark.parametrize("context", ["autocast", "grad", "eager"])
def test_the_authors_modules_run(context):
    model = made(HEADS["torchvision"]).eval()
    converted = fastres.convert(model, inplace=False)
    x = torch.randn(2, 3, 7, 9)
    contexts = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "grad": torch.enable_grad,
        "eager": lambda: fastres.backend("eager"),
    }
    with torch.set_grad_enabled(context == "grad"), contexts[context](), Calls() as calls:
        output, expected = converted(x), model(x)
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)
    assert "mean_linear" not in calls.names and output.requires_grad == (context == "grad")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.resnet18(num_classes=10),
        lambda: timm.create_model("resnet18", pretrained=False, num_classes=10),
        lambda: fastres.models.create("resnet18", num_classes=10),
        lambda: fastres.models.create("resnetv2_50", num_classes=10),
    ],
    ids=["torchvision", "timm", "fastres", "fastres v2"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resnets(make, dtype):
    model = make().eval()
    converted = fastres.convert(copy.deepcopy(model).to(dtype))
    x = torch.randn(2, 3, 65, 71).to(dtype)
    with torch.no_grad(), Calls() as calls:
        output = converted(x)
    assert calls.names.count("mean_linear") == 1
    with torch.no_grad(), fastres.backend("eager"):
        truth, eager = copy.deepcopy(model).to(dtype).double()(x.double()), model.to(dtype)(x)
    assert_close(output, eager, truth, scale=16)


def test_export_and_compile():
    model = fastres.convert(torchvision.models.resnet18(num_classes=10).eval())
    assert_exports_and_compiles(model, torch.randn(1, 3, 64, 64), "mean_linear")
