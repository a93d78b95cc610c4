// SPDX-License-Identifier: Apache-2.0
// The two errors that this library throws. Each text ends with the failed condition, file and line.
#pragma once

#include <stdexcept>

namespace obs_kernels {

// An argument that breaks the contract of an op; nothing was launched.
class ArgumentError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// A call into the CUDA runtime that failed.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace obs_kernels
