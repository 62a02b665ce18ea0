// `triplet_loss.semi_hard`: the losses of all semi-hard triplets, added up or averaged, as one node of
// autograd on the CPU, which makes its gradients in the forward. ssl_kernels/losses/_semi_hard.py has each
// anchor's loss, and other devices and backends, by torch's operators.
//
//   For each pair i != p of one label, n is the nearest row of another label with d_in > d_ip, or where there
//   is none, the farthest:  loss = max(0, d_ip - d_in + margin) or softplus(d_ip - d_in),
//   d_ij = |x^_i - x^_j|, or 1 - <x^_i, x^_j> for "cosine".
//   c_ik adds up the slopes of anchor i's losses by d_ik. With w = c_ik / d_ik, 0 where d_ik is 0:
//   dx^_i += w (x^_i - x^_k),  dx^_k -= the same;   cosine: dx^_i -= c_ik x^_k,  dx^_k -= c_ik x^_i
// Tiling: the distances of a block of rows to all, by one product. A pair takes one pass over its row of
//   distances, kept as integers of the same order, so that compilers make vectors of it: sorting the row
//   would take as long as hundreds of passes.
// Work: 2 N N D for the products, N for each pair, at most 8 D for its gradient.
// Memory: the rows in acc_t and in double, kPairsPerBlock distances, at most two numbers for each of their
//   pairs of one label.
// Numerics: squares of float32 distances from products in double, which lose nothing of them; nearer than
//   that rows are equal, as far as float32 tells them apart. Distances are rounded to acc_t before they are
//   compared, so equal ones are equal. The gradient is added up in the order of the rows, threads sharing its
//   columns, so that it is the same bit for bit with any number of them.
#include <ATen/Parallel.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string_view>
#include <vector>

#include "rows.h"
#include "triplet.h"

namespace ssl_kernels::cpu {
namespace {

constexpr int64_t kPairsPerBlock = 1 << 18;  // 2 MB in double

struct Options {
  bool soft, normalize, cosine, mean;
};

// Numbers as integers in the same order, NaN the last of them.
template <class T>
struct Key {
  using type = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  static constexpr type kNone = std::numeric_limits<type>::max();

  static type of(T value) {
    if (value != value) value = std::numeric_limits<T>::quiet_NaN();
    type bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits ^ ((bits >> (8 * sizeof(type) - 1)) & kNone);
  }
};

// The rows of each label.
class Groups {
 public:
  explicit Groups(const Tensor& labels) : rows_(labels.numel()), of_(labels.numel()) {
    const Tensor contiguous = labels.contiguous();
    const int64_t* label = contiguous.const_data_ptr<int64_t>();
    const int64_t n = labels.numel();
    std::iota(rows_.begin(), rows_.end(), 0);
    std::stable_sort(rows_.begin(), rows_.end(), [&](int64_t a, int64_t b) { return label[a] < label[b]; });
    for (int64_t begin = 0, end; begin < n; begin = end) {
      for (end = begin + 1; end < n && label[rows_[end]] == label[rows_[begin]];) ++end;
      for (int64_t k = begin; k < end; ++k) of_[rows_[k]] = {begin, end};
      triplets_ += (end - begin) * (end - begin - 1);
    }
  }
  struct Range {
    const int64_t *first, *last;
    const int64_t* begin() const { return first; }
    const int64_t* end() const { return last; }
    int64_t size() const { return last - first; }
  };
  // The row itself among them.
  Range of(int64_t row) const { return {&rows_[0] + of_[row].begin, &rows_[0] + of_[row].end}; }
  // Pairs of one label; where there is no other, their losses are 0.
  int64_t triplets() const { return triplets_; }

 private:
  struct Bounds {
    int64_t begin, end;
  };
  std::vector<int64_t> rows_;
  std::vector<Bounds> of_;
  int64_t triplets_ = 0;
};

// c_ik, over d_ik but for the cosine.
struct Pull {
  int64_t row;
  double weight;
};

// Triplets of one anchor after the other, of a thread.
template <class acc_t>
class Miner {
 public:
  using key_t = typename Key<acc_t>::type;

  Miner(const Groups& groups, int64_t n, double margin, const Options& options)
      : groups_(groups), margin_(margin), options_(options), keys_(n), coefficients_(n) {}

  // The sum of the losses of row i, with that of the slopes in `slopes`, and what pulls at it.
  double mine(int64_t i, const double* distances, std::vector<Pull>& pulls, double& slopes) {
    const auto distance = [&](int64_t j) { return static_cast<acc_t>(distances[j]); };
    const int64_t n = static_cast<int64_t>(keys_.size());
    const auto own = groups_.of(i);
    pulls.clear();
    slopes = 0;
    if (own.size() == 1 || own.size() == n) return 0;
    for (int64_t j = 0; j < n; ++j) keys_[j] = Key<acc_t>::of(distance(j));
    for (const int64_t j : own) keys_[j] = Key<acc_t>::kNone;
    touched_.clear();
    double sum = 0;
    for (const int64_t p : own) {
      if (p == i) continue;
      const int64_t q = negative(Key<acc_t>::of(distance(p)));
      const double gap = static_cast<double>(distance(p)) - distance(q);
      const auto [loss, slope] = loss_of_gap(gap, margin_, options_.soft);
      sum += loss;
      if (slope == 0) continue;
      slopes += slope;
      touched_.push_back(p);
      coefficients_[p] = slope;
      if (coefficients_[q] == 0) touched_.push_back(q);
      coefficients_[q] -= slope;
    }
    for (const int64_t k : touched_) {
      const double d = options_.cosine ? 1 : distance(k), c = coefficients_[k];
      coefficients_[k] = 0;
      if (d != 0) pulls.push_back({k, c / d});
    }
    return sum;
  }

 private:
  // The first row of another label with the least key above `bound`, or else the last with the greatest key:
  // the order of a stable sort.
  int64_t negative(key_t bound) const {
    const int64_t n = static_cast<int64_t>(keys_.size());
    const key_t* keys = keys_.data();
    constexpr key_t none = Key<acc_t>::kNone;
    key_t best = none;
    for (int64_t j = 0; j < n; ++j) {
      const key_t key = keys[j] > bound ? keys[j] : none;
      best = key < best ? key : best;
    }
    if (best == none) {
      best = std::numeric_limits<key_t>::min();
      for (int64_t j = 0; j < n; ++j) {
        const key_t key = keys[j] == none ? std::numeric_limits<key_t>::min() : keys[j];
        best = key > best ? key : best;
      }
      int64_t last = n - 1;
      while (keys[last] != best) --last;
      return last;
    }
    return std::find(keys, keys + n, best) - keys;
  }

  const Groups& groups_;
  double margin_;
  Options options_;
  std::vector<key_t> keys_;
  std::vector<double> coefficients_;
  std::vector<int64_t> touched_;
};

// Distances of all rows.
template <class acc_t>
class Distances {
 public:
  Distances(const Rows& rows, bool cosine)
      : rows_(rows.values), cosine_(cosine), wide_(rows.values.to(at::kDouble)), squares_(rows_.size(0)) {
    const int64_t d = rows_.size(1);
    const double* x = wide_.template const_data_ptr<double>();
    for (size_t i = 0; i < squares_.size(); ++i)
      squares_[i] = tile_math<double>().dot(x + i * d, x + i * d, d);
  }

  // Of rows begin .. begin + count - 1 to all, (count, N) float64.
  Tensor of(int64_t begin, int64_t count) const {
    const int64_t n = rows_.size(0), d = rows_.size(1);
    const bool by_differences = std::is_same_v<acc_t, double> && !cosine_;
    const Tensor found = by_differences ? pooled({count, n}, wide_.options())
                                        : at::mm(wide_.narrow(0, begin, count), wide_.t());
    double* const out = found.mutable_data_ptr<double>();
    const acc_t* x = rows_.template const_data_ptr<acc_t>();
    at::parallel_for(0, count, rows_per_task(by_differences ? n * d : n), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const double own = squares_[begin + i];
        double* const to = out + i * n;
        if (by_differences)
          for (int64_t j = 0; j < n; ++j)
            to[j] = tile_math<acc_t>().difference_sums(x + (begin + i) * d, x + j * d, d).squares;
        else if (cosine_)
          for (int64_t j = 0; j < n; ++j) to[j] = 1 - to[j];
        else
          for (int64_t j = 0; j < n; ++j) {
            const double both = own + squares_[j], apart = both - 2 * to[j];
            to[j] = apart < 1e-14 * both ? 0 : apart;
          }
      }
    });
    return cosine_ ? found : found.sqrt_();
  }

 private:
  Tensor rows_;
  bool cosine_;
  Tensor wide_;
  std::vector<double> squares_;
};

struct Made {
  double loss, by_margin;
  Tensor by_rows;  // in acc_t, undefined where it is not needed
};

// Adds what pulls at rows begin .. to columns from .. to of the gradient.
template <class acc_t>
void add_pulls(const std::vector<std::vector<Pull>>& pulls, int64_t begin, int64_t count, const acc_t* x,
               acc_t* out, int64_t d, int64_t from, int64_t to, bool cosine) {
  const auto& math = tile_math<acc_t>();
  const int64_t width = to - from;
  std::vector<acc_t> apart(width);
  for (int64_t i = begin; i < begin + count; ++i) {
    const acc_t* own = x + i * d + from;
    for (const Pull& pull : pulls[i - begin]) {
      const acc_t *other = x + pull.row * d + from, weight = static_cast<acc_t>(pull.weight);
      acc_t *by_own = out + i * d + from, *by_other = out + pull.row * d + from;
      if (cosine) {
        math.add_scaled(by_own, other, -weight, width);
        math.add_scaled(by_other, own, -weight, width);
        continue;
      }
      std::copy_n(own, width, apart.data());
      math.add_scaled(apart.data(), other, acc_t(-1), width);
      math.add_scaled(by_own, apart.data(), weight, width);
      math.add_scaled(by_other, apart.data(), -weight, width);
    }
  }
}

template <class scalar_t, class acc_t>
Made mine(const Tensor& embeddings, const Tensor& labels, double margin, const Options& options,
          bool differentiate) {
  const Rows rows = load_rows<scalar_t, acc_t>(embeddings, options.normalize);
  const int64_t n = embeddings.size(0), d = embeddings.size(1);
  const int64_t block = std::clamp<int64_t>(kPairsPerBlock / n, 1, n);
  const Groups groups(labels);
  const Distances<acc_t> distances(rows, options.cosine);
  const acc_t* const x = rows.values.const_data_ptr<acc_t>();
  std::vector<std::vector<Pull>> pulls(block);
  std::vector<double> losses(n), slopes(n);
  Made made{0, 0, {}};
  acc_t* out = nullptr;
  if (differentiate) {
    made.by_rows = pooled({n, d}, rows.values.options());
    out = made.by_rows.mutable_data_ptr<acc_t>();
    std::fill_n(out, n * d, acc_t(0));
  }
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t count = std::min(block, n - begin);
    const Tensor of_block = distances.of(begin, count);
    const double* distance = of_block.const_data_ptr<double>();
    at::parallel_for(0, count, rows_per_task(n), [&](int64_t first, int64_t last) {
      Miner<acc_t> miner(groups, n, margin, options);
      for (int64_t i = first; i < last; ++i)
        losses[begin + i] = miner.mine(begin + i, distance + i * n, pulls[i], slopes[begin + i]);
    });
    if (out)
      at::parallel_for(0, d, rows_per_task(2 * count), [&](int64_t from, int64_t to) {
        add_pulls(pulls, begin, count, x, out, d, from, to, options.cosine);
      });
  }
  const double share = options.mean ? 1. / std::max<int64_t>(groups.triplets(), 1) : 1;
  made.loss = share * std::accumulate(losses.begin(), losses.end(), 0.);
  made.by_margin = share * std::accumulate(slopes.begin(), slopes.end(), 0.);
  if (out) finish_gradient<acc_t, acc_t>(made.by_rows, rows, share, rows.values.options());
  return made;
}

struct SemiHard : Node<SemiHard> {
  static Made run(const Tensor& embeddings, const Tensor& labels, const Tensor& margin,
                  const Options& options, bool differentiate) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const double by = margin.item<double>();
    return SSL_KERNELS_DISPATCH(embeddings.scalar_type(), "triplet_loss", [&] {
      return mine<scalar_t, acc_t>(embeddings, labels, by, options, differentiate);
    });
  }

  static Tensor forward(AutogradContext* ctx, const Tensor& embeddings, const Tensor& labels,
                        const Tensor& margin, const Options& options) {
    const Made made = run(embeddings, labels, margin, options, embeddings.requires_grad());
    ctx->save_for_backward(savable({embeddings, margin, made.by_rows}));
    ctx->saved_data["by_margin"] = options.soft ? 0 : made.by_margin;
    return number(made.loss, accumulation_type(embeddings));
  }

  static variable_list differentiate(AutogradContext* ctx, const variable_list& grads) {
    const variable_list kept = ctx->get_saved_variables();
    const Tensor &embeddings = kept[0], &margin = kept[1], &made = kept[2];
    variable_list by_input(4);
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const double grad = grads[0].item<double>();
      if (made.defined()) by_input[0] = made_weighted(made, grad).to(embeddings.scalar_type());
      if (ctx->needs_input_grad(2))
        by_input[2] = at::scalar_tensor(ctx->saved_data["by_margin"].toDouble() * grad, margin.options());
    }
    return without_second_derivative("triplet_loss", by_input, {grads[0], embeddings, margin});
  }
};

Tensor semi_hard(const Tensor& embeddings, const Tensor& labels, const Tensor& margin, bool soft,
                 bool normalize, std::string_view distance, std::string_view reduction) {
  check_triplets_readable(embeddings, {&labels}, margin);
  TORCH_CHECK(embeddings.dim() == 2 && embeddings.numel() > 0 && labels.dim() == 1 &&
                  labels.size(0) == embeddings.size(0) && labels.scalar_type() == at::kLong,
              "triplet_loss: embeddings must have shape (N, D), labels (N,), int64");
  TORCH_CHECK(reduction == "mean" || reduction == "sum", "triplet_loss: unknown reduction ", reduction);
  const Options options{soft, normalize, distance == "cosine", reduction == "mean"};
  if (!at::GradMode::is_enabled() || !(embeddings.requires_grad() || margin.requires_grad()))
    return number(SemiHard::run(embeddings, labels, margin, options, false).loss,
                  accumulation_type(embeddings));
  refuse_torch_func("triplet_loss");
  return SemiHard::apply(embeddings, labels, margin, options);
}

TORCH_LIBRARY_FRAGMENT(ssl_kernels, library) {
  // labels: (N,) int64. margin: () of any floating dtype, not read where the loss is soft.
  library.def(
      "triplet_loss.semi_hard(Tensor embeddings, Tensor labels, Tensor margin, bool soft, bool normalize,"
      " str distance, str reduction) -> Tensor",
      &semi_hard);
}

}  // namespace
}  // namespace ssl_kernels::cpu
