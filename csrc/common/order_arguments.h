// What a call reads of a visiting order from torch's tensors.
#pragma once

#include <optional>

#include "common/rows.h"

namespace fastmtl {

struct OrderArguments {
  bool draws;             // from key and state, or else as given
  const int64_t* visits;  // [T, num_visits]
  int64_t num_visits;
  uint64_t key;
  int64_t* state;  // key and counter, or null
};

inline OrderArguments read_order(const std::optional<Tensor>& order, int64_t key, const std::optional<Tensor>& state,
                                 int64_t T) {
  using torch::headeronly::ScalarType;
  OrderArguments read{!order.has_value(), nullptr, T, static_cast<uint64_t>(key), nullptr};
  if (order.has_value()) {
    STD_TORCH_CHECK(
        order->dim() == 2 && order->size(0) == T && order->is_contiguous() && order->scalar_type() == ScalarType::Long,
        "fastmtl: the order must be a contiguous [T, K] int64 tensor");
    read.visits = static_cast<const int64_t*>(order->const_data_ptr());
    read.num_visits = order->size(1);
  }
  if (state.has_value()) {
    STD_TORCH_CHECK(state->numel() == 2 && state->is_contiguous() && state->scalar_type() == ScalarType::Long,
                    "fastmtl: the state must be a contiguous [2] int64 tensor");
    read.state = static_cast<int64_t*>(state->mutable_data_ptr());
  }
  return read;
}

}  // namespace fastmtl
