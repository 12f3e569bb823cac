"""Models without weights: built from a config.json with every parameter on the meta device and
every buffer real.

A checkpoint loader needs the module tree before it has a single weight. Parameters cost nothing
on the meta device, but buffers that are not in any file (rotary frequencies, position tables,
embedding scales) must come out of the constructors with their true values; building everything on
meta would leave them empty and every model family would need its own repair. Transformers is
imported when a model is asked for, not before.

By hand: accelerate's init_empty_weights does the same, and would be a dependency for one function.
"""

import contextlib
import copy

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sparsekern.errors import FormatError, message
from sparsekern.oneshot.discovery import is_conv1d
from sparsekern.utils.safetensors_io import CONFIG_FILE, OP, read_json, require

COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)
SIZES = (
    "hidden_size",
    "n_embd",
    "vocab_size",
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "word_embed_proj_dim",
)


class _EmptyOnMeta(TorchFunctionMode):
    """torch.empty without a device allocates on meta: what layers use for weights, and what
    nothing uses for real data.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextlib.contextmanager
def meta_parameters():
    """Context in which modules are built with parameters on meta and real buffers. Not
    thread-safe: it patches nn.Module.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module, name, param):
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.data.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register


def import_transformers(why):
    """The transformers module, or ImportError that says what needs it and how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            message(
                OP,
                f"the package transformers {why}",
                "an environment without it",
                "pip install 'sparsekern[hf]', or use load_into for a model of your own.",
            )
        ) from error
    return transformers


def skeleton_of(model):
    """A copy of a Transformers model's tree as its config builds it, without weights; None for
    other modules.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string") or not hasattr(type(model), "config_class"):
        return None
    with meta_parameters():
        return type(model)(copy.deepcopy(config))


def build_skeleton(folder, info, attn_implementation=None):
    """The model that folder/config.json describes, without weights (parameters on meta, buffers
    on the CPU), in eval mode.

    Args:
        folder: pathlib.Path of the checkpoint.
        info: {tensor name: TensorInfo}; bounds the sizes that the config may ask for.
        attn_implementation: passed to Transformers; None takes its default.
    Raises:
        FormatError: no usable config.json. ImportError: no transformers.
    """
    transformers = import_transformers("to build the model from its config.json")
    where = f"{OP}: {CONFIG_FILE}"
    raw = read_json(folder / CONFIG_FILE)
    require(
        isinstance(raw.get("model_type"), str),
        where,
        "a Transformers config with 'model_type'",
        repr(raw.get("model_type")),
        "Use load_into(model, folder) for a plain module.",
    )
    elements = sum(entry.nbytes for entry in info.values())
    for keys, limit in ((COUNTS, len(info)), (SIZES, elements)):
        for key in keys:
            value = raw.get(key)
            require(
                not isinstance(value, int) or value <= limit,
                where,
                f"{key} to fit the tensors in the folder (<= {limit})",
                value,
                "The config belongs to another model.",
            )
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        for extra in ("quantization_config", "compression_config", "sparsekern"):
            if hasattr(config, extra):
                delattr(config, extra)  # about the files; a model in memory has its modules
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        cls = _model_class(transformers, raw, config)
        with meta_parameters():
            model = cls(config)
    except ImportError:
        raise
    except Exception as error:  # whatever a constructor makes of nonsense becomes one error
        raise FormatError(
            message(
                where,
                "a config that Transformers can build",
                f"{type(error).__name__}: {error}",
                "",
            )
        ) from error
    return model.eval()


def _model_class(transformers, raw, config):
    """The class named by config 'architectures' where it is a Transformers model, else the causal
    LM of the model_type.
    """
    for name in raw.get("architectures") or ():
        cls = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    return transformers.AutoModelForCausalLM._model_mapping[type(config)]


def linear_shape(module):
    """(out_features, in_features) of a module that a compressed layer can stand for, else None."""
    from sparsekern.nn.sparse_linear import SparseLinear

    if is_conv1d(module):
        return module.weight.shape[1], module.weight.shape[0]
    return (
        (module.out_features, module.in_features)
        if isinstance(module, (nn.Linear, SparseLinear))
        else None
    )


def own_tensors(module):
    """(name, tensor, is_parameter) of a module's parameters and persistent buffers, children
    excluded.
    """
    for name, tensor in module._parameters.items():
        if tensor is not None:
            yield name, tensor, True
    for name, tensor in module._buffers.items():
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor, False
