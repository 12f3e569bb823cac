"""One engine of bench_vllm.py, in a process of its own: `python -m bench.vllm_child JSON`.

JSON: {"folder", "quantization", "batches", "prompt", "new", "prefill", "logprobs",
"tensor_parallel", "engine_args"}. Prints one line of JSON: seconds and bytes of loading (weights of
all ranks, the peak of one), whether kernels start early (pdl.py), tokens per second of each batch,
prefill, and the log-probabilities of a few greedy tokens.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import torch

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "INFO",  # how long the phases of starting take is only said there
}


def weight_bytes(model) -> int:
    """Of one rank's part of a model."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def peak_bytes(model) -> int:
    """Most memory that this rank's tensors took."""
    return torch.cuda.max_memory_allocated()


def main(text: str) -> None:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    from bench import pdl, vllm_child  # by its name: workers find its functions there

    job = json.loads(text)
    start = time.perf_counter()
    engine = LLM(
        model=job["folder"],
        quantization=job["quantization"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=job["max_len"],
        max_num_seqs=max(job["batches"]),
        max_num_batched_tokens=16384,
        gpu_memory_utilization=job.get("memory", 0.5),
        disable_log_stats=True,
        tensor_parallel_size=job.get("tensor_parallel", 1),
        **job.get("engine_args", {}),
    )
    result: dict = {"start_s": round(time.perf_counter() - start, 1)}
    result["weights_gb"] = round(sum(engine.apply_model(vllm_child.weight_bytes)) / 1e9, 3)
    result["peak_gb"] = round(max(engine.apply_model(vllm_child.peak_bytes)) / 1e9, 3)
    options = engine.llm_engine.vllm_config.compilation_config.inductor_compile_config
    result["pdl"] = pdl.is_on(torch.device("cuda"), options)
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(0)

    def prompts(count: int, length: int) -> list[dict]:
        ids = torch.randint(3, vocabulary, (count, length), generator=generator)
        return [{"prompt_token_ids": row.tolist()} for row in ids]

    def generate(count: int, length: int, new: int) -> float:
        sampling = SamplingParams(
            max_tokens=new, min_tokens=new, ignore_eos=True, temperature=0, detokenize=False
        )
        inputs = prompts(count, length)
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.generate(inputs, sampling, use_tqdm=False)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    result["decode"] = {}
    for batch in job["batches"]:
        few, many = job["new"] // 4, job["new"]
        generate(batch, job["prompt"], few)
        rates = []
        for _ in range(job["repeats"]):
            # The difference of two lengths leaves prefill and start-up out.
            seconds = generate(batch, job["prompt"], many) - generate(batch, job["prompt"], few)
            rates.append(batch * (many - few) / seconds)
        result["decode"][str(batch)] = round(statistics.median(rates), 1)
    count, length = job["prefill"]
    generate(count, length, 1)
    times = [generate(count, length, 1) for _ in range(job["repeats"])]
    result["prefill_tokens_s"] = round(count * length / statistics.median(times), 1)
    if job.get("logprobs"):
        sampling = SamplingParams(
            max_tokens=job["logprobs"], temperature=0, logprobs=1, detokenize=False, ignore_eos=True
        )
        inputs = [{"prompt_token_ids": row} for row in job["questions"]]
        answers = engine.generate(inputs, sampling, use_tqdm=False)
        result["answers"] = [
            {
                "tokens": list(answer.outputs[0].token_ids),
                "logprobs": [
                    next(iter(step.values())).logprob for step in answer.outputs[0].logprobs or []
                ],
            }
            for answer in answers
        ]
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
