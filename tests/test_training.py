"""Twenty SGD steps beside eager: losses, parameters and running statistics stay together."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from agreement import Calls
from torch import nn

import fastres
from fastres.nn import BasicBlock, BNReLU, Bottleneck, ConvBNReLU

STEPS = 20


class TutorialNet(nn.Module):
    """The small residual network of a tutorial, in our blocks: every kind of site, biases, a
    pre-activation, a cumulative average of the statistics and frozen ones."""

    def __init__(self):
        super().__init__()
        shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.stem = ConvBNReLU(3, 8, bias=True)
        self.block1 = BasicBlock(8, 8)
        self.block2 = BasicBlock(8, 16, 2, shortcut)
        self.block3 = Bottleneck(16, 4)
        self.last = BNReLU(16, momentum=None)
        self.head = nn.Linear(16, 5)
        self.block3.bn1.eval()

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.stem(x))))
        return self.head(self.last(x).mean((2, 3)))


def tutorial(dtype):
    torch.manual_seed(0)
    net = TutorialNet().to(dtype)
    return net, torch.randn(STEPS, 8, 3, 13, 11, dtype=dtype), torch.randint(5, (STEPS, 8))


def resnet18(dtype, seed=0):
    torch.manual_seed(seed)
    net = fastres.models.resnet18(num_classes=10).to(dtype)
    return net, torch.randn(STEPS, 4, 3, 48, 48, dtype=dtype), torch.randint(10, (STEPS, 4))


def train(net, images, labels, backend, autocast=False, learning_rate=0.01):
    """Losses of every step, and the state at the end."""
    net = copy.deepcopy(net)
    sgd = torch.optim.SGD(net.parameters(), learning_rate, momentum=0.9, weight_decay=1e-4)
    losses = []
    with fastres.backend(backend):
        for batch, wanted in zip(images, labels, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(
                    net(batch).to(torch.promote_types(batch.dtype, torch.float32)), wanted
                )
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
    return losses, net.state_dict()


def assert_together(one, other, rtol, atol):
    assert one[0] == pytest.approx(other[0], rel=rtol, abs=atol), "losses"
    for name, value in one[1].items():
        torch.testing.assert_close(
            value, other[1][name], rtol=rtol, atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
        assert value.isfinite().all()


# fp64 leaves room for nothing but rounding: 1e-16 a step, grown over twenty steps of momentum. In
# fp32 the same growth starts from 1e-7.
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_a_tutorial_network(one_thread, dtype, tolerance, layout):
    net, images, labels = tutorial(dtype)
    net, images = net.to(memory_format=layout), [x.to(memory_format=layout) for x in images]
    ours, eager = (train(net, images, labels, name) for name in ("auto", "eager"))
    assert_together(ours, eager, tolerance, tolerance)
    assert int(ours[1]["last.bn.num_batches_tracked"]) == STEPS
    assert ours[0][-1] != ours[0][0]


def furthest(run, truth) -> tuple[float, float]:
    """The largest distance from the fp64 run: of a loss, and of any value in the state."""
    losses = max(abs(a - b) for a, b in zip(run[0], truth[0], strict=True))
    return losses, max((v - truth[1][k]).abs().max().item() for k, v in run[1].items())


def beside(torchvision, net):
    theirs = torchvision.models.resnet18(num_classes=10).to(next(net.parameters()).dtype)
    theirs.load_state_dict(net.state_dict())
    return theirs


def test_resnet18_beside_torchvisions(torchvision, one_thread):
    """Another class, torchvision's own, in plain eager."""
    net, images, labels = resnet18(torch.float64)
    truth = train(beside(torchvision, net), images, labels, "eager", learning_rate=1e-3)
    with Calls() as calls:
        ours = train(net, images, labels, "auto", learning_rate=1e-3)
    assert calls.names.count("bn_relu_backward") == 20 * STEPS
    assert_together(ours, truth, 1e-9, 1e-9)


def test_float32_drifts_no_faster_than_eager(torchvision, one_thread):
    """Training amplifies roundings until masks flip, ours and eager's alike. How far one run drifts
    from fp64 is chance (0.01 to 0.3 in a loss, of either), so it is three of them that are judged.
    """
    ours, eager = [], []
    for seed in range(3):
        net, images, labels = resnet18(torch.float64, seed)
        theirs = beside(torchvision, net)
        truth = train(theirs, images, labels, "eager", learning_rate=1e-3)
        for model, backend, runs in ((net, "auto", ours), (theirs, "eager", eager)):
            run = train(model.float(), images.float(), labels, backend, learning_rate=1e-3)
            runs.append(furthest(run, truth))
    for near, far in zip(map(sum, zip(*ours)), map(sum, zip(*eager)), strict=True):
        assert near <= 2 * far, f"{near:.3g} from fp64, eager {far:.3g}"


def test_bf16_autocast(one_thread):
    """Eight bits a value: losses follow eager's as closely as eager follows fp32."""
    net, images, labels = tutorial(torch.float32)
    exact = torch.tensor(train(net, images, labels, "eager")[0])
    ours, eager = (
        torch.tensor(train(net, images, labels, name, autocast=True)[0])
        for name in ("auto", "eager")
    )
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + 0.02


def test_evaluation_between_steps_sees_the_latest_weights(one_thread):
    """Train, evaluate, train, as every script does: folded weights follow."""
    net, images, labels = tutorial(torch.float32)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    outputs = []
    for batch, wanted in zip(images[:6], labels[:6], strict=True):
        net.train()
        F.cross_entropy(net(batch), wanted).backward()
        sgd.step()
        sgd.zero_grad()
        net.eval()
        with torch.inference_mode():
            outputs.append(net(images[0]))
            with fastres.backend("eager"):
                torch.testing.assert_close(outputs[-1], net(images[0]), rtol=1e-3, atol=1e-4)
    assert all(not torch.allclose(a, b, 1e-3) for a, b in itertools.pairwise(outputs))


def test_gradient_accumulation_and_clipping(one_thread):
    net, images, labels = tutorial(torch.float64)
    gradients = []
    for name in ("auto", "eager"):
        twin = copy.deepcopy(net)
        with fastres.backend(name):
            for batch, wanted in zip(images[:3], labels[:3], strict=True):
                F.cross_entropy(twin(batch), wanted).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        gradients.append([p.grad for p in twin.parameters()])
    for ours, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-9, atol=1e-12)
