"""prune_model(quantize=), compress_model(quantize=), their reports, resume folders, the command."""

import copy
import json

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.cli.main import build_parser, main
from sparsekern.formats.dtypes import element
from sparsekern.oneshot.report import PruneReport
from sparsekern.prune import Hessian, gptq


class Block(torch.nn.Module):
    def __init__(self, size=32):
        super().__init__()
        self.up, self.gate = torch.nn.Linear(size, 64), torch.nn.Linear(size, 64)
        self.down = torch.nn.Linear(64, size)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def model(blocks=2):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(Block() for _ in range(blocks))).eval()


def inputs():
    """Inputs that share two factors."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(8, 24, 2, generator=generator) @ torch.randn(2, 32, generator=generator)
    return torch.randn(8, 24, 32, generator=generator) + 2 * shared


def prune(net, method="sparsegpt", **options):
    return sk.prune_model(net, method, inputs(), progress=False, **options)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_every_layer_becomes_levels(name):
    net, plain, x = model(), model(), inputs()
    report = prune(net, quantize=name)
    base = prune(plain)
    kind = f"{name} g32 gptq" if name == "int4" else f"{name} gptq"
    for row, other in zip(report.layers, base.layers, strict=True):
        module = net.get_submodule(row.name)
        assert module.weight.spec.element is element(name)
        assert row.bytes_sparse == module.weight.nbytes < other.bytes_sparse
        if "down" not in row.name:
            assert row.quantized == kind
        assert row.quantize_error is not None and row.quantize_error < row.relative_error
    first = report["0.up"]
    assert first.relative_error - first.quantize_error == pytest.approx(base["0.up"].relative_error)
    with torch.no_grad():
        wanted = plain(x)
        error = float((net(x) - wanted).norm() / wanted.norm())
    assert error < {"fp8": 0.05, "int8": 0.02, "int4": 0.2}[name]
    assert (
        "adds" in report.table() and f"{kind}" in report.summary() and kind in report._repr_html_()
    )
    again = PruneReport.from_json(report.to_json())
    assert again.layers == report.layers and again.options["quantize"] == name


def test_the_levels_are_those_of_gptq():
    net, dense = model(1), model(1)
    report = prune(net, quantize="int4", match_dense=0, keep_hessians=True)
    plain = model(1)
    prune(plain, match_dense=0)
    w24 = plain[0].up.weight
    hessian = report.hessians["0.up"]
    expected, _ = gptq(
        w24.to_dense(), hessian, "int4", mask=w24.mask(), target=dense[0].up.weight.detach()
    )
    assert torch.equal(net[0].up.weight.to_dense(), expected.to_dense())


def test_gptq_beats_rounding_in_the_report():
    errors = {}
    for method in ("rtn", "gptq"):
        report = prune(model(), quantize="int4", quantize_method=method)
        assert all(row.quantized.endswith(method) for row in report.layers)
        errors[method] = sum(row.quantize_error for row in report.layers)
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_methods_without_calibration_round():
    net = model()
    report = sk.prune_model(net, "magnitude", quantize="int4", quantize_group=64, progress=False)
    assert {row.quantized for row in report.layers} == {"int4 g32 rtn", "int4 g64 rtn"}
    assert all(row.quantize_error is None for row in report.layers)
    assert "which adds" not in report.summary() and report.table()
    with pytest.raises(ValueError, match='calibration for quantize_method="gptq".*"rtn"'):
        sk.prune_model(model(), "magnitude", quantize="int4", quantize_method="gptq")
    assert "gptq" in prune(model(), "wanda", quantize="int8").layers[0].quantized


def test_dense_weights_that_hold_the_levels():
    net, dense = model(), model()
    prune(net, quantize="int4")
    prune(dense, quantize="int4", compress=False)
    for a, b in zip(net.modules(), dense.modules(), strict=True):
        if isinstance(a, sk.SparseLinear):
            assert torch.equal(a.weight.to_dense(), b.weight)


REFUSALS = [
    (dict(quantize="fp4"), "one of 'fp8'"),
    (dict(quantize="fp8", pattern=(4, 8), compress=False), r"pattern \(2, 4\) with quantize="),
    (dict(quantize="fp8", quantize_method="awq"), "quantize_method in"),
    (dict(quantize="int4", quantize_group=32), r"quantize_group in \(64, 128\), got 32"),
    (dict(quantize="int8", quantize_group=64), "quantize_group=None for int8, which has one scale"),
    (dict(quantize_group=64), "quantize= with quantize_group"),
    (dict(quantize_method="rtn"), "quantize= with quantize_method"),
]


@pytest.mark.parametrize("options, text", REFUSALS, ids=[text for _, text in REFUSALS])
def test_refusals(options, text):
    net = model()
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=text):
        prune(net, **options)
    assert all(map(torch.equal, before, net.parameters()))


def test_resume(tmp_path):
    def scored():
        """One that ends in two layers of one input, one of them with a single output."""
        net = model().append(Block())
        net[-1].gate = torch.nn.Linear(32, 1)
        return net

    once, twice = scored(), scored()
    prune(once, quantize="int4", resume=tmp_path)
    report = prune(twice, quantize="int4", resume=tmp_path)
    assert report.resumed and report.layers[0].quantized == "int4 g32 gptq"
    for a, b in zip(once.modules(), twice.modules(), strict=True):
        if isinstance(a, sk.SparseLinear):
            assert a.weight.spec is b.weight.spec
            assert torch.equal(a.weight.to_dense(), b.weight.to_dense())
    with pytest.raises(ValueError, match="quantize: 'fp8' here, 'int4' there"):
        prune(scored(), quantize="fp8", resume=tmp_path)


@pytest.mark.parametrize("name, group", [("fp8", None), ("int4", 64)])
def test_compress_model(name, group):
    net = model()
    prune(net, compress=False)
    dense = {n: m.weight.detach() for n, m in net.named_modules() if hasattr(m, "weight")}
    report = sk.compress_model(net, quantize=name, quantize_group=group)
    assert report.options["quantize"] == name
    for row in report.layers:
        module = net.get_submodule(row.name)
        plain = sk.compress(dense[row.name])
        expected = sk.quantize(plain, name, group=group, scale="mse").to_dense()
        assert torch.equal(module.weight.to_dense(), expected)
        assert row.quantized.startswith(name) and row.quantized.endswith("rtn")
    with pytest.raises(ValueError, match="one scale for each output channel"):
        sk.compress_model(model(), quantize="int8", quantize_group=64)


def test_a_method_with_block_outputs():
    """Levels come after a method's last step on the block."""
    from sparsekern.prune import Method, register_method, unregister_method
    from sparsekern.prune.methods import apply_mask

    def function(weight, hessian, *, pattern, mask=None):
        return apply_mask(weight, sk.prune.magnitude_mask(weight, *pattern))

    def finish(block, masks, dense):
        for module, mask in masks.items():
            module.weight.data.copy_(2 * dense[module].masked_fill(~mask, 0))

    register_method(Method("twice", "", function, needs="outputs", finish=finish))
    try:
        ids = torch.arange(48).view(2, 24) % 64
        net = _llama()
        dense = net.model.layers[0].mlp.up_proj.weight.detach().clone()
        report = sk.prune_model(
            net, "twice", ids, quantize="int8", quantize_method="rtn", progress=False
        )
    finally:
        unregister_method("twice")
    w24 = net.model.layers[0].mlp.up_proj.weight
    twice = 2 * dense.masked_fill(~sk.prune.magnitude_mask(dense), 0)
    assert float((w24.to_dense() - twice).abs().max()) < 0.01 * float(twice.abs().max())
    row = report["model.layers.0.mlp.up_proj"]
    assert row.quantized == "int8 rtn" and abs(row.quantize_error) < 0.01


def _llama():
    from python_tests.checkpoint.checkpoint_cases import llama

    return llama(tied=False)


def test_the_command_line():
    parser = build_parser()
    args = parser.parse_args(
        "prune M --out O --quantize int4 --quantize-group 64 --quantize-method rtn".split()
    )
    assert (args.quantize, args.quantize_group, args.quantize_method) == ("int4", 64, "rtn")
    args = parser.parse_args("export D --to dense --out O --keep-quantized".split())
    assert args.keep_quantized and not parser.parse_args("prune M --out O".split()).quantize
    with pytest.raises(SystemExit):
        parser.parse_args("prune M --out O --quantize fp4".split())


def test_prune_from_the_command_line(tmp_path, capsys):
    net = _llama()
    net.save_pretrained(tmp_path / "dense")
    command = ["prune", str(tmp_path / "dense"), "--out", str(tmp_path / "out")]
    command += ["--method", "magnitude", "--quantize", "fp8", "--device", "cpu", "--quiet"]
    assert main(command) == 0
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert entry["format"] == "float-quantized"
    assert "fp8 rtn" in capsys.readouterr().out


def test_a_given_hessian():
    net = model(1)
    hessians = {}
    for name, size in (("0.up", 32), ("0.gate", 32), ("0.down", 64)):
        hessians[name] = Hessian(size)
        hessians[name].add(torch.randn(4, 40, size))
    report = sk.prune_model(net, "sparsegpt", hessians=hessians, quantize="int4", progress=False)
    assert all(row.quantized.endswith("gptq") for row in report.layers)


def test_layers_that_were_2_4_before_are_quantised_by_compress_model():
    def pruned():
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
        sk.prune_model(model, "magnitude", targets=["0", "1"], progress=False)
        return model

    model = pruned()
    with pytest.warns(UserWarning, match="2 of them keep the numbers that they had .*compress_mo"):
        report = sk.prune_model(model, "magnitude", quantize="int8", progress=False)
    assert report.partial and [row.name for row in report.unquantized] == ["0", "1"]
    assert [row.quantized for row in report.layers] == [None, None, "int8 rtn"]
    kept = model[0].weight.mask()
    report = sk.compress_model(model, skip=["1"], quantize="int8")
    assert not report.partial and torch.equal(model[0].weight.mask(), kept)
    assert [row.quantized for row in report.layers] == ["int8 rtn", None, "int8"]
    with pytest.warns(UserWarning, match="2 layers keep the numbers that they had: no fp8"):
        report = sk.compress_model(model, quantize="fp8")
    assert [row.quantized for row in report.layers] == ["int8", "fp8 rtn", "int8"]
    with pytest.raises(ValueError, match="expected quantize= with quantize_group"):
        sk.compress_model(pruned(), quantize_group=64)


def test_levels_of_another_group_or_name_are_told_apart():
    def pruned(**options):
        model = nn.Sequential(nn.Linear(128, 16), nn.Linear(16, 128))
        sk.prune_model(model, "magnitude", targets=["0"], progress=False, **options)
        return model

    model = pruned(quantize="int4")
    advice = "decompress_model.*, then sparsekern.compress_model"
    with pytest.warns(UserWarning, match=f"1 of them keep the numbers that they had.*{advice}"):
        report = sk.prune_model(model, "magnitude", quantize="int4", quantize_group=64)
    assert [row.name for row in report.unquantized] == ["0"]
    with pytest.warns(UserWarning, match="no int4 g64.*Call sparsekern.decompress_model"):
        sk.compress_model(model, quantize="int4", quantize_group=64)
    report = sk.compress_model(sk.decompress_model(model), quantize="int4", quantize_group=64)
    assert not report.partial
    assert [row.quantized for row in report.layers] == ["int4 g64 rtn", "int4 g16 rtn"]

    report = sk.prune_model(pruned(quantize="fp8"), "magnitude", quantize="float8_e4m3fn")
    assert not report.partial and [row.quantized for row in report.layers] == ["fp8", "fp8 rtn"]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_levels_do_not_depend_on_torchs_default_dtype(default, name):
    (w, h), first = (torch.randn(8, 32), Hessian(32)), model()
    h.add(torch.randn(64, 32))
    other = copy.deepcopy(first)
    wanted, _ = gptq(w, h, name)
    prune(first, quantize=name)
    calibration = inputs()
    torch.set_default_dtype(default)
    try:
        found, _ = gptq(w, h, name)
        sk.prune_model(other, "sparsegpt", calibration, quantize=name, progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.to_dense(), wanted.to_dense())
    assert torch.equal(other(calibration), first(calibration))
