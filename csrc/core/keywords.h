// keywords.h: arguments that CPython passes by name (vectorcall): which is which, and integers,
// numbers, element types and truth values out of them.
//
// A call site passes its names as one constant tuple of interned strings. So whoever is called
// keeps the tuple it saw last with the places of its names, and a call like the one before costs
// one comparison of pointers for all names together.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "core/dtype.h"

namespace sparsekern {

constexpr const char* kSeeStub = "See sparsekern/_C.pyi.";

// ---- values: true, or false, perhaps with a Python exception set, when `object` does not fit ----

template <class T>
bool read(PyObject* object, T& value) {
  static_assert(std::is_integral_v<T> && !std::is_same_v<T, bool>);
  if (!PyLong_Check(object)) {
    const auto index = pybind11::reinterpret_steal<pybind11::object>(PyNumber_Index(object));
    return index && read(index.ptr(), value);
  }
  int overflow = 0;
  const long long narrow = PyLong_AsLongLongAndOverflow(object, &overflow);
  if constexpr (std::is_unsigned_v<T>) {
    if (overflow > 0) {
      const unsigned long long wide = PyLong_AsUnsignedLongLong(object);
      if (wide == static_cast<unsigned long long>(-1) && PyErr_Occurred()) return false;
      value = static_cast<T>(wide);
      return value == wide;
    }
    if (narrow < 0) return false;
  }
  value = static_cast<T>(narrow);
  return overflow == 0 && static_cast<long long>(value) == narrow;
}

inline bool read(PyObject* object, double& value) {
  value = PyFloat_AsDouble(object);
  return value != -1.0 || PyErr_Occurred() == nullptr;
}

inline bool read(PyObject* object, bool& value) {
  value = object == Py_True;
  return PyBool_Check(object);
}

// By its number in the table.
inline bool read(PyObject* object, DType& dtype) {
  int number = 0;
  if (!read(object, number) || number < 0 || number >= kDTypeCount) return false;
  dtype = static_cast<DType>(number);
  return true;
}

// What `read` takes, in words.
template <class T>
std::string expectation() {
  if constexpr (std::is_same_v<T, bool>) {
    return "True or False";
  } else if constexpr (std::is_same_v<T, double>) {
    return "a number";
  } else if constexpr (std::is_same_v<T, DType>) {
    std::string numbers;
    for (int i = 0; i < kDTypeCount; ++i)
      numbers += (i ? " or " : "") + std::to_string(i) + " (" + kDTypes[i].name + ")";
    return numbers;
  } else {
    return std::string(std::is_signed_v<T> ? "a signed" : "an unsigned") + " integer of " +
           std::to_string(8 * sizeof(T)) + " bits";
  }
}

// Sets the exception for an `object` that `read` did not take.
template <class T>
void refuse(const char* function, const char* argument, PyObject* object) {
  PyErr_Clear();
  PyErr_Format(PyExc_TypeError, "sparsekern._C.%s: expected %s as %s, got %R. %s", function,
               argument, expectation<T>().c_str(), object, kSeeStub);
}

// ---- names --------------------------------------------------------------------------------------

// Where the arguments of one call site belong.
template <int kCount>
struct Places {
  PyObject* names = nullptr;  // the tuple; a reference, so that no other gets its address
  int count = 0;
  std::uint8_t place[kCount] = {};

  void forget() { Py_CLEAR(names); }
};

// The parameters of a function that takes keyword arguments alone. Made once, never destroyed.
template <int kCount>
class Keywords {
 public:
  static_assert(kCount <= 32);

  // names: in order; the first `required` of them must be passed.
  void define(const char* function, const char* const* names, int required) {
    function_ = function;
    required_ = required;
    for (int i = 0; i < kCount; ++i) {
      names_[i] = names[i];
      interned_[i] = PyUnicode_InternFromString(names[i]);
      if (interned_[i] == nullptr) throw pybind11::error_already_set();
    }
  }
  const char* name(int place) const { return names_[place]; }

  // The place of a parameter; -1, and a TypeError, when there is none of this name.
  int find(PyObject* name) const {
    for (int i = 0; i < kCount; ++i)
      if (name == interned_[i]) return i;
    for (int i = 0; i < kCount; ++i)
      if (PyUnicode_Check(name) && PyUnicode_Compare(name, interned_[i]) == 0) return i;
    PyErr_Format(PyExc_TypeError, "sparsekern._C.%s: expected known keyword arguments, got %R. %s",
                 function_, name, kSeeStub);
    return -1;
  }

  // given: bit i for parameter i. False, and a TypeError, when a required one is missing.
  bool complete(std::uint32_t given) const {
    for (int i = 0; i < required_; ++i) {
      if (given >> i & 1) continue;
      PyErr_Format(PyExc_TypeError,
                   "sparsekern._C.%s: expected the keyword argument %s, got none. %s", function_,
                   names_[i], kSeeStub);
      return false;
    }
    return true;
  }

  // Where the arguments of a call belong: `places` as they are when its names are those of the call
  // before. False, and a TypeError, for positional arguments, unknown, missing or repeated names.
  bool locate(Py_ssize_t positional, PyObject* names, Places<kCount>& places) const {
    if (positional == 0 && names == places.names && names != nullptr) return true;
    if (positional != 0) {
      PyErr_Format(PyExc_TypeError,
                   "sparsekern._C.%s: expected keyword arguments alone, got %zd positional. %s",
                   function_, positional, kSeeStub);
      return false;
    }
    Places<kCount> found;
    std::uint32_t given = 0;
    const Py_ssize_t count = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
    for (Py_ssize_t i = 0; i < count; ++i) {
      const int place = find(PyTuple_GET_ITEM(names, i));
      if (place < 0) return false;
      if (given >> place & 1) {
        PyErr_Format(PyExc_TypeError, "sparsekern._C.%s: expected %s once, got it twice. %s",
                     function_, names_[place], kSeeStub);
        return false;
      }
      given |= std::uint32_t{1} << place;
      found.place[i] = static_cast<std::uint8_t>(place);
    }
    if (!complete(given)) return false;
    if (names == nullptr) return true;  // nothing is required, nothing was passed
    found.count = static_cast<int>(count);
    found.names = Py_NewRef(names);
    places.forget();
    places = found;
    return true;
  }

 private:
  const char* function_ = nullptr;
  int required_ = 0;
  const char* names_[kCount] = {};
  PyObject* interned_[kCount] = {};
};

}  // namespace sparsekern
