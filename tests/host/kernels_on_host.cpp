// Runs the CUDA kernels' bodies on the host, for tests/helpers/host_kernels.py: plain C functions on pointers.
#include <cstdlib>
#include <exception>
#include <string>

#include "cuda/gradients/group_parts.h"
#include "cuda/table.cuh"

using namespace fastmtl;
using namespace fastmtl::cuda;

namespace {

thread_local std::string error;

// bytes of all bits set, and a margin that must stay so
class Guarded {
 public:
  Guarded(int64_t bytes, int fill) : bytes_(bytes), memory_(new unsigned char[bytes + kMargin]) {
    std::memset(memory_.get(), fill, bytes);
    std::memset(memory_.get() + bytes, 0xFF, kMargin);
  }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(memory_.get());
  }
  void check(const char* what) const {
    for (int64_t k = 0; k < kMargin; ++k)
      if (memory_[bytes_ + k] != 0xFF) throw std::runtime_error(std::string("written beyond ") + what);
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kMargin = 0;  // the sanitizer's own
#else
  static constexpr int64_t kMargin = 256;
#endif
  int64_t bytes_;
  std::unique_ptr<unsigned char[]> memory_;
};

template <class Run>
int guarded(const Run& run) {
  try {
    run();
    return 0;
  } catch (const std::exception& e) {
    error = e.what();
    return 1;
  }
}

constexpr int64_t kTickets = 256;

}  // namespace

extern "C" {

// Gradients as csrc/common/params.h has them. row and stride are [n, T], a row of 0 is absent; out is [n, K].
struct HostRows {
  int64_t num_tasks, num_params, num_out;
  int64_t is_bank;
  const int64_t* numel;
  const int64_t* dtype;
  const int64_t* row;
  const int64_t* stride;
  const int64_t* out;
};

// How it is run: 0: as plan.h says. schedule: see cuda_on_host.h.
struct HostCut {
  int64_t columns_per_slot, slots_per_group;
  uint64_t schedule;
  // what came of it
  int64_t launches, slots, groups;
};

struct HostSolve {
  int64_t project, include_self, mean;
  const int64_t* order;  // null: drawn
  int64_t num_visits;
  uint64_t key;
  int64_t* state;
  uint64_t absent[2];
  double* result;
};

const char* host_error() { return error.c_str(); }
}

namespace {

std::vector<Param> params_of(const HostRows& rows) {
  std::vector<Param> params;
  for (int64_t i = 0; i < rows.num_params; ++i) {
    if (rows.numel[i] == 0) continue;  // as read_rows does
    Param p{rows.numel[i], static_cast<DType>(rows.dtype[i])};
    p.position = i;
    for (int64_t t = 0; t < rows.num_tasks; ++t) {
      const int64_t k = i * rows.num_tasks + t;
      if (rows.row[k] != 0)
        p.rows.push_back({reinterpret_cast<const void*>(rows.row[k]), rows.stride[k], static_cast<int>(t)});
    }
    for (int64_t k = 0; k < rows.num_out; ++k) p.out.push_back(reinterpret_cast<void*>(rows.out[i * rows.num_out + k]));
    params.push_back(std::move(p));
  }
  return params;
}

std::vector<Part> read_parts(const HostRows& rows) {
  std::vector<Part> parts = parts_of(params_of(rows), static_cast<int>(rows.num_tasks), rows.is_bank != 0);
  for (Part& part : parts)
    if (!part.words.empty()) part.grads.table = part.words.data();
  return parts;
}

// the group of each of the n parameters; the parts' words in memory of their own, as a device has them
std::vector<GroupedPart> read_grouped(const HostRows& rows, const int64_t* groups, int64_t num_groups) {
  std::vector<Param> params = params_of(rows);
  sort_by_group(params, std::vector<int64_t>(groups, groups + rows.num_params), num_groups);
  return grouped_parts_of(params, static_cast<int>(rows.num_tasks), num_groups);
}

void check_zero(const unsigned* tickets, int64_t count) {
  for (int64_t k = 0; k < count; ++k)
    if (tickets[k] != 0) throw std::runtime_error("ticket " + std::to_string(k) + " is not zero");
}

Solve read_solve(const HostSolve& s) {
  Solve solve{};
  solve.wanted = true;
  solve.project = s.project != 0;
  solve.include_self = s.include_self != 0;
  solve.mean = s.mean != 0;
  solve.draw = s.order == nullptr;
  solve.order = s.order;
  solve.num_visits = s.num_visits;
  solve.key = s.key;
  solve.state = s.state;
  solve.absent[0] = s.absent[0];
  solve.absent[1] = s.absent[1];
  solve.result = s.result;
  return solve;
}

}  // namespace

extern "C" {

// The Gram matrix [T, T] into `gram` (null: not wanted), then, unless solve is null, PCGrad on it.
int host_gram(const HostRows* rows, HostCut* cut, const HostSolve* solve, void* gram, int64_t gram_is_double) {
  return guarded([&] {
    cuda_on_host::schedule = cut->schedule;
    const std::vector<Part> parts = read_parts(*rows);
    std::vector<Slots> slots;
    int64_t total = 0;
    for (const Part& part : parts) {
      Slots s = gram_slots(part.grads.columns, part.grads.num_tasks);
      if (cut->columns_per_slot != 0)
        s = {cut->columns_per_slot, std::max<int64_t>(ceil_div(part.grads.columns, cut->columns_per_slot), 1)};
      slots.push_back(s);
      total += s.count;
    }
    const int per_group = cut->slots_per_group != 0 ? static_cast<int>(cut->slots_per_group)
                                                    : slots_per_group(parts[0].grads.num_tasks, total);
    GramPlan plan = plan_gram(parts, slots, per_group);
    Guarded memory(8 * plan.words, 0xFF), tickets(kTickets * sizeof(unsigned), 0);
    if (plan.params.num_groups >= kTickets) throw std::runtime_error("more groups than tickets");
    plan.use_memory(memory.as<double>());
    plan.params.tickets = tickets.as<unsigned>();
    plan.params.gram = gram;
    plan.params.gram_is_double = gram_is_double != 0;
    if (solve != nullptr) plan.params.solve = read_solve(*solve);
    for_each_launch(plan, parts, [&](DType dtype, const GramParams& p, int count) {
      launch_gram(dtype, p, count, nullptr);
      ++cut->launches;
    });
    cut->slots = plan.params.num_slots;
    cut->groups = plan.params.num_groups;
    memory.check("the workspace");
    tickets.check("the tickets");
    check_zero(tickets.as<unsigned>(), kTickets);
  });
}

// The Gram matrices [L, T, T] of groups of parameters.
int host_gram_groups(const HostRows* rows, const int64_t* groups, int64_t num_groups, HostCut* cut, void* gram,
                     int64_t gram_is_double) {
  return guarded([&] {
    cuda_on_host::schedule = cut->schedule;
    std::vector<GroupedPart> parts = read_grouped(*rows, groups, num_groups);
    const GramGroupsPlan plan = plan_gram_groups(parts, cut->columns_per_slot, static_cast<int>(cut->slots_per_group));
    Guarded memory(8 * plan.words(), 0xFF), tickets(plan.num_tickets * sizeof(unsigned), 0);
    for (GroupedPart& it : parts) {
      if (it.num_slots == 0) continue;
      it.use_table(it.part.words.data());
      GramGroupsParams p = plan.params(it, memory.as<double>(), tickets.as<unsigned>());
      p.gram = gram;
      p.gram_is_double = gram_is_double != 0;
      launch_gram_groups(it.part.dtype, p, it.num_slots, nullptr);
      ++cut->launches;
    }
    cut->slots = plan.num_slots;
    cut->groups = plan.num_tickets;
    memory.check("the workspace");
    tickets.check("the tickets");
    check_zero(tickets.as<unsigned>(), plan.num_tickets);
  });
}

// weights [L, T]
int host_combine_groups(const HostRows* rows, const int64_t* groups, int64_t num_groups, HostCut* cut,
                        const double* weights) {
  return guarded([&] {
    cuda_on_host::schedule = cut->schedule;
    std::vector<GroupedPart> parts = read_grouped(*rows, groups, num_groups);
    plan_combine_groups(parts, cut->columns_per_slot);
    for (GroupedPart& it : parts) {
      if (it.num_slots == 0) continue;
      it.use_table(it.part.words.data());
      launch_combine_groups(it.part.dtype, {it.part.grads, it.cut, weights}, it.num_slots, nullptr);
      ++cut->launches;
      cut->slots += it.num_slots;
    }
  });
}

// PCGrad's weights [L, T], into what `solve` says, of L Gram matrices [L, T, T]
int host_pcgrad_weights(const double* gram, int64_t num_groups, int64_t num_tasks, const HostSolve* solve,
                        uint64_t schedule) {
  return guarded([&] {
    cuda_on_host::schedule = schedule;
    const int T = static_cast<int>(num_tasks);
    Guarded memory(8 * num_groups * order_at(T), 0xFF), ticket(sizeof(unsigned), 0);
    const Solve s = read_solve(*solve);
    unsigned* taken = s.draw && s.state != nullptr ? ticket.as<unsigned>() : nullptr;
    launch_pcgrad_weights({s, gram, T, T > 16 ? memory.as<double>() : nullptr, taken}, static_cast<int>(num_groups),
                          nullptr);
    memory.check("the workspace");
    ticket.check("the ticket");
    check_zero(ticket.as<unsigned>(), 1);
  });
}

// what plan.h makes of so many counted columns: a slot's, their number, slots to a group
void host_plan(int64_t columns, int64_t num_tasks, int64_t* result) {
  const Slots s = gram_slots(columns, static_cast<int>(num_tasks));
  result[0] = s.columns;
  result[1] = s.count;
  result[2] = slots_per_group(static_cast<int>(num_tasks), s.count);
}

// weights [K, T]; split: whether the threads share the tasks, if columns are given
int host_combine(const HostRows* rows, HostCut* cut, const double* weights, int64_t split) {
  return guarded([&] {
    cuda_on_host::schedule = cut->schedule;
    for (const Part& part : read_parts(*rows)) {
      if (part.grads.columns == 0 || part.grads.num_out == 0) continue;
      CombineCut it = combine_cut(part.grads.columns, part.grads.num_tasks, part.grads.num_out);
      if (cut->columns_per_slot != 0)
        it = {{cut->columns_per_slot, ceil_div(part.grads.columns, cut->columns_per_slot)}, split != 0};
      launch_combine(part.dtype, {part.grads, it.slots.columns, weights}, it, false, nullptr);
      ++cut->launches;
      cut->slots += it.slots.count;
    }
  });
}

int host_coefficients(const double* gram, int64_t num_tasks, const HostSolve* solve, uint64_t schedule) {
  return guarded([&] {
    cuda_on_host::schedule = schedule;
    const int T = static_cast<int>(num_tasks);
    Guarded memory(8 * more_words(T), 0xFF);
    launch_coefficients(gram, T, memory.as<double>(), read_solve(*solve), nullptr);
    memory.check("the workspace");
  });
}

int host_gradvac(const double* gram, int64_t num_tasks, const int64_t* order, int64_t num_visits, const double* targets,
                 double beta, int64_t always, double rounding, double* out, double* new_targets, uint64_t schedule) {
  return guarded([&] {
    cuda_on_host::schedule = schedule;
    const int T = static_cast<int>(num_tasks);
    Guarded memory(8 * T * leading_dimension(T), 0xFF);
    GradVacParams p{};
    p.method = {beta, always != 0, rounding};
    p.gram = {gram, num_tasks, true};
    p.num_tasks = T;
    p.order.order = order;
    p.order.num_visits = num_visits;
    p.targets = targets;
    p.more = T > 64 ? memory.as<double>() : nullptr;
    p.out = out;
    p.new_targets = new_targets;
    launch_gradvac(p, nullptr);
    memory.check("the workspace");
  });
}

// gram: float32 or float64, `step` entries from row to row; order: null to draw it from key and state, [2] or null
int host_gradvac_step(const void* gram, int64_t step, int64_t is_double, int64_t num_tasks, const int64_t* order,
                      int64_t num_visits, uint64_t key, int64_t* state, const uint8_t* present, double beta,
                      int64_t always, int64_t mean, double rounding, double* targets, double* weights,
                      uint64_t schedule) {
  return guarded([&] {
    cuda_on_host::schedule = schedule;
    const int T = static_cast<int>(num_tasks);
    Guarded memory(8 * T * leading_dimension(T), 0xFF), results(16 * T * T, 0xFF);
    GradVacParams p{};
    p.method = {beta, always != 0, rounding};
    p.gram = {gram, step, is_double != 0};
    p.num_tasks = T;
    p.order.draw = order == nullptr;
    p.order.order = order;
    p.order.num_visits = num_visits;
    p.order.key = key;
    p.order.state = state;
    p.present = present;
    p.targets = p.kept = targets;
    p.more = T > 64 ? memory.as<double>() : nullptr;
    p.out = results.as<double>();
    p.new_targets = p.out + T * T;
    p.weights = weights;
    p.mean = mean != 0;
    launch_gradvac(p, nullptr);
    memory.check("the workspace");
    results.check("the coefficients");
  });
}

// gram [L, T, T] (of one with any step between rows), out [L, T];
// present, preferences, kept, counted and average: [T] or null; vectors: Pareto MTL's, [num_vectors, T], or null;
// workspace for more tasks than shared memory holds
int host_method_weights(const void* gram, int64_t step, int64_t is_double, int64_t num_groups, int64_t num_tasks,
                        int64_t method, const double* options, double rounding, const uint8_t* present,
                        const double* preferences, const double* per_task, const void* also, double* kept,
                        double* counted, double* average, const double* vectors, double* out, int64_t num_vectors,
                        double momentum, uint64_t schedule) {
  return guarded([&] {
    cuda_on_host::schedule = schedule;
    const int T = static_cast<int>(num_tasks);
    solvers::Request request{
        static_cast<solvers::Kind>(method), {options[0], options[1], options[2], options[3]}, rounding, per_task};
    request.also = {also, step, is_double != 0};
    request.average = average;
    request.momentum = momentum;
    if (vectors != nullptr)
      request.pareto = {
          vectors, static_cast<int>(num_vectors), static_cast<int>(options[0]), per_task, options[1], kept, counted};
    else request.kept = kept, request.counted = counted;
    const int blocks = method_blocks(request.kind, T);
    const int64_t all = num_groups * blocks;
    const int64_t each = block_scratch(request.rows(T));
    Guarded memory(8 * all * (each + T), 0xFF), tickets(num_groups * sizeof(unsigned), 0);
    double* scratch = memory.as<double>();
    launch_method_weights({request,
                           {gram, step, is_double != 0},
                           T,
                           present,
                           preferences,
                           scratch,
                           scratch + all * each,
                           tickets.as<unsigned>(),
                           out,
                           static_cast<int>(num_groups)},
                          nullptr);
    tickets.check("the tickets");
    check_zero(tickets.as<unsigned>(), num_groups);
    memory.check("the workspace");
  });
}

// words [count] into table, which has one more that must stay as it is; *launches: how many it took
int host_table(const int64_t* words, int64_t count, int64_t large, int64_t* table, int64_t* launches) {
  return guarded([&] {
    cuda_on_host::schedule = 0;
    *launches = 0;
    write_table(table, std::vector<int64_t>(words, words + count), large != 0, nullptr, [&] { ++*launches; });
  });
}

// --- for the tests of the header itself

// x as float64 -> the 16-bit number next to it (half != 0: float16), and back
void host_to_16_bits(const float* x, uint16_t* y, int64_t count, int64_t half) {
  for (int64_t k = 0; k < count; ++k) y[k] = half != 0 ? __float2half_rn(x[k]).bits : __float2bfloat16_rn(x[k]).bits;
}
void host_from_16_bits(const uint16_t* x, float* y, int64_t count, int64_t half) {
  for (int64_t k = 0; k < count; ++k) y[k] = half != 0 ? __half2float({x[k]}) : __bfloat162float({x[k]});
}
void host_to_tf32(const float* x, float* y, int64_t count) {
  for (int64_t k = 0; k < count; ++k)
    y[k] = cuda_on_host::bits_as<float>(to_tf32(cuda_on_host::bits_as<uint32_t>(x[k])));
}

// Small kernels that do one thing wrong each; 0 does none. The result: the sum over a block's 64 threads of their
// numbers, by way of shared memory, or -1.
int host_faulty(int64_t fault, uint64_t schedule, double* result) {
  return guarded([&] {
    cuda_on_host::schedule = schedule;
    *result = -1.0;
    struct Shared {
      double values[64];
      alignas(16) double copied[2 * 64];
    };
    alignas(16) double given[2 * 64];
    for (int k = 0; k < 64; ++k) given[2 * k] = given[2 * k + 1] = k;
    cuda_on_host::launch(1, 64, [&] {
      const int tid = static_cast<int>(threadIdx.x);
      FASTMTL_SHARED(Shared, shared);
      if (fault == 1 && tid == 5) return;  // a lane that its warp still needs
      if (fault == 2 && tid < 40) __syncthreads();
      if (fault == 3 && tid % 2 == 0) __syncwarp();
      if (fault == 10) copy_async(shared.copied + 2 * tid + 1, given + 2 * tid);
      copy_async(shared.copied + 2 * tid, given + 2 * tid);
      commit_copies();
      if (fault < 8) wait_for_copies<0>();
      if (fault != 4 || tid != 7) shared.values[tid] = shared.copied[2 * tid];  // 4: one value is not written
      if (fault == 8) wait_for_copies<0>();
      if (fault != 5) __syncthreads();
      if (fault == 6 && tid >= 32) return;  // allowed: a whole warp leaves
      if (fault == 6) __syncthreads();
      double sum = 0.0;
      for (int k = 0; k < 64; ++k) sum += shared.values[k];
      sum = __shfl_xor_sync(~0u, sum, 1);
      if (fault == 7) sum = __shfl_sync(1u, sum, 0);
      if (tid == 0) *result = sum;
    });
  });
}
}
