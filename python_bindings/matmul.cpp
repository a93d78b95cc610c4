// SPDX-License-Identifier: Apache-2.0
#include "obs_kernels/matmul.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "bind.h"

namespace obs_kernels::bindings {
namespace {

py::tuple prepack(uintptr_t values,
                  uintptr_t codes,
                  uintptr_t columns,
                  uintptr_t packed,
                  int64_t rows,
                  int64_t cols,
                  int64_t v,
                  int64_t n,
                  int64_t m,
                  int device,
                  uintptr_t stream) {
  obs_kernels::PrepackParams params{};
  params.values = pointer<const void>(values);
  params.codes = pointer<const uint8_t>(codes);
  params.columns = pointer<const uint8_t>(columns);
  params.packed = pointer<void>(packed);
  params.rows = rows;
  params.cols = cols;
  params.v = v;
  params.n = n;
  params.m = m;
  return launch(obs_kernels::prepack, params, device, stream);
}

// Fields of a struct from keywords: each is named once, where it is read, must be given, and
// nothing else may be.
class Fields {
 public:
  explicit Fields(const py::kwargs& given) : given_(given) {}

  template <typename T>
  T take(const char* name) {
    if (!given_.contains(name)) throw py::type_error(std::string(name) + " is missing");
    ++taken_;
    try {
      return given_[name].cast<T>();
    } catch (const py::cast_error&) {
      throw py::type_error(std::string(name) + " is of a wrong type or too large");
    }
  }

  // Once all were taken.
  void finish() const {
    if (given_.size() != taken_) throw py::type_error("unexpected keywords among those given");
  }

 private:
  py::kwargs given_;
  size_t taken_ = 0;
};

obs_kernels::SparseLinearParams product_of(Fields& fields) {
  obs_kernels::SparseLinearParams params{};
  params.packed = pointer<const void>(fields.take<uintptr_t>("packed"));
  params.rows = fields.take<int64_t>("rows");
  params.cols = fields.take<int64_t>("cols");
  params.tokens = fields.take<int64_t>("tokens");
  params.type = static_cast<obs_kernels::MatmulType>(fields.take<int32_t>("type"));
  params.activation = static_cast<obs_kernels::Activation>(fields.take<int32_t>("activation"));
  params.feature_y = fields.take<bool>("feature_y");
  return params;
}

// The tile that was asked for or, after the first run, that the table chose; -1 before.
class KeptConfig {
 public:
  explicit KeptConfig(int asked) : config_(asked) {}
  int get() const { return config_.load(std::memory_order_relaxed); }

  // Of `count` tiles the one that was launched, by its name.
  void keep(const obs_kernels::LaunchPlan& plan, int count, const char* (*name)(int)) const {
    for (int i = 0; i < count && get() < 0; ++i) {
      if (std::strcmp(name(i), plan.path) == 0) config_.store(i, std::memory_order_relaxed);
    }
  }

 private:
  mutable std::atomic<int> config_;
};

// A product with all but the addresses that change from call to call, so that a call takes a few
// integers by position: one by keywords costs the host several times as much. `run` does not tell
// what was launched and asks the table of tiles once, a microsecond of host time together.
class SparseLinear {
 public:
  explicit SparseLinear(const py::kwargs& given) : SparseLinear(Fields(given)) {}

  py::tuple launch(uintptr_t x, uintptr_t bias, uintptr_t y, uintptr_t stream) const {
    return bindings::launch(obs_kernels::sparse_linear, of(x, bias, y), device_, stream);
  }

  void run(uintptr_t x, uintptr_t bias, uintptr_t y, uintptr_t stream) const {
    const py::gil_scoped_release unlocked;
    const auto plan =
        obs_kernels::sparse_linear(of(x, bias, y), device_, pointer<CUstream_st>(stream));
    config_.keep(plan, obs_kernels::num_sparse_tiles(), &obs_kernels::sparse_tile_name);
  }

 private:
  explicit SparseLinear(Fields fields) : config_(fields.take<int>("config")) {
    params_ = product_of(fields);
    params_.feature_x = fields.take<bool>("feature_x");
    device_ = fields.take<int>("device");
    fields.finish();
  }

  obs_kernels::SparseLinearParams of(uintptr_t x, uintptr_t bias, uintptr_t y) const {
    auto params = params_;
    params.x = pointer<const void>(x);
    params.bias = pointer<const void>(bias);
    params.y = pointer<void>(y);
    params.config = config_.get();
    return params;
  }

  obs_kernels::SparseLinearParams params_{};
  int device_ = 0;
  KeptConfig config_;
};

// The same of the product that gathers. `turned` is memory for x turned to feature-major, of
// columns `x_stride` apart; 0 if x is feature-major.
class GatherLinear {
 public:
  explicit GatherLinear(const py::kwargs& given) : GatherLinear(Fields(given)) {}

  py::tuple launch(
      uintptr_t x, uintptr_t turned, uintptr_t bias, uintptr_t y, uintptr_t stream) const {
    const auto both = [&](const auto& params, int device, cudaStream_t on) {
      turn(x, turned, on);
      return obs_kernels::gather_linear(params, device, on);
    };
    return bindings::launch(both, of(turned == 0 ? x : turned, bias, y), device_, stream);
  }

  void run(uintptr_t x, uintptr_t turned, uintptr_t bias, uintptr_t y, uintptr_t stream) const {
    const py::gil_scoped_release unlocked;
    const auto on = pointer<CUstream_st>(stream);
    turn(x, turned, on);
    const auto plan =
        obs_kernels::gather_linear(of(turned == 0 ? x : turned, bias, y), device_, on);
    config_.keep(plan, obs_kernels::num_gather_tiles(), &obs_kernels::gather_tile_name);
  }

 private:
  explicit GatherLinear(Fields fields) : config_(fields.take<int>("config")) {
    params_.product = product_of(fields);
    params_.product.feature_x = true;
    params_.columns = pointer<const uint8_t>(fields.take<uintptr_t>("columns"));
    params_.x_stride = fields.take<int64_t>("x_stride");
    params_.v = fields.take<int64_t>("v");
    params_.m = fields.take<int64_t>("m");
    device_ = fields.take<int>("device");
    fields.finish();
    transposition_.tokens = params_.product.tokens;
    transposition_.cols = (params_.product.cols / 4 * params_.m + 7) / 8 * 8;
    transposition_.out_stride = params_.x_stride;
  }

  obs_kernels::GatherLinearParams of(uintptr_t x, uintptr_t bias, uintptr_t y) const {
    auto params = params_;
    params.product.x = pointer<const void>(x);
    params.product.bias = pointer<const void>(bias);
    params.product.y = pointer<void>(y);
    params.product.config = config_.get();
    return params;
  }

  void turn(uintptr_t x, uintptr_t turned, cudaStream_t on) const {
    if (turned == 0) return;
    auto transposition = transposition_;
    transposition.x = pointer<const void>(x);
    transposition.out = pointer<void>(turned);
    obs_kernels::transpose(transposition, device_, on);
  }

  obs_kernels::GatherLinearParams params_{};
  obs_kernels::TransposeParams transposition_{};
  int device_ = 0;
  KeptConfig config_;
};

py::tuple transpose(uintptr_t x,
                    uintptr_t out,
                    int64_t tokens,
                    int64_t cols,
                    int64_t out_stride,
                    int device,
                    uintptr_t stream) {
  obs_kernels::TransposeParams params{};
  params.x = pointer<const void>(x);
  params.out = pointer<void>(out);
  params.tokens = tokens;
  params.cols = cols;
  params.out_stride = out_stride;
  return launch(obs_kernels::transpose, params, device, stream);
}

}  // namespace

void bind_matmul(py::module_& module) {
  const auto names = [](int count, const char* (*name)(int)) {
    py::list found;
    for (int i = 0; i < count; ++i) found.append(name(i));
    return py::tuple(found);
  };
  module.attr("SPARSE_TILES") =
      names(obs_kernels::num_sparse_tiles(), &obs_kernels::sparse_tile_name);
  module.attr("GATHER_TILES") =
      names(obs_kernels::num_gather_tiles(), &obs_kernels::gather_tile_name);
  module.def("prepacked_bytes",
             &obs_kernels::prepacked_bytes,
             "Bytes of a weight in the order of the product.",
             py::kw_only(),
             py::arg("rows"),
             py::arg("cols"));
  module.def("prepack",
             &prepack,
             "(op, path, blocks, threads) of the launch; see obs_kernels/matmul.h.",
             py::kw_only(),
             py::arg("values"),
             py::arg("codes"),
             py::arg("columns"),
             py::arg("packed"),
             py::arg("rows"),
             py::arg("cols"),
             py::arg("v"),
             py::arg("n"),
             py::arg("m"),
             py::arg("device"),
             py::arg("stream"));
  py::class_<SparseLinear>(
      module,
      "SparseLinear",
      "sparse_linear of obs_kernels/matmul.h, with the fields that calls have in common.")
      .def(py::init<const py::kwargs&>())
      .def("launch", &SparseLinear::launch, "(op, path, blocks, threads) of x, bias, y, stream.")
      .def("run", &SparseLinear::run, "The same launch, of which nothing is told.");
  module.def("gather_is_faster",
             &obs_kernels::gather_is_faster,
             "Whether gather_linear beats sparse_linear; see obs_kernels/matmul.h.",
             py::kw_only(),
             py::arg("rows"),
             py::arg("cols"),
             py::arg("tokens"),
             py::arg("v"),
             py::arg("m"),
             py::arg("feature_x"),
             py::arg("device"));
  module.def("product_cycles",
             &obs_kernels::product_cycles,
             "Estimated cycles of the faster of the two; see obs_kernels/matmul.h.",
             py::kw_only(),
             py::arg("rows"),
             py::arg("cols"),
             py::arg("tokens"),
             py::arg("v"),
             py::arg("m"),
             py::arg("feature_x"),
             py::arg("device"));
  module.def("transposition_cycles",
             &obs_kernels::transposition_cycles,
             "Estimated cycles of a transposition; see obs_kernels/matmul.h.",
             py::kw_only(),
             py::arg("tokens"),
             py::arg("cols"));
  py::class_<GatherLinear>(
      module,
      "GatherLinear",
      "gather_linear of the same, behind transpose if it is given memory for that.")
      .def(py::init<const py::kwargs&>())
      .def("launch",
           &GatherLinear::launch,
           "(op, path, blocks, threads) of x, turned, bias, y, stream.")
      .def("run", &GatherLinear::run, "The same launches, of which nothing is told.");
  module.def("transpose",
             &transpose,
             "(op, path, blocks, threads) of the launch; see obs_kernels/matmul.h.",
             py::kw_only(),
             py::arg("x"),
             py::arg("out"),
             py::arg("tokens"),
             py::arg("cols"),
             py::arg("out_stride"),
             py::arg("device"),
             py::arg("stream"));
}

}  // namespace obs_kernels::bindings
