// Rows of neurons put into the weights where they lie, as rows or as columns.

#include "common.h"

namespace nspec {
namespace {

// Rows of a weight that are filled one after another: as many as a line of the cache has numbers of a neuron.
constexpr int64_t kLine = 16;

template <typename T, typename Own>
void as_rows(const Tensor& weight, const Tensor& rows, const int64_t* at) {
  const int64_t d = rows.size(1), stride = weight.stride(0), grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(d, 1));
  const Own* from = data<Own>(rows);
  T* to = data<T>(weight);
  torch::stable::parallel_for(0, rows.size(0), grain, [&](int64_t lo, int64_t hi) {
    for (int64_t j = lo; j < hi; ++j) {
      const Own* in = from + j * d;
      T* out = to + at[j] * stride;
      if constexpr (std::is_same_v<T, Own>) {
        std::memcpy(out, in, d * sizeof(T));
      } else {
        for (int64_t i = 0; i < d; ++i) out[i] = static_cast<T>(static_cast<float>(in[i]));
      }
    }
  });
}

template <typename T, typename Own>
void as_columns(const Tensor& weight, const Tensor& rows, const int64_t* at) {
  const int64_t k = rows.size(0), d = rows.size(1), stride = weight.stride(0);
  const int64_t grain = std::max<int64_t>(1, 16384 / (kLine * std::max<int64_t>(k, 1)));
  const Own* from = data<Own>(rows);
  T* to = data<T>(weight);
  torch::stable::parallel_for(0, (d + kLine - 1) / kLine, grain, [&](int64_t lo, int64_t hi) {
    for (int64_t block = lo; block < hi; ++block) {
      for (int64_t i = block * kLine; i < std::min(d, (block + 1) * kLine); ++i) {
        T* out = to + i * stride;
        for (int64_t j = 0; j < k; ++j) out[at[j]] = static_cast<T>(static_cast<float>(from[j * d + i]));
      }
    }
  });
}

template <typename T, typename Own>
void put(const Tensor& weight, const Tensor& rows, const int64_t* at, bool columns) {
  columns ? as_columns<T, Own>(weight, rows, at) : as_rows<T, Own>(weight, rows, at);
}

template <typename T>
void put(const Tensor& weight, const Tensor& rows, const int64_t* at, bool columns) {
  switch (rows.scalar_type()) {
    case ScalarType::Float:
      return put<T, float>(weight, rows, at, columns);
    case ScalarType::BFloat16:
      return put<T, BFloat16>(weight, rows, at, columns);
    default:
      return put<T, Half>(weight, rows, at, columns);
  }
}

void write_neurons_(Tensor weight, Tensor rows, Tensor index, bool columns) {
  check_type(weight.scalar_type());
  check_type(rows.scalar_type());
  check_matrix(weight, "weight", weight.scalar_type());
  STD_TORCH_CHECK(rows.is_cpu() && rows.dim() == 2 && rows.is_contiguous(), "rows must be a contiguous CPU matrix");
  check_vector(index, "index", ScalarType::Long, rows.size(0));
  STD_TORCH_CHECK(rows.size(1) == weight.size(columns ? 0 : 1), "rows do not have the size of the weight's");
  const int64_t* at = data<int64_t>(index);
  for (int64_t j = 0; j < rows.size(0); ++j) {
    STD_TORCH_CHECK(at[j] >= 0 && at[j] < weight.size(columns ? 1 : 0), "there is no neuron ", at[j]);
  }
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      return put<float>(weight, rows, at, columns);
    case ScalarType::BFloat16:
      return put<BFloat16>(weight, rows, at, columns);
    default:
      return put<Half>(weight, rows, at, columns);
  }
}

}  // namespace
}  // namespace nspec

STABLE_TORCH_LIBRARY_IMPL(nspec_native, CPU, m) {
  m.impl("write_neurons_", TORCH_BOX(&nspec::write_neurons_));
}
