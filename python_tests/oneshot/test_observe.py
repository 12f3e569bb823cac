"""observe: hooks see the same inputs whether the model goes to the device whole or by blocks."""

from types import SimpleNamespace

import pytest
import torch

import sparsekern as sk
from python_tests.oneshot.test_rotation import build, ids
from sparsekern.oneshot import extra
from sparsekern.oneshot import observe as observe_module
from sparsekern.oneshot.calibration import make_batches
from sparsekern.oneshot.devices import lodged
from sparsekern.oneshot.observe import observe
from sparsekern.oneshot.permutation import added_up, find_sites, input_energies, observed

CPU = torch.device("cpu")


def seen(model, batches, **options):
    """Sums of the inputs of every linear layer, by name."""
    sums, hooks = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def hook(module, args, name=name):
                sums[name] = sums.get(name, 0) + args[0].double().sum(dim=(0, 1))

            hooks[module] = hook
    observe(model, batches, CPU, hooks, **options)
    assert not any(module._forward_pre_hooks for module in hooks)
    return sums


def test_block_by_block_as_in_one_pass(monkeypatch):
    model = build()
    batches = make_batches(ids(6), model, 2, CPU)
    whole = seen(model, batches)
    # As if it were elsewhere than the device, which the CPU is here.
    monkeypatch.setattr(observe_module, "home_of", lambda model: torch.device("meta"))
    probe, walk = observe_module.probe, observe_module.Walk
    monkeypatch.setattr(observe_module, "probe", lambda *given: probe(*given[:-1], CPU))
    monkeypatch.setattr(observe_module, "Walk", lambda *given: walk(*given[:5], CPU, None))
    apart = seen(model, batches, whole_bytes=0)
    assert set(apart) == {name for name in whole if ".layers." in name}
    assert all(torch.equal(apart[name], whole[name]) for name in apart)


def test_energies_are_sums_of_squares():
    model = build()
    batches = make_batches(ids(4), model, 2, CPU)
    sites, sums = find_sites(model), {}

    def hook_of(name):
        def hook(module, args):
            sums[name] = sums.get(name, 0) + args[0].double().square().sum(dim=(0, 1))

        return hook

    observe(model, batches, CPU, {site.reader: hook_of(site.name) for site in sites})
    energies = input_energies(model, batches, CPU).sums
    assert set(energies) == {site.name for site in sites}
    for name, energy in energies.items():
        torch.testing.assert_close(energy, sums[name], rtol=1e-6, atol=0)


def test_energies_of_several_processes_are_those_of_one_bit_for_bit():
    model = build()
    batches = make_batches(ids(5), model, 1, CPU)
    whole = input_energies(model, batches, CPU).sums
    for world in (2, 3, 7):  # 7: some have no batch
        parts = [observed(model, batches[rank::world], CPU) for rank in range(world)]
        together = added_up(model, parts)
        assert all(torch.equal(together[name], energy) for name, energy in whole.items())
    with pytest.raises(ValueError, match="calibration that reaches every layer"):
        added_up(model, [{}, {}])


def test_what_one_process_raises_while_it_observes_all_raise():
    model = build()
    batches = make_batches(ids(4), model, 2, CPU)
    ranks = SimpleNamespace(rank=0, world=2)
    ranks.in_turn = lambda own, count: iter([own, RuntimeError("no memory there")])
    with pytest.raises(RuntimeError, match="no memory there"):
        extra._observed_together(model, batches, CPU, True, ranks)
    sent = []
    ranks.in_turn = lambda own, count: iter([sent.append(own) or own] * count)
    model.model.layers[0].forward = failing
    with pytest.raises(RuntimeError, match="no luck"):
        extra._observed_together(model, batches, CPU, True, ranks)
    assert isinstance(sent[0], RuntimeError)  # the others were told


def test_blocks_are_lodged_elsewhere_for_a_look_and_get_back_what_they_had():
    """On another name of the CPU."""
    model, x, there = build(), ids(2), torch.device("cpu", 0)
    model.model.layers[0].register_buffer("own", torch.ones(2))
    with torch.no_grad():
        expected = model(x).logits
    tensors = [*model.parameters(), *model.buffers()]
    before = [(id(t), t.data_ptr()) for t in tensors]
    first, last = model.model.layers[0], model.model.layers[-1]
    with torch.no_grad(), lodged(list(model.model.layers), there):
        assert torch.equal(model(x).logits, expected)
        first.forward = failing  # a stub is left alone
        with pytest.raises(RuntimeError, match="no luck"):
            model(x)
        del first.forward
        with pytest.raises(RuntimeError, match="no luck"):
            last.mlp.register_forward_hook(failing)
            model(x)
    assert [(id(t), t.data_ptr()) for t in [*model.parameters(), *model.buffers()]] == before
    assert not first._forward_pre_hooks and not last._forward_hooks


def test_a_sparse_layer_visits_with_its_layout():
    model = build()
    sk.prune_model(model, "magnitude", progress=False)
    state = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    x = ids(2)
    with torch.no_grad():
        expected = model(x).logits
        with lodged(list(model.model.layers), torch.device("cpu", 0)):
            assert torch.equal(model(x).logits, expected)
        assert torch.equal(model(x).logits, expected)
    assert state.keys() == {k for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    assert {p.device for p in model.parameters()} == {CPU}


def failing(*_, **__):
    raise RuntimeError("no luck")


@pytest.mark.gpu
def test_blocks_of_a_model_on_the_host_look_at_a_gpu():
    model, x = build(), ids(2)
    for dense in (True, False):
        before = {name: p.data_ptr() for name, p in model.named_parameters()}
        with torch.no_grad():
            expected = model(x).logits
            with lodged(list(model.model.layers), torch.device("cuda")):
                got = model(x).logits
            again = model(x).logits
        assert not got.is_cuda and float((got - expected).abs().max()) < 1e-2
        assert torch.equal(again, expected)
        after = {name: p.data_ptr() for name, p in model.named_parameters()}
        assert before == after or not dense
        if dense:
            sk.prune_model(model, "magnitude", device="cpu", progress=False)
