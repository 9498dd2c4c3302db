// What the operators of the native library share: instruction sets, element types, checks.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

// A loop marked so is compiled once per instruction set and the dynamic linker picks one (CMakeLists.txt tests the
// attribute). It cannot stand before a template.
#ifdef NSPEC_HAVE_TARGET_CLONES
#define NSPEC_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define NSPEC_CLONES
#endif

namespace nspec {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tokens that are summed in one go: sums over tokens are made of the sums of such chunks, added in order, so that they do
// not depend on the number of threads.
constexpr int64_t kChunk = 256;

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline void check_matrix(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.dim() == 2 && t.scalar_type() == type && (t.size(1) < 2 || t.stride(1) == 1),
      name, " must be a CPU matrix of the other tensors' dtype whose rows are contiguous");
}

inline void check_vector(const Tensor& t, const char* name, ScalarType type, int64_t length) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.dim() == 1 && t.scalar_type() == type && t.is_contiguous() && t.numel() == length,
      name, " must be a contiguous CPU vector of length ", length, " and the expected dtype, found ", t.numel(),
      " elements");
}

inline bool is_16_bit(ScalarType type) {
  return type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline void check_type(ScalarType type) {
  STD_TORCH_CHECK(
      type == ScalarType::Float || is_16_bit(type), "the native operators take float32, bfloat16 and float16");
}

// sum[j] += row[j], in float32.
void add_row(const float* row, float* sum, int64_t n);
void add_row(const BFloat16* row, float* sum, int64_t n);
void add_row(const Half* row, float* sum, int64_t n);

// Sums of chunks [chunks, n], added in order and rounded to the type of `out`.
void add_chunks(const std::vector<float>& chunks, int64_t n, const Tensor& out);

}  // namespace nspec
