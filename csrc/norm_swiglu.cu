// norm_swiglu.cu - few tokens, normalised or as they are, through the gate and the up part of a feed-forward layer. The
// device code is common/skinny.h, which has both parts of a column in the same thread at the end.
#include "common/activation.h"
#include "common/skinny.h"

namespace {

template <class T>
struct Gate {
    T* out_TF;
    const T* bias_2F;  // or null
    int F;

    __device__ void operator()(int token, int column, float gate, float up) const {
        if (bias_2F) gate += float(bias_2F[column]), up += float(bias_2F[F + column]);
        out_TF[int64_t(token) * F + column] = T(silu(gate) * up);
    }
};

Tensor norm_swiglu(const Tensor& x, const std::optional<Tensor>& norm_weight, double eps, const Tensor& weight,
                   const std::optional<Tensor>& bias, bool early) {
    Arguments arguments("norm_swiglu");
    skinny::check_tensors(arguments, x, norm_weight, weight, bias, "features");
    const int64_t T = arguments["T"], F = arguments["features"] / 2;
    if (arguments["features"] % 2)
        arguments.fail("weight has ", arguments["features"], " rows, but must have 2F, gate and up");
    skinny::check_sizes(arguments, T, arguments["D"], F);

    Tensor out = torch::stable::new_empty(x, {T, F});
    if (T == 0 || F == 0) return out;
    const DeviceScope device(x);
    arguments.with_float_type([&](auto element) {
        using E = decltype(element);
        const Gate<E> finish{static_cast<E*>(out.mutable_data_ptr()), bias ? arguments.data<E>("bias", *bias) : nullptr,
                             int(F)};
        skinny::run<true>(skinny::product<E>(arguments, x, norm_weight, eps, weight, true, early), finish,
                          device.stream);
    });
    return out;
}

}  // namespace

PYLLAMA_KERNEL(norm_swiglu);
