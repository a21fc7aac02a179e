// grouped_linear.cu - one matrix product per expert over sorted rows. The device code is common/grouped.h.
#include "common/grouped.h"

namespace {

Tensor grouped_linear(const Tensor& x, const Tensor& weight, const Tensor& offsets, const std::optional<Tensor>& rows,
                      const std::optional<Tensor>& scale) {
    return grouped<false>("grouped_linear", x, weight, offsets, rows, scale);
}

}  // namespace

PYLLAMA_KERNEL(grouped_linear);
