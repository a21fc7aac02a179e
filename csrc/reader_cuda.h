// reader_cuda.h - a lane to a GPU's memory: a ring of pinned buffers, each filled from a file and copied
// asynchronously.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <utility>

#include "reader.h"

struct OutOfMemory : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void check_reader(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // the next CUDA call, torch's perhaps, is not to report this one again
    const std::string text = std::string("CUDA, ") + what + ": " + cudaGetErrorString(error);
    if (error == cudaErrorMemoryAllocation) throw OutOfMemory(text);
    throw std::runtime_error(text);
}

// Makes a device the calling thread's, and the previous one again at the end.
class CurrentDevice {
    int previous_ = 0;

  public:
    explicit CurrentDevice(int device) {
        check_reader(cudaGetDevice(&previous_), "the current device");
        check_reader(cudaSetDevice(device), "a device to read to");
    }
    ~CurrentDevice() { cudaSetDevice(previous_); }
    CurrentDevice(const CurrentDevice&) = delete;
};

// An event, recorded on a stream.
class Event {
    cudaEvent_t event_ = nullptr;

  public:
    Event() {
        check_reader(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming | cudaEventBlockingSync), "an event");
    }
    ~Event() { cudaEventDestroy(event_); }
    Event(const Event&) = delete;
    void record(cudaStream_t stream) { check_reader(cudaEventRecord(event_, stream), "recording an event"); }
    void wait() { check_reader(cudaEventSynchronize(event_), "a copy to the device"); }  // at once before record()
    void hold(cudaStream_t stream) { check_reader(cudaStreamWaitEvent(stream, event_, 0), "waiting for an event"); }
};

// A buffer, and the event after which it may be filled again.
class PinnedBuffer {
    void* data_ = nullptr;

  public:
    Event empty;

    explicit PinnedBuffer(int64_t bytes) {
        check_reader(cudaHostAlloc(&data_, bytes, cudaHostAllocDefault),
                     ("a pinned buffer of " + std::to_string(bytes) + " bytes").c_str());
    }
    ~PinnedBuffer() { cudaFreeHost(data_); }
    PinnedBuffer(const PinnedBuffer&) = delete;
    char* data() { return static_cast<char*>(data_); }
};

class DeviceLane {
    int device_;
    int64_t bytes_;
    cudaStream_t stream_ = nullptr;
    Event* ready_;  // after which places may be written to; of the reader
    std::vector<std::unique_ptr<PinnedBuffer>> ring_;
    size_t next_ = 0;

  public:
    DeviceLane(int device, int64_t bytes, size_t buffers, Event* ready)
        : device_(device), bytes_(bytes), ready_(ready), ring_(buffers) {
        check_reader(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream");
    }
    DeviceLane(DeviceLane&& other) noexcept
        : device_(other.device_),
          bytes_(other.bytes_),
          stream_(std::exchange(other.stream_, nullptr)),
          ready_(other.ready_),
          ring_(std::move(other.ring_)) {}
    ~DeviceLane() {
        if (stream_) cudaStreamDestroy(stream_);
    }

    void begin() {
        check_reader(cudaSetDevice(device_), "a device to read to");  // of this thread, which is the lane's
        ready_->hold(stream_);
    }

    void bring(const File& file, const Piece& chunk) {
        std::unique_ptr<PinnedBuffer>& buffer = ring_[next_++ % ring_.size()];
        if (!buffer) buffer = std::make_unique<PinnedBuffer>(bytes_);
        buffer->empty.wait();
        read_exactly(file, buffer->data(), chunk.rows * chunk.row, chunk.offset);
        const char* data = buffer->data();
        const auto kind = cudaMemcpyHostToDevice;
        check_reader(chunk.rows == 1 ? cudaMemcpyAsync(chunk.place, data, chunk.row, kind, stream_)
                                     : cudaMemcpy2DAsync(chunk.place, chunk.pitch, data, chunk.row, chunk.row,
                                                         chunk.rows, kind, stream_),
                     "a copy to the device");
        buffer->empty.record(stream_);
    }

    void end() { check_reader(cudaStreamSynchronize(stream_), "a copy to the device"); }
};
