// fastcall_probe.cpp: a module of functions bound by csrc/core/fastcall.h, for test_fastcall.py. It
// says what C++ was given.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "core/fastcall.h"

namespace py = pybind11;

struct {
  std::uintptr_t address;
  int size;
  std::int64_t stride;
} seen;
void see(std::uintptr_t address, int size, std::int64_t stride) { seen = {address, size, stride}; }
py::tuple last_seen() { return py::make_tuple(seen.address, seen.size, seen.stride); }
int nothing() { return 7; }
bool is_even(int number) { return number % 2 == 0; }
unsigned long long same(unsigned long long number) { return number; }
void key_error(int number) {
  PyErr_Format(PyExc_KeyError, "%d", number);
  throw py::error_already_set();
}
void failure(int) { throw std::runtime_error("from C++"); }

PYBIND11_MODULE(fastcall_probe, m) {
  using sparsekern::fastcall::def;
  m.def("last_seen", &last_seen);
  def<&see>(m, "see", "For last_seen.");
  def<&nothing>(m, "nothing", "7");
  def<&is_even>(m, "is_even", "");
  def<&same>(m, "same", "");
  def<&key_error>(m, "key_error", "");
  def<&failure>(m, "failure", "");
}
