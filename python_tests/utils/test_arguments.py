"""Every argument of every public function given odd Python values: the result is right, or a
ValueError or TypeError of ours says what was expected and what came."""

import copy
import inspect

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparsekern as sk
from python_tests.oneshot.driver_models import build, tokens
from sparsekern.utils.arguments import SEEDS, check_fields, checked, folded, usable_device

ODD = {
    "None": None,
    "True": True,
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "10**30": 10**30,
    "''": "",
    "'x'": "x",
    "b'x'": b"x",
    "[]": [],
    "{}": {},
    "object": object(),
    "numpy": np.float64(3),
    "meta": torch.empty(2, 2, device="meta"),
    "dtype": torch.float64,
}


def weight(rows: int = 16, columns: int = 32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


W = weight()
W24 = sk.prune_compress(W)
MASK = sk.prune.magnitude_mask(W)
X = weight(4)
H = sk.prune.Hessian(32)
H.add(weight(64))
Q, QS = sk.quantize_rows(X.bfloat16(), "int8")
W8 = sk.quantize(sk.prune_compress(W.bfloat16()), "int8")
DENSE = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32))
ZEROS, PRUNED = copy.deepcopy(DENSE), copy.deepcopy(DENSE)
sk.prune_model(ZEROS, "magnitude", compress=False, progress=False)
sk.prune_model(PRUNED, "magnitude", progress=False)
WORDS = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))


def new(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def layer(value: object, name: str) -> None:
    setattr(sk.SparseLinear.from_sparse24(W24), name, value)


# name -> (function, arguments that are right)
CALLS = {
    "compress": (sk.compress, lambda: dict(w=W * MASK)),
    "decompress": (sk.decompress, lambda: dict(w24=W24)),
    "verify": (sk.verify, lambda: dict(w24=W24)),
    "prune_compress": (sk.prune_compress, lambda: dict(w=W)),
    "linear": (sk.linear, lambda: dict(x=X, w24=W24)),
    "gated_linear": (sk.gated_linear, lambda: dict(x=X, gate24=W24, up24=W24)),
    "explain": (sk.explain, lambda: dict(x=X, w24=W24)),
    "quantize": (sk.quantize, lambda: dict(w24=W24, dtype="int8")),
    "dequantize": (sk.dequantize, lambda: dict(w24=W8)),
    "quantize_rows": (sk.quantize_rows, lambda: dict(x=X, dtype="int8")),
    "rms_norm_quantize": (
        sk.rms_norm_quantize,
        lambda: dict(x=X, weight=torch.ones(32), dtype="int8"),
    ),
    "silu_mul_quantize": (sk.silu_mul_quantize, lambda: dict(gate=X, up=X, dtype="int8")),
    "linear_quantized": (sk.linear_quantized, lambda: dict(x=Q, x_scale=QS, w24=W8)),
    "Sparse24": (
        sk.Sparse24,
        lambda: dict(values=W24.values, metadata=W24.metadata, shape=(16, 32)),
    ),
    "from_bitmask": (
        sk.Sparse24.from_bitmask,
        lambda: dict(values=W24.values, bitmask=W24.bitmask(), shape=(16, 32)),
    ),
    "from_tensors": (
        sk.Sparse24.from_tensors,
        lambda: dict(spec=W24.spec, tensors=dict(W24.tensors)),
    ),
    "narrow": (W24.narrow, lambda: dict(dim=0, start=0, length=4)),
    "to_layout": (W24.to_layout, lambda: dict(name="rowmajor")),
    "SparseLinear": (sk.SparseLinear, lambda: dict(in_features=32, out_features=16)),
    "from_linear": (
        sk.SparseLinear.from_linear,
        lambda: dict(linear=DENSE[0], mask=sk.prune.magnitude_mask(DENSE[0].weight.detach())),
    ),
    "from_sparse24": (sk.SparseLinear.from_sparse24, lambda: dict(w24=W24)),
    "layer.weight": (layer, lambda: dict(value=W24, name="weight")),
    "layer.packed": (layer, lambda: dict(value=None, name="packed")),
    "SparseExperts": (sk.SparseExperts, None),
    "calibrate": (lambda **k: list(sk.calibrate(**k)), lambda: dict(model=DENSE, data=X)),
    "prune_model": (
        sk.prune_model,
        lambda: dict(model=new(DENSE), method="magnitude", calibration=X, progress=False),
    ),
    "compress_model": (sk.compress_model, lambda: dict(model=new(ZEROS))),
    "decompress_model": (sk.decompress_model, lambda: dict(model=new(PRUNED))),
    "num_parameters": (sk.num_parameters, lambda: dict(model=PRUNED)),
    "optimize": (sk.optimize, lambda: dict(model=new(PRUNED))),
    "perplexity": (sk.perplexity, lambda: dict(model=WORDS, token_ids=[1, 2, 3], window=2)),
    "sensitivity": (sk.sensitivity, None),
    "reconstruct": (sk.reconstruct, None),
    "rotate": (sk.rotate, None),
    "save_pretrained": (sk.save_pretrained, None),
    "from_pretrained": (sk.from_pretrained, None),
    "load_into": (sk.load_into, None),
    "calibration_mix": (sk.calibration_mix, None),
    "register_backend": (sk.register_backend, lambda: dict(backend=None)),
    "register_dtype": (sk.register_dtype, lambda: dict(new=None)),
    "register_layout": (sk.register_layout, lambda: dict(new=None)),
    "magnitude_mask": (sk.prune.magnitude_mask, lambda: dict(w=W)),
    "wanda_mask": (sk.prune.wanda_mask, lambda: dict(w=W, act_norm=torch.ones(32))),
    "nm_mask": (sk.prune.nm_mask, lambda: dict(scores=W)),
    "sparsegpt": (sk.prune.sparsegpt, lambda: dict(w=W, hessian=H)),
    "gptq": (sk.prune.gptq, lambda: dict(w=W * MASK, hessian=H, dtype="int8")),
    "rtn": (sk.prune.rtn, lambda: dict(w=W * MASK, dtype="int8")),
    "refine": (sk.prune.refine, lambda: dict(w=W, pruned=W * MASK, mask=MASK, hessian=H)),
    "relative_error": (
        sk.prune.relative_error,
        lambda: dict(w=W, w_pruned=W * MASK, hessian=H),
    ),
    "retarget": (sk.prune.retarget, lambda: dict(w=W, hessian=H)),
    "Hessian": (sk.prune.Hessian, lambda: dict(in_features=32)),
    "unregister_method": (sk.prune.unregister_method, lambda: dict(name="none")),
    "transposable_mask": (sk.finetune.transposable_mask, lambda: dict(scores=W)),
    "zeros_mask": (sk.finetune.zeros_mask, lambda: dict(weight=W * MASK)),
    "Masked": (sk.finetune.Masked, lambda: dict(model=new(ZEROS))),
    "SparseTrainingLinear": (sk.finetune.SparseTrainingLinear, lambda: dict(weight=W)),
    "sparse_training": (sk.finetune.sparse_training, lambda: dict(model=new(DENSE))),
    "finish_training": (sk.finetune.finish_training, lambda: dict(model=new(DENSE))),
    "Recipe": (sk.finetune.Recipe, lambda: dict(steps=1)),
    "from_json": (sk.PruneReport.from_json, lambda: dict(text="{}")),
}
# Arguments that a call with right ones would use for long, or write to.
LONG = {"resume", "path", "rotate", "reconstruct", "out"}


def names_of(function) -> list[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind not in kinds]


def complaint(function, arguments: dict) -> str | None:
    """What is wrong with how a function takes these arguments."""
    try:
        function(**arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        ours = str(error).startswith("sparsekern") and "expected" in str(error)
        return None if ours else f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS)
def test_odd_values(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, right = CALLS[call]
    wrong = []
    if right is None:  # no right call is quick: the first argument decides, before anything else
        first = names_of(function)[0]
        filled = {
            p.name: None
            for p in list(inspect.signature(function).parameters.values())[1:]
            if p.default is p.empty and p.kind is not p.VAR_KEYWORD
        }
        cases = [(first, key, {first: value, **filled}) for key, value in ODD.items()]
        cases = [case for case in cases if not (call.startswith("from_") and case[1] == "'x'")]
    else:
        taken = dict.fromkeys([*right(), *names_of(function)])
        cases = [
            (name, key, {**right(), name: value})
            for name in taken
            if name not in LONG and not (call.startswith("layer") and name == "name")
            for key, value in ODD.items()
        ]
    for name, key, arguments in cases:
        text = complaint(function, arguments)
        if text is not None:
            wrong.append(f"{name}={key}: {text[:120]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("model", "x", "expected model: an nn.Module, got 'x'"),
        ("steps", 1.5, "expected steps: a whole number, got 1.5. The default is 3"),
        ("steps", True, "expected steps: a whole number, got True"),
        ("steps", 10**9, "expected steps from 0 to 10, got 1000000000"),
        ("rate", float("nan"), "expected rate from 0 to 1, got nan"),
        ("rate", "1", "expected rate: a number or None, got '1'"),
        ("flag", "no", "expected flag: True or False, got 'no'"),
        ("where", b"x", "expected where: text or a path or None, got b'x'"),
        ("where", "", "expected where: a path, got ''"),
        ("device", "x", "expected device: a device such as 'cpu' or 'cuda:0', got 'x'"),
        ("device", -1, "expected device: "),
        ("pair", (1, 2, 3), r"expected pair: 2 values, got \(1, 2, 3\)"),
        ("hook", 3, "expected hook: a function or None, got 3"),
        ("tensor", np.zeros(2), "expected tensor: a tensor or None, got array"),
    ],
)
def test_messages(name, value, text):
    with pytest.raises((TypeError, ValueError), match=f"^sparsekern.try: {text}"):
        _tried(**{"model": DENSE, name: value})


def test_what_is_right_passes_through():
    assert _tried(DENSE, np.int64(4), rate=np.float32(0.5), flag=1, pair=[1, 2], device="cpu") == 4
    assert _tried(DENSE, inside="") == 3  # a default that is given
    assert _tried.__name__ == "tried" and "steps" in inspect.signature(_tried).parameters
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        _tried(DENSE, other=1)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: sk.prune_model(model, "magnitude"),
        lambda model: sk.SparseLinear.from_linear(model[1]),
        sk.compress_model,
        sk.num_parameters,
        lambda model: sk.save_pretrained(model, "nowhere"),
    ],
)
def test_a_lazy_layer_without_weights(call):
    model = nn.Sequential(nn.ReLU(), nn.LazyLinear(8))
    with pytest.raises(ValueError, match="expected initialised weights, got LazyLinear at '1?'"):
        call(model)


def test_a_gpu_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="without a usable CUDA GPU. Pass device='cpu'"):
        usable_device("sparsekern.try", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="device: a GPU among the 1 here, got cuda:3"):
        usable_device("sparsekern.try", "cuda:3", "device")


def test_fields_of_a_dataclass():
    recipe = sk.finetune.Recipe(steps=1)
    with pytest.raises(TypeError, match="expected steps: a whole number or None, got 'x'"):
        sk.finetune.Recipe(steps="x")
    object.__setattr__(recipe, "seed", 2**70)
    with pytest.raises(ValueError, match="expected seed from"):
        check_fields("sparsekern.try", recipe, seed=SEEDS)


def _tried_function():
    import os
    from collections.abc import Callable

    def tried(
        model: nn.Module,
        steps: int = 3,
        *,
        rate: float | None = None,
        flag: bool = False,
        where: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
        pair: tuple[int, int] = (2, 4),
        hook: Callable[[int], int] | None = None,
        tensor: Tensor | None = None,
        inside: str | os.PathLike[str] = "",
    ) -> int:
        return int(steps)

    return checked("sparsekern.try", steps=(0, 10), rate=(0, 1))(tried)


_tried = _tried_function()


def test_an_argument_that_nothing_reads():
    calls = []

    @checked("op", uses={"rate": ("steps > 0", lambda given: given["steps"] > 0)})
    def function(model, steps: int = 0, *, rate: object = (1, 2), **more: object):
        calls.append(rate)

    text = r"^op: expected steps > 0 with rate, got rate=3, which nothing reads. Leave rate at "
    with pytest.raises(ValueError, match=text):
        function(None, rate=3)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        function()
    function(None, 1, rate=3)
    function(None, rate=[1, 2])  # the default, as a list
    function(None, steps=0)
    assert calls == [3, [1, 2], (1, 2)]


@pytest.mark.parametrize("seed", [-(2**63), 2**63, 2**64 - 1])
def test_every_seed_that_is_allowed_is_taken(seed):
    from sparsekern.finetune.data import batch_rows

    model, x = build(), tokens(4, 12)
    sk.permute(model, x, seed=seed)
    rounds = sk.Reconstruction(epochs=1, seed=max(seed, 0))  # it has a rule of its own
    sk.prune_model(model, "magnitude", calibration=x, reconstruct=rounds, progress=False)
    assert sorted(batch_rows(8, 8, seed, 1).tolist()) == list(range(8))
    assert folded(seed) == seed and folded(seed * 3) != folded(seed * 3 + 1)


HOMELESS = {
    "prune_model": lambda **on: sk.prune_model(new(DENSE), "magnitude", progress=False, **on),
    "calibrate": lambda **on: sk.calibrate(new(DENSE), [X], **on),
    "rotate": lambda **on: sk.rotate(new(DENSE), [X], **on),
    "permute": lambda **on: sk.permute(new(DENSE), [X], **on),
    "reconstruct": lambda **on: sk.reconstruct(new(ZEROS), new(DENSE), [X], **on),
    "sensitivity": lambda **on: sk.sensitivity(new(DENSE), [X], [X], **on),
    "finetune.distill": lambda **on: sk.finetune.distill(new(ZEROS), new(DENSE), X.long(), **on),
}


@pytest.mark.parametrize("name", HOMELESS)
def test_weights_do_not_go_to_a_device_without_data(name):
    text = f"^sparsekern.{name}: expected device: a device that holds data, got meta. Pass device="
    with pytest.raises(ValueError, match=text):
        HOMELESS[name](device="meta")
