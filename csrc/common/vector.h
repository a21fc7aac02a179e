// vector.h - 16 bytes, the widest access of a thread, as elements of T; arithmetic is on pairs of floats.
#pragma once

#include "common/device.h"

__device__ inline float2 to_floats(float2 v) { return v; }
__device__ inline float2 to_floats(__half2 v) { return __half22float2(v); }
// By the bits: a bfloat16 is the upper half of a float, and halves of their own would each take a register.
__device__ inline float2 to_floats(__nv_bfloat162 v) {
    const unsigned both = reinterpret_cast<const unsigned&>(v);
    return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
}

__device__ inline void from_floats(float2& pair, float2 v) { pair = v; }
__device__ inline void from_floats(__half2& pair, float2 v) { pair = __float22half2_rn(v); }
__device__ inline void from_floats(__nv_bfloat162& pair, float2 v) { pair = __float22bfloat162_rn(v); }

template <class T>
struct PairOf;
template <>
struct PairOf<float> {
    using type = float2;
};
template <>
struct PairOf<__half> {
    using type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
    using type = __nv_bfloat162;
};

template <class T>
struct Vector {
    using Pair = typename PairOf<T>::type;
    static constexpr int size = 16 / sizeof(T), pairs = size / 2;

    uint4 bits{};  // zeros

    __device__ float2 get(int i) const { return to_floats(reinterpret_cast<const Pair*>(&bits)[i]); }
    __device__ void set(int i, float2 v) { from_floats(reinterpret_cast<Pair*>(&bits)[i], v); }
};

// The i-th vector of an array of T, which is aligned to 16 bytes.
template <class T>
__device__ inline Vector<T> load(const T* array, int i) {
    return {reinterpret_cast<const uint4*>(array)[i]};
}
template <class T>
__device__ inline void store(T* array, int i, const Vector<T>& v) {
    reinterpret_cast<uint4*>(array)[i] = v.bits;
}

template <class T>
__device__ float sum_of_squares(const Vector<T>& v) {
    float sum = 0;
    for (int i = 0; i < v.pairs; ++i) {
        const float2 f = v.get(i);
        sum += f.x * f.x + f.y * f.y;
    }
    return sum;
}

// v * scale * weight, in float32, rounded once.
template <class T>
__device__ Vector<T> scaled(const Vector<T>& v, float scale, const Vector<T>& weight) {
    Vector<T> result;
    for (int i = 0; i < v.pairs; ++i) {
        const float2 f = v.get(i), w = weight.get(i);
        result.set(i, {f.x * scale * w.x, f.y * scale * w.y});
    }
    return result;
}
