#include "columns.h"

#include "common.h"

#if defined(__x86_64__) && defined(NSPEC_HAVE_TARGET_CLONES)
#define NSPEC_X86 1
#include <immintrin.h>
#endif

namespace nspec {

Columns::Columns(const int64_t* index, int64_t length, int64_t width_) : width(width_), mask((width_ + 31) / 32) {
  at.reserve(length);
  for (int64_t j = 0; j < length && index[j] >= 0; ++j) {
    STD_TORCH_CHECK(
        index[j] < width && (at.empty() || index[j] > at.back()), "an index must hold rising neurons below ", width,
        ", found ", index[j], " at place ", j);
    at.push_back(static_cast<int32_t>(index[j]));
    mask[index[j] / 32] |= 1u << (index[j] % 32);
  }
}

namespace {

#ifdef NSPEC_X86

const bool has_compress_32 = __builtin_cpu_supports("avx512f");
const bool has_compress_16 = __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw");

__attribute__((target("avx512f,popcnt"))) void compress_avx512(
    const Columns& c, const uint32_t* row, uint32_t* out) {
  const int64_t n = c.size();
  int64_t to = 0;
  for (int64_t j = 0; j < c.width; j += 16) {
    const uint32_t bits = c.mask[j / 32] >> (j % 32) & 0xffffu;
    // Masked by the bits themselves, so that a row's end and columns outside the set are never read.
    const __m512i taken = _mm512_maskz_compress_epi32(bits, _mm512_maskz_loadu_epi32(bits, row + j));
    const int count = __builtin_popcount(bits);
    if (to + 16 <= n) {
      _mm512_storeu_si512(out + to, taken);  // what is too much is overwritten by the next
    } else {
      _mm512_mask_storeu_epi32(out + to, static_cast<__mmask16>((1u << count) - 1), taken);
    }
    to += count;
  }
}

__attribute__((target("avx512f,avx512bw,avx512vbmi2,popcnt"))) void compress_avx512(
    const Columns& c, const uint16_t* row, uint16_t* out) {
  const int64_t n = c.size();
  int64_t to = 0;
  for (int64_t j = 0; j < c.width; j += 32) {
    const uint32_t bits = c.mask[j / 32];
    const __m512i taken = _mm512_maskz_compress_epi16(bits, _mm512_maskz_loadu_epi16(bits, row + j));
    const int count = __builtin_popcount(bits);
    if (to + 32 <= n) {
      _mm512_storeu_si512(out + to, taken);
    } else {
      _mm512_mask_storeu_epi16(out + to, static_cast<__mmask32>((uint64_t{1} << count) - 1), taken);
    }
    to += count;
  }
}

__attribute__((target("avx512f,popcnt"))) void expand_avx512(
    const Columns& c, const uint32_t* in, const uint32_t* fill, uint32_t* row) {
  for (int64_t j = 0; j < c.width; j += 16) {
    const uint32_t bits = c.mask[j / 32] >> (j % 32) & 0xffffu;
    const __mmask16 inside = c.width - j >= 16 ? 0xffff : (1u << (c.width - j)) - 1;
    const __m512i others = _mm512_maskz_loadu_epi32(inside, fill + j);
    const __m512i all = _mm512_mask_expand_epi32(others, bits, _mm512_loadu_si512(in));
    _mm512_mask_storeu_epi32(row + j, inside, all);
    in += __builtin_popcount(bits);
  }
}

__attribute__((target("avx512f,avx512bw,avx512vbmi2,popcnt"))) void expand_avx512(
    const Columns& c, const uint16_t* in, const uint16_t* fill, uint16_t* row) {
  for (int64_t j = 0; j < c.width; j += 32) {
    const uint32_t bits = c.mask[j / 32];
    const __mmask32 inside = c.width - j >= 32 ? 0xffffffffu : (1u << (c.width - j)) - 1;
    const __m512i others = _mm512_maskz_loadu_epi16(inside, fill + j);
    const __m512i all = _mm512_mask_expand_epi16(others, bits, _mm512_loadu_si512(in));
    _mm512_mask_storeu_epi16(row + j, inside, all);
    in += __builtin_popcount(bits);
  }
}

#endif

template <typename Bits>
void compress_plain(const Columns& c, const Bits* __restrict row, Bits* __restrict out) {
  const int32_t* at = c.at.data();
  const int64_t n = c.size();
  for (int64_t j = 0; j < n; ++j) out[j] = row[at[j]];
}

template <typename Bits>
void expand_plain(const Columns& c, const Bits* __restrict in, const Bits* fill, Bits* __restrict row) {
  std::memcpy(row, fill, c.width * sizeof(Bits));
  const int32_t* at = c.at.data();
  const int64_t n = c.size();
  for (int64_t j = 0; j < n; ++j) row[at[j]] = in[j];
}

// Eight rows of eight: three rounds of interleaving, which compilers turn into the unpack instructions of any processor.
typedef uint16_t Row8 __attribute__((vector_size(16)));
typedef uint32_t Pair4 __attribute__((vector_size(16)));
typedef uint64_t Quad2 __attribute__((vector_size(16)));

void transpose_8x8(const uint16_t* in, int64_t in_stride, uint16_t* out, int64_t out_stride) {
  Row8 a[8], b[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&a[i], in + i * in_stride, 16);
  for (int i = 0; i < 4; ++i) {
    b[i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], Row8{0, 8, 1, 9, 2, 10, 3, 11});
    b[i + 4] = __builtin_shuffle(a[2 * i], a[2 * i + 1], Row8{4, 12, 5, 13, 6, 14, 7, 15});
  }
  // b[i] holds columns 0-3 of rows 2i and 2i+1 in pairs, b[i+4] columns 4-7.
  for (int half = 0; half < 8; half += 4) {
    const Pair4 p0 = (Pair4)b[half], p1 = (Pair4)b[half + 1], p2 = (Pair4)b[half + 2], p3 = (Pair4)b[half + 3];
    const Quad2 low01 = (Quad2)__builtin_shuffle(p0, p1, Pair4{0, 4, 1, 5});
    const Quad2 high01 = (Quad2)__builtin_shuffle(p0, p1, Pair4{2, 6, 3, 7});
    const Quad2 low23 = (Quad2)__builtin_shuffle(p2, p3, Pair4{0, 4, 1, 5});
    const Quad2 high23 = (Quad2)__builtin_shuffle(p2, p3, Pair4{2, 6, 3, 7});
    const Quad2 columns[4] = {
        __builtin_shuffle(low01, low23, Quad2{0, 2}), __builtin_shuffle(low01, low23, Quad2{1, 3}),
        __builtin_shuffle(high01, high23, Quad2{0, 2}), __builtin_shuffle(high01, high23, Quad2{1, 3})};
    for (int j = 0; j < 4; ++j) std::memcpy(out + (half + j) * out_stride, &columns[j], 16);
  }
}

}  // namespace

void compress(const Columns& c, const uint32_t* row, uint32_t* out) {
#ifdef NSPEC_X86
  if (has_compress_32) return compress_avx512(c, row, out);
#endif
  compress_plain(c, row, out);
}

void compress(const Columns& c, const uint16_t* row, uint16_t* out) {
#ifdef NSPEC_X86
  if (has_compress_16) return compress_avx512(c, row, out);
#endif
  compress_plain(c, row, out);
}

void expand(const Columns& c, const uint32_t* in, const uint32_t* fill, uint32_t* row) {
#ifdef NSPEC_X86
  if (has_compress_32) return expand_avx512(c, in, fill, row);
#endif
  expand_plain(c, in, fill, row);
}

void expand(const Columns& c, const uint16_t* in, const uint16_t* fill, uint16_t* row) {
#ifdef NSPEC_X86
  if (has_compress_16) return expand_avx512(c, in, fill, row);
#endif
  expand_plain(c, in, fill, row);
}

void transpose(const uint16_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint16_t* out, int64_t out_stride) {
  const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int64_t j = 0; j < whole_columns; j += 8) {
    // Rows innermost: what is written next lies beside what was written last.
    for (int64_t i = 0; i < whole_rows; i += 8) {
      transpose_8x8(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i) {
      out[j * out_stride + i] = in[i * in_stride + j];
    }
  }
}

}  // namespace nspec
