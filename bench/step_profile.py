"""Where the time of a step goes: GPU time by kind of kernel, from torch.profiler.

    product      sparsekern's kernels, and cuBLAS' and CUTLASS' of dense layers
    attention    scaled_dot_product_attention in whatever implementation, or grouped attention
    cache        writing the key-value cache, and copies of it: repeat_kv
    pointwise    norms, rotary embedding, silu(gate) · up, residuals, masks
    sampling     the choice of the next token
    copy         memory copies and fills
    host         only on the CPU: what torch.compile does before its code runs
    other        what no pattern knows; the list of kernels has their names

The gap is the time of a step that no kernel was running in: step - busy. The profiler makes short
kernels look some tenths of a microsecond longer, so that it can come out below zero.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

KINDS = {
    "sampling": r"argmax|arg_?max|topk|multinomial",
    "attention": r"fmha|flash|sdpa|decode_attention|attention_combine|mha_|softmax|"
    r"scaled_dot_product(?!.*(poi|per|red)_fused)",
    "host": r"^(TorchDynamo|AOTDispatcher|Pregraph)",
    "sparse product": r"spmm_|sparsekern|few_tokens|sparse_linear|split_reduce",
    "dense product": r"gemm|gemv|nvjet|cutlass|cublas|splitk|matmul|aten::(mm|bmm|addmm|linear)\b",
    "cache": r"index_copy|index_put|repeat_kv|repeat_interleave|scatter|_clone|aten::clone",
    "copy": r"memcpy|memset|copy|fill|CatArray",
    "pointwise": r"triton_|elementwise|reduce|rsqrt|aten::|vectorized",
}
# Names that torch.compile gives to its own kernels list what is fused, attention's inputs too.
_FUSED = re.compile(r"^(triton|cpp)_\w*?fused_")
_FUSED_KINDS = {
    "sampling": KINDS["sampling"],
    "cache": r"index_copy|index_put|clone(?!.*(rsqrt|silu))",
    "pointwise": "",
}
_NOT_KERNELS = re.compile(r"^(ProfilerStep|## |Torch-Compiled Region|CompiledFxGraph)")


def kind_of(name: str) -> str:
    """The kind of a kernel, or on the CPU of an operator, by its name."""
    for kind, pattern in (_FUSED_KINDS if _FUSED.match(name) else KINDS).items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


class Launch(NamedTuple):
    """One kernel that ran: microseconds on the GPU's clock."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Profile:
    """Of one step: microseconds and launches by kind and by name; `busy_us` counts time once in
    which several kernels ran."""

    us: dict[str, float]
    launches: dict[str, float]
    names: dict[str, tuple[float, float]]  # us, launches
    busy_us: float

    def lines(self, step_us: float, most: int = 12) -> list[str]:
        """What is printed: step and gap, a line for each kind, and the longest kernels."""
        count = sum(self.launches.values())
        text = [
            f"  step {step_us:.0f} us = busy {self.busy_us:.0f} + gap {step_us - self.busy_us:.0f}"
            f"; {count:g} kernels"
        ]
        for kind, us in sorted(self.us.items(), key=lambda item: -item[1]):
            text.append(f"  {us:8.1f} us  {self.launches[kind]:6g} x  {kind}")
        longest = sorted(self.names.items(), key=lambda item: -item[1][0])[:most]
        for name, (us, launches) in longest:
            text.append(f"    {us:8.1f} us  {launches:6g} x  [{kind_of(name)}] {name[:100]}")
        return text


def summarise(launches: Iterable[Launch], steps: int) -> Profile:
    """A Profile of launches that are those of `steps` steps."""
    us: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    by_name: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    busy, reached = 0.0, float("-inf")
    for launch in sorted(launches, key=lambda one: one.begin):
        took, kind = launch.end - launch.begin, kind_of(launch.name)
        us[kind] += took / steps
        counts[kind] += 1
        by_name[launch.name][0] += took / steps
        by_name[launch.name][1] += 1 / steps
        busy += max(0.0, launch.end - max(launch.begin, reached))
        reached = max(reached, launch.end)
    per_step = {kind: round(count / steps, 2) for kind, count in counts.items()}
    names = {name: (took, round(count, 2)) for name, (took, count) in by_name.items()}
    return Profile(dict(us), per_step, names, busy / steps)


def prepare(device: torch.device) -> None:
    """One empty session before graphs are captured, so that those after see what they replay."""
    if device.type != "cuda":
        return
    # Taking the profiler's library down and up again around captures has crashed
    # (github.com/pytorch/pytorch/pull/150957).
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]):
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize()


def profile(step: Callable[[], object], device: torch.device, steps: int = 5) -> Profile:
    """Runs the step `steps` times under the profiler. On the CPU, operators stand for kernels.

    Raises:
        RuntimeError: the profiler saw nothing, as without the right to read the GPU's counters.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    on_gpu = device.type == "cuda"
    step()
    if on_gpu:
        torch.cuda.synchronize()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as session:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    launches = []
    for event in session.events():
        if _NOT_KERNELS.match(event.name) or getattr(event, "is_user_annotation", False):
            continue
        begin = event.time_range.start
        if on_gpu and event.device_type == DeviceType.CUDA:
            launches.append(Launch(event.name, begin, event.time_range.end))
        elif not on_gpu and event.self_cpu_time_total > 0:
            launches.append(Launch(event.name, begin, begin + event.self_cpu_time_total))
    if not launches:
        raise RuntimeError("bench.generate: expected the profiler to see kernels, got none.")
    return summarise(launches, steps)
