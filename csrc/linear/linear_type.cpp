// linear_type.cpp: the Python type Linear: the fixed part of a launch, checked once, called with
// the addresses by name.
//
// A call is a few comparisons of pointers, a conversion per address and the launcher (keywords.h).
#include "linear/linear_type.h"

#include <structmember.h>

#include <cstddef>
#include <cstring>
#include <exception>
#include <string>

#include "core/keywords.h"
#include "core/problem.h"
#include "core/python.h"
#include "linear/kernels.h"
#include "linear/workspace.h"
#include "weights/widen.h"

namespace py = pybind11;

namespace sparsekern {
namespace {

constexpr const char* kOp = "sparsekern._C.Linear";

// ---- the fixed part -----------------------------------------------------------------------------

// The parameters in the order of Init and Call; the first kRequired of them must be passed.
constexpr const char* kInitNames[] = {"kernel",          "config",       "tokens",   "out_features",
                                      "in_features",     "x_stride",     "y_stride", "dtype",
                                      "residual_stride", "weight_dtype", "x_dtype",  "activation",
                                      "scale_group",     "stored_dtype"};
struct Init {
  enum {
    kKernel,
    kConfig,
    kTokens,
    kOutFeatures,
    kInFeatures,
    kXStride,
    kYStride,
    kDtype,
    kRequired,
    kResidualStride = kRequired,
    kWeightDtype,
    kXDtype,
    kActivation,
    kScaleGroup,
    kStoredDtype,
    kCount
  };
};
constexpr const char* kCallNames[] = {"x",         "values",      "metadata",      "y",
                                      "stream",    "bias",        "residual",      "workspace",
                                      "up_values", "up_metadata", "channel_scale", "token_scale",
                                      "widened"};
struct Call {
  enum {
    kX,
    kValues,
    kMetadata,
    kY,
    kStream,
    kRequired,
    kBias = kRequired,
    kResidual,
    kWorkspace,
    kUpValues,
    kUpMetadata,
    kChannelScale,
    kTokenScale,
    kWidened,
    kCount
  };
};
static_assert(sizeof(kInitNames) / sizeof(const char*) == Init::kCount);
static_assert(sizeof(kCallNames) / sizeof(const char*) == Call::kCount);

Keywords<Init::kCount> init_keywords;
Keywords<Call::kCount> call_keywords;

constexpr std::uint32_t bit(int place) { return std::uint32_t{1} << place; }

// Arguments of a call that may be passed but are not required, by what lets a kernel take them.
struct Optional {
  Takes takes;
  std::uint32_t fields;
};
constexpr Optional kOptional[] = {
    {kTakesEpilogue, bit(Call::kBias) | bit(Call::kResidual)},
    {kTakesChannelScale, bit(Call::kChannelScale)},
    {kTakesTokenScale, bit(Call::kTokenScale)},
    {kTakesUp, bit(Call::kUpValues) | bit(Call::kUpMetadata)},
};

struct LinearObject {
  PyObject_HEAD vectorcallfunc vectorcall;
  const Kernel* kernel;
  const Launch* launch;
  int config;
  char needs_workspace;
  DType stored;  // of the weight as it is passed; other than the problem's: widened first
  Py_ssize_t widened_bytes;
  std::uint32_t refused;  // fields of a call that must be null
  std::uint32_t needed;   // and that must not be
  LinearProblem problem;  // without its addresses
  Places<Call::kCount> places;

  bool widens() const { return stored != problem.weight_dtype; }
};

std::string quoted_names(const char* const* names, int count) {
  std::string text;
  for (int i = 0; i < count; ++i) text += (i ? ", '" : "'") + std::string(names[i]) + "'";
  return text;
}

template <class T>
bool read_init(PyObject* const* values, int place, T& value) {
  if (values[place] == nullptr) return true;  // optional: as it is
  if (read(values[place], value)) return true;
  refuse<T>("Linear", kInitNames[place], values[place]);
  return false;
}

const char* text(PyObject* object, const char* argument) {
  if (PyUnicode_Check(object)) return PyUnicode_AsUTF8(object);
  PyErr_Format(PyExc_TypeError, "%s: expected %s as a str, got %R. %s", kOp, argument, object,
               kSeeStub);
  return nullptr;
}

bool read_kernel(PyObject* object, const Kernel*& kernel) {
  const char* wanted = text(object, "kernel");
  if (wanted == nullptr) return false;
  const char* names[sizeof(kKernels) / sizeof(kKernels[0])];
  int count = 0;
  for (const Kernel& known : kKernels) {
    if (std::strcmp(known.name, wanted) == 0) kernel = &known;
    names[count++] = known.name;
  }
  if (kernel != nullptr) return true;
  set_error(make_status(StatusKind::value, kOp, ": expected kernel to be one of ",
                        quoted_names(names, count), ", got '", wanted,
                        "'. See sparsekern._C.kernels()."));
  return false;
}

bool read_dtype(PyObject* object, const char* argument, DType& dtype) {
  const char* wanted = text(object, argument);
  if (wanted == nullptr) return false;
  const char* names[kDTypeCount];
  for (int i = 0; i < kDTypeCount; ++i) {
    names[i] = kDTypes[i].name;
    if (std::strcmp(names[i], wanted) != 0) continue;
    dtype = static_cast<DType>(i);
    return true;
  }
  set_error(make_status(StatusKind::value, kOp, ": expected ", argument, " to be one of ",
                        quoted_names(names, kDTypeCount), ", got '", wanted,
                        "'. Convert the tensors."));
  return false;
}

// None, or left out: as it is.
bool read_optional_dtype(PyObject* const* values, int place, DType& dtype) {
  PyObject* object = values[place];
  return object == nullptr || object == Py_None || read_dtype(object, kInitNames[place], dtype);
}

bool read_activation(PyObject* object, Activation& activation) {
  activation = Activation::kNone;
  if (object == nullptr || object == Py_None) return true;
  const char* wanted = text(object, "activation");
  if (wanted == nullptr) return false;
#define SK_TEXT(enumerator, name) name,
  constexpr const char* names[] = {SK_ACTIVATIONS(SK_TEXT)};
#undef SK_TEXT
  constexpr int count = sizeof(names) / sizeof(names[0]);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(names[i], wanted) == 0) activation = static_cast<Activation>(i + 1);
  }
  if (activation != Activation::kNone) return true;
  set_error(make_status(StatusKind::value, kOp, ": expected activation to be None or one of ",
                        quoted_names(names, count), ", got '", wanted,
                        "'. Apply it to the result."));
  return false;
}

std::string type_names(DType weight, DType x, DType y) {
  return std::string("(") + info(weight).name + ", " + info(x).name + ", " + info(y).name + ")";
}

// The instantiation for the problem's types.
Status find_launch(LinearObject& object) {
  const LinearProblem& p = object.problem;
  std::string known;
  for (const Launch& launch : object.kernel->launches) {
    if (launch.weight == p.weight_dtype && launch.x == p.x.dtype && launch.y == p.y.dtype)
      object.launch = &launch;
    known += (known.empty() ? "" : ", ") + type_names(launch.weight, launch.x, launch.y);
  }
  if (object.launch != nullptr) return {};
  return make_status(StatusKind::value, kOp,
                     ": expected (weight_dtype, x_dtype, dtype) of kernel '", object.kernel->name,
                     "' to be one of ", known, ", got ",
                     type_names(p.weight_dtype, p.x.dtype, p.y.dtype),
                     ". Convert the tensors, or use another kernel.");
}

// Sizes, and what the kernel's row says of them.
Status check(const LinearObject& object, bool has_activation) {
  const Kernel& kernel = *object.kernel;
  const LinearProblem& p = object.problem;
  const int tokens = p.tokens, out_features = p.out_features, in_features = p.in_features;
  const int64_t x_stride = p.x.stride, y_stride = p.y.stride;
  const int64_t residual_stride = p.epilogue.residual_stride;
  if (object.config < 0 || object.config >= object.launch->configs)
    return make_status(StatusKind::value, kOp, ": expected a config index below ",
                       object.launch->configs, " with kernel '", kernel.name, "', got ",
                       object.config, ". See sparsekern._C.kernels().");
  SK_CHECK_REL(kOp, tokens, >=, 0, "Pass the number of rows of x.");
  SK_CHECK_REL(kOp, out_features, >=, 0, "Pass the rows of the weight.");
  SK_CHECK_REL(kOp, in_features, >=, 0, "Pass the dense columns of the weight.");
  SK_CHECK_REL(kOp, x_stride, >=, 0, "Pass the stride of a row of x in elements.");
  SK_CHECK_REL(kOp, y_stride, >=, 0, "Pass the stride of a row of y in elements.");
  SK_CHECK_REL(kOp, residual_stride, >=, 0, "Pass the stride of a row in elements.");
  if (kernel.max_tokens > 0) {
    const int max_tokens = kernel.max_tokens;
    SK_CHECK_REL(kOp, tokens, <=, max_tokens, "Use the prefill kernel.");
  }
  const int stored_bits = info(object.stored).storage_bits;
  if (object.widens() &&
      (stored_bits >= 16 || info(p.weight_dtype).storage_bits != 16 || (kernel.takes & kTakesUp)))
    return make_status(
        StatusKind::value, kOp, ": expected stored_dtype None, or of 8 or 4 bits with ",
        "weight_dtype of 16 and one weight, got '", info(object.stored).name, "' with '",
        info(p.weight_dtype).name, "' and kernel '", kernel.name, "'. Leave it None.");
  const bool grouped = stored_bits == 4;
  if (p.scale_group != 0 && !(grouped && (p.scale_group == 64 || p.scale_group == 128)))
    return make_status(StatusKind::value, kOp, ": expected scale_group 0",
                       grouped ? ", 64 or 128" : "", " with weight_dtype '",
                       info(object.stored).name, "', got ", p.scale_group,
                       ". Quantise the weight with such groups.");
  if (has_activation && !(takes(kernel, *object.launch) & kTakesEpilogue))
    return make_status(StatusKind::value, kOp, ": expected activation None with kernel '",
                       kernel.name, "', got one. Use another kernel.");
  return {};
}

bool fill(LinearObject& object, PyObject* const* values) {
  LinearProblem& p = object.problem;
  if (!read_kernel(values[Init::kKernel], object.kernel) ||
      !read_init(values, Init::kConfig, object.config) ||
      !read_init(values, Init::kTokens, p.tokens) ||
      !read_init(values, Init::kOutFeatures, p.out_features) ||
      !read_init(values, Init::kInFeatures, p.in_features) ||
      !read_init(values, Init::kXStride, p.x.stride) ||
      !read_init(values, Init::kYStride, p.y.stride) ||
      !read_init(values, Init::kResidualStride, p.epilogue.residual_stride) ||
      !read_init(values, Init::kScaleGroup, p.scale_group) ||
      !read_dtype(values[Init::kDtype], "dtype", p.y.dtype) ||
      !read_activation(values[Init::kActivation], p.epilogue.activation))
    return false;
  p.weight_dtype = p.x.dtype = p.y.dtype;
  if (!read_optional_dtype(values, Init::kWeightDtype, p.weight_dtype) ||
      !read_optional_dtype(values, Init::kXDtype, p.x.dtype))
    return false;
  object.stored = p.weight_dtype;
  if (!read_optional_dtype(values, Init::kStoredDtype, object.stored)) return false;
  Status status = find_launch(object);
  if (status.ok()) status = check(object, p.epilogue.activation != Activation::kNone);
  if (!status.ok()) {
    set_error(status);
    return false;
  }
  unsigned taken = takes(*object.kernel, *object.launch);
  if (object.widens()) {
    object.widened_bytes = static_cast<Py_ssize_t>(widened_bytes(p.out_features, p.in_features));
    taken |= kTakesChannelScale;
  } else {
    object.refused |= bit(Call::kWidened);
  }
  object.needs_workspace = object.kernel->needs_workspace(object.config);
  for (const Optional& optional : kOptional)
    if (!(taken & optional.takes)) object.refused |= optional.fields;
  if (p.tokens > 0 && p.out_features > 0 && p.in_features > 0) {
    object.needed = bit(Call::kX) | bit(Call::kValues) | bit(Call::kMetadata) | bit(Call::kY);
    if (object.widens()) object.needed |= bit(Call::kWidened);
    if (taken & kTakesUp) object.needed |= bit(Call::kUpValues) | bit(Call::kUpMetadata);
  }
  return true;
}

// ---- a call -------------------------------------------------------------------------------------

// The first field of `fields`, in an exception.
void refuse_fields(const LinearObject& object, std::uint32_t fields, bool missing) {
  int place = 0;
  while (!(fields >> place & 1)) ++place;
  const char* name = kCallNames[place];
  set_error(missing ? make_status(StatusKind::value, kOp, ": expected an address as ", name,
                                  " of kernel '", object.kernel->name, "', got 0. Pass the tensor.")
                    : make_status(StatusKind::value, kOp, ": expected ", name, " 0 with kernel '",
                                  object.kernel->name,
                                  "', which has no such operand, got an address. Use another "
                                  "kernel."));
}

// The weight and the scales of `p` become those of its copy in 16 bits.
Status widen(const LinearObject& object, LinearProblem& p, void* widened, cudaStream_t stream) {
  if (p.tokens == 0 || object.widened_bytes == 0) return {};
  SK_RETURN_IF_ERROR(launch_widen({p.out_features, p.in_features, object.stored, p.weight_dtype,
                                   p.scale_group, p.weight, p.epilogue.channel_scale, widened},
                                  stream));
  const auto* wide = static_cast<const std::uint8_t*>(widened);
  p.weight = {wide, wide + widened_value_bytes(p.out_features, p.in_features)};
  p.weight_is_new = true;
  p.epilogue.channel_scale = nullptr;
  return {};
}

Status launch(const LinearObject& object, const Address (&values)[Call::kCount]) {
  SK_RETURN_IF_ERROR(bind_thread("sparsekern.linear"));
  LinearProblem p = object.problem;
  p.x.data = out(values[Call::kX]);
  p.weight = {in(values[Call::kValues]), in(values[Call::kMetadata])};
  p.up = {in(values[Call::kUpValues]), in(values[Call::kUpMetadata])};
  p.epilogue.channel_scale = static_cast<const float*>(in(values[Call::kChannelScale]));
  p.epilogue.token_scale = static_cast<const float*>(in(values[Call::kTokenScale]));
  p.epilogue.bias = in(values[Call::kBias]);
  p.epilogue.residual = in(values[Call::kResidual]);
  p.y.data = out(values[Call::kY]);
  p.workspace = out(values[Call::kWorkspace]);
  const cudaStream_t stream = as_stream(values[Call::kStream]);
  if (object.widens()) SK_RETURN_IF_ERROR(widen(object, p, out(values[Call::kWidened]), stream));
  return object.launch->launch(p, object.config, stream);
}

PyObject* call(PyObject* self, PyObject* const* arguments, std::size_t flags, PyObject* names) {
  auto& object = *reinterpret_cast<LinearObject*>(self);
  if (!call_keywords.locate(PyVectorcall_NARGS(flags), names, object.places)) return nullptr;
  Address values[Call::kCount] = {};
  std::uint32_t given = 0;
  for (int i = 0; i < object.places.count; ++i) {
    const int place = object.places.place[i];
    if (!read(arguments[i], values[place])) {
      refuse<Address>("Linear", kCallNames[place], arguments[i]);
      return nullptr;
    }
    given |= static_cast<std::uint32_t>(values[place] != 0) << place;
  }
  if (const std::uint32_t wrong = given & object.refused) {
    refuse_fields(object, wrong, false);
    return nullptr;
  }
  if (const std::uint32_t wrong = object.needed & ~given) {
    refuse_fields(object, wrong, true);
    return nullptr;
  }
  const Status status = launch(object, values);
  if (status.ok()) Py_RETURN_NONE;
  set_error(status);
  return nullptr;
}

// ---- the type -----------------------------------------------------------------------------------

PyObject* make(PyTypeObject* type, PyObject* positional, PyObject* named) {
  PyObject* values[Init::kCount] = {};
  std::uint32_t given = 0;
  if (PyTuple_GET_SIZE(positional) > 0)
    return PyErr_Format(PyExc_TypeError,
                        "%s: expected keyword arguments alone, got %zd positional. %s", kOp,
                        PyTuple_GET_SIZE(positional), kSeeStub);
  PyObject *name = nullptr, *value = nullptr;
  Py_ssize_t at = 0;
  while (named != nullptr && PyDict_Next(named, &at, &name, &value)) {
    const int place = init_keywords.find(name);
    if (place < 0) return nullptr;
    values[place] = value;
    given |= bit(place);
  }
  if (!init_keywords.complete(given)) return nullptr;
  PyObject* self = type->tp_alloc(type, 0);  // zeroed
  if (self == nullptr) return nullptr;
  auto& object = *reinterpret_cast<LinearObject*>(self);
  object.vectorcall = &call;
  if (fill(object, values)) return self;
  Py_DECREF(self);
  return nullptr;
}

void destroy(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<LinearObject*>(self)->places.forget();
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(LinearObject, vectorcall), READONLY, nullptr},
    {"needs_workspace", T_BOOL, offsetof(LinearObject, needs_workspace), READONLY,
     "Whether a call should pass a workspace (prefill_workspace_bytes)."},
    {"widened_bytes", T_PYSSIZET, offsetof(LinearObject, widened_bytes), READONLY,
     "Of the memory that a call must pass as widened; 0: of none."},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_doc,
     const_cast<char*>("Linear(*, kernel, config, tokens, out_features, in_features, x_stride, "
                       "y_stride, residual_stride=0, dtype, weight_dtype=None, x_dtype=None, "
                       "activation=None, scale_group=0, stored_dtype=None)\n--\n\n"
                       "The fixed part of a launch, checked once; called with its addresses.")},
    {Py_tp_new, reinterpret_cast<void*>(&make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(&destroy)},
    {Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
    {Py_tp_members, members},
    {0, nullptr},
};

PyType_Spec spec = {"sparsekern._C.Linear", sizeof(LinearObject), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_IMMUTABLETYPE,
                    slots};

// Names of the types (of weight, x and y) for which a kernel has a row of its table.
py::list types(const Kernel& kernel, int row) {
  py::list all;
  for (const Launch& launch : kernel.launches) {
    if (row < launch.configs)
      all.append(
          py::make_tuple(info(launch.weight).name, info(launch.x).name, info(launch.y).name));
  }
  return all;
}

// {kernel: [{column of its table: value, "types": ...}]}
py::dict kernels() {
  py::dict all;
  for (const Kernel& kernel : kKernels) {
    py::list configs;
    for (int row = 0; row < kernel.configs.rows; ++row) {
      py::dict config;
      for (int column = 0; column < kernel.configs.columns; ++column) {
        std::string field = kernel.configs.fields[column];
        const int value = kernel.configs.at(row, column);
        const bool flag = field.back() == '?';
        if (flag) field.pop_back();
        config[py::str(field)] = flag ? py::object(py::bool_(value != 0)) : py::int_(value);
      }
      config["types"] = types(kernel, row);
      configs.append(config);
    }
    all[kernel.name] = configs;
  }
  return all;
}

std::size_t workspace_bytes() {
  raise_if_error(bind_thread("sparsekern.linear"));
  std::size_t bytes = 0;
  raise_if_error(prefill_workspace_bytes(bytes));
  return bytes;
}

}  // namespace

void bind_linear(py::module_& m) {
  init_keywords.define("Linear", kInitNames, Init::kRequired);
  call_keywords.define("Linear", kCallNames, Call::kRequired);
  const auto type = py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
  if (!type) throw py::error_already_set();
  m.attr("Linear") = type;
  m.def("kernels", &kernels, "{kernel: its configs}: what Linear takes.");
  m.attr("PREFILL_COUNTER_BYTES") = kPrefillCounterBytes;
  m.def("prefill_workspace_bytes", &workspace_bytes, "Of a workspace on the current device.");
}

}  // namespace sparsekern
