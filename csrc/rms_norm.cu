// rms_norm.cu - y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich,
// arXiv:1910.07467), in float32, rounded once at the end. The device code is common/norm_rows.h.
#include "common/norm_rows.h"

namespace {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
    Arguments arguments("rms_norm");
    arguments.tensor("x", x, {"...", "D"});
    arguments.tensor("weight", weight, {"D"});
    const int D = norm_size(arguments);
    const Rows rows = arguments.rows("x", x);
    arguments.rows("weight", weight);

    Tensor y = torch::stable::new_empty(x, x.sizes());
    if (rows.count == 0) return y;
    const DeviceScope device(x);
    arguments.with_float_type([&](auto element) {
        using T = decltype(element);
        NormRows<T> p{};
        p.x_TD = static_cast<T*>(const_cast<void*>(x.const_data_ptr()));
        p.x_rows = rows;
        p.weight_D = static_cast<const T*>(weight.const_data_ptr());
        p.y_TD = static_cast<T*>(y.mutable_data_ptr());
        p.D = D;
        p.eps = float(eps);
        run_norm_rows<T, false>(p, device.stream);
    });
    return y;
}

}  // namespace

PYLLAMA_KERNEL(rms_norm);
