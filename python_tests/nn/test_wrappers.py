"""Models inside wrappers are pruned, searched and filled as the model inside is, under its names;
models of which a process has only shards are refused, or run."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn

import sparsekern as sk
from python_tests.checkpoint import checkpoint_cases as cases
from sparsekern.finetune import Masked, finish_training, sparse_training
from sparsekern.nn.replace import is_linear
from sparsekern.nn.wrappers import named_modules, unwrapped

transformers = pytest.importorskip("transformers")
IDS = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0))
UP = "model.layers.0.mlp.up_proj"
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not built")
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model)


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPS = [nn.parallel.DistributedDataParallel, nn.DataParallel, averaged, compiled]
wrapped = pytest.mark.parametrize("wrap", WRAPS)


def logits(model):
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(IDS, use_cache=False).logits


@wrapped
def test_names_are_those_of_the_model_inside(wrap, one_process, tmp_path):
    dense = cases.llama()
    plain = copy.deepcopy(dense)
    report = sk.prune_model(plain, "sparsegpt", IDS, keep_hessians=True, **QUIET)
    masks = {UP: sk.prune.magnitude_mask(dense.get_submodule(UP).weight.detach())}

    model = wrap(copy.deepcopy(dense))
    same = sk.prune_model(model, "sparsegpt", IDS, resume=tmp_path / "resume", **QUIET)
    assert [row.name for row in same.layers] == [row.name for row in report.layers]
    assert torch.equal(logits(model), logits(plain))
    again = copy.deepcopy(dense)  # the run of the wrapped model goes on
    sk.prune_model(again, "sparsegpt", IDS, resume=tmp_path / "resume", **QUIET)
    assert torch.equal(logits(again), logits(plain))

    model = wrap(copy.deepcopy(dense))
    options = {"hessians": report.hessians, "masks": masks, "skip": ("*.q_proj", "lm_head")}
    sk.prune_model(model, "sparsegpt", compress=False, **options, **QUIET)
    masked = Masked.from_report(
        model, sk.prune_model(model, "magnitude", masks=masks, compress=False, **QUIET)
    )
    assert UP in masked.masks

    sk.save_pretrained(plain, tmp_path / "pruned")
    model = wrap(copy.deepcopy(dense))
    assert sk.load_into(model, tmp_path / "pruned") is model
    assert torch.equal(logits(model), logits(plain))
    assert sk.decompress_model(model) is model
    assert not any(isinstance(m, sk.SparseLinear) for m in model.modules())


def block_by_block(wrap):
    def each(model):
        layers = model.model.layers
        for i, layer in enumerate(layers):
            layers[i] = wrap(layer)
        return model

    return each


def checkpointed(module):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    return checkpoint_wrapper.checkpoint_wrapper(module)


@pytest.mark.parametrize("wrap", [compiled, checkpointed, nn.DataParallel])
def test_names_have_no_wrappers_of_blocks(wrap, tmp_path):
    dense = cases.llama()
    plain, model = copy.deepcopy(dense), block_by_block(wrap)(copy.deepcopy(dense))
    report = sk.prune_model(plain, "magnitude", skip=(UP, "lm_head"), compress=False, **QUIET)
    same = sk.prune_model(model, "magnitude", skip=(UP, "lm_head"), compress=False, **QUIET)
    assert [row.name for row in same.layers] == [row.name for row in report.layers]
    masks = Masked.from_report(plain, report).masks
    assert (
        masks.keys() == Masked.from_report(model, same).masks.keys() == Masked(model).masks.keys()
    )
    by = {"by": "layer", "window": 16, "windows": 1, "progress": False}
    found = sk.sensitivity(copy.deepcopy(dense), IDS, IDS.flatten(), method="magnitude", **by)
    inside = block_by_block(wrap)(copy.deepcopy(dense))
    same = sk.sensitivity(inside, IDS, IDS.flatten(), method="magnitude", **by)
    assert [row.name for row in same.rows] == [row.name for row in found.rows]
    run = functools.partial(sk.prune_model, method="magnitude", resume=tmp_path / "run", **QUIET)
    run(inside)
    run(block_by_block(wrap)(copy.deepcopy(dense)))  # goes on, as it does without wrappers
    run(copy.deepcopy(dense))
    sk.compress_model(model)
    sk.save_pretrained(model, tmp_path / "out")
    assert torch.equal(logits(sk.from_pretrained(tmp_path / "out")), logits(model))


def mixtral():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval()


def part_by_part(wrap):
    """Around every block, and within it around its first linear layer."""

    def each(model):
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        for i, block in enumerate(blocks):
            name = next(n for n, m in block.named_modules() if is_linear(m))
            block.set_submodule(name, wrap(block.get_submodule(name)))
            blocks[i] = wrap(block)
        return model

    return each


def both(module):
    return compiled(checkpointed(module))


INSIDE = [compiled, checkpointed, both, nn.parallel.DistributedDataParallel]


@pytest.mark.parametrize("wrap", INSIDE)
@pytest.mark.parametrize("make", [cases.llama, cases.gpt2, mixtral])
def test_parts_inside_wrappers_are_filled_and_made_dense(make, wrap, one_process, tmp_path):
    pruned = make()
    sk.prune_model(pruned, "magnitude", **QUIET)
    sk.save_pretrained(pruned, tmp_path)
    model = part_by_part(wrap)(make())
    before = [type(m) for m in model.modules() if unwrapped(m) is not m]
    with torch.no_grad():
        model(IDS)  # torch.compile has made something of the dense layers
    sk.load_into(model, tmp_path)
    after = [type(m) for m in model.modules() if unwrapped(m) is not m]
    assert after == before and len(before) >= 2
    assert torch.equal(logits(model), logits(pruned))
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, logits(pruned), atol=1e-5)
    sk.decompress_model(model)
    kinds = [
        sorted(type(unwrapped(m)).__name__ for _, m in named_modules(m)) for m in (model, make())
    ]
    assert kinds[0] == kinds[1]
    assert torch.allclose(logits(model), logits(pruned), atol=1e-5)


def test_a_folder_that_does_not_fit_leaves_the_wrappers(tmp_path):
    sk.save_pretrained(cases.sparsify(cases.llama(hidden=16)), tmp_path)
    model = part_by_part(compiled)(cases.llama())
    names, before = [name for name, _ in model.named_modules()], logits(model)
    with pytest.raises(ValueError, match="tensor 'model.layers.0.mlp.down_proj.compressed'"):
        sk.load_into(model, tmp_path)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("wrap", [compiled, checkpointed])
def test_experts_in_wrapped_blocks_are_masked_under_their_names(wrap):
    plain = mixtral()
    sk.prune_model(plain, "magnitude", compress=False, **QUIET)
    model = block_by_block(wrap)(copy.deepcopy(plain))
    masked, same = Masked(plain), Masked(model)
    assert same.masks.keys() == masked.masks.keys()
    assert "model.layers.0.mlp.experts.down_proj" in same.masks
    assert same.compress() == masked.compress()
    assert torch.equal(logits(model), logits(plain))


@wrapped
def test_searches_see_the_model_inside(wrap, one_process):
    dense = cases.llama(tied=False)
    for search in (lambda m: sk.rotate(m, IDS, steps=1), lambda m: sk.permute(m, IDS)):
        plain, model = copy.deepcopy(dense), wrap(copy.deepcopy(dense))
        logits(model)  # a compiled model has run
        wanted, found = search(plain), search(model)
        assert (found.lost_before, found.lost_after) == (wanted.lost_before, wanted.lost_after)
        assert torch.equal(logits(model), logits(plain))
    for search in (lambda m: sk.rotate(m, IDS, steps=1), lambda m: sk.permute(m, IDS)):
        plain, model = copy.deepcopy(dense), part_by_part(wrap)(copy.deepcopy(dense))
        wanted, found = search(plain), search(model)
        assert (found.lost_before, found.lost_after) == (wanted.lost_before, wanted.lost_after)
        assert torch.equal(logits(model), logits(plain))
    model = wrap(part_by_part(checkpointed)(copy.deepcopy(dense)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a preset that is not done in full
        report = sk.prune_model(model, calibration=IDS, preset="best", batch_size=1, **QUIET)
    assert "skipped" not in report.rotation


@wrapped
def test_sparse_training_inside(wrap, one_process):
    model = wrap(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    assert sparse_training(model) == ["0", "1"] == finish_training(model)
    layer = wrap(nn.Linear(8, 8))
    assert sparse_training(layer) == [""] == finish_training(layer)
    assert sum(isinstance(m, sk.SparseLinear) for m in layer.modules()) == 1


def test_asp_knows_compiled_blocks():
    from sparsekern.asp import ASP

    model = block_by_block(compiled)(cases.llama())
    kinds = {"verbosity": 0, "allow_permutation": False}
    left, pruned = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
    ASP.init_model_for_pruning(model, disallowed_layer_names=[left], **kinds)
    names = {name.removesuffix(".weight") for name in ASP.masked(model).masks}
    ASP.forget(model)
    assert pruned in names and left not in names


def test_models_without_data_are_refused_by_name():
    dense = cases.llama()
    pruned = cases.sparsify(copy.deepcopy(dense))
    with torch.device("meta"):
        empty = cases.llama()
    sk.prune_model(dense, "magnitude", compress=False, **QUIET)
    one = {"steps": 1, "batch": 2, "device": "cpu", "progress": False}
    calls = {
        "model": lambda: sk.perplexity(empty, IDS.flatten(), window=16),
        "dense": lambda: sk.reconstruct(pruned, empty, IDS),
        "teacher": lambda: sk.finetune.distill(dense, empty, IDS, **one),
        "model: a": lambda: sparse_training(empty),
    }
    for name, call in calls.items():
        text = f"expected {name}.* whose weights hold data, got one on meta. Load the weights"
        with pytest.raises(ValueError, match=text):
            call()


def test_conv1d_and_config_inside_a_wrapper():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    sk.prune_model(model, "magnitude", skip=(), **QUIET)
    model.config.quantization_config = {"quant_method": "sparsekern"}  # as a loaded folder has it
    before = logits(model)
    sk.decompress_model(nn.DataParallel(model))
    assert type(model.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(logits(model), before)


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def flat(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a world of one process
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


@pytest.mark.parametrize("shard", [sharded, flat])
def test_shards_are_refused_by_name(shard, one_process, tmp_path):
    dense = cases.llama()
    pruned = cases.sparsify(copy.deepcopy(dense))
    sk.save_pretrained(pruned, tmp_path / "pruned")
    model, other = shard(copy.deepcopy(dense)), shard(pruned)
    calls = {
        "prune_model": lambda: sk.prune_model(model, "magnitude", **QUIET),
        "calibrate": lambda: next(iter(sk.calibrate(model, IDS))),
        "compress_model": lambda: sk.compress_model(other),
        "rotate": lambda: sk.rotate(model, IDS),
        "permute": lambda: sk.permute(model, IDS),
        "reconstruct": lambda: sk.reconstruct(other, dense, IDS),
        "sensitivity": lambda: sk.sensitivity(model, IDS, IDS.flatten(), window=16),
        "load_into": lambda: sk.load_into(model, tmp_path / "pruned"),
        "tensor_parallel": lambda: sk.tensor_parallel(other),
        "finetune.sparse_training": lambda: sparse_training(model),
        "save_pretrained": lambda: sk.save_pretrained(other, tmp_path / "again"),
    }
    for name, call in calls.items():
        text = f"sparsekern.{name}: expected a model with whole weights, got .* before it is shard"
        with pytest.raises(ValueError, match=text):
            call()
    assert not (tmp_path / "again").exists()


def test_a_sharded_model_is_evaluated_and_masked(one_process):
    plain = cases.llama()
    sk.prune_model(plain, "magnitude", compress=False, **QUIET)
    model = sharded(copy.deepcopy(plain))
    text = IDS.flatten()
    assert sk.perplexity(model, text, window=16) == sk.perplexity(plain, text, window=16)
    with pytest.raises(ValueError, match=r"Make it before fully_shard, .* or pass masks="):
        Masked(model)
