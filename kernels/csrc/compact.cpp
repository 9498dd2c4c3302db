// Between whole and compact matrices: what row_sparse_wgrad and compact_ffn do around their matrix products.
//
// The products themselves are PyTorch's. A product of the form aᵀ b runs at half the speed in 16-bit types when a is a
// transposed view, so there a is written transposed while it is being packed or masked anyway.

#include "columns.h"
#include "common.h"
#include "product.h"

#include <type_traits>

namespace nspec {
namespace {

// Tokens that are transposed, and summed, together: 64 bytes of each row of the transposed result.
constexpr int64_t kTile = 32;

int64_t chunks_of(int64_t rows) {
  return (rows + kChunk - 1) / kChunk;
}

// Runs body(first row, last row, sums of that chunk or null) over all chunks of rows, then adds the sums up into `sums`.
template <typename Body>
void over_chunks(int64_t rows, int64_t width, const Tensor& sums, const Body& body) {
  const int64_t chunks = chunks_of(rows);
  const bool wanted = sums.numel() > 0;
  std::vector<float> partial(wanted ? chunks * width : 0, 0.0f);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t c = lo; c < hi; ++c) {
      body(c * kChunk, std::min((c + 1) * kChunk, rows), wanted ? partial.data() + c * width : nullptr);
    }
  });
  if (wanted) add_chunks(partial, width, sums);
}

template <typename T>
void pack(const Tensor& source, const Columns& columns, bool transposed, const Tensor& packed, const Tensor& sums) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  const int64_t n = columns.size(), padded = packed.size(transposed ? 0 : 1);
  const int64_t stride = source.stride(0), out_stride = packed.stride(0);
  const T* in = data<T>(source);
  Bits* out = data<Bits>(packed);
  over_chunks(source.size(0), columns.width, sums, [&](int64_t start, int64_t stop, float* sum) {
    std::vector<Bits> tile(transposed ? kTile * n : 0);
    std::vector<float> run(sum != nullptr ? columns.width : 0);
    for (int64_t at = start; at < stop; at += kTile) {
      const int64_t end = std::min(at + kTile, stop);
      std::fill(run.begin(), run.end(), 0.0f);
      for (int64_t t = at; t < end; ++t) {
        const T* row = in + t * stride;
        if (sum != nullptr) add_row(row, run.data(), columns.width);
        Bits* to = transposed ? tile.data() + (t - at) * n : out + t * out_stride;
        compress(columns, reinterpret_cast<const Bits*>(row), to);
        if (!transposed) std::fill(to + n, to + padded, Bits{0});
      }
      if (sum != nullptr) add_row(run.data(), sum, columns.width);
      if constexpr (sizeof(T) == 2) {
        if (transposed) transpose(tile.data(), n, end - at, n, out + at, out_stride);
      }
    }
  });
}

void pack_columns(Tensor source, Tensor index, bool transposed, Tensor packed, Tensor sums) {
  const ScalarType type = source.scalar_type();
  check_type(type);
  check_matrix(source, "source", type);
  check_matrix(packed, "packed", type);
  check_vector(index, "index", ScalarType::Long, index.numel());
  const int64_t rows = source.size(0), width = source.size(1);
  if (sums.numel() > 0) check_vector(sums, "sums", type, width);
  const Columns columns(data<int64_t>(index), index.numel(), width);
  STD_TORCH_CHECK(!transposed || is_16_bit(type), "columns are packed transposed in 16-bit types alone");
  STD_TORCH_CHECK(
      transposed ? packed.size(0) == columns.size() && packed.size(1) == rows
                 : packed.size(0) == rows && packed.size(1) >= columns.size(),
      "packed has shape [", packed.size(0), ", ", packed.size(1), "] for ", columns.size(), " columns of ", rows,
      " rows");
  switch (type) {
    case ScalarType::Float:
      return pack<float>(source, columns, transposed, packed, sums);
    case ScalarType::BFloat16:
      return pack<BFloat16>(source, columns, transposed, packed, sums);
    default:
      return pack<Half>(source, columns, transposed, packed, sums);
  }
}

// gradient[j] = 0 where the activation is not above zero; NaN activations let it through, as in PyTorch.
NSPEC_CLONES void mask_row(float* __restrict gradient, const float* __restrict h, int64_t n) {
  for (int64_t j = 0; j < n; ++j) gradient[j] = h[j] <= 0.0f ? 0.0f : gradient[j];
}

NSPEC_CLONES void mask_row(uint16_t* __restrict gradient, const uint16_t* __restrict h, uint16_t infinity, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const uint16_t size = h[j] & 0x7fff;
    const bool passes = (h[j] != 0 && h[j] <= infinity) || size > infinity;
    gradient[j] = passes ? gradient[j] : 0;
  }
}

template <typename T>
void relu_backward(const Tensor& dh, const Tensor& h, const Tensor& transposed, const Tensor& sums) {
  const int64_t width = dh.size(1), stride = dh.stride(0), h_stride = h.stride(0);
  const uint16_t infinity = std::is_same_v<T, BFloat16> ? 0x7f80 : 0x7c00;
  over_chunks(dh.size(0), width, sums, [&](int64_t start, int64_t stop, float* sum) {
    std::vector<float> run(sum != nullptr ? width : 0);
    for (int64_t at = start; at < stop; at += kTile) {
      const int64_t end = std::min(at + kTile, stop);
      std::fill(run.begin(), run.end(), 0.0f);
      for (int64_t t = at; t < end; ++t) {
        T* row = data<T>(dh) + t * stride;
        if constexpr (sizeof(T) == 4) {
          mask_row(row, data<float>(h) + t * h_stride, width);
        } else {
          mask_row(reinterpret_cast<uint16_t*>(row), data<uint16_t>(h) + t * h_stride, infinity, width);
        }
        if (sum != nullptr) add_row(row, run.data(), width);
      }
      if (sum != nullptr) add_row(run.data(), sum, width);
      if constexpr (sizeof(T) == 2) {
        if (transposed.numel() > 0) {
          transpose(
              data<uint16_t>(dh) + at * stride, stride, end - at, width, data<uint16_t>(transposed) + at,
              transposed.stride(0));
        }
      }
    }
  });
}

void relu_backward_(Tensor dh, Tensor h, Tensor transposed, Tensor sums) {
  const ScalarType type = dh.scalar_type();
  check_type(type);
  check_matrix(dh, "dh", type);
  check_matrix(h, "h", type);
  STD_TORCH_CHECK(h.size(0) == dh.size(0) && h.size(1) == dh.size(1), "h and dh must have one shape");
  if (sums.numel() > 0) check_vector(sums, "sums", type, dh.size(1));
  if (transposed.numel() > 0) {
    check_matrix(transposed, "transposed", type);
    STD_TORCH_CHECK(
        is_16_bit(type) && transposed.size(0) == dh.size(1) && transposed.size(1) == dh.size(0),
        "transposed must be [width, tokens] of a 16-bit type");
  }
  switch (type) {
    case ScalarType::Float:
      return relu_backward<float>(dh, h, transposed, sums);
    case ScalarType::BFloat16:
      return relu_backward<BFloat16>(dh, h, transposed, sums);
    default:
      return relu_backward<Half>(dh, h, transposed, sums);
  }
}

// The n rows of the set lie at the end of `matrix`; each goes to its place, and all others become zero. A row never moves
// down, so the rows can be taken in order without a second buffer.
void expand_rows_(Tensor matrix, Tensor index) {
  STD_TORCH_CHECK(matrix.is_cpu() && matrix.dim() == 2 && matrix.is_contiguous(), "matrix must be contiguous on the CPU");
  check_vector(index, "index", ScalarType::Long, index.numel());
  const int64_t rows = matrix.size(0);
  const Columns set(data<int64_t>(index), index.numel(), rows);
  const int64_t bytes = matrix.size(1) * (matrix.scalar_type() == ScalarType::Float ? 4 : 2);
  check_type(matrix.scalar_type());
  char* base = static_cast<char*>(matrix.data_ptr());
  // Threads share the columns. 512 bytes is as little as is worth a piece of its own.
  torch::stable::parallel_for(0, (bytes + 511) / 512, std::max<int64_t>(1, 65536 / (512 * (rows + 1))), [&](int64_t lo, int64_t hi) {
    const int64_t from = lo * 512, length = std::min(hi * 512, bytes) - from;
    int64_t row = 0;
    for (int64_t j = 0; j < set.size(); ++j) {
      for (; row < set.at[j]; ++row) std::memset(base + row * bytes + from, 0, length);
      const int64_t source = rows - set.size() + j;
      if (source != row) std::memcpy(base + row * bytes + from, base + source * bytes + from, length);
      ++row;
    }
    for (; row < rows; ++row) std::memset(base + row * bytes + from, 0, length);
  });
}

template <typename T>
void expand_columns(const Tensor& matrix, const Columns& set, int64_t packed, const Tensor& s, const Tensor& r) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  const int64_t width = set.width, stride = matrix.stride(0);
  torch::stable::parallel_for(0, matrix.size(0), std::max<int64_t>(1, 16384 / (width + 1)), [&](int64_t lo, int64_t hi) {
    std::vector<Bits> in(packed + kSlack, Bits{0});
    std::vector<T> fill(width, T(0.0f));
    for (int64_t o = lo; o < hi; ++o) {
      T* row = data<T>(matrix) + o * stride;
      std::memcpy(in.data(), row + width - packed, packed * sizeof(T));
      if (r.numel() > 0) {
        const float factor = static_cast<float>(data<T>(s)[o]);
        const T* constant = data<T>(r);
        for (int64_t j = 0; j < width; ++j) fill[j] = static_cast<T>(factor * static_cast<float>(constant[j]));
      }
      expand(set, in.data(), reinterpret_cast<const Bits*>(fill.data()), reinterpret_cast<Bits*>(row));
    }
  });
}

// The columns of the set lie at the start of the last `packed` columns; each goes to its place, and column j of the others
// becomes s r[j] (zero where r is empty).
void expand_columns_(Tensor matrix, Tensor index, int64_t packed, Tensor s, Tensor r) {
  const ScalarType type = matrix.scalar_type();
  check_type(type);
  check_matrix(matrix, "matrix", type);
  check_vector(index, "index", ScalarType::Long, index.numel());
  const Columns set(data<int64_t>(index), index.numel(), matrix.size(1));
  STD_TORCH_CHECK(
      set.size() <= packed && packed <= matrix.size(1), "packed is ", packed, " for ", set.size(), " columns of ",
      matrix.size(1));
  if (r.numel() > 0) {
    check_vector(r, "r", type, matrix.size(1));
    check_vector(s, "s", type, matrix.size(0));
  }
  switch (type) {
    case ScalarType::Float:
      return expand_columns<float>(matrix, set, packed, s, r);
    case ScalarType::BFloat16:
      return expand_columns<BFloat16>(matrix, set, packed, s, r);
    default:
      return expand_columns<Half>(matrix, set, packed, s, r);
  }
}

// out = a b (+ bias), each thread computing some rows by itself. PyTorch's own threading of 16-bit products leaves a core idle
// for some sizes: 4096 x 512 by 512 x 1024 ran at 1.27 TFLOP/s on two cores with AMX, by 512 x 1600 at 2.68.
void product_(Tensor out, Tensor a, Tensor b, Tensor bias) {
  const ScalarType type = out.scalar_type();
  check_matrix(out, "out", type);
  STD_TORCH_CHECK(
      a.is_cpu() && b.is_cpu() && a.dim() == 2 && b.dim() == 2 && a.scalar_type() == type && b.scalar_type() == type &&
          a.size(0) == out.size(0) && b.size(1) == out.size(1) && a.size(1) == b.size(0),
      "out [n, m], a [n, k] and b [k, m] do not fit together");
  if (bias.numel() > 0) check_vector(bias, "bias", type, out.size(1));
  torch::stable::parallel_for(0, out.size(0), 64, [&](int64_t lo, int64_t hi) {
    Tensor whole_out = out, whole_a = a;
    const Tensor part = torch::stable::narrow(whole_out, 0, lo, hi - lo);
    const Tensor rows = torch::stable::narrow(whole_a, 0, lo, hi - lo);
    bias.numel() > 0 ? multiply(part, rows, b, bias) : multiply(part, rows, b);
  });
}

}  // namespace
}  // namespace nspec

STABLE_TORCH_LIBRARY_IMPL(nspec_native, CPU, m) {
  m.impl("pack_columns", TORCH_BOX(&nspec::pack_columns));
  m.impl("relu_backward_", TORCH_BOX(&nspec::relu_backward_));
  m.impl("expand_rows_", TORCH_BOX(&nspec::expand_rows_));
  m.impl("product_", TORCH_BOX(&nspec::product_));
  m.impl("expand_columns_", TORCH_BOX(&nspec::expand_columns_));
}
