"""Training through levels: held-out errors fall below the quantiser's, masks hold, the result is
levels and scales, a resumed run is equal."""

import functools

import pytest
import torch

import sparsekern as sk
from python_tests.oneshot.driver_models import build, run_prune
from python_tests.oneshot.test_reconstruct import texts
from sparsekern.formats import dtypes, scaled
from sparsekern.oneshot.levels import Levels, Trained

BLOCK = dict(span=1, epochs=4, lr=4e-4)
SPAN = dict(span=None, epochs=2, lr=4e-4)
KINDS = ("int4", "int8", "fp8")


def pruned(rounds, quantize, ids=None, model=None, **options):
    model = build(layers=3) if model is None else model
    options = {"batch_size": 2, "reconstruct": rounds, "quantize": quantize, **options}
    return model, run_prune(model, "sparsegpt", texts(60) if ids is None else ids, **options)


@functools.cache
def sixteen_bits():
    """The model of BLOCK alone; not to be changed."""
    return pruned(BLOCK, None)[0]


def weights(model):
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, sk.SparseLinear)}


@pytest.mark.parametrize("name", KINDS)
def test_the_error_is_below_the_quantisers_and_the_result_is_levels(name):
    plain = sixteen_bits()
    model, report = pruned(BLOCK, name)
    first, again = report.reconstruction[:2]
    assert first["blocks"] == again["blocks"] == [0] and len(report.reconstruction) == 6
    assert all(fit["after"] <= fit["before"] for fit in report.reconstruction)
    assert again["kept"] and again["after"] < again["before"]
    for key, w24 in weights(model).items():
        sk.verify(w24)
        assert w24.spec.element is dtypes.element(name)
        if ".0." in key:  # blocks after it see other inputs, and choose other masks
            mask = plain.get_submodule(key).weight.mask()
            assert not bool((w24.to_dense()[~mask] != 0).any()), key
    group = "int4 g32" if name == "int4" else name
    row = report["model.layers.0.mlp.up_proj"]
    assert row.quantized == f"{group} gptq + blocks"
    assert "block 0 reconstructed through levels: held-out error" in row.note
    assert row.quantize_error is not None and report.options["reconstruct"][0]["levels"] is True
    assert f"{group} gptq + blocks" in report.summary()


def test_int4_comes_near_what_16_bits_have():
    """Of rows that the run never saw."""
    ids, dense = texts(80), build(layers=3)
    found = []
    for name, use in ((None, True), ("int4", False), ("int4", True)):
        model, _ = pruned({**BLOCK, "levels": use}, name, ids[:60])
        with torch.no_grad():
            y, t = (m.model(input_ids=ids[60:]).last_hidden_state for m in (model, dense))
        found.append(float(((y - t).square().sum(-1) / t.square().sum(-1)).mean()))
    exact, quantiser, trained = found
    assert trained < quantiser and trained < 1.1 * exact


def test_without_levels_it_is_the_quantisers_result():
    model, report = pruned({**BLOCK, "levels": False}, "int4")
    assert len(report.reconstruction) == 3 and report.pruned[0].quantized == "int4 g32 gptq"
    plain, _ = pruned({**BLOCK, "levels": False}, None)
    other = sixteen_bits()  # nothing is quantised: levels=True changes nothing
    for key, w24 in weights(plain).items():
        assert torch.equal(w24.to_dense(), weights(other)[key].to_dense()), key
    assert not torch.equal(weights(model)[key].to_dense(), w24.to_dense())


def test_what_is_no_better_is_the_quantisers_result():
    expected, _ = pruned({**BLOCK, "levels": False, "lr": 50.0}, "int4", model=build(layers=1))
    model, report = pruned({**BLOCK, "lr": 50.0}, "int4", model=build(layers=1))
    assert not any(fit["kept"] for fit in report.reconstruction)
    for key, w24 in weights(model).items():
        assert torch.equal(w24.to_dense(), weights(expected)[key].to_dense()), key
    assert "reconstruction through levels was no better" in report.pruned[0].note


@pytest.mark.parametrize("method", ["rtn", None])
@pytest.mark.parametrize("rounds", [SPAN, [BLOCK, {**SPAN, "span": 2, "reselect": 0.5}]])
def test_rounds_after_the_walk_end_in_one_through_levels(rounds, method):
    model, report = pruned(rounds, "int4", quantize_method=method)
    fits = report.reconstruction[-3:]
    assert [fit["blocks"] for fit in fits] == [[0], [1], [2]]
    assert all(fit["after"] <= fit["before"] for fit in fits) and any(fit["kept"] for fit in fits)
    row = report["model.layers.1.mlp.down_proj"]
    assert row.quantized == f"int4 g64 {method or 'gptq'} + blocks"
    assert row.bytes_sparse == weights(model)[row.name].nbytes
    for w24 in weights(model).values():
        sk.verify(w24)
        assert w24.spec.storage == "int4"


def test_dense_weights_of_a_run_are_those_levels():
    rounds, ids = [BLOCK, {**SPAN, "span": 2, "reselect": 0.5}], texts(20)
    model, _ = pruned(rounds, "int4", ids, build(layers=2))
    dense, _ = pruned(rounds, "int4", ids, build(layers=2), compress=False)
    for key, w24 in weights(model).items():
        assert torch.equal(dense.get_submodule(key).weight, w24.to_dense()), key


def test_refusals():
    rounds = {**SPAN, "levels": False}
    with pytest.raises(ValueError, match='quantize_method "rtn" or None with.*levels=True'):
        pruned(rounds, "int4", quantize_method="gptq")
    _, report = pruned(rounds, "int4")
    assert report.pruned[0].quantized == "int4 g32 rtn"
    with pytest.raises(ValueError, match="levels: True or False, got 1"):
        pruned({**BLOCK, "levels": 1}, "int4")


@pytest.mark.parametrize("rounds", [BLOCK, [BLOCK, {**SPAN, "span": 2}]], ids=["walk", "after"])
def test_interrupted_and_resumed(rounds, tmp_path, monkeypatch):
    """Broken off in a fit through levels, in the walk and after it."""
    ids = texts(20)

    def run(rounds=rounds, **options):
        return pruned(rounds, "int4", ids, build(layers=2), **options)

    straight, expected = run()
    first = expected.reconstruction[1 if rounds is BLOCK else -2]["steps"]
    real, count = Levels.step, []

    def broken(self, *args):
        count.append(1)
        if len(count) == first + 5:
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(Levels, "step", broken)
    with pytest.raises(KeyboardInterrupt):
        run(resume=tmp_path)
    monkeypatch.undo()
    resumed, report = run(resume=tmp_path)
    assert report.resumed == (1 if rounds is BLOCK else 4)  # two blocks, a window, a block
    for key, w24 in weights(straight).items():
        assert all(torch.equal(a, resumed.get_submodule(key).weight.tensors[n])
                   for n, a in w24.tensors.items()), key  # fmt: skip
    assert [(r.note, r.quantized) for r in report.layers] == [
        (r.note, r.quantized) for r in expected.layers
    ]
    with pytest.raises(ValueError, match="reconstruct"):
        run({**BLOCK, "levels": False}, resume=tmp_path)


@pytest.mark.parametrize(
    "rounds, options",
    [
        ({**BLOCK, "parts": "sublayers"}, {"family": "llama"}),
        ({**BLOCK, "target": "pruned", "loss": "mse"}, {"family": "gpt2"}),
        ({**BLOCK, "seconds": 1e6}, {"family": "opt"}),
    ],
    ids=["sublayers", "conv1d", "seconds"],
)
def test_other_rounds_and_families(rounds, options):
    model, report = pruned(rounds, "int4", model=build(**options))
    assert any(fit["kept"] for fit in report.reconstruction)
    for w24 in weights(model).values():
        sk.verify(w24)
    assert all(row.quantized.endswith("+ blocks") for row in report.pruned)


def test_sixteen_bits_on_the_host():
    model, report = pruned(BLOCK, "fp8", model=build(layers=1).to(torch.bfloat16))
    assert report.reconstruction[1]["kept"]
    for w24 in weights(model).values():
        sk.verify(w24)
        assert w24.dtype == torch.bfloat16


# ---- the parameters alone ------------------------------------------------------------------------


def problem(name, width=100, transposed=False):
    """(Trained, its weight quantised, the weight before); the last group of int4 is shorter."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(8, width, generator=generator)
    mask = sk.prune.magnitude_mask(w)
    w = w * mask
    group = 64 if name == "int4" else None
    w24, _ = sk.prune.rtn(w, name, mask=mask, group=group)
    stored = w24.to_dense()
    parameter = torch.nn.Parameter(stored.t().contiguous() if transposed else stored)
    kept = mask.t() if transposed else mask
    return Trained(parameter, kept.clone(), torch.float32, transposed), w24, w


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_it_begins_at_the_quantisers_levels(name, transposed):
    trained, w24, w = problem(name, transposed=transposed)
    start = trained.parameter.detach().clone()
    levels = Levels([trained], [w24], [w])
    assert torch.equal(trained.parameter, start)
    assert levels.latent[0].is_contiguous()  # as gradients are: fused optimizers want one form
    (same,) = levels.weights()
    for key, tensor in w24.tensors.items():
        assert torch.equal(same.tensors[key], tensor), key


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_straight_through_rounding(name):
    """Against autograd on s · (r + (level(r) − r).detach()), r constant at either end."""
    trained, w24, w = problem(name, 96)
    levels = Levels([trained], [w24], [w])
    codec = dtypes.scaled_codec(w24.spec.storage)
    drift = levels.drift[0].detach().clone().requires_grad_()
    scale = w24.tensors[scaled.SCALE][:, :, None] * drift.exp()
    wide = scale[:, :, 0] if scale.shape[1] == 1 else scale[:, :, 0].repeat_interleave(64, 1)
    latent = levels._flat(0, levels.latent[0].detach()).clone().requires_grad_()
    ratio = latent / wide[:, :96]
    inside = (ratio > codec.low * 0.999) & (ratio < codec.top * 0.999)
    ratio = torch.where(inside, ratio, codec.round(ratio).detach())
    numbers = wide[:, :96] * (ratio + (codec.round(ratio) - ratio).detach())
    torch.testing.assert_close(numbers, trained.parameter)
    g = torch.randn(8, 96, generator=torch.Generator().manual_seed(1)) * trained.mask
    (numbers * g).sum().backward()
    seen = {}

    class Optimizer:
        def step(self):
            seen["latent"], seen["drift"] = levels.latent[0].grad, levels.drift[0].grad

    levels.step(Optimizer(), [g])
    torch.testing.assert_close(seen["drift"], drift.grad, rtol=1e-4, atol=1e-5)
    mine = levels._flat(0, seen["latent"])
    torch.testing.assert_close(mine[inside], latent.grad[inside], rtol=1e-4, atol=1e-6)


def test_weights_stay_between_the_end_levels_and_scales_above_zero():
    trained, w24, w = problem("int4")
    levels = Levels([trained], [w24], [w])
    optimizer = torch.optim.SGD(levels.parameters(1.0), lr=1.0)
    state = levels.state()
    for sign in (1, -1, 1):
        levels.step(optimizer, [sign * 100.0 * trained.mask])
        (now,) = levels.weights()
        sk.verify(now)
        assert torch.equal(now.to_dense(), trained.parameter)
        assert not bool((now.to_dense()[~trained.mask] != 0).any())
    levels.restore(state)
    assert torch.equal(levels.weights()[0].to_dense(), w24.to_dense())


def test_a_weight_without_a_gradient_stays():
    """Of an expert that no token of the batch reached."""
    pairs = [problem("int4"), problem("int4")]
    levels = Levels([t for t, _, _ in pairs], [q for _, q, _ in pairs], [w for _, _, w in pairs])
    optimizer = torch.optim.AdamW(levels.parameters(0.1), lr=0.1, weight_decay=0.0)
    before = [t.parameter.detach().clone() for t, _, _ in pairs]
    levels.step(optimizer, [None, torch.ones(8, 100) * pairs[1][0].mask])
    assert torch.equal(pairs[0][0].parameter, before[0])
    assert not torch.equal(pairs[1][0].parameter, before[1])
