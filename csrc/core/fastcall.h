// fastcall.h: makes Python functions of C++ functions of numbers, called by CPython's vectorcall
// protocol (METH_FASTCALL) without pybind11 in between.
//
// The launch of a small kernel is bound by the host, and pybind11 takes longer to find out which
// overload a call means than to convert its arguments. The parameters are a text as in Python: of
// keyword arguments alone ("*, ...") or of positional ones alone ("..., /", at most six, since
// nobody can read more). Integers, bool and whatever has __index__ are integers; a double is what has
// __float__; a DType is its number; a TypeError for anything else, for missing and unknown arguments and for an integer that
// the C++ type cannot hold. The GIL is held throughout. Functions may throw as under pybind11.
//
//   fastcall::def<&pack>(m, "pack", "*, values, metadata, ..., stream", "launch_pack");
#pragma once
#include <pybind11/pybind11.h>

#include <cstddef>
#include <exception>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "core/keywords.h"

namespace sparsekern::fastcall {

constexpr int kMostPositional = 6;

template <auto kFunction>
struct Method;

template <class Result, class... Arguments, Result (*kFunction)(Arguments...)>
struct Method<kFunction> {
  static constexpr int kArguments = sizeof...(Arguments);
  static constexpr int kPlaces = kArguments > 0 ? kArguments : 1;
  static inline PyMethodDef definition = {};  // CPython keeps its address
  static inline std::string names[kPlaces], doc;
  static inline Keywords<kPlaces> keywords;
  static inline Places<kPlaces> places;

  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != kArguments)
      return PyErr_Format(PyExc_TypeError, "sparsekern._C.%s: expected %d arguments, got %zd. %s",
                          definition.ml_name, kArguments, count, kSeeStub);
    return convert_and_call(arguments, std::index_sequence_for<Arguments...>{});
  }

  static PyObject* call_by_name(PyObject*, PyObject* const* arguments, Py_ssize_t count,
                                PyObject* call_names) {
    if (!keywords.locate(count, call_names, places)) return nullptr;
    PyObject* ordered[kPlaces] = {};
    for (int i = 0; i < places.count; ++i) ordered[places.place[i]] = arguments[i];
    return convert_and_call(ordered, std::index_sequence_for<Arguments...>{});
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
        return convert(kFunction(std::get<kIndex>(values)...)).release().ptr();
      }
    } catch (pybind11::error_already_set& error) {
      error.restore();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  template <class T>
  static pybind11::object convert(T result) {
    if constexpr (std::is_base_of_v<pybind11::object, T>) return std::move(result);
    else return pybind11::cast(result);
  }

  template <std::size_t kIndex, class T>
  static bool accept(PyObject* object, T& value) {
    if (read(object, value)) return true;
    refuse<T>(definition.ml_name, names[kIndex].c_str(), object);
    return false;
  }
};

// Adds kFunction to the module. `name` must be a string literal.
template <auto kFunction>
void def(pybind11::module_& m, const char* name, const std::string& parameters, const char* doc) {
  using M = Method<kFunction>;
  int count = 0;
  bool by_name = false;
  for (std::size_t begin = 0; begin < parameters.size();) {
    std::size_t end = parameters.find(", ", begin);
    if (end == std::string::npos) end = parameters.size();
    const std::string part = parameters.substr(begin, end - begin);
    begin = end + 2;
    if (part == "*") by_name = true;
    else if (part != "/" && count++ < M::kArguments) M::names[count - 1] = part;
  }
  if (count != M::kArguments || (!by_name && count > kMostPositional))
    throw std::logic_error(std::string(name) + ": its parameters do not fit the function");
  M::doc = std::string(name) + "($module, " + parameters + ")\n--\n\n" + doc;
  if (M::kArguments == 0) M::doc = std::string(name) + "($module)\n--\n\n" + doc;
  // The cast goes through void(*)(), as CPython itself does it: the flags say the true type.
  const auto plain = by_name ? reinterpret_cast<void (*)()>(&M::call_by_name)
                             : reinterpret_cast<void (*)()>(&M::call);
  M::definition = {name, reinterpret_cast<PyCFunction>(plain),
                   METH_FASTCALL | (by_name ? METH_KEYWORDS : 0), M::doc.c_str()};
  if (by_name) {
    const char* names[M::kPlaces];
    for (int i = 0; i < M::kPlaces; ++i) names[i] = M::names[i].c_str();
    M::keywords.define(name, names, M::kArguments);
  }
  const pybind11::object module_name = m.attr("__name__");
  PyObject* function = PyCFunction_NewEx(&M::definition, m.ptr(), module_name.ptr());
  if (function == nullptr) throw pybind11::error_already_set();
  m.attr(name) = pybind11::reinterpret_steal<pybind11::object>(function);
}

}  // namespace sparsekern::fastcall
