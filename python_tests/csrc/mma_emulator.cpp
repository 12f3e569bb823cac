// mma_emulator.cpp: runs the source of csrc/linear/mma_sm80.cuh on the CPU, block by block,
// for test_mma_emulated.py: emulator.h with cp.async.
#include "emulator.h"

namespace sparsekern::ptx {

using emulator::Copy;

void land(const Copy& copy) {
  void* to = emulator::shared(copy.smem, copy.size, emulator::Access::kWrites);
  memset(to, 0, copy.size);
  memcpy(to, copy.gmem, copy.bytes);
}

void cp_async(uint32_t smem, const void* gmem, int bytes, int size) {
  emulator::require(reinterpret_cast<uintptr_t>(gmem) % size == 0 && smem % size == 0,
                    "cp.async between addresses that its size divides");
  emulator::require_readable(gmem, bytes);
  const auto* from = static_cast<const uint8_t*>(gmem);
  const auto& [x_begin, x_end] = emulator::readable[0];
  emulator::require(from < x_begin || from >= x_end || emulator::fibers[emulator::current].waited,
                    "x to be read after the kernel that made it");
  const Copy copy = {smem, gmem, bytes, size};
  if (!emulator::copies_land_late) land(copy);
  emulator::fibers[emulator::current].open.push_back(copy);
}
void cp_async_16(uint32_t smem, const void* gmem, int bytes = 16) {
  cp_async(smem, gmem, bytes, 16);
}
void cp_async_8(uint32_t smem, const void* gmem, int bytes) { cp_async(smem, gmem, bytes, 8); }

void cp_async_commit() {
  auto& fiber = emulator::fibers[emulator::current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int kPending>
void cp_async_wait() {
  auto& groups = emulator::fibers[emulator::current].groups;
  for (; groups.size() > kPending; groups.erase(groups.begin()))
    if (emulator::copies_land_late) std::for_each(groups[0].begin(), groups[0].end(), land);
}

}  // namespace sparsekern::ptx

extern "C" {
int mistake = -1;  // of those that test_mma_emulated.py puts into the kernel's source
}

// ---- the kernel: its own includes of csrc/ptx find empty files ----------------------------------

#include "linear/configs.h"
#include "linear/mma_sm80.cuh"

namespace sparsekern::mma {

uint8_t raw_smem[1];  // the kernel's extern array; only its address is asked for

template <class Cfg>
void run_blocks(const LinearProblem& p) {
  const auto params = make_params<Cfg>(p);
  const int blocks = params.row_blocks * params.token_blocks;
  for (int block = 0; block < blocks && emulator::error.empty(); ++block) {
    emulator::first_block = block;
    const bool ended = emulator::run_clusters(1, 1, Cfg::kThreads, Cfg::kSmemBytes,
                                              [&] { spmm_mma_sm80_kernel<Cfg>(params); });
    emulator::require(ended, "barriers that all threads reach");
  }
}

template <class T, class Y>
void run(const LinearProblem& p, int config) {
  switch (config) {
#define SK_CASE(index, ...)                            \
  case index:                                          \
    if constexpr (sizeof(T) == 2 || index < SK_MMA_BOTH) \
      return run_blocks<Config<T, Y, __VA_ARGS__>>(p); \
    break;
    SK_MMA_CONFIGS(SK_CASE)
#undef SK_CASE
  }
  emulator::require(false, "a config that these types have");
}

}  // namespace sparsekern::mma

struct Case {
  sparsekern::DType weight, y;
  void (*run)(const sparsekern::LinearProblem& p, int config);
};
#define SK_RUN(W, X, Y, function) {sparsekern::kDTypeOf<W>, sparsekern::kDTypeOf<Y>, &function<W, Y>},
constexpr Case kCases[] = {
#ifdef EMULATE_FEW
    SK_RUN(__nv_bfloat16, , __nv_bfloat16, sparsekern::mma::run)
    SK_RUN(int8_t, , __nv_bfloat16, sparsekern::mma::run)
#else
    SK_PLAIN(SK_RUN, sparsekern::mma::run) SK_W8A8(SK_RUN, sparsekern::mma::run)
#endif
};
#undef SK_RUN

// A problem as in csrc/core/problem.h, then the freedoms. dtype: of y; storage: of x and the weight.
// Returns "" or the rule that was broken.
struct Emulated {
  const void *x, *values, *metadata, *bias, *residual, *channel_scale, *token_scale;
  void* y;
  int64_t x_stride, y_stride, residual_stride;
  int tokens, out_features, in_features, dtype, storage, activation, config, late, falling;
};

extern "C" const char* emulate(const Emulated* e) {
  using namespace sparsekern;
  emulator::error.clear();
  emulator::copies_land_late = e->late;
  emulator::falling_order = e->falling;
  LinearProblem p = {};
  p.tokens = e->tokens, p.out_features = e->out_features, p.in_features = e->in_features;
  const auto dtype = static_cast<DType>(e->dtype), storage = static_cast<DType>(e->storage);
  p.x = {const_cast<void*>(e->x), e->x_stride, storage};
  p.weight = {e->values, e->metadata};
  p.weight_dtype = storage;
  p.epilogue.channel_scale = static_cast<const float*>(e->channel_scale);
  p.epilogue.token_scale = static_cast<const float*>(e->token_scale);
  p.epilogue.bias = e->bias;
  p.epilogue.activation = static_cast<Activation>(e->activation);
  p.epilogue.residual = e->residual;
  p.epilogue.residual_stride = e->residual_stride;
  p.y = {e->y, e->y_stride, dtype};
  const auto range = [](const void* begin, int64_t bytes) {
    const auto* first = static_cast<const uint8_t*>(begin);
    return std::make_pair(first, first + bytes);
  };
  const int bits = info(storage).storage_bits;
  const auto tiles = [&](auto tile, int bytes) {
    return tile64::Extent::of<decltype(tile)>(p.out_features, p.in_features).tiles() * bytes;
  };
  using Wide = tile64::Tile<16>;
  using Narrow = tile64::Tile<8>;
  emulator::readable = {
      range(e->x, ((p.tokens - 1) * e->x_stride + p.in_features) * bits / 8),
      range(e->values, bits == 16 ? tiles(Wide{}, Wide::kValueBytes)
                                  : tiles(Narrow{}, Narrow::kValueBytes)),
      range(e->metadata, bits == 16 ? tiles(Wide{}, Wide::kMetadataBytes)
                                    : tiles(Narrow{}, Narrow::kMetadataBytes))};
  for (const Case& known : kCases)
    if (known.weight == storage && known.y == dtype) known.run(p, e->config);
  return emulator::error.c_str();
}
