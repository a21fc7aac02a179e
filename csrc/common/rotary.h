// rotary.h - heads in registers, two vectors of each in one lane, and their rotation by RoPE (Su et al.,
// arXiv:2104.09864): what rope.cu and norm_rope_store.cu share.
//
// The lanes of a head are side by side; its first lanes have vectors v and v + R/2, so that pairs (i, i + R/2) meet in
// one lane as pairs (2i, 2i + 1) do. A lane serves the same vectors of several heads of its token with the same angles.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/op.h"
#include "common/ptx.h"
#include "common/rows.h"
#include "common/vector.h"

constexpr int heads_per_lane = 2;

// Which two vectors of a head of K dimensions, R of them rotated, a lane has.
template <class T>
struct HeadPart {
    int first, second;
    bool has_first, has_second, rotated;

    __device__ HeadPart(int lane, int K, int R) {
        const int vectors = K / Vector<T>::size, half = R / 2 / Vector<T>::size;
        const int half_rest = (vectors - 2 * half + 1) / 2;  // of the vectors that pass unchanged
        rotated = lane < half;
        first = rotated ? lane : lane + half;
        second = first + (rotated ? half : half_rest);
        has_first = lane < half + half_rest;
        has_second = has_first && second < vectors;
    }
};

// A lane's elements of a head, computed with in float32.
template <class T>
struct HeadValues {
    static constexpr int size = Vector<T>::size;
    float x[2 * size];

    __device__ HeadValues(const Vector<T>& first, const Vector<T>& second) {
        for (int i = 0; i < first.pairs; ++i) {
            const float2 f = first.get(i), g = second.get(i);
            x[2 * i] = f.x, x[2 * i + 1] = f.y;
            x[size + 2 * i] = g.x, x[size + 2 * i + 1] = g.y;
        }
    }

    // The first or second vector, rounded.
    __device__ Vector<T> vector(int which) const {
        Vector<T> v;
        for (int i = 0; i < v.pairs; ++i) v.set(i, {x[which * size + 2 * i], x[which * size + 2 * i + 1]});
        return v;
    }
};

// `count` floats, 16 bytes at a time where they are so many.
template <int count>
__device__ inline void load_floats(float* to, const float* from) {
    using Chunk = std::conditional_t<count % 4 == 0, float4, float2>;
    for (int i = 0; i < count * int(sizeof(float)) / int(sizeof(Chunk)); ++i)
        reinterpret_cast<Chunk*>(to)[i] = reinterpret_cast<const Chunk*>(from)[i];
}

// Cosines and sines of the angles of a lane's pairs: of (i, i + R/2), or of (2i, 2i + 1).
template <class T, bool interleaved>
struct Angles {
    static constexpr int size = Vector<T>::size;
    alignas(16) float cos[size], sin[size];

    __device__ void load(const float* cos_sin_R, int R, const HeadPart<T>& part) {
        if (interleaved) {  // the pairs of the first vector, then those of the second
            constexpr int pairs = size / 2;
            for (int i = 0; i < 2; ++i) {
                const float* at = cos_sin_R + (i == 0 ? part.first : part.second) * pairs;
                load_floats<pairs>(cos + i * pairs, at);
                load_floats<pairs>(sin + i * pairs, at + R / 2);
            }
        } else {
            load_floats<size>(cos, cos_sin_R + part.first * size);
            load_floats<size>(sin, cos_sin_R + part.first * size + R / 2);
        }
    }

    __device__ void rotate(HeadValues<T>& values) const {
        for (int i = 0; i < size; ++i) {
            float &a = values.x[interleaved ? 2 * i : i], &b = values.x[interleaved ? 2 * i + 1 : i + size];
            const float x = a, y = b;
            a = x * cos[i] - y * sin[i];
            b = y * cos[i] + x * sin[i];
        }
    }
};

// The threads for `heads` heads of each of T tokens: block (lanes of a head, heads at a time, tokens), grid (tokens,
// heads). A thread has heads_per_lane heads. All warps are whole.
struct HeadTile {
    dim3 grid, block;
};

inline HeadTile choose_head_tile(int64_t T, int heads, int lanes) {
    const int needed = (heads + heads_per_lane - 1) / heads_per_lane;
    const int y = std::min(whole_threads(lanes * needed), 256) / lanes, z = std::clamp(128 / (lanes * y), 1, 64);
    return {dim3((T + z - 1) / z, (needed + y - 1) / y), dim3(lanes, y, z)};
}

// The lanes of a head of K dimensions, a power of two up to 32; checks what K and R must be.
template <class T>
int head_lanes(int K) {
    return whole_threads((K / Vector<T>::size + 1) / 2);
}

inline void check_head(const Arguments& arguments, int64_t K, int64_t R) {
    if (K % 8 != 0 || K < 8 || K > 256)
        arguments.fail("K, the head size, is ", K, ", but must be a multiple of 8 from 8 to 256");
    if (R % 16 != 0 || R > K)
        arguments.fail("cos_sin's last dimension R is ", R, ", but must be a multiple of 16 and at most K = ", K);
}
