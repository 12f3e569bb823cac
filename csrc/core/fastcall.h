// fastcall.h: makes Python functions of C++ functions of integers, called by CPython's vectorcall
// protocol (METH_FASTCALL) without pybind11 in between.
//
// The launch of a small kernel is bound by the host, and pybind11 takes longer to find out which
// overload a call means than to convert 16 integers. What a caller sees is the same: positional
// arguments alone; integers, bool and whatever has __index__; a TypeError for anything else, for a
// wrong number of arguments and for an integer that the C++ type cannot hold. The GIL is held
// throughout. Functions may throw as under pybind11.
//
//   fastcall::def<&decode>(m, "decode", "launch_decode: up to 64 tokens");
#pragma once
#include <pybind11/pybind11.h>

#include <cstddef>
#include <exception>
#include <tuple>
#include <type_traits>
#include <utility>

namespace sparsekern::fastcall {

// Stores `object` in `value`; false, perhaps with a Python exception set, when it does not fit.
template <class T>
bool read(PyObject* object, T& value) {
  static_assert(std::is_integral_v<T> && !std::is_same_v<T, bool>);
  if (!PyLong_Check(object)) {
    const auto index = pybind11::reinterpret_steal<pybind11::object>(PyNumber_Index(object));
    return index && read(index.ptr(), value);
  }
  using Wide = std::conditional_t<std::is_signed_v<T>, long long, unsigned long long>;
  Wide wide;
  if constexpr (std::is_signed_v<T>) {
    wide = PyLong_AsLongLong(object);
  } else {
    wide = PyLong_AsUnsignedLongLong(object);
  }
  if (wide == static_cast<Wide>(-1) && PyErr_Occurred()) return false;
  value = static_cast<T>(wide);
  return static_cast<Wide>(value) == wide;
}

template <auto kFunction>
struct Method;

template <class Result, class... Arguments, Result (*kFunction)(Arguments...)>
struct Method<kFunction> {
  static_assert(std::is_void_v<Result> || std::is_integral_v<Result>);
  static constexpr Py_ssize_t kArguments = sizeof...(Arguments);
  static inline PyMethodDef definition = {};  // CPython keeps its address

  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != kArguments)
      return PyErr_Format(PyExc_TypeError,
                          "sparsekern._C.%s: expected %zd arguments, got %zd. See "
                          "sparsekern/_C.pyi.",
                          definition.ml_name, kArguments, count);
    return convert_and_call(arguments, std::index_sequence_for<Arguments...>{});
  }

 private:
  template <std::size_t... kIndex>
  static PyObject* convert_and_call(PyObject* const* arguments, std::index_sequence<kIndex...>) {
    std::tuple<Arguments...> values;
    if (!(accept<kIndex>(arguments[kIndex], std::get<kIndex>(values)) && ...)) return nullptr;
    try {
      if constexpr (std::is_void_v<Result>) {
        kFunction(std::get<kIndex>(values)...);
        Py_RETURN_NONE;
      } else {
        return pybind11::cast(kFunction(std::get<kIndex>(values)...)).release().ptr();
      }
    } catch (pybind11::error_already_set& error) {
      error.restore();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  template <std::size_t kIndex, class T>
  static bool accept(PyObject* object, T& value) {
    if (read(object, value)) return true;
    PyErr_Clear();
    constexpr int kBits = 8 * sizeof(T);
    PyErr_Format(PyExc_TypeError,
                 "sparsekern._C.%s: expected argument %zu as %s integer of %d bits, got %R. See "
                 "sparsekern/_C.pyi.",
                 definition.ml_name, kIndex + 1, std::is_signed_v<T> ? "a signed" : "an unsigned",
                 kBits, object);
    return false;
  }
};

// Adds kFunction to the module. `name` and `doc` must be string literals.
template <auto kFunction>
void def(pybind11::module_& m, const char* name, const char* doc) {
  using M = Method<kFunction>;
  // The cast goes through void(*)(), as CPython itself does it: METH_FASTCALL says the true type.
  M::definition = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&M::call)),
                   METH_FASTCALL, doc};
  const pybind11::object module_name = m.attr("__name__");
  PyObject* function = PyCFunction_NewEx(&M::definition, m.ptr(), module_name.ptr());
  if (function == nullptr) throw pybind11::error_already_set();
  m.attr(name) = pybind11::reinterpret_steal<pybind11::object>(function);
}

}  // namespace sparsekern::fastcall
