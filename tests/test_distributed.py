"""Two processes over gloo: DistributedDataParallel, and SyncBatchNorm around our sites."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastres
from fastres.nn import AddReLU, BasicBlock, BNReLU, ConvBNReLU

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)
RANKS = 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block = ConvBNReLU(3, 8), BasicBlock(8, 8)
        self.bn, self.add = BNReLU(8), AddReLU()
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.block(self.stem(x))
        return self.head(self.add(self.bn(x), x).mean((2, 3)))


def frozen(net):
    """Statistics as constants: then two half batches are one batch exactly."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


def make(seed=0):
    torch.manual_seed(seed)
    return Net().double()


def batch():
    return torch.randn(4, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def steps(net, images, count=3):
    """Parameters, buffers and gradients after a few SGD steps."""
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(count):
        sgd.zero_grad()
        net(images).square().mean().backward()
        sgd.step()
    net = getattr(net, "module", net)
    gradients = {f"grad of {name}": p.grad for name, p in net.named_parameters()}
    return {k: v.clone() for k, v in (net.state_dict() | gradients).items()}


class EagerSyncBatchNorm(nn.BatchNorm2d):
    """What nn.SyncBatchNorm computes in training; that one refuses CPU tensors and so does DDP."""

    def forward(self, input):
        sums = torch.cat([input.sum((0, 2, 3)), input.square().sum((0, 2, 3))])
        sums = torch.distributed.nn.functional.all_reduce(sums) / dist.get_world_size()
        mean, square = (sums / (input.numel() / input.shape[1])).chunk(2)
        scale = (square - mean.square() + self.eps).rsqrt() * self.weight
        shift = self.bias - mean * scale
        return input * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def synchronised(net):
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = EagerSyncBatchNorm
    return net


def run_rank(rank, folder):
    """Everything one of the two processes does; what it got goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    mine = batch()[rank * 2 : rank * 2 + 2]
    results = {}
    for backend in ("auto", "eager"):
        with fastres.backend(backend):
            results[f"train {backend}"] = steps(DistributedDataParallel(make(rank)), mine)
    results["frozen"] = steps(DistributedDataParallel(frozen(make(rank))), mine)
    results["frozen static"] = steps(
        DistributedDataParallel(frozen(make(rank)), static_graph=True, bucket_cap_mb=1), mine
    )
    results["sync"] = steps(DistributedDataParallel(synchronised(make(rank))), mine)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def start_rank(rank, folder):
    """Beside the extension's absence the operators' fallbacks serve, as in conftest.py."""
    import conftest

    names = [name for name in conftest.OPERATORS if not fastres.ops.has_kernel(name, "cpu")]
    conftest.backend_module._COMPILED |= {("cpu", name) for name in names}
    run_rank(rank, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(start_rank, (folder,), nprocs=RANKS)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(RANKS)]


def assert_equal(one, other, skip=()):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if not any(part in name for part in skip):
            torch.testing.assert_close(
                value, other[name], rtol=1e-9, atol=1e-11,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip


def test_data_parallel_training_is_eagers(ranks):
    for results in ranks:
        assert_equal(results["train auto"], results["train eager"])


def test_both_ranks_hold_the_same_model(ranks):
    for kind in ranks[0]:
        # running statistics are each rank's own until the next forward sends rank 0's
        assert_equal(ranks[0][kind], ranks[1][kind], skip=("running", "batches"))


@pytest.mark.parametrize("kind", ["frozen", "frozen static"])
def test_two_half_batches_are_one_batch(ranks, kind):
    """With the statistics frozen nothing else differs from a single process."""
    with fastres.backend("eager"):
        assert_equal(ranks[0][kind], steps(frozen(make()), batch()))


def test_synchronised_statistics_are_those_of_one_batch(ranks):
    """The sites call the other class; the result is plain batch norm on all images."""
    with fastres.backend("eager"):
        alone = steps(make(), batch())
    assert_equal(ranks[0]["sync"], alone, skip=("running", "batches"))


def test_a_converted_copy_of_a_wrapped_model_keeps_its_class():
    net = make()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    assert {type(m) for m in converted.modules()} - {type(m) for m in net.modules()} == {
        nn.SyncBatchNorm
    }
