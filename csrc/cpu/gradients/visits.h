// PCGrad's and GradVac's visiting orders, given or random.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/order_arguments.h"
#include "common/solvers.h"

namespace fastmtl::cpu {

class Orders {
 public:
  // The state is advanced by so many calls, where the orders are drawn.
  Orders(const OrderArguments& read, int64_t calls) : read_(read), stream_(read.key), counter_(0) {
    if (!read.draws || read.state == nullptr) return;
    stream_ ^= static_cast<uint64_t>(read.state[0]);
    counter_ = static_cast<uint64_t>(read.state[1]);
    read.state[1] = static_cast<int64_t>(counter_ + static_cast<uint64_t>(calls));
  }

  int64_t num_visits() const { return read_.num_visits; }

  // That of call number k from here on; `room` is its memory where it is drawn: each row the tasks by rising random
  // number, equal ones by task.
  const int64_t* of_call(int64_t k, int T, std::vector<int64_t>& room) const {
    if (!read_.draws) return read_.visits;
    room.resize(static_cast<size_t>(T) * T);
    std::vector<std::pair<int64_t, int>> numbers(T);
    for (int i = 0; i < T; ++i) {
      const uint64_t first = (counter_ + static_cast<uint64_t>(k)) * kNumbersPerCount + i * T;
      for (int t = 0; t < T; ++t) numbers[t] = {random_number(stream_, first + t), t};
      std::sort(numbers.begin(), numbers.end());
      for (int t = 0; t < T; ++t) room[i * T + t] = numbers[t].second;
    }
    return room.data();
  }

 private:
  OrderArguments read_;
  uint64_t stream_, counter_;
};

}  // namespace fastmtl::cpu
