"""Loading model folders: headers against the module tree, then module by module to the device.

A dense copy of a compressed layer never exists, on any device: the tree is built without weights
(checkpoint/skeleton.py), and each of its Linears is replaced by a SparseLinear around tensors that come
straight from the file.
"""

import re
from pathlib import Path

import torch
from torch import nn

from sparsekern.checkpoint.skeleton import (
    build_skeleton,
    import_transformers,
    linear_shape,
    own_tensors,
)
from sparsekern.errors import FormatError, message
from sparsekern.formats.disk import (
    PARTS,
    VALUE_DTYPES,
    check_headers,
    join,
    read_compression_config,
    read_sparse24,
)
from sparsekern.utils.safetensors_io import CONFIG_FILE, OP, TensorFiles, listed, require


def from_pretrained(directory, device="cpu", dtype=None, *, attn_implementation=None):
    """Load a model folder, compressed (sparse-24-bitmask) or dense, as a Transformers model.

    Args:
        directory: config.json and safetensors files, written by save_pretrained,
            compressed-tensors 0.14.0 or Transformers. Nothing is downloaded, no pickle is read.
        device: where the weights go, tensor by tensor.
        dtype: cast floating-point weights to it; None keeps the dtype of each tensor in the file.
        attn_implementation: handed to Transformers ("sdpa", "eager", ...); None takes its
            default.
    Returns:
        The Transformers model in eval mode; layers with compressed tensors are SparseLinear.
    Raises:
        FormatError: damaged or unsupported files (file and tensor named), missing or unexpected
            tensors (listed).
        ImportError: no transformers; use load_into for a module of your own.
    """
    folder = Path(directory)
    files = TensorFiles(folder)
    read_compression_config(folder)
    model = build_skeleton(folder, files.info, attn_implementation)
    _load(model, files, torch.device(device), dtype)
    if (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        transformers = import_transformers("to read generation_config.json")
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(
                str(folder), local_files_only=True
            )
        except Exception as error:
            raise FormatError(
                message(f"{OP}: generation_config.json", "a generation config", str(error), "")
            ) from error
    return model


def load_into(model, directory, *, device=None, dtype=None):
    """Load a folder into an existing module in place; SparseLinear replaces compressed Linears.

    Args:
        model: module with the tree that was saved; parameters may be on the meta device.
        device: None takes the model's (CPU for a model on meta). dtype: as in from_pretrained.
    Returns:
        model.
    Raises:
        FormatError: as from_pretrained; header errors leave the model untouched.
    """
    folder = Path(directory)
    files = TensorFiles(folder)
    if (folder / CONFIG_FILE).is_file():
        read_compression_config(folder)
    if device is None:
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    _load(model, files, torch.device(device), dtype)
    return model


def _load(model, files, device, dtype):
    """Check every name, shape and dtype against the module tree, then stream module by module."""
    layers = check_headers(files)
    aliases = plan(model, files, layers)
    parents = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            parents.setdefault(id(child), []).append((parent, attribute))
    require(
        "" not in layers,
        OP,
        "compressed layers inside a module",
        "the module itself is one",
        "Use SparseLinear.load_state_dict.",
    )

    # id(tensor on the tree) -> what replaced it, so that tied weights stay tied. The id of a tied
    # tensor cannot be reused meanwhile: its other names on the tree keep it alive.
    loaded = {}
    for name in [name for name, _ in model.named_modules()]:  # replaced modules are freed at once
        module = model.get_submodule(name)
        if name in layers:
            sparse = _load_layer(files, name, module, device, dtype)
            for parent, attribute in parents[id(module)]:
                setattr(parent, attribute, sparse)
            continue
        for key, old, is_parameter in list(own_tensors(module)):
            if id(old) not in loaded:
                source = aliases.get(id(old))
                new = (
                    old.to(device) if source is None else _read_dense(files, source, device, dtype)
                )
                loaded[id(old)] = (
                    nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
                )
            (module._parameters if is_parameter else module._buffers)[key] = loaded[id(old)]
        for key in module._non_persistent_buffers_set:
            if module._buffers.get(key) is not None:
                module._buffers[key] = module._buffers[key].to(device)
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    require(
        not left,
        OP,
        "every tensor loaded",
        f"no data for {listed(left)}",
        "This model cannot be rebuilt from its config.",
    )


def plan(model, files, layers):
    """{id(tensor on the tree): name in the files} for a module tree; layers = check_headers(files).

    FormatError lists what is missing, unexpected or misshapen.
    """
    owners, wanted, missing, ignored = {}, set(), [], set()
    modules = dict(model.named_modules())
    replaced = {id(modules[layer]) for layer in layers if layer in modules}
    for layer, shape in layers.items():
        module = modules.get(layer)
        expected = None if module is None else linear_shape(module)
        require(
            expected is not None,
            files.where(join(layer, "compressed")),
            f"a linear layer named '{layer}' in the model",
            "none" if module is None else type(module).__name__,
            "The folder belongs to another model.",
        )
        require(
            expected == shape,
            files.where(join(layer, "compressed")),
            f"a layer of shape {list(expected)} as in the model",
            list(shape),
            "The folder belongs to another model.",
        )
    for name, module in model.named_modules(remove_duplicate=False):
        if name in layers:
            parts = PARTS + (() if getattr(module, "bias", None) is None else ("bias",))
            wanted.update(join(name, part) for part in parts)
            if len(parts) > 3:
                _check_bias(files, name, module.bias, missing)
        if id(module) in replaced:
            continue
        ignored.update(join(name, key) for key in module._non_persistent_buffers_set)
        for key, tensor, _ in own_tensors(module):
            owners.setdefault(id(tensor), (tensor, []))[1].append(join(name, key))
    aliases = {}
    for tensor, names in owners.values():
        present = [name for name in names if name in files.info]
        for name in present or names[:1]:
            _check_dense(files, name, tensor, missing)
        if present:
            aliases[id(tensor)] = present[0]
        wanted.update(names)
        _check_ties(files, present)
    unexpected = [name for name in files.info if name not in wanted and name not in ignored]
    missing = _without(missing, getattr(model, "_keys_to_ignore_on_load_missing", None))
    unexpected = _without(unexpected, getattr(model, "_keys_to_ignore_on_load_unexpected", None))
    problems = [
        f"{len(names)} {kind} ({listed(names)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    require(
        not problems,
        f"{OP}: {files.folder}",
        "the tensors of the model",
        ", ".join(problems),
        "The folder belongs to another model or is incomplete.",
    )
    return aliases


def _without(names, patterns):
    return [
        name for name in names if not any(re.search(pattern, name) for pattern in patterns or ())
    ]


def _check_dense(files, name, tensor, missing):
    """Header of one dense tensor against the tensor it is for; appends to `missing` when there is
    none.
    """
    if name not in files.info:
        missing.append(name)
        return
    info = files.info[name]
    require(
        info.shape == tuple(tensor.shape),
        files.where(name),
        f"shape {list(tensor.shape)} as in the model",
        list(info.shape),
        "The folder belongs to another model.",
    )
    floating = (*VALUE_DTYPES, torch.float64)
    require(
        info.dtype in floating if tensor.is_floating_point() else info.dtype == tensor.dtype,
        files.where(name),
        "dtype "
        + (" | ".join(map(str, floating)) if tensor.is_floating_point() else str(tensor.dtype)),
        info.dtype,
    )


def _check_bias(files, layer, bias, missing):
    """As _check_dense, and in the dtype of the values, which is what SparseLinear computes in."""
    name = join(layer, "bias")
    _check_dense(files, name, bias, missing)
    if name in files.info:
        dtype = files.info[join(layer, "compressed")].dtype
        require(
            files.info[name].dtype == dtype,
            files.where(name),
            f"dtype {dtype} as {layer}.compressed",
            files.info[name].dtype,
        )


def _check_ties(files, names):
    """Names that the model ties may each be in the files, but then with the same contents."""
    if len(names) > 1:
        first, *others = files.read(*names)
        require(
            all(torch.equal(first, other) for other in others),
            files.where(names[0]),
            f"the contents of {listed(names[1:])}, which the model ties to it",
            "different contents",
            "Set tie_word_embeddings to false in config.json if the model does not tie them.",
        )


def _read_dense(files, name, device, dtype):
    tensor = files.read(name, device=device)[0]
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _load_layer(files, name, module, device, dtype):
    """SparseLinear for one compressed layer; `module` is what stands in its place on the tree."""
    from sparsekern.nn.sparse_linear import SparseLinear

    weight = read_sparse24(files, name, device, dtype)
    bias = (
        None
        if getattr(module, "bias", None) is None
        else _read_dense(files, join(name, "bias"), device, dtype)
    )
    return SparseLinear.from_sparse24(weight, bias).train(module.training)
