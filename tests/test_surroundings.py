"""What stands around a model, seen from one process."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import nusam
from nusam.distributed import data_parallel
from nusam.distributed.data_parallel import DataParallel
from nusam.distributed.surroundings import Holders, has_replicas


@pytest.fixture
def process_group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def replicated(module, devices):
    """As on a machine with that many."""
    wrapper = nn.DataParallel(module)
    wrapper.device_ids = list(range(devices))
    return wrapper


def test_replicas_are_seen_wherever_they_are_wrapped(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4)))
    assert not has_replicas(model)
    around = replicated(model, 2)
    assert has_replicas(model)
    assert has_replicas(around)
    assert has_replicas(nn.Sequential(around))
    del around
    part = replicated(model[1], 2)
    assert has_replicas(model)  # the loop calls the wrapper of a part
    del part
    assert not has_replicas(model)
    model[1] = replicated(model[1], 2)
    assert has_replicas(model)


def test_one_device_makes_no_replicas():
    for devices in (0, 1):
        model = nn.Linear(3, 4)
        assert not has_replicas(replicated(model, devices))


def test_a_single_process_walks_no_modules(monkeypatch):
    monkeypatch.setattr(data_parallel, "_wrappers", lambda model: pytest.fail("the modules were walked"))
    workers = DataParallel(nn.Linear(3, 4))
    assert not any([workers.replicates, workers.shards, workers.splits_the_batch, workers.must_reduce])


def test_wrappers_are_found_where_they_stand_now(process_group):
    inner = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    shared = nn.ModuleList([inner, inner])
    assert not DataParallel(shared).replicates
    shared.append(DistributedDataParallel(nn.Linear(2, 2)))
    assert DataParallel(shared).replicates
    assert not DataParallel(shared).shards
    fully_shard(inner[0])  # changes the class of a module in place
    workers = DataParallel(shared)
    assert workers.shards
    assert len(workers._fsdp) == 1
    assert workers.stored(inner[1].weight) is inner[1].weight


def test_an_optimizer_that_looked_around_is_copied_and_pickled(process_group):
    model = DistributedDataParallel(nn.Linear(3, 4))
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model.module)
    assert opt._holders.of(list(model.parameters()), stages=True, replicas=True) == [model]
    assert copy.deepcopy(opt)._holders._found == []
    holders = Holders()
    holders.of(list(model.parameters()), stages=False, replicas=True)
    assert pickle.loads(pickle.dumps(holders))._found == []


def test_holders_are_let_go_of_and_looked_for_again(process_group):
    model = nn.Linear(3, 4)
    parameters = list(model.parameters())
    wrapper = DistributedDataParallel(model)
    DistributedDataParallel(nn.Linear(3, 4))  # somebody else's
    holders = Holders()
    assert holders.of(parameters, stages=False, replicas=False) == []
    assert holders.of(parameters, stages=False, replicas=True) == [wrapper]
    del wrapper
    assert holders.of(parameters, stages=False, replicas=True) == []
    again = DistributedDataParallel(model)
    assert holders.of(parameters, stages=False, replicas=True) == []
    holders.forget()
    assert holders.of(parameters, stages=False, replicas=True) == [again]
