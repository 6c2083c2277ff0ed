"""Sites of timm's batch norms, which have an activation inside, as the extension serves them."""

import copy

import pytest
import torch
from test_sites import RESIDUAL, modules, one_by_one
from torch import nn

from fastres import sites


def timms(**options):
    """A convolution and timm's batch norm with statistics."""
    layers = pytest.importorskip("timm.layers")
    conv, plain, _ = modules()
    bn = layers.BatchNormAct2d(4, **options)
    bn.load_state_dict(plain.state_dict(), strict=False)
    return conv, bn.eval()


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", [nn.ReLU, None, nn.SiLU], ids=str)
def test_the_extension_serves_timms_batch_norm(extension, act, training):
    """With its ReLU, without an activation; another one is called behind, which only a convolution's
    site does."""
    conv, bn = timms(act_layer=act or nn.ReLU, apply_act=act is not None)
    x, map_ = torch.randn(2, 3, 5, 7), torch.randn(2, 4, 5, 7)
    twins = [copy.deepcopy(bn).train(training) for _ in range(4)]
    both = extension.conv_bn_act(x, conv, twins[0], None, None, ())
    torch.testing.assert_close(both, twins[1](conv(x)), rtol=1e-4, atol=1e-4)
    alone = extension.bn_act(map_, twins[2], None, None, ())
    assert (alone is None) == (act is nn.SiLU)
    if alone is not None:
        torch.testing.assert_close(alone, twins[3](map_), rtol=1e-4, atol=1e-4)
    for twin in twins[: 2 if alone is None else 4]:
        assert twin.num_batches_tracked == bn.num_batches_tracked + training


@torch.no_grad()
def test_the_extension_leaves_to_python_what_comes_behind_timms_batch_norm(extension):
    """An addition behind its ReLU, anything behind an activation that is called."""
    x, relu = torch.randn(2, 3, 5, 7), nn.ReLU()
    for layer, more in [(nn.ReLU, (relu, RESIDUAL, ())), (nn.SiLU, (relu, None, ())),
                        (nn.SiLU, (None, None, (nn.Identity(),)))]:  # fmt: skip
        conv, bn = timms(act_layer=layer)
        assert extension.conv_bn_act(x, conv, bn, *more) is None
        expected = one_by_one(x, conv, bn, *more)
        found = sites.conv_bn_act(x, conv, bn, *more)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_is_watched_inside_timms_batch_norm_is_called(extension):
    seen = []
    conv, bn = timms(drop_layer=nn.Dropout)
    for module in (bn.drop, bn.act):
        module.register_forward_hook(lambda module, *_: seen.append(type(module)))
    x = torch.randn(2, 3, 5, 7)
    found = extension.conv_bn_act(x, conv, bn, None, None, ())
    assert seen == [nn.Dropout, nn.ReLU]
    torch.testing.assert_close(found, bn(conv(x)), rtol=1e-4, atol=1e-4)
    bn.act.forward = None  # what it raises is the caller's to see
    with pytest.raises(TypeError, match="NoneType"):
        extension.conv_bn_act(x, conv, bn, None, None, ())
