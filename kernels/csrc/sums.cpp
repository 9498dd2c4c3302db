// Sums over tokens, in float32.

#include "common.h"

namespace nspec {

NSPEC_CLONES void add_row(const float* __restrict row, float* __restrict sum, int64_t n) {
  for (int64_t j = 0; j < n; ++j) sum[j] += row[j];
}

NSPEC_CLONES void add_row(const BFloat16* __restrict row, float* __restrict sum, int64_t n) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(row);
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t wide = static_cast<uint32_t>(bits[j]) << 16;  // bfloat16 is the upper half of a float32
    float value;
    std::memcpy(&value, &wide, 4);
    sum[j] += value;
  }
}

void add_row(const Half* __restrict row, float* __restrict sum, int64_t n) {
  for (int64_t j = 0; j < n; ++j) sum[j] += static_cast<float>(row[j]);
}

namespace {

template <typename T>
void add_chunks_to(const std::vector<float>& chunks, int64_t n, T* out) {
  std::vector<float> total(n, 0.0f);
  for (size_t start = 0; start < chunks.size() && n > 0; start += n) add_row(chunks.data() + start, total.data(), n);
  for (int64_t j = 0; j < n; ++j) out[j] = static_cast<T>(total[j]);
}

}  // namespace

void add_chunks(const std::vector<float>& chunks, int64_t n, const Tensor& out) {
  switch (out.scalar_type()) {
    case ScalarType::Float:
      return add_chunks_to(chunks, n, data<float>(out));
    case ScalarType::BFloat16:
      return add_chunks_to(chunks, n, data<BFloat16>(out));
    default:
      return add_chunks_to(chunks, n, data<Half>(out));
  }
}

}  // namespace nspec
