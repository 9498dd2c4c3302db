// Sets of columns of a row-major matrix: taking them out of a row, putting them back, and transposing.
//
// Elements are moved as bits, 16 or 32 of them. Where the processor can compress and expand vectors (AVX-512F for 32
// bits, AVX-512 VBMI2 for 16) that is used: a few cycles for 16 or 32 elements, where gathering one by one takes as many
// cycles as there are elements.

#pragma once

#include <cstdint>
#include <vector>

namespace nspec {

struct Columns {
  // `index` holds rising column numbers below `width`; it ends at the first -1.
  Columns(const int64_t* index, int64_t length, int64_t width);

  int64_t width;                // columns of the whole matrix
  std::vector<int32_t> at;      // [n], the columns that are taken
  std::vector<uint32_t> mask;   // a bit per column

  int64_t size() const { return static_cast<int64_t>(at.size()); }
};

// out[j] = row[at[j]] for j < n; `out` may not overlap `row`.
void compress(const Columns& columns, const uint32_t* row, uint32_t* out);
void compress(const Columns& columns, const uint16_t* row, uint16_t* out);

// row[at[j]] = in[j]; every other row[i] = fill[i]. `in` must have kSlack readable elements after its n.
constexpr int64_t kSlack = 32;
void expand(const Columns& columns, const uint32_t* in, const uint32_t* fill, uint32_t* row);
void expand(const Columns& columns, const uint16_t* in, const uint16_t* fill, uint16_t* row);

// out[j * out_stride + i] = in[i * in_stride + j] for i < rows and j < columns.
void transpose(const uint16_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint16_t* out, int64_t out_stride);

}  // namespace nspec
