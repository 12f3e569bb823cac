"""The typed surface of the CUDA module (csrc/bindings.cpp). Pointers and streams are integers.

The ops (csrc/core/problem.h) take positional arguments alone; pointers are to memory of the current
device, 0 is null, strides count elements. dtype: 0 float16, 1 bfloat16. activation: 0 none, 1 relu,
2 gelu, 3 silu. Nothing is allocated and nothing waits for the GPU.
"""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str  # of the package that it was built with
    nvcc: str
    cudart: int  # CUDART_VERSION, e.g. 13000
    archs: list[str]
    flags: list[str]
    kernels: list[str]  # stems of the .cu files below csrc

class DeviceInfo(TypedDict):
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    shared_bytes_per_block: int
    registers_per_multiprocessor: int
    cuda_driver: int  # e.g. 13000
    cuda_runtime: int

def build_info() -> BuildInfo: ...
def device_count() -> int: ...
def device_info(device: int) -> DeviceInfo: ...

class PrefillConfig(TypedDict):
    index: int  # what `prefill` takes as config
    rows: int  # out_features of a tile
    tokens: int  # tokens of a tile
    cluster_rows: int  # tiles of a cluster along out_features
    cluster_tokens: int  # and along tokens
    streamed: bool  # the last wave is shared evenly along in_features

class DecodeConfig(TypedDict):
    index: int  # what `decode` takes as config
    rows: int  # out_features of a thread block
    split: int  # thread blocks that share the in_features of those rows

class MmaConfig(TypedDict):
    index: int  # what `mma` takes as config
    rows: int  # out_features of a thread block
    tokens: int  # tokens of a thread block
    warps_rows: int  # its warps along out_features
    warps_tokens: int  # along tokens
    split: int  # along in_features, whose sums it adds at the end
    stages: int  # parts of the ring in shared memory; each holds 64 * split in_features

class SplitConfig(TypedDict):
    index: int  # what `split` takes as config
    rows: int  # out_features of a tile
    tokens: int  # tokens of a tile
    split: int  # thread blocks, a cluster, that share the in_features of a tile

def decode_configs() -> list[DecodeConfig]: ...
def decode_config(out_features: int, in_features: int, /) -> int: ...  # what config 0 chooses
def prefill_configs() -> list[PrefillConfig]: ...
def mma_configs() -> list[MmaConfig]: ...
def split_configs() -> list[SplitConfig]: ...
def prune_compress(
    w: int,
    values: int,
    metadata: int,
    bad_chunks: int,  # int32, zeroed by the caller
    elements: int,  # out_features * in_features
    dtype: int,  # 0 float16, 1 bfloat16
    stream: int,
    /,
) -> None: ...
def pack(
    values: int,
    metadata: int,
    packed_values: int,
    packed_metadata: int,
    out_features: int,
    in_features: int,
    stream: int,
    /,
) -> None: ...
def decode(
    x: int,
    values: int,
    metadata: int,
    bias: int,
    residual: int,
    y: int,
    tokens: int,  # at most 64
    out_features: int,
    in_features: int,
    x_stride: int,
    y_stride: int,
    residual_stride: int,
    dtype: int,
    activation: int,
    config: int,  # index of one of decode_configs(); 0 chooses
    stream: int,
    /,
) -> None: ...
def decode_gated(
    x: int,
    gate_values: int,
    gate_metadata: int,
    up_values: int,
    up_metadata: int,
    y: int,
    tokens: int,  # at most 32
    out_features: int,
    in_features: int,
    x_stride: int,
    y_stride: int,
    dtype: int,
    config: int,
    stream: int,
    /,
) -> None: ...
def prefill(
    x: int,
    values: int,
    metadata: int,
    bias: int,
    residual: int,
    y: int,
    tokens: int,
    out_features: int,
    in_features: int,
    x_stride: int,
    y_stride: int,
    residual_stride: int,
    dtype: int,
    activation: int,
    config: int,  # index of one of prefill_configs()
    workspace: int,  # zeroed once, of one stream alone; 0: do without
    stream: int,
    /,
) -> None: ...
def mma(
    x: int,
    values: int,
    metadata: int,
    bias: int,
    residual: int,
    y: int,
    tokens: int,
    out_features: int,
    in_features: int,
    x_stride: int,
    y_stride: int,
    residual_stride: int,
    dtype: int,
    activation: int,
    config: int,  # index of one of mma_configs()
    stream: int,
    /,
) -> None: ...  # compute capability 8.0 and later
def split(
    x: int,
    values: int,
    metadata: int,
    bias: int,
    residual: int,
    y: int,
    tokens: int,
    out_features: int,
    in_features: int,
    x_stride: int,
    y_stride: int,
    residual_stride: int,
    dtype: int,
    activation: int,
    config: int,  # index of one of split_configs()
    stream: int,
    /,
) -> None: ...
def naive(
    x: int,
    values: int,
    metadata: int,
    bias: int,
    residual: int,
    y: int,
    tokens: int,
    out_features: int,
    in_features: int,
    x_stride: int,
    y_stride: int,
    residual_stride: int,
    dtype: int,
    activation: int,
    stream: int,
    /,
) -> None: ...  # the readable kernel, for tests

PREFILL_COUNTER_BYTES: int  # the beginning of the workspace that must be zero

def prefill_workspace_bytes() -> int: ...
def capture_id(stream: int, /) -> int: ...  # 0: the stream is not being captured

# cuSPARSELt (csrc/cusparselt/cusparselt.h). device: index of the GPU; the calls need it to be current.

CUSPARSELT_MAX_PLANS: int  # a full cache is emptied

def cusparselt_load(path: str, /) -> tuple[int, int, int]: ...  # version
def cusparselt_unload() -> None: ...
def cusparselt_compressed_bytes(
    device: int, dtype: int, out_features: int, in_features: int, /
) -> tuple[int, int]: ...  # of the blob, and of the buffer of cusparselt_compress
def cusparselt_compress(
    device: int,
    dtype: int,
    out_features: int,
    in_features: int,
    dense: int,
    blob: int,
    buffer: int,
    stream: int,
    /,
) -> None: ...
def cusparselt_plan(
    device: int,
    dtype: int,
    out_features: int,
    tokens: int,
    in_features: int,
    x_stride: int,
    y_stride: int,
    bias: int,
    relu: bool,
    algorithm: int,  # -1: the library's choice; then the next two do not count
    split_k: int,
    split_k_mode: int,
    /,
) -> tuple[int, int, int]: ...  # id, workspace bytes, number of algorithms
def cusparselt_matmul(
    plan: int, blob: int, x: int, y: int, workspace: int, stream: int, /
) -> int: ...  # 0, or one of these two, and nothing was done; workspace 0: the lent one

CUSPARSELT_UNKNOWN_PLAN: int  # it has left the cache
CUSPARSELT_NO_WORKSPACE: int  # none that is large enough was lent, or a graph captures the stream

def cusparselt_lend_workspace(
    device: int, stream: int, workspace: int, bytes: int, /
) -> None: ...  # for later calls on this stream; the caller keeps it alive
def cusparselt_time_matmul(
    plan: int, blob: int, x: int, y: int, workspace: int, stream: int, calls: int, /
) -> float: ...  # host seconds of so many bare calls
