"""attn_implementation="sparsekern": single queries over a static cache."""

import json
import os
import subprocess
import sys

import pytest
import torch

from python_tests.integrations.attention_cases import CASES, operands
from sparsekern.integrations import attention
from sparsekern.integrations.attention import decode_attention, reference, takes

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=2,
        vocab_size=64,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "attention_cases.py")
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    child = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-3000:]
    results = json.loads(child.stdout.splitlines()[-1])
    assert len(results) == len(CASES) + 2
    assert {case: error for case, error in results.items() if error is not None} == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*CASES, (32, 32, 8, 1024, 128, 700)])
def test_kernels_on_a_gpu(case, dtype):
    from python_tests.integrations.attention_cases import error_of

    assert error_of(case, dtype, "cuda") is None


@pytest.mark.parametrize("case", CASES[:3])
def test_the_formula_is_that_of_torch(case):
    q, k, v, mask = operands(case, torch.float32)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(reference(q, k, v, mask, 0.25), wanted.transpose(1, 2))


def test_a_query_that_sees_nothing_gets_zeros():
    assert reference(*operands(CASES[-1], torch.float32), 1.0).eq(0).all()


def test_the_op_is_one_for_torch():
    q, k, v, mask = operands(CASES[0], torch.float32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(decode_attention, (q, k, v, mask, 0.25), test_utils=tests)


def test_what_it_takes():
    q, k, v, mask = operands(CASES[0], torch.float32)
    assert takes(q, k, v, mask) and takes(q, k, v, None)
    assert not takes(q.expand(1, 8, 2, 16), k, v, mask)  # a prompt
    assert not takes(q, k, v, torch.zeros_like(mask, dtype=torch.float32))
    assert not takes(q, k, v, mask[..., 1:])
    assert not takes(q, k, v[:, :, 1:], mask)
    assert not takes(q[..., :8], k[..., :8], v[..., :8], mask)
    assert not takes(q[:, :7], k, v, mask)
    assert not takes(q.double(), k.double(), v.double(), mask)
    assert not takes(q.clone().requires_grad_(), k, v, mask)
    with torch.no_grad():
        assert takes(q.clone().requires_grad_(), k, v, mask)


def test_scores_with_a_cap_are_refused():
    q, k, v, mask = operands(CASES[0], torch.float32)
    with pytest.raises(NotImplementedError, match="softcap=. Load the model with attn_impl"):
        attention.attention_forward(torch.nn.Module(), q, k, v, mask, softcap=30.0)


@pytest.mark.parametrize("padded", [False, True])
def test_generate_gives_the_same_tokens(model, padded, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments[0].shape)
        return decode_attention(*arguments)

    monkeypatch.setattr(attention, "decode_attention", counted)
    ids = torch.arange(12).view(2, 6)
    seen = torch.ones_like(ids)
    seen[0, :2] = 0 if padded else 1
    tokens = {}
    for name in ("sdpa", "sparsekern"):
        model.set_attn_implementation(name)
        tokens[name] = model.generate(
            ids,
            attention_mask=seen,
            max_new_tokens=5,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
            disable_compile=True,
        )
    assert torch.equal(tokens["sdpa"], tokens["sparsekern"])
    assert len(calls) == 4 * 2 and set(calls) == {torch.Size([2, 4, 1, 16])}  # not the prompt


def test_a_step_compiles_as_one_graph(model):
    model.set_attn_implementation("sparsekern")
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    cache = transformers.StaticCache(config=model.config, max_cache_len=8)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    step = torch.compile(model.forward, backend=keep, fullgraph=True)
    with torch.inference_mode():
        step(torch.ones(1, 1, dtype=torch.int64), past_key_values=cache)
    assert len(graphs) == 1
    assert sum("decode_attention" in target for target in graphs[0]) == 2
    assert not any("scaled_dot_product" in target for target in graphs[0])
