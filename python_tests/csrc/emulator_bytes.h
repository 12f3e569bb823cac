// emulator_bytes.h: ptx/permute.cuh on a CPU.
#pragma once
#include <cstdint>

namespace sparsekern::ptx {

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t v = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> 4 * i & 15, byte = bytes >> digit % 8 * 8 & 0xFF;
    v |= (digit < 8 ? byte : byte & 0x80 ? 0xFFu : 0u) << 8 * i;
  }
  return v;
}
inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }

}  // namespace sparsekern::ptx
