"""A decode step of bench generate, and its profile by kind of kernel."""

import pytest
import torch

import sparsekern

pytest.importorskip("transformers")

from bench import bench_generate, decode_model
from bench.generate_step import Step
from bench.step_profile import Launch, kind_of, profile, summarise

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void sparsekern::spmm_decode_sm90_kernel<...>", "sparse product"),
        ("few_tokens_kernel", "sparse product"),
        ("nvjet_sm90_tst_64x8_64x16_2x1_v_bz_TNT", "dense product"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16, ...>", "dense product"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16>", "dense product"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("decode_attention_kernel", "attention"),
        ("attention_combine_kernel", "attention"),
        ("triton_poi_fused__scaled_dot_product_efficient_attention_clone_expand_7", "cache"),
        ("triton_poi_fused_add_arange_index_copy_3", "cache"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "pointwise"),
        ("triton_poi_fused_mul_silu_9", "pointwise"),
        ("triton_red_fused_argmax_2", "sampling"),
        ("void at::native::reduce_kernel<512, 1, ArgMaxOps<float>>", "sampling"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("something_else", "other"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_summary_of_two_steps():
    launches = [
        Launch("nvjet_a", 0.0, 10.0),
        Launch("triton_poi_fused_mul_0", 8.0, 12.0),  # 2 us of it beside the product
        Launch("nvjet_a", 20.0, 30.0),
        Launch("triton_poi_fused_mul_0", 30.0, 34.0),
    ]
    found = summarise(reversed(launches), 2)
    assert found.us == {"dense product": 10.0, "pointwise": 4.0}
    assert found.launches == {"dense product": 1.0, "pointwise": 1.0}
    assert found.busy_us == 13.0
    text = found.lines(15.0)
    assert text[0] == "  step 15 us = busy 13 + gap 2; 2 kernels"
    assert "10.0 us" in text[1] and "dense product" in text[1]
    assert text[-1].endswith("[pointwise] triton_poi_fused_mul_0")


def test_profile_of_a_product():
    x = torch.ones(64, 64)
    found = profile(lambda: x @ x, CPU, steps=2)
    assert found.launches["dense product"] >= 1 and found.us["dense product"] > 0


def test_a_step_chooses_tokens_and_begins_anew():
    with torch.inference_mode():
        model = decode_model.build("tiny", 1, torch.float32, CPU, sparse=False, attention=None)
        step = Step(model.forward, model, 2, 8)
        first = [step().clone() for _ in range(4)]  # positions 4 to 7
        assert torch.equal(step.ids, first[-1].argmax(-1, keepdim=True))
        filled = step.cache.layers[0].cumulative_length
        assert step.left == 0 and int(filled) == 8
        again = [step().clone() for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], first[1])


def test_both_attentions_and_the_profile(tmp_path, capsys):
    arguments = "--device cpu --quick --preset tiny --layers 1 --batch 1 --context 8 --profile"
    arguments += " --dtype float32 --models dense,optimized --launch eager"
    arguments = [*arguments.split(), "--attention", "sdpa,sparsekern"]
    assert bench_generate.main(tmp_path / "r.jsonl", arguments) == 0
    printed = capsys.readouterr().out
    for attention in ("sdpa", "sparsekern"):
        assert f"batch 1, {attention}, optimized:\n  step " in printed
    assert "[attention] sparsekern::decode_attention" in printed
    assert "[sparse product] sparsekern::" in printed or "sparse product" not in printed


def test_the_reference_of_joined_layers_uses_their_weights_alone():
    with torch.inference_mode():
        model = decode_model.build("tiny", 1, torch.float32, CPU, sparse=True, attention=None)
        sparsekern.optimize(model)
        layer = model.model.layers[0].mlp.up_proj
        x = torch.randn(2, 64)
        wanted = x @ sparsekern.decompress(layer.weight).T
        layer._group.weight = None  # a launch over the group would fail
        with bench_generate._single_layers():
            assert torch.allclose(layer(x), wanted, atol=1e-6)
        with pytest.raises(TypeError):
            layer(x)


def test_wrong_logits_of_one_case_do_not_end_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_generate, "LOGITS_DISTANCE", -1.0)
    arguments = "--device cpu --quick --preset tiny --layers 1 --batch 1,2 --context 4"
    arguments = [*arguments.split(), "--models", "dense,optimized", "--launch", "eager"]
    assert bench_generate.main(tmp_path / "r.jsonl", arguments) == 1
    printed = capsys.readouterr().out
    assert "failed: batch 1, sdpa: RuntimeError: bench.generate: expected logits" in printed
    assert "failed: batch 2, sdpa" in printed and "0 records" in printed


def test_dense_is_measured_first(tmp_path):
    with pytest.raises(ValueError, match="dense first, got"):
        bench_generate.main(tmp_path / "r.jsonl", ["--device", "cpu", "--models", "sparse,dense"])
