// Launches of the kernels: two translation units per dtype, kernels_<dtype>.cu and kernels_groups_<dtype>.cu, and
// kernels_solve.cu, kernels_gradvac.cu and kernels_methods.cu.
#pragma once

#include "cuda/gradients/combine.cuh"
#include "cuda/gradients/finish.cuh"
#include "cuda/gradients/gradvac.cuh"
#include "cuda/gradients/groups.cuh"
#include "cuda/gradients/method_weights.cuh"
#include "cuda/gradients/solve_groups.cuh"

namespace fastmtl::cuda {

// slots: of this launch
template <class In>
void launch_gram(const GramParams& p, int slots, cudaStream_t stream);
// early: see launch_early; the launch in front is a Gram kernel, and gradients and table are older
template <class In>
void launch_combine(const CombineParams& p, const CombineCut& cut, bool early, cudaStream_t stream);
// slots: of this launch
template <class In>
void launch_gram_groups(const GramGroupsParams& p, int slots, cudaStream_t stream);
template <class In>
void launch_combine_groups(const CombineGroupsParams& p, int slots, cudaStream_t stream);
// PCGrad's coefficients of a float64 Gram matrix; more: `more_words(num_tasks)` float64 of device memory, on 16 bytes
void launch_coefficients(const double* gram, int num_tasks, double* more, const Solve& solve, cudaStream_t stream);
void launch_pcgrad_weights(const SolveGroupsParams& p, int num_groups, cudaStream_t stream);
void launch_gradvac(const GradVacParams& p, cudaStream_t stream);
void launch_method_weights(const MethodParams& p, cudaStream_t stream);

}  // namespace fastmtl::cuda
