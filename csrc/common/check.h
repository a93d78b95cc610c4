// SPDX-License-Identifier: Apache-2.0
// Checks that throw. The text says what was wanted and what came, then condition, file and line.
#pragma once

#include <cuda_runtime_api.h>

#include <sstream>
#include <string>

#include "obs_kernels/errors.h"

namespace obs_kernels::detail {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline void check_cuda(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  // The runtime remembers a failed call; without this the next launch would be blamed for it.
  (void)cudaGetLastError();
  throw CudaError(concat(cudaGetErrorName(status),
                         ": ",
                         cudaGetErrorString(status),
                         " [",
                         call,
                         " = ",
                         static_cast<int>(status),
                         ", ",
                         file,
                         ":",
                         line,
                         "]"));
}

}  // namespace obs_kernels::detail

// OBS_CHECK(cols % m == 0, "cols must be a multiple of m = ", m, ", got ", cols)
#define OBS_CHECK(condition, ...)                                                       \
  do {                                                                                  \
    if (!(condition)) {                                                                 \
      throw ::obs_kernels::ArgumentError(::obs_kernels::detail::concat(                 \
          __VA_ARGS__, " [", #condition, " is false, ", __FILE__, ":", __LINE__, "]")); \
    }                                                                                   \
  } while (false)

#define OBS_CUDA_CHECK(call) ::obs_kernels::detail::check_cuda((call), #call, __FILE__, __LINE__)
