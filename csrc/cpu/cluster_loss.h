// The CPU kernel of reduced losses of views against a teacher's softmax over prototypes, of few logits.
// ssl_kernels/losses/_clusters.py says who takes it.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace ssl_kernels::cpu {

struct ClusterCall {
  std::vector<at::Tensor> views;  // V tensors (N, D) with neighbouring elements in memory
  at::Tensor prototypes;          // (K, D), of their dtype
  double scale, steepness;        // of the student's logits and of the teacher's
  std::vector<int64_t> pairs;     // a, v: view v is to have the probabilities of the teacher's view a
  bool normalize_rows, normalize_columns;
  bool less_entropy;  // whether the entropies of the teacher's probabilities are taken off

  // The teacher: views (N, T), prototypes (K, T) and a bias (K,) or none, in the accumulation dtype,
  std::vector<at::Tensor> teacher;
  at::Tensor teacher_prototypes, bias;
  // or without its views these ones of the student, and Sinkhorn's iterations.
  std::vector<int64_t> assign;
  int64_t iterations;
  bool potentials_only;  // whether Sinkhorn is never made here, as of rows that several processes have
  // (K,) of logits (N, K): `column_potentials`.
  std::function<at::Tensor(const at::Tensor&)> potentials;
};

struct ClusterResult {
  at::Tensor losses;                   // (N,) float64, before the weights
  at::Tensor grad_rows, grad_columns;  // (V * N, D) and (K, D) in the accumulation dtype, or undefined
  double grad_scale = 0;
};

// weights: (N,) float64, those of the samples in what is differentiated.
ClusterResult cluster_loss(const ClusterCall& call, const at::Tensor& weights, bool rows_need_grad,
                           bool columns_need_grad, bool scale_needs_grad);

}  // namespace ssl_kernels::cpu
