// status.h — how the C++ core reports errors: a Status value with a kind and a message, never an
// exception, never exit().
//
// A launcher returns Status. bindings.cpp turns the kind into a Python exception:
//   value -> ValueError                  type -> TypeError
//   unsupported -> NotImplementedError   runtime -> RuntimeError
//
// Messages have one form, the same as in Python (sparsekern/errors.py):
//   <op>: expected <argument> <relation> <requirement>, got <value>. <one remedy>
// The macros print the compared expressions' values, so a message cannot contradict its check. An
// ok Status allocates nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <sstream>
#include <string>

namespace sparsekern {

enum class StatusKind { ok, value, type, unsupported, runtime };

struct [[nodiscard]] Status {
  StatusKind kind = StatusKind::ok;
  std::string message;

  bool ok() const { return kind == StatusKind::ok; }
};

// Status of the given kind whose message is the concatenation of all arguments.
template <typename... Args>
Status make_status(StatusKind kind, const Args&... args) {
  std::ostringstream text;
  (text << ... << args);
  return Status{kind, text.str()};
}

// Status of a CUDA runtime call; `what` names the call or the kernel.
inline Status cuda_status(const char* op, const char* what, cudaError_t error) {
  if (error == cudaSuccess) return {};
  return make_status(StatusKind::runtime, op, ": ", what, " failed: ", cudaGetErrorName(error),
                     " (", cudaGetErrorString(error), ").");
}

// Status of the launch just made on this thread: call it directly after <<<>>> or
// cudaLaunchKernelEx. Does not synchronise.
inline Status launch_status(const char* op, const char* kernel, dim3 grid, dim3 block,
                            std::size_t smem_bytes) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return make_status(StatusKind::runtime, op, ": launch of ", kernel,
                     " failed: ", cudaGetErrorName(error), " (", cudaGetErrorString(error),
                     "); grid ", grid.x, "x", grid.y, "x", grid.z, ", block ", block.x, "x",
                     block.y, "x", block.z, ", ", smem_bytes, " bytes of dynamic shared memory.");
}

}  // namespace sparsekern

// Leave the function with the Status of `expr` when it is not ok.
#define SK_RETURN_IF_ERROR(expr)              \
  do {                                        \
    ::sparsekern::Status sk_status_ = (expr); \
    if (!sk_status_.ok()) return sk_status_;  \
  } while (0)

// Leave the function with a runtime Status when a CUDA runtime call fails.
#define SK_CUDA(op, call) SK_RETURN_IF_ERROR(::sparsekern::cuda_status(op, #call, (call)))

// Require `actual <relation> wanted`:
//   SK_CHECK_REL("sparsekern.pack", in_features, ==, 2 * kept, "Pad the weight.");
#define SK_CHECK_REL(op, actual, relation, wanted, remedy)                                   \
  do {                                                                                       \
    const auto sk_actual_ = (actual);                                                        \
    const auto sk_wanted_ = (wanted);                                                        \
    if (!(sk_actual_ relation sk_wanted_))                                                   \
      return ::sparsekern::make_status(::sparsekern::StatusKind::value, op,                  \
                                       ": expected " #actual " " #relation " " #wanted " (", \
                                       sk_wanted_, "), got ", sk_actual_, ". ", remedy);     \
  } while (0)

// Require that `quantity` is a multiple of `divisor`.
#define SK_CHECK_MULTIPLE(op, quantity, divisor, remedy)                                \
  do {                                                                                  \
    const auto sk_value_ = (quantity);                                                  \
    const auto sk_divisor_ = (divisor);                                                 \
    if (sk_value_ % sk_divisor_ != 0)                                                   \
      return ::sparsekern::make_status(::sparsekern::StatusKind::value, op,             \
                                       ": expected " #quantity " to be a multiple of ", \
                                       sk_divisor_, ", got ", sk_value_, ". ", remedy); \
  } while (0)
