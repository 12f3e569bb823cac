"""The typed surface of the CUDA module (csrc/bindings.cpp). Addresses and streams are integers.

Addresses are of memory of the current device, 0 is null; strides count elements. A dtype that is a
number is its place in csrc/core/dtype.h: 0 float16, 1 bfloat16, 2 float8_e4m3fn, 3 int8, 4 int4.
Nothing is allocated and nothing waits for the GPU. No function takes more than six positional
integers; what has more takes names.
"""

from typing import TypedDict, final

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

Types = list[tuple[str, str, str]]  # of the weight's values, of x and of y

class DecodeConfig(TypedDict):
    index: int  # what Linear takes as config
    rows: int  # out_features of a thread block
    split: int  # thread blocks that share the in_features of those rows
    types: Types  # none: not built

class PrefillConfig(TypedDict):
    index: int
    rows: int  # out_features of a tile
    tokens: int  # tokens of a tile
    cluster_rows: int  # tiles of a cluster along out_features
    cluster_tokens: int  # and along tokens
    streamed: bool  # the last wave is shared evenly along in_features
    promoted: bool  # sums of e4m3 in float32, not with the bits of the tensor cores
    types: Types

class SplitConfig(TypedDict):
    index: int
    rows: int  # out_features of a tile
    tokens: int  # tokens of a tile
    split: int  # thread blocks, a cluster, that share the in_features of a tile
    types: Types

class NarrowConfig(TypedDict):
    index: int
    rows: int  # out_features of a tile
    tokens: int  # tokens of a tile
    cluster_rows: int  # tiles of a cluster along out_features, which share x
    split: int  # thread blocks that share the in_features of a tile
    types: Types

class MmaConfig(TypedDict):
    index: int
    rows: int  # out_features of a thread block
    tokens: int  # tokens of a thread block
    warps_rows: int  # its warps along out_features
    warps_tokens: int  # along tokens
    split: int  # along in_features, whose sums it adds at the end
    stages: int  # parts of the ring in shared memory; each holds 64 * split in_features, or 128
    types: Types

class NaiveConfig(TypedDict):
    index: int
    rows: int
    tokens: int
    types: Types

class Kernels(TypedDict):
    decode: list[DecodeConfig]  # up to 64 tokens, Hopper
    decode_gated: list[DecodeConfig]  # silu(x · Wᵀ) * (x · Upᵀ), up to 32 tokens, Hopper
    prefill: list[PrefillConfig]  # Hopper
    split: list[SplitConfig]  # for few tiles, Hopper
    narrow: list[NarrowConfig]  # int4 weights, Hopper
    mma: list[MmaConfig]  # compute capability 8.0 and later, of e4m3 8.9 and later
    naive: list[NaiveConfig]  # the readable kernel, for tests, Hopper

def kernels() -> Kernels: ...  # csrc/linear/kernels.h and configs.h, with the types of each config

@final
class Linear:
    """The fixed part of a launch, checked once; called with its addresses.

    y = activation(x · Wᵀ * channel_scale * token_scale + bias) + residual, summed in float32 and
    rounded once.

    Args:
        kernel: a key of `kernels`.
        config: index of one of its configs.
        dtype: of y, bias and residual: "float16" | "bfloat16".
        weight_dtype: storage type of the values; None is dtype.
        x_dtype: of x; None is dtype. `kernels` says which of these types a config takes together.
        activation: None | "relu" | "gelu" | "silu".
        scale_group: of int4, 64 | 128: in_features that share a scale, which the metadata holds;
            0: none but channel_scale.
        stored_dtype: of the weight as it is passed; None is weight_dtype. Of 8 or 4 bits beside a
            weight_dtype of 16: every call first writes levels times scales, rounded, to `widened`.
    Raises:
        ValueError: an unknown kernel, config, dtype or activation; types or a size that the kernel
            does not take.
        TypeError: a missing or unknown keyword; a value of another type.
    """

    def __init__(
        self,
        *,
        kernel: str,
        config: int,
        tokens: int,
        out_features: int,
        in_features: int,
        x_stride: int,
        y_stride: int,
        residual_stride: int = 0,
        dtype: str,
        weight_dtype: str | None = None,
        x_dtype: str | None = None,
        activation: str | None = None,
        scale_group: int = 0,
        stored_dtype: str | None = None,
    ) -> None: ...

    needs_workspace: bool  # whether a call should pass one; 0 does without, and is slower
    widened_bytes: int  # that a call must pass as widened; 0: none

    def __call__(
        self,
        *,
        x: int,  # [tokens, in_features], on a multiple of 16 bytes
        values: int,  # layout "tile64"
        metadata: int,
        y: int,  # [tokens, out_features]
        stream: int,
        bias: int = 0,  # [out_features]
        residual: int = 0,  # [tokens, out_features]
        workspace: int = 0,  # zeroed once, of one stream alone; only where needed
        up_values: int = 0,  # of a gated kernel
        up_metadata: int = 0,
        channel_scale: int = 0,  # float32 [out_features]; of 8 or 4 bits, or the naive kernel
        token_scale: int = 0,  # float32 [tokens]; of an 8-bit x, or the naive kernel
        widened: int = 0,  # widened_bytes, whatever they hold, of launches that follow each other
    ) -> None:
        """Launches. ValueError for an operand that the kernel does not take, or that is missing."""

PREFILL_COUNTER_BYTES: int  # the beginning of the workspace that must be zero

def prefill_workspace_bytes() -> int: ...  # of a workspace on the current device
def capture_id(stream: int, /) -> int: ...  # 0: the stream is not being captured

# Weights.

def pack(
    *,
    values: int,  # row-major, [out_features, in_features / 2]
    metadata: int,  # [out_features, ceil(in_features / 8)]
    packed_values: int,  # layout "tile64"
    packed_metadata: int,
    out_features: int,
    in_features: int,
    storage_bits: int,  # of a value: 16 or 8
    stream: int,
) -> None: ...
def quantize_rows(
    *,
    x: int,  # [tokens, features]; the gate, when there is up
    x_stride: int,
    tokens: int,
    features: int,
    dtype: int,  # of x, up, norm_weight, residual and y: 0 or 1
    up: int,  # 0, or: silu(x) * up is quantised
    up_stride: int,
    norm_weight: int,  # 0, or [features]: RMSNorm(x + residual) * norm_weight is quantised
    eps: float,
    residual: int,  # 0, or rows that become x + residual
    residual_stride: int,
    y: int,  # 0, or rows for what is quantised, before it is
    y_stride: int,
    storage: int,  # of q: 2 or 3
    q: int,
    q_stride: int,
    scale: int,  # float32 [tokens]
    stream: int,
) -> None: ...
def prune_compress(
    *,
    w: int,
    values: int,
    metadata: int,
    bad_chunks: int,  # int32, zeroed by the caller
    elements: int,  # out_features * in_features
    dtype: int,
    stream: int,
) -> None: ...

# cuSPARSELt (csrc/cusparselt/cusparselt.h). device: index of the GPU, which must be current.

CUSPARSELT_MAX_PLANS: int  # a full cache is emptied

def cusparselt_load(path: str, /) -> tuple[int, int, int]: ...  # version
def cusparselt_unload() -> None: ...
def cusparselt_compressed_bytes(
    device: int, dtype: int, out_features: int, in_features: int, /
) -> tuple[int, int]: ...  # of the blob, and of the buffer of cusparselt_compress
def cusparselt_compress(
    *,
    device: int,
    dtype: int,
    out_features: int,
    in_features: int,
    dense: int,
    blob: int,
    buffer: int,
    stream: int,
) -> None: ...
def cusparselt_plan(
    *,
    device: int,
    dtype: int,  # of the weight and of x
    y_dtype: int,
    out_features: int,
    tokens: int,
    in_features: int,
    x_stride: int,
    y_stride: int,
    bias: int,
    relu: bool,
    channel_scale: bool,  # for cusparselt_matmul_scaled
    algorithm: int,  # -1: the library's choice; then the next two do not count
    split_k: int,
    split_k_mode: int,
) -> tuple[int, int, int]: ...  # id, workspace bytes, number of algorithms
def cusparselt_matmul(
    plan: int, blob: int, x: int, y: int, workspace: int, stream: int, /
) -> int: ...  # 0, or one of these two, and nothing was done; workspace 0: the lent one

CUSPARSELT_UNKNOWN_PLAN: int  # it has left the cache
CUSPARSELT_NO_WORKSPACE: int  # none that is large enough was lent, or a graph captures the stream

def cusparselt_matmul_scaled(
    *,
    plan: int,
    blob: int,
    x: int,
    y: int,
    workspace: int,
    channel_scale: int,  # float32 [out_features]
    stream: int,
) -> int: ...  # as cusparselt_matmul
def cusparselt_lend_workspace(
    device: int, stream: int, workspace: int, bytes: int, /
) -> None: ...  # for later calls on this stream; the caller keeps it alive
def cusparselt_time_matmul(
    *, plan: int, blob: int, x: int, y: int, workspace: int, stream: int, calls: int
) -> float: ...  # host seconds of so many bare calls
