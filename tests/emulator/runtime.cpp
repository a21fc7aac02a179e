// runtime.cpp - the part of the CUDA runtime that csrc/reader_cuda.h calls, for the CPU. What a stream is given is done
// as late as CUDA allows, when something waits for it, so that a buffer filled too early is copied with the wrong
// bytes. Device memory is the host's. The functions at the end are for tests.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <set>
#include <utility>

struct CUstream_st {
    std::deque<std::function<void()>> queue;
    int64_t finished = 0;
    int64_t enqueued() const { return finished + int64_t(queue.size()); }
    void run_to(int64_t count) {
        while (finished < count) {
            const auto work = std::move(queue.front());
            queue.pop_front();
            work();
            ++finished;
        }
    }
};

struct CUevent_st {
    CUstream_st* stream = nullptr;
    int64_t count = 0;  // of the stream's work, that is before the event
    void wait() const {
        if (stream) stream->run_to(count);
    }
};

namespace {

std::recursive_mutex mutex;  // of all below
CUstream_st null_stream;
std::set<void*> live;  // streams, events, pinned buffers
int calls_to_failure = -1;
cudaError_t failure = cudaSuccess;

// Does what a call is for, or fails where a test wants it to.
template <class Work>
cudaError_t call(Work work) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    if (calls_to_failure >= 0 && calls_to_failure-- == 0) return failure;
    work();
    return cudaSuccess;
}

CUstream_st& of(cudaStream_t stream) { return stream ? *stream : null_stream; }

template <class T>
T* made(T* object) {
    live.insert(object);
    return object;
}

// Frees what a call made, whether or not calls fail.
template <class T>
cudaError_t destroy(T* object) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    if (live.erase(object)) delete object;
    return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) {
    return call([&] { *device = 0; });
}
cudaError_t cudaSetDevice(int) {
    return call([] {});
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "an error that a test wanted";
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    return call([&] { *stream = made(new CUstream_st); });
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return destroy(stream); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return call([&] { of(stream).run_to(of(stream).enqueued()); });
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    return call([&] { of(stream).queue.push_back([recorded = *event] { recorded.wait(); }); });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return call([&] { *event = made(new CUevent_st); });
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return destroy(event); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return call([&] { *event = {&of(stream), of(stream).enqueued()}; });
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return call([&] { event->wait(); });
}

cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) {
    return call([&] { *data = made(static_cast<char*>(std::malloc(bytes))); });
}
cudaError_t cudaFreeHost(void* data) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    if (live.erase(data)) std::free(data);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    return call([&] { of(stream).queue.push_back([=] { std::memcpy(to, from, bytes); }); });
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
    return call([&] {
        of(stream).queue.push_back([=] {
            for (size_t row = 0; row < height; ++row)
                std::memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch,
                            width);
        });
    });
}

#define FOR_TESTS __attribute__((visibility("default")))

// Sets memory on the null stream, whenever something waits for it.
FOR_TESTS void emulator_set_memory(void* data, int value, size_t bytes) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    null_stream.queue.push_back([=] { std::memset(data, value, bytes); });
}
FOR_TESTS void emulator_synchronize() { cudaStreamSynchronize(nullptr); }

// The call after `calls` more calls fails with an error; -1: none does. Returns how many were left before.
FOR_TESTS int emulator_fail(int calls, int error) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    failure = static_cast<cudaError_t>(error);
    return std::exchange(calls_to_failure, calls);
}

// How many streams, events and pinned buffers there are.
FOR_TESTS int emulator_live() {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    return int(live.size());
}
}
