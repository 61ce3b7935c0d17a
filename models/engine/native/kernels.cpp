// The operators that PyTorch lacks on a CPU: attention over slots, and linears of quantized weights.
//
// Each row of a result is computed alone, in an order that depends on nothing else. So a reply has the same bits in
// any batch, with any chunks of its prompt, and with any cached prefix.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "linears.h"
#include "packing.h"

namespace parley {

// In kernels_attention.cpp, which is compiled at the same time: it takes as long as all the rest.
at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor keys,
                     at::Tensor values, const at::Tensor& slots, const at::Tensor& positions,
                     const std::optional<at::Tensor>& sinks, double scale, double softcap, int64_t window);

}  // namespace parley

namespace {

// Quantized linears, over tensors. A weight is a flat uint8 tensor of panels.

parley::Part part_of(const at::Tensor& weight, int64_t format, int64_t columns, int64_t depth) {
  TORCH_CHECK(format >= 0 && format < parley::FORMATS, "there is no format ", format);
  TORCH_CHECK(depth > 0 && depth % parley::GROUP == 0 && columns > 0,
              "a quantized weight needs outputs, and inputs in groups of 32");
  TORCH_CHECK(weight.scalar_type() == at::kByte && weight.is_contiguous() &&
                  weight.numel() == parley::weight_size((parley::Format)format, columns, depth),
              "the weight must be contiguous uint8, and as many bytes as its outputs and ", depth, " inputs need");
  return {(parley::Format)format, columns, weight.const_data_ptr<uint8_t>()};
}

const float* numbers_of(const std::optional<at::Tensor>& tensor, int64_t count) {
  TORCH_CHECK(!tensor || (tensor->scalar_type() == at::kFloat && tensor->is_contiguous() && tensor->numel() == count),
              "the bias must be contiguous float32 of ", count);
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

void check_rows(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kFloat && x.is_contiguous(),
              "the input must be contiguous float32 of (rows, inputs)");
}

at::Tensor linear(const at::Tensor& x, at::TensorList weights, const std::optional<at::Tensor>& bias,
                  at::IntArrayRef formats, at::IntArrayRef columns) {
  check_rows(x);
  TORCH_CHECK(!weights.empty() && formats.size() == weights.size() && columns.size() == weights.size(),
              "each weight needs a format and a number of outputs");
  std::vector<parley::Part> parts;
  int64_t all = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    parts.push_back(part_of(weights[i], formats[i], columns[i], x.size(1)));
    all += columns[i];
  }
  auto out = at::empty({x.size(0), all}, x.options());
  parley::linear(x.const_data_ptr<float>(), x.size(0), x.size(1), parts, numbers_of(bias, all), out.data_ptr<float>());
  return out;
}

at::Tensor linear_of_experts(const at::Tensor& x, const at::Tensor& experts, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias, int64_t format, int64_t columns) {
  check_rows(x);
  TORCH_CHECK(experts.dim() == 2 && experts.size(0) == x.size(0) && experts.scalar_type() == at::kLong && experts.is_contiguous(),
              "the experts must be contiguous int64 of (", x.size(0), ", choices)");
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0 && weight.is_contiguous(),
              "the weights must be contiguous, (experts, bytes)");
  const auto part = part_of(weight[0], format, columns, x.size(1));
  const int64_t count = weight.size(0), choices = experts.size(1), *chosen = experts.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < experts.numel(); i++) TORCH_CHECK(chosen[i] >= 0 && chosen[i] < count, "there is no expert ", chosen[i]);
  auto out = at::empty({x.size(0), choices, columns}, x.options());
  parley::linear_of_experts(x.const_data_ptr<float>(), x.size(0), x.size(1), chosen, choices, part, count,
                            numbers_of(bias, count * columns), out.data_ptr<float>());
  return out;
}

at::Tensor unpack_rows(const at::Tensor& weight, const at::Tensor& rows, int64_t format, int64_t columns, int64_t depth) {
  const auto part = part_of(weight, format, columns, depth);
  TORCH_CHECK(rows.dim() == 1 && rows.scalar_type() == at::kLong && rows.is_contiguous(), "rows must be contiguous int64");
  const int64_t* which = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.numel(); i++)
    TORCH_CHECK(which[i] >= 0 && which[i] < columns, "row ", which[i], " is not one of ", columns);
  auto out = at::empty({rows.numel(), depth}, rows.options().dtype(at::kFloat));
  parley::unpack_rows(part, depth, which, rows.numel(), out.data_ptr<float>());
  return out;
}

std::tuple<at::Tensor, int64_t, int64_t> pack(const at::Tensor& blocks, int64_t type) {
  TORCH_CHECK(blocks.dim() == 2 && blocks.scalar_type() == at::kByte && blocks.is_contiguous(),
              "blocks must be contiguous uint8 of (outputs, bytes)");
  for (const auto& known : parley::BLOCK_TYPES)
    if (known.number == type) {
      TORCH_CHECK(blocks.size(1) % known.size == 0, "rows of ", blocks.size(1), " bytes are no blocks of ", known.size);
      const int64_t depth = blocks.size(1) / known.size * known.groups * parley::GROUP;
      auto out = at::zeros({parley::weight_size(known.format, blocks.size(0), depth)}, blocks.options());
      parley::pack(known, blocks.const_data_ptr<uint8_t>(), blocks.size(0), depth, out.data_ptr<uint8_t>());
      return {out, known.format, depth};
    }
  TORCH_CHECK(false, "blocks of type ", type, " cannot be packed");
}

at::Tensor quantize(const at::Tensor& weights, int64_t format) {
  TORCH_CHECK(weights.dim() == 2 && weights.is_contiguous() && weights.size(1) % parley::GROUP == 0,
              "the weights must be contiguous, (outputs, inputs), with inputs in groups of 32");
  TORCH_CHECK(format == parley::Q8_0 || format == parley::Q4_1, "numbers can become Q8_0 or Q4_1 only");
  const auto kind = (parley::Format)format;
  auto out = at::zeros({parley::weight_size(kind, weights.size(0), weights.size(1))}, weights.options().dtype(at::kByte));
  const auto run = [&](const auto* numbers) {
    parley::quantize(kind, numbers, weights.size(0), weights.size(1), out.data_ptr<uint8_t>());
  };
  switch (weights.scalar_type()) {
    case at::kFloat: run(weights.const_data_ptr<float>()); break;
    case at::kBFloat16: run(weights.const_data_ptr<c10::BFloat16>()); break;
    case at::kHalf: run(weights.const_data_ptr<c10::Half>()); break;
    default: TORCH_CHECK(false, "weights of ", weights.scalar_type(), " cannot be quantized");
  }
  return out;
}

}  // namespace

TORCH_LIBRARY(parley, library) {
  library.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor slots, "
      "Tensor positions, Tensor? sinks, float scale, float softcap, int window) -> Tensor");
  library.impl("attention", c10::DispatchKey::CPU, &parley::attention);
  library.def("linear(Tensor x, Tensor[] weights, Tensor? bias, int[] formats, int[] columns) -> Tensor");
  library.impl("linear", c10::DispatchKey::CPU, &linear);
  library.def(
      "linear_of_experts(Tensor x, Tensor experts, Tensor weight, Tensor? bias, int format, int columns) -> Tensor");
  library.impl("linear_of_experts", c10::DispatchKey::CPU, &linear_of_experts);
  library.def("unpack_rows(Tensor weight, Tensor rows, int format, int columns, int depth) -> Tensor");
  library.impl("unpack_rows", c10::DispatchKey::CPU, &unpack_rows);
  library.def("pack(Tensor blocks, int type) -> (Tensor, int, int)");
  library.impl("pack", c10::DispatchKey::CPU, &pack);
  library.def("quantize(Tensor weights, int format) -> Tensor");
  library.impl("quantize", c10::DispatchKey::CPU, &quantize);
}
