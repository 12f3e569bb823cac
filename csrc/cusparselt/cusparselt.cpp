// cusparselt.cpp: the table of functions, owners of the library's objects, the cache of plans.
//
// Declared by hand after cusparseLt.h of 0.6.3, 0.7.1, 0.8.0 and 0.8.1, in which the functions and
// the enumerators used here are the same. What differs:
//   size of every opaque structure   13072 bytes (0.6), 1024 (0.7), 512 aligned to 16 (0.8 to 0.10)
//   cusparseLtMatmulAlgSelectionDestroy   since 0.8; without it selections leak there
//   split-K modes above 2                 since 0.7
// The library keeps addresses of descriptors, so none of them moves after its initialisation.
#include "cusparselt/cusparselt.h"

#include <dlfcn.h>
#include <library_types.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>

namespace sparsekern::cusparselt {
namespace {

constexpr const char* kOp = "sparsekern.cusparselt";

// ---- the C functions that are used; opaque structures are void*, enumerations int ---------------

using Code = int;  // cusparseStatus_t; 0 is success

// X(name without "cusparseLt", parameters)
#define SK_CSLT_REQUIRED(X)                                                                      \
  X(GetProperty, (libraryPropertyType, int*))                                                    \
  X(Init, (void* handle))                                                                        \
  X(Destroy, (const void* handle))                                                               \
  X(StructuredDescriptorInit,                                                                    \
    (const void* handle, void* matrix, std::int64_t rows, std::int64_t columns,                  \
     std::int64_t stride, std::uint32_t alignment, cudaDataType type, int order, int sparsity))  \
  X(DenseDescriptorInit,                                                                         \
    (const void* handle, void* matrix, std::int64_t rows, std::int64_t columns,                  \
     std::int64_t stride, std::uint32_t alignment, cudaDataType type, int order))                \
  X(MatDescriptorDestroy, (const void* matrix))                                                  \
  X(MatmulDescriptorInit,                                                                        \
    (const void* handle, void* matmul, int operation_a, int operation_b, const void* a,          \
     const void* b, const void* c, const void* d, int compute_type))                             \
  X(MatmulDescSetAttribute,                                                                      \
    (const void* handle, void* matmul, int attribute, const void* data, std::size_t bytes))      \
  X(MatmulAlgSelectionInit,                                                                      \
    (const void* handle, void* selection, const void* matmul, int algorithm))                    \
  X(MatmulAlgSetAttribute,                                                                       \
    (const void* handle, void* selection, int attribute, const void* data, std::size_t bytes))   \
  X(MatmulAlgGetAttribute,                                                                       \
    (const void* handle, const void* selection, int attribute, void* data, std::size_t bytes))   \
  X(MatmulPlanInit, (const void* handle, void* plan, const void* matmul, const void* selection)) \
  X(MatmulPlanDestroy, (const void* plan))                                                       \
  X(MatmulGetWorkspace, (const void* handle, const void* plan, std::size_t* bytes))              \
  X(Matmul, (const void* handle, const void* plan, const void* alpha, const void* a,             \
             const void* b, const void* beta, const void* c, void* d, void* workspace,           \
             cudaStream_t* streams, std::int32_t stream_count))                                  \
  X(SpMMACompressedSize2,                                                                        \
    (const void* handle, const void* matrix, std::size_t* blob, std::size_t* buffer))            \
  X(SpMMACompress2, (const void* handle, const void* matrix, int is_sparse_a, int operation,     \
                     const void* dense, void* blob, void* buffer, cudaStream_t stream))
#define SK_CSLT_OPTIONAL(X) X(MatmulAlgSelectionDestroy, (const void* selection))

struct Functions {
#define SK_DECLARE(name, parameters) Code(*name) parameters = nullptr;
  SK_CSLT_REQUIRED(SK_DECLARE)
  SK_CSLT_OPTIONAL(SK_DECLARE)
#undef SK_DECLARE
};

// Values of cusparse.h and cusparseLt.h.
constexpr int kOrderColumn = 1, kOrderRow = 2;
constexpr int kNonTranspose = 0, kTranspose = 1;
constexpr int kSparsity50Percent = 0;
constexpr int kComputeInt32 = 0, kComputeFloat32 = 2;
constexpr int kAttributeRelu = 0, kAttributeAlphaVector = 5, kAttributeBiasPointer = 8;
constexpr int kAlgorithmDefault = 0;
constexpr int kAttributeId = 0, kAttributeMaxId = 1, kAttributeSplitK = 3, kAttributeSplitKMode = 4;

cudaDataType data_type(DType dtype) {
#define SK_TYPE(enumerator, name, type, bits, operand, accumulator, map, library, ...) library,
  constexpr cudaDataType kTypes[] = {SK_DTYPES(SK_TYPE)};
#undef SK_TYPE
  return kTypes[static_cast<int>(dtype)];
}

// That of the sums of products.
int compute_type(DType dtype) {
#define SK_TYPE(enumerator, name, type, bits, operand, accumulator, ...) \
  std::is_integral_v<accumulator> ? kComputeInt32 : kComputeFloat32,
  constexpr int kTypes[] = {SK_DTYPES(SK_TYPE)};
#undef SK_TYPE
  return kTypes[static_cast<int>(dtype)];
}

// ---- errors in words ----------------------------------------------------------------------------

constexpr const char* kSeeLog = "Set CUSPARSELT_LOG_LEVEL=5 to see the library's reason.";

struct CodeWords {
  const char* name;
  StatusKind kind;
  const char* remedy;
};

constexpr CodeWords kCodes[] = {
    {"CUSPARSE_STATUS_SUCCESS", StatusKind::ok, ""},
    {"CUSPARSE_STATUS_NOT_INITIALIZED", StatusKind::runtime, "Check the driver with nvidia-smi."},
    {"CUSPARSE_STATUS_ALLOC_FAILED", StatusKind::runtime, "Free memory of the GPU."},
    {"CUSPARSE_STATUS_INVALID_VALUE", StatusKind::value, kSeeLog},
    {"CUSPARSE_STATUS_ARCH_MISMATCH", StatusKind::unsupported,
     "This version has nothing for this GPU: leave packed=None."},
    {"CUSPARSE_STATUS_MAPPING_ERROR", StatusKind::runtime, kSeeLog},
    {"CUSPARSE_STATUS_EXECUTION_FAILED", StatusKind::runtime, kSeeLog},
    {"CUSPARSE_STATUS_INTERNAL_ERROR", StatusKind::runtime, kSeeLog},
    {"CUSPARSE_STATUS_MATRIX_TYPE_NOT_SUPPORTED", StatusKind::unsupported, kSeeLog},
    {"CUSPARSE_STATUS_ZERO_PIVOT", StatusKind::runtime, kSeeLog},
    {"CUSPARSE_STATUS_NOT_SUPPORTED", StatusKind::unsupported, kSeeLog},
    {"CUSPARSE_STATUS_INSUFFICIENT_RESOURCES", StatusKind::runtime, kSeeLog},
};

Status code_status(const char* function, Code code) {
  if (code == 0) return {};
  constexpr int count = sizeof(kCodes) / sizeof(kCodes[0]);
  if (code < 0 || code >= count)
    return make_status(StatusKind::runtime, kOp, ": ", function, " failed: status ", code, ". ",
                       kSeeLog);
  const CodeWords& words = kCodes[code];
  return make_status(words.kind, kOp, ": ", function, " failed: ", words.name, " (", code, "). ",
                     words.remedy);
}

// Leave the function with a Status when cusparseLt<name>(...) fails.
#define SK_CSLT(functions, name, ...) \
  SK_RETURN_IF_ERROR(code_status("cusparseLt" #name, (functions).name(__VA_ARGS__)))

// ---- owners -------------------------------------------------------------------------------------

// A loaded library. Its file is never closed: kernels of it may still be running.
struct Library {
  void* file = nullptr;
  std::string path;
  Version version;
  Functions functions;
  std::size_t object_bytes = 0;  // at least the size of each opaque structure of this version
};

// One opaque structure at a fixed address. It is destroyed by `destroy`, which is set once its
// initialisation has succeeded.
class Object {
 public:
  explicit Object(std::size_t bytes) : data_(std::aligned_alloc(kAlignment, bytes)) {
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_, 0, bytes);
  }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() {
    if (destroy != nullptr) (void)destroy(data_);
    std::free(data_);
  }
  void* get() { return data_; }
  const void* get() const { return data_; }

  Code (*destroy)(const void*) = nullptr;

 private:
  void* data_;
};

// A plan and what it refers to. Members are destroyed from the last to the first.
struct Plan {
  explicit Plan(std::size_t bytes)
      : weight(bytes), x(bytes), y(bytes), matmul(bytes), selection(bytes), plan(bytes) {}

  int device = 0;
  const void* handle = nullptr;
  bool channel_scale = false;
  Object weight, x, y, matmul, selection, plan;
  PlanInfo info;
};

using Key = std::tuple<int, int, int, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                       std::int64_t, const void*, bool, bool, int, int, int>;

Key key_of(const Problem& p) {
  return {p.device,
          static_cast<int>(p.dtype),
          static_cast<int>(p.y_dtype),
          p.m,
          p.n,
          p.k,
          p.x_stride,
          p.y_stride,
          p.bias,
          p.relu,
          p.channel_scale,
          p.algorithm,
          p.split_k,
          p.split_k_mode};
  ;
}

// Memory of Python's, see lend_workspace.
struct Workspace {
  void* address = nullptr;
  std::size_t bytes = 0;
};

// Members are destroyed from the last to the first: plans, then handles, then the library.
struct State {
  std::unique_ptr<Library> library;
  std::map<int, Object> handles;  // by device
  std::unordered_map<std::uint64_t, std::unique_ptr<Plan>> plans;
  std::map<Key, std::uint64_t> ids;
  std::uint64_t last_id = 0;
  std::map<std::pair<int, cudaStream_t>, Workspace> lent;  // by device and stream

  void forget_plans() {
    ids.clear();
    plans.clear();
  }
};

std::mutex lock;

// Never destroyed by itself: when static objects are, the CUDA driver may be gone. Python calls
// `unload` before it ends.
State& state() {
  static State* const only = new State;
  return *only;
}

Status loaded(Library*& library) {
  library = state().library.get();
  if (library != nullptr) return {};
  return make_status(StatusKind::runtime, kOp, ": expected a loaded library, got none. Call load.");
}

Status handle_of(int device, Library& library, const void*& handle) {
  auto& handles = state().handles;
  auto found = handles.find(device);
  if (found == handles.end()) {
    found = handles.try_emplace(device, library.object_bytes).first;
    const Status status =
        code_status("cusparseLtInit", library.functions.Init(found->second.get()));
    if (!status.ok()) {
      handles.erase(found);
      return status;
    }
    found->second.destroy = library.functions.Destroy;
  }
  handle = found->second.get();
  return {};
}

// ---- loading ------------------------------------------------------------------------------------

Status find_functions(Library& library) {
  const auto find = [&library](const char* name) { return dlsym(library.file, name); };
#define SK_FIND(name, parameters) \
  library.functions.name = reinterpret_cast<Code(*) parameters>(find("cusparseLt" #name));
  SK_CSLT_REQUIRED(SK_FIND)
  SK_CSLT_OPTIONAL(SK_FIND)
#undef SK_FIND
#define SK_REQUIRE(name, parameters)                                                       \
  if (library.functions.name == nullptr)                                                   \
    return make_status(StatusKind::unsupported, kOp, ": expected cusparseLt" #name " in ", \
                       library.path, ", got a library without it. Install nvidia-cusparselt.");
  SK_CSLT_REQUIRED(SK_REQUIRE)
#undef SK_REQUIRE
  return {};
}

Status find_version(Library& library) {
  Version& version = library.version;
  SK_CSLT(library.functions, GetProperty, MAJOR_VERSION, &version.major);
  SK_CSLT(library.functions, GetProperty, MINOR_VERSION, &version.minor);
  SK_CSLT(library.functions, GetProperty, PATCH_LEVEL, &version.patch);
  if (version.major != 0 || version.minor < 6 || version.minor > 10)
    return make_status(StatusKind::unsupported, kOp, ": expected version 0.6 to 0.10, got ",
                       version.major, ".", version.minor, ".", version.patch, " in ", library.path,
                       ". Install nvidia-cusparselt of such a version.");
  library.object_bytes = version.minor < 8 ? 16384 : 1024;
  return {};
}

// ---- plans --------------------------------------------------------------------------------------

Status init_weight(const Library& library, const void* handle, DType dtype, std::int64_t m,
                   std::int64_t k, Object& weight) {
  SK_CHECK_MULTIPLE(kOp, m, sparse_multiple(dtype), "Leave this layer in another layout.");
  SK_CHECK_MULTIPLE(kOp, k, sparse_multiple(dtype), "Leave this layer in another layout.");
  SK_CSLT(library.functions, StructuredDescriptorInit, handle, weight.get(), m, k, k, kAlignment,
          data_type(dtype), kOrderRow, kSparsity50Percent);
  weight.destroy = library.functions.MatDescriptorDestroy;
  return {};
}

Status init_dense(const Library& library, const void* handle, DType dtype, std::int64_t rows,
                  std::int64_t columns, std::int64_t stride, int order, Object& matrix) {
  SK_CHECK_MULTIPLE(kOp, stride, dense_multiple(dtype), "Copy x.");
  SK_CSLT(library.functions, DenseDescriptorInit, handle, matrix.get(), rows, columns, stride,
          kAlignment, data_type(dtype), order);
  matrix.destroy = library.functions.MatDescriptorDestroy;
  return {};
}

Status init_epilogue(const Functions& functions, const void* handle, const Problem& problem,
                     Object& matmul) {
  const int on = 1;
  if (problem.relu)
    SK_CSLT(functions, MatmulDescSetAttribute, handle, matmul.get(), kAttributeRelu, &on,
            sizeof(on));
  if (problem.channel_scale)
    SK_CSLT(functions, MatmulDescSetAttribute, handle, matmul.get(), kAttributeAlphaVector, &on,
            sizeof(on));
  if (problem.bias != nullptr)
    SK_CSLT(functions, MatmulDescSetAttribute, handle, matmul.get(), kAttributeBiasPointer,
            &problem.bias, sizeof(problem.bias));
  return {};
}

Status init_selection(const Functions& functions, const void* handle, const Problem& problem,
                      Plan& plan) {
  const auto set = [&](int attribute, int value) {
    return code_status("cusparseLtMatmulAlgSetAttribute",
                       functions.MatmulAlgSetAttribute(handle, plan.selection.get(), attribute,
                                                       &value, sizeof(value)));
  };
  SK_CSLT(functions, MatmulAlgSelectionInit, handle, plan.selection.get(), plan.matmul.get(),
          kAlgorithmDefault);
  plan.selection.destroy = functions.MatmulAlgSelectionDestroy;
  SK_CSLT(functions, MatmulAlgGetAttribute, handle, plan.selection.get(), kAttributeMaxId,
          &plan.info.algorithms, sizeof(plan.info.algorithms));
  if (problem.algorithm == kDefaultAlgorithm) return {};
  SK_CHECK_REL(kOp, problem.algorithm, >=, 0, "Pass an id, or -1 for the library's choice.");
  SK_CHECK_REL(kOp, problem.algorithm, <, plan.info.algorithms, "Search again.");
  SK_RETURN_IF_ERROR(set(kAttributeId, problem.algorithm));
  if (problem.split_k != 1) SK_RETURN_IF_ERROR(set(kAttributeSplitK, problem.split_k));
  if (problem.split_k_mode != 0)
    SK_RETURN_IF_ERROR(set(kAttributeSplitKMode, problem.split_k_mode));
  return {};
}

Status build_plan(Library& library, const Problem& problem, std::unique_ptr<Plan>& result) {
  const Functions& functions = library.functions;
  const auto& [m, n, k] = std::tie(problem.m, problem.n, problem.k);
  auto plan = std::make_unique<Plan>(library.object_bytes);
  plan->device = problem.device;
  plan->channel_scale = problem.channel_scale;
  SK_RETURN_IF_ERROR(handle_of(problem.device, library, plan->handle));
  const void* handle = plan->handle;
  SK_CHECK_REL(kOp, n, >, 0, "Handle zero tokens before.");
  SK_CHECK_MULTIPLE(kOp, n, dense_multiple(problem.dtype), "Pad the tokens.");
  SK_CHECK_REL(kOp, problem.x_stride, >=, k, "Copy x.");
  SK_CHECK_REL(kOp, problem.y_stride, >=, m, "Pass a larger y.");

  SK_RETURN_IF_ERROR(init_weight(library, handle, problem.dtype, m, k, plan->weight));
  SK_RETURN_IF_ERROR(
      init_dense(library, handle, problem.dtype, n, k, problem.x_stride, kOrderRow, plan->x));
  SK_RETURN_IF_ERROR(
      init_dense(library, handle, problem.y_dtype, m, n, problem.y_stride, kOrderColumn, plan->y));
  SK_CSLT(functions, MatmulDescriptorInit, handle, plan->matmul.get(), kNonTranspose, kTranspose,
          plan->weight.get(), plan->x.get(), plan->y.get(), plan->y.get(),
          compute_type(problem.dtype));
  SK_RETURN_IF_ERROR(init_epilogue(functions, handle, problem, plan->matmul));
  SK_RETURN_IF_ERROR(init_selection(functions, handle, problem, *plan));
  SK_CSLT(functions, MatmulPlanInit, handle, plan->plan.get(), plan->matmul.get(),
          plan->selection.get());
  plan->plan.destroy = functions.MatmulPlanDestroy;
  SK_CSLT(functions, MatmulGetWorkspace, handle, plan->plan.get(), &plan->info.workspace_bytes);
  result = std::move(plan);
  return {};
}

Code run(const Functions& functions, const Plan& plan, const void* blob, const void* x, void* y,
         void* workspace, const void* channel_scale, cudaStream_t stream) {
  const float one = 1.0f, zero = 0.0f;
  return functions.Matmul(plan.handle, plan.plan.get(), plan.channel_scale ? channel_scale : &one,
                          blob, x, &zero, y, y, workspace, &stream, 1);
}

Status check_channel_scale(const Plan& plan, const void* channel_scale) {
  if (plan.channel_scale == (channel_scale != nullptr)) return {};
  return make_status(StatusKind::value, kOp, ": expected channel_scale ",
                     plan.channel_scale ? "for" : "only for", " a plan that has it, got ",
                     channel_scale == nullptr ? "none" : "one", ". Pass it as in the plan.");
}

// What was lent for this stream; null where that is too small, or a graph captures the stream.
void* lent_workspace(int device, cudaStream_t stream, std::size_t bytes) {
  const auto found = state().lent.find({device, stream});
  if (found == state().lent.end() || found->second.bytes < bytes) return nullptr;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess)
    (void)cudaGetLastError();  // the launch will say what is wrong with the stream
  return capture == cudaStreamCaptureStatusNone ? found->second.address : nullptr;
}

}  // namespace

// ---- the interface ------------------------------------------------------------------------------

Status load(const std::string& path, Version& version) {
  auto library = std::make_unique<Library>();
  library->path = path;
  // Deep binding: its own symbols win over those of another version that torch may have loaded.
  library->file = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
  if (library->file == nullptr)
    return make_status(StatusKind::unsupported, kOp, ": expected a library at ", path, ", got ",
                       dlerror(), ". Install nvidia-cusparselt.");
  SK_RETURN_IF_ERROR(find_functions(*library));
  SK_RETURN_IF_ERROR(find_version(*library));
  version = library->version;
  unload();
  const std::lock_guard<std::mutex> guard(lock);
  state().library = std::move(library);
  return {};
}

void unload() {
  const std::lock_guard<std::mutex> guard(lock);
  state().forget_plans();
  state().lent.clear();
  state().handles.clear();
  state().library.reset();
}

Status compressed_bytes(int device, DType dtype, std::int64_t m, std::int64_t k, std::size_t& blob,
                        std::size_t& buffer) {
  const std::lock_guard<std::mutex> guard(lock);
  Library* library = nullptr;
  const void* handle = nullptr;
  SK_RETURN_IF_ERROR(loaded(library));
  SK_RETURN_IF_ERROR(handle_of(device, *library, handle));
  Object weight(library->object_bytes);
  SK_RETURN_IF_ERROR(init_weight(*library, handle, dtype, m, k, weight));
  SK_CSLT(library->functions, SpMMACompressedSize2, handle, weight.get(), &blob, &buffer);
  return {};
}

Status compress(int device, DType dtype, std::int64_t m, std::int64_t k, const void* dense,
                void* blob, void* buffer, cudaStream_t stream) {
  const std::lock_guard<std::mutex> guard(lock);
  Library* library = nullptr;
  const void* handle = nullptr;
  SK_RETURN_IF_ERROR(loaded(library));
  SK_RETURN_IF_ERROR(handle_of(device, *library, handle));
  Object weight(library->object_bytes);
  SK_RETURN_IF_ERROR(init_weight(*library, handle, dtype, m, k, weight));
  SK_CSLT(library->functions, SpMMACompress2, handle, weight.get(), 1, kNonTranspose, dense, blob,
          buffer, stream);
  return {};
}

Status plan(const Problem& problem, PlanInfo& info) {
  const std::lock_guard<std::mutex> guard(lock);
  Library* library = nullptr;
  SK_RETURN_IF_ERROR(loaded(library));
  State& all = state();
  const Key key = key_of(problem);
  const auto known = all.ids.find(key);
  if (known != all.ids.end()) {
    info = all.plans.at(known->second)->info;
    return {};
  }
  std::unique_ptr<Plan> built;
  SK_RETURN_IF_ERROR(build_plan(*library, problem, built));
  if (all.plans.size() >= kMaxPlans) all.forget_plans();
  built->info.id = ++all.last_id;
  info = built->info;
  all.ids.emplace(key, info.id);
  all.plans.emplace(info.id, std::move(built));
  return {};
}

void lend_workspace(int device, cudaStream_t stream, void* workspace, std::size_t bytes) {
  const std::lock_guard<std::mutex> guard(lock);
  state().lent[{device, stream}] = {workspace, bytes};
}

Status matmul(std::uint64_t id, const void* blob, const void* x, void* y, void* workspace,
              const void* channel_scale, cudaStream_t stream, Outcome& outcome) {
  const std::lock_guard<std::mutex> guard(lock);
  const auto found = state().plans.find(id);
  outcome = Outcome::kUnknownPlan;
  if (found == state().plans.end()) return {};
  const Plan& plan = *found->second;
  SK_RETURN_IF_ERROR(check_channel_scale(plan, channel_scale));
  if (workspace == nullptr && plan.info.workspace_bytes > 0) {
    workspace = lent_workspace(plan.device, stream, plan.info.workspace_bytes);
    outcome = Outcome::kNoWorkspace;
    if (workspace == nullptr) return {};
  }
  outcome = Outcome::kDone;
  const Functions& functions = state().library->functions;
  return code_status("cusparseLtMatmul",
                     run(functions, plan, blob, x, y, workspace, channel_scale, stream));
}

Status time_matmul(std::uint64_t id, const void* blob, const void* x, void* y, void* workspace,
                   cudaStream_t stream, int calls, double& seconds) {
  const std::lock_guard<std::mutex> guard(lock);
  const auto found = state().plans.find(id);
  if (found == state().plans.end())
    return make_status(StatusKind::value, kOp, ": expected the id of a plan, got ", id,
                       ". Call plan again.");
  SK_RETURN_IF_ERROR(check_channel_scale(*found->second, nullptr));
  const Functions& functions = state().library->functions;
  const auto begin = std::chrono::steady_clock::now();
  Code code = 0;
  for (int call = 0; call < calls && code == 0; ++call)
    code = run(functions, *found->second, blob, x, y, workspace, nullptr, stream);
  seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return code_status("cusparseLtMatmul", code);
}

}  // namespace sparsekern::cusparselt
