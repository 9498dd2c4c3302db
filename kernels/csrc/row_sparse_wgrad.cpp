// The weight gradient of the active neurons, for one task: dw[i, :] = sum_t dh[t, i] x[t, :], rows of zeros elsewhere, and
// the sums of all columns of dh for the bias.
//
// Each thread owns blocks of neurons. It packs their columns of dh into memory of its own that stays in its cache, lets
// PyTorch multiply them on this thread, and copies the rows to their places: the packed matrix never travels through
// memory, as it would between two separate passes. float32 goes through the tokens in steps, adding up products of 256
// tokens. 16-bit types would round after each step, so there a block is packed whole, and transposed, since products with
// a transposed view run at half the speed.

#include "columns.h"
#include "common.h"
#include "product.h"

#include <atomic>

namespace nspec {
namespace {

// Neurons of a block. Measured on two cores with AVX-512 and AMX, 4096 x 512 x 2048 and 2048 x 1024 x 4096: in float32
// blocks of 512 are 5 % slower (the product packs x anew for each block), steps of 512 to 4096 tokens up to 5 %. In 16 bits
// the packed block has to stay in the cache: blocks of 2048 took 7.3 ms where blocks of 512 took 6.5, at density 0.78.
int64_t most_neurons(int64_t item) {
  return item == 4 ? 2048 : 512;
}

constexpr int64_t kStep = 256;          // tokens that are packed together in float32
constexpr int64_t kTile = 32;           // tokens that are transposed together: 64 bytes of a row

// A block of neurons: columns [first, last) of dh, of which `columns` (counted from `first`) are active.
struct Block {
  int64_t first, last;
  Columns columns;
};

std::vector<Block> blocks_of(const std::vector<int64_t>& active, int64_t d_ff, int64_t item) {
  const int64_t n = active.size(), threads = torch::stable::get_num_threads();
  int64_t count = std::max<int64_t>(1, (n + most_neurons(item) - 1) / most_neurons(item));
  count = std::min((count + threads - 1) / threads * threads, std::max<int64_t>(d_ff, 1));  // the same for every thread
  std::vector<Block> blocks;
  int64_t first = 0, rank = 0;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t next = (b + 1) * n / count;
    int64_t last = d_ff;
    if (b + 1 < count) last = n == 0 ? (b + 1) * d_ff / count : next < n ? active[next] : d_ff;
    std::vector<int64_t> mine;
    for (; rank < next; ++rank) mine.push_back(active[rank] - first);
    blocks.push_back({first, last, Columns(mine.data(), mine.size(), last - first)});
    first = last;
  }
  return blocks;
}

// Bytes of scratch memory that one thread needs.
int64_t scratch_of(const std::vector<Block>& blocks, int64_t tokens, int64_t d_in, int64_t item) {
  int64_t most = 0;
  for (const Block& block : blocks) most = std::max(most, block.columns.size());
  const int64_t packed = item == 4 ? kStep * (most + 16) : most * tokens;
  return ((packed + most * d_in) * item + 63) / 64 * 64;
}

// float32 sums are made in three stages, of 16 tokens, of a step and of all: one after the other they would be less exact
// than PyTorch's, which adds in pairs. 16-bit results are rounded far more in the end, and have two stages.
constexpr int64_t kRun = 16;

// Adds a finished run, if there is one, to the sums of the step, and begins the next.
void next_run(std::vector<float>& run, std::vector<float>& part, int64_t done) {
  if (done > 0) add_row(run.data(), part.data(), run.size());
  std::fill(run.begin(), run.end(), 0.0f);
}

// Packs and multiplies in float32; `product` is [n, d_in].
void one_block(
    const Block& block, const float* dh, int64_t dh_stride, const Tensor& x, float* sums, float* packed, float* product) {
  const int64_t tokens = x.size(0), d_in = x.size(1), n = block.columns.size(), width = (n + 15) / 16 * 16;
  const int64_t columns = block.last - block.first;
  const bool whole = n == columns;
  const Tensor out = matrix(product, n, d_in, d_in, 1, ScalarType::Float);
  std::fill(sums, sums + columns, 0.0f);
  std::vector<float> run(columns), part(columns);
  for (int64_t at = 0; at < tokens; at += kStep) {
    const int64_t m = std::min(kStep, tokens - at);
    std::fill(part.begin(), part.end(), 0.0f);
    for (int64_t t = 0; t < m; ++t) {
      if (t % kRun == 0) next_run(run, part, t);
      const float* row = dh + (at + t) * dh_stride + block.first;
      add_row(row, run.data(), columns);
      if (!whole) {
        compress(block.columns, reinterpret_cast<const uint32_t*>(row), reinterpret_cast<uint32_t*>(packed + t * width));
      }
    }
    next_run(run, part, m);
    add_row(part.data(), sums, columns);
    if (n == 0) continue;
    Tensor all = x;
    const Tensor step = torch::stable::narrow(all, 0, at, m);
    // A block of active neurons alone needs no packing: the sums have just brought these rows into the cache.
    float* here = whole ? const_cast<float*>(dh) + at * dh_stride + block.first : packed;
    const Tensor a = matrix(here, n, m, 1, whole ? dh_stride : width, ScalarType::Float);
    at == 0 ? multiply(out, a, step) : multiply_add(out, a, step);
  }
}

template <typename T>
void one_block(const Block& block, const T* dh, int64_t dh_stride, const Tensor& x, float* sums, T* packed, T* product) {
  const int64_t tokens = x.size(0), d_in = x.size(1), n = block.columns.size(), columns = block.last - block.first;
  std::vector<uint16_t> tile(kTile * n);
  std::vector<float> part(columns);
  std::fill(sums, sums + columns, 0.0f);
  for (int64_t at = 0; at < tokens; at += kStep) {
    const int64_t stop = std::min(at + kStep, tokens);
    std::fill(part.begin(), part.end(), 0.0f);
    for (int64_t t0 = at; t0 < stop; t0 += kTile) {
      const int64_t t1 = std::min(t0 + kTile, stop);
      for (int64_t t = t0; t < t1; ++t) {
        const T* row = dh + t * dh_stride + block.first;
        add_row(row, part.data(), columns);
        compress(block.columns, reinterpret_cast<const uint16_t*>(row), tile.data() + (t - t0) * n);
      }
      transpose(tile.data(), n, t1 - t0, n, reinterpret_cast<uint16_t*>(packed) + t0, tokens);
    }
    add_row(part.data(), sums, columns);
  }
  if (n == 0 || tokens == 0) return;
  const ScalarType type = x.scalar_type();
  multiply(matrix(product, n, d_in, d_in, 1, type), matrix(packed, n, tokens, tokens, 1, type), x);
}

template <typename T>
void wgrad(
    const Tensor& dh, const Tensor& x, const std::vector<Block>& blocks, const Tensor& dw, const Tensor& db,
    char* scratch, int64_t scratch_size) {
  const int64_t tokens = dh.size(0), d_in = x.size(1), row_bytes = d_in * sizeof(T);
  std::atomic<int64_t> next_slot{0};
  torch::stable::parallel_for(0, blocks.size(), 1, [&](int64_t lo, int64_t hi) {
    char* mine = scratch + scratch_size * next_slot++;
    std::vector<float> sums;
    for (int64_t b = lo; b < hi; ++b) {
      const Block& block = blocks[b];
      const int64_t n = block.columns.size(), columns = block.last - block.first;
      sums.resize(columns);
      T* product = reinterpret_cast<T*>(mine);
      one_block(block, data<T>(dh), dh.stride(0), x, sums.data(), product + n * d_in, product);
      T* bias = data<T>(db) + block.first;
      for (int64_t j = 0; j < columns; ++j) bias[j] = static_cast<T>(sums[j]);
      char* rows = reinterpret_cast<char*>(data<T>(dw) + block.first * d_in);
      for (int64_t i = 0, j = 0; i < columns; ++i) {
        const bool active = j < n && block.columns.at[j] == i;
        if (active && tokens > 0) {
          std::memcpy(rows + i * row_bytes, product + j * d_in, row_bytes);
        } else {
          std::memset(rows + i * row_bytes, 0, row_bytes);
        }
        j += active;
      }
    }
  });
}

// The scratch memory, in bytes, that row_sparse_wgrad needs for these arguments.
int64_t row_sparse_wgrad_scratch(Tensor dh, Tensor x, Tensor index) {
  check_vector(index, "index", ScalarType::Long, index.numel());
  const int64_t* at = data<int64_t>(index);
  const int64_t item = dh.scalar_type() == ScalarType::Float ? 4 : 2;
  const auto blocks = blocks_of(std::vector<int64_t>(at, at + index.numel()), dh.size(1), item);
  return scratch_of(blocks, dh.size(0), x.size(1), item) * torch::stable::get_num_threads();
}

void row_sparse_wgrad(Tensor dh, Tensor x, Tensor index, Tensor dw, Tensor db, Tensor scratch) {
  const ScalarType type = dh.scalar_type();
  check_type(type);
  check_matrix(dh, "dh", type);
  check_matrix(x, "x", type);
  check_vector(index, "index", ScalarType::Long, index.numel());
  check_vector(db, "db", type, dh.size(1));
  STD_TORCH_CHECK(
      dw.is_cpu() && dw.is_contiguous() && dw.scalar_type() == type && dw.dim() == 2 && dw.size(0) == dh.size(1) &&
          dw.size(1) == x.size(1) && x.size(0) == dh.size(0),
      "dh [tokens, d_ff], x [tokens, d_in] and dw [d_ff, d_in] do not fit together");
  const int64_t* at = data<int64_t>(index);
  const Columns whole(at, index.numel(), dh.size(1));
  STD_TORCH_CHECK(whole.size() == index.numel(), "index must hold neurons alone, found -1");
  const int64_t item = type == ScalarType::Float ? 4 : 2;
  const auto blocks = blocks_of(std::vector<int64_t>(at, at + index.numel()), dh.size(1), item);
  const int64_t size = scratch_of(blocks, dh.size(0), x.size(1), item);
  STD_TORCH_CHECK(
      scratch.is_cpu() && scratch.is_contiguous() && scratch.scalar_type() == ScalarType::Byte &&
          scratch.numel() >= size * torch::stable::get_num_threads(),
      "scratch must hold ", size, " bytes a thread");
  char* memory = static_cast<char*>(scratch.data_ptr());
  switch (type) {
    case ScalarType::Float:
      return wgrad<float>(dh, x, blocks, dw, db, memory, size);
    case ScalarType::BFloat16:
      return wgrad<BFloat16>(dh, x, blocks, dw, db, memory, size);
    default:
      return wgrad<Half>(dh, x, blocks, dw, db, memory, size);
  }
}

}  // namespace
}  // namespace nspec

STABLE_TORCH_LIBRARY_IMPL(nspec_native, CPU, m) {
  m.impl("row_sparse_wgrad_scratch", TORCH_BOX(&nspec::row_sparse_wgrad_scratch));
  m.impl("row_sparse_wgrad", TORCH_BOX(&nspec::row_sparse_wgrad));
}
