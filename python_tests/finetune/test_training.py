"""SparseTrainingLinear against a dense layer under the same mask, and its kernels interpreted."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekern
from python_tests.nn import expert_models
from python_tests.oneshot import architectures
from sparsekern.finetune import Masked, SparseTrainingLinear, finish_training, sparse_training
from sparsekern.finetune.transposable import is_transposable, transposable_mask

IN, OUT, TOKENS = 72, 136, 24


def dense_layer(dtype=torch.float32, device="cpu", bias=True, rows=OUT, columns=IN):
    layer = nn.Linear(columns, rows, bias=bias).to(device=device, dtype=dtype)
    mask = transposable_mask(layer.weight.detach().abs())
    layer.weight.data.masked_fill_(~mask, 0)
    return layer, mask


DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float16, torch.bfloat16)}


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("rows,columns", [(OUT, IN), (64, 64), (12, 20)])
def test_output_and_gradients(half, rows, columns, device):
    dtype = DTYPES[device.type][half]
    dense, mask = dense_layer(dtype, device, rows=rows, columns=columns)
    layer = SparseTrainingLinear.from_linear(dense, mask, when="always")
    x = torch.randn(2, TOKENS, columns, device=device, dtype=dtype)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    y, want = layer(ours), dense(theirs)
    close = dict(rtol=2e-2, atol=2e-2) if dtype != torch.float32 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, want, **close)
    slope = torch.randn_like(y)
    y.backward(slope)
    want.backward(slope)
    torch.testing.assert_close(ours.grad, theirs.grad, **close)
    scale = float(dense.weight.grad.float().abs().max())
    kept = dense.weight.grad[mask].view_as(layer.values)
    torch.testing.assert_close(layer.values.grad, kept, rtol=0.02, atol=0.02 * scale)
    # A sum of the slopes of all tokens: rounded once, or added up in the dtype, token by token.
    total, sizes = (s.double().sum((0, 1)) for s in (slope, slope.abs()))
    bound = torch.finfo(dtype).eps * sizes + 1e-6
    assert bool(((layer.bias.grad.double() - total).abs() <= bound).all())
    assert is_transposable(layer.to_linear().weight)
    assert torch.equal(layer.to_linear().weight, dense.weight)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8, bias=False))


def steps(model, optimizer, count=5, masked=None):
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 16, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if masked is not None:
            masked.mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()


def test_training_is_that_of_a_masked_dense_model():
    dense = net()
    masks = {str(i): transposable_mask(dense[i].weight.detach().abs()) for i in (0, 2)}
    sparse = copy.deepcopy(dense)
    assert sparse_training(sparse, masks) == ["0", "2"]
    masked = Masked(dense, masks)
    options = dict(lr=1e-2, weight_decay=0.1)
    one = torch.optim.AdamW(dense.parameters(), **options)
    two = torch.optim.AdamW(sparse.parameters(), **options)
    assert sum(p.numel() for p in sparse.parameters()) < sum(p.numel() for p in dense.parameters())
    steps(dense, masked.attach(one), masked=masked)
    steps(sparse, two)
    for i in (0, 2):
        weight = sparse[i].to_linear().weight
        torch.testing.assert_close(weight, dense[i].weight, rtol=1e-4, atol=1e-5)
    x = torch.randn(3, 16)
    want = sparse(x)
    assert finish_training(sparse) == ["0", "2"]
    assert all(isinstance(sparse[i], sparsekern.SparseLinear) for i in (0, 2))
    for i in (0, 2):
        sparsekern.verify(sparse[i].weight)
    torch.testing.assert_close(sparse(x), want, rtol=1e-4, atol=1e-5)


def test_two_thousand_steps_without_a_violation():
    """AdamW with weight decay and clipping; the dense weight is transposable after every 100."""
    layer = SparseTrainingLinear(torch.randn(8, 16) / 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.1)
    target = torch.randn(32, 8)
    x = torch.randn(32, 16)
    first = float((layer(x) - target).detach().square().mean())
    for step in range(2000):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            assert is_transposable(layer.to_linear().weight)
    assert float(loss.detach()) < 0.8 * first


def test_state_moves_and_changes_are_seen():
    layer = SparseTrainingLinear(torch.randn(8, 16), bias=torch.randn(8))
    x = torch.randn(3, 16)
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    assert set(layer.state_dict()) == {"values", "metadata", "bias"}
    with torch.no_grad():
        layer.values.mul_(2)
    assert not torch.equal(layer(x), y)  # noticed by version
    buffer.seek(0)
    layer.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(copy.deepcopy(layer)(x), y)
    layer.values.data.zero_()
    layer.refresh()
    assert torch.equal(layer(x), layer.bias.expand(3, -1))
    out = layer(x).sum()
    with torch.no_grad():
        layer.values.add_(1)
    with pytest.raises(RuntimeError, match="before the optimizer"):
        out.backward()


def test_another_mask_of_the_same_shape_comes_with_a_state():
    one, two = SparseTrainingLinear(torch.randn(8, 16)), SparseTrainingLinear(torch.randn(8, 16))
    x, again = (torch.ones(3, 16, requires_grad=True) for _ in range(2))
    two(x)
    two.load_state_dict(one.state_dict())
    y, want = two(x), one(again)
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)


def test_float32_values_under_autocast():
    layer = SparseTrainingLinear(torch.randn(8, 16), dtype=torch.bfloat16)
    assert layer.values.dtype == torch.float32
    x = torch.randn(3, 16, requires_grad=True)
    with pytest.raises(
        TypeError, match="got torch.float32. Run it under torch.autocast, or .*float32"
    ):
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.values.grad.dtype == torch.float32 and x.grad.dtype == torch.float32
    assert layer.to_sparse_linear().weight.values.dtype == torch.bfloat16


def test_float32_matmuls_under_autocast():
    """What autocast rounds is the business of the layers around: forward, backward and gradients
    are those without it."""
    model = net()
    sparse_training(model)
    ours, theirs = (torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) for _ in "12")
    with torch.autocast("cpu", torch.bfloat16):
        y = model(ours.requires_grad_())
    want = model(theirs.requires_grad_())
    assert y.dtype == torch.float32 and torch.equal(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_a_model_in_inference_mode_still_trains():
    model = net()
    with torch.inference_mode():
        sparse_training(model)
    model(torch.randn(3, 16)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with torch.inference_mode():
        finish_training(model)
    x = torch.randn(3, 16, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0 and model[0].bias.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["t5", "wavlm", "jamba"])
def test_models_that_read_weights(name):
    """A layer that is asked for its dtype is replaced; one that is read stays dense."""
    transformers = pytest.importorskip("transformers")
    model = architectures.build(transformers, name)
    with pytest.warns(UserWarning, match="left dense"):
        names = sparse_training(model)
    assert any(n.endswith("DenseReluDense.wo") for n in names) == (name == "t5")
    outputs = architectures.outputs(model, name)
    model(**architectures.inputs(name)).logits.square().mean().backward()
    layers = [m for m in model.modules() if isinstance(m, SparseTrainingLinear)]
    assert len(layers) == len(names) and all(m.values.grad is not None for m in layers)
    finish_training(model)
    for got, want in zip(architectures.outputs(model, name), outputs, strict=True):
        torch.testing.assert_close(got, want)


def test_a_mask_of_a_layer_that_is_read():
    model = nn.TransformerEncoderLayer(8, 2, 8)
    mask = transposable_mask(model.linear1.weight.detach().abs())
    with pytest.raises(ValueError, match="linear1, got TransformerEncoderLayer reads the weight"):
        sparse_training(model, {"linear1": mask})
    layer = SparseTrainingLinear(torch.randn(8, 16), dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and tuple(layer.weight.shape) == (8, 16)
    assert torch.equal(layer.weight.to_dense(), layer.to_linear().weight.bfloat16())


def test_steps_after_an_evaluation_in_inference_mode():
    model = net()
    sparse_training(model)
    x = torch.randn(3, model[0].in_features)
    for _ in range(2):
        with torch.inference_mode():
            model(x)
        model(x).square().sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    want = model[0].to_linear()(x)
    torch.testing.assert_close(model[0](x), want)


def test_a_model_in_training_is_told():
    model = net()
    sparse_training(model)
    with pytest.raises(ValueError, match="got none, and 2 SparseTrainingLinear"):
        sparse_training(model)
    with pytest.warns(UserWarning, match="SparseTrainingLinear trains it: .*finish_training"):
        sparsekern.compress_model(model)


def test_what_is_left_dense_is_said():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    with pytest.warns(UserWarning, match=r"left dense: 1 \(6x8 is no multiple of 4\)"):
        assert sparse_training(model) == ["0"]
    model = expert_models.build("mixtral")
    with pytest.warns(UserWarning, match=r"mlp.experts.gate_up_proj \(experts in one Parameter"):
        assert not any("experts" in name for name in sparse_training(model))


def test_bad_arguments():
    w = torch.randn(8, 16)
    rows_only = sparsekern.prune.magnitude_mask(w)
    for arguments, error, text in (
        ((torch.randn(6, 16),), ValueError, "multiples of 4"),
        ((w, rows_only), ValueError, "transposable_mask"),
        ((w, rows_only.float()), TypeError, "bool"),
        ((w, rows_only[:4]), ValueError, "mask"),
    ):
        with pytest.raises(error, match=text):
            SparseTrainingLinear(*arguments)
    with pytest.raises(ValueError, match="measured"):
        SparseTrainingLinear(w, when="never")
    with pytest.raises(ValueError, match="no such"):
        sparse_training(net(), {"no such": rows_only})
    with pytest.raises(ValueError, match="multiples of 4"), pytest.warns(UserWarning, match="3x6"):
        sparse_training(nn.Sequential(nn.Linear(6, 3)))


@pytest.mark.gpu
def test_measured_choices_are_told():
    """A layer of a few rows is dense, and a warning says so; results agree either way."""
    layer = SparseTrainingLinear(torch.randn(8, 16, device="cuda").bfloat16())
    x = torch.randn(2048, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert set(layer.choices) == {("forward", 2048), ("backward", 2048)}
    for choice in layer.choices.values():
        assert choice.sparse == (choice.sparse_us < choice.dense_us)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.to_linear().weight))


@pytest.mark.gpu
def test_gpu_steps_equal_a_masked_dense_layer():
    """Twenty steps: weights are made anew after each without waiting, and every one is right."""
    dense, mask = dense_layer(torch.bfloat16, "cuda", bias=False, rows=1024, columns=2048)
    layer = SparseTrainingLinear.from_linear(dense, mask, when="always")
    one = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(20):
        x = torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        w = layer.to_linear().weight.detach()
        y = layer(x)
        torch.testing.assert_close(y, nn.functional.linear(x, w), rtol=2e-2, atol=2e-2)
        slope = torch.randn_like(y) / 512
        y.backward(slope)
        torch.testing.assert_close(x.grad, slope @ w, rtol=2e-2, atol=2e-3)
        one.step()
        one.zero_grad()
    assert is_transposable(layer.to_linear().weight)


def test_interpreted_kernels():
    pytest.importorskip("triton", reason="Triton is not installed")
    file = Path(__file__).parent / "triton_training_cases.py"
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("passed") == 2


@pytest.mark.gpu
def test_kernels_on_the_gpu():
    from python_tests.finetune import triton_training_cases

    triton_training_cases.check_tiles("cuda")
    triton_training_cases.check_values("cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_of_the_model(dtype):
    """As nn.Linear: after .half() x is of 16 bits, after .float() of 32."""
    model = net()
    names = sparse_training(model)
    x = torch.randn(3, model[0].in_features)
    y = model.to(dtype)(x.to(dtype))
    y.float().sum().backward()
    assert y.dtype == dtype and model.get_submodule(names[0]).values.grad.dtype == dtype
    finished = copy.deepcopy(model)
    finish_training(finished)
    torch.testing.assert_close(finished(x.to(dtype)), y)
    assert model.float()(x).dtype == torch.float32


def test_second_derivatives_are_refused():
    """They would lack what the weight adds to them."""
    layer = SparseTrainingLinear(torch.randn(8, 16))
    x = torch.randn(3, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_layer_that_is_the_model_itself():
    for call, layer in (
        (sparse_training, nn.Linear(16, 8)),
        (finish_training, SparseTrainingLinear(torch.randn(8, 16))),
    ):
        with pytest.raises(ValueError, match=r"got the layer itself. Put it into .*Sequential"):
            call(layer)
