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
void see_named(std::uintptr_t address, int size, std::int64_t stride) {
  seen = {address, size, stride};
}
py::tuple last_seen() { return py::make_tuple(seen.address, seen.size, seen.stride); }
int nothing() { return 7; }
bool is_even(int number) { return number % 2 == 0; }
bool opposite(bool truth) { return !truth; }
unsigned long long same(unsigned long long number) { return number; }
py::tuple twice(int number) { return py::make_tuple(number, number); }
int number_of(sparsekern::DType dtype) { return static_cast<int>(dtype); }
double half(double number) { return number / 2; }
void key_error(int number) {
  PyErr_Format(PyExc_KeyError, "%d", number);
  throw py::error_already_set();
}
void failure(int) { throw std::runtime_error("from C++"); }
int seven(int a, int, int, int, int, int, int) { return a; }

PYBIND11_MODULE(fastcall_probe, m) {
  using sparsekern::fastcall::def;
  m.def("last_seen", &last_seen);
  def<&see>(m, "see", "address, size, stride, /", "For last_seen.");
  def<&see_named>(m, "see_named", "*, address, size, stride", "For last_seen.");
  def<&nothing>(m, "nothing", "", "7");
  def<&is_even>(m, "is_even", "number, /", "");
  def<&opposite>(m, "opposite", "truth, /", "");
  def<&same>(m, "same", "number, /", "");
  def<&twice>(m, "twice", "number, /", "");
  def<&number_of>(m, "number_of", "dtype, /", "");
  def<&half>(m, "half", "number, /", "");
  def<&key_error>(m, "key_error", "number, /", "");
  def<&failure>(m, "failure", "number, /", "");
  m.def("bind_seven", [m]() mutable { def<&seven>(m, "seven", "a, b, c, d, e, f, g, /", ""); });
}
