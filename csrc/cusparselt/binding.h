// binding.h: cusparselt.h for Python.
#pragma once
#include <pybind11/pybind11.h>

namespace sparsekern::cusparselt {

void bind(pybind11::module_& m);

}  // namespace sparsekern::cusparselt
