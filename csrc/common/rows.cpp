#include "common/rows.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <map>

namespace fastmtl {
namespace {

// strides of the dimensions that matter: a dimension of size 1 is never stepped along
bool same_strides(const Tensor& a, const Tensor& b) {
  auto size = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t d = 0; d < size.size(); ++d)
    if (size[d] > 1 && x[d] != y[d]) return false;
  return true;
}

// every element once, without gaps, in some order of the dimensions
bool is_dense(const Tensor& x) {
  auto size = x.sizes(), stride = x.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t d = 0; d < size.size(); ++d)
    if (size[d] > 1) dims.emplace_back(stride[d], size[d]);
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (auto [s, n] : dims) {
    if (s != expected) return false;
    expected *= n;
  }
  return true;
}

// the stride of a tensor with one dimension of size > 1, else -1
int64_t single_stride(const Tensor& x) {
  auto size = x.sizes(), stride = x.strides();
  int64_t found = 1;
  int dims = 0;
  for (size_t d = 0; d < size.size(); ++d)
    if (size[d] > 1) {
      found = stride[d];
      ++dims;
    }
  return dims <= 1 ? found : -1;
}

Rows read_bank(const Tensor& bank, int64_t num_tasks, const std::vector<Tensor>& out, Out kind) {
  STD_TORCH_CHECK(bank.dim() == 2 && bank.size(0) == num_tasks && out.size() <= 1, "fastmtl: expected a bank of ",
                  num_tasks, " rows and one output");
  Rows result;
  result.num_tasks = static_cast<int>(num_tasks);
  Param p;
  p.numel = bank.size(1);
  p.dtype = dtype_of(bank);
  if (p.numel == 0) return result;
  const DType out_dtype = kind == Out::kWide ? wide(p.dtype) : p.dtype;
  const char* data = static_cast<const char*>(bank.const_data_ptr());
  const int64_t stride = p.numel > 1 ? bank.stride(1) : 1;
  for (int t = 0; t < num_tasks; ++t) p.rows.push_back({data + t * bank.stride(0) * size_of(p.dtype), stride, t});
  for (const Tensor& x : out) {
    const int64_t last = x.dim() - 1;
    STD_TORCH_CHECK((last == 0 || last == 1) && x.size(last) == p.numel && dtype_of(x) == out_dtype &&
                        (p.numel == 1 || x.stride(last) == 1),
                    "fastmtl: the output does not match the bank");
    char* first = static_cast<char*>(x.mutable_data_ptr());
    for (int64_t k = 0; k < (last == 0 ? 1 : x.size(0)); ++k)
      p.out.push_back(first + (last == 0 ? 0 : k * x.stride(0) * size_of(out_dtype)));
  }
  result.params.push_back(std::move(p));
  return result;
}

}  // namespace

DType dtype_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, "fastmtl: expected float64, float32, bfloat16 or float16 tensors");
  return DType::f32;
}

Rows read_rows(const std::vector<Tensor>& tensors, const std::vector<int64_t>& index, int64_t num_tasks,
               int64_t num_params, const std::vector<Tensor>& out, Out kind) {
  STD_TORCH_CHECK(num_tasks >= 1 && num_tasks <= kMaxTasks, "fastmtl: expected 1 to 128 tasks, got ", num_tasks);
  if (index.empty() && tensors.size() == 1) return read_bank(tensors[0], num_tasks, out, kind);
  STD_TORCH_CHECK(tensors.size() == index.size(), "fastmtl: ", tensors.size(), " tensors, ", index.size(),
                  " positions");
  std::map<int64_t, std::vector<std::pair<int, const Tensor*>>> present;  // parameter -> (task, tensor)
  for (size_t k = 0; k < index.size(); ++k) {
    STD_TORCH_CHECK(index[k] >= 0 && index[k] < num_tasks * num_params && (k == 0 || index[k] > index[k - 1]),
                    "fastmtl: positions must increase within ", num_tasks, " x ", num_params, ", got ", index[k]);
    present[index[k] % num_params].emplace_back(static_cast<int>(index[k] / num_params), &tensors[k]);
  }
  const size_t n = present.size();
  STD_TORCH_CHECK(out.empty() || (n != 0 && out.size() % n == 0), "fastmtl: ", out.size(), " outputs for ", n,
                  " parameters");

  Rows result;
  result.params.reserve(n);
  result.num_tasks = static_cast<int>(num_tasks);
  size_t i = 0;
  for (auto& [position, members] : present) {
    const Tensor& first = *members.front().second;
    if (first.numel() == 0) {  // nothing to read, and its strides mean nothing
      ++i;
      continue;
    }
    Tensor like = !out.empty() ? out[i] : is_dense(first) ? first : torch::stable::empty_like(first);
    Param p;
    p.numel = first.numel();
    p.dtype = dtype_of(first);
    p.position = position;
    const DType out_dtype = kind == Out::kWide ? wide(p.dtype) : p.dtype;
    for (size_t k = i; k < out.size(); k += n) {
      STD_TORCH_CHECK(
          out[k].numel() == p.numel && dtype_of(out[k]) == out_dtype && is_dense(out[k]) && same_strides(out[k], like),
          "fastmtl: output ", k, " does not match its parameter");
      p.out.push_back(out[k].mutable_data_ptr());
    }
    const bool plain = like.is_contiguous();
    p.rows.reserve(members.size());
    for (auto& [task, tensor] : members) {
      STD_TORCH_CHECK(tensor->numel() == p.numel && dtype_of(*tensor) == p.dtype, "fastmtl: task ", task,
                      ", parameter ", position, " differs in shape or dtype");
      if (plain && tensor->is_contiguous()) {
        p.rows.push_back({tensor->const_data_ptr(), 1, task});
        continue;
      }
      const int64_t stride = single_stride(*tensor);
      if (stride >= 0) {
        p.rows.push_back({tensor->const_data_ptr(), stride, task});
      } else if (same_strides(*tensor, like)) {
        p.rows.push_back({tensor->const_data_ptr(), 1, task});
      } else {
        STD_TORCH_CHECK(dtype_of(like) == p.dtype, "fastmtl: task ", task, ", parameter ", position,
                        " has another memory order than its output");
        Tensor copy = torch::stable::empty_like(like);
        torch::stable::copy_(copy, *tensor);
        p.rows.push_back({copy.const_data_ptr(), 1, task});
        result.copies.push_back(copy);
      }
    }
    result.params.push_back(std::move(p));
    ++i;
  }
  return result;
}

}  // namespace fastmtl
