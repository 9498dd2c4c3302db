// The second half of linear_relu_count: ReLU in place, and how often each neuron fires, in one pass over the product.

#include "common.h"

#include <mutex>

namespace nspec {
namespace {

// Rows per call below: a 16-bit counter cannot run over.
constexpr int64_t kMostRows = 512;

// relu in place over one row; counts[j] += counted where the result is above zero. NaN stays and does not count.
NSPEC_CLONES void relu_count_row(float* __restrict h, uint32_t* __restrict counts, uint32_t counted, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const float value = h[j];
    h[j] = value <= 0.0f ? 0.0f : value;
    counts[j] += value > 0.0f ? counted : 0u;
  }
}

// The same for 16-bit floats by their bits; `infinity` is the pattern above which an unsigned value is NaN.
NSPEC_CLONES void relu_count_row(
    uint16_t* __restrict h, uint16_t* __restrict counts, uint16_t counted, uint16_t infinity, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const uint16_t value = h[j];
    const uint16_t size = value & 0x7fff;
    const bool positive = value != 0 && value <= infinity;
    h[j] = positive || size > infinity ? value : 0;
    counts[j] += positive ? counted : 0;
  }
}

struct Part {
  int64_t task, start, stop;
};

void relu_count_(Tensor h, Tensor valid, Tensor task_offsets, Tensor counts) {
  const ScalarType type = h.scalar_type();
  check_type(type);
  check_matrix(h, "h", type);
  const int64_t tokens = h.size(0), d_ff = h.size(1), stride = h.stride(0), tasks = counts.size(0);
  check_vector(task_offsets, "task_offsets", ScalarType::Long, tasks + 1);
  STD_TORCH_CHECK(
      counts.is_cpu() && counts.scalar_type() == ScalarType::Long && counts.is_contiguous() && counts.dim() == 2 &&
          counts.size(1) == d_ff,
      "counts must be contiguous int64 [tasks, ", d_ff, "] on the CPU");
  const bool* counted = nullptr;
  if (valid.numel() > 0) {
    check_vector(valid, "valid", ScalarType::Bool, tokens);
    counted = data<bool>(valid);
  }
  const int64_t* offsets = data<int64_t>(task_offsets);
  std::vector<Part> parts;
  for (int64_t task = 0; task < tasks; ++task) {
    STD_TORCH_CHECK(
        0 <= offsets[task] && offsets[task] <= offsets[task + 1] && offsets[task + 1] <= tokens,
        "task_offsets must rise from 0 to the ", tokens, " tokens");
    for (int64_t at = offsets[task]; at < offsets[task + 1]; at += kMostRows) {
      parts.push_back({task, at, std::min(at + kMostRows, offsets[task + 1])});
    }
  }
  int64_t* totals = data<int64_t>(counts);
  std::fill(totals, totals + tasks * d_ff, 0);
  std::mutex adding;  // integers: the order of the parts does not matter
  const uint16_t infinity = type == ScalarType::BFloat16 ? 0x7f80 : 0x7c00;

  torch::stable::parallel_for(0, parts.size(), 1, [&](int64_t lo, int64_t hi) {
    std::vector<uint32_t> wide(type == ScalarType::Float ? d_ff : 0);
    std::vector<uint16_t> narrow(type == ScalarType::Float ? 0 : d_ff);
    for (int64_t p = lo; p < hi; ++p) {
      const Part& part = parts[p];
      std::fill(wide.begin(), wide.end(), 0);
      std::fill(narrow.begin(), narrow.end(), 0);
      for (int64_t t = part.start; t < part.stop; ++t) {
        const bool counts_here = counted == nullptr || counted[t];
        if (type == ScalarType::Float) {
          relu_count_row(data<float>(h) + t * stride, wide.data(), counts_here, d_ff);
        } else {
          relu_count_row(data<uint16_t>(h) + t * stride, narrow.data(), counts_here, infinity, d_ff);
        }
      }
      const std::lock_guard<std::mutex> held(adding);
      int64_t* total = totals + part.task * d_ff;
      for (int64_t j = 0; j < d_ff; ++j) total[j] += type == ScalarType::Float ? wide[j] : narrow[j];
    }
  });
}

}  // namespace
}  // namespace nspec

STABLE_TORCH_LIBRARY_IMPL(nspec_native, CPU, m) {
  m.impl("relu_count_", TORCH_BOX(&nspec::relu_count_));
}
