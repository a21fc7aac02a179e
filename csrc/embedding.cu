// embedding.cu - the rows of a matrix that token ids name; NaN for an id that it has not. A thread moves 16 bytes.
#include <cmath>

#include "common/op.h"
#include "common/ptx.h"
#include "common/vector.h"

namespace {

constexpr int max_threads = 256;

template <class T>
struct Params {
    const T* weight_VD;
    const int64_t* token_ids_T;
    T* y_TD;
    int64_t V;
    int D;
};

template <class T>
__global__ void __launch_bounds__(max_threads) embedding_kernel(const Params<T> p) {
    wait_for_previous_kernels();
    const int64_t token = blockIdx.x, id = p.token_ids_T[token];
    const int at = blockIdx.y * blockDim.x + threadIdx.x;
    if (at >= p.D / Vector<T>::size) return;
    Vector<T> v;
    if (id >= 0 && id < p.V)
        v = load(p.weight_VD + id * p.D, at);
    else
        for (int i = 0; i < v.pairs; ++i) v.set(i, {NAN, NAN});
    store(p.y_TD + token * p.D, at, v);
}

Tensor embedding(const Tensor& weight, const Tensor& token_ids) {
    Arguments arguments("embedding");
    arguments.tensor("weight", weight, {"V", "D"});
    arguments.tensor("token_ids", token_ids, ScalarType::Long, {"T"});
    const int64_t T = arguments["T"], D = arguments["D"];
    if (D % 8 != 0) arguments.fail("D, the hidden size, is ", D, ", but must be a multiple of 8");
    if (T > INT_MAX) arguments.fail("T, the number of tokens, is ", T, ", but must be below 2^31");

    Tensor y = torch::stable::new_empty(weight, {T, D});
    if (T == 0 || D == 0) return y;
    const DeviceScope device(weight);
    arguments.with_float_type([&](auto element) {
        using E = decltype(element);
        const Params<E> p{arguments.aligned_data<E>("weight", weight), arguments.data<int64_t>("token_ids", token_ids),
                          static_cast<E*>(y.mutable_data_ptr()), arguments["V"], int(D)};
        const int vectors = int(D) / Vector<E>::size, threads = std::min(vectors, max_threads);
        const dim3 grid(unsigned(T), unsigned((vectors + threads - 1) / threads));
        launch(embedding_kernel<E>, {grid, dim3(threads), 0, device.stream, true}, p);
    });
    return y;
}

}  // namespace

PYLLAMA_KERNEL(embedding);
