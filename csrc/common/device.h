// device.h - what every kernel includes. The same source compiles with nvcc for the GPU and with g++ for the
// CPU, where host_cuda.h (tests/emulator) supplies CUDA's words; kernels need no #ifdef and no <<<>>>.
#pragma once

#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#else
#include "host_cuda.h"
#endif

#ifdef __CUDACC__
constexpr const char* kernel_key = "CUDA";  // torch's dispatch key for the tensors that kernels take here
#else
constexpr const char* kernel_key = "CPU";
#endif

// A block's shared memory, as one struct:  auto& tile = shared<Tile>();
// Calls with the same T name the same storage. T is trivial; its content is undefined at first.
template <class T>
__device__ inline T& shared() {
#ifdef __CUDACC__
    __shared__ alignas(alignof(T)) unsigned char storage[sizeof(T)];
    return *reinterpret_cast<T*>(storage);
#else
    static const char key = 0;
    return *static_cast<T*>(emu::shared_static(&key, sizeof(T), alignof(T)));
#endif
}

// The shared memory that the launch asked for (more than 48 KB is to be had only so), aligned to 1024 bytes.
template <class T>
__device__ inline T* dynamic_shared() {
#ifdef __CUDACC__
    extern __shared__ __align__(1024) unsigned char dynamic_storage[];
    return reinterpret_cast<T*>(dynamic_storage);
#else
    return static_cast<T*>(emu::shared_dynamic());
#endif
}

#ifdef __CUDACC__
// Throws on an error of the CUDA runtime; a GPU that this build has no code for gets its own message.
inline void check_cuda(cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // the next CUDA call, torch's perhaps, is not to report this one again
    if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorUnsupportedPtxVersion &&
        error != cudaErrorInvalidDeviceFunction)
        throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    throw std::runtime_error("this build of pyllama has kernels for " PYLLAMA_ARCHITECTURES ", but the GPU is sm_" +
                             std::to_string(major * 10 + minor) +
                             ": build it for that architecture, or run the eager ops with pyllama.eager()");
}
#endif

#ifdef __CUDACC__
inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    check_cuda(cudaGetDevice(&device));
    check_cuda(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}
// The current GPU's multiprocessors, and the bytes of shared memory that a block can have there.
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int max_shared_memory() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
#else
inline int multiprocessors() { return 8; }  // a few, so that small problems too are split among blocks
inline int max_shared_memory() { return 227 * 1024; }
#endif

#ifdef __CUDACC__
// Whether the kernel's code waits for the kernels before it: that for sm_90 and newer does.
template <class... Parameters>
bool waits_for_previous_kernels(void (*kernel)(Parameters...)) {
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, kernel));
    return attributes.ptxVersion >= 90;
}
#endif

// launch(kernel, {grid, block, smem, stream}, arguments...); arguments convert to the kernel's types.
struct Launch {
    dim3 grid, block;
    size_t smem = 0;  // bytes of dynamic_shared()
    cudaStream_t stream = nullptr;
    bool overlap = false;  // programmatic dependent launch: the kernel, which calls wait_for_previous_kernels, may
                           // start before the one ahead of it ends
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& l, Arguments&&... arguments) {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments), "wrong number of kernel arguments");
#ifdef __CUDACC__
    if (l.smem > 47 * 1024) {  // with what the kernel has of shared(), which is little beside it, more than 48

        const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(l.smem));
        if (error == cudaErrorInvalidValue) {  // more than a block can have, with what it has of shared()
            cudaGetLastError();
            throw std::runtime_error(
                "a kernel needs " + std::to_string(l.smem / 1024) + " KB of shared memory, but a block has " +
                std::to_string(max_shared_memory() / 1024) + " KB on this GPU: run pyllama.eager()");
        }
        check_cuda(error);
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = l.grid;
    config.blockDim = l.block;
    config.dynamicSmemBytes = l.smem;
    config.stream = l.stream;
    config.attrs = &attribute;
    config.numAttrs = l.overlap && waits_for_previous_kernels(kernel) ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...));
#else
    const std::tuple<void (*)(Parameters...), Parameters...> call(kernel,
                                                                  Parameters(std::forward<Arguments>(arguments))...);
    emu::launch(l.grid, l.block, l.smem, l.overlap, emu::call<Parameters...>, &call);
#endif
}
