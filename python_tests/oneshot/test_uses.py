"""An argument that nothing in the call reads is refused, with its name and its default; one at its
default, or that something reads, is not."""

import inspect

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.oneshot.uses import CALIBRATE, PRUNE_MODEL
from sparsekern.prune.methods import Method, Option, apply_mask, register_method, unregister_method

# Of every call, or checked with the argument that they go with.
ALWAYS = set(
    "model method skip compress targets device pattern masks refine match_dense on_error "
    "keep_dense hessians resume progress quantize preset reconstruct rotate permute ranks source "
    "options".split()
)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def data():
    return [torch.randn(24, 16, generator=torch.Generator().manual_seed(1))]


def prune(method="magnitude", calibration=None, **options):
    return sk.prune_model(model(), method, calibration, progress=False, **options)


def test_every_argument_is_in_the_table_or_of_every_call():
    names = set(inspect.signature(sk.prune_model).parameters)
    assert names == set(PRUNE_MODEL) | ALWAYS
    names = set(inspect.signature(sk.calibrate).parameters)
    assert names == set(CALIBRATE) | {"model", "skip", "targets", "device", "hessians"}


REFUSED = [
    ({"damp": 0.1}, "refine=, match_dense= or gptq with damp, got damp=0.1.*Leave damp at None"),
    ({"method": "wanda", "calibration": data(), "damp": 0.1}, "with damp"),
    ({"calibration": data(), "quantize": "int8", "quantize_method": "rtn", "damp": 0.1}, "damp"),
    ({"quantize": "int8", "damp": 0.1}, "with damp"),  # nothing for gptq to read
    ({"method": lambda w, h: w.abs(), "damp": 0.1}, "with damp"),
    ({"blocksize": 64}, "a method that has blocks .sparsegpt. with blocksize, got blocksize=64"),
    ({"method": "admm", "calibration": data(), "blocksize": 64}, "with blocksize"),
    ({"method": None, "preset": "fast", "calibration": data(), "blocksize": 64}, "with blocksize"),
    ({"batch_size": 2}, "calibration and no hessians with batch_size, got batch_size=2"),
    ({"tokenizer": str.split}, "with tokenizer"),
    ({"true_sequential": True}, "with true_sequential"),
    ({"offload_activations": False}, "with offload_activations"),
    ({"calibration": data(), "hessians": {}}, "hessians=None with calibration"),
    ({"keep_hessians": True}, "calibration or hessians with keep_hessians"),
    ({"keep_dense_tokens": [4]}, 'keep_dense="if-slower" with keep_dense_tokens'),
    ({"undo": True, "resume": "nowhere"}, "resume=None with undo"),
    ({"quantize_group": 64}, "quantize= with quantize_group"),
    ({"untie": True}, "a rotation .* with untie"),
    ({"method": None, "preset": "best", "rotate": False, "untie": True}, "with untie"),
    (
        {"calibration": data(), "reconstruct": {"between": 0.5}},
        "span=None or of several blocks with between, got",
    ),
    ({"calibration": data(), "reconstruct": {"reselect": 0.5}}, "with reselect.* at 0.0"),
    ({"calibration": data(), "reconstruct": {"batch": 2}}, "with batch, got batch=2"),
    ({"calibration": data(), "reconstruct": {"span": None, "noise": 0.1}}, "recut=True with noise"),
]


@pytest.mark.parametrize("options, text", REFUSED)
def test_what_nothing_reads_is_refused(options, text):
    with pytest.raises(ValueError, match=f"^sparsekern.prune_model: expected .*{text}"):
        prune(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"damp": None, "blocksize": None, "batch_size": None, "keep_dense_tokens": [1, 16, 256]},
        {"damp": 0.01, "blocksize": 128, "untie": False, "undo": False, "true_sequential": False},
        {"method": "wanda", "calibration": data(), "refine": 2, "damp": 0.1, "batch_size": 8},
        {"calibration": data(), "quantize": "int8", "damp": 0.1, "keep_hessians": True},
        {"method": "sparsegpt", "calibration": data(), "blocksize": 64, "true_sequential": True},
        {"method": "admm", "calibration": data(), "damp": 0.1, "rounds": 2, "refine": 0},
    ],
)
def test_what_is_read_or_at_its_default_is_taken(options):
    assert len(prune(**options).pruned) == 2


def test_damp_changes_what_reads_it():
    """The rows that say that something reads damp say so rightly."""

    def bits(**options):
        net = model()
        sk.prune_model(net, calibration=data(), progress=False, compress=False, **options)
        return torch.cat([p.reshape(-1) for p in net.parameters()])

    for options in (
        {"method": "wanda", "refine": 4},
        {"method": "magnitude", "quantize": "int8"},
        {"method": "sparsegpt", "refine": 0},
        {"method": "admm", "refine": 0},
    ):
        assert not torch.equal(bits(**options), bits(**options, damp=0.5)), options


def test_an_option_of_a_registered_method_is_read():
    def function(weight, hessian, *, pattern, mask, blocksize):
        return apply_mask(weight, sk.prune.magnitude_mask(weight))

    register_method(Method("in-blocks", "", function, options=(Option("blocksize", 32, ""),)))
    try:
        assert len(prune("in-blocks", blocksize=64).pruned) == 2
        assert len(prune("magnitude", blocksize=32).pruned) == 2  # its default
    finally:
        unregister_method("in-blocks")


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 2}, {"beside_dense": True}, {"true_sequential": True}, {"tokenizer": len}],
)
def test_calibrate_without_data(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"calibrate: expected data and no hessians with {name}"):
        sk.calibrate(model(), **options)
    assert len(list(sk.calibrate(model(), data(), batch_size=2))) == 2
