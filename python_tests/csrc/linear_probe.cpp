// linear_probe.cpp: the type Linear (csrc/linear/linear_type.cpp) over kernels that only say what
// they were given, for test_linear_type.py. No GPU, no CUDA runtime.
#include <pybind11/pybind11.h>

#include <string>

#include "core/problem.h"
#include "linear/launch.h"
#include "linear/linear_type.h"
#include "weights/widen.h"

namespace py = pybind11;
using sparsekern::LinearProblem;

struct {
  std::string kernel;
  sparsekern::DType weight, x, y;
  LinearProblem problem;
  int config;
  cudaStream_t stream;
} seen;
bool records = true;
sparsekern::WidenProblem widened;  // what was widened for it; from nowhere: nothing

namespace sparsekern {

Status record(const char* kernel, DType weight, DType x, DType y, const LinearProblem& p,
              int config, cudaStream_t stream) {
  if (p.tokens == 63) return make_status(StatusKind::unsupported, "63 tokens");
  if (records) seen = {kernel, weight, x, y, p, config, stream};
  if (!p.weight_is_new) widened = {};
  return {};
}

Status launch_widen(const WidenProblem& problem, cudaStream_t) {
  widened = problem;
  return {};
}

// Every instantiation that kernels.h may name.
#define SK_RECORDER(space, function, text)                                         \
  namespace space {                                                                \
  template <class W, class X, class Y>                                             \
  Status function(const LinearProblem& p, int config, cudaStream_t stream) {       \
    return record(text, kDTypeOf<W>, kDTypeOf<X>, kDTypeOf<Y>, p, config, stream); \
  }                                                                                \
  SK_PLAIN(SK_INSTANTIATE_LINEAR, function)                                        \
  SK_W8A8(SK_INSTANTIATE_LINEAR, function)                                         \
  SK_W8A16(SK_INSTANTIATE_LINEAR, function)                                        \
  SK_W4A16(SK_INSTANTIATE_LINEAR, function)                                        \
  }
SK_RECORDER(decode, linear, "decode")
SK_RECORDER(decode, gated, "decode_gated")
SK_RECORDER(prefill, linear, "prefill")
SK_RECORDER(split, linear, "split")
SK_RECORDER(narrow, linear, "narrow")
SK_RECORDER(mma, linear, "mma")
SK_RECORDER(naive, linear, "naive")

}  // namespace sparsekern

// What the runtime would be asked.
extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 132, cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return ""; }
const char* cudaGetErrorString(cudaError_t) { return ""; }
}

template <class T>
std::uintptr_t number(const T* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer);
}

py::dict last_launch() {
  const LinearProblem& p = seen.problem;
  py::dict d;
  const auto name = [](sparsekern::DType dtype) { return sparsekern::info(dtype).name; };
  d["kernel"] = seen.kernel, d["config"] = seen.config;
  d["launched"] = py::make_tuple(name(seen.weight), name(seen.x), name(seen.y));
  d["dtype"] = name(p.y.dtype), d["x_dtype"] = name(p.x.dtype);
  d["tokens"] = p.tokens, d["out_features"] = p.out_features, d["in_features"] = p.in_features;
  d["x_stride"] = p.x.stride, d["y_stride"] = p.y.stride;
  d["residual_stride"] = p.epilogue.residual_stride;
  d["scale_group"] = p.scale_group;
  d["weight_dtype"] = name(p.weight_dtype);
  d["activation"] = static_cast<int>(p.epilogue.activation);
  d["x"] = number(p.x.data), d["values"] = number(p.weight.values);
  d["metadata"] = number(p.weight.metadata), d["y"] = number(p.y.data);
  d["stream"] = number(seen.stream), d["bias"] = number(p.epilogue.bias);
  d["residual"] = number(p.epilogue.residual), d["workspace"] = number(p.workspace);
  d["up_values"] = number(p.up.values), d["up_metadata"] = number(p.up.metadata);
  d["channel_scale"] = number(p.epilogue.channel_scale);
  d["token_scale"] = number(p.epilogue.token_scale);
  return d;
}

// What was widened for the last launch; empty: nothing.
py::dict last_widened() {
  py::dict d;
  const sparsekern::WidenProblem& w = widened;
  if (w.widened == nullptr) return d;
  d["out_features"] = w.out_features, d["in_features"] = w.in_features;
  d["from"] = sparsekern::info(w.from).name, d["to"] = sparsekern::info(w.to).name;
  d["scale_group"] = w.scale_group, d["values"] = number(w.weight.values);
  d["metadata"] = number(w.weight.metadata), d["channel_scale"] = number(w.channel_scale);
  d["widened"] = number(w.widened);
  return d;
}

// The same launch as pybind11 binds 16 positional integers, to compare the cost.
void by_pybind11(std::uintptr_t x, std::uintptr_t values, std::uintptr_t metadata,
                 std::uintptr_t bias, std::uintptr_t residual, std::uintptr_t y, int tokens,
                 int out_features, int in_features, std::int64_t x_stride, std::int64_t y_stride,
                 std::int64_t residual_stride, int dtype, int activation, int config,
                 std::uintptr_t stream) {
  LinearProblem p = {};
  p.tokens = tokens, p.out_features = out_features, p.in_features = in_features;
  p.x = {reinterpret_cast<void*>(x), x_stride, static_cast<sparsekern::DType>(dtype)};
  p.y = {reinterpret_cast<void*>(y), y_stride, static_cast<sparsekern::DType>(dtype)};
  p.weight = {reinterpret_cast<void*>(values), reinterpret_cast<void*>(metadata)};
  p.epilogue = {nullptr,
                nullptr,
                reinterpret_cast<void*>(bias),
                static_cast<sparsekern::Activation>(activation),
                reinterpret_cast<void*>(residual),
                residual_stride};
  (void)sparsekern::record("decode", p.x.dtype, p.x.dtype, p.y.dtype, p, config,
                           reinterpret_cast<cudaStream_t>(stream));
}

PYBIND11_MODULE(linear_probe, m) {
  sparsekern::bind_linear(m);
  m.def("last_launch", &last_launch);
  m.def("last_widened", &last_widened);
  m.def("record", [](bool on) { records = on; });
  m.def("by_pybind11", &by_pybind11);
}
