"""One change between a run and its continuation, of any kind: the continuation is refused, or its
result is that of a run from the start with that change. Never a mixture."""

import functools
import shutil
import types

import pytest
import torch
from torch import nn

from python_tests.oneshot.driver_models import build, tokens
from sparsekern.oneshot import fingerprint
from sparsekern.oneshot.prune_model import prune_model

LAST = "block-00001.safetensors"
settings = types.ModuleType("settings_of_a_user")
settings.FACTOR = 1.0
SCALE = 1.0


def run(model, resume, method="wanda", calibration=None, **options):
    options = {"device": "cpu", "batch_size": 2, "progress": False, **options}
    data = tokens() if calibration is None else calibration
    return prune_model(model, method, data, resume=resume, **options)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """{method: the folder of a run whose last block is missing}, made when it is asked for."""
    made = {}

    def of(method, **options):
        key = (method if isinstance(method, str) else id(method), repr(sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("begun")
            run(build(), folder, method, **options)
            (folder / LAST).unlink()
            made[key] = folder, method  # holds the function, so that no id is reused
        return made[key][0]

    return of


def continued(folder, tmp_path, change=lambda model: None, expected=None, **call):
    """What came of it: "refused", or "equal" to a run from the start."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    resumed, fresh = build(), build()
    change(resumed)
    change(fresh)
    try:
        assert run(resumed, copy, **call).resumed > 0
    except ValueError as error:
        assert "the run that" in str(error)
        return "refused"
    run(fresh, None, **call)
    ours, theirs = resumed.state_dict(), fresh.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    return "equal"


# ---- the model -----------------------------------------------------------------------------------


def mlp(model, block=0):
    return model.model.layers[block].mlp


def permuted_channels(model):
    for name in ("gate_proj", "up_proj"):
        layer = getattr(mlp(model), name)
        layer.weight.data = layer.weight.data.flip(0)
    mlp(model).down_proj.weight.data = mlp(model).down_proj.weight.data.flip(1)


def reversed_rows(model):
    mlp(model).up_proj.weight.data = mlp(model).up_proj.weight.data.flip(0)


def one_bit(model):
    mlp(model, 1).down_proj.weight.data.view(torch.int32)[3, 5] ^= 1


def negative_zero(model):
    mlp(model).up_proj.weight.data[0, 0] = -0.0


def swapped_blocks(model):
    first, second = model.model.layers
    model.model.layers[0], model.model.layers[1] = second, first


def buffer(model):
    model.model.rotary_emb.inv_freq[1] *= 2


def embedding(model):
    model.model.embed_tokens.weight.data[7] *= 2


def norm(model):
    model.model.norm.weight.data[0] = 3


def eps(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-2


def activation(model):
    mlp(model).act_fn = nn.GELU()


def scaling(model):
    model.model.layers[1].self_attn.scaling = 0.1


def config_theta(model):
    model.config.rope_parameters = {"rope_theta": 7.0, "rope_type": "default"}


def config_eps(model):
    model.config.rms_norm_eps = 1e-3


def attention(model):
    model.config._attn_implementation = "eager"


def half_the_heads(model):
    model.model.layers[0].self_attn.num_key_value_groups = 4


def private_attribute(model):
    model.model.layers[0]._factor = 2.0


def own_forward(model):
    layer = mlp(model)
    inner = layer.forward
    layer.forward = lambda x: 2 * inner(x)


def hook(model):
    mlp(model).register_forward_hook(lambda module, args, output: output * 3)


def other_class(model):
    class Doubled(type(mlp(model))):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp(model).__class__ = Doubled


def bfloat16(model):
    model.to(torch.bfloat16)


def tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def training_flag(model):
    model.train()


def name_or_path(model):
    model.config._name_or_path = "elsewhere"


MODELS = [
    permuted_channels,
    reversed_rows,
    one_bit,
    negative_zero,
    swapped_blocks,
    buffer,
    embedding,
    norm,
    eps,
    activation,
    scaling,
    config_theta,
    config_eps,
    attention,
    half_the_heads,
    private_attribute,
    own_forward,
    hook,
    other_class,
    bfloat16,
    tied,
]


@pytest.mark.parametrize("change", MODELS, ids=lambda change: change.__name__)
def test_a_changed_model(change, begun, tmp_path):
    assert continued(begun("wanda"), tmp_path, change) == "refused"


@pytest.mark.parametrize("change", [training_flag, name_or_path], ids=lambda c: c.__name__)
def test_a_model_that_computes_the_same(change, begun, tmp_path):
    assert continued(begun("wanda"), tmp_path, change) == "equal"


@pytest.mark.parametrize("name", sorted(fingerprint._CACHED))
def test_what_transformers_notes_in_a_class_is_not_the_model(name, monkeypatch):
    """It is there or not according to what else the process did."""
    model = build()
    kind = type(model)
    monkeypatch.setattr(kind, name, None, raising=False)
    before = fingerprint.of_model(model)
    monkeypatch.setattr(kind, name, True)
    assert fingerprint.of_model(model) == before
    monkeypatch.setattr(kind, "_something_else", True, raising=False)
    assert fingerprint.of_model(model) != before


# ---- data and options ----------------------------------------------------------------------------


def one_token():
    ids = tokens()
    ids[3, 4] = 3 if ids[3, 4] != 3 else 4
    return ids


MASK = torch.ones_like(tokens())
MASK[0, 12:] = 0
CALLS = {
    "another order of samples": (dict(calibration=tokens().flip(0)), "refused"),
    "tokens reversed": (dict(calibration=tokens().flip(1)), "refused"),
    "one token": (dict(calibration=one_token()), "refused"),
    "one sample less": (dict(calibration=tokens()[:-1]), "refused"),
    "padding": (
        dict(calibration={"input_ids": tokens(), "attention_mask": MASK}),
        "refused",
    ),
    "the same as int32": (dict(calibration=tokens().int()), "equal"),
    "the same as a list": (dict(calibration=tokens().tolist()), "equal"),
    "batches of 3": (dict(batch_size=3), "refused"),
    "skip": (dict(skip=("lm_head", "*.q_proj")), "refused"),
    "targets": (dict(targets=("*.up_proj", "*.down_proj")), "refused"),
    "no compression": (dict(compress=False), "refused"),
    "true_sequential": (dict(true_sequential=True), "refused"),
    "another pattern": (dict(compress=False, pattern=(4, 8)), "refused"),
    "on_error": (dict(on_error="skip"), "refused"),
    "refine": (dict(refine=2), "refused"),
    "a mask": (
        dict(
            masks={
                "model.layers.0.mlp.up_proj": torch.tensor([True, True, False, False] * 8).expand(
                    64, -1
                )
            }
        ),
        "refused",
    ),
    "undo": (dict(undo=False), "equal"),
    "offloading": (dict(offload_activations=True), "equal"),
    "another method": (dict(method="magnitude"), "refused"),
}


@pytest.mark.parametrize("name", CALLS)
def test_another_call(name, begun, tmp_path):
    call, expected = CALLS[name]
    assert continued(begun("wanda"), tmp_path, **call) == expected


@pytest.mark.parametrize(
    "change", [dict(damp=0.1), dict(blocksize=8), dict(match_dense=0.5)], ids=str
)
def test_another_option_of_sparsegpt(change, begun, tmp_path):
    folder = begun("sparsegpt", refine=0)
    assert continued(folder, tmp_path, method="sparsegpt", refine=0, **change) == "refused"


# ---- the function --------------------------------------------------------------------------------


def closure(value):
    def score(w, hessian):
        return w.abs() if value == 1 else w.abs() * torch.arange(w.shape[1]) * value

    return score


def default(value):
    def score(w, hessian, factor=value):
        return (w + factor - 1).abs()

    return score


def keyword_default(value):
    def score(w, hessian, *, factor=value):
        return (w + factor - 1).abs()

    return score


def tensor_in_closure(value):
    return closure(torch.tensor(float(value)))


def list_in_closure(value):
    parts = [1, [2, value]]

    def score(w, hessian):
        return (w + parts[1][1] - 1).abs()

    return score


def plus(w, hessian, factor):
    return (w + factor - 1).abs()


def partial(value):
    return functools.partial(plus, factor=value)


def partial_by_position(value):
    return functools.partial(lambda factor, w, hessian: (w + factor - 1).abs(), value)


class Scorer:
    def __init__(self, value):
        self.value = value

    def __call__(self, w, hessian):
        return (w + self.value - 1).abs()

    def score(self, w, hessian):
        return (w - self.value + 1).abs()


def bound_method(value):
    return Scorer(value).score


def class_attribute(value):
    class Attribute:
        factor = value

        def __call__(self, w, hessian):
            return (w + self.factor - 1).abs()

    return Attribute()


def code(value):
    if value == 1:
        return lambda w, hessian: w.abs()
    return lambda w, hessian: -w.abs()


def constant(value):
    space = {"torch": torch}
    exec(f"def score(w, hessian):\n    return (w + {value} - 1).abs()\n", space)
    return space["score"]


def a_global(value):
    space = {"FACTOR": value}
    exec("def score(w, hessian):\n    return (w + FACTOR - 1).abs()\n", space)
    return space["score"]


def helper(value):
    space = {}
    exec(f"def inner(w):\n    return w + {value} - 1\n", space)
    exec("def score(w, hessian):\n    return inner(w).abs()\n", space)
    return space["score"]


def wrapped(value):
    def decorate(function):
        @functools.wraps(function)
        def score(w, hessian):
            return function(w + value - 1, hessian)

        return score

    return decorate(lambda w, hessian: w.abs())


def attribute_of_a_module(value):
    module = types.ModuleType("settings_of_a_user")
    module.FACTOR = value
    space = {"settings": module}
    exec("def score(w, hessian):\n    return (w + settings.FACTOR - 1).abs()\n", space)
    return space["score"]


def attribute_of_a_class(value):
    space = {"Settings": type("Settings", (), {"FACTOR": value, "__module__": "a_user"})}
    exec("def score(w, hessian):\n    return (w + Settings.FACTOR - 1).abs()\n", space)
    return space["score"]


FUNCTIONS = [
    closure,
    default,
    keyword_default,
    tensor_in_closure,
    list_in_closure,
    partial,
    partial_by_position,
    Scorer,
    bound_method,
    class_attribute,
    code,
    constant,
    a_global,
    helper,
    wrapped,
    attribute_of_a_module,
    attribute_of_a_class,
]


@pytest.mark.parametrize("make", FUNCTIONS, ids=lambda make: make.__name__)
def test_another_function(make, tmp_path):
    first, second = make(1), make(2)
    folder = tmp_path / "begun"
    run(build(), folder, first)
    (folder / LAST).unlink()
    assert continued(folder, tmp_path, method=make(1)) == "equal"
    shutil.rmtree(tmp_path / "copy")
    assert continued(folder, tmp_path, method=second) == "refused"


def test_a_forward_that_reads_a_global(tmp_path, monkeypatch):
    """A model of one's own: what its forward reads besides itself counts, too."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.down(self.up(x) * SCALE)

    def prune():
        torch.manual_seed(0)
        return prune_model(Scaled(), "wanda", [torch.randn(8, 16)], resume=tmp_path, progress=False)

    prune()
    assert prune().resumed == 1
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    with pytest.raises(ValueError, match="weights: "):
        prune()
