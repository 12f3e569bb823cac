// cusparselt.h: NVIDIA's 2:4 library, loaded at run time and called through a table of pointers, so
// that the module neither links it nor needs its header.
//
// GEMM letters as in core/problem.h: D[M,N] = A[M,K] · B[K,N], M = out_features, N = tokens, K =
// in_features. In the library's terms A = W is the structured matrix, row-major; B is x read
// transposed; D column-major is y row-major.
//
//   load      dlopen, the table of functions, the version     once per process, by Python
//   compress  dense W -> the library's opaque blob            once per weight
//   plan      Problem -> id                                   built once, then found in the cache
//   matmul    id and addresses                                every call
//
// Nothing here allocates memory of a GPU or waits for one: Python passes blobs and workspaces, or
// lends a workspace for all calls on a stream, which saves looking for it in every call. The
// library's documents do not promise thread safety, so one lock guards everything in this file. The
// library works on the current GPU of the calling thread; `device` only tells its handles apart.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/problem.h"
#include "core/status.h"

namespace sparsekern::cusparselt {

struct Version {
  int major = 0, minor = 0, patch = 0;
};

// Of M and K of a weight, and of N and the row strides of x and y; the library takes no others.
constexpr int sparse_multiple(DType dtype) { return 256 / info(dtype).storage_bits; }  // 16, 32
constexpr int dense_multiple(DType dtype) { return 128 / info(dtype).storage_bits; }   // 8, 16
constexpr unsigned kAlignment = 16;    // bytes: of every address that it gets
constexpr int kDefaultAlgorithm = -1;  // let the library choose
constexpr std::size_t kMaxPlans = 2048;

// Everything that a plan depends on, and therefore the key of the cache. The address of the bias is
// part of it, because the library stores it in the plan.
struct Problem {
  int device;
  DType dtype;    // of the weight and of x
  DType y_dtype;  // dtype, or one of 16 bits where that has 8
  std::int64_t m, n, k;
  std::int64_t x_stride, y_stride;  // of rows, in elements
  const void* bias;                 // [M], or null
  bool relu;
  bool channel_scale;  // `matmul` multiplies the sums of each row of W with a factor
  int algorithm;       // an id below Plan::algorithms, or kDefaultAlgorithm; with it the next two
                       // do not count
  int split_k;         // 1: none; > 1: parts of K; -1: the library's "segment-K"
  int split_k_mode;    // a value of cusparseLtSplitKMode_t; 0: as the library chooses
};

// What `plan` tells of a plan.
struct PlanInfo {
  std::uint64_t id = 0;  // never used again for another plan
  std::size_t workspace_bytes = 0;
  int algorithms = 0;  // how many ids this problem has
};

// Loads the library at `path` (or by the system's search, when it is a plain name) and forgets all
// handles and plans of one that was loaded before. Refuses versions whose structures are not known.
Status load(const std::string& path, Version& version);

// Destroys plans and handles and forgets the library; does nothing without one.
void unload();

// Bytes of the blob of a weight, and of the buffer that only `compress` needs.
Status compressed_bytes(int device, DType dtype, std::int64_t m, std::int64_t k, std::size_t& blob,
                        std::size_t& buffer);

// dense: [M, K] contiguous and 2:4 along K.
Status compress(int device, DType dtype, std::int64_t m, std::int64_t k, const void* dense,
                void* blob, void* buffer, cudaStream_t stream);

// The plan of a problem: from the cache, or built now. A full cache is emptied first.
Status plan(const Problem& problem, PlanInfo& info);

// Memory that later calls on this stream of this device may use as their workspace. It stays alive
// until other memory replaces it here, or until `unload`.
void lend_workspace(int device, cudaStream_t stream, void* workspace, std::size_t bytes);

// What `matmul` did. Nothing, unless kDone.
enum class Outcome : int {
  kDone = 0,
  kUnknownPlan = 1,  // it has left the cache: call `plan` again
  kNoWorkspace =
      2,  // null, and none that is large enough was lent; or a graph captures the stream,
          // which may be replayed on any other: pass one of this call alone
};

// y = x · Wᵀ * channel_scale + bias, with relu where the plan has it. workspace: null takes the lent
// one. channel_scale: float32 [M] on the GPU where the plan has it, else null. The library has no
// factor for each token beside it.
Status matmul(std::uint64_t id, const void* blob, const void* x, void* y, void* workspace,
              const void* channel_scale, cudaStream_t stream, Outcome& outcome);

// The same matmul `calls` times, bare, and the seconds of the host for all of them: what one call
// of the C function costs, for bench/bench_overhead.py.
Status time_matmul(std::uint64_t id, const void* blob, const void* x, void* y, void* workspace,
                   cudaStream_t stream, int calls, double& seconds);

}  // namespace sparsekern::cusparselt
