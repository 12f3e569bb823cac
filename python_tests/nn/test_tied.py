"""Which weights share memory, and what each entry point does with them."""

import operator

import pytest
import torch
from torch import nn

import sparsekern as sk
from python_tests.finetune.small import adamw, masks_of, network, train
from python_tests.oneshot.test_rotation import build, ids
from sparsekern.asp import ASP
from sparsekern.finetune import SRSTE, Masked, RigL, sparse_training
from sparsekern.nn.tied import tied_outside, tied_places

X = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(0))


def chain():
    """Five Linears of 32 features, of which each test ties some."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(5)))


def tied():
    """Layers 0 and 2 share a Parameter."""
    model = chain()
    model[2].weight = model[0].weight
    return model


class Head(nn.Module):
    """An embedding, a layer, and a head that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(64, 32)
        self.layer = nn.Linear(32, 64)
        self.back = nn.Linear(64, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.back(self.layer(self.table(ids))))


def names(model):
    """name -> sorted names of the others that it shares with."""
    own = {id(module): name for name, module in model.named_modules()}
    found = tied_places(model).items()
    return {f"{own[id_]}.{key}": sorted(one.name for one in them) for (id_, key), them in found}


def is_24(weight):
    return bool((weight.detach().reshape(-1, 4) != 0).sum(1).max() <= 2)


def zeroed(model):
    with torch.no_grad():
        for parameter in set(model.parameters()):
            if parameter.dim() == 2:
                parameter.mul_(sk.prune.magnitude_mask(parameter))
    return model


def test_sharing_is_of_elements_not_of_objects():
    model, data = chain(), torch.randn(64, 64)
    assert names(model) == {}
    for layer, view in zip(model, (data[:32, :32], data[:32, 32:], data[32:, 32:])):
        layer.weight = nn.Parameter(view)
    assert names(model) == {}  # blocks of one matrix: interleaved in memory, disjoint
    model[3].weight = nn.Parameter(data[:32, :32].t())
    model[4].weight = nn.Parameter(data[8:40, 16:48])
    assert names(model) == {
        "0.weight": ["3.weight", "4.weight"],
        "1.weight": ["4.weight"],
        "2.weight": ["4.weight"],
        "3.weight": ["0.weight", "4.weight"],
        "4.weight": ["0.weight", "1.weight", "2.weight", "3.weight"],
    }
    with torch.device("meta"):
        assert names(tied()) == {"0.weight": ["2.weight"], "2.weight": ["0.weight"]}


def test_a_module_used_twice_is_no_tie_and_a_buffer_is_one():
    model = chain()
    model[1] = model[0]
    assert names(model) == {}
    model[2].register_buffer("copy", model[3].weight.detach())
    assert names(model) == {"2.copy": ["3.weight"], "3.weight": ["2.copy"]}
    for layer in model[:2]:
        layer.register_buffer("graph", torch.eye(4).to_sparse())
    model[2].register_buffer("graph", model[0].graph)
    assert names(model)["2.graph"] == ["0.graph"]


def test_what_is_chosen_under_all_its_names_is_one():
    model = tied()
    places = [(model[0], "weight"), (model[2], "weight")]
    assert tied_outside(model, places) == {}
    assert list(tied_outside(model, places[:1]).values()) == ["2.weight"]
    turned = nn.Sequential(nn.Linear(32, 32), type("Conv1D", (nn.Linear,), {"nf": 32})(32, 32))
    turned[1].weight = turned[0].weight  # along another dimension
    assert len(tied_outside(turned, [(layer, "weight") for layer in turned])) == 2
    model[2].weight = nn.Parameter(model[0].weight.detach().t())  # not one Parameter
    assert sorted(tied_outside(model, places).values()) == ["0.weight", "2.weight"]


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_prune_model_leaves_shared_weights_dense_and_says_why(method, compress):
    model, view = tied(), chain()
    view[4].weight = nn.Parameter(view[1].weight.detach()[:16])
    for net, pair in ((model, {"0", "2"}), (view, {"1", "4"})):
        before = {name: net.get_submodule(name).weight.detach().clone() for name in pair}
        data = None if method == "magnitude" else X
        report = sk.prune_model(net, method, data, compress=compress, progress=False)
        reasons = {row.name: row.reason for row in report.layers if row.reason}
        assert reasons.keys() == pair and all("weight tied to" in r for r in reasons.values())
        for name, weight in before.items():
            assert torch.equal(net.get_submodule(name).weight, weight)
    assert model[0].weight is model[2].weight


def test_compress_model_keeps_the_tie():
    model = zeroed(tied())
    report = sk.compress_model(model)
    reasons = [row.reason for row in report.layers if row.reason]
    assert reasons == ["weight tied to 2.weight", "weight tied to 0.weight"]
    assert model[0].weight is model[2].weight and type(model[1]) is sk.SparseLinear


def start(model, **options):
    ASP.init_model_for_pruning(model, verbosity=0, allow_permutation=False, **options)
    ASP.compute_sparse_masks(model)


def test_asp_leaves_a_head_that_is_its_embedding_dense():
    model = Head()
    with pytest.warns(
        UserWarning,
        match=r"1 shared with what is not pruned as one with it: head.weight = table.weight",
    ):
        start(model)
    assert is_24(model.layer.weight) and not is_24(model.head.weight)
    with pytest.raises(ValueError, match="none in Head .1 shared"):
        start(Head(), allowed_layer_names=["head"])
    model = tied()
    with pytest.warns(UserWarning, match=r"0.weight = 2.weight"):
        start(model, disallowed_layer_names=["2"])
    assert not is_24(model[2].weight) and is_24(model[1].weight)


def test_asp_prunes_both_when_both_are_named(recwarn):
    model = Head()
    start(model, custom_layer_dict={nn.Embedding: ["weight"]})
    assert is_24(model.table.weight) and model.head.weight is model.table.weight
    assert not list(recwarn)
    reasons = ASP.masked(model).compress()
    assert reasons["head.weight"] == "weight tied to table.weight"
    assert model.head.weight is model.table.weight


def test_asp_computes_one_mask_for_tied_layers(recwarn):
    model = tied()
    calls = []

    def any_mask(weight):
        calls.append(weight)
        return sk.prune.magnitude_mask(torch.randn(weight.shape))

    start(model, mask_calculator=any_mask, allow_recompute_mask=True)
    assert len(calls) == 4 and is_24(model[0].weight) and not list(recwarn)
    buffers = [model[i]._buffers["__weight_mma_mask"] for i in (0, 2)]
    assert torch.equal(*buffers) and ASP.is_sparsity_enabled(model)
    ASP.restore_pruned_weights(model)
    assert torch.equal(model[0].weight, tied()[0].weight)


def test_masked_takes_a_weight_under_all_its_names_or_not_at_all():
    mask = sk.prune.magnitude_mask(Head().head.weight)
    for own in ("head", "head.weight", "table", "table.weight"):
        with pytest.raises(
            ValueError, match="weight of its own, got tied to .*one mask under each"
        ):
            Masked(Head(), {own: mask})
    with pytest.raises(ValueError, match="one mask for head and table"):
        Masked(Head(), {"head": mask, "table": mask.roll(1, 0)})
    with pytest.raises(ValueError, match="weight of its own"):
        Masked(zeroed(Head()))
    model = Head()
    masked = Masked(model, {"head": mask, "table": mask})
    assert len(masked) == 1 and masked.masks.keys() == {"head", "table"}
    assert model.head.weight is model.table.weight and is_24(model.table.weight)
    Masked(Head(), masked.masks).load_state_dict(masked.state_dict())
    with pytest.raises(ValueError, match="one mask for"):
        masked.enable({"head": mask, "table": mask.roll(1, 0)})
    masked.enable({"table": mask.roll(1, 0)})
    assert torch.equal(masked.masks["head"], mask.roll(1, 0))
    assert masked.compress() == {"head": "weight tied to table.weight"}


def test_masked_sees_a_tie_inside_a_compiled_layer():
    model = tied()
    mask = sk.prune.magnitude_mask(model[0].weight)
    model[0] = torch.compile(model[0], backend="eager")
    with pytest.raises(ValueError, match="0 to have a weight of its own"):
        Masked(model, {"0": mask})


class Twice(nn.Module):
    """A layer that is called twice, or two layers with one Parameter."""

    def __init__(self, tied):
        super().__init__()
        net = network()
        self.first, self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 32), net.down
        torch.manual_seed(1)
        for layer in (self.first, self.up):
            nn.init.normal_(layer.weight, std=0.2)
            nn.init.zeros_(layer.bias)
        self.twin = self.up
        if tied:
            self.twin = nn.Linear(32, 32)
            self.twin.weight, self.twin.bias = self.up.weight, self.up.bias

    def forward(self, x):
        return self.down(self.twin(torch.relu(self.up(self.first(x)))))


@pytest.mark.parametrize("schedule", [None, SRSTE(weight_decay=0.1), RigL(every=1, freeze_at=4)])
def test_tied_layers_train_as_one_layer_that_is_called_twice(schedule):
    found = []
    for tie in (False, True):
        model = Twice(tie)
        masked = Masked(model, masks_of(model), schedule=schedule)
        train(model, masked.attach(adamw(model)), 6)
        assert masked.check() == 0
        found.append(model)
    assert found[1].up.weight is found[1].twin.weight
    assert torch.equal(found[0].up.weight, found[1].up.weight)


def test_sparse_training_says_what_it_leaves_and_refuses_to_untie():
    model = tied()
    with pytest.warns(UserWarning, match=r"0 \(weight tied to 2.weight\), 2 \("):
        assert sparse_training(model) == ["1", "3", "4"]
    mask = sk.finetune.transposable_mask(model[0].weight.detach().abs())
    with pytest.raises(
        ValueError, match="0 to have a weight of its own, got weight tied to 2.weight"
    ):
        sparse_training(tied(), {"0": mask})


@pytest.mark.parametrize("layer", ["mlp.up_proj", "self_attn.v_proj"])
def test_what_folds_into_weights_refuses_shared_ones(layer):
    """Two blocks that share a layer would be permuted, and rotated, twice."""
    model = build()
    first, second = (model.get_submodule(f"model.layers.{i}.{layer}") for i in (0, 1))
    second.weight = first.weight
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = rf"own weights, got model.layers.[01].{layer}.weight that is also model.layers.[01]"
    for fold in (sk.permute, sk.rotate):
        with pytest.raises(ValueError, match=text):
            fold(model, ids())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("norm", ["parametrizations.weight_norm", "weight_norm"])
def test_a_computed_weight_is_no_weight_to_train(norm):
    """weight_norm makes the weight in every forward: there is no Parameter to mask or replace."""
    model, mask = chain(), sk.finetune.transposable_mask(torch.randn(32, 32).abs())
    operator.attrgetter(norm)(torch.nn.utils)(model[0])
    with pytest.raises(ValueError, match="0 to have a weight of its own, got weight is "):
        sparse_training(model, {"0": mask})
    with pytest.raises(TypeError, match="alone, got weight is "):
        sk.finetune.SparseTrainingLinear.from_linear(model[0], mask)
    with pytest.raises(ValueError, match="mask '0' .*got a weight that its module computes"):
        Masked(model, {"0": mask})
    with pytest.warns(UserWarning, match=r"left dense: 0 \(weight is "):
        assert sparse_training(model) == ["1", "2", "3", "4"]


def test_masked_finds_a_module_by_each_of_its_names():
    model = chain()
    model[1] = model[0]
    mask = sk.prune.magnitude_mask(model[0].weight)
    assert len(Masked(model, {"1": mask})) == len(Masked(model, {"0": mask, "1": mask})) == 1
    assert len(Masked(model)) == 1


def test_sparse_training_keeps_a_shared_bias():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].bias = model[0].bias
    with pytest.warns(UserWarning, match=r"0 \(bias tied to 2.bias\)"):
        assert sparse_training(model) == ["1"]
    assert model[2].bias is model[0].bias


def test_sparse_training_leaves_what_it_cannot_train():
    model = chain()
    model[0].weight = nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)
    model[1].to("meta")
    model[2].weight.requires_grad_(False)
    text = r"0 \(weight is of torch.int8\), 1 \(weight is on meta\)"
    with pytest.warns(UserWarning, match=text):
        assert sparse_training(model) == ["2", "3", "4"]
    assert not model[2].values.requires_grad and model[3].values.requires_grad


@pytest.mark.parametrize("norm", ["weight_norm", "parametrizations.weight_norm"])
def test_from_linear_takes_the_weight_as_the_next_forward_would(norm):
    layer = nn.Linear(32, 32, bias=False)
    operator.attrgetter(norm)(torch.nn.utils)(layer)
    with torch.no_grad():
        next(p for p in layer.parameters() if p.shape == (32, 1)).mul_(3)
    mask = sk.prune.magnitude_mask(layer.weight.detach())
    made = sk.SparseLinear.from_linear(layer, mask).weight.to_dense()
    assert torch.allclose(made, layer(torch.eye(32)).detach().t() * mask, atol=1e-6)
