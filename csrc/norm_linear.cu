// norm_linear.cu - few tokens, normalised or as they are, times a weight. The device code is common/skinny.h.
#include "common/skinny.h"

namespace {

template <class T>
struct Store {
    T* out_TF;
    const T* bias_F;  // or null
    int F;

    __device__ void operator()(int token, int column, float sum, float) const {
        if (bias_F) sum += float(bias_F[column]);
        out_TF[int64_t(token) * F + column] = T(sum);
    }
};

Tensor norm_linear(const Tensor& x, const std::optional<Tensor>& norm_weight, double eps, const Tensor& weight,
                   const std::optional<Tensor>& bias, bool early) {
    Arguments arguments("norm_linear");
    skinny::check_tensors(arguments, x, norm_weight, weight, bias, "F");
    const int64_t T = arguments["T"], F = arguments["F"];
    skinny::check_sizes(arguments, T, arguments["D"], F);

    Tensor out = torch::stable::new_empty(x, {T, F});
    if (T == 0 || F == 0) return out;
    const DeviceScope device(x);
    arguments.with_float_type([&](auto element) {
        using E = decltype(element);
        const Store<E> finish{static_cast<E*>(out.mutable_data_ptr()),
                              bias ? arguments.data<E>("bias", *bias) : nullptr, int(F)};
        skinny::run<false>(skinny::product<E>(arguments, x, norm_weight, eps, weight, false, early), finish,
                           device.stream);
    });
    return out;
}

}  // namespace

PYLLAMA_KERNEL(norm_linear);
