// SPDX-License-Identifier: Apache-2.0
// The sparse product of a warpgroup: d[64, N] += A[64, 32] B[32, N], A with at most two of every
// four columns, both in shared memory (or A in registers). PTX ISA 9.7.15.6 (wgmma.mma_async.sp).
//
// d[4i .. 4i + 3] of lane 4g + q of warp w: tokens 8i + 2q, 8i + 2q + 1 of row 16w + g, then of row
// 16w + g + 8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace obs_kernels {

// Accumulators are operands one by one, and inline text takes no loops.
#define OBS_ACCUMULATORS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define OBS_ACCUMULATORS_32 \
  OBS_ACCUMULATORS_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define OBS_ACCUMULATORS_64                                                            \
  OBS_ACCUMULATORS_32                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OBS_ACCUMULATORS_96                                                            \
  OBS_ACCUMULATORS_64                                                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define OBS_ACCUMULATORS_128                                                                   \
  OBS_ACCUMULATORS_96                                                                          \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "   \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"
#define OBS_EIGHT(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define OBS_OPERANDS_16 OBS_EIGHT(0), OBS_EIGHT(8)
#define OBS_OPERANDS_32 OBS_OPERANDS_16, OBS_EIGHT(16), OBS_EIGHT(24)
#define OBS_OPERANDS_64 OBS_OPERANDS_32, OBS_EIGHT(32), OBS_EIGHT(40), OBS_EIGHT(48), OBS_EIGHT(56)
#define OBS_OPERANDS_96 OBS_OPERANDS_64, OBS_EIGHT(64), OBS_EIGHT(72), OBS_EIGHT(80), OBS_EIGHT(88)
#define OBS_OPERANDS_128 \
  OBS_OPERANDS_96, OBS_EIGHT(96), OBS_EIGHT(104), OBS_EIGHT(112), OBS_EIGHT(120)
// COUNT accumulators, then numbers of the operands that follow them.
#define OBS_SPARSE_PRODUCT(                                                                      \
    SHAPE, TYPES, COUNT, A, TAIL, B, META, SCALE, SELECTOR, TRANSPOSED, ...)                     \
  asm volatile(                                                                                  \
      "{\n.reg .pred sum;\nsetp.ne.b32 sum, %" #SCALE                                            \
      ", 0;\n"                                                                                   \
      "wgmma.mma_async.sp.sync.aligned." SHAPE ".f32." TYPES " {" OBS_ACCUMULATORS_##COUNT       \
      "}, " A ", %" #B ", %" #META ", %" #SELECTOR ", sum, 1, 1, " TAIL "%" #TRANSPOSED ";\n}\n" \
      : OBS_OPERANDS_##COUNT                                                                     \
      : __VA_ARGS__, "l"(b), "r"(meta), "r"(sum), "n"(kSelector), "n"(kTransposed ? 1 : 0))
// A by its descriptor (which has a transposition bit of its own), or in registers.
#define OBS_SHARED_PRODUCT(SHAPE, TYPES, COUNT, A, B, META, SCALE, SELECTOR, TRANSPOSED) \
  OBS_SPARSE_PRODUCT(                                                                    \
      SHAPE, TYPES, COUNT, "%" #A, "0, ", B, META, SCALE, SELECTOR, TRANSPOSED, "l"(a))
#define OBS_REGISTER_PRODUCT(                                                  \
    SHAPE, TYPES, COUNT, A0, A1, A2, A3, B, META, SCALE, SELECTOR, TRANSPOSED) \
  OBS_SPARSE_PRODUCT(SHAPE,                                                    \
                     TYPES,                                                    \
                     COUNT,                                                    \
                     "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}",               \
                     "",                                                       \
                     B,                                                        \
                     META,                                                     \
                     SCALE,                                                    \
                     SELECTOR,                                                 \
                     TRANSPOSED,                                               \
                     "r"(a.at[0]),                                             \
                     "r"(a.at[1]),                                             \
                     "r"(a.at[2]),                                             \
                     "r"(a.at[3]))

// d = A B, plus d if `sum` is not 0. kSelector picks the lanes whose metadata counts: 0 those with
// q < 2, 1 the others. kTransposed: B lies token after token within a column (of 64 tokens).
template <typename Element, int kTokens, int kSelector, bool kTransposed>
__device__ __forceinline__ void sparse_product(
    float (&d)[kTokens / 2], uint64_t a, uint64_t b, uint32_t meta, int sum) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  static_assert(kHalf || std::is_same_v<Element, __nv_bfloat16>, "16-bit elements");
  if constexpr (kTokens == 32) {
    if constexpr (kHalf) {
      OBS_SHARED_PRODUCT("m64n32k32", "f16.f16", 16, 16, 17, 18, 19, 20, 21);
    } else {
      OBS_SHARED_PRODUCT("m64n32k32", "bf16.bf16", 16, 16, 17, 18, 19, 20, 21);
    }
  } else if constexpr (kTokens == 64) {
    if constexpr (kHalf) {
      OBS_SHARED_PRODUCT("m64n64k32", "f16.f16", 32, 32, 33, 34, 35, 36, 37);
    } else {
      OBS_SHARED_PRODUCT("m64n64k32", "bf16.bf16", 32, 32, 33, 34, 35, 36, 37);
    }
  } else if constexpr (kTokens == 128) {
    if constexpr (kHalf) {
      OBS_SHARED_PRODUCT("m64n128k32", "f16.f16", 64, 64, 65, 66, 67, 68, 69);
    } else {
      OBS_SHARED_PRODUCT("m64n128k32", "bf16.bf16", 64, 64, 65, 66, 67, 68, 69);
    }
  } else if constexpr (kTokens == 192) {
    if constexpr (kHalf) {
      OBS_SHARED_PRODUCT("m64n192k32", "f16.f16", 96, 96, 97, 98, 99, 100, 101);
    } else {
      OBS_SHARED_PRODUCT("m64n192k32", "bf16.bf16", 96, 96, 97, 98, 99, 100, 101);
    }
  } else {
    static_assert(kTokens == 256, "32, 64, 128, 192 or 256 tokens");
    if constexpr (kHalf) {
      OBS_SHARED_PRODUCT("m64n256k32", "f16.f16", 128, 128, 129, 130, 131, 132, 133);
    } else {
      OBS_SHARED_PRODUCT("m64n256k32", "bf16.bf16", 128, 128, 129, 130, 131, 132, 133);
    }
  }
}

// The same with A in registers: lane 4g + q of warp w holds, of rows 16w + g and 16w + g + 8, the
// packed columns 2q, 2q + 1 and 2q + 8, 2q + 9: at[0] row g, at[1] row g + 8, at[2] and at[3] the
// same for the later columns. Not in the product: bench/micro shows what bringing it there costs.
struct Fragment {
  uint32_t at[4];
};

template <typename Element, int kTokens, int kSelector, bool kTransposed>
__device__ __forceinline__ void sparse_product(
    float (&d)[kTokens / 2], const Fragment& a, uint64_t b, uint32_t meta, int sum) {
  static_assert(std::is_same_v<Element, __nv_bfloat16>, "one type is measured");
  if constexpr (kTokens == 128) {
    OBS_REGISTER_PRODUCT("m64n128k32", "bf16.bf16", 64, 64, 65, 66, 67, 68, 69, 70, 71, 72);
  } else {
    static_assert(kTokens == 256, "128 or 256 tokens");
    OBS_REGISTER_PRODUCT(
        "m64n256k32", "bf16.bf16", 128, 128, 129, 130, 131, 132, 133, 134, 135, 136);
  }
}

#undef OBS_SPARSE_PRODUCT
#undef OBS_SHARED_PRODUCT
#undef OBS_REGISTER_PRODUCT
#undef OBS_EIGHT
#undef OBS_ACCUMULATORS_16
#undef OBS_OPERANDS_16
#undef OBS_ACCUMULATORS_32
#undef OBS_OPERANDS_32
#undef OBS_ACCUMULATORS_64
#undef OBS_OPERANDS_64
#undef OBS_ACCUMULATORS_96
#undef OBS_OPERANDS_96
#undef OBS_ACCUMULATORS_128
#undef OBS_OPERANDS_128

}  // namespace obs_kernels
