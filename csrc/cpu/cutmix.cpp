// CutMix of images x (B, ..., H, W): inside box_i, x_i takes the pixels that x_p(i) had before the call.
// Tiling: a task is a band of rows of one plane of every sample (of all channels where they lie beside each
//   other, as in channels_last). In place it walks the cycles of p: box i is pasted into sample i before p(i)
//   is pasted into; the pixels of the cycle's first sample that lie in its own box and in the last one's are
//   held aside. Tasks touch disjoint pixels.
// Traffic: in place the pixels inside the boxes are read once and written once, nothing else is touched.
//   Scratch: one band per thread.
// Numerics: pixels are moved. The backward adds two gradients in acc_t and rounds once.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../ops/mixing.h"
#include "huge_pages.h"
#include "mixing_math.h"
#include "permutation.h"
#include "rows.h"

namespace ssl_kernels::cpu {
namespace {

constexpr int64_t kBandBytes = 1 << 16;

struct Box {
  int64_t y0, y1, x0, x1;

  Box within_rows(int64_t begin, int64_t end) const {
    return {std::max(y0, begin), std::min(y1, end), x0, x1};
  }
  bool empty() const { return y0 >= y1 || x0 >= x1; }
};

Box common(const Box& a, const Box& b) {
  return {std::max(a.y0, b.y0), std::min(a.y1, b.y1), std::max(a.x0, b.x0), std::min(a.x1, b.x1)};
}

std::vector<Box> checked_boxes(const char* op, const at::Tensor& boxes, int64_t height, int64_t width) {
  const int64_t* values = boxes.const_data_ptr<int64_t>();
  const int64_t row = boxes.stride(0), column = boxes.stride(1);
  std::vector<Box> result;
  for (int64_t i = 0; i < boxes.size(0); ++i) {
    const int64_t* v = values + i * row;
    const Box box{v[0], v[column], v[2 * column], v[3 * column]};
    TORCH_CHECK_VALUE(0 <= box.y0 && box.y0 <= box.y1 && box.y1 <= height && 0 <= box.x0 &&
                          box.x0 <= box.x1 && box.x1 <= width,
                      op, ": boxes must be (y0, y1, x0, x1) with 0 <= y0 <= y1 <= ", height,
                      " and 0 <= x0 <= x1 <= ", width, ", got (", box.y0, ", ", box.y1, ", ", box.x0, ", ",
                      box.x1, ") at ", i);
    result.push_back(box);
  }
  return result;
}

// Strides in bytes of the images of one tensor; `pixel` bytes of a pixel are consecutive.
struct Images {
  char* data;
  int64_t batch, row, column;
  std::vector<int64_t> planes;  // stride of each dimension that Frame counts as planes

  char* at(int64_t sample, int64_t plane_offset, int64_t y, int64_t x) const {
    return data + sample * batch + plane_offset + y * row + x * column;
  }
};

// What the images of a call have in common. Dimensions between batch and rows are planes, except that the
// innermost ones of dense channels_last images make up a pixel.
class Frame {
 public:
  Frame(std::initializer_list<const at::Tensor*> tensors) {
    const at::Tensor& first = **tensors.begin();
    const int64_t dims = first.dim();
    itemsize_ = first.element_size();
    height_ = first.size(-2);
    width_ = first.size(-1);
    int64_t channels = 1;
    for (int64_t dim = 1; dim < dims - 2; ++dim) channels *= first.size(dim);
    // Channels are a pixel if they are one dimension of stride 1 and columns follow at their number.
    const bool pixels = dims == 4 && std::all_of(tensors.begin(), tensors.end(), [&](const at::Tensor* t) {
      return t->stride(1) == 1 && t->stride(3) == channels;
    });
    pixel_ = (pixels ? channels : 1) * itemsize_;
    for (int64_t dim = 1; dim < dims - 2 && !pixels; ++dim) plane_sizes_.push_back(first.size(dim));
    planes_ = pixels ? 1 : channels;
    const int64_t bytes = height_ * width_ * pixel_;
    bands_ = std::min(height_, (bytes + kBandBytes - 1) / kBandBytes);
    for (const at::Tensor* tensor : tensors) {
      Images images{static_cast<char*>(tensor->data_ptr()), tensor->stride(0) * itemsize_,
                    tensor->stride(-2) * itemsize_, tensor->stride(-1) * itemsize_, {}};
      for (size_t dim = 0; dim < plane_sizes_.size(); ++dim)
        images.planes.push_back(tensor->stride(static_cast<int64_t>(dim) + 1) * itemsize_);
      dense_rows_ = dense_rows_ && images.column == pixel_;
      images_.push_back(std::move(images));
    }
  }

  int64_t tasks() const { return planes_ * bands_; }
  int64_t band_begin(int64_t task) const { return task % bands_ * height_ / bands_; }
  int64_t band_end(int64_t task) const { return (task % bands_ + 1) * height_ / bands_; }
  int64_t band_bytes() const { return (height_ / bands_ + 1) * width_ * pixel_; }
  int64_t pixel() const { return pixel_; }
  const Images& operator[](size_t t) const { return images_[t]; }

  int64_t plane_offset(size_t t, int64_t task) const {
    int64_t plane = task / bands_, sum = 0;
    for (size_t dim = plane_sizes_.size(); dim-- > 0; plane /= plane_sizes_[dim])
      sum += plane % plane_sizes_[dim] * images_[t].planes[dim];
    return sum;
  }

  // visit(y, x, pixels) for the runs of pixels of a box that lie together in every tensor.
  template <class Visit>
  void for_each_run(const Box& box, const Visit& visit) const {
    if (box.empty()) return;
    for (int64_t y = box.y0; y < box.y1; ++y) {
      if (dense_rows_)
        visit(y, box.x0, box.x1 - box.x0);
      else
        for (int64_t x = box.x0; x < box.x1; ++x) visit(y, x, 1);
    }
  }

 private:
  int64_t itemsize_, height_, width_, pixel_, planes_, bands_;
  std::vector<int64_t> plane_sizes_;
  std::vector<Images> images_;
  bool dense_rows_ = true;
};

void copy(char* to, const char* from, int64_t bytes) {
  switch (bytes) {
    case 1: std::memcpy(to, from, 1); return;
    case 2: std::memcpy(to, from, 2); return;
    case 4: std::memcpy(to, from, 4); return;
    case 8: std::memcpy(to, from, 8); return;
    default: std::memcpy(to, from, bytes);
  }
}

void cutmix_(const at::Tensor& x, const at::Tensor& boxes_tensor, const at::Tensor& permutation) {
  check_cutmix("cutmix_", x, boxes_tensor, permutation);
  const auto partner = checked_permutation("cutmix_", permutation);
  const auto boxes = checked_boxes("cutmix_", boxes_tensor, x.size(-2), x.size(-1));
  const Cycles cycles(partner, [&](int64_t i) { return partner[i] != i && !boxes[i].empty(); });
  const Frame frame{&x};
  const Images& images = frame[0];
  const int64_t pixel = frame.pixel();
  if (cycles.count() == 0) return;
  at::parallel_for(0, frame.tasks(), 1, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(frame.band_bytes());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = frame.plane_offset(0, task);
      const int64_t top = frame.band_begin(task), bottom = frame.band_end(task);
      const auto paste = [&](int64_t to, int64_t from, const Box& box) {
        frame.for_each_run(box, [&](int64_t y, int64_t column, int64_t pixels) {
          copy(images.at(to, plane, y, column), images.at(from, plane, y, column), pixels * pixel);
        });
      };
      for (int64_t cycle = 0; cycle < cycles.count(); ++cycle) {
        const int64_t* samples = cycles.order.data() + cycles.begin[cycle];
        const int64_t length = cycles.begin[cycle + 1] - cycles.begin[cycle];
        const int64_t first = samples[0], last = samples[length - 1];
        const Box last_box = boxes[last].within_rows(top, bottom);
        const Box overlap = common(boxes[first], last_box);
        char* held = scratch.data();
        frame.for_each_run(overlap, [&](int64_t y, int64_t column, int64_t pixels) {
          copy(held, images.at(first, plane, y, column), pixels * pixel);
          held += pixels * pixel;
        });
        for (int64_t q = 0; q < length; ++q)
          paste(samples[q], samples[(q + 1) % length], boxes[samples[q]].within_rows(top, bottom));
        held = scratch.data();
        frame.for_each_run(overlap, [&](int64_t y, int64_t column, int64_t pixels) {
          copy(images.at(last, plane, y, column), held, pixels * pixel);
          held += pixels * pixel;
        });
      }
    }
  });
}

at::Tensor cutmix_fwd(const at::Tensor& x, const at::Tensor& boxes_tensor, const at::Tensor& permutation) {
  check_cutmix("cutmix", x, boxes_tensor, permutation);
  const auto partner = checked_permutation("cutmix", permutation);
  const auto boxes = checked_boxes("cutmix", boxes_tensor, x.size(-2), x.size(-1));
  const at::Tensor out = in_huge_pages(at::empty_like(x)).copy_(x);
  const Frame frame{&out, &x};
  at::parallel_for(0, frame.tasks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t to = frame.plane_offset(0, task), from = frame.plane_offset(1, task);
      for (size_t i = 0; i < partner.size(); ++i)
        frame.for_each_run(boxes[i].within_rows(frame.band_begin(task), frame.band_end(task)),
                           [&](int64_t y, int64_t column, int64_t pixels) {
                             copy(frame[0].at(i, to, y, column), frame[1].at(partner[i], from, y, column),
                                  pixels * frame.pixel());
                           });
    }
  });
  return out;
}

at::Tensor cutmix_bwd(const at::Tensor& grad, const at::Tensor& boxes_tensor, const at::Tensor& permutation) {
  check_cutmix("cutmix", grad, boxes_tensor, permutation);
  const auto partner = checked_permutation("cutmix", permutation);
  const auto boxes = checked_boxes("cutmix", boxes_tensor, grad.size(-2), grad.size(-1));
  const at::Tensor grad_x = in_huge_pages(at::empty_like(grad)).copy_(grad);
  const Frame frame{&grad_x, &grad};
  return SSL_KERNELS_DISPATCH(grad.scalar_type(), "cutmix", [&] {
    const auto& math = mixing_math<scalar_t>();
    const int64_t pixel = frame.pixel() / sizeof(scalar_t);
    at::parallel_for(0, frame.tasks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t to = frame.plane_offset(0, task), from = frame.plane_offset(1, task);
        const int64_t top = frame.band_begin(task), bottom = frame.band_end(task);
        for (size_t i = 0; i < partner.size(); ++i) {
          if (partner[i] == static_cast<int64_t>(i)) continue;
          frame.for_each_run(boxes[i].within_rows(top, bottom),
                             [&](int64_t y, int64_t column, int64_t pixels) {
                               std::memset(frame[0].at(i, to, y, column), 0, pixels * frame.pixel());
                             });
        }
        for (size_t i = 0; i < partner.size(); ++i) {
          if (partner[i] == static_cast<int64_t>(i)) continue;
          frame.for_each_run(boxes[i].within_rows(top, bottom), [&](int64_t y, int64_t column,
                                                                    int64_t pixels) {
            math.add(reinterpret_cast<scalar_t*>(frame[0].at(partner[i], to, y, column)),
                     reinterpret_cast<const scalar_t*>(frame[1].at(i, from, y, column)), pixels * pixel);
          });
        }
      }
    });
    return grad_x;
  });
}

TORCH_LIBRARY_IMPL(ssl_kernels, CPU, library) {
  library.impl("cutmix_.native", &cutmix_);
  library.impl("cutmix_fwd.native", &cutmix_fwd);
  library.impl("cutmix_bwd.native", &cutmix_bwd);
}

}  // namespace
}  // namespace ssl_kernels::cpu
