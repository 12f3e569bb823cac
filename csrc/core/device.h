// device.h: what is asked of a device or a driver once and then remembered, and how a kernel is
// launched.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "core/status.h"

namespace sparsekern {

constexpr int kMaxDevices = 64;
constexpr int kMaxCluster = 16;      // thread blocks of a cluster
constexpr int kPortableCluster = 8;  // on every GPU that has clusters; more must be allowed

inline Status current_device(const char* op, int& device) {
  SK_CUDA(op, cudaGetDevice(&device));
  SK_CHECK_REL(op, device, <, kMaxDevices, "Use a lower device index.");
  return {};
}

// How a kernel is launched, but for its grid and stream.
struct LaunchShape {
  int threads;      // of a thread block
  int smem_bytes;   // dynamic
  int cluster = 0;  // thread blocks of a cluster; 0: launched without clusters
  bool dependent =
      true;  // may start before its predecessor has finished (ptx/dependent_launch.cuh)
  bool cooperative = false;  // all thread blocks are resident at once
};

// cudaLaunchConfig_t, which points to its attributes.
class LaunchConfig {
 public:
  LaunchConfig(const LaunchShape& shape, int64_t blocks, cudaStream_t stream) {
    config_.gridDim = dim3(static_cast<unsigned>(blocks));
    config_.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config_.dynamicSmemBytes = static_cast<size_t>(shape.smem_bytes);
    config_.stream = stream;
    config_.attrs = attributes_;
    if (shape.cluster > 0) {
      auto& attribute = add(cudaLaunchAttributeClusterDimension);
      attribute.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    }
    if (shape.dependent)
      add(cudaLaunchAttributeProgrammaticStreamSerialization)
          .programmaticStreamSerializationAllowed = 1;
    if (shape.cooperative) add(cudaLaunchAttributeCooperative).cooperative = 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  const cudaLaunchConfig_t& get() const { return config_; }

 private:
  cudaLaunchAttributeValue& add(cudaLaunchAttributeID id) {
    cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
    attribute.id = id;
    return attribute.val;
  }
  cudaLaunchAttribute attributes_[3];
  cudaLaunchConfig_t config_ = {};
};

// What each device has said of a kernel; one static object for each.
struct KernelState {
  bool ready, waits;
  int resident[kMaxCluster + 1];  // by thread blocks of a cluster; 0: not asked yet, -1: none
};
using KernelStates = KernelState[kMaxDevices];

// A kernel as the host sees it.
template <class... Params>
class DeviceKernel {
 public:
  DeviceKernel(const char* op, const char* name, void (*function)(Params...), KernelStates& states)
      : op_(op), name_(name), function_(function), states_(states) {}

  // Allows shared memory beyond 48 KiB. waits: the code that runs on this device was compiled for
  // 9.0 or later, and waits for its predecessor where it must (ptx/dependent_launch.cuh).
  Status prepare(int smem_bytes, bool& waits) const {
    KernelState* state = nullptr;
    SK_RETURN_IF_ERROR(prepared(smem_bytes, 0, state));
    waits = state->waits;
    return {};
  }

  // How many clusters of shape.cluster thread blocks the current device can hold at once.
  Status resident_clusters(const LaunchShape& shape, int& count) const {
    SK_RETURN_IF_ERROR(clusters_that_fit(shape, count));
    SK_CHECK_REL(op_, count, >, 0, "Use a GPU whose SMs hold a whole cluster (not a MIG slice).");
    return {};
  }
  // The same, and 0 where there is no room for one.
  Status clusters_that_fit(const LaunchShape& shape, int& count) const {
    SK_CHECK_REL(op_, shape.cluster, <=, kMaxCluster, "Use a smaller cluster.");
    KernelState* state = nullptr;
    SK_RETURN_IF_ERROR(prepared(shape.smem_bytes, shape.cluster, state));
    int& known = state->resident[shape.cluster];
    if (known == 0) {
      const LaunchShape alone = {shape.threads, shape.smem_bytes, shape.cluster, false, false};
      const LaunchConfig config(alone, int64_t{shape.cluster} * 1024, nullptr);
      int resident = 0;
      SK_CUDA(op_, cudaOccupancyMaxActiveClusters(&resident, function_, &config.get()));
      known = resident > 0 ? resident : -1;
    }
    count = known > 0 ? known : 0;
    return {};
  }

  // After prepare or resident_clusters.
  template <class... Arguments>
  Status launch(const LaunchShape& shape, int64_t blocks, cudaStream_t stream,
                const Arguments&... arguments) const {
    const LaunchConfig config(shape, blocks, stream);
    (void)cudaLaunchKernelEx(&config.get(), function_, arguments...);
    return launch_status(op_, name_, config.get().gridDim, config.get().blockDim,
                         config.get().dynamicSmemBytes);
  }

 private:
  Status prepared(int smem_bytes, int cluster, KernelState*& state) const {
    int device = 0;
    SK_RETURN_IF_ERROR(current_device(op_, device));
    state = &states_[device];
    if (state->ready) return {};
    SK_CUDA(op_, cudaFuncSetAttribute(function_, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      smem_bytes));
    if (cluster > kPortableCluster)
      SK_CUDA(op_,
              cudaFuncSetAttribute(function_, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    cudaFuncAttributes attributes;
    SK_CUDA(op_, cudaFuncGetAttributes(&attributes, function_));
    state->waits = attributes.ptxVersion >= 90;
    state->ready = true;
    return {};
  }

  const char* op_;
  const char* name_;
  void (*function_)(Params...);
  KernelStates& states_;
};

}  // namespace sparsekern
