// launch.h: what the launchers of linear/*_launch_*.cuh share. They do not see the table
// (kernels.h), which would make every file compile every element type.
#pragma once
#include "core/problem.h"
#include "linear/configs.h"

namespace sparsekern {

// For the files of linear/instantiate.
#define SK_INSTANTIATE_LINEAR(W, X, Y, name) \
  template Status name<W, X, Y>(const LinearProblem& problem, int config, cudaStream_t stream);

inline Status unknown_config(const char* op, const ConfigTable& configs, int config) {
  return make_status(StatusKind::value, op, ": expected config from 0 to ", configs.rows - 1,
                     ", got ", config, ". See sparsekern._C.kernels().");
}

}  // namespace sparsekern
