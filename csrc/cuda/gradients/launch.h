// Launches of the kernels: one translation unit per dtype, kernels_<dtype>.cu, kernels_solve.cu,
// kernels_gradvac.cu and kernels_methods.cu.
#pragma once

#include "cuda/gradients/combine.cuh"
#include "cuda/gradients/finish.cuh"
#include "cuda/gradients/gradvac.cuh"
#include "cuda/gradients/method_weights.cuh"

namespace fastmtl::cuda {

// slots: of this launch
template <class In>
void launch_gram(const GramParams& p, int slots, cudaStream_t stream);
// early: see launch_early; the launch in front is a Gram kernel, and gradients and table are older
template <class In>
void launch_combine(const CombineParams& p, const CombineCut& cut, bool early, cudaStream_t stream);
// PCGrad's coefficients of a float64 Gram matrix; more: `more_words(num_tasks)` float64 of device memory, on 16 bytes
void launch_coefficients(const double* gram, int num_tasks, double* more, const Solve& solve, cudaStream_t stream);
void launch_gradvac(const GradVacParams& p, cudaStream_t stream);
void launch_method_weights(const MethodParams& p, cudaStream_t stream);

}  // namespace fastmtl::cuda
