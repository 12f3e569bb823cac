// driver.h — CUDA driver functions without linking libcuda: looked up at run time through the
// runtime library.
//
// So the module imports on a machine that has no driver, and only the call that needs one reports
// its absence.
//
//   static PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;                 // type from
//   <cudaTypedefs.h> SK_RETURN_IF_ERROR(driver_entry("sparsekern.linear", "cuTensorMapEncodeTiled",
//   12000, encode));
#pragma once

#include <cuda_runtime_api.h>

#include "core/status.h"

namespace sparsekern {

// Stores the driver function `symbol`, as of CUDA `version` (12000 = 12.0), in `function`; does
// nothing when it is already set.
template <typename Function>
Status driver_entry(const char* op, const char* symbol, unsigned version, Function*& function) {
  if (function != nullptr) return {};
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(symbol, &address, version, cudaEnableDefault, &found);
#else
  (void)version;
  const cudaError_t error = cudaGetDriverEntryPoint(symbol, &address, cudaEnableDefault, &found);
#endif
  SK_RETURN_IF_ERROR(cuda_status(op, "driver lookup", error));
  if (found != cudaDriverEntryPointSuccess || address == nullptr)
    return make_status(StatusKind::runtime, op, ": the CUDA driver has no ", symbol,
                       found == cudaDriverEntryPointVersionNotSufficent ? " (driver too old)" : "",
                       ". Update the NVIDIA driver.");
  function = reinterpret_cast<Function*>(address);
  return {};
}

}  // namespace sparsekern
