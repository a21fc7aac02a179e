// reader.h - pieces of files to their places in memory, by several threads. Plain C++: neither torch nor Python.
//
// The pieces are cut into chunks, in the files' order, and each thread takes the next one through a lane of its own:
// what reads a chunk and brings it to its place. The first error stops all, and so does the caller's.
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <vector>

struct File {
    int descriptor;
    std::string name;
};

// Rows one after the other in a file, whose places begin `pitch` bytes apart.
struct Piece {
    size_t file;
    int64_t offset;
    char* place;
    int64_t rows, row, pitch;  // row: bytes of each
};

// What a file does not give; `code` is an errno.
struct ReadError : std::runtime_error {
    int code;
    std::string file;
    ReadError(int code, const std::string& file, const std::string& what)
        : std::runtime_error(what), code(code), file(file) {}
};

inline void read_exactly(const File& file, char* place, int64_t bytes, int64_t offset) {
    while (bytes > 0) {
        const ssize_t count = pread(file.descriptor, place, bytes, offset);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) throw ReadError(errno, file.name, std::generic_category().message(errno));
        if (count == 0) {
            struct stat now{};
            fstat(file.descriptor, &now);
            throw ReadError(EIO, file.name,
                            "it ends at byte " + std::to_string(now.st_size) + ", where its header says that " +
                                std::to_string(offset + bytes - now.st_size) +
                                " more are: it was cut while it was read");
        }
        place += count, offset += count, bytes -= count;
    }
}

// The pieces as chunks of at most `limit` bytes, of whole rows where a row is no larger; in the files' order.
inline std::vector<Piece> cut(const std::vector<Piece>& pieces, int64_t limit) {
    std::vector<Piece> chunks;
    for (Piece p : pieces) {
        if (p.rows == 0 || p.row == 0) continue;
        if (p.pitch == p.row || p.rows == 1) p.pitch = p.row *= p.rows, p.rows = 1;
        const int64_t rows = std::max<int64_t>(1, limit / p.row), bytes = std::min(limit, p.row);
        for (int64_t r = 0; r < p.rows; r += rows)
            for (int64_t b = 0; b < p.row; b += bytes)
                chunks.push_back({p.file, p.offset + r * p.row + b, p.place + r * p.pitch + b,
                                  std::min(rows, p.rows - r), std::min(bytes, p.row - b), p.pitch});
    }
    std::sort(chunks.begin(), chunks.end(),
              [](const Piece& a, const Piece& b) { return std::tie(a.file, a.offset) < std::tie(b.file, b.offset); });
    return chunks;
}

// A lane to the host's memory: a file's bytes are read into their place.
struct HostLane {
    void begin() {}
    void bring(const File& file, const Piece& chunk) {
        for (int64_t r = 0; r < chunk.rows; ++r)
            read_exactly(file, chunk.place + r * chunk.pitch, chunk.row, chunk.offset + r * chunk.row);
    }
    void end() {}  // is called once for every begin(), after errors too: then nothing is under way any more
};

// Brings every chunk to its place, a thread for each lane. progress(bytes) is called by the calling thread, every
// so often and at the end, with the bytes read since; what it throws stops the threads and is thrown on.
template <class Lane, class Progress>
void bring_all(const std::vector<File>& files, const std::vector<Piece>& chunks, std::vector<Lane>& lanes,
               Progress progress) {
    std::atomic<size_t> next{0};
    std::atomic<int64_t> bytes{0};
    std::atomic<bool> stop{false};
    std::mutex mutex;  // of what follows
    std::condition_variable done;
    std::exception_ptr error;
    size_t count = std::min(lanes.size(), chunks.size()), running = count;

    const auto guarded = [&](auto&& work) {
        try {
            work();
        } catch (...) {
            stop = true;
            const std::lock_guard<std::mutex> lock(mutex);
            if (!error) error = std::current_exception();
        }
    };
    const auto work = [&](Lane& lane) {
        guarded([&] {
            lane.begin();
            for (size_t i; !stop && (i = next++) < chunks.size();) {
                lane.bring(files[chunks[i].file], chunks[i]);
                bytes += chunks[i].rows * chunks[i].row;
            }
        });
        guarded([&] { lane.end(); });
        const std::lock_guard<std::mutex> lock(mutex);
        if (--running == 0) done.notify_one();
    };

    std::vector<std::thread> threads;
    guarded([&] {
        for (size_t i = 0; i < count; ++i) threads.emplace_back(work, std::ref(lanes[i]));
        for (bool last = false; !last;) {
            {
                std::unique_lock<std::mutex> lock(mutex);
                last = done.wait_for(lock, std::chrono::milliseconds(50), [&] { return running == 0; });
            }
            progress(bytes.exchange(0));
        }
    });
    for (std::thread& thread : threads) thread.join();
    if (error) std::rethrow_exception(error);
}
