// linear_add.cu - residual += x times a weight, for few tokens; in place, rounded once. The device code is
// common/skinny.h.
#include "common/skinny.h"

namespace {

template <class T>
struct Add {
    T* residual_TF;
    int64_t stride;   // elements from token to token
    const T* bias_F;  // or null

    __device__ void operator()(int token, int column, float sum, float) const {
        T& place = residual_TF[token * stride + column];
        if (bias_F) sum += float(bias_F[column]);
        place = T(float(place) + sum);
    }
};

void linear_add_(Tensor residual, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool early,
                 const std::optional<Tensor>& prefetch) {
    Arguments arguments("linear_add_");
    arguments.tensor("residual", residual, {"T", "F"});
    skinny::check_tensors(arguments, x, std::nullopt, weight, bias, "F");
    if (prefetch) arguments.tensor("prefetch", *prefetch, {"..."});
    const int64_t T = arguments["T"], F = arguments["F"];
    skinny::check_sizes(arguments, T, arguments["D"], F);
    if (T == 0 || F == 0) return;
    if (x.const_data_ptr() == residual.const_data_ptr())
        arguments.fail("x and residual are the same memory, but residual is written: give two tensors");
    const int64_t stride = arguments.rows("residual", residual).stride;

    const DeviceScope device(residual);
    arguments.with_float_type([&](auto element) {
        using E = decltype(element);
        const Add<E> finish{static_cast<E*>(residual.mutable_data_ptr()), stride,
                            bias ? arguments.data<E>("bias", *bias) : nullptr};
        auto p = skinny::product<E>(arguments, x, std::nullopt, 0, weight, false, early);
        p.next = prefetch_of(arguments, prefetch);
        skinny::run<false>(p, finish, device.stream);
    });
}

}  // namespace

PYLLAMA_KERNEL(linear_add_);
