// norm_rope_store.cu - one pass over the QKV product, common/rope_store.h. The parts of qkv that held keys and values
// are left as they were.
#include "common/rope_store.h"

namespace {

void norm_rope_store_(Tensor qkv, Tensor kv_cache, const Tensor& positions, const Tensor& slots,
                      const std::optional<Tensor>& cos_sin, const std::optional<Tensor>& q_weight,
                      const std::optional<Tensor>& k_weight, double eps, bool interleaved) {
    Arguments arguments("norm_rope_store_");
    arguments.tensor("qkv", qkv, {"T", "features"});
    arguments.tensor("positions", positions, ScalarType::Int, {"T"});
    arguments.tensor("slots", slots, ScalarType::Int, {"T"});
    check_rope_store(arguments, qkv, kv_cache, cos_sin, q_weight, k_weight);

    if (qkv.numel() == 0) return;
    const DeviceScope device(qkv);
    arguments.with_float_type([&](auto element) {
        using T = decltype(element);
        auto p = make_rope_store<T>(arguments, qkv, kv_cache, cos_sin, q_weight, k_weight, eps);
        p.positions_T = arguments.data<int>("positions", positions);
        p.slots_T = arguments.data<int>("slots", slots);
        run_rope_store(p, interleaved, device.stream);
    });
}

}  // namespace

PYLLAMA_KERNEL(norm_rope_store_);
