"""The words of Transformers' from_pretrained and save_pretrained in ours: taken, or refused by
name; and names on disk that cannot be made."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from python_tests.checkpoint import checkpoint_cases as cases
from sparsekern.checkpoint import (
    from_pretrained,
    load_into,
    save_pretrained,
    verify_checkpoint,
)
from sparsekern.errors import FormatError
from sparsekern.nn.sparse_linear import SparseLinear

transformers = pytest.importorskip("transformers")
TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "pruned"
    save_pretrained(cases.sparsify(cases.llama()), path)
    return path


TAKEN = [
    dict(state_dict=None),
    dict(from_tf=False),
    dict(from_flax=False),
    dict(load_in_8bit=False),
    dict(generation_config=None),
    dict(proxies=None),
    dict(resume_download=True),
    dict(use_safetensors=True),
    dict(low_cpu_mem_usage=True),
    dict(weights_only=True),
    dict(local_files_only=True),
    dict(config=None),
]


@pytest.mark.parametrize("words", TAKEN, ids=str)
def test_words_that_ask_for_nothing_more(words, folder):
    from_pretrained(folder, **words)


REFUSED = [
    (dict(state_dict={}), "state_dict None"),
    (dict(from_tf=True), "from_tf None or False, got True"),
    (dict(load_in_8bit=True), "load_in_8bit"),
    (dict(proxies={"http": "x"}), "proxies"),
    (dict(config=3), "config to be a Transformers config, a dict or a path, got int"),
    (dict(nonsense=1), "'nonsense'"),
]


@pytest.mark.parametrize("words, text", REFUSED, ids=str)
def test_words_that_are_refused_by_name(words, text, folder):
    with pytest.raises(
        (TypeError, ValueError), match=f"sparsekern.from_pretrained: expected .*{text}"
    ):
        from_pretrained(folder, **words)


def test_a_config_of_the_callers(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    config.rms_norm_eps = 1e-2
    ours = from_pretrained(folder, config=config)
    assert ours.config.rms_norm_eps == 1e-2
    assert from_pretrained(folder, config={"rms_norm_eps": 1e-2}).config.rms_norm_eps == 1e-2
    plain = from_pretrained(folder)
    with torch.no_grad():
        assert not torch.equal(ours(TOKENS).logits, plain(TOKENS).logits)


@pytest.mark.parametrize("words", [{"num_hidden_layers": 1}, {"config": {"num_hidden_layers": 1}}])
def test_fewer_blocks_on_request(words, folder):
    with pytest.warns(UserWarning, match="9 tensors .* left out: model.layers.1.mlp.down_proj, "):
        model = from_pretrained(folder, **words)
    whole = from_pretrained(folder)
    whole.model.layers = whole.model.layers[:1]
    with torch.no_grad():
        expected = whole(TOKENS, use_cache=False).logits
        assert torch.equal(model(TOKENS, use_cache=False).logits, expected)
    more = {key: 3 if key == "num_hidden_layers" else {"num_hidden_layers": 3} for key in words}
    with pytest.raises(FormatError, match=r"missing \(model.layers.2"):
        from_pretrained(folder, **more)


@pytest.mark.parametrize("name", ["", "config.json"])
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_config_by_its_path(name, kind, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 1e-2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert from_pretrained(folder, config=kind(tmp_path / name)).config.rms_norm_eps == 1e-2


@pytest.mark.parametrize("dtype", ["half", "torch.float16", torch.float16])
def test_the_config_says_what_the_weights_are(dtype, folder):
    model = from_pretrained(folder, dtype=dtype)
    assert model.config.dtype == model.dtype == torch.float16
    assert from_pretrained(folder).config.dtype == torch.float32


def test_the_model_knows_where_it_is_from(folder, tmp_path):
    """peft writes that into its adapters; no file of a model holds it."""
    model = from_pretrained(folder)
    assert model.name_or_path == model.config.name_or_path == str(folder)
    save_pretrained(model, tmp_path)
    assert str(folder) not in (tmp_path / "config.json").read_text()


def test_the_parts_of_a_config_say_it_too(tmp_path):
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    both = transformers.BertConfig(**text, vocab_size=32)
    kind = transformers.EncoderDecoderConfig
    model = transformers.EncoderDecoderModel(kind.from_encoder_decoder_configs(both, both))
    save_pretrained(cases.sparsify(model.eval()), tmp_path)
    config = from_pretrained(tmp_path, dtype="bfloat16").config
    assert config.dtype == config.encoder.dtype == config.decoder.dtype == torch.bfloat16


def test_a_folder_in_a_folder(folder):
    from_pretrained(folder.parent, subfolder=type(folder)(folder.name))


@pytest.mark.parametrize("limit", ["1GB", "9KB"])
def test_a_variant(limit, tmp_path):
    model = cases.llama()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size=limit)
    with torch.no_grad():
        loaded = from_pretrained(tmp_path, variant="fp16")
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    with pytest.raises(FormatError, match=r"got only model\.fp16.*Pass variant='fp16'"):
        from_pretrained(tmp_path)


def adapters(folder):
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    return folder


def gguf(folder):
    (folder / "a.gguf").write_bytes(b"GGUF")
    return folder


def gguf_file(folder):
    return gguf(folder) / "a.gguf"


def another_variant(folder):
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    return folder


def a_file(folder):
    return another_variant(folder) / "model.safetensors"


@pytest.mark.parametrize(
    "make, words, text",
    [
        (adapters, {}, "got only adapter_model.safetensors. It holds adapters"),
        (gguf, {}, "got only a.gguf. Load a GGUF file with"),
        (gguf_file, {}, "expected a folder, got a file. Load a GGUF file with"),
        (a_file, {}, "expected a folder, got a file. Give the folder it is in, "),
        (another_variant, {"variant": "x"}, "index.x.json, got only .*. Pass variant=None"),
    ],
)
def test_a_folder_without_weights_is_named_by_what_it_has(make, words, text, tmp_path):
    with pytest.raises(FormatError, match=text):
        from_pretrained(make(tmp_path), **words)


@pytest.mark.parametrize("mapping", [{"(": ""}, {"x": None}, {1: "2"}, {"x": str}], ids=str)
def test_a_key_mapping_that_is_none(mapping, folder):
    with pytest.raises(ValueError, match=r"key_mapping to be \{regular expression: replacement\}"):
        from_pretrained(folder, key_mapping=mapping)


@pytest.mark.parametrize("words", [{"device": "meta"}, {"device_map": "meta"}], ids=str)
def test_a_device_without_data(words, folder):
    with pytest.raises(ValueError, match="a device that holds data, got meta"):
        from_pretrained(folder, **words)


UNREAD = [
    ({"revision": "main"}, "the id of a model on the Hub, no folder, with revision, got"),
    ({"force_download": True}, "no folder, with force_download"),
    ({"max_memory": {0: 1}}, "device_map in .*'balanced'.* with max_memory"),
    ({"device_map": {"": "cpu"}, "max_memory": {"cpu": 1}}, "with max_memory"),
    ({"device": "cpu:0", "device_map": "cpu"}, "device_map=None with device, got device='cpu:0'"),
    ({"dtype": "float16", "torch_dtype": "float32"}, "dtype or torch_dtype, got dtype='float16'"),
]


@pytest.mark.parametrize("words, text", UNREAD, ids=str)
def test_words_that_nothing_reads(words, text, folder):
    with pytest.raises(ValueError, match=text):
        from_pretrained(folder, **words)


def test_words_about_fetching_ask_for_nothing_where_a_folder_is(folder, tmp_path):
    words = {"cache_dir": tmp_path, "token": "t", "local_files_only": True, "revision": None}
    assert from_pretrained(folder, **words, dtype="float32", torch_dtype="float32") is not None


@pytest.mark.parametrize("device", ["meta"])
def test_under_another_default_device(device, folder, tmp_path):
    with torch.no_grad():
        expected = from_pretrained(folder)(TOKENS).logits
    torch.set_default_device(device)
    try:
        loaded = from_pretrained(folder)
        save_pretrained(loaded, tmp_path / "again")
        assert verify_checkpoint(tmp_path / "again").ok
    finally:
        torch.set_default_device(None)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, expected)
        assert torch.equal(from_pretrained(tmp_path / "again")(TOKENS).logits, expected)


def test_a_model_whose_buffers_are_empty_is_refused(folder):
    with torch.device("meta"):
        model = cases.llama()
    with pytest.raises(
        ValueError, match="load_into: expected data in buffers .*inv_freq.* on meta"
    ):
        load_into(model, folder)


# ---- saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ours", "theirs"])
@pytest.mark.parametrize(
    "words",
    [
        dict(safe_serialization=True),
        dict(push_to_hub=False),
        dict(variant=None),
        dict(max_shard_size="2GB"),
        dict(token=None),
        dict(is_main_process=True),
    ],
    ids=str,
)
def test_saving_takes_them(how, words, tmp_path):
    model = cases.sparsify(cases.llama())
    save = save_pretrained if how == "ours" else type(model).save_pretrained
    save(model, tmp_path / "out", **words)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path / "out")(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("how", ["ours", "theirs"])
@pytest.mark.parametrize(
    "words, text",
    [
        (dict(safe_serialization=False), "safe_serialization=True, got False"),
        (dict(push_to_hub=True), "push_to_hub=False, got True"),
        (dict(variant="fp16"), "variant=None, got 'fp16'"),
        (dict(state_dict={}), "the model's own state_dict"),
        (dict(nonsense=1), "arguments of save_pretrained: .*got 'nonsense'"),
    ],
    ids=str,
)
def test_saving_refuses_by_name(how, words, text, tmp_path):
    model = cases.sparsify(cases.llama())
    save = save_pretrained if how == "ours" else type(model).save_pretrained
    with pytest.raises(
        (TypeError, ValueError), match=f"sparsekern.save_pretrained: expected {text}"
    ):
        save(model, tmp_path / "out", **words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["ours", "theirs"])
def test_other_processes_write_nothing(how, tmp_path):
    model = cases.sparsify(cases.llama())
    save = save_pretrained if how == "ours" else type(model).save_pretrained
    save(model, tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


# ---- names on disk -------------------------------------------------------------------------------


def olmoe():
    sizes = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=1, vocab_size=32)
    heads = dict(num_attention_heads=4, num_key_value_heads=4)
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(**sizes, **heads, num_experts=2, num_experts_per_tok=1)
    return transformers.OlmoeForCausalLM(config).eval()


def test_a_conversion_that_fails_is_said_and_the_folder_is_whole(tmp_path, monkeypatch):
    from sparsekern.checkpoint.names import Conversion

    model = olmoe()
    if not any(p.dim() == 3 for p in model.parameters()):
        pytest.skip("this Transformers stores experts as they are")

    def fail(self, model, read):
        raise ZeroDivisionError("no such operation")

    with monkeypatch.context() as patch, pytest.warns(UserWarning) as seen:
        patch.setattr(Conversion, "run", fail)
        save_pretrained(model, tmp_path)
    texts = [str(entry.message) for entry in seen]
    assert any(
        "ZeroDivisionError: no such operation" in text and "experts" in text for text in texts
    )
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(TOKENS).logits, model(TOKENS).logits)


def test_a_conversion_that_works_says_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_pretrained(olmoe(), tmp_path)


def test_models_whose_classes_initialise_layers_by_their_sizes(tmp_path):
    """Wav2Vec2 asks its projection for in_features while Transformers loads it."""
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=32,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    torch.manual_seed(0)
    model = cases.sparsify(transformers.Wav2Vec2ForCTC(config).eval(), keep=("lm_head",))
    model.save_pretrained(tmp_path)
    loaded = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path)
    assert isinstance(loaded.wav2vec2.feature_projection.projection, SparseLinear)
    sound = torch.randn(1, 400)
    with torch.no_grad():
        assert torch.equal(loaded(sound).logits, model(sound).logits)


def test_the_callers_architectures_choose_the_class(folder):
    model = from_pretrained(folder, architectures=["LlamaModel"])
    assert type(model) is transformers.LlamaModel


def test_a_config_that_json_cannot_hold(tmp_path):
    model = cases.sparsify(cases.llama())
    model.config.note = tmp_path
    with pytest.raises(TypeError, match="model.config that JSON can hold, got .*PosixPath"):
        save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- what the commands load ----------------------------------------------------------------------


def test_a_hub_id_from_the_local_cache(folder, tmp_path, monkeypatch):
    """The layout of huggingface_hub's cache, without a network."""
    from huggingface_hub import constants

    from sparsekern.integrations.loading import load_model

    commit = "0" * 40
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text(commit)
    for path in folder.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model, tokenizer = load_model("someone/tiny")
    assert tokenizer is None and any(isinstance(m, SparseLinear) for m in model.modules())
    with pytest.raises(FileNotFoundError, match="no model at someone/other"):
        load_model("someone/other")


def test_a_gguf_is_known_by_what_it_is(tmp_path):
    """A suffix in capitals is one; a folder of that name is none; dtypes go by their names."""
    from sparsekern.integrations.loading import load_model

    pytest.importorskip("gguf")
    corpus = Path(__file__).parents[1] / "fuzz" / "corpus" / "gguf"
    shutil.copyfile(corpus / "tiny.gguf", tmp_path / "TINY.GGUF")
    model, _ = load_model(tmp_path / "TINY.GGUF", dtype="float32")
    assert model.dtype == model.config.dtype == torch.float32
    save_pretrained(cases.sparsify(cases.llama()), tmp_path / "folder.gguf")
    model, _ = load_model(tmp_path / "folder.gguf", dtype="bfloat16")
    assert isinstance(model.model.layers[0].mlp.up_proj, SparseLinear)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("path", [b"folder", None, 3])
def test_what_is_no_path_for_the_commands(path):
    from sparsekern.integrations.loading import load_model

    with pytest.raises(TypeError, match="load_model: expected path to be a path, got"):
        load_model(path)


@pytest.mark.parametrize("kind", ["garbage", "pipe", "list"])
def test_a_damaged_tokenizer_is_one_error(kind, tmp_path):
    from sparsekern.integrations.loading import load_tokenizer

    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer"})
    )
    if kind == "pipe":
        os.mkfifo(tmp_path / "tokenizer.json")
    else:
        (tmp_path / "tokenizer.json").write_text("{" if kind == "garbage" else "[]")
    with pytest.raises(FormatError, match="a tokenizer that Transformers can load"):
        load_tokenizer(tmp_path)
