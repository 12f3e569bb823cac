"""cuBLASLt through ctypes: its own list of algorithms, which torch does not show.

torch runs what the library's heuristics choose, on Hopper a wgmma kernel. The library has kernels
of the Ampere generation there, too (mma.sync). `Problem` lists the algorithms of one linear layer
with all their configurations and launches any of them; which instructions a kernel uses is not
told here, only its name tells (bench_dense_mma.py).

A layer y [tokens, out] = x [tokens, in] · W [out, in]ᵀ is, in the column-major terms of the
library, D [out, tokens] = op(A) · B: A is W as [in, out], transposed, and B is x as [in, tokens].

Names, values and structs are those of cublasLt.h, cublas_api.h and library_types.h of CUDA 12.6,
which is part of the library's binary interface: CUDA 13 has the same.

By hand: no Python binding lists every algorithm with its configurations (nvmath-python's planning
takes the heuristics' list).
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import random
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

CUBLAS_COMPUTE_32F = 68
CUBLAS_OP_T = 1
CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF = 0, 2, 14
CUBLASLT_MATMUL_DESC_TRANSA = 3

CUBLASLT_ALGO_CAP_SPLITK_SUPPORT = 0
CUBLASLT_ALGO_CAP_REDUCTION_SCHEME_MASK = 1
CUBLASLT_ALGO_CAP_CTA_SWIZZLING_SUPPORT = 2
CUBLASLT_ALGO_CAP_TILE_IDS = 6
CUBLASLT_ALGO_CAP_CUSTOM_OPTION_MAX = 7
CUBLASLT_ALGO_CAP_STAGES_IDS = 13

CUBLASLT_ALGO_CONFIG_TILE_ID = 1
CUBLASLT_ALGO_CONFIG_SPLITK_NUM = 2
CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME = 3
CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING = 4
CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION = 5
CUBLASLT_ALGO_CONFIG_STAGES_ID = 6

CUBLASLT_REDUCTION_SCHEME_NONE = 0
CUBLASLT_REDUCTION_SCHEME_INPLACE = 1
CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2

DTYPES = {torch.float16: CUDA_R_16F, torch.bfloat16: CUDA_R_16BF}
WORKSPACE_BYTES = 32 * 2**20
MAX_IDS = 256
MAX_CUSTOM = 3  # custom options of an algorithm that are tried, beside 0
TRIES = 500  # how often the library is asked, for each configuration that is wanted
SONAMES = ("libcublasLt.so.13", "libcublasLt.so.12")


class CublasLtError(RuntimeError):
    """The library is missing, or a call of it failed; the message names the call and status."""


class Algo(ctypes.Structure):
    """cublasLtMatmulAlgo_t, 64 bytes."""

    _fields_ = [("data", c_uint64 * 8)]


class HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t, 96 bytes."""

    _fields_ = [
        ("algo", Algo),
        ("workspaceSize", c_size_t),
        ("state", c_int),
        ("wavesCount", c_float),
        ("reserved", c_int * 4),
    ]


_TYPES = (c_int,) * 6  # compute, scale, A, B, C, D
SIGNATURES = {
    "cublasLtCreate": (POINTER(c_void_p),),
    "cublasLtMatmulDescCreate": (POINTER(c_void_p), c_int, c_int),
    "cublasLtMatmulDescSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatmulDescDestroy": (c_void_p,),
    "cublasLtMatrixLayoutCreate": (POINTER(c_void_p), c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutDestroy": (c_void_p,),
    "cublasLtMatmulAlgoGetIds": (c_void_p, *_TYPES, c_int, POINTER(c_int), POINTER(c_int)),
    "cublasLtMatmulAlgoInit": (c_void_p, *_TYPES, c_int, POINTER(Algo)),
    "cublasLtMatmulAlgoCapGetAttribute": (
        POINTER(Algo),
        c_int,
        c_void_p,
        c_size_t,
        POINTER(c_size_t),
    ),
    "cublasLtMatmulAlgoConfigSetAttribute": (POINTER(Algo), c_int, c_void_p, c_size_t),
    # handle, operation, layouts of A, B, C, D
    "cublasLtMatmulAlgoCheck": (*(c_void_p,) * 6, POINTER(Algo), POINTER(HeuristicResult)),
    # handle, operation, alpha, A, its layout, B, its layout, beta, C, its layout, D, its layout,
    # algorithm, workspace, its bytes, stream
    "cublasLtMatmul": (*(c_void_p,) * 12, POINTER(Algo), c_void_p, c_size_t, c_void_p),
}


# ---- the library ---------------------------------------------------------------------------------


def candidates() -> list[str]:
    """Where the library is looked for: what this process has loaded, torch's wheels, the system."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = [line.split(maxsplit=5)[-1] for line in lines if "/libcublasLt.so" in line]
    for package, below in (("nvidia", "*/lib"), ("torch", "lib")):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            paths += [str(p) for p in sorted(Path(place).glob(f"{below}/libcublasLt.so.*"))]
    return list(dict.fromkeys([*paths, *SONAMES]))


def load(paths: list[str] | None = None) -> Library:
    """The first of `paths` (default: `candidates()`) that can be loaded and has every function.

    Raises:
        CublasLtError: there is none, or it could not make a handle.
    """
    refusals = []
    for path in candidates() if paths is None else paths:
        try:
            functions = ctypes.CDLL(path)
            for name, types in SIGNATURES.items():
                getattr(functions, name).argtypes = types
                getattr(functions, name).restype = c_int
            functions.cublasLtGetStatusName.argtypes = (c_int,)
            functions.cublasLtGetStatusName.restype = c_char_p
            functions.cublasLtGetVersion.argtypes = ()
            functions.cublasLtGetVersion.restype = c_size_t
        except (OSError, AttributeError) as error:
            refusals.append(f"{path}: {error}")
            continue
        return Library(functions)
    raise CublasLtError(
        f"bench: expected a libcublasLt that can be loaded, got none ({'; '.join(refusals)}). "
        "Install a torch that was built with CUDA."
    )


class Library:
    """The functions of SIGNATURES and a handle; lives as long as the process.

    Args:
        functions: what `ctypes.CDLL` returns, with types set, or a stand-in with the same names.
    """

    def __init__(self, functions):
        self._functions = functions
        self.handle = self.made("cublasLtCreate")
        self.version = int(functions.cublasLtGetVersion())  # 130100 for 13.1.0

    def status(self, name: str, *arguments) -> int:
        """Calls the function and returns its status, for refusals that are no errors."""
        return getattr(self._functions, name)(*arguments)

    def __call__(self, name: str, *arguments) -> None:
        """Calls the function.

        Raises:
            CublasLtError: it did not return CUBLAS_STATUS_SUCCESS.
        """
        if status := self.status(name, *arguments):
            text = (self._functions.cublasLtGetStatusName(status) or b"unknown").decode()
            raise CublasLtError(
                f"bench: {name}: expected CUBLAS_STATUS_SUCCESS, got {text} ({status})."
            )

    def made(self, name: str, *arguments) -> c_void_p:
        """What a function creates whose first argument says where to put it."""
        thing = c_void_p()
        self(name, byref(thing), *arguments)
        return thing


# ---- one linear layer ----------------------------------------------------------------------------


class Config(NamedTuple):
    """The configuration of one algorithm; tile, stages and scheme are numbers of cublasLt.h."""

    algo: int
    tile: int
    stages: int
    swizzle: int
    custom: int
    split: int
    scheme: int

    def __str__(self) -> str:
        return " ".join(f"{name} {value}" for name, value in zip(self._fields, self) if value)


@dataclass
class Candidate:
    """A configuration that the library says it can run, within the workspace."""

    config: Config
    algorithm: Algo


class Problem:
    """All algorithms of y [tokens, out_features] = x · Wᵀ, sums in float32.

    Args:
        library: from `load`.      dtype: of x, W and y, torch.float16 or torch.bfloat16.
    Raises:
        CublasLtError: a call failed.
    """

    def __init__(self, library: Library, out_features, in_features, tokens, dtype: torch.dtype):
        if dtype not in DTYPES:
            raise ValueError(f"bench: expected dtype in {[*DTYPES]}, got {dtype}. Choose one.")
        kind = DTYPES[dtype]
        self.library = library
        self.types = (CUBLAS_COMPUTE_32F, CUDA_R_32F, kind, kind, kind, kind)
        self._layouts, self._operation = [], None
        self._one, self._zero = c_float(1.0), c_float(0.0)
        try:
            self._operation = library.made(
                "cublasLtMatmulDescCreate", CUBLAS_COMPUTE_32F, CUDA_R_32F
            )
            transpose = c_int(CUBLAS_OP_T)
            library(
                "cublasLtMatmulDescSetAttribute",
                self._operation,
                CUBLASLT_MATMUL_DESC_TRANSA,
                byref(transpose),
                ctypes.sizeof(transpose),
            )
            # rows, columns and leading dimension of W, x and y, column-major
            for rows, columns in (
                (in_features, out_features),
                (in_features, tokens),
                (out_features, tokens),
            ):
                layout = library.made("cublasLtMatrixLayoutCreate", kind, rows, columns, rows)
                self._layouts.append(layout)
        except CublasLtError:
            self.close()
            raise

    def close(self) -> None:
        """Frees the library's descriptors."""
        for layout in self._layouts:
            self.library("cublasLtMatrixLayoutDestroy", layout)
        if self._operation is not None:
            self.library("cublasLtMatmulDescDestroy", self._operation)
        self._layouts, self._operation = [], None

    def algorithms(self) -> list[int]:
        """The numbers of all algorithms that may know these types."""
        ids, count = (c_int * MAX_IDS)(), c_int()
        self.library(
            "cublasLtMatmulAlgoGetIds", self.library.handle, *self.types, MAX_IDS, ids, byref(count)
        )
        return list(ids[: count.value])

    def candidates(self, algo: int, limit: int, splits=(1,)) -> list[Candidate]:
        """At most `limit` configurations of one algorithm that can run, drawn at random, always
        the same. Empty when the algorithm does not take the types.

        Args:
            splits: numbers of parts of in_features; those beside 1 only where they are supported.
        Raises:
            CublasLtError: the library does not tell what the algorithm can do.
        """
        blank = Algo()
        if self.library.status(
            "cublasLtMatmulAlgoInit", self.library.handle, *self.types, algo, byref(blank)
        ):
            return []
        configs = self._configs(algo, blank, splits)
        random.Random(0).shuffle(configs)
        found = []
        for config in configs[: TRIES * limit]:
            algorithm = self._configured(blank, config)
            if algorithm is not None:
                found.append(Candidate(config, algorithm))
                if len(found) == limit:
                    break
        return found

    def launch(self, candidate: Candidate, weight, x, y, workspace) -> None:
        """y = x · Wᵀ on the current stream; all contiguous.

        Raises:
            CublasLtError: the library refused.
        """
        of_weight, of_x, of_y = self._layouts
        self.library(
            "cublasLtMatmul",
            self.library.handle,
            self._operation,
            byref(self._one),
            weight.data_ptr(),
            of_weight,
            x.data_ptr(),
            of_x,
            byref(self._zero),
            y.data_ptr(),
            of_y,
            y.data_ptr(),
            of_y,
            byref(candidate.algorithm),
            workspace.data_ptr(),
            workspace.numel(),
            torch.cuda.current_stream().cuda_stream,
        )

    def _configs(self, algo: int, blank: Algo, splits) -> list[Config]:
        tiles = self._capabilities(blank, CUBLASLT_ALGO_CAP_TILE_IDS) or [0]
        stages = self._capabilities(blank, CUBLASLT_ALGO_CAP_STAGES_IDS) or [0]
        swizzles = self._capability(blank, CUBLASLT_ALGO_CAP_CTA_SWIZZLING_SUPPORT)
        customs = self._capability(blank, CUBLASLT_ALGO_CAP_CUSTOM_OPTION_MAX)
        schemes = self._capability(blank, CUBLASLT_ALGO_CAP_REDUCTION_SCHEME_MASK)
        parts = [(1, CUBLASLT_REDUCTION_SCHEME_NONE)]
        if self._capability(blank, CUBLASLT_ALGO_CAP_SPLITK_SUPPORT):
            known = (CUBLASLT_REDUCTION_SCHEME_INPLACE, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE)
            parts += [(n, how) for n in splits if n > 1 for how in known if schemes & how]
        grid = itertools.product(
            tiles, stages, range(min(swizzles, 1) + 1), range(min(customs, MAX_CUSTOM) + 1), parts
        )
        return [Config(algo, *options, *part) for *options, part in grid]

    def _capabilities(self, algorithm: Algo, attribute: int) -> list[int]:
        """The values of an attribute that is an array of uint32."""
        size = c_size_t()
        name = "cublasLtMatmulAlgoCapGetAttribute"
        self.library(name, byref(algorithm), attribute, None, 0, byref(size))
        values = (ctypes.c_uint32 * (size.value // 4))()
        if size.value:
            self.library(name, byref(algorithm), attribute, values, size.value, byref(size))
        return list(values)

    def _capability(self, algorithm: Algo, attribute: int) -> int:
        """The value of an attribute of 32 bits."""
        value, size = ctypes.c_int32(), c_size_t()
        self.library(
            "cublasLtMatmulAlgoCapGetAttribute",
            byref(algorithm),
            attribute,
            byref(value),
            ctypes.sizeof(value),
            byref(size),
        )
        return value.value

    def _configured(self, blank: Algo, config: Config) -> Algo | None:
        """The algorithm with this configuration, or None when it cannot run here."""
        algorithm = Algo.from_buffer_copy(blank)
        settings = {
            CUBLASLT_ALGO_CONFIG_TILE_ID: config.tile,
            CUBLASLT_ALGO_CONFIG_STAGES_ID: config.stages,
            CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING: config.swizzle,
            CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION: config.custom,
            CUBLASLT_ALGO_CONFIG_SPLITK_NUM: config.split if config.split > 1 else 0,
            CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME: config.scheme,
        }
        for attribute, number in settings.items():
            value = ctypes.c_int32(number)  # 0 is what cublasLtMatmulAlgoInit has set
            if number and self.library.status(
                "cublasLtMatmulAlgoConfigSetAttribute",
                byref(algorithm),
                attribute,
                byref(value),
                ctypes.sizeof(value),
            ):
                return None
        result = HeuristicResult()
        of_weight, of_x, of_y = self._layouts
        refused = self.library.status(
            "cublasLtMatmulAlgoCheck",
            self.library.handle,
            self._operation,
            of_weight,
            of_x,
            of_y,
            of_y,
            byref(algorithm),
            byref(result),
        )
        return None if refused or result.workspaceSize > WORKSPACE_BYTES else algorithm
