// rope.cu - rotates the first R of each head's K dimensions by the angles of the token's position (Su et al.,
// arXiv:2104.09864), in float32, rounded once. The heads of a token share its row of the table.
#include "common/op.h"
#include "common/rotary.h"
#include "common/rows.h"
#include "common/vector.h"

namespace {

template <class T>
struct Params {
    const T* x_THK;
    int64_t x_stride_T, x_stride_H;
    const float* cos_sin_PR;
    int64_t cos_sin_stride;
    const int* positions_T;
    T* y_THK;  // contiguous
    int tokens, heads, K, R;
};

template <class T, bool interleaved>
__global__ void __launch_bounds__(256) kernel(const Params<T> p) {
    const int64_t token = int64_t(blockIdx.x) * blockDim.z + threadIdx.z;
    const HeadPart<T> part(threadIdx.x, p.K, p.R);
    if (token >= p.tokens || !part.has_first) return;
    const int position = p.positions_T[token];
    const T* x = p.x_THK + token * p.x_stride_T;
    T* y = p.y_THK + token * p.heads * p.K;
    const int head = blockIdx.y * heads_per_lane * blockDim.y + threadIdx.y;

    Vector<T> kept[heads_per_lane][2];
#pragma unroll
    for (int i = 0; i < heads_per_lane; ++i) {
        const int h = head + i * blockDim.y;
        if (h >= p.heads) break;
        kept[i][0] = load(x + h * p.x_stride_H, part.first);
        if (part.has_second) kept[i][1] = load(x + h * p.x_stride_H, part.second);
    }
    Angles<T, interleaved> angles;
    if (part.rotated) angles.load(p.cos_sin_PR + position * p.cos_sin_stride, p.R, part);
#pragma unroll
    for (int i = 0; i < heads_per_lane; ++i) {
        const int h = head + i * blockDim.y;
        if (h >= p.heads) break;
        HeadValues<T> values(kept[i][0], kept[i][1]);
        if (part.rotated) angles.rotate(values);
        store(y + h * p.K, part.first, values.vector(0));
        if (part.has_second) store(y + h * p.K, part.second, values.vector(1));
    }
}

Tensor rope(const Tensor& x, const Tensor& cos_sin, const Tensor& positions, bool interleaved) {
    Arguments arguments("rope");
    arguments.tensor("x", x, {"T", "heads", "K"});
    arguments.tensor("cos_sin", cos_sin, ScalarType::Float, {"max_positions", "R"});
    arguments.tensor("positions", positions, ScalarType::Int, {"T"});
    check_head(arguments, arguments["K"], arguments["R"]);
    arguments.rows("x", x);
    arguments.rows("cos_sin", cos_sin);

    Tensor y = torch::stable::new_empty(x, x.sizes());
    if (y.numel() == 0) return y;
    const DeviceScope device(x);
    arguments.with_float_type([&](auto element) {
        using T = decltype(element);
        Params<T> p;
        p.x_THK = static_cast<const T*>(x.const_data_ptr());
        p.x_stride_T = x.stride(0);
        p.x_stride_H = x.stride(1);
        p.cos_sin_PR = static_cast<const float*>(cos_sin.const_data_ptr());
        p.cos_sin_stride = cos_sin.stride(0);
        p.positions_T = arguments.data<int>("positions", positions);
        p.y_THK = static_cast<T*>(y.mutable_data_ptr());
        p.tokens = int(arguments["T"]), p.heads = int(arguments["heads"]);
        p.K = int(arguments["K"]), p.R = int(arguments["R"]);
        const HeadTile tile = choose_head_tile(p.tokens, p.heads, head_lanes<T>(p.K));
        launch(interleaved ? kernel<T, true> : kernel<T, false>, {tile.grid, tile.block, 0, device.stream}, p);
    });
    return y;
}

}  // namespace

PYLLAMA_KERNEL(rope);
