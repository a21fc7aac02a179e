// grouped_swiglu.cu - the experts' gate and up products and SwiGLU in one kernel. The device code is common/grouped.h.
#include "common/grouped.h"

namespace {

Tensor grouped_swiglu(const Tensor& x, const Tensor& weight, const Tensor& offsets, const std::optional<Tensor>& rows) {
    return grouped<true>("grouped_swiglu", x, weight, offsets, rows, std::nullopt);
}

}  // namespace

PYLLAMA_KERNEL(grouped_swiglu);
