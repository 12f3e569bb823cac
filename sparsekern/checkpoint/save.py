"""Pruned models on disk: save_pretrained, from_pretrained, load_into, verify_checkpoint,
export_dense.

    model ── save_pretrained ──► folder ── from_pretrained ──► model, same logits bit for bit
                                   │ ───── load_into ────────► a module of your own
                                   └────── export_dense ─────► folder with dense weights

The folder is what Transformers writes (config.json, safetensors shards, index, tokenizer,
generation config), with pruned layers in compressed-tensors' sparse-24-bitmask format
(formats/disk.py). This file writes; checkpoint/load.py reads.
"""

import json
import warnings

import torch

from sparsekern.checkpoint.skeleton import linear_shape, own_tensors, skeleton_of
from sparsekern.errors import check
from sparsekern.formats.disk import compression_config, join
from sparsekern.oneshot.discovery import is_conv1d
from sparsekern.utils.safetensors_io import CONFIG_FILE, OP, listed
from sparsekern.utils.staging import StagedFolder, write_shards


def save_pretrained(model, directory, *, tokenizer=None, max_shard_size=5 * 2**30):
    """Write a model to a folder: compressed layers as sparse-24-bitmask, the rest as it is.

    All files are written under temporary names and renamed when the last one is complete; an
    error or interruption before that leaves the folder untouched. Tied weights are stored once.
    Host memory: one shard.

    Args:
        model: Transformers model or any nn.Module, on any device, with SparseLinear modules where
            it was pruned.
        directory: created if needed; the files of an earlier checkpoint in it are replaced.
        tokenizer: anything with save_pretrained(folder), or None.
        max_shard_size: bytes per safetensors file.
    Raises:
        ValueError: a parameter on the meta device, or max_shard_size < 1.
    Notes:
        Buffers that Transformers keeps out of files (rotary frequencies) are recomputed at load.
        Where this model's differ, as after model.to(torch.bfloat16), a UserWarning names them:
        the loaded model then uses the exact ones.
    """
    from sparsekern.nn.sparse_linear import SparseLinear

    skeleton = skeleton_of(model)
    _warn_lost_buffers(model, skeleton)
    sparse = {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    dense = _dense_tensors(model, sparse)
    linears = _linears(model, sparse, skeleton)
    groups = []
    for name, module in model.named_modules():
        if name in sparse:
            groups.append(_sparse_group(name, module))
        else:
            keys = (join(name, key) for key, _, _ in own_tensors(module))
            groups += [_dense_group(key, dense[key]) for key in keys if key in dense]

    config = _config(model, sparse, dense)
    if sparse:
        total = sum(m.out_features * m.in_features for m in sparse.values())
        share = total / 2 / (total + sum(tensor.numel() for tensor in dense.values()))
        config["quantization_config"] = compression_config(linears, sparse, share)
    transposed = sorted(name for name in sparse if linears[name] == "Conv1D")
    if transposed:
        config["sparsekern"] = {"transposed": transposed}  # export_dense writes these as [in, out]
    with StagedFolder(directory) as stage:
        write_shards(stage, groups, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(stage.path))
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(str(stage.path))
        stage.write_json(CONFIG_FILE, config)
        stage.commit()


def _dense_tensors(model, sparse):
    """{name: tensor} of everything that is stored as it is; tied weights under their first name
    only.
    """
    found, seen = {}, set()
    for name, module in model.named_modules():
        for key, tensor, _ in own_tensors(module) if name not in sparse else ():
            where = f"{OP}: {join(name, key)}"
            check(
                not tensor.is_meta,
                where,
                "a tensor with data",
                "one on meta",
                "Load the weights first.",
            )
            if _identity(tensor) not in seen:
                seen.add(_identity(tensor))
                found[join(name, key)] = tensor
    return found


def _linears(model, sparse, skeleton):
    """{name: "Linear" | "Conv1D"} of all linear layers; the skeleton knows what a SparseLinear
    was before.
    """
    originals = dict(skeleton.named_modules()) if skeleton is not None else {}
    linears = {}
    for name, module in model.named_modules():
        if is_conv1d(originals.get(name, module)):
            linears[name] = "Conv1D"
        elif name in sparse or linear_shape(module) is not None:
            linears[name] = "Linear"
    return linears


def _identity(tensor):
    """Equal for two names of the same elements (tied weights)."""
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()


def _on_cpu(tensor):
    return tensor.detach().cpu().contiguous()


def _dense_group(name, tensor):
    return tensor.numel() * tensor.element_size(), lambda: {name: _on_cpu(tensor)}


def _sparse_group(name, module):
    rows, columns = module.out_features, module.in_features
    bias = 0 if module.bias is None else module.bias.numel() * module.bias.element_size()
    nbytes = (
        rows * (columns // 2) * module.weight.dtype.itemsize + rows * -(-columns // 8) + 16 + bias
    )

    def make():
        weight = module.weight.rowmajor()
        tensors = {
            "compressed": weight.values,
            "bitmask": weight.bitmask(),
            "shape": torch.tensor([[rows], [columns]]),
        }
        if module.bias is not None:
            tensors["bias"] = module.bias
        return {join(name, part): _on_cpu(tensor) for part, tensor in tensors.items()}

    return nbytes, make


def _config(model, sparse, dense):
    """config.json of the model as a dict; {} for a module that has no Transformers config."""
    if not hasattr(getattr(model, "config", None), "to_json_string"):
        return {}
    config = json.loads(model.config.to_json_string())
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    dtypes = [m.weight.dtype for m in sparse.values()]
    dtypes += [tensor.dtype for tensor in dense.values() if tensor.is_floating_point()]
    if dtypes:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(max(dict.fromkeys(dtypes), key=dtypes.count)).removeprefix("torch.")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if any(head is module for module in sparse.values()):
        config["tie_word_embeddings"] = False  # a compressed head has weights of its own
    return config


def _warn_lost_buffers(model, skeleton):
    if skeleton is None:
        return
    rebuilt = dict(skeleton.named_buffers())
    stored = {
        join(name, key)
        for name, module in model.named_modules()
        for key, _, _ in own_tensors(module)
    }
    lost = [
        name
        for name, buffer in model.named_buffers()
        if name not in stored
        and name in rebuilt
        and not rebuilt[name].is_meta
        and not _same(buffer, rebuilt[name])
    ]
    if lost:
        warnings.warn(
            "sparsekern.save_pretrained: buffers that no file holds differ from what the config "
            f"gives, and the loaded model will use the config's: {listed(lost)}. Casting a whole "
            "model with .to(dtype) does this; cast when loading it instead (dtype=).",
            stacklevel=3,
        )


def _same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.cpu(), b.cpu())
