// Operators of the native library: their schemas. Each is implemented in the file that has its name.
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
  m.def(
      "row_sparse_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor[] active, int step, float lr, float beta1, float beta2, float eps, float weight_decay) -> ()");
}
