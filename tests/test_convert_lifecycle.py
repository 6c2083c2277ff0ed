"""A converted model is the same model: what one does with models goes on working."""

import copy
import io
import pickle
import threading

import pytest
import torch
from converting import assert_same, kinds, randomized, reasons, results, tensors
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fastres

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self, planes=8, out=8, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(planes, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if planes != out or stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(planes, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1 = nn.Sequential(Block(), Block(8, 12, 2))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        """The author's docstring."""
        x = self.layer1(self.stem(x))
        x = x.mean((2, 3))
        return self.fc(x)


FUSED = {"conv_bn_relu": 3, "conv_bn_add_relu": 2, "conv_bn": 1}
IN_EVAL = {**FUSED, "mean_linear": 1}


def images() -> torch.Tensor:
    return torch.randn(4, 3, 12, 12, dtype=torch.float64)


@pytest.fixture
def model() -> nn.Module:
    return randomized(Net()).double()


@pytest.fixture
def converted(model) -> nn.Module:
    converted = fastres.convert(model, inplace=False)
    assert kinds(converted) == FUSED
    return converted


def assert_agree(converted: nn.Module, model: nn.Module) -> None:
    x = images()
    for training in (True, False):
        assert_same(results(converted, [x], training), results(model, [x], training))


# --- convert, revert, summary --------------------------------------------------------------------


def test_it_is_the_very_same_model(model):
    before = dict(model.named_modules())
    parameters, state = dict(model.named_parameters()), model.state_dict()
    classes = {name: type(module) for name, module in before.items()}
    text = str(model)
    assert fastres.convert(model) is model
    assert dict(model.named_modules()) == before
    assert all(isinstance(before[name], cls) for name, cls in classes.items())
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert model.state_dict().keys() == state.keys()
    assert str(model) == text
    assert model.forward.__doc__ == "The author's docstring."
    assert fastres.revert(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert not any(key.startswith("_fastres") for m in model.modules() for key in m.__dict__)


def test_not_in_place(model):
    converted = fastres.convert(model, inplace=False)
    assert converted is not model and type(model) is Net and kinds(model) == {}
    assert_agree(converted, model)


def test_revert_gives_the_authors_forward_back(model, converted):
    fastres.revert(converted)
    assert kinds(converted) == {}
    x = images()
    assert torch.equal(converted.eval()(x), model.eval()(x))
    fastres.revert(converted)
    assert kinds(fastres.convert(converted)) == IN_EVAL


def test_converting_twice_takes_in_what_is_new(converted):
    forward = converted._fastres_plan.run_train
    fastres.convert(converted)
    assert kinds(converted) == FUSED and type(converted).__mro__.count(Net) == 1
    converted.extra = Block(12, 12).double()
    fastres.convert(converted)
    assert kinds(converted.extra) == {"conv_bn_relu": 1, "conv_bn_add_relu": 1}
    assert forward is not None


@pytest.mark.parametrize("function", [fastres.convert, fastres.revert, fastres.summary])
@pytest.mark.parametrize("wrong", [5, None, Net, [nn.ReLU()]], ids=str)
def test_no_module(function, wrong):
    name = type(wrong).__name__
    with pytest.raises(TypeError, match=f"^model: expected a torch.nn.Module, got {name}$"):
        function(wrong)


def test_summary_is_data_and_a_table(model, converted):
    rows = fastres.summary(converted)
    assert len(rows) == 6 and rows.fused == list(rows) and rows.left_alone == []
    assert (rows[1].path, rows[1].kind) == ("layer1.0", "conv_bn_relu")
    assert rows[1].modules == ("layer1.0.conv1", "layer1.0.bn1", "layer1.0.relu")
    assert {row.served_by for row in rows} == {"cpu"}
    table = str(rows)
    assert "layer1.1.downsample" in table and table.endswith("6 fused, 0 left alone")
    unconverted = fastres.summary(model)
    assert [row.kind for row in unconverted] == [row.kind for row in rows]
    assert {row.reason for row in unconverted} == {"not converted"}
    with fastres.backend("eager"):
        assert {row.served_by for row in fastres.summary(converted)} == {"eager"}


def test_summary_has_each_module_once(model):
    model.lonely = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.ConvTranspose2d(3, 3, 1))
    model.unused = nn.BatchNorm1d(3)
    fastres.convert(model)
    kind = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.ReLU)
    expected = [name for name, module in model.named_modules() if isinstance(module, kind)]
    found = [path for row in fastres.summary(model) for path in row.modules]
    shared = ["layer1.0.relu", "layer1.1.relu"]  # each used at two places
    assert sorted(found) == sorted(expected + shared)


def test_modules_of_fastres_are_fused_as_they_are():
    model = fastres.convert(nn.Sequential(fastres.nn.BasicBlock(8, 8), nn.ReLU()))
    rows = fastres.summary(model)
    assert [row.kind for row in rows.fused] == ["BasicBlock"]
    assert type(model[0]) is fastres.nn.BasicBlock


# --- copies and files ----------------------------------------------------------------------------


def by_pickle(module):
    return pickle.loads(pickle.dumps(module))


def by_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_stay_converted(model, converted, duplicate):
    again = duplicate(converted)
    assert type(again) is type(converted) and again is not converted
    assert again._fastres_entry == converted._fastres_entry
    assert_agree(again, model)
    assert kinds(again) == IN_EVAL
    with torch.no_grad():
        again.stem[0].weight.zero_()
    assert converted.stem[0].weight.any()
    fastres.revert(again)
    assert type(again) is Net


def test_copy_of_one_module(converted):
    shallow = copy.copy(converted.layer1[0])
    assert shallow.conv1 is converted.layer1[0].conv1
    assert type(shallow) is type(converted.layer1[0])


class Reduced(Block):
    """An author's own way to pickle."""

    def __reduce__(self):
        return type(self), (), {"state": self.state_dict()}

    def __setstate__(self, state):
        self.load_state_dict(state["state"])


def test_an_authors_own_reduce(capsys):
    block = fastres.convert(randomized(Reduced()))
    again = by_pickle(block)
    x = torch.randn(2, 8, 5, 5)
    assert isinstance(again, Reduced)
    assert kinds(again) == kinds(block) == {"conv_bn_relu": 1, "conv_bn_add_relu": 1}
    assert torch.equal(again.eval()(x), block.eval()(x))


def test_state_dict_goes_both_ways(model, converted):
    other = randomized(Net()).double()
    converted.load_state_dict(other.state_dict(), strict=True)
    assert_agree(converted, copy.deepcopy(other))
    model.load_state_dict(converted.state_dict(), strict=True)
    assert_agree(converted, model)


def test_to_another_dtype_and_back(model, converted):
    for m in (model, converted):
        m.float().double()
    assert_agree(converted, model)


# --- training ------------------------------------------------------------------------------------


def test_an_optimizer_made_before(model):
    converted = copy.deepcopy(model)
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, converted)
    ]
    fastres.convert(converted)
    for _ in range(3):
        x, y = images(), torch.randint(5, (4,))
        for m, optimizer in zip((model, converted), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(m(x), y).backward()
            optimizer.step()
    assert_same(converted.state_dict(), model.state_dict())
    assert_agree(converted, model)


def test_frozen_parameters_stay_frozen(model, converted):
    for m in (model, converted):
        m.stem.requires_grad_(False)
        m.layer1[0].bn1.eval()
    x = images()
    for m in (model, converted):
        m(x).sum().backward()
    assert converted.stem[0].weight.grad is None
    assert not converted.layer1[0].bn1.training and converted.layer1[0].bn2.training
    assert_same(converted.state_dict(), model.state_dict())
    for ours, eager in zip(converted.layer1.parameters(), model.layer1.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, eager.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(model, converted, reentrant):
    def run(m):
        return lambda x: m.fc(checkpoint(m.layer1, m.stem(x), use_reentrant=reentrant).mean((2, 3)))

    x = images()
    # checkpointing runs the batch norms twice, in eager as well; without reentry it stops once it
    # has all that backward needs, which for the last batch norm is before ours counts the batch
    ours, eager = (results(m, [x], True, run(m)) for m in (converted, model))
    for found in (ours, eager):
        found.pop("layer1.1.bn2.num_batches_tracked")
    assert_same(ours, eager)


def test_autocast(model, converted):
    model, converted, x = model.float().eval(), converted.float().eval(), images().float()
    truth = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = converted(x), model(x)
    assert ours.dtype == eager.dtype == torch.bfloat16
    errors = [(y.double() - truth).abs().max().item() for y in (ours, eager)]
    assert errors[0] <= 2 * errors[1] + 0.01


def test_double_backward(model, converted):
    gradients = []
    for m in (model, converted):
        x = images()[:2].requires_grad_()
        torch.manual_seed(0)
        (first,) = torch.autograd.grad(m.train()(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
        gradients.append(m.stem[0].weight.grad)
    assert gradients[0].shape == gradients[1].shape


# --- other tools ---------------------------------------------------------------------------------


def test_parametrization_of_a_convolution(model, converted):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    for m in (model, converted):
        nn.utils.parametrize.register_parametrization(m.layer1[0].conv1, "weight", Half())
    assert_agree(converted, model)
    assert "is not nn.Conv2d" in reasons(converted)["layer1.0.conv1"]


def test_pruning_and_weight_norm(model, converted):
    for m in (model, converted):
        prune.ln_structured(m.layer1[0].conv1, "weight", amount=0.5, n=2, dim=0)
        nn.utils.parametrizations.weight_norm(m.layer1[1].conv1)
    assert_agree(converted, model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_sync_batch_norm(model, when):
    """SyncBatchNorm falls back to batch_norm on one process; it is called, never replaced."""
    eager = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    if when == "after":
        fastres.convert(model)
        ours = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        ours = fastres.convert(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    assert "SyncBatchNorm" in reasons(ours)["stem.1"]
    x = images()
    assert_same(results(ours, [x], False), results(eager, [x], False))


def _rank(rank: int, file: str, state: dict, x: torch.Tensor, queue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    models = []
    for convert in (True, False):
        model = Net().double()
        model.load_state_dict(state)
        if convert:
            fastres.convert(model)
        models.append(nn.parallel.DistributedDataParallel(model))
    for _ in range(2):
        for model in models:
            model.zero_grad()
            model(x[2 * rank : 2 * rank + 2]).square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 1e-3 * parameter.grad
    ours, eager = (model.module.state_dict() for model in models)
    worst = max((ours[name].double() - eager[name].double()).abs().max().item() for name in eager)
    queue.put((rank, worst, kinds(models[0].module)))
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(model, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    arguments = (str(tmp_path / "store"), model.state_dict(), images(), queue)
    ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    for _ in ranks:
        _, worst, found = queue.get()
        assert worst < 1e-9 and found == FUSED


def test_data_parallel_replicas_run_the_authors_forward(converted):
    replica = converted._replicate_for_data_parallel()
    assert type(replica) is Net and type(converted) is not Net


@pytest.mark.parametrize("duplicate", [lambda module: module, by_pickle])
def test_threads_share_a_model(model, converted, duplicate):
    """Also one fresh from a file, which makes its plans at the first call."""
    x = images()
    expected, found = model.eval()(x), []
    converted = duplicate(converted.eval())
    other = duplicate(model)  # another model is busy meanwhile
    threads = [
        threading.Thread(target=lambda m=m: found.append(m(x))) for m in (converted, other) * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for output in found:
        torch.testing.assert_close(output, expected)


def test_an_attribute_that_no_forward_reads_costs_nothing(converted):
    plan = converted._fastres_plan
    converted.epoch = 3
    converted.train().eval()
    converted.fc.weight = nn.Parameter(converted.fc.weight.detach())
    assert converted._fastres_plan is plan
    converted.fc = nn.Linear(12, 2).double()
    assert converted._fastres_plan is None
    assert converted(images()).shape == (4, 2)
    assert converted._fastres_plan is not plan


# --- memory format -------------------------------------------------------------------------------


def test_inside_it_is_channels_last(converted):
    converted = converted.float().eval()
    seen = []
    run = type(converted.layer1[0]).forward

    def spy(self, x):
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return run(self, x)

    x = images().float()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(converted.layer1[0]), "forward", spy)
        converted(x)
        converted(x.contiguous(memory_format=torch.channels_last))
        with fastres.backend("eager"):
            converted(x)
    assert seen[:4] == [True] * 4 and seen[4:] == [False] * 2


def test_results_come_in_the_callers_format():
    model = fastres.convert(nn.Sequential(Block(8, 12, 2), Block(12, 12))).eval()
    x = torch.randn(2, 8, 9, 9)
    last = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert model(x).is_contiguous()
        assert model(last).is_contiguous(memory_format=torch.channels_last)
    assert all(tensor.is_contiguous() for tensor in tensors(model(x)))
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad.is_contiguous()


def test_lazy_modules_are_fused_once_they_have_seen_an_input():
    model = nn.Sequential(nn.LazyConv2d(8, 3, padding=1), nn.LazyBatchNorm2d(), nn.ReLU())
    found = reasons(fastres.convert(model))
    for name, kind in (("0", "LazyConv2d"), ("1", "LazyBatchNorm2d")):
        assert found[name] == f"{kind} had seen no input: call the model once, then convert it"
    model(images().float())
    assert kinds(fastres.convert(model)) == {"conv_bn_relu": 1}
