// linear_type.h: sparsekern._C.Linear and kernels(), over the table of kernels.h.
#pragma once
#include <pybind11/pybind11.h>

namespace sparsekern {

void bind_linear(pybind11::module_& m);

}  // namespace sparsekern
