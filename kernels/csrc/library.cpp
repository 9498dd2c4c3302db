// Operators of the native library: their schemas, and the files that implement them.
//
// Only PyTorch's stable ABI is used (torch/csrc/stable, torch/headeronly), so one build serves every PyTorch from 2.10
// on and every Python. The Python side, with shape checks and the public docstring, is kernels/<operator>/native.py.

#include <torch/csrc/stable/library.h>

#ifndef NSPEC_TORCH_VERSION
#error "build with CMakeLists.txt, which says which PyTorch the headers are from"
#endif

// Read from the file's bytes by kernels/common/native.py, to name the PyTorch of the build when loading fails.
extern "C" __attribute__((visibility("default"), used)) const char nspec_native_build[] =
    "nspec-native-build: torch " NSPEC_TORCH_VERSION ";";

STABLE_TORCH_LIBRARY(nspec_native, m) {
  // linear_relu_count.cpp; `valid` without elements: every token counts
  m.def("relu_count_(Tensor(a!) h, Tensor valid, Tensor task_offsets, Tensor(b!) counts) -> ()");
  // compact.cpp; `sums`, `transposed`, `bias` and `r` without elements are not wanted
  m.def("pack_columns(Tensor source, Tensor index, bool transposed, Tensor(a!) packed, Tensor(b!) sums) -> ()");
  m.def("relu_backward_(Tensor(a!) dh, Tensor h, Tensor(b!) transposed, Tensor(c!) sums) -> ()");
  m.def("product_(Tensor(a!) out, Tensor a, Tensor b, Tensor bias) -> ()");
  m.def("expand_rows_(Tensor(a!) matrix, Tensor index) -> ()");
  m.def("expand_columns_(Tensor(a!) matrix, Tensor index, int packed, Tensor s, Tensor r) -> ()");
  // gated_activation.cpp
  m.def("gated_activation(Tensor gate, Tensor up, str kind, Tensor(a!) h) -> ()");
  m.def(
      "gated_activation_backward(Tensor dh, Tensor gate, Tensor up, str kind, Tensor(a!) dgate, Tensor(b!) dup) -> ()");
  // `dgate` may be the memory of `dh`
  m.def(
      "gated_gradients(Tensor dh, Tensor gate, Tensor up, str kind, Tensor index, Tensor(a!) dgate, Tensor(b!) dup, "
      "Tensor(c!) columns_gate, Tensor(d!) columns_up) -> ()");
  // write_neurons.cpp
  m.def("write_neurons_(Tensor(a!) weight, Tensor rows, Tensor index, bool columns) -> ()");
  // row_sparse_wgrad.cpp
  m.def("row_sparse_wgrad_scratch(Tensor dh, Tensor x, Tensor index) -> int");
  m.def(
      "row_sparse_wgrad(Tensor dh, Tensor x, Tensor index, Tensor(a!) dw, Tensor(b!) db, Tensor(c!) scratch) -> ()");
  // row_sparse_adamw.cpp; `active` and `weights` without elements: every row, and none that is written to
  m.def(
      "row_sparse_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor[] active, Tensor(d!)[] weights, Tensor[] index, int step, float lr, float beta1, float beta2, float eps, "
      "float weight_decay) -> ()");
}
