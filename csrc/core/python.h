// python.h: what all bindings share: how a Status is raised, and integers that are addresses.
#pragma once
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "core/status.h"

namespace sparsekern {

using Address = std::uintptr_t;  // of device memory, or of a stream; 0 is null

inline const void* in(Address address) { return reinterpret_cast<const void*>(address); }
inline void* out(Address address) { return reinterpret_cast<void*>(address); }
inline cudaStream_t as_stream(Address address) { return reinterpret_cast<cudaStream_t>(address); }

// Sets the Python exception that belongs to a Status, unless it is ok.
inline void set_error(const Status& status) {
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
}

inline void raise_if_error(const Status& status) {
  if (status.ok()) return;
  set_error(status);
  throw pybind11::error_already_set();
}

// A thread that torch started (autograd, a user's) may have no current context yet, and encoding a
// tensor map needs one. cudaGetDevice answers for torch's choice of device, because both runtimes
// look at the driver's current context.
inline Status bind_thread(const char* op) {
  static thread_local bool bound = false;
  if (bound) return {};
  int device = 0;
  SK_CUDA(op, cudaGetDevice(&device));
  SK_CUDA(op, cudaSetDevice(device));
  bound = true;
  return {};
}

}  // namespace sparsekern
