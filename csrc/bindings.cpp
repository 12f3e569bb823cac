// bindings.cpp — the pybind11 module sparsekern._C: plain pointers, sizes and a stream in; nothing
// that knows of torch.
//
// Here: introspection of the build and of the device, the weights, activations, and the registration of
// everything else (linear/linear_type.cpp, cusparselt/binding.cpp). Python owns shapes, dtypes,
// allocation and dispatch; typed surface: sparsekern/_C.pyi.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "activations/quantize_rows.h"
#include "build_lists.h"  // written by CMakeLists.txt
#include "core/fastcall.h"
#include "core/problem.h"
#include "core/python.h"
#include "cusparselt/binding.h"
#include "linear/linear_type.h"

namespace py = pybind11;

namespace sparsekern {
namespace {

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

// ---- weights and streams ------------------------------------------------------------------------

void prune_compress(Address w, Address values, Address metadata, Address bad_chunks,
                    std::int64_t elements, DType dtype, Address stream) {
  raise_if_error(launch_prune_compress(in(w), out(values), out(metadata),
                                       static_cast<int*>(out(bad_chunks)), elements, dtype,
                                       as_stream(stream)));
}

void pack(Address values, Address metadata, Address packed_values, Address packed_metadata,
          int out_features, int in_features, int storage_bits, Address stream) {
  raise_if_error(bind_thread("sparsekern.pack"));
  raise_if_error(launch_pack(in(values), in(metadata), out(packed_values), out(packed_metadata),
                             out_features, in_features, storage_bits, as_stream(stream)));
}

// 0 when the stream is not being captured into a CUDA graph; else a number of this one capture.
unsigned long long capture_id(Address stream) {
  constexpr const char* op = "sparsekern.linear";
  raise_if_error(bind_thread(op));
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  raise_if_error(cuda_status(op, "cudaStreamGetCaptureInfo",
                             cudaStreamGetCaptureInfo(as_stream(stream), &capture, &id)));
  return capture == cudaStreamCaptureStatusActive ? id : 0;
}

void bind_weights(py::module_& m) {
  fastcall::def<&prune_compress>(m, "prune_compress",
                                 "*, w, values, metadata, bad_chunks, elements, dtype, stream",
                                 "launch_prune_compress");
  fastcall::def<&pack>(m, "pack",
                       "*, values, metadata, packed_values, packed_metadata, out_features, "
                       "in_features, storage_bits, stream",
                       "launch_pack");
  fastcall::def<&capture_id>(m, "capture_id", "stream, /",
                             "0, or a number of the stream's current graph capture.");
}

// ---- activations --------------------------------------------------------------------------------

void quantize_rows(Address x, std::int64_t x_stride, std::int64_t tokens, int features, DType dtype,
                   Address up, std::int64_t up_stride, Address norm_weight, double eps,
                   Address residual, std::int64_t residual_stride, Address y, std::int64_t y_stride,
                   DType storage, Address q, std::int64_t q_stride, Address scale, Address stream) {
  QuantizeRowsProblem problem = {};
  problem.source = norm_weight != 0 ? RowSource::kNorm
                   : up != 0        ? RowSource::kGated
                                    : RowSource::kPlain;
  problem.tokens = tokens, problem.features = features;
  problem.x = {out(x), x_stride, dtype};
  problem.up = in(up), problem.up_stride = up_stride;
  problem.norm_weight = in(norm_weight), problem.eps = static_cast<float>(eps);
  problem.residual = out(residual), problem.residual_stride = residual_stride;
  problem.y = out(y), problem.y_stride = y_stride;
  problem.storage = storage, problem.q = out(q), problem.q_stride = q_stride;
  problem.scale = static_cast<float*>(out(scale));
  raise_if_error(bind_thread("sparsekern.quantize_rows"));
  raise_if_error(launch_quantize_rows(problem, as_stream(stream)));
}

void bind_activations(py::module_& m) {
  fastcall::def<&quantize_rows>(m, "quantize_rows",
                                "*, x, x_stride, tokens, features, dtype, up, up_stride, "
                                "norm_weight, eps, residual, residual_stride, y, y_stride, "
                                "storage, q, q_stride, scale, stream",
                                "launch_quantize_rows");
}

}  // namespace
}  // namespace sparsekern

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "CUDA kernels of sparsekern. Plain pointers and a stream; nothing is checked for being on "
      "the right device.";
  sparsekern::bind_introspection(m);
  sparsekern::bind_weights(m);
  sparsekern::bind_activations(m);
  sparsekern::bind_linear(m);
  sparsekern::cusparselt::bind(m);
}
