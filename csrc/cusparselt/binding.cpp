// binding.cpp: the functions of cusparselt.h for Python.
#include "cusparselt/binding.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/fastcall.h"
#include "core/python.h"
#include "cusparselt/cusparselt.h"

namespace py = pybind11;

namespace sparsekern::cusparselt {
namespace {

// Where there is no GPU the library itself says so, in its own words.
void bind_thread_if_possible() {
  static thread_local bool done = false;
  if (done) return;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) (void)cudaGetLastError();
  if (count > 0) raise_if_error(bind_thread("sparsekern.cusparselt"));
  done = true;
}

py::tuple load_library(const std::string& path) {
  Version version;
  raise_if_error(load(path, version));
  return py::make_tuple(version.major, version.minor, version.patch);
}

py::tuple py_compressed_bytes(int device, DType dtype, std::int64_t out_features,
                              std::int64_t in_features) {
  bind_thread_if_possible();
  std::size_t blob = 0, buffer = 0;
  raise_if_error(compressed_bytes(device, dtype, out_features, in_features, blob, buffer));
  return py::make_tuple(blob, buffer);
}

void py_compress(int device, DType dtype, std::int64_t out_features, std::int64_t in_features,
                 Address dense, Address blob, Address buffer, Address stream) {
  bind_thread_if_possible();
  raise_if_error(compress(device, dtype, out_features, in_features, in(dense), out(blob),
                          out(buffer), as_stream(stream)));
}

py::tuple py_plan(int device, DType dtype, DType y_dtype, std::int64_t out_features,
                  std::int64_t tokens, std::int64_t in_features, std::int64_t x_stride,
                  std::int64_t y_stride, Address bias, bool relu, bool channel_scale, int algorithm,
                  int split_k, int split_k_mode) {
  bind_thread_if_possible();
  PlanInfo info;
  raise_if_error(plan({device, dtype, y_dtype, out_features, tokens, in_features, x_stride,
                       y_stride, in(bias), relu, channel_scale, algorithm, split_k, split_k_mode},
                      info));
  return py::make_tuple(info.id, info.workspace_bytes, info.algorithms);
}

void py_lend_workspace(int device, Address stream, Address workspace, std::size_t bytes) {
  lend_workspace(device, as_stream(stream), out(workspace), bytes);
}

int py_matmul(std::uint64_t id, Address blob, Address x, Address y, Address workspace,
              Address stream) {
  bind_thread_if_possible();
  Outcome outcome = Outcome::kDone;
  raise_if_error(
      matmul(id, in(blob), in(x), out(y), out(workspace), nullptr, as_stream(stream), outcome));
  return static_cast<int>(outcome);
}

int py_matmul_scaled(std::uint64_t id, Address blob, Address x, Address y, Address workspace,
                     Address channel_scale, Address stream) {
  bind_thread_if_possible();
  Outcome outcome = Outcome::kDone;
  raise_if_error(matmul(id, in(blob), in(x), out(y), out(workspace), in(channel_scale),
                        as_stream(stream), outcome));
  return static_cast<int>(outcome);
}

double py_time_matmul(std::uint64_t id, Address blob, Address x, Address y, Address workspace,
                      Address stream, int calls) {
  double seconds = 0;
  raise_if_error(
      time_matmul(id, in(blob), in(x), out(y), out(workspace), as_stream(stream), calls, seconds));
  return seconds;
}

}  // namespace

void bind(py::module_& m) {
  using fastcall::def;
  m.attr("CUSPARSELT_MAX_PLANS") = kMaxPlans;
  m.attr("CUSPARSELT_UNKNOWN_PLAN") = static_cast<int>(Outcome::kUnknownPlan);
  m.attr("CUSPARSELT_NO_WORKSPACE") = static_cast<int>(Outcome::kNoWorkspace);
  m.def("cusparselt_load", &load_library, "Its version (major, minor, patch).");
  m.def("cusparselt_unload", &unload, "Destroys plans and handles.");
  def<&py_compressed_bytes>(m, "cusparselt_compressed_bytes",
                            "device, dtype, out_features, in_features, /", "(blob, buffer) bytes.");
  def<&py_compress>(m, "cusparselt_compress",
                    "*, device, dtype, out_features, in_features, dense, blob, buffer, stream",
                    "A dense 2:4 weight into its blob.");
  def<&py_plan>(m, "cusparselt_plan",
                "*, device, dtype, y_dtype, out_features, tokens, in_features, x_stride, y_stride, "
                "bias, relu, channel_scale, algorithm, split_k, split_k_mode",
                "(id, workspace bytes, number of algorithms).");
  def<&py_lend_workspace>(m, "cusparselt_lend_workspace", "device, stream, workspace, bytes, /",
                          "Memory for later calls on a stream.");
  def<&py_matmul>(m, "cusparselt_matmul", "plan, blob, x, y, workspace, stream, /",
                  "0: done; else what is missing.");
  def<&py_matmul_scaled>(m, "cusparselt_matmul_scaled",
                         "*, plan, blob, x, y, workspace, channel_scale, stream",
                         "The same for a plan with channel_scale.");
  def<&py_time_matmul>(m, "cusparselt_time_matmul", "*, plan, blob, x, y, workspace, stream, calls",
                       "Host seconds of so many bare calls.");
}

}  // namespace sparsekern::cusparselt
