// add_rms_norm.cu - residual += x, rounded; x = rms_norm(residual, weight, eps); in place. Each tensor is read once and
// written once. The device code is common/norm_rows.h.
#include "common/norm_rows.h"

namespace {

void add_rms_norm_(Tensor x, Tensor residual, const Tensor& weight, double eps) {
    Arguments arguments("add_rms_norm_");
    arguments.tensor("x", x, {"...", "D"});
    arguments.tensor("residual", residual, {"...", "D"});
    arguments.tensor("weight", weight, {"D"});
    const int D = norm_size(arguments);
    const Rows rows = arguments.rows("x", x), residual_rows = arguments.rows("residual", residual);
    arguments.rows("weight", weight);

    if (rows.count == 0) return;
    if (x.const_data_ptr() == residual.const_data_ptr())
        arguments.fail("x and residual are the same memory, but both are written: give two tensors");
    const DeviceScope device(x);
    arguments.with_float_type([&](auto element) {
        using T = decltype(element);
        NormRows<T> p{};
        p.x_TD = static_cast<T*>(x.mutable_data_ptr());
        p.x_rows = rows;
        p.residual_TD = static_cast<T*>(residual.mutable_data_ptr());
        p.residual_rows = residual_rows;
        p.weight_D = static_cast<const T*>(weight.const_data_ptr());
        p.D = D;
        p.eps = float(eps);
        run_norm_rows<T, true>(p, device.stream);
    });
}

}  // namespace

PYLLAMA_KERNEL(add_rms_norm_);
