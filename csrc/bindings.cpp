// bindings.cpp — the pybind11 module sparsekern._C: plain pointers, sizes and a stream in; nothing
// that knows of torch.
//
// Four parts: introspection of the build and of the device, the exceptions, the table of ops, and
// cuSPARSELt. An op here does nothing but turn integers into pointers, call a launcher (core/problem.h)
// and raise its Status. Python owns shapes, dtypes, allocation and dispatch; typed surface:
// sparsekern/_C.pyi.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "build_lists.h"  // written by CMakeLists.txt
#include "linear/configs.h"
#include "cusparselt/cusparselt.h"
#include "core/fastcall.h"
#include "core/problem.h"
#include "core/status.h"

namespace py = pybind11;

namespace sparsekern {
namespace {

// Raises the Python exception that belongs to a Status; returns when it is ok.
void raise_if_error(const Status& status) {
  PyObject* exception = nullptr;
  switch (status.kind) {
    case StatusKind::ok:
      return;
    case StatusKind::value:
      exception = PyExc_ValueError;
      break;
    case StatusKind::type:
      exception = PyExc_TypeError;
      break;
    case StatusKind::unsupported:
      exception = PyExc_NotImplementedError;
      break;
    case StatusKind::runtime:
      exception = PyExc_RuntimeError;
      break;
  }
  PyErr_SetString(exception, status.message.c_str());
  throw py::error_already_set();
}

// "a;b;c" -> ["a", "b", "c"]
py::list split(const std::string& text) {
  py::list parts;
  std::string part;
  for (const char c : text + ";") {
    if (c != ';') {
      part += c;
    } else if (!part.empty()) {
      parts.append(part);
      part.clear();
    }
  }
  return parts;
}

// What this module was built from and with. The macros come from CMakeLists.txt.
py::dict build_info() {
  py::dict info;
  info["version"] = SPARSEKERN_VERSION;
  info["nvcc"] = SPARSEKERN_NVCC_VERSION;
  info["cudart"] = CUDART_VERSION;
  info["archs"] = split(SPARSEKERN_ARCHS);
  info["flags"] = split(SPARSEKERN_NVCC_FLAGS);
  info["kernels"] = split(SPARSEKERN_KERNELS);
  return info;
}

// GPUs that this process can use; 0 without a driver or a device. Any other failure is raised.
int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver ||
      error == cudaErrorStubLibrary) {
    (void)cudaGetLastError();
    return 0;
  }
  raise_if_error(cuda_status("sparsekern._C.device_count", "cudaGetDeviceCount", error));
  return count;
}

Status query_device(int device, py::dict& info) {
  constexpr const char* op = "sparsekern._C.device_info";
  const int count = device_count();
  SK_CHECK_REL(op, device, >=, 0, "Pass the index of a GPU.");
  SK_CHECK_REL(op, device, <, count, "Pass the index of a GPU that this process can see.");
  cudaDeviceProp properties;
  SK_CUDA(op, cudaGetDeviceProperties(&properties, device));
  int driver = 0, runtime = 0;
  SK_CUDA(op, cudaDriverGetVersion(&driver));
  SK_CUDA(op, cudaRuntimeGetVersion(&runtime));
  info["name"] = std::string(properties.name);
  info["capability"] = py::make_tuple(properties.major, properties.minor);
  info["multiprocessors"] = properties.multiProcessorCount;
  info["memory_bytes"] = properties.totalGlobalMem;
  info["l2_bytes"] = properties.l2CacheSize;
  info["shared_bytes_per_block"] = properties.sharedMemPerBlockOptin;
  info["registers_per_multiprocessor"] = properties.regsPerMultiprocessor;
  info["cuda_driver"] = driver;
  info["cuda_runtime"] = runtime;
  return {};
}

py::dict device_info(int device) {
  py::dict info;
  raise_if_error(query_device(device, info));
  return info;
}

void bind_introspection(py::module_& m) {
  m.def("build_info", &build_info,
        "What the module was built from: version, nvcc, archs, flags, kernels.");
  m.def("device_count", &device_count, "Number of usable GPUs; 0 without a driver.");
  m.def("device_info", &device_info, py::arg("device"), "Name, capability and sizes of one GPU.");
}

// ---- ops: integers alone, all positional, bound by fastcall.h so that a call costs little -------

using Address = std::uintptr_t;  // of device memory, or of a stream; 0 is null

const void* in(Address address) { return reinterpret_cast<const void*>(address); }
void* out(Address address) { return reinterpret_cast<void*>(address); }
cudaStream_t as_stream(Address address) { return reinterpret_cast<cudaStream_t>(address); }

// A thread that torch started (autograd, a user's) may have no current context yet, and encoding a
// tensor map needs one. cudaGetDevice answers for torch's choice of device, because both runtimes
// look at the driver's current context.
void bind_thread(const char* op) {
  static thread_local bool bound = false;
  if (bound) return;
  int device = 0;
  raise_if_error(cuda_status(op, "cudaGetDevice", cudaGetDevice(&device)));
  raise_if_error(cuda_status(op, "cudaSetDevice", cudaSetDevice(device)));
  bound = true;
}

void prune_compress(Address w, Address values, Address metadata, Address bad_chunks,
                    std::int64_t elements, int dtype, Address stream) {
  raise_if_error(launch_prune_compress(in(w), out(values), out(metadata),
                                       static_cast<int*>(out(bad_chunks)), elements,
                                       static_cast<DType>(dtype), as_stream(stream)));
}

void pack(Address values, Address metadata, Address packed_values, Address packed_metadata,
          int out_features, int in_features, Address stream) {
  bind_thread("sparsekern.pack");
  raise_if_error(launch_pack(in(values), in(metadata), out(packed_values), out(packed_metadata),
                             out_features, in_features, as_stream(stream)));
}

LinearProblem linear_problem(Address x, Address values, Address metadata, Address bias,
                             Address residual, Address y, int tokens, int out_features,
                             int in_features, std::int64_t x_stride, std::int64_t y_stride,
                             std::int64_t residual_stride, int dtype, int activation) {
  bind_thread("sparsekern.linear");
  return {in(x),
          in(values),
          in(metadata),
          in(bias),
          in(residual),
          out(y),
          tokens,
          out_features,
          in_features,
          x_stride,
          y_stride,
          residual_stride,
          static_cast<DType>(dtype),
          static_cast<Activation>(activation)};
}

void decode(Address x, Address values, Address metadata, Address bias, Address residual, Address y,
            int tokens, int out_features, int in_features, std::int64_t x_stride,
            std::int64_t y_stride, std::int64_t residual_stride, int dtype, int activation,
            int config, Address stream) {
  raise_if_error(launch_decode(
      linear_problem(x, values, metadata, bias, residual, y, tokens, out_features, in_features,
                     x_stride, y_stride, residual_stride, dtype, activation),
      config, as_stream(stream)));
}

void decode_gated(Address x, Address gate_values, Address gate_metadata, Address up_values,
                  Address up_metadata, Address y, int tokens, int out_features, int in_features,
                  std::int64_t x_stride, std::int64_t y_stride, int dtype, int config,
                  Address stream) {
  const GatedProblem problem = {
      linear_problem(x, gate_values, gate_metadata, 0, 0, y, tokens, out_features, in_features,
                     x_stride, y_stride, 0, dtype, static_cast<int>(Activation::kNone)),
      in(up_values), in(up_metadata)};
  raise_if_error(launch_decode_gated(problem, config, as_stream(stream)));
}

void prefill(Address x, Address values, Address metadata, Address bias, Address residual, Address y,
             int tokens, int out_features, int in_features, std::int64_t x_stride,
             std::int64_t y_stride, std::int64_t residual_stride, int dtype, int activation,
             int config, Address workspace, Address stream) {
  raise_if_error(launch_prefill(
      linear_problem(x, values, metadata, bias, residual, y, tokens, out_features, in_features,
                     x_stride, y_stride, residual_stride, dtype, activation),
      config, out(workspace), as_stream(stream)));
}

void mma(Address x, Address values, Address metadata, Address bias, Address residual, Address y,
         int tokens, int out_features, int in_features, std::int64_t x_stride,
         std::int64_t y_stride, std::int64_t residual_stride, int dtype, int activation, int config,
         Address stream) {
  raise_if_error(launch_mma(
      linear_problem(x, values, metadata, bias, residual, y, tokens, out_features, in_features,
                     x_stride, y_stride, residual_stride, dtype, activation),
      config, as_stream(stream)));
}

void split_k(Address x, Address values, Address metadata, Address bias, Address residual, Address y,
             int tokens, int out_features, int in_features, std::int64_t x_stride,
             std::int64_t y_stride, std::int64_t residual_stride, int dtype, int activation,
             int config, Address stream) {
  raise_if_error(launch_split(
      linear_problem(x, values, metadata, bias, residual, y, tokens, out_features, in_features,
                     x_stride, y_stride, residual_stride, dtype, activation),
      config, as_stream(stream)));
}

void naive(Address x, Address values, Address metadata, Address bias, Address residual, Address y,
           int tokens, int out_features, int in_features, std::int64_t x_stride,
           std::int64_t y_stride, std::int64_t residual_stride, int dtype, int activation,
           Address stream) {
  raise_if_error(launch_naive(
      linear_problem(x, values, metadata, bias, residual, y, tokens, out_features, in_features,
                     x_stride, y_stride, residual_stride, dtype, activation),
      as_stream(stream)));
}

std::size_t workspace_bytes() {
  bind_thread("sparsekern.linear");
  std::size_t bytes = 0;
  raise_if_error(prefill_workspace_bytes(bytes));
  return bytes;
}

// 0 when the stream is not being captured into a CUDA graph; else a number of this one capture.
unsigned long long capture_id(Address stream) {
  constexpr const char* op = "sparsekern.linear";
  bind_thread(op);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  raise_if_error(cuda_status(op, "cudaStreamGetCaptureInfo",
                             cudaStreamGetCaptureInfo(as_stream(stream), &capture, &id)));
  return capture == cudaStreamCaptureStatusActive ? id : 0;
}

// SK_PREFILL_CONFIGS in the words of Python: [{index, rows, tokens, cluster_rows, cluster_tokens,
// streamed}].
py::list prefill_configs() {
  py::list configs;
  const auto add = [&configs](int index, int panels, int tokens, int cluster_m, int cluster_n,
                              bool streamed) {
    py::dict config;
    config["index"] = index;
    config["rows"] = 128 * panels;
    config["tokens"] = tokens;
    config["cluster_rows"] = cluster_m;
    config["cluster_tokens"] = cluster_n;
    config["streamed"] = streamed;
    configs.append(config);
  };
#define SK_ADD(index, panels, tokens, cluster_m, cluster_n, streamed) \
  add(index, panels, tokens, cluster_m, cluster_n, streamed);
  SK_PREFILL_CONFIGS(SK_ADD)
#undef SK_ADD
  return configs;
}

// SK_DECODE_CONFIGS likewise: [{index, rows, split}].
py::list decode_configs() {
  py::list configs;
  const auto add = [&configs](int index, int panels, int split) {
    py::dict config;
    config["index"] = index;
    config["rows"] = 64 * panels;
    config["split"] = split;
    configs.append(config);
  };
#define SK_ADD(index, panels, split) add(index, panels, split);
  SK_DECODE_CONFIGS(SK_ADD)
#undef SK_ADD
  return configs;
}

// SK_MMA_CONFIGS likewise: [{index, rows, tokens, warps_rows, warps_tokens, split, stages}].
py::list mma_configs() {
  py::list configs;
  const auto add = [&configs](int index, int rows, int tokens, int warps_m, int warps_n,
                              int warps_k, int stages) {
    py::dict config;
    config["index"] = index;
    config["rows"] = rows;
    config["tokens"] = tokens;
    config["warps_rows"] = warps_m;
    config["warps_tokens"] = warps_n;
    config["split"] = warps_k;
    config["stages"] = stages;
    configs.append(config);
  };
#define SK_ADD(index, rows, tokens, warps_m, warps_n, warps_k, stages) \
  add(index, rows, tokens, warps_m, warps_n, warps_k, stages);
  SK_MMA_CONFIGS(SK_ADD)
#undef SK_ADD
  return configs;
}

// SK_SPLIT_CONFIGS likewise: [{index, rows, tokens, split}].
py::list split_configs() {
  py::list configs;
  const auto add = [&configs](int index, int panels, int tokens, int split) {
    py::dict config;
    config["index"] = index;
    config["rows"] = 128 * panels;
    config["tokens"] = tokens;
    config["split"] = split;
    configs.append(config);
  };
#define SK_ADD(index, panels, tokens, split) add(index, panels, tokens, split);
  SK_SPLIT_CONFIGS(SK_ADD)
#undef SK_ADD
  return configs;
}

void bind_ops(py::module_& m) {
  m.def("decode_configs", &decode_configs, "What `decode` can use; config 0 chooses among them.");
  m.def("decode_config", &decode_config, "The index that config 0 stands for.");
  m.def("prefill_configs", &prefill_configs, "The tiles that `prefill` can use.");
  m.def("mma_configs", &mma_configs, "The tiles that `mma` can use.");
  m.def("split_configs", &split_configs, "The tiles that `split` can use.");
  fastcall::def<&prune_compress>(m, "prune_compress", "launch_prune_compress");
  fastcall::def<&pack>(m, "pack", "launch_pack");
  fastcall::def<&decode>(m, "decode", "launch_decode: up to 64 tokens");
  fastcall::def<&decode_gated>(m, "decode_gated", "launch_decode_gated: up to 32 tokens");
  fastcall::def<&prefill>(m, "prefill", "launch_prefill");
  fastcall::def<&mma>(m, "mma", "launch_mma: compute capability 8.0 and later");
  fastcall::def<&split_k>(m, "split", "launch_split: for few tiles");
  fastcall::def<&naive>(m, "naive", "launch_naive: the readable kernel, for tests");
  m.attr("PREFILL_COUNTER_BYTES") = kPrefillCounterBytes;
  m.def("prefill_workspace_bytes", &workspace_bytes, "Its workspace on the current device.");
  fastcall::def<&capture_id>(m, "capture_id",
                             "0, or a number of the stream's current graph capture.");
}

// ---- cuSPARSELt (cusparselt.h) ------------------------------------------------------------------

// Where there is no GPU the library itself says so, in its own words.
void bind_thread_if_possible() {
  static thread_local bool done = false;
  if (done) return;
  if (device_count() > 0) bind_thread("sparsekern.cusparselt");
  done = true;
}

py::tuple cusparselt_load(const std::string& path) {
  cusparselt::Version version;
  raise_if_error(cusparselt::load(path, version));
  return py::make_tuple(version.major, version.minor, version.patch);
}

py::tuple cusparselt_compressed_bytes(int device, int dtype, std::int64_t out_features,
                                      std::int64_t in_features) {
  bind_thread_if_possible();
  std::size_t blob = 0, buffer = 0;
  raise_if_error(cusparselt::compressed_bytes(device, static_cast<DType>(dtype), out_features,
                                              in_features, blob, buffer));
  return py::make_tuple(blob, buffer);
}

void cusparselt_compress(int device, int dtype, std::int64_t out_features, std::int64_t in_features,
                         Address dense, Address blob, Address buffer, Address stream) {
  bind_thread_if_possible();
  raise_if_error(cusparselt::compress(device, static_cast<DType>(dtype), out_features, in_features,
                                      in(dense), out(blob), out(buffer), as_stream(stream)));
}

py::tuple cusparselt_plan(int device, int dtype, std::int64_t out_features, std::int64_t tokens,
                          std::int64_t in_features, std::int64_t x_stride, std::int64_t y_stride,
                          Address bias, bool relu, int algorithm, int split_k, int split_k_mode) {
  bind_thread_if_possible();
  cusparselt::PlanInfo info;
  raise_if_error(
      cusparselt::plan({device, static_cast<DType>(dtype), out_features, tokens, in_features,
                        x_stride, y_stride, in(bias), relu, algorithm, split_k, split_k_mode},
                       info));
  return py::make_tuple(info.id, info.workspace_bytes, info.algorithms);
}

void cusparselt_lend_workspace(int device, Address stream, Address workspace, std::size_t bytes) {
  cusparselt::lend_workspace(device, as_stream(stream), out(workspace), bytes);
}

int cusparselt_matmul(std::uint64_t id, Address blob, Address x, Address y, Address workspace,
                      Address stream) {
  bind_thread_if_possible();
  cusparselt::Outcome outcome = cusparselt::Outcome::kDone;
  raise_if_error(
      cusparselt::matmul(id, in(blob), in(x), out(y), out(workspace), as_stream(stream), outcome));
  return static_cast<int>(outcome);
}

double cusparselt_time_matmul(std::uint64_t id, Address blob, Address x, Address y,
                              Address workspace, Address stream, int calls) {
  double seconds = 0;
  raise_if_error(cusparselt::time_matmul(id, in(blob), in(x), out(y), out(workspace),
                                         as_stream(stream), calls, seconds));
  return seconds;
}

void bind_cusparselt(py::module_& m) {
  m.attr("CUSPARSELT_MAX_PLANS") = cusparselt::kMaxPlans;
  m.def("cusparselt_load", &cusparselt_load, "Its version (major, minor, patch).");
  m.def("cusparselt_unload", &cusparselt::unload, "Destroys plans and handles.");
  m.def("cusparselt_compressed_bytes", &cusparselt_compressed_bytes, "(blob, buffer) bytes.");
  m.def("cusparselt_compress", &cusparselt_compress, "A dense 2:4 weight into its blob.");
  m.def("cusparselt_plan", &cusparselt_plan, "(id, workspace bytes, number of algorithms).");
  m.attr("CUSPARSELT_UNKNOWN_PLAN") = static_cast<int>(cusparselt::Outcome::kUnknownPlan);
  m.attr("CUSPARSELT_NO_WORKSPACE") = static_cast<int>(cusparselt::Outcome::kNoWorkspace);
  fastcall::def<&cusparselt_lend_workspace>(m, "cusparselt_lend_workspace",
                                            "Memory for later calls on a stream.");
  fastcall::def<&cusparselt_matmul>(m, "cusparselt_matmul", "0: done; else what is missing.");
  m.def("cusparselt_time_matmul", &cusparselt_time_matmul, "Host seconds of so many bare calls.");
}

}  // namespace
}  // namespace sparsekern

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "CUDA kernels of sparsekern. Plain pointers and a stream; nothing is checked for being on "
      "the right device.";
  sparsekern::bind_introspection(m);
  sparsekern::bind_ops(m);
  sparsekern::bind_cusparselt(m);
}
