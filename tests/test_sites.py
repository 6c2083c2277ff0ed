"""Sites: a fused call stands for modules only where that is the same; what it cannot stand for is
called module by module, and the answer is always the author's."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from agreement import Calls, assert_like_eager, batch_norm_operands
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fastres
from fastres import ops, sites


def modules(**bn_options):
    conv, bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, **bn_options)
    for name, value in batch_norm_operands(4, torch.float32).items():
        if getattr(bn, name) is not None:
            getattr(bn, name).data.copy_(value)
    return conv, bn, nn.ReLU(inplace=True)


def one_by_one(input, conv, bn, act, residual=None, via=()):
    output = bn(conv(input))
    for module in via:
        output = module(output)
    if residual is not None:
        output = output + residual
    return output if act is None else act(output)


def compare(conv, bn, act, residual=None, via=(), training=True, fused=None, shape=(2, 3, 5, 7)):
    """The site beside its modules: output, buffers, and which fused operators served."""
    results = []
    input = torch.randn(shape)
    for call in (one_by_one, sites.conv_bn_act):
        twins = copy.deepcopy((conv, bn, act, via))
        twins[1].train(training)
        with Calls() as calls, torch.no_grad():
            output = call(input, *twins[:3], residual, twins[3])
        results.append({"output": output} | dict(twins[1].named_buffers()))
    assert_like_eager(results[1], results[0], rtol=1e-4, atol=1e-4)
    if fused is not None:
        assert calls.names == fused


RESIDUAL = torch.randn(2, 4, 5, 7)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [None, RESIDUAL], ids=["", "residual"])
@pytest.mark.parametrize("act", [None, nn.ReLU(), nn.ReLU(inplace=True), F.relu], ids=str)
def test_plain_modules_are_fused(training, residual, act):
    conv, bn, _ = modules()
    served = ["bn_relu"] if training else ["conv_bn_relu"]
    compare(conv, bn, act, residual, training=training, fused=served)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [
    {"momentum": None}, {"momentum": 0.5}, {"affine": False}, {"track_running_stats": False},
    {"eps": 0.5}, {"affine": False, "track_running_stats": False}, {"momentum": 0.0},
], ids=str)  # fmt: skip
def test_batch_norm_options(options, training):
    conv, bn, act = modules(**options)
    for _ in range(3):  # momentum=None depends on the count
        compare(conv, bn, act, RESIDUAL, training=training)
    results = []
    for call in (one_by_one, sites.conv_bn_act):
        twin = copy.deepcopy(bn).train(training)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            output = call(torch.randn(2, 3, 5, 7, generator=generator), conv, twin, act)
        results.append({"output": output.detach()} | dict(twin.named_buffers()))
    assert_like_eager(*results)
    if training and bn.track_running_stats:
        assert int(results[1]["num_batches_tracked"]) == 3


def test_running_statistics_dropped_later():
    """track_running_stats switched off, or the buffers removed, on a living module."""
    conv, bn, act = modules()
    bn.track_running_stats = False
    for training in (True, False):
        compare(conv, bn, act, training=training)
    bn.running_mean = bn.running_var = None
    for training in (True, False):
        compare(conv, bn, act, training=training)


class Doubled(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


class ShiftedConv(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


def patch(module, factor=2):
    original = module.forward
    module.forward = lambda *args: factor * original(*args)


def exact(kind):
    """A module of this kind with the parameters of ``modules()``."""
    conv, bn, act = modules()
    given = {"conv": conv, "bn": bn, "act": act}
    if kind == "subclassed bn":
        given["bn"] = Doubled(4)
    elif kind == "subclassed conv":
        given["conv"] = ShiftedConv(3, 4, 3, padding=1)
    elif kind == "instance norm":
        given["bn"] = nn.InstanceNorm2d(4, track_running_stats=True)
    elif kind == "no norm":
        given["bn"] = nn.Identity()
    elif kind == "SyncBatchNorm":
        given["bn"] = nn.SyncBatchNorm.convert_sync_batchnorm(bn)
    elif kind == "GELU":
        given["act"] = nn.GELU()
    elif kind == "ReLU6":
        given["act"] = nn.ReLU6()
    elif kind == "functional":
        given["act"] = torch.sigmoid
    elif kind == "reflect":
        given["conv"] = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    elif kind == "even same":
        given["conv"] = nn.Conv2d(3, 4, 2, padding="same")
    elif kind == "parametrized":
        nn.utils.parametrizations.weight_norm(given["conv"])
    elif kind == "pruned":
        with torch.no_grad():  # the pruned weight it keeps must be a leaf to be copied
            prune.l1_unstructured(given["conv"], "weight", amount=0.5)
    return list(given.values())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [
    "subclassed bn", "subclassed conv", "instance norm", "no norm", "GELU", "ReLU6",
    "functional", "reflect", "even same", "parametrized", "pruned",
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_other_modules_are_called_themselves(kind, training):
    compare(*exact(kind), training=training)
    compare(*exact(kind), RESIDUAL, training=training)


def test_sync_batch_norm_is_called_itself():
    """Outside a process group it is plain batch norm, and plain CPU tensors are accepted in eval."""
    compare(*exact("SyncBatchNorm"), training=False, fused=[])


@pytest.mark.parametrize("which", [0, 1, 2], ids=["conv", "bn", "act"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "backward_pre"])
def test_hooks_are_called(which, kind):
    conv, bn, _ = modules()
    site, seen = [conv, bn, nn.ReLU()], []
    register = {
        "forward": "register_forward_hook",
        "pre": "register_forward_pre_hook",
        "backward": "register_full_backward_hook",
        "backward_pre": "register_full_backward_pre_hook",
    }[kind]
    handle = getattr(site[which], register)(lambda *_: seen.append(kind))
    sites.conv_bn_act(torch.randn(2, 3, 5, 7), *site).sum().backward()
    assert seen == [kind]
    handle.remove()
    with Calls() as calls:
        sites.conv_bn_act(torch.randn(2, 3, 5, 7), *site).sum().backward()
    assert seen == [kind] and calls.names[:1] == ["bn_relu"], "not fused again without the hook"


@pytest.mark.parametrize("which", [0, 1, 2], ids=["conv", "bn", "act"])
def test_a_hook_that_changes_the_value_is_obeyed(which):
    site = list(modules())
    site[which].register_forward_hook(lambda module, args, output: 3 * output)
    compare(*site, training=False)
    compare(*site, RESIDUAL, training=True)


def test_global_hooks_are_called():
    conv, bn, act = modules()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        sites.conv_bn_act(torch.randn(2, 3, 5, 7), conv, bn, act)
        sites.add_act(RESIDUAL, RESIDUAL, act)
    finally:
        handle.remove()
    assert seen == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.ReLU]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["conv", "bn", "act"])
def test_a_patched_forward_is_called(which):
    site = list(modules())
    patch(site[which])
    input = torch.randn(2, 3, 5, 7)
    for training in (True, False):
        site[1].train(training)
        expected = one_by_one(input, *copy.copy(site))
        torch.testing.assert_close(sites.conv_bn_act(input, *site), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", [
    torch.randn(1, 4, 1, 1), torch.randn(4, 5, 7), torch.randn(2, 4, 5, 7).double(), 1.5,
    torch.tensor(2.0), torch.arange(7),
], ids=["channels", "unbatched", "fp64", "number", "scalar", "integers"])  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_residuals_that_broadcast_or_promote(residual, training):
    compare(*modules(), residual, training=training)
    _, _, act = modules()
    input = torch.randn(2, 4, 5, 7)
    torch.testing.assert_close(sites.add_act(input, residual, act), F.relu(input + residual))


class Halve(nn.Module):
    def forward(self, x):
        return x / 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("via", [(nn.Identity(),), (Halve(),), (nn.Identity(), nn.Dropout(0.0))])
def test_modules_between_batch_norm_and_addition(via, training):
    compare(*modules(), RESIDUAL, via, training)
    hooked = nn.Identity()
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    compare(*modules(), RESIDUAL, (hooked,), training)


def test_unbatched_and_wrong_inputs_fail_as_the_modules_do():
    conv, bn, act = modules()
    for input in (torch.randn(3, 5, 7), torch.randn(2, 5, 5, 7), torch.randn(7), None):
        errors = []
        for call in (one_by_one, sites.conv_bn_act):
            with pytest.raises((RuntimeError, ValueError, TypeError, AttributeError)) as caught:
                call(input, conv, bn, act)
            errors.append(caught.type)
        assert issubclass(errors[1], errors[0]) or input is None, errors


def test_frozen_batch_norm(torchvision):
    conv, bn, act = modules()
    frozen = torchvision.ops.misc.FrozenBatchNorm2d(4)
    frozen.load_state_dict(bn.state_dict())
    compare(conv, frozen, act, RESIDUAL, fused=["conv_bn_relu"])
    input = torch.randn(2, 3, 5, 7)
    output = sites.conv_bn_act(input, conv, frozen, act, RESIDUAL)
    expected = one_by_one(input, conv, frozen, act, RESIDUAL)
    gradients = [
        torch.autograd.grad(o.square().sum(), conv.parameters()) for o in (output, expected)
    ]
    for ours, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [
    {}, {"apply_act": False}, {"act_layer": nn.GELU}, {"drop_layer": nn.Dropout},
], ids=str)  # fmt: skip
def test_timms_batch_norm_with_an_activation(options, training):
    layers = pytest.importorskip("timm.layers")
    conv, plain, act = modules()
    bn = layers.BatchNormAct2d(4, **options)
    bn.load_state_dict(plain.state_dict(), strict=False)
    if "drop_layer" in options:
        bn.drop.p = 0.0
    compare(conv, bn, None, training=training)
    compare(conv, bn, act, RESIDUAL, training=training)
    # whatever is inside, the convolution and the batch norm are one
    compare(conv, bn, None, training=False, fused=["conv_bn_relu"])


def test_sites_without_a_convolution():
    _, bn, act = modules()
    x = torch.randn(2, 4, 5, 7)
    for residual in (None, RESIDUAL):
        with Calls() as calls:
            ours = sites.bn_act(x, copy.deepcopy(bn), act, residual)
        expected = F.relu(copy.deepcopy(bn)(x) + (0 if residual is None else residual))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        assert calls.names == ["bn_relu"]
    with Calls() as calls:
        torch.testing.assert_close(sites.add_act(x, RESIDUAL, act), F.relu(x + RESIDUAL))
    assert calls.names == ["add_relu"]
    assert torch.equal(sites.add_act(x, RESIDUAL, None), x + RESIDUAL)


def test_two_threads_share_an_eval_site():
    """Both fill and read the folded weights at once; sizes differ between them."""
    conv, bn, act = modules()
    bn.eval()
    inputs = [torch.randn(2, 3, 5 + i % 3, 7) for i in range(60)]
    with torch.no_grad():
        expected = [one_by_one(x, conv, bn, act) for x in inputs]
    failures = []

    def work():
        with torch.inference_mode():
            for x, wanted in zip(inputs, expected, strict=True):
                if not torch.allclose(sites.conv_bn_act(x, conv, bn, act), wanted, 1e-4, 1e-4):
                    failures.append(x.shape)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_no_inplace_surprise():
    """nn.ReLU(inplace=True) and the addition write nothing of the caller's."""
    conv, bn, act = modules()
    input, residual = torch.randn(2, 3, 5, 7), RESIDUAL.clone()
    before = input.clone()
    for training in (True, False):
        bn.train(training)
        with torch.no_grad():
            sites.conv_bn_act(input, conv, bn, act, residual)
            sites.bn_act(residual, bn, act, residual)
        assert torch.equal(input, before) and torch.equal(residual, RESIDUAL)


# --- the extension's own look at modules ----------------------------------------------------------

UNUSUAL = {
    "momentum": lambda conv, bn, act: setattr(bn.train(), "momentum", None),
    "no counter": lambda conv, bn, act: setattr(bn.train(), "num_batches_tracked", None),
    "not tracked": lambda conv, bn, act: setattr(bn.train(), "track_running_stats", False),
    "no statistics": lambda conv, bn, act: setattr(bn, "running_mean", None),
    "hook on conv": lambda conv, bn, act: conv.register_forward_hook(lambda *a: None),
    "hook on act": lambda conv, bn, act: act.register_forward_pre_hook(lambda *a: None),
    "backward hook": lambda conv, bn, act: bn.register_full_backward_hook(lambda *a: None),
    "patched forward": lambda conv, bn, act: setattr(conv, "forward", conv.forward),
    "padding mode": lambda conv, bn, act: setattr(conv, "padding_mode", "reflect"),
    "padding by name": lambda conv, bn, act: setattr(conv, "padding", "same"),
    "subclass": lambda conv, bn, act: setattr(bn, "__class__", type("B", (nn.BatchNorm2d,), {})),
    "another dtype": lambda conv, bn, act: conv.double(),
    "no parameter": lambda conv, bn, act: prune.l1_unstructured(conv, "weight", 0.5),
    "integer eps": lambda conv, bn, act: setattr(bn, "eps", 1),
    "wrong channels": lambda conv, bn, act: setattr(conv, "weight", nn.Parameter(torch.ones(4, 5, 3, 3))),
}  # fmt: skip


def eval_site():
    conv, bn, act = modules()
    return conv, bn.eval(), act


def quick(extension, conv, bn, act, residual=None, input=None, via=()):
    input = torch.randn(2, 3, 5, 7) if input is None else input
    both = extension.conv_bn_act(input, conv, bn, act, residual, via)
    alone = extension.bn_act(torch.randn(2, 4, 5, 7), bn, act, residual, via)
    return both, alone


@torch.no_grad()
@pytest.mark.parametrize("what", UNUSUAL)
def test_the_extension_leaves_the_unusual_to_python(extension, what):
    site = eval_site()
    assert None not in quick(extension, *site)
    UNUSUAL[what](*site)
    both, alone = quick(extension, *site)
    assert both is None
    of_bn = {
        "momentum",
        "no counter",
        "not tracked",
        "no statistics",
        "hook on act",
        "backward hook",
        "subclass",
        "integer eps",
    }
    assert (alone is None) == (what in of_bn)


@torch.no_grad()
def test_the_extension_leaves_unusual_calls_to_python(extension):
    conv, bn, act = eval_site()
    input = torch.randn(2, 3, 5, 7)
    for changed in [
        {"act": nn.GELU()}, {"act": torch.relu}, {"via": (nn.Dropout(),)}, {"via": [nn.Identity()]},
        {"residual": RESIDUAL[:1]}, {"residual": RESIDUAL.double()}, {"residual": 1.0},
        {"input": input[0]}, {"input": input[:0]}, {"input": input.to("meta")},
        {"input": input.numpy()}, {"input": nn.Buffer(input).as_subclass(torch.Tensor).to_sparse()},
        {"act": None, "residual": RESIDUAL},
    ]:  # fmt: skip
        both, _ = quick(extension, conv, bn, **{"act": act} | changed)
        assert both is None, changed
    with torch.device("cpu"):
        assert quick(extension, conv, bn, act) == (None, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert quick(extension, conv, bn, act)[0] is None, "folded weights are the parameters' own"
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    assert quick(extension, conv, bn, act) == (None, None)
    handle.remove()
    assert None not in quick(extension, conv, bn, act)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [None, RESIDUAL], ids=["", "residual"])
@pytest.mark.parametrize("act", [None, nn.ReLU(), F.relu], ids=str)
@pytest.mark.parametrize("via", [(), (nn.Identity(), nn.Identity())], ids=["", "via"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_the_extension_gives_pythons_answer(
    extension, monkeypatch, training, residual, act, via, grad
):
    site = modules()[:2]
    input, output = torch.randn(2, 3, 5, 7), torch.randn(2, 4, 5, 7)
    answers = []
    for _ in range(2):
        conv, bn = copy.deepcopy(site)
        bn.train(training)
        with torch.set_grad_enabled(grad):
            ours = (sites.conv_bn_act(input, conv, bn, act, residual, via),
                    sites.bn_act(output, bn, act, residual, via))  # fmt: skip
        if grad:
            sum(t.square().mean() for t in ours).backward()
        parameters = [*conv.named_parameters("conv"), *bn.named_parameters("bn")]
        answers.append(
            dict(enumerate(ours)) | dict(bn.named_buffers())
            | {name: parameter.grad for name, parameter in parameters if grad}
        )  # fmt: skip
        monkeypatch.setattr(ops, "extension", None)
    assert answers[0].keys() == answers[1].keys()
    for name, value in answers[0].items():
        torch.testing.assert_close(value, answers[1][name], rtol=0, atol=0, msg=str(name))


@pytest.mark.parametrize("input, error", [
    (torch.randn(1, 3, 1, 1), ValueError), (torch.randn(2, 5, 5, 7), RuntimeError),
], ids=["one value", "channels"])  # fmt: skip
def test_a_refused_batch_is_not_counted(input, error):
    conv, bn, act = modules()
    conv.padding, conv.kernel_size = (0, 0), (1, 1)
    conv.weight = nn.Parameter(torch.randn(4, 3, 1, 1))
    with pytest.raises(error):
        sites.conv_bn_act(input, conv, bn, act)
    assert bn.num_batches_tracked == 0
    sites.conv_bn_act(torch.randn(2, 3, 5, 7), conv, bn, act)
    assert bn.num_batches_tracked == 1


@torch.no_grad()
def test_asking_for_eager_is_heard(extension):
    conv, bn, act = eval_site()
    with fastres.backend("eager"), Calls() as calls:
        sites.conv_bn_act(torch.randn(2, 3, 5, 7), conv, bn, act)
        sites.bn_act(RESIDUAL, bn, act)
    assert not calls.made


# --- what a site leaves behind --------------------------------------------------------------------


def test_a_recomputed_batch_is_counted_as_in_eager():
    """A checkpoint recomputes up to the last tensor that was saved, and no further."""
    results, site = [], modules()
    for call in (one_by_one, sites.conv_bn_act):
        conv, bn, act = copy.deepcopy(site)
        input = torch.linspace(-1, 1, 210).view(2, 3, 5, 7).requires_grad_()
        checkpoint(lambda x, call=call, site=(conv, bn, act): call(x, *site), input,
                   use_reentrant=False).sum().backward()  # fmt: skip
        results.append(dict(bn.named_buffers()))
    assert results[0]["num_batches_tracked"] == 2
    assert_like_eager(results[1], results[0])
