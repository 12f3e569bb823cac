// decode_sm90.cu: entry points of the decode kernel, which configuration it uses when none is
// asked for, and the kernel itself for bfloat16 and one weight. The other forms are compiled in
// files of their own.
#include "linear/decode_launch_sm90.cuh"

namespace sparsekern {
namespace decode {

#define SK_EXTERN(T, weights)                                                             \
  extern template Status launch_for_tokens<T, weights>(const LinearProblem&, const void*, \
                                                       const void*, int, cudaStream_t);
SK_EXTERN(__nv_bfloat16, 2)
SK_EXTERN(__half, 1)
SK_EXTERN(__half, 2)
#undef SK_EXTERN

// Row blocks and split of K that keep the memory busy (with more tokens: also the tensor cores),
// and no more CTAs than that: each split adds a reduction. Measured: NOTES.md, decode. Returns an
// index into SK_DECODE_CONFIGS.
inline int choose_config(const tile64::Extent& extent) {
  constexpr int kMost = 96, kFew = 66;
  int split = 1;
  while (split < 8 && extent.superpanels * split * 2 <= kMost && extent.k_tiles >= 4 * split)
    split *= 2;
  const int panels = split == 2 && extent.superpanels * split <= kFew ? 2 : 4;
  int config = 0;
#define SK_MATCH(index, of_panels, of_split) \
  if (of_panels == panels && of_split == split) config = index;
  SK_DECODE_CONFIGS(SK_MATCH)
#undef SK_MATCH
  return config;
}

}  // namespace decode

int decode_config(int out_features, int in_features) {
  return decode::choose_config(tile64::Extent::of(out_features, in_features));
}

Status launch_decode(const LinearProblem& p, int config, cudaStream_t stream) {
  if (config == 0) config = decode_config(p.out_features, p.in_features);
  return p.dtype == DType::kBFloat16
             ? decode::launch_for_tokens<__nv_bfloat16, 1>(p, nullptr, nullptr, config, stream)
             : decode::launch_for_tokens<__half, 1>(p, nullptr, nullptr, config, stream);
}

Status launch_decode_gated(const GatedProblem& g, int config, cudaStream_t stream) {
  if (config == 0) config = decode_config(g.gate.out_features, g.gate.in_features);
  return g.gate.dtype == DType::kBFloat16 ? decode::launch_for_tokens<__nv_bfloat16, 2>(
                                                g.gate, g.up_values, g.up_metadata, config, stream)
                                          : decode::launch_for_tokens<__half, 2>(
                                                g.gate, g.up_values, g.up_metadata, config, stream);
}

}  // namespace sparsekern
