// PyTorch's matrix products from within a thread of parallel_for, where they run on that thread alone.

#pragma once

#include "common.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace nspec {

// A matrix in memory that somebody else keeps.
inline Tensor matrix(void* at, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, ScalarType type) {
  return torch::stable::from_blob(
      at, {rows, columns}, {row_stride, column_stride},
      torch::stable::Device(torch::headeronly::DeviceType::CPU), type);
}

// out = a b
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()) == 0, "PyTorch's matrix product failed");
}

// out = a b + bias
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& bias) {
  STD_TORCH_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), bias.get(), a.get(), b.get(), 1.0, 1.0) == 0,
      "PyTorch's matrix product failed");
}

// out += a b
inline void multiply_add(const Tensor& out, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0) == 0,
      "PyTorch's matrix product failed");
}

}  // namespace nspec
