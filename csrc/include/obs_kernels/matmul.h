// SPDX-License-Identifier: Apache-2.0
// The sparse product Y = activation(X W^T + bias) on the sparse tensor cores of sm_90a.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "obs_kernels/errors.h"
#include "obs_kernels/launch_plan.h"

namespace obs_kernels {

enum class MatmulType : int32_t { kHalf = 0, kBfloat16 = 1 };
enum class Activation : int32_t { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

// A weight in the order in which the product reads it: for every kPackedRows rows and kPackedCols
// columns a tile of kPackedBytes, one contiguous copy: values as the tensor cores read them from
// shared memory, then metadata, 4 bytes a thread. The tiles of a row of tiles follow each other.
inline constexpr int64_t kPackedRows = 64;
inline constexpr int64_t kPackedCols = 64;
inline constexpr int64_t kPackedBytes = 4608;

int64_t prepacked_bytes(int64_t rows, int64_t cols);

// Stored format version 1 (see packing.h), of a pattern with at most two kept in each aligned four
// columns: n <= 2 and m a multiple of 4.
struct PrepackParams {
  const void* values;      // [rows, cols / m * n], 16-bit elements
  const uint8_t* codes;    // two-bit positions for 2:4 and panels, else a byte each
  const uint8_t* columns;  // [rows / v, cols / m, 4] for panels; unused if v == 0
  void* packed;            // prepacked_bytes(rows, cols), aligned to 16
  int64_t rows;
  int64_t cols;
  int64_t v;  // rows of a panel; 0 = no panels
  int64_t n;
  int64_t m;
};

// Rows and columns beyond the weight become zeros. Nothing waits.
LaunchPlan prepack(const PrepackParams& params, int device, cudaStream_t stream);

struct SparseLinearParams {
  const void* x;  // [tokens, cols], or [cols, tokens] if feature_x; aligned to 16, rows a multiple
                  // of 16 bytes
  const void* packed;  // of prepack
  const void* bias;    // [rows] or null
  void* y;             // [tokens, rows], or [rows, tokens] if feature_y
  int64_t rows;
  int64_t cols;
  int64_t tokens;
  MatmulType type;  // of x, bias and y; sums are f32
  Activation activation;
  bool feature_x;
  bool feature_y;
  int config;  // of kSparseTiles; -1: the table chooses
};

// Number of tile configurations, and the name of each: the `path` of what is launched with it.
int num_sparse_tiles();
const char* sparse_tile_name(int config);

LaunchPlan sparse_linear(const SparseLinearParams& params, int device, cudaStream_t stream);

// The same for a panel pattern v:2:m, v a multiple of 64, reading only the columns that a panel
// keeps. `product` is of those: cols is C / m * 4, packed is prepack's of the values and codes as
// 2:4 of so many columns; x is all of X, feature-major.
struct GatherLinearParams {
  SparseLinearParams product;
  const uint8_t* columns;  // as in PrepackParams
  int64_t x_stride;        // elements from one column of x to the next; a multiple of 8
  int64_t v;
  int64_t m;
};

// Whether it is faster than sparse_linear for this weight of `cols` columns in all; if x is not
// feature-major, with a transposition before.
bool gather_is_faster(
    int64_t rows, int64_t cols, int64_t tokens, int64_t v, int64_t m, bool feature_x, int device);

// Estimated cycles of the faster of the two, by fitted tiles; v = 0 for a weight without panels.
int64_t product_cycles(
    int64_t rows, int64_t cols, int64_t tokens, int64_t v, int64_t m, bool feature_x, int device);
// And of `transpose`.
int64_t transposition_cycles(int64_t tokens, int64_t cols);

int num_gather_tiles();
const char* gather_tile_name(int config);

LaunchPlan gather_linear(const GatherLinearParams& params, int device, cudaStream_t stream);

// x [tokens, cols] to out [cols, out_stride], 16-bit elements; the tokens rounded up to 8 make a
// column, the last filled up with zeros. cols is a multiple of 8, both are aligned to 16 bytes.
struct TransposeParams {
  const void* x;
  void* out;
  int64_t tokens;
  int64_t cols;
  int64_t out_stride;
};

LaunchPlan transpose(const TransposeParams& params, int device, cudaStream_t stream);

}  // namespace obs_kernels
