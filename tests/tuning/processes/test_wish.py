"""What devices a run asks for whose processes share the examples, and how much of them."""

import pytest

from chat.checkpoints import memory
from portal.devices import inventory
from portal.devices.declared import Declared
from portal.runs.heartbeat import RunFailed
from tuning.plan import create_run
from tuning.work import TuningWork

SHAPE = {
    "parameters": 1_000_000, "layers": 4, "hidden_size": 64, "kv_heads": 4, "head_dim": 16,
    "vocabulary": 1000,
}  # fmt: skip


@pytest.fixture
def wished(admin_user, make_dataset, checkpoint, settings):
    settings.DEVICE = ""
    checkpoint.description |= SHAPE
    checkpoint.save()
    dataset = make_dataset(admin_user)

    def of(declared, **hyper):
        settings.DEVICES = tuple(Declared(name, 1 << 30) for name in declared)
        run = create_run(admin_user, dataset=dataset, checkpoint=checkpoint, **hyper)
        return TuningWork(run.pk, lambda line: None).wish()

    return of


def test_several_processes_take_the_first_cards_together(wished, monkeypatch):
    monkeypatch.setattr(inventory, "_cards", lambda: None)  # what is declared is believed
    cards = ["cuda:0", "cuda:1", "cuda:2"]
    one, two = wished(cards), wished(cards, devices=2)
    assert (one.names, one.together) == (tuple(cards), False)
    assert (two.names, two.together) == (("cuda:0", "cuda:1"), True)
    assert (two.bytes, two.least) == (2 * one.bytes, 2 * one.least)
    with pytest.raises(RunFailed) as refused:
        wished(["cuda:0", "cuda:2"], devices=2)
    assert refused.value.code == "too_few_devices"


def test_processes_on_processors_share_one_device(wished):
    two = wished(["cpu"], devices=2)
    assert (two.names, two.together) == (("cpu",), False)


def test_weights_that_learn_are_counted(wished):
    prefix, lora, full = (
        wished(["cpu"], **hyper)
        for hyper in ({"pre_seq_len": 1}, {"method": "lora"}, {"method": "full"})
    )
    assert lora.bytes > lora.least > prefix.least, "the proof loads what was made beside the base"
    assert full.bytes == full.least == memory.full(SHAPE, "float32").bytes
